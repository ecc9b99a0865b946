"""Keys before RoPE, and the biases of keys: where the paper's forms of some schemes quantize.

A simulation is shown keys after RoPE (arXiv 2104.09864); these take them back, and forth again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pykvq.moments import Rope

if TYPE_CHECKING:
    from pykvq.eval.quantizers import Array
    from pykvq.model import Model


class Rotation:
    """The rotation by position that a model gives its keys, for blocks of them."""

    def __init__(self, model: Model) -> None:
        """Reads it."""
        self._rope = Rope.of(model)
        self._span = (-1, -1)
        self._cos_sin: tuple[Array, Array] = (np.empty(0), np.empty(0))

    def rotate(self, x: Array, first: int) -> Array:
        """Rows [..., t, d_head] of tokens first, first + 1, ... after RoPE."""
        return self._turned(x, first, 1)

    def unrotate(self, x: Array, first: int) -> Array:
        """Rows [..., t, d_head] as they are before RoPE; undoes `rotate`."""
        return self._turned(x, first, -1)

    def _turned(self, x: Array, first: int, sign: int) -> Array:
        span = (first, x.shape[-2])
        if span != self._span:  # all layers seal the same tokens in turn
            angles = np.arange(first, first + span[1])[:, None] * self._rope.frequencies
            self._cos_sin = (np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype))
            self._span = span
        cos, sin = self._cos_sin[0], sign * self._cos_sin[1]
        one, other = self._rope.first, self._rope.second
        a, b = x[..., one], x[..., other]
        turned = x.copy()
        turned[..., one] = a * cos - b * sin
        turned[..., other] = a * sin + b * cos
        return turned


def key_biases(model: Model) -> Array:
    """The biases of the keys, [n_layers, n_kv_heads, d_head]; zero where a layer has none."""
    info = model.info
    biases = np.zeros((info.n_layers, info.n_kv_heads, info.d_head), np.float32)
    if model.has_key_bias:
        present = {tensor.name for tensor in model.tensors}
        for layer in range(info.n_layers):
            if (name := f"blk.{layer}.attn_k.bias") in present:
                biases[layer] = model.tensor(name).reshape(biases.shape[1:])
    return biases
