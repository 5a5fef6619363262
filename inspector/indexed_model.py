"""A model as ONNX Runtime's quantizer edits it, with look-ups by name instead of scans.

Of its `ONNXModel` the quantizer asks nodes and initializers by name, each a scan of the whole graph
there. `IndexedModel` answers the same from an index; `UneditedModel` notes what an edit would do
and changes nothing. Both share one `LoadedModel` and copy no weight.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import onnx
from onnx import numpy_helper
from onnxruntime.quantization import quant_utils
from onnxruntime.quantization.onnx_model import ONNXModel


class Initializers:
    """The initializers in order, looked up by name; holds references and copies no weight.

    Args:
        tensors: to begin with.
        below: further ones that are looked up and never changed.
    """

    def __init__(
        self, tensors: Iterable[onnx.TensorProto] = (), *, below: Initializers | None = None
    ) -> None:
        self._below = below
        self._tensors: dict[int, onnx.TensorProto] = {}
        self._places: dict[str, list[int]] = {}
        self._next = 0
        # The first of each name, also of those below.
        self._first: dict[str, onnx.TensorProto] = dict(below._first) if below else {}
        for tensor in tensors:
            self.append(tensor)

    def append(self, tensor: onnx.TensorProto) -> None:
        name = tensor.name
        self._tensors[self._next] = tensor
        self._places.setdefault(name, []).append(self._next)
        self._first.setdefault(name, tensor)
        self._next += 1

    def find(self, name: str) -> onnx.TensorProto | None:
        return self._first.get(name)

    def remove(self, tensor: onnx.TensorProto) -> bool:
        places = self._places.get(tensor.name)
        if not places:
            return False
        del self._tensors[places.pop(0)]
        del self._first[tensor.name]
        if places:
            self._first[tensor.name] = self._tensors[places[0]]
        return True

    def names(self) -> Iterable[str]:
        return self._first

    def __iter__(self) -> Iterator[onnx.TensorProto]:
        if self._below is not None:
            yield from self._below
        yield from self._tensors.values()


def find_by_name(name: str, items: Any) -> Any:
    if type(items) is Initializers:
        return items.find(name)
    return quant_utils.find_by_name(name, items)


class _Lookups:
    """What both models answer alike."""

    def __init__(self, source: LoadedModel, initializers: Initializers) -> None:
        self._source = source
        self._initializers = initializers

    def initializer(self) -> Initializers:
        return self._initializers

    def get_initializer(self, name: str) -> onnx.TensorProto | None:
        return self._initializers.find(name)

    def is_graph_output(self, name: str) -> bool:
        return name in self._source.output_names

    def is_graph_input(self, name: str) -> bool:
        return name in self._source.input_names

    def get_tensor_type(self, name: str) -> Any:
        return self._source.tensor_type(name)

    def get_constant_value(self, name: str) -> Any:
        return self._source.constant_value(name)

    def get_largest_initializer_name_suffix(self, prefix: str) -> int:
        return _largest_suffix(prefix, self._initializers.names())

    def add_initializer(self, tensor: onnx.TensorProto) -> None:
        if self._initializers.find(tensor.name) is None:
            self._initializers.append(tensor)


class IndexedModel(_Lookups):
    """What the quantizer asks of its `ONNXModel`, answered from an index.

    No subclass: a method that is not here must fail and not read a graph that nobody edits.

    Attributes:
        model: the proto without nodes and initializers until `build`.
    """

    replace_node_input = staticmethod(ONNXModel.replace_node_input)

    def __init__(self, source: LoadedModel) -> None:
        super().__init__(source, Initializers(source.initializers))
        self.model = onnx.ModelProto()
        self.model.CopyFrom(source.shell)
        self._nodes: list[onnx.NodeProto] = []
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        self._makers: dict[str, list[onnx.NodeProto]] = {}
        for node in source.nodes:
            own = onnx.NodeProto()
            own.CopyFrom(node)
            self._append(own)

    def _append(self, node: onnx.NodeProto) -> None:
        self._nodes.append(node)
        for name in node.input:
            if name:
                self._readers.setdefault(name, []).append(node)
        for name in node.output:
            if name:
                self._makers.setdefault(name, []).append(node)

    # Looking

    def nodes(self) -> list[onnx.NodeProto]:
        return self._nodes

    def input_name_to_nodes(self) -> dict[str, list[onnx.NodeProto]]:
        return self._readers

    # Editing

    def add_nodes(self, nodes: Iterable[onnx.NodeProto]) -> None:
        for node in nodes:
            self.add_node(node)

    def add_node(self, node: onnx.NodeProto) -> None:
        self._append(node)

    def remove_nodes(self, nodes: Iterable[onnx.NodeProto]) -> None:
        gone = {id(node) for node in nodes}
        if gone:
            self._nodes = [n for n in self._nodes if id(n) not in gone]
            for index in (self._readers, self._makers):
                for name in list(index):
                    index[name] = [n for n in index[name] if id(n) not in gone]

    def replace_input_of_all_nodes(self, old: str, new: str) -> None:
        readers = self._readers.pop(old, [])
        for node in {id(n): n for n in readers}.values():
            ONNXModel.replace_node_input(node, old, new)
        if readers:
            self._readers.setdefault(new, []).extend(readers)

    def replace_input_of_nodes(self, old: str, new: str, names: Collection[str]) -> None:
        readers = self._readers.get(old, [])
        moved = [n for n in readers if n.name in names]
        for node in {id(n): n for n in moved}.values():
            ONNXModel.replace_node_input(node, old, new)
        if moved:
            self._readers[old] = [n for n in readers if n.name not in names]
            self._readers.setdefault(new, []).extend(moved)

    def replace_output_of_all_nodes(self, old: str, new: str) -> None:
        makers = self._makers.pop(old, [])
        for node in {id(n): n for n in makers}.values():
            ONNXModel.replace_node_output(node, old, new)
        if makers:
            self._makers.setdefault(new, []).extend(makers)

    def initializer_extend(self, tensors: Sequence[onnx.TensorProto]) -> None:
        for tensor in tensors:
            self._initializers.append(tensor)

    def remove_initializer(self, tensor: onnx.TensorProto) -> None:
        if self._initializers.remove(tensor):
            self._drop_input(tensor.name)

    def _drop_input(self, name: str) -> None:
        if name in self._source.input_names:
            for given in self.model.graph.input:
                if given.name == name:
                    self.model.graph.input.remove(given)
                    break

    def set_opset_import(self, domain: str, version: int) -> None:
        ONNXModel(self.model).set_opset_import(domain, version)

    def clean_initializers(self) -> None:
        """Puts the graph together from what is used, then lets ONNX Runtime clean it.

        What it would remove one by one, each with a scan, is left out beforehand.
        """
        wanted = {name for node in self._nodes for name in node.input if name}
        wanted.update(o.name for o in self.model.graph.output if o.name)
        inside = self._source.names_in_bodies
        made = {name for node in self._nodes for name in node.output}
        kept, seen = [], set()
        for tensor in self._initializers:
            name = tensor.name
            used = (name in wanted and name not in made) or name in inside
            if used and name not in seen:
                seen.add(name)
                kept.append(tensor)
            elif name not in inside:
                self._drop_input(name)
        self.build(kept)
        # It writes nodes that hold bodies anew, which changes bytes.
        if self._source.has_bodies:
            ONNXModel(self.model).clean_initializers()

    def build(self, initializers: Iterable[onnx.TensorProto]) -> None:
        self.model.graph.node.extend(self._nodes)
        self.model.graph.initializer.extend(initializers)


class LoadedModel:
    """The loaded model as it is before any edit; nobody changes it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.initializers = list(model.graph.initializer)
        # What is neither node nor weight: copied for every result.
        self.shell = onnx.ModelProto()
        for field, value in model.ListFields():
            if field.name == "graph":
                continue
            if isinstance(value, (str, bytes, int)):
                setattr(self.shell, field.name, value)
            else:
                getattr(self.shell, field.name).MergeFrom(value)
        for field, value in model.graph.ListFields():
            if field.name in ("node", "initializer"):
                continue
            if isinstance(value, str):
                setattr(self.shell.graph, field.name, value)
            else:
                getattr(self.shell.graph, field.name).MergeFrom(value)
        self.input_names = frozenset(i.name for i in model.graph.input)
        self.output_names = frozenset(o.name for o in model.graph.output)
        bodies = list(_bodies(model.graph))
        self.has_bodies = bool(bodies)
        self.names_in_bodies = frozenset(
            name
            for body in bodies
            for name in (
                *(i for n in body.node for i in n.input),
                *(o.name for o in body.output),
            )
            if name
        )
        self._types = {v.name: v.type.tensor_type for v in model.graph.value_info}
        for value in (*model.graph.input, *model.graph.output):
            self._types.setdefault(value.name, value.type.tensor_type)

        self.by_name = Initializers(self.initializers)
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self._constants: dict[str, onnx.NodeProto] = {}
        for node in self.nodes:
            for name in node.input:
                if name:
                    self.readers.setdefault(name, []).append(node)
            if node.op_type == "Constant":
                self._constants.setdefault(node.output[0], node)

    def tensor_type(self, name: str) -> Any:
        return self._types.get(name)

    def constant_value(self, name: str) -> Any:
        """The array of a Constant node or an initializer; None for any other tensor."""
        node = self._constants.get(name)
        for attribute in node.attribute if node is not None else ():
            if attribute.name == "value":
                return numpy_helper.to_array(attribute.t)
        found = self.by_name.find(name)
        return None if found is None else numpy_helper.to_array(found)


def _bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else []
            for body in (*inner, *attribute.graphs):
                yield body
                yield from _bodies(body)


class UneditedModel(_Lookups):
    """What the quantizer asks of its model while it decides; edits are noted or do nothing."""

    def __init__(self, source: LoadedModel) -> None:
        super().__init__(source, Initializers(below=source.by_name))
        self.model = onnx.ModelProto()  # takes the producer's name
        self.bias_of_node: dict[tuple[str, str], str] = {}

    def nodes(self) -> list[onnx.NodeProto]:
        return self._source.nodes

    def input_name_to_nodes(self) -> dict[str, list[onnx.NodeProto]]:
        return self._source.readers

    def replace_input_of_nodes(self, old: str, new: str, names: Collection[str]) -> None:
        # A bias that two nodes share: each gets its own copy.
        for name in names:
            self.bias_of_node[name, old] = new

    def replace_output_of_all_nodes(self, old: str, new: str) -> None:
        """A Relu is folded; nobody else reads the tensor before it, so nobody notices."""

    def clean_initializers(self) -> None:
        """Nothing was added."""

    def set_opset_import(self, domain: str, version: int) -> None:
        """Nothing is written."""


def _largest_suffix(prefix: str, names: Iterable[str]) -> int:
    largest = -1
    for name in names:
        if name.startswith(prefix):
            try:
                largest = max(largest, int(name[len(prefix) :]))
            except ValueError:
                continue
    return largest
