"""What the lanes of a warp do together: shuffles, votes, matches, reductions, matrix products.

A collective executes once all lanes that its mask names have come to it (scheduler.py); `Mask of`
and function are decoded here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .machine import WARP, Lanes, Machine, Source, Step, check, items
from .memory import Fault
from .parser import Operand, Pair, Register, Statement
from .scalars import Array, Index, Mask, PtxError, dtype_of

FULL = 0xFFFFFFFF


@dataclass
class Collective:
    """`mask` gives each lane the lanes it waits for (None: all of its warp)."""

    mask: Source | None
    step: Step


def is_collective(st: Statement) -> bool:
    """Whether lanes of a warp must come together for it."""
    if st.opcode[0] in ("bar", "barrier"):
        return st.has("warp")
    return st.opcode[0] in ("shfl", "vote", "match", "redux", "mma", "ldmatrix")


def decode(machine: Machine, st: Statement) -> Collective:
    """The mask and the function of a collective.

    Raises:
        PtxError: For one that is not implemented.
    """
    name = st.opcode[0]
    if name == "mma":
        return Collective(None, _matrix_product(machine, st))
    if name == "ldmatrix":
        raise PtxError(f"{st}: not implemented.")
    if name in ("bar", "barrier"):
        return Collective(machine.source(st.operands[0], "b32"), lambda lanes: None)
    if "sync" not in st.opcode:
        raise PtxError(f"{st}: only the .sync form is implemented.")
    mask = machine.source(st.operands[-1], "b32")
    steps = {"shfl": _shuffle, "vote": _vote, "match": _match, "redux": _reduce}
    return Collective(mask, steps[name](machine, st, mask))


def _shuffle(machine: Machine, st: Statement, mask: Source) -> Step:
    check(st, "sync", "up", "down", "bfly", "idx")
    mode = st.opcode[2]
    target = st.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write = machine.target(first, "b32")
    write_valid = machine.target(second, "pred") if isinstance(second, Register) else None
    read, read_lane, read_clamp = machine.sources(st, "b32", 1, 2, 3)

    def step(lanes: Lanes) -> None:
        value, b = read(lanes), read_lane(lanes).astype(np.int64) & 31
        clamp = read_clamp(lanes).astype(np.int64)
        lane = machine.lane[lanes.index]
        segment, bound = clamp >> 8 & 31, clamp & 31
        begin = lane & segment
        end = begin | bound & ~segment
        chosen: Index = {
            "up": lane - b,
            "down": lane + b,
            "bfly": lane ^ b,
            "idx": begin | b & ~segment,
        }[mode]
        # Of `up` the bound is the lowest lane.
        valid: Mask = chosen >= end if mode == "up" else chosen <= end
        other = np.where(valid, chosen, lane)
        named = mask(lanes).astype(np.int64) >> other & 1 != 0
        _need(named, lanes, "reads lane {} of its warp, which its mask does not name", other)
        found, there = _gather(machine, lanes, value, other)
        _need(there, lanes, "reads lane {} of its warp, which does not take part", other)
        write(lanes, found)
        if write_valid is not None:
            write_valid(lanes, valid)

    return step


def _need(fine: Mask, lanes: Lanes, reason: str, other: Index) -> None:
    if not fine.all():
        lane = int(np.flatnonzero(~fine)[0])
        raise Fault(lane, reason.format(int(other[lane])))


def _gather(machine: Machine, lanes: Lanes, value: Array, lane: Index) -> tuple[Array, Mask]:
    """The value of a lane of each lane's warp, and whether that one is among the lanes."""
    everyone = np.zeros(machine.n + WARP, value.dtype)
    there = np.zeros(machine.n + WARP, bool)
    everyone[lanes.threads], there[lanes.threads] = value, True
    at = machine.warp_begin[lanes.index] + lane
    same = machine.block[np.minimum(at, machine.n - 1)] == machine.block[lanes.index]
    found: Array = everyone[at]
    taking_part: Mask = there[at] & same
    return found, taking_part


def _team(machine: Machine, lanes: Lanes, mask: Source) -> Array:
    """A number for each lane that those of one warp with one mask share."""
    keys = machine.warp[lanes.index] << 32 | mask(lanes).astype(np.int64)
    found: Array = np.unique(keys, return_inverse=True)[1].reshape(-1)
    return found


def _bits_of(team: Array, lane: Index, chosen: Mask) -> Array:
    """[lanes] the lanes of each team that are chosen, as bits."""
    weights = np.where(chosen, 1 << lane, 0).astype(np.float64)  # exact: below 2^53
    found: Array = np.bincount(team, weights=weights).astype(np.int64)[team]
    return found


def _vote(machine: Machine, st: Statement, mask: Source) -> Step:
    check(st, "sync", "all", "any", "uni", "ballot")
    mode = st.opcode[2]
    read = machine.source(st.operands[1], "pred")
    write = machine.target(st.operands[0], "b32" if mode == "ballot" else "pred")

    def step(lanes: Lanes) -> None:
        team, lane = _team(machine, lanes, mask), machine.lane[lanes.index]
        yes = _bits_of(team, lane, read(lanes))
        everyone = _bits_of(team, lane, np.ones(lanes.n, bool))
        if mode == "ballot":
            write(lanes, yes.astype(np.uint32))
        elif mode == "any":
            write(lanes, yes != 0)
        elif mode == "all":
            write(lanes, yes == everyone)
        else:
            write(lanes, (yes == 0) | (yes == everyone))

    return step


def _match(machine: Machine, st: Statement, mask: Source) -> Step:
    check(st, "any", "all", "sync")
    target = st.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write = machine.target(first, "b32")
    write_same = machine.target(second, "pred") if isinstance(second, Register) else None
    read, every = machine.source(st.operands[1], st.type), st.has("all")

    def step(lanes: Lanes) -> None:
        team, lane, value = _team(machine, lanes, mask), machine.lane[lanes.index], read(lanes)
        pairs = np.stack([team.astype(np.uint64), value.astype(np.uint64)], axis=1)
        alike = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
        everyone = np.ones(lanes.n, bool)
        same, all_of = _bits_of(alike, lane, everyone), _bits_of(team, lane, everyone)
        if every:
            write(lanes, np.where(same == all_of, all_of, 0).astype(np.uint32))
        else:
            write(lanes, same.astype(np.uint32))
        if write_same is not None:
            write_same(lanes, same == all_of)

    return step


def _reduce(machine: Machine, st: Statement, mask: Source) -> Step:
    check(st, "sync", "add", "min", "max", "and", "or", "xor")
    functions: dict[str, np.ufunc] = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    function = functions[st.opcode[2]]
    write, read = machine.target(st.operands[0], st.type), machine.source(st.operands[1], st.type)

    def step(lanes: Lanes) -> None:
        team, value = _team(machine, lanes, mask), read(lanes)
        order = np.argsort(team, kind="stable")
        begins = np.flatnonzero(np.r_[True, np.diff(team[order]) != 0])
        totals = function.reduceat(value[order], begins, dtype=value.dtype)
        write(lanes, totals[team])

    return step


@dataclass(frozen=True)
class _Shape:
    """m x n x k, with the types of the products' factors."""

    m: int
    n: int
    k: int


_MMA: dict[tuple[str, str], _Shape] = {
    ("m16n8k16", "f16"): _Shape(16, 8, 16),
    ("m16n8k8", "f16"): _Shape(16, 8, 8),
    ("m16n8k32", "s8"): _Shape(16, 8, 32),
    ("m16n8k32", "u8"): _Shape(16, 8, 32),
    ("m16n8k16", "s8"): _Shape(16, 8, 16),
    ("m16n8k16", "u8"): _Shape(16, 8, 16),
    ("m8n8k16", "s8"): _Shape(8, 8, 16),
    ("m8n8k16", "u8"): _Shape(8, 8, 16),
}


def _matrix_product(machine: Machine, st: Statement) -> Step:
    """D = A B + C. How a matrix is spread over the lanes: PTX ISA, "Matrix Fragments for mma".

    With g = lane / 4 and t = lane % 4, a register holds 4 bytes of a row of A (a column of B):
    register r of A those from 4t + 16 (r / 2) bytes of row g + 8 (r % 2) if there are 16 rows, of B
    those from 4t + 16 r bytes of column g. Register i of C and D is row g + 8 (i / 2), column
    2t + i % 2. Products are summed without rounding, then rounded once; a device may cut bits.
    """
    shape_name = next((part for part in st.opcode if part[0] == "m" and part[1:2].isdigit()), "")
    types = st.opcode[-4:]
    shape = _MMA.get((shape_name, types[1]))
    total = "f32" if types[1] == "f16" else "s32"
    if (
        shape is None
        or types[0] != total
        or types[3] != total
        or types[2]
        not in (
            types[1],
            *(("u8", "s8") if total == "s32" else ()),
        )
    ):
        raise PtxError(f"{st}: this shape or these types are not implemented.")
    if "satfinite" in st.opcode:
        raise PtxError(f"{st}: .satfinite is not implemented.")
    for word in ("sync", "aligned", "row", "col"):
        if word not in st.opcode:
            raise PtxError(f"{st}: only mma.sync.aligned with .row.col is implemented.")
    d, a, b, c = (items(operand) for operand in st.operands)
    _check_registers(st, shape, types[1], d, a, b, c)
    writes = [machine.target(register, total) for register in d]
    reads_a, reads_b = ([machine.source(r, "b32") for r in part] for part in (a, b))
    reads_c = [machine.source(register, total) for register in c]
    sums = np.dtype(np.float64 if total == "f32" else np.int64)

    def step(lanes: Lanes) -> None:
        # All 32 lanes of each warp are here, in order.
        n_warps = lanes.n // WARP
        full_a = _rows(reads_a, lanes, types[1], n_warps, shape.m)
        full_b = _rows(reads_b, lanes, types[2], n_warps, shape.n)
        product = full_a.astype(sums) @ full_b.astype(sums).transpose(0, 2, 1)
        for i, (read, write) in enumerate(zip(reads_c, writes, strict=True)):
            # [warp, g, t]: row g + 8 (i / 2), column 2t + i % 2
            part = product[:, 8 * (i // 2) : 8 * (i // 2) + 8, i % 2 :: 2].reshape(-1)
            value = part + read(lanes).astype(sums)
            write(lanes, value.astype(dtype_of(total)))

    return step


def _rows(reads: list[Source], lanes: Lanes, type_name: str, n_warps: int, n_rows: int) -> Array:
    """[warp, row, k] from the registers of all lanes."""
    dtype = dtype_of(type_name)
    per = 4 // dtype.itemsize
    words = np.stack([read(lanes) for read in reads])  # [register, lanes]
    values = np.ascontiguousarray(words).view(dtype)
    parts = values.reshape(len(reads), n_warps, 8, 4, per)  # [register, warp, g, t, j]
    row_parts = n_rows // 8
    parts = parts.reshape(len(reads) // row_parts, row_parts, n_warps, 8, 4 * per)
    found: Array = parts.transpose(2, 1, 3, 0, 4).reshape(n_warps, n_rows, -1)
    return found


def _check_registers(
    st: Statement, shape: _Shape, factor: str, *parts: tuple[Operand, ...]
) -> None:
    size = dtype_of(factor).itemsize
    c = shape.m * shape.n // WARP
    wanted = [c, shape.m * shape.k * size // 4 // WARP, shape.n * shape.k * size // 4 // WARP, c]
    if [len(part) for part in parts] != wanted:
        raise PtxError(f"{st}: has {[len(p) for p in parts]} registers, expected {wanted}.")
