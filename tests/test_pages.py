"""The pages in Streamlit's own test runner: what they show with a pair, without, and in trouble."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import streamlit as st
from hypothesis import given
from hypothesis import strategies as some
from streamlit.testing.v1 import AppTest

from inspector import workbench
from inspector.errors import ModelError
from inspector.store import FeedSource, Workspace
from inspector.web import forms, session, tasks, widgets
from tests.samples import ROOT

# What `app.py` gives to `st.App`. Run from `app.py`, Streamlit's test runner would open the pages
# of the folder beside it directly, without the frame around them.
PORTAL = ROOT / "inspector" / "web" / "portal.py"
PAGES = ("models", "overview", "tensors", "exclusions", "report")
SAMPLE = ROOT / "sample_models" / "digit-detector"
PATIENCE = 90.0


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the bundled detector was loaded and one node was left in float."""
    root = tmp_path_factory.mktemp("compared")
    run_id = tasks.load_sample(root, "digit-detector", progress=lambda _fraction, _message: None)
    workspace = Workspace(root)
    workbench.requantize(
        root, run_id=run_id, config=workspace.run(run_id).recipe, exclude=["/head/Concat_3"]
    )
    return root


@pytest.fixture
def clean() -> Iterator[None]:
    yield
    session.close_workers()
    session._started.clear()
    st.cache_resource.clear()


@pytest.fixture
def loaded(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: None
) -> Workspace:
    """A copy of that workspace, which the app uses."""
    root = shutil.copytree(compared, tmp_path / "data")
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(root))
    return Workspace(root)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: None) -> Workspace:
    """A workspace without anything in it, in which the sample is not loaded by itself."""
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(tmp_path))
    session._started.add(session.root())
    return Workspace(tmp_path)


def app(page: str = "", **query: str) -> AppTest:
    """The app on one of its pages."""
    test = AppTest.from_file(str(PORTAL), default_timeout=PATIENCE)
    for key, value in query.items():
        test.query_params[key] = value
    test.run()
    if page:
        test.switch_page(f"../../pages/{page}.py").run()
    assert not test.exception
    return test


def words(test: AppTest) -> str:
    """Every text on the page."""
    parts = [*test.markdown, *test.caption, *test.subheader, *test.error, *test.code]
    texts = [str(element.value) for element in parts]
    texts += [f"{metric.label} {metric.value} {metric.delta}" for metric in test.metric]
    return "\n".join(texts).replace("\\", "")


def wait(test: AppTest, until: Callable[[AppTest], bool]) -> AppTest:
    """The page once something is true of it: its own polling does not run in this runner."""
    end = time.monotonic() + PATIENCE
    while not until(test):
        assert time.monotonic() < end, words(test)
        time.sleep(0.2)
        test.run()
        assert not test.exception
    return test


def last_run(workspace: Workspace) -> str:
    pair = workspace.current_pair()
    assert pair is not None
    return workspace.runs(pair)[-1].id


# With a pair.


def test_the_app_opens_on_the_overview_and_its_headline_shows_the_collapse(
    loaded: Workspace,
) -> None:
    run = loaded.runs(loaded.current_pair() or "")[0]
    text = words(app(run=run.id))
    assert "output0: 42.4 dB pooled, but" in text
    assert "10 of 14 channels carry no signal" in text
    assert "Worst channel (#4) 0.0 dB" in text
    assert "median channel 0.0 dB" in text


@pytest.mark.parametrize("page", ["", *PAGES])
def test_app_py_itself_runs_in_streamlits_test_runner(loaded: Workspace, page: str) -> None:
    test = AppTest.from_file(str(ROOT / "app.py"), default_timeout=PATIENCE).run()
    if page:
        test.switch_page(f"pages/{page}.py").run()
    assert not test.exception
    assert "**digit-detector**" in words(test)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_names_pair_format_samples_run_and_before_and_after(
    loaded: Workspace, page: str
) -> None:
    test = app(page, run=last_run(loaded))
    text = words(test)
    assert "**digit-detector**" in text
    assert "int8 QDQ" in text
    assert re.search(r"12 samples, partly seen", text)
    assert re.search(r"42\.4 dB → \*\*42\.\d dB\*\*", text)
    run = next(box for box in test.selectbox if box.label == "Run")
    assert run.value == last_run(loaded)
    assert run.options == [
        "run 0 · the loaded file",
        "run 1 · all quantized",
        "run 2 · 1 node in float",
    ]


def test_without_a_run_in_the_address_the_newest_is_shown(loaded: Workspace) -> None:
    run = next(box for box in app("report").selectbox if box.label == "Run")
    assert run.value == last_run(loaded)


def test_choosing_a_run_puts_it_into_the_address(loaded: Workspace) -> None:
    first = loaded.runs(loaded.current_pair() or "")[0]
    test = app("overview")
    next(box for box in test.selectbox if box.label == "Run").select(first.id).run()
    assert test.query_params["run"] == first.id
    assert "the loaded file" in str([box.options for box in test.selectbox])


def test_next_and_previous_worst_go_through_the_table_in_its_order(loaded: Workspace) -> None:
    first = loaded.runs(loaded.current_pair() or "")[0].id
    test = app("tensors", run=first)
    assert "`output0`" in words(test)
    test.button(key="tensors-next").click().run()
    assert test.query_params["tensor"] == "/head/Sigmoid_output_0"
    test.button(key="tensors-previous").click().run()
    assert test.query_params["tensor"] == "output0"
    assert test.button(key="tensors-previous").disabled


def test_a_tensor_page_says_how_integers_become_reals(loaded: Workspace) -> None:
    first = loaded.runs(loaded.current_pair() or "")[0].id
    test = app("tensors", run=first, tensor="output0")
    formula = test.code[0].value
    assert re.fullmatch(
        r"real = 2\.518 \* \(q \+ 128\)    q = -128 … 127    real = 0 … 642\.1", formula
    )
    wait(test, lambda page: len(page.get("plotly_chart")) >= 4)


def test_the_table_is_filtered_by_text_kind_and_op_type(loaded: Workspace) -> None:
    test = app(find="sigmoid")
    names = list(test.dataframe[-2].value["name"])
    assert names == ["/head/Sigmoid_output_0"]
    test = app(kind="Weights", op="Conv")
    frame = max((each.value for each in test.dataframe), key=len)
    assert set(frame["kind"]) == {"weight"}
    assert set(frame["op"]) == {"Conv"}


def test_ticked_nodes_survive_a_reload_and_can_be_undone(loaded: Workspace) -> None:
    first = loaded.runs(loaded.current_pair() or "")[0].id
    app("tensors", run=first, tensor="/head/Sigmoid_output_0").button(
        key="tensors-float"
    ).click().run()
    test = app("exclusions", run=first)
    assert "1 node to leave in float" in words(test)
    assert "`/head/Sigmoid`" in words(test)
    test.button(key="undo").click().run()
    assert "0 nodes to leave in float" in words(test)
    test.button(key="redo").click().run()
    assert "1 node to leave in float" in words(test)


def test_two_tabs_keep_each_others_ticks(loaded: Workspace) -> None:
    (pair,) = loaded.pairs()
    seen_by_both = session.draft(pair.id, ("a", "b"))
    session.tick(pair.id, seen_by_both, ("a",))  # one tab unticks b
    session.tick(pair.id, seen_by_both, ("a", "b", "c"))  # the other, which still shows b, ticks c
    assert session.draft(pair.id).nodes == ("a", "c")
    session.undo(pair.id, session.draft(pair.id))
    assert session.draft(pair.id).nodes == ("a",)


def test_all_like_this_ticks_the_op_type_of_the_last_tick(loaded: Workspace) -> None:
    test = app("exclusions")
    assert "1 node to leave in float" in words(test), "the shown run's own list"
    button = test.button(key="all-like-this")
    assert button.label == "All like this: Concat (4)"
    button.click().run()
    assert "4 nodes to leave in float" in words(test)


def test_the_exclusions_page_shows_what_was_gained_and_what_to_take_along(
    loaded: Workspace,
) -> None:
    test = app("exclusions")
    text = words(test)
    assert "1 node left in float: output0 42.4 dB" in text
    assert re.search(r"worst part 0\.0 dB → 2\d\.\d dB", text)
    assert "run 1 → run 2" in text
    assert "digit-detector/float.onnx -o float.int8.onnx" in text
    assert "nodes_to_exclude=['/head/Concat_3']" in text
    assert "onnxruntime.quantization" in text


def test_freeing_a_node_fully_shows_the_nodes_before_it_ticks_them(loaded: Workspace) -> None:
    test = app("exclusions")
    test.button(key="free-0").click().run()
    wait(test, lambda page: any(each.key == "free-apply" for each in page.button))
    assert "To make `/head/Concat_3` really float" in words(test)
    assert "1 node to leave in float" in words(test), "nothing is applied yet"
    test.button(key="free-apply").click().run()
    assert "1 node to leave in float" not in words(test)


def test_requantizing_opens_the_new_run(loaded: Workspace) -> None:
    before = len(loaded.runs(loaded.current_pair() or ""))
    test = app("exclusions")
    test.button(key="all-like-this").click().run()
    test.button(key="requantize").click().run()
    # The run is on disk a moment before its job is over, and only then in the address.
    wait(test, lambda page: "4 nodes left in float" in words(page) and "run" in page.query_params)
    runs = loaded.runs(loaded.current_pair() or "")
    assert len(runs) == before + 1
    assert test.query_params["run"] == runs[-1].id


def test_a_stopped_job_leaves_everything_as_it_was(loaded: Workspace) -> None:
    before = loaded.runs(loaded.current_pair() or "")
    test = app("exclusions")
    test.button(key="all-like-this").click().run()
    test.button(key="requantize").click().run()
    stop = next(each for each in test.button if str(each.key).startswith("stop-requantize"))
    stop.click().run()
    wait(test, lambda page: any(each.key == "requantize" for each in page.button))
    assert loaded.runs(loaded.current_pair() or "") == before


# Without a pair.


@pytest.mark.parametrize("page", PAGES)
def test_an_empty_page_says_what_to_do_and_offers_the_sample(empty: Workspace, page: str) -> None:
    test = app(page)
    assert not test.error
    if page == "models":
        assert "Load a float and a quantized model" in words(test)
        assert {"sample-digit-detector", "compare"} <= {each.key for each in test.button}
    else:
        assert "No models are loaded yet" in words(test)
        assert "open-sample" in {each.key for each in test.button}


def test_a_new_workspace_is_filled_with_the_sample_without_a_click(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: None
) -> None:
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(tmp_path))
    test = wait(app(), lambda page: "carry no signal" in words(page))
    assert "digit-detector" in words(test)


# In trouble.


def test_a_model_that_cannot_be_read_is_one_sentence_and_nothing_loaded_is_lost(
    loaded: Workspace, tmp_path: Path
) -> None:
    broken = tmp_path / "page.onnx"
    broken.write_text("<html>Not found</html>")
    test = app("models")
    test.text_input(key="path-float").set_value(str(SAMPLE / "float.onnx"))
    test.text_input(key="path-quantized").set_value(str(broken))
    next(each for each in test.button_group if each.key == "way-inputs").set_value("random")
    test.run()
    test.button(key="compare").click().run()
    wait(test, lambda page: "page.onnx is an HTML" in words(page))
    assert len(test.error) == 1
    assert "Traceback" not in words(test)
    assert "**digit-detector**" in words(test)
    assert len(loaded.pairs()) == 1
    test.button(key="dismiss").click().run()
    assert not any(each.key == "dismiss" for each in test.button)


def test_feeds_that_do_not_fit_are_said_before_anything_is_compared(
    loaded: Workspace, tmp_path: Path
) -> None:
    test = app("models")
    test.text_input(key="path-float").set_value(str(SAMPLE / "float.onnx"))
    next(each for each in test.button_group if each.key == "way-inputs").set_value("path")
    test.run()
    test.text_input(key="path-inputs").set_value(str(tmp_path / "nothing.npz")).run()
    wait(test, lambda page: "nothing.npz" in words(page) and len(page.error) == 1)
    assert test.button(key="compare").disabled


@pytest.mark.parametrize("run", ["0123abc", "../../etc", "`x`"])
def test_an_unknown_run_in_the_address_is_an_error_with_a_way_out(
    loaded: Workspace, run: str
) -> None:
    test = app("overview", run=run)
    assert len(test.error) == 1
    assert "run" in str(test.error[0].value)


def test_an_unknown_tensor_in_the_address_falls_back_to_the_worst(loaded: Workspace) -> None:
    first = loaded.runs(loaded.current_pair() or "")[0].id
    assert "`output0`" in words(app("tensors", run=first, tensor="no such tensor"))


# The parts below the pages.


@given(some.text(alphabet="ab`*_[]<>$\\", max_size=20))
def test_a_name_cannot_break_out_of_its_code_span(name: str) -> None:
    shown = widgets.md_code(name)
    if name:
        fence = re.match(r"`+", shown)
        assert fence is not None
        inside = shown[len(fence[0]) : -len(fence[0])]
        runs = {len(run) for run in re.findall(r"`+", inside)}
        assert len(fence[0]) not in runs
        assert inside.strip(" ") == name.strip(" ")


def test_markdown_in_a_text_is_shown_as_it_is() -> None:
    assert widgets.md_text("a*b*[c](d)<e>") == r"a\*b\*\[c\]\(d\)\<e\>"


def test_before_and_after_are_of_one_recipe(loaded: Workspace) -> None:
    zero, one, two = loaded.runs(loaded.current_pair() or "")
    assert session.baseline_of(zero, (zero, one, two)) is None
    assert session.baseline_of(one, (zero, one, two)) == zero
    assert session.baseline_of(two, (zero, one, two)) == one
    other = replace(two, recipe={**two.recipe, "per_channel": True})
    assert session.baseline_of(other, (zero, one, other)) is None


def test_two_models_on_one_side_are_refused(empty: Workspace) -> None:
    class File:
        def __init__(self, name: str) -> None:
            self.name, self.file_id = name, name

    with pytest.raises(ModelError, match=r"2 \.onnx files"):
        forms._store_model([File("a.onnx"), File("b.onnx")], "float")


def test_a_recipe_is_said_in_one_line() -> None:
    recipe = {"format": "qdq", "activation_type": "uint8", "weight_type": "int8"}
    assert forms.recipe_summary({**recipe, "method": "entropy", "per_channel": True}) == (
        "uint8/int8 QDQ · Entropy · per channel"
    )
    assert forms.recipe_summary({"format": "dynamic", "weight_type": "int8"}) == (
        "int8 dynamic · per tensor"
    )


def test_feeds_are_marked_when_they_are_random(empty: Workspace) -> None:
    run_id = workbench.load_pair(
        empty.root,
        float_path=SAMPLE / "float.onnx",
        quantized_path=SAMPLE / "quantized.onnx",
        inputs=FeedSource(kind="random", samples=2, title="2 random feeds"),
    )
    assert "2 random feeds" in words(app("overview", run=run_id))
