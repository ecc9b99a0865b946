"""Layers on a CUDA device against the CPU's reference: on the stand-in for the driver, or, where
KVQ_LIBCUDA is not set, on a GPU of this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from random_models import WEIGHT_TYPES, Array, Shape, write_random
from stand_in import StandIn

from pykvq import Model, Session
from pykvq.calibrate import calibrate
from pykvq.native_device import devices
from pykvq.profile import Profile, beside, write_profile

N_PROMPT, N_STEPS = 250, 16  # under a window of 128 a block is sealed at 197, and one at 261
SCHEMES = ("f16", "q8_0", "q4_0", "nqkv", "nqkv-3", "asymkv", "skvq-k2v2", "skvq-g32")

TOKENS = [int(i) for i in np.random.default_rng(3).integers(0, 256, 700)]


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """There is a device, and the CPU's part is that of the reference."""
    if os.environ.get("KVQ_LIBCUDA") or not any(device.usable for device in devices().found):
        request.getfixturevalue("gpu")
    monkeypatch.setenv("KVQ_ISA", "ref")


@pytest.fixture
def model_of(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """Opens a model of a shape."""

    def opened(shape: Shape) -> Model:
        model = Model(write_random(tmp_path / "random.gguf", shape), n_threads=1)
        request.addfinalizer(model.close)
        return model

    return opened


def run(session: Session, prompt: list[int], steps: list[int]) -> Array:
    """The logits after a prompt, and after each token that follows it."""
    rows = [session.eval(prompt)[0], *(session.eval([token])[0] for token in steps)]
    return np.array(rows)


def distance(a: Array, b: Array) -> float:
    """The mean over rows of the mean square difference, in standard deviations of b's row."""
    return float((np.sqrt(np.square(a - b).mean(axis=-1)) / b.std(axis=-1)).mean())


def blocks_of(session: Session, layer: int) -> list[bytes]:
    """All sealed blocks of a layer."""
    n = session.stats.n_tokens_sealed // 64
    sides: tuple[Literal["k", "v"], ...] = ("k", "v")
    return [
        session.sealed_block(layer, head, side, block).tobytes()
        for head in range(session.model.info.n_kv_heads)
        for side in sides
        for block in range(n)
    ]


def require_all_on_gpu(session: Session) -> None:
    stats = session.stats
    assert (stats.gpu, stats.gpu_head) == (0, True)
    assert stats.n_gpu_layers == session.model.info.n_layers
    assert 0 < stats.bytes_gpu_now <= stats.bytes_gpu


def compare(model: Model, kv: str, **options: Any) -> None:
    """The same tokens on both devices, and on the CPU without loss.

    Products round differently on the two (halves on tensor cores, sums in another order): 0.0006
    of the logits' deviation was seen. Where a key lies between two codes it can then take either,
    so lossy schemes may differ by more, but by far less than what sealing itself changes.
    """
    prompt, steps = TOKENS[:N_PROMPT], TOKENS[N_PROMPT : N_PROMPT + N_STEPS]
    with model.session(kv=kv, n_ctx=512, device="cpu", **options) as cpu:
        assert cpu.stats.isa == "ref"
        expected, blocks = run(cpu, prompt, steps), blocks_of(cpu, 0)
    with model.session(kv="f16", n_ctx=512, device="cpu") as lossless:
        loss = distance(expected, run(lossless, prompt, steps))
    with model.session(kv=kv, n_ctx=512, device="cuda", **options) as cuda:
        require_all_on_gpu(cuda)
        found = [cuda.eval(prompt)[0]]
        sealed_by_prompt = cuda.stats.n_tokens_sealed
        found.extend(run(cuda, steps[:1], steps[1:]))
        assert cuda.stats.n_tokens_sealed > sealed_by_prompt > 0
        found_blocks = blocks_of(cuda, 0)
    assert distance(np.array(found), expected) < 0.002 + loss / 4
    best = expected.max(axis=1)
    chosen = expected[np.arange(len(best)), np.argmax(found, axis=1)]
    assert (best - chosen <= (0.02 + loss) * expected.std(axis=1)).all(), "another greedy token"
    assert [len(block) for block in found_blocks] == [len(block) for block in blocks]


# ---- models -----------------------------------------------------------------------------------


def greedy(session: Session, prompt: list[int], n: int) -> tuple[list[int], Array]:
    """The n tokens that follow a prompt, the best each time, and the logits of each."""
    tokens: list[int] = []
    rows = [session.eval(prompt)[0]]
    while len(tokens) < n:
        tokens.append(int(rows[-1].argmax()))
        rows.append(session.eval(tokens[-1:])[0])
    return tokens, np.array(rows[:n])


@pytest.mark.parametrize("d_head", [64, 128])
@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_greedy_tokens_are_those_of_the_reference(model_of: Any, kind: str, d_head: int) -> None:
    """After a prompt of which the device has sealed blocks, with weights of every type.

    Where the two best tokens are closer than what rounding does, either can be taken, so the prompt
    is the first one after which the reference is sure of all its tokens, of which three differ.
    """
    model = model_of(Shape(d_head=d_head, d_model=256, d_ff=256, group=4, weights=kind))
    options: dict[str, Any] = {"kv": "skvq", "n_ctx": 256, "kv_window": 64}
    for seed in range(60):
        prompt = [int(i) for i in np.random.default_rng(seed).integers(0, 256, 200)]
        with model.session(device="cpu", **options) as cpu:
            assert cpu.stats.isa == "ref"
            expected, logits = greedy(cpu, prompt, 6)
        best = np.sort(logits, axis=1)
        lead = (best[:, -1] - best[:, -2]) / logits.std(axis=1)
        if lead.min() > 0.1 and len(set(expected)) >= 3:
            break
    else:
        pytest.fail("the reference is sure of its tokens after none of the prompts")
    with model.session(device="cuda", **options) as cuda:
        require_all_on_gpu(cuda)
        found, found_logits = greedy(cuda, prompt, 6)
        assert cuda.stats.n_tokens_sealed == 128
    assert found == expected
    assert distance(found_logits, logits) < 0.04


@pytest.mark.parametrize("d_head", [64, 80, 96, 128, 256])
def test_heads_of_every_width_attend_as_on_the_cpu(model_of: Any, d_head: int) -> None:
    compare(model_of(Shape(d_head=d_head, n_layers=1)), "skvq")


@pytest.mark.parametrize("group", [1, 3, 4, 7])
@pytest.mark.parametrize("d_head", [64, 128])
def test_heads_that_share_keys_attend_as_on_the_cpu(model_of: Any, d_head: int, group: int) -> None:
    compare(model_of(Shape(d_head=d_head, group=group, n_kv_heads=2, n_layers=1)), "skvq")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_biases_both_ropes_and_tied_outputs_are_as_on_the_cpu(
    model_of: Any, architecture: str, tied: bool
) -> None:
    compare(model_of(Shape(architecture, weights="Q8_0", tied=tied, n_layers=3)), "skvq")


@pytest.mark.parametrize("kv", SCHEMES)
@pytest.mark.parametrize("d_head", [64, 128])
def test_schemes_seal_and_read_as_on_the_cpu(model_of: Any, d_head: int, kv: str) -> None:
    compare(model_of(Shape(d_head=d_head, n_layers=1)), kv)


@pytest.mark.parametrize("kv", ["svdq", "svdq-1.25", "auto"])
def test_schemes_with_a_profile_seal_and_read_as_on_the_cpu(tmp_path: Path, kv: str) -> None:
    path = write_random(tmp_path / "random.gguf", Shape())
    with Model(path, n_threads=2, device="cpu") as model:
        text = " ".join(f"and the {i * i % 97} in her" for i in range(100))
        write_profile(beside(path), calibrate(model, [("text", text)], n_tokens=512, n_ctx=256))
    with Model(path, n_threads=1) as model:
        compare(model, kv)


def sealed_on(model: Model, device: str, kv: str, **options: Any) -> list[bytes]:
    """The blocks of the first layer."""
    with model.session(kv=kv, n_ctx=512, device=device, **options) as session:
        run(session, TOKENS[:N_PROMPT], TOKENS[N_PROMPT : N_PROMPT + N_STEPS])
        blocks = blocks_of(session, 0)
    assert len(blocks) >= 2 * 2 * 2
    return blocks


#: By name, or with what it takes for the first layer to have the other codecs.
SEALING = [
    *(pytest.param(kv, {}, id=kv) for kv in ("skvq", "skvq-k2v2", "f16", "q8_0", "q4_0")),
    *(pytest.param(kv, {}, id=kv) for kv in ("nqkv", "nqkv-3", "nqkv-2", "asymkv-4")),
    *(pytest.param("asymkv", {"asymkv_layers": (n, n)}, id=f"asymkv-{n}") for n in (0, 1)),
]


@pytest.mark.parametrize(("kv", "options"), SEALING)
@pytest.mark.parametrize("d_head", [64, 128])
def test_blocks_have_the_bytes_that_the_cpu_encodes_of_the_same_rows(
    model_of: Any, d_head: int, kv: str, options: dict[str, Any]
) -> None:
    model = model_of(Shape(d_head=d_head, n_kv_heads=2, n_layers=1, exact=True))
    blocks = sealed_on(model, "cpu", kv, **options)
    assert sealed_on(model, "cuda", kv, **options) == blocks


def with_exact_bases(profile: Profile) -> Profile:
    """Bases that only permute and turn signs, and waves that are powers of 2: what devices make of
    a row with them depends neither on the order of sums nor on products fused into them."""
    rng = np.random.default_rng(5)
    arrays = {}
    for name in ("k_basis", "v_basis"):
        basis = np.zeros_like(profile.arrays[name])
        for head in basis.reshape(-1, *basis.shape[-2:]):
            channels = rng.permutation(len(head))
            head[np.arange(len(head)), channels] = rng.choice([-1, 1], len(head))
        arrays[name] = basis
    waves = np.zeros_like(profile.arrays["k_wave"])
    waves[..., :12] = np.exp2(rng.integers(-2, 2, waves[..., :12].shape))  # 6 pairs of at most 8
    return profile.with_arrays(**arrays, k_wave=waves)


@pytest.mark.parametrize("kv", ["svdq", "svdq-1.25", "svdq-steps", "auto"])
@pytest.mark.parametrize("d_head", [64, 128])
def test_blocks_in_bases_of_a_profile_have_the_bytes_that_the_cpu_encodes(
    tmp_path: Path, d_head: int, kv: str
) -> None:
    shape = Shape(d_head=d_head, n_kv_heads=2, n_layers=1, exact=True)
    path = write_random(tmp_path / "random.gguf", shape)
    with Model(path, n_threads=2, device="cpu") as model:
        text = " ".join(f"and the {i * i % 97} in her" for i in range(100))
        profile = calibrate(model, [("text", text)], n_tokens=512, n_ctx=256)
    profile = with_exact_bases(profile)
    still = profile.with_arrays(k_wave=np.zeros_like(profile.arrays["k_wave"]))
    blocks = {}
    for name, kept in (("waves", profile), ("none", still)):
        write_profile(beside(path), kept)
        with Model(path, n_threads=1) as model:
            blocks[name] = sealed_on(model, "cpu", kv)
            assert sealed_on(model, "cuda", kv) == blocks[name]
    assert blocks["waves"] != blocks["none"]


# ---- passes -----------------------------------------------------------------------------------


GRAPH = {"kv": "skvq", "n_ctx": 512, "kv_window": 64}


def test_tokens_that_seal_blocks_and_tokens_that_do_not_are_as_on_the_cpu(model_of: Any) -> None:
    model = model_of(Shape(n_layers=1))
    prompt, steps = TOKENS[:140], TOKENS[140:290]
    with model.session(device="cpu", **GRAPH) as cpu:
        expected, n_sealed = run(cpu, prompt, steps), cpu.stats.n_tokens_sealed
    with model.session(device="cuda", **GRAPH) as cuda:
        found = run(cuda, prompt, steps)
        assert cuda.stats.n_tokens_sealed == n_sealed == 192
    assert distance(found, expected) < 0.05


def test_one_graph_serves_tokens_that_seal_blocks_and_tokens_that_do_not(
    model_of: Any, gpu: StandIn
) -> None:
    steps = TOKENS[140:290]
    with model_of(Shape(n_layers=1)).session(device="cuda", **GRAPH) as session:
        gpu.set()
        run(session, TOKENS[:140], steps)
        assert gpu.calls("cuGraphInstantiateWithFlags") == 1
        assert gpu.calls("cuGraphLaunch") == len(steps) - 1  # the first one loads kernels


def test_layers_whose_output_is_on_the_cpu_are_a_graph_too(model_of: Any, gpu: StandIn) -> None:
    model = model_of(Shape(n_layers=2))
    prompt, steps = TOKENS[:20], TOKENS[20:80]
    with model.session(device="cpu", **GRAPH) as session:
        expected = run(session, prompt, steps)
    with model.session(device="cuda", n_gpu_layers=1, **GRAPH) as session:
        gpu.set()
        found = run(session, prompt, steps)
        assert gpu.calls("cuGraphLaunch") == len(steps) - 1
    assert distance(found, expected) < 0.05


@pytest.mark.parametrize("kv", ["f16", "skvq"])
@pytest.mark.parametrize("n_kv_heads", [1, 3])
def test_contexts_that_many_processors_share_are_as_on_the_cpu(
    model_of: Any, gpu: StandIn, n_kv_heads: int, kv: str
) -> None:
    gpu.set(PROCESSORS=132)  # one head's context is cut into as many parts as may be
    compare(model_of(Shape(n_kv_heads=n_kv_heads, n_layers=1)), kv)


@pytest.mark.parametrize("n_batch", [1, 5, 16, 48])
def test_a_prompt_in_passes_is_that_of_the_cpu(model_of: Any, n_batch: int) -> None:
    model = model_of(Shape(group=3, n_layers=1))
    n = 150 if n_batch > 1 else 70
    logits = {}
    for device in ("cpu", "cuda"):
        options: dict[str, Any] = {"kv": "skvq", "n_ctx": 256, "kv_window": 0, "device": device}
        with model.session(n_batch=n_batch, **options) as session:
            logits[device] = session.eval(TOKENS[:n], "all")
            assert session.stats.n_tokens_sealed == (n - 5) // 64 * 64
    assert distance(logits["cuda"], logits["cpu"]) < 0.05


def test_passes_of_any_length_give_the_same_logits_without_loss(model_of: Any) -> None:
    model = model_of(Shape(n_layers=1))
    rows = []
    for n_batch in (512, 33):
        with model.session(kv="f16", n_ctx=256, device="cuda", n_batch=n_batch) as session:
            rows.append(session.eval(TOKENS[:150], "all"))
    assert distance(rows[0], rows[1]) < 0.002


@pytest.mark.parametrize("kv", ["f16", "skvq"])
@pytest.mark.parametrize("n", [0, 3, 100, 133, 150])
def test_truncated_sessions_go_on_as_on_the_cpu(model_of: Any, kv: str, n: int) -> None:
    model = model_of(Shape(n_layers=1))
    logits, sealed = {}, {}
    for device in ("cpu", "cuda"):
        with model.session(kv=kv, n_ctx=512, kv_window=0, device=device) as session:
            session.eval(TOKENS[:200])
            session.truncate(n)
            sealed[device] = session.stats.n_tokens_sealed
            logits[device] = run(session, TOKENS[300:400], TOKENS[400:404])
    assert sealed["cuda"] == sealed["cpu"] <= n
    assert distance(logits["cuda"], logits["cpu"]) < 0.05


@pytest.mark.parametrize("kv", ["f16", "skvq"])
def test_filled_sessions_go_on_as_on_the_cpu(model_of: Any, kv: str) -> None:
    model = model_of(Shape(n_layers=2))
    logits, stats, tokens = {}, {}, {}
    for device in ("cpu", "cuda"):
        with model.session(kv=kv, n_ctx=1024, kv_window=64, device=device) as session:
            session.eval(TOKENS[:220])
            session.fill(220 + 5 * 64)
            logits[device] = run(session, TOKENS[300:310], TOKENS[400:404])
            stats[device] = session.stats
            tokens[device] = session.tokens
    assert stats["cuda"].n_tokens_sealed == stats["cpu"].n_tokens_sealed
    assert tokens["cuda"] == tokens["cpu"]
    assert distance(logits["cuda"], logits["cpu"]) < 0.05


def test_an_observer_sees_what_it_sees_on_the_cpu_and_changes_nothing(model_of: Any) -> None:
    model = model_of(Shape("qwen2", n_kv_heads=2))
    seen: dict[str, list[Array]] = {"cpu": [], "cuda": []}
    for device, rows in seen.items():
        with model.session(kv="skvq", n_ctx=256, device=device) as session:

            def observer(layer: int, first: int, *qkv: Array, rows: list[Array] = rows) -> None:
                rows.extend([np.array([layer, first], np.float32), *(x.copy() for x in qkv)])

            session.observe(observer)
            watched = run(session, TOKENS[:40], TOKENS[40:42])
        with model.session(kv="skvq", n_ctx=256, device=device) as session:
            assert np.array_equal(run(session, TOKENS[:40], TOKENS[40:42]), watched)
    assert len(seen["cuda"]) == len(seen["cpu"]) == 2 * 3 * 4
    for a, b in zip(seen["cuda"], seen["cpu"], strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 0.01 * np.abs(b).max()


def test_what_is_written_to_a_block_is_what_later_tokens_read(model_of: Any) -> None:
    model = model_of(Shape(n_layers=1))
    with model.session(kv="skvq", n_ctx=512, kv_window=0, device="cuda") as session:
        session.eval(TOKENS[:140])
        before = session.eval([7])[0]
        session.truncate(140)
        block = session.sealed_block(0, 0, "v", 1)
        kept = block.copy()
        block[:] = 0
        changed = session.eval([7])[0]
        assert np.abs(changed - before).max() > 1e-3
        assert not session.sealed_block(0, 0, "v", 1).any()
        session.truncate(140)
        session.sealed_block(0, 0, "v", 1)[:] = kept
        assert np.array_equal(session.eval([7])[0], before)


# ---- a part of the layers ---------------------------------------------------------------------


@pytest.mark.parametrize("n_gpu_layers", [0, 1, 2, 3, 4, 99])
def test_any_number_of_layers_on_the_device_gives_the_same_logits(
    model_of: Any, n_gpu_layers: int
) -> None:
    model = model_of(Shape(n_layers=3, weights="Q8_0"))
    options: dict[str, Any] = {"kv": "skvq", "n_ctx": 512, "kv_window": 0}
    with model.session(device="cpu", **options) as cpu:
        expected = run(cpu, TOKENS[:150], TOKENS[150:156])
    with model.session(device="cuda", n_gpu_layers=n_gpu_layers, **options) as session:
        found = run(session, TOKENS[:150], TOKENS[150:156])
        stats = session.stats
        assert stats.n_gpu_layers == min(n_gpu_layers, 3)
        assert stats.gpu_head == (n_gpu_layers > 3)
        assert stats.gpu == (0 if n_gpu_layers else None)
        session.truncate(140)
        session.eval(TOKENS[150:156], "none")
        assert len(blocks_of(session, 0)) == len(blocks_of(session, 2)) == 2 * 2
    assert distance(found, expected) < 0.05
