"""What the benchmarks of quantizing work on: a prepared model, its ranges, lists of nodes.

The one place that knows how the library's `Quantizer` is made, so that a change there is one here.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import QuantFormat, quantize_static
from onnxruntime.quantization.calibrate import (
    CalibrationMethod,
    TensorsData,
    save_tensors_data,
)

from inspector.calibration import calibrate, hushed
from inspector.feeds import Feeds, load_feeds
from inspector.model import Model
from inspector.model_files import load_model
from inspector.prepare import prepare
from inspector.quantize import QUANT_TYPES, extra_options
from inspector.recipe import COMPUTE_OPS, QuantConfig
from tests.benchmarks.harness import library, shared_model
from tests.benchmarks.networks import (
    CALIBRATED_ON,
    FOLDER,
    Pair,
    calibrated_ranges,
    resnet50_pair,
)

RESNET50 = "ResNet-50 shape"
SHARED = (
    "fastestdet", "gtcrn", "magika", "minilm-l6", "mlperf-kws-dscnn", "mlperf-resnet8",
    "silero-vad-16k", "squeezenet-fp16", "ultraface-rfb320",
)  # fmt: skip
# With more nodes there are thousands of lists of up to half of them.
_FEW = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model ready to be quantized, in a folder that nobody else writes to.

    Attributes:
        name: for the table.
        model: what the quantizer is given.
        path: a private copy of it.
        ranges: what calibration saw, as a file that `quantize_static` reads as well.
        feeds: of the model.
        config: the recipe.
    """

    name: str
    model: Model
    path: Path
    ranges: Path
    feeds: Feeds
    config: QuantConfig

    def quantizer(self) -> Any:
        """The library's in-memory quantizer.

        Raises:
            Unavailable: this version of the library has none.
        """
        module = library("quantizer")
        return module.Quantizer(
            self.path, self.config, self.ranges, options=extra_options(self.config)
        )

    def by_public_function(self, exclude: Sequence[str], target: Path) -> None:
        """What a toggle costs with ONNX Runtime alone: ranges from its cache, the rest anew."""
        with hushed():
            quantize_static(
                self.path, target, None,
                quant_format=QuantFormat.QDQ,
                activation_type=QUANT_TYPES[self.config.activation_type],
                weight_type=QUANT_TYPES[self.config.weight_type],
                per_channel=self.config.per_channel,
                nodes_to_exclude=list(exclude),
                calibration_cache_path=self.ranges,
                extra_options=extra_options(self.config),
            )  # fmt: skip

    def lists(self, count: int, seed: int = 0) -> list[tuple[str, ...]]:
        """Exclusion lists, each with one node more or less than the one before; none repeats.

        Nodes are drawn among those that compute (Conv, MatMul and their like), which is what
        people toggle; among all where those are too few for so many lists.
        """
        rng = np.random.default_rng(seed)
        nodes = [n.name for n in self.model.nodes if n.op_type in COMPUTE_OPS and n.name]
        if len(nodes) <= _FEW:
            nodes = [n.name for n in self.model.nodes if n.name]
        chosen: set[str] = set()
        found: dict[tuple[str, ...], None] = {}
        while len(found) < count:
            chosen ^= {nodes[rng.integers(len(nodes))]}
            if len(chosen) > max(1, len(nodes) // 2):
                chosen.clear()
            if chosen:
                found[tuple(sorted(chosen))] = None
        return list(found)


def _subject(
    name: str, model_path: Path, feeds_folder: Path, folder: Path, config: QuantConfig
) -> Subject:
    """A float model pre-processed and calibrated, both taken from the cache where they are."""
    model = load_model(model_path)
    feeds = load_feeds(feeds_folder, model)
    cache = FOLDER / "cache"
    prepared = prepare(model, config, cache)
    observed = calibrate(prepared.model, feeds, limit=CALIBRATED_ON, cache=cache)
    source = prepared.model.path
    assert source is not None
    return _copied(name, source, observed.path, feeds, folder, config)


def _copied(
    name: str, source: Path, ranges: Path, feeds: Feeds, folder: Path, config: QuantConfig
) -> Subject:
    path = folder / f"{name.replace(' ', '-')}.onnx"
    shutil.copy(source, path)
    return Subject(
        name=name, model=load_model(path), path=path, ranges=ranges, feeds=feeds, config=config
    )


def subject(name: str, folder: Path, config: QuantConfig | None = None) -> Subject:
    """The ResNet-50 shape, or one of the real models.

    Args:
        name: `RESNET50` or one of `SHARED`.
        folder: for the private copy.
        config: the recipe; None for the library's default.

    Raises:
        Unavailable: the real model is not here.
    """
    config = QuantConfig() if config is None else config
    if name == RESNET50:
        pair = resnet50_pair()
        return _subject(name, pair.float_path, pair.feeds_folder, folder, config)
    home = shared_model(name)
    return _subject(name, home / "model.onnx", home / "inputs", folder, config)


def chain_subject(nodes: int, pair: Pair, folder: Path) -> Subject:
    """A chain as it is: pre-processing would change nothing, and calibrating it takes minutes."""
    ranges = folder / f"chain-{nodes}.json"
    found = {n: (np.array(low), np.array(high)) for n, (low, high) in
             calibrated_ranges(pair).items()}  # fmt: skip
    save_tensors_data(TensorsData(CalibrationMethod.MinMax, found), ranges)
    feeds = load_feeds(pair.feeds_folder, load_model(pair.float_path))
    return _copied(f"chain {nodes}", pair.float_path, ranges, feeds, folder, QuantConfig())
