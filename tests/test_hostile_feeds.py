"""Files made to do harm, or damaged: one named error each, in bounded memory, and never a wait."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from PIL import Image

from inspector.arrays import printable
from inspector.errors import FeedError, InspectorError
from inspector.feeds import load_feeds
from inspector.images import PRESETS
from inspector.model import Model
from tests.samples import PEAK_BYTES, ROOT, THOROUGH
from tests.test_feeds import error_of, folder_of, rows, write_set
from tests.test_images import IMAGE_MODEL, ROW_MODEL, image_folder, model_of, picture
from tests.test_texts import text_folder

ANY_ROW = model_of(x=("float32", (1, None)))
TOKENS = model_of(input_ids=("int64", (1, "tokens")))
MEGA = 2**20


@pytest.fixture(autouse=True)
def _never_waits() -> Iterator[None]:
    """What waits for a FIFO fails instead of hanging."""

    def give_up(_signal: int, _frame: Any) -> None:
        pytest.fail("this test waits for something")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------- archives made by hand


def npy(array: Any = None, *, header: str | None = None, version: int = 1) -> bytes:
    """An array's file; with another header where one is given."""
    buffer = io.BytesIO()
    np.save(buffer, np.ones((1, 3), np.float32) if array is None else array)
    if header is None:
        return buffer.getvalue()
    values = buffer.getvalue()[128:]
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode("latin-1") + values


def entry(name: str = "x.npy", data: bytes | None = None, **changes: Any) -> dict[str, Any]:
    """A member; `packed`, `size`, `method`, `flags` and `at` (its offset) may lie."""
    return {"name": name, "data": npy() if data is None else data, **changes}


def zip_of(path: Path, *entries: dict[str, Any]) -> Path:
    """An archive of members that say what they are told to, all sizes in zip64 fields."""
    body, directory = bytearray(), bytearray()
    for member in entries:
        name, data = member["name"].encode(), member["data"]
        method, flags = member.get("method", 0), member.get("flags", 0)
        raw = data
        if method == 8:
            squeeze = zlib.compressobj(1, zlib.DEFLATED, -15)
            raw = squeeze.compress(data) + squeeze.flush()
        packed, size = member.get("packed", len(raw)), member.get("size", len(data))
        at = member.get("at", len(body))
        extra = struct.pack("<HHQQQ", 1, 24, size, packed, at)
        local = (
            struct.pack("<4s5H", b"PK\3\4", 45, flags, method, 0, 33)
            + struct.pack("<3L2H", zlib.crc32(data), 2**32 - 1, 2**32 - 1, len(name), 20)
            + name
            + struct.pack("<HHQQ", 1, 16, size, packed)
        )
        if "at" not in member:
            body += local + raw
        directory += (
            struct.pack("<4s6H", b"PK\1\2", 45, 45, flags, method, 0, 33)
            + struct.pack(
                "<3L5H2L",
                zlib.crc32(data),
                2**32 - 1,
                2**32 - 1,
                len(name),
                len(extra),
                0,
                0,
                0,
                0,
                2**32 - 1,
            )
            + name
            + extra
        )
    end = struct.pack(
        "<4s4H2LH", b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), len(body), 0
    )
    path.write_bytes(body + directory + end)
    return path


def test_an_archive_made_by_hand_is_read(tmp_path: Path) -> None:
    for method in (0, 8):
        zip_of(tmp_path / "a.npz", entry(method=method))
        assert load_feeds(tmp_path, ROW_MODEL)[0]["x"].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([entry(size=2**60)], "'x.npy' claims 1,152,921,504,606,846,976 bytes in 140"),
        ([entry(packed=2**60)], "'x.npy' overlaps others or the end"),
        ([entry(method=8, size=2**40)], "'x.npy' claims 1,099,511,627,776 bytes in"),
        ([entry(), entry()], "it holds 'x.npy' twice"),
        ([entry(), entry("x")], "it holds 'x.npy' twice"),
        ([entry("y.npy"), entry("x.npy", at=0)], "overlaps others or the end"),
        ([entry(at=2**62)], "overlaps others or the end"),
        ([entry(flags=1)], "'x.npy' is encrypted"),
        ([entry(method=14)], "'x.npy' has compression method 14, expected none or deflate"),
        ([entry(method=8, data=npy()[:50])], "describes no plain array"),
        ([entry("x.npy", b"")], "it does not begin as .npy does"),
    ],
)
def test_an_archive_that_lies_is_refused(
    tmp_path: Path, entries: Sequence[dict[str, Any]], said: str
) -> None:
    zip_of(tmp_path / "a.npz", *entries)
    message, hint = error_of(tmp_path, ROW_MODEL)
    assert message.startswith("a.npz")
    assert said in message
    assert hint == "Save it again with np.savez or np.save."


@pytest.mark.parametrize("name", ["../../x.npy", "/etc/x.npy", "\x1b[31m<b>\n.npy", "é" * 30_000])
def test_member_names_go_nowhere_and_are_shown_escaped_and_short(tmp_path: Path, name: str) -> None:
    zip_of(tmp_path / "a.npz", entry(), entry(name, flags=0x800))
    message, _ = error_of(tmp_path, ROW_MODEL)
    assert message.isprintable()
    assert len(message) < 500
    assert message.startswith("a.npz has the key '")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.npz"]


# ------------------------------------------------------------------------------------ npy headers

GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3), }"


def test_a_header_in_another_order_or_hand_is_read(tmp_path: Path) -> None:
    for header in (
        GOOD,
        '{"shape":(1,3),"descr":"<f4","fortran_order":False}',
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1L, 3L), }",
    ):
        for version in (1, 2):
            (tmp_path / "a.npy").write_bytes(npy(header=header, version=version))
            assert load_feeds(tmp_path, ROW_MODEL)[0]["x"].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    "header",
    [
        "__import__('os').system('false')",
        GOOD.replace("False", "__import__('os')"),
        GOOD.replace("(1, 3)", "(1, 3" + ")" * 9_000),
        GOOD.replace("(1, 3)", "(" * 9_000 + "1, 3)"),
        GOOD.replace("(1, 3)", "(" + "-" * 9_000 + "1, 3)"),
        GOOD.replace("(1, 3)", "(-1, -3)"),
        GOOD.replace("(1, 3)", "(1e9, 3)"),
        GOOD.replace("(1, 3)", f"({'9' * 9_000},)"),
        GOOD.replace("(1, 3)", f"({'1, ' * 3_000})"),
        GOOD.replace("(1, 3)", f"({'1, ' * 70}3)"),
        GOOD.replace("(1, 3)", "(1 3)"),
        GOOD.replace("<f4", "<f3"),
        GOOD.replace("<f4", "<f999999999"),
        GOOD.replace("<f4", "<U0"),
        GOOD.replace("<f4", "<U999999999"),
        GOOD.replace("<f4", "M8[parsec]"),
        GOOD.replace("<f4", "f4,f4"),
        GOOD.replace("'<f4'", "[('a', '<f4')]"),
        "{" * 9_000,
        "",
        "\0" * 9_000,
        GOOD + " " * 20_000,
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_header_is_never_evaluated_and_an_absurd_one_is_refused(
    tmp_path: Path, header: str, version: int
) -> None:
    (tmp_path / "a.npy").write_bytes(npy(header=header, version=version))
    message, _ = error_of(tmp_path, ROW_MODEL)
    assert message.startswith("a.npy: 'x' cannot be read as an array: ")
    assert len(message) < 300
    assert message.isprintable()


def test_texts_of_no_length_are_no_array_of_any_number(tmp_path: Path) -> None:
    header = GOOD.replace("<f4", "<U0").replace("(1, 3)", "(1, 99999999999999)")
    (tmp_path / "a.npy").write_bytes(npy(header=header)[: 10 + len(header)])
    message, _ = error_of(tmp_path, model_of(s=("string", (1, None))))
    assert message.startswith("a.npy: 's' cannot be read as an array: its header (1, 9999")


def test_a_tensor_with_a_negative_dimension_is_refused(tmp_path: Path) -> None:
    proto = numpy_helper.from_array(rows(1))
    proto.dims[0] = -1
    (tmp_path / "input_0.pb").write_bytes(proto.SerializeToString())
    assert "it claims the shape (-1, 3)" in error_of(tmp_path, ROW_MODEL)[0]


# ------------------------------------------------------------------------------- bounded in memory


def sparse(path: Path, size: int, start: bytes = b"") -> None:
    path.write_bytes(start)
    os.truncate(path, size)


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A picture that claims a size and has next to no pixels."""
    head = struct.pack(">2L5B", width, height, 8, 2, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", head),
        *chunks,
        (b"IDAT", zlib.compress(bytes(9))),
        (b"IEND", b""),
    ):
        out += (
            struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))
        )
    return out


def huge_npy(shape: str) -> bytes:
    return npy(header=GOOD.replace("(1, 3)", shape).ljust(118))[:128]


def bombs(place: Path) -> dict[str, Path]:
    """Each a folder of its own, by what is in it."""
    made: dict[str, Path] = {}

    def add(what: str, name: str) -> Path:
        made[what] = place / what
        image_folder(made[what], recipe={})
        return made[what] / name

    zeros = huge_npy(f"(1, {64 * MEGA})") + bytes(256 * MEGA)
    zip_of(add("rows_inflated_bomb", "a.npz"), entry(data=zeros, method=8))
    zip_of(
        add("rows_header_bomb", "a.npz"),
        entry(data=b"\x93NUMPY\2\0\xff\xff\xff\x0f" + bytes(60 * MEGA), method=8),
    )
    zip_of(add("rows_many_members", "a.npz"), *(entry(f"{i}", b"") for i in range(20_000)))
    tiny = {"data": b"", "at": 0}
    zip_of(add("rows_overlapping", "a.npz"), entry(), *(entry(f"x{i}", **tiny) for i in range(9)))
    sparse(add("rows_sparse_npz", "a.npz"), 3 * 2**30)
    sparse(add("rows_sparse_npy", "a.npy"), 3 * 2**30)
    whole = huge_npy(f"(1, {2**30})")
    sparse(add("rows_whole_npy", "a.npy"), len(whole) + 2**32, whole)
    sparse(add("rows_sparse_pb", "input_0.pb"), 3 * 2**30)
    claim = TensorProto(dims=[1, 2**40], data_type=TensorProto.FLOAT)
    add("rows_claiming_pb", "input_0.pb").write_bytes(claim.SerializeToString())
    claim = TensorProto(dims=[-1, -(2**40)], data_type=TensorProto.FLOAT)
    add("rows_negative_pb", "input_0.pb").write_bytes(claim.SerializeToString())
    claim = numpy_helper.from_array(rows(1))
    claim.external_data.add(key="location", value="/dev/zero")
    add("rows_external_pb", "input_0.pb").write_bytes(claim.SerializeToString())
    add("image_wide", "a.png").write_bytes(png_of(2**31 - 1, 2**31 - 1))
    add("image_large", "a.png").write_bytes(png_of(9_600, 9_600))
    # A compressed comment of 300 MB.
    text = b"c\0\0" + zlib.compress(bytes(300 * MEGA), 1)
    add("image_comment", "a.png").write_bytes(png_of(6, 4, (b"zTXt", text)))
    sparse(add("image_sparse", "a.png"), 3 * 2**30, png_of(6, 4)[:40])
    sparse(add("text_sparse", "texts.txt"), 3 * 2**30)
    add("text_long_line", "texts.txt").write_bytes(b"a " * (2 * MEGA))
    sparse(text_folder(place / "text_tokenizer", "a") / "tokenizer.json", 3 * 2**30)
    made["text_tokenizer"] = place / "text_tokenizer"
    for name in ("labels.json", "preprocess.json"):
        for kind, content in (
            ("sparse", None),
            ("nested", b"[" * 5 * MEGA),
            ("objects", b'{"a":' * MEGA),
            ("long", b"[" + b"1," * 20 * MEGA + b"1]"),
            ("number", b"[" + b"9" * MEGA + b"]"),
        ):
            what = f"image_{name[:-5]}_{kind}"
            made[what] = image_folder(place / what, picture(), recipe={})
            if content is None:
                sparse(made[what] / name, 3 * 2**30, b"[1]")
            else:
                (made[what] / name).write_bytes(content)
    return made


JUDGE = (
    PEAK_BYTES
    + """
import json, resource, sys
from pathlib import Path
from inspector.errors import FeedError
from inspector.feeds import load_feeds
from inspector.model_files import load_model
import PIL.PngImagePlugin, tokenizers
place = Path(sys.argv[1])
models = {n: load_model(place / f"{n}.onnx") for n in ("rows", "image", "text")}
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 400 * 2**20,) * 2)
for what in sys.argv[2:]:
    before, said = peak_bytes(), "nothing"
    try:
        feeds = load_feeds(place / what, models[what.split("_")[0]])
        list(feeds)
    except FeedError as error:
        said = error.message
    print(json.dumps([what, said, peak_bytes() - before]), flush=True)
"""
)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_bombs_of_all_kinds_are_named_in_bounded_memory(tmp_path: Path) -> None:
    made = bombs(tmp_path)
    for name, model in (("rows", ANY_ROW), ("image", IMAGE_MODEL), ("text", TOKENS)):
        onnx.save(model.proto, tmp_path / f"{name}.onnx")
    done = subprocess.run(
        [sys.executable, "-c", JUDGE, tmp_path, *made],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = {what: (said, grown) for what, said, grown in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == made.keys()
    for what, (said, grown) in found.items():
        assert said != "nothing", what
        assert grown < 350 * MEGA, (what, grown)
        files = [*(f.name for f in made[what].iterdir()), what]
        assert any(name in said for name in files), (what, said)
        assert said.isprintable()
        assert len(said) < 500
    # These are seen for what they are, not stopped by a lack of memory.
    for what, said in {
        "rows_inflated_bomb": "this may be a decompression bomb",
        "rows_header_bomb": "its header has 268,435,455 bytes, expected at most 10,000",
        "rows_many_members": "expected at most 1,048,576",
        "rows_overlapping": "overlaps others or the end",
        "rows_sparse_pb": "it has 3,221,225,472 bytes, expected at most 2,147,483,647",
        "rows_claiming_pb": "it claims the shape (1, 1099511627776) but is much smaller",
        "rows_negative_pb": "it claims the shape (-1, -1099511627776) but is much smaller",
        "rows_external_pb": "its values lie in another file",
        "image_wide": "it has more pixels than Pillow's limit",
        "image_large": "it has more pixels than Pillow's limit",
        "image_comment": "",
        "image_labels_sparse": "it has 3,221,225,472 bytes, expected at most 16,777,216",
        "image_preprocess_long": "expected at most 65,536",
        "text_sparse": "it has 3,221,225,472 bytes, expected at most 67,108,864",
        "text_long_line": "line 1 has 4,194,304 bytes, expected at most 1,048,576",
        "text_tokenizer": "it has 3,221,225,472 bytes, expected at most 67,108,864",
    }.items():
        assert said in found[what][0], found[what]
        assert "emory" not in found[what][0]


# ---------------------------------------------------------------------- what is no regular file


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.png", "texts.txt", "input_0.pb"])
def test_a_fifo_among_feeds_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    message, _ = error_of(tmp_path, ROW_MODEL)
    assert f"found {name} (no regular file)" in message or "has no input_*.pb" in message
    assert error_of(tmp_path / name, ROW_MODEL)[0].startswith(f"{name} is no regular file, ")
    folder_of(tmp_path, [rows(1)])
    assert load_feeds(tmp_path, ROW_MODEL).notes == (
        f"{tmp_path.name}: {name} (no regular file) is not .npz and is ignored",
    )


@pytest.mark.parametrize("replaced", ["fifo", "folder", "device"])
def test_a_file_that_becomes_something_else_after_loading_is_refused(
    tmp_path: Path, replaced: str
) -> None:
    npz = folder_of(tmp_path / "npz", [rows(1)])
    images = image_folder(tmp_path / "images", picture(), recipe={})
    texts = text_folder(tmp_path / "texts", "a")
    pb = write_set(tmp_path / "pb", rows(1))
    for folder, name, model in (
        (npz, "00.npz", ROW_MODEL),
        (images, "0.png", IMAGE_MODEL),
        (texts, "texts.txt", TOKENS),
        (texts, "tokenizer.json", TOKENS),
        (pb, "input_0.pb", ROW_MODEL),
    ):
        feeds = load_feeds(folder, model)
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        if replaced == "fifo":
            os.mkfifo(folder / name)
        elif replaced == "folder":
            (folder / name).mkdir()
        else:
            (folder / name).symlink_to("/dev/zero")
        with pytest.raises(FeedError) as caught:
            feeds[0]
        assert name in caught.value.message
        assert "regular file" in caught.value.message or "directory" in caught.value.message
        (folder / name).rmdir() if replaced == "folder" else (folder / name).unlink()
        (folder / name).write_bytes(content)


def test_a_link_is_followed_to_a_regular_file_only(tmp_path: Path) -> None:
    elsewhere = folder_of(tmp_path / "there", [rows(1)]) / "00.npz"
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.npz").symlink_to(elsewhere)
    (folder / "b.npz").symlink_to("/dev/zero")
    (folder / "c.npz").symlink_to(tmp_path / "gone")
    (folder / "d.npz").symlink_to("d.npz")
    (folder / "e.npz").mkdir()
    feeds = load_feeds(folder, ROW_MODEL)
    assert feeds.names == ("a.npz",)
    assert feeds.notes == (
        "in: b.npz (no regular file), c.npz (no regular file), d.npz (no regular file) and 1 more "
        "are not .npz and are ignored",
    )


def test_companions_that_are_no_regular_files_are_not_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [rows(1)])
    os.mkfifo(folder / "labels.json")
    assert load_feeds(folder, ROW_MODEL).labels is None
    images = image_folder(tmp_path / "images", picture())
    os.mkfifo(images / "preprocess.json")
    assert "holds images but no preprocess.json" in error_of(images, IMAGE_MODEL)[0]
    message, _ = error_of(images, IMAGE_MODEL, preprocess=images / "preprocess.json")
    assert message.endswith("preprocess.json does not exist or is no file")
    texts = text_folder(tmp_path / "texts", "a")
    (texts / "tokenizer.json").unlink()
    os.mkfifo(texts / "tokenizer.json")
    assert "has texts but no tokenizer.json" in error_of(texts, TOKENS)[0]


@pytest.mark.parametrize("path", ["x" * 5_000, "a/" * 3_000, "a\0b", "\udcff\x1b[31m"])
def test_a_path_that_cannot_be_is_named(path: str) -> None:
    message, _ = error_of(Path(path), ROW_MODEL)
    assert message.isprintable()
    assert len(message) < 500


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("the superuser may read everything")
    folder = folder_of(tmp_path / "in", [rows(1)])
    for mode in (0, 0o400, 0o100):
        folder.chmod(mode)
        message, _ = error_of(folder, ROW_MODEL)
        folder.chmod(0o700)
        assert "in" in message


# ------------------------------------------------------------------------------------- file names


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"a\x1b[31m\n.npz", "a\\x1b[31m\\n.npz"),
        (b"<img src=x>.npz", "<img src=x>.npz"),
        (b"\xff\xfe.npz", "\\udcff\\udcfe.npz"),
        ("\u202enpz.exe\u202c.npz".encode(), "\\u202enpz.exe\\u202c.npz"),
        ("größe 日本.npz".encode(), "größe 日本.npz"),
    ],
)
def test_file_names_of_any_bytes_are_shown_in_one_line_that_can_be_written(
    tmp_path: Path, name: bytes, shown: str
) -> None:
    file = tmp_path / "in" / os.fsdecode(name)
    folder_of(tmp_path / "in", [rows(1)])
    (tmp_path / "in" / "00.npz").rename(file)
    feeds = load_feeds(tmp_path / "in", ROW_MODEL)
    assert feeds.names == (shown,)
    assert feeds[0]["x"].tolist() == rows(1).tolist()
    json.dumps(feeds.names, ensure_ascii=False).encode("utf-8")
    assert load_feeds(file, ROW_MODEL).description == f"1 sample in {shown}"
    file.write_bytes(b"no archive")
    message, _ = error_of(tmp_path / "in", ROW_MODEL)
    assert message.startswith(f"{shown} cannot be read as an .npz archive: ")
    file.rename(tmp_path / "in" / os.fsdecode(name[:-4]))
    assert f"found {shown[:-4]}, expected" in error_of(tmp_path / "in", ROW_MODEL)[0]


def test_a_number_in_a_folders_name_may_be_any_digit(tmp_path: Path) -> None:
    for name in ("test_data_set_1²2", "test_data_set_٣", "test_data_set_1"):
        write_set(tmp_path / name, rows(1) + len(name))
    assert len(load_feeds(tmp_path, ROW_MODEL)) == 3


def fill(folder: Path, count: int, content: bytes, suffix: str) -> None:
    folder.mkdir()
    first = folder / f"000000{suffix}"
    first.write_bytes(content)
    for at in range(1, count):
        # A file system allows only so many links to one file.
        if at % 10_000 == 0:
            first = folder / f"{at:06}{suffix}"
            first.write_bytes(content)
        else:
            os.link(first, folder / f"{at:06}{suffix}")


@pytest.mark.slow
def test_a_hundred_thousand_files_of_other_kinds_do_no_harm(tmp_path: Path) -> None:
    fill(tmp_path / "in", 100_000, b"", ".log")
    assert error_of(tmp_path / "in", ROW_MODEL)[0].startswith(
        "in holds no feeds: found 000000.log, 000001.log, 000002.log and 99997 more, expected"
    )
    folder_of(tmp_path / "in", [rows(1)], key="x")
    assert load_feeds(tmp_path / "in", ROW_MODEL).notes == (
        "in: 000000.log, 000001.log, 000002.log and 99997 more are not .npz and are ignored",
    )


@pytest.mark.slow
def test_thirty_thousand_samples_are_loaded_and_a_limit_opens_only_its_own(
    tmp_path: Path,
) -> None:
    fill(tmp_path / "in", 30_000, npy(), ".npy")
    (tmp_path / "in" / "029999.npy").unlink()
    (tmp_path / "in" / "029999.npy").write_bytes(b"broken")
    assert load_feeds(tmp_path / "in", ROW_MODEL, limit=3).description == "3 of 30,000 .npy files"
    assert error_of(tmp_path / "in", ROW_MODEL)[0].startswith("029999.npy: 'x' cannot be read")
    (tmp_path / "in" / "029999.npy").write_bytes(npy(rows(1)))
    assert len(load_feeds(tmp_path / "in", ROW_MODEL)) == 30_000


# -------------------------------------------------------------------------------------- json files


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[NaN]", "cannot be read as labels: NaN is no JSON number"),
        ("[Infinity]", "cannot be read as labels: Infinity is no JSON number"),
        ("[1e400]", "has Infinity at position 0, expected an integer"),
        ("[[1]]", "has [1] at position 0"),
        ("[" + "[" * 900 + "]" * 900 + "]", "at position 0"),
        ('[{"a": 1}]', "has an object at position 0"),
        ('[{"a": 1, "a": 2}]', "cannot be read as labels: it gives 'a' twice"),
        (json.dumps(["x" * 100_000]), "…"),
        ('["\\ud800"]', 'has "\\ud800" at position 0'),
        ('"\x1b"', "cannot be read as labels"),
    ],
)
def test_labels_that_are_strange_are_named_in_one_short_line(
    tmp_path: Path, text: str, said: str
) -> None:
    folder = folder_of(tmp_path, [rows(1)])
    (folder / "labels.json").write_text(text)
    message, _ = error_of(folder, ROW_MODEL)
    assert message.startswith("labels.json ")
    assert said in message
    assert message.isprintable()
    assert len(message) < 300


@pytest.mark.parametrize(
    "text",
    [
        '{"scale": NaN}',
        '{"scale": 1e400}',
        '{"scale": 1e300}',
        '{"std": 1e-300}',
        '{"mean": [1e300, 0, 0]}',
        '{"scale": ' + "9" * 400 + "}",
        '{"size": [1e9, 1e9]}',
        '{"size": [[[[4]]], 6]}',
        '{"resize": ' + "[" * 900 + "]" * 900 + "}",
        '{"mean": ' + json.dumps([0] * 5_000) + "}",
        '{"pad_color": {"a": {"b": {}}}}',
        '{"preset": "yolo", "preset": "tf"}',
        '{"preset": ["yolo"]}',
        '{"' + "x" * 60_000 + '": 1}',
        '{"\\u001b[31m": 1}',
        '{"color": "\\ud800"}',
    ],
)
def test_a_recipe_that_is_strange_is_named_in_one_short_line(tmp_path: Path, text: str) -> None:
    folder = image_folder(tmp_path, picture())
    (folder / "preprocess.json").write_text(text)
    message, _ = error_of(folder, IMAGE_MODEL)
    assert message.startswith("preprocess.json")
    assert message.isprintable()
    assert len(message) < 300


# ------------------------------------------------------------------------------------ any damage


def pictures() -> Iterator[tuple[str, bytes]]:
    whole = picture(12, 9)
    variants: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.png": (whole, {}),
        "deep.png": (Image.fromarray(np.arange(108, dtype=np.uint16).reshape(9, 12)), {}),
        "palette.png": (whole.quantize(7), {"transparency": bytes([0, 9, 200])}),
        "film.gif": (whole.quantize(5), {"save_all": True, "append_images": [whole.convert("L")]}),
        "a.jpg": (whole, {}),
        "cmyk.jpg": (whole.convert("CMYK"), {}),
        "bits.tif": (whole.convert("1"), {"compression": "group4"}),
        "lzw.tif": (whole, {"compression": "tiff_lzw"}),
        "a.bmp": (whole, {}),
        "a.webp": (whole, {"lossless": True}),
        "a.ppm": (whole, {}),
        "a.pgm": (whole.convert("L"), {}),
    }
    for name, (image, options) in variants.items():
        kind = name.split(".")[1]
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(kind, kind), **options)
        yield name, buffer.getvalue()


def healthy() -> dict[str, tuple[str, bytes, Model]]:
    """Files that load, by name: the file's name, its content, the model."""
    found: dict[str, tuple[str, bytes, Model]] = {}
    values = {"x": rows(2), "s": np.array([["a", "bc"]])}
    two = model_of(x=("float32", ("b", 3)), s=("string", ("b", None)))
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, **values)  # type: ignore[arg-type]
        found[save.__name__] = ("a.npz", buffer.getvalue(), two)
    found["npy"] = ("a.npy", npy(np.asfortranarray(rows(3))), ROW_MODEL)
    proto = numpy_helper.from_array(rows(1)).SerializeToString()
    found["pb"] = ("input_0.pb", proto, ROW_MODEL)
    typed = onnx.helper.make_tensor("x", TensorProto.FLOAT16, (1, 3), [1, 2, 3]).SerializeToString()
    found["typed pb"] = ("input_0.pb", typed, model_of(x=("float16", (1, 3))))
    strings = numpy_helper.from_array(np.array([["a", "bc"]], object)).SerializeToString()
    found["string pb"] = ("input_0.pb", strings, model_of(x=("string", (1, None))))
    for name, content in pictures():
        found[name] = (name, content, IMAGE_MODEL)
    recipe = json.dumps(PRESETS["torchvision"].to_json()).encode()
    found["preprocess"] = ("preprocess.json", recipe, IMAGE_MODEL)
    found["labels"] = ("labels.json", b"[1, 2, 3]", IMAGE_MODEL)
    found["texts"] = ("texts.txt", "a cat\nsat\r\n\nnaïve".encode(), TOKENS)
    return found


HEALTHY = healthy()
Damage = tuple[str, float, int, bytes]
damages = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "insert", "swap", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 64),
        st.one_of(
            st.binary(min_size=1, max_size=9),
            st.sampled_from([b"\xff" * 4, b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff", b"-1"]),
        ),
    ),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, changes: Sequence[Damage]) -> bytes:
    for kind, share, size, data in changes:
        at = int(share * len(content))
        end = at + size
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ (1 << size % 8)]) + content[at + 1 :]
        elif kind == "set":
            content = content[:at] + data + content[at + len(data) :]
        elif kind == "cut":
            content = content[:at] + (content[end:] if size else b"")
        elif kind == "insert":
            content = content[:at] + data + content[at:]
        elif kind == "swap":
            last = end + size
            content = content[:at] + content[end:last] + content[at:end] + content[last:]
        else:
            content = content[:end] + content[at:]
    return content


def any_damage_is_a_named_error(place: Path, name: str, changes: Sequence[Damage]) -> None:
    file, content, model = HEALTHY[name]
    folder = place / name
    if not folder.exists():
        if file in ("labels.json", "preprocess.json"):
            image_folder(folder, picture(), picture(seed=1), picture(seed=2), recipe={})
        elif model is IMAGE_MODEL:
            image_folder(folder, recipe={"preset": "tf"})
        elif model is TOKENS:
            text_folder(folder, "")
        else:
            folder.mkdir()
    (folder / file).write_bytes(damaged(content, changes))
    for path in (folder, folder / file):
        if path.suffix == ".json":
            continue
        try:
            feeds = load_feeds(path, model)
            for feed in feeds:
                assert feed.keys() == {info.name for info in model.inputs}
            assert feeds.digest
            assert len(feeds.rows) == len(feeds.names) == len(feeds)
            said = [*feeds.names, *feeds.notes, feeds.description]
        except InspectorError as error:
            said = [error.message, error.hint]
        for sentence in said:
            assert sentence.isprintable()
            assert len(sentence) < 1_000


@pytest.mark.parametrize("name", HEALTHY)
def test_files_to_be_damaged_load(tmp_path: Path, name: str) -> None:
    any_damage_is_a_named_error(tmp_path, name, [])
    folder = tmp_path / name
    assert len(load_feeds(folder, HEALTHY[name][2])) > 0


@pytest.mark.parametrize("name", HEALTHY)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=damages)
def test_damage_gives_a_named_error_or_feeds(
    tmp_path: Path, name: str, changes: Sequence[Damage]
) -> None:
    any_damage_is_a_named_error(tmp_path, name, changes)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
@settings(max_examples=600 * THOROUGH, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=damages)
def test_much_damage_gives_a_named_error_or_feeds(
    tmp_path: Path, name: str, changes: Sequence[Damage]
) -> None:
    signal.alarm(600)
    any_damage_is_a_named_error(tmp_path, name, changes)


def test_printable_keeps_letters_and_escapes_the_rest() -> None:
    assert printable("größe 日本 a_b") == "größe 日本 a_b"
    assert printable("a\tb\x7f\u2028\ud800") == "a\\tb\\x7f\\u2028\\ud800"
    assert printable("x" * 201) == "x" * 200 + "…"
