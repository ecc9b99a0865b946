"""From moments to a profile, its file, where it is found, and the command that makes it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import write_tiny
from gguf import GGUFReader, GGUFWriter

from pykvq import KvqError, Model, ModelError, catalogue
from pykvq.calibrate import calibrate, key_basis, key_order, profile_of, value_basis
from pykvq.cli import main
from pykvq.eval.rope import Rotation
from pykvq.moments import Rope, collect
from pykvq.profile import SLOTS, Profile, beside, find_profile, read_profile, write_profile

Array = npt.NDArray[np.float64]
Capture = pytest.CaptureFixture[str]

TEXT = "The cat and the dog sat in the house, and the rain fell on the roof of the barn. " * 60


@pytest.fixture(scope="module")
def profile(tiny: Model) -> Profile:
    return calibrate(tiny, [("cats.txt", TEXT)], n_tokens=1000, n_ctx=250)


@pytest.fixture
def clear_cards() -> object:
    catalogue.cards.cache_clear()
    yield
    catalogue.cards.cache_clear()


def samples(rng: np.random.Generator, n: int, d: int, mean: float = 0.0) -> Array:
    """[n, d] correlated numbers of very different sizes."""
    mixed = rng.normal(size=(n, d)) * np.geomspace(10, 0.3, d)
    return mean + mixed @ np.linalg.qr(rng.normal(size=(d, d)))[0]


# ---- the mathematics ------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5])
def test_the_importance_of_a_channel_is_the_logit_error_of_dropping_it(power: float) -> None:
    rng = np.random.default_rng(4)
    d = 16
    keys, queries = samples(rng, 400, d), samples(rng, 300, d, mean=2.0)
    c, s = keys.T @ keys / 400, queries.T @ queries / 300 / d
    basis, importance = key_basis(c, s, power=power, shrinkage=0)
    np.testing.assert_allclose(basis @ c @ basis.T, np.eye(d), atol=1e-9)
    assert (np.diff(importance) <= 0).all()
    latent = keys @ basis.T
    np.testing.assert_allclose((latent**2).mean(axis=0), 1, rtol=1e-9)
    inverse = np.linalg.inv(basis)
    for channel in range(d):
        dropped = latent.copy()
        dropped[:, channel] = 0
        change = (queries @ (keys - dropped @ inverse.T).T) / np.sqrt(d)
        assert importance[channel] == pytest.approx((change**2).mean(), rel=1e-9)


def test_at_half_power_dropping_channels_costs_the_least_that_any_projection_does() -> None:
    rng = np.random.default_rng(5)
    d, kept = 16, 5
    keys, queries = samples(rng, 400, d), samples(rng, 300, d)
    c, s = keys.T @ keys / 400, queries.T @ queries / 300 / d
    logits = queries @ keys.T / np.sqrt(d)
    best = (np.linalg.svd(logits, compute_uv=False)[kept:] ** 2).sum() / logits.size
    _, importance = key_basis(c, s, power=0.5, shrinkage=0)
    assert importance[kept:].sum() == pytest.approx(best, rel=1e-6)
    _, other = key_basis(c, s, power=0.0, shrinkage=0)
    assert other[kept:].sum() > 1.01 * best


def test_shrinking_keeps_directions_that_no_key_took_finite() -> None:
    rng = np.random.default_rng(6)
    keys = samples(rng, 400, 16)
    keys[:, :4] = 0
    c, s = keys.T @ keys / 400, np.eye(16)
    basis, importance = key_basis(c, s, shrinkage=1e-2)
    shrunk = c + 1e-2 * np.trace(c) / 16 * np.eye(16)
    np.testing.assert_allclose(basis @ shrunk @ basis.T, np.eye(16), atol=1e-9)
    assert (importance > 0).all()
    off, nothing = key_basis(np.zeros((16, 16)), np.zeros((16, 16)))
    assert np.isfinite(off).all()
    assert np.isfinite(nothing).all()


def even_error(basis: Array, values: Array, output: Array) -> float:
    """What an error in proportion to a row's size, even in all channels, costs the output."""
    inverse = np.linalg.inv(basis)
    size, cost = np.trace(basis @ values @ basis.T), np.trace(inverse.T @ output @ inverse)
    return float(size * cost / len(basis))


def value_moments(rng: np.random.Generator, d: int) -> tuple[Array, Array]:
    values, weights = samples(rng, 400, d), samples(rng, 300, d)
    return values.T @ values / 400, weights.T @ weights


def test_the_basis_of_values_is_the_geometric_mean() -> None:
    d = 16
    c, g = value_moments(np.random.default_rng(8), d)
    basis = value_basis(c, g, shrinkage=0)
    x = basis.T @ basis
    found = x @ c @ x
    np.testing.assert_allclose(found * np.trace(g) / np.trace(found), g, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(basis @ np.linalg.inv(basis), np.eye(d), atol=1e-9)
    assert np.square(basis).mean() == pytest.approx(1 / d)


def test_no_other_basis_of_values_errs_less_than_its_own() -> None:
    rng = np.random.default_rng(9)
    d = 16
    c, g = value_moments(rng, d)
    basis = value_basis(c, g, shrinkage=0)
    least = even_error(basis, c, g)
    orthogonal = np.linalg.qr(rng.normal(size=(d, d)))[0]  # as a Hadamard is
    assert least < 0.8 * even_error(orthogonal, c, g)
    assert even_error(orthogonal @ basis, c, g) == pytest.approx(least)
    for _ in range(50):
        near = basis @ (np.eye(d) + 0.02 * rng.normal(size=(d, d)))
        assert even_error(near, c, g) > least


def test_no_channel_of_values_stands_out() -> None:
    d = 16
    c, g = value_moments(np.random.default_rng(10), d)
    basis = value_basis(c, g, shrinkage=0)
    stretched = np.diag(basis @ c @ basis.T)
    assert stretched.max() <= 2 * stretched.mean() * (1 + 1e-9)
    assert np.diag(c).max() > 2 * np.diag(c).mean()


def test_even_values_need_no_basis_but_a_rotation() -> None:
    basis = value_basis(3 * np.eye(16), 5 * np.eye(16))
    np.testing.assert_allclose(basis @ basis.T, np.eye(16), atol=1e-9)


def test_the_order_of_keys_is_a_permutation_of_pairs_by_radius(
    tiny: Model, tiny_qwen2: Model
) -> None:
    for model, partner in ((tiny, 1), (tiny_qwen2, 8)):
        d = model.info.d_head
        pairs = Rope.of(model).pairs(d)
        variance = np.random.default_rng(7).uniform(0, 1, (3, d))
        residual = np.stack([np.diag(row) for row in variance])
        order = key_order(residual, pairs)
        assert (np.sort(order, axis=1) == np.arange(d)).all()
        assert (order[:, 1::2] - order[:, 0::2] == partner).all()
        ordered = np.take_along_axis(variance, order, axis=1)
        radii = ordered[:, 0::2] + ordered[:, 1::2]
        assert (np.diff(radii, axis=1) <= 0).all()
        assert len({tuple(row) for row in order}) == 3


def test_channels_that_are_not_rotated_form_pairs_too(tmp_path: Path) -> None:
    extra: dict[str, object] = {"qwen2.rope.dimension_count": 4}
    with Model(write_tiny(tmp_path / "m.gguf", "qwen2", d_head=8, extra=extra)) as model:
        pairs = Rope.of(model).pairs(8)
    assert pairs.tolist() == [[0, 2], [1, 3], [4, 5], [6, 7]]


# ---- calibration ----------------------------------------------------------------------------


def test_latent_keys_of_the_text_have_unit_variance(tiny: Model, profile: Profile) -> None:
    ids = tiny.tokenize(TEXT)[:1000]
    rotation = Rotation(tiny)
    keys: dict[int, list[Array]] = {0: [], 1: []}
    with tiny.session(kv="f16", n_ctx=250) as session:
        session.observe(lambda layer, first, q, k, v: keys[layer].append(k.astype(np.float64)))
        for at in range(0, 1000, 250):
            session.reset()
            session.eval(ids[at : at + 250], "none")
    for layer, chunks in keys.items():
        for head in range(2):
            constant = np.tile(profile.arrays["k_wave"][layer, head].astype(np.float64), (250, 1))
            wave = rotation.rotate(constant, 0)
            flat = [chunk[:, head] - wave for chunk in chunks]
            mean = np.mean([keys[5:] for keys in flat], axis=(0, 1))
            np.testing.assert_allclose(profile.arrays["k_mean"][layer, head], mean, atol=1e-5)
            blocks = [keys[at : at + 64] for keys in flat for at in (5, 69, 133)]
            residual = np.concatenate([block - block.mean(axis=0) for block in blocks])
            basis = profile.arrays["k_basis"][layer, head].astype(np.float64)
            latent = residual @ basis.T
            second = latent.T @ latent / len(latent)
            # The text is one sentence over and over: what it hardly shows is shrunk.
            assert np.abs(second - np.diag(np.diag(second))).max() < 0.5
            assert 0.9 < np.diag(second)[0] < 1.01
            assert np.diag(second).max() < 1.01


def test_the_same_input_gives_the_same_bytes(
    tiny_path: Path, profile: Profile, tmp_path: Path
) -> None:
    write_profile(tmp_path / "a", profile)
    with Model(tiny_path, kv="q8_0", n_threads=1, n_batch=32) as model:
        again = calibrate(model, [("cats.txt", TEXT)], n_tokens=1000, n_ctx=250)
    write_profile(tmp_path / "b", again)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_profile_says_what_it_was_made_of(tiny: Model, profile: Profile) -> None:
    assert profile.model == tiny.info.name
    assert profile.fingerprint == tiny.fingerprint
    assert profile.n_tokens == 4 * 245
    assert profile.texts == f"{hashlib.sha256(TEXT.encode()).hexdigest()}  cats.txt"
    importance = profile.arrays["k_importance"]
    assert (np.diff(importance, axis=-1) <= 0).all()
    assert (importance[..., -1] > 0).all()


def test_each_text_gives_the_same_number_of_tokens(tiny: Model) -> None:
    other = "in the end and the other " * 200
    both = calibrate(
        tiny, [("a", TEXT), ("b", other)], n_tokens=1100, n_ctx=250, sensitivity_chunks=0
    )
    tokens = tiny.tokenize(TEXT)[:500] + tiny.tokenize(other)[:500]
    expected = profile_of(tiny, collect(tiny, tokens, n_ctx=250), both.texts)
    assert both.n_tokens == 4 * 245
    assert [line[66:] for line in both.texts.split("\n")] == ["a", "b"]
    for name, array in both.arrays.items():
        assert (array == expected.arrays[name]).all()


def test_sensitivities_are_measured_on_the_last_chunks_of_each_text(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [("a", TEXT), ("b", "in the end and the other " * 200)]
    asked: list[tuple[list[int], int]] = []

    def measured(
        model: Model, profile: Profile, tokens: list[int], *, n_ctx: int, progress: object
    ) -> tuple[Array, Array]:
        asked.append((tokens, n_ctx))
        assert (profile.arrays["k_sensitivity"] == 1).all()
        return np.float32([3, 4]), np.float32([5, 0])

    monkeypatch.setattr("pykvq.calibrate.sensitivities", measured)
    monkeypatch.setattr("pykvq.calibrate.SENSITIVITY_CONTEXT", 400)
    a, b = (tiny.tokenize(text)[:1000] for _, text in texts)
    for n_chunks, tokens in (
        (1, a[600:]),
        (3, a[600:] + b[600:] + a[200:600]),
        (9, a[600:] + b[600:] + a[200:600] + b[200:600]),
    ):
        found = calibrate(tiny, texts, n_tokens=2000, n_ctx=250, sensitivity_chunks=n_chunks)
        assert asked.pop() == (tokens, 400)
    assert found.arrays["k_sensitivity"].tolist() == [3, 4]
    v = found.arrays["v_sensitivity"]
    np.testing.assert_allclose(v.sum(axis=-1), [5, 0], rtol=1e-6)
    read = collect(tiny, a + b, n_ctx=250).v_read[0]
    n_heads, d = len(read), read.shape[-1]
    w = tiny.tensor("blk.0.attn_output.weight").reshape(
        -1, n_heads, tiny.info.n_heads // n_heads, d
    )
    error = np.array(
        [
            even_error(found.arrays["v_basis"][0, h].astype(np.float64), read[h], gram)
            for h, gram in enumerate(np.einsum("ehgc,ehgd->hcd", w, w))
        ]
    )
    np.testing.assert_allclose(v[0], 5 * error / error.sum(), rtol=1e-4)


def test_texts_that_are_too_short_are_reported(tiny: Model) -> None:
    n = len(tiny.tokenize("and the " * 200))
    with pytest.warns(UserWarning, match=f"The text short has {n} tokens, of which 400 are used"):
        found = calibrate(
            tiny, [("short", "and the " * 200), ("long", TEXT)], n_tokens=1000, n_ctx=100
        )
    assert found.n_tokens == 9 * 95
    with pytest.raises(ValueError, match=r"300 tokens of each text, .* expected at least 394"):
        calibrate(tiny, [("a", TEXT)], n_tokens=300, n_ctx=100)
    with pytest.raises(ValueError, match="sensitivity_chunks is -1, expected a whole number from"):
        calibrate(tiny, [("a", TEXT)], sensitivity_chunks=-1)
    with pytest.raises(ValueError, match="The text short has 1 tokens, but at least 100"):
        calibrate(tiny, [("short", "a")], n_tokens=100, n_ctx=100)
    with pytest.raises(ValueError, match="There is no text"):
        calibrate(tiny, [])
    with pytest.raises(ValueError, match="4000 tokens were asked for, expected at least 4096"):
        calibrate(tiny, [("a", TEXT), ("b", TEXT)], n_tokens=4000)


# ---- the file -------------------------------------------------------------------------------


def test_a_profile_comes_back_from_its_file(profile: Profile, tmp_path: Path) -> None:
    searched = profile.with_arrays(k_sensitivity=np.array([0.5, 0.75], np.float32))
    write_profile(tmp_path / "p.gguf", searched)
    assert os.listdir(tmp_path) == ["p.gguf"]
    found = read_profile(tmp_path / "p.gguf")
    for name in ("name", "model", "fingerprint", "n_tokens", "texts"):
        assert getattr(found, name) == getattr(profile, name)
    for slot in SLOTS:
        assert (found.arrays[slot.name] == searched.arrays[slot.name]).all()
    assert found.arrays["k_sensitivity"].tolist() == [0.5, 0.75]


def test_tensors_of_the_file_have_ggml_shapes(profile: Profile, tmp_path: Path) -> None:
    write_profile(tmp_path / "p.gguf", profile)
    file = GGUFReader(tmp_path / "p.gguf")
    shapes = {t.name: (t.tensor_type.name, t.shape.tolist()) for t in file.tensors}
    assert shapes == {
        **{f"blk.{layer}.k_basis": ("F16", [64, 64, 2]) for layer in (0, 1)},
        **{f"blk.{layer}.k_mean": ("F32", [64, 2]) for layer in (0, 1)},
        **{f"blk.{layer}.k_wave": ("F32", [64, 2]) for layer in (0, 1)},
        **{f"blk.{layer}.v_basis": ("F16", [64, 64, 2]) for layer in (0, 1)},
        **{f"blk.{layer}.v_mean": ("F32", [64, 2]) for layer in (0, 1)},
        **{f"blk.{layer}.k_importance": ("F32", [64, 2]) for layer in (0, 1)},
        **{f"blk.{layer}.k_order": ("I16", [64, 2]) for layer in (0, 1)},
        "kvq.k_sensitivity": ("F32", [2]),
        "kvq.v_sensitivity": ("F32", [2, 2]),
    }
    [basis] = [t for t in file.tensors if t.name == "blk.1.k_basis"]
    row = np.frombuffer(basis.data.tobytes(), np.float16)[64 * 64 : 64 * 64 + 64]
    assert (row == profile.arrays["k_basis"][1, 1, 0]).all()
    entries = {
        key: field.contents() for key, field in file.fields.items() if key.startswith("kvq.")
    }
    assert entries == {
        "kvq.profile.version": 1,
        "kvq.profile.fingerprint": profile.fingerprint,
        "kvq.profile.model": "tiny llama",
        "kvq.profile.n_tokens": 980,
        "kvq.profile.texts": profile.texts,
        "kvq.profile.layers": 2,
        "kvq.profile.kv_heads": 2,
        "kvq.profile.d_head": 64,
    }
    assert file.fields["general.architecture"].contents() == "kvq-profile"


def test_arrays_of_another_shape_or_with_nan_make_no_profile(profile: Profile) -> None:
    with pytest.raises(ValueError, match=r"k_sensitivity of .* is float32 \[3\], expected float32"):
        profile.with_arrays(k_sensitivity=np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"k_sensitivity of .* is float64 \[2\], expected float32"):
        profile.with_arrays(k_sensitivity=np.ones(2))
    with pytest.raises(ValueError, match=r"k_sensitivity of .* is not finite"):
        profile.with_arrays(k_sensitivity=np.array([1, np.nan], np.float32))
    with pytest.raises(ValueError, match=r"expected .*'v_sensitivity'"):
        profile.with_arrays(other=np.ones(2, np.float32))


def test_what_is_no_profile_is_not_read(
    profile: Profile, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.gguf"
    with pytest.raises(FileNotFoundError):
        read_profile(path)
    with pytest.raises(
        ModelError, match=r"general.architecture is 'llama', expected 'kvq-profile'"
    ):
        read_profile(tiny_path)
    write_profile(path, profile)
    whole = path.read_bytes()
    for n in (0, 10, 100, 500, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:n])
        with pytest.raises(ModelError, match=r"p\.gguf is not a sound KV profile"):
            read_profile(path)
    monkeypatch.setattr("pykvq.profile.VERSION", 2)
    write_profile(path, profile)
    monkeypatch.undo()
    with pytest.raises(ModelError, match=r"kvq.profile.version is 2, expected 1"):
        read_profile(path)
    writer = GGUFWriter(path, "kvq-profile")
    writer.add_uint32("kvq.profile.version", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"entry kvq.profile.layers is missing"):
        read_profile(path)


def test_a_profile_that_cannot_be_written_leaves_nothing_behind(
    profile: Profile, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(KvqError, match="taken is a folder, expected a regular file"):
        write_profile(tmp_path / "taken", profile)
    with pytest.raises(FileNotFoundError):
        write_profile(tmp_path / "absent" / "file", profile)
    assert os.listdir(tmp_path) == ["taken"]


# ---- where it is found ----------------------------------------------------------------------


def catalogue_with(folder: Path, monkeypatch: pytest.MonkeyPatch, entry: object) -> Path:
    """Makes the catalogue one card with this profile entry; returns the catalogue's folder."""
    models = folder / "models"
    models.mkdir()
    card = json.loads((Path(__file__).parents[1] / "models" / "smollm2.json").read_text())
    (models / "smollm2.json").write_text(json.dumps({**card, "profile": entry}))
    monkeypatch.setattr(resources, "files", lambda package: folder)
    return models


def test_a_profile_is_beside_its_model(tmp_path: Path) -> None:
    assert beside("/m/a.b.gguf") == Path("/m/a.b.kvprofile.gguf")
    assert beside("/m/weights.GGUF") == Path("/m/weights.kvprofile.gguf")
    assert beside("/m/weights.bin") == Path("/m/weights.bin.kvprofile.gguf")
    assert find_profile(tmp_path / "a.gguf", 0xABC) is None
    (tmp_path / "a.kvprofile.gguf").touch()
    assert find_profile(tmp_path / "a.gguf", 0xABC) == tmp_path / "a.kvprofile.gguf"


def test_the_catalogue_has_a_profile_for_a_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clear_cards: object
) -> None:
    entry = {"file": "s.kvprofile.gguf", "fingerprint": "0000000000000abc"}
    models = catalogue_with(tmp_path, monkeypatch, entry)
    assert find_profile(tmp_path / "a.gguf", 0xABD) is None
    with pytest.raises(ModelError, match=r"names the profile .* not complete"):
        find_profile(tmp_path / "a.gguf", 0xABC)
    (models / "s.kvprofile.gguf").touch()
    assert find_profile(tmp_path / "a.gguf", 0xABC) == models / "s.kvprofile.gguf"
    (tmp_path / "a.kvprofile.gguf").touch()
    assert find_profile(tmp_path / "a.gguf", 0xABC) == tmp_path / "a.kvprofile.gguf"


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ("s.gguf", "its type must be dict"),
        ({"file": "s.gguf"}, r"\['file', 'fingerprint'\] were"),
        ({"file": "../s.gguf", "fingerprint": "0" * 16}, "not a plain name"),
        ({"file": "s.gguf", "fingerprint": "ABC"}, "not 16 hexadecimal digits"),
        ({"file": "s.gguf", "fingerprint": 5}, "its type must be str"),
    ],
)
def test_a_card_that_describes_its_profile_wrongly_is_an_error(
    entry: object,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clear_cards: object,
) -> None:
    catalogue_with(tmp_path, monkeypatch, entry)
    with pytest.raises(ModelError, match=sentence):
        catalogue.cards()


def test_profiles_of_the_catalogue_are_what_their_cards_say() -> None:
    folder = Path(__file__).parents[1] / "models"
    shipped = {card.profile.file for card in catalogue.cards().values() if card.profile}
    assert shipped == {path.name for path in folder.glob("*.gguf")}
    for card in catalogue.cards().values():
        if card.profile is not None:
            path = folder / card.profile.file
            assert path.name.endswith(".kvprofile.gguf")
            assert path.stat().st_size < 2e6
            assert read_profile(path).fingerprint == card.profile.fingerprint


def test_a_model_takes_the_profile_that_it_is_told_to(
    tiny_path: Path, profile: Profile, tmp_path: Path
) -> None:
    path = Path(shutil.copy(tiny_path, tmp_path / "tiny.gguf"))
    own, other = tmp_path / "tiny.kvprofile.gguf", tmp_path / "other.gguf"

    def chosen(**options: object) -> Path | None:
        with Model(path, **options) as model:  # type: ignore[arg-type]
            return model.profile_path

    assert chosen() is None
    write_profile(own, profile)
    write_profile(other, profile)
    assert chosen() == chosen(profile="auto") == chosen(profile=None) == own
    assert chosen(profile=other) == chosen(profile=str(other)) == other
    assert chosen(profile=False) is None
    for missing in ("no.gguf", "", tmp_path):
        with pytest.raises(ModelError, match=r"The profile .* is not there, or is not a file"):
            Model(path, profile=missing)


# ---- the command ----------------------------------------------------------------------------


def test_calibrate_makes_the_profile_that_run_and_info_use(
    tiny_path: Path, profile: Profile, tmp_path: Path, capsys: Capture
) -> None:
    model = str(shutil.copy(tiny_path, tmp_path / "tiny.gguf"))
    text = tmp_path / "cats.txt"
    text.write_text(TEXT)
    own = tmp_path / "tiny.kvprofile.gguf"
    args = ["calibrate", model, "-f", str(text), "-n", "1000", "-c", "250", "-t", "2"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert out == f"{own}\n"
    assert "calibrated on 980 tokens of 1 text; " in err
    assert f"fingerprint {profile.fingerprint:016x}." in err
    assert f"It is used whenever {model} is; " in err
    write_profile(tmp_path / "same.gguf", profile)
    assert own.read_bytes() == (tmp_path / "same.gguf").read_bytes()

    run = ["run", model, "-p", "the", "-n", "1", "--raw", "--kv", "skvq-g32"]
    for more, used in (
        ([], f"; profile {own}; "),
        (["--profile", str(tmp_path / "same.gguf")], f"; profile {tmp_path / 'same.gguf'}; "),
        (["--profile", "none"], None),
    ):
        assert main([*run, *more]) == 0
        err = capsys.readouterr().err
        assert used in err if used else "profile" not in err
    for more, shown in (([], str(own)), (["--profile", "none"], None)):
        assert main(["info", model, "--json", *more]) == 0
        assert json.loads(capsys.readouterr().out)["profile"] == shown


def test_calibrate_says_how_a_profile_elsewhere_is_used(
    tiny_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = str(shutil.copy(tiny_path, tmp_path / "tiny.gguf"))
    text, output = tmp_path / "a.txt", tmp_path / "p.gguf"
    text.write_text(TEXT)
    base = ["calibrate", model, "-f", str(text), "-n", "400", "-c", "200", "--no-sensitivities"]
    assert main([*base, "-f", str(text), "-o", str(output)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{output}\n"
    assert "390 tokens of 2 texts" in err
    assert f"where --profile names it; at {tmp_path / 'tiny.kvprofile.gguf'} it is" in err
    found = read_profile(output)
    assert found.texts.count("  a.txt") == 2
    assert (found.arrays["k_sensitivity"] == 1).all()
    assert (found.arrays["v_sensitivity"] == 1).all()


def test_calibrate_refuses_before_it_works(
    tiny_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    model = str(shutil.copy(tiny_path, tmp_path / "tiny.gguf"))
    text = tmp_path / "a.txt"
    text.write_text(TEXT)
    (tmp_path / "latin1.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 1000)
    base = ["calibrate", model, "-f"]
    for more, sentence in (
        ([str(text), "-o", str(tmp_path / "no" / "p.gguf")], "there is no folder"),
        ([str(text), "-o", str(tmp_path)], "it is a folder; -o names a file"),
        ([str(text), "-o", model], "tiny.gguf, which it is made from"),
        ([str(text), "-o", str(text)], "a.txt, which it is made from"),
        ([str(tmp_path / "latin1.txt")], "latin1.txt is not UTF-8: byte 3 is 0xe9"),
        ([str(tmp_path / "none.txt")], "none.txt: No such file"),
        ([str(text), "-n", "100", "-c", "200"], "100 tokens were asked for, expected at least 200"),
        ([str(text), "-c", "10"], "-c is 10, expected a whole number from 69"),
        ([str(text), "-n", "300", "-c", "100"], "300 tokens of each text, trained for 2048, are"),
        ([str(text), "--sensitivity-chunks", "0"], "--sensitivity-chunks: 0 is below 1"),
    ):
        assert main([*base, *more]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.startswith("pykvq: error: ")
        assert sentence in err
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "latin1.txt", "tiny.gguf"]
    assert main(["calibrate", model]) == 2
    assert "required: -f/--file" in capsys.readouterr().err
