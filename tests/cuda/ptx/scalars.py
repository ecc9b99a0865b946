"""The scalar types of PTX as numpy types, and the error that all of the interpreter raises."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Index = npt.NDArray[np.int64]
Dtype = np.dtype[Any]
Mask = npt.NDArray[np.bool_]


class PtxError(Exception):
    """PTX that cannot be read or executed, or a program that does what it must not."""


DTYPES: dict[str, Dtype] = {
    **{f"u{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"b{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"s{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"f{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
    "f16x2": np.dtype("u4"),
    "bf16": np.dtype("u2"),
    "bf16x2": np.dtype("u4"),
    "pred": np.dtype(bool),
}

_UNSIGNED: dict[int, Dtype] = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}


def dtype_of(name: str) -> Dtype:
    """The numpy type of a PTX type.

    Raises:
        PtxError: For a type that the interpreter does not know.
    """
    if name not in DTYPES:
        raise PtxError(f"The type .{name} is not one that this interpreter knows.")
    return DTYPES[name]


def unsigned(n_bytes: int) -> Dtype:
    """The unsigned type of a width in bytes."""
    return _UNSIGNED[n_bytes]


def is_float(name: str) -> bool:
    """Whether a type's values are numbers with a point."""
    return name[0] == "f" or name.startswith("bf")


def is_signed(name: str) -> bool:
    """Whether a type is that of integers with a sign."""
    return name[0] == "s"
