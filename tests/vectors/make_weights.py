"""Writes weights.bin, what the `gguf` package says of the weight formats, for test_weights.c.

It holds the sizes of a block of every type, and for every format that can be multiplied some random
blocks with the values that gguf gives them. Random means random bytes, except that the floats among
them (scales, minima, float weights) are finite.

Layout, little-endian:
    u32 number of types, and for each: u32 id, u32 block, u32 bytes, name in 16 bytes, zero-padded
    u32 number of samples, and for each: u32 id, u32 bytes, u32 values, the bytes, the values in f32

Run: python tests/vectors/make_weights.py
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

PATH = Path(__file__).with_name("weights.bin")

VALUES = 512
"""Values per sample: two super-blocks of a K format."""

HALVES: dict[str, tuple[int, ...]] = {
    "F32": (2,),
    "F16": (0,),
    "BF16": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Byte offsets, in a block of each format, of the 16 bits that hold a float's exponent."""

# Not Q8_1: it stands only in memory, and gguf 0.19 has 40 bytes for it where ggml has 36.
TYPES = [*range(0, 4), *range(6, 9), *range(10, 31), 34, 35, 39, 40, 41]


def random_blocks(source: random.Random, name: str) -> npt.NDArray[np.uint8]:
    """Returns VALUES values' worth of random blocks of format `name`, as bytes: uint8 [n]."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    data = np.frombuffer(source.randbytes(VALUES // block * size), np.uint8).copy()
    infinite = 0x7F80 if name in ("F32", "BF16") else 0x7C00
    for offset in HALVES[name]:
        for low in range(offset, len(data), size):
            while (int(data[low]) | int(data[low + 1]) << 8) & infinite == infinite:
                data[low + 1] = source.randrange(256)
    return data


def build() -> bytes:
    """Returns the bytes of weights.bin."""
    source = random.Random(1)
    out = [struct.pack("<I", len(TYPES))]
    for number in TYPES:
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
        out.append(struct.pack("<III16s", number, block, size, kind.name.encode()))
    out.append(struct.pack("<I", len(HALVES)))
    for name in HALVES:
        kind = GGMLQuantizationType[name]
        data = random_blocks(source, name)
        values = data if name != "F16" else data.view(np.float16)
        decoded = dequantize(values, kind).astype("<f4", copy=False)
        out.append(struct.pack("<III", kind.value, len(data), decoded.size))
        out += [data.tobytes(), decoded.tobytes()]
    return b"".join(out)


if __name__ == "__main__":
    PATH.write_bytes(build())
