"""What became of each name on a list, read back from the file that came out.

As `exclusions` does for a file that was quantized anew: here beside the file that was there before.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from inspector.exclusions import (
    FLOAT_NOW,
    NO_SUCH_NODE,
    NOTHING_CHANGED,
    STILL_FED,
    WEIGHT_QUANTIZED,
    EntryEffect,
)
from inspector.folding import folded_names
from inspector.free_targets import FreeTargets
from inspector.model import FLOAT_DTYPES, Model, Node
from inspector.quantized_flow import carries
from inspector.recipe import nearest_names
from inspector.scheme import DQ, QUANTIZATION_OPS, Q
from inspector.sites import Sites


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """The effective precision of one node in one file.

    Attributes:
        inputs: of its computed inputs: an integer type where the values come out of a DQ.
        fed: those of them that are quantized, by name, with the integer type.
        weight: of its first constant with values; None without one.
        output: the integer type that it is quantized to right away, else its float type.
    """

    inputs: tuple[str, ...]
    fed: tuple[tuple[str, str], ...]
    weight: str | None
    output: str


class _PrecisionReader:
    """Reads the effective precision of nodes in one file."""

    def __init__(self, model: Model, weights: Collection[str]) -> None:
        self.model = model
        self.constants = folded_names(model)
        self.weights = weights

    def codes(self, dequantizer: Node) -> str:
        if len(dequantizer.inputs) > 2 and dequantizer.inputs[2]:
            zero = self.model.constant(dequantizer.inputs[2])
            if zero is not None:
                return str(zero.dtype.name)
        dtype = self.model.info(dequantizer.inputs[0]).dtype
        return "uint8" if dtype == "unknown" or dtype in FLOAT_DTYPES else dtype

    def source(self, tensor: str) -> str:
        """The integer type that values come from, moved or not; "" where they are float."""
        while (node := self.model.producers.get(tensor)) is not None:
            if node.op_type == DQ:
                return self.codes(node)
            if not carries(node):
                break
            tensor = node.inputs[0]
        return ""

    def state(self, node: Node) -> _State:
        inputs, fed = [], []
        weight = None
        for tensor in dict.fromkeys(i for i in node.inputs if i):
            dtype = self.model.info(tensor).dtype
            if tensor in self.constants:
                if weight is None:
                    weight = self.constant(node, tensor, dtype)
                continue
            if node.op_type in QUANTIZATION_OPS and "int" in dtype:
                found = dtype
            else:
                found = self.source(tensor)
            if found:
                fed.append((tensor, found))
            if found or dtype in FLOAT_DTYPES:
                inputs.append(found or dtype)
        return _State(inputs=tuple(inputs), fed=tuple(fed), weight=weight, output=self.output(node))

    def constant(self, node: Node, tensor: str, dtype: str) -> str | None:
        """The type of a constant that holds values; None for shapes, scales and the like."""
        waiting, seen = [tensor], {tensor}
        while waiting:
            maker = self.model.producers.get(waiting.pop())
            if maker is None or maker.op_type == "Constant":
                continue
            if maker.op_type == DQ:
                return self.codes(maker)
            new = [i for i in maker.inputs if i and i not in seen]
            seen.update(new)
            waiting += new
        if tensor in self.weights and (dtype in FLOAT_DTYPES or "int" in dtype):
            return dtype
        return dtype if dtype in FLOAT_DTYPES and node.op_type not in QUANTIZATION_OPS else None

    def output(self, node: Node) -> str:
        first = next((o for o in node.outputs if o), "")
        for output in node.outputs:
            for reader in self.model.consumers.get(output, ()):
                if reader.op_type == Q and reader.inputs[0] == output:
                    return self.codes(reader)
        dtype = self.model.info(first).dtype
        return "float32" if dtype == "unknown" else dtype


class FreedEffects:
    """Compares a file before and after.

    Args:
        sites: of the file before.
        targets: what names are in it.
        model: the file after.
        names: the list.
    """

    def __init__(
        self, sites: Sites, targets: FreeTargets, model: Model, names: Collection[str]
    ) -> None:
        self.sites, self.flow, self.targets = sites, sites.flow, targets
        self.freed, rectifiers = targets.chosen(names)
        self.gone = sites.flow.dropped(self.freed, rectifiers)
        weights = sites.floats.weights
        self.before = _PrecisionReader(sites.q, weights)
        self.after = _PrecisionReader(model, weights)

    def effect(self, name: str) -> EntryEffect:
        """What became of one name on the list."""
        f = self.sites.f
        if name not in f.node_by_name:
            body = next((b for b in f.bodies if name in b.node_by_name), None)
            if body is not None:
                why = f"not freed: it lies inside {body.owner}, whose bodies are left as they are"
                op_type = body.node_by_name[name].op_type
                return EntryEffect(
                    name=name, op_type=op_type, status=NOTHING_CHANGED, details=(why,)
                )
            near = nearest_names(name, (n.name for n in f.nodes))
            return EntryEffect(
                name=name,
                op_type="",
                status=NO_SUCH_NODE,
                details=(f"the nearest names are {', '.join(near)}",) if near else (),
            )
        node = f.node_by_name[name]
        other, rectifier, reason = self.targets.target(name)
        if reason:
            return EntryEffect(
                name=name, op_type=node.op_type, status=NOTHING_CHANGED,
                details=(f"not freed: {reason}",),
            )  # fmt: skip
        if rectifier:
            return self._rectifier_effect(node)
        there = self.sites.q.node_by_name[other]
        old = self.before.state(there)
        details: list[str] = []
        if name not in self.sites.float_names.get(other, ()):
            details.append(f"it is a part of {other} in the quantized model, which is freed for it")
        now = self.after.model.node_by_name.get(other)
        new = old if now is None else self.after.state(now)
        neighbours: dict[str, None] = {}
        for tensor, dtype in new.fed:
            keepers = self._feeders(tensor)
            neighbours.update(dict.fromkeys(keepers))
            why = f" (handed on by {joined(keepers)})" if keepers else ""
            details.append(f"its input {tensor} is still dequantized from {dtype}{why}")
        keepers = self._keepers(there)
        output = new.output
        if keepers:
            neighbours.update(dict.fromkeys(keepers))
            need = "needs" if len(keepers) == 1 else "need"
            output = output if "int" in output else self._pair_dtype(there)
            details.append(
                f"its output {there.outputs[0]} is still quantized to {output}, because "
                f"{joined(keepers)} {need} it quantized"
            )
        weight_kept = new.weight is not None and new.weight not in FLOAT_DTYPES
        if weight_kept:
            details.append(f"its weight is still {new.weight}")
        status = WEIGHT_QUANTIZED if weight_kept else STILL_FED if new.fed or keepers else FLOAT_NOW
        same = (
            now is not None
            and self.sites.protos[there.index] == self.after.model.proto.graph.node[now.index]
        )
        changed = not same or any(codes in self.gone for codes in self.flow.written_codes(there))
        if not changed and old == new:
            status = NOTHING_CHANGED
            if not new.fed and not keepers and not weight_kept:
                details.append("it was in float already")
        for folded in self.flow.folded_behind(there):
            if folded.outputs and folded.name in self.after.model.node_by_name:
                details.append(f"{folded.name} behind it is a node again")
        return EntryEffect(
            name=name,
            op_type=node.op_type,
            status=status,
            details=tuple(details),
            output_dtype=output,
            weight_dtype=new.weight,
            input_dtypes=new.inputs,
            neighbours=tuple(neighbours),
        )

    def _rectifier_effect(self, node: Node) -> EntryEffect:
        """What became of a Relu or Clip that the quantized model leaves to a Q."""
        codes = self.flow.codes_of_rectifier(node.name)
        if self.gone & codes:
            details: tuple[str, ...] = (
                "it was folded into a Q, which is gone: it is a node again",
            )
            return EntryEffect(
                name=node.name, op_type=node.op_type, status=FLOAT_NOW, details=details,
                output_dtype="float32",
            )  # fmt: skip
        askers = dict.fromkeys(
            self.targets.shown(a) for c in sorted(codes) for a in sorted(self.flow.askers(c))
        )
        why = f"because {joined(list(askers))} needs it" if askers else "so nothing of it is left"
        return EntryEffect(
            name=node.name,
            op_type=node.op_type,
            status=NOTHING_CHANGED,
            details=(f"it is folded into the Q behind it, which stays {why}",),
            neighbours=tuple(askers),
        )

    def _keepers(self, node: Node) -> list[str]:
        """The nodes that still want the output of a node quantized right away, by float name."""
        found: dict[str, None] = {}
        for output in node.outputs:
            readers = self.sites.consumers.get(output, ()) if output else ()
            codes = [r.outputs[0] for r in readers if r.op_type == Q and r.inputs[0] == output]
            codes += [output] if output in self.flow.real else []
            for each in codes:
                if each not in self.gone:
                    names = sorted(
                        self.flow.askers(each) - self.freed,
                        key=lambda n: self.sites.q.node_by_name[n].index,
                    )
                    found.update(dict.fromkeys(self.targets.shown(n) for n in names))
        return list(found)

    def _pair_dtype(self, node: Node) -> str:
        """The integer type that the output of a node had in the file before."""
        makers = (self.sites.producers[c] for c in self.flow.written_codes(node))
        return next((self.before.codes(m) for m in makers if m.op_type == Q), "int8")

    def _feeders(self, tensor: str) -> list[str]:
        """The nodes that hand dequantized values on to a tensor, by float name."""
        found = []
        while (node := self.after.model.producers.get(tensor)) is not None and carries(node):
            found.append(self.targets.shown(node.name))
            tensor = node.inputs[0]
        return found


def joined(names: Sequence[str]) -> str:
    """The first three names, and how many more."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
