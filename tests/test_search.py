"""The search for the smallest exclusion list, on models whose culprits are planted.

The oracle for "smallest" is every list there is; for figures it is the comparison of real files.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from inspector.cli import main
from inspector.compare import compare_models
from inspector.exclusions import read_exclusions
from inspector.feeds import Feeds, load_feeds, random_feeds, split_calibration
from inspector.model import Model
from inspector.model_files import load_model
from inspector.output_metrics import Guided
from inspector.quantize import quantize_model
from inspector.real_files import RealFiles, cures_for, try_cures
from inspector.recipe import QuantConfig
from inspector.search import find_exclusions
from inspector.search_result import Goal, SearchResult, SearchTrial, exclusion_list, search_lines
from inspector.trials import Request, Trials, open_trials, quantized_nodes
from tests.samples import (
    MODELS,
    array,
    conv_relu_gemm,
    floats,
    model,
    needs_models,
    npz_folder,
    rng,
    save,
)

CONFIG = QuantConfig()
WIDTH, ROWS = 8, 64


def branches(outliers: Sequence[float], *, together: bool = False) -> onnx.ModelProto:
    """Products of the same input, added up: each is as bad as the outlier in its weight.

    The outlier multiplies a part of the input that is 0, so that nothing but the weight's scale
    sees it: leaving that one node in float takes all of its noise away.

    Args:
        outliers: of each product's weight; 1 for none.
        together: before all of it, one part of the input is made large by one node and small again
            by the next; the tensor between loses the others as long as one of the two is quantized.
    """
    nodes, constants, terms = [], [], []
    start = "x"
    if together:
        gain = np.ones((1, WIDTH), np.float32)
        gain[0, 1] = 3000.0
        constants += [array("gain", gain), array("back", 1 / gain)]
        nodes += [
            helper.make_node("Mul", ["x", "gain"], ["wide"], "widen"),
            helper.make_node("Mul", ["wide", "back"], ["narrow"], "narrow"),
        ]
        start = "narrow"
    for at, outlier in enumerate(outliers):
        weight = floats((WIDTH, WIDTH), at + 1)
        weight[0, 0] = 4.0 * outlier
        constants.append(array(f"w{at}", weight))
        nodes.append(helper.make_node("MatMul", [start, f"w{at}"], [f"p{at}"], f"product_{at}"))
        terms.append(f"p{at}")
    while len(terms) > 1:
        out = "y" if len(terms) == 2 else f"s{len(terms)}"
        nodes.append(helper.make_node("Add", terms[:2], [out], f"add_{out}"))
        terms = [out, *terms[2:]]
    return model(nodes, [("x", [ROWS, WIDTH])], [("y", [ROWS, WIDTH])], constants)


def feeds_for(count: int) -> list[dict[str, Any]]:
    found = []
    for seed in range(count):
        # Enough rows between the same limits that unseen feeds stay within the ranges of the seen.
        x = rng(100 + seed).uniform(-2, 2, (ROWS, WIDTH)).astype(np.float32)
        x[:, 0] = 0.0
        found.append({"x": x})
    return found


class Planted:
    """A planted model with feeds, all of which calibrate and judge."""

    def __init__(self, proto: onnx.ModelProto, folder: Path, samples: int = 6) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.path = save(proto, folder / "model.onnx")
        self.model: Model = load_model(self.path)
        self.inputs = npz_folder(folder / "inputs", feeds_for(samples))
        self.feeds: Feeds = load_feeds(self.inputs, self.model)
        self.split = split_calibration(self.feeds, self.feeds)

    def trials(self, metric: str = "output_sqnr_db", folder: Path | None = None) -> Trials:
        return open_trials(
            self.model, CONFIG, self.feeds, self.split, metric,
            cache=self.folder / "cache", folder=folder, beside=True,
        )  # fmt: skip

    def search(self, value: float, trials: Trials | None = None, **options: Any) -> SearchResult:
        trials = self.trials() if trials is None else trials
        return find_exclusions(
            trials,
            Goal.of(trials.metric, value),
            candidates=quantized_nodes(trials, self.model),
            **options,
        )

    def smallest(self, value: float, *, most_macs: float = math.inf) -> int | None:
        """The size of the smallest list of products that does, by trying all of them."""
        trials = self.trials()
        names = [n.name for n in self.model.nodes if n.op_type == "MatMul"]
        for size in range(len(names) + 1):
            for some in itertools.combinations(names, size):
                trial = trials.measure(Request(exclude=frozenset(some)))
                price = trials.source.change(some, None).float_macs_fraction
                if trials.figure(trial) >= value and price <= most_macs:
                    return size
        return None


def test_one_culprit_is_the_whole_list(tmp_path: Path) -> None:
    planted = Planted(branches([1, 1, 400, 1, 1, 1]), tmp_path)
    result = planted.search(30)
    assert result.reached
    assert result.nodes == ("product_2",)
    assert result.before < 20 < 30 <= result.after
    assert result.float_macs_fraction == pytest.approx(1 / 6)
    assert result.evaluations <= result.candidates + 20


def test_two_nodes_that_only_help_together_are_found_together(tmp_path: Path) -> None:
    planted = Planted(branches([1, 1, 1, 1], together=True), tmp_path)
    trials = planted.trials()
    alone = [
        trials.figure(trials.measure(Request(exclude=frozenset(names))))
        for names in ((), ("widen",), ("narrow",), ("widen", "narrow"))
    ]
    # Either of the two is no better than none: one step ahead sees nothing.
    assert max(alone[:3]) < 15 < 25 < alone[3]
    result = planted.search(25, trials)
    assert result.reached
    assert result.nodes == ("widen", "narrow")


@pytest.mark.parametrize("value", [14, 17, 20])
def test_of_spread_damage_no_more_nodes_are_taken_than_any_list_needs(
    value: float, tmp_path: Path
) -> None:
    planted = Planted(branches([40, 25, 60, 30, 50, 35]), tmp_path)
    result = planted.search(value)
    assert result.reached
    assert len(result.nodes) == planted.smallest(value)
    assert 1 < len(result.nodes) < 6


def test_a_goal_that_is_reached_already_needs_no_list_and_one_trial(tmp_path: Path) -> None:
    result = Planted(branches([1, 1, 1]), tmp_path).search(10)
    assert (result.reached, result.nodes, result.evaluations) == (True, (), 1)
    assert result.float_macs_fraction == 0.0


def test_a_goal_that_nothing_reaches_gives_the_best_list_and_says_so(tmp_path: Path) -> None:
    planted = Planted(branches([1, 400, 1]), tmp_path)
    trials = planted.trials("cosine")
    assert isinstance(trials.metric, Guided)
    result = planted.search(1.5, trials)
    assert not result.reached
    assert result.nodes == ("product_1",)
    assert result.after > 0.98 > 0.9 > result.before
    assert any("even with every node in float" in note for note in result.notes)
    assert "not reached" in "\n".join(search_lines(result, planted.model))


def test_the_price_bounds_the_list_and_nothing_dearer_is_given(tmp_path: Path) -> None:
    planted = Planted(branches([400, 1, 60, 50, 1, 1]), tmp_path)
    free = planted.search(30)
    assert free.reached
    assert free.nodes == ("product_0", "product_2", "product_3")
    bound = planted.search(30, max_float_macs=0.34)
    assert not bound.reached
    assert bound.float_macs_fraction <= 0.34
    assert "product_0" in bound.nodes
    every = [t for t in bound.trials if t.float_macs_fraction <= 0.34]
    assert bound.after == max(t.figure for t in every)
    assert planted.smallest(30, most_macs=0.34) is None
    enough = planted.search(30, max_float_macs=0.5)
    assert enough.reached
    assert enough.nodes == free.nodes


def test_a_budget_that_is_used_up_ends_with_what_there_is(tmp_path: Path) -> None:
    planted = Planted(branches([1, 400, 1]), tmp_path)
    result = planted.search(30, budget_seconds=0.0)
    assert (result.reached, result.ended) == (False, "the budget is used up")
    assert result.evaluations == 0


def stop_after(trials: Trials, evaluations: int) -> Callable[[], bool]:
    return lambda: trials.evaluations >= evaluations


def test_what_was_stopped_goes_on_without_running_anything_twice(tmp_path: Path) -> None:
    planted = Planted(branches([40, 25, 60, 30, 50]), tmp_path, samples=12)
    through = planted.trials()
    whole = planted.search(20, through)
    kept = tmp_path / "state"
    first = planted.trials(folder=kept)
    stopped = planted.search(20, first, stop=stop_after(first, through.evaluations // 3))
    assert (stopped.ended, stopped.reached) == ("stopped", False)
    assert 0 < first.runs < through.runs
    second = planted.trials(folder=kept)
    resumed = planted.search(20, second)
    assert first.runs + second.runs == through.runs
    assert (resumed.nodes, resumed.trials) == (whole.nodes, whole.trials)


def test_ctrl_c_gives_the_best_so_far(tmp_path: Path) -> None:
    planted = Planted(branches([400, 1, 60, 50, 1]), tmp_path)
    trials = planted.trials()

    def interrupt(_fraction: float, message: str) -> None:
        if message.startswith("pruning"):
            raise KeyboardInterrupt

    result = planted.search(30, trials, progress=interrupt)
    assert result.ended == "stopped"
    assert result.reached
    assert set(result.nodes) >= {"product_0"}


def test_where_and_in_which_order_trials_run_changes_nothing(tmp_path: Path) -> None:
    planted = Planted(branches([40, 25, 60, 30, 50, 35]), tmp_path, samples=12)
    here = planted.search(20)
    trials, other = planted.trials(), planted.trials()
    waves = []

    def backwards(
        wave: Sequence[tuple[Request, Sequence[int]]],
        keep: Callable[[Request, Mapping[int, Any]], None],
        _progress: Callable[[float, str], None],
    ) -> None:
        waves.append(len(wave))
        for request, samples in reversed(wave):
            trial = other.measure(request, samples[::-1])
            keep(request, {at: trial.sums[at] for at in samples})

    trials.elsewhere = backwards
    elsewhere = planted.search(20, trials)
    assert max(waves) >= 6
    assert (elsewhere.nodes, elsewhere.trials) == (here.nodes, here.trials)
    assert elsewhere.evaluations == here.evaluations


def test_few_samples_reject_lists_and_all_of_them_accept(tmp_path: Path) -> None:
    planted = Planted(branches([40, 25, 60, 30, 50, 35]), tmp_path, samples=24)
    trials = planted.trials()
    result = planted.search(20, trials, coarse_samples=2)
    assert result.reached
    assert trials.runs < trials.evaluations * 12
    measured = {r.request.exclude: set(r.sums) for r in trials.known()}
    assert measured[frozenset(result.nodes)] == set(range(24))
    assert min(map(len, measured.values())) == 2
    assert trials.figure(trials.measure(Request(exclude=frozenset(result.nodes)))) >= 20


def test_only_the_samples_that_judge_count(tmp_path: Path) -> None:
    planted = Planted(branches([1, 400, 1]), tmp_path, samples=12)
    trials = planted.trials()
    result = planted.search(30, trials, judged=range(6, 12))
    assert result.samples == 6
    assert all(set(t.sums) <= set(range(6, 12)) for t in trials.known())
    trial = trials.measure(Request(exclude=frozenset(result.nodes)), range(6, 12))
    assert result.after == trials.figure(trial, range(6, 12))


def test_a_metric_that_counts_is_guided_by_the_noise(tmp_path: Path) -> None:
    planted = Planted(branches([1, 1, 1, 1, 1, 1000, 1, 1]), tmp_path, samples=12)
    trials = planted.trials("agreement")
    result = planted.search(0.95, trials)
    assert result.before < 0.9
    assert result.reached
    assert result.nodes == ("product_5",)
    # Without the noise it takes twice as many: no node alone changes the choice.
    assert result.evaluations <= result.candidates + 12


@pytest.mark.parametrize(
    ("higher", "good", "bad", "raised"), [(True, 21.0, 19.0, 23.0), (False, 19.0, 21.0, 17.0)]
)
def test_a_goal_knows_which_direction_is_good(
    higher: bool, good: float, bad: float, raised: float
) -> None:
    goal = Goal(metric="m", value=20.0, higher_is_better=higher)
    assert goal.reached(good)
    assert goal.reached(20.0)
    assert not goal.reached(bad)
    assert not goal.reached(math.nan)
    assert (goal.short_of(bad), goal.short_of(good)) == (1.0, -1.0)
    assert goal.worth(good) > goal.worth(bad) > goal.worth(math.nan)
    assert goal.raised(3.0).value == raised


def test_where_lower_is_better_the_search_goes_down(tmp_path: Path) -> None:
    planted = Planted(branches([1, 400, 1, 60]), tmp_path)
    trials = planted.trials("kl")
    assert not trials.metric.higher_is_better
    before = planted.search(1e9, trials).before
    result = planted.search(before / 3, trials)
    assert result.reached
    assert result.after <= before / 3
    assert "product_1" in result.nodes
    assert len(result.nodes) < 4


# Deployed.


def test_what_is_lost_deployed_is_asked_for_on_top(tmp_path: Path) -> None:
    planted = Planted(branches([40, 25, 60, 30, 50, 35]), tmp_path)
    simulated = planted.search(14)
    trials = planted.trials()
    judged: list[int] = []

    def three_decibels_less(names: frozenset[str]) -> float:
        judged.append(len(names))
        return trials.figure(trials.measure(Request(exclude=names))) - 3.0

    result = planted.search(14, trials, accept=three_decibels_less)
    assert result.reached
    assert result.deployed_after == pytest.approx(result.after - 3.0)
    assert result.deployed_after >= 14
    assert len(result.nodes) == planted.smallest(17) > len(simulated.nodes)
    assert len(judged) <= 4


def test_a_list_that_no_real_file_follows_is_not_reached(tmp_path: Path) -> None:
    planted = Planted(branches([400, 1, 60]), tmp_path)
    result = planted.search(25, accept=lambda _names: 3.0)
    assert not result.reached
    assert result.deployed_after == 3.0


def test_figures_of_real_files_are_those_of_a_comparison(tmp_path: Path) -> None:
    float_model = load_model(save(conv_relu_gemm(), tmp_path / "model.onnx"))
    feeds = random_feeds(float_model, samples=4, seed=0)
    split = split_calibration(feeds, feeds)
    trials = open_trials(float_model, CONFIG, feeds, split, "output_sqnr_db", cache=tmp_path)
    found = {}
    for exclude in ((), ("gemm",)):
        made = quantize_model(
            float_model, CONFIG, calibration=feeds, exclude=exclude,
            output=tmp_path / "q.onnx", cache=tmp_path,
        )  # fmt: skip
        [output] = compare_models(float_model, load_model(made.path), feeds).outputs
        for optimized, truth in ((True, output.deployed_sqnr_db), (False, output.sqnr_db)):
            files = RealFiles(
                float_model, feeds, split, trials.metric, trials.every,
                cache=tmp_path, optimized=optimized,
            )  # fmt: skip
            found[exclude, optimized] = files.figure(CONFIG, exclude)
            assert found[exclude, optimized] == pytest.approx(truth, abs=1e-6)
        simulated = trials.figure(trials.measure(Request(exclude=frozenset(exclude))))
        assert simulated == pytest.approx(output.sqnr_db, abs=1e-6)
    # Both ways and both lists differ, or this would show nothing.
    assert abs(found[(), True] - found[(), False]) > 1e-5
    assert found[("gemm",), True] > found[(), True] + 1


def test_a_recipe_that_does_it_without_a_list_is_called_cheaper(tmp_path: Path) -> None:
    planted = Planted(branches([1, 40, 1]), tmp_path)
    trials = planted.trials()
    files = RealFiles(
        planted.model, planted.feeds, planted.split, trials.metric, trials.every,
        cache=tmp_path / "cache",
    )  # fmt: skip
    result = planted.search(20, trials)
    cures = [c for c in cures_for(CONFIG) if c[0] == "per channel"]
    cures.append(("nothing", replace(CONFIG, op_types=("Conv",))))
    found = try_cures(files, result.goal, cures)
    assert [c.label for c in found] == ["per channel", "nothing"]
    assert found[0].reached
    assert math.isnan(found[1].figure)
    assert found[1].reason
    result = replace(result, cures=found)
    assert [c.label for c in result.cheaper()] == ["per channel"]
    text = "\n".join(search_lines(result, planted.model))
    assert "cheaper than this list" in text


# What is written.


def test_the_front_is_what_no_cheaper_list_beats(tmp_path: Path) -> None:
    planted = Planted(branches([40, 25, 60, 30, 50, 35, 45]), tmp_path)
    result = planted.search(17)

    def beaten(trial: SearchTrial) -> bool:
        return any(
            o.float_macs_fraction <= trial.float_macs_fraction and o.figure > trial.figure
            for o in result.trials
        )

    assert not any(t.front and beaten(t) for t in result.trials)
    assert {t.figure for t in result.trials if not beaten(t)} == {
        t.figure for t in result.trials if t.front
    }
    assert any(map(beaten, result.trials))


def test_the_list_file_holds_the_nodes_the_recipe_and_what_was_measured(tmp_path: Path) -> None:
    planted = Planted(branches([1, 400, 1]), tmp_path)
    result = planted.search(30)
    held = exclusion_list(result, planted.model, CONFIG)
    assert [e.name for e in held.nodes] == ["product_1"]
    assert held.nodes[0].op_type == "MatMul"
    assert held.recipe == CONFIG
    assert held.measured is not None
    assert held.measured["output_sqnr_db"] == {"before": result.before, "after": result.after}


def command(planted: Planted, *words: str) -> list[str]:
    out = ["-o", str(planted.folder / "exclude.json"), "--json", str(planted.folder / "found.json")]
    return ["search", str(planted.path), "--inputs", str(planted.inputs), *out, *words]


def test_the_command_writes_list_and_json_and_exits_with_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(tmp_path / "data"))
    planted = Planted(branches([1, 400, 1]), tmp_path, samples=10)
    state = ["--state", str(tmp_path / "state")]
    assert main(command(planted, "--target", "output_sqnr_db=25", *state)) == 0
    text = capsys.readouterr().out
    assert "product_1 (MatMul)" in text
    assert "quant-inspector quantize" in text
    assert "5 unseen samples" in text
    assert [e.name for e in read_exclusions(tmp_path / "exclude.json").nodes] == ["product_1"]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads((tmp_path / "found.json").read_text(), parse_constant=refuse)
    assert (data["format"], data["version"]) == ("quant-inspector/search", 1)
    assert (data["reached"], data["nodes"], data["unseen"]) == (True, ["product_1"], True)
    assert data["metric"]["after"] >= 25 > data["metric"]["before"]
    assert data["goal"]["judged"] == "deployed"
    assert {"nodes", "metric", "float_macs_fraction", "weight_bytes"} <= set(data["trials"][0])
    # Once more: every trial is in the folder.
    assert main(command(planted, "--target", "output_sqnr_db=25", *state)) == 0
    again = json.loads((tmp_path / "found.json").read_text())
    assert (again["evaluations"], again["nodes"]) == (0, ["product_1"])


def test_the_command_exits_with_1_and_writes_the_best_where_the_goal_is_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(tmp_path / "data"))
    planted = Planted(branches([1, 400, 60]), tmp_path, samples=10)
    words = ["--target", "output_sqnr_db=60", "--max-float-macs", "0.34", "--simulated"]
    assert main(command(planted, *words, "--no-cures")) == 1
    assert "is not reached" in capsys.readouterr().out
    assert "product_1" in {e.name for e in read_exclusions(tmp_path / "exclude.json").nodes}
    data = json.loads((tmp_path / "found.json").read_text())
    assert (data["reached"], data["goal"]["judged"]) == (False, "simulated")
    assert data["price"]["float_macs_fraction"] <= 0.34


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "output_sqnr_db"], "METRIC=VALUE"),
        (["--target", "no_such=1"], "no_such"),
        (["--target", "cosine@mean=0.9"], "expected (rows, positions, width)"),
        (["--state", "a", "--state", "b"], "more than one folder"),
    ],
)
def test_the_command_refuses_what_it_cannot_mean(
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(tmp_path / "data"))
    planted = Planted(branches([1, 1]), tmp_path)
    assert main(command(planted, *words)) == 2
    assert said in capsys.readouterr().err


# Real models.


@needs_models
@pytest.mark.slow
def test_requantized_by_onnxruntime_the_list_gives_the_same_figure(tmp_path: Path) -> None:
    float_model = load_model(MODELS / "magika" / "model.onnx")
    feeds = load_feeds(MODELS / "magika" / "inputs", float_model)
    split = split_calibration(feeds, feeds)
    trials = open_trials(
        float_model, CONFIG, feeds, split, "output_sqnr_db", cache=tmp_path, beside=True
    )
    names = quantized_nodes(trials, float_model)
    result = find_exclusions(trials, Goal.of(trials.metric, 20), candidates=names)
    assert result.reached
    assert len(result.nodes) <= 6
    made = quantize_model(
        float_model, CONFIG, calibration=feeds, exclude=result.nodes,
        output=tmp_path / "q.onnx", cache=tmp_path,
    )  # fmt: skip
    comparison = compare_models(
        float_model, load_model(made.path), feeds, measure_latency=False, explain_deployed=False
    )
    assert comparison.outputs[0].sqnr_db == pytest.approx(result.after, abs=1e-6)
    assert comparison.task is not None
    assert (comparison.task.top1_quantized, comparison.task.samples) == (1.0, 20)


@needs_models
@pytest.mark.slow
def test_a_short_list_is_found_where_a_counted_figure_jumps(tmp_path: Path) -> None:
    """Of 12 boxes in three pictures: bisection alone ends at 73 nodes."""
    float_model = load_model(MODELS / "fastestdet" / "model.onnx")
    feeds = load_feeds(MODELS / "fastestdet" / "inputs", float_model)
    judging = feeds.subset([4, 5, 6])
    split = split_calibration(judging, feeds.subset([0, 1, 2, 3]))
    trials = open_trials(
        float_model, CONFIG, judging, split, "detection_f1@fastestdet", cache=tmp_path, beside=True
    )
    files = RealFiles(float_model, judging, split, trials.metric, range(3), cache=tmp_path)
    names = quantized_nodes(trials, float_model)
    result = find_exclusions(
        trials, Goal.of(trials.metric, 0.9), candidates=names,
        accept=lambda exclude: files.figure(CONFIG, exclude),
    )  # fmt: skip
    assert result.reached
    assert len(result.nodes) <= 20


def test_a_goal_out_of_reach_proposes_what_gains_most_or_nothing(tmp_path: Path) -> None:
    planted = Planted(branches([40, 25, 60, 30]), tmp_path)
    trials = planted.trials()

    def capped(names: frozenset[str]) -> float:
        return min(trials.figure(trials.measure(Request(exclude=names))), 30.0)

    high = planted.search(200, trials, accept=capped)
    assert not high.reached
    assert len(high.nodes) == 3, "all but one"
    flat = planted.search(200, planted.trials(), accept=lambda names: 5.0)
    assert not flat.reached
    assert flat.nodes == (), "a list that gains nothing is none"
