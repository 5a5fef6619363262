"""Workspaces beside each other: what is on disk once, what is deleted, what a user may store."""

from __future__ import annotations

import hashlib
import io
import os
import queue
import random
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inspector import hosting, workbench
from inspector.errors import InspectorError, QuotaError, ReportError
from inspector.store import FeedSource, Note, PairRecord, Workspace, check_quota, new_id
from inspector.web import tasks
from tests.hosted import ADA, fill, watermark, workspace_of
from tests.samples import ROOT
from tests.test_store import BYTES, SHA256, a_pair, a_run, leftovers

OTHER_DISK = Path("/dev/shm")


def workspace_for(data: Path, name: str) -> Workspace:
    return Workspace(hosting.workspace_folder(data, hosting.user_key(f"{name}@example.org")))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def ada(data: Path) -> Workspace:
    return workspace_for(data, "ada")


@pytest.fixture
def bob(data: Path) -> Workspace:
    return workspace_for(data, "bob")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another disk."""
    if not OTHER_DISK.is_dir() or OTHER_DISK.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second disk")
    folder = OTHER_DISK / f"quant-inspector-{new_id()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if not file.is_dir())


def kept(workspace: Workspace, kind: str) -> list[str]:
    return sorted(entry.name for entry in (workspace.root / kind).iterdir())


# ── once on disk ─────────────────────────────────────────────────────────────────────────────


def test_what_two_users_upload_is_on_disk_once(data: Path, ada: Workspace, bob: Workspace) -> None:
    first = ada.add_model(io.BytesIO(BYTES), "digits.onnx")
    second = bob.add_model(io.BytesIO(BYTES), "mine.onnx")
    feeds = bob.add_feeds({"a/x.npz": io.BytesIO(BYTES), "b.npz": io.BytesIO(b"b")})
    assert first.path == ada.root / "models" / SHA256 / "digits.onnx"
    assert second.path == bob.root / "models" / SHA256 / "mine.onnx"
    blob = data / "blobs" / SHA256
    assert blob.samefile(first.path)
    assert blob.samefile(second.path)
    assert blob.samefile(feeds / "a" / "x.npz")
    assert blob.stat().st_nlink == 4
    assert stat.S_IMODE(blob.stat().st_mode) == 0o444
    assert {file.name for file in (data / "blobs").iterdir()} == {
        SHA256,
        hashlib.sha256(b"b").hexdigest(),
    }
    assert leftovers(ada) == leftovers(bob) == []


def test_a_user_sees_nothing_of_what_another_has(ada: Workspace, bob: Workspace) -> None:
    alone = ada.add_model(io.BytesIO(BYTES), "digits.onnx")
    before = alone.path.stat()
    assert files_in(bob.root) == []
    assert bob.size_bytes() == 0
    time.sleep(0.01)
    later = bob.add_model(io.BytesIO(BYTES), "digits.onnx")
    assert replace(later, path=alone.path) == alone
    assert later.path.stat().st_mtime_ns == before.st_mtime_ns == 946_684_800 * 10**9
    assert bob.size_bytes() == ada.size_bytes() == len(BYTES)
    # And nothing changes for the one when the other goes.
    ada.delete_everything()
    assert later.path.read_bytes() == BYTES
    assert bob.size_bytes() == len(BYTES)


def test_a_hash_alone_is_no_way_to_a_file(data: Path, ada: Workspace, bob: Workspace) -> None:
    ada.add_model(io.BytesIO(BYTES), "digits.onnx")
    for name in (SHA256, f"../blobs/{SHA256}", f"../../../blobs/{SHA256}"):
        stored = bob.add_model(io.BytesIO(b""), name)
        assert stored.path.read_bytes() == b""
    link = bob.root / "link.onnx"
    link.symlink_to(data / "blobs" / SHA256)
    assert not any(
        BYTES in file.read_bytes() for file in files_in(bob.root) if not file.is_symlink()
    )


@pytest.mark.parametrize("first", [True, False])
def test_a_file_that_is_given_away_is_taken_and_not_copied(
    data: Path, ada: Workspace, bob: Workspace, first: bool
) -> None:
    if not first:
        bob.add_model(io.BytesIO(BYTES), "digits.onnx")
    with ada.scratch() as scratch:
        upload, part = scratch / "part", scratch / "weights"
        upload.write_bytes(BYTES)
        part.write_bytes(b"123")
        inode = upload.stat().st_ino
        stored = ada.add_model(upload, "digits.onnx", move=True)
        assert (stored.sha256, stored.size_bytes) == (SHA256, len(BYTES))
        assert not upload.exists()
        assert (stored.path.stat().st_ino == inode) == first
        assert stored.path.samefile(data / "blobs" / SHA256)
        upload.write_bytes(BYTES)
        model = ada.add_model_files({"m.onnx": upload, "w.bin": part}, "m.onnx", move=True)
        assert (model.path.with_name("w.bin")).read_bytes() == b"123"
        part.write_bytes(b"123")
        assert (ada.add_feeds({"w.npz": part}, move=True) / "w.npz").read_bytes() == b"123"
        assert list(scratch.iterdir()) == []


def test_a_file_of_another_disk_is_copied_and_gone(ada: Workspace, elsewhere: Path) -> None:
    upload = elsewhere / "upload"
    upload.write_bytes(BYTES)
    assert ada.add_model(upload, "digits.onnx", move=True).path.read_bytes() == BYTES
    assert not upload.exists()


def test_what_a_link_leads_to_is_not_taken(ada: Workspace, tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(BYTES)
    link.symlink_to(target)
    stored = ada.add_model(link, "digits.onnx", move=True)
    assert not stored.path.is_symlink()
    assert not stored.path.samefile(target)
    assert target.read_bytes() == stored.path.read_bytes() == BYTES


def test_without_hard_links_every_workspace_has_its_copy(
    data: Path, ada: Workspace, bob: Workspace, elsewhere: Path
) -> None:
    (data / "blobs").rmdir()
    (data / "blobs").symlink_to(elsewhere)  # a link to another disk cannot be made
    models = [each.add_model(io.BytesIO(BYTES), "digits.onnx").path for each in (ada, bob)]
    assert [path.read_bytes() for path in models] == [BYTES, BYTES]
    assert not models[0].samefile(models[1])
    assert list(elsewhere.iterdir()) == leftovers(ada) == []


def test_a_blob_that_was_cut_off_is_replaced(data: Path, ada: Workspace, bob: Workspace) -> None:
    ada.add_model(io.BytesIO(BYTES), "digits.onnx")
    blob = data / "blobs" / SHA256
    blob.chmod(0o600)
    blob.write_bytes(BYTES[:3])
    assert bob.add_model(io.BytesIO(BYTES), "digits.onnx").path.read_bytes() == BYTES
    assert blob.read_bytes() == BYTES


def test_only_a_portals_workspace_has_blobs_beside_it(tmp_path: Path) -> None:
    for root in (tmp_path / "data", tmp_path / "users" / "joe"):
        workspace = Workspace(root)
        model = workspace.add_model(io.BytesIO(BYTES), "digits.onnx")
        assert model.path.stat().st_nlink == 1
    assert not (tmp_path / "blobs").exists()


def test_whatever_the_mask_the_files_are_for_the_server_alone(data: Path) -> None:
    mask = os.umask(0)
    try:
        workspace = workspace_for(data, "ada")
        pair = a_pair(workspace)
        workspace.save_pair(pair)
        made = data.parent / "made.onnx"
        made.write_bytes(BYTES)
        run = workspace.save_run(a_run(pair), {}, made)
        workspace.write_detail(run.id, "key", {})
        workspace.save_note(run.id, "worse than before", "ada@example.org")
        workspace.trials_folder(pair.id)
    finally:
        os.umask(mask)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in workspace.root.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600, 0o444}
    blobs = data / "blobs"
    assert (
        stat.S_IMODE(blobs.stat().st_mode) == stat.S_IMODE(workspace.root.stat().st_mode) == 0o700
    )


_ADD_ALL_THE_TIME = """
    import io, random, sys
    from pathlib import Path
    from inspector.store import Workspace

    workspace, chance = Workspace(Path(sys.argv[1])), random.Random(sys.argv[2])
    while True:
        print("going on", flush=True)
        content = str(chance.randrange(40)).encode() * 5000
        workspace.add_model(io.BytesIO(content), "m.onnx")
        workspace.add_feeds({"a.npz": io.BytesIO(content), "b.npz": io.BytesIO(b"b")})
        with workspace.scratch() as scratch:
            (scratch / "upload").write_bytes(content)
            workspace.add_feeds({"c.npz": scratch / "upload"}, move=True)
        if chance.random() < 0.1:
            workspace.delete_everything()
"""


def test_killed_in_the_middle_of_the_same_uploads_nothing_is_broken(
    data: Path, ada: Workspace, bob: Workspace
) -> None:
    chance = random.Random(3)
    code = textwrap.dedent(_ADD_ALL_THE_TIME)
    for turn in range(3):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(each.root), f"{turn} {each.root}"],
                cwd=ROOT,
                stdout=subprocess.PIPE,
            )
            for each in (ada, bob)
        ]
        for writer in writers:
            assert writer.stdout is not None
            for _ in range(8):
                assert writer.stdout.readline() == b"going on\n"
        time.sleep(chance.uniform(0.0, 0.05))
        for writer in writers:
            with writer:
                writer.kill()
        for blob in (data / "blobs").iterdir():
            assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
        for each in (ada, bob):
            for model in (each.root / "models").glob("*/*"):
                assert hashlib.sha256(model.read_bytes()).hexdigest() == model.parent.name
            for folder in (each.root / "feeds").iterdir():
                assert {file.name for file in folder.iterdir()} in ({"a.npz", "b.npz"}, {"c.npz"})
            stored = each.add_model(io.BytesIO(BYTES), "after.onnx")
            assert stored.path.samefile(data / "blobs" / SHA256)


# ── deleted ──────────────────────────────────────────────────────────────────────────────────


def a_full_pair(workspace: Workspace, content: bytes = BYTES, **changes: Any) -> PairRecord:
    """A saved pair with two runs; of the same feeds, whatever its model."""
    pair = a_pair(workspace, **changes)
    pair = replace(pair, float_model=workspace.add_model(io.BytesIO(content), "float.onnx"))
    workspace.save_pair(pair)
    for number in range(2):
        workspace.save_run(a_run(pair, number=number), {"samples": 4})
    return pair


def aged(*entries: Path) -> None:
    """As if they had not been touched for over a day."""
    for entry in entries:
        for path in (*entry.rglob("*"), entry):
            os.utime(path, (time.time() - 90_000,) * 2)


def test_a_deleted_pair_takes_with_it_what_nobody_else_needs(ada: Workspace) -> None:
    pair, other = a_full_pair(ada), a_full_pair(ada, b"other")
    (ada.root / "models" / SHA256 / "again.onnx").write_bytes(BYTES)
    ada.set_current_pair(pair.id)
    ada.delete_pair(pair.id)
    assert [each.id for each in ada.pairs()] == [other.id]
    assert kept(ada, "runs") == sorted(run.id for run in ada.runs(other.id))
    assert kept(ada, "models") == [hashlib.sha256(b"other").hexdigest()]
    assert Path(other.inputs.path).is_dir()  # the feeds of both
    assert ada.current_pair() is None
    assert leftovers(ada) == []
    ada.delete_pair(other.id)
    assert [kept(ada, kind) for kind in ("pairs", "runs", "models", "feeds")] == [[]] * 4
    with pytest.raises(ReportError, match=f"there is no pair {other.id}"):
        ada.delete_pair(other.id)


def test_what_is_deleted_frees_the_disk_at_once_unless_another_user_has_it(
    data: Path, ada: Workspace, bob: Workspace
) -> None:
    pair = a_full_pair(ada)
    ada.add_model(io.BytesIO(b"a"), "the-feeds-again.onnx")
    his = a_full_pair(bob, b"other")
    assert len(list((data / "blobs").iterdir())) == 3
    ada.delete_pair(pair.id)
    assert {blob.name for blob in (data / "blobs").iterdir()} == {
        hashlib.sha256(content).hexdigest() for content in (b"other", b"a", BYTES)
    }  # a_pair has a model of BYTES as well
    bob.delete_everything()
    assert [blob.name for blob in (data / "blobs").iterdir()] == [hashlib.sha256(b"a").hexdigest()]
    assert not his.float_model.path.exists()
    ada.delete_everything()
    assert list((data / "blobs").iterdir()) == []


def test_models_and_feeds_that_another_pair_uses_stay(ada: Workspace, data: Path) -> None:
    feeds = ada.add_feeds({"own.npz": io.BytesIO(b"own")})
    quantized = ada.add_model(io.BytesIO(b"quantized"), "quantized.onnx")
    pair = a_full_pair(ada, quantized_model=quantized)
    a_full_pair(
        ada,
        b"other",
        quantized_model=quantized,
        inputs=replace(pair.inputs, path=str(feeds / "own.npz")),
        calibration=replace(pair.inputs, path=str(pair.inputs.path)),
    )
    ada.delete_pair(pair.id)
    assert kept(ada, "models") == sorted(
        hashlib.sha256(content).hexdigest() for content in (b"other", b"quantized")
    )
    assert kept(ada, "feeds") == sorted([feeds.name, Path(pair.inputs.path).name])


def test_a_run_of_another_pair_keeps_its_model(ada: Workspace) -> None:
    pair = a_full_pair(ada)
    other = a_full_pair(ada, b"other")
    ada.save_run(a_run(other, number=2, model=pair.float_model), {})
    ada.delete_pair(pair.id)
    assert pair.float_model.path.read_bytes() == BYTES


def test_an_unreadable_pair_is_deleted_and_its_files_are_tidied_later(ada: Workspace) -> None:
    pair = a_full_pair(ada)
    (ada.root / "pairs" / pair.id / "pair.json").write_text("{half")
    ada.delete_pair(pair.id)
    assert kept(ada, "pairs") == kept(ada, "runs") == []
    assert kept(ada, "models") == [SHA256]  # nobody knows whether it was this pair's
    ada.tidy()
    assert kept(ada, "models") == [SHA256]  # it may have been uploaded for the next pair
    aged(*(ada.root / kind for kind in ("models", "feeds")))
    ada.tidy()
    assert kept(ada, "models") == kept(ada, "feeds") == []


def test_while_some_record_is_unreadable_models_stay(ada: Workspace) -> None:
    pair, damaged = a_full_pair(ada), a_full_pair(ada, b"other")
    path = ada.root / "pairs" / damaged.id / "pair.json"
    text = path.read_bytes()
    path.write_text("{half")
    ada.delete_pair(pair.id)
    assert kept(ada, "pairs") == [damaged.id]
    aged(*(ada.root / kind for kind in ("models", "feeds")))
    ada.tidy()
    assert len(kept(ada, "models")) == 2
    path.write_bytes(text)  # restored
    ada.tidy()
    assert kept(ada, "models") == [hashlib.sha256(b"other").hexdigest()]
    assert ada.pair(damaged.id).float_model.path.is_file()


def test_a_name_that_leads_elsewhere_deletes_nothing_there(ada: Workspace, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "pair.json").write_text("{}")
    (ada.root / "pairs" / "abc").symlink_to(outside)
    ada.delete_pair("abc")
    assert kept(ada, "pairs") == []
    assert (outside / "pair.json").is_file()
    for place in ("../../models", "/", str(ada.root / "models" / ".." / ".." / "x")):
        pair = a_pair(ada, calibration=replace(a_pair(ada).inputs, kind="path", path=place))
        ada.save_pair(pair)
        ada.delete_pair(pair.id)
    assert ada.root.is_dir()
    assert outside.is_dir()
    with pytest.raises(ReportError, match="is not the id of a pair"):
        ada.delete_pair("../pairs")


def test_a_pair_whose_deletion_was_killed_is_tidied_away(ada: Workspace) -> None:
    pair, other = a_full_pair(ada), a_full_pair(ada, b"other")
    aside = ada.root / "temporary" / new_id()
    (ada.root / "pairs" / pair.id).rename(aside)  # as far as it came
    assert [each.id for each in ada.pairs()] == [other.id]
    assert len(kept(ada, "runs")) == 4
    aged(aside, ada.root / "models" / SHA256)
    ada.tidy()
    assert kept(ada, "runs") == sorted(run.id for run in ada.runs(other.id))
    assert kept(ada, "models") == [hashlib.sha256(b"other").hexdigest()]
    assert leftovers(ada) == []


class _Interrupting(Mapping[str, Any]):
    """A comparison; while it is written down, something else happens."""

    def __init__(self, happens: Any) -> None:
        self.happens = happens

    def __iter__(self) -> Iterator[str]:
        self.happens()
        return iter(())

    def __len__(self) -> int:
        return 0

    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)


def test_a_run_that_is_saved_while_its_pair_is_deleted_is_not_there(ada: Workspace) -> None:
    pair = a_full_pair(ada)
    with pytest.raises(ReportError, match=f"there is no pair {pair.id}"):
        ada.save_run(a_run(pair), _Interrupting(lambda: ada.delete_pair(pair.id)))
    assert [kept(ada, kind) for kind in ("pairs", "runs", "models", "feeds")] == [[]] * 4
    assert leftovers(ada) == []


def test_what_is_kept_for_a_deleted_pair_or_run_is_an_error_and_leaves_nothing(
    ada: Workspace,
) -> None:
    pair = a_full_pair(ada)
    run = ada.runs(pair.id)[0]
    gone = _Interrupting(lambda: ada.delete_pair(pair.id))
    for write in (
        lambda: ada.save_draft(pair.id, gone),
        lambda: ada.save_search(pair.id, gone),
        lambda: ada.write_detail(run.id, "key", gone),
        lambda: ada.replace_comparison(run, gone),
    ):
        a_full_pair(ada, id=pair.id)
        shutil.rmtree(ada.root / "runs")
        (ada.root / "runs").mkdir()
        ada.save_run(run, {})
        with pytest.raises(ReportError, match=r"deleted meanwhile|there is no run") as told:
            write()
        assert "load the models again" in told.value.hint
        assert kept(ada, "pairs") == kept(ada, "runs") == leftovers(ada) == []
    for late in (
        lambda: ada.trials_folder(pair.id),
        lambda: ada.save_note(run.id, "text", ""),
        lambda: ada.comparison_stamp(run.id),
    ):
        with pytest.raises(ReportError, match="there is no"):
            late()
    assert not ada.has_run(pair.id, run.id)


def test_a_pair_whose_model_was_deleted_while_it_was_loaded_is_not_saved(ada: Workspace) -> None:
    pair, other = a_pair(ada), a_full_pair(ada)
    ada.delete_pair(other.id)
    with pytest.raises(ReportError, match="deleted while it was loaded") as told:
        ada.save_pair(pair)
    assert told.value.hint == "Load the models and their inputs again."
    assert kept(ada, "pairs") == leftovers(ada) == []


class _Interrupted(Workspace):
    """A workspace in which something happens once, after it was looked up what is used."""

    happens: Callable[[], object] = staticmethod(lambda: None)

    def _used(self) -> set[Path] | None:
        found = super()._used()
        happens, self.happens = self.happens, lambda: None
        happens()
        return found


def test_a_pair_that_is_saved_while_its_model_is_deleted_gets_it_back(ada: Workspace) -> None:
    pair = a_full_pair(ada)
    late = replace(pair, id=new_id())
    deleting = _Interrupted(ada.root)
    deleting.happens = lambda: ada.save_pair(late)
    deleting.delete_pair(pair.id)
    assert ada.pairs() == (late,)
    assert late.float_model.path.read_bytes() == BYTES
    assert Path(late.inputs.path, "a.npz").read_bytes() == b"a"
    assert leftovers(ada) == []


def test_pairs_that_are_saved_while_others_are_deleted_have_their_models(ada: Workspace) -> None:
    saved: queue.Queue[str] = queue.Queue()
    stay, refused = [], []

    def save() -> None:
        for turn in range(60):
            pair = a_pair(ada)  # all of the same model and feeds
            try:
                ada.save_pair(pair)
            except ReportError as error:
                refused.append(error.message)
                continue
            if turn > 20 * (len(stay) + 1) - 8:
                stay.append(pair.id)
            else:
                saved.put(pair.id)
        saved.put("")

    saver = threading.Thread(target=save)
    saver.start()
    while pair_id := saved.get():
        ada.delete_pair(pair_id)
    saver.join()
    assert all("deleted while it was loaded" in message for message in refused)
    assert stay
    assert sorted(pair.id for pair in ada.pairs()) == sorted(stay)
    for pair in ada.pairs():
        assert pair.float_model.path.read_bytes() == BYTES
        assert Path(pair.inputs.path, "a.npz").read_bytes() == b"a"
    for pair_id in stay:
        ada.delete_pair(pair_id)
    assert kept(ada, "models") == kept(ada, "feeds") == []


def test_everything_is_deleted_and_the_workspace_goes_on(ada: Workspace, bob: Workspace) -> None:
    pair, his = a_full_pair(ada), a_full_pair(bob)
    ada.set_current_pair(pair.id)
    (ada.cache / "prepared").mkdir()
    with ada.scratch() as scratch:
        (scratch / "half").write_bytes(BYTES)
        ada.delete_everything()
        assert (scratch / "half").is_file()  # of whoever works on it
    assert files_in(ada.root) == []
    assert kept(ada, "cache") == []
    assert ada.size_bytes() == 0
    assert ada.current_pair() is None
    again = a_full_pair(ada)
    assert ada.pair(again.id) == again
    assert bob.pair(his.id).float_model.path.read_bytes() == BYTES


def test_a_workspace_that_was_removed_begins_anew(ada: Workspace) -> None:
    shutil.rmtree(ada.root)
    assert ada.pairs() == ()
    assert ada.size_bytes() == 0
    pair = a_full_pair(ada)
    assert ada.pairs() == (pair,)


# ── jobs of what is deleted ──────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A data folder with a run of Ada's."""
    folder = tmp_path_factory.mktemp("filled") / "data"
    return folder, fill(folder, ADA)


@pytest.mark.parametrize("done", [0.0, 0.4, 0.8])
@pytest.mark.parametrize("job", ["requantize", "search_list", "isolate"])
def test_a_job_whose_pair_is_deleted_ends_with_an_error_and_leaves_nothing(
    filled: tuple[Path, str], tmp_path: Path, job: str, done: float
) -> None:
    source, run_id = filled
    shutil.copytree(source, tmp_path / "data")
    root = workspace_of(tmp_path / "data", ADA)
    workspace = Workspace(root)
    pair_id = workspace.run(run_id).pair_id

    def progress(fraction: float, message: str) -> None:
        if done <= fraction < 1 and workspace.pairs():
            workspace.delete_pair(pair_id)

    config = dict(workspace.run(run_id).recipe)
    arguments: dict[str, Any] = {
        "requantize": {"config": config, "exclude": [f"{watermark(ADA)}_relu"]},
        "search_list": {"config": config, "metric": "output_sqnr_db", "value": 90.0},
        "isolate": {},
    }[job]
    with pytest.raises(InspectorError) as told:
        getattr(tasks, job)(root, run_id=run_id, progress=progress, **arguments)
    assert told.value.message == "the run was deleted while this was computed for it"
    assert told.value.hint == "Open another run, or load the models again."
    assert [kept(workspace, kind) for kind in ("pairs", "runs", "models", "feeds")] == [[]] * 4


def test_trials_of_a_deleted_pair_do_not_bring_its_folder_back(
    filled: tuple[Path, str], tmp_path: Path
) -> None:
    source, first = filled
    shutil.copytree(source, tmp_path / "data")
    workspace = Workspace(workspace_of(tmp_path / "data", ADA))
    # Random feeds are not missed, so that the search goes on to where it keeps its trials.
    run_id = workbench.load_pair(
        workspace.root,
        float_path=workspace.pair(workspace.run(first).pair_id).float_model.path,
        quantized_path=None,
        inputs=FeedSource(kind="random", samples=4),
    )
    run = workspace.run(run_id)

    def progress(fraction: float, message: str) -> None:
        if message.startswith("float model: sample") and len(workspace.pairs()) == 2:
            assert (workspace.root / "pairs" / run.pair_id / "trials").is_dir()
            workspace.delete_pair(run.pair_id)

    with pytest.raises(ReportError, match="the run was deleted while this was computed for it"):
        tasks.search_list(
            workspace.root,
            run_id=run_id,
            config=dict(run.recipe),
            metric="output_sqnr_db",
            value=90.0,
            progress=progress,
        )
    assert [each.id for each in workspace.pairs()] == kept(workspace, "pairs")
    assert workspace.unreadable() == ()


def test_another_error_of_a_job_stays_what_it_is(filled: tuple[Path, str]) -> None:
    root = workspace_of(filled[0], ADA)
    with pytest.raises(ReportError, match="compares no activation called 'none'"):
        tasks.inspect_tensor(
            root, run_id=filled[1], tensor="none", progress=lambda fraction, message: None
        )
    with pytest.raises(ReportError, match="there is no run 00 in this workspace"):
        tasks.isolate(root, run_id="00", progress=lambda fraction, message: None)


# ── notes and sizes ──────────────────────────────────────────────────────────────────────────


def test_a_note_is_kept_with_its_run_until_it_is_emptied(ada: Workspace) -> None:
    run = ada.runs(a_full_pair(ada).id)[0]
    assert ada.note(run.id) is None
    ada.save_note(run.id, "  worse,\nsee “head” \n", "bob@example.org")
    note = Workspace(ada.root).note(run.id)
    assert note is not None
    assert (note.text, note.by) == ("worse,\nsee “head”", "bob@example.org")
    assert note.written > run.created
    ada.save_note(run.id, "\n ", "ada@example.org")
    assert ada.note(run.id) is None
    ada.save_note(run.id, "x" * 20_000, "")
    with pytest.raises(ReportError, match="the note has 20001 characters, expected at most 20000"):
        ada.save_note(run.id, "x" * 20_001, "")
    assert ada.note(run.id) == replace(note, text="x" * 20_000, by="", written=_note(ada, run.id))
    (ada.run_folder(run.id) / "note.json").write_text('{"text": 3}')
    assert ada.note(run.id) is None


def _note(workspace: Workspace, run_id: str) -> str:
    note = workspace.note(run_id)
    assert isinstance(note, Note)
    return note.written


def test_a_run_whose_model_has_the_notes_name_keeps_both(ada: Workspace, tmp_path: Path) -> None:
    made = tmp_path / "made.onnx"
    made.write_bytes(BYTES)
    pair = a_full_pair(ada)
    model = replace(pair.float_model, name="note.json")
    run = ada.save_run(a_run(pair, number=2, model=model), {}, made)
    ada.save_note(run.id, "text", "")
    assert run.model.path.read_bytes() == BYTES


def test_a_workspaces_size_is_that_of_each_of_its_files_once(ada: Workspace) -> None:
    assert ada.size_bytes() == 0
    ada.add_model(io.BytesIO(BYTES), "a.onnx")
    ada.add_model(io.BytesIO(BYTES), "b.onnx")
    ada.add_feeds({"a": io.BytesIO(BYTES), "b/c": io.BytesIO(b"12345")})
    assert ada.size_bytes() == len(BYTES) + 5
    (ada.cache / "calibration").mkdir()
    (ada.cache / "calibration" / "ranges.json").write_bytes(b"x" * 100)
    (ada.root / "runs" / "cache").mkdir()
    (ada.root / "runs" / "cache" / "file").write_bytes(b"x" * 7)
    (ada.root / "temporary" / "upload").write_bytes(b"x" * 11)
    (ada.root / "away").symlink_to("/etc")
    assert ada.size_bytes() == len(BYTES) + 5 + 7 + 11 + len("/etc")


def test_more_than_the_quota_is_refused_before_it_is_stored(ada: Workspace) -> None:
    ada.add_model(io.BytesIO(b"x" * 1_000_000), "a.onnx")
    check_quota(ada, 1_500_000, 500_000)
    check_quota(ada, 1_000_000)
    with pytest.raises(QuotaError) as told:
        check_quota(ada, 1_500_000, 500_001)
    assert told.value.message == (
        "your workspace holds 1.00 MB of the 1.50 MB that one user may store, and 500 kB more do "
        "not fit"
    )
    assert told.value.hint == "Delete pairs or runs that you no longer need."
    with pytest.raises(QuotaError, match=r"holds 1\.00 MB of the 999 kB that one user may store$"):
        check_quota(ada, 999_000)


_ON_A_FULL_DISK = """
    import io, sys
    from pathlib import Path
    from inspector.errors import ReportError
    from inspector.store import Workspace
    from tests.test_store import BYTES, a_pair, a_run

    disk = Path(sys.argv[1])
    workspace = Workspace(disk / "data" / "users" / ("a" * 32))
    pair = a_pair(workspace)
    workspace.save_pair(pair)
    workspace.save_run(a_run(pair), {})
    files = []
    try:
        while True:
            files.append(disk / f"file {len(files)}")
            files[-1].touch()
    except OSError:
        pass
    before = sorted(workspace.root.rglob("*"))
    for write in (
        lambda: workspace.add_model(io.BytesIO(b"more"), "more.onnx"),
        lambda: workspace.save_draft(pair.id, {}),
        lambda: workspace.save_run(a_run(pair), {}),
    ):
        try:
            write()
        except ReportError as error:
            print(error.message.split(" (")[0], "|", error.hint)
    assert sorted(workspace.root.rglob("*")) == before
    workspace.delete_pair(pair.id)
    assert [path for path in workspace.root.rglob("*") if path.is_file()] == []
    assert list((disk / "data" / "blobs").iterdir()) == []
    workspace.save_pair(a_pair(workspace))
    print("went on")
"""


def test_a_full_disk_is_told_and_can_be_emptied(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    mount = 'mount -t tmpfs -o nr_inodes=60 tmpfs "$1" && exec "$2" -c "$3" "$1"'
    code = textwrap.dedent(_ON_A_FULL_DISK)
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", str(tmp_path), sys.executable, code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(f"no private mounts here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    *told, last = done.stdout.splitlines()
    hint = "Free disk space or set QUANT_INSPECTOR_DATA to a folder you may write to."
    assert told == [
        f"{what} cannot be stored: No space left on device | {hint}"
        for what in ("a temporary folder", "draft.json", "a temporary folder")
    ]
    assert last == "went on"
