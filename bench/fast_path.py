"""Measures how far the best instruction set is from the plain reference of the core.

    python bench/fast_path.py smollm2

Each instruction set reads the same tokens of a text in a process of its own, in the passes that
give what decoding token by token gives (`pykvq.eval.streaming`), under each KV scheme. The last
tokens are scored: KL(reference || fast) of the next token's distribution, twice. With blocks of its
own the fast path seals what it computed itself: slightly other keys, now and then another code.
With the same blocks it is given those of the reference in their place, so that only arithmetic
differs. Needs the text in $PYKVQ_DATA/text; the reference takes minutes. Writes
bench/results/fast-path-MODEL.json; ends with status 1 where the claim of docs/speed.md does not
hold.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
import numpy.typing as npt
from records import Json, data_folder, model_facts, model_slug, provenance, save

import pykvq
from pykvq import native
from pykvq.eval.streaming import cut_chunks, divergence, streaming_passes
from pykvq.session import FloatArray, IntArray, Session

#: The instruction set that defines what is right.
REFERENCE = "ref"

#: The mean KL that is claimed with the same blocks, at most, in nats.
CLAIM = 1e-4


Side = Literal["k", "v"]
SIDES: tuple[Side, Side] = ("k", "v")

#: The sealed blocks of a session: by number of the block, layer, head and side.
Blocks = dict[tuple[int, int, int, Side], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Reading:
    """What a process reads.

    Attributes:
        model: The model's file.
        ids: The tokens [n].
        n_scored: So many of the last ones are scored.
        kv: KV schemes.
        window: Their window of tokens in f16.
    """

    model: str
    ids: IntArray
    n_scored: int
    kv: Sequence[str]
    window: int


@dataclass(frozen=True)
class Found:
    """What came of it under one scheme.

    Attributes:
        logits: [n_scored, n_vocab].
        blocks: What was sealed, or given in its place.
        n_sealed: Tokens in sealed blocks.
    """

    logits: FloatArray
    blocks: Blocks
    n_sealed: int


def read_with(
    isa: str, reading: Reading, given: Mapping[str, Found] | None = None
) -> dict[str, Found]:
    """What an instruction set makes of the tokens by scheme, in a process of its own.

    Args:
        isa: The instruction set.
        reading: What to read.
        given: By scheme, whose blocks to put in the place of those that are sealed.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, os.putenv, ("KVQ_ISA", isa)) as process:
        blocks = {kv: found.blocks for kv, found in given.items()} if given else {}
        return process.submit(_read, isa, reading, blocks).result()


def _read(isa: str, reading: Reading, given: Mapping[str, Blocks]) -> dict[str, Found]:
    if native.isa_selected() != isa:
        raise RuntimeError(f"The core runs on {native.isa_selected()}, expected {isa}.")
    with pykvq.Model(reading.model, n_ctx=len(reading.ids)) as model:
        found = {}
        for kv in reading.kv:
            with model.session(kv=kv, kv_window=reading.window) as session:
                found[kv] = read_scheme(session, reading, given.get(kv))
        return found


def read_scheme(session: Session, reading: Reading, given: Blocks | None) -> Found:
    """What a session makes of the tokens, as if they came one by one.

    Args:
        session: It holds nothing, and stays with the tokens.
        reading: What to read.
        given: Blocks to put in the place of those that are sealed.
    """
    info = session.model.info
    n, first = len(reading.ids), len(reading.ids) - reading.n_scored
    logits = np.empty((reading.n_scored, info.n_vocab), np.float32)
    blocks: Blocks = {}
    n_blocks = 0
    for start, end in streaming_passes(session, n):
        if end <= first:
            session.eval(reading.ids[start:end], "none")
        else:
            rows = session.eval(reading.ids[start:end], "all")
            begin = max(start, first)
            logits[begin - first : end - first] = rows[begin - start :]
        n_before, n_blocks = n_blocks, session.stats.n_tokens_sealed // native.block_tokens()
        for key in product(
            range(n_before, n_blocks), range(info.n_layers), range(info.n_kv_heads), SIDES
        ):
            number, layer, head, side = key
            block = session.sealed_block(layer, head, side, number)
            if given is not None:
                block[:] = given[key]
            blocks[key] = block.copy()
    return Found(logits, blocks, session.stats.n_tokens_sealed)


def compare(reference: FloatArray, fast: FloatArray) -> Json:
    """How far logits [n, n_vocab] are from those of the reference."""
    kl = divergence(reference, fast)
    same = reference.argmax(axis=1) == fast.argmax(axis=1)
    return {
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "top1": float(same.mean()),
        "max_logit_error": float(np.abs(reference - fast).max()),
    }


def other_bytes(reference: Blocks, fast: Blocks) -> float:
    """Which part of the bytes of sealed blocks, 0 to 1, is another one than in the reference."""
    differing = sum(int((reference[key] != fast[key]).sum()) for key in reference)
    return differing / max(1, sum(block.size for block in reference.values()))


def main() -> None:
    """Runs the measurement and writes its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a name of the catalogue or a GGUF file")
    parser.add_argument("--kv", default="f16,skvq,auto", help="schemes, divided by commas")
    parser.add_argument("--window", type=int, default=128, help="tokens in f16")
    parser.add_argument("--tokens", type=int, default=384)
    parser.add_argument("--scored", type=int, default=128, help="of them, the last")
    parser.add_argument("--text", default="wiki.test.raw", help="a file of $PYKVQ_DATA/text")
    args = parser.parse_args()
    isa = native.isa_selected()
    if isa == REFERENCE:
        parser.error("there is no instruction set to compare: the best here is the reference")
    text = (data_folder() / "text" / args.text).read_text(encoding="utf-8")
    with pykvq.Model(args.model) as model:
        path, name = model.info.path, model.info.name
        ids = cut_chunks(model, model.tokenize(text), args.tokens)[0]
    reading = Reading(path, ids, args.scored, args.kv.split(","), args.window)
    reference = read_with(REFERENCE, reading)
    fast, same = read_with(isa, reading), read_with(isa, reading, reference)
    results = {
        kv: {
            "tokens_sealed": reference[kv].n_sealed,
            "own_blocks": compare(reference[kv].logits, fast[kv].logits)
            | {"other_bytes": other_bytes(reference[kv].blocks, fast[kv].blocks)},
            "same_blocks": compare(reference[kv].logits, same[kv].logits),
        }
        for kv in reading.kv
    }
    for kv, found in results.items():
        print(kv, found)
    record = {
        "what": "KL(reference || fast) in nats, as if token by token",
        **provenance(),
        **model_facts(name, path),
        "isa": isa,
        "text": args.text,
        "tokens": args.tokens,
        "scored": args.scored,
        "window": args.window,
        "results": results,
    }
    print(save(f"fast-path-{model_slug(args.model)}", record))
    largest = max(found["same_blocks"]["mean_kl"] for found in results.values())
    print(f"same blocks: mean KL {largest:.1e} at most, {CLAIM:.0e} claimed")
    sys.exit(0 if largest <= CLAIM else 1)


if __name__ == "__main__":
    main()
