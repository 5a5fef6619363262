"""What the figures of a comparison rest on: one line that is always there, and all of it below.

A figure is worth what it was taken from: how much of the model is compared at all, on which
samples, run in which way. Comparisons of earlier versions lack some of it and show what they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import streamlit as st

from inspector import figures
from inspector.comparison import Comparison
from inspector.render import printable, shorten_name
from inspector.store import CPU_PROVIDER
from inspector.web import matches, style, tables, widgets
from inspector.web.session import View, compared
from inspector.web.words import md_code, md_text

_SHOWN_PAIRS = 8
_STEPS = (
    "Apart by steps of the output's own scale; – where it has none: a warning then counts in 255 "
    "steps of its range."
)


def line(comparison: Comparison) -> str:
    """The whole in one line of markdown."""
    counts = comparison.counts
    if counts is None:
        tensors = f"**{widgets.count(len(compared(comparison)), 'tensor')} compared**"
        parts = [tensors]
    else:
        whole = widgets.count(counts.float_tensors, "float tensor")
        parts = [
            f"**{whole}**: {counts.matched:,} matched",
            f"{counts.fused:,} fused",
            f"{counts.unmatched:,} unmatched",
        ]
    parts += [widgets.samples_label(comparison)[0].replace(",", ""), "optimisations off"]
    if comparison.provider != CPU_PROVIDER:
        parts.append(md_text(_short_provider(comparison.provider)))
    if comparison.mask:
        parts.append("padding left out")
    if comparison.states:
        parts.append("state carried over")
    if comparison.pins:
        parts.append(f":blue[{widgets.count(len(comparison.pins), 'match')} by hand]")
    if comparison.nonfinite:
        parts.append(f":red[● NaN or infinity in {len(comparison.nonfinite):,}]")
    if any(output.deployed_differs for output in comparison.outputs):
        parts.append(":orange[▲ deployed differs]")
    if comparison.skipped:
        parts.append(f"{len(comparison.skipped):,} skipped")
    return f"{' · '.join(parts)}  :gray[— what these figures rest on]"


def _short_provider(provider: str) -> str:
    return shorten_name(provider.removesuffix("ExecutionProvider"), 30)


def panel(view: View, *, key: str) -> None:
    """The line; opened, everything the figures rest on."""
    comparison = view.comparison
    with st.expander(line(comparison), key=key, on_change="rerun") as opened:
        if opened.open:
            _everything(view, key)


def _everything(view: View, key: str) -> None:
    comparison = view.comparison
    if comparison.counts is not None:
        widgets.picture(
            figures.coverage(comparison, style.is_dark()),
            key=f"coverage-{key}",
            name=f"{view.pair.title}-run{view.run.number}-coverage",
            alt="How many float tensors are matched by which rule, fused or not compared",
        )
    st.table(_facts(comparison), border="horizontal", hide_header=True)
    matches.pinned(view, key=key)
    _section("Simulated against deployed", tables.deployed(comparison), comparison.outputs, _STEPS)
    _remedies(comparison)
    _section(
        "NaN or infinity",
        tables.nonfinite(comparison.nonfinite),
        comparison.nonfinite,
        "Look at the nodes where it begins; the others only pass it on.",
    )
    if comparison.batch is not None:
        padded = ", shorter samples padded" if comparison.batch.padded else ""
        _section(
            f"Alone against in a batch of {comparison.batch.samples}{padded}",
            tables.batch(comparison.batch),
            comparison.batch.outputs,
            "Ranges found at run time are those of the whole batch: a sample's company moves it.",
        )
    _section("Beside the device", tables.device(comparison.device), comparison.device)
    _section("Skipped", tables.reasons(comparison.skipped), comparison.skipped)
    _section("Not observed", tables.reasons(comparison.not_observed), comparison.not_observed)


def _section(title: str, frame: pd.DataFrame, records: Sequence[Any], meaning: str = "") -> None:
    if not len(frame):
        return
    st.markdown(f"**{title}**")
    st.dataframe(frame, hide_index=True, height="content" if len(frame) <= 8 else 300)
    note = f"The first {len(frame):,} of {len(records):,}; the report's files have all. "
    more = len(records) > tables.MAX_ROWS
    if meaning or more:
        st.caption((note if more else "") + meaning)


def _facts(comparison: Comparison) -> pd.DataFrame:
    label, meaning = widgets.samples_label(comparison)
    provider = md_text(_short_provider(comparison.provider))
    # The sentence says what the label's mark does.
    samples = f"{label.partition(', ')[0]}. {meaning}" if meaning else label
    rows = [
        ("Samples", samples),
        (
            "Optimisations",
            f"simulated: off, on the CPU; deployed: all, on {provider}",
        ),
    ]
    if comparison.mask:
        mask = md_code(shorten_name(comparison.mask, 60))
        rows.append(("Mask", f"positions where {mask} is 0 do not count"))
    if comparison.states:
        pairs = [
            f"{md_code(shorten_name(output, 40))} → {md_code(shorten_name(given, 40))}"
            for output, given in comparison.states[:_SHOWN_PAIRS]
        ]
        more = len(comparison.states) - _SHOWN_PAIRS
        text = ", ".join(pairs) + (f" and {more} more" if more > 0 else "")
        rows.append(("States", f"handed from sample to sample: {text}"))
    return pd.DataFrame(rows, columns=["", " "]).set_index("")


def _remedies(comparison: Comparison) -> None:
    """What to switch off where one graph transformer makes deployed outputs differ."""
    causes = dict.fromkeys(o.deployed_cause for o in comparison.outputs if o.deployed_cause)
    for cause in list(causes)[:3]:
        st.caption(
            f"Without ONNX Runtime's {md_code(cause)} deployed and simulated agree: "
            f"{md_code(f'InferenceSession(..., disabled_optimizers=[{printable(cause)!r}])')}"
        )
