"""Integer arithmetic, logic, shifts and bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .floats import arithmetic as float_arithmetic
from .machine import Lanes, Machine, Step, check, opcode
from .memory import Fault
from .parser import Immediate, Statement
from .scalars import Array, Dtype, PtxError, dtype_of, is_float, is_signed

_U32, _U64, _I64 = np.uint32, np.uint64, np.int64


def _step(machine: Machine, st: Statement, function: Callable[..., Array], *types: str) -> Step:
    """target = function(sources...), types those of the target and of each source."""
    write = machine.target(st.operands[0], types[0])
    reads = [machine.source(o, t) for o, t in zip(st.operands[1:], types[1:], strict=True)]
    dtype = dtype_of(types[0])

    def step(lanes: Lanes) -> None:
        write(lanes, function(*(read(lanes) for read in reads)).astype(dtype, copy=False))

    return step


@opcode("add", "sub", "mul", "mad", "fma", "div", "rem", "min", "max", "abs", "neg")
def _arithmetic(machine: Machine, st: Statement) -> Step:
    if is_float(st.type):
        return float_arithmetic(machine, st)
    name, t = st.opcode[0], st.type
    if name == "mul" or name == "mad":
        return _multiply(machine, st)
    if name in ("add", "sub") and "cc" in st.opcode:
        return _carry(machine, st)
    check(st)
    if name in ("abs", "neg"):
        return _step(machine, st, np.abs if name == "abs" else np.negative, t, t)
    functions: dict[str, Callable[..., Array]] = {
        "add": np.add,
        "sub": np.subtract,
        "min": np.minimum,
        "max": np.maximum,
        "div": lambda a, b: _divide(a, b)[0],
        "rem": lambda a, b: _divide(a, b)[1],
    }
    if name not in functions:
        raise PtxError(f"{st}: not implemented.")
    return _step(machine, st, functions[name], t, t, t)


def _divide(a: Array, b: Array) -> tuple[Array, Array]:
    """Quotient, cut towards zero, and remainder with the sign of a."""
    if (b == 0).any():
        raise Fault(int(np.flatnonzero(b == 0)[0]), "divides an integer by zero")
    if a.dtype.kind == "u":
        return a // b, a % b
    magnitude_a, magnitude_b = np.abs(a).view(_unsigned(a)), np.abs(b).view(_unsigned(b))
    q, r = (magnitude_a // magnitude_b).view(a.dtype), (magnitude_a % magnitude_b).view(a.dtype)
    return np.where((a < 0) != (b < 0), -q, q), np.where(a < 0, -r, r)


def _unsigned(a: Array) -> Dtype:
    return np.dtype(f"u{a.dtype.itemsize}")


def _multiply(machine: Machine, st: Statement) -> Step:
    name, t = st.opcode[0], st.type
    check(st, "lo", "hi", "wide")
    bits = 8 * dtype_of(t).itemsize
    out = f"{t[0]}{2 * bits}" if st.has("wide") else t
    wide = dtype_of(out)

    def product(a: Array, b: Array) -> Array:
        if st.has("hi"):
            return _high(a, b)
        found: Array = a.astype(wide) * b.astype(wide)
        return found

    if name == "mul":
        return _step(machine, st, product, out, t, t)
    return _step(machine, st, lambda a, b, c: product(a, b) + c, out, t, t, out)


def _high(a: Array, b: Array) -> Array:
    """The upper half of products."""
    if a.dtype.itemsize < 8:
        bits = 8 * a.dtype.itemsize
        kind = _I64 if a.dtype.kind == "i" else _U64
        return (a.astype(kind) * b.astype(kind) >> kind(bits)).astype(a.dtype)
    x, y = a.view(_U64), b.view(_U64)
    low, half = _U64(0xFFFFFFFF), _U64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    high = x1 * y1 + (middle >> half) + ((middle & low) + x0 * y1 >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, _U64(0)) - np.where(b < 0, x, _U64(0))
    found: Array = high.view(a.dtype)
    return found


@opcode("addc", "subc")
def _carry(machine: Machine, st: Statement) -> Step:
    check(st, "cc")
    subtracts, t = st.opcode[0].startswith("sub"), "u" + st.type[1:]
    if t != "u32":
        raise PtxError(f"{st}: carries are implemented for 32 bits.")
    write = machine.target(st.operands[0], t)
    read_a, read_b = machine.sources(st, t, 1, 2)
    takes, gives = st.opcode[0] in ("addc", "subc"), st.has("cc")

    def step(lanes: Lanes) -> None:
        a, b = read_a(lanes).astype(_I64), read_b(lanes).astype(_I64)
        c = machine.carry[lanes.index].astype(_I64) if takes else _I64(0)
        value = a - b - c if subtracts else a + b + c
        write(lanes, (value & 0xFFFFFFFF).astype(_U32))
        if gives:
            machine.carry[lanes.index] = (value >> 32) & 1 != 0

    return step


@opcode("and", "or", "xor", "not", "cnot")
def _logic(machine: Machine, st: Statement) -> Step:
    check(st)
    t = st.type
    functions: dict[str, Callable[..., Array]] = {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "not": np.invert,
        "cnot": lambda a: (a == 0).astype(a.dtype),
    }
    n = len(st.operands)
    return _step(machine, st, functions[st.opcode[0]], *(t,) * n)


@opcode("lop3")
def _lop3(machine: Machine, st: Statement) -> Step:
    check(st)
    table = st.operands[4]
    if not isinstance(table, Immediate):
        raise PtxError(f"{st}: the truth table must be a constant.")
    write = machine.target(st.operands[0], "b32")
    reads = machine.sources(st, "b32", 1, 2, 3)
    minterms = [i for i in range(8) if int(table.value) >> i & 1]

    def step(lanes: Lanes) -> None:
        a, b, c = (read(lanes) for read in reads)
        value = np.zeros(lanes.n, _U32)
        for i in minterms:
            value |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        write(lanes, value)

    return step


@opcode("shl", "shr")
def _shift(machine: Machine, st: Statement) -> Step:
    check(st)
    bits, t = 8 * dtype_of(st.type).itemsize, st.type

    def left(a: Array, n: Array) -> Array:
        return np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), 0)

    def right(a: Array, n: Array) -> Array:
        shifted = a >> np.minimum(n, bits - 1).astype(a.dtype)
        return shifted if is_signed(t) else np.where(n < bits, shifted, 0)

    return _step(machine, st, left if st.opcode[0] == "shl" else right, t, t, "u32")


@opcode("shf")
def _funnel(machine: Machine, st: Statement) -> Step:
    check(st, "l", "r", "wrap", "clamp")

    def funnel(a: Array, b: Array, c: Array) -> Array:
        n = (c & _U32(31) if st.has("wrap") else np.minimum(c, _U32(32))).astype(_U64)
        both = b.astype(_U64) << _U64(32) | a.astype(_U64)
        return (both << n >> _U64(32) if st.has("l") else both >> n) & _U64(0xFFFFFFFF)

    return _step(machine, st, funnel, "b32", "b32", "b32", "u32")


@opcode("bfe")
def _extract(machine: Machine, st: Statement) -> Step:
    check(st)
    t, bits = st.type, 8 * dtype_of(st.type).itemsize

    def extract(a: Array, position: Array, length: Array) -> Array:
        unsigned = a.view(_unsigned(a)).astype(_U64)
        at, n = (position & _U32(255)).astype(_U64), (length & _U32(255)).astype(_U64)
        ones = np.where(n >= 64, ~_U64(0), (_U64(1) << np.minimum(n, 63)) - _U64(1))
        value = np.where(at < bits, unsigned >> np.minimum(at, 63), _U64(0)) & ones
        if is_signed(t):
            sign_at = np.minimum(np.maximum(at + n, 1) - 1, bits - 1).astype(_U64)
            negative = (unsigned >> sign_at & _U64(1)).astype(bool) & (n > 0)
            kept = np.where(bits - np.minimum(at, bits) < n, bits - np.minimum(at, bits), n)
            fill = np.where(kept >= 64, _U64(0), ~_U64(0) << np.minimum(kept, 63).astype(_U64))
            value = np.where(negative, value | fill, value)
        return value.astype(_unsigned(a)).view(a.dtype)

    return _step(machine, st, extract, t, t, "u32", "u32")


@opcode("bfi")
def _insert(machine: Machine, st: Statement) -> Step:
    check(st)
    t, bits = st.type, 8 * dtype_of(st.type).itemsize

    def insert(a: Array, b: Array, position: Array, length: Array) -> Array:
        at, n = (position & _U32(255)).astype(_U64), (length & _U32(255)).astype(_U64)
        ones = np.where(n >= 64, ~_U64(0), (_U64(1) << np.minimum(n, 63)) - _U64(1))
        inside = at < bits
        field = np.where(inside, ones << np.minimum(at, 63), _U64(0))
        moved = np.where(inside, a.astype(_U64) << np.minimum(at, 63), _U64(0))
        return b.astype(_U64) & ~field | moved & field

    return _step(machine, st, insert, t, t, t, "u32", "u32")


@opcode("prmt")
def _permute(machine: Machine, st: Statement) -> Step:
    check(st)

    def permute(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(_U64) | b.astype(_U64) << _U64(32)
        value = np.zeros(len(a), _U64)
        for i in range(4):
            choice = (selector >> _U32(4 * i) & _U32(15)).astype(_U64)
            byte = both >> (choice & _U64(7)) * _U64(8) & _U64(255)
            sign = np.where(byte & _U64(128), _U64(255), _U64(0))
            value |= np.where(choice & _U64(8), sign, byte) << _U64(8 * i)
        return value

    return _step(machine, st, permute, "b32", "b32", "b32", "b32")


@opcode("dp4a", "dp2a")
def _dot(machine: Machine, st: Statement) -> Step:
    ta, tb = st.opcode[-2:]
    check(st, "lo", "hi", n_types=2)
    out = "u32" if ta == tb == "u32" else "s32"
    bytes_of = {"u32": np.uint8, "s32": np.int8}

    def dot4(a: Array, b: Array, c: Array) -> Array:
        x = np.ascontiguousarray(a).view(bytes_of[ta]).reshape(-1, 4).astype(_I64)
        y = np.ascontiguousarray(b).view(bytes_of[tb]).reshape(-1, 4).astype(_I64)
        found: Array = (x * y).sum(axis=1) + c
        return found

    def dot2(a: Array, b: Array, c: Array) -> Array:
        halves = np.uint16 if ta == "u32" else np.int16
        x = np.ascontiguousarray(a).view(halves).reshape(-1, 2).astype(_I64)
        y = np.ascontiguousarray(b).view(bytes_of[tb]).reshape(-1, 4).astype(_I64)
        found: Array = (x * (y[:, 2:] if st.has("hi") else y[:, :2])).sum(axis=1) + c
        return found

    return _step(machine, st, dot4 if st.opcode[0] == "dp4a" else dot2, out, ta, tb, out)


@opcode("popc", "clz", "brev", "bfind")
def _bits(machine: Machine, st: Statement) -> Step:
    check(st, "shiftamt")
    name, t, n_bits = st.opcode[0], st.type, 8 * dtype_of(st.type).itemsize
    if is_signed(t):
        raise PtxError(f"{st}: not implemented for signed types.")

    def planes(a: Array) -> Array:
        """[n_bits, lanes], the lowest bit first."""
        shifts = np.arange(n_bits, dtype=_U64)[:, None]
        found: Array = (a.astype(_U64)[None, :] >> shifts & _U64(1)).astype(_I64)
        return found

    def top(a: Array) -> Array:
        """The place of the highest bit that is set, -1 where none is."""
        found: Array = (planes(a) * (np.arange(n_bits)[:, None] + 1)).max(axis=0) - 1
        return found

    if name == "popc":
        return _step(machine, st, lambda a: planes(a).sum(axis=0), "u32", t)
    if name == "clz":
        return _step(machine, st, lambda a: n_bits - 1 - top(a), "u32", t)
    if name == "bfind":
        amount = n_bits - 1 if st.has("shiftamt") else 0
        return _step(
            machine,
            st,
            lambda a: np.where(top(a) < 0, 0xFFFFFFFF, amount - top(a) if amount else top(a)),
            "u32",
            t,
        )

    def reverse(a: Array) -> Array:
        shifts = np.arange(n_bits, dtype=_U64)[::-1, None]
        found: Array = (planes(a).astype(_U64) << shifts).sum(axis=0, dtype=_U64)
        return found

    return _step(machine, st, reverse, t, t)
