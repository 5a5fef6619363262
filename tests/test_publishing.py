"""A file that is asked for is there as a whole, with its data, or as it was before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from inspector.errors import QuantizationError
from inspector.publishing import check_place, give_name, unfinished_file


def test_a_file_and_its_data_get_their_names_together(tmp_path: Path) -> None:
    output = tmp_path / "m.onnx"
    output.write_text("before")
    with unfinished_file(output) as part:
        part.write_text("model")
        part.with_name("m.onnx.data").write_text("weights")
        assert output.read_text() == "before"
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {
        "m.onnx": "model",
        "m.onnx.data": "weights",
    }


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    output = tmp_path / "m.onnx"
    output.write_text("before")

    def fail(part: Path) -> None:
        part.write_text("half")
        raise KeyError

    with pytest.raises(KeyError), unfinished_file(output) as part:
        fail(part)
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("m.onnx", "before")]


def test_a_disk_that_is_full_is_said_with_the_file(tmp_path: Path) -> None:
    with (
        pytest.raises(QuantizationError, match=r"m\.onnx cannot be written: No space left"),
        unfinished_file(tmp_path / "m.onnx"),
    ):
        raise OSError(28, os.strerror(28))
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_no_file_is_refused_before_any_work(tmp_path: Path) -> None:
    check_place(tmp_path / "m.onnx")
    with pytest.raises(QuantizationError, match="is a folder, expected a file"):
        check_place(tmp_path)
    with pytest.raises(QuantizationError, match="nowhere does not exist"):
        check_place(tmp_path / "nowhere" / "m.onnx")


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_a_named_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.touch(0o600)
    give_name(part, tmp_path / "named")
    (tmp_path / "new").touch()
    assert (tmp_path / "named").stat().st_mode == (tmp_path / "new").stat().st_mode
