"""Runs a few lines of PTX, or one instruction on arrays: what tests of the interpreter share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .counts import Counts
from .runner import Device
from .scalars import Array

HEADER = """
.version 8.0
.target sm_80
.address_size 64
"""
REGISTERS = """
    .reg .pred %p<8>;
    .reg .b16 %h<16>;
    .reg .b32 %r<40>;
    .reg .f32 %f<16>;
    .reg .b64 %d<32>;
    .reg .f64 %g<8>;
    mov.u32 %r0, %tid.x;
"""
_DTYPES = {
    "8": {"u": "u1", "s": "i1", "b": "u1"},
    "16": {"u": "u2", "s": "i2", "b": "u2", "f": "f2"},
    "32": {"u": "u4", "s": "i4", "b": "u4", "f": "f4"},
    "64": {"u": "u8", "s": "i8", "b": "u8", "f": "f8"},
}


def dtype_of(name: str) -> np.dtype[Any]:
    """The numpy type of a PTX type; packed halves are words."""
    return np.dtype(np.uint32) if name.endswith("x2") else np.dtype(_DTYPES[name[1:]][name[0]])


def register_of(name: str, i: int) -> str:
    """A register (of those that `entry` declares) for a value of a type; 0 <= i < 8."""
    if name == "f32":
        return f"%f{i}"
    if name == "f64":
        return f"%g{i}"
    return {1: "%h", 2: "%h", 4: "%r", 8: "%d"}[dtype_of(name).itemsize] + str(i + 8)


def entry(body: str, n_params: int, *, outside: str = "") -> str:
    """A module with a kernel k(p0, p1, ...) of addresses; %r0 is the thread within its block."""
    params = ", ".join(f".param .u64 p{i}" for i in range(n_params))
    return f"{HEADER}{outside}.visible .entry k({params})\n{{{REGISTERS}{body}\n    ret;\n}}\n"


def run(
    body: str,
    inputs: Sequence[Array],
    out: Array,
    threads: int,
    *,
    grid: int = 1,
    outside: str = "",
    device: Device | None = None,
    dynamic_shared: int = 0,
) -> tuple[Array, Counts]:
    """Runs a body whose parameters p0, p1, ... are the addresses of the inputs, then the output.

    Args:
        body: PTX, without `ret`.
        inputs: Arrays, which the kernel may not write.
        out: An array of the shape and type of the output.
        threads: Of a block.
        grid: Blocks.
        outside: Variables of module scope.
        device: Where to run; a new one by default.
        dynamic_shared: Bytes.

    Returns:
        The output (unwritten bytes are 0xff), and the counts.
    """
    device = device or Device()
    module = device.load(entry(body, len(inputs) + 1, outside=outside))
    addresses = [device.put(array, f"input {i}") for i, array in enumerate(inputs)]
    result = device.allocate(out.nbytes, "output")
    counts = device.launch(
        module, "k", grid, threads, *addresses, result, dynamic_shared=dynamic_shared
    )
    return device.get(result, out.shape, out.dtype), counts


def apply(opcode: str, types: str, *arrays: Array) -> Array:
    """One instruction on elements: types "out in in ..."; a constant operand is in the opcode."""
    to, *of = types.split()
    code, _, constant = opcode.partition(" ")
    n = len(arrays[0])
    lines = []
    for i, name in enumerate([*of, to]):
        size = dtype_of(name).itemsize
        lines += [f"ld.param.u64 %d0, [p{i}];", f"mad.wide.u32 %d{i + 1}, %r0, {size}, %d0;"]
        if i < len(of):
            lines.append(f"ld.global.b{8 * size} {register_of(name, i)}, [%d{i + 1}];")
    operands = ", ".join(register_of(name, i) for i, name in enumerate(of))
    result = register_of(to, 7)
    lines.append(f"{code} {result}, {operands}{', ' if constant else ''}{constant};")
    lines.append(f"st.global.b{8 * dtype_of(to).itemsize} [%d{len(of) + 1}], {result};")
    out = np.zeros(n, dtype_of(to))
    return run("\n".join(lines), arrays, out, n)[0]
