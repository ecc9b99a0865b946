"""Measures what each part of the KV formats is worth, by leaving it out or putting another there.

    python bench/ablations.py smollm2 --chunks 8

Each variant stands in for what sealed blocks hold, of keys alone or of values alone; the other side
stays in f16. All of them are read in lockstep with the exact cache, in streaming order, over the
last chunks of WikiText-2 train; the second half of each chunk is scored. The beginning of the text
is what bases are calibrated on here. The errors of the core's codecs on normal data are measured
too. Needs the text in $PYKVQ_DATA/text, and a C compiler; writes
bench/results/ablations-MODEL.json, from which `make tables` fills pages of docs/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from codec_parts import (
    BLOCK,
    BlockMean,
    Calibrated,
    Core,
    Levels,
    Ordered,
    Static,
    Trellis,
    normal_errors,
    water_filled,
    widths_of,
)
from records import data_folder, model_slug, provenance, save

import pykvq
from pykvq.calibrate import QUERY_POWER, key_basis, profile_of, typical
from pykvq.eval import quantizers
from pykvq.eval.codecs import Codec, Exact
from pykvq.eval.frames import Hadamard, TokenNorm
from pykvq.eval.quantizers import Array
from pykvq.eval.record import Json
from pykvq.eval.simulations import Pair
from pykvq.eval.streaming import FloatColumn, Lockstep, cut_chunks
from pykvq.eval.tasks_text import divergence_statistics
from pykvq.model import Model
from pykvq.moments import SINKS, WINDOW, Moments, collect
from pykvq.session import IntArray, Session

N_CTX = 1024
#: Tokens from the beginning of the text that bases are calibrated on.
CALIBRATION = 20480
#: Bits per channel that the widths of latent channels of keys come to.
KEY_BITS = 2

#: From how many channels of each head [L, H, 4] have 8, 4, 2 and 1 bits to the codec of these.
Coder = Callable[[Array], Codec]


@dataclass(frozen=True)
class Variant:
    """A way to store one side.

    Attributes:
        part: What it is a variant of, which says the side: "skvq keys" and the like.
        name: What it is.
        codec: How that side is stored.
    """

    part: str
    name: str
    codec: Codec

    def pair(self) -> Pair:
        """It with the other side exact."""
        keys = self.part.endswith("keys")
        sides = (self.codec, Exact()) if keys else (Exact(), self.codec)
        return Pair(f"{self.part}, {self.name}", "", "", SINKS, WINDOW, False, *sides)


def variants(model: Model, moments: Moments) -> list[Variant]:
    """All that are measured, from what calibration measured of the model."""
    codecs: dict[str, dict[str, Codec]] = {
        "skvq keys": skvq_keys(model, moments),
        "skvq values": {
            "`c8`": Hadamard(Core("c8")),
            "`c8` around the mean of the block": Hadamard(BlockMean(Core("c8"))),
            "`t2`": Hadamard(Core("t2")),
        },
        "auto keys": auto_keys(moments),
        "auto values": auto_values(model, moments),
    }
    return [Variant(part, name, c) for part, rows in codecs.items() for name, c in rows.items()]


def skvq_keys(model: Model, moments: Moments) -> dict[str, Codec]:
    """What `skvq` does to keys and does not; all around the mean of the block."""
    u2, order = Core("u2"), profile_of(model, moments, "").arrays["k_order"]
    exact_scales, exact_mean = BlockMean(Levels(exact=True)), BlockMean(u2, exact=True)

    def as_skvq(codec: Codec) -> Codec:
        # Without the Hadamard in layers with a key bias: all layers of a model have one, or none.
        return codec if model.has_key_bias else Hadamard(codec)

    return {
        "Hadamard, scale per token": Hadamard(BlockMean(Levels(channel=False))),
        "scale per channel": BlockMean(Levels(token=False)),
        "scales per token and channel": u2,
        "Hadamard, scales per token and channel": Hadamard(u2),
        "as `skvq`, exact scales": as_skvq(exact_scales),
        "as `skvq`, scales not stretched": as_skvq(BlockMean(Levels(stretched=False))),
        "as `skvq`, exact mean": as_skvq(exact_mean),
        "channels in order, groups of 32 (`skvq-g32`)": Ordered(Core("u2", group=32), order),
    }


def auto_keys(moments: Moments) -> dict[str, Codec]:
    """What `auto` and `svdq` do to keys and do not, at the same widths on average."""
    queries, d = typical(moments.q, moments.q_read), moments.q.shape[-1]

    def latent(coded: Coder, *, power: float = QUERY_POWER, waves: bool = True) -> Codec:
        residual = moments.k_residual if waves else moments.k_deviation
        basis, importance = key_basis(residual, queries, power=power)
        mean, wave = (moments.k_offset, moments.k_wave) if waves else (moments.k_mean, None)
        return Calibrated(coded(water_filled(importance, KEY_BITS)), basis, mean, wave)

    def mixed(run: Array) -> Codec:
        return Core("mixed", run)

    def static(run: Array) -> Codec:
        return BlockMean(Static(widths_of(run, d)))

    def normed(run: Array) -> Codec:
        return BlockMean(TokenNorm(Static(widths_of(run, d))))

    return {
        "as `auto`: a scale per channel and block": latent(mixed),
        "static scales": latent(static),
        "static scales and a norm per token": latent(normed),
        "without waves": latent(mixed, waves=False),
        "basis of the keys alone": latent(mixed, power=0),
    }


def auto_values(model: Model, moments: Moments) -> dict[str, Codec]:
    """What `auto` does to values and does not, in 2 bits: all are `t2`."""
    mean, t2 = moments.v_mean, Core("t2")
    basis = profile_of(model, moments, "").arrays["v_basis"].astype(np.float64)
    turn = np.broadcast_to(quantizers.hadamard(basis.shape[-1]), basis.shape)
    return {
        "`t2` after a Hadamard": Hadamard(t2),
        "the same around the mean of all values": Calibrated(t2, turn, mean),
        "as `auto`: in the calibrated basis around that mean": Calibrated(t2, basis, mean),
        "as `auto`, errors counted by their size": Calibrated(Trellis(absolute=True), basis, mean),
        "as `auto`, scales not stretched": Calibrated(Trellis(stretched=False), basis, mean),
    }


def measure(model: Model, chunks: Sequence[IntArray], tried: Sequence[Variant]) -> list[Json]:
    """The divergence of each variant from the exact cache, over the second half of each chunk."""
    n_ctx = len(chunks[0])

    def opened() -> Session:
        return model.session(
            kv="f16",
            n_ctx=n_ctx,
            n_batch=BLOCK,
            kv_sinks=SINKS,
            kv_window=WINDOW,
            device="cpu",  # which alone simulates
        )

    kld: list[list[FloatColumn]] = [[] for _ in tried]
    with ExitStack() as stack:
        sessions = [stack.enter_context(opened()) for _ in range(len(tried) + 1)]
        for session, variant in zip(sessions[1:], tried, strict=True):
            session.simulate(variant.pair().open(model, None))
        lockstep = Lockstep(sessions)
        for at, ids in enumerate(chunks):
            for scores, found in zip(lockstep.score(ids, n_ctx // 2)[1:], kld, strict=True):
                found.append(scores.kld)
            print(f"chunk {at + 1} of {len(chunks)}", flush=True)
    rows = []
    for variant, found in zip(tried, kld, strict=True):
        statistics = divergence_statistics(found)
        bits = variant.codec.bits(model.info)
        row = {"part": variant.part, "variant": variant.name, "bits": bits}
        rows.append({**row, "mean_kld": statistics["mean_kld"], "se_kld": statistics["se_kld"]})
    return rows


def main() -> None:
    """Runs the measurement and writes its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a name of the catalogue or a GGUF file")
    parser.add_argument("--text", default="wiki.train.excerpt.txt", help="of $PYKVQ_DATA/text")
    parser.add_argument("--chunks", type=int, default=8)
    args = parser.parse_args()
    text = (data_folder() / "text" / args.text).read_text(encoding="utf-8")
    with pykvq.Model(args.model) as model:
        ids = np.asarray(model.tokenize(text), np.int32)
        if len(ids) < CALIBRATION + args.chunks * N_CTX or args.chunks < 1:
            parser.error(
                f"{args.text} has {len(ids)} tokens: with {CALIBRATION} to calibrate on that is"
                f" room for 1 to {(len(ids) - CALIBRATION) // N_CTX} chunks of {N_CTX} tokens, but"
                f" {args.chunks} were asked for."
            )
        moments = collect(model, ids[:CALIBRATION])
        chunks = cut_chunks(model, ids, N_CTX)[-args.chunks :]
        record = {
            "what": "KL(f16 || variant) in nats in streaming order, one side quantized",
            **provenance(),
            "model": model.info.name,
            "text": args.text,
            "n_ctx": N_CTX,
            "chunks": len(chunks),
            "scored": len(chunks) * (N_CTX - 1 - N_CTX // 2),
            "calibrated_on": CALIBRATION,
            "normal_errors": normal_errors(),
            "results": measure(model, chunks, variants(model, moments)),
        }
    print(save(f"ablations-{model_slug(args.model)}", record))


if __name__ == "__main__":
    main()
