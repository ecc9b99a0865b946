"""Measures how near the logits under the f16 cache are to float32 ones, ours and llama.cpp's.

    python bench/accuracy.py smollm2

Needs $PYKVQ_DATA/golden; llama.cpp is measured where `llama_cpp` is installed (extra `oracle`). KL
is taken over the 64 likeliest tokens, the rest as one bin, in nats, averaged over the positions.
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt
from records import data_folder, provenance, save

import pykvq
from pykvq.catalogue import resolve

GOLDEN = {
    "smollm2": "smollm2-135m-instruct.q4_1.npz",
    "qwen2.5-coder-0.5b": "qwen2.5-coder-0.5b-instruct.q4_k_m.npz",
}


def compare(
    logits: npt.NDArray[np.float32], ids: npt.NDArray[np.int64], top: npt.NDArray[np.float64]
) -> dict[str, float]:
    """Mean KL and top-1 agreement of logits [n, n_vocab] with the golden [n, 64]."""
    x = logits[: len(top)].astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    ours = np.take_along_axis(x, ids, axis=1)
    p_rest = np.clip(1 - np.exp(top).sum(axis=1), 1e-12, None)
    q_rest = np.clip(1 - np.exp(ours).sum(axis=1), 1e-12, None)
    kl = (np.exp(top) * (top - ours)).sum(axis=1) + p_rest * np.log(p_rest / q_rest)
    return {"mean_kl": float(kl.mean()), "top1": float((x.argmax(axis=1) == ids[:, 0]).mean())}


def main() -> None:
    """Runs the measurement and writes bench/results/accuracy-MODEL.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=GOLDEN)
    name = parser.parse_args().model
    path = resolve(name)
    try:
        import llama_cpp
    except ImportError:
        llama_cpp = None
    results = []
    with np.load(data_folder() / "golden" / GOLDEN[name]) as golden:
        for text in ("wiki", "novel", "code", "multilingual"):
            tokens = golden[f"{text}.ids"].astype(np.int32)
            ids = golden[f"{text}.top_ids"].astype(np.int64)
            top = golden[f"{text}.top_logprobs"].astype(np.float64)
            row: dict[str, object] = {"text": text, "tokens": len(top)}
            with (
                pykvq.Model(path, kv="f16", n_ctx=len(tokens)) as model,
                model.session() as session,
            ):
                row["pykvq"] = compare(session.eval(tokens, "all"), ids, top)
            if llama_cpp is not None:
                peer = llama_cpp.Llama(str(path), n_ctx=1024, logits_all=True, verbose=False)
                peer.eval(tokens.tolist())
                row[f"llama-cpp-python {llama_cpp.__version__}"] = compare(peer.scores, ids, top)
            results.append(row)
    record = {
        "what": "f16 cache against float32 golden logits",
        **provenance(),
        "results": results,
    }
    print(save(f"accuracy-{name}", record), flush=True)


if __name__ == "__main__":
    main()
