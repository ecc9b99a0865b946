"""Writes small valid GGUF files for the fuzzers to start from: gguf/ and profile/ in a folder.

Usage: make_corpus.py FOLDER

The files come from the `gguf` package, an implementation of the format that is independent of the
reader under test, and are the same bytes at every run. Those of gguf/ together cover: both
versions, every type of value, arrays, vocabularies, a whole model, tensors of 1 to 4 dimensions and
of many types, an alignment of its own, no tensors, and a lone header. Those of profile/ are KV
profiles for the model of fuzz_profile.c.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

QUANTIZED = ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "BF16")


def _values(writer: GGUFWriter) -> None:
    for value_type in GGUFValueType:
        if value_type == GGUFValueType.ARRAY:
            continue
        number: str | float | int | bool = 7
        if value_type == GGUFValueType.STRING:
            number = "seven"
        elif value_type in (GGUFValueType.FLOAT32, GGUFValueType.FLOAT64):
            number = 0.5
        elif value_type == GGUFValueType.BOOL:
            number = True
        name = value_type.name.lower()
        writer.add_key_value(f"value.{name}", number, value_type)
        writer.add_key_value(f"array.{name}", [number] * 3, GGUFValueType.ARRAY, value_type)


def _vocabulary(writer: GGUFWriter) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(16)), "caf\u00e9", ""]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_scores([-0.5 * i for i in range(len(tokens))])
    writer.add_token_types([1 + i % 6 for i in range(len(tokens))])
    writer.add_token_merges(["c a", "ca f"])
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def _tensors(writer: GGUFWriter) -> None:
    writer.add_block_count(1)
    for n_dims in range(1, 5):
        shape = (3, 2, 2, 5)[-n_dims:]
        data = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        writer.add_tensor(f"blk.0.f32_{n_dims}d.weight", data)
    writer.add_tensor("blk.0.f16.weight", np.ones((2, 8), dtype=np.float16))
    writer.add_tensor("blk.0.i32.weight", np.arange(4, dtype=np.int32))


def _quantized(writer: GGUFWriter) -> None:
    random = np.random.default_rng(1)
    for name in QUANTIZED:
        kind = GGMLQuantizationType[name]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        rows = random.integers(0, 256, (2, max(256, block) // block * block_bytes), dtype=np.uint8)
        writer.add_tensor(f"blk.0.{name.lower()}.weight", rows, raw_dtype=kind)


def _aligned(writer: GGUFWriter) -> None:
    writer.add_custom_alignment(256)
    writer.add_tensor("one", np.ones(1, dtype=np.float32))
    writer.add_tensor("two", np.ones(2, dtype=np.float32))


def _many(writer: GGUFWriter) -> None:
    for i in range(30):
        writer.add_uint32(f"number.{i * 7 % 30}", i)
        writer.add_tensor(f"blk.{i * 11 % 30}.norm", np.ones(1, dtype=np.float32))


def _model(writer: GGUFWriter) -> None:
    """A llama of one layer that the core would open."""
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(12)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    shapes = {
        "token_embd": (6, 8),
        "output_norm": (8,),
        "blk.0.attn_norm": (8,),
        "blk.0.attn_q": (8, 8),
        "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8),
        "blk.0.ffn_norm": (8,),
        "blk.0.ffn_gate": (12, 8),
        "blk.0.ffn_up": (12, 8),
        "blk.0.ffn_down": (8, 12),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))


def _nothing(writer: GGUFWriter) -> None:
    """Leaves the architecture, which the writer adds by itself, as the only metadata."""


#: Of the model of fuzz_profile.c; with no tensors at all its fingerprint is where FNV-1a starts.
KV_HEADS, D_HEAD = 2, 20
FINGERPRINT = 0xCBF29CE484222325


def _profile(writer: GGUFWriter, waves: int) -> None:
    """A KV profile of one layer whose heads have so many waves."""
    random = np.random.default_rng(2)
    writer.add_uint32("kvq.profile.version", 1)
    writer.add_key_value("kvq.profile.fingerprint", FINGERPRINT, GGUFValueType.UINT64)
    for name, n in (("layers", 1), ("kv_heads", KV_HEADS), ("d_head", D_HEAD)):
        writer.add_uint32(f"kvq.profile.{name}", n)
    head = (KV_HEADS, D_HEAD)
    # Pairs are (2 i, 2 i + 1) of one kind of RoPE and (i, i + 9) of the other.
    wave = np.zeros(head, np.float32)
    wave[:, : 2 * waves : 2] = 1
    order = [random.permutation(D_HEAD) for _ in range(KV_HEADS)]
    for name, array in {
        "k_basis": random.normal(size=(*head, D_HEAD)).astype(np.float16),
        "v_basis": random.normal(size=(*head, D_HEAD)).astype(np.float16),
        "k_mean": random.normal(size=head).astype(np.float32),
        "v_mean": random.normal(size=head).astype(np.float32),
        "k_wave": wave,
        "k_importance": np.ones(head, np.float32),
        "k_order": np.array(order, np.int16),
    }.items():
        writer.add_tensor(f"blk.0.{name}", array)
    writer.add_tensor("kvq.v_sensitivity", np.ones((1, KV_HEADS), np.float32))
    writer.add_tensor("kvq.k_sensitivity", np.ones(1, np.float32))


CONTENTS: dict[str, Callable[[GGUFWriter], None]] = {
    "aligned": _aligned,
    "many": _many,
    "model": _model,
    "nothing": _nothing,
    "quantized": _quantized,
    "tensors": _tensors,
    "values": _values,
    "vocabulary": _vocabulary,
}


def make_corpus(folder: Path) -> list[Path]:
    """Writes the corpus into `folder`, which is created if absent.

    Args:
        folder: where the files go; files of the same names are replaced.

    Returns:
        The paths written, sorted.
    """
    for target in ("gguf", "profile"):
        (folder / target).mkdir(parents=True, exist_ok=True)
    paths = [folder / "gguf" / "header.gguf"]
    paths[0].write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    for name, fill in CONTENTS.items():
        path = folder / "gguf" / f"{name}.gguf"
        _write(path, "llama", fill)
        # Little-endian files of version 2 differ in the number only.
        whole = path.read_bytes()
        older = folder / "gguf" / f"{name}.v2.gguf"
        older.write_bytes(whole[:4] + struct.pack("<I", 2) + whole[8:])
        paths += [path, older]
    for waves in (0, 4):
        path = folder / "profile" / f"waves{waves}.gguf"
        _write(path, "kvq-profile", partial(_profile, waves=waves))
        paths.append(path)
    return sorted(paths)


def _write(path: Path, architecture: str, fill: Callable[[GGUFWriter], None]) -> None:
    writer = GGUFWriter(path, architecture)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    GGUFReader(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make_corpus(Path(sys.argv[1]))
