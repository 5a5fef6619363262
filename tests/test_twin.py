"""Sums reduced in the runtime against float64 numpy, on the same tensors."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from inspector.compare import compare_models
from inspector.comparison import Comparison
from inspector.feeds import load_feeds
from inspector.matching import ActivationPair, match_tensors
from inspector.model import Model
from inspector.model_files import load_model
from inspector.pairs import PairRunner
from inspector.qparams import QParams
from inspector.runtime import Codes, Tensors
from inspector.stats import saturated_counts
from inspector.twin import FEW, RAGGED, TILE, Reducer, clip_ends, cut_of
from inspector.watches import SampleSums, TensorWatch
from tests.samples import MODELS, array, floats, model, needs_models, rng, save

RELATIVE = 1.01e-6


@pytest.fixture(scope="module")
def axes(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model whose tensor `first` has its channels first and `last` has them last."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["conv"]),
        helper.make_node("Relu", ["conv"], ["first"], "relu"),
        helper.make_node("Clip", ["conv", "zero", "six"], ["clipped"], "clip"),
        helper.make_node("Clip", ["conv", "minus_six", "one"], ["both"], "both ends"),
        helper.make_node("Softmax", ["x"], ["last"]),
    ]
    constants = [
        array("w", floats((2, 2, 1, 1))), array("zero", np.float32(0)),
        array("six", np.float32(6)), array("minus_six", np.float32(-6)),
        array("one", np.float32(1)),
    ]  # fmt: skip
    outputs = [(n, None) for n in ("first", "clipped", "both", "last")]
    proto = model(nodes, [("x", ["n", 2, "h", "w"])], outputs, constants)
    return load_model(save(proto, tmp_path_factory.mktemp("axes") / "m.onnx"))


def pair(
    name: str = "first",
    qparams: QParams | None = None,
    model: Model | None = None,
    rectifier: str = "",
    **fields: Any,
) -> ActivationPair:
    nodes = () if model is None else tuple(n for n in model.nodes if n.name == rectifier)
    return ActivationPair(
        name=name, node=None, before=None if qparams is None else "q", after="y", integers=False,
        qparams=qparams, rectifiers=nodes, matched_by="name", note="", **fields,
    )  # fmt: skip


def params(scale: float, zero_point: int = 0, dtype: str = "uint8") -> QParams:
    return QParams(scale=np.array(scale), zero_point=np.array(zero_point), dtype=dtype)


def fake(q: np.ndarray, qparams: QParams, low: float = -math.inf, high: float = math.inf) -> Any:
    """What Q and DQ make of a tensor."""
    clamped = np.clip(q, low, high)
    return qparams.dequantize(qparams.quantize(clamped)).astype(q.dtype)


def reduced(
    watch: TensorWatch, x: np.ndarray, y: np.ndarray, q: np.ndarray | None = None
) -> SampleSums | None:
    """The sums of one sample whose tensors the runtime holds."""
    held = ort.OrtValue.ortvalue_from_numpy
    actual = {"y": held(y)} | ({} if q is None else {"q": held(q)})
    reducer = Reducer(threads=2)
    found = reducer.sums([watch], Tensors({watch.pair.name: held(x)}), Tensors(actual))
    reducer.close()
    return found.get(watch.pair.name)


def per_channel(values: np.ndarray, axis: int | None) -> np.ndarray:
    """Float64 values with channels first and the rest behind."""
    wide = values.astype(np.float64)
    return wide.reshape(1, -1) if axis is None else np.moveaxis(wide, axis, 0).reshape(
        wide.shape[axis], -1
    )  # fmt: skip


def agree(
    found: SampleSums | None,
    x: np.ndarray,
    y: np.ndarray,
    real: np.ndarray | None = None,
    axis: int | None = None,
) -> None:
    """Compares every sum with float64 numpy; `real` is the tensor before Q, rectified."""
    assert found is not None
    a, b = per_channel(x, axis), per_channel(y, axis)
    totals = found.totals
    for ours, truth in (
        (totals.signal, (a * a).sum(1)),
        (totals.actual_power, (b * b).sum(1)),
        (totals.noise, ((a - b) ** 2).sum(1)),
    ):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, truth, rtol=RELATIVE, atol=0)
    scale = math.sqrt((a * a).sum() * (b * b).sum())
    assert totals.dot.sum() == pytest.approx((a * b).sum(), abs=RELATIVE * scale)
    assert totals.max_abs_error == pytest.approx(np.abs(a - b).max(), rel=RELATIVE)
    assert totals.count == x.size
    assert np.array_equal(found.low, a.min(1))
    assert np.array_equal(found.high, a.max(1))
    if real is None:
        assert found.local is None
        assert found.quantized == 0
        return
    p = real.astype(np.float64)
    truth = [(p * p).sum(), ((p - y.astype(np.float64)) ** 2).sum()]
    assert found.local == pytest.approx(truth, rel=RELATIVE, abs=0)
    assert found.quantized == x.size


SHAPES = [
    ("first", (1, 64, 56, 56)), ("first", (2, 5, 25, 37)), ("first", (1, 4, 120, 160)),
    ("first", (1, 190, 7, 7)), ("first", (2, 5, 4099)), ("first", (1, 2, 5003)),
    ("first", (500, 6, 3)), ("first", (900, 67)), ("first", (1, 1, 70001)),
    ("first", (3, 2, TILE + 1)),
    ("last", (1, 128, 768)), ("last", (4421, 3)), ("last", (1, 331, 50)), ("last", (9000, 1)),
    ("last", (128, 1, 1, 64)), ("last", (300, 1, 301)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_sums_are_those_of_float64_for_every_layout(
    axes: Model, name: str, shape: tuple[int, ...]
) -> None:
    x = floats(shape, 1, 3.0)
    q = (x + floats(shape, 2, 0.02)).astype(np.float32)
    qparams = params(0.07, 120)
    y = fake(q, qparams)
    watch = TensorWatch(pair(name, qparams), axes)
    found = reduced(watch, x, y, q)
    agree(found, x, y, q, watch.axis)
    assert found is not None
    assert found.clipped == saturated_counts(q, qparams)


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_equal_values_whose_rounding_adds_up_stay_within_the_tolerance(
    axes: Model, name: str, shape: tuple[int, ...]
) -> None:
    # Every addend rounds the same way: the worst case of a float32 sum.
    for value in rng().uniform(0.5, 2.0, 6).astype(np.float32):
        x = np.full(shape, value)
        y = (x * np.float32(0.9)).astype(np.float32)
        watch = TensorWatch(pair(name), axes)
        agree(reduced(watch, x, y), x, y, None, watch.axis)


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 40), max_size=4),
    axis=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_cut_covers_every_element_once_and_in_its_channel(
    shape: list[int], axis: int, seed: int
) -> None:
    channels = None if not shape else axis % len(shape)
    cut = cut_of(shape, channels)
    x = floats(shape, seed).astype(np.float64)
    flat, at, results = x.ravel(), 0, []
    for groups, rows, width in cut.views:
        size = groups * rows * width
        view = flat[at : at + size].reshape(groups, rows, width)
        results.append(view.sum(1 if cut.kind == "columns" else (1, 2)).ravel())
        at += size
    assert at == x.size
    found = np.concatenate(results).reshape(cut.outer, cut.channels, cut.inner).sum((0, 2))
    assert found == pytest.approx(per_channel(x, channels).sum(1))
    assert max(v[1] if cut.kind == "columns" else v[2] for v in cut.views) <= (
        32 if cut.kind == "columns" else 512 if cut.kind == "rows" else math.inf
    )


@pytest.mark.parametrize("size", [FEW, 3 * TILE + 5])
@pytest.mark.parametrize("rectifier", ["", "relu", "clip", "both ends"])
@pytest.mark.parametrize(
    "qparams",
    [
        params(0.01, 0), params(0.01, 128), params(0.02, -5, "int8"), params(1e-4, 0, "int16"),
        params(0.03, 0, "float8_e4m3fn"), params(0.05, 200), params(-0.01, 128), params(0.02, 25),
    ],
)  # fmt: skip
def test_clipped_elements_are_counted_at_each_end(
    axes: Model, qparams: QParams, rectifier: str, size: int
) -> None:
    limits = {
        "": (-math.inf, math.inf), "relu": (0.0, math.inf), "clip": (0.0, 6.0),
        "both ends": (-6.0, 1.0),
    }[rectifier]  # fmt: skip
    q = floats((1, 1, size), 3, 3.0)
    ends = np.array(clip_ends(qparams))
    # Values at the very limits, and the float32 on either side of them.
    edge = ends.astype(np.float32)
    q[0, 0, :6] = [*edge, *np.nextafter(edge, np.float32(-99)), *np.nextafter(edge, np.float32(99))]
    real = np.clip(q, *limits)
    y = fake(q, qparams, *limits)
    x = (y + floats(q.shape, 4, 0.01)).astype(np.float32)
    watch = TensorWatch(pair("first", qparams, axes, rectifier), axes)
    found = reduced(watch, x, y, q)
    agree(found, x, y, real, 1)
    assert found is not None
    assert found.clipped == saturated_counts(real, qparams)


def test_an_element_just_beyond_a_limit_that_float32_rounds_to_it_is_counted(axes: Model) -> None:
    for scale in rng().uniform(0.001, 0.1, 40):
        qparams = params(float(np.float32(scale)), 7)
        ends = clip_ends(qparams)
        beyond = [np.float32(e) for e in ends]
        q = np.zeros((1, 1, FEW), np.float32)
        q[0, 0, :2] = beyond
        y = fake(q, qparams)
        x = (y + floats(q.shape, 4, 0.01)).astype(np.float32)
        found = reduced(TensorWatch(pair("first", qparams), axes), x, y, q)
        assert found is not None
        assert found.clipped == saturated_counts(q, qparams)


def test_a_tensor_that_quantization_leaves_as_it_was_has_no_local_noise(axes: Model) -> None:
    qparams = params(0.5, 100)
    for shape in ((1, 2, FEW), (1, 2, TILE)):
        x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape) % 50 * np.float32(0.5)
        found = reduced(TensorWatch(pair("first", qparams), axes), x, x.copy(), x.copy())
        assert found is not None
        assert found.local is not None
        assert found.local[1] == 0
        assert not found.totals.noise.any()
        assert found.totals.max_abs_error == 0


def test_a_channel_of_zeros_has_sums_of_zero(axes: Model) -> None:
    x = floats((1, 3, 60, 60))
    x[:, 1] = 0
    y = (x + floats(x.shape, 1, 0.01)).astype(np.float32)
    y[:, 1] = 0
    agree(reduced(TensorWatch(pair(), axes), x, y), x, y, None, 1)


def test_a_channel_that_is_the_same_in_both_has_no_noise(axes: Model) -> None:
    x = floats((1, 3, 60, 60))
    y = (x + floats(x.shape, 1, 0.01)).astype(np.float32)
    y[:, 2] = x[:, 2]
    found = reduced(TensorWatch(pair(), axes), x, y)
    agree(found, x, y, None, 1)
    assert found is not None
    assert found.totals.noise[2] == 0


@pytest.mark.parametrize("size", [FEW, 2 * TILE])
@pytest.mark.parametrize(
    "what",
    ["nan", "infinite", "overflows", "underflows", "noise underflows", "far apart", "nan in q",
     "infinite in q", "local noise underflows", "all gone", "one channel underflows",
     "few bits of noise", "noise vanishes", "noise of one channel vanishes",
     "local noise vanishes"],
)  # fmt: skip
def test_what_float32_cannot_hold_is_left_to_numpy(axes: Model, what: str, size: int) -> None:
    x = floats((1, 2, size), 1)
    y = (x + floats(x.shape, 2, 0.01)).astype(np.float32)
    q, qparams, rectifier = y.copy(), params(0.01, 128), "relu"
    if what == "nan":
        x[0, 1, 3] = np.nan
    elif what == "infinite":
        y[0, 0, 2] = -np.inf
    elif what == "overflows":
        x, y = x * np.float32(1e25), y * np.float32(1e25)
    elif what == "underflows":
        x, y = x * np.float32(1e-25), y * np.float32(1e-25)
    elif what == "noise underflows":
        x = np.full_like(x, 1e-18)
        y = np.nextafter(x, np.float32(1))
    elif what == "far apart":
        y = x * np.float32(100)
    elif what == "nan in q":
        q[0, 0, 5] = np.nan
    elif what == "infinite in q":
        q[0, 0, 5], rectifier = np.inf, ""
    elif what == "local noise underflows":
        x = y = np.full_like(x, 1e-18)
        q, rectifier = np.nextafter(y, np.float32(1)), ""
    elif what == "few bits of noise":
        x = np.full_like(x, 2e-15)
        y = np.nextafter(x, np.float32(1))
    elif what == "one channel underflows":
        x[:, 1] = 1e-22
    elif what.startswith("noise"):
        # Squares that float32 holds, of errors whose squares it does not.
        some = slice(None) if what == "noise vanishes" else slice(1, 2)
        x[:, some] = 3.5e-16
        y[:, some] = np.nextafter(x[:, some], np.float32(1))
    elif what == "local noise vanishes":
        y = np.full_like(y, 3.5e-16)
        x, q, rectifier = y * np.float32(2), np.nextafter(y, np.float32(1)), ""
    else:
        y = np.zeros_like(y)
    watch = TensorWatch(pair("first", qparams, axes, rectifier), axes)
    assert reduced(watch, x, y, q) is None
    # And nothing was added on the way.
    assert watch.accumulated is None
    assert watch.count == 0


def test_half_precision_and_other_layouts_are_converted_in_the_runtime(axes: Model) -> None:
    qparams = params(0.03, 128)
    q = floats((1, 6, 50, 29), 1)
    y = fake(q, qparams)
    x = (y + floats(y.shape, 2, 0.01)).astype(np.float32)
    moved = pair("first", qparams, permutation=(0, 3, 1, 2))
    theirs = [np.ascontiguousarray(v.transpose(0, 2, 3, 1)) for v in (y, q)]
    agree(reduced(TensorWatch(moved, axes), x, *theirs), x, y, q, 1)
    half = [v.astype(np.float16) for v in (x, y, q)]
    wide = [v.astype(np.float32) for v in half]
    agree(reduced(TensorWatch(pair("first", qparams), axes), *half), *wide, 1)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.zeros((1, 0, 3), np.float32), np.zeros((1, 0, 3), np.float32)),
        (floats((1, 2, FEW)), floats((1, FEW, 2))),
        (floats((1, 2, FEW)).astype(np.float64), floats((1, 2, FEW))),
        (floats((1, 2, FEW)), np.zeros((1, 2, FEW), np.int8)),
        (floats((1, 1, FEW - 1)), floats((1, 1, FEW - 1))),
    ],
)
def test_what_is_no_pair_of_large_float_tensors_is_left_to_numpy(
    axes: Model, x: np.ndarray, y: np.ndarray
) -> None:
    assert reduced(TensorWatch(pair(), axes), x, y) is None


def test_scales_per_channel_and_pairs_in_a_row_are_left_to_numpy(axes: Model) -> None:
    per_axis = QParams(
        scale=np.array([0.1, 0.2]), zero_point=np.array([0, 0]), dtype="int8", axis=1
    )
    x = floats((1, 2, FEW))
    two = ((params(0.1), params(0.1)), (params(0.2), params(0.2)))
    for own in (pair("first", per_axis), pair("first", params(0.1), stages=two)):
        assert reduced(TensorWatch(own, axes), x, x, x) is None


def test_samples_of_other_shapes_and_places_are_reduced_by_one_reducer(axes: Model) -> None:
    qparams = params(0.05, 128)
    watch = TensorWatch(pair("last", qparams), axes)
    oracle = TensorWatch(pair("last", qparams), axes)
    reducer = Reducer()
    kept = []
    shapes = [(1, 90, 800), (1, 99, 800), (1, 99, 800), (1, 90, 800), (40, 40, 50), (70000, 1)]
    for seed, shape in enumerate(shapes):
        q = floats(shape, seed)
        y, x = fake(q, qparams), floats(shape, seed)
        kept.append((q, x, y))  # so that the next ones lie elsewhere
        tensors = Tensors({"last": x}), Tensors({"y": y, "q": q})
        watch.take(reducer.sums([watch], *tensors)["last"])
        oracle.add(x, q, y, {})
    assert watch.ragged
    assert oracle.ragged
    ours, theirs = watch.error(frozenset()), oracle.error(frozenset())
    assert_same(ours, theirs, "last")
    reducer.close()


def test_small_tensors_whose_shape_changes_are_left_to_numpy(axes: Model) -> None:
    watch, reducer = TensorWatch(pair("first"), axes), Reducer()
    found = []
    for size in (FEW, FEW, FEW + 1, FEW + 1, FEW, RAGGED):
        x = floats((1, 1, size))
        found.append(bool(reducer.sums([watch], Tensors({"first": x}), Tensors({"y": x * 2}))))
    assert found == [True, True, False, True, False, True]


def test_only_tensors_that_may_hold_nan_or_infinity_are_suspected() -> None:
    good, bad, whole = floats((2, 3)), floats((2, 3)), np.arange(3)
    bad[1, 1] = np.nan
    tensors = Tensors({"good": good, "bad": bad, "whole": whole, "none": good[:0]})
    found = Reducer().suspects(tensors, list(tensors))
    assert {"bad"} <= found <= {"bad", "whole"}


# -- whole comparisons -------------------------------------------------------------------------


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    """Two records that differ by rounding only."""
    if dataclasses.is_dataclass(ours):
        assert type(ours) is type(theirs), where
        for field in dataclasses.fields(ours):
            pair_of = getattr(ours, field.name), getattr(theirs, field.name)
            assert_same(*pair_of, f"{where}.{field.name}")
    elif isinstance(ours, tuple):
        assert len(ours) == len(theirs), where
        for at, values in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*values, f"{where}[{at}]")
    elif isinstance(ours, float):
        # 1e-6 of a sum is 4.4e-6 dB.
        tolerance = {"abs": 1e-5} if where.rsplit(".")[-1].split("[")[0].endswith("_db") else {}
        assert ours == pytest.approx(theirs, rel=3e-6, nan_ok=True, **(tolerance or {"abs": 1e-7}))
    else:
        assert ours == theirs, where


def both_ways(network: str, file: str, limit: int, **options: Any) -> tuple[Comparison, Comparison]:
    folder = MODELS / network
    float_model, quantized = load_model(folder / "model.onnx"), load_model(folder / file)
    feeds = load_feeds(folder / "inputs", float_model, limit=limit)
    ours, theirs = (
        compare_models(
            float_model, quantized, feeds, in_runtime=in_runtime, measure_latency=False,
            explain_deployed=False, **options,
        )
        for in_runtime in (True, False)
    )  # fmt: skip
    return ours, theirs


@needs_models
@pytest.mark.parametrize(
    ("network", "file", "limit"),
    [
        ("mlperf-resnet8", "ort_static_qdq.onnx", 3),
        ("mlperf-resnet8", "quantized.onnx", 3),
        ("mlperf-kws-dscnn", "quantized.onnx", 3),
        ("silero-vad-16k", "ort_static_qdq.onnx", 3),
        ("squeezenet-fp16", "fp16.onnx", 1),
        ("fastestdet", "ort_static_qdq.onnx", 2),
    ],
)
def test_real_networks_have_the_same_figures_either_way(
    network: str, file: str, limit: int
) -> None:
    ours, theirs = both_ways(network, file, limit)
    assert len(ours.activations) > 10
    assert_same(ours, theirs, network)


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "file", "limit", "options"),
    [
        ("magika", "ort_static_qdq.onnx", 4, {}),
        ("gtcrn", "ort_static_qdq.onnx", 4, {}),
        ("ultraface-rfb320", "ort_static_qdq.onnx", 2, {}),
        ("squeezenet-fp16", "ort_static_qdq.onnx", 2, {}),
        ("minilm-l6", "ort_static_qdq.onnx", 3, {}),
        ("minilm-l6", "ort_dynamic.onnx", 3, {"mask": "attention_mask"}),
    ],
)
def test_more_real_networks_have_the_same_figures_either_way(
    network: str, file: str, limit: int, options: dict[str, Any]
) -> None:
    assert_same(*both_ways(network, file, limit, **options), network)


@needs_models
@pytest.mark.parametrize("coded", [False, True])
def test_no_tensor_of_a_comparison_becomes_an_array_to_be_reduced(coded: bool) -> None:
    folder = MODELS / "fastestdet"
    float_model = load_model(folder / "model.onnx")
    quantized = load_model(folder / "ort_static_qdq.onnx")
    matching = match_tensors(float_model, quantized)
    runner = PairRunner(float_model, quantized, matching, coded=coded)
    feeds = load_feeds(folder / "inputs", float_model, limit=1)
    reference, actual = runner.run_values(feeds[0], "one")
    watches = [TensorWatch(p, float_model) for p in runner.pairs]
    found = Reducer().sums(watches, reference, actual)
    left = {w.pair.name for w in watches} - set(found)
    assert len(found) > 100
    assert len(left) < 10
    as_codes = {n for n in actual if actual.codes_of(n) is not None}
    assert len(as_codes) > 100 if coded else not as_codes
    for tensors, inputs in ((reference, matching.inputs), (actual, matching.inputs.values())):
        names = set(tensors) - set(inputs) - as_codes
        assert all(isinstance(tensors.held(n), ort.OrtValue) for n in names)


@needs_models
@pytest.mark.parametrize(
    ("network", "file"),
    [("fastestdet", "ort_static_qdq.onnx"), ("mlperf-resnet8", "quantized.onnx")],
)
def test_tensors_held_as_codes_are_what_dequantize_linear_gives(network: str, file: str) -> None:
    folder = MODELS / network
    float_model, quantized = load_model(folder / "model.onnx"), load_model(folder / file)
    matching = match_tensors(float_model, quantized)
    feed = load_feeds(folder / "inputs", float_model, limit=1)[0]
    plain, coded = (
        PairRunner(float_model, quantized, matching, coded=c).run_values(feed, "one")[1]
        for c in (False, True)
    )
    names = [n for n in coded if coded.codes_of(n) is not None]
    assert len(names) > 10
    for name in names:
        assert coded.shape_of(name) == plain.shape_of(name)
        assert np.array_equal(coded[name], plain[name])
        assert coded[name].dtype == plain[name].dtype


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_codes_are_reduced_as_what_they_stand_for(axes: Model, dtype: Any) -> None:
    qparams = params(0.04, 3, np.dtype(dtype).name)
    for shape in ((1, 7, 37, 41), (1, 2, TILE), (70, 5, 40)):
        for q in (floats(shape, 1, 2.0), fake(floats(shape, 1, 2.0), qparams).astype(np.float32)):
            codes = qparams.quantize(q).astype(dtype)
            held = Codes("c", np.array(qparams.scale, np.float32), np.array(3, dtype))
            y = held.values(codes)
            x = (q + floats(shape, 2, 0.05)).astype(np.float32)
            watch = TensorWatch(pair("first", qparams), axes)
            actual = Tensors({"c": codes, "q": q}, {"y": held})
            found = Reducer().sums([watch], Tensors({"first": x}), actual).get("first")
            agree(found, x, y, q, 1)
            assert found is not None
            assert found.clipped == saturated_counts(q, qparams)
            assert actual.codes_of("y") is held


def test_nan_and_infinity_are_told_of_as_numpy_tells_of_them(tmp_path: Path) -> None:
    constants = [array("s", np.float32(0.05)), array("z", np.uint8(128))]
    nodes = [
        helper.make_node("Log", ["x"], ["l"], "log"),
        helper.make_node("QuantizeLinear", ["l", "s", "z"], ["lq"], "q"),
        helper.make_node("DequantizeLinear", ["lq", "s", "z"], ["ld"], "dq"),
        helper.make_node("Neg", ["ld"], ["y"], "neg"),
    ]
    plain = [nodes[0], helper.make_node("Neg", ["l"], ["y"], "neg")]
    shapes = [("x", [1, FEW])]
    float_model = load_model(save(model(plain, shapes, [("y", [1, FEW])]), tmp_path / "f.onnx"))
    quantized = load_model(
        save(model(nodes, shapes, [("y", [1, FEW])], constants), tmp_path / "q.onnx")
    )
    (tmp_path / "in").mkdir()
    x = np.abs(floats((1, FEW)))
    np.savez(tmp_path / "in" / "0.npz", x=x)
    x[0, :2] = [0, -3]
    np.savez(tmp_path / "in" / "1.npz", x=x)
    feeds = load_feeds(tmp_path / "in", float_model)
    ours, theirs = (
        compare_models(float_model, quantized, feeds, in_runtime=way, measure_latency=False)
        for way in (True, False)
    )
    assert ours.nonfinite
    assert any(a.nonfinite_float for a in ours.activations)
    assert_same(ours, theirs, "nan")
