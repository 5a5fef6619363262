"""Feeds: every form is read, every fault is one clear sentence, nothing is unpickled or written."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import tracemalloc
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from inspector import arrays as arrays_module
from inspector import feeds as feeds_module
from inspector.errors import FeedError
from inspector.feeds import Feeds, image_feeds, load_feeds, random_feeds, split_calibration
from inspector.images import PRESETS, Preprocess
from inspector.model import Model
from inspector.model_files import load_model
from inspector.runtime import open_session
from tests.samples import MODELS
from tests.test_images import (
    IMAGE_MODEL,
    ROW_MODEL,
    Shape,
    image_folder,
    model_of,
    picture,
    quick,
)

REAL = sorted(p.parent.name for p in MODELS.glob("*/inputs")) if MODELS.is_dir() else []


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    constants: Mapping[str, Any] | None = None,
    *,
    dtype: int = TensorProto.INT64,
) -> Model:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(n, dtype, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in (constants or {}).items()],
    )
    return Model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    )


def rows(count: int, width: int = 3) -> np.ndarray[Any, Any]:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def folder_of(folder: Path, arrays: Sequence[Any], key: str = "x") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, array in enumerate(arrays):
        np.savez(folder / f"{index:02}.npz", **{key: array})
    return folder


def error_of(path: Path, model: Model, **options: Any) -> tuple[str, str]:
    """Message and hint of the FeedError that loading (or iterating) raises."""
    with pytest.raises(FeedError) as caught:
        list(load_feeds(path, model, **options))
    return caught.value.message, caught.value.hint


# ------------------------------------------------------------------------------- folders of .npz


def test_a_folder_of_npz_is_one_feed_each_sorted_by_name(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        np.savez(tmp_path / f"{name}.npz", x=np.full((1, 3), ord(name), np.float32))
    feeds = load_feeds(tmp_path, ROW_MODEL)
    assert feeds.names == ("a.npz", "b.npz", "c.npz")
    assert [feed["x"][0, 0] for feed in feeds] == [97, 98, 99]
    assert (len(feeds), feeds.description, feeds.random) == (3, "3 .npz files", False)
    assert feeds.notes == ()


def test_feeds_can_be_iterated_again_and_indexed(tmp_path: Path) -> None:
    feeds = load_feeds(folder_of(tmp_path, [rows(1), rows(1) + 1]), ROW_MODEL)
    first, second = list(feeds), list(feeds)
    assert np.array_equal(first[1]["x"], second[1]["x"])
    assert np.array_equal(feeds[1]["x"], first[1]["x"])
    assert np.array_equal(feeds[-1]["x"], first[1]["x"])
    with pytest.raises(IndexError):
        feeds[2]


def test_a_scalar_input_keeps_its_shape(tmp_path: Path) -> None:
    model = model_of(x=("float32", ("batch", 3)), sr=("int64", ()))
    np.savez(tmp_path / "0.npz", x=rows(1), sr=np.array(16000))
    feed = load_feeds(tmp_path, model)[0]
    assert feed["sr"].shape == ()
    assert (feed["sr"].item(), feed["sr"].dtype.name) == (16000, "int64")


def test_a_dynamic_batch_in_a_folder_stays_one_feed(tmp_path: Path) -> None:
    feeds = load_feeds(folder_of(tmp_path, [rows(5), rows(2)]), ROW_MODEL)
    assert [feed["x"].shape for feed in feeds] == [(5, 3), (2, 3)]


def test_big_endian_arrays_are_read_without_a_word(tmp_path: Path) -> None:
    feeds = load_feeds(folder_of(tmp_path, [rows(1).astype(">f4")]), ROW_MODEL)
    assert feeds[0]["x"].dtype == np.dtype("float32")
    assert feeds[0]["x"].dtype.isnative
    assert np.array_equal(feeds[0]["x"], rows(1))
    assert feeds.notes == ()


def test_fortran_order_is_read_as_the_same_numbers(tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(24, dtype=np.float32).reshape(4, 6)[:, :3])
    folder_of(tmp_path / "one", [array])
    assert np.array_equal(load_feeds(tmp_path / "one", ROW_MODEL)[0]["x"], array)
    np.savez_compressed(tmp_path / "many.npz", x=array)
    assert np.array_equal(
        np.concatenate([f["x"] for f in load_feeds(tmp_path / "many.npz", ROW_MODEL)]), array
    )


def test_stray_files_are_ignored_and_said_known_ones_are_not(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", [rows(1), rows(1) + 1])
    for name in ("labels.json", "boxes.json", "preprocess.json"):
        (folder / name).write_text("[1, 2]")
    assert load_feeds(folder, ROW_MODEL).notes == ()
    (folder / "readme.txt").write_text("x")
    assert load_feeds(folder, ROW_MODEL).notes == ("in: readme.txt is not .npz and is ignored",)
    (folder / "more").mkdir()
    (folder / "pic.png").write_text("x")
    np.save(folder / "a.npy", rows(1))
    assert load_feeds(folder, ROW_MODEL).notes == (
        "in: a.npy, more/, pic.png and 1 more are not .npz and are ignored",
    )


def test_a_limit_takes_the_first_samples_and_their_labels(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [rows(1) + i for i in range(5)])
    (folder / "labels.json").write_text("[5, 6, 7, 8, 9]")
    feeds = load_feeds(folder, ROW_MODEL, limit=2)
    assert (len(feeds), feeds.labels, feeds.description) == (2, (5, 6), "2 of 5 .npz files")
    assert len(load_feeds(folder, ROW_MODEL, limit=99)) == 5
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_feeds(folder, ROW_MODEL, limit=0)


# --------------------------------------------------------------------------- one file, many samples


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_one_npz_is_split_along_its_leading_axis(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "feeds.npz", x=rows(4))
    feeds = load_feeds(tmp_path / "feeds.npz", model_of(x=("float32", (1, 3))))
    assert feeds.names == ("sample 0", "sample 1", "sample 2", "sample 3")
    assert [feed["x"].shape for feed in feeds] == [(1, 3)] * 4
    assert np.array_equal(np.concatenate([f["x"] for f in feeds]), rows(4))
    assert feeds.description == "4 samples in feeds.npz"
    assert np.array_equal(feeds[2]["x"], rows(4)[2:3])
    assert feeds.notes == ()


def test_a_dynamic_batch_is_taken_as_samples_and_this_is_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "feeds.npz", x=rows(4))
    assert load_feeds(tmp_path / "feeds.npz", ROW_MODEL).notes == (
        "feeds.npz: 'x' is taken as 4 samples of (1, 3), not as one batch",
    )


def test_one_axis_more_than_the_model_is_the_sample_axis(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    np.save(tmp_path / "feeds.npy", array)
    for model in (ROW_MODEL, model_of(x=("float32", (2, 3)))):
        feeds = load_feeds(tmp_path / "feeds.npy", model)
        assert len(feeds) == 4
        assert all(np.array_equal(f["x"], a) for f, a in zip(feeds, array, strict=True))


def test_a_fixed_batch_of_two_takes_rows_two_by_two(tmp_path: Path) -> None:
    np.save(tmp_path / "feeds.npy", rows(6))
    feeds = load_feeds(tmp_path / "feeds.npy", model_of(x=("float32", (2, 3))))
    assert [f["x"][0, 0] for f in feeds] == [0, 6, 12]


def test_a_single_npz_with_one_feed_of_several_inputs_is_one_sample(tmp_path: Path) -> None:
    model = model_of(x=("float32", ("b", 3)), state=("float32", (2, "b", 4)), sr=("int64", ()))
    np.savez(
        tmp_path / "one.npz", x=rows(1), state=np.zeros((2, 1, 4), np.float32), sr=np.array(8000)
    )
    feeds = load_feeds(tmp_path / "one.npz", model)
    assert (len(feeds), feeds.notes) == (1, ())
    assert {k: v.shape for k, v in feeds[0].items()} == {"x": (1, 3), "state": (2, 1, 4), "sr": ()}


def test_scalars_and_fixed_states_are_shared_by_all_samples_and_this_is_said(
    tmp_path: Path,
) -> None:
    model = model_of(x=("float32", (1, 3)), state=("float32", (2, 4)), sr=("int64", ()))
    np.savez(tmp_path / "f.npz", x=rows(3), state=np.ones((2, 4), np.float32), sr=np.array(8000))
    feeds = load_feeds(tmp_path / "f.npz", model)
    assert [int(f["sr"]) for f in feeds] == [8000] * 3
    assert feeds.notes == ("f.npz: all samples share 'state', 'sr'",)


def test_samples_of_one_file_must_agree_in_number(tmp_path: Path) -> None:
    model = model_of(a=("float32", (1, 3)), b=("float32", (1, 3)))
    np.savez(tmp_path / "f.npz", a=rows(3), b=rows(2))
    assert error_of(tmp_path / "f.npz", model) == (
        "f.npz: 'b' has 2 samples and 'a' 3, expected as many of each",
        "Save all arrays with the same leading sample axis.",
    )


def test_a_stacked_array_of_another_shape_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.zeros((5, 7), np.float32))
    assert error_of(tmp_path / "f.npy", IMAGE_MODEL) == (
        "f.npy: 'x' has shape (5, 7), expected (samples, 1, 3, 4, 6)",
        "Reshape, resize or pad it to (samples, 1, 3, 4, 6) and save it again.",
    )
    np.save(tmp_path / "f.npy", np.zeros((3, 4, 6), np.float32))
    assert error_of(tmp_path / "f.npy", IMAGE_MODEL)[1].startswith("Add the batch axis")


def test_a_stacked_file_without_samples_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.zeros((0, 3), np.float32))
    assert error_of(tmp_path / "f.npy", ROW_MODEL) == (
        "f.npy: 'x' holds no samples: its shape is (0, 3)",
        "Save it with at least one sample.",
    )


def test_an_npy_needs_a_model_with_one_input(tmp_path: Path) -> None:
    model = model_of(a=("float32", (1, 3)), b=("float32", (1, 3)))
    np.save(tmp_path / "f.npy", rows(1))
    expected = (
        "f.npy is one array without a name, but the model has 2 inputs: a, b",
        "Save one .npz per sample, keyed by input name.",
    )
    assert error_of(tmp_path / "f.npy", model) == expected
    assert error_of(tmp_path, model) == expected


def test_a_folder_of_npy_is_one_feed_each(tmp_path: Path) -> None:
    for index in range(2):
        np.save(tmp_path / f"{index}.npy", rows(1) + index)
    feeds = load_feeds(tmp_path, ROW_MODEL)
    assert (feeds.description, feeds[1]["x"][0, 0]) == ("2 .npy files", 1)


# ----------------------------------------------------------------------------- ONNX's test data


def write_set(folder: Path, *arrays: Any) -> Path:
    folder.mkdir(parents=True)
    for index, array in enumerate(arrays):
        proto = numpy_helper.from_array(np.asarray(array))
        (folder / f"input_{index}.pb").write_bytes(proto.SerializeToString())
    (folder / "output_0.pb").write_bytes(b"")
    return folder


def test_onnx_test_data_sets_are_read_by_input_order_and_number(tmp_path: Path) -> None:
    model = model_of(a=("float32", (1, 3)), b=("int64", ()))
    for index in (10, 2, 0):
        write_set(tmp_path / f"test_data_set_{index}", rows(1) + index, np.array(index))
    feeds = load_feeds(tmp_path, model)
    assert feeds.names == ("test_data_set_0", "test_data_set_2", "test_data_set_10")
    assert [int(f["b"]) for f in feeds] == [0, 2, 10]
    assert feeds.description == "3 ONNX test data sets"
    one = load_feeds(tmp_path / "test_data_set_2", model)
    assert (one.names, one.notes) == (("test_data_set_2",), ())
    assert one[0]["a"][0, 0] == 2


def test_a_single_pb_is_one_sample_named_after_the_file(tmp_path: Path) -> None:
    file = write_set(tmp_path / "in", rows(1)) / "input_0.pb"
    assert load_feeds(file, ROW_MODEL).names == ("input_0.pb",)
    message, _ = error_of(file, model_of(a=("float32", (1, 3)), b=("int64", ())))
    assert message == ("input_0.pb is one array without a name, but the model has 2 inputs: a, b")


def test_a_test_data_set_with_too_few_tensors_is_refused(tmp_path: Path) -> None:
    model = model_of(a=("float32", (1, 3)), b=("int64", ()))
    write_set(tmp_path / "test_data_set_0", rows(1))
    assert error_of(tmp_path, model) == (
        "test_data_set_0 has input_0.pb, expected input_0.pb, input_1.pb: one per input of the "
        "model",
        "Write them in input order: a, b.",
    )


def test_a_broken_pb_is_refused_by_name(tmp_path: Path) -> None:
    write_set(tmp_path / "test_data_set_0", rows(1))
    (tmp_path / "test_data_set_0" / "input_0.pb").write_bytes(b"\xff\xff\xff")
    assert error_of(tmp_path, ROW_MODEL)[0] == (
        "test_data_set_0/input_0.pb: 'x' cannot be read as an ONNX tensor: it is no TensorProto"
    )


def test_a_pb_that_claims_far_more_than_it_holds_or_points_outside_is_refused(
    tmp_path: Path,
) -> None:
    file = tmp_path / "input_0.pb"
    huge = TensorProto(dims=[1 << 40], data_type=TensorProto.FLOAT)
    file.write_bytes(huge.SerializeToString())
    assert "claims the shape (1099511627776,)" in error_of(file, ROW_MODEL)[0]
    outside = numpy_helper.from_array(rows(1))
    outside.ClearField("raw_data")
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="/etc/passwd")
    file.write_bytes(outside.SerializeToString())
    assert "its values lie in another file" in error_of(file, ROW_MODEL)[0]


# ------------------------------------------------------------------------------------ conversions


@pytest.mark.parametrize(
    ("given", "wanted", "values"),
    [
        ("float64", "float32", [0.1, -2.5, 3.0]),
        ("int32", "int64", [1, -2, 3]),
        ("int64", "int32", [1, -2, 2**31 - 1]),
        ("float32", "int64", [1.0, -2.0, 3.0]),
        ("float64", "uint8", [0.0, 7.0, 255.0]),
        ("uint8", "float32", [0, 128, 255]),
        ("float16", "float32", [0.5, 1.5, 2.0]),
        ("float32", "float16", [0.5, 1.5, 2.0]),
        ("int64", "bool", [0, 1, 1]),
        ("bool", "float32", [True, True, False]),
        ("bool", "uint64", [True, True, False]),
    ],
)
def test_lossless_conversions_are_made_and_said(
    tmp_path: Path, given: str, wanted: str, values: list[Any]
) -> None:
    folder_of(tmp_path, [np.array([values], given), np.array([values[::-1]], given)])
    feeds = load_feeds(tmp_path, model_of(x=(wanted, (1, 3))))
    assert feeds[0]["x"].dtype.name == wanted
    assert np.array_equal(feeds[0]["x"], np.array([values]).astype(wanted))
    assert feeds.notes == (f"input 'x' is {given} and was converted to {wanted}",)


@pytest.mark.parametrize(
    ("given", "wanted", "value"),
    [
        ("float64", "int64", 0.5),
        ("float64", "float32", 1e300),
        ("int64", "int32", 2**31),
        ("int64", "float32", 2**24 + 1),
        ("float32", "float16", 0.1),
        ("float64", "float16", 1e6),
        ("float32", "int64", float("nan")),
        ("float64", "int64", 2.0**63),
        ("uint64", "int64", 2**63),
        ("int8", "uint8", -1),
        ("float64", "uint8", 256.0),
        ("int64", "bool", 2),
        ("uint64", "float32", 2**64 - 1),
    ],
)
def test_lossy_conversions_are_refused_when_loading(
    tmp_path: Path, given: str, wanted: str, value: Any
) -> None:
    folder_of(tmp_path, [np.array([[0, 1, value]], given)])
    found = np.array([value], given)[0]
    with pytest.raises(FeedError) as caught:
        load_feeds(tmp_path, model_of(x=(wanted, (1, 3))))
    assert caught.value.message == (
        f"00.npz: 'x' is {given} and holds {found}, "
        f"which does not fit the {wanted} that the model expects"
    )
    assert caught.value.hint == f"If the change is meant, save array.astype(np.{wanted}) instead."


def test_a_conversion_in_some_files_says_in_how_many(tmp_path: Path) -> None:
    folder_of(tmp_path, [rows(1), rows(1).astype(np.float64) + 1, rows(1) + 2])
    assert load_feeds(tmp_path, ROW_MODEL).notes == (
        "input 'x' is float64 in 1 of 3 files and was converted to float32",
    )


def test_a_lossy_sample_of_a_stacked_file_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.array([[0.0], [1.0], [1.5]]))
    message, _ = error_of(tmp_path / "f.npy", model_of(x=("int64", (1, 1))))
    assert message.startswith("f.npy: 'x' of sample 2 is float64 and holds 1.5")


@quick
@given(
    array=hnp.arrays(
        st.sampled_from(["int8", "int32", "int64", "uint64", "float16", "float32", "float64"]),
        (3,),
    ),
    wanted=st.sampled_from(["int8", "uint8", "int32", "int64", "uint64", "float16", "float32"]),
)
def test_what_is_converted_holds_the_same_numbers(
    tmp_path: Path, array: np.ndarray[Any, Any], wanted: str
) -> None:
    np.savez(tmp_path / "f.npz", x=array)
    try:
        got = load_feeds(tmp_path / "f.npz", model_of(x=(wanted, (3,))))
        values = np.concatenate([np.atleast_1d(f["x"]) for f in got])
    except FeedError:
        return
    # Python's numbers compare exactly across types.
    for before, after in zip(array.tolist(), values.tolist(), strict=True):
        if array.dtype.kind == "f" and wanted == "float32":
            assert after == np.float32(before) or after != after
        else:
            assert before == after or (before != before and after != after)


# --------------------------------------------------------------------------------------- bad input


def test_a_missing_path_is_said(tmp_path: Path) -> None:
    assert error_of(tmp_path / "nope", ROW_MODEL) == (
        f"{tmp_path / 'nope'} does not exist",
        "Check the path and its spelling.",
    )


def test_a_place_without_feeds_is_said(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    expected = "expected .npz, .npy, ONNX test data (input_0.pb), image files or texts.txt"
    assert error_of(tmp_path / "in", ROW_MODEL) == (
        f"in holds no feeds: found nothing, {expected}",
        "Unpack archives and name the folder or file that holds the feeds.",
    )
    file = tmp_path / "in" / "a.csv"
    file.write_text("1")
    assert error_of(tmp_path / "in", ROW_MODEL)[0].startswith("in holds no feeds: found a.csv, ")
    assert error_of(file, ROW_MODEL)[0] == f"a.csv is no feed, {expected}"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["input_id", "attention_mask"],
            "has the key 'input_id', which is no input of the model; "
            "nearest: input_ids, attention_mask",
        ),
        (
            ["input_ids"],
            "lacks the input 'attention_mask', found input_ids, expected input_ids, attention_mask",
        ),
        ([], "lacks the input 'input_ids', found nothing, expected input_ids, attention_mask"),
    ],
)
def test_unknown_and_missing_keys_are_named(tmp_path: Path, keys: list[str], message: str) -> None:
    model = model_of(input_ids=("int64", (1, 2)), attention_mask=("int64", (1, 2)))
    np.savez(tmp_path / "a.npz", **{key: np.ones((1, 2), np.int64) for key in keys})
    assert error_of(tmp_path, model) == (
        f"a.npz {message}",
        "Save it with np.savez('a.npz', **{'input_ids': ..., 'attention_mask': ...}).",
    )


def test_feeds_in_a_subfolder_are_pointed_at_and_the_hint_works(tmp_path: Path) -> None:
    inner = folder_of(tmp_path / "in" / "inner", [rows(1), rows(1) + 1])
    message, hint = error_of(tmp_path / "in", ROW_MODEL)
    assert message == (
        "in holds no feeds itself; its subfolder inner has 2 files that may be feeds"
    )
    assert hint == f"Name the subfolder: {inner}"
    assert len(load_feeds(Path(hint.removeprefix("Name the subfolder: ")), ROW_MODEL)) == 2


@pytest.mark.parametrize(
    ("shape", "message", "hint"),
    [
        (
            (3, 4, 6),
            "00.npz: 'x' has shape (3, 4, 6), expected (1, 3, 4, 6)",
            "Add the batch axis with array[np.newaxis] and save it again.",
        ),
        (
            (1, 4, 6, 3),
            "00.npz: 'x' has shape (1, 4, 6, 3), expected (1, 3, 4, 6)",
            "Move the channels with np.transpose(array, (0, 3, 1, 2)) and save it again.",
        ),
        (
            (1, 3, 8, 8),
            "00.npz: 'x' has shape (1, 3, 8, 8), expected (1, 3, 4, 6)",
            "Reshape, resize or pad it to (1, 3, 4, 6) and save it again.",
        ),
        (
            (5, 3, 4, 6),
            "00.npz: 'x' has shape (5, 3, 4, 6), expected (1, 3, 4, 6)",
            "Load the file itself instead of its folder: its leading axis is then samples.",
        ),
        (
            (0, 3, 4, 6),
            "00.npz: 'x' holds no samples: its shape is (0, 3, 4, 6)",
            "Save it with at least one sample.",
        ),
    ],
)
def test_a_wrong_shape_is_said_with_a_hint(
    tmp_path: Path, shape: tuple[int, ...], message: str, hint: str
) -> None:
    folder_of(tmp_path, [np.zeros(shape, np.float32)])
    assert error_of(tmp_path, IMAGE_MODEL) == (message, hint)


def test_the_hints_for_shapes_work_when_followed(tmp_path: Path) -> None:
    array = np.zeros((4, 6, 3), np.float32)
    for step in (lambda a: a[np.newaxis], lambda a: np.transpose(a, (0, 3, 1, 2))):
        array = step(array)
    assert len(load_feeds(folder_of(tmp_path / "a", [array]), IMAGE_MODEL)) == 1
    folder_of(tmp_path / "b", [np.zeros((5, 3, 4, 6), np.float32)])
    assert len(load_feeds(tmp_path / "b" / "00.npz", IMAGE_MODEL)) == 5


class _Trap:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_nothing_is_ever_unpickled(tmp_path: Path, name: str) -> None:
    trap = np.array([_Trap(tmp_path / "sprung")], dtype=object)
    folder = tmp_path / "in"
    folder.mkdir()
    if name.endswith("z"):
        np.savez(folder / name, x=trap)
    else:
        np.save(folder / name, trap)
    expected = (
        f"{name}: 'x' holds text or pickled objects, expected float32",
        "Save it as numbers: np.asarray(array, dtype=np.float32); pickles are never opened.",
    )
    assert error_of(folder, ROW_MODEL) == expected
    assert error_of(folder / name, ROW_MODEL) == expected
    assert not (tmp_path / "sprung").exists()


def test_texts_and_complex_numbers_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, [np.array([["a", "b", "c"]])])
    assert error_of(tmp_path, ROW_MODEL)[0] == "00.npz: 'x' holds str32, expected float32"
    folder_of(tmp_path, [np.zeros((1, 3), np.complex64)])
    assert error_of(tmp_path, ROW_MODEL)[0] == "00.npz: 'x' holds complex64, expected float32"
    write_set(tmp_path / "in", np.array([["a"]], dtype=object))
    assert "holds text or pickled objects" in error_of(tmp_path / "in", ROW_MODEL)[0]


@pytest.mark.parametrize(
    "content",
    [b"", b"<html></html>", b"version https://git-lfs", b"PK\x03\x04 broken", b"\x80\x04."],
)
def test_a_broken_npz_or_npy_is_named(tmp_path: Path, content: bytes) -> None:
    for name, what in (("a.npz", ""), ("a.npy", ": 'x'")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        message, hint = error_of(folder, ROW_MODEL)
        assert message.startswith(f"{name}{what} cannot be read as an ")
        assert hint == "Save it again with np.savez or np.save."


def test_a_truncated_or_flipped_npz_is_an_error_wherever_it_breaks(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=np.random.default_rng(0).standard_normal((1, 3)))
    whole = buffer.getvalue()
    file = tmp_path / "a.npz"
    for cut in range(0, len(whole) - 1, 7):
        file.write_bytes(whole[:cut])
        error_of(tmp_path, ROW_MODEL)
    for at in range(0, len(whole), 5):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        # Some bytes (a time stamp) may change without harm; any other exception fails the test.
        with contextlib.suppress(FeedError):
            list(load_feeds(tmp_path, ROW_MODEL))


def bomb(path: Path, shape: tuple[int, ...]) -> Path:
    """An archive of a few hundred bytes whose header claims an array of this shape."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue())
    return path


def test_an_array_larger_than_the_limit_is_refused_before_memory_is_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays_module, "MAX_ARRAY_BYTES", 2**20)
    np.save(tmp_path / "a.npy", np.zeros((1, 1 << 22), np.float32))
    tracemalloc.start()
    message, _ = error_of(tmp_path, model_of(x=("float32", (1, None))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "claims 0.0 GiB, expected at most 0.000976562 GiB at once" in message
    assert peak < 2**21


def test_a_header_that_claims_more_than_the_file_has_is_damaged(tmp_path: Path) -> None:
    bomb(tmp_path / "a.npz", (1, 1 << 40))
    message, hint = error_of(tmp_path, model_of(x=("float32", (1, None))))
    assert message == (
        "a.npz: 'x' cannot be read as an array: its header (1, 1099511627776) float32 "
        "needs 4,398,046,511,104 bytes, the file has 0"
    )
    assert hint == "Save it again with np.savez or np.save."


def test_more_samples_than_anyone_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds_module, "MAX_SAMPLES", 3)
    np.save(tmp_path / "a.npy", rows(4))
    assert error_of(tmp_path / "a.npy", ROW_MODEL)[0] == (
        "a.npy claims 4 samples, expected at most 3"
    )


def test_a_file_that_vanishes_while_iterating_is_a_feed_error(tmp_path: Path) -> None:
    feeds = load_feeds(folder_of(tmp_path, [rows(1), rows(1) + 1, rows(1) + 2]), ROW_MODEL)
    (tmp_path / "02.npz").unlink()
    with pytest.raises(FeedError, match=r"02\.npz cannot be read as an \.npz archive"):
        list(feeds)


@pytest.mark.parametrize("dtype", ["int4", "FLOAT8E8M0", "complex64"])
def test_an_element_type_that_cannot_be_fed_is_refused_with_those_that_can(
    tmp_path: Path, dtype: str
) -> None:
    model = model_of(x=(dtype, (1,)))
    with pytest.raises(FeedError, match="input 'x' has element type") as caught:
        random_feeds(model)
    assert error_of(folder_of(tmp_path, [np.zeros(1)]), model)[0] == caught.value.message
    assert caught.value.message.endswith(
        "which cannot be fed; expected floating point of 8 to 64 bits, integers of 8 to 64 bits, "
        "bool or string"
    )


@pytest.mark.parametrize("kind", ["folder", "stack", "images", "pb"])
def test_a_file_that_changes_after_loading_is_named(tmp_path: Path, kind: str) -> None:
    if kind == "images":
        feeds = load_feeds(image_folder(tmp_path, picture(), recipe={}), IMAGE_MODEL)
        file = tmp_path / "0.png"
        content = picture(7).tobytes()
    elif kind == "pb":
        file = write_set(tmp_path / "in", rows(1)) / "input_0.pb"
        feeds, content = load_feeds(tmp_path / "in", ROW_MODEL), b""
    else:
        file = folder_of(tmp_path, [rows(4)]) / "00.npz"
        feeds = load_feeds(tmp_path if kind == "folder" else file, ROW_MODEL)
        buffer = io.BytesIO()
        np.savez(buffer, x=rows(2, 6))
        content = buffer.getvalue()
    assert feeds[0]
    file.write_bytes(content)
    with pytest.raises(FeedError) as caught:
        feeds[0]
    assert caught.value.message == f"{file.name} changed after the feeds were loaded"
    assert caught.value.hint == "Load the feeds again when nothing writes to them any more."


def test_identical_samples_are_noted(tmp_path: Path) -> None:
    folder_of(tmp_path, [rows(1)] * 3)
    assert load_feeds(tmp_path, ROW_MODEL).notes == (
        "all 3 samples hold the same values, so figures say nothing about others",
    )
    assert load_feeds(tmp_path, ROW_MODEL, limit=1).notes == ()


def test_nan_and_infinity_load_and_are_counted_by_sample(tmp_path: Path) -> None:
    bad = np.array([[np.nan, np.inf, 1]], np.float32)
    feeds = load_feeds(folder_of(tmp_path, [rows(1), bad]), ROW_MODEL)
    assert feeds.nonfinite() == [("01.npz", "x", 2)]
    assert feeds.subset([0]).nonfinite() == []
    assert len(list(feeds)) == 2


# ------------------------------------------------------------------------------------------ labels


def test_labels_lie_in_the_folder_or_beside_a_single_file(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", [rows(1), rows(1) + 1])
    (tmp_path / "in" / "labels.json").write_text("[3, 0]")
    assert load_feeds(tmp_path / "in", ROW_MODEL).labels == (3, 0)
    np.savez(tmp_path / "f.npz", x=rows(3))
    (tmp_path / "labels.json").write_text("\ufeff[1, 2, 3]", "utf-8")
    assert load_feeds(tmp_path / "f.npz", ROW_MODEL).labels == (1, 2, 3)


def test_labels_of_a_single_file_must_fit_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", x=rows(3))
    (tmp_path / "labels.json").write_text("[1, 2]")
    message = "labels.json has 2 labels, expected 3: one per sample"
    assert error_of(tmp_path / "f.npz", ROW_MODEL)[0] == message


def test_labels_of_a_folder_are_not_taken_for_one_file_of_it(tmp_path: Path) -> None:
    folder_of(tmp_path, [rows(1), rows(1) + 1])
    (tmp_path / "labels.json").write_text("[3, 0]")
    feeds = load_feeds(tmp_path / "00.npz", ROW_MODEL)
    assert feeds.labels is None
    assert feeds.notes == ("labels.json has 2 labels for 1 sample and is not used",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "labels.json has 1 label, expected 2: one per sample"),
        ("[1, 1.5]", "labels.json has 1.5 at position 1, expected an integer of 0 or more"),
        ("[1, true]", "labels.json has true at position 1, expected an integer of 0 or more"),
        ("[-1, 1]", "labels.json has -1 at position 0, expected an integer of 0 or more"),
        ('{"a": 1}', "labels.json holds an object, expected a list"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str) -> None:
    folder = folder_of(tmp_path / "in", [rows(1), rows(1) + 1])
    (folder / "labels.json").write_text(text)
    assert error_of(folder, ROW_MODEL)[0] == message


def test_labels_that_are_no_json_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [rows(1), rows(1) + 1])
    for text in ("[1, ", "[" * 100_000):
        (folder / "labels.json").write_text(text)
        message, _ = error_of(folder, ROW_MODEL)
        assert message.startswith("labels.json cannot be read as labels: ")


# ------------------------------------------------------------------------------------------- rows


def test_a_sample_of_several_rows_takes_a_label_for_each(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [rows(2), rows(3) + 1, rows(1) + 2])
    (folder / "labels.json").write_text("[0, 1, 2, 3, 4, 5]")
    feeds = load_feeds(folder, ROW_MODEL)
    assert (feeds.rows, feeds.labels, feeds.notes) == ((2, 3, 1), (0, 1, 2, 3, 4, 5), ())
    part = feeds.subset([2, 1, -1])
    assert (part.rows, part.labels) == ((1, 3, 1), (5, 2, 3, 4, 5))
    few = load_feeds(folder, ROW_MODEL, limit=2)
    assert (few.rows, few.labels) == ((2, 3), (0, 1, 2, 3, 4))


def test_one_label_per_sample_counts_for_each_of_its_rows_and_this_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [rows(2), rows(1) + 1])
    (folder / "labels.json").write_text("[7, 8]")
    feeds = load_feeds(folder, ROW_MODEL)
    assert (feeds.rows, feeds.labels) == ((2, 1), (7, 7, 8))
    assert feeds.notes == (
        "labels.json has one label per sample, which counts for each of its rows",
    )
    assert load_feeds(folder, ROW_MODEL, limit=1).labels == (7, 7)


@pytest.mark.parametrize("limit", [None, 1])
def test_labels_of_neither_number_say_both(tmp_path: Path, limit: int | None) -> None:
    folder = folder_of(tmp_path / "in", [rows(2), rows(3)])
    (folder / "labels.json").write_text("[1, 2, 3]")
    assert error_of(folder, ROW_MODEL, limit=limit)[0] == (
        "labels.json has 3 labels, expected 2 (one per sample) or 5 (one per row)"
    )


def test_a_label_no_model_has_a_class_for_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [rows(1)])
    (folder / "labels.json").write_text("[2147483648]")
    assert error_of(folder, ROW_MODEL)[0] == (
        "labels.json has 2147483648 at position 0, "
        "expected an integer of 0 or more and below 2,147,483,648"
    )


def test_a_stack_of_fixed_batches_has_their_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", rows(6))
    (tmp_path / "labels.json").write_text("[0, 1, 2, 3, 4, 5]")
    feeds = load_feeds(tmp_path / "f.npy", model_of(x=("float32", (2, 3))))
    assert (feeds.rows, feeds.labels) == ((2, 2, 2), (0, 1, 2, 3, 4, 5))
    assert feeds.subset([1]).labels == (2, 3)
    assert random_feeds(model_of(x=("float32", (4, 3))), samples=2).rows == (4, 4)


def handing_on(shape: Shape | None, output: Shape | None) -> Model:
    """A model whose output has another shape than its input."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"], "id")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
    )
    return Model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    )


@pytest.mark.parametrize(
    ("shape", "output", "expected"),
    [
        (("n", 5), ("n", 9), 2),
        (("n", 5), (None, 9), 2),
        (("n", 5), None, 2),
        ((2, 5), (2, 9), 2),
        ((2, 5), ("n", 9), 2),
        (("n", 5), ("m", 9), 1),
        (("n", 5), (1, 9), 1),
        ((2, 5), (1, 9), 1),
        ((2, 5), (), 1),
    ],
)
def test_a_leading_axis_is_a_batch_where_an_output_has_it_too(
    tmp_path: Path, shape: Shape, output: Shape | None, expected: int
) -> None:
    folder = folder_of(tmp_path, [np.zeros((2, 5), np.float32)])
    assert load_feeds(folder, handing_on(shape, output)).rows == (expected,)


def test_a_state_of_fixed_shape_and_a_scalar_do_not_hide_the_batch(tmp_path: Path) -> None:
    model = model_of(state=("float32", (2, "b", 4)), x=("float32", ("b", 3)), sr=("int64", ()))
    np.savez(tmp_path / "0.npz", x=rows(5), state=np.zeros((2, 5, 4), np.float32), sr=8000)
    assert load_feeds(tmp_path, model).rows == (5,)


# --------------------------------------------------------------------------- unusual shapes, types


def test_an_empty_tensor_beside_others_is_fed_as_it_is(tmp_path: Path) -> None:
    model = model_of(x=("float32", ("b", 3)), past=("float32", (1, 4, "past", 8)))
    np.savez(tmp_path / "0.npz", x=rows(1), past=np.zeros((1, 4, 0, 8), np.float32))
    feeds = load_feeds(tmp_path, model)
    assert feeds[0]["past"].shape == (1, 4, 0, 8)
    assert (feeds.nonfinite(), feeds.rows) == ([], (1,))
    open_session(model, optimized=False).run(feeds[0])


def test_a_sample_without_any_value_is_refused(tmp_path: Path) -> None:
    assert error_of(folder_of(tmp_path, [np.zeros((0, 3), np.float32)]), ROW_MODEL) == (
        "00.npz holds no values, only the empty 'x'",
        "Save it with at least one sample.",
    )


def test_ragged_samples_keep_their_own_shapes(tmp_path: Path) -> None:
    model = model_of(x=("float32", (1, "time")), y=("int64", ("time",)))
    for length in (1, 7, 3):
        np.savez(
            tmp_path / f"{length}.npz", x=np.ones((1, length), np.float32), y=np.arange(length)
        )
    feeds = load_feeds(tmp_path, model)
    assert [(f["x"].shape, f["y"].shape) for f in feeds] == [
        ((1, 1), (1,)),
        ((1, 3), (3,)),
        ((1, 7), (7,)),
    ]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 2, 3, 4, 5, 6)])
def test_an_input_of_unknown_rank_takes_any_array(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = np.ones(shape, np.float32)
    folder_of(tmp_path, [array])
    model = handing_on(None, None)
    feeds = load_feeds(tmp_path, model)
    assert feeds[0]["x"].shape == shape
    assert open_session(model, optimized=False).run(feeds[0])["y"].shape == shape


@pytest.mark.parametrize("kind", ["npz", "npy", "pb"])
@pytest.mark.parametrize(
    "dtype", ["float16", "float64", "bool", "int32", "int64", "uint8", "uint64", "string"]
)
def test_every_element_type_is_read_from_every_form_and_run(
    tmp_path: Path, kind: str, dtype: str
) -> None:
    words = ["0", "one", "zwölf"]
    array = np.array([words]) if dtype == "string" else np.array([[0, 1, 1]]).astype(dtype)
    if kind == "pb":
        write_set(tmp_path / "in", array.astype(object) if dtype == "string" else array)
    elif kind == "npz":
        folder_of(tmp_path / "in", [array])
    else:
        (tmp_path / "in").mkdir()
        np.save(tmp_path / "in" / "a.npy", array)
    model = model_of(x=(dtype, ("batch", 3)))
    feed = load_feeds(tmp_path / "in", model)[0]
    assert feed["x"].dtype.name == ("object" if dtype == "string" else dtype)
    out = open_session(model, optimized=False).run(feed)["x_out"]
    assert out.tolist() == array.tolist()


# What ONNX calls a type, what numpy does, and values near each other with what they round to.
CODED = [
    ("bfloat16", "bfloat16", [1.0, -2.5, 1.001], [1.0, -2.5, 1.0]),
    ("FLOAT8E4M3FN", "float8_e4m3fn", [1.0, -448.0, 1.05], [1.0, -448.0, 1.0]),
    ("FLOAT8E5M2", "float8_e5m2", [1.0, -57344.0, 1.1], [1.0, -57344.0, 1.0]),
]


@pytest.mark.parametrize(("onnx_name", "name", "values", "rounded"), CODED)
@pytest.mark.parametrize("form", ["float32", "float64", "saved", "pb"])
def test_types_that_numpy_lacks_are_rounded_to_or_read_as_they_are_and_run(
    tmp_path: Path, onnx_name: str, name: str, values: list[float], rounded: list[float], form: str
) -> None:
    model = model_of(x=(onnx_name, (1, 3)))
    if form.startswith("float"):
        folder_of(tmp_path / "in", [np.array([values], form)])
    elif form == "saved":
        # np.savez writes these as plain bytes of their length.
        folder_of(tmp_path / "in", [np.array([values]).astype(name)])
    else:
        write_set(tmp_path / "in", np.array([values]).astype(name))
    feeds = load_feeds(tmp_path / "in", model)
    assert feeds[0]["x"].dtype.name == name
    assert feeds[0]["x"].astype(np.float64).tolist() == [rounded]
    said = (f"input 'x' is {form} and was rounded to {name}",)
    assert feeds.notes == (said if form.startswith("float") else ())
    assert feeds.nonfinite() == []
    graph = helper.make_graph(
        [helper.make_node("Cast", ["x"], ["y"], "cast", to=TensorProto.FLOAT)],
        "g",
        list(model.proto.graph.input),
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    cast = Model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    )
    assert open_session(cast, optimized=False).run(feeds[0])["y"].tolist() == [rounded]
    drawn = random_feeds(cast, samples=1)[0]["x"]
    assert drawn.dtype.name == name
    assert np.isfinite(drawn.astype(np.float32)).all()


def test_what_a_type_that_numpy_lacks_cannot_hold_is_refused(tmp_path: Path) -> None:
    for name, array in (
        ("FLOAT8E4M3FN", np.array([[1.0, 500.0]], np.float32)),
        ("FLOAT8E4M3FN", np.array([[1, 17]])),
        ("bfloat16", np.array([[1.0, 1e300]])),
        ("bfloat16", np.array([[1, 257]])),
    ):
        message, hint = error_of(folder_of(tmp_path, [array]), model_of(x=(name, (1, 2))))
        assert f"00.npz: 'x' is {array.dtype.name} and holds {array[0, 1]}, which" in message
        assert hint == "Scale the values into its range, or export the model with a float32 input."
    not_finite = folder_of(tmp_path, [np.array([[np.inf, np.nan]], np.float32)])
    feeds = load_feeds(not_finite, model_of(x=("bfloat16", (1, 2))))
    assert feeds.nonfinite() == [("00.npz", "x", 2)]
    folder_of(tmp_path, [np.zeros((1, 2), "V4")])
    assert error_of(tmp_path, model_of(x=("bfloat16", (1, 2)))) == (
        "00.npz: 'x' holds void32, expected bfloat16",
        "Save it as numbers: np.asarray(array, dtype=np.float32); pickles are never opened.",
    )


# ------------------------------------------------------------------------------------------ images


def test_images_need_a_recipe_and_the_hint_works(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in", picture())
    message, hint = error_of(folder, IMAGE_MODEL)
    assert message == (
        "in holds images but no preprocess.json, which says how pixels become the model's input"
    )
    assert hint == (
        'Write preprocess.json beside them, e.g. {"preset": "yolo"} '
        "(presets: yolo, torchvision, tf, bgr)."
    )
    for preset in PRESETS:
        (folder / "preprocess.json").write_text(json.dumps({"preset": preset}))
        assert load_feeds(folder, IMAGE_MODEL)[0]["x"].shape == (1, 3, 4, 6)


def test_pixels_are_scaled_and_normalised_by_the_formula(tmp_path: Path) -> None:
    recipe = {"scale": 1 / 255, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    image = picture()
    feeds = load_feeds(image_folder(tmp_path, image, recipe=recipe), IMAGE_MODEL)
    pixels = np.asarray(image).astype(np.float64)
    expected = (pixels / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.6, 0.7])
    got = feeds[0]["x"]
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_allclose(got[0], expected.transpose(2, 0, 1), rtol=0, atol=1e-5)
    assert (feeds.names, feeds.description, feeds.notes) == (("0.png",), "1 image", ())


def test_the_picture_shows_natural_colours_of_what_the_model_gets(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 40), (200, 100, 50))
    feeds = load_feeds(image_folder(tmp_path, image, recipe={"preset": "bgr"}), IMAGE_MODEL)
    shown = feeds.picture(0)
    assert feeds.pictures
    assert shown is not None
    assert (shown.shape, shown.dtype.name) == ((4, 6, 3), "uint8")
    assert shown[0, 0].tolist() == [200, 100, 50]
    gray = Preprocess(color="GRAY", size=(4, 6)).picture(image)
    assert gray.shape == (4, 6, 3)
    assert not random_feeds(IMAGE_MODEL).pictures
    assert random_feeds(IMAGE_MODEL).picture(0) is None


def test_a_palette_with_a_table_of_transparency_raises_no_warning(tmp_path: Path) -> None:
    image = Image.new("P", (6, 4))
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "a.png", transparency=bytes([0, 128, 255]))
    feeds = image_feeds(tmp_path, IMAGE_MODEL, Preprocess())
    assert feeds[0]["x"].shape == (1, 3, 4, 6)
    assert feeds.notes == ("1 of 1 images are partly transparent, which is dropped",)


def test_depth_transparency_and_frames_that_are_lost_are_said(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6), 9 << 8, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (6, 4)).save(tmp_path / "clear.png")
    frames = [Image.new("L", (6, 4), v) for v in (0, 99)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert image_feeds(tmp_path, IMAGE_MODEL, Preprocess()).notes == (
        "1 of 3 images are partly transparent, which is dropped",
        "1 of 3 images have 16 bits per pixel, of which the upper 8 are used",
        "1 of 3 images have several frames, of which the first is used",
    )


def test_broken_pictures_are_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in", picture(60, 40), picture(60, 40, 1), recipe={})
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    assert error_of(folder, IMAGE_MODEL)[0].startswith("1.png cannot be read as a picture: ")
    for content in (b"", b"<html>"):
        (folder / "1.png").write_bytes(content)
        assert error_of(folder, IMAGE_MODEL) == (
            "1.png cannot be read as a picture: its content is of no known format",
            "Save it as PNG or JPEG, or remove it from the folder.",
        )


def test_an_explicit_recipe_wins_over_the_one_beside(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4), "white")
    folder = image_folder(tmp_path / "in", image, recipe={"preset": "tf"})
    (tmp_path / "raw.json").write_text('{"scale": 0.5}')
    assert load_feeds(folder, IMAGE_MODEL)[0]["x"].max() == 1
    assert load_feeds(folder, IMAGE_MODEL, preprocess=tmp_path / "raw.json")[0]["x"].max() == 127.5
    assert load_feeds(folder, IMAGE_MODEL, preprocess=PRESETS["bgr"])[0]["x"].max() == 255
    assert load_feeds(folder / "0.png", IMAGE_MODEL).description == "1 image"
    assert len(image_feeds(folder / "0.png", IMAGE_MODEL, PRESETS["bgr"])) == 1


def test_a_recipe_for_arrays_is_not_applied_and_this_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", [rows(1)])
    assert load_feeds(folder, ROW_MODEL, preprocess=PRESETS["tf"]).notes == (
        "preprocessing is for images and is not applied to .npz",
    )


def test_images_with_labels_in_sorted_order(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, picture(), picture(seed=1), recipe={})
    (folder / "labels.json").write_text("[7, 8]")
    (folder / "boxes.json").write_text("[]")
    feeds = load_feeds(folder, IMAGE_MODEL)
    assert (feeds.labels, feeds.notes) == ((7, 8), ())
    assert load_feeds(folder, IMAGE_MODEL, limit=1).labels == (7,)


def test_whole_pixels_fit_an_integer_input_and_scaled_ones_do_not(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, picture())
    model = model_of(x=("uint8", (1, 3, 4, 6)))
    assert image_feeds(folder, model, Preprocess())[0]["x"].dtype == np.uint8
    with pytest.raises(FeedError, match="which does not fit the uint8"):
        image_feeds(folder, model, PRESETS["yolo"])[0]
    half = model_of(x=("float16", (1, 3, 4, 6)))
    assert image_feeds(folder, half, PRESETS["yolo"])[0]["x"].dtype == np.float16


def test_a_picture_without_batch_axis(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, picture(), recipe={})
    feeds = load_feeds(folder, model_of(x=("float32", (3, 4, 6))))
    assert feeds[0]["x"].shape == (3, 4, 6)


def test_image_feeds_of_a_folder_without_images_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(FeedError, match=r"holds no feeds: found a\.txt, expected images"):
        image_feeds(tmp_path, IMAGE_MODEL, Preprocess())
    with pytest.raises(FeedError, match="does not exist"):
        image_feeds(tmp_path / "nope", IMAGE_MODEL, Preprocess())


# ------------------------------------------------------------------------------------ random feeds


def test_random_feeds_are_seeded_and_a_sample_does_not_depend_on_their_number() -> None:
    few, many = random_feeds(ROW_MODEL, samples=2), random_feeds(ROW_MODEL, samples=5)
    assert few[1]["x"].tolist() == many[1]["x"].tolist()
    assert list(few)[1]["x"].tolist() == list(many)[1]["x"].tolist()
    assert random_feeds(ROW_MODEL, seed=1).digest != random_feeds(ROW_MODEL).digest
    assert (few.random, many.description) == (True, "5 random feeds (seed 0)")
    assert few[0]["x"].tolist() != few[1]["x"].tolist()
    assert few.names == ("sample 0", "sample 1")


def test_random_floats_are_standard_normal() -> None:
    values = random_feeds(model_of(x=("float32", (1, 200, 200))), samples=1)[0]["x"]
    assert abs(float(values.mean())) < 0.02
    assert abs(float(values.std()) - 1) < 0.02


@pytest.mark.parametrize(
    "dtype", ["float16", "float64", "bool", "int8", "uint8", "int32", "uint64"]
)
def test_every_element_type_can_be_drawn_and_run(dtype: str) -> None:
    model = model_of(x=(dtype, (1, 50)), scalar=(dtype, ()))
    session = open_session(model, optimized=False)
    for feed in random_feeds(model, samples=2):
        assert {v.dtype.name for v in feed.values()} == {dtype}
        assert feed["scalar"].shape == ()
        assert len(np.unique(feed["x"])) > 1
        session.run(feed)


def test_dynamic_dimensions_get_one_size_per_symbol_and_this_is_said() -> None:
    model = model_of(
        ids=("int64", ("batch", "tokens")),
        mask=("float32", ("batch", "tokens")),
        t=("bool", (None,)),
    )
    feeds = random_feeds(model, samples=1)
    assert {k: v.shape for k, v in feeds[0].items()} == {"ids": (1, 16), "mask": (1, 16), "t": (1,)}
    assert feeds.notes == (
        "dynamic dimension 'batch' is 1 here",
        "dynamic dimension 'tokens' is 16 here",
        "input 'ids' is random integers 0..1",
        "dynamic axis 0 of input 't' is 1 here",
    )
    photo = random_feeds(model_of(x=("float32", ("N", 3, "H", "W"))), samples=1)[0]["x"]
    assert photo.shape == (1, 3, 224, 224)


def embedding(*steps: onnx.NodeProto, last: str, axis: int = 0, rows_: int = 7) -> Model:
    table = np.zeros((rows_, 2), np.float32)
    gather = helper.make_node(
        "Gather", ["table" if axis == 0 else "wide", last], ["y"], "look", axis=axis
    )
    return graph_of(
        [*steps, gather],
        {"ids": (1, 40)},
        {
            "table": table,
            "wide": table.T,
            "axes": np.array([0]),
            "shape": np.array([40]),
            "two": np.array(2),
        },
    )


@pytest.mark.parametrize(
    ("model", "low", "high"),
    [
        (embedding(last="ids"), 0, 6),
        (embedding(last="ids", axis=1), 0, 6),
        (
            embedding(
                helper.make_node("Cast", ["ids"], ["a"], "c", to=TensorProto.INT32),
                helper.make_node("Unsqueeze", ["a", "axes"], ["b"], "u"),
                helper.make_node("Reshape", ["b", "shape"], ["c"], "r"),
                last="c",
            ),
            0,
            6,
        ),
        (embedding(helper.make_node("Add", ["ids", "two"], ["a"], "add"), last="a"), -2, 4),
        (embedding(helper.make_node("Sub", ["ids", "two"], ["a"], "sub"), last="a"), 2, 8),
    ],
    ids=["direct", "axis 1", "through Cast, Unsqueeze, Reshape", "shifted up", "shifted down"],
)
def test_random_integers_stay_inside_the_table_they_index(
    model: Model, low: int, high: int
) -> None:
    feeds = random_feeds(model, samples=20)
    drawn = np.concatenate([f["ids"].ravel() for f in feeds])
    assert (drawn.min(), drawn.max()) == (low, high)
    assert feeds.notes == (
        f"input 'ids' is random integers {low}..{high} "
        "(inside the 7 rows that Gather 'look' reads)",
    )
    session = open_session(model, optimized=False)
    for feed in feeds:
        session.run(feed)


def test_the_smallest_of_several_tables_counts() -> None:
    nodes = [
        helper.make_node("Gather", ["big", "ids"], ["a"], "ga"),
        helper.make_node("Gather", ["small", "ids"], ["b"], "gb"),
        helper.make_node("Add", ["a", "b"], ["y"], "add"),
    ]
    tables = {"big": np.zeros((90, 2), np.float32), "small": np.zeros((4, 2), np.float32)}
    assert (
        "0..3 (inside the 4 rows that Gather 'gb' reads)"
        in (random_feeds(graph_of(nodes, {"ids": (1, 5)}, tables)).notes[0])
    )


def test_a_table_behind_its_dequantize_linear_is_found() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale"], ["t"], "dq"),
        helper.make_node("Gather", ["t", "ids"], ["y"], "look"),
    ]
    constants = {"q": np.zeros((9, 2), np.int8), "scale": np.float32(1)}
    assert "0..8" in random_feeds(graph_of(nodes, {"ids": (1, 5)}, constants)).notes[0]


def test_a_look_up_inside_a_branch_is_followed() -> None:
    def branch(name: str, table: str) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node("Gather", [table, "ids"], [f"{name}_y"], f"{name}_look")],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.zeros((3 + len(name), 2), np.float32), table)],
        )

    node = helper.make_node(
        "If", ["cond"], ["y"], "if", then_branch=branch("a", "ta"), else_branch=branch("bb", "tb")
    )
    model = graph_of([node], {"ids": (1, 5)}, {"cond": np.array(True)})
    assert "0..3 (inside the 4 rows" in random_feeds(model).notes[0]


def test_an_input_without_shape_cannot_be_drawn() -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    node = helper.make_node("Identity", ["x"], ["y"], "id")
    graph = helper.make_graph(
        [node], "g", [value], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    with pytest.raises(FeedError, match="input 'x' names no shape"):
        random_feeds(Model(helper.make_model(graph)))


def test_an_input_larger_than_memory_is_not_drawn() -> None:
    with pytest.raises(FeedError) as caught:
        random_feeds(model_of(x=("float32", ("n", 1 << 40))))
    assert caught.value.message == (
        "model: input 'x' has the shape (1, 1099511627776), expected at most 536,870,912 elements"
    )


def test_random_feeds_refuse_misuse() -> None:
    with pytest.raises(ValueError, match="samples must be at least 1"):
        random_feeds(ROW_MODEL, samples=0)
    with pytest.raises(ValueError, match="seed must be 0 or more"):
        random_feeds(ROW_MODEL, seed=-1)


# -------------------------------------------------------------------- digests, subsets, calibration


def test_the_digest_covers_contents_not_names(tmp_path: Path) -> None:
    one = load_feeds(folder_of(tmp_path / "a", [rows(1), rows(1) + 1]), ROW_MODEL)
    np.savez(tmp_path / "stack.npz", x=np.concatenate([rows(1), rows(1) + 1]))
    same = load_feeds(tmp_path / "stack.npz", ROW_MODEL)
    doubled = load_feeds(
        folder_of(tmp_path / "b", [rows(1).astype(float), rows(1) + 1.0]), ROW_MODEL
    )
    assert one.digest == same.digest == doubled.digest
    assert one.subset([1, 0]).digest != one.digest
    assert one.subset([0]).digest != one.digest
    other = load_feeds(folder_of(tmp_path / "c", [rows(1), rows(1) + 2]), ROW_MODEL)
    assert other.digest != one.digest
    assert other.sample_digest(0) == one.sample_digest(0)


def test_the_digest_tells_names_types_and_shapes_apart(tmp_path: Path) -> None:
    zeros = np.zeros((1, 4), np.float32)
    digests: set[str] = set()
    for name, array in (
        ("x", zeros),
        ("y", zeros),
        ("x", zeros.reshape(2, 2)),
        ("x", zeros.view(np.int32)),
    ):
        folder = folder_of(tmp_path / str(len(digests)), [array], key=name)
        model = model_of(**{name: (array.dtype.name, array.shape)})
        digests.add(load_feeds(folder, model).digest)
    assert len(digests) == 4


def test_the_digest_of_images_depends_on_the_recipe(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, picture())
    assert (
        image_feeds(folder, IMAGE_MODEL, PRESETS["tf"]).digest
        != image_feeds(folder, IMAGE_MODEL, PRESETS["bgr"]).digest
    )


def test_a_subset_keeps_names_labels_and_order(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [rows(1) + i for i in range(4)])
    (folder / "labels.json").write_text("[0, 1, 2, 3]")
    part = load_feeds(folder, ROW_MODEL).subset([3, 1, 1])
    assert part.names == ("03.npz", "01.npz", "01.npz")
    assert part.labels == (3, 1, 1)
    assert [f["x"][0, 0] for f in part] == [3, 1, 1]
    assert part.subset([0])[0]["x"][0, 0] == 3
    assert part.description == "3 of 4 .npz files"


def test_a_subset_of_a_compressed_stack_reads_in_any_order(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "f.npz", x=rows(6))
    feeds = load_feeds(tmp_path / "f.npz", ROW_MODEL).subset([5, 0, 3])
    assert [f["x"][0, 0] for f in feeds] == [15, 0, 9]


@pytest.mark.parametrize("kind", ["folder", "stack", "images", "random", "pb"])
def test_feeds_cross_to_another_process_as_a_few_bytes(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        feeds = load_feeds(folder_of(tmp_path, [rows(1), rows(2)]), ROW_MODEL)
    elif kind == "stack":
        np.save(tmp_path / "a.npy", rows(3))
        feeds = load_feeds(tmp_path / "a.npy", ROW_MODEL)
    elif kind == "images":
        feeds = load_feeds(image_folder(tmp_path, picture(), recipe={}), IMAGE_MODEL)
    elif kind == "pb":
        write_set(tmp_path / "test_data_set_0", rows(1))
        feeds = load_feeds(tmp_path, ROW_MODEL)
    else:
        feeds = random_feeds(ROW_MODEL)
    sent = pickle.dumps(feeds)
    assert len(sent) < 5_000
    there: Feeds = pickle.loads(sent)
    assert there.digest == feeds.digest
    assert (there.names, there.description) == (feeds.names, feeds.description)


@pytest.mark.parametrize(
    ("count", "calibrated"), [(1, 1), (7, 7), (8, 4), (9, 4), (200, 100), (260, 100)]
)
def test_the_first_half_calibrates_at_most_100_and_few_feeds_all(
    count: int, calibrated: int
) -> None:
    split = split_calibration(random_feeds(ROW_MODEL, samples=count))
    assert len(split.calibration) == calibrated
    assert split.seen == tuple(i < calibrated for i in range(count))


def test_seen_is_judged_by_content(tmp_path: Path) -> None:
    feeds = load_feeds(folder_of(tmp_path / "a", [rows(1) + i for i in range(8)]), ROW_MODEL)
    own = load_feeds(folder_of(tmp_path / "b", [rows(1) + 6, rows(1) + 99]), ROW_MODEL)
    split = split_calibration(feeds, own)
    assert split.calibration is own
    assert split.seen == (False,) * 6 + (True, False)
    # A copy of a calibration sample in the second half has been seen too.
    repeated = split_calibration(feeds.subset([0, 1, 2, 3, 4, 5, 6, 0]))
    assert repeated.seen == (True,) * 4 + (False,) * 3 + (True,)


@pytest.mark.parametrize("kind", ["folder", "stored", "compressed", "npy"])
def test_memory_stays_flat_while_iterating(tmp_path: Path, kind: str) -> None:
    width, count = 50_000, 40
    array = np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)
    if kind == "folder":
        path = folder_of(tmp_path / "in", list(array[:, np.newaxis]))
    elif kind == "npy":
        path = tmp_path / "a.npy"
        np.save(path, array)
    else:
        path = tmp_path / "a.npz"
        (np.savez if kind == "stored" else np.savez_compressed)(path, x=array)
    feeds = load_feeds(path, model_of(x=("float32", (1, width))))
    list(feeds.subset([0]))
    tracemalloc.start()
    for feed in feeds:
        assert feed["x"].size == width
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes / 4


def test_users_folders_are_never_written_to(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "in", picture(), picture(seed=1), recipe={"preset": "tf"})
    (folder / "labels.json").write_text("[1, 2]")
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    feeds = load_feeds(folder, IMAGE_MODEL)
    assert feeds.digest
    assert len(list(feeds)) == 2
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()} == before


@quick
@given(array=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6)))
def test_a_stack_and_a_folder_of_the_same_samples_are_the_same_feeds(
    tmp_path_factory: pytest.TempPathFactory, array: np.ndarray[Any, Any]
) -> None:
    place = tmp_path_factory.mktemp("feeds")
    np.save(place / "a.npy", array)
    model = model_of(x=("float32", (1, array.shape[1])))
    stack = load_feeds(place / "a.npy", model)
    folder = load_feeds(folder_of(place / "in", [row[np.newaxis] for row in array]), model)
    assert stack.digest == folder.digest
    assert sum(count for _, _, count in stack.nonfinite()) == np.count_nonzero(~np.isfinite(array))


# -------------------------------------------------------------------------------------- real models


@pytest.mark.parametrize("name", REAL or [None])
def test_real_feeds_load_and_run(name: str | None) -> None:
    if name is None:
        pytest.skip(f"no real models at {MODELS} (set QUANT_INSPECTOR_MODELS)")
    assert len(REAL) >= 9
    folder = MODELS / name / "inputs"
    model = load_model(MODELS / name / "model.onnx")
    feeds = load_feeds(folder, model)
    assert len(feeds) == len(list(folder.glob("*.npz")))
    assert (feeds.labels is not None) == (folder / "labels.json").exists()
    assert feeds.nonfinite() == []
    session = open_session(model, optimized=True)
    for feed in feeds.subset(range(2)):
        for output in session.run(feed).values():
            assert np.isfinite(output).all()
    for feed in random_feeds(model, samples=2):
        session.run(feed)
    assert len(load_feeds(folder / "00.npz", model)) == 1
