"""Memories of the machine: bytes that know whether they were written, and who may touch them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .scalars import Array, Dtype, Index, Mask, PtxError, unsigned

GLOBAL_BASE = 0x7_0000_0000
# Where generic addresses of the other spaces lie; an address in a space is small.
PARAM_WINDOW, LOCAL_WINDOW, SHARED_WINDOW = 0x7C << 56, 0x7D << 56, 0x7E << 56
WINDOW_BYTES = 1 << 56
FIRST_ADDRESS = 0x400  # of shared, local and parameter space: so a null pointer is outside
POISON = 0xFF
_ALIGN = 256  # of buffers in the memory's bytes, between which there are gaps

WRITTEN, BY_THIS_LAUNCH = 1, 2


class Fault(PtxError):
    """What one thread did wrong; `lane` is its place among the lanes of the access."""

    def __init__(self, lane: int | None, reason: str) -> None:
        super().__init__(reason)
        self.lane = lane


def _first(bad: Mask) -> int:
    return int(np.flatnonzero(bad)[0])


class Memory:
    """Bytes with a state each. Offsets are aligned to what is read or written there."""

    def __init__(self, n_bytes: int, name: str, *, strict: bool = True) -> None:
        self.data: Array = np.full(n_bytes, POISON, np.uint8)
        self.state: Array = np.zeros(n_bytes, np.uint8)
        self.name = name
        self.strict = strict

    def load(self, at: Index, dtype: Dtype, *, constant: bool = False) -> Array:
        """Values at offsets [n].

        Args:
            at: Offsets in bytes, multiples of the type's size.
            dtype: What is read.
            constant: As ld.global.nc: nothing of this launch may have been written there.

        Raises:
            Fault: Where a byte was never written (if strict), or was during this launch (constant).
        """
        n = dtype.itemsize
        state = self.state.view(unsigned(n))[at // n]
        if self.strict:
            ones = _repeat(WRITTEN, n)
            bad = (state & ones) != ones
            if bad.any():
                raise Fault(_first(bad), f"reads {n} bytes of {self.name} memory never written")
        if constant:
            bad = (state & _repeat(BY_THIS_LAUNCH, n)) != 0
            if bad.any():
                raise Fault(
                    _first(bad),
                    f"reads {n} bytes through the read-only path (.nc) that this launch wrote",
                )
        values: Array = self.data.view(dtype)[at // n]
        return values

    def store(self, at: Index, values: Array) -> None:
        """Writes values [n] at offsets [n]; of several at the same offset the last remains."""
        n = values.dtype.itemsize
        self.data.view(values.dtype)[at // n] = values
        self.state.view(unsigned(n))[at // n] = _repeat(WRITTEN | BY_THIS_LAUNCH, n)

    def forget(self, at: Index, n: int) -> None:
        """Makes n bytes (1, 2, 4, 8 or 16) at each offset unwritten again."""
        width = min(n, 8)
        for i in range(0, n, width):
            self.data.view(unsigned(width))[(at + i) // width] = _repeat(POISON, width)
            self.state.view(unsigned(width))[(at + i) // width] = 0


def _repeat(byte: int, n: int) -> np.unsignedinteger[Any]:
    value: np.unsignedinteger[Any] = unsigned(n).type(int.from_bytes(bytes([byte]) * n, "little"))
    return value


class Window(Memory):
    """A memory of which each block or thread has its own row: shared, local, parameters."""

    def __init__(self, rows: int, n_bytes: int, name: str) -> None:
        self.n_bytes = n_bytes
        self.stride = -(-n_bytes // 16) * 16
        super().__init__(rows * self.stride, name)

    def locate(self, row: Index, address: Index, n: int) -> Index:
        """Offsets of n bytes at addresses [lanes] of this space, in rows [lanes].

        Raises:
            Fault: Where one is outside of the row or not a multiple of n.
        """
        at = address - FIRST_ADDRESS
        bad = (at < 0) | (at + n > self.n_bytes)
        if bad.any():
            lane = _first(bad)
            raise Fault(
                lane,
                f"touches {n} bytes at {int(at[lane])} of {self.n_bytes} bytes of {self.name} "
                "memory: out of bounds",
            )
        _check_alignment(at, n, self.name)
        found: Index = row * self.stride + at
        return found


def _check_alignment(at: Index, n: int, name: str) -> None:
    bad = at % n != 0
    if bad.any():
        lane = _first(bad)
        raise Fault(
            lane,
            f"touches {n} bytes at {int(at[lane])} in {name} memory: misaligned, not a "
            f"multiple of {n}",
        )


@dataclass(frozen=True)
class Buffer:
    """An allocation of global memory."""

    name: str
    address: int
    at: int  # offset in the memory's bytes
    n_bytes: int
    read_only: bool


class Global(Memory):
    """Global memory: buffers, each at an address of its own, with gaps between them; it grows.

    Buffers lie where the memory likes, or at the address of an array of this process, so that
    structures which C code filled with pointers can be given to kernels as they are.
    """

    def __init__(self, *, strict: bool = True) -> None:
        super().__init__(1 << 16, "global", strict=strict)
        self._top = 0
        self._buffers: list[Buffer] = []  # by address
        self._addresses: Index = np.zeros(0, np.int64)
        self._ends: Index = np.zeros(0, np.int64)
        self._moves: Index = np.zeros(0, np.int64)  # offset less address
        self._read_only: Mask = np.zeros(0, bool)

    def allocate(
        self, n_bytes: int, name: str, *, read_only: bool = False, address: int | None = None
    ) -> Buffer:
        """A buffer of bytes that nobody wrote.

        Args:
            n_bytes: Its size.
            name: For sentences about it.
            read_only: Whether kernels may not write it.
            address: Where it lies; by default at a free multiple of 256.

        Raises:
            PtxError: Where another buffer lies at the address.
        """
        begin = -(-(self._top + 1) // _ALIGN) * _ALIGN
        at = begin + (address or 0) % 16
        self._top = at + n_bytes
        self._grow()
        buffer = Buffer(
            name, GLOBAL_BASE + at if address is None else address, at, n_bytes, read_only
        )
        which = int(np.searchsorted(self._addresses, buffer.address, side="right"))
        for other in self._buffers[max(which - 1, 0) : which + 1]:
            if buffer.address < other.address + other.n_bytes and (
                other.address < buffer.address + n_bytes
            ):
                raise PtxError(f"The buffers `{name}` and `{other.name}` overlap.")
        self._buffers.insert(which, buffer)
        self._addresses = np.insert(self._addresses, which, buffer.address)
        self._ends = np.insert(self._ends, which, buffer.address + n_bytes)
        self._moves = np.insert(self._moves, which, at - buffer.address)
        self._read_only = np.insert(self._read_only, which, read_only)
        return buffer

    def _grow(self) -> None:
        if self._top + _ALIGN > len(self.data):
            more = 2 * self._top + _ALIGN - len(self.data)
            more = -(-more // _ALIGN) * _ALIGN
            self.data = np.concatenate([self.data, np.full(more, POISON, np.uint8)])
            self.state = np.concatenate([self.state, np.zeros(more, np.uint8)])

    def offset(self, address: int, n_bytes: int) -> int:
        """Where bytes lie that the host reads or writes.

        Raises:
            PtxError: Where they are not all in one buffer.
        """
        found = self.locate(np.array([address], np.int64), 1, writes=False)
        self.locate(np.array([address + max(n_bytes, 1) - 1], np.int64), 1, writes=False)
        return int(found[0])

    def locate(self, address: Index, n: int, *, writes: bool) -> Index:
        """Offsets of n bytes at absolute addresses [lanes].

        Raises:
            Fault: Where one is in no buffer, misaligned, or written though read-only.
        """
        if not self._buffers:
            raise Fault(0, "touches global memory, of which there is none: out of bounds")
        which = np.searchsorted(self._addresses, address, side="right") - 1
        bad = (which < 0) | (address + n > self._ends[which])
        if bad.any():
            lane = _first(bad)
            raise Fault(lane, f"touches {n} bytes {self._where(int(address[lane]))}: out of bounds")
        bad = address % n != 0
        if bad.any():
            lane = _first(bad)
            raise Fault(
                lane,
                f"touches {n} bytes {self._where(int(address[lane]))}: misaligned, not a multiple "
                f"of {n}",
            )
        if writes:
            bad = self._read_only[which]
            if bad.any():
                lane = _first(bad)
                raise Fault(lane, f"writes {n} bytes {self._where(int(address[lane]))}: read-only")
        found: Index = address + self._moves[which]
        return found

    def _where(self, address: int) -> str:
        which = int(np.searchsorted(self._addresses, address, side="right")) - 1
        buffer = self._buffers[which]
        within = address - buffer.address
        if which < 0 or within > 2 * buffer.n_bytes + _ALIGN:
            return f"at the address {address:#x}, far from all buffers"
        return f"at {within} of the {buffer.n_bytes} bytes of buffer `{buffer.name}`"

    def begin_launch(self) -> None:
        """From here on, what was written is old."""
        self.state &= WRITTEN
