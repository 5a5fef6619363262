"""What the compared activations and outputs say is wrong.

Apart from `diagnosis`, which measures what a remedy gains and decides what comes first: each rule
here reads a comparison and the two files, runs nothing and speaks of one cause. Where a threshold
needs a figure that a comparison does not hold (a percentile, a median), the rule's docstring says
which recorded figure stands for it; what cannot be known is passed over. A node is judged by the
error it adds: a drop across a node accuses what only carries the error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from inspector.arrays import counted, listed, printable
from inspector.comparison import (
    FAR_BELOW_DB,
    LOOK_DB,
    ActivationError,
    NonFinite,
    SliceError,
    first_nonfinite,
)
from inspector.findings import LOOK, NOTE, PROBLEM, Case, Finding, Remedy
from inspector.model import Model, Node
from inspector.recipe import WIDER_TYPES, TensorOverride, with_type
from inspector.scheme import COMPUTES_IN_INTEGERS, DQ, Q, QuantFormat, quant_formats

# -- what the rules share ----------------------------------------------------------------------

_WEIGHTED = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Einsum",
     "BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"}
)  # fmt: skip
# They hand on values as they are, so that a wide range or a low figure is not theirs.
_CARRIES = frozenset(
    {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather",
     "Identity", "Dropout", "Cast", "Expand", "Tile", "Pad", "MaxPool", "Resize", "DepthToSpace",
     "SpaceToDepth"}
)  # fmt: skip
_HOPS = 8


def _name(text: str) -> str:
    return printable(text, 80)


class Lookups:
    """Look-ups of one case.

    Args:
        case: what a rule looks at.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model: Model = case.float_model
        self.records = {a.name: a for a in case.comparison.activations}
        self._weights = {w.node for w in case.comparison.weights if w.scale is not None}
        self._fused = {
            u.name: u.fused_into for u in case.comparison.unmatched if u.model == "float"
        }

    def record(self, tensor: str) -> ActivationError | None:
        """Of a tensor, or of what it was fused into."""
        return self.records.get(tensor) or self.records.get(self._fused.get(tensor, ""))

    def node(self, record: ActivationError) -> Node | None:
        return self.model.node_by_name.get(record.node)

    def quantized(self, node: Node) -> bool:
        """An output or a weight of the node is stored in integers."""
        outputs = (self.record(o) for o in node.outputs if o)
        return node.name in self._weights or any(r is not None and scales_of(r) for r in outputs)

    def computed(self, node: Node) -> list[str]:
        """What a node reads that is no constant."""
        constants = self.model.constant_names
        return [i for i in (*node.inputs, *node.captured) if i and i not in constants]

    def sources(self, node: Node) -> list[ActivationError]:
        """The nearest compared tensors that a node computes from."""
        found: dict[str, ActivationError] = {}
        seen: set[str] = set()
        waiting = self.computed(node)
        while waiting:
            name = waiting.pop(0)
            if name in seen:
                continue
            seen.add(name)
            if name in self.records:
                found[name] = self.records[name]
            elif (maker := self.model.producers.get(name)) is not None:
                waiting += self.computed(maker)
        return list(found.values())

    def shares_scale(self, record: ActivationError) -> bool:
        """Its scale is that of something its node reads: the range is pinned to another's."""
        node = self.node(record)
        return node is not None and any(
            s.scale == record.scale and s.zero_point == record.zero_point
            for s in self.sources(node)
        )

    @property
    def static_recipe(self) -> bool:
        """A recipe is known that takes grids set by hand."""
        return self.case.recipe is not None and self.case.recipe.get("format") == "qdq"


def scales_of(record: ActivationError) -> tuple[float, ...]:
    """Scales of a tensor; () where it has none that is a finite number above 0."""
    if record.scale is None:
        return ()
    scales = record.scale if isinstance(record.scale, tuple) else (record.scale,)
    return tuple(s for s in scales if math.isfinite(s) and s > 0)


def _absmax(record: ActivationError) -> float:
    """Largest absolute float value; nan where none was seen."""
    ends = [abs(v) for v in (record.observed_low, record.observed_high) if math.isfinite(v)]
    return max(ends, default=math.nan)


def _override(record: ActivationError) -> Mapping[str, Any]:
    """The observed range as an entry of a recipe's overrides."""
    return {"tensor": record.name, "low": record.observed_low, "high": record.observed_high}


def _at_16_bits(facts: Lookups, records: Iterable[ActivationError]) -> Mapping[str, Any]:
    """The change of a recipe that stores tensors in 16 bits; {} where none can be.

    A tensor with the scale of what its node reads follows that one and is left out.
    """
    recipe = facts.case.recipe
    if QuantFormat.QDQ not in quant_formats(facts.case.quantized_model) or (
        recipe is not None and not facts.static_recipe
    ):
        return {}
    given = {each["tensor"]: each for each in (recipe or {}).get("overrides", ())}
    before = dict(given)
    for record in records:
        wider = WIDER_TYPES.get(record.dtype)
        if wider is None or facts.shares_scale(record):
            continue
        known = given.get(record.name)
        own = None if known is None else TensorOverride.from_json(known)
        typed = with_type(own, record.name, wider)
        assert typed is not None
        given[record.name] = typed.to_json()
    return {} if given == before else {"overrides": list(given.values())}


# -- one scale for unlike branches -------------------------------------------------------------

# A part is drowned below so many steps, or below so many decibels.
DROWNED_STEPS, DROWNED_DB = 8.0, 10.0
# The largest part is at least so many times as large: else the range is wide for all of them.
UNLIKE_TIMES = 4.0
# Better before the Concat by so much: else the error came with the part.
BETTER_BEFORE_DB = 3.0


def concat_shared_scale(case: Case) -> Iterator[Finding]:
    """A quantized Concat whose one scale drowns a branch, e.g. scores beside boxes in pixels.

    A part is drowned where its largest value is below 8 steps of the Concat's output while its
    SQNR is below 20 dB, or where its SQNR is below 10 dB. The branch has to be better before the
    Concat (or to have been given the Concat's scale), and another one at least 4 times as large.
    """
    facts = Lookups(case)
    for record in case.comparison.activations:
        steps, node = scales_of(record), facts.node(record)
        if record.op_type != "Concat" or not steps or not record.slices or node is None:
            continue
        step = max(steps)
        sizes = [s.absmax for s in record.slices if math.isfinite(s.absmax)]
        largest = max(sizes, default=0.0)
        drowned = [s for s in record.slices if _drowned(facts, record, s, step, largest)]
        if not drowned:
            continue
        worst = min(drowned, key=lambda s: s.sqnr_db)
        source = facts.record(worst.source)
        before = None if source is None else source.accumulated_sqnr_db
        others = f" and {counted(len(drowned) - 1, 'other part')}" if len(drowned) > 1 else ""
        yield Finding(
            code="concat-shared-scale",
            severity=LOOK,
            node=record.node,
            tensor=record.name,
            sentence=(
                f"Concat {_name(record.node)} gives {_name(worst.source)}{others} the scale of a "
                f"far larger branch: its largest value {worst.absmax:.3g} is "
                f"{worst.absmax / step:.2g} steps of {step:.3g}, beside values up to "
                f"{largest:.3g}; its part has {worst.sqnr_db:.1f} dB"
                + ("" if before is None else f", {before:.1f} dB before the Concat")
                + (
                    f", which the whole ({record.accumulated_sqnr_db:.1f} dB) hides."
                    if record.accumulated_sqnr_db > worst.sqnr_db + FAR_BELOW_DB
                    else "."
                )
            ),
            evidence={
                "part": worst.source,
                "part_sqnr_db": worst.sqnr_db,
                "part_sqnr_before_db": before,
                "part_absmax": worst.absmax,
                "largest_absmax": largest,
                "scale": step,
                "part_steps": worst.absmax / step,
                "first_channel": worst.start,
                "last_channel": worst.stop - 1,
                "drowned_parts": [s.source for s in drowned],
                "whole_sqnr_db": record.accumulated_sqnr_db,
            },
            remedy=Remedy(
                say="Leave the Concat and what is quantized behind it in float, or store it in 16 "
                "bits.",
                exclude=_behind(facts, node),
                recipe=_at_16_bits(facts, [record]),
            ),
        )


def _drowned(
    facts: Lookups, record: ActivationError, part: SliceError, step: float, largest: float
) -> bool:
    if not part.absmax > 0 or math.isnan(part.sqnr_db) or largest < UNLIKE_TIMES * part.absmax:
        return False
    small = part.absmax < DROWNED_STEPS * step and part.sqnr_db < LOOK_DB
    if not (small or part.sqnr_db < DROWNED_DB):
        return False
    source = facts.record(part.source)
    if source is None or source is record:
        return True
    shared = math.isclose(max(scales_of(source), default=0.0), step, rel_tol=0.01)
    return shared or not source.accumulated_sqnr_db < part.sqnr_db + BETTER_BEFORE_DB


def _behind(facts: Lookups, node: Node) -> tuple[str, ...]:
    """A node and what is quantized after it, to the outputs or the next node with weights."""
    reached = {o for o in node.outputs if o}
    found = [node.name]
    for other in facts.model.nodes[node.index + 1 :]:
        if other.op_type in _WEIGHTED or not reached.intersection((*other.inputs, *other.captured)):
            continue
        reached.update(o for o in other.outputs if o)
        if facts.quantized(other):
            found.append(other.name)
    return tuple(found)


# -- NaN and infinity --------------------------------------------------------------------------


def nan(case: Case) -> Iterator[Finding]:
    """Where NaN or infinity begins, one finding for each model.

    The float model's is a problem where an element is NaN or an output is hit; infinity that no
    output shows (a mask of -inf) is worth a look. The quantized model's is told where the float
    tensor in its place is finite.
    """
    comparison, facts = case.comparison, Lookups(case)
    by_model: dict[str, list[NonFinite]] = {"float": [], "quantized": []}
    for record in comparison.nonfinite:
        by_model.setdefault(record.model, []).append(record)
    names: dict[str, str] = {}
    for pair in case.matching.activations:
        for name in (pair.before, pair.after):
            if name:
                names.setdefault(name, pair.name)
    names = {**names, **{other: name for name, other in case.matching.outputs.items()}}
    bad = {r.tensor for r in by_model["float"]}
    # What the quantized model has and the float model has not.
    own = [r for r in by_model["quantized"] if names.get(r.tensor, "") not in bad]
    outputs = {
        "float": set(case.matching.outputs),
        "quantized": set(case.matching.outputs.values()),
    }
    for side, records in (("float", by_model["float"]), ("quantized", own)):
        first = first_nonfinite(records, comparison.sample_names)
        if first is None:
            continue
        hit = sorted(r.tensor for r in records if r.tensor in outputs[side])
        severe = side == "quantized" or bool(hit) or any(r.nan for r in records)
        tensor = first.tensor if side == "float" else names.get(first.tensor, "")
        node = facts.model.producers.get(tensor)
        held = " and ".join(
            f"{count:,} {what}"
            for count, what in ((first.nan, "NaN"), (first.infinite, "infinite"))
            if count
        )
        maker = f"{first.op_type} {_name(first.node)}" if first.node else first.op_type
        excluded = (node.name,) if side == "quantized" and node is not None else ()
        yield Finding(
            code="nan",
            severity=PROBLEM if severe else LOOK,
            node="" if node is None else node.name,
            tensor=tensor,
            sentence=(
                f"The {side} model computes values that are no numbers: they begin at {maker}, on "
                f"sample {_name(first.first_sample)} "
                f"({held} values in tensor {_name(first.tensor)} over all samples)"
                + (f" and reach output {_name(hit[0])}" if hit else "")
                + (", where the float model's are finite." if side == "quantized" else ".")
            ),
            evidence={
                "model": side,
                "nan_values": first.nan,
                "infinite_values": first.infinite,
                "first_sample": first.first_sample,
                "model_tensor": first.tensor,
                "model_node": first.node,
                "nonfinite_tensors": len(records),
                "outputs": hit,
            },
            remedy=Remedy(
                say="Look at this node's inputs on that sample; "
                + (
                    "the float model or its input has to be put right first."
                    if side == "float"
                    else "leave it and what computes its inputs in float."
                ),
                exclude=excluded,
            ),
        )


# -- ranges that do not fit the samples --------------------------------------------------------

# Share of values that are clipped.
CLIPPED_FRACTION = 0.001
# Root mean square of the local error in steps: 0.289 without clipping.
NOISY_STEPS = 0.6
# A tensor that is better than this after its own rounding is well enough.
GOOD_LOCAL_DB = 30.0
# More tensors than this are one finding about the model.
MANY_TENSORS = 3
# Observed range over representable range.
COVER_FRACTION = 0.25


def _local_error_steps(record: ActivationError) -> float:
    """Root mean square of the local error in steps; nan where it is not known.

    Not recorded, but both SQNR and the accumulated error's mean square are: what came in and the
    tensor's own rounding are taken to be independent, so that their powers add up.
    """
    steps, local, total = scales_of(record), record.local_sqnr_db, record.accumulated_sqnr_db
    if not steps or local is None or not (math.isfinite(local) and math.isfinite(total)):
        return math.nan
    if not 0 < record.mse < math.inf:
        return math.nan
    signal, share = record.mse * 10 ** (total / 10), 10 ** (-local / 10)
    return math.sqrt((signal + record.mse) * share / (1 + share)) / max(steps)


def clipped(case: Case) -> Iterator[Finding]:
    """Tensors whose values lie beyond what their scale can hold.

    More than 0.1 % of the values are clipped, or some are and the local error is above 0.6 steps
    root mean square (0.29 is that of rounding). Local SQNR has to be below 30 dB. The float model's
    values have to lie beyond the range as well: else it is an error from upstream that is clipped.
    From four such tensors on, it is one finding about the model.
    """
    facts = Lookups(case)
    found = []
    for record in case.comparison.activations:
        share, local = record.saturated_fraction, record.local_sqnr_db
        if not share or local is None or not local < GOOD_LOCAL_DB or not scales_of(record):
            continue
        if not _beyond(record):
            continue
        if share > CLIPPED_FRACTION or _local_error_steps(record) > NOISY_STEPS:
            found.append(record)
    yield from _range_findings(facts, found, _clipped_finding)


def _beyond(record: ActivationError) -> bool:
    """The float model's values lie more than half a step outside what the scale can hold."""
    low, high, half = (
        record.representable_low,
        record.representable_high,
        min(scales_of(record)) / 2,
    )
    if low is None or high is None:
        return False
    return record.observed_low < low - half or record.observed_high > high + half


def too_wide(case: Case) -> Iterator[Finding]:
    """Tensors that use less than a quarter of the range that their scale can hold.

    Ranges that the quantizer pins are left out: those of Softmax and Sigmoid, and those shared with
    what the node reads. Local SQNR has to be below 30 dB. The range is that of all samples
    compared, so a few samples prove little.
    """
    facts = Lookups(case)
    found = []
    for record in case.comparison.activations:
        low, high = record.representable_low, record.representable_high
        local = record.local_sqnr_db
        if low is None or high is None or local is None or not scales_of(record):
            continue
        if record.op_type in ("Softmax", "Sigmoid", *_CARRIES) or not local < GOOD_LOCAL_DB:
            continue
        # A grid always holds 0, so a range that does not is used from 0 on.
        cover = _span(record) / (high - low) if high > low else math.nan
        if cover < COVER_FRACTION and _absmax(record) > 0 and not facts.shares_scale(record):
            found.append(record)
    yield from _range_findings(facts, found, _wide_finding)


def _span(record: ActivationError) -> float:
    return max(record.observed_high, 0.0) - min(record.observed_low, 0.0)


def _range_findings(
    facts: Lookups,
    records: list[ActivationError],
    make: Callable[[Lookups, ActivationError, list[ActivationError]], Finding],
) -> Iterator[Finding]:
    """One finding for each tensor, or one for the model where there are many."""
    # The worst is the one that loses most by its own rounding.
    records = sorted(
        records, key=lambda r: math.inf if r.local_sqnr_db is None else r.local_sqnr_db
    )
    if len(records) > MANY_TENSORS:
        yield make(facts, records[0], records)
        return
    for record in records:
        yield make(facts, record, [record])


def _range_remedy(facts: Lookups, records: list[ActivationError], say: str) -> Remedy:
    """With the observed ranges to set, where a recipe takes them."""
    if not facts.static_recipe:
        return Remedy(say=say)
    finite = [r for r in records if math.isfinite(r.observed_low + r.observed_high)]
    return Remedy(say=say, overrides=tuple(_override(r) for r in finite))


def _clipped_finding(
    facts: Lookups, worst: ActivationError, records: list[ActivationError]
) -> Finding:
    share = worst.saturated_fraction or 0.0
    method = (facts.case.recipe or {}).get("method")
    seen = facts.case.comparison.seen
    why = "calibration saw no samples like these"
    if seen == "seen" or method not in (None, "minmax"):
        why = f"the method {method or 'of calibration'} cut the range"
    many = f" ({len(records)} tensors are clipped, this one most)" if len(records) > 1 else ""
    return Finding(
        code="clipped",
        severity=LOOK,
        node=worst.node if len(records) == 1 else "",
        tensor=worst.name,
        sentence=(
            f"{share:.2%} of the values of {_name(worst.name)} lie beyond its range "
            f"{worst.representable_low:.4g} to {worst.representable_high:.4g} (seen: "
            f"{worst.observed_low:.4g} to {worst.observed_high:.4g}) and are clipped{many}: {why}. "
            f"Its own rounding leaves {worst.local_sqnr_db:.1f} dB."
        ),
        evidence={
            "saturated_fraction": share,
            "local_error_steps": _local_error_steps(worst),
            "local_sqnr_db": worst.local_sqnr_db,
            "observed_low": worst.observed_low,
            "observed_high": worst.observed_high,
            "representable_low": worst.representable_low,
            "representable_high": worst.representable_high,
            "tensors": [r.name for r in records],
            "samples": seen,
        },
        remedy=_range_remedy(
            facts,
            records,
            "Calibrate with more samples or by minmax, or give the tensor the range it has."
            if len(records) == 1
            else "Calibrate with more samples, or by minmax.",
        ),
    )


def _wide_finding(
    facts: Lookups, worst: ActivationError, records: list[ActivationError]
) -> Finding:
    low, high = worst.representable_low or 0.0, worst.representable_high or 0.0
    cover = _span(worst) / (high - low)
    many = f" ({len(records)} tensors do, this one loses most)" if len(records) > 1 else ""
    return Finding(
        code="too-wide",
        severity=LOOK,
        node=worst.node if len(records) == 1 else "",
        tensor=worst.name,
        sentence=(
            f"{_name(worst.name)} uses {cover:.1%} of its range{many}: values from "
            f"{worst.observed_low:.4g} to {worst.observed_high:.4g} in "
            f"{counted(facts.case.comparison.samples, 'sample')}, a range of {low:.4g} to "
            f"{high:.4g}. Its own rounding leaves {worst.local_sqnr_db:.1f} dB."
        ),
        evidence={
            "cover_fraction": cover,
            "local_sqnr_db": worst.local_sqnr_db,
            "observed_low": worst.observed_low,
            "observed_high": worst.observed_high,
            "representable_low": low,
            "representable_high": high,
            "tensors": [r.name for r in records],
            "samples": facts.case.comparison.samples,
        },
        remedy=_range_remedy(
            facts, records, "Calibrate on samples like these, or cut outliers by a percentile."
        ),
    )


# -- deployed against simulated ----------------------------------------------------------------

# A loss by the kernels that ship that is wrong whatever else is.
DEPLOYED_LOSS_DB = 3.0
# ... and one that is not worth a look.
SMALL_LOSS_DB = 1.0
# An output that is better than this has no problem.
GOOD_OUTPUT_DB = 30.0


def kernel_differs(case: Case) -> Iterator[Finding]:
    """Outputs that differ between simulated and deployed runs.

    By more than three steps, or the largest element changes place. A problem where the deployed
    output is below 30 dB and at least 3 dB worse than the simulated one; a note where no largest
    element changes place and it is above 30 dB or loses less than 1 dB.
    """
    for output in case.comparison.outputs:
        if not output.deployed_differs:
            continue
        loss = output.sqnr_db - output.deployed_sqnr_db
        good = output.deployed_sqnr_db >= GOOD_OUTPUT_DB
        harmless = good or abs(loss) < SMALL_LOSS_DB
        severity = NOTE if harmless and not output.deployed_flips else LOOK
        if loss >= DEPLOYED_LOSS_DB and not good:
            severity = PROBLEM
        steps = output.deployed_max_steps
        cause = output.deployed_cause
        apart = "" if steps is None else f"the two differ by up to {steps:.3g} steps, "
        yield Finding(
            code="kernel-differs",
            severity=severity,
            node="",
            tensor=output.name,
            sentence=(
                f"Output {_name(output.name)} as deployed is not as simulated: {apart}"
                f"the largest element changes place on {output.deployed_flips} of "
                f"{counted(case.comparison.samples, 'sample')}; {output.sqnr_db:.1f} dB simulated, "
                f"{output.deployed_sqnr_db:.1f} dB deployed"
                + (f". Without {_name(cause)} the difference is gone." if cause else ".")
            ),
            evidence={
                "simulated_sqnr_db": output.sqnr_db,
                "deployed_sqnr_db": output.deployed_sqnr_db,
                "difference_steps": steps,
                "flipped_samples": output.deployed_flips,
                "transformer": cause,
            },
            remedy=_kernel_remedy(case, cause),
        )


def _kernel_remedy(case: Case, cause: str) -> Remedy:
    if cause:
        return Remedy(say=f'Open the session with disabled_optimizers=["{_name(cause)}"].')
    codes = {t.qparams.dtype for t in case.matching.scheme.tensors if t.kind == "weight"}
    reduced = (case.recipe or {}).get("reduce_range")
    if codes & {"int8", "uint8"} and not reduced:
        return Remedy(
            say="Quantize weights to 7 bits (reduce_range), which no 8-bit kernel saturates.",
            recipe={"reduce_range": True},
        )
    return Remedy(say="Open the session with fewer graph optimisations.")


# -- speed -------------------------------------------------------------------------------------

# Below this a run is mostly what any run costs.
TINY_SECONDS = 0.001
# Behind DequantizeLinear and before QuantizeLinear, ONNX Runtime has integer kernels for these or
# drops the pair around them.
_INTEGER_KERNELS = frozenset(
    {"Conv", "MatMul", "Gemm", "Add", "Mul", "Sigmoid", "LeakyRelu", "Softmax", "AveragePool",
     "GlobalAveragePool", "Where", "Concat", "Relu", "Clip", *(_CARRIES - {"Pad"})}
)  # fmt: skip
# Q, DQ and Cast over nodes that compute.
ISLAND_SHARE = 0.5


def int8_not_faster(case: Case) -> Iterator[Finding]:
    """The quantized model takes as long as the float model or longer, deployed on this machine."""
    latency = case.comparison.latency
    if latency is None or not latency.float_seconds > 0:
        return
    times = latency.quantized_seconds / latency.float_seconds
    if not times >= 1 or not _integers(case):
        return
    spread = max(latency.float_spread_seconds, latency.quantized_spread_seconds)
    close = latency.quantized_seconds - latency.float_seconds <= spread
    tiny = latency.float_seconds < TINY_SECONDS
    why = "a model so small is mostly what any run costs" if tiny else ""
    yield Finding(
        code="int8-not-faster",
        severity=LOOK,
        node="",
        tensor="",
        sentence=(
            f"Quantized, the model is not faster here: {latency.quantized_seconds * 1e3:.3g} ms "
            f"against {latency.float_seconds * 1e3:.3g} ms in float ({times:.2g} times, median of "
            f"{counted(latency.runs, 'run')}"
            + (", within the spread)" if close else ")")
            + (f"; {why}." if why else ".")
        ),
        evidence={
            "float_seconds": latency.float_seconds,
            "quantized_seconds": latency.quantized_seconds,
            "times": times,
            "spread_seconds": spread,
            "runs": latency.runs,
        },
        remedy=Remedy(
            say="Keep the float model on this machine, unless the smaller file is what counts; "
            "measure on the machine that counts."
        ),
    )


def _integers(case: Case) -> bool:
    return bool(COMPUTES_IN_INTEGERS.intersection(quant_formats(case.quantized_model)))


def slower(case: Case) -> Iterator[Finding]:
    """What keeps a quantized file from being fast: float islands, ConvInteger, signed QOperator.

    The graph after optimisation is not there to be counted: a node between DequantizeLinear and
    QuantizeLinear for which ONNX Runtime's CPU provider has no integer kernel keeps at least one of
    each, and those over the nodes that compute have to be above 0.5. Nothing is said where the
    quantized model was measured to be faster than the float one.
    """
    latency = case.comparison.latency
    if latency is not None and latency.quantized_seconds < latency.float_seconds:
        return
    model = case.quantized_model
    formats = quant_formats(model)
    conv = [n for n in model.nodes if n.op_type == "ConvInteger"]
    if conv:
        yield _slow(
            conv[0].name,
            f"{counted(len(conv), 'Conv')} quantized dynamically as ConvInteger, e.g. "
            f"{_name(conv[0].name)}: the range of each input is found at run time and the kernel "
            "is a slow one.",
            {"conv_integer_nodes": len(conv)},
            Remedy(say="Quantize models with Conv statically.", recipe={"format": "qdq"}),
            case,
        )
    if QuantFormat.QOPERATOR in formats:
        signed = [
            t for t in case.matching.scheme.tensors
            if t.kind == "activation" and t.qparams.dtype == "int8" and t.after is None
        ]  # fmt: skip
        if signed:
            yield _slow(
                "",
                f"{counted(len(signed), 'activation')} of this QOperator file are int8, for which "
                "x86 kernels are slower than for uint8.",
                {"int8_activations": len(signed)},
                Remedy(say="Use QDQ, or uint8 activations.", recipe={"activation_type": "uint8"}),
                case,
            )
    islands, computing = _islands(model)
    share = 2 * len(islands) / computing if computing else 0.0
    if islands and share > ISLAND_SHARE:
        kinds = listed(dict.fromkeys(n.op_type for n in islands), most=5)
        names = {q: f for f, q in case.matching.node_pairs.items()}
        excluded = tuple(names[n.name] for n in islands if n.name in names)
        yield _slow(
            "",
            f"{len(islands)} of {counted(computing, 'node')} compute in float between a "
            f"DequantizeLinear and a QuantizeLinear that stay ({kinds}): the runtime has no "
            "integer kernel for them.",
            {"island_nodes": len(islands), "computing_nodes": computing, "island_share": share},
            Remedy(say="Leave these nodes in float.", exclude=excluded),
            case,
        )


def _slow(
    node: str, sentence: str, evidence: dict[str, Any], remedy: Remedy, case: Case
) -> Finding:
    names = {q: f for f, q in case.matching.node_pairs.items()}
    return Finding(
        code="slower", severity=NOTE, node=names.get(node, ""), tensor="", sentence=sentence,
        evidence=evidence, remedy=remedy,
    )  # fmt: skip


def _islands(model: Model) -> tuple[list[Node], int]:
    """Float nodes between DQ and Q without integer kernel, and how many nodes compute at all."""
    found, computing = [], 0
    for node in model.nodes:
        if node.op_type in (Q, DQ, "Constant", "Identity"):
            continue
        computing += 1
        makers = (model.producers.get(i) for i in node.inputs)
        before = any(
            m is not None and m.op_type == DQ and m.inputs[0] not in model.constant_names
            for m in makers
        )
        readers = [r for o in node.outputs for r in model.consumers.get(o, ())]
        after = any(r.op_type == Q for r in readers)
        if before and after and node.op_type not in _INTEGER_KERNELS:
            found.append(node)
    return found, computing


# -- batches and samples -----------------------------------------------------------------------

BATCH_FRACTION = 0.01
GAP_DB = 3.0
HALVES_DB = 3.0
FEWEST_FOR_HALVES = 4


def dynamic_batch(case: Case) -> Iterator[Finding]:
    """Outputs that depend on what shares their batch, in a dynamically quantized model.

    A sample alone and in a batch differ by more than 1 % of the output's largest value, and by ten
    times more than in the float model.
    """
    effect, facts = case.comparison.batch, Lookups(case)
    for output in effect.outputs if effect is not None else ():
        record = facts.records.get(output.output)
        peak = math.nan if record is None else _absmax(record)
        moved, own = output.quantized_max_abs_difference, output.float_max_abs_difference
        if effect is None or not peak > 0:
            continue
        if not moved > BATCH_FRACTION * peak or not moved > 10 * own:
            continue
        yield Finding(
            code="dynamic-batch",
            severity=LOOK,
            node="" if record is None else record.node,
            tensor=output.output,
            sentence=(
                f"Output {_name(output.output)} depends on what shares its batch: alone and in a "
                f"{'padded ' if effect.padded else ''}batch of {effect.samples} it differs by up "
                f"to {moved:.3g}, {moved / peak:.1%} of its largest value (sample "
                f"{_name(output.worst_sample)}; float model {own:.2g}), because ranges are found "
                "at run time."
            ),
            evidence={
                "difference": moved,
                "difference_fraction": moved / peak,
                "float_difference": own,
                "batch_sqnr_db": output.quantized_sqnr_db,
                "worst_sample": output.worst_sample,
                "samples": effect.samples,
            },
            remedy=Remedy(
                say="Quantize statically, or run one sample at a time.", recipe={"format": "qdq"}
            ),
        )


def calibration_gap(case: Case) -> Iterator[Finding]:
    """Outputs more than 3 dB better on samples of the calibration than on the others."""
    for output in case.comparison.outputs:
        seen, unseen = output.seen_sqnr_db, output.unseen_sqnr_db
        if seen is None or unseen is None or not seen - unseen > GAP_DB:
            continue
        yield Finding(
            code="calibration-gap",
            severity=LOOK,
            node="",
            tensor=output.name,
            sentence=(
                f"Output {_name(output.name)} has {seen:.1f} dB on samples that calibration saw "
                f"and {unseen:.1f} dB on others: the calibration set is too small or unlike them."
            ),
            evidence={
                "seen_sqnr_db": seen,
                "unseen_sqnr_db": unseen,
                "gap_db": seen - unseen,
                "samples": case.comparison.samples,
            },
            remedy=_more_samples(case),
        )


def _more_samples(case: Case) -> Remedy:
    say = "Calibrate with more samples, of every kind that will be met."
    if (case.recipe or {}).get("calibration_samples") is not None:
        return Remedy(say=say, recipe={"calibration_samples": None})
    return Remedy(say=say)


def unstable_ranking(case: Case) -> Iterator[Finding]:
    """Too few samples for a ranking to be trusted.

    A comparison holds no error per sample and tensor, so two halves cannot be ranked against each
    other. What stands for it: the median SQNR of an output over every other sample and over the
    rest differ by more than 3 dB. At least four samples are needed to say so.
    """
    for output in case.comparison.outputs:
        halves = [
            [v for v in output.per_sample_sqnr_db[at::2] if math.isfinite(v)] for at in (0, 1)
        ]
        if sum(map(len, halves)) < FEWEST_FOR_HALVES or not all(halves):
            continue
        a, b = (statistics.median(half) for half in halves)
        if abs(a - b) <= HALVES_DB:
            continue
        yield Finding(
            code="unstable-ranking",
            severity=NOTE,
            node="",
            tensor=output.name,
            sentence=(
                f"The samples disagree: output {_name(output.name)} has a median of {a:.1f} dB "
                f"over one half of {counted(case.comparison.samples, 'sample')} and {b:.1f} dB "
                "over the other, so a ranking of nodes by these samples may turn with others."
            ),
            evidence={
                "first_half_median_sqnr_db": a,
                "second_half_median_sqnr_db": b,
                "samples": case.comparison.samples,
            },
            remedy=Remedy(say="Compare on more samples before believing an order of nodes."),
        )


# -- where an error comes from -----------------------------------------------------------------

# The accumulated error falls by so much across the node where it begins.
DROP_DB = 6.0
# A tensor without error, for the sake of a difference.
PERFECT_DB = 40.0


def inherited(case: Case) -> Iterator[Finding]:
    """Outputs below 20 dB and 6 dB worse than by their own rounding, and where the error begins.

    The first tensor on the way to the output that is 6 dB worse than all its node reads, is itself
    below 26 dB and, where the added error is known, owes most of its error to its own node. Where
    the error grows by small steps there is no such tensor, and nothing is said.
    """
    facts = Lookups(case)
    for output in case.comparison.outputs:
        record = facts.records.get(output.name)
        if record is None or not record.accumulated_sqnr_db < LOOK_DB:
            continue
        local = record.local_sqnr_db
        if local is not None and not local > record.accumulated_sqnr_db + DROP_DB:
            continue
        origin = _origin(facts, record)
        if origin is None or origin is record or origin.node == record.node:
            continue
        before = min((_capped(s) for s in facts.sources(facts.model.node_by_name[origin.node])),
                     default=PERFECT_DB)  # fmt: skip
        yield Finding(
            code="inherited",
            severity=LOOK,
            node=record.node,
            tensor=record.name,
            sentence=(
                f"Output {_name(record.name)} has {record.accumulated_sqnr_db:.1f} dB and "
                + (
                    "is not rounded itself"
                    if local in (None, math.inf)
                    else f"has {local:.1f} dB by its own rounding"
                )
                + f": its error begins at {origin.op_type} {_name(origin.node)}, whose output has "
                f"{origin.accumulated_sqnr_db:.1f} dB after inputs of {before:.1f} dB or better."
            ),
            evidence={
                "accumulated_sqnr_db": record.accumulated_sqnr_db,
                "local_sqnr_db": local,
                "origin_node": origin.node,
                "origin_tensor": origin.name,
                "origin_sqnr_db": origin.accumulated_sqnr_db,
                "origin_added_sqnr_db": origin.added_sqnr_db,
                "origin_inputs_sqnr_db": before,
            },
            remedy=Remedy(say="Look at the node where it begins.", exclude=(origin.node,)),
        )


def _capped(record: ActivationError) -> float:
    return min(record.accumulated_sqnr_db, PERFECT_DB)


def _ancestors(model: Model, tensor: str) -> set[str]:
    """Names of the nodes that a tensor is computed by, near and far."""
    found: set[str] = set()
    waiting = [tensor]
    while waiting:
        node = model.producers.get(waiting.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            waiting += [i for i in (*node.inputs, *node.captured) if i]
    return found


def _origin(facts: Lookups, record: ActivationError) -> ActivationError | None:
    above = _ancestors(facts.model, record.name)
    for other in facts.case.comparison.activations:
        node = facts.node(other)
        own = other.accumulated_sqnr_db
        if node is None or node.name not in above or not own < LOOK_DB + DROP_DB:
            continue
        sources = [_capped(s) for s in facts.sources(node)]
        if not min(sources, default=PERFECT_DB) - own > DROP_DB:
            continue
        if other.added_sqnr_db is not None and not other.added_sqnr_db < own + DROP_DB:
            continue
        return other
    return None


# -- single patterns ---------------------------------------------------------------------------

MASK_LOW = -100.0
# The mask's value over the largest logit.
MASK_TIMES = 16.0
# A logit is off by up to half a step: 0.1 of a step is a factor of 5 % in what softmax gives.
MASK_STEP = 0.1


def attention_mask(case: Case) -> Iterator[Finding]:
    """A mask value that takes the range of the logits before a Softmax.

    The tensor behind the Add or Where that leads to a Softmax reaches below -100. Its median is not
    recorded: the largest logit before the mask stands for it, which has to be 16 times smaller than
    the mask's value, while one step of the scale is above 0.1, i.e. 5 % in a probability.
    """
    facts = Lookups(case)
    model = facts.model
    for softmax in (n for n in model.nodes if n.op_type == "Softmax"):
        found = _masking(facts, softmax)
        if found is None:
            continue
        mask, between = found
        records = [facts.record(o) for n in (mask, *between) for o in n.outputs if o]
        wide = [r for r in records if r is not None and scales_of(r)]
        if not wide:
            continue
        record = max(wide, key=lambda r: max(scales_of(r)))
        step, low = max(scales_of(record)), record.observed_low
        logits = [r for r in facts.sources(mask) if r.observed_low > MASK_LOW]
        largest = max((_absmax(r) for r in logits), default=math.nan)
        if not low < MASK_LOW or not largest * MASK_TIMES < -low or not step > MASK_STEP:
            continue
        after = facts.record(softmax.outputs[0])
        yield Finding(
            code="attention-mask",
            severity=LOOK,
            node=mask.name,
            tensor=record.name,
            sentence=(
                f"The mask value {low:.4g} in {mask.op_type} {_name(mask.name)} takes the range of "
                f"the logits before Softmax {_name(softmax.name)}: they reach {largest:.3g} and "
                f"are rounded to steps of {step:.3g}"
                + ("." if after is None else f"; {after.accumulated_sqnr_db:.1f} dB behind it.")
            ),
            evidence={
                "mask_low": low,
                "largest_logit": largest,
                "scale": step,
                "softmax_node": softmax.name,
                "softmax_sqnr_db": None if after is None else after.accumulated_sqnr_db,
            },
            remedy=Remedy(
                say="Leave the mask and the Softmax in float, or clamp the mask's value.",
                exclude=(mask.name, *(n.name for n in between), softmax.name),
            ),
        )


def _masking(facts: Lookups, softmax: Node) -> tuple[Node, list[Node]] | None:
    """The Add or Where before a Softmax, and the nodes between that only move values."""
    between: list[Node] = []
    tensor = softmax.inputs[0]
    for _ in range(_HOPS):
        node = facts.model.producers.get(tensor)
        if node is None:
            return None
        if node.op_type in ("Add", "Where", "Sub"):
            return node, between[::-1]
        if node.op_type not in _CARRIES:
            return None
        between.append(node)
        tensor = node.inputs[0]
    return None


OUTLIER_TIMES = 10.0
OUTLIER_CHANNELS = 8
OUTLIER_SHARE = 0.02
BULK_DB = 25.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outlier:
    """A tensor in which few channels are far larger than the others."""

    record: ActivationError
    channel: int
    few: int
    channels: int
    largest: float
    median: float
    exclude: tuple[str, ...]


def outlier(case: Case) -> Iterator[Finding]:
    """Few channels with far larger values than the others, under one scale.

    Percentiles of values are not recorded: the largest value of each channel stands for them. The
    largest channel is above 10 times the median one, at most 2 % of the channels (at least one) are
    above a third of it, and half of the channels are below 25 dB. A Concat's parts are another
    rule's, the ranges of Softmax and Sigmoid are pinned, and rare samples cannot be seen. Tensors
    with the same largest channel, as along a residual stream or inside a normalization, are one
    finding: leaving one of them in float then gains little.
    """
    facts = Lookups(case)
    groups: dict[tuple[int, int], list[_Outlier]] = {}
    for record in case.comparison.activations:
        found = _outlier(facts, record)
        if found is not None:
            groups.setdefault((found.channel, found.channels), []).append(found)
    for group in groups.values():
        yield _outlier_finding(facts, group)


def _outlier(facts: Lookups, record: ActivationError) -> _Outlier | None:
    node = facts.node(record)
    if isinstance(record.scale, tuple) or not scales_of(record) or node is None:
        return None
    pinned = ("Concat", "Softmax", "Sigmoid", *_CARRIES)
    if record.op_type in pinned or len(record.channel_low) < OUTLIER_CHANNELS:
        return None
    sizes = np.maximum(np.abs(record.channel_low), np.abs(record.channel_high))
    if not np.isfinite(sizes).all():
        return None
    largest, median = float(sizes.max()), float(np.median(sizes))
    few = int(np.count_nonzero(sizes > largest / 3))
    if not largest > OUTLIER_TIMES * median or few > max(1, OUTLIER_SHARE * sizes.size):
        return None
    # What the scale alone makes of a channel of this size, were it uniform.
    rounding = 20 * math.log10(2 * median / max(scales_of(record))) if median > 0 else math.inf
    if not record.median_channel_sqnr_db < BULK_DB or not rounding < BULK_DB + 6:
        return None
    readers = [n.name for n in facts.model.consumers.get(record.name, ())]
    return _Outlier(
        record=record, channel=int(sizes.argmax()), few=few, channels=int(sizes.size),
        largest=largest, median=median, exclude=(record.node, *readers),
    )  # fmt: skip


def _outlier_finding(facts: Lookups, group: list[_Outlier]) -> Finding:
    """Of one tensor, or of all that have the same largest channel."""
    worst = min(group, key=lambda o: o.record.median_channel_sqnr_db)
    record, step = worst.record, max(scales_of(worst.record))
    others, sets = (f" and {worst.few - 1} more", "set") if worst.few > 1 else ("", "sets")
    many = f" The same channel does so in {len(group)} tensors." if len(group) > 1 else ""
    return Finding(
        code="outlier",
        severity=LOOK,
        node=record.node if len(group) == 1 else "",
        tensor=record.name,
        sentence=(
            f"Channel {worst.channel}{others} of {worst.channels} in {_name(record.name)}, up to "
            f"{worst.largest:.3g}, {sets} the scale {step:.3g} for all: the median channel "
            f"reaches {worst.median:.3g} and has {record.median_channel_sqnr_db:.1f} dB.{many}"
        ),
        evidence={
            "largest_absmax": worst.largest,
            "median_channel_absmax": worst.median,
            "outlier_channels": worst.few,
            "channels": worst.channels,
            "channel": worst.channel,
            "median_channel_sqnr_db": record.median_channel_sqnr_db,
            "local_sqnr_db": record.local_sqnr_db,
            "scale": step,
            "tensors": [o.record.name for o in group],
        },
        remedy=Remedy(
            say=f"Leave {'the node and its' if len(group) == 1 else 'these nodes and their'} "
            f"readers in float, or store {'it' if len(group) == 1 else 'them'} in 16 bits; or cut "
            "the range by a percentile of 99.9 to 99.99, or move the outliers into the weights.",
            exclude=tuple(dict.fromkeys(name for o in group for name in o.exclude)),
            recipe=_at_16_bits(facts, [o.record for o in group]),
        ),
    )


# 255 times, give or take what samples differ by.
BYTE_TIMES = (200.0, 300.0)
NEGATIVE = -0.5


def wrong_preprocessing(case: Case) -> Iterator[Finding]:
    """Inputs calibrated in other units than the samples: without /255, or without mean and scale.

    The range that the input's scale can hold over the observed one is 200 to 300 or the inverse,
    or the scale holds nothing below 0 while samples reach below -0.5. Nothing is said of random
    samples.
    """
    if case.comparison.random_feeds:
        return
    for record in case.comparison.activations:
        low, high = record.representable_low, record.representable_high
        if record.op_type != "Input" or low is None or high is None or not scales_of(record):
            continue
        held, seen = max(abs(low), abs(high)), _absmax(record)
        times = held / seen if seen > 0 else math.nan
        inverse = 1 / times if times > 0 else math.nan
        if BYTE_TIMES[0] <= times <= BYTE_TIMES[1]:
            what = "calibration saw 0 to 255 and the samples were divided by 255"
        elif BYTE_TIMES[0] <= inverse <= BYTE_TIMES[1]:
            what = "calibration saw values divided by 255 and the samples were not"
        elif low > -max(scales_of(record)) / 2 and record.observed_low < NEGATIVE:
            what = "calibration saw no value below 0: mean and scale were left out there"
        else:
            continue
        wrong = record.local_sqnr_db is not None and record.local_sqnr_db < LOOK_DB
        yield Finding(
            code="wrong-preprocessing",
            severity=PROBLEM if wrong else LOOK,
            node="",
            tensor=record.name,
            sentence=(
                f"Input {_name(record.name)} was calibrated in other units than it is fed in: its "
                f"scale holds {low:.4g} to {high:.4g}, the samples {record.observed_low:.4g} to "
                f"{record.observed_high:.4g}. It looks as if {what}."
            ),
            evidence={
                "representable_low": low,
                "representable_high": high,
                "observed_low": record.observed_low,
                "observed_high": record.observed_high,
                "times": times,
                "local_sqnr_db": record.local_sqnr_db,
            },
            remedy=Remedy(say="Pre-process calibration samples and inputs in the same way."),
        )


def divisor_zero(case: Case) -> Iterator[Finding]:
    """A quantized divisor whose smallest values round to 0.

    What Div divides by, or what Sqrt, Reciprocal or Pow makes such a divisor of, with values of one
    sign that come closer to 0 than half a step. The smallest absolute value of a tensor with both
    signs is not recorded, so those are passed over. Typical of a LayerNormalization in parts.
    """
    facts = Lookups(case)
    for record in case.comparison.activations:
        steps = scales_of(record)
        if not steps:
            continue
        low, high = record.observed_low, record.observed_high
        smallest = low if low > 0 else -high if high < 0 else 0.0
        if not 0 < smallest < max(steps) / 2:
            continue
        way = _to_divisor(facts.model, record.name)
        if way is None:
            continue
        chain = (*_from_square(facts, record.name), *way, *_by_reciprocal(facts.model, way[-1]))
        yield Finding(
            code="divisor-zero",
            severity=LOOK,
            node=way[-1],
            tensor=record.name,
            sentence=(
                f"{_name(way[-1])} divides by what {_name(record.name)} becomes (or takes its "
                f"logarithm), whose smallest value {smallest:.3g} is below half a step of "
                f"{max(steps):.3g} and is rounded to 0."
            ),
            evidence={
                "smallest_absolute": smallest,
                "scale": max(steps),
                "smallest_steps": smallest / max(steps),
                "local_sqnr_db": record.local_sqnr_db,
            },
            remedy=Remedy(
                say="Leave the nodes from the square to the division in float, or export the "
                "normalization as one node.",
                exclude=tuple(dict.fromkeys(chain)),
            ),
        )


def _to_divisor(model: Model, tensor: str, hops: int = _HOPS) -> list[str] | None:
    """The nodes from a tensor to the one that divides by it; None where none does."""
    for node in model.consumers.get(tensor, ()) if hops else ():
        divides = node.op_type == "Div" and node.inputs[1:2] == (tensor,)
        exponent = _exponent(model, node) if node.inputs[:1] == (tensor,) else math.nan
        if divides or node.op_type in ("Reciprocal", "Log") or exponent < 0:
            return [node.name]
        if node.op_type in ("Sqrt", *_CARRIES) or exponent > 0:
            further = _to_divisor(model, node.outputs[0], hops - 1)
            if further is not None:
                return [node.name, *further]
    return None


def _exponent(model: Model, node: Node) -> float:
    """The smallest exponent of a Pow; nan for another node or where it is computed."""
    if node.op_type != "Pow" or len(node.inputs) < 2:
        return math.nan
    exponents = model.constant(node.inputs[1])
    if exponents is None or not exponents.size:
        return math.nan
    return float(np.min(exponents.astype(np.float64)))


_BEFORE_DIVISOR = frozenset(
    {"Add", "Sub", "Mul", "Div", "ReduceMean", "ReduceSum", "Sqrt", "Max", "Min", "Clip", *_CARRIES}
)


def _from_square(facts: Lookups, tensor: str) -> list[str]:
    """The nodes from the squares (or the first other ones) to a tensor, in graph order."""
    found: dict[str, Node] = {}
    waiting = [(tensor, 0)]
    while waiting:
        name, hops = waiting.pop()
        node = facts.model.producers.get(name)
        if node is None or node.name in found or hops == _HOPS:
            continue
        # A product with a constant is no square, but the division by a count.
        if node.op_type == "Pow" or (node.op_type == "Mul" and len(facts.computed(node)) > 1):
            found[node.name] = node
        elif node.op_type in _BEFORE_DIVISOR:
            found[node.name] = node
            waiting += [(i, hops + 1) for i in facts.computed(node)]
    return [n.name for n in sorted(found.values(), key=lambda n: n.index)]


def _by_reciprocal(model: Model, name: str) -> list[str]:
    """The products with what a Reciprocal gives, which are the division; none of another node."""
    node = model.node_by_name[name]
    if node.op_type != "Reciprocal":
        return []
    return [r.name for r in model.consumers.get(node.outputs[0], ()) if r.op_type == "Mul"]


RESIDUAL_TIMES = 16.0
RESIDUAL_DROP_DB = 10.0


def residual_add(case: Case) -> Iterator[Finding]:
    """An Add of a small branch to a large stream, whose result is far worse than both.

    The inputs' largest values differ by more than 16 times, and the output is more than 10 dB worse
    than the worse of the two.
    """
    facts = Lookups(case)
    for record in case.comparison.activations:
        node = facts.node(record)
        if record.op_type != "Add" or not scales_of(record) or node is None:
            continue
        inputs = [facts.record(i) for i in facts.computed(node)]
        known = [r for r in inputs if r is not None]
        if len(known) != 2:
            continue
        small, large = sorted(map(_absmax, known))
        before = min(_capped(r) for r in known)
        drop = before - record.accumulated_sqnr_db
        if not large > RESIDUAL_TIMES * small > 0 or not drop > RESIDUAL_DROP_DB:
            continue
        yield Finding(
            code="residual-add",
            severity=LOOK,
            node=record.node,
            tensor=record.name,
            sentence=(
                f"Add {_name(record.node)} sums values up to {large:.3g} and up to {small:.3g} "
                f"under one scale of {max(scales_of(record)):.3g}: {before:.1f} dB before it, "
                f"{record.accumulated_sqnr_db:.1f} dB behind."
            ),
            evidence={
                "large_absmax": large,
                "small_absmax": small,
                "times": large / small,
                "drop_db": drop,
                "scale": max(scales_of(record)),
            },
            remedy=Remedy(
                say="Leave the residual Adds in float, or store their sums in 16 bits.",
                exclude=(record.node,),
                recipe=_at_16_bits(facts, [record]),
            ),
        )


ACTIVATION_RULES: Mapping[str, Callable[[Case], Iterator[Finding]]] = {
    "concat-shared-scale": concat_shared_scale,
    "nan": nan,
    "attention-mask": attention_mask,
    "divisor-zero": divisor_zero,
    "wrong-preprocessing": wrong_preprocessing,
    "clipped": clipped,
    "too-wide": too_wide,
    "outlier": outlier,
    "residual-add": residual_add,
    "kernel-differs": kernel_differs,
    "calibration-gap": calibration_gap,
    "dynamic-batch": dynamic_batch,
    "inherited": inherited,
    "unstable-ranking": unstable_ranking,
    "int8-not-faster": int8_not_faster,
    "slower": slower,
}
"""Every rule of this file by its code."""
