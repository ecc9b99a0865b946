"""What a copy within the memory of a CUDA device reaches, by the events of its driver.

Owns the few calls of the driver that this takes; pykvq itself need not know any bandwidth.
"""

from __future__ import annotations

import ctypes
import os
import statistics
from typing import Any

REPETITIONS = 7


class Driver:
    """libcuda, or what $KVQ_LIBCUDA names; `driver.cuInit(0)` raises where it fails."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ.get("KVQ_LIBCUDA") or "libcuda.so.1")

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def call(*args: Any) -> None:
            status = function(*args)
            if status != 0:
                raise RuntimeError(f"{name} failed with CUDA error {status}, expected 0.")

        return call


def copy_speed(index: int, n_bytes: int) -> float:
    """Bytes read and written per second by a copy of so many bytes, the median of some.

    Args:
        index: Of the device.
        n_bytes: More than its cache holds.
    """
    driver = Driver()
    device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    first, last = ctypes.c_void_p(), ctypes.c_void_p()
    source, target = ctypes.c_uint64(), ctypes.c_uint64()
    size, milliseconds = ctypes.c_size_t(n_bytes), ctypes.c_float()
    driver.cuInit(0)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    try:
        driver.cuCtxPushCurrent_v2(context)
        driver.cuStreamCreate(ctypes.byref(stream), 0)
        for event in (first, last):
            driver.cuEventCreate(ctypes.byref(event), 0)
        for memory in (source, target):
            driver.cuMemAlloc_v2(ctypes.byref(memory), size)
            driver.cuMemsetD8Async(memory, ctypes.c_ubyte(0), size, stream)
        times = []
        for _ in range(1 + REPETITIONS):
            driver.cuEventRecord(first, stream)
            driver.cuMemcpyDtoDAsync_v2(target, source, size, stream)
            driver.cuEventRecord(last, stream)
            driver.cuEventSynchronize(last)
            driver.cuEventElapsedTime(ctypes.byref(milliseconds), first, last)
            times.append(milliseconds.value)
        for memory in (source, target):
            driver.cuMemFree_v2(memory)
        for event in (first, last):
            driver.cuEventDestroy_v2(event)
        driver.cuStreamDestroy_v2(stream)
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)
    return 2 * n_bytes / (statistics.median(times[1:]) * 1e-3)
