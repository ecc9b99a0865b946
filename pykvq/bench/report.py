"""A benchmark for people and for programs: Markdown, JSON, JSON lines, CSV, from its record.

What was not measured is a dash, or an empty cell.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pykvq.bench.ratios import ATTENTION, BEST, GENERATION, PROMPT, Json

_Show = Callable[[Any], str]


def _fixed(digits: int) -> _Show:
    return lambda value: f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.1f}"


#: The columns of the table: heading, key of the result ("stages_ms.attention": of what is inside),
#: how to show it.
_COLUMNS: Sequence[tuple[str, str, _Show]] = (
    ("engine", "engine", str),
    ("kv", "setting", str),
    ("test", "name", str),
    ("tokens/s", "tokens_per_second", _fixed(2)),
    ("ms/token", "ms_per_token", _fixed(3)),
    ("over depth 0", "ms_over_depth_0", _fixed(3)),
    ("attention ms", "stages_ms.attention", _fixed(3)),
    ("weights ms", "stages_ms.weights", _fixed(3)),
    ("weights MB", "weight_bytes", _megabytes),
    ("KV MB", "kv_bytes", _megabytes),
    ("GB/s", "gb_per_second", _fixed(2)),
    ("% bandwidth", "share_of_bandwidth", _percent),
    ("% int8 peak", "share_of_int8_peak", _percent),
    ("% limit", "share_of_limit", _percent),
    ("% limit, attention", "attention_share_of_limit", _percent),
)


def name_of(result: Json) -> str:
    """What llama-bench calls such a test: "pp512", "tg64 @ d2048"."""
    name = f"{'tg' if result['test'] == GENERATION else 'pp'}{result['n_tokens']}"
    return f"{name} @ d{result['depth']}" if result["depth"] else name


def line(result: Json) -> str:
    """One result in a line."""
    return (
        f"{result['engine']} {result['setting']}: {name_of(result)}"
        f" {result['tokens_per_second']:.2f} tokens/s, {result['ms_per_token']:.3f} ms/token"
    )


def render(record: Json, form: str) -> str:
    """The record as text, with its final line break.

    Args:
        record: What `pykvq.bench.harness.run` returned.
        form: One of `pykvq.bench.options.FORMATS`.
    """
    forms: Mapping[str, Callable[[Json], str]] = {
        "md": _markdown,
        "json": lambda data: json.dumps(data, indent=1, allow_nan=False) + "\n",
        "jsonl": lambda data: "".join(json.dumps(row) + "\n" for row in _rows(data)),
        "csv": _csv,
    }
    return forms[form](record)


def _rows(record: Json) -> list[Json]:
    """The results, each with what it needs to stand alone."""
    about: Json = {
        "model": record["model"]["name"],
        "model_file": record["model"]["file"],
        "machine": record["machine"],
        "date": record["date"],
        "isa": record["limits"]["isa"],
        "n_threads": record["settings"]["n_threads"],
        "n_batch": record["settings"]["n_batch"],
    }
    return [{**about, **result} for result in record["results"]]


def _csv(record: Json) -> str:
    """One line per result; of lists and of times by stage one cell or column for each number."""
    rows = []
    for row in _rows(record):
        stages = row.pop("stages_ms") or {}
        row |= {f"{name}_ms": stages.get(name) for name in ("weights", "attention", "append")}
        row |= {"other_ms": stages.get("other")}
        row["samples_ns"] = " ".join(map(str, row["samples_ns"]))
        rows.append(row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _markdown(record: Json) -> str:
    model, settings, limits = record["model"], record["settings"], record["limits"]
    peak, device = limits["int8_operations"], record["device"]
    lines = [
        f"{model['name']}, {model['bytes_weights'] / 1e6:.1f} MB of weights; {record['machine']};"
        f" {limits['n_threads']} threads, {limits['isa']}; {record['date']}",
        *([] if device is None else [f"on {device['name']}, {device['model']}"]),
        f"measured limits{'' if device is None else ' of the CPU'}:"
        f" {limits['read_bytes'] / 1e9:.1f} GB/s read,"
        f" {'no measure of' if peak is None else format(peak / 1e9, '.0f')} Gop/s int8",
        "; ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "",
        *_table(record["results"]),
    ]
    if any(result["filled"] for result in record["results"]):
        lines += [
            "",
            f"Depths beyond {settings['fill_from']} are filled with repeated keys and values.",
        ]
    if "ratios_by" in record:
        lines += ["", f"{settings['peer']}'s time / pykvq's (above 1: pykvq is faster):", ""]
        lines += _ratio_table(record["ratios_by"])
    if record.get("peak_resident_bytes"):
        lines += ["", f"peak resident memory: {record['peak_resident_bytes'] / 1e9:.2f} GB"]
    return "\n".join(lines) + "\n"


def _table(results: Sequence[Json]) -> list[str]:
    """The results, without columns that are empty."""
    rows = []
    for result in results:
        flat = {**result, "name": name_of(result)}
        flat |= {f"stages_ms.{k}": v for k, v in (result["stages_ms"] or {}).items()}
        rows.append(flat)
    shown = [c for c in _COLUMNS if any(row.get(c[1]) is not None for row in rows)]
    cells = [
        ["-" if row.get(key) is None else show(row[key]) for _, key, show in shown] for row in rows
    ]
    return _lay_out([heading for heading, _, _ in shown], cells, n_left=3)


def _ratio_table(ratios_by: Json) -> list[str]:
    cells = []
    depths = [str(d) for d in sorted({int(d) for d in _all_depths(ratios_by)})]
    for kv, by_cache in ratios_by.items():
        for cache, kinds in by_cache.items():
            if len(by_cache) == 2 and cache != BEST:
                continue  # the best of one type is that type
            for kind in (GENERATION, PROMPT, ATTENTION):
                if kinds[kind]:
                    found = [kinds[kind].get(depth) for depth in depths]
                    numbers = ["-" if r is None else f"{r:.2f}" for r in found]
                    against = "its best" if cache == BEST else cache
                    cells.append([kv, against, kind, *numbers])
    return _lay_out(["kv", "against", "ratio of", *(f"d{d}" for d in depths)], cells, n_left=3)


def _all_depths(ratios_by: Json) -> list[str]:
    return [
        depth
        for by_cache in ratios_by.values()
        for kinds in by_cache.values()
        for depths in kinds.values()
        for depth in depths
    ]


def _lay_out(headings: Sequence[str], rows: Sequence[Sequence[str]], n_left: int) -> list[str]:
    """A table of Markdown whose columns line up; the first n_left are flush left."""
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]

    def row_of(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < n_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width + 2) if i < n_left else "-" * (width + 1) + ":"
        for i, width in enumerate(widths)
    ]
    return [row_of(headings), f"|{'|'.join(rule)}|", *map(row_of, rows)]
