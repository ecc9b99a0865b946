"""Draws the plots of docs/images, which holds nothing else, from bench/results.

    python docs/make_plots.py [--check]

Each plot names the digest of the numbers that it shows, and the same numbers give the same bytes
under one version of matplotlib. With --check nothing is drawn, and matplotlib is not needed: a plot
that is missing, or shows other numbers than the records, or has no record, is an error.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_tables import IMAGES, RESULTS, Json, title_of

from pykvq.bench.ratios import GENERATION, PROMPT
from pykvq.eval import plots

#: The text whose records are drawn as divergence by bits.
TEXT = "wiki"

ENGINE_STYLES = {"pykvq": ("-", "o"), "llama.cpp": ("--", "s")}


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        path: Its file.
        numbers: What it shows.
        draw: Draws that; returns a figure of matplotlib.
    """

    path: Path
    numbers: Json
    draw: Callable[[Json], Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the numbers."""
        text = json.dumps(self.numbers, sort_keys=True)
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def is_current(self) -> bool:
        """Whether the file shows these numbers."""
        return self.path.exists() and self.digest in self.path.read_text(encoding="utf-8")


def wanted(results: Path, images: Path) -> list[Plot]:
    """The plots of the records in a folder, for another one."""
    speed = [
        Plot(images / f"{path.stem}.svg", speed_numbers(json.loads(path.read_text())), draw_speed)
        for path in sorted(results.glob("speed-*.json"))
    ]
    divergence = []
    for path in sorted(results.glob(f"eval-*-{TEXT}.json")):
        if not path.name.startswith("eval-own-"):
            name = path.stem.removeprefix("eval-").removesuffix(f"-{TEXT}")
            data = json.loads(path.read_text())
            model = data["settings"]["model"]
            numbers = plots.kl_numbers(data, model=title_of(model["file"], model["name"]))
            divergence.append(Plot(images / f"kl-by-bits-{name}.svg", numbers, plots.draw_kl))
    return [*speed, *divergence]


# ---- speed by depth -------------------------------------------------------------------------


def speed_numbers(data: Json) -> Json:
    """What a plot shows of a record: ms per token by test, engine with cache, and depth."""
    lanes: dict[str, list[Json]] = {}
    for result in data["results"]:
        lane = {key: result[key] for key in ("engine", "setting")}
        of_test = lanes.setdefault(result["test"], [])
        if not any(lane.items() <= other.items() for other in of_test):
            of_test.append({**lane, "points": []})
        (found,) = (other for other in of_test if lane.items() <= other.items())
        found["points"].append([result["depth"], result["ms_per_token"]])
    return {
        "title": title_of(data["model"]["file"], data["model"]["name"]),
        "machine": data["machine"],
        "n_threads": data["limits"]["n_threads"],
        "n_prompt": data["settings"]["n_prompt"],
        "lanes": lanes,
    }


def draw_speed(numbers: Json) -> Any:
    """Generation, and prompts where they were timed: ms per token by depth."""
    from matplotlib.ticker import LogLocator, NullLocator

    titles = {GENERATION: "generation", PROMPT: f"prompt of {numbers['n_prompt']} tokens"}
    shown = [test for test in titles if test in numbers["lanes"]]
    figure = plots.figure(5.5 * len(shown), 4.2)
    for axes, test in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        colors: dict[str, int] = {}
        for lane in numbers["lanes"][test]:
            line, marker = ENGINE_STYLES[lane["engine"]]
            # Of one engine lighter and lighter, so that engines are told apart at a glance.
            n = colors[lane["engine"]] = colors.get(lane["engine"], -1) + 1
            family = (0.55, 0.25, 0.05) if lane["engine"] == "llama.cpp" else (0.05, 0.3, 0.6)
            color = tuple(channel + (1 - channel) * 0.28 * n for channel in family)
            depths, ms = zip(*lane["points"], strict=True)
            label = f"{lane['engine']} {lane['setting']}"
            axes.plot(depths, ms, line, marker=marker, color=color, markersize=4, label=label)
        deep = [depth for lane in numbers["lanes"][test] for depth, _ in lane["points"] if depth]
        if deep:
            axes.set_xscale("symlog", base=2, linthresh=min(deep))
            ticks = sorted({0, *deep})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.tick_params(labelsize=8)
        axes.set_xlabel("tokens in the cache")
        axes.set_ylabel("ms per token")
        axes.set_title(titles[test], fontsize=10)
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize=8)
    figure.suptitle(
        f"{numbers['title']}: {numbers['machine']}, {numbers['n_threads']} threads", fontsize=11
    )
    figure.tight_layout()
    return figure


# ---- files ----------------------------------------------------------------------------------


def write(plot: Plot) -> None:
    """Draws a plot to its file."""
    import matplotlib

    style = {"svg.hashsalt": plot.path.stem, "svg.fonttype": "none"}
    about = {"Date": None, "Creator": None, "Description": f"numbers shown: {plot.digest}"}
    with matplotlib.rc_context(style):
        plot.draw(plot.numbers).savefig(plot.path, metadata=about, bbox_inches="tight")


def faults(expected: list[Plot], images: Path) -> list[str]:
    """What is wrong with the files of a folder."""
    extra = set(images.glob("*.svg")) - {plot.path for plot in expected}
    stale = [plot.path.name for plot in expected if not plot.is_current()]
    return [
        *(f"{name} is missing or out of date" for name in stale),
        *(f"{path.name} has no record" for path in sorted(extra)),
    ]


def main() -> int:
    """Draws the plots, or checks them."""
    expected = wanted(RESULTS, IMAGES)
    if "--check" in sys.argv:
        found = faults(expected, IMAGES)
        if found:
            print(f"{'; '.join(found)}: run `make plots`.", file=sys.stderr)
        return len(found)
    plots.require_matplotlib()
    IMAGES.mkdir(exist_ok=True)
    for path in IMAGES.glob("*.svg"):
        path.unlink()
    for plot in expected:
        write(plot)
        print(plot.path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
