"""The interpreter of PTX: each group of instructions that threads execute by themselves, against
plain Python."""

from __future__ import annotations

import itertools
import math
import struct
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda"))
from ptx.snippets import apply, dtype_of, run

Array = npt.NDArray[Any]

U32 = [0, 1, 2, 7, 0x12345678, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF]
U64 = [0, 1, 0x123456789ABCDEF, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**63 + 5, 2**64 - 1]
F32 = [0.0, -0.0, 1.0, -1.5, 3.1415927, 1e-40, -1e-40, 3e38, -3e38, math.inf, -math.inf, math.nan]
SPECIAL = {"e": (10, 5), "f": (23, 8)}  # bits of fraction and exponent, by letter of struct


def crossed(*values: Sequence[Any]) -> list[list[Any]]:
    """All combinations, as a list for each operand, of up to 1000 elements."""
    rows = list(itertools.product(*values))
    if len(rows) > 1000:
        rows = [rows[i] for i in np.random.default_rng(1).choice(len(rows), 1000, replace=False)]
    return [list(column) for column in zip(*rows, strict=True)]


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def check_integers(
    opcode: str, types: str, values: Sequence[Sequence[int]], wanted: Callable[..., int]
) -> None:
    to, *of = types.split()
    columns = crossed(*values)
    arrays = []
    for name, column in zip(of, columns, strict=True):
        bits = 8 * dtype_of(name).itemsize
        column[:] = [signed(x, bits) if name[0] == "s" else x & ((1 << bits) - 1) for x in column]
        arrays.append(np.array(column, dtype_of(name)))
    found = apply(opcode, types, *arrays)
    mask = (1 << 8 * dtype_of(to).itemsize) - 1
    for i, row in enumerate(zip(*columns, strict=True)):
        assert int(found[i]) & mask == wanted(*row) & mask, (opcode, row)


def towards_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


NOT_ZERO = [x for x in U32 if x]
INTEGERS: list[tuple[str, str, list[list[int]], Callable[..., int]]] = [
    ("add.s32", "s32 s32 s32", [U32, U32], lambda a, b: a + b),
    ("add.u64", "u64 u64 u64", [U64, U64], lambda a, b: a + b),
    ("sub.u32", "u32 u32 u32", [U32, U32], lambda a, b: a - b),
    ("mul.lo.s32", "s32 s32 s32", [U32, U32], lambda a, b: a * b),
    ("mul.lo.u64", "u64 u64 u64", [U64, U64], lambda a, b: a * b),
    ("mul.hi.s32", "s32 s32 s32", [U32, U32], lambda a, b: a * b >> 32),
    ("mul.hi.u32", "u32 u32 u32", [U32, U32], lambda a, b: a * b >> 32),
    ("mul.hi.s64", "s64 s64 s64", [U64, U64], lambda a, b: a * b >> 64),
    ("mul.hi.u64", "u64 u64 u64", [U64, U64], lambda a, b: a * b >> 64),
    ("mul.wide.s32", "s64 s32 s32", [U32, U32], lambda a, b: a * b),
    ("mul.wide.u32", "u64 u32 u32", [U32, U32], lambda a, b: a * b),
    ("mul.wide.u16", "u32 u16 u16", [U32, U32], lambda a, b: a * b),
    ("mad.lo.s32", "s32 s32 s32 s32", [U32, U32, U32], lambda a, b, c: a * b + c),
    ("mad.hi.u32", "u32 u32 u32 u32", [U32, U32, U32], lambda a, b, c: (a * b >> 32) + c),
    ("mad.wide.s32", "s64 s32 s32 s64", [U32, U32, U64], lambda a, b, c: a * b + c),
    ("div.s32", "s32 s32 s32", [U32, NOT_ZERO], towards_zero),
    ("div.u32", "u32 u32 u32", [U32, NOT_ZERO], lambda a, b: a // b),
    ("rem.s32", "s32 s32 s32", [U32, NOT_ZERO], lambda a, b: a - b * towards_zero(a, b)),
    ("rem.u64", "u64 u64 u64", [U64, U64[1:]], lambda a, b: a % b),
    ("min.s32", "s32 s32 s32", [U32, U32], min),
    ("min.u32", "u32 u32 u32", [U32, U32], min),
    ("max.s32", "s32 s32 s32", [U32, U32], max),
    ("max.u64", "u64 u64 u64", [U64, U64], max),
    ("abs.s32", "s32 s32", [U32], abs),
    ("neg.s32", "s32 s32", [U32], lambda a: -a),
    ("and.b32", "b32 b32 b32", [U32, U32], lambda a, b: a & b),
    ("or.b64", "b64 b64 b64", [U64, U64], lambda a, b: a | b),
    ("xor.b32", "b32 b32 b32", [U32, U32], lambda a, b: a ^ b),
    ("not.b32", "b32 b32", [U32], lambda a: ~a),
    ("shl.b32", "b32 b32 u32", [U32, [0, 1, 31, 32, 99]], lambda a, n: a << n),
    ("shl.b64", "b64 b64 u32", [U64, [0, 1, 63, 64]], lambda a, n: a << n),
    ("shr.u32", "u32 u32 u32", [U32, [0, 1, 31, 32, 99]], lambda a, n: a >> n),
    ("shr.s32", "s32 s32 u32", [U32, [0, 1, 31, 32, 99]], lambda a, n: a >> n),
    ("shr.s64", "s64 s64 u32", [U64, [0, 1, 63, 64]], lambda a, n: a >> n),
    (
        "shf.l.wrap.b32",
        "b32 b32 b32 u32",
        [U32, U32, [0, 1, 31, 32, 33]],
        lambda a, b, n: (b << 32 | a) << n % 32 >> 32,
    ),
    (
        "shf.r.wrap.b32",
        "b32 b32 b32 u32",
        [U32, U32, [0, 1, 31, 32, 33]],
        lambda a, b, n: (b << 32 | a) >> n % 32,
    ),
    (
        "shf.r.clamp.b32",
        "b32 b32 b32 u32",
        [U32, U32, [0, 1, 31, 32, 33]],
        lambda a, b, n: (b << 32 | a) >> min(n, 32),
    ),
    ("popc.b32", "u32 b32", [U32], lambda a: a.bit_count()),
    ("popc.b64", "u32 b64", [U64], lambda a: a.bit_count()),
    ("clz.b32", "u32 b32", [U32], lambda a: 32 - a.bit_length()),
    ("bfind.u32", "u32 u32", [U32], lambda a: a.bit_length() - 1),
    ("brev.b32", "b32 b32", [U32], lambda a: int(f"{a:032b}"[::-1], 2)),
]


@pytest.mark.parametrize("case", INTEGERS, ids=lambda case: case[0])
def test_integers_are_those_of_python(
    case: tuple[str, str, list[list[int]], Callable[..., int]],
) -> None:
    check_integers(*case)


def extracted(a: int, at: int, n: int, bits: int, with_sign: bool) -> int:
    """bfe bit by bit, as the PTX ISA gives it."""
    source = [a >> i & 1 for i in range(bits)]
    last = min(at + n - 1, bits - 1)
    sign = source[last] if with_sign and n else 0
    return sum((source[at + i] if i < n and at + i < bits else sign) << i for i in range(bits))


@pytest.mark.parametrize("name", ["u32", "s32", "u64", "s64"])
def test_bfe_takes_bits_and_their_sign(name: str) -> None:
    bits = int(name[1:])
    values = U32 if bits == 32 else U64
    check_integers(
        f"bfe.{name}",
        f"{name} {name} u32 u32",
        [values, [0, 1, 5, 31, 32, 63, 200], [0, 1, 4, 8, 31, 32, 64, 255]],
        lambda a, at, n: extracted(a, at, n, bits, name[0] == "s"),
    )


def test_bfi_puts_bits_into_a_word() -> None:
    def wanted(a: int, b: int, at: int, n: int) -> int:
        for i in range(min(n, 32 - min(at, 32))):
            b = b & ~(1 << at + i) | (a >> i & 1) << at + i
        return b

    places = [[0, 1, 5, 31, 32, 200], [0, 1, 4, 31, 32, 255]]
    check_integers("bfi.b32", "b32 b32 b32 u32 u32", [U32, U32, *places], wanted)


def test_prmt_picks_bytes_and_signs() -> None:
    def wanted(a: int, b: int, selector: int) -> int:
        pool = list(a.to_bytes(4, "little") + b.to_bytes(4, "little"))
        chosen = [selector >> 4 * i & 15 for i in range(4)]
        picked = [(255 * (pool[c & 7] >> 7)) if c & 8 else pool[c & 7] for c in chosen]
        return int.from_bytes(bytes(picked), "little")

    selectors = [0x3210, 0x7654, 0x5140, 0xFEDC, 0xBA98, 0x0F17]
    check_integers("prmt.b32", "b32 b32 b32 b32", [U32, U32, selectors], wanted)


@pytest.mark.parametrize("table", [0xC0, 0x96, 0xE8, 0xCA, 0x6A, 0x01, 0x80])
def test_lop3_follows_its_table(table: int) -> None:
    def wanted(a: int, b: int, c: int) -> int:
        bits = [(a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32)]
        return sum((table >> index & 1) << i for i, index in enumerate(bits))

    check_integers(f"lop3.b32 {table:#x}", "b32 b32 b32 b32", [U32, U32, U32], wanted)


@pytest.mark.parametrize("types", ["s32.s32", "u32.s32", "s32.u32", "u32.u32"])
def test_dp4a_sums_four_products(types: str) -> None:
    def parts(x: int, name: str) -> list[int]:
        return [signed(x >> 8 * i, 8) if name[0] == "s" else x >> 8 * i & 255 for i in range(4)]

    def wanted(a: int, b: int, c: int) -> int:
        first, second = types.split(".")
        products = zip(parts(a, first), parts(b, second), strict=True)
        return c + sum(x * y for x, y in products)

    words = [0, 0x01020304, 0x7F80FF01, 0xFFFFFFFF, 0x80808080, 0x7F7F7F7F]
    check_integers(f"dp4a.{types}", "b32 b32 b32 b32", [words, words, [0, 5, 2**31 - 1]], wanted)


def test_carries_go_from_one_word_to_the_next() -> None:
    a, b = (np.array(column, np.uint64) for column in crossed(U64, U64))
    body = """
    ld.param.u64 %d0, [p0]; mad.wide.u32 %d0, %r0, 8, %d0; ld.global.v2.u32 {%r1, %r2}, [%d0];
    ld.param.u64 %d0, [p1]; mad.wide.u32 %d0, %r0, 8, %d0; ld.global.v2.u32 {%r3, %r4}, [%d0];
    add.cc.u32 %r5, %r1, %r3; addc.u32 %r6, %r2, %r4;
    sub.cc.u32 %r7, %r1, %r3; subc.u32 %r8, %r2, %r4;
    ld.param.u64 %d0, [p2]; mad.wide.u32 %d0, %r0, 16, %d0;
    st.global.v4.u32 [%d0], {%r5, %r6, %r7, %r8};
    """
    found, _ = run(body, [a, b], np.zeros((len(a), 2), np.uint64), len(a))
    assert np.array_equal(found, np.stack([a + b, a - b], axis=1))


# ---- floating point -----------------------------------------------------------------------------


def rounded(x: Fraction, letter: str, mode: str = "rn") -> float:
    """A number in binary16 or binary32 as IEEE 754 rounds it: by integers alone."""
    fraction_bits, exponent_bits = SPECIAL[letter]
    bias = (1 << exponent_bits - 1) - 1
    if x == 0:
        return 0.0
    magnitude = abs(x)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, 1 - bias) - fraction_bits)
    whole, rest = divmod(magnitude, unit)
    up = {
        "rn": rest * 2 > unit or (rest * 2 == unit and whole % 2 == 1),
        "rz": False,
        "rm": rest > 0 and x < 0,
        "rp": rest > 0 and x > 0,
    }[mode]
    value = (whole + up) * unit
    largest = (2 - Fraction(2) ** -fraction_bits) * Fraction(2) ** bias
    if value > largest:
        return math.copysign(math.inf, x)
    return math.copysign(float(value), x)


def random_floats(n: int, seed: int, spread: float = 20) -> Array:
    rng = np.random.default_rng(seed)
    return np.array(rng.normal(size=n) * 2.0 ** rng.integers(-spread, spread, n), np.float32)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_fma_rounds_the_exact_sum_once(mode: str) -> None:
    a, b, c = (random_floats(600, seed) for seed in range(3))
    # Sums that lie just beside the middle of two numbers: rounding twice would go wrong.
    a[:200] = 1 + np.arange(200, dtype=np.float32) * 2.0**-23
    b[:200] = 1 + 2.0**-23
    c[:200] = np.where(np.arange(200) % 2, 2.0**-70, -(2.0**-70))
    c[100:200] += np.float32(2.0**24)
    found = apply(f"fma.{mode}.f32", "f32 f32 f32 f32", a, b, c)
    for i in range(600):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        assert found[i] == rounded(exact, "f", mode), (i, a[i], b[i], c[i])


@pytest.mark.parametrize("name", ["add", "sub", "mul"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_arithmetic_rounds_as_asked(name: str, mode: str) -> None:
    a, b = random_floats(300, 5), random_floats(300, 6)
    found = apply(f"{name}.{mode}.f32", "f32 f32 f32", a, b)
    for i in range(300):
        x, y = Fraction(float(a[i])), Fraction(float(b[i]))
        exact = {"add": x + y, "sub": x - y, "mul": x * y}[name]
        assert found[i] == rounded(exact, "f", mode)


def test_halves_in_pairs() -> None:
    rng = np.random.default_rng(3)
    halves = [rng.normal(size=(200, 2)).astype(np.float16) for _ in range(3)]
    words = [h.view(np.uint32).ravel() for h in halves]
    found = apply("fma.rn.f16x2", "f16x2 f16x2 f16x2 f16x2", *words).view(np.float16).reshape(-1, 2)
    for at in np.ndindex(200, 2):
        x, y, z = (Fraction(float(h[at])) for h in halves)
        assert found[at] == rounded(x * y + z, "e")
    summed = apply("add.f16x2", "f16x2 f16x2 f16x2", *words[:2]).view(np.float16).reshape(-1, 2)
    assert np.array_equal(summed, halves[0] + halves[1])


def same_floats(found: Array, wanted: Sequence[float]) -> None:
    for x, y in zip(found.tolist(), wanted, strict=True):
        assert (math.isnan(x) and math.isnan(y)) or (
            x == y and math.copysign(1, x) == math.copysign(1, y)
        ), (x, y)


def test_minimum_and_maximum_pass_over_nan_and_order_zeros() -> None:
    def extreme(x: float, y: float, pick: Callable[..., tuple[float, float]]) -> float:
        if math.isnan(x) or math.isnan(y):
            return y if math.isnan(x) else x
        return pick((x, math.copysign(1, x)), (y, math.copysign(1, y)))[0]

    a, b = (np.array(column, np.float32) for column in crossed(F32, F32))
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    same_floats(apply("min.f32", "f32 f32 f32", a, b), [extreme(x, y, min) for x, y in pairs])
    same_floats(apply("max.f32", "f32 f32 f32", a, b), [extreme(x, y, max) for x, y in pairs])
    found = apply("max.NaN.f32", "f32 f32 f32", a, b)
    assert np.array_equal(np.isnan(found), np.isnan(a) | np.isnan(b))


def test_ftz_takes_and_gives_no_subnormals() -> None:
    a = np.array([1e-40, -1e-40, 1e-38, 2e-38, 1.0], np.float32)
    b = np.array([1.0, 1.0, 0.5, 1.0, 1e-40], np.float32)
    same_floats(apply("mul.ftz.f32", "f32 f32 f32", a, b), [0.0, -0.0, 0.0, float(a[3]), 0.0])
    assert (apply("mul.f32", "f32 f32 f32", a, b) != 0).all()


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("ex2.approx.ftz.f32", lambda x: 2.0**x),
        ("lg2.approx.f32", lambda x: math.log2(abs(x))),
        ("rcp.rn.f32", lambda x: 1 / x),
        ("rsqrt.approx.f32", lambda x: 1 / math.sqrt(abs(x))),
        ("sqrt.rn.f32", lambda x: math.sqrt(abs(x))),
        ("sin.approx.f32", math.sin),
        ("cos.approx.f32", math.cos),
        ("tanh.approx.f32", math.tanh),
    ],
)
def test_functions(opcode: str, function: Callable[[float], float]) -> None:
    x = random_floats(100, 8, 4)
    if opcode.startswith(("lg2", "rsqrt", "sqrt")):
        x = np.abs(x)
    found = apply(opcode, "f32 f32", x)
    assert np.allclose(found, [function(float(value)) for value in x], rtol=1e-6)


def test_division_and_saturation() -> None:
    a, b = random_floats(200, 9), random_floats(200, 10)
    found = apply("div.rn.f32", "f32 f32 f32", a, b)
    for i in range(200):
        assert found[i] == rounded(Fraction(float(a[i])) / Fraction(float(b[i])), "f")
    x = np.array([-1, 0.25, 3, math.nan], np.float32)
    assert apply("add.sat.f32 0f00000000", "f32 f32", x).tolist() == [0, 0.25, 1, 0]


# ---- conversions --------------------------------------------------------------------------------


def test_every_half_becomes_a_float_and_comes_back() -> None:
    for first in range(0, 65536, 1024):
        bits = np.arange(first, first + 1024, dtype=np.uint16)
        wanted = [struct.unpack("<e", struct.pack("<H", b))[0] for b in bits.tolist()]
        floats = apply("cvt.f32.f16", "f32 b16", bits)
        same_floats(floats, wanted)
        back = apply("cvt.rn.f16.f32", "b16 f32", floats)
        number = ~np.isnan(floats)
        assert np.array_equal(back[number], bits[number])


def test_floats_become_halves_to_nearest_even() -> None:
    x = np.concatenate([random_floats(500, 11), random_floats(300, 12, 12) * np.float32(2.0**-14)])
    found = apply("cvt.rn.f16.f32", "f16 f32", x)
    for i in range(800):
        assert float(found[i]) == rounded(Fraction(float(x[i])), "e"), x[i]
    words = apply("cvt.rn.f16x2.f32", "b32 f32 f32", x, x[::-1].copy())
    assert np.array_equal(words >> 16, found.view(np.uint16))
    assert np.array_equal(words & 0xFFFF, found[::-1].copy().view(np.uint16))


@pytest.mark.parametrize(
    ("mode", "function"),
    [("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)],
)
@pytest.mark.parametrize("to", ["s32", "u32", "s64", "s16", "u16"])
def test_floats_become_integers(mode: str, function: Callable[[float], int], to: str) -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2.9, -2.9, 1e9, -1e9, 3e9, 1e30, -1e30], np.float32)
    found = apply(f"cvt.{mode}.{to}.f32", f"{to} f32", x)
    low, high = int(np.iinfo(found.dtype).min), int(np.iinfo(found.dtype).max)
    wanted = [min(max(function(value), low), high) for value in x.tolist()]
    assert found.tolist() == wanted
    assert apply(f"cvt.{mode}.{to}.f32", f"{to} f32", np.array([math.nan], np.float32))[0] == 0


def test_integers_become_others() -> None:
    cases: list[tuple[str, str, Callable[[int], int]]] = [
        ("cvt.s64.s32", "s64 s32", lambda a: a),
        ("cvt.u64.u32", "u64 u32", lambda a: a),
        ("cvt.u32.u64", "u32 u64", lambda a: a),
        ("cvt.s32.s8", "s32 s8", lambda a: a),
        ("cvt.u32.u8", "u32 u8", lambda a: a),
        ("cvt.s32.s16", "s32 s16", lambda a: a),
        ("cvt.u16.u32", "u16 u32", lambda a: a),
        ("cvt.sat.s8.s32", "s16 s32", lambda a: min(max(a, -128), 127)),
        ("cvt.sat.u8.s32", "u16 s32", lambda a: min(max(a, 0), 255)),
        ("cvt.sat.s32.u32", "s32 u32", lambda a: min(a, 2**31 - 1)),
    ]
    for opcode, types, wanted in cases:
        check_integers(opcode, types, [U64 if types.endswith("64") else U32], wanted)
    floats = apply("cvt.rn.f32.s32", "f32 s32", np.array(U32, np.uint32).view(np.int32))
    assert floats.tolist() == [rounded(Fraction(signed(x, 32)), "f") for x in U32]
    floats = apply("cvt.rn.f32.u64", "f32 u64", np.array(U64, np.uint64))
    assert floats.tolist() == [rounded(Fraction(x), "f") for x in U64]
    doubles = np.array([1 / 3, 1e-300, 2.0**-140, 1e300, -5.5])
    assert apply("cvt.rn.f32.f64", "f32 f64", doubles).tolist() == [
        rounded(Fraction(x), "f") for x in doubles.tolist()
    ]
    packed = apply(
        "cvt.pack.sat.s8.s32.b32",
        "b32 s32 s32 b32",
        *(np.array([x], np.int32) for x in (300, -5, 0x1234)),
    )
    assert packed.view(np.uint32)[0] == 0x12347FFB


def test_comparisons_know_nan() -> None:
    a, b = (np.array(column, np.float32) for column in crossed(F32, F32))
    ordered: dict[str, Callable[[float, float], bool]] = {
        "eq": lambda x, y: x == y,
        "ne": lambda x, y: x != y,
        "lt": lambda x, y: x < y,
        "le": lambda x, y: x <= y,
        "gt": lambda x, y: x > y,
        "ge": lambda x, y: x >= y,
    }
    body = """
    ld.param.u64 %d0, [p0]; mad.wide.u32 %d0, %r0, 4, %d0; ld.global.f32 %f0, [%d0];
    ld.param.u64 %d0, [p1]; mad.wide.u32 %d0, %r0, 4, %d0; ld.global.f32 %f1, [%d0];
    setp.{}.f32 %p0|%p1, %f0, %f1;
    selp.u32 %r1, 1, 0, %p0;
    @%p1 or.b32 %r1, %r1, 2;
    ld.param.u64 %d0, [p2]; mad.wide.u32 %d0, %r0, 4, %d0; st.global.u32 [%d0], %r1;
    """
    for name, compare in ordered.items():
        for suffix in ("", "u"):
            out = np.zeros(len(a), np.uint32)
            found, _ = run(body.replace("{}", name + suffix), [a, b], out, len(a))
            for i, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
                unordered = math.isnan(x) or math.isnan(y)
                holds = bool(suffix) if unordered else compare(x, y)
                assert found[i] == (1 if holds else 2), (name, suffix, x, y)


def test_comparisons_combine_with_a_predicate() -> None:
    body = """
    ld.param.u64 %d0, [p0];
    setp.lt.u32 %p0, %r0, 3;
    setp.ge.and.u32 %p1, %r0, 2, %p0;
    setp.ge.or.s32 %p2, %r0, 6, !%p0;
    selp.u32 %r1, 1, 0, %p1;
    @%p2 or.b32 %r1, %r1, 2;
    mad.wide.u32 %d0, %r0, 4, %d0;
    st.global.u32 [%d0], %r1;
    """
    found, _ = run(body, [], np.zeros(8, np.uint32), 8)
    assert found.tolist() == [0, 0, 1, 2, 2, 2, 2, 2]
