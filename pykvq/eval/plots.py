"""The plots of an evaluation, from the data of its record; they need matplotlib.

`kl.png`: mean KL against effective bits, a point per scheme. `needle.png` and `retrieval.png`: a
heat map of length and depth per scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pykvq.errors import KvqError

if TYPE_CHECKING:
    from pykvq.eval.record import Json

#: Below this a mean KL is noise of float32, and a logarithmic axis would only show that.
_LEAST_KL = 1e-6
#: Bits per element that the axis names, of those that it reaches.
_BIT_TICKS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 16)
#: Columns of heat maps.
_ACROSS = 4


def require_matplotlib() -> None:
    """Requires that plots can be made.

    Raises:
        KvqError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise KvqError(
            "Plots need matplotlib, which is not installed; `pip install 'pykvq[plot]'` installs"
            " it."
        ) from error


def plot(data: Json, names: Sequence[str], folder: Path) -> list[Path]:
    """Writes the plots of the tasks that were run.

    Args:
        data: `Record.data`.
        names: Which schemes, in which order.
        folder: Where to put the files; it is made if need be.

    Returns:
        The files that were written.

    Raises:
        KvqError: matplotlib is not installed.
    """
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for task in ("kl", "needle", "retrieval"):
        shown = [name for name in names if name in data["results"].get(task, {})]
        if shown:
            drawn = draw_kl(kl_numbers(data, shown)) if task == "kl" else _recall(data, task, shown)
            path = folder / f"{task}.png"
            drawn.savefig(path, dpi=150, bbox_inches="tight")
            written.append(path)
    return written


def figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib; its size is in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))  # of no window: nothing of pyplot's state is needed


def kl_numbers(data: Json, names: Sequence[str] | None = None, model: str | None = None) -> Json:
    """What the plot of KL against bits shows of a record.

    Args:
        data: `Record.data`, with results of the task "kl".
        names: Which schemes; by default all.
        model: What to call the model; by default as it names itself.
    """
    settings, results = data["settings"], data["results"]["kl"]
    called = settings["model"]["name"] if model is None else model
    return {
        "at": settings["cache"]["at"],
        "title": f"{called} on {settings['text']['name']},"
        f" {settings['kl']['n_ctx']} tokens of context, token by token",
        "schemes": {
            name: {
                "bits": data["schemes"][name]["bits_effective_at"],
                "kld": results[name]["mean_kld"],
                "se": results[name]["se_kld"],
                "simulated": data["schemes"][name]["simulated"],
            }
            for name in (results if names is None else names)
            if results[name]["mean_kld"] >= _LEAST_KL
        },
    }


def draw_kl(numbers: Json) -> Any:
    """Mean KL against effective bits, from what `kl_numbers` gave; returns a figure."""
    from matplotlib.ticker import FixedLocator, NullLocator

    drawn = figure(9, 6)
    axes = drawn.subplots()
    for name, scheme in numbers["schemes"].items():
        bits, kld = scheme["bits"], scheme["kld"]
        color, marker = ("C1", "o") if scheme["simulated"] else ("C0", "s")
        axes.errorbar(bits, kld, yerr=scheme["se"], color=color, marker=marker, capsize=2)
        axes.annotate(name, (bits, kld), xytext=(5, 3), textcoords="offset points", fontsize=8)
    for label, color, marker in (("runs", "C0", "s"), ("simulated", "C1", "o")):
        axes.plot([], [], color=color, marker=marker, linestyle="none", label=label)
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_BIT_TICKS))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"bits per element at {numbers['at']} tokens, everything counted")
    axes.set_ylabel("mean KL(f16 || scheme), nats")
    axes.set_title(numbers["title"])
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    return drawn


def _recall(data: Json, task: str, names: Sequence[str]) -> Any:
    settings, results = data["settings"][task], data["results"][task]
    lengths, depths = settings["lengths"], settings["depths"]
    columns = min(_ACROSS, len(names))
    rows = -(-len(names) // columns)
    drawn = figure(2.6 * columns + 1, 2.4 * rows + 0.8)
    grid = drawn.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for axes, name in zip(grid.flat, names, strict=False):
        found = results[name]
        # Rows are depths from top to bottom, as a text is read.
        shares = [list(column) for column in zip(*found["rank1_grid"], strict=True)]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(f"{name}: {100 * found['found']:.0f} % found", fontsize=9)
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], fontsize=7)
        axes.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths], fontsize=7)
    for axes in list(grid.flat)[len(names) :]:
        axes.set_visible(False)
    drawn.colorbar(image, ax=grid, label="answer tokens that are the likeliest")
    model, text = data["settings"]["model"]["name"], data["settings"]["text"]["name"]
    drawn.suptitle(f"{task}: {model} on {text}, depth against length in tokens", fontsize=10)
    return drawn
