"""Matches set by hand: say which tensor belongs to which, refuse a match, take it back.

What is set here is kept with the run; the worker compares the run anew, and a re-quantized run
takes it along.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import streamlit as st

from inspector.comparison import Pin, Unmatched
from inspector.render import shorten_name
from inspector.web import session, tables, tasks, widgets
from inspector.web.session import View, compared
from inspector.web.words import md_code, md_text

COMPARING = "Comparing with the matches set by hand"
# Names in a box; any other one can be typed.
MOST_CHOICES = 500
_SHOWN_PINS = 12


def _pin_of(view: View, name: str) -> Pin | None:
    return next((pin for pin in view.comparison.pins if pin.float_name == name), None)


def _apply(view: View, name: str, pin: Pin | None) -> None:
    """Compares the run anew with another pin for one tensor, or with none."""
    kept = [each for each in view.comparison.pins if each.float_name != name]
    session.dismiss_problem()
    session.select_tensor(name)  # the view stays on it, compared or not
    shown = shorten_name(name, 60)
    if pin is None:
        said = f"{shown} is left to the rules again"
    elif pin.quantized_name is None:
        said = f"{shown} is not compared any more"
    else:
        said = f"{shown} is compared with {shorten_name(pin.quantized_name, 60)}"
    session.say_when_rematched(said)
    session.submit(
        tasks.rematch,
        session.root(),
        run_id=view.run.id,
        pins=[*kept, *([pin] if pin is not None else [])],
        title=COMPARING,
        purpose="rematch",
    )


def _refuse(view: View, name: str) -> None:
    _apply(view, name, Pin(float_name=name, quantized_name=None))


def _busy() -> Any:
    return session.running("rematch") or session.running_title(COMPARING)


def button_label(view: View) -> str:
    """What the selected tensor is matched by, for the button that opens the choice."""
    record = view.record
    if record is None:
        return "Match"
    return f"Matched {tables.RULES.get(record.matched_by, md_text(record.matched_by))}"


def unmatched_of(view: View, name: str) -> Unmatched | None:
    """Why a tensor of the float model is not compared; None where it is, or is unknown."""
    return next(
        (u for u in view.comparison.unmatched if u.model == "float" and u.name == name), None
    )


def refused(view: View) -> list[str]:
    """The float tensors whose match was refused by hand."""
    return [pin.float_name for pin in view.comparison.pins if pin.quantized_name is None]


def choice(view: View, name: str, *, key: str) -> None:
    """Which tensor a float tensor is matched with and why, and what can be done about it."""
    record = next((r for r in compared(view.comparison) if r.name == name), None)
    pin = _pin_of(view, name)
    if record is not None:
        rule = tables.RULES.get(record.matched_by, record.matched_by)
        st.markdown(
            f"Matched **{md_text(rule)}** with {md_code(shorten_name(record.quantized_name, 70))}"
            + (f": {md_text(record.note)}" if record.note else "")
        )
    else:
        lost = unmatched_of(view, name)
        why = "refused by hand" if pin is not None and pin.quantized_name is None else ""
        reason = why or (lost.reason if lost is not None else "the float model has no such tensor")
        st.markdown(f"Not compared: {md_text(reason)}")
    busy = _busy()
    if busy is not None:
        widgets.job_card(busy.id, place=f"rematch-{key}")
        return
    if not session.may_edit():
        st.caption(session.edit_hint())
        return
    with st.container(horizontal=True, key=f"{key}-actions"):
        if pin is not None:
            st.button(
                "Undo",
                key=f"{key}-undo",
                icon=":material/undo:",
                on_click=_apply,
                args=(view, name, None),
                help="Leaves it to the rules again and compares the run anew.",
            )
        if record is not None:
            st.button(
                "Refuse this match",
                key=f"{key}-refuse",
                icon=":material/link_off:",
                on_click=_refuse,
                args=(view, name),
                help="The tensor is not compared any more; the run is compared anew.",
            )
    _other(view, name, record.quantized_name if record is not None else "", key)


def _other(view: View, name: str, partner: str, key: str) -> None:
    """The box with the other model's tensors of fitting shape, and the button."""
    answer = session.ask(
        ("tensors", view.run.id),
        tasks.list_tensors,
        session.root(),
        run_id=view.run.id,
        title="Reading the tensors' names",
    )
    if answer.job is not None:
        widgets.waiting(answer.job, height=92, key=key)
        return
    if answer.error is not None:
        widgets.error(answer.error)
        return
    fitting = candidates(name, answer.value["float"], answer.value["quantized"])
    fitting = [each for each in fitting if each != partner]
    told = {str(each["name"]): _told(each) for each in answer.value["quantized"]}
    own = next((_told(each) for each in answer.value["float"] if each["name"] == name), "")
    some = f"the nearest {MOST_CHOICES} of {len(fitting):,} by name; type any other"
    box, button = st.columns([4, 1], vertical_alignment="bottom", gap="small")
    chosen = box.selectbox(
        "Pin to another tensor of the quantized model",
        fitting[:MOST_CHOICES],
        index=None,
        placeholder="Choose or type a name" if fitting else "None has its shape; type a name",
        key=f"{key}-partner-{view.run.id}",
        format_func=lambda each: f"{shorten_name(each, 44)}{told.get(each, '')}",
        accept_new_options=True,
        help=f"This one{own}. Of fitting shape: {some if len(fitting) > MOST_CHOICES else 'all'}.",
    )
    button.button(
        "Pin",
        key=f"{key}-pin",
        type="primary",
        icon=":material/push_pin:",
        disabled=not chosen,
        on_click=_apply,
        args=(view, name, Pin(float_name=name, quantized_name=chosen or "")),
        help="Keeps this match with the run and compares the run anew.",
    )


def _told(tensor: Mapping[str, Any]) -> str:
    """A tensor's shape, and its type where it is known, to stand behind its name."""
    sizes = tensor["shape"]
    inner = "?" if sizes is None else " × ".join("?" if d is None else str(d) for d in sizes)
    return f" · {tensor.get('dtype') or ''} [{inner}]".replace("·  [", "· [")


def candidates(
    name: str, float_tensors: Sequence[Mapping[str, Any]], quantized: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Tensors a float tensor may be pinned to, those with the most alike names first.

    A shape fits where the axes may be in another order; what is not known fits everything.
    """
    own = next((each for each in float_tensors if each["name"] == name), None)
    if own is None:
        return []
    words = _words(name)
    fitting = [
        str(each["name"])
        for each in quantized
        if each["constant"] == own["constant"] and _fits(own["shape"], each["shape"])
    ]
    return sorted(fitting, key=lambda other: -_alike(words, _words(other)))


def _fits(a: Sequence[int | None] | None, b: Sequence[int | None] | None) -> bool:
    if a is None or b is None:
        return True
    if len(a) != len(b):
        return False
    if None in a or None in b:
        return True
    return sorted(map(int, (d for d in a if d is not None))) == sorted(
        int(d) for d in b if d is not None
    )


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+|[0-9]+", name.lower()))


def _alike(a: Collection[str], b: frozenset[str]) -> float:
    return len(b.intersection(a)) / max(len(b.union(a)), 1)


def pinned(view: View, *, key: str) -> None:
    """The matches set by hand, each with its Undo."""
    pins = view.comparison.pins
    if not pins:
        return
    st.markdown("**Matched by hand**")
    busy = _busy()
    if busy is not None:
        widgets.job_card(busy.id, place=f"pins-{key}")
    for at, pin in enumerate(pins[:_SHOWN_PINS]):
        with st.container(horizontal=True, vertical_alignment="center", key=f"{key}-pin-{at}"):
            other = (
                "refused"
                if pin.quantized_name is None
                else f"= {md_code(shorten_name(pin.quantized_name, 50))}"
            )
            st.markdown(
                f":blue[■] {md_code(shorten_name(pin.float_name, 50))} {other}", width="content"
            )
            st.button(
                "Undo",
                key=f"{key}-unpin-{at}",
                type="tertiary",
                icon=":material/undo:",
                disabled=busy is not None or not session.may_edit(),
                on_click=_apply,
                args=(view, pin.float_name, None),
            )
    if len(pins) > _SHOWN_PINS:
        st.caption(f"and {len(pins) - _SHOWN_PINS:,} more")


def not_compared(view: View, *, key: str) -> None:
    """What is not compared with the reason, and a way to match it by hand."""
    lost = [each for each in view.comparison.unmatched if not each.fused_into]
    fused = [each for each in view.comparison.unmatched if each.fused_into]
    if not (lost or fused):
        return
    parts = [f"{widgets.count(len(lost), 'tensor')} not compared"] if lost else []
    parts += [f"{len(fused):,} fused into others"] if fused else []
    with st.expander(f"{' · '.join(parts)}, with the reason", key=key, on_change="rerun") as opened:
        if not opened.open:
            return
        for title, items in (("Not compared", lost), ("Fused", fused)):
            if items:
                st.markdown(f"**{title}**")
                st.dataframe(tables.reasons(items), hide_index=True)
        names = list(dict.fromkeys(u.name for u in (*lost, *fused) if u.model == "float"))
        chosen = st.selectbox(
            "Match one of them by hand",
            names[: tables.MAX_ROWS],
            index=None,
            placeholder="Choose a float tensor",
            key=f"{key}-choice-{view.run.id}",
            format_func=lambda name: shorten_name(name, 80),
            accept_new_options=len(names) > tables.MAX_ROWS,
        )
        if chosen:
            choice(view, chosen, key=f"{key}-match")
