"""Pre-tokenizers: how each family of byte-level BPE models cuts a text before merging.

A row per family, found by the value of `tokenizer.ggml.pre`. The expressions are those of the
models' own `tokenizer.json` files, in the form llama.cpp gives them (`llama-vocab.cpp`): each is
applied in order to the pieces that the one before has left; what matches becomes a piece, and so
does what lies between two matches.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _gpt4_style(digits: str) -> str:
    """The expression of the GPT-4 family, whose members differ in how they group digits."""
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


# The letters with case as they were when DeepSeek's tokenizer was made: \p{Lu}, \p{Ll} and \p{Lt}
# of today's Unicode hold more.
_DEEPSEEK_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One family of pre-tokenizers.

    Attributes:
        names: the values of `tokenizer.ggml.pre` that mean this family.
        patterns: Oniguruma expressions, applied in order.
        ignore_merges: a piece that is a token as a whole is not merged from its bytes.
        add_bos: whether a text begins with BOS where the file does not say.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> Sequence:
        """The splitter, which also writes bytes as the visible characters of GPT-2's alphabet."""
        splits = [Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


_DEFAULT = PreTokenizer(
    ("default",), (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
)

PRE_TOKENIZERS = (
    _DEFAULT,
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3"),
        (_gpt4_style(r"\p{N}{1,3}"),),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(("qwen2", "deepseek-r1-qwen"), (_gpt4_style(r"\p{N}"),)),
    PreTokenizer(("gpt-2",), (_GPT2,)),
    PreTokenizer(("smollm", "starcoder"), (r"\p{N}", _GPT2)),
    PreTokenizer(("falcon",), (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    PreTokenizer(
        ("deepseek-llm",),
        (
            r"[\r\n]",
            rf"\s?[{_DEEPSEEK_CASED}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            # The look-behind saves a search from every space of a long run that does not end
            # the piece, which would take quadratic time.
            r"(?<!\s)\s+$",
            "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
            r"\p{N}+",
        ),
    ),
)


def find_pre_tokenizer(name: str | None) -> PreTokenizer:
    """The family of a name, or the default one with a warning where it is missing or unknown."""
    for row in PRE_TOKENIZERS:
        if name in row.names:
            return row
    problem = "names no pre-tokenizer" if name is None else f"names the pre-tokenizer {name!r}"
    known = ", ".join(name for row in PRE_TOKENIZERS for name in row.names)
    warnings.warn(
        f"The model {problem}, expected one of {known}; the default one is used, and text may be "
        "split into other tokens than in training.",
        stacklevel=2,
    )
    return _DEFAULT
