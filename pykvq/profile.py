"""Profiles: what calibration found for one model, in a small GGUF file, and where they are found.

Owns the format, as a table of slots, and the places of profiles; `pykvq.calibrate` computes what
is in them, and the core reads them for its sessions with a reader of its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pykvq.errors import ModelError
from pykvq.files import replacing

if TYPE_CHECKING:
    from gguf import GGUFReader

ARCHITECTURE = "kvq-profile"
VERSION = 1
SUFFIX = ".kvprofile.gguf"

_NUMBERS = ("layers", "kv_heads", "d_head")


@dataclass(frozen=True)
class Slot:
    """An array of a profile.

    Attributes:
        name: Its name in `Profile.arrays`.
        axes: Its shape, slowest axis first: l layers, h KV heads, d width of a head. A tensor of
            the file has ggml's order, fastest first.
        dtype: The type of its elements in the file.
        by_layer: Whether each layer has a tensor `blk.<layer>.<name>`; otherwise all of it is the
            tensor `kvq.<name>`.
        meaning: What it holds.
    """

    name: str
    axes: str
    dtype: type[np.generic]
    by_layer: bool
    meaning: str

    def tensors(self, n_layers: int) -> list[str]:
        """The names of its tensors in the file, in the order of the layers."""
        if self.by_layer:
            return [f"blk.{layer}.{self.name}" for layer in range(n_layers)]
        return [f"kvq.{self.name}"]


SLOTS = (
    Slot("k_basis", "lhdd", np.float16, True, "T of k' = T k, a row per latent channel"),
    Slot("k_mean", "lhd", np.float32, True, "mean of the keys, taken from each before T"),
    Slot("k_wave", "lhd", np.float32, True, "what, turned by RoPE, is taken from each before T"),
    Slot("v_basis", "lhdd", np.float16, True, "T of v' = T v"),
    Slot("v_mean", "lhd", np.float32, True, "mean of the values, taken from each before T"),
    Slot("k_importance", "lhd", np.float32, True, "squared logit error if a row of T is dropped"),
    Slot("k_order", "lhd", np.int16, True, "channels sorted by radius, RoPE pairs together"),
    Slot("k_sensitivity", "l", np.float32, False, "weight of a layer's key errors"),
    Slot("v_sensitivity", "lh", np.float32, False, "weight of a head's value errors"),
)


@dataclass(frozen=True)
class Profile:
    """What calibration found for one model.

    Attributes:
        name: What it is called.
        model: The name of the model.
        fingerprint: `Model.fingerprint` of the model that it is for.
        n_tokens: Tokens that it was calibrated on.
        texts: The calibration texts, a line each, as sha256sum writes it.
        n_layers: Layers of the model.
        n_kv_heads: KV heads per layer.
        d_head: Width of a head.
        arrays: By the names of `SLOTS`, of their shapes and types.
    """

    name: str
    model: str
    fingerprint: int
    n_tokens: int
    texts: str
    n_layers: int
    n_kv_heads: int
    d_head: int
    arrays: Mapping[str, npt.NDArray[Any]]

    def __post_init__(self) -> None:
        """Requires an array for each slot.

        Raises:
            ValueError: One is missing, left over, or has not its slot's shape or type, or a number
                is not finite.
        """
        names = [slot.name for slot in SLOTS]
        if sorted(self.arrays) != sorted(names):
            raise ValueError(f"The arrays are {sorted(self.arrays)}, expected {sorted(names)}.")
        for slot in SLOTS:
            array, shape = self.arrays[slot.name], self.shape(slot)
            if array.shape != shape or array.dtype != slot.dtype:
                raise ValueError(
                    f"{slot.name} of {self.name} is {array.dtype} {list(array.shape)}, expected"
                    f" {np.dtype(slot.dtype)} {list(shape)}."
                )
            if not np.isfinite(array).all():
                raise ValueError(f"{slot.name} of {self.name} is not finite everywhere.")

    def shape(self, slot: Slot) -> tuple[int, ...]:
        """The shape of a slot's array."""
        sizes = {"l": self.n_layers, "h": self.n_kv_heads, "d": self.d_head}
        return tuple(sizes[axis] for axis in slot.axes)

    def with_arrays(self, **arrays: npt.NDArray[Any]) -> Profile:
        """The same profile but for the arrays that are given, as a search over it needs it."""
        return replace(self, arrays={**self.arrays, **arrays})


# ---- files ----------------------------------------------------------------------------------


def write_profile(path: str | os.PathLike[str], profile: Profile) -> None:
    """Writes a profile; its bytes depend on nothing but the profile.

    The file gets its name when it is complete.

    Raises:
        KvqError: There is something else than a regular file at the path.
        OSError: It cannot be written.
    """
    from gguf import GGUFWriter

    with replacing(path) as work, contextlib.closing(GGUFWriter(work, ARCHITECTURE)) as writer:
        writer.add_name(profile.name)
        writer.add_uint32("kvq.profile.version", VERSION)
        writer.add_uint64("kvq.profile.fingerprint", profile.fingerprint)
        writer.add_string("kvq.profile.model", profile.model)
        writer.add_uint64("kvq.profile.n_tokens", profile.n_tokens)
        writer.add_string("kvq.profile.texts", profile.texts)
        for key, number in zip(_NUMBERS, _numbers(profile), strict=True):
            writer.add_uint32(f"kvq.profile.{key}", number)
        for slot in SLOTS:
            names, array = slot.tensors(profile.n_layers), profile.arrays[slot.name]
            for tensor, part in zip(names, array if slot.by_layer else [array], strict=True):
                writer.add_tensor(tensor, np.ascontiguousarray(part))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _numbers(profile: Profile) -> tuple[int, int, int]:
    return profile.n_layers, profile.n_kv_heads, profile.d_head


def read_profile(path: str | os.PathLike[str]) -> Profile:
    """Reads a profile that calibration wrote, for display and for work on it.

    A damaged file is an error; one made to do harm may take any time and memory. Sessions do not
    use this function.

    Raises:
        ModelError: The file is not a profile of this version, or is damaged.
        OSError: It cannot be read.
    """
    from gguf import GGUFReader

    try:
        return _profile(GGUFReader(path))
    except OSError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{os.fspath(path)} is not a sound KV profile: {error}") from error


def _profile(file: GGUFReader) -> Profile:
    def entry(key: str) -> Any:
        field = file.get_field(key)
        if field is None:
            raise ValueError(f"The metadata entry {key} is missing.")
        return field.contents()

    for key, expected in (("general.architecture", ARCHITECTURE), ("kvq.profile.version", VERSION)):
        if entry(key) != expected:
            raise ValueError(f"{key} is {entry(key)!r}, expected {expected!r}.")
    tensors = {tensor.name: np.array(tensor.data) for tensor in file.tensors}
    n_layers, n_kv_heads, d_head = (int(entry(f"kvq.profile.{key}")) for key in _NUMBERS)
    arrays = {}
    for slot in SLOTS:
        names = slot.tensors(n_layers)
        missing = [name for name in names if name not in tensors]
        if missing:
            raise ValueError(f"The tensor {missing[0]} is missing.")
        parts = [tensors[name] for name in names]
        arrays[slot.name] = np.stack(parts) if slot.by_layer else parts[0]
    return Profile(
        name=entry("general.name"),
        model=entry("kvq.profile.model"),
        fingerprint=int(entry("kvq.profile.fingerprint")),
        n_tokens=int(entry("kvq.profile.n_tokens")),
        texts=entry("kvq.profile.texts"),
        n_layers=n_layers,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        arrays=arrays,
    )


# ---- places ---------------------------------------------------------------------------------


def beside(model_path: str | os.PathLike[str]) -> Path:
    """Where the profile of a model file lies: X.kvprofile.gguf beside X.gguf."""
    path = Path(model_path)
    name = path.stem if path.suffix.lower() == ".gguf" else path.name
    return path.with_name(name + SUFFIX)


def find_profile(model_path: str | os.PathLike[str], fingerprint: int) -> Path | None:
    """The profile that is used for a model unless another is named.

    That is the one beside its file, else one that comes with pykvq and is for this fingerprint.

    Args:
        model_path: The model's file; the first one of a split model.
        fingerprint: `Model.fingerprint`.
    """
    from pykvq import catalogue

    path = beside(model_path)
    return path if path.is_file() else catalogue.profile_of(fingerprint)
