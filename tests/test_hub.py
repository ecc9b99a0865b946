"""Which files of a repository are a model, and the way through huggingface-hub to a local hub."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pykvq.errors import DownloadError
from pykvq.hub import choose_files

ROOT = Path(__file__).resolve().parent.parent

FILES = [
    "README.md",
    "mmproj-model-f16.gguf",
    "model-IQ4_XS.gguf",
    "model-Q4_K.gguf",
    "model-Q4_K_M.gguf",
    "model-Q8_0.gguf",
    "model.UD-Q4_K_XL.gguf",
    "Q6_K/model-Q6_K-00001-of-00003.gguf",
    "Q6_K/model-Q6_K-00002-of-00003.gguf",
    "Q6_K/model-Q6_K-00003-of-00003.gguf",
]


@pytest.mark.parametrize(
    ("quant", "chosen"),
    [
        (None, "model-Q4_K_M.gguf"),
        ("Q4_K_M", "model-Q4_K_M.gguf"),
        ("q4_k", "model-Q4_K.gguf"),
        ("iq4_xs", "model-IQ4_XS.gguf"),
        ("Q4_K_XL", "model.UD-Q4_K_XL.gguf"),
        ("ud-q4_k_xl", "model.UD-Q4_K_XL.gguf"),
        ("q8_0", "model-Q8_0.gguf"),
    ],
)
def test_the_quantization_is_a_whole_word_of_the_name(quant: str | None, chosen: str) -> None:
    assert choose_files(FILES, quant, "u/r") == [chosen]
    assert choose_files(FILES[::-1], quant, "u/r") == [chosen]


def test_a_split_model_is_all_of_its_parts_in_order() -> None:
    assert choose_files(FILES[::-1], "Q6_K", "u/r") == FILES[-3:]
    with pytest.raises(DownloadError, match=r"split into 3 files, but .*-00002-of-00003\.gguf is"):
        choose_files([f for f in FILES if "00002" not in f], "Q6_K", "u/r")


def test_without_the_default_quantization_the_first_model_is_taken() -> None:
    assert choose_files(["b.gguf", "a-Q2_K.gguf", "mmproj-a.gguf"], None, "u/r") == ["a-Q2_K.gguf"]


def test_a_repository_without_the_model_says_what_it_has() -> None:
    with pytest.raises(DownloadError, match="u/r has no GGUF file named after the quantization Q5"):
        choose_files(FILES, "Q5_0", "u/r")
    with pytest.raises(DownloadError, match="u/r has no GGUF file of a model"):
        choose_files(["README.md", "mmproj-x.gguf"], None, "u/r")


# ---------------------------------------------------------------------------------------------
# huggingface-hub against a server on this machine. It reads its settings when it is imported, so
# each test runs in a process of its own.
# ---------------------------------------------------------------------------------------------

BODIES = {f"m-Q4_0-0000{i}-of-00002.gguf": bytes([i]) * n for i, n in ((1, 25_000_000), (2, 1000))}


class Hub(http.server.BaseHTTPRequestHandler):
    """The few paths of the hub's interface that a download takes; u/private wants a token."""

    protocol_version = "HTTP/1.1"

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        allowed = "u/private" not in path or self.headers.get("Authorization") == "Bearer secret"
        listed = [
            {"type": "file", "path": f, "size": len(b), "oid": "0" * 40} for f, b in BODIES.items()
        ]
        name = path.rsplit("/", 1)[1]
        if not allowed or "u/r" not in path.replace("u/private", "u/r"):
            self.answer(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="No such repo")
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": f} for f in BODIES]
            info: Any = listed if "/tree/" in path else {"id": "u/r", "siblings": siblings}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        else:
            etag = hashlib.sha256(BODIES[name]).hexdigest()
            self.answer(200, BODIES[name], ETag=f'"{etag}"', X_Repo_Commit="c" * 40)

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


RESOLVE = """
import json, sys
from pykvq.catalogue import resolve
from pykvq.errors import DownloadError
reports = []
try:
    path = str(resolve(sys.argv[1], offline="offline" in sys.argv,
                       progress=lambda *report: reports.append(report)))
    print(json.dumps({"path": path, "reports": reports}))
except DownloadError as error:
    print(json.dumps({"error": str(error)}))
"""


def run_resolve(name: str, endpoint: str, home: Path, *options: str, **variables: str) -> Any:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment.update(
        PYTHONPATH=str(ROOT), HF_HOME=str(home), HF_ENDPOINT=endpoint, NO_PROXY="127.0.0.1"
    )
    environment.update(variables)
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, name, *options],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bars of the library
    return json.loads(done.stdout)


def test_a_model_of_the_hub_is_fetched_once_and_found_offline(hub: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface-hub is not installed")
    fetched = run_resolve("u/r:q4_0", hub, tmp_path)
    for name, body in BODIES.items():
        assert Path(fetched["path"]).with_name(name).read_bytes() == body
        counts = [n for what, n, total in fetched["reports"] if (what, total) == (name, len(body))]
        assert counts == sorted(counts)
        assert counts[-1] == len(body)
    first = next(iter(BODIES))
    assert fetched["path"].endswith(first)
    assert len([what for what, *_ in fetched["reports"] if what == first]) > 1

    offline = run_resolve("u/r:q4_0", "http://127.0.0.1:9", tmp_path, "offline")
    assert offline == {"path": fetched["path"], "reports": []}
    switch = run_resolve("u/r", "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert switch == offline
    other = run_resolve("u/other", "http://127.0.0.1:9", tmp_path, "offline")
    assert "u/other is not in the cache" in other["error"]


def test_without_a_network_the_error_comes_soon_and_alone(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface-hub is not installed")
    start = time.monotonic()
    failed = run_resolve("u/r", "http://127.0.0.1:9", tmp_path)  # fails if anything is logged
    assert time.monotonic() - start < 10
    assert re.fullmatch(r"The repository u/r cannot be fetched .*: .*[^.]\.", failed["error"])


def test_a_private_repository_needs_the_token_of_the_environment(hub: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface-hub is not installed")
    refused = run_resolve("u/private", hub, tmp_path)
    assert refused["error"].startswith("The repository u/private cannot be fetched from the Hugg")
    assert refused["error"].endswith(".")
    assert "\n" not in refused["error"]
    allowed = run_resolve("u/private", hub, tmp_path, HF_TOKEN="secret")
    assert allowed["path"].endswith(next(iter(BODIES)))
