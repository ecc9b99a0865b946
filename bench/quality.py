"""Measures what every KV scheme costs on a text, and keeps the result with its provenance.

    python bench/quality.py smollm2 --text wiki.test.raw

Runs the harness of `pykvq eval` and writes bench/results/eval-MODEL-TEXT.json (with --own-setting
eval-own-MODEL-TEXT.json), part by part: a run that was stopped goes on where it was when it is
started again. A scheme that is finished with a task prints a line; so does, every half minute,
what is being done, its rate and how long the rest of it will take.

Needs the texts in $PYKVQ_DATA/text. --text also takes the path of another one, of which only the
name is kept, as in --text $(python -c 'import _pydecimal; print(_pydecimal.__file__)'). Simulated
schemes are calibrated on WikiText-2 train.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from records import RESULTS, command, data_folder, model_slug

import pykvq
from pykvq.cli import EXIT_INTERRUPTED
from pykvq.cli_options import comma_separated
from pykvq.console import long_progress
from pykvq.eval import report
from pykvq.eval.harness import Text, evaluate
from pykvq.eval.lanes import usable_names
from pykvq.eval.options import TASKS, Options
from pykvq.eval.record import Json, Record

CALIBRATION = "wiki.train.excerpt.txt"

#: What the tables of docs/ show of `auto`, beside its own budget.
AUTO_BUDGETS = ("auto:1.25", "auto:1.5", "auto:2.5", "auto:3")


def announce(task: str, scheme: str, summary: Json) -> None:
    """Prints what a task found about a scheme."""
    print(report.line(task, scheme, summary), flush=True)


def default_names(model: pykvq.Model) -> list[str]:
    """What the tables of docs/ show of a model: all that it can have, by several budgets.

    Taking the key bias out of keys that have none changes nothing: such simulations are left out.
    """
    names = [
        name
        for name in usable_names(model, print)
        if model.has_key_bias or not name.endswith("-nobias")
    ]
    return [*names, *(AUTO_BUDGETS if "auto" in names else ())]


def main() -> int:
    """Runs the measurement, as far as it has not been done; returns the exit status."""
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a name of the catalogue or a GGUF file")
    parser.add_argument(
        "--kv",
        type=comma_separated,
        help="names of schemes, divided by commas, as auto:1.5 where they have a budget (default:"
        " all, and those at several budgets)",
    )
    parser.add_argument("--tasks", default=",".join(TASKS), help="of " + ", ".join(TASKS))
    parser.add_argument(
        "--text", default="wiki.test.raw", help="a file, or one of $PYKVQ_DATA/text"
    )
    parser.add_argument("--ctx-size", type=int, default=default.n_ctx)
    parser.add_argument("--chunks", type=int, default=default.chunks)
    parser.add_argument("--trials", type=int, default=default.trials)
    parser.add_argument("--own-setting", action="store_true", help="each paper's sinks and window")
    args = parser.parse_args()

    texts, name = data_folder() / "text", model_slug(args.model)
    kind = "eval-own" if args.own_setting else "eval"
    text = texts / args.text if (texts / args.text).exists() else Path(args.text)
    record = Record(RESULTS / f"{kind}-{name}-{text.name.partition('.')[0]}.json")
    options = Options(
        tasks=comma_separated(args.tasks),
        n_ctx=args.ctx_size,
        chunks=args.chunks,
        trials=args.trials,
        own_setting=args.own_setting,
    )
    try:
        with pykvq.Model(args.model) as model, long_progress() as progress:
            evaluate(
                model,
                _text(text),
                args.kv or default_names(model),
                record,
                options,
                calibration=_text(texts / CALIBRATION),
                command=command(),
                progress=progress,
                announce=announce,
            )
    except KeyboardInterrupt:
        print(f"Stopped. {record.kept()}")
        return EXIT_INTERRUPTED
    print(record.path, flush=True)
    return 0


def _text(path: Path) -> Text:
    return Text(path.name, path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
