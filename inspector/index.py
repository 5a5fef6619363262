"""The index of a data folder: who uses the portal, what is shared with whom, which jobs are open.

Apart from the workspaces, because these facts lie between people: a share is looked up before it
is known whose workspace to open. Models, feeds, runs and their figures are never in here; each
workspace holds its own as plain files. So a lost index costs the shares, the times of sign-in and
the records of jobs, and nothing that was computed.

One SQLite file, `<data>/index.sqlite`, with a write-ahead log: any number of threads and processes
may use it, and a process that is killed leaves either the whole of a change or nothing. Such a log
does not work on a network file system.

People are compared by `hosting.user_key`, so upper and lower case are the same person, and a share
for somebody who never signed in works once they do.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from inspector.errors import ReportError
from inspector.hosting import user_key
from inspector.store import utc_now

FILE_NAME = "index.sqlite"
SAW_SECONDS = 60.0
KEPT_JOB_DAYS = 30
_BUSY_SECONDS = 20.0
# "QInd", which tells our files from other programs' in the header of the file.
_APPLICATION = 0x51496E64
_VERSION = 1
_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, fact TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE users (
    key TEXT PRIMARY KEY,
    address TEXT NOT NULL,
    first_seen TEXT NOT NULL,
    last_seen TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE shares (
    run_id TEXT NOT NULL,
    receiver TEXT NOT NULL, -- the key of a user; '' for everyone
    pair_id TEXT NOT NULL,
    owner_key TEXT NOT NULL,
    address TEXT NOT NULL,
    editable INTEGER NOT NULL,
    created TEXT NOT NULL,
    PRIMARY KEY (run_id, receiver)
) WITHOUT ROWID;
CREATE INDEX shares_of_receiver ON shares (receiver);
CREATE INDEX shares_of_owner ON shares (owner_key);
CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    user_key TEXT NOT NULL,
    title TEXT NOT NULL,
    keeps TEXT NOT NULL,
    state TEXT NOT NULL,
    why TEXT NOT NULL,
    begun TEXT NOT NULL,
    ended TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX jobs_of_user ON jobs (user_key, state);
"""
_SHARE = "run_id, pair_id, owner_key, address, editable, created"
_JOB = "id, user_key, title, keeps, state, why, begun, ended"


@dataclass(frozen=True, kw_only=True, slots=True)
class UserRecord:
    """Somebody who signed in.

    Attributes:
        key: from `hosting.user_key`.
        address: as last signed in with.
        first_seen: ISO 8601, UTC.
        last_seen: ISO 8601, UTC; up to a minute early.
    """

    key: str
    address: str
    first_seen: str
    last_seen: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A run that its owner lets somebody see, with its pair: models, feeds and the pair's runs.

    Attributes:
        run_id: the run whose link was given away.
        pair_id: the pair that the share covers.
        owner_key: whose workspace it is in.
        address: who may see it, as the owner wrote it; "" for everyone who signs in.
        editable: whether they may change the pair as well.
        created: ISO 8601, UTC.
    """

    run_id: str
    pair_id: str
    owner_key: str
    address: str
    editable: bool
    created: str


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """A job as the index remembers it over a restart of the server.

    Attributes:
        id: of the job.
        user_key: whose it is.
        title: as shown.
        keeps: what of an unfinished job stays, as shown; "" for nothing.
        state: "begun", or what it ended as; "stopped" where the server ended before it did.
        why: it ended so; "" where that needs no words.
        begun: ISO 8601, UTC.
        ended: ISO 8601, UTC; "" before.
    """

    id: str
    user_key: str
    title: str
    keeps: str
    state: str
    why: str
    begun: str
    ended: str


class Index:
    """The index in a data folder; made where there is none.

    All methods may be called from any thread, and by several processes at once. Each is one short
    transaction: when it returns, what it wrote is on disk.

    Args:
        data: the folder; made when it does not exist.

    Raises:
        ReportError: the file is damaged or another program's, cannot be written, or the disk is
            full. Every method raises it as well.
    """

    def __init__(self, data: Path) -> None:
        self.path = Path(data).absolute() / FILE_NAME
        self._idle: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        # SQLite lets those who wait sleep longer and longer; threads here come one after another.
        self._turn = threading.Lock()
        with self._telling():
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                # Its log gets the same mode from SQLite. Only a new file is opened and closed here:
                # to close one that SQLite has open in this process would give up its locks.
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            except FileExistsError:
                pass
            except OSError as error:
                raise ReportError(
                    f"{FILE_NAME} cannot be opened: {error.strerror or error}",
                    hint="Set QUANT_INSPECTOR_DATA to a folder you may write to.",
                ) from error
            connection = self._open()
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._idle.append(connection)

    def close(self) -> None:
        """Closes the file; the next call opens it again."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def __del__(self) -> None:
        for connection in getattr(self, "_idle", ()):
            connection.close()

    # ── people ───────────────────────────────────────────────────────────────────────────────

    def saw(self, key: str, address: str) -> None:
        """Notes that a user is here; written at most once a minute.

        Args:
            key: from `hosting.user_key`.
            address: as they signed in.
        """
        now = datetime.now(UTC)
        with self._reading() as reader:
            row = reader.execute(
                "SELECT address, last_seen FROM users WHERE key = ?", (key,)
            ).fetchone()
        if row is not None and row[0] == address:
            since = (now - datetime.fromisoformat(row[1])).total_seconds()
            if 0 <= since < SAW_SECONDS:
                return
        with self._writing() as writer:
            writer.execute(
                "INSERT INTO users VALUES (?1, ?2, ?3, ?3) "
                "ON CONFLICT (key) DO UPDATE SET address = ?2, last_seen = ?3",
                (key, address, now.isoformat(timespec="microseconds")),
            )

    def address_of(self, key: str) -> str:
        """The address a user last signed in with; "" where they never did."""
        with self._reading() as reader:
            row = reader.execute("SELECT address FROM users WHERE key = ?", (key,)).fetchone()
        return str(row[0]) if row else ""

    def users(self) -> tuple[UserRecord, ...]:
        """Everybody who signed in, the latest first."""
        with self._reading() as reader:
            rows = reader.execute(
                "SELECT key, address, first_seen, last_seen FROM users ORDER BY last_seen DESC, key"
            ).fetchall()
        return tuple(
            UserRecord(key=key, address=address, first_seen=first, last_seen=last)
            for key, address, first, last in rows
        )

    def begin_anew(self) -> None:
        """Has everybody's time until they expire begin now, as after a backup was restored."""
        with self._writing() as writer:
            writer.execute("UPDATE users SET last_seen = ?", (utc_now(),))

    def since(self) -> str:
        """When this index was made: what happened before is unknown to it. ISO 8601, UTC."""
        with self._reading() as reader:
            row = reader.execute("SELECT fact FROM facts WHERE name = 'made'").fetchone()
        return str(row[0])

    # ── shares ───────────────────────────────────────────────────────────────────────────────

    def share(
        self, run_id: str, pair_id: str, owner_key: str, address: str, editable: bool
    ) -> None:
        """Lets somebody see a run; changes the share where they may see it already.

        Whether the run is the owner's is for the caller to know; a share of the same run by
        somebody else stays as it is.

        Args:
            run_id: of the owner.
            pair_id: of the run.
            owner_key: from `hosting.user_key`.
            address: who may see it; "" for everyone who signs in.
            editable: whether they may change the pair as well.
        """
        with self._writing() as writer:
            writer.execute(
                "INSERT INTO shares (run_id, receiver, pair_id, owner_key, address, editable, "
                "created) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (run_id, receiver) DO UPDATE "
                "SET pair_id = excluded.pair_id, address = excluded.address, "
                "editable = excluded.editable WHERE owner_key = excluded.owner_key",
                (run_id, _receiver(address), pair_id, owner_key, address, editable, utc_now()),
            )

    def unshare(self, run_id: str, address: str) -> None:
        """Takes a share back; nothing happens where there is none."""
        with self._writing() as writer:
            writer.execute(
                "DELETE FROM shares WHERE run_id = ? AND receiver = ?",
                (run_id, _receiver(address)),
            )

    def shares(self, run_id: str) -> tuple[Share, ...]:
        """Who may see a run, the first given first; those of its pair's other runs apart."""
        return self._shares("run_id = ?", run_id)

    def shares_of_pair(self, pair_id: str) -> tuple[Share, ...]:
        """Who may see any run of a pair, and so the whole of it, the first given first."""
        return self._shares("pair_id = ?", pair_id)

    def shares_to(self, key: str) -> tuple[Share, ...]:
        """What others share with a user by name or with everyone, the first given first."""
        return self._shares("receiver IN (?, '') AND owner_key != ?", key, key)

    def shared_with(self, key: str, run_id: str) -> Share | None:
        """The share by which a user may see somebody else's run; None where there is none.

        Where a user may see it both by name and as one of everyone, the share that allows more.
        Never one of the user's own: an owner needs none.

        Args:
            key: from `hosting.user_key`.
            run_id: whose link was given away; the pair's other runs are not known here.
        """
        found = self._shares(
            "run_id = ? AND receiver IN (?, '') AND owner_key != ?", run_id, key, key
        )
        return max(found, key=lambda share: (share.editable, share.address != ""), default=None)

    def _shares(self, where: str, *values: str) -> tuple[Share, ...]:
        with self._reading() as reader:
            rows = reader.execute(
                f"SELECT {_SHARE} FROM shares WHERE {where} ORDER BY created, run_id, receiver",
                values,
            ).fetchall()
        return tuple(
            Share(
                run_id=run_id,
                pair_id=pair_id,
                owner_key=owner_key,
                address=address,
                editable=bool(editable),
                created=created,
            )
            for run_id, pair_id, owner_key, address, editable, created in rows
        )

    def forget_run(self, run_id: str) -> None:
        """Takes back every share of a run."""
        with self._writing() as writer:
            writer.execute("DELETE FROM shares WHERE run_id = ?", (run_id,))

    def forget_pair(self, pair_id: str) -> None:
        """Takes back every share of a pair's runs."""
        with self._writing() as writer:
            writer.execute("DELETE FROM shares WHERE pair_id = ?", (pair_id,))

    def forget_user(self, key: str) -> None:
        """Removes a user, what they share and their jobs.

        What others share with them stays: it is the others' to take back.
        """
        with self._writing() as writer:
            _forget_user(writer, key)

    @contextmanager
    def leaving(self, key: str, before: str) -> Iterator[bool]:
        """Whether a user was not seen since `before`; forgets them if nothing goes wrong inside.

        Until the end nobody can be noted as here: who comes back at this moment is seen either
        before, and stays, or after, and begins anew.

        Args:
            key: from `hosting.user_key`.
            before: ISO 8601, UTC.
        """
        with self._writing() as writer:
            row = writer.execute("SELECT last_seen FROM users WHERE key = ?", (key,)).fetchone()
            gone = row is None or str(row[0]) < before
            yield gone
            if gone:
                _forget_user(writer, key)

    # ── jobs ─────────────────────────────────────────────────────────────────────────────────

    def begin_job(self, job_id: str, user_key: str, title: str, keeps: str = "") -> None:
        """Remembers a job that was queued; one of the same id is begun again.

        Args:
            job_id: of the job.
            user_key: whose it is.
            title: as shown.
            keeps: what stays if it is stopped, as shown; "" for nothing.
        """
        with self._writing() as writer:
            writer.execute(
                f"INSERT OR REPLACE INTO jobs ({_JOB}) VALUES (?, ?, ?, ?, 'begun', '', ?, '')",
                (job_id, user_key, title, keeps, utc_now()),
            )

    def end_job(self, job_id: str, state: str, why: str = "") -> None:
        """Remembers how a job ended; nothing happens where it is not known.

        Args:
            job_id: of the job.
            state: "done", "failed", "cancelled" or "stopped".
            why: it ended so, as shown.
        """
        with self._writing() as writer:
            writer.execute(
                "UPDATE jobs SET state = ?, why = ?, ended = ? WHERE id = ?",
                (state, why, utc_now(), job_id),
            )

    def stop_unfinished(self, why: str = "The server was restarted.") -> int:
        """How many jobs were under way when the server ended: they are stopped now.

        For the start of the one server of this data folder. Jobs that ended a month ago are
        forgotten.
        """
        old = (datetime.now(UTC) - timedelta(days=KEPT_JOB_DAYS)).isoformat(timespec="microseconds")
        with self._writing() as writer:
            writer.execute("DELETE FROM jobs WHERE state != 'begun' AND ended < ?", (old,))
            return writer.execute(
                "UPDATE jobs SET state = 'stopped', why = ?, ended = ? WHERE state = 'begun'",
                (why, utc_now()),
            ).rowcount

    def stopped_jobs(self, user_key: str) -> tuple[JobRecord, ...]:
        """The jobs of a user that were stopped and not dismissed yet, the latest begun first."""
        with self._reading() as reader:
            rows = reader.execute(
                f"SELECT {_JOB} FROM jobs WHERE user_key = ? AND state = 'stopped' "
                "ORDER BY begun DESC, id",
                (user_key,),
            ).fetchall()
        return tuple(
            JobRecord(
                id=job_id,
                user_key=key,
                title=title,
                keeps=keeps,
                state=state,
                why=why,
                begun=begun,
                ended=ended,
            )
            for job_id, key, title, keeps, state, why, begun, ended in rows
        )

    def dismiss_stopped(self, user_key: str) -> None:
        """Forgets the stopped jobs of a user, who was told of them."""
        with self._writing() as writer:
            writer.execute("DELETE FROM jobs WHERE user_key = ? AND state = 'stopped'", (user_key,))

    # ── the file ─────────────────────────────────────────────────────────────────────────────

    def _open(self) -> sqlite3.Connection:
        # Used by one thread at a time, but not always by the same one.
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        # With a log the default would lose the last changes when the machine loses power.
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Makes the tables of a new file; refuses what is not ours before anything is changed."""
        # Read at one moment: another process may be about to make the file.
        connection.execute("BEGIN")
        known = self._is_ours(connection)
        connection.execute("COMMIT")
        if known:
            return
        end = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                # Two processes that make the file at once: SQLite does not wait here by itself.
                if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() > end:
                    raise
                time.sleep(0.01)
        with _transaction(connection):
            if not self._is_ours(connection):
                for statement in _TABLES.split(";\n"):
                    connection.execute(statement)
                connection.execute("INSERT INTO facts VALUES ('made', ?)", (utc_now(),))
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {_VERSION}")

    def _is_ours(self, connection: sqlite3.Connection) -> bool:
        """Whether the file has our tables; False for an empty one."""
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if (application, version) == (_APPLICATION, _VERSION):
            return True
        if application == _APPLICATION:
            raise ReportError(
                f"{FILE_NAME} has version {version}, expected {_VERSION}",
                hint="Start the version of Quant Inspector that wrote it.",
            )
        if application or connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise self._damaged("it is a database of another program")
        return False

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None:
            connection = self._open()
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            self._idle.append(connection)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._telling(), self._connected() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with (
            self._turn,
            self._telling(),
            self._connected() as connection,
            _transaction(connection),
        ):
            yield connection

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            name = getattr(error, "sqlite_errorname", "")
            # SQLITE_ERROR: a table of ours is not there.
            if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or name == "SQLITE_ERROR":
                raise self._damaged(str(error)) from error
            if name.startswith("SQLITE_BUSY"):
                raise ReportError(
                    f"{FILE_NAME} is in use by another program for over {_BUSY_SECONDS:.0f} s",
                    hint="Try again; end the program that holds it if this goes on.",
                ) from error
            if not isinstance(error, sqlite3.OperationalError):
                raise  # a mistake of ours
            raise ReportError(
                f"{FILE_NAME} cannot be written: {error}",
                hint="Free disk space or set QUANT_INSPECTOR_DATA to a folder you may write to.",
            ) from error

    def _damaged(self, why: str) -> ReportError:
        return ReportError(
            f"{FILE_NAME} is not a readable index: {why}",
            hint=f"Stop the server, restore {FILE_NAME} from a backup or move it out of "
            "QUANT_INSPECTOR_DATA together with its -wal and -shm files, and start the server: "
            "without it shares and notices of stopped jobs are lost, and nothing else.",
        )


def _receiver(address: str) -> str:
    return user_key(address) if address else ""


def _forget_user(writer: sqlite3.Connection, key: str) -> None:
    writer.execute("DELETE FROM users WHERE key = ?", (key,))
    writer.execute("DELETE FROM shares WHERE owner_key = ?", (key,))
    writer.execute("DELETE FROM jobs WHERE user_key = ?", (key,))


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    # The right to write is taken at once: a later change of mind could fail without waiting.
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
