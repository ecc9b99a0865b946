"""What can be asked of an evaluation, and what it does unless asked.

Imports nothing heavy: the command line reads the defaults from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pykvq.checks import SESSION_RANGES, whole_number

#: The names of the tasks.
TASKS = ("kl", "chunked", "generation", "needle", "retrieval")

#: How the command line spells what a record depends on, by the names of `Options` and of tasks.
FLAGS: Mapping[str, str] = {
    "n_ctx": "-c",
    "chunks": "--chunks",
    "n_batch": "-b",
    "at": "--at",
    "kv_sinks": "--kv-sinks",
    "kv_window": "--kv-window",
    "own_setting": "--own-setting",
    "prompts": "--prompts",
    "n_prompt": "--prompt-tokens",
    "n_tokens": "--predict",
    "lengths": "--lengths",
    "depths": "--depths",
    "trials": "--trials",
    "seed": "--seed",
}


@dataclass(frozen=True)
class Options:
    """How to evaluate.

    Attributes:
        tasks: Which tasks; of `TASKS`.
        n_ctx: Tokens per chunk of `kl` and `chunked`, and the context that bits are stated at.
        chunks: Chunks that they read, as far as the text has them.
        n_batch: Tokens per pass of `chunked`.
        at: A second context that bits and bytes are stated at.
        kv_sinks: First tokens that all schemes keep in f16.
        kv_window: Last tokens that they keep in f16.
        own_setting: Whether each scheme keeps its own sinks and window instead.
        prompts: Prompts of `generation`.
        n_prompt: Tokens of each.
        n_tokens: Tokens written after each.
        lengths: Tokens of the prompts of `needle` and `retrieval`.
        depths: Where what is asked for stands in them, from 0 to 100.
        trials: How often each length and depth is tried.
        seed: Of everything that is random in them.
        calibration_tokens: Tokens of the calibration text that are used.
        n_threads: Threads; by default as the model was opened with.
    """

    tasks: Sequence[str] = ("kl",)
    n_ctx: int = 2048
    chunks: int = 16
    n_batch: int = 512
    at: int = 32768
    kv_sinks: int = 5
    kv_window: int = 128
    own_setting: bool = False
    prompts: int = 4
    n_prompt: int = 512
    n_tokens: int = 512
    lengths: Sequence[int] = (1024, 2048, 4096)
    depths: Sequence[float] = (0, 25, 50, 75, 100)
    trials: int = 2
    seed: int = 0
    calibration_tokens: int = 16384
    n_threads: int | None = None

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: A value is out of range.
        """
        for name in ("n_ctx", "n_batch", "kv_sinks", "kv_window"):
            whole_number(name, getattr(self, name), *SESSION_RANGES[name])
        for name in ("chunks", "at", "prompts", "n_tokens", "trials", "calibration_tokens"):
            whole_number(name, getattr(self, name), 1)
        whole_number("n_prompt", self.n_prompt, 2)
        whole_number("seed", self.seed, 0)
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"The task {task!r} is unknown; known are: {', '.join(TASKS)}.")
        if not self.lengths or not self.depths:
            raise ValueError("There are no lengths or no depths, expected at least one of each.")
        for length in self.lengths:
            whole_number("A length", length, 1)
        for depth in self.depths:
            if not 0 <= depth <= 100:
                raise ValueError(f"A depth is {depth}, expected 0 to 100.")
