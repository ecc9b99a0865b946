"""The PTX that nvcc makes of our kernels, interpreted, against the C core: small cases of each.

The simulator (tests/cuda/test_*.cpp) covers all codecs, shapes and edges; here what it cannot see
is run at all: inline assembly, NVIDIA's headers, what the compiler made of the source.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda"))
from ptx import Counts, find_nvcc
from ptx.cases import attend_case
from ptx.harness import ARCHITECTURES, CORE_LIBRARY, KERNELS, Bench, core

Array = npt.NDArray[Any]
BLOCK = 64
CACHE_THREADS = 128

pytestmark = [
    pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc on this machine"),
    pytest.mark.skipif(not CORE_LIBRARY.exists(), reason=f"`make lib` has not made {CORE_LIBRARY}"),
]


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (KERNELS / f"{name}.cu").exists(), reason=f"there is no core/cuda/kernels/{name}.cu"
    )


@pytest.fixture(params=ARCHITECTURES)
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


# ---- attention ----------------------------------------------------------------------------------

ATTENTION: list[dict[str, Any]] = [
    {"keys": "u2", "values": "c8"},
    {"keys": "mixed", "values": "t2", "d_head": 128, "n_waves": 3, "held": 150},
    {"keys": "f16", "values": "f16", "n": 3, "held": 0},
    {"keys": "q8_0", "values": "q4_0", "d_head": 96, "held": 64},
    {"keys": "nf4", "values": "n3", "d_head": 80, "held": 149},
    {"keys": "u4", "values": "t1", "d_head": 256, "held": 90, "group": 2},
    {"keys": "u1", "values": "n2", "n": 40, "held": 90},
]


ONE_TOKEN: list[dict[str, Any]] = [
    {"keys": "f16", "values": "f16", "d_head": 128},
    {"keys": "u2", "values": "c8", "d_head": 128},
    {"keys": "u2", "values": "t2"},
    {"keys": "u1", "values": "t1"},
    {"keys": "u4", "values": "t2", "d_head": 80},
    {"keys": "mixed", "values": "t2", "d_head": 128, "n_waves": 3},
]


@needs("decode")
@needs("merge")
@pytest.mark.parametrize("case", ONE_TOKEN, ids=lambda case: f"{case['keys']}-{case['values']}")
def test_attention_of_one_token_is_that_of_the_cpu(bench: Bench, case: dict[str, Any]) -> None:
    found, wanted, _ = attend_case(bench, "decode", n_splits=3, **case)
    assert np.abs(found - wanted).max() <= 1.5e-3 * np.abs(wanted).max()


@needs("attend")
@needs("merge")
@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: f"{case['keys']}-{case['values']}")
def test_attention_is_that_of_the_cpu(bench: Bench, case: dict[str, Any]) -> None:
    found, wanted, _ = attend_case(bench, "attend", **case)
    assert np.abs(found - wanted).max() <= 1.5e-3 * np.abs(wanted).max()


# ---- the cache ----------------------------------------------------------------------------------


def codec_names() -> list[str]:
    ffi, lib = core().ffi, core().lib
    return [ffi.string(lib.reference_codec_name(i)).decode() for i in range(lib.KVQ_CODECS)]


class Layer:
    """A layer of which each KV head has another codec (keys and values the same) and basis."""

    def __init__(self, bench: Bench, d: int, codecs: Sequence[int], **fields: int) -> None:
        ffi, lib = core().ffi, core().lib
        self.bench, self.d, self.codecs = bench, d, [*codecs, *codecs]
        n = len(self.codecs)
        self.shapes = ffi.new("kvq_kv_shape[]", n)
        for shape, codec in zip(self.shapes, self.codecs, strict=True):
            shape.d, shape.group = d, d
            if codec == lib.KVQ_CODEC_mixed:
                shape.run = [4, 12, d // 4, d // 4]
        self.tracks = ffi.new("kvq_cuda_track[]", n)
        self.block_bytes = lib.reference_place(self.tracks, self.codecs, self.shapes, n)
        rng = np.random.default_rng(d)
        self.held, self.new = fields["held"], fields["n"]
        self.rows = rng.normal(size=(2, len(codecs), self.held + self.new, d)).astype(np.float16)
        self.cache = ffi.new("kvq_cuda_cache *")
        self.cache.d = self.cache.d_head = d
        self.cache.n_heads, self.cache.group, self.cache.chunk_blocks = len(codecs), 2, 2
        self.cache.n_sinks, self.cache.recent_rows = 2, 100
        self.cache.n_batch = self.new + 3
        step = [self.new, self.held, fields.get("sealed", 0), fields.get("seals", 0)]
        self.cache.step = bench.share(np.array(step, np.int32), "step")
        self.chunk = bench.empty(2 * self.block_bytes, "chunk")
        self.cache.chunks = bench.share(
            np.array([int(ffi.cast("uintptr_t", self.chunk))]), "chunks"
        )

    def share_tracks(self) -> None:
        data = np.frombuffer(core().ffi.buffer(self.tracks), np.uint8)
        self.cache.tracks = self.bench.share(data, "tracks")

    def share_rows(self, written: bool) -> None:
        """Recent rows in their slots, and those of the pass."""
        cache, heads = self.cache, len(self.codecs) // 2
        for side in range(2):
            slots = np.zeros((heads, cache.recent_rows, self.d), np.float16)
            for i in range(self.held - cache.n_sinks):
                slots[:, i % cache.recent_rows] = self.rows[side, :, i + cache.n_sinks]
            new = np.zeros((heads, cache.n_batch, self.d), np.float16)
            new[:, : self.new] = self.rows[side, :, self.held :]
            sinks = np.ascontiguousarray(self.rows[side, :, : cache.n_sinks])
            share = self.bench.share
            cache.sinks[side] = share(sinks, "sinks", read_only=not written)
            cache.recent[side] = share(slots, "recent rows", read_only=not written)
            cache.new_rows[side] = share(new, "new rows")


@needs("cache")
@pytest.mark.parametrize("d", [64, 96])
def test_blocks_are_sealed_to_the_byte(bench: Bench, d: int) -> None:
    ffi, lib = core().ffi, core().lib
    names = codec_names()
    codecs = [i for i in range(len(names)) if d % lib.reference_codec_multiple(i) == 0]
    layer = Layer(bench, d, codecs, held=40, n=40, seals=1)
    layer.share_tracks()
    layer.share_rows(written=False)
    arguments = ffi.new("kvq_cuda_seal_args *", {"cache": layer.cache[0]})
    scratch = max(3 * d + 2 * BLOCK * (d // 32), 2 * BLOCK + BLOCK // 4 * 129 + 16)
    shared = BLOCK * (d + 2) * 2 + scratch * 4
    bench.launch(
        "cache",
        "kvq_cuda_seal",
        (2 * len(codecs), 1),
        CACHE_THREADS,
        arguments[0],
        dynamic_shared=shared,
    )
    chunk = bench.get(layer.chunk, 2 * layer.block_bytes, "u1")
    address = int(ffi.cast("uintptr_t", layer.chunk))
    written = bench.device.written(address, len(chunk))
    expected = np.zeros(len(chunk), bool)
    for i, codec in enumerate(layer.codecs):
        side, head = divmod(i, len(codecs))
        rows = np.ascontiguousarray(layer.rows[side, head, 2 : 2 + BLOCK])
        n_bytes = lib.reference_codec_bytes(codec, layer.shapes[i : i + 1])
        wanted = np.zeros(n_bytes, np.uint8)
        lib.reference_encode(
            codec,
            ffi.cast("uint8_t *", wanted.ctypes.data),
            ffi.cast("uint16_t *", rows.ctypes.data),
            layer.shapes[i : i + 1],
        )
        at = 2 * layer.tracks[i].bytes_before + layer.tracks[i].lead
        assert np.array_equal(chunk[at : at + n_bytes], wanted), (names[codec], side)
        expected[at : at + n_bytes] = True
    assert not (written & ~expected).any()


@needs("cache")
@pytest.mark.parametrize(("held", "n"), [(0, 5), (40, 7), (30, 120)])
def test_rows_are_appended(bench: Bench, held: int, n: int) -> None:
    layer = Layer(bench, 64, [0, 0], held=max(held, 2), n=n)
    layer.share_tracks()
    layer.share_rows(written=True)
    cache = layer.cache
    first = layer.held
    arguments = core().ffi.new("kvq_cuda_append_args *", {"cache": cache[0]})
    bench.launch(
        "cache", "kvq_cuda_append", (4, -(-cache.n_batch // 4)), CACHE_THREADS, arguments[0]
    )
    for side in range(2):
        recent = bench.get(cache.recent[side], (2, cache.recent_rows, 64), "f2")
        for i in range(max(first + n - 2 - cache.recent_rows, 0), first + n - 2):
            wanted = layer.rows[side, :, 2 + i]
            assert np.array_equal(recent[:, i % cache.recent_rows], wanted), (side, i)


@needs("cache")
@pytest.mark.parametrize("n", [1, 5])
def test_vectors_go_into_the_basis_of_the_cache(bench: Bench, n: int) -> None:
    ffi, lib = core().ffi, core().lib
    d, heads, group = 64, 4, 2
    layer = Layer(bench, d, [0] * heads, held=2, n=n)
    rng = np.random.default_rng(n)
    matrices = rng.normal(size=(2, heads, 2, d, d)).astype(np.float32) / 8
    order = np.stack([rng.permutation(d) for _ in range(heads)]).astype(np.uint16)
    means = rng.normal(size=(2, heads, d)).astype(np.float32)
    for i, track in enumerate(layer.tracks):
        side, head = divmod(i, heads)
        track.basis = head  # identity, hadamard, permuted, calibrated
        if head == lib.KVQ_BASIS_permuted:
            track.order = bench.share(order[head], "order")
        if head == lib.KVQ_BASIS_calibrated:
            track.store = bench.share(matrices[side, head, 0], "store")
            track.query = bench.share(matrices[side, head, 1], "query")
            track.mean = bench.share(means[side, head], "mean")
    layer.share_tracks()
    q = rng.normal(size=(n, heads * group, d)).astype(np.float32)
    kv = rng.normal(size=(2, n, heads, d)).astype(np.float32)
    cache = layer.cache
    for side in range(2):
        cache.new_rows[side] = bench.empty(heads * cache.n_batch * d * 2, "new rows")
    prepared = bench.empty(heads * cache.n_batch * group * d * 4, "prepared")
    arguments = ffi.new(
        "kvq_cuda_prepare_args *",
        {
            "cache": cache[0],
            "q": bench.share(q, "q"),
            "k": bench.share(kv[0], "k"),
            "v": bench.share(kv[1], "v"),
            "prepared": prepared,
        },
    )
    grid = (-(-cache.n_batch * group // 8), heads, 3)
    bench.launch(
        "cache", "kvq_cuda_prepare", grid, CACHE_THREADS, arguments[0], dynamic_shared=16 * d * 4
    )

    def wanted(what: int, side: int, head: int, x: Array) -> Array:
        x = np.ascontiguousarray(x)
        pointers = [
            ffi.cast(kind, array.ctypes.data)
            for kind, array in (
                ("uint16_t *", order[head]),
                ("float *", matrices[side, head, what]),
                ("float *", means[side, head]),
                ("float *", x),
            )
        ]
        lib.reference_basis(what, head, *pointers, len(x), d)
        return x

    found = bench.get(prepared, (heads, cache.n_batch * group, d), "f4")[:, : n * group]
    for head in range(heads):
        mine = q.reshape(n, heads, group, d)[:, head].reshape(n * group, d)
        scaled = mine * np.float32(1 / np.sqrt(np.float32(d)))
        assert np.array_equal(found[head], wanted(1, 0, head, scaled)), head
        for side in range(2):
            rows = bench.get(cache.new_rows[side], (heads, cache.n_batch, d), "f2")[head, :n]
            stored = wanted(0, side, head, kv[side][:, head])
            assert np.array_equal(rows, stored.astype(np.float16)), (head, side)


def test_counts_grow_with_the_context() -> None:
    def counted(held: int) -> Counts:
        return attend_case(Bench("compute_80"), "attend", keys="u2", values="c8", held=held)[2]

    short, long = counted(200), counted(328)
    assert long.instructions > short.instructions and long.dram_bytes > short.dram_bytes
