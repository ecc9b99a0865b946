"""The codecs of the core, and forms of them that lack a part or have another, for ablations.py.

All are codecs as `pykvq.eval.codecs.Codec` says. Those of the core are the core's own code, which
is called through cffi; the others are numpy, the same but for what they leave out.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cffi import FFI

from pykvq import native
from pykvq._build import LIBRARY, build_core
from pykvq.eval import quantizers
from pykvq.eval.codecs import BlockQuantizer, Context, Plain
from pykvq.eval.frames import Frame
from pykvq.eval.quantizers import Array
from pykvq.eval.rope import Rotation
from pykvq.model import ModelInfo

ROOT = Path(__file__).resolve().parents[1]
BLOCK = native.block_tokens()

#: Steps of even levels that quantize a unit normal variable best (Max, 1960), by bits.
STEPS = np.array([0, 1.5958, 0.9957, 0, 0.3352, 0, 0, 0, 0.0308])
#: Widths of the runs of the codec mixed, and their errors on normal data (core/kv/kv_plan.c).
RUN_BITS = np.array([8, 4, 2, 1])
RUN_LOSSES = np.array([0.000044, 0.00935, 0.1125, 0.3515])


# ---- the codecs of the core -----------------------------------------------------------------


@functools.cache
def core() -> Any:
    """The codecs of core/kv as a module of cffi, built where it is missing or old."""
    build_core()
    ffi = FFI()
    ffi.cdef("""
        typedef struct kvq_kv_shape { int d; int run[4]; int group; } kvq_kv_shape;
        typedef struct kvq_codec {
            const char *name;
            size_t (*bytes)(const kvq_kv_shape *sh);
            void (*encode)(uint8_t *block, const uint16_t *rows, const kvq_kv_shape *sh);
            void (*decode)(float *x, const uint8_t *block, const kvq_kv_shape *sh);
            ...;
        } kvq_codec;
        extern const kvq_codec kvq_codecs[];
        extern const int8_t kvq_t2_level[16];
        static const int N_CODECS;
        static const float LEVEL_UNIT, STRETCH_KEYS, STRETCH_VALUES;
    """)
    ffi.set_source(
        "_kv_codecs",
        """
        #include "kv/kv_codec_parts.h"
        static const int N_CODECS = KVQ_CODECS;
        static const float LEVEL_UNIT = KVQ_LEVEL_UNIT;
        static const float STRETCH_KEYS = KVQ_STRETCH_KEYS, STRETCH_VALUES = KVQ_STRETCH_VALUES;
        """,
        include_dirs=[str(ROOT / "core")],
        extra_objects=[str(ROOT / LIBRARY)],
        depends=[str(ROOT / LIBRARY)],
        libraries=["m", "pthread"],
    )
    spec = importlib.util.spec_from_file_location(
        "_kv_codecs", ffi.compile(tmpdir=str(ROOT / "build" / "ablations"))
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shape_of(d: int, run: Array | None = None, group: int = 0) -> Any:
    """What a codec is told of a head d wide: see kvq_kv_shape in core/kv/kv_format.h."""
    runs = [0, 0, 0, 0] if run is None else [int(n) for n in run]
    return core().ffi.new("kvq_kv_shape *", [d, runs, group or d])


def codec_named(name: str) -> Any:
    """The codec's row in the table of the core."""
    ffi, lib = core().ffi, core().lib
    rows = [lib.kvq_codecs[i] for i in range(lib.N_CODECS)]
    return {ffi.string(row.name).decode(): row for row in rows}[name]


def encoded(name: str, rows: Array, shape: Any) -> bytes:
    """What the core's codec makes of a block [64, d] of one head."""
    ffi, codec = core().ffi, codec_named(name)
    block = ffi.new("uint8_t[]", codec.bytes(shape))
    codec.encode(block, ffi.from_buffer("uint16_t[]", rows.astype(np.float16)), shape)
    return bytes(ffi.buffer(block))


def decoded(name: str, block: bytes, shape: Any) -> Array:
    """The block [64, d] of one head that the core's codec reads back."""
    ffi, read = core().ffi, np.empty((BLOCK, shape.d), np.float32)
    data = ffi.from_buffer("uint8_t[]", block)
    codec_named(name).decode(ffi.from_buffer("float[]", read), data, shape)
    return read


def through(name: str, rows: Array, shape: Any) -> Array:
    """A block [64, d] of one head, encoded and decoded."""
    return decoded(name, encoded(name, rows, shape), shape)


@dataclass(frozen=True, eq=False)
class Core(Plain):
    """A codec of the core; `run` [L, H, 4] for the codec mixed, else a group's channels or 0."""

    name: str
    run: Array | None = None
    group: int = 0

    def _shape(self, d: int, layer: int, head: int) -> Any:
        run = None if self.run is None else self.run[layer, head]
        return shape_of(d, run, self.group if d % max(self.group, 1) == 0 else 0)

    def bits(self, info: ModelInfo) -> float:
        """All bytes of a block, on average over the heads."""
        bytes_of, d = codec_named(self.name).bytes, info.d_head
        heads = [(i, j) for i in range(info.n_layers) for j in range(info.n_kv_heads)]
        n_bytes = np.mean([bytes_of(self._shape(d, *head)) for head in heads])
        return float(8 * n_bytes / (BLOCK * d))

    def open(self, context: Context) -> BlockQuantizer:
        """See `Codec.open`.

        Raises:
            ValueError: The core would pad rows of the model's width.
        """
        d = context.model.info.d_head
        if d % 16:
            raise ValueError(f"The heads are {d} wide, expected a multiple of 16 channels.")

        def quantize(layer: int, first: int, rows: Array) -> Array:
            shapes = [self._shape(rows.shape[-1], layer, head) for head in range(len(rows))]
            return np.stack([through(self.name, x, sh) for x, sh in zip(rows, shapes, strict=True)])

        return quantize


def error_of_shape(x: Array, y: Array) -> float:
    """The mean square of x - f y relative to that of x, for the factor f that fits best.

    Encoders stretch what they store on purpose; this tells what is lost whatever the factor.
    """
    return float(1 - np.vdot(x, y) ** 2 / (np.vdot(x, x) * np.vdot(y, y)))


def normal_errors(n_blocks: int = 128) -> dict[str, float]:
    """`error_of_shape` of the core's codecs on normal data, heads 64 wide; of mixed by width."""
    x = np.random.default_rng(0).standard_normal((n_blocks, BLOCK, 64)).astype(np.float16)
    exact, errors = x.astype(np.float64), {}
    for name in ("u1", "u2", "u4", "t1", "c8", "t2", "n2", "n3", "nf4", "q4_0", "q8_0"):
        read = np.array([through(name, block, shape_of(64)) for block in x], np.float64)
        errors[name] = error_of_shape(exact, read)
    mixed = [through("mixed", block, shape_of(64, np.full(4, 16))) for block in x]
    for i, bits in enumerate(RUN_BITS):
        part = np.s_[..., 16 * i : 16 * i + 16]
        read = np.array(mixed, np.float64)[part]
        errors[f"mixed, {bits} bits"] = error_of_shape(exact[part], read)
    return errors


# ---- parts of codecs ------------------------------------------------------------------------


def inverse(x: Array) -> Array:
    """1 / x, and 0 for 0."""
    return np.divide(1, x, out=np.zeros_like(x), where=x != 0)


def in_bytes(x: Array, largest: int) -> Array:
    """Numbers [H, ...] as integers up to `largest` times a unit in f16 for each head."""
    heads = x.reshape(len(x), -1)
    unit = np.abs(heads).max(axis=1, keepdims=True) / largest * 1.001
    unit = quantizers.stored(unit, "f16")
    return (np.floor(heads * inverse(unit) + 0.5) * unit).reshape(x.shape)


def stretch(x: Array, y: Array, part: float) -> Array:
    """What levels y [..., n] fitted to x are stretched by, [..., 1]: kvq_stretch in the core."""
    xx, xy, yy = ((p * q).sum(axis=-1, keepdims=True) for p, q in ((x, x), (x, y), (y, y)))
    kept = np.where(xx * yy > 0, xy * xy * inverse(xx * yy), 1)
    return inverse(np.maximum(1 - part * (1 - kept), 0.25))


def nearest_level(x: Array, n: Array | float) -> Array:
    """The nearest of n even levels around 0, a unit apart."""
    level: Array = np.clip(np.rint(x - 0.5) + 0.5, 0.5 - n / 2, n / 2 - 0.5)
    return level


@dataclass(frozen=True)
class BlockMean(Frame):
    """The mean of the block's tokens taken out, as the core stores it or exactly."""

    exact: bool = False

    def bits(self, info: ModelInfo) -> float:
        """Those of the inner codec and of the mean: 8 per channel, exact ones 32."""
        return self.inner.bits(info) + (32 if self.exact else 8 + 16 / info.d_head) / BLOCK

    def open(self, context: Context) -> BlockQuantizer:
        """See `Codec.open`."""
        inner = self.inner.open(context)

        def quantize(layer: int, first: int, rows: Array) -> Array:
            mean = rows.mean(axis=1, keepdims=True)
            mean = mean if self.exact else in_bytes(mean, 127)
            return inner(layer, first, rows - mean) + mean

        return quantize


@dataclass(frozen=True)
class Levels(Plain):
    """Four even levels with scales of tokens, of channels or both: the core's u2 but its mean.

    Attributes:
        token: Whether tokens have a scale.
        channel: Whether channels have one.
        exact: Whether scales are stored as they are, not in 8 bits.
        stretched: Whether they are stretched as the core does.
    """

    token: bool = True
    channel: bool = True
    exact: bool = False
    stretched: bool = True

    def bits(self, info: ModelInfo) -> float:
        """Codes and scales; exact ones have 32 bits."""
        if self.exact:
            return 2 + 32 * (self.token / info.d_head + self.channel / BLOCK)
        units = 16 * (self.token + self.channel) / (BLOCK * info.d_head)
        return 2 + 8 * (self.token / info.d_head + self.channel / BLOCK) + units

    def open(self, context: Context) -> BlockQuantizer:
        """See `Codec.open`."""
        axes = [axis for axis, used in ((1, self.channel), (2, self.token)) if used]
        part = core().lib.STRETCH_KEYS if self.stretched else 0.0

        def along(axis: int, f: Callable[..., Array], *rows: Array) -> Array:
            return np.moveaxis(f(*(np.moveaxis(x, axis, -1) for x in rows)), -1, axis)

        def rms(x: Array) -> Array:
            root: Array = np.sqrt(np.square(x).mean(axis=-1, keepdims=True))
            return root

        def quantize(layer: int, first: int, rows: Array) -> Array:
            # By the axis that a scale is shared along: of channels, of tokens.
            scale = {1: np.ones_like(rows[:, :1]), 2: np.ones_like(rows[:, :, :1])}
            for _ in range(2):
                for axis in axes:
                    scale[axis] = along(axis, rms, rows * inverse(scale[3 - axis]))
            scale[axes[-1]] = scale[axes[-1]] * rows.dtype.type(STEPS[2])

            def levels(by: Array) -> Array:
                return nearest_level(rows * inverse(by), 4)

            for _ in range(2):
                for axis in axes:
                    y = scale[3 - axis] * levels(scale[1] * scale[2])
                    scale[axis] = np.maximum(along(axis, quantizers.least_squares, rows, y), 0)
            y = scale[1] * scale[2] * levels(scale[1] * scale[2])
            more = along(axes[-1], lambda x, y: stretch(x, y, part), rows, y)
            scale[axes[-1]] = scale[axes[-1]] * more
            for axis in axes if not self.exact else ():
                scale[axis] = in_bytes(scale[axis], 255)
            return scale[1] * scale[2] * levels(scale[1] * scale[2] * inverse(more))

        return quantize


@dataclass(frozen=True, eq=False)
class Static(Plain):
    """Latent channels of unit variance with widths [L, H, D] in bits and one scale for each width.

    Scales are those for normal data, stretched as the core stretches its own.
    """

    widths: Array

    def bits(self, info: ModelInfo) -> float:
        """Those of the codes."""
        return float(self.widths.mean())

    def open(self, context: Context) -> BlockQuantizer:
        """See `Codec.open`."""
        more = np.ones_like(STEPS)
        more[RUN_BITS] = 1 / (1 - core().lib.STRETCH_KEYS * RUN_LOSSES)

        def quantize(layer: int, first: int, rows: Array) -> Array:
            bits = self.widths[layer][:, None]
            step = STEPS[bits]  # 0 where there are no bits
            read: Array = more[bits] * step * nearest_level(rows * inverse(step), 2.0**bits)
            return read

        return quantize


@dataclass(frozen=True)
class Trellis(Plain):
    """The core's t2, but for the order in which the stream has the tokens.

    Attributes:
        absolute: Whether the search counts errors as they are, not relative to their token's size.
        stretched: Whether scales are stretched as the core does.
    """

    absolute: bool = False
    stretched: bool = True

    def bits(self, info: ModelInfo) -> float:
        """Those of t2."""
        return Core("t2").bits(info)

    def open(self, context: Context) -> BlockQuantizer:
        """See `Codec.open`."""
        levels = np.array(list(core().lib.kvq_t2_level)) * core().lib.LEVEL_UNIT
        part = core().lib.STRETCH_VALUES if self.stretched else 0.0
        before = (
            np.arange(16) % 4
        )  # the state that a window of 4 bits comes from; it leads to w // 4

        def quantize(layer: int, first: int, rows: Array) -> Array:
            size = np.sqrt(np.square(rows).mean(axis=-1, keepdims=True))
            z, weight = rows * inverse(size), size**2 if self.absolute else np.ones_like(size)
            lanes = (len(rows), rows.shape[2])
            cost = np.full((4, *lanes), 1e30)
            cost[0] = 0
            branch = np.empty((BLOCK, 4, *lanes), np.intp)
            for t in range(BLOCK):
                off = np.square(z[:, t] - levels[:, None, None]) * weight[:, t]
                by_state = (cost[before] + off).reshape(4, 4, *lanes)
                branch[t], cost = by_state.argmin(axis=1), by_state.min(axis=1)
            state, chosen = cost.argmin(axis=0), np.empty_like(z)
            for t in reversed(range(BLOCK)):
                window = 4 * state + np.take_along_axis(branch[t], state[None], axis=0)[0]
                chosen[:, t], state = levels[window], before[window]
            scale = size * np.maximum(quantizers.least_squares(z, chosen), 0)
            return in_bytes(scale * stretch(z, chosen, part), 255) * chosen

        return quantize


# ---- coordinates ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ordered(Frame):
    """The channels of a head in another order [L, H, D]."""

    order: Array

    def open(self, context: Context) -> BlockQuantizer:
        """See `Codec.open`."""
        inner = self.inner.open(context)

        def quantize(layer: int, first: int, rows: Array) -> Array:
            order = self.order[layer][:, None].astype(np.intp)
            read = np.empty_like(rows)
            taken = inner(layer, first, np.take_along_axis(rows, order, axis=-1))
            np.put_along_axis(read, np.broadcast_to(order, rows.shape), taken, axis=-1)
            return read

        return quantize


@dataclass(frozen=True, eq=False)
class Calibrated(Frame):
    """A basis [L, H, D, D] around a mean [L, H, D] and, of keys, a wave (`Moments.k_wave`)."""

    basis: Array
    mean: Array
    wave: Array | None = None

    def open(self, context: Context) -> BlockQuantizer:
        """See `Codec.open`."""
        inner, rotation = self.inner.open(context), Rotation(context.model)
        into = self.basis.swapaxes(-1, -2)
        back = np.linalg.inv(into)

        def quantize(layer: int, first: int, rows: Array) -> Array:
            constant = self.mean[layer][:, None]
            if self.wave is not None:
                wave = np.broadcast_to(self.wave[layer][:, None], rows.shape)
                constant = constant + rotation.rotate(wave, first)
            latent = inner(layer, first, (rows - constant) @ into[layer])
            read: Array = latent @ back[layer] + constant
            return read

        return quantize


def water_filled(importance: Array, bits: float) -> Array:
    """How many latent channels [L, H, 4] of heads have 8, 4, 2 and 1 bits, as core/kv/kv_plan.c.

    Args:
        importance: [L, H, D], falling.
        bits: Per channel, on average.
    """
    d = importance.shape[-1]
    ends = np.array(
        [
            (n8, to4, to2, to1)
            for n8 in range(0, d // 4 + 1, 4)
            for to4 in range(n8, d + 1, 4)
            for to2 in range(to4, d + 1, 8)
            for to1 in range(to2, d + 1, 16)
            if 8 * n8 + 4 * (to4 - n8) + 2 * (to2 - to4) + to1 - to2 == bits * d
        ]
    )
    sums = np.concatenate([np.zeros_like(importance[..., :1]), importance.cumsum(axis=-1)], axis=-1)
    before = sums[..., ends]  # [L, H, choices, 4]
    error = np.diff(before, axis=-1, prepend=0) @ RUN_LOSSES - before[..., -1]
    run: Array = np.diff(ends[error.argmin(axis=-1)], axis=-1, prepend=0)
    return run


def widths_of(run: Array, d: int) -> Array:
    """The bits of each latent channel [L, H, D], from how many [L, H, 4] have 8, 4, 2 and 1."""
    which = (np.arange(d) >= run.cumsum(axis=-1)[..., None]).sum(axis=-2)
    bits: Array = np.append(RUN_BITS, 0)[which]
    return bits
