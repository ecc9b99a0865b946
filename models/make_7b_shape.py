"""Writes a GGUF model of random weights in Q4_0, to time the shape of a model without having it.

    python models/make_7b_shape.py /tmp/7b-shape.gguf

By default the shape of Llama 3 8B: 32 layers of width 4096, 32 heads and 8 KV heads of width 128,
feed-forward 14336, but Llama 2's vocabulary of 32000, since the time of the output matrix is not
what is looked for: 7.2e9 weights, 4.1 GB. Weights are written as they are drawn, so little memory
is needed. The file has no tokenizer: `pykvq bench` needs none.

A block of Q4_0 is 32 weights in 18 bytes: one f16 scale, then 16 bytes of two codes each
(ggml-common.h, block_q4_0). Codes are uniform; the scale makes the weights' standard deviation
1 / sqrt(columns), so that activations neither vanish nor overflow.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter

Q4_0 = GGMLQuantizationType.Q4_0
BLOCK, BLOCK_BYTES = 32, 18

#: Standard deviation of a code less its offset: uniform on -8 .. 7.
CODE_DEVIATION = math.sqrt((16**2 - 1) / 12)

Shape = tuple[int, int]


def matrices(args: argparse.Namespace) -> Iterator[tuple[str, Shape]]:
    """Name and [rows, columns] of every matrix, in the order of the file."""
    d, kv, ff = args.width, args.width // args.heads * args.kv_heads, args.ff
    yield "token_embd.weight", (args.vocab, d)
    yield "output.weight", (args.vocab, d)
    for layer in range(args.layers):
        yield f"blk.{layer}.attn_q.weight", (d, d)
        yield f"blk.{layer}.attn_k.weight", (kv, d)
        yield f"blk.{layer}.attn_v.weight", (kv, d)
        yield f"blk.{layer}.attn_output.weight", (d, d)
        yield f"blk.{layer}.ffn_gate.weight", (ff, d)
        yield f"blk.{layer}.ffn_up.weight", (ff, d)
        yield f"blk.{layer}.ffn_down.weight", (d, ff)


def norms(args: argparse.Namespace) -> Iterator[str]:
    """The names of the vectors."""
    yield "output_norm.weight"
    for layer in range(args.layers):
        yield f"blk.{layer}.attn_norm.weight"
        yield f"blk.{layer}.ffn_norm.weight"


def random_q4_0(rng: np.random.Generator, shape: Shape) -> npt.NDArray[np.uint8]:
    """A random matrix [rows, bytes of a row] in Q4_0."""
    rows, columns = shape
    blocks = np.empty((rows, columns // BLOCK, BLOCK_BYTES), np.uint8)
    scale = np.float16(1 / (CODE_DEVIATION * math.sqrt(columns)))
    blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
    blocks[..., 2:] = rng.integers(0, 256, blocks[..., 2:].shape, np.uint8)
    return blocks.reshape(rows, -1)


def write(path: Path, args: argparse.Namespace) -> None:
    """Writes the model: first the whole directory, then one tensor after the other."""
    writer = GGUFWriter(path, "llama")
    writer.add_name(f"random {args.layers} x {args.width}, Q4_0")
    writer.add_block_count(args.layers)
    writer.add_context_length(args.ctx)
    writer.add_embedding_length(args.width)
    writer.add_feed_forward_length(args.ff)
    writer.add_head_count(args.heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_rope_dimension_count(args.width // args.heads)
    writer.add_rope_freq_base(args.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(args.vocab)
    writer.add_tokenizer_model("none")
    for name, (rows, columns) in matrices(args):
        n_bytes = rows * columns // BLOCK * BLOCK_BYTES
        stored = (rows, columns // BLOCK * BLOCK_BYTES)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), n_bytes, raw_dtype=Q4_0)
    ones = np.ones(args.width, np.float32)
    for name in norms(args):
        writer.add_tensor_info(name, ones.shape, ones.dtype, ones.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(args.seed)
    for _, shape in matrices(args):
        writer.write_tensor_data(random_q4_0(rng, shape))
    for _ in norms(args):
        writer.write_tensor_data(ones)
    writer.close()


def main() -> None:
    """Reads the command line and writes the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", type=Path)
    for flag, default, what in (
        ("--layers", 32, "layers"),
        ("--width", 4096, "width of the residual stream"),
        ("--heads", 32, "query heads"),
        ("--kv-heads", 8, "KV heads"),
        ("--ff", 14336, "width of the feed-forward part"),
        ("--vocab", 32000, "tokens of the vocabulary"),
        ("--ctx", 1 << 20, "tokens of context that it claims"),
        ("--seed", 1, "seed of the random numbers"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{what} (default: {default})")
    parser.add_argument("--rope-base", type=float, default=5e5, help="default: 5e5")
    args = parser.parse_args()
    for name in ("layers", "width", "heads", "kv_heads", "ff", "vocab", "ctx"):
        if getattr(args, name) < 1:
            parser.error(f"{name} is {getattr(args, name)}, expected at least 1")
    if args.width % args.heads or args.heads % args.kv_heads:
        parser.error("width must be a multiple of heads, and heads of kv-heads")
    if args.width % BLOCK or args.ff % BLOCK:
        parser.error(f"width and ff must be multiples of {BLOCK}, the block of Q4_0")
    write(args.path, args)
    print(f"{args.path}: {args.path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
