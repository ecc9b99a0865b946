"""A device: its memory, the modules loaded to it, and launches; and nvcc to make PTX."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .counts import Counts
from .machine import Dim, Layout, Machine
from .memory import Global
from .parser import Kernel, Module, Variable, parse
from .scalars import PtxError
from .scheduler import Scheduler

Argument = bytes | int | np.generic
# Bytes of shared memory for a block: of any device, and where more was asked for (sm_75).
MAX_SHARED, MAX_SHARED_ASKED = 48 << 10, 64 << 10


def find_nvcc() -> str | None:
    """The path of nvcc, or None."""
    found = shutil.which("nvcc")
    if found is None and Path("/usr/local/cuda/bin/nvcc").exists():
        found = "/usr/local/cuda/bin/nvcc"
    return found


def compile_ptx(source: Path, output: Path, architecture: str, flags: Sequence[str] = ()) -> Path:
    """Compiles a .cu file to PTX; keeps what is newer than all that may have gone into it.

    Args:
        source: The .cu file.
        output: The .ptx file.
        architecture: As "compute_80".
        flags: Further flags of nvcc.

    Raises:
        PtxError: If there is no nvcc, or it fails: with what it said.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise PtxError("There is no nvcc on this machine: PTX cannot be made.")
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [nvcc, "-std=c++14", "-O3", "-ptx", f"-arch={architecture}", *flags]
    done = subprocess.run(
        [*command, "-o", str(output), str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise PtxError(f"nvcc failed on {source} for {architecture}: {done.stderr.strip()}")
    return output


class Device:
    """Memory and loaded modules.

    Args:
        strict: Whether reading a byte of global memory that nobody wrote is an error; otherwise it
            is 0xff. Of shared and local memory it always is an error.
    """

    def __init__(self, *, strict: bool = True) -> None:
        self.memory = Global(strict=strict)
        self._symbols: dict[int, dict[str, int]] = {}  # by id of the module
        self._modules: list[Module] = []

    def allocate(self, n_bytes: int, name: str = "unnamed", *, fill: int | None = None) -> int:
        """The address of a new buffer, of bytes that nobody wrote or that are all `fill`."""
        buffer = self.memory.allocate(n_bytes, name)
        if fill is not None:
            self.write(buffer.address, bytes([fill]) * n_bytes)
        return buffer.address

    def put(
        self, values: npt.ArrayLike | bytes, name: str = "unnamed", *, read_only: bool = True
    ) -> int:
        """The address of a new buffer with the values; kernels may not write it if read_only."""
        data = values if isinstance(values, bytes) else np.ascontiguousarray(values).tobytes()
        buffer = self.memory.allocate(len(data), name, read_only=read_only)
        self.write(buffer.address, data)
        return buffer.address

    def share(
        self, address: int, n_bytes: int, name: str = "unnamed", *, read_only: bool = True
    ) -> None:
        """A buffer at the address of memory of this process, with a copy of what that holds."""
        self.memory.allocate(n_bytes, name, read_only=read_only, address=address)
        if n_bytes:
            self.write(address, ctypes.string_at(address, n_bytes))

    def write(self, address: int, data: bytes) -> None:
        """Writes bytes, as the host does."""
        if data:
            at = self.memory.offset(address, len(data))
            self.memory.data[at : at + len(data)] = np.frombuffer(data, np.uint8)
            self.memory.state[at : at + len(data)] = 1

    def get(
        self, address: int, shape: int | Sequence[int], dtype: npt.DTypeLike
    ) -> npt.NDArray[Any]:
        """A copy of an array in memory; unwritten bytes are 0xff."""
        n = int(np.prod(shape)) * np.dtype(dtype).itemsize
        at = self.memory.offset(address, n)
        return self.memory.data[at : at + n].copy().view(dtype).reshape(shape)

    def written(self, address: int, n_bytes: int) -> npt.NDArray[np.bool_]:
        """[n_bytes] whether each byte was ever written."""
        at = self.memory.offset(address, n_bytes)
        found: npt.NDArray[np.bool_] = self.memory.state[at : at + n_bytes] != 0
        return found

    def load(self, module: Module | str | Path) -> Module:
        """Puts the variables of a module into memory.

        Args:
            module: A module, or a path of, or the text of one.
        """
        if isinstance(module, Path):
            module = module.read_text()
        if isinstance(module, str):
            module = parse(module)
        symbols: dict[str, int] = {}
        for variable in module.variables.values():
            if variable.space in ("global", "const") and variable.n_bytes is not None:
                buffer = self.memory.allocate(
                    variable.n_bytes, variable.name, read_only=variable.space == "const"
                )
                symbols[variable.name] = buffer.address
                self.write(symbols[variable.name], variable.data or bytes(variable.n_bytes))
        for variable in module.variables.values():
            for at, name in variable.relocations:
                if name not in symbols:
                    raise PtxError(f"{variable.name} has the address of {name}: no such variable.")
                self.write(symbols[variable.name] + at, symbols[name].to_bytes(8, "little"))
        self._symbols[id(module)] = symbols
        self._modules.append(module)  # so that its id stays its own
        return module

    def launch(
        self,
        module: Module,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *arguments: Argument,
        dynamic_shared: int = 0,
        asks_for_more: bool = False,
        counts: Counts | None = None,
    ) -> Counts:
        """Runs a kernel to its end.

        Args:
            module: A module that was loaded.
            kernel: The name of one of its kernels.
            grid: Blocks: a number or up to three.
            block: Threads of a block: the same.
            arguments: One for each parameter: its bytes, a numpy scalar, or an int (an address).
            dynamic_shared: Bytes of dynamic shared memory.
            asks_for_more: Whether the host allows it more than 48 KiB of shared memory.
            counts: What to add to; new ones by default.

        Returns:
            The counts.

        Raises:
            PtxError: For a launch that a driver would refuse, and for all that the kernel does
                which it must not.
        """
        if id(module) not in self._symbols:
            raise PtxError(f"The module of {kernel} was not loaded to this device.")
        if kernel not in module.kernels:
            raise PtxError(f"The module has no kernel {kernel}; it has {sorted(module.kernels)}.")
        entry = module.kernels[kernel]
        grid_dim, block_dim = _dim(grid), _dim(block)
        threads = int(np.prod(block_dim))
        if not 0 < threads <= entry.max_threads:
            raise PtxError(f"{kernel} is launched with {threads} threads of {entry.max_threads}.")
        if int(np.prod(grid_dim)) <= 0:
            raise PtxError(f"{kernel} is launched with a grid of {grid_dim}.")
        shared = _layout(_shared_variables(module, entry), dynamic_shared)
        most = MAX_SHARED_ASKED if asks_for_more else MAX_SHARED
        if shared.n_bytes > most:
            raise PtxError(f"{kernel} takes {shared.n_bytes} bytes of shared memory of {most}.")
        local = _layout([v for v in entry.variables if v.space == "local"], 0)
        offsets, params = _pack(entry, arguments)
        counts = counts if counts is not None else Counts(entry)
        self.memory.begin_launch()
        machine = Machine(
            entry,
            grid_dim,
            block_dim,
            self.memory,
            self._symbols[id(module)],
            params,
            shared,
            local,
            offsets,
            counts,
        )
        Scheduler(machine).run()
        return counts


def _dim(size: int | Sequence[int]) -> Dim:
    sizes = [size] if isinstance(size, int) else list(size)
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


def _shared_variables(module: Module, kernel: Kernel) -> list[Variable]:
    used = kernel.symbols()
    outer = [v for v in module.variables.values() if v.space == "shared" and v.name in used]
    return [v for v in kernel.variables if v.space == "shared"] + outer


def _layout(variables: list[Variable], dynamic: int) -> Layout:
    """One after the other; those without a size share what comes last."""
    offsets: dict[str, int] = {}
    at = 0
    for variable in variables:
        if variable.n_bytes is not None:
            at = -(-at // variable.align) * variable.align
            offsets[variable.name] = at
            at += variable.n_bytes
    unsized = [variable for variable in variables if variable.n_bytes is None]
    if unsized:
        align = max(variable.align for variable in unsized)
        at = -(-at // align) * align
    for variable in unsized:
        offsets[variable.name] = at
    return Layout(offsets, at + dynamic, at)


def _pack(kernel: Kernel, arguments: Sequence[Argument]) -> tuple[dict[str, int], bytes]:
    """Offsets of the parameters, and their bytes."""
    if len(arguments) != len(kernel.params):
        raise PtxError(
            f"{kernel.name} takes {len(kernel.params)} parameters, given {len(arguments)}."
        )
    offsets, data = {}, bytearray()
    for param, argument in zip(kernel.params, arguments, strict=True):
        n_bytes = param.n_bytes or 0
        if isinstance(argument, bytes):
            value = argument
        elif isinstance(argument, np.generic):
            value = argument.tobytes()
        else:
            value = argument.to_bytes(n_bytes, "little", signed=argument < 0)
        if len(value) != n_bytes:
            raise PtxError(f"{param.name} has {n_bytes} bytes, given {len(value)}.")
        data.extend(bytes(-len(data) % param.align))
        offsets[param.name] = len(data)
        data.extend(value)
    return offsets, bytes(data)
