"""The tokenizer: llama.cpp's vectors, exact streams, and metadata that must be refused."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from pykvq.errors import TokenizerError
from pykvq.pretokenizers import PRE_TOKENIZERS
from pykvq.tokenizer import StreamDecoder, Tokenizer

DATA = Path(os.environ.get("PYKVQ_DATA") or Path(__file__).parents[1] / "../shared/data")
FAMILIES = (
    "llama-spm",
    "llama-bpe",
    "qwen2",
    "gpt-2",
    "phi-3",
    "deepseek-llm",
    "falcon",
    "starcoder",
)
BPE_FAMILIES = [name for name in FAMILIES if name not in ("llama-spm", "phi-3")]


def gguf_metadata(path: Path) -> dict[str, object]:
    """The metadata of a GGUF file as the tokenizer takes it: strings as bytes, numbers packed."""
    meta: dict[str, object] = {}
    for key, field in GGUFReader(path).fields.items():
        if field.types[:1] != [GGUFValueType.ARRAY]:
            meta[key] = field.contents()
        elif field.types[1] == GGUFValueType.STRING:
            meta[key] = [field.parts[i].tobytes() for i in field.data]
        else:
            meta[key] = np.concatenate([field.parts[i] for i in field.data])
    return meta


def vocabulary_path(family: str) -> Path:
    path = DATA / "tokenizer" / f"ggml-vocab-{family}.gguf"
    if not path.exists():
        pytest.skip(f"{path} is absent; PYKVQ_DATA names the folder of test data")
    return path


@cache
def metadata(family: str) -> dict[str, object]:
    return gguf_metadata(vocabulary_path(family))


@cache
def tokenizer(family: str) -> Tokenizer:
    return Tokenizer.from_metadata(metadata(family))


def vectors(family: str) -> list[tuple[str, list[int]]]:
    path = str(vocabulary_path(family))
    with open(path + ".inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    lines = Path(path + ".out").read_text().splitlines()
    assert texts.pop() == ""
    assert len(texts) == len(lines) > 40
    ids = [[int(word) for word in line.split()] for line in lines]
    return list(zip(texts, ids, strict=True))


def streamed(decoder: StreamDecoder, ids: Sequence[int]) -> list[str]:
    return [*(decoder.push(token) for token in ids), decoder.flush()]


# ---- small vocabularies, made here ----

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def spm_metadata(
    pieces: Mapping[str, float], extra: Sequence[tuple[str, int]] = (), **keys: object
) -> dict[str, object]:
    """An SPM vocabulary: <unk>, <s>, </s>, 256 bytes, scored pieces, then (spelling, type)."""
    tokens: list[str | bytes] = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)
    tokens += [*pieces, *(spelling for spelling, _ in extra)]
    types += [kind for _, kind in extra]
    scores = [0.0] * 259 + list(pieces.values()) + [0.0] * len(extra)
    meta: dict[str, object] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
    }
    return meta | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def byte_characters() -> list[str]:
    """GPT-2's alphabet, written out apart from the implementation: byte 0x20 is U+0120."""
    alphabet, hidden = [], 0x100
    for byte in range(256):
        visible = 0x21 <= byte <= 0x7E or (byte >= 0xA1 and byte != 0xAD)
        alphabet.append(chr(byte if visible else hidden))
        hidden += not visible
    return alphabet


def bpe_metadata(
    merges: Sequence[str] = (),
    extra: Sequence[tuple[str | bytes, int]] = (),
    pre: str | None = "gpt-2",
    **keys: object,
) -> dict[str, object]:
    """A byte-level BPE vocabulary: 256 bytes, the results of the merges, then (spelling, type)."""
    tokens: list[str | bytes] = [*byte_characters(), *(merge.replace(" ", "") for merge in merges)]
    types = [NORMAL] * len(tokens) + [kind for _, kind in extra]
    tokens += [spelling for spelling, _ in extra]
    meta: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, dtype=np.int32),
        "tokenizer.ggml.merges": list(merges),
    }
    if pre is not None:
        meta["tokenizer.ggml.pre"] = pre
    return meta | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def spellings(tok: Tokenizer, ids: Sequence[int]) -> list[str]:
    return [tok.token_bytes(token, special=True).decode() for token in ids]


# ---- llama.cpp's vectors ----


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_the_reference_vectors(family: str) -> None:
    tok = tokenizer(family)
    for text, ids in vectors(family):
        assert tok.encode(text, add_special=False) == ids, text


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_texts_come_back_whole_and_streamed(family: str) -> None:
    tok = tokenizer(family)
    for text, ids in vectors(family):
        assert tok.decode(ids) == text
        assert "".join(streamed(StreamDecoder(tok), ids)) == text


@pytest.mark.parametrize("family", ["llama-spm", "qwen2"])
def test_strings_and_bytes_give_the_same_tokenizer(family: str) -> None:
    meta = dict(metadata(family))
    for key, value in meta.items():
        if isinstance(value, list):
            meta[key] = [item.decode() for item in value]
        elif isinstance(value, np.ndarray):
            meta[key] = value.tolist()
    tok = Tokenizer.from_metadata(meta)
    for text, ids in vectors(family):
        assert tok.encode(text, add_special=False) == ids


@pytest.mark.parametrize(
    ("family", "bos", "eos", "eot", "eog", "add_bos"),
    [
        ("llama-spm", 1, 2, None, {2}, True),
        ("llama-bpe", 128000, 128001, 128009, {128001, 128009}, True),
        ("qwen2", 151643, 151643, 151645, {151643, 151645}, False),
        ("phi-3", 1, 32000, 32007, {2, 32000, 32007}, True),
        ("gpt-2", 50256, 50256, 50256, {50256}, False),
        ("starcoder", 0, 0, 0, {0, 4}, False),
    ],
)
def test_special_ids_equal_those_of_llama_cpp(
    family: str, bos: int, eos: int, eot: int | None, eog: set[int], add_bos: bool
) -> None:
    tok = tokenizer(family)
    assert (tok.bos, tok.eos, tok.eot, tok.add_bos) == (bos, eos, eot, add_bos)
    assert not tok.add_eos
    assert tok.eog_ids == eog


def test_html_in_a_bpe_vocabulary_does_not_end_generation() -> None:
    tok = Tokenizer.from_metadata(bpe_metadata(["< /", "s >", "</ s>"]))
    assert tok.token_bytes(258) == b"</s>"
    assert 258 not in tok.eog_ids
    marked = Tokenizer.from_metadata(bpe_metadata(extra=[("</s>", CONTROL)]))
    assert marked.eog_ids == {256}


# ---- round trips and streams ----

any_text = st.text(max_size=60) | st.lists(
    st.sampled_from(
        [" ", "  ", "\n", "\t", "a", "he", "'ll", "12", "\u4e2d", "\u0301", "\U0001f600"]
    ),
    max_size=30,
).map("".join)


@pytest.mark.parametrize("family", [name for name in BPE_FAMILIES if name != "starcoder"])
@settings(max_examples=60, deadline=None)
@given(text=any_text)
def test_bpe_round_trip(family: str, text: str) -> None:
    tok = tokenizer(family)
    with warnings.catch_warnings(record=True) as lost:
        warnings.simplefilter("always")
        ids = tok.encode(text, add_special=False)
    if not lost:
        assert tok.decode(ids) == text
    else:
        assert family == "falcon"


@pytest.mark.parametrize("family", ["llama-spm", "phi-3"])
@settings(max_examples=60, deadline=None)
@given(text=any_text)
def test_spm_round_trip(family: str, text: str) -> None:
    text = text.replace("\u2581", "_")  # SentencePiece's own sign for a space
    tok = tokenizer(family)
    assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("family", ["llama-spm", "gpt-2", "qwen2"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_stream_of_any_tokens_equals_their_decoding(family: str, data: st.DataObject) -> None:
    tok = tokenizer(family)
    # The first ids of these vocabularies are bytes and short pieces: broken UTF-8 is frequent.
    ids = data.draw(st.lists(st.integers(0, 400) | st.integers(0, tok.n_vocab - 1), max_size=20))
    for skip in (True, False):
        parts = streamed(StreamDecoder(tok, skip_special=skip), ids)
        assert "".join(parts) == tok.decode(ids, skip_special=skip)
        raw = b"".join(tok.token_bytes(token, special=not skip) for token in ids)
        whole = raw.decode("utf-8", "replace")
        assert "".join(parts) in (whole, whole.removeprefix(" "))


def test_a_split_character_appears_once_and_whole() -> None:
    tok = Tokenizer.from_metadata(spm_metadata({"\u2581": -1.0}))
    ids = tok.encode("a\U0001f600", add_special=False)
    assert len(ids) == 6
    assert streamed(StreamDecoder(tok), ids) == ["", "a", "", "", "", "\U0001f600", ""]


def test_a_character_cut_off_by_the_end_becomes_a_replacement_character() -> None:
    tok = Tokenizer.from_metadata(spm_metadata({"\u2581": -1.0}))
    ids = tok.encode("\U0001f600", add_special=False)[1:-1]
    assert streamed(StreamDecoder(tok), ids) == ["", "", "", "\ufffd"]
    assert tok.decode(ids) == "\ufffd"


def test_only_the_beginning_of_a_text_loses_its_space() -> None:
    tok = tokenizer("llama-spm")
    ids = tok.encode("Hello world")
    assert tok.decode(ids) == "Hello world"
    assert "".join(streamed(StreamDecoder(tok, at_start=False), ids)) == " Hello world"
    assert tok.token_bytes(ids[1]) == b" Hello"


# ---- special tokens ----


def test_control_tokens_are_parsed_on_request_only() -> None:
    tok = tokenizer("qwen2")
    start = tok.special_tokens["<|im_start|>"]
    assert start not in tok.encode("<|im_start|>user", parse_special=False)
    ids = tok.encode("<|im_start|>user", parse_special=True)
    assert ids[0] == start
    assert tok.decode(ids) == "user"
    assert tok.decode(ids, skip_special=False) == "<|im_start|>user"
    assert tok.token_bytes(start) == b""
    assert tok.token_bytes(start, special=True) == b"<|im_start|>"


def test_user_defined_tokens_are_matched_always_and_longest_first() -> None:
    tok = Tokenizer.from_metadata(
        bpe_metadata(extra=[("<t>", USER_DEFINED), ("<t><t>", USER_DEFINED), ("<c>", CONTROL)])
    )
    ids = tok.encode("a<t><t><t><c>b")
    assert spellings(tok, ids) == ["a", "<t><t>", "<t>", *"<c>b"]
    assert tok.decode(ids) == "a<t><t><t><c>b"
    assert spellings(tok, tok.encode("<c><t>", parse_special=True)) == ["<c>", "<t>"]


def test_spm_text_gets_a_space_at_the_start_and_after_special_tokens() -> None:
    pieces = {"\u2581": -3.0, "a": -2.0, "\u2581a": -1.0}
    tok = Tokenizer.from_metadata(spm_metadata(pieces))
    assert spellings(tok, tok.encode("a</s>aa", parse_special=True)) == [
        "<s>",
        " a",
        "</s>",
        " a",
        "a",
    ]
    bare = Tokenizer.from_metadata(spm_metadata(pieces, add_space_prefix=False))
    assert spellings(bare, bare.encode("a</s>a", parse_special=True)) == ["<s>", "a", "</s>", "a"]
    assert bare.decode(bare.encode(" a")) == " a"


def test_special_tokens_of_phi_3_swallow_the_space_after_them() -> None:
    tok = tokenizer("phi-3")
    user, end = tok.special_tokens["<|user|>"], tok.special_tokens["<|end|>"]
    plain = tok.encode("Hi", add_special=False)
    text = "<|user|> \n Hi<|end|>\n"
    assert tok.encode(text, add_special=False, parse_special=True) == [user, *plain, end]


def test_bos_and_eos_are_added_as_the_model_wants_them() -> None:
    def added(meta: dict[str, object]) -> list[int]:
        return Tokenizer.from_metadata(meta).encode("")

    assert added(spm_metadata({})) == [1]
    assert added(spm_metadata({}, add_bos_token=False)) == []
    assert added(spm_metadata({}, add_eos_token=True)) == [1, 2]
    assert added(bpe_metadata(bos_token_id=7)) == []
    assert added(bpe_metadata(bos_token_id=7, add_bos_token=True)) == [7]
    assert added(bpe_metadata(bos_token_id=7, pre="llama-bpe")) == [7]
    assert Tokenizer.from_metadata(spm_metadata({})).encode("", add_special=False) == []


def test_ends_of_generation_are_found_by_name_even_if_marked_as_text() -> None:
    tok = Tokenizer.from_metadata(
        bpe_metadata(extra=[("<|im_end|>", NORMAL), ("<|fim_pad|>", CONTROL)], eos_token_id=3)
    )
    turn_end = tok.special_tokens["<|im_end|>"]
    assert tok.eot == turn_end
    assert tok.eog_ids == {3, turn_end, tok.special_tokens["<|fim_pad|>"]}
    assert turn_end not in tok.encode("<|im_end|>")
    assert tok.decode([turn_end]) == ""


# ---- SPM merging ----


def merged_by_definition(pieces: Mapping[str, float], text: str) -> list[str]:
    """SPM as defined: join the best-scored pair, the leftmost of equals, until there is none."""
    symbols = list(text)
    while True:
        pairs = [(pieces.get(a + b), -i) for i, (a, b) in enumerate(pairwise(symbols))]
        best = max(((score, i) for score, i in pairs if score is not None), default=None)
        if best is None:
            return symbols
        at = -best[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.dictionaries(
        st.text("ab\u2581", min_size=1, max_size=5),
        st.sampled_from([-1.0, -2.0, -3.0, 0.0]),
        max_size=12,
    ),
    text=st.text("ab\u2581", max_size=40),
)
def test_spm_merges_as_defined(pieces: dict[str, float], text: str) -> None:
    tok = Tokenizer.from_metadata(spm_metadata(pieces, add_space_prefix=False))
    expected: list[bytes] = []
    for symbol in merged_by_definition(pieces, text):
        known = symbol in pieces
        expected += [symbol.encode()] if known else [bytes([byte]) for byte in symbol.encode()]
    ids = tok.encode(text, add_special=False)
    assert [tok.token_bytes(token) for token in ids] == [
        part.replace("\u2581".encode(), b" ") for part in expected
    ]


def test_spellings_of_control_and_byte_tokens_do_not_arise_from_text() -> None:
    # The pieces lead to "<s>" by merging: "<s" and ">".
    tok = Tokenizer.from_metadata(
        spm_metadata({"<": -3.0, "s": -3.0, ">": -3.0, "<s": -1.0}, add_space_prefix=False)
    )
    assert spellings(tok, tok.encode("<s>", add_special=False)) == ["<s", ">"]
    assert tok.decode(tok.encode("<0x41>")) == "<0x41>"


def test_a_vocabulary_without_byte_tokens_uses_the_unknown_token() -> None:
    meta: dict[str, object] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "a"],
        "tokenizer.ggml.scores": [0.0, -1.0],
        "tokenizer.ggml.token_type": [UNKNOWN, NORMAL],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert Tokenizer.from_metadata(meta).encode("a\u00e9a") == [1, 0, 1]
    meta["tokenizer.ggml.unknown_token_id"] = 0xFFFFFFFF
    with pytest.raises(TokenizerError, match="<0x00>"):
        Tokenizer.from_metadata(meta)


# ---- BPE details ----


def test_an_unknown_or_missing_pre_tokenizer_warns_and_uses_the_default() -> None:
    text = "It's 12345, isn't it?"
    default = Tokenizer.from_metadata(bpe_metadata(["1 2", "12 3"], pre="default"))
    for pre in ("no-such-thing", None):
        with pytest.warns(UserWarning, match="pre-tokenizer"):
            tok = Tokenizer.from_metadata(bpe_metadata(["1 2", "12 3"], pre=pre))
        assert tok.encode(text) == default.encode(text)


def test_every_pre_tokenizer_cuts_without_loss() -> None:
    text = " I've 12345\u0661\u0662 \u4e2d\u6587, \r\n\n  na\u00efve\u2028!? \U0001f600\t$x==`y`  "
    for row in PRE_TOKENIZERS:
        pieces = [piece for piece, _ in row.build().pre_tokenize_str(text)]
        written = "".join(byte_characters()[byte] for byte in text.encode())
        assert "".join(pieces) == written, row.names
        assert len(pieces) > 8, row.names


def test_a_repeated_merge_keeps_its_first_rank() -> None:
    tok = Tokenizer.from_metadata(
        bpe_metadata(["a b", "b c"]) | {"tokenizer.ggml.merges": ["a b", "b c", "a b"]}
    )
    assert spellings(tok, tok.encode("abc")) == ["ab", "c"]


def test_bytes_without_a_token_are_left_out_with_a_warning() -> None:
    meta = bpe_metadata()
    tokens = meta["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    tokens[4] = "<|nothing|>"
    tok = Tokenizer.from_metadata(meta)
    with pytest.warns(UserWarning, match="0x04"):
        assert tok.decode(tok.encode("a\x04b")) == "ab"


def test_tokens_that_are_not_utf_8_are_kept_as_bytes() -> None:
    tok = Tokenizer.from_metadata(bpe_metadata(extra=[(b"\xff\xfe", USER_DEFINED), (b"", NORMAL)]))
    assert tok.token_bytes(256) == b"\xff\xfe"
    assert tok.token_bytes(257) == b""
    assert tok.decode([256]) == "\ufffd\ufffd"
    assert tok.decode(tok.encode("\u00ff\u00fe")) == "\u00ff\u00fe"


# ---- what must be refused ----


def broken(change: Mapping[str, Any], base: dict[str, object] | None = None) -> dict[str, object]:
    """Metadata with keys changed, or removed where the new value is Ellipsis."""
    meta = dict(base or spm_metadata({"a": -1.0}, add_bos_token=True))
    for key, value in change.items():
        if value is ...:
            del meta[f"tokenizer.ggml.{key}"]
        else:
            meta[f"tokenizer.ggml.{key}"] = value
    return meta


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": ...}, "tokenizer.ggml.model is missing"),
        ({"model": "bert"}, "'bert'"),
        ({"model": 3}, "of type int"),
        ({"tokens": ...}, "tokens is missing"),
        ({"tokens": []}, "empty"),
        ({"tokens": "abc"}, "of type str"),
        ({"tokens": ["a", 5]}, r"tokens\[1\]"),
        ({"tokens": ["a", "b", "a"]}, "'a' twice"),
        ({"tokens": [b"a", "a"]}, "'a' twice"),
        ({"scores": ...}, "scores is missing"),
        ({"scores": np.zeros(7, np.float32)}, "7 elements, expected 260"),
        ({"scores": np.zeros(260, np.int32)}, "int32"),
        ({"scores": ["x"] * 260}, "floating-point"),
        ({"scores": [[0.0], [0.0, 1.0]]}, "flat"),
        ({"scores": [0.0] * 259 + [float("nan")]}, "not finite"),
        ({"token_type": np.ones(7, np.int32)}, "7 elements"),
        ({"token_type": np.ones(260, np.float32)}, "float32"),
        ({"token_type": np.full(260, 99, np.int32)}, "99"),
        ({"token_type": np.full(260, -1, np.int32)}, "-1"),
        ({"token_type": np.full(260, BYTE, np.int32)}, "kind BYTE"),
        ({"bos_token_id": 260}, "bos_token_id is 260"),
        ({"eos_token_id": -5}, "eos_token_id is -5"),
        ({"eot_token_id": 1 << 40}, "eot_token_id"),
        ({"eos_token_id": "2"}, "of type str"),
        ({"eos_token_id": True}, "of type bool"),
        ({"fim_pad_token_id": 999}, "fim_pad_token_id is 999"),
        ({"bos_token_id": 0xFFFFFFFF}, "BOS"),
        ({"add_bos_token": 1}, "of type int"),
        ({"add_space_prefix": "yes"}, "of type str"),
    ],
)
def test_hostile_spm_metadata_is_refused(change: dict[str, Any], named: str) -> None:
    Tokenizer.from_metadata(broken({}))
    with pytest.raises(TokenizerError, match=named) as refusal:
        Tokenizer.from_metadata(broken(change))
    assert str(refusal.value).endswith(".")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"merges": ...}, "merges is missing"),
        ({"merges": ["ab"]}, r"merges\[0\] is 'ab'"),
        ({"merges": ["a b", "a b c"]}, r"merges\[1\]"),
        ({"merges": [" a"]}, r"merges\[0\]"),
        ({"merges": ["a "]}, r"merges\[0\]"),
        ({"merges": ["a q"]}, "does not fit"),
        ({"merges": ["zz z"]}, "does not fit"),
        ({"merges": [b"a \xff"]}, "does not fit"),
        ({"merges": np.arange(3)}, "of type ndarray"),
        ({"pre": 5}, "of type int"),
        ({"add_eos_token": True}, "EOS"),
    ],
)
def test_hostile_bpe_metadata_is_refused(change: dict[str, Any], named: str) -> None:
    Tokenizer.from_metadata(broken({}, bpe_metadata(["a b"])))
    with pytest.raises(TokenizerError, match=named):
        Tokenizer.from_metadata(broken(change, bpe_metadata(["a b"])))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_arbitrary_metadata_gives_a_tokenizer_or_a_tokenizer_error(data: st.DataObject) -> None:
    base = data.draw(st.sampled_from([spm_metadata({"a": -1.0}), bpe_metadata(["a b"])]))
    junk = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=4)
        | st.lists(
            st.integers(-2, 9) | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
            max_size=5,
        )
    )
    for key in data.draw(st.lists(st.sampled_from(sorted(base)), max_size=3)):
        base[key] = data.draw(junk)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tok = Tokenizer.from_metadata(base)
        except TokenizerError:
            return
        tok.decode(tok.encode("a b <s> \u00e9", parse_special=True))


@pytest.mark.parametrize("token", [-1, 259, 1 << 70])
def test_ids_outside_of_the_vocabulary_are_refused(token: int) -> None:
    tok = Tokenizer.from_metadata(spm_metadata({}))
    for use in (tok.token_bytes, StreamDecoder(tok).push, lambda i: tok.decode([i])):
        with pytest.raises(ValueError, match=f"Token {token} "):
            use(token)


def test_text_with_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"U\+D800 at character 1"):
        Tokenizer.from_metadata(spm_metadata({})).encode("a\ud800")


# ---- time ----


@pytest.mark.parametrize("family", ["llama-spm", "qwen2", "deepseek-llm"])
@pytest.mark.parametrize("unit", ["a", " ", "-", " \n", "\u4e2d"])
def test_monotonous_text_takes_no_quadratic_time(family: str, unit: str) -> None:
    tok = tokenizer(family)

    def seconds(n: int) -> float:
        text = unit * n + "x"
        start = time.perf_counter()
        tok.encode(text)
        return time.perf_counter() - start

    seconds(1000)
    # 16 times the text: 256 times the work if it were quadratic.
    assert seconds(320_000 // len(unit)) < 80 * max(seconds(20_000 // len(unit)), 0.002)


def test_a_very_long_token_is_built_and_matched() -> None:
    long = "ab" * 500_000
    start = time.perf_counter()
    spm = Tokenizer.from_metadata(spm_metadata({"\u2581": -1.0, "a": -1.0, "b": -1.0, long: 0.0}))
    bpe = Tokenizer.from_metadata(bpe_metadata(extra=[(long, USER_DEFINED)]))
    assert spm.decode(spm.encode(long)) == long
    assert bpe.encode(long + "a") == [256, ord("a")]
    assert time.perf_counter() - start < 30


def test_a_vocabulary_of_150_thousand_tokens_is_built_quickly() -> None:
    meta = metadata("qwen2")
    start = time.perf_counter()
    Tokenizer.from_metadata(meta)
    assert time.perf_counter() - start < 2.0  # about 0.3 s on an idle machine
