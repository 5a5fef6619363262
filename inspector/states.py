"""Recurrent state: what a model gives at an output, it gets at an input with the next sample.

Feeds hold the state that the float model had when they were recorded, so every sample starts both
models afresh. On a device each model lives with its own state and its errors add up over time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from inspector.arrays import nearest, shape_text
from inspector.errors import FeedError
from inspector.model import Model, TensorInfo
from inspector.runtime import Feed

States = Sequence[tuple[str, str]]

# What a state's two names differ by: h and hn, state and stateN, h_in and h_out, past and present.
_AGAIN = re.compile(r"_*(n|new|next|out|output|updated|t|t1|1)?_*")
_BEFORE = re.compile(r"(^|_)(in|input|prev|previous|past|old|initial|init)(?=_|$)")
_AFTER = re.compile(r"(^|_)(out|output|next|present|new|updated)(?=_|$)")


def check_states(states: States, model: Model) -> None:
    """Refuses pairs of names that cannot carry a state.

    Args:
        states: (output, input) pairs of the float model.
        model: the float model.

    Raises:
        FeedError: an unknown name, an input named twice, or another type or shape.
    """
    outputs = {o.name: o for o in model.outputs}
    inputs = {i.name: i for i in model.inputs}
    for output, given in states:
        for name, known, what in ((output, outputs, "output"), (given, inputs, "input")):
            if name not in known:
                raise FeedError(
                    f"{model.name} has no {what} {name!r} to carry a state, the nearest are "
                    f"{nearest(name, list(known))}",
                    hint="Name an output and the input that gets it with the next sample.",
                )
        if [i for _, i in states].count(given) > 1:
            raise FeedError(
                f"input {given} is to get the state of several outputs, expected one",
                hint="Name each input once.",
            )
        if not _fits(outputs[output], inputs[given]):
            a, b = outputs[output], inputs[given]
            raise FeedError(
                f"output {output} ({a.dtype} {shape_text(a.shape or ())}) cannot be the state of "
                f"input {given} ({b.dtype} {shape_text(b.shape or ())})",
                hint="Name an output and an input of the same type and shape.",
            )


def _fits(output: TensorInfo, given: TensorInfo) -> bool:
    if "unknown" not in (output.dtype, given.dtype) and output.dtype != given.dtype:
        return False
    if output.shape is None or given.shape is None:
        return True
    return len(output.shape) == len(given.shape) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int))
        for a, b in zip(output.shape, given.shape, strict=True)
    )


def likely_states(model: Model) -> tuple[tuple[str, str], ...]:
    """(output, input) pairs that look like a state by name, type and shape."""
    found: dict[str, str] = {}
    for given in model.inputs:
        for output in model.outputs:
            # An input that leaves as it came is no state.
            alike = output.name != given.name and _alike(output.name, given.name)
            if alike and output.name not in found and _fits(output, given):
                found[output.name] = given.name
                break
    return tuple(found.items())


def _alike(output: str, given: str) -> bool:
    after, before = _plain(output), _plain(given)
    if after.startswith(before) and _AGAIN.fullmatch(after[len(before) :]):
        return True
    stem = _AFTER.sub("", after).strip("_")
    return bool(stem) and stem == _BEFORE.sub("", before).strip("_") and stem != after


def _plain(name: str) -> str:
    return re.sub(r"[./:\-]", "_", name).lower()


class Carried:
    """The state of one session of one model: its own outputs, given to it again.

    Args:
        states: (output, input) pairs in that model's own names.
    """

    def __init__(self, states: States) -> None:
        self.states = tuple(states)
        self._held: dict[str, NDArray[Any]] = {}

    def into(self, feed: Feed, sample: str) -> Feed:
        """The feed with the state that the sample before left; unchanged for the first.

        Raises:
            FeedError: the state has another shape or type than the feed's own value.
        """
        if not self._held:
            return feed
        for name, value in self._held.items():
            own = feed[name]
            if own.shape != value.shape or own.dtype != value.dtype:
                raise FeedError(
                    f"sample {sample}: the state for input {name} is {value.dtype.name} "
                    f"{list(value.shape)}, expected {own.dtype.name} {list(own.shape)}",
                    hint="Name an output and an input of the same type and shape.",
                )
        return {**feed, **self._held}

    def keep(self, outputs: Mapping[str, NDArray[Any]]) -> None:
        """Takes over what the model gave for a sample."""
        self._held = {given: outputs[output] for output, given in self.states}
