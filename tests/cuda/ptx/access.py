"""Loads, stores, atomics, asynchronous copies, and addresses of one space as those of another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .machine import Lanes, Machine, Source, Step, check, items, opcode
from .memory import (
    LOCAL_WINDOW,
    PARAM_WINDOW,
    SHARED_WINDOW,
    WINDOW_BYTES,
    Fault,
    Memory,
    Window,
)
from .parser import Address, Immediate, Operand, Register, Statement, Symbol
from .scalars import Array, Index, Mask, PtxError, dtype_of, is_float

_SPACES = ("global", "shared", "local", "const", "param")
_HINTS = ("nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "volatile", "weak", "relaxed")
_SCOPES = ("cta", "gpu", "sys", "acquire", "release", "acq_rel", "v2", "v4")


def _check_access(st: Statement, *more: str) -> None:
    hints = [part for part in st.opcode if part.startswith(("L1::", "L2::"))]
    check(st, *_SPACES, *_HINTS, *_SCOPES, *hints, *more)


@dataclass
class _Place:
    """Where some of the lanes access: bytes of one memory."""

    memory: Memory
    at: Index  # offsets
    lanes: Index  # which of the lanes these are
    space: str
    address: Index


class _Addresses:
    """Addresses of a memory operand, checked and turned into offsets of a memory."""

    def __init__(
        self, machine: Machine, st: Statement, operand: Operand, space: str, n: int, *, writes: bool
    ) -> None:
        if not isinstance(operand, Address):
            raise PtxError(f"{st}: {operand} is no address.")
        self.machine, self.n, self.writes = machine, n, writes
        self.space = "global" if space == "const" else space
        self.statement = st.index
        self.counted = space != "const"
        base = operand.base
        if isinstance(base, Symbol):
            fixed = machine.address_of(base) + operand.offset
            self.read: Callable[[Lanes], Index] = lambda lanes: np.full(lanes.n, fixed, np.int64)
        elif isinstance(base, Immediate):
            constant = int(base.value) + operand.offset
            self.read = lambda lanes: np.full(lanes.n, constant, np.int64)
        else:
            self.read = self._from_register(base, operand.offset)

    def _from_register(self, base: Register, offset: int) -> Callable[[Lanes], Index]:
        wide = dtype_of(base.type).itemsize == 8
        read: Source = self.machine.source(base, "u64" if wide else "u32")
        return lambda lanes: read(lanes).astype(np.int64) + offset

    def places(self, lanes: Lanes) -> list[_Place]:
        """What the lanes access, by space; counts it."""
        address = self.read(lanes)
        if self.space:
            return [self._place(lanes, np.arange(lanes.n), address, self.space)]
        window = address // WINDOW_BYTES * WINDOW_BYTES
        found = []
        for space, begin in (
            ("shared", SHARED_WINDOW),
            ("local", LOCAL_WINDOW),
            ("param", PARAM_WINDOW),
        ):
            which = np.flatnonzero(window == begin)
            if len(which):
                found.append(self._place(lanes, which, address[which] - begin, space))
        which = np.flatnonzero(window == 0)
        if len(which) or not found:
            found.append(self._place(lanes, which, address[which], "global"))
        return found

    def _place(self, lanes: Lanes, which: Index, address: Index, space: str) -> _Place:
        machine, threads = self.machine, lanes.threads[which]
        try:
            if space == "global":
                memory: Memory = machine.global_memory
                at = machine.global_memory.locate(address, self.n, writes=self.writes)
                if self.counted:
                    machine.counts.count_global(
                        self.statement, machine.warp[threads], at, self.n, writes=self.writes
                    )
                return _Place(memory, at, which, space, address)
            window, rows = self._window(space, threads)
            at = window.locate(rows, address, self.n)
        except Fault as fault:
            if fault.lane is not None:
                raise Fault(int(which[fault.lane]), str(fault)) from None
            raise
        if space == "shared":
            machine.counts.count_shared(
                self.statement, machine.warp[threads], machine.lane[threads], address, self.n
            )
        return _Place(window, at, which, space, address)

    def _window(self, space: str, threads: Index) -> tuple[Window, Index]:
        if space == "shared":
            return self.machine.shared, self.machine.block[threads]
        if space == "local":
            return self.machine.local, threads
        if self.writes:
            raise PtxError("Parameters are written: not implemented.")
        return self.machine.params, np.zeros(len(threads), np.int64)


def _space(st: Statement) -> str:
    return next((part for part in st.opcode if part in _SPACES), "")


@opcode("ld", "ldu")
def _load(machine: Machine, st: Statement) -> Step:
    _check_access(st)
    dtype, targets = dtype_of(st.type), items(st.operands[0])
    size, constant = dtype.itemsize, st.has("nc")
    addresses = _Addresses(
        machine, st, st.operands[1], _space(st), size * len(targets), writes=False
    )
    # A value in a wider register is extended, a half as the bits it is.
    name = f"b{8 * size}" if is_float(st.type) else st.type
    writes = [machine.target(target, name) for target in targets]
    stored = dtype_of(name)

    def step(lanes: Lanes) -> None:
        values = [np.empty(lanes.n, stored) for _ in targets]
        for place in addresses.places(lanes):
            for i, value in enumerate(values):
                try:
                    value[place.lanes] = place.memory.load(
                        place.at + i * size, stored, constant=constant
                    )
                except Fault as fault:
                    raise Fault(int(place.lanes[fault.lane or 0]), str(fault)) from None
        for write, value in zip(writes, values, strict=True):
            write(lanes, value)

    return step


@opcode("st")
def _store(machine: Machine, st: Statement) -> Step:
    _check_access(st)
    dtype, sources = dtype_of(st.type), items(st.operands[1])
    size = dtype.itemsize
    addresses = _Addresses(
        machine, st, st.operands[0], _space(st), size * len(sources), writes=True
    )
    reads = [machine.source(source, f"b{8 * size}") for source in sources]

    def step(lanes: Lanes) -> None:
        values = [read(lanes) for read in reads]
        for place in addresses.places(lanes):
            for i, value in enumerate(values):
                place.memory.store(place.at + i * size, value[place.lanes])

    return step


_ATOMIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "inc": lambda old, new: np.where(old >= new, new * 0, old + 1).astype(new.dtype),
}


@opcode("atom", "red")
def _atomic(machine: Machine, st: Statement) -> Step:
    """Threads take their turn in ascending order."""
    _check_access(st, "noftz", "cas", *_ATOMIC)
    gives = st.opcode[0] == "atom"
    first = 1 if gives else 0
    dtype = dtype_of(st.type)
    addresses = _Addresses(machine, st, st.operands[first], _space(st), dtype.itemsize, writes=True)
    write = machine.target(st.operands[0], st.type) if gives else None
    reads = [machine.source(operand, st.type) for operand in st.operands[first + 1 :]]
    swaps = st.has("cas")
    name = next((part for part in st.opcode if part in _ATOMIC), "")
    if not swaps and not name:
        raise PtxError(f"{st}: not implemented.")

    def step(lanes: Lanes) -> None:
        values, before = [read(lanes) for read in reads], np.empty(lanes.n, dtype)
        for place in addresses.places(lanes):
            for i, lane in enumerate(place.lanes):
                at = place.at[i : i + 1]
                try:
                    old = place.memory.load(at, dtype)
                except Fault as fault:
                    raise Fault(int(lane), str(fault)) from None
                new = values[-1][lane : lane + 1]
                if swaps:
                    place.memory.store(at, np.where(old == values[0][lane], new, old))
                else:
                    place.memory.store(at, _ATOMIC[name](old, new))
                before[lane] = old[0]
        if write is not None:
            write(lanes, before)

    return step


_WINDOWS = {"global": 0, "const": 0, "param": PARAM_WINDOW, "local": LOCAL_WINDOW}
_WINDOWS["shared"] = SHARED_WINDOW


@opcode("cvta")
def _to_address(machine: Machine, st: Statement) -> Step:
    """A generic address from one of a space, or back (.to)."""
    check(st, "to", *_SPACES)
    begin = _WINDOWS[_space(st)]
    write, read = machine.target(st.operands[0], "s64"), machine.source(st.operands[1], "s64")
    move = -begin if st.has("to") else begin
    return lambda lanes: write(lanes, read(lanes) + np.int64(move))


@opcode("isspacep")
def _is_space(machine: Machine, st: Statement) -> Step:
    begin = _WINDOWS[st.opcode[-1]]
    write, read = machine.target(st.operands[0], "pred"), machine.source(st.operands[1], "s64")
    return lambda lanes: write(lanes, read(lanes) // WINDOW_BYTES * WINDOW_BYTES == begin)


@opcode("prefetch", "prefetchu", "membar", "fence", "discard", "nanosleep", "pragma")
def _nothing(machine: Machine, st: Statement) -> Step:
    """Changes no value: threads run in lockstep on one memory, without caches."""
    return lambda lanes: None


@opcode("cp")
def _copy(machine: Machine, st: Statement) -> Step:
    if st.opcode[:2] != ("cp", "async") or st.has("bulk", "mbarrier", "reduce"):
        raise PtxError(f"{st}: not implemented.")
    copies = machine.copies
    if st.has("commit_group"):
        return lambda lanes: copies.commit(lanes.threads)
    if st.has("wait_group"):
        n_left = _number(st, 0)
        return lambda lanes: copies.wait(lanes.threads, n_left)
    if st.has("wait_all"):  # commits and waits for all

        def step(lanes: Lanes) -> None:
            copies.commit(lanes.threads)
            copies.wait(lanes.threads, 0)

        return step
    return _start_copy(machine, st)


def _start_copy(machine: Machine, st: Statement) -> Step:
    """cp.async.{ca,cg}.shared.global [to], [of], n[, bytes that are read; the rest are zeros]."""
    hints = [part for part in st.opcode if part.startswith("L2::")]
    check(st, "async", "ca", "cg", "shared", "shared::cta", "global", *hints, n_types=0)
    n = _number(st, 2)
    if n not in (4, 8, 16) or (st.has("cg") and n != 16):
        raise PtxError(f"{st}: copies {n} bytes; .ca copies 4, 8 or 16 and .cg 16.")
    to = _Addresses(machine, st, st.operands[0], "shared", n, writes=True)
    of = _Addresses(machine, st, st.operands[1], "global", n, writes=False)
    if len(st.operands) > 3 and getattr(st.operands[3], "type", "") == "pred":
        raise PtxError(f"{st}: ignore-src is not implemented.")
    size = machine.source(st.operands[3], "u32") if len(st.operands) > 3 else None

    def step(lanes: Lanes) -> None:
        data = np.zeros((lanes.n, n), np.uint8)
        n_read = np.full(lanes.n, n) if size is None else size(lanes).astype(np.int64)
        if (n_read > n).any():
            raise Fault(int(np.flatnonzero(n_read > n)[0]), f"reads more than {n} bytes")
        reads = np.flatnonzero(n_read > 0)
        if len(reads):
            (source,) = of.places(Lanes(lanes.threads[reads], machine.n))
            for i in range(n):
                some = i < n_read[reads]
                data[reads[some], i] = _load_bytes(source, some, i, reads)
        (target,) = to.places(lanes)
        machine.copies.begin(lanes.threads, target.at, data)

    return step


def _load_bytes(source: _Place, some: Mask, i: int, lanes: Index) -> Array:
    try:
        return source.memory.load(source.at[some] + i, dtype_of("u8"))
    except Fault as fault:
        raise Fault(int(lanes[some][fault.lane or 0]), str(fault)) from None


def _number(st: Statement, which: int) -> int:
    operand = st.operands[which]
    if not isinstance(operand, Immediate):
        raise PtxError(f"{st}: operand {which + 1} must be a constant.")
    return int(operand.value)
