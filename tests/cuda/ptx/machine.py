"""The state of a launch: threads, registers, memories; and how operands become arrays.

An instruction is decoded once, into a function of the lanes that execute it. Lanes are threads of
any warps and blocks; `Lanes.index` picks theirs from an array over all threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .copies import Copies
from .counts import Counts
from .memory import FIRST_ADDRESS, Global, Window
from .parser import Immediate, Kernel, Not, Operand, Register, Statement, Symbol, Vector
from .scalars import Array, Index, Mask, PtxError, dtype_of, is_signed, unsigned

Dim = tuple[int, int, int]
WARP = 32
_POISON = 0xFFFFDEADFFFFDEAD  # of registers: NaN as f32, far from all buffers as an address


class Lanes:
    """Threads that execute a statement together: a sorted index, or a slice that is all of them."""

    __slots__ = ("index", "n", "threads")

    def __init__(self, threads: Index, n_all: int) -> None:
        self.threads = threads
        self.n = len(threads)
        self.index: Index | slice = slice(None) if self.n == n_all else threads


Step = Callable[[Lanes], None]
Source = Callable[[Lanes], Array]
Target = Callable[[Lanes, Array], None]


@dataclass
class Layout:
    """Where named variables lie: bytes from the begin of their space, and that space's size."""

    offsets: dict[str, int]
    n_bytes: int
    n_fixed: int  # bytes before dynamic shared memory


class Machine:
    """A kernel's threads and memories during one launch.

    Attributes:
        n: Threads of the grid.
        thread, block, warp, lane: [n] thread within the block, block, warp of the grid, lane.
        warp_begin: [n] the first thread of the warp.
        live: [n] whether a thread has not ended.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: Dim,
        block: Dim,
        memory: Global,
        symbols: dict[str, int],
        params: bytes,
        shared: Layout,
        local: Layout,
        param_offsets: dict[str, int],
        counts: Counts,
    ) -> None:
        self.kernel, self.grid, self.block_dim = kernel, grid, block
        self.n_blocks, self.block_threads = int(np.prod(grid)), int(np.prod(block))
        self.n = self.n_blocks * self.block_threads
        everyone = np.arange(self.n, dtype=np.int64)
        self.everyone: Index = everyone
        self.thread: Index = everyone % self.block_threads
        self.block: Index = everyone // self.block_threads
        self.lane: Index = self.thread % WARP
        warps_per_block = -(-self.block_threads // WARP)
        self.warp: Index = self.block * warps_per_block + self.thread // WARP
        self.n_warps = self.n_blocks * warps_per_block
        self.warp_begin: Index = everyone - self.lane
        self.live: Mask = np.ones(self.n, bool)
        self.global_memory = memory
        self.symbols = symbols  # of module scope, in global memory
        self.shared_layout, self.local_layout = shared, local
        self.shared = Window(self.n_blocks, shared.n_bytes, "shared")
        self.local = Window(self.n, local.n_bytes, "local")
        self.param_offsets = param_offsets
        self.copies = Copies(self.n, self.shared)
        self.params = Window(1, len(params), "parameter")
        self.params.data[: len(params)] = np.frombuffer(params, np.uint8)
        self.params.state[:] = 1
        self.counts = counts
        self.carry: Mask = np.zeros(self.n, bool)
        self.registers: dict[str, Array] = {}
        for register in kernel.registers.values():
            dtype = dtype_of(register.type)
            stored = dtype if dtype.kind == "b" else unsigned(max(dtype.itemsize, 2))
            poison = _POISON & ((1 << 8 * stored.itemsize) - 1)
            value = True if dtype.kind == "b" else stored.type(poison)
            self.registers[register.name] = np.full(self.n, value, stored)
        self._special = self._special_registers()

    def _special_registers(self) -> dict[str, Array]:
        found: dict[str, Array] = {"%laneid": self.lane}
        bx, by, bz = self.block_dim
        gx, gy, gz = self.grid
        within, block = self.thread, self.block
        for axis, t, b, nt, nb in (
            ("x", within % bx, block % gx, bx, gx),
            ("y", within // bx % by, block // gx % gy, by, gy),
            ("z", within // (bx * by), block // (gx * gy), bz, gz),
        ):
            found[f"%tid.{axis}"] = t
            found[f"%ctaid.{axis}"] = b
            found[f"%ntid.{axis}"] = np.full(self.n, nt)
            found[f"%nctaid.{axis}"] = np.full(self.n, nb)
        one, lane = np.uint64(1), self.lane.astype(np.uint64)
        below = (one << lane) - one
        found["%lanemask_eq"] = one << lane
        found["%lanemask_lt"] = below
        found["%lanemask_le"] = below | one << lane
        found["%lanemask_gt"] = ~(below | one << lane) & np.uint64(0xFFFFFFFF)
        found["%lanemask_ge"] = ~below & np.uint64(0xFFFFFFFF)
        found["%dynamic_smem_size"] = np.full(
            self.n, self.shared_layout.n_bytes - self.shared_layout.n_fixed
        )
        return {name: values.astype(np.uint64) for name, values in found.items()}

    def address_of(self, symbol: Symbol) -> int:
        """The address of a variable or parameter in its own space, plus the symbol's offset."""
        for offsets in (self.shared_layout, self.local_layout):
            if symbol.name in offsets.offsets:
                return FIRST_ADDRESS + offsets.offsets[symbol.name] + symbol.offset
        if symbol.name in self.param_offsets:
            return FIRST_ADDRESS + self.param_offsets[symbol.name] + symbol.offset
        if symbol.name in self.symbols:
            return self.symbols[symbol.name] + symbol.offset
        raise PtxError(f"{self.kernel.name}: no variable or parameter is named {symbol.name}.")

    def source(self, operand: Operand, type_name: str) -> Source:
        """What reads an operand as values of a type, one for each lane."""
        dtype = dtype_of(type_name)
        if isinstance(operand, Immediate):
            if type_name == "pred":
                value = np.bool_(operand.value != 0)
            else:
                bits = operand.pattern(type_name)
                value = unsigned(dtype.itemsize).type(bits).view(dtype)
            return self._constant(value)
        if isinstance(operand, Symbol):
            address = self.address_of(operand)
            return self._constant(unsigned(dtype.itemsize).type(address).view(dtype))
        if isinstance(operand, Not):
            inner = self.registers[operand.register.name]
            return lambda lanes: ~inner[lanes.index]
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} is not an operand that has one value.")
        if operand.type == "special":
            if operand.name not in self._special:
                raise PtxError(f"The special register {operand.name} is not implemented.")
            array = self._special[operand.name]
        else:
            array = self.registers[operand.name]
        if "b" in (array.dtype.kind, dtype.kind):
            if array.dtype != dtype:
                raise PtxError(f"{operand.name} is read as .{type_name}.")
            return lambda lanes: array[lanes.index]
        if array.dtype.itemsize == dtype.itemsize:
            view = array.view(dtype)
            return lambda lanes: view[lanes.index]
        if array.dtype.itemsize < dtype.itemsize:
            raise PtxError(f"{operand.name}, a .{operand.type}, is read as .{type_name}.")
        narrow = unsigned(dtype.itemsize)
        return lambda lanes: array[lanes.index].astype(narrow).view(dtype)

    def _constant(self, value: np.generic) -> Source:
        values = np.broadcast_to(np.asarray(value), (self.n,))
        return lambda lanes: values[: lanes.n]

    def target(self, operand: Operand, type_name: str) -> Target:
        """What writes values of a type to an operand; narrow ones are extended."""
        dtype = dtype_of(type_name)
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} is not an operand that can be written.")
        if operand.type == "sink":
            return lambda lanes, values: None
        array = self.registers[operand.name]
        if "b" in (array.dtype.kind, dtype.kind):
            if array.dtype != dtype:
                raise PtxError(f"{operand.name} is written as .{type_name}.")
            view = array
        elif array.dtype.itemsize == dtype.itemsize:
            view = array.view(dtype)
        elif array.dtype.itemsize > dtype.itemsize:
            letter = "i" if is_signed(type_name) else "u"
            view = array.view(f"{letter}{array.dtype.itemsize}")
            if dtype.kind == "f":
                raise PtxError(f"{operand.name}, a .{operand.type}, is written as .{type_name}.")
        else:
            raise PtxError(f"{operand.name}, a .{operand.type}, is written as .{type_name}.")

        def write(lanes: Lanes, values: Array) -> None:
            view[lanes.index] = values

        return write

    def sources(self, statement: Statement, type_name: str, *which: int) -> list[Source]:
        """Sources of the operands that are named by their place."""
        return [self.source(statement.operands[i], type_name) for i in which]


def items(operand: Operand) -> tuple[Operand, ...]:
    """The operands of a vector, or the one itself."""
    return tuple(operand.items) if isinstance(operand, Vector) else (operand,)


Builder = Callable[[Machine, Statement], Step]
BUILDERS: dict[str, Builder] = {}


def opcode(*names: str) -> Callable[[Builder], Builder]:
    """Registers what decodes the opcodes that begin with the names."""

    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register


def check(statement: Statement, *known: str, n_types: int = 1) -> None:
    """Refuses parts of an opcode, between its name and its types, that are not known.

    Raises:
        PtxError: For a part that is not among those known.
    """
    for part in statement.opcode[1 : len(statement.opcode) - n_types]:
        if part not in known:
            raise PtxError(f"{statement}: `.{part}` is not implemented for {statement.opcode[0]}.")
