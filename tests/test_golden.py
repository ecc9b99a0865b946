"""The numbers that a model gives, against float32 references and the frozen bytes of the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import log_softmax
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from pykvq import KvqError, Model, native
from pykvq.catalogue import resolve

VECTORS = Path(__file__).parent / "vectors"

#: Catalogue name -> file of golden logits.
GOLDEN = {
    "smollm2": "smollm2-135m-instruct.q4_1.npz",
    "qwen2.5-coder-0.5b": "qwen2.5-coder-0.5b-instruct.q4_k_m.npz",
}
TEXTS = ("wiki", "novel", "code", "multilingual")


@pytest.fixture(scope="module", params=GOLDEN)
def golden(
    request: pytest.FixtureRequest, data_dir: Path
) -> tuple[Path, dict[str, npt.NDArray[np.generic]]]:
    try:
        path = resolve(request.param, offline=True)
    except KvqError as error:
        pytest.skip(f"{request.param} is not in the cache: {error}")
    with np.load(data_dir / "golden" / GOLDEN[request.param]) as arrays:
        return path, dict(arrays)


@pytest.mark.parametrize("text", TEXTS)
def test_f16_cache_gives_the_float32_logits(
    golden: tuple[Path, dict[str, npt.NDArray[np.generic]]], text: str
) -> None:
    """KL over the 64 likeliest tokens, the rest as one bin; 8-bit activations cost 2e-4 to 6e-3."""
    path, arrays = golden
    ids = arrays[f"{text}.ids"].astype(np.int32)
    top_ids = arrays[f"{text}.top_ids"].astype(np.int64)
    top = arrays[f"{text}.top_logprobs"].astype(np.float64)
    with Model(path, kv="f16", n_ctx=len(ids)) as model, model.session() as session:
        ours = log_softmax(session.eval(ids, logits="all"))[: len(top)]
    at_top = np.take_along_axis(ours, top_ids, axis=1)
    p_rest = np.clip(1 - np.exp(top).sum(axis=1), 1e-12, None)
    q_rest = np.clip(1 - np.exp(at_top).sum(axis=1), 1e-12, None)
    kl = (np.exp(top) * (top - at_top)).sum(axis=1) + p_rest * np.log(p_rest / q_rest)
    assert kl.mean() < 1e-4
    assert (ours.argmax(axis=1) == top_ids[:, 0]).mean() >= 0.99


def test_q8_0_and_q4_0_blocks_are_ggmls() -> None:
    """The frozen blocks of both codecs equal what the gguf package makes of the same rows."""
    data = (VECTORS / "kv_blocks.bin").read_bytes()
    n_rows, d = 64, 64
    rows = np.frombuffer(data, np.float16, n_rows * d).astype(np.float32)
    at = n_rows * d * 2 + n_rows * d * 2  # the rows, then the block of codec f16
    for kind, bytes_per_32 in ((GGMLQuantizationType.Q8_0, 34), (GGMLQuantizationType.Q4_0, 18)):
        size = n_rows * d // 32 * bytes_per_32
        expected = quantize(rows.reshape(n_rows, d), kind).tobytes()
        assert data[at : at + size] == expected
        at += size


@pytest.mark.parametrize(("kv", "limit"), [("f16", 1e-6), ("q8_0", 1e-4), ("skvq", 0.02)])
def test_fast_path_agrees_with_the_reference(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, kv: str, limit: float
) -> None:
    """KL of the logits of every instruction set from those of KVQ_ISA=ref, sealed blocks included.

    Under a lossy scheme the last bit of a key decides now and then which code it gets, so two exact
    ways to compute it differ by more than rounding.
    """
    tokens = np.random.default_rng(5).integers(0, 256, 220).astype(np.int32)
    logits = {}
    for isa in native.isa_available():
        monkeypatch.setenv("KVQ_ISA", isa)
        with Model(tiny_path, kv=kv, n_ctx=256) as model, model.session(kv_window=0) as session:
            assert session.stats.isa == isa
            pieces = [session.eval([token]) for token in tokens]
        logits[isa] = log_softmax(np.concatenate(pieces))
    for other in logits.values():
        kl = (np.exp(logits["ref"]) * (logits["ref"] - other)).sum(axis=1)
        assert kl.mean() < limit
