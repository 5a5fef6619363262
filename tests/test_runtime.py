from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from inspector.errors import ModelError, RunError
from inspector.model import Model
from inspector.model_files import load_model
from inspector.runtime import CPU, _check_provider, open_session, run
from tests.samples import ROOT, array, conv_relu_gemm, floats, model, save

X = np.array([1.3, -2.0, 0.4], np.float32)


def graph(
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[str],
    *,
    x: int = TensorProto.FLOAT,
    shape: Sequence[int | str] | None = (3,),
    opset: int = 21,
) -> onnx.ModelProto:
    """A model with the input "x"; the types of its outputs are for the runtime to infer."""
    made = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", x, shape)],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def through(dtype: int, opset: int = 21) -> onnx.ModelProto:
    """Casts "x" to a type ("t"), which is an output beside the Relu of "x"."""
    nodes = [helper.make_node("Cast", ["x"], ["t"], "cast", to=dtype)]
    return graph([*nodes, helper.make_node("Relu", ["x"], ["y"], "relu")], ["t", "y"], opset=opset)


def test_more_outputs_need_no_copy_and_equal_those_of_the_copied_proto() -> None:
    loaded = Model(conv_relu_gemm())
    feed = {"x": floats((1, 3, 8, 8))}
    session = open_session(loaded, optimized=False, outputs=["r", "y", "c", "r"])
    assert session.output_names == ("y", "r", "c")
    more = conv_relu_gemm()
    for name in ("r", "c"):
        more.graph.output.add(name=name)
    old = open_session(more, optimized=False).run(feed)
    new = session.run(feed)
    assert list(new) == ["y", "r", "c"]
    for name, value in old.items():
        np.testing.assert_array_equal(new[name], value)
    assert [o.name for o in loaded.proto.graph.output] == ["y"]


def test_an_input_or_a_weight_may_be_an_output() -> None:
    session = open_session(Model(conv_relu_gemm()), optimized=False, outputs=["x", "b"])
    feed = {"x": floats((1, 3, 8, 8))}
    np.testing.assert_array_equal(session.run(feed)["x"], feed["x"])
    np.testing.assert_array_equal(session.run(feed)["b"], floats((8,), 2, 0.1))


def test_an_output_that_no_node_makes_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="no tensor 'nope'"):
        open_session(Model(conv_relu_gemm()), optimized=False, outputs=["nope"])


@pytest.mark.parametrize(
    ("dtype", "numpy_type", "opset"),
    [
        (TensorProto.BFLOAT16, ml_dtypes.bfloat16, 13),
        (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn, 19),
        (TensorProto.FLOAT8E4M3FNUZ, ml_dtypes.float8_e4m3fnuz, 19),
        (TensorProto.FLOAT8E5M2, ml_dtypes.float8_e5m2, 19),
        (TensorProto.FLOAT8E5M2FNUZ, ml_dtypes.float8_e5m2fnuz, 19),
    ],
)
def test_outputs_of_small_floats_come_as_float32_with_exactly_their_values(
    dtype: int, numpy_type: Any, opset: int
) -> None:
    session = open_session(through(dtype, opset), optimized=False)
    t = session.run({"x": X})["t"]
    assert t.dtype == np.float32
    np.testing.assert_array_equal(t, X.astype(numpy_type).astype(np.float32))
    assert session.output_names == ("t", "y")
    assert session.output_dtypes["t"] != "tensor(float)"
    assert not session.unreadable


@pytest.mark.parametrize(
    ("dtype", "expected", "opset"),
    [
        (TensorProto.INT4, np.array([1, -2, 0], np.int8), 21),
        (TensorProto.UINT4, np.array([1, 14, 0], np.uint8), 21),
        (TensorProto.INT2, np.array([1, -2, 0], np.int8), 25),
        (TensorProto.UINT2, np.array([1, 2, 0], np.uint8), 25),
    ],
)
def test_outputs_of_small_integers_come_as_eight_bit_integers(
    dtype: int, expected: np.ndarray[Any, Any], opset: int
) -> None:
    t = open_session(through(dtype, opset), optimized=False).run({"x": X})["t"]
    assert t.dtype == expected.dtype
    np.testing.assert_array_equal(t, expected)


def test_a_cast_takes_no_name_that_the_model_has() -> None:
    proto = through(TensorProto.BFLOAT16)
    proto.graph.node.append(helper.make_node("Neg", ["x"], ["t_readable"], "neg"))
    session = open_session(proto, optimized=False, outputs=["t_readable"])
    given = session.run({"x": X})
    np.testing.assert_array_equal(given["t_readable"], -X)
    np.testing.assert_array_equal(given["t"], X.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_type_that_the_opset_cannot_cast_is_named_and_the_rest_runs() -> None:
    k = TensorProto(name="k", data_type=TensorProto.INT4, dims=[2], raw_data=b"\x12")
    proto = graph([helper.make_node("Relu", ["x"], ["y"], "relu")], ["y", "k"], opset=17)
    proto.graph.initializer.append(k)
    session = open_session(proto, optimized=False)
    assert session.unreadable == {"k": "tensor(int4)"}
    assert list(session.run({"x": X})) == ["y"]


@pytest.mark.parametrize(
    ("op_type", "kind"),
    [("SequenceConstruct", "seq(tensor(float))"), ("Optional", "optional(tensor(float))")],
)
def test_outputs_that_are_no_tensors_are_named_and_left_out(op_type: str, kind: str) -> None:
    nodes = [
        helper.make_node(op_type, ["x"], ["s"], "make"),
        helper.make_node("Relu", ["x"], ["y"], "relu"),
    ]
    session = open_session(graph(nodes, ["s", "y"]), optimized=False)
    assert session.unreadable == {"s": kind}
    assert session.output_names == ("y",)
    assert list(session.run({"x": X})) == ["y"]
    with pytest.raises(RunError, match=r"output 's' of the model is a "):
        session.run({"x": X}, ["s"])


def test_a_model_of_unreadable_outputs_alone_gives_none() -> None:
    nodes = [helper.make_node("SequenceConstruct", ["x"], ["s"], "make")]
    assert open_session(graph(nodes, ["s"]), optimized=True).run({"x": X}) == {}


def test_strings_go_in_and_come_out() -> None:
    proto = graph([helper.make_node("Identity", ["x"], ["y"])], ["y"], x=TensorProto.STRING)
    session = open_session(proto, optimized=False)
    texts = np.array(["a", "bö", ""], object)
    for given in (texts, texts.astype(str), np.char.encode(texts.astype(str), "utf-8")):
        y = session.run({"x": given})["y"]
        assert y.dtype == object
        assert list(y) == ["a", "bö", ""]
    # Without a zero at their end the binding would read on into the next ones.
    y = session.run({"x": np.array([b"abc", b"def", b"xyz"])})["y"]
    assert list(y) == ["abc", "def", "xyz"]
    with pytest.raises(RunError, match="neither numbers nor strings"):
        session.run({"x": np.array([b"abc", b"def", b"xyz"]).view("V3")})


@pytest.mark.parametrize("shape", [(0,), (), (2, 0, 3), (1, 1, 1)])
def test_empty_arrays_and_scalars_pass_through(shape: tuple[int, ...]) -> None:
    symbols = [f"d{i}" for i in range(len(shape))]
    session = open_session(
        graph([helper.make_node("Neg", ["x"], ["y"])], ["y"], shape=symbols), optimized=False
    )
    x = floats(shape)
    y = session.run({"x": x})["y"]
    assert y.shape == shape
    np.testing.assert_array_equal(y, -x)


def test_a_feed_in_any_layout_is_read_as_its_values() -> None:
    session = open_session(graph([helper.make_node("Neg", ["x"], ["y"])], ["y"]), optimized=False)
    spread = np.stack([X, X], 1)[:, 0]
    for given in (X.astype(">f4"), spread, X[::-1][::-1]):
        np.testing.assert_array_equal(session.run({"x": given})["y"], -X)
    scalar = graph([helper.make_node("Neg", ["x"], ["y"])], ["y"], shape=())
    assert run(Model(scalar), {"x": np.float32(3)})["y"] == -3  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("dtype", "numpy_type"),
    [
        (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
        (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
        (TensorProto.FLOAT8E5M2FNUZ, ml_dtypes.float8_e5m2fnuz),
    ],
)
def test_feeds_of_types_that_numpy_lacks_are_taken(dtype: int, numpy_type: Any) -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    session = open_session(graph([node], ["y"], x=dtype), optimized=False)
    given = X.astype(numpy_type)
    np.testing.assert_array_equal(session.run({"x": given})["y"], given.astype(np.float32))


@pytest.mark.parametrize(
    "given",
    [
        np.ones(4, np.float32),
        np.ones((3, 1), np.float32),
        np.ones(3, np.float64),
        np.ones(3, np.complex64),
        np.ones(3, np.longdouble),
        np.ones(3, "datetime64[s]"),
        np.zeros(3, [("a", "f4")]),
        np.zeros(3, "V4"),
        np.array(["a", None, 2], object),
        np.array([b"\xff"] * 3),
        [1.0, 2.0, "z"],
        (1.0, 2.0, 3.0),
        {"a": 1.0},
        "abc",
        None,
        3,
    ],
)
def test_a_feed_that_does_not_fit_is_a_run_error_with_the_samples_name(given: Any) -> None:
    session = open_session(graph([helper.make_node("Neg", ["x"], ["y"])], ["y"]), optimized=False)
    with pytest.raises(RunError, match=r"^the model does not run on 07\.npz: ") as caught:
        session.run({"x": given}, sample="07.npz")
    assert "quant-inspector show" in caught.value.hint


def test_strings_that_are_no_text_and_missing_inputs_are_run_errors() -> None:
    proto = graph([helper.make_node("Identity", ["x"], ["y"])], ["y"], x=TensorProto.STRING)
    session = open_session(proto, optimized=False)
    for bad in (np.array(["\ud800", "", ""], object), np.array([b"\xff", b"", b""])):
        with pytest.raises(RunError, match=r"does not run on a feed: .* codec can't"):
            session.run({"x": bad})
    with pytest.raises(RunError, match="missing"):
        session.run({})
    with pytest.raises(RunError, match="Invalid output name"):
        session.run({"x": np.array(["a", "b", "c"])}, ["nope"])


def test_a_provider_that_is_not_there_is_named_with_those_that_are(
    capfd: pytest.CaptureFixture[str],
) -> None:
    for provider in ("CUDAExecutionProvider", "NoSuchProvider"):
        with pytest.raises(RunError) as caught:
            open_session(Model(conv_relu_gemm()), optimized=True, provider=provider)
        assert repr(provider) in caught.value.message
        assert CPU in caught.value.message
    assert capfd.readouterr().out == ""


def test_a_session_says_what_it_runs_on() -> None:
    assert open_session(Model(conv_relu_gemm()), optimized=True).providers == (CPU,)
    # Others may be listed without the device they need.
    for provider in {CPU, "AzureExecutionProvider"} & set(ort.get_available_providers()):
        session = open_session(Model(conv_relu_gemm()), optimized=True, provider=provider)
        assert session.providers == tuple(dict.fromkeys((provider, CPU)))
        assert session.run({"x": floats((1, 3, 8, 8))})["y"].shape == (1, 5)


def test_a_provider_that_the_runtime_went_on_without_is_refused() -> None:
    # What ONNX Runtime does where a provider's library is not there: a warning, and the CPU.
    with pytest.warns(UserWarning, match="not in available provider names"):
        session = ort.InferenceSession(
            conv_relu_gemm().SerializeToString(), providers=["CUDAExecutionProvider"]
        )
    with pytest.raises(RunError, match="cannot load CUDAExecutionProvider and would run on CPU"):
        _check_provider("CUDAExecutionProvider", session.get_providers())


def test_a_transformer_that_is_disabled_does_not_run() -> None:
    # Adding zero turns -0.0 into 0.0; the transformer takes the addition away.
    ends = [helper.make_node("Neg", [a], [b], b) for a, b in (("x", "n"), ("a", "y"))]
    add = helper.make_node("Add", ["n", "zero"], ["a"], "add")
    proto = graph([ends[0], add, ends[1]], ["y"])
    proto.graph.initializer.append(array("zero", np.float32(0)))
    feed = {"x": np.zeros(3, np.float32)}

    def sign(*disabled: str) -> bool:
        session = open_session(proto, optimized=True, disabled_transformers=disabled)
        return bool(np.signbit(session.run(feed)["y"]).all())

    assert not sign()
    assert sign("NoopElimination")


def test_an_operator_that_the_runtime_lacks_is_a_model_error() -> None:
    node = helper.make_node("Relu", ["x"], ["y"], domain="com.example")
    proto = graph([node], ["y"])
    proto.opset_import.add(domain="com.example", version=1)
    with pytest.raises(ModelError, match="does not have"):
        open_session(proto, optimized=False)


def test_a_model_that_contradicts_itself_is_a_run_error_of_bounded_length() -> None:
    proto = graph([helper.make_node("Add", ["x", "z" * 10_000], ["y"])], ["y"])
    with pytest.raises(RunError, match="refuses the model") as caught:
        open_session(proto, optimized=False)
    assert len(caught.value.message) < 1200


@pytest.mark.parametrize("name", ["a\x00b", "a\nb", "<b>[red]", "x" * 10_000, "é'\"", "\u202e"])
def test_strange_names_run_as_they_are(tmp_path: Path, name: str) -> None:
    nodes = [helper.make_node("Neg", ["x"], [name], name), helper.make_node("Neg", [name], ["y"])]
    loaded = load_model(save(graph(nodes, ["y"]), tmp_path / "m.onnx"))
    given = open_session(loaded, optimized=False, outputs=[name]).run({"x": X})
    np.testing.assert_array_equal(given[name], -X)


def test_a_path_is_loaded_and_runs_like_the_model(tmp_path: Path) -> None:
    path = save(conv_relu_gemm(), tmp_path / "m.onnx")
    feed = {"x": floats((1, 3, 8, 8))}
    given = open_session(path, optimized=False).run(feed)["y"]
    np.testing.assert_array_equal(given, run(Model(conv_relu_gemm()), feed)["y"])


def test_weights_that_stayed_on_disk_give_the_same_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "ünï cøde"
    folder.mkdir()
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])],
        [("x", [2, 64])],
        [("y", [2, 96])],
        [array("w", floats((64, 96), 1)), array("b", floats((96,), 2))],
    )
    feed = {"x": floats((2, 64), 3)}
    expected = run(Model(proto), feed)["y"]
    path = folder / "m.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    loaded = load_model(path, inside_bytes=0)
    assert list(loaded.external) == ["w"]
    for optimized in (False, True):
        session = open_session(loaded, optimized=optimized, outputs=["h"])
        given = session.run(feed)
        np.testing.assert_allclose(given["y"], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            given["h"], feed["x"] @ floats((64, 96), 1), rtol=1e-5, atol=1e-5
        )
    assert sorted(p.name for p in folder.iterdir()) == ["m.onnx", "w.bin"]


def test_the_runtime_reports_nothing_and_leaves_no_id_in_the_home_folder(tmp_path: Path) -> None:
    code = (
        "import inspector.quantize\n"
        "from inspector.model import Model\n"
        "from inspector.runtime import run\n"
        "from tests.samples import conv_relu_gemm, floats\n"
        "run(Model(conv_relu_gemm()), {'x': floats((1, 3, 8, 8))})\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    subprocess.run(
        [sys.executable, "-B", "-c", code],
        check=True,
        cwd=ROOT,
        env=environment | {"HOME": str(tmp_path)},
    )
    assert list(tmp_path.iterdir()) == []
