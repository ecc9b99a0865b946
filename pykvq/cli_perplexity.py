"""The command `perplexity`."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from pykvq import cli_options as options
from pykvq.console import UsageError, counted, long_progress, notice, print_json

if TYPE_CHECKING:
    from pykvq.perplexity import PerplexityResult


def run(args: argparse.Namespace) -> int:
    """Measures what KV schemes cost on a text."""
    from pykvq.kv_names import parse_kv
    from pykvq.perplexity import perplexity

    names = options.comma_separated(args.kv)
    if not names:
        raise UsageError("--kv names no scheme, expected at least one.")
    schemes = []
    for name in names:
        options.check_scheme(name.partition(":")[0])
        with options.checked():
            schemes.append(parse_kv(name)[0])
    text = options.read_prompt(args)
    with (
        options.open_model(args, **options.device_options(args)) as model,
        long_progress() as progress,
    ):
        options.warn_of_key_bias(model, [scheme.name for scheme in schemes])
        n_ctx = options.context_size(args, model, options.PERPLEXITY_CONTEXT)
        start = time.perf_counter()
        with options.checked():
            results = perplexity(
                model,
                text,
                names,
                n_ctx=n_ctx,
                chunks=args.chunks,
                kld=args.kld,
                stream=args.stream,
                progress=progress,
                **options.session_options(args),
            )
        seconds = time.perf_counter() - start
        profiled = any(scheme.profile != "none" for scheme in schemes)
        placed = model.plan(kv=schemes[0].name, n_ctx=n_ctx, n_threads=args.threads, memory=1)
        notice(
            f"{model.info.name}{options.profile_note(model, profiled)};"
            f" {options.device_note(model, placed.stats)};"
            f" chunks of {n_ctx} tokens, {'token by token' if args.stream else 'read as prompts'};"
            " scored is the second half."
        )
        options.say_why_cpu(args, placed.stats)
        about = {"model": model.info.name, "n_ctx": n_ctx, "stream": args.stream}
    if args.json:
        rows = [asdict(result) for result in results]
        print_json({**about, "seconds": seconds, "results": rows})
    else:
        _show(results, args.kld)
    notice(f"{counted(results[0].tokens, 'token')} scored under each scheme; {seconds:.1f} s.")
    return 0


def _show(results: list[PerplexityResult], kld: bool) -> None:
    """Prints the table; "sealed %" is how many of the scored positions read sealed blocks."""
    columns = ["kv", "bits", "sealed %", "ppl"] + ["mean KLD", "top-1 %"] * kld
    print("".join(f"{name:>12}" for name in columns))
    for r in results:
        cells = [r.kv, f"{r.bits:.3f}", f"{100 * r.sealed:.1f}", f"{r.ppl:.4f}"]
        if r.mean_kld is not None and r.top1 is not None:
            cells += [f"{r.mean_kld:.5f}", f"{100 * r.top1:.2f}"]
        print("".join(f"{cell:>12}" for cell in cells))
