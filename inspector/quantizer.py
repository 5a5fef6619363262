"""ONNX Runtime's own QDQ quantizer with indexed look-ups, loaded once for many exclusion lists.

`quantize_static` loads the model, infers its shapes and scans all nodes and initializers at every
edit. Here the model is loaded once, edits go to an index, and what is known of a weight is kept.
Every decision is still ONNX Runtime's code: the file is the same to the byte, which the tests
check over the options. `plan` runs those decisions alone, without an edit, which is what a preview
needs.

It leans on names that ONNX Runtime does not promise to keep. `broken_contract` says which are not
as expected, and `quantize` then takes the public function.
"""

from __future__ import annotations

import copy
import gc
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, base_quantizer, qdq_quantizer, quant_utils
from onnxruntime.quantization.calibrate import TensorData, load_tensors_data
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.operators import matmul as matmul_operators
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quantize import check_static_quant_arguments, update_opset_version
from onnxruntime.quantization.tensor_quant_overrides import TensorQuantOverridesHelper

from inspector.calibration import METHODS, STATIC_OP_TYPES
from inspector.indexed_model import IndexedModel, LoadedModel, UneditedModel, find_by_name
from inspector.recipe import QuantConfig

# The versions whose internals were read and tested; others take the public route.
TESTED = "1.31"
# What is taken from ONNX Runtime beside its public functions.
_NAMES: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (base_quantizer, ("BaseQuantizer", "find_by_name")),
    (
        qdq_quantizer,
        ("QDQQuantizer", "CreateQDQQuantizer", "find_by_name", "quantize_onnx_initializer"),
    ),
    (matmul_operators, ("QDQMatMul", "find_by_name")),
    (quant_utils, ("load_model_with_shape_infer", "find_by_name")),
    (
        QDQQuantizer,
        (
            *("quantize_model", "calc_graph_quant_params", "adjust_tensor_ranges"),
            *("calc_quant_params", "_calc_initializer_quant_params", "remove_nodes"),
            *("_adjust_weight_scale_for_int32_bias", "_add_qdq_nodes_for_initializer"),
            *("_quantize_normal_tensors", "_quantize_sharing_param_tensors"),
            *("_quantize_bias_tensors", "should_quantize_node", "quantize_bias_tensor"),
            *("_is_tensor_quantizable", "_get_tensor_type"),
        ),
    ),
)


@lru_cache(maxsize=1)
def broken_contract() -> tuple[str, ...]:
    """What of ONNX Runtime's quantizer is not as this module expects; () where all is."""
    found = []
    if not str(onnxruntime.__version__).startswith(f"{TESTED}."):
        found.append(f"onnxruntime {onnxruntime.__version__} is installed, {TESTED} was tested")
    for owner, names in _NAMES:
        found += [f"{owner.__name__} has no {n}" for n in names if not hasattr(owner, n)]
    return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """The integer grid that a tensor is put on.

    Attributes:
        scale: float32 or float16, of shape () or (channels,).
        zero_point: of the integer type, of the same shape.
        axis: channel axis; None per tensor.
    """

    scale: NDArray[Any]
    zero_point: NDArray[Any]
    axis: int | None = None

    @property
    def dtype(self) -> str:
        """Name of the integer type."""
        return str(self.zero_point.dtype.name)

    def same(self, other: Grid) -> bool:
        """Whether both are equal to the bit."""
        return (
            self.axis == other.axis
            and self.zero_point.dtype == other.zero_point.dtype
            and self.scale.tobytes() == other.scale.tobytes()
            and self.zero_point.tobytes() == other.zero_point.tobytes()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What the quantizer would do with an exclusion list.

    Attributes:
        activations: grid by tensor that gets a Q/DQ pair.
        weights: grid by initializer that is stored in integers; all its readers read it so.
        biases: int32 grid by (node, initializer) for the biases; a node that is not named reads
            what `bias_readers` says.
        bias_readers: by initializer, the node whose grid all further readers share.
        folded: the Relu and Clip nodes that are removed, because Q does what they did.
        excluded: the names it was made for.
        shares: by activation that has the grid of another (what a Reshape or MaxPool hands on), the
            one whose range it follows from.
    """

    activations: Mapping[str, Grid]
    weights: Mapping[str, Grid]
    biases: Mapping[tuple[str, str], Grid]
    bias_readers: Mapping[str, str]
    folded: frozenset[str]
    excluded: frozenset[str]
    shares: Mapping[str, str]

    def grid_read(self, node: str, initializer: str) -> tuple[Grid | None, bool]:
        """The grid on which a node reads an initializer, and whether that is an int32 bias's.

        None where it reads the float values.
        """
        own = self.biases.get((node, initializer))
        if own is not None:
            return own, True
        weight = self.weights.get(initializer)
        if weight is not None:
            return weight, False
        if initializer in self.bias_readers:
            return self.biases[self.bias_readers[initializer], initializer], True
        return None, False


class UnplannableError(Exception):
    """The recipe asks for something whose decisions cannot be told without carrying it out."""


# -- ONNX Runtime's code over that model -------------------------------------------------------


@contextmanager
def _uncollected() -> Iterator[None]:
    """Keeps Python from looking for garbage: in a model's many small objects it looks in vain."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _with_globals(function: Callable[..., Any], changes: Mapping[str, Any]) -> Callable[..., Any]:
    """The same code with other global names, so that nothing of ONNX Runtime is patched."""
    own = types.FunctionType(
        function.__code__,
        {**function.__globals__, **changes},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def _rebound(owner: type, changes: Mapping[str, Any]) -> dict[str, Callable[..., Any]]:
    """The methods of a class and its bases that use one of these global names, over the changes."""
    found: dict[str, Callable[..., Any]] = {}
    for base in owner.__mro__:
        for name, value in vars(base).items():
            if name in found or not isinstance(value, types.FunctionType):
                continue
            if set(changes).intersection(value.__code__.co_names):
                found[name] = _with_globals(value, changes)
    return found


class _Kept:
    """What is known of weights and ranges, whatever the exclusion list.

    Attributes:
        ranges: the observed ranges, by identity.
        grids: parameters of an initializer by (name, kind, axis).
        stored: the integer tensor by (name, parameters).
        widened: the widened weight scale by what it is worked out from.
        activations: parameters by the identity of the range.
        made_grids: parameters that stay alive with their grid, by what tells them apart.
        quantizable, types: by tensor.
        store: makes the integer tensor, or gives the one that is kept.
    """

    def __init__(self, ranges: Mapping[str, TensorData]) -> None:
        self.ranges = {id(r): r for r in ranges.values()}
        self.grids: dict[tuple[Any, ...], Any] = {}
        self.stored: dict[tuple[Any, ...], onnx.TensorProto] = {}
        self.widened: dict[tuple[Any, ...], tuple[bool, NDArray[Any] | None]] = {}
        self.activations: dict[int, Any] = {}
        self.made_grids: dict[Any, tuple[Any, Grid]] = {}
        self.quantizable: dict[str, bool] = {}
        self.types: dict[str, Any] = {}
        self.store: Callable[..., onnx.TensorProto] = quant_utils.quantize_onnx_initializer

    def integers(self, weight: onnx.TensorProto, grid: Grid) -> NDArray[Any]:
        """A weight's integers, as the quantizer stores them."""
        quant_type = onnx.helper.np_dtype_to_tensor_dtype(grid.zero_point.dtype)
        stored = self.store(weight, quant_type, grid.zero_point, grid.scale, grid.axis)
        found: NDArray[Any] = numpy_helper.to_array(stored)
        return found


class _Decisions:
    """Over ONNX Runtime's quantizer: the indexed model, and results kept from list to list.

    The types that are ignored here are those of its other base, which ships none.
    """

    # Set by `Quantizer` on the class it makes.
    source: LoadedModel
    kept: _Kept
    base_ranges: Mapping[str, TensorData]

    def edited(self) -> Any:
        return IndexedModel(self.source)

    def calc_graph_quant_params(self) -> Any:
        # The first step of the constructor that looks anything up.
        self.model = self.edited()
        return super().calc_graph_quant_params()  # type: ignore[misc]

    def calc_quant_params(self, tensor_data: TensorData, quant_overrides: Any) -> Any:
        if quant_overrides or id(tensor_data) not in self.kept.ranges:
            return super().calc_quant_params(tensor_data, quant_overrides)  # type: ignore[misc]
        known = self.kept.activations
        if id(tensor_data) not in known:
            found = super().calc_quant_params(tensor_data, quant_overrides)  # type: ignore[misc]
            known[id(tensor_data)] = found
        return known[id(tensor_data)]

    def _calc_initializer_quant_params(self) -> dict[str, Any]:
        everything: dict[str, Any] = self.tensors_to_quantize  # type: ignore[has-type]
        overrides = self.tensor_quant_overrides  # type: ignore[attr-defined]
        found = {}
        for name, info in everything.items():
            key: tuple[Any, ...] = (name, info.tensor_type, info.axis)
            if name in overrides:
                key = (*key, repr(overrides[name]))
            if key not in self.kept.grids:
                if find_by_name(name, self.model.initializer()) is None:
                    continue
                self.tensors_to_quantize = {name: info}
                own = super()._calc_initializer_quant_params()  # type: ignore[misc]
                self.kept.grids[key] = own.get(name)
            params = self.kept.grids[key]
            if params is not None:
                # Its scale may be replaced to make room for a bias.
                found[name] = type(params)(**params.data)
        self.tensors_to_quantize = everything
        return found

    def _adjust_weight_scale_for_int32_bias(
        self,
        input_scale: NDArray[Any],
        weight_scale: NDArray[Any],
        weight_name: str,
        bias_tp: onnx.TensorProto,
        is_per_channel: bool,
    ) -> tuple[bool, NDArray[Any] | None]:
        key = (
            *(weight_name, bias_tp.name, is_per_channel),
            *(input_scale.tobytes(), weight_scale.tobytes()),
        )
        if key not in self.kept.widened:
            adjust = super()._adjust_weight_scale_for_int32_bias  # type: ignore[misc]
            widened, scale = adjust(
                input_scale, weight_scale.copy(), weight_name, bias_tp, is_per_channel
            )
            self.kept.widened[key] = (bool(widened), scale)
        widened, scale = self.kept.widened[key]
        return widened, None if scale is None else scale.copy()


class _WithoutEdits:
    """Over the quantizer: decides everything and carries out nothing.

    The types that are ignored here are those of its other base, which ships none.
    """

    source: LoadedModel
    kept: _Kept
    plan: Plan

    def edited(self) -> Any:
        return UneditedModel(self.source)

    def remove_nodes(self) -> None:
        """Nothing is removed."""

    def _is_tensor_quantizable(self, name: str) -> bool:
        known = self.kept.quantizable
        if name not in known:
            known[name] = super()._is_tensor_quantizable(name)  # type: ignore[misc]
        return known[name]

    def _get_tensor_type(self, name: str) -> Any:
        known = self.kept.types
        if name not in known:
            known[name] = super()._get_tensor_type(name)  # type: ignore[misc]
        return known[name]

    def _quantize_normal_tensors(self) -> None:
        self.activations: dict[str, Grid] = {}
        self.weights: dict[str, Grid] = {}
        self.shared: dict[str, Any] = {}
        for name, info in self.tensors_to_quantize.items():  # type: ignore[attr-defined]
            if info.is_shared:
                self.shared[name] = info.quant_para_provider
            elif find_by_name(name, self.model.initializer()) is not None:  # type: ignore[attr-defined]
                params = self.initializer_quant_params[name]  # type: ignore[attr-defined]
                self.weights[name] = self._grid(params, (name, params["scale"].tobytes()))
            elif name not in self.tensor_to_producing_dq:  # type: ignore[attr-defined]
                params = self.quantization_params.get(name)  # type: ignore[attr-defined]
                if params is None:
                    raise ValueError(f"no range was observed for tensor {name}")
                if params.converted is not None:
                    raise UnplannableError(f"{name} changes its type between two nodes")
                self.activations[name] = self._grid(params.original, id(params.original))

    def _grid(self, params: Any, key: Any) -> Grid:
        """The grid of parameters; one for each key, which holds the parameters it is made of."""
        known = self.kept.made_grids.get(key)
        if known is None:
            known = self.kept.made_grids[key] = (params, _grid(params))
        return known[1]

    def _quantize_sharing_param_tensors(self) -> None:
        waiting = dict(self.shared)
        self.shares: dict[str, str] = {}
        while waiting:
            ready = {}
            for name, provider in waiting.items():
                source = provider.input_name
                grid = self.activations.get(source) or self.weights.get(source)
                if grid is not None:
                    ready[name] = grid
                    self.shares[name] = self.shares.get(source, source)
            if not ready:
                raise UnplannableError(f"{next(iter(waiting))} shares the grid of no other tensor")
            self.activations.update(ready)
            waiting = {n: p for n, p in waiting.items() if n not in ready}

    def _quantize_bias_tensors(self) -> None:
        model: UneditedModel = self.model  # type: ignore[attr-defined]
        copies = {new: old for (_, old), new in model.bias_of_node.items()}
        biases: dict[tuple[str, str], Grid] = {}
        readers: dict[str, str] = {}
        for name, info in self.bias_to_quantize.items():  # type: ignore[attr-defined]
            if name in self.weights or name in self.activations:
                continue
            weight_scale = self._scale_of(info.weight_name)
            input_scale = self._scale_of(info.input_name)
            scale = input_scale * weight_scale * info.beta
            proto = model.get_initializer(name)
            assert proto is not None
            if scale.size > 1 and list(scale.shape) != list(proto.dims):
                raise ValueError(f"bias {name} of shape {list(proto.dims)} has {scale.size} scales")
            stored = np.asarray(
                scale, onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
            ).reshape(-1)
            grid = Grid(
                scale=stored,
                zero_point=np.zeros(stored.shape, np.int32),
                axis=0 if stored.size > 1 else None,
            )
            original = copies.get(name, name)
            biases[info.node_name, original] = grid
            if original == name:
                readers[name] = info.node_name
        self.plan = Plan(
            activations=self.activations,
            weights=self.weights,
            biases=biases,
            bias_readers=readers,
            folded=frozenset(n.name for n in self.nodes_to_remove),  # type: ignore[attr-defined]
            excluded=frozenset(self.nodes_to_exclude),  # type: ignore[attr-defined]
            shares=self.shares,
        )

    def _scale_of(self, name: str) -> NDArray[Any]:
        grid = self.weights.get(name) or self.activations.get(name)
        if grid is not None:
            return grid.scale
        maker = self.tensor_to_producing_dq.get(name)  # type: ignore[attr-defined]
        proto = None if maker is None else self.source.by_name.find(maker.input[1])
        if proto is None:
            raise ValueError(f"tensor {name} has no scale to quantize a bias with")
        return np.asarray(numpy_helper.to_array(proto))


def _grid(params: Any) -> Grid:
    if params.get("block_size", 0):
        raise UnplannableError("weights have a scale per block")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(params["quant_type"])
    return Grid(
        scale=np.asarray(params["scale"]),
        zero_point=np.asarray(params["zero_point"]).astype(dtype),
        axis=params.get("axis"),
    )


# -- the public side ---------------------------------------------------------------------------


class Quantizer:
    """A prepared model, loaded once, to be quantized with many exclusion lists.

    Args:
        path: the prepared model's file; a private copy, because ONNX Runtime writes beside it.
        config: a recipe of format "qdq".
        ranges: what `calibrate` observed, as a file.
        options: ONNX Runtime's `extra_options` for the recipe.
        only: nodes to quantize; all where empty.

    Raises:
        UnplannableError: the recipe is not of format "qdq", or this ONNX Runtime is not as
            `broken_contract` wants it.
    """

    def __init__(
        self,
        path: Path,
        config: QuantConfig,
        ranges: Path,
        *,
        options: Mapping[str, Any],
        only: Sequence[str] = (),
    ) -> None:
        if config.format != "qdq":
            raise UnplannableError(f"format {config.format} has no in-memory route")
        broken = broken_contract()
        if broken:
            raise UnplannableError(broken[0])
        self.config = config
        self._options = dict(options)
        self._only = frozenset(only)
        self._types = tuple(
            QuantType.from_string(f"Q{t.replace('u', 'U').replace('int', 'Int')}")
            for t in (config.weight_type, config.activation_type)
        )
        weight_type, activation_type = self._types
        check_static_quant_arguments(quant_utils.QuantFormat.QDQ, activation_type, weight_type)
        model = quant_utils.load_model_with_shape_infer(path)
        model = update_opset_version(
            model,
            weight_type,
            activation_type,
            tensor_quant_overrides=self._options.get("TensorQuantOverrides"),
            block_size=0,
        )
        observed = load_tensors_data(ranges)
        if observed.calibration_method != METHODS[config.method]:
            raise ValueError(
                f"the ranges are of method {observed.calibration_method}, expected {config.method}"
            )
        self._ranges: dict[str, TensorData] = dict(observed.items())
        self._op_types = frozenset(config.op_types or STATIC_OP_TYPES)
        self.source = LoadedModel(model)
        self._kept = _Kept(self._ranges)
        self._quantizer, planner = _classes(self.source, self._kept)
        self._planner = self._made(planner, (), self._options)

    def _made(self, kind: type, exclude: Iterable[str], options: Mapping[str, Any]) -> Any:
        weight_type, activation_type = self._types
        return kind(
            self.source.model,
            self.config.per_channel,
            self.config.reduce_range,
            weight_type,
            activation_type,
            dict(self._ranges),
            self._only,
            frozenset(exclude),
            self._op_types,
            dict(options),
        )

    def quantize(
        self, exclude: Iterable[str] = (), *, keep_rectifiers: bool = False
    ) -> onnx.ModelProto:
        """The quantized model, as `quantize_static` would write it.

        Args:
            exclude: nodes of the prepared model to leave in float.
            keep_rectifiers: do not fold Relu and Clip into the quantization of what they read
                (ONNX Runtime's `QDQKeepRemovableActivations`).
        """
        options = {**self._options, "QDQKeepRemovableActivations": True}
        with _uncollected():
            made = self._made(
                self._quantizer, exclude, options if keep_rectifiers else self._options
            )
            made.quantize_model()
            result: onnx.ModelProto = made.model.model
            ONNXModel(result).topological_sort()
        return result

    def plan(
        self,
        exclude: Iterable[str] = (),
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> Plan:
        """What `quantize` would do with a list, decided and not carried out.

        Args:
            exclude: nodes of the prepared model to leave in float.
            overrides: ONNX Runtime's entries of `TensorQuantOverrides` by activation, in addition
                to those of the recipe.

        Raises:
            UnplannableError: the recipe asks for what cannot be told beforehand.
            ValueError: ONNX Runtime's quantizer would refuse it.
        """
        made = copy.copy(self._planner)
        made.nodes_to_exclude = frozenset(exclude)
        made.tensors_range = dict(self._ranges)
        made.tensors_to_quantize = {}
        made.bias_to_quantize = {}
        made.nodes_to_remove = []
        made.tensor_to_its_receiving_nodes = {}
        made.tensor_to_producing_dq = {}
        made.quantized_value_map = {}
        made.initializer_quant_params = {}
        if overrides:
            known = self._options.get("TensorQuantOverrides", {})
            entries = {**known, **{name: [dict(entry)] for name, entry in overrides.items()}}
            made.tensor_quant_overrides = TensorQuantOverridesHelper(entries)
            fine, why = made.tensor_quant_overrides.is_valid(
                made.initializers, made.value_infos.keys(), self._types[1]
            )
            if not fine:
                raise ValueError(why)
        made.quantization_params = made.calc_graph_quant_params()
        made.quantize_model()
        plan: Plan = made.plan
        return plan

    @property
    def names_in_bodies(self) -> frozenset[str]:
        """Tensors that bodies of If, Loop and Scan read, whichever graph they are of."""
        return self.source.names_in_bodies

    @property
    def nodes(self) -> Mapping[str, onnx.NodeProto]:
        """The float model's nodes by name.

        Raises:
            UnplannableError: two nodes share a name, or one has none.
        """
        found = {node.name: node for node in self.source.nodes}
        if len(found) != len(self.source.nodes) or "" in found:
            raise UnplannableError("nodes without a name of their own cannot be told apart")
        return found

    def initializer(self, name: str) -> onnx.TensorProto:
        """The float model's initializer of a name."""
        found = self.source.by_name.find(name)
        if found is None:
            raise UnplannableError(f"{name} is no initializer of the float model")
        return found

    def values(self, name: str, grid: Grid | None) -> NDArray[Any]:
        """A weight as its readers get it: as stored on a grid, or in float where it has none."""
        proto = self.initializer(name)
        real: NDArray[Any] = numpy_helper.to_array(proto)
        if grid is None:
            return real
        stored = self._kept.integers(proto, grid)
        scale, zero_point = grid.scale, grid.zero_point.astype(np.int32)
        if grid.axis is not None:
            shape = [1] * real.ndim
            shape[grid.axis] = -1
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        found: NDArray[Any] = (stored.astype(np.int32) - zero_point).astype(scale.dtype) * scale
        return found

    def bias_values(self, name: str, grid: Grid) -> NDArray[Any]:
        """A bias as its node gets it: int32 steps of the grid's scale."""
        real = numpy_helper.to_array(self.initializer(name))
        limits = np.iinfo(np.int32)
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = (real.astype(np.float64) / grid.scale.astype(np.float64)).round()
            stored = np.clip(steps, limits.min, limits.max).astype(np.int32)
        found: NDArray[Any] = stored.astype(grid.scale.dtype) * grid.scale
        return found


def _classes(source: LoadedModel, kept: _Kept) -> tuple[type, type]:
    """The quantizer and the planner over one model."""

    def stored(
        weight: onnx.TensorProto,
        quant_type: int,
        zero_point: NDArray[Any],
        scale: NDArray[Any],
        axis: int | None = None,
        quant_weight_name: str | None = None,
        block_size: int = 0,
    ) -> onnx.TensorProto:
        key = (
            *(weight.name, quant_type, axis, quant_weight_name, block_size),
            *(zero_point.tobytes(), scale.tobytes()),
        )
        if key not in kept.stored:
            kept.stored[key] = qdq_quantizer.quantize_onnx_initializer(
                weight, quant_type, zero_point, scale, axis, quant_weight_name, block_size
            )
        return kept.stored[key]

    kept.store = stored

    lookups = {"find_by_name": find_by_name}
    matmul = type("QDQMatMul", (matmul_operators.QDQMatMul,),
                  _rebound(matmul_operators.QDQMatMul, lookups))  # fmt: skip

    def create(quantizer: Any, node: onnx.NodeProto) -> Any:
        kind = matmul if node.op_type == "MatMul" else None
        return kind(quantizer, node) if kind else qdq_quantizer.CreateQDQQuantizer(quantizer, node)

    changes = {**lookups, "CreateQDQQuantizer": create, "quantize_onnx_initializer": stored}
    shared = {"source": source, "kept": kept}
    indexed = type("Indexed", (QDQQuantizer,), _rebound(QDQQuantizer, changes))
    quantizer = type("IndexedQuantizer", (_Decisions, indexed), shared)
    return quantizer, type("Planner", (_WithoutEdits, quantizer), {})
