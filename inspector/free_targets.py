"""What the names on a list are in a quantized file: a node, a folded Relu or Clip, or a refusal.

Apart from `matching`, which pairs tensors: a name on a list may also stand for a node that was
fused into another one, or for one that has to stay as it is.
"""

from __future__ import annotations

from collections.abc import Iterable

from inspector.folding import folded_names
from inspector.model import Node
from inspector.scheme import DQ, Q
from inspector.sites import Sites


class FreeTargets:
    """Look-ups by name of the float model's nodes."""

    def __init__(self, sites: Sites) -> None:
        self._sites, self._flow = sites, sites.flow
        self._targets: dict[str, tuple[str, str, str]] = {}
        self._f_constants = folded_names(sites.f)
        self._fused = {
            u.name for u in sites.matching.unmatched if u.fused_into and u.model == "float"
        }

    def target(self, name: str) -> tuple[str, str, str]:
        """What a node of the float model is in the quantized one.

        Returns:
            The quantized model's node that computes it, or the folded rectifier it is; then the
            reason why it cannot be freed; "" for what does not apply.
        """
        if name not in self._targets:
            self._targets[name] = self._target(name)
        return self._targets[name]

    def _target(self, name: str) -> tuple[str, str, str]:
        other = self._sites.matching.node_pairs.get(name, "")
        if other in self._sites.q.node_by_name:
            node = self._sites.q.node_by_name[other]
            if node.op_type in (Q, DQ):
                return "", "", "the quantized model computes nothing in its place"
            return other, "", self._sites.refusal(other)
        node = self._sites.f.node_by_name[name]
        if any(r.name == name for folded in self._flow.rectifiers.values() for r in folded):
            return "", name, ""
        if all(o in self._f_constants for o in node.outputs if o):
            return "", "", "it computes a constant, which is compared where it is read"
        into = self._folded_into(node)
        if into:
            return into, "", self._sites.refusal(into)
        return "", "", "nothing of the quantized model computes it alone"

    def _folded_into(self, node: Node) -> str:
        """The quantized model's node that took a float node up: of the node before it."""
        for _ in range(16):
            source = next((i for i in node.inputs if i and i not in self._f_constants), "")
            before = self._sites.f.producers.get(source)
            if before is None or source not in self._fused:
                return ""
            other = self._sites.matching.node_pairs.get(before.name, "")
            if other in self._sites.q.node_by_name:
                return other
            node = before
        return ""

    def chosen(self, names: Iterable[str]) -> tuple[set[str], set[str]]:
        """The nodes of the quantized model and the folded rectifiers that names stand for."""
        freed, rectifiers = set(), set()
        for name in names:
            if name in self._sites.f.node_by_name:
                node, rectifier, reason = self.target(name)
                if node and not reason:
                    freed.add(node)
                if rectifier:
                    rectifiers.add(rectifier)
        return freed, rectifiers

    def states(self, names: Iterable[str]) -> dict[float, bool]:
        """By site, whether it has its freed form."""
        freed, rectifiers = self.chosen(names)
        gone = self._flow.dropped(freed, rectifiers)
        return {
            at: site.unit in freed or site.codes in gone
            for at, site in self._sites.by_place.items()
        }

    def shown(self, node: str) -> str:
        """A node of the quantized model by its name in the float one, where it has one."""
        return self._sites.float_names.get(node, [node])[0]

    def is_quantized(self, node: str) -> bool:
        """Freeing it can change something: its inputs, its weight or a pair behind it."""
        written = self._flow.written_codes(self._sites.q.node_by_name[node])
        return node in self._sites.changed_units or any(
            self._flow.unchanged.get(c) for c in written
        )

    def switched(self) -> list[float]:
        """The sites that a list can change, in order."""
        return [
            at
            for at in sorted(self._sites.by_place)
            if not self._sites.refusal(self._sites.by_place[at].unit)
        ]
