"""A run as commands to copy: ours, ONNX Runtime's in Python, and ONNX Runtime's own runner."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from inspector.calibration import METHODS
from inspector.prepare import Prepared
from inspector.quantize import QUANT_TYPES, extra_options, quantizer_names
from inspector.recipe import QuantConfig, config_options


def onnxruntime_call(
    config: QuantConfig,
    exclude: Sequence[str] = (),
    *,
    prepared: Prepared | None = None,
    model: str = "model.onnx",
    output: str = "model.int8.onnx",
) -> str:
    """Python that makes the same model with ONNX Runtime alone, to copy.

    Equalization is the one thing ONNX Runtime cannot do: its line calls `equalize` here.

    `calibration_data_reader` is left for the reader to define. It writes the same bytes where all
    nodes of the file have names.

    Args:
        config: the recipe.
        exclude: nodes of the float file; of the prepared model where `prepared` is not given.
        prepared: turns names of the float file into those that ONNX Runtime has to be given.
        model: the float model's file, as the text shall name it.
        output: the file to write.
    """
    names = list(exclude if prepared is None else quantizer_names(prepared, exclude, config))
    only = list(
        config.nodes if prepared is None else quantizer_names(prepared, config.nodes, config)
    )
    source = model
    head: list[str] = []
    body: list[str] = []
    lift = prepared.lifted_to if prepared is not None else None
    if config.equalize:
        source = "model.equalized.onnx"
        body.append("# ONNX Runtime has no equalization: Quant Inspector rewrites the float model")
        body.append(f"save_model(equalize(load_model({model!r})).model, {source!r})")
        ours = ("equalize import equalize", "model_files import load_model, save_model")
        head += [f"from inspector.{each}" for each in ours]
        model = source
    if config.preprocess:
        source = "model.prepared.onnx"
        skip = "" if prepared is None or prepared.symbolic else ", skip_symbolic_shape=True"
        body.append(f"quant_pre_process({model!r}, {source!r}{skip})")
        if lift is not None:
            body.append(
                f"onnx.save(onnx.version_converter.convert_version(onnx.load({source!r}), {lift}), "
                f"{source!r})"
            )
            body.append(f"quant_pre_process({source!r}, {source!r}{skip})")
    elif lift is not None:
        source = "model.prepared.onnx"
        body.append(
            f"onnx.save(onnx.version_converter.convert_version(onnx.load({model!r}), {lift}), "
            f"{source!r})"
        )
    if lift is not None:
        head += ["import onnx", "import onnx.version_converter"]
    arguments = [f"    {source!r},", f"    {output!r},"]
    imports = ["QuantType"]
    if config.static:
        imports += ["CalibrationMethod", "QuantFormat", "quantize_static"]
        arguments += [
            "    calibration_data_reader,  # your CalibrationDataReader over the same feeds",
            f"    quant_format=QuantFormat.{'QDQ' if config.format == 'qdq' else 'QOperator'},",
            f"    activation_type=QuantType.{QUANT_TYPES[config.activation_type].name},",
            f"    calibrate_method=CalibrationMethod.{METHODS[config.method].name},",
        ]
    else:
        imports.append("quantize_dynamic")
    arguments.append(f"    weight_type=QuantType.{QUANT_TYPES[config.weight_type].name},")
    if config.per_channel:
        arguments.append("    per_channel=True,")
    if config.reduce_range:
        arguments.append("    reduce_range=True,")
    if config.op_types:
        arguments.append(f"    op_types_to_quantize={list(config.op_types)!r},")
    if only:
        arguments.append(f"    nodes_to_quantize={only!r},")
    arguments.append(f"    nodes_to_exclude={names!r},")
    options = extra_options(config)
    if options:
        arguments.append(f"    extra_options={_literal(options)},")
    if "TensorQuantOverrides" in options:
        four_bits = any(each.quant_type.endswith("int4") for each in config.overrides)
        head += [*(["import ml_dtypes"] if four_bits else []), "import numpy as np"]
    if config.preprocess:
        imports.append("quant_pre_process")
    function = "quantize_static" if config.static else "quantize_dynamic"
    head.append(f"from onnxruntime.quantization import {', '.join(sorted(imports))}")
    return "\n".join([*head, "", *body, f"{function}(", *arguments, ")", ""])


def _literal(value: Any) -> str:
    """A value of `extra_options` as Python that reads it back, under the imports of the call."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, np.ndarray):
        module = "ml_dtypes" if value.dtype.kind == "V" else "np"
        return f"np.array({value!s}, {module}.{value.dtype})"
    return repr(value)


def onnxruntime_command(
    config: QuantConfig,
    exclude: Sequence[str] = (),
    *,
    prepared: Prepared | None = None,
    model: str = "model.onnx",
    output: str = "model.int8.onnx",
) -> str:
    """Shell lines that make the same model with ONNX Runtime's own commands, to copy.

    Its runner reads samples from folders ``test_data_set_*`` beside the model. What it has no
    option for is said in a comment line.
    """
    if not config.static:
        return "# ONNX Runtime has no command for dynamic quantization; use the Python call.\n"
    missing = []
    if config.reduce_range:
        missing.append("reduce_range")
    if config.activation_symmetric is not None:
        missing.append("ActivationSymmetric")
    if config.weight_symmetric is not None:
        missing.append("WeightSymmetric")
    if config.method == "percentile" and config.percentile is not None:
        missing.append("CalibPercentile")
    if config.op_types:
        missing.append("op_types_to_quantize")
    if config.equalize:
        missing.append("equalization")
    if config.overrides:
        missing.append("TensorQuantOverrides of these kinds")
    if prepared is not None and prepared.lifted_to is not None:
        missing.append(f"a conversion to opset {prepared.lifted_to}")
    names = list(exclude if prepared is None else quantizer_names(prepared, exclude, config))
    only = list(
        config.nodes if prepared is None else quantizer_names(prepared, config.nodes, config)
    )
    lines = ["# calibrates on test_data_set_*/input_*.pb in the folder of the model"]
    if missing:
        lines.append(f"# these commands have no option for {', '.join(missing)}")
    # The runner lists the folder of its model's path, so the path needs one.
    folder = os.path.dirname(model) or "."
    source = model = os.path.join(folder, os.path.basename(model))
    if config.preprocess:
        source = os.path.join(folder, "model.prepared.onnx")
        words = ["python", "-m", "onnxruntime.quantization.preprocess"]
        words += ["--input", model, "--output", source]
        if prepared is not None and not prepared.symbolic:
            words += ["--skip_symbolic_shape", "True"]
        lines.append(shlex.join(words))
    words = ["python", "-m", "onnxruntime.quantization.static_quantize_runner"]
    words += ["-i", source, "-o", output, "--quant_format", config.format]
    words += ["--activation_type", f"q{config.activation_type}"]
    words += ["--weight_type", f"q{config.weight_type}"]
    words += ["--calibration_method", config.method]
    # The runner's own default widens small ranges, which the Python function does not.
    words += ["--minimum_real_range", "0"]
    if config.per_channel:
        words.append("--per_channel")
    if only:
        words += ["--nodes_to_quantize", *only]
    if names:
        words += ["--nodes_to_exclude", *names]
    lines.append(shlex.join(words))
    return "\n".join([*lines, ""])


def inspector_command(
    config: QuantConfig,
    exclude: Sequence[str] = (),
    *,
    float_name: str = "model.onnx",
    output: str = "",
    inputs: str | None = None,
    calibration: str | None = None,
) -> str:
    """One shell line that makes the same model with our command line, to copy.

    Args:
        config: the recipe.
        exclude: nodes of the float file.
        float_name: the float model's file.
        output: the file to write; by default "<float model>.int8.onnx" (its weight type).
        inputs: where the feeds are.
        calibration: where the calibration feeds are, if elsewhere.
    """
    output = output or f"{Path(float_name).stem}.{config.weight_type}.onnx"
    words = ["quant-inspector", "quantize", float_name, "-o", output]
    if inputs is not None:
        words += ["--inputs", inputs]
    if calibration is not None:
        words += ["--calibration", calibration]
    words += config_options(config)
    for name in exclude:
        words += ["--exclude", name]
    return shlex.join(words)
