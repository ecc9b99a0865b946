"""Measures what a step takes beside a busy process, and with more threads than processors.

    python bench/contention.py smollm2

A step is one generated token. Every case has a session of its own, on as many tokens; rounds take
all cases in turn, every other one in the opposite order, so that a machine that is shared hits them
alike. The busy process is started here: it is in the same session of the system as this one, so
that Linux (which shares processors out among sessions first, sched(7), "autogroup") weighs the two
as it weighs two programs of one terminal. Writes bench/results/contention-MODEL-MACHINE.json; ends
with status 1 where a claim of docs/speed.md does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from records import Json, machine_slug, model_facts, model_slug, numbers, provenance, save

import pykvq
from pykvq.bench.harness import PAUSE, load_average
from pykvq.session import Session

#: Seconds until the system has moved a process that was just started to where it stays.
SETTLING = 0.25


@dataclass
class Case:
    """What is timed.

    Attributes:
        n_threads: Threads of the session.
        busy: Whether another process keeps one processor busy meanwhile.
        session: The session.
        ns: Times of its steps.
    """

    n_threads: int
    busy: bool
    session: Session
    ns: list[int] = field(default_factory=list)

    def result(self, alone: float) -> Json:
        """Its times, with the ratio of its median to that of the same threads alone."""
        ms = sorted(ns / 1e6 for ns in self.ns)
        median = statistics.median(ms)
        return {
            "n_threads": self.n_threads,
            "busy": self.busy,
            "ms": median,
            "ms_mean": statistics.fmean(ms),
            "ms_p90": ms[9 * len(ms) // 10],
            "ratio": median / alone,
        }


@contextlib.contextmanager
def busy_process() -> Iterator[subprocess.Popen[bytes]]:
    """Another process that never waits, for as long as the context lasts."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            time.sleep(SETTLING)
            yield process
        finally:
            process.kill()


def time_steps(case: Case, tokens: list[int]) -> None:
    """Times a step for each token, after the first, which wakes all threads up."""
    with busy_process() if case.busy else contextlib.nullcontext():
        time.sleep(PAUSE)
        for i, token in enumerate(tokens):
            start = time.perf_counter_ns()
            case.session.eval([token])
            if i > 0:
                case.ns.append(time.perf_counter_ns() - start)


def claims(results: Sequence[Json], processors: int) -> list[tuple[str, float, float]]:
    """What is claimed: of what, its ratio to all processors alone, and the most that it may be."""
    beside = max(r["ratio"] for r in results if r["busy"])
    many = max((r["ratio"] for r in results if r["n_threads"] > processors), default=1.0)
    return [("beside a busy process", beside, 2.5), ("more threads than processors", many, 1.2)]


def main() -> None:
    """Runs the measurement and writes its record."""
    processors = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a name of the catalogue or a GGUF file")
    parser.add_argument("--kv", default="skvq")
    parser.add_argument("--depth", type=int, default=512, help="tokens in the cache beforehand")
    parser.add_argument("--steps", type=int, default=32, help="of each case, in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--threads",
        type=numbers,
        default=[processors + 1, 2 * processors, 4 * processors],
        help="beside as many as there are processors",
    )
    args = parser.parse_args()
    load = load_average()
    n_ctx = args.depth + args.rounds * (args.steps + 1)
    with pykvq.Model(args.model, kv=args.kv, n_ctx=n_ctx) as model, ExitStack() as stack:
        ids = np.random.default_rng(1).integers(0, model.info.n_vocab, n_ctx, np.int32).tolist()
        wanted = [(n, False) for n in (processors, *args.threads)]
        cases = []
        for n, busy in [*wanted, (1, False), (processors, True)]:
            session = stack.enter_context(model.session(n_threads=n))
            session.eval(ids[: args.depth], "none")
            cases.append(Case(n, busy, session))
        for turn in range(args.rounds):
            at = args.depth + turn * (args.steps + 1)
            for case in cases if turn % 2 == 0 else cases[::-1]:
                time_steps(case, ids[at : at + args.steps + 1])
        facts = model_facts(model.info.name, model.info.path)
    alone = statistics.median(cases[0].ns) / 1e6
    results = [case.result(alone) for case in cases]
    for result in results:
        print(result)
    record = {
        "what": "ms per generated token by threads, alone and beside one busy process",
        **provenance(),
        "load_before": load,
        **facts,
        "kv": args.kv,
        "depth": args.depth,
        "samples": len(cases[0].ns),
        "processors": processors,
        "results": results,
    }
    print(save(f"contention-{model_slug(args.model)}-{machine_slug()}", record))
    broken = False
    for what, ratio, most in claims(results, processors):
        broken |= ratio > most
        print(f"{what}: {ratio:.2f} times as long, at most {most} claimed")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
