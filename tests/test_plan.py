"""Plans are what sessions then take, to the byte, and need no more of a model than its header."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_tiny
from gguf import GGMLQuantizationType, GGUFWriter

import pykvq
from pykvq import DeviceError, MemoryLimitError, Model, ModelError, native, plan
from pykvq.checks import SESSION_RANGES
from pykvq.cli_plan import memory_size
from pykvq.fetch import Url
from pykvq.native_session import SessionStats
from pykvq.plan import Plan, open_header, read_header

ROOT = Path(__file__).resolve().parent.parent
SCHEMES = [scheme.name for scheme in native.schemes()]
#: Of every scheme's context: one token, less than a block, around a block's end, many segments.
CONTEXTS = (1, 63, 197, 198, 2000, 40_000)
BYTES = [field.name for field in fields(SessionStats) if field.name.startswith("bytes_")]


# ---- plans and sessions ---------------------------------------------------------------------


def compare(model: Model, **options: Any) -> None:
    planned = model.plan(**options).stats
    with model.session(**options) as session:
        assert session.stats == planned


@pytest.mark.parametrize("kv", SCHEMES)
def test_a_session_takes_what_was_planned(tiny: Model, kv: str) -> None:
    for n_ctx in CONTEXTS:
        compare(tiny, kv=kv, n_ctx=n_ctx)


@pytest.mark.parametrize("kv", [s.name for s in native.schemes(16)])
def test_so_it_does_with_narrow_heads_and_a_key_bias(tiny_qwen2: Model, kv: str) -> None:
    compare(tiny_qwen2, kv=kv, n_ctx=777)


@pytest.mark.parametrize(
    "options",
    [
        {"kv": "auto", "kv_bits": 1.5},
        {"kv": "svdq", "kv_bits": 1.0},
        {"kv": "asymkv", "asymkv_layers": (1, 0)},
        {"kv": "skvq", "kv_sinks": 0, "kv_window": 1000},
        {"kv": "f16", "kv_sinks": 4, "kv_window": 3},
        {"kv": "skvq", "kv_topk": 256},
        {"kv": "skvq", "n_batch": 7, "n_threads": 5},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_options_change_plans_as_they_change_sessions(tiny: Model, options: dict[str, Any]) -> None:
    compare(tiny, n_ctx=1500, **options)
    default = tiny.plan(kv=options["kv"], n_ctx=1500).stats
    assert tiny.plan(n_ctx=1500, **options).stats.bytes_total != default.bytes_total


def test_a_model_s_own_options_hold_for_its_plans(tiny_path: Path) -> None:
    with Model(tiny_path, kv="nqkv", n_ctx=999, kv_window=64, n_threads=1) as model:
        stats = model.plan().stats
        assert (stats.scheme, stats.n_ctx, stats.window) == ("nqkv", 999, 64)
        assert model.plan(kv="skvq").stats.window == native.scheme_named("skvq").window


def test_the_total_is_the_sum_of_its_parts(tiny: Model) -> None:
    s = tiny.plan(kv="auto", n_ctx=3000).stats
    assert s.bytes_sealed == s.bytes_sealed_k + s.bytes_sealed_v
    assert s.bytes_kv == s.bytes_sinks + s.bytes_sealed + s.bytes_recent
    assert s.bytes_weights == tiny.info.bytes_weights == sum(t.n_bytes for t in tiny.tensors)
    assert s.bytes_total == s.bytes_weights + s.bytes_kv + s.bytes_tables + s.bytes_scratch
    always = [name for name in BYTES if "step" not in name and "gpu" not in name]
    assert min(getattr(s, name) for name in always) > 0


def test_f16_takes_two_bytes_per_element(tiny: Model) -> None:
    n_ctx = 64 * 100
    s = tiny.plan(kv="f16", n_ctx=n_ctx).stats
    about = tiny.info
    row = about.n_layers * about.n_kv_heads * about.d_head * 2
    assert s.bytes_sealed_k == s.bytes_sealed_v == row * n_ctx
    assert s.bytes_recent == 2 * row * native.block_tokens()


def test_a_plan_takes_no_memory_for_the_cache(tiny: Model) -> None:
    planned = tiny.plan(kv="f16", n_ctx=2**28, memory=10**9)  # 275 GB
    assert planned.stats.bytes_kv > 2 * 10**11
    assert not planned.fits


# ---- GPUs, which need not be here -----------------------------------------------------------

GPU_PARTS = ("weights", "rows", "sealed", "tables", "scratch")


def plan_on_gpu(model: Model, **options: Any) -> Plan:
    """A plan for a device that is not here."""
    return model.plan(device="cuda", **{"n_ctx": 3000, "memory": 10**8, **options})


@pytest.mark.parametrize("kv", ["f16", "skvq", "auto"])
def test_what_a_gpu_takes_is_the_sum_of_its_parts(tiny: Model, kv: str) -> None:
    s = plan_on_gpu(tiny, kv=kv).stats
    parts = [getattr(s, f"bytes_gpu_{part}") for part in GPU_PARTS]
    assert (s.gpu, s.n_gpu_layers, s.gpu_head) == (0, tiny.info.n_layers, True)
    assert s.bytes_gpu == sum(parts) and min(parts) > 0
    assert s.bytes_gpu_sealed >= s.bytes_sealed > 0
    assert s.bytes_gpu_sealed % s.bytes_gpu_chunk == 0
    assert s.bytes_gpu_now == 0
    assert s.bytes_total == s.bytes_gpu + s.bytes_host


def test_layers_that_are_not_on_the_gpu_are_on_the_host(tiny: Model) -> None:
    n_layers, whole = tiny.info.n_layers, tiny.info.bytes_weights
    plans = [plan_on_gpu(tiny, n_gpu_layers=n).stats for n in range(n_layers + 2)]
    assert [(s.gpu, s.n_gpu_layers, s.gpu_head) for s in plans] == [
        (None, 0, False),
        *((0, n, False) for n in range(1, n_layers + 1)),
        (0, n_layers, True),
    ]
    assert (plans[0].bytes_gpu, plans[0].bytes_host_weights) == (0, whole)
    for name in ("bytes_gpu_weights", "bytes_gpu_sealed", "bytes_gpu_rows"):
        grows = [getattr(s, name) for s in plans]
        assert grows == sorted(grows), name
    for before, after in itertools.pairwise(plans):
        assert after.bytes_host_weights < before.bytes_host_weights
    embedding = next(t for t in tiny.tensors if t.name == "token_embd.weight")
    assert plans[-1].bytes_host_weights == embedding.n_bytes  # rows are looked up there
    assert plans[-1].bytes_kv == plans[0].bytes_kv


@pytest.mark.parametrize("kv", ["f16", "skvq", "auto"])
def test_the_longest_context_is_what_fits_into_the_gpu(tiny: Model, kv: str) -> None:
    found = plan_on_gpu(tiny, kv=kv)
    longest = plan_on_gpu(tiny, kv=kv, n_ctx=found.longest)
    assert longest.fits and longest.stats.bytes_gpu <= longest.memory
    assert not plan_on_gpu(tiny, kv=kv, n_ctx=found.longest + 1).fits
    assert plan_on_gpu(tiny, kv=kv, n_gpu_layers=1).longest > found.longest


def test_memory_must_be_said_of_a_gpu_that_is_not_here(tiny: Model) -> None:
    with pytest.raises(DeviceError, match=r"CUDA device 63 is not here to say .*needs memory"):
        tiny.plan(device="cuda:63")


# ---- what fits ------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["f16", "skvq", "auto"])
def test_no_part_shrinks_as_the_context_grows(tiny: Model, kv: str) -> None:
    before = [0] * len(BYTES)
    for n_ctx in (*range(1, 700, 3), *range(32_000, 36_000, 61), *range(65_000, 70_000, 64)):
        now = [getattr(tiny.plan(kv=kv, n_ctx=n_ctx, memory=1).stats, name) for name in BYTES]
        assert all(a <= b for a, b in zip(before, now, strict=True)), (n_ctx, before, now)
        before = now


@pytest.mark.parametrize("kv", SCHEMES)
@pytest.mark.parametrize("memory", [6 * 10**6, 10**8, 3 * 10**9])
def test_the_longest_context_fits_and_one_token_more_does_not(
    tiny: Model, kv: str, memory: int
) -> None:
    longest = tiny.plan(kv=kv, memory=memory).longest
    assert longest > 0
    assert tiny.plan(kv=kv, n_ctx=longest, memory=memory).fits
    beyond = tiny.plan(kv=kv, n_ctx=longest + 1, memory=memory)
    assert not beyond.fits
    assert beyond.longest == longest  # whatever context was asked for


def test_where_the_weights_fill_the_memory_nothing_fits(tiny: Model) -> None:
    planned = tiny.plan(n_ctx=1, memory=tiny.info.bytes_weights)
    assert (planned.longest, planned.fits) == (0, False)


def test_the_default_memory_is_what_is_available(tiny: Model) -> None:
    assert tiny.plan().memory == pytest.approx(native.memory_available(), rel=0.2)


def test_a_session_that_cannot_fit_is_refused_with_the_one_that_would(tiny: Model) -> None:
    with pytest.raises(MemoryLimitError) as refused:
        tiny.session(kv="f16", n_ctx=2**28)
    found = re.fullmatch(
        r"A context of 268435456 tokens under f16 needs 274\.88 GB \(weights 0\.00, KV cache"
        r" 274\.88, scratch \d\.\d\d\), but only [\d.]+ GB of memory are available; choose a"
        r" smaller n_ctx, at most (\d+)\.",
        str(refused.value),
    )
    assert found is not None, refused.value
    assert int(found[1]) == pytest.approx(tiny.plan(kv="f16").longest, rel=0.2)


def test_who_insists_is_refused_only_by_the_system(tiny: Model) -> None:
    try:
        tiny.session(kv="f16", n_ctx=2**28, memory_check=False).close()
    except MemoryLimitError as error:
        assert re.match(r"The system refused 27\d\.\d\d GB", str(error))


# ---- headers --------------------------------------------------------------------------------


def write_header(path: Path, *, n_kv_heads: int, n_ctx_train: int = 4096) -> Path:
    """The header of a model of the shape of Llama 2 7B in Q4_0, without any tensor data."""
    writer = GGUFWriter(path, "llama")
    n_layers, n_heads, d, d_ff, n_vocab = 32, 32, 4096, 11008, 32000
    writer.add_block_count(n_layers)
    writer.add_context_length(n_ctx_train)
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(d_ff)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    n_kv = n_kv_heads * (d // n_heads)

    def matrix(name: str, rows: int, columns: int) -> None:
        n_bytes = rows * columns // 32 * 18
        shape = (rows, columns // 32 * 18)  # as bytes: the writer turns it into elements
        writer.add_tensor_info(
            name, shape, np.dtype(np.uint8), n_bytes, raw_dtype=GGMLQuantizationType.Q4_0
        )

    def vector(name: str) -> None:
        writer.add_tensor_info(name, (d,), np.dtype(np.float32), 4 * d)

    matrix("token_embd.weight", n_vocab, d)
    vector("output_norm.weight")
    matrix("output.weight", n_vocab, d)
    for layer in range(n_layers):
        b = f"blk.{layer}."
        vector(b + "attn_norm.weight")
        matrix(b + "attn_q.weight", d, d)
        matrix(b + "attn_k.weight", n_kv, d)
        matrix(b + "attn_v.weight", n_kv, d)
        matrix(b + "attn_output.weight", d, d)
        vector(b + "ffn_norm.weight")
        matrix(b + "ffn_gate.weight", d_ff, d)
        matrix(b + "ffn_up.weight", d_ff, d)
        matrix(b + "ffn_down.weight", d, d_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def test_llama_2_7b_has_a_million_tokens_in_80_gb_by_its_header(tmp_path: Path) -> None:
    path = write_header(tmp_path / "llama-2-7b.gguf", n_kv_heads=32)
    assert path.stat().st_size < 50_000
    with open_header(path) as model:
        assert not model.has_weights
        assert model.info.n_params == 6_738_415_616
        planned = model.plan(kv="skvq", n_ctx=1_000_000, memory=80 * 10**9)
        elements = 1_000_000 * 32 * 32 * 128
        scheme = native.scheme_named("skvq")
        bits = (planned.stats.bytes_sealed_k + planned.stats.bytes_sealed_v) * 8 / elements
        assert bits == pytest.approx(scheme.bits_k + scheme.bits_v, rel=1e-3)
        assert planned.fits
        assert planned.longest > 1_000_000
        assert model.plan(kv="f16", n_ctx=1_000_000, memory=80 * 10**9).longest < 200_000


def test_with_8_kv_heads_a_million_tokens_fit_into_22_gb(tmp_path: Path) -> None:
    with open_header(write_header(tmp_path / "shape.gguf", n_kv_heads=8)) as model:
        assert model.plan(kv="skvq", n_ctx=1_000_000, memory=22 * 10**9).fits


@pytest.fixture(scope="module")
def cut_path(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without the last byte of its weights, and without its profile."""
    path = tmp_path_factory.mktemp("cut") / "cut.gguf"
    path.write_bytes(tiny_path.read_bytes()[:-1])
    return path


def test_a_cut_file_plans_as_the_whole_one_does(cut_path: Path, tiny: Model) -> None:
    with open_header(cut_path) as model:
        assert model.info.bytes_weights == tiny.info.bytes_weights
        for scheme in tiny.schemes:
            if scheme.profile == "none":
                options: dict[str, Any] = {"kv": scheme.name, "n_ctx": 5000, "n_threads": 2}
                options["memory"] = 10**8
                assert model.plan(**options) == tiny.plan(**options)


def test_a_cut_file_is_an_error_for_all_but_plans(cut_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected them inside of the \d+ bytes that the file"):
        Model(cut_path)
    with Model(cut_path, header_only=True) as model:
        assert not model.has_weights
        assert model.fingerprint == 0
        with pytest.raises(ValueError, match="ends before its weights do, and a session needs the"):
            model.session()
        with pytest.raises(ValueError, match="ends before its weights do, and reading a tensor"):
            model.tensor("output.weight")


def test_a_whole_file_opened_for_its_header_lacks_nothing(tiny_path: Path, tiny: Model) -> None:
    with Model(tiny_path, header_only=True) as model:
        assert model.has_weights
        assert model.fingerprint == tiny.fingerprint != 0
        with model.session(kv="f16", n_ctx=64) as session:
            session.eval([1, 2])


def test_a_profile_of_a_cut_file_needs_the_model_s_shape_alone(
    cut_path: Path, tiny_path: Path, tiny: Model, tmp_path: Path
) -> None:
    profile = tiny_path.with_name("tiny.kvprofile.gguf")
    options: dict[str, Any] = {"kv": "auto", "n_ctx": 5000, "memory": 10**8, "n_threads": 2}
    with open_header(cut_path) as model, pytest.raises(ValueError, match="needs a profile"):
        model.plan(**options)
    with open_header(cut_path, profile=profile) as model:
        assert model.plan(**options) == tiny.plan(**options)
    other = write_tiny(tmp_path / "other.gguf", d_head=32)
    other.write_bytes(other.read_bytes()[:-1])
    with open_header(other, profile=profile) as model, pytest.raises(ModelError, match="64 wide"):
        model.plan(**options)


def header_length(data: bytes) -> int:
    n_bytes = native.header_bytes("a", data)
    assert n_bytes > 0
    return n_bytes


def test_the_header_ends_where_one_byte_less_is_too_little(tiny_path: Path) -> None:
    data = tiny_path.read_bytes()
    length = header_length(data)
    assert header_length(data[:length]) == length
    for n in (*range(0, 64), *range(64, length, 37), length - 1):
        assert native.header_bytes("a", data[:n]) == 0, n


def test_a_file_that_is_cut_in_its_header_is_an_error(tiny_path: Path, tmp_path: Path) -> None:
    data = tiny_path.read_bytes()
    length = header_length(data)
    path = tmp_path / "cut.gguf"
    for n in (1, 24, 300, length // 2, length - 1):
        path.write_bytes(data[:n])
        with pytest.raises(ModelError), open_header(path):
            pass
    path.write_bytes(data[:length])
    with open_header(path) as model:
        assert model.info.n_layers == 2


def test_bytes_that_are_no_header_are_refused_at_once() -> None:
    with pytest.raises(ModelError, match=r'x\.gguf: begins with "<htm", expected "GGUF"'):
        native.header_bytes("x.gguf", b"<html>")


def test_sizes_that_no_file_has_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vast.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor_info("vast", (2**30, 2**30), np.dtype(np.float32), 2**62)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"tensor vast: 4611686018427387904 bytes .* expected at"):
        native.header_bytes("a", path.read_bytes())


def test_damaged_headers_never_do_more_than_fail(tiny_path: Path, tmp_path: Path) -> None:
    data = tiny_path.read_bytes()
    data = data[: header_length(data)]
    rng = np.random.default_rng(5)
    path, n_opened = tmp_path / "damaged.gguf", 0
    for _ in range(300):
        damaged = bytearray(data)
        for at in rng.integers(len(data) - 1500, len(data), 1 + rng.integers(3)):
            damaged[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))])
        path.write_bytes(damaged)
        with contextlib.suppress(ModelError), open_header(path) as model:
            assert model.plan(n_ctx=100, memory=1).stats.bytes_total < 2**62
            n_opened += 1
    assert 0 < n_opened < 300


# ---- files elsewhere ------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves the files of a folder, in ranges unless it ignores them, and counts what it sent."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.n_sent = 0
        self.ranges = 0
        self.ignores_ranges = False

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Also answers as the Hugging Face hub does for the repository u/r."""

    server: Server

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/u/r"):
            files = [{"rfilename": path.name} for path in self.server.folder.iterdir()]
            body = json.dumps({"id": "u/r", "siblings": files}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        path = self.server.folder / self.path.rpartition("/")[2]
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or self.server.ignores_ranges:
            self.send_response(200)
        elif int(asked[1]) >= len(data):
            self.send_error(416)
            return
        else:
            self.server.ranges += 1
            begin, size = int(asked[1]), len(data)
            data = data[begin : int(asked[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{begin + len(data) - 1}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data)
            self.server.n_sent += len(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of the tiny model; headers are read 1000 bytes at a time at first."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(plan, "_FIRST", 1000)
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(tiny_path.read_bytes())
    with Server(folder) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_of_a_url_only_the_header_is_read(
    server: Server, tiny: Model, tiny_path: Path, ignores_ranges: bool
) -> None:
    server.ignores_ranges = ignores_ranges
    reports: list[tuple[str, int, int]] = []
    with open_header(server.url("tiny.gguf"), progress=lambda *r: reports.append(r)) as model:
        assert not model.has_weights
        options: dict[str, Any] = {"n_ctx": 5000, "memory": 10**8, "n_threads": 2}
        assert model.plan(**options) == tiny.plan(**options)
        path = Path(model.info.path)
    assert not path.parent.exists()
    assert reports == [("header of tiny.gguf", 1, 1)]
    if not ignores_ranges:
        header = header_length(tiny_path.read_bytes())
        assert header <= server.n_sent < 2 * header < tiny_path.stat().st_size
        assert server.ranges > 1


def test_of_a_split_model_every_header_is_read(
    server: Server, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_tiny(tiny, server.folder)
    with open_header(server.url("split-00001-of-00002.gguf")) as model:
        assert len(model.tensors) == len(tiny.tensors)
        assert not model.has_weights
        plans = [m.plan(kv="f16", n_ctx=300, memory=1, n_threads=2) for m in (model, tiny)]
        assert plans[0].stats.bytes_kv == plans[1].stats.bytes_kv


def split_tiny(tiny: Model, folder: Path) -> None:
    """Writes the tiny model's tensors, as f32, into two files, without their data."""
    tensors = tiny.tensors
    for number, part in enumerate((tensors[:5], tensors[5:])):
        writer = GGUFWriter(folder / f"split-0000{number + 1}-of-00002.gguf", "llama")
        if number == 0:
            for key in ("block_count", "context_length", "embedding_length"):
                writer.add_uint32(f"llama.{key}", int(str(tiny.metadata[f"llama.{key}"])))
            writer.add_feed_forward_length(tiny.info.d_ff)
            writer.add_head_count(tiny.info.n_heads)
            writer.add_head_count_kv(tiny.info.n_kv_heads)
            writer.add_key_length(tiny.info.d_head)
            writer.add_value_length(tiny.info.d_head)
            writer.add_layer_norm_rms_eps(1e-5)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in part:
            n_bytes = 4 * int(np.prod(tensor.shape))
            shape = tensor.shape[::-1]
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), n_bytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()


def test_what_is_not_there_or_no_model_is_said(server: Server, tiny_path: Path) -> None:
    with pytest.raises(pykvq.DownloadError, match=r"no\.gguf cannot be read: .*404"):
        read_header(Url(server.url("no.gguf")))
    (server.folder / "page.gguf").write_text("<html>" * 1000)
    with pytest.raises(ModelError, match='begins with "<htm"'):
        read_header(Url(server.url("page.gguf")))
    assert server.n_sent <= 1000
    (server.folder / "cut.gguf").write_bytes(tiny_path.read_bytes()[:1700])
    with pytest.raises(ModelError, match=r"cut\.gguf ends within its header, after 1700 bytes"):
        read_header(Url(server.url("cut.gguf")))
    (server.folder / "short.gguf").write_bytes(tiny_path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"short\.gguf ends within its header, after 1000 bytes"):
        read_header(Url(server.url("short.gguf")))


def test_an_endless_header_is_given_up(
    server: Server, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_MOST", 2000)
    with pytest.raises(ModelError, match="more than 0 MiB, the most that is read"):
        read_header(Url(server.url("tiny.gguf")))


def test_errors_of_a_remote_model_name_it_as_the_user_did(server: Server) -> None:
    writer = GGUFWriter(server.folder / "other.gguf", "gpt9")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    url = server.url("other.gguf")
    match = rf'{url}: architecture "gpt9" is not implemented'
    with pytest.raises(pykvq.UnsupportedError, match=match), open_header(url):
        pass


HUB = """
import sys
from pykvq import plan
plan._FIRST = 1000
with plan.open_header(sys.argv[1]) as model:
    print(model.plan(n_ctx=5000, memory=10**8).longest, model.has_weights)
"""


def test_of_a_repository_of_the_hub_only_the_header_is_read(
    server: Server, tiny: Model, tiny_path: Path, tmp_path: Path
) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface-hub is not installed")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment.update(PYTHONPATH=str(ROOT), HF_HOME=str(tmp_path), HF_ENDPOINT=server.url("")[:-1])
    command = [sys.executable, "-c", HUB, "u/r"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [str(tiny.plan(n_ctx=5000, memory=10**8).longest), "False"]
    assert server.n_sent < tiny_path.stat().st_size / 2
    missing = subprocess.run(
        [*command[:3], "u/none"], capture_output=True, text=True, env=environment, timeout=120
    )
    assert "The repository u/none cannot be fetched" in missing.stderr


# ---- the command ----------------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "pykvq", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_the_command_shows_every_scheme_that_the_model_can_have(tiny_path: Path) -> None:
    status, shown, said = run("plan", str(tiny_path), "-c", "2000", "--memory", "100M")
    assert (status, said) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines()[4:]}
    assert list(rows) == SCHEMES
    assert all(len(cells) == 9 and cells[7] == "yes" for cells in rows.values())
    with Model(tiny_path) as model:
        planned = model.plan(kv="skvq", n_ctx=2000, memory=10**8)
    assert rows["skvq"][5] == f"{planned.stats.bytes_total / 1e6:.2f}"
    assert rows["skvq"][8] == str(planned.longest)


def test_columns_stay_apart_at_the_longest_contexts(tiny_path: Path) -> None:
    most = str(SESSION_RANGES["n_ctx"][1])
    status, shown, _ = run("plan", str(tiny_path), "-c", most, "--memory", "10T", "--kv", "f16")
    heads, cells = shown.splitlines()[3:5]
    assert status == 0 and heads.startswith(f"{most} tokens, GB  ")
    assert cells.split()[-1] == most and len(cells.split()) == 10
    assert len(heads) == len(cells)


def test_the_command_gives_json(tiny_path: Path) -> None:
    options = ("-c", "2000", "--memory", "5MiB", "--kv", "f16,auto,auto:1,f16", "--kv-bits", "1.5")
    status, shown, said = run("plan", str(tiny_path), *options, "-b", "64", "-t", "1", "--json")
    assert (status, said) == (0, "")
    facts = json.loads(shown)
    assert (facts["memory"], facts["n_ctx"], facts["has_weights"]) == (5 * 2**20, 2000, True)
    with Model(tiny_path) as model:
        for entry, bits in zip(facts["plans"], (None, 1.5, 1.0), strict=True):
            planned = model.plan(
                kv=entry["kv"].partition(":")[0],
                kv_bits=bits,
                n_ctx=2000,
                n_batch=64,
                n_threads=1,
                memory=facts["memory"],
            )
            assert entry["longest_n_ctx"] == planned.longest
            assert entry["fits"] is planned.fits
            for name in BYTES:
                assert entry.get(name, getattr(planned.stats, name)) == getattr(planned.stats, name)
            assert entry["bytes_total"] == planned.stats.bytes_total


def test_the_command_shows_what_goes_to_a_gpu(tiny_path: Path) -> None:
    options = ("-c", "2000", "--device", "cuda:1", "-ngl", "1", "--memory", "50M", "--kv", "skvq")
    status, shown, said = run("plan", str(tiny_path), *options)
    assert (status, said) == (0, "")
    assert "\n1 of 2 layers on CUDA device 1, whose memory it is; sealed blocks come in" in shown
    with Model(tiny_path) as model:
        planned = model.plan(
            kv="skvq", n_ctx=2000, device="cuda:1", n_gpu_layers=1, memory=5 * 10**7
        )
    head, row = shown.splitlines()[4:]
    cells = row.split()
    s = planned.stats
    wanted = "2000 tokens, MB weights f16 rows sealed tables scratch GPU host -ngl fits longest"
    assert " ".join(head.split()) == wanted
    sizes = [getattr(s, f"bytes_gpu_{part}") for part in GPU_PARTS] + [s.bytes_gpu, s.bytes_host]
    texts = [f"{n / 1e6:.2f}" for n in sizes]
    assert cells == ["skvq", *texts, "1", "yes", str(planned.longest)]
    facts = json.loads(run("plan", str(tiny_path), *options, "--json")[1])["plans"][0]
    assert facts["longest_n_ctx"] == planned.longest
    assert (facts["gpu"], facts["n_gpu_layers"], facts["gpu_head"]) == (1, 1, False)
    for part in ("", *(f"_{part}" for part in (*GPU_PARTS, "chunk"))):
        assert facts[f"bytes_gpu{part}"] == getattr(s, f"bytes_gpu{part}")
    assert facts["bytes_host"] == s.bytes_host


def test_what_has_no_weights_says_so_and_leaves_out_what_needs_a_profile(cut_path: Path) -> None:
    status, shown, said = run("plan", str(cut_path), "-c", "2000", "--memory", "1G")
    assert (status, said) == (0, "")
    assert "(not in this file)" in shown
    assert re.search(r"^auto +needs a profile$", shown, re.MULTILINE)
    assert re.search(r"^skvq +\d", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("24G", 24 * 10**9),
        ("24GB", 24 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("80g", 80 * 10**9),
        ("500M", 5 * 10**8),
        ("2T", 2 * 10**12),
        ("4k", 4000),
    ],
)
def test_sizes_are_read_in_the_units_that_they_name(text: str, n_bytes: int) -> None:
    assert memory_size(text) == n_bytes


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{tiny}", "--memory", "24"], r"'24' is no size of a memory, expected a number with a un"),
        (["{tiny}", "--memory", "-1G"], r"memory.*expected"),
        (["{tiny}", "--memory", "0G"], r"'0G' is 0 bytes, expected 1 to"),
        (["{tiny}", "--memory", "nanG"], r"'nanG' is no size"),
        (["{tiny}", "--memory", "99999999T"], r"is 1e\+20 bytes, expected 1 to"),
        (["{tiny}", "--kv", "q3"], r"KV scheme 'q3' is unknown"),
        (["{tiny}", "--kv", ","], r"--kv names no scheme"),
        (["{tiny}", "-ngl", "4"], r"-ngl is of use only with --device cuda"),
        (["{tiny}", "--device", "gpu"], r'device is "gpu", expected auto, cpu, cuda or cuda:N'),
        (["{tiny}", "--device", "cuda:63"], r"CUDA device 63 is not here .* \(--memory\)"),
        (["{tiny}", "--kv", "auto:few"], r"'auto:few' gives 'few' to the KV scheme auto, expected"),
        (["{tiny}", "--kv", "skvq:2"], r"'skvq:2' gives bits to the KV scheme skvq"),
        (["{tiny}", "--kv", "auto:0"], r"--kv-bits is 0"),
        (["{tiny}", "--kv", "skvq,f16", "--kv-bits", "2"], r"the bits of skvq, f16 are fixed"),
        (["{tiny}", "--kv", "auto:1.5,f16", "--kv-bits", "2"], r"already: auto:1\.5, f16"),
        (["{tiny}", "--kv", "auto", "--kv-bits", "0.3"], r"0\.3 bits .* auto takes 0\.\d+ to 6"),
        (["{tiny}", "--kv", "auto", "--profile", "none"], r"auto needs a profile of the model"),
        (["{tiny}", "--profile", "no-such"], r"profile no-such is not there"),
        (["{tiny}", "-c", "300000000"], r"300000000 is above 268435456"),
        (["{tiny}", "-c", "many"], r"'many' is not a whole number"),
        (["no-such.gguf"], r"no-such\.gguf is not there"),
        (["http://127.0.0.1:9/m.gguf"], r"http://127\.0\.0\.1:9/m\.gguf cannot be read: Connecti"),
        (["{junk}"], r'junk\.gguf: begins with "junk"'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nonsense_is_refused_in_one_sentence(
    tiny_path: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"junk" * 100)
    places = {"tiny": tiny_path, "junk": junk}
    status, shown, said = run("plan", *(argument.format(**places) for argument in arguments))
    assert (status, shown) == (2, "")
    assert re.fullmatch(rf"pykvq: error: .*{sentence}.*\.\n", said), said


def test_a_scheme_that_cannot_be_planned_is_said_beside_the_others(tiny_path: Path) -> None:
    status, shown, said = run("plan", str(tiny_path), "--kv", "f16,auto", "--profile", "none")
    assert status == 0
    assert re.search(r"^auto +not possible$", shown, re.MULTILINE)
    assert re.fullmatch(r"pykvq: warning: The KV scheme auto needs a profile .*\.\n", said)


def test_rows_are_called_by_their_bits(tiny_path: Path) -> None:
    options = ("--kv", "auto,auto:2,f16", "--kv-bits", "1.5")
    status, shown, _ = run("plan", str(tiny_path), *options)
    assert status == 0
    assert re.findall(r"^(auto\S*|f16) ", shown, re.MULTILINE) == ["auto:1.5", "auto:2", "f16"]


def test_run_refuses_what_cannot_fit_and_says_how_to_insist(tiny_path: Path) -> None:
    arguments = ("run", str(tiny_path), "-p", "a", "-n", "1", "--kv", "f16", "-c", "268435456")
    status, shown, said = run(*arguments)
    assert (status, shown) == (2, "")
    assert re.search(
        r"error: A context of 268435456 tokens under f16 needs .* at most \d+\. "
        r"--no-memory-check tries it anyway\.\n$",
        said,
    )
    status, _, said = run(*arguments, "--no-memory-check")
    assert status == 0 or "The system refused" in said
