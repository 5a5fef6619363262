"""What a search for an exclusion list gave: its goal, the list, its price, what else was tried.

Apart from `search`, which finds it, because the command line and pages show it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from inspector.comparison import made_with
from inspector.exclusions import ExclusionEntry, ExclusionList
from inspector.model import Model
from inspector.output_metrics import TaskMetric
from inspector.recipe import QuantConfig
from inspector.task_metrics import misses

SEARCH_FORMAT = "quant-inspector/search"
SEARCH_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What a list has to reach.

    Attributes:
        metric: as it was written.
        value: the figure wanted, in its unit.
        unit: "dB", "nats" or "".
        higher_is_better: whether the figure is to be at least or at most `value`.
    """

    metric: str
    value: float
    unit: str = ""
    higher_is_better: bool = True

    @classmethod
    def of(cls, metric: TaskMetric, value: float) -> Goal:
        """A value of a metric."""
        return cls(
            metric=metric.text,
            value=value,
            unit=metric.unit,
            higher_is_better=metric.higher_is_better,
        )

    def reached(self, figure: float) -> bool:
        """Whether a figure will do; nan does not."""
        return not misses(figure, self.value, higher_is_better=self.higher_is_better)

    def short_of(self, figure: float) -> float:
        """By how much a figure misses; negative where it does not, nan for nan."""
        return self.value - figure if self.higher_is_better else figure - self.value

    def worth(self, figure: float) -> float:
        """A figure so that higher is better; -inf for nan."""
        if math.isnan(figure):
            return -math.inf
        return figure if self.higher_is_better else -figure

    def raised(self, by: float) -> Goal:
        """A goal that is so much harder."""
        return replace(self, value=self.value + (by if self.higher_is_better else -by))


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchTrial:
    """A list that was measured on all samples, and its price.

    Attributes:
        nodes: of the float file, in graph order.
        figure: of the goal's metric, simulated.
        float_macs_fraction: share of the multiply-accumulates in float; nan where there are none.
        weight_bytes: of all weights as they would be stored.
        deployed: the same of its real file; None where that was not made.
        front: no cheaper list has as good a figure.
    """

    nodes: tuple[str, ...]
    figure: float
    float_macs_fraction: float
    weight_bytes: int
    deployed: float | None = None
    front: bool = False

    def to_json(self) -> dict[str, Any]:
        """As values that `render.strict` takes."""
        return {
            "nodes": list(self.nodes),
            "metric": self.figure,
            "deployed": self.deployed,
            "float_macs_fraction": self.float_macs_fraction,
            "weight_bytes": self.weight_bytes,
            "front": self.front,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Cure:
    """Another recipe without a list.

    Attributes:
        label: what is different, e.g. "per channel".
        config: the recipe.
        figure: of the goal's metric, judged as the list is; nan where there is no model.
        reached: whether that reaches the goal.
        size_bytes: of its file; None where there is none.
        reason: why there is no model, "" where there is one.
    """

    label: str
    config: QuantConfig
    figure: float = math.nan
    reached: bool = False
    size_bytes: int | None = None
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """As values that `render.strict` takes."""
        return {
            "label": self.label,
            "recipe": self.config.to_json(),
            "metric": self.figure,
            "reached": self.reached,
            "size_bytes": self.size_bytes,
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """The list that was found, or the best so far.

    Attributes:
        goal: what was to be reached.
        reached: whether it was, deployed where that was asked for.
        nodes: the list, in graph order.
        before, after: figures without and with the list, simulated.
        deployed_before, deployed_after: the same of the real files with optimisations on; None
            where they were not judged.
        evaluations: lists that were run since the trials were opened.
        seconds: how long it took.
        samples: how many judge.
        unseen: whether none of these calibrated; None where that is unknown.
        candidates: nodes that are quantized.
        float_macs_fraction, weight_bytes: price of the list, see `SearchTrial`.
        whole_float_macs_fraction, whole_weight_bytes: the same without a list.
        float_weight_bytes: of all weights in float.
        trials: lists that were measured on all samples, the shortest first; not those of the
            ranking, which leave one node quantized.
        knee: index of the trial behind which more price buys little; None where there is none.
        ended: why it ended early, "" where it did not.
        most_float_macs: share of the multiply-accumulates that the list might put in float.
        notes: what to know, one sentence each.
        worst_tensors: the activations that seem to make most noise, the worst first; a few.
        cures: other recipes, the best first.
    """

    goal: Goal
    reached: bool
    nodes: tuple[str, ...]
    before: float
    after: float
    deployed_before: float | None = None
    deployed_after: float | None = None
    evaluations: int
    seconds: float
    samples: int
    unseen: bool | None = None
    candidates: int
    float_macs_fraction: float
    weight_bytes: int
    whole_float_macs_fraction: float
    whole_weight_bytes: int
    float_weight_bytes: int
    trials: tuple[SearchTrial, ...] = ()
    knee: int | None = None
    ended: str = ""
    most_float_macs: float | None = None
    notes: tuple[str, ...] = ()
    worst_tensors: tuple[str, ...] = ()
    cures: tuple[Cure, ...] = ()

    def judged(self) -> tuple[float, float]:
        """Figures before and after, deployed where that is what counts."""
        if self.deployed_before is None or self.deployed_after is None:
            return self.before, self.after
        return self.deployed_before, self.deployed_after

    def cheaper(self) -> tuple[Cure, ...]:
        """The recipes that reach the goal as well as a list does, or get further than the best."""
        after = self.goal.worth(self.judged()[1])
        return tuple(
            c
            for c in self.cures
            if (c.reached and (self.nodes or not self.reached))
            or (not self.reached and self.goal.worth(c.figure) > after)
        )

    def to_json(self) -> dict[str, Any]:
        """As values that `render.strict` takes: format "quant-inspector/search"."""
        before, after = self.judged()
        return {
            "format": SEARCH_FORMAT,
            "version": SEARCH_VERSION,
            "made_with": made_with(),
            "goal": {
                "metric": self.goal.metric,
                "value": self.goal.value,
                "unit": self.goal.unit,
                "higher_is_better": self.goal.higher_is_better,
                "judged": "simulated" if self.deployed_after is None else "deployed",
                "max_float_macs": self.most_float_macs,
            },
            "reached": self.reached,
            "ended": self.ended,
            "nodes": list(self.nodes),
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "samples": self.samples,
            "unseen": self.unseen,
            "candidates": self.candidates,
            "metric": {
                "before": before,
                "after": after,
                "simulated": {"before": self.before, "after": self.after},
                "deployed": None
                if self.deployed_after is None
                else {"before": self.deployed_before, "after": self.deployed_after},
            },
            "price": {
                "float_macs_fraction": self.float_macs_fraction,
                "weight_bytes": self.weight_bytes,
                "without_list": {
                    "float_macs_fraction": self.whole_float_macs_fraction,
                    "weight_bytes": self.whole_weight_bytes,
                },
                "float_model": {
                    "float_macs_fraction": 1.0,
                    "weight_bytes": self.float_weight_bytes,
                },
            },
            "trials": [t.to_json() for t in self.trials],
            "knee": self.knee,
            "worst_tensors": list(self.worst_tensors),
            "cures": [c.to_json() for c in self.cures],
            "notes": list(self.notes),
        }


def exclusion_list(result: SearchResult, float_model: Model, config: QuantConfig) -> ExclusionList:
    """The list in the project's own format, with what it was measured to give."""
    before, after = result.judged()
    nodes = float_model.node_by_name
    reason = f"search for {goal_text(result.goal)}"
    return ExclusionList(
        nodes=tuple(
            ExclusionEntry(
                name=name, op_type=nodes[name].op_type, outputs=nodes[name].outputs, reason=reason
            )
            for name in result.nodes
        ),
        float_name=float_model.name,
        float_sha256=float_model.sha256,
        recipe=config,
        measured={
            "samples": result.samples,
            "unseen": result.unseen,
            "judged": "simulated" if result.deployed_after is None else "deployed",
            result.goal.metric: {"before": before, "after": after},
        },
    )


def figure_text(goal: Goal, figure: float) -> str:
    """A figure of the goal's metric, e.g. "20.03 dB" or "0.9731"."""
    return f"{figure:.2f} dB" if goal.unit == "dB" else f"{figure:.4g} {goal.unit}".rstrip()


def goal_text(goal: Goal) -> str:
    """E.g. "output_sqnr_db >= 20 dB"."""
    sign = ">=" if goal.higher_is_better else "<="
    return f"{goal.metric} {sign} {goal.value:g} {goal.unit}".rstrip()


def search_lines(result: SearchResult, float_model: Model) -> Iterator[str]:
    """What a search gave, for people: the list, what it gives and costs, cheaper cures."""
    goal = result.goal
    before, after = (figure_text(goal, f) for f in result.judged())
    how = "simulated" if result.deployed_after is None else "deployed"
    which = {True: "unseen ", False: "seen ", None: ""}[result.unseen]
    where = f"{how}, {result.samples} {which}sample{'s' * (result.samples != 1)}"
    count = len(result.nodes)
    nodes = f"{count} of {result.candidates} quantized nodes"
    if result.reached and not count:
        yield f"✓ {goal_text(goal)} is reached without a list: {after} ({where})"
    elif result.reached:
        yield f"✓ {goal_text(goal)} is reached with {nodes} in float: {before} → {after} ({where})"
    else:
        yield f"✗ {goal_text(goal)} is not reached"
        yield f"  best is {nodes} in float: {before} → {after} ({where})"
    if result.ended:
        yield f"  it ended early: {result.ended}; the list is the best so far"
    for name in result.nodes:
        yield f"  {name} ({float_model.node_by_name[name].op_type})"
    yield (
        f"price: {_percent(result.float_macs_fraction)} of the multiply-accumulates in float "
        f"(without a list {_percent(result.whole_float_macs_fraction)}), weights "
        f"{result.weight_bytes:,} bytes (without {result.whole_weight_bytes:,}, "
        f"in float {result.float_weight_bytes:,})"
    )
    if result.deployed_after is not None:
        pair = (figure_text(goal, f) for f in (result.before, result.after))
        yield f"simulated: {' → '.join(pair)}"
    yield f"{result.evaluations} trials in {result.seconds:.1f} s"
    cheaper = result.cheaper()
    for cure in result.cures:
        if cure.reason:
            yield f"{cure.label} alone: no model ({cure.reason})"
            continue
        verdict = ""
        if cure in cheaper:
            verdict = ": cheaper than this list" if cure.reached else ": better than this list"
        figure = figure_text(goal, cure.figure)
        yield f"{cure.label} alone: {figure} with no further node in float{verdict}"


def _percent(share: float) -> str:
    return "an unknown share" if math.isnan(share) else f"{100 * share:.1f} %"
