"""The stand-in for the CUDA driver (tests/cuda/fake/fakecuda.h), in the process of the tests.

A process loads one driver in its life, the one that KVQ_LIBCUDA names when it is first asked for:
`make cuda-python` sets it.
"""

from __future__ import annotations

import ctypes
import os

import pytest

from pykvq.native_device import Device, devices


class StandIn:
    """What the stand-in knows of those who use it, and what it does to them."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.fakecuda_called.restype = ctypes.c_char_p

    @property
    def leaks(self) -> int:
        """Objects of the driver that were made and not released."""
        return int(self._library.fakecuda_leaks())

    @property
    def violations(self) -> int:
        """Faults of the caller so far, which stderr has."""
        return int(self._library.fakecuda_violations())

    def calls(self, function: str) -> int:
        """Calls of a function since `set`."""
        return int(self._library.fakecuda_calls(function.encode()))

    @property
    def called(self) -> list[str]:
        """The functions of all calls since `set`."""
        names: list[str] = []
        while name := self._library.fakecuda_called(len(names) + 1):
            names.append(name.decode())
        return names

    def set(self, **variables: str | int) -> None:
        """Sets FAKECUDA_ variables by the rest of their names, and unsets all others."""
        for name in ("MEMORY", "FAIL", "INTEGRATED", "PROCESSORS"):
            os.environ.pop(f"FAKECUDA_{name}", None)
        os.environ.update({f"FAKECUDA_{name}": str(value) for name, value in variables.items()})
        self._library.fakecuda_reread()

    @property
    def device(self) -> Device:
        (found,) = devices().found
        return found


def is_stand_in() -> bool:
    """Whether the driver of this process is the stand-in."""
    path = os.environ.get("KVQ_LIBCUDA", "")
    return os.path.isfile(path) and hasattr(ctypes.CDLL(path), "fakecuda_reread")


def open_stand_in() -> StandIn:
    """That of this process, which must be able to run kernels; skips where it has none."""
    if not is_stand_in():
        pytest.skip("KVQ_LIBCUDA names no stand-in for the CUDA driver: `make cuda-python` does")
    stand_in = StandIn(ctypes.CDLL(os.environ["KVQ_LIBCUDA"]))
    device = stand_in.device
    if not device.usable:
        pytest.fail(f"the stand-in cannot run the embedded kernels: {device.why_not}")
    return stand_in
