"""How much a model's output suffers from errors in the cache of one layer.

The loss of a quantizer is known from its levels; what is not is what an error in a layer does to
the next token. That is measured: noise of known size takes the place of the rounding error in the
sealed blocks of one layer and side, and the divergence from the f16 cache is divided by the size.
The divergences of small errors add up over layers, to first order, so a plan can spend bits where
they lower the sum most (core/kv/kv_plan.c).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pykvq import native
from pykvq.checks import whole_number
from pykvq.eval.streaming import Lockstep, cut_chunks
from pykvq.moments import SINKS, WINDOW, one_thread

if TYPE_CHECKING:
    from pykvq.model import Model, Progress
    from pykvq.moments import Array
    from pykvq.profile import Profile
    from pykvq.session import FloatArray, IntArray, Session, Side

#: Bits per key element whose rounding error the noise in the keys resembles.
_KEY_BITS = 2.0
#: Mean square error of the values, relative to their mean square: that of about 2 bits.
_VALUE_ERROR = 0.1
#: Bytes that the sessions which are open at once may take; there are always two.
_MEMORY = 2**30


def least_tokens() -> int:
    """Tokens that a chunk needs so that each that is scored reads at least one noisy block."""
    return 2 * (SINKS + native.block_tokens() + WINDOW)


def sensitivities(
    model: Model,
    profile: Profile,
    tokens: list[int] | IntArray,
    *,
    n_ctx: int = 1024,
    progress: Progress | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Measures the sensitivity of every layer; the same input gives the same numbers.

    Args:
        model: The model.
        profile: Its key bases and importances.
        tokens: A text in whole chunks, of which the second half is scored.
        n_ctx: Tokens per chunk, at least `least_tokens()`.
        progress: Told how far it is: ("sensitivities", n_done, n) in tokens, each counted for each
            cache that reads it.

    Returns:
        k [L]: divergence in nats per squared logit error, as `k_importance` counts it, summed over
        the heads of the layer; v [L]: divergence if the relative squared error of all values of the
        layer were 1.

    Raises:
        ValueError: The tokens do not fill a chunk, or `n_ctx` is out of range.
    """
    n_ctx = whole_number("n_ctx", n_ctx, least_tokens())
    chunks = cut_chunks(model, tokens, n_ctx)
    importance = profile.arrays["k_importance"].astype(np.float64)
    losses = _water_filled(importance, _KEY_BITS)
    noises: list[_Noise] = []
    for layer in range(profile.n_layers):
        k_basis, v_basis, v_mean = (
            profile.arrays[slot][layer].astype(np.float64)
            for slot in ("k_basis", "v_basis", "v_mean")
        )
        noises += [
            _KeyNoise(layer, k_basis, losses[layer]),
            _ValueNoise(layer, v_basis, v_mean),
        ]
    with one_thread():
        kld = _divergences(model, noises, chunks, progress)
    k = kld[0::2] / (losses * importance).sum(axis=(1, 2))
    return k.astype(np.float32), (kld[1::2] / _VALUE_ERROR).astype(np.float32)


def _water_filled(importance: Array, bits: float) -> Array:
    """The relative error [..., D] of each channel if `bits` per channel are shared out best.

    Reverse water-filling: channels above the water line theta err by theta, the others are dropped.
    The line of each head is found by bisection over its logarithm.
    """
    low, high = np.log(importance.min(-1) + 1e-30) - 20, np.log(importance.max(-1) + 1e-30)
    for _ in range(60):
        middle = (low + high) / 2
        spent = 0.5 * np.log2(np.maximum(importance / np.exp(middle)[..., None], 1)).mean(-1)
        low, high = np.where(spent > bits, middle, low), np.where(spent > bits, high, middle)
    relative: Array = np.minimum(np.exp(high)[..., None] / np.maximum(importance, 1e-30), 1)
    return relative


# ---- noise ----------------------------------------------------------------------------------


class _Noise(ABC):
    """A simulator that adds seeded noise to one layer and side."""

    side: Side

    def __init__(self, layer: int) -> None:
        self._layer = layer

    def __call__(self, layer: int, side: Side, first: int, rows: FloatArray) -> None:
        """See `pykvq.session.Session.simulate`."""
        if layer == self._layer and side == self.side:
            rng = np.random.default_rng([layer, first])
            rows += self.shaped(rng.standard_normal(rows.shape, np.float32), rows)

    @abstractmethod
    def shaped(self, noise: FloatArray, rows: FloatArray) -> FloatArray:
        """Standard normal numbers [H, t, D] made the noise of rows [H, t, D]."""


class _KeyNoise(_Noise):
    """Noise in the latent channels: basis T [H, D, D], variances [H, D]."""

    side: Side = "k"

    def __init__(self, layer: int, basis: Array, variances: Array) -> None:
        super().__init__(layer)
        # Rows of noise times this are noise in keys: its transpose is T^-1 diag(deviations).
        spread = np.linalg.inv(basis) * np.sqrt(variances)[:, None, :]
        self._spread = spread.swapaxes(-1, -2).astype(np.float32)

    def shaped(self, noise: FloatArray, rows: FloatArray) -> FloatArray:
        """See `_Noise.shaped`."""
        del rows
        return noise @ self._spread


class _ValueNoise(_Noise):
    """Noise of the same relative size in every token of a head, even in the channels of a basis.

    T [H, D, D] and the mean [H, D] are those that values are stored with.
    """

    side: Side = "v"

    def __init__(self, layer: int, basis: Array, mean: Array) -> None:
        super().__init__(layer)
        self._into = basis.swapaxes(-1, -2).astype(np.float32)
        self._back = np.linalg.inv(basis).swapaxes(-1, -2).astype(np.float32)
        self._mean = mean[:, None, :].astype(np.float32)

    def shaped(self, noise: FloatArray, rows: FloatArray) -> FloatArray:
        """See `_Noise.shaped`."""
        stored = (rows - self._mean) @ self._into
        mean_square = np.square(stored).mean(axis=-1, keepdims=True)
        shaped: FloatArray = (noise * np.sqrt(np.float32(_VALUE_ERROR) * mean_square)) @ self._back
        return shaped


# ---- divergences ----------------------------------------------------------------------------


def _divergences(
    model: Model, noises: list[_Noise], chunks: list[IntArray], progress: Progress | None
) -> Array:
    """The mean divergence [len(noises)] that each noise causes, in nats per token.

    As many noisy caches as memory has room for are read in lockstep, so that the exact one is read
    once for all of them.
    """
    n_ctx = len(chunks[0])
    kld = np.zeros(len(noises))
    with _session(model, n_ctx) as exact:
        stats = exact.stats
        at_once = max(1, _MEMORY // (stats.bytes_kv + stats.bytes_scratch) - 1)
        starts = range(0, len(noises), at_once)
        total = (len(noises) + len(starts)) * len(chunks) * (n_ctx - 1)
        n_done = 0

        def count(n: int) -> None:
            nonlocal n_done
            n_done += n
            if progress is not None:
                progress("sensitivities", n_done, total)

        for start in starts:
            group = noises[start : start + at_once]
            with contextlib.ExitStack() as stack:
                noisy = [stack.enter_context(_session(model, n_ctx)) for _ in group]
                for session, noise in zip(noisy, group, strict=True):
                    session.simulate(noise)
                lockstep = Lockstep([exact, *noisy])
                for ids in chunks:
                    scores = lockstep.score(ids, n_ctx // 2, count)[1:]
                    kld[start : start + len(group)] += [score.kld.mean() for score in scores]
    return kld / len(chunks)


def _session(model: Model, n_ctx: int) -> Session:
    """An f16 session that reads a block per pass, as streaming order has it.

    Noise is simulated, which the CPU alone does.
    """
    return model.session(
        kv="f16",
        n_ctx=n_ctx,
        n_batch=native.block_tokens(),
        kv_sinks=SINKS,
        kv_window=WINDOW,
        device="cpu",
    )
