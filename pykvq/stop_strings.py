"""Where to end a text that is still being written: stop strings in a stream of pieces."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["StopStrings"]


class StopStrings:
    """Cuts streamed text at the first occurrence of any stop string.

    What comes out, `feed` after `feed` and `finish` at the end, is the text up to the earliest
    place where a stop string begins, however the text was cut into pieces. Only a tail that may
    yet turn out to begin a stop string is held back.

    Attributes:
        stopped: Whether a stop string was met. Everything fed later is swallowed.
        matched: The stop string that was met, or None.
    """

    def __init__(self, stop: str | Iterable[str]) -> None:
        """Start with no text.

        Raises:
            TypeError: If a stop string is not a str.
            ValueError: If a stop string is empty.
        """
        if not isinstance(stop, Iterable):
            raise TypeError(f"The stop strings are {stop!r}, expected a str or several of them.")
        self._stops = (stop,) if isinstance(stop, str) else tuple(stop)
        for item in self._stops:
            if not isinstance(item, str):
                raise TypeError(f"The stop string {item!r} is not a str.")
        if "" in self._stops:
            raise ValueError("A stop string is empty, but an empty string occurs everywhere.")
        self._held = ""
        self.stopped = False
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """Take the next piece of text and return what is now safe to show."""
        if self.stopped:
            return ""
        self._held += piece
        # A stop string that is complete must wait for one that may have begun before it.
        open_at = min((self._begins_at(stop) for stop in self._stops), default=len(self._held))
        found = self._first_match()
        if found is not None and found[0] <= open_at:
            return self._stop(*found)
        safe, self._held = self._held[:open_at], self._held[open_at:]
        return safe

    def finish(self) -> str:
        """Say that the text has ended and return what was held back and is not a stop string."""
        found = self._first_match()
        if found is not None:
            return self._stop(*found)
        safe, self._held = self._held, ""
        return safe

    def _stop(self, position: int, matched: str) -> str:
        safe, self._held = self._held[:position], ""
        self.stopped, self.matched = True, matched
        return safe

    def _first_match(self) -> tuple[int, str] | None:
        found = [(self._held.find(stop), len(stop), stop) for stop in self._stops]
        position, _, stop = min((f for f in found if f[0] >= 0), default=(-1, 0, ""))
        return (position, stop) if position >= 0 else None

    def _begins_at(self, stop: str) -> int:
        """Where the longest proper beginning of `stop` that ends the held text begins."""
        n = len(self._held)
        for length in range(min(len(stop) - 1, n), 0, -1):
            if self._held.endswith(stop[:length]):
                return n - length
        return n
