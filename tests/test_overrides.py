"""Grids set by hand in a recipe against the files they give."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader

from inspector.calibration import calibrate
from inspector.cli import cli
from inspector.commands import inspector_command, onnxruntime_call, onnxruntime_command
from inspector.errors import QuantizationError
from inspector.feeds import load_feeds, random_feeds
from inspector.grid_schemes import SCHEMES
from inspector.lab import Trial, trial
from inspector.model import Model
from inspector.model_files import load_model
from inspector.prepare import prepare
from inspector.quantize import _run_quantizer, extra_options, quantize_model
from inspector.recipe import (
    QuantConfig,
    TensorOverride,
    check_overrides,
    config_options,
    parse_override,
)
from tests.samples import MODELS, array, conv_relu_gemm, needs_models, npz_folder, save
from tests.samples import model as sample
from tests.test_lab import values


def small_model(folder: Path) -> Model:
    return load_model(save(conv_relu_gemm(), folder / "m.onnx"))


def quantized(model: Model, config: QuantConfig, folder: Path) -> tuple[Model, tuple[str, ...]]:
    made = quantize_model(
        model,
        config,
        calibration=random_feeds(model, samples=3, seed=0) if config.static else None,
        output=folder / "out.onnx",
        cache=folder / "cache",
    )
    return load_model(made.path), made.notes


def scalar(model: Model, name: str) -> float:
    found = model.constant(name)
    assert found is not None
    return float(np.asarray(found, np.float64).reshape(()))


def test_a_range_that_is_given_is_the_one_in_the_file(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    config = QuantConfig(
        overrides=(
            TensorOverride(tensor="r", low=-0.0, high=0.75),
            TensorOverride(tensor="w", low=-0.5, high=0.25),
            TensorOverride(tensor="x", low=-1.5, high=2.25, symmetric=True),
        )
    )
    made, notes = quantized(model, config, tmp_path)
    for tensor, scheme, low, high in (
        ("r", "ort-int8", 0.0, 0.75),
        ("w", "ort-int8-symmetric", -0.5, 0.25),
        ("x", "ort-int8-symmetric", -1.5, 2.25),
    ):
        scale, zero = SCHEMES[scheme].parameters(low, high)
        assert scalar(made, f"{tensor}_scale") == np.float32(scale)
        assert scalar(made, f"{tensor}_zero_point") == zero
    assert not [note for note in notes if "override" in note]


def test_scale_and_zero_point_that_are_given_are_those_in_the_file(tmp_path: Path) -> None:
    # Any grid of the lab that ONNX can hold: here Ristretto's, and 16 bits for one tensor.
    model = small_model(tmp_path)
    found = trial(values("normal", 100), SCHEMES["ristretto-activations"], -2.7, 2.7)
    config = QuantConfig(
        overrides=(
            TensorOverride(
                tensor="x", quant_type=found.quant_type, scale=found.scale,
                zero_point=int(found.zero_point),
            ),
            TensorOverride(tensor="gw", quant_type="uint8", scale=0.03, zero_point=131),
        )
    )  # fmt: skip
    made, notes = quantized(model, config, tmp_path)
    assert scalar(made, "x_scale") == found.scale == 2.0**-6
    assert scalar(made, "gw_scale") == np.float32(0.03)
    assert scalar(made, "gw_zero_point") == 131
    assert not [note for note in notes if "override" in note]
    wide = QuantConfig(overrides=(TensorOverride(tensor="x", quant_type="uint16"),))
    made, _ = quantized(model, wide, tmp_path)
    zero_point = made.constant("x_zero_point")
    assert zero_point is not None
    assert zero_point.dtype == np.uint16


def test_the_bytes_are_those_of_the_public_function_with_overrides(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    config = QuantConfig(
        overrides=(
            TensorOverride(tensor="x", low=-1.0, high=1.5),
            TensorOverride(tensor="w", symmetric=False),
        )
    )
    made, _ = quantized(model, config, tmp_path)
    again, _ = quantized(model, config, tmp_path)
    prepared = prepare(model, config, tmp_path / "cache")
    feeds, cache = random_feeds(model, samples=3, seed=0), tmp_path / "cache"
    observed = calibrate(prepared.model, feeds, method="minmax", cache=cache)
    assert prepared.model.path is not None
    source = tmp_path / "source.onnx"
    source.write_bytes(prepared.model.path.read_bytes())
    _run_quantizer(config, source, tmp_path / "public.onnx", (), (), observed.path)
    assert made.path is not None
    assert made.path.read_bytes() == (tmp_path / "public.onnx").read_bytes()
    assert made.sha256 == again.sha256


def test_one_end_that_is_given_leaves_the_other_to_the_feeds(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    plain, _ = quantized(model, QuantConfig(), tmp_path)
    config = QuantConfig(overrides=(TensorOverride(tensor="x", high=9.0),))
    made, _ = quantized(model, config, tmp_path)
    scale, zero = scalar(plain, "x_scale"), scalar(plain, "x_zero_point")
    low = (-128 - zero) * scale
    assert scalar(made, "x_scale") == pytest.approx((9.0 - low) / 255, rel=0.01)


def test_an_override_without_effect_is_said_and_what_to_name_instead(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    config = QuantConfig(overrides=(TensorOverride(tensor="c", low=-1, high=1),))
    _, notes = quantized(model, config, tmp_path)
    assert (
        "without effect: the override of 'c' (its Relu is folded: override 'r'), because the "
        "tensor stays in float or has no scale of its own"
    ) in notes


@pytest.mark.parametrize(
    ("override", "options", "message"),
    [
        (
            {"tensor": "R", "low": 0, "high": 1},
            {},
            "there is no tensor 'R' to override in the model",
        ),
        ({"tensor": "r", "quant_type": "int4"}, {}, "'r' to override is computed, which int4 is"),
        (
            {"tensor": "gw", "quant_type": "int16"},
            {"format": "qoperator"},
            "format qoperator takes 8-bit types only",
        ),
        (
            {"tensor": "r", "low": 0, "high": 1},
            {"format": "dynamic"},
            "format dynamic finds the ranges",
        ),
    ],
)
def test_an_override_that_cannot_be_is_refused_kindly(
    override: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = small_model(tmp_path)
    # ONNX Runtime itself looks at the first one only.
    good = TensorOverride(tensor="w", low=-1, high=1)
    config = QuantConfig(overrides=(good, TensorOverride(**override)), **options)
    with pytest.raises(QuantizationError, match=message) as caught:
        quantized(model, config, tmp_path)
    assert caught.value.hint
    if override["tensor"] == "R":
        assert "nearest names are 'r'" in caught.value.message


def test_a_tensor_of_whole_numbers_has_no_range_to_override(tmp_path: Path) -> None:
    reshape = helper.make_node("Reshape", ["x", "shape"], ["y"], "reshape")
    proto = sample([reshape], [("x", [2, 3])], [("y", [3, 2])], [array("shape", [3, 2])])
    model = load_model(save(proto, tmp_path / "m.onnx"))
    config = QuantConfig(overrides=(TensorOverride(tensor="shape", low=0, high=1),))
    with pytest.raises(QuantizationError, match="'shape' to override is int64, expected float32"):
        check_overrides(model, config)


@pytest.mark.parametrize(
    ("given_values", "message"),
    [
        ({"tensor": "", "low": 0.0}, "expected a name"),
        ({"tensor": "t"}, "changes nothing"),
        ({"tensor": "t", "low": 2.0, "high": 1.0}, "low 2 above high 1"),
        ({"tensor": "t", "low": math.nan}, "expected a finite float32 number"),
        ({"tensor": "t", "high": 1e39}, "expected a finite float32 number"),
        ({"tensor": "t", "high": True}, "expected a finite float32 number"),
        ({"tensor": "t", "scale": 0.1}, "one of scale and zero_point"),
        ({"tensor": "t", "zero_point": 1}, "one of scale and zero_point"),
        ({"tensor": "t", "scale": 0.1, "zero_point": 0}, "no quant_type"),
        ({"tensor": "t", "scale": 0.0, "zero_point": 0, "quant_type": "int8"}, "above 0"),
        ({"tensor": "t", "scale": 1e-60, "zero_point": 0, "quant_type": "int8"}, "above 0"),
        (
            {"tensor": "t", "scale": 0.1, "zero_point": 128, "quant_type": "int8"},
            "expected -128 to 127",
        ),
        ({"tensor": "t", "scale": 0.1, "zero_point": 1.5, "quant_type": "int8"}, "zero_point 1.5"),
        (
            {"tensor": "t", "scale": 1.0, "zero_point": 0, "quant_type": "int8", "low": 0.0},
            "say nothing more",
        ),
        ({"tensor": "t", "low": 0.0, "quant_type": "int9"}, "type 'int9'"),
        ({"tensor": "t", "symmetric": "yes"}, "expected true or false"),
    ],
)
def test_values_of_an_override_that_do_not_go_together_are_refused(
    given_values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TensorOverride(**given_values)
    with pytest.raises(QuantizationError, match=re.escape(message)):
        QuantConfig.from_json({"overrides": [given_values]})


def test_overrides_of_a_recipe_are_records_each_of_its_own_tensor() -> None:
    one = TensorOverride(tensor="t", low=0.0)
    with pytest.raises(ValueError, match="name 't' 2 times"):
        QuantConfig(overrides=(one, one))
    for wrong in ("t=0:1", [one], ({"tensor": "t", "low": 0},)):
        with pytest.raises(ValueError, match="expected overrides of tensors"):
            QuantConfig(overrides=wrong)  # type: ignore[arg-type]
    for wrong, message in (([3], "expected a JSON object"), ([{"low": 0}], "no tensor"),
                           ([{"tensor": "t", "rmin": 0}], "'rmin'")):  # fmt: skip
        with pytest.raises(QuantizationError, match=message):
            QuantConfig.from_json({"overrides": wrong})
    assert "overrides" not in QuantConfig().to_json()


reals = st.floats(-(2.0**99), 2.0**99, width=32)


@st.composite
def overrides(draw: st.DrawFn) -> TensorOverride:
    tensor = draw(st.text(min_size=1, max_size=30))
    if draw(st.booleans()):
        kind = draw(st.sampled_from(["int8", "uint8", "int16", "uint4"]))
        scale = draw(st.floats(2.0**-99, 2.0**99, width=32))
        return TensorOverride(tensor=tensor, quant_type=kind, scale=scale, zero_point=3)
    ends = sorted([draw(reals), draw(reals)])
    low, high = draw(st.sampled_from([(ends[0], ends[1]), (ends[0], None), (None, ends[1])]))
    return TensorOverride(
        tensor=tensor, low=low, high=high, quant_type=draw(st.sampled_from(["", "uint8"])),
        symmetric=draw(st.sampled_from([None, True, False])),
    )  # fmt: skip


@given(overrides())
def test_an_override_survives_its_text_and_its_json(override: TensorOverride) -> None:
    assert parse_override(override.to_text()) == override
    config = QuantConfig(overrides=(override,))
    assert QuantConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config_options(config) == ["--override", override.to_text()]


@pytest.mark.parametrize("text", ["", "t", "t=", "t=1", "t=a:b", "t=0.1@x,int8", "t=1:2:3", "=1:2"])
def test_an_override_in_another_form_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(QuantizationError) as caught:
        parse_override(text)
    assert "TENSOR=LOW:HIGH" in caught.value.hint


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Any) -> None:
        self.feeds = iter(feeds)

    def get_next(self) -> Any:
        return next(self.feeds, None)


def test_the_call_to_copy_makes_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(tmp_path)
    config = QuantConfig(
        overrides=(
            TensorOverride(tensor="x", quant_type="uint8", scale=0.1, zero_point=100),
            TensorOverride(tensor="r", low=0.0, high=1.1),
            TensorOverride(tensor="gw", quant_type="int4", scale=0.3, zero_point=-1),
        ),
        activation_type="uint8",
    )
    made, _ = quantized(model, config, tmp_path)
    prepared = prepare(model, config, tmp_path / "cache")
    text = onnxruntime_call(config, prepared=prepared, model="m.onnx", output="copied.onnx")
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(text, {"calibration_data_reader": Reader(random_feeds(model, samples=3, seed=0))})
    assert made.path is not None
    assert (tmp_path / "copied.onnx").read_bytes() == made.path.read_bytes()
    assert "no option for TensorQuantOverrides" in onnxruntime_command(config)
    assert "--override r=0.0:1.1" in inspector_command(config)
    entry = extra_options(config)["TensorQuantOverrides"]["r"][0]
    assert entry["rmax"].dtype == np.float32  # a bare number makes ONNX Runtime raise


def test_the_command_line_takes_overrides(tmp_path: Path) -> None:
    save(conv_relu_gemm(), tmp_path / "m.onnx")
    feeds = npz_folder(tmp_path / "in", [{"x": np.ones((1, 3, 8, 8), np.float32)}] * 2)
    words = ["quantize", str(tmp_path / "m.onnx"), "--calibration", str(feeds)]
    words += ["-o", str(tmp_path / "q.onnx")]
    done = CliRunner().invoke(cli, [*words, "--override", "x=-1:2", "--override", "w=0.01@0,int8"])
    assert done.exit_code == 0, done.output
    made = load_model(tmp_path / "q.onnx")
    assert scalar(made, "x_scale") == np.float32(3 / 255)
    assert scalar(made, "w_scale") == np.float32(0.01)
    done = CliRunner().invoke(cli, [*words, "--override", "x=2:1"])
    assert isinstance(done.exception, QuantizationError) or "above high" in done.output


@needs_models
def test_on_a_real_detector_the_file_has_the_scale_that_the_lab_said(tmp_path: Path) -> None:
    model = load_model(MODELS / "fastestdet" / "model.onnx")
    feeds = load_feeds(MODELS / "fastestdet" / "inputs", model).subset(range(2))
    tensor = "onnx::Concat_429"
    cut: Trial = trial(np.abs(values("normal", 1000)), SCHEMES["ort-int8"], 0.0, 1.7)
    config = QuantConfig(overrides=(TensorOverride(tensor=tensor, low=cut.low, high=cut.high),))
    made = quantize_model(
        model, config, calibration=feeds, output=tmp_path / "q.onnx", cache=tmp_path / "cache"
    )
    result = load_model(made.path)
    assert scalar(result, f"{tensor}_scale") == np.float32(cut.scale)
    assert scalar(result, f"{tensor}_zero_point") == cut.zero_point
    assert not [note for note in made.notes if "override" in note]
