"""What noise in the cache of one layer does to the output, on models where that is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import write_tiny
from gguf import GGUFReader

from pykvq import Model, sensitivity
from pykvq.calibrate import profile_of, typical
from pykvq.moments import collect
from pykvq.profile import Profile, read_profile
from pykvq.sensitivity import least_tokens, sensitivities

Array = npt.NDArray[np.float64]
N_CTX = 400


@pytest.fixture(scope="module")
def profile(tiny: Model, random_tokens: list[int]) -> Profile:
    return profile_of(tiny, collect(tiny, random_tokens, n_ctx=N_CTX), "")


def test_every_layer_of_a_model_is_sensitive(
    tiny_path: Path, tiny: Model, profile: Profile, random_tokens: list[int]
) -> None:
    told: list[tuple[str, int, int]] = []
    k, v = sensitivities(
        tiny, profile, random_tokens, n_ctx=N_CTX, progress=lambda *at: told.append(at)
    )
    for found in (k, v):
        assert found.shape == (2,)
        assert found.dtype == np.float32
        assert np.isfinite(found).all()
        assert (found > 0).all()
    total = 5 * 2 * (N_CTX - 1)  # caches, chunks and the tokens of each
    assert told[-1] == ("sensitivities", total, total)
    with Model(tiny_path, kv="q8_0", n_threads=1, n_batch=7) as model:
        again = sensitivities(model, profile, random_tokens, n_ctx=N_CTX)
    assert (again[0] == k).all()
    assert (again[1] == v).all()


def test_the_numbers_do_not_depend_on_how_many_caches_memory_holds(
    tiny: Model, profile: Profile, random_tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    k, v = sensitivities(tiny, profile, random_tokens, n_ctx=N_CTX)
    with tiny.session(kv="f16", n_ctx=N_CTX, n_batch=64, kv_sinks=5, kv_window=128) as session:
        stats = session.stats
    one = stats.bytes_kv + stats.bytes_scratch
    told: list[tuple[str, int, int]] = []
    for memory, n_caches in ((0, 8), (4 * one, 6)):  # one reference more for each group
        monkeypatch.setattr(sensitivity, "_MEMORY", memory)
        again = sensitivities(
            tiny, profile, random_tokens, n_ctx=N_CTX, progress=lambda *at: told.append(at)
        )
        assert told[-1][1] == told[-1][2] == n_caches * 2 * (N_CTX - 1)
        assert (again[0] == k).all()
        assert (again[1] == v).all()


def test_a_layer_whose_attention_is_not_read_is_not_sensitive(
    tmp_path: Path, profile: Profile, random_tokens: list[int]
) -> None:
    path = write_tiny(tmp_path / "model.gguf")
    file = GGUFReader(path, "r+")
    [output] = [t for t in file.tensors if t.name == "blk.0.attn_output.weight"]
    output.data[:] = 0
    file.data.flush()
    with Model(path, n_threads=2) as model:
        k, v = sensitivities(model, profile, random_tokens, n_ctx=N_CTX)
    assert k[0] == v[0] == 0
    assert (k[1], v[1]) > (0, 0)


def test_a_unit_of_error_costs_the_same_where_keys_are_all_half_as_important(
    tiny: Model, profile: Profile, random_tokens: list[int]
) -> None:
    k, v = sensitivities(tiny, profile, random_tokens, n_ctx=N_CTX)
    halved = profile.with_arrays(k_importance=profile.arrays["k_importance"] / 2)
    doubled = sensitivities(tiny, halved, random_tokens, n_ctx=N_CTX)
    np.testing.assert_allclose(doubled[0], 2 * k, rtol=1e-3)
    assert (doubled[1] == v).all()


def test_the_noise_in_keys_has_the_logit_error_that_it_is_divided_by(
    tiny: Model, profile: Profile, random_tokens: list[int]
) -> None:
    importance = profile.arrays["k_importance"].astype(np.float64)
    losses = sensitivity._water_filled(importance, 2.0)
    moments = collect(tiny, random_tokens, n_ctx=N_CTX)
    queries = typical(moments.q[1], moments.q_read[1])
    basis = profile.arrays["k_basis"][1].astype(np.float64)
    noise = sensitivity._KeyNoise(1, basis, losses[1])
    errors = []
    for first in range(200):
        rows = np.zeros((2, 64, 64), np.float32)
        noise(1, "k", first, rows)
        errors.append(np.einsum("hta,hab,htb->h", rows, queries, rows) / 64)
    np.testing.assert_allclose(np.mean(errors, axis=0), (losses * importance)[1].sum(-1), rtol=0.02)
    for layer, side in ((0, "k"), (1, "v")):
        rows = np.zeros((2, 64, 64), np.float32)
        noise(layer, side, 5, rows)  # type: ignore[arg-type]
        assert not rows.any()


def test_the_noise_in_values_is_a_tenth_of_what_varies_in_each_token() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(0, 1, (2, 64, 64)) * np.exp(rng.normal(0, 2, (2, 64, 1)))
    values = values.astype(np.float32)
    mean = rng.normal(0, 1, (2, 64))
    basis = np.linalg.qr(rng.normal(0, 1, (2, 64, 64)))[0] * 3.0  # orthogonal but for its size
    noise = sensitivity._ValueNoise(0, basis, mean)
    varied = values - mean[:, None]
    errors = []
    for first in range(100):
        rows = values.copy()
        noise(0, "v", first, rows)
        errors.append(np.square(rows - values).sum(-1) / np.square(varied).sum(-1))
    np.testing.assert_allclose(np.mean(errors, axis=0), 0.1, rtol=0.1)


@pytest.mark.parametrize("bits", [0.5, 2.0])
def test_water_filling_spends_its_bits_where_they_help_most(bits: float) -> None:
    importance = np.geomspace(100, 0.01, 32) * np.array([[1.0], [7.0]])
    loss = sensitivity._water_filled(importance, bits)
    assert (-0.5 * np.log2(loss)).mean(axis=-1) == pytest.approx([bits, bits], rel=1e-6)
    error = loss * importance
    kept = loss < 1
    for head in (0, 1):
        line = error[head, kept[head]]
        assert np.ptp(line) < 1e-9 * line[0]
        assert (importance[head, ~kept[head]] <= line[0]).all()


def test_a_profile_that_was_calibrated_has_the_sensitivities_of_its_model(
    tiny_path: Path, tiny: Model
) -> None:
    assert tiny.profile_path is not None
    found = read_profile(tiny.profile_path).arrays
    assert len({*found["k_sensitivity"], 1.0}) == 3
    assert len({*found["v_sensitivity"].ravel(), 1.0}) == 5
    assert (found["v_sensitivity"] > 0).all()


def test_too_little_text_is_refused(tiny: Model, profile: Profile) -> None:
    assert least_tokens() == 394
    with pytest.raises(ValueError, match="n_ctx is 393, expected a whole number from 394"):
        sensitivities(tiny, profile, [1] * 1000, n_ctx=393)
    with pytest.raises(ValueError, match="The text has 399 tokens, but at least 400"):
        sensitivities(tiny, profile, [1] * 399, n_ctx=400)
