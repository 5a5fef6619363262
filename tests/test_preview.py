"""Previews: the figures that the re-quantized file has once it is compared.

The oracle is `compare_models` on the file that `quantize_model` writes with the list.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from inspector.calibration import calibrate
from inspector.compare import compare_models
from inspector.comparison import Comparison, judged_db
from inspector.errors import Cancelled
from inspector.feeds import Feeds, load_feeds, random_feeds
from inspector.model import Model
from inspector.model_files import load_model
from inspector.prepare import prepare
from inspector.preview import Preview, Previewer, RecipeSource
from inspector.quantize import quantize_model
from inspector.recipe import QuantConfig
from inspector.scheme import read_scheme
from tests.samples import MODELS, boxes_and_scores_in_one_concat, conv_relu_gemm, needs_models, save

CONFIG = QuantConfig()
GTCRN_STATES = (
    ("conv_cache_out", "conv_cache"),
    ("tra_cache_out", "tra_cache"),
    ("inter_cache_out", "inter_cache"),
)


class Opened:
    """A previewer, and the real thing beside it."""

    def __init__(self, float_model: Model, feeds: Feeds, folder: Path, **options: Any) -> None:
        self.float_model, self.feeds, self.folder, self.options = (
            float_model, feeds, folder, options,
        )  # fmt: skip
        self.prepared = prepare(float_model, CONFIG, folder)
        ranges = calibrate(self.prepared.model, feeds, cache=folder)
        source = RecipeSource(
            self.prepared, CONFIG, ranges.path, feeds[0], options.get("states", ())
        )
        self.board = source.board
        self.previewer = Previewer(float_model, source, feeds, **options)

    def preview(self, *exclude: str) -> Preview:
        return self.previewer.preview(exclude)

    def really(self, *exclude: str) -> tuple[Comparison, Model]:
        made = quantize_model(
            self.float_model, CONFIG, calibration=self.feeds, exclude=exclude,
            output=self.folder / "out.onnx", cache=self.folder,
        )  # fmt: skip
        quantized = load_model(made.path)
        return compare_models(
            self.float_model, quantized, self.feeds, measure_latency=False,
            explain_deployed=False, **self.options,
        ), quantized  # fmt: skip


def close(a: float, b: float) -> bool:
    return a == b or math.isclose(a, b, rel_tol=1e-9) or (math.isnan(a) and math.isnan(b))


def near(a: float, b: float) -> bool:
    """Equal but for what the comparison's faster sums per channel leave out."""
    return close(a, b) or math.isclose(a, b, abs_tol=1e-5)


@needs_models
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlperf-resnet8", {}),
        pytest.param("fastestdet", {}, marks=pytest.mark.slow),
        pytest.param("gtcrn", {"states": GTCRN_STATES}, marks=pytest.mark.slow),
        pytest.param("magika", {}, marks=pytest.mark.slow),
    ],
)
def test_a_preview_has_the_figures_of_the_comparison(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    float_model = load_model(MODELS / name / "model.onnx")
    feeds = load_feeds(MODELS / name / "inputs", float_model, limit=3)
    opened = Opened(float_model, feeds, tmp_path, **options)
    nodes = [n.name for n in float_model.nodes if n.op_type in ("Conv", "Gemm", "MatMul", "Add")]
    for exclude in ((), nodes[:1], nodes[2:6]):
        preview = opened.preview(*exclude)
        comparison, quantized = opened.really(*exclude)
        outputs = {o.name: o for o in comparison.outputs}
        assert {o.name for o in preview.outputs} == set(outputs)
        for found in preview.outputs:
            real = outputs[found.name]
            assert close(found.sqnr_db, real.sqnr_db)
            assert near(found.worst_part_sqnr_db, judged_db(real))
            assert near(found.worst_channel_sqnr_db, real.worst_channel_sqnr_db)
            assert close(found.worst_sample_sqnr_db, real.worst_sample_sqnr_db)
            assert close(found.median_sample_sqnr_db, real.median_sample_sqnr_db)
            assert all(map(close, found.per_sample_sqnr_db, real.per_sample_sqnr_db))
        assert preview.task == comparison.task
        kept = {t.name for t in read_scheme(quantized).tensors if t.kind == "weight"}
        assert not {f"{n}_DequantizeLinear_Output" for n in preview.float_weights} & kept


@needs_models
@pytest.mark.slow
def test_padding_is_left_out_of_a_preview_as_of_a_comparison(tmp_path: Path) -> None:
    float_model = load_model(MODELS / "minilm-l6" / "model.onnx")
    feeds = load_feeds(MODELS / "minilm-l6" / "inputs", float_model, limit=2)
    opened = Opened(float_model, feeds, tmp_path, mask="attention_mask")
    comparison, _ = opened.really()
    [found], [real] = opened.preview().outputs, comparison.outputs
    assert close(found.sqnr_db, real.sqnr_db)
    assert close(found.worst_sample_sqnr_db, real.worst_sample_sqnr_db)


def test_parts_joined_into_an_output_are_judged_as_in_a_comparison(tmp_path: Path) -> None:
    float_model = load_model(save(boxes_and_scores_in_one_concat(), tmp_path / "model.onnx"))
    feeds = random_feeds(float_model, samples=2, seed=0)
    opened = Opened(float_model, feeds, tmp_path)
    comparison, _ = opened.really()
    [found], [real] = opened.preview().outputs, comparison.outputs
    assert found.worst_part_sqnr_db < found.sqnr_db - 20
    assert near(found.worst_part_sqnr_db, judged_db(real))
    assert near(found.worst_channel_sqnr_db, real.worst_channel_sqnr_db)


def small(tmp_path: Path) -> Opened:
    float_model = load_model(save(conv_relu_gemm(), tmp_path / "model.onnx"))
    return Opened(float_model, random_feeds(float_model, samples=2, seed=0), tmp_path)


def test_a_list_of_everything_is_the_float_model(tmp_path: Path) -> None:
    opened = small(tmp_path)
    names = [n.name for n in opened.prepared.model.nodes]
    whole, nothing = opened.previewer.preview(()), opened.previewer.preview(names)
    assert [o.sqnr_db for o in nothing.outputs] == [math.inf]
    assert (whole.float_macs_fraction, nothing.float_macs_fraction) == (0.0, 1.0)
    assert (whole.freed, whole.added, whole.float_weights) == ((), (), ())
    assert set(nothing.freed) == set(opened.board.whole.activations)
    assert set(nothing.float_weights) == set(opened.board.whole.weights)
    constants = [opened.prepared.model.constant(n) for n in opened.prepared.model.constant_names]
    assert nothing.weight_bytes == sum(c.nbytes for c in constants if c is not None)
    assert nothing.whole_weight_bytes == whole.weight_bytes < 0.5 * nothing.weight_bytes


def test_excluding_a_relu_alone_adds_a_pair(tmp_path: Path) -> None:
    opened = small(tmp_path)
    relu = next(n for n in opened.prepared.model.nodes if n.op_type == "Relu")
    preview = opened.previewer.preview([relu.name])
    assert preview.added == (relu.inputs[0],)


def test_a_preview_can_be_stopped(tmp_path: Path) -> None:
    opened = small(tmp_path)

    def stop(fraction: float, _message: str) -> None:
        if fraction > 0:
            raise Cancelled

    with pytest.raises(Cancelled):
        opened.previewer.preview((), progress=stop)
    assert opened.previewer.preview(()).outputs
