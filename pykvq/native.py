"""The C core, with Python's types: statuses become exceptions, structs become dataclasses.

Owns the C handles (`ModelHandle`, `SessionHandle`) and their lifetimes; nothing else in the package
touches `pykvq._native`. Knows no tokenizer and no numpy, so that importing it is quick.

A handle is closed once: by `close`, or when the last reference to it goes. A session's finalizer
keeps its model's handle alive, so the core sees every session closed before its model, in
whatever order the collector runs.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from pykvq._native import ffi, lib
from pykvq.errors import (
    Cancelled,
    ContextError,
    KvqError,
    MemoryLimitError,
    ModelError,
    SchemeError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from pykvq._native import CData

LOGITS_NONE: Final = lib.KVQ_LOGITS_NONE
LOGITS_LAST: Final = lib.KVQ_LOGITS_LAST
LOGITS_ALL: Final = lib.KVQ_LOGITS_ALL

KEYS: Final = 0
VALUES: Final = 1

#: The stages of evaluating that are timed: products with weights; attention; new keys and values
#: into the cache, and blocks sealed; embedding, norms, RoPE and activations.
STAGES: Final = ("weights", "attention", "append", "other")

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
}


def check(status: int) -> None:
    """Raises the exception of a status, with the sentence that the core recorded on this thread."""
    if status != lib.KVQ_OK:
        sentence = _text(lib.kvq_error()).rstrip(".") + "."
        raise _EXCEPTIONS.get(status, KvqError)(sentence)


def _text(chars: CData) -> str:
    return ffi.string(chars).decode("utf-8", "replace")


def _name(chars: CData, length: CData) -> str:
    """A name of a GGUF file; bytes that are not UTF-8 become lone surrogates."""
    return ffi.buffer(chars, int(length))[:].decode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------------------------------
# The core
# ---------------------------------------------------------------------------------------------


def version() -> str:
    """The version of the core."""
    return _text(lib.kvq_version())


def memory_available() -> int:
    """Bytes that can be had without paging, cached files such as mapped weights among them."""
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
    return _text(lib.kvq_isa_available()).split(",")


def isa_selected() -> str:
    """The instruction set that sessions use: the best, or the one that KVQ_ISA names.

    Raises:
        ValueError: KVQ_ISA names one that is not available.
    """
    out = ffi.new("const char **")
    check(lib.kvq_isa_selected(out))
    return _text(out[0])


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
                name=_text(out.name),
                summary=_text(out.summary),
                basis_k=_text(out.basis_k),
                basis_v=_text(out.basis_v),
                codec_k=_text(out.codec_k),
                codec_v=_text(out.codec_v),
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


def scheme_named(name: str) -> Scheme:
    """The scheme of a name, at the usual width of a head.

    Raises:
        SchemeError: There is none of this name.
    """
    known = {scheme.name: scheme for scheme in schemes()}
    if name not in known:
        raise SchemeError(f"The KV scheme {name!r} is unknown; known are: {', '.join(known)}.")
    return known[name]


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
            return _text(self.describe().architecture)

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
                found.append(Tensor(name, shape, _text(out.type), int(out.bytes)))
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


# ---------------------------------------------------------------------------------------------
# Sessions
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SessionStats:
    """What a session is and holds.

    Attributes:
        isa: Instruction set of the kernels that run.
        scheme: Name of the KV scheme.
        n_ctx: Tokens that the cache can hold.
        n_batch: Tokens per pass through the layers.
        n_threads: Threads that share the work of a pass.
        sinks: First tokens kept in f16.
        window: Last tokens kept in f16.
        n_tokens: Tokens in the cache now.
        n_tokens_sealed: Of these, those in sealed blocks.
        bytes_kv: Allocated for the cache: the sum of the three below.
        bytes_sinks: For the first tokens, in f16.
        bytes_sealed: For the sealed blocks of a full context.
        bytes_recent: For the last tokens, in f16.
        bytes_sealed_k: The keys' part of bytes_sealed.
        bytes_sealed_v: The values' part.
        bytes_tables: Bases that the scheme has calibrated; sessions share them.
        bytes_scratch: Everything else that the session allocated.
        bytes_weights: The model's weights, which are mapped; sessions share them.
        bytes_total: Weights, cache, tables and scratch.
        bits_sealed_k: Bits per element of a sealed block of keys, all its metadata included.
        bits_sealed_v: The same for values.
        bits_full: Bits per element of a full context, everything included.
        bits_used: The same for the tokens held now; 0 where there are none.
        uses_profile: Whether anything in the cache is as it is by a calibrated profile.
        kv_topk: Tokens of sealed blocks that a token evaluated alone reads, per KV head; 0: all.
        bytes_step_k: Bytes of keys that one more token evaluated alone reads, all layers.
        bytes_step_v: The same of values.
        n_evaluated: Tokens evaluated since the session was opened.
        seconds_evaluated: Time spent on them.
        stage_ns: Nanoseconds by stage of evaluating since the clocks were started
            (`Session.time_stages`); the stages are `STAGES`.
    """

    isa: str
    scheme: str
    n_ctx: int
    n_batch: int
    n_threads: int
    sinks: int
    window: int
    n_tokens: int
    n_tokens_sealed: int
    bytes_kv: int
    bytes_sinks: int
    bytes_sealed: int
    bytes_recent: int
    bytes_sealed_k: int
    bytes_sealed_v: int
    bytes_tables: int
    bytes_scratch: int
    bytes_weights: int
    bytes_total: int
    bits_sealed_k: float
    bits_sealed_v: float
    bits_full: float
    bits_used: float
    uses_profile: bool
    kv_topk: int
    bytes_step_k: int
    bytes_step_v: int
    n_evaluated: int
    seconds_evaluated: float
    stage_ns: Mapping[str, int]

    @property
    def bits_sealed(self) -> float:
        """Bits per element of a sealed block, keys and values averaged."""
        return (self.bits_sealed_k + self.bits_sealed_v) / 2


def _stats(raw: CData) -> SessionStats:
    return SessionStats(
        isa=_text(raw.isa),
        scheme=_text(raw.scheme),
        n_ctx=int(raw.n_ctx),
        n_batch=int(raw.n_batch),
        n_threads=int(raw.n_threads),
        sinks=int(raw.sinks),
        window=int(raw.window),
        n_tokens=int(raw.n_tokens),
        n_tokens_sealed=int(raw.n_tokens_sealed),
        bytes_kv=int(raw.bytes_kv),
        bytes_sinks=int(raw.bytes_sinks),
        bytes_sealed=int(raw.bytes_sealed),
        bytes_recent=int(raw.bytes_recent),
        bytes_sealed_k=int(raw.bytes_sealed_k),
        bytes_sealed_v=int(raw.bytes_sealed_v),
        bytes_tables=int(raw.bytes_tables),
        bytes_scratch=int(raw.bytes_scratch),
        bytes_weights=int(raw.bytes_weights),
        bytes_total=int(raw.bytes_total),
        bits_sealed_k=float(raw.bits_sealed_k),
        bits_sealed_v=float(raw.bits_sealed_v),
        bits_full=float(raw.bits_full),
        bits_used=float(raw.bits_used),
        uses_profile=bool(raw.uses_profile),
        kv_topk=int(raw.kv_topk),
        bytes_step_k=int(raw.bytes_step_k),
        bytes_step_v=int(raw.bytes_step_v),
        n_evaluated=int(raw.n_evaluated),
        seconds_evaluated=float(raw.seconds_evaluated),
        stage_ns={stage: int(getattr(raw, f"ns_{stage}")) for stage in STAGES},
    )


class _Options:
    """A `kvq_session_options`, with what it points to."""

    def __init__(
        self,
        *,
        scheme: str,
        n_ctx: int,
        n_batch: int,
        n_threads: int,
        sinks: int,
        window: int,
        profile: ProfileHandle | None = None,
        kv_bits: float = 0.0,
        kv_topk: int = 0,
        l_k: int = -1,
        l_v: int = -1,
        memory_check: bool = True,
    ) -> None:
        self._name = ffi.new("char[]", scheme.encode())
        self.profile = profile
        self.raw = ffi.new(
            "kvq_session_options *",
            {
                "scheme": self._name,
                "n_ctx": n_ctx,
                "n_batch": n_batch,
                "n_threads": n_threads,
                "sinks": sinks,
                "window": window,
                "profile": ffi.NULL if profile is None else profile.pointer,
                "kv_bits": kv_bits,
                "kv_topk": kv_topk,
                "l_k": l_k,
                "l_v": l_v,
                "no_memory_check": not memory_check,
            },
        )


def plan_session(model: ModelHandle, **numbers: Any) -> SessionStats:
    """Calls `kvq_session_plan`; arguments and errors are those of `SessionHandle`."""
    options, out = _Options(**numbers), ffi.new("kvq_session_stats *")
    with model.lock:
        check(lib.kvq_session_plan(model.pointer, options.raw, out))
    return _stats(out)


def longest_context(model: ModelHandle, memory: int, **numbers: Any) -> int:
    """Calls `kvq_session_longest`; the other arguments and errors are those of `SessionHandle`."""
    options, out = _Options(**numbers), ffi.new("int32_t *")
    with model.lock:
        check(lib.kvq_session_longest(model.pointer, options.raw, memory, out))
    return int(out[0])


def _close_session(
    pointer: CData, pid: int, model: ModelHandle, profile: ProfileHandle | None
) -> None:
    del model, profile  # arguments so that they live until now
    # In a forked process the threads of the pool do not exist, and waiting for them never ends.
    if os.getpid() == pid:
        lib.kvq_session_close(pointer)


class SessionHandle:
    """An open `kvq_session`.

    Every call into the core runs under a lock, which `close` waits for too: whatever thread makes
    a call, the session outlives it. Only `cancel` does not wait.
    """

    def __init__(self, model: ModelHandle, **numbers: Any) -> None:
        """Opens a session; the numbers are those of `kvq_session_options`, as `_Options` has them.

        Raises:
            ValueError: A number is out of range.
            UnsupportedError: The scheme has no form for this model.
            MemoryLimitError: The cache does not fit into the memory.
        """
        options = _Options(**numbers)
        out = ffi.new("kvq_session **")
        with model.lock:
            check(lib.kvq_session_open(out, model.pointer, options.raw))
        self._pointer = out[0]
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._error: BaseException | None = None  # of a callback
        self._cancel_lock = threading.RLock()  # a signal handler may cancel during a cancel
        self._raw = self._describe()
        self._finalizer = weakref.finalize(
            self, _close_session, self._pointer, self._pid, model, options.profile
        )
        self._finalizer.atexit = False

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Frees the cache, after a call that is running has been cancelled and has returned."""
        self.cancel()
        with self._lock, self._cancel_lock:
            self._finalizer()

    def require_open(self) -> None:
        """Requires that the session can be used.

        Raises:
            ValueError: It was closed.
            KvqError: It belongs to the process that this one was forked from.
        """
        if self.closed:
            raise ValueError("The session was closed and cannot be used any more.")
        if os.getpid() != self._pid:
            raise KvqError(
                f"The session was opened by process {self._pid} and cannot be used in its forked"
                f" process {os.getpid()}; open a session there."
            )

    def _describe(self) -> CData:
        raw = ffi.new("kvq_session_stats *")
        lib.kvq_session_describe(self._pointer, raw)
        return raw

    def eval(self, tokens: CData, n: int, which: int, logits: CData) -> None:
        """Calls `kvq_session_eval`."""
        with self._lock:
            self.require_open()
            status = lib.kvq_session_eval(
                self._pointer, tokens, n, which, logits, ffi.NULL, ffi.NULL
            )
            self._raw = self._describe()
            error, self._error = self._error, None
            if error is not None:
                raise error
            check(status)

    def observe(self, observer: Callable[[int, int, int, CData, CData, CData], None]) -> None:
        """Calls `kvq_session_observe`; the handle keeps the callback alive."""

        @ffi.callback("kvq_observer", onerror=self._keep_error)
        def called(_: CData, layer: int, first: int, n: int, q: CData, k: CData, v: CData) -> None:
            observer(layer, first, n, q, k, v)

        with self._lock:
            self.require_open()
            lib.kvq_session_observe(self._pointer, called, ffi.NULL)
            self._observer = called

    def simulate(self, simulator: Callable[[int, int, int, CData], None]) -> None:
        """Calls `kvq_session_simulate`; the handle keeps the callback alive."""

        @ffi.callback("kvq_simulator", onerror=self._keep_error)
        def called(_: CData, layer: int, side: int, first: int, rows: CData) -> None:
            simulator(layer, side, first, rows)

        with self._lock:
            self.require_open()
            check(lib.kvq_session_simulate(self._pointer, called, ffi.NULL))
            self._simulator = called

    def _keep_error(self, kind: type, error: BaseException, trace: object) -> None:
        """An exception of a callback cannot pass through C: `eval` raises it afterwards."""
        self._error = self._error or error
        lib.kvq_session_cancel(self._pointer)

    def truncate(self, n: int) -> None:
        """Calls `kvq_session_truncate`."""
        with self._lock:
            self.require_open()
            check(lib.kvq_session_truncate(self._pointer, n))
            self._raw = self._describe()

    def fill(self, n: int) -> None:
        """Calls `kvq_session_fill`."""
        with self._lock:
            self.require_open()
            check(lib.kvq_session_fill(self._pointer, n))
            self._raw = self._describe()

    def time(self, on: bool) -> None:
        """Calls `kvq_session_time`."""
        with self._lock:
            self.require_open()
            lib.kvq_session_time(self._pointer, on)
            self._raw = self._describe()

    def until_seal(self) -> int:
        """Calls `kvq_session_until_seal`."""
        with self._lock:
            self.require_open()
            return lib.kvq_session_until_seal(self._pointer)

    def block(self, layer: int, kv_head: int, side: int, block: int) -> memoryview:
        """The bytes of one sealed block, writable; not to be used after `close`."""
        with self._lock:
            self.require_open()
            data, n_bytes = ffi.new("uint8_t **"), ffi.new("uint64_t *")
            check(lib.kvq_session_block(self._pointer, layer, kv_head, side, block, data, n_bytes))

            def release(_: CData, owner: SessionHandle = self) -> None:
                """Does nothing: the view holds this function, and so keeps the session alive."""

            return memoryview(ffi.buffer(ffi.gc(data[0], release), int(n_bytes[0])))

    def digest(self) -> int:
        """Calls `kvq_session_digest`."""
        with self._lock:
            self.require_open()
            return int(lib.kvq_session_digest(self._pointer))

    def cancel(self) -> None:
        """Makes the running `eval` stop, or else the next one; any thread may call it."""
        with self._cancel_lock:
            if not self.closed:
                lib.kvq_session_cancel(self._pointer)

    @property
    def n_tokens(self) -> int:
        """Tokens in the cache after the last call; any thread may ask."""
        return int(self._raw.n_tokens)

    def stats(self) -> SessionStats:
        """The statistics as of the last call; any thread may ask."""
        return _stats(self._raw)
