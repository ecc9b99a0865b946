"""The options of the command line that say what to write: its length and form, and the sampling.

They are those of `run` and `chat`, under llama.cpp's names.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from pykvq.cli_options import checked, count, model_text, number

if TYPE_CHECKING:
    from pykvq.sampling_params import SamplingParams

# ---- generation -----------------------------------------------------------------------------


def add_length(parser: argparse._ActionsContainer) -> None:
    """How much to write and where to end."""
    parser.add_argument(
        "-n",
        "--predict",
        "--n-predict",
        type=count(-2),
        default=-1,
        metavar="N",
        help="tokens to write at most; -1: until the model or the context ends (default)",
    )
    parser.add_argument(
        "-r",
        "--reverse-prompt",
        "--stop",
        type=model_text,
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times",
    )


def add_system(parser: argparse._ActionsContainer) -> None:
    """The system message of a conversation."""
    parser.add_argument(
        "-sys",
        "--system-prompt",
        type=model_text,
        metavar="TEXT",
        help="system message of the conversation",
    )


def add_generation(parser: argparse.ArgumentParser) -> None:
    """What to write."""
    add_length(parser)
    add_system(parser)
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "-cnv",
        "--conversation",
        "--chat",
        dest="conversation",
        action="store_true",
        default=None,
        help="answer the prompt, by the chat template (default, if the model has one)",
    )
    form.add_argument(
        "-no-cnv",
        "--no-conversation",
        "--no-chat",
        "--raw",
        dest="conversation",
        action="store_false",
        help="go on with the prompt as it is",
    )


def max_tokens(args: argparse.Namespace) -> int | None:
    """What -n says, as `Session.generate` takes it."""
    return args.predict if args.predict >= 0 else None


# ---- sampling -------------------------------------------------------------------------------


class _Flag(NamedTuple):
    """An option that sets one sampling parameter."""

    flags: str
    field: str
    type: Any
    help: str


_SAMPLING = (
    _Flag("-s --seed", "seed", int, "seed of the random numbers; -1: a fresh one"),
    _Flag("--temp --temperature", "temp", number, "temperature; 0: always the likeliest token"),
    _Flag("--top-k", "top_k", int, "keep the k likeliest tokens; 0: off"),
    _Flag("--top-p", "top_p", number, "keep the fewest tokens of this mass; 1: off"),
    _Flag("--min-p", "min_p", number, "keep tokens this likely beside the likeliest; 0: off"),
    _Flag("--typical --typical-p", "typical_p", number, "locally typical sampling; 1: off"),
    _Flag("--top-nsigma --top-n-sigma", "top_n_sigma", number, "keep logits within n sigma"),
    _Flag("--xtc-probability", "xtc_probability", number, "chance of XTC; 0: off"),
    _Flag("--xtc-threshold", "xtc_threshold", number, "XTC drops tokens above; 1: off"),
    _Flag("--repeat-last-n", "repeat_last_n", int, "tokens that penalties see; 0: off, -1: all"),
    _Flag("--repeat-penalty", "repeat_penalty", number, "penalty of repetition; 1: off"),
    _Flag("--presence-penalty", "presence_penalty", number, "penalty of presence; 0: off"),
    _Flag("--frequency-penalty", "frequency_penalty", number, "penalty of frequency; 0: off"),
    _Flag("--dry-multiplier", "dry_multiplier", number, "strength of DRY; 0: off"),
    _Flag("--dry-base", "dry_base", number, "growth of DRY's penalty"),
    _Flag("--dry-allowed-length", "dry_allowed_length", int, "longest free repetition"),
    _Flag("--dry-penalty-last-n", "dry_penalty_last_n", int, "tokens that DRY sees; -1: all"),
)

#: llama.cpp's letters for `--sampler-seq`, and the names that it takes beside the usual ones.
_SAMPLER_LETTERS = {
    "e": "penalties",
    "d": "dry",
    "s": "top_n_sigma",
    "k": "top_k",
    "y": "typ_p",
    "p": "top_p",
    "m": "min_p",
    "x": "xtc",
    "t": "temperature",
}
_SAMPLER_NAMES = {
    "temp": "temperature",
    "nucleus": "top_p",
    "typical": "typ_p",
    "typical_p": "typ_p",
}


def _samplers(text: str) -> tuple[str, ...]:
    names = [name.strip().replace("-", "_") for name in text.split(";") if name.strip()]
    return tuple(_SAMPLER_NAMES.get(name, name) for name in names)


def _sampler_letters(text: str) -> tuple[str, ...]:
    for letter in text:
        if letter not in _SAMPLER_LETTERS:
            known = ", ".join(f"{key} = {name}" for key, name in _SAMPLER_LETTERS.items())
            raise argparse.ArgumentTypeError(f"{letter!r} is no sampler; known are: {known}")
    return tuple(_SAMPLER_LETTERS[letter] for letter in text)


def _bias(text: str) -> tuple[int, float]:
    found = re.fullmatch(r"(\d+)([+-].+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form ID+BIAS or ID-BIAS")
    return int(found[1]), number(found[2])


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen; what is not given is as the model recommends, else as llama.cpp."""
    group = parser.add_argument_group("sampling")
    for row in _SAMPLING:
        group.add_argument(*row.flags.split(), dest=row.field, type=row.type, help=row.help)
    group.add_argument(
        "--dry-sequence-breaker",
        dest="dry_sequence_breakers",
        type=model_text,
        action="append",
        metavar="TEXT",
        help="repetitions end here, in place of the default ones; several times, or 'none'",
    )
    group.add_argument("--ignore-eos", action="store_true", help="never end the text")
    group.add_argument(
        "-l",
        "--logit-bias",
        action="append",
        type=_bias,
        metavar="ID(+/-)BIAS",
        help="make a token more or less likely; may be given several times",
    )
    chain = group.add_mutually_exclusive_group()
    chain.add_argument(
        "--samplers", type=_samplers, metavar="NAMES", help="the samplers in order, divided by ;"
    )
    chain.add_argument(
        "--sampler-seq",
        "--sampling-seq",
        dest="samplers",
        type=_sampler_letters,
        metavar="LETTERS",
        help="the same, by letters: " + "".join(_SAMPLER_LETTERS),
    )


def sampling_params(args: argparse.Namespace, defaults: SamplingParams) -> SamplingParams:
    """The options of `add_sampling`, for the rest `defaults`."""
    from dataclasses import replace

    given: dict[str, Any] = {row.field: getattr(args, row.field) for row in _SAMPLING}
    given["samplers"] = args.samplers
    given["ignore_eos"] = args.ignore_eos or None
    given["logit_bias"] = dict(args.logit_bias) if args.logit_bias else None
    breakers: list[str] | None = args.dry_sequence_breakers
    given["dry_sequence_breakers"] = () if breakers == ["none"] else breakers
    with checked():
        return replace(defaults, **_given(given))


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
