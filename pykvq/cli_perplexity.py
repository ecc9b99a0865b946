"""The command `perplexity`."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from pykvq import cli_options as options
from pykvq.console import ProgressBar, UsageError, notice, warn

if TYPE_CHECKING:
    from pykvq.perplexity import PerplexityResult


def run(args: argparse.Namespace) -> int:
    """Measures what KV schemes cost on a text."""
    from pykvq import native
    from pykvq.perplexity import REFERENCE, perplexity

    names = [name.strip() for name in args.kv.split(",") if name.strip()]
    if not names:
        raise UsageError("--kv names no scheme, expected at least one.")
    for name in names:
        options.check_scheme(name)
    text = options.read_prompt(args)
    with options.open_model(args) as model, ProgressBar() as progress:
        options.warn_of_key_bias(model, names)
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
        profiled = any(native.scheme_named(name).profile != "none" for name in names)
        notice(
            f"{model.info.name}{options.profile_note(model, profiled)}; {native.isa_selected()};"
            f" chunks of {n_ctx} tokens, {'token by token' if args.stream else 'read as prompts'};"
            " scored is the second half."
        )
        if not args.stream and any(name != REFERENCE for name in names):
            n_batch = min(n_ctx, args.batch_size or 512)
            warn(
                f"Passes of {n_batch} tokens see their own tokens in f16, so that little or nothing"
                " may have been read from sealed blocks; --stream measures the sealed cache."
            )
        about = {"model": model.info.name, "n_ctx": n_ctx, "stream": args.stream}
    if args.json:
        rows = [asdict(result) for result in results]
        print(json.dumps({**about, "seconds": seconds, "results": rows}))
    else:
        _show(results, args.kld)
    notice(f"{results[0].tokens} tokens scored under each scheme; {seconds:.1f} s.")
    return 0


def _show(results: list[PerplexityResult], kld: bool) -> None:
    columns = ["kv", "bits", "ppl"] + ["mean KLD", "top-1 %"] * kld
    print("".join(f"{name:>12}" for name in columns))
    for r in results:
        cells = [r.kv, f"{r.bits:.3f}", f"{r.ppl:.4f}"]
        if r.mean_kld is not None and r.top1 is not None:
            cells += [f"{r.mean_kld:.5f}", f"{100 * r.top1:.2f}"]
        print("".join(f"{cell:>12}" for cell in cells))
