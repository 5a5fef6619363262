"""The generated pairs are valid and the table says what was measured; no time is judged here."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from rich.console import Console

from inspector.compare import compare_models
from inspector.feeds import load_feeds
from inspector.model_files import load_model
from inspector.runtime import open_session
from inspector.scheme import QuantFormat, quant_formats
from tests.benchmarks import __main__ as program
from tests.benchmarks import activation_pass, growth, harness, networks, subjects
from tests.benchmarks.harness import Figure, Unavailable
from tests.benchmarks.networks import Pair, chain_pair, resnet50_pair, transformer_pair


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for pairs that several tests look at."""
    return tmp_path_factory.mktemp("pairs")


def small_resnet50(folder: Path) -> Pair:
    return resnet50_pair(folder, size=32, samples=2)


def small_transformer(folder: Path) -> Pair:
    return transformer_pair(folder, layers=1, width=64, sequence=8, samples=2)


def small_chain(folder: Path) -> Pair:
    return chain_pair(9, folder, work=32, samples=2)


# -- the networks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [pytest.param(small_resnet50, marks=pytest.mark.slow), small_transformer, small_chain],
)
def test_a_generated_pair_is_valid_named_throughout_and_compares_well(
    make: Callable[[Path], Pair], kept: Path
) -> None:
    pair = make(kept)
    for path in (pair.float_path, pair.quantized_path):
        onnx.checker.check_model(path, full_check=True)
    float_model, quantized = load_model(pair.float_path), load_model(pair.quantized_path)
    assert all(node.name for node in onnx.load(pair.float_path).graph.node)
    assert QuantFormat.QDQ in quant_formats(quantized)
    feeds = load_feeds(pair.feeds_folder, float_model)
    assert len(feeds) == 2
    result = compare_models(float_model, quantized, feeds, measure_latency=False)
    assert result.counts.unmatched == 0
    assert all(15 < output.sqnr_db < 60 for output in result.outputs)


def test_the_resnet50_shape_has_the_layers_and_weights_of_resnet50(kept: Path) -> None:
    proto = onnx.load(small_resnet50(kept).float_path)
    kinds = [node.op_type for node in proto.graph.node]
    assert (kinds.count("Conv"), kinds.count("Add"), kinds.count("Gemm")) == (53, 16, 1)
    # 25,557,032 parameters of the published network, less the four per channel of a batch
    # normalisation (two of them trained) that became a bias each.
    channels = 64 + sum(b * 6 * i for b, i in ((3, 64), (4, 128), (6, 256), (3, 512)))
    channels += 256 + 512 + 1024 + 2048
    held = sum(math.prod(t.dims) for t in proto.graph.initializer)
    assert held == 25_557_032 - 2 * channels + channels


def test_activations_of_the_resnet50_shape_keep_their_scale(kept: Path) -> None:
    pair = small_resnet50(kept)
    model = load_model(pair.float_path)
    sums = [n.outputs[0] for n in model.nodes if n.op_type == "Add"]
    feed = networks.load_feed(networks.feed_files(pair.feeds_folder)[0])
    values = open_session(model, optimized=False, outputs=sums).run(feed, sums)
    assert len(values) == 16
    assert all(0.3 < value.std() < 10 for value in values.values())


def contents(path: Path) -> tuple[dict[str, bytes], dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """Nodes and constants by name, in a form that does not depend on how constants are encoded."""
    graph = onnx.load(path).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    return (
        {node.name: node.SerializeToString(deterministic=True) for node in graph.node},
        {name: (v.dtype.name, v.shape, v.tobytes()) for name, v in constants.items()},
    )


# One of each that ends in Conv, Relu, Conv and Add, and one of several blocks.
@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 50])
def test_the_twin_of_a_chain_is_what_quantize_static_gives(nodes: int, tmp_path: Path) -> None:
    pair = chain_pair(nodes, tmp_path, work=72, samples=4)
    other = Pair(tmp_path / "float.onnx", tmp_path / "quantized.onnx", pair.feeds_folder)
    shutil.copy(pair.float_path, other.float_path)
    networks.quantize_by_default(other)
    assert contents(pair.quantized_path) == contents(other.quantized_path)
    assert len(onnx.load(pair.float_path).graph.node) == nodes


def test_a_pair_is_the_same_for_the_same_seed_and_is_made_only_once(tmp_path: Path) -> None:
    first, second = small_chain(tmp_path / "a"), small_chain(tmp_path / "b")
    for one, other in zip(first[:2], second[:2], strict=True):
        assert one.read_bytes() == other.read_bytes()
    # A folder's time is that of the last entry made in it or taken out of it.
    stamp = (tmp_path / "a").stat().st_mtime_ns
    assert small_chain(tmp_path / "a") == first
    assert (tmp_path / "a").stat().st_mtime_ns == stamp
    other = chain_pair(9, tmp_path / "a", work=32, samples=2, seed=1)
    assert other.float_path.read_bytes() != first.float_path.read_bytes()
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        first.float_path.parent.name, other.float_path.parent.name
    }  # fmt: skip


def test_sizes_that_cannot_be_made_are_refused(tmp_path: Path) -> None:
    for nodes, work in ((0, 2048), (5, 100), (5, 0), (5, -8)):
        with pytest.raises(ValueError, match="must be"):
            chain_pair(nodes, tmp_path, work=work)
    with pytest.raises(ValueError, match="width must be a multiple of 64, not 100"):
        transformer_pair(tmp_path, layers=1, width=100)
    assert not [*tmp_path.iterdir()]


# -- measuring ---------------------------------------------------------------------------------


def test_interleaved_runs_each_work_once_a_round_and_turns_the_order_round() -> None:
    called: list[tuple[str, int]] = []
    works = {n: (lambda turn, n=n: called.append((n, turn))) for n in ("a", "b", "c")}
    seconds = harness.interleaved(works, 2)
    assert called == [("a", 0), ("b", 0), ("c", 0), ("c", 1), ("b", 1), ("a", 1)]
    assert [*seconds] == ["a", "b", "c"]
    assert all(len(s.wall) == len(s.processor) == 2 for s in seconds.values())


def test_a_ratio_is_the_median_over_the_rounds() -> None:
    assert harness.ratio([2.0, 30.0, 20.0], [1.0, 10.0, 2.0]) == 3.0
    assert math.isnan(harness.ratio([2.0], [0.0]))


def test_processor_time_is_what_this_process_computed() -> None:
    works = {"sleeps": lambda _: time.sleep(0.2), "computes": lambda _: sum(range(2_000_000))}
    seconds = harness.interleaved(works, 1)
    assert seconds["sleeps"].processor[0] < 0.1 < seconds["sleeps"].wall[0]
    assert seconds["computes"].processor[0] > seconds["sleeps"].processor[0]


def test_the_growth_exponent_of_a_power_law_is_its_power() -> None:
    sizes = [500, 1000, 2000, 5000]
    for power in (0.0, 1.0, 1.5, 2.0):
        assert harness.growth_exponent(sizes, [3e-4 * n**power for n in sizes]) == pytest.approx(
            power, abs=1e-9
        )


def hold(megabytes: int) -> int:
    return int(np.ones(megabytes * 1_000_000, np.uint8).sum())


def test_a_child_has_its_own_peak_memory_and_hands_its_result_back() -> None:
    held = np.ones(200_000_000, np.uint8)  # what the parent holds must not count
    small, large = harness.in_child(hold, 1), harness.in_child(hold, 100)
    del held
    assert (small.result, large.result) == (1_000_000, 100_000_000)
    assert 90e6 < large.peak_bytes - small.peak_bytes < 110e6


def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)test_benchmarks\.hold: .*ValueError: "):
        harness.in_child(hold, "x")


def test_every_phase_of_a_comparison_is_told_by_its_messages(tmp_path: Path) -> None:
    pair = small_chain(tmp_path)
    models = load_model(pair.float_path), load_model(pair.quantized_path)
    told: list[str] = []
    compare_models(
        *models, load_feeds(pair.feeds_folder, models[0]), progress=lambda _, m: told.append(m)
    )
    found = [activation_pass.phase_of(message) for message in told]
    assert found[:3] == ["set-up", "set-up", "weights"]
    begun = {m for m, phase in zip(told, found, strict=True) if phase == "pass"}
    assert begun == {"comparing sample 1 of 2", "comparing sample 2 of 2"}
    assert found[-1] == "findings"
    assert "latency" in found


def test_the_activation_pass_of_a_tiny_pair_is_measured(tmp_path: Path) -> None:
    lines = activation_pass.figures_of("tiny", small_chain(tmp_path), few=1, many=2, rounds=1)
    assert "activation pass / two bare runs" in lines[0].what
    assert [line.required for line in lines] == [None] * 7  # asked of the ResNet-50 shape alone
    assert all(line.measured is not None and math.isfinite(line.measured) for line in lines)
    once = {line.what: line.measured for line in lines if line.what.endswith("once")}
    assert set(once) == {"set-up, once", "weights, once", "findings and records, once"}
    assert all(value is not None and value >= 0 for value in once.values())
    assert once["set-up, once"]


def test_lists_of_a_subject_are_one_toggle_apart_and_never_repeat(tmp_path: Path) -> None:
    pair = chain_pair(40, tmp_path, work=32, samples=4)
    subject = subjects.chain_subject(40, pair, tmp_path)
    lists = subject.lists(12)
    assert len(set(lists)) == 12
    names = {n.name for n in subject.model.nodes if n.op_type == "Conv"}
    assert set().union(*lists) <= names
    assert all(lists)


def test_quantizing_again_and_planning_call_functions_in_proportion_to_the_nodes(
    tmp_path: Path,
) -> None:
    calls: dict[str, list[int]] = {"quantize": [], "plan": []}
    for nodes in (60, 240):
        pair = chain_pair(nodes, tmp_path / str(nodes), work=32, samples=2)
        quantizer = subjects.chain_subject(nodes, pair, tmp_path).quantizer()
        for method, counts in calls.items():
            work = partial(getattr(quantizer, method), ())
            work()
            counts.append(growth.calls_of(work))
    for few, many in calls.values():
        assert 3 < many / few < 4.2


def test_the_ranges_of_a_chain_are_those_that_calibration_gives(tmp_path: Path) -> None:
    pair = chain_pair(6, tmp_path, work=32, samples=4)
    subject = subjects.chain_subject(6, pair, tmp_path)
    target = tmp_path / "again.onnx"
    subject.by_public_function((), target)
    assert contents(target) == contents(pair.quantized_path)


# -- reporting ---------------------------------------------------------------------------------

FIGURES = (
    Figure(benchmark="b", subject="s", what="a / b", measured=1.2, unit="x", required=1.35),
    Figure(benchmark="b", subject="s", what="c / d", measured=3.0, unit="x", required=4.0,
           at_least=True),
    Figure(benchmark="b", subject="s", what="e", measured=math.nan, required=1.0),
    Figure(benchmark="c", subject="s", what="skipped", measured=None, required=1.0, note="[none]"),
    Figure(benchmark="c", subject="s", what="f", measured=12345.6, unit="ms"),
)  # fmt: skip


def test_a_figure_is_met_on_the_right_side_of_its_limit_only() -> None:
    assert [figure.met for figure in FIGURES] == [True, False, False, None, None]
    faster = Figure(benchmark="b", subject="", what="", measured=4.0, required=4.0, at_least=True)
    assert faster.met
    same = Figure(benchmark="b", subject="", what="", measured=math.inf, required=4, at_least=True)
    assert same.met is False


def test_the_table_has_the_required_figure_beside_the_measured_one() -> None:
    console = Console(width=160, file=StringIO(), color_system=None)
    harness.print_table(FIGURES, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "b s a / b 1.2 x ≤ 1.35 x yes" in lines
    assert "s c / d 3 x ≥ 4 x NO" in lines
    assert "s e nan ≤ 1 NO" in lines
    assert "c s skipped – ≤ 1 [none]" in lines
    assert "s f 12,346 ms" in lines


def test_the_json_is_strict_and_holds_every_figure(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    harness.write_json(FIGURES, path, quick=True)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    written = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert written["quick"] is True
    assert [row["measured"] for row in written["figures"]] == [1.2, 3.0, "NaN", None, 12345.6]
    assert [row["met"] for row in written["figures"]] == [True, False, False, None, None]


def test_a_benchmark_that_cannot_run_gives_a_line_that_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(Unavailable, match=r"inspector/no_such_module\.py does not exist"):
        harness.library("no_such_module")
    monkeypatch.setattr(harness, "MODELS", Path("/nowhere"))
    with pytest.raises(Unavailable, match="no fastestdet at /nowhere"):
        harness.shared_model("fastestdet")


def test_every_benchmark_in_the_list_can_be_imported_and_measured() -> None:
    for name in program.BENCHMARKS:
        assert callable(program.benchmark(name))
