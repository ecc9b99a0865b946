"""Text to token ids and back, from the metadata of a GGUF file.

    tokenizer = Tokenizer.from_metadata(meta)
    ids = tokenizer.encode("Hello")
    tokenizer.decode(ids)

Ids agree with llama.cpp's. A text is cut at its special tokens, longest spelling first: the
user-defined ones always, control tokens such as `<|im_end|>` only on request. What lies between
goes to the encoder of the vocabulary: `pykvq.bpe` or `pykvq.spm`.

Two deliberate differences from llama.cpp: decoding never removes spaces before punctuation
(`clean_up_tokenization_spaces`), so that BPE text comes back as it went in; and a BPE file that
names no BOS or EOS token has none, instead of token 11.
"""

from __future__ import annotations

import codecs
import operator
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pykvq.bpe import BpeEncoder, decode_piece
from pykvq.errors import TokenizerError
from pykvq.pretokenizers import find_pre_tokenizer
from pykvq.spm import SpmEncoder
from pykvq.vocab import (
    Metadata,
    TokenKind,
    Vocab,
    number_array,
    optional_bool,
    require_string,
    require_strings,
    special_ids,
)

_SPM_SPACE = "\u2581"
# Kinds that print nothing, and kinds that only `parse_special` finds in a text.
_HIDDEN = (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.UNUSED)
_ON_REQUEST = (TokenKind.CONTROL, TokenKind.UNKNOWN)
_ASCII_SPACE = " \t\n\v\f\r"
# Special tokens are first looked for by this many leading characters, which many of them share.
_STEM_CHARS = 3


class Tokenizer:
    """The tokenizer of one model; immutable, and safe to share between threads.

    Attributes:
        n_vocab: number of tokens.
        bos: id that begins a sequence, or None.
        eos: id that ends a sequence, or None.
        eot: id that ends a turn of a conversation, or None.
        eog_ids: every id after which generation stops.
        add_bos: whether `encode` prepends `bos`.
        add_eos: whether `encode` appends `eos`.
        special_tokens: spelling to id of the tokens that `parse_special` makes known.
    """

    n_vocab: int
    bos: int | None
    eos: int | None
    eot: int | None
    eog_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    special_tokens: Mapping[str, int]

    def __init__(
        self,
        vocab: Vocab,
        encode_plain: Callable[[str], list[int]],
        *,
        add_bos: bool,
        space_prefix: bool,
    ) -> None:
        """Joins a vocabulary and its encoder; see `from_metadata`.

        Args:
            vocab: the vocabulary.
            encode_plain: turns text without special tokens into ids.
            add_bos: whether to prepend BOS where the file does not say.
            space_prefix: whether SPM text gets a space in front.
        """
        self._vocab = vocab
        self._encode_plain = encode_plain
        self._space_prefix = space_prefix
        self._is_spm = vocab.model == "llama"
        self._pieces: dict[int, bytes] = {}
        self.n_vocab = len(vocab)
        self.bos, self.eos, self.eot, self.eog_ids = vocab.bos, vocab.eos, vocab.eot, vocab.eog
        self.add_bos = add_bos if vocab.add_bos is None else vocab.add_bos
        self.add_eos = bool(vocab.add_eos)
        for wanted, token, name in (
            (self.add_bos, self.bos, "bos"),
            (self.add_eos, self.eos, "eos"),
        ):
            if wanted and token is None:
                raise TokenizerError(
                    f"The model wants a {name.upper()} token added to texts, but "
                    f"tokenizer.ggml.{name}_token_id names none."
                )

        # Spellings that are not UTF-8 are not in `vocab.ids`: they cannot be found in a text.
        matched = [i for i in special_ids(vocab.kinds) if vocab.texts[i] in vocab.ids]
        matched.sort(key=lambda i: -len(vocab.raw(i)))
        self._user_defined = [i for i in matched if vocab.kinds[i] not in _ON_REQUEST]
        self._matched = matched
        self.special_tokens = {vocab.texts[i]: i for i in matched if vocab.kinds[i] in _ON_REQUEST}

    @classmethod
    def from_metadata(cls, meta: Metadata) -> Tokenizer:
        """Builds the tokenizer that a GGUF file describes.

        Args:
            meta: the file's metadata; see `pykvq.vocab.Metadata`.

        Raises:
            TokenizerError: the metadata is incomplete, inconsistent or of an unsupported kind.
        """
        vocab = Vocab.from_metadata(meta)
        if vocab.model == "llama":
            scores = number_array(
                meta, "tokenizer.ggml.scores", "f", "floating-point numbers", len(vocab)
            )
            if not np.isfinite(scores).all():
                raise TokenizerError("tokenizer.ggml.scores holds a value that is not finite.")
            space_prefix = optional_bool(meta, "tokenizer.ggml.add_space_prefix")
            return cls(
                vocab,
                SpmEncoder(vocab, scores).encode,
                add_bos=True,
                space_prefix=space_prefix is None or space_prefix,
            )
        key = "tokenizer.ggml.pre"
        pre = find_pre_tokenizer(require_string(meta, key) if key in meta else None)
        merges = require_strings(meta, "tokenizer.ggml.merges")
        encoder = BpeEncoder(vocab, merges, pre)
        return cls(vocab, encoder.encode, add_bos=pre.add_bos, space_prefix=False)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Turns a text into token ids.

        Args:
            text: any text without lone surrogates.
            add_special: whether to add BOS and EOS as the model wants them.
            parse_special: whether spellings of control tokens in the text become these tokens.
                Leave it off for text from untrusted sources.

        Returns:
            The ids.

        Raises:
            TypeError: the text is not a str.
            ValueError: the text holds a lone surrogate, which no encoding of it can express.
        """
        if not isinstance(text, str):
            raise TypeError(f"The text is of type {type(text).__name__}, expected a str.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"The text holds the lone surrogate U+{ord(text[error.start]):04X} at character "
                f"{error.start}, expected text that can be written as UTF-8."
            ) from None
        ids = [self.bos] if add_special and self.add_bos and self.bos is not None else []
        after_special = True
        for fragment in self._fragments(text, parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
            elif self._is_spm:
                prefix = _SPM_SPACE if self._space_prefix and after_special else ""
                ids += self._encode_plain(prefix + fragment.replace(" ", _SPM_SPACE))
            else:
                ids += self._encode_plain(fragment)
            after_special = isinstance(fragment, int)
        if add_special and self.add_eos and self.eos is not None:
            ids.append(self.eos)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Turns token ids into text.

        Bytes that are not UTF-8 become U+FFFD. The space that SPM vocabularies put in front of a
        text is removed again.

        Args:
            ids: the ids.
            skip_special: whether control tokens are left out rather than spelled.

        Returns:
            The text, equal to what a `StreamDecoder` gives for the same ids.

        Raises:
            ValueError: an id is not in the vocabulary.
        """
        text = b"".join([self.token_bytes(token, special=not skip_special) for token in ids])
        return self.without_space_prefix(text).decode("utf-8", "replace")

    def token_bytes(self, token: int, special: bool = False) -> bytes:
        """The bytes that one token adds to a text.

        Args:
            token: its id.
            special: whether control, unknown and unused tokens give their spelling instead of
                nothing.

        Returns:
            The bytes, not necessarily whole characters; an SPM space is a space.

        Raises:
            ValueError: the id is not in the vocabulary.
        """
        token = operator.index(token)
        if not 0 <= token < self.n_vocab:
            raise ValueError(
                f"Token {token} is not in the vocabulary, expected an id from 0 to "
                f"{self.n_vocab - 1}."
            )
        if self._vocab.kinds[token] in _HIDDEN and not special:
            return b""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._spell(token)
        return piece

    def _spell(self, token: int) -> bytes:
        kind = self._vocab.kinds[token]
        if kind in _HIDDEN or kind == TokenKind.USER_DEFINED:
            return self._vocab.raw(token)
        if kind == TokenKind.BYTE:
            return bytes([self._vocab.byte_value(token)])
        if self._is_spm:
            return self._vocab.raw(token).replace(_SPM_SPACE.encode(), b" ")
        return decode_piece(self._vocab.texts[token])

    def without_space_prefix(self, piece: bytes) -> bytes:
        """The first bytes of a text without the space that `encode` put in front of it."""
        return piece.removeprefix(b" ") if self._space_prefix else piece

    def _fragments(self, text: str, parse_special: bool) -> list[str | int]:
        """Cuts a text at its special tokens: pieces of plain text, and ids between them."""
        fragments: list[str | int] = [text] if text else []
        specials = self._matched if parse_special else self._user_defined
        stems: dict[str, bool] = {}
        for token in specials:
            spelling = self._vocab.texts[token]
            stem = spelling[:_STEM_CHARS]
            if stem not in stems:
                stems[stem] = stem in text
            if not stems[stem] or spelling not in text:
                continue
            strip = token in self._vocab.swallows_space
            cut: list[str | int] = []
            for fragment in fragments:
                if isinstance(fragment, int):
                    cut.append(fragment)
                    continue
                head, *rest = fragment.split(spelling)
                if head:
                    cut.append(head)
                for plain in rest:
                    cut.append(token)
                    plain = plain.lstrip(_ASCII_SPACE) if strip else plain
                    if plain:
                        cut.append(plain)
            fragments = cut
        return fragments


class StreamDecoder:
    """Turns tokens into text one by one, as they are generated.

    A character whose bytes are spread over several tokens appears once and whole. The strings
    given by `push` and `flush`, joined, equal the `decode` of all ids.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, at_start: bool = True
    ) -> None:
        """Starts a text.

        Args:
            tokenizer: the tokenizer.
            skip_special: whether control tokens are left out rather than spelled.
            at_start: whether the tokens begin a text, so that the space that SPM vocabularies
                put there is removed; False for tokens that go on after a prompt.
        """
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._at_start = at_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Adds one token; returns the characters that it completes, perhaps none."""
        piece = self._tokenizer.token_bytes(token, special=not self._skip_special)
        if self._at_start and piece:
            piece = self._tokenizer.without_space_prefix(piece)
            self._at_start = False
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """Ends the text; returns U+FFFD for a character that was left incomplete, or nothing."""
        return self._utf8.decode(b"", final=True)
