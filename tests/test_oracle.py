"""Logits against llama.cpp on models with random weights, where `llama_cpp` is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import log_softmax, write_tiny
from gguf import GGUFReader, GGUFWriter

from pykvq import Model

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python (extra `oracle`) is absent")

TOKENS = np.random.default_rng(3).integers(0, 256, 200).astype(np.int32)


#: The ways in which files say that positions are scaled.
SCALED: dict[str, dict[str, object]] = {
    "linear": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    "only a factor": {"llama.rope.scaling.factor": 4.0},
    "only the old key": {"llama.rope.scale_linear": 4.0},
    "both keys": {"llama.rope.scaling.factor": 2.0, "llama.rope.scale_linear": 4.0},
    "none in spite of a factor": {
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 4.0,
    },
}


def with_rope_freqs(source: Path, path: Path) -> Path:
    """The same model with frequency factors, as Llama 3.1 has them."""
    reader = GGUFReader(source)
    writer = GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        writer.add_key_value(
            name, field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None
        )
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=["llama", "qwen2", "wide heads", "rope factors", *SCALED])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("oracle") / "model.gguf"
    if request.param == "qwen2":
        return write_tiny(path, "qwen2", d_head=16)  # llama.cpp wants heads * width = d_model
    if request.param == "wide heads":
        return write_tiny(path, d_head=96)
    if request.param in SCALED:
        return write_tiny(path, extra=SCALED[request.param])
    if request.param == "rope factors":
        return with_rope_freqs(write_tiny(path.with_name("plain.gguf")), path)
    return write_tiny(path)


def test_logits_are_llama_cpps(model_path: Path) -> None:
    theirs = llama_cpp.Llama(
        str(model_path), n_ctx=256, logits_all=True, verbose=False, n_threads=2
    )
    theirs.eval(TOKENS.tolist())
    expected = log_softmax(theirs.scores[: len(TOKENS)])
    with Model(model_path, kv="f16", n_ctx=256) as model, model.session() as session:
        ours = log_softmax(session.eval(TOKENS, logits="all"))
    ours = ours[:, : expected.shape[1]]
    kl = (np.exp(expected) * (expected - ours)).sum(axis=1)
    # llama.cpp rounds activations to 8 bits; a wrong pairing or frequency of RoPE gives over 0.1.
    assert kl.mean() < 0.01, kl.mean()
    assert (ours.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9
