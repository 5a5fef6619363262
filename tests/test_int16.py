"""Tensors at 16 bits: previews, files, costs and the three-way toggle.

The oracles are ONNX Runtime's own `quantize_static` with the same `TensorQuantOverrides`, its
kernels, and float64 arithmetic.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import streamlit as st
from click.testing import CliRunner
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from playwright.sync_api import Browser, expect
from streamlit.testing.v1 import AppTest

from inspector.calibration import calibrate, hushed
from inspector.cli import cli
from inspector.commands import inspector_command, onnxruntime_call
from inspector.comparison import judged_db
from inspector.exclusions import (
    ExclusionList,
    effect_of,
    override_effects,
    read_exclusions,
    write_exclusions,
)
from inspector.feeds import Feeds, load_feeds, random_feeds
from inspector.live import diagnose_run, preview_list
from inspector.model import Model
from inspector.model_files import load_model
from inspector.prepare import Prepared, prepare
from inspector.preview import Previewer, RecipeSource
from inspector.quantize import extra_options, open_quantizer, quantize_model
from inspector.quantizer import UnplannableError
from inspector.recipe import (
    QuantConfig,
    TensorOverride,
    parse_override,
    read_recipe,
    with_type,
)
from inspector.render import read_comparison, read_number
from inspector.runtime import open_session
from inspector.store import FeedSource, Workspace
from inspector.switchboard import Switchboard
from inspector.web import session
from inspector.web.tasks import load_sample
from inspector.workbench import load_pair, requantize
from tests.browser import running_app
from tests.samples import MODELS, array, conv_relu_gemm, floats, needs_models, npz_folder, rng, save
from tests.samples import model as sample
from tests.test_pages import app, last_run, wait, words

PATIENCE = 90_000


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def wide(*tensors: str, quant_type: str = "int16") -> tuple[TensorOverride, ...]:
    return tuple(TensorOverride(tensor=t, quant_type=quant_type) for t in tensors)


def entries(config: QuantConfig) -> dict[str, Any]:
    given = extra_options(config).get("TensorQuantOverrides", {})
    return {tensor: each[0] for tensor, each in given.items()}


class Opened:
    """A switchboard with a second type, and the file beside it.

    Args:
        float_model: the float model.
        feeds: for calibration.
        cache: folder.
        config: the recipe, without overrides.
        quant_type: the second type.
    """

    def __init__(
        self,
        float_model: Model,
        feeds: Feeds,
        cache: Path,
        config: QuantConfig | None = None,
        quant_type: str = "int16",
    ) -> None:
        self.config = QuantConfig() if config is None else config
        self.float_model, self.feeds, self.cache = float_model, feeds, cache
        self.quant_type = quant_type
        some = TensorOverride(tensor="whichever", quant_type=quant_type)
        self.prepared: Prepared = prepare(float_model, self.with_overrides((some,)), cache)
        self.ranges = calibrate(
            self.prepared.model, feeds, method=self.config.method, cache=cache
        ).path
        with hushed():
            quantizer = open_quantizer(self.prepared, self.config, self.ranges)
            assert quantizer is not None
            self.board = Switchboard(quantizer, (quant_type,))

    def with_overrides(self, overrides: tuple[TensorOverride, ...]) -> QuantConfig:
        return QuantConfig.from_json(
            {**self.config.to_json(), "overrides": [each.to_json() for each in overrides]}
        )

    def file(
        self, exclude: Sequence[str], overrides: tuple[TensorOverride, ...]
    ) -> onnx.ModelProto:
        with hushed():
            quantizer = open_quantizer(self.prepared, self.with_overrides(overrides), self.ranges)
            assert quantizer is not None
            return quantizer.quantize(exclude)

    def same(self, exclude: Sequence[str], tensors: Sequence[str], feed: Any) -> bool:
        """Whether the switchboard gives the very bits of the file's own session."""
        overrides = wide(*tensors, quant_type=self.quant_type)
        wanted = open_session(self.file(exclude, overrides), optimized=False).run(feed)
        with hushed():
            plan = self.board.plan_of(exclude, entries(self.with_overrides(overrides)))
        found = self.board.run(plan, feed)
        return all(np.array_equal(found[o], v, equal_nan=True) for o, v in wanted.items())


def real(name: str, cache: Path, samples: int = 2, **options: Any) -> Opened:
    float_model = load_model(MODELS / name / "model.onnx")
    feeds = load_feeds(MODELS / name / "inputs", float_model, limit=samples)
    return Opened(float_model, feeds, cache, **options)


def mixed(opened: Opened, count: int, seed: int = 0) -> int:
    """How many of so many random mixes of float, 8-bit and 16-bit tensors gave the file's bits."""
    nodes = [n.name for n in opened.prepared.model.nodes if n.op_type != "Constant"]
    tensors = list(opened.board.whole.activations)
    chosen = random.Random(seed)
    same = 0
    for at in range(count):
        exclude = chosen.sample(nodes, chosen.randint(0, max(1, min(12, len(nodes) // 3))))
        some = chosen.sample(tensors, chosen.randint(1, max(1, min(12, len(tensors) // 2))))
        same += opened.same(exclude, some, opened.feeds[at % len(opened.feeds)])
    return same


# -- the engine --------------------------------------------------------------------------------


@needs_models
@pytest.mark.parametrize("name", ["mlperf-resnet8", "magika", "silero-vad-16k"])
def test_a_mix_of_float_int8_and_int16_gives_the_bits_of_its_own_file(
    name: str, cache: Path
) -> None:
    assert mixed(real(name, cache), count=6) == 6


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize("name", ["fastestdet", "gtcrn", "mlperf-kws-dscnn", "ultraface-rfb320"])
def test_random_mixes_give_the_bits_of_their_own_files(name: str, cache: Path) -> None:
    assert mixed(real(name, cache), count=15) == 15


@needs_models
@pytest.mark.parametrize(
    ("config", "quant_type"),
    [
        (QuantConfig(activation_type="uint8", weight_type="uint8"), "uint16"),
        (QuantConfig(per_channel=True, activation_symmetric=True), "int16"),
        (QuantConfig(), "uint8"),
        (QuantConfig(activation_type="uint16"), "uint8"),
    ],
    ids=("uint8 and uint16", "per channel, symmetric", "int8 and uint8", "uint16 and uint8"),
)
def test_any_second_type_of_any_recipe_gives_the_bits_of_its_own_file(
    config: QuantConfig, quant_type: str, cache: Path
) -> None:
    opened = real("mlperf-resnet8", cache, config=config, quant_type=quant_type)
    assert mixed(opened, count=4) == 4


def small(cache: Path, folder: Path) -> Opened:
    float_model = load_model(save(conv_relu_gemm(), folder / "m.onnx"))
    return Opened(float_model, random_feeds(float_model, samples=3, seed=0), cache)


def test_going_to_sixteen_bits_and_back_gives_the_bits_of_before(
    tmp_path: Path, cache: Path
) -> None:
    opened = small(cache, tmp_path)
    board, feed = opened.board, opened.feeds[0]
    before = board.run(board.plan_of(()), feed)
    changed = board.plan_of((), entries(opened.with_overrides(wide("r", "x"))))
    assert {n: g.dtype for n, g in changed.activations.items() if g.dtype != "int8"} == {
        "r": "int16", "x": "int16",
    }  # fmt: skip
    between = board.run(changed, feed)
    after = board.run(board.plan_of(()), feed)
    assert all(np.array_equal(before[o], after[o]) for o in before)
    assert not all(np.array_equal(before[o], between[o]) for o in before)


def test_a_switchboard_that_was_opened_for_one_type_refuses_another(
    tmp_path: Path, cache: Path
) -> None:
    board = small(cache, tmp_path).board
    with pytest.raises(UnplannableError, match="x would be uint16"):
        board.plan_of((), {"x": {"quant_type": QuantType.QUInt16}})


def outlier_model() -> onnx.ModelProto:
    """One channel of `wide` is 500 times as large as the others, which alone are read."""
    weight = floats((8, 4, 1, 1), 1)
    weight[3] *= 500.0
    behind = floats((8, 8, 1, 1), 2)
    behind[:, 3] = 0.0
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["wide"], "first"),
        helper.make_node("Conv", ["wide", "v"], ["y"], "second"),
    ]
    return sample(
        nodes, [("x", [1, 4, 6, 6])], [("y", [1, 8, 6, 6])],
        [array("w", weight), array("v", behind)],
    )  # fmt: skip


def db(reference: Any, actual: Any) -> float:
    wanted = np.asarray(reference, np.float64)
    noise = np.sum((wanted - np.asarray(actual, np.float64)) ** 2)
    return float(10 * np.log10(np.sum(wanted**2) / noise))


def outlier_previewer(folder: Path, cache: Path) -> tuple[Previewer, Opened]:
    float_model = load_model(save(outlier_model(), folder / "outlier.onnx"))
    feeds = random_feeds(float_model, samples=2, seed=1)
    # Per channel, so that the weights follow their large row.
    opened = Opened(float_model, feeds, cache, config=QuantConfig(per_channel=True))
    source = RecipeSource(opened.prepared, opened.config, opened.ranges, feeds[0], types=("int16",))
    return Previewer(float_model, source, feeds), opened


def test_sixteen_bits_for_a_tensor_with_an_outlier_improve_the_output(
    tmp_path: Path, cache: Path
) -> None:
    previewer, opened = outlier_previewer(tmp_path, cache)
    given = opened.with_overrides(wide("wide"))
    [before], [after] = (
        previewer.preview((), each).outputs for each in (None, entries(given))
    )  # fmt: skip
    assert after.sqnr_db > before.sqnr_db + 15
    session = open_session(opened.float_model, optimized=False)
    reference = [session.run(feed)["y"] for feed in opened.feeds]
    for overrides, told in (((), before), (wide("wide"), after)):
        made = open_session(opened.file((), overrides), optimized=False)
        actual = [made.run(feed)["y"] for feed in opened.feeds]
        assert told.sqnr_db == pytest.approx(db(reference, actual), abs=1e-6)


# -- what a preview says of it -----------------------------------------------------------------


def carriers_model() -> onnx.ModelProto:
    """A Conv with a folded Relu, and two nodes that hand its grid on."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("MaxPool", ["r"], ["p"], "pool", kernel_shape=[2, 2]),
        helper.make_node("Transpose", ["p"], ["t"], "turn", perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["t", "m"], ["y"], "matmul"),
    ]
    return sample(
        nodes, [("x", [1, 4, 6, 6])], [("y", [1, 5, 5, 3])],
        [array("w", floats((8, 4, 1, 1), 1)), array("m", floats((8, 3), 2))],
    )  # fmt: skip


def carriers_source(folder: Path, cache: Path) -> tuple[RecipeSource, Opened]:
    float_model = load_model(save(carriers_model(), folder / "carriers.onnx"))
    opened = Opened(float_model, random_feeds(float_model, samples=2, seed=1), cache)
    source = RecipeSource(
        opened.prepared, opened.config, opened.ranges, opened.feeds[0], types=("int16",)
    )
    return source, opened


def test_a_tensor_without_a_range_of_its_own_names_the_one_to_override(
    tmp_path: Path, cache: Path
) -> None:
    source, opened = carriers_source(tmp_path, cache)
    assert source.carriers == {"c": "r", "p": "r", "t": "r"}
    change = source.change((), entries(opened.with_overrides(wide("r"))))
    assert dict(change.retyped) == {"r": "int16", "p": "int16", "t": "int16"}
    assert change.unheeded == ()
    # The file says the same: all three are stored in 16 bits.
    made = Model(opened.file((), wide("r")))
    for tensor in ("r", "p", "t"):
        zero_point = made.constant(made.producers[f"{tensor}_QuantizeLinear_Output"].inputs[2])
        assert zero_point is not None
        assert zero_point.dtype == np.int16
    change = source.change((), entries(opened.with_overrides(wide("c", "t"))))
    assert (change.retyped, change.unheeded) == ((), ("c", "t"))
    assert source.change(["matmul"], entries(opened.with_overrides(wide("y")))).unheeded == ("y",)


def test_multiply_accumulates_at_sixteen_bits_are_counted_apart(
    tmp_path: Path, cache: Path
) -> None:
    source, opened = carriers_source(tmp_path, cache)
    conv, matmul = 8 * 6 * 6 * 4, 5 * 5 * 3 * 8

    def shares(exclude: Sequence[str], *tensors: str) -> tuple[float, float]:
        change = source.change(exclude, entries(opened.with_overrides(wide(*tensors))))
        return change.float_macs_fraction, change.wide_macs_fraction

    assert shares(()) == (0.0, 0.0)
    # Conv gives r (its Relu is folded), MatMul reads it.
    assert shares((), "r") == (0.0, 1.0)
    assert shares((), "x") == (0.0, pytest.approx(conv / (conv + matmul)))
    assert shares((), "y") == (0.0, pytest.approx(matmul / (conv + matmul)))
    # What is in float is not counted twice, whatever it reads.
    assert shares(["matmul"], "r") == pytest.approx(
        (matmul / (conv + matmul), conv / (conv + matmul))
    )
    assert shares(["matmul"], "x", "y") == pytest.approx(
        (matmul / (conv + matmul), conv / (conv + matmul))
    )


def test_nodes_at_sixteen_bits_have_no_integer_kernel_on_the_cpu(
    tmp_path: Path, cache: Path
) -> None:
    # Why they are counted apart: ONNX Runtime's optimised graph.
    import onnxruntime as ort

    _, opened = carriers_source(tmp_path, cache)
    kinds = []
    for overrides in ((), wide("r")):
        onnx.save(opened.file((), overrides), tmp_path / "made.onnx")
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(
            str(tmp_path / "made.onnx"), options, providers=["CPUExecutionProvider"]
        )
        kinds.append({n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node})
    assert {"QLinearConv", "QLinearMatMul"} <= kinds[0]
    assert not {"QLinearConv", "QLinearMatMul"} & kinds[1]
    assert {"MatMul"} <= kinds[1]


# -- the file ----------------------------------------------------------------------------------


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Any) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> Any:
        return next(self.feeds, None)


@pytest.mark.parametrize("opset", [13, 21, 22])
def test_the_bytes_are_those_of_quantize_static_with_the_same_overrides(
    opset: int, tmp_path: Path, cache: Path
) -> None:
    proto = conv_relu_gemm()
    for entry in proto.opset_import:
        entry.version = opset if not entry.domain else entry.version
    float_model = load_model(save(proto, tmp_path / "m.onnx"))
    feeds = random_feeds(float_model, samples=3, seed=0)
    config = QuantConfig(
        overrides=(*wide("r"), TensorOverride(tensor="x", quant_type="int16", low=-4.0, high=4.0))
    )
    made = quantize_model(
        float_model, config, calibration=feeds, exclude=["gemm"] if opset == 22 else [],
        output=tmp_path / "ours.onnx", cache=cache,
    )  # fmt: skip
    prepared = prepare(float_model, config, cache).model
    assert prepared.path is not None
    assert prepared.opset == max(opset, 21)
    quantize_static(
        prepared.path, tmp_path / "theirs.onnx", Reader(feeds), quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
        nodes_to_exclude=["gemm"] if opset == 22 else [],
        extra_options={
            "TensorQuantOverrides": {
                "r": [{"quant_type": QuantType.QInt16}],
                "x": [{"quant_type": QuantType.QInt16, "rmin": np.array(-4, np.float32),
                       "rmax": np.array(4, np.float32)}],
            }
        },
    )  # fmt: skip
    assert made.path.read_bytes() == (tmp_path / "theirs.onnx").read_bytes()
    lifted = [note for note in made.notes if "lifted to 21" in note]
    assert len(lifted) == (1 if opset < 21 else 0)
    file = load_model(made.path)
    assert {n.domain for n in file.nodes if n.op_type == "QuantizeLinear"} == {""}
    for optimized in (False, True):
        values = open_session(file, optimized=optimized).run(feeds[0])
        assert all(np.isfinite(v).all() for v in values.values())


def test_the_recipe_that_is_read_back_has_the_types_of_single_tensors(
    tmp_path: Path, cache: Path
) -> None:
    _, opened = carriers_source(tmp_path, cache)
    config = opened.with_overrides(wide("x", "y"))
    found = read_recipe(Model(opened.file((), config.overrides)), opened.float_model).config
    assert {each.tensor: each.quant_type for each in found.overrides} == {
        "x": "int16", "y": "int16",
    }  # fmt: skip
    assert replace(found, overrides=()) == replace(opened.config, preprocess=found.preprocess)
    assert opened.file((), found.overrides) == opened.file((), config.overrides)
    # Three tensors have the grid of r, so that 16 bits are the commonest here.
    found = read_recipe(Model(opened.file((), wide("r"))), opened.float_model).config
    assert found.activation_type == "int16"
    assert {each.tensor: each.quant_type for each in found.overrides} == {"x": "int8", "y": "int8"}
    found = read_recipe(Model(opened.file((), wide("x", "y", "r"))), opened.float_model).config
    assert (found.activation_type, found.overrides) == ("int16", ())
    assert read_recipe(Model(opened.file((), ())), opened.float_model).config.overrides == ()


# -- what it really changed --------------------------------------------------------------------


def test_effects_name_int16_where_a_node_reads_or_gives_it(tmp_path: Path, cache: Path) -> None:
    _, opened = carriers_source(tmp_path, cache)
    config = opened.with_overrides(wide("r"))
    made = Model(opened.file((), config.overrides))
    [effect] = override_effects(opened.prepared.model, made, config)
    assert (effect.name, effect.op_type, effect.status) == ("relu", "Relu", "int16 now")
    assert effect.output_dtype == "int16"
    assert effect.details == (
        "r, p and t are int16",
        "read so by matmul",
        "ONNX Runtime's CPU kernels compute these nodes in float",
    )
    # A node on the exclusion list that is still fed by 16 bits says so.
    baseline = Model(opened.file((), ()))
    freed = Model(opened.file(["matmul"], config.overrides))
    [effect] = effect_of(["matmul"], opened.prepared.model, freed, baseline, config)
    assert effect.input_dtypes == ("int16",)
    assert any("dequantized from int16" in detail for detail in effect.details)


def test_effects_of_inputs_convs_and_outputs_at_sixteen_bits(tmp_path: Path, cache: Path) -> None:
    _, opened = carriers_source(tmp_path, cache)
    config = opened.with_overrides(wide("x", "y", "t"))
    made = Model(opened.file((), config.overrides))
    graph_input, output, handed_on = override_effects(opened.prepared.model, made, config)
    assert (graph_input.name, graph_input.op_type) == ("x", "Input")
    assert graph_input.details[:2] == ("x is int16", "read so by conv")
    assert (output.name, output.output_dtype, output.weight_dtype) == ("matmul", "int16", "int8")
    assert "the weight it is computed with stays int8" in output.details
    assert (handed_on.name, handed_on.status) == ("turn", "keeps its type")
    assert "has the scale of another tensor" in handed_on.details[0]
    # The override of a recipe's own type, and that of a weight, is no such effect.
    config = opened.with_overrides((TensorOverride(tensor="m", quant_type="int16"),
                                    TensorOverride(tensor="y", quant_type="int8")))  # fmt: skip
    assert override_effects(opened.prepared.model, made, config) == ()


# -- words -------------------------------------------------------------------------------------


def test_a_type_alone_is_written_as_the_type_alone() -> None:
    [override] = wide("a=b/c:0")
    assert override.to_text() == "a=b/c:0=int16"
    assert parse_override("a=b/c:0=int16") == override
    assert parse_override("t=uint16,symmetric") == TensorOverride(
        tensor="t", quant_type="uint16", symmetric=True
    )
    assert parse_override("t=:,int16") == TensorOverride(tensor="t", quant_type="int16")
    assert "--override a=b/c:0=int16" in inspector_command(QuantConfig(overrides=(override,)))


def test_another_type_keeps_the_range_that_was_set() -> None:
    assert with_type(None, "t", "int16") == TensorOverride(tensor="t", quant_type="int16")
    assert with_type(None, "t", "") is None
    assert with_type(TensorOverride(tensor="t", quant_type="int16"), "t", "") is None
    ranged = TensorOverride(tensor="t", low=-1.0, high=2.0, symmetric=False)
    typed = with_type(ranged, "t", "int16")
    assert typed == TensorOverride(
        tensor="t", low=-1.0, high=2.0, symmetric=False, quant_type="int16"
    )
    assert with_type(typed, "t", "") == ranged
    grid = TensorOverride(tensor="t", quant_type="uint8", scale=0.5, zero_point=3)
    assert with_type(grid, "t", "uint16") == TensorOverride(
        tensor="t", quant_type="uint16", low=-1.5, high=126.0
    )
    assert with_type(grid, "t", "uint8") is grid
    with pytest.raises(ValueError, match="type 'int9'"):
        with_type(None, "t", "int9")


def test_the_command_line_puts_a_tensor_on_sixteen_bits_and_a_list_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(tmp_path / "data"))
    save(conv_relu_gemm(), tmp_path / "m.onnx")
    feeds = npz_folder(tmp_path / "in", [{"x": np.ones((1, 3, 8, 8), np.float32)}] * 2)
    words = ["quantize", str(tmp_path / "m.onnx"), "--calibration", str(feeds)]
    done = CliRunner().invoke(
        cli, [*words, "-o", str(tmp_path / "q.onnx"), "--override", "r=int16",
              "--save-exclusions", str(tmp_path / "list.json")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "int16 now" in done.output
    zero_point = load_model(tmp_path / "q.onnx").constant("r_zero_point")
    assert zero_point is not None
    assert zero_point.dtype == np.int16
    # The list holds the recipe: quantizing with the list alone gives the same bytes.
    kept = read_exclusions(tmp_path / "list.json")
    assert kept.recipe is not None
    assert kept.recipe.overrides == wide("r")
    done = CliRunner().invoke(
        cli, [*words, "-o", str(tmp_path / "again.onnx"),
              "--exclude", str(tmp_path / "list.json")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "q.onnx").read_bytes()


def test_a_list_with_typed_tensors_survives_its_file_and_its_command(tmp_path: Path) -> None:
    config = QuantConfig(overrides=wide("r", "x"))
    write_exclusions(ExclusionList(recipe=config), tmp_path / "list.json")
    assert read_exclusions(tmp_path / "list.json").recipe == config
    values = json.loads((tmp_path / "list.json").read_text())
    assert values["recipe"]["overrides"] == [
        {"tensor": "r", "quant_type": "int16"}, {"tensor": "x", "quant_type": "int16"},
    ]  # fmt: skip
    text = onnxruntime_call(config)
    assert "'TensorQuantOverrides': {'r': [{'quant_type': QuantType.QInt16}]" in text


# -- the app's jobs ----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, str]:
    """A workspace with one float model, quantized with the defaults."""
    root = tmp_path / "workspace"
    Workspace(root)
    feeds = [{"x": rng(at).standard_normal((1, 4, 6, 6)).astype("float32")} for at in range(3)]
    source = FeedSource(kind="path", path=str(npz_folder(tmp_path / "feeds", feeds)))
    path = save(carriers_model(), tmp_path / "model.onnx")
    return root, load_pair(root, float_path=path, quantized_path=None, inputs=source)


def sqnr(found: dict[str, Any]) -> dict[str, float]:
    return {each["name"]: read_number(each["sqnr_db"]) for each in found["outputs"]}


def test_re_quantizing_confirms_the_preview_of_sixteen_bits(run: tuple[Path, str]) -> None:
    root, run_id = run
    plain = preview_list(root, run_id=run_id, config=QuantConfig().to_json(), exclude=[])
    assert plain["carriers"] == {"c": "r", "p": "r", "t": "r"}
    config = QuantConfig(overrides=wide("r")).to_json()
    told = preview_list(root, run_id=run_id, config=config, exclude=[])
    assert told["reason"] == ""
    assert told["retyped"] == [["r", "int16"], ["p", "int16"], ["t", "int16"]]
    assert (told["wide_macs_fraction"], told["float_macs_fraction"]) == (1.0, 0.0)
    assert sqnr(told)["y"] > sqnr(plain)["y"]
    new = Workspace(root).run(requantize(root, run_id=run_id, config=config, exclude=[]))
    confirmed = {o["name"]: read_number(o["sqnr_db"]) for o in new.summary["outputs"]}
    assert sqnr(told) == pytest.approx(confirmed, rel=1e-9)
    assert [effect["status"] for effect in new.effects] == ["int16 now"]
    assert "--override r=int16" in new.summary["commands"]["inspector"]
    assert "QInt16" in new.summary["commands"]["python"]
    # The 8-bit preview that was open before is as it was.
    again = preview_list(root, run_id=run_id, config=QuantConfig().to_json(), exclude=[])
    assert sqnr(again) == sqnr(plain)


@pytest.mark.slow
def test_an_outlier_is_offered_sixteen_bits_and_what_they_gain_is_what_comes(
    tmp_path: Path,
) -> None:
    root = tmp_path / "workspace"
    workspace = Workspace(root)
    feeds = [{"x": rng(at).standard_normal((1, 4, 6, 6)).astype("float32")} for at in range(3)]
    source = FeedSource(kind="path", path=str(npz_folder(tmp_path / "feeds", feeds)))
    path = save(outlier_model(), tmp_path / "model.onnx")
    first = load_pair(root, float_path=path, quantized_path=None, inputs=source)
    # Per channel, so that the weights follow their large row.
    config = {**workspace.run(first).recipe, "per_channel": True}
    run_id = requantize(root, run_id=first, config=config, exclude=[])
    found = {each["code"]: each for each in diagnose_run(root, run_id=run_id)}
    evidence, remedy = found["outlier"]["evidence"], found["outlier"]["remedy"]
    assert found["outlier"]["tensor"] == "wide"
    assert "in 16 bits" in remedy["say"]
    assert remedy["recipe"] == {"overrides": [{"tensor": "wide", "quant_type": "int16"}]}
    made = requantize(root, run_id=run_id, config={**config, **remedy["recipe"]}, exclude=[])
    [before], [after] = (workspace.run(each).summary["outputs"] for each in (run_id, made))
    assert read_number(evidence["recipe_before_db"]) == pytest.approx(before["sqnr_db"])
    assert read_number(evidence["recipe_after_db"]) == pytest.approx(after["sqnr_db"])
    assert evidence["recipe_gain_db"] > 15
    # What is at 16 bits already is not offered them again.
    assert "outlier" not in {each["code"] for each in diagnose_run(root, run_id=made)}


# -- the pages ---------------------------------------------------------------------------------


@pytest.fixture
def clean() -> Iterator[None]:
    yield
    session.close_workers()
    session._started.clear()
    st.cache_resource.clear()


@pytest.fixture
def shown(run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, clean: None) -> Workspace:
    """That workspace, which the app uses."""
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(run[0]))
    workspace = Workspace(run[0])
    workspace.set_current_pair(workspace.run(run[1]).pair_id)
    session._started.add(session.root())
    return workspace


def control(test: AppTest, key: str) -> Any:
    found = [each for each in test.segmented_control if str(each.key).startswith(key)]
    return found[0] if found else None


def kept(workspace: Workspace) -> list[dict[str, Any]]:
    """The overrides of the next run that were chosen, of whichever run."""
    by_run = workspace.draft(workspace.current_pair() or "").get("overrides", {})
    return next(iter(by_run.values()), [])


@pytest.mark.slow
def test_the_tensor_page_goes_to_sixteen_bits_to_float_and_back(shown: Workspace) -> None:
    run_id = last_run(shown)
    test = app("tensors", run=run_id, tensor="r")
    assert control(test, "tensors-precision").options == ["int8", "int16", "float"]
    assert control(test, "tensors-precision").value == "int8"
    control(test, "tensors-precision").set_value("int16").run()
    wait(test, lambda page: "1 tensor at int16 would give" in words(page))
    assert kept(shown) == [{"tensor": "r", "quant_type": "int16"}]
    assert control(test, "tensors-precision").value == "int16"
    assert "At 16 bits: `r`, `p` and 1 more" in words(test)
    control(test, "tensors-precision").set_value("float").run()
    wait(test, lambda page: "1 node in float would give" in words(page))
    assert kept(shown) == []
    assert shown.draft(shown.current_pair() or "")["nodes"] == ["relu"]
    control(test, "tensors-precision").set_value("int8").run()
    assert shown.draft(shown.current_pair() or "")["nodes"] == []
    assert "Preview" not in words(test)


@pytest.mark.slow
def test_a_choice_that_waits_for_its_preview_lets_other_runs_be_looked_at(
    shown: Workspace,
) -> None:
    test = app("tensors", run=last_run(shown), tensor="r")
    test.session_state["precision-wanted"] = ("another-run", ("r",), "int16")
    test.run()
    assert control(test, "tensors-precision").value == "int8"
    assert kept(shown) == []


@pytest.mark.slow
def test_a_tensor_that_is_handed_on_is_set_where_its_range_is_decided(shown: Workspace) -> None:
    test = app("tensors", run=last_run(shown), tensor="t")
    control(test, "tensors-precision").set_value("int16").run()
    wait(test, lambda page: "At 16 bits: `r`" in words(page))
    assert kept(shown) == [{"tensor": "r", "quant_type": "int16"}]
    assert control(test, "tensors-precision").value == "int16"


@pytest.mark.slow
def test_a_range_set_by_hand_stays_when_the_type_changes(shown: Workspace) -> None:
    view_run = last_run(shown)
    pair = shown.current_pair() or ""
    entry = {"tensor": "r", "low": 0.0, "high": 3.0}
    shown.save_draft(pair, {"overrides": {view_run: [entry]}})
    test = app("tensors", run=view_run, tensor="r")
    control(test, "tensors-precision").set_value("int16").run()
    wait(test, lambda page: kept(shown) == [{**entry, "quant_type": "int16"}])
    control(test, "tensors-precision").set_value("int8").run()
    wait(test, lambda page: kept(shown) == [entry])


@pytest.mark.slow
def test_the_graph_page_previews_sixteen_bits_and_the_exclusions_page_confirms_them(
    shown: Workspace,
) -> None:
    run_id = last_run(shown)
    test = app("graph", run=run_id, node="conv")
    wait(test, lambda page: control(page, "graph-precision") is not None)
    control(test, "graph-precision").set_value("int16").run()
    wait(test, lambda page: "Preview: 1 tensor at int16 would give" in words(page))
    # The Conv's Relu is folded: what it gives is the Relu's tensor.
    assert kept(shown) == [{"tensor": "r", "quant_type": "int16"}]
    test = app("exclusions", run=run_id)
    wait(test, lambda page: "Preview: 1 tensor at int16 would give" in words(page))
    text = words(test)
    assert "**1 tensor at int16** · not applied yet" in text
    assert "MACs in float 0.0 % 16 bits 100.0 %" in text
    frame = next(each.value for each in test.dataframe if "wide" in each.value)
    assert set(frame["node"][frame["wide"]]) == {"conv", "relu", "pool", "turn"}
    test.button(key="requantize").click().run()
    wait(test, lambda page: last_run(shown) != run_id)
    made = shown.run(last_run(shown))
    assert made.recipe["overrides"] == [{"tensor": "r", "quant_type": "int16"}]
    assert made.summary["preview"] is not None
    confirmed = {o["name"]: read_number(o["sqnr_db"]) for o in made.summary["outputs"]}
    assert sqnr_of(made.summary["preview"]) == pytest.approx(confirmed, rel=1e-9)
    test = app("exclusions", run=made.id)
    assert "not applied yet" not in words(test)
    assert "int16 now" in words(test)
    assert "1 tensor at int16: y 36" in words(test)
    baseline = session.baseline_of(made, tuple(shown.runs(made.pair_id)))
    assert baseline is not None
    assert baseline.id == run_id
    assert control(app("tensors", run=made.id, tensor="p"), "tensors-precision").value == "int16"


def sqnr_of(figures: dict[str, Any]) -> dict[str, float]:
    return {name: read_number(value) for name, value in figures.items()}


@pytest.mark.browser
@pytest.mark.slow
def test_a_click_in_the_browser_previews_sixteen_bits_and_re_quantizing_gives_that_figure(
    browser: Browser, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    load_sample(data, "digit-detector")
    workspace = Workspace(data)
    (pair,) = workspace.pairs()
    run_id = workspace.runs(pair.id)[-1].id
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    try:
        with running_app(data) as address:
            page = context.new_page()
            page.goto(f"{address}/graph?run={run_id}&node=/head/Concat_3")
            card = page.locator(".st-key-node-card")
            card.get_by_role("radio", name="int16").click(timeout=PATIENCE)
            told = page.get_by_text("1 tensor at int16 would give output0")
            expect(told.first).to_be_visible(timeout=PATIENCE)
            page.get_by_role("link", name="Confirm").click()
            expect(page.get_by_text("1 tensor at int16").first).to_be_visible(timeout=PATIENCE)
            page.get_by_role("button", name="Re-quantize").click(timeout=PATIENCE)
            expect(page.get_by_text("run 2").first).to_be_visible(timeout=PATIENCE)
    finally:
        context.close()
    before, made = workspace.runs(pair.id)[-2:]
    assert (before.recipe.get("overrides"), before.exclusions) == (None, ())
    assert made.recipe["overrides"] == [{"tensor": "output0", "quant_type": "int16"}]
    [was], [now] = (
        read_comparison(workspace.comparison(each.id)).outputs for each in (before, made)
    )  # fmt: skip
    # The scores are back, as the sentence said.
    assert judged_db(was) < 1
    assert judged_db(now) > 20
    assert made.summary["preview"]["output0"] == pytest.approx(now.sqnr_db)
