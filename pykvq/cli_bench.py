"""The command `bench`: its options, under llama-bench's names where it has them, and its output."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pykvq import cli_options as options
from pykvq.console import ProgressBar, UsageError, notice, warn

if TYPE_CHECKING:
    from pykvq.bench.options import Options
    from pykvq.bench.ratios import Json


#: The most threads that may have wanted to run before a benchmark, on average.
_QUIET = 1.0


def add(parser: argparse.ArgumentParser) -> None:
    """What `bench` times."""
    from pykvq.bench.options import FILL_FROM, FORMATS, PEER_CACHES, PEERS, Options

    default = Options()
    options.add_model(parser)
    parser.add_argument(
        "-o",
        "--output",
        choices=FORMATS,
        default=FORMATS[0],
        help=f"form of what is printed (default: {FORMATS[0]})",
    )
    group = parser.add_argument_group("what is timed")
    for flags, type_, what in (
        ("-p --n-prompt", int, f"tokens of a prompt; 0: none (default: {default.n_prompt})"),
        ("-n --n-gen", int, f"tokens to generate; 0: none (default: {default.n_gen})"),
        ("-r --repetitions", int, f"repetitions of each test (default: {default.repetitions})"),
        ("-b --batch-size", int, f"tokens per pass of a prompt (default: {default.n_batch})"),
    ):
        group.add_argument(*flags.split(), type=type_, metavar="N", help=what)
    group.add_argument(
        "-d",
        "--n-depth",
        type=_numbers,
        metavar="N,...",
        help="tokens in the cache beforehand (default: 0)",
    )
    group.add_argument(
        "--fill",
        action="store_true",
        help="reach depths by repeating the keys and values of a shorter prompt",
    )
    group.add_argument(
        "--fill-from",
        type=int,
        metavar="N",
        help=f"with --fill: tokens of that prompt (default: {FILL_FROM})",
    )
    group.add_argument(
        "--kv",
        default=options.DEFAULT_KV,
        metavar="NAME,...",
        help="KV schemes, divided by commas; NAME:BITS for those with a budget of bits"
        f" (default: {options.DEFAULT_KV})",
    )
    options.add_profile(group)
    options.add_threads(group)
    options.add_device(group)

    group = parser.add_argument_group("beside another runtime")
    group.add_argument(
        "--peer",
        choices=PEERS,
        help="time it too, in turns, and print ratios (needs llama-cpp-python)",
    )
    group.add_argument(
        "--peer-kv",
        metavar="NAME,...",
        help=f"its caches, of {', '.join(PEER_CACHES)}; f16 with and without flash attention"
        f" (default: {','.join(default.peer_kv)})",
    )


def run(args: argparse.Namespace) -> int:
    """Times a model."""
    from pykvq.bench import harness, report

    chosen = _options(args)
    _check_schemes(chosen)

    def announce(result: Json) -> None:
        notice(report.line(result))

    _warn_of_load(harness.load_average())
    with options.open_model(args) as model, ProgressBar() as progress, options.checked():
        options.say_why_cpu(args, harness.planned(model, chosen))
        record = harness.run(
            model, chosen, command=_command(), progress=progress, announce=announce
        )
    print(report.render(record, args.output), end="")
    return 0


def _numbers(text: str) -> list[int]:
    """A type for argparse: whole numbers divided by commas."""
    try:
        return [int(word) for word in options.comma_separated(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers") from None


def _options(args: argparse.Namespace) -> Options:
    """What was given; the rest as `Options` has it."""
    from pykvq.bench.options import FILL_FROM, Options

    if args.fill_from is not None and not args.fill:
        raise UsageError("--fill-from is of use only with --fill.")
    if args.peer_kv is not None and args.peer is None:
        raise UsageError("--peer-kv is of use only with --peer.")
    fill_from = FILL_FROM if args.fill_from is None else args.fill_from
    given: dict[str, Any] = {
        "kv": options.comma_separated(args.kv),
        "n_prompt": args.n_prompt,
        "n_gen": args.n_gen,
        "depths": args.n_depth,
        "repetitions": args.repetitions,
        "n_threads": args.threads,
        "n_batch": args.batch_size,
        **options.device_options(args),
        "fill_from": fill_from if args.fill else None,
        "peer": args.peer,
        "peer_kv": None if args.peer_kv is None else options.comma_separated(args.peer_kv),
    }
    with options.checked():
        return Options(**{name: value for name, value in given.items() if value is not None})


def _check_schemes(chosen: Options) -> None:
    from pykvq.bench.peer import require_llama_cpp
    from pykvq.kv_names import parse_kv

    for kv in chosen.kv:
        options.check_scheme(kv.partition(":")[0])
        parse_kv(kv)
    if chosen.peer is not None:
        require_llama_cpp()


def _warn_of_load(load: float | None) -> None:
    if load is not None and load > _QUIET:
        warn(
            f"The machine was busy during the last minute (load {load:.1f}): times may be too long,"
            " and those of llama.cpp, whose threads wait for each other spinning, by far."
        )


def _command() -> str:
    """The command line of this process; what is private to this machine left out of paths."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["pykvq", *words])
