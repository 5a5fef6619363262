"""What a server says of itself: figures for a monitor, its log, its audit trail."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from inspector import audit, logs
from inspector.hosting import user_key
from inspector.web import metrics, tasks
from tests.browser import ended, free_port
from tests.hosted import (
    ADA,
    BOB,
    COOKIE_SECRET,
    HEADER,
    Portal,
    fill,
    portal_variables,
    sign_in,
    watermark,
)
from tests.openid import running_provider
from tests.samples import ROOT
from tests.stream import Tab

SECRET = "head/Concat_3 weighs 0.12345"

# ---------------------------------------------------------------------------------- the log


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The log as JSON, and everything as it was afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("inspector")
    before = root.handlers[:], root.level, ours.level
    loggers = {
        each: (each.handlers[:], each.propagate)
        for each in logging.root.manager.loggerDict.values()
        if isinstance(each, logging.Logger)
    }
    hooks = warnings.showwarning, sys.excepthook, threading.excepthook, sys.unraisablehook
    stream = io.StringIO()
    try:
        logs.write_json(stream)
        yield stream
    finally:
        root.handlers[:], root.level, ours.level = before
        for logger, (handlers, propagate) in loggers.items():
            logger.handlers[:], logger.propagate = handlers, propagate
        warnings.showwarning, sys.excepthook, threading.excepthook, sys.unraisablehook = hooks


def lines_of(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def failing() -> None:
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        raise ValueError(f"a value of {SECRET}") from error


def test_an_exception_is_logged_by_its_type_and_places_without_its_text(log: io.StringIO) -> None:
    for name in ("inspector.web", "uvicorn.error", "streamlit.runtime", "asyncio"):
        try:
            failing()
        except ValueError:
            logging.getLogger(name).exception("a page failed")
    for line in lines_of(log):
        assert list(line) == ["time", "level", "logger", "message", "exception"]
        assert (line["level"], line["message"]) == ("error", "a page failed")
        outer, inner = line["exception"]  # type: ignore[misc]
        assert (outer["type"], inner["type"]) == ("ValueError", "KeyError")
        assert re.fullmatch(r"tests/test_operations\.py:\d+ failing", outer["places"][-1])
    assert len(lines_of(log)) == 4
    assert SECRET not in log.getvalue()


def test_of_a_librarys_message_only_what_stands_in_its_source_is_logged(log: io.StringIO) -> None:
    logging.getLogger("some.library").warning("the node %s is odd\nfuture: %s", SECRET, SECRET)
    logging.getLogger("inspector.jobs").warning("%d jobs were stopped", 3)
    logging.getLogger("httpx").info("GET %s", SECRET)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = logs._warned  # which the block before has put aside
        warnings.warn(f"overflow in {SECRET}", RuntimeWarning, stacklevel=1)
    library, own, warned = lines_of(log)
    assert library["message"] == "the node %s is odd"
    assert own["message"] == "3 jobs were stopped"
    assert re.fullmatch(r"RuntimeWarning at test_operations\.py:\d+", str(warned["message"]))
    assert SECRET not in log.getvalue()


def test_what_nobody_catches_is_logged_and_does_not_print(
    log: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    thread = threading.Thread(target=failing)
    thread.start()
    thread.join()
    try:
        failing()
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    assert [line["level"] for line in lines_of(log)] == ["error", "critical"]
    assert all(line["exception"] for line in lines_of(log))
    assert capsys.readouterr() == ("", "")
    assert SECRET not in log.getvalue()


def test_a_line_stays_one_line_whatever_is_in_it(log: io.StringIO) -> None:
    text = "a\nb\r\u2028\u202e\0{}" + "x" * 5000
    logging.getLogger("inspector").warning("%s", text)
    (line,) = lines_of(log)
    assert line["message"] == text[: logs.LONGEST_MESSAGE]
    assert log.getvalue().isascii()


# ------------------------------------------------------------------------------ the audit trail


@pytest.fixture
def trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(audit, "_denied", audit._Limit(lambda: 0.0))
    audit.keep_in(tmp_path)
    yield tmp_path / audit.FILE_NAME
    audit.keep_in(None)


def read(trail: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in trail.read_text(encoding="ascii").splitlines()]


def test_an_event_is_one_line_that_its_owner_alone_may_read(trail: Path) -> None:
    audit.audit("share", user="Ada@exämple.org", run="1\n2", with_="\u202e" * 999, editable=True)
    audit.audit("delete", user="", what="run")
    share, delete = read(trail)
    assert list(share) == ["time", "event", "user", "run", "with_", "editable"]
    assert (share["user"], share["run"], share["editable"]) == ("Ada@exämple.org", "1\n2", True)
    assert len(str(share["with_"])) == audit.LONGEST_FIELD + 1
    assert (delete["event"], delete["user"]) == ("delete", "")
    assert stat.S_IMODE(trail.stat().st_mode) == 0o600


def test_a_trail_that_is_renamed_begins_anew(trail: Path) -> None:
    audit.audit("share", user=ADA)
    trail.rename(trail.with_name("audit.jsonl.1"))
    audit.audit("delete", user=ADA)
    assert [each["event"] for each in read(trail)] == ["delete"]


def test_half_a_line_of_a_full_disk_does_not_spoil_the_next(trail: Path) -> None:
    trail.write_text('{"time": "2026')
    audit.audit("share", user=ADA)
    half, line = trail.read_text().splitlines()
    assert half == '{"time": "2026'
    assert json.loads(line)["event"] == "share"


def test_a_disk_that_fails_does_not_break_what_was_done(
    trail: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit.audit("share", user=ADA)
    kept = trail.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, content: write(file, content[:3]))
    audit.audit("delete", user=ADA)
    monkeypatch.undo()
    assert trail.read_bytes() == kept
    trail.unlink()
    trail.mkdir()
    with caplog.at_level(logging.INFO, "inspector.audit"):
        audit.audit("delete", user=ADA)
    said = [record.getMessage() for record in caplog.records]
    assert said[-2:] == ["delete", "the audit line of 'delete' cannot be written: Is a directory"]


def test_refusals_are_limited_for_each_sender_and_for_all_and_the_rest_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(audit, "_denied", audit._Limit(lambda: now))
    audit.keep_in(tmp_path)
    try:
        for _ in range(50):
            audit.audit("denied", user="", peer="10.0.0.1", what="path")
        audit.audit("denied", user=ADA, what="path")
        found = read(tmp_path / audit.FILE_NAME)
        assert len(found) == audit.DENIED_OF_ONE + 1
        assert found[-1]["left_out"] == 50 - audit.DENIED_OF_ONE
        for number in range(1000):
            audit.audit("denied", user="", peer=f"10.0.1.{number}", what="path")
        assert len(read(tmp_path / audit.FILE_NAME)) == audit.DENIED_OF_ALL
        for _ in range(30):
            audit.audit("share", user=ADA)
        assert len(read(tmp_path / audit.FILE_NAME)) == audit.DENIED_OF_ALL + 30
        now = audit.PERIOD_SECONDS
        audit.audit("denied", user="", peer="10.0.0.1", what="path")
        last = read(tmp_path / audit.FILE_NAME)[-1]
        assert last["left_out"] == 1000 - (audit.DENIED_OF_ALL - audit.DENIED_OF_ONE - 1)
    finally:
        audit.keep_in(None)


# ------------------------------------------------------------------------------------ figures


def test_an_address_counts_as_one_of_a_fixed_list_of_kinds() -> None:
    pages = ("", "overview")
    expected = {
        "": "page",
        "overview": "page",
        "overview/": "page",
        "overview/x": "other",
        "ada@example.org": "other",
        "inspector": "other",
        "inspector/held/TOKEN": "download",
        "inspector/upload/TOKEN/1": "upload",
        "inspector/nothing/x": "other",
        "_stcore/stream": "streamlit",
        "static/js/x.js": "static",
        "media/x.png": "media",
        "healthz": "health",
        "auth/login": "sign-in",
    }
    assert {name: metrics.kind_of(name, pages) for name in expected} == expected


# ------------------------------------------------------------------------------- real servers


@contextlib.contextmanager
def logging_portal(data: Path, *, openid: bool) -> Iterator[tuple[Portal, Path]]:
    """A portal and the file that gets its standard error."""
    port, base = free_port(), "/tools/qi"
    address = f"http://127.0.0.1:{port}{base}"
    log = data.parent / f"log-{port}"
    with contextlib.ExitStack() as stack:
        variables, options = portal_variables(data), []
        provider = None
        if openid:
            provider = stack.enter_context(running_provider(f"{address}/oauth2callback"))
            secrets = data.parent / "secrets.toml"
            secrets.write_text(provider.secrets_toml(COOKIE_SECRET), encoding="utf-8")
            variables["QUANT_INSPECTOR_AUTH"] = "oidc"
            options = ["--secrets.files", str(secrets)]
        errors = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port),
             "--server.headless", "true", "--server.baseUrlPath", base, *options],
            cwd=ROOT, env={**os.environ, **variables},
            stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
        stack.callback(ended, process)
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{address}/healthz").status_code == 200:
                    break
            time.sleep(0.05)
        yield Portal(address=address, data=data, provider=provider), log


def figures(portal: Portal) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels."""
    answer = httpx.get(f"{portal.address}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


@pytest.mark.slow
def test_a_portal_is_watched_without_a_sign_in_and_without_a_name(tmp_path: Path) -> None:
    data = tmp_path / "SERVERFOLDER"
    run_id = fill(data, ADA)
    with logging_portal(data, openid=False) as (portal, log):
        before = figures(portal)
        assert before["quant_inspector_websockets",] == 0
        with portal.tab(ADA) as tab:
            assert watermark(ADA).encode() in tab.open("overview", query=f"run={run_id}")
            with portal.client(ADA) as client:
                assert client.get("/inspector/held/TOKENTOKEN").status_code == 404
                field = re.search(rb"/inspector/upload/[\w-]{20,}", tab.open("models"))
                assert field is not None
                sent = {"Upload-Name": "a.npy", "Upload-Length": "2000", "Upload-Offset": "0"}
                part = f"{field[0].decode()}/0123456789abcdef"
                assert client.put(part, headers=sent, content=b"x" * 1000).status_code < 300
            tab.press(tasks.SAMPLES["digit-detector"])
            deadline = time.monotonic() + 240
            while not (during := figures(portal))["quant_inspector_jobs_ended_total", "done"]:
                assert time.monotonic() < deadline
                time.sleep(0.2)
            assert during["quant_inspector_websockets",] == 1
            text = httpx.get(f"{portal.address}/metrics").text
        after = figures(portal)
        assert after["quant_inspector_websockets",] == 0
    assert during["quant_inspector_requests_total", "download", "404"] == 1
    assert during["quant_inspector_received_bytes_total", "upload"] == 1000
    assert during["quant_inspector_workers", "no"] + during["quant_inspector_workers", "yes"] >= 1
    assert during["quant_inspector_workers_resident_memory_bytes",] > 20e6
    assert during["process_resident_memory_bytes",] > 20e6
    assert during["quant_inspector_job_seconds_count",] == 1
    assert during["quant_inspector_disk_bytes", "free"] > 0
    for secret in ("ada", user_key(ADA), run_id, "SERVERFOLDER", "markof", "TOKENTOKEN", "gemm"):
        assert secret not in text.lower().replace("serverfolder", "SERVERFOLDER")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert watermark(ADA) not in log.read_text()
    plain = json.dumps([line for line in lines if "audit" not in line])
    assert "TOKENTOKEN" not in plain
    assert ADA not in plain


@pytest.mark.slow
def test_who_signs_in_and_out_and_is_refused_is_written_down_once(tmp_path: Path) -> None:
    data = tmp_path / "data"
    fill(data, ADA)
    with logging_portal(data, openid=True) as (portal, log):
        cookies, _ = sign_in(portal.address, ADA)
        with Tab(portal.address, cookies=cookies) as tab:
            tab.open("overview")
            tab.open("tensors")
        with httpx.Client(base_url=portal.address, cookies=cookies) as client:
            client.get("/overview")
            client.get("/media/0123456789abcdef0123456789abcdef.png")
            client.get("/overview/%2e%2e/%252e%252e/etc/passwd")
            client.put("/inspector/upload/x/1", headers={"Origin": "https://evil.example"})
            client.get("/auth/logout")
        httpx.get(f"{portal.address}/overview")
        httpx.get(f"{portal.address}/inspector/held/TOKENTOKEN")
        httpx.get(f"{portal.address}/oauth2callback?code=forged&state=forged")
        assert portal.provider is not None
        portal.provider.claims[BOB] = {"email_verified": False}
        sign_in(portal.address, BOB)
        found = read(data / audit.FILE_NAME)
    events = [(each["event"], each["user"], each.get("status"), each.get("what")) for each in found]
    assert events == [
        ("sign-in", ADA, None, None),
        ("denied", ADA, 404, "media"),
        ("denied", ADA, 404, "/tools/qi/overview/../%2e%2e/etc/passwd"),
        ("denied", ADA, 403, "upload"),
        ("sign-out", ADA, None, None),
        ("denied", "", 401, "download"),
        ("denied", "", None, "sign-in"),
        ("denied", "", None, "sign-in"),
    ]
    assert {each["peer"] for each in found} == {"127.0.0.1"}
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["audit"] for line in logged if "audit" in line] == found
    assert ADA not in json.dumps([line for line in logged if "audit" not in line])
    assert "TOKENTOKEN" not in log.read_text()


@pytest.mark.slow
def test_with_a_header_a_sign_in_is_the_first_request_of_somebody(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with logging_portal(data, openid=False) as (portal, _):
        for address in (ADA, BOB, ADA.upper(), ADA):
            for path in ("/", "/_stcore/metrics"):
                httpx.get(f"{portal.address}{path}", headers={HEADER: address})
        httpx.get(f"{portal.address}/_stcore/metrics")
        found = read(data / audit.FILE_NAME)
    assert [(each["event"], each["user"]) for each in found] == [
        ("sign-in", ADA),
        ("sign-in", BOB),
        ("denied", ""),
    ]


def test_of_a_job_that_crashes_nothing_is_logged_that_its_model_may_hold() -> None:
    code = (
        "from inspector import logs; from inspector.jobs import Worker\n"
        "from tests import job_samples\n"
        "logs.write_json()\n"
        "with Worker() as worker:\n"
        "    for job in (job_samples.print_and_read, job_samples.fail_unexpectedly):\n"
        "        job = worker.submit(job, title='the model conv_2')\n"
        "        worker.wait(job, 60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *others, line = [json.loads(line) for line in done.stderr.splitlines()]
    assert line["message"] == "a job stopped on an exception"
    assert line["exception"][0]["type"] == "KeyError"
    assert line["exception"][0]["places"][-1].endswith(" fail_unexpectedly")
    assert "conv_" not in done.stderr
    assert "printed by" not in done.stderr
    assert all(other["level"] == "info" for other in others)


@pytest.mark.parametrize("made", [True, False])
def test_a_data_folder_that_cannot_be_written_stops_the_start(tmp_path: Path, made: bool) -> None:
    data = tmp_path / "data"
    if made:
        data.mkdir()
        (data / audit.FILE_NAME).mkdir()
    else:
        data.write_text("a file")
    done = subprocess.run(
        [sys.executable, "-c", "from inspector.web import portal; portal.middleware()"],
        cwd=ROOT, env={**os.environ, **portal_variables(data)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("Error: QUANT_INSPECTOR_DATA is ")
    assert hint.startswith("Hint: Set QUANT_INSPECTOR_DATA")
