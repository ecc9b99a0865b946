"""Files that users name: written whole or not at all, and read only so far as they can end."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pykvq.errors import KvqError

#: The longest text that is read, in bytes: a device may never end.
LONGEST_TEXT = 512 << 20

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def kind(path: str | os.PathLike[str]) -> str | None:
    """What there is at a path that is no regular file, in words; None for one and for nothing."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    return next((words for is_kind, words in _KINDS if is_kind(mode)), None)


def require_regular(path: str | os.PathLike[str]) -> None:
    """Requires that there is a regular file at a path, or nothing.

    Raises:
        KvqError: There is something else.
        OSError: It cannot be found out.
    """
    found = kind(path)
    if found is not None:
        raise KvqError(f"{os.fspath(path)} is {found}, expected a regular file or a new name.")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes a file so that at any time there is either the old or the new one.

    What a symbolic link leads to is replaced, and the link stays.

    Yields:
        The name to write it under; it gets its own when the block has ended without an error.

    Raises:
        KvqError: There is something at the path that is not a regular file.
        OSError: It cannot be written.
    """
    require_regular(path)
    final = Path(os.path.realpath(path))
    work = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        yield work
        work.replace(final)
    except OSError as error:
        if error.filename is not None:
            raise
        what = error.strerror or f"writing failed ({error})"  # as where the disk is full
        raise OSError(error.errno, what, os.fspath(path)) from error
    finally:
        work.unlink(missing_ok=True)


def read_text_bytes(name: str, file: BinaryIO) -> bytes:
    """All that can be read of a file, pipe or terminal.

    Raises:
        KvqError: It is longer than any text.
    """
    data = bytearray()
    while chunk := file.read(1 << 20):
        data += chunk
        if len(data) > LONGEST_TEXT:
            raise KvqError(
                f"The text of {name} has more than {LONGEST_TEXT >> 20} MiB, the most that is read."
            )
    return bytes(data)
