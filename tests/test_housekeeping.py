from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from inspector import audit, hosting
from inspector.housekeeping import keep_tidy, make_private, tidy
from inspector.index import Index
from inspector.store import Workspace, new_id
from tests.browser import free_port
from tests.hosted import HEADER, header_portal
from tests.samples import ROOT
from tests.test_store import BYTES, SHA256, a_pair, a_run, leftovers

ADA, BOB, CAROL = (hosting.user_key(f"{name}@example.org") for name in ("ada", "bob", "carol"))
DAY = 24 * 3600


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    make_private(folder)
    return folder


@pytest.fixture(autouse=True)
def mask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def index(data: Path) -> Iterator[Index]:
    """An index that is a year old."""
    found = Index(data)
    write(found, "UPDATE facts SET fact = ?", days_ago(365))
    yield found
    found.close()


def write(index: Index, statement: str, *values: str) -> None:
    with sqlite3.connect(index.path) as connection:
        connection.execute(statement, values)
    connection.close()


def days_ago(days: float) -> str:
    return (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="microseconds")


def a_user(index: Index, name: str, *, seen: float | None, changed: float = 0.0) -> Workspace:
    """A workspace with a pair and a run.

    Args:
        index: of the data folder.
        name: of the user.
        seen: days since; None for a user whom the index does not know.
        changed: days since the folders were.
    """
    key = hosting.user_key(f"{name}@example.org")
    if seen is not None:
        index.saw(key, f"{name}@example.org")
    workspace = Workspace(hosting.workspace_folder(index.path.parent, key))
    pair = a_pair(workspace)
    workspace.save_pair(pair)
    workspace.save_run(a_run(pair), {})
    for entry in (*workspace.root.iterdir(), workspace.root):
        os.utime(entry, (time.time() - changed * DAY,) * 2)
    if seen is not None:
        write(index, f"UPDATE users SET last_seen = ? WHERE key = '{key}'", days_ago(seen))
    return workspace


def left(data: Path) -> set[str]:
    return {entry.name for entry in (data / "users").iterdir()}


def test_a_workspace_nobody_opened_expires_with_all_that_leads_to_it(
    data: Path, index: Index
) -> None:
    for name, seen in (("ada", 91.0), ("bob", 89.0), ("carol", 0.0)):
        a_user(index, name, seen=seen)
    index.share("r1", "p1", ADA, "bob@example.org", True)
    index.share("r2", "p2", BOB, "ada@example.org", True)
    index.begin_job("j1", ADA, "Searching")
    audit.keep_in(data)
    try:
        done = tidy(data, 90)
    finally:
        audit.keep_in(None)
    assert done.expired == (ADA,)
    assert left(data) == {BOB, CAROL}
    assert {user.key for user in index.users()} == {BOB, CAROL}
    assert index.shared_with(BOB, "r1") is None
    assert index.shared_with(ADA, "r2") is not None
    assert index.stop_unfinished() == 0
    assert list((data / "temporary").iterdir()) == []
    (line,) = (data / "audit.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert (told["event"], told["user"], told["owner"]) == ("expire", "", "ada@example.org")
    # What others had of the same content is still theirs.
    for key in (BOB, CAROL):
        other = Workspace(hosting.workspace_folder(data, key))
        assert other.pairs()[0].float_model.path.read_bytes() == BYTES


def test_with_zero_days_nothing_ever_expires(data: Path, index: Index) -> None:
    a_user(index, "ada", seen=3650.0, changed=3650.0)
    a_user(index, "bob", seen=None, changed=3650.0)
    assert tidy(data, 0).expired == ()
    assert left(data) == {ADA, BOB}


def test_a_workspace_of_an_unknown_user_counts_from_when_it_was_changed(
    data: Path, index: Index
) -> None:
    a_user(index, "ada", seen=None, changed=91.0)
    a_user(index, "bob", seen=None, changed=89.0)
    late = a_user(index, "carol", seen=None, changed=91.0)
    os.utime(late.root / "runs")  # somebody made a run
    assert tidy(data, 90).expired == (ADA,)
    assert left(data) == {BOB, CAROL}


def test_a_lost_index_lets_nobodys_workspace_expire_early(data: Path) -> None:
    index = Index(data)
    a_user(index, "ada", seen=None, changed=400.0)
    assert tidy(data, 90).expired == ()
    write(index, "UPDATE facts SET fact = ?", days_ago(91))
    index.close()
    assert tidy(data, 90).expired == (ADA,)


def test_a_workspace_at_work_stays_whole(data: Path, index: Index) -> None:
    ada = a_user(index, "ada", seen=91.0)
    (ada.root / "temporary" / "old").write_bytes(b"")
    os.utime(ada.root / "temporary" / "old", (0, 0))
    assert tidy(data, 90, is_busy=lambda root: root == ada.root).expired == ()
    assert len(leftovers(ada)) == 1
    assert tidy(data, 90, is_busy=lambda root: root != ada.root).expired == (ADA,)


def test_blobs_that_no_workspace_has_are_removed(data: Path, index: Index) -> None:
    ada, bob = (a_user(index, name, seen=0.0) for name in ("ada", "bob"))
    alone = ada.add_model(io.BytesIO(b"hers alone"), "a.onnx").sha256
    shutil.rmtree(ada.root)  # as a process that was killed leaves it
    assert tidy(data, 90).blobs == 1
    assert {blob.name for blob in (data / "blobs").iterdir()} == {
        file.parent.name if file.name == "digits.onnx" else _of_feeds(file)
        for file in (*bob.root.glob("models/*/*"), *bob.root.glob("feeds/*/*"))
    }
    assert alone not in {blob.name for blob in (data / "blobs").iterdir()}
    (data / "blobs" / "notes.txt").write_text("not ours")
    shutil.rmtree(bob.root)
    done = tidy(data, 90)
    assert (done.blobs, done.bytes) == (2, len(BYTES) + 1)
    assert [blob.name for blob in (data / "blobs").iterdir()] == ["notes.txt"]
    assert ada.add_model(io.BytesIO(BYTES), "again.onnx").sha256 == SHA256
    assert [blob.stat().st_nlink for blob in (data / "blobs").glob(SHA256)] == [2]


def _of_feeds(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_killed_processes_left_is_removed(data: Path, index: Index) -> None:
    ada = a_user(index, "ada", seen=0.0)
    pair = ada.pairs()[0]
    for folder in (data / "temporary", ada.root / "temporary"):
        (folder / "old").mkdir()
        (folder / "old" / "half").write_bytes(b"")
        os.utime(folder / "old" / "half", (0, 0))
        os.utime(folder / "old", (0, 0))
        (folder / "young").mkdir()
    (ada.root / "pairs" / pair.id).rename(ada.root / "temporary" / new_id())
    tidy(data, 90)
    for folder in (data / "temporary", ada.root / "temporary"):
        assert "young" in {entry.name for entry in folder.iterdir()}
        assert not (folder / "old").exists()
    assert list((ada.root / "runs").iterdir()) == []


def test_cached_results_that_nobody_read_for_a_month_are_removed(data: Path, index: Index) -> None:
    ada = a_user(index, "ada", seen=0.0)
    for name, made, read in (("new", 0, 0), ("read", 31, 1), ("old", 31, 31)):
        folder = ada.cache / "prepared" / name
        folder.mkdir(parents=True)
        (folder / "prepared.onnx").write_bytes(BYTES)
        (ada.cache / f"{name}.json").write_bytes(b"{}")
        for file in (folder / "prepared.onnx", ada.cache / f"{name}.json"):
            os.utime(file, (time.time() - read * DAY, time.time() - made * DAY))
    tidy(data, 90)
    assert sorted(entry.name for entry in (ada.cache / "prepared").iterdir()) == ["new", "read"]
    assert not (ada.cache / "old.json").exists()
    assert (ada.cache / "read.json").exists()


def test_one_workspace_that_cannot_be_tidied_does_not_stop_the_rest(
    data: Path, index: Index, tmp_path: Path
) -> None:
    a_user(index, "bob", seen=91.0)
    a_user(index, "carol", seen=0.0)
    broken = hosting.workspace_folder(data, ADA)
    broken.mkdir()
    (broken / "models").write_text("no folder")
    (data / "users" / "lost+found").mkdir()
    (data / "users" / ("0" * 32)).symlink_to(tmp_path)
    (tmp_path / "mine").write_text("")
    assert tidy(data, 90).expired == (BOB,)
    assert left(data) == {ADA, CAROL, "lost+found", "0" * 32}
    assert {entry.name for entry in tmp_path.iterdir()} == {"data", "mine"}


def test_rounds_go_on_in_a_thread_until_they_are_ended(
    data: Path, index: Index, caplog: pytest.LogCaptureFixture
) -> None:
    a_user(index, "ada", seen=91.0)
    end = keep_tidy(data, 90, every_seconds=0.01)
    wait_for(lambda: left(data) == set())
    (data / "users").rename(data / "aside")
    (data / "users").write_text("")  # a round that fails is not the last one
    wait_for(lambda: "housekeeping failed" in caplog.text)
    (data / "users").unlink()
    (data / "aside").rename(data / "users")
    a_user(index, "bob", seen=91.0)
    wait_for(lambda: left(data) == set())
    end()
    wait_for(lambda: all(t.name != "housekeeping" for t in threading.enumerate()))
    a_user(index, "carol", seen=91.0)
    time.sleep(0.05)
    assert left(data) == {CAROL}


def wait_for(true: object) -> None:
    assert callable(true)
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_folders_that_were_open_to_others_are_closed(tmp_path: Path) -> None:
    for name in ("users", "blobs"):
        (tmp_path / name).mkdir(mode=0o755)
    make_private(tmp_path)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("users", "blobs")]
    assert modes == [0o700, 0o700]
    (tmp_path / "later").write_text("")
    assert stat.S_IMODE((tmp_path / "later").stat().st_mode) == 0o600
    code = "import sys; open(sys.argv[1], 'w')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "child")], check=True)
    assert stat.S_IMODE((tmp_path / "child").stat().st_mode) == 0o600


# ── a real portal ────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_a_second_server_on_the_same_folder_leaves_the_jobs_of_the_first_alone(
    data: Path, index: Index
) -> None:
    def told() -> int:
        return len(index.stopped_jobs(ADA))

    log = data.parent / "second.log"
    with header_portal(data):
        index.begin_job("1" * 32, ADA, "Comparing")
        with header_portal(data, log=log):
            assert told() == 0
        assert "another server is using" in log.read_text()
    with header_portal(data):
        assert told() == 1, "the first has ended, and its job with it"


@pytest.mark.slow
def test_a_portal_tidies_when_it_starts(data: Path, index: Index) -> None:
    a_user(index, "ada", seen=91.0)
    a_user(index, "bob", seen=1.0)
    (data / "users").chmod(0o755)
    days = {"QUANT_INSPECTOR_EXPIRY_DAYS": "90"}
    with header_portal(data, environment=days) as portal, portal.client("") as client:
        wait_for(lambda: left(data) == {BOB})
        assert client.get("/healthz").status_code == 200
        assert stat.S_IMODE((data / "users").stat().st_mode) == 0o700
        # Whoever signs in is noted, and stays.
        with portal.tab("bob@example.org") as tab:
            tab.open()
        (user,) = index.users()
        assert user.last_seen > days_ago(0.5)


@pytest.mark.slow
def test_a_portal_with_a_damaged_index_does_not_start(data: Path) -> None:
    (data / "index.sqlite").write_text("not an index" * 1000)
    done = subprocess.run(
        [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(free_port())],
        cwd=ROOT,
        env={
            **os.environ,
            "QUANT_INSPECTOR_MODE": "portal",
            "QUANT_INSPECTOR_DATA": str(data),
            "QUANT_INSPECTOR_AUTH": f"header:{HEADER}",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    told = done.stderr
    assert (
        "Error: index.sqlite is not a readable index: file is not a database.\nHint: Stop" in told
    )
    assert "Traceback" not in told
