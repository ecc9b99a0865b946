"""What can be asked of a benchmark, and what it does unless asked.

Imports nothing heavy: the command line reads the defaults from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pykvq.checks import SESSION_RANGES, whole_number

#: Other runtimes that can be run beside pykvq.
PEERS = ("llama.cpp",)

#: Types of llama.cpp's KV cache that can be asked for.
PEER_CACHES = ("f16", "q8_0", "q4_0")

#: How a benchmark can be printed.
FORMATS = ("md", "json", "jsonl", "csv")

#: Tokens of a depth that are really evaluated where --fill is given.
FILL_FROM = 2048


@dataclass(frozen=True)
class Options:
    """What to time.

    Attributes:
        kv: KV schemes, each as NAME or, of those with a budget of bits, as NAME:BITS.
        n_prompt: Tokens of a prompt; 0: prompts are not timed.
        n_gen: Tokens generated one by one; 0: generation is not timed.
        depths: Tokens in the cache before each of them.
        prompt_depth: The deepest at which prompts are timed too; None: all.
        repetitions: How often each is timed.
        n_threads: Threads; None: one per processor.
        n_batch: Tokens per pass of a prompt.
        device: Where layers run, as for `Model.session`.
        n_gpu_layers: Layers on the GPU; None: all, or as many as fit.
        fill_from: Tokens that are really evaluated on the way to a depth, after which keys and
            values are repeated; None: a depth is reached by a prompt of that many tokens.
        peer: The other runtime; None: none.
        peer_kv: Types of its cache.
    """

    kv: Sequence[str] = ("skvq",)
    n_prompt: int = 512
    n_gen: int = 64
    depths: Sequence[int] = (0,)
    prompt_depth: int | None = None
    repetitions: int = 3
    n_threads: int | None = None
    n_batch: int = 512
    device: str = "auto"
    n_gpu_layers: int | None = None
    fill_from: int | None = None
    peer: str | None = None
    peer_kv: Sequence[str] = ("f16",)

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ValueError: A value is out of range.
        """
        most = SESSION_RANGES["n_ctx"][1]
        for name in ("n_prompt", "n_gen"):
            whole_number(name, getattr(self, name), 0, most)
        if not self.n_prompt and not self.n_gen:
            raise ValueError("n_prompt and n_gen are both 0: there is nothing to time.")
        if not self.depths:
            raise ValueError("There are no depths, expected at least one.")
        for depth in self.depths:
            whole_number("A depth", depth, 0, most)
        if self.prompt_depth is not None:
            whole_number("prompt_depth", self.prompt_depth, 0, most)
        whole_number("repetitions", self.repetitions, 1)
        whole_number("n_batch", self.n_batch, *SESSION_RANGES["n_batch"])
        for name in ("n_threads", "n_gpu_layers"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), *SESSION_RANGES[name])
        if self.fill_from is not None:
            whole_number("fill_from", self.fill_from, 1, most)
        if not self.kv:
            raise ValueError("There is no KV scheme, expected at least one.")
        if self.peer is not None and self.peer not in PEERS:
            raise ValueError(f"The peer {self.peer!r} is unknown; known are: {', '.join(PEERS)}.")
        if not self.peer_kv:
            raise ValueError("There is no KV cache of the peer, expected at least one.")
        for kv in self.peer_kv:
            if kv not in PEER_CACHES:
                raise ValueError(
                    f"The KV cache {kv!r} of the peer is unknown; known are:"
                    f" {', '.join(PEER_CACHES)}."
                )

    @property
    def n_ctx(self) -> int:
        """Tokens of context that all of it takes: one more each before generation is timed."""
        return max(self.depths) + max(self.n_prompt, self.repetitions * (self.n_gen + 1))
