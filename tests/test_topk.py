"""Selection of sealed blocks: `kv_topk`."""

from __future__ import annotations

import numpy as np
import pytest

from pykvq import Model, UnsupportedError
from pykvq.session import Session


def _filled(model: Model, tokens: list[int], kv: str, topk: int | None) -> Session:
    """On the CPU, where alone blocks are selected."""
    session = model.session(kv=kv, n_ctx=800, kv_topk=topk, device="cpu")
    session.eval(tokens[:700], "none")
    return session


@pytest.mark.parametrize("kv", ["skvq", "svdq", "auto", "asymkv"])
def test_selecting_all_blocks_changes_nothing(
    tiny: Model, random_tokens: list[int], kv: str
) -> None:
    with (
        _filled(tiny, random_tokens, kv, None) as all_,
        _filled(tiny, random_tokens, kv, 512) as top,
    ):
        assert top.stats.n_tokens_sealed == 512  # 8 blocks of 64
        np.testing.assert_array_equal(all_.eval([7]), top.eval([7]))


@pytest.mark.parametrize("kv", ["skvq", "auto"])
def test_a_token_reads_exactly_the_blocks_that_were_chosen(
    tiny: Model, random_tokens: list[int], kv: str
) -> None:
    with _filled(tiny, random_tokens, kv, 128) as session:
        before = session.eval([7])
        n_sealed = session.stats.n_tokens_sealed // 64
        for head in range(tiny.info.n_kv_heads):
            read = 0
            for number in range(n_sealed):
                values = session.sealed_block(1, head, "v", number)
                saved = values.copy()
                values[-64:] ^= 0xFF
                session.truncate(700)
                read += not np.array_equal(session.eval([7]), before)
                values[:] = saved
            assert read == 2, f"head {head} reads {read} blocks"
        session.truncate(700)
        np.testing.assert_array_equal(session.eval([7]), before)


def test_a_block_whose_mean_meets_the_query_is_chosen(
    tiny: Model, random_tokens: list[int]
) -> None:
    """Every block in turn gets a mean of the largest size, of either sign: one of them is read."""
    with _filled(tiny, random_tokens, "skvq", 64) as session:
        before = session.eval([7])
        first_mean = 8 + 64  # after three halves, two bytes and the scales of the tokens
        for number in range(4):
            keys = session.sealed_block(0, 0, "k", number)
            values = session.sealed_block(0, 0, "v", number)
            saved = keys.copy(), values.copy()
            changed = []
            for sign in (1, -1):
                means = keys[first_mean : first_mean + 64].view(np.int8)
                means[:] = sign * np.where(np.arange(64) % 3, 127, -127)
                keys[:2].view(np.float16)[:] = 1.0  # what the means are in units of
                session.truncate(700)
                plain = session.eval([7])
                values[-64:] ^= 0xFF
                session.truncate(700)
                changed.append(not np.array_equal(session.eval([7]), plain))
                keys[:], values[:] = saved
            assert any(changed)
        session.truncate(700)
        np.testing.assert_array_equal(session.eval([7]), before)


def test_statistics_tell_the_bytes_of_a_step(tiny: Model, random_tokens: list[int]) -> None:
    with (
        _filled(tiny, random_tokens, "svdq", None) as all_,
        _filled(tiny, random_tokens, "svdq", 128) as top,
    ):
        keys, values = (all_.sealed_block(0, 0, side, 0).size for side in ("k", "v"))  # type: ignore[arg-type]
        tracks = tiny.info.n_layers * tiny.info.n_kv_heads
        rows = (700 - 512) * 64 * 2
        assert all_.stats.bytes_step_k == tracks * (8 * keys + rows)
        assert all_.stats.bytes_step_v == tracks * (8 * values + rows)
        assert top.stats.bytes_step_k == tracks * (2 * keys + 6 * (64 + 2) + rows)
        assert top.stats.bytes_step_v == tracks * (2 * values + rows)
        assert (all_.stats.kv_topk, top.stats.kv_topk) == (0, 128)


def test_schemes_without_means_are_refused(tiny: Model) -> None:
    with pytest.raises(UnsupportedError, match="blocks of keys that keep their mean"):
        tiny.session(kv="q8_0", kv_topk=64)
    with pytest.raises(ValueError, match="kv_topk is -1"):
        tiny.session(kv="skvq", kv_topk=-1)
