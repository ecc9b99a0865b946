"""What sessions would take of a GPU's memory, by `Model.plan`: needs no GPU, and only headers.

    python bench/cuda_memory.py smollm2 qwen2.5-coder-0.5b build/7b-shape.gguf

Writes bench/results/cuda-memory.json, from which `make tables` makes the table of docs/cuda.md.
"""

from __future__ import annotations

import argparse

from records import Json, model_facts, provenance, save

from pykvq.plan import open_header

SCHEMES = ("f16", "skvq")
CONTEXTS = (8192, 32768, 131072, 1_000_000)

#: Memory to find the longest context for: a Jetson Orin Nano, an RTX 4090, an H100.
MEMORIES = (8 * 10**9, 24 * 10**9, 80 * 10**9)

_KEPT = (
    *("bytes_gpu", "bytes_gpu_weights", "bytes_gpu_rows", "bytes_gpu_sealed", "bytes_gpu_tables"),
    *("bytes_gpu_scratch", "bytes_gpu_chunk", "bytes_host", "n_batch"),
)


def plans_of(name: str) -> Json:
    """The plans of a model, all of whose layers are on the GPU."""
    with open_header(name) as model:
        contexts, longest = [], []
        for kv in SCHEMES:
            for n_ctx in CONTEXTS:
                stats = model.plan(kv=kv, n_ctx=n_ctx, device="cuda", memory=1).stats
                facts = {key: getattr(stats, key) for key in _KEPT}
                contexts.append({"kv": kv, "n_ctx": n_ctx, **facts})
            for memory in MEMORIES:
                plan = model.plan(kv=kv, device="cuda", memory=memory)
                longest.append({"kv": kv, "memory": memory, "n_ctx": plan.longest})
        facts = model_facts(model.info.name, model.info.path)
        return {**facts, "contexts": contexts, "longest": longest}


def main() -> None:
    """Plans, and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", help="names of the catalogue or GGUF files")
    args = parser.parse_args()
    models = [plans_of(name) for name in args.models]
    what = "bytes of sessions with all layers and the output on a GPU, planned"
    print(save("cuda-memory", {"what": what, **provenance(), "models": models}))


if __name__ == "__main__":
    main()
