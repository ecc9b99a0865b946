"""What a launch did: warp instructions by statement and class, bytes and sectors of memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .parser import Kernel, Statement
from .scalars import Array, Index

SECTOR = 32  # bytes that L2 and DRAM move at once
_BANKS = 32

_MUFU = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"}
_LOGIC = {"and", "or", "xor", "not", "lop3", "cnot"}
_SHIFT = {"shl", "shr", "shf", "bfe", "bfi"}
_COMPARE = {"setp", "set", "selp", "slct", "min", "max"}
_FREE = {"cvta", "ret", "exit", "isspacep"}


def class_of(statement: Statement) -> str:
    """The class of an instruction, as tables of throughput divide them.

    One of: ldg, stg, cp.async, lds, sts, ldl, stl, ldc, atom, ldmatrix, mma.SHAPE.TYPE, shfl, vote,
    redux, bar, fp64, mufu, div, cvt, dp4a, imul, prmt, logic, shift, compare, fp16, fp32, int64,
    int, branch, mov, free, other.
    """
    name, t = statement.opcode[0], statement.type
    if name in ("ld", "ldu", "st"):
        return _memory_class(statement)
    if name == "cp":
        return "cp.async" if statement.has("shared") else "other"
    if name == "mma":
        shape = next(part for part in statement.opcode if part[0] == "m" and part[1].isdigit())
        return f"mma.{shape}.{statement.opcode[-2]}"
    if name in ("bar", "barrier"):
        return "bar"
    if name in ("atom", "red"):
        return "atom"
    if name in ("vote", "match", "activemask"):
        return "vote"
    if name in ("shfl", "redux", "ldmatrix", "prmt", "cvt"):
        return name
    if name in ("dp4a", "dp2a"):
        return "dp4a"
    if name in ("bra", "brx"):
        return "branch"
    if name in _FREE:
        return "free"
    if name == "mov":
        return "mov"
    if t == "f64":
        return "fp64"
    if name in _MUFU:
        return "mufu"
    if name in ("div", "rem"):
        return "div"
    if name in _COMPARE:
        return "compare"
    if name in _LOGIC:
        return "logic"
    if name in _SHIFT:
        return "shift"
    if t in ("f16", "f16x2", "bf16", "bf16x2"):
        return "fp16"
    if t == "f32":
        return "fp32"
    if name in ("mul", "mad"):
        return "imul"
    if name in ("popc", "clz", "bfind", "brev"):
        return "bits"
    return "int64" if t.endswith("64") else "int"


def _memory_class(statement: Statement) -> str:
    letter = "st" if statement.opcode[0] == "st" else "ld"
    if statement.has("param"):
        return "free"  # an operand from the constant bank
    if statement.has("const"):
        return "ldc"
    if statement.has("shared"):
        return letter + "s"
    return letter + ("l" if statement.has("local") else "g")


@dataclass
class Traffic:
    """Accesses of one statement to global or shared memory."""

    requests: int = 0  # of a warp
    bytes: int = 0  # that its lanes asked for
    sectors: int = 0  # distinct ones of 32 bytes, summed over requests (global)
    passes: int = 0  # of the banks, at least one for each 128 bytes (shared)


@dataclass
class Counts:
    """Counts of one or more launches of one kernel.

    Attributes:
        kernel: What was launched.
        warps: [statements] how many warps executed each.
        lanes: [statements] how many threads did.
        global_reads: Traffic by index of statement; cp.async counts here for what it reads.
        global_writes: The same.
        shared: Traffic of shared memory.
        sectors_read: The distinct sectors of global memory that were read.
        sectors_written: The same, written.
        copies_left: cp.async copies that no thread waited for before it ended.
    """

    kernel: Kernel
    warps: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    lanes: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    global_reads: dict[int, Traffic] = field(default_factory=dict)
    global_writes: dict[int, Traffic] = field(default_factory=dict)
    shared: dict[int, Traffic] = field(default_factory=dict)
    sectors_read: set[int] = field(default_factory=set)
    sectors_written: set[int] = field(default_factory=set)
    copies_left: int = 0

    def __post_init__(self) -> None:
        if len(self.warps) == 0:
            self.warps = np.zeros(len(self.kernel.statements), np.int64)
            self.lanes = np.zeros(len(self.kernel.statements), np.int64)

    def by_class(self) -> Counter[str]:
        """Warp instructions of each class (class_of)."""
        found: Counter[str] = Counter()
        for statement, n in zip(self.kernel.statements, self.warps, strict=True):
            if n:
                found[class_of(statement)] += int(n)
        return found

    def by_opcode(self) -> Counter[str]:
        """Warp instructions by whole opcode."""
        found: Counter[str] = Counter()
        for statement, n in zip(self.kernel.statements, self.warps, strict=True):
            if n:
                found[".".join(statement.opcode)] += int(n)
        return found

    def by_source(self) -> Counter[tuple[str, int]]:
        """Warp instructions by (file, line) of the CUDA source; empty without -lineinfo."""
        found: Counter[tuple[str, int]] = Counter()
        for statement, n in zip(self.kernel.statements, self.warps, strict=True):
            if n and statement.source is not None:
                found[statement.source] += int(n)
        return found

    @property
    def instructions(self) -> int:
        """Warp instructions, free ones left out."""
        return sum(n for name, n in self.by_class().items() if name != "free")

    @property
    def bytes_read(self) -> int:
        """Bytes that lanes read from global memory, repeats counted."""
        return sum(t.bytes for t in self.global_reads.values())

    @property
    def bytes_written(self) -> int:
        """Bytes that lanes wrote to global memory, repeats counted."""
        return sum(t.bytes for t in self.global_writes.values())

    @property
    def sectors_requested(self) -> int:
        """Sectors summed over all requests: what the caches must serve."""
        return sum(t.sectors for d in (self.global_reads, self.global_writes) for t in d.values())

    @property
    def dram_bytes(self) -> int:
        """Bytes of distinct sectors read and written: the least that DRAM moves."""
        return SECTOR * (len(self.sectors_read) + len(self.sectors_written))

    def count_global(
        self, at_statement: int, warp: Index, at: Index, n: int, *, writes: bool
    ) -> None:
        """An access of lanes of warps [lanes] to n bytes each at offsets [lanes]."""
        table = self.global_writes if writes else self.global_reads
        traffic = table.setdefault(at_statement, Traffic())
        sector = at // SECTOR
        pairs = np.unique(warp << 36 | sector)
        traffic.requests += len(np.unique(pairs >> 36))
        traffic.bytes += n * len(at)
        traffic.sectors += len(pairs)
        (self.sectors_written if writes else self.sectors_read).update(np.unique(sector).tolist())

    def count_shared(
        self, at_statement: int, warp: Index, lane: Index, address: Index, n: int
    ) -> None:
        """The same of shared memory. Banks are 4 bytes wide; 8 and 16 bytes go in 2 and 4 parts."""
        traffic = self.shared.setdefault(at_statement, Traffic())
        words = max(n // 4, 1)
        part = warp * 4 + lane // (32 // words)
        word = (address // 4)[:, None] + np.arange(words)
        pairs = np.unique((part[:, None] << 32 | word).ravel())
        banks = (pairs >> 32) * _BANKS + (pairs & 0xFFFFFFFF) % _BANKS
        each, times = np.unique(banks, return_counts=True)
        order = each // _BANKS  # sorted, as `each` is
        begins = np.flatnonzero(np.r_[True, order[1:] != order[:-1]])
        traffic.requests += len(np.unique(warp))
        traffic.bytes += n * len(address)
        traffic.passes += int(np.maximum.reduceat(times, begins).sum())
