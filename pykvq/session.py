"""A session: one timeline of tokens through a model, with its KV cache.

Owns the rules of use (one thread at a time, cancelling, Ctrl-C) and the ids of the tokens that the
cache holds. How text is generated is in `pykvq.generation`.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from pykvq import interruptible, native
from pykvq._native import ffi
from pykvq.checks import SESSION_RANGES, asymkv_pair, budget, device_name, whole_number
from pykvq.closing import Closing
from pykvq.errors import Cancelled, ContextError, KvqError
from pykvq.native import ModelHandle
from pykvq.native_session import (
    KEYS,
    LOGITS_ALL,
    LOGITS_LAST,
    LOGITS_NONE,
    VALUES,
    SessionHandle,
    SessionStats,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pykvq._native import CData
    from pykvq.generation import Generation, SamplingOptions, Stream
    from pykvq.model import Model, Progress
    from pykvq.sampling_params import SamplingParams

Tokens = Sequence[int] | npt.NDArray[np.integer]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
Which = Literal["none", "last", "all"]
Side = Literal["k", "v"]
Observer = Callable[[int, int, FloatArray, FloatArray, FloatArray], None]
Simulator = Callable[[int, Side, int, FloatArray], None]


def core_options(
    model: Model,
    *,
    kv: str,
    n_ctx: int | None,
    n_threads: int | None,
    n_batch: int | None,
    kv_window: int | None,
    kv_sinks: int | None,
    kv_bits: float | None,
    kv_topk: int | None,
    asymkv_layers: tuple[int, int] | None,
    memory_check: bool = True,
    pin_threads: bool = False,
    device: str = "auto",
    n_gpu_layers: int | None = None,
) -> dict[str, Any]:
    """The options of `Model.session`, checked, as `SessionHandle` takes them."""
    native.scheme_named(kv)
    l_k, l_v = (-1, -1) if asymkv_layers is None else asymkv_pair(asymkv_layers)
    return {
        "scheme": kv,
        "n_ctx": _option("n_ctx", n_ctx, 0),
        "n_batch": _option("n_batch", n_batch, 0),
        "n_threads": _option("n_threads", n_threads, 0),
        "sinks": _option("kv_sinks", kv_sinks, -1),
        "window": _option("kv_window", kv_window, -1),
        "profile": model.profile_for(kv, kv_bits),
        "kv_bits": 0.0 if kv_bits is None else budget(kv_bits),
        "kv_topk": _option("kv_topk", kv_topk, 0),
        "l_k": l_k,
        "l_v": l_v,
        "memory_check": memory_check,
        "pin_threads": pin_threads,
        "device": device_name(device),
        "n_gpu_layers": _option("n_gpu_layers", n_gpu_layers, -1),
    }


class Session(Closing):
    """One timeline of tokens; made by `Model.session`.

    A session is used by one thread at a time, and says so when two try; `cancel` and the
    properties may be used by any thread at any time. Sessions of one model are independent.

    Ctrl-C, in the main thread, stops an evaluation within the time of one layer and raises
    KeyboardInterrupt; the session holds the passes of `n_batch` tokens that were completed, and can
    go on. What a pass that was stopped had already sealed stays sealed, as after `truncate`.

    Attributes:
        model: The model.
        n_ctx: Tokens that the session can hold.
    """

    model: Model
    n_ctx: int

    def __init__(
        self,
        model: Model,
        handle: ModelHandle,
        options: Mapping[str, Any],
        progress: Progress | None,
    ) -> None:
        """Opens a session with `core_options`; see `Model.session`."""
        self.model = model
        self._progress = progress
        upload = None if progress is None else partial(progress, "weights to the GPU (MiB)")
        self._handle = SessionHandle(handle, upload=upload, **options)
        stats = self._handle.stats()
        self._n_batch = stats.n_batch
        self._n_vocab = model.info.n_vocab
        self.n_ctx = stats.n_ctx
        # Ids of the tokens in the cache, written ahead of the core: it says how many count.
        self._ids: IntArray = np.zeros(stats.n_ctx, np.int32)
        self._busy = threading.Lock()
        self._n_cancels = 0
        self._owner: object = None  # the stream that the timeline belongs to, if any

    # ---- tokens -----------------------------------------------------------------------------

    def eval(
        self,
        tokens: Tokens,
        logits: Which = "last",
        *,
        out: FloatArray | None = None,
        progress: Progress | None = None,
    ) -> FloatArray:
        """Appends tokens to the timeline.

        Passes that do not exceed `until_seal` read what token-by-token evaluation reads: on the CPU
        bit for bit, on a GPU but for rounding. Longer ones see their own tokens in f16, as a prompt
        does.

        Args:
            tokens: [n] ids, n >= 1.
            logits: Which logits to return: of the last token, of all or of none.
            out: Where to put them: C-contiguous float32 of the shape that is returned.
            progress: Called after each pass of `n_batch` tokens as ("prompt", n_done, n).

        Returns:
            [1, n_vocab], [n, n_vocab] or [0, n_vocab] float32: row i holds the unnormalized
            log-probabilities of the token that follows token i.

        Raises:
            ContextError: The context has no room for them; nothing was evaluated.
            Cancelled: `cancel` was called; the session holds the passes that were completed.
            ValueError: The ids or `out` are not of this kind, or the session was closed.
            KvqError: The session is in use by another thread.
        """
        ids = _token_array(tokens, self._n_vocab)
        with self._exclusive(owner=None):
            return self._eval(ids, logits, out, progress or self._progress, self._n_cancels)

    def _eval(
        self,
        ids: IntArray,
        logits: Which,
        out: FloatArray | None,
        progress: Progress | None,
        n_cancels: int,
    ) -> FloatArray:
        """Evaluates; `n_cancels` is the count of cancellations that came before this work."""
        n, start = len(ids), self.n_tokens
        if n > self.n_ctx - start:
            raise ContextError(
                f"The context is full: it holds {start} of {self.n_ctx} tokens, and {n} more were"
                " to be evaluated."
            )
        n_rows = {"none": 0, "last": 1, "all": n}.get(logits)
        if n_rows is None:
            raise ValueError(f"logits is {logits!r}, expected 'none', 'last' or 'all'.")
        rows = _logits_array((n_rows, self._n_vocab), out)
        self._ids[start : start + n] = ids
        done = 0
        while done < n:
            if self._n_cancels != n_cancels:
                raise Cancelled(f"The evaluation was cancelled after {done} of {n} tokens.")
            end = min(done + self._n_batch, n)
            try:
                self._run_pass(ids[done:end], rows[done:end] if logits == "all" else rows, end == n)
            except Cancelled:
                continue  # meant for this work: see above; else for what had just ended: go on
            done = end
            if progress is not None and n > self._n_batch:
                progress("prompt", done, n)
        return rows

    def _run_pass(self, ids: IntArray, rows: FloatArray, is_last: bool) -> None:
        which = LOGITS_ALL if len(rows) == len(ids) else LOGITS_LAST
        if len(rows) == 0 or (len(rows) < len(ids) and not is_last):
            which = LOGITS_NONE
        tokens = ffi.from_buffer("int32_t[]", ids)
        logits = ffi.from_buffer("float[]", rows) if len(rows) else ffi.NULL
        handle = self._handle
        interruptible.call(
            lambda: handle.eval(tokens, len(ids), which, logits), cancel=handle.cancel
        )

    def observe(self, observer: Observer) -> None:
        """Shows every pass's queries, keys and values, as calibration needs it.

        Args:
            observer: Called as (layer, first, q, k, v) for each layer of each pass: q is
                [n, n_heads, d_head], k and v are [n, n_kv_heads, d_head] float32, after RoPE, of
                tokens first, first + 1, ... They are the core's own memory, valid during the call.
                What it raises ends the evaluation and is raised by it.
        """
        info = self.model.info
        shapes = [(info.n_heads, info.d_head)] + 2 * [(info.n_kv_heads, info.d_head)]

        def called(layer: int, first: int, n: int, *data: CData) -> None:
            q, k, v = (
                np.frombuffer(memoryview(ffi.buffer(x, 4 * n * h * d)), np.float32).reshape(n, h, d)
                for x, (h, d) in zip(data, shapes, strict=True)
            )
            observer(layer, first, q, k, v)

        with self._exclusive(owner=self._owner):
            self._handle.observe(called)

    def simulate(self, simulator: Simulator) -> None:
        """Lets a function stand in for a codec: it changes what sealed blocks hold.

        Args:
            simulator: Called as (layer, side, first, rows) when a block of one layer and side
                ("k" after RoPE, or "v") is sealed; rows is [n_kv_heads, block, d_head] float32, of
                tokens first, first + 1, ... What it leaves there is what later tokens read.
                What it raises ends the evaluation and is raised by it.

        Raises:
            ValueError: The session's scheme is not f16.
        """
        info = self.model.info
        block = native.block_tokens()
        shape = (info.n_kv_heads, block, info.d_head)

        def called(layer: int, side: int, first: int, data: CData) -> None:
            rows = np.frombuffer(
                memoryview(ffi.buffer(data, 4 * math.prod(shape))), np.float32
            ).reshape(shape)
            simulator(layer, "v" if side else "k", first, rows)

        with self._exclusive(owner=self._owner):
            self._handle.simulate(called)

    @property
    def n_tokens(self) -> int:
        """Tokens that the session holds."""
        return self._handle.n_tokens

    @property
    def tokens(self) -> list[int]:
        """The ids of the tokens that the session holds."""
        ids: list[int] = self._ids[: self.n_tokens].tolist()
        return ids

    @property
    def until_seal(self) -> int:
        """Tokens that can follow before the next block is sealed, at least 1.

        A pass of no more tokens than this reads what token-by-token evaluation reads: on the CPU
        bit for bit; on a GPU but for rounding, since sums have another order in other passes.
        """
        return self._handle.until_seal()

    def digest(self) -> int:
        """64 bits that tell what sealing loses, from what fixed numbers read back as.

        They are the same on every machine and for any sinks, window and size of the context; they
        change with scheme, bits and profile, and with versions that encode in another way.
        """
        return self._handle.digest()

    def truncate(self, n: int) -> None:
        """Keeps the first n tokens.

        Where n falls into a sealed block of a lossy scheme, the rows of that block return to f16
        as its codes give them back: what was lost in sealing stays lost.

        Raises:
            ValueError: n is not a whole number, the session holds fewer tokens, or was closed.
        """
        with self._exclusive(owner=None):
            self._handle.truncate(whole_number("n", n, 0, self.n_ctx))

    def reset(self) -> None:
        """Forgets all tokens; the session is as new."""
        self.truncate(0)

    # ---- measuring --------------------------------------------------------------------------

    def fill(self, n: int) -> None:
        """Makes the timeline n tokens long by repeating its sealed blocks; for measuring only.

        Sinks, the blocks again and again in their order, and then the recent tokens, unchanged: so
        long contexts can be timed after a short prompt. What the model then says is meaningless.

        Raises:
            ContextError: The context holds no n tokens.
            ValueError: n is not the tokens held and whole blocks more, no block is sealed yet, or
                the session was closed.
        """
        with self._exclusive(owner=None):
            before = self._handle.stats()
            first = before.sinks
            end = first + before.n_tokens_sealed
            self._handle.fill(whole_number("n", n, 0, SESSION_RANGES["n_ctx"][1]))
            repeated = np.resize(self._ids[first:end], n - before.n_tokens)
            self._ids[:n] = np.concatenate(
                (self._ids[:end], repeated, self._ids[end : before.n_tokens])
            )

    def time_stages(self, on: bool = True) -> None:
        """Starts clocks of the stages of evaluating, from 0; `stats.stage_ns` is what they show.

        Args:
            on: False stops the clocks and puts them to 0. They cost about 0.1 % of a step.

        Raises:
            ValueError: The session was closed.
        """
        with self._exclusive(owner=self._owner):
            self._handle.time(on)

    # ---- text -------------------------------------------------------------------------------

    @overload
    def generate(
        self,
        prompt: str | Tokens,
        max_tokens: int | None = ...,
        *,
        stop: str | Iterable[str] = ...,
        logprobs: int | None = ...,
        stream: Literal[False] = ...,
        reuse: bool = ...,
        progress: Progress | None = ...,
        params: SamplingParams | None = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: str | Tokens,
        max_tokens: int | None = ...,
        *,
        stop: str | Iterable[str] = ...,
        logprobs: int | None = ...,
        stream: Literal[True],
        reuse: bool = ...,
        progress: Progress | None = ...,
        params: SamplingParams | None = ...,
        **sampling: Unpack[SamplingOptions],
    ) -> Stream: ...

    def generate(
        self,
        prompt: str | Tokens,
        max_tokens: int | None = None,
        *,
        stop: str | Iterable[str] = (),
        logprobs: int | None = None,
        stream: bool = False,
        reuse: bool = True,
        progress: Progress | None = None,
        params: SamplingParams | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation | Stream:
        """Continues a text.

        The prompt is the whole text so far, not an addition to it. What the session already holds
        of it is not evaluated again: a lossless scheme goes on from the end of the longest common
        prefix. A lossy one does so where that needs no row of a sealed block, as when a chat goes
        on; otherwise it goes back to the last block that would be sealed at that point, so that the
        rows around the end of the prefix are in f16 as they should be. What is evaluated again
        has then seen the older tokens sealed, so the text may differ from that of a new session;
        `reuse=False` (or a prompt shorter than sinks, window and one block) excludes that.

        Args:
            prompt: Text, or ids. In a text, spellings of control tokens become these tokens, as a
                chat template needs it, and BOS is added where the model wants it and the text has
                none. For text from untrusted sources pass `model.tokenize(text)`.
            max_tokens: How many tokens to generate; by default until the model ends the text or
                the context is full.
            stop: Strings that end the text; they are not part of it.
            logprobs: For each token also give its log-probability and those of so many most likely
                ones, before any sampler.
            stream: Return an iterator of pieces of text instead of all of it.
            reuse: Whether to go on from what the session holds.
            progress: As for `eval`.
            params: Sampling parameters, instead of `model.sampling_defaults`.
            **sampling: Single sampling parameters (the fields of `SamplingParams`; `temperature`
                is another name of `temp`), which override these.

        Returns:
            A `Generation`; with `stream` a `Stream` of `Chunk`s.

        Raises:
            ContextError: The prompt does not fit into the context; nothing was evaluated.
            TypeError: The prompt or a stop string is of the wrong kind, or a sampling parameter
                is unknown.
            ValueError: An argument is out of range, or the session was closed.
            KvqError: The session is in use by another thread.
        """
        from pykvq.generation import Stream, merge_sampling

        if isinstance(prompt, str):
            from pykvq.chat import encode_chat

            prompt = encode_chat(self.model.tokenizer, prompt)
        _require_prompt(prompt)
        self._handle.require_open()
        pieces = Stream(
            self,
            _token_array(prompt, self._n_vocab),
            merge_sampling(params or self.model.sampling_defaults, sampling),
            max_tokens=max_tokens,
            stop=stop,
            n_logprobs=logprobs,
            reuse=reuse,
            progress=progress or self._progress,
        )
        if stream:
            return pieces
        for _ in pieces:
            pass
        return pieces.result

    def _go_back(self, ids: IntArray, reuse: bool) -> int:
        """Truncates to the part of `ids` that can be kept; returns its length, below len(ids)."""
        held = self._ids[: self.n_tokens]
        n = min(len(held), len(ids) - 1)
        differ = np.flatnonzero(held[:n] != ids[:n])
        keep = (int(differ[0]) if differ.size else n) if reuse else 0
        if keep < len(held):
            keep = self._keepable(keep)
            self._handle.truncate(keep)
        return keep

    def _keepable(self, common: int) -> int:
        """How many of the first `common` tokens can be kept without reading a row out of a block.

        That is, without finding a row sealed that token-by-token evaluation of `common` tokens
        would have left in f16.
        """
        stats = self._handle.stats()
        scheme = next(s for s in native.schemes(self.model.info.d_head) if s.name == stats.scheme)
        n_sealed = max(0, common - stats.sinks - stats.window) // scheme.block * scheme.block
        if scheme.lossless or stats.n_tokens_sealed <= n_sealed:
            return common
        return min(common, stats.sinks + n_sealed)

    # ---- control ----------------------------------------------------------------------------

    def cancel(self) -> None:
        """Stops what the session is doing, from any thread; without effect if it does nothing.

        `eval` raises `Cancelled`. `generate` ends with what it has so far and the reason
        "cancelled"; that holds also for a stream that waits for its consumer.
        """
        self._n_cancels += 1
        self._handle.cancel()

    @contextlib.contextmanager
    def _exclusive(self, owner: object) -> Iterator[None]:
        """Takes the session for this thread, and its timeline for `owner`."""
        if not self._busy.acquire(blocking=False):
            raise KvqError(
                "The session is in use by another thread or call; open a session for each thread,"
                " or wait until it is free."
            )
        try:
            self._handle.require_open()
            self._owner = owner
            yield
        finally:
            self._busy.release()

    def _require_owner(self, owner: object) -> None:
        if self._owner is not owner:
            raise KvqError(
                "The session was used for something else since this generation began, which can"
                " therefore not go on."
            )

    @property
    def stats(self) -> SessionStats:
        """What the session is and holds, as of the last pass that was completed."""
        return self._handle.stats()

    def sealed_block(
        self, layer: int, kv_head: int, side: Literal["k", "v"], block: int
    ) -> npt.NDArray[np.uint8]:
        """The bytes of one sealed block, for tests and research.

        Args:
            layer: Its layer.
            kv_head: Its head.
            side: "k" for keys, "v" for values.
            block: Its number; block 0 holds the tokens after the sinks.

        Returns:
            [bytes] uint8, the cache's own memory: writing to it changes what the next token reads.
            It is not to be used once the session is closed.

        Raises:
            ValueError: There is no such block.
        """
        sides = {"k": KEYS, "v": VALUES}
        if side not in sides:
            raise ValueError(f"The side is {side!r}, expected 'k' or 'v'.")
        with self._exclusive(owner=self._owner):
            return np.frombuffer(
                self._handle.block(layer, kv_head, sides[side], block), dtype=np.uint8
            )

    @property
    def closed(self) -> bool:
        """Whether the session was closed."""
        return self._handle.closed

    def close(self) -> None:
        """Frees the cache; a call that is running in another thread is cancelled first."""
        self._n_cancels += 1
        self._handle.close()

    def __enter__(self) -> Session:
        self._handle.require_open()
        return self

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.n_tokens} of {self.n_ctx} tokens"
        return f"<Session of {self.model.info.name}, {self._handle.stats().scheme}, {state}>"


def _option(name: str, value: int | None, unset: int) -> int:
    """A number for the core, for which `unset` means that it shall choose."""
    return unset if value is None else whole_number(name, value, *SESSION_RANGES[name])


def _require_prompt(prompt: object) -> None:
    """Requires what can be token ids at all, to say what a prompt may be where it is not."""
    first = next(iter(prompt), None) if isinstance(prompt, Sequence) else None
    if (
        prompt is None
        or isinstance(prompt, bytes | bytearray | Mapping)
        or isinstance(first, str | Mapping)
    ):
        raise TypeError(
            f"The prompt is {_kind(prompt, first)}, expected a str or token ids; for the messages"
            " of a conversation model.chat_template.render(messages) gives the str."
        )
    if isinstance(prompt, Sequence) and not prompt:
        raise ValueError("The prompt is empty, expected some text or at least one token.")


def _kind(value: object, first: object) -> str:
    inside = "" if first is None else f" of {type(first).__name__}"
    return f"of type {type(value).__name__}{inside}"


def _token_array(tokens: Tokens, n_vocab: int) -> IntArray:
    """Checks token ids; returns them as a contiguous array [n]."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"The tokens have shape {ids.shape}, expected [n] with n at least 1.")
    if ids.dtype.kind not in "iu":
        raise ValueError(f"The tokens are of type {ids.dtype}, expected whole numbers.")
    wrong = np.flatnonzero((ids < 0) | (ids >= n_vocab))
    if wrong.size:
        at = int(wrong[0])
        raise ValueError(
            f"Token {at} of {ids.size} has the id {int(ids[at])}, expected 0 to {n_vocab - 1}."
        )
    return np.ascontiguousarray(ids, np.int32)


def _logits_array(shape: tuple[int, int], out: FloatArray | None) -> FloatArray:
    if out is None:
        return np.empty(shape, np.float32)
    if out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise ValueError(
            f"The array for the logits is {out.dtype} {list(out.shape)}, expected C-contiguous"
            f" float32 {list(shape)}."
        )
    return out
