from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from inspector.errors import ModelError
from inspector.model import MAX_OPSET, Model, load_model, save_model
from tests.samples import MODELS, array, conv_relu_gemm, floats, model, needs_models, save


def refused(path: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load_model(path)
    return caught.value


@pytest.mark.parametrize(
    ("name", "content", "message", "hint"),
    [
        ("empty.onnx", b"", "empty.onnx is empty (0 bytes), expected an ONNX model", "again"),
        ("page.onnx", b"<!DOCTYPE html><html>", "page.onnx is an HTML or XML page", "Download"),
        (
            "lfs.onnx",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "lfs.onnx is a Git LFS pointer",
            "git lfs pull",
        ),
        ("m.tflite", b"\x1c\x00\x00\x00TFL3" + b"\0" * 40, "a TensorFlow Lite model", "tf2onnx"),
        ("w.bin", b"\x80\x02}q\x00X\x05", "w.bin is a Python pickle", "Export"),
        (
            "text.onnx",
            b"hello, this is text",
            "text.onnx is of no known kind, expected",
            "ONNX exporter",
        ),
        ("zeros.onnx", b"\0" * 64, "zeros.onnx is of no known kind", "ONNX exporter"),
    ],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(
    tmp_path: Path, name: str, content: bytes, message: str, hint: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    error = refused(path)
    assert message in error.message
    assert hint in error.hint


def test_a_zip_file_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.onnx", "w") as archive:
        archive.writestr("data.pkl", "x")
    assert "a zip archive" in refused(tmp_path / "m.onnx").message


def test_a_truncated_model_is_named(tmp_path: Path) -> None:
    whole = conv_relu_gemm().SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(whole[: len(whole) // 2])
    assert refused(path).message.startswith("cut.onnx is a truncated or damaged ONNX model")


def test_a_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    assert refused(tmp_path).message.endswith("is a folder, expected an ONNX file")
    assert refused(tmp_path / "no.onnx").message.endswith("no.onnx does not exist")


def test_an_opset_of_the_future_is_named_with_both_versions(tmp_path: Path) -> None:
    proto = conv_relu_gemm()
    proto.opset_import[0].version = 99
    error = refused(save(proto, tmp_path / "future.onnx"))
    assert "opset 99" in error.message
    assert f"up to {MAX_OPSET}" in error.message
    assert "opset_version=" in error.hint


def test_a_graph_without_nodes_is_refused(tmp_path: Path) -> None:
    proto = conv_relu_gemm()
    del proto.graph.node[:]
    assert "a graph without nodes" in refused(save(proto, tmp_path / "m.onnx")).message


def external(tmp_path: Path) -> Path:
    proto = conv_relu_gemm()
    path = tmp_path / "m.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    return path


def test_external_data_are_read_and_belong_to_the_hash(tmp_path: Path) -> None:
    path = external(tmp_path)
    loaded = load_model(path)
    np.testing.assert_array_equal(loaded.constant("w"), floats((8, 3, 3, 3), 1, 0.3))
    both = path.read_bytes() + (tmp_path / "m.data").read_bytes()
    assert loaded.sha256 == hashlib.sha256(both).hexdigest()
    assert loaded.size_bytes == len(both)


def test_missing_external_data_are_named(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "m.data").unlink()
    error = refused(path)
    assert "external data 'm.data' is missing" in error.message
    assert error.hint == "Put m.data beside m.onnx and load it again."


@pytest.mark.parametrize("location", ["../secret.data", "/etc/passwd", "sub/../../secret.data", ""])
def test_external_data_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.data").write_bytes(b"\0" * 4096)
    folder = tmp_path / "in"
    folder.mkdir()
    proto = onnx.load(external(folder), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    assert "outside the model's folder" in refused(save(proto, folder / "m.onnx")).message


def test_a_link_that_leads_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    path = external(folder)
    os.replace(folder / "m.data", tmp_path / "m.data")
    (folder / "m.data").symlink_to(tmp_path / "m.data")
    assert "outside the model's folder" in refused(path).message


def test_unnamed_and_duplicate_nodes_get_unique_names_that_are_said() -> None:
    proto = model(
        [
            helper.make_node("Relu", ["x"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"], "same"),
            helper.make_node("Relu", ["b"], ["c"], "same"),
            helper.make_node("Relu", ["c"], ["y"], "Relu_a"),
        ],
        [("x", [1])],
        [("y", [1])],
    )
    loaded = Model(proto)
    assert [n.name for n in loaded.nodes] == ["Relu_a_2", "same", "same_c", "Relu_a"]
    assert len(loaded.notes) == 2
    assert "1 of 4 nodes have no name" in loaded.notes[0]
    assert "1 of 4 nodes share a name" in loaded.notes[1]


def test_initializers_are_not_inputs_even_when_listed() -> None:
    proto = conv_relu_gemm()
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 3, 3, 3]))
    assert [i.name for i in Model(proto).inputs] == ["x"]


def test_a_body_that_reads_an_outer_tensor_counts_as_a_consumer() -> None:
    body = helper.make_graph(
        [helper.make_node("Relu", ["outer"], ["inside"])],
        "then",
        [],
        [helper.make_tensor_value_info("inside", TensorProto.FLOAT, [1])],
    )
    proto = model(
        [
            helper.make_node("Neg", ["x"], ["outer"], "neg"),
            helper.make_node("If", ["cond"], ["y"], "if", then_branch=body, else_branch=body),
        ],
        [("x", [1])],
        [("y", [1])],
        [array("cond", np.array(True))],
    )
    assert [n.name for n in Model(proto).consumers["outer"]] == ["if"]


def test_constants_are_initializers_and_constant_nodes() -> None:
    proto = model(
        [
            helper.make_node("Constant", [], ["k"], value=array("", floats((2,), 3))),
            helper.make_node("Constant", [], ["s"], value_float=2.5),
            helper.make_node("Mul", ["x", "k"], ["m"]),
            helper.make_node("Mul", ["m", "s"], ["y"]),
        ],
        [("x", [2])],
        [("y", [2])],
    )
    loaded = Model(proto)
    np.testing.assert_array_equal(loaded.constant("k"), floats((2,), 3))
    assert loaded.constant("s") == np.float32(2.5)
    assert loaded.constant("m") is None
    assert loaded.constant_names == {"k", "s"}


def test_a_saved_model_is_the_private_copy_and_the_original_is_untouched(tmp_path: Path) -> None:
    path = save(conv_relu_gemm(), tmp_path / "m.onnx")
    before = path.read_bytes()
    loaded = load_model(path)
    save_model(loaded, tmp_path / "copy.onnx")
    assert load_model(tmp_path / "copy.onnx").proto == loaded.proto
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy.onnx", "m.onnx"]


def test_more_outputs_are_added_to_a_copy_only() -> None:
    loaded = Model(conv_relu_gemm())
    more = loaded.with_outputs(["r", "y", "r"])
    assert [o.name for o in more.graph.output] == ["y", "r"]
    assert [o.name for o in loaded.outputs] == ["y"]


@needs_models
def test_every_real_model_is_read_with_unique_names_and_types() -> None:
    files = sorted(MODELS.glob("*/*.onnx"))
    assert len(files) >= 9
    for file in files:
        loaded = load_model(file)
        names = [n.name for n in loaded.nodes]
        assert len(set(names)) == len(names)
        assert "" not in names
        assert loaded.inputs
        assert loaded.outputs
        assert all(i.dtype != "unknown" for i in loaded.inputs)
