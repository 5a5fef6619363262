"""Which causes of error a comparison shows, root causes and measured gain first.

Apart from the rules, which propose: here a measurement decides. The remedy of each finding is
previewed, and only what gains is called a problem. Findings of one cause become one, and what only
carries an error comes behind what makes it.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from inspector.activation_rules import ACTIVATION_RULES, GOOD_OUTPUT_DB, Lookups
from inspector.comparison import ActivationError, judged_db
from inspector.errors import InspectorError
from inspector.feeds import CalibrationSplit, Feeds
from inspector.findings import LOOK, NOTE, PROBLEM, SEVERITIES, Case, Finding, Remedy
from inspector.model import Model
from inspector.model_files import load_model
from inspector.preview import Previewer
from inspector.quantize import extra_options, quantize_model
from inspector.quantizer import UnplannableError
from inspector.recipe import QuantConfig, TensorOverride
from inspector.recipe_table import OutputRunner
from inspector.runtime import Progress, no_progress, open_session, part_of
from inspector.states import States
from inspector.weight_rules import WEIGHT_RULES

Rule = Callable[[Case], Iterator[Finding]]
# What a remedy makes of an output, dB: "before_db" and "after_db"; None where it is not measured.
GainOf = Callable[[Remedy], Mapping[str, float] | None]
# The same of a remedy's recipe; where it is not measured, "reason" says why.
RecipeGainOf = Callable[[Remedy], Mapping[str, Any]]

RULES: Mapping[str, Rule] = {**ACTIVATION_RULES, **WEIGHT_RULES}
"""Every rule by its code."""

# A remedy that gains less is none.
LEAST_GAIN_DB = 1.0
# Recipes that one diagnosis re-quantizes with, each of which may take so long.
MOST_RECIPES = 3
MOST_SECONDS = 60.0
# A node whose added error is so much smaller than the error behind it carries most of it.
CARRIED_DB = 6.0
# ... and where the added error is not known, a node that does not even double the noise.
DOUBLED_DB = 3.0

# The cause, and what else it makes of the same tensor or node.
_EXPLAINS: Mapping[str, frozenset[str]] = {
    "wrong-preprocessing": frozenset({"clipped", "too-wide", "activation-scale", "half-range"}),
    "degenerate-range": frozenset({"clipped", "too-wide", "activation-scale", "nan"}),
    "activation-scale": frozenset(
        {"clipped", "too-wide", "half-range", "negatives-leak", "fixed-range"}
    ),
    "fixed-range": frozenset({"clipped", "too-wide"}),
    "qdq-pair-differs": frozenset(
        {"clipped", "too-wide", "activation-scale", "half-range", "negatives-leak"}
    ),
    "attention-mask": frozenset({"outlier", "too-wide", "residual-add"}),
    "concat-shared-scale": frozenset({"outlier", "half-range"}),
    "divisor-zero": frozenset({"nan", "outlier"}),
    "weight-gain": frozenset({"channel-range", "weight-inflated"}),
    "weight-offset": frozenset({"channel-range", "weight-inflated"}),
    "weights-swapped": frozenset({"weight-gain", "weight-offset"}),
    "not-the-same-model": frozenset({"weights-swapped", "weight-gain", "weight-offset"}),
}
# They only say where an error was seen, not what to do about it.
_SEEN = frozenset({"inherited", "nan"})
# They say nothing about an error of this model on these samples.
_ASIDE = frozenset(
    {"int8-not-faster", "slower", "saturation-elsewhere", "preprocess-first", "unstable-ranking"}
)
# They spoil all that is computed.
_EVERYWHERE = frozenset({"wrong-preprocessing", "not-the-same-model"})
# One cause strikes a chain of nodes, which the remedy of the first of them names.
_CHAINED = frozenset({"concat-shared-scale", "divisor-zero", "attention-mask"})


def diagnose(
    case: Case,
    *,
    gain_of: GainOf | None = None,
    recipe_gain_of: RecipeGainOf | None = None,
    progress: Progress = no_progress,
) -> tuple[Finding, ...]:
    """What is wrong, most important first.

    Problems come first, then what is worth a look, then notes. Among those what is wrong in itself
    comes first, then a root cause before what carries its error, then the larger measured gain,
    then the larger added error; what is about speed, other machines or the samples comes last.
    A remedy that gains 1 dB or more on an output below 30 dB makes a "look" a "problem"; one that
    gains less makes it a "note". Measured findings have `output_gain_db`, `output_before_db` and
    `output_after_db` in their evidence; those that took up others say which in `also`, and have
    the remedy of one of those where that gains at least 1 dB more.

    Args:
        case: what to look at.
        gain_of: measures a remedy (see `previewed_gain`); None measures nothing.
        recipe_gain_of: measures the recipe of a remedy (see `requantized_gain`): the evidence then
            has `recipe_gain_db`, `recipe_before_db` and `recipe_after_db`, which count as the
            other gain does, or says why in `recipe_not_measured`.
        progress: see `runtime.Progress`.

    Raises:
        InspectorError: what `gain_of` raises.
    """
    ruling, measuring = part_of(progress, 0.0, 0.3), part_of(progress, 0.3, 1.0)
    found: list[Finding] = []
    for at, (code, rule) in enumerate(RULES.items()):
        ruling(at / len(RULES), f"rule {code}")
        found += rule(case)
    taken = _taken(found)
    measured: dict[str, Mapping[str, float] | None] = {}
    recipes: dict[str, Mapping[str, Any]] = {}

    def measure(remedy: Remedy) -> Mapping[str, float] | None:
        key = _key(remedy)
        if gain_of is not None and key not in measured:
            measured[key] = gain_of(remedy)
        return measured.get(key)

    judged: list[tuple[Finding, bool]] = []
    for at, (finding, others) in enumerate(taken):
        measuring(at / len(taken), f"measuring what a remedy gains: {at + 1} of {len(taken)}")
        gain = None if finding.severity == NOTE else measure(finding.remedy)
        if gain is not None:
            for other in others:
                better = measure(other.remedy) if other.code not in _SEEN else None
                if better is None or not _gain(better) >= _gain(gain) + LEAST_GAIN_DB:
                    continue
                finding, gain = replace(finding, remedy=other.remedy), better
        done = finding if gain is None else _judged(finding, gain)
        wanted = finding.remedy.recipe
        if recipe_gain_of is not None and wanted and finding.severity != NOTE:
            key = _key(Remedy(say="", recipe=wanted))
            if key not in recipes and finding.code not in _ASIDE:
                enough = sum("reason" not in each for each in recipes.values()) >= MOST_RECIPES
                why = {"reason": f"{MOST_RECIPES} other recipes were measured before it"}
                recipes[key] = why if enough else recipe_gain_of(finding.remedy)
            if key in recipes:
                done = _recipe_judged(done, finding.severity, recipes[key])
        judged.append((done, finding.severity == PROBLEM))
    order = _Order(case)
    progress(1.0, "diagnosed")
    return tuple(f for f, _ in sorted(judged, key=lambda each: order.key(*each)))


def _gain(measured: Mapping[str, float]) -> float:
    return gained_db(measured["before_db"], measured["after_db"])


def _key(remedy: Remedy) -> str:
    """What a remedy changes; what it says is left out."""
    changes = {k: v for k, v in remedy.to_json().items() if k != "say"}
    return json.dumps(changes, sort_keys=True, default=str)


def _judged(finding: Finding, measured: Mapping[str, float]) -> Finding:
    """A finding with its measured gain and the severity that follows."""
    before, after, gain = measured["before_db"], measured["after_db"], _gain(measured)
    severity = finding.severity
    if severity == LOOK and gain < LEAST_GAIN_DB:
        severity = NOTE
    # An output that has no figure is not a good one.
    elif severity == LOOK and not before >= GOOD_OUTPUT_DB:
        severity = PROBLEM
    evidence = {
        **finding.evidence,
        "output_gain_db": gain,
        "output_before_db": before,
        "output_after_db": after,
    }
    return replace(finding, severity=severity, evidence=evidence)


def _recipe_judged(finding: Finding, severity: str, measured: Mapping[str, Any]) -> Finding:
    """A finding with what its recipe gains and the severity that follows.

    Args:
        finding: judged by the rest of its remedy.
        severity: what it had before that.
        measured: see `RecipeGainOf`.
    """
    if "reason" in measured:
        evidence = {**finding.evidence, "recipe_not_measured": measured["reason"]}
        return replace(finding, evidence=evidence)
    judged = _judged(replace(finding, severity=severity), measured)
    if "output_gain_db" in finding.evidence and _gain(measured) < LEAST_GAIN_DB:
        judged = finding
    ends = ("before_db", "after_db")
    evidence = {
        **finding.evidence,
        "recipe_gain_db": _gain(measured),
        **{f"recipe_{end}": measured[end] for end in ends},
    }
    return replace(finding, severity=judged.severity, evidence=evidence)


def won_db(finding: Finding) -> float | None:
    """The most that was measured for a finding's remedy, dB; None where nothing was."""
    known = (finding.evidence.get(f"{what}_gain_db") for what in ("output", "recipe"))
    return max((gain for gain in known if gain is not None), default=None)


def gained_db(before: float, after: float) -> float:
    """Decibels won; infinite where there was no figure, minus infinity where none is left."""
    if math.isnan(after):
        return 0.0 if math.isnan(before) else -math.inf
    if math.isnan(before):
        return math.inf
    return 0.0 if before == after else after - before


# -- one cause, one finding --------------------------------------------------------------------


def merged(findings: Collection[Finding]) -> list[Finding]:
    """Findings without those that another one is the cause of, which it then names in `also`.

    An inherited error gives way to what is wrong where it begins, a consequence to its cause at the
    same tensor or node, and a later node of a chain to the first. A cause is as severe as what it
    took up.
    """
    return [finding for finding, _ in _taken(findings)]


def _taken(findings: Collection[Finding]) -> list[tuple[Finding, tuple[Finding, ...]]]:
    """What `merged` gives, each with those that it took up."""
    kept: list[tuple[Finding, tuple[Finding, ...]]] = []
    taken: dict[int, list[Finding]] = {}
    ordered = list(findings)
    causes = {at: _cause(at, ordered) for at in range(len(ordered))}
    for at, finding in enumerate(ordered):
        cause = causes[at]
        # A cause may itself be a consequence.
        for _ in range(len(ordered)):
            further = None if cause is None else causes[cause]
            if further is None or further == at:
                break
            cause = further
        if cause is not None:
            taken.setdefault(cause, []).append(finding)
    for at, finding in enumerate(ordered):
        if causes[at] is not None:
            continue
        own = taken.get(at, [])
        if own:
            severity = min((finding.severity, *(f.severity for f in own)), key=SEVERITIES.index)
            also = [f"{f.code} at {f.tensor or f.node}" for f in own]
            evidence = {**finding.evidence, "also": also}
            finding = replace(finding, severity=severity, evidence=evidence)
        kept.append((finding, tuple(own)))
    return kept


def _cause(at: int, findings: list[Finding]) -> int | None:
    """Index of the finding that a finding gives way to."""
    finding = findings[at]
    for index, other in enumerate(findings):
        if index != at and _gives_way(finding, other, earlier=index < at):
            return index
    return None


def _gives_way(finding: Finding, other: Finding, *, earlier: bool) -> bool:
    places = {other.node, *other.remedy.exclude} - {""}
    if finding.code == "inherited":
        origin = finding.evidence["origin_node"]
        if other.code == "inherited":
            return earlier and bool(other.evidence["origin_node"] == origin)
        if other.code == "nan" or other.severity == NOTE:
            return False
        return (
            other.code in _EVERYWHERE
            or origin in places
            or finding.evidence["origin_tensor"] in (other.tensor, *_tensors(other))
        )
    if finding.code == other.code:
        return finding.code in _CHAINED and earlier and finding.node in places
    if finding.code not in _EXPLAINS.get(other.code, ()):
        return False
    if finding.code == "nan":
        return finding.evidence.get("model") == "quantized" and finding.node in places
    if (finding.code, other.code) == ("outlier", "divisor-zero"):
        # Large squares are what leaves no steps to small ones.
        return set(finding.remedy.exclude) <= set(other.remedy.exclude)
    # Many tensors in one finding are more than this cause explains.
    if _count(finding) > 1:
        return _count(other) > 1
    if other.code == "not-the-same-model":
        return True
    return finding.tensor == other.tensor or (bool(other.node) and finding.node == other.node)


def _tensors(finding: Finding) -> tuple[str, ...]:
    """All tensors that a finding about several names."""
    tensors = finding.evidence.get("tensors", ())
    return tuple(tensors) if isinstance(tensors, list | tuple) else ()


def _count(finding: Finding) -> int:
    """How many tensors a finding is about; some say only the number."""
    tensors = finding.evidence.get("tensors", 1)
    return tensors if isinstance(tensors, int) else len(tensors)


# -- what comes first --------------------------------------------------------------------------


class _Order:
    """The order of findings.

    Args:
        case: that they are of.
    """

    def __init__(self, case: Case) -> None:
        self._lookups = Lookups(case)

    def key(self, finding: Finding, fact: bool) -> tuple[Any, ...]:
        """What to sort a finding by.

        Args:
            finding: judged.
            fact: it is wrong in itself, whatever a remedy gains.
        """
        record = self._record(finding)
        gain = won_db(finding)
        if gain is None:
            # A fact that is wrong in itself is not less so because no preview shows it.
            gain = math.inf if finding.severity == PROBLEM else -math.inf
        return (
            SEVERITIES.index(finding.severity),
            finding.code in _ASIDE,
            not fact,
            self._carries(finding, record),
            -gain,
            _added(record),
            math.inf if record is None else record.depth,
            finding.code,
            finding.tensor,
        )

    def _record(self, finding: Finding) -> ActivationError | None:
        """Of the finding's tensor, or of what its node computes (a weight's)."""
        record = self._lookups.record(finding.tensor)
        node = self._lookups.model.node_by_name.get(finding.node)
        if record is None and node is not None:
            found = (self._lookups.record(o) for o in node.outputs if o)
            record = next((r for r in found if r is not None), None)
        return record

    def _carries(self, finding: Finding, record: ActivationError | None) -> bool:
        if finding.code == "inherited":
            return True
        # A Concat's parts were judged against what they were before it.
        if record is None or not record.node or finding.code == "concat-shared-scale":
            return False
        own, added = record.accumulated_sqnr_db, record.added_sqnr_db
        if added is not None and not math.isnan(added):
            return added > own + CARRIED_DB
        node = self._lookups.node(record)
        sources = self._lookups.sources(node) if node is not None else []
        before = min((s.accumulated_sqnr_db for s in sources), default=math.inf)
        return before < own + DOUBLED_DB


def _added(record: ActivationError | None) -> float:
    """The added error, or the local one where it is not known, dB; a larger error is lower."""
    if record is None:
        return math.inf
    for figure in (record.added_sqnr_db, record.local_sqnr_db):
        if figure is not None and not math.isnan(figure):
            return figure
    return math.inf


# -- what a remedy gains -----------------------------------------------------------------------


def previewed_gain(
    previewer: Previewer,
    before: Mapping[str, float],
    *,
    exclude: Collection[str] = (),
    config: QuantConfig | None = None,
    progress: Progress = no_progress,
) -> GainOf:
    """What measures remedies by previews: nodes left in float, and grids set by hand.

    The figures are of the output that gains most, among those that were below 30 dB where there are
    any. Not measured (None) is a remedy that changes something else, that the preview cannot show,
    or none of whose nodes can be left in float.

    Args:
        previewer: of the run the findings are about, on feeds that calibration has not seen.
        before: what each output is judged by without the remedy, dB (`worst_part_sqnr_db`).
        exclude: the run's own list; a remedy's nodes join it.
        config: the run's recipe, to set grids by hand with; None leaves such remedies unmeasured.
        progress: called before every sample; what it raises ends the preview.
    """

    def gain_of(remedy: Remedy) -> Mapping[str, float] | None:
        overrides = None
        if remedy.overrides and config is not None:
            overrides = tuple(TensorOverride.from_json(each) for each in remedy.overrides)
        names = [*exclude, *(n for n in remedy.exclude if n not in exclude)]
        if len(names) == len(exclude) and not overrides:
            return None
        grids = None if not overrides or config is None else _grids(config, overrides)
        try:
            found = previewer.preview(names, grids, progress=progress)
        except (InspectorError, UnplannableError):
            return None
        if {name for name, _ in found.refused}.issuperset(remedy.exclude) and not grids:
            return None
        pairs = [(before[o.name], o.worst_part_sqnr_db) for o in found.outputs if o.name in before]
        low = [p for p in pairs if not p[0] >= GOOD_OUTPUT_DB]
        best = max(low or pairs, key=lambda p: gained_db(*p), default=None)
        return None if best is None else {"before_db": best[0], "after_db": best[1]}

    return gain_of


def requantized_gain(
    case: Case,
    config: QuantConfig,
    feeds: Feeds,
    split: CalibrationSplit,
    *,
    cache: Path,
    float_model: Model,
    exclude: Sequence[str] = (),
    made_so: bool = False,
    mask: str = "",
    states: States = (),
    progress: Progress = no_progress,
) -> RecipeGainOf:
    """What measures the recipe of a remedy: the float model re-quantized with and without it.

    Both have the same list and the same calibration; figures are of simulated outputs over all
    feeds, of the output that gains most among those below 30 dB, as in `previewed_gain`. Not
    measured is what is expected to take more than `MOST_SECONDS`, what the quantizer refuses, and
    anything where all outputs have 30 dB.

    Args:
        case: what is diagnosed.
        config: the recipe of its quantized model.
        feeds: what outputs are judged on.
        split: what calibrates.
        cache: folder for caches.
        float_model: the user's float model.
        exclude: the list of the quantized model.
        made_so: the quantized model was made with this recipe, list and calibration, so that it is
            what the change is measured against.
        mask, states: as for `compare_models`.
        progress: called before every step; what it raises ends the work.
    """
    runner: list[OutputRunner] = []
    seconds: list[float] = []
    before: list[dict[str, float]] = []

    def figures(changed: QuantConfig | None) -> dict[str, float]:
        if not runner:
            runner.append(OutputRunner(float_model, feeds, mask=mask, states=states))
        if changed is None:
            model = case.quantized_model
            return _figures(runner[0], model, progress)
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="quant-inspector-") as name:
            made = quantize_model(
                float_model,
                changed,
                calibration=split.calibration if changed.static else None,
                exclude=exclude,
                output=Path(name) / "trial.onnx",
                cache=cache,
                progress=progress,
            )
            found = _figures(runner[0], load_model(made.path), progress)
        seconds.append(time.perf_counter() - begin)
        return found

    def gain_of(remedy: Remedy) -> Mapping[str, Any]:
        try:
            changed = QuantConfig.from_json({**config.to_json(), **remedy.recipe})
            if changed == config:
                return {"reason": "the recipe has this already"}
            if all(judged_db(output) >= GOOD_OUTPUT_DB for output in case.comparison.outputs):
                return {"reason": f"every output has {GOOD_OUTPUT_DB:g} dB or more"}
            expected = max(seconds) if seconds else _expected_seconds(float_model, feeds, split)
            if expected > MOST_SECONDS:
                return {"reason": f"re-quantizing takes about {expected:.0f} s"}
            if not before:
                before.append(figures(None if made_so else config))
            after = figures(changed)
        except InspectorError as error:
            return {"reason": error.message}
        pairs = [(db, after[name]) for name, db in before[0].items() if name in after]
        low = [p for p in pairs if not p[0] >= GOOD_OUTPUT_DB]
        best = max(low or pairs, key=lambda p: gained_db(*p), default=None)
        if best is None:
            return {"reason": "no output can be compared"}
        return {"before_db": best[0], "after_db": best[1]}

    return gain_of


def _figures(runner: OutputRunner, model: Model, progress: Progress) -> dict[str, float]:
    """What each output is judged by, dB: the lowest of its parts, or all of it."""
    found, _, _ = runner.figures(model, progress=progress)
    return {
        o.name: o.sqnr_db if o.worst_part_sqnr_db is None else min(o.sqnr_db, o.worst_part_sqnr_db)
        for o in found
    }


def _expected_seconds(float_model: Model, feeds: Feeds, split: CalibrationSplit) -> float:
    """About how long it takes to calibrate, quantize and run the result, from one float run."""
    session = open_session(float_model, optimized=False)
    once = math.inf
    for _ in range(2):  # the first run is not like the others
        begin = time.perf_counter()
        session.run(feeds[0], sample=feeds.names[0])
        once = min(once, time.perf_counter() - begin)
    # All tensors are kept while calibrating; both models run simulated and deployed.
    return once * (3 * len(split.calibration) + 4 * len(feeds)) + float_model.size_bytes / 2e7


def _grids(
    config: QuantConfig, overrides: tuple[TensorOverride, ...]
) -> dict[str, Mapping[str, Any]]:
    """Grids by tensor as a preview takes them; the remedy's come before the recipe's own."""
    own = {each.tensor: each for each in (*config.overrides, *overrides)}
    entries = extra_options(replace(config, overrides=tuple(own.values())))
    return {tensor: each[0] for tensor, each in entries["TensorQuantOverrides"].items()}
