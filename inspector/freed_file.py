"""Writing a file with freed nodes: checked, and run on one sample before it gets its name.

Apart from `rewrite`, which works in memory and writes nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx.checker

from inspector.errors import ExclusionError, FeedError, InspectorError, QuantizationError
from inspector.feeds import Feeds, random_feeds
from inspector.freed_effects import joined
from inspector.matching import Matching
from inspector.model import ONNX_ERRORS, PROTO_BYTES, Model
from inspector.model_files import load_model, save_model
from inspector.pairs import feed_for_quantized
from inspector.publishing import NOT_RUN, check_place, unfinished_file
from inspector.rewrite import Freed
from inspector.runtime import Feed, open_session


def write_freed(
    freed: Freed,
    output: str | os.PathLike[str],
    *,
    inputs: Sequence[Model] = (),
    matching: Matching | None = None,
    feeds: Feeds | None = None,
) -> tuple[str, ...]:
    """Checks a freed model, tries it on one sample and writes it.

    `output` holds all of it or is untouched.

    Args:
        freed: what `free_nodes` gave.
        output: the file to write.
        inputs: models whose files are never written to.
        matching: of the float and the quantized model, to try it on a feed of the float one.
        feeds: the float model's feeds; a random feed where there are none.

    Returns:
        Notes, one sentence each.

    Raises:
        ExclusionError: the list changes nothing.
        QuantizationError: the result is no valid model, does not load or does not run, or the file
            cannot be written.
    """
    output = Path(os.path.abspath(output))
    check_place(output)
    _check_inputs(output, inputs)
    if not freed.freed:
        reasons = [f"{e.name}: {'; '.join(e.details) or e.status}" for e in freed.effects]
        raise ExclusionError(
            f"the list changes nothing in {freed.model.name}"
            + (f": {joined(reasons)}" if reasons else ""),
            hint="Name quantized nodes, and with them the neighbours that need their tensors.",
        )
    with unfinished_file(output) as part:
        save_model(freed.model, part)
        result = load_model(part)
        notes = [*_checked(result, freed.model), *_tried(result, matching, feeds)]
    return tuple(dict.fromkeys(notes))


def _check_inputs(output: Path, inputs: Sequence[Model]) -> None:
    written = [p for p in (output, output.with_name(f"{output.name}.data")) if p.exists()]
    for model in inputs:
        read = [model.path, *{e.file for e in model.external.values()}]
        for path in written:
            if any(r is not None and r.exists() and path.samefile(r) for r in read):
                raise QuantizationError(
                    f"{path.name} belongs to {model.name}, which is never overwritten",
                    hint="Name another file to write.",
                )


def _checked(result: Model, source: Model) -> list[str]:
    """What ONNX's checker says, which looks at files that are too large for one proto by path."""
    try:
        if result.external or result.proto.ByteSize() > PROTO_BYTES // 2:
            assert result.path is not None
            onnx.checker.check_model(str(result.path))
        else:
            onnx.checker.check_model(result.proto)
    except ONNX_ERRORS as error:
        text = " ".join(str(error).split())[:300]
        return [f"ONNX's checker refuses the result, which ONNX Runtime takes: {text}"]
    return []


def _tried(result: Model, matching: Matching | None, feeds: Feeds | None) -> list[str]:
    """Notes from running the result on one sample, as debugged and as shipped."""
    feed: Feed | None = None
    sample = "a random feed"
    if feeds is not None and len(feeds) and matching is not None:
        sample, feed = f"sample {feeds.names[0]!r}", feed_for_quantized(matching, feeds[0])
    else:
        with contextlib.suppress(FeedError):
            feed = random_feeds(result, samples=1, seed=0)[0]
    notes = []
    for optimized in (False, True):
        how = "with" if optimized else "without"
        try:
            session = open_session(result, optimized=optimized)
            values = {} if feed is None else session.run(feed, sample=sample)
        except InspectorError as error:
            if feed is not None and feeds is None and "does not run on" in error.message:
                return [NOT_RUN]  # random values need not fit
            raise QuantizationError(
                f"the result does not load or run {how} optimisations: {error.message}",
                hint="Leave other nodes in float, or fewer.",
            ) from error
        if feed is None:
            notes.append(NOT_RUN)
        for name, value in values.items():
            if value.dtype.kind == "f" and not np.all(np.isfinite(value)):
                notes.append(f"output {name!r} of the result is NaN or infinite on {sample}")
    return notes
