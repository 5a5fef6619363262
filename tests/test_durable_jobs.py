"""Jobs end by themselves or are ended, and the workspace and their owner know what is left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from inspector import workbench
from inspector.errors import RunError
from inspector.hosting import user_key
from inspector.index import Index, JobRecord
from inspector.jobs import Worker
from inspector.store import FeedSource, Workspace
from inspector.web import tasks
from tests import job_samples
from tests.hosted import ADA, BOB, Portal, fill, header_portal, workspace_of
from tests.samples import array, floats, model, save
from tests.stream import Visitor

SECONDS = 300.0
DEPTH = 10


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


# ── what stays of a job that was killed ──────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(preload=("inspector.workbench",)) as worker:
        yield worker


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a workspace with a pair of many nodes; its run 1 has a recipe."""
    folder = tmp_path_factory.mktemp("chain")
    names = ["x", *(f"h{at}" for at in range(DEPTH - 1)), "y"]
    weights = [array(f"w{at}", floats((16, 16), at, 0.3)) for at in range(DEPTH)]
    nodes = [
        helper.make_node("Gemm", [names[at], f"w{at}"], [names[at + 1]], f"gemm_{at}", transB=1)
        for at in range(DEPTH)
    ]
    save(model(nodes, [("x", [1, 16])], [("y", [1, 16])], weights), folder / "chain.onnx")
    np.savez(folder / "feeds.npz", x=floats((6, 16), 99)[:, None])
    root = folder / "workspace"
    workspace = Workspace(root)
    feeds = workspace.add_feeds({"feeds.npz": folder / "feeds.npz"}) / "feeds.npz"
    workbench.load_pair(
        root,
        float_path=workspace.add_model(folder / "chain.onnx", "chain.onnx").path,
        quantized_path=None,
        inputs=FeedSource(kind="stored", path=str(feeds), title="feeds"),
    )
    return root


@pytest.fixture
def root(chain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chain, tmp_path / "workspace"))


def the_run(root: Path) -> Any:
    workspace = Workspace(root)
    pair = workspace.current_pair()
    assert pair is not None
    (run,) = workspace.runs(pair)
    return run


def killed(worker: Worker, task: str, *args: Any, **kwargs: Any) -> None:
    job = worker.submit(job_samples.die_half_way, task, *args, title="half of it", **kwargs)
    with pytest.raises(RunError, match=r"ended \(signal 9\) while half of it"):
        worker.result(job, SECONDS)


def trials(root: Path) -> list[str]:
    """The lines in which trials are kept."""
    return [line for file in root.rglob("trials.jsonl") for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("measure_run", {}),
        ("search_list", {"config": "own", "metric": "output_sqnr_db", "value": 200.0}),
    ],
)
def test_trials_of_a_killed_search_or_measurement_are_kept_and_not_run_again(
    worker: Worker, root: Path, task: str, more: dict[str, Any]
) -> None:
    run = the_run(root)
    given = {**more, "config": run.recipe} if more else {}
    killed(worker, task, root, run_id=run.id, least=5, **given)
    before = trials(root)
    assert len(before) >= 5
    worker.result(worker.submit(getattr(tasks, task), root, run_id=run.id, **given), SECONDS)
    after = trials(root)
    assert after[: len(before)] == before
    assert len(after) > len(before)
    ran = [
        (json.dumps(line["request"]), sample)
        for line in map(json.loads, after)
        for sample in line.get("sums", ())
    ]
    assert len(set(ran)) == len(ran) > 0


@pytest.mark.slow
def test_recipes_that_were_tried_before_the_kill_are_kept_and_not_tried_again(
    worker: Worker, root: Path
) -> None:
    run = the_run(root)
    killed(worker, "try_recipes", root, run_id=run.id)
    table = Workspace(root).recipes(run.pair_id)["rows"]
    tried = [row["label"] for row in table if row["state"] == "done"]
    waiting = sum(row["state"] == "waiting" for row in table)
    assert len(tried) > 2
    assert waiting > 2
    job = worker.submit(job_samples.tell, "try_recipes", root, run_id=run.id)
    said = worker.result(job, SECONDS)
    assert any(f"of {waiting}:" in message for message in said)
    again = Workspace(root).recipes(run.pair_id)["rows"]
    assert len(again) == len(table)
    assert not any(row["state"] == "waiting" for row in again)


def test_a_killed_quantization_leaves_the_runs_and_the_ticked_nodes_as_they_were(
    worker: Worker, root: Path
) -> None:
    run = the_run(root)
    workspace = Workspace(root)
    workspace.save_draft(run.pair_id, {"nodes": ["gemm_1"], "undo": [], "redo": []})
    given = {"run_id": run.id, "config": run.recipe, "exclude": ["gemm_1"]}
    killed(worker, "requantize", root, **given)
    assert the_run(root) == run
    assert Workspace(root).draft(run.pair_id)["nodes"] == ["gemm_1"]
    assert Workspace(root).unreadable() == ()
    made = worker.result(worker.submit(tasks.requantize, root, **given), SECONDS)
    assert [each.id for each in Workspace(root).runs(run.pair_id)] == [run.id, made]


def test_a_killed_load_leaves_no_pair_and_the_files_with_which_it_works_again(
    worker: Worker, root: Path
) -> None:
    run = the_run(root)
    pair = Workspace(root).pair(run.pair_id)
    for kind in ("pairs", "runs"):
        shutil.rmtree(root / kind)
    (root / "current.json").unlink()
    given = {"float_path": pair.float_model.path, "quantized_path": None, "inputs": pair.inputs}
    killed(worker, "load_pair", root, **given)
    assert Workspace(root).pairs() == ()
    assert Workspace(root).current_pair() is None
    made = worker.result(worker.submit(tasks.load_pair, root, **given), SECONDS)
    assert Workspace(root).run(made).number == 1


# ── what their owner is told ─────────────────────────────────────────────────────────────────


def workers_of(portal: Portal) -> list[int]:
    """The processes that the server has started."""
    assert portal.process is not None
    server = portal.process.pid
    listed = Path(f"/proc/{server}/task").glob("*/children")
    return [int(child) for each in listed for child in each.read_text().split()]


def is_alive(process_id: int) -> bool:
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def records(data: Path) -> list[JobRecord]:
    """All jobs of Ada's that the index knows."""
    index = Index(data)
    with contextlib.closing(index), index._reading() as reader:
        rows = reader.execute(
            "SELECT id, user_key, title, keeps, state, why, begun, ended FROM jobs "
            "WHERE user_key = ? ORDER BY begun",
            (user_key(ADA),),
        ).fetchall()
    fields = ("id", "user_key", "title", "keeps", "state", "why", "begun", "ended")
    return [JobRecord(**dict(zip(fields, row, strict=True))) for row in rows]


def state(data: Path) -> str:
    """How Ada's last job is doing, by the index; "" before the first."""
    found = records(data)
    return found[-1].state if found else ""


def visitor(portal: Portal, address: str = ADA) -> Visitor:
    return Visitor(portal.address, **portal.identity(address))


@pytest.fixture
def data(chain: Path, tmp_path: Path) -> Path:
    """The folder of a portal, with the chain in Ada's workspace."""
    shutil.copytree(chain, workspace_of(tmp_path / "data", ADA))
    return tmp_path / "data"


def rows(data: Path) -> list[dict[str, Any]]:
    """The recipes that were tried on Ada's pair."""
    workspace = Workspace(workspace_of(data, ADA))
    found = workspace.recipes(str(workspace.current_pair())).get("rows", [])
    return [row for row in found if row["state"] != "waiting"]


def try_recipes(tab: Visitor) -> None:
    tab.visit("recipes")
    tab.click("try-recipes")


@pytest.mark.slow
def test_a_job_goes_on_when_its_tab_is_closed_and_a_new_tab_sees_it_done(data: Path) -> None:
    with header_portal(data) as portal:
        with visitor(portal) as tab:
            try_recipes(tab)
            assert b"Trying recipes" in tab.visit("overview")
        assert state(data) == "begun"
        with visitor(portal) as tab:
            assert b"Trying recipes" in tab.visit("overview"), "a new tab sees it run"
            until(lambda: state(data) != "begun")
            assert state(data) == "done"
            assert b"Trying recipes" not in tab.visit("overview")
            tab.visit("recipes")
            assert tab.errors == []
    assert len(rows(data)) > 20


@pytest.mark.slow
def test_who_comes_back_to_a_tab_long_after_its_job_finds_the_new_run_opened(data: Path) -> None:
    """A browser asks for a tab in the background once a minute: by then the worker may be gone."""
    idle = {"QUANT_INSPECTOR_WORKER_IDLE_SECONDS": "1"}
    root = workspace_of(data, ADA)
    Workspace(root).save_draft(the_run(root).pair_id, {"nodes": ["gemm_1"]})
    with header_portal(data, environment=idle) as portal, visitor(portal) as tab:
        for page, key in (("exclusions", "requantize"), ("models", "sample-digit-transformer")):
            tab.visit(page)
            tab.finish()
            before = tab.query.get("run")
            tab.click(key)
            assert tab.is_waiting, "its job has ended already: there is nothing to come back to"
            until(lambda: state(data) == "done" and not workers_of(portal))
            tab.finish()
            assert tab.query.get("run") != before, page
        assert tab.errors == []


@pytest.mark.slow
def test_what_the_end_of_the_server_stopped_is_told_once_and_goes_on_when_asked(
    data: Path,
) -> None:
    fill(data, BOB)
    with header_portal(data) as portal:
        assert portal.process is not None
        with visitor(portal) as tab:
            try_recipes(tab)
            until(lambda: len(rows(data)) > 3)
            started = workers_of(portal)
            assert started
            portal.process.kill()
            portal.process.wait()
        until(lambda: not any(map(is_alive, started)))
    assert state(data) == "begun", "nobody was there to say more"
    kept = len(rows(data))
    with header_portal(data) as portal:
        assert state(data) == "stopped"
        with visitor(portal, BOB) as tab:
            assert b"The server was restarted" not in tab.visit("overview")
        with visitor(portal) as tab:
            page = tab.visit("overview")
            assert b"The server was restarted and has stopped 1 job" in page
            assert b"Trying recipes. Every recipe that was tried is kept" in page
            assert b"Open recipes" in page
            assert b"The server was restarted" in tab.visit("recipes"), "until it is dismissed"
            assert b"The server was restarted" not in tab.click("dismiss-stopped")
        with visitor(portal) as tab:
            assert b"The server was restarted" not in tab.visit("recipes")
            tab.click("try-recipes")
            until(lambda: len(rows(data)) > kept)
            assert tab.errors == []


@pytest.mark.slow
def test_a_worker_that_is_killed_fails_its_job_and_the_page_and_the_record_say_so(
    data: Path,
) -> None:
    with header_portal(data) as portal, visitor(portal) as tab:
        try_recipes(tab)
        until(lambda: rows(data))
        for process in workers_of(portal):
            os.kill(process, signal.SIGKILL)
        until(lambda: state(data) == "failed")
        assert "the worker process ended (signal 9) while Trying recipes" in records(data)[-1].why
        assert b"the worker process ended" in tab.visit("recipes")
        kept = len(rows(data))
        tab.click("try-recipes")
        until(lambda: len(rows(data)) > kept)


@pytest.mark.slow
def test_more_jobs_than_a_user_may_have_are_refused_and_looking_around_is_not(
    data: Path,
) -> None:
    fill(data, BOB)
    one = {"QUANT_INSPECTOR_JOBS": "1"}
    with (
        header_portal(data, environment=one) as portal,
        visitor(portal) as tab,
        visitor(portal, BOB) as other,
    ):
        try_recipes(tab)
        tab.visit("models")
        refused = tab.click("sample-digit-transformer")
        assert b"1 of your jobs have not ended" in refused
        assert b"Press Stop beside a job at the left" in refused
        assert len(records(data)) == 1
        tab.click("dismiss")
        tab.errors.clear()
        tab.visit("tensors")
        until(lambda: b"Reading the tensor" not in tab.visit("tensors"))
        assert state(data) == "begun", "the tensor was read beside the long job"
        assert tab.errors == []
        other.visit("recipes")
        assert b"Trying recipes" in other.click("try-recipes")
        assert other.errors == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux")
def test_a_job_of_a_portal_has_limits_of_time_and_memory_and_no_network(data: Path) -> None:
    limits = {"QUANT_INSPECTOR_JOB_SECONDS": "1", "QUANT_INSPECTOR_JOB_MEMORY": "3 GB"}
    with header_portal(data, environment=limits) as portal, visitor(portal) as tab:
        try_recipes(tab)
        (process,) = until(lambda: workers_of(portal))
        held = until(lambda: limit_of_data(process))
        assert held == "3000000000"
        assert "Seccomp:\t2" in Path(f"/proc/{process}/status").read_text()
        until(lambda: state(data) == "failed")
        assert "was stopped after 1 seconds" in records(data)[-1].why
        assert b"the longest that a job may take here" in tab.visit("recipes")


def limit_of_data(process: int) -> str:
    """What a process may use, once it is limited; "" before."""
    lines = Path(f"/proc/{process}/limits").read_text().splitlines()
    found = next(line.split()[3] for line in lines if line.startswith("Max data size"))
    return "" if found == "unlimited" else found
