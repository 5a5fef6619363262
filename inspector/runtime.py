"""The one door to running a model.

Two kinds of session: *simulated* (optimisations off, what is debugged: every node runs as
written) and *deployed* (all optimisations on, the kernels that ship). Both run on the CPU unless
another execution provider is named; no custom-op libraries.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import EncodeError
from numpy.typing import NDArray
from onnx import TensorProto
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from inspector.errors import InspectorError, ModelError, RunError
from inspector.model import Model, shown
from inspector.model_files import load_model

ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    ort_errors.EPFail,
    ort_errors.NoSuchFile,
    ort_errors.NotFound,
    ort_errors.EngineError,
)
# What its binding to Python raises beside them: RuntimeError for values it cannot carry, ValueError
# (UnicodeError is one) for names and strings, MemoryError where the machine has no more.
_BINDING_ERRORS = (RuntimeError, ValueError, MemoryError)
CPU = "CPUExecutionProvider"

# Types that the runtime computes with and its binding cannot hand to numpy (float8e4m3fn comes as
# bare codes): what they are cast to inside the graph, and the ai.onnx opset that can cast them.
_CASTS: dict[str, tuple[int, int]] = {
    "tensor(bfloat16)": (TensorProto.FLOAT, 13),
    **dict.fromkeys(
        (
            *("tensor(float8e4m3fn)", "tensor(float8e4m3fnuz)"),
            *("tensor(float8e5m2)", "tensor(float8e5m2fnuz)"),
        ),
        (TensorProto.FLOAT, 19),
    ),
    "tensor(float8e8m0)": (TensorProto.FLOAT, 24),
    "tensor(int4)": (TensorProto.INT8, 21),
    "tensor(uint4)": (TensorProto.UINT8, 21),
    "tensor(int2)": (TensorProto.INT8, 25),
    "tensor(uint2)": (TensorProto.UINT8, 25),
}
_CARRIED = frozenset(
    f"tensor({name})"
    for name in (
        *("float", "float16", "double", "bool", "string"),
        *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    )
)
_KINDS: dict[np.dtype[Any], str] = {
    np.dtype(np.float32): "tensor(float)",
    np.dtype(np.float64): "tensor(double)",
    **{np.dtype(n): f"tensor({n})" for n in ("float16", "int8", "uint8", "int16", "uint16")},
}
# How arrays of types that numpy lacks are handed over: their codes, and ONNX's number of the type.
_CODED_FEEDS: dict[str, tuple[type[np.generic], int]] = {
    "bfloat16": (np.uint16, TensorProto.BFLOAT16),
    "float8_e4m3fn": (np.uint8, TensorProto.FLOAT8E4M3FN),
    "float8_e4m3fnuz": (np.uint8, TensorProto.FLOAT8E4M3FNUZ),
    "float8_e5m2": (np.uint8, TensorProto.FLOAT8E5M2),
    "float8_e5m2fnuz": (np.uint8, TensorProto.FLOAT8E5M2FNUZ),
}
ort.set_default_logger_severity(4)
# For a program that imported it before this package; see there.
ort.disable_telemetry_events()

Feed = Mapping[str, NDArray[Any]]

# Called by long work with the finished share (0..1) and what it is doing; raises `Cancelled`
# when its owner asked to stop.
Progress = Callable[[float, str], None]


def no_progress(_fraction: float, _message: str) -> None:
    """A `Progress` that shows nothing and never stops."""


THREADS_VARIABLE = "QUANT_INSPECTOR_THREADS"


def chosen_threads() -> int | None:
    """How many intra-op threads `$QUANT_INSPECTOR_THREADS` asks for; None for the runtime's choice.

    Raises:
        RunError: it is not a whole number from 1 on.
    """
    chosen = os.environ.get(THREADS_VARIABLE, "")
    if not chosen:
        return None
    if not chosen.isascii() or not chosen.isdigit() or int(chosen) < 1:
        raise RunError(
            f"{THREADS_VARIABLE} is {shown(chosen)}, expected a whole number from 1 on",
            hint=f"Set {THREADS_VARIABLE}=1, or unset it.",
        )
    return int(chosen)


def runtime_version() -> str:
    """The installed version of ONNX Runtime."""
    return str(ort.__version__)


def _words(error: Exception) -> str:
    """An error's text on one line; names in it may be of any length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 1000 else f"{text[:999]}…"


def _refused(what: str, error: Exception) -> InspectorError:
    text = _words(error)
    if isinstance(error, MemoryError) or "bad_alloc" in text:
        return RunError(
            f"this machine has not enough memory to open {what}",
            hint="Close other programs, or use a machine with more memory.",
        )
    if "is not a registered function/op" in text or "Unrecognized" in text or "custom op" in text:
        return ModelError(
            f"{what} uses an operator that ONNX Runtime {ort.__version__} does not have: {text}",
            hint="Export the model with standard operators; custom-op libraries are not loaded.",
        )
    return RunError(
        f"ONNX Runtime {ort.__version__} refuses {what}: {text}",
        hint="Check the file with `check-model FILE`, which comes with onnx, or export it again.",
    )


def part_of(progress: Progress, start: float, stop: float) -> Progress:
    """A `Progress` for one step of a longer work, which it fills from `start` to `stop`."""

    def report(fraction: float, message: str) -> None:
        progress(start + (stop - start) * min(max(fraction, 0.0), 1.0), message)

    return report


class Session:
    """A model ready to run.

    Attributes:
        name: the model's name, for messages.
        input_names: inputs a feed must give.
        output_names: the outputs that `run` can give, in order.
        output_dtypes: ONNX Runtime's type of each of them in the model, e.g. ``"tensor(float)"``.
            Arrays of bfloat16 and float8 come as float32, those of 4 and 2 bits as 8-bit integers.
        unreadable: type by name of outputs that are no array (sequences, optional values, maps) or
            of a type that cannot be read here.
        providers: the execution providers it runs on, the preferred first.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        name: str,
        *,
        dtypes: Mapping[str, str] | None = None,
        casts: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            session: an open session.
            name: for messages.
            dtypes: type by name of the outputs to offer, all of the session's by default.
            casts: for outputs that are cast, the name of the one that carries their values.
        """
        self._session = session
        self._casts = dict(casts or {})
        self.name = name
        self.input_names = tuple(i.name for i in session.get_inputs())
        self.providers = tuple(str(p) for p in session.get_providers())
        offered = dict(dtypes or {o.name: str(o.type) for o in session.get_outputs()})
        self.output_dtypes = {
            n: kind for n, kind in offered.items() if kind in _CARRIED or n in self._casts
        }
        self.output_names = tuple(self.output_dtypes)
        self.unreadable = {n: kind for n, kind in offered.items() if n not in self.output_dtypes}

    def run(
        self, feed: Feed, outputs: Iterable[str] | None = None, *, sample: str = "a feed"
    ) -> dict[str, NDArray[Any]]:
        """The outputs by name for one feed.

        Args:
            feed: arrays by input name, of any shape; entries for inputs this model does not have
                are left out.
            outputs: names wanted, all by default.
            sample: the feed's name, for messages.

        Raises:
            RunError: the runtime refused the feed, or an output that cannot be read was asked for.
        """
        names = self._readable(outputs)
        if not names:
            return {}  # ONNX Runtime would take no name for all names
        try:
            given = {k: _feedable(v) for k, v in feed.items() if k in self.input_names}
            values = self._session.run([self._casts.get(n, n) for n in names], given)
        except (*ORT_ERRORS, *_BINDING_ERRORS) as error:
            raise self._failed(sample, error) from error
        return dict(zip(names, values, strict=True))

    def run_values(
        self,
        feed: Mapping[str, Any],
        outputs: Iterable[str] | None = None,
        *,
        sample: str = "a feed",
    ) -> dict[str, Any]:
        """The outputs by name where the runtime has put them; as `run` otherwise.

        Values in `feed` may be where the runtime has put them, too.

        Arrays where the feed holds strings, which cannot be handed over without a copy.

        Raises:
            RunError: the runtime refused the feed, or an output that cannot be read was asked for.
        """
        names = self._readable(outputs)
        if not names:
            return {}
        arrays = [v for n, v in feed.items() if n in self.input_names and isinstance(v, np.ndarray)]
        if any(v.dtype.kind in "OUS" for v in arrays):
            return self.run(feed, names, sample=sample)
        try:
            given = {}
            for name, array in feed.items():
                if name in self.input_names:
                    value = _feedable(array)
                    if not isinstance(value, ort.OrtValue):
                        # It reads the memory of an array as if its elements lay in a row.
                        value = np.require(value, requirements="C")
                        value = ort.OrtValue.ortvalue_from_numpy(value)
                    given[name] = value
            wanted = [self._casts.get(n, n) for n in names]
            values = self._session.run_with_ort_values(wanted, given)
        except (*ORT_ERRORS, *_BINDING_ERRORS) as error:
            raise self._failed(sample, error) from error
        return dict(zip(names, values, strict=True))

    def _readable(self, outputs: Iterable[str] | None) -> list[str]:
        names = list(self.output_names if outputs is None else outputs)
        for name in names:
            if name in self.unreadable:
                raise RunError(
                    f"output {shown(name)} of {self.name} is a {self.unreadable[name]}, "
                    "expected a tensor of numbers or strings",
                    hint="Leave this output out.",
                )
        return names

    def _failed(self, sample: str, error: Exception) -> RunError:
        return refused_feed(self.name, sample, error)


@dataclass(frozen=True, slots=True)
class Codes:
    """Where a tensor is held as the 8-bit codes that its DequantizeLinear reads, per tensor.

    Attributes:
        tensor: the codes.
        scale: float32, shape ().
        zero_point: of the codes' type, shape ().
    """

    tensor: str
    scale: NDArray[np.float32]
    zero_point: NDArray[Any]

    def values(self, codes: NDArray[Any]) -> NDArray[np.float32]:
        """What DequantizeLinear makes of them, bit for bit."""
        steps = codes.astype(np.int32) - self.zero_point.astype(np.int32)
        return np.asarray(steps.astype(np.float32) * self.scale)


class Tensors(Mapping[str, NDArray[Any]]):
    """Tensors of one run by name, each of which becomes an array only when it is asked for.

    Args:
        values: as the runtime holds them, or arrays.
        coded: further ones that are held as codes among `values`.
    """

    def __init__(
        self,
        values: Mapping[str, ort.OrtValue | NDArray[Any]],
        coded: Mapping[str, Codes] | None = None,
    ) -> None:
        self._values = dict(values)
        self._coded = dict(coded or {})

    def __getitem__(self, name: str) -> NDArray[Any]:
        value = self.held(name)
        if isinstance(value, ort.OrtValue):
            value = value.numpy()
            self._values[name] = value
        return value

    def __iter__(self) -> Iterator[str]:
        yield from self._values
        yield from (n for n in self._coded if n not in self._values)

    def __len__(self) -> int:
        return len(self._values.keys() | self._coded.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._coded

    def held(self, name: str) -> ort.OrtValue | NDArray[Any]:
        """A tensor as it is held; one that is held as codes is dequantized."""
        if name in self._coded and name not in self._values:
            codes = self._coded[name]
            self._values[name] = codes.values(self[codes.tensor])
        return self._values[name]

    def codes_of(self, name: str) -> Codes | None:
        """What a tensor is held as; None where it is held as it is."""
        return None if name in self._values else self._coded.get(name)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        codes = self.codes_of(name)
        value = self._values[name if codes is None else codes.tensor]
        return tuple(value.shape() if isinstance(value, ort.OrtValue) else value.shape)

    def kind_of(self, name: str) -> str:
        """ONNX Runtime's type of a tensor; "" for an array it would not take as it is."""
        value = self.held(name)
        if isinstance(value, ort.OrtValue):
            return str(value.data_type())
        return _KINDS.get(value.dtype, "") if value.dtype.isnative else ""

    def keep(self, names: Container[str]) -> None:
        """Lets go of all others."""
        self._coded = {n: c for n, c in self._coded.items() if n in names}
        codes = {c.tensor for c in self._coded.values()}
        self._values = {n: v for n, v in self._values.items() if n in names or n in codes}


def _feedable(value: NDArray[Any]) -> Any:
    """An array as ONNX Runtime's binding takes it.

    Raises:
        ValueError: its bytes would be read as something else.
    """
    array = np.asarray(value) if isinstance(value, np.generic) else value
    if not isinstance(array, np.ndarray):
        return array
    if array.dtype.name in _CODED_FEEDS:
        codes, number = _CODED_FEEDS[array.dtype.name]
        held = np.ascontiguousarray(array).view(codes).reshape(array.shape)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(held, number)
    if array.dtype.kind == "S":
        # The binding reads these beyond their end.
        return np.char.decode(array, "utf-8")
    if array.dtype.kind == "V":
        raise ValueError(f"an array of type {array.dtype} is neither numbers nor strings")
    # It ignores the order of bytes.
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _more_outputs(
    proto: onnx.ModelProto, outputs: Iterable[str], casts: Mapping[str, tuple[str, int]]
) -> bytes:
    """What a serialized model is followed by to have more outputs.

    Protobuf merges what is written one after the other, which saves copying the model.

    Args:
        proto: the model.
        outputs: tensors to make outputs.
        casts: by tensor, the output that its cast values get and ONNX's number of their type.
    """
    have = {o.name for o in proto.graph.output}
    extra = onnx.ModelProto()
    for name in outputs:
        if name not in have:
            extra.graph.output.add(name=name)
    for name, (output, number) in casts.items():
        extra.graph.node.append(onnx.helper.make_node("Cast", [name], [output], output, to=number))
        extra.graph.output.add(name=output)
    return bytes(extra.SerializePartialToString())


def available_providers() -> tuple[str, ...]:
    """Execution providers of the installed ONNX Runtime, the fastest first."""
    return tuple(ort.get_available_providers())


def open_session(
    model: Model | onnx.ModelProto | Path,
    *,
    optimized: bool,
    name: str = "the model",
    threads: int | None = None,
    provider: str = CPU,
    disabled_transformers: Sequence[str] = (),
    outputs: Sequence[str] = (),
) -> Session:
    """A session on one execution provider, with the CPU for what that cannot run.

    Weights that a `Model` left on disk are mapped by the runtime. A simulated session of such a
    model computes with them in place; a deployed one packs them for its kernels, which takes about
    their size in memory, as it does where it ships.

    Args:
        model: a loaded model, a proto, or the path of a file.
        optimized: all graph optimisations (deployed) or none (simulated).
        name: for messages, where `model` has none of its own.
        threads: intra-op threads; None for those of `chosen_threads`.
        provider: ONNX Runtime's name of the execution provider.
        disabled_transformers: names of graph transformers to leave out of the optimisations.
        outputs: tensors of the main graph to give as outputs beside the model's own.

    Raises:
        ModelError: an operator the runtime does not have.
        RunError: the runtime refused the model, or does not have or cannot load the provider.
        ValueError: the main graph has no tensor of a name in `outputs`.
    """
    available = available_providers()
    if provider not in available:
        raise RunError(
            f"this installation of ONNX Runtime has no {shown(provider)}; it has "
            f"{', '.join(available)}",
            hint=f"Use one of these, for example --provider {CPU}.",
        )
    if isinstance(model, Path):
        model = load_model(model)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if not optimized:
        # Between the runs of a comparison numpy works: idle threads that spin would slow it down.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    threads = chosen_threads() if threads is None else threads
    if threads is not None:
        options.intra_op_num_threads = threads
    if isinstance(model, Model):
        name = model.name
        if model.external and model.path is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path",
                str(model.path.parent.resolve()),
            )
            if not optimized:
                # Packing would copy every weight into memory.
                options.add_session_config_entry("session.disable_prepacking", "1")
    proto = model.proto if isinstance(model, Model) else model
    wanted = tuple(dict.fromkeys(outputs))
    if wanted:
        known = {t for n in proto.graph.node for t in n.output}
        known.update(v.name for v in (*proto.graph.input, *proto.graph.initializer))
        for tensor in wanted:
            if not tensor or tensor not in known:
                raise ValueError(f"{name} has no tensor {shown(tensor)} in its main graph")

    def opened(casts: Mapping[str, tuple[str, int]]) -> ort.InferenceSession:
        try:
            session = ort.InferenceSession(
                proto.SerializeToString() + _more_outputs(proto, wanted, casts),
                options,
                providers=list(dict.fromkeys((provider, CPU))),
                disabled_optimizers=list(disabled_transformers) or None,
                # A fallback prints to the terminal and hides that another provider is used.
                enable_fallback=0,
            )
        except EncodeError as error:
            raise RunError(
                f"{name} is larger than the 2 GB that one protobuf holds",
                hint="Load it from a file with external data.",
            ) from error
        except (*ORT_ERRORS, *_BINDING_ERRORS) as error:
            raise _refused(name, error) from error
        session.disable_fallback()
        _check_provider(provider, session.get_providers())
        return session

    session = opened({})
    dtypes = {o.name: str(o.type) for o in session.get_outputs()}
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=1)
    taken = (
        {t for n in proto.graph.node for t in n.output} if set(dtypes.values()) - _CARRIED else ()
    )
    casts: dict[str, tuple[str, int]] = {}
    for tensor, kind in dtypes.items():
        number, since = _CASTS.get(kind, (0, 0))
        if number and opset >= since:
            output = f"{tensor}_readable"
            while output in taken:
                output += "_"
            casts[tensor] = (output, number)
    if casts:
        del session  # before the next one takes as much memory
        session = opened(casts)
    return Session(session, name, dtypes=dtypes, casts={t: o for t, (o, _) in casts.items()})


def _check_provider(wanted: str, running: Sequence[str]) -> None:
    """ONNX Runtime goes on without a provider whose library does not load."""
    if wanted not in running:
        raise RunError(
            f"ONNX Runtime cannot load {wanted} and would run on {', '.join(running)}",
            hint="Check that its driver and libraries are installed, or name another provider.",
        )


def run(
    model: Model, feed: Feed, *, optimized: bool = False, outputs: Iterable[str] | None = None
) -> dict[str, NDArray[Any]]:
    """The outputs of a model on one feed (a session is opened for it)."""
    return open_session(model, optimized=optimized).run(feed, outputs)


class BoundSession:
    """A session whose values stay where the runtime has put them, bound from run to run.

    Several threads may run it at a time: each has a binding of its own.

    Attributes:
        name: the model's name, for messages.
        input_names: of the model, in order.
        output_kinds: ONNX Runtime's type of each output, e.g. ``"tensor(float)"``.
        readable: the outputs that can become arrays.
        casts: those of them that are cast for it.
    """

    def __init__(self, session: Session) -> None:
        self.name = session.name
        self.input_names = session.input_names
        self.output_kinds = {**session.output_dtypes, **session.unreadable}
        self.readable = frozenset(session.output_names)
        self.casts = dict(session._casts)
        self._session = session._session
        self._own = threading.local()

    def run(
        self,
        values: Mapping[str, ort.OrtValue],
        outputs: Sequence[str],
        *,
        cast: Container[str] = (),
        sample: str = "a feed",
    ) -> dict[str, ort.OrtValue]:
        """Outputs by name, which no later run changes.

        Args:
            values: of at least the inputs that have changed since the last run.
            outputs: names wanted.
            cast: those of them that are to be of a type that an array can have.
            sample: the feed's name, for messages.

        Raises:
            RunError: the runtime refused a value.
        """
        own = self._own
        if not hasattr(own, "binding"):
            own.binding, own.values = self._session.io_binding(), {}
        try:
            for name in self.input_names:
                value = values.get(name)
                if value is not None and own.values.get(name) is not value:
                    own.values[name] = value
                    own.binding.bind_ortvalue_input(name, value)
            # Bound anew, or the run would write into what the last one gave.
            for name in outputs:
                own.binding.bind_output(self.casts.get(name, name) if name in cast else name)
            self._session.run_with_iobinding(own.binding)
            found = own.binding.get_outputs()
        except (*ORT_ERRORS, *_BINDING_ERRORS) as error:
            raise refused_feed(self.name, sample, error) from error
        return dict(zip(outputs, found, strict=True))


def held_value(array: NDArray[Any]) -> ort.OrtValue:
    """A copy of an array where the runtime wants it.

    Raises:
        ValueError, RuntimeError: an array of a type that it does not take.
    """
    value = _feedable(array)
    if isinstance(value, ort.OrtValue):
        return value
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value).reshape(value.shape))


def refused_feed(model: str, sample: str, error: Exception) -> RunError:
    """The error for a feed that a model does not run on."""
    return RunError(
        f"{model} does not run on {sample}: {_words(error)}",
        hint="Check the sample's shapes against the inputs (`quant-inspector show`).",
    )
