"""Figures of quantized files that are really made: what a list gives deployed, and other recipes.

Apart from `search`, whose trials are simulated and take no file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from inspector.errors import CalibrationError, ModelError, QuantizationError, RunError
from inspector.feeds import CalibrationSplit, Feeds
from inspector.model import Model
from inspector.model_files import load_model
from inspector.output_metrics import Parts, TaskMetric, whole
from inspector.padding import Padding
from inspector.quantize import quantize_model
from inspector.recipe import QuantConfig, parse_override
from inspector.runtime import CPU, Progress, Session, no_progress, open_session
from inspector.search_result import Cure, Goal
from inspector.states import Carried, States


class RealFiles:
    """Figures of quantized files that are really made, on the samples that judge.

    Args:
        float_model: the user's float model.
        feeds: all of them; with `states` they run in order.
        split: what calibrates.
        metric: as it was prepared for these feeds.
        judged: indices of the samples that count.
        cache: folder for prepared models and ranges.
        optimized: with optimisations on, as it ships.
        mask, states: see `Trials`.
        provider: ONNX Runtime's execution provider of deployed runs.

    Attributes:
        size_bytes: of the file made last.

    Raises:
        ModelError, RunError: the runtime refuses the float model or a feed.
    """

    def __init__(
        self,
        float_model: Model,
        feeds: Feeds,
        split: CalibrationSplit,
        metric: TaskMetric,
        judged: Sequence[int],
        *,
        cache: Path,
        optimized: bool = True,
        mask: str = "",
        states: States = (),
        provider: str = CPU,
    ) -> None:
        self.size_bytes: int | None = None
        self._model, self._feeds, self._split = float_model, feeds, split
        self._metric, self._judged, self._cache = metric, frozenset(judged), cache
        self._optimized, self._states, self._provider = optimized, tuple(states), provider
        self._padding = Padding(float_model, mask) if mask else None
        self._outputs = tuple(o.name for o in float_model.outputs)
        self._reference = dict(self._runs(self._open(float_model)))
        if self._padding is not None:
            masks = [self._padding.mask_of(f, feeds.names[at]) for at, f in enumerate(feeds)]
            for at in self._padding.telling(masks):
                if at in self._reference:
                    self._padding.learn(masks[at], {**feeds[at], **self._reference[at]})

    def figure(self, config: QuantConfig, exclude: Collection[str] = ()) -> float:
        """The metric's figure of the file that a recipe and a list give.

        Raises:
            InspectorError: there is no such file, or it does not run.
        """
        with tempfile.TemporaryDirectory(
            prefix="quant-inspector-", ignore_cleanup_errors=True
        ) as folder:
            made = quantize_model(
                self._model,
                config,
                calibration=self._split.calibration if config.static else None,
                exclude=sorted(exclude),
                output=Path(folder) / "quantized.onnx",
                cache=self._cache,
            )
            quantized = load_model(made.path)
            self.size_bytes = quantized.size_bytes
            sums = [
                self._metric.sums(at, self._reference[at], found, self._parts(at))
                for at, found in self._runs(self._open(quantized))
            ]
        return self._metric.figure(sum(sums[1:], sums[0]))

    def _open(self, model: Model) -> Session:
        if self._optimized:
            return open_session(model, optimized=True, provider=self._provider)
        return open_session(model, optimized=False)

    def _runs(self, session: Session) -> Iterator[tuple[int, dict[str, Any]]]:
        """Outputs of every sample that counts."""
        carried = Carried(self._states)
        names = [n for n in self._outputs if n in session.output_names]
        for at, feed in enumerate(self._feeds):
            if at not in self._judged and not self._states:
                continue
            own = carried.into(feed, self._feeds.names[at])
            found = session.run(own, names, sample=self._feeds.names[at])
            carried.keep({**own, **found})
            if at in self._judged:
                yield at, found

    def _parts(self, at: int) -> Parts:
        if self._padding is None:
            return whole
        self._padding.use(self._padding.mask_of(self._feeds[at], self._feeds.names[at]))
        return self._padding.parts


def cures_for(
    config: QuantConfig, worst_tensors: Sequence[str] = ()
) -> tuple[tuple[str, QuantConfig], ...]:
    """Recipes that often do better than leaving nodes in float, with what is different in each.

    Args:
        config: the recipe that was searched with.
        worst_tensors: the noisiest activations, which may be given 16 bits.
    """
    found: list[tuple[str, QuantConfig]] = []
    eight = config.weight_type in ("int8", "uint8")
    if not config.per_channel:
        found.append(("per channel", replace(config, per_channel=True)))
    if config.static:
        if config.method != "percentile":
            found.append(("percentile", replace(config, method="percentile")))
        if not config.equalize:
            equalized = replace(config, equalize=True, per_channel=True)
            found.append(("per channel, equalized", equalized))
        if config.format == "qdq" and config.activation_type in ("int8", "uint8"):
            wide = "int16" if config.activation_type == "int8" else "uint16"
            held = {each.tensor for each in config.overrides}
            for tensor in [t for t in worst_tensors if t not in held][:3]:
                override = parse_override(f"{tensor}={wide}")
                label = f"{tensor} in {wide}"
                found.append((label, replace(config, overrides=(*config.overrides, override))))
    elif eight:
        other = "uint8" if config.weight_type == "int8" else "int8"
        found.append((f"{other} weights", replace(config, weight_type=other)))
        if not config.per_channel:
            both = replace(config, weight_type=other, per_channel=True)
            found.append((f"per channel, {other} weights", both))
    return tuple(found)


def try_cures(
    files: RealFiles,
    goal: Goal,
    cures: Sequence[tuple[str, QuantConfig]],
    *,
    progress: Progress = no_progress,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Cure, ...]:
    """What other recipes give without a list, the best first; one that cannot be says why.

    Args:
        files: makes and judges them.
        goal: what is to be reached.
        cures: from `cures_for`.
        progress: see `runtime.Progress`.
        stop: asked before each; True ends with what is there.
    """
    found = []
    for at, (label, config) in enumerate(cures):
        if stop():
            break
        progress(at / len(cures), f"cheaper cures: {label}")
        try:
            figure = files.figure(config)
        except (CalibrationError, ModelError, QuantizationError, RunError) as error:
            found.append(Cure(label=label, config=config, reason=error.message))
            continue
        found.append(
            Cure(
                label=label,
                config=config,
                figure=figure,
                reached=goal.reached(figure),
                size_bytes=files.size_bytes,
            )
        )
    return tuple(sorted(found, key=lambda c: -goal.worth(c.figure)))
