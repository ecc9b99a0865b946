"""Measures what reading only the blocks with the best means costs, and how many bytes it saves.

    python bench/topk.py smollm2 --kv svdq --chunks 2

Token by token over chunks of a text; the second half of each is scored against the f16 cache. Needs
the text in $PYKVQ_DATA. Writes bench/results/topk-MODEL.json.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack

import numpy as np
from records import Json, data_folder, model_slug, numbers, provenance, save

import pykvq
from pykvq.eval.streaming import cut_chunks, divergence


def main() -> None:
    """Runs the measurement and writes its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a name of the catalogue or a GGUF file")
    parser.add_argument("--kv", default="svdq")
    parser.add_argument("--topk", type=numbers, default=[0, 512, 256, 128, 64], help="0: all")
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--ctx-size", type=int, default=2048)
    parser.add_argument("--text", default="wiki.test.raw", help="a file of $PYKVQ_DATA/text")
    args = parser.parse_args()
    text = (data_folder() / "text" / args.text).read_text(encoding="utf-8")
    n_ctx, tops = args.ctx_size, args.topk
    with pykvq.Model(args.model, n_ctx=n_ctx) as model, ExitStack() as stack:
        chunks = cut_chunks(model, model.tokenize(text), n_ctx)[: args.chunks]
        exact = stack.enter_context(model.session(kv="f16"))
        tried = [stack.enter_context(model.session(kv=args.kv, kv_topk=n)) for n in tops]
        kld: list[list[float]] = [[] for _ in tops]
        for ids in chunks:
            for session in (exact, *tried):
                session.reset()
            for at, token in enumerate(ids[:-1]):
                wanted = at >= n_ctx // 2
                logits = exact.eval([token], "last" if wanted else "none")
                for session, found in zip(tried, kld, strict=True):
                    got = session.eval([token], "last" if wanted else "none")
                    if wanted:
                        found.append(float(divergence(logits, got)[0]))
        read = [(s.stats.bytes_step_k, s.stats.bytes_step_v) for s in (exact, *tried)]
        record: Json = {
            "what": "KL(f16 || scheme) in nats, token by token; bytes read by the last token",
            **provenance(),
            "model": model.info.name,
            "text": args.text,
            "n_ctx": n_ctx,
            "chunks": len(chunks),
            "kv": args.kv,
            "bytes_f16": read[0],
            "results": [
                {"kv_topk": n, "mean_kld": float(np.mean(k)), "bytes_k": b[0], "bytes_v": b[1]}
                for n, k, b in zip(tops, kld, read[1:], strict=True)
            ],
        }
    for row in record["results"]:
        print(row)
    print(save(f"topk-{model_slug(args.model)}", record))


if __name__ == "__main__":
    main()
