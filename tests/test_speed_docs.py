"""Tables and plots of speed say what the records say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
import make_plots
import speed_tables

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "speed.md"

Json = dict[str, Any]


def test_plots_are_those_of_the_records() -> None:
    command = [sys.executable, str(ROOT / "docs" / "make_plots.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def result(engine: str, setting: str, test: str, depth: int, ms: float) -> Json:
    own = engine == "pykvq"
    return {
        "engine": engine,
        "kv": setting.partition(" ")[0],
        "setting": setting,
        "test": test,
        "depth": depth,
        "filled": depth > 2048,
        "ms_per_token": ms,
        "tokens_per_second": 1000 / ms,
        "stages_ms": {"weights": 1.5, "attention": 0.25, "append": 0.125} if own else None,
        "weight_bytes": 90e6 if own else None,
        "kv_bytes": 7.25e6 if own else None,
        "gb_per_second": 11.0 if own else None,
        "share_of_limit": 0.75 if own else None,
        "attention_share_of_limit": 0.625 if own and depth else None,
    }


def record(peer: bool, prompts: bool) -> Json:
    """A record with two depths; times are 8 and 16 ms for pykvq, 24 and 64 for llama.cpp."""
    results = [result("pykvq", "skvq", "generation", d, t) for d, t in ((0, 8.0), (8192, 16.0))]
    if peer:
        results += [
            result("llama.cpp", "f16 + fa", "generation", d, t)
            for d, t in ((0, 24.0), (8192, 64.0))
        ]
    if prompts:
        results.append(result("pykvq", "skvq", "prompt", 0, 2.0))
        results.append(result("llama.cpp", "f16 + fa", "prompt", 0, 5.0))
    data: Json = {
        "command": "python bench/speed.py m",
        "date": "2026-01-02",
        "machine": "M, 2 cores",
        "load_before": None,
        "versions": {"pykvq": "1", "llama-cpp-python": "0.9", "llama.cpp": "AVX2 = 1"},
        "model": {"name": "Some model", "file": "m.gguf", "bytes_weights": 90e6},
        "settings": {
            "kv": ["skvq"],
            "n_prompt": 512 if prompts else 0,
            "n_gen": 64,
            "repetitions": 5,
            "fill_from": 2048,
            "peer": "llama.cpp" if peer else None,
        },
        "limits": {"isa": "avx2", "n_threads": 2, "read_bytes": 2e10, "int8_operations": None},
        "results": results,
    }
    if peer:
        ratios = {
            "generation": {"0": 3.0, "8192": 4.0},
            "attention": {"8192": None},
            "prompt": {"0": 2.5} if prompts else {},
        }
        best = {"generation": {"0": "f16 + fa", "8192": "f16 + fa"}}
        best |= {"prompt": {"0": "f16 + fa"} if prompts else {}}
        data |= {"ratios": ratios, "ratios_by": {"skvq": {"best": ratios}}, "peer_best": best}
    else:
        data["peak_resident_bytes"] = 1.5e9
    return data


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(speed_tables, "RESULTS", tmp_path)
    return tmp_path


def test_tables_show_times_ratios_and_shares(results: Path) -> None:
    (results / "speed-m-x.json").write_text(json.dumps(record(peer=True, prompts=True)))
    lines = speed_tables.speed(PAGE).splitlines()
    assert lines.index("### M, 2 cores") < lines.index("#### Some model")
    assert "| pykvq `skvq` | 8.00 (125) | 16.00 (62.5) |" in lines
    assert "| llama.cpp `f16 + fa` | 24.00 (41.7) | 64.00 (15.6) |" in lines
    assert "| prompt of 512, tokens/s | depth 0 |" in lines
    assert "| `skvq` | its best | generation | 3.00 | 4.00 |" in lines
    assert "| `skvq` | its best | what the depth adds to it | - | - |" in lines
    assert "| `skvq` | its best | prompt | 2.50 | - |" in lines
    assert any(line.endswith("| 90 | 7.25 | 11.0 | 75 % | - |") for line in lines)
    assert any(line.endswith("| 90 | 7.25 | 11.0 | 75 % | 62 % |") for line in lines)
    (about,) = [line for line in lines if "weights; M, 2 cores" in line]
    for told in ("2 threads", "Medians of 5", "2026-01-02", "filled by repeated", "AVX2 = 1"):
        assert told in about
    assert any(line.startswith("![") and "images/speed-m-x.svg" in line for line in lines)


def test_short_table_has_prompt_first_and_deepest_depth(results: Path) -> None:
    (results / "speed-m-x.json").write_text(json.dumps(record(peer=True, prompts=True)))
    lines = speed_tables.speed_short(PAGE).splitlines()
    assert lines[2:5] == [
        "| Some model | prompt of 512 | 500 (`skvq`) | 200 (`f16 + fa`) | 2.50 |",
        "| Some model | generation at depth 0 | 125 (`skvq`) | 41.7 (`f16 + fa`) | 3.00 |",
        "| Some model | generation at depth 8192 | 62.5 (`skvq`) | 15.6 (`f16 + fa`) | 4.00 |",
    ]


def test_machines_are_apart_and_the_last_measured_comes_first(results: Path) -> None:
    older = record(peer=True, prompts=True)
    newer = record(peer=True, prompts=True) | {"machine": "N, 4 cores", "date": "2026-01-03"}
    newer["ratios"]["generation"]["0"] = 5.0
    (results / "speed-m-m.json").write_text(json.dumps(older))
    (results / "speed-m-n.json").write_text(json.dumps(newer))
    lines = speed_tables.speed(PAGE).splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "### N, 4 cores",
        "#### Some model",
        "### M, 2 cores",
        "#### Some model",
    ]
    short = speed_tables.speed_short(PAGE)
    assert "| 5.00 |" in short and "N, 4 cores" in short and "M, 2 cores" not in short


def test_long_prompts_have_a_table_of_their_own(results: Path) -> None:
    data = record(peer=True, prompts=True)
    data["settings"]["n_gen"] = 0
    data["results"] = [r for r in data["results"] if r["test"] == "prompt"]
    data["ratios_by"]["skvq"]["best"] = {"generation": {}, "prompt": {"0": 2.5}, "attention": {}}
    (results / "prompt-m-x.json").write_text(json.dumps(data))
    lines = speed_tables.prompts(PAGE).splitlines()
    assert lines[0].startswith("**Some model**, 90 MB of weights")
    assert "Medians of 5; 2026-01-02" in lines[0]
    assert "| pykvq `skvq` | 500 |" in lines
    assert "| llama.cpp `f16 + fa` | 200 |" in lines
    assert lines[-1] == "| `skvq` | its best | prompt | 2.50 |"
    assert "No measurement is kept" in speed_tables.speed(PAGE)


def test_a_record_without_a_peer_shows_its_peak_of_memory(results: Path) -> None:
    (results / "speed-alone-m-x.json").write_text(json.dumps(record(peer=False, prompts=False)))
    made = speed_tables.speed(PAGE)
    assert "\n#### Some model, alone\n" in made and "Peak resident memory 1.50 GB" in made
    assert "times as fast" not in made and "prompt of" not in made
    assert "No measurement is kept" in speed_tables.speed_short(PAGE)


def test_what_was_not_measured_is_said_to_be_missing(results: Path) -> None:
    for make in speed_tables.MAKERS.values():
        assert "No measurement is kept" in make(PAGE)


def test_a_plot_of_other_numbers_or_without_a_record_is_a_fault(tmp_path: Path) -> None:
    data = record(peer=True, prompts=True)
    path = tmp_path / "speed-m-x.json"
    path.write_text(json.dumps(data))
    (plot,) = make_plots.wanted(tmp_path, tmp_path)
    assert make_plots.faults([plot], tmp_path) == ["speed-m-x.svg is missing or out of date"]
    plot.path.write_text(f"<svg>{plot.digest}</svg>")
    assert make_plots.faults([plot], tmp_path) == []
    (tmp_path / "speed-gone-x.svg").touch()
    assert make_plots.faults([plot], tmp_path) == ["speed-gone-x.svg has no record"]
    data["results"][0]["ms_per_token"] = 8.5
    path.write_text(json.dumps(data))
    (changed,) = make_plots.wanted(tmp_path, tmp_path)
    assert make_plots.faults([changed], tmp_path)[0] == "speed-m-x.svg is missing or out of date"


def test_a_plot_is_drawn_to_the_same_bytes_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `plot`)")
    (tmp_path / "speed-m-x.json").write_text(json.dumps(record(peer=True, prompts=True)))
    (plot,) = make_plots.wanted(tmp_path, tmp_path)
    make_plots.write(plot)
    first = plot.path.read_bytes()
    assert plot.is_current()
    make_plots.write(plot)
    assert plot.path.read_bytes() == first
