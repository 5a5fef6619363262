"""The log of a server as JSON, one object per line, without what is in anybody's models.

Apart from the modules that log, because a message or a traceback of any library may quote a name
or a number of a model. So an exception is written by its type and the places it went through, never
by its text; of a library's own message only the part that stands in its source is written, without
the values filled in. Local mode keeps Python's usual lines: they are its one user's own.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
import warnings
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

LONGEST_MESSAGE = 2000
# Loggers whose messages are known to hold nothing of models.
_TRUSTED = ("inspector", "uvicorn")
# `extra=` of a record: what is written in the place of its message.
INSTEAD = "instead"
_log = logging.getLogger(__name__)


def trace_of(error: BaseException) -> list[dict[str, Any]]:
    """The exception and those it came from, latest first: `type`, and `places` outermost first.

    A place is "folder/file.py:line function". Texts of exceptions are left out.
    """
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        frames = traceback.StackSummary.extract(
            traceback.walk_tb(current.__traceback__), lookup_lines=False
        )
        places = [
            f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}"
            for frame in frames
        ]
        found.append({"type": type(current).__name__, "places": places})
        hidden = current.__suppress_context__
        current = current.__cause__ or (None if hidden else current.__context__)
    return found


class JsonLines(logging.Formatter):
    """A record as one line of JSON: `time`, `level`, `logger`, `message`, and what belongs to it.

    `exception` is as `trace_of` gives it, `audit` is the whole audit line.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record)[:LONGEST_MESSAGE],
        }
        audit = getattr(record, "audit", None)
        if audit is not None:
            line["audit"] = audit
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = trace_of(record.exc_info[1])
        line.update(getattr(record, INSTEAD, {}))
        return json.dumps(line)


def _message(record: logging.LogRecord) -> str:
    if record.name.split(".")[0] in _TRUSTED:
        return record.getMessage()
    return str(record.msg).split("\n", 1)[0]


def write_json(stream: TextIO | None = None) -> None:
    """From now on everything that is logged, warned or not caught is written as JSON.

    Args:
        stream: standard error by default.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    # Other libraries report every request they make.
    root.setLevel(logging.WARNING)
    logging.getLogger("inspector").setLevel(logging.INFO)
    for logger in list(logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            lead_to_root(logger)
    warnings.showwarning = _warned
    sys.excepthook = _not_caught
    threading.excepthook = _not_caught_in_thread
    sys.unraisablehook = _not_raised


def is_json() -> bool:
    """Whether the log is written as JSON."""
    return any(isinstance(each.formatter, JsonLines) for each in logging.getLogger().handlers)


def lead_to_root(logger: logging.Logger) -> None:
    """Takes away a logger's own way to the terminal: the root's handler writes for it."""
    for handler in logger.handlers[:]:
        if isinstance(handler, logging.StreamHandler) and not isinstance(
            handler, logging.FileHandler
        ):
            logger.removeHandler(handler)
    # One without any would fall back to lines of text. Requests are not logged: their addresses
    # hold tokens.
    logger.propagate = not logger.handlers and logger.name != "uvicorn.access"


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _log.warning("%s at %s:%d", category.__name__, Path(filename).name, lineno)


def _not_caught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        _log.critical("nobody caught an exception", exc_info=(kind, error, trace))


def _not_caught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        _log.error("a thread ended", exc_info=args.exc_value)


def _not_raised(args: sys.UnraisableHookArgs) -> None:
    _log.error("an exception could not be raised", exc_info=args.exc_value)
