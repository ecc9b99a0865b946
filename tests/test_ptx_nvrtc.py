"""The PTX of the image for drivers of CUDA 12, interpreted: of each module a case or two of those
that run on nvcc's. It is NVRTC's, which is another compiler and has none of the host's headers."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import test_ptx_kernels as kernels
import test_ptx_weights as weights
from ptx import harness, parser

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.skipif(
        not find_spec("nvidia") or not find_spec("nvidia.cuda_nvrtc"),
        reason="NVRTC of CUDA 12 is not installed: `make cuda` does",
    ),
    pytest.mark.skipif(
        not harness.CORE_LIBRARY.exists(), reason=f"`make lib` has not made {harness.CORE_LIBRARY}"
    ),
]


@functools.cache
def by_nvrtc(module: str, architecture: str) -> parser.Module:
    """core/cuda/kernels/MODULE.cu as core/cuda/build_image_12.py compiles it."""
    spec = spec_from_file_location("build_image_12", ROOT / "core" / "cuda" / "build_image_12.py")
    assert spec and spec.loader
    builder = module_from_spec(spec)
    sys.modules[spec.name] = builder
    spec.loader.exec_module(builder)
    text = builder.compile_module(
        builder.Library("cuda_nvrtc", "libnvrtc.so.12"),
        harness.KERNELS / f"{module}.cu",
        architecture.removeprefix("compute_"),
        [f"-{flag}" for flag in harness.module_flags(module)],  # as images.mk: --fmad=false
        binary=False,
    )
    return parser.parse(text.rstrip(b"\0").decode())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> harness.Bench:
    monkeypatch.setattr(harness, "kernels_of", by_nvrtc)
    return harness.Bench("compute_80")


CASES: dict[str, Callable[[harness.Bench], None]] = {
    "decode-u2-c8": lambda bench: kernels.test_attention_of_one_token_is_that_of_the_cpu(
        bench, {"keys": "u2", "values": "c8"}
    ),
    "decode-mixed-t2": lambda bench: kernels.test_attention_of_one_token_is_that_of_the_cpu(
        bench, {"keys": "mixed", "values": "t2", "n_waves": 3}
    ),
    "attend": lambda bench: kernels.test_attention_is_that_of_the_cpu(
        bench, {"keys": "u2", "values": "c8"}
    ),
    "seal": lambda bench: kernels.test_blocks_are_sealed_to_the_byte(bench, 64),
    "append": lambda bench: kernels.test_rows_are_appended(bench, 0, 5),
    "prepare": lambda bench: kernels.test_vectors_go_into_the_basis_of_the_cache(bench, 1),
    "matvec": lambda bench: weights.test_products_of_few_tokens(bench, "Q4_0", 3),
    "gemm": lambda bench: weights.test_products_of_many_tokens(bench, "Q4_0"),
    "elementwise": weights.test_norm_gate_and_rotation,
}


@pytest.mark.parametrize("name", CASES)
def test_what_nvrtc_makes_of_a_kernel_does_as_the_cpu(bench: harness.Bench, name: str) -> None:
    CASES[name](bench)
