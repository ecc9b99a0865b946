"""How results compare: of one depth with depth 0, and of pykvq with a peer.

Knows only the results' JSON.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pykvq.bench.options import Options

Json = dict[str, Any]

#: The two tests.
GENERATION, PROMPT = "generation", "prompt"

#: The ratio of what a token takes longer at a depth than at depth 0.
ATTENTION = "attention"

#: The name of the peer's best setting of all that took part.
BEST = "best"

#: What a depth adds is lost in noise if, in the median, it differs from its median by more than
#: this part of it.
NOISE = 0.25

_TIME = "ms_per_token"
_OVER = "ms_over_depth_0"


def add_depth_costs(results: Sequence[Json]) -> None:
    """Adds to every result how much longer a token takes than at depth 0.

    It is the median over repetitions, each of which has its own time at depth 0; None at depth 0,
    for prompts, and where it is lost in noise.
    """
    for r in results:
        over = [
            (deep - at_0) / r["n_tokens"] / 1e6
            for deep, at_0 in zip(r["samples_ns"], r["samples_ns_at_depth_0"], strict=False)
        ]
        middle = statistics.median(over) if over else 0.0
        strayed = statistics.median(abs(ms - middle) for ms in over) if over else 0.0
        r[_OVER] = middle if middle > 0 and strayed <= NOISE * middle else None


def ratios(results: Sequence[Json], options: Options) -> Json:
    """How many times as fast pykvq is as the peer: above 1, pykvq is faster.

    Args:
        results: All results, with their costs of depth.
        options: What was timed.

    Returns:
        `ratios`: by kind (generation, prompt, attention) and depth, of the first scheme against the
        peer's best setting for that test and depth; `ratios_by`: the same by scheme and by the
        type of the peer's cache, "best" being the best of all; `peer_best`: by test and depth, the
        setting that was the peer's best. The kind attention compares what generation takes
        longer than at depth 0. A ratio that cannot be had (a cost of depth that is lost in noise)
        is None.
    """
    caches = [BEST, *dict.fromkeys(options.peer_kv)]
    by = {
        kv: {cache: _compare(results, kv, cache) for cache in caches}
        for kv in dict.fromkeys(options.kv)
    }
    return {
        "ratios": by[options.kv[0]][BEST],
        "ratios_by": by,
        "peer_best": {
            test: {str(depth): fastest["setting"] for depth, fastest in _fastest(results, test)}
            for test in (GENERATION, PROMPT)
        },
    }


def _fastest(results: Iterable[Json], test: str) -> list[tuple[int, Json]]:
    """The peer's fastest result of a test, by depth."""
    theirs = [r for r in results if r["engine"] != "pykvq" and r["test"] == test]
    depths = sorted({r["depth"] for r in theirs})
    return [
        (depth, min((r for r in theirs if r["depth"] == depth), key=lambda r: float(r[_TIME])))
        for depth in depths
    ]


def _compare(results: Sequence[Json], kv: str, cache: str) -> Json:
    """Ratios of one scheme against one type of the peer's cache, by kind and depth."""
    ours = [r for r in results if r["engine"] == "pykvq" and r["kv"] == kv]
    theirs = [r for r in results if r["engine"] != "pykvq" and cache in (BEST, r["kv"])]

    def by_depth(test: str, key: str, keep: Callable[[int], bool]) -> Json:
        found: Json = {}
        for r in ours:
            if r["test"] == test and keep(r["depth"]):
                others = [s for s in theirs if s["test"] == test and s["depth"] == r["depth"]]
                found[str(r["depth"])] = _ratio([s[key] for s in others], r[key])
        return found

    return {
        GENERATION: by_depth(GENERATION, _TIME, lambda depth: True),
        PROMPT: by_depth(PROMPT, _TIME, lambda depth: True),
        ATTENTION: by_depth(GENERATION, _OVER, lambda depth: depth > 0),
    }


def _ratio(theirs: Iterable[float | None], ours: float | None) -> float | None:
    """The peer's least time over ours, of those that are known."""
    known = [time for time in theirs if time is not None]
    return min(known) / ours if known and ours is not None else None
