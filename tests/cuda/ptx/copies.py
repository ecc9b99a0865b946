"""Asynchronous copies from global to shared memory (cp.async), with groups of each thread."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .memory import Window
from .scalars import Array, Index


@dataclass
class _Copy:
    """Copies of some threads on their way."""

    threads: Index
    group: Index  # [threads] the group of the thread that it belongs to
    at: Index  # [threads] offsets in shared memory
    data: Array  # [threads, n] bytes

    def part(self, which: Array) -> _Copy:
        return _Copy(self.threads[which], self.group[which], self.at[which], self.data[which])


class Copies:
    """Bytes land when their own thread waits for their group, and not before.

    Until then the destination counts as never written, so that a read before the wait is an error.
    """

    def __init__(self, n_threads: int, shared: Window) -> None:
        self.shared = shared
        self._open: Index = np.zeros(n_threads, np.int64)  # the group that is being filled
        self._pending: list[_Copy] = []

    def begin(self, threads: Index, at: Index, data: Array) -> None:
        """Starts a copy of data [threads, n] to offsets [threads]."""
        self.shared.forget(at, data.shape[1])
        self._pending.append(_Copy(threads, self._open[threads], at, data))

    def commit(self, threads: Index) -> None:
        """Closes each thread's group."""
        self._open[threads] += 1

    def wait(self, threads: Index, n_left: int) -> None:
        """Lands all but the last n_left closed groups of each thread."""
        limit: Index = np.full(len(self._open), -1, np.int64)
        limit[threads] = self._open[threads] - n_left
        left = []
        for copy in self._pending:
            lands = copy.group < limit[copy.threads]
            landing = copy.part(lands)
            for i in range(landing.data.shape[1]):
                self.shared.store(landing.at + i, landing.data[:, i])
            if not lands.all():
                left.append(copy.part(~lands))
        self._pending = left

    @property
    def n_pending(self) -> int:
        """Copies that nobody waited for yet."""
        return sum(len(copy.threads) for copy in self._pending)
