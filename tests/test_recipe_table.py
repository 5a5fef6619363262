"""The table of recipes: which there are, that its figures are those of a whole comparison."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from inspector.compare import compare_models
from inspector.errors import Cancelled, FeedError, QuantizationError
from inspector.feeds import Feeds, load_feeds, split_calibration
from inspector.model import Model
from inspector.model_files import load_model
from inspector.quantize import quantize_model
from inspector.recipe import QuantConfig
from inspector.recipe_table import (
    OutputRunner,
    RecipeResult,
    RecipeRow,
    recipe_file_name,
    recipe_grid,
    recipe_key,
    recipe_label,
    recipes_json,
    run_recipes,
)
from inspector.render import dump_json
from tests.samples import (
    MODELS,
    array,
    boxes_and_scores_in_one_concat,
    conv_relu_gemm,
    floats,
    model,
    needs_models,
    npz_folder,
    qdq_of,
    save,
)

# A comparison adds up channels in the runtime, to 1e-6 relative.
SUMS_DB = 1e-5


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Feeds]:
    """The ordinary case, ten feeds: five calibrate."""
    folder = tmp_path_factory.mktemp("healthy")
    loaded = load_model(save(conv_relu_gemm(), folder / "float.onnx"))
    feeds = [{"x": floats((1, 3, 8, 8), seed)} for seed in range(10)]
    return loaded, load_feeds(npz_folder(folder / "inputs", feeds), loaded)


def tried(
    loaded: Model, feeds: Feeds, rows: list[RecipeRow], cache: Path, **options: Any
) -> list[RecipeResult]:
    split = split_calibration(feeds)
    return list(run_recipes(loaded, feeds, split, rows=rows, cache=cache, **options))


def last(results: list[RecipeResult]) -> dict[str, RecipeResult]:
    return {r.row.label: r for r in results}


# Which recipes.


def test_the_grid_is_every_combination_and_what_cannot_be_has_its_reason() -> None:
    rows = recipe_grid(QuantConfig())
    varied = {
        (
            r.config.method,
            r.config.per_channel,
            bool(r.config.activation_symmetric),
            r.config.activation_type,
            r.config.weight_type,
            r.config.reduce_range,
        )
        for r in rows
    }
    two = (False, True)
    types = ("uint8", "int8")
    methods = ("minmax", "entropy", "percentile")
    assert varied == set(itertools.product(methods, two, two, types, types, two))
    assert len(rows) == len(varied) == 96
    impossible = [r for r in rows if r.reason]
    assert {(r.config.activation_type, r.config.weight_type) for r in impossible} == {
        ("int8", "uint8")
    }
    assert len(impossible) == 24
    assert all("no kernels" in r.reason for r in impossible)
    assert list(rows[-24:]) == impossible
    assert len({r.label for r in rows}) == len({recipe_file_name(r.config) for r in rows}) == 96


def test_the_recipe_given_comes_first_and_the_rest_of_it_stays() -> None:
    base = QuantConfig(
        method="percentile",
        percentile=99.9,
        op_types=("Conv",),
        preprocess=False,
        calibration_samples=3,
        reduce_range=True,
        activation_symmetric=True,
    )
    rows = recipe_grid(base)
    assert rows[0].config == base
    assert len(rows) == 96
    for row in rows:
        config = row.config
        assert (config.op_types, config.preprocess) == (("Conv",), False)
        assert config.calibration_samples == 3
        assert config.percentile == (99.9 if config.method == "percentile" else None)


def test_per_channel_by_minmax_with_the_whole_range_is_the_first_guess() -> None:
    rows = recipe_grid(QuantConfig())
    assert [r.label for r in rows[:3]] == [
        "MinMax · per tensor · asymmetric · S8 S8",
        "MinMax · per channel · asymmetric · U8 S8",
        "MinMax · per channel · asymmetric · S8 S8",
    ]


def test_dynamic_quantization_has_fewer_choices() -> None:
    rows = recipe_grid(QuantConfig(format="dynamic"))
    assert len(rows) == 8
    assert not any(r.reason for r in rows)
    assert {r.config.method for r in rows} == {"minmax"}
    assert rows[0].label == "dynamic · per tensor · S8 weights"


def test_types_that_are_not_varied_keep_their_own_row_in_front() -> None:
    rows = recipe_grid(QuantConfig(activation_type="int16"))
    assert rows[0].config.activation_type == "int16"
    assert rows[0].label == "MinMax · per tensor · asymmetric · S16 S8"
    assert len(rows) == 97
    narrow = QuantConfig(weight_type="int4", reduce_range=True)
    own = next(r for r in recipe_grid(narrow) if r.config == narrow)
    assert own.reason == "there is no range to reduce in int4 weights"


def test_the_grid_of_a_row_is_the_grid_it_came_from() -> None:
    rows = recipe_grid(QuantConfig())
    wanted = {recipe_key(r.config.to_json()) for r in rows}
    asked = QuantConfig(activation_symmetric=False)  # which is the default
    for config in (*(row.config for row in rows), asked):
        assert {recipe_key(r.config.to_json()) for r in recipe_grid(config)} == wanted


# The figures.


def check_figures(
    loaded: Model,
    feeds: Feeds,
    config: QuantConfig,
    tmp_path: Path,
    cache: Path,
    **options: Any,
) -> None:
    """The lean figures against a whole comparison, to 1e-9 dB; those of channels to `SUMS_DB`."""
    split = split_calibration(feeds)
    target = tmp_path / "q.onnx"
    calibration = split.calibration if config.static else None
    quantize_model(loaded, config, calibration=calibration, output=target, cache=cache)
    quantized = load_model(target)
    whole = compare_models(
        loaded, quantized, feeds, seen=split.seen, measure_latency=False,
        explain_deployed=False, **options,
    )  # fmt: skip
    runner = OutputRunner(loaded, feeds, **options)
    for _ in range(2):  # the second time from what was kept
        figures, task, _ = runner.figures(quantized, seen=split.seen)
        assert [f.name for f in figures] == [o.name for o in whole.outputs]
        for mine, theirs in zip(figures, whole.outputs, strict=True):
            for key, within in (
                ("sqnr_db", 1e-9),
                ("deployed_sqnr_db", 1e-9),
                ("unseen_sqnr_db", 1e-9),
                ("worst_channel_sqnr_db", SUMS_DB),
            ):
                value, wanted = getattr(mine, key), getattr(theirs, key)
                assert (value is None) == (wanted is None), key
                if wanted is not None:
                    assert value == pytest.approx(wanted, abs=within, nan_ok=True), key
            parts = [s.sqnr_db for s in theirs.slices if s.sqnr_db != -math.inf]
            assert mine.worst_part_sqnr_db == (
                pytest.approx(min(parts), abs=SUMS_DB) if parts else None
            )
        assert task == whole.task


def test_figures_are_those_of_a_whole_comparison(
    healthy: tuple[Model, Feeds], tmp_path: Path, cache: Path
) -> None:
    check_figures(*healthy, QuantConfig(), tmp_path, cache)
    check_figures(*healthy, QuantConfig(format="qoperator"), tmp_path, cache)
    check_figures(*healthy, QuantConfig(format="dynamic"), tmp_path, cache)


def test_a_part_that_the_pooled_figure_hides_is_seen(tmp_path: Path, cache: Path) -> None:
    loaded = load_model(save(boxes_and_scores_in_one_concat(), tmp_path / "f.onnx"))
    feeds = [{"x": floats((1, 3, 6, 6), seed)} for seed in range(8)]
    check_figures(
        loaded,
        load_feeds(npz_folder(tmp_path / "in", feeds), loaded),
        QuantConfig(),
        tmp_path,
        cache,
    )
    (result,) = tried(
        loaded, load_feeds(tmp_path / "in", loaded), [recipe_grid(QuantConfig())[0]], cache
    )
    assert result.worst_part_db is not None
    assert result.worst_part_db < 10 < result.deployed_db


@needs_models
@pytest.mark.parametrize(
    ("folder", "config"),
    [
        ("mlperf-resnet8", QuantConfig(per_channel=True, activation_type="uint8")),
        pytest.param("fastestdet", QuantConfig(), marks=pytest.mark.slow),
        pytest.param("gtcrn", QuantConfig(), marks=pytest.mark.slow),
    ],
)
def test_figures_of_real_models_are_those_of_a_whole_comparison(
    folder: str, config: QuantConfig, tmp_path: Path, cache: Path
) -> None:
    loaded = load_model(MODELS / folder / "model.onnx")
    feeds = load_feeds(MODELS / folder / "inputs", loaded)
    check_figures(loaded, feeds, config, tmp_path, cache)


@needs_models
def test_state_is_carried_in_both_models(tmp_path: Path, cache: Path) -> None:
    loaded = load_model(MODELS / "silero-vad-16k" / "model.onnx")
    feeds = load_feeds(MODELS / "silero-vad-16k" / "inputs", loaded)
    states = [("stateN", "state")]
    check_figures(loaded, feeds, QuantConfig(), tmp_path, cache, states=states)


def padded() -> onnx.ModelProto:
    """Rows of numbers of any length, and a mask that says which of them count."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "mm"),
        helper.make_node("Relu", ["h"], ["y"], "relu"),
    ]
    proto = model(
        nodes, [("x", ["n", "t", 8])], [("y", ["n", "t", 4])], [array("w", floats((8, 4)))]
    )
    mask = helper.make_tensor_value_info("mask", TensorProto.INT64, ["n", "t"])
    proto.graph.input.append(mask)
    return proto


def test_padded_positions_do_not_count(tmp_path: Path, cache: Path) -> None:
    loaded = load_model(save(padded(), tmp_path / "f.onnx"))
    feeds = [
        {
            "x": floats((1, 4 + seed, 8), seed),
            "mask": (np.arange(4 + seed) < 3 + seed % 2)[None].astype(np.int64),
        }
        for seed in range(9)
    ]
    loaded_feeds = load_feeds(npz_folder(tmp_path / "in", feeds), loaded)
    check_figures(loaded, loaded_feeds, QuantConfig(), tmp_path, cache, mask="mask")
    with pytest.raises(FeedError, match="no input 'msk'"):
        OutputRunner(loaded, loaded_feeds, mask="msk")


def test_float_outputs_that_do_not_fit_into_memory_are_made_again(
    healthy: tuple[Model, Feeds], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inspector.recipe_table.KEPT_BYTES", 2000)
    check_figures(*healthy, QuantConfig(), tmp_path, cache)


def test_nan_before_the_last_q_leaves_no_figure(tmp_path: Path) -> None:
    root = helper.make_node("Sqrt", ["x"], ["y"], "root")
    loaded = load_model(save(model([root], [("x", [1, 4])], [("y", [1, 4])]), tmp_path / "f.onnx"))
    nodes, constants = qdq_of("n", "y", 0.01, 0)
    nodes = [
        helper.make_node("Sub", ["x", "one"], ["s"], "less"),
        helper.make_node("Sqrt", ["s"], ["n"], "root"),  # NaN below one
        *nodes,
    ]
    constants = [*constants, array("one", np.float32(1.0))]
    twin = model(nodes, [("x", [1, 4])], [("y", [1, 4])], constants)
    quantized = load_model(save(twin, tmp_path / "q.onnx"))
    for low, finite in ((1.5, True), (0.5, False)):
        feeds = load_feeds(
            npz_folder(tmp_path / str(low), [{"x": np.full((1, 4), low, np.float32)}]), loaded
        )
        whole = compare_models(
            loaded, quantized, feeds, measure_latency=False, explain_deployed=False
        )
        (figure,), _, _ = OutputRunner(loaded, feeds).figures(quantized)
        assert math.isfinite(figure.sqnr_db) is finite
        assert figure.sqnr_db == pytest.approx(whole.outputs[0].sqnr_db, abs=1e-9, nan_ok=True)
        assert figure.unseen_sqnr_db is None


# Trying them.


def test_every_row_is_yielded_once_it_is_there_and_again_with_times_of_one_turn(
    healthy: tuple[Model, Feeds], tmp_path: Path, cache: Path
) -> None:
    rows = [r for r in recipe_grid(QuantConfig()) if not r.config.reduce_range]
    rows = [r for r in rows if r.config.method == "minmax" and not r.config.activation_symmetric]
    results = tried(*healthy, rows, cache, output_folder=tmp_path / "kept")
    possible = [r for r in rows if not r.reason]
    assert (len(rows), len(possible)) == (8, 6)
    assert [r.row.reason != "" for r in results] == [True] * 2 + [False] * 12
    first, again = results[2:8], results[8:]
    assert first[0].row == rows[0]
    assert [r.row for r in first] == [r.row for r in again]
    assert {r.float_seconds for r in again} == {again[0].float_seconds}
    for before, after in zip(first, again, strict=True):
        assert replace(after, latency=None, float_seconds=None) == replace(
            before, latency=None, float_seconds=None
        )
        path = tmp_path / "kept" / f"{recipe_file_name(before.row.config)}.onnx"
        kept = load_model(path)
        assert (before.sha256, before.size_bytes) == (kept.sha256, kept.size_bytes)
        assert before.error == ""
        assert before.latency is not None


def test_next_is_the_recipe_nearest_to_the_best_so_far(
    healthy: tuple[Model, Feeds], cache: Path
) -> None:
    rows = [r for r in recipe_grid(QuantConfig()) if not r.reason]
    done: list[RecipeResult] = []
    loaded, feeds = healthy
    walk = run_recipes(
        loaded, feeds, split_calibration(feeds), rows=rows, cache=cache,
        stop=lambda: len(done) >= 8,
    )  # fmt: skip
    keys = ("method", "per_channel", "activation_symmetric", "activation_type", "weight_type",
            "reduce_range")  # fmt: skip
    waiting = [r.config for r in rows]
    for result in itertools.islice(walk, 8):
        if done:
            best = max(done, key=lambda r: r.deployed_db).row.config

            def apart(config: QuantConfig, best: QuantConfig = best) -> int:
                return sum(getattr(config, k) != getattr(best, k) for k in keys)

            assert apart(result.row.config) == min(map(apart, waiting))
        waiting.remove(result.row.config)
        done.append(result)
    assert len(done) == 8


def test_two_recipes_that_make_one_file_share_its_figures(
    healthy: tuple[Model, Feeds], cache: Path
) -> None:
    same = QuantConfig(activation_symmetric=False)  # which is the default
    rows = [RecipeRow(config=c, label=n) for c, n in ((QuantConfig(), "one"), (same, "two"))]
    loaded, feeds = healthy
    one, two, *_ = tried(loaded, feeds, rows, cache)
    assert one.sha256 == two.sha256
    assert (one.outputs, one.latency) == (two.outputs, two.latency), "it was not timed again"
    table = recipes_json(loaded, feeds, [one, two])
    assert [(r["label"], r["same_as"]) for r in table["rows"]] == [("one", ""), ("two", "one")]


def test_a_recipe_that_fails_is_a_row_and_not_the_end(tmp_path: Path, cache: Path) -> None:
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")],
        [("x", ["n", 4])],
        [("y", ["n", 4])],
        [array("w", floats((4, 4)))],
    )
    loaded = load_model(save(proto, tmp_path / "f.onnx"))
    ragged = [{"x": floats((1 + s, 4), s)} for s in range(8)]
    feeds = load_feeds(npz_folder(tmp_path / "in", ragged), loaded)
    rows = [
        RecipeRow(config=QuantConfig(op_types=("Conv",)), label="nothing"),
        RecipeRow(config=QuantConfig(), label="good"),
    ]
    results = last(tried(loaded, feeds, rows, cache))
    assert "nothing was quantized" in results["nothing"].error
    assert results["good"].error == ""
    table = recipes_json(loaded, feeds, list(results.values()))
    assert [(r["label"], r["state"]) for r in table["rows"]] == [
        ("good", "done"),
        ("nothing", "failed"),
    ]
    assert table["command"].startswith("quant-inspector quantize f.onnx -o f.int8.onnx")


def test_ranges_that_cannot_be_observed_are_refused_once(tmp_path: Path, cache: Path) -> None:
    loaded = load_model(save(conv_relu_gemm(), tmp_path / "f.onnx"))
    bad = [{"x": floats((1, 3, 8, 8), s)} for s in range(8)]
    bad[0]["x"][0, 0, 0, 0] = np.nan
    feeds = load_feeds(npz_folder(tmp_path / "in", bad), loaded)
    rows = [r for r in recipe_grid(QuantConfig()) if not r.reason and not r.config.reduce_range]
    seen: list[str] = []
    results = tried(loaded, feeds, rows, cache, progress=lambda _f, message: seen.append(message))
    assert len(results) == len(rows)
    assert all("NaN or infinite" in r.error for r in results)
    steps = Counter(m.split(":")[0] for m in seen if m.startswith("recipe "))
    tries = {(r.config.method == "minmax", r.config.per_channel) for r in rows}
    # Said and refused: no sample is read again.
    assert sum(count > 1 for count in steps.values()) <= len(tries) + 2
    assert recipes_json(loaded, feeds, results)["command"] is None


def test_what_was_there_stays_when_it_is_stopped(healthy: tuple[Model, Feeds], cache: Path) -> None:
    loaded, feeds = healthy
    rows = [r for r in recipe_grid(QuantConfig()) if not r.reason]
    done: list[RecipeResult] = []

    def stop(_fraction: float, message: str) -> None:
        if message.startswith("recipe 3 of 72"):
            raise Cancelled

    split = split_calibration(feeds)
    results = run_recipes(loaded, feeds, split, rows=rows, cache=cache, progress=stop)
    done += [next(results), next(results)]
    with pytest.raises(Cancelled):
        next(results)
    table = recipes_json(loaded, feeds, done, planned=rows)
    states = [r["state"] for r in table["rows"]]
    assert states == ["done"] * 2 + ["waiting"] * 70


def test_progress_counts_rows_and_only_grows(healthy: tuple[Model, Feeds], cache: Path) -> None:
    rows = [r for r in recipe_grid(QuantConfig()) if not r.reason][:4]
    told: list[tuple[float, str]] = []
    tried(*healthy, rows, cache, progress=lambda f, m: told.append((f, m)))
    fractions = [f for f, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert any(m.startswith("recipe 4 of 4: ") for _, m in told)


def test_nothing_to_try_runs_nothing(healthy: tuple[Model, Feeds], cache: Path) -> None:
    loaded, feeds = healthy
    rows = [r for r in recipe_grid(QuantConfig()) if r.reason]
    assert [r.row for r in tried(loaded, feeds, rows, cache)] == rows
    table = recipes_json(loaded, feeds, [])
    assert (table["rows"], table["command"]) == ([], None)


# The table.


def test_the_table_is_strict_json_best_first_and_takes_up_earlier_rows(
    healthy: tuple[Model, Feeds], cache: Path
) -> None:
    loaded, feeds = healthy
    rows = [r for r in recipe_grid(QuantConfig()) if not r.reason][:3]
    results = tried(loaded, feeds, rows, cache)
    table = recipes_json(loaded, feeds, results, planned=rows, inputs="in", calibration="cal")
    assert '"format": "quant-inspector/recipes"' in dump_json(table)
    numbers = [r["deployed_sqnr_db"] for r in table["rows"]]
    assert numbers == sorted(numbers, reverse=True)
    assert "--inputs in --calibration cal" in table["command"]
    kept = recipes_json(loaded, feeds, [], planned=rows, kept=table["rows"])
    assert kept["rows"] == table["rows"]
    exact = {**table["rows"][-1], "deployed_sqnr_db": "Infinity", "sha256": "other"}
    better = recipes_json(loaded, feeds, results, kept=[{**exact, "recipe": {"format": "qdq"}}])
    assert better["rows"][0]["deployed_sqnr_db"] == "Infinity"


def test_labels_say_what_is_varied() -> None:
    config = QuantConfig(
        method="entropy", activation_type="uint8", activation_symmetric=True, reduce_range=True
    )
    assert recipe_label(config) == "Entropy · per tensor · symmetric · U8 S8 · 7 bit"
    assert recipe_file_name(config) == "entropy-tensor-sym-u8s8-7bit"


def test_the_reason_given_for_s8_with_u8_is_what_the_quantizer_says(
    healthy: tuple[Model, Feeds], tmp_path: Path, cache: Path
) -> None:
    loaded, feeds = healthy
    config = next(r.config for r in recipe_grid(QuantConfig()) if r.reason)
    with pytest.raises(QuantizationError, match="no kernels for int8 activations with uint8"):
        quantize_model(loaded, config, calibration=feeds, output=tmp_path / "q.onnx", cache=cache)
