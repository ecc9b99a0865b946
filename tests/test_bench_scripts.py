"""The scripts of bench/ that measure what surrounds a step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pykvq import native

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import contention
import fast_path
import startup

N_SCORED = 16


def reading(path: Path, tokens: list[int]) -> fast_path.Reading:
    ids = np.array(tokens[:160], np.int32)
    return fast_path.Reading(str(path), ids, N_SCORED, ["f16", "skvq"], window=0)


def test_the_reference_reads_in_a_process_of_its_own(
    tiny_path: Path, random_tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVQ_ISA", raising=False)
    before = native.isa_selected()
    wanted = reading(tiny_path, random_tokens)
    reference = fast_path.read_with("ref", wanted)
    fast, same = fast_path.read_with(before, wanted), fast_path.read_with(before, wanted, reference)
    assert native.isa_selected() == before
    for kv in wanted.kv:
        logits = reference[kv].logits
        assert logits.shape[0] == N_SCORED and reference[kv].n_sealed >= 64
        assert fast_path.other_bytes(reference[kv].blocks, same[kv].blocks) == 0
        assert 0 <= fast_path.other_bytes(reference[kv].blocks, fast[kv].blocks) < 0.5
        assert fast_path.compare(logits, fast[kv].logits)["mean_kl"] < 1e-2
        assert fast_path.compare(logits, same[kv].logits)["mean_kl"] < 1e-3
        assert fast_path.compare(logits, logits)["max_kl"] == 0


def test_blocks_that_are_given_are_read(tiny_path: Path, random_tokens: list[int]) -> None:
    wanted = reading(tiny_path, random_tokens)
    own = fast_path.read_with("ref", wanted)
    blocks = {key: block ^ 0x55 for key, block in own["skvq"].blocks.items()}
    other = fast_path.Found(own["skvq"].logits, blocks, own["skvq"].n_sealed)
    given = fast_path.read_with("ref", wanted, {"skvq": other})
    assert np.array_equal(given["f16"].logits, own["f16"].logits)
    assert not np.array_equal(given["skvq"].logits, own["skvq"].logits)


def test_a_process_that_runs_on_another_instruction_set_is_refused(
    tiny_path: Path, random_tokens: list[int]
) -> None:
    with pytest.raises((ValueError, RuntimeError), match="KVQ_ISA"):
        fast_path.read_with("none-such", reading(tiny_path, random_tokens))


def test_the_busy_process_ends_with_its_context() -> None:
    with contention.busy_process() as process:
        assert process.poll() is None
    assert process.returncode is not None


def test_ratios_are_of_medians() -> None:
    case = contention.Case(3, 2, True, None, [4_000_000, 3_000_000, 2_000_000])  # type: ignore[arg-type]
    found = case.result(alone=1.5)
    assert (found["ms"], found["ms_mean"], found["ratio"]) == (3.0, 3.0, 2.0)


def test_a_run_tells_time_memory_and_output() -> None:
    n_bytes = 300 << 20
    code = f"import time; held = b'x' * {n_bytes}; time.sleep(0.2); print(held[:1])"
    seconds, peak, output = startup.run([sys.executable, "-c", code])
    assert seconds >= 0.2 and n_bytes < peak and output == b"b'x'\n"


def test_a_run_that_fails_is_an_error() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        startup.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_contention_holds_its_claims_against_the_worst_cases() -> None:
    results = [
        {"n_threads": 2, "processors": 2, "busy": False, "ratio": 1.0},
        {"n_threads": 2, "processors": 1, "busy": False, "ratio": 1.3},
        {"n_threads": 1, "processors": 1, "busy": False, "ratio": 1.0},
        {"n_threads": 2, "processors": 2, "busy": True, "ratio": 2.0},
    ]
    assert [(ratio, most) for _, ratio, most in contention.claims(results)] == [
        (2.0, 2.5),
        (1.3, 1.2),
    ]


def test_confined_threads_get_their_processors_back() -> None:
    before = os.sched_getaffinity(0)
    with contention.confined(1):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("seconds", "n_bytes", "kept"), [(0.4, 60e6, True), (0.41, 1e6, False), (0.1, 61e6, False)]
)
def test_startup_holds_its_claims(seconds: float, n_bytes: float, kept: bool) -> None:
    assert startup.keeps_claims({"seconds": seconds, "bytes_beyond": n_bytes}) is kept
