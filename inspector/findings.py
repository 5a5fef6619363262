"""What a diagnosis finds, and what it looks at.

Apart from the rules, because there are many of them, in files of their own, and all speak this way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from inspector.comparison import Comparison, Pin
from inspector.equalize import comparable_float
from inspector.matching import Matching, match_tensors
from inspector.model import Model

PROBLEM, LOOK, NOTE = "problem", "look", "note"
SEVERITIES = (PROBLEM, LOOK, NOTE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """A change that may help; empty where there is none but what `say` says.

    Attributes:
        say: one imperative sentence.
        exclude: nodes of the float model to leave in float.
        recipe: changed entries of a recipe, as `QuantConfig.to_json` names them.
        overrides: entries of a recipe's overrides to add, as `TensorOverride.to_json` writes them.
    """

    say: str
    exclude: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Without what is empty."""
        parts = {
            "say": self.say,
            "exclude": list(self.exclude),
            "recipe": dict(self.recipe),
            "overrides": [dict(each) for each in self.overrides],
        }
        return {key: part for key, part in parts.items() if part}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One cause of error, with its evidence.

    Attributes:
        code: of the rule, e.g. "concat-shared-scale".
        severity: "problem" is wrong whatever a remedy gains, or gains; "look" is a signal whose
            remedy is not measured or gains too little; "note" is worth to know.
        node: the float model's node; "" for the whole model.
        tensor: the float model's tensor; for the whole model its worst one, "" where none is.
        sentence: what is wrong and why, with figures and units.
        evidence: the figures by name; a unit is part of the name.
        remedy: what to do.
    """

    code: str
    severity: str
    node: str
    tensor: str
    sentence: str
    evidence: Mapping[str, Any]
    remedy: Remedy

    def to_json(self) -> dict[str, Any]:
        """As in a comparison's JSON; not yet strict where figures are not finite."""
        return {
            "code": self.code,
            "severity": self.severity,
            "node": self.node,
            "tensor": self.tensor,
            "sentence": self.sentence,
            "evidence": dict(self.evidence),
            "remedy": self.remedy.to_json(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What the rules look at.

    Attributes:
        comparison: of the two models.
        float_model: the float model; equalized where the quantized file says that it was.
        quantized_model: its quantized twin.
        matching: of the two, with what the quantized file carries (`Matching.scheme`).
        recipe: the recipe asked for, as `QuantConfig.to_json` writes it; None where none is known.
    """

    comparison: Comparison
    float_model: Model
    quantized_model: Model
    matching: Matching
    recipe: Mapping[str, Any] | None = None


def found_by_content(comparison: Comparison) -> list[Pin]:
    """What was matched by the values seen on the feeds, as if it were set by hand."""
    return [
        Pin(float_name=a.name, quantized_name=a.quantized_name)
        for a in comparison.activations
        if a.matched_by == "content"
    ]


def case_of(
    comparison: Comparison,
    float_model: Model,
    quantized_model: Model,
    recipe: Mapping[str, Any] | None = None,
) -> Case:
    """What the rules look at, matched as the comparison was.

    Args:
        comparison: of the two models.
        float_model: the float model.
        quantized_model: its quantized twin.
        recipe: the recipe asked for, as `QuantConfig.to_json` writes it; None where none is known.
    """
    pins = (*comparison.pins, *found_by_content(comparison))
    float_model = comparable_float(float_model, quantized_model)
    return Case(
        comparison=comparison,
        float_model=float_model,
        quantized_model=quantized_model,
        matching=match_tensors(float_model, quantized_model, pins=pins),
        recipe=recipe,
    )
