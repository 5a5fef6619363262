from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inspector.comparison import Pin
from inspector.errors import ReportError
from inspector.store import (
    FeedSource,
    PairOptions,
    PairRecord,
    RunRecord,
    StoredModel,
    Workspace,
    default_root,
    new_id,
    safe_name,
    utc_now,
)

BYTES = b"\x08\x08 a model"
SHA256 = hashlib.sha256(BYTES).hexdigest()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "data")


def a_pair(workspace: Workspace, **changes: Any) -> PairRecord:
    pair = PairRecord(
        id=new_id(),
        title="digits",
        float_model=workspace.add_model(io.BytesIO(BYTES), "digits.onnx"),
        quantized_model=StoredModel(
            name="digits.int8.onnx", sha256="", size_bytes=7, path=Path("/models/digits.int8.onnx")
        ),
        inputs=FeedSource(
            kind="stored",
            path=str(workspace.add_feeds({"a.npz": io.BytesIO(b"a")})),
            preprocess={"size": [640, 640], "scale": 255.0},
            samples=4,
            title="1 .npz file",
        ),
        calibration=FeedSource(kind="random", seed=3, title="8 random feeds (seed 3)"),
        created=utc_now(),
    )
    return replace(pair, **changes)


def a_run(pair: PairRecord, **changes: Any) -> RunRecord:
    run = RunRecord(
        id=new_id(),
        pair_id=pair.id,
        number=0,
        title="loaded file",
        recipe={"format": "qdq", "per_channel": False, "percentile": None},
        exclusions=("Conv_0", "/head/Concat"),
        model=StoredModel(name="out.onnx", sha256="00", size_bytes=7, path=Path("/tmp/out.onnx")),
        created=utc_now(),
        parent=None,
        seconds=1.5,
        summary={"output_sqnr_db": "Infinity"},
        effects=({"name": "Conv_0", "status": "float now"},),
        notes=("lifted to opset 13",),
    )
    return replace(run, **changes)


def saved_run(workspace: Workspace, **changes: Any) -> RunRecord:
    pair = a_pair(workspace)
    workspace.save_pair(pair)
    return workspace.save_run(a_run(pair, **changes), {"samples": 4})


def leftovers(workspace: Workspace) -> list[Path]:
    return list((workspace.root / "temporary").iterdir())


def test_the_root_is_taken_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(tmp_path / "here"))
    assert default_root() == tmp_path / "here"
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_root().name == "quant-inspector"
    assert default_root().is_absolute()


def test_a_folder_that_cannot_be_used_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="the workspace cannot be stored") as caught:
        Workspace(tmp_path / "file" / "data")
    assert "QUANT_INSPECTOR_DATA" in caught.value.hint


def test_a_model_is_kept_once_by_its_content(workspace: Workspace, tmp_path: Path) -> None:
    source = tmp_path / "digits.onnx"
    source.write_bytes(BYTES)
    first = workspace.add_model(source, "digits.onnx")
    again = workspace.add_model(io.BytesIO(BYTES), "digits.onnx")
    assert first == again
    assert first.path == workspace.root / "models" / SHA256 / "digits.onnx"
    assert first.path.read_bytes() == source.read_bytes() == BYTES
    assert (first.sha256, first.size_bytes, first.name) == (SHA256, len(BYTES), "digits.onnx")
    other_name = workspace.add_model(source, "b.onnx")
    assert other_name.path.parent == first.path.parent
    assert len(list((workspace.root / "models").iterdir())) == 1
    assert leftovers(workspace) == []


def test_an_open_file_is_read_from_its_start(workspace: Workspace) -> None:
    upload = io.BytesIO(BYTES)
    upload.read()
    assert workspace.add_model(upload, "a.onnx").sha256 == SHA256


def test_a_source_that_does_not_exist_is_named(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"gone\.onnx cannot be read") as caught:
        workspace.add_model(tmp_path / "gone.onnx", "gone.onnx")
    assert "Check the path" in caught.value.hint
    assert leftovers(workspace) == []


def test_external_data_stay_beside_their_model_under_their_names(workspace: Workspace) -> None:
    files = {
        "big model.onnx": io.BytesIO(BYTES),
        "weights/part 1.bin": io.BytesIO(b"123"),
    }
    model = workspace.add_model_files(files, "big model.onnx")
    assert model.sha256 == SHA256
    assert model.size_bytes == len(BYTES) + 3
    assert (model.path.parent / "weights" / "part 1.bin").read_bytes() == b"123"
    other = workspace.add_model_files(
        {"big model.onnx": io.BytesIO(BYTES), "weights/part 1.bin": io.BytesIO(b"124")},
        "big model.onnx",
    )
    assert other.sha256 == model.sha256
    assert other.path != model.path
    with pytest.raises(ValueError, match="is not one of the files"):
        workspace.add_model_files(files, "model.onnx")


def test_feeds_are_kept_once_by_contents_and_names(workspace: Workspace) -> None:
    def add(**files: bytes) -> Path:
        return workspace.add_feeds({k: io.BytesIO(v) for k, v in files.items()})

    folder = add(a=b"1", b=b"2")
    assert add(b=b"2", a=b"1") == folder
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {"a": b"1", "b": b"2"}
    assert len({folder, add(a=b"2", b=b"1"), add(a=b"1"), add(a=b"1", c=b"2")}) == 4
    assert leftovers(workspace) == []
    with pytest.raises(ValueError, match="no files"):
        workspace.add_feeds({})


def test_sub_folders_of_feeds_are_kept(workspace: Workspace) -> None:
    files = {f"test_data_set_{i}/input_0.pb": io.BytesIO(bytes([i])) for i in range(2)}
    folder = workspace.add_feeds(files)
    assert (folder / "test_data_set_1" / "input_0.pb").read_bytes() == b"\x01"


@pytest.mark.parametrize(
    "name",
    [
        "../../outside.npz",
        "/etc/outside.npz",
        "..\\..\\outside.npz",
        "a/../../../outside.npz",
        "....//....//outside.npz",
        "C:\\outside.npz",
    ],
)
def test_a_name_cannot_lead_out_of_its_folder(workspace: Workspace, name: str) -> None:
    folder = workspace.add_feeds({name: io.BytesIO(b"1")})
    (file,) = (f for f in folder.rglob("*") if f.is_file())
    assert file.name == "outside.npz"
    model = workspace.add_model(io.BytesIO(BYTES), name)
    assert model.path.parent.parent == workspace.root / "models"


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("yolo v8 (1).onnx", "yolo v8 (1).onnx"),
        ("数字.onnx", "数字.onnx"),
        (".hidden", "hidden"),
        ("a\x00b\nc.onnx", "a_b_c.onnx"),
        ("", "file"),
        ("..", "file"),
        ("a/", "file"),
        ("x" * 300 + ".onnx", "x" * 195 + ".onnx"),
        ("é" * 300 + ".onnx", "é" * 97 + ".onnx"),
    ],
)
def test_file_names_keep_what_is_harmless(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_two_files_that_would_share_a_name_are_refused(workspace: Workspace) -> None:
    with pytest.raises(ReportError, match=r"two of the files are called a\.npz") as caught:
        workspace.add_feeds({"a.npz": io.BytesIO(b"1"), "./a.npz": io.BytesIO(b"2")})
    assert caught.value.hint == "Rename one of them."
    assert leftovers(workspace) == []
    assert list((workspace.root / "feeds").iterdir()) == []


def test_large_files_are_copied_in_blocks(workspace: Workspace, tmp_path: Path) -> None:
    source = tmp_path / "large.onnx"
    with source.open("wb") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    workspace.add_model(source, "large.onnx")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_records_survive_the_way_to_disk_and_back(workspace: Workspace) -> None:
    pair = a_pair(workspace)
    workspace.save_pair(pair)
    assert workspace.pair(pair.id) == pair
    bare = replace(pair, id=new_id(), quantized_model=None, calibration=None)
    workspace.save_pair(bare)
    assert workspace.pair(bare.id) == bare
    run = workspace.save_run(a_run(pair, parent=new_id()), {"samples": 4})
    assert workspace.run(run.id) == run
    assert workspace.comparison(run.id) == {"samples": 4}
    for record in (pair, run, pair.float_model, pair.inputs):
        text = json.dumps(record.to_json(), allow_nan=False)
        assert type(record).from_json(json.loads(text)) == record


def test_options_and_pins_survive_the_way_to_disk_and_back(workspace: Workspace) -> None:
    options = PairOptions(
        mask="attention_mask",
        states=(("h_out", "h"), ("c_out", "c")),
        device="/dumps/board 1",
        provider="OpenVINOExecutionProvider",
    )
    pins = (Pin(float_name="a", quantized_name="b"), Pin(float_name="c", quantized_name=None))
    pair = a_pair(workspace, options=options)
    workspace.save_pair(pair)
    run = workspace.save_run(a_run(pair, pins=pins), {"samples": 4})
    assert workspace.pair(pair.id) == pair
    assert workspace.run(run.id) == run
    assert workspace.run(run.id).pins == pins


def test_records_from_before_there_were_options_and_pins_are_read(workspace: Workspace) -> None:
    run = saved_run(workspace)
    for kind, entry_id, key in (("pair", run.pair_id, "options"), ("run", run.id, "pins")):
        path = workspace.root / f"{kind}s" / entry_id / f"{kind}.json"
        data = json.loads(path.read_bytes())
        del data[key]
        path.write_text(json.dumps(data))
    assert workspace.pair(run.pair_id).options == PairOptions()
    assert workspace.run(run.id).pins == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": 3}, r"mask is 3, expected text"),
        ({"states": [["a"]]}, r"states is \[\['a'\]\], expected a list of pairs of texts"),
        ("x", "it holds 'x', expected an object"),
    ],
)
def test_options_of_another_type_are_named(options: Any, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        PairOptions.from_json(options)


def test_a_run_compared_anew_has_its_new_comparison_and_pins(workspace: Workspace) -> None:
    run = saved_run(workspace)
    stamp = workspace.comparison_stamp(run.id)
    pinned = replace(run, pins=(Pin(float_name="a", quantized_name=None),))
    workspace.replace_comparison(pinned, {"samples": 5, "more": True})
    assert workspace.run(run.id) == pinned
    assert workspace.comparison(run.id) == {"samples": 5, "more": True}
    assert workspace.comparison_stamp(run.id) != stamp
    assert leftovers(workspace) == []
    with pytest.raises(ReportError, match="there is no run 00"):
        workspace.replace_comparison(replace(run, id="00"), {})


def test_a_workspace_can_be_moved(workspace: Workspace, tmp_path: Path) -> None:
    pair = a_pair(workspace)
    workspace.save_pair(pair)
    made = tmp_path / "made.onnx"
    made.write_bytes(BYTES)
    run = workspace.save_run(a_run(pair), {}, made)
    workspace.root.rename(tmp_path / "elsewhere")
    moved = Workspace(tmp_path / "elsewhere")
    assert moved.pair(pair.id).float_model.path.read_bytes() == BYTES
    assert Path(moved.pair(pair.id).inputs.path, "a.npz").read_bytes() == b"a"
    assert moved.run(run.id).model.path.read_bytes() == BYTES
    assert moved.pair(pair.id).quantized_model == pair.quantized_model  # the user's own file
    calibration = moved.pair(pair.id).calibration
    assert calibration is not None
    assert calibration.path == ""


def test_runs_made_at_the_same_moment_get_numbers_of_their_own(workspace: Workspace) -> None:
    pair = a_pair(workspace)
    workspace.save_pair(pair)
    workspace.save_run(a_run(pair, number=0), {})
    with ThreadPoolExecutor(8) as threads:
        claimed = list(threads.map(lambda _: workspace.claim_number(pair.id), range(40)))
    assert sorted(claimed) == list(range(1, 41))
    last = workspace.save_run(a_run(pair, number=40), {})
    workspace.delete_run(last.id)
    assert workspace.claim_number(pair.id) == 41, "the name of a deleted run is not given again"
    workspace.save_run(a_run(pair, number=90), {})  # as an older version saved it
    assert workspace.claim_number(pair.id) == 91


def test_pairs_are_listed_newest_first_and_runs_by_number(workspace: Workspace) -> None:
    pairs = [a_pair(workspace, created=f"2025-01-0{day}T00:00:00+00:00") for day in (2, 3, 1)]
    for pair in pairs:
        workspace.save_pair(pair)
    assert [pair.created[9] for pair in workspace.pairs()] == ["3", "2", "1"]
    for number in (2, 0, 1):
        workspace.save_run(a_run(pairs[0], number=number), {})
    workspace.save_run(a_run(pairs[1], number=7), {})
    assert [run.number for run in workspace.runs(pairs[0].id)] == [0, 1, 2]
    assert workspace.runs(pairs[2].id) == ()


def test_a_run_takes_a_copy_of_its_model_and_its_external_data(
    workspace: Workspace, tmp_path: Path
) -> None:
    pair = a_pair(workspace)
    workspace.save_pair(pair)
    made, data = tmp_path / "made.onnx", tmp_path / "made.data"
    made.write_bytes(BYTES)
    data.write_bytes(b"123")
    run = workspace.save_run(a_run(pair), {}, made, external_data=[data])
    assert run.model.path == workspace.run_folder(run.id) / "out.onnx"
    assert run.model.path.read_bytes() == made.read_bytes() == BYTES
    assert run.model.path.with_name("made.data").read_bytes() == b"123"
    with pytest.raises(ReportError, match=f"there is a run {run.id} already"):
        workspace.save_run(run, {})


def test_a_run_that_cannot_be_saved_leaves_nothing(workspace: Workspace, tmp_path: Path) -> None:
    pair = a_pair(workspace)
    workspace.save_pair(pair)
    run = a_run(pair)
    with pytest.raises(ReportError, match=r"comparison\.json would hold NaN") as caught:
        workspace.save_run(run, {"sqnr_db": float("nan")})
    assert '"NaN"' in caught.value.hint
    with pytest.raises(ReportError, match="cannot be read"):
        workspace.save_run(run, {}, tmp_path / "gone.onnx")
    with pytest.raises(ReportError, match="there is no pair"):
        workspace.save_run(replace(run, pair_id="0"), {})
    assert workspace.runs(pair.id) == ()
    assert workspace.unreadable() == ()
    assert leftovers(workspace) == []


def test_a_deleted_run_is_gone_with_its_model(workspace: Workspace) -> None:
    run = saved_run(workspace)
    folder = workspace.run_folder(run.id)
    workspace.delete_run(run.id)
    assert not folder.exists()
    assert leftovers(workspace) == []
    assert workspace.runs(run.pair_id) == ()
    with pytest.raises(ReportError, match=f"there is no run {run.id}"):
        workspace.delete_run(run.id)
    with pytest.raises(ReportError):
        workspace.write_detail(run.id, "histogram", {})
    assert not folder.exists()


def test_drafts_and_the_current_pair_are_kept(workspace: Workspace) -> None:
    pair = a_pair(workspace)
    workspace.save_pair(pair)
    assert workspace.draft(pair.id) == {}
    workspace.save_draft(pair.id, {"exclude": ["Conv_0"], "\udcff": 1})
    assert workspace.draft(pair.id) == {"exclude": ["Conv_0"], "\udcff": 1}
    assert workspace.current_pair() is None
    workspace.set_current_pair(pair.id)
    assert Workspace(workspace.root).current_pair() == pair.id
    (workspace.root / "pairs" / pair.id / "pair.json").unlink()
    assert workspace.current_pair() is None
    (workspace.root / "current.json").write_text('{"pair_id": "../../x"}')
    assert workspace.current_pair() is None


def test_details_are_kept_by_any_key(workspace: Workspace) -> None:
    run = saved_run(workspace)
    keys = ["histogram:/model/Conv.1_output", "a" * 5000, "", "../x", "数"]
    for index, key in enumerate(keys):
        assert workspace.detail(run.id, key) is None
        workspace.write_detail(run.id, key, {"index": index})
    assert [workspace.detail(run.id, key) for key in keys] == [{"index": i} for i in range(5)]
    for file in (workspace.run_folder(run.id) / "details").iterdir():
        file.write_text("{half")
    assert workspace.detail(run.id, keys[0]) is None


@pytest.mark.parametrize("bad", ["..", "../pairs", "a/b", "", "A", "a\n", "a" * 65, "ab.json"])
def test_ids_of_other_characters_are_refused(workspace: Workspace, bad: str) -> None:
    run = saved_run(workspace)
    calls = (
        lambda: workspace.pair(bad),
        lambda: workspace.draft(bad),
        lambda: workspace.runs(bad),
        lambda: workspace.run(bad),
        lambda: workspace.run_folder(bad),
        lambda: workspace.comparison(bad),
        lambda: workspace.delete_run(bad),
        lambda: workspace.save_pair(a_pair(workspace, id=bad)),
        lambda: workspace.save_run(replace(run, id=bad), {}),
    )
    for call in calls:
        with pytest.raises(ReportError, match=r"is not the id of a (pair|run)"):
            call()


def test_an_id_that_does_not_exist_has_a_hint(workspace: Workspace) -> None:
    with pytest.raises(ReportError, match="there is no pair abc in this workspace") as caught:
        workspace.pair("abc")
    assert "load the models again" in caught.value.hint
    with pytest.raises(ReportError, match="there is no run abc in this workspace"):
        workspace.run("abc")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ('{"id": "', "Unterminated string"),
        ("[1, 2]", r"it holds \[1, 2\], expected an object"),
        ("[" * 100_000, "recursion"),
        ("\xff\xfe", ""),
        ('{"seconds": NaN}', "it holds NaN, which is not JSON"),
        ("{}", "id is missing"),
    ],
)
def test_an_unreadable_entry_is_left_out_of_lists_and_named(
    workspace: Workspace, text: str, why: str
) -> None:
    run = saved_run(workspace)
    for folder, name in (("pairs", "pair"), ("runs", "run")):
        (workspace.root / folder / "bad").mkdir()
        (workspace.root / folder / "bad" / f"{name}.json").write_text(text, "latin-1")
    assert [pair.id for pair in workspace.pairs()] == [run.pair_id]
    assert workspace.runs(run.pair_id) == (run,)
    assert [str(error).split()[0] for error in workspace.unreadable()] == [
        "pairs/bad/pair.json",
        "runs/bad/run.json",
    ]
    with pytest.raises(ReportError, match=rf"runs/bad/run\.json is not a readable record.*{why}"):
        workspace.run("bad")


def test_foreign_files_and_folders_are_left_out(workspace: Workspace) -> None:
    run = saved_run(workspace)
    (workspace.root / "runs" / ".DS_Store").write_text("")
    (workspace.root / "runs" / "empty").mkdir()
    (workspace.root / "runs" / "abc").symlink_to(workspace.run_folder(run.id))
    assert workspace.runs(run.pair_id) == (run,)
    assert len(workspace.unreadable()) == 3


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("number", True, "number is True, expected a whole number"),
        ("number", 1.5, "expected a whole number"),
        ("seconds", "1", "seconds is '1', expected a number"),
        ("id", "../x", "expected an id"),
        ("parent", 3, "expected text"),
        ("created", "yesterday", "expected an ISO 8601 time"),
        ("exclusions", ["a", 1], "expected a list of texts"),
        ("effects", [1], "expected a list of objects"),
        ("recipe", None, "expected an object"),
        ("model", {"name": "a"}, "model of the run is not a readable record: sha256 is missing"),
    ],
)
def test_a_field_of_another_type_is_named(
    workspace: Workspace, key: str, value: Any, expected: str
) -> None:
    data = a_run(a_pair(workspace)).to_json()
    with pytest.raises(ReportError) as caught:
        RunRecord.from_json({**data, key: value})
    assert expected in caught.value.message
    with pytest.raises(ReportError, match=f"{key} is missing"):
        RunRecord.from_json({k: v for k, v in data.items() if k != key})


def test_fields_of_later_versions_are_ignored(workspace: Workspace) -> None:
    run = a_run(a_pair(workspace))
    assert RunRecord.from_json({**run.to_json(), "colour": "blue"}) == run


def test_an_unknown_kind_of_feeds_is_named() -> None:
    with pytest.raises(ReportError, match="kind is 'web', expected one of path, stored, random"):
        FeedSource.from_json(FeedSource(kind="web").to_json())


def test_what_killed_processes_left_is_removed_after_a_day(workspace: Workspace) -> None:
    temporary = workspace.root / "temporary"
    for name in ("old", "young"):
        (temporary / name).mkdir()
        (temporary / name / "half.onnx").write_bytes(BYTES)
        (temporary / f"{name}.json").write_text("{")
    for name in ("old/half.onnx", "old", "old.json"):
        os.utime(temporary / name, (time.time() - 90_000,) * 2)
    os.utime(temporary / "young", (time.time() - 90_000,) * 2)  # its file is not old
    Workspace(workspace.root)
    assert sorted(entry.name for entry in temporary.iterdir()) == ["young", "young.json"]


def test_scratch_folders_vanish_even_after_an_error(workspace: Workspace) -> None:
    def fail() -> None:
        with workspace.scratch() as folder:
            (folder / "half.onnx").write_bytes(BYTES)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert leftovers(workspace) == []


def _write_all_the_time(root: Path, pair: PairRecord, seconds: float) -> None:
    workspace = Workspace(root)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        workspace.save_draft(pair.id, {"exclude": ["x" * 20_000]})
        workspace.add_feeds({"a.npz": io.BytesIO(str(time.monotonic_ns() // 10**8).encode())})
        workspace.add_model(io.BytesIO(str(time.monotonic_ns() // 10**8).encode()), "a.onnx")
        run = workspace.save_run(a_run(pair), {"x": "y" * 20_000})
        workspace.write_detail(run.id, "key", {"x": "y" * 20_000})
        workspace.delete_run(run.id)


def test_two_processes_write_while_a_third_reads_only_whole_entries(workspace: Workspace) -> None:
    pair = a_pair(workspace)
    workspace.save_pair(pair)
    workspace.save_draft(pair.id, {"exclude": []})
    draft = workspace.root / "pairs" / pair.id / "draft.json"
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=_write_all_the_time, args=(workspace.root, pair, 1.0))
        for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    reads = runs = 0
    while any(writer.is_alive() for writer in writers):
        assert json.loads(draft.read_bytes())["exclude"] in ([], ["x" * 20_000])
        for run in workspace.runs(pair.id):
            assert run.pair_id == pair.id
            runs += 1
        reads += 1
        time.sleep(0.001)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
        writer.close()
    assert reads > 10
    assert runs > 0
    assert leftovers(workspace) == []
    for folder in (workspace.root / "feeds").iterdir():
        assert [file.name for file in folder.iterdir()] == ["a.npz"]
    for model in (workspace.root / "models").glob("*/a.onnx"):
        assert hashlib.sha256(model.read_bytes()).hexdigest() == model.parent.name


def test_a_pairs_recipes_are_kept_with_it_and_lost_ones_are_empty(workspace: Workspace) -> None:
    pair = a_pair(workspace)
    workspace.save_pair(pair)
    assert workspace.recipes(pair.id) == {}
    workspace.save_recipes(pair.id, {"rows": [{"label": "a"}]})
    assert Workspace(workspace.root).recipes(pair.id) == {"rows": [{"label": "a"}]}
    workspace.save_recipes(pair.id, {"rows": []})
    assert workspace.recipes(pair.id) == {"rows": []}
    (workspace.root / "pairs" / pair.id / "recipes.json").write_text("{half")
    assert workspace.recipes(pair.id) == {}
    with pytest.raises(ReportError, match="NaN or infinity"):
        workspace.save_recipes(pair.id, {"rows": [float("nan")]})
    with pytest.raises(ReportError, match="there is no pair"):
        workspace.recipes("0" * 32)
