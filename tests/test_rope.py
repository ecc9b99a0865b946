"""What the core says of RoPE: which channels it turns, and how fast."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import write_tiny

from pykvq import Model, native
from pykvq._native import ffi, lib
from pykvq.moments import Rope

D = 64


@pytest.mark.parametrize(
    ("architecture", "extra", "base", "n_rotated", "divisor"),
    [
        ("llama", {}, 10000.0, 64, 1.0),
        ("llama", {"rope.freq_base": 500.0, "rope.dimension_count": 48}, 500.0, 48, 1.0),
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 10000.0, 64, 4.0),
        ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 10000.0, 64, 1.0),
        ("llama", {"rope.scale_linear": 2.0}, 10000.0, 64, 2.0),
        ("qwen2", {"rope.freq_base": 1e6}, 1e6, 64, 1.0),
        ("qwen2", {"rope.dimension_count": 32}, 10000.0, 32, 1.0),
    ],
)
def test_pairs_and_frequencies_are_those_of_the_metadata(
    architecture: str,
    extra: dict[str, object],
    base: float,
    n_rotated: int,
    divisor: float,
    tmp_path: Path,
) -> None:
    keys = {f"{architecture}.{key}": value for key, value in extra.items()}
    path = write_tiny(tmp_path / "model.gguf", architecture, extra=keys)
    with Model(path) as model:
        pairs, rope = model.rope, Rope.of(model)
        assert len(pairs) == n_rotated // 2
        for i, pair in enumerate(pairs):
            channels = (2 * i, 2 * i + 1) if architecture == "llama" else (i, i + n_rotated // 2)
            assert pair[:2] == channels
            assert pair.frequency == pytest.approx(
                base ** (-2 * i / n_rotated) / divisor, rel=1e-12
            )
        assert np.array_equal(rope.first, [pair.first for pair in pairs])
        assert np.array_equal(rope.second, [pair.second for pair in pairs])
        assert np.array_equal(rope.frequencies, [pair.frequency for pair in pairs])
        every = rope.pairs(D)
        assert sorted(every.ravel()) == list(range(D))


def test_there_is_no_pair_beyond_the_last(tiny: Model) -> None:
    out = ffi.new("kvq_rope_pair *")
    pointer = tiny._handle.pointer
    for index in (-1, 32):
        with pytest.raises(ValueError, match=f"RoPE pair {index} does not exist; there are 32"):
            native.check(lib.kvq_model_rope(pointer, index, out))
    native.check(lib.kvq_model_rope(pointer, 31, out))
