"""Keeps the times of the KV kernels with their provenance.

    make bench-kv        (which builds build/bench_kv and runs this)

Writes bench/results/kernels-ISA.json: ns per token and KV head of every codec on one thread, twice:
one block that stays in the processor's cache, so arithmetic only, and blocks from more memory than
the caches hold. The latter are held against the limits of one thread on this machine: the longer of
reading a block once at the measured bandwidth, and of its operations (two per query, channel and
token) at the measured int8 peak.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

from records import ROOT, Json, provenance, save

from pykvq.bench.limits import Limits, measure

#: Bytes of blocks of each codec that are read from memory, in MiB.
FROM_MEMORY = 256


def run_bench(mebibytes: int) -> Json:
    """What build/bench_kv prints for blocks of so many MiB; 0: one block."""
    run = subprocess.run(
        ["build/bench_kv", str(mebibytes), "--json"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: Json = json.loads(run.stdout)
    return found


def shares(codec: Json, side: str, queries: list[int], limits: Limits) -> Json:
    """GB/s and share of the limit of one side of a codec, per number of queries."""
    n_bytes = codec["bits"] * codec["d"] / 8
    return {
        "ns": codec[side],
        "gb_per_s": [round(n_bytes / ns, 2) for ns in codec[side]],
        "share_of_limit": [
            round(limits.least_seconds(n_bytes, 2.0 * n * codec["d"]) * 1e9 / ns, 3)
            for n, ns in zip(queries, codec[side], strict=True)
        ],
    }


def main() -> None:
    """Runs the benchmark and writes its record."""
    limits = measure(1)
    if limits.isa == "ref":
        sys.exit("The reference has no kernels to time: KVQ_ISA=ref.")
    found, from_memory = run_bench(0), run_bench(FROM_MEMORY)
    for codec, distant in zip(found["codecs"], from_memory["codecs"], strict=True):
        codec["from_memory"] = {
            side: shares(distant, side, found["queries"], limits)
            for side in ("score", "accum")
            if distant[side]
        }
    record = {
        "what": "ns per token and KV head, one thread",
        **provenance(),
        "command": "make bench-kv",
        "limits": asdict(limits),
        "mebibytes_from_memory": FROM_MEMORY,
        **{key: found[key] for key in ("isa", "queries", "codecs")},
    }
    print(save(f"kernels-{found['isa']}", record))


if __name__ == "__main__":
    main()
