"""Both models opened so that one feed gives the tensors of every pair.

Apart from `compare`, because a single tensor is looked at the same way: two debugging sessions, and
feeds changed to what the quantized model takes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inspector.matching import ActivationPair, InputConversion, Matching
from inspector.model import FLOAT_DTYPES, Model
from inspector.runtime import Codes, Feed, Session, Tensors, open_session

# Both models run at the same time where they took longer than this one after the other.
_WORTH_A_THREAD = 0.01


class PairRunner:
    """Both models, opened so that one feed gives the tensors of every pair.

    Holds no activation: each call returns those of one feed.

    Args:
        float_model: the float model.
        quantized_model: its quantized twin.
        matching: of the two.
        pairs: which pairs; all by default.
        also: further tensors of the quantized model to give.
        coded: hold tensors as 8-bit codes where that is what their DequantizeLinear reads, which
            takes a quarter of the memory; they are dequantized when they are asked for.

    Attributes:
        pairs: those that can be compared.
        left_out: reason by float tensor for the others.
        outputs: matched outputs that can be read, quantized name by float name.
        unreadable: matched outputs that cannot, with the reason, by float name.
        also: further tensors that are given, of the float and of the quantized model.
        dtypes: ONNX Runtime's type of every tensor that is given, float model first.
        rounded: whether the float and the quantized model hold half precision, which is rounded
            where it is looked at.
    """

    def __init__(
        self,
        float_model: Model,
        quantized_model: Model,
        matching: Matching,
        pairs: Sequence[ActivationPair] | None = None,
        also: Sequence[str] = (),
        coded: bool = False,
    ) -> None:
        self.matching = matching
        self._models = (float_model, quantized_model)
        wanted = matching.activations if pairs is None else pairs
        self._coded: dict[str, Codes] = {}
        if coded:
            as_it_is = {*also, *matching.outputs.values(), *(p.before for p in wanted)}
            for pair in wanted:
                codes = None if pair.after in as_it_is else _codes(quantized_model, pair.after)
                if codes is not None:
                    self._coded[pair.after] = codes
        self._tensors = (
            tuple(p.name for p in wanted),
            tuple(n for p in wanted for n in (p.before, self._as_held(p.after)) if n),
        )
        self.also: tuple[tuple[str, ...], tuple[str, ...]] = ((), tuple(also))
        self._float, self._quantized = self._sessions()
        self._seconds = 0.0
        self.dtypes = (
            dict(self._float.output_dtypes),
            dict.fromkeys(self._coded, "tensor(float)") | dict(self._quantized.output_dtypes),
        )
        # Without a kernel for half precision the runtime computes in float32 and rounds only what
        # is looked at. Outputs are to be what they are when nobody looks.
        self.rounded = tuple(
            "tensor(float16)" in session.output_dtypes.values()
            for session in (self._float, self._quantized)
        )
        self._alone = tuple(
            open_session(model, optimized=False) if half else None
            for model, half in zip(self._models, self.rounded, strict=True)
        )
        self.left_out: dict[str, str] = {}
        self.not_floating: set[str] = set()
        kept = []
        for pair in wanted:
            reason = self._left_out(pair, float_model, quantized_model)
            if reason:
                self.left_out[pair.name] = reason
            else:
                kept.append(pair)
        self.pairs = tuple(kept)
        self.outputs: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        for name, other in matching.outputs.items():
            kind = self._float.unreadable.get(name) or self._quantized.unreadable.get(other)
            if kind:
                self.unreadable[name] = f"values of type {kind} are not read"
            else:
                self.outputs[name] = other

    def _as_held(self, after: str) -> str:
        codes = self._coded.get(after)
        return after if codes is None else codes.tensor

    def _sessions(self) -> tuple[Session, Session]:
        first, second = (
            _debug_session(model, (*tensors, *also))
            for model, tensors, also in zip(self._models, self._tensors, self.also, strict=True)
        )
        return first, second

    def look_at(self, float_names: Sequence[str], quantized_names: Sequence[str]) -> None:
        """Gives further tensors from now on."""
        self.also = ((*self.also[0], *float_names), (*self.also[1], *quantized_names))
        self._float, self._quantized = self._sessions()

    def _names(self, side: int) -> list[str]:
        """What to ask of a session: no inputs, which are known, and nothing twice."""
        if side == 0:
            names = [*(p.name for p in self.pairs), *self.outputs]
        else:
            names = [n for p in self.pairs for n in (p.before, self._as_held(p.after)) if n]
            names += self.outputs.values()
        inputs = {i.name for i in self._models[side].inputs}
        return [n for n in dict.fromkeys((*names, *self.also[side])) if n not in inputs]

    def _left_out(self, pair: ActivationPair, float_model: Model, quantized_model: Model) -> str:
        """Why a pair is not compared: shapes and indices are not quantized; "" where it is."""
        dtype = self._float.output_dtypes.get(pair.name)
        floating = (
            dtype.startswith(("tensor(float", "tensor(double", "tensor(bfloat"))
            if dtype is not None
            else float_model.info(pair.name).dtype in (*FLOAT_DTYPES, "unknown")
        )
        for session, model, name in (
            (self._float, float_model, pair.name),
            (self._quantized, quantized_model, pair.before),
            (self._quantized, quantized_model, self._as_held(pair.after)),
        ):
            if name and name in session.unreadable:
                return f"values of type {session.unreadable[name]} are not read"
            known = name in session.output_names or name in {i.name for i in model.inputs}
            if name and not known:
                return f"{name} is no tensor of {model.name} whose values can be read"
        if not floating:
            self.not_floating.add(pair.name)
            return f"holds {dtype or float_model.info(pair.name).dtype}, no floating-point values"
        return ""

    def run(
        self, feed: Feed, sample: str, quantized_feed: Feed | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """The float model's and the quantized model's tensors by name, for one feed.

        Args:
            feed: the float model's.
            sample: its name, for messages.
            quantized_feed: the quantized model's own; by default made of `feed`.
        """
        reference, actual = self.run_values(feed, sample, quantized_feed)
        return dict(reference), dict(actual)

    def run_values(
        self, feed: Feed, sample: str, quantized_feed: Feed | None = None
    ) -> tuple[Tensors, Tensors]:
        """As `run`, with the tensors left where the runtime has put them."""
        if quantized_feed is None:
            quantized_feed = feed_for_quantized(self.matching, feed)
        feeds = (feed, quantized_feed)

        def side_of(side: int) -> Tensors:
            session = (self._float, self._quantized)[side]
            values: dict[str, Any] = dict(feeds[side])
            values |= session.run_values(feeds[side], self._names(side), sample=sample)
            alone = self._alone[side]
            if alone is not None:
                outputs = (tuple(self.outputs), tuple(self.outputs.values()))[side]
                values |= alone.run(feeds[side], outputs, sample=sample)
            return Tensors(values, self._coded if side else None)

        begin = time.perf_counter()
        if self._seconds < _WORTH_A_THREAD:
            found = side_of(0), side_of(1)
        else:
            # Neither model keeps all cores busy alone.
            with ThreadPoolExecutor(1) as pool:
                other = pool.submit(side_of, 1)
                found = side_of(0), other.result()
        self._seconds = time.perf_counter() - begin
        return found


def _codes(model: Model, tensor: str) -> Codes | None:
    """The 8-bit codes that a tensor is dequantized from; None where it is not, or per channel."""
    node = model.producers.get(tensor)
    if node is None or (node.op_type, node.domain) != ("DequantizeLinear", ""):
        return None
    if len(node.inputs) < 3 or node.attributes.keys() & {"block_size", "output_dtype"}:
        return None
    codes, *constants = node.inputs
    if codes not in model.producers or codes in model.constant_names:
        return None
    scale, zero_point = (model.constant(name) for name in constants)
    if scale is None or zero_point is None or scale.size != 1 or zero_point.size != 1:
        return None
    if scale.dtype != np.float32 or zero_point.dtype not in (np.uint8, np.int8):
        return None
    # Copies: the runtime reads them in place, which a file need not align.
    return Codes(codes, np.array(scale.reshape(())), np.array(zero_point.reshape(())))


def _debug_session(model: Model, tensors: Sequence[str]) -> Session:
    inputs = {i.name for i in model.inputs}
    names = [t for t in dict.fromkeys(tensors) if t in model.producers and t not in inputs]
    return open_session(model, optimized=False, outputs=names)


def feed_for_quantized(matching: Matching, feed: Feed) -> dict[str, NDArray[Any]]:
    """The quantized model's feed: inputs by its names, types and layouts.

    Floats become half precision, axes move, and integer inputs are quantized with their own scale
    in float64, as `Matching.conversions` says.
    """
    found = {}
    for name, value in feed.items():
        conversion = matching.conversions.get(name)
        found[matching.inputs.get(name, name)] = (
            value if conversion is None else _converted(value, conversion)
        )
    return found


def _converted(value: NDArray[Any], conversion: InputConversion) -> NDArray[Any]:
    if conversion.permutation is not None:
        value = np.ascontiguousarray(value.transpose(conversion.permutation))
    if conversion.qparams is not None:
        # Its axis is the quantized model's.
        value = conversion.qparams.quantize(value)
    if value.dtype.name != conversion.dtype and conversion.dtype:
        with np.errstate(over="ignore"):
            value = value.astype(conversion.dtype)
    return value
