"""What calibration and research see of the cache, and change in it."""

from __future__ import annotations

import numpy as np
import pytest

from pykvq import Model

# Quantizers are simulated on the CPU alone; test_cuda_session.py checks that a GPU says so.
SIMULATED = {"n_ctx": 512, "kv_window": 64, "kv_sinks": 4, "device": "cpu"}


def _logits(model: Model, kv: str, tokens: list[int], simulate: object = None) -> np.ndarray:
    with model.session(kv=kv, **SIMULATED) as session:
        if simulate is not None:
            session.simulate(simulate)  # type: ignore[arg-type]
        for at in range(0, len(tokens), 16):
            rows = session.eval(tokens[at : at + 16])
        return rows[0]


TOKENS = [(7 * i) % 256 for i in range(320)]


def test_an_observer_sees_every_token_of_every_layer_once(tiny: Model) -> None:
    info = tiny.info
    seen: dict[int, int] = {}

    def observer(layer: int, first: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        assert first == seen.get(layer, 0)
        assert q.shape == (len(k), info.n_heads, info.d_head)
        assert k.shape == v.shape == (len(k), info.n_kv_heads, info.d_head)
        assert np.isfinite(q).all() and np.abs(k).max() > 0
        seen[layer] = first + len(k)

    with tiny.session(kv="f16", n_ctx=512) as session:
        session.observe(observer)
        session.eval(TOKENS)
    assert seen == dict.fromkeys(range(info.n_layers), len(TOKENS))


def test_a_simulator_sees_the_rows_that_an_observer_saw(tiny: Model) -> None:
    keys: dict[int, list[np.ndarray]] = {}
    blocks = 0

    def observer(layer: int, first: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        keys.setdefault(layer, []).append(k.copy())

    def simulator(layer: int, side: str, first: int, rows: np.ndarray) -> None:
        nonlocal blocks
        blocks += 1
        if side == "k":
            exact = np.concatenate(keys[layer])[first : first + rows.shape[1]]
            assert np.allclose(rows, exact.transpose(1, 0, 2), atol=2e-3 * np.abs(exact).max())

    with tiny.session(kv="f16", **SIMULATED) as session:
        session.observe(observer)
        session.simulate(simulator)
        for at in range(0, len(TOKENS), 16):
            session.eval(TOKENS[at : at + 16], "none")
        n_sealed = session.stats.n_tokens_sealed
    assert blocks == 2 * tiny.info.n_layers * n_sealed // 64 > 0


def test_what_a_simulator_leaves_is_what_later_tokens_read(tiny: Model) -> None:
    def nothing(layer: int, side: str, first: int, rows: np.ndarray) -> None:
        pass

    def no_values(layer: int, side: str, first: int, rows: np.ndarray) -> None:
        if side == "v":
            rows[:] = 0

    plain = _logits(tiny, "f16", TOKENS)
    assert np.array_equal(_logits(tiny, "f16", TOKENS, nothing), plain)
    assert np.abs(_logits(tiny, "f16", TOKENS, no_values) - plain).max() > 1e-3


def test_a_simulator_needs_an_f16_cache(tiny: Model) -> None:
    with pytest.raises(ValueError, match="simulated in a cache of the scheme f16"):
        _logits(tiny, "skvq", TOKENS, lambda *_: None)


def test_what_a_callback_raises_ends_the_evaluation(tiny: Model) -> None:
    def fails(layer: int, side: str, first: int, rows: np.ndarray) -> None:
        raise RuntimeError("a bad quantizer")

    with pytest.raises(RuntimeError, match="a bad quantizer"):
        _logits(tiny, "f16", TOKENS, fails)
