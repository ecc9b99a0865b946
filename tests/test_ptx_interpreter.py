"""The interpreter of PTX: memory, warps, control flow and counts; and that it ends a program that
does what it must not, with a sentence that says where."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda"))
from ptx import Device, PtxError, compile_ptx, find_nvcc, parse
from ptx.snippets import HEADER, entry, run

Array = npt.NDArray[Any]
ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "core" / "cuda" / "kernels"
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="there is no nvcc on this machine")

# out[thread of the grid] = %r9, 4 bytes; the output is the last parameter.
STORE = """
    mov.u32 %r30, %ctaid.x; mov.u32 %r31, %ntid.x; mad.lo.u32 %r30, %r30, %r31, %r0;
    ld.param.u64 %d30, [p{}]; mad.wide.u32 %d30, %r30, 4, %d30; st.global.u32 [%d30], %r9;
"""


def words(body: str, n: int, *inputs: Array, grid: int = 1, **more: Any) -> list[int]:
    """Runs a body that leaves a word per thread in %r9."""
    body += STORE.replace("{}", str(len(inputs)))
    out = np.zeros(n * grid, np.uint32)
    found: list[int] = run(body, inputs, out, n, grid=grid, **more)[0].tolist()
    return found


def at(i: int, size: int, register: str = "%d0") -> str:
    """PTX: the address of this thread's element of input i."""
    return f"ld.param.u64 {register}, [p{i}]; mad.wide.u32 {register}, %r0, {size}, {register};\n"


# ---- memory -------------------------------------------------------------------------------------


def test_vectors_and_narrow_values_are_loaded_and_stored() -> None:
    given = np.arange(64, dtype=np.uint32).reshape(16, 4) * 0x01020304
    body = f"""
    {at(0, 16)} ld.global.nc.v4.u32 {{%r1, %r2, %r3, %r4}}, [%d0];
    {at(1, 16, "%d1")} st.global.v2.u32 [%d1], {{%r4, %r3}};
    st.global.u8 [%d1+8], %r2; st.global.u8 [%d1+9], 7; st.global.u16 [%d1+10], %r1;
    ld.global.s8 %r5, [%d0+15]; st.global.u32 [%d1+12], %r5;
    """
    found, counts = run(body, [given], np.zeros((16, 4), np.uint32), 16)
    assert np.array_equal(found[:, 0], given[:, 3]) and np.array_equal(found[:, 1], given[:, 2])
    third = (given[:, 1] & 255) | 7 << 8 | (given[:, 0] & 0xFFFF) << 16
    assert np.array_equal(found[:, 2], third)
    top = (given[:, 3] >> 24).astype(np.uint8).view(np.int8).astype(np.int32)
    assert np.array_equal(found[:, 3].view(np.int32), top)
    assert (counts.bytes_read, counts.bytes_written) == (16 * 17, 16 * 16)


def test_parameters_are_structs_that_are_read_at_offsets_and_by_address() -> None:
    text = f"""{HEADER}
    .visible .entry k(.param .align 8 .b8 a[24], .param .u32 n)
    {{
        .reg .b32 %r<9>; .reg .b64 %d<9>; .reg .f32 %f<9>;
        ld.param.u64 %d0, [a];
        ld.param.v2.f32 {{%f1, %f2}}, [a+8];
        mov.b64 %d1, a;
        mov.u32 %r0, %tid.x;
        mad.wide.u32 %d2, %r0, 4, %d1;
        ld.param.u32 %r1, [%d2+16];
        cvta.param.u64 %d3, %d1;
        mad.wide.u32 %d3, %r0, 4, %d3;
        ld.u32 %r2, [%d3+16];
        ld.param.u32 %r3, [n];
        mad.wide.u32 %d0, %r0, 20, %d0;
        st.global.u32 [%d0], %r1; st.global.u32 [%d0+4], %r2;
        st.global.f32 [%d0+8], %f1; st.global.f32 [%d0+12], %f2; st.global.u32 [%d0+16], %r3;
        ret;
    }}"""
    device = Device()
    module, out = device.load(text), device.allocate(40, "out")
    fields = np.zeros(1, [("p", "u8"), ("x", "f4", 2), ("i", "u4", 2)])
    fields["p"], fields["x"], fields["i"] = out, [1.5, -2], [11, 12]
    device.launch(module, "k", 1, 2, fields.tobytes(), np.uint32(9))
    found = device.get(out, (2, 5), np.uint32)
    assert found[:, 0].tolist() == found[:, 1].tolist() == [11, 12]
    assert found[:, 2:4].view(np.float32).tolist() == [[1.5, -2]] * 2
    assert found[:, 4].tolist() == [9, 9]
    with pytest.raises(PtxError, match="a has 24 bytes, given 23"):
        device.launch(module, "k", 1, 2, bytes(23), np.uint32(9))
    with pytest.raises(PtxError, match="takes 2 parameters, given 1"):
        device.launch(module, "k", 1, 2, bytes(24))


def test_variables_of_a_module_have_their_values() -> None:
    outside = """
    .const .align 4 .b8 bytes[8] = {1, 2, 3, 4, 0xff};
    .global .align 4 .f32 numbers[2] = {0f3F800000, 0fC0000000};
    .global .align 8 .u64 pointers[2] = {bytes, generic(numbers)};
    """
    body = """
    and.b32 %r1, %r0, 1; mul.wide.u32 %d0, %r1, 4; mov.u64 %d1, bytes; add.s64 %d1, %d1, %d0;
    ld.const.u32 %r2, [%d1];
    ld.global.u64 %d2, [pointers+8]; add.s64 %d2, %d2, %d0; ld.u32 %r3, [%d2];
    ld.const.u8 %r4, [bytes+1];
    setp.lt.u32 %p0, %r0, 2; selp.b32 %r9, %r2, %r3, %p0;
    setp.eq.u32 %p0, %r0, 4; selp.b32 %r9, %r4, %r9, %p0;
    """
    found = words(body, 5, outside=outside)
    assert found == [0x04030201, 0xFF, 0x3F800000, 0xC0000000, 2]


def test_shared_memory_is_of_a_block_and_local_memory_of_a_thread() -> None:
    body = """
    .shared .align 4 .b8 here[128];
    .local .align 4 .b8 own[8];
    mov.u32 %r1, %ctaid.x; mad.lo.u32 %r1, %r1, 100, %r0;
    mov.u32 %r2, here; mad.lo.u32 %r3, %r0, 4, %r2; st.shared.u32 [%r3], %r1;
    mov.u64 %d1, own; cvta.local.u64 %d2, %d1; st.u32 [%d2+4], %r0;
    bar.sync 0;
    xor.b32 %r4, %r0, 33; and.b32 %r4, %r4, 31; mad.lo.u32 %r4, %r4, 4, %r2;
    cvt.u64.u32 %d3, %r4; cvta.shared.u64 %d3, %d3;
    ld.u32 %r5, [%d3]; ld.local.u32 %r6, [own+4];
    mad.lo.u32 %r9, %r6, 1000, %r5;
    """
    wanted = [1000 * t + 100 * b + (t ^ 1) for b in range(3) for t in range(32)]
    assert words(body, 32, grid=3) == wanted


def test_dynamic_shared_memory_follows_the_static() -> None:
    outside = ".extern .shared .align 16 .b8 dynamic[];\n"
    body = """
    .shared .align 4 .b8 fixed[20];
    mov.u32 %r1, fixed; mov.u32 %r2, dynamic; sub.u32 %r9, %r2, %r1;
    mad.lo.u32 %r2, %r0, 4, %r2; st.shared.u32 [%r2], %r0;
    """
    assert words(body, 4, outside=outside, dynamic_shared=16) == [32] * 4
    with pytest.raises(PtxError, match="out of bounds"):
        words(body, 5, outside=outside, dynamic_shared=16)
    with pytest.raises(PtxError, match="bytes of shared memory"):
        words(body, 4, outside=outside, dynamic_shared=48 << 10)


def test_atomics_take_their_turn() -> None:
    body = """
    .shared .align 4 .b8 sums[8];
    setp.lt.u32 %p0, %r0, 2; mov.u32 %r1, sums; mad.lo.u32 %r2, %r0, 4, %r1;
    @%p0 st.shared.u32 [%r2], 5;
    bar.sync 0;
    and.b32 %r3, %r0, 1; mad.lo.u32 %r3, %r3, 4, %r1;
    atom.shared.add.u32 %r4, [%r3], %r0;
    red.shared.max.u32 [%r1], 3;
    bar.sync 0;
    ld.shared.v2.u32 {%r5, %r6}, [%r1]; mad.lo.u32 %r9, %r5, 1000, %r6;
    """
    evens, odds = sum(range(0, 40, 2)), sum(range(1, 40, 2))
    assert words(body, 40) == [(5 + evens) * 1000 + 5 + odds] * 40


COPY = """
    .shared .align 16 .b8 tile[1024];
    mov.u32 %r1, tile; mad.lo.u32 %r2, %r0, 16, %r1;
    ld.param.u64 %d0, [p0]; mad.wide.u32 %d0, %r0, 16, %d0;
    cp.async.cg.shared.global [%r2], [%d0], 16;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r2+512], [%d0+512], 8, 4;
    cp.async.commit_group;
"""


def test_copies_land_when_their_group_is_waited_for() -> None:
    given = np.arange(256, dtype=np.uint32)
    read = "ld.shared.u32 %r9, [%r2+12];"
    later = "ld.shared.u32 %r9, [%r2+516];"
    assert words(COPY + "cp.async.wait_group 1;" + read, 32, given) == list(range(3, 128, 4))
    assert words(COPY + "cp.async.wait_all;" + later, 32, given) == [0] * 32
    for wait, load in (("", read), ("cp.async.wait_group 2;", read), ("wait1", later)):
        body = COPY + wait.replace("wait1", "cp.async.wait_group 1;") + load
        with pytest.raises(PtxError, match="reads 4 bytes of shared memory never written"):
            words(body, 32, given)


def test_groups_of_copies_are_of_each_thread() -> None:
    # The upper half closes its group late: its copies belong to the next one.
    body = """
    .shared .align 16 .b8 tile[512];
    mov.u32 %r1, tile; mad.lo.u32 %r2, %r0, 16, %r1;
    ld.param.u64 %d0, [p0]; mad.wide.u32 %d0, %r0, 16, %d0;
    setp.lt.u32 %p0, %r0, 16;
    @!%p0 cp.async.commit_group;
    cp.async.cg.shared.global [%r2], [%d0], 16;
    @%p0 cp.async.commit_group;
    cp.async.commit_group;
    cp.async.wait_group 1;
    mov.u32 %r9, 0;
    setp.lt.u32 %p0, %r0, LIMIT;
    @%p0 ld.shared.u32 %r9, [%r2];
    """
    given = np.arange(128, dtype=np.uint32) + 1
    assert words(body.replace("LIMIT", "16"), 32, given)[:16] == list(range(1, 65, 4))
    with pytest.raises(PtxError, match=r"thread \(16, 0, 0\).*never written"):
        words(body.replace("LIMIT", "32"), 32, given)


# ---- warps --------------------------------------------------------------------------------------


def shuffled(mode: str, b: int, clamp: int, n: int = 32) -> list[int]:
    body = f"""
    add.u32 %r1, %r0, 100;
    shfl.sync.{mode}.b32 %r2|%p0, %r1, {b}, {clamp:#x}, -1;
    selp.b32 %r3, 1000, 0, %p0; add.u32 %r9, %r2, %r3;
    """
    return words(body, n)


def test_shuffles_read_other_lanes() -> None:
    # shfl_up, shfl_down, shfl_xor, shfl as CUDA's header forms them: width 32, then 8.
    lanes = range(32)
    assert shuffled("up", 3, 0) == [100 + (i - 3 + 1000 if i >= 3 else i) for i in lanes]
    assert shuffled("down", 5, 31) == [100 + (i + 5 + 1000 if i < 27 else i) for i in lanes]
    assert shuffled("bfly", 6, 31) == [1100 + (i ^ 6) for i in lanes]
    assert shuffled("idx", 9, 31, 64) == [1109] * 32 + [1141] * 32
    eight = (32 - 8) << 8
    assert shuffled("idx", 3, eight | 31) == [1100 + i // 8 * 8 + 3 for i in lanes]
    assert shuffled("up", 1, eight) == [100 + (i - 1 + 1000 if i % 8 else i) for i in lanes]
    assert shuffled("down", 7, eight | 31) == [
        100 + (i + 7 + 1000 if i % 8 == 0 else i) for i in lanes
    ]


def test_votes_matches_and_reductions() -> None:
    rng = np.random.default_rng(2)
    given = rng.integers(0, 4, 96).astype(np.uint32)
    load = at(0, 4) + "ld.global.u32 %r1, [%d0]; setp.eq.u32 %p0, %r1, 2;\n"
    rows = given.reshape(3, 32)

    def each(values: list[int]) -> list[int]:
        return [value for value in values for _ in range(32)]

    def bits(row: Array) -> int:
        return sum(1 << i for i in np.flatnonzero(row).tolist())

    ballot = words(load + "vote.sync.ballot.b32 %r9, %p0, -1;", 96, given)
    assert ballot == each([bits(row == 2) for row in rows])
    found = words(load + "vote.sync.any.pred %p1, !%p0, -1; selp.b32 %r9, 1, 0, %p1;", 96, given)
    assert found == each([int((row != 2).any()) for row in rows])
    found = words(load + "vote.sync.all.pred %p1, %p0, -1; selp.b32 %r9, 1, 0, %p1;", 96, given)
    assert found == each([int((row == 2).all()) for row in rows])
    found = words(load + "match.any.sync.b32 %r9, %r1, -1;", 96, given)
    assert found == [bits(row == x) for row in rows for x in row]
    found = words(load + "redux.sync.add.u32 %r9, %r1, -1;", 96, given)
    assert found == each([int(row.sum()) for row in rows])
    found = words(load + "redux.sync.max.s32 %r9, %r1, -1;", 96, given)
    assert found == each([int(row.max()) for row in rows])


def test_parts_of_a_warp_work_apart() -> None:
    body = """
    and.b32 %r1, %r0, 1; setp.eq.u32 %p0, %r1, 0;
    selp.b32 %r2, 0x55555555, 0xaaaaaaaa, %p0;
    redux.sync.add.u32 %r3, %r0, %r2;
    @%p0 bra $even;
    shfl.sync.bfly.b32 %r4, %r0, 2, 31, 0xaaaaaaaa;
    bra.uni $done;
$even:
    shfl.sync.bfly.b32 %r4, %r0, 4, 31, 0x55555555;
$done:
    bar.warp.sync -1;
    mad.lo.u32 %r9, %r3, 1000, %r4;
    """
    wanted = [(256 if i % 2 else 240) * 1000 + (i ^ 2 if i % 2 else i ^ 4) for i in range(32)]
    assert words(body, 32) == wanted


def fragment(matrix: Array, per: int, rows_first: bool) -> Array:
    """[lane, register] words of A [m, k] or, given as its transpose, B [n, k]: by the formulas of
    the PTX ISA's section on mma, element by element."""
    m, k = matrix.shape
    row_parts = max(m // 8, 1) if rows_first else 1
    n_registers = k // (4 * per) * row_parts
    out = np.zeros((32, n_registers, per), matrix.dtype)
    for lane in range(32):
        group, within = divmod(lane, 4)
        for i in range(n_registers * per):
            register = i // per
            row = group + (8 if rows_first and m == 16 and register % 2 else 0)
            column = within * per + i % per + 4 * per * (register // row_parts)
            out[lane, register, i % per] = matrix[row, column]
    return out.view(np.uint32).reshape(32, n_registers)


def product(opcode: str, a: Array, b: Array, c: Array, order: str = "") -> Array:
    """D [m, n] of one mma for B given as its transpose; `order` permutes A's registers."""
    per = 4 // a.dtype.itemsize
    words_a, words_b = fragment(a, per, True), fragment(b, per, False)
    n_a, n_b, n_c = words_a.shape[1], words_b.shape[1], c.size // 32
    lanes = np.arange(32)
    place = [(lanes // 4 + 8 * (i // 2), lanes % 4 * 2 + i % 2) for i in range(n_c)]
    words_c = np.stack([c[at_] for at_ in place], axis=1).view(np.uint32)

    def load(param: int, n: int, first: int) -> str:
        lines = at(param, 4 * n)
        return lines + "".join(f"ld.global.b32 %r{first + i}, [%d0+{4 * i}];\n" for i in range(n))

    def names(first: int, n: int, order: str = "") -> str:
        which = [int(i) for i in order] or range(n)
        return "{" + ", ".join(f"%r{first + i}" for i in which) + "}"

    body = load(0, n_a, 1) + load(1, n_b, 11) + load(2, n_c, 21)
    body += (
        f"{opcode} {names(21, n_c)}, {names(1, n_a, order)}, {names(11, n_b)}, {names(21, n_c)};"
    )
    body += at(3, 4 * n_c) + "".join(
        f"st.global.b32 [%d0+{4 * i}], %r{21 + i};\n" for i in range(n_c)
    )
    # Registers are words of 32 bits, so that floats need no registers of their own.
    out, _ = run(body, [words_a, words_b, words_c], np.zeros((32, n_c), np.uint32), 32)
    d = np.zeros_like(c)
    for i, at_ in enumerate(place):
        d[at_] = out[:, i].view(c.dtype)
    return d


MMA_F16 = "mma.sync.aligned.{}.row.col.f32.f16.f16.f32"
MMA_S8 = "mma.sync.aligned.{}.row.col.s32.s8.s8.s32"


@pytest.mark.parametrize(("shape", "k"), [("m16n8k16", 16), ("m16n8k8", 8)])
def test_products_of_half_matrices(shape: str, k: int) -> None:
    rng = np.random.default_rng(4)
    a, b = (rng.normal(size=(n, k)).astype(np.float16) for n in (16, 8))
    c = rng.normal(size=(16, 8)).astype(np.float32)
    wanted = a.astype(np.float64) @ b.astype(np.float64).T + c
    assert np.allclose(product(MMA_F16.format(shape), a, b, c), wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "m", "k"), [("m16n8k32", 16, 32), ("m16n8k16", 16, 16), ("m8n8k16", 8, 16)]
)
def test_products_of_int8_matrices(shape: str, m: int, k: int) -> None:
    rng = np.random.default_rng(5)
    a, b = (rng.integers(-128, 128, (n, k)).astype(np.int8) for n in (m, 8))
    c = rng.integers(-1000, 1000, (m, 8)).astype(np.int32)
    wanted = a.astype(np.int32) @ b.astype(np.int32).T + c
    assert np.array_equal(product(MMA_S8.format(shape), a, b, c), wanted)


def test_a_product_with_swapped_operands_is_wrong() -> None:
    rng = np.random.default_rng(6)
    a, b = (rng.normal(size=(n, 16)).astype(np.float16) for n in (16, 8))
    c = np.zeros((16, 8), np.float32)
    wanted = a.astype(np.float64) @ b.astype(np.float64).T
    opcode = MMA_F16.format("m16n8k16")
    assert np.abs(product(opcode, a, b, c, "0123") - wanted).max() < 1e-5
    for order in ("0213", "1032", "0132"):
        assert np.abs(product(opcode, a, b, c, order) - wanted).max() > 0.1
    with pytest.raises(PtxError, match=r"has \[4, 2, 2, 4\] registers, expected \[4, 4, 2, 4\]"):
        product(opcode, a, b, c, "01")


# ---- control flow -------------------------------------------------------------------------------


def test_threads_loop_each_as_often_as_it_must_and_meet_again() -> None:
    body = """
    mov.u32 %r9, 0; mov.u32 %r1, 0;
$loop:
    setp.ge.u32 %p0, %r1, %r0;
    @%p0 bra $done;
    add.u32 %r9, %r9, %r1; add.u32 %r1, %r1, 1;
    bra.uni $loop;
$done:
    bar.sync 0;
    """
    out = np.zeros(40, np.uint32)
    found, counts = run(body + STORE.replace("{}", "0"), [], out, 40)
    assert found.tolist() == [i * (i - 1) // 2 for i in range(40)]
    added = counts.by_opcode()["add.u32"]
    assert added == 2 * (31 + 39)  # as often as the longest thread of each of the two warps


def test_jump_tables_and_early_ends() -> None:
    body = """
    $table: .branchtargets $a, $b, $c;
    mov.u32 %r9, 0; and.b32 %r1, %r0, 3; setp.eq.u32 %p0, %r1, 3;
    @%p0 bra $store;
    brx.idx %r1, $table;
$a: mov.u32 %r9, 10; bra.uni $store;
$b: mov.u32 %r9, 20; bra.uni $store;
$c: ret;
$store:
    """
    found = words(body, 8)
    assert found == [10, 20, 0xFFFFFFFF, 0] * 2


def test_registers_of_an_inner_scope_are_its_own() -> None:
    body = """
    .reg .b32 x; mov.b32 x, 1;
    { .reg .b32 x; mov.b32 x, 2; { .reg .b32 x; mov.b32 x, 3; } add.u32 %r9, x, 0; }
    mad.lo.u32 %r9, x, 10, %r9;
    """
    assert words(body, 1) == [12]


# ---- defects ------------------------------------------------------------------------------------

SHARED = """
    .shared .align 4 .b8 tile[128];
    mov.u32 %r1, tile; mad.lo.u32 %r2, %r0, 4, %r1;
"""
DEFECTS = {
    "a read behind a buffer": (
        at(0, 4) + "ld.global.u32 %r9, [%d0+4];",
        r"line \d+ `ld.global.u32 %r9, \[%d0\+4\]`: thread \(31, 0, 0\) of block \(0, 0, 0\) "
        r"touches 4 bytes at 128 of the 128 bytes of buffer `input 0`: out of bounds",
    ),
    "a vector that ends behind a buffer": (
        at(0, 4) + "and.b64 %d0, %d0, -8; ld.global.v2.u32 {%r9, %r8}, [%d0+8];",
        r"touches 8 bytes at 128 .* out of bounds",
    ),
    "a null pointer": ("mov.u64 %d0, 0; ld.global.u32 %r9, [%d0];", "far from all buffers"),
    "a write to what is read-only": (at(0, 4) + "st.global.u32 [%d0], %r0;", "read-only"),
    "a misaligned word": (
        at(0, 2) + "ld.global.u32 %r9, [%d0];",
        r"thread \(1, 0, 0\) .* misaligned",
    ),
    "a misaligned vector": (
        "ld.param.u64 %d0, [p0]; ld.global.v4.u32 {%r1, %r2, %r3, %r9}, [%d0+8];",
        "at 8 of the 128 bytes of buffer `input 0`: misaligned, not a multiple of 16",
    ),
    "a misaligned word of shared memory": (
        SHARED + "st.shared.u32 [%r2], 1; ld.shared.u32 %r9, [%r1+2];",
        "at 2 in shared memory: misaligned",
    ),
    "a write behind shared memory": (
        SHARED + "st.shared.u32 [%r2+4], 1;",
        r"thread \(31, 0, 0\) .* at 128 of 128 bytes of shared memory: out of bounds",
    ),
    "a read of shared memory that nobody wrote": (
        SHARED + "setp.ne.u32 %p0, %r0, 5; @%p0 st.shared.u32 [%r2], 1; ld.shared.u32 %r9, [%r2];",
        r"thread \(5, 0, 0\) of block \(0, 0, 0\) reads 4 bytes of shared memory never written",
    ),
    "a read of global memory that nobody wrote": (
        at(1, 4) + "ld.global.u32 %r9, [%d0];",
        "reads 4 bytes of global memory never written",
    ),
    "a read-only load of what this launch wrote": (
        at(1, 4) + "st.global.u32 [%d0], 1; ld.global.nc.u32 %r9, [%d0];",
        r"read-only path \(\.nc\) that this launch wrote",
    ),
    "a shuffle whose mask names lanes that never come": (
        "setp.ge.u32 %p0, %r0, 16; @%p0 bra $on;\n"
        "shfl.sync.down.b32 %r9, %r0, 1, 31, -1;\n$on: bar.sync 0;",
        r"wait for ever: 16 threads wait at line \d+ `shfl.*; 16 threads wait at line \d+ `bar",
    ),
    "a shuffle that reads a lane that has ended": (
        "setp.eq.u32 %p0, %r0, 7; @%p0 ret; shfl.sync.idx.b32 %r9, %r0, 7, 31, -1;",
        "reads lane 7 of its warp, which does not take part",
    ),
    "a shuffle that reads a lane outside of its mask": (
        "setp.ge.u32 %p0, %r0, 16; @%p0 ret; shfl.sync.idx.b32 %r9, %r0, 20, 31, 0xffff;",
        "reads lane 20 of its warp, which its mask does not name",
    ),
    "a lane that is not in its own mask": (
        "shfl.sync.idx.b32 %r9, %r0, 0, 31, 0xffff;",
        r"thread \(16, 0, 0\) .* is not in its own mask 0x0000ffff",
    ),
    "a barrier that some threads do not reach": (
        "setp.ge.u32 %p0, %r0, 16; @%p0 ret; bar.sync 0; mov.u32 %r9, 0;",
        "16 threads wait at .*; 16 have ended",
    ),
    "barriers in two branches": (
        "setp.ge.u32 %p0, %r0, 16; @%p0 bra $b; bar.sync 0; bra.uni $c; $b: bar.sync 0; $c:"
        "mov.u32 %r9, 0;",
        "16 threads wait at .*; 16 threads wait at",
    ),
    "an integer divided by zero": (
        "mov.u32 %r1, 0; div.u32 %r9, %r0, %r1;",
        "divides an integer by zero",
    ),
    "an opcode that is not known": ("frobnicate.u32 %r9, %r0;", "opcode is not implemented"),
    "a part of an opcode that is not known": ("add.sideways.u32 %r9, %r0, 1;", "`.sideways`"),
    "a special register that is not known": ("mov.u32 %r9, %smid;", "%smid is not implemented"),
    "a variable that does not exist": ("mov.u64 %d0, nowhere;", "is named nowhere"),
    "a register of another width": ("add.u32 %r9, %h1, 1;", "%h1, a .b16, is read as .u32"),
    "an asynchronous copy of a size that there is not": (
        SHARED + at(0, 4) + "cp.async.cg.shared.global [%r2], [%d0], 4;",
        "copies 4 bytes; .ca copies 4, 8 or 16 and .cg 16",
    ),
    "a loop without an end": ("$again: bra.uni $again;", "still runs after"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_program_is_ended_that_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptx.scheduler.MAX_STEPS", 10_000)
    body, message = DEFECTS[name]
    with pytest.raises(PtxError, match=message) as caught:
        words(body, 32, np.arange(32, dtype=np.uint32))
    assert str(caught.value).startswith("k")  # names the kernel


def test_what_nobody_wrote_may_be_read_as_poison_if_asked_for() -> None:
    body = at(1, 4) + "ld.global.u32 %r9, [%d0];"
    assert words(body, 4, np.zeros(4, np.uint32), device=Device(strict=False)) == [2**32 - 1] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int main() { return 0; }", "no .target line"),
        (entry("bra $nowhere;", 1), "no label \\$nowhere"),
        (entry("@%q bra $x; $x:", 1), "no register %q"),
        (entry(".frob 3;", 1), "directive '.frob 3' is not known"),
        (HEADER + ".entry k() {", "never closed"),
        (HEADER + ".alias a, b;", "no declaration"),
    ],
)
def test_text_that_is_no_module_is_refused(text: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        parse(text)


# ---- counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (0, 1)])
def test_sectors_of_a_request(stride: int, sectors: int) -> None:
    given = np.zeros(32 * 64, np.uint32)
    _, counts = run(
        at(0, stride) + "ld.global.u32 %r1, [%d0];" + at(0, 16) + "ld.global.v4.u32 "
        "{%r1, %r2, %r3, %r4}, [%d0];" + at(1, 4) + "st.global.u32 [%d0], %r1;",
        [given],
        np.zeros(64, np.uint32),
        64,
    )
    narrow, wide = counts.global_reads.values()
    assert (narrow.requests, narrow.sectors, narrow.bytes) == (2, 2 * sectors, 64 * 4)
    assert (wide.requests, wide.sectors, wide.bytes) == (2, 32, 64 * 16)
    assert sum(t.sectors for t in counts.global_writes.values()) == 8
    reads = max(2 * sectors if stride else 1, 32)
    assert counts.dram_bytes == 32 * (reads + 8)


@pytest.mark.parametrize(
    ("stride", "vector", "passes"), [(4, 1, 1), (8, 1, 2), (128, 1, 32), (0, 1, 1), (16, 4, 4)]
)
def test_passes_of_the_banks_of_shared_memory(stride: int, vector: int, passes: int) -> None:
    registers = ", ".join(f"%r{i + 1}" for i in range(vector))
    suffix = f".v{vector}" if vector > 1 else ""
    body = f"""
    .shared .align 16 .b8 tile[4096];
    mov.u32 %r9, tile; mad.lo.u32 %r9, %r0, {stride}, %r9;
    st.shared{suffix}.u32 [%r9], {{{registers}}};
    """
    _, counts = run(body, [], np.zeros(1, np.uint32), 32)
    (traffic,) = counts.shared.values()
    assert (traffic.requests, traffic.passes) == (1, passes)


def test_warp_instructions_are_counted_by_class() -> None:
    body = """
    setp.lt.u32 %p0, %r0, 40; @!%p0 bra $on;
    ex2.approx.f32 %f1, %f0; dp4a.s32.s32 %r1, %r0, %r0, 0;
$on: fma.rn.f32 %f1, %f0, %f0, %f0; shl.b32 %r1, %r0, 2; @%p0 add.s32 %r1, %r0, 2;
    """
    _, counts = run(body, [], np.zeros(1), 96, grid=2)
    found = counts.by_class()
    assert (found["mufu"], found["dp4a"]) == (4, 4)  # two warps of three in each block
    assert (found["fp32"], found["shift"], found["int"]) == (6, 6, 6)
    assert found["branch"] == 6 and counts.lanes.sum() > 0
    assert counts.instructions == sum(found.values()) - found["free"]


# ---- what nvcc makes of CUDA --------------------------------------------------------------------

CUDA = """
#include "cuda/kernels/port.cuh"
__constant__ int squares[4] = {0, 1, 4, 9};
typedef struct args { const float *x[2]; float *y; int n; float scale[3]; } args;
__device__ __noinline__ static int pick(int i) { return squares[i & 3]; }
extern "C" __global__ void __launch_bounds__(64) mixed(const args a) {
    __shared__ float sums[2];
    const int i = blockIdx.x * 64 + threadIdx.x, side = threadIdx.x & 1;
    float v = i < a.n ? a.x[side][i] * a.scale[threadIdx.x % 3] : 0.0f;
    const float mine = v;
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    const __half h = __float2half_rn(mine);
    int extra;
    switch (i % 6) {
    case 0: extra = i * 3; break;
    case 1: extra = i / 7; break;
    case 2: extra = __popc(i); break;
    case 3: extra = squares[i & 3]; break;
    case 4: extra = i % 5; break;
    default: extra = -i;
    }
    if (i < a.n) a.y[i] = sums[0] + sums[1] + __half2float(h) + expf(mine) + (float)extra;
}
extern "C" __global__ void products(const uint32_t *a, const uint32_t *b, float *d, int *e) {
    const int lane = threadIdx.x;
    float sums[4] = {0, 0, 0, 0};
    int counts[3][4] = {};
    kvq_mma_f16(sums, a + 4 * lane, b + 2 * lane);
    kvq_mma_s8_s8(counts[0], a + 128 + 4 * lane, b + 64 + 2 * lane);
    kvq_mma_s8_u8(counts[1], a + 128 + 4 * lane, b + 64 + 2 * lane);
    kvq_mma_u8_s8(counts[2], a + 128 + 4 * lane, b + 64 + 2 * lane);
    for (int i = 0; i < 4; i++) d[4 * lane + i] = sums[i];
    for (int i = 0; i < 12; i++) e[128 * (i / 4) + 4 * lane + i % 4] = counts[i / 4][i % 4];
}
extern "C" __global__ void small(const uint32_t *words, const float *x, uint32_t *to, float *y) {
    const uint32_t *const three = words + 3 * threadIdx.x;
    to[threadIdx.x] = kvq_permute(three[0], three[1], three[2]);
    y[threadIdx.x] = kvq_exp2(x[threadIdx.x]);
}
extern "C" __global__ void copied(const uint4 *from, uint4 *to) {
    KVQ_SHARED_MEMORY(uint4, tile);
    kvq_cp_async16(tile + threadIdx.x, from + threadIdx.x);
    kvq_cp_commit();
    kvq_cp_wait<0>();
    __syncthreads();
    to[threadIdx.x] = tile[threadIdx.x ^ 33];
}
"""


@pytest.fixture(scope="module", params=["compute_75", "compute_80"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("ptx")
    (folder / "all.cu").write_text(CUDA)
    flags = [f"-I{ROOT / 'core'}", "-lineinfo"]
    return compile_ptx(folder / "all.cu", folder / "all.ptx", request.param, flags).read_text()


@needs_nvcc
def test_a_kernel_of_nvcc_gives_what_python_gives(compiled: str) -> None:
    rng = np.random.default_rng(7)
    n, scale = 150, np.array([0.5, -0.25, 1.5], np.float32)
    x = rng.normal(size=(2, n)).astype(np.float32)
    device = Device()
    module = device.load(compiled)
    struct = np.zeros(1, [("x", "u8", 2), ("y", "u8"), ("n", "i4"), ("scale", "f4", 3)])
    out = device.allocate(4 * n, "y")
    struct["x"], struct["y"], struct["n"] = [device.put(x[0]), device.put(x[1])], out, n
    struct["scale"] = scale
    counts = device.launch(module, "mixed", 3, 64, struct.tobytes())
    i = np.arange(192)
    v = np.zeros(192, np.float32)
    v[:n] = (x[i % 2, i % n] * scale[i % 64 % 3])[:n]
    sums = v.reshape(3, 64).sum(axis=1, dtype=np.float64).repeat(64)
    extra = [
        [k * 3, k // 7, k.bit_count(), [0, 1, 4, 9][k & 3], k % 5, -k][k % 6] for k in range(192)
    ]
    wanted = sums + v.astype(np.float16) + np.exp(v.astype(np.float64)) + extra
    assert np.allclose(device.get(out, n, np.float32), wanted[:n], rtol=1e-5, atol=1e-4)
    files = {Path(name).name for name, _ in counts.by_source()}
    assert "all.cu" in files


def products_of(text: str) -> tuple[Array, Array, Array, Array]:
    """What the wrappers of port.cuh give, and what they should: of halves [16, 8]; of bytes
    [3, 16, 8], both signed, B unsigned, A unsigned."""
    rng = np.random.default_rng(8)
    a16, b16 = (rng.normal(size=(n, 16)).astype(np.float16) for n in (16, 8))
    a8, b8 = (rng.integers(-128, 128, (n, 32)).astype(np.int8) for n in (16, 8))
    a = np.concatenate([fragment(a16, 2, True), fragment(a8, 4, True)])
    b = np.concatenate([fragment(b16, 2, False), fragment(b8, 4, False)])
    device = Device()
    module = device.load(text)
    d, e = device.allocate(512, "d"), device.allocate(3 * 512, "e")
    device.launch(module, "products", 1, 32, device.put(a), device.put(b), d, e)
    lanes = np.arange(32)
    order = np.stack([(lanes // 4 + 8 * (i // 2)) * 8 + lanes % 4 * 2 + i % 2 for i in range(4)], 1)
    halves, integers = np.zeros(128, np.float32), np.zeros((3, 128), np.int32)
    halves[order], integers[:, order] = (
        device.get(d, (32, 4), "f4"),
        device.get(e, (3, 32, 4), "i4"),
    )
    wanted = a16.astype(np.float64) @ b16.astype(np.float64).T
    pairs = [(a8, b8), (a8, b8.view(np.uint8)), (a8.view(np.uint8), b8)]
    counted = np.stack([x.astype(np.int32) @ y.astype(np.int32).T for x, y in pairs])
    return halves.reshape(16, 8), wanted, integers.reshape(3, 16, 8), counted


@needs_nvcc
def test_the_projects_wrappers_multiply_matrices(compiled: str) -> None:
    halves, wanted, integers, counted = products_of(compiled)
    assert np.allclose(halves, wanted, atol=1e-5)
    assert np.array_equal(integers, counted)


@needs_nvcc
def test_the_projects_wrappers_permute_bytes_and_take_powers(compiled: str) -> None:
    rng = np.random.default_rng(9)
    words = rng.integers(0, 2**32, (32, 3), dtype=np.uint32)
    x = np.linspace(-140, 20, 32, dtype=np.float32)
    device = Device()
    module = device.load(compiled)
    to, y = device.allocate(128, "to"), device.allocate(128, "y")
    device.launch(module, "small", 1, 32, device.put(words), device.put(x), to, y)
    wanted = []
    for low, high, selector in words.tolist():
        number = low | high << 32
        picked = [number >> 8 * (selector >> 4 * i & 7) & 0xFF for i in range(4)]
        signs = [selector >> 4 * i & 8 for i in range(4)]
        chosen = [
            byte // 128 * 255 if sign else byte for byte, sign in zip(picked, signs, strict=True)
        ]
        wanted.append(int.from_bytes(bytes(chosen), "little"))
    assert device.get(to, 32, "u4").tolist() == wanted
    powers = np.exp2(x.astype(np.float64))
    powers[powers < 2.0**-126] = 0
    assert np.allclose(device.get(y, 32, "f4"), powers, rtol=2.0**-22, atol=0)


@needs_nvcc
def test_swapped_operands_in_inline_assembly_are_seen(compiled: str) -> None:
    # The second and third register of A, or of A's rows where the architecture takes two.
    pattern = r"(mma\.sync\S*f16\S* \{[^}]*\}, \{)([^}]*)(\})"

    def swap(match: re.Match[str]) -> str:
        names = match[2].split(",")
        names[-2], names[-3 if len(names) == 4 else -1] = (
            names[-3 if len(names) == 4 else -1],
            names[-2],
        )
        return match[1] + ",".join(names) + match[3]

    text, n = re.subn(pattern, swap, compiled)
    assert n in (1, 2)
    halves, wanted, _, _ = products_of(text)
    assert np.abs(halves - wanted).max() > 0.1


@needs_nvcc
def test_the_projects_copies_land(compiled: str) -> None:
    given = np.arange(64 * 4, dtype=np.uint32).reshape(64, 4)
    for text in (compiled, re.sub(r"cp\.async\.wait_group 0;", "", compiled)):
        device = Device()
        module, out = device.load(text), device.allocate(1024, "to")
        if text == compiled:
            device.launch(module, "copied", 1, 64, device.put(given), out, dynamic_shared=1024)
            assert np.array_equal(device.get(out, (64, 4), "u4"), given[np.arange(64) ^ 33])
        else:  # without the wait
            with pytest.raises(PtxError, match="never written"):
                device.launch(module, "copied", 1, 64, device.put(given), out, dynamic_shared=1024)
