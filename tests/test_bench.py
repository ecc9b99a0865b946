"""`pykvq bench`: depths, what is printed, ratios, refusals. What times are does not matter."""

from __future__ import annotations

import csv
import gc
import io
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pykvq import ContextError, KvqError, Model, native
from pykvq.bench import harness, limits
from pykvq.bench.options import Options
from pykvq.bench.ratios import add_depth_costs, ratios
from pykvq.cli import main

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).resolve().parents[1]

MIB = 1 << 20
#: Limits and stages are measured on the CPU.
SMALL = shlex.split("-p 40 -n 3 -r 2 -t 2 --device cpu")


def needs_llama_cpp() -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra `oracle`)")


@pytest.fixture(autouse=True)
def small_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the machine's limits measured over little memory, and no pauses."""
    monkeypatch.setattr(limits, "measure", lambda n_threads: limits.measure_here(n_threads, MIB))
    monkeypatch.setattr(harness, "PAUSE", 0.0)


# ---- filling --------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["f16", "skvq", "svdq"])
@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_filling_repeats_sealed_blocks_and_keeps_recent_rows(
    tiny: Model, random_tokens: list[int], kv: str, blocks: int
) -> None:
    held, more = 400, 64 * blocks
    with (
        tiny.session(kv=kv, kv_window=128, n_ctx=1200) as plain,
        tiny.session(kv=kv, kv_window=128, n_ctx=1200) as filled,
    ):
        for session in (plain, filled):
            session.eval(random_tokens[:held], "none")
        n_sealed = plain.stats.n_tokens_sealed // 64
        filled.fill(held + more)
        assert filled.n_tokens == held + more
        assert filled.stats.n_tokens_sealed == 64 * (n_sealed + blocks)
        sinks = filled.stats.sinks
        ids, end = filled.tokens, sinks + 64 * n_sealed
        assert ids[:end] + ids[end + more :] == random_tokens[:held]
        assert ids[end : end + 64] == random_tokens[sinks : sinks + 64]
        for block in range(n_sealed + blocks):
            original = block if block < n_sealed else (block - n_sealed) % n_sealed
            for layer in range(tiny.info.n_layers):
                for side in ("k", "v"):
                    assert np.array_equal(
                        filled.sealed_block(layer, 1, side, block),  # type: ignore[arg-type]
                        plain.sealed_block(layer, 1, side, original),  # type: ignore[arg-type]
                    )
        # The next block that each seals holds rows that were recent when it was filled.
        tail = random_tokens[held : held + 70]
        logits = filled.eval(tail)
        plain.eval(tail)
        assert np.isfinite(logits).all()
        if kv != "svdq":  # whose keys are coded relative to their position
            assert np.array_equal(
                filled.sealed_block(0, 1, "k", n_sealed + blocks),
                plain.sealed_block(0, 1, "k", n_sealed),
            )
        assert np.array_equal(
            filled.sealed_block(0, 1, "v", n_sealed + blocks),
            plain.sealed_block(0, 1, "v", n_sealed),
        )


def test_what_cannot_be_filled_is_refused(tiny: Model, random_tokens: list[int]) -> None:
    with tiny.session(kv="skvq", n_ctx=512) as session:
        session.eval(random_tokens[:100], "none")
        with pytest.raises(ValueError, match=r"none of them in a sealed block.* 97 more seal"):
            session.fill(164)
        session.eval(random_tokens[100:300], "none")
        with pytest.raises(ValueError, match=r"by whole blocks of 64, but not to 363 tokens"):
            session.fill(363)
        with pytest.raises(ValueError, match=r"not to 236 tokens"):
            session.fill(236)
        with pytest.raises(ContextError, match=r"512 tokens cannot be filled with 556"):
            session.fill(556)
        assert session.n_tokens == 300
        assert session.tokens == random_tokens[:300]


def test_a_block_sealed_early_cannot_be_repeated_beyond_the_cache(
    tiny: Model, random_tokens: list[int]
) -> None:
    with tiny.session(kv="skvq", n_ctx=512) as session:
        session.eval(random_tokens[:512], "none")
        session.truncate(512 - 64 - 64)
        with pytest.raises(ContextError, match="cannot be filled with 512"):
            session.fill(512)


# ---- clocks ---------------------------------------------------------------------------------


def test_clocks_run_only_when_asked(tiny: Model, random_tokens: list[int]) -> None:
    def times() -> list[int]:
        return list(session.stats.stage_ns.values())

    with tiny.session(kv="skvq", n_ctx=512) as session:
        session.eval(random_tokens[:40])
        assert times() == [0, 0, 0, 0]
        session.time_stages()
        session.eval(random_tokens[40:400])
        first = times()
        assert all(ns > 0 for ns in first)
        session.eval(random_tokens[400:440])
        assert all(now > before for now, before in zip(times(), first, strict=True))
        assert sum(times()) <= 1e9 * session.stats.seconds_evaluated
        session.time_stages(False)
        session.eval(random_tokens[440:442])
        assert times() == [0, 0, 0, 0]


# ---- limits ---------------------------------------------------------------------------------


def test_limits_of_the_machine_are_measured() -> None:
    found = limits.measure(2)
    assert found.isa == native.isa_selected()
    assert found.n_threads == 2
    assert found.read_bytes > 0
    for peak in (found.int8_operations, found.int16_operations):
        assert peak is None if found.isa == "ref" else peak is not None and peak > 0


@pytest.mark.parametrize(
    ("n_threads", "n_bytes", "sentence"),
    [
        (1025, MIB, "n_threads is 1025, expected 1 to 1024"),
        (-1, MIB, "n_threads is -1"),
        (1, 1000, "A buffer of 1000 bytes was to be read, expected 1048576 to"),
    ],
)
def test_a_measurement_that_makes_no_sense_is_refused(
    n_threads: int, n_bytes: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        limits.measure_here(n_threads, n_bytes)


def test_measuring_leaves_the_most_memory_of_this_process_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    before = harness.peak_resident_bytes()
    assert before is not None
    n_bytes = before + 64 * MIB  # what this process had beside it would exceed what it ever held
    assert limits.measure(1, n_bytes).read_bytes > 0
    assert harness.peak_resident_bytes() < before + 32 * MIB
    with pytest.raises(ValueError, match="n_threads is 1025"):
        limits.measure(1025, MIB)


def test_work_counts_what_a_token_needs(tiny: Model) -> None:
    work, info = limits.work_of(tiny), tiny.info
    d, kv, vocab = info.d_model, info.n_kv_heads * info.d_head, info.n_vocab
    q = info.n_heads * info.d_head
    layer = d * q + 2 * d * kv + q * d + 3 * d * info.d_ff
    assert work.output_operations == 2 * d * vocab
    assert work.weight_operations == 2 * (info.n_layers * layer + d * vocab)
    embedding = next(t for t in tiny.tensors if t.name == "token_embd.weight")
    assert work.weight_bytes == sum(t.n_bytes for t in tiny.tensors) - embedding.n_bytes
    assert work.attention_operations == 4 * info.n_layers * q
    assert work.of_prompt(1, 9) == work.of_token(10)
    assert work.of_prompt(2, 0) == pytest.approx(
        work.of_token(1) + work.of_token(2) - work.output_operations
    )


def test_the_limit_is_the_longer_of_reading_and_computing() -> None:
    machine = limits.Limits("avx2", 1, 10.0, 100.0, 50.0)
    assert machine.least_seconds(100, 100) == 10.0
    assert machine.least_seconds(10, 500) == 5.0
    assert limits.Limits("ref", 1, 10.0, None, None).least_seconds(10, 500) == 1.0


# ---- the benchmark --------------------------------------------------------------------------


def test_json_has_every_test_and_its_provenance(tiny_path: Path, capsys: Capture) -> None:
    args = ["bench", str(tiny_path), *SMALL, "-d", "0,300", "--kv", "skvq,auto:2", "-o", "json"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    data = json.loads(out)
    assert data["settings"]["n_threads"] == 2
    assert data["settings"]["n_ctx"] == 340
    assert data["limits"]["read_bytes"] > 0
    assert set(data["versions"]) == {"pykvq"}
    assert data["model"]["file"] == tiny_path.name
    assert str(tiny_path.parent) not in out
    assert data["peak_resident_bytes"] > 0
    assert "ratios" not in data
    found = [(r["kv"], r["test"], r["depth"], r["n_tokens"]) for r in data["results"]]
    assert found == [
        (kv, test, depth, n)
        for depth in (0, 300)
        for test, n in (("generation", 3), ("prompt", 40))
        for kv in ("skvq", "auto:2")
    ]
    for r in data["results"]:
        assert len(r["samples_ns"]) == 2
        assert r["ms_per_token"] * r["tokens_per_second"] == pytest.approx(1000)
        at_a_depth = r["test"] == "generation" and r["depth"] > 0
        assert len(r["samples_ns_at_depth_0"]) == (2 if at_a_depth else 0)
        assert at_a_depth or r["ms_over_depth_0"] is None
        assert sum(r["stages_ms"].values()) <= max(r["samples_ns"]) / r["n_tokens"] / 1e6
        assert not r["filled"]
        assert (r["kv_bytes"] is not None) == (r["test"] == "generation")
    assert len([line for line in err.splitlines() if "tokens/s" in line]) == 8


def test_bytes_of_the_cache_are_those_of_the_depth(tiny: Model) -> None:
    options = Options(kv=["f16"], n_prompt=0, n_gen=2, depths=[500], repetitions=1, n_threads=1)
    record = harness.run(tiny, options, command="test")
    (result,) = record["results"]
    per_token = 2 * tiny.info.n_layers * tiny.info.n_kv_heads * tiny.info.d_head * 2
    assert result["kv_bytes"] == 502 * per_token  # halfway between 501 and 503 tokens
    assert len(result["samples_ns_at_depth_0"]) == 1


def test_a_depth_can_be_filled(tiny: Model) -> None:
    options = Options(
        kv=["skvq"], n_prompt=5, n_gen=1, depths=[100, 1003, 5000], repetitions=1, fill_from=300
    )
    evaluated: list[int] = []

    class Watched(harness.OwnLane):
        def eval(self, tokens: object) -> None:
            super().eval(tokens)  # type: ignore[arg-type]
            evaluated.append(self.n_tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "OwnLane", Watched)
        record = harness.run(tiny, options, command="test")
    assert [r["filled"] for r in record["results"]] == [False, False, True, True, True, True]
    # The way to the depth; a token before the timed one, and that, at depth 0 by the other lane and
    # at the depth; the prompt. At first both lanes warm up.
    way = [[100], [1, 2, 101, 102, 105], [363], [1, 2, 1004, 1005, 1008]]
    way += [[1032], [1, 2, 5001, 5002, 5005]]
    assert evaluated == [64, 64, *(n for part in way for n in part)]


def test_tables_and_rows_hold_the_same_numbers(tiny: Model) -> None:
    from pykvq.bench.report import render

    options = Options(kv=["q8_0"], n_prompt=4, n_gen=2, depths=[0, 70], repetitions=1)
    record = harness.run(tiny, options, command="test")
    rows = list(csv.DictReader(io.StringIO(render(record, "csv"))))
    lines = [json.loads(line) for line in render(record, "jsonl").splitlines()]
    table = render(record, "md").splitlines()
    assert len(rows) == len(lines) == 4
    for row, line, result in zip(rows, lines, record["results"], strict=True):
        assert float(row["ms_per_token"]) == line["ms_per_token"] == result["ms_per_token"]
        assert row["samples_ns"] == str(result["samples_ns"][0])
        assert line["model"] == row["model"] == tiny.info.name
        assert float(row["attention_ms"]) == result["stages_ms"]["attention"]
    names = ["tg2", "pp4", "tg2 @ d70", "pp4 @ d70"]
    body = [line for line in table if line.startswith("| pykvq")]
    assert [line.split("|")[3].strip() for line in body] == names
    assert len({len(line) for line in table if line.startswith("|")}) == 1
    assert json.loads(render(record, "json")) == json.loads(json.dumps(record))


def test_an_unused_instruction_set_has_no_peak_and_still_a_table(
    tiny_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVQ_ISA", "ref")
    args = ["bench", str(tiny_path), *shlex.split("-p 4 -n 1 -r 1 -t 1 --device cpu")]
    assert main(args) == 0
    out = capfd.readouterr().out
    assert "no measure of Gop/s int8" in out
    assert "% int8 peak" not in out
    assert "% limit" in out


# ---- ratios ---------------------------------------------------------------------------------


def _result(
    engine: str, setting: str, test: str, depth: int, ms: float, over: Sequence[float] = ()
) -> dict[str, object]:
    """A token took `ms` in the median, and, each time, so much more than at depth 0."""
    return {
        "n_tokens": 2,
        "samples_ns": [int(2e6 * ms)] * len(over),
        "samples_ns_at_depth_0": [int(2e6 * (ms - more)) for more in over],
        "engine": engine,
        "kv": setting.split()[0],
        "setting": setting,
        "test": test,
        "depth": depth,
        "ms_per_token": ms,
    }


def test_ratios_are_against_the_fastest_setting_of_the_peer() -> None:
    results = [
        _result("pykvq", "skvq", "generation", 0, 5.0),
        _result("pykvq", "skvq", "generation", 100, 6.0, [1.0, 1.25, 0.5, 1.0, 0.75]),
        _result("pykvq", "skvq", "prompt", 0, 1.0),
        _result("pykvq", "f16", "generation", 0, 8.0),
        _result("pykvq", "f16", "generation", 100, 8.0, [1.0, 0.25, 4.0]),  # lost in noise
        _result("llama.cpp", "f16", "generation", 0, 10.0),
        _result("llama.cpp", "f16", "generation", 100, 20.0, [10.0, 11.0, 9.0]),
        _result("llama.cpp", "f16", "prompt", 0, 3.0),
        _result("llama.cpp", "f16 + fa", "generation", 0, 9.0),
        _result("llama.cpp", "f16 + fa", "generation", 100, 25.0, [16.0]),
        _result("llama.cpp", "q8_0 + fa", "generation", 0, 12.0),
        _result("llama.cpp", "q8_0 + fa", "generation", 100, 17.0, [5.0, 5.0, 5.0]),
    ]
    add_depth_costs(results)
    assert [r["ms_over_depth_0"] for r in results[:2]] == [None, 1.0]
    options = Options(kv=["skvq", "f16"], peer="llama.cpp", peer_kv=["f16", "q8_0"])
    found = ratios(results, options)
    assert found["ratios"] == {
        "generation": {"0": 9 / 5, "100": 17 / 6},
        "prompt": {"0": 3.0},
        "attention": {"100": 5.0},
    }
    by = found["ratios_by"]
    assert by["skvq"]["f16"]["generation"] == {"0": 9 / 5, "100": 20 / 6}
    assert by["skvq"]["f16"]["attention"] == {"100": 10.0}
    assert by["skvq"]["q8_0"]["generation"]["100"] == 17 / 6
    assert by["skvq"]["q8_0"]["prompt"] == {"0": None}
    assert by["f16"]["f16"]["attention"] == {"100": None}
    assert found["peer_best"]["generation"] == {"0": "f16 + fa", "100": "q8_0 + fa"}


# ---- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--kv", "q3"], "The KV scheme 'q3' is unknown"),
        (["--kv", "q8_0:4"], "'q8_0:4' gives bits to the KV scheme q8_0"),
        (["--kv", "auto:x"], "'auto:x' gives 'x' to the KV scheme auto"),
        (["--kv", ","], "There is no KV scheme"),
        (["-p", "0", "-n", "0"], "there is nothing to time"),
        (["-p", "-1"], "n_prompt is -1, expected a whole number from 0"),
        (["-r", "0"], "repetitions is 0"),
        (["-b", "0"], "-b is 0"),
        (["-d", "0,x"], "'0,x' is not a list of whole numbers"),
        (["-d", ","], "There are no depths"),
        (["-d", "-5"], "A depth is -5"),
        (["-o", "sql"], "invalid choice: 'sql'"),
        (["--peer", "vllm"], "invalid choice: 'vllm'"),
        (["--peer-kv", "f16"], "--peer-kv is of use only with --peer."),
        (["--peer", "llama.cpp", "--peer-kv", "f15"], "The KV cache 'f15' of the peer is unknown"),
        (["--fill-from", "100"], "--fill-from is of use only with --fill."),
        (["--fill", "--fill-from", "0"], "fill_from is 0"),
        (["--fill", "--fill-from", "100", "-d", "900"], "none of them in a sealed block"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_sentence(
    args: list[str], sentence: str, tiny_path: Path, capsys: Capture
) -> None:
    assert main(["bench", str(tiny_path), *SMALL, *args]) == 2
    out, err = capsys.readouterr()
    assert sentence in err
    assert out == ""


@pytest.mark.parametrize(("load", "warned"), [(0.2, False), (7.5, True), (None, False)])
def test_a_busy_machine_is_warned_of(
    load: float | None,
    warned: bool,
    tiny_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "load_average", lambda: load)
    assert main(["bench", str(tiny_path), "-p", "4", "-n", "1", "-r", "1", "-o", "json"]) == 0
    out, err = capsys.readouterr()
    assert ("was busy during the last minute (load 7.5)" in err) == warned
    assert json.loads(out)["load_before"] == load


def test_a_peer_that_is_not_installed_is_refused_before_any_work(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    assert main(["bench", str(tmp_path / "none.gguf"), "--peer", "llama.cpp"]) == 2
    err = capsys.readouterr().err
    assert "needs llama-cpp-python, which is not installed; `pip install 'pykvq[oracle]'`" in err


# ---- the peer -------------------------------------------------------------------------------


@pytest.fixture
def peer_record(tiny: Model) -> dict[str, object]:
    """A small model on both engines, filled."""
    needs_llama_cpp()
    options = Options(
        kv=["f16"],
        n_prompt=8,
        n_gen=2,
        depths=[0, 300],
        repetitions=2,
        n_threads=1,
        fill_from=100,
        peer="llama.cpp",
        peer_kv=["f16", "q8_0"],
    )
    return harness.run(tiny, options, command="test")


def test_a_peer_runs_the_same_tests_in_all_its_settings(peer_record: dict[str, object]) -> None:
    from pykvq.bench.report import render

    results = peer_record["results"]
    assert isinstance(results, list)
    tests = {
        setting: [(r["test"], r["depth"]) for r in results if r["setting"] == setting]
        for setting in dict.fromkeys(r["setting"] for r in results)
    }
    assert list(tests) == ["f16", "f16 + fa", "q8_0 + fa"]
    assert tests["f16"] == [(test, depth) for test, depth in tests["f16"]]
    assert len(tests["f16"]) == 8  # of pykvq and of llama.cpp
    assert tests["f16 + fa"] == [
        ("generation", 0),
        ("prompt", 0),
        ("generation", 300),
        ("prompt", 300),
    ]
    found = peer_record["ratios"]
    assert isinstance(found, dict)
    assert set(found) == {"generation", "prompt", "attention"}
    for kind in ("generation", "prompt"):
        assert all(math.isfinite(found[kind][depth]) for depth in ("0", "300"))
    assert "llama.cpp" in str(peer_record["versions"])
    assert "its best" in render(peer_record, "md")


def test_llama_cpp_can_be_used_when_the_peer_is_gone(tiny_path: Path) -> None:
    needs_llama_cpp()
    from pykvq.bench import peer

    model = peer.LlamaModel(str(tiny_path))
    api, errors = model.api, model.errors
    model.close()
    del model
    gc.collect()
    assert not api.llama_model_load_from_file(b"/none", api.llama_model_default_params())
    assert errors  # what it said went where it was told to


def test_the_peer_is_filled_to_what_was_asked_and_goes_on(tiny: Model) -> None:
    needs_llama_cpp()
    from pykvq.bench.peer import LlamaModel

    options = Options(
        n_prompt=8, n_gen=1, depths=[150], n_threads=1, fill_from=60, peer="llama.cpp"
    )
    ids = np.arange(60, dtype=np.int32)
    with LlamaModel(tiny.info.path) as model:
        for lane in model.lanes(options):
            with lane:
                lane.eval(ids)
                lane.fill(100)
                assert lane.n_tokens == 100
                lane.eval(ids[:3])
                lane.fill(150)
                assert lane.n_tokens == 150
                lane.eval(ids[:8])
                assert lane.n_tokens == 158
                lane.truncate(150)
                assert lane.n_tokens == 150
                logits = np.ctypeslib.as_array(
                    model.api.llama_get_logits_ith(lane._context, -1), (tiny.info.n_vocab,)
                )
                assert np.isfinite(logits).all()


def test_a_peer_that_cannot_read_the_file_says_why(tmp_path: Path) -> None:
    needs_llama_cpp()
    from pykvq.bench.peer import LlamaModel

    path = tmp_path / "no.gguf"
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(KvqError, match=r"llama\.cpp cannot load .*no\.gguf: "):
        LlamaModel(str(path))


# ---- the generator of a large random model --------------------------------------------------


def test_the_generator_writes_a_model_that_runs(tmp_path: Path) -> None:
    path = tmp_path / "shape.gguf"
    command = [sys.executable, str(ROOT / "models" / "make_7b_shape.py"), str(path)]
    command += shlex.split(
        "--layers 2 --width 256 --heads 8 --kv-heads 2 --ff 512 --vocab 300 --ctx 4096"
    )
    subprocess.run(command, check=True, capture_output=True)
    with Model(path) as model, model.session(kv="skvq", n_ctx=256) as session:
        info = model.info
        assert (info.n_layers, info.d_model, info.n_heads, info.n_kv_heads) == (2, 256, 8, 2)
        assert (info.d_ff, info.d_head, info.n_vocab, info.n_ctx_train) == (512, 32, 300, 4096)
        assert {t.type for t in model.tensors if len(t.shape) > 1} == {"Q4_0"}
        assert np.isfinite(session.eval(list(range(200)))).all()
