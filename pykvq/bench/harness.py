"""Times every lane in turn, and puts together what was found.

One engine works at a time: before each repetition all threads get time to fall asleep, because
those of llama.cpp go on spinning for a while. Repetitions alternate between the lanes, every other
one in the opposite order, so that a machine that becomes slower or is shared hits all alike; what
is stated is the median.

What a depth costs is the difference from depth 0. The bandwidth of a shared machine may change by
half within a minute, so each repetition of generation at a depth comes right after one of the same
engine and setting at depth 0, by a lane that stays there.

Generation goes on from repetition to repetition, so the last one starts (repetitions - 1) *
(n_gen + 1) tokens beyond the depth: cutting back would leave blocks of a lossy scheme sealed, and
the cost of sealing them would be missing. A prompt starts at the depth each time.
"""

from __future__ import annotations

import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from pykvq import native
from pykvq.bench import limits as machine
from pykvq.bench.lanes import Lane, OwnLane
from pykvq.bench.peer import LlamaModel, require_llama_cpp
from pykvq.bench.ratios import GENERATION, PROMPT, Json, add_depth_costs, ratios
from pykvq.eval.record import machine as machine_name
from pykvq.kv_names import parse_kv
from pykvq.native_device import devices
from pykvq.native_session import STAGES

if TYPE_CHECKING:
    from pykvq.bench.limits import Limits, Work
    from pykvq.bench.options import Options
    from pykvq.model import Model, Progress
    from pykvq.native_session import SessionStats
    from pykvq.session import IntArray

Announce = Callable[[Json], None]

#: Seconds without work before a repetition. The threads of libgomp spin for a few milliseconds.
PAUSE = 0.05

#: Tokens of the prompt that every lane evaluates once, untimed, to have its memory mapped.
WARM_UP = 64

#: Tokens between two reports of progress, on the way to a depth.
_STRIDE = 512


@dataclass
class Timed:
    """The repetitions of one test of a lane.

    Attributes:
        ns: Time of each, for all its tokens.
        stages: Time by stage of each, where the engine tells.
        context: Tokens in the cache at the middle of each.
        kv_bytes: Bytes of the cache that a token read at that point, where the engine tells.
        gpu_layers: Layers on the GPU, the output matrix counted as one, where the engine tells.
        ns_at_0: Of generation at a depth: what the same took at depth 0, just before each.
    """

    ns: list[int] = field(default_factory=list)
    stages: list[dict[str, int]] = field(default_factory=list)
    context: list[float] = field(default_factory=list)
    kv_bytes: list[float] = field(default_factory=list)
    gpu_layers: int | None = None
    ns_at_0: list[int] = field(default_factory=list)


class Bench:
    """A benchmark of one model."""

    def __init__(
        self,
        model: Model,
        options: Options,
        lanes: Sequence[Lane],
        shallow: Sequence[Lane],
        progress: Progress | None,
    ) -> None:
        """Prepares it.

        Args:
            model: The model.
            options: What to time.
            lanes: What takes part; each holds no tokens.
            shallow: The same again, to generate at depth 0 beside each at a depth; empty: no depth
                is compared with depth 0.
            progress: Told how far the way to a depth is.
        """
        self._options = options
        self._lanes = lanes
        self._shallow = dict(zip(lanes, shallow, strict=True)) if shallow else {}
        self._progress = progress
        # Any tokens do, the same for all lanes: no time depends on what they are.
        rng = np.random.default_rng(1)
        self._ids: IntArray = rng.integers(0, model.info.n_vocab, options.n_ctx, np.int32)

    def run(self) -> Iterator[tuple[Lane, str, int, Timed]]:
        """All repetitions: (lane, test, depth, times) in the order of depth, test and lane."""
        for lane in (*self._lanes, *self._shallow.values()):
            lane.eval(self._ids[: min(WARM_UP, self._options.n_ctx)])
            lane.truncate(0)
        for depth in sorted(set(self._options.depths)):
            for lane in self._lanes:
                self._reach(lane, depth)
            last = self._options.prompt_depth
            for test, n in (
                (GENERATION, self._options.n_gen),
                (PROMPT, self._options.n_prompt if last is None or depth <= last else 0),
            ):
                if n:
                    for lane, timed in self._test(test, depth):
                        yield lane, test, depth, timed

    def _reach(self, lane: Lane, depth: int) -> None:
        """Brings a lane to a depth, cutting back what it has beyond the last one."""
        if lane.n_tokens > depth:
            lane.truncate(depth)
        start = self._options.fill_from
        if start is None or depth <= start:
            self._prompt(lane, depth)
        else:
            n = max(start, lane.n_tokens)
            self._prompt(lane, n + (depth - n) % native.block_tokens())
            lane.fill(depth)

    def _prompt(self, lane: Lane, end: int) -> None:
        while (start := lane.n_tokens) < end:
            lane.eval(self._ids[start : min(start + _STRIDE, end)])
            if self._progress is not None:
                self._progress(f"{lane.engine} {lane.setting}", lane.n_tokens, end)

    def _test(self, test: str, depth: int) -> list[tuple[Lane, Timed]]:
        timed = [(lane, Timed()) for lane in self._lanes]
        shallow = self._shallow if test == GENERATION and depth > 0 else {}
        for repetition in range(self._options.repetitions):
            for lane, times in timed if repetition % 2 == 0 else timed[::-1]:
                if lane in shallow:
                    shallow[lane].truncate(0)
                    time.sleep(PAUSE)
                    at_0 = Timed()
                    self._time(shallow[lane], at_0, 1, self._options.n_gen, warm=True)
                    times.ns_at_0 += at_0.ns
                if test == PROMPT:
                    lane.truncate(depth)
                time.sleep(PAUSE)
                if test == GENERATION:
                    self._time(lane, times, 1, self._options.n_gen, warm=True)
                else:
                    self._time(lane, times, self._options.n_prompt, 1, warm=False)
        return timed

    def _time(self, lane: Lane, times: Timed, n: int, calls: int, *, warm: bool) -> None:
        """Times so many calls with n tokens each, after one with a single token if `warm`."""
        at = lane.n_tokens
        if warm:
            lane.eval(self._ids[at : at + 1])
            at += 1
        before = lane.stats()
        start = time.perf_counter_ns()
        for i in range(at, at + n * calls, n):
            lane.eval(self._ids[i : i + n])
        times.ns.append(time.perf_counter_ns() - start)
        times.context.append(at + (n * calls + 1) / 2)
        after = lane.stats()
        if before is not None and after is not None:
            times.gpu_layers = after.n_gpu_layers + after.gpu_head
            if not times.gpu_layers:  # the clocks of the core are those of the CPU
                times.stages.append(_stages(before, after))
            read = [s.bytes_step_k + s.bytes_step_v for s in (before, after)]
            times.kv_bytes.append(sum(read) / 2)


def _stages(before: SessionStats, after: SessionStats) -> dict[str, int]:
    return {stage: after.stage_ns[stage] - before.stage_ns[stage] for stage in STAGES}


def run(
    model: Model,
    options: Options,
    *,
    command: str,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> Json:
    """Times a model.

    Args:
        model: The model.
        options: What to time.
        command: What is told of who asked.
        progress: Told how far the way to a depth is.
        announce: Told of each result, as soon as it is there.

    Returns:
        A record: provenance, settings, `limits` of the machine, `results`, and, with a peer,
        `ratios`; docs/bench.md says what they hold.

    Raises:
        KvqError: A scheme is unknown or does not suit the model, a cache does not fit into the
            memory, or the peer is not installed or fails.
        ValueError: A scheme needs a profile and there is none, or `fill_from` tokens seal no block.
    """
    load = load_average()
    versions = {"pykvq": native.version()}
    if options.peer is not None:
        versions["llama-cpp-python"] = str(require_llama_cpp().__version__)
    limits = machine.measure(options.n_threads)
    options = replace(options, n_threads=limits.n_threads)
    work = machine.work_of(model)
    n_gpu_layers, device = _placement(model, options)
    results: list[Json] = []
    with ExitStack() as stack:
        peer: LlamaModel | None = None
        if options.peer is not None:
            peer = stack.enter_context(LlamaModel(model.info.path, n_gpu_layers))
            versions["llama.cpp"] = peer.build

        def lanes_of(options: Options) -> list[Lane]:
            lanes: list[Lane] = [
                stack.enter_context(OwnLane(model, kv, options)) for kv in dict.fromkeys(options.kv)
            ]
            if peer is not None:
                lanes += [stack.enter_context(lane) for lane in peer.lanes(options)]
            return lanes

        lanes, shallow = lanes_of(options), list[Lane]()
        if options.n_gen and max(options.depths) > 0:
            shallow = lanes_of(replace(options, depths=[WARM_UP], n_prompt=0, fill_from=None))
        for lane, test, depth, times in Bench(model, options, lanes, shallow, progress).run():
            on_cpu = None if n_gpu_layers else limits
            result = _result(lane, test, depth, times, options, on_cpu, work)
            results.append(result)
            if announce is not None:
                announce(result)
    add_depth_costs(results)
    record: Json = {
        "what": "speed of prompts and of generation by tokens in the cache; medians",
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": machine_name(),
        "load_before": load,
        "versions": versions,
        "model": _model_facts(model),
        "settings": asdict(options) | {"n_ctx": options.n_ctx},
        "limits": asdict(limits),
        "device": device,
        "results": results,
    }
    if options.peer is None:
        record["peak_resident_bytes"] = peak_resident_bytes()
    else:
        record |= ratios(results, options)
    return record


def planned(model: Model, options: Options) -> SessionStats:
    """What the first session that is timed will be."""
    scheme, bits = parse_kv(options.kv[0])
    return model.plan(
        kv=scheme.name,
        kv_bits=bits,
        n_ctx=options.n_ctx,
        n_batch=options.n_batch,
        device=options.device,
        n_gpu_layers=options.n_gpu_layers,
        memory=1,
    ).stats


def _placement(model: Model, options: Options) -> tuple[int, Json | None]:
    """How many layers the GPU will have, the output matrix counted as one, and what GPU that is."""
    placed = planned(model, options)
    found = [d for d in devices().found if d.name == f"cuda:{placed.gpu}"]
    return placed.n_gpu_layers + placed.gpu_head, asdict(found[0]) if found else None


def _model_facts(model: Model) -> Json:
    info = model.info
    return {
        "name": info.name,
        "file": os.path.basename(info.path),
        "architecture": info.architecture,
        "n_params": info.n_params,
        "bytes_weights": info.bytes_weights,
        "fingerprint": f"{model.fingerprint:016x}",
    }


def _result(
    lane: Lane,
    test: str,
    depth: int,
    times: Timed,
    options: Options,
    limits: Limits | None,
    work: Work,
) -> Json:
    """One line of the results; what an engine does not tell is None.

    The limits are those of the CPU, None where a GPU has layers: then no share of any is stated.
    """
    n = options.n_gen if test == GENERATION else options.n_prompt
    ns = statistics.median(times.ns)
    context = statistics.median(times.context)
    needed = n * work.of_token(context) if test == GENERATION else work.of_prompt(n, depth)
    result: Json = {
        "engine": lane.engine,
        "kv": lane.kv,
        "setting": lane.setting,
        "test": test,
        "n_tokens": n,
        "depth": depth,
        "filled": options.fill_from is not None and depth > options.fill_from,
        "samples_ns": times.ns,
        "samples_ns_at_depth_0": times.ns_at_0,
        "ms_per_token": ns / n / 1e6,
        "tokens_per_second": n / ns * 1e9,
        "giga_operations_per_second": needed / ns,
        "share_of_int8_peak": _share(needed / ns * 1e9, limits.int8_operations if limits else None),
        "gpu_layers": times.gpu_layers,
        "stages_ms": None,
        "weight_bytes": None,
        "kv_bytes": None,
        "gb_per_second": None,
        "share_of_bandwidth": None,
        "share_of_limit": None,
        "attention_share_of_limit": None,
    }
    if times.stages:
        result["stages_ms"] = {
            name: statistics.median(stages[name] for stages in times.stages) / n / 1e6
            for name in STAGES
        }
    if test == GENERATION and times.kv_bytes:
        kv_bytes = statistics.median(times.kv_bytes)
        n_bytes = work.weight_bytes + kv_bytes
        result |= {
            "weight_bytes": work.weight_bytes,
            "kv_bytes": kv_bytes,
            "gb_per_second": n_bytes / (ns / n),
        }
    if test == GENERATION and times.kv_bytes and times.stages and limits is not None:
        seconds = ns / n * 1e-9
        in_attention = result["stages_ms"]["attention"] * 1e-3
        of_attention = limits.least_seconds(kv_bytes, work.attention_operations * context)
        result |= {
            "share_of_bandwidth": n_bytes / seconds / limits.read_bytes,
            "share_of_limit": limits.least_seconds(n_bytes, needed / n) / seconds,
            "attention_share_of_limit": _share(of_attention, in_attention),
        }
    return result


def _share(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None


def load_average() -> float | None:
    """How many threads wanted to run during the last minute, if the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def peak_resident_bytes() -> int | None:
    """The most memory that this process ever held, its mapped files included, if it is known."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
