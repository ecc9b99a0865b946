"""The command `calibrate`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from pykvq import cli_options as options
from pykvq.cli_output import require_writable
from pykvq.console import long_progress, notice, size


def run(args: argparse.Namespace) -> int:
    """Makes the profile of a model, writes it, and prints its path."""
    from pykvq.calibrate import calibrate
    from pykvq.profile import beside, write_profile

    with options.open_model(args, n_threads=args.threads) as model:
        found = beside(model.info.path)
        output = found if args.output is None else Path(args.output)
        require_writable("The profile", output, [model.info.path, *args.files])
        texts = [(_name(path), options.read_text(path)) for path in args.files]
        n_ctx = options.context_size(args, model, options.CALIBRATE_CONTEXT)
        start = time.perf_counter()
        try:
            with long_progress() as progress, options.checked():
                profile = calibrate(
                    model,
                    texts,
                    n_tokens=args.tokens,
                    n_ctx=n_ctx,
                    sensitivity_chunks=args.sensitivity_chunks,
                    progress=progress,
                )
        except KeyboardInterrupt:
            notice(f"Stopped before {output} was written; calibration begins anew next time.")
            raise
        seconds = time.perf_counter() - start
    write_profile(output, profile)
    print(output)
    several = "s" if len(texts) > 1 else ""
    notice(
        f"{profile.model}; calibrated on {profile.n_tokens} tokens of {len(texts)} text{several};"
        f" {seconds:.1f} s; profile of {size(output.stat().st_size)}, fingerprint"
        f" {profile.fingerprint:016x}."
    )
    if found.exists() and output.samefile(found):
        notice(f"It is used whenever {model.info.path} is; --profile none runs without it.")
    else:
        notice(f"It is used where --profile names it; at {found} it is found by itself.")
    return 0


def _name(path: str) -> str:
    return "stdin" if path == "-" else Path(path).name
