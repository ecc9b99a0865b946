"""Generation: seeds, streams, stop strings, log-probabilities, reuse of what is held."""

from __future__ import annotations

import io
import threading
from dataclasses import fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import is_exact, write_nan, write_tiny

from pykvq import (
    ContextError,
    Generation,
    KvqError,
    LogitsError,
    Model,
    SamplingParams,
    Session,
    catalogue,
)
from pykvq.cli import main
from pykvq.generation import SamplingOptions, merge_sampling
from pykvq.perplexity import perplexity

PROMPT = "the end and the other"


def logits_of(session: Session, result: Generation) -> npt.NDArray[np.float32]:
    """The logits [n_tokens, n_vocab] that each token was chosen by, in the passes of `result`."""
    session.reset()
    first = session.eval(session.model.tokenize(PROMPT))
    return np.concatenate([first, *(session.eval([token]) for token in result.tokens[:-1])])


def test_the_same_seed_gives_the_same_text(tiny: Model) -> None:
    with tiny.session() as session:
        # On a GPU a prompt of which some tokens are held is another pass, which rounds differently.
        reuse = is_exact(session)
        first = session.generate(PROMPT, 40, seed=5)
        again = session.generate(PROMPT, 40, seed=5, reuse=reuse)
        other = session.generate(PROMPT, 40, seed=6, reuse=reuse)
        free = session.generate(PROMPT, 40, reuse=reuse)
        repeated = session.generate(PROMPT, 40, seed=free.seed, reuse=reuse)
    assert first.tokens == again.tokens
    assert first.text == again.text
    assert first.tokens != other.tokens
    assert free.tokens == repeated.tokens
    assert first.seed == 5


def test_a_stream_gives_what_the_whole_gives(tiny: Model) -> None:
    with tiny.session() as session:
        reuse = is_exact(session)
        whole = session.generate(PROMPT, 60, seed=1, logprobs=2)
        stream = session.generate(PROMPT, 60, seed=1, logprobs=2, stream=True, reuse=reuse)
        chunks = list(stream)
    assert "".join(str(chunk) for chunk in chunks) == whole.text
    assert [c.token for c in chunks if c.token is not None] == whole.tokens
    assert [c.logprob for c in chunks if c.logprob is not None] == whole.logprobs
    result = stream.result
    assert (result.text, result.tokens) == (whole.text, whole.tokens)
    assert result.finish_reason == whole.finish_reason


def test_text_is_the_decoding_of_the_tokens(tiny: Model) -> None:
    # Random bytes: most are not UTF-8, so that pieces must be held back and mended.
    with tiny.session() as session:
        result = session.generate(PROMPT, 200, seed=3, temperature=2.0, top_k=0, top_p=1.0)
    assert result.text == tiny.detokenize(result.tokens)
    assert "\ufffd" in result.text


def test_greedy_takes_the_largest_logit_each_time(tiny: Model) -> None:
    with tiny.session(kv="f16") as session:
        result = session.generate(PROMPT, 20, temperature=0, ignore_eos=True)
        logits = logits_of(session, result)
    banned = sorted(tiny.tokenizer.eog_ids)
    logits[:, banned] = -np.inf
    assert result.tokens == logits.argmax(axis=1).tolist()


def test_the_text_ends_where_the_model_ends_it(tiny: Model) -> None:
    end = tiny.tokenizer.eos
    assert end is not None
    with tiny.session() as session:
        result = session.generate(PROMPT, 5, logit_bias={end: 1000.0})
        assert (result.finish_reason, result.tokens, result.text) == ("stop", [], "")
        assert session.n_tokens == result.stats.n_prompt
        go_on = session.generate(PROMPT, 5, logit_bias={end: 1000.0}, ignore_eos=True)
        assert (go_on.finish_reason, len(go_on.tokens)) == ("length", 5)


def test_stop_strings_end_the_text_and_are_not_part_of_it(tiny: Model) -> None:
    with tiny.session() as session:
        reuse = is_exact(session)
        free = session.generate(PROMPT, 80, seed=9)
        assert len(free.text) > 20
        stop = free.text[10:14]
        at = free.text.index(stop)
        stream = session.generate(
            PROMPT, 80, seed=9, stop=[stop, "never there"], stream=True, reuse=reuse
        )
        shown = ""
        for chunk in stream:
            shown += chunk.text
            assert stop not in shown
        assert shown == free.text[:at]
        assert stream.result.text == shown
        assert stream.result.finish_reason == "stop"
        whole = session.generate(PROMPT, 80, seed=9, stop=stop, reuse=reuse)
        assert (whole.text, whole.finish_reason) == (shown, "stop")
        with pytest.raises(ValueError, match="stop string is empty"):
            session.generate(PROMPT, 5, stop=[""])


def test_logprobs_are_those_of_the_logits(tiny: Model) -> None:
    with tiny.session(kv="f16") as session:
        result = session.generate(PROMPT, 5, seed=2, logprobs=3)
        logits = logits_of(session, result)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    assert result.logprobs is not None
    for row, given, token in zip(exact, result.logprobs, result.tokens, strict=True):
        assert given.token == token
        assert given.logprob == pytest.approx(row[token], abs=1e-9)
        assert [i for i, _ in given.top] == np.argsort(-row, kind="stable")[:3].tolist()
    with tiny.session() as session:
        assert session.generate(PROMPT, 2).logprobs is None
        with pytest.raises(ValueError, match="logprobs is -1"):
            session.generate(PROMPT, 2, logprobs=-1)


# ---- length ---------------------------------------------------------------------------------


def test_without_a_limit_the_text_fills_the_context(tiny: Model) -> None:
    with tiny.session(n_ctx=40) as session:
        result = session.generate([1] * 30, ignore_eos=True)
        assert result.finish_reason == "length"
        assert len(result.tokens) == 11  # the last one needs no place
        assert session.n_tokens == 40
        full = session.generate([1] * 40, ignore_eos=True)
        assert len(full.tokens) == 1


def test_zero_tokens_only_evaluates_the_prompt(tiny: Model) -> None:
    with tiny.session() as session:
        result = session.generate([1, 2, 3], 0)
        assert (result.tokens, result.text, result.finish_reason) == ([], "", "length")
        assert session.tokens == [1, 2, 3]
        with pytest.raises(ValueError, match="max_tokens is -1"):
            session.generate([1, 2, 3], -1)


@pytest.mark.parametrize("wrong", [1.5, 2.0, "3", True, -1])
def test_counts_that_are_no_whole_numbers_are_refused(tiny: Model, wrong: object) -> None:
    with tiny.session() as session:
        message = rf"max_tokens is {wrong!r}, expected a whole number from 0\."
        with pytest.raises(ValueError, match=message):
            session.generate(PROMPT, wrong)  # type: ignore[call-overload]
        with pytest.raises(ValueError, match=rf"logprobs is {wrong!r}, expected a whole number"):
            session.generate(PROMPT, 2, logprobs=wrong)  # type: ignore[call-overload]
        assert len(session.generate(PROMPT, np.int64(2), ignore_eos=True).tokens) == 2


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (None, TypeError, "of type NoneType, expected a str or token ids"),
        (b"hi", TypeError, "of type bytes"),
        (["hi"], TypeError, "of type list of str"),
        ([{"role": "user", "content": "hi"}], TypeError, r"dict.*chat_template\.render\(messages"),
        ("", ValueError, "The prompt is empty, expected some text or at least one token"),
        ([], ValueError, "The prompt is empty"),
    ],
)
def test_what_is_no_prompt_is_refused(
    tiny: Model, wrong: object, error: type[Exception], message: str
) -> None:
    with tiny.session() as session, pytest.raises(error, match=message):
        session.generate(wrong, 2)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("wrong", "message"), [(["a", 3], "stop string 3 is not a str"), (3, "stop strings are 3")]
)
def test_stop_strings_of_a_wrong_kind_are_refused(tiny: Model, wrong: object, message: str) -> None:
    with tiny.session() as session, pytest.raises(TypeError, match=message):
        session.generate(PROMPT, 2, stop=wrong)  # type: ignore[call-overload]


def test_prompt_that_does_not_fit_is_refused_and_nothing_is_lost(tiny: Model) -> None:
    with tiny.session(n_ctx=32) as session:
        session.eval([1, 2, 3])
        with pytest.raises(ContextError, match=r"prompt has 33 tokens, .* holds 32"):
            session.generate([1] * 33)
        with pytest.raises(ValueError, match="at least one token"):
            session.generate("")
        assert session.tokens == [1, 2, 3]


# ---- reuse ----------------------------------------------------------------------------------


def test_f16_goes_on_from_the_longest_common_prefix(tiny: Model, random_tokens: list[int]) -> None:
    with tiny.session(kv="f16") as session:
        session.generate(random_tokens[:500], 30, seed=1)
        changed = random_tokens[:300] + random_tokens[600:700]
        reused = session.generate(changed, 30, seed=1, logprobs=2)
        fresh = session.generate(changed, 30, seed=1, logprobs=2, reuse=False)
        n_same = 30 if is_exact(session) else 1  # rounding can have another token chosen
    assert reused.stats.n_reused == 300
    assert fresh.stats.n_reused == 0
    assert reused.tokens[:n_same] == fresh.tokens[:n_same]
    assert reused.logprobs is not None and fresh.logprobs is not None
    assert reused.logprobs[0].logprob == pytest.approx(fresh.logprobs[0].logprob, abs=0.02)


def test_a_conversation_that_goes_on_is_not_evaluated_again(
    tiny: Model, random_tokens: list[int]
) -> None:
    with tiny.session(kv="skvq") as session:
        first = session.generate(random_tokens[:400], 50, seed=1, ignore_eos=True)
        prompt = random_tokens[:400] + first.tokens + random_tokens[400:420]
        second = session.generate(prompt, 5)
        assert second.stats.n_reused == 449  # the last token chosen was not evaluated
        assert session.tokens[: len(prompt)] == prompt


def test_going_back_in_a_lossy_cache_leaves_no_row_sealed_too_early(
    tiny: Model, random_tokens: list[int]
) -> None:
    with tiny.session(kv="skvq", n_ctx=1000) as session:
        session.eval(random_tokens[:900])
        changed = [*random_tokens[:500], 1, 2, 3]
        result = session.generate(changed, 1)
        # Of 500 tokens 5 + 5 * 64 lie in sinks and blocks; the 175 after them are f16 again.
        assert result.stats.n_reused == 325
        sealed = session.stats.n_tokens_sealed
        session.reset()
        session.eval(changed)
        assert session.stats.n_tokens_sealed == sealed


def test_a_short_prompt_gives_the_same_text_after_any_history(
    tiny: Model, random_tokens: list[int]
) -> None:
    with tiny.session(kv="skvq", kv_window=32) as session:
        first = session.generate(random_tokens[:30], 130, seed=4, ignore_eos=True)
        assert session.stats.n_tokens_sealed == 64
        again = session.generate(random_tokens[:30], 130, seed=4, ignore_eos=True)
        n_same = 130 if is_exact(session) else 1  # rounding can have another token chosen
    assert again.stats.n_reused == 5  # the sinks, which are f16 for good
    assert first.tokens[:n_same] == again.tokens[:n_same]


def test_an_equal_prompt_evaluates_its_last_token_again(tiny: Model) -> None:
    with tiny.session() as session:
        session.eval([1, 2, 3])
        assert session.generate([1, 2, 3], 1).stats.n_reused == 2
        assert session.generate([1, 2], 1).stats.n_reused == 1
        assert session.generate([9], 1).stats.n_reused == 0
        assert session.tokens == [9]


# ---- streams --------------------------------------------------------------------------------


def test_a_stream_can_be_closed_and_the_session_goes_on(tiny: Model) -> None:
    with tiny.session() as session:
        with session.generate(PROMPT, 50, seed=1, stream=True) as stream:
            some = [next(stream) for _ in range(5)]
            with pytest.raises(ValueError, match="has not ended"):
                stream.result  # noqa: B018
        assert stream.result.finish_reason == "cancelled"
        assert stream.result.tokens == [chunk.token for chunk in some]
        assert list(stream) == []
        unused = session.generate(PROMPT, 5, stream=True)
        unused.close()
        assert unused.result.finish_reason == "cancelled"
        assert session.generate(PROMPT, 5).finish_reason in ("stop", "length")


def test_cancel_ends_a_stream_that_waits(tiny: Model) -> None:
    with tiny.session() as session:
        stream = session.generate(PROMPT, 50, seed=1, ignore_eos=True, stream=True)
        for _ in range(3):
            next(stream)
        session.cancel()
        assert [chunk.token for chunk in stream if chunk.token is not None] == []
        assert stream.result.finish_reason == "cancelled"
        assert len(stream.result.tokens) == 3


def test_cancel_from_another_thread_ends_a_generation(tiny: Model) -> None:
    with tiny.session(kv="f16", n_ctx=30_000, n_batch=256) as session:
        timer = threading.Timer(0.3, session.cancel)
        timer.start()
        result = session.generate([1] * 29_000)
        timer.join()
        assert (result.finish_reason, result.tokens) == ("cancelled", [])
        assert 0 < session.n_tokens < 29_000


def test_a_stream_whose_session_was_used_otherwise_cannot_go_on(tiny: Model) -> None:
    with tiny.session() as session:
        stream = session.generate(PROMPT, 50, stream=True, ignore_eos=True)
        next(stream)
        session.eval([1])
        with pytest.raises(KvqError, match="used for something else"):
            next(stream)
        other = session.generate(PROMPT, 50, stream=True, ignore_eos=True)
        next(other)
        session.generate(PROMPT, 2)
        with pytest.raises(KvqError, match="used for something else"):
            next(other)


# ---- parameters -----------------------------------------------------------------------------


def test_arguments_override_params_which_override_the_model(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", extra={"general.sampling.temp": 0.0})
    with Model(path) as model, model.session() as session:
        greedy = session.generate(PROMPT, 20)
        assert greedy.tokens == session.generate(PROMPT, 20, params=SamplingParams(temp=0)).tokens
        hot = session.generate(PROMPT, 20, params=SamplingParams(temp=3.0, seed=1))
        assert hot.tokens != greedy.tokens
        cold = session.generate(PROMPT, 20, params=SamplingParams(temp=3.0), temperature=0.0)
        assert cold.tokens == greedy.tokens


def test_every_sampling_parameter_is_an_argument() -> None:
    names = {field.name for field in fields(SamplingParams)}
    assert set(SamplingOptions.__annotations__) == names | {"temperature"}
    with pytest.raises(TypeError, match="both given"):
        merge_sampling(SamplingParams(), {"temp": 1.0, "temperature": 1.0})
    with pytest.raises(
        TypeError, match=r"no sampling parameter 'no_such'; known are: seed, .*top_p"
    ):
        merge_sampling(SamplingParams(), {"no_such": 1})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(ValueError, match="top_p"):
        merge_sampling(SamplingParams(), {"top_p": 2.0})


def test_padding_of_the_vocabulary_is_never_chosen(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", n_padding=200)
    with Model(path) as model, model.session() as session:
        n_vocab = model.tokenizer.n_vocab
        assert model.info.n_vocab == n_vocab + 200
        result = session.generate(
            PROMPT, 100, seed=1, temperature=5.0, top_k=0, min_p=0.0, ignore_eos=True
        )
        assert len(result.tokens) == 100
        assert max(result.tokens) < n_vocab


def test_a_prompt_that_was_cancelled_counts_what_was_evaluated(tiny: Model) -> None:
    with tiny.session(n_batch=16) as session:
        session.eval([1] * 10)
        result = session.generate(
            [1] * 100, 5, progress=lambda _, done, __: session.cancel() if done >= 32 else None
        )
        assert result.finish_reason == "cancelled"
        assert (result.stats.n_prompt, result.stats.n_reused) == (100, 10)
        assert result.stats.n_evaluated == session.n_tokens - 10 == 32
        assert result.stats.prompt_per_second == pytest.approx(32 / result.stats.seconds_prompt)


def test_stats_add_up(tiny: Model) -> None:
    with tiny.session() as session:
        result = session.generate([1] * 50, 20, ignore_eos=True)
        stats = result.stats
        assert (stats.n_prompt, stats.n_reused, stats.n_generated) == (50, 0, 20)
        assert (stats.n_evaluated, stats.n_decoded) == (50, 19)
        assert session.n_tokens == 69
        assert stats.prompt_per_second == pytest.approx(50 / stats.seconds_prompt)
        assert stats.decode_per_second == pytest.approx(19 / stats.seconds_decode)


# ---- damaged weights ------------------------------------------------------------------------


def test_logits_that_are_no_numbers_are_an_error(tmp_path: Path) -> None:
    with Model(write_nan(tmp_path / "nan.gguf"), kv="f16", device="cpu") as model:
        with model.session() as session, pytest.raises(LogitsError, match="largest logit is nan"):
            session.generate(PROMPT, 5)
        with pytest.raises(LogitsError, match="largest logit is nan"):
            perplexity(model, list(range(200)), ["skvq"], n_ctx=100, stream=True, kv_window=0)


@pytest.mark.parametrize("command", ["run", "chat", "perplexity", "eval"])
def test_commands_say_so_where_logits_are_no_numbers(
    command: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYKVQ_CACHE", str(tmp_path))
    catalogue.cards.cache_clear()
    name = next(iter(catalogue.cards()))
    path = write_nan(tmp_path / catalogue.cards()[name].artifact.file)
    monkeypatch.setattr("pykvq.fetch._is_complete", lambda *_: True)
    text = tmp_path / "text"
    text.write_text("the end and the other " * 300)
    file = [] if command == "chat" else ["-f", str(text)]
    small = ["--kv", "q8_0", "-c", "1000"] if command != "run" else ["-c", "4000"]
    for model, ending in ((str(path), "damaged."), (name, f"`pykvq pull {name}` fetches")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
        assert main([command, model, *file, *small]) == 2
        out, err = capsys.readouterr()
        assert "The largest logit is nan" in err
        assert "Traceback" not in err
        assert ending in err.splitlines()[-1]
        assert "nan" not in out
