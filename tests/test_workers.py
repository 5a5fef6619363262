"""The workers of a server: kept for their workspace, ended when idle, never while they work."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from inspector.errors import ReportError, RunError
from inspector.jobs import Worker
from inspector.web.workers import FRESH_SECONDS, Workers
from tests import job_samples
from tests.samples import Clock

ADA, BOB = Path("/data/ada"), Path("/data/bob")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def workers(clock: Clock) -> Iterator[Workers]:
    found = Workers(lambda _: Worker(), clock)
    yield found
    found.close()


def working(worker: Worker, number: int = 1) -> Worker:
    """The worker, once its process has done something."""
    assert worker.result(worker.submit(job_samples.add, number, 1), 60) == number + 1
    assert worker.is_alive
    return worker


def test_a_workspace_keeps_its_worker_and_shares_it_with_nobody(workers: Workers) -> None:
    mine = workers.get(ADA, "main")
    assert workers.get(ADA, "main") is mine
    assert workers.get(ADA, "live") is not mine
    assert workers.get(BOB, "main") is not mine
    assert not mine.is_alive, "its process starts with its first job"


def test_a_worker_that_was_idle_too_long_is_ended_and_made_anew(
    workers: Workers, clock: Clock
) -> None:
    old = working(workers.get(ADA, "main"))
    clock.now = 99.0
    assert workers.tidy(idle_seconds=100.0, most=9) == 0
    clock.now = 100.0
    assert workers.tidy(idle_seconds=100.0, most=9) == 1
    assert not old.is_alive
    assert working(workers.get(ADA, "main")) is not old


def test_asking_for_a_worker_is_a_use(workers: Workers, clock: Clock) -> None:
    mine = workers.get(ADA, "main")
    clock.now = 99.0
    workers.get(ADA, "main")
    clock.now = 150.0
    assert workers.tidy(idle_seconds=100.0, most=9) == 0
    assert workers.get(ADA, "main") is mine


def test_a_worker_with_an_unfinished_job_is_never_ended(
    workers: Workers, clock: Clock, tmp_path: Path
) -> None:
    worker = workers.get(ADA, "main")
    job = worker.submit(job_samples.step_until_cancelled, tmp_path / "begun")
    clock.now = 1e6
    assert workers.tidy(idle_seconds=1.0, most=1) == 0
    assert worker.status(job).state in ("queued", "running")
    worker.cancel(job)
    worker.wait(job, 60)
    clock.now = 2e6
    assert workers.tidy(idle_seconds=1.0, most=1) == 1


def test_of_too_many_workers_the_least_used_are_ended(workers: Workers, clock: Clock) -> None:
    alive = []
    for number in range(3):
        clock.now = float(number)
        alive.append(working(workers.get(ADA, f"role {number}"), number))
    clock.now = 2.0 + FRESH_SECONDS - 0.1
    assert workers.tidy(idle_seconds=1e6, most=1) == 2
    assert [each.is_alive for each in alive] == [False, False, True]


def test_workers_without_a_process_do_not_count(workers: Workers, clock: Clock) -> None:
    for number in range(20):
        workers.get(ADA, f"role {number}")
    clock.now = 50.0
    assert workers.tidy(idle_seconds=100.0, most=1) == 0


def test_one_that_was_asked_for_just_now_is_left_to_its_asker(
    workers: Workers, clock: Clock
) -> None:
    worker = working(workers.get(ADA, "main"))
    working(workers.get(BOB, "main"))
    clock.now = FRESH_SECONDS / 2
    assert workers.tidy(idle_seconds=1.0, most=1) == 0
    assert worker.is_alive


def test_one_whose_job_a_page_has_just_looked_at_is_left_for_its_answer(
    workers: Workers, clock: Clock
) -> None:
    worker = workers.get(ADA, "main")
    job = worker.submit(job_samples.add, 1, 2)
    worker.wait(job, 60)
    working(workers.get(BOB, "main"))
    clock.now = 2 * FRESH_SECONDS
    assert workers.holder(ADA, job) is worker
    assert workers.tidy(idle_seconds=1.0, most=1) == 1
    assert worker.is_alive


# ── jobs that count ──────────────────────────────────────────────────────────────────────────


def counted(
    workers: Workers, file: Path, *, root: Path = ADA, role: str = "main", most: int = 2
) -> str:
    """The id of a job that goes on until it is stopped."""
    return workers.submit(
        root,
        role,
        job_samples.step_until_cancelled,
        file,
        most=most,
        title="searching",
        on_begin=lambda _: None,
        on_end=lambda _: None,
    )


def test_a_workspace_has_so_many_unfinished_jobs_and_no_more_over_all_roles(
    workers: Workers, tmp_path: Path
) -> None:
    first = counted(workers, tmp_path / "1")
    second = counted(workers, tmp_path / "2", role="other")
    with pytest.raises(RunError) as caught:
        counted(workers, tmp_path / "3", role="third")
    assert "searching is not started: 2 of your jobs have not ended" in caught.value.message
    assert "2 may be under way at once" in caught.value.message
    assert caught.value.hint.startswith("Press Stop beside a job at the left")
    assert [job.id for job in workers.unfinished(ADA)] == [first, second]

    worker = workers.holder(ADA, second)
    assert worker is not None
    worker.cancel(second)  # as the hint says
    worker.wait(second, 60)
    third = counted(workers, tmp_path / "3")
    assert [job.id for job in workers.unfinished(ADA)] == [first, third]


def test_how_a_job_ended_outlives_its_worker(workers: Workers, clock: Clock) -> None:
    ends = []
    job = workers.submit(
        ADA, "main", job_samples.add, 1, 2, most=2, title="adding",
        on_begin=lambda _: None, on_end=ends.append,
    )  # fmt: skip
    workers.get(ADA, "main").wait(job, 60)
    clock.now = 1e6
    assert workers.tidy(idle_seconds=1.0, most=1) == 1
    assert workers.holder(ADA, job) is None
    (end,) = ends
    assert workers.ended(job) == end
    assert end.result == 3
    assert workers.ended("another") is None


def test_the_refusal_tells_running_jobs_from_waiting_ones(workers: Workers, tmp_path: Path) -> None:
    running = counted(workers, tmp_path / "1")
    counted(workers, tmp_path / "2")
    worker = workers.get(ADA, "main")
    while worker.status(running).state != "running":
        time.sleep(0.01)
    with pytest.raises(RunError, match=r"\(1 running, 1 waiting\)"):
        counted(workers, tmp_path / "3")


def test_neither_questions_nor_jobs_of_others_count(workers: Workers, tmp_path: Path) -> None:
    workers.get(ADA, "main").submit(job_samples.step_until_cancelled, tmp_path / "question")
    counted(workers, tmp_path / "1", root=BOB, most=1)
    counted(workers, tmp_path / "2", root=ADA, most=1)
    with pytest.raises(RunError, match="1 of your jobs"):
        counted(workers, tmp_path / "3", root=ADA, most=1)


def test_of_many_at_once_no_more_are_taken_than_may_be(workers: Workers, tmp_path: Path) -> None:
    taken: list[str] = []

    def submit(number: int) -> None:
        with contextlib.suppress(RunError):
            taken.append(counted(workers, tmp_path / str(number), role=str(number), most=3))

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 3


def test_a_job_that_cannot_be_remembered_is_not_started(workers: Workers, tmp_path: Path) -> None:
    def refuse(_: str) -> None:
        raise ReportError("the disk is full", hint="Free some space.")

    with pytest.raises(ReportError, match="the disk is full"):
        workers.submit(
            ADA,
            "main",
            job_samples.append_line,
            tmp_path / "log",
            "ran",
            most=9,
            title="writing",
            on_begin=refuse,
            on_end=lambda _: None,
        )
    assert workers.unfinished(ADA) == ()
    working(workers.get(ADA, "main"))
    assert not (tmp_path / "log").exists()


def test_a_job_is_found_in_the_workspace_it_belongs_to_and_in_no_other(
    workers: Workers, tmp_path: Path
) -> None:
    job = counted(workers, tmp_path / "1", role="other")
    assert workers.holder(ADA, job) is workers.get(ADA, "other")
    assert workers.holder(BOB, job) is None
    assert workers.holder(ADA, "no such job") is None


# ── the keeper ───────────────────────────────────────────────────────────────────────────────


def test_the_keeper_tidies_by_itself_until_all_are_closed() -> None:
    workers = Workers(lambda _: Worker())
    mine = workers.get(ADA, "main")
    workers.keep_tidy(idle_seconds=0.0, most=9, every_seconds=0.05)
    workers.keep_tidy(idle_seconds=0.0, most=9, every_seconds=0.05)
    names = [each.name for each in threading.enumerate()]
    assert names.count("workers keeper") == 1
    workers.close()
    assert "workers keeper" not in [each.name for each in threading.enumerate()]
    assert workers.get(ADA, "main") is not mine
    workers.close()


def test_a_job_does_not_see_the_secrets_of_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QUANT_INSPECTOR_PROXY_SECRET", "told-to-nobody-at-all")
    monkeypatch.setenv("STREAMLIT_SERVER_COOKIE_SECRET", "told-to-nobody-at-all")
    with Worker() as worker:
        seen = worker.result(worker.submit(job_samples.variables), 60)
    assert "PATH" in seen
    assert not [name for name in seen if "SECRET" in name]
