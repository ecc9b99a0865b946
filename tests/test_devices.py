"""`pykvq info --devices`: without a driver, and on the stand-in that `make cuda-driver` builds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from pykvq.cli import main
from pykvq.native_device import Device, Devices, devices

STAND_IN = Path(__file__).resolve().parent.parent / "build" / "cuda" / "fake" / "libcuda.so.1"


def info(library: str | Path, *flags: str, **variables: str) -> str:
    """What the command prints; a process loads one driver in its life, so it has its own."""
    environment = {**os.environ, **variables, "KVQ_LIBCUDA": str(library)}
    command = [sys.executable, "-m", "pykvq", "info", "--devices", *flags]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return ran.stdout


@pytest.fixture
def stand_in() -> Path:
    if not STAND_IN.exists():
        pytest.skip(f"there is no {STAND_IN}: `make cuda-driver` builds it")
    return STAND_IN


def device_on(stand_in: Path, **variables: str) -> dict[str, Any]:
    """The only device."""
    (found,) = json.loads(info(stand_in, "--json", **variables))["devices"]
    return dict(found)


def test_without_a_driver_the_cpu_is_shown_and_why_there_is_no_device() -> None:
    why = "There is no CUDA driver: /no/such/libcuda.so: cannot open shared object file"
    text = info("/no/such/libcuda.so")
    assert text.startswith("cpu: ")
    assert why in text
    facts = json.loads(info("/no/such/libcuda.so", "--json"))
    assert facts["devices"] == []
    assert facts["why_none"].startswith(why)
    assert facts["cpu"]["isa"] in facts["cpu"]["isa_available"]
    assert facts["cpu"]["threads"] >= 1
    assert facts["cpu"]["bytes_available"] > 0


def test_devices_describe_themselves(stand_in: Path) -> None:
    variables = {"FAKECUDA_DEVICES": "2", "FAKECUDA_CAPABILITY": "90"}
    facts = json.loads(info(stand_in, "--json", **variables))
    assert facts["why_none"] is None
    assert [device["name"] for device in facts["devices"]] == ["cuda:0", "cuda:1"]
    for device in facts["devices"]:
        assert device["compute_capability"] == "9.0"
        assert device["driver"] == "13.0"
        assert device["bytes_total"] == device["bytes_free"] == 4 << 30
        assert device["usable"] == (device["why_not"] is None) == (device["kernels"] is not None)
    text = info(stand_in, **variables)
    assert "cuda:1: Simulated device 1" in text
    assert "compute capability: 9.0" in text


def test_a_device_that_is_too_old_is_shown_with_the_reason(stand_in: Path) -> None:
    device = device_on(stand_in, FAKECUDA_CAPABILITY="61")
    assert not device["usable"]
    assert "has compute capability 6.1, expected 7.5 or more." in device["why_not"]
    text = info(stand_in, FAKECUDA_CAPABILITY="61")
    assert f"cannot be used: {device['why_not']}" in text


@pytest.mark.parametrize(
    ("version", "capability", "kernels"),
    [("13000", "87", "CUDA 13.0"), ("13000", "121", "CUDA 13.0"), ("12020", "87", "CUDA 12.9")],
)
def test_embedded_kernels_serve_both_lines_of_drivers(
    stand_in: Path, version: str, capability: str, kernels: str
) -> None:
    device = device_on(stand_in, FAKECUDA_VERSION=version, FAKECUDA_CAPABILITY=capability)
    if "has no CUDA kernels" in (device["why_not"] or ""):
        pytest.skip("the extension has no CUDA kernels: `make cuda`, then `make ext`")
    if kernels == "CUDA 12.9" and "is older than 13.0" in (device["why_not"] or ""):
        pytest.skip("the extension has no kernels for CUDA 12: `make cuda`, then `make ext`")
    assert device["why_not"] is None
    assert device["kernels"] == kernels


def test_devices_are_not_those_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "smollm2", "--devices"]) == 2
    assert "--devices is about this machine, but a model is named." in capsys.readouterr().err


def device_of(why_not: str | None) -> Device:
    numbers = dict.fromkeys([f.name for f in fields(Device)], 0)
    given = {"name": "cuda:0", "usable": why_not is None, "why_not": why_not}
    return Device(**{**numbers, **given})  # type: ignore[arg-type]


UNUSABLE = Devices([device_of("CUDA device 0 is too old.")], None)


@pytest.mark.parametrize(
    ("here", "flags", "reason"),
    [
        (Devices([], "There is no driver."), ["-ngl", "20"], "There is no driver."),
        (Devices([], "There is no driver."), [], None),
        (Devices([], "There is no driver."), ["-ngl", "0"], None),
        (UNUSABLE, [], "CUDA device 0 is too old."),
        (UNUSABLE, ["--device", "cpu"], None),
        (Devices([device_of(None)], None), ["--kv-topk", "64"], "--kv-topk works on the CPU only."),
        (Devices([device_of(None)], None), [], "No layer fits a GPU."),
    ],
)
def test_run_says_why_layers_that_could_be_on_a_gpu_are_not(
    here: Devices,
    flags: list[str],
    reason: str | None,
    tiny_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if any(device.usable for device in devices().found):
        pytest.skip("there is a GPU that takes the layers")
    monkeypatch.setattr("pykvq.native_device.devices", lambda: here)
    assert main(["run", str(tiny_path), "--raw", "-p", "the end", "-n", "2", *flags]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "on the CPU" in line]
    assert said == ([] if reason is None else [f"pykvq: All layers run on the CPU. {reason}"])
