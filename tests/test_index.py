from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from inspector.errors import ReportError
from inspector.hosting import user_key
from inspector.index import FILE_NAME, Index

ADA, BOB, CAROL = (user_key(f"{name}@example.org") for name in ("ada", "bob", "carol"))


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    found = Index(tmp_path / "data")
    yield found
    found.close()


def backdate(index: Index, key: str, **ago: float) -> str:
    """Sets when a user was last seen."""
    then = (datetime.now(UTC) - timedelta(**ago)).isoformat(timespec="microseconds")
    with sqlite3.connect(index.path) as connection:
        connection.execute("UPDATE users SET last_seen = ? WHERE key = ?", (then, key))
    connection.close()
    return then


# ── people ───────────────────────────────────────────────────────────────────────────────────


def test_a_user_is_known_by_the_address_they_last_signed_in_with(index: Index) -> None:
    assert index.address_of(ADA) == ""
    index.saw(ADA, "ada@example.org")
    index.saw(ADA, "Ada@Example.org")
    assert index.address_of(ADA) == "Ada@Example.org"
    index.saw(BOB, "bob@example.org")
    assert [user.address for user in index.users()] == ["bob@example.org", "Ada@Example.org"]


def test_that_a_user_is_here_is_written_once_a_minute(index: Index) -> None:
    index.saw(ADA, "ada@example.org")
    (first,) = index.users()
    recent = backdate(index, ADA, seconds=50)
    index.saw(ADA, "ada@example.org")
    assert index.users()[0].last_seen == recent
    for ago in (70.0, -3600.0):  # also where the clock was put back
        backdate(index, ADA, seconds=ago)
        index.saw(ADA, "ada@example.org")
        (user,) = index.users()
        assert abs(datetime.now(UTC) - datetime.fromisoformat(user.last_seen)).seconds < 40
    assert user.first_seen == first.first_seen


def test_a_user_who_comes_back_while_leaving_is_seen_after_it(index: Index) -> None:
    index.saw(ADA, "ada@example.org")
    before = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    with index.leaving(ADA, backdate(index, ADA, days=9)) as gone:
        assert not gone
    assert index.address_of(ADA) == "ada@example.org"
    with index.leaving(ADA, before) as gone:
        assert gone
        back = threading.Thread(target=index.saw, args=(ADA, "ada@example.org"))
        back.start()
        back.join(0.3)
        assert back.is_alive()  # waits for what is removed just now
    back.join()
    (user,) = index.users()
    assert user.first_seen == user.last_seen
    with pytest.raises(ZeroDivisionError), index.leaving(ADA, before):
        raise ZeroDivisionError
    assert index.address_of(ADA) == "ada@example.org"


# ── shares ───────────────────────────────────────────────────────────────────────────────────


def test_a_share_works_once_its_receiver_signs_in_whatever_the_case(index: Index) -> None:
    index.share("r1", "p1", ADA, "BOB@Example.org", False)
    found = index.shared_with(BOB, "r1")
    assert found is not None
    assert (found.owner_key, found.pair_id, found.run_id) == (ADA, "p1", "r1")
    assert (found.address, found.editable) == ("BOB@Example.org", False)
    assert index.shared_with(CAROL, "r1") is None
    assert index.shared_with(BOB, "r2") is None
    assert index.shared_with("", "r1") is None


def test_a_share_with_everyone_is_for_everyone_but_the_owner(index: Index) -> None:
    index.share("r1", "p1", ADA, "", True)
    assert index.shared_with(BOB, "r1") == index.shared_with(CAROL, "r1") is not None
    assert index.shared_with(ADA, "r1") is None
    assert [share.run_id for share in index.shares_to(BOB)] == ["r1"]
    assert index.shares_to(ADA) == ()


def test_of_two_shares_the_one_that_allows_more_counts(index: Index) -> None:
    index.share("r1", "p1", ADA, "", False)
    index.share("r1", "p1", ADA, "bob@example.org", True)
    index.share("r2", "p1", ADA, "", True)
    index.share("r2", "p1", ADA, "bob@example.org", False)
    for run_id in ("r1", "r2"):
        found = index.shared_with(BOB, run_id)
        assert found is not None
        assert found.editable
    carol = index.shared_with(CAROL, "r1")
    assert carol is not None
    assert not carol.editable


def test_a_share_is_changed_and_taken_back(index: Index) -> None:
    index.share("r1", "p1", ADA, "bob@example.org", False)
    (first,) = index.shares("r1")
    index.share("r1", "p1", ADA, "Bob@example.org", True)
    (changed,) = index.shares("r1")
    assert (changed.editable, changed.address) == (True, "Bob@example.org")
    assert changed.created == first.created
    index.unshare("r1", "")  # there is none with everyone
    assert index.shares("r1") == (changed,)
    index.unshare("r1", "BOB@example.org")
    assert index.shares("r1") == ()
    assert index.shared_with(BOB, "r1") is None


def test_nobody_shares_the_run_of_somebody_else_anew(index: Index) -> None:
    index.share("r1", "p1", ADA, "carol@example.org", False)
    index.share("r1", "p2", BOB, "carol@example.org", True)
    (share,) = index.shares("r1")
    assert (share.owner_key, share.pair_id, share.editable) == (ADA, "p1", False)


def test_what_is_deleted_is_not_shared_any_more(index: Index) -> None:
    for run_id, pair_id, owner in (("r1", "p1", ADA), ("r2", "p1", ADA), ("r3", "p2", ADA)):
        index.share(run_id, pair_id, owner, "carol@example.org", False)
    index.share("r4", "p3", BOB, "ada@example.org", False)
    index.begin_job("j1", ADA, "Searching")
    index.saw(ADA, "ada@example.org")
    index.saw(BOB, "bob@example.org")
    index.forget_run("r1")
    assert [share.run_id for share in index.shares_of_pair("p1")] == ["r2"]
    index.forget_pair("p1")
    assert index.shares_of_pair("p1") == ()
    assert [share.run_id for share in index.shares_to(CAROL)] == ["r3"]
    index.forget_user(ADA)
    assert index.shares_to(CAROL) == ()
    assert [user.key for user in index.users()] == [BOB]
    assert index.stop_unfinished() == 0
    # What others gave her is theirs to take back.
    assert [share.run_id for share in index.shares_to(ADA)] == ["r4"]


def test_names_cannot_change_a_question(index: Index) -> None:
    nasty = "x' OR '1'='1"
    index.share("r1", "p1", ADA, "bob@example.org", False)
    assert index.shared_with(nasty, "r1") is None
    assert index.shares(nasty) == ()
    index.forget_user(nasty)
    index.unshare("r1", nasty)
    index.saw(nasty, nasty)
    assert index.address_of(nasty) == nasty
    assert len(index.shares("r1")) == 1


# ── jobs ─────────────────────────────────────────────────────────────────────────────────────


def test_jobs_under_way_are_told_as_stopped_after_a_restart(index: Index) -> None:
    index.begin_job("j1", ADA, "Searching", "Trials so far are kept.")
    index.begin_job("j2", ADA, "Re-quantizing")
    index.begin_job("j3", BOB, "Comparing")
    index.begin_job("j4", ADA, "Measuring")
    index.end_job("j2", "done")
    index.end_job("j4", "failed", "no memory")
    assert index.stopped_jobs(ADA) == ()
    again = Index(index.path.parent)
    assert again.stop_unfinished("The server was restarted.") == 2
    assert again.stop_unfinished() == 0
    (job,) = again.stopped_jobs(ADA)
    assert (job.id, job.title, job.keeps) == ("j1", "Searching", "Trials so far are kept.")
    assert (job.state, job.why) == ("stopped", "The server was restarted.")
    assert job.begun <= job.ended
    again.dismiss_stopped(ADA)
    assert again.stopped_jobs(ADA) == ()
    assert [job.id for job in again.stopped_jobs(BOB)] == ["j3"]
    again.close()


def test_jobs_that_ended_long_ago_are_forgotten(index: Index) -> None:
    for job_id in ("old", "new"):
        index.begin_job(job_id, ADA, "Searching")
        index.end_job(job_id, "stopped", "of a limit")
    then = (datetime.now(UTC) - timedelta(days=31)).isoformat()
    with sqlite3.connect(index.path) as connection:
        connection.execute("UPDATE jobs SET ended = ? WHERE id = 'old'", (then,))
    connection.close()
    index.stop_unfinished()
    assert [job.id for job in index.stopped_jobs(ADA)] == ["new"]


# ── many at once, and killed ─────────────────────────────────────────────────────────────────


def _use(data: Path, name: str, count: int, ready: Connection) -> None:
    """Makes shares and jobs from several threads; the index may not be there yet."""
    ready.send("here")
    ready.recv()
    index = Index(data)
    problems: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for at in range(count):
                run_id = f"{name}-{thread}-{at}"
                index.share(run_id, "p1", ADA, "bob@example.org", True)
                index.saw(user_key(run_id), run_id)
                index.begin_job(run_id, ADA, "Searching")
                assert index.shared_with(BOB, run_id) is not None
                index.end_job(run_id, "stopped")
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    index.close()
    if problems:
        raise problems[0]


def started(
    target: Callable[..., None], *arguments: object
) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(*arguments, there))
    process.start()
    there.close()
    return process, here


def test_two_processes_with_eight_threads_each_lose_nothing(tmp_path: Path) -> None:
    processes = [started(_use, tmp_path / "data", name, 12) for name in ("a", "b")]
    for _, pipe in processes:
        assert pipe.recv() == "here"
    for _, pipe in processes:  # both make the file at this moment
        pipe.send("go")
    for process, _ in processes:
        process.join()
        assert process.exitcode == 0
        process.close()
    index = Index(tmp_path / "data")
    assert len(index.shares_to(BOB)) == len(index.stopped_jobs(ADA)) == len(index.users()) == 192
    index.close()


def test_a_file_made_while_another_looks_at_it_is_not_taken_for_a_foreign_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Index] = []
    other = threading.Thread(target=lambda: made.append(Index(tmp_path)))
    first = Index._open

    def meanwhile(statement: str) -> None:
        if "sqlite_master" in statement and not other.ident:
            other.start()
            other.join(0.5)

    def opened(index: Index) -> sqlite3.Connection:
        connection = first(index)
        if threading.current_thread() is not other:
            connection.set_trace_callback(meanwhile)
        return connection

    monkeypatch.setattr(Index, "_open", opened)
    made.append(Index(tmp_path))
    other.join(30)
    assert len(made) == 2
    for index in made:
        assert index.users() == ()
        index.close()


def _write_until_killed(data: Path, pipe: Connection) -> None:
    index = Index(data)
    at = 0
    while True:
        at += 1
        index.share(f"{os.getpid()}-{at}", "p1", ADA, "bob@example.org", False)
        pipe.send(f"{os.getpid()}-{at}")


def test_a_killed_process_loses_nothing_that_was_confirmed(tmp_path: Path) -> None:
    chance = random.Random(7)
    confirmed: set[str] = set()
    for _ in range(4):
        process, pipe = started(_write_until_killed, tmp_path / "data")
        confirmed.add(pipe.recv())
        time.sleep(chance.uniform(0.0, 0.05))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        try:
            while True:
                confirmed.add(pipe.recv())
        except EOFError:
            pipe.close()
        process.close()
        index = Index(tmp_path / "data")
        kept = {share.run_id for share in index.shares_to(BOB)}
        assert confirmed <= kept
        assert len(kept - confirmed) <= 4  # at most the one under way, each time
        index.close()
        with sqlite3.connect(index.path) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        connection.close()
    assert len(confirmed) > 8


# ── the file ─────────────────────────────────────────────────────────────────────────────────


def test_the_file_is_for_its_user_alone(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        index = Index(tmp_path / "data")
        index.saw(ADA, "ada@example.org")
        modes = {
            file.name: stat.S_IMODE(file.stat().st_mode) for file in index.path.parent.iterdir()
        }
        folder = stat.S_IMODE(index.path.parent.stat().st_mode)
        index.close()
    finally:
        os.umask(mask)
    assert modes == {FILE_NAME: 0o600, f"{FILE_NAME}-wal": 0o600, f"{FILE_NAME}-shm": 0o600}
    assert folder == 0o700


def _other_program(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()


def _without_a_table(path: Path) -> None:
    Index(path.parent).close()
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE shares")
    connection.close()


def _cut_off(path: Path) -> None:
    index = Index(path.parent)
    for at in range(200):
        index.share(f"r{at}", "p1", ADA, "bob@example.org", False)
    index.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\0" * 4096 + whole[8192 : len(whole) // 2])


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.write_bytes(b"<html>not a database</html>" * 300), "not a database"),
        (_other_program, "it is a database of another program"),
        (_cut_off, "malformed"),
        (_without_a_table, "no such table: shares"),
    ],
    ids=["garbage", "another program's", "cut off", "without a table"],
)
def test_a_file_that_is_no_index_is_refused_unchanged_and_the_hint_works(
    tmp_path: Path, spoil: Callable[[Path], object], why: str
) -> None:
    path = tmp_path / FILE_NAME
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(
        ReportError, match=rf"index\.sqlite is not a readable index: .*{why}"
    ) as told:
        Index(tmp_path).shared_with(BOB, "r1")
    assert path.read_bytes() == before
    assert "move it out of QUANT_INSPECTOR_DATA together with its -wal and -shm" in told.value.hint
    for file in tmp_path.iterdir():
        file.rename(tmp_path.parent / f"{tmp_path.name}-{file.name}")
    index = Index(tmp_path)
    index.share("r1", "p1", ADA, "bob@example.org", False)
    assert index.shared_with(BOB, "r1") is not None
    index.close()


def test_the_index_of_a_later_version_is_refused(index: Index) -> None:
    with sqlite3.connect(index.path) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(ReportError, match=r"has version 2, expected 1") as told:
        Index(index.path.parent)
    assert told.value.hint == "Start the version of Quant Inspector that wrote it."


def test_a_place_that_is_no_folder_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match=r"index\.sqlite cannot be opened: Not a dir") as told:
        Index(tmp_path / "file" / "data")
    assert "QUANT_INSPECTOR_DATA" in told.value.hint


def test_another_program_that_holds_the_file_is_waited_for_and_then_named(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inspector.index._BUSY_SECONDS", 0.2)
    index.close()
    with sqlite3.connect(index.path, isolation_level=None) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(ReportError, match="is in use by another program"):
            index.saw(ADA, "ada@example.org")
        assert index.users() == ()  # who only reads does not wait
        holder.execute("COMMIT")
    holder.close()
    index.saw(ADA, "ada@example.org")


_FILL = """
    import sys
    from pathlib import Path
    from inspector.errors import ReportError
    from inspector.index import Index

    data = Path(sys.argv[1])
    index = Index(data)
    kept = 0
    try:
        for kept in range(10_000):
            index.share(f"r{kept}", "p1", "k" * 32, "bob@example.org" + "x" * 200, False)
    except ReportError as error:
        print(error.message, "|", error.hint)
    assert kept > 20, kept
    (data / "ballast").unlink()
    assert len(index.shares_of_pair("p1")) == kept
    index.share("after", "p1", "k" * 32, "", False)
    assert len(index.shares_of_pair("p1")) == kept + 1
    print("went on")
"""


def test_a_full_disk_is_told_and_nothing_before_it_is_lost(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1" && head -c 300000 /dev/zero > "$1/ballast" && '
    run = 'exec "$2" -c "$3" "$1"'
    words = ["unshare", "-rm", "sh", "-c", mount + run, "sh"]
    done = subprocess.run(
        [*words, str(tmp_path), sys.executable, textwrap.dedent(_FILL)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if done.returncode and "unshare" in done.stderr:
        pytest.skip(f"no private mounts here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("index.sqlite cannot be written: database or disk is full | Free")
    assert done.stdout.endswith("went on\n")
