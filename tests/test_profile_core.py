"""The core's reader of profiles: the damaged are refused in a sentence, the sound are shared."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import write_tiny
from gguf import GGUFWriter

from pykvq import Model, ModelError, UnsupportedError
from pykvq.profile import ARCHITECTURE, SLOTS, VERSION, Profile, beside, read_profile

Tensors = dict[str, npt.NDArray[Any]]
Entries = dict[str, int]


class Parts:
    """What a profile's file is made of, to be damaged."""

    def __init__(self, profile: Profile) -> None:
        self.architecture = ARCHITECTURE
        self.entries: Entries = {
            "version": VERSION,
            "fingerprint": profile.fingerprint,
            "layers": profile.n_layers,
            "kv_heads": profile.n_kv_heads,
            "d_head": profile.d_head,
        }
        self.tensors: Tensors = {}
        for slot in SLOTS:
            names, array = slot.tensors(profile.n_layers), profile.arrays[slot.name]
            parts = array if slot.by_layer else [array]
            self.tensors.update(zip(names, (part.copy() for part in parts), strict=True))

    def write(self, path: Path) -> Path:
        writer = GGUFWriter(path, self.architecture)
        for key, number in self.entries.items():
            add = writer.add_uint64 if key == "fingerprint" else writer.add_uint32
            add(f"kvq.profile.{key}", number)
        for name, array in self.tensors.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture(scope="module")
def profile(tiny_path: Path) -> Profile:
    return read_profile(beside(tiny_path))


def put(name: str, at: Any, value: float) -> Callable[[Parts], None]:
    """Puts a number into a tensor."""

    def damage(parts: Parts) -> None:
        parts.tensors[name][at] = value

    return damage


def leave_out(name: str) -> Callable[[Parts], None]:
    def damage(parts: Parts) -> None:
        del parts.tensors[name]

    return damage


def change(
    name: str, how: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
) -> Callable[[Parts], None]:
    def damage(parts: Parts) -> None:
        parts.tensors[name] = how(parts.tensors[name])

    return damage


def entry(key: str, value: int | None) -> Callable[[Parts], None]:
    def damage(parts: Parts) -> None:
        parts.entries.pop(key)
        if value is not None:
            parts.entries[key] = value

    return damage


def other_architecture(parts: Parts) -> None:
    parts.architecture = "llama"


def nine_waves(parts: Parts) -> None:
    wave = parts.tensors["blk.0.k_wave"]
    wave[:] = 0
    wave[1, :18:2] = 1


def two_equal_rows(parts: Parts) -> None:
    basis = parts.tensors["blk.1.v_basis"]
    basis[1, 5] = basis[1, 40]


def twice_the_same_channel(parts: Parts) -> None:
    order = parts.tensors["blk.0.k_order"]
    order[1, 3] = order[1, 4]


DAMAGE: dict[str, tuple[Callable[[Parts], None], type[Exception], str]] = {
    "another model": (
        entry("fingerprint", 0x1234),
        ValueError,
        r"calibrated for another model \(fingerprint 0000000000001234, expected [0-9a-f]{16}\)",
    ),
    "no fingerprint": (entry("fingerprint", None), ModelError, r"key kvq.profile.fingerprint is m"),
    "another version": (
        entry("version", 2),
        UnsupportedError,
        r"the profile has version 2, and only 1 is implemented",
    ),
    "no version": (entry("version", None), ModelError, r"key kvq.profile.version is missing"),
    "other layers": (entry("layers", 3), ModelError, r"is for 3 layers .* but the model has 2"),
    "no layers": (entry("layers", None), ModelError, r"key kvq.profile.layers is missing"),
    "no profile": (
        other_architecture,
        ModelError,
        r'is no KV profile: its architecture is "llama"',
    ),
    "no tensor": (leave_out("blk.1.k_order"), ModelError, r"tensor blk.1.k_order is missing"),
    "no sensitivities": (
        leave_out("kvq.k_sensitivity"),
        ModelError,
        r"tensor kvq.k_sensitivity is missing",
    ),
    "wrong shape": (
        change("blk.0.k_mean", lambda a: a[:, :32].copy()),
        ModelError,
        r"tensor blk.0.k_mean is F32 \[32, 2\], expected F32 \[64, 2\]",
    ),
    "an axis too few": (
        change("blk.1.v_basis", lambda a: a[0].copy()),
        ModelError,
        r"tensor blk.1.v_basis is F16 \[64, 64\], expected F16 \[64, 64, 2\]",
    ),
    "wrong type": (
        change("blk.0.k_basis", lambda a: a.astype(np.float32)),
        ModelError,
        r"tensor blk.0.k_basis is F32 \[64, 64, 2\], expected F16 \[64, 64, 2\]",
    ),
    "NaN in a basis": (
        put("blk.1.k_basis", (1, 2, 3), math.nan),
        ModelError,
        r"tensor blk.1.k_basis holds -?nan, expected -65504 to 65504",
    ),
    "infinity in a mean": (
        put("blk.0.v_mean", (0, 0), math.inf),
        ModelError,
        r"tensor blk.0.v_mean holds inf, expected -65504 to 65504",
    ),
    "singular matrix": (
        two_equal_rows,
        ModelError,
        r"tensor blk.1.v_basis: the matrix of head 1 has no inverse",
    ),
    "almost singular matrix": (
        change("blk.0.k_basis", lambda a: np.array([np.eye(64) * 6e-8] * 2, np.float16)),
        ModelError,
        r"tensor blk.0.k_basis: the inverse of head 0 reaches .*, expected at most 1e\+06",
    ),
    "no permutation": (
        twice_the_same_channel,
        ModelError,
        r"tensor blk.0.k_order: head 1 is not a permutation",
    ),
    "channel out of range": (
        put("blk.0.k_order", (0, 0), 64),
        ModelError,
        r"tensor blk.0.k_order: head 0 is not a permutation",
    ),
    "negative channel": (
        put("blk.0.k_order", (0, 0), -1),
        ModelError,
        r"tensor blk.0.k_order: head 0 is not a permutation",
    ),
    "too many waves": (
        nine_waves,
        ModelError,
        r"tensor blk.0.k_wave: head 1 has more than 8 pairs that are not zero",
    ),
    "negative importance": (
        put("blk.1.k_importance", (1, 63), -0.5),
        ModelError,
        r"tensor blk.1.k_importance holds -0.5, expected 0 to 1e\+15",
    ),
    "negative sensitivity": (
        put("kvq.v_sensitivity", (1, 1), -1),
        ModelError,
        r"tensor kvq.v_sensitivity holds -1, expected 0 to 1e\+15",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_sentence_that_names_the_file_and_the_part(
    name: str, tiny_path: Path, profile: Profile, tmp_path: Path
) -> None:
    damage, kind, sentence = DAMAGE[name]
    parts = Parts(profile)
    damage(parts)
    path = parts.write(tmp_path / "p.gguf")
    with Model(tiny_path, profile=path) as model:
        with pytest.raises(kind, match=sentence) as caught:
            model.session(kv="auto")
        said = str(caught.value)
        assert type(caught.value) is kind
        assert said.startswith(f"{path}: ")
        assert said.endswith(".") and "\n" not in said
        model.session(kv="f16").close()  # which needs no profile


def test_the_scale_of_a_basis_may_be_any(
    tiny_path: Path, profile: Profile, tmp_path: Path, random_tokens: list[int]
) -> None:
    found = []
    for scale in (1, 1 / 64, 64):
        parts = Parts(profile)
        for name in ("k_basis", "v_basis"):
            parts.tensors[f"blk.0.{name}"] *= np.float16(scale)
        path = parts.write(tmp_path / "p.gguf")
        with Model(tiny_path, profile=path, kv="svdq", n_ctx=400) as model:
            found.append(model.session().eval(random_tokens[:400]))
    # The rows are halves before they are packed, so that they are rounded the same.
    np.testing.assert_allclose(found[1:], [found[0]] * 2, atol=0.05)


@pytest.mark.parametrize("content", [b"", b"not a GGUF file at all", b"GGUF\x03\0\0\0"])
def test_what_is_no_gguf_file_is_refused(tiny_path: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.gguf"
    path.write_bytes(content)
    with (
        Model(tiny_path, profile=path) as model,
        pytest.raises(ModelError, match=r"p\.gguf.*\.$") as caught,
    ):
        model.session(kv="auto")
    assert "\n" not in str(caught.value)


def test_a_profile_that_is_cut_anywhere_is_refused(
    tiny_path: Path, profile: Profile, tmp_path: Path
) -> None:
    whole = Parts(profile).write(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "p.gguf"
    for n in np.linspace(0, len(whole) - 64, 40).astype(int):
        path.write_bytes(whole[:n])
        with Model(tiny_path, profile=path) as model, pytest.raises(ModelError, match=r"p\.gguf"):
            model.session(kv="auto")


def test_waves_of_channels_that_are_not_rotated_are_refused(
    tiny_qwen2: Model, tmp_path: Path
) -> None:
    extra: dict[str, object] = {"qwen2.rope.dimension_count": 8}
    path = write_tiny(tmp_path / "m.gguf", "qwen2", d_head=16, extra=extra)
    parts = Parts(read_profile(beside(tiny_qwen2.info.path)))
    parts.tensors["blk.1.k_wave"][:] = 0
    with Model(path, profile=False) as model:
        parts.entries["fingerprint"] = model.fingerprint
    for layer in (0, 1):
        parts.tensors[f"blk.{layer}.k_wave"][:] = 0
    own = parts.write(tmp_path / "p.gguf")
    with Model(path, profile=own) as model:
        model.session(kv="auto").close()
    parts.tensors["blk.1.k_wave"][1, 9] = 0.25
    parts.write(own)
    sentence = r"blk.1.k_wave: head 1 has 0.25 in channel 9, which RoPE does not rotate; expected 0"
    with Model(path, profile=own) as model, pytest.raises(ModelError, match=sentence):
        model.session(kv="auto")


# ---- sharing and closing --------------------------------------------------------------------


def test_sessions_share_a_profile_and_may_outlive_its_file(
    tiny_path: Path, profile: Profile, tmp_path: Path, random_tokens: list[int]
) -> None:
    path = Parts(profile).write(tmp_path / "p.gguf")
    with Model(tiny_path, profile=path, kv="auto", n_ctx=500) as model:
        first, second = model.session(), model.session(kv="svdq")
        path.unlink()
        third = model.session()
        for session in (first, second, third):
            session.eval(random_tokens[:300], "none")
        assert (first.eval(random_tokens[300:301]) == third.eval(random_tokens[300:301])).all()
        first.close()
        second.close()
        gc.collect()
        assert np.isfinite(third.eval(random_tokens[301:400])).all()


def test_closing_a_model_closes_the_sessions_on_its_profile(
    tiny_path: Path, random_tokens: list[int]
) -> None:
    model = Model(tiny_path, kv="auto", n_ctx=500)
    sessions = [model.session(), model.session(kv="svdq-1.25")]
    for session in sessions:
        session.eval(random_tokens[:300], "none")
    model.close()
    assert all(session.closed for session in sessions)
    with pytest.raises(ValueError, match="closed"):
        sessions[0].eval([1])
    with pytest.raises(ValueError, match="closed"):
        model.session()


def test_a_session_keeps_its_profile_when_all_else_is_forgotten(
    tiny_path: Path, random_tokens: list[int]
) -> None:
    session = Model(tiny_path, kv="auto", n_ctx=500).session()
    session.eval(random_tokens[:300], "none")
    gc.collect()
    with session:
        assert np.isfinite(session.eval(random_tokens[300:400])).all()
