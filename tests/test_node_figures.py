"""What a node shows: planted records, colours at their limits, the way to the culprit."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inspector import error_scale, figures
from inspector.compare import compare_models
from inspector.comparison import ActivationError, Comparison, Unmatched
from inspector.error_scale import ERROR_COLORS, ERROR_STEPS, contrast_ratio, readable_text
from inspector.feeds import load_feeds
from inspector.matching import match_tensors
from inspector.model_files import load_model
from inspector.node_figures import (
    MEASURES,
    plain_name,
    sheet,
    upstream,
    worst_first,
)
from inspector.node_links import link_nodes
from inspector.render import largest_added_error
from tests.samples import ROOT
from tests.test_render import make_activation, make_comparison

INF, NAN = math.inf, math.nan
MEASURE = {m.key: m for m in MEASURES}


def link(op: str = "Conv", **changes: Any) -> dict[str, Any]:
    given = {"op_type": op, "tensor": "", "scope": "", "partners": [], "serves": False}
    return {**given, "sources": [], "outputs": [], **changes}


def record(name: str, node: str, db: float, **changes: Any) -> ActivationError:
    return make_activation(name, changes.pop("depth", 0), db, node=node, **changes)


def links(float_nodes: dict[str, Any], quantized: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"float": float_nodes, "quantized": quantized or {}}


def compared(*records: ActivationError, **changes: Any) -> Comparison:
    return make_comparison(activations=records, outputs=(), **changes)


# -- the scale -------------------------------------------------------------------------------------


def test_the_scale_of_the_graph_is_that_of_the_pictures() -> None:
    assert figures.error_color is error_scale.error_color
    assert (figures.ERROR_STEPS, figures.ERROR_COLORS) == (ERROR_STEPS, ERROR_COLORS)
    for measure in MEASURES:
        shown = measure.to_json()
        assert shown["colors"] == list(ERROR_COLORS)
        assert len(shown["steps"]) == 4
        assert list(shown["steps"]) == sorted(shown["steps"])
    assert [m.key for m in MEASURES] == [
        "accumulated", "local", "isolated", "added", "sensitivity", "saturated", "seconds"
    ]  # fmt: skip


@given(st.floats(allow_nan=True))
def test_the_colour_of_decibels_is_that_of_every_chart(db: float) -> None:
    index = MEASURE["accumulated"].color_index(db)
    assert ERROR_COLORS[index] == error_scale.error_color(db)


@pytest.mark.parametrize(
    ("key", "value", "index"),
    [
        ("saturated", 0.0, 4), ("saturated", 0.00009, 4), ("saturated", 0.0001, 3),
        ("saturated", 0.001, 2), ("saturated", 0.01, 1), ("saturated", 0.0999, 1),
        ("saturated", 0.1, 0), ("saturated", 1.0, 0), ("saturated", NAN, 0),
        ("seconds", 0.0, 4), ("seconds", 0.01, 3), ("seconds", 0.02, 2), ("seconds", 0.05, 1),
        ("seconds", 0.1, 0), ("local", INF, 4), ("local", -INF, 0), ("local", NAN, 0),
    ],
)  # fmt: skip
def test_the_first_colour_is_the_worst_whatever_direction_is_good(
    key: str, value: float, index: int
) -> None:
    assert MEASURE[key].color_index(value) == index


def test_contrast_is_that_of_wcag() -> None:
    # Pairs whose ratios WCAG's techniques and checkers state.
    assert contrast_ratio("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast_ratio("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)
    assert contrast_ratio("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)
    assert contrast_ratio("#404040", "#ffffff") == pytest.approx(10.37, abs=0.005)
    assert contrast_ratio("#0000ff", "#ffffff") == pytest.approx(8.59, abs=0.005)
    assert contrast_ratio("#ff0000", "#ffffff") == contrast_ratio("#ffffff", "#ff0000")


@given(st.integers(0, 2**24 - 1))
def test_text_is_readable_on_any_colour(number: int) -> None:
    color = f"#{number:06x}"
    text = {"#fff": "#ffffff", "#000": "#000000"}[readable_text(color)]
    other = {"#ffffff": "#000000", "#000000": "#ffffff"}[text]
    assert contrast_ratio(color, text) >= max(4.5, contrast_ratio(color, other))


def test_every_colour_of_the_sheet_names_its_readable_text() -> None:
    shown = sheet(compared(), links({}))
    for color, text in zip(shown["measures"][0]["colors"], shown["measures"][0]["texts"],
                           strict=True):  # fmt: skip
        assert contrast_ratio(color, {"#fff": "#ffffff", "#000": "#000000"}[text]) >= 4.5
    assert shown["no_figure"] == error_scale.NO_FIGURE_COLOR


# -- figures ---------------------------------------------------------------------------------------


def test_a_node_shows_the_worst_of_its_tensors_per_measure() -> None:
    comparison = compared(
        record("s1", "split", 30.0, local=12.0, saturated_fraction=0.2, isolated_sqnr_db=NAN),
        record("s2", "split", 15.0, local=50.0, saturated_fraction=0.1, isolated_sqnr_db=5.0),
        record("s3", "split", INF, local=None, saturated_fraction=None, added_sqnr_db=33.0),
    )
    shown = sheet(comparison, links({"split": link("Split", outputs=["s1", "s2", "s3"])}))
    assert shown["sides"]["float"]["split"]["figures"] == {
        "accumulated": 15.0, "local": 12.0, "saturated": 0.2, "isolated": "NaN", "added": 33.0,
    }  # fmt: skip
    json.dumps(shown, allow_nan=False)


def test_not_finite_figures_are_strict_json_words() -> None:
    comparison = compared(
        record("a", "a", INF, local=-INF, saturated_fraction=None),
        record("b", "b", NAN, local=None, saturated_fraction=None),
    )
    shown = sheet(comparison, links({"a": link(), "b": link()}))["sides"]["float"]
    assert shown["a"]["figures"] == {"accumulated": "Infinity", "local": "-Infinity"}
    assert shown["b"]["figures"] == {"accumulated": "NaN"}
    assert "accumulated exact" in shown["a"]["tip"]
    assert "accumulated NaN" in shown["b"]["tip"]


PAIR = links(
    {
        "conv": link(tensor="r", partners=["qconv", "dq_w", "q", "dq"], outputs=["c"]),
        "relu": link("Relu", tensor="r", partners=["qconv"], outputs=["r"], sources=["conv"]),
        "lone": link("Exp", outputs=["e"]),
        "shape": link("Shape", outputs=["s"]),
        "folded": link("Identity", outputs=["c2"]),
    },
    {
        "q_x": link("QuantizeLinear", tensor="x", partners=["conv"], serves=True),
        "dq_w": link("DequantizeLinear", tensor="r", partners=["conv"], serves=True, outputs=["w"]),
        "qconv": link(tensor="r", partners=["conv", "relu"], outputs=["qc"]),
        "q": link("QuantizeLinear", tensor="r", partners=["conv"], serves=True, outputs=["r_q"]),
        "dq": link("DequantizeLinear", tensor="r", partners=["conv"], serves=True,
                   outputs=["r_dq"]),
        "extra": link("Mul", outputs=["odd"]),
    },
)  # fmt: skip
PAIR_RECORDS = (
    record("x", "", 45.0, op_type="Input", depth=-1),
    record("r", "relu", 12.25, saturated_fraction=0.004, saturated_low_fraction=0.0,
           saturated_high_fraction=0.004),
)  # fmt: skip
LOST = (
    Unmatched(name="c", kind="activation", model="float", reason="fused into r", fused_into="r"),
    Unmatched(name="c2", kind="activation", model="float", reason="fused", fused_into="r"),
    Unmatched(name="e", kind="activation", model="float", reason="inside a\nfused part"),
)


def test_fused_nodes_and_quantized_nodes_show_what_they_stand_for() -> None:
    shown = sheet(compared(*PAIR_RECORDS, unmatched=LOST), PAIR)["sides"]
    whole = shown["float"]["relu"]["figures"]
    assert whole["accumulated"] == 12.25
    for side, name in (("float", "conv"), ("quantized", "qconv"), ("quantized", "q"),
                       ("quantized", "dq"), ("quantized", "dq_w")):  # fmt: skip
        assert shown[side][name]["figures"] == whole
    assert shown["quantized"]["q_x"]["figures"]["accumulated"] == 45.0, "the input's own"
    assert shown["quantized"]["extra"]["figures"] == shown["float"]["lone"]["figures"] == {}
    assert shown["float"]["conv"]["partners"] == ["qconv", "dq_w", "q", "dq"]
    assert shown["quantized"]["qconv"]["op"] == "Conv"


def test_what_stands_for_nothing_is_marked() -> None:
    shown = sheet(compared(*PAIR_RECORDS, unmatched=LOST), PAIR)["sides"]
    marked = {(s, n) for s, nodes in shown.items() for n, each in nodes.items() if each["marks"]}
    assert marked == {("float", "lone"), ("quantized", "extra")}
    assert shown["float"]["lone"]["marks"] == shown["quantized"]["extra"]["marks"] == ["unmatched"]
    assert "unmatched: inside a fused part" in shown["float"]["lone"]["tip"].splitlines()


@pytest.mark.parametrize(
    ("status", "mark"),
    [
        ("float now", ["float again"]),
        ("still fed by Q/DQ", ["still wrapped"]),
        ("weight still quantized", ["still wrapped"]),
        ("nothing changed", []),
        ("no such node", []),
    ],
)
def test_marks_say_what_an_exclusion_really_did_on_both_sides(status: str, mark: Any) -> None:
    for name in ("conv", "qconv"):
        effects = [{"name": name, "status": status, "details": []}]
        shown = sheet(compared(*PAIR_RECORDS, unmatched=LOST), PAIR, effects=effects)["sides"]
        assert shown["float"]["conv"]["marks"] == shown["quantized"]["qconv"]["marks"] == mark
        assert shown["quantized"]["q"]["marks"] == []
        assert all(word in shown["float"]["conv"]["tip"].splitlines() for word in mark)


def test_a_tip_is_lines_of_plain_text_with_units_and_direction() -> None:
    hostile = "</script>\n\x1b[31m\u202e" + "n" * 200
    nodes = {hostile: link(outputs=["t"])}
    comparison = compared(
        record("t", hostile, 12.345, local=40.0, saturated_fraction=0.0052,
               saturated_low_fraction=0.0002, saturated_high_fraction=0.005)
    )  # fmt: skip
    profile = {"float": {"simulated": {
        "times": {"nodes": [{"seconds": 0.001}, {"seconds": 0.003}]}, "tensors": {"t": 0.001},
    }}}  # fmt: skip
    shown = sheet(comparison, links(nodes), profile=profile)["sides"]["float"][hostile]
    lines = shown["tip"].split("\n")
    assert lines[0].startswith("Conv </script>  [31m nnn")
    assert lines[0].endswith("n…")
    assert lines[1:] == [
        "tensor t",
        "accumulated 12.3 dB",
        "local 40.0 dB",
        "saturated 0.520 % of the values (clipped below 0.020 %, above 0.500 %)",
        "time 25.0 % of the run, 1.000 ms",
        "dB: higher is better",
    ]
    assert plain_name("a" * 120) == "a" * 120
    assert len(plain_name("a" * 121)) == 120


def test_time_is_the_share_of_a_models_own_run_with_its_q_and_dq() -> None:
    def side(seconds: dict[str, float], *nodes: float) -> Any:
        return {"tensors": seconds, "times": {"nodes": [{"seconds": s} for s in nodes]}}

    profile = {
        "float": {"simulated": side({"c": 0.2, "r": 0.1}, 0.3, 0.2), "deployed": {"error": "no"}},
        "quantized": {"simulated": side({"qc": 0.9, "r_q": 0.9, "r_dq": 0.9}, 0.4, 0.4, 1.2)},
    }
    shown = sheet(compared(*PAIR_RECORDS), PAIR, profile=profile)["sides"]
    took = {n: e["figures"].get("seconds") for s in shown.values() for n, e in s.items()}
    assert took["conv"] == pytest.approx(0.4)
    assert took["relu"] == pytest.approx(0.2)
    for name in ("qconv", "q", "dq", "dq_w", "q_x"):
        assert took[name] == pytest.approx(0.45), "a weight's DQ takes what its reader takes"
    assert took["lone"] is took["extra"] is None
    deployed = sheet(compared(*PAIR_RECORDS), PAIR, profile=profile, how="deployed")["sides"]
    assert all("seconds" not in e["figures"] for s in deployed.values() for e in s.values())


def test_sensitivity_is_shown_by_the_node_and_by_its_partner() -> None:
    rows = [
        {"nodes": ["conv"], "only": {"both": {"figure": 21.5}}},
        {"nodes": ["relu"], "only": {}},
        {"nodes": ["lone"], "only": {"both": {"figure": "Infinity"}}},
    ]
    shown = sheet(compared(*PAIR_RECORDS), PAIR, sensitivity={"rows": rows})["sides"]
    found = {n: e["figures"].get("sensitivity") for s in shown.values() for n, e in s.items()}
    assert (found["conv"], found["qconv"], found["lone"]) == (21.5, 21.5, "Infinity")
    assert found["relu"] is found["q"] is found["dq"] is None
    assert "sensitivity 21.5 dB" in shown["float"]["conv"]["tip"]


def test_a_node_in_a_body_takes_nothing_from_a_main_node_of_its_name() -> None:
    nodes = {"a/b": link(scope="a/then_branch", outputs=["t"])}
    shown = sheet(compared(record("t", "a/b", 3.0)), links(nodes))["sides"]["float"]["a/b"]
    assert shown["figures"] == {}
    assert shown["marks"] == []
    assert "inside a body" in shown["tip"]


def test_an_empty_comparison_gives_an_empty_sheet() -> None:
    shown = sheet(compared(), links({}))
    assert shown["sides"] == {"float": {}, "quantized": {}}
    assert sheet(compared(), PAIR)["sides"]["float"]["conv"]["figures"] == {}


# -- from one to the next --------------------------------------------------------------------------


def side_of(**values: Any) -> dict[str, Any]:
    return {n: {"figures": {} if v is None else {"local": v, "saturated": v}}
            for n, v in values.items()}  # fmt: skip


def test_nodes_are_ranked_from_the_worst_to_the_best() -> None:
    side = side_of(good="Infinity", none=None, low=3.0, bad="NaN", same=3.0, far="-Infinity")
    assert worst_first(side, "local") == ["bad", "far", "low", "same", "good"]
    assert worst_first(side_of(a=0.1, b=0.3, c=0.2), "saturated") == ["b", "c", "a"]
    assert worst_first(side_of(a=None), "local") == worst_first({}, "local") == []


def row(*names: str, **sources: list[str]) -> dict[str, Any]:
    """Float nodes one after the other, each reading the one before or what `sources` says."""
    found = {}
    for at, name in enumerate(names):
        before = [names[at - 1]] if at else []
        found[name] = link(sources=sources.get(name, before), outputs=[name])
    return links(found, {"q": link(partners=[names[-1]]), "lost": link("Mul")})


def test_upstream_finds_the_planted_culprit_and_stays_there() -> None:
    graph = row("a", "culprit", "b", "c")
    comparison = compared(
        record("a", "a", 40.0, added_sqnr_db=40.0),
        record("culprit", "culprit", 8.0, added_sqnr_db=8.1),
        record("b", "b", 8.3, added_sqnr_db=30.0),
        record("c", "c", 7.9, added_sqnr_db=25.0),
    )
    for start in ("c", "b", "culprit", "q"):
        assert upstream(comparison, graph, start) == "culprit"
    assert upstream(comparison, graph, "a") == "a", "nothing behind it is to blame"
    assert upstream(comparison, graph, "lost") == upstream(comparison, graph, "nobody") == ""


def test_an_error_that_dies_on_the_way_explains_nothing() -> None:
    # A gate: its own noise is large, but after "sum" hardly any of it is left.
    graph = row("a", "gate", "sum", "conv", "y", sum=["a", "gate"])
    comparison = compared(
        record("a", "a", 45.0, added_sqnr_db=45.0),
        record("gate", "gate", 1.0, added_sqnr_db=1.0),
        record("sum", "sum", 40.0, added_sqnr_db=44.0),
        record("conv", "conv", 15.0, added_sqnr_db=15.1),
        record("y", "y", 14.9, added_sqnr_db=40.0),
    )
    assert upstream(comparison, graph, "y") == "conv"
    assert upstream(comparison, graph, "sum") == "gate", "there it is most of what is left"


def test_noise_takes_the_best_way_past_a_node_that_shows_none() -> None:
    # The culprit is read by "still", which hides its noise, and directly by "sum".
    graph = row("culprit", "still", "sum", sum=["still", "culprit"])
    comparison = compared(
        record("culprit", "culprit", 5.0, added_sqnr_db=5.0),
        record("still", "still", 60.0, added_sqnr_db=60.0),
        record("sum", "sum", 6.0, added_sqnr_db=20.0),
    )
    assert upstream(comparison, graph, "sum") == "culprit"


def test_only_ancestors_are_blamed() -> None:
    graph = row("a", "b", "other", other=["a"])
    comparison = compared(
        record("a", "a", 40.0, added_sqnr_db=40.0),
        record("b", "b", 30.0, added_sqnr_db=31.0),
        record("other", "other", 0.0, added_sqnr_db=0.0),
    )
    assert upstream(comparison, graph, "b") == "b"


def test_without_added_errors_the_growth_of_the_noise_decides() -> None:
    graph = row("first", "a", "culprit", "b", "c")
    comparison = compared(
        record("first", "first", 60.0),  # from exact: in dB the largest fall of all
        record("a", "a", 38.0),
        record("culprit", "culprit", 12.0),
        record("c", "c", 10.0),
    )
    assert upstream(comparison, graph, "c") == "culprit", "b has no figure and is looked through"
    assert upstream(comparison, graph, "b") == "culprit"
    assert upstream(comparison, graph, "a") == "a"
    assert upstream(compared(), graph, "c") == ""


def test_nan_comes_from_where_it_begins() -> None:
    graph = row("a", "log", "b", "c")
    spoiled = (record("a", "a", 40.0, added_sqnr_db=40.0),
               record("log", "log", NAN, added_sqnr_db=NAN),
               record("b", "b", NAN, added_sqnr_db=NAN),
               record("c", "c", NAN, added_sqnr_db=30.0))  # fmt: skip
    assert upstream(compared(*spoiled), graph, "c") == "log"
    grown = tuple(record(r.name, r.node, r.accumulated_sqnr_db) for r in spoiled)
    assert upstream(compared(*grown), graph, "c") == "log"


def test_silence_and_harmless_masks_are_no_culprits() -> None:
    graph = row("a", "mask", "zero", "b")
    comparison = compared(
        record("a", "a", 20.0, added_sqnr_db=20.5),
        record("mask", "mask", 25.0, added_sqnr_db=NAN),
        record("zero", "zero", -INF, added_sqnr_db=-INF),
        record("b", "b", 19.0, added_sqnr_db=40.0),
    )
    assert upstream(comparison, graph, "b") == "a"


def test_of_a_fused_group_the_node_that_the_figures_name_is_found() -> None:
    graph = row("conv", "relu", "b")
    graph["float"]["conv"]["tensor"] = "relu"
    comparison = compared(
        record("relu", "relu", 9.0, added_sqnr_db=9.0), record("b", "b", 8.8, added_sqnr_db=30.0)
    )
    assert upstream(comparison, graph, "b") == "relu"


def test_on_a_bundled_pair_the_graph_shows_the_comparisons_figures() -> None:
    folder = ROOT / "sample_models" / "digit-detector"
    models = load_model(folder / "float.onnx"), load_model(folder / "quantized.onnx")
    feeds = load_feeds(folder / "feeds", models[0], limit=4)
    comparison = compare_models(
        *models, feeds, measure_latency=False, explain_deployed=False, isolated=True
    )
    made = link_nodes(*models, match_tensors(*models)).to_json()
    shown = sheet(comparison, made)["sides"]
    for activation in comparison.activations:
        if activation.node:
            own = shown["float"][activation.node]["figures"]
            assert own["accumulated"] <= activation.accumulated_sqnr_db
            its = made["float"][activation.node]["partners"][0]
            assert shown["quantized"][its]["figures"] == own
    worst, _ = largest_added_error(comparison)
    assert worst is not None
    end = next(a for a in comparison.activations if a.is_output)
    # The tensor is a folded Relu's; the node that is quantized, and named, is the one before it.
    found = upstream(comparison, made, end.node)
    assert made["float"][found]["partners"][0] == made["float"][worst.node]["partners"][0]
    assert found == made["float"][worst.node]["partners"][0]


def test_a_join_with_a_silent_part_is_marked_and_comes_first() -> None:
    """The bundled detector: 42 dB pooled hide scores that are all zero."""
    folder = ROOT / "sample_models" / "digit-detector"
    models = load_model(folder / "float.onnx"), load_model(folder / "quantized.onnx")
    feeds = load_feeds(folder / "feeds", models[0], limit=4)
    comparison = compare_models(*models, feeds, measure_latency=False, explain_deployed=False)
    made = link_nodes(*models, match_tensors(*models)).to_json()
    nodes = sheet(comparison, made)["sides"]
    join = "/head/Concat_3"
    for side in ("float", "quantized"):
        shown = nodes[side][join]
        assert shown["figures"]["accumulated"] > 40
        assert shown["judged"] < 1
        assert shown["marks"] == ["worse part"]
        assert "a part that it joins is worse: /head/Sigmoid_output_0 0.0 dB" in shown["tip"]
    assert worst_first(nodes["float"], "accumulated")[0] == join
    assert worst_first(nodes["float"], "local")[0] != join
