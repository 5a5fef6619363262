"""Live previews of a workspace: by recipe and by surgery, and the runs that confirm them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from inspector import live
from inspector.errors import ExclusionError, QuantizationError
from inspector.live import preview_list
from inspector.recipe import QuantConfig
from inspector.render import read_comparison, read_number
from inspector.store import FeedSource, Workspace, made_by_surgery
from inspector.web.tasks import load_sample
from inspector.workbench import free_in_file, isolate, load_pair, requantize
from tests.samples import MODELS, conv_relu_gemm, needs_models, npz_folder, rng, save


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, str]:
    """A workspace with one float model, quantized with the defaults."""
    root = tmp_path / "workspace"
    Workspace(root)
    feeds = [{"x": rng(at).standard_normal((1, 3, 8, 8)).astype("float32")} for at in range(3)]
    source = FeedSource(kind="path", path=str(npz_folder(tmp_path / "feeds", feeds)))
    path = save(conv_relu_gemm(), tmp_path / "model.onnx")
    return root, load_pair(root, float_path=path, quantized_path=None, inputs=source)


def loaded(tmp_path: Path, name: str, file: str) -> tuple[Path, str]:
    root = tmp_path / "workspace"
    Workspace(root)
    source = FeedSource(kind="path", path=str(MODELS / name / "inputs"), samples=3)
    run_id = load_pair(
        root, float_path=MODELS / name / "model.onnx", quantized_path=MODELS / name / file,
        inputs=source,
    )  # fmt: skip
    return root, run_id


def sqnr(found: dict[str, Any]) -> dict[str, float]:
    return {each["name"]: read_number(each["sqnr_db"]) for each in found["outputs"]}


def node_names(root: Path, run_id: str) -> list[str]:
    from inspector.workbench import list_nodes

    return [each["name"] for each in list_nodes(root, run_id=run_id)]


def test_a_preview_leaves_nothing_in_the_store(run: tuple[Path, str]) -> None:
    root, run_id = run
    workspace = Workspace(root)
    before = workspace.runs(workspace.run(run_id).pair_id)
    names = node_names(root, run_id)
    found = preview_list(root, run_id=run_id, config=QuantConfig().to_json(), exclude=names[:1])
    assert found["reason"] == ""
    assert workspace.runs(workspace.run(run_id).pair_id) == before


def test_the_run_that_confirms_a_preview_has_its_figures(run: tuple[Path, str]) -> None:
    root, run_id = run
    names = node_names(root, run_id)
    config = QuantConfig().to_json()
    told = preview_list(root, run_id=run_id, config=config, exclude=names[:1])
    new = requantize(root, run_id=run_id, config=config, exclude=names[:1], preview=sqnr(told))
    record = Workspace(root).run(new)
    real = {o["name"]: read_number(o["sqnr_db"]) for o in record.summary["outputs"]}
    assert sqnr(told) == pytest.approx(real, rel=1e-9)
    assert record.summary["preview"] == sqnr(told)


def test_size_and_latency_of_the_runs_own_list_are_its_own(run: tuple[Path, str]) -> None:
    root, run_id = run
    record = Workspace(root).run(run_id)
    found = preview_list(root, run_id=run_id, config=record.recipe, exclude=[])
    assert found["size_bytes"] == record.model.size_bytes
    seconds = read_number(record.summary["latency"]["quantized_seconds"])
    assert read_number(found["latency_seconds"]) == pytest.approx(seconds)


def test_a_list_of_everything_takes_what_the_float_model_takes(run: tuple[Path, str]) -> None:
    root, run_id = run
    record = Workspace(root).run(run_id)
    found = preview_list(
        root, run_id=run_id, config=record.recipe, exclude=node_names(root, run_id)
    )
    seconds = read_number(record.summary["latency"]["float_seconds"])
    assert read_number(found["latency_seconds"]) == pytest.approx(seconds)
    assert found["size_bytes"] > record.model.size_bytes
    assert set(sqnr(found).values()) == {math.inf}


def test_the_second_click_opens_nothing(
    run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run_id = run
    config = QuantConfig().to_json()
    names = node_names(root, run_id)
    preview_list(root, run_id=run_id, config=config, exclude=[])

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was opened again")

    monkeypatch.setattr(live, "RecipeSource", refuse)
    monkeypatch.setattr(live, "calibrate", refuse)
    for name in names:
        assert preview_list(root, run_id=run_id, config=config, exclude=[name])["reason"] == ""


def test_a_grid_set_by_hand_is_previewed_by_the_same_switchboard(
    run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run_id = run
    tensor = read_comparison(Workspace(root).comparison(run_id)).activations[-1].name
    entry = {
        "tensor": tensor, "quant_type": "int8", "scale": 1.0, "zero_point": 0,
    }  # fmt: skip
    plain = QuantConfig().to_json()
    before = preview_list(root, run_id=run_id, config=plain, exclude=[])
    monkeypatch.setattr(live, "RecipeSource", None)
    config = {**plain, "overrides": [entry]}
    after = preview_list(root, run_id=run_id, config=config, exclude=[])
    assert after["regridded"] == [tensor]
    assert sqnr(after) != sqnr(before)
    monkeypatch.undo()
    new = requantize(root, run_id=run_id, config=config, exclude=[])
    real = {
        o["name"]: read_number(o["sqnr_db"]) for o in Workspace(root).run(new).summary["outputs"]
    }
    assert sqnr(after) == pytest.approx(real, rel=1e-9)


def test_a_recipe_without_preview_says_why(run: tuple[Path, str]) -> None:
    root, run_id = run
    config = QuantConfig(format="qoperator").to_json()
    found = preview_list(root, run_id=run_id, config=config, exclude=[])
    assert found == {"reason": "a recipe of format qoperator has no preview"}


def test_an_unknown_node_is_an_error_with_the_nearest_names(run: tuple[Path, str]) -> None:
    root, run_id = run
    with pytest.raises(ExclusionError, match="nearest"):
        preview_list(root, run_id=run_id, config=QuantConfig().to_json(), exclude=["nobody"])


def test_a_grid_of_an_unknown_tensor_is_refused_in_words(run: tuple[Path, str]) -> None:
    root, run_id = run
    entry = {"tensor": "nobody", "low": 0.0, "high": 1.0}
    config = {**QuantConfig().to_json(), "overrides": [entry]}
    with pytest.raises(QuantizationError, match="nobody"):
        preview_list(root, run_id=run_id, config=config, exclude=[])


def test_a_pair_without_a_quantized_file_has_no_surgery(run: tuple[Path, str]) -> None:
    root, run_id = run
    found = preview_list(root, run_id=run_id, config=None, exclude=[])
    assert found == {"reason": "the pair was loaded without a quantized file"}
    with pytest.raises(ExclusionError, match="without a quantized file"):
        free_in_file(root, run_id=run_id, exclude=node_names(root, run_id)[:1])


@needs_models
@pytest.mark.parametrize(
    ("name", "file", "op_type"),
    [
        ("mlperf-resnet8", "quantized.onnx", "Conv"),
        ("mlperf-kws-dscnn", "quantized.onnx", "Conv"),
        pytest.param("minilm-l6", "ort_dynamic.onnx", "MatMul", marks=pytest.mark.slow),
    ],
)
def test_surgery_is_previewed_and_confirmed(
    name: str, file: str, op_type: str, tmp_path: Path
) -> None:
    from inspector.workbench import list_nodes

    root, run_id = loaded(tmp_path, name, file)
    assert Workspace(root).run(run_id).summary["surgery_fits"]
    nodes = [n["name"] for n in list_nodes(root, run_id=run_id) if n["op_type"] == op_type]
    told = preview_list(root, run_id=run_id, config=None, exclude=nodes[:3])
    whole = preview_list(root, run_id=run_id, config=None, exclude=[])
    assert told["float_macs_fraction"] > whole["float_macs_fraction"]
    before = Workspace(root).run(run_id)
    loaded_db = {o["name"]: read_number(o["sqnr_db"]) for o in before.summary["outputs"]}
    assert sqnr(whole) == pytest.approx(loaded_db, rel=1e-9)
    new = free_in_file(root, run_id=run_id, exclude=nodes[:3], preview=sqnr(told))
    record = Workspace(root).run(new)
    real = {o["name"]: read_number(o["sqnr_db"]) for o in record.summary["outputs"]}
    assert sqnr(told) == pytest.approx(real, rel=1e-9)
    assert made_by_surgery(record)
    assert [e["status"] for e in record.effects]
    assert record.summary["commands"]["inspector"].startswith("quant-inspector free ")
    assert free_in_file(root, run_id=run_id, exclude=nodes[:3]) == new
    assert free_in_file(root, run_id=new, exclude=[]) == run_id


@pytest.mark.slow
def test_findings_are_kept_until_the_run_is_compared_anew(tmp_path: Path) -> None:
    run_id = load_sample(tmp_path, "digit-detector", progress=lambda *_: None)
    first = live.diagnose_run(tmp_path, run_id=run_id)
    assert first[0]["code"] == "concat-shared-scale"
    told: list[str] = []
    again = live.diagnose_run(
        tmp_path, run_id=run_id, progress=lambda _fraction, message: told.append(message)
    )
    assert again == first
    assert not told
    isolate(tmp_path, run_id=run_id)
    live.diagnose_run(tmp_path, run_id=run_id, progress=lambda _, message: told.append(message))
    assert told


def test_before_a_list_stands_the_recipe_without_it_where_the_loaded_file_differs(
    tmp_path: Path,
) -> None:
    run_id = load_sample(tmp_path, "digit-detector", progress=lambda *_: None)
    recipe = Workspace(tmp_path).run(run_id).recipe
    found = preview_list(tmp_path, run_id=run_id, config=recipe, exclude=["/head/Concat_3"])
    plain = preview_list(tmp_path, run_id=run_id, config=recipe, exclude=[])
    assert found["without"] == plain["outputs"]
    surgery = preview_list(tmp_path, run_id=run_id, config=None, exclude=["/head/Concat_3"])
    assert surgery["without"] is None
