"""The options of KV schemes on the command line: what notices and `info` say of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pykvq import Model
from pykvq.cli import main
from pykvq.profile import beside

Capture = pytest.CaptureFixture[str]

OFF = r"profiles were switched off \(--profile none, in Python profile=False\)\.$"


def notices(capsys: Capture, path: Path, *args: str) -> list[str]:
    """What `run` says on stderr when it writes 3 tokens."""
    assert main(["run", str(path), "--raw", "-p", "the end", "-n", "3", *args]) == 0
    return capsys.readouterr().err.splitlines()


def refusal(capsys: Capture, *args: str) -> str:
    """The sentence that a command refuses its arguments with."""
    assert main(list(args)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    return line


def costs(capsys: Capture, path: Path, *args: str) -> dict[str, dict[str, Any]]:
    """What `info` says of each scheme."""
    assert main(["info", str(path), "--json", *args]) == 0
    return {cost["kv"]: cost for cost in json.loads(capsys.readouterr().out)["kv"]}


# ---- run and chat ---------------------------------------------------------------------------


def test_the_start_line_says_what_was_asked_of_the_scheme(tiny_path: Path, capsys: Capture) -> None:
    def first(*args: str) -> str:
        return notices(capsys, tiny_path, *args)[0]

    f16 = "5 first and 128 last tokens in f16"
    auto = first("--kv", "auto", "--kv-bits", "1.5", "--kv-topk", "65")
    found = re.search(
        r"auto --kv-bits 1\.5 \((1\.\d\d) bits per sealed element\), (.*); prof", auto
    )
    assert found is not None
    assert 1.2 < float(found[1]) <= 1.5
    assert found[2] == f"{f16}, 128 sealed tokens read by each written one"
    layers = first("--kv", "asymkv", "--asymkv-layers", "1,0")
    assert re.search(rf"asymkv --asymkv-layers 1,0 \(1\.\d\d bits .*\), {f16}; ", layers)
    windowed = first("--kv", "skvq", "--kv-window", "64", "--kv-sinks", "0")
    assert "cache skvq (2.01 bits per sealed element), 0 first and 64 last tokens" in windowed
    assert "cache f16 (16.00 bits per sealed element); " in first("--kv", "f16")


def test_the_start_line_names_the_profile_that_is_used_and_no_other(
    tiny_path: Path, capsys: Capture
) -> None:
    profile = f"; profile {beside(tiny_path)};"
    for args, used in (
        (["f16"], False),
        (["skvq"], False),
        (["skvq-g32"], True),
        (["asymkv"], False),
        (["asymkv", "--kv-bits", "1.9"], True),
        (["svdq"], True),
        (["auto"], True),
        (["skvq-g32", "--profile", "none"], False),
    ):
        line = notices(capsys, tiny_path, "--kv", *args)[0]
        assert ("profile" in line) == (profile in line) == used, line


def test_the_last_line_has_a_seed_only_where_one_is_used(tiny_path: Path, capsys: Capture) -> None:
    assert notices(capsys, tiny_path, "-s", "7")[-1].endswith("; seed 7.")
    assert notices(capsys, tiny_path, "-s", "7", "--temp", "0")[-1].endswith("; greedy.")


def test_the_last_line_counts_the_profile_beside_the_cache(
    tiny: Model, tiny_path: Path, capsys: Capture
) -> None:
    profile = r"KV cache [\d.]+ [kM]B for 2048 tokens and profile [\d.]+ [kM]B, "
    assert re.search(profile, notices(capsys, tiny_path, "--kv", "auto")[-1])
    assert "and profile" not in notices(capsys, tiny_path, "--kv", "skvq")[-1]


@pytest.mark.parametrize("args", [["auto"], ["svdq-1.25"], ["asymkv", "--kv-bits", "1.9"]])
def test_a_profile_that_is_missing_on_request_is_said_so(
    args: list[str], tiny_path: Path, capsys: Capture
) -> None:
    run = ["run", str(tiny_path), "-p", "a", "--kv", *args]
    assert re.search(
        f"The KV scheme {args[0]} needs .*{OFF}", refusal(capsys, *run, "--profile", "none")
    )
    chat = ["chat", str(tiny_path), "--kv", *args]
    assert re.search(OFF, refusal(capsys, *chat, "--profile", "none"))
    alone = tiny_path.parent / "alone.gguf"
    if not alone.exists():
        alone.symlink_to(tiny_path)  # a profile is looked for beside the name
    run[1] = str(alone)
    assert "was given none; `pykvq calibrate` makes one" in refusal(capsys, *run)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["asymkv", "--asymkv-layers", "9,1"], "l_k is 9, expected 0 to 2, the number of layers."),
        (["asymkv", "--asymkv-layers", "1,9"], "l_v is 9, expected 0 to 2, the number of layers."),
        (
            ["auto", "--asymkv-layers", "1,1"],
            "l_k and l_v were given to the KV scheme auto, but only asymkv and asymkv-4 take them.",
        ),
        (
            ["asymkv", "--asymkv-layers", "1,1", "--kv-bits", "1.9"],
            "asymkv takes either l_k and l_v or an average of bits, but was given both (1.9 bits).",
        ),
    ],
)
def test_errors_about_layers_name_no_default_that_cannot_be_given(
    args: list[str], complaint: str, tiny_path: Path, capsys: Capture
) -> None:
    for command in (["run", str(tiny_path), "-p", "a"], ["info", str(tiny_path)]):
        line = refusal(capsys, *command, "--kv", *args)
        assert line.endswith(complaint)
        assert "-1" not in line


@pytest.mark.parametrize("command", ["run", "info"])
def test_help_says_that_topk_is_rounded(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "rounded up to whole blocks of 64" in " ".join(capsys.readouterr().out.split())


# ---- info -----------------------------------------------------------------------------------


def test_info_shows_what_a_session_with_these_options_takes(
    tiny: Model, tiny_path: Path, capsys: Capture
) -> None:
    given: dict[str, Any]
    for args, given in (
        (["auto", "--kv-bits", "1.5"], {"kv_bits": 1.5}),
        (["auto", "--kv-bits", "3"], {"kv_bits": 3.0}),
        (["asymkv", "--asymkv-layers", "1,0"], {"asymkv_layers": (1, 0)}),
        (["skvq", "--kv-window", "512", "--kv-sinks", "9"], {"kv_window": 512, "kv_sinks": 9}),
    ):
        [cost] = costs(capsys, tiny_path, "-c", "1000", "--kv", *args).values()
        with tiny.session(kv=args[0], n_ctx=1000, **given) as session:
            stats = session.stats
        assert cost["kv"] == args[0]
        assert cost["bytes"] == stats.bytes_kv
        assert cost["bytes_tables"] == stats.bytes_tables
        assert cost["bits_full"] == stats.bits_full
        assert cost["bits_sealed"] == stats.bits_sealed


def test_info_shows_the_schemes_that_are_named_in_their_order(
    tiny: Model, tiny_path: Path, capsys: Capture
) -> None:
    assert list(costs(capsys, tiny_path)) == [scheme.name for scheme in tiny.schemes]
    assert list(costs(capsys, tiny_path, "--kv", "svdq, f16")) == ["svdq", "f16"]
    assert main(["info", str(tiny_path), "--kv", "auto,f16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert rows["scheme"] == [
        "size",
        "profile",
        "bits",
        "per",
        "element",
        "of",
        "a",
        "sealed",
        "block",
    ]
    assert len(rows["auto"]) == len(rows["f16"]) + 2  # which has no profile
    window = {"--kv-window": "0", "--kv-sinks": "0"}
    none = costs(capsys, tiny_path, *(word for pair in window.items() for word in pair))
    assert none["skvq"]["bytes"] < costs(capsys, tiny_path)["skvq"]["bytes"]


def test_info_knows_the_bits_of_a_cache_that_does_not_fit(tiny_path: Path, capsys: Capture) -> None:
    args = ["--kv", "auto", "--kv-bits", "1.5", "-c", "200000000", "--kv-window", "200000000"]
    [cost] = costs(capsys, tiny_path, *args).values()
    assert cost["missing"] == "more than the memory"
    assert cost["bytes"] > 1e9 and cost["bits_full"] > 1.2
    assert 1.2 < cost["bits_sealed"] <= 1.5


def test_info_says_that_profiles_were_switched_off(tiny_path: Path, capsys: Capture) -> None:
    base = ["info", str(tiny_path), "--kv", "auto"]
    for args, expected in ((["--profile", "none"], "switched off"), ([], str(beside(tiny_path)))):
        assert main([*base, *args]) == 0
        out = capsys.readouterr().out
        [line] = [line for line in out.splitlines() if "KV profile" in line]
        assert expected[:30] in line
        assert ("needs a profile" in out) == bool(args)


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["{tiny}", "--kv-bits", "1.5"], r"Not all KV schemes take --kv-bits: name those"),
        (["{tiny}", "--kv-topk", "64"], r"Not all KV schemes take --kv-topk: name those"),
        (
            ["{tiny}", "--asymkv-layers", "1,1"],
            r"take --asymkv-layers: name those that do with --k",
        ),
        (
            ["{tiny}", "--kv", "skvq,auto", "--kv-bits", "1.5"],
            r"bits of the KV scheme skvq are fix",
        ),
        (
            ["{tiny}", "--kv", "nqkv", "--kv-topk", "64"],
            r"--kv-topk needs blocks of keys that",
        ),
        (["{tiny}", "--kv", "auto:1.5"], r"'auto:1\.5' has its bits in its name, .* --kv-bits"),
        (["{tiny}", "--kv", "kivi-2"], r"'kivi-2' is a simulation"),
        (["{tiny}", "--kv", "q3"], r"'q3' is unknown"),
        (["{tiny}", "--kv", ","], r"--kv names no scheme"),
        (["{narrow}", "--kv", "q4_0"], r"16 wide"),
        (["--kv", "auto"], r"options of KV schemes are about a model, but none is named"),
        (["-c", "100"], r"are about a model, but none is named"),
    ],
)
def test_info_refuses_options_that_it_cannot_follow(
    args: list[str], complaint: str, tiny_path: Path, tiny_qwen2: Model, capsys: Capture
) -> None:
    paths = {"tiny": str(tiny_path), "narrow": tiny_qwen2.info.path}
    assert re.search(complaint, refusal(capsys, "info", *(arg.format(**paths) for arg in args)))
