"""What one figure hides, edge values, and the traps of calibration and of exclusions.

The truth is that of `known_pairs`. Every known trap and the test that keeps it shut; a test below
checks that the names exist.

Calibrating once, quantizing often:
    the public and the in-memory route give one graph: test_quantize.test_the_bytes_are_those_of_the_public_function
    the quantizer overwrites the ranges it is given: test_ranges_serve_recipe_after_recipe_unchanged
    all tensors are calibrated, lists excluded or not: test_quantize.test_excluded_names_reach_the_public_function
    ranges on disk are checked for the method only: test_calibration.test_ranges_of_a_model_with_other_weights_are_not_reused
    ... and for no other option: test_calibration.test_every_argument_that_changes_a_range_changes_the_key
    <name>-inferred.onnx is written beside the model: test_calibration.test_nothing_is_written_beside_the_model_or_into_the_current_folder
    ... also while quantizing: test_quantize.test_the_users_folders_loggers_and_screen_are_left_alone
    re-quantizing runs samples again: test_quantize.test_a_second_recipe_reuses_the_ranges
    CalibMaxIntermediateOutputs drops data: test_every_sample_counts_in_calibration_however_many
    histograms fail on ragged samples, here they do not: test_calibration.test_samples_of_unequal_shape_are_calibrated_as_their_values_in_one
    ... also ragged inside the model: test_calibration.test_a_tensor_that_is_ragged_inside_the_model_is_calibrated
    histograms fail on infinity: test_calibration.test_an_infinite_activation_is_said_with_the_tensor
    a Percentile cache stores counts under the names of ranges: test_percentile_ranges_from_disk_are_real_values
    MinMax leaves NaN out: test_a_nan_that_calibration_left_out_is_named_when_comparing
    ... NaN in a feed: test_calibration.test_a_feed_that_is_not_finite_is_refused_by_name
    MinMax lets infinity through: test_calibration.test_an_infinite_activation_is_said_with_the_tensor
    calibrated on zeros alone the scale is 1: test_a_scale_from_zeros_alone_shows_its_true_error
    the guard of int32 biases can zero a weight: test_a_weight_zeroed_for_its_bias_has_zero_decibels
    dynamic quantization renames Gemm g to g_MatMul: test_quantize.test_excluding_a_gemm_from_dynamic_quantization_excludes_it
    per channel below opset 13 does not load: test_quantize.test_per_channel_loads_on_models_where_the_public_function_writes_files_that_do_not
    ... nor float16 at opset 17: test_quantize.test_a_result_that_does_not_load_is_an_error_and_leaves_the_old_file

Exclusions:
    an excluded node still reads dequantized values: test_exclusions.test_a_node_between_quantized_neighbours_is_still_fed
    its output stays quantized where a neighbour needs it: test_exclusions.test_a_node_between_quantized_neighbours_is_still_fed
    a shared weight stays int8: test_exclusions.test_a_shared_weight_stays_quantized_and_the_sharer_is_named
    without its Conv a Relu is freed as well: test_exclusions.test_excluding_a_conv_frees_its_relu_and_this_is_said
    excluding a Relu adds a pair with another range: test_exclusions.test_excluding_only_a_relu_adds_a_pair_and_this_is_said
    ... whose range is that before the Relu: test_the_pair_that_an_excluded_relu_adds_has_the_range_before_it
    unknown names are accepted: test_quantize.test_an_unknown_name_is_an_error_with_the_nearest_names
    ... also read back: test_exclusions.test_a_name_that_is_not_there_gets_the_nearest
    '' excludes every unnamed node: test_exclusions.test_an_entry_that_means_nothing_is_an_error
    float now: test_exclusions.test_a_node_whose_neighbours_are_out_as_well_is_float
    nothing changed: test_exclusions.test_a_node_that_was_float_anyway_is_said_to_be_unchanged

What one figure hides:
    pooling: test_pooled_median_and_worst_sample_stand_side_by_side
    a softmax: test_a_softmax_is_measured_at_its_logits_too
    seen feeds: test_seen_and_unseen_feeds_have_figures_of_their_own
    boxes and scores in one Concat: test_silent_scores_beside_boxes_show_in_slices_and_channels
    a mask of -1e4: test_a_mask_of_minus_ten_thousand_shows_in_the_channels
    channel ranges of 336 to 1: test_unequal_channels_of_a_depthwise_weight_show_in_the_channels
"""  # noqa: E501

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import quantize_static

from inspector.calibration import calibrate
from inspector.feeds import Feeds, load_feeds
from inspector.model import Model
from inspector.model_files import load_model
from inspector.quantize import quantize_model
from inspector.recipe import QuantConfig
from tests.known_pairs import (
    IMAGES,
    Arrays,
    Pair,
    Reader,
    activation_of,
    by_hand,
    channel_truth,
    check_activation,
    check_channels,
    check_outputs,
    close,
    constants,
    db,
    debugger_activations,
    debugger_weights,
    lower_median,
    static,
    weight_of,
)
from tests.samples import (
    PEAK_BYTES,
    ROOT,
    array,
    boxes_and_scores_in_one_concat,
    conv_relu_gemm,
    floats,
    model,
    npz_folder,
    save,
)


def test_every_trap_named_above_has_its_test() -> None:
    named = re.findall(r"\b(?:(test_\w+)\.)?(test_\w+)$", __doc__ or "", re.MULTILINE)
    assert len(named) > 35
    for file, test in named:
        path = Path(__file__).with_name(f"{file}.py") if file else Path(__file__)
        assert f"\ndef {test}(" in path.read_text(encoding="utf-8"), f"{file} {test}"


# -- half precision ----------------------------------------------------------------------------


def halves(folder: Path) -> Pair:
    """float16 throughout: y = x * gain, with the weight and the product quantized."""

    def proto(quantized: bool) -> onnx.ModelProto:
        nodes = [helper.make_node("Cast", ["x"], ["h"], "half", to=TensorProto.FLOAT16)]
        gain = np.linspace(100, 300, 500).astype(np.float16)
        step = np.float16(2.5)
        if quantized:
            codes = np.clip(np.rint(gain.astype(np.float64) / 2.5), 0, 255).astype(np.uint8)
            given = [array("gain_quantized", codes), array("s", step), array("z", np.uint8(0)),
                     array("ms", np.float16(8)), array("mz", np.uint8(120))]  # fmt: skip
            nodes += [
                helper.make_node("DequantizeLinear", ["gain_quantized", "s", "z"],
                                 ["gain_DequantizeLinear_Output"], "dqw"),
                helper.make_node("Mul", ["h", "gain_DequantizeLinear_Output"], ["m"], "mul"),
                helper.make_node("QuantizeLinear", ["m", "ms", "mz"],
                                 ["m_QuantizeLinear_Output"], "q"),
                helper.make_node("DequantizeLinear", ["m_QuantizeLinear_Output", "ms", "mz"],
                                 ["m_DequantizeLinear_Output"], "dq"),
                helper.make_node("Neg", ["m_DequantizeLinear_Output"], ["n"], "neg"),
            ]  # fmt: skip
        else:
            given = [array("gain", gain)]
            nodes += [helper.make_node("Mul", ["h", "gain"], ["m"], "mul"),
                      helper.make_node("Neg", ["m"], ["n"], "neg")]  # fmt: skip
        nodes.append(helper.make_node("Cast", ["n"], ["y"], "back", to=TensorProto.FLOAT))
        return model(nodes, [("x", [500])], [("y", [500])], given, opset=21)

    return by_hand(folder, proto(False), proto(True), [{"x": floats((500,), s)} for s in range(2)])


def test_half_precision_has_its_true_figures(tmp_path: Path) -> None:
    """The debugger's norm overflows in float16: inf dB or an error."""
    pair = halves(tmp_path)
    result = pair.compared()
    reference = constants(onnx.load(tmp_path / "f.onnx"))["gain"]
    truth = db([reference], [pair.integers("gain_quantized")])
    assert weight_of(result, "gain").sqnr_db == close(truth)
    assert math.isfinite(truth)
    found = check_activation(pair, result, "m", "m", "m_DequantizeLinear_Output")
    assert found.local_sqnr_db is not None
    assert 25 < found.local_sqnr_db < 60
    (output,) = result.outputs
    assert output.sqnr_db == close(db(pair.tensor("f", "y"), pair.tensor("q", "y")))


def test_the_debugger_overflows_in_half_precision(tmp_path: Path) -> None:
    pair = halves(tmp_path)
    assert debugger_weights(pair)["gain"] == math.inf
    assert debugger_activations(pair)["m"]["qdq_err"] == math.inf


# -- NaN, infinity and zeros -------------------------------------------------------------------


def endless(folder: Path, op_type: str, feeds: Sequence[Sequence[float]]) -> Pair:
    """y = -op(x), everything quantized with ranges from finite values."""
    proto = model(
        [helper.make_node(op_type, ["x"], ["s"], "op"), helper.make_node("Neg", ["s"], ["y"], "n")],
        [("x", [3])], [("y", [3])],
    )  # fmt: skip
    return static(
        folder, proto, [{"x": np.float32(f)} for f in feeds],
        calibration=[{"x": np.float32([0, 1, 4])}], op_types_to_quantize=[op_type, "Neg"],
    )  # fmt: skip


ENDLESS = {"NaN": ("Sqrt", -4.0), "infinity": ("Exp", 1000.0)}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_is_not_finite_is_unknown_and_named_and_spoils_no_other_sample(
    tmp_path: Path, kind: str
) -> None:
    """The debugger gives nan or stops with a ValueError, without the place."""
    op_type, bad = ENDLESS[kind]
    pair = endless(tmp_path, op_type, [[0.1, 1, 3.3], [0.2, bad, 3.1]])
    result = pair.compared()
    (output,) = result.outputs
    assert math.isnan(output.sqnr_db)
    assert math.isnan(activation_of(result, "s").accumulated_sqnr_db)
    first = db(pair.tensor("f", "y")[:1], pair.tensor("q", "y")[:1])
    assert output.per_sample_sqnr_db[0] == close(first)
    assert math.isfinite(first)
    assert math.isnan(output.per_sample_sqnr_db[1])
    records = {(r.model, r.tensor): r for r in result.nonfinite}
    assert set(records) == {("float", "s"), ("float", "y")}
    assert records["float", "s"].origin
    assert (records["float", "s"].node, records["float", "s"].first_sample) == ("op", "01.npz")
    # The input itself is finite in both.
    check_activation(pair, result, "x", "x", "x_DequantizeLinear_Output")


def test_zero_against_zero_is_without_error(tmp_path: Path) -> None:
    """The debugger says 0.0 dB."""
    pair = endless(tmp_path, "Sqrt", [[0, 0, 0]])
    result = pair.compared()
    assert not np.any(pair.tensor("q", "y")[0])
    for found in result.activations:
        assert (found.local_sqnr_db, found.accumulated_sqnr_db) == (math.inf, math.inf)
    assert result.outputs[0].sqnr_db == math.inf


@pytest.mark.parametrize("kind", ENDLESS)
def test_the_debugger_has_no_answer_to_what_is_not_finite(tmp_path: Path, kind: str) -> None:
    op_type, bad = ENDLESS[kind]
    pair = endless(tmp_path, op_type, [[0.1, 1, 3.3], [0.2, bad, 3.1]])
    try:
        found = debugger_activations(pair)
    except ValueError:
        return
    assert math.isnan(found["s"]["xmodel_err"])


def test_the_debugger_gives_no_decibels_to_zero_against_zero(tmp_path: Path) -> None:
    pair = endless(tmp_path, "Sqrt", [[0, 0, 0]])
    assert debugger_activations(pair)["s"] == {"qdq_err": 0.0, "xmodel_err": 0.0}


# -- memory ------------------------------------------------------------------------------------

PEAK = (
    PEAK_BYTES
    + """
import sys
from pathlib import Path
import tests.known_pairs as known
who, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
pair = known.Pair(folder=folder, feeds=[{"x": known.floats((1, 3, 160, 160))}] * count)
pair.compared() if who == "ours" else known.debugger_activations(pair)
print(peak_bytes() // 2**20)
"""
)


def wide_chain(folder: Path) -> None:
    """Ten activations of 0.3 MB each in the float model, and their twins."""
    nodes, names = [], ["x", *(f"t{n}" for n in range(9)), "y"]
    for at, (a, b) in enumerate(pairwise(names)):
        nodes.append(helper.make_node("Conv", [a, "w"], [b], f"conv{at}"))
    ends = [("x", [1, 3, 160, 160])], [("y", [1, 3, 160, 160])]
    weight = array("w", np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1))
    static(folder, model(nodes, *ends, [weight]), [{"x": floats((1, 3, 160, 160))}])


def peaks(folder: Path, who: str) -> list[int]:
    """Peak memory in MB for 2 and for 22 samples."""
    wide_chain(folder)
    found = []
    for count in ("2", "22"):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, who, count, str(folder)],
            capture_output=True, text=True, check=True, cwd=ROOT,
        )  # fmt: skip
        found.append(int(done.stdout.splitlines()[-1]))
    return found


def test_memory_does_not_grow_with_samples(tmp_path: Path) -> None:
    """The debugger keeps every activation of every sample, then copies them."""
    few, many = peaks(tmp_path, "ours")
    # All tensors of 20 more samples would be 20 * 31 * 0.3 MB.
    assert many - few < 40


def test_the_debugger_keeps_every_sample_in_memory(tmp_path: Path) -> None:
    few, many = peaks(tmp_path, "debugger")
    assert many - few > 100


# -- what one figure hides: pooling, seen and unseen, three collapses --------------------------


def test_pooled_median_and_worst_sample_stand_side_by_side(tmp_path: Path) -> None:
    """One loud sample makes nearly all of the noise; the mean of dB is none of the three."""
    quiet = [{"x": floats((1, 3, 8, 8), s)} for s in range(6)]
    feeds = [*quiet, {"x": floats((1, 3, 8, 8), 9, 12)}]
    pair = static(tmp_path, conv_relu_gemm(), feeds, calibration=quiet)
    output = check_outputs(pair, pair.compared())["y"]
    each = [db([a], [b]) for a, b in zip(pair.tensor("f", "y"), pair.tensor("q", "y"), strict=True)]
    assert output.median_sample_sqnr_db == close(lower_median(each))
    assert output.worst_sample_sqnr_db == close(min(each)) == close(each[6])
    assert output.worst_sample == "06.npz"
    assert output.sqnr_db < lower_median(each) - 15
    assert abs(output.sqnr_db - float(np.mean(each))) > 10


def test_a_softmax_is_measured_at_its_logits_too(tmp_path: Path) -> None:
    """A saturated softmax hides what its logits lose."""
    proto = product(gain=3)
    proto.graph.node[0].output[0] = "logits"
    proto.graph.node.append(helper.make_node("Softmax", ["logits"], ["y"], "softmax"))
    pair = static(tmp_path, proto, [{"x": floats((2, 8), s)} for s in range(3)])
    result = pair.compared()
    check_activation(pair, result, "logits", "logits", "logits_DequantizeLinear_Output")
    check_activation(pair, result, "y", "y_QuantizeLinear_Input", "y")
    check_outputs(pair, result)


def test_seen_and_unseen_feeds_have_figures_of_their_own(tmp_path: Path) -> None:
    """Ranges of the first feeds flatter these: the others are clipped."""
    feeds = [{"x": floats((1, 3, 8, 8), s, 1 if s < 3 else 4)} for s in range(6)]
    pair = static(tmp_path, conv_relu_gemm(), feeds, calibration=feeds[:3])
    seen = [True] * 3 + [False] * 3
    result = pair.compared(seen=seen)
    assert result.seen == "mixed"
    output = check_outputs(pair, result)["y"]
    sides = [pair.tensor(file, "y") for file in ("f", "q")]
    assert output.seen_sqnr_db == close(db(*(s[:3] for s in sides)))
    assert output.unseen_sqnr_db == close(db(*(s[3:] for s in sides)))
    assert output.seen_sqnr_db is not None
    assert output.unseen_sqnr_db is not None
    assert output.seen_sqnr_db > output.unseen_sqnr_db + 10


def test_silent_scores_beside_boxes_show_in_slices_and_channels(tmp_path: Path) -> None:
    """Boxes and scores in one Concat: the whole is fine and every score is 0."""
    feeds = [{"x": floats((1, 3, 6, 6), s)} for s in range(3)]
    pair = static(tmp_path, boxes_and_scores_in_one_concat(), feeds)
    output = check_outputs(pair, pair.compared())["y"]
    assert output.sqnr_db > 30
    check_channels(output, channel_truth(pair, "y", "y", 1))
    scores = [v[:, 4:] for v in pair.tensor("q", "y")]
    boxes = [db(*([v[:, :4] for v in pair.tensor(f, "y")] for f in ("f", "q")))]
    assert not any(np.any(s > 1.5) for s in scores)
    parts = {p.source: p for p in output.slices}
    assert parts["boxes"].sqnr_db == close(boxes[0])
    truth = db([v[:, 4:] for v in pair.tensor("f", "y")], scores)
    assert parts["scores"].sqnr_db == close(truth)
    assert truth < 3
    assert output.worst_channel_sqnr_db < 3


def test_a_mask_of_minus_ten_thousand_shows_in_the_channels(tmp_path: Path) -> None:
    """The masked tensor has 60 dB and the softmax behind it is uniform."""
    mask = np.zeros((1, 8), np.float32)
    mask[0, 6:] = -1e4
    proto = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["scores"], "mm"),
            helper.make_node("Add", ["scores", "mask"], ["masked"], "add"),
            helper.make_node("Softmax", ["masked"], ["y"], "softmax"),
        ],
        [("x", [8, 16])], [("y", [8, 8])], [array("w", floats((16, 8), 1)), array("mask", mask)],
    )  # fmt: skip
    pair = static(tmp_path, proto, [{"x": floats((8, 16), s)} for s in range(3)])
    result = pair.compared()
    found = check_activation(pair, result, "masked", "masked", "masked_DequantizeLinear_Output")
    assert found.accumulated_sqnr_db > 50
    check_channels(found, channel_truth(pair, "masked", "masked_DequantizeLinear_Output", 1))
    assert found.median_channel_sqnr_db < 1
    behind = pair.tensor("q", "y")[0][:, :6]
    assert np.ptp(behind) < 0.01, "uniform"
    output = check_outputs(pair, result)["y"]
    assert output.sqnr_db < 10


def test_unequal_channels_of_a_depthwise_weight_show_in_the_channels(tmp_path: Path) -> None:
    """Ranges of 336 to 1 under one scale: the weight has 30 dB, the output a few."""
    weight = floats((8, 1, 3, 3), 1)
    weight *= (
        (np.geomspace(1, 1 / 336, 8) / np.abs(weight).max(axis=(1, 2, 3)))
        .astype(np.float32)
        .reshape(8, 1, 1, 1)
    )
    proto = model(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], "depthwise", group=8),
            helper.make_node("Mul", ["c", "gain"], ["y"], "mul"),
        ],
        [("x", [1, 8, 8, 8])], [("y", [1, 8, 6, 6])],
        [array("w", weight), array("gain", np.geomspace(1, 336, 8).astype(np.float32)
                                   .reshape(1, 8, 1, 1))],
    )  # fmt: skip
    feeds = [{"x": floats((1, 8, 8, 8), s)} for s in range(3)]
    pair = static(tmp_path, proto, feeds, op_types_to_quantize=["Conv"])
    result = pair.compared()
    found = weight_of(result, "w")
    stored = pair.integers("w_quantized")
    assert found.sqnr_db == close(db([weight], [stored]))
    assert found.sqnr_db > 30
    check_channels(found, [db([weight[c]], [stored[c]]) for c in range(8)])
    assert found.worst_channel_sqnr_db < 5
    output = check_outputs(pair, result)["y"]
    assert output.sqnr_db < 12
    assert output.worst_channel == found.worst_channel


# -- calibration -------------------------------------------------------------------------------


def product(*, gain: float = 1.0) -> onnx.ModelProto:
    return model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")],
        [("x", [2, 8])],
        [("y", [2, 8])],
        [array("w", floats((8, 8), 1, gain))],
    )


def loaded(folder: Path, proto: onnx.ModelProto, feeds: Sequence[Arrays]) -> tuple[Model, Feeds]:
    float_model = load_model(save(proto, folder / "f.onnx"))
    return float_model, load_feeds(npz_folder(folder / "calibration", feeds), float_model)


def quantized(
    folder: Path,
    proto: onnx.ModelProto,
    calibration: Sequence[Arrays],
    feeds: Sequence[Arrays],
    config: QuantConfig | None = None,
    exclude: Sequence[str] = (),
) -> Pair:
    """The proto and what our `quantize_model` makes of it."""
    float_model, given = loaded(folder, proto, calibration)
    quantize_model(
        float_model, config or QuantConfig(), calibration=given, exclude=exclude,
        output=folder / "q.onnx", cache=folder / "cache",
    )  # fmt: skip
    return Pair(folder=folder, feeds=feeds)


def test_ranges_serve_recipe_after_recipe_unchanged(tmp_path: Path) -> None:
    """The quantizer widens and joins the ranges that it is given."""
    configs = [
        QuantConfig(activation_symmetric=True),
        QuantConfig(activation_type="uint16"),
        QuantConfig(),
        QuantConfig(reduce_range=True),
        QuantConfig(),
    ]
    one_after_another, afresh = [], []
    for at, config in enumerate(configs):
        (tmp_path / str(at)).mkdir()
        for folder, found in ((tmp_path, one_after_another), (tmp_path / str(at), afresh)):
            quantized(folder, conv_relu_gemm(), IMAGES, IMAGES, config)
            found.append((folder / "q.onnx").read_bytes())
    assert one_after_another == afresh
    assert len(set(afresh)) == 4


def peak_at(place: int, count: int = 40) -> list[Arrays]:
    feeds = [{"x": floats((2, 8), s)} for s in range(count)]
    feeds[place]["x"][0, 0] = 50
    return feeds


@pytest.mark.parametrize("method", ["minmax", "percentile"])
@pytest.mark.parametrize("place", [0, 20, 39])
def test_every_sample_counts_in_calibration_however_many(
    tmp_path: Path, place: int, method: str
) -> None:
    """ONNX Runtime's CalibMaxIntermediateOutputs throws samples away without a word."""
    float_model, feeds = loaded(tmp_path, product(), peak_at(place))
    ranges = calibrate(
        float_model, feeds, method=method, percentile=99.999 if method == "percentile" else None,
        cache=tmp_path / "cache",
    ).ranges()  # fmt: skip
    # One bin of a percentile's histogram is coarser than one value.
    assert ranges["x"].high == pytest.approx(50, rel=1e-7 if method == "minmax" else 0.01)


def test_onnx_runtimes_limit_of_intermediate_outputs_drops_samples(tmp_path: Path) -> None:
    scales = []
    for options in ({}, {"CalibMaxIntermediateOutputs": 2}):
        static(tmp_path, product(), peak_at(0, 5), extra_options=options)
        scales.append(float(constants(onnx.load(tmp_path / "q.onnx"))["x_scale"].reshape(())))
    assert scales[0] > 5 * scales[1]


def test_percentile_ranges_from_disk_are_real_values(tmp_path: Path) -> None:
    """The file holds counts where other methods hold ranges."""
    values = [{"x": floats((2, 8), s)} for s in range(400)]
    float_model, feeds = loaded(tmp_path, product(), values)
    found = [
        calibrate(
            float_model, feeds, method="percentile", percentile=98.0, cache=tmp_path / "cache"
        )
        for _ in range(2)
    ]
    assert [f.reused for f in found] == [False, True]
    x = np.concatenate([f["x"].ravel() for f in values]).astype(np.float64)
    for each in found:
        ranges = each.ranges()
        # 98 percent in the middle; a histogram that grows sample by sample has coarse bins.
        low, high = np.quantile(x, (0.01, 0.99))
        assert ranges["x"].low == pytest.approx(low, abs=0.1)
        assert ranges["x"].high == pytest.approx(high, abs=0.1)


def test_a_nan_that_calibration_left_out_is_named_when_comparing(tmp_path: Path) -> None:
    """MinMax gives the root a range without its NaN."""
    proto = product()
    proto.graph.node[0].output[0] = "m"
    proto.graph.node.append(helper.make_node("Sqrt", ["m"], ["s"], "root"))
    proto.graph.node.append(helper.make_node("MatMul", ["s", "w"], ["y"], "mm2"))
    proto.graph.initializer[0].CopyFrom(array("w", np.eye(8, dtype=np.float32)))
    good, bad = np.full((2, 8), 4, np.float32), np.full((2, 8), 4, np.float32)
    bad[0, 0] = -9
    pair = quantized(tmp_path, proto, [{"x": good}, {"x": bad}], [{"x": good}, {"x": bad}])
    scale = float(constants(onnx.load(tmp_path / "q.onnx"))["s_scale"].reshape(()))
    assert math.isfinite(scale)
    result = pair.compared()
    assert {(r.model, r.tensor) for r in result.nonfinite if r.origin} == {
        ("float", "s"), ("quantized", "s"),
    }  # fmt: skip
    assert math.isnan(activation_of(result, "s").accumulated_sqnr_db)


def quantized_notes(
    folder: Path, proto: onnx.ModelProto, calibration: Sequence[Arrays]
) -> tuple[str, ...]:
    """What `quantize_model` says about a model calibrated on these feeds."""
    float_model = load_model(save(proto, folder / "noted.onnx"))
    feeds = load_feeds(npz_folder(folder / "calibration", calibration), float_model)
    return quantize_model(
        float_model, QuantConfig(), calibration=feeds, output=folder / "q.onnx",
        cache=folder / "cache",
    ).notes  # fmt: skip


def test_a_scale_from_zeros_alone_shows_its_true_error(tmp_path: Path) -> None:
    """Calibrated on nothing but zeros, ONNX Runtime takes a scale of 1 and does not say so."""
    feeds = [{"x": floats((2, 8), s)} for s in range(3)]
    pair = quantized(tmp_path, product(), [{"x": np.zeros((2, 8), np.float32)}], feeds)
    result = pair.compared()
    found = check_activation(pair, result, "x", "x", "x_DequantizeLinear_Output")
    assert (found.scale, found.representable_low, found.representable_high) == (1.0, -128, 127)
    x = np.concatenate([f["x"] for f in feeds]).astype(np.float64)
    assert found.local_sqnr_db == close(db([x], [np.rint(x)]))
    check_outputs(pair, result)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_weight_zeroed_for_its_bias_has_zero_decibels(tmp_path: Path, per_channel: bool) -> None:
    """A bias that would not fit into int32 makes the quantizer raise the weight's scale."""
    weight = floats((4, 3, 1, 1), 1, 1e-6)
    proto = model(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv")],
        [("x", [1, 3, 8, 8])], [("y", [1, 4, 8, 8])],
        [array("w", weight), array("b", np.float32([1, 1e4, 2, 3]))],
    )  # fmt: skip
    config = QuantConfig(per_channel=per_channel)
    pair = quantized(tmp_path, proto, IMAGES, IMAGES, config)
    result = pair.compared()
    stored = pair.integers("w_quantized")
    found = weight_of(result, "w")
    assert found.sqnr_db == close(db([weight], [stored]))
    check_channels(found, [db([weight[c]], [stored[c]]) for c in range(4)])
    assert found.worst_channel_sqnr_db == 0.0
    if not per_channel:
        assert not np.any(stored)
        assert found.sqnr_db == 0.0
    truth = db([constants(proto)["b"]], [pair.integers("b_quantized")])
    assert weight_of(result, "b").sqnr_db == close(truth)
    check_outputs(pair, result)


def test_a_weight_zeroed_for_its_bias_is_said_when_it_is_quantized(tmp_path: Path) -> None:
    proto = model(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv")],
        [("x", [1, 3, 8, 8])], [("y", [1, 4, 8, 8])],
        [array("w", floats((4, 3, 1, 1), 1, 1e-6)), array("b", np.float32([1, 1e4, 2, 3]))],
    )  # fmt: skip
    notes = quantized_notes(tmp_path, proto, IMAGES)
    assert [n for n in notes if n.startswith("weight 'w' is all zero after quantization")]
    healthy = quantized_notes(tmp_path, conv_relu_gemm(), IMAGES)
    assert not [n for n in healthy if "all zero" in n]


def test_ranges_from_zeros_alone_are_said_when_it_is_quantized(tmp_path: Path) -> None:
    notes = quantized_notes(tmp_path, product(), [{"x": np.zeros((2, 8), np.float32)}])
    assert [n for n in notes if "nothing but zeros in 2 of 2 tensors (first " in n]
    assert not [n for n in quantized_notes(tmp_path, conv_relu_gemm(), IMAGES) if "zeros" in n]


# -- exclusions --------------------------------------------------------------------------------


def test_the_pair_that_an_excluded_relu_adds_has_the_range_before_it(tmp_path: Path) -> None:
    """With the Relu out of the list `c` has no pair; excluded alone, it gets one with c's range."""
    pair = quantized(tmp_path, conv_relu_gemm(), IMAGES, IMAGES, exclude=["relu"])
    result = pair.compared()
    found = check_activation(pair, result, "c", "c", "c_DequantizeLinear_Output")
    values = np.concatenate([v.ravel() for v in pair.tensor("f", "c")])
    assert found.scale == pytest.approx((values.max() - values.min()) / 255, rel=1e-6)
    check_outputs(pair, result)


def test_onnx_runtime_takes_unknown_names_and_no_name_without_a_word(tmp_path: Path) -> None:
    proto = conv_relu_gemm()
    for node in proto.graph.node:
        node.name = ""
    save(proto, tmp_path / "f.onnx")
    kinds = []
    for names in ([], ["no such node"], [""]):
        quantize_static(
            tmp_path / "f.onnx", tmp_path / "q.onnx", Reader(IMAGES), nodes_to_exclude=names
        )
        graph = onnx.load(tmp_path / "q.onnx").graph
        kinds.append(sum(n.op_type == "QuantizeLinear" for n in graph.node))
    assert kinds[0] == kinds[1] > 0
    assert kinds[2] == 0
