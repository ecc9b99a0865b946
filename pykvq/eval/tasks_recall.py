"""The tasks `needle` and `retrieval`: whether what stands far behind can still be read.

`needle` hides one sentence in a text, a city and its number, at a depth of the text, and asks for
the number at the end (gkamradt/LLMTest_NeedleInAHaystack asks in the same way). `retrieval` lists
keys and values, random hexadecimal words, and asks for some of them (as Lost in the Middle, arXiv
2307.03172). All of it is read in streaming order.

Small models often fail at either, whatever the cache. So an answer is scored twice: by whether
the model writes it, and by how likely each of its tokens is if the ones before are given.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pykvq import native
from pykvq.eval.streaming import log_partition, read, read_logits, sealed_tokens
from pykvq.eval.tasks import Count, Task

if TYPE_CHECKING:
    from pykvq.eval.lanes import Lane, SessionPool
    from pykvq.eval.record import Json
    from pykvq.model import Model
    from pykvq.session import IntArray, Session
    from pykvq.tokenizer import Tokenizer

# fmt: off
_CITIES = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Seoul", "Dublin", "Vienna", "Prague", "Nairobi",
    "Havana", "Athens", "Warsaw", "Tunis", "Bogota", "Manila", "Helsinki", "Budapest", "Tokyo",
    "Ottawa", "Santiago", "Jakarta", "Riga", "Dakar",
)
# fmt: on
_NEEDLE = "\nThe secret number of {city} is {number}.\n"
_NEEDLE_QUESTION = "\nThe secret number of {city} is"
_LIST_HEAD = "\n\nA list of keys and their values:\n"
_LIST_QUESTION = "\n{key}:"
_HEX = "0123456789abcdef"
_WORD = 4

#: Tokens that are written beyond an answer's own: models may put a word before it.
_SPARE = 8


@dataclass(frozen=True)
class Question:
    """A question at the end of a prompt.

    Attributes:
        ids: Its tokens, at least one.
        answer_ids: The tokens of the answer, at least one.
        answer: The answer as it must appear in what the model writes.
    """

    ids: IntArray
    answer_ids: IntArray
    answer: str


@dataclass(frozen=True)
class Prompt:
    """A prompt and what is asked after it.

    Attributes:
        ids: Its tokens, BOS included.
        questions: Each is asked after the prompt alone.
    """

    ids: IntArray
    questions: tuple[Question, ...]


def make_question(tokenizer: Tokenizer, text: str, answer: str) -> Question:
    """Tokenizes a question and its answer, as one text.

    Where a token spans the two, it belongs to the answer.
    """
    whole = tokenizer.encode(f"{text} {answer}", add_special=False)
    alone = tokenizer.encode(text, add_special=False)
    n = 0
    while n < len(alone) and whole[n] == alone[n]:
        n += 1
    if n == 0:
        raise ValueError(f"The question {text!r} has no token of its own before its answer.")
    return Question(np.array(whole[:n], np.int32), np.array(whole[n:], np.int32), answer)


class _RecallTask(Task):
    """What both tasks have in common: prompts by length and trial, and the scoring of answers."""

    lockstep: ClassVar[bool] = False
    remedy: ClassVar[str] = "longer prompts (--lengths)"

    def __init__(
        self,
        model: Model,
        ids: IntArray,
        *,
        lengths: Sequence[int],
        depths: Sequence[float],
        trials: int,
        seed: int,
        sealed_from: int,
    ) -> None:
        """Prepares prompts.

        Args:
            model: The model.
            ids: The text's tokens: the haystack, or what stands before the list.
            lengths: Tokens of the prompts with question and answer; at most a block less is used.
            depths: Where the answer stands, from 0 (the beginning) to 100.
            trials: How often each length and depth is tried.
            seed: Of everything that is random.
            sealed_from: Sinks and window of the schemes. Prompts end where a block was just sealed,
                so that what is read after them can be taken back.

        Raises:
            ValueError: The text is shorter than a prompt, or a prompt too short for its parts.
        """
        self._tokenizer = model.tokenizer
        self._ids = ids
        self._lengths, self._depths, self._trials = tuple(lengths), tuple(depths), trials
        self._seed = seed
        self._sealed_from = sealed_from
        self._head = self._bos()
        if len(ids) < max(lengths):
            raise ValueError(
                f"The text has {len(ids)} tokens, but the longest prompt of the task {self.name}"
                f" has {max(lengths)}."
            )
        self._of_unit: dict[str, Prompt] = {}
        for unit in self.units():  # fails at once where a length is too short
            self.prompt(unit)

    def _bos(self) -> IntArray:
        bos = self._tokenizer.bos if self._tokenizer.add_bos else None
        return np.array([] if bos is None else [bos], np.int32)

    @property
    def n_ctx(self) -> int:
        """See `Task.n_ctx`."""
        return max(self._lengths) + _SPARE

    def settings(self) -> Json:
        """See `Task.settings`."""
        return {
            "lengths": list(self._lengths),
            "depths": list(self._depths),
            "trials": self._trials,
            "seed": self._seed,
        }

    def tokens(self, unit: str) -> int:
        """See `Task.tokens`."""
        return len(self.prompt(unit).ids)

    def prompt(self, unit: str) -> Prompt:
        """The prompt of a part, the same at every call."""
        if unit not in self._of_unit:
            self._of_unit[unit] = self._make(unit)
        return self._of_unit[unit]

    @abstractmethod
    def _make(self, unit: str) -> Prompt:
        """The prompt of a part, made from random numbers that depend on the part alone."""

    def _rng(self, *place: int) -> np.random.Generator:
        """Random numbers that depend on the seed and a place, not on the order of the work."""
        return np.random.default_rng([self._seed, *place])

    def _filler(self, rng: np.random.Generator, n: int) -> IntArray:
        """A piece [n] of the text."""
        start = int(rng.integers(len(self._ids) - n + 1))
        return self._ids[start : start + n]

    def _room(self, length: int, *parts: IntArray) -> int:
        """Tokens of text that fit in beside the given parts, of which the last is the question."""
        question = len(parts[-1])
        n = length - question
        block = native.block_tokens()
        if n >= self._sealed_from + block:
            n -= (n - self._sealed_from) % block
        room = n - sum(len(part) for part in (self._head, *parts[:-1]))
        if room < 0:
            raise ValueError(
                f"Prompts of {length} tokens are too short for the task {self.name}: {-room} more"
                " are needed."
            )
        return room

    def sealed_share(self, sinks: int, window: int) -> float:
        """See `Task.sealed_share`."""
        read = [sealed_tokens(self.tokens(unit), sinks, window) > 0 for unit in self.units()]
        return sum(read) / len(read)

    def measure(
        self, unit: str, lanes: Sequence[Lane], pool: SessionPool, count: Count
    ) -> dict[str, Json]:
        """See `Task.measure`."""
        prompt = self.prompt(unit)
        (lane,) = lanes
        session = pool.session(lane)
        session.reset()
        read(session, prompt.ids)
        count(len(prompt.ids))
        return {
            lane.name: {"answers": [self._ask(session, prompt.ids, q) for q in prompt.questions]}
        }

    def _ask(self, session: Session, prompt: IntArray, question: Question) -> Json:
        """Asks after the prompt, which the session holds before and after."""
        answer = question.answer_ids
        n_sealed = session.stats.n_tokens_sealed
        read(session, question.ids[:-1])
        rows = read_logits(session, np.append(question.ids[-1:], answer[:-1]))
        log_p = np.take_along_axis(rows, answer[:, None], axis=1)[:, 0] - log_partition(rows)
        first = rows.argmax(axis=1) == answer
        _take_back(session, prompt, n_sealed)
        if first.all():
            found = True  # what the model writes is the answer
        else:
            written = self._write(session, question.ids, len(answer) + _SPARE)
            found = question.answer in self._tokenizer.decode(written)
            _take_back(session, prompt, n_sealed)
        return {"found": found, "logprob": float(log_p.mean()), "rank1": float(first.mean())}

    def _write(self, session: Session, ids: IntArray, n: int) -> list[int]:
        """Appends tokens and writes up to n likeliest ones."""
        read(session, ids[:-1])
        token, written = int(ids[-1]), list[int]()
        while len(written) < n:
            token = int(session.eval([token])[0, : self._tokenizer.n_vocab].argmax())
            if token in self._tokenizer.eog_ids:
                break
            written.append(token)
        return written

    def summarize(self, parts: Mapping[str, Json]) -> Json:
        """See `Task.summarize`."""
        shape = (len(self._lengths), len(self._depths), self._trials)
        summary: Json = {"answers": int(np.prod(shape))}
        for score in ("found", "logprob", "rank1"):
            grid = np.array(list(self._in_order(parts, score)), np.float64).reshape(shape)
            summary[score] = float(grid.mean())
            summary[f"{score}_grid"] = grid.mean(axis=2).tolist()  # [length][depth]
        return summary

    @abstractmethod
    def _in_order(self, parts: Mapping[str, Json], score: str) -> Iterator[float]:
        """A score of all answers, by length, then depth, then trial."""


def _take_back(session: Session, prompt: IntArray, n_sealed: int) -> None:
    """Makes the session hold the prompt again, as if nothing had been read after it."""
    if session.stats.n_tokens_sealed == n_sealed:
        session.truncate(len(prompt))
    else:  # a block was sealed since, and truncation would not undo that
        session.reset()
        read(session, prompt)


class NeedleTask(_RecallTask):
    """One sentence at a depth of a text."""

    name: ClassVar[str] = "needle"

    def units(self) -> list[str]:
        """See `Task.units`."""
        return [
            f"{length}/{depth}/{trial}"
            for length in self._lengths
            for depth in range(len(self._depths))
            for trial in range(self._trials)
        ]

    def _make(self, unit: str) -> Prompt:
        length, at, trial = (int(number) for number in unit.split("/"))
        rng = self._rng(length, at, trial)
        city = _CITIES[int(rng.integers(len(_CITIES)))]
        number = str(rng.integers(10_000, 100_000))
        encode = self._tokenizer.encode
        needle = np.array(
            encode(_NEEDLE.format(city=city, number=number), add_special=False), np.int32
        )
        question = make_question(self._tokenizer, _NEEDLE_QUESTION.format(city=city), number)
        tail = np.concatenate([question.ids, question.answer_ids])
        hay = self._filler(rng, self._room(length, needle, tail))
        cut = round(len(hay) * self._depths[at] / 100)
        ids = np.concatenate([self._head, hay[:cut], needle, hay[cut:]])
        return Prompt(ids, (question,))

    def _in_order(self, parts: Mapping[str, Json], score: str) -> Iterator[float]:
        for unit in self.units():
            yield float(parts[unit]["answers"][0][score])


class RetrievalTask(_RecallTask):
    """Values of keys in a list that fills the prompt; one reading serves all depths."""

    name: ClassVar[str] = "retrieval"

    def units(self) -> list[str]:
        """See `Task.units`."""
        return [f"{length}/{trial}" for length in self._lengths for trial in range(self._trials)]

    def _make(self, unit: str) -> Prompt:
        length, trial = (int(number) for number in unit.split("/"))
        rng = self._rng(length, trial)
        encode = self._tokenizer.encode
        lines = [np.array(encode(_LIST_HEAD, add_special=False), np.int32)]
        longest = _question_for(self._tokenizer, "0" * _WORD, "0" * _WORD)
        tail = np.zeros(2 * (len(longest.ids) + len(longest.answer_ids)), np.int32)
        room = self._room(length, *lines, tail)
        pairs: dict[str, str] = {}
        while True:
            key, value = _hex_word(rng), _hex_word(rng)
            if key in pairs:
                continue
            line = np.array(encode(f"{key}: {value}\n", add_special=False), np.int32)
            if len(line) > room:
                break
            room -= len(line)
            pairs[key] = value
            lines.append(line)
        if len(pairs) < len(self._depths):
            raise ValueError(
                f"Prompts of {length} tokens are too short for the task {self.name}: they hold"
                f" {len(pairs)} keys, expected at least {len(self._depths)}."
            )
        filler = self._filler(rng, room)  # so that the prompt has exactly the tokens it may have
        keys = list(pairs)
        asked = [keys[round((len(keys) - 1) * depth / 100)] for depth in self._depths]
        questions = tuple(_question_for(self._tokenizer, key, pairs[key]) for key in asked)
        return Prompt(np.concatenate([self._head, filler, *lines]), questions)

    def _in_order(self, parts: Mapping[str, Json], score: str) -> Iterator[float]:
        for length in self._lengths:
            for depth in range(len(self._depths)):
                for trial in range(self._trials):
                    yield float(parts[f"{length}/{trial}"]["answers"][depth][score])


def _question_for(tokenizer: Tokenizer, key: str, value: str) -> Question:
    return make_question(tokenizer, _LIST_QUESTION.format(key=key), value)


def _hex_word(rng: np.random.Generator) -> str:
    return "".join(_HEX[i] for i in rng.integers(len(_HEX), size=_WORD))
