"""What the renderers say, on constructed records: every headline has its planted cause."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inspector import render
from inspector.comparison import (
    ActivationError,
    BatchEffect,
    BatchError,
    Comparison,
    DeviceError,
    Latency,
    MatchCounts,
    ModelFile,
    NonFinite,
    OutputError,
    Pin,
    Skipped,
    SliceError,
    Task,
    Unmatched,
    WeightError,
)
from inspector.errors import ReportError

INF = math.inf
NAN = math.nan


def make_output(name: str = "logits", sqnr_db: float = 29.1, **changes: Any) -> OutputError:
    channels = changes.pop("channel_sqnr_db", ())
    samples = changes.pop("per_sample_sqnr_db", (sqnr_db, sqnr_db))
    lowest = min(range(len(samples)), key=lambda i: samples[i])
    fields: dict[str, Any] = {
        "name": name,
        "sqnr_db": sqnr_db,
        "deployed_sqnr_db": sqnr_db,
        "seen_sqnr_db": None,
        "unseen_sqnr_db": None,
        "worst_channel_sqnr_db": min(channels, default=NAN),
        "median_channel_sqnr_db": sorted(channels)[(len(channels) - 1) // 2] if channels else NAN,
        "worst_channel": channels.index(min(channels)) if channels else None,
        "channel_axis": 1 if channels else None,
        "channel_sqnr_db": channels,
        "slices": (),
        "median_sample_sqnr_db": sorted(samples)[(len(samples) - 1) // 2],
        "worst_sample_sqnr_db": samples[lowest],
        "worst_sample": f"{lowest:02}.npz",
        "per_sample_sqnr_db": samples,
        "cosine_similarity": 0.999,
        "max_abs_error": 0.25,
        "deployed_differs": False,
    }
    return OutputError(**{**fields, **changes})


def make_activation(
    name: str, depth: int, accumulated: float, local: float | None = 45.0, **changes: Any
) -> ActivationError:
    fields: dict[str, Any] = {
        "name": name,
        "node": f"/{name}/Conv",
        "op_type": "Conv",
        "depth": depth,
        "quantized_name": f"{name}_DequantizeLinear_Output",
        "dtype": "int8",
        "shape": (1, 4, 8, 8),
        "scale": 0.02,
        "zero_point": -3,
        "local_sqnr_db": local,
        "accumulated_sqnr_db": accumulated,
        "worst_channel_sqnr_db": NAN,
        "median_channel_sqnr_db": NAN,
        "worst_channel": None,
        "channel_axis": None,
        "channel_sqnr_db": (),
        "channel_low": (),
        "channel_high": (),
        "slices": (),
        "cosine_similarity": 0.99,
        "mse": 1e-4,
        "max_abs_error": 0.1,
        "saturated_fraction": 0.0,
        "saturated_low_fraction": 0.0,
        "saturated_high_fraction": 0.0,
        "observed_low": -1.0,
        "observed_high": 4.0,
        "representable_low": -1.1,
        "representable_high": 4.0,
        "nonfinite_float": 0,
        "nonfinite_quantized": 0,
        "is_output": False,
        "matched_by": "name",
    }
    return ActivationError(**{**fields, **changes})


def make_weight(name: str, node: str, sqnr_db: float = 42.0, **changes: Any) -> WeightError:
    fields: dict[str, Any] = {
        "name": name,
        "node": node,
        "op_type": "Conv",
        "kind": "weight",
        "quantized_name": f"{name}_quantized",
        "dtype": "int8",
        "shape": (2, 3, 3, 3),
        "axis": 0,
        "channel_axis": 0,
        "scale": (0.01, 0.02),
        "zero_point": (0, 0),
        "sqnr_db": sqnr_db,
        "worst_channel_sqnr_db": sqnr_db,
        "median_channel_sqnr_db": sqnr_db + 1,
        "worst_channel": 0,
        "channel_sqnr_db": (sqnr_db, sqnr_db + 1),
        "channel_absmax": (1.27, 2.54),
        "max_abs_error": 0.01,
        "mse": 1e-5,
        "cosine_similarity": 0.9999,
        "matched_by": "name",
    }
    return WeightError(**{**fields, **changes})


def make_nonfinite(tensor: str, node: str, **changes: Any) -> NonFinite:
    fields: dict[str, Any] = {
        "tensor": tensor,
        "node": node,
        "op_type": "Log",
        "model": "quantized",
        "nan": 5,
        "infinite": 2,
        "first_sample": "01.npz",
        "origin": False,
    }
    return NonFinite(**{**fields, **changes})


def make_device(name: str, total: float, verdict: str = "device", **changes: Any) -> DeviceError:
    fields: dict[str, Any] = {
        "name": name,
        "quantized_name": f"{name}_q",
        "device_name": f"{name}:0",
        "samples": 2,
        "quantization_sqnr_db": 29.1,
        "kernel_sqnr_db": None,
        "device_sqnr_db": total,
        "total_sqnr_db": total,
        "verdict": verdict,
    }
    return DeviceError(**{**fields, **changes})


def make_batch(difference: float, float_difference: float = 4e-8, **changes: Any) -> BatchEffect:
    error = BatchError(
        output="embedding",
        float_max_abs_difference=float_difference,
        quantized_max_abs_difference=difference,
        quantized_sqnr_db=40.0,
        worst_sample="03.npz",
    )
    return BatchEffect(**{"samples": 24, "padded": True, "outputs": (error,), **changes})


def make_comparison(*outputs: OutputError, **changes: Any) -> Comparison:
    fields: dict[str, Any] = {
        "float_model": ModelFile(
            path="model.onnx", sha256="ab" * 32, size_bytes=1_200_000, quant_format="float"
        ),
        "quantized_model": ModelFile(
            path="int8.onnx", sha256="cd" * 32, size_bytes=400_000, quant_format="qdq"
        ),
        "samples": 2,
        "sample_names": ("00.npz", "01.npz"),
        "random_feeds": False,
        "seen": "unseen",
        "weights": (),
        "activations": (),
        "outputs": outputs,
        "unmatched": (),
        "task": None,
        "latency": None,
        "warnings": (),
    }
    return Comparison(**{**fields, **changes})


CHAIN = (
    make_activation("input", -1, 45.0, node="", op_type="Input"),
    make_activation("a", 0, 41.0),
    make_activation("b", 1, 38.0),
    make_activation("c", 2, 36.0),
)


def test_headline_of_a_healthy_model_accuses_nothing() -> None:
    output = make_output(channel_sqnr_db=(26.0, 27.5, 31.0))
    comparison = make_comparison(output, activations=CHAIN)
    assert render.headline(comparison) == "Output logits 29.1 dB: nothing stands out"
    assert render.find_headline(comparison).severity == "fine"


def test_headline_of_a_silenced_concat_slice_names_the_slice_and_its_channels() -> None:
    boxes = SliceError(source="boxes", start=0, stop=4, sqnr_db=31.3, absmax=640.0)
    scores = SliceError(source="scores", start=4, stop=14, sqnr_db=0.0, absmax=0.98)
    output = make_output(
        "output0", 31.2, slices=(boxes, scores), channel_sqnr_db=(31.0,) * 4 + (0.0,) * 10
    )
    found = render.find_headline(make_comparison(output, activations=CHAIN))
    assert found.sentence == (
        "Output output0: 31.2 dB pooled, but the scores slice is silent (0.0 dB): "
        "10 of 14 channels carry no signal"
    )
    assert (found.severity, found.tensor) == ("problem", "output0")


def test_headline_counts_further_low_slices() -> None:
    slices = tuple(
        SliceError(source=f"head{i}", start=i, stop=i + 1, sqnr_db=db, absmax=1.0)
        for i, db in enumerate((40.0, 12.0, -3.0))
    )
    text = render.headline(make_comparison(make_output("y", 39.0, slices=slices)))
    assert (
        text == "Output y: 39.0 dB pooled, but the head2 slice (and 1 more of 3) is noise (-3.0 dB)"
    )


def test_headline_names_silent_channels_where_no_concat_is_known() -> None:
    output = make_output("y", 31.2, channel_sqnr_db=(33.0, 31.0, 0.0, 30.0))
    assert render.headline(make_comparison(output)) == (
        "Output y: 31.2 dB pooled, but 1 of 4 channels carries no signal (channel 2: 0.0 dB)"
    )


def test_headline_names_a_channel_hidden_by_the_pooled_figure() -> None:
    output = make_output("y", 31.2, channel_sqnr_db=(33.0, 4.6, 30.0))
    text = render.headline(make_comparison(output))
    assert text == "Output y: 31.2 dB pooled, but channel 1 of 3 has only 4.6 dB"


def test_headline_forgives_softmax_tails() -> None:
    softmax = make_activation("p", 3, 31.2, op_type="Softmax", is_output=True)
    output = make_output("p", 31.2, channel_sqnr_db=(33.0, 0.0, 0.0))
    text = render.headline(make_comparison(output, activations=(*CHAIN, softmax)))
    assert text == "Output p 31.2 dB: nothing stands out"


def test_headline_forgives_channels_that_are_zero_in_the_float_model() -> None:
    output = make_output("y", 31.2, channel_sqnr_db=(33.0, -INF, INF))
    assert render.headline(make_comparison(output)).endswith("nothing stands out")


def test_headline_names_a_sample_hidden_by_the_pooled_figure() -> None:
    output = make_output("y", 24.5, per_sample_sqnr_db=(49.0, 3.0))
    text = render.headline(make_comparison(output))
    assert text == "Output y: 24.5 dB pooled, but sample 01.npz has only 3.0 dB"


def test_headline_names_the_cliff_and_its_weight() -> None:
    cliff = make_activation("cliff", 3, 12.4)
    after = make_activation("after", 4, 12.0)
    comparison = make_comparison(
        make_output("y", 11.9),
        activations=(*CHAIN, cliff, after),
        weights=(make_weight("w0", "/a/Conv"), make_weight("w3", "/cliff/Conv", 12.6)),
    )
    found = render.find_headline(comparison)
    assert found.sentence == (
        "Output y 11.9 dB: largest error added at /cliff/Conv (12.4 dB), "
        "where weight w3 has 12.6 dB"
    )
    assert (found.severity, found.tensor) == ("look", "cliff")


def test_headline_names_the_tensor_whose_own_steps_are_too_coarse() -> None:
    coarse = make_activation("coarse", 3, 8.0, 8.1)
    comparison = make_comparison(make_output("y", 7.5), activations=(*CHAIN, coarse))
    assert render.headline(comparison) == (
        "Output y 7.5 dB: largest error added at /coarse/Conv (8.0 dB), "
        "whose own int8 steps leave 8.1 dB"
    )


def test_headline_names_clipping() -> None:
    clipped = make_activation("clipped", 3, 8.0, 8.1, saturated_fraction=0.12)
    comparison = make_comparison(make_output("y", 7.5), activations=(*CHAIN, clipped))
    assert render.headline(comparison).endswith(
        "at /clipped/Conv (8.0 dB), where 12.0 % of the values are clipped"
    )


def test_headline_does_not_accuse_a_healthy_branch_after_a_bad_one() -> None:
    # Two branches in turns: `bad` adds the error, `carrier` only hands it on.
    activations = (
        make_activation("bad", 0, 12.0, 12.1),
        make_activation("good", 1, 40.0),
        make_activation("carrier", 2, 11.8),
    )
    found = render.find_headline(make_comparison(make_output("y", 11.0), activations=activations))
    assert found.tensor == "bad"


MEASURED = (
    # The estimate takes "coarse": its own steps make all of its noise.
    make_activation("first", 0, 9.0, 30.0, isolated_sqnr_db=4.0, added_sqnr_db=7.0),
    make_activation("coarse", 1, 8.0, 8.1, isolated_sqnr_db=40.0, added_sqnr_db=8.5),
    make_activation(
        "slice", 2, 2.0, None, op_type="Slice", isolated_sqnr_db=3.0, added_sqnr_db=INF
    ),
)


def culprit(*activations: ActivationError) -> tuple[str | None, float]:
    record, share = render.largest_added_error(make_comparison(activations=activations))
    return None if record is None else record.name, share


def test_where_added_errors_are_measured_the_headline_names_the_largest() -> None:
    found = render.find_headline(make_comparison(make_output("y", 5.0), activations=MEASURED[:2]))
    assert found.tensor == "first"
    assert "largest error added at /first/Conv (9.0 dB)" in found.sentence
    name, share = culprit(*MEASURED)
    assert (name, share) == ("first", pytest.approx(10**-0.7))


def test_without_measured_errors_the_culprit_is_estimated_as_before() -> None:
    plain = [dataclasses.replace(a, isolated_sqnr_db=None, added_sqnr_db=None) for a in MEASURED]
    assert culprit(*plain)[0] == "slice", "a fall of 6 dB counts as added where nothing is measured"
    assert culprit(*plain[:2]) == ("coarse", pytest.approx(10**-0.81))
    assert not render.has_isolated(make_comparison(activations=tuple(plain)))
    assert render.has_isolated(make_comparison(activations=MEASURED))


def test_carriers_that_add_nothing_are_never_the_culprit() -> None:
    assert culprit(MEASURED[2]) == (None, 0.0)
    silent = make_activation("silent", 3, -INF, added_sqnr_db=-INF)
    assert culprit(MEASURED[2], silent) == (None, 0.0), "nothing is relative to no signal"


def test_an_added_error_that_is_not_finite_counts_where_the_tensor_arrives_spoiled() -> None:
    overflow = make_activation("root", 3, -1.1, NAN, isolated_sqnr_db=INF, added_sqnr_db=NAN)
    assert culprit(*MEASURED, overflow) == ("root", 1.0)
    mask = make_activation("mask", 3, 60.0, added_sqnr_db=NAN)
    assert culprit(*MEASURED, mask)[0] == "first"
    nan = make_activation("nan", 3, NAN, added_sqnr_db=NAN)
    assert culprit(*MEASURED, nan)[0] == "first"


def test_of_several_that_add_as_much_the_first_of_the_graph_is_named() -> None:
    alike = [make_activation(f"t{depth}", depth, 5.0, added_sqnr_db=4.0) for depth in (7, 3, 5)]
    assert culprit(*alike)[0] == "t3"


def test_the_text_has_columns_for_isolated_and_added_errors_where_they_are_measured() -> None:
    told = render.comparison_text(make_comparison(activations=MEASURED))
    header, *lines = [
        line for line in told.splitlines() if "accumulated" in line or " Conv " in line
    ]
    assert re.search(r"local +isolated +added +worst channel", header)
    assert any(re.search(r"first +Conv .* 30\.0 dB +4\.0 dB +7\.0 dB", line) for line in lines)
    assert "exact" in next(line for line in told.splitlines() if "Slice" in line)
    assert "isolated" not in render.comparison_text(make_comparison(activations=CHAIN))


def test_csv_and_json_hold_isolated_and_added_errors() -> None:
    comparison = make_comparison(activations=(*MEASURED, *CHAIN))
    assert render.CSV_COLUMNS[-2:] == ("isolated_sqnr_db", "added_sqnr_db")
    rows = list(csv.DictReader(io.StringIO(render.comparison_csv(comparison))))
    found = [(row["isolated_sqnr_db"], row["added_sqnr_db"]) for row in rows[:4]]
    assert found == [("4.0", "7.0"), ("40.0", "8.5"), ("3.0", "Infinity"), ("", "")]
    own = render.comparison_json(comparison)["activations"]
    assert [a["added_sqnr_db"] for a in own[1:4]] == [8.5, "Infinity", None]


def test_headline_says_when_the_error_is_spread_out() -> None:
    slow = tuple(make_activation(f"t{i}", i, 40.0 - 1.5 * i, 60.0) for i in range(16))
    text = render.headline(make_comparison(make_output("y", 17.0), activations=slow))
    assert text == (
        "Output y 17.0 dB: the error is spread over many tensors; "
        "change the recipe before excluding nodes"
    )


def test_headline_of_equal_models_is_exact() -> None:
    comparison = make_comparison(make_output("y", INF), activations=CHAIN)
    assert render.headline(comparison) == "Output y is exact: both models give the same values"
    two = make_comparison(make_output("y", INF), make_output("z", INF))
    assert render.headline(two) == "All 2 outputs are exact: both models give the same values"


def test_headline_of_a_nan_output_names_the_first_bad_node() -> None:
    activations = (
        *CHAIN,
        make_activation("late", 9, NAN, nonfinite_quantized=5),
        make_activation("bad", 7, NAN, nonfinite_quantized=5),
    )
    output = make_output("y", NAN, per_sample_sqnr_db=(30.0, NAN))
    found = render.find_headline(make_comparison(output, activations=activations))
    assert found.sentence == (
        "Output y: the quantized model gives NaN or infinity on 1 of 2 samples, first at /bad/Conv"
    )
    assert found.tensor == "bad"


def test_headline_blames_the_float_model_for_its_own_nan() -> None:
    own = make_activation("y", 3, NAN, nonfinite_float=1, nonfinite_quantized=1, is_output=True)
    comparison = make_comparison(make_output("y", NAN), activations=(own,))
    assert "the float model itself gives NaN or infinity" in render.headline(comparison)


def test_headline_without_outputs_says_so_and_still_names_the_error() -> None:
    lost = Unmatched(name="y", kind="output", model="float", reason="shapes differ")
    cliff = make_activation("cliff", 3, 5.0, 5.1)
    comparison = make_comparison(activations=(*CHAIN, cliff), unmatched=(lost,))
    assert render.headline(comparison) == (
        "No output of the two models could be compared: shapes differ; "
        "largest error added at /cliff/Conv (5.0 dB), whose own int8 steps leave 5.1 dB"
    )
    assert render.headline(make_comparison()) == "No output of the two models could be compared"


def test_headline_shows_what_only_the_deployed_kernels_break() -> None:
    text = render.headline(make_comparison(make_output("y", 29.1, deployed_sqnr_db=4.0)))
    assert text == "Output y: 29.1 dB simulated, but 4.0 dB deployed, with the kernels that ship"


def test_headline_shows_accuracy_lost_behind_a_good_sqnr() -> None:
    task = Task(output="y", samples=20, top1_float=1.0, top1_quantized=0.45, top1_agreement=0.45)
    text = render.headline(make_comparison(make_output("y", 29.1), task=task))
    assert text == "Output y 29.1 dB, but top-1 falls from 100.0 % to 45.0 %"


def test_headline_forgives_one_sample_of_top1() -> None:
    task = Task(output="y", samples=24, top1_float=1.0, top1_quantized=23 / 24, top1_agreement=0.9)
    text = render.headline(make_comparison(make_output("y", 29.1), task=task))
    assert text.endswith("nothing stands out")


def test_headline_is_about_the_worst_of_several_outputs_and_marks_random_feeds() -> None:
    comparison = make_comparison(
        make_output("boxes", 43.3), make_output("scores", 25.0), random_feeds=True
    )
    assert render.headline(comparison) == (
        "Output scores 25.0 dB: nothing stands out (worst of 2 outputs) (random feeds)"
    )


def test_a_broken_output_outranks_a_weak_sample_of_another() -> None:
    weak = make_output("weak", 24.5, per_sample_sqnr_db=(49.0, 3.0))
    text = render.headline(make_comparison(weak, make_output("broken", 2.0)))
    assert text.startswith("Output broken 2.0 dB: ")
    silent = make_output("silent", 31.2, channel_sqnr_db=(31.0, 0.0))
    text = render.headline(make_comparison(make_output("broken", 2.0), silent))
    assert text.startswith("Output silent: 31.2 dB pooled, but 1 of 2 channels carries no signal")


def test_headline_of_a_nan_names_its_first_origin_and_sample() -> None:
    activations = (
        *CHAIN,
        make_activation("masked", 4, NAN, nonfinite_float=3, nonfinite_quantized=3),
        make_activation("bad", 7, NAN, nonfinite_quantized=5),
        make_activation("late", 9, NAN, nonfinite_quantized=5),
    )
    comparison = make_comparison(
        make_output("y", NAN, per_sample_sqnr_db=(30.0, NAN)),
        activations=activations,
        nonfinite=(
            # A mask of -inf is the float model's own: it is no finding about the quantized one.
            make_nonfinite("masked", "/masked/Conv", model="float", origin=True),
            make_nonfinite("masked_DequantizeLinear_Output", "/masked/Conv", origin=True),
            make_nonfinite("before", "/before/Conv"),
            make_nonfinite("bad_QuantizeLinear_Input", "/bad/Conv", origin=True),
            make_nonfinite("late", "/late/Conv", origin=True),
        ),
    )
    found = render.find_headline(comparison)
    assert found.sentence == (
        "Output y: the quantized model gives NaN or infinity on 1 of 2 samples, "
        "first at /bad/Conv on sample 01.npz"
    )
    assert (found.severity, found.tensor) == ("problem", "bad")


def test_headline_of_the_float_models_own_nan_names_its_origin() -> None:
    own = make_activation("y", 3, NAN, nonfinite_float=1, nonfinite_quantized=1, is_output=True)
    comparison = make_comparison(
        make_output("y", NAN),
        activations=(*CHAIN, own),
        nonfinite=(make_nonfinite("b", "/b/Conv", model="float", origin=True),),
    )
    found = render.find_headline(comparison)
    assert found.sentence.endswith(
        "the float model itself gives NaN or infinity on 2 of 2 samples, "
        "first at /b/Conv on sample 01.npz"
    )
    assert found.tensor == "b"


def test_headline_of_a_deployed_difference_names_the_transformer() -> None:
    output = make_output("y", 29.1, deployed_sqnr_db=4.0, deployed_cause="MatMulScaleFusion")
    assert render.headline(make_comparison(output)) == (
        "Output y: 29.1 dB simulated, but 4.0 dB deployed, with the kernels that ship: "
        "ONNX Runtime's MatMulScaleFusion makes the difference"
    )


def test_headline_says_what_the_device_itself_breaks_and_where_it_begins() -> None:
    device = (make_device("y", 4.0), make_device("c", 6.0), make_device("a", 40.0, "quantization"))
    comparison = make_comparison(make_output("y"), activations=CHAIN, device=device)
    found = render.find_headline(comparison)
    assert found.sentence == (
        "Output y: 29.1 dB simulated, but 4.0 dB on the device, "
        "whose own arithmetic adds the most noise, first at c"
    )
    assert (found.severity, found.tensor) == ("problem", "c")
    nan = make_comparison(make_output("y"), device=(make_device("y", NAN),))
    assert "but NaN on the device" in render.headline(nan)
    assert render.find_headline(nan).severity == "problem"


@pytest.mark.parametrize(
    ("total", "simulated", "verdict", "severity"),
    [
        (22.0, 29.1, "device", "look"),  # 7 dB below, and still above 20 dB
        (25.0, 29.1, "device", "fine"),
        (45.0, INF, "device", "fine"),  # far below "exact", but good
        (4.0, 29.1, "quantization", "fine"),
        (19.0, 24.0, "device", "problem"),
    ],
)
def test_a_device_is_accused_only_of_what_matters(
    total: float, simulated: float, verdict: str, severity: str
) -> None:
    device = (make_device("y", total, verdict, quantization_sqnr_db=simulated),)
    found = render.find_headline(make_comparison(make_output("y", 29.1), device=device))
    assert found.severity == severity


def test_headline_says_when_less_than_half_of_the_float_tensors_are_matched() -> None:
    few = MatchCounts(matched=30, fused=20, unmatched=304, float_tensors=354)
    found = render.find_headline(make_comparison(make_output("y"), counts=few))
    assert found.sentence == (
        "Output y 29.1 dB, but only 30 of 354 float tensors are matched (20 fused, 304 unmatched)"
    )
    assert found.severity == "look"
    half = MatchCounts(matched=177, fused=20, unmatched=157, float_tensors=354)
    assert render.find_headline(make_comparison(make_output(), counts=half)).severity == "fine"
    grave = render.headline(make_comparison(make_output("y", 2.0), counts=few))
    assert "matched" not in grave


def test_headline_says_when_an_output_depends_on_the_samples_beside_it() -> None:
    peak = make_activation("embedding", 3, 29.1, observed_low=-1.5, observed_high=0.9)
    output = make_output("embedding")
    comparison = make_comparison(output, activations=(peak,), batch=make_batch(0.031))
    found = render.find_headline(comparison)
    assert found.sentence == (
        "Output embedding 29.1 dB, but it depends on the samples beside it: alone against in a "
        "padded batch of 24 up to 0.031 (2.1 % of its peak; float 4e-08)"
    )
    assert (found.severity, found.tensor) == ("look", "embedding")
    for quiet in (
        make_batch(0.014),  # under 1 % of the peak of 1.5
        make_batch(0.031, 0.03),  # padding moves the float model as much
    ):
        comparison = make_comparison(output, activations=(peak,), batch=quiet)
        assert render.find_headline(comparison).severity == "fine"
    broken = make_comparison(
        make_output("embedding", 2.0), activations=(peak,), batch=make_batch(0.031)
    )
    assert "beside" not in render.headline(broken)


# ------------------------------------------------------------------------------------- JSON

# What the format promises; more keys may come, none may go.
KEYS = (
    "format version made_with float_model quantized_model samples random_feeds optimization "
    "weights activations outputs task latency_ms unmatched warnings"
)
WEIGHT_KEYS = (
    "name node quantized_name dtype axis scale zero_point sqnr_db worst_channel_sqnr_db "
    "median_channel_sqnr_db max_abs_error mse cosine_similarity matched_by"
)
ACTIVATION_KEYS = (
    "name node quantized_name dtype scale zero_point local_sqnr_db accumulated_sqnr_db "
    "worst_channel_sqnr_db median_channel_sqnr_db cosine_similarity mse max_abs_error "
    "saturated_fraction matched_by"
)
OUTPUT_KEYS = (
    "name sqnr_db worst_channel_sqnr_db median_channel_sqnr_db median_sample_sqnr_db "
    "worst_sample_sqnr_db deployed_sqnr_db cosine_similarity max_abs_error per_sample_sqnr_db"
)


def full_comparison() -> Comparison:
    return make_comparison(
        make_output("y", 11.9, channel_sqnr_db=(10.0, INF)),
        activations=CHAIN,
        weights=(make_weight("w", "/a/Conv"),),
        unmatched=(Unmatched(name="u", kind="weight", model="float", reason="fused into w"),),
        task=Task(output="y", samples=2, top1_float=1.0, top1_quantized=0.5, top1_agreement=0.5),
        latency=Latency(
            float_seconds=0.0028,
            quantized_seconds=0.0064,
            float_spread_seconds=1e-4,
            quantized_spread_seconds=2e-4,
            runs=9,
        ),
        warnings=("a thing to know",),
    )


def test_json_has_every_promised_key() -> None:
    data = render.comparison_json(full_comparison())
    assert data["format"] == "quant-inspector/comparison"
    assert data["version"] == 1
    assert data["optimization"] == "disabled"
    assert set(KEYS.split()) <= data.keys()
    assert set(WEIGHT_KEYS.split()) <= data["weights"][0].keys()
    assert set(ACTIVATION_KEYS.split()) <= data["activations"][0].keys()
    assert set(OUTPUT_KEYS.split()) <= data["outputs"][0].keys()
    assert {"path", "sha256"} <= data["float_model"].keys()
    assert {"path", "sha256", "quant_format"} <= data["quantized_model"].keys()
    assert {"top1_float", "top1_quantized", "top1_agreement"} <= data["task"].keys()
    assert data["latency_ms"] == {"float": pytest.approx(2.8), "quantized": pytest.approx(6.4)}
    assert data["unmatched"] == [
        {
            "name": "u",
            "kind": "weight",
            "model": "float",
            "reason": "fused into w",
            "fused_into": "",
        }
    ]


def test_json_holds_channels_only_with_detail() -> None:
    short, long = (render.comparison_json(full_comparison(), detail=d) for d in (False, True))
    assert "channel_sqnr_db" not in short["weights"][0]
    assert long["weights"][0]["channel_sqnr_db"] == [42.0, 43.0]
    assert long["outputs"][0]["channel_sqnr_db"] == [10.0, "Infinity"]


def test_json_without_labels_and_timing_says_null() -> None:
    data = render.comparison_json(make_comparison(make_output()))
    assert data["task"] is None
    assert data["latency_ms"] is None


def test_dumped_json_is_strict() -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = render.dump_json({"a": [INF, -INF, NAN], "b": (1, 2.5), "c": None, "d": True})
    assert json.loads(text, parse_constant=refuse) == {
        "a": ["Infinity", "-Infinity", "NaN"],
        "b": [1, 2.5],
        "c": None,
        "d": True,
    }


def test_dumped_json_takes_numpy_values() -> None:
    import numpy as np

    value = {"a": np.float32(0.5), "b": np.array([1, 2]), "c": np.float64("nan"), "d": np.True_}
    assert json.loads(render.dump_json(value)) == {"a": 0.5, "b": [1, 2], "c": "NaN", "d": True}


def test_dumping_an_unknown_object_is_an_error() -> None:
    with pytest.raises(TypeError, match="object has no form in JSON"):
        render.dump_json({"a": object()})


texts = st.text(max_size=8) | st.sampled_from(
    [
        "NaN",
        "Infinity",
        "/a/b/Conv",
        "=1+1",
        "a=b",
        "\x1b[2J",
        "\u202etxt",
        "x" * 10_000,
        "/" * 10_000,
    ]
)
floats = st.floats(width=64)
optional = st.none() | floats
counts = st.integers(0, 2**40)
many = st.lists(floats, max_size=3).map(tuple)
per_channel = st.none() | floats | many
zero_points = st.none() | st.integers(-128, 255) | st.lists(st.integers(), max_size=3).map(tuple)
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
axes = st.none() | st.integers(0, 4)
slices = st.lists(
    st.builds(SliceError, source=texts, start=counts, stop=counts, sqnr_db=floats, absmax=floats),
    max_size=2,
).map(tuple)
files = st.builds(
    ModelFile, path=texts, sha256=texts, size_bytes=counts, quant_format=st.just("qdq+dynamic")
)
weights = st.builds(
    WeightError,
    **dict.fromkeys(("name", "node", "op_type", "kind", "quantized_name", "dtype"), texts),
    **dict.fromkeys(("matched_by", "note"), texts),
    **dict.fromkeys(("sqnr_db", "worst_channel_sqnr_db", "median_channel_sqnr_db"), floats),
    **dict.fromkeys(("max_abs_error", "mse", "cosine_similarity"), floats),
    **dict.fromkeys(("axis", "channel_axis", "worst_channel"), axes),
    **dict.fromkeys(("channel_sqnr_db", "channel_absmax"), many),
    shape=shapes,
    scale=per_channel,
    zero_point=zero_points,
)
activations = st.builds(
    ActivationError,
    **dict.fromkeys(("name", "node", "op_type", "quantized_name", "dtype"), texts),
    **dict.fromkeys(("matched_by", "note"), texts),
    **dict.fromkeys(("accumulated_sqnr_db", "worst_channel_sqnr_db"), floats),
    **dict.fromkeys(("median_channel_sqnr_db", "cosine_similarity", "mse"), floats),
    **dict.fromkeys(("max_abs_error", "observed_low", "observed_high"), floats),
    **dict.fromkeys(("local_sqnr_db", "saturated_fraction", "saturated_low_fraction"), optional),
    **dict.fromkeys(("saturated_high_fraction", "representable_low"), optional),
    **dict.fromkeys(("channel_sqnr_db", "channel_low", "channel_high"), many),
    **dict.fromkeys(("nonfinite_float", "nonfinite_quantized"), counts),
    **dict.fromkeys(("worst_channel", "channel_axis"), axes),
    representable_high=optional,
    depth=st.integers(-1, 99),
    shape=shapes,
    scale=per_channel,
    zero_point=zero_points,
    slices=slices,
    is_output=st.booleans(),
)
outputs = st.builds(
    OutputError,
    **dict.fromkeys(("name", "worst_sample"), texts),
    **dict.fromkeys(("sqnr_db", "deployed_sqnr_db", "worst_channel_sqnr_db"), floats),
    **dict.fromkeys(("median_channel_sqnr_db", "median_sample_sqnr_db"), floats),
    **dict.fromkeys(("worst_sample_sqnr_db", "cosine_similarity", "max_abs_error"), floats),
    **dict.fromkeys(("seen_sqnr_db", "unseen_sqnr_db"), optional),
    **dict.fromkeys(("worst_channel", "channel_axis"), axes),
    **dict.fromkeys(("channel_sqnr_db", "per_sample_sqnr_db"), many),
    slices=slices,
    deployed_differs=st.booleans(),
    deployed_max_steps=optional,
    deployed_flips=counts,
    deployed_cause=texts,
)
skipped = st.lists(
    st.builds(Skipped, **dict.fromkeys(("name", "kind", "model", "reason"), texts)), max_size=2
).map(tuple)
sides = st.sampled_from(["float", "quantized"])
batches = st.builds(
    BatchEffect,
    samples=counts,
    padded=st.booleans(),
    outputs=st.lists(
        st.builds(
            BatchError,
            **dict.fromkeys(("output", "worst_sample"), texts),
            **dict.fromkeys(("float_max_abs_difference", "quantized_max_abs_difference"), floats),
            quantized_sqnr_db=floats,
        ),
        max_size=2,
    ).map(tuple),
)
devices = st.builds(
    DeviceError,
    **dict.fromkeys(("name", "quantized_name", "device_name"), texts),
    **dict.fromkeys(("quantization_sqnr_db", "device_sqnr_db", "total_sqnr_db"), floats),
    kernel_sqnr_db=optional,
    samples=counts,
    verdict=st.sampled_from(["quantization", "kernel", "device", "exact"]),
)
comparisons = st.builds(
    Comparison,
    float_model=files,
    quantized_model=files,
    samples=counts,
    sample_names=st.lists(texts, max_size=2).map(tuple),
    random_feeds=st.booleans(),
    seen=st.sampled_from(sorted(render.SEEN_WORDS)),
    weights=st.lists(weights, max_size=2).map(tuple),
    activations=st.lists(activations, max_size=3).map(tuple),
    outputs=st.lists(outputs, max_size=2).map(tuple),
    unmatched=st.lists(
        st.builds(
            Unmatched, **dict.fromkeys(("name", "kind", "model", "reason", "fused_into"), texts)
        ),
        max_size=2,
    ).map(tuple),
    task=st.none()
    | st.builds(
        Task,
        output=texts,
        samples=counts,
        **dict.fromkeys(("top1_float", "top1_quantized", "top1_agreement"), st.floats(0, 1)),
    ),
    latency=st.none()
    | st.builds(
        Latency,
        **dict.fromkeys(("float_seconds", "quantized_seconds"), floats),
        **dict.fromkeys(("float_spread_seconds", "quantized_spread_seconds"), floats),
        runs=counts,
    ),
    warnings=st.lists(texts, max_size=2).map(tuple),
    counts=st.none()
    | st.builds(
        MatchCounts, **dict.fromkeys(("matched", "fused", "unmatched", "float_tensors"), counts)
    ),
    skipped=skipped,
    not_observed=skipped,
    nonfinite=st.lists(
        st.builds(
            NonFinite,
            **dict.fromkeys(("tensor", "node", "op_type", "first_sample"), texts),
            **dict.fromkeys(("nan", "infinite"), counts),
            model=sides,
            origin=st.booleans(),
        ),
        max_size=2,
    ).map(tuple),
    provider=texts,
    mask=texts,
    states=st.lists(st.tuples(texts, texts), max_size=2).map(tuple),
    batch=st.none() | batches,
    device=st.lists(devices, max_size=2).map(tuple),
    pins=st.lists(
        st.builds(Pin, float_name=texts, quantized_name=st.none() | texts), max_size=2
    ).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(comparisons)
def test_json_text_reads_back_as_the_same_comparison(comparison: Comparison) -> None:
    text = render.dump_json(render.comparison_json(comparison, detail=True))
    # repr tells -0.0 from 0.0, int from float, and holds NaN equal to itself.
    assert repr(render.read_comparison(json.loads(text))) == repr(comparison)


@settings(max_examples=60, deadline=None)
@given(comparisons)
def test_any_comparison_can_be_shown(comparison: Comparison) -> None:
    text = render.comparison_text(comparison)
    assert text
    # Nothing that a terminal obeys, however the names look, and no name of 10,000 characters.
    assert not [
        c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
    ]
    assert not set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069") & set(text)
    assert max(map(len, text.split("\n"))) < 2_000
    rows = list(csv.DictReader(io.StringIO(render.comparison_csv(comparison), newline="")))
    records = (
        comparison.outputs, comparison.activations, comparison.weights, comparison.unmatched,
        comparison.skipped, comparison.not_observed, comparison.nonfinite, comparison.device,
    )  # fmt: skip
    assert len(rows) == sum(map(len, records))
    formulas = [cell for row in rows for cell in row.values() if cell[:1] in ("=", "+", "@", "\t")]
    assert formulas == []


NEW_KEYS = ("counts", "skipped", "not_observed", "nonfinite", "provider", "mask", "states", "batch",
            "device", "pins")  # fmt: skip


def test_files_of_the_previous_version_are_still_read() -> None:
    comparison = full_comparison()
    data = render.comparison_json(comparison, detail=True)
    for key in NEW_KEYS:
        del data[key]
    for key in ("deployed_max_steps", "deployed_flips", "deployed_cause"):
        del data["outputs"][0][key]
    del data["unmatched"][0]["fused_into"]
    again = render.read_comparison(data)
    assert repr(again) == repr(comparison)
    assert (again.counts, again.provider, again.states) == (None, "CPUExecutionProvider", ())
    assert render.comparison_text(again)


def test_json_escapes_what_a_terminal_would_obey_and_loses_nothing() -> None:
    name = "a\x1b[2J\x9b\u202eb\u2066\ufeff\ud800" + "x" * 10_000
    text = render.dump_json({"name": name})
    assert all(line.isprintable() for line in text.split("\n"))
    assert json.loads(text) == {"name": name}
    text.encode()  # a lone surrogate is an escape as well


def test_reading_another_format_is_an_error_with_its_name() -> None:
    with pytest.raises(ReportError, match=r"format 'quant-inspector/exclusions' version 1"):
        render.read_comparison({"format": "quant-inspector/exclusions", "version": 1})
    newer = {**render.comparison_json(full_comparison(), detail=True), "version": 2}
    with pytest.raises(ReportError, match=r"version 2, expected .* version 1"):
        render.read_comparison(newer)


def test_reading_the_form_without_channels_is_an_error() -> None:
    with pytest.raises(ReportError, match=r"weights has no 'channel_sqnr_db', 'channel_absmax'"):
        render.read_comparison(render.comparison_json(full_comparison()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": "two"}, "comparison.samples is 'two', expected int"),
        ({"samples": True}, "comparison.samples is True, expected int"),
        ({"outputs": None}, "comparison.outputs is None, expected a list"),
        ({"float_model": []}, r"comparison.float_model is \[\], expected an object"),
        ({"states": [["out"]]}, r"comparison.states is \['out'\], expected 2 items"),
        ({"batch": []}, r"comparison.batch is \[\], expected"),
        ({"pins": [{"float_name": "a"}]}, "comparison.pins has no 'quantized_name'"),
    ],
)
def test_reading_damaged_json_names_the_field(change: dict[str, Any], message: str) -> None:
    data = render.comparison_json(full_comparison(), detail=True) | change
    with pytest.raises(ReportError, match=message):
        render.read_comparison(data)


# -------------------------------------------------------------------------------- CSV, text


def test_csv_has_one_row_per_tensor_and_units_in_its_header() -> None:
    rows = list(csv.DictReader(io.StringIO(render.comparison_csv(full_comparison()))))
    assert [row["kind"] for row in rows] == ["output", *["activation"] * 4, "weight", "weight"]
    weight, lost = rows[-2:]
    assert weight["scale"] == "0.01 0.02"
    assert weight["sqnr_db"] == "42.0"
    assert lost["note"] == "not compared (float model): fused into w"
    assert rows[1]["accumulated_sqnr_db"] == "45.0"
    assert rows[0]["deployed_sqnr_db"] == "11.9"


def test_csv_keeps_names_with_commas_and_quotes() -> None:
    name = 'a,"b"\nc'
    comparison = make_comparison(make_output(name))
    (row,) = csv.DictReader(io.StringIO(render.comparison_csv(comparison), newline=""))
    assert row["name"] == name


def test_csv_has_rows_for_what_was_left_out_and_columns_only_at_the_end() -> None:
    lost = Unmatched(name="u", kind="weight", model="float", reason="fused into w", fused_into="w")
    comparison = make_comparison(
        make_output("y", deployed_max_steps=7.5, deployed_flips=2, deployed_cause="GeluFusion"),
        unmatched=(lost,),
        skipped=(Skipped(name="/q", kind="node", model="quantized", reason="scale is computed"),),
        not_observed=(Skipped(name="t", kind="tensor", model="", reason="lies in a body"),),
        nonfinite=(make_nonfinite("n", "/n/Log", nan=3, origin=True),),
        device=(make_device("y", 12.5),),
    )
    text = render.comparison_csv(comparison)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text.startswith("kind,name,node,op_type,depth,quantized_name,dtype,shape,axis,scale,")
    assert ",representable_high,matched_by,note,scope,fused_into,model," in text.splitlines()[0]
    assert [row["kind"] for row in rows] == [
        "output", "weight", "skipped", "not_observed", "nonfinite", "device"
    ]  # fmt: skip
    output, fused, skipped, unseen, bad, device = rows
    assert (output["deployed_max_steps"], output["deployed_flips"]) == ("7.5", "2")
    assert output["deployed_cause"] == "GeluFusion"
    assert fused["note"] == "not compared (float model): fused into w"
    assert (fused["fused_into"], fused["model"]) == ("w", "float")
    assert (skipped["name"], skipped["model"]) == ("/q", "quantized")
    assert skipped["note"] == "node (quantized model): scale is computed"
    assert unseen["note"] == "tensor: lies in a body"
    assert (bad["name"], bad["node"], bad["nan"], bad["origin"]) == ("n", "/n/Log", "3", "True")
    assert (bad["first_sample"], bad["infinite"]) == ("01.npz", "2")
    assert (device["name"], device["device_name"], device["samples"]) == ("y", "y:0", "2")
    assert (device["total_sqnr_db"], device["kernel_sqnr_db"]) == ("12.5", "")
    assert device["verdict"] == "device"


@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t", "\r"])
def test_csv_names_are_no_formulas_and_numbers_stay_numbers(sign: str) -> None:
    name = f"{sign}HYPERLINK(0)"
    lost = Unmatched(name=name, kind="weight", model="float", reason=name)
    bad = make_nonfinite(name, name)
    comparison = make_comparison(make_output(name, -3.5), unmatched=(lost,), nonfinite=(bad,))
    rows = list(csv.DictReader(io.StringIO(render.comparison_csv(comparison), newline="")))
    assert [row["name"] for row in rows] == [f"'{name}"] * 3
    assert rows[2]["node"] == f"'{name}"
    assert rows[0]["sqnr_db"] == "-3.5"
    infinite = make_comparison(make_output("y", -INF))
    assert "-Infinity" in render.comparison_csv(infinite).splitlines()[1].split(",")


def test_csv_holds_long_names_whole() -> None:
    name = "n" * 10_000
    assert name in render.comparison_csv(make_comparison(make_output(name)))


def test_text_opens_with_the_headline_and_names_both_files() -> None:
    text = render.comparison_text(full_comparison())
    assert text.startswith(render.headline(full_comparison()))
    for part in (
        "model.onnx",
        "int8.onnx",
        "1.20 MB",
        "2 samples, not seen in calibration",
        "quantized 6.40 ms, float 2.80 ms",
        "top-1 float 100.0 %, quantized 50.0 %",
        "Activations: worst 4 of 4",
        "1 × weight (float model): fused into",
        "warning: a thing to know",
    ):
        assert part in text


def test_text_shows_at_most_top_rows() -> None:
    text = render.comparison_text(full_comparison(), top=2, warnings=False)
    assert "Activations: worst 2 of 4" in text
    assert "warning" not in text
    assert "Activations" not in render.comparison_text(full_comparison(), top=0)


def test_text_shows_the_slices_of_a_concat_with_a_low_one() -> None:
    slices = (
        SliceError(source="boxes", start=0, stop=4, sqnr_db=31.3, absmax=640.0),
        SliceError(source="scores", start=4, stop=14, sqnr_db=0.0, absmax=0.98),
    )
    text = render.comparison_text(make_comparison(make_output("y", 31.2, slices=slices)))
    assert "Slices far below the whole" in text
    (line,) = (line for line in text.splitlines() if line.startswith("  ▲"))
    assert line.split() == ["▲", "y", "scores", "4..13", "0.98", "0.0", "dB"]
    assert "Slices" not in render.comparison_text(full_comparison())


def test_text_puts_nan_first_among_the_worst() -> None:
    activations = (*CHAIN, make_activation("bad", 9, NAN))
    text = render.comparison_text(make_comparison(make_output(), activations=activations), top=1)
    assert "bad" in text.splitlines()[-1]


def test_text_marks_random_feeds() -> None:
    text = render.comparison_text(make_comparison(make_output(), random_feeds=True))
    assert "2 samples, random feeds, no data" in text


def accounted(counts: MatchCounts | None, **changes: Any) -> str:
    comparison = make_comparison(
        make_output(),
        activations=(*CHAIN, make_activation("d", 3, 36.0, matched_by="structure")),
        weights=(make_weight("w", "/a/Conv", matched_by="pin"),),
        counts=counts,
        **changes,
    )
    return render.comparison_text(comparison)


def test_text_accounts_for_every_float_tensor_under_the_facts() -> None:
    counts = MatchCounts(matched=6, fused=49, unmatched=1_039, float_tensors=1_094)
    lines = accounted(counts).splitlines()
    assert lines[4] == (
        "  1,094 float tensors: 6 matched (1 weight, 5 activations; 4 by name, 1 by structure, "
        "1 by hand), 49 fused, 1,039 unmatched"
    )
    assert "float tensors" not in accounted(None)


def test_text_says_when_the_accounting_does_not_add_up() -> None:
    counts = MatchCounts(matched=6, fused=1, unmatched=1, float_tensors=9)
    assert "1 fused, 1 unmatched, which does not add up (8)" in accounted(counts)


BASIS = "What these figures rest on"


def basis(**changes: Any) -> list[str]:
    outputs = changes.pop("outputs", (make_output(),))
    lines = render.comparison_text(make_comparison(*outputs, **changes)).splitlines()
    begin = lines.index(BASIS)
    end = lines.index("", begin) if "" in lines[begin:] else len(lines)
    return lines[begin + 1 : end]


def test_text_of_a_comparison_without_gaps_says_one_line_about_its_basis() -> None:
    assert basis(provider="CUDAExecutionProvider") == [
        "  2 samples, not seen in calibration; simulated: optimisations off; "
        "deployed: all on, CUDAExecutionProvider"
    ]
    assert basis(random_feeds=True)[0].startswith("  2 samples, random feeds, no data; ")


def test_text_says_what_the_figures_rest_on() -> None:
    skipped = [
        Skipped(name=f"/q{i}", kind="node", model="quantized", reason=f"scale of q_{i} is computed")
        for i in range(5)
    ]
    unseen = Skipped(name="if_out", kind="tensor", model="", reason="lies in a body")
    output = make_output(
        "y", deployed_differs=True, deployed_max_steps=12.25, deployed_flips=1,
        deployed_cause="GeluFusion",
    )  # fmt: skip
    assert basis(
        outputs=(output,),
        mask="attention_mask",
        states=(("h_out", "h"), ("c_out", "c")),
        pins=(Pin(float_name="a", quantized_name="b"), Pin(float_name="c", quantized_name=None)),
        nonfinite=(
            make_nonfinite("t0", "/before"),
            make_nonfinite("t1", "/log/Log", origin=True, first_sample="07.npz"),
            make_nonfinite("t2", "/div", origin=True, first_sample="07.npz"),
        ),
        skipped=tuple(skipped),
        not_observed=(unseen,),
        batch=make_batch(0.031),
    )[1:] == [
        "  mask: positions where attention_mask is 0 do not count",
        "  states: each model hands its own from sample to sample: h_out → h, c_out → c",
        "  matched by hand: a = b, c refused",
        "  NaN or infinity: 3 tensors of the quantized model, first at /log/Log (Log) in sample "
        "07.npz with 5 NaN and 2 infinite; it begins at 1 other node too",
        "  simulated against deployed: y: up to 12.25 steps apart, another largest element on 1 of "
        "2 samples; none of it without ONNX Runtime's GeluFusion",
        "  alone against in a padded batch of 24: up to 0.031 in embedding (float 4e-08)",
        "  skipped: 5 × node (quantized model): scale of … is computed  [/q0, /q1, /q2, … 2 more]",
        "  not observed: 1 × tensor: lies in a body  [if_out]",
    ]


def test_text_cuts_long_lists_of_reasons_with_a_count() -> None:
    words = [chr(ord("a") + i) * 3 for i in range(20)]
    skipped = tuple(Skipped(name=w, kind="node", model="float", reason=w) for w in words)
    lines = basis(skipped=skipped)
    assert lines[-1] == "  skipped: 14 more, for 14 other reasons"
    assert len(lines) == 1 + 6 + 1
    lost = tuple(Unmatched(name=w, kind="weight", model="float", reason=w) for w in words)
    text = render.comparison_text(make_comparison(make_output(), unmatched=lost))
    assert text.endswith("\n  8 more, for 8 other reasons")


def test_text_keeps_fused_tensors_apart_from_unmatched_ones() -> None:
    fused = [
        Unmatched(
            name=f"t{i}", kind="activation", model="float", reason=f"fused into {into}",
            fused_into=into,
        )
        for i, into in enumerate(("485", "feat"))
    ]  # fmt: skip
    lost = Unmatched(name="u", kind="weight", model="float", reason="no twin")
    theirs = Unmatched(name="v", kind="activation", model="quantized", reason="no twin")
    text = render.comparison_text(make_comparison(make_output(), unmatched=(*fused, lost, theirs)))
    assert text.splitlines()[-7:] == [
        "",
        "Fused: 2 tensors",
        "  2 × activation (float model): fused into …  [t0, t1]",
        "",
        "Not compared: 2 tensors (1 of them of the quantized model)",
        "  1 × weight (float model): no twin  [u]",
        "  1 × activation (quantized model): no twin  [v]",
    ]


def test_text_shows_the_tensors_of_a_device_worst_first() -> None:
    device = (
        make_device("fine", 28.0, "quantization", device_sqnr_db=60.0),
        make_device("broken", NAN),
        make_device("bad", 4.0, kernel_sqnr_db=41.0),
    )
    text = render.comparison_text(make_comparison(make_output(), device=device), top=2)
    lines = text.splitlines()
    at = lines.index("Device: worst 2 of 3")
    assert lines[at + 1].split() == [
        "tensor", "float→simulated", "simulated→deployed", "→device", "total", "verdict"
    ]  # fmt: skip
    assert lines[at + 2].split() == ["broken", "29.1", "dB", "–", "NaN", "NaN", "device"]
    assert lines[at + 3].split() == ["bad", "29.1", "dB", "41.0", "dB", "4.0", "dB", "4.0", "dB",
                                     "device"]  # fmt: skip
    assert "Device:" not in render.comparison_text(full_comparison())


NASTY = "evil\x1b[2J\x9b31m\u202eabc\u2066\u2029\r\nerror: gone\x7f"


def test_names_from_files_cannot_command_the_terminal() -> None:
    assert render.printable(NASTY) == (
        r"evil\x1b[2J\x9b31m\u202eabc\u2066\u2029\r\nerror: gone\x7f"
    )
    assert render.printable(render.printable(NASTY)) == render.printable(NASTY)
    assert render.printable("größe/Ä→日本 名") == "größe/Ä→日本 名"
    assert render.shorten_name(NASTY, 200) == render.printable(NASTY)
    comparison = make_comparison(
        make_output(NASTY, 2.0, deployed_differs=True, worst_sample=NASTY, deployed_cause=NASTY),
        float_model=ModelFile(path=NASTY, sha256="", size_bytes=1, quant_format="float"),
        activations=(make_activation(NASTY, 0, 3.0, op_type=NASTY, node=NASTY),),
        weights=(make_weight(NASTY, NASTY, matched_by=NASTY),),
        unmatched=(Unmatched(name=NASTY, kind="weight", model="float", reason=NASTY),),
        counts=MatchCounts(matched=2, fused=0, unmatched=1, float_tensors=3),
        skipped=(Skipped(name=NASTY, kind=NASTY, model=NASTY, reason=NASTY),),
        nonfinite=(make_nonfinite(NASTY, NASTY, op_type=NASTY, first_sample=NASTY),),
        device=(make_device(NASTY, 1.0, NASTY),),
        pins=(Pin(float_name=NASTY, quantized_name=NASTY),),
        states=((NASTY, NASTY),),
        mask=NASTY,
        provider=NASTY,
        warnings=(NASTY,),
    )
    text = render.comparison_text(comparison)
    assert all(line.isprintable() for line in text.split("\n"))
    assert "\nerror: gone" not in text
    assert text.count("evil") >= 15
    assert render.headline(comparison).isprintable()


def test_long_names_stay_readable() -> None:
    name = "/stage" * 1_700 + "/conv/Conv"
    comparison = make_comparison(
        make_output(name, 2.0),
        activations=(make_activation(name, 0, 3.0, node=name),),
        weights=(make_weight(name, name),),
        unmatched=(Unmatched(name=name, kind="weight", model="float", reason=f"not {name}"),),
        warnings=(f"the tensor {name} is long",),
    )
    text = render.comparison_text(comparison, name_width=70)
    assert max(map(len, text.split("\n"))) < 300
    assert text.count("/conv/Conv") >= 5
    assert len(render.headline(comparison)) < 250
    assert (
        json.loads(render.dump_json(render.comparison_json(comparison)))["outputs"][0]["name"]
        == name
    )


def test_unmatched_tensors_are_grouped_by_reason() -> None:
    items = [
        Unmatched(name="a", kind="activation", model="float", reason="not quantized"),
        *(
            Unmatched(name=f"t{i}", kind="activation", model="float", reason=f"fused into {into}")
            for i, into in enumerate(("485", "/a/Conv", "feat"))
        ),
    ]
    assert render.group_unmatched(items) == {
        ("activation", "float", "fused into …"): ("t0", "t1", "t2"),
        ("activation", "float", "not quantized"): ("a",),
    }


# ---------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.345, "12.3 dB"),
        (-0.04, "0.0 dB"),
        (-3.21, "-3.2 dB"),
        (INF, "exact"),
        (-INF, "-∞ dB"),
        (NAN, "NaN"),
        (None, "–"),
    ],
)
def test_decibels_have_one_decimal_and_infinity_is_exact(value: float | None, text: str) -> None:
    assert render.format_db(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.991, "99.1 %"),
        (0.0, "0.0 %"),
        (1.0, "100.0 %"),
        (0.0001, "<0.1 %"),
        (0.99996, ">99.9 %"),
        (None, "–"),
    ],
)
def test_percentages_never_round_something_to_nothing(value: float | None, text: str) -> None:
    assert render.format_percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.004321, "4.32 ms"),
        (0.0432, "43.2 ms"),
        (0.432, "432 ms"),
        (4.32, "4,320 ms"),
        (0.000001, "<0.01 ms"),
        (None, "–"),
    ],
)
def test_milliseconds_have_three_digits(value: float | None, text: str) -> None:
    assert render.format_ms(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1_000, "1.00 kB"),
        (998_169, "998 kB"),
        (999_900, "1.00 MB"),
        (1_200_000, "1.20 MB"),
        (23_456_789, "23.5 MB"),
        (2_147_483_648, "2.15 GB"),
        (None, "–"),
    ],
)
def test_sizes_are_decimal_with_three_digits(value: int | None, text: str) -> None:
    assert render.format_bytes(value) == text


def test_counts_say_of_how_many() -> None:
    assert render.format_count(3, 41) == "3 of 41"
    assert render.format_count(1234) == "1,234"


def test_long_paths_lose_their_middle_between_parts() -> None:
    name = "/backbone/stage2/stage2.3/branch2/conv2/Conv"
    assert render.shorten_name(name, 28) == "/backbone/…/conv2/Conv"
    assert render.shorten_name("short", 5) == "short"
    assert render.shorten_name("abcdefghij", 7) == "ab…ghij"


@given(st.text(alphabet="ab/._", max_size=80), st.integers(3, 50))
def test_shortened_names_fit_and_keep_their_end(name: str, width: int) -> None:
    short = render.shorten_name(name, width)
    assert len(short) <= width
    assert short == name or (short[-1] == name[-1] and "…" in short)


def test_a_width_without_room_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 characters"):
        render.shorten_name("name", 2)


@pytest.mark.parametrize(
    ("reason", "group"),
    [
        ("folded with BatchNormalization bn_7", "folded with BatchNormalization …"),
        ("its node Div_479 was fused", "its node … was fused"),
        (
            "limit of Clip /a/Clip, which is folded into Q",
            "limit of Clip …, which is folded into …",
        ),
        ("shapes differ: float (3, 16), quantized (3, 8)",) * 2,
    ],
)
def test_reasons_lose_the_names_they_mention(reason: str, group: str) -> None:
    item = Unmatched(name="w", kind="weight", model="float", reason=reason)
    assert list(render.group_unmatched([item])) == [("weight", "float", group)]


def test_description_of_a_file_is_shown_line_by_line() -> None:
    text = render.show_text(
        {
            "path": "int8.onnx",
            "sha256": "ab" * 32,
            "size_bytes": 1_200_000,
            "opset": 13,
            "producer": "",
            "quant_format": "qdq",
            "nodes": 41,
            "quantized_nodes": 3,
            "weights": 2,
            "quantized_weights": 2,
            "op_types": {"Conv": 30, "Relu": 11},
            "inputs": [{"name": "x", "dtype": "float32", "shape": [1, None, "width"]}],
            "outputs": [
                {"name": "y", "dtype": "float32", "shape": None},
                {"name": "z", "dtype": "int64", "shape": []},
            ],
            "recipe": {"format": "qdq", "per_channel": False, "percentile": None, "nodes": []},
        }
    )
    assert text.splitlines() == [
        "file      int8.onnx",
        "sha256    " + "ab" * 32,
        "size      1.20 MB",
        "opset     13",
        "producer  –",
        "format    qdq",
        "nodes     3 of 41 quantized",
        "weights   2 of 2 quantized",
        "top ops   Conv 30, Relu 11",
        "inputs    x: float32[1, ?, width]",
        "outputs   y: float32[?]",
        "          z: int64[]",
        "recipe    format qdq, per channel no",
    ]


def description(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "path": "m.onnx",
        "sha256": "ab",
        "size_bytes": 1,
        "opset": 13,
        "producer": "p",
        "quant_format": "qdq",
        "nodes": 1,
        "quantized_nodes": 0,
        "weights": 0,
        "quantized_weights": 0,
        "op_types": {"If": 1},
        "inputs": [],
        "outputs": [],
        "recipe": None,
    }
    return {**fields, **changes}


def test_description_of_a_file_says_what_cannot_command_the_terminal() -> None:
    text = render.show_text(
        description(
            path=NASTY,
            producer=NASTY,
            op_types={NASTY: 1},
            inputs=[{"name": NASTY, "dtype": "float32", "shape": [NASTY]}],
            recipe={"nodes": [NASTY]},
        )
    )
    assert all(line.isprintable() for line in text.split("\n"))
    assert text.count("evil") == 6


def test_description_of_a_file_names_bodies_and_what_could_not_be_read() -> None:
    reason = "its scale {} is computed from inputs"
    skipped = [
        {"name": f"/q{i}", "kind": "node", "model": "quantized", "reason": reason.format(f"s_{i}")}
        for i in range(5)
    ]
    bodies = [{"path": f"/If_{i}/then_branch", "nodes": i} for i in range(10)]
    lines = render.show_text(description(bodies=bodies, skipped=skipped)).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("bodies"))
    assert lines[at : at + 2] == [
        "bodies    /If_0/then_branch: 0 nodes",
        "          /If_1/then_branch: 1 node",
    ]
    assert lines[at + 8 :] == [
        "          … 2 more",
        "skipped   5 × node (quantized model): its scale … is computed from inputs  "
        "[/q0, /q1, /q2, … 2 more]",
    ]


# Recipes.


def recipe_table(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"rows": list(rows), "samples": 1, "random_feeds": False, "command": None}


def recipe_line(label: str, state: str = "done", **more: Any) -> dict[str, Any]:
    row = {
        "label": label, "state": state, "reason": "", "sqnr_db": 20.0, "deployed_sqnr_db": 19.0,
        "unseen_sqnr_db": None, "worst_part_sqnr_db": None, "task": None, "latency": None,
        "size_bytes": 1200, "same_as": "",
    }  # fmt: skip
    return row | more


def test_recipes_open_with_the_best_and_name_what_its_pooled_figure_hides() -> None:
    best = recipe_line("A", deployed_sqnr_db="Infinity")
    text = render.recipes_text(recipe_table(best, recipe_line("B", same_as="A")))
    assert text.startswith("Best of 2 recipes: A, exact\n")
    assert "the file is the same, byte for byte" in text
    hidden = recipe_line("A", worst_part_sqnr_db=0.0)
    assert render.recipe_finding(recipe_table(hidden)) == (
        "Best of 1 recipe: A, 19.0 dB, but its worst part 0.0 dB"
    )
    assert "worst part" in render.recipes_text(recipe_table(hidden))
    assert "worst part" not in text


def test_recipes_without_a_model_are_grouped_by_reason() -> None:
    rows = [recipe_line(f"R{at}", "failed", reason="it \x1b[31m broke") for at in range(5)]
    rows += [recipe_line("S", "waiting"), recipe_line("T", "impossible", reason="no kernels")]
    text = render.recipes_text(recipe_table(*rows))
    assert text.startswith("None of 5 recipes gave a model")
    assert "Gave no model\n  it" in text
    assert "R2\n    … 2 more" in text
    assert "R3" not in text
    assert "\x1b" not in text
    assert "Not possible\n  no kernels\n    T" in text
    assert "1 recipe not tried" in text
    assert render.recipe_finding(recipe_table()) == "No recipe was tried"
