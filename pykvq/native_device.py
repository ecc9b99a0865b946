"""The devices that the core finds beside the CPU; `pykvq.native` has the rest of the core."""

from __future__ import annotations

from dataclasses import dataclass

from pykvq._native import ffi, lib
from pykvq.native import check, string_of


@dataclass(frozen=True)
class Device:
    """A device that can evaluate instead of the CPU: see `kvq_device_info` in core/kvq.h.

    Attributes:
        name: What `device=` and `--device` call it: "cuda:0".
        model: What its driver calls it, e.g. "Orin".
        compute_capability: Such as "8.7".
        driver: The newest CUDA that the driver knows, such as "13.0".
        bytes_total: Its memory.
        bytes_free: What nobody uses of it, or, if it is that of the CPU, what is available there;
            0 if that cannot be asked.
        multiprocessors: How many it has.
        clock_hz: Their clock.
        memory_clock_hz: The clock of its memory.
        memory_bus_bits: The width of the bus to it.
        bytes_l2: Its L2 cache.
        bytes_shared: Shared memory that a block of threads can have.
        integrated: Whether its memory is that of the CPU.
        kernels: The toolkit that built the kernels that it takes, such as "CUDA 13.0"; or None.
        usable: Whether sessions can run on it.
        why_not: If not, why, in one sentence; else None.
    """

    name: str
    model: str
    compute_capability: str
    driver: str
    bytes_total: int
    bytes_free: int
    multiprocessors: int
    clock_hz: int
    memory_clock_hz: int
    memory_bus_bits: int
    bytes_l2: int
    bytes_shared: int
    integrated: bool
    kernels: str | None
    usable: bool
    why_not: str | None


@dataclass(frozen=True)
class Devices:
    """What there is beside the CPU.

    Attributes:
        found: The devices, usable or not.
        why_none: Where there is none, why, in one sentence; else None.
    """

    found: list[Device]
    why_none: str | None


def devices() -> Devices:
    """The devices of this machine. The first call loads the driver, which can take a second.

    Raises:
        DeviceError: The driver does not tell what one of them is.
    """
    n = int(lib.kvq_device_count())
    if n == 0:
        return Devices([], string_of(lib.kvq_error()))
    out = ffi.new("kvq_device_info *")
    found = []
    for index in range(n):
        check(lib.kvq_device_describe(index, out))
        capability, driver = int(out.compute_capability), int(out.driver_version)
        found.append(
            Device(
                name=f"{string_of(out.kind)}:{int(out.index)}",
                model=string_of(out.name),
                compute_capability=f"{capability // 10}.{capability % 10}",
                driver=f"{driver // 1000}.{driver % 1000 // 10}",
                bytes_total=int(out.bytes_total),
                bytes_free=int(out.bytes_free),
                multiprocessors=int(out.n_multiprocessors),
                clock_hz=1000 * int(out.clock_khz),
                memory_clock_hz=1000 * int(out.memory_clock_khz),
                memory_bus_bits=int(out.memory_bus_bits),
                bytes_l2=int(out.bytes_l2),
                bytes_shared=int(out.bytes_shared),
                integrated=bool(out.integrated),
                kernels=string_of(out.kernels) if out.kernels else None,
                usable=bool(out.usable),
                why_not=None if out.usable else string_of(out.why_not),
            )
        )
    return Devices(found, None)
