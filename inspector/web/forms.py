"""The two long forms: a quantization recipe, and models with their feeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import streamlit as st

from inspector.errors import FeedError, InspectorError, ModelError
from inspector.render import dump_json, shorten_name
from inspector.store import CPU_PROVIDER, FeedSource, PairOptions
from inspector.web import session, tasks, upload_field, widgets
from inspector.web.uploads import Uploaded
from inspector.web.words import md_code

# ── recipe ───────────────────────────────────────────────────────────────────────────────────

FORMATS = {"qdq": "QDQ", "qoperator": "QOperator", "dynamic": "Dynamic"}
TYPES = ("int8", "uint8", "int16", "uint16")
METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
# A select box takes None for "nothing chosen", so the three states have names.
_SYMMETRY = {"default": None, "symmetric": True, "asymmetric": False}


def recipe_summary(recipe: Mapping[str, Any]) -> str:
    """A recipe in one line."""
    parts = [widgets.format_label(dict(recipe))]
    if recipe.get("format") != "dynamic":
        parts.append(METHODS.get(str(recipe.get("method")), str(recipe.get("method"))))
    parts.append("per channel" if recipe.get("per_channel") else "per tensor")
    if recipe.get("equalize"):
        parts.append("equalized")
    return " · ".join(parts)


def _index(options: Sequence[Any], wanted: Any) -> int:
    return list(options).index(wanted) if wanted in options else 0


def recipe_form(recipe: Mapping[str, Any], op_types: Sequence[str], *, key: str) -> dict[str, Any]:
    """The recipe as changed in the form; options as on the command line.

    Args:
        recipe: what the form starts from.
        op_types: those of the float model.
        key: of the form; another one starts afresh.
    """
    changed = dict(recipe)

    def choice(
        label: str, name: str, options: Sequence[Any], names: Any = str, **kwargs: Any
    ) -> None:
        known = list(options)
        if recipe.get(name) not in known:
            known.append(recipe.get(name))
        changed[name] = st.selectbox(
            label,
            known,
            index=_index(known, recipe.get(name)),
            format_func=names,
            key=f"{key}-{name}",
            **kwargs,
        )

    def symmetry(label: str, name: str, **kwargs: Any) -> None:
        values = list(_SYMMETRY.values())
        chosen = st.selectbox(
            label,
            list(_SYMMETRY),
            index=_index(values, recipe.get(name)),
            format_func=str.capitalize,
            key=f"{key}-{name}",
            help="Default is what ONNX Runtime's quantizer does for the type.",
            **kwargs,
        )
        changed[name] = _SYMMETRY[chosen]

    def switch(label: str, name: str, meaning: str) -> None:
        changed[name] = st.toggle(
            label, value=bool(recipe.get(name)), key=f"{key}-{name}", help=meaning
        )

    left, right = st.columns(2, gap="small")
    with left:
        choice("Format", "format", tuple(FORMATS), lambda each: FORMATS.get(each, str(each)))
        static = changed["format"] != "dynamic"
        choice("Activations", "activation_type", TYPES, disabled=not static)
        symmetry("Activation range", "activation_symmetric", disabled=not static)
    with right:
        choice(
            "Calibration",
            "method",
            tuple(METHODS),
            lambda each: METHODS.get(each, str(each)),
            disabled=not static,
        )
        choice("Weights", "weight_type", TYPES)
        symmetry("Weight range", "weight_symmetric")
    if changed["method"] == "percentile" and static:
        changed["percentile"] = st.number_input(
            "Percentile",
            min_value=50.0,
            max_value=100.0,
            value=float(recipe.get("percentile") or 99.999),
            step=0.001,
            format="%.3f",
            key=f"{key}-percentile",
        )
    else:
        changed["percentile"] = None
    left, right = st.columns(2, gap="small")
    with left:
        switch("Per channel", "per_channel", "One scale per output channel of a weight.")
        switch("Pre-process", "preprocess", "Shape inference and optimisation before quantizing.")
    with right:
        switch("Reduce range", "reduce_range", "7 instead of 8 bits, for CPUs without VNNI.")
        switch(
            "Equalize",
            "equalize",
            "Even out channel ranges between layers first (cross-layer equalization).",
        )
    samples = st.number_input(
        "Calibration samples",
        min_value=1,
        value=recipe.get("calibration_samples"),
        placeholder="all",
        key=f"{key}-calibration_samples",
        disabled=not static,
        help="How many of the calibration feeds are used.",
    )
    changed["calibration_samples"] = None if samples is None else int(samples)
    known_ops = list(dict.fromkeys((*op_types, *recipe.get("op_types", ()))))
    changed["op_types"] = st.multiselect(
        "Op types to quantize",
        known_ops,
        default=list(recipe.get("op_types", ())),
        placeholder="all that are supported",
        key=f"{key}-op_types",
    )
    return changed


# ── models and feeds ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """What the load form holds.

    Attributes:
        float_path: the float model; None where none is chosen yet.
        quantized_path: None to quantize the float model with the defaults.
        inputs: None where none are chosen yet.
        calibration: None for the first half of the inputs.
        options: how the two are run and compared.
        title: as the user calls the pair.
    """

    float_path: Path | None
    quantized_path: Path | None
    inputs: FeedSource | None
    calibration: FeedSource | None
    options: PairOptions
    title: str


def lacking(chosen: Chosen | None, fits: bool) -> str:
    """Why the pair cannot be compared yet, in one line; "" where it can.

    Args:
        chosen: None where something chosen cannot be right.
        fits: whether the first feed can be read.
    """
    if upload_field.is_under_way():
        return "Files are still being uploaded."
    failed = upload_field.failed()
    if failed:
        names = ", ".join(md_code(shorten_name(name, 40)) for name in failed[:3])
        return f"Not uploaded: {names}. Remove it in its field, or try again there."
    if chosen is None or not fits:
        return "Put right what is said above first."
    missing = [] if chosen.float_path else ["a float model"]
    missing += [] if chosen.inputs else ["inputs"]
    if not missing:
        return ""
    optional = "" if chosen.quantized_path else " A quantized model is optional."
    return f"Still missing: {' and '.join(missing)}.{optional}"


Side = Literal["float", "quantized"]


def _store(key: str, path: Path, store: Callable[[Mapping[str, Path]], Path]) -> Path:
    """The path of an uploaded file or folder once the workspace has taken what is in the field.

    Args:
        key: of the field.
        path: of one of its files, or of their folder; any other path is not the field's and is
            returned as it is.
        store: makes the folder that holds the files, given by their names, and takes them.
    """
    inbox = upload_field.inbox(key)
    files = inbox.files()
    folders = {each.path.parent for each in files}
    if path not in folders and all(path != each.path for each in files):
        return path
    if not path.is_relative_to(inbox.folder):  # stored before
        return path
    folder = store({each.name: each.path for each in files})
    inbox.stored({each.id: folder / each.name for each in files})
    return folder if path in folders else folder / path.name


def _store_model(key: str, path: Path) -> Path:
    workspace = session.own_workspace()

    def store(files: Mapping[str, Path]) -> Path:
        if len(files) == 1:
            return workspace.add_model(path, path.name, move=True).path.parent
        return workspace.add_model_files(files, path.name, move=True).path.parent

    return _store(key, path, store)


def _store_feeds(key: str, source: FeedSource | None) -> FeedSource | None:
    if source is None or source.kind != "stored":
        return source
    workspace = session.own_workspace()
    path = _store(key, Path(source.path), lambda files: workspace.add_feeds(files, move=True))
    return replace(source, path=str(path))


def store(chosen: Chosen) -> Chosen:
    """The same, once the workspace has taken what was uploaded for it.

    Raises:
        ReportError: the workspace cannot be written.
    """
    assert chosen.float_path is not None
    quantized = chosen.quantized_path
    return replace(
        chosen,
        float_path=_store_model("upload-float", chosen.float_path),
        quantized_path=None if quantized is None else _store_model("upload-quantized", quantized),
        inputs=_store_feeds("upload-inputs", chosen.inputs),
        calibration=_store_feeds("upload-calibration", chosen.calibration),
    )


def _uploaded_model(files: Sequence[Uploaded], side: Side) -> Path:
    """The path of the model among a model and its external data.

    Raises:
        ModelError: not exactly one of the files is a model.
    """
    models = [each for each in files if each.name.lower().endswith(".onnx")]
    if len(files) == 1:
        models = list(files)  # its content says what it is, better than its name
    if len(models) != 1:
        names = ", ".join(each.name for each in files[:4]) + (", …" if len(files) > 4 else "")
        raise ModelError(
            f"The {side} side has {len(models)} .onnx files among {len(files)} ({names}), "
            "expected one with its data files",
            hint="Drop one model per side, with its external data files if it has any.",
        )
    return models[0].path


def _model_field(side: Side, label: str, meaning: str) -> Path | None:
    """The chosen model of one side: an upload, or a path on this machine."""
    files = upload_field.upload_field(label, key=f"upload-{side}", meaning=meaning)
    path = ""
    if session.is_local():
        path = (
            st.text_input(
                "or its path on this machine",
                key=f"path-{side}",
                placeholder="/path/to/model.onnx",
                help="Large models and external data are best read where they are.",
            )
            or ""
        ).strip()
    if path:
        return Path(path).expanduser()
    return _uploaded_model(files, side) if files else None


def _numbers(text: str, what: str) -> list[float]:
    """The numbers in a text field.

    Raises:
        FeedError: something else stands there.
    """
    try:
        numbers = [float(each) for each in text.replace(",", " ").split()]
    except ValueError:
        numbers = []
    if not numbers:
        raise FeedError(
            f"{what} is {text!r}, expected one number or one per channel",
            hint=f"Write {what} as 0.485 0.456 0.406, for example.",
        )
    return numbers


def _text(numbers: Any) -> str:
    return " ".join(f"{each:g}" for each in (numbers if isinstance(numbers, list) else [numbers]))


def preprocess_form(key: str) -> dict[str, Any] | None:
    """How pictures become tensors; None while the presets are being asked for.

    Raises:
        FeedError: a field holds no number.
    """
    answer = session.ask(("presets",), tasks.preprocess_presets, title="Reading the presets")
    if answer.job is not None:
        widgets.waiting(answer.job, height=210, key="presets")
        return None
    if answer.error is not None:
        widgets.error(answer.error)
        return None
    presets: dict[str, dict[str, Any]] = answer.value
    titles = {
        "yolo": "YOLO (letterbox, 0…1)",
        "torchvision": "torchvision (ImageNet)",
        "tf": "TF (-1…1)",
        "bgr": "Raw BGR (0…255)",
    }
    name = st.segmented_control(
        "Preset",
        list(presets),
        default=next(iter(presets)),
        format_func=lambda each: titles.get(each, each),
        key=f"{key}-preset",
        required=True,
    )
    start = presets[name or next(iter(presets))]
    own = f"{key}-{name}"
    made = dict(start)
    first, second, third, fourth = st.columns(4, gap="small")
    resizes = {"stretch": "Stretch", "letterbox": "Letterbox", "center_crop": "Centre crop"}
    with first:
        made["resize"] = st.selectbox(
            "Resize",
            list(resizes),
            index=_index(list(resizes), start["resize"]),
            format_func=resizes.__getitem__,
            key=f"{own}-resize",
        )
        size = st.text_input("Height × width", placeholder="the model's own", key=f"{own}-size")
    with second:
        layouts = ("the model's own", "NCHW", "NHWC")
        layout = st.selectbox(
            "Layout", layouts, index=_index(layouts, start["layout"]), key=f"{own}-layout"
        )
        made["layout"] = None if layout == layouts[0] else layout
        colors = ("RGB", "BGR", "GRAY")
        made["color"] = st.selectbox(
            "Colour order", colors, index=_index(colors, start["color"]), key=f"{own}-color"
        )
    with third:
        made["scale"] = st.number_input(
            "Scale", value=float(start["scale"]), format="%.6f", step=0.001, key=f"{own}-scale"
        )
        mean = st.text_input("Mean", value=_text(start["mean"]), key=f"{own}-mean")
    with fourth:
        std = st.text_input("Std", value=_text(start["std"]), key=f"{own}-std")
        if made["resize"] == "letterbox":
            pad = st.text_input(
                "Pad colour (RGB)", value=_text(start["pad_color"]), key=f"{own}-pad"
            )
            made["pad_color"] = [int(each) for each in _numbers(pad, "the pad colour")]
    made["mean"], made["std"] = _numbers(mean or "", "mean"), _numbers(std or "", "std")
    if size and size.strip():
        both = _numbers(size.replace("×", " ").replace("x", " "), "the size")
        made["size"] = [int(each) for each in (both * 2 if len(both) == 1 else both)]
    st.caption("x = (pixel × scale − mean) / std, in the model's channel order")
    return made


_WAYS = {"upload": "Upload", "path": "Path on this machine", "random": "Random"}
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def _feed_field(role: str, below: Any, *, optional: bool) -> FeedSource | None:
    """The chosen feeds: uploads, a path, or seeded noise.

    Args:
        role: "inputs" or "calibration".
        below: the container for the form that says how pictures become tensors.
        optional: whether nothing may be chosen.

    Raises:
        FeedError: a field of the preprocess form holds no number.
    """
    ways = {"none": "First half of the inputs"} if optional else {}
    ways |= {key: each for key, each in _WAYS.items() if key != "path" or session.is_local()}
    if optional:
        ways.pop("random", None)
    way = st.segmented_control(
        role,
        list(ways),
        default=next(iter(ways)),
        format_func=ways.__getitem__,
        key=f"way-{role}",
        required=True,
        label_visibility="collapsed",
    )
    if way in (None, "none"):
        return None
    if way == "random":
        left, right = st.columns(2, gap="small")
        samples = left.number_input("Samples", 1, 1000, 8, key=f"random-samples-{role}")
        seed = right.number_input("Seed", 0, 2**31 - 1, 0, key=f"random-seed-{role}")
        st.caption("Seeded noise: good for finding broken nodes, not for judging accuracy.")
        return FeedSource(
            kind="random",
            samples=int(samples),
            seed=int(seed),
            title=f"{int(samples)} random feeds (seed {int(seed)})",
        )
    if way == "upload":
        files = upload_field.upload_field(
            "Feeds: .npz, .npy, pictures, texts.txt, or ONNX's input_*.pb",
            key=f"upload-{role}",
            meaning="One .npz per sample, or one .npz or .npy with a leading sample axis; or "
            "texts.txt, one sample per line, with tokenizer.json. labels.json and "
            "preprocess.json may come along.",
        )
        if not files:
            return None
        pictures = any(each.name.lower().endswith(_PICTURES) for each in files)
        own = any(each.name == "preprocess.json" for each in files)
        texts = any(each.name == "texts.txt" for each in files)
        whole = len(files) > 1 or pictures or texts
        path = files[0].path.parent if whole else files[0].path
        title = files[0].name if len(files) == 1 else f"{len(files)} files"
        kind = "stored"
    else:
        entered = (
            st.text_input(
                "Folder or file",
                key=f"path-{role}",
                placeholder="/path/to/feeds",
                help="A folder of .npz, of pictures or with texts.txt and tokenizer.json, one "
                ".npz or .npy, or test_data_set_*.",
            )
            or ""
        ).strip()
        if not entered:
            return None
        path = Path(entered).expanduser()
        pictures = _holds_pictures(path)
        own = (path / "preprocess.json").is_file()
        title, kind = path.name, "path"
    preprocess = None
    if pictures and not own:
        with below:
            st.markdown(f"**How the {role} become tensors**")
            preprocess = preprocess_form(f"preprocess-{role}")
        if preprocess is None:
            return None
    elif own:
        st.caption("Pictures are prepared as their preprocess.json says.")
    return FeedSource(kind=kind, path=str(path), preprocess=preprocess, title=title)


def _holds_pictures(path: Path) -> bool:
    try:
        return any(each.suffix.lower() in _PICTURES for each in path.iterdir())
    except OSError:
        return False  # not a folder: what it is, the worker says


def _options_form(float_path: Path | None, inputs: FeedSource | None) -> PairOptions:
    """What is asked for rarely: padding, states, a device's tensors, where the models run."""
    with st.expander("More: task metric, padding, states, device, provider", key="more"):
        if float_path is None:
            st.caption("Choose a float model first: its inputs and outputs are offered here.")
            return PairOptions()
        answer = session.ask(
            ("options", str(float_path), upload_field.version(float_path)),
            tasks.list_options,
            float_path=float_path,
            title="Looking for inputs and states",
        )
        if answer.job is not None:
            widgets.waiting(answer.job, height=150, key="options")
            return PairOptions()
        if answer.error is not None:
            # Said once, where the model or the feeds were chosen.
            st.caption("The float model or its inputs cannot be read yet.")
            return PairOptions()
        return _options_fields(answer.value, _padding_mask(float_path, inputs))


def _padding_mask(float_path: Path, inputs: FeedSource | None) -> str:
    """The input that marks padding in the chosen feeds, once they were looked at; "" for none."""
    if inputs is None:
        return ""
    version = upload_field.version(float_path, Path(inputs.path))
    answer = session.ask(
        ("mask", str(float_path), dump_json(inputs.to_json()), version),
        tasks.list_options,
        float_path=float_path,
        inputs=inputs,
        title="Looking for padding",
    )
    return str(answer.value["mask"]) if answer.value else ""


def _options_fields(found: Mapping[str, Any], padding: str) -> PairOptions:
    metrics = found["metrics"]
    metric = st.selectbox(
        "Task metric",
        metrics,
        index=None,
        placeholder="none: outputs are judged by SQNR" if metrics else "no floating-point output",
        key="option-metric",
        accept_new_options=True,
        disabled=not metrics,
        format_func=lambda text: f"{text} · {metrics[text]}" if text in metrics else text,
        help="What the outputs are worth to their user, beside SQNR: measured from outputs alone. "
        "Options may be added, e.g. `detection_f1@yolov8,score=0.4`; the README lists them.",
    )
    left, right = st.columns(2, gap="medium")
    with left:
        mask = st.selectbox(
            "Mask input",
            found["inputs"],
            index=None,
            placeholder="none: every position counts",
            key="option-mask",
            format_func=lambda name: shorten_name(name, 50),
            help="Positions where this input is 0 are padding: no figure counts them.",
        )
        if padding and not mask:
            st.caption(f"The samples are padded where {md_code(padding)} is 0: choose it here.")
        device = ""
        if session.is_local():
            device = (
                st.text_input(
                    "Tensors dumped from a device",
                    key="option-device",
                    placeholder="/path/to/folder",
                    help="One .npz per sample, keyed by tensor name: set beside what this machine "
                    "computes for the loaded quantized model.",
                )
                or ""
            ).strip()
    with right:
        pairs = [(str(output), str(given)) for output, given in found["states"]]
        states = st.multiselect(
            "States (output → input of the next sample)",
            pairs,
            placeholder="none: samples are independent",
            key="option-states",
            format_func=lambda pair: f"{shorten_name(pair[0], 26)} → {shorten_name(pair[1], 26)}",
            disabled=not pairs,
            help="Each model gets its own state back with the next sample, as on a device.",
        )
        likely = [
            f"{md_code(output)} → {md_code(given)}" for output, given in found["likely_states"]
        ]
        if likely and not states:
            st.caption(f"Looks like a state: {', '.join(likely[:3])}")
        providers = list(dict.fromkeys((CPU_PROVIDER, *found["providers"])))
        provider = st.selectbox(
            "Deployed on",
            providers,
            key="option-provider",
            format_func=lambda name: name.removesuffix("ExecutionProvider"),
            help="ONNX Runtime's execution provider of the deployed runs; this installation has "
            "these.",
        )
    return PairOptions(
        mask=mask or "",
        states=tuple((output, given) for output, given in states),
        device=str(Path(device).expanduser()) if device else "",
        provider=provider or CPU_PROVIDER,
        metric=(metric or "").strip(),
    )


def _check_uploaded(
    float_path: Path | None,
    quantized_path: Path | None,
    inputs: FeedSource | None,
    calibration: FeedSource | None,
) -> None:
    """Refuses what does not lie in the user's workspace, should a field ever let it through.

    Raises:
        ModelError: something else is named.
    """
    feeds = [each for each in (inputs, calibration) if each is not None and each.kind != "random"]
    paths = [each for each in (float_path, quantized_path) if each is not None]
    paths += [Path(each.path) for each in feeds]
    own = session.own_root().resolve()
    if any(not each.resolve().is_relative_to(own) for each in paths) or any(
        each.kind == "path" for each in feeds
    ):
        raise ModelError(
            "Something was named that was not uploaded",
            hint="Upload the models and their inputs.",
        )


def _is_upload(path: Path) -> bool:
    return any(path == each.path for each in upload_field.inbox("upload-float").files())


def load_form() -> Chosen:
    """What the user chose in the form for a pair of their own.

    Raises:
        InspectorError: something chosen cannot be right.
    """
    problem: InspectorError | None = None
    float_path = quantized_path = None
    inputs = calibration = None
    left, right = st.columns(2, gap="medium")
    with left:
        st.markdown("**Float model**")
        try:
            float_path = _model_field(
                "float",
                "Float model (.onnx, with its data files)",
                "External data files are dropped together with the model.",
            )
        except InspectorError as error:
            problem = error
    with right:
        st.markdown("**Quantized model** (optional)")
        try:
            quantized_path = _model_field(
                "quantized",
                "Quantized model (.onnx, with its data files)",
                "Leave empty to quantize the float model with ONNX Runtime's defaults.",
            )
        except InspectorError as error:
            problem = error
    left, right = st.columns(2, gap="medium")
    below = st.container()
    with left:
        st.markdown("**Inputs**")
        try:
            inputs = _feed_field("inputs", below, optional=False)
        except InspectorError as error:
            problem = error
    with right:
        st.markdown("**Calibration**")
        try:
            calibration = _feed_field("calibration", below, optional=True)
        except InspectorError as error:
            problem = error
    options = _options_form(float_path, inputs)
    if problem is not None:
        raise problem
    if not session.is_local():
        _check_uploaded(float_path, quantized_path, inputs, calibration)
    title = float_path.stem if float_path is not None else ""
    if title in ("model", "float") and float_path is not None and not _is_upload(float_path):
        title = float_path.absolute().parent.name
    return Chosen(
        float_path=float_path,
        quantized_path=quantized_path,
        inputs=inputs,
        calibration=calibration,
        options=options,
        title=title,
    )
