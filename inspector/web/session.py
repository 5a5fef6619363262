"""What a page is looking at: the workspace, its workers, the run, the tensor, the jobs under way.

The address holds the run, the tensor and the filters, and nothing else does: a link or a reload
opens the same view, and Back returns to the one before. What must survive and does not fit there
(ticked nodes, runs, results) lies in the workspace on disk. `session_state` only remembers which
jobs this browser tab is waiting for.
"""

from __future__ import annotations

import atexit
import math
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st

from inspector import hosting, store
from inspector.comparison import ActivationError, Comparison, WeightError, judged_db
from inspector.errors import InspectorError
from inspector.jobs import JobStatus, Worker
from inspector.render import dump_json, find_headline, read_comparison
from inspector.store import PairRecord, RunRecord, Workspace, made_by_surgery
from inspector.web import identity, tasks, words
from inspector.web.workers import Workers

ACTIVE = ("queued", "running")
FIRST_SAMPLE = "digit-detector"
ELSEWHERE = "started elsewhere"
_KEPT_ANSWERS = 24

_workers = Workers(lambda: Worker(niceness=5, preload=("inspector.workbench",)))
_start_lock = threading.Lock()
_started: set[Path] = set()


def root() -> Path:
    """The folder of the user's workspace, absolute. Ends the page where nobody is signed in."""
    user, data = identity.require(), identity.settings().data
    if user == identity.LOCAL or data is None:
        return store.default_root().absolute()
    return hosting.workspace_folder(data, user.key)


def is_signed_in() -> bool:
    """Whether the user is one of several, who had to sign in."""
    return identity.current_user() not in (None, identity.LOCAL)


def guard() -> None:
    """Ends the page, with the sign-in on it, where nobody is signed in."""
    identity.require()


@st.cache_resource(show_spinner=False, max_entries=256)
def _workspace(folder: str) -> Workspace:
    return Workspace(Path(folder))


def workspace() -> Workspace:
    """The workspace of this process."""
    return _workspace(str(root()))


def worker() -> Worker:
    """The workspace's long-lived worker, started with its first job."""
    return _worker("main")


def _worker(role: str) -> Worker:
    return _workers.get(root(), role)


def close_workers() -> None:
    """Stops every worker of this process."""
    _workers.close()


atexit.register(close_workers)


def start() -> None:
    """Local mode: starts the worker, on the bundled sample where the workspace is still empty.

    In portal mode nothing is started before somebody asks for it.
    """
    found = identity.settings()
    if found.is_portal:
        _workers.keep_tidy(idle_seconds=found.worker_idle_seconds, most=found.workers)
        return
    with _start_lock:
        if root() in _started:
            return
        _started.add(root())
    own = worker()
    own.start()
    if workspace().current_pair() is None and not any(job.state in ACTIVE for job in own.jobs()):
        open_sample(FIRST_SAMPLE)


def open_sample(name: str) -> str:
    """The id of the job that loads a bundled pair."""
    return worker().submit(
        tasks.load_sample,
        root(),
        name,
        # A path of the server is not for its users to see.
        private=identity.settings().is_portal,
        title=f"Comparing the sample {name}",
    )


# ── the view: which pair, which run, which tensor ────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One run of the current pair, and what it is measured against.

    Attributes:
        pair: the two files and the feeds.
        runs: every run of the pair, by number.
        run: the one that is shown.
        comparison: float against this run's model.
        baseline: the run of the same recipe without exclusions; None where `run` is the first.
        before: float against the baseline's model.
        tensor: name of the selected float tensor; "" where there is nothing to select.
    """

    pair: PairRecord
    runs: tuple[RunRecord, ...]
    run: RunRecord
    comparison: Comparison
    baseline: RunRecord | None
    before: Comparison | None
    tensor: str

    @property
    def record(self) -> ActivationError | WeightError | None:
        """The selected tensor's record."""
        records = compared(self.comparison)
        return next((each for each in records if each.name == self.tensor), None)

    @property
    def kind(self) -> str:
        """What the selected tensor is: "weight", "bias" or "activation"."""
        record = self.record
        return record.kind if isinstance(record, WeightError) else "activation"

    @property
    def node(self) -> str:
        """The selected tensor's node in the float model, "" for a graph input."""
        record = self.record
        return record.node if record else ""


@st.cache_resource(show_spinner=False, max_entries=48)
def _comparison(folder: str, run_id: str, stamp: tuple[int, int]) -> Comparison:
    # A run is compared anew when a match is set by hand; nothing else changes it.
    return read_comparison(_workspace(folder).comparison(run_id))


def comparison_of(run_id: str) -> Comparison:
    """A run's comparison as it is on disk, read once."""
    return _comparison(str(root()), run_id, workspace().comparison_stamp(run_id))


def baseline_of(run: RunRecord, runs: tuple[RunRecord, ...]) -> RunRecord | None:
    """The run of the same recipe without exclusions and overrides; for that one, the loaded file.

    For the loaded file with nodes freed by surgery, the loaded file. None where no other run has
    this recipe: before and after are never of two recipes.
    """
    if made_by_surgery(run):
        return next((each for each in runs if each.number == 0), None)
    plain = {key: value for key, value in run.recipe.items() if key != "overrides"}
    alike = [
        each for each in runs if each.recipe == plain and not each.exclusions and each.id != run.id
    ]
    made = [each for each in alike if each.number > 0]
    if run.number == 0:
        return None
    if (run.exclusions or plain != run.recipe) and made:
        return made[0]
    return next((each for each in alike if each.number == 0), None)


def view() -> View | None:
    """What the address asks for; None while the workspace holds no finished run.

    Raises:
        ReportError: the address names a run that is not there.
    """
    space = workspace()
    wanted = st.query_params.get("run")
    if wanted:
        pair = space.pair(space.run(wanted).pair_id)
    else:
        current = space.current_pair()
        if current is None:
            return None
        pair = space.pair(current)
    runs = tuple(space.runs(pair.id))
    if not runs:
        return None
    run = next((each for each in runs if each.id == wanted), runs[-1])
    comparison = comparison_of(run.id)
    baseline = baseline_of(run, runs)
    return View(
        pair=pair,
        runs=runs,
        run=run,
        comparison=comparison,
        baseline=baseline,
        before=comparison_of(baseline.id) if baseline else None,
        tensor=_selected_tensor(comparison),
    )


def compared(comparison: Comparison) -> list[ActivationError | WeightError]:
    """Activations in topological order, then weights and biases."""
    return [*comparison.activations, *comparison.weights]


def sqnr_of(record: ActivationError | WeightError) -> float:
    """A tensor's figure: accumulated for activations."""
    return record.sqnr_db if isinstance(record, WeightError) else record.accumulated_sqnr_db


def rank_of(record: ActivationError | WeightError) -> float:
    """What a tensor is ranked by: its SQNR, or that of a joined part that it hides.

    NaN ranks as the worst.
    """
    value = judged_db(record)
    return -math.inf if math.isnan(value) else value


def worst_first(comparison: Comparison) -> list[str]:
    """Names of the compared tensors, worst first: the order of the tables, and of `j` and `k`."""
    return [each.name for each in sorted(compared(comparison), key=rank_of)]


def _selected_tensor(comparison: Comparison) -> str:
    order = worst_first(comparison)
    node = st.query_params.get("node")
    own = {a.name for a in comparison.activations if a.node == node} if node else set()
    # A link may name a node alone.
    of_node = next((name for name in order if name in own), None)
    for wanted in (
        st.query_params.get("tensor"), of_node, find_headline(comparison).tensor,
    ):  # fmt: skip
        if wanted in order:
            return str(wanted)
    return order[0] if order else ""


def select_tensor(name: str) -> None:
    """Puts a tensor into the address, on every page, and with it the node that computes it."""
    if name and st.query_params.get("tensor") != name:
        st.query_params["tensor"] = name
    for key in ("node", "side"):
        st.query_params.pop(key, None)


def select_run(run_id: str) -> None:
    """Puts a run into the address; on every page."""
    if st.query_params.get("run") != run_id:
        st.query_params["run"] = run_id


def address() -> dict[str, str]:
    """The query of links between pages: run, tensor and filters go along."""
    return {key: value for key, value in st.query_params.items() if value}


def is_local() -> bool:
    """Whether paths on this machine may be opened: in local mode that nobody else reaches."""
    found = identity.settings()
    return not (found.is_portal or found.network)


# ── jobs this tab waits for ──────────────────────────────────────────────────────────────────


def _followed() -> dict[str, str]:
    followed: dict[str, str] = st.session_state.setdefault("followed", {})
    return followed


def follow(job_id: str, purpose: str) -> None:
    """Waits for a job: "load" and "requantize" open the run they return."""
    _followed()[job_id] = purpose


def say_when_rematched(sentence: str) -> None:
    """Shows the sentence once the run was compared anew with a match set by hand."""
    st.session_state["rematched"] = sentence


def active_jobs() -> list[JobStatus]:
    """Unfinished jobs of the workspace's worker, the running one first."""
    jobs = [job for job in worker().jobs() if job.state in ACTIVE]
    return sorted(jobs, key=lambda job: job.state != "running")


def last_failure() -> InspectorError | None:
    """Why the workspace's last job failed, also one that ended before this tab was opened."""
    jobs = worker().jobs()
    return told(jobs[-1].error) if jobs and jobs[-1].error else None


def told(error: InspectorError) -> InspectorError:
    """The error as its reader may have it: in portal mode without folders of the server."""
    found = identity.settings()
    if not found.is_portal or found.data is None:
        return error
    hint = hosting.without_paths(error.hint, found.data)
    if "QUANT_INSPECTOR_" in hint:
        hint = "Tell whoever runs this server: its settings have to change."
    return type(error)(hosting.without_paths(error.message, found.data), hint=hint)


def running(purpose: str) -> JobStatus | None:
    """This tab's unfinished job for a purpose."""
    for job_id, why in _followed().items():
        if why == purpose:
            status = _job(job_id)
            if status is not None and status.state in ACTIVE:
                return status
    return None


def running_title(title: str) -> JobStatus | None:
    """The unfinished job of this title, also one that another tab started."""
    return next((job for job in active_jobs() if job.title == title), None)


def _job(job_id: str) -> JobStatus | None:
    """The job's state; None where it ended so long ago that it is forgotten."""
    return next((job for job in worker().jobs() if job.id == job_id), None)


def settle() -> str | None:
    """Takes in what finished since the last look: opens new runs, keeps what went wrong.

    Returns the run of a pair that was loaded just now: its overview is to be opened.
    """
    loaded = None
    followed = _followed()
    answering = {
        entry.removeprefix("main:") for entry in _answers().values() if isinstance(entry, str)
    }
    for job in active_jobs():
        # A job that was started before a reload, or by the server: wait for it as well.
        if job.id not in answering:
            followed.setdefault(job.id, ELSEWHERE)
    for job_id, purpose in list(followed.items()):
        status = _job(job_id)
        if status is not None and status.state in ACTIVE:
            continue
        del followed[job_id]
        if status is None:
            continue
        if status.state == "failed" and status.error is not None:
            if purpose != ELSEWHERE or workspace().current_pair() is None:
                report(status.error)
        elif status.state == "cancelled":
            st.toast(words.md_text(f"Stopped: {status.title}."))
        elif status.state == "done" and purpose in ("load", "requantize", "rematch"):
            st.session_state.pop("problem", None)
            if purpose == "rematch" and "rematched" in st.session_state:
                st.toast(words.md_text(st.session_state.pop("rematched")), icon=":material/link:")
            if purpose == "load":
                loaded = str(status.result)
            elif purpose == "requantize":
                select_run(str(status.result))
    return loaded


def report(problem: InspectorError) -> None:
    """Keeps an error for the one place where the shell shows it."""
    st.session_state["problem"] = told(problem)


def problem() -> InspectorError | None:
    """The error to show, until it is dismissed."""
    found: InspectorError | None = st.session_state.get("problem")
    return found


def dismiss_problem() -> None:
    """Takes the error off the page."""
    st.session_state.pop("problem", None)


# ── questions to a worker that a page needs answered ─────────────────────────────────────────


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a worker said, or that it has not yet.

    Attributes:
        value: the result; None while waiting and after a failure.
        error: what went wrong.
        job: progress while waiting.
    """

    value: Any = None
    error: InspectorError | None = None
    job: JobStatus | None = None

    @property
    def waiting(self) -> bool:
        """Whether there is neither a value nor an error yet."""
        return self.job is not None


def _answers() -> dict[Hashable, str | Answer]:
    answers: dict[Hashable, str | Answer] = st.session_state.setdefault("answers", {})
    return answers


def ask(
    key: tuple[Hashable, ...],
    function: Callable[..., Any],
    *args: Any,
    title: str,
    role: str = "",
    patience: float = 0.0,
    **kwargs: Any,
) -> Answer:
    """The answer under `key`; the first call puts the question to a worker and returns at once.

    While the workspace's worker is busy, a second one answers: a long job never blocks looking
    around.

    Args:
        key: what is asked.
        function: that gives the answer, in a worker.
        args: its arguments.
        title: of the job.
        role: a worker of its own, where what it keeps from question to question matters.
        patience: seconds to wait for an answer that is expected at once.
        kwargs: its further arguments.
    """
    answers = _answers()
    entry = answers.get(key)
    if isinstance(entry, Answer):
        return entry
    if entry is None:
        role = role or ("looking" if active_jobs() else "main")
        job_id = _worker(role).submit(function, *args, title=title, **kwargs)
        _roles()[job_id] = role
        answers[key] = f"{role}:{job_id}"
        while len(answers) > _KEPT_ANSWERS:
            del answers[next(iter(answers))]
        entry = f"{role}:{job_id}"
    role, job_id = entry.split(":", 1)
    if not any(job.id == job_id for job in _worker(role).jobs()):
        # Its worker was ended since, and the answer with it.
        answers.pop(key, None)
        return ask(key, function, *args, title=title, role=role, patience=patience, **kwargs)
    now = _worker(role).wait(job_id, patience) if patience else _worker(role).status(job_id)
    if now.state in ACTIVE:
        return Answer(job=now)
    if now.state == "cancelled":
        answers.pop(key, None)
        return Answer(error=InspectorError(f"Stopped: {now.title}.", hint="Ask again."))
    answer = Answer(value=now.result, error=told(now.error) if now.error else None)
    answers[key] = answer
    return answer


def _roles() -> dict[str, str]:
    roles: dict[str, str] = st.session_state.setdefault("roles", {})
    return roles


def status(job_id: str) -> JobStatus:
    """How a job of this tab is doing, whichever worker has it."""
    return _worker(_roles().get(job_id, "main")).status(job_id)


def forget(key: tuple[Hashable, ...]) -> None:
    """Drops an answer, so that the next `ask` puts the question again."""
    _answers().pop(key, None)


def tensor_detail(view: View) -> Answer:
    """The binned values of the selected tensor, from the store or from a worker."""
    kind = "activation" if view.kind == "activation" else "weight"
    partner = view.record.quantized_name if view.record else ""
    kept = workspace().detail(view.run.id, store.detail_key(kind, view.tensor, partner))
    if kept is not None:
        return Answer(value=kept)
    return ask(
        ("tensor", view.run.id, view.tensor, partner),
        tasks.inspect_tensor,
        root(),
        run_id=view.run.id,
        tensor=view.tensor,
        kind=kind,
        title="Reading the tensor's values",
    )


# A click is to be answered in the run of the script that it starts.
_PATIENCE_SECONDS = 0.9


def list_preview(view: View, recipe: Mapping[str, Any] | None, nodes: Sequence[str]) -> Answer:
    """What a list would give, from the worker that keeps what is needed from click to click.

    Args:
        view: what is shown.
        recipe: to re-quantize with; None for surgery on the loaded file.
        nodes: in float.
    """
    # As `QuantConfig.to_json` writes it, so that one recipe is asked about once.
    later = ("equalize", "overrides")
    given = {key: value for key, value in (recipe or {}).items() if value or key not in later}
    wanted = "" if recipe is None else dump_json(given)
    key = ("preview", view.run.id, wanted, tuple(sorted(nodes)))
    latest = st.session_state.get("latest-preview")
    if latest is not None and latest != key:
        _drop(latest)
    st.session_state["latest-preview"] = key
    return ask(
        key,
        tasks.preview_list,
        root(),
        run_id=view.run.id,
        config=None if recipe is None else given,
        exclude=list(nodes),
        title="Preparing the preview",
        role="live",
        patience=_PATIENCE_SECONDS,
    )


def _drop(key: tuple[Hashable, ...]) -> None:
    """Stops looking for an answer that nobody waits for any more."""
    entry = _answers().get(key)
    if isinstance(entry, str):
        role, job_id = entry.split(":", 1)
        if any(job.id == job_id and job.state == "queued" for job in _worker(role).jobs()):
            _worker(role).cancel(job_id)
            _answers().pop(key, None)


def forget_tensor(view: View) -> None:
    """Lets the next `tensor_detail` try again."""
    partner = view.record.quantized_name if view.record else ""
    forget(("tensor", view.run.id, view.tensor, partner))


def stop_job(job_id: str) -> None:
    """Asks the workspace's worker to stop a job."""
    worker().cancel(job_id)


# ── ranges set by hand, not applied yet: on disk, so that a reload keeps them ────────────────


def overrides(view: View) -> list[dict[str, Any]]:
    """The grids set by hand for the next run: those of the shown run, and what was changed since.

    Each as `TensorOverride.to_json` writes it.
    """
    kept: Mapping[str, Any] = workspace().draft(view.pair.id).get("overrides", {})
    own = kept.get(view.run.id, view.run.recipe.get("overrides", ()))
    return [dict(each) for each in own]


def set_override(view: View, tensor: str, entry: Mapping[str, Any] | None) -> None:
    """Keeps a grid for a tensor, or takes it back."""
    found = [each for each in overrides(view) if each.get("tensor") != tensor]
    if entry is not None:
        found.append(dict(entry))
    kept = workspace().draft(view.pair.id)
    by_run = {**kept.get("overrides", {}), view.run.id: found}
    workspace().save_draft(view.pair.id, {**kept, "overrides": by_run})


# ── ticked nodes: kept on disk, so that a reload keeps them ──────────────────────────────────


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """Nodes ticked to stay in float, not applied yet.

    Attributes:
        nodes: names of the float model's nodes, in the order they were ticked.
        undo: the sets before, oldest first.
        redo: the sets that were undone, next first.
    """

    nodes: tuple[str, ...] = ()
    undo: tuple[tuple[str, ...], ...] = ()
    redo: tuple[tuple[str, ...], ...] = ()


def draft(pair_id: str, applied: tuple[str, ...] = ()) -> Draft:
    """The ticked nodes of a pair; those of the shown run where none were ticked yet."""
    kept: Mapping[str, Any] = workspace().draft(pair_id)
    if "nodes" not in kept:
        return Draft(nodes=tuple(applied))
    return Draft(
        nodes=tuple(kept["nodes"]),
        undo=tuple(tuple(each) for each in kept.get("undo", ())),
        redo=tuple(tuple(each) for each in kept.get("redo", ())),
    )


def _keep(pair_id: str, new: Draft) -> None:
    limit = 100
    kept = workspace().draft(pair_id)
    workspace().save_draft(
        pair_id,
        {
            **kept,
            "nodes": list(new.nodes),
            "undo": [list(each) for each in new.undo[-limit:]],
            "redo": [list(each) for each in new.redo[:limit]],
        },
    )


def tick(pair_id: str, old: Draft, nodes: tuple[str, ...]) -> None:
    """Ticks and unticks what changed from `old` to `nodes`; `undo` takes it back.

    Only the change is applied: another tab may have ticked other nodes since `old` was read.
    """
    now = draft(pair_id, old.nodes)
    stays = [each for each in now.nodes if each in nodes or each not in old.nodes]
    added = [each for each in nodes if each not in old.nodes]
    ticked = tuple(dict.fromkeys((*stays, *added)))
    if set(ticked) != set(now.nodes):
        _keep(pair_id, Draft(nodes=ticked, undo=(*now.undo, now.nodes)))


def toggle(pair_id: str, old: Draft, node: str) -> None:
    """Ticks a node, or unticks it."""
    kept = tuple(each for each in old.nodes if each != node)
    tick(pair_id, old, kept if node in old.nodes else (*kept, node))


def undo(pair_id: str, old: Draft) -> None:
    """Goes back to the set before."""
    if old.undo:
        _keep(
            pair_id,
            Draft(nodes=old.undo[-1], undo=old.undo[:-1], redo=(old.nodes, *old.redo)),
        )


def redo(pair_id: str, old: Draft) -> None:
    """Takes an `undo` back."""
    if old.redo:
        _keep(
            pair_id,
            Draft(nodes=old.redo[0], undo=(*old.undo, old.nodes), redo=old.redo[1:]),
        )
