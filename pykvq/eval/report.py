"""The tables of an evaluation, for people, from the data of its record.

A value that was not measured is a dash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from pykvq.eval.record import Json

_Show = Callable[[Any], str]


def _fixed(digits: int) -> _Show:
    return lambda value: f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _nats(value: float) -> str:
    """About three significant digits; what is too small for that by its power of ten."""
    if 0 < abs(value) < 5e-4:
        return f"{value:.0e}"
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}"


def _megabytes(value: int) -> str:
    return f"{value / 1e6:.1f}"


def _thirds(show: _Show) -> _Show:
    return lambda values: " ".join((show(values[0]), "..", show(values[-1])))


#: How much of what is scored has read sealed blocks: where little has, little can be lost.
_SEALED = ("sealed read %", "sealed", _percent)

#: Columns of a task's table: heading, key in the summary, how to show it.
_COLUMNS: Mapping[str, Sequence[tuple[str, str, _Show]]] = {
    "kl": (
        ("ppl", "ppl", _fixed(3)),
        ("mean KL", "mean_kld", _nats),
        ("+-", "se_kld", _nats),
        ("median", "median_kld", _nats),
        ("99 %", "p99_kld", _nats),
        ("99.9 %", "p999_kld", _nats),
        ("top-1 %", "top1", _percent),
        ("RMS dp %", "rms_dp", _percent),
        _SEALED,
    ),
    "generation": (
        ("KL along f16's text", "mean_kld", _nats),
        ("first .. last third", "kld_thirds", _thirds(_nats)),
        ("top-1 %", "top1", _percent),
        ("first .. last third", "top1_thirds", _thirds(_percent)),
        ("own text differs from", "first_divergence", _fixed(0)),
        ("equal %", "equal", _percent),
        ("different runs %", "distinct", _percent),
        _SEALED,
    ),
    "needle": (
        ("found %", "found", _percent),
        ("tokens first %", "rank1", _percent),
        ("log p per token", "logprob", _fixed(3)),
        _SEALED,
    ),
}
_SAME = {"chunked": "kl", "retrieval": "needle"}

_TITLES = {
    "kl": "token by token, {n_ctx} tokens of context, {chunks} chunks",
    "chunked": "prompts in passes of {n_batch}, {n_ctx} tokens of context, {chunks} chunks",
    "generation": "{n_tokens} tokens after each of {prompts} prompts of {n_prompt} tokens",
    "needle": "{lengths} tokens, depths {depths} %, {trials} prompts of each",
    "retrieval": "{lengths} tokens, depths {depths} %, {trials} prompts of each length",
}


def tables(data: Json, names: Sequence[str]) -> list[tuple[str, Table]]:
    """The tables: what schemes store, then one table per task that was run.

    Args:
        data: `Record.data`.
        names: Which schemes, in which order.

    Returns:
        Each with the line that says what it shows.
    """
    return [_schemes(data, names)] + [
        _task(data, task, names) for task in _TITLES if task in data["results"]
    ]


def _table(columns: Iterable[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("scheme", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _schemes(data: Json, names: Sequence[str]) -> tuple[str, Table]:
    cache = data["settings"]["cache"]
    at = f"at {cache['at']}"
    table = _table(
        ("K", "V", "mean", f"at {cache['n_ctx']}", at, f"MB {at}", "sinks + window", "runs")
    )
    for name in names:
        s = data["schemes"][name]
        bits = ("bits_k", "bits_v", "bits_sealed", "bits_effective", "bits_effective_at")
        kind = "simulated" if s["simulated"] else "yes"
        cells = [f"{s[key]:.3f}" for key in bits] + [_megabytes(s["bytes_at"])]
        table.add_row(name, *cells, f"{s['sinks']} + {s['window']}", kind)
    return "bits per element: of sealed blocks; with sinks, window and tables", table


def _task(data: Json, task: str, names: Sequence[str]) -> tuple[str, Table]:
    settings = {
        key: ", ".join(f"{x:g}" for x in value) if isinstance(value, list) else value
        for key, value in data["settings"][task].items()
    }
    columns = _COLUMNS[_SAME.get(task, task)]
    table = _table([head for head, _, _ in columns])
    for name in names:
        found = data["results"][task].get(name, {})
        table.add_row(name, *(_cell(found.get(key), show) for _, key, show in columns))
    return f"{task}: {_TITLES[task].format(**settings)}", table


def _cell(value: Any, show: _Show) -> str:
    return "-" if value is None else show(value)


def line(task: str, scheme: str, summary: Json) -> str:
    """One line that says what a task found about a scheme."""
    columns = _COLUMNS[_SAME.get(task, task)]
    cells = (f"{head} {_cell(summary.get(key), show)}" for head, key, show in columns)
    return f"{task}, {scheme}: {', '.join(cells)}"
