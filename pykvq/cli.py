"""The command `pykvq`: reads the command line and hands over to the module of the command.

Every error that a user can cause ends in one sentence on stderr and exit status 2, Ctrl-C in 130.
Modules of commands are loaded when they are needed, so that the first token comes early.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from pykvq import cli_options as options
from pykvq import cli_sampling
from pykvq.console import UsageError, fail, nowhere, warn
from pykvq.errors import KvqError

#: Exit statuses: an error the user can mend; Ctrl-C; the reader of stdout has gone.
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[:1].upper()}{message[1:]}; see `{self.prog} --help`.")

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """No option is a prefix of what is given: -ngl is an unknown flag and not `-n gl`."""
        return []


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pykvq",
        description="Run GGUF language models with a KV cache below 2 bits.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, add, run, summary in _COMMANDS:
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[:1].upper()}{summary[1:]}.",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add(command)
        command.set_defaults(run=run)
    return parser


class _Version(argparse.Action):
    """Prints the version, which takes loading the core."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from pykvq import __version__

        print(f"pykvq {__version__}")
        parser.exit()


# ---- commands -------------------------------------------------------------------------------


def _spare_threads() -> None:
    """Before numpy is imported: keeps its OpenBLAS from starting threads.

    Writing a text multiplies no matrices there, and starting them takes longer than the first token
    of a small model (bench/startup.py).
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _add_run(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_prompt(parser)
    cli_sampling.add_generation(parser)
    options.add_session(
        parser, f"{options.RUN_CONTEXT}, or what prompt and -n need, at most as it was trained"
    )
    options.add_opening(parser)
    cli_sampling.add_sampling(parser)
    options.add_json(parser)


def _run(args: argparse.Namespace) -> int:
    _spare_threads()
    from pykvq import cli_generate

    return cli_generate.run(args)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    cli_sampling.add_system(parser)
    cli_sampling.add_length(parser)
    options.add_session(parser, f"{options.CHAT_CONTEXT}, at most as it was trained")
    options.add_opening(parser)
    cli_sampling.add_sampling(parser)


def _chat(args: argparse.Namespace) -> int:
    _spare_threads()
    from pykvq import cli_generate

    return cli_generate.chat(args)


def _add_info(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, default=None)
    parser.add_argument(
        "--devices",
        action="store_true",
        help="show the CPU and the CUDA devices of this machine instead",
    )
    options.add_context(parser, "as it was trained")
    options.add_kv(parser, many=True, default=None)
    options.add_topk(parser)
    options.add_profile(parser)
    options.add_json(parser)


def _info(args: argparse.Namespace) -> int:
    from pykvq import cli_info

    return cli_info.info(args)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    from pykvq import cli_plan

    options.add_model(parser)
    options.add_session(parser, "as it was trained", many=True, kv=None)
    cli_plan.add_place(parser)
    options.add_json(parser)


def _plan(args: argparse.Namespace) -> int:
    from pykvq import cli_plan

    return cli_plan.run(args)


def _add_tokenize(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_prompt(parser)
    options.add_tokenize(parser)
    options.add_json(parser)


def _tokenize(args: argparse.Namespace) -> int:
    from pykvq import cli_info

    return cli_info.tokenize(args)


def _add_perplexity(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_prompt(parser)
    options.add_perplexity(parser)
    options.add_session(
        parser, f"{options.PERPLEXITY_CONTEXT}, at most as it was trained", many=True
    )
    options.add_device(parser)
    options.add_json(parser)


def _perplexity(args: argparse.Namespace) -> int:
    from pykvq import cli_perplexity

    return cli_perplexity.run(args)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_eval(parser)
    options.add_json(parser)


def _eval(args: argparse.Namespace) -> int:
    from pykvq import cli_eval

    return cli_eval.run(args)


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_calibrate(parser)


def _calibrate(args: argparse.Namespace) -> int:
    from pykvq import cli_calibrate

    return cli_calibrate.run(args)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    from pykvq import cli_bench

    cli_bench.add(parser)


def _bench(args: argparse.Namespace) -> int:
    from pykvq import cli_bench

    return cli_bench.run(args)


def _add_pull(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)


def _pull(args: argparse.Namespace) -> int:
    from pykvq import cli_info

    return cli_info.pull(args)


_Add = Callable[[argparse.ArgumentParser], None]
_Run = Callable[[argparse.Namespace], int]
_COMMANDS: tuple[tuple[str, _Add, _Run, str], ...] = (
    ("run", _add_run, _run, "write one text or one answer"),
    ("chat", _add_chat, _chat, "talk with a model"),
    ("info", _add_info, _info, "show what a model is and what its KV cache costs"),
    ("plan", _add_plan, _plan, "show what fits into the memory, from a model's header alone"),
    ("tokenize", _add_tokenize, _tokenize, "show the tokens of a text"),
    ("perplexity", _add_perplexity, _perplexity, "measure what KV schemes cost on a text"),
    ("eval", _add_eval, _eval, "compare KV schemes, published ones among them, on several tasks"),
    ("bench", _add_bench, _bench, "measure speed by depth of context, beside llama.cpp if asked"),
    ("calibrate", _add_calibrate, _calibrate, "find out what KV schemes need to know of a model"),
    ("pull", _add_pull, _pull, "fetch a model, or check the one that is here, and print its path"),
)


# ---- the way in -----------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    Args:
        argv: The arguments; by default those of the process.
    """
    _prepare_streams()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: warn(options.in_flags(str(message)))
        try:
            return _main(argv)
        except BrokenPipeError:
            # Python flushes stdout once more at its end: let that go nowhere.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_BROKEN_PIPE
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except (KvqError, UsageError) as error:
            fail(options.in_flags(str(error)))
        except MemoryError:
            fail("There is not enough memory.")
        except OSError as error:
            fail(f"{error.filename or 'Input or output'}: {error.strerror or error}.")
    return EXIT_ERROR


def _prepare_streams() -> None:
    """Makes the standard streams exist, and none of them fail over a character."""
    for name, mode, errors in (
        ("stdin", "r", "surrogateescape"),  # what is not UTF-8 is found where a text is expected
        ("stdout", "w", "replace"),
        ("stderr", "w", "replace"),
    ):
        if getattr(sys, name) is None:  # the process was started with it closed
            setattr(sys, name, nowhere(mode))
        with contextlib.suppress(AttributeError):  # a stream that is not a text file
            getattr(sys, name).reconfigure(errors=errors)


def _main(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(options.unknown_arguments(unknown, args.command))
    if args.command is None:
        parser.print_help()
        return EXIT_ERROR
    run: _Run = args.run
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
