"""Why is this tensor wrong?"""

import streamlit as st

from inspector import figures
from inspector.comparison import ActivationError, WeightError
from inspector.render import shorten_name
from inspector.web import (
    context,
    facts,
    lab,
    matches,
    precision,
    session,
    style,
    tables,
    widgets,
    words,
)

session.guard()

# get
view = session.view()

# guard
if view is None:
    context.nothing_loaded()
    st.stop()
assert view is not None
context.bar(view)
record = view.record
wanted = st.query_params.get("tensor", "")
if wanted != view.tensor and matches.unmatched_of(view, wanted) is not None:
    # Refused by hand, or found in a list: it has no figures, but it can be matched.
    order = session.worst_first(view.comparison)
    with st.container(horizontal=True, vertical_alignment="center", key="tensor-controls"):
        widgets.tensor_field(view, order, refused=matches.refused(view), shown=wanted)
        widgets.neighbours(view, key="tensors")
    with st.container(key="unmatched"):
        st.markdown(f":orange[▲] {words.md_code(shorten_name(wanted, 60))} is not compared")
    matches.choice(view, wanted, key="lost-match")
    st.stop()
if record is None:
    widgets.sentence("No tensor of the two models could be compared")
    st.markdown("The overview lists every tensor that is not compared, with the reason.")
    st.stop()
assert record is not None

# ask: which tensor
order = session.worst_first(view.comparison)
with st.container(horizontal=True, vertical_alignment="center", key="tensor-controls"):
    widgets.tensor_field(view, order, refused=matches.refused(view))
    widgets.neighbours(view, key="tensors")
    widgets.leave_in_float(view, key="tensors-float")
    widgets.in_graph(view)
    place = order.index(view.tensor) + 1
    st.caption(f"{place} of {len(order)}, worst first", width="content")
    st.space("stretch")
    what = st.segmented_control(
        "Show",
        ("Values", "Range and scheme"),
        default="Values",
        key="tensor-view",
        label_visibility="collapsed",
        required=True,
    )
    logarithmic = st.toggle("Log counts", value=True, key="log", bind="query-params")

# show: what is known without running anything
widgets.sentence(facts.tensor_sentence(record), style.severity(session.rank_of(record)))
short = words.md_code(shorten_name(record.name, 44))
op_type = words.md_text(shorten_name(record.op_type, 24))
node = f"of {op_type} {words.md_code(shorten_name(record.node, 44))}"
note = f" · {words.md_text(record.note)}" if record.note else ""
inside = record.scope if isinstance(record, WeightError) else ""
if inside:
    note = f" · in {words.md_code(shorten_name(inside, 40))}{note}"
with st.container(horizontal=True, vertical_alignment="center", key="what", gap="small"):
    with st.popover(
        matches.button_label(view),
        icon=":material/push_pin:" if record.matched_by == "pin" else ":material/link:",
        key=f"match-{view.run.id}",
        on_change="rerun",
        help="Which rule found the partner; refuse it, or pin another tensor.",
    ) as match:
        if match.open:
            matches.choice(view, record.name, key="match")
    if view.kind == "activation":
        draft = session.draft(view.pair.id, view.run.exclusions)
        precision.choice(view, draft, view.node, [record.name], key="tensors-precision")
    st.caption(
        f"{view.kind} {short} {node if record.node else '(graph input)'} · stored as "
        f"{words.md_text(record.dtype)} · {' × '.join(map(str, record.shape)) or 'scalar'}{note}",
        help=f"Tensor {words.md_code(record.name)}, node {words.md_code(record.node)}, matched "
        f"with {words.md_code(record.quantized_name)}",
    )
if view.kind == "activation":
    precision.told(view, draft)
with st.container(key="formula"):
    st.code(facts.formula(record), language=None)
widgets.tiles(facts.tensor_tiles(record))

# get: its values, from the worker
answer = session.tensor_detail(view)

# guard and show
name = f"{view.pair.title}-run{view.run.number}-{record.name}"
dark = style.is_dark()
observed = (
    (record.observed_low, record.observed_high) if isinstance(record, ActivationError) else None
)
if what == "Range and scheme":
    if answer.job is not None:
        widgets.waiting(answer.job, height=340, key="lab")
    elif answer.error is not None:
        widgets.error(answer.error)
        st.button("Try again", on_click=session.forget_tensor, args=(view,), key="again")
    else:
        lab.section(view, answer.value, log=logarithmic)
    st.stop()
parts = record.slices if isinstance(record, ActivationError) else ()
if parts:
    widgets.picture(
        figures.slices(parts, dark),
        key="slices",
        name=f"{name}-slices",
        alt="SQNR of each part that was joined",
    )
left, right = st.columns(2, gap="small")
if answer.job is not None:
    with left:
        # As high as the pictures that follow, so that nothing below moves.
        widgets.waiting(answer.job, height=320, key="histogram")
        st.container(height=300, border=True, key="wait-errors")
    right.container(height=380, border=True, key="wait-map")
elif answer.error is not None:
    with left:
        widgets.error(answer.error)
    left.button("Try again", on_click=session.forget_tensor, args=(view,), key="again")
else:
    with left:
        widgets.picture(
            figures.histogram(answer.value, log=logarithmic, observed=observed, dark=dark),
            key="histogram",
            name=f"{name}-histogram",
            alt="Histogram of the tensor, float against dequantized",
        )
        widgets.picture(
            figures.error_histogram(answer.value, dark, log=logarithmic),
            key="errors",
            name=f"{name}-errors",
            alt="Histogram of the error",
        )
    with right:
        widgets.picture(
            figures.value_map(answer.value, dark),
            key="map",
            name=f"{name}-map",
            alt="Float value against dequantized value",
        )
with right:
    told = widgets.as_markdown(tables.tensor_facts(record, view.comparison))
    st.table(told, border="horizontal", hide_header=True)
if record.channel_sqnr_db:
    activation = isinstance(record, ActivationError)
    low = record.channel_low if isinstance(record, ActivationError) else tuple(
        -each for each in record.channel_absmax
    )  # fmt: skip
    high = record.channel_high if isinstance(record, ActivationError) else record.channel_absmax
    widgets.picture(
        figures.channels(
            record.channel_sqnr_db,
            low,
            high,
            worst=record.worst_channel,
            dark=dark,
        ),
        key="channels",
        name=f"{name}-channels",
        alt="SQNR per channel, worst first",
    )
for output in view.comparison.outputs:
    if output.name == record.name and len(output.per_sample_sqnr_db) > 1:
        widgets.picture(
            figures.per_sample(output, dark, sample_names=view.comparison.sample_names),
            key="samples",
            name=f"{name}-samples",
            alt="SQNR per sample",
        )
