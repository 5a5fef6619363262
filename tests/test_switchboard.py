"""The switchboard: one session that computes what any exclusion list's own file computes.

The oracle is the file itself, quantized with the list (to the byte what `quantize_static` writes,
see test_quantizer) and run by a session of its own with optimisations off.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from inspector.calibration import calibrate, hushed
from inspector.feeds import Feeds, load_feeds, random_feeds
from inspector.model import Model
from inspector.model_files import load_model
from inspector.prepare import prepare
from inspector.quantize import open_quantizer, quantize_model
from inspector.quantizer import Quantizer, UnplannableError
from inspector.recipe import QuantConfig
from inspector.runtime import open_session
from inspector.switchboard import Switchboard
from tests.samples import MODELS, array, conv_relu_gemm, floats, model, needs_models, save
from tests.test_quantizer import two_readers_of_one_bias


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def opened(
    path: Path, config: QuantConfig, cache: Path, inputs: Path | None = None
) -> tuple[Quantizer, Model, Feeds]:
    float_model = load_model(path)
    feeds = (
        random_feeds(float_model, samples=2, seed=3)
        if inputs is None
        else load_feeds(inputs, float_model, limit=2)
    )
    prepared = prepare(float_model, config, cache)
    ranges = calibrate(prepared.model, feeds, method=config.method, cache=cache)
    quantizer = open_quantizer(prepared, config, ranges.path)
    assert quantizer is not None
    return quantizer, prepared.model, feeds


def really(quantizer: Quantizer, exclude: Sequence[str], feed: Any) -> dict[str, Any]:
    return open_session(quantizer.quantize(exclude), optimized=False).run(feed)


def check(quantizer: Quantizer, prepared: Model, feeds: Feeds, count: int, seed: int = 0) -> int:
    """How many of so many random lists gave the very bits of their own file."""
    names = [n.name for n in prepared.nodes if n.op_type != "Constant"]
    chosen = random.Random(seed)
    same = 0
    with hushed():
        board = Switchboard(quantizer)
        for at in range(count):
            exclude = chosen.sample(names, chosen.randint(1, max(1, min(30, len(names) // 2))))
            feed = feeds[at % len(feeds)]
            try:
                wanted = really(quantizer, exclude, feed)
            except ValueError:
                with pytest.raises(ValueError):  # noqa: PT011 (ONNX Runtime's own words)
                    board.plan_of(exclude)
                continue
            found = board.run(board.plan_of(exclude), feed)
            for output, value in wanted.items():
                scale = np.linalg.norm(value.astype(np.float64).ravel())
                apart = np.linalg.norm((found[output].astype(np.float64) - value).ravel())
                assert apart <= 1e-6 * scale or (np.isnan(value) == np.isnan(found[output])).all()
            same += all(np.array_equal(found[o], v, equal_nan=True) for o, v in wanted.items())
    return same


@needs_models
@pytest.mark.parametrize(
    "name", ["mlperf-resnet8", "mlperf-kws-dscnn", "magika", "silero-vad-16k", "fastestdet"]
)
def test_a_list_gives_the_bits_of_its_own_file(name: str, cache: Path) -> None:
    folder = MODELS / name
    parts = opened(folder / "model.onnx", QuantConfig(), cache, folder / "inputs")
    assert check(*parts, count=8) == 8


@needs_models
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("mlperf-resnet8", "mlperf-kws-dscnn", "magika", "silero-vad-16k", "fastestdet"),
        *("gtcrn", "squeezenet-fp16", "ultraface-rfb320", "minilm-l6"),
    ],
)
def test_random_lists_give_the_bits_of_their_own_files(name: str, cache: Path) -> None:
    folder = MODELS / name
    parts = opened(folder / "model.onnx", QuantConfig(), cache, folder / "inputs")
    # A hundred of each gave the same, once; thirty of minilm-l6.
    count = 8 if name == "minilm-l6" else 25
    assert check(*parts, count=count) == count


@needs_models
@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(per_channel=True),
        QuantConfig(activation_type="int8", activation_symmetric=True),
        QuantConfig(activation_type="uint16"),
        QuantConfig(weight_type="uint8", activation_type="uint8", reduce_range=True),
    ],
    ids=("per channel", "symmetric", "uint16", "reduced uint8"),
)
def test_every_recipe_has_its_switchboard(config: QuantConfig, cache: Path) -> None:
    folder = MODELS / "mlperf-resnet8"
    parts = opened(folder / "model.onnx", config, cache, folder / "inputs")
    assert check(*parts, count=8) == 8


def test_a_shared_bias_follows_the_node_that_still_quantizes_it(
    tmp_path: Path, cache: Path
) -> None:
    path = save(two_readers_of_one_bias(), tmp_path / "model.onnx")
    quantizer, _, feeds = opened(path, QuantConfig(), cache)
    board = Switchboard(quantizer)
    outputs = []
    for exclude in ([], ["first"], ["second"], ["relu"], ["first", "second"], []):
        found = board.run(board.plan_of(exclude), feeds[0])["out"]
        assert np.array_equal(found, really(quantizer, exclude, feeds[0])["out"])
        outputs.append(found.tobytes())
    assert outputs[0] == outputs[-1]
    assert len(set(outputs)) == 5


def relu_that_a_body_reads_behind() -> onnx.ModelProto:
    """ONNX Runtime folds this Relu, and the branch of the If then reads what is before it."""
    body = helper.make_graph(
        [helper.make_node("Neg", ["z"], ["negative"])],
        "yes",
        [],
        [helper.make_tensor_value_info("negative", onnx.TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["z"], ["same"])],
        "no",
        [],
        [helper.make_tensor_value_info("same", onnx.TensorProto.FLOAT, None)],
    )
    branch = helper.make_node(
        "If", ["switch"], ["chosen"], "branch", then_branch=body, else_branch=other
    )
    return model(
        [
            helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["y"], ["z"], "relu"),
            helper.make_node("ReduceMax", ["z"], ["top"], "top", keepdims=0),
            helper.make_node("Greater", ["top", "limit"], ["switch"], "greater"),
            branch,
            helper.make_node("Conv", ["z", "w"], ["out"], "last", pads=[1, 1, 1, 1]),
        ],
        [("x", [1, 4, 8, 8])],
        [("out", [1, 4, 8, 8]), ("chosen", [1, 4, 8, 8])],
        [array("w", floats((4, 4, 3, 3), 1)), array("limit", np.float32(0.5))],
    )


def test_a_body_reads_what_folding_leaves_it(tmp_path: Path, cache: Path) -> None:
    path = save(relu_that_a_body_reads_behind(), tmp_path / "model.onnx")
    config = QuantConfig(preprocess=False)
    quantizer, _, feeds = opened(path, config, cache)
    board = Switchboard(quantizer)
    for exclude in ([], ["relu"], ["conv"], ["conv", "relu"], ["last"]):
        found = board.run(board.plan_of(exclude), feeds[0])
        wanted = really(quantizer, exclude, feeds[0])
        assert all(np.array_equal(found[o], wanted[o]) for o in wanted)
        # What is negated is never above zero, unless nobody rectified it.
        assert (found["chosen"].max() > 0) == ("relu" in board.plan_of(exclude).folded)


def test_a_rectifier_lost_to_a_body_is_told(tmp_path: Path, cache: Path) -> None:
    float_model = load_model(save(relu_that_a_body_reads_behind(), tmp_path / "model.onnx"))
    feeds = random_feeds(float_model, samples=1, seed=0)
    config = QuantConfig(preprocess=False)

    def notes(*exclude: str) -> list[str]:
        made = quantize_model(
            float_model, config, calibration=feeds, exclude=exclude,
            output=tmp_path / "out.onnx", cache=cache,
        )  # fmt: skip
        return [note for note in made.notes if "values before it" in note]

    assert len(notes()) == 1
    assert "relu was folded" in notes()[0]
    assert notes("relu") == []


def test_a_range_is_an_input_as_well(tmp_path: Path, cache: Path) -> None:
    from onnxruntime.quantization import QuantType

    from inspector.quantize import extra_options

    path = save(conv_relu_gemm(), tmp_path / "model.onnx")
    config = QuantConfig(activation_type="uint8")
    quantizer, prepared, feeds = opened(path, config, cache)
    board = Switchboard(quantizer)
    tensor = prepared.nodes[1].outputs[0]
    entry = {"rmin": np.float32(0.0), "rmax": np.float32(0.25)}
    plan = board.plan_of((), {tensor: entry})
    assert plan.activations[tensor].scale == pytest.approx(0.25 / 255)
    assert prepared.path is not None
    ranges = calibrate(prepared, feeds, cache=cache).path
    options = {**extra_options(config), "TensorQuantOverrides": {tensor: [entry]}}
    with_entry = Quantizer(prepared.path, config, ranges, options=options)
    wanted = really(with_entry, (), feeds[0])
    found = board.run(plan, feeds[0])
    assert all(np.array_equal(found[o], wanted[o]) for o in wanted)
    plain = board.run(board.plan_of(()), feeds[0])
    assert not all(np.array_equal(found[o], plain[o]) for o in wanted)
    with pytest.raises(UnplannableError, match="int16"):
        board.plan_of((), {tensor: {"quant_type": QuantType.QInt16}})


def test_a_toggle_opens_no_session(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(conv_relu_gemm(), tmp_path / "model.onnx")
    quantizer, prepared, feeds = opened(path, QuantConfig(), cache)
    board = Switchboard(quantizer)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a session was opened")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    for node in prepared.nodes:
        board.run(board.plan_of([node.name]), feeds[0])


def test_what_was_given_out_stays_as_it_is(tmp_path: Path, cache: Path) -> None:
    path = save(conv_relu_gemm(), tmp_path / "model.onnx")
    quantizer, prepared, feeds = opened(path, QuantConfig(), cache)
    board = Switchboard(quantizer)
    first = board.run(board.whole, feeds[0])
    kept = {name: value.copy() for name, value in first.items()}
    for node in prepared.nodes:
        board.run(board.plan_of([node.name]), feeds[1])
    assert all(np.array_equal(first[name], kept[name]) for name in kept)
