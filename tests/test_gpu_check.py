"""`bench/gpu_check.py` and `pykvq bench --device`: without a driver, and on the stand-in."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_tiny

from pykvq.cli import main

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import gpu_check

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = ROOT / "build" / "cuda" / "fake" / "libcuda.so.1"
NO_KERNELS = "has no CUDA kernels"
LITTLE = shlex.split(
    "--depths 0,256 --fill-from 220 --prompt 10 --generate 2 --repetitions 2 --compare 280"
)


def run(library: str | Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, as it loads one driver in its life, with further variables."""
    stand_in = {"KVQ_LIBCUDA": str(library), "FAKECUDA_MEMORY": "400000000"}
    environment = {**os.environ, **stand_in, **variables}
    command = [sys.executable, *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=300
    )


def check(
    library: str | Path,
    model: Path,
    folder: Path,
    script: str = "bench/gpu_check.py",
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Runs the script on little; without the tests of the device, which run beside this one."""
    place = ("--no-tests", "--folder", str(folder))
    return run(library, *shlex.split(script), str(model), *LITTLE, *place, **variables)


def with_limit(name: str, limit: float) -> str:
    """The script with another value of a constant."""
    program = f"import gpu_check, sys; gpu_check.{name} = {limit}; sys.exit(gpu_check.main())"
    return f"-c 'import sys; sys.path.append(\"bench\"); {program}'"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf")


@pytest.fixture
def stand_in() -> Path:
    if not STAND_IN.exists():
        pytest.skip(f"there is no {STAND_IN}: `make cuda-driver` builds it")
    if NO_KERNELS in run(STAND_IN, "-m", "pykvq", "info", "--devices").stdout:
        pytest.skip("the extension has no CUDA kernels: `make cuda`, then `make ext`")
    return STAND_IN


def test_without_a_driver_one_sentence_says_why(model: Path, tmp_path: Path) -> None:
    done = check("/no/such/libcuda.so", model, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("There is nothing to check: There is no CUDA driver: /no/such")
    assert done.stdout.count("\n") == 1
    assert not list(tmp_path.glob("*.json"))


def test_a_device_is_compared_with_the_cpu_and_measured(
    model: Path, tmp_path: Path, stand_in: Path
) -> None:
    done = check(stand_in, model, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu-simulated-device-0-tiny.json").read_text())
    assert record["gpu"]["name"] == record["device"]["name"] == "cuda:0"
    assert record["copy_bytes_per_second"] > 0
    assert record["kl_of_kernels"] < 1e-5
    assert set(record["against_cpu"]) == {"skvq", "f16"}
    for found in record["against_cpu"].values():
        assert found["tokens_sealed"] == 192
        assert found["same_blocks"]["mean_kl"] < 1e-3
    assert record["against_cpu"]["f16"]["first_other_token"] is None
    results = {(r["kv"], r["test"], r["depth"]): r for r in record["results"]}
    assert set(results) == {
        (kv, test, depth)
        for kv in ("skvq", "f16")
        for test, depth in (("generation", 0), ("generation", 256), ("prompt", 0))
    }
    for result in results.values():
        assert result["gpu_layers"] == 3  # and the output
        assert result["stages_ms"] is None and result["share_of_bandwidth"] is None
    deep = results["f16", "generation", 256]
    assert deep["filled"] and deep["samples_ns_at_depth_0"]
    share = deep["gb_per_second"] * 1e9 / record["copy_bytes_per_second"]
    assert deep["share_of_copy"] == pytest.approx(share)


def test_a_device_that_is_wrong_fails_the_check(
    model: Path, tmp_path: Path, stand_in: Path
) -> None:
    done = check(stand_in, model, tmp_path, with_limit("MOST_KL", 1e-12))
    assert done.returncode == 1
    assert "at most 1e-12 was expected." in done.stdout
    assert not list(tmp_path.glob("*.json"))


def test_a_device_whose_tensor_cores_have_no_subnormal_halves_fails_the_check(
    model: Path, tmp_path: Path, stand_in: Path
) -> None:
    script = with_limit("MOST_KL_OF_KERNELS", 1e-5)  # random heads look around anyway
    done = check(stand_in, model, tmp_path, script, CUSIM_MMA="flushing")
    assert done.returncode == 1
    assert done.stdout.endswith(
        "at most 1e-05 was expected: the tensor cores of cuda:0 may take subnormal halves for 0, on"
        " which core/cuda/kernels/decode.cu rests.\n"
    )
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("assert True", (1, 0, 0)),
        ("assert False", (0, 1, 0)),
        ("pytest.skip('for a reason')", (0, 0, 1)),
        ("this is no Python", (0, 1, 0)),
    ],
)
def test_tests_that_are_skipped_do_not_count_as_passed(
    tmp_path: Path, body: str, outcome: tuple[int, int, int]
) -> None:
    path = tmp_path / "test_it.py"
    path.write_text(f"import pytest\n\n\ndef test_it() -> None:\n    {body}\n")
    found = gpu_check.run_tests(str(path))
    assert (found["passed"], found["failed"], found["skipped"]) == outcome


def test_bench_times_what_the_device_runs(model: Path, stand_in: Path) -> None:
    words = ("-p", "10", "-n", "2", "-r", "1", "-t", "1", "--device")
    bench = ("-m", "pykvq", "bench", str(model), *words)
    on_gpu = (*bench, "cuda", "-ngl", "1")
    record = json.loads(run(stand_in, *on_gpu, "-o", "json").stdout)
    assert record["device"]["name"] == "cuda:0"
    assert [r["gpu_layers"] for r in record["results"]] == [1, 1]
    assert "on cuda:0, Simulated device 0" in run(stand_in, *on_gpu).stdout
    on_cpu = run(stand_in, *bench, "cpu", "-o", "json")
    record = json.loads(on_cpu.stdout)
    assert record["device"] is None
    assert record["results"][0]["stages_ms"]["weights"] > 0


def test_perplexity_on_the_device_is_that_of_the_cpu(
    model: Path, tmp_path: Path, stand_in: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text()[:3000])
    words = ("-f", str(text), "-c", "256", "--chunks", "1", "--kv", "f16,skvq", "--stream")
    found = []
    for device, place in (("cpu", r"thread"), ("cuda", r"all 2 layers and the output on CUDA")):
        done = run(
            stand_in, "-m", "pykvq", "perplexity", str(model), *words, "--json", "--device", device
        )
        assert place in done.stderr
        found.append([result["ppl"] for result in json.loads(done.stdout)["results"]])
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_evaluations_stay_on_the_cpu_where_there_is_a_device(
    model: Path, tmp_path: Path, stand_in: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "LICENSE").read_text()[:3000])
    words = ("-f", str(text), "-c", "256", "--chunks", "1", "--kv", "kivi-2", "--tasks", "kl")
    record = tmp_path / "record.json"
    done = run(stand_in, "-m", "pykvq", "eval", str(model), *words, "-o", str(record))
    assert done.returncode == 0, done.stderr
    assert "kivi-2" in json.loads(record.read_text())["results"]["kl"]


def test_bench_refuses_a_device_that_is_not_there(
    tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tiny_path), "-n", "1", "-p", "1", "--device", "cuda:63"]) == 2
    assert capsys.readouterr().err.count("pykvq: error: ") == 1
