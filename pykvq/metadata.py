"""The metadata of a GGUF file as a mapping that reads a value when it is asked for.

A model's vocabulary alone has hundreds of thousands of strings: opening a model must not parse it.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Mapping

import numpy as np

from pykvq._native import lib
from pykvq.errors import UnsupportedError
from pykvq.native import ModelHandle, RawMeta

#: numpy's names of the number types of the GGUF specification, little-endian.
_DTYPES = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class Metadata(Mapping[str, object]):
    """Key to int, float, bool or str; to a numpy array of numbers; or to a list of bytes.

    A string value is text, with bytes that are not UTF-8 as lone surrogates; the strings of an
    array are given as the bytes that they are. Every access to an array reads it anew: keep what
    is needed more than once. Not to be used once the model is closed.
    """

    def __init__(self, handle: ModelHandle) -> None:
        self._handle = handle

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {key: index for index, key in enumerate(self._handle.meta_keys())}

    def __getitem__(self, key: str) -> object:
        return _value(key, self._handle.meta(self._index[key]))

    def __contains__(self, key: object) -> bool:
        return key in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __repr__(self) -> str:
        return f"<Metadata of {self._handle.path}: {len(self)} entries>"


def _value(key: str, raw: RawMeta) -> object:
    if raw.type == lib.KVQ_META_STRING:
        strings = _strings(raw.data, raw.count)
        return strings if raw.is_array else strings[0].decode("utf-8", "surrogateescape")
    if raw.type == lib.KVQ_META_BOOL:
        truths = np.frombuffer(raw.data, np.uint8) != 0
        return truths if raw.is_array else bool(truths[0])
    dtype = _DTYPES.get(raw.type)
    if dtype is None:
        raise UnsupportedError(
            f"The metadata entry {key} has elements of type {raw.type}, but only arrays of numbers,"
            " truth values and strings can be read."
        )
    little = np.frombuffer(raw.data, dtype)
    return little.astype(little.dtype.newbyteorder("=")) if raw.is_array else little[0].item()


def _strings(data: bytes, count: int) -> list[bytes]:
    """Cuts `count` strings, each after its length in 8 bytes, out of data the core has checked."""
    length_at = struct.Struct("<Q").unpack_from
    strings = []
    end = 0
    for _ in range(count):
        start = end + 8
        end = start + length_at(data, end)[0]
        strings.append(data[start:end])
    return strings
