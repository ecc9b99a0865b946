"""Our kernels on the interpreter: their PTX, their structs, and the C core to compare with.

Structs are read from the headers that kernels and host share, through cffi, so that no field is
written down twice. Arrays keep the addresses that they have in this process (Device.share): a
struct with their pointers is given to a kernel as it is.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cffi import FFI

from .counts import Counts
from .parser import Module, parse
from .runner import Device, compile_ptx
from .scalars import Array, PtxError

ROOT = Path(__file__).resolve().parents[3]
KERNELS = ROOT / "core" / "cuda" / "kernels"
BUILD = ROOT / "build" / "cuda" / "ptx"
CORE_LIBRARY = ROOT / "build" / "libkvq.a"
# The least that we support, and the first with asynchronous copies and whole products of matrices:
# the two that port.cuh tells apart.
ARCHITECTURES = ("compute_75", "compute_80")
_HERE = Path(__file__).resolve().parent
_INCLUDE = [f"-I{ROOT / 'core'}", f"-I{ROOT / 'tests' / 'cuda'}"]


_KERNEL_SOURCES = {".cu", ".cuh", ".def", ".h"}


def _newest(suffixes: set[str], *folders: Path) -> float:
    files = (p for folder in folders for p in folder.rglob("*") if p.suffix in suffixes)
    return max(p.stat().st_mtime for p in files)


def module_flags(name: str) -> list[str]:
    """What core/cuda/images.mk gives a module beside the flags of all."""
    text = (ROOT / "core" / "cuda" / "images.mk").read_text()
    found = re.search(rf"^CUDA_FLAGS_{name} = (.*)$", text, re.MULTILINE)
    return found[1].split() if found else []


@functools.cache
def kernels_of(name: str, architecture: str) -> Module:
    """The module of core/cuda/kernels/NAME.cu; compiled to build/cuda/ptx if that is older.

    Raises:
        PtxError: If nvcc is not there or refuses the file.
    """
    output = BUILD / architecture / f"{name}.ptx"
    if not output.exists() or output.stat().st_mtime < _newest(_KERNEL_SOURCES, ROOT / "core"):
        flags = [*_INCLUDE[:1], "-lineinfo", *module_flags(name)]
        compile_ptx(KERNELS / f"{name}.cu", output, architecture, flags)
    return parse(output.read_text())


# ---- the C core ---------------------------------------------------------------------------------


def _own_text(header: Path) -> str:
    """The preprocessed header, only what stands in files of ours."""
    command = ["cc", "-std=c11", "-E", *_INCLUDE, str(header)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, ours = [], False
    for line in done.stdout.splitlines():
        if marker := re.match(r'# \d+ "([^"]*)"', line):
            ours = str(ROOT) in marker[1]
        elif ours:
            kept.append(line)
    return "\n".join(kept)


def _declarations(header: Path) -> str:
    """Structs and enums of a header and of all that it includes."""
    text = _own_text(header)
    found = re.findall(r"typedef (?:struct|enum) \w+ \{.*?\n?\} \w+;", text, re.S)
    return "\n".join(d for d in found if "(*" not in d)


class Core:
    """The reference library and the structs of kernels.

    Attributes:
        ffi: Knows all structs of core/cuda/kernels/*_args.h.
        lib: The functions of reference.h.
    """

    def __init__(self) -> None:
        if not CORE_LIBRARY.exists():
            raise PtxError(f"{CORE_LIBRARY} is not there: `make lib` builds it.")
        self.ffi = FFI()
        header = BUILD / "all_args.h"
        header.parent.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in KERNELS.glob("*_args.h"))
        includes = [f'#include "cuda/kernels/{name}"' for name in names]
        header.write_text("\n".join([*includes, '#include "ptx/reference.h"', ""]))
        self.ffi.cdef(_declarations(header))
        prototypes = (_HERE / "reference.h").read_text()
        begin, end = prototypes.index("/* [prototypes] */"), prototypes.index("/* [end] */")
        self.ffi.cdef(prototypes[begin:end])
        self.lib: Any = self.ffi.dlopen(str(self._build()))

    @staticmethod
    def _build() -> Path:
        output = BUILD / "libreference.so"
        sources = [_HERE / "reference.c", ROOT / "tests" / "cuda" / "attend_case.c"]
        newest = max(
            _newest({".c", ".h", ".def"}, ROOT / "core", _HERE.parent), CORE_LIBRARY.stat().st_mtime
        )
        if output.exists() and output.stat().st_mtime >= newest:
            return output
        flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-fPIC", "-Wall", "-Wextra", *_INCLUDE]
        renamed = ["-Dcalloc=reference_calloc", "-Dfree=reference_free", "-include", "stdlib.h"]
        objects = []
        for source in sources:
            target = BUILD / f"{source.stem}.o"
            more = renamed if source.stem == "attend_case" else []
            subprocess.run(["cc", *flags, *more, "-c", str(source), "-o", str(target)], check=True)
            objects.append(str(target))
        libraries = [str(CORE_LIBRARY), "-lm", "-lpthread"]
        subprocess.run(["cc", "-shared", "-o", str(output), *objects, *libraries], check=True)
        return output

    def codec(self, name: str) -> int:
        """The number of a KV codec."""
        value: int = getattr(self.lib, f"KVQ_CODEC_{name}")
        return value

    def bytes_of(self, value: Any) -> bytes:
        """The bytes of a struct, as a kernel takes it."""
        return bytes(self.ffi.buffer(self.ffi.addressof(value)))


@functools.cache
def core() -> Core:
    """The one Core of this process."""
    return Core()


# ---- launches -----------------------------------------------------------------------------------


class Bench:
    """A device with kernels of one architecture."""

    def __init__(self, architecture: str) -> None:
        self.architecture, self.device = architecture, Device()
        self._loaded: dict[str, Module] = {}
        self._kept: list[Any] = []  # arrays whose addresses are in use

    def launch(
        self,
        file: str,
        kernel: str,
        grid: int | Sequence[int],
        threads: int,
        arguments: Any,
        *,
        dynamic_shared: int = 0,
    ) -> Counts:
        """Launches a kernel of core/cuda/kernels/FILE.cu with a struct by value."""
        if file not in self._loaded:
            self._loaded[file] = self.device.load(kernels_of(file, self.architecture))
        return self.device.launch(
            self._loaded[file],
            kernel,
            grid,
            threads,
            core().bytes_of(arguments),
            dynamic_shared=dynamic_shared,
            asks_for_more=True,
        )

    def share(self, array: Array, name: str, *, read_only: bool = True) -> Any:
        """The array's address, as a pointer for a struct; the device has a copy there."""
        array = np.array(array, order="C")  # its own copy: an address is given once
        self._kept.append(array)
        self.device.share(array.ctypes.data, array.nbytes, name, read_only=read_only)
        return core().ffi.cast("void *", array.ctypes.data)

    def empty(self, n_bytes: int, name: str) -> Any:
        """A pointer to a new buffer that nobody wrote."""
        return core().ffi.cast("void *", self.device.allocate(n_bytes, name))

    def get(self, pointer: Any, shape: int | Sequence[int], dtype: str) -> Array:
        """A copy of an array on the device."""
        address = int(core().ffi.cast("uintptr_t", pointer))
        return self.device.get(address, shape, dtype)

    def share_all(self) -> None:
        """Gives the device all that the C core has taken since it last forgot."""
        size = core().ffi.new("size_t *")
        for i in range(core().lib.reference_n_blocks()):
            pointer = core().lib.reference_block(i, size)
            address = int(core().ffi.cast("uintptr_t", pointer))
            self.device.share(address, size[0], f"array {i} of the core")
