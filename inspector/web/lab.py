"""The range and scheme lab of the tensor page: another range or scheme, tried before it is applied.

What a choice does to the tensor itself follows from its distribution; what it does to the outputs
comes from the switchboard, where the recipe can have it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import streamlit as st

from inspector import figures, lab
from inspector.comparison import ActivationError, WeightError
from inspector.distribution import Distribution, distribution_of_detail
from inspector.grid_schemes import SCHEMES
from inspector.range_choice import choose_range
from inspector.render import (
    format_db,
    format_number,
    format_percent,
    read_number,
    shorten_name,
)
from inspector.web import facts, session, style, widgets, words
from inspector.web.session import View

# What a range can come from; "calibrated" is what the run has.
_WAYS = {
    "calibrated": "as in the run",
    "minmax": "MinMax",
    "percentile-99.999": "Percentile 99.999",
    "percentile-99.99": "Percentile 99.99",
    "percentile-99.9": "Percentile 99.9",
    "entropy": "Entropy",
    "mse": "Least noise (MSE)",
    "symmetric": "Symmetric",
}
_BITS = (4, 8, 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What is tried.

    Attributes:
        values: the tensor's float values.
        trial: what the chosen scheme and range make of them.
        note: what to know about the range, "" for nothing.
    """

    values: Distribution
    trial: lab.Trial
    note: str


def _titles() -> dict[str, str]:
    return {name: scheme.title for name, scheme in SCHEMES.items()}


def _scheme_of(record: ActivationError | WeightError, recipe: Mapping[str, Any]) -> str:
    """The scheme that ONNX Runtime used for a tensor of this type."""
    dtype = record.dtype if record.dtype in ("int8", "uint8", "int16", "uint16") else "int8"
    symmetric = isinstance(record, WeightError) and dtype.startswith("int")
    given = recipe.get("weight_symmetric" if isinstance(record, WeightError) else
                       "activation_symmetric")  # fmt: skip
    symmetric = symmetric if given is None else bool(given)
    name = f"ort-{dtype}-symmetric" if symmetric else f"ort-{dtype}"
    return name if name in SCHEMES else "ort-int8"


def _run_range(
    record: ActivationError | WeightError, detail: Mapping[str, Any]
) -> tuple[float, float] | None:
    """What the run's grid represents; None where it has several or none."""
    found = detail.get("representable")
    if not found or isinstance(record.scale, tuple):
        return None
    low, high = (read_number(each) for each in found)
    return (low, high) if math.isfinite(low) and math.isfinite(high) and low <= high else None


def controls(view: View, detail: Mapping[str, Any], *, key: str) -> Choice:
    """The widgets, and what they are set to."""
    record = view.record
    assert record is not None
    values = distribution_of_detail(detail)
    titles = _titles()
    start = _scheme_of(record, view.run.recipe)
    name = st.selectbox(
        "Scheme",
        list(titles),
        index=list(titles).index(start),
        format_func=titles.__getitem__,
        key=f"{key}-scheme",
    )
    scheme = SCHEMES[name]
    bits = st.segmented_control(
        "Bits", _BITS, default=scheme.bits, key=f"{key}-bits-{name}", required=True
    )
    scheme = scheme.with_bits(int(bits or scheme.bits))
    known = _run_range(record, detail)
    ways = {way: title for way, title in _WAYS.items() if known or way != "calibrated"}
    way = st.selectbox(
        "Range from",
        list(ways),
        format_func=ways.__getitem__,
        key=f"{key}-way",
        help="Where the two handles start; drag them from there.",
    )
    if way == "calibrated" and known is not None:
        (low, high), note = known, ""
    else:
        chosen = choose_range(values, str(way), scheme=scheme)
        low, high, note = chosen.low, chosen.high, chosen.note
    whole = choose_range(values, "minmax")
    first, last = min(low, whole.low, 0.0), max(high, whole.high, 0.0)
    room = (last - first) * 0.1 or 1.0
    dragged = st.slider(
        "Low and high",
        min_value=first - room,
        max_value=last + room,
        value=(low, high),
        step=(last - first + 2 * room) / 1000,
        format="%.4g",
        key=f"{key}-range-{way}-{name}-{scheme.bits}",
    )
    # The slider moves in steps of its own; a range that was not dragged is meant exactly.
    step = (last - first + 2 * room) / 1000
    if abs(dragged[0] - low) > step or abs(dragged[1] - high) > step:
        low, high = dragged
    return Choice(values=values, trial=lab.trial(values, scheme, low, high), note=note)


def tiles(view: View, choice: Choice) -> None:
    """The tensor's own figures under the choice."""
    trial = choice.trial
    widgets.tiles(
        [
            (
                "SQNR of this tensor",
                format_db(trial.sqnr_db),
                f"even spread {format_db(trial.predicted_sqnr_db)}",
                "Signal over all quantization noise of its float values, higher is better. Even "
                "spread: were values spread evenly over each step (step²/12).",
            ),
            (
                "Clipped",
                format_percent(trial.clipped_fraction),
                f"{_share(trial)} of the noise",
                "Share of the values more than half a step beyond the lowest or highest level.",
            ),
            (
                "Step",
                format_number(trial.scale),
                f"zero point {trial.zero_point:g}, {trial.level_count:,} levels",
                trial.scheme.formula,
            ),
        ]
    )


def _share(trial: lab.Trial) -> str:
    noise = trial.noise
    return format_percent(trial.clipping_noise / noise if noise else 0.0)


def _override(view: View, trial: lab.Trial) -> tuple[dict[str, Any] | None, str]:
    """The recipe's entry for the choice, or why it can have none."""
    recipe, record = view.run.recipe, view.record
    assert record is not None
    if recipe.get("format") != "qdq":
        return None, f"format {recipe.get('format')} takes no range set by hand"
    if not trial.quant_type or not float(trial.zero_point).is_integer():
        return None, "no ONNX type has this grid"
    weight = isinstance(record, WeightError)
    own = str(recipe.get("weight_type" if weight else "activation_type"))
    if trial.quant_type != own:
        return None, f"the recipe stores it as {own}, this is {trial.quant_type}"
    if trial.scale == record.scale and trial.zero_point == record.zero_point:
        return None, "this is the grid that the run has"
    entry = {
        "tensor": record.name,
        "quant_type": trial.quant_type,
        "scale": trial.scale,
        "zero_point": int(trial.zero_point),
    }
    return entry, ""


def output(view: View, choice: Choice) -> None:
    """What the choice does to the outputs, and the button that keeps it for the next run."""
    record = view.record
    assert record is not None
    entry, reason = _override(view, choice.trial)
    kept = session.overrides(view)
    mine = next((each for each in kept if each.get("tensor") == record.name), None)
    if entry is None:
        st.caption(f"Outputs not previewed: {words.md_text(reason)}.")
    else:
        tried = [*(each for each in kept if each.get("tensor") != record.name), entry]
        recipe = {**view.run.recipe, "overrides": tried}
        nodes = session.draft(view.pair.id, view.run.exclusions).nodes
        answer = session.list_preview(view, recipe, nodes)
        if answer.job is not None:
            st.caption("Outputs: preparing the preview …")
            widgets.poll(answer.job)
        elif answer.error is not None:
            st.caption(f"Outputs not previewed: {words.md_text(answer.error.message)}")
        elif answer.value["reason"]:
            st.caption(f"Outputs not previewed: {words.md_text(answer.value['reason'])}.")
        else:
            told = facts.preview_sentence(view, answer.value, None, nodes, overrides=tried)
            st.markdown(f"**{words.md_text(told)}**")
    with st.container(horizontal=True, key="lab-actions"):
        st.button(
            "Use this grid in the next run",
            key="lab-use",
            type="primary",
            disabled=entry is None or entry == mine or not session.may_edit(),
            on_click=session.set_override,
            args=(view, record.name, entry),
            help=session.edit_hint(
                "Kept with the recipe on the Exclusions page, until it is re-quantized."
            ),
        )
        st.button(
            "Take it back",
            key="lab-drop",
            disabled=mine is None or not session.may_edit(),
            on_click=session.set_override,
            args=(view, record.name, None),
        )


def section(view: View, detail: Mapping[str, Any], *, log: bool) -> None:
    """The whole lab."""
    record = view.record
    assert record is not None
    dark = style.is_dark()
    left, right = st.columns([1, 2.2], gap="medium")
    with left:
        choice = controls(view, detail, key=f"lab-{view.run.id}-{record.name}")
        if choice.note:
            st.caption(words.md_text(choice.note))
    name = f"{view.pair.title}-run{view.run.number}-{record.name}"
    with right:
        tiles(view, choice)
        output(view, choice)
        widgets.picture(
            figures.lab_figure(detail, choice.trial, log=log, dark=dark),
            key="lab",
            name=f"{name}-lab",
            alt="The grid over the tensor's values",
        )
    with st.expander(
        f"Every scheme with this range, for {words.md_text(shorten_name(record.name, 40))}",
        key="lab-schemes",
        on_change="rerun",
    ) as every:
        if every.open:
            trial = choice.trial
            rows = lab.compare_schemes(choice.values, trial.low, trial.high, bits=trial.scheme.bits)
            widgets.picture(
                figures.scheme_bars(rows, dark, selected=trial.scheme.name),
                key="schemes",
                name=f"{name}-schemes",
                alt="SQNR of this tensor under each scheme",
            )
