from __future__ import annotations

import functools
import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inspector import jobs
from inspector.confinement import Confinement
from inspector.errors import Cancelled, FeedError, RunError
from inspector.jobs import KEPT_JOBS, JobStatus, Worker
from tests import job_samples

SECONDS = 20.0  # far more than anything here takes


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


@pytest.fixture(scope="module")
def shared() -> Iterator[Worker]:
    """For tests that leave the process as they found it."""
    with Worker() as worker:
        yield worker


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return value


def written(file: Path) -> int:
    """The number in a file, once it is there."""
    until(lambda: file.exists() and file.read_text())
    return int(file.read_text())


def is_alive(process_id: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def run_script(tmp_path: Path, text: str) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(text)
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_job_runs_in_another_process_and_gives_its_result(shared: Worker) -> None:
    job = shared.submit(job_samples.add, "float", right="32", title="adding")
    assert shared.result(job, SECONDS) == "float32"
    status = shared.status(job)
    assert (status.title, status.state, status.fraction) == ("adding", "done", 1.0)
    assert status.error is None
    assert status.remaining_seconds is None
    assert shared.result(shared.submit(job_samples.process_id), SECONDS) != os.getpid()


def test_jobs_share_one_process_and_run_in_order_of_submission(
    shared: Worker, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    before = shared.result(shared.submit(job_samples.process_id), SECONDS)
    submitted = [shared.submit(job_samples.append_line, log, str(index)) for index in range(20)]
    for job in submitted:
        shared.result(job, SECONDS)
    assert log.read_text().split() == [str(index) for index in range(20)]
    assert shared.result(shared.submit(job_samples.process_id), SECONDS) == before
    listed = [status.id for status in shared.jobs()]
    assert [job for job in listed if job in submitted] == submitted


def test_large_arguments_and_results_pass(shared: Worker) -> None:
    block = os.urandom(8 << 20)
    assert shared.result(shared.submit(job_samples.add, block, b"end"), SECONDS) == block + b"end"


def test_a_result_that_was_taken_is_not_kept(shared: Worker, tmp_path: Path) -> None:
    job = shared.submit(job_samples.add, b"large", b" result")
    taken = shared.take(job, SECONDS)
    assert (taken.state, taken.result) == ("done", b"large result")
    assert shared.take(job).result is None
    assert shared.status(job).state == "done", "how it ended is kept"
    going = shared.submit(job_samples.step_until_cancelled, tmp_path / "begun")
    assert shared.take(going).state in ("queued", "running")
    shared.cancel(going)
    assert shared.take(going, SECONDS).state == "cancelled"


def test_an_error_crosses_with_its_class_message_and_hint(shared: Worker) -> None:
    job = shared.submit(job_samples.fail_with_hint)
    with pytest.raises(FeedError, match="images has shape 3x3, expected 1x3") as caught:
        shared.result(job, SECONDS)
    assert caught.value.hint == "Add the batch axis."
    assert shared.status(job).state == "failed"
    assert isinstance(shared.status(job).error, FeedError)


def test_an_error_of_a_private_class_keeps_its_message_and_hint(shared: Worker) -> None:
    with pytest.raises(RunError, match="a private trouble") as caught:
        shared.result(shared.submit(job_samples.fail_privately), SECONDS)
    assert caught.value.hint == "Do the private thing."


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (job_samples.fail_unexpectedly, "KeyError: 'conv_1'"),
        (job_samples.fail_unpicklably, "UnpicklableError"),
        (job_samples.return_a_lock, "TypeError: cannot pickle"),
        (job_samples.return_poison, "a result that cannot be read"),
        (job_samples.call_exit, "SystemExit: 3"),
    ],
)
def test_any_other_exception_is_named_and_its_traceback_goes_to_the_log(
    shared: Worker,
    caplog: pytest.LogCaptureFixture,
    function: Callable[..., Any],
    named: str,
) -> None:
    with pytest.raises(RunError, match=r"^reading images stopped on ") as caught:
        shared.result(shared.submit(function, title="reading images"), SECONDS)
    assert named in caught.value.message
    assert "Traceback" not in caught.value.message
    assert "Traceback" in caplog.text
    assert shared.result(shared.submit(job_samples.add, 1, 1), SECONDS) == 2


@pytest.mark.parametrize(
    ("number", "hint"), [(signal.SIGKILL, "fewer samples"), (signal.SIGSEGV, "report the model")]
)
def test_a_dead_process_fails_its_job_and_the_others_go_on(
    worker: Worker, number: int, hint: str
) -> None:
    before = worker.result(worker.submit(job_samples.process_id), SECONDS)
    dying = worker.submit(job_samples.die, int(number), title="calibrating digits")
    after = worker.submit(job_samples.process_id)
    with pytest.raises(RunError) as caught:
        worker.result(dying, SECONDS)
    expected = f"the worker process ended (signal {int(number)}) while calibrating digits"
    assert caught.value.message == expected
    assert hint in caught.value.hint
    assert worker.result(after, SECONDS) != before


def test_a_process_killed_from_outside_is_replaced(worker: Worker, tmp_path: Path) -> None:
    job = worker.submit(job_samples.touch_and_sleep, tmp_path / "begun", 60.0)
    first = written(tmp_path / "begun")
    os.kill(first, signal.SIGKILL)
    with pytest.raises(RunError, match="signal 9"):
        worker.result(job, SECONDS)
    second = worker.result(worker.submit(job_samples.process_id), SECONDS)
    assert second != first
    for _ in range(5):  # idle now, and the next job may be handed to what is about to end
        os.kill(second, signal.SIGKILL)
        third = worker.result(worker.submit(job_samples.process_id), SECONDS)
        assert third != second
        second = third


def test_a_process_that_cannot_start_fails_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ends_on_import.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with Worker(preload=("ends_on_import",)) as worker:
        for _ in range(2):
            job = worker.submit(job_samples.process_id, title="loading digits")
            with pytest.raises(RunError, match=r"ended \(exit code 7\) while loading digits"):
                worker.result(job, SECONDS)


def test_a_job_that_reports_progress_stops_when_asked_and_the_process_stays(
    worker: Worker, tmp_path: Path
) -> None:
    before = worker.result(worker.submit(job_samples.process_id), SECONDS)
    job = worker.submit(job_samples.step_until_cancelled, tmp_path / "begun")
    until((tmp_path / "begun").exists)
    worker.cancel(job)
    assert worker.wait(job, 1.5).state == "cancelled"
    with pytest.raises(Cancelled):
        worker.result(job)
    assert worker.result(worker.submit(job_samples.process_id), SECONDS) == before


def test_a_stuck_job_is_stopped_by_force_and_queued_jobs_go_on(
    worker: Worker, tmp_path: Path
) -> None:
    stuck = worker.submit(job_samples.touch_and_sleep, tmp_path / "begun", 60.0)
    after = worker.submit(job_samples.process_id)
    first = written(tmp_path / "begun")
    began = time.monotonic()
    worker.cancel(stuck)
    worker.cancel(stuck)  # twice is as good as once
    assert worker.wait(stuck, SECONDS).state == "cancelled"
    assert 1.5 < time.monotonic() - began < 4
    assert worker.status(stuck).error is None
    assert worker.result(after, SECONDS) != first
    until(lambda: not is_alive(first))


def test_a_job_that_ends_while_it_is_being_killed_does_not_harm_the_next(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "CANCEL_SECONDS", 0.05)
    for index in range(12):
        file = tmp_path / str(index)
        ending = worker.submit(job_samples.touch_and_sleep, file, 0.047 + 0.0005 * index)
        following = worker.submit(job_samples.add, 1, 1)
        written(file)
        worker.cancel(ending)
        assert worker.result(following, SECONDS) == 2
        assert worker.status(ending).state in ("done", "cancelled")


def test_a_queued_job_that_is_cancelled_never_runs(worker: Worker, tmp_path: Path) -> None:
    running = worker.submit(job_samples.touch_and_sleep, tmp_path / "begun", 0.3)
    waiting = worker.submit(job_samples.append_line, tmp_path / "log", "never")
    assert worker.status(waiting).state == "queued"
    assert worker.status(waiting).seconds == 0
    worker.cancel(waiting)
    assert worker.status(waiting).state == "cancelled"
    worker.result(running, SECONDS)
    assert worker.result(worker.submit(job_samples.add, 1, 1), SECONDS) == 2
    assert not (tmp_path / "log").exists()


def test_cancelling_a_finished_job_changes_nothing(shared: Worker) -> None:
    job = shared.submit(job_samples.add, 1, 1)
    shared.result(job, SECONDS)
    shared.cancel(job)
    assert shared.status(job).state == "done"


def test_waiting_ends_when_the_time_is_over(worker: Worker, tmp_path: Path) -> None:
    job = worker.submit(job_samples.touch_and_sleep, tmp_path / "begun", 60.0)
    written(tmp_path / "begun")
    assert worker.wait(job, 0.05).state == "running"
    with pytest.raises(TimeoutError, match="touch and sleep has not ended"):
        worker.result(job, 0.05)


def test_progress_is_thinned_and_its_last_report_arrives(shared: Worker) -> None:
    stream = io.BytesIO()
    answers = jobs._Answers(stream)
    began = time.monotonic()
    while time.monotonic() - began < 0.5:
        answers.progress("a", 0.5, str(last := time.monotonic()))
    answers.send(("done", "a", b""))
    stream.seek(0)
    said = []
    while stream.tell() < len(stream.getvalue()):
        said.append(pickle.load(stream))
    assert said[-1] == ("done", "a", b"")
    assert said[-2] == ("progress", "a", (0.5, str(last)))
    assert 3 <= len(said) <= 13

    job = shared.submit(job_samples.report_often, 10_000)
    shared.result(job, SECONDS)
    assert shared.status(job).message == "step 9999"


def test_the_remaining_time_follows_from_the_finished_share(worker: Worker) -> None:
    job = worker.submit(job_samples.report_then_sleep, 0.5, 0.4)
    assert worker.status(job).remaining_seconds is None
    status = until(lambda: (s := worker.status(job)).fraction and s)
    assert status.message == "half way"
    assert 0 < status.remaining_seconds <= status.seconds
    later = until(lambda: (s := worker.status(job)).seconds > status.seconds + 0.1 and s)
    assert later.remaining_seconds < status.remaining_seconds


def test_a_share_below_a_twentieth_gives_no_estimate(worker: Worker) -> None:
    job = worker.submit(job_samples.report_then_sleep, 0.01, 0.0)
    status = until(lambda: (s := worker.status(job)).fraction and s)
    assert status.remaining_seconds is None


def test_what_a_job_prints_does_not_reach_the_pipe(shared: Worker) -> None:
    assert shared.result(shared.submit(job_samples.print_and_read), SECONDS) == ""
    assert shared.result(shared.submit(job_samples.add, 1, 1), SECONDS) == 2


def test_several_threads_submit_wait_and_cancel_at_once(shared: Worker, tmp_path: Path) -> None:
    got: dict[tuple[int, int], int] = {}
    cancelled = []
    # A round of 16 jobs at a time: a worker remembers the last 40, and a thread may be late.
    rounds = threading.Barrier(8)

    def use(thread: int) -> None:
        for index in range(10):
            job = shared.submit(job_samples.add, thread * 100, index)
            dropped = shared.submit(job_samples.step_until_cancelled, tmp_path / "begun")
            shared.cancel(dropped)
            got[thread, index] = shared.result(job, SECONDS)
            cancelled.append(shared.wait(dropped, SECONDS).state)
            assert shared.jobs()
            rounds.wait(SECONDS)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {(t, i): t * 100 + i for t in range(8) for i in range(10)}
    assert cancelled == ["cancelled"] * 80


def test_a_job_goes_on_when_the_thread_that_submitted_it_ends(
    worker: Worker, tmp_path: Path
) -> None:
    submitted: list[str] = []

    def submit() -> None:
        submitted.append(worker.submit(job_samples.touch_and_sleep, tmp_path / "begun", 0.3))
        written(tmp_path / "begun")

    thread = threading.Thread(target=submit)
    thread.start()
    thread.join()
    assert worker.result(submitted[0], SECONDS) == written(tmp_path / "begun")


def test_the_last_finished_jobs_are_kept_and_older_ones_are_forgotten(worker: Worker) -> None:
    submitted = [worker.submit(job_samples.add, index, 0) for index in range(KEPT_JOBS + 5)]
    worker.result(submitted[-1], SECONDS)
    assert len(worker.jobs()) == KEPT_JOBS
    assert worker.result(submitted[5], SECONDS) == 5
    with pytest.raises(RunError, match="there is no job") as caught:
        worker.status(submitted[4])
    assert caught.value.hint == "Start the job again."


def test_a_function_that_another_process_cannot_find_is_refused(worker: Worker) -> None:
    partial = functools.partial(job_samples.add, 1)
    for function in (lambda *, progress: 1, "text".upper, partial, job_samples.Poison().__reduce__):
        with pytest.raises(ValueError, match="not a function of an importable module"):
            worker.submit(function)
    assert worker.jobs() == ()


def test_arguments_that_do_not_pickle_are_refused_where_they_are_given(worker: Worker) -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        worker.submit(job_samples.add, threading.Lock(), 1)
    assert worker.jobs() == ()


def test_closing_ends_the_process_at_once_and_cancels_what_is_left(tmp_path: Path) -> None:
    worker = Worker()
    running = worker.submit(job_samples.touch_and_sleep, tmp_path / "begun", 60.0)
    waiting = worker.submit(job_samples.process_id)
    process = written(tmp_path / "begun")
    began = time.monotonic()
    worker.close()
    worker.close()
    assert time.monotonic() - began < 1
    assert not is_alive(process)
    assert [worker.status(job).state for job in (running, waiting)] == ["cancelled"] * 2
    with pytest.raises(RuntimeError, match="the worker is closed"):
        worker.submit(job_samples.process_id)


def test_a_worker_that_was_never_used_starts_no_process() -> None:
    before = threading.active_count()
    with Worker():
        assert threading.active_count() <= before


def test_modules_are_imported_and_niceness_is_set_before_the_first_job() -> None:
    with Worker(niceness=3, preload=("colorsys", "no_such_module")) as worker:
        worker.start()
        assert "colorsys" in worker.result(worker.submit(job_samples.loaded_modules), SECONDS)
        nice = worker.result(worker.submit(job_samples.niceness), SECONDS)
        assert nice == min(19, os.nice(0) + 3)


# ── limits ───────────────────────────────────────────────────────────────────────────────────

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux")
LIMIT = 400_000_000


@pytest.fixture(scope="module")
def limited() -> Iterator[Worker]:
    with Worker(memory_bytes=LIMIT) as worker:
        yield worker


def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


@on_linux
@pytest.mark.parametrize("hungry", [job_samples.allocate, job_samples.expand])
def test_a_job_that_needs_too_much_memory_fails_with_the_limit_in_its_error(
    limited: Worker, hungry: Callable[..., Any]
) -> None:
    job = limited.submit(hungry, 2 * LIMIT, title="calibrating digits")
    with pytest.raises(RunError) as caught:
        limited.result(job, SECONDS)
    expected = "calibrating digits needed more than 0.4 GB of memory, the most that a job may use"
    assert caught.value.message == f"{expected} here"
    assert caught.value.hint == "Use fewer or smaller samples, or a smaller model."
    assert limited.result(limited.submit(hungry, 1 << 20), SECONDS) in (1 << 20, None)


@on_linux
def test_what_earlier_jobs_left_behind_does_not_count_against_the_next() -> None:
    with Worker(memory_bytes=LIMIT) as worker:
        first = worker.result(worker.submit(job_samples.keep, LIMIT // 4), SECONDS)
        assert worker.result(worker.submit(job_samples.keep, LIMIT // 2), SECONDS) == first
        needing = worker.submit(job_samples.keep, LIMIT // 2, title="too much for both")
        assert worker.result(needing, SECONDS) != first


@on_linux
def test_the_memory_of_what_a_job_starts_counts_as_well(limited: Worker) -> None:
    job = limited.submit(job_samples.spread, LIMIT // 4, 6, title="starting helpers")
    with pytest.raises(RunError, match=r"helpers needed more than 0\.4 GB of memory"):
        limited.result(job, SECONDS)


def test_a_job_that_takes_too_long_is_asked_to_stop_and_its_error_names_the_limit(
    tmp_path: Path,
) -> None:
    with Worker(seconds=0.8) as worker:
        before = worker.result(worker.submit(job_samples.process_id), SECONDS)
        job = worker.submit(job_samples.step_until_cancelled, tmp_path / "begun", title="searching")
        with pytest.raises(RunError) as caught:
            worker.result(job, SECONDS)
        assert caught.value.message == (
            "searching was stopped after 0.8 seconds, the longest that a job may take here"
        )
        assert caught.value.hint == "Use fewer samples or a smaller model."
        assert worker.status(job).state == "failed"
        assert worker.result(worker.submit(job_samples.process_id), SECONDS) == before


def test_a_job_that_does_not_listen_is_ended_by_force_when_it_takes_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "CANCEL_SECONDS", 0.1)
    with Worker(seconds=1.0) as worker:
        job = worker.submit(job_samples.touch_and_sleep, tmp_path / "begun", 60.0)
        process = written(tmp_path / "begun")
        with pytest.raises(RunError, match=r"was stopped after 1 seconds"):
            worker.result(job, SECONDS)
        assert not is_alive(process)


def test_the_time_of_a_job_does_not_run_while_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "CANCEL_SECONDS", 0.05)
    with Worker(seconds=1.5) as worker:
        sleeps = [
            worker.submit(job_samples.touch_and_sleep, tmp_path / str(at), 0.4) for at in range(5)
        ]
        assert [worker.wait(job, SECONDS).state for job in sleeps] == ["done"] * 5


def test_a_job_opens_no_connection_without_the_network() -> None:
    with Worker(network=False) as worker, listening() as server:
        job = worker.submit(job_samples.connect, server.getsockname())
        status = worker.wait(job, SECONDS)
        assert worker.confinement is not None
        if worker.confinement.network:
            pytest.skip("this system does not let a process give up the network")
        assert status.error is not None
        assert "PermissionError" in status.error.message


def test_a_job_opens_a_connection_where_it_may() -> None:
    with Worker() as worker, listening() as server:
        assert worker.confinement is None, "nothing is known before there is a process"
        assert (
            worker.result(worker.submit(job_samples.connect, server.getsockname()), SECONDS) is None
        )
        assert worker.confinement == Confinement(memory_bytes=None, network=True)


@on_linux
def test_no_job_gets_more_rights_or_leaves_its_memory_on_the_disk(shared: Worker) -> None:
    found = shared.result(shared.submit(job_samples.limits), SECONDS)
    assert found == {"core": (0, 0), "rights": "1"}


@on_linux
@pytest.mark.parametrize("start", [job_samples.start, job_samples.start_hidden])
def test_what_a_job_has_started_ends_with_the_job(
    shared: Worker, start: Callable[..., int]
) -> None:
    child = shared.result(shared.submit(start), SECONDS)
    until(lambda: not is_alive(child))


@on_linux
def test_what_a_job_has_started_ends_with_a_worker_that_is_killed(
    worker: Worker, tmp_path: Path
) -> None:
    worker.submit(job_samples.start_and_sleep, tmp_path / "child")
    child = written(tmp_path / "child")
    assert is_alive(child)
    worker.close()
    until(lambda: not is_alive(child))


@on_linux
def test_what_a_job_starts_cannot_leave_what_is_ended_with_it(shared: Worker) -> None:
    with pytest.raises(RunError, match="PermissionError"):
        shared.result(shared.submit(job_samples.leave_the_group), SECONDS)


# ── what is told of a job ────────────────────────────────────────────────────────────────────


def test_a_waiting_job_knows_how_many_are_before_it(worker: Worker, tmp_path: Path) -> None:
    running = worker.submit(job_samples.touch_and_sleep, tmp_path / "begun", 60.0)
    waiting = [worker.submit(job_samples.process_id) for _ in range(3)]
    written(tmp_path / "begun")
    assert worker.status(running).ahead == 0
    assert [worker.status(job).ahead for job in waiting] == [1, 2, 3]
    worker.cancel(waiting[0])
    assert [worker.status(job).ahead for job in waiting] == [0, 1, 2]


def test_each_end_is_told_once_and_none_that_closing_brings(tmp_path: Path) -> None:
    ends: list[tuple[str, str]] = []

    def on_end(status: JobStatus) -> None:
        worker.jobs()  # which waits for what the worker holds while it looks
        ends.append((status.title, status.state))
        if status.title == "fails":
            raise RuntimeError("the worker goes on")

    worker = Worker()
    submit = functools.partial(worker.submit, on_end=on_end)
    submit(job_samples.fail_with_hint, title="fails")
    submit(job_samples.add, 1, 1, title="adds")
    submit(job_samples.die, int(signal.SIGKILL), title="dies")
    submit(job_samples.touch_and_sleep, tmp_path / "begun", 60.0, title="sleeps")
    worker.cancel(submit(job_samples.add, 1, 1, title="waits"))
    submit(job_samples.add, 1, 1, title="waits on")
    written(tmp_path / "begun")
    until(lambda: len(ends) == 4)
    worker.close()
    assert sorted(ends) == [
        ("adds", "done"),
        ("dies", "failed"),
        ("fails", "failed"),
        ("waits", "cancelled"),
    ]


PARENT = """
import sys, time
from pathlib import Path
from inspector.jobs import Worker
from tests import job_samples
folder = Path(sys.argv[0]).parent
with (folder / "runs").open("a") as file:
    file.write("once\\n")
worker = Worker()
job = worker.submit(job_samples.touch_and_sleep, folder / "begun", 60.0)
while not (folder / "begun").exists() or not (folder / "begun").read_text():
    time.sleep(0.01)
"""


def test_the_process_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    with run_script(tmp_path, PARENT + "time.sleep(60)\n") as parent:
        child = written(tmp_path / "begun")
        assert is_alive(child)
        parent.kill()
    until(lambda: not is_alive(child))


def test_the_process_ends_with_its_pipe_where_the_kernel_sends_no_signal(tmp_path: Path) -> None:
    """As on systems other than Linux."""
    command = "import inspector.jobs as j; j.die_with_parent = lambda: None; j._serve()"
    options = {"niceness": 0, "preload": [], "memory_bytes": None, "network": True}
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-c", command, json.dumps(options)],
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
    )
    assert process.stdin is not None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.stdin.close()
    assert process.wait(SECONDS) == 0


def test_a_program_that_ends_does_not_wait_for_its_jobs(tmp_path: Path) -> None:
    with run_script(tmp_path, PARENT) as parent:
        assert parent.wait(SECONDS) == 0
    assert not is_alive(written(tmp_path / "begun"))


def test_the_main_script_of_the_parent_is_not_run_again(tmp_path: Path) -> None:
    text = PARENT.replace("60.0", "0.0") + (
        "print(worker.result(worker.submit(job_samples.main_file), 20))\n"
    )
    with run_script(tmp_path, text) as parent:
        output, _ = parent.communicate(timeout=SECONDS)
    assert output == "None\n"
    assert (tmp_path / "runs").read_text() == "once\n"


def test_importing_the_module_loads_neither_onnx_nor_streamlit() -> None:
    code = (
        "import sys, inspector.jobs, inspector.store\n"
        "print([m for m in ('onnx', 'onnxruntime', 'numpy', 'streamlit', 'plotly') "
        "if m in sys.modules])"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output == "[]\n"
