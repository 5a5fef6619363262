"""Latency of models and of their nodes on this machine: interleaved, with spread.

Whole models are timed as deployed, in turns, so that whatever else the machine does falls on all
of them alike. Single nodes are timed by ONNX Runtime's own profiler, simulated (the nodes of the
file) or deployed (what the optimiser made of them; `NodeTimes` says which is which).
"""

from __future__ import annotations

import bisect
import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from google.protobuf.message import EncodeError

from inspector.errors import RunError
from inspector.folding import DQ, Q
from inspector.model import Model, Node
from inspector.runtime import CPU, ORT_ERRORS, Feed, Session, open_session

RUNS_A_TURN = 3
# Nodes whose bodies are profiled as nodes too, inside the time of their own.
_WITH_BODIES = frozenset({"If", "Loop", "Scan"})
_KERNEL = "_kernel_time"
# What ONNX Runtime puts behind a name to make it another one.
_COPY = re.compile(r"(/duplicated)?(_token_\d+)?$")
_NCHWC = "_nchwc"


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencySample:
    """Timed runs of one session.

    Attributes:
        median_seconds: lower is better.
        spread_seconds: interquartile range.
        runs: how many runs were timed.
    """

    median_seconds: float
    spread_seconds: float
    runs: int


def measure_latency(
    sessions: Sequence[Session],
    feeds: Sequence[Feed],
    *,
    budget_seconds: float = 0.3,
    least_turns: int = 2,
    most_turns: int = 20,
) -> tuple[LatencySample, ...]:
    """Median and spread of each session on one feed of its own.

    The sessions take turns, so that whatever else the machine does falls on all of them alike. A
    turn starts with a run that is not timed: the threads of the session before it still spin.

    Args:
        sessions: opened with optimisations on.
        feeds: one feed per session.
        budget_seconds: time to spend in total.
        least_turns: turns of each even beyond the budget.
        most_turns: turns of each at most.
    """
    times: list[list[float]] = [[] for _ in sessions]
    start = time.perf_counter()
    for done in range(most_turns):
        if done >= least_turns and time.perf_counter() - start > budget_seconds:
            break
        for spent, session, feed in zip(times, sessions, feeds, strict=True):
            session.run(feed)
            for _ in range(RUNS_A_TURN):
                begin = time.perf_counter()
                session.run(feed)
                spent.append(time.perf_counter() - begin)
    return tuple(
        LatencySample(
            median_seconds=float(np.median(spent)),
            spread_seconds=float(np.subtract(*np.percentile(spent, [75, 25]))),
            runs=len(spent),
        )
        for spent in times
    )


def latency_of_models(
    models: Sequence[Model],
    feeds: Sequence[Feed],
    *,
    provider: str = CPU,
    budget_seconds: float = 1.0,
    least_turns: int = 2,
) -> tuple[LatencySample, ...]:
    """Median and spread of each model as deployed, all of them in turns.

    Figures of one call may be set beside each other; those of two calls lie as far apart as the
    machine's load did.

    Args:
        models: opened together: their sessions are in memory at the same time.
        feeds: one feed per model.
        provider: ONNX Runtime's execution provider.
        budget_seconds: time to spend on runs in total.
        least_turns: turns of each even beyond the budget.

    Raises:
        ModelError, RunError: the runtime refuses a model, the feed or the provider.
    """
    sessions = [open_session(m, optimized=True, provider=provider) for m in models]
    return measure_latency(sessions, feeds, budget_seconds=budget_seconds, least_turns=least_turns)


# -- nodes -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeTime:
    """What one node takes in a run.

    Attributes:
        name: of the file's node; where `in_file` is False, the name that the runtime gave to a
            node of its own.
        op_type: what was executed, e.g. "QLinearConv" where the file has a Conv between Q and DQ.
        seconds: median over the runs, copies that the runtime made of the node included; of an If,
            Loop or Scan with everything in its bodies.
        in_file: the main graph of the file has a node of this name.
    """

    name: str
    op_type: str
    seconds: float
    in_file: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeTimes:
    """The nodes of one model that were executed, in the order of execution.

    Attributes:
        optimized: deployed; else simulated.
        runs: how many runs the medians are of.
        run_seconds: median of a whole run as the profiler sees it.
        nodes: a node of the file that is missing here was folded, fused into a neighbour, or not
            reached.
    """

    optimized: bool
    runs: int
    run_seconds: float
    nodes: tuple[NodeTime, ...]

    @property
    def by_name(self) -> dict[str, NodeTime]:
        """The nodes by name."""
        return {node.name: node for node in self.nodes}

    def to_json(self) -> dict[str, Any]:
        """The times as strict JSON values."""
        return {
            "optimized": self.optimized,
            "runs": self.runs,
            "run_seconds": self.run_seconds,
            "nodes": [
                {"name": n.name, "op_type": n.op_type, "seconds": n.seconds, "in_file": n.in_file}
                for n in self.nodes
            ],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """One run in a profile: how long it took, and (name, op type, seconds) of what it executed."""

    seconds: float
    nodes: tuple[tuple[str, str, float], ...]


def profile_nodes(
    model: Model,
    feed: Feed,
    *,
    optimized: bool,
    runs: int = 15,
    warm_up: int = 2,
    budget_seconds: float = 5.0,
    provider: str = CPU,
    told: Callable[[], None] = lambda: None,
) -> NodeTimes:
    """What each node of a model takes on one feed, by ONNX Runtime's profiler.

    The profiler itself costs some microseconds a node, so a run takes longer than `measure_latency`
    says, and the shortest nodes look dearer than they are.

    Args:
        model: the model.
        feed: its inputs.
        optimized: deployed (nodes are fused) or simulated (nodes are those of the file).
        runs: how many runs to take the medians of.
        warm_up: runs before those, which are left out.
        budget_seconds: no further run is begun after so long; one is always made.
        provider: ONNX Runtime's execution provider.
        told: called before every run; what it raises ends the work.

    Raises:
        RunError: the runtime refuses the model, the feed or the provider, or none of the model's
            outputs can be read.
    """
    # Says by name what is wrong with a model, a provider or a feed.
    if not open_session(model, optimized=optimized, provider=provider).run(feed):
        raise RunError(
            f"{model.name} has no output whose values can be read, so it is not run",
            hint="Give the model an output that is a tensor of numbers.",
        )
    with tempfile.TemporaryDirectory(prefix="quant-inspector-") as folder:
        session, profiled = _profiled(model, optimized, provider, Path(folder) / "profile")
        begin = time.perf_counter()
        made = 0
        try:
            while made < warm_up + runs:
                told()
                session.run(feed)
                made += 1
                if made > warm_up and time.perf_counter() - begin > budget_seconds:
                    break
        finally:
            path = Path(profiled.end_profiling())
        events = json.loads(path.read_bytes().decode("utf-8", "replace"), strict=False)
        # The runtime keeps the file open as long as it lives.
        del session, profiled
    return _node_times(model, _runs(events)[warm_up:], optimized)


def _profiled(
    model: Model, optimized: bool, provider: str, prefix: Path
) -> tuple[Session, ort.InferenceSession]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if model.external and model.path is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path",
            str(model.path.parent.resolve()),
        )
    try:
        session = ort.InferenceSession(
            model.proto.SerializeToString(),
            options,
            providers=list(dict.fromkeys((provider, CPU))),
            enable_fallback=0,
        )
    except (*ORT_ERRORS, RuntimeError, ValueError, MemoryError, EncodeError) as error:
        # It opened a moment ago: memory or the disk has run out meanwhile.
        raise RunError(
            f"{model.name} cannot be profiled: {' '.join(str(error).split())[:300]}",
            hint="Close other programs or free disk space, then try again.",
        ) from error
    return Session(session, model.name), session


def _runs(events: Iterable[Mapping[str, Any]]) -> list[_Run]:
    """The runs in a profile, in order, each with the nodes of the main graph.

    Times are whole microseconds. What a body executes lies inside the time of its If, Loop or Scan
    and is left out, so that no time counts twice.
    """
    whole: list[tuple[int, int]] = []
    kernels: list[tuple[int, int, str, str]] = []
    for event in events:
        name, start, length = str(event.get("name", "")), event.get("ts"), event.get("dur")
        if not isinstance(start, int) or not isinstance(length, int):
            continue
        if event.get("cat") == "Session" and name == "model_run":
            whole.append((start, length))
        elif event.get("cat") == "Node" and name.endswith(_KERNEL):
            op_type = str((event.get("args") or {}).get("op_name", ""))
            kernels.append((start, length, name.removesuffix(_KERNEL), op_type))
    whole.sort()
    starts = [start for start, _ in whole]
    found: list[list[tuple[str, str, float]]] = [[] for _ in whole]
    inside_until = -1
    # The runtime writes a node once it is done, so an owner comes after what is in its bodies.
    for start, length, name, op_type in sorted(kernels, key=lambda k: (k[0], -k[1])):
        if start + length <= inside_until:
            continue
        if op_type in _WITH_BODIES:
            inside_until = start + length
        at = bisect.bisect_right(starts, start) - 1
        if at >= 0:
            found[at].append((name, op_type, length * 1e-6))
    return [
        _Run(seconds=length * 1e-6, nodes=tuple(nodes))
        for (_, length), nodes in zip(whole, found, strict=True)
    ]


def _node_times(model: Model, runs: Sequence[_Run], optimized: bool) -> NodeTimes:
    names: dict[str, str] = {}
    op_types: dict[str, str] = {}
    spent: dict[str, dict[int, float]] = {}
    for at, run in enumerate(runs):
        for name, op_type, seconds in run.nodes:
            if name not in names:
                names[name] = _name_in_file(name, model)
            known = names[name]
            if known not in op_types or name == known:
                op_types[known] = op_type
            own = spent.setdefault(known, {})
            own[at] = own.get(at, 0.0) + seconds
    return NodeTimes(
        optimized=optimized,
        runs=len(runs),
        run_seconds=float(np.median([r.seconds for r in runs])) if runs else 0.0,
        nodes=tuple(
            NodeTime(
                name=name,
                op_type=op_types[name],
                # A branch that a run did not take took no time in it.
                seconds=float(np.median([own.get(at, 0.0) for at in range(len(runs))])),
                in_file=name in model.node_by_name,
            )
            for name, own in spent.items()
        ),
    )


def _name_in_file(name: str, model: Model) -> str:
    """The file's node that a node of the runtime stands for; its own name where there is none.

    ONNX Runtime (1.31) calls a copy "<node>/duplicated" or "<node>_token_7", what a fusion made
    "<node>/…Fusion…", and a node of its blocked layout "<tensor it computes>_nchwc".
    """
    known = model.node_by_name
    if name in known:
        return name
    plain = _COPY.sub("", name)
    if plain in known:
        return plain
    head, slash, tail = plain.rstrip("/").rpartition("/")
    if slash and "Fusion" in tail and head in known:
        return head
    producer = model.producers.get(plain.removesuffix(_NCHWC)) if plain.endswith(_NCHWC) else None
    return name if producer is None else producer.name


def seconds_by_tensor(model: Model, times: NodeTimes) -> dict[str, float]:
    """What each computed tensor of a model takes, with the Q and DQ nodes that belong to it.

    A tensor's time is that of the node that computes it (in equal parts where that has several
    outputs), of the DequantizeLinear of its constants (in equal parts where several nodes read
    one), and of the Q and DQ behind it. It stands under the tensor's own name and under that of
    every tensor those Q and DQ write. A graph input has the time of its Q and DQ. Tensors of which
    no node was executed (folded, or fused into a neighbour) are missing.

    Args:
        model: the model that was profiled.
        times: from `profile_nodes`.
    """
    spent = {n.name: n.seconds for n in times.nodes if n.in_file}
    shares: dict[str, list[float]] = defaultdict(list)
    constants = _constant_reads(model)
    for node in model.nodes:
        if node.op_type in (Q, DQ, "Constant"):
            continue
        own = [spent[node.name]] if node.name in spent else []
        for name in dict.fromkeys((*node.inputs, *node.captured)):
            for read in constants.get(name, ()):
                if read in spent:
                    own.append(spent[read] / len(model.consumers[name]))
        outputs = [o for o in node.outputs if o]
        if own:
            for output in outputs:
                shares[output].append(sum(own) / len(outputs))
    found: dict[str, float] = {}
    sources = [i.name for i in model.inputs if i.name not in model.constant_names]
    sources += [
        o for n in model.nodes if n.op_type not in (Q, DQ, "Constant") for o in n.outputs if o
    ]
    for source in sources:
        names, parts = [source], list(shares.get(source, ()))
        for name in names:  # grows while it is walked
            for node in model.consumers.get(name, ()):
                if node.op_type in (Q, DQ) and node.inputs[0] == name:
                    parts += [spent[node.name]] if node.name in spent else []
                    names += [o for o in node.outputs if o and o not in names]
        if parts:
            found.update(dict.fromkeys(names, sum(parts)))
    return found


def _constant_reads(model: Model) -> dict[str, tuple[str, ...]]:
    """The Q and DQ nodes between a constant and a tensor, by that tensor."""
    found: dict[str, tuple[str, ...]] = {}

    def before(node: Node) -> tuple[str, ...] | None:
        given = node.inputs[0] if node.inputs else ""
        if given in model.constant_names:
            return (node.name,)
        return (*found[given], node.name) if given in found else None

    for node in model.nodes:
        if node.op_type in (Q, DQ):
            chain = before(node)
            if chain is not None:
                found.update(dict.fromkeys((o for o in node.outputs if o), chain))
    return found
