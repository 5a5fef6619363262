"""Trials are kept for one model, recipe, metric and feeds, labels and expected values included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from inspector.errors import ReportError
from inspector.feeds import Feeds, load_feeds, split_calibration
from inspector.model import Model
from inspector.model_files import load_model
from inspector.recipe import QuantConfig
from inspector.trials import Request, Trials, open_trials
from tests.samples import conv_relu_gemm


@pytest.fixture
def float_model(tmp_path: Path) -> Model:
    path = tmp_path / "float.onnx"
    path.write_bytes(conv_relu_gemm().SerializeToString())
    return load_model(path)


def feeds_of(model: Model, folder: Path, labels: list[int]) -> Feeds:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    random = np.random.default_rng(0)
    info = model.inputs[0]
    shape = [d if isinstance(d, int) else 1 for d in info.shape or ()]
    for at in range(len(labels)):
        np.savez(folder / f"{at}.npz", **{info.name: random.normal(size=shape).astype(np.float32)})
    (folder / "labels.json").write_text(json.dumps(labels))
    return load_feeds(folder, model)


def opened(model: Model, feeds: Feeds, folder: Path, expected: Path | None = None) -> Trials:
    return open_trials(
        model, QuantConfig(), feeds, split_calibration(feeds, None), "output_sqnr_db",
        cache=folder.parent / "cache", folder=folder, expected=expected,
    )  # fmt: skip


def test_trials_of_other_labels_are_not_taken(float_model: Model, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    feeds = feeds_of(float_model, tmp_path / "feeds", [0, 1, 1])
    first = opened(float_model, feeds, tmp_path / "trials")
    first.measure(Request())
    assert first.evaluations == 1
    again = opened(float_model, feeds, tmp_path / "trials")
    again.measure(Request())
    assert again.evaluations == 0, "it is known"
    relabelled = feeds_of(float_model, tmp_path / "feeds", [1, 0, 1])
    assert relabelled.digest == feeds.digest, "the arrays are the same"
    with pytest.raises(ReportError, match="holds trials of another model"):
        opened(float_model, relabelled, tmp_path / "trials")
