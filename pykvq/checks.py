"""Checks of what callers pass in, where Python's own errors would not say what was expected."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from numbers import Real

#: The least and the most that the core takes for the numbers of a session.
SESSION_RANGES: Mapping[str, tuple[int, int]] = {
    "n_ctx": (1, 2**28),
    "n_batch": (1, 65535),
    "n_threads": (1, 1024),
    "kv_sinks": (0, 4096),
    "kv_window": (0, 2**28),
    "kv_topk": (0, 2**28),
    "n_gpu_layers": (0, 65536),
}

#: The most memory that a plan can be made for, in bytes.
MEMORY_MOST = 2**60


def asymkv_pair(value: object) -> tuple[int, int]:
    """Requires two numbers of layers, (l_k, l_v).

    Raises:
        ValueError: It is something else, or a number is negative.
    """
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"asymkv_layers is {value!r}, expected two numbers of layers, (l_k, l_v).")
    l_k, l_v = value
    return whole_number("l_k", l_k, 0), whole_number("l_v", l_v, 0)


def budget(bits: object) -> float:
    """Requires that bits were given: to the core, which checks all else, 0 says that none were.

    Raises:
        ValueError: They are 0, or no number.
    """
    if isinstance(bits, bool) or not isinstance(bits, Real):
        raise ValueError(f"kv_bits is {bits!r}, expected a number from 0.1 to 16.")
    if bits == 0:
        raise ValueError("kv_bits is 0, expected 0.1 to 16.")
    return float(bits)


def device_name(value: object) -> str:
    """Requires what can be the name of a device; the core says whether it is one.

    Raises:
        ValueError: It is something else than a str, or has characters that no name has.
    """
    if not isinstance(value, str) or not value.isprintable() or not value.isascii():
        raise ValueError(f"device is {value!r}, expected auto, cpu, cuda or cuda:N.")
    return value


def whole_number(name: str, value: object, least: int, most: int | None = None) -> int:
    """Requires a whole number of any integer type, those of numpy among them.

    Args:
        name: What the caller calls it.
        value: What was passed in.
        least: The smallest that is accepted.
        most: The largest that is accepted, if there is one.

    Raises:
        ValueError: It is something else, a bool or out of range.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # to be found out
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least or (most is not None and number > most):
        limits = f"from {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}, expected a whole number {limits}.")
    return number
