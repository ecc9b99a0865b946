"""What the machine code of the kernels must and must not have.

    sass.py build/cuda/13 build/cuda/12 --tools .venv/lib/python3.11/site-packages/nvidia/cu13/bin

Tensor-core products and asynchronous copies are inline PTX, and what ptxas makes of them is seen
here only: that it kept them, on each architecture. Local memory must not occur, not even where
ptxas reports neither stack nor spills. Needs cuobjdump and nvdisasm, which PyPI has.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

#: The instructions that kernels must have: (kernel, first architecture, instruction). Products of
#: halves are HMMA, of bytes IMMA, copies from global to shared memory LDGSTS.
REQUIRED = (
    ("attend_", 75, "HMMA"),
    ("decode_", 75, "HMMA"),
    ("decode_pairs_", 75, "IMMA"),
    ("decode_trellis_", 75, "IMMA"),
    ("gemm_", 75, "HMMA"),
    ("gemm_", 80, "LDGSTS"),
)
#: Loads and stores of local memory.
FORBIDDEN = ("LDL", "STL")

_ARCHITECTURE = re.compile(r"\s*code for sm_(\d+)")
_FUNCTION = re.compile(r"\s*Function : (\w+)")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)")


def disassemble(image: Path, tools: Path) -> str:
    """The machine code of all architectures in a fat binary, by cuobjdump."""
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    command = [str(tools / "cuobjdump"), "--dump-sass", str(image)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed: {done.stderr}")
    return done.stdout


def instructions(code: str) -> dict[tuple[str, int], Counter[str]]:
    """How often each instruction, without its modifiers, stands in (kernel, architecture)."""
    found: dict[tuple[str, int], Counter[str]] = {}
    architecture = 0
    counter: Counter[str] = Counter()
    for line in code.splitlines():
        if at := _INSTRUCTION.match(line):
            counter[at[1]] += 1
        elif at := _ARCHITECTURE.match(line):
            architecture = int(at[1])
        elif at := _FUNCTION.match(line):
            counter = found.setdefault((at[1], architecture), Counter())
    return found


def faults(kernel: str, architecture: int, counter: Counter[str]) -> Iterator[str]:
    """What is wrong with the machine code of a kernel, a sentence each."""
    where = f"{kernel} for sm_{architecture}"
    if not counter:
        yield f"{where} has no instructions that could be read."
    for begin, first, instruction in REQUIRED:
        needs = kernel.startswith(f"kvq_cuda_{begin}") and architecture >= first
        if needs and not counter[instruction]:
            yield f"{where} has no {instruction}."
    for instruction in FORBIDDEN:
        if counter[instruction]:
            yield f"{where} has {counter[instruction]} {instruction}: it uses local memory."


def main() -> None:
    """Checks all images in some folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--tools", type=Path, required=True, help="where cuobjdump is")
    parser.add_argument("--print", action="store_true", help="the commonest instructions, too")
    options = parser.parse_args()
    wrong: list[str] = []
    n = 0
    for folder in options.folders:
        images = sorted(folder.glob("*.fatbin"))
        if not images:
            sys.exit(f"{folder} has no images: `make cuda` builds them.")
        for image in images:
            kernels = instructions(disassemble(image, options.tools))
            if not kernels:
                sys.exit(f"cuobjdump finds no machine code in {image}.")
            n += len(kernels)
            for (kernel, architecture), counter in kernels.items():
                wrong += faults(kernel, architecture, counter)
                if options.print:
                    most = ", ".join(f"{name} {count}" for name, count in counter.most_common(12))
                    print(f"{kernel} sm_{architecture}: {counter.total()} instructions: {most}")
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"machine code as it should be in {n} kernels of {len(options.folders)} images")


if __name__ == "__main__":
    main()
