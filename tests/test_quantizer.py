"""The in-memory quantizer: ONNX Runtime's bytes without its scans, and its decisions without edits.

The oracle of every file is `quantize_static` itself on the same prepared file and ranges; that of a
plan are the scales, zero points and integers which that file holds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

import inspector.quantize as quantize_module
import inspector.quantizer as quantizer_module
from inspector.calibration import METHODS, calibrate, copy_model, hushed
from inspector.errors import QuantizationError
from inspector.feeds import load_feeds, random_feeds
from inspector.indexed_model import IndexedModel
from inspector.model import Model
from inspector.model_files import load_model
from inspector.prepare import OLDEST_OPSET, prepare
from inspector.quantize import extra_options, open_quantizer, quantize_model
from inspector.quantizer import Plan, Quantizer, UnplannableError, broken_contract
from inspector.recipe import QuantConfig
from tests.samples import MODELS, array, conv_relu_gemm, floats, model, needs_models, save

QUICK = ("mlperf-resnet8", "mlperf-kws-dscnn", "magika", "silero-vad-16k")
LONG = ("fastestdet", "gtcrn", "squeezenet-fp16", "ultraface-rfb320", "minilm-l6")
GRID = (
    QuantConfig(),
    QuantConfig(per_channel=True, activation_type="uint8"),
    QuantConfig(activation_type="int8", activation_symmetric=True),
    QuantConfig(weight_type="uint8", activation_type="uint8", reduce_range=True),
    QuantConfig(weight_symmetric=False, activation_type="uint8"),
    QuantConfig(method="percentile", percentile=99.9),
    QuantConfig(method="entropy", reduce_range=True),
    QuantConfig(activation_type="uint16", weight_type="int8"),
    QuantConfig(weight_type="int4", activation_type="uint8"),
    QuantConfig(op_types=("Conv", "MatMul")),
    QuantConfig(preprocess=False),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def opened(path: Path, config: QuantConfig, cache: Path, inputs: Path | None = None) -> Any:
    """A quantizer, the prepared model and the file of the ranges."""
    float_model = load_model(path)
    feeds = (
        random_feeds(float_model, samples=2, seed=3)
        if inputs is None
        else load_feeds(inputs, float_model, limit=2)
    )
    prepared = prepare(float_model, config, cache)
    observed = calibrate(
        prepared.model, feeds, method=config.method, percentile=config.percentile,
        op_types=config.op_types, cache=cache,
    )  # fmt: skip
    quantizer = open_quantizer(prepared, config, observed.path)
    assert quantizer is not None
    return quantizer, prepared.model, observed.path


def public(config: QuantConfig, prepared: Path, ranges: Path, exclude: list[str], to: Path) -> Path:
    """What the public function writes."""
    types = {t: QuantType.from_string(f"Q{t.replace('u', 'U').replace('int', 'Int')}")
             for t in (config.weight_type, config.activation_type)}  # fmt: skip
    to.mkdir(exist_ok=True)
    with hushed():
        quantize_static(
            copy_model(prepared, to),
            to / "quantized.onnx",
            None,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(config.op_types),
            per_channel=config.per_channel,
            reduce_range=config.reduce_range,
            activation_type=types[config.activation_type],
            weight_type=types[config.weight_type],
            nodes_to_exclude=exclude,
            calibrate_method=METHODS[config.method],
            calibration_cache_path=ranges,
            extra_options=extra_options(config),
        )
    return to / "quantized.onnx"


def lists(names: list[str], count: int, seed: int = 0) -> Iterator[list[str]]:
    yield []
    chosen = random.Random(seed)
    for _ in range(count):
        yield chosen.sample(names, chosen.randint(1, max(1, min(30, len(names) // 2))))


def check_grid(
    name: str, cache: Path, tmp_path: Path, configs: tuple[QuantConfig, ...], count: int = 2
) -> int:
    """How many files were the same; a recipe that ONNX Runtime refuses is refused by both."""
    checked = 0
    for config in configs:
        folder = MODELS / name
        if not config.preprocess and load_model(folder / "model.onnx").opset < OLDEST_OPSET:
            continue  # is refused before anything is quantized
        quantizer, prepared, ranges = opened(
            folder / "model.onnx", config, cache, folder / "inputs"
        )
        assert prepared.path is not None
        for exclude in lists([n.name for n in prepared.nodes], count):
            try:
                wanted = public(config, prepared.path, ranges, exclude, tmp_path).read_bytes()
            except ValueError:
                with pytest.raises(ValueError), hushed():  # noqa: PT011 (its own words)
                    quantizer.quantize(exclude)
                continue
            with hushed():
                assert quantizer.quantize(exclude).SerializeToString() == wanted, (name, config)
            checked += 1
    return checked


def check_plan(plan: Plan, file: onnx.ModelProto, prepared: Model) -> None:
    """The plan's grids are those that a file holds, no more and no less.

    Some float files store weights as integers: those are neither planned nor changed.
    """
    values = {i.name: numpy_helper.to_array(i) for i in file.graph.initializer}
    makers = {o: n for n in file.graph.node for o in n.output}
    activations, constants = {}, {}
    for node in file.graph.node:
        if node.op_type != "DequantizeLinear" or node.name in prepared.node_by_name:
            continue
        grid = (values[node.input[1]].tobytes(), values[node.input[2]].tobytes())
        if node.input[0] in makers:
            activations[makers[node.input[0]].name.removesuffix("_QuantizeLinear")] = grid
        else:
            constants[node.name.removesuffix("_DequantizeLinear")] = grid
    found = {n: (g.scale.tobytes(), g.zero_point.tobytes()) for n, g in plan.activations.items()}
    assert found == activations
    weights = {n: (g.scale.tobytes(), g.zero_point.tobytes()) for n, g in plan.weights.items()}
    assert {n: g for n, g in constants.items() if n in weights} == weights
    biases = sorted((g.scale.tobytes(), g.zero_point.tobytes()) for g in plan.biases.values())
    assert sorted(g for n, g in constants.items() if n not in weights) == biases


@needs_models
@pytest.mark.parametrize("name", QUICK)
def test_the_bytes_are_those_of_quantize_static(name: str, cache: Path, tmp_path: Path) -> None:
    configs = GRID if name == "mlperf-resnet8" else GRID[:4]
    assert check_grid(name, cache, tmp_path, configs) > len(configs)


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, *LONG])
def test_the_bytes_are_those_of_quantize_static_over_the_whole_grid(
    name: str, cache: Path, tmp_path: Path
) -> None:
    # The largest takes as long as all others together.
    configs = GRID[:3] if name == "minilm-l6" else GRID
    count = 1 if name in LONG else 2
    assert check_grid(name, cache, tmp_path, configs, count) >= len(configs)


@needs_models
@pytest.mark.parametrize("name", [*QUICK, "fastestdet", "gtcrn"])
@pytest.mark.parametrize("config", GRID[:3], ids=("int8", "per channel", "symmetric"))
def test_a_plan_holds_the_grids_of_the_file(name: str, config: QuantConfig, cache: Path) -> None:
    folder = MODELS / name
    quantizer, prepared, _ = opened(folder / "model.onnx", config, cache, folder / "inputs")
    planned = 0
    for exclude in lists([n.name for n in prepared.nodes], 6, seed=1):
        with hushed():
            try:
                file = quantizer.quantize(exclude)
            except ValueError:
                with pytest.raises(ValueError):  # noqa: PT011 (its own words)
                    quantizer.plan(exclude)
                continue
            check_plan(quantizer.plan(exclude), file, prepared)
        planned += 1
    # Its grouped transposed convolutions have more biases than scales.
    refused = name == "gtcrn" and config.per_channel
    assert planned == 0 if refused else planned > 1


def test_a_list_leaves_nothing_behind_for_the_next_one(tmp_path: Path, cache: Path) -> None:
    path = save(conv_relu_gemm(), tmp_path / "model.onnx")
    quantizer, prepared, _ = opened(path, QuantConfig(per_channel=True), cache)
    first = quantizer.quantize().SerializeToString()
    for node in prepared.nodes:
        quantizer.quantize([node.name])
        quantizer.plan([node.name])
    assert quantizer.quantize().SerializeToString() == first


def two_readers_of_one_bias() -> onnx.ModelProto:
    """Two convolutions that share their bias: the quantizer gives each its own copy."""
    return model(
        [
            helper.make_node("Conv", ["x", "w1", "b"], ["y"], "first", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["y"], ["z"], "relu"),
            helper.make_node("Conv", ["z", "w2", "b"], ["out"], "second", pads=[1, 1, 1, 1]),
        ],
        [("x", [1, 4, 8, 8])],
        [("out", [1, 4, 8, 8])],
        [
            # The step of the first bias is far above that of the second.
            array("w1", floats((4, 4, 3, 3), 1, gain=1e3)),
            array("w2", floats((4, 4, 3, 3), 2, gain=1e-4)),
            array("b", floats((4,), 3)),
        ],
    )


@pytest.mark.parametrize("exclude", [[], ["first"], ["second"], ["relu"], ["first", "second"]])
def test_a_shared_bias_is_planned_for_each_of_its_readers(
    exclude: list[str], tmp_path: Path, cache: Path
) -> None:
    path = save(two_readers_of_one_bias(), tmp_path / "model.onnx")
    config = QuantConfig()
    quantizer, prepared, ranges = opened(path, config, cache)
    file = quantizer.quantize(exclude)
    wanted = public(config, prepared.path, ranges, exclude, tmp_path / "out")
    assert file.SerializeToString() == wanted.read_bytes()
    plan = quantizer.plan(exclude)
    check_plan(plan, file, prepared)
    assert {node for node, _ in plan.biases} == {"first", "second"} - set(exclude)


def test_a_bias_that_forces_its_weight_scale_wider_is_planned_so(
    tmp_path: Path, cache: Path
) -> None:
    proto = two_readers_of_one_bias()
    for initializer in proto.graph.initializer:
        if initializer.name == "b":
            initializer.CopyFrom(array("b", np.full(4, 1e7, np.float32)))
        if initializer.name == "w1":
            initializer.CopyFrom(array("w1", floats((4, 4, 3, 3), 1) * np.float32(1e-6)))
    # It reads the same weight without a bias.
    proto.graph.node.append(helper.make_node("Conv", ["x", "w1"], ["more"], "third"))
    proto.graph.output.append(helper.make_tensor_value_info("more", 1, [1, 4, 6, 6]))
    path = save(proto, tmp_path / "model.onnx")
    for config in (QuantConfig(), QuantConfig(per_channel=True)):
        quantizer, prepared, ranges = opened(path, config, cache)
        for exclude in ([], ["first"], ["second"], ["first", "second"], []):
            file = quantizer.quantize(exclude)
            wanted = public(config, prepared.path, ranges, exclude, tmp_path / "out")
            assert file.SerializeToString() == wanted.read_bytes()
            check_plan(quantizer.plan(exclude), file, prepared)
        narrow, wide = (np.max(quantizer.plan(e).weights["w1"].scale) for e in (["first"], []))
        assert wide > 2 * narrow


def test_nothing_of_onnxruntime_is_patched(tmp_path: Path, cache: Path) -> None:
    from onnxruntime.quantization import qdq_quantizer, quant_utils

    before = {name: vars(QDQQuantizer)[name] for name in vars(QDQQuantizer)}
    path = save(conv_relu_gemm(), tmp_path / "model.onnx")
    quantizer, _, _ = opened(path, QuantConfig(), cache)
    quantizer.quantize()
    quantizer.plan()
    assert {name: vars(QDQQuantizer)[name] for name in vars(QDQQuantizer)} == before
    assert qdq_quantizer.find_by_name is quant_utils.find_by_name


# -- the contract ------------------------------------------------------------------------------


def test_the_installed_onnxruntime_keeps_the_contract() -> None:
    assert broken_contract() == ()


def test_another_version_takes_the_public_route_and_gives_the_same_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    float_model = load_model(save(conv_relu_gemm(), tmp_path / "model.onnx"))
    feeds = random_feeds(float_model, samples=2, seed=0)

    def made(name: str) -> bytes:
        quantize_module._quantizers.clear()
        out = tmp_path / name
        quantize_model(float_model, QuantConfig(), calibration=feeds, output=out, cache=cache)
        return out.read_bytes()

    in_memory = made("memory.onnx")
    assert quantize_module._quantizers
    monkeypatch.setattr(quantizer_module, "TESTED", "9.99")
    broken_contract.cache_clear()
    try:
        assert "9.99" in broken_contract()[0]
        through_the_public_function = made("public.onnx")
        assert not quantize_module._quantizers
    finally:
        broken_contract.cache_clear()
    assert through_the_public_function == in_memory


def test_a_missing_name_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(QDQQuantizer, "remove_nodes")
    broken_contract.cache_clear()
    try:
        assert broken_contract() == ("QDQQuantizer has no remove_nodes",)
    finally:
        broken_contract.cache_clear()


def test_only_qdq_has_an_in_memory_route(tmp_path: Path) -> None:
    with pytest.raises(UnplannableError, match="qoperator"):
        Quantizer(tmp_path, QuantConfig(format="qoperator"), tmp_path, options={})


def test_what_the_indexed_model_does_not_know_fails_and_is_not_read_from_a_stale_graph(
    tmp_path: Path, cache: Path
) -> None:
    quantizer, _, _ = opened(save(conv_relu_gemm(), tmp_path / "m.onnx"), QuantConfig(), cache)
    model = IndexedModel(quantizer.source)
    assert not hasattr(model, "find_nodes_by_initializer")
    assert not model.model.graph.node


def test_the_public_function_says_why_it_refuses(tmp_path: Path, cache: Path) -> None:
    """What the in-memory route stumbles over is told in the public function's words."""
    proto = model(
        [helper.make_node("ConvTranspose", ["x", "w", "b"], ["out"], "up", group=2)],
        [("x", [1, 4, 8, 8])],
        [("out", [1, 8, 10, 10])],
        [array("w", floats((4, 4, 3, 3), 1)), array("b", floats((8,), 3))],
    )
    float_model = load_model(save(proto, tmp_path / "model.onnx"))
    feeds = random_feeds(float_model, samples=1, seed=0)
    with pytest.raises(QuantizationError, match="broadcast"):
        quantize_model(
            float_model, QuantConfig(per_channel=True), calibration=feeds,
            output=tmp_path / "out.onnx", cache=cache,
        )  # fmt: skip
