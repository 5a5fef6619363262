"""Images: pixels by the formula, every recipe fault one clear sentence, sizes as torchvision's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image

from inspector.errors import FeedError
from inspector.images import PRESETS, Preprocess, open_image, read_preprocess
from inspector.model import Model

Shape = Sequence[int | str | None]
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def model_of(**inputs: tuple[str, Shape]) -> Model:
    """A model that hands its inputs on: name=(dtype, shape)."""
    values, nodes, outputs = [], [], []
    for name, (dtype, shape) in inputs.items():
        kind = getattr(
            TensorProto, {"float32": "FLOAT", "float64": "DOUBLE"}.get(dtype, dtype.upper())
        )
        values.append(helper.make_tensor_value_info(name, kind, shape))
        nodes.append(helper.make_node("Identity", [name], [f"{name}_out"], f"id_{name}"))
        outputs.append(helper.make_tensor_value_info(f"{name}_out", kind, shape))
    graph = helper.make_graph(nodes, "g", values, outputs)
    return Model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    )


IMAGE_MODEL = model_of(x=("float32", (1, 3, 4, 6)))
ROW_MODEL = model_of(x=("float32", ("batch", 3)))


def picture(width: int = 6, height: int = 4, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def image_folder(folder: Path, *images: Image.Image, recipe: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        image.save(folder / f"{index}.png")
    if recipe is not None:
        (folder / "preprocess.json").write_text(json.dumps(recipe))
    return folder


def test_presets_have_the_ranges_they_are_known_for() -> None:
    white, black = (Image.new("RGB", (6, 4), c) for c in ("white", "black"))

    def ends(name: str) -> tuple[list[float], list[float]]:
        recipe = PRESETS[name].fitted(IMAGE_MODEL)
        low, high = recipe.apply(black)[0, :, 0, 0], recipe.apply(white)[0, :, 0, 0]
        return [round(float(v), 3) for v in low], [round(float(v), 3) for v in high]

    assert {name: recipe.resize for name, recipe in PRESETS.items()} == {
        "yolo": "letterbox",
        "torchvision": "center_crop",
        "tf": "stretch",
        "bgr": "stretch",
    }
    assert ends("yolo") == ([0, 0, 0], [1, 1, 1])
    assert ends("tf") == ([-1, -1, -1], [1, 1, 1])
    assert ends("bgr") == ([0, 0, 0], [255, 255, 255])
    assert ends("torchvision") == ([-2.118, -2.036, -1.804], [2.249, 2.429, 2.64])


def test_a_recipe_that_overflows_gives_infinity_without_a_warning() -> None:
    recipe = Preprocess(scale=1e29, std=1e-29).fitted(IMAGE_MODEL)  # type: ignore[arg-type]
    assert np.isinf(recipe.apply(Image.new("RGB", (6, 4), "white"))).all()


def test_a_damaged_note_in_a_picture_raises_no_warning(tmp_path: Path) -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05\0\0\0\x09\xff\xff\xff\0"
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(tmp_path / "a.jpg").size == (6, 4)


def test_colour_order_and_layout() -> None:
    red = Image.new("RGB", (6, 4), (200, 100, 50))
    rgb = Preprocess().fitted(IMAGE_MODEL).apply(red)
    bgr = PRESETS["bgr"].fitted(IMAGE_MODEL).apply(red)
    assert rgb[0, :, 0, 0].tolist() == [200, 100, 50]
    assert bgr[0, :, 0, 0].tolist() == [50, 100, 200]
    nhwc = Preprocess().fitted(model_of(x=("float32", (None, 4, 6, 3))))
    assert nhwc.layout == "NHWC"
    assert nhwc.apply(red).shape == (1, 4, 6, 3)
    gray = Preprocess(color="GRAY").fitted(model_of(x=("float32", (1, 1, 4, 6))))
    assert gray.apply(red).shape == (1, 1, 4, 6)
    assert abs(float(gray.apply(red)[0, 0, 0, 0]) - (0.299 * 200 + 0.587 * 100 + 0.114 * 50)) < 1


def test_letterbox_keeps_proportions_and_pads() -> None:
    recipe = Preprocess(resize="letterbox", size=(100, 100), pad_color=(1, 2, 3))
    out = recipe.picture(Image.new("RGB", (200, 100), "white"))
    assert (out[0, 0].tolist(), out[99, 99].tolist()) == ([1, 2, 3], [1, 2, 3])
    assert (out[25:75] == 255).all()
    assert (out[:25] != 255).all()
    assert (out[75:] != 255).all()
    tall = recipe.picture(Image.new("RGB", (100, 200), "white"))
    assert np.array_equal(tall, out.transpose(1, 0, 2))


def test_center_crop_is_torchvisions_resize_and_crop() -> None:
    # An independent account of torchvision's Resize(256) and CenterCrop(224).
    for width, height in ((300, 451), (451, 300), (256, 256), (225, 900)):
        image = picture(width, height, seed=width)
        if width <= height:
            size = (256, int(256 * height / width))
        else:
            size = (int(256 * width / height), 256)
        left, top = round((size[0] - 224) / 2.0), round((size[1] - 224) / 2.0)
        expected = image.resize(size, Image.Resampling.BILINEAR).crop(
            (left, top, left + 224, top + 224)
        )
        recipe = Preprocess.from_json({"preset": "torchvision", "size": 224})
        difference = recipe.picture(image).astype(int) - np.asarray(expected).astype(int)
        assert np.abs(difference).max() <= 1


# Output and picture sizes whose quotient times the first rounds above the second.
FULL_WIDTHS = ((7, 29), (299, 698))


@quick
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    resize=st.sampled_from(["stretch", "letterbox", "center_crop"]),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    crop_fraction=st.sampled_from([1.0, 0.875, 0.3]),
)
def test_every_picture_comes_out_in_the_models_size(
    width: int, height: int, resize: str, size: tuple[int, int], crop_fraction: float
) -> None:
    recipe = Preprocess(resize=resize, size=size, crop_fraction=crop_fraction)
    out = recipe.picture(Image.new("RGB", (width, height), "white"))
    assert out.shape == (*size, 3)
    if resize != "letterbox":
        assert (out == 255).all()


def test_a_crop_of_the_full_width_stays_inside_the_picture() -> None:
    for size, width in FULL_WIDTHS:
        assert size * (width / size) > width
        recipe = Preprocess(resize="center_crop", size=(size, size))
        assert recipe.picture(Image.new("RGB", (width, width))).shape == (size, size, 3)


def test_a_very_long_picture_is_cropped_without_computing_all_of_it() -> None:
    recipe = Preprocess(resize="center_crop", size=(224, 224), crop_fraction=0.875)
    assert recipe.picture(Image.new("RGB", (200_000, 1), "white")).shape == (224, 224, 3)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 255, 255), (0, 0, 20, 20))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: white comes to the top
    image.save(tmp_path / "a.jpg", exif=exif)
    upright = open_image(tmp_path / "a.jpg")
    assert upright.size == (20, 40)
    assert np.asarray(upright)[:15].min() > 200
    assert np.asarray(upright)[25:].max() < 50


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I"])
def test_every_mode_of_pixels_is_read(tmp_path: Path, mode: str) -> None:
    if mode.startswith("I"):
        deep = np.full((4, 6), 200 << 8 | 13, np.uint16)
        image = Image.fromarray(deep)
        image = image.convert("I") if mode == "I" else image
    else:
        image = Image.new("RGB", (6, 4), "white").convert(mode)
    file = tmp_path / ("a.tiff" if mode in ("CMYK", "I") else "a.png")
    image.save(file)
    out = Preprocess(size=(4, 6)).apply(open_image(file))
    assert out.shape == (1, 3, 4, 6)
    assert out.min() == out.max() == (200 if mode.startswith("I") else 255)


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.new("F", (6, 4)).save(tmp_path / "a.tiff")
    with pytest.raises(FeedError, match=r"a\.tiff cannot be read as a picture: it has floating-p"):
        open_image(tmp_path / "a.tiff")


@pytest.mark.filterwarnings("default")  # as outside of the tests
@pytest.mark.parametrize("factor", [1, 3])
def test_a_picture_above_pillows_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: int
) -> None:
    Image.new("L", (30, 10 * factor)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    with pytest.raises(FeedError, match="it has more pixels than Pillow's limit of 299"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"preset": "imagenet"}, 'preset "imagenet", expected one of yolo, torchvision, tf, bgr'),
        ({"resize": "fit"}, 'resize "fit", expected one of stretch, letterbox, center_crop'),
        ({"size": [4]}, "size [4], expected [height, width] in pixels"),
        ({"size": [0, 4]}, "size [0, 4], expected [height, width] in pixels"),
        ({"size": "big"}, 'size "big", expected [height, width] in pixels'),
        ({"size": [10**6, 10**6]}, "size [1000000, 1000000], expected [height, width] in pixels"),
        ({"layout": "CHW"}, 'layout "CHW", expected one of NCHW, NHWC'),
        ({"color": "YUV"}, 'color "YUV", expected one of RGB, BGR, GRAY'),
        ({"pad_color": 300}, "pad_color 300, expected three numbers of 0..255"),
        ({"scale": 0}, "scale 0, expected a number other than 0"),
        ({"scale": "1/255"}, 'scale "1/255", expected a number other than 0'),
        ({"scale": True}, "scale true, expected a number other than 0"),
        ({"mean": [1, 2]}, "mean [1, 2], expected one number, or one per channel for RGB"),
        ({"std": 0}, "std 0, expected one number other than 0, or one per channel for RGB"),
        (
            {"preset": "torchvision", "color": "GRAY"},
            "mean [0.485, 0.456, 0.406], expected one number, or one per channel for GRAY",
        ),
        ({"crop_fraction": 0}, "crop_fraction 0, expected a number above 0 and at most 1"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(
    tmp_path: Path, recipe: dict[str, Any], message: str
) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps(recipe))
    with pytest.raises(FeedError) as caught:
        read_preprocess(file)
    assert caught.value.message == f"p.json: preprocess has {message}"
    # The hint is a field that can be written as it stands.
    field = caught.value.hint.removeprefix("Write e.g. ").removesuffix(".")
    Preprocess.from_json(json.loads(f"{{{field}}}"))


def test_an_unknown_field_names_the_nearest() -> None:
    with pytest.raises(FeedError) as caught:
        Preprocess.from_json({"colour": "RGB"})
    assert caught.value.message == (
        "preprocess has the unknown field 'colour'; nearest are color, pad_color, layout"
    )
    with pytest.raises(FeedError, match="nearest are preset"):
        Preprocess.from_json({"presets": "yolo"})


def test_a_recipe_file_that_is_missing_or_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FeedError, match="does not exist"):
        read_preprocess(tmp_path / "none.json")
    for text, message in (("[1]", "holds a list"), ("{", "cannot be read as preprocessing")):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(FeedError, match=message):
            read_preprocess(tmp_path / "p.json")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_survives_json(preset: str) -> None:
    recipe = PRESETS[preset].fitted(IMAGE_MODEL)
    assert Preprocess.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert Preprocess.from_json({"preset": preset}) == PRESETS[preset]
    british = {"preset": preset, "resize": "Centre-Crop", "layout": "nchw"}
    assert Preprocess.from_json(british).resize == "center_crop"


@pytest.mark.parametrize(
    ("model", "recipe", "message", "hint"),
    [
        (
            IMAGE_MODEL,
            Preprocess(size=(6, 4)),
            "preprocess has size [6, 4], expected [height, width] (4, 6) of input 'x' (1, 3, 4, 6)",
            'Leave "size" out, or write the model\'s own.',
        ),
        (
            IMAGE_MODEL,
            Preprocess(layout="NHWC"),
            "preprocess says layout NHWC, but input 'x' (1, 3, 4, 6) is NCHW",
            'Write "layout": "NCHW".',
        ),
        (
            IMAGE_MODEL,
            Preprocess(color="GRAY"),
            "input 'x' (1, 3, 4, 6) has no axis of 1, which color GRAY gives",
            'Write "color": "RGB".',
        ),
        (
            model_of(x=("float32", (1, 4, 8, 8))),
            Preprocess(),
            "input 'x' (1, 4, 8, 8) has no axis of 3, which color RGB gives",
            "Save the inputs as .npz, one file per sample, keyed by input name.",
        ),
        (
            model_of(x=("float32", (1, 3, "h", "w"))),
            Preprocess(),
            "input 'x' (1, 3, h, w) leaves the picture's size open, and preprocess names none",
            'Write the size as [height, width], e.g. "size": [640, 640].',
        ),
        (
            model_of(x=("float32", (8, 3, 4, 6))),
            Preprocess(),
            "input 'x' (8, 3, 4, 6) takes 8 pictures at once, "
            "expected a batch of 1 for image feeds",
            "Export the model with batch size 1 or a dynamic batch.",
        ),
        (
            ROW_MODEL,
            Preprocess(),
            "model takes x (batch, 3), expected one picture of 3 or 4 axes for image feeds",
            "Save the inputs as .npz, one file per sample, keyed by input name.",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_the_model_is_refused(
    model: Model, recipe: Preprocess, message: str, hint: str
) -> None:
    with pytest.raises(FeedError) as caught:
        recipe.fitted(model)
    assert (caught.value.message, caught.value.hint) == (message, hint)
