"""Finished files under the names that were asked for: all of a file or nothing.

Apart from the modules that make files, so that each of them treats a user's folder alike.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inspector.errors import QuantizationError

NOT_RUN = "the result loads; it was not run, because no feed fits the model"
"""The note of a file that could not be tried before it got its name."""


def check_place(output: Path) -> None:
    """Refuses a place where no file can be written, before any work is done.

    Raises:
        QuantizationError: it is a folder, or its folder does not exist.
    """
    if output.is_dir():
        raise QuantizationError(
            f"{output} is a folder, expected a file to write", hint="Name the .onnx file to write."
        )
    if not output.parent.is_dir():
        raise QuantizationError(
            f"the folder {output.parent} does not exist", hint="Create it, or name another folder."
        )


@contextmanager
def unfinished_file(output: Path) -> Iterator[Path]:
    """Where to write a model that gets the name `output` once the block ends without an error.

    What the block writes beside it (external data) goes with it.

    Raises:
        QuantizationError: the file cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".part-", dir=output.parent) as name:
            part = Path(name) / output.name
            yield part
            # The data before the model that names them.
            for file in sorted(part.parent.iterdir(), key=lambda f: f == part):
                give_name(file, output.with_name(file.name))
    except OSError as error:
        raise QuantizationError(
            f"{output} cannot be written: {error.strerror or error}",
            hint="Check the folder's permissions and the free space on its disk.",
        ) from error


def give_name(part: Path, path: Path) -> None:
    """Moves a temporary file of the same disk, with the permissions of any new file."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(part, 0o666 & ~mask)
    os.replace(part, path)
