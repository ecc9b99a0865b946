"""The forms that the ablations compare are those of the core but for the part that they vary."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pykvq import Model
from pykvq.eval.codecs import BlockQuantizer, Codec, Context, Exact, Plain
from pykvq.eval.frames import Hadamard
from pykvq.model import ModelInfo
from pykvq.moments import Moments, collect
from pykvq.profile import beside, read_profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
import ablations
import codec_parts as parts
import make_tables
import records

TOKENS = [(7 * i * i + i) % 256 for i in range(512)]


@pytest.fixture(scope="module")
def moments(tiny: Model) -> Moments:
    return collect(tiny, TOKENS, n_ctx=256)


def rows_of(model: Model, seed: int = 0) -> np.ndarray:
    """A block [n_kv_heads, 64, d_head] with unlike channels and tokens, of numbers that f16 has."""
    rng = np.random.default_rng(seed)
    h, d = model.info.n_kv_heads, model.info.d_head
    spread = np.exp(rng.normal(0, 0.7, (h, 1, d)) + rng.normal(0, 0.5, (h, 64, 1)))
    rows = spread * rng.standard_normal((h, 64, d)) + rng.normal(0, 2, (h, 1, d))
    return rows.astype(np.float16).astype(np.float32)


def read(model: Model, codec: Codec, rows: np.ndarray, first: int = 69) -> np.ndarray:
    return codec.open(Context(model, None, "k"))(0, first, rows)


def error(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.square(x - y).mean() / np.square(x).mean())


@pytest.mark.parametrize("name", ["tiny", "tiny_qwen2"])
def test_all_variants_run_in_lockstep(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    tried = ablations.variants(model, collect(model, TOKENS, n_ctx=256))
    rows = ablations.measure(model, [np.array(TOKENS[:448], np.int32)], tried)
    assert [(r["part"], r["variant"]) for r in rows] == [(v.part, v.name) for v in tried]
    found = np.array([[r["bits"], r["mean_kld"]] for r in rows])
    assert len({v.name for v in tried}) == len(rows) and np.isfinite(found).all()
    assert (found[:, 1] > 0).all()  # no variant is the exact cache
    assert (found[:, 0] > 1.5).all() and (found[:, 0] < 5).all()
    assert all(r["se_kld"] is None for r in rows)


def test_levels_around_the_mean_are_the_codec_u2_of_the_core(tiny: Model) -> None:
    for seed in range(5):
        rows = rows_of(tiny, seed)
        ours = read(tiny, parts.BlockMean(parts.Levels()), rows)
        core = read(tiny, parts.Core("u2"), rows)
        assert np.abs(ours - core).max() < 1e-5 * np.abs(rows).max()
        assert 0.01 < error(rows, core) < 0.2
    bits = parts.BlockMean(parts.Levels()).bits(tiny.info)
    assert bits == pytest.approx(parts.Core("u2").bits(tiny.info), abs=4e-3)  # but for padding


@pytest.mark.parametrize("left_out", ["token", "channel"])
def test_a_scale_that_is_left_out_costs(tiny: Model, left_out: str) -> None:
    rows, without = rows_of(tiny), parts.Levels(**{left_out: False})
    both, one = (read(tiny, parts.BlockMean(x), rows) for x in (parts.Levels(), without))
    assert error(rows, one) > 1.1 * error(rows, both)


def test_scales_are_stretched_toward_keeping_the_length(tiny: Model) -> None:
    rows = np.random.default_rng(2).standard_normal((2, 64, 64)).astype(np.float32)

    def length(codec: Codec) -> float:
        return float(np.vdot(rows, read(tiny, codec, rows)) / np.vdot(rows, rows))

    loss = {"keys": 0.115, "values": 0.0923}
    assert length(parts.Levels(stretched=False)) == pytest.approx(1 - loss["keys"], abs=0.01)
    assert length(parts.Levels()) == pytest.approx(1 - loss["keys"] / 2, abs=0.01)
    assert length(parts.Trellis(stretched=False)) == pytest.approx(1 - loss["values"], abs=0.01)
    assert length(parts.Trellis()) == pytest.approx(1, abs=0.002)


def test_a_mean_that_is_exact_is_not_stored_again(tiny: Model) -> None:
    rows = rows_of(tiny)
    exact = read(tiny, parts.BlockMean(parts.Core("u2"), exact=True), rows)
    assert exact.mean(axis=1) != pytest.approx(rows.mean(axis=1), abs=1e-6)  # of codes, too
    far = rows + 1000 * np.sign(rows.mean(axis=1, keepdims=True))
    moved = read(tiny, parts.BlockMean(parts.Core("u2"), exact=True), far)
    assert error(rows, moved - (far - rows)) == pytest.approx(error(rows, exact), rel=0.02)
    stored = read(tiny, parts.Core("u2"), far)
    assert error(rows, stored - (far - rows)) > 2 * error(rows, exact)


def test_the_trellis_is_that_of_the_core_and_can_count_errors_as_they_are(tiny: Model) -> None:
    rows = rows_of(tiny) - rows_of(tiny).mean(axis=1, keepdims=True)
    # The order in which the core's stream has the tokens: word, byte, bits (core/kv/kv_format.h).
    order = np.arange(64).reshape(4, 4, 4).swapaxes(1, 2).ravel()
    relative, absolute = np.empty_like(rows), np.empty_like(rows)
    relative[:, order] = read(tiny, parts.Trellis(absolute=False), rows[:, order])
    absolute[:, order] = read(tiny, parts.Trellis(absolute=True), rows[:, order])
    core = read(tiny, parts.Core("t2"), rows)
    size = np.sqrt(np.square(rows).mean(axis=-1, keepdims=True))
    assert error(relative, core) < 1e-5
    assert error(rows, absolute) < 0.97 * error(rows, core)
    assert error(rows / size, absolute / size) > 1.03 * error(rows / size, core / size)


def test_errors_on_normal_data_are_those_of_theory() -> None:
    errors = parts.normal_errors(16)
    theory = {"n2": 0.1175, "n3": 0.0345, "mixed, 4 bits": 0.01154}  # Max, 1960
    for name, expected in theory.items():
        assert 0.75 * expected < errors[name] < 1.02 * expected
    assert list(errors)[:3] == ["u1", "u2", "u4"] and errors["u1"] > errors["u2"] > errors["u4"]


def test_coordinates_are_taken_back(tiny: Model, moments: Moments) -> None:
    rows = rows_of(tiny)
    basis, order = np.linalg.inv(moments.k), np.array([[np.arange(64)[::-1]] * 2] * 2)
    for frame in (
        parts.Calibrated(Exact(), basis, moments.k_mean, moments.k_wave),
        parts.Ordered(Exact(), order),
        parts.BlockMean(Exact()),
    ):
        assert read(tiny, frame, rows) == pytest.approx(rows, abs=2e-3)


@pytest.mark.parametrize(("bits", "expected"), [(4, 0.01154), (2, 0.1188), (1, 0.3634), (0, 1)])
def test_static_scales_suit_normal_data(tiny: Model, bits: int, expected: float) -> None:
    rows = np.random.default_rng(1).standard_normal((2, 64, 64)).astype(np.float32)
    static = parts.Static(np.full((2, 2, 64), bits))
    found = read(tiny, static, rows)
    assert (parts.error_of_shape(rows, found) if bits else error(rows, found)) == pytest.approx(
        expected, rel=0.05
    )


# ---- against a session ----------------------------------------------------------------------


def first_keys(model: Model) -> np.ndarray:
    """The exact keys [2, 64, D] of the first block of layer 0."""
    seen: list[np.ndarray] = []

    def keep(layer: int, side: str, first: int, rows: np.ndarray) -> None:
        if (layer, side, first) == (0, "k", 5):
            seen.append(rows.copy())

    with model.session(kv="f16", n_ctx=512, kv_sinks=5, kv_window=64) as session:
        session.simulate(keep)
        session.eval(TOKENS[:133], "none")
    return seen[0]


def first_blocks(model: Model, kv: str) -> list[bytes]:
    """What a scheme stores of them, head by head."""
    with model.session(kv=kv, n_ctx=512, kv_sinks=5, kv_window=64) as session:
        session.eval(TOKENS[:133], "none")
        return [bytes(session._handle.block(0, head, 0, 0)) for head in range(2)]


@dataclass(frozen=True)
class Stored(Plain):
    """Reads blocks that are there already, instead of what it is given."""

    name: str
    blocks: list[bytes]
    run: np.ndarray

    def bits(self, info: ModelInfo) -> float:
        return 0

    def open(self, context: Context) -> BlockQuantizer:
        shapes = [parts.shape_of(64, run) for run in self.run]
        blocks = [
            parts.decoded(self.name, block, shape)
            for block, shape in zip(self.blocks, shapes, strict=True)
        ]
        return lambda layer, first, rows: np.stack(blocks)


@pytest.mark.parametrize(("kv", "name"), [("skvq", "u2"), ("svdq", "mixed")])
def test_keys_are_stored_as_the_core_plans_it(tiny: Model, kv: str, name: str) -> None:
    """Basis, wave, mean and widths are the core's: with others its bytes would decode to noise."""
    arrays = read_profile(beside(tiny.info.path)).arrays
    run = parts.water_filled(arrays["k_importance"].astype(float), 2)

    def framed(codec: Codec) -> Codec:
        if kv == "skvq":
            return Hadamard(codec)
        basis = arrays["k_basis"].astype(np.float64)
        return parts.Calibrated(codec, basis, arrays["k_mean"], arrays["k_wave"])

    exact = first_keys(tiny)
    core = framed(Stored(name, first_blocks(tiny, kv), run[0]))
    ours = framed(parts.Core(name, run if kv == "svdq" else None))
    stored, simulated = (read(tiny, codec, exact, first=5) for codec in (core, ours))
    assert 0.001 < error(exact, simulated) < 1
    assert np.square(stored - simulated).mean() < 0.05 * np.square(simulated - exact).mean()


# ---- the record and its tables --------------------------------------------------------------


def test_the_record_of_a_run_fills_the_tables(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "numbers.txt").write_text(" ".join(str(i * i) for i in range(1000)))
    (tmp_path / "bench" / "results").mkdir(parents=True)
    monkeypatch.setenv("PYKVQ_DATA", str(tmp_path))
    command = ["ablations.py", str(tiny_path), "--text", "numbers.txt", "--chunks"]
    monkeypatch.setattr(records, "RESULTS", tmp_path / "bench" / "results")
    monkeypatch.setattr(ablations, "N_CTX", 448)
    monkeypatch.setattr(ablations, "CALIBRATION", 2048)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [*command, "100"])
        ablations.main()
    monkeypatch.setattr(sys, "argv", [*command, "2"])
    ablations.main()
    written = tmp_path / "bench" / "results" / "ablations-tiny.json"
    record = json.loads(written.read_text())
    assert (record["chunks"], record["scored"], record["text"]) == (2, 446, "numbers.txt")
    assert all(row["se_kld"] >= 0 for row in record["results"])

    monkeypatch.setattr(make_tables, "RESULTS", written.parent)
    page = make_tables.ROOT / "docs" / "schemes" / "skvq.md"
    assert make_tables.ablations("skvq", page) == make_tables.NO_ABLATIONS
    assert make_tables.normal_errors() == make_tables.NO_ABLATIONS
    written.rename(written.with_name("ablations-smollm2.json"))
    tables = make_tables.ablations("skvq", page) + make_tables.ablations("auto", page)
    for row in record["results"]:
        assert f"| {row['variant']} | {row['bits']:.2f} | {row['mean_kld']:.4f} (" in tables
    assert f"| {record['normal_errors']['t2']:.3g} |" in make_tables.normal_errors()
