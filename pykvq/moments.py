"""What calibration measures: second moments and ranges of queries, keys and values.

Owns the pass over the text and the sums; what they are turned into is in `pykvq.calibrate`. The
text is read in chunks, each in one pass with an exact cache, so that the sums have one order and
the same input gives the same numbers on the same kind of processor, whatever the number of threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pykvq import native
from pykvq.checks import SESSION_RANGES, whole_number
from pykvq.errors import ModelError
from pykvq.eval.streaming import cut_chunks

if TYPE_CHECKING:
    import os

    from pykvq.model import Model, Progress
    from pykvq.session import FloatArray, Tokens

Array = npt.NDArray[np.float64]

#: First tokens of a chunk that are left out: attention sinks are kept in f16 and are unlike others.
SINKS = 5
#: Last tokens before and with a query that are taken to be exact: the window of the schemes.
WINDOW = 128
#: Pairs of channels per head whose wave is taken out: see `Moments.k_wave`.
N_WAVES = 8
#: Queries whose attention is computed at once: [group * 256, n_ctx] scores are held.
_QUERIES = 256


@dataclass(frozen=True)
class Moments:
    """Statistics of the tokens of a text behind the sinks; L layers, H KV heads of width D.

    Second moments are averages of x x^T. "Centred" is without the mean over all tokens.

    Attributes:
        n_tokens: Tokens that were averaged over.
        n_scored: Of these, the ones that `q_read`, `v_scored` and `v_read` were computed from.
        q: [L, H, D, D] second moment of queries after RoPE divided by sqrt(D), over the tokens and
            the query heads that read the KV head: dk^T q dk is the mean squared change of a
            logit if a key changes by dk.
        q_read: [L, H, D, D] the same, but each query weighted by the sum of the squares of the
            attention that it pays to keys that are neither sinks nor in the window: so queries that
            look far stand out.
        k_mean: [L, H, D] mean of keys after RoPE.
        k: [L, H, D, D] centred second moment of keys after RoPE.
        k_deviation: [L, H, D, D] second moment of keys after RoPE without the mean of their block,
            the blocks being those that a cache with `SINKS` sinks seals.
        k_residual: [L, H, D, D] the same of keys after RoPE without their wave.
        k_wave: [L, H, D] the mean of keys before RoPE in the pairs of channels, at most `N_WAVES`
            of a head, where RoPE makes it the largest part of `k_deviation`; 0 elsewhere. The wave
            of a key at position t is R_t k_wave.
        k_offset: [L, H, D] mean of keys after RoPE without their wave.
        k_pre_mean: [L, H, D] mean of keys before RoPE.
        k_min: [L, H, D] least key after RoPE.
        k_max: [L, H, D] largest.
        k_pre_min: [L, H, D] least key before RoPE.
        k_pre_max: [L, H, D] largest.
        v_mean: [L, H, D] mean of values.
        v: [L, H, D, D] centred second moment of values.
        v_scored: [L, H, D, D] the same, but each token weighted by the attention that it receives
            from all queries of its chunk (OSCAR, arXiv 2605.17757); centred at `v_mean`.
        v_read: [L, H, D, D] the same second moment, but each token weighted by the square of the
            attention that a query head pays it from beyond the window: if each value has an
            error of its own, independent of the others, what is read errs by as much. So tokens
            and heads that are looked at from far stand out.
        v_min: [L, H, D] least value.
        v_max: [L, H, D] largest.
    """

    n_tokens: int
    n_scored: int
    q: Array
    q_read: Array
    k_mean: Array
    k: Array
    k_deviation: Array
    k_residual: Array
    k_wave: Array
    k_offset: Array
    k_pre_mean: Array
    k_min: Array
    k_max: Array
    k_pre_min: Array
    k_pre_max: Array
    v_mean: Array
    v: Array
    v_scored: Array
    v_read: Array
    v_min: Array
    v_max: Array

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of it to a file that numpy.load reads; the ending .npz is added if missing."""
        np.savez(path, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Reads what `save` wrote.

        Raises:
            ModelError: The file holds something else.
        """
        names = {field.name for field in fields(cls)}
        with np.load(path, allow_pickle=False) as data:
            if set(data) != names:
                raise ModelError(
                    f"{path} has the entries {sorted(data)}, but those of moments were expected:"
                    f" {sorted(names)}."
                )
            n_tokens, n_scored = (int(data[name]) for name in _COUNTS)
            arrays = {name: data[name] for name in names.difference(_COUNTS)}
        return cls(n_tokens, n_scored, **arrays)


_COUNTS = ("n_tokens", "n_scored")


def collect(
    model: Model,
    tokens: Tokens,
    *,
    n_ctx: int = 2048,
    progress: Progress | None = None,
    scored_every: int = 4,
) -> Moments:
    """Runs a model over tokens and gathers their moments.

    Args:
        model: The model.
        tokens: [n] ids, cut into chunks of `n_ctx`, each evaluated from an empty cache and begun
            with BOS where the model wants it; what is left at the end is not used.
        n_ctx: Tokens per chunk: at least the sinks and one block.
        progress: Told how far it is: ("moments", n_done, n) in tokens.
        scored_every: Every which chunk `q_read`, `v_scored` and `v_read` are computed on: their
            cost grows with n_ctx^2.

    Raises:
        ValueError: The tokens do not fill a chunk, or an argument is out of range.
        ModelError: The model computes something that is not finite.
    """
    n_ctx = chunk_tokens(n_ctx)
    scored_every = whole_number("scored_every", scored_every, 1)
    chunks = cut_chunks(model, np.asarray(tokens), n_ctx)
    n_layers = model.info.n_layers
    sums = _Sums(model, n_ctx)
    total = len(chunks) * n_ctx

    def observer(
        at: int, layer: int, first: int, q: FloatArray, k: FloatArray, v: FloatArray
    ) -> None:
        del first  # a chunk is one pass
        sums.add(layer, q, k, v, scored=at % scored_every == 0)
        if progress is not None:
            progress("moments", at * n_ctx + n_ctx * (layer + 1) // n_layers, total)

    with one_thread(), model.session(kv="f16", n_ctx=n_ctx, n_batch=n_ctx) as session:
        for at, ids in enumerate(chunks):
            session.reset()
            session.observe(partial(observer, at))
            session.eval(ids, "none")
    return sums.moments(len(chunks), -(-len(chunks) // scored_every))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Lets numpy's linear algebra use one thread.

    Its sums then have one order on any number of processors; and small products, as all here are,
    do not wait for threads that the session's keep from running.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1, user_api="blas"):
        yield


def chunk_tokens(n_ctx: int) -> int:
    """Requires a number of tokens per chunk that `collect` takes: sinks, a block, one pass.

    Raises:
        ValueError: It is another one.
    """
    least, most = SINKS + native.block_tokens(), SESSION_RANGES["n_batch"][1]
    return whole_number("n_ctx", n_ctx, least, most)


class _Sums:
    """Running sums in float64: their cost is a few percent of the model's own work.

    Waves are linear in the sinusoids of RoPE, so that the sums of products of keys with these tell
    what any wave takes out of the keys: which one to take can be decided after the only pass.
    """

    def __init__(self, model: Model, n_ctx: int) -> None:
        info = model.info
        self._rope = Rope.of(model)
        self._positions = np.arange(SINKS, n_ctx)
        self._sinusoids = self._rope.sinusoids(self._positions)
        heads = (info.n_layers, info.n_kv_heads)
        vectors, matrices = (*heads, info.d_head), (*heads, info.d_head, info.d_head)
        self._group = info.n_heads // info.n_kv_heads
        self._q, self._q_read = np.zeros(matrices), np.zeros(matrices)
        self._k, self._kk = np.zeros(vectors), np.zeros(matrices)
        self._k_pre = np.zeros(vectors)
        self._deviation = np.zeros(matrices)
        self._k_sinusoids = np.zeros((*vectors, self._sinusoids.shape[1]))
        self._v, self._vv = np.zeros(vectors), np.zeros(matrices)
        # Of attention weights w: sums of w, w v, w v v^T; and the same of w^2.
        self._w, self._wv, self._wvv = np.zeros(heads), np.zeros(vectors), np.zeros(matrices)
        self._ww, self._wwv, self._wwvv = np.zeros(heads), np.zeros(vectors), np.zeros(matrices)
        self._ranges = {
            name: (np.full(vectors, np.inf), np.full(vectors, -np.inf))
            for name in ("k", "k_pre", "v")
        }

    def add(self, layer: int, q: FloatArray, k: FloatArray, v: FloatArray, scored: bool) -> None:
        """Adds one layer of a chunk: q [n_ctx, n_heads, D], k and v [n_ctx, H, D]."""
        for name, given in (("queries", q), ("keys", k), ("values", v)):
            if not np.isfinite(given).all():
                raise ModelError(
                    f"The {name} of layer {layer} are not all finite; the model cannot be"
                    " calibrated."
                )
        n, n_kv_heads, d = k.shape
        q64 = q[SINKS:].astype(np.float64).reshape(n - SINKS, n_kv_heads, self._group, d)
        k64, v64 = k[SINKS:].astype(np.float64), v[SINKS:].astype(np.float64)
        for member in range(self._group):
            self._q[layer] += _gram(q64[:, :, member])
        self._k[layer] += k64.sum(axis=0)
        self._kk[layer] += _gram(k64)
        self._v[layer] += v64.sum(axis=0)
        self._vv[layer] += _gram(v64)
        deviation = _without_block_means(k64)
        self._deviation[layer] += _gram(deviation)
        self._k_sinusoids[layer] += deviation.transpose(1, 2, 0) @ self._sinusoids[: len(deviation)]
        k_pre = self._rope.undo(k64, self._positions)
        self._k_pre[layer] += k_pre.sum(axis=0)
        for name, x in (("k", k64), ("k_pre", k_pre), ("v", v64)):
            least, most = self._ranges[name]
            np.minimum(least[layer], x.min(axis=0), out=least[layer])
            np.maximum(most[layer], x.max(axis=0), out=most[layer])
        if scored:
            received, squares, paid = attention(q, k)
            for member in range(self._group):
                root = np.sqrt(paid[SINKS:, :, member, None])
                self._q_read[layer] += _gram(root * q64[:, :, member])
            for weights, total, first, second in zip(
                (received, squares),
                (self._w, self._ww),
                (self._wv, self._wwv),
                (self._wvv, self._wwvv),
                strict=True,
            ):
                w = weights[SINKS:]
                weighted = w[:, :, None] * v64
                total[layer] += w.sum(axis=0)
                first[layer] += weighted.sum(axis=0)
                second[layer] += weighted.transpose(1, 2, 0) @ v64.transpose(1, 0, 2)

    def moments(self, n_chunks: int, n_scored_chunks: int) -> Moments:
        """The averages."""
        n_per_chunk, d = len(self._positions), self._q.shape[-1]
        n_tokens, n_scored = n_chunks * n_per_chunk, n_scored_chunks * n_per_chunk
        k_mean, v_mean = self._k / n_tokens, self._v / n_tokens
        # Only the tokens of whole blocks have a block's mean.
        in_blocks = _without_block_means(self._sinusoids[:, None])[:, 0]
        n_in_blocks = n_chunks * len(in_blocks)
        deviation, products = self._deviation / n_in_blocks, self._k_sinusoids / n_in_blocks
        sinusoids = in_blocks.T @ in_blocks / len(in_blocks)
        k_pre_mean = self._k_pre / n_tokens
        k_wave = _worst_waves(self._rope, k_pre_mean, deviation, products, sinusoids)
        wave = self._rope.wave(k_wave)
        wave_deviation = products @ wave.swapaxes(-1, -2)
        residual = deviation - wave_deviation - wave_deviation.swapaxes(-1, -2)
        residual += wave @ sinusoids @ wave.swapaxes(-1, -2)
        return Moments(
            n_tokens=n_tokens,
            n_scored=n_scored,
            q=self._q / (n_tokens * self._group * d),
            q_read=self._q_read / (n_scored * self._group * d),
            k_mean=k_mean,
            k=self._kk / n_tokens - _outer(k_mean, k_mean),
            k_deviation=deviation,
            k_residual=residual,
            k_wave=k_wave,
            k_offset=k_mean - wave @ self._sinusoids.mean(axis=0),
            k_pre_mean=k_pre_mean,
            k_min=self._ranges["k"][0],
            k_max=self._ranges["k"][1],
            k_pre_min=self._ranges["k_pre"][0],
            k_pre_max=self._ranges["k_pre"][1],
            v_mean=v_mean,
            v=self._vv / n_tokens - _outer(v_mean, v_mean),
            v_scored=_about(v_mean, self._w, self._wv, self._wvv) / self._w[..., None, None],
            v_read=_about(v_mean, self._ww, self._wwv, self._wwvv) / (n_scored * self._group),
            v_min=self._ranges["v"][0],
            v_max=self._ranges["v"][1],
        )


def _without_block_means(x: Array) -> Array:
    """Rows [n, H, D] of whole blocks without the mean of their block; n is cut down to these."""
    block = native.block_tokens()
    blocks = x[: len(x) // block * block].reshape(-1, block, *x.shape[1:])
    deviations: Array = blocks - blocks.mean(axis=1, keepdims=True)
    return deviations.reshape(-1, *x.shape[1:])


def _worst_waves(
    rope: Rope, constant: Array, deviation: Array, products: Array, sinusoids: Array
) -> Array:
    """Of a constant of keys before RoPE, the pairs of channels whose wave should be taken out.

    Args:
        rope: The rotation.
        constant: [L, H, D] its waves are R_t constant.
        deviation: [L, H, D, D] second moment of keys x without the mean of their block.
        products: [L, H, D, 2 n] mean of x s^T; s are the sinusoids of RoPE.
        sinusoids: [2 n, 2 n] second moment of s without the mean of their block.

    Returns:
        [L, H, D] the constant in the `N_WAVES` pairs whose variance falls by the largest part if
        their wave is subtracted, as far as it falls; 0 elsewhere.
    """
    wave = rope.wave(constant)
    fall = 2 * (products * wave).sum(axis=-1) - (wave @ sinusoids * wave).sum(axis=-1)
    variance = np.diagonal(deviation, axis1=-2, axis2=-1)
    falls, variances = (x[..., rope.first] + x[..., rope.second] for x in (fall, variance))
    # A pair that never varies has no wave either.
    part = np.divide(falls, variances, out=np.zeros_like(falls), where=variances > 0)
    best = np.argsort(-part, axis=-1, kind="stable")[..., :N_WAVES]
    chosen = np.zeros(part.shape, bool)
    np.put_along_axis(chosen, best, np.take_along_axis(part, best, axis=-1) > 0, axis=-1)
    kept = np.zeros_like(constant)
    for channels in (rope.first, rope.second):
        kept[..., channels] = np.where(chosen, constant[..., channels], 0)
    return kept


def _gram(x: Array) -> Array:
    """Sum over tokens of x x^T per head: [n, H, D] -> [H, D, D]."""
    gram: Array = x.transpose(1, 2, 0) @ x.transpose(1, 0, 2)
    return gram


def _outer(x: Array, y: Array) -> Array:
    return x[..., :, None] * y[..., None, :]


def _about(centre: Array, total: Array, first: Array, second: Array) -> Array:
    """Sums of w (x - centre) (x - centre)^T, given those of w, w x and w x x^T."""
    cross = _outer(first, centre)
    return second - cross - cross.swapaxes(-1, -2) + total[..., None, None] * _outer(centre, centre)


def attention(q: FloatArray, k: FloatArray) -> tuple[Array, Array, Array]:
    """Sums over the attention of one causal pass.

    "Far" is from a query to keys that precede it by at least `WINDOW` tokens and are no sinks.

    Args:
        q: [n, n_heads, D] queries after RoPE.
        k: [n, H, D] keys after RoPE; query heads are shared evenly among the KV heads.

    Returns:
        By key [n, H]: probabilities, summed over all queries and query heads of the KV head; and
        the squares of far ones, summed likewise (0 for sinks). By query [n, H, n_heads / H]:
        the squares of far ones, summed over the keys.
    """
    n, n_kv_heads, d = k.shape
    group = q.shape[1] // n_kv_heads
    received, squares = np.zeros((n_kv_heads, n)), np.zeros((n_kv_heads, n))
    paid = np.zeros((n, n_kv_heads, group))
    later = np.triu(np.ones((_QUERIES, _QUERIES), bool), 1)
    for head in range(n_kv_heads):
        keys = np.ascontiguousarray(k[:, head].T) / np.float32(np.sqrt(d))
        queries = q[:, head * group : (head + 1) * group].transpose(1, 0, 2)
        for start in range(0, n, _QUERIES):
            end = min(start + _QUERIES, n)
            rows = queries[:, start:end]
            p = (rows.reshape(-1, d) @ keys[:, :end]).reshape(group, end - start, end)
            p[:, :, start:][:, later[: end - start, : end - start]] = -np.inf
            p -= p.max(axis=-1, keepdims=True)
            np.exp(p, out=p)
            scale = 1 / p.sum(axis=-1)
            received[head, :end] += np.tensordot(scale, p, axes=2)
            far = np.tri(end - start, end, start - WINDOW, dtype=np.float32)
            far[:, :SINKS] = 0
            np.square(p, out=p)
            p *= far
            squares[head, :end] += np.tensordot(scale * scale, p, axes=2)
            paid[start:end, head] = (scale * scale * p.sum(axis=-1)).T
    return received.T, squares.T, paid


# ---- rotary position embedding --------------------------------------------------------------


@dataclass(frozen=True)
class Rope:
    """The rotation of a model's heads by position (RoPE, arXiv 2104.09864).

    Attributes:
        first: [n] first channel of each pair that is rotated.
        second: [n] the other one.
        frequencies: [n] angle per position, in radians.
    """

    first: npt.NDArray[np.intp]
    second: npt.NDArray[np.intp]
    frequencies: Array

    @classmethod
    def of(cls, model: Model) -> Rope:
        """The rotation of a model."""
        first, second, frequencies = zip(*model.rope, strict=True)
        return cls(np.array(first, np.intp), np.array(second, np.intp), np.array(frequencies))

    def sinusoids(self, positions: npt.NDArray[np.integer]) -> Array:
        """The cosines of the angles at positions [t], then the sines: [t, 2 n]."""
        angles = positions[:, None] * self.frequencies
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)

    def wave(self, x: Array) -> Array:
        """What turns `sinusoids` into x [..., D] after RoPE: [..., D, 2 n].

        Channels that are not rotated are left out: their rows are zeros.
        """
        wave = np.zeros((*x.shape, 2 * len(self.first)))
        a, b = x[..., self.first], x[..., self.second]
        cos = np.arange(len(self.first))
        sin = cos + len(cos)
        wave[..., self.first, cos], wave[..., self.first, sin] = a, -b
        wave[..., self.second, cos], wave[..., self.second, sin] = b, a
        return wave

    def undo(self, x: Array, positions: npt.NDArray[np.integer]) -> Array:
        """Takes the rotation back: x [n, H, D] of tokens at positions [n] -> [n, H, D]."""
        cos, sin = np.split(self.sinusoids(positions)[:, None], 2, axis=-1)
        a, b = x[..., self.first], x[..., self.second]
        plain = x.copy()
        plain[..., self.first] = a * cos + b * sin
        plain[..., self.second] = b * cos - a * sin
        return plain

    def pairs(self, d_head: int) -> npt.NDArray[np.intp]:
        """The pairs of channels [d_head / 2, 2]; those that are not rotated pair up in order."""
        rotated = np.stack([self.first, self.second], axis=1)
        rest = np.arange(rotated.size, d_head).reshape(-1, 2)
        return np.concatenate([rotated, rest])
