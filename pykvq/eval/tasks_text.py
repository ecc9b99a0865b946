"""The tasks `kl` and `chunked`: how far a cache takes the next token's distribution from f16's.

A text is cut into chunks, each read from an empty cache, and the second half of each is scored, as
in llama.cpp's tools/perplexity. `kl` reads as token-by-token decoding does, so that every scored
token meets the sealed cache; `chunked` reads in passes of a prompt, whose tokens see each other
in f16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pykvq.eval.record import pack, unpack
from pykvq.eval.streaming import Lockstep, cut_chunks, sealed_share
from pykvq.eval.tasks import Count, Task
from pykvq.perplexity import perplexity_of

if TYPE_CHECKING:
    from pykvq.eval.lanes import Lane, SessionPool
    from pykvq.eval.record import Json
    from pykvq.eval.streaming import FloatColumn, Scores
    from pykvq.model import Model
    from pykvq.session import IntArray


class KlTask(Task):
    """Perplexity and divergence from f16, in streaming order."""

    name: ClassVar[str] = "kl"
    lockstep: ClassVar[bool] = True
    remedy: ClassVar[str] = "more context (-c)"

    def __init__(self, model: Model, ids: IntArray, *, n_ctx: int, chunks: int) -> None:
        """Cuts the text.

        Args:
            model: The model.
            ids: The text's tokens.
            n_ctx: Tokens per chunk, at least 4.
            chunks: How many chunks at most.

        Raises:
            ValueError: The text does not fill one chunk, or the chunks are too short.
        """
        if n_ctx < 4:
            raise ValueError(f"The chunks have {n_ctx} tokens, expected at least 4.")
        self._n_ctx = n_ctx
        self._chunks = cut_chunks(model, ids, n_ctx)[:chunks]

    @property
    def n_ctx(self) -> int:
        """See `Task.n_ctx`."""
        return self._n_ctx

    def settings(self) -> Json:
        """See `Task.settings`."""
        return {"n_ctx": self._n_ctx, "chunks": len(self._chunks)}

    def units(self) -> list[str]:
        """See `Task.units`."""
        return [str(i) for i in range(len(self._chunks))]

    def tokens(self, unit: str) -> int:
        """See `Task.tokens`."""
        return self._n_ctx - 1

    def sealed_share(self, sinks: int, window: int) -> float:
        """See `Task.sealed_share`."""
        return sealed_share(self._n_ctx, self._n_ctx // 2, sinks, window, self.n_batch)

    def measure(
        self, unit: str, lanes: Sequence[Lane], pool: SessionPool, count: Count
    ) -> dict[str, Json]:
        """See `Task.measure`."""
        sessions = [pool.session(lane) for lane in lanes]
        lockstep = Lockstep(sessions, stream=self.n_batch is None)
        scores = lockstep.score(self._chunks[int(unit)], self._n_ctx // 2, count)
        return {
            lane.name: _part(found, scores[0]) for lane, found in zip(lanes, scores, strict=True)
        }

    def summarize(self, parts: Mapping[str, Json]) -> Json:
        """See `Task.summarize`."""
        tokens = sum(part["tokens"] for part in parts.values())
        squares = sum(part["dp_squares"] for part in parts.values())
        return {
            "tokens": tokens,
            "ppl": perplexity_of(sum(part["nll"] for part in parts.values()) / tokens),
            **divergence_statistics([unpack(part["kld"]) for part in parts.values()]),
            "top1": sum(part["n_agree"] for part in parts.values()) / tokens,
            "rms_dp": math.sqrt(squares / tokens),
        }


class ChunkedTask(KlTask):
    """The same with chunks read in passes of `n_batch` tokens, as prompts are."""

    name: ClassVar[str] = "chunked"
    remedy: ClassVar[str] = "more context (-c) or shorter passes (-b)"

    def __init__(
        self, model: Model, ids: IntArray, *, n_ctx: int, chunks: int, n_batch: int
    ) -> None:
        """See `KlTask`; `n_batch` is the number of tokens per pass."""
        super().__init__(model, ids, n_ctx=n_ctx, chunks=chunks)
        self.n_batch = min(n_batch, n_ctx)

    def settings(self) -> Json:
        """See `Task.settings`."""
        return {**super().settings(), "n_batch": self.n_batch}


def _part(scores: Scores, reference: Scores) -> Json:
    """What is kept of a chunk."""
    change = np.exp(-scores.nll) - np.exp(-reference.nll)
    return {
        "tokens": len(scores.nll),
        "nll": float(scores.nll.sum()),
        "dp_squares": float((change**2).sum()),
        "n_agree": int((scores.top == reference.top).sum()),
        "kld": pack(scores.kld),
    }


def divergence_statistics(chunks: Sequence[FloatColumn]) -> Json:
    """Sums up divergences [n] of chunks, in nats.

    Returns:
        The mean, its standard error (from the spread of the chunks' means, since positions of one
        chunk are not independent; None for a single chunk), the median, and the 99th and
        99.9th percentiles, interpolated linearly.
    """
    means = [chunk.mean() for chunk in chunks]
    kld = np.concatenate(chunks)
    median, p99, p999 = np.percentile(kld, [50, 99, 99.9])
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else None
    return {
        "mean_kld": float(kld.mean()),
        "se_kld": error,
        "median_kld": float(median),
        "p99_kld": float(p99),
        "p999_kld": float(p999),
    }
