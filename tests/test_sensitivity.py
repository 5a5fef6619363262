"""Sensitivity: the figures of files that ONNX Runtime makes, one per node, without making them.

The oracles are `quantize_static` on the same ranges, and float64 arithmetic written out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

from inspector.calibration import calibrate, hushed
from inspector.cli import main
from inspector.errors import Cancelled, RunError
from inspector.feeds import Feeds, load_feeds, random_feeds, split_calibration
from inspector.live import measure_run
from inspector.metrics import decibels, powers
from inspector.model import Model
from inspector.model_files import load_model
from inspector.prepare import prepare
from inspector.quantize import quantize_model
from inspector.recipe import QuantConfig
from inspector.render import dump_json, sensitivity_lines, strict
from inspector.runtime import open_session
from inspector.sensitivity import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    grouped,
    measure_sensitivity,
    measured_on,
    rank_correlation,
)
from inspector.store import SENSITIVITY_KEY, FeedSource, Workspace
from inspector.task_metrics import parse_metric
from inspector.trials import Request, Trial, Trials, open_trials
from inspector.workbench import free_in_file, load_pair
from tests.samples import MODELS, conv_relu_gemm, needs_models, npz_folder, rng, save

RESNET = MODELS / "mlperf-resnet8"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


class Opened:
    """A model and its feeds, with trials as often as wanted."""

    def __init__(
        self, float_model: Model, feeds: Feeds, cache: Path, config: QuantConfig | None = None
    ) -> None:
        self.model, self.feeds, self.cache = float_model, feeds, cache
        self.config = config or QuantConfig()
        self.split = split_calibration(feeds)

    def trials(self, **options: Any) -> Trials:
        return open_trials(
            self.model, self.config, self.feeds, self.split, "output_sqnr_db", cache=self.cache,
            **options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def resnet(cache: Path) -> Opened:
    float_model = load_model(RESNET / "model.onnx")
    return Opened(float_model, load_feeds(RESNET / "inputs", float_model, limit=10), cache)


@pytest.fixture
def small(tmp_path: Path, cache: Path) -> Opened:
    """Conv, Relu and Gemm on 12 random samples."""
    float_model = load_model(save(conv_relu_gemm(), tmp_path / "small.onnx"))
    return Opened(float_model, random_feeds(float_model, samples=12, seed=1), cache)


def by_public_function(opened: Opened, target: Path, **options: Any) -> float:
    """The SQNR in dB of the file that `quantize_static` writes, simulated."""
    prepared = prepare(opened.model, opened.config, opened.cache).model
    ranges = calibrate(prepared, opened.split.calibration, cache=opened.cache).path
    with hushed():
        quantize_static(
            prepared.path, target, None, quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
            calibration_cache_path=ranges, **options,
        )  # fmt: skip
    sessions = [open_session(m, optimized=False) for m in (opened.model, target)]
    total = np.zeros(2)
    for feed in opened.feeds:
        reference, actual = (s.run(feed) for s in sessions)
        total += sum(powers(reference[name], actual[name]) for name in reference)
    return decibels(*total)


@needs_models
@pytest.mark.parametrize("name", ["Conv_2", "Conv_11", "Gemm_24"])
def test_figures_are_those_of_the_files_that_onnx_runtime_makes(
    name: str, resnet: Opened, tmp_path: Path
) -> None:
    table = measure_sensitivity(resnet.trials(), resnet.model, [name], coarse_samples=None)
    row = table.rows[0]
    assert (row.name, row.op_type, len(table.rows)) == (name, name.split("_")[0], 1)
    target = tmp_path / "q.onnx"
    only = by_public_function(resnet, target, nodes_to_quantize=[name])
    without = by_public_function(resnet, target, nodes_to_exclude=[name])
    whole = by_public_function(resnet, target)
    assert row.only["both"].figure == pytest.approx(only, abs=1e-6)
    assert row.without is not None
    assert row.without.figure == pytest.approx(without, abs=1e-6)
    assert table.whole["both"].figure == pytest.approx(whole, abs=1e-6)
    assert row.gain == pytest.approx(without - whole, abs=1e-6)


@needs_models
def test_weights_and_activations_alone_are_told_apart(resnet: Opened) -> None:
    parts = ("both", "weights", "activations")
    trials = resnet.trials()
    table = measure_sensitivity(trials, resnet.model, ["Conv_2", "Add_19"], parts=parts)
    rows = {row.name: row for row in table.rows}
    assert set(table.whole) == set(parts)
    # An Add of two activations has no weight.
    assert rows["Add_19"].only["weights"].figure == math.inf
    assert rows["Add_19"].only["activations"] == rows["Add_19"].only["both"]
    conv = {part: found.figure for part, found in rows["Conv_2"].only.items()}
    assert math.isfinite(conv["weights"])
    assert math.isfinite(conv["activations"])
    # By float32 arithmetic: the weight on its grid, everything else as it was.
    board = trials.source.board  # type: ignore[attr-defined]
    weight = resnet.model.node_by_name["Conv_2"].inputs[1]
    plan = board.plan_of([n for n in board._quantizer.nodes if n != "Conv_2"])
    on_grid = board._quantizer.values(weight, plan.weights[weight])
    proto = prepare(resnet.model, resnet.config, resnet.cache).model.complete()
    stored = next(i for i in proto.graph.initializer if i.name == weight)
    stored.raw_data = on_grid.astype(np.float32).tobytes()
    del stored.float_data[:]
    sessions = [open_session(resnet.model, optimized=False), open_session(proto, optimized=False)]
    total = np.zeros(2)
    for feed in resnet.feeds:
        reference, actual = (s.run(feed) for s in sessions)
        total += sum(powers(reference[name], actual[name]) for name in reference)
    # The bias on its own grid is part of the weights.
    assert conv["weights"] == pytest.approx(decibels(*total), abs=0.2)


def test_blocks_and_operator_types_are_measured_as_one(small: Opened) -> None:
    names = ["a/b/conv", "a/b/gemm", "a/c/conv", "alone"]
    types = dict(zip(names, ["Conv", "Gemm", "Conv", "Conv"], strict=True))
    assert grouped(names, types, "node") == {name: (name,) for name in names}
    assert grouped(names, types, "block") == {"a/b": ("a/b/conv", "a/b/gemm")}
    assert grouped(names, types, "op-type") == {
        "Conv": ("a/b/conv", "a/c/conv", "alone"), "Gemm": ("a/b/gemm",),
    }  # fmt: skip
    with pytest.raises(ValueError, match="'colour'"):
        grouped(names, types, "colour")
    trials = small.trials()
    table = measure_sensitivity(trials, small.model, by="op-type", coarse_samples=None)
    gemm = next(row for row in table.rows if row.name == "Gemm")
    alone = measure_sensitivity(trials, small.model, gemm.nodes, coarse_samples=None)
    assert gemm.only == alone.rows[0].only
    assert gemm.macs == alone.rows[0].macs > 0
    nothing = measure_sensitivity(trials, small.model, by="block")
    assert nothing.rows == ()
    assert "nothing to group" in nothing.notes[-1]


def figures(table: Any) -> dict[str, Any]:
    return {row.name: (row.only, row.without, row.gain) for row in table.rows}


def test_few_samples_come_first_and_all_for_the_worst(small: Opened) -> None:
    every = measure_sensitivity(small.trials(), small.model, coarse_samples=None)
    assert {m.samples for row in every.rows for m in row.only.values()} == {12}
    table = measure_sensitivity(small.trials(), small.model, coarse_samples=3, refined=1)
    counts = {row.name: row.only["both"].samples for row in table.rows}
    assert set(counts.values()) <= {3, 12}
    assert 12 in counts.values()
    if 3 in counts.values():
        assert f"of {len(table.rows)} rows were measured on all 12 samples" in table.notes[0]
    known = figures(every)
    for row in table.rows:
        if counts[row.name] == 12:
            assert row.only == known[row.name][0]
            assert row.gain == known[row.name][2]


def stopping_after(count: int) -> Callable[[float, str], None]:
    seen: list[str] = []

    def progress(_fraction: float, message: str) -> None:
        seen.append(message)
        if len(seen) > count:
            raise KeyboardInterrupt

    return progress


def test_what_was_stopped_goes_on_and_repeats_nothing(small: Opened, tmp_path: Path) -> None:
    options: dict[str, Any] = {"coarse_samples": 3, "refined": 2}
    whole = measure_sensitivity(small.trials(), small.model, **options)
    third = whole.evaluations // 3
    assert third > 1
    folder = tmp_path / "kept"
    stopped = measure_sensitivity(
        small.trials(folder=folder), small.model, progress=stopping_after(third), **options
    )
    assert (stopped.complete, stopped.interrupted) == (False, True)
    assert stopped.evaluations == third
    assert "stopped" in stopped.notes[-1]
    assert any(row.only or row.without for row in stopped.rows)
    resumed = measure_sensitivity(small.trials(folder=folder), small.model, **options)
    assert resumed.complete
    assert resumed.evaluations + stopped.evaluations == whole.evaluations
    assert resumed.runs + stopped.runs == whole.runs
    assert figures(resumed) == figures(whole)
    again = measure_sensitivity(small.trials(folder=folder), small.model, **options)
    assert (again.evaluations, figures(again)) == (0, figures(whole))


@needs_models
def test_a_second_time_the_same_rows_are_refined(resnet: Opened, tmp_path: Path) -> None:
    options: dict[str, Any] = {"coarse_samples": 3, "refined": 4}
    tables = [
        measure_sensitivity(resnet.trials(folder=tmp_path), resnet.model, **options)
        for _ in range(2)
    ]
    assert figures(tables[1]) == figures(tables[0])
    assert tables[1].evaluations == 0


def test_a_budget_ends_it_with_what_is_there(small: Opened) -> None:
    answers = iter([False, False, True])
    table = measure_sensitivity(small.trials(), small.model, stop=lambda: next(answers))
    assert (table.evaluations, table.complete, table.interrupted) == (2, False, False)
    assert len(table.rows) > 1


@pytest.mark.parametrize("threads", [1, 5])
def test_samples_side_by_side_give_the_same(
    threads: int, small: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inspector.trials._THREADS", threads)
    trials = small.trials()
    found = trials.measure(Request())
    session, quantized = open_session(small.model, optimized=False), trials.source
    run = quantized.runner((), None)
    for at, feed in enumerate(small.feeds):
        reference = session.run(feed)
        wanted = trials.metric.sums(at, reference, run(feed, "it"))
        assert np.array_equal(found.sums[at], wanted)


def test_a_finished_file_is_measured_by_freeing_nodes_alone(small: Opened, tmp_path: Path) -> None:
    made = quantize_model(
        small.model, small.config, calibration=small.feeds, output=tmp_path / "q.onnx",
        cache=small.cache,
    )  # fmt: skip
    table = measure_sensitivity(small.trials(quantized=load_model(made.path)), small.model)
    assert table.rows
    assert all(row.only == {} and row.without is not None for row in table.rows)
    assert any("only one node quantized was not measured" in note for note in table.notes)
    none = measure_sensitivity(
        small.trials(quantized=load_model(made.path)), small.model, ways=["only"]
    )
    assert all(row.without is None and not row.only for row in none.rows)


def test_dynamic_recipes_are_measured_in_their_own_file(small: Opened) -> None:
    dynamic = Opened(small.model, small.feeds, small.cache, QuantConfig(format="dynamic"))
    table = measure_sensitivity(dynamic.trials(), dynamic.model)
    assert any("format dynamic" in note for note in table.notes)
    assert [row.op_type for row in table.rows]
    # A dynamic file of one Gemm less is nearer to the float model.
    gains = {row.op_type: row.gain for row in table.rows}
    assert gains["Gemm"] is not None
    assert gains["Gemm"] > 0


# -- intervals and ranks -----------------------------------------------------------------------


def interval_written_out(sums: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The middle share of pooled SQNR over the same draws, one draw after the other."""
    rng = np.random.default_rng(SEED)
    found = []
    for draw in rng.integers(len(sums), size=(RESAMPLES, len(sums))):
        signal = math.fsum(sums[at][0] for at in draw)
        noise = math.fsum(sums[at][1] for at in draw)
        found.append(10 * math.log10(signal / noise) if noise else math.inf)
    found.sort()
    outside = round((1 - CONFIDENCE) / 2 * (RESAMPLES - 1))
    return found[outside], found[RESAMPLES - 1 - outside]


def trial_of(sums: Sequence[Sequence[float]]) -> Trial:
    return Trial(request=Request(), sums={at: np.array(s, np.float64) for at, s in enumerate(sums)})


def test_intervals_are_those_of_resampled_samples() -> None:
    metric = parse_metric("output_sqnr_db", ["y"])
    rng = np.random.default_rng(4)
    sums = np.column_stack([rng.uniform(1, 9, 15), rng.lognormal(-5, 2, 15)]).tolist()
    found = measured_on(metric, trial_of(sums), range(15))
    low, high = interval_written_out(sums)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert low < found.figure < high
    assert found.samples == 15
    # The same again: the draws are seeded.
    assert measured_on(metric, trial_of(sums), range(15)) == found


@pytest.mark.parametrize(
    ("noise", "low", "high"),
    [([0, 0, 0], math.inf, math.inf), ([2, 2, 2], 0.0, 0.0), ([math.nan, 2, 2], None, None)],
)
def test_intervals_of_what_is_exact_or_not_finite(
    noise: Sequence[float], low: float | None, high: float | None
) -> None:
    metric = parse_metric("output_sqnr_db", ["y"])
    found = measured_on(metric, trial_of([[2.0, n] for n in noise]), range(3))
    if low is None:
        assert found.low is not None
        assert math.isnan(found.low)
    else:
        assert (found.low, found.high) == (low, high)


def test_one_sample_has_no_interval() -> None:
    found = measured_on(parse_metric("output_sqnr_db", ["y"]), trial_of([[4.0, 2.0]]), [0])
    assert (found.low, found.high, found.samples) == (None, None, 1)
    assert found.figure == pytest.approx(10 * math.log10(2))


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 8, 12).tolist(), rng.integers(0, 8, 12).tolist()

        def mean_ranks(values: Sequence[int]) -> list[float]:
            return [
                sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2
                for value in values
            ]

        wanted = np.corrcoef(mean_ranks(a), mean_ranks(b))[0, 1]
        assert rank_correlation(a, b) == pytest.approx(wanted)
    assert rank_correlation([1, 2, math.inf], [3, 4, 5]) == pytest.approx(1)
    assert rank_correlation([3, 2, 1, -math.inf], [1, 2, 3, 4]) == pytest.approx(-1)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


@needs_models
def test_a_ranking_that_turns_with_the_samples_is_said_to(resnet: Opened) -> None:
    table = measure_sensitivity(resnet.trials(), resnet.model, coarse_samples=1, refined=99)
    for way, ranks in table.stability.items():
        assert ranks is not None
        said = any(n.startswith("unstable-ranking") and f'"{way}"' in n for n in table.notes)
        assert said == (ranks < 0.7)


# -- record and command line -------------------------------------------------------------------


def test_the_record_is_strict_json(small: Opened) -> None:
    table = measure_sensitivity(small.trials(), small.model, parts=("both", "weights"))
    data = json.loads(dump_json(table.to_json()))
    assert (data["format"], data["version"]) == ("quant-inspector/sensitivity", 1)
    assert data == strict(table.to_json())
    row = data["rows"][0]
    assert set(row) == {"name", "nodes", "op_type", "macs", "only", "without", "gain", "reason"}
    assert row["only"]["both"].keys() == {"figure", "low", "high", "samples"}
    lines = sensitivity_lines(table, 1)
    assert table.rows[0].name in "".join(lines)
    assert lines[-1] == f"and {len(table.rows) - 1} more"


@pytest.mark.parametrize("wrong", [{"ways": ["both"]}, {"parts": ["bias"]}, {"by": "colour"}])
def test_a_wrong_word_is_refused(wrong: dict[str, Any], small: Opened) -> None:
    with pytest.raises(ValueError, match=r"both|bias|colour"):
        measure_sensitivity(small.trials(), small.model, **wrong)


def test_the_command_writes_the_record_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(tmp_path / "data"))
    path, out = save(conv_relu_gemm(), tmp_path / "small.onnx"), tmp_path / "out.json"
    words = ["sensitivity", str(path), "--random", "4", "--state", str(tmp_path / "kept")]
    assert main([*words, "--json", str(out)]) == 0
    first = json.loads(out.read_text())
    assert "gain" in capsys.readouterr().out
    assert first["evaluations"] > 0
    assert main([*words, "--json", str(out), "--metric", "output_sqnr_db"]) == 0
    assert json.loads(out.read_text())["evaluations"] == 0
    assert main([*words, "--metric", "output_sqnr_db:y9"]) == 2
    assert main([*words, "--activation-type", "uint8"]) == 2
    assert "another model, recipe, metric or feeds" in capsys.readouterr().err
    names = [row["name"] for row in first["rows"]]
    assert main([*words[:4], "--node", names[0], "--way", "without", "--json", "-"]) == 0
    only = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in only["rows"]] == names[:1]
    assert only["rows"][0]["only"] == {}


# -- in the app --------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, str]:
    """A workspace with one float model, quantized with the defaults."""
    root = tmp_path / "workspace"
    Workspace(root)
    feeds = [{"x": rng(at).standard_normal((1, 3, 8, 8)).astype("float32")} for at in range(4)]
    source = FeedSource(kind="path", path=str(npz_folder(tmp_path / "feeds", feeds)))
    path = save(conv_relu_gemm(), tmp_path / "model.onnx")
    return root, load_pair(root, float_path=path, quantized_path=None, inputs=source)


def test_a_runs_sensitivity_is_kept_with_it(run: tuple[Path, str]) -> None:
    root, run_id = run
    told: list[str] = []
    found = measure_run(root, run_id=run_id, progress=lambda _, message: told.append(message))
    workspace = Workspace(root)
    assert workspace.detail(run_id, SENSITIVITY_KEY) == found
    float_model = load_model(workspace.pair(workspace.run(run_id).pair_id).float_model.path)
    feeds = load_feeds(root.parent / "feeds", float_model)
    wanted = measure_sensitivity(
        Opened(float_model, feeds, workspace.cache).trials(), float_model, ways=["only"]
    )
    assert {r["name"]: r["only"] for r in found["rows"]} == {
        r.name: strict(r.to_json()["only"]) for r in wanted.rows
    }
    assert any(message.startswith("list ") for message in told)

    def refuse(_fraction: float, message: str) -> None:
        raise AssertionError(message)

    assert measure_run(root, run_id=run_id, progress=refuse) == found


def test_what_was_cancelled_in_the_app_goes_on(run: tuple[Path, str]) -> None:
    root, run_id = run
    seen: list[str] = []

    def cancel(_fraction: float, message: str) -> None:
        seen.append(message)
        if message.startswith("list 3"):
            raise Cancelled

    with pytest.raises(Cancelled):
        measure_run(root, run_id=run_id, progress=cancel)
    assert Workspace(root).detail(run_id, SENSITIVITY_KEY) is None
    found = measure_run(root, run_id=run_id)
    assert found["complete"]
    assert found["evaluations"] == 1 + len(found["rows"]) - 2


def test_a_run_by_surgery_cannot_be_measured_so(run: tuple[Path, str], tmp_path: Path) -> None:
    root, run_id = run
    made = Workspace(root).run(run_id).model.path
    source = FeedSource(kind="path", path=str(tmp_path / "feeds"))
    other = load_pair(
        root, float_path=tmp_path / "model.onnx", quantized_path=made, inputs=source
    )  # fmt: skip
    node = load_model(tmp_path / "model.onnx").nodes[0].name
    freed = free_in_file(root, run_id=other, exclude=[node])
    with pytest.raises(RunError, match="keep their scales"):
        measure_run(root, run_id=freed)
