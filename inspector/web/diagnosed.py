"""What is wrong with the run that is shown, with the button that applies the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import streamlit as st

from inspector import store
from inspector.comparison import ActivationError, OutputError
from inspector.render import format_db, read_number, shorten_name
from inspector.web import session, tasks, widgets, words
from inspector.web.parts import REQUANTIZING
from inspector.web.session import View

# As high as the picture beside it, with the choice of pictures.
HEIGHT = 382
# Further ones are folded away.
_SHOWN = 3
_COLORS = {"problem": "red", "look": "orange", "note": "gray"}
_MARKS = {"problem": "●", "look": "▲", "note": "–"}


def panel(view: View, parts: OutputError | ActivationError | None, *, key: str) -> None:
    """The most important findings of the run; while they are looked for, how far that is.

    Args:
        view: what is shown.
        parts: a tensor whose parts are shown below them; None for none.
        key: of the element.
    """
    answer = _findings(view)
    with st.container(key=key, gap="xsmall", border=True, height=HEIGHT):
        if answer.job is not None:
            widgets.waiting(answer.job, height=HEIGHT - 60, key="findings")
            return
        if answer.error is not None:
            widgets.error(answer.error)
            return
        found = list(answer.value or ())
        shown = [each for each in found if each["severity"] != "note"][:_SHOWN]
        if not shown:
            st.markdown(":green[✓] **No rule finds a cause to put right.**")
        for place, each in enumerate(shown):
            _row(view, each, key=f"{key}-{place}")
        if parts is not None:
            widgets.parts_table(parts)
        rest = [each for each in found if each not in shown]
        if rest:
            with st.expander(widgets.count(len(rest), "more finding"), key=f"{key}-rest"):
                for place, each in enumerate(rest):
                    _row(view, each, key=f"{key}-rest-{place}")


def _findings(view: View) -> session.Answer:
    """From the store where they were found before, which costs no worker, else from a worker."""
    stamp = session.workspace().comparison_stamp(view.run.id)
    kept = session.workspace().detail(view.run.id, store.FINDINGS_KEY)
    if kept is not None and kept.get("stamp") == list(stamp):
        return session.Answer(value=kept["findings"])
    return session.ask(
        ("findings", view.run.id, stamp),
        tasks.diagnose_run,
        session.root(),
        run_id=view.run.id,
        title="Looking for causes",
        role="looking",
        patience=0.3,
    )


def _row(view: View, finding: Mapping[str, Any], *, key: str) -> None:
    severity, node = str(finding["severity"]), str(finding["node"])
    sign = f":{_COLORS[severity]}[{_MARKS[severity]}]"
    where = f" {words.md_code(shorten_name(node, 22))}" if node else ""
    gain = _measured(finding)
    with st.container(key=key, gap="xsmall"):
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall", wrap=False):
            st.markdown(f"{sign} **{words.md_text(str(finding['code']))}**{where}", width="stretch")
            _apply(view, finding, key=f"{key}-apply")
        st.caption(
            f"{words.md_text(str(finding['sentence']))} "
            f"**{words.md_text(str(finding['remedy'].get('say', '')))}**"
            + (f" {words.md_text(gain)}" if gain else "")
        )


def _measured(finding: Mapping[str, Any]) -> str:
    """What leaving the nodes in float gave, and what the recipe gave, as they were measured."""
    evidence = finding["evidence"]
    said = []
    if "output_gain_db" in evidence:
        nodes = len(finding["remedy"].get("exclude", ()))
        what = f"{widgets.count(nodes, 'node')} in float" if nodes else "the other range"
        said.append(f"Measured, {what}: {_ends(evidence, 'output')}.")
    if "recipe_gain_db" in evidence:
        said.append(f"Measured, re-quantized so: {_ends(evidence, 'recipe')}.")
    elif "recipe_not_measured" in evidence:
        said.append(f"Not measured: {evidence['recipe_not_measured']}.")
    return " ".join(said)


def _ends(evidence: Mapping[str, Any], what: str) -> str:
    ends = (read_number(evidence[f"{what}_{end}_db"]) for end in ("before", "after"))
    return " → ".join(map(format_db, ends))


def _recipe_is_better(finding: Mapping[str, Any]) -> bool:
    """Its recipe gains more than what else its remedy changes, or there is nothing else."""
    remedy, evidence = finding["remedy"], finding["evidence"]
    if not remedy.get("recipe"):
        return False
    if not remedy.get("exclude") and not remedy.get("overrides"):
        return True
    gains = (read_number(evidence.get(f"{what}_gain_db", "NaN")) for what in ("recipe", "output"))
    recipe, other = (-math.inf if math.isnan(gain) else gain for gain in gains)
    return recipe > other


def _requantize(view: View, changes: Mapping[str, Any]) -> None:
    session.dismiss_problem()
    session.submit(
        tasks.requantize,
        session.root(),
        run_id=view.run.id,
        config={**view.run.recipe, **changes},
        exclude=list(view.run.exclusions),
        title=REQUANTIZING,
        purpose="requantize",
    )


def _apply(view: View, finding: Mapping[str, Any], *, key: str) -> None:
    """Ticks what the remedy leaves in float and keeps its ranges, or takes both back.

    Where its recipe gains more, it makes a run of that.
    """
    if _recipe_is_better(finding):
        st.button(
            "Re-quantize so",
            key=key,
            disabled=bool(session.running("requantize") or session.running_title(REQUANTIZING))
            or not session.may_edit(),
            on_click=_requantize,
            args=(view, dict(finding["remedy"]["recipe"])),
            help=session.edit_hint(
                "Quantizes with this change of the recipe, the same nodes in float, and opens the "
                "new run."
            ),
        )
        return
    nodes = tuple(map(str, finding["remedy"].get("exclude", ())))
    grids = [dict(each) for each in finding["remedy"].get("overrides", ())]
    if not nodes and not grids:
        return
    draft = session.draft(view.pair.id, view.run.exclusions)
    kept = [str(each.get("tensor")) for each in session.overrides(view)]
    applied = set(nodes) <= set(draft.nodes) and all(str(g["tensor"]) in kept for g in grids)

    def act() -> None:
        if nodes:
            rest = tuple(n for n in draft.nodes if n not in nodes)
            ticked = tuple(dict.fromkeys((*draft.nodes, *nodes)))
            session.tick(view.pair.id, draft, rest if applied else ticked)
        for grid in grids:
            session.set_override(view, str(grid["tensor"]), None if applied else grid)

    st.button(
        "Undo" if applied else "Leave in float" if nodes else "Set range",
        key=key,
        disabled=not session.may_edit(),
        on_click=act,
        help=session.edit_hint(
            "Takes it back"
            if applied
            else "Ticks the nodes, or keeps the range, for the next run: the exclusions page "
            "previews it and makes the file."
        ),
    )
