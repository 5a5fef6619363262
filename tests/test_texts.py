"""Texts: the ids a tokenizer gives, in the shapes a model takes; strings handed on as they are."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from inspector import arrays as arrays_module
from inspector import texts as texts_module
from inspector.errors import FeedError
from inspector.feeds import Feeds, load_feeds, random_feeds
from inspector.model import Model
from inspector.model_files import load_model
from inspector.runtime import open_session
from tests.samples import MODELS, ROOT, needs_models
from tests.test_feeds import error_of, folder_of, write_set
from tests.test_images import Shape, model_of, picture

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "sat", "on", "the", "mat"]


def tokenizer_json(
    *, padding: dict[str, Any] | None = None, truncation: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One id per word, in the order of WORDS; [CLS] before and [SEP] behind."""

    def special(name: str) -> dict[str, Any]:
        return {"id": name, "ids": [WORDS.index(name)], "tokens": [name]}

    def piece(kind: str, name: str) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": 0}}

    single = [
        piece("SpecialToken", "[CLS]"),
        piece("Sequence", "A"),
        piece("SpecialToken", "[SEP]"),
    ]
    return {
        "version": "1.0",
        "truncation": truncation,
        "padding": padding,
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: special(name) for name in ("[CLS]", "[SEP]")},
        },
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: at for at, word in enumerate(WORDS)},
            "unk_token": "[UNK]",
        },
    }


def padding(length: int = 8, **changes: Any) -> dict[str, Any]:
    return {
        "strategy": {"Fixed": length},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
        **changes,
    }


def text_folder(folder: Path, text: str | bytes, **tokenizer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = text.encode() if isinstance(text, str) else text
    (folder / "texts.txt").write_bytes(content)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(**tokenizer)))
    return folder


def bert(shape: Shape = ("batch", "tokens"), dtype: str = "int64") -> Model:
    names = ("input_ids", "attention_mask", "token_type_ids")
    return model_of(**dict.fromkeys(names, (dtype, shape)))


def listed(feed: dict[str, Any]) -> dict[str, Any]:
    return {name: array.tolist() for name, array in feed.items()}


# -------------------------------------------------------------------------------------- tokenizer


def test_a_text_becomes_the_ids_of_its_words_in_a_batch_of_one(tmp_path: Path) -> None:
    feeds = load_feeds(text_folder(tmp_path, "A cat sat\nthe dog\n"), bert())
    assert [listed(feed) for feed in feeds] == [
        {
            "input_ids": [[2, 4, 5, 6, 3]],
            "attention_mask": [[1, 1, 1, 1, 1]],
            "token_type_ids": [[0, 0, 0, 0, 0]],
        },
        {
            "input_ids": [[2, 8, 1, 3]],
            "attention_mask": [[1, 1, 1, 1]],
            "token_type_ids": [[0, 0, 0, 0]],
        },
    ]
    assert {a.dtype.name for feed in feeds for a in feed.values()} == {"int64"}
    assert feeds.names == ("0 A cat sat", "1 the dog")
    assert (feeds.description, feeds.notes, feeds.rows) == ("2 texts in texts.txt", (), (1, 1))


@needs_models
def test_a_real_tokenizer_gives_exactly_the_arrays_it_was_known_for(tmp_path: Path) -> None:
    place = MODELS / "minilm-l6"
    sentences = json.loads((place / "inputs" / "sentences.json").read_text("utf-8"))
    (tmp_path / "texts.txt").write_text("\n".join(sentences) + "\n", "utf-8")
    model = load_model(place / "model.onnx")
    feeds = load_feeds(tmp_path, model)
    known = load_feeds(place / "inputs", model)
    assert len(feeds) == len(known) == 24
    for at, (feed, expected) in enumerate(zip(feeds, known, strict=True)):
        assert feed.keys() == expected.keys()
        for name, array in feed.items():
            assert array.dtype == expected[name].dtype, (at, name)
            assert np.array_equal(array, expected[name]), (at, name)
    assert feeds.digest == known.digest
    assert feeds.notes == (
        "texts become token ids by minilm-l6/tokenizer.json",
        "texts are cut at 128 tokens, as tokenizer.json says",
    )


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        (("input", "mask", "segment_ids"), "int32"),
        (("ids", "attention_mask", "token_type_ids"), "int64"),
        (("serving_default_input_ids:0", "model/input_mask", "Token_Type_IDs"), "int32"),
        (("tokens", "mask", "segment_ids"), "float32"),
    ],
)
def test_inputs_are_told_by_their_usual_names_and_get_their_own_type(
    tmp_path: Path, names: tuple[str, str, str], dtype: str
) -> None:
    model = model_of(**dict.fromkeys(names, (dtype, (None, None))))
    feed = load_feeds(text_folder(tmp_path, "a cat"), model)[0]
    assert listed(feed) == dict(
        zip(names, ([[2, 4, 5, 3]], [[1, 1, 1, 1]], [[0, 0, 0, 0]]), strict=True)
    )
    assert {array.dtype.name for array in feed.values()} == {dtype}


def test_positions_count_from_zero(tmp_path: Path) -> None:
    model = model_of(input_ids=("int64", (1, None)), position_ids=("int64", (1, None)))
    feed = load_feeds(text_folder(tmp_path, "a cat sat"), model)[0]
    assert feed["position_ids"].tolist() == [[0, 1, 2, 3, 4]]


def test_a_single_integer_input_takes_the_ids_whatever_its_name_and_this_is_said(
    tmp_path: Path,
) -> None:
    feeds = load_feeds(text_folder(tmp_path, "a cat"), model_of(x=("int32", ("tokens",))))
    assert listed(feeds[0]) == {"x": [2, 4, 5, 3]}
    assert feeds.notes == ("input 'x' is taken to be token ids",)


def test_a_static_token_axis_is_padded_and_cut_and_this_is_said(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "in", "a\na cat sat on the mat", padding=padding(512))
    feeds = load_feeds(folder, bert((1, 5)))
    assert [feed["input_ids"].tolist() for feed in feeds] == [[[2, 4, 3, 0, 0]], [[2, 4, 5, 6, 3]]]
    assert feeds[0]["attention_mask"].tolist() == [[1, 1, 1, 0, 0]]
    assert feeds.notes == ("texts are cut or padded to the model's 5 tokens (padding is id 0)",)


def test_padding_follows_the_tokenizer(tmp_path: Path) -> None:
    changed = padding(direction="Left", pad_id=9, pad_type_id=7, pad_token="mat")
    feeds = load_feeds(text_folder(tmp_path, "a", padding=changed), bert((1, 5)))
    assert listed(feeds[0]) == {
        "input_ids": [[9, 9, 2, 4, 3]],
        "attention_mask": [[0, 0, 1, 1, 1]],
        "token_type_ids": [[7, 7, 0, 0, 0]],
    }
    assert feeds.notes == ("texts are cut or padded to the model's 5 tokens (padding is id 9)",)


def test_a_tokenizer_without_padding_pads_with_its_padding_word_or_0_and_this_is_said(
    tmp_path: Path,
) -> None:
    folder = text_folder(tmp_path, "a")
    data = tokenizer_json()
    data["model"]["vocab"] |= {"[PAD]": 77}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    assert load_feeds(folder, bert((1, 4)))[0]["input_ids"].tolist() == [[2, 4, 3, 77]]
    del data["model"]["vocab"]["[PAD]"]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    feeds = load_feeds(folder, bert((1, 4)))
    assert feeds[0]["input_ids"].tolist() == [[2, 4, 3, 0]]
    assert "(padding is id 0, since tokenizer.json names no padding)" in feeds.notes[0]


def test_an_absurd_padding_in_the_file_pads_nothing(tmp_path: Path) -> None:
    # The package would try to reserve this and end the process.
    folder = text_folder(tmp_path, "a cat", padding=padding(10**13))
    assert load_feeds(folder, bert())[0]["input_ids"].tolist() == [[2, 4, 5, 3]]


def test_a_limit_of_the_tokenizer_holds_where_the_token_axis_is_dynamic(tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    feeds = load_feeds(text_folder(tmp_path, "a cat sat on the mat", truncation=cut), bert())
    assert feeds[0]["input_ids"].tolist() == [[2, 4, 5, 3]]
    assert feeds.notes == ("texts are cut at 4 tokens, as tokenizer.json says",)


def test_a_token_axis_without_room_for_a_word_is_refused(tmp_path: Path) -> None:
    assert error_of(text_folder(tmp_path, "a"), bert((1, 2))) == (
        "the model takes 2 tokens, but tokenizer.json adds 2 of its own to every text",
        "Export the model with a dynamic or a longer token axis.",
    )


@pytest.mark.parametrize("shape", [(4, None), (1, 1, None), ()])
def test_shapes_that_are_no_single_row_of_tokens_are_refused(tmp_path: Path, shape: Shape) -> None:
    message, hint = error_of(text_folder(tmp_path, "a"), bert(shape))
    assert message.startswith("input 'input_ids' has the shape (")
    assert message.endswith("expected (1, tokens) for texts")
    assert hint == "Export the model with batch size 1 or a dynamic batch."


def test_token_axes_of_unequal_length_are_refused(tmp_path: Path) -> None:
    model = model_of(input_ids=("int64", (1, 8)), attention_mask=("int64", (1, 9)))
    assert error_of(text_folder(tmp_path, "a"), model)[0] == (
        "input 'input_ids' takes 8 tokens, 'attention_mask' takes 9 tokens, "
        "expected one number of at most 1,048,576"
    )


def test_ids_outside_the_models_table_are_refused_and_only_asked_texts_are_tokenized(
    tmp_path: Path,
) -> None:
    node = helper.make_node("Gather", ["table", "input_ids"], ["y"], "look")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, (1, None))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros((9, 2), np.float32), "table")],
    )
    feeds = load_feeds(text_folder(tmp_path, "a cat\non the\nmat"), Model(helper.make_model(graph)))
    assert feeds[0]["input_ids"].tolist() == [[2, 4, 5, 3]]
    with pytest.raises(FeedError) as caught:
        feeds[2]
    assert caught.value.message == (
        "texts.txt: text 2 has the token id 9, expected 0..8 for the 9 rows that Gather 'look' "
        "reads"
    )
    assert caught.value.hint == "Take the tokenizer.json that the model was trained with."


@pytest.mark.parametrize("place", ["texts", "model", "above"])
def test_the_tokenizer_lies_beside_the_texts_beside_the_model_or_above_it(
    tmp_path: Path, place: str
) -> None:
    folder = text_folder(tmp_path / "in", "a cat")
    file = tmp_path / "net" / "onnx" / "model.onnx"
    file.parent.mkdir(parents=True)
    onnx.save(bert().proto, file)
    model = load_model(file)
    target = {"texts": folder, "model": file.parent, "above": file.parent.parent}[place]
    (folder / "tokenizer.json").rename(target / "tokenizer.json")
    feeds = load_feeds(folder, model)
    assert feeds[0]["input_ids"].tolist() == [[2, 4, 5, 3]]
    said = f"texts become token ids by {target.name}/tokenizer.json"
    assert feeds.notes == (() if place == "texts" else (said,))
    (target / "tokenizer.json").unlink()
    assert error_of(folder, model) == (
        "in has texts but no tokenizer.json, which turns them into token ids, and neither has the "
        "folder of model.onnx",
        "Put the model's tokenizer.json (Hugging Face tokenizers) beside the texts.",
    )


def test_without_the_package_the_hint_names_the_extra(tmp_path: Path) -> None:
    folder = text_folder(tmp_path, "a")
    onnx.save(bert().proto, tmp_path / "m.onnx")
    code = (
        "import sys; sys.modules['tokenizers'] = None\n"
        "from inspector.errors import FeedError\n"
        "from inspector.feeds import load_feeds\n"
        "from inspector.model_files import load_model\n"
        "try: load_feeds(sys.argv[1], load_model(sys.argv[2]))\n"
        "except FeedError as error: print(error.message, '|', error.hint)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder, tmp_path / "m.onnx"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == (
        "texts become token ids by the package tokenizers, which is not installed | "
        'Run: pip install "quant-inspector[text]"'
    )
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(need.startswith("tokenizers") for need in extras["optional-dependencies"]["text"])


def test_importing_feeds_loads_no_tokenizer() -> None:
    code = "import sys, inspector.feeds; print('tokenizers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[[[", b"\xff\xfe", b"[" * 100_000, b'{"version": "1.0", "model": null}'],
)
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    folder = text_folder(tmp_path, "a")
    (folder / "tokenizer.json").write_bytes(content)
    message, _ = error_of(folder, bert())
    assert message.startswith("tokenizer.json cannot be read as a tokenizer: ")


def test_a_tokenizer_larger_than_any_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "MAX_TOKENIZER_BYTES", 100)
    message, _ = error_of(text_folder(tmp_path, "a"), bert())
    assert message.startswith("tokenizer.json cannot be read as a tokenizer: it has ")
    assert message.endswith(" bytes, expected at most 100")


def test_a_tokenizer_that_panics_is_named(tmp_path: Path) -> None:
    data = tokenizer_json()
    data["post_processor"]["single"] = [{"SpecialToken": {"id": "[NONE]", "type_id": 0}}]
    folder = text_folder(tmp_path, "a\nb")
    (folder / "tokenizer.json").write_text(json.dumps(data))
    message, _ = error_of(folder, bert())
    assert message.startswith("tokenizer.json cannot ")


# ------------------------------------------------------------------------------------------ texts


def test_lines_end_where_an_editor_ends_them(tmp_path: Path) -> None:
    text = "a\r\n\n  \ncat\x0bsat\x85on\u2028the\nmat"
    feeds = load_feeds(text_folder(tmp_path, "\ufeff" + text), model_of(x=("string", (1,))))
    assert [feed["x"].tolist() for feed in feeds] == [["a"], ["cat\x0bsat\x85on\u2028the"], ["mat"]]
    assert feeds.notes == (
        "texts.txt: the byte order mark at its beginning is left out",
        "texts.txt: 2 empty lines are left out",
    )


def test_a_file_without_texts_is_refused(tmp_path: Path) -> None:
    for content in ("", "\n\n \n"):
        assert error_of(text_folder(tmp_path, content), bert()) == (
            "texts.txt holds no text, expected one per line",
            "Write one text per line, encoded in UTF-8.",
        )


def test_a_file_in_another_encoding_names_the_line(tmp_path: Path) -> None:
    assert error_of(text_folder(tmp_path, b"a\nna\xefve\n"), bert())[0] == (
        "texts.txt cannot be read as texts: line 2 is not UTF-8 (byte 0xef at position 2)"
    )


def test_a_line_and_a_file_have_a_largest_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = text_folder(tmp_path, "a\n" + "b" * 40)
    monkeypatch.setattr(texts_module, "MAX_LINE_BYTES", 39)
    assert "line 2 has 40 bytes, expected at most 39" in error_of(folder, bert())[0]
    monkeypatch.setattr(texts_module, "MAX_TEXTS_BYTES", 41)
    assert "it has 42 bytes, expected at most 41" in error_of(folder, bert())[0]


def test_a_text_of_too_many_tokens_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "MAX_TOKENS", 4)
    feeds = load_feeds(text_folder(tmp_path, "a cat sat"), bert())
    with pytest.raises(FeedError, match=r"text 0 becomes 5 tokens, expected 1 to 4"):
        feeds[0]


def test_samples_are_called_by_their_first_characters_with_what_is_invisible_escaped(
    tmp_path: Path,
) -> None:
    lines = ["x" * 41, "tab\there \x1b[31m<b>", "\u202eabc", *"defghijk"]
    feeds = load_feeds(text_folder(tmp_path, "\n".join(lines)), bert())
    assert feeds.names[:4] == (
        "00 " + "x" * 40 + "…",
        "01 tab\\there \\x1b[31m<b>",
        "02 \\u202eabc",
        "03 d",
    )
    assert feeds.names[10] == "10 k"


def test_any_named_text_file_will_do_but_a_folder_needs_texts_txt(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "in", "a")
    (folder / "texts.txt").rename(folder / "mine.TXT")
    assert load_feeds(folder / "mine.TXT", bert()).names == ("0 a",)
    assert "holds no feeds: found mine.TXT, tokenizer.json" in error_of(folder, bert())[0]


def test_labels_and_limits_apply_to_texts(tmp_path: Path) -> None:
    folder = text_folder(tmp_path, "a\n\ncat\nsat")
    (folder / "labels.json").write_text("[4, 5, 6]")
    feeds = load_feeds(folder, bert(), limit=2)
    assert (feeds.labels, feeds.names) == ((4, 5), ("0 a", "1 cat"))
    assert feeds.description == "2 of 3 texts in texts.txt"


def test_arrays_come_before_texts_and_texts_before_images_of_a_model_that_takes_text(
    tmp_path: Path,
) -> None:
    folder = text_folder(tmp_path, "a")
    picture().save(folder / "plot.png")
    feeds = load_feeds(folder, bert())
    assert feeds.names == ("0 a",)
    assert feeds.notes == (f"{folder.name}: plot.png is not texts and is ignored",)
    assert (
        "holds images but no preprocess.json"
        in (error_of(folder, model_of(x=("float32", (1, 3, 4, 6))))[0])
    )
    folder_of(folder, [np.array([[1]])], key="input_ids")
    assert load_feeds(folder, model_of(input_ids=("int64", (1, None)))).names == ("00.npz",)


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": ("float32", (1, 3))},
        {"input_ids": ("int64", (1, None)), "past": ("float32", (1, 2))},
        {"input_ids": ("int64", (1, None)), "tokens": ("int64", (1, None))},
        {"a": ("string", (1,)), "b": ("string", (1,))},
    ],
)
def test_a_model_that_takes_more_than_text_is_named_with_its_inputs(
    tmp_path: Path, inputs: dict[str, tuple[str, Shape]]
) -> None:
    message, hint = error_of(text_folder(tmp_path, "a"), model_of(**inputs))
    assert message == (
        "texts.txt holds texts, but model takes "
        + ", ".join(f"{name} ({dtype})" for name, (dtype, _) in inputs.items())
        + "; expected one string input, or inputs called input_ids, attention_mask, token_type_ids"
    )
    assert hint == "Save the inputs as .npz, one file per sample, keyed by input name."


def test_texts_cross_to_another_process_and_come_back_the_same(tmp_path: Path) -> None:
    feeds = load_feeds(text_folder(tmp_path, "a cat\nsat on\nthe mat"), bert()).subset([2, 0])
    sent = pickle.dumps(feeds)
    there: Feeds = pickle.loads(sent)
    assert len(sent) < 5_000
    assert there.digest == feeds.digest
    assert [listed(f) for f in there] == [listed(f) for f in feeds]
    assert there.names == ("2 the mat", "0 a cat")


@pytest.mark.parametrize("name", ["texts.txt", "tokenizer.json"])
def test_a_file_that_changes_between_passes_is_named(tmp_path: Path, name: str) -> None:
    folder = text_folder(tmp_path, "a\ncat")
    feeds = load_feeds(folder, bert())
    (folder / name).write_text((folder / name).read_text() + " ")
    with pytest.raises(FeedError, match=f"{name} changed after the feeds were loaded"):
        list(feeds)
    (folder / name).unlink()
    with pytest.raises(FeedError, match=f"{name} cannot be read as"):
        list(feeds)


# ---------------------------------------------------------------------------------- string inputs

STRINGS = model_of(x=("string", (None,)))


@pytest.mark.parametrize("shape", [(1,), (None,), (1, 1), ("batch", 1), ()])
def test_a_string_input_takes_texts_without_a_tokenizer(tmp_path: Path, shape: Shape) -> None:
    (tmp_path / "texts.txt").write_text("a cat\nnaïve 日本", "utf-8")
    model = model_of(x=("string", shape))
    feeds = load_feeds(tmp_path, model)
    assert [feed["x"].reshape(-1).tolist() for feed in feeds] == [["a cat"], ["naïve 日本"]]
    assert feeds[0]["x"].shape == (1,) * len(shape)
    session = open_session(model, optimized=False)
    for feed in feeds:
        assert session.run(feed)["x_out"].reshape(-1).tolist() == feed["x"].reshape(-1).tolist()


def test_a_string_input_of_unknown_rank_takes_one_axis_and_of_several_texts_none(
    tmp_path: Path,
) -> None:
    (tmp_path / "texts.txt").write_text("a\nb")
    value = helper.make_tensor_value_info("x", TensorProto.STRING, None)
    node = helper.make_node("Identity", ["x"], ["y"], "id")
    out = helper.make_tensor_value_info("y", TensorProto.STRING, None)
    model = Model(helper.make_model(helper.make_graph([node], "g", [value], [out])))
    assert load_feeds(tmp_path, model)[0]["x"].shape == (1,)
    assert error_of(tmp_path, model_of(x=("string", (1, 2))))[0] == (
        "input 'x' has the shape (1, 2), expected a single text for texts"
    )


@pytest.mark.parametrize("dtype", ["<U5", ">U7", "S9"])
def test_strings_in_npz_are_read_without_pickle(tmp_path: Path, dtype: str) -> None:
    wanted = ["a", "", "cat"]
    folder_of(tmp_path / "in", [np.array(wanted, dtype), np.array(wanted[::-1], dtype)])
    feeds = load_feeds(tmp_path / "in", STRINGS)
    assert feeds[0]["x"].dtype == object
    assert [feed["x"].tolist() for feed in feeds] == [wanted, wanted[::-1]]
    assert (feeds.notes, feeds.nonfinite()) == ((), [])
    stacked = load_feeds(tmp_path / "in" / "00.npz", model_of(x=("string", (1,))))
    assert [feed["x"].tolist() for feed in stacked] == [[word] for word in wanted]
    assert open_session(STRINGS, optimized=False).run(feeds[0])["x_out"].tolist() == wanted


def test_strings_in_a_pb_are_read(tmp_path: Path) -> None:
    write_set(tmp_path / "in", np.array([["a", "naïve"]], object))
    feeds = load_feeds(tmp_path / "in", model_of(x=("string", (1, None))))
    assert feeds[0]["x"].tolist() == [["a", "naïve"]]


def test_a_string_tensor_of_long_and_many_short_texts_takes_no_more_than_they_do(
    tmp_path: Path,
) -> None:
    # As an array of equally long texts this would be 40 GB.
    many = np.array(["x" * 1_000_000, *[""] * 9_999], object)
    write_set(tmp_path / "in", many)
    assert load_feeds(tmp_path / "in", STRINGS)[0]["x"].tolist() == many.tolist()


@pytest.mark.parametrize(
    "array", [np.array([b"\xff"]), np.array(["\ud800"]), np.array([0xFFFFFFF], "<u4").view("<U1")]
)
def test_strings_that_are_no_text_are_refused(tmp_path: Path, array: Any) -> None:
    message, hint = error_of(folder_of(tmp_path, [array]), STRINGS)
    assert message.startswith("00.npz: 'x' cannot be read as text: ")
    assert hint == "Save it as np.asarray(array, dtype=str), encoded in UTF-8."


def test_numbers_and_pickles_for_a_string_input_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, [np.zeros(2, np.float32)])
    assert error_of(tmp_path, STRINGS) == (
        "00.npz: 'x' holds float32, expected text",
        "Save it as text: np.asarray(array, dtype=str); pickles are never opened.",
    )
    folder_of(tmp_path, [np.array(["a"], object)])
    assert error_of(tmp_path, STRINGS)[0] == (
        "00.npz: 'x' holds text or pickled objects, expected text"
    )


def test_the_digest_of_strings_tells_where_one_ends(tmp_path: Path) -> None:
    digests = {
        load_feeds(folder_of(tmp_path / str(at), [np.array(words)]), STRINGS).digest
        for at, words in enumerate((["ab", "c"], ["a", "bc"], ["abc"], ["ab", "c", ""]))
    }
    assert len(digests) == 4
    same = [
        load_feeds(folder_of(tmp_path / kind, [np.array(["ab", "c"], kind)]), STRINGS).digest
        for kind in ("U9", "S9")
    ]
    assert same[0] == same[1]
    assert same[0] in digests


def test_random_strings_are_seeded_words_and_this_is_said() -> None:
    model = model_of(x=("string", ("batch", 3)), n=("float32", (2,)))
    feeds = random_feeds(model, samples=4)
    assert feeds.notes == ("dynamic dimension 'batch' is 1 here", "input 'x' is random words")
    assert feeds[2]["x"].shape == (1, 3)
    assert feeds[2]["x"].tolist() == random_feeds(model)[2]["x"].tolist()
    assert all(isinstance(w, str) and w for feed in feeds for w in feed["x"].reshape(-1))
    assert feeds.digest != random_feeds(model, samples=4, seed=1).digest
    assert not feeds.identical()
    open_session(model, optimized=False).run(feeds[0])


def test_a_text_is_as_large_in_memory_as_its_limit_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays_module, "MAX_ARRAY_BYTES", 100)
    folder_of(tmp_path, [np.array(["x" * 30])])
    assert "expected at most" in error_of(tmp_path, STRINGS)[0]
