"""The one door to running a model.

Two kinds of session: *simulated* (optimisations off, what is debugged: every node runs as
written) and *deployed* (all optimisations on, the kernels that ship). Both on the CPU, no
custom-op libraries.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from inspector.errors import InspectorError, ModelError, RunError
from inspector.model import Model

ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    ort_errors.EPFail,
    ort_errors.NoSuchFile,
)
ort.set_default_logger_severity(4)

Feed = Mapping[str, NDArray[Any]]

# Called by long work with the finished share (0..1) and what it is doing; raises `Cancelled`
# when its owner asked to stop.
Progress = Callable[[float, str], None]


def no_progress(_fraction: float, _message: str) -> None:
    """A `Progress` that shows nothing and never stops."""


def runtime_version() -> str:
    """The installed version of ONNX Runtime."""
    return str(ort.__version__)


def _refused(what: str, error: Exception) -> InspectorError:
    text = " ".join(str(error).split())
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
        output_names: all outputs in order.
        output_dtypes: ONNX Runtime's type of each output by name, e.g. ``"tensor(float)"``.
    """

    def __init__(self, session: ort.InferenceSession, name: str) -> None:
        self._session = session
        self.name = name
        self.input_names = tuple(i.name for i in session.get_inputs())
        outputs = session.get_outputs()
        self.output_names = tuple(o.name for o in outputs)
        self.output_dtypes = {o.name: str(o.type) for o in outputs}

    def run(
        self, feed: Feed, outputs: Iterable[str] | None = None, *, sample: str = "a feed"
    ) -> dict[str, NDArray[Any]]:
        """The outputs by name for one feed.

        Args:
            feed: arrays by input name; entries for inputs this model does not have are left out.
            outputs: names wanted, all by default.
            sample: the feed's name, for messages.

        Raises:
            RunError: the runtime refused the feed.
        """
        names = list(self.output_names if outputs is None else outputs)
        try:
            values = self._session.run(
                names, {k: v for k, v in feed.items() if k in self.input_names}
            )
        except (*ORT_ERRORS, ValueError) as error:
            raise RunError(
                f"{self.name} does not run on {sample}: {' '.join(str(error).split())}",
                hint="Check the sample's shapes against the inputs (`quant-inspector show`).",
            ) from error
        return dict(zip(names, values, strict=True))


def open_session(
    model: Model | onnx.ModelProto | Path,
    *,
    optimized: bool,
    name: str = "the model",
    threads: int | None = None,
) -> Session:
    """A session on the CPU.

    Args:
        model: a loaded model, a proto, or the path of a file.
        optimized: all graph optimisations (deployed) or none (simulated).
        name: for messages, where `model` has none of its own.
        threads: intra-op threads; None leaves it to the runtime.

    Raises:
        ModelError: an operator the runtime does not have.
        RunError: the runtime refused the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if not optimized:
        # Between the runs of a comparison numpy works: idle threads that spin would slow it down.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    if isinstance(model, Model):
        name = model.name
    proto = model.proto if isinstance(model, Model) else model
    try:
        if isinstance(proto, Path):
            session = ort.InferenceSession(str(proto), options, providers=["CPUExecutionProvider"])
        elif proto.ByteSize() < 2**31 - 1:
            session = ort.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        else:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.onnx"
                onnx.save_model(proto, file, save_as_external_data=True, location="model.data")
                session = ort.InferenceSession(
                    str(file), options, providers=["CPUExecutionProvider"]
                )
    except ORT_ERRORS as error:
        raise _refused(name, error) from error
    return Session(session, name)


def run(
    model: Model, feed: Feed, *, optimized: bool = False, outputs: Iterable[str] | None = None
) -> dict[str, NDArray[Any]]:
    """The outputs of a model on one feed (a session is opened for it)."""
    return open_session(model, optimized=optimized).run(feed, outputs)
