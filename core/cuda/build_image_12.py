"""Builds the fat binary of one kernel module that drivers of the CUDA 12 line can load.

NVRTC and nvFatbin of CUDA 12.9 do it; both are wheels on PyPI, so neither a CUDA 12 toolkit nor a
host compiler is needed. Writes what the module includes as a makefile beside the output.

    build_image_12.py core/cuda/kernels/cache.cu build/cuda/12/cache.fatbin
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

CORE = Path(__file__).resolve().parent.parent

#: Cubins of a minor version of CUDA 12 run on drivers of all others; PTX needs one as new as 12.9.
CUBINS = ("75", "80", "86", "87", "89", "90", "100", "120")
PTX = ("75", "80")

#: NVRTC has no headers of the host, and these are all that kernels may include of them. It knows
#: size_t and memcpy by itself.
HEADERS = {
    "stddef.h": "#define NULL 0\n",
    "stdint.h": """
        typedef signed char int8_t;
        typedef short int16_t;
        typedef int int32_t;
        typedef long long int64_t;
        typedef unsigned char uint8_t;
        typedef unsigned short uint16_t;
        typedef unsigned int uint32_t;
        typedef unsigned long long uint64_t;
        typedef uint64_t uintptr_t;
    """,
    "string.h": "",
    "stdbool.h": "",
    "math.h": "#define INFINITY __int_as_float(0x7f800000)\n",
}
#: C++17 has the hexadecimal floats that other compilers allow in C++14, too.
OPTIONS = (
    "-std=c++17",
    f"-I{CORE}",
    "--ptxas-options=-warn-spills",
    "--ptxas-options=-warn-lmem-usage",
    "--ptxas-options=-Werror",
)
#: Drivers from 525 on read this compression; those of CUDA 12 before 550 no denser one.
FATBIN = ("-64", "-compress-all")


class Library:
    """A shared library of an installed wheel, whose functions return 0 or the code of an error."""

    def __init__(self, package: str, file: str) -> None:
        """Loads `nvidia/PACKAGE/lib/FILE`."""
        self._library = ctypes.CDLL(str(folder(package) / "lib" / file))

    def call(self, name: str, *arguments: object) -> int:
        """Calls a function; returns its result."""
        return int(getattr(self._library, name)(*arguments))

    def require(self, name: str, *arguments: object) -> None:
        """Calls a function that must not fail."""
        result = self.call(name, *arguments)
        if result != 0:
            sys.exit(f"{name} failed with error {result}.")

    def text(self, size: str, get: str, *handle: object) -> bytes:
        """What a pair of functions gives: how many bytes there are, and the bytes."""
        n = ctypes.c_size_t()
        self.require(size, *handle, ctypes.byref(n))
        buffer = ctypes.create_string_buffer(n.value)
        self.require(get, *handle, buffer)
        return buffer.raw


def folder(package: str) -> Path:
    """Where a wheel of NVIDIA is installed."""
    found = importlib.util.find_spec(f"nvidia.{package}")
    if found is None or not found.submodule_search_locations:
        sys.exit(
            f"The package nvidia.{package} of CUDA 12.9 is not installed: see core/cuda/images.mk."
        )
    return Path(found.submodule_search_locations[0])


def strings(values: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    """An array of C strings."""
    encoded = [value.encode() for value in values]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def compile_module(
    nvrtc: Library, source: Path, architecture: str, more: Sequence[str], binary: bool
) -> bytes:
    """Compiles a module for one architecture.

    Args:
        nvrtc: NVRTC.
        source: The .cu file.
        architecture: Such as "80".
        more: Options beyond the common ones.
        binary: Whether to make a cubin; else PTX.

    Raises:
        SystemExit: It does not compile, or not without warnings.
    """
    program = ctypes.c_void_p()
    nvrtc.require(
        "nvrtcCreateProgram",
        ctypes.byref(program),
        source.read_bytes(),
        source.name.encode(),
        len(HEADERS),
        strings(HEADERS.values()),
        strings(HEADERS),
    )
    kind = "sm" if binary else "compute"
    include = f"-I{folder('cuda_runtime') / 'include'}"
    options = [*OPTIONS, *more, include, f"--gpu-architecture={kind}_{architecture}"]
    result = nvrtc.call("nvrtcCompileProgram", program, len(options), strings(options))
    log = nvrtc.text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program).rstrip(b"\0\n")
    if result != 0 or b"warning" in log:
        sys.exit(f"{source} for {kind}_{architecture}:\n{log.decode()}")
    what = "CUBIN" if binary else "PTX"
    code = nvrtc.text(f"nvrtcGet{what}Size", f"nvrtcGet{what}", program)
    nvrtc.require("nvrtcDestroyProgram", ctypes.byref(program))
    return code


def fat_binary(source: Path, more: Sequence[str]) -> bytes:
    """A module for all architectures, compiled with options beyond the common ones."""
    nvrtc = Library("cuda_nvrtc", "libnvrtc.so.12")
    fatbin = Library("nvfatbin", "libnvfatbin.so.12")
    handle = ctypes.c_void_p()
    fatbin.require("nvFatbinCreate", ctypes.byref(handle), strings(FATBIN), len(FATBIN))
    name = source.stem.encode()
    for architecture in CUBINS:
        code = compile_module(nvrtc, source, architecture, more, binary=True)
        arguments = (code, ctypes.c_size_t(len(code)), architecture.encode(), name)
        fatbin.require("nvFatbinAddCubin", handle, *arguments)
    for architecture in PTX:
        code = compile_module(nvrtc, source, architecture, more, binary=False)
        arguments = (code, ctypes.c_size_t(len(code)), architecture.encode(), name)
        fatbin.require("nvFatbinAddPTX", handle, *arguments, None)
    made = fatbin.text("nvFatbinSize", "nvFatbinGet", handle)
    fatbin.require("nvFatbinDestroy", ctypes.byref(handle))
    return made


def included(source: Path) -> list[Path]:
    """The files of core/ that a file includes, directly or not, and the file itself."""
    found: list[Path] = []
    waiting = [source.resolve()]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.append(file)
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(), re.MULTILINE):
            for path in (file.parent / name, CORE / name):
                if path.is_file():
                    waiting.append(path.resolve())
                    break
    return found


def main() -> None:
    """Builds one module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--option", action="append", default=[], help="of NVRTC, beyond the common")
    options = parser.parse_args()
    made = fat_binary(options.source, options.option)
    names = [str(path.relative_to(CORE.parent)) for path in included(options.source)]
    rules = f"{options.output}: {' '.join(names)}\n" + "".join(f"{name}:\n" for name in names)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".d").write_text(rules)
    options.output.write_bytes(made)


if __name__ == "__main__":
    main()
