"""The exceptions of pykvq, all derived from `KvqError`.

Every message is one full sentence that names the thing, what was found and what was expected.
"""

from __future__ import annotations


class KvqError(Exception):
    """Base of every exception that pykvq raises on purpose."""


class ModelError(KvqError):
    """A model file is damaged, inconsistent or not a model."""


class UnsupportedError(ModelError):
    """A model file is sound but asks for something that pykvq does not implement."""


class TokenizerError(ModelError):
    """The tokenizer metadata of a model file is missing, inconsistent or unsupported."""


class LogitsError(ModelError, ValueError):
    """A model's logits are not finite numbers: its weights or the cache are damaged."""


class SchemeError(KvqError, ValueError):
    """The name or an option of a KV cache scheme is not valid."""


class ContextError(KvqError):
    """A session has no room left for the tokens that it was given."""


class MemoryLimitError(KvqError):
    """The memory that is needed exceeds what is available or allowed."""


class DeviceError(KvqError):
    """A device or its driver failed, or is not there."""


class Cancelled(KvqError):
    """The work was stopped by a call to cancel or by Ctrl-C."""


class DownloadError(KvqError):
    """A model could not be fetched or does not match its checksum."""


class ChatTemplateError(KvqError):
    """A chat template is invalid, refused the conversation or exceeded its limits."""
