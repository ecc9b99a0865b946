"""Run GGUF language models with a KV cache below 2 bits.

    from pykvq import Model

    with Model("smollm2", kv="skvq") as model, model.session() as session:
        print(session.generate("Once upon a time", max_tokens=50).text)

Importing the package is quick: everything is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pykvq.errors import (
        Cancelled,
        ChatTemplateError,
        ContextError,
        DeviceError,
        DownloadError,
        KvqError,
        LogitsError,
        MemoryLimitError,
        ModelError,
        SchemeError,
        TokenizerError,
        UnsupportedError,
    )
    from pykvq.generation import Chunk, Generation, Stream
    from pykvq.model import Model, ModelInfo
    from pykvq.native import Scheme, schemes
    from pykvq.native_device import Device, Devices, devices
    from pykvq.native_session import SessionStats
    from pykvq.sampling_params import SamplingParams
    from pykvq.session import Session

    __version__: str

__all__ = [
    "Cancelled",
    "ChatTemplateError",
    "Chunk",
    "ContextError",
    "Device",
    "DeviceError",
    "Devices",
    "DownloadError",
    "Generation",
    "KvqError",
    "LogitsError",
    "MemoryLimitError",
    "Model",
    "ModelError",
    "ModelInfo",
    "SamplingParams",
    "Scheme",
    "SchemeError",
    "Session",
    "SessionStats",
    "Stream",
    "TokenizerError",
    "UnsupportedError",
    "__version__",
    "devices",
    "schemes",
]

_HOMES = {
    "generation": ("Chunk", "Generation", "Stream"),
    "model": ("Model", "ModelInfo"),
    "native": ("Scheme", "schemes"),
    "native_device": ("Device", "Devices", "devices"),
    "native_session": ("SessionStats",),
    "sampling_params": ("SamplingParams",),
    "session": ("Session",),
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "__version__":
        return import_module("pykvq.native").version()
    if name not in __all__:
        raise AttributeError(f"module 'pykvq' has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "errors")
    value = globals()[name] = getattr(import_module(f"pykvq.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
