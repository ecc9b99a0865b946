"""The command `eval`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pykvq import cli_options as options
from pykvq.cli_output import require_folder, require_writable
from pykvq.console import UsageError, long_progress, notice, print_json, table_console, warn

if TYPE_CHECKING:
    from pykvq.eval.harness import Text
    from pykvq.eval.options import Options
    from pykvq.eval.record import Json

#: What --kv calls all schemes that the model can have.
EVERY = "all"

#: Width of the tables where stdout is no terminal, whose lines must not be folded.
_WIDE = 160


def run(args: argparse.Namespace) -> int:
    """Compares KV schemes by what they cost."""
    from pykvq.eval import plots, report
    from pykvq.eval.harness import evaluate
    from pykvq.eval.lanes import find_lanes, usable_names
    from pykvq.eval.record import Record

    names = options.comma_separated(args.kv)
    if not names:
        raise UsageError("--kv names no scheme, expected at least one.")
    if args.own_setting and (args.kv_sinks is not None or args.kv_window is not None):
        raise UsageError("--own-setting excludes --kv-sinks and --kv-window.")
    if args.output is not None:
        require_writable("The record", Path(args.output))
    if args.plot is not None:
        plots.require_matplotlib()
        require_folder("Plots", Path(args.plot))
    find_lanes([name for name in names if name != EVERY], 0, 0)  # says at once what is unknown
    text = _text(args.file, "-f")
    calibration = None
    if args.calibration_text is not None:
        calibration = _text(args.calibration_text, "--calibration-text")
        if calibration.text == text.text:
            warn("The calibration text is the text that is evaluated; its results will flatter.")
    record = Record(args.output)

    def announce(task: str, scheme: str, summary: Json) -> None:
        notice(report.line(task, scheme, summary))

    with options.open_model(args) as model, long_progress() as progress, options.checked():
        if EVERY in names:
            names = usable_names(model, notice)
        chosen = _options(args, options.context_size(args, model, args.default_context))
        trained, longest = model.info.n_ctx_train, max(chosen.lengths)
        if longest > trained and {"needle", "retrieval"}.intersection(chosen.tasks):
            warn(
                f"Prompts of {longest} tokens exceed the {trained} that the model was trained on;"
                " what it finds in them may say little about the cache."
            )
        try:
            evaluate(
                model,
                text,
                names,
                record,
                chosen,
                calibration=calibration,
                command=_command(),
                progress=progress,
                announce=announce,
            )
        except KeyboardInterrupt:
            progress.close()
            notice(f"Stopped. {record.kept()}")
            raise
    shown = [lane.name for lane in find_lanes(names, 0, 0)]
    if args.json:
        print_json(record.data)
    else:
        _show(record.data, shown)
    if args.plot is not None:
        for path in plots.plot(record.data, shown, Path(args.plot)):
            notice(f"Plot: {path}")
    return 0


def _text(path: str | None, flag: str) -> Text:
    from pykvq.eval.harness import Text

    if path is None and sys.stdin.isatty():
        raise UsageError(f"There is no text: name a file with {flag}, or pipe one in.")
    path = "-" if path is None else path
    name = "stdin" if path == "-" else Path(path).name
    return Text(name, options.read_text(path).removeprefix("\ufeff"))


def _options(args: argparse.Namespace, n_ctx: int) -> Options:
    """What was given; the rest as `Options` has it."""
    from pykvq.eval.options import Options

    given = {
        "tasks": options.comma_separated(args.tasks),
        "n_ctx": n_ctx,
        "chunks": args.chunks,
        "n_batch": args.batch_size,
        "at": args.at,
        "kv_sinks": args.kv_sinks,
        "kv_window": args.kv_window,
        "own_setting": args.own_setting,
        "prompts": args.prompts,
        "n_prompt": args.prompt_tokens,
        "n_tokens": args.predict,
        "lengths": args.lengths,
        "depths": args.depths,
        "trials": args.trials,
        "seed": args.seed,
        "calibration_tokens": args.calibration_tokens,
        "n_threads": args.threads,
    }
    return Options(**{name: value for name, value in given.items() if value is not None})


def _command() -> str:
    """The command line of this process; what is private to this machine left out of paths."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["pykvq", *words])


def _show(data: Json, names: list[str]) -> None:
    from pykvq.eval.report import tables

    console = table_console(_WIDE)
    settings = data["settings"]
    console.print(f"{settings['model']['name']} on {settings['text']['name']}\n")
    for title, table in tables(data, names):
        console.print(title, soft_wrap=True)
        console.print(table)
        console.print()
