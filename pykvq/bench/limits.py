"""What a token costs at least: bytes to read and operations to do, and what the machine can do.

Bytes and operations are those that the task needs, each byte of weights and cache once, whatever
an engine really reads; so the same limit holds for every engine with the same cache.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pykvq import native
from pykvq.errors import KvqError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pykvq.model import Model
    from pykvq.native import Tensor


@dataclass(frozen=True)
class Limits:
    """What the machine was measured to do at most, with the threads that are timed.

    Attributes:
        isa: The instruction set of the arithmetic.
        n_threads: Threads.
        read_bytes: Bytes read from memory per second.
        int8_operations: Operations on 8-bit integers per second, two for each product that is
            summed; None where the instruction set has no measure of it.
        int16_operations: The same of 16-bit integers.
    """

    isa: str
    n_threads: int
    read_bytes: float
    int8_operations: float | None
    int16_operations: float | None

    def least_seconds(self, n_bytes: float, operations: float) -> float:
        """How long so much work takes at least: the longer of reading and computing."""
        computing = operations / self.int8_operations if self.int8_operations else 0.0
        return max(n_bytes / self.read_bytes, computing)


def measure(n_threads: int | None, n_bytes: int = 0) -> Limits:
    """Measures the machine, which takes some seconds.

    It is done in a process of its own, so that the buffer is not part of the most memory that this
    one ever held.

    Args:
        n_threads: Threads; None: one per processor.
        n_bytes: Size of the buffer that is read; 0: 512 MiB, to exceed the caches.

    Raises:
        ValueError: A number is out of range.
        MemoryLimitError: There is no memory for the buffer.
        KvqError: The process that measures was killed.

    Like all that starts processes anew, a script has to call it below `if __name__ == "__main__"`.
    """
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
            return process.submit(measure_here, n_threads, n_bytes).result()
    except BrokenProcessPool as error:
        raise KvqError(
            "The process that measures the machine was killed, perhaps for want of memory."
        ) from error


def measure_here(n_threads: int | None, n_bytes: int = 0) -> Limits:
    """The same in this process; see `measure`."""
    raw = native.measure_machine(n_threads or 0, n_bytes)
    return Limits(
        isa=native.isa_selected(),
        n_threads=int(raw.n_threads),
        read_bytes=float(raw.read_bytes),
        int8_operations=float(raw.int8_operations) or None,
        int16_operations=float(raw.int16_operations) or None,
    )


@dataclass(frozen=True)
class Work:
    """What one token needs of the weights, and of each token before it.

    Attributes:
        weight_bytes: Weights that are read for a token generated alone.
        weight_operations: Operations of the products with them, two per weight.
        output_operations: Those among them of the output matrix, which a prompt needs once.
        attention_operations: Operations per token of context.
    """

    weight_bytes: int
    weight_operations: int
    output_operations: int
    attention_operations: int

    def of_prompt(self, n: int, depth: int) -> float:
        """Operations of a prompt of n tokens after `depth` others; logits for the last one."""
        weights = n * (self.weight_operations - self.output_operations) + self.output_operations
        return weights + self.attention_operations * n * (depth + (n + 1) / 2)

    def of_token(self, context: float) -> float:
        """Operations of one token that sees `context` tokens, itself included."""
        return self.weight_operations + self.attention_operations * context


def work_of(model: Model) -> Work:
    """What a token needs. An embedding that is not the output matrix too is looked up, not read."""
    tensors = {tensor.name: tensor for tensor in model.tensors}
    output = tensors.get("output.weight", tensors["token_embd.weight"])
    read = [t for t in tensors.values() if t.name != "token_embd.weight" or t is output]
    info = model.info
    return Work(
        weight_bytes=sum(tensor.n_bytes for tensor in read),
        weight_operations=2 * _products(read),
        output_operations=2 * _products([output]),
        # a product and a sum per channel, for the score and for the sum of values
        attention_operations=4 * info.n_layers * info.n_heads * info.d_head,
    )


def _products(tensors: Iterable[Tensor]) -> int:
    """Products of one token with these weights; vectors are not multiplied as matrices are."""
    return sum(tensor.shape[0] * tensor.shape[1] for tensor in tensors if len(tensor.shape) > 1)
