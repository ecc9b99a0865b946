"""The vocabulary of a GGUF file: its tokens, their kinds and the special ids, checked once.

Owns the reading and checking of the `tokenizer.ggml.*` metadata. It knows nothing of how text is
split or merged; `pykvq.tokenizer` builds on it. GGUF files come from strangers: every count,
type and id is checked here, so that nothing behind this module has to.

Sources: the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) for
the keys, and llama.cpp's `llama-vocab.cpp` for defaults and for the names of special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from pykvq.errors import TokenizerError

Metadata = Mapping[str, object]
"""GGUF metadata: key to int, float, bool, str, a list of strings, or an array of numbers."""


class TokenKind(IntEnum):
    """Values of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_PREFIX = "tokenizer.ggml."
# A 32-bit -1: how some converters write "the model has no such token".
_NO_TOKEN = 0xFFFFFFFF
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# SentencePiece fixes these ids by convention; BPE vocabularies have no convention.
_SPM_DEFAULT_IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}

# Many files mark the end of a turn by nothing but the name of a token. The order matters: the
# first one present is the end-of-turn token of a file that names none.
_EOT_NAMES = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<end_of_utterance>",
)
_EOM_NAMES = ("<|eom_id|>",)
_EOS_NAME = "</s>"
# Code models separate files and repositories by these; a completion must not run past them.
_FIM_END_NAMES = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}


@dataclass(frozen=True)
class Vocab:
    """The checked vocabulary of one model.

    Attributes:
        model: `llama` (SentencePiece, merged by score) or `gpt2` (byte-level BPE).
        texts: [n_vocab] spelling of each token as stored; bytes that are not UTF-8 are kept as
            lone surrogates (`surrogateescape`), so that `raw(id)` gives the stored bytes back.
        kinds: [n_vocab] a `TokenKind` per token.
        ids: spelling to id; without empty tokens and without those that are not UTF-8, which
            no text can contain.
        bos: id that begins a sequence, or None.
        eos: id that ends a sequence, or None.
        eot: id that ends a turn of a conversation, or None.
        unk: id that stands for what cannot be spelled, or None.
        eog: every id after which generation stops.
        add_bos: what the file says about prepending `bos`; None where it says nothing.
        add_eos: what the file says about appending `eos`; None where it says nothing.
        swallows_space: ids that take the white space to their right with them when they are
            matched in a text (the special tokens of phi-3).
    """

    model: str
    texts: Sequence[str]
    kinds: bytes
    ids: Mapping[str, int]
    bos: int | None
    eos: int | None
    eot: int | None
    unk: int | None
    eog: frozenset[int]
    add_bos: bool | None
    add_eos: bool | None
    swallows_space: frozenset[int]

    @classmethod
    def from_metadata(cls, meta: Metadata) -> Vocab:
        """Reads and checks the vocabulary.

        Raises:
            TokenizerError: a key is missing, has the wrong type, or contradicts another.
        """
        model = require_string(meta, _PREFIX + "model")
        if model not in ("llama", "gpt2"):
            raise TokenizerError(
                f"{_PREFIX}model is {model!r}, but only 'gpt2' (byte-level BPE) and 'llama' "
                "(SentencePiece) vocabularies are supported."
            )
        texts = require_strings(meta, _PREFIX + "tokens")
        ids = _index(texts)
        kinds = bytearray(_kinds(meta, len(texts)))
        _check_byte_tokens(texts, kinds)

        defaults = _SPM_DEFAULT_IDS if model == "llama" else {}

        def special(name: str) -> int | None:
            return _special_id(meta, name, len(texts), defaults.get(name))

        bos, eos = special("bos_token_id"), special("eos_token_id")
        eot, eog = _end_tokens(ids, kinds, eos, special)
        return cls(
            model=model,
            texts=texts,
            kinds=bytes(kinds),
            ids=ids,
            bos=bos,
            eos=eos,
            eot=eot,
            unk=special("unknown_token_id"),
            eog=eog,
            add_bos=optional_bool(meta, _PREFIX + "add_bos_token"),
            add_eos=optional_bool(meta, _PREFIX + "add_eos_token"),
            swallows_space=_space_swallowers(meta, texts, kinds),
        )

    def __len__(self) -> int:
        return len(self.texts)

    def raw(self, token: int) -> bytes:
        """The bytes of a token's spelling as stored in the file."""
        return self.texts[token].encode("utf-8", "surrogateescape")

    def byte_value(self, token: int) -> int:
        """The byte that a token of kind `BYTE`, spelled `<0xNN>`, stands for."""
        return int(self.texts[token][3:5], 16)


def require_string(meta: Metadata, key: str) -> str:
    """The string under a key; raises TokenizerError where it is absent or not a string."""
    if key not in meta:
        raise TokenizerError(f"The metadata key {key} is missing.")
    value = meta[key]
    if not isinstance(value, str):
        raise TokenizerError(f"{key} is of type {type(value).__name__}, expected a string.")
    return value


def require_strings(meta: Metadata, key: str) -> list[str]:
    """The strings under a key, each given as str or as UTF-8 bytes.

    Bytes that are not UTF-8 become lone surrogates (`surrogateescape`).

    Raises:
        TokenizerError: the key is absent, or is not a list of strings.
    """
    if key not in meta:
        raise TokenizerError(f"The metadata key {key} is missing.")
    value = meta[key]
    if not isinstance(value, (list, tuple)):
        raise TokenizerError(
            f"{key} is of type {type(value).__name__}, expected an array of strings."
        )
    try:  # all of them bytes, as the core gives them: three times as fast for 300,000 strings
        return [bytes.decode(item, "utf-8", "surrogateescape") for item in value]
    except TypeError:
        return [_decoded(item, key, i) for i, item in enumerate(value)]


def optional_bool(meta: Metadata, key: str) -> bool | None:
    """The truth value under a key, or None where the key is absent."""
    value = meta.get(key)
    if value is None or isinstance(value, (bool, np.bool_)):
        return None if value is None else bool(value)
    raise TokenizerError(f"{key} is of type {type(value).__name__}, expected a boolean.")


def is_encodable(text: str) -> bool:
    """Whether a string is free of lone surrogates, that is, can occur in a text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decoded(item: object, key: str, index: int) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, bytes):
        return item.decode("utf-8", "surrogateescape")
    raise TokenizerError(f"{key}[{index}] is of type {type(item).__name__}, expected a string.")


def _index(texts: list[str]) -> dict[str, int]:
    """Spelling to id, without the spellings that no text can contain."""
    if not texts:
        raise TokenizerError(f"{_PREFIX}tokens is empty, expected at least one token.")
    ids = dict(zip(texts, range(len(texts)), strict=True))
    if len(ids) + max(texts.count("") - 1, 0) != len(texts):
        first: dict[str, int] = {}
        for i, text in enumerate(texts):
            if text and first.setdefault(text, i) != i:
                raise TokenizerError(
                    f"{_PREFIX}tokens holds {text!r} twice, as token {first[text]} and as token "
                    f"{i}, expected every token once."
                )
    ids.pop("", None)
    if not is_encodable("".join(texts)):
        ids = {text: i for text, i in ids.items() if is_encodable(text)}
    return ids


def _kinds(meta: Metadata, n_vocab: int) -> bytes:
    key = _PREFIX + "token_type"
    if key not in meta:
        return bytes([TokenKind.NORMAL]) * n_vocab
    kinds = number_array(meta, key, "iu", "integers", n_vocab)
    if kinds.min() < min(TokenKind) or kinds.max() > max(TokenKind):
        raise TokenizerError(
            f"{key} holds values from {kinds.min()} to {kinds.max()}, expected values from "
            f"{min(TokenKind):d} to {max(TokenKind):d}."
        )
    return kinds.astype(np.uint8).tobytes()


def number_array(
    meta: Metadata, key: str, dtype_kinds: str, what: str, length: int
) -> npt.NDArray[Any]:
    """The numbers [length] under a key.

    Args:
        meta: the metadata.
        key: the key, which must be present.
        dtype_kinds: numpy's letters of the acceptable kinds of element, such as "iu".
        what: those kinds in words, for the error.
        length: the number of elements that must be there.

    Raises:
        TokenizerError: the array is absent, of another type or of another length.
    """
    if key not in meta:
        raise TokenizerError(f"The metadata key {key} is missing.")
    value = meta[key]
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise TokenizerError(
            f"{key} is of type {type(value).__name__}, expected an array of {what}."
        )
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise TokenizerError(f"{key} is not a flat array of {what}.") from error
    if array.ndim != 1 or array.dtype.kind not in dtype_kinds:
        raise TokenizerError(
            f"{key} is an array of {array.dtype.name} with {array.ndim} dimensions, expected a "
            f"flat array of {what}."
        )
    if len(array) != length:
        raise TokenizerError(
            f"{key} has {len(array)} elements, expected {length}, one for each token."
        )
    return array


def _check_byte_tokens(texts: Sequence[str], kinds: bytearray) -> None:
    token = kinds.find(TokenKind.BYTE)
    while token >= 0:
        if not _BYTE_TOKEN.fullmatch(texts[token]):
            raise TokenizerError(
                f"Token {token} is of kind BYTE but spelled {texts[token]!r}, expected a spelling "
                "such as '<0x0A>'."
            )
        token = kinds.find(TokenKind.BYTE, token + 1)


def _special_id(meta: Metadata, name: str, n_vocab: int, default: int | None) -> int | None:
    key = _PREFIX + name
    value = meta.get(key)
    if value is None:
        return default if default is not None and default < n_vocab else None
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TokenizerError(f"{key} is of type {type(value).__name__}, expected an integer.")
    token = int(value)
    if token in (-1, _NO_TOKEN):
        return None
    if not 0 <= token < n_vocab:
        raise TokenizerError(
            f"{key} is {token}, expected the id of one of the {n_vocab} tokens of the vocabulary."
        )
    return token


def _end_tokens(
    ids: Mapping[str, int],
    kinds: bytearray,
    eos: int | None,
    special: Callable[[str], int | None],
) -> tuple[int | None, frozenset[int]]:
    """Finds the end-of-turn token and every token that ends generation.

    Tokens known by name are made control tokens in `kinds`: some converters forget to.

    Returns:
        The end-of-turn id or None, and the set of ids that end generation.
    """

    def named(names: Sequence[str]) -> list[int]:
        return [ids[name] for name in names if name in ids]

    turn_ends = named(_EOT_NAMES)
    ends = turn_ends + named(_EOM_NAMES)
    # In large BPE vocabularies "</s>" is an ordinary piece of HTML.
    if _EOS_NAME in ids and kinds[ids[_EOS_NAME]] != TokenKind.NORMAL:
        ends.append(ids[_EOS_NAME])
    for key, names in _FIM_END_NAMES.items():
        token = special(key)
        ends += named(names)[:1] if token is None else [token]
    for token in ends:
        kinds[token] = TokenKind.CONTROL

    eot = special("eot_token_id")
    if eot is None and turn_ends:
        eot = turn_ends[0]
    known = (eos, eot, special("eom_token_id"), *ends)
    return eot, frozenset(token for token in known if token is not None)


def _space_swallowers(meta: Metadata, texts: Sequence[str], kinds: bytearray) -> frozenset[int]:
    """The tokens with HF's `rstrip` attribute, which GGUF does not store.

    As in llama.cpp they are known by the model's name: all special tokens of phi-3 but three.
    """
    name = meta.get("general.name")
    if not isinstance(name, str) or not re.search(r"phi-?3", name, re.IGNORECASE):
        return frozenset()
    exempt = ("<unk>", "<s>", "<|endoftext|>")
    return frozenset(i for i in special_ids(kinds) if texts[i] not in exempt)


def special_ids(kinds: bytes | bytearray) -> list[int]:
    """The ids of the tokens that are cut out of a text whole, before it is merged."""
    matched = (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED)
    array = np.frombuffer(kinds, dtype=np.uint8)
    return [int(i) for i in np.flatnonzero(np.isin(array, matched))]
