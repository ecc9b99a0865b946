"""What the command line says beside its output: notices, errors and progress, all on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO, cast

from pykvq.closing import Closing

if TYPE_CHECKING:
    from rich.console import Console

#: What takes less than so many seconds gets no progress bar.
_PATIENCE = 1.0


class UsageError(Exception):
    """The command line asks for something that makes no sense; a full sentence says what."""


def notice(text: str) -> None:
    """Prints one line about what is being done."""
    _print(text)


def warn(text: str) -> None:
    """Prints one line about something that may surprise."""
    _print(f"warning: {text}")


def fail(text: str) -> None:
    """Prints one line about why the command ends."""
    _print(f"error: {text}")


def _print(text: str) -> None:
    try:
        print(f"pykvq: {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # stderr is full, or closed: what goes to stdout matters more
        sys.stderr = nowhere("w")


def print_json(facts: object) -> None:
    """Prints one line of JSON on stdout; null stands for numbers that JSON does not have."""
    print(json.dumps(_finite(facts), allow_nan=False), flush=True)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def table_console(width: int | None = None) -> Console:
    """Where tables go: to stdout, whose reader may go away as for any other output.

    Args:
        width: Of what is no terminal; by default rich's own.
    """
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    console = Quiet(highlight=False)
    return console if width is None or console.is_terminal else Quiet(highlight=False, width=width)


def nowhere(mode: str) -> TextIO:
    """A stream in place of one that the process does not have."""
    return cast("TextIO", open(os.devnull, mode, encoding="utf-8"))


def counted(n: int, what: str) -> str:
    """A number of things, of which `what` is the singular."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def size(n_bytes: int) -> str:
    """A number of bytes in words, in decimal units."""
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:.1f} kB"
    if n_bytes < 1e9:
        return f"{n_bytes / 1e6:.1f} MB"
    return f"{n_bytes / 1e9:.2f} GB"


class ProgressBar(Closing):
    """A bar on stderr, for anything that takes over a second, if a person is looking.

    It is called as a `pykvq.model.Progress`: (what, how much is done, of how much).
    """

    def __init__(self) -> None:
        self._visible = sys.stderr.isatty()
        self._what: str | None = None
        self._since = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Shows how far `what` is; a new `what` begins a new bar."""
        if not self._visible:
            return
        if what != self._what:
            self.close()
            self._what, self._since = what, time.monotonic()
        if self._bar is None and done < total and time.monotonic() - self._since > _PATIENCE:
            self._open(what)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
            if done >= total:
                self.close()

    def _open(self, what: str) -> None:
        from rich import progress
        from rich.console import Console

        columns = [
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeRemainingColumn(),
        ]
        self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task(what)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._what = None


class ProgressLines(Closing):
    """A line on stderr every now and then, where output goes to a file: for work of minutes.

    It is called as a `pykvq.model.Progress`.
    """

    def __init__(self, every: float = 30.0) -> None:
        """Prints nothing before `every` seconds have gone by."""
        self._every = every
        self._what: str | None = None
        self._since = self._said = 0.0
        self._first = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Says how far `what` is, at what rate, and how long the rest will take."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._since, self._said, self._first = what, now, now, done
        if now - self._said < self._every or done >= total:
            return
        self._said = now
        rate = max(done - self._first, 1) / (now - self._since)
        notice(
            f"{what}: {done} of {total} ({100 * done / total:.0f} %), {rate:.3g} per second, about"
            f" {duration((total - done) / rate)} left"
        )

    def close(self) -> None:
        """Forgets what it was called with."""
        self._what = None


def duration(seconds: float) -> str:
    """A time in words: hours and minutes, or minutes and seconds."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02} min"


def long_progress() -> ProgressBar | ProgressLines:
    """How to show the progress of work that may take hours: a bar to people, lines to files."""
    return ProgressBar() if sys.stderr.isatty() else ProgressLines()
