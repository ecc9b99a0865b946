"""Budgets of bits: what a plan may spend, what it spends, and how many bytes blocks then have."""

from __future__ import annotations

import math
import re

import pytest

from pykvq import Model, Session, native
from pykvq.perplexity import perplexity

#: Bytes of 16 bits in each token of a block: keys of mixed widths take a whole number of them.
UNIT = 2 * native.block_tokens()


def sealed_bytes(session: Session, tokens: list[int]) -> dict[str, list[int]]:
    """Bytes of block 0 of every layer and head, by side."""
    info = session.model.info
    session.eval(tokens, "none")
    return {
        side: [
            session.sealed_block(layer, head, side, 0).size
            for layer in range(info.n_layers)
            for head in range(info.n_kv_heads)
        ]
        for side in ("k", "v")
    }


def block_elements(model: Model) -> int:
    """Numbers of one side of a block, all layers and heads."""
    info = model.info
    return native.block_tokens() * info.n_layers * info.n_kv_heads * info.d_head


def next_step(found: dict[str, list[int]], d: int) -> int:
    """Bytes that the cheapest further step of auto takes at most."""
    # A step of keys takes a unit, and at most a byte per channel for scales.
    steps = [UNIT + d for size in found["k"] if size < 16 + 2 * d + d // 4 * UNIT]
    # Values: t1, c8, t2, n3, nf4, q8_0.
    rungs = [68 + 8 * d, 68 + 12 * d, 68 + 16 * d, 128 + 24 * d, 128 + 32 * d, 68 * d]
    assert set(found["v"]) <= set(rungs)
    steps += [rungs[rungs.index(size) + 1] - size for size in found["v"] if size < rungs[-1]]
    return min(steps)


@pytest.mark.parametrize("bits", [None, 1.3, 1.5, 1.77, 2.0, 2.5, 3.14, 4.0])
def test_auto_spends_its_budget_to_the_last_step_and_no_more(
    tiny: Model, random_tokens: list[int], bits: float | None
) -> None:
    allowed = (2.0 if bits is None else bits) / 8 * 2 * block_elements(tiny)
    with tiny.session(kv="auto", kv_bits=bits, n_ctx=400) as session:
        found = sealed_bytes(session, random_tokens[:300])
        stats = session.stats
    spent = sum(found["k"]) + sum(found["v"])
    assert allowed - next_step(found, tiny.info.d_head) < spent <= allowed
    for side, told in (("k", stats.bits_sealed_k), ("v", stats.bits_sealed_v)):
        assert told == pytest.approx(8 * sum(found[side]) / block_elements(tiny), rel=1e-12)


@pytest.mark.parametrize("kv", ["auto", "asymkv"])
def test_the_limits_that_a_refusal_names_are_accepted(tiny: Model, kv: str) -> None:
    with pytest.raises(ValueError, match="bits per element were asked for") as refused:
        tiny.session(kv=kv, kv_bits=12)
    least, most = re.findall(r"takes (\S+) to (\S+) for", str(refused.value))[0]
    for bits in (float(least), float(most)):
        with tiny.session(kv=kv, kv_bits=bits) as session:
            assert session.stats.bits_sealed <= bits


@pytest.mark.parametrize(
    ("kv", "bits", "units", "coded"),
    [
        ("svdq", None, 8, None),
        ("svdq", 0.5, 2, None),
        ("svdq", 1.5, 6, None),
        ("svdq", 4, 16, 64),
        ("svdq-1.25", None, 5, None),
        ("svdq-steps", None, 2 * 2 + 2 + 1 + 1, 40),  # 8, 4, 2 bits for 8 channels each, 1 for 16
        ("svdq-steps-1.25", None, 4 + 1, 24),  # 4 bits for 16 channels, 2 for 8
    ],
)
def test_blocks_of_svdq_have_the_bytes_of_its_schedule(
    tiny: Model,
    random_tokens: list[int],
    kv: str,
    bits: float | None,
    units: int,
    coded: int | None,
) -> None:
    with tiny.session(kv=kv, kv_bits=bits, n_ctx=400) as session:
        found = sealed_bytes(session, random_tokens[:300])
    d = tiny.info.d_head
    # A header, the means, scales of the channels that have codes, the codes.
    scales = range(16, d + 1, 16) if coded is None else [-(-coded // 16) * 16]
    assert set(found["k"]) <= {16 + d + n + units * UNIT for n in scales}
    assert set(found["v"]) == {68 + 16 * d}  # header, two bits per number


def test_every_block_of_a_head_has_the_same_bytes(tiny: Model, random_tokens: list[int]) -> None:
    with tiny.session(kv="auto", kv_bits=1.77, n_ctx=700) as session:
        session.eval(random_tokens[:600], "none")
        n = session.stats.n_tokens_sealed // native.block_tokens()
        assert n > 5
        for layer, head, side in ((0, 1, "k"), (1, 0, "v")):
            sizes = {session.sealed_block(layer, head, side, i).size for i in range(n)}  # type: ignore[arg-type]
            assert len(sizes) == 1


@pytest.mark.parametrize(
    ("kv", "bits", "sentence"),
    [
        ("auto", 0.5, r"0\.5 bits .* asked for, but the KV scheme auto takes 0\.\d+ to 6\.\d+ for"),
        ("auto", 7, r"7 bits .* asked for, but the KV scheme auto takes 0\.\d+ to 6\.\d+ for"),
        ("auto", 0.05, r"kv_bits is 0\.05, expected 0\.1 to 16\."),
        ("auto", 0, r"kv_bits is 0, expected 0\.1 to 16\."),
        ("auto", -2, r"kv_bits is -2, expected 0\.1 to 16\."),
        ("auto", 16.5, r"kv_bits is 16\.5, expected 0\.1 to 16\."),
        ("auto", math.nan, r"kv_bits is -?nan, expected 0\.1 to 16\."),
        ("auto", math.inf, r"kv_bits is inf, expected 0\.1 to 16\."),
        ("asymkv", 1.0, r"1 bits .* but the KV scheme asymkv takes 1\.\d+ to 2\.\d+ for"),
        ("svdq", 4.5, r"4\.5 bits per key element were asked for, expected 0\.25 to 4\."),
        ("svdq", 0.1, r"0\.1 bits per key element were asked for, expected 0\.25 to 4\."),
        ("svdq-steps", 2, r"bits of the KV scheme svdq-steps are fixed; choose auto"),
        ("skvq", 2, r"bits of the KV scheme skvq are fixed; choose auto"),
        ("f16", 16, r"bits of the KV scheme f16 are fixed; choose auto"),
    ],
)
def test_bits_that_cannot_be_had_are_refused(
    tiny: Model, kv: str, bits: float, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny.session(kv=kv, kv_bits=bits)


def test_perplexity_takes_a_budget(tiny: Model, random_tokens: list[int]) -> None:
    kld = []
    for bits in (1.3, 4.0):
        f16, auto = perplexity(
            tiny, random_tokens, ["f16", "auto"], n_ctx=500, kld=True, stream=True, kv_bits=bits
        )
        assert f16.bits == 16
        assert 0.95 * bits < auto.bits <= bits
        assert auto.mean_kld is not None
        kld.append(auto.mean_kld)
    assert kld[0] > 1.3 * kld[1] > 0
