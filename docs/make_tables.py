"""Writes the generated tables of README.md and docs/ from the core and from bench/results.

    python docs/make_tables.py [--check]

A table stands between `<!-- NAME:begin ... -->` and `<!-- NAME:end -->`. With --check nothing is
written, and a table that is not what it should be is an error: the tests call it so.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_tables
import speed_tables
from markup import link_to, table

import pykvq
from pykvq.eval.simulations import SIMULATIONS

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "docs/cuda.md",
    "docs/kv-schemes.md",
    "docs/schemes/auto.md",
    "docs/schemes/rivals.md",
    "docs/schemes/skvq.md",
    "docs/schemes/svdq.md",
    "docs/speed.md",
)
RESULTS = ROOT / "bench" / "results"

#: The schemes that README.md shows, beside every budget of `auto`.
CHOSEN = (
    "f16",
    "q8_0",
    "hadamard-q4_0",
    "q4_0",
    "kivi-2",
    "turboquant-2.5",
    "oscar-2",
    "skvq-paper",
    "skvq",
)

#: What the source of a scheme says of it: on other models and tasks, by its own count of bits.
CLAIMS: Mapping[str, str] = {
    "skvq": "needles at 32k as f16, Llama-2-7B-80k, K2 V1.5 (2405.06219)",
    "skvq-paper": "needles at 32k as f16, Llama-2-7B-80k, K2 V1.5 (2405.06219)",
    "skvq-paper-k2v2": "LongBench less than 5 % below f16 (2405.06219)",
    "nqkv": "zero-shot accuracy 0.7 % lower, OPT-1.3B (2505.16210)",
    "nqkv-paper": "zero-shot accuracy 0.7 % lower, OPT-1.3B (2505.16210)",
    "svdq-1.25": "LongBench nearly lossless at 1.25 bits per key element (2502.15304)",
    "svdq-paper-1.25": "LongBench nearly lossless at 1.25 bits per key element (2502.15304)",
    "svdq-paper-2": "at most about 0.1 of the error of quantizing channels (2502.15304)",
    "asymkv": "16/0: CoQA 58.1, f16 63.9, Llama-2-7B (2410.13212)",
    "asymkv-paper-L/0": "TriviaQA 85.3, f16 87.7; RepoBench-P 43.4, f16 59.8 (2410.13212)",
    "asymkv-paper-L/2/0": "CoQA 58.1, f16 63.9, Llama-2-7B (2410.13212)",
    "kivi-2": "LongBench 42.4, f16 43.5, Mistral-7B-Instruct-v0.2 (jy-yuan/KIVI)",
    "hadamard-q4_0": "perplexity 7.383, f16 7.226, Qwen3-8B-Base (ik_llama.cpp#1509)",
    "turboquant-2.5": "LongBench 49.4, f16 50.1, Llama-3.1-8B (2504.19874)",
    "turboquant-3.5": "LongBench as f16, Llama-3.1-8B (2504.19874)",
    "oscar-2": "mean of 5 reasoning tasks 69.4, f16 70.8, Qwen3-8B (FutureMLS-Lab/OSCAR)",
    "oscar-norm": "LongBench-E 41.8, f16 41.7, Llama-3.1-8B (2605.19660)",
}

Json = dict[str, Any]


# ---- what schemes are -----------------------------------------------------------------------


def schemes() -> str:
    """What each scheme is, from the core's table, at the two usual widths of a head."""
    narrow, wide = pykvq.schemes(64), pykvq.schemes(128)
    rows = [
        [
            f"`{n.name}`",
            f"{n.codec_k} {n.bits_k:.2f} / {w.bits_k:.2f}",
            f"{n.codec_v} {n.bits_v:.2f} / {w.bits_v:.2f}",
            f"{(n.bits_k + n.bits_v) / 2:.2f} / {(w.bits_k + w.bits_v) / 2:.2f}",
            f"{n.sinks} + {n.window}",
            n.summary,
        ]
        for n, w in zip(narrow, wide, strict=True)
    ]
    head = "scheme|keys, bits at width 64 / 128|values|mean|sinks + window|what it is"
    return table(head.split("|"), rows)


def simulations() -> str:
    """What each simulated scheme is; those without the key bias are named at their originals."""
    rows = [
        [
            f"`{s.name}`" + (", `-nobias`" if f"{s.name}-nobias" in SIMULATIONS else ""),
            s.summary,
            f"{s.sinks} + {s.window}",
            "yes" if s.needs_moments else "no",
            s.source,
        ]
        for s in SIMULATIONS.values()
        if not s.name.endswith("-nobias")
    ]
    head = "scheme|what it is|its own sinks + window|calibrated|source"
    return table(head.split("|"), rows)


# ---- what they cost in quality --------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What the record of one model and text says of one scheme.

    Attributes:
        name: The scheme, with its budget of bits if it was given one.
        facts: What it stores.
        found: Summaries by task; a task that was not run on it is missing.
        own: The same with the sinks and the window of its own paper or project.
        own_setting: These: "sinks + window"; empty if that was not measured.
    """

    name: str
    facts: Json
    found: Mapping[str, Json]
    own: Mapping[str, Json]
    own_setting: str


@dataclass(frozen=True)
class Column:
    """A column of a table of results; one that has nothing to show of any scheme is left out.

    Attributes:
        head: Its heading; {at} stands for the context that bits are stated at.
        cell: What it shows of a scheme; a KeyError stands for what was not measured.
    """

    head: str
    cell: Callable[[Measured], str]


def _divergence_of(kl: Json) -> str:
    error = "" if kl["se_kld"] is None else f" ({kl['se_kld']:.4f})"
    return f"{kl['mean_kld']:.4f}{error}"


CACHE = Column("cache", lambda m: f"`{m.name}`")
KIND = Column("", lambda m: "simulated" if m.facts["simulated"] else "runs")
BITS = Column("bits", lambda m: f"{m.facts['bits_sealed']:.2f}")
SIDES = Column(
    "bits K / V / mean",
    lambda m: " / ".join(f"{m.facts[key]:.2f}" for key in ("bits_k", "bits_v", "bits_sealed")),
)
BITS_AT = Column("bits at {at}", lambda m: f"{m.facts['bits_effective_at']:.2f}")
BYTES_AT = Column("MB at {at}", lambda m: f"{m.facts['bytes_at'] / 1e6:.0f}")
PERPLEXITY = Column("perplexity", lambda m: f"{m.found['kl']['ppl']:.3f}")
MEAN_KL = Column("mean KL (s.e.)", lambda m: _divergence_of(m.found["kl"]))
MEDIAN_KL = Column("median", lambda m: f"{m.found['kl']['median_kld']:.4f}")
P99_KL = Column("99 %", lambda m: f"{m.found['kl']['p99_kld']:.3f}")
TOP1 = Column("same top-1", lambda m: f"{100 * m.found['kl']['top1']:.1f} %")
OWN_KL = Column(
    "mean KL (s.e.) with its own sinks + window",
    lambda m: f"{_divergence_of(m.own['kl'])}, {m.own_setting}",
)
NEEDLE = Column("needles", lambda m: f"{100 * m.found['needle']['found']:.0f} %")
CLAIM = Column("what its source claims", lambda m: CLAIMS.get(m.name, ""))

LONG = (
    CACHE,
    KIND,
    SIDES,
    BITS_AT,
    BYTES_AT,
    PERPLEXITY,
    MEAN_KL,
    MEDIAN_KL,
    P99_KL,
    TOP1,
    OWN_KL,
    NEEDLE,
    CLAIM,
)
SHORT = (CACHE, KIND, BITS, BITS_AT, BYTES_AT, PERPLEXITY, MEAN_KL, TOP1, NEEDLE)


def models() -> Iterator[tuple[str, str]]:
    """Titles of the models of the catalogue, and what their results' files call them."""
    for path in sorted((ROOT / "models").glob("*.json")):
        card = json.loads(path.read_text())
        yield f"{card['title']} {card['quantization']}", path.stem


def records() -> Iterator[tuple[str, Path, Json]]:
    """The title of the model, path and data of each record of a model of the catalogue.

    Records in which no task is finished with any scheme are left out.
    """
    for title, stem in models():
        for path in sorted(RESULTS.glob(f"eval-{stem}-*.json")):
            data = json.loads(path.read_text())
            if any(data["results"].values()):
                yield title, path, data


def own_record(path: Path) -> tuple[Path, Json]:
    """Path and data of the record with each scheme's own sinks and window; empty if there is none.

    Args:
        path: The record with the same for all, of the same model and text.
    """
    own = path.with_name(path.name.replace("eval-", "eval-own-", 1))
    return own, json.loads(own.read_text()) if own.exists() else {"schemes": {}, "results": {}}


def results_of(data: Json, own: Json) -> list[Measured]:
    """The schemes that have results in a record, by falling bits of what they seal.

    Args:
        data: The record.
        own: That with each scheme's own sinks and window.
    """

    def found_in(record: Json, name: str) -> dict[str, Json]:
        return {task: found[name] for task, found in record["results"].items() if name in found}

    def setting(name: str) -> str:
        facts = own["schemes"].get(name)
        return f"{facts['sinks']} + {facts['window']}" if facts else ""

    names = dict.fromkeys(name for found in data["results"].values() for name in found)
    schemes = [
        Measured(
            name, data["schemes"][name], found_in(data, name), found_in(own, name), setting(name)
        )
        for name in names
    ]
    return sorted(schemes, key=lambda m: -m.facts["bits_sealed"])


def measured(columns: Sequence[Column], wanted: Callable[[str], bool], page: Path) -> str:
    """Bits, perplexity and divergence per model, text and scheme, from bench/results/eval-*.json.

    Args:
        columns: What to show.
        wanted: Whether to show the scheme of a name.
        page: The page, for links from it.
    """
    parts = []
    for title, path, data in records():
        own_path, own = own_record(path)
        shown = [m for m in results_of(data, own) if wanted(m.name)]
        if not shown:
            continue
        used = [column for column in columns if any(_cell(column, m) != "-" for m in shown)]
        at = _tokens(data["settings"]["cache"]["at"])
        head = [column.head.format(at=at) for column in used]
        rows = [[_cell(column, m) for column in used] for m in shown]
        about = f"**{title}** on {data['settings']['text']['name']}:"
        about += _provenance(data, [m.found for m in shown], path, page)
        if OWN_KL in used:
            about += " With its own sinks + window:"
            about += _provenance(own, [m.own for m in shown], own_path, page)
        parts.append(f"{about}\n\n{table(head, rows)}")
    return "\n\n".join(parts) or "No measurement is finished: `make quality`, then `make tables`."


def _cell(column: Column, m: Measured) -> str:
    try:
        return column.cell(m)
    except KeyError:
        return "-"


def _provenance(data: Json, found: Sequence[Mapping[str, Json]], path: Path, page: Path) -> str:
    """How much was read, when and where, and the record; summaries of schemes are by task."""
    runs, summaries = data["runs"], [s for by_task in found for s in by_task.values()]
    done = [runs[run] for summary in summaries for run in summary["runs"]]
    dates = sorted({run["date"] for run in done})
    machines = sorted({run["machine"] for run in done})
    scored = [by_task["kl"]["tokens"] for by_task in found if "kl" in by_task]
    kl = data["settings"].get("kl", {})
    about = f" {kl['chunks']} chunks of {kl['n_ctx']} tokens, {scored[0]} scored;" if scored else ""
    link = link_to(path, page)
    return f"{about} {' and '.join(dates)}, {'; '.join(machines)} ([record]({link}))."


def kernels() -> str:
    """What the kernels of each codec take, from bench/results/kernels-*.json."""
    parts = []
    for path in sorted(RESULTS.glob("kernels-*.json")):
        data = json.loads(path.read_text())
        few, many = data["queries"].index(1), data["queries"].index(4)
        rows = [
            [
                f"`{c['codec']}`",
                str(c["d"]),
                f"{c['bits']:.2f}",
                *(
                    cell
                    for side in ("score", "accum")
                    for cell in (
                        _of_queries(c[side], few, many, "{:.1f}"),
                        _of_memory(c, side, "gb_per_s", few, many, "{:.1f}"),
                        _of_memory(c, side, "share_of_limit", few, many, "{:.0%}"),
                    )
                ),
                f"{c['encode']:.0f}",
            ]
            for c in data["codecs"]
        ]
        head = (
            "codec|width|bits|scores, in cache|from memory, GB/s|of the limit"
            "|sums, in cache|from memory, GB/s|of the limit|encoding"
        )
        limits = data["limits"]
        told = (
            f"{data['what']}, {data['isa']}, for 1 / 4 queries. In cache: one block in the cache of"
            f" the processor. From memory: {data['mebibytes_from_memory']} MiB of blocks, held"
            f" against {limits['read_bytes'] / 1e9:.1f} GB/s and"
            f" {limits['int8_operations'] / 1e9:.0f} Gop/s in int8, measured in the same run"
            f" ({data['machine']}, {data['date']}; `{data['command']}`,"
            f" `bench/results/{path.name}`)."
        )
        parts += [told, table(head.split("|"), rows), *_skvq_shares(data, (few, many))]
    return "\n\n".join(parts) or "No measurement is kept: `make bench-kv`, then `make tables`."


def _of_queries(values: Sequence[float] | None, few: int, many: int, form: str) -> str:
    return f"{form.format(values[few])} / {form.format(values[many])}" if values else ""


def _of_memory(codec: Json, side: str, key: str, few: int, many: int, form: str) -> str:
    found = codec["from_memory"].get(side)
    return _of_queries(found and found[key], few, many, form)


def _skvq_shares(data: Json, indices: Sequence[int]) -> list[str]:
    """A table of what scores and sums of `skvq` together reach of their limit."""
    codecs = {(c["codec"], c["d"]): c for c in data["codecs"]}
    limits, rows = data["limits"], []
    for d in (64, 128):
        keys, values = codecs[("u2", d)], codecs[("c8", d)]
        reading = (keys["bits"] + values["bits"]) * d / 8 / limits["read_bytes"] * 1e9
        for i in indices:
            queries = data["queries"][i]
            computing = 4.0 * queries * d / limits["int8_operations"] * 1e9
            limit = max(reading, computing)
            cached = keys["score"][i] + values["accum"][i]
            of_keys, of_values = keys["from_memory"]["score"], values["from_memory"]["accum"]
            from_memory = of_keys["ns"][i] + of_values["ns"][i]
            rows.append(
                [
                    str(d),
                    str(queries),
                    f"{limit:.2f}",
                    "reading" if reading > computing else "computing",
                    f"{from_memory:.2f}",
                    f"{limit / from_memory:.0%}",
                    f"{computing / cached:.0%}",
                ]
            )
    head = "width|queries|limit, ns|which|from memory, ns|of the limit|in cache, of the int8 peak"
    told = f"The same of `skvq`, {data['isa']}, scores and sums together:"
    return [told, table(head.split("|"), rows)]


def topk() -> str:
    """What reading only some blocks costs and saves, from bench/results/topk-*.json."""
    parts = []
    for title, stem in models():
        path = RESULTS / f"topk-{stem}.json"
        if not path.exists():
            continue
        data = json.loads(path.read_text())
        f16 = data["bytes_f16"]
        rows = [
            [
                str(row["kv_topk"] or "all"),
                f"{row['mean_kld']:.4f}",
                f"{row['bytes_k'] / 1e6:.2f} ({f16[0] / row['bytes_k']:.1f})",
                f"{row['bytes_v'] / 1e6:.2f} ({f16[1] / row['bytes_v']:.1f})",
            ]
            for row in data["results"]
        ]
        head = "`--kv-topk`|mean KL|MB of keys read (f16 reads so many times more)|of values"
        parts.append(
            f"**{title}**, `{data['kv']}`, on {data['text']}: {data['chunks']} chunks of"
            f" {data['n_ctx']} tokens, {data['date']}, {data['machine']}; bytes are those that the"
            f" last token of a chunk reads.\n\n{table(head.split('|'), rows)}"
        )
    return "\n\n".join(parts) or "No measurement is kept: `bench/topk.py`, then `make tables`."


NO_ABLATIONS = "No measurement is kept: `python bench/ablations.py smollm2`, then `make tables`."


def ablation_records() -> dict[str, tuple[Path, Json]]:
    """Path and data of bench/results/ablations-*.json by the titles of their models."""
    paths = {title: RESULTS / f"ablations-{stem}.json" for title, stem in models()}
    return {t: (path, json.loads(path.read_text())) for t, path in paths.items() if path.exists()}


def ablations(family: str, page: Path) -> str:
    """What the parts of the keys and of the values of `skvq` or `auto` are worth."""
    found = ablation_records()
    if not found:
        return NO_ABLATIONS
    about = []
    for title, (path, data) in found.items():
        link = link_to(path, page)
        about.append(
            f"**{title}**: {data['chunks']} chunks of {data['n_ctx']} tokens of {data['text']},"
            f" {data['scored']} scored; `{data['command']}`, {data['date']}, {data['machine']}"
            f" ([record]({link}))."
        )
    parts = [" ".join(about)]
    for side in ("keys", "values"):
        # Of each variant what each model has: bits, mean KL, its standard error.
        rows: dict[str, dict[str, Json]] = {}
        for title, (_, data) in found.items():
            for row in data["results"]:
                if row["part"] == f"{family} {side}":
                    rows.setdefault(row["variant"], {})[title] = row
        head = [f"{side} alone", "bits", *(f"{title}, mean KL (s.e.)" for title in found)]
        lines = [
            [
                variant,
                ", ".join(dict.fromkeys(f"{row['bits']:.2f}" for row in of.values())),
                *(_divergence_of(of[title]) if title in of else "-" for title in found),
            ]
            for variant, of in rows.items()
        ]
        parts.append(table(head, lines))
    return "\n\n".join(parts)


def normal_errors() -> str:
    """The errors of the codecs on normal data, from one of bench/results/ablations-*.json."""
    for path, data in ablation_records().values():
        errors = data["normal_errors"]
        head = ["codec", *(f"`{name}`" for name in errors)]
        made = table(head, [["error", *(f"{error:.3g}" for error in errors.values())]])
        return f"`{data['command']}`, `bench/results/{path.name}`.\n\n{made}"
    return NO_ABLATIONS


def _tokens(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


# ---- pages ----------------------------------------------------------------------------------


def fill(text: str, page: Path) -> str:
    """The page with its tables made anew."""
    makers: Mapping[str, Callable[[], str]] = {
        "schemes": schemes,
        "simulations": simulations,
        "topk": topk,
        "normal-errors": normal_errors,
        "ablations-skvq": lambda: ablations("skvq", page),
        "ablations-auto": lambda: ablations("auto", page),
        "kernels": kernels,
        "measured": lambda: measured(LONG, lambda name: True, page),
        "measured-short": lambda: measured(
            SHORT, lambda name: name in CHOSEN or name.partition(":")[0] == "auto", page
        ),
        **{name: functools.partial(make, page) for name, make in speed_tables.MAKERS.items()},
        **{name: functools.partial(make, page) for name, make in cuda_tables.MAKERS.items()},
    }
    for name, make in makers.items():
        if _between(name).search(text):
            text = _replaced(text, name, make())
    return text


def _between(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL)


def _replaced(text: str, name: str, made: str) -> str:
    return _between(name).sub(lambda found: f"{found[1]}\n{made}\n\n{found[2]}", text)


def main() -> int:
    """Writes the pages, or checks them."""
    stale = []
    for name in PAGES:
        path = ROOT / name
        before = path.read_text()
        after = fill(before, path)
        if after != before and "--check" not in sys.argv:
            path.write_text(after)
        elif after != before:
            stale.append(name)
    if stale:
        print(f"Tables are out of date in {', '.join(stale)}: run `make tables`.", file=sys.stderr)
    return len(stale)


if __name__ == "__main__":
    sys.exit(main())
