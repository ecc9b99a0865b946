"""`pykvq eval`: what it prints, the file it writes, its plots, and how its errors end."""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pykvq import Model, Session, schemes
from pykvq.cli import main

Capture = pytest.CaptureFixture[str]

SMALL = shlex.split(
    "-c 256 -b 50 --chunks 2 --at 4096 --prompts 1 --prompt-tokens 200 --predict 20 --lengths 300"
    " --depths 0,50 --trials 1 -t 2"
)


@pytest.fixture(scope="module")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = np.random.default_rng(5).choice(["the", "and", "sea", "in", "our", "other"], 1200)
    path.write_text(" ".join(words))
    return path


def test_all_tasks_end_in_a_record_and_tables(
    tiny_path: Path, text_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    out_path = tmp_path / "out.json"
    args = ["eval", str(tiny_path), "-f", str(text_path), "--kv", "skvq,kivi-2", *SMALL]
    args += ["--tasks", "kl,chunked,generation,needle,retrieval", "-o", str(out_path)]
    assert main(args) == 0
    out, err = capsys.readouterr()
    data = json.loads(out_path.read_text())
    kld = data["results"]["kl"]["kivi-2"]["mean_kld"]
    assert kld > 0
    assert data["results"]["kl"]["f16"]["mean_kld"] == 0
    for title in (
        "kl: token by token, 256",
        "chunked: ",
        "generation: ",
        "needle: ",
        "retrieval: ",
    ):
        assert title in out
    for line in out.splitlines():
        assert len(line) <= 160
    assert f"{kld:.4f}" in out or f"{kld:.3f}" in out
    finished = [line for line in err.splitlines() if "kivi-2" in line]
    assert len(finished) == 5
    assert data["runs"][0]["command"].split()[0] in ("pykvq", "python")

    assert main([*args, "--json"]) == 0  # nothing is left to be done
    out, err = capsys.readouterr()
    assert json.loads(out)["results"] == data["results"]
    assert err == ""

    assert main([*args, "--chunks", "1"]) == 2
    assert "holds results of --chunks 2, but --chunks 1 was" in capsys.readouterr().err


def test_json_is_one_object_and_nothing_is_written_without_o(
    tiny_path: Path, text_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text_path.parent)
    args = ["eval", "-m", str(tiny_path), "-f", str(text_path), "--kv", "q8_0", *SMALL, "--json"]
    assert main([*args, "--own-setting"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data["results"]["kl"]) == {"f16", "q8_0"}
    assert (data["schemes"]["q8_0"]["sinks"], data["schemes"]["q8_0"]["window"]) == (0, 0)
    assert "unfinished" not in data
    assert sorted(path.name for path in text_path.parent.iterdir()) == ["words.txt"]


def test_a_calibration_text_serves_the_schemes_that_need_it(
    tiny_path: Path, text_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    args = ["eval", str(tiny_path), "-f", str(text_path), "--kv", "oscar-2", *SMALL]
    assert main(args) == 2
    assert "oscar-2 must be calibrated, but no text" in capsys.readouterr().err
    long = tmp_path / "long.txt"
    long.write_text(text_path.read_text() * 3)
    args += ["--calibration-text", str(long), "--calibration-tokens", "3000", "--json"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["settings"]["calibration"]["tokens"] == 3000
    assert "flatter" not in err


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--kv", "q3"], "The KV scheme 'q3' is unknown; known are: f16"),
        (["--kv", ","], "--kv names no scheme"),
        (["--tasks", "ruler"], "The task 'ruler' is unknown"),
        (["--own-setting", "--kv-sinks", "4"], "--own-setting excludes --kv-sinks"),
        (["--chunks", "0"], "0 is below 1"),
        (["--depths", "0,x"], "'x' is not a number"),
        (["-c", "1000000"], "The text has"),
        (["-c", "128"], "The task kl reads no token from sealed blocks under any scheme"),
        (["--kv", "skvq:2"], "'skvq:2' gives bits to the KV scheme skvq, whose bits are fixed"),
        (["-o", "no/such/out.json"], "The record cannot be written to no/such/out.json: there is"),
        (["-o", "."], "The record cannot be written to .: it is a folder; -o names a file."),
    ],
)
def test_what_makes_no_sense_is_said_in_a_sentence(
    args: list[str], sentence: str, tiny_path: Path, text_path: Path, capsys: Capture
) -> None:
    assert main(["eval", str(tiny_path), "-f", str(text_path), *args]) == 2
    assert sentence in capsys.readouterr().err


def test_without_a_text_it_says_so(
    tiny_path: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["eval", str(tiny_path)]) == 2
    assert "There is no text: name a file with -f, or pipe one in." in capsys.readouterr().err
    assert main(["eval", str(tiny_path), "-f", str(tmp_path / "none.txt")]) == 2
    assert "none.txt: No such file" in capsys.readouterr().err


def test_plots_show_every_task_that_has_one(
    tiny_path: Path, text_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `plot`)")
    args = ["eval", str(tiny_path), "-f", str(text_path), "--kv", "skvq,kivi-2,q8_0", *SMALL]
    args += ["--tasks", "kl,needle,retrieval", "--plot", str(tmp_path / "plots")]
    assert main(args) == 0
    for name in ("kl", "needle", "retrieval"):
        path = tmp_path / "plots" / f"{name}.png"
        assert path.read_bytes().startswith(b"\x89PNG")
        assert str(path) in capsys.readouterr().err or name != "kl"


def test_without_matplotlib_a_plot_is_refused_before_any_work(
    tiny_path: Path, text_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    args = ["eval", str(tiny_path), "-f", str(text_path), "--plot", "somewhere"]
    assert main(args) == 2
    err = capsys.readouterr().err
    assert "Plots need matplotlib, which is not installed; `pip install 'pykvq[plot]'`" in err
    assert len(err.splitlines()) == 1


def test_a_folder_for_plots_must_be_one_or_lie_in_one(
    tiny_path: Path, text_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra `plot`)")
    args = ["eval", str(tiny_path), "-f", str(text_path), "--plot"]
    for folder, found in (
        (tmp_path / "no" / "such", f"there is no folder {tmp_path / 'no'}"),
        (text_path, f"{text_path} is a file"),
    ):
        assert main([*args, str(folder)]) == 2
        assert f"Plots cannot be written to {folder}: {found}." in capsys.readouterr().err


def interrupt_after(n: int) -> Any:
    """A function that stands in for `Session.eval` and is stopped at its n-th call."""
    evaluated = Session.eval
    calls = iter(range(n))

    def eval_(self: Session, *args: Any, **more: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return evaluated(self, *args, **more)

    return eval_


def test_ctrl_c_says_what_is_kept_and_ends_with_130(
    tiny_path: Path, text_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    out_path = tmp_path / "out.json"
    args = ["eval", str(tiny_path), "-f", str(text_path), "--kv", "skvq", *SMALL]
    for more, n, said in (
        (
            [],
            1,
            "Stopped. Nothing was written: no file was named to keep results as they come (-o)",
        ),
        (["-o", str(out_path)], 1, f"Stopped. No part was finished that {out_path} could keep."),
        (
            ["-o", str(out_path)],
            15,
            f"Stopped. {out_path} keeps 1 part of kl of f16, skvq. The same command goes on",
        ),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Session, "eval", interrupt_after(n))
            assert main([*args, *more]) == 130
        assert said in capsys.readouterr().err
    assert main([*args, "-o", str(out_path)]) == 0
    assert json.loads(out_path.read_text())["results"]["kl"]["skvq"]["runs"] == [0]  # one command


def test_ctrl_c_of_calibrate_says_that_nothing_was_written(
    tiny_path: Path, text_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    out_path = tmp_path / "p.gguf"
    args = ["calibrate", str(tiny_path), "-f", str(text_path), "-n", "512", "-c", "256"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "eval", interrupt_after(1))
        assert main([*args, "-o", str(out_path)]) == 130
    err = capsys.readouterr().err
    assert f"Stopped before {out_path} was written; calibration begins anew next time." in err
    assert list(tmp_path.iterdir()) == []


def test_the_measurement_of_the_docs_takes_any_text_and_keeps_only_its_name(
    tiny_path: Path, text_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import quality

    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    (folder / quality.CALIBRATION).write_text("not needed here")
    monkeypatch.setenv("PYKVQ_DATA", str(folder.parent))
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    path = tmp_path / "eval-tiny-words.json"
    options = shlex.split("--kv kivi-2 --tasks kl --ctx-size 256 --chunks 1")
    kept = []
    for text in (str(text_path), text_path.name):
        monkeypatch.setattr(sys, "argv", ["quality.py", str(tiny_path), "--text", text, *options])
        assert quality.main() == 0
        kept.append(path.read_text())
        (folder / text_path.name).write_bytes(text_path.read_bytes())
    assert kept[0] == kept[1]  # the other name of the text goes on with the same record
    assert str(text_path.parent) not in kept[0]
    data = json.loads(kept[0])
    assert data["settings"]["text"]["name"] == "words.txt"
    assert data["runs"][0]["command"].startswith("python bench/quality.py tiny.gguf --text words.")


def test_the_measurement_of_the_docs_takes_budgets_and_every_scheme(
    tiny: Model, tiny_qwen2: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    from quality import default_names

    names = default_names(tiny)
    assert {"auto", "auto:1.25", "auto:1.5", "auto:2.5", "auto:3"} <= set(names)
    assert {scheme.name for scheme in schemes(64)} <= set(names)
    assert {"kivi-2", "nsnquant-2"} <= set(names)
    assert "kivi-2-nobias" not in names
    assert "kivi-2-nobias" in default_names(tiny_qwen2)
