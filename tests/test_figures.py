"""What the figures hold: names, numbers and sentences, not pixels."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inspector import figures
from inspector.comparison import (
    ActivationError,
    Comparison,
    MatchCounts,
    ModelFile,
    OutputError,
    SliceError,
)
from inspector.distribution import distribution_of_detail
from inspector.grid_schemes import SCHEMES
from inspector.lab import compare_schemes, trial

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True, scope="module")
def checked_by_plotly() -> Iterator[None]:
    """Plotly checks every figure here; pages save that time."""
    figure = go.Figure

    def checked(**given: Any) -> go.Figure:
        return figure(layout=given["layout"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(go, "Figure", checked)
        yield


def activation(
    name: str,
    accumulated: float,
    local: float | None = 40.0,
    *,
    depth: int = 0,
    node: str | None = None,
    nonfinite: tuple[int, int] = (0, 0),
) -> ActivationError:
    return ActivationError(
        name=name,
        node=f"/{name}/Conv" if node is None else node,
        op_type="Conv",
        depth=depth,
        quantized_name=f"{name}_dequantized",
        dtype="int8",
        shape=(1, 8, 4, 4),
        scale=0.1,
        zero_point=0,
        local_sqnr_db=local,
        accumulated_sqnr_db=accumulated,
        worst_channel_sqnr_db=accumulated,
        median_channel_sqnr_db=accumulated,
        worst_channel=0,
        channel_axis=1,
        channel_sqnr_db=(accumulated,),
        channel_low=(-1.0,),
        channel_high=(1.0,),
        slices=(),
        cosine_similarity=1.0,
        mse=0.0,
        max_abs_error=0.0,
        saturated_fraction=0.0,
        saturated_low_fraction=0.0,
        saturated_high_fraction=0.0,
        observed_low=-1.0,
        observed_high=1.0,
        representable_low=-1.0,
        representable_high=1.0,
        nonfinite_float=nonfinite[0],
        nonfinite_quantized=nonfinite[1],
        is_output=False,
        matched_by="name",
    )


def output(name: str, sqnr_db: float, per_sample: tuple[float, ...] = ()) -> OutputError:
    ordered = sorted(per_sample, key=lambda v: -INF if math.isnan(v) else v)
    return OutputError(
        name=name,
        sqnr_db=sqnr_db,
        deployed_sqnr_db=sqnr_db,
        seen_sqnr_db=None,
        unseen_sqnr_db=None,
        worst_channel_sqnr_db=sqnr_db,
        median_channel_sqnr_db=sqnr_db,
        worst_channel=0,
        channel_axis=1,
        channel_sqnr_db=(sqnr_db,),
        slices=(),
        median_sample_sqnr_db=ordered[(len(ordered) - 1) // 2] if ordered else NAN,
        worst_sample_sqnr_db=ordered[0] if ordered else NAN,
        worst_sample="worst.npz" if ordered else "",
        per_sample_sqnr_db=per_sample,
        cosine_similarity=1.0,
        max_abs_error=0.0,
        deployed_differs=False,
    )


def comparison(
    activations: list[ActivationError], outputs: list[OutputError] | None = None
) -> Comparison:
    file = ModelFile(path="m.onnx", sha256="0" * 64, size_bytes=1, quant_format="float")
    return Comparison(
        float_model=file,
        quantized_model=file,
        samples=3,
        sample_names=("a", "b", "c"),
        random_feeds=False,
        seen="unknown",
        weights=(),
        activations=tuple(activations),
        outputs=tuple(outputs or ()),
        unmatched=(),
        task=None,
        latency=None,
        warnings=(),
    )


def series(*accumulated: float) -> list[ActivationError]:
    return [activation(f"t{i}", db, depth=i) for i, db in enumerate(accumulated)]


def detail(values: Any = None, **changes: Any) -> dict[str, Any]:
    """A tensor's detail as the workbench writes it, clipped at -1 and 1."""
    x = np.random.default_rng(0).normal(0, 0.5, 5000) if values is None else np.asarray(values)
    scale = 2 / 255
    q = np.clip(np.rint(x / scale), -127, 128) * scale
    edges, error_edges = np.linspace(-1.5, 1.5, 61), np.linspace(-2, 2, 81)
    error = (q - x) / scale
    record = {
        "tensor": "/head/conv",
        "node": "/head/Conv",
        "kind": "activation",
        "dtype": "int8",
        "scale": scale,
        "zero_point": 0,
        "edges": edges.tolist(),
        "float_counts": np.histogram(x, edges)[0].tolist(),
        "quantized_counts": np.histogram(q, edges)[0].tolist(),
        "float_below": int((x < -1.5).sum()),
        "float_above": int((x > 1.5).sum()),
        "error_edges": error_edges.tolist(),
        "error_counts": np.histogram(error, error_edges)[0].tolist(),
        "error_below": int((error < -2).sum()),
        "error_above": int((error > 2).sum()),
        "error_unit": "steps",
        "map_float_edges": edges.tolist(),
        "map_quantized_edges": edges.tolist(),
        "map_counts": np.histogram2d(x, q, [edges, edges])[0].astype(int).tolist(),
        "representable": [-127 * scale, 128 * scale],
        "saturated": [
            float((x < -1).sum()) / max(x.size, 1),
            float((x > 1).sum()) / max(x.size, 1),
        ],
        "count": int(x.size),
        "nonfinite": 0,
    }
    return record | changes


def trace(figure: Any, name: str, *, drawn: bool = False) -> Any:
    """The trace of that name that carries numbers (or the one that is only drawn)."""
    return next(t for t in figure.data if t.name == name and (t.meta == "decoration") == drawn)


def rows(figure: Any) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(figures.figure_csv(figure))))


def title(figure: Any) -> str:
    return str(figure.layout.title.text)


def labels(figure: Any) -> list[str]:
    return [a.text for a in figure.layout.annotations]


def y_tick(figure: Any, text: str) -> float:
    axis = figure.layout.yaxis
    return float(axis.tickvals[list(axis.ticktext).index(text)])


# --- colours, words, frame -----------------------------------------------------------------------


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    light, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_an_error_colour_changes_exactly_at_its_steps() -> None:
    neighbours = pairwise(figures.ERROR_COLORS)
    for step, (worse, better) in zip(figures.ERROR_STEPS, neighbours, strict=True):
        assert figures.error_color(math.nextafter(step, -INF)) == worse
        assert figures.error_color(step) == better


def test_no_signal_and_not_finite_have_the_worst_colour_and_exact_the_best() -> None:
    assert figures.error_color(-INF) == figures.error_color(NAN) == figures.ERROR_COLORS[0]
    assert figures.error_color(INF) == figures.ERROR_COLORS[-1]
    assert figures.error_color(None) == figures.NO_FIGURE_COLOR


def test_error_colours_grow_lighter_and_stand_out_on_both_backgrounds() -> None:
    lightness = [_luminance(c) for c in figures.ERROR_COLORS]
    assert all(a * 1.25 < b for a, b in pairwise(lightness))
    for color in figures.ERROR_COLORS:
        assert _contrast(color, "#ffffff") > 1.6
        assert _contrast(color, "#0f172a") > 2.4


@pytest.mark.parametrize("dark", [False, True])
def test_the_template_is_transparent_and_names_the_two_identities(dark: bool) -> None:
    layout = figures.template(dark).layout
    assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0,0,0,0)"
    assert layout.colorway[:2] == (("#94a3b8", "#f59e0b") if dark else ("#475569", "#d97706"))
    assert figures.template(dark) is figures.template(dark)


def test_a_long_name_loses_its_middle_and_keeps_whole_parts() -> None:
    assert figures.short_name("/backbone/stage4/block2/conv2/Conv") == "/backbone/…/conv2/Conv"
    assert figures.short_name("conv1") == "conv1"
    assert figures.short_name("x" * 40, 11) == "xxxxx…xxxxx"


@given(st.text(max_size=80), st.integers(6, 60))
def test_a_short_name_is_never_longer_than_asked(name: str, width: int) -> None:
    assert len(figures.short_name(name, width)) <= max(width, 3)


def test_drawing_loads_nothing_that_runs_models() -> None:
    loaded = subprocess.run(
        [
            sys.executable,
            "-c",
            "import inspector.figures, sys; print('onnxruntime' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.strip() == "False"


# --- error by depth ------------------------------------------------------------------------------


def test_every_tensor_has_one_mark_that_names_it_in_order() -> None:
    records = series(45, 44, INF, NAN, 30)
    figure = figures.error_by_depth(comparison(records))
    marks = trace(figure, "accumulated")
    assert list(marks.customdata) == [a.name for a in records]
    assert list(marks.x) == [0, 1, 2, 3, 4]
    assert marks.y[0] == 45
    assert marks.meta["y"][2] == INF


def test_an_exact_tensor_lies_on_the_rail_and_the_line_passes_it_over() -> None:
    figure = figures.error_by_depth(comparison(series(45, INF, 40)))
    rail = y_tick(figure, "exact")
    assert rail > 50
    assert trace(figure, "accumulated").y[1] == rail
    line = trace(figure, "accumulated", drawn=True)
    assert list(line.x) == [0, 2]
    assert list(line.y) == [45, 40]


def test_a_tensor_that_is_not_finite_breaks_the_line_and_is_marked_at_the_bottom() -> None:
    records = [*series(45), activation("bad", NAN, NAN, nonfinite=(0, 3)), *series(30)]
    figure = figures.error_by_depth(comparison(records))
    assert trace(figure, "accumulated", drawn=True).y[1] is None
    marks = trace(figure, "accumulated")
    assert marks.y[1] == y_tick(figure, "NaN") < 0
    assert marks.marker.symbol[1] == "x"
    assert title(figure) == "The values stop being finite at /bad/Conv"


def test_what_is_not_finite_in_float_too_is_not_blamed_on_quantization() -> None:
    records = [*series(45), activation("mask", NAN, nonfinite=(3, 3)), *series(44)]
    assert "stop being finite" not in title(figures.error_by_depth(comparison(records)))


def test_far_values_lie_on_rails_of_their_own_and_do_not_flatten_the_rest() -> None:
    figure = figures.error_by_depth(comparison(series(150, 45, -60, -INF)))
    marks = trace(figure, "accumulated")
    assert marks.y[0] == y_tick(figure, ">80")
    assert marks.y[2] == marks.y[3] == y_tick(figure, "<-20")
    assert figure.layout.yaxis.range[1] < 100


def test_local_dots_are_only_where_a_tensor_has_its_own_pair() -> None:
    records = [activation("a", 45, 5.0), activation("b", 44, None), activation("c", 43, 41.0)]
    dots = trace(figures.error_by_depth(comparison(records)), "local (own Q/DQ)")
    assert list(dots.customdata) == ["a", "c"]
    assert list(dots.marker.color) == [figures.ERROR_COLORS[0], figures.ERROR_COLORS[-1]]


def test_the_largest_fall_is_the_title_and_is_labelled() -> None:
    figure = figures.error_by_depth(comparison(series(45, 44, 43, 18, 17, 16)))
    assert title(figure) == "The largest fall is at /t3/Conv: 43.0 to 18.0 dB"
    assert labels(figure) == ["/t3/Conv  -25.0 dB"]


def test_a_healthy_model_has_no_fall_to_label() -> None:
    figure = figures.error_by_depth(comparison(series(46, 42, 38, 36, 35)))
    assert labels(figure) == []
    assert title(figure) == "No sudden fall: the lowest tensor is /t4/Conv with 35.0 dB"


def test_a_bad_branch_is_not_blamed_each_time_the_order_returns_to_it() -> None:
    figure = figures.error_by_depth(comparison(series(45, 44, 15, 43, 14.5, 42, 14, 41, 13.5)))
    assert labels(figure) == ["/t2/Conv  -29.0 dB"]


def test_with_parents_a_fall_is_measured_from_a_tensors_own_inputs() -> None:
    records = series(45, 15, 44, 20)
    parents = {"t1": ["t0"], "t2": ["t0"], "t3": ["t2"]}
    assert labels(figures.error_by_depth(comparison(records), parents=parents)) == [
        "/t1/Conv  -30.0 dB",
        "/t3/Conv  -24.0 dB",
    ]
    assert labels(figures.error_by_depth(comparison(records))) == ["/t1/Conv  -30.0 dB"]


def test_labels_never_share_a_row_and_stay_in_the_plot() -> None:
    parents = {f"t{i}": ["t0"] for i in range(1, 12)}
    low = [45.0, -15.0, NAN, 2.0]
    for values in ([45.0] * 8 + [4.0, 3.0, 2.0, 1.0], [45.0, 1.0, 2.0, 3.0], low):
        records = comparison(series(*values), [output("o", values[-1])])
        figure = figures.error_by_depth(records, parents=parents)
        bottom, top = figure.layout.yaxis.range
        height = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
        falls = figure.layout.annotations[1:]  # the first is the output's, right of all these
        rows = sorted((top - a.y) / (top - bottom) * height + a.ay for a in falls)
        assert len(rows) >= 2
        assert all(b - a >= 15 for a, b in pairwise(rows))
        assert rows[0] >= 8
        assert rows[-1] <= height - 8


def test_a_fall_that_recovers_is_not_the_title_where_the_output_is_fine() -> None:
    fine, low = series(45, 44, 22, 41, 42), series(45, 44, 12, 41, 42)
    assert title(figures.error_by_depth(comparison(fine, [output("o", 42)]))) == (
        "Accumulated SQNR stays above 20 dB"
    )
    assert title(figures.error_by_depth(comparison(low, [output("o", 42)]))) == (
        "/t2/Conv falls to 12.0 dB, yet the output has 42.0 dB"
    )
    assert title(figures.error_by_depth(comparison(low, [output("o", 13)]))) == (
        "The largest fall is at /t2/Conv: 44.0 to 12.0 dB"
    )


def test_one_output_is_labelled_at_its_mark_and_several_in_the_margin() -> None:
    one = figures.error_by_depth(comparison(series(45, 44), [output("a_long_output_name", 30)]))
    two = figures.error_by_depth(comparison(series(45, 44), [output("a", 30), output("b", 31)]))
    assert one.layout.margin.r <= 30 < two.layout.margin.r
    assert labels(one) == ["30.0 dB"]
    assert labels(two) == ["a 30.0 dB", "b 31.0 dB"]


def test_outputs_stand_right_of_all_tensors_with_their_names() -> None:
    figure = figures.error_by_depth(
        comparison(series(45, 40), [output("boxes", 38.0), output("scores", 1.2)])
    )
    marks = trace(figure, "output")
    assert list(marks.customdata) == ["boxes", "scores"]
    assert min(marks.x) > 1
    assert labels(figure) == ["boxes 38.0 dB", "scores 1.2 dB"]


def test_many_outputs_are_all_drawn_and_the_worst_named() -> None:
    outputs = [output(f"out{i}", 40.0 - i) for i in range(15)]
    figure = figures.error_by_depth(comparison(series(45, 44), outputs))
    assert len(trace(figure, "output").x) == 15
    assert labels(figure) == [f"out{i} {40.0 - i:.1f} dB" for i in range(14, 5, -1)]


def test_excluded_nodes_are_violet_ticks_at_the_bottom() -> None:
    figure = figures.error_by_depth(comparison(series(45, 44, 43)), excluded=["/t1/Conv", "gone"])
    ticks = trace(figure, "left in float")
    assert list(ticks.x) == [1]
    assert list(ticks.customdata) == ["t1"]
    assert ticks.marker.color == "#7c3aed"
    assert ticks.y[0] < 0


def test_the_selected_tensor_is_ringed_and_an_unknown_one_is_not() -> None:
    records = comparison(series(45, 44, 43))
    ring = trace(figures.error_by_depth(records, selected="t1"), "selected", drawn=True)
    assert list(ring.x) == [1]
    unknown = figures.error_by_depth(records, selected="no such tensor")
    assert "selected" not in [t.name for t in unknown.data]


def test_hover_tells_node_operator_tensor_and_all_three_figures() -> None:
    figure = figures.error_by_depth(comparison(series(45, 25)))
    text = trace(figure, "accumulated").hovertext[1]
    for part in (
        "/t1/Conv",
        "Conv",
        "tensor t1",
        "accumulated 25.0 dB",
        "local 40.0 dB",
        "20.0 dB",
    ):
        assert part in text


def test_clicking_a_point_fades_no_other() -> None:
    marks = trace(figures.error_by_depth(comparison(series(45, 25))), "accumulated")
    assert marks.unselected.marker.opacity == 1


def test_names_are_shown_as_they_are_not_as_markup() -> None:
    records = [activation("<b>x</b>", 45, node="<i>n</i>"), activation("y", 10, node="<u>m</u>")]
    figure = figures.error_by_depth(comparison(records, [output("<s>o</s>", 10)]))
    assert "&lt;u&gt;m&lt;/u&gt;" in title(figure)
    assert "<u>" not in "".join([title(figure), *labels(figure)])
    assert trace(figure, "accumulated").customdata[0] == "<b>x</b>"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(
    "accumulated", [(), (NAN, NAN), (INF, INF), (-INF,), (50.0,), (0.0, -15.0)]
)
def test_error_by_depth_draws_whatever_the_figures_are(
    accumulated: tuple[float, ...], dark: bool
) -> None:
    records = comparison(series(*accumulated), [output("o", v) for v in accumulated])
    figure = figures.error_by_depth(records, selected="t0", excluded=["/t0/Conv"], dark=dark)
    assert title(figure)
    json.loads(figure.to_json())


def test_two_thousand_tensors_are_drawn_in_order() -> None:
    rng = np.random.default_rng(0)
    records = series(*(45 - np.arange(2000) / 100 + rng.normal(0, 1, 2000)).tolist())
    figure = figures.error_by_depth(comparison(records, [output("o", 20.0)]))
    assert list(trace(figure, "accumulated").customdata) == [a.name for a in records]


def test_a_given_title_replaces_the_derived_one() -> None:
    figure = figures.error_by_depth(comparison(series(45, 10)), title="Output 14.2 dB < 20 dB")
    assert title(figure) == "Output 14.2 dB &lt; 20 dB"


# --- before and after ----------------------------------------------------------------------------


def test_before_and_after_pair_tensors_by_name_and_say_what_changed() -> None:
    before = comparison(series(45, 20, 19), [output("out", 14.2)])
    after = comparison(series(45, 35, 33), [output("out", 31.0)])
    figure = figures.before_after(before, after)
    assert title(figure) == "Output goes from 14.2 to 31.0 dB; 2 of 3 tensors better, 0 worse"
    assert list(trace(figure, "before").y) == [45, 20, 19]
    assert list(trace(figure, "after").y) == [45, 35, 33]
    assert list(trace(figure, "after").customdata) == ["t0", "t1", "t2"]


def test_a_tensor_only_one_side_has_is_drawn_for_that_side() -> None:
    before, after = comparison(series(45, 20, 19)), comparison(series(45))
    figure = figures.before_after(before, after)
    assert list(trace(figure, "before").customdata) == ["t0", "t1", "t2"]
    assert list(trace(figure, "after").customdata) == ["t0"]


@pytest.mark.parametrize("accumulated", [(), (NAN, NAN), (INF, INF), (-INF, 30.0)])
def test_before_and_after_draws_whatever_the_figures_are(accumulated: tuple[float, ...]) -> None:
    records = comparison(series(*accumulated), [output("o", v) for v in accumulated])
    json.loads(figures.before_after(records, records, True).to_json())
    json.loads(figures.before_after(comparison([]), records).to_json())


# --- one tensor ----------------------------------------------------------------------------------


def test_a_histogram_holds_both_counts_and_draws_empty_bins_on_the_axis() -> None:
    record = detail()
    figure = figures.histogram(record)
    for name, key in (("float", "float_counts"), ("dequantized", "quantized_counts")):
        outline = trace(figure, name)
        assert list(outline.meta["y"]) == record[key]
        assert list(outline.x) == record["edges"]
        assert all(y > 0 for y in outline.y)
    assert figure.layout.yaxis.type == "log"
    linear = figures.histogram(record, log=False)
    assert linear.layout.yaxis.type is None
    assert list(trace(linear, "dequantized").y)[:-1] == record["quantized_counts"]


def test_a_histogram_writes_the_clipped_share_at_each_border_and_counts_outliers() -> None:
    figure = figures.histogram(detail(saturated=[0.0, 0.0312], float_below=0, float_above=1204))
    assert "from -0.9961: 0 % clipped" in labels(figure)
    assert "to 1.004: 3.1 % clipped" in labels(figure)
    assert "1,204 above 1.5 ▶" in labels(figure)
    assert not any("below" in text for text in labels(figure))
    assert title(figure).startswith("3.1 % of /head/conv is clipped above")
    assert [s.x0 for s in figure.layout.shapes] == pytest.approx([-127 * 2 / 255, 128 * 2 / 255])


def test_a_tensor_whose_outliers_stretch_the_range_says_how_little_is_used() -> None:
    values = [*np.linspace(-0.05, 0.05, 9998), -1.0, 1.0]
    assert title(figures.histogram(detail(values))).startswith("99.9 % of /head/conv lies in 5.0 %")


@pytest.mark.parametrize(
    ("observed", "said"),
    [
        ((-0.9, 2.5), "The float model's /head/conv reaches 2.5, the quantized model's stays"),
        ((-3.0, 2.5), "The float model's /head/conv reaches -3, the quantized model's stays"),
        ((-0.9, 1.005), "/head/conv fills its range, nothing is clipped"),
        ((NAN, 2.5), "/head/conv fills its range, nothing is clipped"),
        (None, "/head/conv fills its range, nothing is clipped"),
    ],
)
def test_where_only_the_float_model_leaves_the_range_the_title_says_so(
    observed: tuple[float, float] | None, said: str
) -> None:
    record = detail(np.linspace(-0.99, 0.99, 1000))
    figure = figures.histogram(record, observed=observed)
    assert title(figure).startswith(said)
    assert "nothing is clipped" in title(figure)


def test_the_integer_grid_is_drawn_below_512_levels_and_not_above() -> None:
    grid = trace(figures.histogram(detail()), "integer grid", drawn=True)
    assert len(grid.x) == 256
    assert 0.0 in grid.x
    fine = detail(scale=2 / 65535)
    assert "integer grid" not in [t.name for t in figures.histogram(fine).data]


def test_the_integer_grid_lies_on_what_the_integers_mean() -> None:
    record = detail(scale=0.5, zero_point=3, representable=[-65.5, 62.0])
    grid = trace(figures.histogram(record), "integer grid", drawn=True)
    assert list(grid.x) == [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize(
    ("scale", "zero_point", "said"),
    [(None, None, "5,000 values"), ([0.1, 0.02], [0, 0], "2 channel steps, 0.02 to 0.1")],
)
def test_without_one_scale_there_is_no_grid_and_this_is_said(
    scale: Any, zero_point: Any, said: str
) -> None:
    limits = None if scale is None else [-1.0, 1.0]
    figure = figures.histogram(detail(scale=scale, zero_point=zero_point, representable=limits))
    assert "integer grid" not in [t.name for t in figure.data]
    assert said in title(figure)


def test_an_error_histogram_says_how_much_stays_within_half_a_step() -> None:
    inside = figures.error_histogram(detail(np.linspace(-0.9, 0.9, 1000)))
    assert title(inside).startswith("100 % of the errors are within half a step")
    assert [s.x0 for s in inside.layout.shapes] == [-0.5, 0.5]
    clipped = figures.error_histogram(detail([0.5] * 90 + [1.4] * 10))
    assert title(clipped).startswith("90.0 % of the errors are within half a step")
    assert "10 below -2" in "".join(labels(clipped))


def test_without_a_scale_errors_are_in_real_units() -> None:
    figure = figures.error_histogram(detail(error_unit="real", scale=None))
    assert "own units" in figure.layout.xaxis.title.text
    assert not any("step" in text for text in [*labels(figure), title(figure)])


def test_a_map_puts_float_across_and_dequantized_up() -> None:
    counts = [[0, 0], [7, 0]]
    record = detail(map_float_edges=[0, 1, 2], map_quantized_edges=[0, 1, 2], map_counts=counts)
    figure = figures.value_map(record)
    assert rows(figure) == [{"trace": "values", "x": "1.5", "y": "0.5", "z": "7", "text": ""}]
    assert figure.data[0].z[0][0] is None
    identity = trace(figure, "identity", drawn=True)
    assert list(identity.x) == list(identity.y) == [0, 2]


def test_a_map_says_how_much_lies_on_the_identity() -> None:
    assert title(figures.value_map(detail([0.5] * 75 + [1.45] * 25))).startswith(
        "75.0 % of the values"
    )


@pytest.mark.parametrize("dark", [False, True])
def test_a_tensor_without_finite_values_still_gives_every_figure(dark: bool) -> None:
    zeros = detail(np.empty(0), saturated=[NAN, NAN], nonfinite=12, count=12)
    bare = {"tensor": "x", "count": 0, "edges": [], "map_counts": [], "scale": None}
    for record in (zeros, bare):
        for draw in (figures.histogram, figures.error_histogram, figures.value_map):
            figure = draw(record, dark=dark)
            assert title(figure)
            json.loads(figure.to_json())
            figures.figure_csv(figure)


def test_a_constant_tensor_gives_every_figure() -> None:
    record = detail(np.zeros(50), edges=[0.0, 0.0], float_counts=[50], quantized_counts=[50])
    for draw in (figures.histogram, figures.error_histogram, figures.value_map):
        json.loads(draw(record).to_json())


# --- channels, slices, samples -------------------------------------------------------------------


def test_channels_are_sorted_worst_first_with_their_ranges() -> None:
    figure = figures.channels([30.0, 3.2, NAN, INF], [-1, -2, -3, -4], [1, 2, 3, 4], worst=1)
    bars = trace(figure, "SQNR")
    assert list(bars.customdata) == [2, 1, 0, 3]
    assert list(figure.layout.xaxis.ticktext) == ["2", "1", "0", "3"]
    assert bars.y[3] == y_tick(figure, "exact")
    assert title(figure).startswith("Channel 1 is worst: 3.2 dB, the median channel 3.2 dB")
    assert list(trace(figure, "range").y)[:3] == [-3, 3, None]
    assert list(trace(figure, "range of the worst").y)[:2] == [-2, 2]


def test_more_than_64_channels_show_the_worst_32_and_say_so() -> None:
    sqnr = np.linspace(50, 10, 512)
    figure = figures.channels(sqnr.tolist(), [], [], worst=511)
    assert list(trace(figure, "SQNR").customdata) == list(range(511, 479, -1))
    assert "the worst 32 of 512" in title(figure)
    assert any(text.startswith("median<br>30.0 dB") for text in labels(figure))


def test_a_channel_far_wider_than_the_others_is_named() -> None:
    figure = figures.channels([30.0, 20.0, 31.0], [-1, -1, -60], [1, 1, 60])
    assert "channel 2 is 60 times as wide as the median one" in title(figure)


@pytest.mark.parametrize("sqnr", [[], [NAN, NAN], [INF, INF, INF], [None, 12.0], [-INF], [30.0]])
def test_channels_are_drawn_whatever_the_figures_are(sqnr: list[float | None]) -> None:
    limits = [0.0] * len(sqnr)
    figure = figures.channels(sqnr, limits, limits, worst=None, axis_name="output", dark=True)
    assert title(figure)
    json.loads(figure.to_json())
    figures.figure_csv(figure)


def test_slices_show_the_worst_part_first_and_name_what_drowns_it() -> None:
    parts = [
        SliceError(source="boxes", start=0, stop=4, sqnr_db=38.0, absmax=640.0),
        SliceError(source="scores", start=4, stop=14, sqnr_db=-1.2, absmax=1.0),
    ]
    figure = figures.slices(parts)
    assert title(figure).startswith("scores arrives at -1.2 dB<br>")
    assert "boxes is 640 times as large" in title(figure)
    assert list(figure.layout.yaxis.ticktext) == ["scores 4…13", "boxes 0…3"]
    assert list(trace(figure, "SQNR").x) == [-1.2, 38.0]
    assert list(trace(figure, "largest |value|").x) == [1.0, 640.0]


def test_parts_with_alike_names_stay_apart() -> None:
    parts = [
        SliceError(source=f"/neck/stage{i}/some/long/path/Conv_output_0", start=i, stop=i + 1,
                   sqnr_db=30.0, absmax=1.0)
        for i in range(3)
    ]  # fmt: skip
    ticks = figures.slices(parts).layout.yaxis.ticktext
    assert len({t.split(" ")[0] for t in ticks}) == 3


@pytest.mark.parametrize("sqnr", [[], [NAN], [INF, INF], [-INF, 30.0], [12.0] * 40])
def test_slices_are_drawn_whatever_the_figures_are(sqnr: list[float]) -> None:
    parts = [
        SliceError(source="same", start=i, stop=i + 1, sqnr_db=db, absmax=NAN if i else 0.0)
        for i, db in enumerate(sqnr)
    ]
    figure = figures.slices(parts, True)
    assert title(figure)
    json.loads(figure.to_json())
    assert len(rows(figure)) == 2 * min(len(sqnr), figures.MAX_SLICES)


def test_samples_stand_in_feed_order_and_the_worst_is_named() -> None:
    error = output("out", 14.2, (16.0, 3.1, INF))
    figure = figures.per_sample(error, sample_names=["a.npz", "b.npz", "c.npz"])
    dots = trace(figure, "sample")
    assert list(dots.customdata) == ["a.npz", "b.npz", "c.npz"]
    assert list(dots.y) == [16.0, 3.1, y_tick(figure, "exact")]
    assert title(figure) == "out is worst on b.npz: 3.1 dB, median 16.0 dB"
    assert labels(figure) == ["pooled 14.2 dB", "median 16.0 dB", "b.npz"]


@pytest.mark.parametrize("per_sample", [(), (NAN, NAN), (INF, INF), (20.0,), (20.0, 21.0)])
def test_samples_are_drawn_whatever_the_figures_are(per_sample: tuple[float, ...]) -> None:
    figure = figures.per_sample(output("out", NAN, per_sample), True)
    assert title(figure)
    json.loads(figure.to_json())


# --- CSV -----------------------------------------------------------------------------------------


def test_csv_holds_every_point_with_its_true_number_also_on_a_rail() -> None:
    figure = figures.error_by_depth(comparison(series(45.25, INF, NAN), [output("o", -INF)]))
    table = [(r["trace"], r["x"], r["y"], r["text"]) for r in rows(figure)]
    assert ("accumulated", "0", "45.25", "t0") in table
    assert ("accumulated", "1", "Infinity", "t1") in table
    assert ("accumulated", "2", "NaN", "t2") in table
    assert [(t, y, n) for t, _, y, n in table if t == "output"] == [("output", "-Infinity", "o")]
    assert len(table) == 3 + 3 + 1


def test_csv_of_a_histogram_holds_bin_centres_and_counts() -> None:
    record = detail()
    table = [r for r in rows(figures.histogram(record)) if r["trace"] == "float"]
    assert [int(r["y"]) for r in table] == record["float_counts"]
    assert float(table[0]["x"]) == pytest.approx(-1.475)


def test_csv_of_channels_names_channels_not_places() -> None:
    table = rows(figures.channels([30.0, 3.2], [-1, -2], [1, 2]))
    assert [(r["x"], r["y"]) for r in table if r["trace"] == "SQNR"] == [("1", "3.2"), ("0", "30")]
    assert [(r["x"], r["y"]) for r in table if r["trace"] == "range"] == [("0", "-1"), ("0", "1")]


def test_csv_of_an_empty_picture_is_its_header() -> None:
    assert figures.figure_csv(figures.error_by_depth(comparison([]))) == "trace,x,y,text\n"


# What the figures rest on, hostile names, large models.


def counted(**changes: Any) -> Comparison:
    records = (
        *(replace(activation(f"n{i}", 30.0), matched_by="name") for i in range(3)),
        replace(activation("s", 30.0), matched_by="structure"),
        replace(activation("p", 30.0), matched_by="pin"),
    )
    counts = MatchCounts(matched=5, fused=2, unmatched=1, float_tensors=8)
    return replace(comparison(records), **{"counts": counts, **changes})


def test_coverage_adds_up_to_every_float_tensor() -> None:
    figure = figures.coverage(counted())
    parts = {trace.name: trace.x[0] for trace in figure.data}
    assert parts == {
        "matched by name 3": 3,
        "matched by structure 1": 1,
        "matched by hand 1": 1,
        "fused into a compared one 2": 2,
        "not compared 1": 1,
    }
    assert sum(parts.values()) == 8
    assert figure.layout.xaxis.range == (0, 8)
    rows = list(csv.reader(io.StringIO(figures.figure_csv(figure))))
    assert [row[1] for row in rows[1:]] == ["3", "1", "1", "2", "1"]


def test_coverage_does_not_split_what_does_not_add_up() -> None:
    counts = MatchCounts(matched=4, fused=2, unmatched=2, float_tensors=8)
    figure = figures.coverage(counted(counts=counts))
    assert [trace.x[0] for trace in figure.data] == [4, 2, 2]


def test_coverage_of_an_earlier_comparison_says_that_nothing_was_counted() -> None:
    figure = figures.coverage(comparison([activation("a", 30.0)]))
    assert "was not counted" in figure.layout.title.text


def test_names_stay_text_in_hovers_and_labels() -> None:
    hostile = "<b>x</b>\u202eesrever\x1b" + "A" * 10_000
    figure = figures.error_by_depth(comparison([activation(hostile, 5.0, node=hostile)]))
    shown = [t for trace in figure.data for t in trace.hovertext or ()]
    shown += [note.text for note in figure.layout.annotations] + [figure.layout.title.text]
    told = "".join(shown)
    assert "<b>x</b>" not in told
    assert "\u202e" not in told
    assert "\x1b" not in told
    assert max(map(len, shown)) < 800
    assert "&lt;b&gt;x" in told
    assert "\\u202e" in told


def test_a_name_is_no_formula_in_the_csv() -> None:
    figure = figures.error_by_depth(comparison([activation("=1+1", 5.0)]))
    assert ",'=1+1" in figures.figure_csv(figure)


def test_of_many_tensors_the_lowest_are_drawn_and_the_csv_can_have_all() -> None:
    records = [activation(f"t{i}", 60.0 - (i % 97) / 10, depth=i) for i in range(5000)]
    records[3333] = activation("worst", 1.0, depth=3333)
    many = comparison(records)
    figure = figures.error_by_depth(many, selected="t17")
    for trace in figure.data:
        assert len(trace.x) <= figures.MAX_POINTS + 10
        colors = trace.marker.color
        if isinstance(colors, (list, tuple)):
            assert len(colors) == len(trace.x)
    drawn = {name for trace in figure.data for name in trace.customdata or ()}
    assert {"worst", "t17"} <= drawn
    assert "lowest of every 3" in figure.layout.xaxis.title.text
    whole = figures.figure_csv(figures.error_by_depth(many, most=None))
    assert sum(line.startswith("accumulated,") for line in whole.splitlines()) == 5000


def test_values_that_are_not_finite_in_both_models_are_not_called_exact() -> None:
    figure = figures.error_by_depth(
        comparison([activation("a", INF), activation("b", NAN, nonfinite=(3, 3))])
    )
    assert "stop being finite" in figure.layout.title.text


# --- the lab -------------------------------------------------------------------------------------


def tried(record: dict[str, Any], low: float, high: float, *, bits: int = 8) -> Any:
    scheme = SCHEMES["ort-int8"].with_bits(bits)
    return trial(distribution_of_detail(record), scheme, low, high)


def test_the_lab_shows_both_handles_the_levels_and_what_is_clipped() -> None:
    record = detail()
    found = tried(record, -0.5, 0.75, bits=4)
    figure = figures.lab_figure(record, found)
    assert title(figure).startswith(f"ONNX Runtime int4 asymmetric gives {found.sqnr_db:.1f} dB: ")
    assert f"step {found.scale:.4g} · zero point {found.zero_point:.0f} · 16 levels" in title(
        figure
    )
    low, high = (100 * f for f in (found.clipped_low_fraction, found.clipped_high_fraction))
    assert f"low -0.5: {low:.1f} % clipped" in labels(figure)
    assert f"high 0.75: {high:.1f} % clipped" in labels(figure)
    assert list(trace(figure, "levels", drawn=True).x) == found.levels.tolist()
    lines = [s.x0 for s in figure.layout.shapes if s.type == "line"]
    assert lines == [-0.5, 0.75]
    veils = [(s.x0, s.x1) for s in figure.layout.shapes if s.type == "rect"]
    assert [veils[0][1], veils[1][0]] == [-0.5, 0.75]
    total = sum(record["float_counts"]) + record["float_below"] + record["float_above"]
    for side, end, share, edge in (
        ("below", found.clip_low, found.clipped_low_fraction, -1),
        ("above", found.clip_high, found.clipped_high_fraction, 0),
    ):
        tail = trace(figure, f"clipped {side}")
        outside = record[f"float_{side}"]
        assert tail.x[edge] == pytest.approx(end)
        assert sum(tail.meta["y"]) + outside == pytest.approx(share * total)
    assert {row["trace"] for row in rows(figure)} == {"float", "clipped below", "clipped above"}


def test_the_lab_draws_no_tail_where_nothing_is_clipped_and_no_comb_of_many_levels() -> None:
    record = detail()
    figure = figures.lab_figure(record, tried(record, -9.0, 9.0, bits=16), dark=True)
    assert "nothing is clipped" in title(figure)
    assert {t.name for t in figure.data} == {"float"}
    assert figure.layout.xaxis.range[1] == pytest.approx(7.5, rel=0.05)  # not all the way to 9
    assert "high 9: 0 % clipped ▶" in labels(figure)
    near = figures.lab_figure(record, tried(record, -2.0, 2.0))
    assert len(trace(near, "levels", drawn=True).x) == 256


@pytest.mark.parametrize("dark", [False, True])
def test_the_lab_is_drawn_whatever_the_tensor_holds(dark: bool) -> None:
    empty = detail(np.empty(0), nonfinite=12, count=12)
    flat = detail(np.zeros(50), edges=[0.0, 0.0], float_counts=[50], quantized_counts=[50])
    hostile = detail(tensor="<b>x</b>")
    for record in (empty, flat, hostile, {"tensor": "x"}):
        for name in SCHEMES:
            known = distribution_of_detail(record)
            figure = figures.lab_figure(record, trial(known, SCHEMES[name], -1, 1), dark=dark)
            assert title(figure)
            assert "<b>x</b>" not in title(figure)
            json.loads(figure.to_json())
            figures.figure_csv(figure)


def test_scheme_bars_are_best_first_with_mistakes_above_what_was_meant() -> None:
    known = distribution_of_detail(detail())
    found = compare_schemes(known, -1.5, 1.5)
    figure = figures.scheme_bars(found, selected="ort-uint8")
    bars = trace(figure, "SQNR")
    label = list(figure.layout.yaxis.ticktext)
    at = label.index("Intel's table uint8 symmetric, published")
    assert label[at + 1] == "Intel's table uint8 symmetric, correct"
    row = next(r for r in found if r.scheme.name == "intel-uint8-symmetric")
    assert row.correct is not None
    assert bars.meta["x"][at : at + 2] == [row.published.sqnr_db, row.correct.sqnr_db]
    assert [bars.marker.pattern.shape[i] for i in (at, at + 1)] == ["/", ""]
    assert row.scheme.error in bars.hovertext[at]
    assert bars.customdata[at : at + 2] == ("intel-uint8-symmetric", "ort-uint8-symmetric")
    right = [db for db, name in zip(bars.meta["x"], label, strict=True) if "published" not in name]
    assert right == sorted(right, reverse=True)
    assert bars.marker.line.width[list(bars.customdata).index("ort-uint8")] == 2
    assert title(figure).startswith(f"{label[0]} is best: {right[0]:.1f} dB")
    assert len(rows(figure)) == len(label)


def test_scheme_bars_of_nothing_and_of_exact_values_say_so() -> None:
    assert title(figures.scheme_bars([])) == "No scheme is compared"
    names = ["ort-int8-symmetric", "ort-uint8"]
    exact = compare_schemes(np.zeros(4), 0.0, 0.0, names=names)
    assert title(figures.scheme_bars(exact, True)).startswith("Every scheme is exact")
    alike = compare_schemes(np.linspace(-1, 1, 999), -1, 1, names=["ort-uint8", "affine-uint8"])
    assert ", 1 other within 0.1 dB" in title(figures.scheme_bars(alike))


# --- recipes ---------------------------------------------------------------------------------


def recipe_row(
    label: str,
    db: Any,
    seconds: float | None,
    *,
    size: int = 100_000,
    state: str = "done",
    per_channel: bool = True,
    same_as: str = "",
) -> dict[str, Any]:
    """A row of a "quant-inspector/recipes" table."""
    latency = {"median_seconds": seconds, "spread_seconds": 0.0, "float_seconds": 0.002, "runs": 6}
    return {
        "label": label,
        "state": state,
        "recipe": {"per_channel": per_channel},
        "deployed_sqnr_db": db,
        "unseen_sqnr_db": db,
        "task": None,
        "latency": None if seconds is None else latency,
        "size_bytes": size,
        "same_as": same_as,
    }


def recipe_marks(figure: Any) -> dict[str, tuple[float, float]]:
    """(x, y) of every mark by the name it selects."""
    return {
        name: (x, y)
        for trace in figure.data
        if trace.customdata is not None
        for name, x, y in zip(trace.customdata, trace.x, trace.y, strict=True)
    }


def test_each_recipe_is_a_mark_at_its_time_and_figure_and_its_area_is_its_size() -> None:
    rows = [
        recipe_row("a", 30.0, 0.004, size=400_000),
        recipe_row("b", 29.5, 0.001, per_channel=False),
        recipe_row("c", 12.0, 0.003),
        recipe_row("same", 29.5, 0.001, same_as="b"),
        recipe_row("no time", 20.0, None),
        recipe_row("waits", None, None, state="waiting"),
    ]
    figure = figures.recipes(rows, selected="same", current="c")
    assert recipe_marks(figure) == {"a": (4.0, 30.0), "b": (1.0, 29.5), "c": (3.0, 12.0)}
    assert figure.layout.title.text.startswith(
        "The best recipe gives 30.0 dB in 4 ms; b 29.5 dB in 1 ms"
    )
    by_name = {trace.name: trace for trace in figure.data}
    largest, smallest = by_name["per channel"].marker.size
    assert (largest - 8) / (smallest - 8) == pytest.approx(2)  # a quarter of the bytes
    assert by_name["per tensor"].marker.line.width == (3.0,), "the twin of the selected one"
    assert by_name["per channel"].marker.line.width == (1.0, 1.0)
    assert list(by_name["frontier"].x) == [1.0, 4.0]
    assert {a.text for a in figure.layout.annotations} == {"float 2 ms", "best", "this run"}
    table = list(csv.DictReader(io.StringIO(figures.figure_csv(figure))))
    assert {row["text"]: (row["x"], row["y"]) for row in table} == {
        "a": ("4", "30"),
        "b": ("1", "29.5"),
        "c": ("3", "12"),
    }
    low, high = figure.layout.yaxis.range
    assert low < 12
    assert high > 30


def test_recipes_without_a_number_lie_on_rails() -> None:
    rows = [
        recipe_row("exact", "Infinity", 0.001),
        recipe_row("plain", 20.0, 0.002),
        recipe_row("broken", "NaN", 0.003),
    ]
    figure = figures.recipes(rows, dark=True)
    marks = recipe_marks(figure)
    assert marks["exact"][1] > 50 > marks["plain"][1] > 0 > marks["broken"][1]
    assert "gives exact in 1 ms; none within 1 dB of it is faster" in figure.layout.title.text
    table = list(csv.DictReader(io.StringIO(figures.figure_csv(figure))))
    assert [row["y"] for row in table] == ["Infinity", "20", "NaN"]


def test_a_table_without_a_figure_says_so() -> None:
    assert "No recipe has a figure yet" in figures.recipes([]).layout.title.text
    untimed = figures.recipes([recipe_row("a", 30.0, None)])
    assert "could be timed" in untimed.layout.annotations[0].text
    only = figures.recipes([recipe_row("<b>one</b>", 30.0, 0.001)], current="<b>one</b>")
    assert only.layout.title.text.startswith("The first recipe gives 30.0 dB in 1 ms")
    assert "<b>&lt;b&gt;one" in only.data[1].hovertext[0]
    assert "best, and this run" in {a.text for a in only.layout.annotations}


# --- cause map -----------------------------------------------------------------------------------


def cause(
    name: str, isolated: float | None, accumulated: float, added: float | None = 50.0, **more: Any
) -> ActivationError:
    given = replace(activation(name, accumulated), isolated_sqnr_db=isolated, added_sqnr_db=added)
    return replace(given, **more)


FOUR = [
    cause("own", 5.0, 4.0, 12.0),
    cause("carrier", 35.0, 6.0, INF),
    cause("good", 40.0, 38.0),
    cause("better", 8.0, 30.0),
]


def cause_marks(figure: Any) -> dict[str, tuple[float, float, str]]:
    """By name: where a mark is drawn, and its colour."""
    own = trace(figure, "isolated against accumulated")
    return dict(zip(own.customdata, zip(own.x, own.y, own.marker.color, strict=True), strict=True))


def test_a_cause_map_puts_isolated_across_accumulated_up_and_names_four_corners() -> None:
    figure = figures.cause_map(comparison(FOUR, [output("y", 6.0)]))
    marks = cause_marks(figure)
    assert {name: mark[:2] for name, mark in marks.items()} == {
        "own": (5.0, 4.0), "carrier": (35.0, 6.0), "good": (40.0, 38.0), "better": (8.0, 30.0),
    }  # fmt: skip
    corners = {a.text: (a.x, a.y) for a in figure.layout.annotations if a.text.startswith("<b>")}
    assert corners == {
        "<b>its own fault</b>: 1": (0, 0), "<b>carries others' error</b>: 1": (1, 0),
        "<b>recovers</b>: 1": (0, 1), "<b>fine</b>: 1": (1, 1),
    }  # fmt: skip
    lines = [s for s in figure.layout.shapes if s.type == "line"]
    assert {(s.x0, s.x1) for s in lines} == {(0, 1), (20.0, 20.0)}
    assert {s.y0 for s in lines if s.x1 == 1} == {20.0}
    assert title(figure).startswith("Worst alone is /own/Conv: 5.0 dB<br>")


def test_the_colour_of_a_cause_is_what_the_node_does_itself() -> None:
    late = cause("late", 36.0, 6.0, -3.0)
    moved = cause("moved", 3.0, 2.0, INF, op_type="Transpose")
    unknown = cause("unknown", 25.0, 22.0, None)
    broken = cause("broken", INF, 2.0, NAN)
    figure = figures.cause_map(comparison([*FOUR, late, moved, unknown, broken]))
    color = {name: mark[2] for name, mark in cause_marks(figure).items()}
    assert color["own"] == color["late"] == color["broken"] == figures.ERROR_COLORS[0]
    assert color["carrier"] == figures.error_color(35.0)
    assert color["moved"] == figures.ERROR_COLORS[-1], "it moves values and adds nothing"
    assert color["unknown"] == figures.error_color(25.0)
    assert "Worst alone is /own/Conv" in title(figure), "not the node that only moves values"
    told = dict(zip(*(getattr(trace(figure, "isolated against accumulated"), key)
                      for key in ("customdata", "hovertext")), strict=True))  # fmt: skip
    assert told["own"].endswith("its own fault")
    assert told["carrier"].endswith("carries others' error")
    assert "isolated 36.0 dB · added -3.0 dB" in told["late"]
    assert told["late"].endswith("it adds error or its own Q/DQ does")
    assert told["broken"].endswith("the float node is not finite on what this one reads")


def test_the_worst_causes_are_labelled_each_in_a_row_of_its_own() -> None:
    crowd = [cause(f"/block{i}/part", 3.0 + 0.01 * i, 2.0, 5.0) for i in range(20)]
    figure = figures.cause_map(comparison([*FOUR, *crowd]))
    named = [a for a in figure.layout.annotations if a.showarrow]
    assert [a.text for a in named] == [f"//block{i}/part/Conv" for i in range(8)]
    bottom, top = figure.layout.yaxis.range
    height = figures._plot_height(figure)
    rows = sorted((top - a.y) / (top - bottom) * height + a.ay for a in named)
    assert all(b - a >= 14.9 for a, b in pairwise(rows))
    assert rows[0] >= 0
    assert rows[-1] <= height


def test_nodes_of_the_same_end_get_labels_that_differ() -> None:
    alike = [cause(f"/network/stage{i}/depthwise/act", 5.0, 4.0) for i in range(2)]
    texts = [a.text for a in figures.cause_map(comparison(alike)).layout.annotations if a.showarrow]
    assert texts == ["…/stage0/depthwise/act/Conv", "…/stage1/depthwise/act/Conv"]


def test_of_long_labels_there_are_fewer() -> None:
    path = "/m/encoder/layer.{}/output/LayerNorm/LayerNormalization"
    crowd = [cause(f"t{i}", 3.0 + i, 4.0, node=path.format(i)) for i in range(9)]
    figure = figures.cause_map(comparison(crowd))
    texts = [a.text for a in figure.layout.annotations if a.showarrow]
    assert texts == [f"…/layer.{i}/output/LayerNorm/LayerNormalization" for i in range(4)]
    assert "Worst alone is …/layer.0/output/LayerNorm/LayerNormalization: 3.0 dB" in title(figure)


def test_a_healthy_cause_map_accuses_nobody() -> None:
    fine = comparison([cause("a", 40.0, 35.0), cause("b", 45.0, 33.0)], [output("y", 33.0)])
    figure = figures.cause_map(fine)
    assert title(figure).startswith("No tensor is below 20 dB")
    assert not [a for a in figure.layout.annotations if a.showarrow]
    carried = comparison([cause("a", 40.0, 15.0, INF)], [output("y", 33.0)])
    assert title(figures.cause_map(carried)).startswith(
        "No node is bad alone: 1 tensor carries error from elsewhere, yet the output has 33.0 dB"
    )


def test_a_part_that_a_concat_hides_is_on_the_cause_map() -> None:
    boxes = SliceError(source="boxes", start=0, stop=4, sqnr_db=31.0, absmax=640.0)
    scores = SliceError(source="scores", start=4, stop=14, sqnr_db=0.0, absmax=0.9)
    joined = cause("y", 45.0, 42.0, slices=(boxes, scores), op_type="Concat")
    figure = figures.cause_map(comparison([*FOUR, joined]))
    part = trace(figure, "part of a Concat")
    assert (list(part.customdata), list(part.x), list(part.y)) == (["y"], [45.0], [0.0])
    assert "scores" in labels(figure)
    assert "y hides a part: scores at 0.0 dB under 42.0 dB" in title(figure)


def test_figures_without_a_place_lie_on_rails_of_the_cause_map() -> None:
    odd = [cause("exact", INF, 30.0), cause("nan", NAN, NAN), cause("far", 150.0, -60.0)]
    figure = figures.cause_map(comparison(odd))
    x = dict(zip(figure.layout.xaxis.ticktext, figure.layout.xaxis.tickvals, strict=True))
    y = dict(zip(figure.layout.yaxis.ticktext, figure.layout.yaxis.tickvals, strict=True))
    marks = cause_marks(figure)
    assert marks["exact"][:2] == (x["exact"], 30.0)
    assert marks["nan"][:2] == (x["NaN"], y["NaN"])
    assert marks["far"][:2] == (x[">80"], y["<-20"])
    low, high = figure.layout.xaxis.range
    assert low < x["NaN"] < 0 < 50 < x[">80"] < x["exact"] < high
    assert {(r["text"], r["x"], r["y"], r["z"]) for r in rows(figure)} == {
        ("exact", "Infinity", "30", "50"), ("nan", "NaN", "NaN", "50"),
        ("far", "150", "-60", "50"),
    }  # fmt: skip


def test_the_selected_tensor_and_nodes_left_in_float_are_marked_on_the_cause_map() -> None:
    figure = figures.cause_map(comparison(FOUR), selected="good", excluded=["/better/Conv"])
    ring = trace(figure, "selected", drawn=True)
    assert (list(ring.x), list(ring.y)) == ([40.0], [38.0])
    own = trace(figure, "isolated against accumulated")
    rims = dict(zip(own.customdata, own.marker.line.color, strict=True))
    assert [n for n, c in rims.items() if c == "#7c3aed"] == ["better"]
    unknown = figures.cause_map(comparison(FOUR), selected="nobody")
    assert "selected" not in [t.name for t in unknown.data]


@pytest.mark.parametrize("dark", [False, True])
def test_a_cause_map_without_measured_errors_says_what_to_do(dark: bool) -> None:
    figure = figures.cause_map(comparison(series(30.0, 20.0)), dark)
    assert title(figure) == "Where errors begin is not measured yet"
    assert "Measure it" in labels(figure)[0]
    assert (
        figure.layout.height
        == figures.DEPTH_HEIGHT
        == figures.cause_map(comparison(FOUR)).layout.height
    )
    assert figures.figure_csv(figure).strip() == "trace,x,y,text"
    assert "no activation was matched" in title(figures.cause_map(comparison([])))
    only_added = figures.cause_map(comparison([cause("a", None, 30.0, 20.0)]))
    assert "no node could be run alone" in title(only_added)


def test_names_on_the_cause_map_are_shown_as_they_are_not_as_markup() -> None:
    evil = cause("<b>x</b>\u202e", 2.0, 3.0, node="<i>/n&\u202e</i>")
    figure = figures.cause_map(comparison([evil]), selected=evil.name)
    own = trace(figure, "isolated against accumulated")
    texts = [title(figure), *own.hovertext, *labels(figure)]
    assert not any("<i>" in text or "\u202e" in text for text in texts)
    assert "&lt;i&gt;" in own.hovertext[0]
    assert own.customdata[0] == evil.name
    assert dict(own.meta)["x"] == [2.0]


@given(
    st.lists(
        st.tuples(*[st.floats(-200, 200) | st.sampled_from([NAN, INF, -INF])] * 3), max_size=12
    ),
    st.booleans(),
)
def test_a_cause_map_draws_whatever_the_figures_are(
    numbers: list[tuple[float, float, float]], dark: bool
) -> None:
    found = [cause(f"t{i}", *each) for i, each in enumerate(numbers)]
    figure = figures.cause_map(comparison(found), dark, selected="t0")
    assert len(rows(figure)) == len(found)
    figure.to_json()


def test_the_worst_of_many_causes_are_drawn_and_said_to_be() -> None:
    many = [cause(f"t{i}", 10.0 + i / 100, 12.0, 15.0) for i in range(3000)]
    figure = figures.cause_map(comparison(many), selected="t2999")
    assert "the worst 2,001 of 3,000 are drawn" in title(figure)
    marks = cause_marks(figure)
    assert len(marks) == 2001
    assert {"t0", "t1999", "t2999"} <= marks.keys()
    assert "its own fault</b>: 1,000" in " ".join(labels(figure)), "corners count all of them"
    assert len(rows(figures.cause_map(comparison(many), most=None))) == 3000
    again = figures.cause_map(comparison(many), selected="t2999")
    assert again.to_json() == figure.to_json()


# --- exclusion lists ---------------------------------------------------------------------------

AXES = figures.ListAxes(
    metric="output SQNR", unit="dB", higher_is_better=True, price="MACs in float, %",
    price_unit="% of MACs",
)  # fmt: skip


def lists(*rows: tuple[str, int, float, float]) -> list[figures.ListPoint]:
    return [figures.ListPoint(key=k, nodes=n, figure=f, price=p) for k, n, f, p in rows]


def marks_of(figure: Any, name: str) -> Any:
    return next(t for t in figure.data if t.name == name)


def test_lists_that_no_cheaper_one_beats_are_joined_and_the_others_pale() -> None:
    points = lists(
        ("-", 0, 8.0, 0.0), ("a", 2, 19.0, 1.0), ("b", 9, 18.0, 6.0), ("c", 20, 24.0, 60.0)
    )
    figure = figures.exclusion_lists(points, AXES, goal=20.0, chosen="c", selected="a")
    assert list(marks_of(figure, "front").customdata) == ["-", "a", "c"]
    assert list(marks_of(figure, "beaten").customdata) == ["b"]
    assert figure.layout.title.text.startswith(
        "output SQNR 24.0 dB with 20 nodes in float (60 % of MACs)"
    )
    said = [a.text for a in figure.layout.annotations]
    assert {"goal 20.0 dB", "none in float", "proposed, 20 nodes", "knee, 2 nodes"} <= set(said)
    rims = dict(
        zip(marks_of(figure, "front").customdata, marks_of(figure, "front").marker.line.width,
            strict=True)
    )  # fmt: skip
    assert rims["a"] > rims["c"]


def test_a_goal_that_no_list_reaches_is_said_with_the_best_so_far() -> None:
    figure = figures.exclusion_lists(
        lists(("-", 0, 8.0, 0.0), ("a", 2, 19.0, 1.0), ("all", 30, math.inf, 100.0)),
        AXES,
        goal=25.0,
    )
    assert figure.layout.title.text.startswith(
        "No list tried reaches 25.0 dB; the best gives output SQNR 19.0"
    )


def test_a_lower_figure_is_better_where_the_metric_says_so() -> None:
    axes = replace(AXES, metric="top1_drop", unit="", higher_is_better=False)
    points = lists(("-", 0, 0.5, 0.0), ("a", 2, 0.1, 1.0), ("b", 3, 0.3, 2.0))
    figure = figures.exclusion_lists(points, axes, goal=0.2, chosen="a")
    assert list(marks_of(figure, "front").customdata) == ["-", "a"]
    assert figure.layout.title.text.startswith("top1_drop 0.1 with 2 nodes")


def test_lists_whose_figure_is_not_finite_keep_it_for_the_download() -> None:
    points = lists(("-", 0, math.nan, 0.0), ("a", 2, 19.0, 1.0), ("all", 30, math.inf, 100.0))
    rows = list(
        csv.DictReader(io.StringIO(figures.figure_csv(figures.exclusion_lists(points, AXES))))
    )
    assert {row["y"] for row in rows} == {"19", "Infinity", "NaN"}
    assert len(rows) == 3
    assert "No list has been tried yet" in figures.exclusion_lists([], AXES).layout.title.text
