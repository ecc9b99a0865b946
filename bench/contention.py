"""Measures what a step takes beside a busy process, and with more threads than processors.

    python bench/contention.py smollm2

A step is one generated token. Every case has a session of its own, on as many tokens; rounds take
all cases in turn, every other one in the opposite order, so that a machine that is shared hits them
alike. The busy process is started here: it is in the same session of the system as this one, so
that Linux (which shares processors out among sessions first, sched(7), "autogroup") weighs the two
as it weighs two programs of one terminal. A session never opens more threads than there are
processors; for there to be more, all threads of this process are confined to one. Writes
bench/results/contention-MODEL-MACHINE.json; ends with status 1 where a claim of docs/speed.md does
not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
from records import Json, machine_slug, model_facts, model_slug, provenance, save

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
        processors: How many processors they are confined to.
        busy: Whether another process keeps one processor busy meanwhile.
        session: The session.
        ns: Times of its steps.
    """

    n_threads: int
    processors: int
    busy: bool
    session: Session
    ns: list[int] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        """The median of its steps."""
        return statistics.median(self.ns) / 1e6

    def result(self, alone: float) -> Json:
        """Its times, with the ratio of its median to the `alone` that it is held against, in ms."""
        ms = sorted(ns / 1e6 for ns in self.ns)
        median = self.median_ms
        return {
            "n_threads": self.n_threads,
            "processors": self.processors,
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


def confine(processors: Iterable[int]) -> None:
    """Lets all threads of this process run on these processors alone."""
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # a thread that has ended meanwhile
            os.sched_setaffinity(int(task), processors)


@contextlib.contextmanager
def confined(n: int) -> Iterator[None]:
    """All threads of this process on n of its processors, for as long as the context lasts."""
    processors = os.sched_getaffinity(0)
    confine(sorted(processors)[:n])
    try:
        yield
    finally:
        confine(processors)


def time_steps(case: Case, tokens: list[int]) -> None:
    """Times a step for each token, after the first, which wakes all threads up."""
    with busy_process() if case.busy else contextlib.nullcontext(), confined(case.processors):
        time.sleep(PAUSE)
        for i, token in enumerate(tokens):
            start = time.perf_counter_ns()
            case.session.eval([token])
            if i > 0:
                case.ns.append(time.perf_counter_ns() - start)


def claims(results: Sequence[Json]) -> list[tuple[str, float, float]]:
    """What is claimed: of what, its ratio to what it is held against, and the most it may be."""
    beside = max(r["ratio"] for r in results if r["busy"])
    many = max(r["ratio"] for r in results if r["n_threads"] > r["processors"])
    return [("beside a busy process", beside, 2.5), ("more threads than processors", many, 1.2)]


def main() -> None:
    """Runs the measurement and writes its record."""
    processors = len(os.sched_getaffinity(0))
    if processors == 1:
        sys.exit("There is one processor: a session has one thread, and nothing can be compared.")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a name of the catalogue or a GGUF file")
    parser.add_argument("--kv", default="skvq")
    parser.add_argument("--depth", type=int, default=512, help="tokens in the cache beforehand")
    parser.add_argument("--steps", type=int, default=32, help="of each case, in a round")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    load = load_average()
    n_ctx = args.depth + args.rounds * (args.steps + 1)
    with pykvq.Model(args.model, kv=args.kv, n_ctx=n_ctx) as model, ExitStack() as stack:
        ids = np.random.default_rng(1).integers(0, model.info.n_vocab, n_ctx, np.int32).tolist()
        alone, crowded, single = (processors, processors), (processors, 1), (1, 1)
        cases = {}
        for shape, busy in [(alone, False), (alone, True), (single, False), (crowded, False)]:
            session = stack.enter_context(model.session(n_threads=shape[0]))
            session.eval(ids[: args.depth], "none")
            cases[shape, busy] = Case(*shape, busy, session)
        in_turn = list(cases.values())
        for turn in range(args.rounds):
            at = args.depth + turn * (args.steps + 1)
            for case in in_turn if turn % 2 == 0 else in_turn[::-1]:
                time_steps(case, ids[at : at + args.steps + 1])
        facts = model_facts(model.info.name, model.info.path)
    held_against = {n: cases[(n, n), False].median_ms for n in (processors, 1)}
    results = [case.result(held_against[case.processors]) for case in in_turn]
    for result in results:
        print(result)
    record = {
        "what": "ms per generated token by threads, alone and beside one busy process",
        **provenance(),
        "load_before": load,
        **facts,
        "kv": args.kv,
        "depth": args.depth,
        "samples": len(in_turn[0].ns),
        "processors": processors,
        "results": results,
    }
    print(save(f"contention-{model_slug(args.model)}-{machine_slug()}", record))
    broken = False
    for what, ratio, most in claims(results):
        broken |= ratio > most
        print(f"{what}: {ratio:.2f} times as long, at most {most} claimed")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
