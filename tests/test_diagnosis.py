"""What comes first and why; the bundled pairs; gains against files that are really made."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from onnxruntime.quantization import QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from inspector.activation_rules import GOOD_OUTPUT_DB
from inspector.calibration import calibrate
from inspector.cli import main
from inspector.compare import compare_models
from inspector.diagnosis import (
    RULES,
    GainOf,
    diagnose,
    gained_db,
    merged,
    previewed_gain,
)
from inspector.errors import Cancelled
from inspector.feeds import Feeds, load_feeds
from inspector.findings import LOOK, NOTE, PROBLEM, Case, Finding, Remedy
from inspector.matching import match_tensors
from inspector.model_files import load_model
from inspector.prepare import prepare
from inspector.preview import Previewer, RecipeSource, SurgerySource
from inspector.recipe import QuantConfig
from tests import test_activation_rules, test_weight_rules
from tests.known_pairs import IMAGES, Reader, db, static
from tests.samples import (
    MODELS,
    ROOT,
    boxes_and_scores_in_one_concat,
    conv_relu_gemm,
    needs_models,
)
from tests.test_activation_rules import PICTURES, case_of, normalized, spoilt

SAMPLES = ROOT / "sample_models"


def make(
    code: str, severity: str = LOOK, node: str = "", tensor: str = "", *,
    exclude: tuple[str, ...] = (), **evidence: Any,
) -> Finding:  # fmt: skip
    return Finding(
        code=code, severity=severity, node=node, tensor=tensor, sentence="It is.",
        evidence=evidence, remedy=Remedy(say="Do it.", exclude=exclude),
    )  # fmt: skip


# -- every rule has been seen to speak and to be silent ----------------------------------------

# By rule the test that triggers it, and one that must not: the same where it says so of both.
TESTED: Mapping[str, tuple[str, str]] = {
    "concat-shared-scale": ("scores_beside_boxes_in_one_concat_are_drowned",
                            "a_concat_of_like_branches_is_left_alone"),
    "nan": ("nan_is_told_where_it_begins", "finite_values_are_not_told"),
    "attention-mask": ("a_mask_that_takes_the_range_of_the_logits_is_told",
                       "a_clamped_mask_or_sixteen_bits_are_left_alone"),
    "divisor-zero": ("a_divisor_that_rounds_to_zero_is_named_with_its_chain",
                     "a_divisor_well_above_a_step_is_left_alone"),
    "wrong-preprocessing": ("an_input_calibrated_in_other_units_is_told",
                            "an_input_in_the_units_of_calibration_is_left_alone"),
    "clipped": ("values_beyond_the_calibrated_range_are_clipped",
                "a_fitting_range_clips_nothing"),
    "too-wide": ("a_range_four_times_too_wide_is_told", "a_third_of_a_range_is_not_too_wide"),
    "outlier": ("a_channel_that_sets_the_scale_for_all_is_told",
                "a_channel_less_than_ten_times_as_large_is_left_alone"),
    "residual-add": ("a_residual_add_far_worse_than_its_inputs_is_told",
                     "a_residual_add_of_like_branches_is_left_alone"),
    "kernel-differs": ("an_output_that_differs_as_deployed_is_told_with_the_transformer",) * 2,
    "calibration-gap": ("seen_samples_that_are_far_better_are_told",
                        "seen_and_unseen_samples_alike_are_left_alone"),
    "dynamic-batch": ("an_output_that_depends_on_its_batch_is_told",
                      "samples_of_one_range_do_not_depend_on_their_batch"),
    "inherited": ("an_inherited_error_leads_to_where_it_begins",
                  "an_output_that_is_good_or_spoils_itself_inherits_nothing"),
    "unstable-ranking": ("halves_of_the_samples_that_disagree_are_told",) * 2,
    "int8-not-faster": ("a_quantized_model_that_is_not_faster_is_told",) * 2,
    "slower": ("islands_without_integer_kernels_are_listed",
               "nodes_with_integer_kernels_are_no_islands"),
    "qdq-pair-differs": ("a_pair_with_two_scales_is_a_problem_with_both",
                         "a_pair_whose_equal_scales_have_two_names_is_healthy"),
    "weight-gain": ("a_wrong_scale_of_a_weight_is_a_problem_with_its_factor",
                    "weights_that_were_folded_clipped_or_rounded_have_no_gain"),
    "weight-offset": ("a_dropped_zero_point_of_a_weight_is_a_problem",
                      "weights_that_were_folded_clipped_or_rounded_have_no_gain"),
    "activation-scale": ("a_scale_that_a_bias_contradicts_is_a_problem",
                         "a_scale_near_that_of_the_observed_range_is_healthy"),
    "degenerate-range": ("a_scale_that_is_no_positive_number_is_a_problem",
                         "a_small_scale_is_not_degenerate"),
    "channel-range": ("channels_of_very_different_range_with_one_scale_are_a_look",
                      "channels_with_a_fitting_scale_are_healthy"),
    "not-the-same-model": ("another_models_weights_are_a_problem",
                           "weights_that_are_only_far_off_are_still_the_same_model"),
    "nothing-quantized": ("a_file_in_which_nothing_is_quantized_although_asked_is_a_problem",
                          "a_quantized_file_is_not_called_unquantized"),
    "weights-swapped": ("swapped_weights_are_problems_that_name_both",) * 2,
    "bias-clipped": ("a_bias_beyond_int32_is_a_look",) * 2,
    "half-range": ("symmetric_activations_of_one_sign_are_one_look",
                   "asymmetric_activations_of_one_sign_are_healthy"),
    "fixed-range": ("a_softmax_that_cannot_reach_one_is_a_look",) * 2,
    "block-axis": ("scales_along_the_wrong_axis_are_a_problem",) * 2,
    "weight-inflated": ("a_scale_much_larger_than_the_weight_needs_is_a_look",
                        "a_reduced_range_is_not_an_inflated_weight"),
    "negatives-leak": ("a_removed_relu_whose_scale_lets_negatives_through_is_a_look",
                       "a_relu_that_was_kept_leaks_nothing"),
    "flag-ignored": ("an_option_that_the_file_does_not_follow_is_a_look",) * 2,
    "off-grid": ("a_trained_weight_beside_its_grid_is_a_look",
                 "weights_that_are_all_rounded_at_run_time_are_healthy"),
    "preprocess-first": ("tensors_that_pre_processing_took_out_are_a_note",) * 2,
    "saturation-elsewhere": ("large_neighbours_of_int8_weights_are_one_note",
                             "a_reduced_range_saturates_nowhere"),
}  # fmt: skip


def test_every_rule_has_a_test_that_triggers_it_and_one_that_must_not() -> None:
    assert set(TESTED) == set(RULES)


@pytest.mark.parametrize("code", TESTED)
def test_the_tests_of_a_rule_are_about_it_and_quick(code: str) -> None:
    triggers, silent = (
        getattr(module, f"test_{name}")
        for name in TESTED[code]
        for module in (test_activation_rules, test_weight_rules)
        if hasattr(module, f"test_{name}")
    )
    for test in (triggers, silent):
        assert not [m for m in getattr(test, "pytestmark", ()) if m.name in ("slow", "skip")]
        assert f'"{code}"' in inspect.getsource(test)
    # What a rule says nothing of is an empty list, whether by itself or for one of the cases.
    assert re.search(r"== \[\]|== 0|else \[\]|\bmany\b", inspect.getsource(silent))


# -- the bundled pairs -------------------------------------------------------------------------


class Opened:
    """A pair compared on some of its feeds, with previews of surgery on its file."""

    def __init__(self, float_path: Path, quantized_path: Path, feeds: Path, limit: int) -> None:
        self.models = load_model(float_path), load_model(quantized_path)
        self.feeds: Feeds = load_feeds(feeds, self.models[0], limit=limit)
        matching = match_tensors(*self.models)
        comparison = compare_models(
            *self.models, self.feeds, measure_latency=False, explain_deployed=False, isolated=True
        )
        self.case = Case(
            comparison=comparison, float_model=self.models[0], quantized_model=self.models[1],
            matching=matching,
        )  # fmt: skip
        source = SurgerySource(*self.models, matching, self.feeds[0])
        self.previewer = Previewer(self.models[0], source, self.feeds)
        whole = self.previewer.preview(())
        self.before = {o.name: o.worst_part_sqnr_db for o in whole.outputs}
        self.gain_of = previewed_gain(self.previewer, self.before)

    def problems(self) -> list[Finding]:
        found = diagnose(self.case, gain_of=self.gain_of)
        return [f for f in found if f.severity == PROBLEM]


def bundled(name: str, feeds: str, limit: int) -> Opened:
    folder = SAMPLES / name
    return Opened(folder / "float.onnx", folder / "quantized.onnx", folder / feeds, limit)


def real(name: str) -> Opened:
    folder = MODELS / name
    return Opened(folder / "model.onnx", folder / "ort_static_qdq.onnx", folder / "inputs", 3)


@cache
def detector() -> Opened:
    return bundled("digit-detector", "feeds", 3)


@cache
def transformer() -> Opened:
    return bundled("digit-transformer", "feeds.npz", 16)


def test_the_bundled_detectors_silent_scores_come_first() -> None:
    opened = detector()
    first, *_ = diagnose(opened.case, gain_of=opened.gain_of)
    assert (first.code, first.node, first.severity) == (
        "concat-shared-scale", "/head/Concat_3", PROBLEM,
    )  # fmt: skip
    assert first.evidence["part"] == "/head/Sigmoid_output_0"
    assert first.remedy.exclude == ("/head/Concat_3",)
    assert first.evidence["output_before_db"] == pytest.approx(0, abs=0.1)
    assert 15 < first.evidence["output_after_db"] < 25
    gain = first.evidence["output_after_db"] - first.evidence["output_before_db"]
    assert first.evidence["output_gain_db"] == gain


def test_unmeasured_the_silent_scores_are_worth_a_look() -> None:
    findings = diagnose(detector().case)
    (finding,) = [f for f in findings if f.code == "concat-shared-scale"]
    assert finding.severity == LOOK
    assert "output_gain_db" not in finding.evidence


def test_the_bundled_transformer_has_no_problem() -> None:
    assert transformer().problems() == []


# Real models with what others made of them, and with ONNX Runtime's own files.
HEALTHY = {
    "mlperf-resnet8 by TFLite": "quantized.onnx",
    "mlperf-resnet8 by ONNX Runtime": "ort_static_qdq.onnx",
    "mlperf-resnet8 per channel": "",
    "mlperf-kws-dscnn by TFLite": "quantized.onnx",
    "mlperf-kws-dscnn by ONNX Runtime": "ort_static_qdq.onnx",
    "mlperf-kws-dscnn per channel": "",
    "squeezenet-fp16 in half precision": "fp16.onnx",
    "ultraface-rfb320 by ONNX Runtime": "ort_static_qdq.onnx",
}
QUICK = "mlperf-kws-dscnn by ONNX Runtime"


def per_channel(source: Path, folder: Path) -> Path:
    """What ONNX Runtime's quantizer makes of a model with a scale per channel, on all its feeds."""
    prepared, made = folder / "prepared.onnx", folder / "per_channel.onnx"
    quant_pre_process(source / "model.onnx", prepared)
    feeds = list(load_feeds(source / "inputs", load_model(source / "model.onnx")))
    quantize_static(prepared, made, Reader(feeds), per_channel=True)
    return made


@needs_models
@pytest.mark.parametrize(
    "name", [n if n == QUICK else pytest.param(n, marks=pytest.mark.slow) for n in HEALTHY]
)
def test_a_healthy_pair_diagnosed_as_a_user_does_has_no_problem(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANT_INSPECTOR_DATA", str(tmp_path / "data"))
    source = MODELS / name.split()[0]
    quantized = source / HEALTHY[name] if HEALTHY[name] else per_channel(source, tmp_path)
    report = tmp_path / "findings.json"
    words = ["diagnose", source / "model.onnx", quantized, "--inputs", source / "inputs"]
    assert main([*map(str, words), "--json", str(report)]) == 0
    found = json.loads(report.read_text())["findings"]
    assert [f["sentence"] for f in found if f["severity"] == PROBLEM] == []


@needs_models
def test_on_magika_the_first_normalization_is_accused() -> None:
    """The very module of the shortest known list; its division overflows."""
    problems = real("magika").problems()
    assert {f.node.split("/")[3] for f in problems} == {"LayerNorm_0"}
    assert max(f.evidence["output_gain_db"] for f in problems) > 20
    (divisor,) = [f for f in problems if f.code == "divisor-zero"]
    assert {said.split(" at ")[0] for said in divisor.evidence["also"]} == {"nan", "outlier"}
    # Its own way to the division is longer and gains less than where the large squares are made.
    assert len(divisor.remedy.exclude) == 4


@needs_models
def test_on_silero_the_rectifier_that_a_body_lost_comes_first() -> None:
    """Kept, the state has 11 dB more, which scales per channel would not give it."""
    problems = real("silero-vad-16k").problems()
    assert [f.code for f in problems] == ["negatives-leak", "channel-range"]
    first = problems[0]
    assert first.node == "/model/encoder/3/activation/Relu"
    assert first.remedy.exclude == (first.node,)
    assert first.evidence["output_gain_db"] > 5


@needs_models
@pytest.mark.slow
def test_on_fastestdet_no_node_is_to_blame_but_weights_with_one_scale() -> None:
    opened = real("fastestdet")
    found = diagnose(opened.case, gain_of=opened.gain_of)
    (first,) = [
        f for f in found if f.code == "channel-range" and f.remedy.recipe.get("per_channel")
    ]
    assert found[0].code == "channel-range"
    assert first.evidence["tensors"] == 69
    assert first.evidence["typical_gain_db"] > 6
    assert [f.code for f in found if f.severity == PROBLEM] == []


@needs_models
@pytest.mark.slow
def test_on_minilm_the_large_channel_of_the_stream_is_one_problem() -> None:
    (problem,) = real("minilm-l6").problems()
    assert problem.code == "outlier"
    assert problem.evidence["channel"] == 99
    assert len(problem.evidence["tensors"]) > 10
    assert problem.evidence["output_gain_db"] > 5


# -- gains -------------------------------------------------------------------------------------


def recipe_gain(folder: Path, config: QuantConfig | None = None) -> tuple[Case, GainOf]:
    """A case of ONNX Runtime's own file, and previews of the recipe that made it."""
    config = QuantConfig() if config is None else config
    pair = static(
        folder, boxes_and_scores_in_one_concat(), PICTURES, activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    case = case_of(pair, recipe=config.to_json())
    feeds = load_feeds(folder / "feeds", case.float_model)
    prepared = prepare(case.float_model, config, folder)
    ranges = calibrate(prepared.model, feeds, cache=folder)
    source = RecipeSource(prepared, config, ranges.path, feeds[0])
    previewer = Previewer(case.float_model, source, feeds)
    before = {o.name: o.worst_part_sqnr_db for o in previewer.preview(()).outputs}
    return case, previewed_gain(previewer, before, config=config)


def test_a_gain_is_that_of_the_file_that_the_remedy_makes(tmp_path: Path) -> None:
    case, gain_of = recipe_gain(tmp_path)
    first = diagnose(case, gain_of=gain_of)[0]
    assert (first.code, first.severity) == ("concat-shared-scale", PROBLEM)
    made = tmp_path / "excluded.onnx"
    quantize_static(
        tmp_path / "f.onnx", made, Reader(PICTURES), activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8, nodes_to_exclude=list(first.remedy.exclude),
    )  # fmt: skip
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    values = {}
    for name in ("f", "q", "excluded"):
        session = ort.InferenceSession(str(tmp_path / f"{name}.onnx"), options)
        values[name] = [session.run(["y"], feed)[0] for feed in PICTURES]
    parts = [slice(0, 4), slice(4, 7)]
    worst = {
        name: min(db([v[:, p] for v in values["f"]], [v[:, p] for v in own]) for p in parts)
        for name, own in values.items()
    }
    assert first.evidence["output_before_db"] == pytest.approx(worst["q"], abs=1e-5)
    assert first.evidence["output_after_db"] == pytest.approx(worst["excluded"], abs=1e-5)
    assert first.evidence["output_gain_db"] == pytest.approx(worst["excluded"] - worst["q"])


def test_a_remedy_that_changes_nothing_a_preview_shows_is_not_measured(tmp_path: Path) -> None:
    _, gain_of = recipe_gain(tmp_path)
    assert gain_of(Remedy(say="Think.")) is None
    assert gain_of(Remedy(say="More.", recipe={"per_channel": True})) is None
    assert gain_of(Remedy(say="No such node.", exclude=("nowhere",))) is None


def test_grids_set_by_hand_are_measured_with_the_recipe(tmp_path: Path) -> None:
    _, gain_of = recipe_gain(tmp_path)
    same = gain_of(
        Remedy(say="Set it.", overrides=({"tensor": "boxes", "low": -9e4, "high": 9e4},))
    )
    assert same is not None
    # The boxes are lost in so wide a range; the worse part of the output stays the scores.
    assert same["after_db"] <= same["before_db"] + 1e-9


def test_names_that_surgery_refuses_are_not_measured() -> None:
    opened = transformer()
    names = [n.name for n in opened.case.float_model.nodes]
    refused = dict(opened.previewer.source.change(names, None).refused)
    name = next(iter(refused))
    assert opened.gain_of(Remedy(say="Free it.", exclude=(name,))) is None
    free = next(n for n in names if n not in refused)
    assert opened.gain_of(Remedy(say="Free both.", exclude=(name, free))) is not None


def test_the_output_that_gains_most_below_thirty_decibels_is_measured() -> None:
    opened = detector()
    remedy = Remedy(say="Free it.", exclude=("/head/Concat_3",))
    gain_of = previewed_gain(opened.previewer, {"output0": 40.0})
    assert gain_of(remedy) is not None
    assert previewed_gain(opened.previewer, {"other": 3.0})(remedy) is None


def test_the_runs_own_list_stays_in_force() -> None:
    opened = detector()
    own = previewed_gain(opened.previewer, opened.before, exclude=["/head/Concat_3"])
    measured = own(Remedy(say="Free it.", exclude=("/head/Sigmoid",)))
    alone = opened.gain_of(Remedy(say="Free it.", exclude=("/head/Sigmoid",)))
    assert measured is not None
    assert alone is not None
    assert measured["after_db"] > alone["after_db"] + 15


@pytest.mark.parametrize(("before", "after", "gain"), [
    (10, 25, 15), (math.inf, math.inf, 0), (-math.inf, -math.inf, 0), (3, math.inf, math.inf),
    (math.nan, 20, math.inf), (math.nan, math.nan, 0), (20, math.nan, -math.inf),
    (-math.inf, 5, math.inf),
])  # fmt: skip
def test_gains_of_figures_that_are_not_finite(before: float, after: float, gain: float) -> None:
    assert gained_db(before, after) == gain


# -- severity and order ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoilt_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case_of(spoilt(tmp_path_factory.mktemp("spoilt"), 60), isolated=True)


def constant_gain(before: float, after: float) -> GainOf:
    def gain_of(remedy: Remedy) -> Mapping[str, float] | None:
        return {"before_db": before, "after_db": after} if remedy.exclude else None

    return gain_of


@pytest.mark.parametrize(("before", "after", "severity"), [
    (10.0, 11.0, PROBLEM), (10.0, 10.9, NOTE), (10.0, 4.0, NOTE), (29.9, 31.0, PROBLEM),
    (GOOD_OUTPUT_DB, 45.0, LOOK), (math.nan, 20.0, PROBLEM),
])  # fmt: skip
def test_a_measured_gain_decides_the_severity(
    before: float, after: float, severity: str, tmp_path: Path
) -> None:
    case = case_of(static(tmp_path, boxes_and_scores_in_one_concat(), PICTURES))
    findings = diagnose(case, gain_of=constant_gain(before, after))
    (finding,) = [f for f in findings if f.code == "concat-shared-scale"]
    assert finding.severity == severity
    assert finding.evidence["output_after_db"] == after


def test_an_inherited_error_gives_way_to_what_is_wrong_where_it_begins(spoilt_case: Case) -> None:
    raw = [f for rule in RULES.values() for f in rule(spoilt_case)]
    assert "inherited" in {f.code for f in raw}
    findings = diagnose(spoilt_case)
    assert "inherited" not in {f.code for f in findings}
    (origin,) = [f for f in findings if "also" in f.evidence]
    assert origin.node == "spoilt"
    assert any("inherited at y" in said for said in origin.evidence["also"])


def test_outputs_that_inherit_from_one_node_are_one_finding() -> None:
    ends = [
        make("inherited", node=n, tensor=n, origin_node=origin, origin_tensor=f"t{origin}")
        for n, origin in (("y", "a"), ("z", "a"), ("w", "b"))
    ]
    kept = merged(ends)
    assert [f.node for f in kept] == ["y", "w"]
    assert kept[0].evidence["also"] == ["inherited at z"]
    # One of many tensors, or an input in other units, is where it begins as well.
    clipped = make("clipped", tensor="t", tensors=["t", "ta"])
    assert [f.code for f in merged([clipped, ends[0]])] == ["clipped"]
    units = make("wrong-preprocessing", tensor="x")
    assert [f.code for f in merged([units, ends[2]])] == ["wrong-preprocessing"]
    assert len(merged([make("outlier", NOTE, node="a", tensor="ta"), ends[0]])) == 2


def test_a_divisor_takes_up_the_infinity_it_makes(tmp_path: Path) -> None:
    findings = diagnose(case_of(normalized(1e-4, tmp_path)))
    codes = [f.code for f in findings]
    assert codes.count("divisor-zero") == 1
    assert "nan" not in codes
    finding = next(f for f in findings if f.code == "divisor-zero")
    assert finding.severity == PROBLEM
    assert finding.evidence["also"] == ["nan at y", "divisor-zero at d"]


def test_a_consequence_gives_way_at_the_same_tensor_only() -> None:
    cause = make("wrong-preprocessing", PROBLEM, tensor="x")
    same, other = make("clipped", tensor="x"), make("clipped", node="n", tensor="t")
    many = make("clipped", tensor="x", tensors=["x", "t"])
    assert [f.tensor for f in merged([same, cause, other])] == ["x", "t"]
    assert merged([cause, same])[0].evidence["also"] == ["clipped at x"]
    assert len(merged([cause, many])) == 2


def test_the_first_of_a_chain_takes_up_the_later_ones_and_what_they_took() -> None:
    first = make("concat-shared-scale", node="a", tensor="ta", exclude=("a", "b"))
    second = make("concat-shared-scale", node="b", tensor="tb", exclude=("b",))
    outlier = make("outlier", node="b", tensor="tb")
    (kept,) = merged([first, second, outlier])
    assert kept.node == "a"
    assert kept.evidence["also"] == ["concat-shared-scale at tb", "outlier at tb"]
    apart = make("concat-shared-scale", node="c", tensor="tc", exclude=("c",))
    assert len(merged([first, apart])) == 2


def test_problems_come_first_then_causes_before_carriers_then_gain(
    spoilt_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    carrier = make("outlier", node="carrier", tensor="c", exclude=("carrier",))
    origin = make("outlier", node="spoilt", tensor="a", exclude=("spoilt",))
    fact = make("nan", PROBLEM, model="float")
    note = make("unstable-ranking", NOTE)
    small = make("clipped", node="spoilt", tensor="a", exclude=("spoilt", "tanh"))
    gains = {("carrier",): 12.0, ("spoilt",): 9.0, ("spoilt", "tanh"): 5.0}

    def gain_of(remedy: Remedy) -> Mapping[str, float] | None:
        if remedy.exclude not in gains:
            return None
        return {"before_db": 10.0, "after_db": 10.0 + gains[remedy.exclude]}

    def rule(_case: Case) -> Any:
        yield from (note, carrier, small, origin, fact)

    monkeypatch.setattr("inspector.diagnosis.RULES", {"all": rule})
    findings = diagnose(spoilt_case, gain_of=gain_of)
    assert [(f.code, f.node) for f in findings] == [
        ("nan", ""), ("outlier", "spoilt"), ("clipped", "spoilt"), ("outlier", "carrier"),
        ("unstable-ranking", ""),
    ]  # fmt: skip
    # Without the added error, what comes in tells a carrier.
    plain = replace(
        spoilt_case,
        comparison=replace(
            spoilt_case.comparison,
            activations=tuple(
                replace(a, added_sqnr_db=None) for a in spoilt_case.comparison.activations
            ),
        ),
    )
    assert [f.node for f in diagnose(plain, gain_of=gain_of)] == [
        "", "spoilt", "spoilt", "carrier", "",
    ]  # fmt: skip


def test_what_is_wrong_in_itself_comes_first_and_what_is_beside_the_point_last(
    spoilt_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much another remedy gains, and though it is only a carrier that is wrong."""
    gained = make("outlier", node="spoilt", tensor="a", exclude=("spoilt",))
    fact = make("weight-gain", PROBLEM, node="carrier", tensor="w", exclude=("carrier",))
    slow, look = make("int8-not-faster"), make("calibration-gap", tensor="y")
    gains = {("spoilt",): 12.0, ("carrier",): 0.1}

    def gain_of(remedy: Remedy) -> Mapping[str, float] | None:
        if remedy.exclude not in gains:
            return None
        return {"before_db": 10.0, "after_db": 10.0 + gains[remedy.exclude]}

    monkeypatch.setattr(
        "inspector.diagnosis.RULES", {"all": lambda _case: iter((slow, gained, look, fact))}
    )
    findings = diagnose(spoilt_case, gain_of=gain_of)
    assert [f.code for f in findings] == [
        "weight-gain", "outlier", "calibration-gap", "int8-not-faster",
    ]  # fmt: skip


@pytest.mark.parametrize(("gain", "better"), [(5.9, False), (6.1, True)])
def test_a_cause_takes_the_remedy_of_its_consequence_where_that_gains_more(
    spoilt_case: Case, monkeypatch: pytest.MonkeyPatch, gain: float, better: bool
) -> None:
    chain = ("square", "sum", "root", "div")
    cause = make("divisor-zero", node="div", tensor="d", exclude=chain)
    squares = make("outlier", tensor="sq", exclude=("square", "sum"), tensors=["sq", "s"])
    elsewhere = make("outlier", tensor="t", exclude=("square", "tanh"), tensors=["t", "u"])
    seen = make("inherited", node="y", tensor="y", exclude=("div",), origin_node="div",
                origin_tensor="d")  # fmt: skip
    gains = {chain: 5.0, ("square", "sum"): gain, ("square", "tanh"): 1.0, ("div",): 50.0}

    def gain_of(remedy: Remedy) -> Mapping[str, float] | None:
        return {"before_db": 10.0, "after_db": 10.0 + gains[remedy.exclude]}

    monkeypatch.setattr(
        "inspector.diagnosis.RULES", {"all": lambda _case: iter((squares, seen, cause, elsewhere))}
    )
    first, second = diagnose(spoilt_case, gain_of=gain_of)
    assert (first.code, first.severity) == ("divisor-zero", PROBLEM)
    assert first.evidence["also"] == ["outlier at sq", "inherited at y"]
    assert first.remedy.exclude == (("square", "sum") if better else chain)
    assert first.evidence["output_gain_db"] == pytest.approx(gain if better else 5)
    assert (second.code, second.tensor) == ("outlier", "t")


def test_a_wrong_weight_is_not_blamed_for_its_channels_as_well() -> None:
    for code in ("weight-gain", "weight-offset"):
        cause = make(code, PROBLEM, node="n", tensor="w")
        kept = merged([make("channel-range", node="n", tensor="w"), cause])
        assert [f.code for f in kept] == [code]
    moved = make("activation-scale", PROBLEM, node="relu", tensor="r")
    leaks = [make(c, node="relu", tensor="r") for c in ("negatives-leak", "half-range", "clipped")]
    assert [f.code for f in merged([*leaks, moved])] == ["activation-scale"]


def test_each_change_is_measured_once_and_notes_are_not(
    spoilt_case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = [make("outlier", node=n, exclude=("spoilt",)) for n in ("spoilt", "tanh")]
    monkeypatch.setattr(
        "inspector.diagnosis.RULES",
        {"all": lambda _case: iter([*same, make("slower", NOTE, exclude=("last",))])},
    )
    asked: list[tuple[str, ...]] = []

    def gain_of(remedy: Remedy) -> None:
        asked.append(remedy.exclude)

    findings = diagnose(spoilt_case, gain_of=gain_of)
    assert asked == [("spoilt",)]
    assert len(findings) == 3


def test_progress_is_told_and_can_stop(spoilt_case: Case) -> None:
    seen: list[float] = []
    diagnose(spoilt_case, gain_of=constant_gain(10, 20), progress=lambda f, _: seen.append(f))
    assert seen == sorted(seen)
    assert seen[-1] == 1

    def stop(_fraction: float, _message: str) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        diagnose(spoilt_case, progress=stop)


def test_a_stopped_preview_stops_the_diagnosis() -> None:
    opened = detector()

    def stop(_fraction: float, _message: str) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        diagnose(
            opened.case, gain_of=previewed_gain(opened.previewer, opened.before, progress=stop)
        )


def test_a_healthy_pair_has_no_problem(tmp_path: Path) -> None:
    case = case_of(static(tmp_path, conv_relu_gemm(), IMAGES))
    assert [f for f in diagnose(case) if f.severity == PROBLEM] == []
