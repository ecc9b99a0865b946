"""An interpreter of the PTX that nvcc emits, on numpy: it runs kernels where there is no GPU.

It is a checker, not an emulator of some device: what a program may not rely on (memory that nobody
wrote, a lane that is not there, an address beside a buffer) ends the run with a sentence that names
the statement and the thread. It does not see races between warps of a block: all threads of the
grid go in lockstep.
"""

from __future__ import annotations

from .counts import Counts, class_of
from .parser import Kernel, Module, Statement, parse
from .runner import Device, compile_ptx, find_nvcc
from .scalars import PtxError

__all__ = [
    "Counts",
    "Device",
    "Kernel",
    "Module",
    "PtxError",
    "Statement",
    "class_of",
    "compile_ptx",
    "find_nvcc",
    "parse",
]
