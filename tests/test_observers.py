"""What tensors hold, gathered sample by sample, against ONNX Runtime's calibrators and numpy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from onnx import TensorProto, helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    TensorsData,
    create_calibrator,
    save_tensors_data,
)
from onnxruntime.quantization.calibrate import CalibraterBase, HistogramCollector

from inspector.calibration import STATIC_OP_TYPES, hushed
from inspector.errors import CalibrationError
from inspector.feeds import load_feeds
from inspector.model import Model
from inspector.model_files import load_model
from inspector.observers import (
    RangeMethod,
    _Counts,
    _Extremes,
    observe,
    passes_over,
    tensors_to_observe,
)
from inspector.prepare import prepare
from inspector.recipe import QuantConfig
from tests.samples import MODELS, array, floats, model, needs_models, save

Arrays = dict[str, np.ndarray[Any, Any]]

DEFAULTS = [RangeMethod(name=name) for name in ("minmax", "entropy", "percentile")]
FLIPPED = [
    RangeMethod(name="minmax", symmetric=True),
    RangeMethod(name="entropy", symmetric=True),
    RangeMethod(name="percentile", symmetric=False),
    RangeMethod(name="percentile", percentile=99.0),
    RangeMethod(name="percentile", percentile=90.0, symmetric=False),
    RangeMethod(name="percentile", percentile=100.0),
]
KINDS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Sequence[Arrays]) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> Arrays | None:
        return next(self.feeds, None)


def passes(feeds: Sequence[Arrays]) -> Callable[[], Iterator[tuple[str, Arrays]]]:
    return lambda: iter([(f"sample {i}", feed) for i, feed in enumerate(feeds)])


def ours(
    float_model: Model,
    feeds: Sequence[Arrays],
    methods: Sequence[RangeMethod],
    op_types: Sequence[str] = (),
) -> list[TensorsData | CalibrationError]:
    with hushed():
        return observe(float_model, passes(feeds), methods, op_types=op_types)


def onnxruntimes(
    path: Path,
    feeds: Sequence[Arrays],
    method: RangeMethod,
    folder: Path,
    op_types: Sequence[str] = (),
) -> TensorsData:
    """By the public calibrator, with the options of `quantize_static` where none is given."""
    options: dict[str, Any] = {}
    if method.symmetric is not None:
        options["symmetric"] = method.symmetric
    if method.percentile != 99.999:
        options["percentile"] = method.percentile
    with hushed():
        calibrator = create_calibrator(
            path,
            list(op_types),
            augmented_model_path=str(folder / "augmented.onnx"),
            calibrate_method=KINDS[method.name],
            extra_options=options,
        )
        calibrator.collect_data(Reader(feeds))
        return calibrator.compute_data()


def contents(tensors: TensorsData | CalibrationError, folder: Path) -> dict[str, Any]:
    """What is in the cache file: values and types, whatever the order of the tensors."""
    assert isinstance(tensors, TensorsData), tensors
    save_tensors_data(tensors, folder / "ranges.json")
    return dict(json.loads((folder / "ranges.json").read_text()))


def equal(a: Any, b: Any) -> bool:
    """Equality of JSON values, in which NaN is equal to itself."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def check(
    float_model: Model,
    feeds: Sequence[Arrays],
    folder: Path,
    methods: Sequence[RangeMethod] = (*DEFAULTS, *FLIPPED),
    op_types: Sequence[str] = (),
) -> None:
    """The cache files are those of ONNX Runtime."""
    assert float_model.path is not None
    found = ours(float_model, feeds, methods, op_types)
    for method, tensors in zip(methods, found, strict=True):
        wanted = contents(onnxruntimes(float_model.path, feeds, method, folder, op_types), folder)
        mine = contents(tensors, folder)
        assert wanted["data"], "nothing was compared"
        assert equal(mine["data"], wanted["data"]), method
        assert mine["calibration_method"] == wanted["calibration_method"]


def stored(proto: onnx.ModelProto, folder: Path) -> Model:
    return load_model(save(proto, folder / "m.onnx"))


def unary(*ops: str, dims: Sequence[int | str] = ("n", 4), opset: int = 17) -> onnx.ModelProto:
    """x through a chain of operators of one input."""
    names = ["x", *(f"t{i}" for i in range(len(ops) - 1)), "y"]
    return model(
        [
            helper.make_node(op, [a], [b], op)
            for op, (a, b) in zip(ops, pairwise(names), strict=True)
        ],
        [("x", dims)],
        [("y", dims)],
        opset=opset,
    )


# -- as ONNX Runtime -------------------------------------------------------------------------------


def real(name: str, count: int, folder: Path) -> tuple[Model, list[Arrays]]:
    float_model = load_model(MODELS / name / "model.onnx")
    feeds = load_feeds(MODELS / name / "inputs", float_model)
    prepared = prepare(float_model, QuantConfig(), folder / "cache").model
    return prepared, [dict(f) for f in feeds.subset(range(min(count, len(feeds))))]


@needs_models
@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_method_gives_onnx_runtimes_ranges_on_a_real_network(
    tmp_path: Path, count: int
) -> None:
    check(*real("mlperf-resnet8", count, tmp_path), tmp_path, op_types=STATIC_OP_TYPES)


@needs_models
@pytest.mark.parametrize("name", ["fastestdet", "gtcrn", "squeezenet-fp16"])
def test_the_defaults_give_onnx_runtimes_ranges_on_more_networks(tmp_path: Path, name: str) -> None:
    check(*real(name, 2, tmp_path), tmp_path, DEFAULTS, STATIC_OP_TYPES)


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [
        *((name, n) for name in ("fastestdet", "gtcrn", "squeezenet-fp16") for n in (1, 2, 4)),
        ("ultraface-rfb320", 4),
        ("magika", 6),
        ("mlperf-kws-dscnn", 5),
        ("silero-vad-16k", 8),
        ("minilm-l6", 1),
    ],
)
def test_every_method_gives_onnx_runtimes_ranges_on_all_networks(
    tmp_path: Path, name: str, count: int
) -> None:
    check(*real(name, count, tmp_path), tmp_path, op_types=STATIC_OP_TYPES)


@needs_models
@pytest.mark.parametrize("op_types", [(), ("Conv",), STATIC_OP_TYPES])
def test_the_tensors_are_those_that_onnx_runtime_chooses(op_types: Sequence[str]) -> None:
    files = [p for p in sorted(MODELS.glob("*/*.onnx")) if p.parent.name != "minilm-l6"]
    assert len(files) > 15
    for path in files:
        found = load_model(path)
        base = CalibraterBase.__new__(CalibraterBase)
        base.op_types_to_calibrate = list(op_types)
        wanted, _ = base.select_tensors_to_calibrate(onnx.shape_inference.infer_shapes(found.proto))
        chosen = tensors_to_observe(found, op_types)
        assert set(chosen) == wanted, path
        assert len(chosen) == len(set(chosen))


@pytest.mark.parametrize("opset", range(10, 25))
def test_models_of_every_opset_are_observed(tmp_path: Path, opset: int) -> None:
    proto = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], "mm"),
            helper.make_node("Relu", ["h"], ["y"], "relu"),
        ],
        [("x", ["n", 4])],
        [("y", ["n", 4])],
        [array("w", floats((4, 4), 3))],
        opset=opset,
    )
    feeds = [{"x": floats((5, 4), seed)} for seed in range(3)]
    check(stored(proto, tmp_path), feeds, tmp_path, DEFAULTS)


values = st_numpy.arrays(
    np.float32,
    st.integers(1, 40),
    elements=st.one_of(
        st.floats(-(2.0**100), 2.0**100, width=32),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 6.0, -2.0]).map(np.float32),
    ),
)


@given(first=values, seed=st.integers(0, 2**32 - 1), symmetric=st.booleans(), nan=st.booleans())
def test_counts_of_parts_add_up_to_those_of_the_whole(
    first: np.ndarray[Any, Any], seed: int, symmetric: bool, nan: bool
) -> None:
    generator = np.random.default_rng(seed)
    parts = [first, *(generator.permutation(first) * np.float32(f) for f in (0.5, -1.25))]
    methods = [
        RangeMethod(name="entropy"),
        RangeMethod(name="percentile", symmetric=symmetric and not nan),
    ]
    if nan:
        parts[1] = parts[1].copy()
        parts[1][0] = np.nan
    for method in methods:
        collector = HistogramCollector(
            method.name, method.is_symmetric, method.bins, 128, 99.999, "same"
        )
        with hushed():
            try:
                collector.collect({"t": parts})
            except ValueError:  # "Too many bins", see below
                continue
        seen = _Extremes(absolute=method.absolute)
        for part in parts:
            seen.add(part)
        counts = _Counts(method, seen)
        with np.errstate(all="ignore"):
            for part in parts:
                counts.add(part)
        wanted = collector.histogram_dict["t"]
        assert len(counts.collected()) == len(wanted)
        for mine, theirs in zip(counts.collected(), wanted, strict=True):
            assert (type(mine), mine.dtype) == (type(theirs), theirs.dtype)
            np.testing.assert_array_equal(mine, theirs)


def on_edges(edges: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The edges of bins, with the numbers next to them on both sides."""
    inner = edges[1:-1]
    return np.concatenate(
        [edges, *(np.nextafter(inner, np.float32(to)) for to in (-np.inf, np.inf))]
    )


def shapes_of_data(generator: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    normal = generator.standard_normal(70_001).astype(np.float32)
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "relu6": np.clip(normal * 6, 0, 6),
        "shifted": normal + np.float32(40),
        "narrow": np.float32(1000) + normal * np.float32(0.01),
        "very narrow": np.float32(1000) + normal * np.float32(1e-4),
        "negative": -np.abs(normal) - 1,
        "heavy tail": normal / generator.random(70_001).astype(np.float32),
        "tiny": normal * np.float32(1e-36),
        "denormal": normal * np.float32(1e-40),
        "large": normal * np.float32(1e37),
        "few values": np.round(normal * 4),
        "zeros": normal * 0,
        "powers of two": np.exp2(np.round(normal * 8)).astype(np.float32),
    }


@pytest.mark.parametrize("kind", list(shapes_of_data(np.random.default_rng(0))))
@pytest.mark.parametrize("bins", [128, 2048])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_on_the_edges_of_bins_fall_where_they_would_in_the_whole(
    kind: str, bins: int, symmetric: bool
) -> None:
    method = RangeMethod(name="entropy" if bins == 128 else "percentile", symmetric=symmetric)
    values = shapes_of_data(np.random.default_rng(1))[kind]
    seen = _Extremes(absolute=method.absolute)
    seen.add(values)
    edges = on_edges(_Counts(method, seen).edges)
    edges = edges[(edges >= values.min()) & (edges <= values.max())]
    values = np.random.default_rng(2).permutation(np.concatenate([values, edges, edges]))
    parts = np.array_split(values, [1, 100, 5000, 66_000])
    seen = _Extremes(absolute=method.absolute)
    for part in parts:
        seen.add(part)
    counts = _Counts(method, seen)
    for part in parts:
        counts.add(part)
    held = np.abs(values) if method.absolute else values
    # By comparing with the edges alone; numpy computes the bin first.
    wide = counts.dtype == np.float64
    if wide:
        wanted, _ = np.histogram(held.astype(np.float64), bins, range=counts.limits)
    else:
        at = np.searchsorted(counts.edges, held, side="right") - 1
        wanted = np.bincount(np.minimum(at, bins - 1), minlength=bins)
    np.testing.assert_array_equal(counts.counts, wanted)
    assert counts.counts.sum() == values.size


# -- beyond ONNX Runtime ---------------------------------------------------------------------------


def test_samples_of_unequal_shape_count_as_their_values_in_one(tmp_path: Path) -> None:
    found = stored(unary("Relu", "Neg", "Exp"), tmp_path)
    ragged = [{"x": floats((rows, 4), rows)} for rows in (3, 1, 7, 2)]
    assert found.path is not None
    together = [{"x": np.concatenate([f["x"] for f in ragged])}]
    methods = [*DEFAULTS, *FLIPPED]
    for method, tensors in zip(methods, ours(found, ragged, methods), strict=True):
        wanted = onnxruntimes(found.path, together, method, tmp_path)
        assert contents(tensors, tmp_path) == contents(wanted, tmp_path), method


@needs_models
def test_sentences_of_unequal_length_are_calibrated_by_every_method(tmp_path: Path) -> None:
    prepared = load_model(MODELS / "minilm-l6" / "model.onnx")
    feeds = [dict(f) for f in load_feeds(MODELS / "minilm-l6" / "inputs", prepared)][:4]
    assert len({next(iter(f.values())).shape for f in feeds}) > 1
    minmax, entropy, percentile = ours(prepared, feeds, DEFAULTS, ["Softmax"])
    for tensors in (minmax, entropy, percentile):
        assert isinstance(tensors, TensorsData)
        assert len(tensors.data) == 12
    for name, tensor in entropy.items():
        # With 128 bins for 128 levels ONNX Runtime has one range to choose from, which is all.
        assert [float(v) for v in tensor.range_value] == [
            float(v[0]) for v in minmax[name].range_value
        ]
        low, high = percentile[name].range_value
        assert minmax[name].range_value[0] <= low < high <= minmax[name].range_value[1]


@pytest.mark.parametrize("kept", [90.0, 98.0, 99.9])
def test_a_percentile_keeps_that_share_of_all_samples(tmp_path: Path, kept: float) -> None:
    found = stored(unary("Neg"), tmp_path)
    feeds = [{"x": floats((50 + i, 4), i)} for i in range(60)]
    x = np.concatenate([f["x"].ravel() for f in feeds]).astype(np.float64)
    both, sides = ours(
        found,
        feeds,
        [RangeMethod(name="percentile", percentile=kept, symmetric=s) for s in (True, False)],
    )
    assert isinstance(both, TensorsData)
    assert isinstance(sides, TensorsData)

    def starts_the_bin(limit: float, held: Any, share: float, width: float) -> bool:
        """The bin that begins at `limit` is the one in which the share is reached."""
        return bool(np.mean(held < limit) < share <= np.mean(held < limit + width))

    low, high = (float(v) for v in both["x"].range_value)
    span = np.abs(x).max() - np.abs(x).min()
    assert low == -high
    assert starts_the_bin(high, np.abs(x), kept / 100, span / 2048)
    low, high = (float(v) for v in sides["x"].range_value)
    width, cut = 2 * np.abs(x).max() / 2048, (1 - kept / 100) / 2
    assert starts_the_bin(low, x, cut, width)
    assert starts_the_bin(high, x, 1 - cut, width)


def test_a_percentile_of_large_values_close_together_is_found(tmp_path: Path) -> None:
    """ONNX Runtime says "Too many bins" here, with one sample of magika as well."""
    found = stored(unary("Neg"), tmp_path)
    feeds = [{"x": np.full((1, 4), 196149.95, np.float32)}]
    assert found.path is not None
    with pytest.raises(ValueError, match="Too many bins"):
        onnxruntimes(found.path, feeds, DEFAULTS[2], tmp_path)
    (tensors,) = ours(found, feeds, DEFAULTS[2:])
    assert isinstance(tensors, TensorsData)
    value = np.float32(196149.95)
    for name, wanted in (("x", value), ("y", -value)):
        assert tensors[name].range_value == (wanted, wanted)
        assert tensors[name].range_value[0].dtype == np.float32


def half(ops: Sequence[str]) -> onnx.ModelProto:
    proto = unary(*ops)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return proto


def test_half_precision_gives_onnx_runtimes_ranges_where_that_has_any(tmp_path: Path) -> None:
    found = stored(half(["Relu", "Neg"]), tmp_path)
    feeds = [{"x": floats((6, 4), seed).astype(np.float16)} for seed in range(3)]
    check(found, feeds, tmp_path, DEFAULTS[:2])


def test_half_precision_has_percentiles_where_onnx_runtime_has_none(tmp_path: Path) -> None:
    found = stored(half(["Neg"]), tmp_path)
    feeds = [{"x": floats((400, 4), seed).astype(np.float16)} for seed in range(3)]
    assert found.path is not None
    with pytest.raises(ValueError, match="Too many bins"):
        onnxruntimes(found.path, feeds, DEFAULTS[2], tmp_path)
    (tensors,) = ours(found, feeds, [RangeMethod(name="percentile", percentile=95.0)])
    assert isinstance(tensors, TensorsData)
    x = np.concatenate([f["x"].ravel() for f in feeds]).astype(np.float64)
    low, high = tensors["x"].range_value
    assert (low.dtype, high.dtype) == (np.float16, np.float16)
    assert (float(low), float(high)) == pytest.approx(
        np.quantile(np.abs(x), 0.95) * np.array([-1, 1]), abs=0.01
    )


# -- edge values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "feeds",
    [
        [np.zeros((2, 4))] * 2,
        [np.full((2, 4), -0.0), np.zeros((2, 4))],
        [np.full((2, 4), 3.5)],
        [np.full((2, 4), -3.5)] * 2,
        [np.arange(8).reshape(2, 4), -np.arange(8).reshape(2, 4)],
        [np.full((2, 4), 1.5e38), np.full((2, 4), -1e38)],
        [np.zeros((0, 4))] * 2,
    ],
    ids=["zeros", "minus zeros", "one value", "one below", "whole", "huge", "empty"],
)
def test_edge_values_give_onnx_runtimes_ranges(tmp_path: Path, feeds: list[Any]) -> None:
    check(
        stored(unary("Relu", "Neg"), tmp_path),
        [{"x": f.astype(np.float32)} for f in feeds],
        tmp_path,
    )


@pytest.mark.parametrize("value", [1e-44, 3e38, -3e38])
def test_a_value_near_the_limits_of_its_type_has_a_range_by_every_method(
    tmp_path: Path, value: float
) -> None:
    """ONNX Runtime says "Too many bins" for some of them."""
    feeds = [{"x": np.full((2, 4), value, np.float32)}]
    for tensors in ours(stored(unary("Neg"), tmp_path), feeds, [*DEFAULTS, *FLIPPED]):
        assert isinstance(tensors, TensorsData)
        for limit in tensors["x"].range_value:
            assert abs(float(np.asarray(limit).reshape(()))) == pytest.approx(abs(value), rel=2e-3)


def test_scalars_are_observed(tmp_path: Path) -> None:
    feeds = [{"x": np.array(v, np.float32)} for v in (1.5, -2.0, 0.25)]
    check(stored(unary("Relu", "Neg", dims=()), tmp_path), feeds, tmp_path)


def test_empty_samples_between_others_count_for_nothing(tmp_path: Path) -> None:
    found = stored(unary("Neg"), tmp_path)
    empty, full = {"x": np.zeros((0, 4), np.float32)}, {"x": floats((3, 4))}
    for method, mixed, alone in zip(
        DEFAULTS,
        ours(found, [empty, full, empty], DEFAULTS),
        ours(found, [full], DEFAULTS),
        strict=True,
    ):
        assert contents(mixed, tmp_path) == contents(alone, tmp_path), method


@pytest.mark.parametrize("place", [0, 3, 7])
def test_nan_inside_the_model_counts_as_in_onnx_runtime(tmp_path: Path, place: int) -> None:
    found = stored(unary("Sqrt", "Neg"), tmp_path)
    feeds = [{"x": np.linspace(1, 2, 8, dtype=np.float32).reshape(2, 4)} for _ in range(3)]
    feeds[1]["x"].flat[place] = -1
    check(found, feeds, tmp_path, [m for m in (*DEFAULTS, *FLIPPED) if not m.absolute])
    (failed,) = ours(found, feeds, DEFAULTS[2:])
    assert isinstance(failed, CalibrationError)
    assert failed.message == (
        "calibration with method percentile fails: tensor 't0' inside the model is infinite or "
        "NaN on the calibration feeds, first on sample 'sample 1'"
    )
    assert "--method minmax" in failed.hint


def test_a_sample_of_nan_alone_between_others_counts_for_nothing(tmp_path: Path) -> None:
    found = stored(unary("Sqrt", "Neg"), tmp_path)
    feeds = [{"x": np.full((2, 4), v, np.float32)} for v in (4, -1, 9)]
    check(found, feeds, tmp_path, [m for m in (*DEFAULTS, *FLIPPED) if not m.absolute])


def test_a_tensor_of_nan_alone_fails_the_histograms_and_not_minmax(tmp_path: Path) -> None:
    found = stored(unary("Sqrt", "Neg"), tmp_path)
    feeds = [{"x": np.full((2, 4), -1, np.float32)}]
    check(found, feeds, tmp_path, DEFAULTS[:1])
    minmax, *others = ours(found, feeds, [*DEFAULTS, *FLIPPED[1:]])
    assert isinstance(minmax, TensorsData)
    for failed in others:
        assert isinstance(failed, CalibrationError)
        assert "tensor 't0' inside the model is infinite or NaN" in failed.message


def test_infinity_inside_the_model_fails_the_histograms_and_not_minmax(tmp_path: Path) -> None:
    found = stored(unary("Exp", "Neg"), tmp_path)
    feeds = [{"x": np.full((2, 4), v, np.float32)} for v in (1, 200, 2)]
    check(found, feeds, tmp_path, DEFAULTS[:1])
    minmax, entropy, percentile = ours(found, feeds, DEFAULTS)
    assert isinstance(minmax, TensorsData)
    assert np.isinf(minmax["t0"].range_value[1])
    for failed in (entropy, percentile):
        assert isinstance(failed, CalibrationError)
        assert "first on sample 'sample 1'" in failed.message


def test_samples_end_at_the_first_that_fails_every_method(tmp_path: Path) -> None:
    found = stored(unary("Exp"), tmp_path)
    read = []

    def samples() -> Iterator[tuple[str, Arrays]]:
        for at, value in enumerate((1, 200, 2, 3)):
            read.append(at)
            yield str(at), {"x": np.full((2, 4), value, np.float32)}

    with hushed():
        observe(found, samples, DEFAULTS[1:])
    assert read == [0, 1]


@pytest.mark.parametrize(
    ("methods", "count"), [(DEFAULTS[:1], 1), (DEFAULTS[1:2], 2), (DEFAULTS, 2), (FLIPPED, 2)]
)
def test_samples_are_read_as_often_as_announced(
    tmp_path: Path, methods: list[RangeMethod], count: int
) -> None:
    found, started = stored(unary("Neg"), tmp_path), []

    def samples() -> Iterator[tuple[str, Arrays]]:
        started.append(True)
        yield "only", {"x": floats((2, 4))}

    with hushed():
        observe(found, samples, methods)
    assert len(started) == passes_over(methods) == count


def test_names_that_onnx_runtimes_calibrator_makes_itself_are_no_obstacle(tmp_path: Path) -> None:
    names = ["x", "x_ReduceMin", "observed/0/ReduceMin", "ü b/🙂'\"", "y"]
    proto = model(
        [helper.make_node("Neg", [a], [b], f"n{i}") for i, (a, b) in enumerate(pairwise(names))],
        [("x", ["n", 4])],
        [("y", ["n", 4])],
    )
    feeds = [{"x": floats((3, 4), seed)} for seed in range(2)]
    for tensors in ours(stored(proto, tmp_path), feeds, DEFAULTS[:2]):
        assert isinstance(tensors, TensorsData)
        assert list(tensors.keys()) == names
        x = np.concatenate([f["x"] for f in feeds])
        low, high = (float(np.asarray(v).reshape(())) for v in tensors["x_ReduceMin"].range_value)
        assert (low, high) == (-x.max(), -x.min())


def test_a_model_without_a_tensor_to_observe_gives_no_ranges(tmp_path: Path) -> None:
    found = stored(unary("Neg"), tmp_path)
    for tensors in ours(found, [{"x": floats((2, 4))}], DEFAULTS, ["Conv"]):
        assert isinstance(tensors, TensorsData)
        assert tensors.data == {}


def test_a_sample_that_the_model_does_not_run_on_is_named(tmp_path: Path) -> None:
    feeds = [{"x": floats((2, 4))}, {"x": floats((2, 5))}]
    with pytest.raises(
        CalibrationError, match="calibration fails on sample 'sample 1': "
    ) as caught:
        ours(stored(unary("Neg"), tmp_path), feeds, DEFAULTS)
    assert "quant-inspector show" in caught.value.hint


def test_weights_left_on_disk_are_calibrated_with(tmp_path: Path) -> None:
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")],
        [("x", ["n", 64])],
        [("y", ["n", 64])],
        [array("w", floats((64, 64), 3))],
    )
    path = tmp_path / "m.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    outside = load_model(path, inside_bytes=0)
    assert outside.external
    feeds = [{"x": floats((rows, 64), rows)} for rows in (3, 3)]
    check(outside, feeds, tmp_path, DEFAULTS)


MEMORY = """
import resource, sys
from pathlib import Path
from inspector.calibration import STATIC_OP_TYPES, hushed
from inspector.feeds import load_feeds
from inspector.model_files import load_model
from inspector.observers import RangeMethod, observe

folder, count = Path(sys.argv[1]), int(sys.argv[2])
model = load_model(folder / "model.onnx")
feeds = load_feeds(folder / "inputs", model)
feeds = feeds.subset([i % len(feeds) for i in range(count)])
with hushed():
    observe(
        model, lambda: ((str(i), f) for i, f in enumerate(feeds)),
        [RangeMethod(name="entropy")], op_types=STATIC_OP_TYPES,
    )
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@needs_models
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", MEMORY, str(MODELS / "fastestdet"), str(count)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for count in (4, 64)
    ]
    # ONNX Runtime's own takes 0.27 GB and 2.7 GB.
    assert peaks[1] < 1.1 * peaks[0]
