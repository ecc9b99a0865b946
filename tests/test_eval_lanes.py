"""Schemes as an evaluation takes them: names, sinks and window, and what they store."""

from __future__ import annotations

from pathlib import Path

import pytest

from pykvq import Model, SchemeError, UnsupportedError, native, schemes
from pykvq.calibrate import calibrate
from pykvq.eval.lanes import (
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
    with pytest.raises(SchemeError, match=r"'kivi' is unknown; .*; spelled alike: kivi-2, kivi-1"):
        find_lanes(["kivi"], 5, 128)
    assert set(known_names()) == {s.name for s in schemes()} | set(SIMULATIONS)


@pytest.mark.parametrize("n", [1, 5, 150, 197, 200, 261, 2000])
@pytest.mark.parametrize(("sinks", "window"), [(5, 128), (0, 0), (3, 100)])
def test_a_scheme_costs_what_its_session_allocates(
    n: int, sinks: int, window: int, tiny: Model
) -> None:
    names = ["skvq", "q4_0", "auto:1.5", "svdq", "skvq-g32"]
    with SessionPool(tiny, no_moments, n_ctx=n) as pool:
        for lane in find_lanes(names, sinks, window):
            stats, c = pool.session(lane).stats, cost(lane, tiny, n)
            assert (c.bits_k, c.bits_v) == (stats.bits_sealed_k, stats.bits_sealed_v)
            assert c.bytes_total == stats.bytes_kv + c.bytes_tables
            assert c.bytes_tables == stats.bytes_tables
            assert c.bits_full == stats.bits_full
            assert (c.bytes_tables > 0) == (lane.name not in ("f16", "skvq", "q4_0"))


def test_all_that_a_profile_holds_is_counted_where_it_is_used(tiny: Model, tiny_path: Path) -> None:
    [_, svdq, auto] = find_lanes(["svdq", "auto"], 5, 128)
    file = tiny_path.with_name("tiny.kvprofile.gguf")
    tables = cost(svdq, tiny, 64).bytes_tables
    # Bases and their inverses, of keys and of values, in float32; the file has two of four, in f16.
    assert tables == cost(auto, tiny, 64).bytes_tables > 2 * file.stat().st_size


@pytest.mark.parametrize(("sinks", "window", "n"), [(5, 128, 2000), (0, 0, 64), (64, 256, 100)])
def test_a_simulated_scheme_costs_its_bits_where_f16_has_sealed_blocks(
    sinks: int, window: int, n: int, tiny: Model
) -> None:
    [f16, kivi, svdq] = find_lanes(["kivi-2", "svdq-paper-2"], sinks, window)
    per_token = elements_per_token(tiny.info)
    assert per_token == 2 * 2 * 2 * 64  # sides, layers, heads, width
    with tiny.session(kv="f16", kv_sinks=sinks, kv_window=window, n_ctx=n) as session:
        s = session.stats
        sealed = max(0, n - sinks - window) // 64 * 64
        assert s.bytes_sealed == sealed * per_token * 2
        assert cost(f16, tiny, n).bytes_total == s.bytes_kv
        for lane in (kivi, svdq):
            assert lane.simulation is not None
            c = cost(lane, tiny, n)
            assert (c.bits_k, c.bits_v) == lane.simulation.bits(tiny.info)
            assert c.bytes_tables == lane.simulation.table_bytes(tiny.info)
            blocks = sealed * per_token * c.bits_sealed / 8
            expected = s.bytes_sinks + s.bytes_recent + blocks + c.bytes_tables
            assert c.bytes_total == pytest.approx(expected, abs=1)
            assert c.bits_full == 8 * c.bytes_total / (n * per_token)
    assert cost(svdq, tiny, n).bytes_tables > 0


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
        cost(find_lanes(["q4_0"], 5, 128)[1], tiny_qwen2, 64)


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
        assert cost(svdq, changed, 64).bits_k == cost(svdq, tiny, 64).bits_k
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
