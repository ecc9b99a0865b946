"""Measures how long a new process takes to its first token, and the most memory that it holds.

    python bench/startup.py smollm2

Times `pykvq run MODEL -no-cnv -p PROMPT -n 1` from its start to its end, with the model's file in
the system's page cache and Python's bytecode compiled, as an installation has them. Writes
bench/results/startup-MODEL-MACHINE.json; ends with status 1 where a claim of docs/speed.md does not
hold.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from records import Json, machine_slug, model_facts, model_slug, provenance, save

from pykvq.bench.harness import load_average
from pykvq.catalogue import resolve

#: 16 tokens for SmolLM2 and for Qwen2.5.
PROMPT = "The sea was calm and the sky was clear, as we left the old harbour"

#: What is claimed of SmolLM2: seconds, and bytes beyond the model's file and the KV cache.
CLAIMED_SECONDS, CLAIMED_BYTES = 0.4, 60e6

#: Without this Python would compile all modules in every process.
NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"


def run(command: Sequence[str]) -> tuple[float, int, bytes]:
    """Runs a command; returns its seconds, the most bytes that it ever held, and its output.

    A process begins with the peak of the one that started it: this one holds less than any that
    opens a model.
    """
    env = {name: value for name, value in os.environ.items() if name != NO_BYTECODE}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    )
    assert process.stdout is not None
    with process.stdout as pipe:
        output = pipe.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    peak = used.ru_maxrss if sys.platform == "darwin" else used.ru_maxrss * 1024
    return seconds, peak, output


def keeps_claims(record: Json) -> bool:
    """Whether what docs/speed.md claims holds in a record."""
    in_time: bool = record["seconds"] <= CLAIMED_SECONDS
    return in_time and bool(record["bytes_beyond"] <= CLAIMED_BYTES)


def main() -> None:
    """Runs the measurement and writes its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a name of the catalogue or a GGUF file")
    parser.add_argument("--kv", default="skvq")
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    load, path = load_average(), resolve(args.model)
    first_token = [sys.executable, "-m", "pykvq", "run", str(path), "--kv", args.kv]
    first_token += ["--no-conversation", "-p", PROMPT, "-n", "1", "--json"]
    nothing = [sys.executable, "-c", "pass"]
    told = json.loads(run(first_token)[2])  # untimed: fills the caches
    bare, timed = [], []
    for _ in range(args.repetitions):
        bare.append(run(nothing)[0])
        timed.append(run(first_token))
    seconds = [taken for taken, _, _ in timed]
    peak = max(held for _, held, _ in timed)
    facts, kv = model_facts(told["model"], path), told["kv"]["bytes_kv"]
    record: Json = {
        "what": "a new process from its start to its end, one token generated; medians",
        **provenance(),
        "load_before": load,
        **facts,
        "kv": args.kv,
        "n_threads": told["kv"]["n_threads"],
        "n_prompt": told["timings"]["n_prompt"],
        "n_ctx": told["kv"]["n_ctx"],
        "samples_seconds": seconds,
        "seconds": statistics.median(seconds),
        "seconds_python": statistics.median(bare),
        "bytes_peak": peak,
        "bytes_kv": kv,
        "bytes_beyond": peak - facts["bytes_model"] - kv,
    }
    print(f"{record['seconds']:.3f} s, of which Python alone {record['seconds_python']:.3f} s")
    print(f"{peak / 1e6:.1f} MB at most, {record['bytes_beyond'] / 1e6:.1f} beyond file and KV")
    print(save(f"startup-{model_slug(args.model)}-{machine_slug()}", record))
    sys.exit(0 if keeps_claims(record) else 1)


if __name__ == "__main__":
    main()
