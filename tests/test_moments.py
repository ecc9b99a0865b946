"""The statistics of calibration, against plain loops over the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import write_tiny
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from pykvq import Model, ModelError
from pykvq.moments import N_WAVES, SINKS, Moments, Rope, _Sums, attention, collect

Array = npt.NDArray[np.float64]
N_CTX = 300


def observed(
    model: Model, chunks: list[list[int]], n_pass: int = 1000
) -> dict[int, list[list[Array]]]:
    """By layer, for each chunk [q, k, v], each [n, heads, d]."""
    seen: dict[int, list[list[Array]]] = {layer: [] for layer in range(model.info.n_layers)}
    for chunk in chunks:
        parts: dict[int, list[list[Array]]] = {layer: [] for layer in seen}

        def observer(layer: int, first: int, *qkv: Array, parts: object = parts) -> None:
            parts[layer].append([x.astype(np.float64) for x in qkv])  # type: ignore[index]

        with model.session(kv="f16", n_ctx=len(chunk)) as session:
            session.observe(observer)  # type: ignore[arg-type]
            for at in range(0, len(chunk), n_pass):
                session.eval(chunk[at : at + n_pass], "none")
        for layer, passes in parts.items():
            seen[layer].append([np.concatenate(x) for x in zip(*passes, strict=True)])
    return seen


def plain_attention(q: Array, k: Array) -> tuple[Array, Array, Array]:
    """One query at a time: [n, H] what each token receives; the squares of what comes from afar.

    And [n, H, G] the latter by the query that pays it.
    """
    n, n_kv_heads, d = k.shape
    group = q.shape[1] // n_kv_heads
    received, squares = np.zeros((n, n_kv_heads)), np.zeros((n, n_kv_heads))
    paid = np.zeros((n, n_kv_heads, group))
    for t in range(n):
        for head in range(q.shape[1]):
            kv_head, member = divmod(head, group)
            scores = k[: t + 1, kv_head] @ q[t, head] / np.sqrt(d)
            p = np.exp(scores - scores.max())
            received[: t + 1, kv_head] += p / p.sum()
            far = slice(SINKS, max(SINKS, t + 1 - 128))
            squares[far, kv_head] += (p[far] / p.sum()) ** 2
            paid[t, kv_head, member] = ((p[far] / p.sum()) ** 2).sum()
    return received, squares, paid


def turned(rope: Rope, x: Array, position: int) -> Array:
    """x [D] after RoPE at a position, a pair at a time as a complex number."""
    y = x.copy()
    for a, b, frequency in zip(rope.first, rope.second, rope.frequencies, strict=True):
        z = complex(x[a], x[b]) * np.exp(1j * frequency * position)
        y[a], y[b] = z.real, z.imag
    return y


def in_blocks(chunks: list[Array]) -> Array:
    """Keys [N_CTX, D] of chunks behind the sinks, in whole blocks, without the block's mean."""
    starts = range(SINKS, N_CTX - 63, 64)
    blocks = [chunk[at : at + 64] for chunk in chunks for at in starts]
    assert len(blocks) == 4 * len(chunks)
    return np.concatenate([block - block.mean(axis=0) for block in blocks])


def second_moment(x: Array) -> Array:
    """[D, D] of rows [n, D]."""
    return np.einsum("ta,tb->ab", x, x) / len(x)


def plain_wave(rope: Rope, chunks: list[Array]) -> Array:
    """[D] the wave that should be taken out of keys [N_CTX, D] of chunks."""
    k_pre = [[turned(rope, chunk[t], -t) for t in range(SINKS, N_CTX)] for chunk in chunks]
    mean = np.mean(k_pre, axis=(0, 1))
    before = np.square(in_blocks(chunks)).sum(axis=0)
    wave = np.array([turned(rope, mean, t) for t in range(N_CTX)])
    after = np.square(in_blocks([chunk - wave for chunk in chunks])).sum(axis=0)
    left = {
        (a, b): (after[a] + after[b]) / (before[a] + before[b])
        for a, b in zip(rope.first, rope.second, strict=True)
    }
    kept = np.zeros_like(mean)
    for pair in sorted(left, key=lambda pair: left[pair])[:8]:
        if left[pair] < 1:
            kept[list(pair)] = mean[list(pair)]
    return kept


def check_close(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, atol=1e-9 * np.abs(expected).max(), rtol=1e-9)


@pytest.mark.parametrize("name", ["tiny", "tiny_qwen2"])
def test_moments_are_those_of_plain_loops(
    name: str, random_tokens: list[int], request: pytest.FixtureRequest
) -> None:
    model: Model = request.getfixturevalue(name)
    told: list[tuple[str, int, int]] = []
    found = collect(
        model,
        random_tokens,
        n_ctx=N_CTX,
        scored_every=2,
        progress=lambda *at: told.append(at),
    )
    chunks = [random_tokens[at : at + N_CTX] for at in (0, 300, 600)]
    assert found.n_tokens == 3 * (N_CTX - SINKS)
    assert found.n_scored == 2 * (N_CTX - SINKS)
    assert told[-1] == ("moments", 900, 900)
    group, d = model.info.n_heads // model.info.n_kv_heads, model.info.d_head
    rope = Rope.of(model)
    for layer, seen in observed(model, chunks).items():
        for head in range(model.info.n_kv_heads):
            q = np.concatenate(
                [c[0][SINKS:, head * group : (head + 1) * group].reshape(-1, d) for c in seen]
            )
            k = np.concatenate([c[1][SINKS:, head] for c in seen])
            v = np.concatenate([c[2][SINKS:, head] for c in seen])
            here = (layer, head)
            check_close(found.q[here], second_moment(q) / d)
            check_close(found.k_mean[here], k.mean(axis=0))
            check_close(found.k[here], np.cov(k.T, bias=True))
            whole = [c[1][:, head] for c in seen]
            check_close(found.k_deviation[here], second_moment(in_blocks(whole)))
            k_wave = plain_wave(rope, whole)
            check_close(found.k_wave[here], k_wave)
            wave = np.array([turned(rope, k_wave, t) for t in range(N_CTX)])
            flat = [chunk - wave for chunk in whole]
            check_close(found.k_residual[here], second_moment(in_blocks(flat)))
            check_close(found.k_offset[here], np.mean(flat, axis=0)[SINKS:].mean(axis=0))
            check_close(found.v_mean[here], v.mean(axis=0))
            check_close(found.v[here], np.cov(v.T, bias=True))
            for low, high, x in (
                (found.k_min, found.k_max, k),
                (found.v_min, found.v_max, v),
            ):
                assert (low[here] == x.min(axis=0)).all()
                assert (high[here] == x.max(axis=0)).all()
        weights, squares, paid = (
            np.concatenate(of)
            for of in zip(*(plain_attention(c[0], c[1]) for c in seen[::2]), strict=True)
        )
        behind = np.tile(np.arange(N_CTX) >= SINKS, 2)
        values = np.concatenate([c[2] for c in seen[::2]])[behind]
        queries = np.concatenate([c[0] for c in seen[::2]])[behind]
        for head in range(model.info.n_kv_heads):
            w = weights[behind, head] / weights[behind, head].sum()
            x = values[:, head] - found.v_mean[layer, head]
            np.testing.assert_allclose(
                found.v_scored[layer, head],
                np.einsum("t,ta,tb->ab", w, x, x),
                atol=1e-5 * np.abs(x).max() ** 2,
            )
            rows = queries[:, head * group : (head + 1) * group]
            looking = np.einsum("tg,tga,tgb->ab", paid[behind, head], rows, rows)
            np.testing.assert_allclose(
                found.q_read[layer, head],
                looking / (found.n_scored * group * d),
                atol=1e-4 * np.trace(looking) / (found.n_scored * group * d),
            )
            read = np.einsum("t,ta,tb->ab", squares[behind, head], x, x)
            np.testing.assert_allclose(
                found.v_read[layer, head],
                read / (found.n_scored * group),
                atol=1e-4 * np.trace(read) / (found.n_scored * group),
            )


def test_a_constant_before_rope_is_taken_out_where_it_oscillates(
    tmp_path: Path, random_tokens: list[int]
) -> None:
    path = write_tiny(tmp_path / "biased.gguf", "qwen2")
    file = GGUFReader(path, "r+")
    for layer in (0, 1):
        [bias] = [t for t in file.tensors if t.name == f"blk.{layer}.attn_k.bias"]
        bias.data[:] = 5 * np.random.default_rng(layer).normal(size=bias.data.shape)
    file.data.flush()
    with Model(path, n_threads=1) as model:
        rope = Rope.of(model)
        found = collect(model, random_tokens, n_ctx=N_CTX)
    pairs = np.stack([found.k_wave[..., rope.first], found.k_wave[..., rope.second]], axis=-1)
    chosen = (pairs != 0).any(axis=-1)
    assert (chosen.sum(axis=-1) == N_WAVES).all()
    slow = rope.frequencies < 0.01  # within a block these turn by less than 0.64
    assert slow.sum() == 15
    assert not chosen[..., slow].any()
    plain, left = (
        np.diagonal(x, axis1=-2, axis2=-1)[..., rope.first]
        + np.diagonal(x, axis1=-2, axis2=-1)[..., rope.second]
        for x in (found.k_deviation, found.k_residual)
    )
    assert (left[chosen] < plain[chosen]).all()
    assert left[chosen].sum() < 0.5 * plain[chosen].sum()
    assert (left[~chosen] == plain[~chosen]).all()


def test_attention_in_blocks_is_that_of_single_queries() -> None:
    rng = np.random.default_rng(1)
    q = rng.normal(0, 3, (600, 6, 16)).astype(np.float32)
    k = rng.normal(0, 1, (600, 2, 16)).astype(np.float32)
    found, squares, paid = attention(q, k)
    expected, expected_squares, expected_paid = plain_attention(q, k)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(squares, expected_squares, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(paid, expected_paid, rtol=1e-4, atol=1e-5)
    assert found.sum() == pytest.approx(600 * 6, rel=1e-5)


def with_rope_factors(path: Path, source: Path, factors: npt.NDArray[np.float32]) -> Path:
    """A copy of a model that has RoPE factors, as Llama 3.1 has them."""
    file = GGUFReader(source)
    writer = GGUFWriter(path, "llama")
    for key, field in file.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    for tensor in file.tensors:
        quantized = tensor.tensor_type == GGMLQuantizationType.Q8_0
        writer.add_tensor(
            tensor.name, tensor.data, raw_dtype=tensor.tensor_type if quantized else None
        )
    writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("llama", {}),
        ("llama", {"llama.rope.freq_base": 500.0, "llama.rope.dimension_count": 48}),
        ("llama", {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
        ("llama", {"llama.rope.scaling.factor": 4.0}),
        ("llama", {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}),
        ("llama", {"llama.rope.scale_linear": 2.0}),
        ("llama", {"factors": True}),
        ("qwen2", {"qwen2.rope.freq_base": 1e6}),
        ("qwen2", {"qwen2.rope.dimension_count": 32}),
    ],
)
def test_keys_before_rope_are_the_keys_at_position_0(
    architecture: str, extra: dict[str, object], tmp_path: Path
) -> None:
    factors = extra.pop("factors", False)
    path = write_tiny(tmp_path / "model.gguf", architecture, extra=extra)
    if factors:
        path = with_rope_factors(
            tmp_path / "factors.gguf", path, np.linspace(1, 8, 32, dtype=np.float32)
        )
    ids = [(17 * i) % 200 for i in range(N_CTX)]
    with Model(path, n_threads=1) as model:
        found = collect(model, ids, n_ctx=N_CTX)
        # A key of the first layer depends on its token and position alone.
        at_0 = {id: observed(model, [[id]])[0][0][1][0] for id in sorted(set(ids[SINKS:]))}
    keys = np.array(list(at_0.values()))
    scale = np.abs(keys).max()
    np.testing.assert_allclose(found.k_pre_min[0], keys.min(axis=0), atol=1e-5 * scale)
    np.testing.assert_allclose(found.k_pre_max[0], keys.max(axis=0), atol=1e-5 * scale)
    assert np.abs(found.k_max[0] - found.k_pre_max[0]).max() > 0.05 * scale


def test_same_input_gives_same_bytes_on_any_number_of_threads(
    tiny_path: Path, random_tokens: list[int], tmp_path: Path
) -> None:
    for name, options in (("a", {"n_threads": 1}), ("b", {"n_threads": 3, "n_batch": 7})):
        with Model(tiny_path, kv="q8_0", **options) as model:  # type: ignore[arg-type]
            collect(model, random_tokens, n_ctx=128).save(tmp_path / f"{name}.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_what_was_saved_is_loaded(tiny: Model, random_tokens: list[int], tmp_path: Path) -> None:
    moments = collect(tiny, random_tokens, n_ctx=500)
    moments.save(tmp_path / "moments.npz")
    loaded = Moments.load(tmp_path / "moments.npz")
    assert (loaded.n_tokens, loaded.n_scored) == (990, 495)
    assert (loaded.v_scored == moments.v_scored).all()
    assert loaded.k_pre_max.shape == (2, 2, 64)
    np.savez(tmp_path / "other.npz", q=moments.q)
    with pytest.raises(ModelError, match=r"other\.npz has the entries \['q'\], but"):
        Moments.load(tmp_path / "other.npz")


def test_chunks_begin_with_bos_where_the_model_wants_it(stories_model: Model) -> None:
    ids = np.random.default_rng(0).integers(3, 500, 256)
    given = collect(stories_model, ids, n_ctx=128)
    ids[[0, 128]] = stories_model.tokenizer.bos
    same = collect(stories_model, ids, n_ctx=128)
    assert (given.k == same.k).all()
    ids[5] = 300 + ids[5] % 2
    other = collect(stories_model, ids, n_ctx=128)
    assert (given.k != other.k).any()


def test_what_cannot_be_measured_is_refused(tiny: Model) -> None:
    with pytest.raises(ValueError, match="The text has 99 tokens, but at least 100"):
        collect(tiny, [1] * 99, n_ctx=100)
    with pytest.raises(ValueError, match="n_ctx is 68, expected a whole number from 69"):
        collect(tiny, [1] * 99, n_ctx=68)
    with pytest.raises(ValueError, match="scored_every is 0"):
        collect(tiny, [1] * 99, n_ctx=99, scored_every=0)
    x = np.zeros((70, 2, 64), np.float32)
    x[69, 1, 63] = np.nan
    with pytest.raises(ModelError, match="keys of layer 1 are not all finite"):
        _Sums(tiny, 70).add(1, np.zeros((70, 4, 64), np.float32), x, np.zeros_like(x), scored=False)
