"""Where NaN and infinity begin in one model.

A NaN becomes an integer in QuantizeLinear and no tensor behind it shows it any more, so tensors
before Q are looked at as well. A sample in which further tensors turn bad runs once more with every
floating-point tensor of the main graph as an output: only then is it known which node began. Apart
from `compare`, because it looks at all tensors of one model instead of pairs of two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.comparison import NonFinite, first_nonfinite
from inspector.model import FLOAT_DTYPES, Model, Node
from inspector.padding import Padding
from inspector.runtime import Feed, Session, open_session


def has_nonfinite(values: NDArray[Any]) -> bool:
    """Whether floating-point values hold NaN or infinity, found in one cheap sum."""
    if values.dtype.kind != "f":
        return False
    with np.errstate(invalid="ignore", over="ignore"):
        return not np.isfinite(values.sum(dtype=np.float64))


class NonFiniteTrace:
    """NaN and infinite elements by tensor, over the samples it was shown.

    Args:
        model: the model; nothing is opened before the first sample that is bad.
        side: "float" or "quantized".
        padding: which positions to leave out of tensors that it knows by the same name.
    """

    def __init__(self, model: Model, side: str, padding: Padding | None = None) -> None:
        self.model = model
        self.side = side
        self.padding = padding
        self._session: Session | None = None
        self._counts: dict[str, tuple[int, int]] = {}
        self._first: dict[str, str] = {}
        self._origins: set[str] = set()
        self._constants: dict[str, tuple[int, int]] = {}

    def count(self, values: Mapping[str, NDArray[Any]], sample: str) -> bool:
        """Adds the tensors of one sample that are bad; True where one was not bad before."""
        fresh = False
        for name, value in values.items():
            nan, infinite = self._count(name, value)
            if not nan and not infinite:
                continue
            known = self._counts.get(name, (0, 0))
            self._counts[name] = (known[0] + nan, known[1] + infinite)
            if name not in self._first:
                self._first[name] = sample
                fresh = True
        return fresh

    def see(self, feed: Feed, sample: str, counted: Iterable[str]) -> tuple[str, ...]:
        """Runs one sample again with all tensors, and finds where it begins.

        Args:
            feed: the model's own.
            sample: its name.
            counted: tensors that `count` was given for this sample.

        Returns:
            Further bad tensors, to be given to `count` with the following samples.
        """
        if self._session is None:
            names = [
                o for n in self.model.nodes for o in n.outputs
                if o and self.model.info(o).dtype in (*FLOAT_DTYPES, "unknown")
                and o not in self.model.constant_names
            ]  # fmt: skip
            self._session = open_session(self.model, optimized=False, outputs=names)
        values = {**feed, **self._session.run(feed, sample=sample)}
        bad = {name: value for name, value in values.items() if any(self._count(name, value))}
        further = tuple(name for name in bad if name not in set(counted))
        self.count({name: bad[name] for name in further}, sample)
        for name in bad:
            if self._first[name] != sample:
                continue
            node = self.model.producers.get(name)
            constants = self._constants_of(node)
            inputs = () if node is None else (*node.inputs, *node.captured)
            if not constants and not bad.keys() & set(inputs):
                self._origins.add(name)
            for constant, counts in constants.items():
                self._counts[constant] = counts
                self._first.setdefault(constant, sample)
                self._origins.add(constant)
        return further

    def _count(self, name: str, value: NDArray[Any]) -> tuple[int, int]:
        if not has_nonfinite(value):
            return 0, 0
        parts = [value] if self.padding is None else self.padding.parts(name, value)
        nan = sum(int(np.count_nonzero(np.isnan(p))) for p in parts)
        return nan, sum(int(np.count_nonzero(np.isinf(p))) for p in parts)

    def _constants_of(self, node: Node | None) -> dict[str, tuple[int, int]]:
        """Constants that a node reads and that hold NaN or infinity themselves."""
        found = {}
        for name in () if node is None else node.inputs:
            if name not in self.model.constant_names:
                continue
            if name not in self._constants:
                value = self.model.constant(name)
                values = np.zeros(0) if value is None else value
                if values.dtype.kind == "V":
                    values = values.astype(np.float32)
                floating = values.dtype.kind == "f"
                self._constants[name] = (
                    (int(np.isnan(values).sum()), int(np.isinf(values).sum()))
                    if floating
                    else (0, 0)
                )
            if self._constants[name] != (0, 0):
                found[name] = self._constants[name]
        return found

    def records(self) -> tuple[NonFinite, ...]:
        """One per tensor with NaN or infinity: inputs and constants first, then in file order."""

        def place(name: str) -> tuple[int, str]:
            node = self.model.producers.get(name)
            return (-1 if node is None else node.index, name)

        inputs = {i.name for i in self.model.inputs}
        found = []
        for name in sorted(self._counts, key=place):
            node = self.model.producers.get(name)
            constant = name in self.model.constant_names
            found.append(
                NonFinite(
                    tensor=name,
                    node="" if node is None or constant else node.name,
                    op_type="Input" if name in inputs else "Constant"
                    if constant or node is None else node.op_type,
                    model=self.side,
                    nan=self._counts[name][0],
                    infinite=self._counts[name][1],
                    first_sample=self._first[name],
                    origin=name in self._origins,
                )
            )  # fmt: skip
        return tuple(found)


def nonfinite_warning(records: Sequence[NonFinite], who: str, samples: Sequence[str]) -> str:
    """One sentence about where it begins in a model; "" without records.

    Args:
        records: of one model, as `NonFiniteTrace.records` gives them.
        who: the model's name in the sentence, e.g. "the float model".
        samples: names of all samples, in their order.
    """
    first = first_nonfinite(records, samples)
    if first is None:
        return ""
    which = f"{first.op_type} {first.node}" if first.node else first.op_type
    held = " and ".join(
        f"{count} {what}"
        for count, what in ((first.nan, "NaN"), (first.infinite, "infinite"))
        if count
    )
    return (
        f"tensor {first.tensor} ({which}) is the first with NaN or infinite values in {who}, on "
        f"sample {first.first_sample} ({held} in all): its figures are unknown, and those behind "
        "it rest on it"
    )
