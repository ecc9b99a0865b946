"""From a text to a profile: what quantizers need to know about the keys of one model.

Owns the mathematics of the profile's arrays; `pykvq.moments` measures, `pykvq.profile` stores.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pykvq.checks import whole_number
from pykvq.moments import Moments, Rope, chunk_tokens, collect, one_thread
from pykvq.profile import Profile
from pykvq.sensitivity import least_tokens, sensitivities

if TYPE_CHECKING:
    from pykvq.model import Model, Progress
    from pykvq.moments import Array

#: How much the queries weigh in the choice of the latent channels: see `key_basis`.
QUERY_POWER = 0.5
#: Part of the mean variance that is added to every direction: what no text has shown may come.
SHRINKAGE = 1e-3

#: Most tokens of a chunk that sensitivities are measured on.
SENSITIVITY_CONTEXT = 1024

_LARGEST = float(np.finfo(np.float16).max)


def calibrate(
    model: Model,
    texts: Sequence[tuple[str, str]],
    *,
    n_tokens: int = 65536,
    n_ctx: int = 2048,
    sensitivity_chunks: int = 3,
    progress: Progress | None = None,
) -> Profile:
    """Makes the profile of a model: the same input gives the same profile.

    Args:
        model: The model.
        texts: Names and contents. Each gives the same number of tokens, from its beginning, in
            whole chunks; one that is shorter gives all the chunks that it has, with a warning.
        n_tokens: Tokens in all, at most.
        n_ctx: Tokens per chunk, each evaluated from an empty cache.
        sensitivity_chunks: Chunks of up to 1024 tokens that the sensitivities are measured on, the
            last ones of each text in turn. Each is read through two caches per layer, which takes
            most of the time; if it is 0, the sensitivities are 1 instead.
        progress: Told how far it is: ("moments", n_done, n) in tokens, then ("bases", n_done, n)
            in layers, then ("sensitivities", n_done, n) in tokens.

    Raises:
        ValueError: There is no text, one does not fill a chunk, or a number is out of range.
        ModelError: The model computes something that cannot be calibrated.
    """
    n_ctx, n_tokens = chunk_tokens(n_ctx), whole_number("n_tokens", n_tokens, 1)
    if not texts:
        raise ValueError("There is no text to calibrate on, expected at least one.")
    share = n_tokens // (n_ctx * len(texts)) * n_ctx
    if share == 0:
        raise ValueError(
            f"{n_tokens} tokens were asked for, expected at least {n_ctx * len(texts)}: one chunk"
            f" of {n_ctx} tokens of each text."
        )
    sensitivity_chunks = whole_number("sensitivity_chunks", sensitivity_chunks, 0)
    used: list[list[int]] = []
    for name, text in texts:
        ids = model.tokenize(text)
        if len(ids) < n_ctx:
            raise ValueError(
                f"The text {name} has {len(ids)} tokens, but at least {n_ctx} are needed to fill"
                " one chunk."
            )
        n_used = min(share, len(ids) // n_ctx * n_ctx)
        if n_used < share:
            warnings.warn(
                f"The text {name} has {len(ids)} tokens, of which {n_used} are used: {share} of"
                " each text were asked for.",
                stacklevel=2,
            )
        used.append(ids[:n_used])
    scored = _last_chunks(used, sensitivity_chunks, model.info.n_ctx_train)
    moments = collect(model, list(chain(*used)), n_ctx=n_ctx, progress=progress)
    digests = [(hashlib.sha256(text.encode()).hexdigest(), name) for name, text in texts]
    listed = "\n".join(f"{digest}  {name}" for digest, name in digests)
    profile = profile_of(model, moments, listed, progress=progress)
    if not scored:
        return profile
    k, v = sensitivities(
        model, profile, list(chain(*scored)), n_ctx=len(scored[0]), progress=progress
    )
    by_head = v[:, None] * _shares(value_errors(model, profile, moments))
    return profile.with_arrays(k_sensitivity=k, v_sensitivity=by_head.astype(np.float32))


def _last_chunks(texts: list[list[int]], n_chunks: int, n_ctx_train: int) -> list[list[int]]:
    """The chunks, all of one length, that sensitivities are measured on.

    They are taken from the ends of the texts in turn, as far as these reach.

    Raises:
        ValueError: The texts are too short for any.
    """
    shortest = min(len(ids) for ids in texts)
    n = min(SENSITIVITY_CONTEXT, n_ctx_train, shortest)
    if n_chunks and n < least_tokens():
        raise ValueError(
            f"{shortest} tokens of each text, trained for {n_ctx_train}, are too few to measure"
            f" sensitivities on, expected at least {least_tokens()}: more tokens have to be read,"
            " or the sensitivities left out."
        )
    at = [(i % len(texts), i // len(texts)) for i in range(n_chunks)]
    ends = [(text, len(texts[text]) - back * n) for text, back in at]
    return [texts[text][end - n : end] for text, end in ends if end >= n]


def _shares(parts: Array) -> Array:
    """Parts [L, H] divided by their sums; equal ones where all of a layer are 0."""
    total = parts.sum(axis=-1, keepdims=True)
    equal = np.full(parts.shape, 1 / parts.shape[-1])
    shares: Array = np.divide(parts, total, out=equal, where=total > 0)
    return shares


def profile_of(
    model: Model, moments: Moments, texts: str, *, progress: Progress | None = None
) -> Profile:
    """The profile that moments of a model give.

    The sensitivities are 1: they are found by running the model with errors.

    Args:
        model: The model.
        moments: Its moments.
        texts: What they were gathered on, as `Profile.texts` says.
        progress: Told how far it is: ("bases", n_done, n) in layers.

    Raises:
        ValueError: A basis is beyond the range of f16.
    """
    n_layers, n_kv_heads, d_head = moments.k_mean.shape
    pairs = Rope.of(model).pairs(d_head)
    bases, value_bases, importances, orders = [], [], [], []
    for layer in range(n_layers):
        with one_thread():
            queries = typical(moments.q[layer], moments.q_read[layer])
            basis, importance = key_basis(moments.k_residual[layer], queries)
        if np.abs(basis).max() > _LARGEST:
            raise ValueError(
                f"The key basis of layer {layer} reaches {np.abs(basis).max():.3g}, beyond the"
                f" {_LARGEST:.0f} of f16: its keys hardly differ from each other."
            )
        bases.append(basis)
        with one_thread():
            values = typical(moments.v[layer], moments.v_read[layer])
            value_bases.append(value_basis(values, _output_gram(model, layer)))
        importances.append(importance)
        orders.append(key_order(moments.k_deviation[layer], pairs))
        if progress is not None:
            progress("bases", layer + 1, n_layers)
    return Profile(
        name=f"KV profile of {model.info.name}",
        model=model.info.name,
        fingerprint=model.fingerprint,
        n_tokens=moments.n_tokens,
        texts=texts,
        n_layers=n_layers,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        arrays={
            "k_basis": np.array(bases, np.float16),
            "k_mean": moments.k_offset.astype(np.float32),
            "k_wave": moments.k_wave.astype(np.float32),
            "v_basis": np.array(value_bases, np.float16),
            "v_mean": moments.v_mean.astype(np.float32),
            "k_importance": np.array(importances, np.float32),
            "k_order": np.array(orders, np.int16),
            "k_sensitivity": np.ones(n_layers, np.float32),
            "v_sensitivity": np.ones((n_layers, n_kv_heads), np.float32),
        },
    )


def typical(moment: Array, read: Array) -> Array:
    """What a basis is fitted to: half a second moment [..., D, D], half that of what is read far.

    The latter, scaled to the size of the first, is what errors count by, but rests on few tokens.
    """
    size, size_read = (np.trace(x, axis1=-2, axis2=-1)[..., None, None] for x in (moment, read))
    scale = np.divide(size, size_read, out=np.zeros_like(size), where=size_read > 0)
    mixed: Array = np.where(size_read > 0, (moment + scale * read) / 2, moment)
    return mixed


# ---- keys -----------------------------------------------------------------------------------


def key_basis(
    residual: Array,
    queries: Array,
    *,
    power: float = QUERY_POWER,
    shrinkage: float = SHRINKAGE,
) -> tuple[Array, Array]:
    """The latent basis of keys: which directions matter, and how much.

    With C the second moment of the residual keys and S that of the queries, both shrunk toward
    identity, T = diag(e)^-1/2 V^T S^power, where V and e are the eigenvectors and eigenvalues of
    S^power C S^power. So T C T^T = I: the latent channels are uncorrelated and of unit variance,
    which is what SVDq (arXiv 2502.15304) has of an SVD of the keys alone (power 0). Weighting by
    the queries is OSCAR's idea (arXiv 2605.17757); at power 1/2 channels are ranked by the error
    of the logits, as if the queries of any text were those of the calibration.

    Args:
        residual: [..., D, D] second moment of keys after RoPE without their wave and the mean of
            their block.
        queries: [..., D, D] second moment of the queries that read them, divided by sqrt(D).
        power: From 0, which looks at keys alone, to 1/2.
        shrinkage: Part of the mean variance that is added to every direction of C and S.

    Returns:
        T [..., D, D], a row per latent channel, the most important first; and their importance
        [..., D]: E[(q . dk)^2] if the channel is dropped, dk = T^-1 with all but the channel zero,
        which is the diagonal of T^-T S T^-1.
    """
    c, s = _shrunk(residual, shrinkage), _shrunk(queries, shrinkage)
    weight, directions = np.linalg.eigh(s)
    root = (directions * weight[..., None, :] ** power) @ directions.swapaxes(-1, -2)
    e, v = np.linalg.eigh(root @ c @ root)
    # Of v and -v, which are equally good, the one whose largest entry is positive.
    largest = np.take_along_axis(v, np.abs(v).argmax(axis=-2, keepdims=True), axis=-2)
    v *= np.sign(largest)
    rest = (directions * weight[..., None, :] ** (1 - 2 * power)) @ directions.swapaxes(-1, -2)
    importance = e * np.einsum("...ac,...ab,...bc->...c", v, rest, v)
    basis = (v.swapaxes(-1, -2) @ root) / np.sqrt(e)[..., :, None]
    order = np.argsort(-importance, axis=-1, kind="stable")
    return (
        np.take_along_axis(basis, order[..., None], axis=-2),
        np.take_along_axis(importance, order, axis=-1),
    )


def value_basis(values: Array, output: Array, *, shrinkage: float = SHRINKAGE) -> Array:
    """The basis of values in which an even error costs the layer's output least.

    A codec with a scale per token errs evenly in all channels, in proportion to the size of a row.
    With C the second moment of the values and G that of what the output projection makes of them,
    the error after T is tr(T C T^t) tr(T^-t G T^-1) / D, which is least where X = T^t T solves
    X C X = G: the geometric mean of G and C^-1. What is left free of T, a rotation, is chosen so
    that no channel stands out.

    Args:
        values: [..., D, D] second moment of values without their mean.
        output: [..., D, D] W^t W of the columns W of the output projection that read the head.
        shrinkage: Part of the mean variance that is added to every direction of both.

    Returns:
        T [..., D, D].
    """
    c, g = _shrunk(values, shrinkage), _shrunk(output, shrinkage)
    root, inverse = _power(c, 0.5), _power(c, -0.5)
    stretch = _power(inverse @ _power(root @ g @ root, 0.5) @ inverse, 0.5)
    _, v = np.linalg.eigh(stretch @ c @ stretch)
    n = c.shape[-1]
    angle = 2 * np.pi / n * np.outer(np.arange(n), np.arange(n))
    spread = (np.cos(angle) + np.sin(angle)) / np.sqrt(n)  # Hartley's: orthogonal and flat
    basis: Array = spread @ v.swapaxes(-1, -2) @ stretch
    basis /= np.sqrt(np.square(basis).mean(axis=(-1, -2), keepdims=True) * n)
    return basis


def value_errors(model: Model, profile: Profile, moments: Moments) -> Array:
    """What even relative errors in the values of each head cost its layer's output [L, H].

    As `value_basis` says, with the second moment of what is read in place of C.
    """
    errors = []
    for layer, read in enumerate(moments.v_read):
        basis = profile.arrays["v_basis"][layer].astype(np.float64)
        back = np.linalg.inv(basis)
        cost = np.einsum("hca,hcd,hda->h", back, _output_gram(model, layer), back, optimize=True)
        errors.append(np.einsum("hac,hcd,had->h", basis, read, basis, optimize=True) * cost)
    return np.array(errors)


def _power(moment: Array, power: float) -> Array:
    """A power of symmetric positive definite matrices [..., D, D]."""
    weight, v = np.linalg.eigh(moment)
    result: Array = (v * weight[..., None, :] ** power) @ v.swapaxes(-1, -2)
    return result


def _output_gram(model: Model, layer: int) -> Array:
    """W^t W [H, D, D] of the output projection's columns, summed over the group of each KV head."""
    info = model.info
    group = info.n_heads // info.n_kv_heads
    w = model.tensor(f"blk.{layer}.attn_output.weight").astype(np.float64)
    w = w.reshape(-1, info.n_kv_heads, group, info.d_head)
    gram: Array = np.einsum("ehgc,ehgd->hcd", w, w, optimize=True)
    return gram


def _shrunk(moment: Array, shrinkage: float) -> Array:
    """A second moment [..., D, D] with a part of its mean variance added to every direction."""
    d = moment.shape[-1]
    mean = np.trace(moment, axis1=-2, axis2=-1) / d
    # A head that is switched off has no variance to take a part of.
    added = shrinkage * np.where(mean > 0, mean, 1.0)
    shrunk: Array = moment + added[..., None, None] * np.eye(d)
    return shrunk


def key_order(deviation: Array, pairs: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """The channels of keys sorted so that groups of neighbours have like ranges.

    SKVQ (arXiv 2405.06219) clusters channels by their ranges before RoPE. After RoPE, within a
    head, the two channels of a pair share the range of the pair's radius, so that pairs are sorted
    by it; equal cuts of the sorted channels are then the best groups of equal size.

    Args:
        deviation: [..., D, D] second moment of keys after RoPE without the mean of their block.
        pairs: [D / 2, 2] the channels that RoPE rotates together.

    Returns:
        [..., D] a permutation: which channel comes at each place, the largest radius first.
    """
    variance = np.diagonal(deviation, axis1=-2, axis2=-1)
    squared_radius = variance[..., pairs].sum(axis=-1)
    order = np.argsort(-squared_radius, axis=-1, kind="stable")
    return pairs[order].reshape(variance.shape)
