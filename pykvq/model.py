"""A model: an open GGUF file, its tokenizer and chat template, and the sessions on it."""

from __future__ import annotations

import functools
import os
import re
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pykvq import native
from pykvq._native import ffi
from pykvq.checks import MEMORY_MOST, SESSION_RANGES, budget, device_name, whole_number
from pykvq.closing import Closing
from pykvq.errors import ModelError
from pykvq.metadata import Metadata
from pykvq.native import RopePair, Scheme, Tensor
from pykvq.native_session import longest_context, plan_session
from pykvq.sampling_params import SamplingParams
from pykvq.session import Session, core_options

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pykvq.chat import ChatTemplate
    from pykvq.plan import Plan
    from pykvq.tokenizer import Tokenizer

#: Told how far something is: (what, how much is done, of how much). For downloads it counts bytes,
#: for prompts tokens.
Progress = Callable[[str, int, int], None]

#: The author's recommended sampling, by the keys of llama.cpp.
_SAMPLING_PREFIX = "general.sampling."
_SAMPLING_KEYS = {
    "temp": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "penalty_last_n": "repeat_last_n",
    "penalty_repeat": "repeat_penalty",
    "sequence": "samplers",
}


@dataclass(frozen=True)
class ModelInfo:
    """What a model is.

    Attributes:
        path: Its file; the first one of a split model.
        architecture: The kind of network, such as "llama".
        name: What its makers call it, or the name of the file.
        n_params: Number of weights.
        bytes_weights: Their size in the file.
        n_layers: Layers.
        n_heads: Query heads per layer.
        n_kv_heads: Key and value heads per layer.
        d_model: Width of the residual stream.
        d_head: Width of a head.
        d_ff: Width of the feed-forward part.
        n_vocab: Logits per token.
        n_ctx_train: Tokens of context that it was trained on.
    """

    path: str
    architecture: str
    name: str
    n_params: int
    bytes_weights: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_ff: int
    n_vocab: int
    n_ctx_train: int


class Model(Closing):
    """A GGUF model, mapped into memory.

        with Model("smollm2", kv="skvq") as model, model.session() as session:
            print(session.generate("Once upon a time", max_tokens=50).text)

    A model does not change: any number of threads may use it, each with sessions of its own.

    Attributes:
        info: What the model is.
        metadata: The metadata of the file; see `pykvq.metadata.Metadata`.
    """

    info: ModelInfo
    metadata: Metadata

    def __init__(
        self,
        path_or_name: str | os.PathLike[str],
        *,
        kv: str = "skvq",
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_batch: int | None = None,
        kv_window: int | None = None,
        kv_sinks: int | None = None,
        kv_bits: float | None = None,
        kv_topk: int | None = None,
        asymkv_layers: tuple[int, int] | None = None,
        profile: str | os.PathLike[str] | Literal[False] | None = None,
        memory_check: bool = True,
        pin_threads: bool = False,
        device: str = "auto",
        n_gpu_layers: int | None = None,
        header_only: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Opens a model, which is downloaded first if need be.

        Args:
            path_or_name: A path of a GGUF file, the name of a known model such as "smollm2", or
                `user/repository[:quantization]` of the Hugging Face hub.
            kv: KV cache scheme of sessions that name no other; see `pykvq.schemes`.
            n_ctx: Tokens that a session holds; by default the smaller of the context that the
                model was trained on and 4096.
            n_threads: Threads of a session; by default one per processor, and never more.
            n_batch: Tokens of a prompt that pass through the layers at once; by default 512.
            kv_window: Last tokens kept in f16; by default as the scheme says.
            kv_sinks: First tokens kept in f16; by default as the scheme says.
            kv_bits: Budget of schemes that have one, in bits per element; by default as the scheme
                says. For auto and asymkv of all sealed blocks with their metadata, for svdq of the
                codes of keys.
            kv_topk: Tokens of sealed blocks that each generated token reads, per KV head: the
                blocks of 64 whose mean key scores highest with its queries. By default all.
            asymkv_layers: (l_k, l_v) of asymkv: how many layers, from the first, have the higher
                bits for keys and for values; by default all, and half of them.
            profile: What calibration found for the model, which some schemes use: the path of a
                file that `pykvq calibrate` wrote; None or "auto" for the one beside the model's
                file, else one that comes with pykvq for this model, if any; False for none.
            memory_check: Whether a session is refused that does not fit into the memory with the
                weights; False opens it as long as the system grants the memory.
            pin_threads: Whether each thread of a session but the caller's stays on one processor,
                the n-th on the n-th in every session; where the system has no call for it,
                sessions are refused.
            device: Where layers run: "cpu"; "cuda" or "cuda:1", an error where there is no such
                device that can be used; "auto": the first device that can be used, with as many
                layers as fit its memory, else the CPU. `Session.stats` says what it became.
            n_gpu_layers: Layers on the GPU, counted from the last, the output matrix after all of
                them; by default all, or with "auto" as many as fit. With "cpu" more than 0 are an
                error.
            header_only: Whether the file may end behind its header. A model without weights
                (`has_weights`) can be asked what it is and plan sessions, but open none.
            progress: Told how far downloads and long prompts are.

        Raises:
            ModelError: There is no such model, or the file is damaged (`UnsupportedError`: sound,
                but of a kind that is not implemented); or the profile is not there.
            DownloadError: It cannot be fetched.
            SchemeError: The KV scheme is not known.
            ValueError: A number is out of range.
        """
        native.scheme_named(kv)
        numbers = {
            "n_ctx": n_ctx,
            "n_threads": n_threads,
            "n_batch": n_batch,
            "kv_window": kv_window,
            "kv_sinks": kv_sinks,
            "n_gpu_layers": n_gpu_layers,
        }
        for name, value in numbers.items():
            if value is not None:
                whole_number(name, value, *SESSION_RANGES[name])
        self._options: dict[str, Any] = {
            "kv": kv,
            **numbers,
            "kv_bits": None if kv_bits is None else budget(kv_bits),
            "kv_topk": kv_topk,
            "asymkv_layers": asymkv_layers,
            "memory_check": memory_check,
            "pin_threads": pin_threads,
            "device": device_name(device),
            "progress": progress,
        }
        self._profile: Path | Literal[False] | None = None
        if profile is False:
            self._profile = False
        elif profile is not None and profile != "auto":
            self._profile = Path(profile).expanduser()
            if not self._profile.is_file():
                named = os.fspath(profile) or "of an empty name"
                raise ModelError(f"The profile {named} is not there, or is not a file.")
        from pykvq import catalogue  # takes a while, and only this needs it

        path = catalogue.resolve(path_or_name, progress=progress)
        self._handle = native.ModelHandle(path, header_only=header_only)
        self._lock = threading.RLock()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self.metadata = Metadata(self._handle)
        self.info = self._describe()

    def _describe(self) -> ModelInfo:
        raw = self._handle.describe()
        name = self.metadata.get("general.name")
        path = self._handle.path
        return ModelInfo(
            path=path,
            architecture=self._handle.architecture(),
            name=name if isinstance(name, str) and name else os.path.basename(path),
            n_params=int(raw.n_params),
            bytes_weights=int(raw.bytes_weights),
            n_layers=int(raw.n_layers),
            n_heads=int(raw.n_heads),
            n_kv_heads=int(raw.n_kv_heads),
            d_model=int(raw.d_model),
            d_head=int(raw.d_head),
            d_ff=int(raw.d_ff),
            n_vocab=int(raw.n_vocab),
            n_ctx_train=int(raw.n_ctx_train),
        )

    # ---- calibration ------------------------------------------------------------------------

    @functools.cached_property
    def fingerprint(self) -> int:
        """64 bits that tie a profile to this model; 0 without weights."""
        return self._handle.fingerprint()

    @functools.cached_property
    def profile_path(self) -> Path | None:
        """The profile that sessions use; None if there is none.

        Raises:
            ModelError: This installation is not complete.
        """
        if self._profile is not None:
            return self._profile or None
        from pykvq.profile import find_profile

        return find_profile(self.info.path, self.fingerprint)

    @functools.cached_property
    def _profile_handle(self) -> native.ProfileHandle | None:
        path = self.profile_path
        return None if path is None else native.ProfileHandle(self._handle, path)

    def profile_for(self, kv: str, kv_bits: float | None = None) -> native.ProfileHandle | None:
        """The open profile, if the scheme makes use of one and there is one; for sessions.

        Raises:
            ModelError: The profile is damaged.
            ValueError: It is for another model; or there must be one, and the model was opened
                without.
        """
        scheme = native.scheme_named(kv)
        needed = scheme.profile == "needed" or (scheme.has_budget and kv_bits is not None)
        if needed and self._profile is False:
            raise ValueError(
                f"The KV scheme {kv} needs a profile of the model"
                f"{' to spend a budget of bits' if kv_bits is not None else ''}, but profiles were"
                " switched off (--profile none, in Python profile=False)."
            )
        return None if scheme.profile == "none" else self._profile_handle

    # ---- text -------------------------------------------------------------------------------

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, built on first use.

        Raises:
            TokenizerError: The file's vocabulary is damaged or of an unsupported kind.
        """
        from pykvq.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_metadata(self.metadata)
        if tokenizer.n_vocab > self.info.n_vocab:
            raise ModelError(
                f"The vocabulary of {self.info.path} has {tokenizer.n_vocab} tokens, but its"
                f" weights know {self.info.n_vocab}."
            )
        return tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether the file says how to write conversations; otherwise ChatML is tried."""
        return "tokenizer.chat_template" in self.metadata

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        """The chat template, compiled on first use; ChatML, with a warning, if there is none.

        Raises:
            ChatTemplateError: The template is not valid.
        """
        from pykvq.chat import ChatTemplate

        return ChatTemplate.from_metadata(self.metadata, self.tokenizer)

    def tokenize(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Turns a text into token ids; see `Tokenizer.encode`.

        Args:
            text: The text.
            add_special: Whether to add BOS and EOS as the model wants them.
            parse_special: Whether spellings of control tokens become these tokens.
        """
        return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Turns token ids into text, without control tokens; see `Tokenizer.decode`."""
        return self.tokenizer.decode(ids)

    @functools.cached_property
    def sampling_defaults(self) -> SamplingParams:
        """The sampling that the model's author recommends, for the rest llama.cpp's defaults.

        A recommendation that is not understood is left out with a warning.
        """
        params = SamplingParams()
        for key in self.metadata:
            if not key.startswith(_SAMPLING_PREFIX):
                continue
            value = self.metadata[key]
            field = _SAMPLING_KEYS.get(key.removeprefix(_SAMPLING_PREFIX))
            if field == "samplers" and isinstance(value, str):
                value = value.split(";")
            try:
                if field is None:
                    raise ValueError("It is not implemented.")
                params = replace(params, **{field: value})  # type: ignore[arg-type]
            except ValueError as error:
                warnings.warn(
                    f"The model recommends {key} = {value!r}, which is ignored. {error}",
                    stacklevel=3,
                )
        return params

    # ---- sessions ---------------------------------------------------------------------------

    def session(
        self,
        *,
        kv: str | None = None,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_batch: int | None = None,
        kv_window: int | None = None,
        kv_sinks: int | None = None,
        kv_bits: float | None = None,
        kv_topk: int | None = None,
        asymkv_layers: tuple[int, int] | None = None,
        memory_check: bool | None = None,
        pin_threads: bool | None = None,
        device: str | None = None,
        n_gpu_layers: int | None = None,
        progress: Progress | None = None,
    ) -> Session:
        """Opens a session: an empty timeline of tokens with a KV cache of its own.

        What is not given is as the model was opened with; `kv_window`, `kv_sinks`, `kv_bits`,
        `kv_topk` and `asymkv_layers` of the model hold only for its own scheme, `n_gpu_layers` only
        for its own device.

        Raises:
            SchemeError: The KV scheme is not known.
            UnsupportedError: The scheme has no form for this model.
            ValueError: A number is out of range, the scheme needs a profile and there is none, or
                the model was closed.
            MemoryLimitError: Weights and cache do not fit into the memory.
            DeviceError: The device that is named is not there, or cannot be used.
        """
        given = {
            "kv": kv,
            "n_ctx": n_ctx,
            "n_threads": n_threads,
            "n_batch": n_batch,
            "kv_window": kv_window,
            "kv_sinks": kv_sinks,
            "kv_bits": kv_bits,
            "kv_topk": kv_topk,
            "asymkv_layers": asymkv_layers,
            "memory_check": memory_check,
            "pin_threads": pin_threads,
            "device": device,
            "n_gpu_layers": n_gpu_layers,
            "progress": progress,
        }
        options = self._session_options(given)
        progress = options.pop("progress")
        with self._lock:
            session = Session(self, self._handle, core_options(self, **options), progress)
            self._sessions.add(session)
        return session

    def plan(self, *, memory: int | None = None, **options: Any) -> Plan:
        """What a session would take, and the longest one that fits, without opening any.

        Args:
            memory: Bytes that weights and session may take: of the GPU's memory, if it has any
                layers, else of the host's. By default what is available of it here.
            **options: Those of `session`. A device that is named ("cuda") need not be here.

        Raises:
            SchemeError: The KV scheme is not known.
            UnsupportedError: The scheme has no form for this model.
            ValueError: As for `session`.
            DeviceError: Memory is not given, and the device whose memory counts is not here.
        """
        from pykvq.plan import Plan, memory_of

        merged = self._session_options(options)
        del merged["progress"]
        numbers = core_options(self, **merged)
        stats = plan_session(self._handle, **numbers)
        if memory is None:
            memory = memory_of(stats.gpu)
        whole_number("memory", memory, 1, MEMORY_MOST)
        return Plan(
            stats=stats,
            memory=memory,
            longest=longest_context(self._handle, memory, **numbers),
        )

    def _session_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a session: what is given, else what the model was opened with."""
        options = dict(self._options)
        kv = given.get("kv")
        if kv is not None and kv != options["kv"]:
            options.update(
                kv_window=None, kv_sinks=None, kv_bits=None, kv_topk=None, asymkv_layers=None
            )
        device = given.get("device")
        if device is not None and device != options["device"]:
            options["n_gpu_layers"] = None
        options.update({key: value for key, value in given.items() if value is not None})
        return options

    @property
    def schemes(self) -> list[Scheme]:
        """The KV schemes that this model can have, with their cost at its head width."""
        return native.schemes(self.info.d_head)

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """The numbers of a weight, dequantized.

        Args:
            name: As in `tensors`.

        Returns:
            Of the file's shape, slowest axis first: [rows, columns] of a matrix.

        Raises:
            KeyError: There is no tensor of this name.
            UnsupportedError: It is of a type that is not implemented.
        """
        import numpy as np

        for index, tensor in enumerate(self.tensors):
            if tensor.name == name:
                values = np.empty(tensor.shape[::-1], np.float32)
                pointer = ffi.from_buffer("float[]", values)
                self._handle.tensor_values(index, pointer, values.size)
                return values
        raise KeyError(name)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensor directory, in the order of the file."""
        return self._handle.tensors()

    @property
    def rope(self) -> list[RopePair]:
        """The pairs of channels of a head that RoPE turns by position, and how fast."""
        return self._handle.rope()

    @property
    def has_weights(self) -> bool:
        """Whether the file has its weights; only one opened with `header_only` may lack them."""
        return bool(self._handle.describe().has_weights)

    @functools.cached_property
    def has_key_bias(self) -> bool:
        """Whether a bias is added to the keys of any layer, as Qwen2 has it."""
        return any(re.fullmatch(r"blk\.\d+\.attn_k\.bias", tensor.name) for tensor in self.tensors)

    # ---- lifetime ---------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the model was closed."""
        return self._handle.closed

    def close(self) -> None:
        """Closes the sessions, cancelling what they do, and unmaps the file."""
        with self._lock:
            for session in list(self._sessions):
                session.close()
            self._handle.close()

    def __enter__(self) -> Model:
        self._handle.require_open()
        return self

    def __repr__(self) -> str:
        state = "closed" if self.closed else self._options["kv"]
        return f"<Model {self.info.name}, {self.info.architecture}, {state}>"
