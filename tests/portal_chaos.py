"""A portal that is struck at random moments: its processes killed, its disk filled up.

Each round does one thing as a user does it (an upload with its comparison, a quantization, a row of
saves), strikes in the middle, brings the server back where it is gone, and looks whether all that
was ever confirmed is still there with the same bytes. "Confirmed" is what a page has shown or a
route has answered.

The data folder is a small disk of its own, in a mount namespace that no other process sees, so
that it can be full. Making one needs the rights of root.

python -m tests.portal_chaos [--rounds N] [--seed N]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import onnx
import psutil
from onnx import helper
from rich import box
from rich.console import Console
from rich.table import Table
from websockets.exceptions import WebSocketException

from inspector.store import RunRecord, Workspace
from tests.browser import ended, free_port, started
from tests.hosted import ADA, Portal, portal_variables, watermark, workspace_of
from tests.samples import ROOT, array, floats, model, save
from tests.stream import PATIENCE_SECONDS, UploadRefused, Visitor

VICTIMS = ("web process", "worker", "disk")
MOMENTS = ("upload", "quantization", "save")
DISK_BYTES = 400 << 20
LAYERS, WIDTH, SAMPLES = 5, 256, 8
# The strike comes within so many seconds from the begin, about as long as each takes.
WITHIN = {"upload": 3.0, "quantization": 2.0, "save": 2.0}
FULL = re.compile(rb"[Nn]o space left|disk is full|disk has no space|disk space|cannot store")
_OWN_ENTRY = re.compile(r"[0-9a-f]{32}")
_CHECK = """
import contextlib, sqlite3, sys
with contextlib.closing(sqlite3.connect(sys.argv[1], timeout=20)) as connection:
    print(connection.execute("PRAGMA integrity_check").fetchone()[0])
"""
_LOST = (OSError, EOFError, TimeoutError, WebSocketException, httpx.HTTPError)


def chain(mark: str, seed: int) -> onnx.ModelProto:
    """Gemm after Gemm; about a megabyte of weights."""
    tensors = ["x", *(f"{mark}_h{at}" for at in range(LAYERS - 1)), "y"]
    names = [f"{mark}_w{at}" for at in range(LAYERS)]
    return model(
        [
            helper.make_node(
                "Gemm", [tensors[at], names[at]], [tensors[at + 1]], f"{mark}_gemm{at}"
            )
            for at in range(LAYERS)
        ],
        [("x", [1, WIDTH])],
        [("y", [1, WIDTH])],
        [array(w, floats((WIDTH, WIDTH), seed * 100 + at, 0.1)) for at, w in enumerate(names)],
    )


@dataclass
class Confirmed:
    """What the user was told is kept.

    Attributes:
        runs: ids of runs, with the digest of each as it was when it was first seen on disk.
        drafts: the ticked nodes of pairs; more than one possibility where the answer to the last
            tick never came.
        notes: on runs, likewise.
    """

    runs: dict[str, str] = field(default_factory=dict)
    drafts: dict[str, list[frozenset[str]]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Round:
    """What came of one strike.

    Attributes:
        victim: of `VICTIMS`.
        moment: of `MOMENTS`.
        delay: seconds from the begin of what was to be struck.
        outcome: what the user saw.
        back_seconds: until the page was there again.
        faults: what is wrong afterwards.
    """

    victim: str
    moment: str
    delay: float
    outcome: str
    back_seconds: float
    faults: list[str]


class Struck:
    """A portal on a small disk, and one user of it.

    Args:
        disk: where the disk is mounted, as the server sees it.
        holder: a process that lives in the disk's mount namespace; 0 for a folder of ours, which
            cannot be filled up.
        folder: of ours, for the files to upload.
        seed: of the moments and of what is done.
    """

    def __init__(self, disk: Path, holder: int, folder: Path, seed: int) -> None:
        self._random = random.Random(seed)
        self._holder, self._folder, self._port = holder, folder, free_port()
        self._server_data = disk / "data"
        # The same folder, as this process sees it.
        self.data = Path(f"/proc/{holder}/root{disk}/data") if holder else self._server_data
        self.data.mkdir(exist_ok=True)
        self.confirmed = Confirmed()
        self._process: subprocess.Popen[bytes] | None = None
        # Called where what is to be struck begins.
        self._middle: Callable[[], None] = _nothing
        self._made = itertools.count(1)
        self._mark = watermark(ADA)
        self._filler = self.data.parent / "filler"
        self.start()
        with self._tab() as tab:
            self._upload(tab)

    @property
    def workspace(self) -> Workspace:
        return Workspace(workspace_of(self.data, ADA))

    @property
    def _inside(self) -> list[str]:
        """What runs a command where the disk is."""
        if not self._holder:
            return []
        return ["nsenter", f"--mount=/proc/{self._holder}/ns/mnt", f"--wdns={ROOT}", "--"]

    def start(self) -> None:
        self._process = started(
            ROOT,
            portal_variables(self._server_data),
            port=self._port,
            within=self._inside,
        )

    def stop(self) -> None:
        if self._process is not None:
            ended(self._process)

    @contextlib.contextmanager
    def _tab(self) -> Iterator[Visitor]:
        portal = Portal(address=f"http://127.0.0.1:{self._port}", data=self.data)
        with Visitor(portal.address, **portal.identity(ADA)) as tab:
            tab.visit("models")
            tab.finish()
            yield tab

    # What a user does; each raises `Refused` with what the page says, or what a lost server raises.

    def _upload(self, tab: Visitor) -> None:
        """Uploads a new pair with feeds, compares it, and sees its overview."""
        seed = next(self._made)
        stem = f"{self._mark}x{seed}"
        float_path = save(chain(self._mark, seed), self._folder / f"{stem}.onnx")
        feeds = self._folder / f"{stem}.npz"
        np.savez(feeds, x=floats((SAMPLES, WIDTH), seed)[:, None])
        tab.visit("models")
        tab.finish()
        self._middle()
        try:
            tab.upload("upload-float", [float_path], pace=_slowly)
            tab.upload("upload-inputs", [feeds], pace=_slowly)
        except UploadRefused as refused:
            raise Refused(str(refused).encode()) from refused
        if "compare" not in tab.ids:
            raise Refused(tab.finish())
        shown = self._finished(tab, lambda: tab.click("compare"))
        if stem.encode() not in shown or "run" not in tab.query:
            raise Refused(shown)
        self._confirm_run(tab.query["run"])

    def _quantize(self, tab: Visitor) -> None:
        """Ticks a node or unticks it, makes the file anew, and sees the new run."""
        before, node = self._choose(tab)
        self._tick(tab, before, node)
        record = self.workspace.run(before)
        if self._ticked(record.pair_id) == set(record.exclusions):
            # This run was made so, and cannot be made again; with any further node it can.
            at = (int(node[-1]) + 1) % (LAYERS - 1)
            self._tick(tab, *self._choose(tab, before, at))
        tab.visit("exclusions")
        tab.finish()
        self._middle()
        shown = self._finished(tab, lambda: tab.click("requantize"))
        if tab.query["run"] == before:
            raise Refused(shown)
        self._confirm_run(tab.query["run"])

    def _save(self, tab: Visitor) -> None:
        """Ticks a node, writes a note, takes the tick back: until the time of the strike is over.

        Another one is ticked all the while: nothing ticked would be taken for a lost file.
        """
        at = self._random.randrange(LAYERS - 1)
        run, node = self._choose(tab, at=at)
        if node not in self._ticked(self.workspace.run(run).pair_id, run):
            self._tick(tab, run, node)
        run, node = self._choose(tab, run, (at + 1) % (LAYERS - 1))
        self._middle()
        until = time.monotonic() + WITHIN["save"] + 0.5
        while time.monotonic() < until:
            self._tick(tab, run, node)
            self._write_note(tab, run)

    def _choose(self, tab: Visitor, run: str = "", at: int | None = None) -> tuple[str, str]:
        """Selects a node of a run, any by default; the id of the run and the node's name."""
        run = run or self._random.choice(sorted(self.confirmed.runs))
        at = self._random.randrange(LAYERS - 1) if at is None else at
        tab.visit("overview", f"run={run}&tensor={self._mark}_h{at}")
        shown = tab.finish()
        tab.errors.clear()
        if "overview-float" not in tab.ids:
            raise Refused(shown)
        return run, f"{self._mark}_gemm{at}"

    def _tick(self, tab: Visitor, run: str, node: str) -> None:
        """Ticks the selected node, or unticks it, and sees that it was done."""
        pair = self.workspace.run(run).pair_id
        (now,) = self.confirmed.drafts.setdefault(pair, [self._ticked(pair, run)])
        wanted = now ^ {node}
        self.confirmed.drafts[pair] = [now, wanted]
        shown = tab.click("overview-float")
        says = b"Undo float" if node in wanted else b"Leave in float"
        if tab.errors or says not in shown:
            if tab.errors:  # it was not done, and the page says so
                self.confirmed.drafts[pair] = [now]
            raise Refused(shown)
        self.confirmed.drafts[pair] = [wanted]

    def _write_note(self, tab: Visitor, run: str) -> None:
        """Writes a note on the selected run, and sees it on the page."""
        (now,) = self.confirmed.notes.setdefault(run, [self._note(run)])
        wanted = f"note number {next(self._made)}"
        tab.click("note-button")
        tab.choose("note-text", string_value=wanted)
        self.confirmed.notes[run] = [now, wanted]
        shown = tab.click("note-save")
        if tab.errors or wanted.encode() not in shown:
            if tab.errors:
                self.confirmed.notes[run] = [now]
            raise Refused(shown)
        self.confirmed.notes[run] = [wanted]

    def _note(self, run: str) -> str:
        found = self.workspace.note(run)
        return found.text if found else ""

    def _ticked(self, pair: str, run: str = "") -> frozenset[str]:
        """The ticked nodes on disk; where none ever were, those that the run left in float."""
        nodes = self.workspace.draft(pair).get("nodes")
        if nodes is None:
            nodes = self.workspace.run(run).exclusions if run else ()
        return frozenset(nodes)

    def _finished(self, tab: Visitor, click: Callable[[], bytes]) -> bytes:
        tab.errors.clear()
        click()
        return tab.finish(PATIENCE_SECONDS)

    def _confirm_run(self, run: str) -> None:
        self.confirmed.runs[run] = self._digest(run)

    def _digest(self, run: str) -> str:
        """Of the run's record, figures and model, and of the models and feeds it is made of."""
        workspace = self.workspace
        record: RunRecord = workspace.run(run)
        pair = workspace.pair(record.pair_id)
        files = [each for each in workspace.run_folder(run).iterdir() if each.is_file()]
        files = [each for each in files if each.name != "note.json"]
        files += [pair.float_model.path, Path(pair.inputs.path)]
        digest = hashlib.sha256()
        for each in sorted(files):
            digest.update(each.name.encode() + hashlib.sha256(each.read_bytes()).digest())
        return digest.hexdigest()

    # Strikes.

    @property
    def can_fill(self) -> bool:
        """Whether the disk is one that can be full."""
        return self._holder > 0

    def _strike(self, victim: str) -> None:
        assert self._process is not None
        if victim == "web process":
            self._process.kill()
        elif victim == "worker":
            for each in psutil.Process(self._process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGKILL)
        else:
            self._fill()

    def _fill(self) -> None:
        """Leaves at most a few pages of the disk."""
        facts = os.statvfs(self.data)
        left = self._random.choice((0, 0, 4096, 100_000))
        with self._filler.open("wb") as file, suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, max(1, facts.f_bavail * facts.f_frsize - left))

    # A round.

    def round(self, victim: str, moment: str) -> Round:
        delay = self._random.uniform(0.0, WITHIN[moment])
        act = {"upload": self._upload, "quantization": self._quantize, "save": self._save}[moment]
        faults: list[str] = []
        with contextlib.ExitStack() as stack:
            tab = stack.enter_context(self._tab())
            struck = threading.Timer(delay, self._strike, (victim,))
            self._middle = struck.start
            try:
                act(tab)
                outcome = "done"
            except Refused as refused:
                outcome = "told"
                text = refused.shown + "".join(tab.errors).encode()
                if victim == "disk" and not FULL.search(text):
                    faults.append(f"not told of the disk: {tab.errors}")
                if victim == "worker" and b"worker process ended" not in text:
                    faults.append(f"not told of the worker: {tab.errors}")
            except _LOST as error:
                outcome = f"lost ({type(error).__name__})"
                if victim != "web process":
                    faults.append(f"{error}")
            if struck.ident is None:
                faults.append("the middle was never reached")
            else:
                struck.join()
        self._middle = _nothing
        if victim == "disk":
            # One can still come and look.
            faults += self._unseen(full=True)
        self._filler.unlink(missing_ok=True)
        begin = time.monotonic()
        if victim == "web process":
            assert self._process is not None
            self._process.wait()
            self.start()
        faults += self.faults(restarted=victim == "web process")
        took = time.monotonic() - begin
        # Whatever it was, it can be done again.
        try:
            with self._tab() as tab:
                act(tab)
        except Refused as refused:
            words = re.findall(rb"[ -~]{12,200}", refused.shown)
            faults.append(f"cannot be done afterwards: {tab.errors} {words[-60:]}")
        except _LOST as error:
            faults.append(f"cannot be done afterwards: {type(error).__name__} {error}")
        return Round(
            victim=victim, moment=moment, delay=delay, outcome=outcome, back_seconds=took,
            faults=faults,
        )  # fmt: skip

    # What has to hold.

    def faults(self, *, restarted: bool) -> list[str]:
        """What is wrong on disk and on the page.

        Args:
            restarted: the server has begun anew, and nobody has opened a page since.
        """
        workspace = self.workspace
        found = [f"unreadable: {each.message}" for each in workspace.unreadable()]
        for run, digest in self.confirmed.runs.items():
            try:
                if self._digest(run) != digest:
                    found.append(f"run {run} has changed")
            except Exception as error:  # whatever it is, the run is not what it was
                found.append(f"run {run} is lost: {error}")
        for pair, known in list(self.confirmed.drafts.items()):
            now = self._ticked(pair)
            if now not in known:
                found.append(f"ticked are {sorted(now)}, expected {[sorted(k) for k in known]}")
            self.confirmed.drafts[pair] = [now]
        found += self._stray(workspace, restarted=restarted)
        for run, texts in list(self.confirmed.notes.items()):
            if self._note(run) not in texts:
                found.append(f"the note is {self._note(run)!r}, expected one of {texts}")
            self.confirmed.notes[run] = [self._note(run)]
        return [*found, *self.damaged(), *self._unseen()]

    def _stray(self, workspace: Workspace, *, restarted: bool) -> list[str]:
        """What lies in `temporary/` and must not, or would never be removed."""
        folder = workspace.root / "temporary"
        known = [each for each in folder.iterdir() if _OWN_ENTRY.fullmatch(each.name)]
        # What a tab has uploaded stays for as long as it is open, and some minutes.
        uploads = [] if restarted else list(folder.glob("upload-*"))
        found = [
            f"{each.name} is left in temporary/"
            for each in folder.iterdir()
            if each not in known and each not in uploads
        ]
        for entry in known:
            for each in (*entry.rglob("*"), entry):
                os.utime(each, (0, 0), follow_symlinks=False)
        Workspace(workspace.root)
        return found + [f"{e.name} stays in temporary/" for e in known if e.exists()]

    def damaged(self) -> list[str]:
        """Blobs that are not what their names say, and an index that is not whole."""
        found = []
        for blob in (self.data / "blobs").glob("*"):
            if hashlib.sha256(blob.read_bytes()).hexdigest() != blob.name:
                found.append(f"blob {blob.name} holds something else")
        if (self.data / "index.sqlite").exists():
            # SQLite finds its file by its true path, which only leads there from the inside.
            file = self._server_data / "index.sqlite"
            said = subprocess.run(
                [*self._inside, sys.executable, "-c", _CHECK, str(file)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if said.stdout.strip() != "ok":
                found.append(f"index: {said.stdout} {said.stderr[-300:]}")
        return found

    def _unseen(self, *, full: bool = False) -> list[str]:
        """Confirmed runs whose address does not open.

        Args:
            full: the disk is, so that what is new may not be kept, if the page says so.
        """
        found = []
        with self._tab() as tab:
            for run in list(self.confirmed.runs)[-3:]:
                tab.visit("overview", f"run={run}")
                shown = tab.finish()
                errors = [e for e in tab.errors if not (full and FULL.search(e.encode()))]
                tab.errors.clear()
                if errors or self._mark.encode() not in shown or run.encode() not in shown:
                    found.append(f"run {run} does not open: {errors}")
        return found


def _nothing() -> None: ...


def _slowly(_: int) -> None:
    time.sleep(0.25)


class Refused(Exception):
    """The page did not show what was asked for."""

    def __init__(self, shown: bytes) -> None:
        super().__init__(shown[-300:])
        self.shown = shown


class NoSmallDisk(Exception):
    """A disk that can be full cannot be made here."""


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[int]:
    """A process in whose mount namespace a small disk lies at the folder.

    Raises:
        NoSmallDisk: this process may not make one.
    """
    mount = (
        f"mount -t tmpfs -o size={DISK_BYTES} tmpfs '{folder}' && echo mounted && exec sleep inf"
    )
    try:
        holder = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", mount],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except FileNotFoundError as error:
        raise NoSmallDisk("there is no program unshare") from error
    with holder:
        try:
            assert holder.stdout is not None
            if holder.stdout.readline() != b"mounted\n":
                raise NoSmallDisk("a mount namespace of one's own needs the rights of root")
            yield holder.pid
        finally:
            holder.kill()


@contextlib.contextmanager
def struck_portal(folder: Path, seed: int, *, small: bool = True) -> Iterator[Struck]:
    """A portal to strike, on a small disk or in a folder of ours.

    Raises:
        NoSmallDisk: see `small_disk`.
    """
    for name in ("disk", "sources"):
        (folder / name).mkdir()
    with contextlib.ExitStack() as stack:
        holder = stack.enter_context(small_disk(folder / "disk")) if small else 0
        struck = Struck(folder / "disk", holder, folder / "sources", seed)
        stack.callback(struck.stop)
        yield struck


def order(rounds: int, seed: int) -> list[tuple[str, str]]:
    """Victims and moments: any three in a row have all of both, any nine every pair of them."""
    shuffled = random.Random(seed)
    found: list[tuple[str, str]] = []
    while len(found) < rounds:
        moments = shuffled.sample(MOMENTS, 3)
        for shift in range(3):
            some = list(zip(VICTIMS, moments[shift:] + moments[:shift], strict=True))
            found += shuffled.sample(some, 3)
    return found[:rounds]


def table(rounds: Sequence[Round]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("#", "struck", "in the middle of", "after", "the user saw", "back in", "faults"):
        shown.add_column(column)
    for at, each in enumerate(rounds, 1):
        shown.add_row(
            str(at), each.victim, each.moment, f"{each.delay:.2f} s", each.outcome,
            f"{each.back_seconds:.1f} s", "; ".join(each.faults)[:200] or "none",
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.portal_chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name, struck_portal(Path(name), given.seed) as struck:
        for victim, moment in order(given.rounds, given.seed):
            found.append(struck.round(victim, moment))
            each = found[-1]
            print(len(found), victim, moment, f"{each.delay:.2f}", each.outcome, each.faults)
        runs = len(struck.confirmed.runs)
    Console(width=160).print(table(found))
    faults = sum(len(each.faults) for each in found)
    print(f"seed {given.seed}: {len(found)} rounds, {runs} confirmed runs, {faults} faults")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
