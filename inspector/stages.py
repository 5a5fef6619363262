"""A model cut into stages, of which a run computes only those that its inputs have changed.

The cuts are where few bytes cross, so that the stages between cost about the same. What crossed a
cut is remembered for each sample together with the state of everything before it: the values of
the bound inputs there. A run begins at the last cut whose state it shares with an earlier run of
the sample. Lists that differ late in the model, or that a sweep tries one node at a time, share
most of what they compute.

A stage that has run often with the same switches gets a session in which their Ifs are resolved.
All kernels are those of the uncut model: the outputs are the same to the bit.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import ref

import numpy as np
import onnx
from numpy.typing import NDArray

from inspector.errors import InspectorError
from inspector.runtime import BoundSession, Feed, held_value, open_session, refused_feed

# What crosses cuts is remembered up to here.
REMEMBERED_BYTES = 512 * 2**20
MOST_STAGES = 10
# A stage shorter than this gains less than it costs to call it and to keep what it gives.
_STAGE_SECONDS = 2e-3
_CROSSING_SHARE = 0.25
# A rough machine, to balance stages by; only their proportions matter.
_NODE_SECONDS, _MAC_SECONDS, _ELEMENT_SECONDS = 1e-5, 1e-10, 1e-9
# A session without switches is opened once running with them took so many times its opening: it
# saves a tenth to a third of a run.
_WORTH = 5
_KEPT_RESOLVED = 2
_KNOWN_FORMS = 64
_KNOWN_ARRAYS = 4096
# Of a dimension that is not known beforehand: the first, and any other.
_UNKNOWN = (1, 64)

Condition = tuple[tuple[str, bool], ...]


class StagedSession:
    """A session of which many inputs stay as they are from run to run.

    Several threads may run it at a time, while none sets an input.

    Args:
        proto: the model; inputs that are conditions of Ifs are its switches.
        bound: inputs that are set; the others come with every feed.
        shapes: of tensors, as far as known; only to cut the model evenly.
        name: for messages.
        stages: at most so many; None to choose.

    Attributes:
        output_names: of the model, in order.
        stages: how many there are.
        computed: stages that were run.

    Raises:
        RunError: the runtime refuses the model.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        bound: Iterable[str],
        *,
        shapes: Mapping[str, Sequence[int | str | None]],
        name: str,
        stages: int | None = None,
    ) -> None:
        self._name = name
        bound = frozenset(bound)
        cuts = _cuts(proto.graph, shapes, stages)
        try:
            self._stages = list(_opened(proto, cuts, bound, name))
        except (InspectorError, ValueError):
            if not cuts:
                raise
            self._stages = list(_opened(proto, (), bound, name))
        self.output_names = tuple(
            n for n in (o.name for o in proto.graph.output) if n in self._stages[-1].gives
        )
        self._fed = tuple(i.name for i in proto.graph.input if i.name not in bound)
        self._values: dict[str, Any] = {}
        self._marks: dict[str, bytes] = {}
        self._on: dict[str, bool] = {}
        self._states: list[bytes] | None = None
        self._digests: dict[int, tuple[Any, bytes]] = {}
        self._memory = _Memory(REMEMBERED_BYTES)
        self._lock = threading.Lock()
        self.computed = 0

    @property
    def stages(self) -> int:
        return len(self._stages)

    def set(self, name: str, array: NDArray[Any]) -> None:
        """Gives a bound input these values; in place where it has some of this shape."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        mark = array.tobytes()
        known = self._values.get(name)
        if known is None or tuple(known.shape()) != array.shape:
            self._values[name] = held_value(array)
        else:
            known.update_inplace(array)
        if array.dtype == np.bool_ and array.ndim == 0:
            self._on[name] = bool(array)
        self._note(name, mark)

    def bind(self, name: str, value: Any, mark: bytes) -> None:
        """Gives a bound input a value of `held_value`, without a copy.

        Args:
            name: the input.
            value: what it is.
            mark: the same for equal values, and for no others of this input.
        """
        self._values[name] = value
        self._note(name, mark)

    def _note(self, name: str, mark: bytes) -> None:
        if self._marks.get(name) != mark:
            self._marks[name] = mark
            self._states = None

    def keep(self) -> None:
        """Remembers what the inputs as they are now lead to longer than what others do."""
        self._memory.favour(self._state_at_cuts())

    def run(
        self, feed: Feed, *, sample: str = "a feed", remember: bool = True
    ) -> dict[str, NDArray[Any]]:
        """The outputs by name for one feed.

        Args:
            feed: arrays by name, for the inputs that are not bound. They must not be changed in
                place afterwards where `remember` is set.
            sample: the feed's name, for messages.
            remember: keep what crosses the cuts for later runs of the same values.

        Raises:
            RunError: the runtime refused the feed.
        """
        given = {n: np.asarray(feed[n]) for n in self._fed if n in feed}
        remember = remember and len(self._stages) > 1
        first, values, key = 0, dict(self._values), b""
        with self._lock:
            states = self._state_at_cuts()
            if remember:
                key = self._key(given)
                first, crossing = self._memory.latest(key, states)
                values.update(crossing)
            self.computed += len(self._stages) - first
        wanted = {name for stage in self._stages[first:] for name in stage.input_names}
        try:
            values.update((n, held_value(a)) for n, a in given.items() if n in wanted)
        except (RuntimeError, ValueError) as error:
            raise refused_feed(self._name, sample, error) from error
        for at in range(first, len(self._stages)):
            stage = self._stages[at]
            values.update(stage.run(values, self._on, sample))
            if remember and stage.crossing:
                with self._lock:
                    crossing = {n: values[n] for n in stage.crossing}
                    self._memory.put(key, states[at], crossing)
        # Copied: what ONNX Runtime hands out is its own memory.
        return {n: np.array(values[n].numpy()) for n in self.output_names}

    def _state_at_cuts(self) -> list[bytes]:
        """What tells the state of all before each cut."""
        if self._states is None:
            total = hashlib.blake2b(digest_size=16)
            found: list[bytes] = []
            for at, stage in enumerate(self._stages[:-1]):
                total.update(f"stage {at} ".encode())
                for name in stage.live(self._on):
                    mark = self._marks.get(name, b"")
                    total.update(f"{name} {len(mark)} ".encode())
                    total.update(mark)
                found.append(total.digest())
            self._states = found
        return self._states

    def _key(self, feed: Mapping[str, NDArray[Any]]) -> bytes:
        """What tells a feed from all others by its values; an array is read once."""
        total = hashlib.blake2b(digest_size=16)
        for name, array in feed.items():
            known = self._digests.get(id(array))
            if known is None or known[0]() is not array:
                if len(self._digests) >= _KNOWN_ARRAYS:
                    self._digests = {k: v for k, v in self._digests.items() if v[0]() is not None}
                known = self._digests[id(array)] = (ref(array), _digest(array))
            total.update(name.encode() + known[1])
        return total.digest()


def _digest(array: NDArray[Any]) -> bytes:
    total = hashlib.blake2b(f"{array.dtype}{array.shape}".encode(), digest_size=16)
    if array.dtype.hasobject:
        total.update(repr(array.tolist()).encode())
    else:
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return total.digest()


class _Memory:
    """What crossed cuts, by feed, cut and state of all before it; the oldest goes first.

    What states that are favoured lead to stays, each of them on an equal share of the room.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._favoured: dict[bytes, int] = {}
        self._shares: list[int] = []
        self._lasting: dict[tuple[bytes, bytes], dict[str, Any]] = {}
        self._passing: OrderedDict[tuple[bytes, bytes], tuple[dict[str, Any], int]]
        self._passing = OrderedDict()
        self.size = 0

    def favour(self, states: Iterable[bytes]) -> None:
        """Keeps what these states lead to from now on; one call is one share."""
        for state in states:
            self._favoured.setdefault(state, len(self._shares))
        self._shares.append(0)

    def latest(self, key: bytes, states: Sequence[bytes]) -> tuple[int, dict[str, Any]]:
        """The last cut that is remembered, and what crossed it; 0 and nothing where none is.

        Args:
            key: of the feed.
            states: of all before each cut.
        """
        for at in range(len(states), 0, -1):
            place = (key, states[at - 1])
            if place in self._lasting:
                return at, self._lasting[place]
            if place in self._passing:
                self._passing.move_to_end(place)
                return at, self._passing[place][0]
        return 0, {}

    def put(self, key: bytes, state: bytes, values: dict[str, Any]) -> None:
        """Keeps what crossed the cut of a state, where there is room."""
        place = (key, state)
        if place in self._lasting or place in self._passing:
            return
        size = sum(_bytes_of(value) for value in values.values())
        share = self._favoured.get(state)
        lasts = share is not None and (
            self._shares[share] + size <= self._most // len(self._shares)
        )
        while self._passing and self.size + size > self._most:
            self.size -= self._passing.popitem(last=False)[1][1]
        if self.size + size > self._most:
            return
        self.size += size
        if share is not None and lasts:
            self._lasting[place] = values
            self._shares[share] += size
        else:
            self._passing[place] = (values, size)


def _bytes_of(value: Any) -> int:
    """About how much memory a held tensor takes; types narrower than 32 bits count as such."""
    return int(np.prod(value.shape(), dtype=np.int64)) * (8 if "64" in value.data_type() else 4)


# -- stages ------------------------------------------------------------------------------------


class _Stage:
    """One part of the model.

    Attributes:
        crossing: what later stages and the model's caller need of this one and those before.
        gives: the model's own outputs so far that can be read.
        kinds: ONNX Runtime's type of what this stage gives.
    """

    def __init__(
        self,
        proto: onnx.ModelProto,
        bound: frozenset[str],
        final: Sequence[str],
        before: _Stage | None,
        name: str,
    ) -> None:
        """
        Args:
            proto: its nodes, with its inputs and outputs.
            bound: inputs that are set.
            final: the model's own outputs among its outputs.
            before: the stage before.
            name: for messages.
        """
        self._proto = proto
        self._name = name
        graph = proto.graph
        begin = time.perf_counter()
        self._session = BoundSession(open_session(proto, optimized=False, name=name))
        self._opening = time.perf_counter() - begin
        self.kinds = self._session.output_kinds
        self._final = frozenset(n for n in final if n in self._session.readable)
        self._outputs = [
            o.name for o in graph.output if o.name in self._final or o.name not in final
        ]
        self.gives: list[str] = [
            *(before.gives if before else ()),
            *(n for n in final if n in self._final),
        ]
        self.crossing: tuple[str, ...] = ()
        own = [i.name for i in graph.input if i.name in bound]
        conditions = {n.input[0] for n in _every(graph.node) if n.op_type == "If"}
        self._switches = tuple(n for n in own if n in conditions)
        self._reads = _reads(graph, frozenset(own), frozenset(self._switches))
        self._resolved: OrderedDict[tuple[bool, ...], BoundSession] = OrderedDict()
        self._spent: OrderedDict[tuple[bool, ...], float] = OrderedDict()
        self._lock = threading.Lock()
        self.input_names = self._session.input_names

    def casts(self, name: str) -> bool:
        """Whether an output comes in another type than the model computes it in."""
        return name in self._session.casts

    def live(self, on: Mapping[str, bool]) -> Iterator[str]:
        """Bound inputs that count under these switches."""
        for name, sites in self._reads.items():
            if any(all(on.get(switch) is way for switch, way in site) for site in sites):
                yield name

    def run(self, values: Mapping[str, Any], on: Mapping[str, bool], sample: str) -> dict[str, Any]:
        """What the stage gives."""
        form = tuple(on[switch] for switch in self._switches)
        with self._lock:
            session = self._resolved.get(form, self._session)
            if session is not self._session:
                self._resolved.move_to_end(form)
        begin = time.perf_counter()
        found = session.run(values, self._outputs, cast=self._final, sample=sample)
        if session is self._session and form:
            with self._lock:
                self._account(form, time.perf_counter() - begin)
        return found

    def _account(self, form: tuple[bool, ...], seconds: float) -> None:
        """Opens a session for the switches as they are, once it is worth it."""
        if form in self._resolved:
            return
        self._spent[form] = self._spent.pop(form, 0.0) + seconds
        if self._spent[form] > _WORTH * self._opening:
            del self._spent[form]
            proto = _resolved(self._proto, dict(zip(self._switches, form, strict=True)))
            session = open_session(proto, optimized=False, name=self._name)
            self._resolved[form] = BoundSession(session)
            if len(self._resolved) > _KEPT_RESOLVED:
                self._resolved.popitem(last=False)
        elif len(self._spent) > _KNOWN_FORMS:
            self._spent.popitem(last=False)


def _opened(
    proto: onnx.ModelProto, cuts: Sequence[int], bound: frozenset[str], name: str
) -> Iterator[_Stage]:
    """The stages between cuts.

    Raises:
        InspectorError: the runtime refuses one.
        ValueError: something other than a tensor crosses a cut.
    """
    graph = proto.graph
    nodes = list(graph.node)
    ends = [*cuts, len(nodes)]
    makers = {o: at for at, node in enumerate(nodes) for o in node.output if o}
    stage_of = {o: sum(at >= cut for cut in cuts) for o, at in makers.items()}
    reads = [
        {n for node in nodes[start:end] for n in _names_read(node)}
        for start, end in zip([0, *cuts], ends, strict=True)
    ]
    last = len(cuts)
    finals = [o.name for o in graph.output]
    given = {i.name: i for i in graph.input}
    stored: dict[str, list[onnx.TensorProto]] = {}
    for tensor in graph.initializer:
        stored.setdefault(tensor.name, []).append(tensor)
    kinds: dict[str, str] = {}
    before: _Stage | None = None
    for at, (start, end) in enumerate(zip([0, *cuts], ends, strict=True)):
        final = [n for n in finals if stage_of.get(n, last) == at]
        needed = reads[at] | {n for n in final if n not in makers}
        part = onnx.ModelProto(ir_version=proto.ir_version)
        part.opset_import.extend(proto.opset_import)
        part.functions.extend(proto.functions)
        part.graph.name = f"{graph.name}_{at}"
        part.graph.node.extend(nodes[start:end])
        part.graph.input.extend(i for n, i in given.items() if n in needed)
        for tensor_name in sorted(n for n in needed if stage_of.get(n, at) < at):
            value = part.graph.input.add(name=tensor_name)
            value.type.tensor_type.elem_type = _element(kinds[tensor_name])
        part.graph.initializer.extend(t for n in needed for t in stored.get(n, ()))
        later = {n for r in reads[at + 1 :] for n in r}
        part.graph.output.extend(o for o in graph.output if o.name in final)
        across = [n for n in makers if stage_of[n] == at and n in later]
        part.graph.output.extend(onnx.ValueInfoProto(name=n) for n in across if n not in final)
        stage = _Stage(part, bound, final, before, name)
        for tensor_name in across:
            kind = stage.kinds[tensor_name]
            if tensor_name in final and stage.casts(tensor_name):
                raise ValueError(f"{tensor_name} is a {kind} that also leaves the model")
            kinds[tensor_name] = kind
        if at < last:
            needed_later = {n for n in later if stage_of.get(n, last) <= at}
            stage.crossing = tuple(dict.fromkeys((*sorted(needed_later), *stage.gives)))
        yield stage
        before = stage


def _element(kind: str) -> int:
    """ONNX's number of the element type of one of ONNX Runtime's types.

    Raises:
        ValueError: it is no tensor.
    """
    if not kind.startswith("tensor("):
        raise ValueError(f"a {kind} cannot cross a cut")
    return int(onnx.TensorProto.DataType.Value(kind[len("tensor(") : -1].upper()))


# -- where to cut ------------------------------------------------------------------------------


def _cuts(
    graph: onnx.GraphProto,
    shapes: Mapping[str, Sequence[int | str | None]],
    stages: int | None,
) -> tuple[int, ...]:
    """Numbers of the nodes that stages begin with, but for the first stage.

    Args:
        graph: its nodes are in topological order.
        shapes: of tensors, as far as known.
        stages: how many at most; None to choose.
    """
    sizes = {name: tuple(shape) for name, shape in shapes.items()}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        sizes.setdefault(value.name, tuple(d.dim_value or None for d in dims))
    sizes.update((i.name, tuple(i.dims)) for i in graph.initializer)
    costs = [
        _NODE_SECONDS + _seconds(node, sizes, _elements(sizes.get(next(iter(node.output), ""))))
        for node in graph.node
    ]
    total = sum(costs)
    count = min(MOST_STAGES, int(total / _STAGE_SECONDS)) if stages is None else stages
    count = min(count, len(costs))
    if count < 2:
        return ()
    crossing = _crossing(graph, sizes)
    ends = np.cumsum(costs)
    found: list[int] = []
    for at in range(1, count):
        # Near its share of the cost, where the least crosses; of equals, before a pair.
        middle, reach = total * at / count, total / count / 2
        near = [
            n
            for n in range((found[-1] if found else 0) + 1, len(costs))
            if abs(ends[n - 1] - middle) <= reach
            and crossing[n] * _ELEMENT_SECONDS <= _CROSSING_SHARE * total / count
        ]
        if near:
            found.append(min(near, key=lambda n: (crossing[n], graph.node[n].op_type != "If")))
    return tuple(found)


def _crossing(graph: onnx.GraphProto, sizes: Mapping[str, Sequence[Any]]) -> list[int]:
    """Elements that cross a cut before each node."""
    makers = {o: at for at, node in enumerate(graph.node) for o in node.output if o}
    until = dict(makers)
    for at, node in enumerate(graph.node):
        for name in _names_read(node):
            if name in until:
                until[name] = at
    change = np.zeros(len(graph.node) + 2, np.int64)
    for name, at in makers.items():
        if until[name] > at:
            size = _elements(sizes.get(name))
            change[at + 1] += size
            change[until[name] + 1] -= size
    return [int(v) for v in np.cumsum(change)]


def _elements(shape: Sequence[Any] | None) -> int:
    """How many elements a tensor has, about, where some is not known."""
    if shape is None:
        return _UNKNOWN[1] ** 2
    total = 1
    for at, size in enumerate(shape):
        total *= size if isinstance(size, int) else _UNKNOWN[min(at, 1)]
    return total


def _seconds(node: onnx.NodeProto, sizes: Mapping[str, Sequence[Any]], size: int) -> float:
    """About what a node takes that gives so many elements."""
    found = size * _ELEMENT_SECONDS
    inner = [
        sum(_seconds(n, sizes, size) for n in body.node) + _NODE_SECONDS for body in _bodies(node)
    ]
    if inner:
        return found + max(inner)
    shape = sizes.get(node.input[1]) if len(node.input) > 1 else None
    if node.op_type in ("Conv", "ConvTranspose") and shape:
        return found + size * _elements(shape[1:]) * _MAC_SECONDS
    if node.op_type in ("MatMul", "Gemm") and shape:
        depth = shape[-2] if len(shape) > 1 else shape[0]
        return found + size * _elements((1, depth)) * _MAC_SECONDS
    return found


# -- what graphs hold --------------------------------------------------------------------------


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _every(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their bodies."""
    for node in nodes:
        yield node
        for body in _bodies(node):
            yield from _every(body.node)


def _names_read(node: onnx.NodeProto) -> set[str]:
    """What a node and its bodies read, what bodies make for themselves included."""
    found = {name for name in node.input if name}
    for body in _bodies(node):
        found.update(o.name for o in body.output)
        for inner in body.node:
            found |= _names_read(inner)
    return found


def _reads(
    graph: onnx.GraphProto, names: frozenset[str], switches: frozenset[str]
) -> dict[str, list[Condition]]:
    """By input, under which switches it is read at each place that reads it."""
    found: dict[str, list[Condition]] = {}

    def visit(nodes: Iterable[onnx.NodeProto], condition: Condition) -> None:
        for node in nodes:
            for name in node.input:
                if name in names:
                    found.setdefault(name, []).append(condition)
            if node.op_type == "If" and node.input[0] in switches:
                for attribute in node.attribute:
                    way = (node.input[0], attribute.name == "then_branch")
                    visit(attribute.g.node, (*condition, way))
                continue
            for body in _bodies(node):
                visit(body.node, condition)

    visit(graph.node, ())
    for output in graph.output:
        if output.name in names:
            found.setdefault(output.name, []).append(())
    return found


def _resolved(proto: onnx.ModelProto, on: Mapping[str, bool]) -> onnx.ModelProto:
    """The model with the branch that is chosen in place of every If on a switch."""
    graph = proto.graph
    ordinary = [n for n in _every(graph.node) if not (n.op_type == "If" and n.input[0] in on)]
    # These names have to stay; a branch that only hands on gives its source's name to others.
    fixed = {o.name for o in graph.output}
    fixed.update(n for node in ordinary for body in _bodies(node) for inner in body.node
                 for n in _names_read(inner))  # fmt: skip
    alias: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []

    def put(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
        """Adds a node whose outputs get other names where there are some."""
        if node.op_type == "If" and node.input[0] in on:
            wanted = "then_branch" if on[node.input[0]] else "else_branch"
            branch = next(a.g for a in node.attribute if a.name == wanted)
            inner = {
                b.name: names.get(o, o) for b, o in zip(branch.output, node.output, strict=True)
            }
            for each in branch.node:
                put(each, inner)
            return
        outputs = [names.get(o, o) for o in node.output]
        if node.op_type == "Identity" and names and outputs[0] not in fixed:
            alias[outputs[0]] = alias.get(node.input[0], node.input[0])
            return
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for at, name in enumerate(copy.input):
            copy.input[at] = alias.get(name, name)
        for at, name in enumerate(outputs):
            copy.output[at] = name
        nodes.append(copy)

    for node in graph.node:
        put(node, {})
    found = onnx.ModelProto(ir_version=proto.ir_version)
    found.opset_import.extend(proto.opset_import)
    found.functions.extend(proto.functions)
    found.graph.name = graph.name
    found.graph.node.extend(nodes)
    read = {name for node in nodes for name in _names_read(node)} | fixed
    found.graph.input.extend(i for i in graph.input if i.name in read)
    found.graph.initializer.extend(i for i in graph.initializer if i.name in read)
    found.graph.output.extend(graph.output)
    return found
