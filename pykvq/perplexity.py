"""Perplexity of a text under several KV schemes, and their divergence from the f16 cache.

The text is cut into chunks of `n_ctx` tokens, each evaluated from an empty cache, and the second
half of each chunk is scored, so that every scored token has at least n_ctx / 2 tokens of context.
Chunks, BOS and the scored half are llama.cpp's (tools/perplexity), so that numbers compare.

All schemes see the same passes in one process: the divergence from f16 is computed from the
logits themselves, without a file of rounded ones in between.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pykvq import native
from pykvq.eval.streaming import Lockstep, Scores, cut_chunks, few_chunks, sealed_share
from pykvq.kv_names import parse_kv

if TYPE_CHECKING:
    from pykvq.model import Model, Progress
    from pykvq.session import Session

#: The scheme that the others are compared with.
REFERENCE = "f16"

#: exp() of a float64 overflows above this.
_LARGEST_EXPONENT = 709.0


@dataclass(frozen=True)
class PerplexityResult:
    """What a KV scheme costs on a text.

    Attributes:
        kv: The scheme.
        ppl: Perplexity: exp of the mean negative log-probability of the text's tokens.
        mean_kld: Mean over the scored positions of the Kullback-Leibler divergence
            KL(f16 || kv) of the next token's distribution, in nats; None if it was not asked for.
        top1: Part of the positions, 0 to 1, at which the most likely token is that of f16; None as
            above.
        bits: Bits per element of the sealed cache with all its metadata, keys and values averaged.
        tokens: Number of scored positions.
        sealed: Part of them, 0 to 1, that have read sealed blocks: what others lose is none of the
            scheme's.
    """

    kv: str
    ppl: float
    mean_kld: float | None
    top1: float | None
    bits: float
    tokens: int
    sealed: float


def perplexity(
    model: Model,
    text: str | Sequence[int],
    kv: Sequence[str] = ("skvq",),
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    kld: bool = False,
    stream: bool = False,
    n_batch: int | None = None,
    n_threads: int | None = None,
    kv_window: int | None = None,
    kv_sinks: int | None = None,
    kv_bits: float | None = None,
    asymkv_layers: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> list[PerplexityResult]:
    """Scores a text under KV schemes.

    Without `stream` a chunk is read as a prompt is, in passes of `n_batch` tokens: the tokens of a
    pass see each other in f16, so that a lossy cache costs less than in use. With `stream` every
    score is the one that token-by-token decoding gives: passes end where a block is sealed
    (`Session.until_seal`), which is the same, only faster: on the CPU bit for bit, on a GPU but for
    rounding.

    Args:
        model: The model.
        text: A text, or its tokens.
        kv: Names of KV schemes; "auto:1.5" is auto with 1.5 bits.
        n_ctx: Tokens per chunk.
        chunks: At most so many chunks; by default all that the text has.
        kld: Whether to compare each scheme with f16.
        stream: Whether to read token by token, in effect.
        n_batch: Tokens per pass; by default 512.
        n_threads: Threads; by default as the model was opened with.
        kv_window: Last tokens kept in f16 by lossy schemes; by default as each scheme says.
        kv_sinks: First tokens kept in f16 by lossy schemes; by default as each scheme says.
        kv_bits: Bits of schemes that have a budget of them and none in their name; by default as
            each scheme says.
        asymkv_layers: (l_k, l_v) of asymkv; see `Model`.
        progress: Told how far it is: ("perplexity", n_done, n) in tokens, summed over schemes.

    Returns:
        One result per name, in their order.

    Raises:
        ValueError: The text is too short, an argument is out of range, or the chunks are too short
            for any scheme to read a sealed block.
        SchemeError: A scheme is not known, or is given bits that it does not take.
        UnsupportedError: A scheme has no form for this model.
    """
    if n_ctx < 4:
        raise ValueError(f"The chunks have {n_ctx} tokens, expected at least 4.")
    if chunks is not None and chunks < 1:
        raise ValueError(f"{chunks} chunks were asked for, expected at least 1.")
    names = list(dict.fromkeys([REFERENCE, *kv] if kld else kv))
    schemes = {name: parse_kv(name) for name in names}
    if kv_bits is not None and not any(takes_bits(*schemes[name]) for name in names):
        raise ValueError(
            f"kv_bits is {kv_bits:g}, but no scheme takes it: {', '.join(names)} have fixed bits"
            " or theirs in their name."
        )
    tokens = model.tokenizer.encode(text) if isinstance(text, str) else text
    pieces = cut_chunks(model, tokens, n_ctx)
    if chunks is not None and chunks > len(pieces):
        warnings.warn(few_chunks(len(pieces), n_ctx, chunks), stacklevel=2)
    pieces = pieces[:chunks]
    with ExitStack() as stack:
        sessions: list[Session] = []
        for name in names:
            scheme, bits = schemes[name]
            plain = name == REFERENCE
            session = model.session(
                kv=scheme.name,
                n_ctx=n_ctx,
                n_batch=n_batch,
                n_threads=n_threads,
                kv_window=None if plain else kv_window,
                kv_sinks=None if plain else kv_sinks,
                kv_bits=kv_bits if takes_bits(scheme, bits) else bits,
                asymkv_layers=asymkv_layers if scheme.has_layers else None,
            )
            sessions.append(stack.enter_context(session))
        sealed = [_sealed_share(session, stream) for session in sessions]
        _require_sealing(dict(zip(names, sealed, strict=True)), sessions, stream)
        lockstep = Lockstep(sessions, stream=stream, compare=kld)
        count = _counter(progress, (n_ctx - 1) * len(pieces) * len(sessions))
        scored = [lockstep.score(ids, n_ctx // 2, count) for ids in pieces]
        stored = [session.stats.bits_sealed for session in sessions]
    columns = list(zip(*scored, strict=True))  # per name, of all chunks
    results = {
        name: _result(name, column, columns[0], bits, share, kld)
        for name, column, bits, share in zip(names, columns, stored, sealed, strict=True)
    }
    return [results[name] for name in kv]


def takes_bits(scheme: native.Scheme, bits: float | None) -> bool:
    """Whether a scheme with these bits in its name takes those that are given for all."""
    return scheme.has_budget and bits is None


def _sealed_share(session: Session, stream: bool) -> float:
    """Which part, 0 to 1, of what is scored has read sealed blocks."""
    s = session.stats
    n_batch = None if stream else s.n_batch
    return sealed_share(s.n_ctx, s.n_ctx // 2, s.sinks, s.window, n_batch)


def _require_sealing(shares: dict[str, float], sessions: Sequence[Session], stream: bool) -> None:
    """Requires that sealed blocks can be read; warns where few or none are.

    Raises:
        ValueError: Even token by token, no lossy scheme would.
    """
    lossy = [
        (name, session) for name, session in zip(shares, sessions, strict=True) if name != REFERENCE
    ]
    if lossy and not any(_sealed_share(session, stream=True) for _, session in lossy):
        least = min(session.stats.sinks + session.stats.window for _, session in lossy)
        raise ValueError(
            f"Chunks of {sessions[0].n_ctx} tokens are too short: no token would be read from"
            f" sealed blocks under {', '.join(name for name, _ in lossy)}, so that there is nothing"
            f" to measure. They need more than {least + native.block_tokens() + 1} tokens (-c), or"
            " fewer tokens in f16 (--kv-sinks, --kv-window)."
        )
    unread = [name for name, _ in lossy if not shares[name]]
    if lossy and not stream:
        listed = ", ".join(f"{100 * shares[name]:.0f} % under {name}" for name, _ in lossy)
        warnings.warn(
            f"Passes of {sessions[0].stats.n_batch} tokens see their own tokens in f16, and only so"
            f" many of the scored positions read sealed blocks at all: {listed}; streaming"
            " (--stream) measures the sealed cache.",
            stacklevel=3,
        )
    elif unread:
        warnings.warn(
            f"No scored position reads a sealed block under {', '.join(unread)}: the results there"
            " say nothing.",
            stacklevel=3,
        )


def _result(
    name: str,
    scores: Sequence[Scores],
    reference: Sequence[Scores],
    bits: float,
    sealed: float,
    kld: bool,
) -> PerplexityResult:
    """Sums up what a scheme made of the chunks, beside what the reference made of them."""
    nll = np.concatenate([s.nll for s in scores])
    agree = [s.top == r.top for s, r in zip(scores, reference, strict=True)]
    return PerplexityResult(
        kv=name,
        ppl=perplexity_of(nll.mean()),
        mean_kld=float(np.concatenate([s.kld for s in scores]).mean()) if kld else None,
        top1=float(np.concatenate(agree).mean()) if kld else None,
        bits=bits,
        tokens=len(nll),
        sealed=sealed,
    )


def perplexity_of(mean_nll: float) -> float:
    """The perplexity that a mean negative log-probability gives, as far as a float holds it."""
    return math.exp(min(mean_nll, _LARGEST_EXPONENT))


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that counts tokens and tells `progress`."""
    done = 0

    def report(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress("perplexity", done, total)

    return report
