"""Builds `pykvq._native`, the cffi module around the C core (out-of-line API mode, abi3).

The declarations are the marked part of core/kvq.h, so they stand in one place only. The core itself
is the static library that the Makefile makes.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "build/libkvq.a"


def declarations() -> str:
    """The part of core/kvq.h between the cffi marks."""
    header = (ROOT / "core" / "kvq.h").read_text()
    marked = re.search(r"/\* \[cffi-begin\] \*/(.*)/\* \[cffi-end\] \*/", header, re.DOTALL)
    if marked is None:
        raise RuntimeError("core/kvq.h has lost its cffi marks")
    return marked.group(1)


def build_core() -> None:
    """Makes the static library. A compiler newer than the code may warn and still build it."""
    make = os.environ.get("MAKE", "make")
    subprocess.run([make, "--no-print-directory", "WERROR=", LIBRARY], cwd=ROOT, check=True)


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "pykvq._native",
    '#include "kvq.h"',
    include_dirs=["core"],
    extra_objects=[LIBRARY],
    libraries=["m", "pthread", "dl"],
    py_limited_api=True,
    depends=[LIBRARY, "core/kvq.h"],
)
