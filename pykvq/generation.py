"""Writing a text: prompt, then choose a token, then evaluate it, and so on.

Joins a session, a sampler, a decoder and stop strings. `Session.generate` is the way in.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np

from pykvq.checks import whole_number
from pykvq.closing import Closing
from pykvq.errors import Cancelled, ContextError
from pykvq.sampling import Sampler, StopStrings, logprob, top_logprobs
from pykvq.sampling_params import SamplingParams
from pykvq.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pykvq.model import Progress
    from pykvq.session import IntArray, Session

FinishReason = Literal["stop", "length", "cancelled"]


class SamplingOptions(TypedDict, total=False):
    """The sampling parameters that `Session.generate` takes; see `SamplingParams`."""

    seed: int
    temperature: float
    temp: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    top_n_sigma: float
    xtc_probability: float
    xtc_threshold: float
    repeat_last_n: int
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: Sequence[str]
    logit_bias: Mapping[int, float]
    ignore_eos: bool
    min_keep: int
    samplers: Sequence[str]


def merge_sampling(base: SamplingParams, options: SamplingOptions) -> SamplingParams:
    """Overrides single sampling parameters.

    Raises:
        ValueError: A value is out of range.
        TypeError: There is no such parameter, or one is given twice.
    """
    if not options:
        return base
    for name in options:
        if name not in SamplingOptions.__annotations__:
            known = ", ".join(SamplingOptions.__annotations__)
            raise TypeError(f"There is no sampling parameter {name!r}; known are: {known}.")
    fields = dict(options)
    if "temperature" in fields:
        if "temp" in fields:
            raise TypeError("temp and temperature are the same parameter and were both given.")
        fields["temp"] = fields.pop("temperature")
    return replace(base, **fields)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, before any sampler.

    Attributes:
        token: Its id.
        logprob: Natural logarithm of its probability.
        top: The most likely tokens in its place as (id, log-probability), the most likely first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Chunk:
    """A piece of a text that is being written: `print(chunk.text, end="")` shows it.

    `str(chunk)` is its text too, so that pieces can be printed and formatted as they are.

    Attributes:
        text: What can be shown now, a str. It may be empty: of a character that is spread over
            tokens, and of what may become a stop string, nothing is shown until it is complete.
        token: The token that was chosen; None for what is left at the end.
        logprob: How likely it was, if that was asked for.
    """

    text: str
    token: int | None
    logprob: TokenLogprob | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class GenerationStats:
    """What a generation did.

    Attributes:
        n_prompt: Tokens of the prompt.
        n_reused: Of these, those that the session already held.
        n_evaluated: Of these, those that were evaluated: the others, unless they were cancelled.
        n_generated: Tokens that were chosen.
        n_decoded: Of these, those that were evaluated, to choose the next one.
        seconds_prompt: Time until the logits of the prompt were there.
        seconds_decode: Time after that, without what the consumer of a stream took.
    """

    n_prompt: int
    n_reused: int
    n_evaluated: int
    n_generated: int
    n_decoded: int
    seconds_prompt: float
    seconds_decode: float

    @property
    def prompt_per_second(self) -> float:
        """Tokens of the prompt evaluated per second."""
        return self.n_evaluated / max(self.seconds_prompt, 1e-9)

    @property
    def decode_per_second(self) -> float:
        """Tokens generated per second; 0 where only one was."""
        return self.n_decoded / max(self.seconds_decode, 1e-9)


@dataclass(frozen=True)
class Generation:
    """A text that was generated.

    Attributes:
        text: The text, without the prompt and without a stop string.
        tokens: The tokens that were chosen, without the one that ended the text.
        finish_reason: "stop" (the model ended the text, or a stop string was met), "length"
            (max_tokens, or the context is full) or "cancelled".
        logprobs: How likely each token was, if that was asked for.
        seed: The seed that gives this text again.
        stats: Counts and times.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None
    seed: int
    stats: GenerationStats


class Stream(Iterator[Chunk], Closing):
    """A text while it is being written.

    The prompt is evaluated when the first chunk is asked for. `close` ends it early, as does
    leaving a `with` block. Between two chunks the session may be asked and truncated by others, but
    then the stream cannot go on.
    """

    def __init__(
        self,
        session: Session,
        ids: IntArray,
        params: SamplingParams,
        *,
        max_tokens: int | None,
        stop: str | Iterable[str],
        n_logprobs: int | None,
        reuse: bool,
        progress: Progress | None,
    ) -> None:
        """Prepares a generation; see `Session.generate`."""
        if max_tokens is not None:
            max_tokens = whole_number("max_tokens", max_tokens, 0)
        if n_logprobs is not None:
            n_logprobs = whole_number("logprobs", n_logprobs, 0)
        if len(ids) > session.n_ctx:
            raise ContextError(
                f"The prompt has {len(ids)} tokens, but the context of the session holds"
                f" {session.n_ctx}; open one with a larger n_ctx."
            )
        tokenizer = session.model.tokenizer
        self._session = session
        self._ids = ids
        # The last token needs no place in the cache, since none is chosen after it.
        room = session.n_ctx - len(ids) + 1
        self._limit = room if max_tokens is None else min(room, max_tokens)
        self._n_logprobs = n_logprobs
        self._reuse = reuse
        self._progress = progress
        self._n_cancels = session._n_cancels
        self._key = object()
        self._eog = tokenizer.eog_ids
        # Weights may know more tokens than the vocabulary, padded to a round number.
        self._n_vocab = tokenizer.n_vocab
        self._logits = np.empty((1, session.model.info.n_vocab), np.float32)
        self._sampler = Sampler(
            params,
            self._n_vocab,
            tokenizer.eog_ids,
            lambda token: tokenizer.token_bytes(token, special=True),
        )
        self._decoder = StreamDecoder(tokenizer, at_start=False)
        self._stops = StopStrings(stop)

        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish_reason: FinishReason | None = None
        self._n_reused = self._n_evaluated = self._n_decoded = 0
        self._seconds_prompt = self._seconds_decode = 0.0
        self._steps = self._run()

    def _run(self) -> Generator[Chunk, None, None]:
        reason: FinishReason = "cancelled"
        try:
            self._read_prompt()
            while True:
                if len(self._tokens) >= self._limit:
                    reason = "length"
                    break
                chunk = self._choose()
                if chunk is None:
                    reason = "stop"
                    break
                yield chunk
                if self._stops.stopped:
                    break
                if len(self._tokens) < self._limit:
                    self._evaluate(self._tokens[-1])
        except Cancelled:
            pass
        finally:
            tail = self._stops.feed(self._decoder.flush()) + self._stops.finish()
            self._text.append(tail)
            self._finish_reason = "stop" if self._stops.stopped else reason
        if tail:
            yield Chunk(tail, None)

    def _read_prompt(self) -> None:
        session = self._session
        start = time.perf_counter()
        try:
            with session._exclusive(owner=self._key):
                self._sampler.extend(self._ids[self._ids < self._n_vocab].tolist())
                self._n_reused = session._go_back(self._ids, self._reuse)
                fresh = self._ids[self._n_reused :]
                try:
                    session._eval(fresh, "last", self._logits, self._progress, self._n_cancels)
                finally:
                    self._n_evaluated = session.n_tokens - self._n_reused
        finally:
            self._seconds_prompt = time.perf_counter() - start

    def _choose(self) -> Chunk | None:
        """The next token, or None where it ends the text."""
        start = time.perf_counter()
        logits = self._logits[0, : self._n_vocab]
        token = self._sampler.sample(logits)
        if token in self._eog:
            return None
        self._sampler.accept(token)
        self._tokens.append(token)
        likely = None
        if self._n_logprobs is not None:
            top = top_logprobs(logits, self._n_logprobs)
            likely = TokenLogprob(token, logprob(logits, token), top)
            self._logprobs.append(likely)
        text = self._stops.feed(self._decoder.push(token))
        self._text.append(text)
        self._seconds_decode += time.perf_counter() - start
        return Chunk(text, token, likely)

    def _evaluate(self, token: int) -> None:
        session = self._session
        start = time.perf_counter()
        ids = np.array([token], np.int32)
        session._require_owner(self._key)
        with session._exclusive(owner=self._key):
            session._eval(ids, "last", self._logits, None, self._n_cancels)
        self._n_decoded += 1
        self._seconds_decode += time.perf_counter() - start

    def __next__(self) -> Chunk:
        return next(self._steps)

    def close(self) -> None:
        """Ends the generation, if it has not ended."""
        self._steps.close()
        if self._finish_reason is None:  # nothing was ever asked for
            self._finish_reason = "cancelled"

    @property
    def result(self) -> Generation:
        """All of the text so far; complete once the stream has ended.

        Raises:
            ValueError: The stream has not ended.
        """
        if self._finish_reason is None:
            raise ValueError("The generation has not ended, so that it has no result yet.")
        n_prompt, n_generated = len(self._ids), len(self._tokens)
        stats = GenerationStats(
            n_prompt=n_prompt,
            n_reused=self._n_reused,
            n_evaluated=self._n_evaluated,
            n_generated=n_generated,
            n_decoded=self._n_decoded,
            seconds_prompt=self._seconds_prompt,
            seconds_decode=self._seconds_decode,
        )
        return Generation(
            text="".join(self._text),
            tokens=list(self._tokens),
            finish_reason=self._finish_reason,
            logprobs=None if self._n_logprobs is None else list(self._logprobs),
            seed=self._sampler.seed,
            stats=stats,
        )
