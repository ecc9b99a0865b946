"""GGUF files of the Hugging Face hub, by the name of a repository and a quantization.

Downloads, the cache that other tools share, the access token (HF_TOKEN) and resuming are those of
the library `huggingface-hub`; this module only chooses the files. Called by `pykvq.catalogue`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pykvq.errors import DownloadError, KvqError
from pykvq.fetch import Progress

__all__ = ["HubFile", "choose_files", "fetch_from_hub", "files_of_hub", "other_parts"]

#: As for llama.cpp's `-hf`.
DEFAULT_QUANT = "Q4_K_M"

_SPLIT = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def choose_files(files: Sequence[str], quant: str | None, repo: str) -> list[str]:
    """Choose one model, which may be split into several files, among the files of a repository.

    Args:
        files: Paths inside of the repository.
        quant: A name such as `Q4_K_M`, in any case; None takes `DEFAULT_QUANT` if it is there and
            else the first model.
        repo: For messages.

    Returns:
        The paths of its parts, the first part first.

    Raises:
        DownloadError: If there is no such model, or parts of it are missing.
    """
    # A projector of images (mmproj) is a GGUF file, but no model of its own.
    models = sorted(
        f
        for f in files
        if f.lower().endswith(".gguf") and not f.split("/")[-1].startswith("mmproj")
    )
    if not models:
        raise DownloadError(f"The repository {repo} has no GGUF file of a model.")
    named = re.compile(rf"(^|[-._/]){re.escape(quant or DEFAULT_QUANT)}([-./]|$)", re.IGNORECASE)
    matching = [f for f in models if named.search(f[: -len(".gguf")])]
    if quant is not None and not matching:
        raise DownloadError(
            f"The repository {repo} has no GGUF file named after the quantization {quant}; it has"
            f" {', '.join(models)}."
        )
    first = (matching or models)[0]
    parts = [first, *other_parts(first)]
    missing = [part for part in parts if part not in models]
    if missing:
        raise DownloadError(
            f"The model {first} of the repository {repo} is split into {len(parts)} files, but"
            f" {', '.join(missing)} is missing."
        )
    return parts


def other_parts(first: str) -> list[str]:
    """The paths of the other parts of a split model, by that of the first; none if it is whole."""
    split = _SPLIT.fullmatch(first)
    if split is None:
        return []
    count = split["count"]
    return [f"{split['stem']}-{i:05d}-of-{count}.gguf" for i in range(2, int(count) + 1)]


def fetch_from_hub(
    repo: str, quant: str | None, *, progress: Progress | None = None, offline: bool = False
) -> Path:
    """Return the path of a model of the hub in the hub's own cache, fetching it if needed.

    Args:
        repo: A name such as `user/repository`.
        quant: See `choose_files`.
        progress: Told how far a download is.
        offline: Only look into the cache; so does the library's HF_HUB_OFFLINE=1.

    Returns:
        The path of the model; of a split model that of its first part, beside the others.

    Raises:
        DownloadError: If there is no such model or it cannot be fetched.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError as error:
        raise DownloadError(
            f"The repository {repo} cannot be fetched, because the Python package huggingface-hub"
            " is not installed."
        ) from error
    with _reaching(repo):
        if offline or constants.HF_HUB_OFFLINE:
            cached = _cached_files(repo)
            return cached[choose_files(list(cached), quant, repo)[0]]
        parts = [
            huggingface_hub.hf_hub_download(repo, f, tqdm_class=_bar_class(f, progress))
            for f in _listed(repo, quant)
        ]
        return Path(parts[0])


def _listed(repo: str, quant: str | None) -> list[str]:
    """The files of a model of the hub, as the hub lists them."""
    import huggingface_hub
    from huggingface_hub import constants

    # Unlike list_repo_files, this one request is not repeated for half a minute where there is no
    # network, and it has a limit of time.
    about = huggingface_hub.HfApi().model_info(repo, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return choose_files([file.rfilename for file in about.siblings or ()], quant, repo)


@contextlib.contextmanager
def _reaching(repo: str) -> Iterator[None]:
    """Keeps the library quiet and turns its errors into one that names the repository."""
    try:
        with _quiet():
            yield
    except KvqError:
        raise
    except Exception as error:  # the library lets errors of several HTTP libraries through
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise DownloadError(
            f"The repository {repo} cannot be fetched from the Hugging Face hub:"
            f" {reason.rstrip('.') or type(error).__name__}."
        ) from error


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, of which a part can be read (`pykvq.fetch.RemoteFile`)."""

    repo: str
    path: str

    @property
    def name(self) -> str:
        """See `RemoteFile.name`."""
        return self.path.rpartition("/")[2]

    def read_range(self, begin: int, end: int) -> bytes:
        """See `RemoteFile.read_range`."""
        from huggingface_hub import constants, get_session, hf_hub_url

        utils: Any = importlib.import_module("huggingface_hub.utils")
        headers = utils.build_hf_headers(headers={"Range": f"bytes={begin}-{end - 1}"})
        with (
            _reaching(self.repo),
            get_session().stream(
                "GET",
                hf_hub_url(self.repo, self.path),
                headers=headers,
                follow_redirects=True,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            ) as response,
        ):
            if response.status_code == 416:  # the file ends before
                return b""
            response.raise_for_status()
            skip = 0 if response.status_code == 206 else begin  # 200: the server sends all of it
            data = b""
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= skip + end - begin:
                    break
            return data[skip : skip + end - begin]


def files_of_hub(repo: str, quant: str | None) -> list[HubFile]:
    """The files of a model of the hub, the first part first, to read parts of them.

    Args:
        repo: A name such as `user/repository`.
        quant: See `choose_files`.

    Raises:
        DownloadError: If there is no such model or the hub cannot be reached.
    """
    with _reaching(repo):
        return [HubFile(repo, path) for path in _listed(repo, quant)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the library logs meanwhile: what matters of it is in its exceptions."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _cached_files(repo: str) -> dict[str, Path]:
    """The files of a repository that are in the hub's cache, of the newest revision there."""
    import huggingface_hub

    try:
        repos = huggingface_hub.scan_cache_dir().repos
    except huggingface_hub.CacheNotFound:
        repos = frozenset()
    for cached in repos:
        if (cached.repo_type, cached.repo_id) == ("model", repo) and cached.revisions:
            newest = max(cached.revisions, key=lambda r: ("main" in r.refs, r.last_modified))
            return {
                f.file_path.relative_to(newest.snapshot_path).as_posix(): f.file_path
                for f in newest.files
            }
    raise DownloadError(
        f"The repository {repo} is not in the cache of the Hugging Face hub, and nothing may be"
        " downloaded while offline."
    )


def _bar_class(file: str, progress: Progress | None) -> type[Any]:
    """A progress bar that draws nothing and tells `progress` instead."""
    tqdm: Any = importlib.import_module("huggingface_hub.utils").tqdm
    n_reported = 0

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._n_done = int(kwargs.get("initial") or 0)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal n_reported
            self._n_done += int(n or 0)
            # There may be two bars, for what was received and what was written: the first counts.
            if progress is not None and self._n_done > n_reported:
                n_reported = self._n_done
                progress(file, n_reported, int(self.total or 0))
            return None

    return Bar
