"""The PTX of the products of weights and of what stands between them, interpreted, against the C
core and numpy: small cases of each kernel."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda"))
from ptx import find_nvcc
from ptx.harness import ARCHITECTURES, CORE_LIBRARY, KERNELS, Bench, core

Array = npt.NDArray[Any]
FORMATS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
THREADS = 256  # of the elementwise kernels

pytestmark = [
    pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc on this machine"),
    pytest.mark.skipif(not CORE_LIBRARY.exists(), reason=f"`make lib` has not made {CORE_LIBRARY}"),
    pytest.mark.skipif(
        not (KERNELS / "matvec.cu").exists(), reason="there is no core/cuda/kernels/matvec.cu"
    ),
]


@pytest.fixture(params=ARCHITECTURES)
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(request.param)


class Weights:
    """Rows of a format with random codes and scales that are neither infinite nor NaN."""

    def __init__(self, name: str, n_rows: int, n_cols: int) -> None:
        ffi, lib = core().ffi, core().lib
        kinds = range(lib.reference_weight_kinds())
        names = [ffi.string(lib.reference_weight_name(i)).decode() for i in kinds]
        self.kind, self.n_rows, self.n_cols = names.index(name), n_rows, n_cols
        rng = np.random.default_rng(self.kind)
        n_bytes = n_rows * lib.reference_weight_bytes(self.kind, n_cols)
        self.bytes = rng.integers(0, 256, n_bytes).astype(np.uint8)
        if name in ("F32", "F16", "BF16"):
            values = rng.normal(size=n_rows * n_cols).astype(np.float32) / 8
            if name == "F16":
                self.bytes = values.astype(np.float16).view(np.uint8)
            elif name == "BF16":
                self.bytes = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
            else:
                self.bytes = values.view(np.uint8)
        else:
            per_row = lib.reference_weight_bytes(self.kind, 256) * n_cols // 256
            size = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}.get(name)
            size = size or lib.reference_weight_bytes(self.kind, 32)
            blocks = self.bytes.reshape(n_rows * per_row // size, size)
            n_scales = 2 if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else 1
            scales = rng.uniform(-0.02, 0.02, (len(blocks), n_scales)).astype(np.float16)
            at = 208 if name == "Q6_K" else 0
            blocks[:, at : at + 2 * n_scales] = scales.view(np.uint8)
        self.values = np.zeros((n_rows, n_cols), np.float32)
        for row, data in zip(self.values, self.bytes.reshape(n_rows, -1), strict=True):
            lib.reference_dequantize(
                self.kind,
                ffi.cast("float *", row.ctypes.data),
                ffi.cast("uint8_t *", data.ctypes.data),
                n_cols,
            )


def matmul_arguments(
    bench: Bench, weights: Weights, x: Array, bias: Array | None
) -> tuple[Any, Any]:
    """The struct of a product with one matrix, and the pointer to the result [n][n_rows]."""
    n = len(x)
    y = bench.empty(n * weights.n_rows * 4, "y")
    arguments = core().ffi.new("kvq_cuda_matmul_args *")
    matrix = arguments.matrices[0]
    matrix.w, matrix.y = bench.share(weights.bytes, "weights"), y
    matrix.n_rows = matrix.y_stride = weights.n_rows
    if bias is not None:
        matrix.bias = bench.share(bias, "bias")
    arguments.x, arguments.n, arguments.n_cols = bench.share(x, "x"), n, weights.n_cols
    arguments.n_matrices = 1
    return arguments, y


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("n", [1, 3])
def test_products_of_few_tokens(bench: Bench, name: str, n: int) -> None:
    weights = Weights(name, 5, 512)
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, 512)).astype(np.float32)
    bias = rng.normal(size=5).astype(np.float32) if n == 3 else None
    arguments, y = matmul_arguments(bench, weights, x, bias)
    shape = core().lib.reference_matvec_shape(arguments, 1)
    bench.launch(
        "matvec",
        f"kvq_cuda_matvec_{name}_{1 if n == 1 else 4}",
        (shape.blocks, shape.blocks_y),
        shape.threads,
        arguments[0],
        dynamic_shared=shape.shared_bytes,
    )
    exact = x.astype(np.float64) @ weights.values.astype(np.float64).T
    size = np.abs(x).astype(np.float64) @ np.abs(weights.values).astype(np.float64).T
    wanted = exact + (0 if bias is None else bias)
    assert (np.abs(bench.get(y, (n, 5), "f4") - wanted) <= 1e-5 * (size + 1)).all()


@pytest.mark.skipif(not (KERNELS / "gemm.cu").exists(), reason="there is no gemm.cu")
@pytest.mark.parametrize("name", FORMATS)
def test_products_of_many_tokens(bench: Bench, name: str) -> None:
    weights, n = Weights(name, 20, 256), 9
    x = np.random.default_rng(9).normal(size=(n, 256)).astype(np.float32)
    halves, unscale = bench.empty(n * 256 * 2, "halves"), bench.empty(n * 4, "unscale")
    arguments, y = matmul_arguments(bench, weights, x, None)
    halving = core().ffi.new(
        "kvq_cuda_halve_args *",
        {"x": arguments.x, "halves": halves, "unscale": unscale, "n": n, "n_cols": 256},
    )
    bench.launch("gemm", "kvq_cuda_halve", n, 256, halving[0])
    back = bench.get(halves, (n, 256), "f2") * bench.get(unscale, (n, 1), "f4")
    assert np.allclose(back, x, rtol=2.0**-11, atol=1e-6)
    arguments.halves, arguments.unscale = halves, unscale
    shape = core().lib.reference_gemm_shape(arguments)
    bench.launch(
        "gemm",
        f"kvq_cuda_gemm_{name}",
        (shape.blocks, shape.blocks_y),
        shape.threads,
        arguments[0],
        dynamic_shared=shape.shared_bytes,
    )
    exact = x.astype(np.float64) @ weights.values.astype(np.float64).T
    size = np.abs(x).astype(np.float64) @ np.abs(weights.values).astype(np.float64).T
    assert (np.abs(bench.get(y, (n, 20), "f4") - exact) <= 2.0**-9 * size).all()


def test_norm_gate_and_rotation(bench: Bench) -> None:
    rng = np.random.default_rng(3)
    n, d = 3, 300
    x, gate, up = (rng.normal(size=(n, d)).astype(np.float32) for _ in range(3))
    w = rng.normal(size=d).astype(np.float32)
    ffi = core().ffi
    y = bench.empty(n * d * 4, "y")
    norm = ffi.new(
        "kvq_cuda_norm_args *",
        {
            "x": bench.share(x, "x"),
            "w": bench.share(w, "w"),
            "y": y,
            "epsilon": 1e-5,
            "n": n,
            "d_model": d,
        },
    )
    bench.launch("elementwise", "kvq_cuda_norm", n, THREADS, norm[0])
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-5) * w
    assert np.allclose(bench.get(y, (n, d), "f4"), wanted, rtol=1e-5, atol=1e-6)

    pointer = bench.share(gate, "gate", read_only=False)
    arguments = ffi.new(
        "kvq_cuda_gate_args *", {"gate": pointer, "up": bench.share(up, "up"), "n": n, "d_ff": d}
    )
    bench.launch("elementwise", "kvq_cuda_gate", (-(-d // THREADS), n), THREADS, arguments[0])
    wanted = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    assert np.allclose(bench.get(pointer, (n, d), "f4"), wanted, rtol=1e-5, atol=1e-6)

    for neox in (0, 1):
        rotate(bench, neox)


def rotate(bench: Bench, neox: int) -> None:
    rng = np.random.default_rng(neox)
    n, heads, kv_heads, d_head, d_rope = 2, 3, 1, 64, 48
    q = rng.normal(size=(n, heads, d_head)).astype(np.float32)
    k = rng.normal(size=(n, kv_heads, d_head)).astype(np.float32)
    angles = rng.uniform(0, 7, (n, d_rope // 2))
    cos_sin = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    pointers = [bench.share(a, name, read_only=False) for a, name in ((q, "q"), (k, "k"))]
    arguments = core().ffi.new(
        "kvq_cuda_rotate_args *",
        {
            "q": pointers[0],
            "k": pointers[1],
            "cos_sin": bench.share(cos_sin, "cos and sin"),
            "n": n,
            "n_heads": heads,
            "n_kv_heads": kv_heads,
            "d_head": d_head,
            "d_rope": d_rope,
            "neox": neox,
        },
    )
    grid = (-(-(heads + kv_heads) * d_rope // 2 // THREADS), n)
    bench.launch("elementwise", "kvq_cuda_rotate", grid, THREADS, arguments[0])
    half = np.arange(d_rope // 2)
    first, second = (half, half + d_rope // 2) if neox else (2 * half, 2 * half + 1)
    c, s = cos_sin[:, None, :, 0], cos_sin[:, None, :, 1]
    for x, pointer in ((q, pointers[0]), (k, pointers[1])):
        wanted = x.copy()
        wanted[..., first] = x[..., first] * c - x[..., second] * s
        wanted[..., second] = x[..., first] * s + x[..., second] * c
        assert np.allclose(bench.get(pointer, x.shape, "f4"), wanted, atol=1e-5)
