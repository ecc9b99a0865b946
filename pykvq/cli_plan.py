"""The command `plan`: what models and KV caches take, and what fits."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pykvq import cli_options as options
from pykvq.checks import MEMORY_MOST
from pykvq.console import ProgressBar, UsageError, print_json, size, warn
from pykvq.errors import UnsupportedError

if TYPE_CHECKING:
    from pykvq.model import Model
    from pykvq.native import Scheme
    from pykvq.plan import Plan

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def memory_size(text: str) -> int:
    """A type for argparse: bytes, as 24G, 24GB (10^9 each) or 24GiB (2^30)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt])(i?)b?", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size of a memory, expected a number with a unit, as 24G or 24GiB"
        )
    units = _BINARY_UNITS if found[3] else _UNITS
    n_bytes = float(found[1]) * units[found[2].lower()]
    if not 1 <= n_bytes <= MEMORY_MOST:
        raise argparse.ArgumentTypeError(
            f"{text!r} is {n_bytes:.3g} bytes, expected 1 to {float(MEMORY_MOST):.3g}"
        )
    return int(n_bytes)


def add_place(parser: argparse.ArgumentParser) -> None:
    """Where layers would run, and how much memory there is."""
    options.add_device(
        parser,
        default="cpu",
        what="cpu, cuda or cuda:N, which need not be here; auto: as for run (default: cpu)",
    )
    parser.add_argument(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="what weights and cache may take, with --device cuda of the GPU's memory, as 24G or"
        " 24GiB (default: what is available here)",
    )


class _Row(NamedTuple):
    """A scheme as the user spells it, and its plan; or in words why it has none."""

    kv: str
    scheme: Scheme
    plan: Plan | None
    missing: str | None = None


def run(args: argparse.Namespace) -> int:
    """Shows what sessions would take, without opening any."""
    from pykvq.kv_names import parse_kv
    from pykvq.plan import open_header

    named: dict[str, tuple[Scheme, float | None]] = {}
    for name in options.comma_separated(args.kv or ""):
        options.check_scheme(name.partition(":")[0])
        with options.checked():
            named[name] = parse_kv(name)
    if args.kv is not None and not named:
        raise UsageError("--kv names no scheme, expected at least one.")
    device = options.device_options(args)
    model_name = options.model_name(args)
    assert model_name is not None  # the command has a default
    profile: str | Literal[False] | None = False if args.profile == "none" else args.profile
    with (
        ProgressBar() as progress,
        options.checked(),
        open_header(model_name, profile=profile, progress=progress) as model,
    ):
        n_ctx = options.context_size(args, model, model.info.n_ctx_train)
        rows = _plan(args, device, model, n_ctx, named)
        if args.json:
            print_json(_as_json(model_name, model, n_ctx, rows))
        else:
            _show(model_name, model, n_ctx, rows, args)
    return 0


def _plan(
    args: argparse.Namespace,
    device: dict[str, Any],
    model: Model,
    n_ctx: int,
    named: dict[str, tuple[Scheme, float | None]],
) -> list[_Row]:
    """Plans the schemes that are named, or all; an error if none of them can be planned."""
    from pykvq import native

    chosen = named or {scheme.name: (scheme, None) for scheme in model.schemes}
    given = options.session_options(args)
    kv_bits, asymkv_layers = given.pop("kv_bits"), given.pop("asymkv_layers")
    if kv_bits is not None and not any(scheme.has_budget for scheme, _ in chosen.values()):
        raise UsageError(
            f"--kv-bits is {kv_bits:g}, but the bits of {', '.join(chosen)} are fixed; choose auto"
            " for a budget."
        )
    if kv_bits is not None and all(own for scheme, own in chosen.values() if scheme.has_budget):
        raise UsageError(
            f"--kv-bits is {kv_bits:g}, but --kv names the bits already: {', '.join(chosen)}."
        )
    given.update(device)
    memory = args.memory
    if memory is None and args.device == "cpu":
        memory = native.memory_available()  # once, so that all have the same
    rows = []
    refused: list[Exception] = []
    for name, (scheme, own_bits) in chosen.items():
        if not named and scheme.profile == "needed" and model.profile_path is None:
            rows.append(_Row(name, scheme, None, "needs a profile"))
            continue
        if own_bits is None and scheme.has_budget and kv_bits is not None:
            name, own_bits = f"{name}:{kv_bits:g}", kv_bits
        try:
            plan = model.plan(
                kv=scheme.name,
                n_ctx=n_ctx,
                memory=memory,
                kv_bits=own_bits,
                asymkv_layers=asymkv_layers if scheme.has_layers else None,
                **given,
            )
            rows.append(_Row(name, scheme, plan))
        except (ValueError, UnsupportedError) as error:
            refused.append(error)
            rows.append(_Row(name, scheme, None, "not possible"))
    if len(refused) == len(rows):
        raise refused[0]
    for refusal in refused:
        warn(options.in_flags(str(refusal)))
    return rows


def _as_json(name: str, model: Model, n_ctx: int, rows: list[_Row]) -> dict[str, Any]:
    plans: list[dict[str, Any]] = []
    for row in rows:
        entry: dict[str, Any] = {"kv": row.kv, "missing": row.missing}
        if row.plan is not None:
            stats = asdict(row.plan.stats)
            entry.update(fits=row.plan.fits, longest_n_ctx=row.plan.longest)
            entry.update((key, stats[key]) for key in _STATS)
            entry["bytes_host"] = row.plan.stats.bytes_host
        plans.append(entry)
    return {
        "model": name,
        **{key: value for key, value in asdict(model.info).items() if key != "path"},
        "has_weights": model.has_weights,
        "profile": None if model.profile_path is None else str(model.profile_path),
        "n_ctx": n_ctx,
        "memory": next(row.plan.memory for row in rows if row.plan is not None),
        "plans": plans,
    }


#: What a plan's JSON has of `SessionStats`: all that does not change with use.
_STATS = (
    *("n_batch", "n_threads", "sinks", "window"),
    *("bytes_weights", "bytes_kv", "bytes_sinks", "bytes_sealed", "bytes_sealed_k"),
    *("bytes_sealed_v", "bytes_recent", "bytes_tables", "bytes_scratch", "bytes_total"),
    *("gpu", "n_gpu_layers", "gpu_head", "bytes_gpu", "bytes_gpu_weights", "bytes_gpu_rows"),
    *("bytes_gpu_sealed", "bytes_gpu_tables", "bytes_gpu_scratch", "bytes_gpu_chunk"),
    *("bytes_host_weights",),
    *("bits_sealed_k", "bits_sealed_v", "bits_full"),
)


_HEADS = ("keys", "values", "f16 rows", "tables", "scratch", "total", "bits", "fits", "longest")
_GPU_HEADS = (
    *("weights", "f16 rows", "sealed", "tables", "scratch", "GPU", "host", "-ngl"),
    *("fits", "longest"),
)


def _show(name: str, model: Model, n_ctx: int, rows: list[_Row], args: argparse.Namespace) -> None:
    about = model.info
    plans = [row.plan for row in rows if row.plan is not None]
    on_gpu = next((plan for plan in plans if plan.stats.gpu is not None), None)
    shown = on_gpu or plans[0]
    here = " available here" if args.memory is None else ""
    print(
        f"{about.name} ({name}): {about.n_layers} layers, {about.n_kv_heads} KV heads of width"
        f" {about.d_head}, trained on {about.n_ctx_train} tokens\n"
        f"weights {size(about.bytes_weights)}{'' if model.has_weights else ' (not in this file)'};"
        f" memory {size(shown.memory)}{here}; passes of {shown.stats.n_batch} tokens"
    )
    if on_gpu is not None:
        chunk = size(max(plan.stats.bytes_gpu_chunk for plan in plans))
        print(
            f"{options.gpu_note(model, on_gpu.stats)}, whose memory it is; sealed blocks come"
            f" in chunks of at most {chunk}"
        )
    print()
    most = max(plan.stats.bytes_total for plan in plans)
    unit, divisor = ("GB", 1e9) if most >= 1e10 else ("MB", 1e6)
    marked = {row.kv for row in rows if model.has_key_bias and row.scheme.key_bias_sensitive}
    labels = [f"{row.kv}{' *' if row.kv in marked else ''}" for row in rows]
    heads, cells_of = (_HEADS, _cells) if on_gpu is None else (_GPU_HEADS, _gpu_cells)
    cells = [() if row.plan is None else cells_of(row.plan, divisor) for row in rows]
    title = f"{n_ctx} tokens, {unit}"
    first = max(map(len, [title, *labels]))
    widths = [max(map(len, column)) for column in zip(heads, *filter(None, cells), strict=True)]

    def line(label: str, texts: Iterable[str]) -> str:
        shown = (f"{text:>{n}}" for text, n in zip(texts, widths, strict=True))
        return "  ".join([f"{label:<{first}}", *shown])

    print(line(title, heads))
    for row, label, texts in zip(rows, labels, cells, strict=True):
        print(line(label, texts) if texts else f"{label:<{first}}  {row.missing}")
    if marked:
        print("* not for keys with a bias, as this model has them")


def _cells(plan: Plan, divisor: float) -> tuple[str, ...]:
    """A line of the table: bytes in units of so many, and what else a plan says."""
    s = plan.stats
    n_bytes = (
        *(s.bytes_sealed_k, s.bytes_sealed_v, plan.bytes_f16_rows),
        *(s.bytes_tables, s.bytes_scratch, s.bytes_total),
    )
    sizes = (f"{n / divisor:.2f}" for n in n_bytes)
    return (*sizes, f"{s.bits_full:.2f}", "yes" if plan.fits else "no", str(plan.longest))


def _gpu_cells(plan: Plan, divisor: float) -> tuple[str, ...]:
    """The same where a GPU has layers: what it takes there, by kind, and on the host."""
    s = plan.stats
    n_bytes = (
        *(s.bytes_gpu_weights, s.bytes_gpu_rows, s.bytes_gpu_sealed, s.bytes_gpu_tables),
        *(s.bytes_gpu_scratch, s.bytes_gpu, s.bytes_host),
    )
    sizes = (f"{n / divisor:.2f}" for n in n_bytes)
    layers = str(s.n_gpu_layers + s.gpu_head)
    return (*sizes, layers, "yes" if plan.fits else "no", str(plan.longest))
