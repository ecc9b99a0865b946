"""The cost model of CUDA kernels: what it makes of counts."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cuda"))
import cuda_cost
from ptx import find_nvcc, parse
from ptx.harness import CORE_LIBRARY
from ptx.snippets import entry

FREE = cuda_cost.Cost(0.0, {}, 0.0, 0.0, 64.0, 64.0, {})


@pytest.mark.parametrize("gpu", cuda_cost.GPUS, ids=lambda gpu: gpu.name)
def test_each_unit_has_its_own_time_and_the_longest_counts(gpu: cuda_cost.Gpu) -> None:
    clocks_per_ns = gpu.n_sm * gpu.ghz
    found = cuda_cost.report(FREE, gpu, 512.0)
    assert found["bound_by"] == "memory" and found["times_memory_bound"] == 1
    assert found["ns_f16_memory"] == pytest.approx(8 * found["ns_memory"], rel=1e-2)
    slow = 1e6
    for kind, per_clock, unit in (
        ("mufu", 16, "special function"),
        ("logic", 64, "integer and logic"),
        ("dp4a", 64, "multiply-add"),
        ("ldg", 32, "load and store"),
    ):
        cost = dataclasses.replace(FREE, by_kind={kind: slow})
        found = cuda_cost.report(cost, gpu, 512.0)
        assert found["bound_by"] == unit
        assert found["ns"] == pytest.approx(slow * 32 / per_clock / clocks_per_ns, rel=1e-4)
    found = cuda_cost.report(dataclasses.replace(FREE, issued=slow), gpu, 512.0)
    assert found["bound_by"] == "issue"
    assert found["ns"] == pytest.approx(slow / 4 / clocks_per_ns, rel=1e-4)
    found = cuda_cost.report(dataclasses.replace(FREE, products=slow), gpu, 512.0)
    assert found["ns"] == pytest.approx(slow / gpu.fma16 / clocks_per_ns, rel=1e-4)


def test_statements_have_the_slots_of_what_they_become() -> None:
    body = """
    mov.u32 %r1, 5; add.s32 %r2, %r1, %r1; add.s64 %d1, %d0, 8; bfe.u32 %r2, %r1, 3, 4;
    mul.lo.s64 %d1, %d1, %d1; mul.wide.s32 %d1, %r1, 4; div.s32 %r2, %r1, %r2;
    cvt.f32.f16 %f1, %h1; ld.global.u32 %r1, [%d1];
    """
    statements = parse(entry(body, 1)).kernels["k"].statements[1:-1]
    assert [cuda_cost.slots(statement) for statement in statements] == [0, 1, 2, 2, 4, 1, 20, 1, 1]
    assert cuda_cost.kind_of(statements[-2]) == "half to float"


@pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc on this machine")
@pytest.mark.skipif(not CORE_LIBRARY.exists(), reason=f"`make lib` has not made {CORE_LIBRARY}")
def test_a_token_moves_what_is_stored_of_it_and_little_more() -> None:
    cost = cuda_cost.cost_of("attend", "u2", "c8", d_head=64, group=4, architecture="compute_80")
    assert cost.bytes_stored <= cost.bytes_moved < 1.1 * cost.bytes_stored
    assert cost.products > 0 and cost.issued > 0
    assert sum(cost.by_line.values()) == pytest.approx(cost.issued)
