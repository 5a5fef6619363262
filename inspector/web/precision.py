"""The choice of 8 bits, 16 bits or float for what a node computes.

Apart from `parts`, because several pages offer it. Float is a tick of the node; 16 bits are an
entry of the recipe's overrides for the tensor whose range decides: a folded Relu's output, or the
input of what only hands on. Which tensor that is, the preview knows, so that a choice waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import streamlit as st

from inspector.recipe import WIDER_TYPES, TensorOverride, with_type
from inspector.render import shorten_name
from inspector.web import facts, parts, session, widgets, words
from inspector.web.session import Draft, View

FLOAT = "float"
_WANTED = "precision-wanted"


def _types(view: View) -> tuple[str, str] | None:
    """The recipe's activation type and its wider one; None where a list takes no types."""
    recipe = parts.usual_recipe(view)
    if recipe is None or recipe.get("format") != "qdq":
        return None
    own = str(recipe.get("activation_type"))
    return (own, WIDER_TYPES[own]) if own in WIDER_TYPES else None


def _carriers(view: View, draft: Draft) -> session.Answer:
    """The preview of what is chosen so far, which knows the tensors that decide."""
    return session.list_preview(view, parts.usual_recipe(view), draft.nodes)


def _deciding_of(answer: session.Answer) -> Mapping[str, str]:
    found: Mapping[str, str] = (answer.value or {}).get("carriers", {})
    return found


def _deciding(answer: session.Answer, tensors: Sequence[str]) -> list[str]:
    known = _deciding_of(answer)
    return list(dict.fromkeys(known.get(each, each) for each in tensors))


def _is_wanted(view: View) -> bool:
    """Whether something was chosen for this run that is not carried out yet."""
    wanted = st.session_state.get(_WANTED)
    return wanted is not None and bool(wanted[0] == view.run.id)


def _settle(view: View, draft: Draft) -> session.Answer | None:
    """Carries out what was chosen; while the preview is not there yet, its answer."""
    if not _is_wanted(view):
        return None
    answer = _carriers(view, draft)
    if answer.waiting:
        return answer
    _, tensors, quant_type = st.session_state.pop(_WANTED)
    by_tensor = {str(each["tensor"]): each for each in session.overrides(view)}
    for tensor in _deciding(answer, tensors):
        known = by_tensor.get(tensor)
        before = None if known is None else TensorOverride.from_json(known)
        after = with_type(before, tensor, quant_type)
        session.set_override(view, tensor, None if after is None else after.to_json())
    return None


def _choose(view: View, draft: Draft, node: str, tensors: tuple[str, ...], key: str) -> None:
    own, wider = _types(view) or ("", "")
    chosen = st.session_state.get(key, own)
    if (chosen == FLOAT) != (node in draft.nodes):
        session.toggle(view.pair.id, draft, node)
    if tensors:
        st.session_state[_WANTED] = (view.run.id, tensors, wider if chosen == wider else "")
        _settle(view, session.draft(view.pair.id, view.run.exclusions))


def _chosen(view: View, draft: Draft, node: str, tensors: Sequence[str], wider: str) -> str:
    """What is chosen for a node: one of its options; "" for the recipe's own type."""
    if node in draft.nodes:
        return FLOAT
    entries = session.overrides(view)
    if entries == [dict(each) for each in view.run.recipe.get("overrides", ())]:
        dtypes = {a.dtype for a in view.comparison.activations if a.name in tensors}
        if dtypes == {wider}:
            return wider
    wide = {str(each["tensor"]) for each in entries if each.get("quant_type") == wider}
    # Only where something is set is the preview, which knows more, there or under way anyway.
    deciding = _deciding(_carriers(view, draft), tensors) if wide else list(tensors)
    return wider if deciding and wide.issuperset(deciding) else ""


def choice(view: View, draft: Draft, node: str, tensors: Sequence[str], *, key: str) -> None:
    """The control for what a node computes; nothing where there is no choice.

    Args:
        view: what is shown.
        draft: what is ticked.
        node: of the float model; "" for a graph input.
        tensors: what it computes, by their names in the float model.
        key: of the element.
    """
    types = _types(view)
    stored = {a.name for a in view.comparison.activations if a.scale is not None}
    stored |= {u.name for u in view.comparison.unmatched if u.fused_into in stored}
    if types is None or not tensors or not (stored.intersection(tensors) or node in draft.nodes):
        return
    own, wider = types
    if _is_wanted(view):
        waiting = _settle(view, draft)
        if waiting is None:
            session.run_again()
        elif waiting.job is not None:
            widgets.poll(waiting.job)
    now = _chosen(view, draft, node, tensors, wider) or own
    # Another key where the choice changes elsewhere: the control starts from what holds.
    place = f"{key}-{view.run.id}-{tensors[0]}-{now}"
    st.segmented_control(
        "Precision of what it computes",
        [own, wider, *([FLOAT] if node else [])],
        default=now,
        key=place,
        required=True,
        label_visibility="collapsed",
        disabled=not session.may_edit(),
        on_change=_choose,
        args=(view, draft, node, tuple(tensors), place),
        help=f"{own}: as the recipe has it. {wider}: 65,536 levels for this tensor, for all that "
        "read it; the file stays as small, and ONNX Runtime's CPU kernels compute the nodes "
        "around it in float. float: the node is left in float.",
    )
    if now == wider:
        _caption(view, draft, tensors)


def _caption(view: View, draft: Draft, tensors: Sequence[str]) -> None:
    """Which tensors the choice of 16 bits is for."""
    answer = _carriers(view, draft)
    own = _deciding(answer, tensors)
    alike = [t for t, other in _deciding_of(answer).items() if other in own]
    retyped = {name for name, _ in (answer.value or {}).get("retyped", ())}
    names = [*own, *(t for t in alike if t in retyped)]
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    shown = ", ".join(words.md_code(shorten_name(name, 30)) for name in names[:2])
    st.caption(f"At 16 bits: {shown}{more}")


def wide_nodes(view: View, draft: Draft) -> parts.WideNodes | None:
    """The nodes whose tensors are at 16 bits in the next run; None where a list takes no types."""
    types = _types(view)
    if types is None:
        return None
    waiting = _settle(view, draft)
    if waiting is not None and waiting.job is not None:
        widgets.poll(waiting.job)
    outputs: dict[str, list[str]] = {}
    for each in view.comparison.activations:
        outputs.setdefault(each.node, []).append(each.name)
    for listed in parts.listed_nodes(view):
        outputs.setdefault(str(listed["name"]), list(listed["outputs"]))
    wide = {str(e["tensor"]) for e in session.overrides(view) if e.get("quant_type") == types[1]}
    known = _deciding_of(_carriers(view, draft)) if wide else {}

    def choose(node: str, on: bool) -> None:
        st.session_state[_WANTED] = (
            view.run.id, tuple(outputs.get(node, ())), types[1] if on else "",
        )  # fmt: skip
        _settle(view, draft)

    return parts.WideNodes(
        dtype=types[1],
        names=tuple(
            node
            for node, tensors in outputs.items()
            if node and tensors and wide.issuperset(known.get(t, t) for t in tensors)
        ),
        choose=choose,
    )


def told(view: View, draft: Draft) -> None:
    """What is chosen would give, where the run was not made so."""
    recipe = parts.usual_recipe(view)
    if set(draft.nodes) == set(view.run.exclusions) and not parts.differs(view, recipe):
        return
    answer = session.list_preview(view, recipe, draft.nodes)
    if answer.job is not None:
        st.caption(f"{words.md_text(answer.job.title)} …")
        widgets.poll(answer.job)
    elif answer.error is not None:
        st.caption(f"No preview: {words.md_text(answer.error.message)}")
    elif answer.value["reason"]:
        st.caption(f"No preview: {words.md_text(answer.value['reason'])}.")
    else:
        overrides = parts.own_overrides(recipe)
        said = facts.preview_sentence(view, answer.value, None, draft.nodes, overrides=overrides)
        st.caption(f"**{words.md_text(said)}**")
