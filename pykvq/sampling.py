"""From the logits of one step to the id of the next token.

Owns the sampler chain (`Sampler`) and the log-probabilities of raw logits (`logprob`,
`top_logprobs`). Knows no model and no tokenizer: the one thing it may need of a vocabulary, the
bytes of a token, is passed in as a callable.

The chain, its order, its names and its default values are llama.cpp's (tools/completion/README.md,
src/llama-sampler.cpp), so that a command line written for it gives the same distribution here.
A sampler is a row of `SAMPLERS`; each one narrows or edits a list of candidates:

    logits -> logit_bias -> penalties -> dry -> top_n_sigma -> top_k -> typ_p -> top_p -> min_p
           -> xtc -> temperature -> softmax -> draw

Once `top_k` has run, some 40 candidates are left and everything after it is nearly free; what runs
on the whole vocabulary is therefore written to pass over it once and never to sort it.
"""

from __future__ import annotations

import copy
import math
import operator
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pykvq.errors import LogitsError
from pykvq.sampling_params import SamplingParams
from pykvq.stop_strings import StopStrings

__all__ = [
    "SAMPLERS",
    "Sampler",
    "SamplingParams",
    "StopStrings",
    "logprob",
    "top_logprobs",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

#: Maxima of so many neighbours bound the k-th largest logit from below (`_largest`).
_BLOCK = 64
#: The first guess of `top_p` at how many of the largest candidates hold the wanted mass.
_FIRST_GUESS = 256
#: exp() of a float32 overflows above this; llama.cpp limits the exponent of DRY so.
_FLOAT32_MAX_LOG = 88.7228391


# ---------------------------------------------------------------------------------------------
# Candidates
# ---------------------------------------------------------------------------------------------


class _Candidates:
    """The tokens that may still be chosen.

    Attributes:
        logits: [n] float64.
        ids: [n] the token of each logit, or None while candidate i is token i.
        descending: Whether `logits` is known to fall (or stay) from each entry to the next.
    """

    __slots__ = ("descending", "ids", "logits")

    def __init__(self, logits: FloatArray) -> None:
        self.logits = logits
        self.ids: IntArray | None = None
        self.descending = False

    def __len__(self) -> int:
        return self.logits.size

    def keep(self, index: IntArray | slice) -> None:
        """Leave only the candidates at `index`, in that order."""
        if self.ids is not None:
            self.ids = self.ids[index]
        elif isinstance(index, slice):
            self.ids = np.arange(self.logits.size)[index]
        else:
            self.ids = index
        self.logits = self.logits[index]

    def keep_largest(self, n: int) -> None:
        """Leave the n most likely (all, if there are fewer), the most likely first."""
        if not self.descending:
            self.keep(_largest(self.logits, n))
            self.descending = True
        elif n < len(self):
            self.keep(slice(0, n))

    def locate(self, tokens: IntArray) -> tuple[IntArray, IntArray]:
        """Find tokens: (positions in this list, the matching positions in `tokens`).

        Args:
            tokens: [m] different ids, ascending.
        """
        if self.ids is None:
            return tokens, np.arange(tokens.size)
        nearest = np.minimum(np.searchsorted(tokens, self.ids), tokens.size - 1)
        here = np.flatnonzero(tokens[nearest] == self.ids)
        return here, nearest[here]

    def probabilities(self) -> FloatArray:
        """[n] softmax of the logits."""
        weights = np.exp(self.logits - self.logits.max())
        return np.asarray(weights / weights.sum())


def _largest(logits: FloatArray, k: int) -> IntArray:
    """Positions of the k largest logits, descending; of equal logits the first comes first.

    At least k logits reach the k-th largest of the block maxima, and they lie in few blocks: one
    pass for the maxima and one for the comparison leave little to sort.
    """
    n = logits.size
    n_blocks = n // _BLOCK
    if k < n_blocks:
        maxima = logits[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).max(axis=1)
        bound = np.partition(maxima, n_blocks - k)[n_blocks - k]
        pool = np.flatnonzero(logits >= bound)
    else:
        pool = np.arange(n)
    order = np.argsort(-logits[pool], kind="stable")[:k]
    return np.asarray(pool[order])


# ---------------------------------------------------------------------------------------------
# History
# ---------------------------------------------------------------------------------------------


class _History:
    """The accepted tokens, and how many of them follow the last sequence breaker of DRY.

    llama.cpp turns each breaker into sequences of token ids by a search through the vocabulary.
    Here the breakers are looked for in the bytes of the text itself as it grows, which needs no
    such table and finds a breaker however it was cut into tokens. A token that holds the end of
    a breaker counts as breaker, as in llama.cpp.
    """

    def __init__(
        self, breakers: Sequence[bytes], token_text: Callable[[int], bytes] | None
    ) -> None:
        self._breakers = breakers
        self._token_text = token_text
        self._tail_bytes = max((len(breaker) for breaker in breakers), default=1) - 1
        self.clear()

    def clear(self) -> None:
        self._buffer = np.empty(256, np.int64)
        self._size = 0
        self._tail = b""
        self.n_since_breaker = 0

    def extend(self, tokens: Sequence[int]) -> None:
        new_size = self._size + len(tokens)
        if new_size > self._buffer.size:
            grown = np.empty(max(new_size, 2 * self._buffer.size), np.int64)
            grown[: self._size] = self._buffer[: self._size]
            self._buffer = grown
        self._buffer[self._size : new_size] = tokens
        self._size = new_size
        self.n_since_breaker += len(tokens)
        if self._breakers and self._token_text is not None:
            for n_after, token in zip(range(len(tokens) - 1, -1, -1), tokens, strict=True):
                if self._ends_breaker(self._token_text(token)):
                    self.n_since_breaker = n_after

    def _ends_breaker(self, piece: bytes) -> bool:
        text = self._tail + piece
        n_old = len(self._tail)
        self._tail = text[len(text) - self._tail_bytes :] if self._tail_bytes else b""
        return any(text.rfind(b) + len(b) > n_old for b in self._breakers if b in text)

    def contains_breaker(self, token: int) -> bool:
        """Whether a breaker lies within the text of this one token."""
        if not self._breakers or self._token_text is None:
            return False
        piece = self._token_text(token)
        return any(breaker in piece for breaker in self._breakers)

    def last(self, n: int) -> IntArray:
        """The last n tokens (-1: all), oldest first."""
        start = 0 if n < 0 else max(0, self._size - n)
        return self._buffer[start : self._size]


# ---------------------------------------------------------------------------------------------
# The samplers
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """What a sampler may look at beside the candidates."""

    params: SamplingParams
    history: _History
    rng: np.random.Generator


def _penalties(c: _Candidates, step: _Step) -> None:
    p = step.params
    window = step.history.last(p.repeat_last_n)
    if window.size == 0:
        return
    tokens, counts = np.unique(window, return_counts=True)
    here, which = c.locate(tokens)
    logits = c.logits[here]
    logits = np.where(logits > 0.0, logits / p.repeat_penalty, logits * p.repeat_penalty)
    c.logits[here] = logits - (counts[which] * p.frequency_penalty + p.presence_penalty)
    c.descending = False


def _penalties_on(p: SamplingParams) -> bool:
    neutral = (p.repeat_penalty, p.presence_penalty, p.frequency_penalty) == (1.0, 0.0, 0.0)
    return p.repeat_last_n != 0 and not neutral


def _suffix_matches(tokens: IntArray, limit: int) -> IntArray:
    """How far the text before each position repeats the end of the text.

    Args:
        tokens: [n] with n >= 1.
        limit: Lengths are not followed beyond this.

    Returns:
        [n - 1] for each j < n - 1 the largest m <= limit with
        tokens[j - m + 1 .. j] == tokens[n - m .. n - 1].
    """
    n = tokens.size
    lengths = np.zeros(n - 1, np.int64)
    alive = np.flatnonzero(tokens[:-1] == tokens[-1])
    for length in range(1, limit + 1):
        if alive.size == 0:
            break
        lengths[alive] = length
        alive = alive[alive >= length]
        alive = alive[tokens[alive - length] == tokens[n - 1 - length]]
    return lengths


def _dry(c: _Candidates, step: _Step) -> None:
    p = step.params
    tokens = step.history.last(p.dry_penalty_last_n)
    limit = min(tokens.size, step.history.n_since_breaker)
    if tokens.size < 2 or limit < p.dry_allowed_length:
        return
    if p.dry_base > 1.000001:
        # The exponent is limited as in llama.cpp; longer matches need not be followed.
        limit = min(limit, p.dry_allowed_length + int(_FLOAT32_MAX_LOG / math.log(p.dry_base)))
    lengths = _suffix_matches(tokens, limit)
    ends = np.flatnonzero(lengths >= p.dry_allowed_length)
    if ends.size == 0:
        return
    nexts, which_next = np.unique(tokens[ends + 1], return_inverse=True)
    longest = np.zeros(nexts.size, np.int64)
    np.maximum.at(longest, which_next, lengths[ends])
    here, which = c.locate(nexts)
    penalty = p.dry_multiplier * np.power(p.dry_base, longest - p.dry_allowed_length)
    # A token that is a breaker by itself ends a repetition, so it is not penalized.
    penalty[[step.history.contains_breaker(int(token)) for token in nexts]] = 0.0
    c.logits[here] -= penalty[which]
    c.descending = False


def _dry_on(p: SamplingParams) -> bool:
    return p.dry_multiplier > 0.0 and p.dry_penalty_last_n != 0


def _top_n_sigma(c: _Candidates, step: _Step) -> None:
    finite = c.logits[c.logits > -math.inf]
    bound = finite.max() - step.params.top_n_sigma * finite.std()
    c.keep(np.flatnonzero(c.logits >= bound))


def _top_k(c: _Candidates, step: _Step) -> None:
    c.keep_largest(step.params.top_k)


def _typ_p(c: _Candidates, step: _Step) -> None:
    p = step.params
    probs = c.probabilities()
    with np.errstate(divide="ignore"):
        surprise = -np.log(probs)
    entropy = float((probs * np.where(probs > 0.0, surprise, 0.0)).sum())
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    # The token that takes the mass beyond typical_p is the last one kept.
    n = int(np.searchsorted(np.cumsum(probs[order]), p.typical_p, side="right")) + 1
    c.keep(np.sort(order[: max(n, p.min_keep)]))


def _top_p(c: _Candidates, step: _Step) -> None:
    p = step.params
    total = float(np.exp(c.logits - c.logits.max()).sum())
    guess = len(c) if c.descending else max(_FIRST_GUESS, p.min_keep)
    while True:
        index = np.arange(guess) if c.descending else _largest(c.logits, guess)
        logits = c.logits[index]
        mass = np.cumsum(np.exp(logits - logits[0])) / total
        if mass[-1] >= p.top_p or guess >= len(c):
            break
        guess *= 8
    n = int(np.searchsorted(mass, p.top_p, side="left")) + 1
    c.keep(index[: max(n, p.min_keep)])
    c.descending = True


def _min_p(c: _Candidates, step: _Step) -> None:
    p = step.params
    kept = np.flatnonzero(c.logits >= c.logits.max() + math.log(p.min_p))
    if kept.size >= p.min_keep:
        c.keep(kept)
    else:
        c.keep_largest(p.min_keep)


def _xtc(c: _Candidates, step: _Step) -> None:
    p = step.params
    if step.rng.random() >= p.xtc_probability:
        return
    n_likely = int(np.count_nonzero(c.probabilities() >= p.xtc_threshold))
    if n_likely >= 2 and len(c) - (n_likely - 1) >= p.min_keep:
        c.keep_largest(len(c))
        c.keep(slice(n_likely - 1, None))


def _temperature(c: _Candidates, step: _Step) -> None:
    # Relative to the largest, so that a tiny temperature gives -inf and not inf - inf.
    with np.errstate(over="ignore"):
        c.logits = (c.logits - c.logits.max()) / step.params.temp


@dataclass(frozen=True)
class SamplerRow:
    """A sampler of the chain.

    Attributes:
        is_on: Whether the parameters ask for it; a sampler that is off is left out of the chain.
        apply: Edits or narrows the candidates.
        edits_logits: It changes which logit is the largest, so that greedy choice needs it.
    """

    is_on: Callable[[SamplingParams], bool]
    apply: Callable[[_Candidates, _Step], None]
    edits_logits: bool = False


#: The known samplers by llama.cpp's names, in its default order.
SAMPLERS: Mapping[str, SamplerRow] = {
    "penalties": SamplerRow(_penalties_on, _penalties, edits_logits=True),
    "dry": SamplerRow(_dry_on, _dry, edits_logits=True),
    "top_n_sigma": SamplerRow(lambda p: p.top_n_sigma > 0.0, _top_n_sigma),
    "top_k": SamplerRow(lambda p: p.top_k > 0, _top_k),
    "typ_p": SamplerRow(lambda p: p.typical_p < 1.0, _typ_p),
    "top_p": SamplerRow(lambda p: p.top_p < 1.0, _top_p),
    "min_p": SamplerRow(lambda p: p.min_p > 0.0, _min_p),
    "xtc": SamplerRow(lambda p: p.xtc_probability > 0.0 and p.xtc_threshold <= 0.5, _xtc),
    "temperature": SamplerRow(lambda p: p.temp != 1.0, _temperature),
}


# ---------------------------------------------------------------------------------------------
# Sampler
# ---------------------------------------------------------------------------------------------


class Sampler:
    """Chooses the next token, step by step, of one sequence.

    Tell it the prompt by `extend` and each further token, chosen here or not, by `accept`: the
    penalties and DRY look back at them. The same seed, history and logits give the same ids.
    """

    def __init__(
        self,
        params: SamplingParams,
        n_vocab: int,
        eog_ids: Iterable[int] = (),
        token_text: Callable[[int], bytes] | None = None,
    ) -> None:
        """Make a sampler with an empty history.

        Args:
            params: What to do.
            n_vocab: Number of logits, and bound of the token ids.
            eog_ids: Ids that end a generation; `ignore_eos` bans them.
            token_text: The bytes of a token; DRY needs it to find sequence breakers.

        Raises:
            ValueError: If an id is not in the vocabulary, if `ignore_eos` has nothing to ban, or
                if DRY has breakers and no `token_text`.
        """
        if n_vocab < 1:
            raise ValueError(f"The vocabulary has {n_vocab} tokens, but at least 1 is needed.")
        self.params = params
        self.n_vocab = n_vocab
        self.seed = params.seed if params.seed >= 0 else secrets.randbits(32)

        chain = [SAMPLERS[name] for name in params.samplers if SAMPLERS[name].is_on(params)]
        self._chain = [row for row in chain if row.edits_logits or not params.greedy]

        bias = dict(params.logit_bias)
        if params.ignore_eos:
            banned = [self._checked(token, "eog_ids") for token in eog_ids]
            if not banned:
                raise ValueError("ignore_eos is set, but eog_ids names no token to ban.")
            bias.update(dict.fromkeys(banned, -math.inf))
        self._bias_ids = np.array([self._checked(t, "logit_bias") for t in bias], np.int64)
        self._bias = np.array(list(bias.values()), np.float64)

        dry = SAMPLERS["dry"] in self._chain
        breakers = params.dry_sequence_breakers if dry else ()
        if breakers and token_text is None:
            raise ValueError(
                "DRY has sequence breakers, but the sampler was given no token_text to find them"
                " with; pass token_text, or set dry_sequence_breakers to ()."
            )
        self._history = _History([b.encode() for b in breakers], token_text)
        self.reset()

    def reset(self) -> None:
        """Forget the accepted tokens and start the random numbers again from `seed`."""
        self._history.clear()
        self._rng = np.random.Generator(np.random.PCG64(self.seed))

    def accept(self, token: int) -> None:
        """Add one token to the history.

        Raises:
            ValueError: If the id is not in the vocabulary.
        """
        self._history.extend([self._checked(token, "accept")])

    def extend(self, tokens: Iterable[int]) -> None:
        """Add many tokens, such as a prompt, to the history.

        Raises:
            ValueError: If an id is not in the vocabulary; then none of them is added.
        """
        self._history.extend([self._checked(token, "extend") for token in tokens])

    def sample(self, logits: npt.ArrayLike) -> int:
        """Choose a token; it is not yet accepted.

        Args:
            logits: [n_vocab] as the model gives them; not changed.

        Raises:
            ValueError: If the shape is another, a logit is NaN or +inf, or every token is banned.
        """
        c = self._run(logits, self._rng)
        if c.ids is None:
            c.ids = np.arange(len(c))
        if len(c) == 1:
            return int(c.ids[0])
        mass = np.cumsum(c.probabilities())
        # side="right" steps over candidates of probability 0, also for a draw of exactly 0.
        drawn = np.searchsorted(mass, self._rng.random() * mass[-1], side="right")
        return int(c.ids[min(int(drawn), len(c) - 1)])

    def distribution(self, logits: npt.ArrayLike) -> tuple[IntArray, FloatArray]:
        """The distribution that the next `sample` of these logits draws from.

        No random number is used up. Where XTC is on, the answer holds for the coming draw.

        Args:
            logits: [n_vocab].

        Returns:
            (ids [n], probabilities [n]), the most likely first, without tokens of probability 0.

        Raises:
            ValueError: As `sample` does.
        """
        c = self._run(logits, copy.deepcopy(self._rng))
        c.keep_largest(len(c))
        if c.ids is None:
            c.ids = np.arange(len(c))
        probs = c.probabilities()
        possible = probs > 0.0
        return c.ids[possible], probs[possible]

    def _run(self, logits: npt.ArrayLike, rng: np.random.Generator) -> _Candidates:
        raw = _checked_logits(logits)
        if raw.size != self.n_vocab:
            raise ValueError(f"There are {raw.size} logits, but the vocabulary has {self.n_vocab}.")
        c = _Candidates(raw.astype(np.float64))
        if self._bias_ids.size:
            c.logits[self._bias_ids] += self._bias
        step = _Step(self.params, self._history, rng)
        if self._bias_ids.size and c.logits.max() == -math.inf:
            raise ValueError("The logit_bias bans every token, so that none can be chosen.")
        for row in self._chain:
            row.apply(c, step)
        if self.params.greedy:
            c.keep(np.array([c.logits.argmax()]))
        return c

    def _checked(self, token: int, where: str) -> int:
        token = operator.index(token)
        if not 0 <= token < self.n_vocab:
            raise ValueError(
                f"The token id {token} in {where} is not in the vocabulary of {self.n_vocab}."
            )
        return token


# ---------------------------------------------------------------------------------------------
# Log-probabilities
# ---------------------------------------------------------------------------------------------


def _checked_logits(logits: npt.ArrayLike) -> npt.NDArray[Any]:
    raw = np.asarray(logits)
    if raw.ndim != 1 or raw.size == 0:
        raise ValueError(f"The logits have shape {raw.shape}, but one row [n_vocab] is expected.")
    require_finite(float(raw.max()))  # NaN, if any is NaN
    return raw


def require_finite(largest: float) -> None:
    """Requires that the largest logit of a row is a number, as those of sound weights are.

    Raises:
        LogitsError: It is not.
    """
    if not math.isfinite(largest):
        raise LogitsError(
            f"The largest logit is {largest}, but a finite number is expected; the model's"
            " weights or its cache are damaged."
        )


def _log_normalizer(logits: FloatArray) -> float:
    largest = float(logits.max())
    return largest + math.log(float(np.exp(logits - largest).sum()))


def logprob(logits: npt.ArrayLike, token: int) -> float:
    """Natural logarithm of the probability of a token, before any sampler.

    Args:
        logits: [n_vocab] as the model gives them.
        token: Its id.

    Raises:
        ValueError: If the logits are no row of numbers or the id is not among them.
    """
    x = _checked_logits(logits).astype(np.float64)
    if not 0 <= token < x.size:
        raise ValueError(f"The token id {token} is not in the vocabulary of {x.size}.")
    return float(x[token]) - _log_normalizer(x)


def top_logprobs(logits: npt.ArrayLike, k: int) -> list[tuple[int, float]]:
    """The k most likely tokens before any sampler, the most likely first.

    Args:
        logits: [n_vocab] as the model gives them.
        k: How many; all of them if there are fewer.

    Returns:
        Pairs of id and natural logarithm of the probability.

    Raises:
        ValueError: If the logits are no row of numbers or k is negative.
    """
    if k < 0:
        raise ValueError(f"{k} log-probabilities were asked for, but at least 0 is expected.")
    x = _checked_logits(logits).astype(np.float64)
    ids = _largest(x, k) if k else np.empty(0, np.int64)
    normalizer = _log_normalizer(x)
    return [(int(i), float(x[i]) - normalizer) for i in ids]
