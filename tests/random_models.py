"""Models with random weights, of any shape and weight type, for tests that compare devices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from conftest import byte_alphabet
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

Array = npt.NDArray[np.float32]

#: Every row of core/weights.def.
WEIGHT_TYPES = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q4_K",
    "Q5_K",
    "Q6_K",
)

#: Of the formats that the gguf package reads but does not write: where the block's scales (and
#: offsets) lie, in f16, what codes times scales are about, and what codes times offsets.
_SUPERBLOCKS = {
    "Q4_K": (0, 2, 8 * 32, 32),
    "Q5_K": (0, 2, 16 * 32, 32),
    "Q6_K": (208, None, 80 * 64, 0),
}


@dataclass(frozen=True)
class Shape:
    """A model: heads of one width, of which `group` queries share a KV head."""

    architecture: str = "llama"
    d_head: int = 64
    n_kv_heads: int = 1
    group: int = 2
    d_model: int = 64
    d_ff: int = 96
    n_layers: int = 2
    weights: str = "F32"
    tied: bool = False
    #: What enters the cache of the first layer is the same on every device, since all sums that
    #: lead there are exact: embeddings of 1 and -1, and matrices of few small numbers.
    exact: bool = False

    @property
    def n_heads(self) -> int:
        return self.n_kv_heads * self.group


def encoded(weights: Array, kind: str) -> npt.NDArray[np.generic]:
    """Weights in a format; those of superblocks are others, random, of the same size."""
    if kind == "F32":
        return weights
    if kind == "F16":
        return weights.astype(np.float16)
    if kind not in _SUPERBLOCKS:
        return quantize(weights, GGMLQuantizationType[kind])
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rows, columns = weights.shape
    rng = np.random.default_rng(weights[0, :4].view(np.uint32))  # not the same for two matrices
    scale_at, offset_at, most_scale, most_offset = _SUPERBLOCKS[kind]
    blocks = rng.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    spread = 0.5 * weights.std()  # more makes attention so sharp that any rounding matters
    for at, most in ((scale_at, most_scale), (offset_at, most_offset)):
        if at is not None:
            values = (spread / most * rng.uniform(0.5, 2, len(blocks))).astype(np.float16)
            blocks[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, columns // block * size)


def write_random(path: Path, shape: Shape, seed: int = 7) -> Path:
    """Writes a model of byte tokens; heads look around without being sure of anything."""
    rng = np.random.default_rng(seed)
    s = shape
    tokens = [*byte_alphabet(), "th"]
    writer = GGUFWriter(path, s.architecture)
    writer.add_name(f"random {s.architecture}")
    writer.add_block_count(s.n_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(s.d_model)
    writer.add_feed_forward_length(s.d_ff)
    writer.add_head_count(s.n_heads)
    writer.add_head_count_kv(s.n_kv_heads)
    writer.add_key_length(s.d_head)
    writer.add_value_length(s.d_head)
    writer.add_layer_norm_rms_eps(1e-30 if s.exact else 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["t h"])

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        values = rng.normal(0, scale / np.sqrt(columns), (rows, columns)).astype(np.float32)
        if s.exact:
            values = np.sign(values) if rows == len(tokens) else np.round(64 * values) / 64
        kind = GGMLQuantizationType[s.weights]
        writer.add_tensor(name, encoded(values, s.weights), raw_dtype=kind)

    def vector(name: str, n: int, mean: float) -> None:
        spread = 0.0 if s.exact else 0.1
        writer.add_tensor(name, (mean + spread * rng.normal(size=n)).astype(np.float32))

    matrix("token_embd.weight", len(tokens), s.d_model, 8.0)
    vector("output_norm.weight", s.d_model, 1.0)
    if not s.tied:
        matrix("output.weight", len(tokens), s.d_model, 2.0)
    for layer in range(s.n_layers):
        b = f"blk.{layer}."
        vector(b + "attn_norm.weight", s.d_model, 1.0)
        for name, rows in (("q", s.n_heads), ("k", s.n_kv_heads), ("v", s.n_kv_heads)):
            matrix(f"{b}attn_{name}.weight", rows * s.d_head, s.d_model)
            if s.architecture == "qwen2":
                vector(f"{b}attn_{name}.bias", rows * s.d_head, 0.0)
        matrix(b + "attn_output.weight", s.d_model, s.n_heads * s.d_head, 4.0)
        vector(b + "ffn_norm.weight", s.d_model, 1.0)
        matrix(b + "ffn_gate.weight", s.d_ff, s.d_model)
        matrix(b + "ffn_up.weight", s.d_ff, s.d_model)
        matrix(b + "ffn_down.weight", s.d_model, s.d_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
