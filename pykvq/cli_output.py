"""Files that commands write: whether they can, found out before all the work is done for them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pykvq.console import UsageError
from pykvq.files import kind


def require_writable(what: str, output: Path, inputs: Sequence[str] = ()) -> None:
    """Requires that a file can be written.

    Args:
        what: What it is, to begin a sentence: "The profile".
        output: Where it shall be.
        inputs: Paths of what it is made from, which it may not replace.

    Raises:
        UsageError: It cannot.
    """
    folder = Path(os.path.realpath(output)).parent  # where a link leads to
    if not folder.is_dir():
        raise UsageError(f"{what} cannot be written to {output}: there is no folder {folder}.")
    there = kind(output)
    if there is not None or not os.access(folder, os.W_OK):
        found = f"the folder {folder} is read-only" if there is None else f"it is {there}"
        raise UsageError(f"{what} cannot be written to {output}: {found}; -o names a file.")
    for path in map(Path, inputs):
        if output.exists() and path.exists() and output.samefile(path):
            raise UsageError(f"{what} would overwrite {path}, which it is made from.")


def require_folder(what: str, folder: Path) -> None:
    """Requires that files can be written to a folder, which may have to be made.

    Raises:
        UsageError: They cannot.
    """
    at = folder if folder.exists() else folder.absolute().parent
    if not at.is_dir():
        problem = f"{at} is a file" if at.exists() else f"there is no folder {at}"
    elif not os.access(at, os.W_OK):
        problem = f"the folder {at} is read-only"
    else:
        return
    raise UsageError(f"{what} cannot be written to {folder}: {problem}.")
