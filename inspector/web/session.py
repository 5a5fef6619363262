"""What a page is looking at: the workspace, its workers, the run, the tensor, the jobs under way.

The address holds the run, the tensor and the filters, and nothing else does: a link or a reload
opens the same view, and Back returns to the one before. What must survive and does not fit there
(ticked nodes, runs, results) lies in the workspace on disk. `session_state` only remembers which
jobs this browser tab is waiting for.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import streamlit as st

from inspector import hosting, store
from inspector.comparison import ActivationError, Comparison, WeightError, judged_db
from inspector.errors import InspectorError, QuotaError, ReportError, RunError
from inspector.index import Index, Share
from inspector.jobs import ACTIVE, JobStatus, Worker
from inspector.render import dump_json, find_headline, read_comparison
from inspector.store import PairRecord, RunRecord, Workspace, made_by_surgery
from inspector.web import identity, metrics, tasks, words
from inspector.web.workers import Workers

FIRST_SAMPLE = "digit-detector"
ELSEWHERE = "started elsewhere"
_KEPT_ANSWERS = 24
# In a portal many workers on few cores must not keep the pages waiting, and long jobs neither the
# questions that pages ask.
_NICENESS = {"local": 5, "portal": 15, "long": 19}
_CLUSTER_VARIABLE = "QUANT_INSPECTOR_CLUSTER"
# A job that does not stop by itself is ended by force after two seconds.
_STOP_SECONDS = 10.0
_RUN_ID = re.compile("[0-9a-f-]{1,64}")
# Of a workspace, what a share lets somebody do: to look, and to edit.
_LOOKS = frozenset(
    {
        *("root", "cache", "pair", "draft", "recipes", "search", "run", "runs", "comparison"),
        *("comparison_stamp", "run_folder", "detail", "note"),
    }
)
_EDITS = frozenset({"save_draft", "save_note"})
# Jobs that only look, which whoever sees a run may have run; every other one changes it.
_LOOKING = frozenset(
    {
        *(tasks.describe_model, tasks.diagnose_run, tasks.export_exclusions, tasks.graph_of_run),
        *(tasks.inspect_tensor, tasks.list_nodes, tasks.list_options, tasks.list_tensors),
        *(tasks.preprocess_presets, tasks.preview_feed, tasks.preview_list, tasks.propose_free),
    }
)
# Jobs for the user's own workspace, whatever is looked at.
_INTO_OWN = frozenset({tasks.load_pair, tasks.load_sample})

_P = ParamSpec("_P")
_log = logging.getLogger("inspector.web")


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """What stays of a job that was stopped before its end.

    Attributes:
        sentence: what it is, for its owner.
        page: where it is started again, and then goes on or begins anew; "" for no page.
    """

    sentence: str
    page: str = ""


_UNCHANGED = "Nothing was changed; the models and their feeds are still there."
# The jobs that count against a user's limit and are remembered over a restart of the server. The
# others answer questions of a page, which asks them again.
_JOBS = {
    tasks.load_pair: Kept(
        sentence="The pair was not made; the files are still there.", page="models"
    ),
    tasks.load_sample: Kept(sentence="The pair was not made.", page="models"),
    tasks.requantize: Kept(
        sentence="The run was not made; the ticked nodes are kept.", page="exclusions"
    ),
    tasks.free_in_file: Kept(
        sentence="The run was not made; the ticked nodes are kept.", page="exclusions"
    ),
    tasks.search_list: Kept(
        sentence="Every list that was tried is kept, and the next search goes on from there.",
        page="exclusions",
    ),
    tasks.try_recipes: Kept(
        sentence="Every recipe that was tried is kept, and the next try goes on with the others.",
        page="recipes",
    ),
    tasks.measure_run: Kept(
        sentence="Every node that was measured is kept, and the next time goes on from there.",
        page="graph",
    ),
    tasks.profile_run: Kept(sentence=_UNCHANGED, page="overview"),
    tasks.isolate: Kept(sentence=_UNCHANGED, page="overview"),
    tasks.rematch: Kept(sentence="The matches are what they were before.", page="tensors"),
}
# Those that add a run, with its file.
_STORING = frozenset({tasks.load_pair, tasks.load_sample, tasks.requantize, tasks.free_in_file})


def _new_worker(role: str) -> Worker:
    found = identity.settings()
    limits: dict[str, Any] = (
        {"memory_bytes": found.job_memory_bytes, "seconds": found.job_seconds}
        if found.is_portal
        else {}
    )
    kind = "local" if not found.is_portal else "long" if role == "main" else "portal"
    return Worker(
        niceness=_NICENESS[kind],
        preload=("inspector.workbench",),
        # Nothing that a job does needs it, but a Dask cluster, to which it hands the work on.
        network=bool(os.environ.get(_CLUSTER_VARIABLE)),
        **limits,
    )


_workers = Workers(_new_worker)
_start_lock = threading.Lock()
_started: set[Path] = set()


def own_root() -> Path:
    """The folder of the user's own workspace, absolute. Ends the page where nobody is signed in."""
    user, data = identity.require(), identity.settings().data
    if user == identity.LOCAL or data is None:
        return store.default_root().absolute()
    return hosting.workspace_folder(data, user.key)


def root() -> Path:
    """The folder of the workspace that is looked at: another user's where the address holds a run
    that is shared with this one, else the user's own. Ends the page where nobody is signed in."""
    return access().root


def is_signed_in() -> bool:
    """Whether the user is one of several, who had to sign in."""
    return identity.current_user() not in (None, identity.LOCAL)


def guard() -> None:
    """Ends the page, with the sign-in on it, where nobody is signed in."""
    identity.require()


@st.cache_resource(show_spinner=False, max_entries=256)
def _workspace(folder: str) -> Workspace:
    return Workspace(Path(folder))


def own_workspace() -> Workspace:
    """The user's own workspace: where models are loaded, whatever is looked at."""
    return _workspace(str(own_root()))


def workspace() -> Workspace:
    """The workspace that is looked at; of another user's, the shared pair and nothing else.

    What may not be changed is refused when its method is asked for (`ReportError`).
    """
    found = access()
    if not found.owner:
        return _workspace(str(found.root))
    return _shared_workspace(str(found.root), found.pair_id, found.editable)


def worker() -> Worker:
    """The user's long-lived worker, started with its first job; also for what others share."""
    return _worker("main")


def _worker(role: str) -> Worker:
    return _workers.get(own_root(), role)


def is_busy(root: Path) -> bool:
    """Whether a worker of this process runs for a workspace."""
    return _workers.is_busy(root)


def workers() -> tuple[Worker, ...]:
    """Every worker of this process."""
    return _workers.all()


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
        _note_presence()
        _workers.keep_tidy(idle_seconds=found.worker_idle_seconds, most=found.workers)
        return
    with _start_lock:
        if own_root() in _started:
            return
        _started.add(own_root())
    own = worker()
    own.start()
    busy = any(job.state in ACTIVE for job in own.jobs())
    if own_workspace().current_pair() is None and not busy:
        open_sample(FIRST_SAMPLE)


def _note_presence() -> None:
    """Notes that the user is here: a workspace that nobody opens expires."""
    user = identity.require()
    try:
        index().saw(user.key, user.address)
    except ReportError as error:  # a full disk is no reason to show nothing
        _log.warning("who is here cannot be noted: %s", error)


def open_sample(name: str, purpose: str = "") -> None:
    """Loads a bundled pair. Arguments: its name, and what for, as `submit` takes it."""
    submit(
        tasks.load_sample,
        own_root(),
        name,
        # A path of the server is not for its users to see.
        private=identity.settings().is_portal,
        title=f"Comparing the sample {name}",
        purpose=purpose,
    )


# ── whose workspace it is, and what the user may do there ────────────────────────────────────


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """Whose workspace the address leads to.

    Attributes:
        root: its folder.
        owner: the address of whose it is; "" for the user's own.
        pair_id: the one pair of it that is shared; "" for the user's own.
        editable: whether the user may tick nodes, make runs and write notes there.
    """

    root: Path
    owner: str = ""
    pair_id: str = ""
    editable: bool = True


@functools.lru_cache(maxsize=4)
def _index(data: Path) -> Index:
    return Index(data)


def _records() -> Index:
    """Where jobs are remembered: the portal's index, or one in the only workspace."""
    found = identity.settings()
    portal = found.is_portal and found.data is not None
    return index() if portal else _index(store.default_root().absolute())


def begin_records() -> None:
    """At the start of the server: what was under way when it ended has stopped."""
    try:
        stopped = _records().stop_unfinished()
    except ReportError as error:
        _log.error("stopped jobs cannot be told: %s", error)
        return
    if stopped:
        metrics.jobs_ended.labels("stopped").inc(stopped)
        _log.warning("%d jobs were stopped by the end of the server", stopped)


def index() -> Index:
    """The index of the portal's data folder.

    Raises:
        ValueError: local mode has none.
    """
    data = identity.settings().data
    if data is None or not identity.settings().is_portal:
        raise ValueError("local mode has no index")
    return _index(data)


def access() -> Access:
    """Whose workspace the run in the address is in. Ends the page where nobody is signed in.

    It is looked up anew each time: a share that was taken back ends at once. A run that is not
    shared is sought in the user's own workspace, so the answer is that of one that does not exist.
    """
    own, run_id = own_root(), st.query_params.get("run", "")
    data = identity.settings().data
    if not is_signed_in() or data is None or not _RUN_ID.fullmatch(run_id):
        return Access(root=own)
    if _run_file(own, run_id).is_file():
        return Access(root=own)
    shares = [
        (share, folder)
        for share in index().shares_to(identity.require().key)
        if _is_of_pair(folder := hosting.workspace_folder(data, share.owner_key), run_id, share)
    ]
    if not shares:
        return Access(root=own)
    share, folder = max(shares, key=lambda each: each[0].editable)
    return Access(
        root=folder,
        # An index that was lost has forgotten who came.
        owner=index().address_of(share.owner_key) or "somebody",
        pair_id=share.pair_id,
        editable=share.editable,
    )


def _run_file(folder: Path, run_id: str) -> Path:
    return folder / "runs" / run_id / "run.json"


def _is_of_pair(folder: Path, run_id: str, share: Share) -> bool:
    """Whether a workspace has a run, of the pair that is shared."""
    if not _run_file(folder, run_id).is_file():
        return False
    return _pair_of(str(folder), run_id) == share.pair_id


@functools.lru_cache(maxsize=4096)
def _pair_of(folder: str, run_id: str) -> str:
    """The id of a run's pair, which never changes; "" where the run cannot be read."""
    try:
        return _workspace(folder).run(run_id).pair_id
    except InspectorError:
        return ""


def may_edit() -> bool:
    """Whether the user may change what is looked at."""
    return access().editable


def edit_hint(otherwise: str = "") -> str:
    """What a button's tooltip says, in markdown: why it cannot be pressed, or what it does."""
    found = access()
    return (
        otherwise if found.editable else f"{words.md_text(found.owner)} lets you look, not change."
    )


def require_edit() -> None:
    """Refuses what changes the workspace that is looked at.

    Raises:
        ReportError: another user shares it to be looked at only.
    """
    found = access()
    if not found.editable:
        raise _only_looked_at(found.owner)


def _only_looked_at(owner: str = "") -> ReportError:
    return ReportError(
        f"{owner or 'Its owner'} shares this run to be looked at, not to be changed",
        hint="Ask for a share that lets you edit, or load the models into your own workspace.",
    )


class _SharedWorkspace(Workspace):
    """Another user's workspace: one pair of it, and only what a share allows.

    What is not named here is refused, so that what `Workspace` learns later is as well.
    """

    def __init__(self, root: Path, pair_id: str, editable: bool) -> None:
        self._pair_id = pair_id
        self._allowed = _LOOKS | (_EDITS if editable else frozenset())
        super().__init__(root)

    def __getattribute__(self, name: str) -> Any:
        # Private names are what the allowed methods are made of.
        if not name.startswith("_") and name not in self._allowed:
            raise _only_looked_at()
        return super().__getattribute__(name)

    def _file(self, kind: str, entry_id: str) -> Path:
        path = super()._file(kind, entry_id)
        of = entry_id if kind == "pair" else _pair_of(str(self.root), entry_id)
        # A name that nothing has: the refusal is that of a run that does not exist.
        return path if of == self._pair_id else path.with_name("not-shared")


@st.cache_resource(show_spinner=False, max_entries=256)
def _shared_workspace(folder: str, pair_id: str, editable: bool) -> Workspace:
    return _SharedWorkspace(Path(folder), pair_id, editable)


def reporting(function: Callable[_P, None]) -> Callable[_P, None]:
    """The function, which keeps an error for the page instead of ending the page with it.

    For what a button does: the page comes after it.
    """

    @functools.wraps(function)
    def reporting(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except InspectorError as error:
            report(error)

    return reporting


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
    st.session_state.pop("run-until-in-address", None)
    if st.query_params.get("run") != run_id:
        st.query_params["run"] = run_id


def _open_run(run_id: str) -> None:
    """Selects a run until the browser has taken it in: a click that came before it did brings the
    address of then along, and the new run would not be shown."""
    if st.query_params.get("run") == run_id:
        st.session_state.pop("run-until-in-address", None)
    else:
        st.session_state["run-until-in-address"] = run_id
        st.query_params["run"] = run_id


def address() -> dict[str, str]:
    """The query of links between pages: run, tensor and filters go along."""
    return {key: value for key, value in st.query_params.items() if value}


def is_local() -> bool:
    """Whether paths on this machine may be opened: in local mode that nobody else reaches."""
    found = identity.settings()
    return not (found.is_portal or found.network)


# ── jobs ─────────────────────────────────────────────────────────────────────────────────────


def submit(
    function: Callable[..., Any], *args: Any, title: str, purpose: str = "", **kwargs: Any
) -> str | None:
    """The id of a new job of the user's; None where it was refused: the page says why.

    It goes on when its tab is closed, and is remembered when the server ends.

    Args:
        function: of `tasks`, one of `_JOBS`.
        args: its arguments.
        title: of the job.
        purpose: for which this tab waits for it, see `follow`; "" for none.
        kwargs: its further arguments.
    """
    try:
        job_id = _begin(function, *args, title=title, **kwargs)
    except InspectorError as error:
        report(error)
        return None
    if purpose:
        follow(job_id, purpose)
    return job_id


def _begin(function: Callable[..., Any], *args: Any, title: str, **kwargs: Any) -> str:
    """The id of a new job.

    Raises:
        InspectorError: the user may not start it, has too many jobs or no room for what it makes.
    """
    found, user = identity.settings(), identity.require()
    _check_job(function, kwargs)
    if found.is_portal and function in _STORING:
        _check_room(function, found.quota_bytes)
    records, kept = _records(), _JOBS[function]
    keeps = json.dumps(
        {"sentence": kept.sentence, "page": kept.page, "run": kwargs.get("run_id", "")}
    )

    def on_begin(job_id: str) -> None:
        _note_job(job_id, function, kwargs)
        try:
            records.begin_job(job_id, user.key, title, keeps)
        except ReportError as error:
            if found.is_portal:
                raise
            _log.warning("a job is not remembered: %s", error)

    return _workers.submit(
        own_root(),
        "main",
        function,
        *args,
        most=found.jobs,
        title=title,
        on_begin=on_begin,
        on_end=functools.partial(_end, records),
        **kwargs,
    )


def _check_room(function: Callable[..., Any], quota_bytes: int) -> None:
    """Refuses a job whose run would have no room where it is kept.

    Raises:
        QuotaError: the workspace holds as much as one user may store.
    """
    found = access()
    if not found.owner or function in _INTO_OWN:
        store.check_quota(own_workspace(), quota_bytes)
        return
    try:
        store.check_quota(_workspace(str(found.root)), quota_bytes)
    except QuotaError:  # how much others store is not for this user to know
        raise QuotaError(
            f"the workspace of {found.owner}, where the run would be kept, is full",
            hint="Ask its owner to delete runs, or load the models into your own workspace.",
        ) from None


def _end(records: Index, job: JobStatus) -> None:
    """Remembers how a job ended. Called by a worker's thread, which belongs to no tab."""
    metrics.job_ended(job)
    records.end_job(job.id, job.state, told(job.error).message if job.error else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoppedJob:
    """A job that the end of the server has stopped.

    Attributes:
        title: what it was.
        sentence: what of it stays.
        page: where it is started again; "" for nowhere.
        run_id: of the run it was for; "" for none.
    """

    title: str
    sentence: str
    page: str
    run_id: str


def stopped_jobs() -> tuple[StoppedJob, ...]:
    """The user's jobs that the last end of the server has stopped, until they are dismissed."""
    found: tuple[StoppedJob, ...] | None = st.session_state.get("stopped")
    if found is None:  # there can be new ones only after a start, when every tab is new
        try:
            records = _records().stopped_jobs(identity.require().key)
        except ReportError as error:
            _log.warning("stopped jobs cannot be told: %s", error)
            records = ()
        kept = [(record.title, json.loads(record.keeps)) for record in records]
        found = tuple(
            StoppedJob(
                title=title, sentence=each["sentence"], page=each["page"], run_id=each["run"]
            )
            for title, each in kept
        )
        st.session_state["stopped"] = found
    return found


@reporting
def dismiss_stopped() -> None:
    """Does not tell of the stopped jobs any more, in no tab that is opened from now on."""
    st.session_state["stopped"] = ()
    _records().dismiss_stopped(identity.require().key)


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
        full = "disk space" in hint
        needs = "its disk is full" if full else "its settings have to change"
        hint = f"Tell whoever runs this server: {needs}."
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
    return worker().find(job_id) or _workers.ended(job_id)


def settle() -> str | None:
    """Takes in what finished since the last look: opens new runs, keeps what went wrong.

    Returns the run of a pair that was loaded just now: its overview is to be opened.
    """
    loaded = None
    if "run-until-in-address" in st.session_state:
        _open_run(st.session_state["run-until-in-address"])
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
            if purpose != ELSEWHERE or own_workspace().current_pair() is None:
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
                _open_run(str(status.result))
    return loaded


def has_news() -> bool:
    """Whether a job that this tab waits for has ended since `settle`: no job is shown for it now,
    and nothing else would run the page again."""
    jobs = [_job(job_id) for job_id in _followed()]
    return any(job is None or job.state not in ACTIVE for job in jobs)


# In a thread that runs a whole page: whether to run it again at its end.
_whole_run = threading.local()


@contextmanager
def whole_run() -> Iterator[None]:
    """Around what a whole page shows. At its end the page runs again where there is news, or where
    `run_again` was called."""
    _whole_run.again = False
    try:
        yield
        again = _whole_run.again or has_news()
    finally:
        del _whole_run.again
    if again:
        st.rerun()


def run_again() -> None:
    """Runs the whole page again: from a part of it that runs by itself at once, else at its end.

    A run that is broken off passes over a button that was pressed and stands further down.
    """
    if hasattr(_whole_run, "again"):
        _whole_run.again = True
    else:
        st.rerun()


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
    around. One of `_JOBS` is started as `submit` does.

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
        if function in _JOBS:
            role = "main"
            try:
                job_id = _begin(function, *args, title=title, **kwargs)
            except InspectorError as error:
                return Answer(error=told(error))
        else:
            _check_job(function, kwargs)
            role = role or ("looking" if active_jobs() else "main")
            job_id = _worker(role).submit(function, *args, title=title, **kwargs)
            _note_job(job_id, function, kwargs)
        answers[key] = f"{role}:{job_id}"
        while len(answers) > _KEPT_ANSWERS:
            del answers[next(iter(answers))]
        entry = f"{role}:{job_id}"
    role, job_id = entry.split(":", 1)
    try:
        now = _worker(role).take(job_id, patience)
    except RunError:  # its worker was ended since
        ended = _workers.ended(job_id)
        if ended is None:  # and the answer with it
            answers.pop(key, None)
            return ask(key, function, *args, title=title, role=role, patience=patience, **kwargs)
        now = ended
    if now.state in ACTIVE:
        return Answer(job=now)
    if now.state == "cancelled":
        answers.pop(key, None)
        return Answer(error=InspectorError(f"Stopped: {now.title}.", hint="Ask again."))
    answer = Answer(value=now.result, error=told(now.error) if now.error else None)
    answers[key] = answer
    return answer


def _check_job(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuses a job that the user may not have run where the address leads.

    Raises:
        ReportError: it changes what is only to be looked at, or is for a run that is not shared.
    """
    if not access().owner or function in _INTO_OWN:
        return
    if function not in _LOOKING:
        require_edit()
    if "run_id" in arguments:
        workspace().run(arguments["run_id"])


@dataclass(frozen=True, kw_only=True, slots=True)
class _JobPlace:
    """Where a job runs, and which run of which workspace it is for."""

    user_root: Path
    root: Path
    run_id: str
    looks: bool


# The last jobs of this process. What ended long ago needs not be found.
_job_places: OrderedDict[str, _JobPlace] = OrderedDict()
_KEPT_PLACES = 2000


def _note_job(job_id: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    _job_places[job_id] = _JobPlace(
        user_root=own_root(),
        root=own_root() if function in _INTO_OWN else root(),
        run_id=str(arguments.get("run_id", "")),
        looks=function in _LOOKING,
    )
    while len(_job_places) > _KEPT_PLACES:
        _job_places.popitem(last=False)


def stop_jobs(
    run_ids: Collection[str] | None, *, keep: Callable[[str, bool], bool] | None = None
) -> None:
    """Stops the jobs that anybody has under way in the user's own workspace; waits for their end.

    Args:
        run_ids: only those for these runs; None for every job, also those that load models.
        keep: whether a job of another user goes on, by the key of this user and whether the job
            only looks; None to stop everybody's, the user's own among them.
    """
    own = own_root()
    stopped = []
    for job_id, place in list(_job_places.items()):
        if place.root != own or (run_ids is not None and place.run_id not in run_ids):
            continue
        if keep is not None and (place.user_root == own or keep(place.user_root.name, place.looks)):
            continue
        found = _workers.holder(place.user_root, job_id)
        if found is None:
            continue
        with suppress(RunError):  # it is forgotten at this moment
            if found.status(job_id).state in ACTIVE:
                found.cancel(job_id)
                stopped.append((found, job_id))
    for found, job_id in stopped:
        with suppress(RunError):
            found.wait(job_id, _STOP_SECONDS)


def look_seconds() -> float:
    """Seconds between two looks of a page at a job; more where many pages look at once."""
    return 1.0 if identity.settings().is_portal else 0.4


def status(job_id: str) -> JobStatus:
    """How a job of the user's is doing, whichever worker has it.

    Raises:
        RunError: there is none of this id, or it ended long ago.
    """
    return (_workers.holder(own_root(), job_id) or worker()).status(job_id)


def forget(key: tuple[Hashable, ...]) -> None:
    """Drops an answer, so that the next `ask` puts the question again."""
    _answers().pop(key, None)


def tensor_detail(view: View) -> Answer:
    """The binned values of the selected tensor, from the store or from a worker."""
    kind = "activation" if view.kind == "activation" else "weight"
    stored = store.detail_key(kind, view.tensor, _partner(view))
    kept = workspace().detail(view.run.id, stored)
    if kept is not None:
        forget_tensor(view)
        return Answer(value=kept)
    answer = ask(
        _tensor_key(view),
        tasks.inspect_tensor,
        root(),
        run_id=view.run.id,
        tensor=view.tensor,
        kind=kind,
        title="Reading the tensor's values",
    )
    if answer.waiting or answer.error is not None:
        return answer
    forget_tensor(view)  # it has just been stored, or was and is not any more
    return tensor_detail(view)


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
        job = _worker(role).find(job_id)
        if job is not None and job.state == "queued":
            _worker(role).cancel(job_id)
            _answers().pop(key, None)


def forget_tensor(view: View) -> None:
    """Lets the next `tensor_detail` try again."""
    forget(_tensor_key(view))


def _tensor_key(view: View) -> tuple[Hashable, ...]:
    return "tensor", view.run.id, view.tensor, _partner(view)


def _partner(view: View) -> str:
    """The selected tensor's name in the quantized model."""
    return view.record.quantized_name if view.record else ""


def stop_job(job_id: str) -> None:
    """Asks for the end of a job of the user's."""
    (_workers.holder(own_root(), job_id) or worker()).cancel(job_id)


# ── ranges set by hand, not applied yet: on disk, so that a reload keeps them ────────────────


def overrides(view: View) -> list[dict[str, Any]]:
    """The grids set by hand for the next run: those of the shown run, and what was changed since,
    which only who may edit sees.

    Each as `TensorOverride.to_json` writes it.
    """
    kept: Mapping[str, Any] = _tried(view.pair.id).get("overrides", {})
    own = kept.get(view.run.id, view.run.recipe.get("overrides", ()))
    return [dict(each) for each in own]


@reporting
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


def _tried(pair_id: str) -> Mapping[str, Any]:
    """What is ticked and set by hand for a pair and not applied yet; nothing for who may only look:
    they see the run as it is, and not what somebody else is trying at the moment."""
    return workspace().draft(pair_id) if may_edit() else {}


def draft(pair_id: str, applied: tuple[str, ...] = ()) -> Draft:
    """The ticked nodes of a pair; those of the shown run where none were ticked yet."""
    kept = _tried(pair_id)
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


@reporting
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


@reporting
def toggle(pair_id: str, old: Draft, node: str) -> None:
    """Ticks a node, or unticks it."""
    kept = tuple(each for each in old.nodes if each != node)
    tick(pair_id, old, kept if node in old.nodes else (*kept, node))


@reporting
def undo(pair_id: str, old: Draft) -> None:
    """Goes back to the set before."""
    if old.undo:
        _keep(
            pair_id,
            Draft(nodes=old.undo[-1], undo=old.undo[:-1], redo=(old.nodes, *old.redo)),
        )


@reporting
def redo(pair_id: str, old: Draft) -> None:
    """Takes an `undo` back."""
    if old.redo:
        _keep(
            pair_id,
            Draft(nodes=old.redo[0], undo=(*old.undo, old.nodes), redo=old.redo[1:]),
        )
