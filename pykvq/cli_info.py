"""The commands that show something: `info`, `tokenize` and `pull`."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sized
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pykvq import cli_options as options
from pykvq.console import ProgressBar, UsageError, counted, print_json, size, table_console

if TYPE_CHECKING:
    from rich.table import Table

    from pykvq.model import Model
    from pykvq.native import Scheme

#: Longest value of a metadata entry that is shown.
_SHOWN = 60


# ---- info -----------------------------------------------------------------------------------


def info(args: argparse.Namespace) -> int:
    """Shows a model, or this installation if none is named."""
    given = options.kv_options(args)
    if options.model_name(args) is None:
        about = (args.kv, args.ctx_size, args.profile, *given.values())
        if any(value is not None for value in about):
            raise UsageError(
                "-c, --profile and the options of KV schemes are about a model, but none is named."
            )
        facts = _machine() if args.devices else _installation()
        if args.json:
            print_json(facts)
        elif args.devices:
            _show_machine(facts)
        else:
            _show_installation(facts)
        return 0
    if args.devices:
        raise UsageError("--devices is about this machine, but a model is named.")
    from pykvq.native import scheme_named

    names = _named(args)
    with options.open_model(args) as model:
        n_ctx = options.context_size(args, model, model.info.n_ctx_train)
        known = {scheme.name: scheme for scheme in model.schemes}
        # One that this model cannot have is refused by the core, which says why.
        schemes = [known.get(name) or scheme_named(name) for name in names or known]
        costs = [_cost(model, scheme, n_ctx, given) for scheme in schemes]
        if args.json:
            print_json(_model_facts(model, n_ctx, costs))
        else:
            _show_model(model, n_ctx, costs, switched_off=args.profile == "none")
    return 0


def _named(args: argparse.Namespace) -> list[str]:
    """The schemes that --kv names; empty if it is not given."""
    if args.kv is None:
        for flag, value in (
            ("--kv-bits", args.kv_bits),
            ("--kv-topk", args.kv_topk),
            ("--asymkv-layers", args.asymkv_layers),
        ):
            if value is not None:
                raise UsageError(f"Not all KV schemes take {flag}: name those that do with --kv.")
        return []
    names = options.comma_separated(args.kv)
    if not names:
        raise UsageError("--kv names no scheme, expected at least one.")
    for name in names:
        options.check_scheme(name)
    return names


def _installation() -> dict[str, Any]:
    from pykvq import native
    from pykvq.catalogue import cards

    with options.checked():
        selected = native.isa_selected()
    return {
        "version": native.version(),
        "isa": selected,
        "isa_available": native.isa_available(),
        "models": sorted(cards()),
        "d_head": native.USUAL_D_HEAD,
        "schemes": [asdict(scheme) for scheme in native.schemes()],
    }


def _show_installation(facts: dict[str, Any]) -> None:
    table = _table(f"KV schemes (bits per sealed element at head width {facts['d_head']})")
    for name in ("scheme", "keys", "values", "sinks", "window", "what it is"):
        table.add_column(name, overflow="fold")
    for s in facts["schemes"]:
        bits_k, bits_v = f"{s['codec_k']} {s['bits_k']:.3g}", f"{s['codec_v']} {s['bits_v']:.3g}"
        summary = s["summary"]
        if s["key_bias_sensitive"]:
            summary += "; not for models whose keys have a bias (Qwen2)"
        row = (s["name"], bits_k, bits_v, str(s["sinks"]), str(s["window"]), summary)
        table.add_row(*row)
    console = table_console()
    console.print(f"pykvq {facts['version']}")
    console.print(f"instruction set: {facts['isa']} (of {', '.join(facts['isa_available'])})")
    console.print(f"known models: {', '.join(facts['models'])}\n")
    console.print(table)


def _machine() -> dict[str, Any]:
    from pykvq import native
    from pykvq.native_device import devices

    with options.checked():
        selected = native.isa_selected()
    beside = devices()
    return {
        "cpu": {
            "isa": selected,
            "isa_available": native.isa_available(),
            "threads": _threads(),
            "bytes_available": native.memory_available(),
        },
        "devices": [asdict(device) for device in beside.found],
        "why_none": beside.why_none,
    }


def _threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _show_machine(facts: dict[str, Any]) -> None:
    cpu = facts["cpu"]
    print(f"cpu: {cpu['isa']} (of {', '.join(cpu['isa_available'])})")
    print(f"  threads: {cpu['threads']}")
    print(f"  memory: {size(cpu['bytes_available'])} available")
    for device in facts["devices"]:
        memory = f"{size(device['bytes_total'])}, {size(device['bytes_free'])} free"
        bus = f"{device['memory_bus_bits']} bits at {device['memory_clock_hz'] / 1e6:.0f} MHz"
        clock = f"{device['clock_hz'] / 1e6:.0f} MHz"
        print(f"{device['name']}: {device['model']}")
        print(f"  compute capability: {device['compute_capability']}")
        print(f"  CUDA of the driver: {device['driver']}")
        print(f"  memory: {memory}{' (that of the CPU)' if device['integrated'] else ''}")
        print(f"  memory bus: {bus}; L2 cache: {size(device['bytes_l2'])}")
        print(f"  multiprocessors: {device['multiprocessors']} at {clock}")
        print(
            f"  kernels: built by {device['kernels']}"
            if device["usable"]
            else f"  cannot be used: {device['why_not']}"
        )
    if facts["why_none"]:
        print(facts["why_none"])


def _cost(model: Model, scheme: Scheme, n_ctx: int, given: dict[str, Any]) -> dict[str, Any]:
    """What the cache of a scheme takes; if there can be none here, `missing` says why.

    Args:
        model: The model.
        scheme: The scheme.
        n_ctx: Tokens of context.
        given: Further arguments of `Model.session`.
    """
    cost: dict[str, Any] = {"kv": scheme.name, "bytes": None, "bits_full": None, "missing": None}
    cost["bytes_tables"] = 0
    cost["copes_with_keys"] = not (model.has_key_bias and scheme.key_bias_sensitive)
    cost["bits_sealed"] = (scheme.bits_k + scheme.bits_v) / 2
    if scheme.profile == "needed" and model.profile_path is None:
        cost["missing"] = "needs a profile"
        return cost
    with options.checked():
        plan = model.plan(kv=scheme.name, n_ctx=n_ctx, n_batch=1, **given)
    cost["bits_sealed"] = plan.stats.bits_sealed
    cost["bytes"], cost["bits_full"] = plan.stats.bytes_kv, plan.stats.bits_full
    cost["bytes_tables"] = plan.stats.bytes_tables
    if not plan.fits:
        cost["missing"] = "more than the memory"
    return cost


def _tensor_types(model: Model) -> list[dict[str, Any]]:
    count: Counter[str] = Counter()
    n_bytes: Counter[str] = Counter()
    for tensor in model.tensors:
        count[tensor.type] += 1
        n_bytes[tensor.type] += tensor.n_bytes
    return [
        {"type": kind, "tensors": count[kind], "bytes": amount}
        for kind, amount in n_bytes.most_common()
    ]


def _model_facts(model: Model, n_ctx: int, costs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **asdict(model.info),
        "chat_template": model.has_chat_template,
        "key_bias": model.has_key_bias,
        "profile": None if model.profile_path is None else str(model.profile_path),
        "tensor_types": _tensor_types(model),
        "kv_n_ctx": n_ctx,
        "kv": costs,
        "metadata": {key: _plain(value) for key, value in model.metadata.items()},
    }


def _plain(value: object) -> object:
    """A metadata value for JSON; of an array its length."""
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return {"length": len(value)} if isinstance(value, Sized) else value


def _shown(value: object) -> str:
    """A metadata value in one short line."""
    if isinstance(value, Sized) and not isinstance(value, str):
        return f"{len(value)} elements"
    line = str(_plain(value)).replace("\n", "\\n")
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "..."


def _show_model(model: Model, n_ctx: int, costs: list[dict[str, Any]], switched_off: bool) -> None:
    from rich.markup import escape

    about = model.info
    facts = _table("model", header=False)
    no_profile = "switched off" if switched_off else "none; `pykvq calibrate` makes one"
    heads = f"{about.n_heads} heads, {about.n_kv_heads} KV heads of width {about.d_head}"
    for name, text in (
        ("name", about.name),
        ("file", about.path),
        ("architecture", about.architecture),
        ("weights", f"{about.n_params / 1e6:.1f} M in {size(about.bytes_weights)}"),
        ("shape", f"{about.n_layers} layers, width {about.d_model}, feed-forward {about.d_ff}"),
        ("attention", heads),
        ("vocabulary", f"{about.n_vocab} tokens"),
        ("trained context", f"{about.n_ctx_train} tokens"),
        ("chat template", "yes" if model.has_chat_template else "no"),
        ("KV profile", str(model.profile_path or no_profile)),
    ):
        facts.add_row(name, escape(text))
    types = _table("weights")
    for name in ("type", "tensors", "size"):
        types.add_column(name)
    for row in _tensor_types(model):
        types.add_row(row["type"], str(row["tensors"]), size(row["bytes"]))
    cache = _table(f"KV cache for {n_ctx} tokens")
    for name in ("scheme", "size", "profile", "bits per element", "of a sealed block"):
        cache.add_column(name)
    for cost in costs:
        told = [size(cost["bytes"])] if cost["bytes"] is not None else []
        told += [cost["missing"]] if cost["missing"] else []
        cache.add_row(
            cost["kv"] if cost["copes_with_keys"] else f"{cost['kv']} *",
            ", ".join(
                part for part in (cost["bytes"] and size(cost["bytes"]), cost["missing"]) if part
            ),
            size(cost["bytes_tables"]) if cost["bytes_tables"] else "",
            "" if cost["bits_full"] is None else f"{cost['bits_full']:.3f}",
            f"{cost['bits_sealed']:.3f}",
        )
    if model.has_key_bias:
        cache.caption = "* not for keys with a bias, as this model has them"
        cache.caption_justify = "left"
    entries = _table("metadata", header=False)
    entries.add_column(overflow="fold")
    for key, value in model.metadata.items():
        entries.add_row(escape(key), escape(_shown(value)))
    console = table_console()
    for table in (facts, types, cache, entries):
        console.print(table)


def _table(title: str, header: bool = True) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", show_header=header, box=box.SIMPLE)


# ---- tokenize -------------------------------------------------------------------------------


def tokenize(args: argparse.Namespace) -> int:
    """Shows the tokens of a text."""
    text = options.read_prompt(args)
    with options.open_model(args) as model:
        with options.checked():
            ids = model.tokenize(text, not args.no_special, args.parse_special)
        pieces = [
            model.tokenizer.token_bytes(token, special=True).decode("utf-8", "replace")
            for token in ids
        ]
    if args.json:
        print_json({"model": model.info.name, "ids": ids, "pieces": pieces})
        return 0
    if args.ids:
        print(ids)
    else:
        for token, piece in zip(ids, pieces, strict=True):
            print(f"{token:6d} {piece!r}")
    if args.show_count:
        print(counted(len(ids), "token"))
    return 0


# ---- pull -----------------------------------------------------------------------------------


def pull(args: argparse.Namespace) -> int:
    """Fetches a model, or compares the one that is there with its checksum; prints its path."""
    from pykvq import catalogue

    name = options.model_name(args)
    assert name is not None  # the command has a default
    with ProgressBar() as progress:
        path = catalogue.resolve(name, progress=progress, verify=True)
    print(path)
    return 0
