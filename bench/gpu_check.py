"""Tests the CUDA device on a GPU, compares it with the CPU, and measures it.

    python bench/gpu_check.py
    python bench/gpu_check.py model.gguf --depths 0,32768

First whether the device's tensor cores read subnormal halves as what they are; the tests of
tests/test_cuda_device.py on the device; then the model's logits, greedy tokens and sealed blocks
against the CPU's, and only if all is well the times: what a copy within the device's memory
reaches, tokens by depth and prompts per second, beside llama.cpp where that was built for GPUs. It
writes bench/results/gpu-DEVICE-MODEL.json. Where there is no device that pykvq can use it says why,
and ends well.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from copy_speed import copy_speed
from fast_path import Reading, compare, other_bytes, read_scheme
from records import RESULTS, ROOT, Json, command, model_slug, numbers, provenance, save, slug

import pykvq
from pykvq.bench import harness, report
from pykvq.bench.options import FILL_FROM, Options
from pykvq.bench.peer import require_llama_cpp
from pykvq.console import ProgressBar
from pykvq.errors import KvqError
from pykvq.session import FloatArray

#: The most that the CPU's and the device's predictions may differ by, in nats, from the same sealed
#: blocks. Sums are in another order and prompts are multiplied in halves, so they are not equal; a
#: wrong kernel is far beyond.
MOST_KL = 1e-3

#: The most that kernels of one token and of several may differ by, in nats, since both round to
#: halves. Without subnormal halves the one kernel would see no keys in sealed blocks at all.
MOST_KL_OF_KERNELS = 1e-3

TESTS = "tests/test_cuda_device.py"


def find_device() -> tuple[pykvq.Device | None, str]:
    """The first device that can be used, or why there is none."""
    here = pykvq.devices()
    for device in here.found:
        if device.usable:
            return device, ""
    return None, here.why_none or str(here.found[0].why_not)


def kl_of_kernels(model: pykvq.Model, device: str) -> float:
    """How far predictions of tokens one by one are from those of the same tokens two by two.

    Both read the same sealed blocks: core/cuda/kernels/decode.cu takes the codes of keys for
    subnormal halves, core/cuda/kernels/attend.cu unpacks them. That tensor cores honour subnormal
    halves was measured on V100, T4 and A100 (M. Fasi et al., Numerical behavior of NVIDIA tensor
    cores, PeerJ Computer Science 7:e330, 2021); NVIDIA does not say so.

    Returns:
        The mean KL(two by two || one by one) of the next token's distribution, in nats.
    """
    n, more = 200, 16  # three blocks are sealed, and no other one on the way
    ids = model.tokenizer.encode((ROOT / "README.md").read_text(encoding="utf-8"))[: n + more]

    def read(at_once: int) -> FloatArray:
        with model.session(kv="skvq", kv_window=0, n_ctx=n + more, device=device) as session:
            session.eval(ids[:n], "none")
            passes = range(n, n + more, at_once)
            return np.concatenate([session.eval(ids[i : i + at_once], "all") for i in passes])

    return float(compare(read(2), read(1))["mean_kl"])


def run_tests(tests: str) -> Json:
    """Runs tests, in the environment that this process has: how many there were, by outcome.

    Tests that are skipped have shown nothing, so they are counted apart.
    """
    with tempfile.TemporaryDirectory(prefix="pykvq-") as folder:
        found = Path(folder) / "tests.xml"
        words = [sys.executable, "-m", "pytest", "-q", tests, f"--junitxml={found}"]
        done = subprocess.run(words, cwd=ROOT, check=False).returncode
        suite = ElementTree.parse(found).getroot()[0].attrib if found.exists() else {}
    n = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    wrong = n["failures"] + n["errors"] + (done != 0 and not n["failures"] + n["errors"])
    passed = n["tests"] - n["failures"] - n["errors"] - n["skipped"]
    return {"file": tests, "passed": passed, "failed": wrong, "skipped": n["skipped"]}


def against_cpu(
    model: pykvq.Model, device: str, schemes: Sequence[str], n: int, n_greedy: int
) -> Json:
    """What the device finds, and the CPU, of the first tokens of README.md.

    A number that is rounded differently may be sealed as another code, which moves the predictions
    of a small model by more than all else; so the device reads the CPU's blocks too.

    Args:
        model: The model.
        device: As "cuda:0".
        schemes: KV schemes; NAME:BITS is not taken.
        n: Tokens, as if they came one by one; of the second half logits are compared.
        n_greedy: Tokens that are written then.
    """
    ids = model.tokenizer.encode((ROOT / "README.md").read_text(encoding="utf-8"))[:n]
    reading = Reading(model.info.path, ids, n // 2, schemes, window=64)
    results = {}
    for kv in schemes:
        options = {"kv": kv, "kv_window": 64, "n_ctx": n + n_greedy}
        with (
            model.session(**options, device="cpu") as on_cpu,
            model.session(**options, device=device) as on_gpu,
        ):
            cpu, gpu = (read_scheme(session, reading, None) for session in (on_cpu, on_gpu))
            on_gpu.reset()
            same = read_scheme(on_gpu, reading, cpu.blocks)
            written = [
                session.generate(ids, n_greedy, reuse=False, temperature=0).tokens
                for session in (on_cpu, on_gpu)
            ]
        differ = [i for i, (a, b) in enumerate(zip(*written, strict=False)) if a != b]
        results[kv] = {
            "tokens_sealed": gpu.n_sealed,
            "same_blocks": compare(cpu.logits, same.logits),
            "own_blocks": compare(cpu.logits, gpu.logits)
            | {"other_bytes": other_bytes(cpu.blocks, gpu.blocks)},
            "greedy_tokens": n_greedy,
            "first_other_token": differ[0] if differ else None,
        }
    return results


def add_rates(results: Sequence[Json], copy: float) -> None:
    """Adds what of the measured bandwidth is used, and at which rate the cache alone is read."""
    told = [r for r in results if r["gb_per_second"] is not None]  # generation by pykvq
    shallow = {r["setting"]: r for r in told if r["depth"] == 0}
    for r in told:
        r["share_of_copy"] = r["gb_per_second"] * 1e9 / copy
        if r["ms_over_depth_0"] and r["setting"] in shallow:
            more = r["kv_bytes"] - shallow[r["setting"]]["kv_bytes"]
            r["kv_gb_per_second"] = more / r["ms_over_depth_0"] / 1e6


def peer_here() -> tuple[str | None, str]:
    """The peer, if it can use a GPU; else why it takes no part."""
    try:
        if require_llama_cpp().llama_cpp.llama_supports_gpu_offload():
            return "llama.cpp", ""
    except KvqError as error:
        return None, str(error)
    return None, "llama-cpp-python was built for the CPU alone, so llama.cpp is not timed."


def arguments() -> argparse.Namespace:
    """What was asked for."""
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="smollm2", help="a name or a GGUF file")
    parser.add_argument("--depths", type=numbers, default=[0, 2048, 8192, 32768])
    parser.add_argument("--kv", default="skvq,f16", help="schemes, divided by commas")
    parser.add_argument("--prompt", type=int, default=default.n_prompt)
    parser.add_argument("--generate", type=int, default=default.n_gen)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--compare", type=int, default=512, help="tokens compared with the CPU's")
    parser.add_argument("--fill-from", type=int, default=FILL_FROM)
    parser.add_argument("--no-tests", action="store_true", help=f"without {TESTS}")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the record goes")
    return parser.parse_args()


def measure(model: pykvq.Model, device: pykvq.Device, args: argparse.Namespace) -> Json:
    """The record of times."""
    copy = copy_speed(int(device.name.partition(":")[2]), min(1 << 30, device.bytes_free // 8))
    peer, no_peer = peer_here()
    print(f"copy: {copy / 1e9:.1f} GB/s", no_peer, sep="; " if no_peer else "")
    options = Options(
        kv=args.kv.split(","),
        n_prompt=args.prompt,
        n_gen=args.generate,
        depths=args.depths,
        prompt_depth=min(args.depths),
        repetitions=args.repetitions,
        fill_from=args.fill_from,
        device=device.name,
        peer=peer,
    )
    with ProgressBar() as progress:
        record = harness.run(
            model,
            options,
            command=command(),
            progress=progress,
            announce=lambda result: print(report.line(result), flush=True),
        )
    add_rates(record["results"], copy)
    return record | {"copy_bytes_per_second": copy, "no_peer": no_peer or None}


def main() -> int:
    """Checks, measures and writes the record."""
    args = arguments()
    device, why_none = find_device()
    if device is None:
        print(f"There is nothing to check: {why_none}")
        return 0
    print(f"{device.name}: {device.model}, kernels built by {device.kernels}", flush=True)
    with pykvq.Model(args.model) as model:
        apart = kl_of_kernels(model, device.name)
    if not apart <= MOST_KL_OF_KERNELS:
        print(
            f"Tokens one by one are {apart:.2g} nats from the same tokens two by two, at most"
            f" {MOST_KL_OF_KERNELS:g} was expected: the tensor cores of {device.name} may take"
            " subnormal halves for 0, on which core/cuda/kernels/decode.cu rests."
        )
        return 1
    tests = None if args.no_tests else run_tests(TESTS)
    if tests is not None and (tests["failed"] or not tests["passed"]):
        print(
            f"Of {TESTS} {tests['failed']} failed and {tests['passed']} passed on {device.name},"
            " so nothing is measured."
        )
        return 1
    with pykvq.Model(args.model) as model:
        found = against_cpu(model, device.name, args.kv.split(","), args.compare, 32)
        for kv, facts in found.items():
            print(kv, facts, flush=True)
        worst = max(facts["same_blocks"]["mean_kl"] for facts in found.values())
        if not worst <= MOST_KL:
            print(f"The mean KL from the CPU is {worst:.2g}, at most {MOST_KL:g} was expected.")
            return 1
        record = measure(model, device, args)
    record = {
        **provenance(),
        **record,
        "kl_of_kernels": apart,
        "tests": tests,
        "against_cpu": found,
        "gpu": asdict(device),
    }
    path = save(f"gpu-{slug(device.model)}-{model_slug(args.model)}", record, args.folder)
    print(report.render(record, "md"), path, sep="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
