"""Backup of a portal that is in use, and what a restore does not let in."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import sqlite3
import stat
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from inspector import backup, hosting, housekeeping
from inspector.cli import main as cli_main
from inspector.errors import ReportError
from inspector.index import FILE_NAME, Index
from inspector.store import Workspace
from tests.hosted import ADA, BOB, fill, watermark, workspace_of

HEAD = {"format": backup.FORMAT, "version": backup.VERSION, "created": "2026-01-01T00:00:00"}


@pytest.fixture(scope="module")
def portal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a portal in which two people have each loaded a pair."""
    data = tmp_path_factory.mktemp("portal") / "data"
    runs = {each: fill(data, each) for each in (ADA, BOB)}
    Index(data).close()
    with closing(sqlite3.connect(data / FILE_NAME)) as index:
        index.execute("PRAGMA journal_mode = WAL")
        index.execute("CREATE TABLE probe (run TEXT)")
        index.executemany("INSERT INTO probe VALUES (?)", [(run,) for run in runs.values()])
        index.commit()
    return data


def everything(root: Path) -> dict[str, object]:
    """All that a workspace says of itself."""
    workspace = Workspace(root)
    assert workspace.unreadable() == ()
    return {
        run.id: (run, pair, workspace.comparison(run.id), run.model.path.read_bytes())
        for pair in workspace.pairs()
        for run in workspace.runs(pair.id)
    }


def relative(found: dict[str, object], root: Path) -> str:
    return repr(found).replace(str(root), "ROOT")


def test_a_portal_backed_up_while_others_write_comes_back_with_the_same_numbers(
    portal: Path, tmp_path: Path
) -> None:
    ada = workspace_of(portal, ADA)
    before = everything(ada)
    (run_id,) = before
    stop = threading.Event()
    written: list[str] = []

    def write() -> None:
        """Saves runs and deletes half of them, and changes the index, as fast as the disk lets."""
        workspace = Workspace(workspace_of(portal, BOB))
        (pair,) = workspace.pairs()
        run = workspace.runs(pair.id)[0]
        comparison = workspace.comparison(run.id)
        with closing(sqlite3.connect(portal / FILE_NAME, timeout=60)) as index:
            while not stop.is_set():
                number = len(written)
                made = f"{number:032x}"
                workspace.save_run(replace(run, id=made, number=number + 1), comparison)
                index.execute("INSERT INTO probe VALUES (?)", (made,))
                index.commit()
                written.append(made)
                if number % 2:
                    workspace.delete_run(made)

    def until_written(more: int) -> None:
        enough = len(written) + more
        while len(written) < enough and writer.is_alive():
            time.sleep(0.005)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        archives = [tmp_path / f"{number}.tar.gz" for number in range(3)]
        for archive in archives:
            # The writer writes in the middle of it, at its first and its later files.
            waits = iter((2, 0, 0, 1, 0, 0, 1))
            backup.back_up(portal, archive, progress=lambda *_, w=waits: until_written(next(w, 0)))
    finally:
        stop.set()
        writer.join()
    assert len(written) >= 12
    for number, archive in enumerate(archives):
        restored = tmp_path / f"restored-{number}"
        assert cli_main(["restore", str(archive), str(restored)]) == 0
        root = workspace_of(restored, ADA)
        assert relative(everything(root), root) == relative(before, ada)
        bob = everything(workspace_of(restored, BOB))
        with closing(sqlite3.connect(restored / FILE_NAME)) as index:
            kept = {run for (run,) in index.execute("SELECT run FROM probe")}
        # The index was copied first: what it says had happened.
        assert len(kept) <= len(written) + 2
        assert run_id in kept
        assert set(bob) <= {*written, *(r for r in bob if len(set(r)) > 3)}
    assert stat.S_IMODE(archives[0].stat().st_mode) == 0o600


def test_what_is_unfinished_or_computed_again_is_not_in_a_backup(tmp_path: Path) -> None:
    root = workspace_of(tmp_path / "data", ADA)
    Workspace(root)
    for name in ("cache/ranges", "temporary/upload-1/parts/a", ".part-x/model.onnx"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("unfinished")
    (root / "pairs/1").mkdir()
    (root / "pairs/1/cache").write_text("a name that means nothing there")
    (tmp_path / "data/temporary").mkdir()
    (tmp_path / "data/temporary/a").write_text("unfinished")
    (root / "out").symlink_to("/etc")
    made = backup.back_up(tmp_path / "data", tmp_path / "b.tar.gz")
    with tarfile.open(tmp_path / "b.tar.gz") as tar:
        key = hosting.user_key(ADA)
        assert tar.getnames() == [backup.HEAD, f"users/{key}/pairs/1/cache"]
        assert {(each.uid, each.uname) for each in tar} == {(0, "")}
    assert (made.files, made.users, made.left_out) == (1, 1, 0)


def test_nobodys_workspace_expires_because_the_backup_is_old(portal: Path, tmp_path: Path) -> None:
    shutil.copytree(portal, tmp_path / "data")
    ada = workspace_of(portal, ADA).name
    with closing(Index(tmp_path / "data")) as index:
        index.saw(ada, ADA)
    with closing(sqlite3.connect(tmp_path / "data" / FILE_NAME)) as index, index:
        index.execute("UPDATE users SET last_seen = '2020-01-01T00:00:00.000000+00:00'")
    backup.back_up(tmp_path / "data", tmp_path / "b.tar.gz")
    backup.restore(tmp_path / "b.tar.gz", tmp_path / "restored")
    assert housekeeping.tidy(tmp_path / "restored", 30).expired == ()
    assert everything(workspace_of(tmp_path / "restored", ADA))
    assert housekeeping.tidy(tmp_path / "data", 30).expired == (ada,), "the backup was not old"


def test_a_content_with_several_names_is_stored_once_and_linked_again(tmp_path: Path) -> None:
    content = os.urandom(300_000)
    name = hashlib.sha256(content).hexdigest()
    data = tmp_path / "data"
    (data / "blobs").mkdir(parents=True)
    (data / "blobs" / name).write_bytes(content)
    (data / "blobs" / name).chmod(0o444)
    for who in (ADA, BOB):
        folder = workspace_of(data, who) / "models" / name
        folder.mkdir(parents=True)
        (folder / "model.onnx").hardlink_to(data / "blobs" / name)
    archive = tmp_path / "b.tar.gz"
    assert backup.back_up(data, archive).size_bytes == len(content)
    assert archive.stat().st_size < 1.2 * len(content)
    restored = tmp_path / "restored"
    found = backup.restore(archive, restored)
    assert (found.files, found.users, found.size_bytes) == (3, 2, len(content))
    files = [path for path in restored.rglob("*") if path.is_file()]
    assert len(files) == 3
    assert {path.stat().st_ino for path in files} == {files[0].stat().st_ino}
    assert files[0].read_bytes() == content
    assert {stat.S_IMODE(p.stat().st_mode) for p in restored.rglob("*") if p.is_dir()} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o400}


def test_a_file_that_takes_a_deleted_ones_number_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    first, second = data / "runs/a/model", data / "runs/b/model"
    for path, content in ((first, b"first"), (second, b"other")):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        path.with_name("again").hardlink_to(path)
        os.utime(path, (1, 1 if path == first else 2))
    real = os.fstat

    def same_number(file: int) -> os.stat_result:
        facts = list(real(file))
        facts[stat.ST_INO] = 7
        return os.stat_result([*facts], {"st_mtime_ns": real(file).st_mtime_ns})

    monkeypatch.setattr(backup.os, "fstat", same_number)
    backup.back_up(data, tmp_path / "b.tar.gz")
    monkeypatch.undo()
    restored = tmp_path / "restored"
    backup.restore(tmp_path / "b.tar.gz", restored)
    assert (restored / "runs/b/model").read_bytes() == b"other"
    assert (restored / "runs/a/again").read_bytes() == b"first"


def test_a_folder_that_is_deleted_meanwhile_is_in_the_backup_whole_or_not_at_all(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    for number in range(40):
        folder = data / f"runs/{number:02}"
        folder.mkdir(parents=True)
        for name in ("run.json", "comparison.json", "model.onnx"):
            (folder / name).write_text("{}")
    names = backup_while(
        data, lambda: [shutil.rmtree(data / f"runs/{number:02}") for number in range(1, 40, 2)]
    )[0]
    assert names == {
        f"runs/{number:02}/{name}"
        for number in range(0, 40, 2)
        for name in ("run.json", "comparison.json", "model.onnx")
    }


@pytest.mark.parametrize("gone", [range(300, 301), range(1, 500)])
def test_listed_files_that_are_deleted_before_they_are_read_are_left_out(
    tmp_path: Path, gone: range
) -> None:
    data = tmp_path / "data"
    (data / "runs/1/details").mkdir(parents=True)
    files = [data / f"runs/1/details/{number:03}" for number in range(500)]
    for file in files:
        file.write_text("{}")
    names, made = backup_while(data, lambda: [files[number].unlink() for number in gone])
    left = [number for number in gone if number >= 200]  # the others were open already
    assert len(names) == 500 - len(left)
    assert made.left_out == len(left)


def backup_while(data: Path, act: Callable[[], object]) -> tuple[set[str], backup.Backup]:
    """The names in a backup during which something was done after the first file."""
    done = threading.Event()

    def progress(_fraction: float, _name: str) -> None:
        if not done.is_set():
            done.set()
            act()

    output = data.with_name("b.tar.gz")
    made = backup.back_up(data, output, progress=progress)
    with tarfile.open(output) as tar:
        return set(tar.getnames()) - {backup.HEAD}, made


def test_the_index_is_copied_with_what_only_its_log_holds(portal: Path, tmp_path: Path) -> None:
    shutil.copytree(portal, tmp_path / "data")
    with closing(sqlite3.connect(tmp_path / "data" / FILE_NAME)) as index:
        index.execute("PRAGMA wal_autocheckpoint = 0")
        index.execute("INSERT INTO probe VALUES ('only in the log')")
        index.commit()
        assert (tmp_path / "data" / f"{FILE_NAME}-wal").stat().st_size > 0
        backup.back_up(tmp_path / "data", tmp_path / "b.tar.gz")
    backup.restore(tmp_path / "b.tar.gz", tmp_path / "restored")
    with closing(sqlite3.connect(tmp_path / "restored" / FILE_NAME)) as index:
        assert ("only in the log",) in index.execute("SELECT run FROM probe").fetchall()
    assert not list((tmp_path / "restored").glob(f"{FILE_NAME}-*"))


@pytest.mark.parametrize("where", ["in the folder", "no folder", "no target"])
def test_a_backup_that_cannot_be_is_refused_and_leaves_nothing(tmp_path: Path, where: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    output = {
        "in the folder": data / "b.tar.gz",
        "no folder": tmp_path / "b.tar.gz",
        "no target": tmp_path / "missing" / "b.tar.gz",
    }[where]
    with pytest.raises(ReportError):
        backup.back_up(data if where != "no folder" else tmp_path / "nothing", output)
    assert [path.name for path in tmp_path.rglob("*")] == ["data"]


def test_a_backup_that_is_broken_off_leaves_the_one_before(portal: Path, tmp_path: Path) -> None:
    output = tmp_path / "b.tar.gz"
    output.write_bytes(b"the one before")

    def stop(fraction: float, _: str) -> None:
        if fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backup.back_up(portal, output, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["b.tar.gz"]
    assert output.read_bytes() == b"the one before"


# ------------------------------------------------------------------ archives of somebody else


Members = list[tuple[tarfile.TarInfo, bytes]]


def member(
    name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, to: str = ""
) -> Members:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, to, 0o777
    info.size = len(content) if kind == tarfile.REGTYPE else 0
    return [(info, content)]


def archive_of(path: Path, members: Members, head: object = HEAD) -> Path:
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        content = json.dumps(head).encode()
        for info, inside in [*member(backup.HEAD, content), *members]:
            tar.addfile(info, io.BytesIO(inside) if info.isreg() else None)
    return path


def huge() -> Members:
    info = tarfile.TarInfo("runs/1/model.onnx")
    info.size = 1 << 60
    return [(info, b"")]


HOSTILE: dict[str, tuple[Callable[[], Members], str]] = {
    "up": (lambda: member("../out"), "leads out"),
    "deep up": (lambda: member("users/../../out"), "leads out"),
    "absolute": (lambda: member("/tmp/out"), "leads out"),
    "here": (lambda: member("./runs/x"), "leads out"),
    "hidden": (lambda: member(".ssh/authorized_keys"), "leads out"),
    "symlink": (lambda: member("runs", kind=tarfile.SYMTYPE, to="/etc"), "neither a file"),
    "symlink inside": (lambda: member("a", kind=tarfile.SYMTYPE, to="runs"), "neither a file"),
    "folder": (lambda: member("runs", kind=tarfile.DIRTYPE), "neither a file"),
    "device": (lambda: member("null", kind=tarfile.CHRTYPE), "neither a file"),
    "pipe": (lambda: member("pipe", kind=tarfile.FIFOTYPE), "neither a file"),
    "link out": (lambda: member("a", kind=tarfile.LNKTYPE, to="../out"), "leads out"),
    "link to a path": (lambda: member("a", kind=tarfile.LNKTYPE, to="/etc/passwd"), "leads out"),
    "link to nothing": (lambda: member("a", kind=tarfile.LNKTYPE, to="b"), "not there"),
    "twice": (lambda: [*member("a"), *member("a", b"other")], "twice"),
    "through a link": (
        lambda: [*member("a"), *member("b", kind=tarfile.LNKTYPE, to="a"), *member("b", b"other")],
        "twice",
    ),
    "below a file": (lambda: [*member("a"), *member("a/b")], "cannot be restored"),
    "larger than the disk": (huge, "bytes, and the disk"),
    "another blob": (lambda: member(f"blobs/{'0' * 64}"), "another content"),
    "another model": (lambda: member(f"users/{'a' * 32}/models/{'0' * 64}/m.onnx"), "another"),
    "another feed": (lambda: member(f"feeds/{'0' * 64}/a.npz"), "another content"),
    "no index": (lambda: member(FILE_NAME, b"SQLite format 3\0" + b"x" * 4096), FILE_NAME),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_archive_is_refused_and_the_folder_stays_empty(tmp_path: Path, what: str) -> None:
    members, message = HOSTILE[what]
    if what == "larger than the disk":
        archive = _cut(tmp_path, members())
    else:
        whole = [*member("current.json", b"{}"), *members()]
        archive = archive_of(tmp_path / "b.tar.gz", whole)
    data = tmp_path / "below" / "data"
    with pytest.raises(ReportError, match=message) as caught:
        backup.restore(archive, data)
    assert caught.value.hint
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b.tar.gz", "below", "data"]


def _cut(folder: Path, members: Members) -> Path:
    """An archive that names a size which it does not have."""
    archive = archive_of(folder / "b.tar.gz", [])
    plain = gzip.decompress(archive.read_bytes())
    head = plain[: 512 * 2]
    archive.write_bytes(gzip.compress(head + members[0][0].tobuf(tarfile.PAX_FORMAT)))
    return archive


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({**HEAD, "version": 2}, "version 2, expected 1"),
        ({**HEAD, "format": "another"}, "not one of ours"),
        ([], "not one of ours"),
    ],
)
def test_an_archive_of_something_else_is_refused(
    tmp_path: Path, head: object, message: str
) -> None:
    archive = archive_of(tmp_path / "b.tar.gz", member("a"), head)
    with pytest.raises(ReportError, match=message):
        backup.restore(archive, tmp_path / "data")
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(member("a")[0][0], io.BytesIO(b"x"))
    with pytest.raises(ReportError, match="does not begin with"):
        backup.restore(archive, tmp_path / "data")


def damaged(content: bytes) -> Iterator[tuple[str, bytes]]:
    yield "nothing", b""
    yield "no archive", b"not gzip at all"
    for share in (0.1, 0.5, 0.95):
        yield f"cut at {share}", content[: int(len(content) * share)]
    yield "its end is missing", content[:-1]
    yield "another checksum", content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]
    for share in (0.2, 0.5, 0.8):
        at = int(len(content) * share)
        # Some bits say nothing: a match of a repeated run may begin at another repetition.
        while same(
            flipped := content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :], content
        ):
            at += 1
        yield f"flipped at {at}", flipped


def same(one: bytes, other: bytes) -> bool:
    """Whether two gzip files hold the same; no is said of one that cannot be read."""
    try:
        return gzip.decompress(one) == gzip.decompress(other)
    except (OSError, EOFError, zlib.error):
        return False


def test_a_damaged_archive_is_refused_and_the_folder_stays_empty(
    portal: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "b.tar.gz"
    backup.back_up(portal, archive)
    content = archive.read_bytes()
    for what, broken in damaged(content):
        archive.write_bytes(broken)
        with pytest.raises(ReportError):
            backup.restore(archive, tmp_path / "data")
        assert list((tmp_path / "data").iterdir()) == [], what


def test_a_folder_that_is_not_empty_is_not_touched(portal: Path, tmp_path: Path) -> None:
    backup.back_up(portal, tmp_path / "b.tar.gz")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/kept").write_text("kept")
    with pytest.raises(ReportError, match="is not empty"):
        backup.restore(tmp_path / "b.tar.gz", tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["kept"]


def test_the_two_commands_say_what_they_did(
    portal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = str(tmp_path / "b.tar.gz")
    assert cli_main(["backup", str(portal), "-o", archive]) == 0
    assert cli_main(["restore", archive, str(tmp_path / "data")]) == 0
    wrote, restored = capsys.readouterr().out.splitlines()
    assert wrote.startswith(f"wrote {archive}: 2 workspaces, ")
    assert " runs, " in restored
    assert wrote.split(": ")[1] == restored.split(": ")[1]
    assert watermark(ADA) not in wrote
    assert cli_main(["restore", archive, str(tmp_path / "data")]) == 2
    assert "is not empty" in capsys.readouterr().err
