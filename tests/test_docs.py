"""The documentation says what the code does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
import make_tables

ROOT = Path(__file__).resolve().parents[1]


def test_tables_are_the_generated_ones() -> None:
    command = [sys.executable, str(ROOT / "docs" / "make_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def record(kl: dict[str, float], setting: tuple[int, int]) -> str:
    """A record of smollm2 by the divergence of each scheme, all with these sinks and window."""
    facts = {"bits_k": 2.0, "bits_v": 3.0, "bits_sealed": 2.5, "bits_effective_at": 2.6}
    about = {"simulated": True, "sinks": setting[0], "window": setting[1], "bytes_at": 7e6}
    found = {"ppl": 9.0, "se_kld": None, "median_kld": 0.0, "p99_kld": 0.0, "top1": 1.0}
    data = {
        "settings": {
            "text": {"name": "a.txt"},
            "cache": {"at": 32768},
            "kl": {"chunks": 3, "n_ctx": 64},
        },
        "runs": [{"date": "2026-01-02", "machine": "M"}],
        "schemes": {name: facts | about for name in kl},
        "results": {
            "kl": {
                name: found | {"mean_kld": value, "tokens": 96, "runs": [0]}
                for name, value in kl.items()
            }
        },
    }
    return json.dumps(data)


def test_divergence_in_a_scheme_s_own_setting_stands_beside_where_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_tables, "RESULTS", tmp_path)
    page = ROOT / "docs" / "kv-schemes.md"

    def made(columns: tuple[make_tables.Column, ...]) -> str:
        return make_tables.measured(columns, lambda name: True, page)

    common = record({"kivi-2": 0.25, "rtn-2": 0.5}, (5, 128))
    (tmp_path / "eval-smollm2-a.json").write_text(common)
    without = made(make_tables.LONG)
    assert "| 0.2500 |" in without and "own sinks" not in without and "needles" not in without
    (tmp_path / "eval-own-smollm2-a.json").write_text(record({"kivi-2": 0.75}, (0, 32)))
    beside = made(make_tables.LONG)
    rows = {line.split("`")[1]: line for line in beside.splitlines() if line.startswith("| `")}
    assert list(rows) == ["kivi-2", "rtn-2"]
    assert "| 0.2500 |" in rows["kivi-2"] and "| 0.7500, 0 + 32 |" in rows["kivi-2"]
    assert "| - |" in rows["rtn-2"]
    assert beside.count("3 chunks of 64 tokens, 96 scored; 2026-01-02, M ([record](") == 2
    assert "eval-own-smollm2-a.json" in beside
    assert "eval-own" not in made(make_tables.SHORT)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
    ],
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


#: Which headers of the core a header may include (docs/how-it-works.md, "The parts").
LAYERS = {
    "bytes.h": set(),
    "base.h": {"bytes.h"},
    "clock.h": {"base.h"},
    "gguf.h": {"base.h"},
    "gguf_part.h": {"gguf.h", "map.h"},
    "map.h": {"base.h"},
    "memory.h": {"base.h"},
    "ops.h": {"base.h"},
    "pool.h": {"base.h"},
    "cpu.h": set(),
    "weights.h": {"base.h"},
    "kv_ids.h": set(),
    "kv_format.h": {"bytes.h", "kv_ids.h"},
    "kv_codec.h": {"kv_format.h"},
    "kv_codec_math.h": {"bytes.h"},
    "kv_basis.h": {"bytes.h", "kv_ids.h"},
    "kv_scheme.h": {"base.h", "kv_basis.h", "kv_codec.h"},
    "kv_codec_parts.h": {"kv_codec.h", "kv_codec_math.h"},
    "kv_wave.h": {"kv_format.h"},
    "kv_profile.h": {"base.h", "kv_wave.h"},
    "kv_plan.h": {"kv_profile.h", "kv_scheme.h", "kv_wave.h"},
    "kv_ring.h": {"kv_plan.h"},
    "isa.h": {"base.h", "kv_basis.h", "kv_codec.h", "kv_wave.h", "weights.h"},
    "kv_attend.h": {"clock.h", "isa.h", "kv_ring.h", "pool.h"},
    "arch.h": {"gguf.h", "weights.h"},
    "device.h": {"arch.h", "kv_ring.h"},
    "device_cpu.h": {"device.h", "kv_attend.h"},
    "forward.h": {"device_cpu.h"},
    "cache_args.h": {"kv_format.h"},
    "attend_args.h": {"cache_args.h"},
    "prepare_args.h": {"cache_args.h"},
    "matmul_args.h": {"bytes.h"},
    "cuda_types.h": set(),
    "cuda_api.h": {"base.h", "cuda_types.h"},
    "cuda_image.h": {"cuda_api.h"},
    "cuda_gpu.h": {"cuda_image.h"},
    "cuda_layout.h": {"cache_args.h", "kv_plan.h"},
    "cuda_weights.h": {"arch.h", "cuda_api.h"},
    "cuda_device.h": {"cuda_gpu.h", "device.h"},
}


@pytest.mark.parametrize("header", LAYERS)
def test_headers_include_only_what_lies_below(header: str) -> None:
    (path,) = (ROOT / "core").rglob(header)
    included = {Path(name).name for name in re.findall(r'#include "([^"]+)"', path.read_text())}
    assert {name for name in included if name.endswith(".h")} - {"kvq.h"} == LAYERS[header]


def test_lines_of_the_core_have_100_columns_of_ascii() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "core").rglob("*.*")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100 or not line.isascii()
    ]
    assert not wrong


def planned(goal: str) -> str:
    """What make would do for a goal in a fresh clone."""
    free = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "--dry-run", f"--directory={ROOT}", "VENV=/no/such/venv", goal]
    return subprocess.run(command, env=free, capture_output=True, text=True, check=True).stdout


def test_who_only_runs_gets_no_development_tools() -> None:
    assert "pip install" in planned("run")
    assert "[dev]" not in planned("run")
    for goal in ("setup", "lint", "test-py"):
        assert planned(goal).count("[dev]") == 1
    assert "[dev]" in planned("test")


def test_names_of_files_are_unique_in_the_core() -> None:
    names = [path.name for path in (ROOT / "core").rglob("*.*")]
    assert sorted(names) == sorted(set(names))
