from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from inspector.errors import ModelError
from inspector.model import Model, shown
from inspector.model_files import MAX_OPSET, load_model, save_model, write_proto
from inspector.prepare import prepare
from inspector.recipe import QuantConfig
from inspector.runtime import run
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


def placed(path: Path, **changes: str) -> Path:
    """The model at `path`, whose external data say something else."""
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = changes.get(entry.key, entry.value)
    return save(proto, path)


@pytest.mark.parametrize(
    "location",
    [
        *("../secret.data", "/etc/passwd", "sub/../../secret.data", "", ".", "sub/.."),
        *("..\\secret.data", "C:secret.data", "c:/secret.data", "a\0b", "a\nb"),
        # What ONNX Runtime itself writes for tensors at an address in its memory.
        "*/_ORT_MEM_ADDR_/*",
    ],
)
def test_external_data_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.data").write_bytes(b"\0" * 4096)
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    error = refused(placed(external(folder), location=location))
    assert "outside the model's folder" in error.message
    assert "weight 'w'" in error.message
    assert "\n" not in error.message


def test_external_data_that_are_no_file_are_refused(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "no").symlink_to("nowhere")
    for location, found in (
        ("folder", "is a folder, expected a file"),
        ("pipe", "is a pipe or a device, expected a file"),
        ("circle", "cannot be read"),
        ("no", "is missing"),
        ("x" * 5000, "cannot be read"),
        ("m.onnx/m.data", "is missing"),
    ):
        error = refused(placed(path, location=location))
        assert found in error.message
        assert len(error.message) < 400


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    path = external(tmp_path)
    os.replace(tmp_path / "m.data", tmp_path / "real.bin")
    (tmp_path / "m.data").symlink_to("real.bin")
    np.testing.assert_array_equal(load_model(path).constant("b"), floats((8,), 2, 0.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": "-4"}, "the offset '-4', expected a whole number"),
        ({"offset": "1e3"}, "the offset '1e3'"),
        ({"length": "12 "}, "the length '12 '"),
        ({"length": "\u0663"}, "the length"),
        ({"offset": "9" * 30}, "the offset"),
        ({"offset": "999999999"}, "from 999,999,999 of 'm.data'"),
        ({"length": "4"}, "are 4 bytes from 0 of 'm.data' (1,076 bytes), expected 864 bytes"),
    ],
)
def test_external_data_of_another_size_are_refused(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    path = placed(external(tmp_path), **changes)
    for inside_bytes in (0, 2**20):
        with pytest.raises(ModelError) as caught:
            load_model(path, inside_bytes=inside_bytes)
        assert message in caught.value.message
        assert "weight 'w'" in caught.value.message


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


# -- external data that stay on disk -----------------------------------------------------------


def outside(tmp_path: Path) -> Path:
    """Two weights and a shape in external data; the second weight starts at an odd place."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "mm"),
        helper.make_node("Add", ["h", "v"], ["a"], "add"),
        helper.make_node("Reshape", ["a", "s"], ["y"], "reshape"),
    ]
    proto = model(nodes, [("x", [2, 32])], [("y", None)])
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    values = (floats((32, 64), 1), floats((2, 64), 2), np.array([4, 32], np.int64))
    data = b""
    for name, value in zip("wvs", values, strict=True):
        tensor = array(name, value)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, entry in (("location", "w.bin"), ("offset", len(data)), ("length", value.nbytes)):
            tensor.external_data.add(key=key, value=str(entry))
        proto.graph.initializer.append(tensor)
        data += value.tobytes() + b"!"
    (tmp_path / "w.bin").write_bytes(data)
    return save(proto, tmp_path / "m.onnx")


def test_large_external_data_stay_on_disk_and_read_the_same(tmp_path: Path) -> None:
    path = outside(tmp_path)
    inside, loaded = load_model(path), load_model(path, inside_bytes=0)
    assert not inside.external
    # The 512 bytes of "v" and the shape are not worth a map.
    assert list(loaded.external) == ["w"]
    place = loaded.external["w"]
    assert (place.offset, place.length, place.dtype, place.shape) == (0, 8192, "float32", (32, 64))
    assert len(loaded.proto.SerializeToString()) < 2000
    for name in "wvs":
        np.testing.assert_array_equal(loaded.constant(name), inside.constant(name))
    w = loaded.constant("w")
    assert w is not None
    assert not w.flags.writeable
    assert not w.flags.owndata
    assert loaded.sha256 == inside.sha256
    assert loaded.size_bytes == inside.size_bytes == path.stat().st_size + 8192 + 512 + 16 + 3
    assert loaded.constant_names == {"w", "v", "s"}
    assert loaded.info("w") == inside.info("w")
    # Inference reads the shape's values, which were external as well.
    assert loaded.info("y").shape == inside.info("y").shape == (4, 32)
    assert loaded.complete() == inside.proto


def test_a_model_with_values_outside_is_saved_with_them_and_never_in_one_piece(
    tmp_path: Path,
) -> None:
    path = outside(tmp_path)
    loaded = load_model(path, inside_bytes=0)
    target = tmp_path / "to"
    target.mkdir()
    with pytest.raises(ModelError, match=r"values of weight 'w' and perhaps others"):
        write_proto(loaded.proto, target / "m.onnx")
    assert list(target.iterdir()) == []
    save_model(loaded, target / "m.onnx")
    assert sorted(p.name for p in target.iterdir()) == ["m.onnx", "m.onnx.data"]
    again = load_model(target / "m.onnx", inside_bytes=0)
    for name in "wvs":
        np.testing.assert_array_equal(again.constant(name), loaded.constant(name))
    write_proto(again.complete(), target / "one.onnx")
    np.testing.assert_array_equal(
        load_model(target / "one.onnx").constant("w"), floats((32, 64), 1)
    )


def test_a_model_with_values_outside_is_prepared_for_the_quantizer(tmp_path: Path) -> None:
    loaded = load_model(outside(tmp_path), inside_bytes=0)
    for at, config in enumerate((QuantConfig(), QuantConfig(preprocess=False))):
        prepared = prepare(loaded, config, tmp_path / f"cache{at}")
        np.testing.assert_array_equal(prepared.model.constant("w"), floats((32, 64), 1))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["m.onnx", "w.bin"]


def test_a_model_too_large_for_one_file_is_refused_by_its_own_name(tmp_path: Path) -> None:
    loaded = load_model(outside(tmp_path), inside_bytes=0)
    huge = {"w": replace(loaded.external["w"], length=3 * 2**30)}
    model = Model(loaded.proto, path=loaded.path, sha256=loaded.sha256, external=huge)
    with pytest.raises(ModelError, match=r"^m.onnx holds 3,221,225,472 bytes of weights"):
        prepare(model, QuantConfig(), tmp_path / "cache")


def test_external_data_cut_after_loading_are_an_error_and_not_a_crash(tmp_path: Path) -> None:
    loaded = load_model(outside(tmp_path), inside_bytes=0)
    os.truncate(tmp_path / "w.bin", 100)
    with pytest.raises(ModelError, match=r"w.bin of weight 'w' is now only 100 bytes large"):
        loaded.constant("w")
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match="is now not readable"):
        loaded.constant("w")


def test_external_data_of_packed_types_are_unpacked(tmp_path: Path) -> None:
    values = np.arange(4001) % 16 - 8
    whole = helper.make_tensor("k", TensorProto.INT4, [4001], values.tolist())
    packed = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(whole), "k").raw_data
    assert len(packed) == 2001
    tensor = TensorProto(name="k", data_type=TensorProto.INT4, dims=[4001], data_location=1)
    tensor.external_data.add(key="location", value="k.bin")
    (tmp_path / "k.bin").write_bytes(packed)
    path = save(plain(constants=[tensor]), tmp_path / "m.onnx")
    loaded = load_model(path, inside_bytes=0)
    assert list(loaded.external) == ["k"]
    k = loaded.constant("k")
    assert k is not None
    assert k.dtype == ml_dtypes.int4
    np.testing.assert_array_equal(k.astype(int), values)


def test_external_data_in_bodies_and_attributes_are_checked_and_read_in(tmp_path: Path) -> None:
    def held(location: str) -> Path:
        tensor = TensorProto(name="k", data_type=1, dims=[1000], data_location=1)
        tensor.external_data.add(key="location", value=location)
        body = helper.make_graph(
            [helper.make_node("Constant", [], ["i"], "c", value=tensor)],
            "body",
            [],
            [helper.make_tensor_value_info("i", TensorProto.FLOAT, [1000])],
        )
        node = helper.make_node("If", ["t"], ["y"], "if", then_branch=body, else_branch=body)
        return save(model([node], [], [("y", [1000])], [array("t", np.array(True))]),
                    tmp_path / "m.onnx")  # fmt: skip

    (tmp_path / "k.bin").write_bytes(floats((1000,)).tobytes())
    loaded = load_model(held("k.bin"), inside_bytes=0)
    assert not loaded.external
    np.testing.assert_array_equal(loaded.bodies[0].constant("i"), floats((1000,)))
    error = refused(held("../k.bin"))
    assert "attribute 'value' of node 'c'" in error.message
    assert "outside the model's folder" in error.message


MEASURE = """
import sys
import numpy as np
from inspector.model_files import load_model
from inspector.runtime import open_session

print(flush=True)  # what is imported by now does not count
model = load_model(sys.argv[1])
assert len(model.external) == 2, model.external
w = model.constant("w1")
assert w.shape == (16384, 17408), w.shape
assert list(w[7, :3]) == [1, 2, 3] and not w[8:20].any()
assert model.info("y").shape == (1, 17408), model.info("y")
del w
session = open_session(model, optimized=False, outputs=["h"])
x = np.zeros((1, 17408), np.float32)
x[0, 5] = 2.0
given = session.run({"x": x})
assert given["h"][0, 7] == 20.0, given["h"][0, :9]
assert list(given["y"][0, :4]) == [20, 40, 60, 0], given["y"][0, :4]
"""


def own_memory(process: subprocess.Popen[str]) -> int:
    """Bytes that a process holds which are not pages of files; 0 once it has ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024 if "RssAnon:" in status else 0


@pytest.mark.slow
def test_a_model_of_over_two_gigabytes_is_read_and_run_in_little_memory(tmp_path: Path) -> None:
    """Mapped pages may be dropped at any time; memory of the process itself may not."""
    rows, columns = 17408, 16384  # 1.06 GiB each, of which the disk holds a page
    proto = model(
        [
            helper.make_node("MatMul", ["x", "w0"], ["h"], "mm0"),
            helper.make_node("MatMul", ["h", "w1"], ["y"], "mm1"),
        ],
        [("x", [1, rows])],
        [("y", None)],
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    size = rows * columns * 4
    for at, shape in enumerate(((rows, columns), (columns, rows))):
        tensor = TensorProto(name=f"w{at}", data_type=1, dims=shape, data_location=1)
        for key, value in (("location", "w.bin"), ("offset", at * size), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        proto.graph.initializer.append(tensor)
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(2 * size)
        file.seek((5 * columns + 7) * 4)
        file.write(np.float32(10).tobytes())
        file.seek(size + 7 * rows * 4)
        file.write(np.array([1, 2, 3], np.float32).tobytes())
    assert (tmp_path / "w.bin").stat().st_blocks * 512 < 2**20
    path = save(proto, tmp_path / "m.onnx")
    with subprocess.Popen(
        [sys.executable, "-c", MEASURE, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        before = own_memory(process)
        peak = before
        while process.poll() is None:
            peak = max(peak, own_memory(process))
            time.sleep(0.005)
    assert process.returncode == 0
    assert before > 2**20
    assert peak - before < 2**27, f"{(peak - before) >> 20} MiB"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "w.bin"]


# -- files that contradict themselves ----------------------------------------------------------


def plain(
    nodes: Sequence[onnx.NodeProto] = (), constants: Sequence[TensorProto] = (), opset: int = 21
) -> onnx.ModelProto:
    """A Relu from "x" to "y", and whatever else."""
    relu = helper.make_node("Relu", ["x"], ["y"], "relu")
    return model([relu, *nodes], [("x", [2])], [("y", [2])], constants, opset=opset)


def ten_to_the_twelve() -> onnx.ModelProto:
    return plain(constants=[TensorProto(name="k", data_type=1, dims=[10**6, 10**6])])


def tensor(**fields: Any) -> Callable[[], onnx.ModelProto]:
    """Makes a model with a weight "k" of these fields."""
    return lambda: plain(constants=[TensorProto(name="k", **fields)])


def a_cycle() -> onnx.ModelProto:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"], "first"),
             helper.make_node("Neg", ["c"], ["b"], "second"),
             helper.make_node("Neg", ["a"], ["c"], "third")]  # fmt: skip
    return plain(nodes)


def a_huge_input() -> onnx.ModelProto:
    return model([helper.make_node("Relu", ["x"], ["y"])], [("x", [10**6, 10**6])], [("y", None)])


def sparse(indices: TensorProto, dims: Sequence[int], count: int = 2) -> onnx.SparseTensorProto:
    values = helper.make_tensor("k", 1, [count], [2.0, 3.0][:count])
    return helper.make_sparse_tensor(values, indices, dims)


def with_sparse(made: onnx.SparseTensorProto) -> onnx.ModelProto:
    proto = plain()
    proto.graph.sparse_initializer.append(made)
    return proto


def functions(*bodies: Sequence[onnx.NodeProto], opset: int = 21) -> onnx.ModelProto:
    """Calls the last of the functions F0, F1 … on "x"."""
    proto = plain([helper.make_node(f"F{len(bodies) - 1}", ["x"], ["z"], "call", domain="my")])
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2]))
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("my", 1)]
    proto.opset_import.append(opsets[1])
    for at, body in enumerate(bodies):
        proto.functions.append(helper.make_function("my", f"F{at}", ["a"], ["b"], body, opsets))
    return proto


def call(at: int, source: str, target: str) -> onnx.NodeProto:
    return helper.make_node(f"F{at}", [source], [target], domain="my")


def doubling() -> onnx.ModelProto:
    """Each function calls the one before it twice: 2**40 nodes once inlined."""
    first = [helper.make_node("Relu", ["a"], ["b"])]
    return functions(first, *([call(at, "a", "t"), call(at, "t", "b")] for at in range(40)))


def inlined_weights() -> onnx.ModelProto:
    """100 kB of weights that are there 2**16 times once inlined."""
    weights = helper.make_node("Constant", [], ["k"], value=array("", floats((25_000,))))
    first = [weights, helper.make_node("Add", ["a", "k"], ["b"])]
    return functions(first, *([call(at, "a", "t"), call(at, "t", "b")] for at in range(16)))


def bodies_of_calls() -> onnx.ModelProto:
    """Each of 80 functions calls the one before it in 20 bodies inside each other."""

    def branch(node: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph([node], "g", [], [onnx.ValueInfoProto(name="b")])

    relu = helper.make_node("Relu", ["a"], ["b"])

    def nested(inner: onnx.NodeProto) -> onnx.NodeProto:
        for _ in range(20):
            branches = {"then_branch": branch(inner), "else_branch": branch(relu)}
            inner = helper.make_node("If", ["a"], ["b"], **branches)
        return inner

    return functions([relu], *([nested(call(at, "a", "b"))] for at in range(80)))


def calls_in_sight() -> onnx.ModelProto:
    """300 functions that call the one before them; the graph calls each, the first one first."""
    first = [helper.make_node("Relu", ["a"], ["b"])]
    proto = functions(first, *([call(at, "a", "b")] for at in range(299)))
    del proto.graph.node[:]
    for at in range(300):
        proto.graph.node.append(call(at, "x", "z" if at == 299 else f"z{at}"))
    return proto


def many_sparse() -> onnx.ModelProto:
    """Small ones that are 51.2 MB each when dense; five of them fit."""
    proto = plain()
    for at in range(100):
        made = sparse(int_tensor([0, 1], [2]), [3200, 4000])
        made.values.name = f"s{at}"
        proto.graph.sparse_initializer.append(made)
    return proto


def int_tensor(values: Sequence[int], shape: Sequence[int]) -> TensorProto:
    return helper.make_tensor("i", TensorProto.INT64, shape, values)


def untyped_attribute() -> onnx.ModelProto:
    node = helper.make_node("Concat", ["x", "x"], ["z"], "join", axis=0)
    node.attribute[0].ClearField("type")
    node.attribute[0].f = 1.0
    return plain([node])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (ten_to_the_twelve, "weight 'k' has the dimensions 1000000 x 1000000, expected"),
        (a_huge_input, "input or output 'x' has the dimensions 1000000 x 1000000"),
        (
            tensor(data_type=1, dims=[-2]),
            "weight 'k' has the dimensions -2",
        ),
        (
            tensor(data_type=1, dims=[0, 2**62, 2**62]),
            "has the dimensions 0 x 4611686018427387904",
        ),
        (
            tensor(data_type=1, dims=[1] * 65),
            "1 x 1 x 1 x 1 x 1 x 1 x 1 x 1 …, expected up to 64",
        ),
        (
            tensor(data_type=1, dims=[2], raw_data=b"abc"),
            "weight 'k' holds 3 bytes, expected 8 for 2 of float32",
        ),
        (
            tensor(data_type=22, dims=[3], raw_data=b"abc"),
            "weight 'k' holds 3 bytes, expected 2 for 3 of int4",
        ),
        (
            tensor(data_type=7, dims=[], int64_data=[1, 2]),
            "weight 'k' holds 2 values, expected 1 for one element of int64",
        ),
        (
            tensor(data_type=8, dims=[2]),
            "weight 'k' holds 0 values, expected 2 for 2 of string",
        ),
        (
            tensor(data_type=999, dims=[2]),
            "weight 'k' has element type 999, expected one of the",
        ),
        (
            lambda: plain([helper.make_node("Constant", [], ["c"], "k", value=TensorProto())]),
            "attribute 'value' of node 'k' has element type 0",
        ),
        (
            lambda: plain([helper.make_node("Neg", ["x"], ["y"], "again")]),
            "tensor 'y' is computed by node 'again' and is that of node 'relu' as well",
        ),
        (
            lambda: plain([helper.make_node("Neg", ["y"], ["x"], "back")]),
            "tensor 'x' is computed by node 'back' and is that of an input or a weight as well",
        ),
        (a_cycle, "reads from itself through other nodes"),
        (
            lambda: plain([helper.make_node("Concat", ["x", "x"], ["z"], "join", axis="one")]),
            "attribute 'axis' of node 'join' (Concat) is of type STRING, expected one INT",
        ),
        (
            lambda: plain([helper.make_node("QuantizeLinear", ["x", "x"], ["z"], "q",
                                            domain="com.microsoft", axis=[1])]),
            "attribute 'axis' of node 'q' (QuantizeLinear) is of type INTS, expected one INT",
        ),
        (
            lambda: model([helper.make_node("DequantizeLinear", ["k", "k"], ["y"], "d",
                                            block_size=b"x")],
                          [("x", [2])], [("y", [2])], [array("k", np.int8(1))], opset=13),
            "attribute 'block_size' of node 'd' (DequantizeLinear) is of type STRING, expected one",
        ),
        (untyped_attribute, "attribute 'axis' of node 'join' (Concat) is of type UNDEFINED"),
        (doubling, "nodes once its functions are inlined; at most 1,000,000 are read"),
        (inlined_weights, "bytes once its functions are inlined; at most 2,147,483,647 are read"),
        (bodies_of_calls, "over 100 levels deep"),
        (calls_in_sight, "over 100 levels deep"),
        (lambda: functions([call(0, "a", "b")]), "its function 'F0' calls itself"),
        (
            lambda: functions([call(1, "a", "b")], [call(0, "a", "b")]),
            "calls itself",
        ),
        (
            lambda: functions(*([call(at - 1, "a", "b")] if at else
                                [helper.make_node("Relu", ["a"], ["b"])] for at in range(300))),
            "over 100 levels deep",
        ),
        (
            lambda: with_sparse(sparse(int_tensor([0, 9], [2]), [3, 3])),
            "sparse weight 'k' is sparse with an index outside its shape (3, 3)",
        ),
        (
            lambda: with_sparse(sparse(int_tensor([0, 1], [2]), [10**5, 10**5])),
            "takes 40,000,000,000 bytes when dense",
        ),
        (many_sparse, "sparse weight 's5' is sparse and takes 51,200,000 bytes when dense"),
        (
            lambda: with_sparse(sparse(int_tensor([0], [1]), [3, 3])),
            "expected int64 indices (2,) or (2, 2)",
        ),
    ],
)  # fmt: skip
def test_a_file_that_contradicts_itself_is_refused(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], message: str
) -> None:
    start = time.perf_counter()
    error = refused(save(make(), tmp_path / "m.onnx"))
    assert message in error.message
    assert error.message.startswith("m.onnx: " if ": " in error.message else "m.onnx ")
    assert error.hint.endswith(".")
    assert time.perf_counter() - start < 5


def messages(message: Any) -> list[Any]:
    """A protobuf message and all messages inside it."""
    found = [message]
    for each in found:  # which grows by the messages that are found
        for descriptor, value in each.ListFields():
            if descriptor.type == descriptor.TYPE_MESSAGE:
                found += [value] if hasattr(value, "ListFields") else list(value)
    return found


def with_odd_fields(proto: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """The model with each field that is set left out, doubled, or set to something odd."""
    odd: dict[type, list[Any]] = {
        int: [0, -1, 3, 99, 2**31 - 1, 10**12, 2**63 - 1, -(2**63)],
        float: [float("nan")],
        str: ["", "x", "y", "..", "a\0b", "x" * 10_000],
        bytes: [b"", b"\xff\xfe", bytes(1000)],
    }
    whole = proto.SerializeToString()
    for at, message in enumerate(messages(proto)):
        for descriptor, value in message.ListFields():
            several = not isinstance(value, int | float | str | bytes) and not hasattr(
                value, "ListFields"
            )
            first = value[0] if several else value
            for new in [None, "double", *odd.get(type(first), [])]:
                other = onnx.ModelProto.FromString(whole)
                place = messages(other)[at]
                held = getattr(place, descriptor.name)
                try:
                    if new is None:
                        place.ClearField(descriptor.name)
                    elif new == "double":
                        place.MergeFrom(type(place).FromString(place.SerializePartialToString()))
                    elif several:
                        held[0] = new
                    else:
                        setattr(place, descriptor.name, new)
                except ValueError:  # the field cannot hold it
                    continue
                yield other


def something_of_everything() -> onnx.ModelProto:
    indices = int_tensor([1, 3], [2])
    proto = functions([helper.make_node("Relu", ["a"], ["b"])])
    proto.graph.sparse_initializer.append(sparse(indices, [2, 2]))
    proto.graph.node.extend(nested_bodies().graph.node)
    proto.graph.node[-1].output[0] = "if"
    made = helper.make_node("Constant", [], ["c"], "c", sparse_value=sparse(indices, [2, 2]))
    strings = helper.make_node("Constant", [], ["d"], "d", value_strings=["a", "b"])
    proto.graph.node.extend([made, strings])
    outer = TensorProto(name="w", data_type=1, dims=[300], data_location=1)
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", "1200")):
        outer.external_data.add(key=key, value=value)
    int4 = helper.make_tensor("i4", TensorProto.INT4, [3], [1, 2, 3])
    given = [array("t", np.array(True)), array("m", np.float32(9))]
    proto.graph.initializer.extend([outer, int4, *given])
    return proto


def test_whatever_a_field_holds_a_model_is_read_whole_or_refused(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(floats((300,)).tobytes())
    proto, path = something_of_everything(), tmp_path / "m.onnx"
    assert load_model(save(proto, path), inside_bytes=0).external
    read, errors = 0, list[ModelError]()
    for other in with_odd_fields(proto):
        path.write_bytes(other.SerializePartialToString())
        try:
            loaded = load_model(path, inside_bytes=0)
        except ModelError as error:
            errors.append(error)
            continue
        read += 1
        assert loaded.nodes
        assert loaded.tensor_infos
        for graph in (loaded, *loaded.bodies):
            assert graph.consumers is not None
            for name in graph.constant_names:
                graph.constant(name)
    assert read > 300
    assert len(errors) > 300
    assert all(error.hint and len(error.message) < 700 for error in errors)


def test_bodies_nested_deeper_than_a_protobuf_may_are_refused(tmp_path: Path) -> None:
    def field(number: int, content: bytes) -> bytes:
        """A length-delimited field of a protobuf message."""
        size, length = len(content), b""
        while size >= 128:
            length += bytes([size % 128 + 128])
            size //= 128
        return bytes([number * 8 + 2]) + length + bytes([size]) + content

    body = field(1, b"")
    for _ in range(200):  # graph.node.attribute.g
        body = field(1, field(5, field(6, body)))
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x0a" + field(7, body) + field(8, b"\x10\x15"))
    assert "nests bodies or types deeper" in refused(path).message


def test_pipes_and_impossible_paths_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "is a pipe or a device" in refused(tmp_path / "pipe.onnx").message
    assert "null" in refused(Path("a\0b.onnx")).message
    assert "cannot be read" in refused(tmp_path / ("x" * 5000)).message
    path = save(plain(), tmp_path / "m.onnx")
    assert "does not exist" in refused(path / "inside.onnx").message


def test_a_file_that_no_protobuf_can_be_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "m.onnx").open("wb") as file:
        file.truncate(2**31)
    error = refused(tmp_path / "m.onnx")
    assert "2,147,483,648 bytes large" in error.message
    assert "save_as_external_data=True" in error.hint


def test_nodes_before_their_inputs_are_sorted_in_file_order_where_that_is_free(
    tmp_path: Path,
) -> None:
    nodes = [helper.make_node("Neg", [a], [b], b) for a, b in
             (("c", "d"), ("x", "a"), ("x", "b"), ("b", "c"))]  # fmt: skip
    loaded = load_model(save(plain(nodes), tmp_path / "m.onnx"))
    assert [n.name for n in loaded.nodes] == ["relu", "a", "b", "c", "d"]
    assert loaded.notes == ("nodes that stand before a node they read from are sorted",)


def test_a_node_whose_body_reads_a_later_node_is_sorted_too(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Relu", ["late"], ["i"])], "b", [], [onnx.ValueInfoProto(name="i")]
    )
    proto = plain(
        [
            helper.make_node("If", ["t"], ["z"], "if", then_branch=body, else_branch=body),
            helper.make_node("Neg", ["x"], ["late"], "neg"),
        ],
        [array("t", np.array(True))],
    )
    loaded = load_model(save(proto, tmp_path / "m.onnx"))
    assert [n.name for n in loaded.nodes] == ["relu", "neg", "if"]


def test_of_initializers_with_one_name_the_last_counts_as_in_the_runtime(tmp_path: Path) -> None:
    proto = plain(
        [helper.make_node("Add", ["x", "k"], ["z"], "add")],
        [array("k", np.float32([1, 1])), array("o", np.float32(0)), array("k", np.float32([5, 5]))],
    )
    proto.graph.output.append(onnx.ValueInfoProto(name="z"))
    loaded = load_model(save(proto, tmp_path / "m.onnx"))
    np.testing.assert_array_equal(loaded.constant("k"), [5, 5])
    assert [t.name for t in loaded.proto.graph.initializer] == ["o", "k"]
    assert "1 initializers repeat the name of another" in loaded.notes[0]


@pytest.mark.parametrize("name", ["a\x00b", "a\nb", "<b>[red]", "x" * 10_000, "é'\"", "\u202e"])
def test_strange_names_are_kept_and_shown_escaped_and_cut(tmp_path: Path, name: str) -> None:
    proto = plain([helper.make_node("Neg", ["x"], [name], name)], [array(f"{name}k", floats((2,)))])
    loaded = load_model(save(proto, tmp_path / "m.onnx"))
    assert loaded.producers[name].name == name
    assert loaded.info(name).shape == (2,)
    proto.graph.node.append(helper.make_node("Neg", ["x"], [name], f"{name}2"))
    message = refused(save(proto, tmp_path / "m.onnx")).message
    assert shown(name) in message
    assert len(message) < 400
    assert not {"\n", "\0", "\u202e"} & set(message)


def test_names_that_are_not_utf8_get_escapes_everywhere(tmp_path: Path) -> None:
    data = plain([helper.make_node("Neg", ["y"], ["NAME"], "NODE")]).SerializeToString()
    (tmp_path / "m.onnx").write_bytes(
        data.replace(b"NAME", b"N\xff\xfeE").replace(b"NODE", b"\xffODE")
    )
    loaded = load_model(tmp_path / "m.onnx")
    assert loaded.nodes[1].name == "\\xffODE"
    assert loaded.nodes[1].outputs == ("N\\xff\\xfeE",)
    assert loaded.info("N\\xff\\xfeE").shape == (2,)
    assert "names that are not UTF-8" in loaded.notes[0]
    assert load_model(save(loaded.proto, tmp_path / "n.onnx")).notes == ()


def test_negative_dimensions_are_dynamic_ones(tmp_path: Path) -> None:
    proto = plain()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert load_model(save(proto, tmp_path / "m.onnx")).inputs[0].shape == (None,)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            helper.make_node("Constant", [], [], "k", value_float=1.0),
            "node 'k' (Constant) has 0 outputs, expected at least 1",
        ),
        (onnx.NodeProto(), "node '' () has 0 outputs, expected at least 1"),
        (helper.make_node("Conv", ["x"], ["z"], "c"), "(Conv) has 1 inputs, expected at least 2"),
        (helper.make_node("Neg", ["x"] * 3, ["z"], "n"), "(Neg) has 3 inputs, expected at most 1"),
        (helper.make_node("Add", ["x", ""], ["z"], "a"), "(Add) leaves out its input 1, expected"),
        (helper.make_node("Neg", ["x"], [""], "n"), "(Neg) leaves out its output 0, expected a"),
        (helper.make_node("LSTM", ["x"] * 3, [], "l"), "(LSTM) has 0 outputs, expected at least 1"),
        (helper.make_node("Cast", ["x"], ["z"], "c"), "lacks the attribute 'to', expected one"),
        (
            helper.make_node("DequantizeLinear", ["x"], ["z"], "q", domain="com.microsoft"),
            "(DequantizeLinear) has 1 inputs, expected at least 2",
        ),
        (
            helper.make_node("MatMulNBits", ["x", "", "x"], ["z"], "m", domain="com.microsoft"),
            "(MatMulNBits) leaves out its input 1",
        ),
    ],
)
def test_a_node_that_its_operator_does_not_allow_is_refused_in_the_graph_and_in_bodies(
    tmp_path: Path, node: onnx.NodeProto, message: str
) -> None:
    assert message in refused(save(plain([node]), tmp_path / "m.onnx")).message
    body = helper.make_graph(
        [node, helper.make_node("Neg", ["x"], ["i"])], "b", [], [onnx.ValueInfoProto(name="i")]
    )
    branches = helper.make_node("If", ["t"], ["z"], then_branch=body, else_branch=body)
    assert message in refused(save(plain([branches]), tmp_path / "m.onnx")).message


def test_optional_inputs_and_outputs_may_be_left_out(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Clip", ["x", "", "k"], ["a"]),
        helper.make_node("LSTM", ["l", "w", "w"], ["", "h"], hidden_size=1),
    ]
    constants = [array("k", np.float32(1)), array("l", floats((1, 1, 1))),
                 array("w", floats((1, 4, 1)))]  # fmt: skip
    loaded = load_model(save(plain(nodes, constants), tmp_path / "m.onnx"))
    assert loaded.nodes[1].inputs == ("x", "", "k")
    assert loaded.nodes[2].outputs == ("", "h")


def test_attributes_without_a_type_get_that_of_their_value(tmp_path: Path) -> None:
    node = helper.make_node("Concat", ["x", "x"], ["z"], "join", axis=0)
    node.attribute[0].ClearField("type")
    loaded = load_model(save(plain([node]), tmp_path / "m.onnx"))
    assert loaded.node_by_name["join"].attributes == {"axis": 0}


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    leaky = helper.make_node("LeakyRelu", ["a"], ["b"], alpha=0.5)
    proto = functions([leaky], [call(0, "a", "t"), call(0, "t", "b")])
    loaded = load_model(save(proto, tmp_path / "m.onnx"))
    assert [n.op_type for n in loaded.nodes] == ["Relu", "LeakyRelu", "LeakyRelu"]
    assert not loaded.proto.functions
    assert "1 calls of local functions are inlined" in loaded.notes[0]
    z = run(loaded, {"x": np.float32([-4, 4])}, outputs=["z"])["z"]
    np.testing.assert_array_equal(z, [-1, 4])


def test_a_local_function_of_another_opset_is_converted_or_refused(tmp_path: Path) -> None:
    # ReduceMean takes its axes as an input from opset 18 on.
    mean = helper.make_node("ReduceMean", ["a"], ["b"], axes=[0])
    loaded = load_model(save(functions([mean], opset=17), tmp_path / "m.onnx"))
    z = run(loaded, {"x": np.float32([-4, 8])}, outputs=["z"])["z"]
    np.testing.assert_array_equal(z, [2])
    # To convert a function, ONNX has to know the types in it, and inside another it does not.
    inner = helper.make_node("LeakyRelu", ["a"], ["b"], alpha=0.5)
    proto = functions([inner], [call(0, "a", "t"), call(0, "t", "b")], opset=18)
    error = refused(save(proto, tmp_path / "m.onnx"))
    assert "its local functions cannot be inlined" in error.message


def test_fields_that_an_attributes_type_does_not_read_are_not_read(tmp_path: Path) -> None:
    node = helper.make_node("Concat", ["x", "x"], ["z"], "join", axis=0)
    body = node.attribute[0].g
    body.node.add(op_type="Neg", input=["x"], output=["i"])
    body.initializer.add(name="k", data_type=1, dims=[10**6, 10**6])
    loaded = load_model(save(plain([node]), tmp_path / "m.onnx"))
    assert loaded.bodies == ()
    assert loaded.node_by_name["join"].attributes == {"axis": 0}


@pytest.mark.parametrize(
    "indices", [int_tensor([1, 3], [2]), int_tensor([0, 1, 1, 0], [2, 2])], ids=["flat", "tuples"]
)
def test_sparse_tensors_are_made_dense(tmp_path: Path, indices: TensorProto) -> None:
    proto = plain([helper.make_node("Constant", [], ["c"], sparse_value=sparse(indices, [2, 2]))])
    made = sparse(indices, [2, 2])
    made.values.name = "s"
    proto.graph.sparse_initializer.append(made)
    loaded = load_model(save(proto, tmp_path / "m.onnx"))
    expected = [[0, 2], [0, 3]] if indices.dims == [2] else [[0, 2], [3, 0]]
    for name in ("c", "s"):
        np.testing.assert_array_equal(loaded.constant(name), expected)
    assert loaded.notes[0] == "2 sparse tensors are made dense"


def test_a_graph_for_training_is_left_out(tmp_path: Path) -> None:
    proto = plain()
    proto.training_info.add().algorithm.node.add(op_type="Nope")
    loaded = load_model(save(proto, tmp_path / "m.onnx"))
    assert loaded.notes == ("the graph for training is left out",)
    assert not loaded.proto.training_info


def test_twenty_thousand_nodes_are_read_in_linear_time(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        names = ["x", *(f"t{i}" for i in range(count))]
        nodes = [helper.make_node("LeakyRelu", [a], [b], alpha=0.5)
                 for a, b in itertools.pairwise(names)]  # fmt: skip
        # Twice turned around: every node stands before the one it reads from.
        path = save(plain(nodes[::-1]), tmp_path / "m.onnx")
        start = time.perf_counter()
        loaded = load_model(path)
        assert len(loaded.nodes) == count + 1
        assert len(loaded.consumers) == count
        assert loaded.info(names[-1]).shape == (2,)
        return time.perf_counter() - start

    short, long = seconds(2_000), seconds(20_000)
    assert long < 5
    assert long < 40 * max(short, 0.02)


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        ("BFLOAT16", "bfloat16", [1.5, -2.0, 0.0]),
        ("FLOAT16", "float16", [1.5, -2.0, 0.0]),
        ("FLOAT8E4M3FN", "float8_e4m3fn", [1.5, -2.0, 448.0]),
        ("FLOAT8E4M3FNUZ", "float8_e4m3fnuz", [1.5, -2.0, 240.0]),
        ("FLOAT8E5M2", "float8_e5m2", [1.5, -2.0, 57344.0]),
        ("FLOAT8E5M2FNUZ", "float8_e5m2fnuz", [1.5, -2.0, 57344.0]),
        ("FLOAT8E8M0", "float8_e8m0fnu", [1.0, 2.0, 0.5]),
        ("FLOAT4E2M1", "float4_e2m1fn", [1.5, -2.0, 6.0]),
        ("INT4", "int4", [7, -8, -1]),
        ("UINT4", "uint4", [15, 0, 8]),
        ("INT2", "int2", [1, -2, -1]),
        ("UINT2", "uint2", [3, 0, 2]),
        ("INT8", "int8", [127, -128, 0]),
        ("BOOL", "bool", [1, 0, 1]),
        ("DOUBLE", "float64", [1.5, -2.0, 1e300]),
        ("COMPLEX64", "complex64", [1.5, -2.0, 2j]),
    ],
)
def test_constants_of_every_type_have_their_values_and_one_name(
    tmp_path: Path, kind: str, name: str, values: list[Any]
) -> None:
    number = TensorProto.DataType.Value(kind)
    fields = helper.make_tensor("fields", number, [3], values)
    raw = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(fields), "raw")
    scalar = helper.make_tensor("scalar", number, [], values[:1])
    empty = helper.make_tensor("empty", number, [0, 2], [])
    node = helper.make_node("Constant", [], ["node"], "k", value=raw)
    path = save(plain([node], [fields, raw, scalar, empty], opset=MAX_OPSET), tmp_path / "m.onnx")
    loaded = load_model(path)
    for tensor in ("fields", "raw", "node"):
        found = loaded.constant(tensor)
        assert found is not None
        assert found.dtype.name == name == loaded.info("raw").dtype
        np.testing.assert_array_equal(found.astype(complex), values)
    for tensor, shape in (("scalar", ()), ("empty", (0, 2))):
        found = loaded.constant(tensor)
        assert found is not None
        assert found.shape == shape == loaded.info(tensor).shape


def test_strings_and_plain_values_of_constant_nodes_are_read(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "value_float": 2.5, "value_floats": [1.0, 2.0], "value_int": -3, "value_ints": [4, 5],
        "value_string": "bö", "value_strings": ["a", ""],
    }  # fmt: skip
    nodes = [helper.make_node("Constant", [], [k], k, **{k: v}) for k, v in fields.items()]
    # An operator of the same name from elsewhere is none.
    nodes.append(helper.make_node("Constant", [], ["other"], domain="my", value_float=1.0))
    texts = TensorProto(name="texts", data_type=TensorProto.STRING, dims=[2, 1])
    texts.string_data.extend(["bö".encode(), b"\xff"])
    proto = plain(nodes, [texts])
    proto.opset_import.add(domain="my", version=1)
    loaded = load_model(save(proto, tmp_path / "m.onnx"))
    for name, value in fields.items():
        found = loaded.constant(name)
        assert found is not None
        assert found.tolist() == value
    found = loaded.constant("texts")
    assert found is not None
    assert found.tolist() == [["bö"], ["\ufffd"]]
    assert loaded.info("texts").dtype == "string"
    assert loaded.node_by_name["value_strings"].attributes == {"value_strings": ("a", "")}
    assert loaded.constant_names == {*fields, "texts"}
    assert loaded.constant("other") is None


# -- bodies ------------------------------------------------------------------------------------


def nested_bodies() -> onnx.ModelProto:
    """An If in an If; "k" is a constant of the main graph, of one branch, and computed in one."""

    def body(name: str, nodes: Sequence[onnx.NodeProto], *constants: TensorProto) -> Any:
        return helper.make_graph(
            list(nodes), name, [], [onnx.ValueInfoProto(name="out")], list(constants)
        )

    inner_then = body("a", [helper.make_node("Add", ["x", "k"], ["out"])])
    inner_else = body(
        "b",
        [helper.make_node("Neg", ["x"], ["k"]), helper.make_node("Add", ["k", "m"], ["out"])],
    )
    outer_then = body(
        "c",
        [
            helper.make_node("Constant", [], ["j"], value_float=7.0),
            helper.make_node("If", ["t"], ["out"], "/in", then_branch=inner_then,
                             else_branch=inner_else),
        ],
        array("k", np.float32([2, 2])),
    )  # fmt: skip
    outer_else = body("d", [helper.make_node("Mul", ["x", "k"], ["out"], "mul")])
    return model(
        [helper.make_node("If", ["t"], ["y"], "/out/If", then_branch=outer_then,
                          else_branch=outer_else)],
        [("x", [2])],
        [("y", [2])],
        [array("t", np.array(True)), array("k", np.float32([1, 1])), array("m", np.float32(9))],
    )  # fmt: skip


def test_bodies_have_paths_owners_and_unique_node_names(tmp_path: Path) -> None:
    loaded = load_model(save(nested_bodies(), tmp_path / "m.onnx"))
    bodies = {body.path: body for body in loaded.bodies}
    then = "/out/If/then_branch"
    # In the order of the file, where "else_branch" comes first; a body before those inside it.
    assert list(bodies) == [
        *("/out/If/else_branch", then),
        *(f"{then}//in/else_branch", f"{then}//in/then_branch"),
    ]
    assert bodies[then].owner == "/out/If"
    assert bodies[f"{then}//in/else_branch"].owner == "/in"
    assert bodies[f"{then}//in/else_branch"].outer is bodies[then]
    assert [n.name for n in bodies[then].nodes] == ["Constant_j", "/in"]
    assert bodies[then].nodes[1].captured == ("x", "m", "k")
    assert bodies[then].constant_names == {"k", "j"}
    assert bodies[then].outputs == ("out",)
    # The file's own names of nodes in bodies are kept: nothing refers to the new ones.
    assert loaded.proto == nested_bodies()


def test_a_constant_is_looked_up_in_the_body_and_then_outwards(tmp_path: Path) -> None:
    loaded = load_model(save(nested_bodies(), tmp_path / "m.onnx"))
    other, then, inner_else, inner_then = loaded.bodies
    np.testing.assert_array_equal(other.constant("k"), [1, 1])
    np.testing.assert_array_equal(then.constant("k"), [2, 2])
    np.testing.assert_array_equal(inner_then.constant("k"), [2, 2])
    assert inner_then.constant("j") == 7
    assert inner_then.constant("m") == 9
    # There it is what a node computes, which hides the constants of the same name around it.
    assert inner_else.constant("k") is None
    assert inner_else.constant("nowhere") is None


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
