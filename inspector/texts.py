"""Texts as model inputs: one per line, handed on as strings or as the ids of a tokenizer.

The tokenizer is a ``tokenizer.json`` of the Hugging Face package ``tokenizers`` (extra ``text``),
imported only when a text is turned into ids. Texts are tokenized when a sample is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from inspector.arrays import (
    Arrays,
    Samples,
    Stamp,
    convert,
    counted,
    is_static,
    listed,
    open_file,
    printable,
    read_file,
    readable,
    shape_text,
    shown,
    stamp,
)
from inspector.errors import FeedError
from inspector.model import Model, TensorInfo
from inspector.random_feeds import index_limits

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
MAX_TEXTS_BYTES = 64 * 2**20
# Large vocabularies take some 35 MB.
MAX_TOKENIZER_BYTES = 64 * 2**20
# A token costs a tokenizer over a hundred bytes.
MAX_LINE_BYTES = 2**20
MAX_TOKENS = 2**20
_NAME_LENGTH = 40
_SAVE_AGAIN = "Save it again with tokenizer.save(), of the Python package tokenizers."

# What an input is called that takes each part of a tokenized text.
_ROLES = {
    **dict.fromkeys(("input_ids", "input", "inputs", "ids", "tokens", "token_ids"), "ids"),
    **dict.fromkeys(("input_word_ids", "word_ids"), "ids"),
    **dict.fromkeys(("attention_mask", "mask", "input_mask"), "mask"),
    **dict.fromkeys(("token_type_ids", "segment_ids", "input_type_ids"), "types"),
    **dict.fromkeys(("position_ids", "positions"), "positions"),
}
_PADS = ("[PAD]", "<pad>", "<|pad|>")


def _role(info: TensorInfo, inputs: Sequence[TensorInfo]) -> str:
    """What of a tokenized text an input takes; "" for nothing that its name tells."""
    name = re.sub(r"^serving_default_|:\d+$", "", info.name.lower()).rsplit("/", 1)[-1]
    if len(inputs) == 1 and info.dtype in ("int32", "int64"):
        return "ids"
    return _ROLES.get(name, "")


def takes_text(inputs: Sequence[TensorInfo]) -> bool:
    """Whether texts can give all of a model's inputs, judged by their names and types."""
    if [i.dtype for i in inputs] == ["string"]:
        return True
    roles = [_role(i, inputs) for i in inputs if i.dtype != "string"]
    return len(roles) == len(inputs) and all(roles) and roles.count("ids") == 1


# ------------------------------------------------------------------------------------------ texts


def _lines(path: Path, known: Stamp | None = None) -> tuple[list[str], list[str]]:
    """A file's texts, and what was left out of it."""
    hint = "Write one text per line, encoded in UTF-8."
    with readable(shown(path), "texts", hint):
        content = read_file(path, MAX_TEXTS_BYTES, known)
        notes = []
        if content.startswith(b"\xef\xbb\xbf"):
            content = content[3:]
            notes.append(f"{shown(path)}: the byte order mark at its beginning is left out")
        texts = []
        empty = 0
        for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"line {number:,} has {len(line):,} bytes, expected at most {MAX_LINE_BYTES:,}"
                )
            try:
                text = line.removesuffix(b"\r").decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"line {number:,} is not UTF-8 (byte {line[error.start]:#04x} at position "
                    f"{error.start:,})"
                ) from error
            if text.strip():
                texts.append(text)
            else:
                empty += 1
    if not texts:
        raise FeedError(f"{shown(path)} holds no text, expected one per line", hint=hint)
    if empty:
        verb = "is" if empty == 1 else "are"
        notes.append(f"{shown(path)}: {counted(empty, 'empty line')} {verb} left out")
    return texts, notes


# -------------------------------------------------------------------------------------- tokenizer


@contextmanager
def _tokenizing(path: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        # The package raises plain Exception for every fault, and a class that cannot be imported
        # where it panics.
        if type(error) is Exception or type(error).__name__ == "PanicException":
            reason = printable(" ".join(str(error).split()))
            raise FeedError(
                f"{shown(path)} cannot {doing}: {reason}",
                hint=_SAVE_AGAIN,
            ) from error
        raise


@dataclass(frozen=True, kw_only=True, slots=True)
class _Encoder:
    """A tokenizer that never pads, and what its file says about padding.

    Attributes:
        pad_id, pad_type_id: of a padding token; None where the file knows no such token.
        left: padding goes before the text.
        cut: most tokens of a text; None where there is no limit.
    """

    tokenizer: Tokenizer
    pad_id: int | None
    pad_type_id: int
    left: bool
    cut: int | None


@lru_cache(maxsize=1)
def _encoder(path: Path, known: Stamp, length: int | None) -> _Encoder:
    """The tokenizer in a file, which cuts at `length` tokens; as the file says where None."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise FeedError(
            "texts become token ids by the package tokenizers, which is not installed",
            hint='Run: pip install "quant-inspector[text]"',
        ) from error
    with readable(shown(path), "a tokenizer", _SAVE_AGAIN):
        content = read_file(path, MAX_TOKENIZER_BYTES, known).decode("utf-8")
    with _tokenizing(path, "be read as a tokenizer"):
        tokenizer = Tokenizer.from_str(content)
        padding: dict[str, Any] = tokenizer.padding or {}
        cut: dict[str, Any] = tokenizer.truncation or {}
        # Padding is done here: a length in the file may be anything, and the package would end
        # the process where memory does not suffice.
        tokenizer.no_padding()
        special = tokenizer.num_special_tokens_to_add(False)
        if length is not None:
            if length <= special:
                raise FeedError(
                    f"the model takes {counted(length, 'token')}, but {shown(path)} adds "
                    f"{special} of its own to every text",
                    hint="Export the model with a dynamic or a longer token axis.",
                )
            tokenizer.enable_truncation(length, direction=cut.get("direction", "right"))
        pads = [padding.get("pad_id"), *(tokenizer.token_to_id(pad) for pad in _PADS)]
    return _Encoder(
        tokenizer=tokenizer,
        pad_id=next((pad for pad in pads if pad is not None), None),
        pad_type_id=padding.get("pad_type_id", 0),
        left=padding.get("direction") == "left",
        cut=length or cut.get("max_length"),
    )


def _find_tokenizer(folder: Path, model: Model) -> Path:
    """The ``tokenizer.json`` beside the texts, beside the model or in the folder above it."""
    folders = [folder]
    if model.path is not None:
        folders += list(model.path.absolute().parents)[:2]
    for place in folders:
        if (place / TOKENIZER).is_file():
            return place / TOKENIZER
    beside = "" if model.path is None else f", and neither has the folder of {model.name}"
    raise FeedError(
        f"{shown(folder)} has texts but no {TOKENIZER}, which turns them into token ids{beside}",
        hint=f"Put the model's {TOKENIZER} (Hugging Face tokenizers) beside the texts.",
    )


# ----------------------------------------------------------------------------------------- source


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSource:
    """One sample per line of a file.

    Attributes:
        file: with one text per line, and its stamp.
        inputs: each of the model's inputs and what of a text it takes; "text" for the text itself.
        tokenizer: the tokenizer's file and stamp; None where texts are handed on.
        length: tokens of every sample; None where each has its own number.
        limit: least and greatest id that the model looks up, and why; None where unknown.
    """

    file: tuple[Path, Stamp]
    inputs: tuple[tuple[TensorInfo, str], ...]
    tokenizer: tuple[Path, Stamp] | None = None
    length: int | None = None
    limit: tuple[int, int, str] | None = None

    def samples(self, indices: Sequence[int]) -> Samples:
        texts, _ = _lines(*self.file)
        if self.tokenizer is not None:
            # Once read it is kept, and would not show that it changed.
            with readable(shown(self.tokenizer[0]), "a tokenizer", _SAVE_AGAIN):
                open_file(*self.tokenizer).close()
        for index in indices:
            where = f"{shown(self.file[0])}: text {index}"
            if self.tokenizer is None:
                values = {"text": np.array([texts[index]], object)}
            else:
                values = self._tokens(texts[index], where)
            feed: Arrays = {}
            for info, role in self.inputs:
                shape = values[role].shape if role != "text" else ()
                rank = len(shape) + 1 if info.shape is None else len(info.shape)
                array = values[role].reshape((1,) * (rank - len(shape)) + shape)
                feed[info.name] = convert(array, info, f"{where}: {info.name!r}")
            yield feed

    def _tokens(self, text: str, where: str) -> dict[str, NDArray[Any]]:
        assert self.tokenizer is not None
        path, known = self.tokenizer
        encoder = _encoder(path, known, self.length)
        with _tokenizing(path, f"turn {where} into tokens"):
            encoding = encoder.tokenizer.encode(text)
        found = {"ids": encoding.ids, "mask": encoding.attention_mask, "types": encoding.type_ids}
        count = len(encoding.ids)
        if count > (self.length or MAX_TOKENS) or not count:
            raise FeedError(
                f"{where} becomes {count:,} tokens, expected 1 to {self.length or MAX_TOKENS:,}",
                hint="Shorten the text or leave it out.",
            )
        if self.limit is not None:
            low, high, why = self.limit
            wrong = next((i for i in encoding.ids if not low <= i <= high), None)
            if wrong is not None:
                raise FeedError(
                    f"{where} has the token id {wrong:,}, expected {low:,}..{high:,} for {why}",
                    hint=f"Take the {TOKENIZER} that the model was trained with.",
                )
        length = self.length or count
        pads = {"ids": encoder.pad_id or 0, "mask": 0, "types": encoder.pad_type_id}
        tokens = {}
        for role, values in found.items():
            tokens[role] = np.full(length, pads[role], np.int64)
            tokens[role][length - count if encoder.left else 0 :][:count] = values
        return {**tokens, "positions": np.arange(length)}


def text_source(path: Path, model: Model) -> tuple[TextSource, list[str], list[str]]:
    """A file of texts for a model's inputs; a name for each sample; notes.

    Raises:
        FeedError: the file holds no texts, the model takes other inputs, or the tokenizer is
            missing or damaged.
    """
    with readable(shown(path), "texts", "Write one text per line, encoded in UTF-8."):
        file = (path, stamp(path))
    texts, notes = _lines(*file)
    width = len(str(len(texts) - 1))
    names = []
    for index, text in enumerate(texts):
        more = "…" if len(text) > _NAME_LENGTH else ""
        names.append(f"{index:0{width}} {printable(text[:_NAME_LENGTH])}{more}")
    inputs = model.inputs
    if not takes_text(inputs):
        found = [f"{i.name} ({i.dtype})" for i in inputs]
        raise FeedError(
            f"{shown(path)} holds texts, but {model.name} takes {listed(found, most=8)}; expected "
            f"one string input, or inputs called input_ids, attention_mask, token_type_ids",
            hint="Save the inputs as .npz, one file per sample, keyed by input name.",
        )
    if inputs[0].dtype == "string":
        _static_length(inputs, 0)
        return TextSource(file=file, inputs=((inputs[0], "text"),)), names, notes
    roles = tuple((info, _role(info, inputs)) for info in inputs)
    length = _static_length(inputs, 1)
    ids = [info.name for info, role in roles if role == "ids"]
    tokenizer = _find_tokenizer(path.parent, model)
    with readable(shown(tokenizer), "a tokenizer", _SAVE_AGAIN):
        known = (tokenizer, stamp(tokenizer))
    encoder = _encoder(*known, length)
    if len(inputs) == 1 and ids[0].lower() not in _ROLES:
        notes.append(f"input {ids[0]!r} is taken to be token ids")
    if tokenizer.parent != path.parent:
        notes.append(f"texts become token ids by {shown(tokenizer.parent)}/{TOKENIZER}")
    if length is not None:
        pad = f"id {encoder.pad_id}"
        if encoder.pad_id is None:
            pad = f"id 0, since {TOKENIZER} names no padding"
        notes.append(f"texts are cut or padded to the model's {length} tokens (padding is {pad})")
    elif encoder.cut is not None:
        notes.append(f"texts are cut at {encoder.cut} tokens, as {TOKENIZER} says")
    source = TextSource(
        file=file,
        inputs=roles,
        tokenizer=known,
        length=length,
        limit=index_limits(model, ids[0]),
    )
    return source, names, notes


def _static_length(inputs: Sequence[TensorInfo], axes: int) -> int | None:
    """The size of the last of `axes` axes where the model fixes it; all others must allow 1."""
    lengths: dict[int, str] = {}
    for info in inputs:
        shape = info.shape if info.shape is not None else (None,) * (axes + 1)
        batch = shape[: len(shape) - axes]
        most = 2 if axes else len(shape)
        if not axes <= len(shape) <= most or any(is_static(d) and d != 1 for d in batch):
            raise FeedError(
                f"input {info.name!r} has the shape {shape_text(shape)}, "
                f"expected {'(1, tokens)' if axes else 'a single text'} for texts",
                hint="Export the model with batch size 1 or a dynamic batch.",
            )
        for dim in shape[len(batch) :]:
            if isinstance(dim, int) and is_static(dim):
                lengths.setdefault(dim, info.name)
    if len(lengths) > 1 or max(lengths, default=0) > MAX_TOKENS:
        found = [f"{name!r} takes {length:,} tokens" for length, name in lengths.items()]
        raise FeedError(
            f"input {listed(found, most=8)}, expected one number of at most {MAX_TOKENS:,}",
            hint="Save the inputs as .npz, one file per sample, keyed by input name.",
        )
    return next(iter(lengths), None)
