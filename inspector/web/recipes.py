"""The recipes page: what to try, what came of it so far, and the row that becomes the run."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import streamlit as st

from inspector import figures
from inspector.render import (
    dump_json,
    format_bytes,
    format_db,
    format_figure,
    format_ms,
    format_percent,
    read_number,
    recipe_finding,
    shorten_name,
)
from inspector.web import facts, session, style, tables, tasks, widgets
from inspector.web.parts import REQUANTIZING
from inspector.web.session import View
from inspector.web.words import md_text

TRYING = "Trying recipes"
# The parameter of the address that names the selected row.
_CHOSEN = "recipe"
_TABLE_HEIGHT = 300
# Half of the runs lie further apart than this share of their median: the machine is busy.
NOISY = 0.4

Row = Mapping[str, Any]


def _select(label: str) -> None:
    if label and st.query_params.get(_CHOSEN) != label:
        st.query_params[_CHOSEN] = label


def _done(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["state"] == "done"]


def _chosen(rows: Sequence[Row]) -> Row | None:
    """The selected row; the best where none is."""
    done = _done(rows)
    wanted = st.query_params.get(_CHOSEN)
    return next((row for row in done if row["label"] == wanted), next(iter(done), None))


def _current(view: View, rows: Sequence[Row]) -> str:
    """The label of the shown run's recipe; "" where the run leaves nodes in float."""
    if view.run.exclusions:
        return ""
    return next((str(r["label"]) for r in rows if _alike(r["recipe"], view.run.recipe)), "")


def _alike(first: Row, second: Row) -> bool:
    # An asymmetric range may be the default or have been asked for.
    return all((first.get(key) or None) == (second.get(key) or None) for key in {**first, **second})


def busy() -> bool:
    """Whether recipes are being tried now, in this tab or another."""
    return session.running_title(TRYING) is not None


def finding(view: View) -> None:
    """The sentence and the four figures of the selected recipe."""
    table = session.workspace().recipes(view.pair.id)
    rows = table.get("rows", [])
    row = _chosen(rows)
    if row is None:
        tried = any(each["state"] == "failed" for each in rows)
        widgets.sentence(recipe_finding(table) if tried else "No recipe has been tried yet")
        return
    best = _done(rows)[0]
    widgets.sentence(recipe_finding(table), style.severity(tables.recipe_rank(best)))
    widgets.tiles(_tiles(view, row, best))


def _tiles(view: View, row: Row, best: Row) -> list[facts.Tile]:
    def db(key: str) -> str:
        return format_db(None if row[key] is None else read_number(row[key]))

    ours = [o.deployed_sqnr_db for o in view.comparison.outputs]
    which = "the best one" if row is best else f"best {_db_of(best)}"
    run = f"run {view.run.number}: {format_db(min(ours, default=None))}"
    latency, task = row["latency"], row["task"]
    took, told = "–", "not measured"
    if latency is not None:
        took = format_ms(latency["median_seconds"])
        told = (
            f"float {format_ms(latency['float_seconds'])} · spread "
            f"{format_ms(latency['spread_seconds'])}"
        )
        if latency["spread_seconds"] > NOISY * latency["median_seconds"]:
            told += ", noisy"
    unseen = (
        "Unseen samples",
        db("unseen_sqnr_db"),
        f"simulated, all samples {db('sqnr_db')}",
        "SQNR of the lowest output on samples that did not calibrate. With fewer than 8 samples "
        "all of them calibrate.",
    )
    for figure in row.get("metrics", ()):
        value = figure["simulated"] if figure["deployed"] is None else figure["deployed"]
        unseen = (
            f"Task: {shorten_name(figure['metric'], 26)}",
            format_figure(read_number(value), figure["unit"]),
            f"float {format_figure(read_number(figure['float']), figure['unit'])} · unseen "
            f"{db('unseen_sqnr_db')}",
            f"On {figure['samples']} samples; "
            f"{'higher' if figure['higher_is_better'] else 'lower'} is better.",
        )
    if task is not None and not row.get("metrics"):
        unseen = (
            "Top-1",
            format_percent(task["top1_quantized"]),
            f"float {format_percent(task['top1_float'])} · unseen {db('unseen_sqnr_db')}",
            f"On {task['samples']} labelled samples; same choice as float on "
            f"{format_percent(task['top1_agreement'])}.",
        )
    part = ""
    if row["worst_part_sqnr_db"] is not None:
        part = f"worst part {db('worst_part_sqnr_db')} · "
    return [
        (
            "Output SQNR, deployed",
            db("deployed_sqnr_db"),
            f"{part}{which} · {run}",
            "Of the lowest output, all optimisations on, pooled over all samples.",
        ),
        unseen,
        (
            "Latency on this machine",
            took,
            told,
            "Deployed, one feed; median of runs in turns with the other recipes.",
        ),
        (
            "Size",
            format_bytes(row["size_bytes"]),
            f"float {format_bytes(view.comparison.float_model.size_bytes)}",
            "File and external data; 1 MB is 10⁶ bytes.",
        ),
    ]


def _db_of(row: Row) -> str:
    value = row["deployed_sqnr_db"]
    return format_db(None if value is None else read_number(value))


def ask(view: View) -> None:
    """The buttons: try, go on, stop, and make the selected row the run."""
    rows = session.workspace().recipes(view.pair.id).get("rows", [])
    waiting = sum(row["state"] == "waiting" for row in rows)
    job = session.running_title(TRYING)
    with st.container(height=92, border=False, key="recipes-slot"):
        if job is not None:
            widgets.job_card(job.id, place="recipes")
            return
        making = session.running("requantize") or session.running_title(REQUANTIZING)
        if making is not None:
            widgets.job_card(making.id, place="recipes-run")
            return
        with st.container(horizontal=True, vertical_alignment="center", key="recipes-row"):
            row = _chosen(rows)
            if row is not None:
                _make_the_run(view, row, rows)
            if not rows or waiting:
                st.button(
                    f"Try the other {waiting}" if row is not None else "Try the recipes",
                    type="secondary" if row is not None else "primary",
                    icon=":material/play_arrow:",
                    key="try-recipes",
                    disabled=not session.may_edit(),
                    on_click=_try,
                    args=(view,),
                    help=session.edit_hint(
                        "Quantizes with each, compares the outputs and times them. The most "
                        "promising come first; what is there stays when you stop."
                    ),
                )
            else:
                st.button(
                    "Try all again",
                    type="tertiary",
                    icon=":material/refresh:",
                    key="try-again",
                    disabled=not session.may_edit(),
                    on_click=_try,
                    args=(view, True),
                )
        if row is None:
            st.caption(
                "MinMax, Percentile and Entropy, per tensor and per channel, symmetric and not, "
                "8-bit types, whole and reduced range, on this pair's samples."
            )
        else:
            notes = f" · {md_text('; '.join(row['notes'][:2]))}" if row["notes"] else ""
            st.caption(f"Selected: **{md_text(str(row['label']))}**{notes}")


def _try(view: View, again: bool = False) -> None:
    session.dismiss_problem()
    session.submit(
        tasks.try_recipes,
        session.root(),
        run_id=view.run.id,
        again=again,
        title=TRYING,
        purpose="recipes",
    )


def _make_the_run(view: View, row: Row, rows: Sequence[Row]) -> None:
    is_run = view.run.number > 0 and row["label"] == _current(view, rows)
    st.button(
        "This is the run" if is_run else "Make this the run",
        type="primary",
        icon=":material/check:" if is_run else ":material/play_arrow:",
        key="make-run",
        disabled=is_run or not session.may_edit(),
        on_click=_requantize,
        args=(view, dict(row["recipe"])),
        help=session.edit_hint(
            "Quantizes with this recipe, no node left in float, and opens the new run."
        ),
    )


def _requantize(view: View, recipe: dict[str, Any]) -> None:
    session.dismiss_problem()
    session.submit(
        tasks.requantize,
        session.root(),
        run_id=view.run.id,
        config=recipe,
        exclude=[],
        title=REQUANTIZING,
        purpose="requantize",
    )


def chart_and_table(view: View) -> None:
    """What came of the recipes so far; renews itself while they are being tried."""
    trying = busy()
    before = _state(session.workspace().recipes(view.pair.id).get("rows", []))

    @st.fragment(run_every=1.5 if trying else None)
    def block() -> None:
        rows = session.workspace().recipes(view.pair.id).get("rows", [])
        if _state(rows) != before:
            session.run_again()  # a new row or another selection: the figures above change as well
        row = _chosen(rows)
        label = str(row["label"]) if row is not None else ""
        current = _current(view, rows)
        drawn = partial(figures.recipes, rows, style.is_dark(), selected=label, current=current)
        widgets.picture(
            drawn(),
            key="recipes",
            name=f"{view.pair.title}-recipes",
            alt="Deployed SQNR of every recipe over its latency; click a mark to select it",
            clickable=True,
            select=_select,
        )
        _table(view, rows, label, current)

    block()


def _state(rows: Sequence[Row]) -> tuple[str, int]:
    """What the whole page depends on: the selected row, and how many were tried."""
    row = _chosen(rows)
    tried = sum(each["state"] in ("done", "failed") for each in rows)
    return ("" if row is None else str(row["label"]), tried)


def _table(view: View, rows: Sequence[Row], label: str, current: str) -> None:
    frame = tables.recipes(rows, current)
    if not len(frame):
        return
    labels = list(frame["label"])
    key = f"recipes-{view.pair.id}-{zlib.crc32(chr(0).join(labels).encode()):x}"
    wanted = [labels.index(label)] if label in labels else []

    def row_chosen() -> None:
        picked = st.session_state[key]["selection"]["rows"]
        if picked and picked != wanted:
            _select(labels[picked[0]])

    state: Any = st.session_state.get(key) or {}
    if list(state.get("selection", {}).get("rows", ())) != wanted:
        st.session_state[key] = {"selection": {"rows": wanted, "columns": [], "cells": []}}
    st.dataframe(
        tables.shown(frame),
        key=key,
        hide_index=True,
        column_config=tables.recipe_columns(),
        on_select=row_chosen,
        selection_mode="single-row",
        height=min(_TABLE_HEIGHT, 36 + 35 * len(frame)),
        placeholder="–",
    )


def take_along(view: View) -> None:
    """What gave no model and why, the table as a file, and the command of the best one."""
    table = session.workspace().recipes(view.pair.id)
    rows = table.get("rows", [])
    if not rows:
        return
    lost = tables.recipe_reasons(rows)
    if len(lost):
        number = int(lost["Count"].sum())
        with st.expander(f"{widgets.count(number, 'recipe')} without a model, and why"):
            st.dataframe(lost, hide_index=True, height="content")
    if not table.get("command"):
        return
    with st.container(horizontal=True, vertical_alignment="center", key="recipes-take"):
        st.download_button(
            "Table as JSON",
            data=lambda: dump_json({k: v for k, v in table.items() if k != "feeds_stamp"}),
            file_name=f"{widgets.file_name(view.pair.title)}-recipes.json",
            mime="application/json",
            on_click="ignore",
            icon=":material/download:",
            key="recipes-json",
        )
        st.caption("The best one from the command line:", width="content")
    st.code(str(table["command"]), language="bash", wrap_lines=True)
