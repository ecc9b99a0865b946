"""Byte-level BPE through the `tokenizers` package, built from GGUF metadata."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import tokenizers
from tokenizers.models import BPE

from pykvq.errors import TokenizerError
from pykvq.pretokenizers import PreTokenizer
from pykvq.vocab import Vocab


def _byte_alphabet() -> list[str]:
    """GPT-2's visible character for each byte (Radford et al., 2019, `encoder.py`).

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up in order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(b if b in visible else 0x100 + hidden.index(b)) for b in range(256)]


_ALPHABET = _byte_alphabet()
_BYTE_OF = {character: bytes([byte]) for byte, character in enumerate(_ALPHABET)}


class BpeEncoder:
    """Turns text into token ids: cut by the pre-tokenizer, then merged by rank."""

    def __init__(self, vocab: Vocab, merges: Sequence[str], pre: PreTokenizer) -> None:
        """Builds the merge table.

        Args:
            vocab: the vocabulary.
            merges: pairs of tokens written "left right", the earliest merged first.
            pre: the pre-tokenizer.

        Raises:
            TokenizerError: a merge is not a pair, or its parts or its result are not tokens.
        """
        # A dictionary, since a pair that is repeated keeps its first rank.
        pairs: dict[tuple[str, str], None] = {}
        for i, merge in enumerate(merges):
            left, _, right = merge.partition(" ")
            if not left or not right or " " in right:
                raise TokenizerError(
                    f"tokenizer.ggml.merges[{i}] is {merge!r}, expected two tokens with a space "
                    "between them."
                )
            pairs.setdefault((left, right))
        try:
            model = BPE(dict(vocab.ids), list(pairs), ignore_merges=pre.ignore_merges)
        except Exception as error:  # the package raises bare Exception
            raise TokenizerError(
                f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {error}."
            ) from error
        self._tokenizer = tokenizers.Tokenizer(model)
        self._tokenizer.pre_tokenizer = pre.build()
        self._missing = bytes(b for b in range(256) if _ALPHABET[b] not in vocab.ids)

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Bytes that the vocabulary has no token for are left out with a warning: some models,
        SmolLM2 for one, know only the bytes that their training text contained.
        """
        if self._missing:
            data = text.encode()
            if len(data.translate(None, self._missing)) != len(data):
                lost = ", ".join(f"0x{byte:02x}" for byte in sorted({*data} & {*self._missing}))
                warnings.warn(
                    f"The vocabulary has no token for the bytes {lost}; they are left out.",
                    stacklevel=2,
                )
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def decode_piece(text: str) -> bytes:
    """The bytes that the spelling of a byte-level token stands for."""
    return b"".join(_BYTE_OF.get(c) or c.encode("utf-8", "surrogateescape") for c in text)
