"""Trials on a Dask cluster, which is started by the commands of the README.

The oracle is the same trials in this process, to the last bit.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import helper

from inspector import cluster as cluster_module
from inspector import live, workbench
from inspector.cli import main
from inspector.cluster import Cluster, cluster_address, recipes_at, trials_at
from inspector.errors import Cancelled, RunError
from inspector.feeds import Feeds, load_feeds, random_feeds, split_calibration
from inspector.jobs import Worker
from inspector.model import Model
from inspector.model_files import load_model
from inspector.recipe import QuantConfig
from inspector.recipe_table import (
    Elsewhere,
    RecipeResult,
    RecipeRow,
    recipe_label,
    run_recipes,
)
from inspector.runtime import THREADS_VARIABLE, open_session
from inspector.search import find_exclusions
from inspector.search_result import Goal, SearchResult
from inspector.sensitivity import measure_sensitivity
from inspector.store import FeedSource, Workspace
from inspector.task_metrics import parse_metric
from inspector.trials import LostError, Request, Trial, Trials, open_trials, quantized_nodes
from tests.browser import free_port
from tests.samples import (
    MODELS,
    ROOT,
    array,
    conv_relu_gemm,
    floats,
    needs_models,
    npz_folder,
    save,
)
from tests.samples import model as make_model

GTCRN_STATES = (
    ("conv_cache_out", "conv_cache"),
    ("tra_cache_out", "tra_cache"),
    ("inter_cache_out", "inter_cache"),
)


# -- a cluster on this machine -----------------------------------------------------------------


class LocalCluster:
    """A scheduler and workers as the README starts them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []
        port = free_port()
        self.address = f"tcp://127.0.0.1:{port}"
        self._start(
            "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard",
            "--dashboard-address", "127.0.0.1:0",
        )  # fmt: skip

    def add_worker(self, *options: str) -> None:
        self._start(
            "worker", self.address, "--nworkers", "1", "--nthreads", "1", "--no-dashboard",
            "--host", "127.0.0.1", "--local-directory", str(self._folder), *options,
        )  # fmt: skip

    def _start(self, *words: str) -> None:
        program = Path(sys.executable).with_name("dask")
        log = (self._folder / f"{len(self._processes)}.log").open("wb")
        with log:
            self._processes.append(
                subprocess.Popen(
                    [str(program), *words],
                    cwd=self._folder,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def pids(self) -> dict[str, int]:
        """The process of each worker."""
        with Cluster(self.address) as connected:
            return dict(connected._client.run(os.getpid))

    def wait_for(self, count: int) -> None:
        """Returns once so many workers are there."""
        with _patient(), Cluster(self.address) as connected:
            deadline = time.monotonic() + 60
            while len(connected.workers()) != count:
                assert time.monotonic() < deadline, self.logs()
                time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f.read_text(errors="replace") for f in self._folder.glob("*.log"))

    def stop(self) -> None:
        while self._processes:
            process = self._processes.pop()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster_module, "CONNECT_SECONDS", 60.0)
        yield


@contextlib.contextmanager
def started(folder: Path, workers: int = 2, *options: str) -> Iterator[LocalCluster]:
    local = LocalCluster(folder)
    try:
        for _ in range(workers):
            local.add_worker(*options)
        if workers:
            local.wait_for(workers)
        yield local
    finally:
        local.stop()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with started(tmp_path_factory.mktemp("cluster")) as local:
        yield local


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(THREADS_VARIABLE, "1")


# -- what is measured on it --------------------------------------------------------------------


class Case:
    """A model, its feeds, and trials of them here and on a cluster."""

    def __init__(
        self, model: Model, feeds: Feeds, cache: Path, config: QuantConfig | None = None,
        metric: str = "output_sqnr_db", **options: Any,
    ) -> None:  # fmt: skip
        self.model, self.feeds, self.cache = model, feeds, cache
        self.arguments = (
            model, config or QuantConfig(), feeds, split_calibration(feeds), metric,
        )  # fmt: skip
        self.options = options

    def here(self, **options: Any) -> Trials:
        return open_trials(*self.arguments, cache=self.cache, **self.options, **options)

    def at(self, address: str, **options: Any) -> contextlib.AbstractContextManager[Trials]:
        return trials_at(address, *self.arguments, cache=self.cache, **self.options, **options)

    def requests(self) -> list[Request]:
        """Nothing left in float, and each node that computes alone."""
        names = [n.name for n in self.model.nodes if n.op_type in ("Conv", "Gemm", "MatMul")]
        return [Request(), *(Request(exclude=frozenset([name])) for name in names)]


def real(name: str, cache: Path, samples: int = 4, **options: Any) -> Case:
    model = load_model(MODELS / name / "model.onnx")
    feeds = load_feeds(MODELS / name / "inputs", model)
    return Case(model, feeds.subset(range(min(samples, len(feeds)))), cache, **options)


def small(folder: Path, **options: Any) -> Case:
    model = load_model(save(conv_relu_gemm(), folder / "model.onnx"))
    return Case(model, random_feeds(model, samples=4), folder / "cache", **options)


def one_conv(folder: Path, seed: int = 0) -> Model:
    weight = array("w", floats((4, 3, 1, 1), seed))
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "conv")]
    ends: Any = ([("x", [1, 3, "h", "w"])], [("y", [1, 4, "h", "w"])])
    return load_model(save(make_model(nodes, *ends, [weight]), folder / f"{seed}.onnx"))


def same(found: list[Trial], wanted: list[Trial]) -> bool:
    """Whether trials are equal to the last bit."""
    return len(found) == len(wanted) and all(
        a.request == b.request
        and a.sums.keys() == b.sums.keys()
        and all(np.array_equal(a.sums[k], b.sums[k], equal_nan=True) for k in a.sums)
        for a, b in zip(found, wanted, strict=True)
    )


def lines(folder: Path) -> list[tuple[str, int]]:
    """What a folder of trials holds, as (request, sample), one per run."""
    text = (folder / "trials.jsonl").read_text(encoding="utf-8")
    kept = [json.loads(line) for line in text.splitlines()[1:]]
    return [(json.dumps(k["request"]), int(at)) for k in kept for at in k["sums"]]


@needs_models
def test_two_workers_give_the_trials_of_this_process(
    two_workers: LocalCluster, tmp_path: Path
) -> None:
    case = real("mlperf-resnet8", tmp_path)
    here = case.here()
    wanted = here.measure_all(case.requests(), [2, 0])
    wanted += [here.measure(case.requests()[1])]
    with case.at(two_workers.address) as trials:
        found = trials.measure_all(case.requests(), [2, 0])
        # One request alone is shared out by samples.
        found += [trials.measure(case.requests()[1])]
        assert [trials.figure(t) for t in found] == [here.figure(t) for t in wanted]
        assert (trials.evaluations, trials.runs) == (here.evaluations, here.runs)
        assert same(trials.known(), here.known())
        runs = trials.runs
        trials.measure_all(case.requests(), [0])
        assert trials.runs == runs
    assert same(found, wanted)
    assert [len(t.sums) for t in found[:2]] == [2, 2]


@pytest.mark.slow
@needs_models
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gtcrn", {"states": GTCRN_STATES}),
        ("mlperf-resnet8", {"config": QuantConfig(format="dynamic")}),
        pytest.param("minilm-l6", {"mask": "attention_mask"}, marks=pytest.mark.slow),
    ],
)
def test_states_masks_and_finished_files_travel(
    name: str, options: dict[str, Any], two_workers: LocalCluster, tmp_path: Path
) -> None:
    case = real(name, tmp_path, samples=2, **options)
    requests = case.requests()[:2]
    wanted = case.here().measure_all(requests)
    with case.at(two_workers.address) as trials:
        assert same(trials.measure_all(requests), wanted)


@needs_models
@pytest.mark.slow
def test_a_killed_worker_loses_no_trial(two_workers: LocalCluster, tmp_path: Path) -> None:
    case = real("fastestdet", tmp_path, samples=2)
    requests = case.requests()
    wanted = case.here().measure_all(requests)
    killed: list[str] = []

    def kill(fraction: float, _message: str) -> None:
        if 0.3 < fraction < 0.6 and not killed:
            worker, pid = sorted(two_workers.pids().items())[0]
            os.kill(pid, signal.SIGKILL)
            killed.append(worker)

    folder = tmp_path / "state"
    with case.at(two_workers.address, folder=folder) as trials:
        assert same(trials.measure_all(requests, progress=kill), wanted)
    assert killed
    kept = lines(folder)
    assert len(kept) == len(set(kept)) == len(requests) * len(case.feeds)
    two_workers.wait_for(2)
    assert killed[0] not in two_workers.pids()


def searched(trials: Trials, case: Case, **options: Any) -> SearchResult:
    """The list that takes half of the noise away."""
    whole = trials.figure(trials.measure(Request()))
    found = find_exclusions(
        trials, Goal.of(trials.metric, whole + 3), candidates=quantized_nodes(trials, case.model),
        **options,
    )  # fmt: skip
    return replace(found, seconds=0.0, evaluations=0)


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["", "killed", "stopped"])
def test_a_search_finds_the_same_list_by_the_same_trials(
    trouble: str, two_workers: LocalCluster, tmp_path: Path
) -> None:
    case = real("mlperf-resnet8", tmp_path)
    here = case.here()
    wanted = searched(here, case)
    assert wanted.reached
    assert wanted.nodes
    count = here.evaluations
    folder = tmp_path / "state"
    killed: list[str] = []
    with case.at(two_workers.address, folder=folder) as trials:

        def kill(_fraction: float, _message: str) -> None:
            if trouble == "killed" and not killed and trials.evaluations > count / 3:
                worker, pid = sorted(two_workers.pids().items())[0]
                os.kill(pid, signal.SIGKILL)
                killed.append(worker)

        found = searched(
            trials, case, progress=kill,
            stop=lambda: trouble == "stopped" and trials.evaluations > count / 3,
        )  # fmt: skip
        assert bool(killed) is (trouble == "killed")
        done = trials.evaluations
    if trouble == "stopped":
        assert count / 3 < done < count
        with case.at(two_workers.address, folder=folder) as trials:
            found = searched(trials, case)
            assert trials.evaluations == count - done
    kept = lines(folder)
    assert len(kept) == len(set(kept)) == here.runs
    assert found == wanted
    with case.at(two_workers.address, folder=folder) as trials:
        by_request = {t.request: t for t in trials.known()}
        assert same([by_request[t.request] for t in here.known()], here.known())
    if killed:
        two_workers.wait_for(2)


@pytest.mark.slow
@needs_models
def test_a_sensitivity_table_is_that_of_this_process(
    two_workers: LocalCluster, tmp_path: Path
) -> None:
    case = real("mlperf-resnet8", tmp_path)
    wanted = measure_sensitivity(case.here(), case.model)
    with case.at(two_workers.address) as trials:
        found = measure_sensitivity(trials, case.model)
    assert {**found.to_json(), "seconds": 0} == {**wanted.to_json(), "seconds": 0}
    assert len(found.to_json()["rows"]) > 8


@pytest.mark.slow
@needs_models
def test_what_was_stopped_goes_on_and_repeats_nothing(
    two_workers: LocalCluster, tmp_path: Path
) -> None:
    case = real("mlperf-resnet8", tmp_path)
    requests, folder = case.requests(), tmp_path / "state"

    def stop(fraction: float, _message: str) -> None:
        if fraction > 1 / 3:
            raise Cancelled

    with (
        case.at(two_workers.address, folder=folder) as trials,
        pytest.raises(Cancelled),
    ):
        trials.measure_all(requests, progress=stop)
    before = lines(folder)
    assert len(requests) * len(case.feeds) / 3 < len(before) < len(requests) * len(case.feeds)
    with case.at(two_workers.address, folder=folder) as trials:
        found = trials.measure_all(requests)
        assert trials.runs == len(requests) * len(case.feeds) - len(before)
    after = lines(folder)
    assert after[: len(before)] == before
    assert len(set(after)) == len(after) == len(requests) * len(case.feeds)
    assert same(found, case.here().measure_all(requests))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Cluster]:
    """The connections that a test makes."""
    made: list[Cluster] = []
    first = Cluster.__init__

    def noted(self: Cluster, address: str) -> None:
        first(self, address)
        made.append(self)

    monkeypatch.setattr(Cluster, "__init__", noted)
    return made


def test_parts_travel_once_per_worker(
    two_workers: LocalCluster, tmp_path: Path, sent: list[Cluster]
) -> None:
    case = small(tmp_path)
    # More descriptions of the same parts than a worker keeps open.
    metrics = ["output_sqnr_db", "output_sqnr_db", "output_sqnr_db:y", "cosine", "agreement", "kl"]
    assert len(metrics) > cluster_module._KEPT_BENCHES
    for metric in metrics:
        case.arguments = (*case.arguments[:4], metric)
        with case.at(two_workers.address) as trials:
            found = [trials.measure_all(case.requests()), [trials.measure(Request(part="weights"))]]
        here = case.here()
        assert same(found[0], here.measure_all(case.requests()))
        assert same(found[1], [here.measure(Request(part="weights"))])
    first, again, *others = (connected.sent for connected in sent)
    assert set(first.values()) == {1}
    # Float model, prepared model and what became of its nodes, ranges, four samples, description.
    assert len(first) == 2 * 9
    assert not again
    for other in others:
        assert sum(other.values()) == len(other) == 2


@pytest.mark.slow
def test_parts_of_what_is_opened_outlive_what_makes_room_for_it(
    two_workers: LocalCluster, tmp_path: Path, sent: list[Cluster]
) -> None:
    models = [one_conv(tmp_path, seed) for seed in range(cluster_module._KEPT_BENCHES)]
    cases = [
        Case(model, random_feeds(model, samples=2, seed=at), tmp_path / "cache")
        for at, model in enumerate(models)
    ]
    again = Case(models[0], cases[0].feeds, tmp_path / "cache", metric="cosine")
    for case in (*cases, again):
        with case.at(two_workers.address) as trials:
            # Of two requests each worker takes one, or one sample of it.
            found = [trials.measure(request) for request in case.requests()]
        assert same(found, case.here().measure_all(case.requests()))
    assert sum(sent[-1].sent.values()) == 2


@pytest.mark.slow
def test_a_worker_that_comes_later_is_sent_what_it_lacks(
    tmp_path: Path, sent: list[Cluster]
) -> None:
    case = small(tmp_path)
    (tmp_path / "cluster").mkdir()
    with started(tmp_path / "cluster", 1) as local, case.at(local.address) as trials:
        old = set(local.pids())
        local.add_worker()
        local.wait_for(2)
        (new,) = set(local.pids()) - old
        requests = [
            Request(exclude=frozenset(r.exclude), part=part)
            for r in case.requests()
            for part in ("both", "weights", "activations")
        ]
        found = trials.measure_all(requests)
        assert same(found, case.here().measure_all(requests))
        takers = [worker for connected in sent for worker, _ in connected.sent]
        assert takers.count(new) in (0, 9)
        # No worker is left that was there when all was sent.
        os.kill(local.pids()[next(iter(old))], signal.SIGKILL)
        every = Request(exclude=frozenset(n.name for n in case.model.nodes))
        assert same([trials.measure(every)], [case.here().measure(every)])
        takers = {worker for connected in sent for worker, _ in connected.sent}
        assert takers - old


@pytest.mark.slow
def test_recipes_tried_on_a_cluster_are_those_of_this_process(
    two_workers: LocalCluster, tmp_path: Path
) -> None:
    case = small(tmp_path)
    split = split_calibration(case.feeds)
    rows = [
        RecipeRow(config=config, label=recipe_label(config))
        for config in (
            QuantConfig(), QuantConfig(per_channel=True), QuantConfig(method="entropy"),
            QuantConfig(method="percentile", percentile=99.0), QuantConfig(weight_type="uint8"),
            QuantConfig(nodes=("no such node",)), QuantConfig(format="dynamic"),
        )
    ]  # fmt: skip
    never = QuantConfig(reduce_range=True)
    rows.append(RecipeRow(config=never, label="never", reason="it cannot be"))
    outputs = [output.name for output in case.model.outputs]
    metrics = [parse_metric("cosine", outputs, case.feeds)]
    told: list[str] = []

    def tried(elsewhere: Elsewhere | None) -> dict[QuantConfig, RecipeResult]:
        results = run_recipes(
            case.model, case.feeds, split, rows=rows, cache=case.cache, metrics=metrics,
            elsewhere=elsewhere, progress=lambda _, text: told.append(text),
        )  # fmt: skip
        return {result.row.config: result for result in results}

    wanted = tried(None)
    with recipes_at(
        two_workers.address, case.model, case.feeds, split, rows=rows, metrics=metrics
    ) as elsewhere:
        found = tried(elsewhere)
    assert any("on 2 workers" in text for text in told)
    assert found.keys() == wanted.keys()
    assert found[never] == wanted[never]
    for config in found.keys() - {never}:
        assert found[config].latency is None
        untimed = replace(wanted[config], latency=None, float_seconds=None, notes=(), seconds=0.0)
        assert replace(found[config], notes=(), seconds=0.0) == untimed
        assert (cluster_module.NOT_TIMED in found[config].notes) is not bool(found[config].error)
    # The runtime has no kernels for one, and the other names no node.
    assert sum(bool(r.error) for r in found.values()) == 2
    assert all(r.metrics for r in found.values() if not r.error and not r.row.reason)


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "inspector.cli", *words],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_commands_run_on_the_cluster_they_are_given(
    two_workers: LocalCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = str(small(tmp_path).model.path), str(tmp_path / "out.json")
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(tmp_path / "data"))
    words = [model, "--random", "4", "--json", out]
    goal = ["--target", "output_sqnr_db=200", "--simulated", "-o", str(tmp_path / "list.json")]
    on = ["--cluster", two_workers.address]

    def table(*command: str, code: int = 0) -> dict[str, Any]:
        assert main([*command]) == code, capsys.readouterr().err
        found: dict[str, Any] = json.loads(Path(out).read_text(encoding="utf-8"))
        return {**found, "seconds": 0}

    assert table("sensitivity", *words, *on) == table("sensitivity", *words)
    kept = ["--state", str(tmp_path / "state")]
    assert table("search", *words, *goal, *on, *kept, code=1) == table(
        "search", *words, *goal, code=1
    )
    # Nothing is left to run, here or there.
    assert table("search", *words, *goal, *kept, code=1)["evaluations"] == 0
    monkeypatch.setenv("QUANT_INSPECTOR_CLUSTER", two_workers.address)
    rows = [r for r in table("recipes", *words, "--most", "3")["rows"] if r["state"] == "done"]
    assert len(rows) == 3
    assert all(row["latency"] is None for row in rows)
    assert all(cluster_module.NOT_TIMED in row["notes"] for row in rows)
    capsys.readouterr()
    assert main(["recipes", *words, "--keep", str(tmp_path / "kept")]) == 2
    assert "leave out it or --cluster" in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_of_the_app_drives_the_cluster(
    two_workers: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANT_INSPECTOR_CLUSTER", two_workers.address)
    path = save(conv_relu_gemm(), tmp_path / "float.onnx")
    run_id = workbench.load_pair(
        tmp_path / "data", float_path=path, quantized_path=None,
        inputs=FeedSource(kind="random", samples=4),
    )  # fmt: skip
    workspace = Workspace(tmp_path / "data")
    (pair,) = workspace.pairs()
    made = workbench.requantize(
        workspace.root, run_id=run_id, config=QuantConfig().to_json(), exclude=()
    )

    def tried() -> list[dict[str, Any]]:
        rows = workspace.recipes(pair.id).get("rows", ())
        return [row for row in rows if row["state"] in ("done", "failed")]

    with Worker() as worker:
        job = worker.submit(workbench.try_recipes, workspace.root, run_id=run_id)
        deadline = time.monotonic() + 60
        while len(tried()) < 3 and worker.status(job).error is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert worker.status(job).error is None
        assert "on 2 workers" in worker.status(job).message
        worker.cancel(job)
        assert worker.wait(job, 30).state == "cancelled"
        before = tried()
        assert all(cluster_module.NOT_TIMED in row["notes"] for row in before if row["sha256"])
        job = worker.submit(workbench.try_recipes, workspace.root, run_id=run_id)
        assert worker.result(job, 120) == len(tried()) > len(before)
        job = worker.submit(live.measure_run, workspace.root, run_id=made)
        table = worker.result(job, 120)
        assert {row["name"] for row in table["rows"]} >= {"conv", "gemm"}
        job = worker.submit(
            live.search_list, workspace.root, run_id=run_id, config=QuantConfig().to_json(),
            metric="output_sqnr_db", value=200.0, simulated=True,
        )  # fmt: skip
        assert worker.result(job, 120) is False
    found = workspace.search(pair.id)
    monkeypatch.delenv("QUANT_INSPECTOR_CLUSTER")
    workspace.save_search(pair.id, {})
    live.search_list(
        workspace.root, run_id=run_id, config=QuantConfig().to_json(),
        metric="output_sqnr_db", value=200.0, simulated=True,
    )  # fmt: skip
    # The trials of the cluster are there: nothing is run again.
    assert workspace.search(pair.id)["evaluations"] == 0 < found["evaluations"]
    assert workspace.search(pair.id)["trials"] == found["trials"]


# -- what goes wrong ---------------------------------------------------------------------------


def test_a_damaged_part_is_not_kept(two_workers: LocalCluster) -> None:
    digest, sender = "0" * 64, "12345678" * 4
    with Cluster(two_workers.address) as connected:
        workers = connected.workers()
        pieces = [(digest, b"something", False), (digest, b" else", True)]
        found = connected._tell(workers, cluster_module._take, pieces, sender)
        assert found == {worker: [digest] for worker in workers}
        found = connected._tell(workers, cluster_module._lacking, [digest])
        assert found == {worker: [digest] for worker in workers}
        with pytest.raises(RunError, match="is not a SHA-256"):
            connected._tell(workers, cluster_module._lacking, ["../../etc/passwd"])


@pytest.mark.slow
def test_a_list_that_cannot_be_measured_says_so_as_here(
    two_workers: LocalCluster, tmp_path: Path
) -> None:
    case = small(tmp_path)
    wrong = [Request(exclude=frozenset([name])) for name in ("no such node", "nor this")]
    raised: list[str] = []
    with case.at(two_workers.address) as trials:
        for opened in (case.here(), trials):
            with pytest.raises(Exception, match="no such node") as caught:
                opened.measure_all([Request(), *wrong])
            raised.append(repr(caught.value))
        assert len(trials.known()) == 1
    assert raised[0] == raised[1]


@pytest.mark.slow
def test_without_workers_it_says_how_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(tmp_path, 0) as local:
        deadline = time.monotonic() + 30
        while "Scheduler at" not in local.logs():
            assert time.monotonic() < deadline, local.logs()
            time.sleep(0.1)
        monkeypatch.setattr(cluster_module, "CONNECT_SECONDS", 2.0)
        with pytest.raises(RunError, match="has no workers") as caught:
            Cluster(local.address)
    assert f"dask worker {local.address}" in caught.value.hint


@pytest.mark.slow
def test_a_lost_scheduler_ends_the_work_and_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "GONE_SECONDS", 3.0)
    case = small(tmp_path)
    requests = [
        Request(exclude=request.exclude, part=part)
        for request in case.requests()
        for part in ("both", "weights", "activations")
    ]
    (tmp_path / "cluster").mkdir()
    folder = tmp_path / "state"
    with started(tmp_path / "cluster", 1) as local, case.at(local.address, folder=folder) as trials:

        def kill(fraction: float, _message: str) -> None:
            if fraction > 0.3:
                local.stop()

        with pytest.raises(LostError, match=r"lost|no workers") as caught:
            trials.measure_all(requests, progress=kill)
    assert caught.value.hint
    before = lines(folder)
    assert 0 < len(before) < len(requests) * len(case.feeds)
    here = case.here(folder=folder)
    assert same(here.measure_all(requests), case.here().measure_all(requests))
    assert here.runs == len(requests) * len(case.feeds) - len(before)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("tcp://127.0.0.1:1", "there is no Dask scheduler at tcp://127.0.0.1:1"),
        ("nonsense://x:1", "there is no Dask scheduler at nonsense://x:1"),
        ("127.0.0.1", "'127.0.0.1' is not the address of a Dask scheduler"),
        ("tcp://127.0.0.1:8786\n", r"8786\\n' is not the address"),
    ],
)
def test_a_wrong_address_is_told_with_a_hint(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "CONNECT_SECONDS", 1.0)
    with pytest.raises(RunError, match=message) as caught:
        Cluster(address)
    assert "dask scheduler" in caught.value.hint


def test_a_client_that_cannot_connect_is_not_left_to_the_garbage_collector(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import distributed

    monkeypatch.setattr(cluster_module, "CONNECT_SECONDS", 1.0)
    for address in ("tcp://127.0.0.1:1", "nonsense://x:1"):
        with pytest.raises(RunError) as caught:
            Cluster(address)
        # The error's traceback still holds what it was raised in.
        clients = [x for x in gc.get_objects() if isinstance(x, distributed.Client)]
        assert clients, caught.value
        assert {client.status for client in clients} == {"closed"}


@pytest.mark.slow
def test_a_command_ends_without_a_traceback_where_there_is_no_scheduler(tmp_path: Path) -> None:
    path = save(conv_relu_gemm(), tmp_path / "float.onnx")
    wrong = f"tcp://127.0.0.1:{free_port()}"
    done = command("recipes", str(path), "--random", "4", "--cluster", wrong)
    assert (done.returncode, done.stdout) == (2, "")
    first, second = done.stderr.splitlines()
    assert first.startswith(f"error: there is no Dask scheduler at {wrong}")
    assert second.startswith("hint: Give the address that")


def test_a_users_own_metric_is_not_sent(tmp_path: Path) -> None:
    case = small(tmp_path, metric="os.path:join")
    with pytest.raises(RunError, match="code on this machine"), case.at("tcp://127.0.0.1:1"):
        pass


def test_without_dask_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(RunError, match="Dask is not installed") as caught:
        Cluster("tcp://127.0.0.1:8786")
    assert 'pip install "quant-inspector[cluster]"' in caught.value.hint


def test_dask_is_imported_only_where_a_cluster_is_used() -> None:
    check = (
        "import sys, inspector.cli, inspector.cluster, inspector.workbench\n"
        "assert not {'distributed', 'dask', 'tornado.ioloop'} & set(sys.modules) - {'tornado'}"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_the_setting_names_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUANT_INSPECTOR_CLUSTER", raising=False)
    assert cluster_address() == ""
    monkeypatch.setenv("QUANT_INSPECTOR_CLUSTER", "tcp://10.0.0.5:8786")
    assert cluster_address() == "tcp://10.0.0.5:8786"


def test_a_number_of_threads_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(save(conv_relu_gemm(), tmp_path / "model.onnx"))
    for wrong in ("0", "two", "-1", "1.5", "²"):
        monkeypatch.setenv(THREADS_VARIABLE, wrong)
        with pytest.raises(RunError, match="expected a whole number from 1 on"):
            open_session(model, optimized=False)
    monkeypatch.setenv(THREADS_VARIABLE, "2")
    open_session(model, optimized=False)


@pytest.mark.slow
def test_other_versions_on_a_worker_are_refused(
    two_workers: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = small(tmp_path)
    own = cluster_module._versions()
    monkeypatch.setattr(cluster_module, "_versions", lambda: {**own, "onnxruntime": "1.2.3"})
    with (
        case.at(two_workers.address) as trials,
        pytest.raises(RunError, match=r"onnxruntime 1\.\d+\.\d+, this program 1\.2\.3"),
    ):
        trials.measure(Request())


def wide(folder: Path) -> Case:
    """A small model on many feeds: they are what takes memory, one after the other."""
    loaded = one_conv(folder)
    feeds = npz_folder(folder / "wide", [{"x": floats((1, 3, 300, 300), at)} for at in range(120)])
    return Case(loaded, load_feeds(feeds, loaded), folder / "cache")


def resident(local: LocalCluster) -> int:
    """What the one worker's process takes."""
    (pid,) = local.pids().values()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_a_worker_with_too_little_memory_says_how_much_it_needs(tmp_path: Path) -> None:
    case = wide(tmp_path)
    (tmp_path / "cluster").mkdir()
    with started(tmp_path / "cluster", 1) as local, case.at(local.address) as trials:
        trials.measure(Request())
        needed = resident(local)
    # It fits, but so tightly that Dask would give this worker no more to do.
    (tmp_path / "tight").mkdir()
    limit = int(needed / 0.87)
    with started(tmp_path / "tight", 1, "--memory-limit", str(limit)) as local:
        with (
            case.at(local.address) as trials,
            pytest.raises(LostError, match=f"its limit is {limit / 1e9:.2f} GB") as caught,
        ):
            trials.measure(Request())
        assert "--memory-limit" in caught.value.hint
        (tmp_path / "other").mkdir()
        other = small(tmp_path / "other")
        with other.at(local.address) as trials:
            assert same([trials.measure(Request())], [other.here().measure(Request())])


# -- parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.float32(1.5).reshape(()),
        np.zeros((0, 3), np.int64),
        np.array([np.nan, np.inf, -np.inf, -0.0]),
        np.arange(12, dtype=np.uint8).reshape(3, 4).T,
        np.array([True, False]),
        np.array([[1.5, -2]], ml_dtypes.bfloat16),
        np.array([0.5, np.nan], ml_dtypes.float8_e4m3fn),
        np.array([["a", ""], ["é\x00", "日本"]], object),
        np.array("", object),
    ],
)
def test_arrays_come_out_of_the_parcel_as_they_went_in(array: Any, tmp_path: Path) -> None:
    feed = {"../x\n": array, "": np.ones(3, np.float16)}
    content, layout = cluster_module._packed(feed)
    assert cluster_module._packed(feed)[0] == content
    (tmp_path / "part").write_bytes(content)
    found = cluster_module._unpacked(tmp_path / "part", json.loads(json.dumps(layout)))
    assert list(found) == list(feed)
    for name, value in feed.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        if value.dtype == object:
            assert found[name].tolist() == value.tolist()
        else:
            assert (
                np.ascontiguousarray(found[name]).tobytes() == np.ascontiguousarray(value).tobytes()
            )


def test_a_pickle_among_the_parts_is_not_opened(tmp_path: Path) -> None:
    with (tmp_path / "part").open("wb") as writer:
        np.save(writer, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        cluster_module._unpacked(tmp_path / "part", [["x", "float32"]])
