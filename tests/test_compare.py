from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization import QuantFormat as OrtFormat

from inspector.compare import compare_models
from inspector.comparison import Comparison
from inspector.errors import Cancelled, ModelError
from inspector.feeds import load_feeds
from inspector.model import Model
from inspector.model_files import load_model
from inspector.watches import OutputWatch
from tests.samples import (
    MODELS,
    PEAK_BYTES,
    ROOT,
    array,
    boxes_and_scores_in_one_concat,
    conv_relu_gemm,
    floats,
    model,
    needs_models,
    npz_folder,
    qdq_of,
    save,
)


class Reader(CalibrationDataReader):
    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def comparison_of(
    tmp_path: Path, proto: onnx.ModelProto, feeds: list[dict[str, np.ndarray]], **options: object
) -> Comparison:
    """The proto against what ONNX Runtime's quantizer makes of it."""
    source = save(proto, tmp_path / "f.onnx")
    target = tmp_path / "q.onnx"
    quantize_static(source, target, Reader(feeds), **options)  # type: ignore[arg-type]
    return comparison_of_files(tmp_path, source, target, feeds)


def comparison_of_files(
    tmp_path: Path, source: Path, target: Path, feeds: list[dict[str, np.ndarray]]
) -> Comparison:
    float_model = load_model(source)
    loaded = load_feeds(npz_folder(tmp_path / "feeds", feeds), float_model)
    return compare_models(float_model, load_model(target), loaded, measure_latency=False)


def hand_made(
    tmp_path: Path,
    float_proto: onnx.ModelProto,
    quantized_proto: onnx.ModelProto,
    feeds: list[dict[str, np.ndarray]],
) -> Comparison:
    return comparison_of_files(
        tmp_path,
        save(float_proto, tmp_path / "f.onnx"),
        save(quantized_proto, tmp_path / "q.onnx"),
        feeds,
    )


def db(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise)


def oracle(path: Path, tensors: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Tensors of a file, straight from the runtime with optimisations off, in float64."""
    proto = onnx.load(path)
    for name in tensors:
        if name not in {o.name for o in proto.graph.output}:
            proto.graph.output.add(name=name)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options)
    return [v.astype(np.float64) for v in session.run(tensors, feed)]


IMAGES = [{"x": floats((1, 3, 8, 8), s)} for s in range(3)]


def test_local_and_accumulated_error_equal_the_runtimes_tensors_in_float64(tmp_path: Path) -> None:
    result = comparison_of(tmp_path, conv_relu_gemm(), IMAGES)
    found = {a.name: a for a in result.activations}
    sums = np.zeros(4)
    for feed in IMAGES:
        (reference,) = oracle(tmp_path / "f.onnx", ["r"], feed)
        before, after = oracle(tmp_path / "q.onnx", ["r", "r_DequantizeLinear_Output"], feed)
        rectified = np.maximum(before, 0)  # the Relu is folded into Q
        sums += [
            (reference**2).sum(), ((reference - after) ** 2).sum(),
            (rectified**2).sum(), ((rectified - after) ** 2).sum(),
        ]  # fmt: skip
    assert found["r"].accumulated_sqnr_db == pytest.approx(db(sums[0], sums[1]), abs=1e-9)
    assert found["r"].local_sqnr_db == pytest.approx(db(sums[2], sums[3]), abs=1e-9)
    assert found["r"].note == "Relu is folded into Q"
    assert found["r"].local_sqnr_db > 30, "the un-rectified tensor would look terrible"


def test_output_figures_equal_float64_numpy(tmp_path: Path) -> None:
    result = comparison_of(tmp_path, conv_relu_gemm(), IMAGES)
    (output,) = result.outputs
    per_sample = []
    total = np.zeros(2)
    for feed in IMAGES:
        (a,), (b,) = (
            oracle(tmp_path / "f.onnx", ["y"], feed),
            oracle(tmp_path / "q.onnx", ["y"], feed),
        )
        per_sample.append(db((a**2).sum(), ((a - b) ** 2).sum()))
        total += [(a**2).sum(), ((a - b) ** 2).sum()]
    assert output.per_sample_sqnr_db == pytest.approx(per_sample)
    assert output.sqnr_db == pytest.approx(db(*total))
    assert output.worst_sample_sqnr_db == pytest.approx(min(per_sample))
    assert output.median_sample_sqnr_db == pytest.approx(float(np.median(per_sample)))
    assert output.worst_sample == f"{int(np.argmin(per_sample)):02}.npz"


@pytest.mark.parametrize(
    "options",
    [
        {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8},
        {"weight_type": QuantType.QInt8, "extra_options": {"WeightSymmetric": False}},
        {"per_channel": True},
        {"extra_options": {"AddQDQPairToWeight": True}},
    ],
    ids=["uint8", "asymmetric int8", "per channel", "qdq on the float weight"],
)
def test_weight_error_equals_the_runtimes_own_dequantization(
    tmp_path: Path, options: dict[str, object]
) -> None:
    result = comparison_of(tmp_path, conv_relu_gemm(), IMAGES, **options)
    found = {w.name: w for w in result.weights if w.kind == "weight"}
    assert set(found) == {"w", "gw"}
    reference = floats((8, 3, 3, 3), 1, 0.3).astype(np.float64)
    (actual,) = oracle(tmp_path / "q.onnx", ["w_DequantizeLinear_Output"], IMAGES[0])
    noise = ((reference - actual) ** 2).sum(axis=(1, 2, 3))
    signal = (reference**2).sum(axis=(1, 2, 3))
    channels = 10 * np.log10(signal / noise)
    # The runtime's kernel multiplies in float32.
    assert found["w"].sqnr_db == pytest.approx(db(signal.sum(), noise.sum()), abs=0.01)
    assert found["w"].channel_sqnr_db == pytest.approx(channels.tolist(), abs=0.05)
    assert found["w"].worst_channel == int(np.argmin(channels))
    assert found["w"].sqnr_db > 30


def test_a_silent_part_of_a_concat_shows_in_its_slice_and_channels(tmp_path: Path) -> None:
    feeds = [{"x": floats((1, 3, 6, 6), s)} for s in range(3)]
    result = comparison_of(tmp_path, boxes_and_scores_in_one_concat(), feeds)
    (output,) = result.outputs
    assert output.sqnr_db > 30, "pooled, the output looks fine"
    slices = {s.source: s for s in output.slices}
    assert (slices["boxes"].start, slices["boxes"].stop) == (0, 4)
    assert (slices["scores"].start, slices["scores"].stop) == (4, 7)
    assert slices["boxes"].sqnr_db > 30
    assert slices["scores"].sqnr_db < 1
    assert slices["scores"].absmax < 1
    assert output.worst_channel in (4, 5, 6)
    assert output.channel_axis == 1
    assert output.worst_channel_sqnr_db < 1


def test_qoperator_files_are_compared_like_qdq_files(tmp_path: Path) -> None:
    result = comparison_of(tmp_path, conv_relu_gemm(), IMAGES, quant_format=OrtFormat.QOperator)
    assert result.quantized_model.quant_format == "qoperator"
    found = {a.name: a for a in result.activations}
    (a,), (q,) = (
        oracle(tmp_path / "f.onnx", ["r"], IMAGES[0]),
        oracle(tmp_path / "q.onnx", ["c_quantized"], IMAGES[0]),
    )
    scale, zero = found["r"].scale, found["r"].zero_point
    assert isinstance(scale, float)
    assert isinstance(zero, int)
    one = comparison_of_files(
        tmp_path / "one", tmp_path / "f.onnx", tmp_path / "q.onnx", IMAGES[:1]
    )
    r = next(x for x in one.activations if x.name == "r")
    expected = db((a**2).sum(), ((a - (q - zero) * scale) ** 2).sum())
    assert r.accumulated_sqnr_db == pytest.approx(expected)
    assert {w.name for w in result.weights if w.kind == "weight"} == {"w", "gw"}


def test_saturation_counts_what_is_cut_off(tmp_path: Path) -> None:
    base = helper.make_node("Neg", ["x"], ["y0"], "neg")
    float_proto = model([helper.make_node("Neg", ["x"], ["y"], "neg")], [("x", [8])], [("y", [8])])
    qdq, constants = qdq_of("y0", "y", 0.01, 0)  # holds -1.28 .. 1.27
    quantized = model([base, *qdq], [("x", [8])], [("y", [8])], constants)
    x = np.array([-2.0, -1.5, -1.0, 0.0, 0.5, 1.0, 1.28, 5.0], np.float32)
    result = hand_made(tmp_path, float_proto, quantized, [{"x": x}])
    (y,) = [a for a in result.activations if a.name == "y"]
    assert y.saturated_high_fraction == 2 / 8
    assert y.saturated_low_fraction == 1 / 8  # -1.28 itself is representable
    assert y.saturated_fraction == 3 / 8
    assert (y.representable_low, y.representable_high) == pytest.approx((-1.28, 1.27))
    assert (y.observed_low, y.observed_high) == (-5.0, 2.0)
    (output,) = result.outputs
    assert output.max_abs_error == pytest.approx(5 - 1.28, abs=1e-6)


def test_nan_in_the_quantized_model_is_counted_and_located(tmp_path: Path) -> None:
    nodes = [helper.make_node("Sqrt", ["x"], ["s"], "sqrt"),
             helper.make_node("Neg", ["s"], ["y"], "neg")]  # fmt: skip
    qdq, constants = qdq_of("x", "xd", 1.0, 0)
    quantized = [*qdq, helper.make_node("Sub", ["xd", "one"], ["m"], "sub"),
                 helper.make_node("Sqrt", ["m"], ["s"], "sqrt"), nodes[1]]  # fmt: skip
    result = hand_made(
        tmp_path,
        model(nodes, [("x", [2])], [("y", [2])]),
        model(quantized, [("x", [2])], [("y", [2])], [*constants, array("one", np.float32(1))]),
        [{"x": np.array([0.3, 4.0], np.float32)}],
    )
    s = next(a for a in result.activations if a.name == "s")
    assert (s.nonfinite_float, s.nonfinite_quantized) == (0, 1)
    assert math.isnan(s.accumulated_sqnr_db)
    where = "tensor s (Sqrt sqrt) is the first with NaN or infinite values in the quantized model"
    assert any(f"{where}, on sample 00.npz (1 NaN in all)" in w for w in result.warnings)


def test_a_nan_in_a_feed_is_named_with_its_sample(tmp_path: Path) -> None:
    result = comparison_of(tmp_path, conv_relu_gemm(), IMAGES)
    bad = IMAGES[1]["x"].copy()
    bad[0, 0, 0, 0] = np.nan
    feeds = [IMAGES[0], {"x": bad}]
    again = comparison_of_files(tmp_path / "nan", tmp_path / "f.onnx", tmp_path / "q.onnx", feeds)
    assert any("sample 01.npz: input x holds 1 NaN" in w for w in again.warnings)
    assert math.isfinite(result.outputs[0].sqnr_db)


def test_a_mixed_seen_flag_splits_the_output_figure(tmp_path: Path) -> None:
    source = save(conv_relu_gemm(), tmp_path / "f.onnx")
    quantize_static(source, tmp_path / "q.onnx", Reader(IMAGES))
    float_model = load_model(source)
    feeds = load_feeds(npz_folder(tmp_path / "feeds", IMAGES), float_model)
    result = compare_models(
        float_model, load_model(tmp_path / "q.onnx"), feeds,
        seen=[True, False, False], measure_latency=False,
    )  # fmt: skip
    (output,) = result.outputs
    assert result.seen == "mixed"
    assert output.seen_sqnr_db == pytest.approx(output.per_sample_sqnr_db[0])
    assert output.unseen_sqnr_db is not None
    assert min(output.per_sample_sqnr_db[1:]) <= output.unseen_sqnr_db
    assert output.unseen_sqnr_db <= max(output.per_sample_sqnr_db[1:])


def test_a_request_to_stop_ends_the_comparison(tmp_path: Path) -> None:
    source = save(conv_relu_gemm(), tmp_path / "f.onnx")
    quantize_static(source, tmp_path / "q.onnx", Reader(IMAGES))
    float_model = load_model(source)
    feeds = load_feeds(npz_folder(tmp_path / "feeds", IMAGES), float_model)

    def stop(fraction: float, _message: str) -> None:
        if fraction > 0.2:
            raise Cancelled

    with pytest.raises(Cancelled):
        compare_models(float_model, load_model(tmp_path / "q.onnx"), feeds, progress=stop)


def refusal(tmp_path: Path, left: Path, right: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        comparison_of_files(tmp_path, left, right, IMAGES[:1])
    return caught.value


def test_swapped_and_repeated_files_are_named(tmp_path: Path) -> None:
    source = save(conv_relu_gemm(), tmp_path / "f.onnx")
    target = tmp_path / "q.onnx"
    quantize_static(source, target, Reader(IMAGES))
    assert "they are swapped" in refusal(tmp_path, target, source).message
    assert "hold the same bytes" in refusal(tmp_path, source, source).message


def test_unrelated_models_are_refused_and_other_values_are_not(tmp_path: Path) -> None:
    source = save(conv_relu_gemm(), tmp_path / "f.onnx")
    target = tmp_path / "q.onnx"
    quantize_static(source, target, Reader(IMAGES))
    nodes = [
        helper.make_node("Conv", ["x", "k1"], ["a"], "one"),
        helper.make_node("Conv", ["a", "k2"], ["b"], "two"),
        helper.make_node("Conv", ["b", "k3"], ["d"], "three"),
    ]
    constants = [array(f"k{n}", floats((3, 3, 1, 1), n)) for n in (1, 2, 3)]
    renamed = model(nodes, [("x", [1, 3, 8, 8])], [("d", [1, 3, 8, 8])], constants)
    other = save(renamed, tmp_path / "other.onnx")
    error = refusal(tmp_path, other, target)
    assert "only 0 of 3 weights of other.onnx have a partner" in error.message
    tuned = conv_relu_gemm()
    for tensor in tuned.graph.initializer:
        if tensor.name == "w":
            tensor.CopyFrom(array("w", floats((8, 3, 3, 3), 77)))
    result = comparison_of_files(
        tmp_path / "tuned", save(tuned, tmp_path / "tuned.onnx"), target, IMAGES[:1]
    )
    assert min(w.sqnr_db for w in result.weights if w.name == "w") < 3


def test_models_of_another_input_shape_are_refused(tmp_path: Path) -> None:
    source = save(conv_relu_gemm(), tmp_path / "f.onnx")
    quantize_static(source, tmp_path / "q.onnx", Reader(IMAGES))
    other = conv_relu_gemm()
    other.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 16
    path = save(other, tmp_path / "o.onnx")
    with pytest.raises(ModelError) as caught:
        comparison_of_files(tmp_path, path, tmp_path / "q.onnx", [{"x": floats((1, 3, 16, 8))}])
    assert caught.value.message == (
        "input x: o.onnx takes [1, 3, 16, 8], q.onnx takes [1, 3, 8, 8]"
    )


def test_a_float_tensor_without_a_twin_has_a_reason_and_the_rest_is_compared(
    tmp_path: Path,
) -> None:
    result = comparison_of(tmp_path, conv_relu_gemm(), IMAGES)
    reasons = {u.name: u.reason for u in result.unmatched if u.model == "float"}
    assert reasons["c"] == "fused into r"
    assert {a.name for a in result.activations} >= {"x", "r", "p", "f", "y"}


# -- real models -----------------------------------------------------------------------------

# shared/models/README.md, "default PTQ": output SQNR in dB, optimisations off, all feeds pooled.
TABLE = {
    ("ultraface-rfb320", "ort_static_qdq"): {"scores": 41.02, "boxes": 43.26},
    ("fastestdet", "ort_static_qdq"): {"758": 10.58},
    ("magika", "ort_static_qdq"): {"target_label": 1.40},
    ("gtcrn", "ort_static_qdq"): {
        "enh": 7.27, "conv_cache_out": 10.73, "tra_cache_out": 2.83, "inter_cache_out": 7.19,
    },
    ("mlperf-resnet8", "ort_static_qdq"): {"Identity": 24.46},
    ("mlperf-kws-dscnn", "ort_static_qdq"): {"Identity": 25.49},
    ("squeezenet-fp16", "ort_static_qdq"): {"softmaxout_1": 17.72},
    ("minilm-l6", "ort_static_qdq"): {"embedding": 3.99},
    ("silero-vad-16k", "ort_static_qdq"): {"output": 6.30, "stateN": 2.05},
}  # fmt: skip


@needs_models
@pytest.mark.parametrize(
    ("folder", "twin"),
    [
        pytest.param(*each, marks=pytest.mark.slow if each[0] in ("minilm-l6", "magika") else ())
        for each in TABLE
    ],
)
def test_a_real_pair_has_the_output_sqnr_of_the_table(folder: str, twin: str) -> None:
    float_model = load_model(MODELS / folder / "model.onnx")
    feeds = load_feeds(MODELS / folder / "inputs", float_model)
    quantized = load_model(MODELS / folder / f"{twin}.onnx")
    result = compare_models(float_model, quantized, feeds, measure_latency=False)
    measured = {o.name: o.sqnr_db for o in result.outputs}
    assert measured == pytest.approx(TABLE[folder, twin], abs=0.02)
    locals_ = [a.local_sqnr_db for a in result.activations if a.local_sqnr_db is not None]
    assert locals_
    assert all(a.matched_by in ("name", "structure", "content") for a in result.activations)
    if folder == "magika":
        assert result.task is not None
        assert (result.task.top1_float, result.task.top1_quantized) == (1.0, 9 / 20)
    if folder == "fastestdet":
        (output,) = result.outputs
        assert output.deployed_sqnr_db == pytest.approx(10.30, abs=0.02)
        # Values moved in other steps than in the float file, found by what they hold.
        assert any(a.matched_by == "content" for a in result.activations)


MEMORY = (
    PEAK_BYTES
    + """
import json, sys
from inspector.compare import compare_models
from inspector.feeds import load_feeds
from inspector.model_files import load_model
folder, times = sys.argv[1], int(sys.argv[2])
float_model = load_model(f"{folder}/model.onnx")
feeds = load_feeds(f"{folder}/inputs", float_model)
feeds = feeds.subset([*range(len(feeds))] * times)
quantized = load_model(f"{folder}/ort_static_qdq.onnx")
compare_models(float_model, quantized, feeds, measure_latency=False)
print(json.dumps(peak_bytes()))
"""
)


@needs_models
@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_samples() -> None:
    def peak(times: int) -> int:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(MODELS / "fastestdet"), str(times)],
            capture_output=True, text=True, check=True, cwd=ROOT,
        )  # fmt: skip
        return int(json.loads(done.stdout))

    assert peak(10) / peak(1) < 1.05


def test_two_models_in_memory_are_compared_without_files(tmp_path: Path) -> None:
    float_model = Model(conv_relu_gemm())
    twin = Model(conv_relu_gemm())
    feeds = load_feeds(npz_folder(tmp_path / "feeds", IMAGES), float_model)
    result = compare_models(float_model, twin, feeds, measure_latency=False)
    assert result.outputs[0].sqnr_db == math.inf
    assert all(a.accumulated_sqnr_db == math.inf for a in result.activations)
    assert any("carries no quantization" in w for w in result.warnings)


def test_deployed_outputs_differ_by_steps_or_by_the_largest_element() -> None:
    def watched(simulated: list[float], deployed: list[float], step: float | None) -> OutputWatch:
        watch = OutputWatch("y", None, step)
        a, b = np.array([simulated]), np.array([deployed])
        watch.add(a, a, a, b)
        return watch

    assert not watched([0.0, 1.0], [0.2, 1.0], 0.1).differs
    four = watched([0.0, 1.0], [0.4, 1.0], 0.1)
    assert four.differs
    assert four.error(["s"], None).deployed_max_steps == pytest.approx(4)
    flipped = watched([0.5, 0.6], [0.61, 0.6], 0.1)
    assert flipped.differs
    assert flipped.error(["s"], None).deployed_flips == 1
    # Without a scale the steps are those of 8 bits over the output's own range, here 1/255.
    assert watched([0.0, 0.5, 1.0], [0.0, 0.52, 1.0], None).differs
    assert not watched([0.0, 0.5, 1.0], [0.0, 0.51, 1.0], None).differs
    assert (
        watched([0.0, 0.5, 1.0], [0.0, 0.51, 1.0], None).error(["s"], None).deployed_max_steps
        is None
    )
    assert watched([0.0, 1.0], [0.0, math.nan], None).differs
    assert not watched([math.nan, 1.0], [math.nan, 1.0], None).differs
