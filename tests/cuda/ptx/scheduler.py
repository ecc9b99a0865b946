"""Runs a kernel: which threads execute what, and who waits for whom.

Threads at the lowest statement go first, whatever warp or block they belong to, so lanes that
diverged meet again where their paths join. Barriers and collectives block: threads go on only when
all whom they wait for have come to the same statement.
"""

from __future__ import annotations

import heapq
from typing import NoReturn

import numpy as np

from . import access, conversions, floats, integers  # noqa: F401  (they register opcodes)
from .machine import BUILDERS, Lanes, Machine, Step
from .memory import Fault
from .parser import Immediate, Statement
from .scalars import Array, Index, Mask, PtxError
from .warp import FULL, Collective, decode, is_collective

MAX_STEPS = 2_000_000  # statements executed in one launch, each for any number of threads


class _Guard:
    """A predicate that a statement depends on."""

    def __init__(self, machine: Machine, st: Statement) -> None:
        self.values = machine.registers[st.guard.name] if st.guard else None
        self.negated = st.guard_negated

    def chosen(self, lanes: Lanes) -> Mask | None:
        """[lanes] whether each executes; None if all do."""
        if self.values is None:
            return None
        found: Mask = self.values[lanes.index]
        return ~found if self.negated else found


class Scheduler:
    """One launch of a machine's kernel, from the first statement to the end of all threads."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.statements = machine, machine.kernel.statements
        self.steps: dict[int, Step | None] = {}  # what was decoded: each when it is first met
        self.collectives: dict[int, Collective] = {}
        self.guards: dict[int, _Guard] = {}
        self.ready: dict[int, list[Index]] = {}
        self.order: list[int] = []  # a heap of the keys of `ready`
        self.at_barrier: dict[int, list[Index]] = {}
        self.at_collective: dict[int, Index] = {}
        self.live_bits: Index = np.bincount(
            machine.warp, weights=(1 << machine.lane).astype(np.float64), minlength=machine.n_warps
        ).astype(np.int64)

    def _decode(self, at: int, st: Statement) -> Step | None:
        """The function of a plain statement; None for what moves threads or makes them wait."""
        try:
            if is_collective(st):
                self.collectives[at] = decode(self.machine, st)
                return None
            name = st.opcode[0]
            if name in ("bra", "brx", "ret", "exit"):
                return None
            if name in ("bar", "barrier"):
                self._check_barrier(st)
                return None
            if name not in BUILDERS:
                raise PtxError(f"{st}: the opcode is not implemented.")
            return BUILDERS[name](self.machine, st)
        except PtxError as error:
            where = "" if str(error).startswith("line ") else f"{st}: "
            raise PtxError(f"{self.machine.kernel.name}, {where}{error}") from None

    def _check_barrier(self, st: Statement) -> None:
        named = st.operands[0] if st.operands else Immediate(0)
        if "sync" not in st.opcode or len(st.operands) > 1 or not isinstance(named, Immediate):
            raise PtxError(f"{st}: only barriers of whole blocks are implemented.")

    # ---- the order of statements ------------------------------------------------------------

    def run(self) -> None:
        """Runs until all threads have ended.

        Raises:
            PtxError: Where a thread does what it must not, threads wait for ever, or it takes more
                than MAX_STEPS.
        """
        self._put(0, self.machine.everyone)
        steps = 0
        with np.errstate(all="ignore"):
            while True:
                if not self.order:
                    if not self._release():
                        break
                    continue
                at = heapq.heappop(self.order)
                parts = self.ready.pop(at)
                threads = parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts))
                steps += self._run_from(at, Lanes(threads, self.machine.n))
                if steps > MAX_STEPS:
                    self._fail(self.statements[at], None, None, "still runs after MAX_STEPS steps")
        self.machine.counts.copies_left += self.machine.copies.n_pending

    def _put(self, at: int, threads: Index) -> None:
        if not len(threads):
            return
        if at in self.ready:
            self.ready[at].append(threads)
        else:
            self.ready[at] = [threads]
            heapq.heappush(self.order, at)

    def _run_from(self, at: int, lanes: Lanes) -> int:
        """Executes up to the next statement that moves threads or where others stand."""
        stop = self.order[0] if self.order else len(self.statements)
        counts, warps = self.machine.counts, self._n_warps(lanes)
        begin = at
        while at < stop:
            st = self.statements[at]
            if at not in self.steps:
                self.steps[at], self.guards[at] = self._decode(at, st), _Guard(self.machine, st)
            step = self.steps[at]
            counts.warps[at] += warps
            counts.lanes[at] += lanes.n
            if step is None:
                self._move(at, st, lanes)
                return at - begin + 1
            chosen = self.guards[at].chosen(lanes)
            if chosen is None or chosen.all():
                self._execute(st, step, lanes)
            elif chosen.any():
                self._execute(st, step, Lanes(lanes.threads[chosen], self.machine.n))
            at += 1
        if at >= len(self.statements):
            self._end(lanes.threads)
        else:
            self._put(at, lanes.threads)
        return at - begin

    def _n_warps(self, lanes: Lanes) -> int:
        if isinstance(lanes.index, slice):
            return self.machine.n_warps
        warps = self.machine.warp[lanes.index]
        return 1 + int(np.count_nonzero(warps[1:] != warps[:-1]))

    def _execute(self, st: Statement, step: Step, lanes: Lanes) -> None:
        try:
            step(lanes)
        except Fault as fault:
            self._fail(st, lanes, fault.lane, str(fault))

    def _move(self, at: int, st: Statement, lanes: Lanes) -> None:
        chosen = self.guards[at].chosen(lanes)
        goes = lanes.threads
        if chosen is not None:
            self._put(at + 1, lanes.threads[~chosen])
            goes = lanes.threads[chosen]
            if not len(goes):
                return
        name = st.opcode[0]
        if name == "bra":
            self._put(self._target(st.labels[0]), goes)
        elif name == "brx":
            self._jump(st, goes)
        elif name in ("ret", "exit"):
            self._end(goes)
        elif at in self.collectives:
            self._meet(at, st, goes)
        else:
            self.at_barrier.setdefault(at, []).append(goes)

    def _target(self, label: str) -> int:
        return self.machine.kernel.labels[label]

    def _jump(self, st: Statement, threads: Index) -> None:
        lanes = Lanes(threads, self.machine.n)
        chosen = self.machine.source(st.operands[0], "u32")(lanes)
        for i, label in enumerate(st.labels):
            self._put(self._target(label), threads[chosen == i])
        if (chosen >= len(st.labels)).any():
            lane = int(np.flatnonzero(chosen >= len(st.labels))[0])
            self._fail(st, lanes, lane, f"jumps to target {chosen[lane]} of {len(st.labels)}")

    def _end(self, threads: Index) -> None:
        self.machine.live[threads] = False
        bits = np.bincount(
            self.machine.warp[threads],
            weights=(1 << self.machine.lane[threads]).astype(np.float64),
            minlength=self.machine.n_warps,
        )
        self.live_bits = self.live_bits & ~bits.astype(np.int64)

    # ---- waiting ----------------------------------------------------------------------------

    def _meet(self, at: int, st: Statement, threads: Index) -> None:
        """Lanes come to a collective; those whose mask is complete execute it."""
        if at in self.at_collective:
            threads = np.sort(np.concatenate([self.at_collective.pop(at), threads]))
        lanes, collective = Lanes(threads, self.machine.n), self.collectives[at]
        warp, lane = self.machine.warp[threads], self.machine.lane[threads]
        if collective.mask is None:
            mask = np.full(lanes.n, FULL, np.int64)
            if (self.live_bits[warp] != FULL).any():
                missing = int(np.flatnonzero(self.live_bits[warp] != FULL)[0])
                self._fail(st, lanes, missing, "needs all 32 lanes, of which some do not exist")
        else:
            mask = collective.mask(lanes).astype(np.int64)
            if (mask >> lane & 1 == 0).any():
                absent = int(np.flatnonzero(mask >> lane & 1 == 0)[0])
                self._fail(st, lanes, absent, f"is not in its own mask {mask[absent]:#010x}")
            mask = mask & self.live_bits[warp]
        complete = (mask & ~self._present(warp, lane, mask)) == 0
        if not complete.all():
            self.at_collective[at] = threads[~complete]
            if not complete.any():
                return
            lanes = Lanes(threads[complete], self.machine.n)
        self._execute(st, collective.step, lanes)
        self._put(at + 1, lanes.threads)

    def _present(self, warp: Index, lane: Index, mask: Index) -> Array:
        """[lanes] as bits, the lanes of the warp that are here with the same mask."""
        teams = np.unique(warp << 32 | mask, return_inverse=True)[1].reshape(-1)
        bits = np.bincount(teams, weights=(1 << lane).astype(np.float64))
        found: Array = bits.astype(np.int64)[teams]
        return found

    def _release(self) -> bool:
        """Lets blocks go on whose threads all wait at one barrier; False once all have ended."""
        machine = self.machine
        if not machine.live.any():
            return False
        released = False
        for at in list(self.at_barrier):
            threads = np.sort(np.concatenate(self.at_barrier[at]))
            block = machine.block[threads]
            complete = np.bincount(block, minlength=machine.n_blocks) == machine.block_threads
            goes = complete[block]
            if goes.any():
                released = True
                self._put(at + 1, threads[goes])
            if goes.all():
                del self.at_barrier[at]
            else:
                self.at_barrier[at] = [threads[~goes]]
        if not released:
            self._deadlock()
        return True

    def _deadlock(self) -> NoReturn:
        machine = self.machine
        waiting = [(at, np.concatenate(parts)) for at, parts in self.at_barrier.items()]
        waiting += list(self.at_collective.items())
        waiting.sort(key=lambda item: item[0])
        block = int(machine.block[waiting[0][1][0]])
        sentences = []
        for at, threads in waiting:
            n = int(np.count_nonzero(machine.block[threads] == block))
            if n:
                sentences.append(f"{n} threads wait at {self.statements[at]}")
        ended = machine.block_threads - int(np.count_nonzero(machine.live[machine.block == block]))
        if ended:
            sentences.append(f"{ended} have ended")
        found = "; ".join(sentences)
        raise PtxError(f"{machine.kernel.name}: threads of block {block} wait for ever: {found}.")

    def _fail(self, st: Statement, lanes: Lanes | None, lane: int | None, reason: str) -> NoReturn:
        machine = self.machine
        who = "it"
        if lanes is not None and lane is not None:
            thread = int(lanes.threads[lane])
            tx, ty, tz = _coordinates(int(machine.thread[thread]), machine.block_dim)
            bx, by, bz = _coordinates(int(machine.block[thread]), machine.grid)
            who = f"thread ({tx}, {ty}, {tz}) of block ({bx}, {by}, {bz})"
        source = f" ({st.source[0]}:{st.source[1]})" if st.source else ""
        raise PtxError(f"{machine.kernel.name}, {st}{source}: {who} {reason}.")


def _coordinates(i: int, dims: tuple[int, int, int]) -> tuple[int, int, int]:
    x, y, _ = dims
    return i % x, i // x % y, i // (x * y)
