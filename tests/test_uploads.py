"""Uploads: bytes go to the disk as they come, whatever is sent, and nothing is left behind."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import httpx
import onnx
import pytest
from playwright.sync_api import Browser, Page, expect
from starlette.applications import Starlette
from starlette.testclient import TestClient

from inspector.errors import QuotaError
from inspector.hosting import without_paths
from inspector.store import Workspace
from inspector.web import routes, uploads
from inspector.web.tasks import load_sample
from inspector.web.uploads import Inbox, Inboxes, Refused
from tests.benchmarks.upload import inbox_address, resident_mb, send
from tests.browser import ended, free_port, running_app, started
from tests.hosted import ADA, BOB, header_portal, workspace_of
from tests.samples import MODELS, ROOT, Clock, needs_models

LIMIT = 1_000_000
ID, OTHER = "0" * 32, "1" * 32
PATIENCE = 90_000


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def inbox(tmp_path: Path, clock: Clock) -> Inbox:
    return Inbox(tmp_path, limit_bytes=LIMIT, clock=clock)


def put(inbox: Inbox, content: bytes, name: str = "m.onnx", file_id: str = ID) -> None:
    inbox.add(inbox.begin(file_id, name, len(content), 0), content)


def files_in(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.rglob("*") if each.is_file())


def refusal(function: Callable[..., object], *arguments: object) -> Refused:
    with pytest.raises(Refused) as caught:
        function(*arguments)
    return caught.value


# ----------------------------------------------------------------------------------- the inbox


def test_a_file_is_there_once_its_last_byte_has_come(inbox: Inbox) -> None:
    content = os.urandom(1000)
    for offset in (0, 400, 800):
        assert inbox.files() == ()
        turn = inbox.begin(ID, "m.onnx", 1000, offset)
        here, done = inbox.add(turn, content[offset : offset + 400])
        assert (here, done) == (min(1000, offset + 400), offset == 800)
    (found,) = inbox.files()
    assert (found.name, found.size_bytes) == ("m.onnx", 1000)
    assert found.path.read_bytes() == content
    assert inbox.offset(ID) == (1000, True)
    assert files_in(inbox.folder) == ["m.onnx"]
    assert inbox.missing_bytes() == 0


def test_an_upload_goes_on_where_it_was_broken_off_and_nowhere_else(inbox: Inbox) -> None:
    inbox.add(inbox.begin(ID, "m.onnx", 10, 0), b"01234")
    for offset in (0, 4, 6, 10):
        wrong = refusal(inbox.begin, ID, "m.onnx", 10, offset)
        assert (wrong.status, wrong.offset) == (409, 5)
    for name, size in (("n.onnx", 10), ("m.onnx", 11)):
        assert refusal(inbox.begin, ID, name, size, 5).status == 400
    assert refusal(inbox.begin, OTHER, "n.onnx", 10, 5).status == 404
    inbox.add(inbox.begin(ID, "m.onnx", 10, 5), b"56789")
    assert inbox.files()[0].path.read_bytes() == b"0123456789"


def test_a_new_connection_ends_the_turn_of_a_dead_one(inbox: Inbox) -> None:
    first = inbox.begin(ID, "m.onnx", 10, 0)
    inbox.add(first, b"01234")
    second = inbox.begin(ID, "m.onnx", 10, 5)
    late = refusal(inbox.add, first, b"XXXXX")
    assert (late.status, late.offset) == (409, 5)
    inbox.add(second, b"56789")
    assert inbox.files()[0].path.read_bytes() == b"0123456789"


def test_an_answer_that_was_lost_can_be_asked_for_again(inbox: Inbox) -> None:
    put(inbox, b"0123456789")
    assert inbox.add(inbox.begin(ID, "m.onnx", 10, 10), b"") == (10, True)


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"", 422, "empty (0 bytes)"),
        (b"x" * (LIMIT + 1), 413, "1.00 MB is more than the 1.00 MB"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", 422, "git lfs pull"),
    ],
)
def test_what_is_no_file_to_load_is_told_and_removed(
    inbox: Inbox, content: bytes, status: int, said: str
) -> None:
    refused = refusal(put, inbox, content)
    assert refused.status == status
    assert said in refused.text
    assert inbox.files() == ()
    assert files_in(inbox.folder) == []
    put(inbox, b"good")  # the name is free again


def test_a_file_with_more_bytes_than_announced_is_removed(inbox: Inbox) -> None:
    turn = inbox.begin(ID, "m.onnx", 10, 0)
    inbox.add(turn, b"01234")
    assert refusal(inbox.add, turn, b"567890").status == 413
    assert files_in(inbox.folder) == []
    assert refusal(inbox.offset, ID).status == 404


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../x", "x"),
        ("/etc/passwd", "passwd"),
        ("C:\\boot\\m.onnx", "m.onnx"),
        ("..", "file"),
        ("\x00", "_"),
        ("a\nb\x1b[2J.onnx", "a_b_[2J.onnx"),
        ('<img src=x onerror="alert(1)">.onnx', "_img src=x onerror=_alert(1)__.onnx"),
        ("ä" * 300 + ".onnx", "ä" * 97 + ".onnx"),
        ("модель 1.onnx", "модель 1.onnx"),
    ],
)
def test_a_name_stays_a_name_in_the_inbox(inbox: Inbox, name: str, kept: str) -> None:
    put(inbox, b"content", name)
    (found,) = inbox.files()
    assert found.name == kept
    assert found.path == inbox.folder / "files" / kept
    assert found.path.read_bytes() == b"content"


def test_a_second_file_of_a_name_is_refused_until_the_first_is_removed(inbox: Inbox) -> None:
    put(inbox, b"first")
    again = refusal(put, inbox, b"second", "m.onnx", OTHER)
    assert again.status == 409
    assert again.offset is None
    assert refusal(put, inbox, b"second", "sub/m.onnx", OTHER).status == 409
    inbox.remove(ID)
    put(inbox, b"second", "m.onnx", OTHER)
    assert inbox.files()[0].path.read_bytes() == b"second"


def test_of_ten_thousand_files_the_first_are_taken(inbox: Inbox) -> None:
    for number in range(10_000):
        if number < uploads.MOST_FILES:
            put(inbox, b"x", f"{number}.npz", f"{number:032x}")
        else:
            assert refusal(put, inbox, b"x", f"{number}.npz", f"{number:032x}").status == 413
    assert len(inbox.files()) == uploads.MOST_FILES


def test_a_full_disk_is_told_and_nothing_stays(inbox: Inbox) -> None:
    turn = inbox.begin(ID, "m.onnx", 10, 0)
    turn.file.path.symlink_to("/dev/full")  # the kernel's own full disk
    full = refusal(inbox.add, turn, b"01234")
    assert full.status == 507
    assert "no space" in full.text
    assert files_in(inbox.folder) == []
    assert Path("/dev/full").exists()


def test_a_file_that_cannot_fit_on_the_disk_is_refused_at_once(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path, limit_bytes=10**15)
    assert refusal(inbox.begin, ID, "m.onnx", 10**15, 0).status == 507
    assert inbox.missing_bytes() == 0


def test_what_is_still_to_come_counts_towards_the_quota(tmp_path: Path) -> None:
    known = Inboxes()

    def check() -> None:
        if known.missing_bytes("ada") > 1000:
            raise QuotaError("You would store too much", hint="Delete a pair.")

    first, second = (Inbox(tmp_path, limit_bytes=LIMIT, check_quota=check) for _ in range(2))
    for each in (first, second):
        known.open("ada", each)
    turn = first.begin(ID, "a.onnx", 700, 0)
    refused = refusal(second.begin, ID, "b.onnx", 700, 0)
    assert (refused.status, refused.text) == (413, "You would store too much. Delete a pair.")
    first.add(turn, b"x" * 500)
    second.begin(ID, "b.onnx", 700, 0)


def test_nobody_takes_over_while_bytes_are_being_written(inbox: Inbox) -> None:
    turn = inbox.begin(ID, "m.onnx", 10, 0)
    os.mkfifo(turn.file.path)  # a disk that waits until somebody reads
    late: list[Refused] = []
    writing = threading.Thread(target=inbox.add, args=(turn, b"01234"))
    taking = threading.Thread(target=lambda: late.append(refusal(inbox.begin, ID, "m.onnx", 10, 0)))
    writing.start()
    wait_for(turn.file.lock.locked, 20)
    taking.start()
    with turn.file.path.open("rb") as reader:
        writing.join()
        taking.join()
        assert reader.read() == b"01234"
    assert [(each.status, each.offset) for each in late] == [(409, 5)]


def test_twenty_senders_at_once_get_in_each_others_way_and_the_bytes_do_not(inbox: Inbox) -> None:
    content, statuses = os.urandom(200_000), set[int]()

    def send_all() -> None:
        offset, done = 0, False
        while not done:
            try:
                turn = inbox.begin(ID, "m.onnx", len(content), offset)
                offset, done = inbox.add(turn, content[offset : offset + 1000])
            except Refused as refused:
                statuses.add(refused.status)
                offset = refused.offset or 0
                done = offset == len(content)

    threads = [threading.Thread(target=send_all) for _ in range(20)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that one is often stopped in the middle
    try:
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        sys.setswitchinterval(interval)
    assert inbox.files()[0].path.read_bytes() == content
    assert statuses <= {409}


# --------------------------------------------------------------------------- what goes, and when


def test_a_file_of_which_nothing_comes_any_more_is_removed(inbox: Inbox, clock: Clock) -> None:
    put(inbox, b"whole", "whole.onnx", OTHER)
    turn = inbox.begin(ID, "m.onnx", 10, 0)
    inbox.add(turn, b"01234")
    clock.now = uploads.IDLE_SECONDS - 1
    inbox.tidy()
    assert inbox.offset(ID) == (5, False)
    inbox.touch(turn)
    clock.now += uploads.IDLE_SECONDS - 1
    inbox.tidy()
    assert inbox.offset(ID) == (5, False)
    clock.now += 2
    inbox.tidy()
    assert refusal(inbox.offset, ID).status == 404
    assert refusal(inbox.add, turn, b"56789").status == 404
    assert files_in(inbox.folder) == ["whole.onnx"]


def test_an_inbox_goes_some_minutes_after_its_tab(tmp_path: Path, clock: Clock) -> None:
    known = Inboxes(clock)
    mine, other = (
        Inbox(tmp_path, session=name, limit_bytes=LIMIT, clock=clock) for name in ("a", "b")
    )
    token = known.open("ada", mine)
    known.open("ada", other)
    for each in (mine, other):
        put(each, b"content")
    clock.now = 10 * uploads.IDLE_SECONDS
    known.tidy(lambda _: True)
    clock.now += uploads.IDLE_SECONDS - 1
    known.tidy(lambda name: name == "a")
    assert known.find("ada", token) is mine
    assert other.files()
    clock.now += 2
    known.tidy(lambda name: name == "a")
    assert mine.files()
    assert files_in(tmp_path) == ["m.onnx"]
    known.close()
    assert list(tmp_path.iterdir()) == []


def test_a_user_has_so_many_inboxes_and_the_one_unused_longest_goes(
    tmp_path: Path, clock: Clock
) -> None:
    known = Inboxes(clock)
    made = [Inbox(tmp_path, limit_bytes=LIMIT, clock=clock) for _ in range(66)]
    tokens = []
    for number, each in enumerate(made):
        clock.now = number
        each.seen = clock.now
        tokens.append(known.open("ada", each))
        if number == 0:
            put(each, b"content")
        elif number == 1:
            known.open("bob", Inbox(tmp_path, limit_bytes=LIMIT, clock=clock))
    assert [known.find("ada", each) is not None for each in tokens] == [False] * 2 + [True] * 64
    assert files_in(tmp_path) == []


def test_an_inbox_is_found_by_its_own_user_alone(tmp_path: Path) -> None:
    known = Inboxes()
    token = known.open("ada", Inbox(tmp_path, limit_bytes=LIMIT))
    assert known.find("ada", token) is not None
    for user, wanted in (("bob", token), ("", token), ("ada", token[:-1]), ("ada", "")):
        assert known.find(user, wanted) is None


def test_what_a_killed_server_left_goes_and_what_another_one_holds_stays(tmp_path: Path) -> None:
    temporary = tmp_path / "users" / "ab" / "temporary"
    temporary.mkdir(parents=True)
    script = (
        "import sys, time; from pathlib import Path; from inspector.web.uploads import Inbox\n"
        "inbox = Inbox(Path(sys.argv[1]), limit_bytes=100)\n"
        "inbox.add(inbox.begin('0' * 32, 'm.onnx', 10, 0), b'01234')\n"
        "print('here', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(temporary)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        (temporary / "another").mkdir()
        assert uploads.remove_leftovers([tmp_path / "users" / "ab"]) == 0
        assert files_in(temporary) == [ID]
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert uploads.remove_leftovers([tmp_path / "users" / "ab"]) == 1
    assert [each.name for each in temporary.iterdir()] == ["another"]


def test_a_stored_file_is_the_workspaces_and_comes_back_beside_a_later_one(inbox: Inbox) -> None:
    put(inbox, b"model")
    (found,) = inbox.files()
    place = inbox.folder.parent / "stored" / "m.onnx"
    place.parent.mkdir()
    os.replace(found.path, place)
    inbox.stored({ID: place})
    assert inbox.files()[0].path == place
    inbox.gather()
    assert inbox.files()[0].path == place, "alone it stays where it is"
    put(inbox, b"weights", "m.data", OTHER)
    inbox.gather()
    assert files_in(inbox.folder) == ["m.data", "m.onnx"]
    assert {each.path.parent for each in inbox.files()} == {inbox.folder / "files"}
    inbox.clear()
    assert place.read_bytes() == b"model"
    assert not inbox.folder.exists()
    put(inbox, b"model")
    inbox.stored({ID: place})
    inbox.remove(ID)
    assert place.read_bytes() == b"model"
    assert inbox.files() == ()


def test_what_is_said_of_an_uploaded_file_names_no_folder(tmp_path: Path) -> None:
    inbox = Inbox(tmp_path / "users" / ("0" * 32) / "temporary", limit_bytes=LIMIT)
    put(inbox, b"content")
    text = f"{inbox.files()[0].path} is not an ONNX model; {inbox.folder / 'parts' / ID}"
    assert without_paths(text, tmp_path) == "m.onnx is not an ONNX model; parts/" + ID


# ------------------------------------------------------------------------------------- the route


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    token = uploads.inboxes().open("", Inbox(tmp_path, limit_bytes=LIMIT))
    base = f"http://testserver{routes.upload_address(token)}/"
    with TestClient(Starlette(routes=routes.served()), base_url=base) as found:
        yield found
    uploads.inboxes().close()


def about(size: int, offset: int = 0, name: str = "m.onnx") -> dict[str, str]:
    return {
        "Upload-Name": quote(name, safe=""),
        "Upload-Length": str(size),
        "Upload-Offset": str(offset),
    }


def test_each_chunk_is_acknowledged_with_what_is_here(client: TestClient, tmp_path: Path) -> None:
    content = os.urandom(5000)
    answer = client.put(ID, headers=about(5000), content=b"")
    assert answer.json() == {"offset": 0, "done": False, "name": "m.onnx", "text": ""}
    answer = client.put(ID, headers=about(5000), content=content[:3000])
    assert answer.json()["offset"] == 3000
    assert client.get(ID).json()["offset"] == 3000
    answer = client.put(ID, headers=about(5000, 2000), content=content[2000:])
    assert (answer.status_code, answer.json()["offset"]) == (409, 3000)
    answer = client.put(ID, headers=about(5000, 3000), content=content[3000:])
    assert answer.json() == {"offset": 5000, "done": True, "name": "m.onnx", "text": ""}
    (found,) = tmp_path.glob("upload-*/files/*")
    assert found.read_bytes() == content
    assert client.delete(ID).status_code == 200
    assert files_in(tmp_path) == []
    assert client.delete(ID).status_code == 404
    assert client.get(ID).json()["offset"] is None


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Upload-Length": None}, 400),
        ({"Upload-Length": ""}, 400),
        ({"Upload-Length": "-1"}, 400),
        ({"Upload-Length": "1e3"}, 400),
        ({"Upload-Length": "٣"}, 400),
        ({"Upload-Length": "9" * 16}, 400),
        ({"Upload-Length": "9" * 15}, 413),
        ({"Upload-Length": "4"}, 413),
        ({"Upload-Length": "0"}, 413),
        ({"Upload-Offset": None}, 400),
        ({"Upload-Offset": "0x0"}, 400),
        ({"Upload-Offset": "-1"}, 400),
        ({"Upload-Offset": "5", "Upload-Length": "20"}, 404),
        ({"Upload-Offset": "999999999999999"}, 413),
        ({"Upload-Name": None}, 400),
        ({"Upload-Name": ""}, 400),
        ({"Upload-Name": "%ff%fe"}, 400),
        ({"Upload-Name": "%ED%A0%80"}, 400),
        ({"Upload-Name": "%"}, 200),
    ],
)
def test_headers_that_are_malformed_are_refused(
    client: TestClient, tmp_path: Path, headers: dict[str, str | None], status: int
) -> None:
    given = {**about(5), **headers}
    sent = {key: value.encode() for key, value in given.items() if value is not None}
    answer = client.put(ID, headers=sent, content=b"12345")
    assert answer.status_code == status
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert answer.headers["cache-control"] == "no-store"
    assert len(files_in(tmp_path)) == (status == 200)


def test_a_header_that_comes_twice_is_refused(client: TestClient) -> None:
    twice = [*about(5).items(), ("Upload-Length", "5")]
    assert client.put(ID, headers=twice, content=b"12345").status_code == 400


@pytest.mark.parametrize("file_id", ["x", "0" * 65, "G" * 32, "..%2f..%2fx", "%00"])
def test_an_id_that_is_none_is_refused(client: TestClient, tmp_path: Path, file_id: str) -> None:
    answer = client.put(file_id, headers=about(5), content=b"12345")
    assert answer.status_code in (400, 404)
    assert files_in(tmp_path) == []


def test_a_body_that_goes_beyond_what_was_announced_is_cut_off(
    client: TestClient, tmp_path: Path
) -> None:
    # Without a length of the body: nothing tells before it has come.
    body = (b"x" * 100_000 for _ in range(40))
    answer = client.put(ID, headers=about(900_000), content=body)
    assert answer.status_code == 413
    assert files_in(tmp_path) == []


def test_an_inbox_is_emptied_at_once(client: TestClient, tmp_path: Path) -> None:
    for number in range(3):
        answer = client.put(f"{number:032x}", headers=about(9, name=f"{number}"), content=b"123")
        assert answer.status_code == 200
    assert client.delete(str(client.base_url).rstrip("/")).status_code == 200
    assert list(tmp_path.iterdir()) == []
    assert client.get(f"{0:032x}").status_code == 404


# --------------------------------------------------------------------------------- real servers


def begun(app: str, address: str, size: int, body: bytes, **headers: str) -> socket.socket:
    """A connection on which an upload was begun, with as much of its body as is given."""
    url = httpx.URL(address)
    connection = socket.create_connection((url.host, url.port or 80), timeout=30)
    head = {**about(size), "Host": f"{url.host}:{url.port}", "Content-Length": str(size), **headers}
    lines = "".join(f"{key}: {value}\r\n" for key, value in head.items())
    connection.sendall(f"PUT {url.path} HTTP/1.1\r\n{lines}\r\n".encode() + body)
    return connection


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_in_a_portal_an_upload_is_its_users_and_within_their_limits(tmp_path: Path) -> None:
    data = tmp_path / "data"
    limits = {"QUANT_INSPECTOR_UPLOAD_LIMIT": "1 MB", "QUANT_INSPECTOR_QUOTA": "1.5 MB"}
    with header_portal(data, environment=limits) as portal:
        address, tab = inbox_address(portal.address, **portal.identity(ADA))
        file = f"{address}/{ID}"
        with tab, portal.client(ADA) as ada, portal.client(BOB) as bob, portal.client("") as nobody:
            for client, status in ((nobody, 401), (bob, 404)):
                for method in ("PUT", "GET", "DELETE"):
                    answer = client.request(method, file, headers=about(5), content=b"12345")
                    assert answer.status_code == status
                    assert "12345" not in answer.text
            for foreign in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
                answer = ada.put(file, headers={**about(5), **foreign}, content=b"12345")
                assert answer.status_code == 403
            assert not list(data.rglob("upload-*"))

            who = {str(key): value for key, value in portal.identity(ADA)["headers"].items()}
            with begun(portal.address, file, 2_000_000, b"", **who) as connection:
                told = connection.recv(100)
            assert told.startswith(b"HTTP/1.1 413"), "before any byte of the body"

            with begun(portal.address, file, 900_000, b"x" * 300_000, **who) as connection:
                wait_for(lambda: bool(list(data.rglob("upload-*"))))
            # The client is gone: what it sent is here, and it may go on.
            wait_for(lambda: ada.get(file).json()["offset"] == 300_000)
            assert bob.get(file).status_code == 404
            other = f"{address}/{OTHER}"
            much = ada.put(other, headers=about(700_000, name="n.onnx"), content=b"")
            assert much.status_code == 413
            assert "MB" in much.json()["text"]
            rest = ada.put(file, headers=about(900_000, 300_000), content=b"x" * 600_000)
            assert rest.json()["done"]
            (found,) = workspace_of(data, ADA).glob("temporary/upload-*/files/*")
            assert found.read_bytes() == b"x" * 900_000
            assert not workspace_of(data, BOB).exists()
    assert list(workspace_of(data, ADA).glob("temporary/upload-*")) == [], "ends with the server"


@pytest.mark.slow
def test_who_sends_too_many_files_at_once_is_asked_to_wait_and_nobody_else(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with header_portal(data) as portal, contextlib.ExitStack() as opened:
        address, tab = inbox_address(portal.address, **portal.identity(ADA))
        bobs, other = inbox_address(portal.address, **portal.identity(BOB))
        who = {str(key): value for key, value in portal.identity(ADA)["headers"].items()}
        opened.enter_context(tab)
        opened.enter_context(other)
        ada, bob = (opened.enter_context(portal.client(each)) for each in (ADA, BOB))
        files = [f"{address}/{number:032x}" for number in range(routes.MOST_AT_ONCE + 1)]
        senders = [
            opened.enter_context(
                begun(portal.address, file, 100, b"x" * 40, **who, **{"Upload-Name": f"{number}"})
            )
            for number, file in enumerate(files[:-1])
        ]
        one_more = about(3, name="last.onnx")
        wait_for(lambda: ada.put(files[-1], headers=one_more, content=b"").status_code != 200, 30)
        answer = ada.put(files[-1], headers=one_more, content=b"123")
        assert answer.status_code == 429
        assert str(routes.MOST_AT_ONCE) in answer.json()["text"]
        assert bob.put(f"{bobs}/{ID}", headers=about(3), content=b"123").json()["done"]
        senders[0].sendall(b"x" * 60)
        told = http.client.HTTPResponse(senders[0])
        told.begin()
        assert json.load(told)["done"]
        # One has ended, so another may come: at once, or a moment after its answer was sent.
        last = {"url": files[-1], "headers": one_more, "content": b"123"}
        wait_for(lambda: ada.put(**last).json().get("done") is True)


@pytest.mark.slow
def test_a_large_upload_does_not_grow_the_servers_memory(tmp_path: Path) -> None:
    port = free_port()
    app = f"http://127.0.0.1:{port}"
    process = started(ROOT, {"QUANT_INSPECTOR_DATA": str(tmp_path)}, port=port)
    try:
        address, tab = inbox_address(app)
        with tab, httpx.Client(timeout=60) as client:
            send(client, address, 10_000_000)
            wait_for(lambda: abs(resident_mb(process.pid) - resident_mb(process.pid)) < 1)
            before = resident_mb(process.pid)
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak from now on
            send(client, address, 100_000_000)
            assert resident_mb(process.pid, "VmHWM") - before < 20
        sizes = sorted(each.stat().st_size for each in tmp_path.glob("temporary/upload-*/files/*"))
        assert sizes == [10_000_000, 100_000_000]
    finally:
        ended(process)


# ------------------------------------------------------------------------------------- a browser


class Line:
    """A connection to a server that can be cut: each one after so many bytes to the server.

    Attributes:
        sent: bytes that went to the server.
        cut_after: of one connection; None leaves them alone. Cut once.
    """

    def __init__(self, port: int) -> None:
        self.sent = 0
        self.cut_after: int | None = None
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            threading.Thread(target=self._serve, args=(near, far), daemon=True).start()

    def _serve(self, near: socket.socket, far: socket.socket) -> None:
        with near, far:
            back = threading.Thread(target=self._pass, args=(far, near, False), daemon=True)
            back.start()
            self._pass(near, far, True)
            back.join()

    def _pass(self, of: socket.socket, to: socket.socket, out: bool) -> None:
        passed = 0
        try:
            while block := of.recv(65536):
                passed += len(block) * out
                self.sent += len(block) * out
                if out and self.cut_after is not None and passed > self.cut_after:
                    self.cut_after = None
                    break
                to.sendall(block)
        except OSError:
            pass
        for each in (of, to):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


def models_page(page: Page, app: str) -> Page:
    """The page with the form for models of one's own open."""
    page.goto(f"{app}/models")
    page.get_by_role("button", name="Digit detector").wait_for(timeout=PATIENCE)
    if not page.locator(".st-key-upload-float .zone").is_visible():
        page.get_by_text("Load your own models").click()
    expect(page.locator(".st-key-upload-float .zone")).to_be_visible(timeout=PATIENCE)
    return page


def field(page: Page, name: str) -> Callable[..., None]:
    return page.locator(f".st-key-upload-{name} input[type=file]").set_input_files


def dropped(page: Page, name: str, files: Sequence[Path]) -> None:
    """Drops files on a field, as a browser tells a page of it."""
    script = """files => {
        const carried = new DataTransfer();
        for (const [name, content] of files) {
            const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
            carried.items.add(new File([bytes], name));
        }
        return carried;
    }"""
    content = [[each.name, base64.b64encode(each.read_bytes()).decode()] for each in files]
    carried = page.evaluate_handle(script, content)
    zone = page.locator(f".st-key-upload-{name} .zone")
    zone.dispatch_event("drop", {"dataTransfer": carried})


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        yield context.new_page()
    finally:
        context.close()


def slowed(page: Page, bytes_per_second: int) -> None:
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    session.send(
        "Network.emulateNetworkConditions",
        {"offline": False, "latency": 0, "downloadThroughput": -1,
         "uploadThroughput": bytes_per_second},
    )  # fmt: skip


def loaded(data: Path) -> None:
    """Something to look at already: the form is not replaced while a sample is being loaded."""
    load_sample(data, "digit-detector", progress=lambda *_: None)


@needs_models
@pytest.mark.slow
@pytest.mark.browser
def test_a_model_with_external_data_and_feeds_is_uploaded_watched_and_compared(
    page: Page, tmp_path: Path
) -> None:
    data, folder = tmp_path / "data", MODELS / "mlperf-resnet8"
    loaded(data)
    source = tmp_path / "m" / "model.onnx"
    source.parent.mkdir()
    onnx.save(
        onnx.load(folder / "model.onnx"), source,
        save_as_external_data=True, location="weights.bin", size_threshold=0,
    )  # fmt: skip
    with running_app(data) as app:
        models_page(page, app)
        slowed(page, 100_000)
        field(page, "float")([source, source.with_name("weights.bin")])
        bar = page.get_by_role("progressbar", name="weights.bin")
        expect(bar).to_have_attribute("aria-valuenow", re.compile(r"^[1-9]\d?$"), timeout=PATIENCE)
        expect(page.get_by_text(re.compile(r"MB/s|kB/s")).first).to_be_visible(timeout=PATIENCE)
        slowed(page, -1)
        dropped(page, "inputs", sorted((folder / "inputs").glob("*.npz"))[:4])
        expect(page.locator(".st-key-upload-float .row.done")).to_have_count(2, timeout=PATIENCE)
        expect(page.locator(".st-key-upload-inputs .row.done")).to_have_count(4, timeout=PATIENCE)
        # What comes of the first feed: nothing is about to be shown that takes the focus away.
        expect(page.locator(".st-key-preview").get_by_text("float32")).to_be_visible(
            timeout=PATIENCE
        )
        choose = page.locator(".st-key-upload-quantized").get_by_role("button", name="Choose files")
        with page.expect_file_chooser(timeout=PATIENCE) as chooser:
            choose.focus()
            page.keyboard.press("Enter")
        chooser.value.set_files(folder / "ort_static_qdq.onnx")
        # A second look at what was chosen: the files are there after another page.
        page.get_by_role("link", name="Report").click()
        page.get_by_role("button", name="Download JSON").wait_for(timeout=PATIENCE)
        page.get_by_role("link", name="Models").click()
        page.get_by_text("Load your own models").click(timeout=PATIENCE)
        expect(page.locator(".st-key-upload-float .row.done")).to_have_count(2, timeout=PATIENCE)
        page.get_by_role("button", name="Compare").click(timeout=PATIENCE)
        compared = page.locator(".st-key-context").get_by_text("4 samples").first
        expect(compared).to_be_visible(timeout=PATIENCE)
        pair = Workspace(data).pairs()[0]
        assert pair.float_model.size_bytes == sum(
            each.stat().st_size for each in source.parent.iterdir()
        )
        assert pair.float_model.path.parent.parent == data / "models"
        assert not list(data.glob("temporary/upload-*/*/*")), "moved, not copied"
        page.goto(f"{app}/exclusions")
        page.get_by_role("tab", name="Take it along").click(timeout=PATIENCE)
        with page.expect_download(timeout=PATIENCE) as download:
            page.get_by_role("link", name="Quantized model (").click(timeout=PATIENCE)
        assert download.value.suggested_filename == "ort_static_qdq.onnx"
        quantized = (folder / "ort_static_qdq.onnx").read_bytes()
        assert Path(download.value.path()).read_bytes() == quantized


@pytest.mark.slow
@pytest.mark.browser
def test_nothing_is_compared_while_a_file_that_failed_stands_in_a_field(
    page: Page, tmp_path: Path
) -> None:
    data, sample = tmp_path / "data", ROOT / "sample_models" / "digit-transformer"
    loaded(data)
    empty = tmp_path / "empty <b>.onnx"
    empty.write_bytes(b"")
    with running_app(data) as app:
        models_page(page, app)
        field(page, "float")(sample / "float.onnx")
        field(page, "inputs")(sample / "feeds.npz")
        compare = page.get_by_role("button", name="Compare")
        expect(compare).to_be_enabled(timeout=PATIENCE)
        field(page, "quantized")(empty)
        row = page.locator(".st-key-upload-quantized .row")
        expect(row).to_have_class("row failed", timeout=PATIENCE)
        # The float model would be quantized with the defaults, and taken for that file.
        expect(compare).to_be_disabled(timeout=PATIENCE)
        reason = page.locator(".st-key-compare-row").get_by_text("Not uploaded: empty <b>.onnx")
        expect(reason).to_be_visible(timeout=PATIENCE)
        row.get_by_role("button", name="Remove").click()
        expect(compare).to_be_enabled(timeout=PATIENCE)


@pytest.mark.slow
@pytest.mark.browser
def test_an_upload_survives_a_cut_connection_begins_again_after_a_restart_and_leaves_nothing(
    page: Page, tmp_path: Path
) -> None:
    data, content = tmp_path / "data", os.urandom(60_000_000)
    loaded(data)
    source = tmp_path / "big <b>.onnx"
    source.write_bytes(content)
    port = free_port()
    environment = {"QUANT_INSPECTOR_DATA": str(data)}
    process, line = started(ROOT, environment, port=port), Line(port)
    try:
        models_page(page, f"http://127.0.0.1:{line.port}")
        row = page.locator(".st-key-upload-quantized .row")
        line.cut_after = 40_000_000
        before = line.sent
        field(page, "quantized")(source)
        expect(row).to_have_class("row done", timeout=PATIENCE)
        assert line.cut_after is None, "it was cut"
        # A browser may send a chunk again by itself before the script hears of it.
        assert line.sent - before < 95_000_000, "it went on where it was"
        (kept,) = data.glob("temporary/upload-*/files/*")
        assert kept.read_bytes() == content
        assert row.locator("b").count() == 0
        row.get_by_role("button", name="Remove").click()
        wait_for(lambda: not kept.exists())

        slowed(page, 10_000_000)
        field(page, "quantized")(source)
        part = page.get_by_role("progressbar", name=source.name)
        expect(part).to_have_attribute("aria-valuenow", re.compile(r"^[3-9]\d$"), timeout=PATIENCE)
        process.kill()
        process.wait()
        assert list(data.glob("temporary/upload-*/parts/*"))
        process = started(ROOT, environment, port=port)
        slowed(page, -1)
        expect(row).to_have_class("row done", timeout=PATIENCE)
        (folder,) = data.glob("temporary/upload-*")
        assert files_in(folder) == ["big _b_.onnx"]
        assert (folder / "files" / "big _b_.onnx").read_bytes() == content

        page.reload()
        wait_for(lambda: not list(data.glob("temporary/upload-*")))
    finally:
        ended(process)
        line.close()
