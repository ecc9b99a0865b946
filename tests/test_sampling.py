"""The sampler chain against plain loops, hand-computed cases and, where installed, llama.cpp."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pykvq import sampling, sampling_params
from pykvq.sampling import SAMPLERS, Sampler, SamplingParams, logprob, top_logprobs

Logits = npt.NDArray[np.floating[Any]]

#: Every sampler off and the temperature neutral: the distribution is the softmax.
OFF = SamplingParams(seed=1, temp=1.0, top_k=0, top_p=1.0, min_p=0.0)
SEEDS = range(12)


def off_but(**values: Any) -> SamplingParams:
    return dataclasses.replace(OFF, **values)


def random_logits(seed: int, n: int = 30) -> Logits:
    return (np.random.default_rng(seed).standard_normal(n) * 2.5).astype(np.float32)


def text_of(token: int) -> bytes:
    return b"<%d>" % token


def result(
    params: SamplingParams,
    logits: Sequence[float] | Logits,
    history: Sequence[int] = (),
    eog_ids: Sequence[int] = (),
    token_text: Callable[[int], bytes] = text_of,
) -> dict[int, float]:
    sampler = Sampler(params, len(logits), eog_ids, token_text)
    sampler.extend(history)
    ids, probs = sampler.distribution(logits)
    assert list(probs) == sorted(probs, reverse=True)
    assert len(set(ids.tolist())) == len(ids)
    return dict(zip(ids.tolist(), probs.tolist(), strict=True))


# A second, slow implementation: dicts of id -> logit, loops, no numpy.

Plain = dict[int, float]


def plain(logits: Sequence[float] | Logits) -> Plain:
    return {i: float(x) for i, x in enumerate(logits)}


def plain_softmax(c: Plain) -> Plain:
    top = max(c.values())
    weights = {i: math.exp(x - top) for i, x in c.items()}
    return {i: w / math.fsum(weights.values()) for i, w in weights.items()}


def plain_order(c: Plain) -> list[int]:
    return sorted(c, key=lambda i: (-c[i], i))


def plain_top_k(c: Plain, k: int) -> Plain:
    return {i: c[i] for i in plain_order(c)[:k]}


def plain_top_p(c: Plain, p: float, min_keep: int = 0) -> Plain:
    probs, kept, mass = plain_softmax(c), [], 0.0
    for i in plain_order(c):
        kept.append(i)
        mass += probs[i]
        if mass >= p and len(kept) >= min_keep:
            break
    return {i: c[i] for i in kept}


def plain_min_p(c: Plain, p: float, min_keep: int = 0) -> Plain:
    probs = plain_softmax(c)
    best = max(probs.values())
    order = plain_order(c)
    return {i: c[i] for n, i in enumerate(order) if probs[i] >= p * best or n < min_keep}


def plain_typical(c: Plain, p: float, min_keep: int = 0) -> Plain:
    probs = plain_softmax(c)
    entropy = -sum(x * math.log(x) for x in probs.values())
    kept, mass = [], 0.0
    for i in sorted(c, key=lambda i: abs(-math.log(probs[i]) - entropy)):
        kept.append(i)
        mass += probs[i]
        if mass > p and len(kept) >= min_keep:
            break
    return {i: c[i] for i in kept}


def plain_top_n_sigma(c: Plain, n: float) -> Plain:
    mean = sum(c.values()) / len(c)
    sigma = math.sqrt(sum((x - mean) ** 2 for x in c.values()) / len(c))
    return {i: x for i, x in c.items() if x >= max(c.values()) - n * sigma}


def plain_xtc(c: Plain, threshold: float) -> Plain:
    probs = plain_softmax(c)
    likely = [i for i in plain_order(c) if probs[i] >= threshold]
    return {i: x for i, x in c.items() if i not in likely[:-1]}


def plain_penalties(
    c: Plain, window: Sequence[int], repeat: float, presence: float, frequency: float
) -> Plain:
    out = dict(c)
    for i, count in Counter(window).items():
        if i in out:
            out[i] = out[i] / repeat if out[i] > 0 else out[i] * repeat
            out[i] -= count * frequency + presence
    return out


def plain_dry(
    c: Plain, tokens: Sequence[int], multiplier: float, base: float, allowed: int, limit: int
) -> Plain:
    longest: dict[int, int] = {}
    for end in range(len(tokens) - 1):
        m = 0
        while m <= end and m < limit and tokens[end - m] == tokens[len(tokens) - 1 - m]:
            m += 1
        if m >= allowed:
            longest[tokens[end + 1]] = max(m, longest.get(tokens[end + 1], 0))
    return {i: x - multiplier * base ** (longest[i] - allowed) if i in longest else x
            for i, x in c.items()}  # fmt: skip


def assert_same(got: Plain, want: Plain) -> None:
    """`want` holds logits."""
    want = plain_softmax(want)
    assert set(got) == set(want)
    assert got == pytest.approx(want, rel=1e-9, abs=1e-300)


# ---------------------------------------------------------------------------------------------
# Each sampler
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_softmax_is_left_when_everything_is_off(seed: int) -> None:
    logits = random_logits(seed)
    assert_same(result(OFF, logits, history=[1, 2, 1, 2, 1]), plain(logits))


OFF_VALUES: dict[str, dict[str, Any]] = {
    "penalties": {"repeat_last_n": 0, "repeat_penalty": 1.5, "presence_penalty": 1.0},
    "dry": {"dry_multiplier": 1.0, "dry_penalty_last_n": 0},
    "top_n_sigma": {"top_n_sigma": 0.0},
    "top_k": {"top_k": -1},
    "typ_p": {"typical_p": 1.0},
    "top_p": {"top_p": 1.0},
    "min_p": {"min_p": 0.0},
    "xtc": {"xtc_probability": 1.0, "xtc_threshold": 0.51},
    "temperature": {"temp": 1.0},
}


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_off_values_leave_the_distribution_as_it_is(name: str) -> None:
    logits = random_logits(3)
    params = off_but(**OFF_VALUES[name])
    assert_same(result(params, logits, history=[1, 2, 1, 2, 1]), plain(logits))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 2, 7, 29, 30, 100])
def test_top_k_keeps_the_k_largest(seed: int, k: int) -> None:
    logits = random_logits(seed)
    assert_same(result(off_but(top_k=k), logits), plain_top_k(plain(logits), k))


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 4096, 50_000])
@pytest.mark.parametrize("k", [1, 40, 700])
def test_the_largest_of_many_are_those_of_a_stable_sort(n: int, k: int) -> None:
    logits = np.round(np.random.default_rng(n).standard_normal(n), 1)  # with many ties
    want = sorted(range(n), key=lambda i: (-logits[i], i))[:k]
    assert sampling._largest(logits, k).tolist() == want


def test_the_largest_are_found_in_a_sorted_and_in_a_mostly_banned_vocabulary() -> None:
    rising = np.arange(10_000, dtype=np.float64)
    assert sampling._largest(rising, 3).tolist() == [9999, 9998, 9997]
    banned = np.full(10_000, -np.inf)
    banned[[7, 5000]] = [1.0, 2.0]
    assert sampling._largest(banned, 3).tolist() == [5000, 7, 0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.0, 0.3, 0.8, 0.95, 0.9999])
@pytest.mark.parametrize("min_keep", [0, 4])
def test_top_p_keeps_the_fewest_that_reach_p(seed: int, p: float, min_keep: int) -> None:
    logits = random_logits(seed)
    got = result(off_but(top_p=p, min_keep=min_keep), logits)
    assert_same(got, plain_top_p(plain(logits), p, min_keep))
    after_top_k = result(off_but(top_k=10, top_p=p, min_keep=min_keep), logits)
    assert_same(after_top_k, plain_top_p(plain_top_k(plain(logits), 10), p, min_keep))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_of_a_flat_vocabulary_needs_more_than_its_first_guess(p: float) -> None:
    logits = random_logits(5, 5000) / 10
    assert_same(result(off_but(top_p=p), logits), plain_top_p(plain(logits), p))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("min_keep", [0, 6])
def test_min_p_is_relative_to_the_most_likely(seed: int, p: float, min_keep: int) -> None:
    logits = random_logits(seed)
    got = result(off_but(min_p=p, min_keep=min_keep), logits)
    assert_same(got, plain_min_p(plain(logits), p, min_keep))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.0, 0.2, 0.7, 0.99])
@pytest.mark.parametrize("min_keep", [0, 6])
def test_typ_p_keeps_what_is_near_the_entropy(seed: int, p: float, min_keep: int) -> None:
    logits = random_logits(seed)
    got = result(off_but(typical_p=p, min_keep=min_keep), logits)
    assert_same(got, plain_typical(plain(logits), p, min_keep))


def test_typ_p_can_drop_the_most_likely_token() -> None:
    # Surprises 0.51, 1.61, 1.61; entropy 0.6 * 0.51 + 0.4 * 1.61 = 0.95: token 0 is nearest.
    logits = np.log([0.6, 0.2, 0.2])
    assert set(result(off_but(typical_p=0.1), logits)) == {0}
    # Surprises 0.92 and 2.53 (12 times 0.08 - eps): entropy 1.96, so one of the rare is nearest.
    logits = np.log([0.4] + [0.05] * 12)
    assert set(result(off_but(typical_p=0.01), logits)) == {1}


def test_typ_p_takes_banned_tokens_as_infinitely_surprising() -> None:
    got = result(off_but(typical_p=0.9, logit_bias={0: -math.inf}), [9.0, 0.0, 0.0])
    assert got == pytest.approx({1: 0.5, 2: 0.5})


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [0.3, 1.0, 2.0])
def test_top_n_sigma_keeps_logits_near_the_largest(seed: int, n: float) -> None:
    logits = random_logits(seed)
    assert_same(result(off_but(top_n_sigma=n), logits), plain_top_n_sigma(plain(logits), n))


def test_top_n_sigma_does_not_count_banned_tokens() -> None:
    # Of 4, 2, 0 the standard deviation is 1.63; with any finite stand-in for the ban it would grow.
    params = off_but(top_n_sigma=1.3, logit_bias={3: -math.inf})
    assert set(result(params, [4.0, 2.0, 0.0, 1.0])) == {0, 1}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3, 0.5])
def test_xtc_leaves_the_least_likely_of_the_likely(seed: int, threshold: float) -> None:
    logits = random_logits(seed)
    got = result(off_but(xtc_probability=1.0, xtc_threshold=threshold), logits)
    assert_same(got, plain_xtc(plain(logits), threshold))


def test_xtc_respects_min_keep() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    params = off_but(xtc_probability=1.0, xtc_threshold=0.15)
    assert set(result(params, logits)) == {2, 3}
    assert set(result(dataclasses.replace(params, min_keep=3), logits)) == {0, 1, 2, 3}


def test_xtc_acts_with_its_probability() -> None:
    sampler = Sampler(off_but(xtc_probability=0.25), 2)
    n_acted = sum(sampler.sample([3.0, 3.0 + math.log(2)]) == 0 for _ in range(4000))
    # Token 1 is twice as likely; XTC removes it: 1/4 + 3/4 * 1/3 = 1/2.
    assert n_acted / 4000 == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("temp", [0.1, 0.8, 1.7])
def test_temperature_divides_the_logits(temp: float) -> None:
    logits = random_logits(1)
    assert_same(result(off_but(temp=temp), logits), {i: x / temp for i, x in plain(logits).items()})


def test_a_tiny_temperature_is_nearly_greedy_and_never_nan() -> None:
    assert result(off_but(temp=1e-300), [1e30, -1e30, 1.0]) == {0: 1.0}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("last_n", [-1, 5, 64])
@pytest.mark.parametrize(
    "values", [(1.3, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, 0.4), (0.9, -1, 1)]
)
def test_penalties_touch_the_tokens_of_the_window(
    seed: int, last_n: int, values: tuple[float, float, float]
) -> None:
    repeat, presence, frequency = values
    logits = random_logits(seed)
    history = np.random.default_rng(seed).integers(0, 12, 40).tolist()
    window = history if last_n < 0 else history[-last_n:]
    params = off_but(
        repeat_last_n=last_n,
        repeat_penalty=repeat,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    want = plain_penalties(plain(logits), window, repeat, presence, frequency)
    assert_same(result(params, logits, history), want)
    after_top_k = dataclasses.replace(params, top_k=9, samplers=("top_k", "penalties", "top_p"))
    want = plain_penalties(plain_top_k(plain(logits), 9), window, repeat, presence, frequency)
    assert_same(result(after_top_k, logits, history), want)


def test_repeat_penalty_by_hand() -> None:
    params = off_but(repeat_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    got = result(params, [3.0, -3.0, 0.0, 1.0], history=[0, 1, 1])
    assert_same(got, {0: 1.5 - 0.75, 1: -6.0 - 1.25, 2: 0.0, 3: 1.0})


def test_top_p_after_penalties_sorts_again() -> None:
    params = off_but(
        top_k=3, presence_penalty=5.0, top_p=0.5, samplers=("top_k", "penalties", "top_p")
    )
    assert set(result(params, [3.0, 2.9, 0.0, -9.0], history=[0])) == {1}


# ---------------------------------------------------------------------------------------------
# DRY
# ---------------------------------------------------------------------------------------------


def test_dry_by_hand() -> None:
    # After 1 2 3 ... 1 2 3 the token 4 would continue a repetition of 3 tokens, 9 one of 2.
    history = [1, 2, 3, 4, 5, 2, 3, 9, 6, 1, 2, 3]
    params = off_but(dry_multiplier=0.5, dry_base=3.0, dry_allowed_length=2)
    want = {i: 0.0 for i in range(12)} | {4: -0.5 * 3.0, 9: -0.5}
    assert_same(result(params, [0.0] * 12, history), want)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("allowed", [0, 1, 2, 4])
@pytest.mark.parametrize("last_n", [-1, 1, 30])
def test_dry_finds_every_repetition(seed: int, allowed: int, last_n: int) -> None:
    logits = random_logits(seed)
    history = np.random.default_rng(seed).integers(0, 3, 90).tolist()
    window = history if last_n < 0 else history[-last_n:]
    params = off_but(
        dry_multiplier=0.8,
        dry_allowed_length=allowed,
        dry_penalty_last_n=last_n,
        dry_sequence_breakers=(),
    )
    want = plain_dry(plain(logits), window, 0.8, 1.75, allowed, limit=len(window))
    assert_same(result(params, logits, history), want)


def test_dry_does_not_match_across_a_breaker() -> None:
    pieces = {0: b"a", 1: b"b", 2: b"c", 3: b"say:", 4: b"\n ", 5: b"<th", 6: b"ink>", 7: b"k>"}
    params = off_but(dry_multiplier=1.0, dry_base=2.0, dry_allowed_length=1)

    def penalized(history: list[int], *breakers: str) -> Plain:
        p = dataclasses.replace(params, dry_sequence_breakers=breakers)
        got = result(p, [0.0] * 8, history, token_text=lambda t: pieces[t])
        free = max(got.values())
        return {t: round(math.log(x / free), 9) for t, x in got.items() if x < free}

    history = [3, 0, 1, 2, 3, 0, 1]
    assert penalized(history) == {2: -4.0}  # length 3
    assert penalized(history, ":") == {2: -2.0}  # "say:" ends it: length 2
    assert penalized(history, "z", "\n") == {2: -4.0}
    # A breaker that is spread over two tokens, and one cut in another way, are seen as well.
    assert penalized([5, 6, 0, 1, 5, 6, 0], "<think>") == {1: -1.0}
    assert penalized([5, 6, 0, 1, 5, 6, 0]) == {1: -4.0}
    assert penalized([5, 7, 0, 1, 5, 7, 0], "hk") == {1: -2.0 / 2}
    # Neither is a breaker that would come next penalized.
    assert penalized([0, 3, 0]) == {3: -1.0}
    assert penalized([0, 3, 0], ":") == {}
    # Right after a breaker nothing is a repetition.
    assert penalized([3, 0, 3], ":") == {}
    assert penalized([3, 0, 3]) == {0: -1.0}


def test_dry_sees_a_breaker_in_the_prompt_and_in_single_tokens_alike() -> None:
    params = off_but(dry_multiplier=1.0, dry_sequence_breakers=("<1>",))
    history = [1, 2, 3, 4, 1, 2, 3]
    at_once = Sampler(params, 8, token_text=text_of)
    at_once.extend(history)
    one_by_one = Sampler(params, 8, token_text=text_of)
    for token in history:
        one_by_one.accept(token)
    logits = [0.0] * 8
    assert at_once.distribution(logits)[1].tolist() == one_by_one.distribution(logits)[1].tolist()
    assert result(params, logits, history)[4] < result(OFF, logits)[4]


def test_dry_penalty_stays_finite_in_an_endless_loop() -> None:
    params = off_but(dry_multiplier=1.0, dry_sequence_breakers=())
    got = result(params, [0.0, 0.0], history=[1] * 5000)
    assert got == {0: 1.0}


def test_dry_without_token_text_is_refused() -> None:
    with pytest.raises(ValueError, match="token_text"):
        Sampler(SamplingParams(dry_multiplier=1.0), 8)
    Sampler(SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=()), 8)
    Sampler(SamplingParams(dry_multiplier=0.0), 8)


# ---------------------------------------------------------------------------------------------
# The chain
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_default_chain_runs_in_the_order_of_llama_cpp(seed: int) -> None:
    logits = random_logits(seed, 300)
    c = plain_top_k(plain(logits), 40)
    c = plain_min_p(plain_top_p(c, 0.95), 0.05)
    assert_same(result(SamplingParams(), logits), {i: x / 0.8 for i, x in c.items()})


def test_the_order_of_samplers_is_that_of_the_parameters() -> None:
    logits = np.log([0.5, 0.3, 0.2])
    first = off_but(temp=4.0, min_p=0.5, samplers=("temperature", "min_p"))
    last = off_but(temp=4.0, min_p=0.5, samplers=("min_p", "temperature"))
    assert set(result(first, logits)) == {0, 1, 2}  # (0.2 / 0.5) ** (1 / 4) = 0.80
    assert set(result(last, logits)) == {0, 1}
    assert len(result(off_but(min_p=0.5, samplers=()), logits)) == 3


def test_logit_bias_comes_first_and_bans() -> None:
    params = off_but(top_k=2, logit_bias={2: 5.0, 0: -math.inf})
    assert_same(result(params, [9.0, 1.0, 0.0, 0.5]), {2: 5.0, 1: 1.0})


def test_ignore_eos_bans_the_end_tokens() -> None:
    params = off_but(ignore_eos=True, logit_bias={1: 1.0})
    assert_same(result(params, [9.0, 1.0, 9.0], eog_ids=[0, 2]), {1: 2.0})
    with pytest.raises(ValueError, match="eog_ids"):
        Sampler(params, 3)


def test_banning_every_token_is_an_error() -> None:
    sampler = Sampler(off_but(logit_bias={0: -math.inf, 1: -math.inf}), 2)
    with pytest.raises(ValueError, match="bans every token"):
        sampler.sample([0.0, 0.0])


@pytest.mark.parametrize("temp", [0.0, -1.0])
def test_greedy_is_the_largest_logit_after_bias_and_penalties(temp: float) -> None:
    greedy = SamplingParams(temp=temp, xtc_probability=1.0, typical_p=0.01)
    assert result(greedy, [1.0, 3.0, 2.0]) == {1: 1.0}
    biased = dataclasses.replace(greedy, logit_bias={0: 9.0})
    assert result(biased, [1.0, 3.0, 2.0]) == {0: 1.0}
    penalized = dataclasses.replace(greedy, presence_penalty=2.0)
    assert result(penalized, [1.0, 3.0, 2.0], history=[1]) == {2: 1.0}
    assert Sampler(greedy, 3).sample([1.0, 3.0, 2.0]) == 1


def test_greedy_takes_the_first_of_equal_logits() -> None:
    assert Sampler(SamplingParams(temp=0.0), 4).sample([1.0, 2.0, 2.0, 2.0]) == 1


# ---------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------


def test_draws_follow_the_distribution() -> None:
    logits = np.log([0.5, 0.25, 0.15, 0.1]).astype(np.float32)
    sampler = Sampler(off_but(), 4)
    counts = Counter(sampler.sample(logits) for _ in range(20_000))
    for token, p in enumerate([0.5, 0.25, 0.15, 0.1]):
        assert counts[token] / 20_000 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 20_000))


def test_the_same_seed_gives_the_same_ids() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(seed=seed, temp=2.0), 300)
        return [sampler.sample(random_logits(step, 300)) for step in range(50)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_reset_repeats_the_draws_and_forgets_the_history() -> None:
    params = SamplingParams(temp=2.0, presence_penalty=1.0)  # seed -1
    sampler = Sampler(params, 300)

    def draw() -> list[int]:
        drawn = []
        for step in range(30):
            drawn.append(sampler.sample(random_logits(step, 300)))
            sampler.accept(drawn[-1])
        return drawn

    first = draw()
    sampler.reset()
    assert draw() == first
    again = Sampler(dataclasses.replace(params, seed=sampler.seed), 300)
    assert again.sample(random_logits(0, 300)) == first[0]


def test_seed_minus_one_is_a_new_seed_each_time() -> None:
    assert len({Sampler(SamplingParams(), 4).seed for _ in range(4)}) > 1


def test_distribution_foretells_the_draw_and_uses_no_random_number() -> None:
    params = off_but(seed=3, xtc_probability=0.5, xtc_threshold=0.2)
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    asked, unasked = Sampler(params, 4), Sampler(params, 4)
    sizes = set()
    for _ in range(40):
        ids, _ = asked.distribution(logits)
        sizes.add(len(ids))
        drawn = asked.sample(logits)
        assert drawn in ids
        assert drawn == unasked.sample(logits)
    assert sizes == {2, 4}


def test_banned_tokens_are_never_drawn() -> None:
    sampler = Sampler(off_but(logit_bias={0: -math.inf, 3: -math.inf}), 4)
    assert {sampler.sample([5.0, 1.0, 1.0, 5.0]) for _ in range(200)} == {1, 2}


def test_logits_are_not_changed() -> None:
    logits = random_logits(0)
    before = logits.copy()
    sampler = Sampler(SamplingParams(logit_bias={1: 3.0}, repeat_penalty=1.5), 30)
    sampler.accept(2)
    sampler.sample(logits)
    assert np.array_equal(logits, before)


# ---------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------

NAN = math.nan


BAD_VALUES: dict[str, list[Any]] = {
    "seed": [-2, 1.5],
    "temp": [NAN, math.inf, "hot"],
    "top_k": [-2, 3.0, True],
    "top_p": [-0.1, 1.1, NAN],
    "min_p": [2, NAN],
    "typical_p": [-1],
    "top_n_sigma": [NAN],
    "xtc_probability": [1.5],
    "xtc_threshold": [-0.1],
    "repeat_last_n": [-2],
    "repeat_penalty": [0.0, NAN],
    "presence_penalty": [math.inf],
    "frequency_penalty": [None],
    "dry_multiplier": [-1.0],
    "dry_base": [0.5],
    "dry_allowed_length": [-1],
    "dry_penalty_last_n": [-2],
    "dry_sequence_breakers": ["a", ("",), (b"x",), 3],
    "logit_bias": [[1], {-1: 0.0}, {1: NAN}, {1: math.inf}, {1: "x"}, {"a": 1.0}],
    "ignore_eos": [1],
    "min_keep": [-1],
    "samplers": ["top_k", ("top_q",)],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values]
)
def test_a_bad_value_is_named_in_the_error(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"The sampling parameter {name}.*\.$"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_every_field_has_a_rule_and_every_sampler_a_place_in_the_default_chain() -> None:
    assert {f.name for f in dataclasses.fields(SamplingParams)} == set(sampling_params._RULES)
    assert set(BAD_VALUES) == set(sampling_params._RULES)
    assert SamplingParams().samplers == tuple(SAMPLERS)


def test_values_are_taken_over_in_their_own_type() -> None:
    params = SamplingParams(
        top_k=np.int32(3),  # type: ignore[arg-type]
        temp=1,
        samplers=["top_k"],  # type: ignore[arg-type]
        logit_bias={np.int64(3): 1},  # type: ignore[dict-item]
    )
    assert [type(v) for v in (params.top_k, params.temp, params.samplers)] == [int, float, tuple]
    assert params.logit_bias == {3: 1.0}
    assert hash(params) == hash(dataclasses.replace(params))


@pytest.mark.parametrize("logits", [[0.0, NAN], [0.0, math.inf], [-math.inf] * 2, [[0.0, 1.0]], []])
def test_damaged_logits_are_refused(logits: Any) -> None:
    for call in (
        lambda: Sampler(SamplingParams(), 2).sample(logits),
        lambda: Sampler(SamplingParams(), 2).distribution(logits),
        lambda: logprob(logits, 0),
        lambda: top_logprobs(logits, 1),
    ):
        with pytest.raises(ValueError, match=r"logit.*\.$"):
            call()


def test_ids_and_sizes_outside_of_the_vocabulary_are_refused() -> None:
    sampler = Sampler(SamplingParams(), 4)
    with pytest.raises(ValueError, match="There are 3 logits, but the vocabulary has 4"):
        sampler.sample([0.0] * 3)
    for bad in (-1, 4):
        with pytest.raises(ValueError, match=f"token id {bad} in accept"):
            sampler.accept(bad)
    with pytest.raises(ValueError, match="token id 9 in extend"):
        sampler.extend([1, 9])
    with pytest.raises(ValueError, match="token id 4 in logit_bias"):
        Sampler(SamplingParams(logit_bias={4: 1.0}), 4)
    with pytest.raises(ValueError, match="token id 5 in eog_ids"):
        Sampler(SamplingParams(ignore_eos=True), 4, eog_ids=[5])
    with pytest.raises(ValueError, match="0 tokens"):
        Sampler(SamplingParams(), 0)
    with pytest.raises(ValueError, match="token id 4"):
        logprob([0.0] * 4, 4)
    with pytest.raises(ValueError, match="-1"):
        top_logprobs([0.0] * 4, -1)


# ---------------------------------------------------------------------------------------------
# Log-probabilities
# ---------------------------------------------------------------------------------------------


def test_logprobs_are_the_log_softmax_of_the_raw_logits() -> None:
    logits = random_logits(2, 200) * 10 + 500
    total = math.fsum(math.exp(float(x) - 500) for x in logits)
    want = {i: float(x) - 500 - math.log(total) for i, x in enumerate(logits)}
    assert logprob(logits, 17) == pytest.approx(want[17], rel=1e-12)
    got = top_logprobs(logits, 5)
    assert [i for i, _ in got] == sorted(want, key=lambda i: -want[i])[:5]
    assert [x for _, x in got] == pytest.approx([want[i] for i, _ in got], rel=1e-12)
    assert top_logprobs(logits, 0) == []
    assert len(top_logprobs(logits, 1000)) == 200


# ---------------------------------------------------------------------------------------------
# llama.cpp itself
# ---------------------------------------------------------------------------------------------


def llama_penalties(lib: Any, *args: float) -> Any:
    """Newer releases want the size of the vocabulary first."""
    make = lib.llama_sampler_init_penalties
    return make(*(120, *args)[-len(make.argtypes) :])


LLAMA_CASES: dict[str, tuple[dict[str, Any], Callable[[Any], list[Any]]]] = {
    "top_k": ({"top_k": 7}, lambda lib: [lib.llama_sampler_init_top_k(7)]),
    "top_p": ({"top_p": 0.7}, lambda lib: [lib.llama_sampler_init_top_p(0.7, 0)]),
    "min_p": ({"min_p": 0.1}, lambda lib: [lib.llama_sampler_init_min_p(0.1, 0)]),
    "typ_p": ({"typical_p": 0.6}, lambda lib: [lib.llama_sampler_init_typical(0.6, 0)]),
    "sigma": ({"top_n_sigma": 1.2}, lambda lib: [lib.llama_sampler_init_top_n_sigma(1.2)]),
    "xtc": (
        {"xtc_probability": 1.0, "xtc_threshold": 0.15},
        lambda lib: [lib.llama_sampler_init_xtc(1.0, 0.15, 0, 1)],
    ),
    "temp": ({"temp": 0.6}, lambda lib: [lib.llama_sampler_init_temp(0.6)]),
    "penalties": (
        {"repeat_last_n": 10, "repeat_penalty": 1.4, "frequency_penalty": 0.3,
         "presence_penalty": 0.2},
        lambda lib: [llama_penalties(lib, 10, 1.4, 0.3, 0.2)],
    ),
    "min_keep": (
        {"min_keep": 5, "typical_p": 0.05, "top_p": 0.05, "min_p": 0.99},
        lambda lib: [
            lib.llama_sampler_init_typical(0.05, 5),
            lib.llama_sampler_init_top_p(0.05, 5),
            lib.llama_sampler_init_min_p(0.99, 5),
        ],
    ),
    "default": (
        {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temp": 0.8},
        lambda lib: [
            lib.llama_sampler_init_top_k(40),
            lib.llama_sampler_init_top_p(0.95, 0),
            lib.llama_sampler_init_min_p(0.05, 0),
            lib.llama_sampler_init_temp(0.8),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(LLAMA_CASES))
def test_the_distribution_is_that_of_llama_cpp(case: str) -> None:
    llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    values, make = LLAMA_CASES[case]
    for seed in SEEDS:
        logits = random_logits(seed, 120)
        history = np.random.default_rng(seed).integers(0, 20, 40).tolist()
        rows = (llama.llama_token_data * 120)(
            *(llama.llama_token_data(i, float(x), 0.0) for i, x in enumerate(logits))
        )
        array = llama.llama_token_data_array(rows, 120, -1, False)
        for sampler in make(llama):
            for token in history:
                llama.llama_sampler_accept(sampler, token)
            llama.llama_sampler_apply(sampler, ctypes.byref(array))
            llama.llama_sampler_free(sampler)
        left = {array.data[i].id: array.data[i].logit for i in range(array.size)}
        want = plain_softmax({i: x for i, x in left.items() if x > -math.inf})
        assert result(off_but(**values), logits, history) == pytest.approx(want, rel=2e-5)
