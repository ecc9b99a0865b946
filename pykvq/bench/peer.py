"""llama.cpp as a lane of a benchmark, through the low-level interface of `llama-cpp-python`.

Owns what of llama.cpp's interface is used. Its weights are loaded once for all lanes, each of which
is a context. f16 caches come with and without flash attention, quantized ones need it.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pykvq import native
from pykvq.closing import Closing
from pykvq.errors import KvqError

if TYPE_CHECKING:
    from pykvq.bench.options import Options
    from pykvq.session import IntArray

#: The sequence that is evaluated, and one that passes copies on to it (see `LlamaLane.fill`).
_MAIN, _COPY = 0, 1

#: Log levels of ggml from which a line is kept, to say why something failed.
_ERROR = 4


def require_llama_cpp() -> Any:
    """The module `llama_cpp`.

    Raises:
        KvqError: It is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module("llama_cpp")
    except ImportError as error:
        if getattr(error, "name", None) not in ("llama_cpp", None):
            raise KvqError(f"llama-cpp-python cannot be loaded: {error}.") from error
        raise KvqError(
            "The peer llama.cpp needs llama-cpp-python, which is not installed;"
            " `pip install 'pykvq[oracle]'` installs it."
        ) from error


#: What llama.cpp tells its messages to: whoever uses it in this process, so it outlives the models.
_log_in_use: list[Any] = []


class LlamaModel(Closing):
    """A model loaded by llama.cpp.

    Attributes:
        build: What llama.cpp says it was compiled for.
    """

    build: str

    def __init__(self, path: str, n_gpu_layers: int = 0) -> None:
        """Loads a GGUF file.

        Args:
            path: The file.
            n_gpu_layers: Layers on the GPU, the output matrix counted as one; 0: none, nor anything
                else.

        Raises:
            KvqError: llama-cpp-python is not installed, was built for no GPU although it shall use
                one, or cannot load the file.
        """
        self.api: Any = require_llama_cpp().llama_cpp
        self.on_gpu = n_gpu_layers > 0
        if self.on_gpu and not self.api.llama_supports_gpu_offload():
            raise KvqError(
                "The peer llama.cpp was built for the CPU alone, but pykvq is timed on a GPU;"
                " `--device cpu` times both on the CPU."
            )
        self.errors = errors = list[str]()
        self._model: Any = None

        @self.api.llama_log_callback  # type: ignore[untyped-decorator]
        def log(level: int, text: bytes, _: object) -> None:
            if level == _ERROR:
                errors.append(text.decode("utf-8", "replace").strip())

        self.api.llama_log_set(log, None)
        _log_in_use[:] = [log]
        self.api.llama_backend_init()
        info = self.api.llama_print_system_info().decode("utf-8", "replace")
        self.build = " ".join(info.strip(" |").split())
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        self._model = self.api.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise KvqError(f"llama.cpp cannot load {path}: {self.why()}.")

    def why(self) -> str:
        """The last error that llama.cpp wrote."""
        return self.errors[-1].rstrip(".") if self.errors else "it does not say why"

    def lanes(self, options: Options) -> Iterator[LlamaLane]:
        """The lanes that are asked for, each open."""
        for kv in dict.fromkeys(options.peer_kv):
            for flash in (False, True) if kv == "f16" else (True,):
                yield LlamaLane(self, kv, flash, options)

    def open_context(self, params: Any) -> Any:
        """A new context, NULL if there can be none."""
        return self.api.llama_init_from_model(self._model, params)

    def close(self) -> None:
        """Frees the weights; lanes must have been closed."""
        if self._model:
            self.api.llama_model_free(self._model)
            self._model = None


class LlamaLane(Closing):
    """A context of llama.cpp."""

    engine = "llama.cpp"

    def __init__(self, model: LlamaModel, kv: str, flash: bool, options: Options) -> None:
        """Opens a context.

        Args:
            model: The model, which must outlive it.
            kv: The type of its cache.
            flash: Whether flash attention is on.
            options: Context, threads and passes.

        Raises:
            KvqError: llama.cpp gives none.
        """
        api = model.api
        self.kv = kv
        self.setting = f"{kv} + fa" if flash else kv
        self._model, self._api = model, api
        params = api.llama_context_default_params()
        params.n_ctx = options.n_ctx
        params.n_batch = params.n_ubatch = options.n_batch
        params.type_k = params.type_v = getattr(api, f"GGML_TYPE_{kv.upper()}")
        params.flash_attn_type = (
            api.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.offload_kqv = params.op_offload = model.on_gpu
        params.no_perf = True
        params.n_threads = params.n_threads_batch = options.n_threads or os.cpu_count() or 1
        if options.fill_from is not None:
            params.n_seq_max, params.kv_unified = 2, True
            # For what is repeated, whole, before it is cut to what is missing (see `fill`): at most
            # what is evaluated up to the first depth beyond `fill_from`.
            shallow = [depth for depth in options.depths if depth <= options.fill_from]
            params.n_ctx += max([options.fill_from, *shallow]) + native.block_tokens()
            params.n_ctx += options.n_ctx - max(options.depths)
        self._context: Any = model.open_context(params)
        if not self._context:
            raise KvqError(
                f"llama.cpp cannot open a context of {options.n_ctx} tokens with the cache"
                f" {self.setting}: {model.why()}."
            )
        self._memory = api.llama_get_memory(self._context)
        self._repeated: tuple[Any, int] | None = None  # a state, and its tokens

    @property
    def n_tokens(self) -> int:
        """Tokens that it holds."""
        return int(self._api.llama_memory_seq_pos_max(self._memory, _MAIN)) + 1

    def eval(self, tokens: IntArray) -> None:
        """Appends tokens [n] and computes the logits of the last one.

        Raises:
            KvqError: llama.cpp fails.
        """
        limit = int(self._api.llama_n_batch(self._context))
        for start in range(0, len(tokens), limit):
            part = (ctypes.c_int32 * min(limit, len(tokens) - start))(
                *tokens[start : start + limit].tolist()
            )
            batch = self._api.llama_batch_get_one(part, len(part))
            status = self._api.llama_decode(self._context, batch)
            if status != 0:
                raise KvqError(
                    f"llama.cpp cannot evaluate {len(part)} tokens after {self.n_tokens}: status"
                    f" {status}, {self._model.why()}."
                )
        self._api.llama_synchronize(self._context)

    def truncate(self, n: int) -> None:
        """Keeps the first n tokens.

        Raises:
            KvqError: llama.cpp refuses.
        """
        if not self._api.llama_memory_seq_rm(self._memory, _MAIN, n, -1):
            raise KvqError(f"llama.cpp cannot cut a context of {self.n_tokens} tokens to {n}.")

    def fill(self, n: int) -> None:
        """Repeats keys and values that it holds, up to n tokens.

        The cells of the first call's tokens are copied to a second sequence, moved to the positions
        that follow (llama.cpp turns the keys there), and given to the first sequence.

        Raises:
            KvqError: llama.cpp refuses.
        """
        api, memory = self._api, self._memory
        if self._repeated is None:
            size = int(api.llama_state_seq_get_size(self._context, _MAIN))
            state = (ctypes.c_uint8 * size)()
            api.llama_state_seq_get_data(self._context, state, size, _MAIN)
            self._repeated = state, self.n_tokens
        state, n_state = self._repeated
        while (start := self.n_tokens) < n:
            if not api.llama_state_seq_set_data(self._context, state, len(state), _COPY):
                raise KvqError(
                    f"llama.cpp cannot repeat {n_state} tokens after {start}: {self._model.why()}."
                )
            api.llama_memory_seq_rm(memory, _COPY, n - start, -1)
            api.llama_memory_seq_add(memory, _COPY, 0, -1, start)
            api.llama_memory_seq_cp(memory, _COPY, _MAIN, -1, -1)
            api.llama_memory_seq_rm(memory, _COPY, -1, -1)

    def stats(self) -> None:
        """Nothing: llama.cpp does not tell times by stage."""

    def close(self) -> None:
        """Frees the context."""
        if self._context:
            self._api.llama_free(self._context)
            self._context = None
