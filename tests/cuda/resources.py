"""The registers and memory that ptxas gives each kernel on each architecture, as a table.

    resources.py build/cuda/13 tests/cuda/resources.txt           compares the table with the build
    resources.py build/cuda/13 tests/cuda/resources.txt --write   writes it

Reads what nvcc said of each module (MODULE.ptxas, which core/cuda/images.mk keeps beside its
image), and requires that a module has the very kernels that core/cuda/kernels.def lists.
"""

from __future__ import annotations

import argparse
import difflib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

HEAD = """\
# What ptxas of CUDA 13.0 gives each kernel of the image for drivers of CUDA 13: registers of a
# thread by architecture; bytes of static shared memory of a block, of the stack and of spills, the
# most of all architectures. The image for CUDA 12 may differ; it, too, has no spills.
# Written by `make cuda-resources-write`; `make cuda-resources` compares it with the build.
"""
_FUNCTION = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<architecture>\d+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<more>[^\n]*)",
    re.DOTALL,
)


@dataclass
class Kernel:
    """What one kernel takes.

    Attributes:
        registers: Of a thread, by architecture.
        shared: Static shared memory of a block in bytes, the most.
        stack: Local memory of a thread in bytes, the most.
        spills: Bytes of spill stores and loads, the most.
    """

    registers: dict[int, int]
    shared: int = 0
    stack: int = 0
    spills: int = 0


def read_module(report: str) -> dict[str, Kernel]:
    """The kernels of a module, by what ptxas said of it."""
    kernels: dict[str, Kernel] = {}
    for found in _FUNCTION.finditer(report):
        kernel = kernels.setdefault(found["kernel"], Kernel({}))
        kernel.registers[int(found["architecture"])] = int(found["registers"])
        shared = re.search(r"(\d+) bytes smem", found["more"])
        kernel.shared = max(kernel.shared, int(shared[1]) if shared else 0)
        kernel.stack = max(kernel.stack, int(found["stack"]))
        kernel.spills = max(kernel.spills, int(found["stores"]) + int(found["loads"]))
    return kernels


def expected_kernels() -> dict[str, list[str]]:
    """The kernels of each module by kernels.def, whose rows are macros."""
    macros = ["-DKVQ_CUDA_MODULE(m)=", "-DKVQ_CUDA_KERNEL(m,n)=(m kvq_cuda_##n)"]
    command = ["cc", "-E", "-P", "-x", "c", "-Icore", *macros, "core/cuda/kernels.def"]
    rows = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    modules: dict[str, list[str]] = {}
    for module, kernel in re.findall(r"\(\s*(\w+)\s+(\w+)\s*\)", rows):
        modules.setdefault(module, []).append(kernel)
    return modules


def read_build(folder: Path) -> dict[str, Kernel]:
    """All kernels of a build, in the order of kernels.def.

    Raises:
        SystemExit: A module was not built, or has other kernels than it should.
    """
    kernels: dict[str, Kernel] = {}
    for module, names in expected_kernels().items():
        path = folder / f"{module}.ptxas"
        if not path.exists():
            sys.exit(f"{path} does not exist: `make cuda` writes it.")
        found = read_module(path.read_text())
        if set(found) != set(names):
            differing = ", ".join(sorted(set(found) ^ set(names)))
            sys.exit(f"{module}.cu and kernels.def differ in the kernels {differing}.")
        kernels.update({name: found[name] for name in names})
    return kernels


def table(kernels: dict[str, Kernel]) -> str:
    """The text of the table."""
    architectures = sorted({a for kernel in kernels.values() for a in kernel.registers})
    names = [f"sm_{architecture}" for architecture in architectures]
    rows = [["kernel", *names, "shared", "stack", "spills"]]
    for name, kernel in kernels.items():
        registers = [str(kernel.registers.get(a, "-")) for a in architectures]
        rows.append([name, *registers, *map(str, (kernel.shared, kernel.stack, kernel.spills))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        " ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return HEAD + "\n".join(lines) + "\n"


def main() -> None:
    """Compares or writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    built = table(read_build(options.folder))
    if options.write:
        options.table.write_text(built)
        return
    known = options.table.read_text()
    if built == known:
        print(f"{options.table} holds for this build")
        return
    lines = difflib.unified_diff(
        known.splitlines(), built.splitlines(), str(options.table), "this build", lineterm="", n=0
    )
    print("\n".join(lines))
    sys.exit("Kernels take other resources than the table says; `make cuda-resources-write` if so.")


if __name__ == "__main__":
    main()
