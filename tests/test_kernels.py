"""Each graph here is changed by one known transformer, by arithmetic alone: so on any processor."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from inspector.errors import Cancelled, RunError
from inspector.kernels import (
    LEVELS,
    MAX_SESSIONS,
    SEARCH_ORDER,
    DeployedCause,
    Stopped,
    find_transformer,
    smallest_cure,
)
from inspector.model import Model
from inspector.model_files import load_model
from inspector.runtime import open_session, run, runtime_version
from tests.samples import MODELS, array, model, needs_models, qdq_of, save

Values = Mapping[str, np.ndarray[Any, Any]]


def weight(name: str, values: Any, dtype: str, scale: float = 1.0) -> tuple[Any, list[Any]]:
    """A DequantizeLinear of constants, zero point 0."""
    node = helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s", f"{name}_z"], [name])
    return node, [
        array(f"{name}_q", np.asarray(values, np.dtype(dtype))),
        array(f"{name}_s", np.float32(scale)),
        array(f"{name}_z", np.array(0, np.dtype(dtype))),
    ]


def bias_that_overflows_int32() -> onnx.ModelProto:
    """2 * 100 on top of the largest int32 wraps around in an integer kernel, in float it does not.

    The real output is 2**31 + 199; one step is 2**24, so it is code 128.
    """
    x, of_x = qdq_of("x", "xq", 1.0, 0, "uint8")
    y, of_y = qdq_of("c", "y", 2.0**24, 0, "uint8")
    w, of_w = weight("w", np.full((1, 1, 1, 1), 100), "int8")
    b, of_b = weight("b", [2**31 - 1], "int32")
    conv = helper.make_node("Conv", ["xq", "w", "b"], ["c"], "conv")
    inner = [*x, w, b, conv, *y]
    constants = [*of_x, *of_y, *of_w, *of_b]
    return model(inner, [("x", [1, 1, 2, 2])], [("y", [1, 1, 2, 2])], constants)


def float_bias_below_half_a_step() -> onnx.ModelProto:
    """Optimizing quantizes a float bias of 0.4 with a step of 1: nothing is left of it."""
    x, of_x = qdq_of("x", "xq", 1.0, 0, "uint8")
    y, of_y = qdq_of("c", "y", 0.1, 0, "uint8")
    w, of_w = weight("w", np.ones((1, 1, 1, 1)), "int8")
    conv = helper.make_node("Conv", ["xq", "w", "b"], ["c"], "conv")
    constants = [*of_x, *of_y, *of_w, array("b", np.float32([0.4]))]
    return model([*x, w, conv, *y], [("x", [1, 1, 2, 2])], [("y", [1, 1, 2, 2])], constants)


def reciprocal_times_41() -> onnx.ModelProto:
    """(1/41)*41 is not 1 in float32; fused to 41/41 it is."""
    return model(
        [
            helper.make_node("Div", ["one", "x"], ["r"], "div"),
            helper.make_node("Mul", ["r", "k"], ["z"], "mul"),
        ],
        [("x", [1, 1, 2, 2])],
        [("z", [1, 1, 2, 2])],
        [array("one", np.float32(1)), array("k", np.full((1, 1, 2, 2), 41, np.float32))],
    )


def both() -> onnx.ModelProto:
    """Two faults of two transformers in one graph, one output each."""
    first, second = bias_that_overflows_int32(), reciprocal_times_41()
    first.graph.node.extend(second.graph.node)
    first.graph.initializer.extend(second.graph.initializer)
    first.graph.output.extend(second.graph.output)
    return first


def loaded(make: Callable[[], onnx.ModelProto], tmp_path: Path) -> Model:
    return load_model(save(make(), tmp_path / f"{make.__name__}.onnx"))


def far_from(reference: Values, limit: float = 0.0) -> Callable[[Values], bool]:
    def differs(values: Values) -> bool:
        assert values.keys() == reference.keys()
        return any(
            bool(np.abs(reference[n].astype(np.float64) - values[n]).max() > limit)
            for n in reference
        )

    return differs


def explained(
    make: Callable[[], onnx.ModelProto], tmp_path: Path, value: float = 2.0, **limits: Any
) -> tuple[DeployedCause | None, Callable[[tuple[str, ...]], bool]]:
    """What is found, and a check of whether given transformers' absence really is a cure."""
    subject = loaded(make, tmp_path)
    feed = {"x": np.full((1, 1, 2, 2), value, np.float32)}
    names = [o.name for o in subject.outputs]
    differs = far_from(run(subject, feed))

    def cures(disabled: tuple[str, ...]) -> bool:
        session = open_session(subject, optimized=True, disabled_transformers=disabled)
        return not differs(session.run(feed, names))

    return find_transformer(subject, feed, names, differs=differs, **limits), cures


def test_an_integer_kernel_that_overflows_is_traced_to_the_transformer_that_makes_it(
    tmp_path: Path,
) -> None:
    subject = loaded(bias_that_overflows_int32, tmp_path)
    feed = {"x": np.full((1, 1, 2, 2), 2, np.float32)}
    assert np.all(run(subject, feed)["y"] == 128 * 2.0**24)
    assert np.all(run(subject, feed, optimized=True)["y"] == 0)
    found, cures = explained(bias_that_overflows_int32, tmp_path)
    assert found is not None
    assert found.name == "QDQSelectorActionTransformer"
    assert (found.level, found.complete) == ("extended", True)
    assert not cures(())
    assert cures(found.transformers)


def test_a_float_bias_rounded_away_while_optimizing_is_traced(tmp_path: Path) -> None:
    found, cures = explained(float_bias_below_half_a_step, tmp_path)
    assert found is not None
    assert (found.name, found.level) == ("WeightBiasQuantization", "basic")
    assert not cures(())
    assert cures(found.transformers)
    assert found.sentence == (
        "without WeightBiasQuantization (basic optimisations) the difference is gone"
    )


def test_a_rewrite_rule_is_found_as_well_as_a_transformer(tmp_path: Path) -> None:
    found, _ = explained(reciprocal_times_41, tmp_path, 41.0)
    assert found is not None
    assert (found.name, found.level) == ("DivMulFusion", "basic")


def test_nothing_is_explained_where_nothing_differs(tmp_path: Path) -> None:
    # (1/2)*41 and 41/2 are the same number.
    assert explained(reciprocal_times_41, tmp_path, 2.0)[0] is None


def test_two_transformers_that_both_matter_are_named_together(tmp_path: Path) -> None:
    found, cures = explained(both, tmp_path, 41.0)
    assert found is not None
    assert found.complete
    assert set(found.transformers) == {"DivMulFusion", "QDQSelectorActionTransformer"}
    assert (found.name, found.level) == ("", "")
    assert cures(found.transformers)
    assert not any(cures((name,)) for name in found.transformers)
    assert "DivMulFusion, QDQSelectorActionTransformer together" in found.sentence


def test_a_difference_that_no_transformer_makes_has_no_cause(tmp_path: Path) -> None:
    subject = loaded(reciprocal_times_41, tmp_path)
    feed = {"x": np.full((1, 1, 2, 2), 41, np.float32)}
    found = find_transformer(subject, feed, ["z"], differs=lambda _values: True)
    assert found is not None
    assert (found.transformers, found.name, found.complete) == ((), "", True)
    # As deployed, and with everything disabled: more is not tried.
    assert found.sessions == 2
    assert found.sentence == "no known graph transformer makes the difference"


def test_the_search_ends_with_its_budget_and_says_so(tmp_path: Path) -> None:
    found, _ = explained(both, tmp_path, 41.0, budget_seconds=0.0)
    assert found is not None
    assert (found.sessions, found.transformers, found.complete) == (0, (), False)
    assert found.sentence.endswith("not known; not searched further")


@pytest.mark.parametrize("culprit", SEARCH_ORDER)
def test_each_transformer_alone_is_found_within_the_limit(culprit: str) -> None:
    tried: list[tuple[str, ...]] = []

    def cures(disabled: Sequence[str]) -> bool:
        tried.append(tuple(disabled))
        return culprit in disabled

    assert smallest_cure(cures) == ((culprit,), True)
    assert (culprit,) in tried
    # One more session looks whether there is a difference.
    assert len(tried) + 1 <= 11 < MAX_SESSIONS


@pytest.mark.parametrize("other", ["NchwcTransformer", "DivMulFusion", "ConstantFolding"])
def test_the_most_frequent_transformer_and_another_are_found_within_the_limit(other: str) -> None:
    pair = {"QDQSelectorActionTransformer", other}
    tried: list[set[str]] = []

    def cures(disabled: Sequence[str]) -> bool:
        tried.append(set(disabled))
        return pair <= set(disabled)

    found, complete = smallest_cure(cures)
    assert (set(found), complete) == (pair, True)
    assert pair in tried
    assert len(tried) + 1 <= MAX_SESSIONS


@pytest.mark.parametrize("name", ["QDQS8ToU8Transformer", "QDQSelectorActionTransformer"])
def test_the_usual_transformers_are_found_in_five_sessions(name: str) -> None:
    tried: list[Sequence[str]] = []

    def cures(disabled: Sequence[str]) -> bool:
        tried.append(disabled)
        return name in disabled

    assert smallest_cure(cures) == ((name,), True)
    assert len(tried) + 1 == 5


def test_where_several_cure_alone_the_one_applied_last_is_named() -> None:
    # Without the Gemm there is nothing to fuse an activation into.
    alone = {"MatMulAddFusion", "GemmActivationFusion"}
    found = smallest_cure(lambda disabled: not alone.isdisjoint(disabled))
    assert found == (("GemmActivationFusion",), True)


def test_where_several_cure_alone_the_narrow_one_is_named() -> None:
    # Without int8 turned into uint8, or without integer kernels at all, or with no constants
    # prepared for either.
    alone = {"ConstantFolding", "QDQSelectorActionTransformer", "QDQS8ToU8Transformer"}
    found = smallest_cure(lambda disabled: not alone.isdisjoint(disabled))
    assert found == (("QDQS8ToU8Transformer",), True)


@pytest.mark.parametrize("sessions", range(12))
def test_a_search_that_is_stopped_names_a_set_that_was_seen_to_cure(sessions: int) -> None:
    tried: list[tuple[str, ...]] = []
    needed = {"DivMulFusion", "GeluFusionL2"}

    def cures(disabled: Sequence[str]) -> bool:
        if len(tried) == sessions:
            raise Stopped
        tried.append(tuple(disabled))
        return needed <= set(disabled)

    found, complete = smallest_cure(cures)
    assert not complete
    assert found == min((t for t in tried if needed <= set(t)), key=len, default=())


def test_no_more_sessions_are_opened_than_the_limit(tmp_path: Path) -> None:
    # All together cure, and never fewer: that takes longer than is allowed.
    answers = iter([True, False])
    subject = loaded(reciprocal_times_41, tmp_path)
    feed = {"x": np.full((1, 1, 2, 2), 41, np.float32)}
    found = find_transformer(subject, feed, ["z"], differs=lambda _values: next(answers, True))
    assert found is not None
    assert (found.sessions, found.complete) == (MAX_SESSIONS, False)
    assert found.transformers == SEARCH_ORDER
    assert found.sentence == (
        f"the difference is gone without {len(SEARCH_ORDER)} graph transformers together; "
        "not searched further"
    )


def test_the_search_stops_when_its_owner_asks(tmp_path: Path) -> None:
    seen: list[float] = []

    def stop(fraction: float, _message: str) -> None:
        seen.append(fraction)
        if len(seen) == 3:
            raise Cancelled

    with pytest.raises(Cancelled):
        explained(bias_that_overflows_int32, tmp_path, progress=stop)
    assert seen == sorted(seen)
    assert seen[0] >= 0
    assert seen[-1] < 1


def test_a_feed_that_does_not_fit_is_an_error_not_a_finding(tmp_path: Path) -> None:
    subject = loaded(reciprocal_times_41, tmp_path)
    with pytest.raises(RunError, match="does not run on"):
        find_transformer(subject, {}, ["z"], differs=lambda _values: True)


def test_every_transformer_is_in_the_search_once() -> None:
    assert sorted(SEARCH_ORDER) == sorted(n for names in LEVELS.values() for n in names)
    assert len(set(SEARCH_ORDER)) == len(SEARCH_ORDER)


# What ONNX Runtime logs when it is verbose: the transformers it applies, in their order.
_LOGGED = """
import sys
import onnxruntime as ort
for line in sys.stdin.read().splitlines():
    options = ort.SessionOptions()
    options.log_severity_level = 0
    level, _, names = line.partition(" ")
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    print("--", file=sys.stderr, flush=True)
    ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"],
                         disabled_optimizers=names.split())
"""
_ALWAYS = {
    "EnsureUniqueDQForNodeUnit",
    "RemoveDuplicateCastTransformer",
    "CastFloat16Transformer",
    "MemcpyTransformer",
}
_RULES = {"Level1_RuleBasedTransformer", "Level2_RuleBasedTransformer"}


def applied(path: Path, *sessions: tuple[str, tuple[str, ...]]) -> list[set[str]]:
    asked = "\n".join(f"{level} {' '.join(disabled)}" for level, disabled in sessions)
    command = [sys.executable, "-c", _LOGGED, str(path)]
    done = subprocess.run(command, input=asked, text=True, capture_output=True, check=True)
    _, *parts = re.split(r"^--$", done.stderr, flags=re.MULTILINE)
    return [set(re.findall(r"GraphTransformer (\S+) modified", part)) for part in parts]


@pytest.mark.skipif(runtime_version() != "1.31.1", reason="the list of names is that of 1.31.1")
def test_the_names_are_all_that_onnx_runtime_knows_and_it_knows_them_all(tmp_path: Path) -> None:
    path = save(reciprocal_times_41(), tmp_path / "any.onnx")
    known = SEARCH_ORDER
    levels = ("BASIC", "EXTENDED", "LAYOUT", "ALL")
    none, *by_level, nothing = applied(
        path,
        ("ORT_DISABLE_ALL", ()),
        *((f"ORT_ENABLE_{level}", ()) for level in levels),
        ("ORT_ENABLE_ALL", known),
    )
    # What is left when all are disabled is what a simulated session has too.
    assert nothing - _ALWAYS == none - _ALWAYS == set()
    assert by_level[-1] - _ALWAYS - _RULES <= set(known)
    for level, (before, now) in zip(
        ("basic", "extended", "layout", "layout"),
        zip([none, *by_level], by_level, strict=False),
        strict=True,
    ):
        assert now - before - _ALWAYS - _RULES <= set(LEVELS[level])
    # Rules are not logged themselves, but their group is gone when the last of them is. So a name
    # is known where leaving it out of an otherwise complete list brings the group back.
    rules = [name for name in known if name not in by_level[-1]]
    here = _X86_ONLY - by_level[-1]
    left_out = applied(
        path,
        *(("ORT_ENABLE_ALL", tuple(n for n in known if n != rule)) for rule in rules),
    )
    for rule, ran in zip(rules, left_out, strict=True):
        assert ran & _RULES or rule in here, rule


# Not registered on other processors.
_X86_ONLY = {"NchwcTransformer", "NhwcTransformer", "QDQS8ToU8Transformer"}


@needs_models
@pytest.mark.parametrize(
    ("file", "sample"),
    [
        ("fastestdet/ort_static_qdq.onnx", "00"),
        ("ultraface-rfb320/ort_static_qdq.onnx", "00"),
        ("mlperf-resnet8/ort_static_qdq.onnx", "03"),
    ],
)
def test_on_real_models_what_is_named_is_a_cure(file: str, sample: str) -> None:
    path = MODELS / file
    subject = load_model(path)
    feed = dict(np.load(path.parent / "inputs" / f"{sample}.npz"))
    reference = run(subject, feed)
    # Half the difference: how large it is depends on the processor, that there is one does not.
    deployed = run(subject, feed, optimized=True)
    gaps = [float(np.abs(reference[n].astype(np.float64) - deployed[n]).max()) for n in reference]
    if max(gaps) == 0:
        pytest.skip("simulated and deployed outputs agree on this processor")
    differs = far_from(reference, max(gaps) / 2)
    found = find_transformer(subject, feed, list(reference), differs=differs)
    assert found is not None
    assert found.name in ("QDQS8ToU8Transformer", "QDQSelectorActionTransformer")
    session = open_session(subject, optimized=True, disabled_transformers=[found.name])
    assert not differs(session.run(feed, list(reference)))
