"""Floating point: arithmetic rounded as IEEE 754 asks, approximations by their exact value.

`fma` is exact: the sum is taken in binary64 and rounded to odd, after which rounding to a narrower
type gives what rounding the true sum would (Boldo and Melquiond, "Emulation of FMA and correctly
rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers 2008).
Approximate instructions (ex2.approx and others) give the correctly rounded value; a device may be
some units in the last place beside it.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable

import numpy as np

from .machine import Lanes, Machine, Source, Step, Target, check, opcode
from .parser import Operand, Statement
from .scalars import Array, Dtype, Mask, PtxError, dtype_of

_F64 = np.dtype(np.float64)
_ROUNDINGS = ("rn", "rz", "rm", "rp")


def _libm_fma() -> Callable[..., Array]:
    function = ctypes.CDLL(ctypes.util.find_library("m")).fma
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    elementwise: Callable[..., Array] = np.frompyfunc(function, 3, 1)
    return elementwise


def fma_odd(x: Array, y: Array, z: Array) -> Array:
    """x * y + z of types up to binary32 in binary64, rounded to odd where it is not exact."""
    product = x.astype(_F64) * y.astype(_F64)  # exact: at most 48 bits
    addend = z.astype(_F64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(error) & (bits & 1 == 0)
    outwards = (error > 0) == (total > 0)
    moved = bits + np.where(inexact, np.where(outwards, 1, -1), 0)
    found: Array = moved.view(_F64)
    return found


def round_to(value: Array, dtype: Dtype, mode: str = "rn") -> Array:
    """Binary64 values, exact or rounded to odd, in a narrower type."""
    rounded: Array = value.astype(dtype)
    if mode == "rn":
        return rounded
    back = rounded.astype(_F64)
    down, up = (dtype.type(limit) for limit in (-np.inf, np.inf))
    too_high, too_low = back > value, back < value
    if mode == "rm":
        return np.where(too_high, np.nextafter(rounded, down), rounded)
    if mode == "rp":
        return np.where(too_low, np.nextafter(rounded, up), rounded)
    outside = np.where(value > 0, too_high, too_low)
    return np.where(outside, np.nextafter(rounded, dtype.type(0)), rounded)


def flush(x: Array) -> Array:
    """Subnormal numbers as zeros of their sign (.ftz)."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def bf16_to_f32(bits: Array) -> Array:
    """bfloat16, as its bits, to binary32."""
    found: Array = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return found


def f32_to_bf16(x: Array) -> Array:
    """Binary32 to the bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    lowest = bits >> np.uint32(16) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + lowest >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def _halves(bits: Array) -> Array:
    """[lanes] words as [lanes, 2] halves."""
    found: Array = np.ascontiguousarray(bits).view(np.float16).reshape(-1, 2)
    return found


class _Access:
    """Reads and writes the operands of a statement as numbers: [lanes], or [lanes, 2] of f16x2."""

    def __init__(self, machine: Machine, st: Statement) -> None:
        self.machine, self.st, self.type = machine, st, st.type
        if self.type.startswith("bf"):
            raise PtxError(f"{st}: arithmetic of .{self.type} is not implemented.")
        self.packed = self.type == "f16x2"
        self.dtype = np.dtype(np.float16) if self.packed else dtype_of(self.type)
        self.ftz = st.has("ftz")

    def source(self, operand: Operand) -> Source:
        read = self.machine.source(operand, self.type)
        if self.packed:
            return lambda lanes: _halves(read(lanes))
        if self.ftz:
            return lambda lanes: flush(read(lanes))
        return read

    def target(self, operand: Operand) -> Target:
        write = self.machine.target(operand, self.type)
        saturates, ftz, packed = self.st.has("sat"), self.ftz, self.packed

        def finish(lanes: Lanes, values: Array) -> None:
            if saturates:
                values = np.where(np.isnan(values), 0, np.clip(values, 0, 1)).astype(self.dtype)
            if ftz:
                values = flush(values)
            if packed:
                values = np.ascontiguousarray(values, np.float16).view(np.uint32).ravel()
            write(lanes, values)

        return finish


def arithmetic(machine: Machine, st: Statement) -> Step:
    """add, sub, mul, fma, mad, div, min, max, abs, neg of floating point types."""
    name = st.opcode[0]
    check(st, "ftz", "sat", "NaN", "approx", "full", *_ROUNDINGS)
    access = _Access(machine, st)
    write = access.target(st.operands[0])
    reads = [access.source(operand) for operand in st.operands[1:]]
    mode = next((part for part in st.opcode if part in _ROUNDINGS), "rn")
    function = _function(name, access.dtype, mode, st)

    def step(lanes: Lanes) -> None:
        write(lanes, function(*(read(lanes) for read in reads)))

    return step


def _function(name: str, dtype: Dtype, mode: str, st: Statement) -> Callable[..., Array]:
    if name in ("fma", "mad"):
        return _fma(dtype, mode, st)
    if name in ("min", "max"):
        return _extreme(name, propagates=st.has("NaN"))
    if name == "abs":
        return np.abs
    if name == "neg":
        return np.negative
    direct: dict[str, Callable[..., Array]] = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "div": np.divide,
    }
    if name not in direct:
        raise PtxError(f"{st}: not implemented.")
    if mode == "rn":  # numpy's half arithmetic goes through binary32, whose result rounds the same
        return direct[name]
    if dtype == _F64 or name == "div":
        raise PtxError(f"{st}: only rounding to nearest is implemented.")
    one = np.ones(1, dtype)
    exact: dict[str, Callable[..., Array]] = {
        "add": lambda a, b: fma_odd(a, one, b),
        "sub": lambda a, b: fma_odd(a, one, -b),
        "mul": lambda a, b: a.astype(_F64) * b.astype(_F64),
    }
    return lambda a, b: round_to(exact[name](a, b), dtype, mode)


def _fma(dtype: Dtype, mode: str, st: Statement) -> Callable[..., Array]:
    if dtype == _F64:
        if mode != "rn":
            raise PtxError(f"{st}: only rounding to nearest is implemented.")
        exact = _libm_fma()
        return lambda a, b, c: exact(a, b, c).astype(_F64)
    return lambda a, b, c: round_to(fma_odd(a, b, c), dtype, mode)


def _extreme(name: str, *, propagates: bool) -> Callable[..., Array]:
    plain = np.fmin if name == "min" else np.fmax
    strict = np.minimum if name == "min" else np.maximum

    def extreme(a: Array, b: Array) -> Array:
        value = strict(a, b) if propagates else plain(a, b)
        zeros: Mask = (a == 0) & (b == 0)  # -0 is below +0
        if zeros.any():
            sign = np.signbit(a) | np.signbit(b) if name == "min" else np.signbit(a) & np.signbit(b)
            value = np.where(zeros, np.where(sign, -0.0, 0.0).astype(value.dtype), value)
        return value

    return extreme


_APPROXIMATED: dict[str, Callable[..., Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@opcode(*_APPROXIMATED)
def _special_function(machine: Machine, st: Statement) -> Step:
    check(st, "approx", "ftz", "rn")
    access = _Access(machine, st)
    write, read = access.target(st.operands[0]), access.source(st.operands[1])
    function, dtype = _APPROXIMATED[st.opcode[0]], access.dtype

    def step(lanes: Lanes) -> None:
        write(lanes, function(read(lanes).astype(_F64)).astype(dtype))

    return step


@opcode("copysign")
def _copysign(machine: Machine, st: Statement) -> Step:
    check(st)
    access = _Access(machine, st)
    write = access.target(st.operands[0])
    sign, magnitude = (access.source(operand) for operand in st.operands[1:])
    return lambda lanes: write(lanes, np.copysign(magnitude(lanes), sign(lanes)))
