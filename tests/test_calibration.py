"""Calibration: ranges as ONNX Runtime's calibrators see them, cached under a key that is enough."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.calibrate import HistogramCollector

from inspector import calibration
from inspector.calibration import (
    Calibration,
    FeedReader,
    calibrate,
    calibrate_many,
    calibration_key,
    hushed,
)
from inspector.errors import CalibrationError, Cancelled
from inspector.model import Model
from inspector.model_files import load_model
from inspector.runtime import open_session


class ListFeeds:
    """The part of `Feeds` that calibration uses, over arrays in memory."""

    def __init__(self, samples: list[dict[str, np.ndarray]]) -> None:
        self.samples = samples
        self.names = tuple(f"sample {i}" for i in range(len(samples)))
        self.read = 0

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for sample in self.samples:
            for name, array in sorted(sample.items()):
                digest.update(name.encode() + str(array.shape).encode() + array.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for sample in self.samples:
            self.read += 1
            yield sample


def save_chain(path: Path, *, weight: float = 2.0, dims: Any = ("n", 4)) -> Model:
    """x -> MatMul by `weight` times the identity -> Relu -> y."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="matmul"),
            helper.make_node("Relu", ["h"], ["y"], name="relu"),
        ],
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(dims))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(dims))],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32) * weight, "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return load_model(path)


def some_feeds(count: int = 3, *, rows: int = 2, scale: float = 1.0) -> ListFeeds:
    generator = np.random.default_rng(7)
    return ListFeeds(
        [
            {"x": (generator.standard_normal((rows, 4)) * scale).astype(np.float32)}
            for _ in range(count)
        ]
    )


def test_minmax_ranges_are_those_of_the_tensors_themselves(tmp_path: Path) -> None:
    model, feeds = save_chain(tmp_path / "m.onnx"), some_feeds(5)
    found = calibrate(model, feeds, cache=tmp_path / "cache")
    everything = np.concatenate([s["x"] for s in feeds.samples])
    ranges = found.ranges()
    assert (ranges["x"].low, ranges["x"].high) == (everything.min(), everything.max())
    assert (ranges["h"].low, ranges["h"].high) == (2 * everything.min(), 2 * everything.max())
    assert (ranges["y"].low, ranges["y"].high) == (0.0, 2 * everything.max())
    assert found.samples == 5


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_ranges_are_read_from_disk_the_second_time(tmp_path: Path, method: str) -> None:
    model, feeds = save_chain(tmp_path / "m.onnx"), some_feeds()
    first = calibrate(model, feeds, method=method, cache=tmp_path / "cache")
    feeds.read = 0
    second = calibrate(model, feeds, method=method, cache=tmp_path / "cache")
    assert (first.reused, second.reused, feeds.read) == (False, True, 0)
    assert first.ranges() == second.ranges()


def test_ranges_of_a_model_with_other_weights_are_not_reused(tmp_path: Path) -> None:
    # ONNX Runtime's own check accepts this: it compares the method only.
    feeds = some_feeds()
    small = save_chain(tmp_path / "small.onnx", weight=1.0)
    large = save_chain(tmp_path / "large.onnx", weight=100.0)
    a = calibrate(small, feeds, cache=tmp_path / "cache")
    b = calibrate(large, feeds, cache=tmp_path / "cache")
    assert not b.reused
    assert b.ranges()["h"].high == pytest.approx(100 * a.ranges()["h"].high)


def test_every_argument_that_changes_a_range_changes_the_key(tmp_path: Path) -> None:
    model, feeds = save_chain(tmp_path / "m.onnx"), some_feeds()
    keys = [
        calibration_key(model, feeds, method="minmax"),
        calibration_key(model, feeds, method="entropy"),
        calibration_key(model, feeds, method="percentile"),
        calibration_key(model, feeds, method="percentile", percentile=99.0),
        calibration_key(model, feeds, method="minmax", op_types=["Relu"]),
        calibration_key(model, feeds, method="minmax", limit=2),
        calibration_key(model, some_feeds(scale=2.0), method="minmax"),
        calibration_key(save_chain(tmp_path / "o.onnx", weight=3.0), feeds, method="minmax"),
    ]
    assert len(set(keys)) == len(keys)


def test_what_does_not_change_a_range_does_not_change_the_key(tmp_path: Path) -> None:
    model, feeds = save_chain(tmp_path / "m.onnx"), some_feeds()
    plain = calibration_key(model, feeds, method="minmax")
    assert plain == calibration_key(model, feeds, method="minmax", percentile=99.0, limit=50)
    assert calibration_key(model, feeds, method="minmax", op_types=["A", "B"]) == (
        calibration_key(model, feeds, method="minmax", op_types=["B", "A", "B"])
    )


@pytest.mark.parametrize("damage", ["", "{", "null", '{"data": 1}', "\x00\x01"])
def test_a_damaged_cache_file_is_observed_anew(tmp_path: Path, damage: str) -> None:
    model, feeds = save_chain(tmp_path / "m.onnx"), some_feeds()
    first = calibrate(model, feeds, cache=tmp_path / "cache")
    before = first.ranges()
    first.path.write_text(damage)
    again = calibrate(model, feeds, cache=tmp_path / "cache")
    assert not again.reused
    assert again.ranges() == before


def test_a_limit_takes_the_first_samples_only(tmp_path: Path) -> None:
    model, feeds = save_chain(tmp_path / "m.onnx"), some_feeds(6)
    found = calibrate(model, feeds, limit=2, cache=tmp_path / "cache")
    assert found.samples == feeds.read == 2
    first = np.concatenate([s["x"] for s in feeds.samples[:2]])
    assert found.ranges()["x"].high == first.max()


def test_a_cache_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    model, feeds = save_chain(tmp_path / "m.onnx"), some_feeds()
    found = calibrate(model, feeds, cache=tmp_path / "cache")
    assert [p.name for p in found.path.parent.iterdir()] == [found.path.name]
    assert json.loads(found.path.read_text())["calibration_method"]["value"].endswith("MinMax")


@pytest.mark.parametrize(("value", "count"), [(np.nan, 1), (np.inf, 2), (-np.inf, 1)])
def test_a_feed_that_is_not_finite_is_refused_by_name(
    tmp_path: Path, value: float, count: int
) -> None:
    model, feeds = save_chain(tmp_path / "m.onnx"), some_feeds()
    feeds.samples[1]["x"].flat[:count] = value
    with pytest.raises(CalibrationError) as caught:
        calibrate(model, feeds, cache=tmp_path / "cache")
    assert caught.value.message == (
        f"sample 'sample 1': input 'x' holds {count} NaN or infinite "
        f"{'value' if count == 1 else 'values'} of 8, expected finite numbers to calibrate on"
    )
    assert caught.value.hint == "Take this sample out of the calibration feeds or mend it."
    assert not (tmp_path / "cache" / "calibration").exists()


@pytest.mark.parametrize("feeds", [None, ListFeeds([])])
def test_no_feeds_are_refused(tmp_path: Path, feeds: ListFeeds | None) -> None:
    with pytest.raises(CalibrationError) as caught:
        calibrate(save_chain(tmp_path / "m.onnx"), feeds, cache=tmp_path)
    assert caught.value.message == (
        "static quantization needs calibration feeds, and there are none"
    )
    assert "--format dynamic" in caught.value.hint


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_samples_of_unequal_shape_are_calibrated_as_their_values_in_one(
    tmp_path: Path, method: str
) -> None:
    model, ragged = save_chain(tmp_path / "m.onnx"), some_feeds(2)
    ragged.samples += some_feeds(2, rows=5).samples
    ragged.names = tuple("abcd")
    together = ListFeeds([{"x": np.concatenate([s["x"] for s in ragged.samples])}])
    found, wanted = (
        calibrate(model, feeds, method=method, cache=tmp_path / "cache")
        for feeds in (ragged, together)
    )
    assert json.loads(found.path.read_text()) == json.loads(wanted.path.read_text())
    assert found.path != wanted.path


def test_a_tensor_that_is_ragged_inside_the_model_is_calibrated(tmp_path: Path) -> None:
    # NonZero makes the inner shape depend on the values, equal inputs or not.
    graph = helper.make_graph(
        [
            helper.make_node("NonZero", ["x"], ["at"], name="nonzero"),
            helper.make_node("Cast", ["at"], ["real"], name="cast", to=TensorProto.FLOAT),
            helper.make_node("Relu", ["real"], ["y"], name="relu"),
        ],
        "ragged",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, None])],
    )
    path = tmp_path / "m.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    feeds = ListFeeds(
        [{"x": np.array(v, np.float32)} for v in ([1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0])]
    )
    found = calibrate(load_model(path), feeds, method="entropy", cache=tmp_path / "cache")
    assert (found.ranges()["real"].low, found.ranges()["real"].high) == (0.0, 2.0)
    counts = json.loads(found.path.read_text())["data"]["real"]["hist"]["data"]
    assert sum(counts) == 1 + 3 + 2


# -- several methods at once ---------------------------------------------------------------------


def test_two_runs_over_the_feeds_give_the_files_of_all_methods(tmp_path: Path) -> None:
    model, feeds = save_chain(tmp_path / "m.onnx"), some_feeds(5)
    together = calibrate_many(model, feeds, percentile=99.0, cache=tmp_path / "together")
    assert feeds.read == 2 * 5
    assert list(together) == ["minmax", "entropy", "percentile"]
    for method, found in together.items():
        assert isinstance(found, Calibration)
        alone = calibrate(model, feeds, method=method, percentile=99.0, cache=tmp_path / "alone")
        assert (found.path.name, found.samples, found.reused, found.notes) == (
            alone.path.name, 5, False, alone.notes,
        )  # fmt: skip
        assert found.path.read_bytes() == alone.path.read_bytes()


def test_methods_that_are_on_disk_are_not_observed_again(tmp_path: Path) -> None:
    model, feeds = save_chain(tmp_path / "m.onnx"), some_feeds()
    calibrate(model, feeds, method="percentile", cache=tmp_path)
    feeds.read = 0
    found = calibrate_many(model, feeds, methods=["percentile", "minmax"], cache=tmp_path)
    assert [isinstance(c, Calibration) and c.reused for c in found.values()] == [True, False]
    assert feeds.read == 3
    told: list[float] = []
    again = calibrate_many(
        model, feeds, methods=["minmax", "percentile"], cache=tmp_path,
        progress=lambda fraction, _: told.append(fraction),
    )  # fmt: skip
    assert list(again) == ["minmax", "percentile"]
    assert (feeds.read, told) == (3, [1.0])


def test_a_method_that_fails_leaves_the_others_their_ranges(tmp_path: Path) -> None:
    model = save_chain(tmp_path / "m.onnx", weight=3e38)
    feeds = ListFeeds([{"x": np.full((2, 4), v, np.float32)} for v in (0.5, 100)])
    found = calibrate_many(model, feeds, cache=tmp_path / "cache")
    assert isinstance(found["minmax"], Calibration)
    for method in ("entropy", "percentile"):
        error = found[method]
        assert isinstance(error, CalibrationError)
        assert error.message == (
            f"calibration with method {method} fails: tensor 'h' inside the model is infinite or "
            "NaN on the calibration feeds, first on sample 'sample 1'"
        )
        with pytest.raises(CalibrationError) as caught:
            calibrate(model, feeds, method=method, cache=tmp_path / "cache")
        assert caught.value.message == error.message
    assert len(list((tmp_path / "cache" / "calibration").iterdir())) == 1


def test_a_histogram_tells_progress_over_both_runs(tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    calibrate(
        save_chain(tmp_path / "m.onnx"), some_feeds(2), method="entropy", cache=tmp_path / "cache",
        progress=lambda *args: told.append(args),
    )  # fmt: skip
    assert told == [
        (0.0, "calibrating: sample 1 of 2"),
        (0.25, "calibrating: sample 2 of 2"),
        (0.5, "calibrating: working out the ranges"),
        (0.5, "calibrating: sample 1 of 2, again for the histograms"),
        (0.75, "calibrating: sample 2 of 2, again for the histograms"),
        (1.0, "calibrating: working out the ranges"),
    ]


@pytest.mark.parametrize("percentile", [-1.0, 100.5, float("nan")])
def test_a_percentile_outside_of_its_range_is_the_callers_mistake(
    tmp_path: Path, percentile: float
) -> None:
    with pytest.raises(ValueError, match="expected a number from 0 to 100"):
        calibrate(
            save_chain(tmp_path / "m.onnx"), some_feeds(), method="percentile",
            percentile=percentile, cache=tmp_path,
        )  # fmt: skip


# -- against the installed ONNX Runtime ----------------------------------------------------------


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: ListFeeds) -> None:
        self.iterator = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.iterator, None)


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_the_installed_onnx_runtime_keeps_the_contract(method: str) -> None:
    """Where this fails, calibration still works by ONNX Runtime's own, slower and larger route."""
    assert calibration._contract(method)


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_the_file_makes_the_model_that_the_public_function_makes(
    tmp_path: Path, method: str
) -> None:
    model, feeds = save_chain(tmp_path / "m.onnx", weight=0.3), some_feeds(4)
    found = calibrate(model, feeds, method=method, cache=tmp_path / "cache")
    made = []
    for name, reader, ranges in (
        ("public", Reader(feeds), tmp_path / "public.json"),
        ("ours", None, found.path),
    ):
        with hushed():
            quantize_static(
                tmp_path / "m.onnx", tmp_path / f"{name}.onnx", reader,
                calibrate_method=calibration.METHODS[method], calibration_cache_path=ranges,
            )  # fmt: skip
        made.append((tmp_path / f"{name}.onnx").read_bytes())
    assert made[0] == made[1]
    public, ours = (json.loads(p.read_text()) for p in (tmp_path / "public.json", found.path))
    assert public == ours


@pytest.fixture
def other_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An ONNX Runtime whose histograms of values have twice the bins."""
    collect = HistogramCollector.collect_value

    def finer(self: HistogramCollector, name_to_arr: Any) -> None:
        self.num_bins *= 2
        try:
            collect(self, name_to_arr)
        finally:
            self.num_bins //= 2

    monkeypatch.setattr(HistogramCollector, "collect_value", finer)
    calibration._contract.cache_clear()
    yield
    calibration._contract.cache_clear()


@pytest.mark.usefixtures("other_onnx_runtime")
def test_methods_that_onnx_runtime_counts_otherwise_are_left_to_it(tmp_path: Path) -> None:
    model, feeds = save_chain(tmp_path / "m.onnx"), some_feeds(3)
    kept = {m: calibration._contract(m) for m in calibration.METHODS}
    assert kept == {"minmax": True, "entropy": False, "percentile": True}
    told: list[float] = []
    found = calibrate_many(
        model, feeds, cache=tmp_path / "cache", progress=lambda f, _: told.append(f)
    )
    assert isinstance(found["entropy"], Calibration)
    ranges = json.loads(found["entropy"].path.read_text())
    assert len(ranges["data"]["x"]["hist"]["data"]) == 256
    assert ranges["calibration_method"]["value"].endswith("Entropy")
    assert told == sorted(told)
    assert feeds.read == 3 * 3


@pytest.mark.usefixtures("other_onnx_runtime")
def test_the_route_by_onnx_runtime_refuses_samples_of_unequal_shape(tmp_path: Path) -> None:
    model = save_chain(tmp_path / "m.onnx")
    feeds = ListFeeds([{"x": np.ones((rows, 4), np.float32)} for rows in (2, 3)])
    with pytest.raises(CalibrationError) as caught:
        calibrate(model, feeds, method="entropy", cache=tmp_path / "cache")
    assert caught.value.message == (
        "sample 'sample 1': input 'x' has shape [3, 4], the samples before it [2, 4]; "
        "entropy and percentile need equal shapes"
    )
    assert "--method minmax" in caught.value.hint
    found = calibrate_many(model, feeds, cache=tmp_path / "cache")
    assert [type(c) for c in found.values()] == [Calibration, CalibrationError, Calibration]


@pytest.mark.usefixtures("other_onnx_runtime")
def test_the_route_by_onnx_runtime_explains_infinity(tmp_path: Path) -> None:
    model = save_chain(tmp_path / "m.onnx", weight=3e38)
    feeds = ListFeeds([{"x": np.full((2, 4), 100.0, np.float32)}])
    with pytest.raises(CalibrationError, match="infinite or NaN on the calibration feeds"):
        calibrate(model, feeds, method="entropy", cache=tmp_path / "cache")


# -- what is refused, and what is left alone -----------------------------------------------------


def test_an_infinite_activation_is_said_with_the_tensor(tmp_path: Path) -> None:
    model = save_chain(tmp_path / "m.onnx", weight=3e38)
    feeds = ListFeeds([{"x": np.full((2, 4), 100.0, np.float32)}])
    found = calibrate(model, feeds, cache=tmp_path / "cache")
    assert len(found.notes) == 1
    assert "infinity or NaN in 2 of 3 tensors" in found.notes[0]
    again = calibrate(model, feeds, cache=tmp_path / "cache")
    assert again.notes == found.notes
    with pytest.raises(CalibrationError, match="infinite or NaN on the calibration feeds"):
        calibrate(model, feeds, method="percentile", cache=tmp_path / "cache")


def test_a_sample_the_model_cannot_run_is_named(tmp_path: Path) -> None:
    model = save_chain(tmp_path / "m.onnx", dims=(2, 4))
    feeds = some_feeds()
    feeds.samples[2]["x"] = np.ones((5, 4), np.float32)
    with pytest.raises(CalibrationError, match="calibration fails on sample 'sample 2': "):
        calibrate(model, feeds, cache=tmp_path / "cache")


def test_entries_of_a_feed_the_model_does_not_have_are_left_out(tmp_path: Path) -> None:
    model, feeds = save_chain(tmp_path / "m.onnx"), some_feeds()
    for sample in feeds.samples:
        sample["label"] = np.array([3])
    assert calibrate(model, feeds, cache=tmp_path / "cache").samples == 3


def test_progress_is_told_before_every_sample_and_can_stop(tmp_path: Path) -> None:
    model, feeds = save_chain(tmp_path / "m.onnx"), some_feeds(4)
    told: list[tuple[float, str]] = []

    def stop_at_the_third(fraction: float, message: str) -> None:
        told.append((fraction, message))
        if len(told) == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        calibrate(model, feeds, cache=tmp_path / "cache", progress=stop_at_the_third)
    assert told == [
        (0.0, "calibrating: sample 1 of 4"),
        (0.25, "calibrating: sample 2 of 4"),
        (0.5, "calibrating: sample 3 of 4"),
    ]
    assert feeds.read == 2
    assert not (tmp_path / "cache" / "calibration").exists()


def test_the_reader_holds_one_sample_at_a_time() -> None:
    feeds = some_feeds(3)
    reader = FeedReader(feeds, ["x"])
    assert len(reader) == 3
    for count in (1, 2, 3):
        assert reader.get_next() is not None
        assert feeds.read == count
    assert reader.get_next() is None


def test_nothing_is_written_beside_the_model_or_into_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model = save_chain(tmp_path / "models" / "m.onnx")
    calibrate(model, some_feeds(), method="entropy", cache=tmp_path / "cache")
    assert os.listdir(tmp_path / "models") == ["m.onnx"]
    assert os.listdir(tmp_path / "here") == []


def test_hushed_hears_the_root_logger_and_leaves_it_as_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    with hushed() as heard:
        logging.warning("chatter")
        print("more chatter")
        np.log(np.zeros(1))
    assert heard == ["chatter"]
    assert (root.handlers, root.level) == before
    assert capsys.readouterr().out == ""


def test_hushed_restores_the_root_logger_after_an_error() -> None:
    root = logging.getLogger()
    before = root.handlers[:]
    with pytest.raises(ValueError, match="boom"), hushed():
        raise ValueError("boom")
    assert root.handlers == before


def test_an_unknown_method_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown calibration method 'mse'"):
        calibrate(save_chain(tmp_path / "m.onnx"), some_feeds(), method="mse", cache=tmp_path)


def test_the_chain_computes_what_the_tests_assume(tmp_path: Path) -> None:
    model = save_chain(tmp_path / "m.onnx")
    x = np.array([[1, -1, 2, -2]], np.float32)
    y = open_session(model, optimized=False).run({"x": x})["y"]
    np.testing.assert_array_equal(y, [[2, 0, 4, 0]])
