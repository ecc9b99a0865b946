"""Sessions of the C core, with Python's types: what `pykvq.native` is for the rest of it.

Owns the C handle of a session and its lifetime: it is closed once, by `close`, or when the last
reference to it goes. Its finalizer keeps the model's handle alive, so the core sees every session
closed before its model, in whatever order the collector runs.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pykvq._native import ffi, lib
from pykvq.errors import KvqError
from pykvq.native import check, string_of

if TYPE_CHECKING:
    from pykvq._native import CData
    from pykvq.native import ModelHandle, ProfileHandle

LOGITS_NONE: Final = lib.KVQ_LOGITS_NONE
LOGITS_LAST: Final = lib.KVQ_LOGITS_LAST
LOGITS_ALL: Final = lib.KVQ_LOGITS_ALL

KEYS: Final = 0
VALUES: Final = 1

#: The stages of evaluating that are timed: products with weights; attention; new keys and values
#: into the cache, and blocks sealed; embedding, norms, RoPE and activations.
STAGES: Final = ("weights", "attention", "append", "other")


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
        bytes_tables: The profile in memory, if the scheme uses it; sessions share it.
        bytes_scratch: Everything else that the session allocated.
        bytes_weights: The model's weights, which are mapped; sessions share them.
        bytes_total: Weights, cache, tables and scratch.
        gpu: Index of the CUDA device that has layers; None where all run on the CPU.
        n_gpu_layers: Layers there: the last ones.
        gpu_head: Whether the output matrix is there too.
        bytes_gpu: The GPU's part of the bytes above, once the context is full, alignment included.
        bytes_gpu_now: What is allocated there now; 0 for a plan.
        bytes_gpu_weights: The weights' part of bytes_gpu.
        bytes_gpu_rows: The part of the tokens that stay in f16.
        bytes_gpu_sealed: The sealed blocks' part.
        bytes_gpu_tables: The profile's part, with the places of all blocks.
        bytes_gpu_scratch: What a pass works in there.
        bytes_gpu_chunk: Sealed blocks are allocated in pieces of this size as the context grows.
        bytes_host_weights: Weights that the CPU reads: all, where nothing is on a GPU.
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
    gpu: int | None
    n_gpu_layers: int
    gpu_head: bool
    bytes_gpu: int
    bytes_gpu_now: int
    bytes_gpu_weights: int
    bytes_gpu_rows: int
    bytes_gpu_sealed: int
    bytes_gpu_tables: int
    bytes_gpu_scratch: int
    bytes_gpu_chunk: int
    bytes_host_weights: int
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
    def bytes_host(self) -> int:
        """What the memory of the host has of weights and session; all, where no GPU has any."""
        return self.bytes_total - self.bytes_gpu

    @property
    def bits_sealed(self) -> float:
        """Bits per element of a sealed block, keys and values averaged."""
        return (self.bits_sealed_k + self.bits_sealed_v) / 2


def _stats(raw: CData) -> SessionStats:
    return SessionStats(
        isa=string_of(raw.isa),
        scheme=string_of(raw.scheme),
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
        gpu=int(raw.gpu) if int(raw.gpu) >= 0 else None,
        n_gpu_layers=int(raw.n_gpu_layers),
        gpu_head=bool(raw.gpu_head),
        bytes_gpu=int(raw.bytes_gpu),
        bytes_gpu_now=int(raw.bytes_gpu_now),
        bytes_gpu_weights=int(raw.bytes_gpu_weights),
        bytes_gpu_rows=int(raw.bytes_gpu_rows),
        bytes_gpu_sealed=int(raw.bytes_gpu_sealed),
        bytes_gpu_tables=int(raw.bytes_gpu_tables),
        bytes_gpu_scratch=int(raw.bytes_gpu_scratch),
        bytes_gpu_chunk=int(raw.bytes_gpu_chunk),
        bytes_host_weights=int(raw.bytes_host_weights),
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
        pin_threads: bool = False,
        device: str = "auto",
        n_gpu_layers: int = -1,
        upload: Callable[[int, int], None] | None = None,
    ) -> None:
        self._name = ffi.new("char[]", scheme.encode())
        self._device = ffi.new("char[]", device.encode())
        self.errors: list[BaseException] = []
        errors = self.errors  # so that the callback does not keep the options alive

        def keep(kind: type, error: BaseException, trace: object) -> None:
            """An exception, a signal's too, cannot pass through C; `error` stops the upload."""
            errors.append(error)

        @ffi.callback("kvq_progress", error=1, onerror=keep)
        def uploaded(_: CData, done: int, total: int) -> int:
            if upload is not None:
                upload(done, total)
            return 0

        self._upload = uploaded
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
                "pin_threads": pin_threads,
                "device": self._device,
                "n_gpu_layers": n_gpu_layers,
                "upload": self._upload,
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
            BaseException: What `upload` raised, or a signal while weights went up.
        """
        options = _Options(**numbers)
        out = ffi.new("kvq_session **")
        with model.lock:
            status = lib.kvq_session_open(out, model.pointer, options.raw)
        if options.errors:
            raise options.errors[0]
        check(status)
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
        if os.getpid() != self._pid:
            self._finalizer()  # whoever held the locks when it was forked holds them for ever
            return
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
        if os.getpid() != self._pid:
            return
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
