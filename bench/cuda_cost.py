"""What attention over a cache costs on four GPUs, by counting: a model, never a measurement.

The interpreter of tests/cuda/ptx runs the PTX of a decode step at two lengths of the context; the
difference of its counts, over the tokens between and the KV heads, is what a token costs. Against
data sheets that gives a least time of memory and one of each unit that executes instructions. The
longest is the prediction; the model ranks kernels and guards them, and no number of it is a speed.

    python bench/cuda_cost.py             # writes bench/results/cuda-cost.json, prints the table

What it cannot know: what ptxas makes of the PTX (it folds shifts and adds, and logic in threes, so
the counts are high), latencies that too few warps leave uncovered, and the caches.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cuda"))

from ptx.cases import attend_case
from ptx.counts import Counts, class_of
from ptx.harness import Bench, core
from ptx.parser import Statement
from records import provenance, save

BLOCK = 64


@dataclass(frozen=True)
class Gpu:
    """Figures of a data sheet.

    Attributes:
        name: The product.
        source: Where the figures stand, and which of them could not be verified.
        n_sm: Streaming multiprocessors.
        ghz: Boost clock.
        gb_per_s: Bandwidth of memory.
        fma16: Dense products of halves, summed in f32, per SM and clock; int8 has twice as many.
        half2: Threads whose instruction on two halves an SM executes per clock.
    """

    name: str
    source: str
    n_sm: int
    ghz: float
    gb_per_s: float
    fma16: int
    half2: int


GPUS = (
    Gpu(
        "H100 SXM",
        "https://archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html (NVIDIA's table): 132 SMs, "
        "3350 GB/s, 67 TFLOPS of f32, 989 dense of f16 on tensor cores; "
        "https://glennklockwood.com/garden/processors/h100: 1.98 GHz, 133.8 TFLOPS of f16 "
        "elsewhere. fma16 is half of the peak, which only wgmma reaches; what mma.sync reaches was "
        "not verified.",
        132,
        1.98,
        3350,
        1024,
        128,
    ),
    Gpu(
        "RTX 4090",
        "https://waredb.com/processor/nvidia-geforce-rtx-4090: 2.52 GHz, 1008 GB/s, 165.2 TFLOPS "
        "of f16 on tensor cores, 82.6 of f16 and of f32 elsewhere; "
        "https://holynerdvana.blogspot.com/2022/10/nvidia-geforce-rtx-4090-specifications.html: "
        "128 SMs. NVIDIA's own whitepaper was not at hand.",
        128,
        2.52,
        1008,
        256,
        64,
    ),
    Gpu(
        "Jetson Orin Nano 8GB",
        "Jetson Orin Nano series data sheet DS-11105-001: 1024 cores, 625 MHz, 68 GB/s (1.02 GHz "
        "and 102 GB/s in the mode MAXN_SUPER, not modeled), 1.28 TFLOPS of f32, 2.56 of f16; "
        "10.24 dense of f16 on tensor cores. Quoted from copies of it.",
        8,
        0.625,
        68,
        1024,
        128,
    ),
    Gpu(
        "AGX Orin 64GB",
        "Jetson AGX Orin series data sheet DS-10662-001: 8 TPCs of 2 SMs, 2048 cores, 1.3 GHz, "
        "204.8 GB/s, 5.32 TFLOPS of f32, 10.65 of f16, 85 sparse of f16 on tensor cores. Quoted "
        "from copies of it.",
        16,
        1.3,
        204.8,
        1024,
        128,
    ),
)

# Warp instructions that the schedulers of an SM issue per clock, one for each of its 4 parts.
ISSUE_SLOTS = 4

# Threads per clock and SM. NVIDIA's table is "Throughput of Native Arithmetic Instructions" of the
# CUDA C++ Best Practices Guide (until CUDA 12 of the Programming Guide); it was not at hand itself.
# By quotations of it, or by data sheets:
#   fp32 128              all four data sheets: TFLOPS / (2 * SMs * clock)
#   int, int64, imul 64   8.6 (quoted); H100: 33.5, RTX 4090: 41.3 TOPS of int32
#   half to float 64      9.0 and 12.0 (quoted); a conversion to half 16 there
#   mufu 16               8.6 (quoted)
# Not verified for 8.6 to 9.0, where 7.x and 12.0 agree on them (quoted): logic, shift and compare
# 64, shfl 32, bits 16. Not verified at all: prmt and vote, taken as logic; dp4a, taken as imul,
# whose unit executes it (https://forums.developer.nvidia.com/t/302018/7); other conversions, div
# and redux 16; loads and stores 32. The instruction on two halves is a figure of each GPU.
PIPES: dict[str, dict[str, float]] = {
    "integer and logic": dict.fromkeys(
        ("int", "int64", "logic", "shift", "compare", "prmt", "vote", "mov"), 64
    ),
    "multiply-add": {"fp32": 128, "imul": 64, "dp4a": 64, "half to float": 64},
    "special function": {"mufu": 16, "cvt": 16, "div": 16, "bits": 16, "redux": 16},
    "load and store": {"ldg": 32, "stg": 32, "cp.async": 32, "shfl": 32, "ldl": 32, "stl": 32},
}

# SASS instructions for one of PTX, where that is not 1. mov: constants and renamed registers, which
# ptxas folds away.
_FOLDED = {"mov": 0, "free": 0, "int64": 2}

# Of these only one instruction is of the special function unit; the others are plain arithmetic.
_AROUND = ("mufu", "div")

# Conversions of integers that only rename registers.
_RENAMED = {("cvt", "u32", "u64"), ("cvt", "u64", "u32")}


def slots(statement: Statement) -> int:
    """Instructions that ptxas is taken to make of a statement.

    The numbers are those of toy kernels by CUDA 13.0, disassembled: the same on sm_86 and sm_90. Of
    what has a slow path for denormal numbers and the like, the fast path is counted.
    """
    name, kind = statement.opcode[0], class_of(statement)
    if statement.opcode in _RENAMED:
        return 0
    if name in ("bfe", "bfi"):
        return 2  # of constant places
    if kind == "div":
        return 20 if statement.type != "f32" else 10  # integers: unsigned 18, signed 24
    if kind == "imul" and statement.type.endswith("64") and not statement.has("wide"):
        return 4
    if name in ("sqrt", "rcp") and statement.has("rn"):
        return 10
    if name == "ex2" and not statement.has("ftz"):
        return 4  # its argument and its result are scaled where they could be denormal
    return _FOLDED.get(kind, 1)


def kind_of(statement: Statement) -> str:
    """The class whose throughput a statement has."""
    if statement.opcode == ("cvt", "f32", "f16"):
        return "half to float"  # an addition of halves with a result in f32
    if statement.opcode == ("cvt", "s64", "s32"):
        return "shift"  # which makes the upper half
    return class_of(statement)


@dataclass
class Cost:
    """What a token costs for each KV head.

    Attributes:
        issued: Warp instructions.
        by_kind: The same by class.
        products: Multiply-adds of halves on tensor cores; an int8 one counts half.
        shared_passes: 128-byte accesses of shared memory.
        bytes_moved: Distinct sectors of global memory that a kernel touches, in bytes.
        bytes_stored: What the codecs keep: the least that must be read.
        by_line: Warp instructions by (file, line) of the source.
    """

    issued: float
    by_kind: dict[str, float]
    products: float
    shared_passes: float
    bytes_moved: float
    bytes_stored: float
    by_line: dict[tuple[str, int], float]

    def times(self, gpu: Gpu) -> dict[str, float]:
        """Least nanoseconds of memory, issue and each unit, where tokens are many."""
        clocks = {"issue": self.issued / ISSUE_SLOTS}
        for pipe, rates in PIPES.items():
            clocks[pipe] = sum(32 * self.by_kind.get(k, 0) / rate for k, rate in rates.items())
        clocks["multiply-add"] += 32 * self.by_kind.get("fp16", 0) / gpu.half2
        clocks["load and store"] += self.shared_passes
        clocks["tensor cores"] = self.products / gpu.fma16
        found = {name: n / (gpu.n_sm * gpu.ghz) for name, n in clocks.items()}
        return {"memory": self.bytes_moved / gpu.gb_per_s, **found}


def _products(statement: Statement) -> int:
    """Multiply-adds of one mma by a warp, in those of halves."""
    shape = next(p for p in statement.opcode if p[0] == "m" and p[1].isdigit())
    m, rest = shape[1:].split("n")
    n, k = rest.split("k")
    return int(m) * int(n) * int(k) // (1 if "f16" in statement.opcode else 2)


@dataclass
class _Totals:
    """Of one launch."""

    kinds: Counter[str]
    lines: Counter[tuple[str, int]]
    products: float
    passes: float
    moved: float


def _totals(counts: Counts) -> _Totals:
    kinds: Counter[str] = Counter()
    lines: Counter[tuple[str, int]] = Counter()
    products = 0.0
    for statement, n in zip(counts.kernel.statements, counts.warps.tolist(), strict=True):
        kind, more = kind_of(statement), slots(statement) - 1
        if kind in _AROUND and more > 0:
            kinds["mufu"] += n
            kinds["int" if statement.type[0] in "su" else "fp32"] += n * more
        else:
            kinds[kind] += n * (more + 1)
        file, line = statement.source or ("?", 0)
        lines[Path(file).name, line] += n * slots(statement)
        if statement.opcode[0] == "mma":
            products += n * _products(statement)
    passes = float(sum(traffic.passes for traffic in counts.shared.values()))
    return _Totals(kinds, lines, products, passes, float(counts.dram_bytes))


def cost_of(
    file: str, keys: str, values: str, *, d_head: int, group: int, architecture: str
) -> Cost:
    """Counts a decode step at two lengths of the context.

    Args:
        file: Kernels of core/cuda/kernels.
        keys: Codec of keys.
        values: Codec of values.
        d_head: Width of heads.
        group: Query heads of a KV head.
        architecture: As "compute_80".
    """
    heads, blocks = 1, (4, 8)
    found = []
    for n_blocks in blocks:
        counts = attend_case(
            Bench(architecture),
            file,
            keys=keys,
            values=values,
            d_head=d_head,
            group=group,
            n_heads=heads,
            n_splits=2,
            held=n_blocks * BLOCK + 5 + 16,
        )[2]
        found.append(_totals(counts))
    per = heads * (blocks[1] - blocks[0]) * BLOCK
    short, long = found
    kinds = {k: (n - short.kinds[k]) / per for k, n in long.kinds.items()}
    return Cost(
        issued=sum(kinds.values()),
        by_kind=kinds,
        products=(long.products - short.products) / per,
        shared_passes=(long.passes - short.passes) / per,
        bytes_moved=(long.moved - short.moved) / per,
        bytes_stored=stored(keys, values, d_head),
        by_line={k: (n - short.lines[k]) / per for k, n in long.lines.items()},
    )


def stored(keys: str, values: str, d_head: int) -> float:
    """Bytes of a token's key and value."""
    runs = [4, 12, d_head // 4, d_head // 4] if "mixed" in (keys, values) else [0] * 4
    shape = core().ffi.new("kvq_kv_shape *", {"d": d_head, "group": d_head, "run": runs})
    n = sum(core().lib.reference_codec_bytes(core().codec(name), shape) for name in (keys, values))
    return float(n) / BLOCK


def report(cost: Cost, gpu: Gpu, plain_bytes: float) -> dict[str, Any]:
    """The prediction for a GPU, and an fp16 cache's bound beside it."""
    times = cost.times(gpu)
    bound = max(times, key=lambda name: times[name])
    least = cost.bytes_stored / gpu.gb_per_s
    return {
        "gpu": gpu.name,
        "ns": round(times[bound], 4),
        "bound_by": bound,
        "ns_memory": round(least, 4),
        "times_memory_bound": round(times[bound] / least, 2),
        "ns_f16_memory": round(plain_bytes / gpu.gb_per_s, 4),
        "by_unit": {name: round(value, 4) for name, value in times.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what a token costs for a KV head, in nanoseconds."""
    names = [gpu.name for gpu in GPUS]
    lines = [
        "| kernel | keys, values | bytes | instructions | " + " | ".join(names) + " |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for row in rows:
        cells = [
            f"{r['ns']:.3f} ({r['times_memory_bound']:.1f}x, {r['bound_by']})" for r in row["gpus"]
        ]
        lines.append(
            f"| `{row['kernel']}` | {row['keys']}, {row['values']} | {row['bytes']:.0f} | "
            f"{row['instructions']:.1f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kernels", default="attend", help="files of core/cuda/kernels, by commas")
    parser.add_argument("--codecs", default="u2:c8,mixed:t2,f16:f16", help="KEYS:VALUES, by commas")
    parser.add_argument("--d-head", type=int, default=128)
    parser.add_argument("--group", type=int, default=4, help="query heads of a KV head")
    parser.add_argument("--arch", default="compute_80")
    parser.add_argument("--lines", type=int, default=0, help="print the dearest lines of source")
    parser.add_argument("--no-save", action="store_true", help="only print")
    options = parser.parse_args(words)
    plain = stored("f16", "f16", options.d_head)
    rows = []
    for kernel in options.kernels.split(","):
        for pair in options.codecs.split(","):
            keys, values = pair.split(":")
            shape = {"d_head": options.d_head, "group": options.group}
            cost = cost_of(kernel, keys, values, architecture=options.arch, **shape)
            dearest = sorted(cost.by_line.items(), key=lambda item: -item[1])
            for (file, line), n in dearest[: options.lines]:
                print(f"{kernel} {pair} {file}:{line}: {n:.2f} instructions")
            rows.append(
                {
                    "kernel": kernel,
                    "keys": keys,
                    "values": values,
                    **shape,
                    "bytes": round(cost.bytes_stored, 2),
                    "bytes_moved": round(cost.bytes_moved, 2),
                    "instructions": round(cost.issued, 2),
                    "by_kind": {k: round(v, 3) for k, v in sorted(cost.by_kind.items()) if v},
                    "products": round(cost.products, 1),
                    "shared_passes": round(cost.shared_passes, 2),
                    "gpus": [report(cost, gpu, plain) for gpu in GPUS],
                }
            )
    print(table(rows))
    if not options.no_save:
        gpus = [vars(gpu) for gpu in GPUS]
        save(
            "cuda-cost",
            {
                **provenance(),
                "what": "a model from counted PTX; per token and KV head; not measured",
                "architecture": options.arch,
                "gpus": gpus,
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
