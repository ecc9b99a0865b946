"""Schemes as an evaluation takes them: names, sinks and window, and what they store."""

from __future__ import annotations

from pathlib import Path

import pytest

from pykvq import Model, SchemeError, UnsupportedError, native, schemes
from pykvq.calibrate import calibrate
from pykvq.eval.lanes import (
    Cost,
    SessionPool,
    cost,
    digest,
    elements_per_token,
    find_lanes,
    known_names,
    usable_names,
)
from pykvq.eval.simulations import SIMULATIONS
from pykvq.moments import Moments
from pykvq.profile import write_profile


def no_moments() -> Moments:
    raise AssertionError("no scheme here needs moments")


def test_the_reference_comes_first_and_every_scheme_once() -> None:
    lanes = find_lanes(["skvq", "kivi-2", "f16", "skvq"], 5, 128)
    assert [lane.name for lane in lanes] == ["f16", "skvq", "kivi-2"]
    assert {(lane.sinks, lane.window) for lane in lanes} == {(5, 128)}
    assert lanes[1].simulation is None
    assert lanes[2].simulation is SIMULATIONS["kivi-2"]


def test_each_scheme_can_keep_the_setting_of_its_paper() -> None:
    lanes = {lane.name: lane for lane in find_lanes(["q8_0", "oscar-2"], 7, 70, own_setting=True)}
    assert (lanes["f16"].sinks, lanes["f16"].window) == (7, 70)
    assert (lanes["q8_0"].sinks, lanes["q8_0"].window) == (0, 0)
    assert (lanes["oscar-2"].sinks, lanes["oscar-2"].window) == (64, 256)


def test_an_unknown_scheme_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(SchemeError, match=r"'q3' is unknown; known are: f16, .*kivi-2"):
        find_lanes(["q3"], 5, 128)
    assert set(known_names()) == {s.name for s in schemes()} | set(SIMULATIONS)


@pytest.mark.parametrize("n", [1, 5, 150, 197, 200, 261, 500])
@pytest.mark.parametrize(("sinks", "window"), [(5, 128), (0, 0), (3, 100)])
def test_effective_bits_count_what_the_core_has_sealed(
    n: int, sinks: int, window: int, tiny: Model, random_tokens: list[int]
) -> None:
    lanes = find_lanes(["skvq", "q4_0"], sinks, window)
    per_token = elements_per_token(tiny.info)
    with SessionPool(tiny, no_moments, n_ctx=512) as pool:
        for lane in lanes:
            session = pool.session(lane)
            session.eval(random_tokens[:n], "none")
            stats, c = session.stats, cost(lane, tiny)
            assert c.tokens_f16(n) == n - stats.n_tokens_sealed
            bits = 16 * (n - stats.n_tokens_sealed) + stats.bits_sealed * stats.n_tokens_sealed
            bits += 8 * stats.bytes_tables / per_token
            assert c.bits_effective(tiny.info, n) == pytest.approx(bits / n)


@pytest.mark.parametrize("n", [1, 5, 150, 197, 200, 261, 2000])
@pytest.mark.parametrize(("sinks", "window"), [(5, 128), (0, 0), (3, 100)])
def test_bytes_are_those_that_the_core_allocates(
    n: int, sinks: int, window: int, tiny: Model
) -> None:
    lanes = find_lanes(["skvq", "q4_0"], sinks, window)
    with SessionPool(tiny, no_moments, n_ctx=n) as pool:
        for lane in lanes:
            found = cost(lane, tiny).bytes_allocated(tiny.info, n)
            assert found == pytest.approx(pool.session(lane).stats.bytes_kv, abs=1024)


def test_tables_count_by_the_tokens_that_share_them(tiny: Model) -> None:
    per_token = elements_per_token(tiny.info)
    assert per_token == 2 * 2 * 2 * 64  # sides, layers, heads, width
    c = Cost(bits_k=2.0, bits_v=4.0, bytes_tables=1000, sinks=0, window=64)
    n = 64 + 64 * 10
    expected = 3 + 13 * 64 / n + 8 * 1000 / (n * per_token)
    assert c.bits_effective(tiny.info, n) == pytest.approx(expected)
    without = Cost(bits_k=2.0, bits_v=4.0, bytes_tables=0, sinks=0, window=64)
    assert c.bytes_allocated(tiny.info, n) == without.bytes_allocated(tiny.info, n) + 1000


def test_a_simulated_scheme_costs_what_it_says(tiny: Model) -> None:
    lane = find_lanes(["kivi-2"], 5, 128)[1]
    c = cost(lane, tiny)
    assert (c.bits_k, c.bits_v) == SIMULATIONS["kivi-2"].bits(tiny.info)
    assert (c.sinks, c.window) == (5, 128)


def test_a_pool_opens_each_session_once_and_closes_them(tiny: Model) -> None:
    lanes = find_lanes(["kivi-2", "skvq"], 5, 128)
    with SessionPool(tiny, no_moments, n_ctx=300) as pool:
        sessions = [pool.session(lane) for lane in lanes]
        assert sessions == [pool.session(lane) for lane in lanes]
        assert [s.stats.scheme for s in sessions] == ["f16", "f16", "skvq"]
        assert {(s.stats.sinks, s.stats.window) for s in sessions} == {(5, 128)}
    assert all(session.closed for session in sessions)


def test_what_a_model_cannot_have_is_left_out_with_a_reason(tiny_qwen2: Model) -> None:
    left_out: list[str] = []
    names = usable_names(tiny_qwen2, left_out.append)
    assert "q4_0" not in names
    assert {"f16", "kivi-2"} < set(names)
    assert any(line.startswith("q4_0 is left out. ") and "16 wide" in line for line in left_out)
    with pytest.raises(UnsupportedError, match="16 wide"):
        cost(find_lanes(["q4_0"], 5, 128)[1], tiny_qwen2)


def test_a_digest_is_that_of_what_is_sealed(tiny: Model, tiny_path: Path, tmp_path: Path) -> None:
    names = [*known_names(), "auto:1.5", "auto:3"]
    lanes = find_lanes(names, 5, 128)
    digests = {lane.name: digest(lane, tiny) for lane in lanes}
    assert digests == {lane.name: digest(lane, tiny) for lane in lanes}
    twins = {"skvq-g64", "skvq-g128"}  # heads are 64 wide: all of them are one group
    for name, found in digests.items():
        same = {other for other in digests if digests[other] == found}
        assert same == {name} or name in same <= twins | {"skvq"}
    other = {lane.name: digest(lane, tiny) for lane in find_lanes(names, 5, 64)}
    assert not set(other.values()) & set(digests.values())
    # At equal bits another profile gives other keys.
    path = tmp_path / "other.gguf"
    text = " ".join(f"{i % 89} other hours" for i in range(200))
    write_profile(
        path, calibrate(tiny, [("", text)], n_tokens=512, n_ctx=256, sensitivity_chunks=0)
    )
    with Model(tiny_path, profile=path) as changed:
        [_, svdq, nqkv] = find_lanes(["svdq-steps", "nqkv"], 5, 128)
        assert cost(svdq, changed).bits_k == cost(svdq, tiny).bits_k
        assert digest(svdq, changed) != digests["svdq-steps"]
        assert digest(nqkv, changed) == digests["nqkv"]


def test_the_core_has_one_digest_on_all_instruction_sets(
    tiny: Model, tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for isa in [*native.isa_available(), "ref"]:
        monkeypatch.setenv("KVQ_ISA", isa)
        for kv in ("skvq", "auto", "svdq", "asymkv", "q4_0"):
            with tiny.session(kv=kv, n_ctx=16) as small, tiny.session(kv=kv, kv_sinks=9) as large:
                assert small.stats.isa == isa
                assert small.digest() == large.digest() == found.setdefault(kv, small.digest())
    assert len(set(found.values())) == len(found)
    with tiny.session() as session:
        pass
    with pytest.raises(ValueError, match="The session was closed"):
        session.digest()
