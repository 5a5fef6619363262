"""Stages: a cut model gives the bits of the uncut one, and computes only what has changed.

The oracles are the file that the quantizer writes, run by a session of its own, the same model in
one stage, and numpy.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from inspector import stages
from inspector.calibration import hushed
from inspector.errors import RunError
from inspector.preview import ACTIVATIONS, WEIGHTS, part_of_plan
from inspector.recipe import QuantConfig
from inspector.runtime import held_value, open_session
from inspector.stages import StagedSession
from inspector.switchboard import Switchboard
from tests.samples import MODELS, floats, model, needs_models
from tests.test_switchboard import opened, really

SHAPE = (2, 3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are cut as well, and switches are resolved at once."""
    monkeypatch.setattr(stages, "_STAGE_SECONDS", 1e-9)
    monkeypatch.setattr(stages, "_CROSSING_SHARE", 1e9)
    monkeypatch.setattr(stages, "_WORTH", 0)


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return found.keys() == wanted.keys() and all(
        np.array_equal(found[name], value, equal_nan=value.dtype.kind == "f")
        for name, value in wanted.items()
    )


@needs_models
@pytest.mark.parametrize(
    "name",
    [
        *("mlperf-resnet8", "mlperf-kws-dscnn"),
        pytest.param("magika", marks=pytest.mark.slow),
        pytest.param("silero-vad-16k", marks=pytest.mark.slow),
        pytest.param("fastestdet", marks=pytest.mark.slow),
        pytest.param("squeezenet-fp16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("cut_anywhere")
def test_lists_have_the_bits_of_their_own_files_when_most_is_remembered(
    name: str, cache: Path
) -> None:
    folder = MODELS / name
    quantizer, prepared, feeds = opened(
        folder / "model.onnx", QuantConfig(), cache, folder / "inputs"
    )
    names = [n.name for n in prepared.nodes if n.op_type != "Constant"]
    held = list(feeds)
    chosen = random.Random(1)
    with hushed():
        board = Switchboard(quantizer)
        for _ in range(6):
            alone = chosen.choice(names)
            for exclude in ([], [alone], [n for n in names if n != alone]):
                for feed in held:
                    found = board.run(board.plan_of(exclude), feed)
                    assert same(found, really(quantizer, exclude, feed))
    session = board._session
    runs = 6 * 3 * len(held)
    assert session.stages > 1 or name == "silero-vad-16k"  # all of it is in the body of an If
    assert session.computed < 0.8 * runs * session.stages or session.stages == 1


@needs_models
@pytest.mark.usefixtures("cut_anywhere")
def test_weights_or_activations_alone_are_the_same_cut_or_not(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = MODELS / "mlperf-resnet8"
    quantizer, _, feeds = opened(folder / "model.onnx", QuantConfig(), cache, folder / "inputs")
    feed = feeds[0]
    with hushed():
        cut = Switchboard(quantizer)
        monkeypatch.setattr(stages, "MOST_STAGES", 1)
        uncut = Switchboard(quantizer)
        assert (cut._session.stages > 1, uncut._session.stages) == (True, 1)
        for part in (WEIGHTS, ACTIVATIONS, WEIGHTS):
            for exclude in ((), ("Conv_2",)):
                plan = part_of_plan(cut.plan_of(exclude), part)
                assert same(cut.run(plan, feed), uncut.run(plan, feed))


# -- models by hand ----------------------------------------------------------------------------


def switch(name: str, source: str, result: str) -> onnx.NodeProto:
    """`result` is twice `source` where the switch is on, else the same."""
    branches = []
    for kind, inputs in (("Add", [source, source]), ("Identity", [source])):
        output = f"{result}_{kind}"
        branches.append(
            helper.make_graph(
                [helper.make_node(kind, inputs, [output])], output, [],
                [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            )
        )  # fmt: skip
    return helper.make_node(
        "If", [name], [result], then_branch=branches[0], else_branch=branches[1]
    )


def chain(length: int = 4) -> onnx.ModelProto:
    """Each link doubles or not, adds its bias, and is rectified; the second is an output, too."""
    nodes, source = [], "x"
    for at in range(length):
        nodes += [
            switch(f"on{at}", source, f"switched{at}"),
            helper.make_node("Add", [f"switched{at}", f"bias{at}"], [f"sum{at}"]),
            helper.make_node("Relu", [f"sum{at}"], [f"link{at}"]),
            # Reads nothing that is set: its stage has the state of the one before.
            helper.make_node("Neg", [f"link{at}"], [f"minus{at}"]),
            helper.make_node("Neg", [f"minus{at}"], [f"plus{at}"]),
        ]
        source = f"plus{at}"
    made = model(nodes, [("x", ["n", 3])], [("link1", ["n", 3]), (source, ["n", 3])])
    for at in range(length):
        made.graph.input.extend(
            [
                helper.make_tensor_value_info(f"on{at}", TensorProto.BOOL, []),
                helper.make_tensor_value_info(f"bias{at}", TensorProto.FLOAT, [3]),
            ]
        )
    return made


class Chain:
    """A staged chain beside what numpy makes of it."""

    def __init__(self, length: int = 4, **options: Any) -> None:
        self.length = length
        names = [f"{what}{at}" for at in range(length) for what in ("on", "bias")]
        proto = chain(length)
        self.session = StagedSession(proto, names, shapes={}, name="the chain", **options)
        self.on = [False] * length
        self.bias = [np.zeros(3, np.float32) for _ in range(length)]
        for at in range(length):
            self.put(at, on=False, bias=floats([3], seed=at))

    def put(self, at: int, *, on: bool | None = None, bias: Any = None) -> None:
        if on is not None:
            self.on[at] = on
            self.session.set(f"on{at}", np.array(on))
        if bias is not None:
            self.bias[at] = bias
            self.session.set(f"bias{at}", bias)

    def right(self, x: Any) -> bool:
        """Whether a run gives what numpy does."""
        found = self.session.run({"x": x})
        value, wanted = x, {}
        for at in range(self.length):
            value = np.maximum((2 * value if self.on[at] else value) + self.bias[at], 0)
            wanted[f"link{at}"] = value
        last = f"plus{self.length - 1}"
        return set(found) == {"link1", last} and all(
            np.array_equal(found[name], wanted[name.replace("plus", "link")]) for name in found
        )

    def stages_run(self, x: Any) -> int:
        before = self.session.computed
        assert self.right(x)
        return self.session.computed - before


@pytest.mark.usefixtures("cut_anywhere")
def test_only_what_follows_a_change_is_computed() -> None:
    each = Chain(stages=20)
    count = each.session.stages
    assert count > 8
    x = floats(SHAPE, seed=9)
    assert each.stages_run(x) == count
    assert each.stages_run(x) == 1  # the last stage leaves nothing to remember
    each.put(3, on=True)
    late = each.stages_run(x)
    each.put(3, on=False)
    each.put(0, bias=floats([3], seed=77))
    early = each.stages_run(x)
    assert 1 <= late < count / 2 < early <= count


@pytest.mark.usefixtures("cut_anywhere")
def test_a_state_that_comes_back_is_still_remembered() -> None:
    each = Chain(stages=20)
    x = floats(SHAPE)
    each.right(x)
    each.put(0, on=True)
    each.right(x)
    each.put(0, on=False)
    assert each.stages_run(x) == 1


@pytest.mark.usefixtures("cut_anywhere")
def test_samples_are_told_apart_by_their_values() -> None:
    each = Chain(stages=20)
    x = floats(SHAPE)
    each.right(x)
    assert each.stages_run(x.copy()) == 1
    assert each.stages_run(x + 1) == each.session.stages
    assert each.stages_run(floats((5, 3), seed=1)) == each.session.stages  # ragged
    assert each.stages_run(x) == 1


@pytest.mark.usefixtures("cut_anywhere")
def test_an_array_at_the_place_of_another_is_not_taken_for_it() -> None:
    each = Chain(stages=20)
    for seed in range(50):
        assert each.right(floats(SHAPE, seed=seed))  # each is freed before the next


@pytest.mark.usefixtures("cut_anywhere")
def test_what_a_switch_turns_off_does_not_count() -> None:
    proto = model([], [("x", [3])], [("y", [3])])
    on = helper.make_graph(
        [helper.make_node("Mul", ["x", "scale"], ["scaled"])], "on", [],
        [helper.make_tensor_value_info("scaled", TensorProto.FLOAT, None)],
    )  # fmt: skip
    off = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["plain"])], "off", [],
        [helper.make_tensor_value_info("plain", TensorProto.FLOAT, None)],
    )  # fmt: skip
    proto.graph.node.extend(
        [
            helper.make_node("If", ["on"], ["a"], then_branch=on, else_branch=off),
            *(helper.make_node("Neg", [a], [b]) for a, b in ("ab", "bc", "cy")),
        ]
    )
    proto.graph.input.extend(
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
        ]
    )
    session = StagedSession(proto, ["on", "scale"], shapes={}, name="it", stages=4)
    x = floats([3])
    computed = []
    for on_now, scale in ((False, 2.0), (False, 3.0), (True, 3.0), (True, 4.0)):
        session.set("on", np.array(on_now))
        session.set("scale", np.array(scale, np.float32))
        before = session.computed
        found = session.run({"x": x})["y"]
        assert np.array_equal(found, -x * np.float32(scale) if on_now else -x)
        computed.append(session.computed - before)
    count = session.stages
    assert count > 2
    assert computed == [count, 1, count, count]


@pytest.mark.usefixtures("cut_anywhere")
@pytest.mark.parametrize("room", [0, 60, 300])
def test_little_memory_makes_it_slower_and_not_wrong(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "REMEMBERED_BYTES", room)
    each = Chain(stages=20)
    each.session.keep()
    samples = [floats(SHAPE, seed=at) for at in range(5)]
    for at in (0, 1, 3, 2, 0):
        each.put(at, on=not each.on[at])
        assert all(each.right(x) for x in samples)
        assert each.session._memory.size <= room


@pytest.mark.usefixtures("cut_anywhere")
def test_what_is_new_takes_the_place_of_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "REMEMBERED_BYTES", 1500)
    each = Chain(stages=20)
    samples = [floats(SHAPE, seed=at) for at in range(5)]
    for x in samples:
        each.right(x)
    assert each.stages_run(samples[-1]) == 1
    assert each.stages_run(samples[0]) == each.session.stages


@pytest.mark.usefixtures("cut_anywhere")
def test_a_favoured_state_outlasts_what_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    room = 1500
    monkeypatch.setattr(stages, "REMEMBERED_BYTES", room)
    each = Chain(stages=20)
    each.session.keep()
    x = floats(SHAPE)
    each.right(x)
    for at in range(40):
        each.put(0, bias=floats([3], seed=100 + at))
        each.right(x)
    each.put(0, bias=floats([3], seed=0))
    assert each.stages_run(x) == 1


@pytest.mark.usefixtures("cut_anywhere")
def test_threads_side_by_side_give_the_same() -> None:
    each = Chain(8, stages=20)
    samples = [floats((40, 3), seed=at) for at in range(12)]
    with ThreadPoolExecutor(4) as pool:
        for at in (7, 3, 0, 5):
            each.put(at, on=True)
            assert all(pool.map(each.right, samples))


def test_what_was_given_out_is_not_changed_by_the_next_run() -> None:
    each = Chain(stages=4)
    first = each.session.run({"x": floats(SHAPE)})
    kept = {name: value.copy() for name, value in first.items()}
    each.put(2, on=True)
    each.session.run({"x": floats(SHAPE, seed=3)})
    assert same(first, kept)


@pytest.mark.usefixtures("cut_anywhere")
def test_what_was_given_out_may_be_changed() -> None:
    each = Chain(stages=20)
    x = floats(SHAPE)
    for values in each.session.run({"x": x}).values():
        values[:] = 7
    assert each.stages_run(x) == 1


def test_a_value_is_bound_without_a_copy_and_told_by_its_mark() -> None:
    each = Chain(stages=10)
    x = floats(SHAPE)
    each.right(x)
    for seed in (5, 6):
        each.bias[1] = floats([3], seed=seed)
        each.session.bind("bias1", held_value(each.bias[1]), str(seed).encode())
        assert each.right(x)


def plain(proto: onnx.ModelProto, feed: dict[str, Any]) -> dict[str, Any]:
    return open_session(proto, optimized=False).run(feed)


def odd_models() -> Iterator[tuple[str, onnx.ModelProto, int | None]]:
    """Models with something unusual at a cut: what it is, the model, its stages."""
    x, y = [("x", [4])], [("y", [4])]
    neg = helper.make_node
    yield "sequence", model(
        [
            neg("SplitToSequence", ["x"], ["s"]), neg("ConcatFromSequence", ["s"], ["c"], axis=0),
            neg("Neg", ["c"], ["y"]),
        ], x, y,
    ), 1  # fmt: skip
    body = helper.make_graph(
        [neg("Mul", ["early", "x"], ["inner"])], "b", [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )  # fmt: skip
    yield "capture", model(
        [
            neg("Neg", ["x"], ["early"]), neg("Abs", ["x"], ["late"]),
            neg("ReduceMax", ["late"], ["most"], keepdims=0), neg("Cast", ["most"], ["yes"], to=9),
            neg("If", ["yes"], ["y"], then_branch=body, else_branch=body),
        ], x, y,
    ), None  # fmt: skip
    yield "types", model(
        [
            neg("Cast", ["x"], ["half"], to=TensorProto.FLOAT16), neg("Neg", ["half"], ["minus"]),
            neg("Cast", ["minus"], ["double"], to=TensorProto.DOUBLE),
            neg("Sqrt", ["double"], ["root"]), neg("IsNaN", ["root"], ["isnan"]),
            neg("Cast", ["isnan"], ["y"], to=TensorProto.FLOAT),
        ], x, y,
    ), None  # fmt: skip
    unnamed = model(
        [neg("Neg", ["x"], ["a"]), neg("Dropout", ["a"], ["b", ""]), neg("Neg", ["b"], ["y"])],
        x, y, opset=13,
    )  # fmt: skip
    yield "empty names", unnamed, None
    given = model([neg("Neg", ["x"], ["a"]), neg("Neg", ["a"], ["y"])], x, y)
    given.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]))
    yield "input is output", given, None


@pytest.mark.parametrize(("what", "proto", "count"), list(odd_models()), ids=lambda v: str(v)[:12])
@pytest.mark.usefixtures("cut_anywhere")
def test_unusual_things_cross_cuts_or_are_not_cut(
    what: str, proto: onnx.ModelProto, count: int | None
) -> None:
    session = StagedSession(proto, [], shapes={}, name=what, stages=10)
    assert session.stages == count if count else session.stages > 1
    feed = {"x": np.array([1, -2, 0, 3.5], np.float32)}
    for _ in range(2):
        assert same(session.run(feed), plain(proto, feed))


@pytest.mark.usefixtures("cut_anywhere")
def test_an_output_that_no_array_can_hold_is_not_cut_behind() -> None:
    proto = model(
        [
            helper.make_node("Cast", ["x"], ["y"], to=TensorProto.BFLOAT16),
            helper.make_node("Cast", ["y"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Neg", ["f"], ["z"]),
        ],
        [("x", [2])],
        [("z", [2])],
    )
    proto.graph.output.append(helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [2]))
    session = StagedSession(proto, [], shapes={}, name="it", stages=3)
    feed = {"x": np.array([1.2345, -7], np.float32)}
    assert same(session.run(feed), plain(proto, feed))


def test_a_feed_that_does_not_fit_is_named() -> None:
    each = Chain(stages=4)
    with pytest.raises(RunError, match="the chain does not run on picture 3"):
        each.session.run({"x": floats((2, 7))}, sample="picture 3")
    assert each.right(floats(SHAPE))
