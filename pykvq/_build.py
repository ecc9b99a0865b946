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
BUILD = Path(os.environ.get("BUILD", "build"))


def declarations() -> str:
    """The part of core/kvq.h between the cffi marks."""
    header = (ROOT / "core" / "kvq.h").read_text()
    marked = re.search(r"/\* \[cffi-begin\] \*/(.*)/\* \[cffi-end\] \*/", header, re.DOTALL)
    if marked is None:
        raise RuntimeError("core/kvq.h has lost its cffi marks")
    return marked.group(1)


def build_core() -> str:
    """Makes the static library and returns its path, relative to the root."""
    make = os.environ.get("MAKE", "make")
    library = BUILD / "libkvq.a"
    subprocess.run([make, "--no-print-directory", str(library)], cwd=ROOT, check=True)
    return str(library)


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "pykvq._native",
    '#include "kvq.h"',
    include_dirs=["core"],
    extra_objects=[str(BUILD / "libkvq.a")],
    libraries=["m", "pthread"],
    py_limited_api=True,
    depends=[str(BUILD / "libkvq.a"), "core/kvq.h"],
)
