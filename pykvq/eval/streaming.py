"""Reading one text through several KV caches at once, and scoring what each makes of it.

Owns the order in which tokens are read and the arithmetic on logits; knows no scheme by name and
nothing of what becomes of the scores. `pykvq.perplexity` and the tasks of `pykvq.eval` call it.

All caches are read in lockstep, a few positions at a time, so that the logits of the reference are
computed once for all of them and never stored: only [64, n_vocab] of it and of one other cache
are held while streaming. Divergences are formed from the float32 logits themselves, not from a
file of rounded ones (which is inaccurate for large vocabularies: ik_llama.cpp, PR 325).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pykvq import native
from pykvq.sampling import require_finite

if TYPE_CHECKING:
    from pykvq.model import Model
    from pykvq.session import FloatArray, IntArray, Session

FloatColumn = npt.NDArray[np.float64]
Count = Callable[[int], None]

#: Positions whose logits are held at once while streaming; also tokens per sealed block, so that
#: passes are not cut anywhere else.
_ROWS = 64
#: Positions whose scores are computed at once: their temporaries stay in the processor's cache.
_SCORED_ROWS = 8


@dataclass(frozen=True)
class Scores:
    """What one cache made of the scored positions of a text.

    Attributes:
        nll: Negative log-probability of the token that follows, in nats: [n] float64.
        kld: KL(reference || cache) of the next token's distribution, in nats: [n] float64. Zeros
            where nothing was compared.
        top: The likeliest next token: [n] int32.
    """

    nll: FloatColumn
    kld: FloatColumn
    top: IntArray


def cut_chunks(model: Model, tokens: Sequence[int] | IntArray, n_ctx: int) -> list[IntArray]:
    """The chunks [n_ctx] of a text, each beginning with BOS where the model wants it.

    As in llama.cpp's tools/perplexity, BOS takes the place of a chunk's first token.

    Raises:
        ValueError: The text does not fill one chunk.
    """
    ids = np.asarray(tokens, np.int32)
    n = len(ids) // n_ctx
    if n == 0:
        raise ValueError(
            f"The text has {len(ids)} tokens, but at least {n_ctx} are needed to fill one chunk."
        )
    pieces = ids[: n * n_ctx].reshape(n, n_ctx).copy()
    tokenizer = model.tokenizer
    if tokenizer.add_bos and tokenizer.bos is not None:
        pieces[:, 0] = tokenizer.bos
    return list(pieces)


def few_chunks(n: int, n_ctx: int, asked: int) -> str:
    """The sentence about a text that has fewer chunks than were asked for."""
    chunks = "one chunk" if n == 1 else f"{n} chunks"
    return (
        f"The text fills {chunks} of {n_ctx} tokens, fewer than the {asked} of --chunks; all of it"
        " is read."
    )


def sealed_tokens(n: int, sinks: int, window: int) -> int:
    """Of n tokens in a cache, those in sealed blocks."""
    block = native.block_tokens()
    return max(0, n - sinks - window) // block * block


def sealed_share(
    n_ctx: int, first: int, sinks: int, window: int, n_batch: int | None = None
) -> float:
    """Which part of what is scored of a chunk has read sealed blocks.

    Args:
        n_ctx: Tokens of the chunk, of which the last is only predicted.
        first: The first position that is scored.
        sinks: First tokens kept in f16.
        window: Last tokens kept in f16.
        n_batch: Tokens per pass, which all read what was sealed before it; None: as if token by
            token.

    Returns:
        A number from 0 to 1.
    """
    held = np.arange(first, n_ctx - 1) // (n_batch or 1) * (n_batch or 1)  # before each pass
    return float(np.mean(held >= sinks + window + native.block_tokens()))


def streaming_passes(session: Session, n: int) -> Iterator[tuple[int, int]]:
    """Cuts n tokens into passes that each read what token-by-token evaluation reads.

    Yields:
        (start, end) of the next pass; the caller evaluates it before it asks for another.
    """
    start = 0
    while start < n:
        end = min(start + session.until_seal, n)
        yield start, end
        start = end


def read(session: Session, ids: IntArray) -> None:
    """Appends tokens [n] in streaming order, without logits; n may be 0."""
    for start, end in streaming_passes(session, len(ids)):
        session.eval(ids[start:end], "none")


def read_logits(session: Session, ids: IntArray, out: FloatArray | None = None) -> FloatArray:
    """Appends tokens [n] in streaming order.

    Args:
        session: Where to append them.
        ids: The tokens, at least one.
        out: [n, n_vocab] float32 for the logits, if they shall not be in a new array.

    Returns:
        The logits [n, n_vocab] of the tokens that follow each.
    """
    if out is None:
        out = np.empty((len(ids), session.model.info.n_vocab), np.float32)
    for start, end in streaming_passes(session, len(ids)):
        session.eval(ids[start:end], "all", out=out[start:end])
    return out


class Lockstep:
    """Leads texts through several sessions, all of them one step before the next."""

    def __init__(
        self, sessions: Sequence[Session], *, stream: bool = True, compare: bool = True
    ) -> None:
        """Takes the sessions, for as long as it is used.

        Args:
            sessions: Of one model; the first is the reference.
            stream: Whether to read as if token by token; otherwise in passes of the reference's
                n_batch tokens, which see their own tokens in f16, as those of a prompt do.
            compare: Whether to compute divergences from the reference.
        """
        self._sessions = sessions
        self._stream = stream
        self._compare = compare
        n_rows = _ROWS if stream else sessions[0].stats.n_batch
        shape = (min(n_rows, sessions[0].n_ctx), sessions[0].model.info.n_vocab)
        self._reference = np.empty(shape, np.float32)
        self._logits = np.empty(shape, np.float32) if len(sessions) > 1 else self._reference

    def score(self, ids: IntArray, first: int, count: Count | None = None) -> list[Scores]:
        """Reads a text from an empty cache.

        Args:
            ids: The text [n], n >= 2; its last token is only predicted.
            first: The first position that is scored; scored are the predictions of the tokens
                first + 1 to n - 1.
            count: Told how many tokens each read has added, summed over sessions.

        Returns:
            The scores of the n - 1 - first positions, for each session.
        """
        inputs, targets = ids[:-1], ids[1:]
        first = min(first, len(inputs))
        results = [_empty_scores(len(inputs) - first) for _ in self._sessions]
        for session in self._sessions:
            session.reset()
        at = 0
        while at < len(inputs):
            end = min(at + self._step(at, first), len(inputs))
            start = max(at, first)  # of what is scored in this step
            reference: _Reference | None = None
            for session, scores in zip(self._sessions, results, strict=True):
                buffer = self._logits if reference is not None else self._reference
                rows = self._read(session, inputs[at:end], start - at, buffer)
                if start < end:
                    if reference is None and self._compare:
                        reference = _Reference(rows)
                    part = slice(start - first, end - first)
                    _score(scores, part, rows, targets[start:end], reference)
                if count is not None:
                    count(end - at)
            at = end
        return results

    def _step(self, at: int, first: int) -> int:
        """How many tokens to read next in all sessions."""
        reference = self._sessions[0]
        if not self._stream:
            return reference.stats.n_batch
        # Steps end where the reference seals, and so do those of all caches of its shape.
        return min(reference.until_seal, first - at if at < first else _ROWS)

    def _read(self, session: Session, piece: IntArray, skip: int, buffer: FloatArray) -> FloatArray:
        """Evaluates a step [n]; returns its logits [n - skip, n_vocab] from `skip` on."""
        n = len(piece)
        if skip >= n:
            if self._stream:
                read(session, piece)
            else:
                session.eval(piece, "none")
            return buffer[:0]
        if self._stream:  # a step is scored from its first position on, or not at all
            return read_logits(session, piece, buffer[:n])
        return session.eval(piece, "all", out=buffer[:n])[skip:]


def _empty_scores(n: int) -> Scores:
    return Scores(np.zeros(n), np.zeros(n), np.zeros(n, np.int32))


class _Reference:
    """What every comparison with the same logits [n, n_vocab] needs of them, computed once."""

    def __init__(self, logits: FloatArray) -> None:
        self.logits = logits
        self.largest = logits.max(axis=1)
        self.log_z = log_partition(logits)
        self.total = np.exp(self.log_z - self.largest)

    def rows(self, part: slice) -> tuple[FloatArray, FloatArray, FloatColumn, FloatColumn]:
        return self.logits[part], self.largest[part], self.log_z[part], self.total[part]


def _score(
    scores: Scores,
    part: slice,
    logits: FloatArray,
    targets: IntArray,
    reference: _Reference | None,
) -> None:
    """Writes the scores of positions [n] with logits [n, n_vocab] to their part of `scores`."""
    log_z = log_partition(logits)
    chosen = np.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    scores.nll[part] = log_z - chosen
    scores.top[part] = logits.argmax(axis=1)
    if reference is not None:
        scores.kld[part] = _divergence(reference, logits, log_z)


def log_partition(logits: FloatArray) -> FloatColumn:
    """log(sum(exp(logits))) of each row of [n, n_vocab]: float32 terms, summed in float64.

    Raises:
        LogitsError: The largest logit of a row is not a finite number.
    """
    n = len(logits)
    log_z = np.empty(n)
    terms = np.empty((min(n, _SCORED_ROWS), logits.shape[1]), np.float32)
    for at in range(0, n, _SCORED_ROWS):
        rows = logits[at : at + _SCORED_ROWS]
        work = terms[: len(rows)]
        largest = rows.max(axis=1)
        require_finite(float(largest.sum(dtype=np.float64)))
        np.subtract(rows, largest[:, None], out=work)
        np.exp(work, out=work)
        log_z[at : at + len(rows)] = largest + np.log(work.sum(axis=1, dtype=np.float64))
    return log_z


def divergence(p: FloatArray, q: FloatArray) -> FloatColumn:
    """KL(p || q) of the distributions with logits p and q, both [n, n_vocab], in nats: [n].

    sum(p * (log p - log q)) = sum(p * (logit p - logit q)) + log Z(q) - log Z(p): the differences
    are formed before anything is rounded to their size, and all sums are float64, so that the
    error stays below 1e-6 at a tenth of the time that float64 throughout takes. It is exactly 0
    for equal logits.
    """
    return _divergence(_Reference(p), q, log_partition(q))


def _divergence(reference: _Reference, q: FloatArray, log_z: FloatColumn) -> FloatColumn:
    n = len(q)
    kl = np.empty(n)
    shape = (min(n, _SCORED_ROWS), q.shape[1])
    terms, differences = np.empty(shape, np.float32), np.empty(shape, np.float32)
    for at in range(0, n, _SCORED_ROWS):
        part = slice(at, min(at + _SCORED_ROWS, n))
        p, largest, p_log_z, total = reference.rows(part)
        weights, apart = terms[: len(p)], differences[: len(p)]
        np.subtract(p, largest[:, None], out=weights)
        np.exp(weights, out=weights)
        np.subtract(p, q[part], out=apart)
        np.multiply(apart, weights, out=apart)
        mean = apart.sum(axis=1, dtype=np.float64) / total
        kl[part] = mean + log_z[part] - p_log_z
    return np.maximum(kl, 0.0)
