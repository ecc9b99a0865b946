"""What a task of an evaluation is, and how its work is done and kept.

Owns the loop over schemes and parts; what is measured is in `tasks_text`, `tasks_generation` and
`tasks_recall`, one class per task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pykvq.eval.lanes import SessionPool

if TYPE_CHECKING:
    from pykvq.eval.lanes import Lane
    from pykvq.eval.record import Json, Record
    from pykvq.model import Model, Progress
    from pykvq.moments import Moments

Count = Callable[[int], None]
#: Told of each finished piece of work: (task, scheme, summary).
Announce = Callable[[str, str, "Json"], None]


class Task(ABC):
    """One kind of measurement, on one model and text.

    Attributes:
        name: What `--tasks` calls it.
        lockstep: Whether all schemes are measured together, since they are compared with the
            reference position by position; otherwise one after the other.
        remedy: What to give it more or less of if what it scores reads no sealed block.
        n_batch: Tokens per pass that it asks for, if it does.
    """

    name: ClassVar[str]
    lockstep: ClassVar[bool]
    remedy: ClassVar[str]
    n_batch: int | None = None

    @property
    @abstractmethod
    def n_ctx(self) -> int:
        """Tokens that a session has to hold."""

    @abstractmethod
    def settings(self) -> Json:
        """All that the results depend on, beside model, text, sinks and window."""

    @abstractmethod
    def units(self) -> list[str]:
        """The names of its parts, such as the number of a chunk."""

    @abstractmethod
    def tokens(self, unit: str) -> int:
        """How many tokens a part makes each scheme read, at most."""

    @abstractmethod
    def sealed_share(self, sinks: int, window: int) -> float:
        """Which part, 0 to 1, of what it scores has read sealed blocks."""

    @abstractmethod
    def measure(
        self, unit: str, lanes: Sequence[Lane], pool: SessionPool, count: Count
    ) -> dict[str, Json]:
        """Measures one part.

        Args:
            unit: Its name.
            lanes: The reference, then the schemes to measure; without lockstep just one scheme.
            pool: Has their sessions.
            count: Told how many tokens were read each time.

        Returns:
            What was found, by the name of the scheme: plain JSON values.
        """

    @abstractmethod
    def summarize(self, parts: Mapping[str, Json]) -> Json:
        """What all parts of one scheme together say."""


def run_task(
    task: Task,
    model: Model,
    lanes: Sequence[Lane],
    record: Record,
    moments: Callable[[], Moments],
    *,
    n_threads: int | None = None,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> None:
    """Does what of a task's work the record does not hold yet, and keeps it there.

    Args:
        task: The task; the record must have been bound to its settings.
        model: The model.
        lanes: The schemes, the reference first.
        record: Where results are kept.
        moments: Gives the model's moments; called only if a scheme needs them.
        n_threads: Threads.
        progress: Told how far it is: (task, n_done, n) in tokens, summed over schemes.
        announce: Told of each scheme that is finished.
    """
    units = task.units()
    todo = [lane for lane in lanes if record.result(task.name, lane.name) is None]
    groups = [todo] if task.lockstep else [[lane] for lane in todo]
    meter = _Meter(task, progress)
    for group in groups:
        for unit in units:
            meter.expect(unit, _missing(task, record, unit, group, lanes[0]))
    for group in filter(None, groups):
        with SessionPool(
            model, moments, n_ctx=task.n_ctx, n_batch=task.n_batch, n_threads=n_threads
        ) as pool:
            for unit in units:
                taking_part = _missing(task, record, unit, group, lanes[0])
                if not taking_part:
                    continue
                meter.begin(unit, taking_part)
                parts = task.measure(unit, taking_part, pool, meter.count)
                for lane in group:
                    if lane.name in parts and unit not in record.parts(task.name, lane.name):
                        record.add_part(task.name, lane.name, unit, parts[lane.name])
                record.save()
                meter.end()
        for lane in group:
            found = record.parts(task.name, lane.name)
            summary = {
                **task.summarize({unit: found[unit] for unit in units}),
                "sealed": task.sealed_share(lane.sinks, lane.window),
            }
            record.finish(task.name, lane.name, summary)
            record.save()
            if announce is not None:
                announce(task.name, lane.name, summary)


def _missing(
    task: Task, record: Record, unit: str, group: Sequence[Lane], reference: Lane
) -> list[Lane]:
    """The lanes of a group that lack a part; with lockstep the reference before them."""
    lacking = [lane for lane in group if unit not in record.parts(task.name, lane.name)]
    if task.lockstep and lacking and lacking[0] != reference:
        lacking.insert(0, reference)
    return lacking


class _Meter:
    """Counts tokens for a progress bar; what a part is short of its tokens counts at its end."""

    def __init__(self, task: Task, progress: Progress | None) -> None:
        self._task = task
        self._progress = progress
        self._total = self._done = self._within = self._part = 0

    def expect(self, unit: str, lanes: Sequence[Lane]) -> None:
        self._total += self._task.tokens(unit) * len(lanes)

    def begin(self, unit: str, lanes: Sequence[Lane]) -> None:
        self._within, self._part = 0, self._task.tokens(unit) * len(lanes)

    def count(self, n: int) -> None:
        self._within = min(self._within + n, self._part)
        self._tell(self._done + self._within)

    def end(self) -> None:
        self._done += self._part
        self._tell(self._done)

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(self._task.name, done, self._total)
