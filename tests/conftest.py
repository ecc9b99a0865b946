"""Models for tests: small ones with random weights, made here, and real ones where they are."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize
from stand_in import StandIn, is_stand_in, open_stand_in

from pykvq import DownloadError, Model, Session
from pykvq.calibrate import calibrate
from pykvq.profile import beside, write_profile

# Shells let what they start in the background ignore Ctrl-C; tests of it would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: Where sessions of the models of the fixtures run unless a test says otherwise: the CPU, also
#: where there is a GPU. `make cuda-python` says cuda, which is an error where it cannot be had.
DEVICE = os.environ.get("PYKVQ_TEST_DEVICE") or "cpu"

N_CTX_TRAIN = 2048
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MERGES = ("t h", "th e", "\u0120 the", "i n", "e r", "a n", "an d", "\u0120 and", "o u", "r e")
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_alphabet() -> list[str]:
    """How byte-level BPE spells the 256 bytes: those that print as themselves, the rest moved."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    moved = {byte: 0x100 + i for i, byte in enumerate(others)}
    return [chr(moved.get(byte, byte)) for byte in range(256)]


def write_tiny(
    path: Path,
    architecture: str = "llama",
    *,
    d_head: int = 64,
    template: bool = True,
    extra: dict[str, object] | None = None,
    n_padding: int = 0,
    n_tensors_left_out: int = 0,
) -> Path:
    """Writes a model of 2 layers, width 64, 4 heads and 2 KV heads with random weights.

    Args:
        path: The file.
        architecture: "llama" or "qwen2".
        d_head: Width of a head.
        template: Whether it has a chat template.
        extra: Further string, int and float metadata.
        n_padding: Rows of the embedding beyond the vocabulary.
        n_tensors_left_out: Tensors at the end of the directory that are missing.
    """
    rng = np.random.default_rng(7)
    n_layers, d_model, d_ff, n_heads, n_kv_heads = 2, 64, 96, 4, 2
    tokens = [*byte_alphabet(), *(merge.replace(" ", "") for merge in _MERGES), *_SPECIAL]
    n_vocab = len(tokens)
    special = n_vocab - len(_SPECIAL)

    writer = GGUFWriter(path, architecture)
    writer.add_name(f"tiny {architecture}")
    writer.add_block_count(n_layers)
    writer.add_context_length(N_CTX_TRAIN)
    writer.add_embedding_length(d_model)
    writer.add_feed_forward_length(d_ff)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_key_length(d_head)
    writer.add_value_length(d_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * special + [3] * len(_SPECIAL))
    writer.add_token_merges(list(_MERGES))
    writer.add_bos_token_id(special)
    writer.add_eos_token_id(special + 2)
    writer.add_add_bos_token(False)
    if template:
        writer.add_chat_template(CHAT_TEMPLATE)
    for key, value in (extra or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_int32(key, value)
        else:
            writer.add_float32(key, float(str(value)))

    tensors: list[tuple[str, npt.NDArray[np.float32], bool]] = []

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0, q8: bool = True) -> None:
        weights = rng.normal(0, scale / np.sqrt(columns), (rows, columns)).astype(np.float32)
        tensors.append((name, weights, q8))

    def vector(name: str, n: int, mean: float) -> None:
        tensors.append((name, (mean + 0.1 * rng.normal(size=n)).astype(np.float32), False))

    matrix("token_embd.weight", n_vocab + n_padding, d_model, scale=8.0)
    vector("output_norm.weight", d_model, 1.0)
    matrix("output.weight", n_vocab + n_padding, d_model, scale=2.0)
    for layer in range(n_layers):
        b = f"blk.{layer}."
        vector(b + "attn_norm.weight", d_model, 1.0)
        matrix(b + "attn_q.weight", n_heads * d_head, d_model, scale=2.0)
        matrix(b + "attn_k.weight", n_kv_heads * d_head, d_model, scale=2.0)
        matrix(b + "attn_v.weight", n_kv_heads * d_head, d_model)
        matrix(b + "attn_output.weight", d_model, n_heads * d_head)
        if architecture == "qwen2":
            vector(b + "attn_q.bias", n_heads * d_head, 0.0)
            vector(b + "attn_k.bias", n_kv_heads * d_head, 0.0)
            vector(b + "attn_v.bias", n_kv_heads * d_head, 0.0)
        vector(b + "ffn_norm.weight", d_model, 1.0)
        matrix(b + "ffn_gate.weight", d_ff, d_model, q8=False)
        matrix(b + "ffn_up.weight", d_ff, d_model, q8=False)
        matrix(b + "ffn_down.weight", d_model, d_ff, q8=False)
    for name, weights, q8 in tensors[: len(tensors) - n_tensors_left_out]:
        if q8:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_nan(path: Path, tensor: str = "output_norm.weight") -> Path:
    """Writes a model of `write_tiny` of which one tensor, of float32, is NaN everywhere."""
    [found] = [t for t in GGUFReader(write_tiny(path), "r+").tensors if t.name == tensor]
    found.data[:] = np.nan
    return path


def add_profile(path: Path) -> Path:
    """Calibrates a model of `write_tiny` on a short text, so that every scheme can run."""
    with Model(path, n_threads=2) as model:
        text = " ".join(f"and the {i * i % 97} in her" for i in range(200))
        write_profile(beside(path), calibrate(model, [("text", text)], n_tokens=512, n_ctx=256))
    return path


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Log-probabilities, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def row_distances(
    found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Of each row [n_vocab] of logits: the difference, in standard deviations of the expected."""
    difference = np.sqrt(np.square(found - expected).mean(axis=-1))
    return np.asarray(difference / expected.std(axis=-1))


def is_exact(session: Session) -> bool:
    """Whether it does not matter for the result how tokens are cut into passes: on the CPU."""
    return session.stats.gpu is None


def require_same(
    session: Session,
    found: npt.NDArray[np.float32],
    expected: npt.NDArray[np.float32],
) -> None:
    """The same logits [n, n_vocab] of other passes: to the bit, on a GPU but for rounding.

    There, passes of other lengths take products of other precision, and sums in another order:
    0.003 standard deviations were seen.
    """
    if is_exact(session):
        np.testing.assert_array_equal(found, expected)
    assert row_distances(found, expected).max() < 0.006


@pytest.fixture(scope="session", autouse=True)
def nothing_left_on_the_stand_in() -> Iterator[None]:
    """When all tests are done and all models closed, no object of the driver is left."""
    yield
    if is_stand_in():
        gc.collect()  # sessions that tests forgot
        stand_in = open_stand_in()
        assert stand_in.leaks == 0
        assert stand_in.violations == 0


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of test data that is not part of the repository."""
    path = Path(os.environ.get("PYKVQ_DATA") or Path(__file__).parents[1] / "../shared/data")
    if not path.is_dir():
        pytest.skip(f"{path} is absent; PYKVQ_DATA names the folder of test data")
    return path


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with random weights, heads 64 wide, with a profile."""
    return add_profile(write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf"))


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Iterator[Model]:
    """The model of `tiny_path`, to be shared: tests must not close it."""
    with Model(tiny_path, n_threads=2, device=DEVICE) as model:
        yield model


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A qwen2 with random weights, heads 16 wide, and no chat template."""
    path = tmp_path_factory.mktemp("models") / "tiny-qwen2.gguf"
    add_profile(write_tiny(path, "qwen2", d_head=16, template=False))
    with Model(path, n_threads=2, device=DEVICE) as model:
        yield model


@pytest.fixture(scope="session")
def stories_model(data_dir: Path) -> Iterator[Model]:
    """stories260K: a real model of 260,000 weights, trained on stories for children."""
    path = data_dir / "models" / "stories260K.f32.gguf"
    if not path.exists():
        pytest.skip(f"{path} is absent; PYKVQ_DATA names the folder of test data")
    with Model(path, n_threads=2, device=DEVICE) as model:
        yield model


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Model]:
    """SmolLM2 135M, where it was fetched before: tests download nothing."""
    from pykvq.catalogue import resolve

    if is_stand_in():
        pytest.skip("a prompt of SmolLM2 takes minutes on the stand-in for the CUDA driver")
    try:
        path = resolve("smollm2", offline=True)
    except DownloadError:
        pytest.skip("smollm2 is not in the cache; `pykvq pull smollm2` fetches it")
    with Model(path, device=DEVICE) as model:
        yield model


@pytest.fixture(scope="session")
def random_tokens(tiny: Model) -> list[int]:
    """1000 ids of the tiny models, none of which ends a text."""
    rng = np.random.default_rng(3)
    return [int(i) for i in rng.integers(0, 266, 1000)]


@pytest.fixture
def gpu() -> Iterator[StandIn]:
    """The stand-in that KVQ_LIBCUDA names; nothing may be left on it, nor be done to it wrongly.

    Sessions that fixtures of a wider scope hold open are no leaks of the test.
    """
    stand_in = open_stand_in()
    leaks, violations = stand_in.leaks, stand_in.violations
    yield stand_in
    stand_in.set()
    assert stand_in.leaks == leaks
    assert stand_in.violations == violations
