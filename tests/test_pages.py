"""The pages in Streamlit's own test runner: what they show with a pair, without, and in trouble."""

from __future__ import annotations

import gc
import json
import pickle
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import streamlit as st
from hypothesis import given
from hypothesis import strategies as some
from onnx import helper
from streamlit.testing.v1 import AppTest

from inspector import store, workbench
from inspector.comparison import (
    BatchEffect,
    BatchError,
    DeviceError,
    NonFinite,
    Pin,
    Skipped,
    Unmatched,
)
from inspector.errors import Cancelled, ModelError
from inspector.render import comparison_json, format_db, read_comparison, read_number
from inspector.store import PROFILE_KEY, FeedSource, RunRecord, Workspace
from inspector.web import forms, graphs, session, tables, tasks
from inspector.web.session import View
from inspector.web.uploads import Uploaded
from inspector.web.words import md_code, md_text
from tests.samples import ROOT, array, floats, model, qdq_of, save

# What `app.py` gives to `st.App`. Run from `app.py`, Streamlit's test runner would open the pages
# of the folder beside it directly, without the frame around them.
PORTAL = ROOT / "inspector" / "web" / "portal.py"
PAGES = ("models", "overview", "tensors", "graph", "exclusions", "recipes", "report")
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


def toasts_until(test: AppTest, until: Callable[[AppTest], bool]) -> list[str]:
    """What was said meanwhile: a toast stands in one run of the page, the rest in a later one.

    What a job wrote may stand on the page a moment before the job has ended and is told.
    """
    told: list[str] = []

    def reached(page: AppTest) -> bool:
        told.extend(each.value for each in page.toast if each.value not in told)
        return until(page) and bool(told)

    wait(test, reached)
    return told


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


def test_a_tensors_values_stay_in_the_store_alone(loaded: Workspace) -> None:
    run = last_run(loaded)
    stored = store.detail_key("activation", "output0", "output0")

    # A tab that does not come back for its answer, and one that does.
    test = app("tensors", run=run, tensor="output0")
    [job] = [j for j in session.worker().jobs() if j.title == "Reading the tensor's values"]
    session.worker().wait(job.id, PATIENCE)
    assert len(pickle.dumps(loaded.detail(run, stored))) > 20_000
    assert max(len(pickle.dumps(job.result)) for job in session.worker().jobs()) < 5_000
    wait(test, lambda page: len(page.get("plotly_chart")) >= 4)
    kept = test.session_state["answers"]
    assert not [key for key in kept if key[0] == "tensor"]
    # What was kept is not there any more: it is read again.
    for file in (loaded.run_folder(run) / "details").iterdir():
        file.unlink()
    test.run()
    wait(test, lambda page: len(page.get("plotly_chart")) >= 4)


def test_the_table_is_filtered_by_text_kind_and_op_type(loaded: Workspace) -> None:
    test = app(find="sigmoid")
    names = next(list(each.value["name"]) for each in test.dataframe if "name" in each.value)
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


@pytest.mark.slow
def test_all_like_this_ticks_the_op_type_of_the_last_tick(loaded: Workspace) -> None:
    test = app("exclusions")
    assert "1 node to leave in float" in words(test), "the shown run's own list"
    button = test.button(key="tick-more-0")
    assert button.label == "All Concat (4)"
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


@pytest.mark.slow
def test_freeing_a_node_fully_shows_the_nodes_before_it_ticks_them(loaded: Workspace) -> None:
    test = app("exclusions")
    test.button(key="free-0").click().run()
    wait(test, lambda page: any(each.key == "free-apply" for each in page.button))
    assert "To make `/head/Concat_3` really float" in words(test)
    assert "1 node to leave in float" in words(test), "nothing is applied yet"
    test.button(key="free-apply").click().run()
    assert "1 node to leave in float" not in words(test)


def test_a_tick_is_previewed_before_anything_is_quantized(loaded: Workspace) -> None:
    before = loaded.runs(loaded.current_pair() or "")
    test = app("exclusions")
    test.button(key="tick-more-0").click().run()
    wait(test, lambda page: "Preview: 4 nodes in float would give" in words(page))
    labels = [metric.label for metric in test.metric]
    assert labels == [
        "Output SQNR, preview", "Tensors in float", "MACs in float", "Size, latency",
    ]  # fmt: skip
    assert loaded.runs(loaded.current_pair() or "") == before


@pytest.mark.slow
def test_what_the_preview_said_stands_beside_what_came(loaded: Workspace) -> None:
    before = last_run(loaded)
    test = app("exclusions")
    test.button(key="tick-more-0").click().run()
    wait(test, lambda page: "Preview: 4 nodes in float" in words(page))
    test.button(key="requantize").click().run()
    wait(test, lambda page: "4 nodes left in float" in words(page) and "run" in page.query_params)
    assert re.search(r"run 1 → run \d+; preview \d+\.\d dB, confirmed", words(test))
    # A click that came before the browser had the new address brings the one of before along.
    made = test.query_params["run"]
    test.query_params["run"] = before
    assert test.run().query_params["run"] == made
    assert "4 nodes left in float" in words(test)
    test.run()
    test.query_params["run"] = before
    assert test.run().query_params["run"] == before, "by then another run may be chosen"


@pytest.mark.parametrize("page", ["exclusions", "tensors"])
def test_a_tab_lets_go_of_the_runs_it_showed_before(loaded: Workspace, page: str) -> None:
    first, *_, last = loaded.runs(loaded.current_pair() or "")

    def kept(run: RunRecord) -> int:
        gc.collect()
        return sum(isinstance(each, View) and each.run.id == run.id for each in gc.get_objects())

    test = app(page, run=first.id)
    assert kept(first) > 0, "its buttons have it"
    test.query_params["run"] = last.id
    test.run()
    test.run()
    assert kept(last) > 0
    assert kept(first) == 0


def lab(test: AppTest) -> AppTest:
    """A tensor page with its lab open and the tensor's values there."""
    test.segmented_control(key="tensor-view").set_value("Range and scheme").run()
    return wait(test, lambda page: any("SQNR of this tensor" in m.label for m in page.metric))


def kept_grids(workspace: Workspace, run: str) -> list[dict[str, Any]]:
    """The grids set by hand for what follows from a run."""
    return list(workspace.draft(workspace.current_pair() or "")["overrides"][run])


@pytest.mark.slow
def test_another_range_is_tried_and_kept_for_the_next_run(loaded: Workspace) -> None:
    run = last_run(loaded)
    test = lab(app("tensors", run=run, tensor="/head/Sigmoid_output_0"))
    key = f"lab-{run}-/head/Sigmoid_output_0"
    before = next(m.value for m in test.metric if m.label == "SQNR of this tensor")
    test.selectbox(key=f"{key}-way").set_value("percentile-99.9").run()
    assert next(m.value for m in test.metric if m.label == "SQNR of this tensor") != before
    wait(test, lambda page: "Preview: 1 grid set by hand" in words(page))
    assert test.button(key="lab-drop").disabled
    test.button(key="lab-use").click().run()
    assert test.button(key="lab-use").disabled
    [entry] = kept_grids(loaded, run)
    assert entry["tensor"] == "/head/Sigmoid_output_0"
    # Another tab, or the page after a reload, has it as well.
    again = lab(app("tensors", run=run, tensor="/head/Sigmoid_output_0"))
    assert not again.button(key="lab-drop").disabled
    again.button(key="lab-drop").click().run()
    assert kept_grids(loaded, run) == []


@pytest.mark.slow
def test_a_scheme_that_no_recipe_can_have_is_not_offered_for_the_run(loaded: Workspace) -> None:
    run = last_run(loaded)
    test = lab(app("tensors", run=run, tensor="/head/Sigmoid_output_0"))
    test.selectbox(key=f"lab-{run}-/head/Sigmoid_output_0-scheme").set_value("mid-rise").run()
    assert "Outputs not previewed: no ONNX type has this grid" in words(test)
    assert test.button(key="lab-use").disabled


@pytest.mark.slow
def test_a_grid_set_by_hand_goes_into_the_next_run(loaded: Workspace) -> None:
    run = last_run(loaded)
    entry = {"tensor": "/head/Sigmoid_output_0", "low": 0.0, "high": 0.5}
    loaded.save_draft(loaded.current_pair() or "", {"overrides": {run: [entry]}})
    test = app("exclusions", run=run)
    wait(test, lambda page: "Preview: 1 grid set by hand" in words(page))
    assert "Changed: overrides" in words(test)
    test.button(key="requantize").click().run()
    wait(test, lambda page: page.query_params.get("run") not in (None, [run], run))
    made = loaded.runs(loaded.current_pair() or "")[-1]
    assert made.recipe["overrides"] == [entry]


@pytest.mark.slow
def test_requantizing_opens_the_new_run(loaded: Workspace) -> None:
    before = len(loaded.runs(loaded.current_pair() or ""))
    test = app("exclusions")
    test.button(key="tick-more-0").click().run()
    test.button(key="requantize").click().run()
    # The run is on disk a moment before its job is over, and only then in the address.
    wait(test, lambda page: "4 nodes left in float" in words(page) and "run" in page.query_params)
    runs = loaded.runs(loaded.current_pair() or "")
    assert len(runs) == before + 1
    assert test.query_params["run"] == runs[-1].id


@pytest.mark.slow
def test_a_stopped_job_leaves_everything_as_it_was(loaded: Workspace) -> None:
    before = loaded.runs(loaded.current_pair() or "")
    test = app("exclusions")
    test.button(key="tick-more-0").click().run()
    test.button(key="requantize").click().run()
    stop = next(each for each in test.button if str(each.key).startswith("stop-requantize"))
    stop.click().run()
    wait(test, lambda page: any(each.key == "requantize" for each in page.button))
    assert loaded.runs(loaded.current_pair() or "") == before


# What the figures rest on, and matches set by hand.


def opened(test: AppTest, key: str) -> AppTest:
    """The page with a folded part open, as a click on it does."""
    test.session_state[key] = True
    test.run()
    assert not test.exception
    return test


def texts(test: AppTest) -> str:
    """Every text on the page, with the labels of folded parts and what tables hold."""
    labels = [each.label for each in test.expander]
    tables = [each.value.to_string() for each in (*test.table, *test.dataframe)]
    return "\n".join([words(test), *labels, *tables]).replace("\\", "")


def rewritten(workspace: Workspace, **changes: Any) -> str:
    """The first run, whose comparison was changed on disk as if it had been compared so."""
    run = workspace.runs(workspace.current_pair() or "")[0]
    comparison = replace(read_comparison(workspace.comparison(run.id)), **changes)
    workspace.replace_comparison(run, comparison_json(comparison, detail=True))
    return run.id


@pytest.mark.parametrize("page", ["overview", "report"])
def test_one_line_says_how_much_of_the_model_the_figures_speak_of(
    loaded: Workspace, page: str
) -> None:
    run = loaded.runs(loaded.current_pair() or "")[0].id
    counts = read_comparison(loaded.comparison(run)).counts
    assert counts is not None
    test = app(page, run=run)
    labels = [each.label for each in test.expander]
    (line,) = [label for label in labels if "float tensors**" in label]
    assert f"**{counts.float_tensors} float tensors**: {counts.matched} matched" in line
    assert f"{counts.fused} fused · {counts.unmatched} unmatched" in line
    assert "12 samples calibration unknown · optimisations off" in line
    assert "simulated: off" not in texts(test), "nothing below it is made before it is opened"
    assert "simulated: off, on the CPU; deployed: all, on CPU" in texts(opened(test, "basis"))


def test_everything_the_figures_leave_out_or_depend_on_is_listed(loaded: Workspace) -> None:
    run = loaded.runs(loaded.current_pair() or "")[0].id
    (output,) = read_comparison(loaded.comparison(run)).outputs
    rewritten(
        loaded,
        outputs=(
            replace(
                output,
                deployed_differs=True,
                deployed_max_steps=12.5,
                deployed_flips=3,
                deployed_cause="QDQTransformer",
            ),
        ),
        skipped=(Skipped(name="q1", kind="node", model="quantized", reason="scale is no number"),),
        not_observed=(Skipped(name="t", kind="tensor", model="float", reason="inside a Loop"),),
        nonfinite=(
            NonFinite(tensor="b", node="later", op_type="Mul", model="float", nan=1, infinite=0,
                      first_sample="a.png", origin=False),
            NonFinite(tensor="a", node="first", op_type="Log", model="float", nan=7, infinite=2,
                      first_sample="a.png", origin=True),
        ),
        batch=BatchEffect(
            samples=4,
            padded=True,
            outputs=(
                BatchError(output="output0", float_max_abs_difference=0.0, worst_sample="b.png",
                           quantized_max_abs_difference=0.25, quantized_sqnr_db=21.5),
            ),
        ),
        device=(
            DeviceError(name="output0", quantized_name="output0", device_name="out", samples=4,
                        quantization_sqnr_db=42.4, kernel_sqnr_db=60.0, device_sqnr_db=9.5,
                        total_sqnr_db=9.25, verdict="device"),
        ),
        mask="attention_mask",
        states=(("h_out", "h"),),
        provider="OpenVINOExecutionProvider",
        pins=(Pin(float_name="a", quantized_name=None),),
    )  # fmt: skip
    test = app("overview", run=run)
    (line,) = [each.label for each in test.expander if "float tensors**" in each.label]
    for part in ("OpenVINO", "padding left out", "state carried over", "1 match by hand",
                 "NaN or infinity in 2", "deployed differs", "1 skipped"):  # fmt: skip
        assert part in line
    found = texts(opened(test, "basis"))
    for part in ("scale is no number", "inside a Loop", "QDQTransformer", "12.5", "3 of 12",
                 "disabled_optimizers=['QDQTransformer']", "batch of 4, shorter samples padded",
                 "0.25", "21.5 dB", "9.5 dB", "deployed: all, on OpenVINO",
                 "positions where `attention_mask` is 0", "`h_out` → `h`",
                 "`a` refused"):  # fmt: skip
        assert part in found, part
    (bad,) = [t.value for t in test.dataframe if "Infinite" in t.value]
    assert list(bad["Node"]) == ["first", "later"], "where it begins comes first"
    facts = texts(app("tensors", run=run, tensor="output0"))
    assert "→ device 9.5 dB; in all 9.2 dB, most from device" in facts


@pytest.mark.slow
def test_a_run_stored_before_anything_was_counted_still_shows(loaded: Workspace) -> None:
    run = loaded.runs(loaded.current_pair() or "")[0].id
    path = loaded.run_folder(run) / "comparison.json"
    data = json.loads(path.read_bytes())
    for key in ("counts", "skipped", "not_observed", "nonfinite", "provider", "mask", "states",
                "batch", "device", "pins"):  # fmt: skip
        del data[key]
    path.write_text(json.dumps(data))
    for page in PAGES:
        app(page, run=run)
    test = app("overview", run=run)
    (line,) = [each.label for each in test.expander if "compared**" in each.label]
    assert re.match(r"\*\*\d+ tensors compared\*\* · 12 samples", line)
    assert "simulated: off" in texts(opened(test, "basis"))


@pytest.mark.slow
def test_a_match_is_refused_and_taken_back(loaded: Workspace) -> None:
    run = loaded.runs(loaded.current_pair() or "")[0].id
    name = "/head/Sigmoid_output_0"
    test = opened(app("tensors", run=run, tensor=name), f"match-{run}")
    assert "Matched **by name** with" in words(test)
    test.button(key="match-refuse").click().run()
    wait(test, lambda page: f"`{name}` is not compared" in words(page))
    assert loaded.run(run).pins == (Pin(float_name=name, quantized_name=None),)
    test = opened(app("overview", run=run), "basis")
    assert f"`{name}` refused" in words(test)
    test.button(key="basis-unpin-0").click().run()
    wait(test, lambda page: f"`{name}` refused" not in words(page))
    assert loaded.run(run).pins == ()


@pytest.mark.slow
def test_a_refused_tensor_stays_in_view_with_its_undo(loaded: Workspace) -> None:
    run = loaded.runs(loaded.current_pair() or "")[0].id
    name = "/head/Sigmoid_output_0"
    test = opened(app("tensors", run=run, tensor=name), f"match-{run}")
    test.button(key="match-refuse").click().run()
    told = toasts_until(test, lambda page: "refused by hand" in words(page))
    assert told == [md_text(f"{name} is not compared any more")]
    assert test.query_params["tensor"] == name
    assert not test.metric, "nothing of another tensor"
    box = next(each for each in test.selectbox if each.label == "Tensor")
    assert box.value == name
    assert box.options[-1] == f"{name} · refused"
    box.select("output0").run()
    box = next(each for each in test.selectbox if each.label == "Tensor")
    box.select(name).run()
    assert "refused by hand" in words(test)
    test.button(key="lost-match-undo").click().run()
    told = toasts_until(test, lambda page: bool(page.metric))
    assert test.query_params["tensor"] == name
    assert told == [md_text(f"{name} is left to the rules again")]


def test_refusing_without_a_tensor_in_the_address_stays_on_the_one_that_was_shown(
    loaded: Workspace,
) -> None:
    run = loaded.runs(loaded.current_pair() or "")[0].id
    test = opened(app("tensors", run=run), f"match-{run}")
    test.button(key="match-refuse").click().run()
    assert test.query_params["tensor"] == "output0"


def test_all_tensors_of_the_report_are_formatted_as_on_the_overview(loaded: Workspace) -> None:
    run = loaded.runs(loaded.current_pair() or "")[0].id
    tables_of = [
        {table.proto.arrow_data.styler.display_values for table in page.dataframe}
        for page in (app("overview", run=run), opened(app("report", run=run), "all-tensors"))
    ]
    assert any(table for table in tables_of[0] & tables_of[1])


def test_the_selected_node_keeps_the_sign_of_its_state(loaded: Workspace) -> None:
    run = loaded.runs(loaded.current_pair() or "")[0].id
    comparison = read_comparison(loaded.comparison(run))
    frame = tables.nodes(comparison, (), selected="/head/Sigmoid")
    signs = dict(zip(frame["name"], frame["sign"], strict=True))
    other = dict(zip(*(tables.nodes(comparison, ())[c] for c in ("name", "sign")), strict=True))
    assert signs["/head/Sigmoid"] == f"▸{other['/head/Sigmoid']}"
    assert [name for name, sign in signs.items() if sign.startswith("▸")] == ["/head/Sigmoid"]


def test_what_the_figures_rest_on_says_each_thing_once(loaded: Workspace) -> None:
    run = loaded.runs(loaded.current_pair() or "")[0].id
    found = texts(opened(app("overview", run=run), "basis"))
    assert "12 samples. Which samples calibrated the loaded file is not known." in found
    assert "– where it has none" in found, "steps of an output without a scale"
    assert "Observed, float model" in texts(app("tensors", run=run, tensor="output0"))


@pytest.mark.slow
def test_a_tensor_is_pinned_to_another_of_fitting_shape(loaded: Workspace) -> None:
    run = loaded.runs(loaded.current_pair() or "")[0].id
    name = "/head/Sigmoid_output_0"
    test = opened(app("tensors", run=run, tensor=name), f"match-{run}")
    key = f"match-partner-{run}"
    wait(test, lambda page: any(box.key == key for box in page.selectbox))
    box = test.selectbox(key=key)
    names = [option.split(" · ")[0] for option in box.options]
    assert "/head/Sigmoid_output_0_DequantizeLinear_Output" not in names, "it is that one"
    assert all(re.search(r" · .*\[\d+( × \d+)*\]$", option) for option in box.options)
    assert test.button(key="match-pin").disabled
    box.select("/head/Sigmoid_output_0").run()
    test.button(key="match-pin").click().run()
    wait(test, lambda page: "· set by hand" in words(page))
    (pin,) = loaded.run(run).pins
    assert (pin.float_name, pin.quantized_name) == (name, "/head/Sigmoid_output_0")


def test_what_is_not_compared_can_be_matched_from_the_overview(loaded: Workspace) -> None:
    run = loaded.runs(loaded.current_pair() or "")[0].id
    rewritten(
        loaded,
        unmatched=(
            Unmatched(name="/neck/Add", kind="activation", model="float", reason="no twin"),
            Unmatched(name="b", kind="bias", model="float", reason="fused into c", fused_into="c"),
        ),
    )
    test = app("overview", run=run)
    label = "1 tensor not compared · 1 fused into others, with the reason"
    assert label in [each.label for each in test.expander]
    test = opened(test, "not-compared")
    box = test.selectbox(key=f"not-compared-choice-{run}")
    assert box.options == ["/neck/Add", "b"]
    box.select("/neck/Add").run()
    assert "Not compared: no twin" in words(test)


def test_the_form_offers_masks_states_devices_and_providers_of_the_chosen_model(
    empty: Workspace,
) -> None:
    test = app("models")
    assert "Choose a float model first" in words(test)
    test.text_input(key="path-float").set_value(str(SAMPLE / "float.onnx")).run()
    wait(test, lambda page: any(box.key == "option-mask" for box in page.selectbox))
    assert test.selectbox(key="option-mask").options == ["images"]
    assert test.selectbox(key="option-mask").value is None
    assert "CPU" in test.selectbox(key="option-provider").options
    assert test.selectbox(key="option-metric").value is None
    choices = test.selectbox(key="option-metric").options
    assert "detection_f1 · F1 of boxes against the float model's" in choices
    assert test.text_input(key="option-device").value == ""
    test.text_input(key="option-device").set_value(str(SAMPLE / "no such dump"))
    next(each for each in test.button_group if each.key == "way-inputs").set_value("random")
    test.text_input(key="path-quantized").set_value(str(SAMPLE / "quantized.onnx")).run()
    wait(test, lambda page: any(box.key == "option-mask" for box in page.selectbox))
    test.button(key="compare").click().run()
    wait(test, lambda page: "no such dump does not exist" in words(page))


# Names that try to be more than names.

NAMES = {
    "c": '<script>window.hacked=1</script><img src=x onerror="window.hacked=1">',
    "r": "[x](javascript:window.hacked=1) **bold** `code` $\\LaTeX$ ![i](https://evil.example/p)",
    "m": ":material/skull: :streamlit: :joy: :red[x] https://evil.example www.evil.example a@b.c",
    "y": f"out\u202eput\x1b[31m {'A' * 10_000} <b>end</b>",
}


def load_hostile(root: Path) -> str:
    """A pair whose nodes, tensors, operators' outputs and samples bear such names."""
    files = root / "files"

    def graph(*, quantized: bool) -> onnx.ModelProto:
        n = NAMES
        source, nodes, constants = n["r"], [], []
        if quantized:
            source = f"{n['r']}_dq"
            nodes, constants = qdq_of(n["r"], source, 0.02, -128)
        return model(
            [
                helper.make_node("Conv", ["x", "w"], [n["c"]], f"{n['c']} node"),
                helper.make_node("Relu", [n["c"]], [n["r"]], f"{n['r']} node"),
                *nodes,
                helper.make_node("Sigmoid", [source], [n["m"]], f"{n['m']} node"),
                helper.make_node("Concat", [n["m"], source], [n["y"]], "j", axis=1),
            ],
            [("x", [1, 3, 6, 6])],
            [(n["y"], [1, 8, 6, 6])],
            [array("w", floats((4, 3, 1, 1), 1)), *constants],
        )

    files.mkdir(parents=True)
    save(graph(quantized=False), files / "$x$ **float**.onnx")
    save(graph(quantized=True), files / "quantized.onnx")
    feeds = files / ":joy: feeds"
    feeds.mkdir()
    for at, name in enumerate(("<img src=x>.npz", "[a](javascript:alert(1)) $x$.npz")):
        np.savez(feeds / name.replace("/", ""), x=floats((1, 3, 6, 6), at))
    return workbench.load_pair(
        root,
        float_path=files / "$x$ **float**.onnx",
        quantized_path=files / "quantized.onnx",
        inputs=FeedSource(kind="path", path=str(feeds)),
        title="<b>title</b> :joy: $x$",
    )


@pytest.mark.parametrize("page", PAGES)
def test_hostile_names_are_escaped_on_every_page(empty: Workspace, page: str) -> None:
    run = load_hostile(empty.root)
    for tensor in NAMES.values():
        test = app(page, run=run, tensor=tensor)
        if page == "overview":
            opened(opened(test, "basis"), "not-compared")
        elements = [*test.markdown, *test.caption, *test.error]
        shown = [str(each.value) for each in elements] + [e.label for e in test.expander]
        shown += [str(getattr(each, "help", "")) for each in test.markdown]
        shown += [f"{m.label} {m.value} {m.delta} {m.help}" for m in test.metric]
        shown += [str(cell) for t in test.table for cell in t.value.to_numpy().ravel()]
        for text in shown:
            if text.lstrip().startswith(("<style>", "<script>")):
                continue  # the page's own
            assert max(map(len, text.split()), default=0) < 900, "no name is endless"
            assert "\u202e" not in text
            assert "\x1b" not in text
            plain = re.sub(r"(?<!\\)(`+).+?\1", "", text)
            plain = re.sub(r"\\[^\w\s]", "", plain)
            for markup in ("<script", "<img", "<b>", "](", "**bold", "$x$", ":joy:", "https://",
                           ":material/skull", " www.", "a@b", ":red[x]"):  # fmt: skip
                assert markup not in plain, text


# Large comparisons.


@pytest.mark.slow
def test_twenty_thousand_tensors_do_not_freeze_a_page(loaded: Workspace) -> None:
    run = loaded.runs(loaded.current_pair() or "")[0].id
    first = read_comparison(loaded.comparison(run)).activations[3]
    many = tuple(
        replace(first, name=f"/layer.{i}/Conv_output_0", node=f"/layer.{i}/Conv", depth=i,
                accumulated_sqnr_db=60 - (i % 977) / 30, is_output=False)
        for i in range(20_000)
    )  # fmt: skip
    lost = tuple(
        Unmatched(name=f"/lost.{i}", kind="activation", model="float", reason="no twin")
        for i in range(20_000)
    )
    rewritten(loaded, activations=many, unmatched=lost)
    # Reading it from disk is not what is measured: a page does that once.
    test = app("overview", run=run)
    opened(opened(test, "basis"), "not-compared")
    for page in PAGES:
        test.switch_page(f"../../pages/{page}.py").run()
        begin = time.perf_counter()
        test.run()
        assert time.perf_counter() - begin < 3, page
        assert not test.exception
    test = app("overview", run=run)
    assert "The worst 2,000 of 20," in words(test)
    assert all(len(each.value) <= 2000 for each in test.dataframe)


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


@pytest.mark.slow
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
    assert "Still missing: a float model." not in words(test)
    assert "Put right what is said above first." in words(test)


def test_a_form_that_is_not_complete_says_what_is_missing(empty: Workspace) -> None:
    test = app("models")
    said = "Still missing: a float model and inputs. A quantized model is optional."
    assert said in words(test)
    test.text_input(key="path-float").set_value(str(SAMPLE / "float.onnx")).run()
    assert "Still missing: inputs." in words(test)
    next(each for each in test.button_group if each.key == "way-inputs").set_value("random")
    test.run()
    assert "Still missing" not in words(test)
    assert not test.button(key="compare").disabled


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
    shown = md_code(name)
    if name:
        fence = re.match(r"`+", shown)
        assert fence is not None
        inside = shown[len(fence[0]) : -len(fence[0])]
        runs = {len(run) for run in re.findall(r"`+", inside)}
        assert len(fence[0]) not in runs
        assert inside.strip(" ") == name.strip(" ")


def test_markdown_in_a_text_is_shown_as_it_is() -> None:
    assert md_text("a*b*[c](d)<e>") == r"a\*b\*\[c\]\(d\)\<e\>"


def test_before_and_after_are_of_one_recipe(loaded: Workspace) -> None:
    zero, one, two = loaded.runs(loaded.current_pair() or "")
    assert session.baseline_of(zero, (zero, one, two)) is None
    assert session.baseline_of(one, (zero, one, two)) == zero
    assert session.baseline_of(two, (zero, one, two)) == one
    other = replace(two, recipe={**two.recipe, "per_channel": True})
    assert session.baseline_of(other, (zero, one, other)) is None


def test_two_models_on_one_side_are_refused(empty: Workspace) -> None:
    files = [
        Uploaded(id=name, name=name, size_bytes=1, path=Path(name)) for name in ("a.onnx", "b.onnx")
    ]
    with pytest.raises(ModelError, match=r"2 \.onnx files"):
        forms._uploaded_model(files, "float")


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


# Recipes.


def try_some(workspace: Workspace, most: int = 3) -> list[dict[str, Any]]:
    """The rows of the table once so many recipes were tried and the job was stopped."""

    def stop(_fraction: float, message: str) -> None:
        if message.startswith(f"recipe {most + 1} of"):
            raise Cancelled

    pair = workspace.current_pair() or ""
    with pytest.raises(Cancelled):
        workbench.try_recipes(workspace.root, run_id=workspace.runs(pair)[0].id, progress=stop)
    rows: list[dict[str, Any]] = workspace.recipes(pair)["rows"]
    return rows


def table_of(test: AppTest, column: str) -> Any:
    return next(each.value for each in test.dataframe if column in each.value)


def test_before_any_recipe_was_tried_the_page_offers_to_try_them(loaded: Workspace) -> None:
    test = app("recipes")
    text = words(test)
    assert "No recipe has been tried yet" in text
    assert "MinMax, Percentile and Entropy, per tensor and per channel" in text
    assert test.button(key="try-recipes").label == "Try the recipes"
    assert not any("label" in each.value for each in test.dataframe)
    assert "make-run" not in {each.key for each in test.button}


@pytest.mark.slow
def test_recipes_are_tried_in_the_worker_and_stay_when_it_is_stopped(loaded: Workspace) -> None:
    test = app("recipes")
    test.button(key="try-recipes").click().run()
    job = session.running_title("Trying recipes")
    assert job is not None
    wait(test, lambda page: any("label" in each.value for each in page.dataframe))
    session.stop_job(job.id)
    wait(test, lambda page: any(each.key == "try-recipes" for each in page.button))
    rows = loaded.recipes(loaded.current_pair() or "")["rows"]
    done = [row for row in rows if row["state"] == "done"]
    assert done
    assert list(table_of(test, "label")["label"]) == [row["label"] for row in done]
    assert re.fullmatch(r"Try the other \d\d", test.button(key="try-recipes").label)


@pytest.mark.slow
def test_the_best_recipe_is_selected_until_another_is_chosen(loaded: Workspace) -> None:
    rows = try_some(loaded)
    test = app("recipes")
    text = words(test)
    assert f"Best of 3 recipes: {rows[0]['label']}, 42." in text
    assert "but its worst part 0.0 dB" in text, "the pooled figure hides the scores"
    assert f"Selected: **{rows[0]['label']}**" in text
    assert rows[0]["label"].split(" · ")[0] in text
    test = app("recipes", recipe=rows[1]["label"])
    text = words(test)
    assert f"Selected: **{rows[1]['label']}**" in text
    deployed = f"{rows[1]['deployed_sqnr_db']:.1f} dB"
    assert f"Output SQNR, deployed {deployed} worst part 0.0 dB · best 42." in text
    assert "24 recipes without a model, and why" in [each.label for each in test.expander]
    assert "no kernels for S8" in str(table_of(test, "Reason")["Reason"][0])
    assert "quant-inspector quantize" in test.code[0].value


def test_an_unknown_recipe_in_the_address_falls_back_to_the_best(loaded: Workspace) -> None:
    rows = try_some(loaded, 1)
    assert f"Selected: **{rows[0]['label']}**" in words(app("recipes", recipe="<b>nothing</b>"))


@pytest.mark.slow
def test_a_recipe_becomes_the_run(loaded: Workspace) -> None:
    rows = try_some(loaded, 2)
    row = next(each for each in rows if each["recipe"]["per_channel"])
    test = app("recipes", recipe=row["label"])
    test.button(key="make-run").click().run()
    wait(test, lambda page: "run" in page.query_params)
    run = loaded.run(
        test.query_params["run"]
        if isinstance(test.query_params["run"], str)
        else test.query_params["run"][0]
    )
    assert (run.recipe, run.exclusions) == (row["recipe"], ())
    assert run.model.sha256 == row["sha256"]
    test = app("recipes", run=run.id, recipe=row["label"])
    assert test.button(key="make-run").label == "This is the run"
    assert test.button(key="make-run").disabled
    assert list(table_of(test, "label")["sign"]).count("▸●") == 1


# Time per node.


@pytest.mark.slow
def test_nodes_are_timed_on_request_and_join_the_table(loaded: Workspace) -> None:
    test = app("overview")
    assert not any("time" in each.value for each in test.dataframe)
    test.button(key="time-nodes").click().run()
    wait(test, lambda page: any("time" in each.value for each in page.dataframe))
    frame = table_of(test, "time")
    times = loaded.detail(last_run(loaded), PROFILE_KEY)
    assert times is not None
    took = times["quantized"]["deployed"]["tensors"]
    names = {a.name: a.quantized_name for a in session.comparison_of(last_run(loaded)).activations}
    for name, micros in zip(frame["name"], frame["time"], strict=True):
        wanted = took.get(names.get(name, ""))
        assert (micros == pytest.approx(1e6 * wanted)) if wanted else np.isnan(micros)
    assert "time-nodes" not in {each.key for each in test.button}


# Where errors begin.


def picture_titles(test: AppTest) -> list[str]:
    specs = [json.loads(each.proto.spec) for each in test.get("plotly_chart")]
    return [str(spec["layout"]["title"]["text"]) for spec in specs]


@pytest.mark.slow
def test_the_cause_map_is_measured_from_the_overview_and_then_shown(loaded: Workspace) -> None:
    run = last_run(loaded)
    test = app("overview", run=run)
    assert [each.value for each in test.segmented_control if each.label == "Picture"] == [
        "Along the graph"
    ]
    assert not any("isolated" in each.value for each in test.dataframe)
    test = app(run=run, chart="Cause map")
    assert "Where errors begin is not measured yet" in picture_titles(test)
    assert not loaded.run(run).summary.get("isolated")

    test = app("overview", run=run)
    test.button(key="measure-causes").click().run()
    assert test.query_params["chart"] in ("Cause map", ["Cause map"])
    jobs = [job for job in session.active_jobs() if job.title.startswith("Measuring where errors")]
    assert [job.title for job in jobs] == ["Measuring where errors begin: digit-detector, run 2"]
    assert f"stop-causes-{jobs[0].id}" in {each.key for each in test.button}
    assert test.button(key="measure-causes").disabled
    wait(test, lambda page: any("isolated" in each.value for each in page.dataframe))
    assert "measure-causes" not in {each.key for each in test.button}
    assert any("below 20 dB" in each or "alone" in each for each in picture_titles(test))
    frame = table_of(test, "isolated")
    known = {a.name: a for a in session.comparison_of(run).activations}
    rows = dict(
        zip(frame["name"], zip(frame["isolated"], frame["added"], strict=True), strict=True)
    )
    assert len(known) > 30
    for name, (isolated, added) in rows.items():
        wanted = (known[name].isolated_sqnr_db, known[name].added_sqnr_db) if name in known else ()
        for shown, own in zip((isolated, added), wanted, strict=False):
            assert shown == own or (np.isnan(shown) and (own is None or np.isnan(own)))
    # Another run of the pair is not measured by that.
    other = app("overview", run=loaded.runs(loaded.current_pair() or "")[0].id)
    assert "measure-causes" in {each.key for each in other.button}


@pytest.mark.slow
def test_stopping_the_measurement_leaves_the_empty_map_with_its_button(loaded: Workspace) -> None:
    run = last_run(loaded)
    before = loaded.comparison(run)
    test = app("overview", run=run)
    test.button(key="measure-causes").click().run()
    job = next(j for j in session.active_jobs() if j.title.startswith("Measuring"))
    test.button(key=f"stop-causes-{job.id}").click().run()
    wait(test, lambda page: not session.active_jobs())
    test.run()
    assert "Where errors begin is not measured yet" in picture_titles(test)
    assert not test.button(key="measure-causes").disabled
    assert loaded.comparison(run) == before


@pytest.mark.slow
def test_a_tensors_page_tells_its_isolated_and_added_error(loaded: Workspace) -> None:
    run, tensor = last_run(loaded), "/head/Sigmoid_output_0"
    plain = app("tensors", run=run, tensor=tensor)
    assert "isolated" not in words(plain)
    workbench.isolate(loaded.root, run_id=run)
    own = next(a for a in session.comparison_of(run).activations if a.name == tensor)
    assert own.isolated_sqnr_db is not None
    assert own.added_sqnr_db is not None
    test = app("tensors", run=run, tensor=tensor)
    assert f"isolated {format_db(own.isolated_sqnr_db)}" in words(test)
    assert f"added {format_db(own.added_sqnr_db)}" in words(test)
    told = wait(test, lambda page: bool(page.table)).table[0].value
    rows = {
        label: str(told.loc[label].iloc[0]).replace("\\", "") for label in ("Isolated", "Added")
    }
    assert rows["Isolated"] == f"{format_db(own.isolated_sqnr_db)}, the node alone"
    assert rows["Added"].startswith(format_db(own.added_sqnr_db))


def test_hostile_names_are_escaped_on_the_cause_map(empty: Workspace) -> None:
    run = load_hostile(empty.root)
    workbench.isolate(empty.root, run_id=run)
    test = app(run=run, chart="Cause map", tensor=NAMES["r"])
    specs = [json.loads(each.proto.spec) for each in test.get("plotly_chart")]
    causes = next(s for s in specs if any("isolated" in str(t.get("name")) for t in s["data"]))
    shown = [causes["layout"]["title"]["text"], *causes["data"][0]["hovertext"]]
    shown += [a["text"] for a in causes["layout"]["annotations"]]
    for text in shown:
        bare = re.sub(r"</?b>|<br>|</?span[^>]*>", "", text)
        assert "<" not in bare
        assert "\u202e" not in text
        assert "\x1b" not in text
        assert len(text) < 1500
    assert NAMES["r"] in causes["data"][0]["customdata"], "a click selects the very tensor"
    assert test.button
    assert "measure-causes" not in {each.key for each in test.button}


# ── graph ────────────────────────────────────────────────────────────────────────────────────


def test_a_link_to_a_node_opens_its_card_and_selects_its_tensor(loaded: Workspace) -> None:
    run = last_run(loaded)
    test = app("graph", run=run, node="/head/Concat_3")
    wait(test, lambda page: any(b.key == "graph-float" for b in page.button))
    record = next(a for a in session.comparison_of(run).activations if a.node == "/head/Concat_3")
    assert f"`{record.name}` " in words(test)
    assert "`/head/Concat_3`" in words(test)
    assert format_db(record.accumulated_sqnr_db) in str([t.value for t in test.table])


@pytest.mark.slow
def test_the_next_worst_node_and_its_upstream_are_selected(loaded: Workspace) -> None:
    test = app("graph", run=last_run(loaded))
    wait(test, lambda page: any(b.key == "graph-next" for b in page.button))
    test.button(key="graph-next").click().run()
    first = test.query_params["node"]
    test.button(key="graph-next").click().run()
    assert test.query_params["node"] != first
    test.button(key="graph-upstream").click().run()
    assert test.query_params["node"]


@pytest.mark.slow
def test_what_the_search_found_is_ticked_at_once_and_undone(loaded: Workspace) -> None:
    test = app("graph", run=last_run(loaded))
    wait(test, lambda page: any(b.key == "graph-next" for b in page.button))
    test.text_input(key="find").set_value("/^Sigmoid$/").run()
    before = loaded.draft(loaded.current_pair() or "").get("nodes", [])
    test.button(key="graph-more-4").click().run()
    after = loaded.draft(loaded.current_pair() or "")["nodes"]
    assert len(after) > len(before)
    assert all("Sigmoid" in name for name in after[1:])
    test.button(key="undo").click().run()
    assert len(loaded.draft(loaded.current_pair() or "")["nodes"]) < len(after)


def test_a_search_is_words_or_a_regular_expression() -> None:
    assert graphs.matches("head conv", "/head/Conv_1", "Conv")
    assert not graphs.matches("head relu", "/head/Conv_1", "Conv")
    assert graphs.matches("/^conv$/", "/head/other", "Conv")
    assert not graphs.matches("/^head/", "/head/other", "Conv")
    assert not graphs.matches("/(/", "(", "Conv")


# ── findings ─────────────────────────────────────────────────────────────────────────────────


def test_the_overview_names_the_cause_and_its_remedy_is_ticked_and_taken_back(
    loaded: Workspace,
) -> None:
    run = loaded.runs(loaded.current_pair() or "")[0].id
    test = app("overview", run=run)
    wait(test, lambda page: any(b.key == "findings-0-apply" for b in page.button))
    assert "**concat-shared-scale** `/head/Concat_3`" in words(test)
    assert re.search(r"Measured, 1 node in float: 0\.0 dB → \d+\.\d dB", words(test))
    test.button(key="findings-0-apply").click().run()
    assert "/head/Concat_3" in loaded.draft(loaded.current_pair() or "")["nodes"]
    assert test.button(key="findings-0-apply").label == "Undo"
    test.button(key="findings-0-apply").click().run()
    assert "/head/Concat_3" not in loaded.draft(loaded.current_pair() or "")["nodes"]


@pytest.mark.slow
def test_the_list_is_written_for_another_tool(loaded: Workspace) -> None:
    test = app("exclusions", run=last_run(loaded))
    key = f"export-{last_run(loaded)}"
    test.segmented_control(key=key).set_value("nncf").run()
    wait(test, lambda page: "IgnoredScope" in words(page))
    assert "/head/Concat_3" in words(test)


@pytest.mark.slow
def test_a_link_to_what_is_not_there_says_so(loaded: Workspace) -> None:
    test = app("graph", run=last_run(loaded), node="nonsense", measure="nonsense", side="x")
    wait(test, lambda page: any(b.key == "graph-next" for b in page.button))
    assert "There is no node `nonsense` in this run" in words(test)
    assert "There is no measure `nonsense`" in words(test)


@pytest.mark.slow
def test_a_link_colours_by_the_measure_it_names(loaded: Workspace) -> None:
    test = app("graph", run=last_run(loaded), measure="local")
    wait(test, lambda page: any(b.key == "graph-next" for b in page.button))
    assert "local" in [box.value for box in test.selectbox]


# ── search ───────────────────────────────────────────────────────────────────────────────────


def search_page(loaded: Workspace, metric: str) -> AppTest:
    """The exclusions page with its search, after one with this goal."""
    goal = {"metric": metric, "value": 10.0, "unit": "dB", "higher_is_better": True}
    loaded.save_search(loaded.current_pair() or "", {"goal": goal, "trials": []})
    pair = loaded.current_pair() or ""
    test = app("exclusions", run=loaded.runs(pair)[0].id)
    return test.segmented_control(key="exclusions-view").set_value("Search").run()


@pytest.mark.slow
def test_a_search_proposes_the_join_and_its_list_is_ticked(loaded: Workspace) -> None:
    pair = loaded.current_pair() or ""
    test = search_page(loaded, "output_sqnr_db:output0[4:]")
    test.button(key="start-search").click().run()
    wait(test, lambda page: any(b.key == "tick-found" for b in page.button))
    found = loaded.search(pair)
    assert found["reached"]
    assert found["nodes"] == ["/head/Concat_3"]
    assert read_number(found["metric"]["before"]) < 1 < 10 <= read_number(found["metric"]["after"])
    assert any(each["nodes"] == found["nodes"] for each in found["trials"])
    test.button(key="tick-found").click().run()
    assert loaded.draft(pair)["nodes"] == ["/head/Concat_3"]
    # What was tried is kept: asked again, nothing runs.
    test.button(key="start-search").click().run()
    wait(test, lambda page: loaded.search(pair).get("evaluations") == 0)


@pytest.mark.slow
def test_a_search_by_a_metric_that_is_none_says_so(loaded: Workspace) -> None:
    test = search_page(loaded, "beauty")
    test.button(key="start-search").click().run()
    wait(test, lambda page: any("beauty" in e.value for e in page.error))


def _page_on_which_a_job_ends() -> None:
    """A page's script: a job is under way when the page begins, and over when it ends."""
    import streamlit as st

    from inspector.web import session
    from tests import job_samples

    if "job" not in st.session_state:
        job_id = session.worker().submit(job_samples.sleep, 0.5)
        st.session_state["job"] = job_id
        session.follow(job_id, "requantize")
    session.settle()
    st.text(f"news before: {session.has_news()}")
    session.worker().wait(st.session_state["job"])
    st.text(f"news after: {session.has_news()}")


def test_a_job_that_ends_while_its_page_runs_is_news_until_it_is_settled(
    loaded: Workspace,
) -> None:
    test = AppTest.from_function(_page_on_which_a_job_ends, default_timeout=PATIENCE).run()
    assert [each.value for each in test.text] == ["news before: False", "news after: True"]
    test.session_state["followed"] = {}
    test.run()
    assert [each.value for each in test.text] == ["news before: False", "news after: False"]


def _page_with_a_button_below_a_job() -> None:
    """A page's script: in its second run a job is over that was under way when it was asked for."""
    import streamlit as st

    from inspector.web import session, widgets
    from tests import job_samples

    runs = st.session_state["runs"] = st.session_state.get("runs", 0) + 1
    with session.whole_run():
        if runs == 2:
            worker = session.worker()
            asked = worker.status(worker.submit(job_samples.sleep, 0.1))
            worker.wait(asked.id)
            widgets.waiting(asked, height=58, key="job")
        if st.button("Below", key="below"):
            st.text(f"pressed in run {runs}")
            st.session_state["pressed"] = runs


def test_a_job_that_ends_above_a_button_does_not_swallow_its_press(loaded: Workspace) -> None:
    test = AppTest.from_function(_page_with_a_button_below_a_job, default_timeout=PATIENCE).run()
    test.button(key="below").click().run()
    assert test.session_state["pressed"] == 2
    assert test.session_state["runs"] == 3, "the page shows that the job is over"
    assert not test.exception
