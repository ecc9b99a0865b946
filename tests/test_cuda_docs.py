"""The tables of docs/cuda.md that are made from records."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
import cuda_tables

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "cuda.md"
ABOUT = {"command": "python bench/it.py", "date": "2026-01-02"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cuda_tables, "RESULTS", tmp_path)
    return tmp_path


def cells(text: str) -> list[list[str]]:
    """The rows of a table below its heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


@pytest.mark.parametrize("name", cuda_tables.MAKERS)
def test_what_has_no_record_names_the_command_that_makes_it(name: str, results: Path) -> None:
    assert "`, then `make tables`." in cuda_tables.MAKERS[name](PAGE)


def test_memory_is_shown_by_part_and_the_longest_contexts_by_memory(results: Path) -> None:
    parts = ("weights", "rows", "sealed", "tables", "scratch")
    sizes = {f"bytes_gpu_{part}": 10**6 * (i + 1) for i, part in enumerate(parts)}
    context = {"kv": "skvq", "n_ctx": 8192, **sizes, "bytes_gpu": 15 * 10**6, "bytes_host": 10**5}
    longest = [
        {"kv": kv, "memory": memory, "n_ctx": memory // 1000}
        for memory in (8 * 10**9, 24 * 10**9)
        for kv in ("f16", "skvq")
    ]
    model = {"model": "M", "file": "m.gguf", "contexts": [context], "longest": longest}
    (results / "cuda-memory.json").write_text(json.dumps(ABOUT | {"models": [model]}))
    assert cells(cuda_tables.memory(PAGE)) == [
        ["M", "`skvq`", "8k", "1.0", "2.0", "3.0", "4.0", "5.0", "15.0", "0.1"]
    ]
    assert cells(cuda_tables.longest(PAGE)) == [
        ["M", "`f16`", "8 000 000", "24 000 000"],
        ["M", "`skvq`", "8 000 000", "24 000 000"],
    ]
    assert "| 8 GB | 24 GB |" in cuda_tables.longest(PAGE)


def test_predictions_say_what_bounds_them(results: Path) -> None:
    gpu = {"gpu": "G", "ns": 0.125, "times_memory_bound": 1.5, "bound_by": "issue"}
    row = {"kernel": "decode", "keys": "u2", "values": "c8", "group": 4, "d_head": 128}
    row |= {"bytes": 62.0, "instructions": 20.0, "gpus": [gpu]}
    record = ABOUT | {"gpus": [{"name": "G"}], "rows": [row]}
    (results / "cuda-cost.json").write_text(json.dumps(record))
    made = cuda_tables.cost(PAGE)
    assert cells(made) == [["`decode`", "u2, c8", "4 x 128", "62", "20.0", "0.125 (1.50, issue)"]]
    assert "`python bench/it.py`, 2026-01-02 ([record](" in made


def test_what_was_measured_is_shown_beside_the_speed_of_a_copy(results: Path) -> None:
    test: dict[str, Any] = {"setting": "skvq", "tokens_per_second": 100.0, "depth": 0}
    generation = {**test, "test": "generation", "gb_per_second": 12.5, "share_of_copy": 0.5}
    prompt = {**test, "test": "prompt", "gb_per_second": None}
    record = ABOUT | {
        "model": {"name": "M"},
        "gpu": {"model": "G"},
        "copy_bytes_per_second": 25e9,
        "results": [generation, prompt],
    }
    (results / "gpu-g-m.json").write_text(json.dumps(record))
    made = cuda_tables.measured(PAGE)
    assert "**M** on G, whose copy reaches 25 GB/s" in made
    assert cells(made) == [
        ["skvq", "generation", "0", "100.0", "12.5", "50 %"],
        ["skvq", "prompt", "0", "100.0", "-", "-"],
    ]
