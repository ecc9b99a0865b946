"""The options of the command line, under llama.cpp's names where it has them.

Owns the options and what becomes of their values, but for those of writing (`cli_sampling`); the
commands are in other modules.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pykvq.checks import SESSION_RANGES
from pykvq.console import ProgressBar, UsageError, notice, warn
from pykvq.errors import DeviceError, KvqError, LogitsError, MemoryLimitError, SchemeError
from pykvq.files import read_text_bytes

if TYPE_CHECKING:
    from pykvq.model import Model
    from pykvq.native_session import SessionStats
    from pykvq.session import Session

#: The model that is used where none is named.
DEFAULT_MODEL = "smollm2"
DEFAULT_KV = "skvq"

#: Tokens of context that the commands open if -c says nothing and the model allows it.
RUN_CONTEXT = 4096
CHAT_CONTEXT = 8192
PERPLEXITY_CONTEXT = 512  # as llama.cpp's llama-perplexity
CALIBRATE_CONTEXT = 2048

#: Tokens that `calibrate` reads if -n says nothing.
CALIBRATE_TOKENS = 65536
#: Chunks that `calibrate` measures sensitivities on if nothing is said.
SENSITIVITY_CHUNKS = 3

#: Flags of llama.cpp whose task is done by other ones here.
_INSTEAD = {
    "--kv": ("-ctk", "--cache-type-k", "-ctv", "--cache-type-v"),
    "a model by position or -m": ("-hf", "-hfr", "--hf-repo"),
}


#: What options of the Python package, which errors name, are called here.
_FLAGS = {
    "n_ctx": "-c",
    "n_batch": "-b",
    "n_threads": "-t",
    "n_gpu_layers": "-ngl",
    **{f"kv_{name}": f"--kv-{name}" for name in ("sinks", "window", "bits", "topk")},
    "asymkv_layers": "--asymkv-layers",
}
_OPTION = re.compile(rf"(?<![\w./-])({'|'.join(_FLAGS)})(?![\w/-]|\.\w)")


def in_flags(sentence: str) -> str:
    """A sentence of the package as users of the command line know its options."""
    return _OPTION.sub(lambda found: _FLAGS[found[0]], sentence)


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Turns the ValueError of a value that the user gave into an error of usage."""
    try:
        yield
    except KvqError:  # a sentence for users already
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def unknown_arguments(arguments: Sequence[str], command: str | None) -> str:
    """The sentence about arguments that the command does not know, of which there are some."""
    flags = [a for a in arguments if re.match(r"-[^\d.]", a)] or arguments[:1]
    flag = flags[0].split("=")[0]
    what = f"The flag {flag} is unknown" if flag[:1] == "-" else f"{flag!r} was not expected"
    hints = [f"use {other}" for other, theirs in _INSTEAD.items() if flag in theirs]
    see = f"see `pykvq {command} --help`" if command else "see `pykvq --help`"
    return "; ".join([what, *hints, see]) + "."


def model_text(text: str) -> str:
    """A type for argparse: a text for a model."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(_not_utf8(text, error)) from None
    return text


def _not_utf8(text: str, error: UnicodeEncodeError) -> str:
    # Bytes of arguments and lines that are not UTF-8 come as surrogates from U+DC80 on.
    at, found = error.start, ord(text[error.start])
    if 0xDC80 <= found <= 0xDCFF:
        return f"the text is not UTF-8: byte {len(text[:at].encode())} is {found - 0xDC00:#04x}"
    return f"the text is not UTF-8: character {at} is {text[at]!a}"


def check_line(line: str) -> None:
    """Requires that a line of a conversation was UTF-8.

    Raises:
        UsageError: It was not.
    """
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"In a line of stdin {_not_utf8(line, error)}.") from None


def count(least: int, most: int | None = None) -> Any:
    """A type for argparse: a whole number from `least` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{value} is above {most}, the most that is possible")
        return value

    return parse


def number(text: str) -> float:
    """A type for argparse: a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def _layers(text: str) -> tuple[int, int]:
    """A type for argparse: two numbers of layers, divided by a comma."""
    found = re.fullmatch(r"(\d+),(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form K,V")
    return int(found[1]), int(found[2])


# ---- models and prompts ---------------------------------------------------------------------


def add_model(parser: argparse.ArgumentParser, default: str | None = DEFAULT_MODEL) -> None:
    """The model, by position or as -m."""
    what = "path of a GGUF file, name of a known model, or user/repository[:quantization]"
    if default is not None:
        what += f" (default: {default})"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=what)
    parser.add_argument("-m", "--model", dest="model_option", metavar="MODEL", help="the same")
    parser.set_defaults(default_model=default)


def model_name(args: argparse.Namespace) -> str | None:
    """The model that was named, or the command's default."""
    if args.model is not None and args.model_option is not None:
        raise UsageError(
            f"Two models are named, {args.model} and {args.model_option}, but one was expected."
        )
    named = (args.model, args.model_option, args.default_model)
    return next((name for name in named if name is not None), None)


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Where a text comes from."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", type=model_text, metavar="TEXT", help="the text")
    source.add_argument(
        "-f", "--file", metavar="PATH", help="read the text from a file (default: from stdin)"
    )


def read_prompt(args: argparse.Namespace) -> str:
    """The text that -p, -f or stdin gives.

    Of a file without the line break that ends it and the byte order mark that some begin with.
    """
    if args.prompt is not None:
        prompt: str = args.prompt
        return prompt
    if args.file is None and sys.stdin.isatty():
        raise UsageError("There is no text: give it with -p or -f, or pipe it in.")
    path = "-" if args.file is None else args.file
    return read_text(path).removeprefix("\ufeff").removesuffix("\n")


def read_text(path: str) -> str:
    """The text of a file, or of stdin if that is "-"."""
    if path == "-":
        name, data = "stdin", read_text_bytes("stdin", sys.stdin.buffer)
    else:
        with open(path, "rb") as file:
            name, data = path, read_text_bytes(path, file)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The text of {name} is not UTF-8: byte {error.start} is {data[error.start]:#04x}."
        ) from error


def add_json(parser: argparse.ArgumentParser) -> None:
    """Output for programs."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


# ---- sessions -------------------------------------------------------------------------------


def add_context(parser: argparse._ActionsContainer, default: str) -> None:
    """The size of the context; `default` says which one is taken otherwise."""
    parser.add_argument(
        "-c",
        "--ctx-size",
        type=count(0, SESSION_RANGES["n_ctx"][1]),
        metavar="N",
        help=f"tokens of context; 0: as the model was trained (default: {default})",
    )


def add_threads(parser: argparse._ActionsContainer) -> None:
    """The threads that share the work."""
    parser.add_argument(
        "-t",
        "--threads",
        type=count(1),
        metavar="N",
        help="threads (default, and most: one per processor)",
    )


def add_profile(parser: argparse._ActionsContainer) -> None:
    """What calibration found for the model."""
    parser.add_argument(
        "--profile",
        metavar="PATH",
        help="what `pykvq calibrate` wrote for the model, or none (default: the one beside the"
        " model, else one that comes with pykvq)",
    )


def check_scheme(name: str) -> None:
    """Requires that a session can have this scheme; says where else a name belongs.

    Raises:
        SchemeError: The name is not known.
        UsageError: It is one that only `eval` knows.
    """
    from pykvq.native import scheme_named, schemes

    try:
        scheme_named(name)
    except SchemeError as error:
        from pykvq.eval.simulations import SIMULATIONS  # takes a while, and only this needs it

        if name in SIMULATIONS:
            raise UsageError(
                f"The KV scheme {name!r} is a simulation for `pykvq eval` and has no stored form;"
                " `pykvq info` lists those that have."
            ) from None
        if name.partition(":")[0] in {scheme.name for scheme in schemes()}:
            raise UsageError(
                f"The KV scheme {name!r} has its bits in its name, as commands take it that compare"
                " schemes; here --kv-bits gives them."
            ) from None
        near = [s for s in SIMULATIONS if s.startswith(name)] if name else []
        near = near or difflib.get_close_matches(name.lower(), SIMULATIONS)
        if near:
            raise SchemeError(
                f"{error} `pykvq eval` simulates {', '.join(near)}; simulations have no stored"
                " form."
            ) from None
        raise


def warn_of_key_bias(model: Model, names: Sequence[str]) -> None:
    """Says which schemes do not suit a model whose keys have a bias."""
    from pykvq.native import scheme_named

    for name in dict.fromkeys(names):
        if model.has_key_bias and scheme_named(name).key_bias_sensitive:
            warn(
                f"The keys of {model.info.name} have a bias, which the KV scheme {name} does not"
                " cope with: expect results far from those of f16, and use skvq or auto instead."
            )


def profile_note(model: Model, used: bool) -> str:
    """What a notice says of the model's profile, if it has one and sessions use it."""
    return f"; profile {model.profile_path}" if used and model.profile_path is not None else ""


def add_kv(parser: argparse._ActionsContainer, *, many: bool, default: str | None) -> None:
    """The KV scheme and its settings.

    Args:
        parser: What to add them to.
        many: Whether to allow several schemes, divided by commas.
        default: The scheme that is taken if none is named; None for all.
    """
    names = "names of KV schemes, divided by commas" if many else "KV scheme"
    parser.add_argument(
        "--kv",
        default=default,
        metavar="NAME,..." if many else "NAME",
        help=f"{names}; `pykvq info` lists them (default: {default or 'all'})",
    )
    parser.add_argument("--kv-window", type=count(0), metavar="N", help="last tokens kept in f16")
    parser.add_argument("--kv-sinks", type=count(0), metavar="N", help="first tokens kept in f16")
    parser.add_argument(
        "--kv-bits",
        type=number,
        metavar="BITS",
        help="bits per element of schemes with a budget, such as auto (default: the scheme's);"
        " commands that compare schemes also take NAME:BITS",
    )
    parser.add_argument(
        "--asymkv-layers",
        type=_layers,
        metavar="K,V",
        help="asymkv: l_k and l_v, how many layers, from the first, have the higher bits for keys"
        " and for values (default: all and half of them)",
    )


def add_topk(parser: argparse._ActionsContainer) -> None:
    """What tokens read of the cache."""
    parser.add_argument(
        "--kv-topk",
        type=count(0),
        metavar="N",
        help="tokens of sealed blocks that each generated token reads, rounded up to whole blocks"
        " of 64 (default, and 0: all)",
    )


def add_session(
    parser: argparse.ArgumentParser,
    context: str,
    many: bool = False,
    kv: str | None = DEFAULT_KV,
) -> None:
    """The KV cache and the work on it.

    Args:
        parser: What to add them to.
        context: The size of the context that is taken if none is given, in words.
        many: Whether to allow several schemes, divided by commas.
        kv: The scheme that is taken if none is named; None for all.
    """
    group = parser.add_argument_group("KV cache and threads")
    add_context(group, context)
    add_kv(group, many=many, default=kv)
    if not many:  # perplexity reads many tokens at a time
        add_topk(group)
    group.add_argument(
        "-b", "--batch-size", type=count(1), metavar="N", help="tokens per pass (default: 512)"
    )
    add_threads(group)
    add_profile(group)


#: What --device says of its values, where sessions are opened.
_DEVICES = (
    "cpu, cuda or cuda:N; `pykvq info --devices` lists them (default: auto, the first GPU that can"
    " be used, with as many layers as fit, else the CPU)"
)


def add_device(
    parser: argparse._ActionsContainer, default: str = "auto", what: str = _DEVICES
) -> None:
    """Where layers run."""
    parser.add_argument("--device", default=default, metavar="DEVICE", help=what)
    parser.add_argument(
        "-ngl",
        "--n-gpu-layers",
        "--gpu-layers",
        type=count(0),
        metavar="N",
        help="layers on the GPU, counted from the last, the output matrix after all of them"
        " (default: all)",
    )


def device_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_device` as arguments for `Model` and `Model.session`."""
    if args.n_gpu_layers and args.device == "cpu":
        raise UsageError("-ngl is of use only with --device cuda, but --device is cpu.")
    return {"device": args.device, "n_gpu_layers": args.n_gpu_layers}


def add_opening(parser: argparse.ArgumentParser) -> None:
    """How `open_session` opens one."""
    add_device(parser)
    parser.add_argument(
        "--pin-threads",
        action="store_true",
        help="keep each thread but the first on one processor (Linux)",
    )
    parser.add_argument(
        "--no-memory-check",
        action="store_true",
        help="try a context that does not fit into the memory; `pykvq plan` says what fits",
    )


def open_session(args: argparse.Namespace, model: Model, n_ctx: int) -> Session:
    """A session of so many tokens; its refusal says how to insist."""
    try:
        with checked():
            return model.session(
                n_ctx=n_ctx,
                memory_check=not args.no_memory_check,
                pin_threads=args.pin_threads,
                **device_options(args),
            )
    except MemoryLimitError as error:
        if args.no_memory_check or " but only " not in str(error):  # what refused is no check
            raise
        raise UsageError(f"{error} --no-memory-check tries it anyway.") from error


def device_note(model: Model, s: SessionStats) -> str:
    """What runs where, in words."""
    threads = f"{s.isa}, {s.n_threads} thread{'s' if s.n_threads > 1 else ''}"
    if s.gpu is None:
        return threads
    rest = "" if s.gpu_head else f", the rest on the CPU ({threads})"
    return f"{gpu_note(model, s)}{rest}"


def say_why_cpu(args: argparse.Namespace, s: SessionStats) -> None:
    """Says why --device auto took the CPU, where that may surprise: a GPU is there, or -ngl given.

    Args:
        args: With the options of `add_device`.
        s: What became of them.
    """
    from pykvq.native_device import devices

    if args.device != "auto" or s.gpu is not None or args.n_gpu_layers == 0:
        return
    try:
        here = devices()
    except DeviceError as error:
        why: str | None = str(error)
    else:
        why = here.why_none if args.n_gpu_layers else None
        if here.found:
            refusals = [device.why_not for device in here.found if not device.usable]
            idle = "--kv-topk works on the CPU only." if s.kv_topk else "No layer fits a GPU."
            why = refusals[0] if len(refusals) == len(here.found) else idle
    if why is not None:
        notice(f"All layers run on the CPU. {why}")


def gpu_note(model: Model, s: SessionStats) -> str:
    """What a GPU has, in words."""
    n = model.info.n_layers
    layers = f"all {n} layers" if s.n_gpu_layers == n else f"{s.n_gpu_layers} of {n} layers"
    return f"{layers}{' and the output' if s.gpu_head else ''} on CUDA device {s.gpu}"


def kv_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_kv` and `add_topk` as arguments for `Model.session`, but for `kv`."""
    return {
        "kv_window": args.kv_window,
        "kv_sinks": args.kv_sinks,
        "kv_bits": args.kv_bits,
        **({"kv_topk": args.kv_topk} if "kv_topk" in args else {}),
        "asymkv_layers": args.asymkv_layers,
    }


def session_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_session` as arguments for `Model` and `Model.session`, but for `kv`."""
    return {
        "n_batch": args.batch_size,
        "n_threads": args.threads,
        **kv_options(args),
    }


def context_size(args: argparse.Namespace, model: Model, otherwise: int) -> int:
    """Tokens of context: what -c says, else `otherwise` as far as the model was trained for it."""
    trained = model.info.n_ctx_train
    if args.ctx_size is None:
        return min(trained, otherwise)
    if args.ctx_size > trained:
        warn(
            f"The context of {args.ctx_size} tokens exceeds the {trained} that the model was"
            " trained on; what it writes beyond them may make no sense."
        )
    return args.ctx_size or trained


@contextlib.contextmanager
def open_model(args: argparse.Namespace, **options: Any) -> Iterator[Model]:
    """The model that was named, open; fetching it shows progress."""
    from pykvq.catalogue import is_cached
    from pykvq.model import Model

    name = model_name(args)
    assert name is not None  # only commands with a default come here
    profile = getattr(args, "profile", None)  # commands without sessions do not have it
    with ProgressBar() as progress:
        with checked():
            model = Model(
                name, progress=progress, profile=False if profile == "none" else profile, **options
            )
        with model:
            try:
                yield model
            except LogitsError as error:
                known = is_cached(name, model.info.path)
                hint = f" `pykvq pull {name}` fetches its file anew if it is damaged."
                raise UsageError(f"{error}{hint if known else ''}") from error


# ---- single commands ------------------------------------------------------------------------


def add_tokenize(parser: argparse.ArgumentParser) -> None:
    """What `tokenize` shows."""
    parser.add_argument("--ids", action="store_true", help="print only a list of ids")
    parser.add_argument(
        "--no-special", action="store_true", help="add no BOS or EOS where the model wants them"
    )
    parser.add_argument(
        "--parse-special", action="store_true", help="let <|names|> in the text be control tokens"
    )
    parser.add_argument("--show-count", action="store_true", help="print the number of tokens too")


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """What `calibrate` reads and writes."""
    parser.add_argument(
        "-f",
        "--file",
        dest="files",
        action="append",
        required=True,
        metavar="PATH",
        help="a text to calibrate on; may be given several times",
    )
    parser.add_argument(
        "-n",
        "--tokens",
        type=count(1),
        default=CALIBRATE_TOKENS,
        metavar="N",
        help="tokens to read, the same number of each text, in whole chunks of -c"
        f" (default: {CALIBRATE_TOKENS})",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="where to write the profile (default: X.kvprofile.gguf beside the model X.gguf)",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--sensitivity-chunks",
        type=count(1),
        default=SENSITIVITY_CHUNKS,
        metavar="N",
        help="chunks of up to 1024 tokens to measure the sensitivities of layers on, which takes"
        f" most of the time (default: {SENSITIVITY_CHUNKS})",
    )
    group.add_argument(
        "--no-sensitivities",
        dest="sensitivity_chunks",
        action="store_const",
        const=0,
        help="take all layers to be equally sensitive",
    )
    add_context(parser, f"{CALIBRATE_CONTEXT}, at most as it was trained")
    add_threads(parser)


def add_perplexity(parser: argparse.ArgumentParser) -> None:
    """What `perplexity` measures."""
    parser.add_argument(
        "--chunks", type=count(1), metavar="N", help="chunks of -c tokens to read (default: all)"
    )
    parser.add_argument(
        "--kld", action="store_true", help="compare with the f16 cache: divergence and top-1"
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="read as if token by token, so that every score goes through the sealed cache;"
        " without it passes of -b tokens see their own tokens in f16",
    )


def add_eval(parser: argparse.ArgumentParser) -> None:
    """What `eval` compares, on which text and tasks."""
    from pykvq.eval.options import TASKS, Options

    default = Options()
    parser.add_argument(
        "-f", "--file", metavar="PATH", help="the text that all tasks are made from"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="keep the results in this file as they come; what it already holds is not done again",
    )
    parser.add_argument("--plot", metavar="DIR", help="write plots there (needs matplotlib)")

    group = parser.add_argument_group("schemes")
    group.add_argument(
        "--kv",
        default=DEFAULT_KV,
        metavar="NAME,...",
        help="names of KV schemes or of simulated ones, divided by commas; NAME:BITS, as in"
        " auto:1.5, for those with a budget of bits; all: every one"
        f" (default: {DEFAULT_KV}); f16 always takes part",
    )
    group.add_argument(
        "--kv-sinks",
        type=count(0),
        metavar="N",
        help=f"first tokens that all schemes keep in f16 (default: {default.kv_sinks})",
    )
    group.add_argument(
        "--kv-window",
        type=count(0),
        metavar="N",
        help=f"last tokens that all schemes keep in f16 (default: {default.kv_window})",
    )
    group.add_argument(
        "--own-setting",
        action="store_true",
        help="let each scheme keep the sinks and the window of its own paper or project instead",
    )
    group.add_argument(
        "--calibration-text", metavar="PATH", help="what simulated schemes are calibrated on"
    )
    group.add_argument(
        "--calibration-tokens",
        type=count(1),
        metavar="N",
        help=f"how much of it (default: {default.calibration_tokens} tokens)",
    )
    add_profile(group)

    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--tasks",
        default=",".join(default.tasks),
        metavar="NAME,...",
        help=f"any of {', '.join(TASKS)} (default: {','.join(default.tasks)})",
    )
    add_context(group, f"{default.n_ctx}, at most as it was trained")
    parser.set_defaults(default_context=default.n_ctx)
    group.add_argument(
        "-b",
        "--batch-size",
        type=count(1),
        metavar="N",
        help=f"chunked: tokens per pass (default: {default.n_batch})",
    )
    for flag, least, what, value in (
        ("--chunks", 1, "kl, chunked: chunks of -c tokens to read", default.chunks),
        ("--at", 1, "a second context to state bits and bytes at", default.at),
        ("--prompts", 1, "generation: prompts", default.prompts),
        ("--prompt-tokens", 2, "generation: tokens of each prompt", default.n_prompt),
        ("--predict", 1, "generation: tokens to write after each", default.n_tokens),
        ("--trials", 1, "needle, retrieval: prompts of each kind", default.trials),
        ("--seed", 0, "needle, retrieval: seed of what is random", default.seed),
    ):
        group.add_argument(flag, type=count(least), metavar="N", help=f"{what} (default: {value})")
    for flag, of, what, values in (
        ("--lengths", count(1), "tokens of their prompts", default.lengths),
        ("--depths", number, "where what is asked for stands, in percent", default.depths),
    ):
        group.add_argument(
            flag,
            type=_several(of),
            metavar="N,...",
            help=f"needle, retrieval: {what} (default: {','.join(map(str, values))})",
        )
    add_threads(group)


def comma_separated(text: str) -> list[str]:
    """The words of a list that is divided by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _several(of: Any) -> Any:
    """A type for argparse: values divided by commas."""

    def parse(text: str) -> list[Any]:
        return [of(word) for word in comma_separated(text)]

    return parse
