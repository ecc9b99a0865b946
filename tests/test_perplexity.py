"""Perplexity and divergence: against plain formulas, and streaming against token by token."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import pytest
from conftest import is_exact, row_distances

from pykvq import Model, SchemeError, UnsupportedError
from pykvq.eval.streaming import divergence, log_partition, sealed_share
from pykvq.perplexity import perplexity

Array = npt.NDArray[np.float64]


def log_softmax(logits: npt.NDArray[np.float32]) -> Array:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    result: Array = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return result


def token_by_token(
    model: Model, kv: str, ids: list[int], n_ctx: int, window: int
) -> tuple[Array, npt.NDArray[np.int64]]:
    """Log-probabilities [n, n_vocab] and targets [n] of the scored half of every chunk."""
    logits, targets = [], []
    for start in range(0, len(ids) - n_ctx + 1, n_ctx):
        chunk = ids[start : start + n_ctx]
        with model.session(kv=kv, n_ctx=n_ctx, kv_window=window) as session:
            rows = np.concatenate([session.eval([token]) for token in chunk[:-1]])
        logits.append(rows[n_ctx // 2 :])
        targets += chunk[n_ctx // 2 + 1 :]
    return log_softmax(np.concatenate(logits)), np.array(targets)


@pytest.mark.parametrize("kv", ["q8_0", "skvq"])
def test_streaming_gives_what_token_by_token_gives(
    kv: str, tiny: Model, random_tokens: list[int]
) -> None:
    n_ctx, window = 120, 8
    [result] = perplexity(
        tiny, random_tokens[:240], [kv], n_ctx=n_ctx, kld=True, stream=True, kv_window=window
    )
    p, targets = token_by_token(tiny, "f16", random_tokens[:240], n_ctx, window)
    q, _ = token_by_token(tiny, kv, random_tokens[:240], n_ctx, window)
    n = len(targets)
    with tiny.session() as session:
        # Divergence is summed over a vocabulary in float32: 1e-5 of it.
        # On a GPU longer passes round differently, and a code that lies between two can be sealed
        # as the other one: that moves all rows behind by some 1e-3 nats, and by 1e-2 at most.
        near_ppl, near_kld, near_top1 = (1e-6, 4e-6, 0) if is_exact(session) else (0.03, 0.01, 0.05)
    assert result.tokens == n == 2 * (n_ctx // 2 - 1)
    assert result.ppl == pytest.approx(np.exp(-q[np.arange(n), targets].mean()), rel=near_ppl)
    kld = (np.exp(p) * (p - q)).sum(axis=1).mean()
    assert result.mean_kld == pytest.approx(kld, abs=near_kld)
    top1 = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    assert result.top1 == pytest.approx(top1, abs=near_top1)
    assert result.mean_kld is not None
    assert result.mean_kld > 0


def test_without_streaming_a_chunk_is_read_as_a_prompt(
    tiny: Model, random_tokens: list[int]
) -> None:
    n_ctx = 500
    results = perplexity(tiny, random_tokens, ["skvq", "f16"], n_ctx=n_ctx, n_batch=128, kld=True)
    rows = []
    for start in (0, 500):
        with tiny.session(kv="skvq", n_ctx=n_ctx, n_batch=128) as session:
            rows.append(session.eval(random_tokens[start : start + 499], "all")[250:])
    logs = log_softmax(np.concatenate(rows))
    targets = np.array(random_tokens[251:500] + random_tokens[751:1000])
    expected = np.exp(-logs[np.arange(len(targets)), targets].mean())
    assert [r.kv for r in results] == ["skvq", "f16"]
    assert results[0].ppl == pytest.approx(expected, rel=1e-6)
    assert (results[1].mean_kld, results[1].top1) == (0.0, 1.0)
    assert results[0].bits == pytest.approx(tiny.session(kv="skvq").stats.bits_sealed)
    assert results[1].bits == 16.0


def test_streaming_reads_more_of_the_sealed_cache(tiny: Model, random_tokens: list[int]) -> None:
    [prompt] = perplexity(tiny, random_tokens, ["skvq"], n_ctx=500, kld=True)
    [stream] = perplexity(tiny, random_tokens, ["skvq"], n_ctx=500, kld=True, stream=True)
    assert prompt.mean_kld is not None
    assert stream.mean_kld is not None
    assert stream.mean_kld > 1.5 * prompt.mean_kld


def test_chunks_and_window_limit_the_work(tiny: Model, random_tokens: list[int]) -> None:
    told: list[tuple[str, int, int]] = []
    [one] = perplexity(
        tiny, random_tokens, ["skvq"], n_ctx=300, chunks=1, progress=lambda *at: told.append(at)
    )
    assert one.tokens == 149
    assert one.mean_kld is one.top1 is None
    assert told[-1] == ("perplexity", 299, 299)
    [wide] = perplexity(
        tiny, random_tokens, ["skvq"], n_ctx=300, chunks=1, kld=True, stream=True, kv_window=200
    )
    [narrow] = perplexity(
        tiny, random_tokens, ["skvq"], n_ctx=300, chunks=1, kld=True, stream=True, kv_window=0
    )
    assert wide.mean_kld is not None
    assert narrow.mean_kld is not None
    assert wide.mean_kld < narrow.mean_kld


def test_bos_begins_every_chunk_where_the_model_wants_it(stories_model: Model) -> None:
    bos = stories_model.tokenizer.bos
    assert stories_model.tokenizer.add_bos
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 500, 128).tolist()
    [given] = perplexity(stories_model, ids, ["f16"], n_ctx=64)
    ids[0] = ids[64] = bos
    [same] = perplexity(stories_model, ids, ["f16"], n_ctx=64)
    assert given.ppl == same.ppl


def test_a_text_scores_better_than_noise(stories_model: Model) -> None:
    story = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the"
        " park. One day, she saw a big dog. The dog was happy and wanted to play. "
    )
    [text] = perplexity(stories_model, story * 3, ["f16"], n_ctx=64)
    noise = np.random.default_rng(0).integers(3, 500, 256).tolist()
    [random] = perplexity(stories_model, noise, ["f16"], n_ctx=64)
    assert text.ppl < 30 < 300 < random.ppl


def test_float32_terms_give_the_exact_divergence() -> None:
    rng = np.random.default_rng(1)
    p = rng.normal(0, 4, (16, 50_000)).astype(np.float32)
    p[np.arange(8), rng.integers(0, 50_000, 8)] += 18  # half of the rows are sure of themselves
    for noise in (0.0, 1e-3, 0.3):
        q = (p + rng.normal(0, noise, p.shape)).astype(np.float32)
        exact_p, exact_q = log_softmax(p), log_softmax(q)
        exact = (np.exp(exact_p) * (exact_p - exact_q)).sum(axis=1)
        np.testing.assert_allclose(divergence(p, q), exact, atol=1e-6)
        np.testing.assert_allclose(log_partition(q), q[:, 0] - exact_q[:, 0], atol=1e-6)
        assert (divergence(p, q) >= 0).all()
    assert (divergence(p, p) == 0).all()


def test_what_cannot_be_scored_is_refused(tiny: Model, tiny_qwen2: Model) -> None:
    with pytest.raises(ValueError, match=r"The text has 99 tokens, but at least 100"):
        perplexity(tiny, [1] * 99, n_ctx=100)
    with pytest.raises(ValueError, match="chunks have 3 tokens"):
        perplexity(tiny, [1] * 99, n_ctx=3)
    with pytest.raises(ValueError, match="0 chunks were asked for"):
        perplexity(tiny, [1] * 99, n_ctx=50, chunks=0)
    with pytest.raises(SchemeError, match="'q3' is unknown"):
        perplexity(tiny, [1] * 99, ["q3"], n_ctx=50)
    with pytest.raises(UnsupportedError, match="16 wide"):
        perplexity(tiny_qwen2, [1] * 99, ["q4_0"], n_ctx=50)


def test_bits_may_stand_behind_the_name(tiny: Model, random_tokens: list[int]) -> None:
    names = ["auto:1.5", "auto", "skvq"]
    found = perplexity(tiny, random_tokens, names, n_ctx=300, chunks=1, stream=True, kv_bits=3)
    assert [r.kv for r in found] == names
    assert found[0].bits <= 1.5 < found[1].bits <= 3
    [plain] = perplexity(
        tiny, random_tokens, ["auto"], n_ctx=300, chunks=1, stream=True, kv_bits=1.5
    )
    assert (plain.ppl, plain.bits) == (found[0].ppl, found[0].bits)
    for kv in (["skvq"], ["f16", "auto:1.5"]):
        with pytest.raises(ValueError, match=r"kv_bits is 2, but no scheme takes it"):
            perplexity(tiny, random_tokens, kv, n_ctx=300, kv_bits=2)
    with pytest.raises(SchemeError, match=r"'skvq:2' gives bits to the KV scheme skvq, whose"):
        perplexity(tiny, random_tokens, ["skvq:2"], n_ctx=300)
    with pytest.raises(SchemeError, match=r"'auto:' gives '' to the KV scheme auto, expected a"):
        perplexity(tiny, random_tokens, ["auto:"], n_ctx=300)


@pytest.mark.parametrize("n_batch", [None, 50])
def test_the_share_that_reads_sealed_blocks_is_what_differs_from_f16(
    n_batch: int | None, tiny: Model, random_tokens: list[int]
) -> None:
    n_ctx, first, sinks, window = 200, 20, 3, 70
    logits = []
    for kv in ("f16", "q4_0"):  # q4_0 has no basis, and keeps the same rows in f16
        with tiny.session(
            kv=kv, n_ctx=n_ctx, n_batch=n_batch, kv_sinks=sinks, kv_window=window
        ) as session:
            if n_batch is None:
                rows = np.concatenate([session.eval([t]) for t in random_tokens[: n_ctx - 1]])
            else:
                rows = session.eval(random_tokens[: n_ctx - 1], "all")
        logits.append(rows[first:])
        rounding = 0 if is_exact(session) else 0.006
    differ = row_distances(logits[1], logits[0]) > rounding
    assert 0 < differ.mean() < 1
    assert sealed_share(n_ctx, first, sinks, window, n_batch) == pytest.approx(differ.mean())


def test_chunks_that_no_scheme_seals_are_refused(tiny: Model, random_tokens: list[int]) -> None:
    most = 5 + 128 + 64 + 1  # sinks, window, a block; the last token is only predicted
    with pytest.raises(ValueError, match=rf"Chunks of {most} tokens .* more than {most} tokens"):
        perplexity(tiny, random_tokens, ["f16", "skvq"], n_ctx=most, stream=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [result] = perplexity(tiny, random_tokens, ["skvq"], n_ctx=most + 1, stream=True)
        [exact] = perplexity(tiny, random_tokens, ["f16"], n_ctx=64)
    assert 0 < result.sealed < 0.05
    assert exact.ppl > 1
    with pytest.warns(UserWarning, match="No scored position reads a sealed block under skvq: the"):
        perplexity(tiny, random_tokens, ["skvq", "q8_0"], n_ctx=most, chunks=1, stream=True)
    with pytest.warns(UserWarning, match="at all: 0 % under skvq; streaming"):
        [result] = perplexity(tiny, random_tokens, ["skvq"], n_ctx=300, chunks=1)
    assert result.sealed == 0


def test_fewer_chunks_than_asked_for_are_said(tiny: Model, random_tokens: list[int]) -> None:
    with pytest.warns(UserWarning, match=r"fills 3 chunks of 300 tokens, fewer than the 9 of --ch"):
        perplexity(tiny, random_tokens, ["f16"], n_ctx=300, chunks=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        perplexity(tiny, random_tokens, ["f16"], n_ctx=300, chunks=3)
