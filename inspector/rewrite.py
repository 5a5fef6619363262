"""Graph surgery that leaves nodes of a finished quantized file in float.

A file that ONNX Runtime did not make (QAT, TFLite, a vendor's tool) has no recipe to run again. So
a node is freed where it stands: it reads its inputs before Q/DQ and the float model's weight, in
the layout of the quantized file; its own output keeps a Q/DQ pair only where a node that is still
quantized asks for it, and every other scale is untouched. Every place that a list can change has
two forms (see `sites`): `free_nodes` writes one of them, `switchable` puts both behind an If, so a
preview computes what the file will. A separate module because it makes a graph of two models,
where `exclusions` reads them and `quantize` runs ONNX Runtime's quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.helper
from numpy.typing import NDArray
from onnx import TensorProto

from inspector.compare import check_pair
from inspector.errors import ModelError
from inspector.exclusions import NO_SUCH_NODE, NOTHING_CHANGED, EntryEffect
from inspector.free_targets import FreeTargets
from inspector.freed_effects import FreedEffects
from inspector.freed_graph import (
    both_forms,
    graph_nodes,
    live_nodes,
    model_of,
    quantized_form,
    resolved_nodes,
)
from inspector.matching import Matching
from inspector.model import FLOAT_DTYPES, Model
from inspector.scheme import QuantFormat
from inspector.sites import Site, Sites


@dataclass(frozen=True, kw_only=True, slots=True)
class Freed:
    """A quantized model with nodes in float.

    Attributes:
        model: it, in memory; `write_freed` writes it.
        effects: what became of each name, in the order given.
        freed: the names that are computed in float now, in the order given.
        removed: names of the quantized model's nodes that are gone.
    """

    model: Model
    effects: tuple[EntryEffect, ...]
    freed: tuple[str, ...]
    removed: tuple[str, ...]


def free_nodes(
    float_model: Model, quantized: Model, matching: Matching, names: Sequence[str]
) -> Freed:
    """The quantized model with nodes left in float.

    A freed node reads its inputs before their Q/DQ pairs (others keep reading behind them) and the
    float model's weight and bias. The pair on its output goes where no node that is still
    quantized asks for it; a Relu or Clip that was folded into a removed Q is a node again. All
    other scales, zero points and integers are those of the file.

    Args:
        float_model: the float model.
        quantized: a finished quantized model; nothing of it is changed.
        matching: of the two.
        names: nodes of the float model, each any number of times; none gives the file's own graph.

    Raises:
        ModelError: the second file holds no quantization, or the two are no pair.
    """
    _check_quantized(float_model, quantized, matching)
    sites = Sites(float_model, quantized, matching)
    return _freed(sites, FreeTargets(sites), names)


def _freed(sites: Sites, targets: FreeTargets, names: Sequence[str]) -> Freed:
    names = tuple(dict.fromkeys(names))
    nodes = resolved_nodes(sites, targets.states(names))
    model = model_of(sites, nodes)
    read_back = FreedEffects(sites, targets, model, names)
    effects = tuple(map(read_back.effect, names))
    left = {node.name for node in nodes}
    return Freed(
        model=model,
        effects=effects,
        freed=tuple(e.name for e in effects if e.status not in (NO_SUCH_NODE, NOTHING_CHANGED)),
        removed=tuple(n.name for n in sites.q.nodes if n.name not in left),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Switchable:
    """One graph for every list: what lists change is behind an If each.

    Attributes:
        model: the quantized model with one more input.
        input_name: that input: bool [switches], true for the float form.
        can_be_freed: names of the float model's nodes that change something, in graph order.
        refused: by name of the others, the reason.
        switches: how many there are; with none the model is the quantized one, without the input.
    """

    model: Model
    input_name: str
    can_be_freed: tuple[str, ...]
    refused: Mapping[str, str]
    switches: int
    _sites: Sites
    _targets: FreeTargets

    def feed(self, names: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
        """What to add to the quantized model's feed so that it computes with a list.

        With optimisations off the outputs are bit for bit those of `free_nodes(..., names)`. Names
        that cannot be freed change nothing.
        """
        if not self.switches:
            return {}
        states = self._targets.states(names)
        return {
            self.input_name: np.array([states[at] for at in self._targets.switched()], np.bool_)
        }

    def freed(self, names: Sequence[str]) -> Freed:
        """`free_nodes` for a list, without building the two forms of each place again."""
        return _freed(self._sites, self._targets, names)


def switchable(float_model: Model, quantized: Model, matching: Matching) -> Switchable:
    """The quantized model with a switch at every place that a list can change.

    Args:
        float_model: the float model.
        quantized: a finished quantized model.
        matching: of the two.

    Raises:
        ModelError: the second file holds no quantization, or the two are no pair.
    """
    _check_quantized(float_model, quantized, matching)
    sites = Sites(float_model, quantized, matching)
    targets = FreeTargets(sites)
    name = sites.names.fresh("float_switches")
    order = targets.switched()
    conditions = [sites.names.fresh(f"{name}_{at}") for at in range(len(order))]
    nodes: list[onnx.NodeProto] = []
    if order:
        split = onnx.helper.make_node(
            "Split", [name], conditions, sites.names.fresh(f"{name}_split")
        )
        if quantized.opset >= 18:
            split.attribute.append(onnx.helper.make_attribute("num_outputs", len(order)))
        split.attribute.append(onnx.helper.make_attribute("axis", 0))
        nodes.append(split)
    condition = dict(zip(order, conditions, strict=True))

    def form(at: float, site: Site) -> list[onnx.NodeProto]:
        if at not in condition:
            return quantized_form(sites, site)
        return [both_forms(sites, site, condition[at])]

    nodes += graph_nodes(sites, form)
    inputs = [onnx.helper.make_tensor_value_info(name, TensorProto.BOOL, [len(order)])]
    live = live_nodes(sites, nodes)
    model = model_of(
        sites, [n for at, n in enumerate(nodes) if at in live], inputs if order else ()
    )
    able, refused = [], {}
    for node in float_model.nodes:
        if node.op_type == "Constant":
            continue
        other, rectifier, reason = targets.target(node.name)
        if reason:
            refused[node.name] = reason
        elif rectifier or targets.is_quantized(other):
            able.append(node.name)
        else:
            refused[node.name] = "it is in float already"
    return Switchable(
        model=model,
        input_name=name,
        can_be_freed=tuple(able),
        refused=refused,
        switches=len(order),
        _sites=sites,
        _targets=targets,
    )


def _check_quantized(float_model: Model, quantized: Model, matching: Matching) -> None:
    check_pair(float_model, quantized)
    if matching.scheme.formats == (QuantFormat.FLOAT,):
        dtypes = {quantized.info(n).dtype for n in quantized.constant_names} & FLOAT_DTYPES
        halves = f" (its weights are {', '.join(sorted(dtypes))})" if dtypes else ""
        raise ModelError(
            f"nothing is quantized in {quantized.name}{halves}, so no node can be freed",
            hint="Name a file with QuantizeLinear, integer operators or packed weights second.",
        )
