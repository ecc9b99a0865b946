"""Moves, conversions between types, comparisons and selections."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from .floats import bf16_to_f32, f32_to_bf16, flush, round_to
from .machine import Lanes, Machine, Source, Step, Target, check, items, opcode
from .parser import Pair, Register, Statement, Vector
from .scalars import Array, Dtype, Mask, PtxError, dtype_of, is_float, unsigned

_F64 = np.dtype(np.float64)
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_ROUNDINGS = ("rn", "rz", "rm", "rp")


@opcode("mov")
def _move(machine: Machine, st: Statement) -> Step:
    check(st)
    target, source = st.operands
    if isinstance(source, Vector):
        return _pack(machine, st)
    if isinstance(target, Vector):
        return _unpack(machine, st)
    write, read = machine.target(target, st.type), machine.source(source, st.type)
    return lambda lanes: write(lanes, read(lanes))


def _pack(machine: Machine, st: Statement) -> Step:
    parts = items(st.operands[1])
    whole, part = dtype_of(st.type), unsigned(dtype_of(st.type).itemsize // len(parts))
    name = f"b{8 * part.itemsize}"
    write = machine.target(st.operands[0], st.type)
    reads = [machine.source(operand, name) for operand in parts]

    def step(lanes: Lanes) -> None:
        rows = np.stack([read(lanes) for read in reads], axis=1)
        write(lanes, np.ascontiguousarray(rows).view(whole).ravel())

    return step


def _unpack(machine: Machine, st: Statement) -> Step:
    parts = items(st.operands[0])
    part = unsigned(dtype_of(st.type).itemsize // len(parts))
    name = f"b{8 * part.itemsize}"
    writes = [machine.target(operand, name) for operand in parts]
    read = machine.source(st.operands[1], st.type)

    def step(lanes: Lanes) -> None:
        rows = np.ascontiguousarray(read(lanes)).view(part).reshape(-1, len(parts))
        for i, write in enumerate(writes):
            write(lanes, rows[:, i])

    return step


@opcode("cvt")
def _convert(machine: Machine, st: Statement) -> Step:
    if st.has("pack"):
        return _convert_pack(machine, st)
    to, of = st.opcode[-2:]
    check(st, "sat", "ftz", *_ROUNDINGS, *_TO_INTEGER, n_types=2)
    if to in ("f16x2", "bf16x2"):
        return _convert_pair(machine, st, to, of)
    write, read = _numbers_out(machine, st, to), _numbers_in(machine, st, of)
    function = _conversion(st, to, of)
    return lambda lanes: write(lanes, function(read(lanes)))


def _numbers_in(machine: Machine, st: Statement, of: str) -> Source:
    read = machine.source(st.operands[1], of)
    if of == "bf16":
        return lambda lanes: bf16_to_f32(read(lanes))
    if st.has("ftz") and of == "f32":
        return lambda lanes: flush(read(lanes))
    return read


def _numbers_out(machine: Machine, st: Statement, to: str) -> Target:
    write = machine.target(st.operands[0], to)
    if st.has("ftz") and to == "f32":
        return lambda lanes, values: write(lanes, flush(values))
    return write


def _conversion(st: Statement, to: str, of: str) -> Callable[[Array], Array]:
    mode = next((part for part in st.opcode if part in (*_ROUNDINGS, *_TO_INTEGER)), "rn")
    if is_float(of) and is_float(to):
        if to == "bf16":
            if mode != "rn":
                raise PtxError(f"{st}: only rounding to nearest is implemented.")
            return lambda x: f32_to_bf16(x.astype(np.float32))
        dtype = dtype_of(to)
        integral = _TO_INTEGER.get(mode)

        def to_float(x: Array) -> Array:
            if integral is not None:
                value: Array = integral(x).astype(dtype)
            else:
                value = round_to(x.astype(_F64), dtype, mode)
            if st.has("sat"):
                value = np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(dtype)
            if to == "f16":
                value = np.where(np.isnan(value), np.uint16(0x7FFF).view(np.float16), value)
            return value

        return to_float
    dtype = dtype_of(to)
    if is_float(of):
        return lambda x: _float_to_integer(_TO_INTEGER[mode](x.astype(_F64)), dtype)
    if is_float(to):
        if mode != "rn":
            raise PtxError(f"{st}: only rounding to nearest is implemented.")
        return lambda x: x.astype(dtype)
    if not st.has("sat"):
        return lambda x: x.astype(dtype)
    return lambda x: _saturate(x, dtype)


def _float_to_integer(whole: Array, dtype: Dtype) -> Array:
    """Whole numbers in binary64; NaN becomes 0, what is out of range the nearest end."""
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    inside = (whole > float(low)) & (whole < float(high))
    value: Array = np.where(whole >= float(high), dtype.type(high), dtype.type(low))
    value = np.where(np.isnan(whole), dtype.type(0), value)
    value[inside] = whole[inside].astype(dtype)
    return value


def _saturate(x: Array, dtype: Dtype) -> Array:
    low = max(int(np.iinfo(dtype).min), int(np.iinfo(x.dtype).min))
    high = min(int(np.iinfo(dtype).max), int(np.iinfo(x.dtype).max))
    found: Array = np.clip(x, low, high).astype(dtype)
    return found


def _convert_pair(machine: Machine, st: Statement, to: str, of: str) -> Step:
    """d = {a in the high half, b in the low}."""
    if of != "f32" or st.has("rz", "rm", "rp", "sat"):
        raise PtxError(f"{st}: only rounding of .f32 to nearest is implemented.")
    write = machine.target(st.operands[0], to)
    high, low = machine.sources(st, "f32", 1, 2)

    def half(x: Array) -> Array:
        if to == "bf16x2":
            return f32_to_bf16(x)
        bits: Array = x.astype(np.float16).view(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FFF), bits)

    def step(lanes: Lanes) -> None:
        upper = half(high(lanes)).astype(np.uint32) << np.uint32(16)
        write(lanes, upper | half(low(lanes)).astype(np.uint32))

    return step


def _convert_pack(machine: Machine, st: Statement) -> Step:
    """cvt.pack.sat.TO.s32[.b32] d, a, b[, c]: b low, a above it, c shifted above both."""
    types = [part for part in st.opcode[1:] if part not in ("pack", "sat")]
    to = dtype_of(types[0])
    if types[1] != "s32" or to.itemsize > 2:
        raise PtxError(f"{st}: not implemented.")
    bits = 8 * to.itemsize
    write = machine.target(st.operands[0], "b32")
    upper, lower = machine.sources(st, "s32", 1, 2)
    rest = machine.source(st.operands[3], "b32") if len(st.operands) > 3 else None

    def step(lanes: Lanes) -> None:
        a, b = (
            _saturate(read(lanes), to).view(unsigned(to.itemsize)).astype(np.uint32)
            for read in (upper, lower)
        )
        value = a << np.uint32(bits) | b
        if rest is not None:
            value = value | rest(lanes) << np.uint32(2 * bits)
        write(lanes, value)

    return step


_COMPARE: dict[str, Callable[[Array, Array], Mask]] = {
    "eq": operator.eq,
    "ne": lambda a, b: (a != b) & ~_unordered(a, b),
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
    "equ": lambda a, b: (a == b) | _unordered(a, b),
    "neu": operator.ne,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~_unordered(a, b),
    "nan": lambda a, b: _unordered(a, b),
}
_COMBINE: dict[str, Callable[[Mask, Mask], Mask]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


def _unordered(a: Array, b: Array) -> Mask:
    if a.dtype.kind != "f":
        return np.zeros(len(a), bool)
    found: Mask = np.isnan(a) | np.isnan(b)
    return found


@opcode("setp")
def _set_predicate(machine: Machine, st: Statement) -> Step:
    if st.type.endswith("x2") or st.type.startswith("bf"):
        raise PtxError(f"{st}: not implemented.")
    check(st, "ftz", *_COMPARE, *_COMBINE)
    compare = _COMPARE[st.opcode[1]]
    combine = next((_COMBINE[part] for part in st.opcode[2:] if part in _COMBINE), None)
    target = st.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write = machine.target(first, "pred")
    write_other = machine.target(second, "pred") if isinstance(second, Register) else None
    reads = machine.sources(st, st.type, 1, 2)
    extra = machine.source(st.operands[3], "pred") if combine else None
    ftz = st.has("ftz")

    def step(lanes: Lanes) -> None:
        a, b = ((flush(read(lanes)) if ftz else read(lanes)) for read in reads)
        found = compare(a, b)
        other = ~found
        if combine is not None and extra is not None:
            condition = extra(lanes)
            found, other = combine(found, condition), combine(other, condition)
        write(lanes, found)
        if write_other is not None:
            write_other(lanes, other)

    return step


@opcode("set")
def _set(machine: Machine, st: Statement) -> Step:
    to, of = st.opcode[-2:]
    if of.endswith("x2") or of.startswith("bf") or len(st.operands) != 3:
        raise PtxError(f"{st}: not implemented.")
    check(st, *_COMPARE, n_types=2)
    compare = _COMPARE[st.opcode[1]]
    write, (read_a, read_b) = machine.target(st.operands[0], to), machine.sources(st, of, 1, 2)
    dtype = dtype_of(to)
    true = dtype.type(1) if is_float(to) else unsigned(4).type(0xFFFFFFFF).view(dtype)

    def step(lanes: Lanes) -> None:
        write(lanes, np.where(compare(read_a(lanes), read_b(lanes)), true, dtype.type(0)))

    return step


@opcode("selp")
def _select(machine: Machine, st: Statement) -> Step:
    check(st)
    write = machine.target(st.operands[0], st.type)
    read_a, read_b = machine.sources(st, st.type, 1, 2)
    condition = machine.source(st.operands[3], "pred")
    return lambda lanes: write(lanes, np.where(condition(lanes), read_a(lanes), read_b(lanes)))
