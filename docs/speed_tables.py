"""The generated tables of speed, from the records that the scripts of bench/ keep.

`docs/make_tables.py` puts them into pages. A record is a JSON file of bench/results: speed-*,
contention-*, startup-* and fast-path-*. Every table says in words where its numbers come from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from markup import link_to, table

from pykvq.bench.ratios import ATTENTION, BEST, GENERATION, PROMPT

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
IMAGES = ROOT / "docs" / "images"

Json = dict[str, Any]

#: What the kinds of ratios are called.
KINDS: Mapping[str, str] = {
    GENERATION: "generation",
    ATTENTION: "what the depth adds to it",
    PROMPT: "prompt",
}


def records(kind: str) -> list[tuple[Path, Json]]:
    """Path and data of the records of a kind, by the size of their models."""
    found = [(path, json.loads(path.read_text())) for path in RESULTS.glob(f"{kind}-*.json")]
    return sorted(found, key=lambda item: (_model_bytes(item[1]), item[0].name))


def _model_bytes(data: Json) -> int:
    model = data["model"]
    return int(model["bytes_weights"] if isinstance(model, dict) else data["bytes_model"])


def title_of(file: str, name: str) -> str:
    """What a model is called: by the catalogue if its file is there, else as it names itself."""
    for path in (ROOT / "models").glob("*.json"):
        card = json.loads(path.read_text())
        if card["file"] == file:
            return f"{card['title']} {card['quantization']}"
    return name


def _record(path: Path, page: Path) -> str:
    return f"([record]({link_to(path, page)}))"


def _missing(command: str) -> str:
    return f"No measurement is kept: `{command}`, then `make tables plots`."


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


# ---- speed by depth -------------------------------------------------------------------------


def by_machine(kind: str) -> list[tuple[str, list[tuple[Path, Json]]]]:
    """The records of a kind by machine, the machine that was measured last first."""
    machines: dict[str, list[tuple[Path, Json]]] = {}
    for path, data in records(kind):
        machines.setdefault(data["machine"], []).append((path, data))
    return sorted(
        machines.items(), key=lambda item: max(data["date"] for _, data in item[1]), reverse=True
    )


def speed(page: Path) -> str:
    """All that bench/results/speed-*.json say, by machine and model, with a plot of each."""
    parts = []
    for machine, found in by_machine("speed"):
        parts.append(f"### {machine}")
        for path, data in found:
            parts += _speed_of(path, data, page)
    return "\n\n".join(parts) or _missing("make speed")


def _speed_of(path: Path, data: Json, page: Path) -> list[str]:
    plot = IMAGES / f"{path.stem}.svg"
    title = title_of(data["model"]["file"], data["model"]["name"])
    return [
        f"#### {title}{'' if 'ratios' in data else ', alone'}",
        _about_speed(path, data, page),
        f"![Milliseconds per token by depth of {title}]({link_to(plot, page)})",
        _generation(data),
        *_prompts(data),
        *_ratios(data),
        _costs(data),
    ]


def _about_speed(path: Path, data: Json, page: Path) -> str:
    model, settings, limits = data["model"], data["settings"], data["limits"]
    versions = data["versions"]
    peak = limits["int8_operations"]
    generated = f", {settings['n_gen']} tokens generated each" if settings["n_gen"] else ""
    about = [
        f"{model['bytes_weights'] / 1e6:.0f} MB of weights; {data['machine']},"
        f" {limits['n_threads']} threads, {limits['isa']}; it reads"
        f" {limits['read_bytes'] / 1e9:.1f} GB/s and does"
        f" {_shown(peak and peak / 1e9, '.0f')} Gop/s in int8. Medians of"
        f" {settings['repetitions']}{generated}; {data['date']},"
        f" load before {_shown(data['load_before'], '.1f')}; `{data['command']}`"
        f" {_record(path, page)}."
    ]
    if any(result["filled"] for result in data["results"]):
        about.append(
            f"Depths beyond {settings['fill_from']} are filled by repeated keys and values."
        )
    if settings["peer"]:
        python, build = versions["llama-cpp-python"], versions["llama.cpp"]
        about.append(f"llama-cpp-python {python} (`{build}`).")
    if data.get("peak_resident_bytes"):
        about.append(f"Peak resident memory {data['peak_resident_bytes'] / 1e9:.2f} GB.")
    return " ".join(about)


def _depths(results: Iterable[Json]) -> list[int]:
    return sorted({result["depth"] for result in results})


def _by_lane(data: Json, test: str) -> tuple[list[int], dict[str, dict[int, Json]]]:
    """The depths of a test, and its results by engine with cache, and depth."""
    results = [result for result in data["results"] if result["test"] == test]
    lanes: dict[str, dict[int, Json]] = {}
    for result in results:
        lane = f"{result['engine']} `{result['setting']}`"
        lanes.setdefault(lane, {})[result["depth"]] = result
    return _depths(results), lanes


def _generation(data: Json) -> str:
    depths, lanes = _by_lane(data, GENERATION)
    rows = [
        [lane, *(f"{at[d]['ms_per_token']:.2f} ({_rate(at[d])})" for d in depths)]
        for lane, at in lanes.items()
    ]
    head = ["generation, ms per token (tokens/s)", *(f"depth {d}" for d in depths)]
    return table(head, rows)


def _rate(result: Json) -> str:
    rate = result["tokens_per_second"]
    return f"{rate:.{0 if rate >= 100 else 1 if rate >= 10 else 2}f}"


def _prompts(data: Json) -> list[str]:
    depths, lanes = _by_lane(data, PROMPT)
    if not lanes:
        return []
    n = data["settings"]["n_prompt"]
    rows = [[lane, *(_rate(at[d]) for d in depths)] for lane, at in lanes.items()]
    return [table([f"prompt of {n}, tokens/s", *(f"depth {d}" for d in depths)], rows)]


def _ratios(data: Json) -> list[str]:
    """Of the first scheme against every cache of llama.cpp, of others against their like."""
    if "ratios_by" not in data:
        return []
    depths = _depths(data["results"])
    first = next(iter(data["ratios_by"]))
    rows = []
    for kv, by_cache in data["ratios_by"].items():
        like = [kv] if kv in by_cache else [BEST]
        for cache in by_cache if kv == first else like:
            for kind, name in KINDS.items():
                if by_cache[cache][kind]:
                    against = "its best" if cache == BEST else f"`{cache}`"
                    found = [by_cache[cache][kind].get(str(d)) for d in depths]
                    rows.append([f"`{kv}`", against, name, *(_shown(r, ".2f") for r in found)])
    head = ["times as fast as llama.cpp", "against", "in", *(f"depth {d}" for d in depths)]
    return [table(head, rows)]


def _costs(data: Json) -> str:
    """What a token generated by pykvq reads, and how near that is to what the machine can do."""
    rows = [
        [
            f"`{r['setting']}`",
            str(r["depth"]),
            f"{r['stages_ms']['weights']:.2f}",
            f"{r['stages_ms']['attention']:.2f}",
            f"{r['stages_ms']['append']:.3f}",
            f"{r['weight_bytes'] / 1e6:.0f}",
            f"{r['kv_bytes'] / 1e6:.2f}",
            f"{r['gb_per_second']:.1f}",
            f"{100 * r['share_of_limit']:.0f} %",
            _shown(r["attention_share_of_limit"], ".0%").replace("%", " %"),
        ]
        for r in data["results"]
        if r["engine"] == "pykvq" and r["test"] == GENERATION
    ]
    head = (
        "a token of pykvq|depth|ms in weights|ms in attention|ms storing and sealing|MB of weights|"
        "MB of cache|GB/s|of the limit|attention, of its limit"
    )
    return table(head.split("|"), rows)


def prompts(page: Path) -> str:
    """Long prompts, from bench/results/prompt-*.json."""
    parts = []
    for path, data in records("prompt"):
        title = title_of(data["model"]["file"], data["model"]["name"])
        parts += [f"**{title}**, {_about_speed(path, data, page)}", *_prompts(data), *_ratios(data)]
    return "\n\n".join(parts) or _missing("make speed")


def speed_short(page: Path) -> str:
    """Prompt, generation at depth 0 and at the deepest, beside llama.cpp's best, per model.

    Of each model the record that was made last.
    """
    latest: dict[str, tuple[Path, Json]] = {}
    for path, data in sorted(records("speed"), key=lambda item: str(item[1]["date"])):
        if "ratios" in data:
            latest[title_of(data["model"]["file"], data["model"]["name"])] = path, data
    rows, about = [], []
    for title, (path, data) in sorted(latest.items(), key=lambda item: _model_bytes(item[1][1])):
        settings = data["settings"]
        rows += _short_rows(data, title)
        about.append(
            f"`{data['command']}`: medians of {settings['repetitions']}, {data['date']},"
            f" {data['machine']}, {data['limits']['n_threads']} threads,"
            f" {data['limits']['isa']} {_record(path, page)}."
        )
    if not rows:
        return _missing("make speed")
    head = "model|test|pykvq, tokens/s|llama.cpp's best, tokens/s|times as fast"
    return "\n\n".join([table(head.split("|"), rows), "\n".join(f"- {line}" for line in about)])


def _short_rows(data: Json, title: str) -> list[list[str]]:
    kv, n_prompt = data["settings"]["kv"][0], data["settings"]["n_prompt"]
    prompts, depths = (_by_lane(data, test)[0] for test in (PROMPT, GENERATION))
    tests = [(PROMPT, d, f"prompt of {n_prompt}") for d in prompts[:1]]
    tests += [(GENERATION, d, f"generation at depth {d}") for d in (*depths[:1], *depths[-1:])]
    rows = []
    for test, depth, name in dict.fromkeys(tests):
        _, lanes = _by_lane(data, test)
        best = data["peer_best"][test][str(depth)]
        ours = lanes[f"pykvq `{kv}`"][depth]
        theirs = lanes[f"{data['settings']['peer']} `{best}`"][depth]
        ratio = data["ratios"][test][str(depth)]
        cells = [f"{_rate(ours)} (`{kv}`)", f"{_rate(theirs)} (`{best}`)", _shown(ratio, ".2f")]
        rows.append([title, name, *cells])
    return rows


# ---- beside others, start-up, accuracy ------------------------------------------------------


def contention(page: Path) -> str:
    """Steps beside a busy process and with many threads, from bench/results/contention-*.json."""
    parts = []
    for path, data in records("contention"):
        rows = [
            [
                f"{r['n_threads']}{' beside one busy process' if r['busy'] else ''}",
                str(r["processors"]),
                *(f"{r[key]:.2f}" for key in ("ms", "ms_mean", "ms_p90", "ratio")),
            ]
            for r in data["results"]
        ]
        about = (
            f"**{title_of(data['file'], data['model'])}**, `{data['kv']}`, at {data['depth']}"
            f" tokens; {data['samples']} steps of each; {data['machine']}, of which"
            f" {data['processors']} may be used; {data['date']}, load before"
            f" {_shown(data['load_before'], '.1f')}; `{data['command']}` {_record(path, page)}."
        )
        head = "threads|processors|ms, median|mean|90 %|median, of that of a thread on each, alone"
        parts += [about, table(head.split("|"), rows)]
    return "\n\n".join(parts) or _missing("python bench/contention.py smollm2")


def startup(page: Path) -> str:
    """A new process up to its first token, from bench/results/startup-*.json."""
    rows, about = [], []
    for path, data in records("startup"):
        title = title_of(data["file"], data["model"])
        megabytes = [data[key] / 1e6 for key in ("bytes_peak", "bytes_model", "bytes_kv")]
        rows.append(
            [
                title,
                data["machine"],
                f"{data['n_prompt']}",
                f"{data['seconds']:.2f}",
                f"{data['seconds_python']:.2f}",
                *(f"{value:.1f}" for value in (*megabytes, data["bytes_beyond"] / 1e6)),
            ]
        )
        about.append(
            f"- {title}: median of {len(data['samples_seconds'])}, `{data['kv']}`,"
            f" {data['n_threads']} threads, {data['machine']}, {data['date']}, load before"
            f" {_shown(data['load_before'], '.1f')}; `{data['command']}` {_record(path, page)}."
        )
    head = (
        "model|machine|tokens of prompt|s|of them bare Python|MB at most|model file|KV cache|"
        "beyond both"
    )
    if not rows:
        return _missing("python bench/startup.py smollm2")
    return "\n\n".join([table(head.split("|"), rows), "\n".join(about)])


def fast_path(page: Path) -> str:
    """How far the kernels are from the reference, from bench/results/fast-path-*.json."""
    rows, about = [], []
    for path, data in records("fast-path"):
        title = title_of(data["file"], data["model"])
        rows += [
            [
                title,
                f"`{kv}`",
                str(found["tokens_sealed"]),
                f"{found['same_blocks']['mean_kl']:.1e}",
                f"{found['own_blocks']['mean_kl']:.1e}",
                f"{found['own_blocks']['max_kl']:.1e}",
                f"{100 * found['own_blocks']['top1']:.1f} %",
                f"{100 * found['own_blocks']['other_bytes']:.1f} %",
            ]
            for kv, found in data["results"].items()
        ]
        about.append(
            f"- {title}: the last {data['scored']} of {data['tokens']} tokens of {data['text']},"
            f" window {data['window']}, {data['isa']}, {data['machine']}, {data['date']};"
            f" `{data['command']}` {_record(path, page)}."
        )
    head = (
        "model|cache|sealed tokens|mean KL, same blocks|mean KL, own blocks|its largest|"
        "its same top-1|bytes of blocks that are others"
    )
    if not rows:
        return _missing("python bench/fast_path.py smollm2")
    return "\n\n".join([table(head.split("|"), rows), "\n".join(about)])


#: Makers of the generated parts, by their names in the pages.
MAKERS: Mapping[str, Callable[[Path], str]] = {
    "speed": speed,
    "speed-short": speed_short,
    "prompts": prompts,
    "contention": contention,
    "startup": startup,
    "fast-path": fast_path,
}
