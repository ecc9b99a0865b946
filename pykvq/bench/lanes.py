"""What is timed: an engine with a model, a KV cache and a timeline of tokens of its own.

Owns how a lane of pykvq does it; that of llama.cpp is in `pykvq.bench.peer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from pykvq.closing import Closing
from pykvq.kv_names import parse_kv

if TYPE_CHECKING:
    from pykvq.bench.options import Options
    from pykvq.model import Model
    from pykvq.native_session import SessionStats
    from pykvq.session import IntArray


class Lane(Protocol):
    """One engine in one setting.

    Attributes:
        engine: "pykvq" or the name of a peer.
        kv: Its KV cache, as it was asked for.
        setting: The cache and all else that tells it from other lanes of the engine.
    """

    engine: str
    kv: str
    setting: str

    @property
    def n_tokens(self) -> int:
        """Tokens that it holds."""

    def eval(self, tokens: IntArray) -> None:
        """Appends tokens [n] and computes the logits of the last one."""

    def truncate(self, n: int) -> None:
        """Keeps the first n tokens."""

    def fill(self, n: int) -> None:
        """Repeats keys and values that it holds, up to n tokens.

        n must differ from the tokens held by whole blocks of 64.
        """

    def stats(self) -> SessionStats | None:
        """What the core says of the session, clocks included; None for a peer."""

    def close(self) -> None:
        """Frees it."""


class OwnLane(Closing):
    """A session of pykvq, its clocks running."""

    engine = "pykvq"

    def __init__(self, model: Model, kv: str, options: Options) -> None:
        """Opens the session.

        Args:
            model: The model.
            kv: The scheme: NAME or NAME:BITS.
            options: Context, threads, passes and device.

        Raises:
            SchemeError: The scheme is not known, or its bits are fixed.
            UnsupportedError: It has no form for this model.
            MemoryLimitError: The cache does not fit into the memory.
            DeviceError: The device is not there, or cannot be used.
        """
        scheme, bits = parse_kv(kv)
        self.kv = self.setting = kv
        self._session = model.session(
            kv=scheme.name,
            kv_bits=bits,
            n_ctx=options.n_ctx,
            n_threads=options.n_threads,
            n_batch=options.n_batch,
            device=options.device,
            n_gpu_layers=options.n_gpu_layers,
        )
        self._session.time_stages()
        self._logits = np.empty((1, model.info.n_vocab), np.float32)

    @property
    def n_tokens(self) -> int:
        """Tokens that it holds."""
        return self._session.n_tokens

    def eval(self, tokens: IntArray) -> None:
        """Appends tokens [n] and computes the logits of the last one."""
        self._session.eval(tokens, out=self._logits)

    def truncate(self, n: int) -> None:
        """Keeps the first n tokens."""
        self._session.truncate(n)

    def fill(self, n: int) -> None:
        """Repeats sealed blocks, up to n tokens."""
        self._session.fill(n)

    def stats(self) -> SessionStats:
        """What the core says of the session."""
        return self._session.stats

    def close(self) -> None:
        """Frees the cache."""
        self._session.close()
