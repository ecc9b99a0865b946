"""The parameters of sampling: names and defaults of llama.cpp, and what values they may take.

`pykvq.sampling` gives them their meaning.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

__all__ = ["DEFAULT_CHAIN", "SamplingParams"]

#: All samplers by llama.cpp's names, in the order in which its default chain runs them.
DEFAULT_CHAIN = (
    "penalties",
    "dry",
    "top_n_sigma",
    "top_k",
    "typ_p",
    "top_p",
    "min_p",
    "xtc",
    "temperature",
)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a token; names and defaults are llama.cpp's.

    Attributes:
        seed: Seed of the random numbers; -1 takes a fresh one (`Sampler.seed` tells which).
        temp: Temperature; 0 or less is greedy, whatever the chain: the largest logit
            after bias, penalties and DRY.
        top_k: Keep the k most likely; 0 or -1 is off.
        top_p: Keep the fewest most likely tokens whose probabilities reach p (Holtzman et al.
            2019, arXiv 1904.09751); 1 is off.
        min_p: Keep tokens at least min_p times as likely as the most likely one (Nguyen et al.
            2024, arXiv 2407.01082); 0 is off.
        typical_p: Keep the tokens whose surprise is nearest to the entropy, up to this mass
            (Meister et al. 2022, arXiv 2202.00666); 1 is off.
        top_n_sigma: Keep logits within n standard deviations of the largest (Tang et al. 2024,
            arXiv 2411.07641); 0 or less is off.
        xtc_probability: Chance, for each token, that XTC acts; 0 is off.
        xtc_threshold: Of the tokens at least this likely XTC leaves only the least likely; above
            0.5 there is never more than one, so that is off.
        repeat_last_n: The penalties look at so many last tokens; 0 is off, -1 is all of them.
        repeat_penalty: Divides a positive logit of a seen token, multiplies a negative one
            (Keskar et al. 2019, arXiv 1909.05858); 1 is off.
        presence_penalty: Subtracted from the logit of a seen token.
        frequency_penalty: Subtracted as often as the token was seen.
        dry_multiplier: Strength of DRY, which penalizes a token by how long a repetition it would
            continue; 0 is off.
        dry_base: The penalty of DRY is multiplier * base^(length - allowed_length).
        dry_allowed_length: Repetitions shorter than this are free.
        dry_penalty_last_n: DRY looks at so many last tokens; 0 is off, -1 is all of them.
        dry_sequence_breakers: A repetition is not followed across these strings.
        logit_bias: Added to the logit of a token id; `-inf` bans the token.
        ignore_eos: Ban all end-of-generation tokens.
        min_keep: top_p, min_p, typ_p and xtc leave at least so many candidates.
        samplers: The chain, as names of samplers in the order they run in.

    Raises:
        ValueError: If a value is not of its kind or out of its range.
    """

    seed: int = -1
    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    repeat_last_n: int = 64
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    ignore_eos: bool = False
    min_keep: int = 0
    samplers: tuple[str, ...] = DEFAULT_CHAIN

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            object.__setattr__(self, spec.name, _RULES[spec.name](spec.name, value))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken and no random number is drawn."""
        return self.temp <= 0.0


_Rule = Callable[[str, Any], Any]


def _refuse(name: str, value: object, expected: str) -> ValueError:
    return ValueError(f"The sampling parameter {name} is {value!r}, but it must be {expected}.")


def _integer(low: int, expected: str) -> _Rule:
    def rule(name: str, value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            raise _refuse(name, value, expected) from None
        if isinstance(value, bool) or number < low:
            raise _refuse(name, value, expected)
        return number

    return rule


def _real(accept: Callable[[float], bool], expected: str) -> _Rule:
    def rule(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise _refuse(name, value, expected)
        number = float(value)
        if not (math.isfinite(number) and accept(number)):
            raise _refuse(name, value, expected)
        return number

    return rule


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise _refuse(name, value, "True or False")
    return bool(value)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    expected = "a sequence of non-empty strings"
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise _refuse(name, value, expected)
    items = tuple(value)
    if not all(isinstance(item, str) and item for item in items):
        raise _refuse(name, value, expected)
    return items


def _sampler_names(name: str, value: Any) -> tuple[str, ...]:
    names = _strings(name, value)
    for item in names:
        if item not in DEFAULT_CHAIN:
            raise ValueError(
                f"The sampling parameter {name} names the sampler {item!r}, but the known samplers"
                f" are {', '.join(DEFAULT_CHAIN)}."
            )
    return names


def _bias(name: str, value: Any) -> dict[int, float]:
    expected = "a mapping of token ids to finite numbers or -inf"
    if not isinstance(value, Mapping):
        raise _refuse(name, value, expected)
    bias: dict[int, float] = {}
    for token, amount in value.items():
        if isinstance(amount, bool) or not isinstance(amount, numbers.Real):
            raise _refuse(f"{name}[{token!r}]", amount, "a finite number or -inf")
        if math.isnan(amount) or amount == math.inf:
            raise _refuse(f"{name}[{token!r}]", amount, "a finite number or -inf")
        bias[_integer(0, "a token id, at least 0")(f"{name} key", token)] = float(amount)
    return bias


_ANY = _real(lambda x: True, "a finite number")
_FRACTION = _real(lambda x: 0.0 <= x <= 1.0, "a number from 0 to 1")
_WINDOW = _integer(-1, "a whole number of tokens, 0 for off or -1 for all")

#: What each field accepts. A rule returns the value in its own type.
_RULES: Mapping[str, _Rule] = {
    "seed": _integer(-1, "a whole number of at least 0, or -1 for a random one"),
    "temp": _ANY,
    "top_k": _integer(-1, "a whole number of tokens, 0 or -1 for off"),
    "top_p": _FRACTION,
    "min_p": _FRACTION,
    "typical_p": _FRACTION,
    "top_n_sigma": _ANY,
    "xtc_probability": _FRACTION,
    "xtc_threshold": _FRACTION,
    "repeat_last_n": _WINDOW,
    "repeat_penalty": _real(lambda x: x > 0.0, "a number above 0"),
    "presence_penalty": _ANY,
    "frequency_penalty": _ANY,
    "dry_multiplier": _real(lambda x: x >= 0.0, "a number of at least 0"),
    "dry_base": _real(lambda x: x >= 1.0, "a number of at least 1"),
    "dry_allowed_length": _integer(0, "a whole number of tokens, at least 0"),
    "dry_penalty_last_n": _WINDOW,
    "dry_sequence_breakers": _strings,
    "logit_bias": _bias,
    "ignore_eos": _boolean,
    "min_keep": _integer(0, "a whole number of tokens, at least 0"),
    "samplers": _sampler_names,
}
