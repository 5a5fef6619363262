"""The longer blocks of the models and the exclusions page."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pandas as pd
import streamlit as st

from inspector import figures
from inspector.groups import block_of, nodes_after
from inspector.render import (
    dump_json,
    find_headline,
    format_bytes,
    format_count,
    format_db,
    format_number,
    read_number,
    shorten_name,
)
from inspector.store import RunRecord, StoredModel, made_by_surgery
from inspector.web import (
    facts,
    forms,
    lists,
    session,
    sharing,
    style,
    tables,
    tasks,
    upload_field,
    widgets,
    words,
)
from inspector.web.forms import Chosen
from inspector.web.session import Draft, View

REQUANTIZING = "Re-quantizing"

# ── models ───────────────────────────────────────────────────────────────────────────────────


def _shape(info: Mapping[str, Any]) -> str:
    sizes = info.get("shape")
    inner = "?" if sizes is None else " × ".join("?" if d is None else str(d) for d in sizes)
    return f"{shorten_name(str(info['name']), 30)}: {info['dtype']} [{inner}]"


def _model_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    ops = list(found["op_types"].items())
    known = [f"{key or 'ai.onnx'} {value}" for key, value in found["opsets"].items()]
    opsets = ", ".join(known[:2]) + (f" and {len(known) - 2} more" if len(known) > 2 else "")
    return [
        ("Size", format_bytes(found["size_bytes"])),
        ("Opset", opsets),
        ("Producer", str(found["producer"] or "–")),
        ("Format", str(found["quant_format"])),
        (
            "Nodes quantized",
            format_count(found["quantized_nodes"], found["nodes"]),
        ),
        ("Weights quantized", format_count(found["quantized_weights"], found["weights"])),
        ("Top ops", ", ".join(f"{op} {number:,}" for op, number in ops[:5])),
        ("Inputs", "; ".join(map(_shape, found["inputs"][:4]))),
        ("Outputs", "; ".join(map(_shape, found["outputs"][:4]))),
    ]


def _model_card(label: str, color: str, stored: StoredModel | None, *, key: str) -> None:
    with st.container(border=True, height="stretch", key=f"card-{key}", gap="xsmall"):
        if stored is None:
            st.markdown(f":{color}[**{label}**]")
            st.markdown("No file: the float model was quantized with the defaults (run 1).")
            return
        st.markdown(f":{color}[**{label}**] {words.md_code(shorten_name(stored.name, 44))}")
        answer = session.ask(
            ("describe", stored.sha256, stored.name),
            tasks.describe_model,
            stored.path,
            title=f"Reading {stored.name}",
        )
        if answer.job is not None:
            widgets.waiting(answer.job, height=290, key=key)
        elif answer.error is not None:
            widgets.error(answer.error)
        else:
            st.table(
                widgets.as_markdown(
                    pd.DataFrame(_model_rows(answer.value), columns=["", " "]).set_index("")
                ),
                border="horizontal",
                hide_header=True,
            )
            for each in answer.value.get("warnings", ()):
                st.caption(words.md_text(each))


def pair(view: View) -> None:
    """Both sides of the pair that is shown, and its feeds."""
    samples, meaning = widgets.samples_label(view.comparison)
    quantized = view.run.model
    widgets.sentence(
        f"{shorten_name(view.pair.float_model.name)} "
        f"({format_bytes(view.pair.float_model.size_bytes)}) against "
        f"{shorten_name(quantized.name)} ({format_bytes(quantized.size_bytes)})"
    )
    left, right = st.columns(2, gap="small")
    with left:
        _model_card("Float", "gray", view.pair.float_model, key="float")
    with right:
        _model_card("Quantized", "orange", quantized, key="quantized")
    feeds = view.pair.inputs
    own = view.pair.calibration
    few = view.comparison.samples < 8
    calibration = "all of them, as they are fewer than 8" if few else "the first half of them"
    if own is not None:
        calibration = own.title or own.path
    with st.container(horizontal=True, vertical_alignment="center", key="pair-row"):
        st.markdown(
            f"**Feeds** {words.md_code(feeds.title or feeds.path)} · {words.md_text(samples)} · "
            f"re-quantizing calibrates on {words.md_text(calibration)}",
            help=meaning or None,
            width="content",
        )
        st.space("stretch")
        sharing.delete_pair_button(view.pair)


def preview(chosen: Chosen | None) -> bool:
    """Shows the first feed as the model gets it; False where it cannot be read."""
    if chosen is None or chosen.float_path is None or chosen.inputs is None:
        return True
    inputs = chosen.inputs
    version = upload_field.version(chosen.float_path, Path(inputs.path))
    answer = session.ask(
        ("preview", str(chosen.float_path), dump_json(inputs.to_json()), version),
        tasks.preview_feed,
        float_path=chosen.float_path,
        inputs=inputs,
        title="Reading the first feed",
    )
    own = inputs.kind != "random" and (Path(inputs.path) / "preprocess.json").is_file()
    pictures = inputs.preprocess is not None or own
    with st.container(border=True, height=250 if pictures else 110, key="preview"):
        if answer.job is not None:
            widgets.waiting(answer.job, height=200 if pictures else 70, key="preview")
            return True
        if answer.error is not None:
            widgets.error(answer.error)
            return False
        found = answer.value
        right = st.container()
        if found["picture_png"]:
            left, right = st.columns([1, 3], gap="medium")
            left.image(
                base64.b64decode(found["picture_png"]), caption="As the model gets it", width=190
            )
        with right:
            st.markdown(f"**{words.md_text(str(found['description']))}**")
            for each in found["ranges"]:
                low, high = (
                    None if each[end] is None else read_number(each[end]) for end in ("low", "high")
                )
                shape = " × ".join(map(str, each["shape"]))
                st.markdown(
                    f"{words.md_code(each['input'])} {each['dtype']} [{shape}], "
                    f"{format_number(low)} … {format_number(high)}"
                )
            for note in found["notes"]:
                st.caption(words.md_text(note))
    return True


@session.reporting
def _open_pair(pair_id: str) -> None:
    session.own_workspace().set_current_pair(pair_id)
    st.query_params.clear()


def samples_and_pairs(view: View | None) -> None:
    """The bundled samples, and what was loaded before."""
    st.markdown("**Samples**")
    with st.container(horizontal=True, key="samples"):
        for name, label in tasks.SAMPLES.items():
            st.button(
                label,
                key=f"sample-{name}",
                on_click=widgets.open_sample,
                args=(name,),
                disabled=session.running("load") is not None,
                icon=":material/science:",
            )
    others = [
        each for each in session.own_workspace().pairs() if view is None or each.id != view.pair.id
    ][:8]
    if others:
        st.markdown("**Loaded before**")
        with st.container(horizontal=True, key="pairs"):
            for each in others:
                st.button(
                    f"{words.md_text(shorten_name(each.title, 32))} · "
                    f"{each.created[:16].replace('T', ' ')}",
                    key=f"pair-{each.id}",
                    type="tertiary",
                    icon=":material/history:",
                    on_click=_open_pair,
                    args=(each.id,),
                )
    sharing.shared_with_me()


# ── exclusions: the list of nodes ────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True, slots=True)
class WideNodes:
    """Nodes whose tensors are put on a wider grid, beside those that are left in float.

    Attributes:
        dtype: the wider type.
        names: the nodes that are chosen.
        choose: chooses a node, or takes it back.
    """

    dtype: str
    names: tuple[str, ...]
    choose: Callable[[str, bool], None]


def _shown(
    base: Sequence[str], frame: pd.DataFrame, edits: Mapping[int, Any], column: str = "float"
) -> list[str]:
    """The nodes that are ticked in a column: those at the start with the edits since."""
    ticked = list(base)
    for row, change in edits.items():
        node = str(frame["name"].iloc[int(row)])
        if change.get(column, node in ticked) and node not in ticked:
            ticked.append(node)
        elif not change.get(column, True) and node in ticked:
            ticked.remove(node)
    return ticked


def listed_nodes(view: View) -> list[Mapping[str, Any]]:
    """Every node that can be left in float, as `workbench.list_nodes` has them; [] until known."""
    known = session.ask(
        ("nodes", view.pair.id),
        tasks.list_nodes,
        session.root(),
        run_id=view.run.id,
        title="Reading the nodes",
        patience=0.3,
    )
    return known.value or []


def node_editor(view: View, draft: Draft, *, height: int, wide: WideNodes | None = None) -> None:
    """Every node with a checkbox, two where a wider type can be had; ticks are kept at once."""
    comparison = view.comparison
    with st.container(
        horizontal=True, vertical_alignment="center", key="node-filters", gap="xsmall"
    ):
        lists.view_field()
        text = widgets.find_field()
        op_type = widgets.op_field(tables.op_types(comparison))
        more = st.container(width="content", key="more-slot")
        st.space("stretch")
        undo_button(view, draft)
        st.button(
            ":material/redo:",
            key="redo",
            shortcut="Shift+z",
            help="Redo",
            disabled=not (draft.redo and session.may_edit()),
            on_click=session.redo,
            args=(view.pair.id, draft),
        )
    listed = listed_nodes(view)
    at_wide = () if wide is None else wide.names
    with more:
        _more_like_this(view, draft, listed)
    # The editor keeps its own edits for as long as its rows stay the same. Whatever changes the
    # ticks elsewhere (undo, a key on another page) starts it afresh from the new ticks.
    filters = zlib.crc32(f"{text}\0{op_type}\0{len(listed)}".encode())
    place = f"nodes-{view.run.id}-{filters:x}"
    state: dict[str, Any] = st.session_state.setdefault("editor", {})
    if state.get("place") != place:
        state.update(place=place, epoch=state.get("epoch", 0) + 1, base=draft.nodes, wide=at_wide)
    key = f"{place}-{state['epoch']}"

    def rows(base: Sequence[str], base_wide: Sequence[str]) -> pd.DataFrame:
        found = tables.nodes(
            comparison, base, listed, selected=view.node, text=text, op_type=op_type
        )
        # Addresses beside this page's own, so that they hold under any base path.
        links = [f"graph?{urlencode({'run': view.run.id, 'node': n})}" for n in found["name"]]
        found.insert(list(found.columns).index("node") + 1, "graph", links)
        if wide is not None:
            found.insert(1, "wide", [name in base_wide for name in found["name"]])
        return found

    frame = rows(state["base"], state["wide"])
    edits = (st.session_state.get(key) or {}).get("edited_rows", {})
    if set(_shown(state["base"], frame, edits)) != set(draft.nodes) or set(
        _shown(state["wide"], frame, edits, "wide")
    ) != set(at_wide):
        state.update(epoch=state["epoch"] + 1, base=draft.nodes, wide=at_wide)
        key = f"{place}-{state['epoch']}"
        frame = rows(state["base"], state["wide"])

    def edited() -> None:
        changes = st.session_state[key]["edited_rows"]
        session.tick(view.pair.id, draft, tuple(_shown(state["base"], frame, changes)))
        if wide is not None:
            chosen = _shown(state["wide"], frame, changes, "wide")
            for name in set(chosen) ^ set(at_wide):
                wide.choose(name, name in chosen)

    widgets.limited(frame, view, key="nodes")
    st.data_editor(
        tables.shown(frame),
        key=key,
        hide_index=True,
        column_config=tables.node_columns("" if wide is None else wide.dtype),
        disabled=not session.may_edit()
        or [column for column in frame.columns if column not in ("float", "wide")],
        on_change=edited,
        height=height,
        placeholder="–",
    )


def _more_like_this(view: View, draft: Draft, listed: Sequence[Mapping[str, Any]]) -> None:
    """Ticks many nodes at once, from the last ticked one: its op type, its block, what follows."""
    last = draft.nodes[-1] if draft.nodes else ""
    op_of = tables.op_of_nodes(view.comparison)
    op_of = {str(each["name"]): str(each["op_type"]) for each in listed} or op_of
    op = op_of.get(last, "")
    offers = [
        (
            f"All {words.md_text(shorten_name(op, 24))}",
            [n for n, each in op_of.items() if each == op],
        )
        if op
        else ("All of its op type", []),
        ("Its block", block_of(last, op_of)),
        ("Everything after it", nodes_after(last, listed) if last else ()),
    ]
    with st.popover("Tick more", key="tick-more", disabled=not op):
        st.caption(f"From {words.md_code(shorten_name(last, 40))}, ticked last")
        tick_buttons(view, draft, offers, key="tick-more")


def tick_buttons(
    view: View, draft: Draft, offers: Iterable[tuple[str, Sequence[str]]], *, key: str
) -> None:
    """A button for each (label, nodes) that ticks those of them that are not ticked."""
    for place, (label, names) in enumerate(offers):
        further = [n for n in names if n not in draft.nodes]
        st.button(
            f"{label} ({len(names)})",
            key=f"{key}-{place}",
            disabled=not (further and session.may_edit()),
            on_click=session.tick,
            args=(view.pair.id, draft, (*draft.nodes, *further)),
            width="stretch",
        )


def undo_button(view: View, draft: Draft) -> None:
    """Takes the last tick back, with `z`."""
    st.button(
        ":material/undo:",
        key="undo",
        shortcut="z",
        help="Undo the last tick",
        disabled=not (draft.undo and session.may_edit()),
        on_click=session.undo,
        args=(view.pair.id, draft),
    )


# ── exclusions: the recipe and the job ───────────────────────────────────────────────────────


def gain(view: View, draft: Draft, recipe: Mapping[str, Any] | None) -> None:
    """What the run's list gained; what the ticked one would give, where that is another.

    Args:
        view: what is shown.
        draft: what is ticked.
        recipe: to re-quantize with; None for surgery on the loaded file.
    """
    output = find_headline(view.comparison)
    changed = set(draft.nodes) != set(view.run.exclusions) or differs(view, recipe)
    answer = session.list_preview(view, recipe, draft.nodes)
    if not changed or answer.error is not None or not _shows(answer):
        text = facts.change_sentence(
            view,
            output.output,
            draft.nodes,
            overrides=None if recipe is None else own_overrides(recipe),
        )
        if changed and answer.job is not None:
            text += f" ({answer.job.title.lower()} …)"
        widgets.sentence(text, output.severity)
        widgets.tiles(facts.change_tiles(view, output.output))
        if changed and answer.job is not None:
            widgets.poll(answer.job)
        elif changed and answer.error is not None:
            widgets.error(answer.error)
        elif changed and answer.value is not None and answer.value["reason"]:
            st.caption(f"No preview: {words.md_text(answer.value['reason'])}.")
        return
    with st.container(key="preview"):
        text = facts.preview_sentence(
            view, answer.value, output.output, draft.nodes, overrides=own_overrides(recipe)
        )
        widgets.sentence(text, facts.preview_severity(view, answer.value, output.output))
        widgets.tiles(facts.preview_tiles(view, answer.value, output.output))
        for name, reason in answer.value["refused"][:3]:
            st.caption(f"{words.md_code(shorten_name(name, 40))} stays: {words.md_text(reason)}")
        for name in answer.value["unheeded"][:3]:
            st.caption(
                f"{words.md_code(shorten_name(name, 40))} keeps its type: it stays in float, or "
                "has the scale of another tensor"
            )


def own_overrides(recipe: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    """The overrides of a recipe as it is shown; () for surgery."""
    return () if recipe is None else tuple(recipe.get("overrides", ()))


def differs(view: View, recipe: Mapping[str, Any] | None) -> bool:
    """Whether the shown run's file was made in another way."""
    if recipe is None:
        return view.run.number > 0 and not made_by_surgery(view.run)
    if made_by_surgery(view.run):
        return True
    start = {"overrides": [], "equalize": False, **view.run.recipe}
    return any(each != start.get(name) for name, each in recipe.items())


def _shows(answer: session.Answer) -> bool:
    return answer.value is not None and not answer.value["reason"]


def _expected(view: View, draft: Draft, recipe: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the preview of this very list says, to be kept with the run."""
    answer = session.list_preview(view, recipe, draft.nodes)
    if not _shows(answer):
        return None
    return {each["name"]: each["sqnr_db"] for each in answer.value["outputs"]}


def _overrides(view: View) -> list[dict[str, Any]]:
    """The grids set by hand, each with a button that takes it back."""
    found = session.overrides(view)
    for place, entry in enumerate(found):
        tensor = str(entry.get("tensor", ""))
        text, back = st.columns([4, 1], vertical_alignment="center")
        what = str(entry["quant_type"]) if facts.typed(entry) else "Grid set by hand"
        text.caption(f"{what}: {words.md_code(shorten_name(tensor, 34))}")
        back.button(
            ":material/close:",
            key=f"override-{place}",
            disabled=not session.may_edit(),
            help=session.edit_hint("Take it back"),
            on_click=session.set_override,
            args=(view, tensor, None),
        )
    return found


_WAYS = {"recipe": "Re-quantize", "surgery": "Free in the file"}


def _surgery_fits(view: View) -> bool:
    """Whether the list is best applied by surgery on the loaded file."""
    loaded = next((run for run in view.runs if run.number == 0), None)
    return loaded is not None and (
        made_by_surgery(view.run)
        or (view.run.number == 0 and bool(loaded.summary.get("surgery_fits")))
    )


def usual_recipe(view: View) -> dict[str, Any] | None:
    """How a list is applied to this run unless another way is chosen; None for surgery."""
    if _surgery_fits(view):
        return None
    return {**view.run.recipe, "overrides": session.overrides(view)}


def _way(view: View) -> str:
    """How the list is applied: with a recipe, or by surgery on the loaded file."""
    if all(run.number != 0 for run in view.runs):
        return "recipe"
    fits = _surgery_fits(view)
    way = st.segmented_control(
        "Apply the list by",
        list(_WAYS),
        default="surgery" if fits else "recipe",
        format_func=_WAYS.__getitem__,
        key=f"way-{view.run.id}",
        required=True,
        label_visibility="collapsed",
        help="Free in the file: the loaded file keeps every other scale, whatever tool made it. "
        "Re-quantize: ONNX Runtime's quantizer makes the file anew.",
    )
    return str(way)


def requantize_panel(view: View, draft: Draft, *, height: int) -> dict[str, Any] | None:
    """What will be left in float, how, and the button that does it.

    Returns:
        The recipe to re-quantize with; None for surgery on the loaded file.
    """
    recipe: dict[str, Any] | None = None
    with st.container(border=True, height=height, key="requantize-panel", gap="small"):
        number = len(draft.nodes)
        changed = set(draft.nodes) != set(view.run.exclusions)
        set_by_hand = [] if _surgery_fits(view) else session.overrides(view)
        unapplied = changed or set_by_hand != list(view.run.recipe.get("overrides", ()))
        st.markdown(
            f"**{widgets.count(number, 'node')} to leave in float**"
            + (f", **{facts.set_by_hand(set_by_hand)}**" if set_by_hand else "")
            + (" · not applied yet" if unapplied else "")
        )
        with st.container(height=86, border=False, gap=None, key="ticked"):
            if not number and not set_by_hand:
                st.caption("Tick nodes on the left; start with the worst.")
            for name in draft.nodes:
                st.markdown(f":violet[■] {words.md_code(shorten_name(name, 46))}")
            for each in set_by_hand:
                what = each["quant_type"] if facts.typed(each) else "grid"
                tensor = words.md_code(shorten_name(str(each["tensor"]), 40))
                st.markdown(f":orange[■] {tensor} {what}")
        way = _way(view)
        if way == "surgery":
            st.caption("Their Q/DQ pairs go, their float weights come back, every other scale "
                       "stays as the loaded file has it.")  # fmt: skip
        else:
            recipe = _recipe(view)
        other = differs(view, recipe)
        busy = session.running("requantize") or session.running_title(REQUANTIZING)
        idle = not changed and not other and (view.run.number > 0 or recipe is None)
        with st.container(height=92, border=False, key="requantize-slot"):
            if busy is not None:
                widgets.job_card(busy.id, place="requantize")
            elif st.button(
                _WAYS[way],
                type="primary",
                key="requantize",
                icon=":material/play_arrow:",
                width="stretch",
                disabled=idle or not session.may_edit(),
                help=session.edit_hint(
                    "This run was made so, with these nodes: change one of them."
                    if idle
                    else "Makes the file with these nodes in float, and compares it."
                ),
            ):
                session.dismiss_problem()
                _apply(view, draft, recipe)
                st.rerun()
    return recipe


def _recipe(view: View) -> dict[str, Any]:
    with st.popover(
        f"Recipe: {words.md_text(forms.recipe_summary(view.run.recipe))}",
        width="stretch",
        key="recipe",
    ):
        recipe = forms.recipe_form(
            view.run.recipe, tables.op_types(view.comparison), key=f"recipe-{view.run.id}"
        )
        recipe["overrides"] = _overrides(view)
    start = {"overrides": [], "equalize": False, **view.run.recipe}
    differs = [name for name, each in recipe.items() if each != start.get(name)]
    st.caption(
        f"Changed: {', '.join(name.replace('_', ' ') for name in differs)}"
        if differs
        else "The recipe is the one read back from this run."
    )
    return recipe


def _apply(view: View, draft: Draft, recipe: dict[str, Any] | None) -> None:
    arguments: dict[str, Any] = {
        "run_id": view.run.id,
        "exclude": list(draft.nodes),
        "preview": _expected(view, draft, recipe),
        "title": REQUANTIZING,
        "purpose": "requantize",
    }
    if recipe is None:
        session.submit(tasks.free_in_file, session.root(), **arguments)
    else:
        session.submit(tasks.requantize, session.root(), config=recipe, **arguments)


# ── exclusions: what came of it ──────────────────────────────────────────────────────────────


def change(view: View) -> None:
    """The picture and the table of what changed per tensor."""
    if view.before is None or view.baseline is None:
        st.caption("There is no earlier run of this recipe to compare with.")
        return
    before, after, dark = view.before, view.comparison, style.is_dark()
    widgets.picture(
        figures.before_after(before, after, dark),
        key="change",
        name=f"{view.pair.title}-run{view.baseline.number}-run{view.run.number}",
        alt="SQNR of every tensor before and after",
        whole=lambda: figures.before_after(before, after, dark, most=None),
    )
    changed = tables.deltas(view.before, view.comparison)
    if not len(changed):
        st.caption("No tensor changed by 0.1 dB or more.")
        return
    widgets.tensor_table(
        changed,
        view,
        key="deltas",
        columns=tables.delta_columns(),
    )


_EFFECT = {
    "float now": ":green[✓] float now",
    "still fed by Q/DQ": ":orange[▲] still fed by Q/DQ",
    "weight still quantized": ":orange[▲] weight still quantized",
    "no such node": ":red[●] no such node",
    "nothing changed": ":red[●] nothing changed",
    "keeps its type": ":red[●] keeps its type",
    "int16 now": ":green[✓] int16 now",
    "uint16 now": ":green[✓] uint16 now",
}


def _ask_to_free(node: str) -> None:
    st.session_state["freeing"] = node


def effects(view: View, draft: Draft) -> None:
    """What each exclusion really changed, and what would make a node really float."""
    if not view.run.effects:
        st.caption(
            "No node of this run is left in float, and no tensor has a type of its own."
            if not view.run.exclusions
            else "What the exclusions of this run changed is not recorded."
        )
        return
    for place, effect in enumerate(view.run.effects):
        name = str(effect.get("name", ""))
        status = str(effect.get("status", ""))
        sign, node, why, free = st.columns([1.3, 2, 4, 1], gap="small", vertical_alignment="center")
        sign.markdown(_EFFECT.get(status, words.md_text(status)))
        node.markdown(
            f"{words.md_code(shorten_name(name, 36))} "
            f"{words.md_text(str(effect.get('op_type', '')))}",
            help=words.md_code(name),
        )
        why.caption(words.md_text("; ".join(map(str, effect.get("details", ())))))
        if status in ("still fed by Q/DQ", "weight still quantized", "nothing changed"):
            free.button(
                "Free it fully",
                key=f"free-{place}",
                on_click=_ask_to_free,
                args=(name,),
                help="Finds the smallest set of further nodes that makes its inputs, weight "
                "and output really float. Nothing is applied yet.",
            )
        if st.session_state.get("freeing") == name:
            _proposal(view, draft)


def _proposal(view: View, draft: Draft) -> None:
    node = st.session_state.get("freeing")
    if not node or node not in {str(each.get("name", "")) for each in view.run.effects}:
        return
    answer = session.ask(
        ("free", view.run.id, node),
        tasks.propose_free,
        session.root(),
        run_id=view.run.id,
        node=node,
        title="Finding what feeds it",
    )
    with st.container(border=True, key="proposal"):
        if answer.job is not None:
            widgets.waiting(answer.job, height=100, key="free")
        elif answer.error is not None:
            widgets.error(answer.error)
        elif not answer.value:
            st.markdown(f"{words.md_code(node)} needs no further node to be really float.")
        else:
            further = [each for each in answer.value if each not in draft.nodes]
            st.markdown(
                f"To make {words.md_code(node)} really float, "
                f"{widgets.count(len(answer.value), 'further node')} must stay in float: "
                + ", ".join(words.md_code(each) for each in answer.value)
            )
            st.button(
                f"Tick {widgets.count(len(further), 'node')}" if further else "Already ticked",
                key="free-apply",
                disabled=not (further and session.may_edit()),
                on_click=session.tick,
                args=(view.pair.id, draft, (*draft.nodes, *further)),
            )


def _run_output(run: RunRecord) -> str:
    values = [read_number(each["sqnr_db"]) for each in run.summary.get("outputs", ())]
    return format_db(min(values)) if values else "–"


def history(view: View, draft: Draft) -> None:
    """Every run of the pair; a click opens it."""
    space = session.workspace()
    frame = tables.runs(
        (run, widgets.format_label(run.recipe), _run_output(run), space.note(run.id))
        for run in view.runs
    )
    ids = list(frame["id"])
    key = f"runs-{view.run.id}-{len(ids)}"

    def chosen() -> None:
        rows = st.session_state[key]["selection"]["rows"]
        if rows and ids[rows[0]] != view.run.id:
            session.select_run(ids[rows[0]])

    st.dataframe(
        frame,
        key=key,
        hide_index=True,
        column_config=tables.run_columns(),
        on_select=chosen,
        selection_mode="single-row",
        selection_default={"selection": {"rows": [ids.index(view.run.id)]}},
        height=min(300, 36 + 35 * len(frame)),
    )
    row = st.container(horizontal=True, vertical_alignment="center", key="run-actions")
    row.button(
        "Tick the nodes of this run",
        key="tick-run",
        disabled=set(draft.nodes) == set(view.run.exclusions) or not session.may_edit(),
        on_click=session.tick,
        args=(view.pair.id, draft, view.run.exclusions),
    )
    with row:
        sharing.delete_run_button(view)


def take_along(view: View) -> None:
    """Downloads and commands of the run that is shown."""
    run = view.run
    stem = widgets.file_name(f"{view.pair.title}-run{run.number}")
    listed = run.summary.get("exclusion_list")
    model = run.model
    with st.container(horizontal=True, key="take"):
        st.download_button(
            "Exclusion list",
            data=dump_json(listed) if listed else "",
            file_name="exclude.json",
            mime="application/json",
            on_click="ignore",
            disabled=not listed,
            icon=":material/download:",
            type="primary",
            key="take-list",
            help="For quant-inspector quantize --exclude exclude.json",
        )
        widgets.file_button(
            f"Quantized model ({format_bytes(model.size_bytes)})",
            model.path,
            file_name=f"{stem}.onnx" if run.number else model.name,
            key="take-model",
            run_id=run.id,
        )
        for place, file in enumerate(_data_files(model.path)):
            widgets.file_button(
                f"Its data {words.md_text(shorten_name(file.name, 24))}",
                file,
                file_name=file.name,
                key=f"take-data-{place}",
                run_id=run.id,
                help="Save it beside the model, under this name.",
            )
        st.download_button(
            "Recipe",
            data=dump_json(run.recipe),
            file_name="recipe.json",
            mime="application/json",
            on_click="ignore",
            icon=":material/download:",
            key="take-recipe",
            help="For quant-inspector quantize --recipe recipe.json",
        )
    if run.exclusions:
        _other_tools(view, stem)
    commands = run.summary.get("commands") or {}
    if not commands:
        st.caption("The loaded file has no command: Re-quantize makes a run that has.")
        return
    for key, label, language in (
        ("inspector", "The same from the command line", "bash"),
        ("python", "For ONNX Runtime's quantize_static and quantize_dynamic", "python"),
        ("onnxruntime", "ONNX Runtime's own command line", "bash"),
    ):
        if commands.get(key):
            st.caption(label)
            st.code(str(commands[key]), language=language, wrap_lines=True)


def _data_files(model: Path) -> list[Path]:
    """The external data of a model that the workspace keeps; a user's own file is left alone."""
    if session.workspace().root not in model.parents or not model.is_file():
        return []
    beside = sorted(each for each in model.parent.iterdir() if each.is_file() and each != model)
    return [each for each in beside if each.suffix != ".json"][:8]


# What `list_exports` writes for, by name, with the suffix of the file.
_TOOLS = {
    "ort": ("ONNX Runtime", "py"),
    "olive": ("Olive", "json"),
    "quark": ("AMD Quark", "py"),
    "nncf": ("NNCF", "py"),
    "modelopt": ("NVIDIA ModelOpt", "py"),
}


def _other_tools(view: View, stem: str) -> None:
    """The run's list in another tool's format."""
    target = st.segmented_control(
        "The list for another tool",
        list(_TOOLS),
        format_func=lambda name: _TOOLS[name][0],
        key=f"export-{view.run.id}",
    )
    if target is None:
        return
    answer = session.ask(
        ("export", view.run.id, target),
        tasks.export_exclusions,
        session.root(),
        run_id=view.run.id,
        target=target,
        title="Writing the list",
        patience=0.6,
    )
    if answer.job is not None:
        widgets.waiting(answer.job, height=90, key="export")
        return
    if answer.error is not None:
        widgets.error(answer.error)
        return
    name, suffix = _TOOLS[target]
    for note in answer.value["notes"][:3]:
        st.caption(words.md_text(str(note)))
    st.code(answer.value["text"], language="python" if suffix == "py" else "json", height=180)
    st.download_button(
        f"Download for {name}",
        data=answer.value["text"],
        file_name=f"{stem}-{target}.{suffix}",
        mime="text/plain",
        on_click="ignore",
        icon=":material/download:",
        key="export-download",
    )
