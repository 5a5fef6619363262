"""What the web process asks the worker for, by name.

Each function imports the workbench when it runs, which is in the worker: the web process never
loads the runtime, however many pages it serves. Nothing here touches Streamlit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from inspector.errors import Cancelled, ModelError, ReportError
from inspector.store import FeedSource, Workspace

SAMPLES_FOLDER = Path(__file__).resolve().parents[2] / "sample_models"
SAMPLES = {
    "digit-detector": "Digit detector (the scores collapse)",
    "digit-transformer": "Digit transformer (healthy)",
}


_Result = TypeVar("_Result")


def _of_a_run(job: Callable[..., _Result]) -> Callable[..., _Result]:
    """The job, which says so where its run was deleted meanwhile.

    Whatever is missed first then, be it a model, a feed or a folder, is not what is wrong.
    """

    @functools.wraps(job)
    def watched(root: Path, *, run_id: str, **arguments: Any) -> _Result:
        workspace = Workspace(root)
        pair_id = workspace.run(run_id).pair_id
        try:
            return job(root, run_id=run_id, **arguments)
        except Cancelled:
            raise
        except Exception as error:  # of any library
            if workspace.has_run(pair_id, run_id):
                raise
            raise ReportError(
                "the run was deleted while this was computed for it",
                hint="Open another run, or load the models again.",
            ) from error

    return watched


def load_pair(root: Path, *, pair_title: str = "", **arguments: Any) -> str:
    """The id of the run that a new pair opens on. Arguments as `workbench.load_pair`."""
    from inspector import workbench

    return workbench.load_pair(root, title=pair_title, **arguments)


def load_sample(root: Path, name: str, *, private: bool = False, **arguments: Any) -> str:
    """The id of the run that a bundled sample pair opens on.

    Args:
        root: the workspace.
        name: of the sample.
        private: whether to copy the sample into the workspace first, as if it were uploaded.
        arguments: as `workbench.load_pair`.

    Raises:
        ModelError: the sample's files are not where the project puts them.
    """
    folder = SAMPLES_FOLDER / name
    feeds = folder / "feeds"
    if not feeds.exists():
        feeds = folder / "feeds.npz"
    for path in (folder / "float.onnx", folder / "quantized.onnx", feeds):
        if not path.exists():
            raise ModelError(
                f"The bundled sample {name} is incomplete: {path.name} is not in {folder}.",
                hint="Install the project from a complete checkout, or load a pair of your own.",
            )
    models = [folder / "float.onnx", folder / "quantized.onnx"]
    inputs = FeedSource(kind="path", path=str(feeds), title=feeds.name)
    if private:
        models, inputs = _copied(Workspace(root), models, feeds)
    return load_pair(
        root,
        float_path=models[0],
        quantized_path=models[1],
        inputs=inputs,
        calibration=None,
        pair_title=name,
        **arguments,
    )


def _copied(
    workspace: Workspace, models: Sequence[Path], feeds: Path
) -> tuple[list[Path], FeedSource]:
    copies = [workspace.add_model(path, path.name).path for path in models]
    files = sorted(feeds.iterdir()) if feeds.is_dir() else [feeds, feeds.parent / "labels.json"]
    stored = workspace.add_feeds({each.name: each for each in files if each.is_file()})
    path = stored if feeds.is_dir() else stored / feeds.name
    return copies, FeedSource(kind="stored", path=str(path), title=feeds.name)


@_of_a_run
def requantize(root: Path, **arguments: Any) -> str:
    """The id of the new run. Arguments as `workbench.requantize`."""
    from inspector import workbench

    return workbench.requantize(root, **arguments)


@_of_a_run
def free_in_file(root: Path, **arguments: Any) -> str:
    """The id of the new run. Arguments as `workbench.free_in_file`."""
    from inspector import workbench

    return workbench.free_in_file(root, **arguments)


@_of_a_run
def preview_list(root: Path, **arguments: Any) -> dict[str, Any]:
    """What an exclusion list would give. Arguments as `live.preview_list`."""
    from inspector import live

    return live.preview_list(root, **arguments)


@_of_a_run
def rematch(root: Path, **arguments: Any) -> str:
    """The id of the run that was compared anew. Arguments as `workbench.rematch`."""
    from inspector import workbench

    return workbench.rematch(root, **arguments)


@_of_a_run
def isolate(root: Path, **arguments: Any) -> str:
    """The id of the run whose nodes were measured alone. Arguments as `workbench.isolate`."""
    from inspector import workbench

    return workbench.isolate(root, **arguments)


@_of_a_run
def list_tensors(root: Path, **arguments: Any) -> dict[str, list[dict[str, Any]]]:
    """The tensors that can be matched by hand. Arguments as `workbench.list_tensors`."""
    from inspector import workbench

    return workbench.list_tensors(root, **arguments)


def list_options(**arguments: Any) -> dict[str, Any]:
    """What a pair's options can be. Arguments as `workbench.list_options`."""
    from inspector import workbench

    return workbench.list_options(**arguments)


@_of_a_run
def inspect_tensor(root: Path, **arguments: Any) -> None:
    """Has the store keep histograms and maps of one tensor. Arguments as for `workbench`'s.

    Nothing is returned: not every tab comes back for its answer, and these are large.
    """
    from inspector import workbench

    workbench.inspect_tensor(root, **arguments)


def describe_model(path: Path, **arguments: Any) -> dict[str, Any]:
    """What a model file holds. Arguments as `workbench.describe_model`."""
    from inspector import workbench

    return workbench.describe_model(path, **arguments)


@_of_a_run
def propose_free(root: Path, **arguments: Any) -> list[str]:
    """The nodes that make a node really float. Arguments as `workbench.propose_free`."""
    from inspector import workbench

    return workbench.propose_free(root, **arguments)


@_of_a_run
def export_exclusions(root: Path, **arguments: Any) -> dict[str, Any]:
    """A run's list as another tool takes it. Arguments as `workbench.export_exclusions`."""
    from inspector import workbench

    return workbench.export_exclusions(root, **arguments)


@_of_a_run
def list_nodes(root: Path, **arguments: Any) -> list[dict[str, Any]]:
    """The nodes that an exclusion list can name. Arguments as `workbench.list_nodes`."""
    from inspector import workbench

    return workbench.list_nodes(root, **arguments)


@_of_a_run
def diagnose_run(root: Path, **arguments: Any) -> list[dict[str, Any]]:
    """What is wrong with a run. Arguments as `live.diagnose_run`."""
    from inspector import live

    return live.diagnose_run(root, **arguments)


@_of_a_run
def graph_of_run(root: Path, **arguments: Any) -> dict[str, Any]:
    """The graphs of a run, ready to be drawn. Arguments as `workbench.graph_of_run`."""
    from inspector import workbench

    return workbench.graph_of_run(root, **arguments)


@_of_a_run
def profile_run(root: Path, **arguments: Any) -> dict[str, Any]:
    """What each node takes. Arguments as `workbench.profile_run`."""
    from inspector import workbench

    return workbench.profile_run(root, **arguments)


@_of_a_run
def measure_run(root: Path, **arguments: Any) -> dict[str, Any]:
    """What each node costs. Arguments as `live.measure_run`."""
    from inspector import live

    return live.measure_run(root, **arguments)


@_of_a_run
def try_recipes(root: Path, **arguments: Any) -> int:
    """How many recipes were tried. Arguments as `workbench.try_recipes`."""
    from inspector import workbench

    return workbench.try_recipes(root, **arguments)


@_of_a_run
def search_list(root: Path, **arguments: Any) -> bool:
    """Whether a list reaches the goal. Arguments as `live.search_list`."""
    from inspector import live

    return live.search_list(root, **arguments)


def preview_feed(**arguments: Any) -> dict[str, Any]:
    """The first feed as the model gets it. Arguments as `workbench.preview_feed`."""
    from inspector import workbench

    return workbench.preview_feed(**arguments)


def preprocess_presets(progress: Any) -> dict[str, dict[str, Any]]:
    """The known ways to make tensors of pictures, by name, as JSON."""
    from inspector.images import PRESETS

    return {name: preset.to_json() for name, preset in PRESETS.items()}
