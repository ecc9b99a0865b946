"""The generated tables of docs/cuda.md, from the records that the scripts of bench/ keep.

`docs/make_tables.py` puts them into the page. What a record does not have yet is told in a sentence
that names the command.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from markup import link_to, table
from speed_tables import title_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

Json = dict[str, Any]


def _read(name: str) -> tuple[Path, Json | None]:
    path = RESULTS / f"{name}.json"
    return path, json.loads(path.read_text()) if path.exists() else None


def _told(data: Json, path: Path, page: Path) -> str:
    """Where numbers come from."""
    return f"`{data['command']}`, {data['date']} ([record]({link_to(path, page)}))."


def _context(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}".replace(",", " ")


def memory(page: Path) -> str:
    """What sessions would take of a GPU, by model, cache and context."""
    path, data = _read("cuda-memory")
    if data is None:
        return "No plans are kept: `python bench/cuda_memory.py MODEL ...`, then `make tables`."
    parts = ("weights", "rows", "sealed", "tables", "scratch")
    rows = []
    for model in data["models"]:
        for c in model["contexts"]:
            sizes = [c[f"bytes_gpu_{part}"] for part in parts] + [c["bytes_gpu"], c["bytes_host"]]
            rows.append(
                [
                    title_of(model["file"], model["model"]),
                    f"`{c['kv']}`",
                    _context(c["n_ctx"]),
                    *(f"{n / 1e6:.1f}" for n in sizes),
                ]
            )
    head = "model|cache|tokens|weights|f16 rows|sealed|tables|scratch|GPU, MB|host, MB"
    return f"{_told(data, path, page)}\n\n{table(head.split('|'), rows)}"


def longest(page: Path) -> str:
    """The longest contexts in memories of several sizes."""
    path, data = _read("cuda-memory")
    if data is None:
        return "No plans are kept: `python bench/cuda_memory.py MODEL ...`, then `make tables`."
    memories = sorted({found["memory"] for found in data["models"][0]["longest"]})
    rows = []
    for model in data["models"]:
        by_kv: dict[str, list[str]] = {}
        for found in sorted(model["longest"], key=lambda found: int(found["memory"])):
            by_kv.setdefault(found["kv"], []).append(_context(found["n_ctx"]))
        title = title_of(model["file"], model["model"])
        rows += [[title, f"`{kv}`", *contexts] for kv, contexts in by_kv.items()]
    head = ["model", "cache", *(f"{n // 10**9} GB" for n in memories)]
    return f"{_told(data, path, page)}\n\n{table(head, rows)}"


def cost(page: Path) -> str:
    """What the model of bench/cuda_cost.py predicts for attention over a long context."""
    path, data = _read("cuda-cost")
    if data is None:
        return "No prediction is kept: `python bench/cuda_cost.py`, then `make tables`."
    gpus = [gpu["name"] for gpu in data["gpus"]]
    rows = []
    for row in data["rows"]:
        found = {gpu["gpu"]: gpu for gpu in row["gpus"]}
        cells = [
            f"{found[name]['ns']:.3f} ({found[name]['times_memory_bound']:.2f}, "
            f"{found[name]['bound_by']})"
            for name in gpus
        ]
        codecs = f"{row['keys']}, {row['values']}"
        shape = f"{row['group']} x {row['d_head']}"
        counted = [f"{row['bytes']:.0f}", f"{row['instructions']:.1f}"]
        rows.append([f"`{row['kernel']}`", codecs, shape, *counted, *cells])
    head = ["kernel", "keys, values", "queries", "bytes", "instructions", *gpus]
    return f"{_told(data, path, page)}\n\n{table(head, rows)}"


def measured(page: Path) -> str:
    """What `make gpu-check` measured on GPUs."""
    found = [(path, json.loads(path.read_text())) for path in sorted(RESULTS.glob("gpu-*.json"))]
    if not found:
        return "Nothing was measured on a GPU yet: `make gpu-check`, then `make tables`."
    parts = []
    for path, data in found:
        rows = [
            [
                r["setting"],
                r["test"],
                str(r["depth"]),
                f"{r['tokens_per_second']:.1f}",
                f"{r['gb_per_second']:.1f}" if r["gb_per_second"] else "-",
                f"{100 * r['share_of_copy']:.0f} %" if r.get("share_of_copy") else "-",
            ]
            for r in data["results"]
        ]
        head = ["cache", "test", "depth", "tokens/s", "GB/s", "of a copy's"]
        told = (
            f"**{data['model']['name']}** on {data['gpu']['model']}, whose copy reaches"
            f" {data['copy_bytes_per_second'] / 1e9:.0f} GB/s: {_told(data, path, page)}"
        )
        parts.append(f"{told}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


#: By the names of their places on pages; each takes the page, for links.
MAKERS: Mapping[str, Callable[[Path], str]] = {
    "cuda-memory": memory,
    "cuda-longest": longest,
    "cuda-cost": cost,
    "cuda-measured": measured,
}
