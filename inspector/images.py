"""How a picture becomes a tensor: a file's pixels, resized, ordered and scaled by a recipe.

The recipe is a `Preprocess`, read from the ``preprocess.json`` beside the pictures, or started from
one of `PRESETS`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from inspector.arrays import (
    Stamp,
    fits,
    is_static,
    json_text,
    listed,
    nearest,
    open_file,
    printable,
    read_json,
    readable,
    shape_text,
    shown,
)
from inspector.errors import FeedError
from inspector.model import Model, TensorInfo

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)
# Formats Pillow may try; without a list it would also try those that call other programs.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_AS_ARRAYS = "Save the inputs as .npz, one file per sample, keyed by input name."
_MAX_RECIPE_BYTES = 64 * 1024

# ---------------------------------------------------------------------------------- the recipe

_CHOICES = {
    "resize": ("stretch", "letterbox", "center_crop"),
    "layout": ("NCHW", "NHWC"),
    "color": ("RGB", "BGR", "GRAY"),
}
# How many numbers a field takes (one alone stands for all of them), and which.
_NUMBERS: dict[str, tuple[int, type[int] | type[float], Callable[[float], bool]]] = {
    "size": (2, int, lambda n: n > 0),
    "pad_color": (3, int, lambda n: 0 <= n <= 255),
    "scale": (1, float, lambda n: n != 0),
    "mean": (1, float, lambda n: True),
    "std": (1, float, lambda n: n != 0),
    "crop_fraction": (1, float, lambda n: 0 < n <= 1),
}
# What a field takes, and an example that works.
_TAKES = {
    "preset": ("one of yolo, torchvision, tf, bgr", '"yolo"'),
    **{name: (f"one of {', '.join(all_)}", f'"{all_[0]}"') for name, all_ in _CHOICES.items()},
    "size": ("[height, width] in pixels", "[224, 224]"),
    "pad_color": ("three numbers of 0..255", "[114, 114, 114]"),
    "scale": ("a number other than 0", "0.00392156862745098"),
    "mean": ("one number, or one per channel", "0"),
    "std": ("one number other than 0, or one per channel", "1"),
    "crop_fraction": ("a number above 0 and at most 1", "0.875"),
}


def _bad_field(name: str, found: Any, color: str = "") -> FeedError:
    expected, example = _TAKES[name]
    of_color = f" for {color}" if color and name in ("mean", "std") else ""
    return FeedError(
        f"preprocess has {name} {json_text(found)}, expected {expected}{of_color}",
        hint=f'Write e.g. "{name}": {example}.',
    )


def _parsed(name: str, value: Any, channels: int) -> Any:
    """A field's value in its Python type; ValueError or KeyError where it means nothing."""
    if value is None and name in ("size", "layout"):
        return None
    if name in _CHOICES:
        if not isinstance(value, str):
            raise ValueError(name)
        word = value.lower().replace("-", "_").replace("centre", "center")
        return {c.lower(): c for c in _CHOICES[name]}[word.replace("grey", "gray")]
    count, kind, good = _NUMBERS[name]
    items = value if isinstance(value, list | tuple) else [value] * count
    for item in items:
        number = isinstance(item, int | float) and not isinstance(item, bool)
        # Outside of these, float32 knows a number only as 0 or infinity.
        if not number or not (item == 0 or 1e-30 < abs(item) < 1e30):
            raise ValueError(name)
        if kind(item) != item or not good(item):
            raise ValueError(name)
    if len(items) != count and not (name in ("mean", "std") and len(items) == channels):
        raise ValueError(name)
    if name == "size" and math.prod(items) > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(name)
    numbers = tuple(kind(item) for item in items)
    return numbers[0] if name in ("scale", "crop_fraction") else numbers


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """What turns a picture into the model's input: ``x = (pixel * scale - mean) / std``.

    Attributes:
        resize: "stretch" to the size; "letterbox" (fit inside, pad); "center_crop" (cover, cut).
        size: (height, width) of the model's picture; None takes the model's own.
        pad_color: RGB 0..255, the letterbox's border.
        layout: "NCHW" or "NHWC"; None takes what the model's input shape says.
        color: "RGB", "BGR" or "GRAY": the order of the model's channels.
        scale: factor on pixels of 0..255.
        mean, std: one number, or one per channel in the model's order.
        crop_fraction: share of the covering picture's shorter side that "center_crop" keeps;
            torchvision's resize to 256 and crop to 224 is 0.875.

    Raises:
        FeedError: a field has a value that means nothing.
    """

    resize: str = "stretch"
    size: tuple[int, int] | None = None
    pad_color: tuple[int, int, int] = (114, 114, 114)
    layout: str | None = None
    color: str = "RGB"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    crop_fraction: float = 1.0

    def __post_init__(self) -> None:
        # In the order of the fields: how many means there may be follows from the colour.
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, _parsed(name, value, self.channels))
            except (ValueError, KeyError) as error:
                raise _bad_field(name, value, self.color) from error

    @property
    def channels(self) -> int:
        return 1 if self.color == "GRAY" else 3

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocess:
        """The recipe an object of these fields says; ``"preset"`` names one to start from.

        Raises:
            FeedError: an unknown field or a value that means nothing.
        """
        values = dict(data)
        preset = values.pop("preset", None)
        if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
            raise _bad_field("preset", preset)
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                near = nearest(name, ["preset", *known])
                raise FeedError(
                    f"preprocess has the unknown field '{printable(name, 60)}'; nearest are {near}",
                    hint=f"Use only preset, {', '.join(known)}.",
                )
        return replace(cls() if preset is None else PRESETS[preset], **values)

    def to_json(self) -> dict[str, Any]:
        """The object that `from_json` reads."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def fitted(self, model: Model) -> Preprocess:
        """This recipe with the model's own size and layout where it leaves them open.

        Raises:
            FeedError: the model has no single picture input, or takes another size, layout or
                number of channels.
        """
        info = _picture_input(model)
        dims = (*[1] * (4 - len(info.shape or ())), *(info.shape or ()))
        shown = f"input {info.name!r} {shape_text(info.shape or ())}"
        if is_static(dims[0]) and dims[0] != 1:
            raise FeedError(
                f"{shown} takes {dims[0]} pictures at once, expected a batch of 1 for image feeds",
                hint="Export the model with batch size 1 or a dynamic batch.",
            )
        axes = {"NCHW": (1, 2, 3), "NHWC": (3, 1, 2)}
        possible = [k for k, a in axes.items() if dims[a[0]] == self.channels] or [
            k for k, a in axes.items() if not is_static(dims[a[0]])
        ]
        if not possible:
            other = {1: "GRAY", 3: "RGB"}.get(next((d for d in dims[1:] if d in (1, 3)), 0))
            raise FeedError(
                f"{shown} has no axis of {self.channels}, which color {self.color} gives",
                hint=f'Write "color": "{other}".' if other else _AS_ARRAYS,
            )
        layout = self.layout or possible[0]
        if layout not in possible:
            raise FeedError(
                f"preprocess says layout {layout}, but {shown} is {possible[0]}",
                hint=f'Write "layout": "{possible[0]}".',
            )
        own = (dims[axes[layout][1]], dims[axes[layout][2]])
        height, width = self.size or own
        if not isinstance(height, int) or not isinstance(width, int) or min(height, width) < 1:
            raise FeedError(
                f"{shown} leaves the picture's size open, and preprocess names none",
                hint='Write the size as [height, width], e.g. "size": [640, 640].',
            )
        if not fits((height, width), own):
            raise FeedError(
                f"preprocess has size {[height, width]}, "
                f"expected [height, width] {shape_text(own)} of {shown}",
                hint='Leave "size" out, or write the model\'s own.',
            )
        return replace(self, size=(height, width), layout=layout)

    def picture(self, image: Image.Image) -> NDArray[np.uint8]:
        """The picture as the model gets it, uint8 RGB (height, width, 3) whatever `color` says.

        Raises:
            ValueError: `size` is None (see `fitted`), or the pixels have no known range.
        """
        return np.asarray(self._resized(image).convert("RGB"), np.uint8)

    def apply(self, image: Image.Image) -> NDArray[np.float32]:
        """The model's input, float32 of shape (1, C, H, W) or (1, H, W, C).

        Raises:
            ValueError: `size` is None (see `fitted`), or the pixels have no known range.
        """
        pixels = np.atleast_3d(np.asarray(self._resized(image), np.float32))
        if self.color == "BGR":
            pixels = pixels[..., ::-1]
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        with np.errstate(all="ignore"):  # what overflows is counted with the feeds
            values = (pixels * np.float32(self.scale) - mean) / std
        if self.layout != "NHWC":
            values = values.transpose(2, 0, 1)
        return np.ascontiguousarray(values[np.newaxis], np.float32)

    def _resized(self, image: Image.Image) -> Image.Image:
        if self.size is None:
            raise ValueError("size is None; use fitted(model) first")
        mode = "L" if self.color == "GRAY" else "RGB"
        image = _upright(image).convert(mode)
        height, width = self.size
        bilinear = Image.Resampling.BILINEAR
        if self.resize == "stretch":
            return image.resize((width, height), bilinear)
        if self.resize == "letterbox":
            ratio = min(height / image.height, width / image.width)
            inner = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
            pad = Image.new("RGB", (1, 1), self.pad_color).convert(mode).getpixel((0, 0))
            canvas = Image.new(mode, (width, height), pad)
            # Half a pixel too much goes to the right and the bottom, as YOLO's own letterbox does.
            left = max(0, round((width - inner[0]) / 2 - 0.1))
            top = max(0, round((height - inner[1]) / 2 - 0.1))
            canvas.paste(image.resize(inner, bilinear), (left, top))
            return canvas
        # Sizes round as torchvision's Resize and CenterCrop do. Only the part that is kept is
        # computed: the covering picture of a very long image would not fit in memory.
        tall = max(height, round(height / self.crop_fraction))
        wide = max(width, round(width / self.crop_fraction))
        if tall * image.width >= wide * image.height:
            cover = (max(wide, tall * image.width // image.height), tall)
        else:
            cover = (wide, max(tall, wide * image.height // image.width))
        across, down = image.width / cover[0], image.height / cover[1]
        left, top = round((cover[0] - width) / 2), round((cover[1] - height) / 2)
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        return image.resize((width, height), bilinear, box=box)


PRESETS: dict[str, Preprocess] = {
    "yolo": Preprocess(resize="letterbox", scale=1 / 255),
    "torchvision": Preprocess(
        resize="center_crop",
        crop_fraction=0.875,
        scale=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
    "tf": Preprocess(scale=1 / 127.5, mean=(1.0,)),
    "bgr": Preprocess(color="BGR"),
}


def _picture_input(model: Model) -> TensorInfo:
    inputs = model.inputs
    if len(inputs) != 1 or len(inputs[0].shape or ()) not in (3, 4):
        found = [f"{i.name} {'?' if i.shape is None else shape_text(i.shape)}" for i in inputs]
        raise FeedError(
            f"{model.name} takes {listed(found, most=8)}, "
            "expected one picture of 3 or 4 axes for image feeds",
            hint=_AS_ARRAYS,
        )
    return inputs[0]


def read_preprocess(path: str | os.PathLike[str]) -> Preprocess:
    """The recipe in a JSON file: the fields of `Preprocess`, or ``{"preset": "yolo"}`` and changes.

    Raises:
        FeedError: no such file, not JSON, an unknown field or a value that means nothing.
    """
    path = Path(path)
    hint = f'Write {path.name}, e.g. {{"preset": "yolo"}} (presets: {", ".join(PRESETS)}).'
    if not path.is_file():
        raise FeedError(
            f"the preprocess file {printable(str(path))} does not exist or is no file", hint=hint
        )
    data = read_json(path, "preprocessing", dict, hint, most=_MAX_RECIPE_BYTES)
    try:
        return Preprocess.from_json(data)
    except FeedError as error:
        raise FeedError(f"{shown(path)}: {error.message}", hint=error.hint) from error


# -------------------------------------------------------------------------------- picture files


def open_image(path: str | os.PathLike[str], known: Stamp | None = None) -> Image.Image:
    """The picture in a file: first frame, upright, mode L or RGB.

    `known` is the file's stamp where it must be the one that was looked at before.

    Raises:
        FeedError: it is no picture, damaged, has pixels of an unknown range, or more of them than
            Pillow's MAX_IMAGE_PIXELS; or it changed.
    """
    with _opened(Path(path), known) as image:
        image.load()
        return _upright(image)


def image_losses(path: Path) -> list[str]:
    """What of a picture's content the model will not see, judged by the file's header.

    Raises:
        FeedError: as `open_image`, as far as the header tells.
    """
    with _opened(path) as image:
        found = {
            "have 16 bits per pixel, of which the upper 8 are used": image.mode.startswith("I"),
            "are partly transparent, which is dropped": "A" in image.getbands()
            or "transparency" in image.info,
            "have several frames, of which the first is used": getattr(image, "is_animated", False),
        }
    return [what for what, is_so in found.items() if is_so]


@contextmanager
def _opened(path: Path, known: Stamp | None = None) -> Iterator[Image.Image]:
    hint = "Save it as PNG or JPEG, or remove it from the folder."
    with readable(shown(path), "a picture", hint), warnings.catch_warnings():
        # Of a damaged note on the side (EXIF) nobody needs to hear. But Pillow warns above its
        # limit of pixels and refuses above twice of it; both are refused here.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with open_file(path, known) as stream:
            try:
                with Image.open(stream, formats=_FORMATS) as image:
                    if image.mode == "F":
                        raise ValueError("it has floating-point pixels, expected 8 or 16 bits")
                    yield image
            except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
                most = f"{Image.MAX_IMAGE_PIXELS:,}"
                raise ValueError(f"it has more pixels than Pillow's limit of {most}") from error
            except UnidentifiedImageError as error:
                raise ValueError("its content is of no known format") from error


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says, in mode L or RGB; transparency is dropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        if deep.size and (deep.min() < 0 or deep.max() > 65535):
            raise ValueError(f"its pixels are {deep.min()}..{deep.max()}, expected 8 or 16 bits")
        return Image.fromarray((deep >> 8).astype(np.uint8))
    if image.mode in ("P", "PA"):
        # By way of RGBA: Pillow warns about palettes whose transparency is a table.
        image = image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
