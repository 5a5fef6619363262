from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from inspector.content import (
    ELEMENTS,
    ActivationMatch,
    Candidates,
    Summary,
    correlation,
    find_activations,
    find_constant,
)
from tests.samples import MODELS, floats, needs_models, rng

Array = NDArray[Any]
SEEDS = st.integers(0, 2**32 - 1)


def rounded(values: Array, bits: int = 8, axis: int | None = None) -> Array:
    """Symmetric quantization and back, float64."""
    axes = None if axis is None else tuple(a for a in range(values.ndim) if a != axis)
    scale = np.abs(values).max(axis=axes, keepdims=True).astype(np.float64)
    scale = scale / (2 ** (bits - 1) - 1)
    return np.asarray(np.rint(values / scale) * scale)


def in_blocks(values: Array, bits: int, block: int) -> Array:
    """Each block along the last axis with its own scale."""
    flat = values.reshape(-1, block)
    return rounded(flat, bits, axis=0).reshape(values.shape)


# -- likeness ------------------------------------------------------------------------------------


def test_correlation_of_one_channel_is_pearsons() -> None:
    x, y = floats((200,), 1), floats((200,), 2)
    y = x + y
    assert correlation(x, y, None) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    assert correlation(x, -y, None) == pytest.approx(-np.corrcoef(x, y)[0, 1], abs=1e-6)


def test_gains_around_one_are_not_alike_although_their_cosine_is_one() -> None:
    x, y = 1 + floats((384,), 1, 0.05), 1 + floats((384,), 2, 0.05)
    assert x @ y / np.linalg.norm(x) / np.linalg.norm(y) > 0.99
    assert abs(correlation(x, y, None)) < 0.3


def test_correlation_by_channel_is_the_lower_quartile() -> None:
    x = floats((8, 300), 1).astype(np.float64)
    y = x + np.linspace(0.1, 0.8, 8)[:, None] * floats((8, 300), 2)
    by_hand = sorted(np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True))
    assert correlation(x, y, 0) == pytest.approx(by_hand[1], abs=1e-9)
    assert correlation(x.T, y.T, 1) == pytest.approx(by_hand[1], abs=1e-9)


@given(SEEDS, st.sampled_from([0, 1, 2]))
@settings(max_examples=40, deadline=None)
def test_a_gain_for_each_channel_changes_nothing(seed: int, axis: int) -> None:
    random = rng(seed)
    x = random.standard_normal((6, 7, 8))
    y = x + 0.1 * random.standard_normal(x.shape)
    gains = random.choice([-1.0, 1.0], x.shape[axis]) * random.uniform(0.01, 100, x.shape[axis])
    shape = [1, 1, 1]
    shape[axis] = -1
    scaled = correlation(x, y * gains.reshape(shape), axis)
    assert scaled == pytest.approx(correlation(x, y, axis), abs=1e-9)
    assert scaled > 0.95


def test_one_scale_for_channels_336_times_apart_leaves_the_weight_recognizable() -> None:
    weight = floats((32, 16, 3, 3), 1) * np.geomspace(1, 336, 32)[:, None, None, None]
    actual = rounded(weight)
    alone = [np.corrcoef(w.ravel(), a.ravel())[0, 1] for w, a in zip(weight, actual, strict=True)
             if a.any()]  # fmt: skip
    assert np.sum(np.array(alone) < 0.9) + 32 - len(alone) > 5  # really a hard one
    assert correlation(weight, actual, 0) > 0.95
    other = floats((32, 16, 3, 3), 2) * np.geomspace(1, 336, 32)[:, None, None, None]
    assert correlation(other, actual, 0) < 0.5


def test_a_single_channel_that_leaves_nothing_of_the_others_still_tells() -> None:
    weight = floats((16, 3, 3, 3), 1)
    weight[4] *= 1000
    actual = rounded(weight)
    assert np.flatnonzero(actual.any(axis=(1, 2, 3))).tolist() == [4]
    assert correlation(weight, actual, 0) > 0.95


def test_four_bits_in_blocks_are_alike() -> None:
    weight = floats((64, 128), 1)
    assert correlation(weight, in_blocks(weight, 4, 32), 0) > 0.95
    assert correlation(weight, in_blocks(weight, 4, 32), 1) > 0.95


def test_a_dead_channel_is_left_out_but_one_from_nowhere_is_not() -> None:
    weight = floats((4, 100), 1)
    dead = weight.copy()
    dead[:2] = 0
    assert correlation(weight, dead, 0) == pytest.approx(1)
    assert correlation(dead, weight, 0) == 0


def test_constant_channels_are_compared_by_distance() -> None:
    x = np.repeat(np.arange(1.0, 5), 50).reshape(4, 50)
    assert correlation(x, x, 0) == 1
    assert correlation(x, 1.004 * x, 0) > 0.95
    assert correlation(x, 1.02 * x, 0) < 0.95
    assert correlation(np.zeros((3, 9)), np.zeros((3, 9)), 0) == 1
    assert correlation(np.zeros((3, 9)), np.ones((3, 9)), 0) == 0


def test_values_that_are_not_finite_are_ignored_up_to_a_half() -> None:
    x = floats((4, 100), 1)
    y = x.copy()
    y[:, :40] = np.nan
    y[0, 50] = -np.inf
    assert correlation(x, y, 0) == pytest.approx(1)
    assert correlation(x, y, None) == pytest.approx(1)
    y[:, 40:60] = np.inf
    assert math.isnan(correlation(x, y, 0))
    assert math.isnan(correlation(np.zeros(0), np.zeros(0), None))


def test_what_cannot_be_compared_is_misuse() -> None:
    with pytest.raises(ValueError, match=r"shapes differ: reference \(3,\), actual \(4,\)"):
        correlation(np.zeros(3), np.zeros(4), None)
    with pytest.raises(ValueError, match=r"axis 2 is outside an array of shape \(3, 4\)"):
        correlation(np.zeros((3, 4)), np.zeros((3, 4)), 2)
    with pytest.raises(ValueError, match=r"axis 1 is outside an array of shape \(3,\)"):
        find_constant(np.zeros(3), {}, channel_axis=1)


SHAPES = [(2,), (1, 1, 4), (3, 2), (8,), (4, 3, 1, 1), (5, 1, 2, 2), (25,), (3, 8), (2, 1, 3, 3),
          (8, 1, 3, 3), (16, 3, 1, 1), (64,), (32, 16)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [3, 8])
def test_unrelated_values_are_not_alike(shape: tuple[int, ...], bits: int) -> None:
    random = rng(0)
    axis = 0 if len(shape) > 1 else None
    for _ in range(500):
        x, y = random.standard_normal((2, *shape))
        # Heavy tails, as in trained weights.
        assert not correlation(x**3, rounded(y**3, bits), axis) > 0.95


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eight_bits_are_alike_except_where_two_values_are_all_there_is(
    shape: tuple[int, ...],
) -> None:
    random = rng(0)
    axis = 0 if len(shape) > 1 else None
    for _ in range(20):
        x = random.standard_normal(shape)
        if x.size > 2:
            assert correlation(x, rounded(x), axis) > 0.95
        assert correlation(x, x, axis) == pytest.approx(1)


# -- constants -----------------------------------------------------------------------------------


def weights() -> dict[str, Array]:
    return {
        "conv": floats((16, 8, 3, 3), 1),
        "conv_too": floats((16, 8, 3, 3), 2),
        "dense": floats((64, 48), 3),
        "square": floats((32, 32), 4),
        "bias": floats((64,), 5),
        "bias_too": floats((64,), 6),
    }


@pytest.mark.parametrize("name", weights())
def test_a_quantized_weight_finds_its_own_float_weight(name: str) -> None:
    match = find_constant(rounded(weights()[name]), weights())
    assert match is not None
    assert (match.name, match.names, match.transform) == (name, (name,), "")
    np.testing.assert_array_equal(match.apply(weights()[name]), weights()[name])


LAYOUTS = {
    "squeezed": ("bias", lambda v: v.reshape(1, 64, 1), "reshaped to (1, 64, 1)"),
    "flattened": ("conv", lambda v: v.reshape(16, 72), "reshaped to (16, 72)"),
    "transposed": ("dense", lambda v: v.T, "transposed (1, 0)"),
    "square": ("square", lambda v: v.T, "transposed (1, 0)"),
    "HWIO": ("conv", lambda v: v.transpose(2, 3, 1, 0), "transposed (2, 3, 1, 0)"),
    "OHWI": ("conv", lambda v: v.transpose(0, 2, 3, 1), "transposed (0, 2, 3, 1)"),
    "pointwise": ("dense", lambda v: v.T[:, :, None, None],
                  "transposed (1, 0), reshaped to (48, 64, 1, 1)"),
    "im2col": ("conv", lambda v: v.reshape(16, 72).T, "as (16, 72) transposed (1, 0)"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_weight_is_found_in_another_layout(layout: str) -> None:
    name, change, words = LAYOUTS[layout]
    expected = change(weights()[name])
    match = find_constant(rounded(expected), weights())
    assert match is not None
    assert (match.name, match.transform) == (name, words)
    np.testing.assert_array_equal(match.apply(weights()[name]), expected)


def test_a_folded_weight_is_found_by_its_channels() -> None:
    gains = np.geomspace(0.1, 10, 16) * np.resize([1, -1], 16)
    folded = weights()["conv"].transpose(1, 0, 2, 3) * gains[:, None, None]
    match = find_constant(rounded(folded, axis=1), weights(), channel_axis=1)
    assert match is not None
    assert match.name == "conv"
    assert find_constant(rounded(folded, axis=1), weights()) is None


@pytest.mark.parametrize(
    "strange",
    [
        floats((16, 8, 3, 3), 9), floats((64,), 9), floats((5, 7), 9), np.zeros(64),
        np.full(64, np.nan), np.zeros(0), np.array(["a"] * 64),
    ],
    ids=["conv", "bias", "size", "zeros", "nan", "empty", "text"],
)  # fmt: skip
def test_nothing_is_found_where_nothing_is(strange: Array) -> None:
    assert find_constant(strange, weights() | {"zeros": np.zeros(64)}) is None


def test_two_constants_with_the_same_numbers_are_not_told_apart() -> None:
    twice = weights() | {"copy": weights()["conv"] * 1.0001}
    assert find_constant(rounded(weights()["conv"]), twice) is None
    near = weights() | {"tuned": weights()["conv"] + floats((16, 8, 3, 3), 9, 0.05)}
    match = find_constant(rounded(weights()["conv"]), near)
    assert match is not None
    assert match.name == "conv"


def test_scalars_match_when_equal_only() -> None:
    scalars = {"a": np.array(0.5, np.float32), "b": np.array(0.7, np.float32)}
    match = find_constant(np.array([0.7], np.float32), scalars)
    assert match is not None
    assert match.name == "b"
    assert find_constant(np.array(0.7001), scalars) is None


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ((0, 3, 1, 2), "gate order i, o, f, c here, i, f, c, o in the float tensor"),
        ((1, 0, 2), "gate order z, r, h here, r, z, h in the float tensor"),
    ],
)
def test_the_order_of_gates_is_named(order: tuple[int, ...], words: str) -> None:
    reference = {"weight_ih": floats((48, 24), 1), "weight_hh": floats((48, 24), 2)}
    blocks = np.split(reference["weight_hh"], len(order))
    actual = np.concatenate([blocks[at] for at in order])
    match = find_constant(rounded(actual), reference, gates=True)
    assert match is not None
    assert (match.name, match.transform) == ("weight_hh", words)
    np.testing.assert_array_equal(match.apply(reference["weight_hh"]), actual)
    plain = find_constant(rounded(actual)[None], reference)
    assert plain is not None
    numbers = ", ".join(map(str, order))
    assert plain.transform == f"reshaped to (1, 48, 24), blocks {numbers}"


@given(st.permutations(range(4)), SEEDS)
@settings(max_examples=24, deadline=None)
def test_any_order_of_blocks_is_undone(order: list[int], seed: int) -> None:
    kernel = rng(seed).standard_normal((10, 32))  # Keras: transposed as well
    blocks = np.split(kernel.T, 4)
    actual = np.concatenate([blocks[at] for at in order])[None]
    match = find_constant(rounded(actual), {"kernel": kernel, "other": kernel[:, ::-1].copy() ** 3})
    assert match is not None
    assert match.name == "kernel"
    np.testing.assert_array_equal(match.apply(kernel), actual)


def test_both_directions_of_a_bias_are_found_in_their_parts() -> None:
    biases = {f"{part}{way}": floats((64,), at) for at, (way, part) in enumerate(
        (way, part) for way in ("", "_reverse") for part in ("bias_ih", "bias_hh"))}  # fmt: skip

    def to_onnx(bias: Array) -> Array:
        i, f, c, o = np.split(bias, 4)
        return np.concatenate([i, o, f, c])

    actual = np.stack(
        [
            np.concatenate([to_onnx(biases[f"bias_{part}{way}"]) for part in ("ih", "hh")])
            for way in ("", "_reverse")
        ]
    )
    match = find_constant(actual, biases, gates=True)
    assert match is not None
    assert match.names == ("bias_ih", "bias_hh", "bias_ih_reverse", "bias_hh_reverse")
    np.testing.assert_array_equal(match.apply(*(biases[n] for n in match.names)), actual)


def test_a_weight_joined_from_three_is_found_and_short_parts_are_not() -> None:
    qkv = {name: floats((16, 16), at) for at, name in enumerate("qkv")}
    joined = np.concatenate([*qkv.values()], axis=1)
    match = find_constant(rounded(joined), qkv)
    assert match is not None
    assert match.transform == "joined along axis 1: q and k and v"
    np.testing.assert_array_equal(match.apply(*qkv.values()), joined)
    assert find_constant(np.array([0.5, 0.25]), {"a": np.array(0.5), "b": np.array(0.25)}) is None


class Counted(dict[str, Array]):
    """Counts how often a value is read."""

    reads = 0

    def __getitem__(self, name: str) -> Array:
        self.reads += 1
        return super().__getitem__(name)


def test_of_hundreds_of_constants_only_the_likely_ones_are_read_and_compared() -> None:
    floating = Counted({f"c{at}": floats((64, 64, 3, 3), at) for at in range(30)})
    floating.update({f"m{at}": floats((384, 384), at) for at in range(30)})
    floating.update({f"b{at}": floats((384,), at) for at in range(100)})
    candidates = Candidates(floating)
    for name, value in floating.items():
        match = find_constant(rounded(value), candidates)
        assert match is not None
        assert match.name == name
    assert find_constant(floats((384, 384), 999), candidates) is None
    # Once for the sample, once for the comparison with its own; again where nothing was found.
    assert floating.reads <= 2 * len(floating) + 20 * 30


def constants(graph: onnx.GraphProto) -> dict[str, Array]:
    return {i.name: numpy_helper.to_array(i) for i in graph.initializer}


def bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g
                yield from bodies(attribute.g)


@needs_models
def test_the_lstm_inside_the_bodies_of_silero_is_found_outside_of_them() -> None:
    folder = MODELS / "silero-vad-16k"
    floating = constants(onnx.load(folder / "model.onnx").graph)
    floating = {name: value for name, value in floating.items() if value.dtype.kind == "f"}
    # What the quantizer left outside has the same shape and must not be in the way.
    found = {}
    for body in bodies(onnx.load(folder / "ort_static_qdq.onnx").graph):
        for name, value in constants(body).items():
            if value.dtype.kind != "f":
                continue
            match = find_constant(value, floating, gates=True)
            assert match is not None, name
            given = [floating[n] for n in match.names]
            np.testing.assert_array_equal(match.apply(*given), value)
            assert "gate order i, o, f, c here, i, f, c, o in the float tensor" in match.transform
            found[name] = match.name.replace("model.decoder.rnn.", "")
    lstm = {"6": "weight_ih", "7": "weight_hh", "8": "bias_ih + bias_hh"}
    for name, own_name in found.items():
        assert own_name == lstm[name.removesuffix("_output_0")[-1]]
    assert len(found) == 6


# -- summaries -----------------------------------------------------------------------------------


def test_a_small_summary_holds_everything() -> None:
    x = floats((2, 3, 4), 1)
    summary = Summary.of(x)
    np.testing.assert_array_equal(summary.parts[0], x)
    assert summary.parts[0].dtype == np.float32
    assert Summary.of(x.astype(np.float64)).parts[0].dtype == np.float64
    assert (summary.shape, summary.count, summary.finite) == ((2, 3, 4), 24, 24)
    assert summary.mean == pytest.approx(x.mean(), abs=1e-6)
    assert summary.power == pytest.approx(np.square(x).mean(), abs=1e-6)


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
    st.integers(1, 3000),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_thinning_is_bounded_and_commutes_with_permuting(
    shape: list[int], limit: int, random: Any
) -> None:
    while math.prod(shape) > 300_000:
        shape = shape[:-1]
    x = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
    axes = random.sample(range(len(shape)), len(shape))
    part = Summary.of(x, limit).parts[0]
    assert 1 <= part.size <= limit
    np.testing.assert_array_equal(
        Summary.of(x.transpose(axes), limit).parts[0], part.transpose(axes)
    )


def test_a_summary_does_not_keep_the_array_alive() -> None:
    x = floats((512, 1024), 1)
    part = Summary.of(x).parts[0]
    assert part.size <= ELEMENTS
    assert part.base is None


def test_merged_summaries_describe_all_samples_and_stay_bounded() -> None:
    x, y = floats((1, 40, 1000), 1), floats((1, 40, 900), 2)
    y[0, 0, :100] = np.nan
    merged = Summary.of(x).merge(Summary.of(y))
    both = np.concatenate([x.ravel(), y.ravel()])
    assert (merged.count, merged.finite) == (76_000, 75_900)
    assert merged.mean == pytest.approx(np.nanmean(both), abs=1e-6)
    assert merged.power == pytest.approx(np.nanmean(np.square(both)), abs=1e-6)
    assert merged.shapes == ((1, 40, 1000), (1, 40, 900))
    assert sum(part.size for part in merged.parts) <= ELEMENTS
    halves = Summary.of(x, ELEMENTS // 2).merge(Summary.of(y, ELEMENTS // 2))
    assert len(halves.parts) == 2
    with pytest.raises(ValueError, match=r"limit 0 is not within 1\.\.65536"):
        Summary.of(x, 0)


# -- activations ---------------------------------------------------------------------------------


def summaries(values: Mapping[str, Array]) -> dict[str, Summary]:
    return {name: Summary.of(value) for name, value in values.items()}


def activations() -> dict[str, Array]:
    return {"a": floats((1, 8, 10, 10), 1), "b": floats((1, 8, 10, 10), 2), "c": floats((1, 30), 3)}


def test_activations_are_found_under_other_names() -> None:
    actual = {name.upper(): rounded(value) for name, value in reversed(activations().items())}
    found = find_activations(summaries(activations()), summaries(actual))
    assert {name: match.name for name, match in found.items()} == {"a": "A", "b": "B", "c": "C"}
    assert all(match.permutation is None and match.correlation > 0.99 for match in found.values())


@given(st.permutations(range(4)), SEEDS)
@settings(max_examples=30, deadline=None)
def test_permuted_axes_are_found_and_put_back(axes: list[int], seed: int) -> None:
    x = rng(seed).standard_normal((2, 6, 5, 5))
    actual = rounded(x.transpose(axes))
    match = find_activations(summaries({"x": x}), summaries({"y": actual}))["x"]
    back = actual if match.permutation is None else actual.transpose(match.permutation)
    assert np.corrcoef(back.ravel(), x.ravel())[0, 1] > 0.99


def test_axes_are_found_in_what_was_thinned() -> None:
    x = floats((1, 70, 60, 80), 1)
    found = find_activations(summaries({"x": x}), summaries({"y": x.transpose(0, 2, 3, 1)}))
    assert found["x"].permutation == (0, 3, 1, 2)


def test_an_axis_of_one_element_makes_no_second_way() -> None:
    x = floats((1, 16, 1, 20), 1)
    match = find_activations(summaries({"x": x}), summaries({"y": x.transpose(0, 2, 3, 1)}))["x"]
    assert match.permutation is not None
    np.testing.assert_array_equal(x.transpose(0, 2, 3, 1).transpose(match.permutation), x)


def unmatched(reference: Mapping[str, Array], actual: Mapping[str, Array]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    found = find_activations(summaries(reference), summaries(actual), reasons=reasons)
    assert found.keys() | reasons.keys() == reference.keys()
    assert not found.keys() & reasons.keys()
    return reasons


def test_the_same_numbers_twice_are_left_unmatched_with_the_reason() -> None:
    x = activations()["a"]
    words = "cannot be told from its values: {} and {} hold (nearly) the same numbers"
    assert unmatched({"x": x}, {"y": x, "z": x}) == {"x": words.format("y", "z")}
    assert unmatched({"x": x, "same": x}, {"y": x}) == {
        "x": words.format("x", "same"),
        "same": words.format("same", "x"),
    }
    # Nor is one of them taken for a transposed tensor afterwards.
    assert unmatched({"x": x, "moved": x.swapaxes(2, 3)}, {"y": x, "z": x}).keys() == {"x", "moved"}


def test_reasons_name_what_was_nearest() -> None:
    x, noise = activations()["a"], activations()["b"]
    far = unmatched({"x": x}, {"y": x + noise})
    assert far == {"x": "nothing is like it (at best y, correlation 0.71)"}
    assert unmatched({"x": x}, {"y": floats((3, 3), 1)}) == {
        "x": "no other activation has its shape"
    }
    assert unmatched({"x": x, "after": x + 0.3 * noise}, {"y": x + 0.31 * noise}) == {
        "x": "y is more like after"
    }


def test_constant_and_nonfinite_activations_never_match() -> None:
    x = floats((1, 100), 1)
    x[0, :60] = np.nan
    zeros, ones, empty = np.zeros((1, 100)), np.ones((1, 100)), np.zeros((0, 4))
    cases = {"zeros": zeros, "ones": ones, "empty": empty, "nan": x, "one": np.ones((1, 1))}
    assert unmatched(cases, {name.upper(): value for name, value in cases.items()}) == {
        "zeros": "all its values are equal",
        "ones": "all its values are equal",
        "empty": "it is empty",
        "nan": "less than half of its values are finite",
        "one": "all its values are equal",
    }


def test_positions_that_are_not_finite_are_ignored() -> None:
    masked = {name: value.copy() for name, value in activations().items()}
    for value in masked.values():
        value.reshape(-1)[::3] = -np.inf
    found = find_activations(summaries(activations()), summaries(masked))
    assert {name: match.name for name, match in found.items()} == {"a": "a", "b": "b", "c": "c"}


def test_a_tensor_is_not_taken_for_its_multiple_but_a_wrong_scale_is_forgiven() -> None:
    x = floats((1, 12, 16, 16), 1)
    float_side = summaries({"scores": x, "scaled": x / 8})
    found = find_activations(float_side, summaries({"p": rounded(x / 8), "q": rounded(x)}))
    assert {name: match.name for name, match in found.items()} == {"scores": "q", "scaled": "p"}
    assert found["scaled"].correlation > 0.999
    assert not find_activations(summaries({"scores": x}), summaries({"scaled": x / 8}))
    assert find_activations(summaries({"x": x}), summaries({"y": 2 * x}))["x"].name == "y"


def test_samples_of_unequal_length_are_compared_together() -> None:
    samples = [floats((1, n, 8), n) for n in (5, 9, 7)]
    others = [floats((1, n, 8), 50 + n) for n in (5, 9, 7)]

    def merged(parts: list[Array]) -> Summary:
        first, *rest = (Summary.of(part) for part in parts)
        for part in rest:
            first = first.merge(part)
        return first

    reference = {"x": merged(samples), "y": merged(others)}
    actual = {"q": merged([rounded(s) for s in others]), "p": merged([rounded(s) for s in samples])}
    found = find_activations(reference, actual)
    assert {name: match.name for name, match in found.items()} == {"x": "p", "y": "q"}
    moved = {"p": merged([rounded(s).swapaxes(1, 2) for s in samples])}
    match = find_activations({"x": reference["x"]}, moved)["x"]
    assert match == ActivationMatch(
        name="p", permutation=(0, 2, 1), correlation=pytest.approx(1, abs=1e-3)
    )


def observed(path: Path, feeds: list[dict[str, Array]]) -> dict[str, Summary]:
    """Summaries of all float tensors that a model computes; of Q/DQ pairs the one behind DQ."""
    proto = onnx.load(path)
    stored = {i.name for i in proto.graph.initializer}
    maker = {o: n for n in proto.graph.node for o in n.output}
    hidden = set()
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear":
            source = maker.get(node.input[0])
            hidden.add(node.output[0] if source is None else source.input[0])
    assert stored
    names = [o for n in proto.graph.node if n.op_type != "Constant" for o in n.output if o]
    there = {o.name for o in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in there)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs = [o.name for o in session.get_outputs()]
    result: dict[str, Summary] = {}
    for feed in feeds:
        for name, value in zip(outputs, session.run(None, feed), strict=True):
            if name not in hidden and value.dtype.kind == "f":
                sample = Summary.of(value, ELEMENTS // len(feeds))
                result[name] = result[name].merge(sample) if name in result else sample
    return result


def own(name: str) -> str:
    """The float name that ONNX Runtime's quantizer made a name from."""
    for suffix in ("_DequantizeLinear_Output", "_QuantizeLinear_Input"):
        name = name.removesuffix(suffix)
    return name


@needs_models
@pytest.mark.parametrize(
    ("model", "least"),
    # The share that is found falls with the error: magika's output has 1.4 dB, minilm's 4.
    [("fastestdet", 0.95), ("mlperf-resnet8", 1.0), ("squeezenet-fp16", 0.95), ("magika", 0.2),
     pytest.param("minilm-l6", 0.1, marks=pytest.mark.slow)],
)  # fmt: skip
def test_real_activations_find_their_own_or_nothing(model: str, least: float) -> None:
    folder = MODELS / model
    feeds = [dict(np.load(path)) for path in sorted((folder / "inputs").glob("*.npz"))[:3]]
    reference = observed(folder / "model.onnx", feeds)
    actual = observed(folder / "ort_static_qdq.onnx", feeds)
    theirs = {own(name) for name in actual}
    known = {name for name in reference if name in theirs}
    for seed in range(5):
        # With partners taken away at random, the neighbours must not step in.
        random = rng(seed)
        some = {n: s for n, s in actual.items() if seed == 0 or random.random() < 0.5}
        found = find_activations(reference, some)
        wrong = {
            name: match.name
            for name, match in found.items()
            if own(match.name) != name and {own(match.name), name} <= known
        }
        assert not wrong
        if seed == 0:
            right = sum(own(match.name) == name for name, match in found.items())
            assert right >= least * len(known)
