from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inspector import workbench
from inspector.cli import main as cli_main
from inspector.errors import Cancelled, FeedError, ModelError, ReportError
from inspector.feeds import load_feeds
from inspector.model import load_model
from inspector.render import read_comparison, strict
from inspector.store import FeedSource, Workspace
from tests.samples import MODELS, ROOT, needs_models

DETECTOR = ROOT / "sample_models" / "digit-detector"
TRANSFORMER = ROOT / "sample_models" / "digit-transformer"


def source(path: Path, **more: Any) -> FeedSource:
    return FeedSource(kind="path", path=str(path), **more)


def load_detector(root: Path) -> str:
    return workbench.load_pair(
        root,
        float_path=DETECTOR / "float.onnx",
        quantized_path=DETECTOR / "quantized.onnx",
        inputs=source(DETECTOR / "feeds"),
    )


def load_transformer(root: Path) -> str:
    return workbench.load_pair(
        root,
        float_path=TRANSFORMER / "float.onnx",
        quantized_path=TRANSFORMER / "quantized.onnx",
        inputs=source(TRANSFORMER / "feeds.npz", samples=12),
    )


def cli(*words: str | Path) -> int:
    return cli_main([str(w) for w in words])


def test_the_bundled_detector_shows_its_collapse(tmp_path: Path) -> None:
    run_id = load_detector(tmp_path)
    workspace = Workspace(tmp_path)
    run = workspace.run(run_id)
    assert run.number == 0
    assert workspace.current_pair() == run.pair_id
    assert "silent" in run.summary["headline"]
    comparison = read_comparison(workspace.comparison(run_id))
    (output,) = comparison.outputs
    assert output.sqnr_db > 35, "pooled, it looks fine"
    assert output.median_channel_sqnr_db == 0.0
    scores = next(s for s in output.slices if "Sigmoid" in s.source)
    assert (scores.stop - scores.start, scores.sqnr_db) == (10, 0.0)
    assert run.recipe["format"] == "qdq"
    assert run.recipe["activation_type"] == "int8"


def test_the_bundled_transformer_is_healthy(tmp_path: Path) -> None:
    run_id = load_transformer(tmp_path)
    workspace = Workspace(tmp_path)
    assert "nothing stands out" in workspace.run(run_id).summary["headline"]
    comparison = read_comparison(workspace.comparison(run_id))
    assert comparison.task is not None
    assert comparison.task.top1_agreement == 1.0
    assert comparison.outputs[0].sqnr_db > 29


def test_leaving_the_join_in_float_brings_the_scores_back(tmp_path: Path) -> None:
    loaded = load_detector(tmp_path)
    workspace = Workspace(tmp_path)
    run_id = workbench.requantize(
        tmp_path, run_id=loaded, config=workspace.run(loaded).recipe, exclude=["/head/Concat_3"]
    )
    run = workspace.run(run_id)
    numbers = [r.number for r in workspace.runs(run.pair_id)]
    assert numbers == [0, 1, 2], "the run without exclusions is made first, of the same recipe"
    base = workspace.runs(run.pair_id)[1]
    assert run.parent == base.id
    after = read_comparison(workspace.comparison(run_id))
    before = read_comparison(workspace.comparison(base.id))
    assert before.outputs[0].median_channel_sqnr_db == 0.0
    assert after.outputs[0].median_channel_sqnr_db > 15
    assert after.seen == "mixed"
    (effect,) = run.effects
    assert effect["name"] == "/head/Concat_3"
    assert effect["output_dtype"] == "float32"
    assert "--exclude /head/Concat_3" in run.summary["commands"]["inspector"]
    assert run.summary["exclusion_list"]["nodes"][0]["name"] == "/head/Concat_3"
    assert load_model(run.model.path).sha256 == run.model.sha256


def test_the_same_request_without_exclusions_is_not_run_twice(tmp_path: Path) -> None:
    loaded = load_detector(tmp_path)
    recipe = Workspace(tmp_path).run(loaded).recipe
    first = workbench.requantize(tmp_path, run_id=loaded, config=recipe, exclude=[])
    assert workbench.requantize(tmp_path, run_id=first, config=recipe, exclude=[]) == first


def test_the_same_pair_again_opens_its_latest_run_and_changed_feeds_do_not(tmp_path: Path) -> None:
    feeds = tmp_path / "feeds"
    shutil.copytree(DETECTOR / "feeds", feeds)

    def load() -> str:
        return workbench.load_pair(
            tmp_path / "data",
            float_path=DETECTOR / "float.onnx",
            quantized_path=DETECTOR / "quantized.onnx",
            inputs=source(feeds),
        )

    loaded = load()
    recipe = Workspace(tmp_path / "data").run(loaded).recipe
    made = workbench.requantize(tmp_path / "data", run_id=loaded, config=recipe, exclude=[])
    assert load() == made
    (feeds / "11.png").unlink()
    assert load() not in (loaded, made)
    assert len(Workspace(tmp_path / "data").pairs()) == 2


def test_freeing_a_node_fully_names_its_neighbours_and_works(tmp_path: Path) -> None:
    loaded = load_detector(tmp_path)
    recipe = Workspace(tmp_path).run(loaded).recipe
    node = "/head/Concat_3"
    run_id = workbench.requantize(tmp_path, run_id=loaded, config=recipe, exclude=[node])
    further = workbench.propose_free(tmp_path, run_id=run_id, node=node)
    assert further == ["/head/Mul", "/head/Sigmoid"]
    freed = workbench.requantize(tmp_path, run_id=run_id, config=recipe, exclude=[node, *further])
    effects = {e["name"]: e for e in Workspace(tmp_path).run(freed).effects}
    assert effects[node]["status"] == "float now"


def test_the_histograms_of_a_tensor_count_every_value_once(tmp_path: Path) -> None:
    run_id = load_detector(tmp_path)
    detail = workbench.inspect_tensor(tmp_path, run_id=run_id, tensor="output0")
    assert detail["count"] == 12 * 14 * 2000
    for side in ("float", "quantized"):
        inside = sum(detail[f"{side}_counts"])
        assert inside + detail[f"{side}_below"] + detail[f"{side}_above"] == detail["count"]
    assert sum(map(sum, detail["map_counts"])) <= detail["count"]
    model = load_model(DETECTOR / "float.onnx")
    from inspector.runtime import open_session

    session = open_session(model, optimized=False)
    values = np.concatenate(
        [session.run(f)["output0"].ravel() for f in load_feeds(DETECTOR / "feeds", model)]
    )
    counts, _ = np.histogram(values.astype(np.float64), detail["edges"])
    np.testing.assert_array_equal(counts, detail["float_counts"])
    assert Workspace(tmp_path).detail(run_id, "activation:output0") == detail


def test_a_weight_is_inspected_without_running_the_model(tmp_path: Path) -> None:
    run_id = load_detector(tmp_path)
    weights = read_comparison(Workspace(tmp_path).comparison(run_id)).weights
    weight = next(w for w in weights if w.kind == "weight" and w.op_type == "Conv")
    detail = workbench.inspect_tensor(tmp_path, run_id=run_id, tensor=weight.name, kind="weight")
    assert detail["count"] == int(np.prod(weight.shape))
    assert detail["error_unit"] == "steps"


def test_a_tensor_that_is_not_compared_is_refused(tmp_path: Path) -> None:
    run_id = load_detector(tmp_path)
    with pytest.raises(ReportError, match="compares no activation called 'nowhere'"):
        workbench.inspect_tensor(tmp_path, run_id=run_id, tensor="nowhere")


def test_a_float_model_alone_is_quantized_with_the_defaults(tmp_path: Path) -> None:
    run_id = workbench.load_pair(
        tmp_path,
        float_path=TRANSFORMER / "float.onnx",
        quantized_path=None,
        inputs=source(TRANSFORMER / "feeds.npz", samples=12),
    )
    run = Workspace(tmp_path).run(run_id)
    assert run.number == 1
    assert run.summary["quant_format"] == "qdq"


def test_a_pair_that_fails_leaves_what_was_loaded(tmp_path: Path) -> None:
    kept = load_transformer(tmp_path)
    workspace = Workspace(tmp_path)
    with pytest.raises(ModelError):
        workbench.load_pair(
            tmp_path,
            float_path=DETECTOR / "quantized.onnx",
            quantized_path=DETECTOR / "float.onnx",
            inputs=source(DETECTOR / "feeds"),
        )
    with pytest.raises(FeedError):
        workbench.load_pair(
            tmp_path,
            float_path=DETECTOR / "float.onnx",
            quantized_path=DETECTOR / "quantized.onnx",
            inputs=source(TRANSFORMER / "feeds.npz"),
        )
    assert len(workspace.pairs()) == 1
    assert workspace.current_pair() == workspace.run(kept).pair_id


def test_a_stopped_quantization_leaves_no_run(tmp_path: Path) -> None:
    loaded = load_transformer(tmp_path)
    workspace = Workspace(tmp_path)

    def stop(fraction: float, _message: str) -> None:
        if fraction > 0.3:
            raise Cancelled

    with pytest.raises(Cancelled):
        workbench.requantize(
            tmp_path, run_id=loaded, config=workspace.run(loaded).recipe, exclude=[], progress=stop
        )
    assert [r.number for r in workspace.runs(workspace.run(loaded).pair_id)] == [0]
    assert not list((tmp_path / "temporary").iterdir())


def test_a_preview_shows_the_picture_as_the_model_gets_it(tmp_path: Path) -> None:
    preview = workbench.preview_feed(
        float_path=DETECTOR / "float.onnx", inputs=source(DETECTOR / "feeds")
    )
    assert preview["samples"] == 12
    assert preview["ranges"][0]["shape"] == [1, 3, 640, 640]
    assert 0 <= preview["ranges"][0]["low"] <= preview["ranges"][0]["high"] <= 1
    assert preview["picture_png"]


def test_a_description_counts_what_is_quantized() -> None:
    description = workbench.describe_model(DETECTOR / "quantized.onnx")
    assert description["quant_format"] == "qdq"
    assert 0 < description["quantized_nodes"] <= description["nodes"]
    assert description["recipe"]["weight_type"] == "int8"
    assert workbench.describe_model(DETECTOR / "float.onnx")["recipe"] is None


@needs_models
@pytest.mark.slow
def test_app_and_command_line_give_the_same_bytes_and_numbers(tmp_path: Path) -> None:
    folder = MODELS / "fastestdet"
    exclude = ["Conv_0", "Concat_209", "Softmax_208"]
    loaded = workbench.load_pair(
        tmp_path / "app",
        float_path=folder / "model.onnx",
        quantized_path=folder / "ort_static_qdq.onnx",
        inputs=source(folder / "inputs"),
    )
    workspace = Workspace(tmp_path / "app")
    known = load_model(folder / "model.onnx").node_by_name
    exclude = [n for n in exclude if n in known] or [*known][:3]
    run_id = workbench.requantize(
        tmp_path / "app", run_id=loaded, config=workspace.run(loaded).recipe, exclude=exclude
    )
    words = [w for name in exclude for w in ("--exclude", name)]
    out, listed = tmp_path / "cli.onnx", tmp_path / "exclude.json"
    assert cli("quantize", folder / "model.onnx", "-o", out, "--inputs", folder / "inputs",
               *words, "--save-exclusions", listed) == 0  # fmt: skip
    run = workspace.run(run_id)
    assert run.model.path.read_bytes() == out.read_bytes()
    report = tmp_path / "report.json"
    assert cli("compare", folder / "model.onnx", out, "--inputs", folder / "inputs",
               "--json", report) == 0  # fmt: skip
    from_cli = json.loads(report.read_text())
    from_app = read_comparison(workspace.comparison(run_id))
    assert from_cli["outputs"][0]["sqnr_db"] == from_app.outputs[0].sqnr_db
    assert [a["accumulated_sqnr_db"] for a in from_cli["activations"]] == [
        strict(a.accumulated_sqnr_db) for a in from_app.activations
    ]
    again = tmp_path / "again.onnx"
    assert cli("quantize", folder / "model.onnx", "-o", again, "--inputs", folder / "inputs",
               "--exclude", listed) == 0  # fmt: skip
    assert again.read_bytes() == out.read_bytes()
