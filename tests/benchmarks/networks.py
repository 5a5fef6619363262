"""Generated pairs of a float model and its quantized twin, with feeds, for the benchmarks.

They have the shapes of real networks and random weights, so a benchmark needs no download. Each is
the same for the same arguments and is kept on disk under a key of all it depends on: the
arguments, this file and the versions of ONNX Runtime and numpy.

python -m tests.benchmarks.networks
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.quant_utils import compute_scale_zp, quantize_data

from inspector.calibration import hushed
from inspector.runtime import open_session

FOLDER = Path(tempfile.gettempdir()) / "quant-inspector-benchmarks"
OPSET = 17
SAMPLES = 128
CALIBRATED_ON = 4
Array = NDArray[Any]


class Pair(NamedTuple):
    """Where a generated pair is.

    Attributes:
        float_path: the float model.
        quantized_path: its twin by `quantize_static` with its defaults (QDQ, int8).
        feeds_folder: one ``.npz`` per sample; the first ones are what the twin is calibrated on.
    """

    float_path: Path
    quantized_path: Path
    feeds_folder: Path


class Graph:
    """A model under construction: every node is named after the tensor it gives."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, op_type: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """The name of the only output."""
        self.nodes.append(helper.make_node(op_type, inputs, [name], f"{name}_node", **attributes))
        return name

    def constant(self, name: str, values: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def normal(self, shape: Sequence[int], deviation: float) -> Array:
        return self.rng.standard_normal(shape, np.float32) * np.float32(deviation)

    def conv(
        self, name: str, x: str, channels: tuple[int, int], kernel: int, *, stride: int = 1,
        gain: float = 1.0,
    ) -> str:  # fmt: skip
        """A convolution whose weights keep the scale behind a Relu (He), times `gain`."""
        given, made = channels
        deviation = gain * (2 / (given * kernel * kernel)) ** 0.5
        weight = self.constant(f"{name}_w", self.normal((made, given, kernel, kernel), deviation))
        bias = self.constant(f"{name}_b", self.normal((made,), 0.05))
        return self.node(
            "Conv", name, [x, weight, bias],
            kernel_shape=[kernel, kernel], strides=[stride, stride], pads=[kernel // 2] * 4,
        )  # fmt: skip

    def linear(self, name: str, x: str, widths: tuple[int, int], *, gain: float = 1.0) -> str:
        """MatMul and Add, as transformers are exported."""
        deviation = gain / widths[0] ** 0.5
        weight = self.constant(f"{name}_w", self.normal(widths, deviation))
        bias = self.constant(f"{name}_b", self.normal((widths[1],), 0.02))
        product = self.node("MatMul", f"{name}_product", [x, weight])
        return self.node("Add", name, [product, bias])

    def proto(
        self, given: onnx.ValueInfoProto, result: str, shape: Sequence[int]
    ) -> onnx.ModelProto:
        output = helper.make_tensor_value_info(result, TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "generated", [given], [output], self.constants)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


# -- the networks ------------------------------------------------------------------------------


def _resnet50(seed: int, size: int) -> onnx.ModelProto:
    """Bottlenecks 3-4-6-3 with the channels of ResNet-50, batch normalisation folded."""
    graph = Graph(seed)
    x = graph.node("Relu", "stem", [graph.conv("stem_conv", "image", (3, 64), 7, stride=2)])
    x = graph.node(
        "MaxPool", "stem_pool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]
    )
    channels = 64
    for stage, (blocks, inner) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            at, made = f"stage{stage + 1}_block{block}", 4 * inner
            stride = 2 if stage and not block else 1
            y = graph.conv(f"{at}_reduce_conv", x, (channels, inner), 1)
            y = graph.node("Relu", f"{at}_reduce", [y])
            y = graph.conv(f"{at}_spatial_conv", y, (inner, inner), 3, stride=stride)
            y = graph.node("Relu", f"{at}_spatial", [y])
            # Half as strong as the shortcut, so that sixteen sums do not blow the scale up.
            y = graph.conv(f"{at}_expand_conv", y, (inner, made), 1, gain=0.5)
            if not block:
                # Weaker too: what comes in is a sum behind a Relu, which has a mean.
                x = graph.conv(
                    f"{at}_shortcut_conv", x, (channels, made), 1, stride=stride, gain=0.7
                )
            x = graph.node("Relu", at, [graph.node("Add", f"{at}_sum", [y, x])])
            channels = made
    x = graph.node("Flatten", "features", [graph.node("GlobalAveragePool", "pooled", [x])], axis=1)
    weight = graph.constant("classes_w", graph.normal((1000, channels), channels**-0.5))
    bias = graph.constant("classes_b", graph.normal((1000,), 0.02))
    graph.node("Gemm", "classes", [x, weight, bias], transB=1)
    given = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, size, size])
    return graph.proto(given, "classes", [1, 1000])


def _transformer(seed: int, layers: int, width: int, sequence: int) -> onnx.ModelProto:
    """An encoder of post-norm layers over token ids: heads of 64, a GELU 4 times as wide."""
    if width % 64:
        raise ValueError(f"width must be a multiple of 64, not {width}")
    graph = Graph(seed)
    heads = width // 64
    split = graph.constant("split_shape", np.array([1, sequence, heads, 64], np.int64))
    merged = graph.constant("merged_shape", np.array([1, sequence, width], np.int64))
    root_two = graph.constant("root_two", np.float32(2**0.5))
    one, half = graph.constant("one", np.float32(1)), graph.constant("half", np.float32(0.5))
    eighth = graph.constant("eighth", np.float32(0.125))

    def norm(name: str, x: str) -> str:
        scale = graph.constant(f"{name}_w", 1 + graph.normal((width,), 0.1))
        bias = graph.constant(f"{name}_b", graph.normal((width,), 0.02))
        return graph.node("LayerNormalization", name, [x, scale, bias], axis=-1, epsilon=1e-5)

    words = graph.constant("words", graph.normal((_VOCABULARY, width), 1.0))
    places = graph.constant("places", graph.normal((1, sequence, width), 0.3))
    x = graph.node("Add", "embedded", [graph.node("Gather", "word", [words, "ids"]), places])
    x = norm("embedded_norm", x)
    for layer in range(layers):
        at = f"layer{layer}"
        heads_of = {}
        for part, order in (
            ("query", [0, 2, 1, 3]),
            ("key", [0, 2, 3, 1]),
            ("value", [0, 2, 1, 3]),
        ):
            y = graph.linear(f"{at}_{part}", x, (width, width))
            y = graph.node("Reshape", f"{at}_{part}_split", [y, split])
            heads_of[part] = graph.node("Transpose", f"{at}_{part}_heads", [y], perm=order)
        y = graph.node("MatMul", f"{at}_scores", [heads_of["query"], heads_of["key"]])
        y = graph.node("Mul", f"{at}_scaled", [y, eighth])
        y = graph.node("Softmax", f"{at}_attention", [y], axis=-1)
        y = graph.node("MatMul", f"{at}_context", [y, heads_of["value"]])
        y = graph.node("Transpose", f"{at}_context_rows", [y], perm=[0, 2, 1, 3])
        y = graph.node("Reshape", f"{at}_merged", [y, merged])
        y = graph.linear(f"{at}_projection", y, (width, width))
        x = norm(f"{at}_norm", graph.node("Add", f"{at}_sum", [x, y]))
        y = inner = graph.linear(f"{at}_up", x, (width, 4 * width))
        y = graph.node("Erf", f"{at}_erf", [graph.node("Div", f"{at}_over_root", [y, root_two])])
        y = graph.node("Mul", f"{at}_gated", [inner, graph.node("Add", f"{at}_gate", [y, one])])
        y = graph.node("Mul", f"{at}_gelu", [y, half])
        y = graph.linear(f"{at}_down", y, (4 * width, width))
        last = layer == layers - 1
        x = norm("hidden" if last else f"{at}_out", graph.node("Add", f"{at}_out_sum", [x, y]))
    given = helper.make_tensor_value_info("ids", TensorProto.INT64, [1, sequence])
    return graph.proto(given, "hidden", [1, sequence, width])


def _chain(seed: int, nodes: int, channels: int, size: int) -> onnx.ModelProto:
    """Conv, Relu, Conv and Add with what came before, over and over; all tensors are of one size.

    Each Conv is followed through on a probe and normalised per channel, like one with folded
    batch normalisation: thousands in a row neither fade nor blow up.
    """
    graph = Graph(seed)
    probe = graph.rng.standard_normal((channels, size * size))
    x, values = "signal", probe

    def conv(name: str, x: str, given: Array, gain: float) -> tuple[str, Array]:
        kernel = graph.rng.standard_normal((channels, channels))
        made = kernel @ given
        factor = gain / np.maximum(made.std(axis=1, keepdims=True), 1e-6)
        shift = 0.1 * gain * graph.rng.standard_normal((channels, 1))
        kernel, made = kernel * factor, (made - made.mean(axis=1, keepdims=True)) * factor + shift
        bias = (made - kernel @ given).mean(axis=1)
        weight = kernel.astype(np.float32)[:, :, None, None]
        inputs = [x, graph.constant(f"{name}_w", weight)]
        inputs.append(graph.constant(f"{name}_b", bias.astype(np.float32)))
        return graph.node("Conv", name, inputs, kernel_shape=[1, 1]), made

    while len(graph.nodes) < nodes:
        at, shortcut = f"block{len(graph.nodes) // 4:04}", (x, values)
        x, values = conv(f"{at}_widen", x, values, 1.0)
        if len(graph.nodes) < nodes:
            x, values = graph.node("Relu", f"{at}_relu", [x]), np.maximum(values, 0)
        if len(graph.nodes) < nodes:
            x, values = conv(f"{at}_project", x, values, 0.3)
        if len(graph.nodes) < nodes:
            x, values = graph.node("Add", f"{at}_sum", [x, shortcut[0]]), values + shortcut[1]
    shape = [1, channels, size, size]
    return graph.proto(helper.make_tensor_value_info("signal", TensorProto.FLOAT, shape), x, shape)


_VOCABULARY = 2048


def _signals(channels: int, size: int) -> Callable[[np.random.Generator], dict[str, Array]]:
    return lambda rng: {"signal": rng.standard_normal((1, channels, size, size), np.float32)}


def _images(size: int) -> Callable[[np.random.Generator], dict[str, Array]]:
    return lambda rng: {"image": rng.standard_normal((1, 3, size, size), np.float32)}


def _ids(sequence: int) -> Callable[[np.random.Generator], dict[str, Array]]:
    return lambda rng: {"ids": rng.integers(0, _VOCABULARY, (1, sequence), np.int64)}


# -- writing and keeping -----------------------------------------------------------------------


class FeedReader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds one by one, as ONNX Runtime's calibrators and debugger want them."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files: Iterator[Path] = iter(files)

    def get_next(self) -> dict[str, Array] | None:
        file = next(self._files, None)
        return None if file is None else load_feed(file)


def load_feed(file: Path) -> dict[str, Array]:
    with np.load(file) as arrays:
        return {name: arrays[name] for name in arrays}


def feed_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.npz"))


def quantize_by_default(pair: Pair) -> None:
    """Writes the twin of a float model and feeds that are there."""
    files = feed_files(pair.feeds_folder)[:CALIBRATED_ON]
    with hushed():
        quantize_static(pair.float_path, pair.quantized_path, FeedReader(files))


def _quantize_chain(pair: Pair) -> None:
    """What `quantize_static` gives for a chain, in time that grows with its nodes.

    ONNX Runtime's own takes seven minutes for 5,000 nodes, because its look-ups are linear scans.
    """
    proto = onnx.load(pair.float_path)
    nodes = list(proto.graph.node)
    constants = {t.name: t for t in proto.graph.initializer}
    (given,), (result,) = proto.graph.input, proto.graph.output
    # A Relu goes into the Q behind it, with the Conv before it taking over its name.
    behind = {n.input[0]: n.output[0] for n in nodes if n.op_type == "Relu"}
    ranges = calibrated_ranges(pair)
    weights: list[onnx.NodeProto] = []
    written: list[onnx.NodeProto] = []
    stored: list[onnx.TensorProto] = []
    scales: dict[str, Array] = {}
    least, most = np.int8(-128), np.int8(127)

    def link(tensor: str) -> None:
        zero, scale = compute_scale_zp(*ranges[tensor], least, most)
        scales[tensor] = scale
        constants = f"{tensor}_scale", f"{tensor}_zero_point"
        stored.append(helper.make_tensor(constants[0], TensorProto.FLOAT, [], [scale.item()]))
        stored.append(helper.make_tensor(constants[1], TensorProto.INT8, [], [zero.item()]))
        ends = tensor == result.name
        before = f"{tensor}_QuantizeLinear_Input" if ends else tensor
        after = tensor if ends else f"{tensor}_DequantizeLinear_Output"
        name, middle = f"{tensor}_QuantizeLinear", f"{tensor}_QuantizeLinear_Output"
        written.append(helper.make_node("QuantizeLinear", [before, *constants], [middle], name))
        name = f"{tensor}_DequantizeLinear"
        written.append(helper.make_node("DequantizeLinear", [middle, *constants], [after], name))

    def dequantized(tensor: str, stem: str, after: str) -> str:
        read = [f"{tensor}_quantized", f"{stem}_scale", f"{stem}_zero_point"]
        weights.append(
            helper.make_node("DequantizeLinear", read, [after], f"{tensor}_DequantizeLinear")
        )
        return after

    def kernel(name: str) -> str:
        values = numpy_helper.to_array(constants[name])
        zero, scale, codes = quantize_data(values, TensorProto.INT8, symmetric=True)
        scales[name] = scale
        stored.append(helper.make_tensor(f"{name}_scale", TensorProto.FLOAT, [], [scale.item()]))
        stored.append(helper.make_tensor(f"{name}_zero_point", TensorProto.INT8, [], [zero.item()]))
        stored.append(numpy_helper.from_array(codes, f"{name}_quantized"))
        return dequantized(name, name, f"{name}_DequantizeLinear_Output")

    def bias(name: str, scale: Array) -> str:
        values = numpy_helper.to_array(constants[name]).astype(np.float64)
        codes = (values / scale.astype(np.float64)).round().astype(np.int32)
        stem = f"{name}_quantized"
        stored.append(numpy_helper.from_array(codes, stem))
        stored.append(numpy_helper.from_array(scale.reshape(1), f"{stem}_scale"))
        stored.append(numpy_helper.from_array(np.array(0, np.int32), f"{stem}_zero_point"))
        return dequantized(name, stem, name)

    link(given.name)
    for node in nodes:
        if node.op_type == "Relu":
            continue
        read = [f"{t}_DequantizeLinear_Output" for t in node.input if t not in constants]
        if node.op_type == "Conv":
            source, weight, shift = node.input
            read += [kernel(weight), bias(shift, scales[source] * scales[weight])]
        made = behind.get(node.output[0], node.output[0])
        ends = made == result.name
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.ClearField("input")
        copy.input.extend(read)
        copy.output[0] = f"{made}_QuantizeLinear_Input" if ends else made
        written.append(copy)
        link(made)
    graph = helper.make_graph([*weights, *written], "generated", [given], [result], stored)
    opsets = list(proto.opset_import)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=proto.ir_version)
    model.producer_name = "onnx.quantize"
    onnx.save(model, pair.quantized_path)


def calibrated_ranges(pair: Pair) -> dict[str, tuple[Array, Array]]:
    """The smallest and largest value of each tensor over the feeds that calibrate, float32."""
    proto = onnx.load(pair.float_path)
    tensors = [v.name for v in proto.graph.input] + [n.output[0] for n in proto.graph.node]
    session = open_session(proto, optimized=False, outputs=tensors)
    found: dict[str, tuple[Array, Array]] = {}
    for file in feed_files(pair.feeds_folder)[:CALIBRATED_ON]:
        for name, values in session.run(load_feed(file), tensors).items():
            low, high = found.get(name, (values.min(), values.max()))
            found[name] = (np.minimum(low, values.min()), np.maximum(high, values.max()))
    return found


def _kept(
    kind: str,
    folder: Path | None,
    arguments: dict[str, Any],
    build: Callable[[], onnx.ModelProto],
    draw: Callable[[np.random.Generator], dict[str, Array]],
    quantize: Callable[[Pair], None] = quantize_by_default,
) -> Pair:
    """The pair on disk, made where it is not there yet.

    Args:
        kind: the name of the network.
        folder: where pairs are kept; None for `FOLDER`.
        arguments: what the network depends on.
        build: gives the float model.
        draw: gives one sample.
        quantize: writes the twin of a float model and feeds that are there.
    """
    root = FOLDER if folder is None else Path(folder)
    depends = {
        **arguments,
        "source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "versions": [onnxruntime.__version__, np.__version__, onnx.__version__],
    }
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
    home = root / f"{kind}-{key}"
    pair = _places(home)
    if home.is_dir():
        return pair
    root.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=".making-", dir=root))
    try:
        new = _places(made)
        new.feeds_folder.mkdir()
        rng = np.random.default_rng(arguments["seed"] + 1)
        for at in range(arguments["samples"]):
            np.savez(new.feeds_folder / f"{at:03}.npz", **draw(rng))
        onnx.save(build(), new.float_path)
        quantize(new)
        try:
            made.rename(home)
        except OSError:
            # Another process was faster; what it made is the same.
            if not home.is_dir():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return pair


def _places(home: Path) -> Pair:
    return Pair(home / "float.onnx", home / "quantized.onnx", home / "feeds")


def resnet50_pair(
    folder: Path | None = None, *, size: int = 224, samples: int = SAMPLES, seed: int = 0
) -> Pair:
    """ResNet-50's shape: input ``image`` [1, 3, size, size], output ``classes`` [1, 1000]."""
    arguments = {"size": size, "samples": samples, "seed": seed}
    return _kept("resnet50", folder, arguments, lambda: _resnet50(seed, size), _images(size))


def transformer_pair(
    folder: Path | None = None,
    layers: int = 12,
    width: int = 768,
    sequence: int = 128,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Pair:
    """An encoder: input ``ids`` int64 [1, sequence], output ``hidden`` [1, sequence, width].

    Raises:
        ValueError: `width` is not a multiple of 64.
    """
    arguments = {
        "layers": layers, "width": width, "sequence": sequence, "samples": samples, "seed": seed
    }  # fmt: skip
    build = lambda: _transformer(seed, layers, width, sequence)  # noqa: E731
    return _kept("transformer", folder, arguments, build, _ids(sequence))


def chain_pair(
    nodes: int, folder: Path | None = None, work: int = 2048, *, samples: int = 8, seed: int = 0
) -> Pair:
    """So many nodes in a row: input ``signal``, eight channels of `work` elements in all.

    Args:
        nodes: how many, each with a name.
        folder: where pairs are kept; None for `FOLDER`.
        work: elements of every tensor, 8 times a square.
        samples: feeds to draw.
        seed: of weights and feeds.

    Raises:
        ValueError: `nodes` is below 1, or `work` is not 8 times a square.
    """
    channels, size = 8, round((max(work, 0) / 8) ** 0.5)
    if nodes < 1:
        raise ValueError(f"nodes must be 1 or more, not {nodes}")
    if channels * size * size != work or not work:
        raise ValueError(f"work must be 8 times a square, not {work}")
    arguments = {"nodes": nodes, "work": work, "samples": samples, "seed": seed}
    build = lambda: _chain(seed, nodes, channels, size)  # noqa: E731
    return _kept(
        f"chain{nodes}", folder, arguments, build, _signals(channels, size),
        _quantize_chain,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the generated pairs, prints their paths.")
    parser.add_argument("--folder", type=Path, default=None, help=f"by default {FOLDER}")
    folder = parser.parse_args().folder
    pairs = {
        "resnet50": resnet50_pair(folder),
        "transformer": transformer_pair(folder),
        "chain 500": chain_pair(500, folder),
        "chain 5000": chain_pair(5000, folder),
    }
    for name, pair in pairs.items():
        print(name, *(f"  {field}: {path}" for field, path in pair._asdict().items()), sep="\n")


if __name__ == "__main__":
    main()
