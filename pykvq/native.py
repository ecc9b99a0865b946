"""The C core, with Python's types: statuses become exceptions, structs become dataclasses.

Owns the C handles of models and profiles and their lifetimes; `pykvq.native_session` has those of
sessions, `pykvq.native_device` describes devices. Nothing else in the package calls the core. Knows
no tokenizer and no numpy, so that importing it is quick.

A handle is closed once: by `close`, or when the last reference to it goes.
"""

from __future__ import annotations

import difflib
import os
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from pykvq._native import ffi, lib
from pykvq.errors import (
    Cancelled,
    ContextError,
    DeviceError,
    KvqError,
    MemoryLimitError,
    ModelError,
    SchemeError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from pykvq._native import CData

#: How wide a head is taken to be where no model says it; most models have this width.
USUAL_D_HEAD: Final = 128

_EXCEPTIONS: Final[dict[int, type[Exception]]] = {
    lib.KVQ_ERR_ARGUMENT: ValueError,
    lib.KVQ_ERR_IO: ModelError,
    lib.KVQ_ERR_FORMAT: ModelError,
    lib.KVQ_ERR_UNSUPPORTED: UnsupportedError,
    lib.KVQ_ERR_MEMORY: MemoryLimitError,
    lib.KVQ_ERR_CONTEXT: ContextError,
    lib.KVQ_CANCELLED: Cancelled,
    lib.KVQ_ERR_DEVICE: DeviceError,
}


def check(status: int) -> None:
    """Raises the exception of a status, with the sentence that the core recorded on this thread."""
    if status != lib.KVQ_OK:
        sentence = string_of(lib.kvq_error()).rstrip(".") + "."
        raise _EXCEPTIONS.get(status, KvqError)(sentence)


def string_of(chars: CData) -> str:
    """A string of the core."""
    return ffi.string(chars).decode("utf-8", "replace")


def _name(chars: CData, length: CData) -> str:
    """A name of a GGUF file; bytes that are not UTF-8 become lone surrogates."""
    return ffi.buffer(chars, int(length))[:].decode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------------------------------
# The core
# ---------------------------------------------------------------------------------------------


def version() -> str:
    """The version of the core."""
    return string_of(lib.kvq_version())


def memory_available() -> int:
    """Bytes that sessions may take: see `kvq_memory_available` in core/kvq.h."""
    return lib.kvq_memory_available()


def header_bytes(label: str, data: bytes) -> int:
    """How long the header of a GGUF file is that begins with `data`.

    Args:
        label: How errors call the file.
        data: Its first bytes.

    Returns:
        Bytes of metadata and tensor directory; 0 if they go on behind `data`.

    Raises:
        ModelError: The file is damaged, or no GGUF file.
    """
    out = ffi.new("uint64_t *")
    check(
        lib.kvq_header_measure(label.encode(), ffi.from_buffer("uint8_t[]", data), len(data), out)
    )
    return int(out[0])


def alloc_calls() -> int:
    """Allocations made by the core since the process started; evaluating makes none."""
    return lib.kvq_alloc_calls()


def isa_available() -> list[str]:
    """The instruction sets that can be used here, best first."""
    return string_of(lib.kvq_isa_available()).split(",")


def isa_selected() -> str:
    """The instruction set that sessions use: the best, or the one that KVQ_ISA names.

    Raises:
        ValueError: KVQ_ISA names one that is not available.
    """
    out = ffi.new("const char **")
    check(lib.kvq_isa_selected(out))
    return string_of(out[0])


def measure_machine(n_threads: int = 0, n_bytes: int = 0) -> CData:
    """The `kvq_machine_limits` of this machine; measuring them takes about a second.

    Args:
        n_threads: Threads; 0: one per processor.
        n_bytes: Size of the buffer that is read; 0: 512 MiB.

    Raises:
        ValueError: A number is out of range, or KVQ_ISA names no instruction set.
        MemoryLimitError: There is no memory for the buffer.
    """
    out = ffi.new("kvq_machine_limits *")
    check(lib.kvq_machine_measure(out, n_threads, n_bytes))
    return out


# ---------------------------------------------------------------------------------------------
# Schemes
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """A KV cache scheme, at one head width.

    Attributes:
        name: What `kv=` and `--kv` call it.
        summary: What it is, in one line.
        basis_k: The map applied to keys before they are packed.
        basis_v: The same for values.
        codec_k: How sealed keys are packed.
        codec_v: How sealed values are packed.
        sinks: First tokens that stay in f16 unless told otherwise.
        window: Last tokens that stay in f16 unless told otherwise.
        block: Tokens per sealed block.
        bits_k: Bits per element of a sealed block of keys, all its metadata included.
        bits_v: The same for values.
        has_budget: Whether it takes as many bits as it is given (`kv_bits`).
        has_layers: Whether it can be told how many layers have more bits (`asymkv_layers`).
        profile: Which use it makes of a calibrated profile: "none", "optional" or "needed".
        key_bias_sensitive: Whether it loses far more on models whose keys have a bias; see
            `Model.has_key_bias`.
    """

    name: str
    summary: str
    basis_k: str
    basis_v: str
    codec_k: str
    codec_v: str
    sinks: int
    window: int
    block: int
    bits_k: float
    bits_v: float
    has_budget: bool
    has_layers: bool
    profile: Literal["none", "optional", "needed"]
    key_bias_sensitive: bool

    @property
    def lossless(self) -> bool:
        """Whether sealing a block keeps its rows exactly."""
        return self.codec_k == self.codec_v == "f16"


_PROFILE_USES: Final[dict[int, Literal["none", "optional", "needed"]]] = {
    lib.KVQ_PROFILE_NONE: "none",
    lib.KVQ_PROFILE_OPTIONAL: "optional",
    lib.KVQ_PROFILE_NEEDED: "needed",
}


def schemes(d_head: int = USUAL_D_HEAD) -> list[Scheme]:
    """The schemes that have a form for heads of `d_head` channels.

    Args:
        d_head: Width of a head; it decides what the metadata of a block cost per element.

    Raises:
        ValueError: If the width is not positive.
    """
    found = []
    out = ffi.new("kvq_scheme_info *")
    for index in range(lib.kvq_scheme_count()):
        try:
            check(lib.kvq_scheme_describe(index, d_head, out))
        except UnsupportedError:
            continue
        found.append(
            Scheme(
                name=string_of(out.name),
                summary=string_of(out.summary),
                basis_k=string_of(out.basis_k),
                basis_v=string_of(out.basis_v),
                codec_k=string_of(out.codec_k),
                codec_v=string_of(out.codec_v),
                sinks=int(out.sinks),
                window=int(out.window),
                block=int(out.block),
                bits_k=float(out.bits_k),
                bits_v=float(out.bits_v),
                has_budget=bool(out.has_budget),
                has_layers=bool(out.has_layers),
                profile=_PROFILE_USES[int(out.profile)],
                key_bias_sensitive=bool(out.key_bias_sensitive),
            )
        )
    return found


def block_tokens() -> int:
    """Tokens per sealed block."""
    return schemes()[0].block


def scheme_named(name: object) -> Scheme:
    """The scheme of a name, at the usual width of a head.

    Raises:
        SchemeError: There is none of this name; it names those that are spelled alike.
    """
    if not isinstance(name, str):
        raise SchemeError(f"The KV scheme is {name!r}, expected a name, such as 'skvq'.")
    known = {scheme.name: scheme for scheme in schemes()}
    if name not in known:
        raise SchemeError(unknown_scheme(name, known))
    return known[name]


def unknown_scheme(name: str, known: Iterable[str]) -> str:
    """The sentence about a scheme that is none of those that are known."""
    names = list(known)
    near = difflib.get_close_matches(name.lower(), names)
    hint = f"; spelled alike: {', '.join(near)}" if near else ""
    return f"The KV scheme {name!r} is unknown; known are: {', '.join(names)}{hint}."


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """An entry of a model's tensor directory.

    Attributes:
        name: Its name.
        shape: As in the file: shape[0] runs fastest.
        type: The weight format, such as "Q4_K".
        n_bytes: Its size.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int


class RopePair(NamedTuple):
    """Two channels of a head that RoPE turns together; see `kvq_rope_pair` in core/kvq.h.

    Attributes:
        first: The channel a of (a, b) -> (a cos - b sin, a sin + b cos).
        second: The channel b.
        frequency: Angle per position, in radians; the model's scaling and factors are in it.
    """

    first: int
    second: int
    frequency: float


@dataclass(frozen=True)
class RawMeta:
    """A metadata entry as the file has it: see `kvq_meta` in core/kvq.h."""

    type: int
    is_array: bool
    count: int
    data: bytes


class ModelHandle:
    """An open `kvq_model`; closed at most once, and never while it is being read."""

    def __init__(self, path: str | os.PathLike[str], *, header_only: bool = False) -> None:
        """Maps a file.

        Args:
            path: The file.
            header_only: Whether it may end behind its header: see `kvq_model_open_header`.

        Raises:
            ModelError: The file cannot be read, is damaged or is not supported.
            MemoryLimitError: There is no memory for it.
        """
        out = ffi.new("kvq_model **")
        if header_only:
            check(lib.kvq_model_open_header(out, os.fsencode(path)))
        else:
            check(lib.kvq_model_open(out, os.fsencode(path)))
        self._pointer = out[0]
        self.path = os.fsdecode(path)
        self.lock = threading.RLock()
        self._finalizer = weakref.finalize(self, lib.kvq_model_close, self._pointer)
        self._finalizer.atexit = False

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Unmaps the file. Its sessions must have been closed."""
        with self.lock:
            self._finalizer()

    def require_open(self) -> None:
        """Requires that the model can be used.

        Raises:
            ValueError: It was closed.
        """
        if self.closed:
            raise ValueError(f"The model {self.path} was closed and cannot be used any more.")

    @property
    def pointer(self) -> CData:
        """The C pointer; to be used with `lock` held.

        Raises:
            ValueError: It was closed.
        """
        self.require_open()
        return self._pointer

    def describe(self) -> CData:
        """The `kvq_model_info`; its string dies with the model."""
        out = ffi.new("kvq_model_info *")
        lib.kvq_model_describe(self.pointer, out)
        return out

    def tensor_values(self, index: int, out: CData, n: int) -> None:
        """Calls `kvq_model_tensor_values`."""
        with self.lock:
            check(lib.kvq_model_tensor_values(self.pointer, index, out, n))

    def fingerprint(self) -> int:
        """64 bits that tell the model from others."""
        with self.lock:
            return int(lib.kvq_model_fingerprint(self.pointer))

    def architecture(self) -> str:
        """What the file calls the kind of network that it holds."""
        with self.lock:
            return string_of(self.describe().architecture)

    def rope(self) -> list[RopePair]:
        """The pairs of channels that RoPE turns, the same in all heads."""
        with self.lock:
            out = ffi.new("kvq_rope_pair *")
            found = []
            for index in range(lib.kvq_model_rope_count(self.pointer)):
                check(lib.kvq_model_rope(self.pointer, index, out))
                found.append(RopePair(int(out.first), int(out.second), float(out.frequency)))
            return found

    def meta_keys(self) -> list[str]:
        """The keys of the metadata, in the order of the file."""
        with self.lock:
            out = ffi.new("kvq_meta *")
            keys = []
            for index in range(lib.kvq_model_meta_count(self.pointer)):
                check(lib.kvq_model_meta(self.pointer, index, out))
                keys.append(_name(out.key, out.key_length))
            return keys

    def meta(self, index: int) -> RawMeta:
        """A copy of one metadata entry."""
        with self.lock:
            out = ffi.new("kvq_meta *")
            check(lib.kvq_model_meta(self.pointer, index, out))
            data = ffi.buffer(out.data, int(out.bytes))[:] if out.bytes else b""
            return RawMeta(int(out.type), bool(out.is_array), int(out.count), data)

    def tensors(self) -> list[Tensor]:
        """The tensor directory, in the order of the file."""
        with self.lock:
            out = ffi.new("kvq_tensor_info *")
            found = []
            for index in range(lib.kvq_model_tensor_count(self.pointer)):
                check(lib.kvq_model_tensor(self.pointer, index, out))
                shape = tuple(int(out.shape[i]) for i in range(int(out.n_dims)))
                name = _name(out.name, out.name_length)
                found.append(Tensor(name, shape, string_of(out.type), int(out.bytes)))
            return found


class ProfileHandle:
    """An open `kvq_profile`; it lives as long as anything refers to it."""

    def __init__(self, model: ModelHandle, path: str | os.PathLike[str]) -> None:
        """Opens a profile that was calibrated for this model.

        Raises:
            ModelError: The file cannot be read, is damaged or is no profile.
            UnsupportedError: It is of another version.
            ValueError: It is for another model.
        """
        out = ffi.new("kvq_profile **")
        with model.lock:
            check(lib.kvq_profile_open(out, model.pointer, os.fsencode(path)))
        self.pointer = out[0]
        weakref.finalize(self, lib.kvq_profile_close, self.pointer).atexit = False
