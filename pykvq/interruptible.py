"""Long calls into C that Ctrl-C can stop.

Python runs signal handlers in its main thread, between two bytecodes: while that thread is inside a
C function, Ctrl-C waits. So a call made by the main thread is carried out by a helper thread, and
the main thread waits for it on a lock, which signals interrupt. Other threads never run signal
handlers and make their calls themselves.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

#: Seconds until a wait looks again; needed where signals do not interrupt locks (Windows), and
#: between two attempts to cancel.
_POLL = 0.02


class _Task:
    """A call, its end and its exception."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._started = False
        self._released = threading.Lock()
        self._released.acquire()
        self.finished = False
        self.error: BaseException | None = None

    def run(self) -> None:
        """Makes the call, on the first time; only the helper thread may run tasks."""
        if self._started:
            return
        self._started = True
        try:
            self._function()
        except BaseException as error:  # handed to the thread that waits
            self.error = error
        self.finished = True
        self._released.release()

    def wait(self) -> None:
        """Returns when the call has ended, or after a while."""
        self._released.acquire(timeout=_POLL)


class _Helper:
    """The thread that makes the main thread's calls, one after the other."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[_Task] = SimpleQueue()
        threading.Thread(target=self._work, name="pykvq-helper", daemon=True).start()

    def put(self, task: _Task) -> None:
        self._tasks.put(task)

    def _work(self) -> None:
        while True:
            self._tasks.get().run()


_helper: _Helper | None = None


def _forget_helper() -> None:
    global _helper
    _helper = None


if hasattr(os, "register_at_fork"):  # a forked process has no other thread
    os.register_at_fork(after_in_child=_forget_helper)


def call(function: Callable[[], None], cancel: Callable[[], None]) -> None:
    """Calls a function that spends its time in C with the GIL released.

    Args:
        function: What to call. It may run on another thread.
        cancel: Makes the function return early; called, perhaps repeatedly, when a signal handler
            raises an exception such as KeyboardInterrupt.

    Raises:
        BaseException: What a signal handler raised, once the function has returned; or what the
            function raised.
    """
    if threading.current_thread() is not threading.main_thread():
        function()
        return
    global _helper
    if _helper is None:
        _helper = _Helper()
    task = _Task(function)
    queued = False
    interrupt: BaseException | None = None
    # A signal may raise at any line here, also a second one while the first is being dealt with.
    # Queueing a task twice is harmless, and `finished` stays true, so every line can be repeated.
    while True:
        try:
            if not queued:
                _helper.put(task)
                queued = True
            while not task.finished:
                if interrupt is not None:
                    cancel()
                task.wait()
            break
        except BaseException as error:
            interrupt = error
    try:
        if interrupt is not None:
            raise interrupt
        if task.error is not None:
            raise task.error
    finally:
        del task, interrupt  # they refer to this frame by their tracebacks
