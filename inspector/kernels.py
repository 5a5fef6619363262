"""Simulated against deployed: which of ONNX Runtime's graph transformers makes the difference.

With all optimisations on, the runtime rewrites a graph before it runs it: Q/DQ islands become
integer kernels, layouts change, patterns are fused. Outputs may then differ from the simulated ones
by more than rounding. Each rewriting can be disabled by its name, so the one whose absence removes
the difference is found by trying, and its name is something a user can act on: disable it when
shipping, or know what to look at. Apart from `compare`, which asks only when outputs differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from numpy.typing import NDArray

from inspector.errors import RunError
from inspector.model import Model
from inspector.runtime import Feed, Progress, no_progress, open_session

# ONNX Runtime ignores names that it does not know, so they have to be right: these are all that
# version 1.31.1 registers for the CPU with default options (it logs them when it is verbose), in
# the order in which it applies them, rewrite rules first. Not listed: the four that are always on,
# also in a simulated session, so that they make no difference.
LEVELS: Mapping[str, tuple[str, ...]] = {
    "basic": (
        "EliminateIdentity",
        "EliminateSlice",
        "UnsqueezeElimination",
        "EliminateDropout",
        "ExpandElimination",
        "CastElimination",
        "PreShapeNodeElimination",
        "NoopElimination",
        "DivMulFusion",
        "FuseReluClip",
        "GemmSumFusion",
        "GemmTransposeFusion",
        "NotWhereFusion",
        "ConvAddFusion",
        "ConvMulFusion",
        "ConvBNFusion",
        "Pad_Fusion",
        "MatMul_BatchNormalization_Fusion",
        "LabelEncoderFusion",
        "DoubleQDQPairsRemover",
        "ConstantSharing",
        "CommonSubexpressionElimination",
        "ConstantFolding",
        "MatMulAddFusion",
        "ReshapeFusion",
        "FreeDimensionOverrideTransformer",
        "SliceConcatToSpaceToDepthFusion",
        "GeluFusionL1",
        "LayerNormFusionL1",
        "QDQPropagationTransformer",
        "WeightBiasQuantization",
        "WhereDummyDq",
        "TransposeOptimizer",
    ),
    "extended": (
        "ClipQuantRewrite",
        "ReluQuantRewrite",
        "TransposeOptimizer_CPUExecutionProvider",
        "QDQS8ToU8Transformer",
        "QDQSelectorActionTransformer",
        "GemmActivationFusion",
        "MatMulIntegerToFloatFusion",
        "DynamicQuantizeMatMulFusion",
        "ConvActivationFusion",
        "GeluFusionL2",
        "LayerNormFusionL2",
        "SimplifiedLayerNormFusion",
        "AttentionFusion",
        "EmbedLayerNormFusion",
        "GatherSliceToSplitFusion",
        "GatherToSliceFusion",
        "MatmulTransposeFusion",
        "BiasGeluFusion",
        "GroupQueryAttentionFusion",
        "SkipLayerNormFusion",
        "BiasSkipLayerNormFusion",
        "FastGeluFusion",
        "QuickGeluFusion",
        "BiasSoftmaxFusion",
        "BiasDropoutFusion",
        "MatMulScaleFusion",
        "MatMulActivationFusion",
        "MatMulNBitsFusion",
        "GroupQueryAttentionPreNormFusion",
        "QDQFinalCleanupTransformer",
    ),
    "layout": (
        "NchwcTransformer",
        "NhwcTransformer",
        "ConvAddActivationFusion",
        "FuseFp16InitializerToFp32NodeTransformer",
    ),
}
_LEVEL = {name: level for level, names in LEVELS.items() for name in names}

# Where several would each remove the difference alone, the search names the first of its order:
# what is applied last acts nearest to the kernels, and these, from narrow to wide, come at the very
# end, because they change whole graphs or only prepare the ground for others.
_WIDE = (
    "QDQS8ToU8Transformer",
    "QDQSelectorActionTransformer",
    "WeightBiasQuantization",
    "QDQPropagationTransformer",
    "TransposeOptimizer",
    "CommonSubexpressionElimination",
    "ConstantSharing",
    "ConstantFolding",
)
SEARCH_ORDER = (*(name for name in reversed(_LEVEL) if name not in _WIDE), *_WIDE)

# Behind nearly every difference of a quantized model: sessions are saved by asking for them early.
_OFTEN = frozenset({"QDQS8ToU8Transformer", "QDQSelectorActionTransformer"})

# One transformer takes at most 11 sessions; one of the frequent ones and another at most 13.
MAX_SESSIONS = 14
DEFAULT_BUDGET_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DeployedCause:
    """Why deployed outputs differ from the simulated ones, as far as it was searched.

    Attributes:
        transformers: disabling exactly these removes the difference; () where none is known to.
        complete: the search ended; False where it was stopped by its limits, so that
            `transformers` may hold more than it takes.
        sessions: how many were opened.
        refused: how many of them the runtime refused; they count as not removing it.
    """

    transformers: tuple[str, ...]
    complete: bool
    sessions: int
    refused: int = 0

    @property
    def name(self) -> str:
        """The one transformer whose disabling alone removes the difference, "" if there is none."""
        return self.transformers[0] if len(self.transformers) == 1 else ""

    @property
    def level(self) -> str:
        """`name`'s level of optimisation: "basic", "extended" or "layout"; "" where no name."""
        return _LEVEL[self.name] if self.name else ""

    @property
    def sentence(self) -> str:
        """What was found, and what it means, for a reader."""
        count, further = len(self.transformers), "" if self.complete else "; not searched further"
        if self.name:
            return f"without {self.name} ({self.level} optimisations) the difference is gone"
        if not count:
            found = (
                "no known graph transformer makes the difference"
                if self.complete
                else ("the graph transformer that makes the difference is not known")
            )
            return found + further
        few = count <= _FEW
        which = ", ".join(self.transformers) if few else f"{count} graph transformers"
        return f"the difference is gone without {which} together{further}"


# So many names still fit a sentence.
_FEW = 4


class Stopped(Exception):
    """A search ran into one of its limits."""


def smallest_cure(cures: Callable[[Sequence[str]], bool]) -> tuple[tuple[str, ...], bool]:
    """A smallest set of transformers whose disabling cures, and whether the search ended.

    () where not even all of them do. Assumes that disabling more never undoes a cure; each of the
    set is then needed. A search that stopped gives the smallest set that was seen to cure.

    Args:
        cures: whether disabling these is enough; raises `Stopped` to end the search.
    """
    needed: tuple[str, ...] = ()
    enough: tuple[str, ...] = ()
    pool = SEARCH_ORDER
    try:
        if not cures(pool):
            return (), True
        enough = pool
        while enough != needed:
            # The shortest beginning of the pool that cures with what is needed anyway: its last
            # name is needed too. Bisected by likelihood, so that few steps find the frequent ones.
            likelihood = [0, *accumulate(64 if name in _OFTEN else 1 for name in pool)]
            low, high = 1, len(pool)
            while low < high:
                middle = (likelihood[low - 1] + likelihood[high]) / 2
                split = min(range(low, high), key=lambda n: abs(likelihood[n] - middle))
                if cures((*pool[:split], *needed)):
                    high = split
                    enough = (*pool[:high], *needed)
                else:
                    low = split + 1
            needed, pool = (pool[high - 1], *needed), pool[: high - 1]
            if not pool or cures(needed):
                enough = needed
    except Stopped:
        return enough, False
    return enough, True


class _Search:
    """Opens sessions with transformers disabled, within limits."""

    def __init__(
        self,
        model: Model,
        feed: Feed,
        outputs: Sequence[str],
        differs: Callable[[Mapping[str, NDArray[Any]]], bool],
        progress: Progress,
        budget_seconds: float,
    ) -> None:
        self._model = model
        self._feed = feed
        self._outputs = tuple(outputs)
        self._differs = differs
        self._progress = progress
        self._deadline = time.monotonic() + budget_seconds
        self._longest = 0.0
        self.sessions = 0
        self.refused = 0

    def cured(self, disabled: Sequence[str]) -> bool:
        """Whether the difference is gone without these transformers."""
        started = time.monotonic()
        if self.sessions == MAX_SESSIONS or started + self._longest >= self._deadline:
            raise Stopped
        self._progress(
            self.sessions / MAX_SESSIONS,
            f"finding what makes deployed outputs differ ({self.sessions + 1})",
        )
        self.sessions += 1
        try:
            session = open_session(self._model, optimized=True, disabled_transformers=disabled)
            values = session.run(self._feed, self._outputs)
        except RunError:
            if not disabled:
                raise
            # Some graphs have no kernels before they are rewritten. That says nothing about the
            # difference, so it is no cure; it is counted in the record.
            self.refused += 1
            return False
        finally:
            self._longest = max(self._longest, time.monotonic() - started)
        return not self._differs(values)


def find_transformer(
    model: Model,
    feed: Feed,
    outputs: Sequence[str],
    *,
    differs: Callable[[Mapping[str, NDArray[Any]]], bool],
    progress: Progress = no_progress,
    budget_seconds: float = DEFAULT_BUDGET_SECONDS,
) -> DeployedCause | None:
    """The graph transformer whose disabling alone makes deployed outputs agree with simulated ones.

    Disables all known transformers first, then bisects; opens at most `MAX_SESSIONS` sessions, one
    at a time. Where it takes several, a smallest set of them is looked for within the same limits:
    none of the set can be left out. Assumes that disabling more never brings a difference back;
    what is named was tried exactly as named.

    Args:
        model: the model whose outputs differ, usually the quantized one.
        feed: a feed on which they do.
        outputs: names of the outputs that `differs` wants.
        differs: judges outputs by name; True where they are too far from the simulated ones.
        progress: see `runtime.Progress`.
        budget_seconds: no session is begun that would probably end later.

    Returns:
        What was found, or None where the deployed outputs do not differ on this feed.

    Raises:
        ModelError: an operator the runtime does not have.
        RunError: the runtime refuses the model or the feed.
        Cancelled: from `progress`.
    """
    search = _Search(model, feed, outputs, differs, progress, budget_seconds)
    try:
        if search.cured(()):
            return None
    except Stopped:
        return DeployedCause(transformers=(), complete=False, sessions=0)
    transformers, complete = smallest_cure(search.cured)
    return DeployedCause(
        transformers=transformers,
        complete=complete,
        sessions=search.sessions,
        refused=search.refused,
    )
