"""Rebuild the sample networks: train them, export them, quantize them, measure them.

Everything below ``sample_models/`` except this script and the README comes from one run of::

    pip install torch scikit-learn pillow onnx onnxruntime
    python sample_models/train.py

It needs torch, scikit-learn and pillow, none of which the application itself needs, and takes
some ten minutes on two CPU cores. It is not run by the tests.

Both networks are trained on scikit-learn's ``load_digits`` (1,797 real 8x8 scans of handwritten
digits). A stratified fifth of the digits is set aside first: the feeds are made from those digits
only, so no network has seen them. The int8 files are what onnxruntime's static quantizer makes of
the float files with per-tensor min/max calibration on the first half of the feeds; no weight is
edited.

``digit-detector``
    A depthwise-separable detector for scenes of upscaled digits, with the box decoding in the
    graph and one ``[1, 14, N]`` output: four box rows in pixels, ten rows of class scores.
``digit-transformer``
    A small vision transformer that classifies one 8x8 digit.

The runs are seeded. Another CPU or another version of torch rounds differently, so the weights
may differ in their last digits and the measured figures slightly.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
OPSET = 17

CANVAS = 640
N_CLASSES = 10
STRIDES = (16, 32)
N_SCENES = 12
SCORE_THRESHOLD = 0.25
IOU_THRESHOLD = 0.5
PREPROCESS = {
    "resize": "stretch",
    "size": [CANVAS, CANVAS],
    "layout": "NCHW",
    "color": "RGB",
    "scale": 1 / 255,
    "mean": [0, 0, 0],
    "std": [1, 1, 1],
}
# The nodes of the detector that have to stay in float for its scores to survive.
DETECTOR_FLOAT_NODES = ["/head/Concat_3"]

N_DIGITS = 64
TOKENS = 16

Boxes = np.ndarray  # [n, 5]: x1, y1, x2, y2 in pixels, class
Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def digits_split(seed: int) -> Split:
    """The digits in 0..1, ``[n, 8, 8]``, and their labels: train, then the unseen fifth."""
    data = load_digits()
    images = (data.images / 16).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(
        images, data.target, test_size=0.2, stratify=data.target, random_state=seed
    )
    return x_train, y_train, x_test, y_test


# --------------------------------------------------------------------------- detector: scenes


def make_scene(
    rng: np.random.Generator, images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, Boxes]:
    """One 8-bit grayscale scene and its boxes, drawn tightly around the ink of each digit."""
    yy, xx = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32) / CANVAS - 0.5
    slope_y, slope_x = rng.uniform(-0.1, 0.1, 2)
    canvas = (rng.uniform(0.1, 0.3) + slope_y * yy + slope_x * xx).astype(np.float32)
    taken: list[tuple[int, int, int, int]] = []
    boxes: list[list[float]] = []
    for _ in range(int(rng.integers(3, 9))):
        height = round(math.exp(rng.uniform(math.log(64), math.log(180))))
        width = int(np.clip(round(height * rng.uniform(0.85, 1.15)), 64, 180))
        for _ in range(20):
            x = int(rng.integers(0, CANVAS - width + 1))
            y = int(rng.integers(0, CANVAS - height + 1))
            if all(
                x + width <= tx or tx + tw <= x or y + height <= ty or ty + th <= y
                for tx, ty, tw, th in taken
            ):
                break
        else:
            continue
        taken.append((x, y, width, height))
        pick = int(rng.integers(len(images)))
        tile = Image.fromarray(images[pick]).resize((width, height), Image.Resampling.BICUBIC)
        ink = np.clip(np.asarray(tile), 0, 1)
        region = canvas[y : y + height, x : x + width]
        region += (1 - region) * ink * rng.uniform(0.6, 1.0)
        rows, columns = np.nonzero(ink > 0.25)
        boxes.append(
            [
                x + int(columns.min()),
                y + int(rows.min()),
                x + int(columns.max()) + 1,
                y + int(rows.max()) + 1,
                int(labels[pick]),
            ]
        )
    scene = np.clip(np.rint(canvas * 255), 0, 255).astype(np.uint8)
    return scene, np.array(boxes, dtype=np.float32)


def scene_input(scene: np.ndarray) -> np.ndarray:
    """What ``preprocess.json`` makes of one scene: ``[3, 640, 640]``, gray repeated, over 255."""
    return np.repeat(scene[None].astype(np.float32) * np.float32(PREPROCESS["scale"]), 3, axis=0)


# -------------------------------------------------------------------------- detector: network


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(c_out)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Separable(nn.Module):
    """A 3x3 depthwise block, then a 1x1 pointwise block."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1):
        super().__init__()
        self.depthwise = ConvBlock(c_in, c_in, 3, stride, groups=c_in)
        self.pointwise = ConvBlock(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class Backbone(nn.Module):
    """640 -> 160 -> 80 -> 40 -> 20; gives the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBlock(3, 16, 3, stride=4)
        self.stage1 = Separable(16, 32, stride=2)
        self.stage2 = nn.Sequential(Separable(32, 64, stride=2), Separable(64, 64))
        self.stage3 = nn.Sequential(Separable(64, 64, stride=2), Separable(64, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.stage2(self.stage1(self.stem(x)))
        return fine, self.stage3(fine)


class Neck(nn.Module):
    """Adds the upsampled coarse grid to the fine one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.fine = Separable(64, 64)
        self.coarse = Separable(64, 64)

    def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        return self.fine(fine + self.up(coarse)), self.coarse(coarse)


class Head(nn.Module):
    """Anchor-free: four distances and ten class scores per grid cell, decoded to pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.box = nn.ModuleList(nn.Conv2d(64, 4, 1) for _ in STRIDES)
        self.cls = nn.ModuleList(nn.Conv2d(64, N_CLASSES, 1) for _ in STRIDES)
        for box, cls in zip(self.box, self.cls, strict=True):
            nn.init.constant_(box.bias, 2.0)
            nn.init.constant_(cls.bias, math.log(0.01 / 0.99))
        points, strides = [], []
        for stride in STRIDES:
            side = torch.arange(CANVAS // stride, dtype=torch.float32) + 0.5
            y, x = torch.meshgrid(side, side, indexing="ij")
            points.append(torch.stack([x.flatten(), y.flatten()]))
            strides.append(torch.full((1, x.numel()), float(stride)))
        self.register_buffer("points", torch.cat(points, dim=1)[None], persistent=False)
        self.register_buffer("strides", torch.cat(strides, dim=1)[None], persistent=False)

    def raw(self, grids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Distances in strides ``[b, 4, n]`` and class logits ``[b, 10, n]``."""
        cells = [(CANVAS // stride) ** 2 for stride in STRIDES]
        heads = zip(self.box, self.cls, grids, cells, strict=True)
        parts = [(b(g).reshape(-1, 4, n), c(g).reshape(-1, N_CLASSES, n)) for b, c, g, n in heads]
        distances, logits = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        return distances, logits

    def forward(self, grids: Sequence[Tensor]) -> Tensor:
        distances, logits = self.raw(grids)
        left_top, right_bottom = distances.split([2, 2], dim=1)
        low, high = self.points - left_top, self.points + right_bottom
        boxes = torch.cat([(low + high) / 2, high - low], dim=1) * self.strides
        return torch.cat([boxes, logits.sigmoid()], dim=1)


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.neck = Neck()
        self.head = Head()

    def grids(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.neck(*self.backbone(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.grids(images))


# ------------------------------------------------------------------------- detector: training


def assign(boxes: Boxes, points: np.ndarray, strides: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each box, the cells near its centre on the grid of its size: (cell, box) indices.

    ``points`` are in pixels, ``[2, n]``. Boxes of 80 to 120 pixels are learnt on both grids.
    """
    centres = (boxes[:, :2] + boxes[:, 2:4]) / 2
    longest = (boxes[:, 2:4] - boxes[:, :2]).max(axis=1)
    near = (np.abs(points[None] - centres[:, :, None]) < strides * 0.9).all(axis=1)
    fits = np.where(strides[None] == STRIDES[0], longest[:, None] < 120, longest[:, None] > 80)
    box, cell = np.nonzero(near & fits)
    return cell, box


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalized IoU of paired x1, y1, x2, y2 boxes ``[n, 4]``."""
    size_a, size_b = (a[:, 2:] - a[:, :2]).clamp(min=0), (b[:, 2:] - b[:, :2]).clamp(min=0)
    inner = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    outer = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    overlap = inner.prod(1)
    union = size_a.prod(1) + size_b.prod(1) - overlap
    return overlap / (union + 1e-6) - (outer - union) / (outer + 1e-6)


def train_detector(
    rng: np.random.Generator, images: np.ndarray, labels: np.ndarray, steps: int, batch: int
) -> Detector:
    model = Detector()
    print(f"detector: {sum(p.numel() for p in model.parameters()):,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.15)
    strides = model.head.strides[0, 0]
    points = model.head.points[0] * strides
    points_np, strides_np = points.numpy(), strides.numpy()
    model.train()
    started = time.perf_counter()
    for step in range(steps):
        scenes = [make_scene(rng, images, labels) for _ in range(batch)]
        inputs = torch.from_numpy(np.stack([scene_input(scene) for scene, _ in scenes]))
        distances, logits = model.head.raw(model.grids(inputs))
        wanted = torch.zeros_like(logits)
        rows, cells, targets = [], [], []
        for row, (_, boxes) in enumerate(scenes):
            cell, box = assign(boxes, points_np, strides_np)
            wanted[row, boxes[box, 4].astype(int), cell] = 1
            rows.append(np.full(len(cell), row))
            cells.append(cell)
            targets.append(boxes[box, :4])
        row, cell = (torch.from_numpy(np.concatenate(part)) for part in (rows, cells))
        target = torch.from_numpy(np.concatenate(targets))
        at, unit = points[:, cell].T, strides[cell][:, None]
        picked = distances[row, :, cell] * unit
        boxes_now = torch.cat([at - picked[:, :2], at + picked[:, 2:]], dim=1)
        n = max(1, len(cell))
        loss_cls = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / n
        away = F.smooth_l1_loss(boxes_now / unit, target / unit)
        loss_box = (1 - giou(boxes_now, target)).mean() + 0.5 * away
        loss = loss_cls + 2 * loss_box
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(
                f"  step {step + 1}/{steps}: class {loss_cls.item():.3f} box {loss_box.item():.3f}"
                f" ({time.perf_counter() - started:.0f} s)",
                flush=True,
            )
    return model.eval()


# ---------------------------------------------------------------------- detector: measurement


def iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of one x1, y1, x2, y2 box with several."""
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[2:4], others[:, 2:4])
    overlap = np.clip(high - low, 0, None).prod(axis=1)
    areas = (others[:, 2:4] - others[:, :2]).prod(axis=1)
    return overlap / ((box[2:4] - box[:2]).prod() + areas - overlap + 1e-9)


def detections(output: np.ndarray) -> Boxes:
    """Threshold and per-class non-maximum suppression of one ``[14, n]`` output, best first."""
    scores, classes = output[4:].max(axis=0), output[4:].argmax(axis=0)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= SCORE_THRESHOLD]
    centres, sizes = output[:2, order].T, output[2:4, order].T
    found = np.hstack([centres - sizes / 2, centres + sizes / 2, classes[order, None]])
    kept: list[np.ndarray] = []
    for box in found:
        same = np.array([k for k in kept if k[4] == box[4]])
        if not len(same) or iou(box, same).max() < IOU_THRESHOLD:
            kept.append(box)
    return np.array(kept).reshape(-1, 5)


def f1_score(outputs: Sequence[np.ndarray], truths: Sequence[Boxes]) -> float:
    """F1 over all scenes; a hit has the right class and IoU >= 0.5 with a box not yet matched."""
    hits = n_found = n_true = 0
    for output, truth in zip(outputs, truths, strict=True):
        found = detections(output)
        n_found, n_true = n_found + len(found), n_true + len(truth)
        free = np.ones(len(truth), dtype=bool)
        for box in found:
            overlaps = iou(box, truth) * (free & (truth[:, 4] == box[4]))
            best = int(overlaps.argmax())
            if overlaps[best] >= IOU_THRESHOLD:
                hits += 1
                free[best] = False
    return 2 * hits / max(1, n_found + n_true)


def sqnr_db(reference: np.ndarray, test: np.ndarray) -> float:
    """Signal to quantization noise, pooled over all values of all samples, in decibels."""
    noise = np.square(reference.astype(np.float64) - test).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / noise))


# ---------------------------------------------------------------------------------- transformer


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and MLP."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.width, self.heads = width, heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def split(self, x: Tensor) -> Tensor:
        return x.reshape(-1, TOKENS, self.heads, self.width // self.heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = self.split(self.query(y)), self.split(self.key(y)), self.split(self.value(y))
        weights = (q @ k.transpose(2, 3) * (self.heads / self.width) ** 0.5).softmax(dim=-1)
        mixed = (weights @ v).transpose(1, 2).reshape(-1, TOKENS, self.width)
        x = x + self.dropout(self.proj(mixed))
        return x + self.dropout(self.fc2(self.act(self.fc1(self.norm2(x)))))


class DigitTransformer(nn.Module):
    """Sixteen 2x2 patches as tokens, pre-norm encoder layers, mean pooling, ten logits."""

    def __init__(self, width: int = 48, depth: int = 3, heads: int = 4):
        super().__init__()
        self.patches = nn.Linear(4, width)
        self.positions = nn.Parameter(torch.randn(1, TOKENS, width) * 0.1)
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, N_CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = pixels.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, TOKENS, 4)
        x = self.patches(tokens) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.norm(x).mean(dim=1))


def train_transformer(images: np.ndarray, labels: np.ndarray, epochs: int) -> DigitTransformer:
    model = DigitTransformer()
    print(f"transformer: {sum(p.numel() for p in model.parameters()):,} parameters")
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    batch = 64
    steps = epochs * math.ceil(len(x) / batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for index in torch.randperm(len(x)).split(batch):
            # Shift by up to half a pixel and rotate, scale, shear a little.
            theta = torch.eye(2, 3).repeat(len(index), 1, 1)
            theta[:, :, :2] += torch.randn(len(index), 2, 2) * 0.07
            theta[:, :, 2] += (torch.rand(len(index), 2) - 0.5) * 0.25
            grid = F.affine_grid(theta, [len(index), 1, 8, 8], align_corners=False)
            warped = F.grid_sample(x[index][:, None], grid, align_corners=False)[:, 0]
            loss = F.cross_entropy(model(warped), y[index], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(index)
        if (epoch + 1) % 20 == 0:
            print(f"  epoch {epoch + 1}/{epochs}: loss {total / len(x):.3f}", flush=True)
    return model.eval()


# ------------------------------------------------------------------- export, quantize, measure


class Feeds(CalibrationDataReader):
    """The calibration samples, one dictionary of inputs each."""

    def __init__(self, name: str, samples: np.ndarray):
        self.feeds: Iterator[dict[str, np.ndarray]] = iter(
            [{name: samples[k : k + 1]} for k in range(len(samples))]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def export(model: nn.Module, example: Tensor, path: Path, inputs: str, outputs: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        model,
        (example,),
        str(path),
        input_names=[inputs],
        output_names=[outputs],
        opset_version=OPSET,
        dynamo=False,
    )
    onnx.checker.check_model(str(path), full_check=True)


def quantize(source: Path, target: Path, name: str, samples: np.ndarray, skip: list[str]) -> None:
    """onnxruntime's pre-processing and static quantization, int8 per tensor, min/max."""
    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared))
        quantize_static(
            str(prepared),
            str(target),
            Feeds(name, samples),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            per_channel=False,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=skip,
        )


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, name: str, samples: np.ndarray) -> np.ndarray:
    """The output for each sample, stacked."""
    net = session(path)
    return np.concatenate(
        [net.run(None, {name: samples[k : k + 1]})[0] for k in range(len(samples))]
    )


def latency_ms(path: Path, name: str, samples: np.ndarray, repeats: int = 50) -> float:
    """Median time of one run."""
    net = session(path)
    times = []
    for k in range(repeats + 5):
        started = time.perf_counter()
        net.run(None, {name: samples[k % len(samples)][None]})
        times.append(time.perf_counter() - started)
    return float(np.median(times[5:]) * 1000)


def measure_detector(folder: Path, split: Split, seed: int, unseen_scenes: int) -> None:
    """Print the figures of the README: on the feeds, and on more scenes of unseen digits."""
    truths = json.loads((folder / "feeds" / "boxes.json").read_text())
    names = sorted(truths)
    scenes = [np.asarray(Image.open(folder / "feeds" / name)) for name in names]
    feeds = np.stack([scene_input(scene) for scene in scenes])
    feed_boxes = [np.array(truths[name], dtype=np.float32) for name in names]
    rng = np.random.default_rng(seed + 2)
    more = [make_scene(rng, split[2], split[3]) for _ in range(unseen_scenes)]
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch) / "kept.onnx"
        quantize(
            folder / "float.onnx", kept, "images", feeds[: len(feeds) // 2], DETECTOR_FLOAT_NODES
        )
        files = {
            "float": folder / "float.onnx",
            "int8": folder / "quantized.onnx",
            f"int8, {', '.join(DETECTOR_FLOAT_NODES)} in float": kept,
        }
        reference = run(files["float"], "images", feeds)
        for label, path in files.items():
            output = run(path, "images", feeds)
            net = session(path)
            wider = [net.run(None, {"images": scene_input(s)[None]})[0][0] for s, _ in more]
            print(f"detector, {label}:")
            print(f"  F1 on the feeds {f1_score(list(output), feed_boxes):.3f}")
            print(f"  F1 on {len(more)} more scenes {f1_score(wider, [b for _, b in more]):.3f}")
            print(f"  highest score on the feeds {output[:, 4:].max():.3f}")
            if path != files["float"]:
                print(f"  SQNR of output0, pooled {sqnr_db(reference, output):.1f} dB")
                print(f"    box rows {sqnr_db(reference[:, :4], output[:, :4]):.1f} dB")
                print(f"    score rows {sqnr_db(reference[:, 4:], output[:, 4:]):.1f} dB")
            print(f"  latency {latency_ms(path, 'images', feeds):.2f} ms")


def measure_transformer(folder: Path, split: Split) -> None:
    with np.load(folder / "feeds.npz") as stored:
        feeds = stored["pixels"]
    labels = np.array(json.loads((folder / "labels.json").read_text()))
    unseen, unseen_labels = split[2], split[3]
    reference = run(folder / "float.onnx", "pixels", unseen)
    for label, file in (("float", "float.onnx"), ("int8", "quantized.onnx")):
        path = folder / file
        output, wider = run(path, "pixels", feeds), run(path, "pixels", unseen)
        right, right_wider = output.argmax(1) == labels, wider.argmax(1) == unseen_labels
        print(f"transformer, {label}:")
        print(f"  accuracy on the feeds {right.mean():.4f} ({right.sum()}/{len(right)})")
        print(
            f"  accuracy on all unseen digits {right_wider.mean():.4f}"
            f" ({right_wider.sum()}/{len(right_wider)})"
        )
        if label == "int8":
            here = sqnr_db(run(folder / "float.onnx", "pixels", feeds), output)
            print(f"  SQNR of logits, pooled: feeds {here:.1f} dB, ", end="")
            print(f"all unseen digits {sqnr_db(reference, wider):.1f} dB")
            agree = (wider.argmax(1) == reference.argmax(1)).mean()
            print(f"  same class as float on all unseen digits {agree:.4f}")
        print(f"  latency {latency_ms(path, 'pixels', feeds):.3f} ms")


# ----------------------------------------------------------------------------------------- main


def build_detector(folder: Path, split: Split, seed: int, steps: int, batch: int) -> None:
    x_train, y_train, x_test, y_test = split
    model = train_detector(np.random.default_rng(seed), x_train, y_train, steps, batch)
    example = torch.zeros(1, 3, CANVAS, CANVAS)
    export(model, example, folder / "float.onnx", "images", "output0")
    feeds = folder / "feeds"
    feeds.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed + 1)
    inputs, truths = [], []
    for k in range(N_SCENES):
        scene, boxes = make_scene(rng, x_test, y_test)
        Image.fromarray(scene).save(feeds / f"{k:02d}.png", optimize=True, compress_level=9)
        inputs.append(scene_input(scene))
        truths.append(f'  "{k:02d}.png": {json.dumps(boxes.astype(int).tolist())}')
    (feeds / "boxes.json").write_text("{\n" + ",\n".join(truths) + "\n}\n")
    (feeds / "preprocess.json").write_text(json.dumps(PREPROCESS, indent=2) + "\n")
    samples = np.stack(inputs)[: N_SCENES // 2]
    quantize(folder / "float.onnx", folder / "quantized.onnx", "images", samples, [])


def build_transformer(folder: Path, split: Split, seed: int, epochs: int) -> None:
    x_train, y_train, x_test, y_test = split
    model = train_transformer(x_train, y_train, epochs)
    export(model, torch.zeros(1, 8, 8), folder / "float.onnx", "pixels", "logits")
    pick = np.random.default_rng(seed).permutation(len(x_test))[:N_DIGITS]
    np.savez_compressed(folder / "feeds.npz", pixels=x_test[pick])
    (folder / "labels.json").write_text(json.dumps(y_test[pick].tolist()) + "\n")
    samples = x_test[pick][: N_DIGITS // 2]
    quantize(folder / "float.onnx", folder / "quantized.onnx", "pixels", samples, [])


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the sample networks from scratch.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write the samples to")
    parser.add_argument("--only", choices=["detector", "transformer"], help="build just this one")
    parser.add_argument("--measure", action="store_true", help="measure what is there, no training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; 1 repeats exactly")
    parser.add_argument("--steps", type=int, default=1200, help="training steps of the detector")
    parser.add_argument("--batch", type=int, default=16, help="scenes per step of the detector")
    parser.add_argument("--epochs", type=int, default=100, help="epochs of the transformer")
    parser.add_argument("--unseen-scenes", type=int, default=200, help="extra scenes to measure on")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    split = digits_split(args.seed)
    if args.only != "transformer":
        folder = args.out / "digit-detector"
        if not args.measure:
            torch.manual_seed(args.seed)
            build_detector(folder, split, args.seed, args.steps, args.batch)
        measure_detector(folder, split, args.seed, args.unseen_scenes)
    if args.only != "detector":
        folder = args.out / "digit-transformer"
        if not args.measure:
            torch.manual_seed(args.seed)
            build_transformer(folder, split, args.seed, args.epochs)
        measure_transformer(folder, split)


if __name__ == "__main__":
    main()
