"""Cross-layer equalization: channel ranges of a float model evened out between layers.

The method of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
(ICCV 2019, section 4.1), known from AIMET. Where one layer's channels go through nothing but
positively homogeneous nodes into one other layer, channel i of the first is divided by s_i > 0 and
what the second multiplies it with grows by s_i: what both compute together stays the same, while
s_i = sqrt(r1_i / r2_i) gives both channels the same range. A depthwise weight with one scale for
channels of very different range gains most.

Two things differ from the paper. A channel's range in the first layer is that of its weights or its
bias, whichever is larger: a channel of tiny weights would else blow its bias up, and with it the
range of the tensor between (the paper absorbs such biases afterwards, which changes what the model
computes). And pairs whose channels are alike already are left alone: they have nothing to gain.

All names stay those of the user's file, whose bytes are never touched. A BatchNormalization between
two layers is gone through, so the rewrite needs no folding before it. A module of its own because
it makes a float model of a float model: what is quantized, and what a quantized file has to be
compared with, are both made here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
from numpy.typing import NDArray

from inspector.errors import QuantizationError
from inspector.folding import constant_value
from inspector.matching import clip_limits
from inspector.metrics import decibels, powers
from inspector.model import Model, Node
from inspector.runtime import Feed, Progress, no_progress, open_session

# Outputs of the two float models that agree less are not the same: float32 gives 110 to 140 dB.
LEAST_DB = 80.0
# They are looked at on so many feeds.
CHECKED_FEEDS = 16
# In the metadata of a model that was equalized, and of what is quantized of it. Change the version
# whenever the factors change: a quantized file is compared with what the same version makes.
MARK = "quant_inspector.equalized"
MARK_VERSION = "1"

# Channels are alike where the largest is at most so many times the one that nine tenths exceed.
ALIKE_RATIO = 8.0
# Rounds end where no factor moves more than this any more, as a share of itself.
_SETTLED = 1e-4
_MOST_ROUNDS = 1000

_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm"})
_DTYPES = ("float32", "float64")
# f(s * x) = s * f(x) for s > 0, channel by channel, whatever their attributes.
_HOMOGENEOUS = frozenset(
    {"Abs", "AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Identity",
     "LeakyRelu", "LpPool", "MaxPool", "PRelu", "Relu"}
)  # fmt: skip

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class EqualizedPair:
    """Two layers whose channels were evened out.

    Attributes:
        first, second: names of their nodes.
        through: nodes between them, in order.
        channels: of the tensor between them.
        dead: channels left alone, because a layer has nothing but zeros for them.
        first_ratio_before, first_ratio_after: range of the first layer's largest channel by that of
            its smallest: weights and bias, a BatchNormalization folded in; dead ones left out.
        second_ratio_before, second_ratio_after: the same of the weights that the second layer reads
            them with.
        factors: what each channel was divided by, 1 for dead ones.
    """

    first: str
    second: str
    through: tuple[str, ...]
    channels: int
    dead: int
    first_ratio_before: float
    first_ratio_after: float
    second_ratio_before: float
    second_ratio_after: float
    factors: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class NotEqualized:
    """A layer whose output channels were left as they are.

    Attributes:
        node: its name.
        reason: why, as a clause about the node.
    """

    node: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Equalized:
    """A float model that computes the same with evened-out channels.

    Attributes:
        model: in memory, with the node and tensor names of the model it was made of; that model
            itself where there is no pair.
        pairs: what was evened out, in graph order.
        skipped: every other Conv, ConvTranspose and Gemm of the main graph.
        rounds: how often all pairs were gone through until no factor moved any more.
    """

    model: Model
    pairs: tuple[EqualizedPair, ...]
    skipped: tuple[NotEqualized, ...]
    rounds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Term:
    """A constant that is added on the way, to be divided with its channels.

    Attributes:
        node, position: the input that reads it.
        rank: of the tensor it is added to; 0 where it is one value per channel by definition.
    """

    node: Node
    position: int
    rank: int


@dataclass(kw_only=True, slots=True)
class _Layer:
    """A layer's weight without its taps.

    Attributes:
        node: it.
        sizes: largest absolute weight by [group, output of the group, input of the group].
        gain: by output channel, what scales it before the next node that is not affine.
    """

    node: Node
    sizes: Array
    gain: Array

    @property
    def outputs(self) -> int:
        return int(self.gain.size)

    @property
    def inputs(self) -> int:
        return int(self.sizes.shape[0] * self.sizes.shape[2])

    def effective(self) -> Array:
        return self.sizes * self.gain.reshape(self.sizes.shape[:2])[:, :, None]


@dataclass(kw_only=True, slots=True)
class _Chain:
    first: _Layer
    second: _Layer
    through: tuple[str, ...]
    terms: tuple[_Term, ...]
    # The absolute bias of each channel, all that is affine folded in.
    offset: Array
    factors: Array = field(default_factory=lambda: np.ones(0))


class _Left(Exception):
    """A layer is left alone, for this reason."""


def is_equalized(model: Model) -> bool:
    """The model says that it was equalized by this version, or was quantized of such a model."""
    return any(p.key == MARK and p.value == MARK_VERSION for p in model.proto.metadata_props)


_made: WeakKeyDictionary[Model, Equalized] = WeakKeyDictionary()


def equalize(model: Model, *, alike_ratio: float = ALIKE_RATIO) -> Equalized:
    """The float model with evened-out channels.

    A model that is equalized already is its own result, without pairs.

    Args:
        model: a float model; nothing of it is changed. What the default makes of it is kept as
            long as it is.
        alike_ratio: pairs are left alone where in neither layer the largest channel is more than so
            many times the one that nine tenths exceed; 1 evens all out, as the paper does.

    Raises:
        ModelError: it is larger than one protobuf can be.
    """
    if alike_ratio != ALIKE_RATIO:
        return _equalize(model, alike_ratio)
    made = _made.get(model) or _equalize(model, alike_ratio)
    if made.model is not model:  # which would keep itself alive
        _made[model] = made
    return made


def comparable_float(float_model: Model, quantized: Model) -> Model:
    """The float model whose inner tensors a quantized file's can be compared with.

    That is the float model itself, or the same equalized where the file says that it was made so.
    """
    if not is_equalized(quantized) or is_equalized(float_model):
        return float_model
    return equalize(float_model).model


def equal_db(
    model: Model,
    equalized: Model,
    feeds: Iterable[Feed],
    *,
    progress: Progress = no_progress,
) -> Mapping[str, float]:
    """SQNR in dB of each output of the equalized model against the float model's, feeds pooled.

    Both with optimisations off. inf where they are the same; NaN and infinities at the same places
    do not count, at others give nan, as do values of another number. Outputs that are no numbers
    are left out.

    Args:
        model: the float model.
        equalized: the same equalized.
        feeds: at least one; values of states are taken as they are.
        progress: told after each sample.

    Raises:
        ModelError, RunError: the runtime refuses a model or a feed.
        QuantizationError: an output agrees less than `LEAST_DB`. Whole numbers (a class, a place in
            a list) turn over where two values are all but equal: they are judged where a model
            gives no others.
    """
    sessions = [open_session(each, optimized=False) for each in (model, equalized)]
    sums: dict[str, Array] = {}
    real: set[str] = set()
    for at, feed in enumerate(feeds):
        progress(0.0, f"checking the equalized model on sample {at + 1}")
        found = [session.run(feed) for session in sessions]
        for name, reference in found[0].items():
            real |= {name} if reference.dtype.kind == "f" else set()
            if reference.dtype.kind in "fiub":
                sums[name] = sums.get(name, np.zeros(2)) + _powers(reference, found[1][name])
    result = {name: decibels(*map(float, pair)) for name, pair in sums.items()}
    for name, db in result.items():
        if (name in real or not real) and not db >= LEAST_DB:
            raise QuantizationError(
                f"equalized, output {name!r} of {model.name} agrees with the float model's to "
                f"{db:.1f} dB only, expected {LEAST_DB:.0f} or more",
                hint="Leave equalization off (--no-equalize): this model's rounding is too coarse.",
            )
    return result


def _powers(reference: NDArray[Any], actual: NDArray[Any]) -> Array:
    a, b = (np.asarray(v, np.float64) for v in (reference, actual))
    if a.shape != b.shape:
        return np.full(2, np.nan)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    odd = ~np.isfinite(a) & same
    return powers(np.where(odd, 0.0, a), np.where(odd, 0.0, b))


def equalized_notes(made: Equalized) -> tuple[str, ...]:
    """What was equalized and what was not, in sentences."""
    if is_equalized(made.model) and not made.pairs:
        return ("the model was equalized before: it is quantized as it is",)
    reasons = [f"{each.node} {each.reason}" for each in made.skipped]
    more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    rest = f"; left as they are: {', '.join(reasons[:3])}{more}" if reasons else ""
    if not made.pairs:
        return (f"equalization is without effect: no two layers fit{rest}",)
    spread = max(made.pairs, key=lambda p: p.first_ratio_before / p.first_ratio_after)
    return (
        f"{len(made.pairs)} pairs of layers were equalized; the largest channel of {spread.first} "
        f"was {spread.first_ratio_before:.3g} times its smallest, now "
        f"{spread.first_ratio_after:.3g}{rest}",
    )


# -- the rewrite ---------------------------------------------------------------------------------


def _equalize(model: Model, alike_ratio: float) -> Equalized:
    if is_equalized(model):
        return Equalized(model=model, pairs=(), skipped=(), rounds=0)
    chains, skipped = _chains(model, alike_ratio)
    if not chains:
        return Equalized(model=model, pairs=(), skipped=skipped, rounds=0)
    before = [_ranges(chain) for chain in chains]
    rounds = _settle(chains)
    after = [_ranges(chain) for chain in chains]
    pairs = []
    for chain, (first, second), (first_now, second_now) in zip(chains, before, after, strict=True):
        live = (first > 0) & (second > 0)
        pairs.append(
            EqualizedPair(
                first=chain.first.node.name,
                second=chain.second.node.name,
                through=chain.through,
                channels=first.size,
                dead=int((~live).sum()),
                first_ratio_before=_ratio(first[live]),
                first_ratio_after=_ratio(first_now[live]),
                second_ratio_before=_ratio(second[live]),
                second_ratio_after=_ratio(second_now[live]),
                factors=tuple(map(float, chain.factors)),
            )
        )
    rewritten = _Rewriter(model)
    for chain in chains:
        for term in chain.terms:
            rewritten.divide(term, chain.factors)
    factors: dict[str, tuple[Array, Array]] = {}
    for chain in chains:
        for layer, place in ((chain.first, 0), (chain.second, 1)):
            ones = np.ones(layer.outputs), np.ones(layer.inputs)
            own = factors.setdefault(layer.node.name, ones)
            own[place][:] = 1 / chain.factors if place == 0 else chain.factors
    for name, (rows, columns) in factors.items():
        rewritten.weight(model.node_by_name[name], rows, columns)
    return Equalized(model=rewritten.model(), pairs=tuple(pairs), skipped=skipped, rounds=rounds)


def _alike(ranges: Array, ratio: float) -> bool:
    """The largest channel is at most so many times the one that nine tenths exceed."""
    return float(ranges.max() / np.percentile(ranges, 10)) <= ratio


def _ratio(ranges: Array) -> float:
    return float(ranges.max() / ranges.min())


def _ranges(chain: _Chain) -> tuple[Array, Array]:
    """The range of each channel between the layers, in the first and in the second."""
    first, second = chain.first.effective(), chain.second.effective()
    weights = first.max(axis=2).reshape(-1)
    # A channel of zeros is dead whatever its bias is.
    own = np.where(weights > 0, np.maximum(weights, chain.offset), 0.0)
    return own, second.max(axis=1).reshape(-1)


def _settle(chains: Sequence[_Chain]) -> int:
    """Finds all factors; the number of rounds. Changes the layers' sizes as it changes weights."""
    for chain in chains:
        chain.factors = np.ones(chain.first.outputs)
    for turn in range(1, _MOST_ROUNDS + 1):
        moved = 0.0
        for chain in chains:
            first, second = _ranges(chain)
            live = (first > 0) & (second > 0)
            step = np.ones(first.size)
            step[live] = np.sqrt(first[live] / second[live])
            chain.factors = chain.factors * step
            chain.offset = chain.offset / step
            sizes, behind = chain.first.sizes, chain.second.sizes
            sizes /= step.reshape(sizes.shape[:2])[:, :, None]
            behind *= step.reshape(behind.shape[0], 1, behind.shape[2])
            moved = max(moved, float(np.abs(np.log(step)).max(initial=0.0)))
        if moved < _SETTLED:
            return turn
    return _MOST_ROUNDS


class _Rewriter:
    """A copy of a model in which constants are replaced, each for one reader."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._proto = onnx.ModelProto()
        self._proto.CopyFrom(model.complete())
        graph = self._proto.graph
        self._initializers = {i.name: i for i in graph.initializer}
        self._nodes = dict(zip((n.name for n in model.nodes), graph.node, strict=True))
        self._taken = {*self._initializers, *(i.name for i in graph.input), *model.producers}
        self._outputs = {o.name for o in graph.output}

    def model(self) -> Model:
        # Shapes that the file states hold still; constants that got a shape are their own.
        mark = self._proto.metadata_props.add()
        mark.key, mark.value = MARK, MARK_VERSION
        return Model(self._proto, notes=self._model.notes)

    def weight(self, node: Node, rows: Array, columns: Array) -> None:
        """Multiplies a weight by a factor per output channel and one per input channel."""
        values = _value(self._model, node, 1)
        grouped = _grouped(node, values)
        shape = grouped.shape
        scaled = grouped * rows.reshape(shape[0], shape[1], 1, 1)
        scaled = scaled * columns.reshape(shape[0], 1, shape[2], 1)
        self._put(node, 1, _ungrouped(node, scaled, values.shape))

    def divide(self, term: _Term, factors: Array) -> None:
        values = _value(self._model, term.node, term.position)
        self._put(term.node, term.position, _divided(values, term.rank, factors))

    def _put(self, node: Node, position: int, values: Array) -> None:
        name = node.inputs[position]
        old = _value(self._model, node, position)
        tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(values.astype(old.dtype)), name)
        if values.shape == old.shape and self._alone(name):
            if name in self._initializers:
                self._initializers[name].CopyFrom(tensor)
                return
            maker = self._nodes[self._model.producers[name].name]
            del maker.attribute[:]
            maker.attribute.append(onnx.helper.make_attribute("value", tensor))
            return
        fresh = f"{name}_equalized"
        while fresh in self._taken:
            fresh += "_"
        self._taken.add(fresh)
        tensor.name = fresh
        self._proto.graph.initializer.append(tensor)
        self._nodes[node.name].input[position] = fresh

    def _alone(self, name: str) -> bool:
        """A constant that is stored as it is, and that nothing else reads."""
        return (
            name in self._model.constant_names
            and name not in self._outputs
            and _reads(self._model, name) == 1
        )


def _reads(model: Model, name: str) -> int:
    """How often a tensor is read in the main graph and in bodies."""
    nodes = model.consumers.get(name, ())
    return sum(n.inputs.count(name) + n.captured.count(name) for n in nodes)


def _value(model: Model, node: Node, position: int) -> NDArray[Any]:
    """A constant input that `_constant` accepted, in the dtype that the node reads."""
    value = constant_value(model, node.inputs[position])
    assert value is not None
    dtype = model.info(node.inputs[position]).dtype
    return value.astype(dtype) if dtype in _DTYPES else value


def _grouped(node: Node, weight: NDArray[Any]) -> Array:
    """A layer's weight as [group, output of the group, input of the group, tap]."""
    values = np.asarray(weight, np.float64)
    if node.op_type == "Gemm":
        values = values if node.attributes.get("transB", 0) else values.T
        return values[None, :, :, None]
    groups = int(node.attributes.get("group", 1))
    # A Conv holds [output, input of the group], a ConvTranspose [input, output of the group].
    shape = (groups, values.shape[0] // groups, values.shape[1], math.prod(values.shape[2:]))
    grouped = values.reshape(shape)
    return grouped.swapaxes(1, 2) if node.op_type == "ConvTranspose" else grouped


def _ungrouped(node: Node, grouped: Array, shape: tuple[int, ...]) -> Array:
    if node.op_type == "Gemm":
        values = grouped[0, :, :, 0]
        return values if node.attributes.get("transB", 0) else values.T
    if node.op_type == "ConvTranspose":
        grouped = grouped.swapaxes(1, 2)
    return grouped.reshape(shape)


def _divided(values: NDArray[Any], rank: int, factors: Array) -> Array:
    """A constant divided channel by channel; it grows where one value was for all channels."""
    real = np.asarray(values, np.float64)
    if not rank:
        return real / factors
    aligned = real.reshape((1,) * (rank - real.ndim) + real.shape)
    divided = aligned / factors.reshape((1, -1) + (1,) * (rank - 2))
    return divided.reshape(real.shape) if divided.size == real.size else divided


# -- which layers --------------------------------------------------------------------------------


def _chains(model: Model, alike_ratio: float) -> tuple[list[_Chain], tuple[NotEqualized, ...]]:
    layers: dict[str, _Layer] = {}
    unfit: dict[str, str] = {}
    for node in model.nodes:
        if node.op_type in _LAYERS and not node.domain:
            try:
                layers[node.name] = _layer(model, node)
            except _Left as left:
                unfit[node.name] = str(left)
    # First all gains: a layer is judged with what is folded into it, whichever side it is on.
    ways: dict[str, _Way | str] = {}
    for name, layer in layers.items():
        way = _Way(model, layer)
        try:
            way.go(layers, unfit)
            ways[name] = way
        except _Left as left:
            ways[name] = str(left)
    chains = []
    why = {**unfit, **{n: w for n, w in ways.items() if isinstance(w, str)}}
    for name, found in ways.items():
        if isinstance(found, str):
            continue
        chain = _Chain(
            first=layers[name],
            second=layers[found.end],
            through=tuple(found.through),
            terms=tuple(found.terms),
            offset=np.abs(found.offset),
        )
        first, second = _ranges(chain)
        live = (first > 0) & (second > 0)
        if live.sum() < 2:
            why[name] = "has fewer than two channels that are not dead"
        elif _alike(first[live], alike_ratio) and _alike(second[live], alike_ratio):
            why[name] = "has channels of much the same range"
        else:
            chains.append(chain)
    skipped = (NotEqualized(node=n.name, reason=why[n.name]) for n in model.nodes if n.name in why)
    return chains, tuple(skipped)


def _layer(model: Model, node: Node) -> _Layer:
    """A layer whose weight can be rescaled.

    Raises:
        _Left: it cannot.
    """
    weight = node.inputs[1] if len(node.inputs) > 1 else ""
    values = _constant(model, node, 1)
    if values is None:
        raise _Left("has a weight that is computed")
    if model.info(weight).dtype not in _DTYPES:
        raise _Left(f"has a weight of type {model.info(weight).dtype}")
    if _reads(model, weight) > 1 or weight in {o.name for o in model.outputs}:
        raise _Left("shares its weight with another node")
    if not values.size:
        raise _Left("has an empty weight")
    if not np.isfinite(values).all():
        raise _Left("has NaN or infinity in its weight")
    sizes = np.abs(_grouped(node, values)).max(axis=3)
    gain = np.full(sizes.shape[0] * sizes.shape[1], abs(float(node.attributes.get("alpha", 1.0))))
    return _Layer(node=node, sizes=sizes, gain=gain)


def _constant(model: Model, node: Node, position: int) -> NDArray[Any] | None:
    if position >= len(node.inputs) or not node.inputs[position]:
        return None
    return constant_value(model, node.inputs[position])


class _Way:
    """What a layer's channels go through, as far as their size can be taken out again.

    Args:
        model: the model.
        layer: where it begins; learns the gain of what is affine right behind it.
    """

    def __init__(self, model: Model, layer: _Layer) -> None:
        self._model = model
        self._layer = layer
        self.through: list[str] = []
        self.terms: list[_Term] = []
        self.end = ""
        self.offset = np.zeros(layer.outputs)
        kernel = model.info(layer.node.inputs[1]).shape
        self._rank = 2 if layer.node.op_type == "Gemm" else len(kernel or ())

    def go(self, layers: Mapping[str, _Layer], unfit: Mapping[str, str]) -> None:
        """Goes on to the next layer.

        Raises:
            _Left: there is none that the channels can be given to.
        """
        node = self._layer.node
        bias = node.inputs[2] if len(node.inputs) > 2 else ""
        if bias:
            self._term(node, 2, 2 if node.op_type == "Gemm" else 0)
            added = np.asarray(_value(self._model, node, 2), np.float64)
            if node.op_type == "Gemm":
                added = self._by_channel(added) * float(node.attributes.get("beta", 1.0))
            self.offset = added
        affine = True
        tensor = node.outputs[0]
        outputs = {o.name for o in self._model.outputs}
        while True:
            if tensor in outputs:
                raise _Left("gives an output of the model")
            readers = self._model.consumers.get(tensor, ())
            if len(readers) != 1:
                raise _Left(f"is read by {len(readers)} nodes")
            reader = readers[0]
            if reader.captured.count(tensor) or reader.inputs.count(tensor) != 1:
                raise _Left(f"is read more than once by {reader.op_type} {reader.name}")
            if reader.op_type in _LAYERS and not reader.domain:
                break
            affine = self._step(reader, tensor, affine)
            self.through.append(reader.name)
            tensor = reader.outputs[0]
        if reader.inputs[0] != tensor:
            raise _Left(f"gives a weight or bias of {reader.name}")
        if reader.name in unfit:
            raise _Left(f"is followed by {reader.name}, which {unfit[reader.name]}")
        if reader.op_type == "Gemm" and reader.attributes.get("transA", 0):
            raise _Left(f"is read transposed by {reader.name}")
        if layers[reader.name].inputs != self._layer.outputs:
            raise _Left(f"has other channels than {reader.name} reads")
        self.end = reader.name

    def _step(self, node: Node, tensor: str, affine: bool) -> bool:
        """Takes one node into the way; whether all so far can be folded into the layer.

        Raises:
            _Left: what the node computes does not grow with its input.
        """
        if any(node.outputs[1:]):
            raise _Left(f"is followed by {node.op_type} {node.name}, which has further outputs")
        at = node.inputs.index(tensor)
        if node.domain:
            pass
        elif node.op_type == "BatchNormalization" and at == 0:
            self._normalization(node, affine)
            return affine
        elif node.op_type in ("Add", "Sub", "Mul", "Div"):
            self._arithmetic(node, at, affine)
            return affine
        elif node.op_type in _HOMOGENEOUS and at == 0:
            return affine and node.op_type == "Identity"
        elif node.op_type == "Dropout" and at == 0 and not any(node.inputs[2:]):
            return affine
        elif node.op_type == "Clip":
            limits = self._limits(node)
            if all(limit == 0 or abs(limit) >= np.finfo(np.float32).max for limit in limits):
                return False
            raise _Left(
                f"is followed by Clip {node.name} with limits {limits[0]:g} and {limits[1]:g}, "
                "which would be other ones for every channel"
            )
        elif node.op_type == "Pad" and at == 0 and self._pads_zeros(node):
            return False
        raise _Left(f"is followed by {node.op_type} {node.name}, which does not scale with it")

    def _limits(self, node: Node) -> tuple[float, float]:
        given = [p for p in (1, 2) if p < len(node.inputs) and node.inputs[p]]
        if any(_constant(self._model, node, p) is None for p in given):
            raise _Left(f"is followed by Clip {node.name}, whose limits are computed")
        values = {p: _constant(self._model, node, p) for p in given}
        low, high = clip_limits(node, self._model)
        if 1 in values:
            low = float(np.asarray(values[1]).reshape(-1)[0])
        if 2 in values:
            high = float(np.asarray(values[2]).reshape(-1)[0])
        return low, high

    def _pads_zeros(self, node: Node) -> bool:
        """A Pad that leaves the channels alone and adds zeros, or copies of what is there."""
        if node.attributes.get("mode", "constant") == "constant":
            filled = node.attributes.get("value", 0.0)
            if len(node.inputs) > 2 and node.inputs[2]:
                filled = _constant(self._model, node, 2)
            if filled is None or np.asarray(filled).any():
                return False
        if len(node.inputs) > 3 and node.inputs[3]:
            return False
        pads = node.attributes.get("pads")
        if len(node.inputs) > 1:
            pads = _constant(self._model, node, 1)
        found = np.asarray(pads if pads is not None else ()).reshape(-1)
        return found.size == 2 * self._rank and not found[1] and not found[1 + self._rank]

    def _normalization(self, node: Node, affine: bool) -> None:
        trains = self._model.opset < 7 and not node.attributes.get("is_test", 0)
        trains = trains or bool(node.attributes.get("training_mode", 0))
        if trains or not node.attributes.get("spatial", 1):
            raise _Left(f"is followed by BatchNormalization {node.name} in training mode")
        scale, variance = (_constant(self._model, node, p) for p in (1, 4))
        channels = (self._layer.outputs,)
        if scale is None or variance is None or not scale.shape == variance.shape == channels:
            raise _Left(f"is followed by {node.name}, whose parameters are computed")
        for position in (2, 3):
            self._term(node, position, 0)
        epsilon = float(node.attributes.get("epsilon", 1e-5))
        gain = scale / np.sqrt(np.asarray(variance, np.float64) + epsilon)
        added, mean = (np.asarray(_value(self._model, node, p), np.float64) for p in (2, 3))
        self._scale(node, gain, affine)
        if affine:
            self.offset = self.offset + added - mean * gain

    def _arithmetic(self, node: Node, at: int, affine: bool) -> None:
        other = _constant(self._model, node, 1 - at)
        if "axis" in node.attributes:
            raise _Left(f"is given a constant along an axis of its own by {node.name}")
        if other is None:
            raise _Left(f"is joined with a computed tensor by {node.op_type} {node.name}")
        aligned = (1,) * (self._rank - other.ndim) + other.shape
        if len(aligned) != self._rank or aligned[1] not in (1, self._layer.outputs):
            raise _Left(f"is given another shape by {node.op_type} {node.name}")
        values = self._by_channel(other)
        if node.op_type in ("Add", "Sub"):
            self._term(node, 1 - at, self._rank)
            if affine:
                signs = {"Add": (1, 1), "Sub": (1, -1) if at == 0 else (-1, 1)}[node.op_type]
                self.offset = signs[0] * self.offset + signs[1] * values
            return
        if node.op_type == "Div" and at == 1:
            raise _Left(f"is divided by in {node.name}")
        with np.errstate(divide="ignore"):
            self._scale(node, values if node.op_type == "Mul" else 1 / values, affine)

    def _scale(self, node: Node, gain: Array, affine: bool) -> None:
        if not np.isfinite(gain).all():
            raise _Left(f"is scaled by NaN or infinity in {node.name}")
        if affine:
            self._layer.gain = self._layer.gain * np.abs(gain)
            self.offset = self.offset * gain

    def _by_channel(self, values: NDArray[Any]) -> Array:
        """One value per channel of a constant that is added or multiplied: the largest, absolute.

        Signs stay, so that what is added and subtracted again cancels.
        """
        real = np.asarray(values, np.float64)
        if real.ndim >= self._rank - 1:
            real = np.moveaxis(real, real.ndim - self._rank + 1, 0)
            real = real.reshape(real.shape[0], -1)
        else:
            real = real.reshape(1, -1)
        largest = np.take_along_axis(real, np.abs(real).argmax(axis=1)[:, None], axis=1)[:, 0]
        return np.broadcast_to(largest, (self._layer.outputs,))

    def _term(self, node: Node, position: int, rank: int) -> None:
        values = _constant(self._model, node, position)
        name = node.inputs[position]
        if values is None:
            raise _Left(f"gets {name}, which is computed, added in {node.name}")
        if self._model.info(name).dtype not in _DTYPES or not np.isfinite(values).all():
            raise _Left(f"gets {name}, which is not finite and float32, added in {node.name}")
        channels = self._layer.outputs
        fits = values.shape == (channels,) if not rank else values.ndim <= rank
        if rank and fits and values.ndim >= rank - 1:
            fits = values.shape[values.ndim - rank + 1] in (1, channels)
        if not fits:
            raise _Left(f"gets {name} of another shape added in {node.name}")
        self.terms.append(_Term(node=node, position=position, rank=rank))
