"""Keeps the times of the KV kernels with their provenance.

    make bench-kv        (which builds build/bench_kv and runs this)

Writes bench/results/kernels-ISA.json: ns per token and KV head of every codec, one block that stays
in the processor's cache, so arithmetic only, all in one run.
"""

from __future__ import annotations

import json
import subprocess

from records import ROOT, provenance, save


def main() -> None:
    """Runs the benchmark and writes its record."""
    run = subprocess.run(
        ["build/bench_kv", "0", "--json"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    found = json.loads(run.stdout)
    record = {
        "what": "ns per token and KV head",
        **provenance(),
        "command": "make bench-kv",
        **found,
    }
    print(save(f"kernels-{found['isa']}", record))


if __name__ == "__main__":
    main()
