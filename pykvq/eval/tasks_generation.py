"""The task `generation`: whether errors accumulate while a long text is written.

f16 continues prompts that are cut from the text, always with its likeliest token. Along what it
wrote, each scheme is scored position by position (teacher-forced): were its errors to feed on
themselves through the cache, the last third would diverge more than the first. Then each scheme
writes on its own (free-running), and its text is compared with f16's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from pykvq.eval.record import pack, unpack
from pykvq.eval.streaming import Lockstep, read, sealed_share
from pykvq.eval.tasks import Count, Task

if TYPE_CHECKING:
    from pykvq.eval.lanes import Lane, SessionPool
    from pykvq.eval.record import Json
    from pykvq.eval.streaming import Scores
    from pykvq.model import Model
    from pykvq.session import IntArray, Session

#: The text is divided into so many stretches, of which the first and the last are compared.
_THIRDS = 3
#: A text that repeats itself has few different runs of so many tokens.
_RUN = 4


class GenerationTask(Task):
    """Divergence along f16's own text, and how soon a scheme writes another."""

    name: ClassVar[str] = "generation"
    lockstep: ClassVar[bool] = True
    remedy: ClassVar[str] = "longer prompts (--prompt-tokens) or texts (--predict)"

    def __init__(
        self, model: Model, ids: IntArray, *, prompts: int, n_prompt: int, n_tokens: int
    ) -> None:
        """Cuts prompts from the text, evenly spread over it.

        Args:
            model: The model.
            ids: The text's tokens.
            prompts: How many prompts.
            n_prompt: Tokens of each.
            n_tokens: Tokens to write after each, unless f16 ends the text before.

        Raises:
            ValueError: The text is too short for that.
        """
        if len(ids) < prompts * n_prompt:
            raise ValueError(
                f"The text has {len(ids)} tokens, but {prompts}"
                f" prompt{'s' if prompts > 1 else ''} of {n_prompt} tokens were to be cut from it."
            )
        self._settings: Json = {"prompts": prompts, "n_prompt": n_prompt, "n_tokens": n_tokens}
        self._n_tokens = n_tokens
        self._eog = model.tokenizer.eog_ids
        self._prompts = []
        for i in range(prompts):
            start = i * (len(ids) // prompts)
            prompt = ids[start : start + n_prompt].copy()
            if model.tokenizer.add_bos and model.tokenizer.bos is not None:
                prompt[0] = model.tokenizer.bos
            self._prompts.append(prompt)
        self._n_ctx = n_prompt + n_tokens

    @property
    def n_ctx(self) -> int:
        """See `Task.n_ctx`."""
        return self._n_ctx

    def settings(self) -> Json:
        """See `Task.settings`."""
        return self._settings

    def units(self) -> list[str]:
        """See `Task.units`."""
        return [str(i) for i in range(len(self._prompts))]

    def tokens(self, unit: str) -> int:
        """See `Task.tokens`."""
        return self._n_ctx - 1

    def sealed_share(self, sinks: int, window: int) -> float:
        """See `Task.sealed_share`; of texts that f16 does not end early."""
        return sealed_share(self._n_ctx, self._n_ctx - self._n_tokens - 1, sinks, window)

    def measure(
        self, unit: str, lanes: Sequence[Lane], pool: SessionPool, count: Count
    ) -> dict[str, Json]:
        """See `Task.measure`."""
        prompt = self._prompts[int(unit)]
        sessions = [pool.session(lane) for lane in lanes]
        sessions[0].reset()
        text = self._write(sessions[0], prompt, self._n_tokens)
        whole = np.concatenate([prompt, text])
        scores = Lockstep(sessions).score(whole, len(prompt) - 1, count)
        parts = {}
        for lane, session, found in zip(lanes, sessions, scores, strict=True):
            written = self._write_freely(session, prompt, text, found)
            parts[lane.name] = _part(found, scores[0], text, written)
        return parts

    def _write(self, session: Session, ids: IntArray, n: int) -> IntArray:
        """Appends tokens [m >= 1] and writes up to n likeliest ones, the end of the text included.

        What was written last is not in the cache.
        """
        read(session, ids[:-1])
        token, written = int(ids[-1]), list[int]()
        while len(written) < n:
            token = int(session.eval([token])[0].argmax())
            written.append(token)
            if token in self._eog:
                break
        return np.array(written, np.int32)

    def _write_freely(
        self, session: Session, prompt: IntArray, text: IntArray, scores: Scores
    ) -> IntArray:
        """What a scheme writes after the prompt.

        Up to where its likeliest token first differs from f16's text it has written just that,
        and has been scored along it: passes of streaming order give what single tokens give.
        """
        differ = np.flatnonzero(scores.top != text)
        if not differ.size:
            return text
        own = np.append(text[: differ[0]], scores.top[differ[0]])
        if int(own[-1]) in self._eog or len(own) == self._n_tokens:
            return own
        session.reset()
        more = self._write(session, np.concatenate([prompt, own]), self._n_tokens - len(own))
        return np.concatenate([own, more])

    def summarize(self, parts: Mapping[str, Json]) -> Json:
        """See `Task.summarize`."""
        rows = list(parts.values())
        kld = [np.array_split(unpack(row["kld"]), _THIRDS) for row in rows]
        agree = [np.array_split(unpack(row["agree"]), _THIRDS) for row in rows]
        thirds = [float(np.concatenate(third).mean()) for third in zip(*kld, strict=True)]
        agreed = [float(np.concatenate(third).mean()) for third in zip(*agree, strict=True)]
        every = np.concatenate([unpack(row["kld"]) for row in rows])
        return {
            "tokens": len(every),
            "mean_kld": float(every.mean()),
            "kld_thirds": thirds,
            "top1": float(np.concatenate([unpack(row["agree"]) for row in rows]).mean()),
            "top1_thirds": agreed,
            "first_divergence": float(np.median([row["first_divergence"] for row in rows])),
            "n_identical": sum(row["identical"] for row in rows),
            "equal": sum(row["n_equal"] for row in rows) / sum(row["n_text"] for row in rows),
            "lengths": [row["n_written"] for row in rows],
            "distinct": float(np.mean([row["distinct"] for row in rows])),
        }


def _part(scores: Scores, reference: Scores, text: IntArray, written: IntArray) -> Json:
    """What is kept of a prompt: the scores along f16's text, and how the free text compares."""
    shared = min(len(text), len(written))
    equal = written[:shared] == text[:shared]
    differ = np.flatnonzero(~equal)
    return {
        "kld": pack(scores.kld),
        "agree": pack((scores.top == reference.top).astype(np.float32)),
        "first_divergence": int(differ[0]) if differ.size else shared,
        "identical": bool(np.array_equal(text, written)),
        "n_equal": int(equal.sum()),
        "n_text": len(text),
        "n_written": len(written),
        "distinct": distinct_runs(written),
    }


def distinct_runs(ids: IntArray, length: int = _RUN) -> float:
    """Of all runs of `length` tokens, the part, 0 to 1, that are different; 1 for short texts.

    A text that circles has few.
    """
    runs = [tuple(ids[i : i + length].tolist()) for i in range(len(ids) - length + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0
