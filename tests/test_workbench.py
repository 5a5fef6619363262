from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from inspector import figures, workbench
from inspector.cli import main as cli_main
from inspector.compare import compare_models
from inspector.comparison import Comparison, Pin
from inspector.errors import Cancelled, FeedError, ModelError, ReportError
from inspector.feeds import load_feeds
from inspector.model_files import load_model
from inspector.render import (
    comparison_json,
    find_headline,
    has_isolated,
    largest_added_error,
    read_comparison,
    strict,
)
from inspector.store import (
    PROFILE_KEY,
    FeedSource,
    PairOptions,
    Workspace,
    detail_key,
    isolation_measured,
)
from inspector.web import matches
from tests.samples import (
    MODELS,
    ROOT,
    array,
    floats,
    model,
    needs_models,
    npz_folder,
    qdq_of,
    save,
)

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


def load_small(root: Path) -> str:
    """Conv, Relu, Sigmoid; the quantized twin also holds "odd", of the shape of the Relu."""
    files = root / "small"
    files.mkdir(parents=True)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
    ]
    weight = array("w", floats((4, 3, 1, 1), 1))
    ends: Any = ([("x", [1, 3, 6, 6])], [("y", [1, 4, 6, 6])])
    last = helper.make_node("Sigmoid", ["r"], ["y"], "sigmoid")
    save(model([*nodes, last], *ends, [weight]), files / "float.onnx")
    quantize, constants = qdq_of("r", "r_dq", 0.05, -128)
    odd, more = qdq_of("c", "odd", 0.1, 0)
    last = helper.make_node("Sigmoid", ["r_dq"], ["y"], "sigmoid")
    twin = model([*nodes, *quantize, *odd, last], *ends, [weight, *constants, *more])
    twin.graph.output.add(name="odd", type=twin.graph.output[0].type)
    save(twin, files / "quantized.onnx")
    feeds = npz_folder(files / "feeds", [{"x": floats((1, 3, 6, 6), at)} for at in range(3)])
    return workbench.load_pair(
        root,
        float_path=files / "float.onnx",
        quantized_path=files / "quantized.onnx",
        inputs=source(feeds),
    )


HIDDEN = np.zeros((1, 3), np.float32)


def sequence_files(folder: Path) -> tuple[Path, Path, Path]:
    """Six positions of three features, a state of the sum, and padding of large values."""
    folder.mkdir(parents=True)

    def graph(*, quantized: bool) -> onnx.ModelProto:
        weight = array("w", floats((3, 3), 1))
        nodes, constants = qdq_of("x", "xq", 0.02, 0)
        nodes = nodes if quantized else []
        nodes += [
            helper.make_node("MatMul", ["xq" if quantized else "x", "w"], ["m"], "matmul"),
            helper.make_node("Identity", ["m"], ["y"], "out"),
            helper.make_node("Unsqueeze", ["attention_mask", "last"], ["mask3"], "unsqueeze"),
            helper.make_node("Mul", ["m", "mask3"], ["kept"], "mask"),
            helper.make_node("ReduceSum", ["kept", "one"], ["sum"], "sum", keepdims=0),
            helper.make_node("Add", ["h", "sum"], ["h_out"], "state"),
        ]
        last, one = array("last", np.array([2], np.int64)), array("one", np.array([1], np.int64))
        return model(
            nodes,
            [("x", [1, "n", 3]), ("attention_mask", [1, "n"]), ("h", [1, 3])],
            [("y", [1, "n", 3]), ("h_out", [1, 3])],
            [weight, last, one, *(constants if quantized else [])],
        )

    save(graph(quantized=False), folder / "float.onnx")
    save(graph(quantized=True), folder / "quantized.onnx")
    mask = np.array([[1, 1, 1, 1, 0, 0]], np.float32)
    feeds = [
        {"x": floats((1, 6, 3), at) + 100 * (1 - mask[..., None]), "attention_mask": mask,
         "h": HIDDEN}
        for at in range(2)
    ]  # fmt: skip
    return (
        folder / "float.onnx",
        folder / "quantized.onnx",
        npz_folder(folder / "feeds", feeds),
    )


def load_sequence(root: Path, options: PairOptions) -> str:
    files = root / "sequence"
    names = ("float.onnx", "quantized.onnx", "feeds")
    paths = [files / n for n in names] if files.exists() else sequence_files(files)
    return workbench.load_pair(
        root,
        float_path=paths[0],
        quantized_path=paths[1],
        inputs=source(paths[2]),
        options=options,
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


@pytest.mark.slow
def test_the_same_request_without_exclusions_is_not_run_twice(tmp_path: Path) -> None:
    loaded = load_detector(tmp_path)
    recipe = Workspace(tmp_path).run(loaded).recipe
    first = workbench.requantize(tmp_path, run_id=loaded, config=recipe, exclude=[])
    assert workbench.requantize(tmp_path, run_id=first, config=recipe, exclude=[]) == first


@pytest.mark.slow
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


@pytest.mark.slow
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
    comparison = read_comparison(Workspace(tmp_path).comparison(run_id))
    (record,) = [a for a in comparison.activations if a.name == "output0"]
    key = detail_key("activation", "output0", record.quantized_name)
    assert Workspace(tmp_path).detail(run_id, key) == detail


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


# Matches set by hand, and how a pair is run.

SIGMOID = "/head/Sigmoid_output_0"


def the_comparison(root: Path, run_id: str) -> Comparison:
    return read_comparison(Workspace(root).comparison(run_id))


@pytest.mark.slow
def test_a_match_set_by_hand_stays_with_the_run_and_with_what_is_made_from_it(
    tmp_path: Path,
) -> None:
    run_id = load_detector(tmp_path)
    workspace = Workspace(tmp_path)
    before = the_comparison(tmp_path, run_id)
    (record,) = [a for a in before.activations if a.name == SIGMOID]
    pins = (Pin(float_name=SIGMOID, quantized_name=None),)
    assert workbench.rematch(tmp_path, run_id=run_id, pins=pins) == run_id
    refused = the_comparison(tmp_path, run_id)
    assert SIGMOID not in {a.name for a in refused.activations}
    assert refused.pins == workspace.run(run_id).pins == pins
    assert refused.latency == before.latency, "it is not timed again"
    assert refused.outputs == before.outputs
    assert workspace.run(run_id).summary["feeds_stamp"], "the rest of the summary stays"

    pins = (Pin(float_name=SIGMOID, quantized_name=record.quantized_name),)
    workbench.rematch(tmp_path, run_id=run_id, pins=pins)
    (pinned,) = [a for a in the_comparison(tmp_path, run_id).activations if a.name == SIGMOID]
    assert pinned.matched_by == "pin"
    assert pinned.accumulated_sqnr_db == record.accumulated_sqnr_db
    made = workbench.requantize(
        tmp_path, run_id=run_id, config=workspace.run(run_id).recipe, exclude=[]
    )
    assert workspace.run(made).pins == the_comparison(tmp_path, made).pins == pins

    workbench.rematch(tmp_path, run_id=run_id, pins=())
    (free,) = [a for a in the_comparison(tmp_path, run_id).activations if a.name == SIGMOID]
    assert free == record
    assert workspace.run(run_id).pins == ()


def test_another_partner_has_another_histogram(tmp_path: Path) -> None:
    run_id = load_small(tmp_path)
    first = workbench.inspect_tensor(tmp_path, run_id=run_id, tensor="r")
    pins = (Pin(float_name="r", quantized_name="odd"),)
    workbench.rematch(tmp_path, run_id=run_id, pins=pins)
    second = workbench.inspect_tensor(tmp_path, run_id=run_id, tensor="r")
    assert first["quantized_counts"] != second["quantized_counts"]
    assert first["float_counts"] != [] != second["float_counts"]


def test_a_tensor_with_nan_shows_the_values_that_are_finite(tmp_path: Path) -> None:
    ends: Any = ([("x", [1, 4])], [("y", [1, 4])])
    root = helper.make_node("Sqrt", ["x"], ["s"], "root")
    save(model([root, helper.make_node("Relu", ["s"], ["y"], "end")], *ends), tmp_path / "f.onnx")
    nodes, constants = qdq_of("s", "s_dq", 0.02, -128)
    last = helper.make_node("Relu", ["s_dq"], ["y"], "end")
    save(model([root, *nodes, last], *ends, constants), tmp_path / "q.onnx")
    feeds = [{"x": np.array([[-1.0, 1.0, 4.0, low]], np.float32)} for low in (-1.0, 2.25)]
    run_id = workbench.load_pair(
        tmp_path / "data",
        float_path=tmp_path / "f.onnx",
        quantized_path=tmp_path / "q.onnx",
        inputs=source(npz_folder(tmp_path / "feeds", feeds)),
    )
    detail = workbench.inspect_tensor(tmp_path / "data", run_id=run_id, tensor="s")
    inside = sum(detail["float_counts"]) + detail["float_below"] + detail["float_above"]
    assert inside == 5, "of 8 values, 3 are roots of negative numbers"
    assert detail["edges"][0] <= 1.0
    assert detail["edges"][-1] >= 2.0


def test_a_pin_whose_tensor_a_new_run_lacks_is_dropped_with_a_note(tmp_path: Path) -> None:
    run_id = load_small(tmp_path)
    workspace = Workspace(tmp_path)
    pins = (Pin(float_name="r", quantized_name="odd"), Pin(float_name="c", quantized_name=None))
    workbench.rematch(tmp_path, run_id=run_id, pins=pins)
    made = workbench.requantize(
        tmp_path, run_id=run_id, config=workspace.run(run_id).recipe, exclude=[]
    )
    assert workspace.run(made).pins == pins[1:]
    assert any("the tensor is not: r" in note for note in workspace.run(made).notes)


def test_a_pin_that_cannot_be_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    run_id = load_small(tmp_path)
    before = Workspace(tmp_path).comparison(run_id)
    with pytest.raises(ModelError, match="nowhere"):
        workbench.rematch(
            tmp_path, run_id=run_id, pins=[Pin(float_name="r", quantized_name="nowhere")]
        )
    assert Workspace(tmp_path).comparison(run_id) == before
    assert Workspace(tmp_path).run(run_id).pins == ()


def test_the_tensors_to_choose_from_have_shapes_and_constants_are_told_apart(
    tmp_path: Path,
) -> None:
    run_id = load_small(tmp_path)
    listed = workbench.list_tensors(tmp_path, run_id=run_id)
    known = {side: {each["name"]: each for each in listed[side]} for side in listed}
    assert known["float"]["w"] == {"name": "w", "shape": [4, 3, 1, 1], "constant": True}
    assert known["float"]["r"] == {"name": "r", "shape": [1, 4, 6, 6], "constant": False}
    assert {"odd", "y"} <= known["quantized"].keys()
    assert matches.candidates("r", listed["float"], listed["quantized"])[:1] != ["w"]
    assert "odd" in matches.candidates("r", listed["float"], listed["quantized"])
    assert "w" not in matches.candidates("r", listed["float"], listed["quantized"])


def test_a_pairs_options_are_kept_and_make_another_pair(tmp_path: Path) -> None:
    plain = load_sequence(tmp_path, PairOptions())
    options = PairOptions(mask="attention_mask")
    masked = load_sequence(tmp_path, options)
    workspace = Workspace(tmp_path)
    assert workspace.run(plain).pair_id != workspace.run(masked).pair_id
    assert load_sequence(tmp_path, options) == masked
    assert workspace.pair(workspace.run(masked).pair_id).options == options
    assert the_comparison(tmp_path, masked).mask == "attention_mask"
    without = the_comparison(tmp_path, plain).outputs[0]
    with_mask = the_comparison(tmp_path, masked).outputs[0]
    # What stands in padded positions lies far beyond what the scale can hold.
    assert with_mask.sqnr_db > without.sqnr_db + 10
    made = workbench.requantize(
        tmp_path, run_id=masked, config=workspace.run(masked).recipe, exclude=[]
    )
    assert the_comparison(tmp_path, made).mask == "attention_mask"
    # A histogram leaves padding out too: 2 samples of 6 positions, 2 of them padding.
    detail = workbench.inspect_tensor(tmp_path, run_id=masked, tensor="y")
    assert detail["count"] == 2 * 4 * 3


def test_a_devices_tensors_are_set_beside_the_loaded_file_only(tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    dump.mkdir()
    for at in range(2):
        np.savez(dump / f"{at:02}.npz", y=np.zeros((1, 6, 3), np.float32))
    run_id = load_sequence(tmp_path, PairOptions(device=str(dump)))
    workspace = Workspace(tmp_path)
    (record,) = the_comparison(tmp_path, run_id).device
    assert (record.name, record.samples, record.total_sqnr_db) == ("y", 2, 0.0), "all zero"
    made = workbench.requantize(
        tmp_path, run_id=run_id, config=workspace.run(run_id).recipe, exclude=[]
    )
    assert the_comparison(tmp_path, made).device == ()
    assert any("those of the loaded file" in note for note in workspace.run(made).notes)


def test_options_are_offered_from_what_the_model_and_its_feeds_hold(tmp_path: Path) -> None:
    float_path, _, feeds = sequence_files(tmp_path / "files")
    offered = workbench.list_options(float_path=float_path, inputs=source(feeds))
    assert offered["inputs"] == ["x", "attention_mask", "h"]
    assert offered["mask"] == "attention_mask"
    assert offered["likely_states"] == [["h_out", "h"]]
    assert "CPUExecutionProvider" in offered["providers"]
    full = npz_folder(
        tmp_path / "full",
        [{"x": floats((1, 6, 3)), "attention_mask": np.ones((1, 6), np.float32), "h": HIDDEN}],
    )
    assert workbench.list_options(float_path=float_path, inputs=source(full))["mask"] == ""
    assert workbench.list_options(float_path=float_path)["mask"] == ""


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


# Time and recipes.


def test_a_run_is_profiled_once_and_both_models_by_tensor(tmp_path: Path) -> None:
    run_id = load_small(tmp_path)
    workspace = Workspace(tmp_path)
    assert workspace.detail(run_id, PROFILE_KEY) is None
    told: list[str] = []
    found = workbench.profile_run(
        tmp_path, run_id=run_id, progress=lambda _fraction, message: told.append(message)
    )
    assert "timing the quantized model, deployed" in told
    assert set(found) == {"float", "quantized"}
    simulated = found["quantized"]["simulated"]
    assert {n["name"] for n in simulated["times"]["nodes"]} == {
        n.name for n in load_model(tmp_path / "small" / "quantized.onnx").nodes
    }
    assert set(found["float"]["simulated"]["tensors"]) == {"c", "r", "y"}
    assert {"c", "r", "r_dq", "odd", "y"} <= set(simulated["tensors"])
    assert workspace.detail(run_id, PROFILE_KEY) == found
    assert workbench.profile_run(tmp_path, run_id=run_id) == found


def test_recipes_are_stored_as_they_are_done_and_go_on_after_a_stop(tmp_path: Path) -> None:
    run_id = load_small(tmp_path)
    workspace = Workspace(tmp_path)
    (pair,) = workspace.pairs()
    assert workspace.recipes(pair.id) == {}

    def stop(_fraction: float, message: str) -> None:
        if message.startswith("recipe 3 of"):
            raise Cancelled

    with pytest.raises(Cancelled):
        workbench.try_recipes(tmp_path, run_id=run_id, progress=stop)
    before = workspace.recipes(pair.id)
    states = [row["state"] for row in before["rows"]]
    assert states == ["done"] * 2 + ["waiting"] * (len(states) - 26) + ["impossible"] * 24
    assert before["command"].startswith("quant-inspector quantize float.onnx")
    told: list[str] = []

    def stop_again(_fraction: float, message: str) -> None:
        told.append(message)
        if message.startswith("recipe 2 of"):
            raise Cancelled

    with pytest.raises(Cancelled):
        workbench.try_recipes(tmp_path, run_id=run_id, progress=stop_again)
    after = workspace.recipes(pair.id)
    kept = {row["label"]: row for row in after["rows"] if row["state"] == "done"}
    assert len(kept) == 3, "the third joins the two that were there"
    for row in before["rows"][:2]:
        # Whether another row has the same file depends on the rows there are.
        assert {**kept[row["label"]], "same_as": ""} == {**row, "same_as": ""}
    np.savez(tmp_path / "small" / "feeds" / "99.npz", x=floats((1, 3, 6, 6), 99))
    with pytest.raises(Cancelled):
        workbench.try_recipes(tmp_path, run_id=run_id, progress=stop)
    assert workspace.recipes(pair.id)["samples"] == 4
    done = [row for row in workspace.recipes(pair.id)["rows"] if row["state"] == "done"]
    assert len(done) == 2, "other feeds: nothing of the old table holds"


def test_a_row_becomes_the_run_with_the_rows_own_figures(tmp_path: Path) -> None:
    run_id = load_small(tmp_path)
    workspace = Workspace(tmp_path)
    (pair,) = workspace.pairs()

    def stop(_fraction: float, message: str) -> None:
        if message.startswith("recipe 3 of"):
            raise Cancelled

    with pytest.raises(Cancelled):
        workbench.try_recipes(tmp_path, run_id=run_id, progress=stop)
    best = workspace.recipes(pair.id)["rows"][0]
    made = workbench.requantize(tmp_path, run_id=run_id, config=best["recipe"], exclude=())
    run = workspace.run(made)
    assert run.model.sha256 == best["sha256"]
    (output,) = read_comparison(workspace.comparison(made)).outputs
    assert output.deployed_sqnr_db == pytest.approx(best["deployed_sqnr_db"], abs=1e-9)
    assert output.sqnr_db == pytest.approx(best["sqnr_db"], abs=1e-9)


# What each node does wrong by itself.


@pytest.mark.slow
def test_isolated_errors_are_measured_later_and_stay_with_the_run(tmp_path: Path) -> None:
    run_id = load_detector(tmp_path)
    workspace = Workspace(tmp_path)
    before, record = the_comparison(tmp_path, run_id), workspace.run(run_id)
    assert not has_isolated(before)
    assert not isolation_measured(record)
    told: list[float] = []
    assert workbench.isolate(
        tmp_path, run_id=run_id, progress=lambda fraction, _message: told.append(fraction)
    ) == run_id  # fmt: skip
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0.0, 1.0)
    after = the_comparison(tmp_path, run_id)
    plain = [replace(a, isolated_sqnr_db=None, added_sqnr_db=None) for a in after.activations]
    rest = comparison_json(replace(after, activations=tuple(plain)), detail=True)
    assert rest == comparison_json(before, detail=True), "latency and causes among them"
    assert isolation_measured(workspace.run(run_id))
    assert workspace.run(run_id).summary["feeds_stamp"] == record.summary["feeds_stamp"]

    float_model = load_model(DETECTOR / "float.onnx")
    feeds = load_feeds(DETECTOR / "feeds", float_model)
    direct = compare_models(
        float_model, load_model(DETECTOR / "quantized.onnx"), feeds, isolated=True,
        measure_latency=False, explain_deployed=False,
    )  # fmt: skip
    assert (
        workspace.comparison(run_id)["activations"]
        == (comparison_json(direct, detail=True)["activations"])
    )
    assert sum(a.isolated_sqnr_db is not None for a in after.activations) > 30
    headline = find_headline(after)
    assert headline == find_headline(before)
    assert headline.tensor == "output0"
    assert "/head/Sigmoid_output_0 slice is silent" in headline.sentence


def test_measuring_again_computes_nothing(tmp_path: Path) -> None:
    run_id = load_small(tmp_path)
    workbench.isolate(tmp_path, run_id=run_id)
    stamp = Workspace(tmp_path).comparison_stamp(run_id)
    assert workbench.isolate(tmp_path, run_id=run_id) == run_id
    assert Workspace(tmp_path).comparison_stamp(run_id) == stamp


def test_matches_set_by_hand_and_isolated_errors_keep_each_other(tmp_path: Path) -> None:
    run_id = load_small(tmp_path)
    pins = (Pin(float_name="r", quantized_name="odd"),)
    workbench.rematch(tmp_path, run_id=run_id, pins=pins)
    assert not has_isolated(the_comparison(tmp_path, run_id))
    workbench.isolate(tmp_path, run_id=run_id)
    found = the_comparison(tmp_path, run_id)
    assert found.pins == Workspace(tmp_path).run(run_id).pins == pins
    assert has_isolated(found)
    workbench.rematch(tmp_path, run_id=run_id, pins=())
    assert the_comparison(tmp_path, run_id).pins == ()
    assert has_isolated(the_comparison(tmp_path, run_id))
    assert isolation_measured(Workspace(tmp_path).run(run_id))


def test_a_stopped_measurement_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    run_id = load_small(tmp_path)
    workspace = Workspace(tmp_path)
    before, record = workspace.comparison(run_id), workspace.run(run_id)

    def stop(fraction: float, _message: str) -> None:
        if fraction > 0.5:
            raise Cancelled

    with pytest.raises(Cancelled):
        workbench.isolate(tmp_path, run_id=run_id, progress=stop)
    assert workspace.comparison(run_id) == before
    assert workspace.run(run_id) == record


def test_samples_that_calibrated_a_run_are_still_told_apart_after_measuring(tmp_path: Path) -> None:
    run_id = load_small(tmp_path)
    config = Workspace(tmp_path).run(run_id).recipe
    made = workbench.requantize(tmp_path, run_id=run_id, config=config, exclude=[])
    freed = workbench.free_in_file(tmp_path, run_id=run_id, exclude=["sigmoid"])
    for each, seen in ((run_id, "unknown"), (made, "seen"), (freed, "unknown")):
        before = the_comparison(tmp_path, each)
        assert before.seen == seen
        workbench.isolate(tmp_path, run_id=each)
        after = the_comparison(tmp_path, each)
        assert (after.seen, after.outputs) == (seen, before.outputs)


def measured(network: str) -> Comparison:
    folder = MODELS / network
    float_model = load_model(folder / "model.onnx")
    return compare_models(
        float_model, load_model(folder / "ort_static_qdq.onnx"),
        load_feeds(folder / "inputs", float_model), isolated=True,
        measure_latency=False, explain_deployed=False,
    )  # fmt: skip


@pytest.mark.slow
@needs_models
def test_measured_errors_of_a_healthy_network_accuse_no_carrier() -> None:
    result = measured("ultraface-rfb320")
    assert find_headline(result).severity == "fine"
    record, share = largest_added_error(result)
    assert record is not None
    assert record.op_type == "Conv"
    assert share < 0.01
    # Transpose and Reshape have less than 25 dB alone, of the Conv before them.
    picture = figures.cause_map(result)
    named = [a.text for a in picture.layout.annotations if a.showarrow]
    assert named
    for name in named:
        assert not name.startswith(("Slice", "Transpose", "Reshape", "Concat"))
    assert "yet the output has" in picture.layout.title.text


@needs_models
@pytest.mark.slow
def test_measured_errors_of_magika_name_the_nodes_of_the_shortest_known_list() -> None:
    result = measured("magika")
    tensor = find_headline(result).tensor
    assert tensor is not None
    assert "LayerNorm_0/Rsqrt" in tensor
    notes = figures.cause_map(result).layout.annotations
    named = " ".join(a.text for a in notes if a.showarrow)
    for node in ("LayerNorm_0/Rsqrt", "ApplyActivation_1/Tanh", "ApplyActivation_1/Mul_3",
                 "ApplyActivation_1/AddV2"):  # fmt: skip
        assert node in named
