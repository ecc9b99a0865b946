"""The command line: what it prints, where it prints it, and how every error ends."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DEVICE, write_tiny

import pykvq
from pykvq import Model, cli_generate, console
from pykvq.cli import main

ROOT = Path(pykvq.__file__).parents[1]
COMMAND = [sys.executable, "-m", "pykvq"]

SAMPLING_FLAGS = """
--temp 0.7 --top-k 20 --top-p 0.9 --min-p 0.1 --typical 0.9 --top-nsigma 2 --seed 1
--xtc-probability 0.1 --xtc-threshold 0.2 --repeat-last-n 32 --repeat-penalty 1.1
--presence-penalty 0.1 --frequency-penalty 0.1 --dry-multiplier 0.5 --dry-base 1.8
--dry-allowed-length 3 --dry-penalty-last-n 100 --dry-sequence-breaker none
--ignore-eos -l 5+1.5 -l 7-inf --kv skvq --kv-window 64 --kv-sinks 2 -b 16 -c 256
"""

Capture = pytest.CaptureFixture[str]


def feed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def spawn(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [*COMMAND, *args], cwd=ROOT, capture_output=True, text=True, timeout=120, **options
    )


# ---- run ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "complaint"), [("1", "K,V"), ("1,-1", "K,V"), ("9,1", "0 to")])
def test_layers_of_asymkv_are_two_numbers(
    tiny_path: Path, capsys: Capture, given: str, complaint: str
) -> None:
    run = ["run", str(tiny_path), "--raw", "-p", "the end", "-n", "3", "--kv", "asymkv"]
    assert main([*run, "--asymkv-layers", "1,0"]) == 0
    capsys.readouterr()
    try:
        code = main([*run, f"--asymkv-layers={given}"])
    except SystemExit as refused:  # of argparse
        code = int(refused.code or 0)
    assert code != 0
    assert complaint in capsys.readouterr().err


def test_run_writes_the_text_to_stdout_and_all_else_to_stderr(
    tiny: Model, tiny_path: Path, capsys: Capture
) -> None:
    args = ["run", str(tiny_path), "--raw", "-p", "the end", "-n", "20", "-s", "3", "-t", "2"]
    assert main([*args, "--device", DEVICE]) == 0
    out, err = capsys.readouterr()
    with tiny.session() as session:
        expected = session.generate("the end", 20, seed=3).text
    assert out == (expected if expected.endswith("\n") else expected + "\n")
    lines = err.splitlines()
    assert all(line.startswith("pykvq: ") for line in lines)
    assert len(lines) == 2
    assert "skvq" in lines[0]
    with tiny.session() as session:
        stats = session.stats
    where = stats.isa if stats.gpu is None else "all 2 layers and the output on CUDA device 0"
    assert where in lines[0]
    assert "continuing the text" in lines[0]
    assert re.search(
        r"prompt \d+ tokens, [\d.]+/s; written \d+ tokens, [\d.]+/s; KV cache [\d.]+ [kMG]B for"
        r" 2048 tokens, [\d.]+ bits per element; seed 3\.$",
        lines[1],
    )


def test_a_prompt_that_was_interrupted_counts_what_was_evaluated(
    tiny: Model, capsys: Capture
) -> None:
    with tiny.session(n_batch=16) as session:
        result = session.generate([1] * 100, 5, progress=lambda *_: session.cancel())
        cli_generate._conclude(result, session.stats, greedy=False)
    assert "prompt 16 of 100 tokens, " in capsys.readouterr().err


def test_run_prints_one_object_with_json(tiny_path: Path, capsys: Capture) -> None:
    args = ["run", "-m", str(tiny_path), "--kv", "f16", "-p", "the", "-n", "5", "--json"]
    assert main(args) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"model", "text", "tokens", "finish_reason", "seed", "timings", "kv"}
    assert result["timings"]["n_generated"] == len(result["tokens"])
    assert result["kv"]["scheme"] == "f16"
    assert result["kv"]["bytes_kv"] > 0


def test_run_answers_by_the_chat_template_unless_told_otherwise(
    tiny: Model, tiny_path: Path, capsys: Capture
) -> None:
    def n_prompt(*more: str) -> tuple[int, str]:
        base = ["run", str(tiny_path), "-p", "Hi", "-n", "1", "--json"]
        assert main([*base, *more]) == 0
        out, err = capsys.readouterr()
        return json.loads(out)["timings"]["n_prompt"], err

    plain = len(tiny.tokenize("Hi"))
    messages = [{"role": "user", "content": "Hi"}]
    text = tiny.chat_template.render(messages)
    chat = len(tiny.tokenize(text, parse_special=True))
    assert n_prompt()[0] == chat
    assert "chat template" in n_prompt()[1]
    assert n_prompt("-cnv")[0] == chat
    for flag in ("--raw", "-no-cnv", "--no-chat", "--no-conversation"):
        assert n_prompt(flag)[0] == plain
    assert n_prompt("-sys", "Be kind.")[0] > chat


def test_run_reads_its_prompt_from_a_file_or_stdin(
    tiny_path: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("the end\n")
    base = ["run", str(tiny_path), "--raw", "-n", "10", "-s", "1"]
    outputs = []
    for args in (["-p", "the end"], ["-f", str(path)], ["-f", "-"], []):
        feed(monkeypatch, "the end\n")
        assert main([*base, *args]) == 0
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 1


def test_run_stops_before_a_reverse_prompt(tiny_path: Path, capsys: Capture) -> None:
    base = ["run", str(tiny_path), "--raw", "-p", "the end", "-n", "60", "-s", "2"]
    assert main(base) == 0
    free = capsys.readouterr().out
    assert main([*base, "-r", "never", "-r", free[8:11]]) == 0
    stopped = capsys.readouterr().out
    assert stopped.rstrip("\n") == free[: free.index(free[8:11])].rstrip("\n")
    assert main([*base, "--stop", free[8:11]]) == 0
    assert capsys.readouterr().out == stopped


def test_a_byte_order_mark_is_no_part_of_the_text(
    tiny: Model, tiny_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "marked.txt"
    path.write_bytes(b"\xef\xbb\xbfthe \xef\xbb\xbfend\n")
    assert main(["tokenize", str(tiny_path), "-f", str(path), "--ids"]) == 0
    assert json.loads(capsys.readouterr().out) == tiny.tokenize("the \ufeffend")


def test_a_text_may_begin_with_a_dash(tiny: Model, tiny_path: Path, capsys: Capture) -> None:
    assert main(["tokenize", str(tiny_path), "-p", "-five apples", "--ids"]) == 0
    assert json.loads(capsys.readouterr().out) == tiny.tokenize("-five apples")


def test_run_takes_every_sampling_flag(tiny_path: Path, capsys: Capture) -> None:
    base = ["run", str(tiny_path), "-p", "the", "-n", "4"]
    for chain in (["--samplers", "top-k;temp;min_p"], ["--sampler-seq", "edskypmxt"]):
        assert main([*base, *SAMPLING_FLAGS.split(), *chain, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["seed"] == 1
        kv = result["kv"]
        assert (kv["window"], kv["sinks"], kv["n_batch"], kv["n_ctx"]) == (64, 2, 16, 256)
        assert 7 not in result["tokens"]


def test_logit_bias_and_greedy_choose_the_token(tiny_path: Path, capsys: Capture) -> None:
    args = ["run", str(tiny_path), "-p", "a", "-n", "3", "--temp", "0", "-l", "65+1000", "--json"]
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == [65, 65, 65]


def test_run_sizes_the_context_by_the_task(tiny_path: Path, capsys: Capture) -> None:
    def run(*more: str) -> tuple[int, str]:
        assert main(["run", str(tiny_path), "-p", "the", "-n", "1", "--json", *more]) == 0
        out, err = capsys.readouterr()
        return json.loads(out)["kv"]["n_ctx"], err

    assert run()[0] == 2048  # as trained, which is less than the usual 4096
    assert run("-c", "0")[0] == 2048
    assert run("-c", "100")[0] == 100
    n_ctx, err = run("-c", "3000")
    assert n_ctx == 3000
    assert "warning: The context of 3000 tokens exceeds the 2048" in err


def test_a_full_context_is_said(tiny_path: Path, capsys: Capture) -> None:
    assert main(["run", str(tiny_path), "--raw", "-p", "the", "-c", "16", "--ignore-eos"]) == 0
    assert "context of 16 tokens is full" in capsys.readouterr().err


def test_schemes_that_a_key_bias_breaks_are_warned_of(
    tiny_path: Path, tiny_qwen2: Model, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    biased = tiny_qwen2.info.path
    text = ["-p", "the end"]

    def warnings(*args: str) -> list[str]:
        feed(monkeypatch, "Hi\n")
        assert main(list(args)) == 0
        lines = capsys.readouterr().err.splitlines()
        return [line for line in lines if "have a bias" in line]

    for kv, sensitive in (("nqkv-2", True), ("skvq", False), ("auto", False), ("f16", False)):
        expected = [
            f"pykvq: warning: The keys of tiny qwen2 have a bias, which the KV scheme {kv} does not"
            " cope with: expect results far from those of f16, and use skvq or auto instead."
        ]
        for path, found in ((biased, expected * sensitive), (str(tiny_path), [])):
            assert warnings("run", path, "--raw", *text, "-n", "1", "--kv", kv) == found
            assert warnings("chat", path, "-n", "1", "--kv", kv) == found
    ppl = [
        "perplexity",
        biased,
        "-p",
        "the end of the hour " * 40,
        "-c",
        "220",
        "--chunks",
        "1",
        "--stream",
    ]
    [first, second] = warnings(*ppl, "--kv", "nqkv,f16,nqkv-3,skvq,nqkv")
    assert "scheme nqkv does" in first
    assert "scheme nqkv-3 does" in second


# ---- chat -----------------------------------------------------------------------------------


def test_chat_takes_each_line_as_a_turn_and_keeps_the_history(
    tiny_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, "Hello\n\nAnd then?\n/reset\nHello\n/exit\nnot read\n")
    assert main(["chat", str(tiny_path), "-n", "8", "--temp", "0"]) == 0
    out, err = capsys.readouterr()
    turns = [line for line in err.splitlines() if "prompt" in line]
    assert len(turns) == 3
    counts = [re.search(r"prompt (\d+) tokens(?: \((\d+) reused\))?", turn) for turn in turns]
    first, second, third = ([int(n or 0) for n in found.groups()] for found in counts if found)
    assert first[1] == 0
    assert second[0] > first[0]
    assert second[1] >= first[0]  # the first turn and its answer are still there
    assert third[0] == first[0]
    assert out.splitlines()[0] == out.splitlines()[-1]  # greedy, so the same answer


def test_chat_refuses_a_turn_that_does_not_fit_and_goes_on(
    tiny_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, "the " * 200 + "\nHi\n")
    assert main(["chat", str(tiny_path), "--ignore-eos", "-n", "2", "-c", "64"]) == 2
    err = capsys.readouterr().err
    assert re.search(r"error: The conversation has \d+ tokens, but the context holds 64", err)
    assert "written 2 tokens" in err


def test_chat_says_that_an_answer_was_cut_and_what_its_commands_are(
    tiny_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(monkeypatch, "/help\nHi\n")
    assert main(["chat", str(tiny_path), "--ignore-eos", "-c", "64"]) == 0
    *_, commands, _, cut = capsys.readouterr().err.splitlines()
    assert all(command in commands for command in ("/reset", "/exit", "/help"))
    assert "answer was cut, because the context of 64 tokens is full" in cut
    feed(monkeypatch, "Hi\n")
    assert main(["chat", str(tiny_path), "--ignore-eos", "-n", "2"]) == 0
    assert "cut" not in capsys.readouterr().err


def test_chat_refuses_a_line_that_is_not_utf8(
    tiny_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8"))
    assert main(["chat", str(tiny_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == ("pykvq: error: In a line of stdin the text is not UTF-8: byte 1 is 0xff.")
    assert main(["chat", str(tiny_path)]) == 0  # stdin has ended


def test_chat_goes_on_after_a_line_that_is_not_utf8(
    tiny_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = b"Hi\n\xc3\xa4\xff\nHi again\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    assert main(["chat", str(tiny_path), "-n", "2"]) == 2
    _, first, error, second = capsys.readouterr().err.splitlines()
    assert "byte 2 is 0xff" in error
    assert "reused" not in first and "reused" in second


class Terminal:
    """A process on a terminal of its own, as a person has it."""

    def __init__(self, *args: str) -> None:
        try:
            self._leader, follower = pty.openpty()
        except OSError as error:
            pytest.skip(f"the system gives no terminal: {error}")
        self.process = subprocess.Popen(
            [*COMMAND, *args], cwd=ROOT, stdin=follower, stdout=follower, stderr=follower
        )
        os.close(follower)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def interrupt(self) -> None:
        time.sleep(0.2)  # between printing a prompt and waiting for a line, Python misses signals
        self.seen = ""
        self.process.send_signal(signal.SIGINT)

    def wait_for(self, pattern: str) -> None:
        end = time.monotonic() + 20
        while not re.search(pattern, self.seen):
            ready, _, _ = select.select([self._leader], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {self.seen[-200:]!r}"
            self.seen += os.read(self._leader, 65536).decode("utf-8", "replace")

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._leader)


def test_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(tiny_path: Path) -> None:
    with Terminal("chat", str(tiny_path), "--ignore-eos", "-c", "2000000", "-t", "1") as terminal:
        terminal.wait_for(r"> $")
        terminal.type("Hello\n")
        terminal.wait_for(r"(?s)Hello\r?\n.{50}")
        terminal.interrupt()
        terminal.wait_for(r"written \d+ tokens[^\n]*\n\s*> $")
        terminal.interrupt()
        terminal.wait_for(r"^\s*> $")
        terminal.type("/exit\n")
        assert terminal.process.wait(20) == 0
    with Terminal("chat", str(tiny_path)) as terminal:
        terminal.wait_for(r"> $")
        time.sleep(0.2)
        terminal.type("\x04")
        assert terminal.process.wait(20) == 0


def test_ctrl_c_ends_a_chat_that_reads_a_pipe(tiny_path: Path) -> None:
    args = ["chat", str(tiny_path), "--ignore-eos", "-c", "2000000", "-t", "1"]
    with subprocess.Popen(
        [*COMMAND, *args],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Hello\nAgain\n")
        process.stdin.flush()
        process.stdout.read(50)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.count(b"written") == 1
    assert b"Traceback" not in err


# ---- info, tokenize, pull -------------------------------------------------------------------


def test_info_without_a_model_shows_the_installation(capsys: Capture) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["isa"] in facts["isa_available"]
    assert "smollm2" in facts["models"]
    for scheme in facts["schemes"]:
        assert scheme["name"] in text
    assert facts["version"] in text


def test_info_shows_a_model(tiny: Model, tiny_path: Path, capsys: Capture) -> None:
    assert main(["info", str(tiny_path), "-c", "1000"]) == 0
    text = capsys.readouterr().out
    for expected in ("tiny llama", "Q8_0", "F32", "KV cache for 1000 tokens", "general.name"):
        assert expected in text
    assert main(["info", str(tiny_path), "-c", "1000", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    costs = {cost["kv"]: cost for cost in facts["kv"]}
    with tiny.session(kv="skvq", n_ctx=1000) as session:
        assert costs["skvq"]["bytes"] == session.stats.bytes_kv
        assert costs["skvq"]["bits_full"] == session.stats.bits_full
    assert sum(row["bytes"] for row in facts["tensor_types"]) == tiny.info.bytes_weights
    assert facts["metadata"]["tokenizer.ggml.tokens"] == {"length": 269}
    assert not facts["key_bias"]


def test_info_shows_which_schemes_a_key_bias_breaks(tiny_qwen2: Model, capsys: Capture) -> None:
    assert main(["info", tiny_qwen2.info.path, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["key_bias"]
    sensitive = {cost["kv"] for cost in facts["kv"] if not cost["copes_with_keys"]}
    assert sensitive == {"nqkv", "nqkv-2", "nqkv-3"}  # q4_0 has no form for heads of 16
    assert main(["info", tiny_qwen2.info.path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if line.split()[1:2] == ["*"]} == sensitive
    assert any("* not for keys with a bias, as this model has them" in line for line in lines)
    known = {scheme.name for scheme in pykvq.schemes() if scheme.key_bias_sensitive}
    assert known == sensitive | {"q4_0"}
    assert main(["info"]) == 0
    assert "not for models whose keys have a bias" in " ".join(capsys.readouterr().out.split())


def test_tokenize_shows_tokens_in_every_form(tiny: Model, tiny_path: Path, capsys: Capture) -> None:
    text = "the <|im_end|>"
    base = ["tokenize", str(tiny_path), "-p", text]

    def run(*more: str) -> str:
        assert main([*base, *more]) == 0
        return capsys.readouterr().out

    ids = tiny.tokenize(text)
    assert json.loads(run("--ids")) == ids
    assert json.loads(run("--json"))["ids"] == ids
    assert "".join(json.loads(run("--json"))["pieces"]) == text
    assert run().splitlines()[0].split() == [str(ids[0]), "'the'"]
    assert run("--show-count").splitlines()[-1] == f"{len(ids)} tokens"
    special = tiny.tokenize(text, parse_special=True)
    assert json.loads(run("--ids", "--parse-special")) == special != ids


def test_tokenize_leaves_out_bos_on_request(stories_model: Model, capsys: Capture) -> None:
    base = ["tokenize", stories_model.info.path, "-p", "Once", "--ids"]
    assert main(base) == 0
    with_bos = json.loads(capsys.readouterr().out)
    assert main([*base, "--no-special"]) == 0
    assert json.loads(capsys.readouterr().out) == with_bos[1:]
    assert with_bos[0] == stories_model.tokenizer.bos


def test_pull_prints_the_path(tiny_path: Path, capsys: Capture) -> None:
    assert main(["pull", str(tiny_path)]) == 0
    assert capsys.readouterr().out == f"{tiny_path}\n"


# ---- perplexity -----------------------------------------------------------------------------


def test_perplexity_prints_a_row_per_scheme(
    tiny_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("the end and the other are in the hour " * 60)
    base = ["perplexity", str(tiny_path), "-f", str(path), "-c", "256", "--chunks", "2"]
    assert main([*base, "--kv", "f16,skvq", "--kld", "--stream", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "warning" not in err
    report = json.loads(out)
    assert report["model"] == "tiny llama"
    rows = report["results"]
    assert [row["kv"] for row in rows] == ["f16", "skvq"]
    for row in rows:
        assert set(row) == {"kv", "ppl", "mean_kld", "top1", "bits", "tokens", "sealed"}
        assert row["tokens"] == 2 * 127
    assert rows[0]["mean_kld"] == 0 < rows[1]["mean_kld"]
    assert main([*base, "--kv", "auto:1.5,auto", "--kv-bits", "3", "--stream", "--json"]) == 0
    few, more = json.loads(capsys.readouterr().out)["results"]
    assert (few["kv"], more["kv"]) == ("auto:1.5", "auto")
    assert few["bits"] <= 1.5 < more["bits"] <= 3
    assert main([*base, "--kv", "f16"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main([*base, "--kv", "skvq"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split("  ")[-1].strip() == "ppl"
    assert out.splitlines()[1].split()[0] == "skvq"
    assert "254 tokens scored" in err
    assert "warning: Passes of 256 tokens see their own tokens in f16" in err
    assert "read sealed blocks at all: 0 % under skvq; streaming (--stream) measures" in err


# ---- progress -------------------------------------------------------------------------------


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress_output(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, patience: float) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(console, "_PATIENCE", patience)
    monkeypatch.setenv("TERM", "xterm")
    with console.ProgressBar() as bar:
        for done in (0, 30, 60, 100):
            bar("reading", done, 100)
    return stream.getvalue()


def test_progress_is_shown_on_a_terminal_for_what_takes_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "reading" in progress_output(monkeypatch, FakeTerminal(), -1.0)
    assert progress_output(monkeypatch, FakeTerminal(), 60.0) == ""
    assert progress_output(monkeypatch, io.StringIO(), -1.0) == ""


def test_without_a_terminal_long_work_prints_lines_with_its_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter((0.0, 10.0, 40.0, 50.0, 80.0, 90.0))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with console.long_progress() as lines:
        assert isinstance(lines, console.ProgressLines)
        for done in (100, 200, 500, 600, 1000):  # at 0, 10, 40, 50, 80 s
            lines("kl", done, 1000)
        lines("needle", 0, 10)
    assert sys.stderr.getvalue().splitlines() == [
        "pykvq: kl: 500 of 1000 (50 %), 10 per second, about 50 s left"
    ]
    assert console.duration(7000) == "1 h 56 min"
    assert console.duration(128.6) == "2 min 09 s"
    monkeypatch.setattr(sys, "stderr", FakeTerminal())
    assert isinstance(console.long_progress(), console.ProgressBar)


# ---- errors ---------------------------------------------------------------------------------

ERRORS = {
    "no such file": (["run", "no/such.gguf", "-p", "a"], r"no/such\.gguf is not there"),
    "a directory": (["run", ".", "-p", "a"], r"The model file \. is a directory"),
    "a directory by name": (["run", "tests", "-p", "a"], r"tests is a directory, not a regular"),
    "a device": (["run", "/dev/null", "-p", "a"], r"/dev/null is not a regular file"),
    "empty name": (["run", "", "-p", "a"], r"name of the model is empty"),
    "empty name as option": (["run", "-m", "", "-p", "a"], r"name of the model is empty"),
    "unknown name": (["run", "no-such-model", "-p", "a"], r"'no-such-model' is not known"),
    "broken file": (["info", "{junk}"], r"junk\.gguf"),
    "cut file": (["info", "{cut}"], r"cut\.gguf"),
    "unknown architecture": (["info", "{strange}"], r"qwen9"),
    "unknown scheme": (["run", "{tiny}", "-p", "a", "--kv", "q3"], r"'q3' is unknown; known are"),
    "misspelled scheme": (
        ["run", "{tiny}", "-p", "a", "--kv", "SKVQ"],
        r"'SKVQ' is unknown; known are: f16, .*auto; spelled alike: skvq, ",
    ),
    "simulated scheme in part": (
        ["run", "{tiny}", "-p", "a", "--kv", "kivi"],
        r"'kivi' is unknown; .*\. `pykvq eval` simulates kivi-2, .*; simulations have no stored",
    ),
    "unknown scheme of several": (
        ["perplexity", "{tiny}", "-p", "a", "--kv", "f16,q3"],
        r"'q3' is unknown",
    ),
    "simulated scheme": (
        ["run", "{tiny}", "-p", "a", "--kv", "kivi-2"],
        r"'kivi-2' is a simulation for `pykvq eval` and has no stored form",
    ),
    "simulated scheme to talk with": (["chat", "{tiny}", "--kv", "rtn-2"], r"'rtn-2' is a simula"),
    "simulated scheme to time": (["bench", "{tiny}", "--kv", "kivi-2"], r"'kivi-2' is a simula"),
    "simulated scheme of several": (
        ["perplexity", "{tiny}", "-p", "a", "--kv", "f16,kivi-2"],
        r"'kivi-2' is a simulation",
    ),
    "bits in the name": (
        ["run", "{tiny}", "-p", "a", "--kv", "auto:1.5"],
        r"'auto:1\.5' has its bits in its name, .* here --kv-bits gives them",
    ),
    "bits of a fixed scheme of several": (
        ["perplexity", "{tiny}", "-p", "a", "--kv", "f16,skvq:2"],
        r"'skvq:2' gives bits to the KV scheme skvq, whose bits are fixed",
    ),
    "bits in a name that are no number": (
        ["perplexity", "{tiny}", "-p", "a", "--kv", "auto:x"],
        r"'auto:x' gives 'x' to the KV scheme auto, expected a number of bits",
    ),
    "bits in no name": (["run", "{tiny}", "-p", "a", "--kv", "q3:2"], r"'q3:2' is unknown; known"),
    "too few bits": (
        ["run", "{tiny}", "-p", "a", "--kv", "auto", "--kv-bits", "0.4"],
        r"0\.4 bits .* auto takes 0\.\d+ to 6",
    ),
    "no bits": (["run", "{tiny}", "-p", "a", "--kv", "auto", "--kv-bits", "0"], r"--kv-bits is 0"),
    "bits that are no number": (["run", "{tiny}", "--kv-bits", "few"], r"'few' is not a number"),
    "bits of a fixed scheme": (["run", "{tiny}", "-p", "a", "--kv-bits", "2"], r"skvq are fixed"),
    "no scheme": (["perplexity", "{tiny}", "-p", "a", "--kv", ","], r"--kv names no scheme"),
    "too little memory": (
        ["run", "{tiny}", "-p", "a", "--kv", "f16", "-c", "200000000"],
        r"needs [\d.]+ GB .* available",
    ),
    "context too small": (
        ["run", "{tiny}", "-p", "the end of the hour", "-c", "4"],
        r"prompt has \d+ tokens, but the context of the session holds 4",
    ),
    "text too short": (["perplexity", "{tiny}", "-p", "a"], r"but at least 512 are needed"),
    "context beyond all limits": (
        ["run", "{tiny}", "-p", "a", "-c", "1000000000000"],
        r"1000000000000 is above 268435456",
    ),
    "prompt with a lone surrogate": (
        ["run", "{tiny}", "-p", "a\udcff"],
        r"-p/--prompt: the text is not UTF-8: byte 1 is 0xff",
    ),
    "text with a lone surrogate": (["tokenize", "{tiny}", "-p", "\udcff"], r"is not UTF-8"),
    "system message with a lone surrogate": (
        ["chat", "{tiny}", "-sys", "\udcff"],
        r"-sys/--system-prompt: the text is not UTF-8",
    ),
    "stop string with a lone surrogate": (
        ["run", "{tiny}", "-p", "a", "-r", "\udcff"],
        r"is not UTF-8",
    ),
    "empty prompt for an answer": (["run", "{tiny}", "-p", ""], r"The prompt is empty"),
    "empty file for an answer": (["run", "{tiny}", "-f", "/dev/null"], r"The prompt is empty"),
    "empty prompt": (["run", "{tiny}", "--raw", "-p", ""], r"The prompt is empty"),
    "no such prompt file": (["run", "{tiny}", "-f", "no-such.txt"], r"no-such\.txt: No such file"),
    "prompt not UTF-8": (["run", "{tiny}", "-f", "{junk}"], r"not UTF-8: byte 4 is 0xff"),
    "prompt twice": (["run", "{tiny}", "-p", "a", "-f", "b"], r"not allowed with"),
    "two models": (["run", "{tiny}", "-m", "other", "-p", "a"], r"Two models are named"),
    "unknown option": (
        ["run", "{tiny}", "--mirostat", "2"],
        r"flag --mirostat is unknown; see `pykvq run --help`",
    ),
    "flag of llama.cpp": (["run", "{tiny}", "-p", "a", "-nkvo", "9"], r"flag -nkvo is unknown"),
    "attached value": (["run", "{tiny}", "-p", "a", "-n20"], r"flag -n20 is unknown"),
    "cache type of llama.cpp": (
        ["run", "{tiny}", "-p", "a", "-ctk", "q8_0"],
        r"flag -ctk is unknown; use --kv; see `pykvq run --help`",
    ),
    "model as llama.cpp has it": (
        ["run", "-hf", "user/repo", "-p", "a"],
        r"flag -hf is unknown; use a model by position or -m;",
    ),
    "too many arguments": (["run", "{tiny}", "x", "-p", "a"], r"'x' was not expected"),
    "unknown command": (["walk"], r"invalid choice: 'walk'"),
    "no number": (["run", "{tiny}", "-n", "many"], r"'many' is not a whole number"),
    "number too small": (["run", "{tiny}", "-t", "0"], r"0 is below 1"),
    "too many threads": (["run", "{tiny}", "-p", "a", "-t", "5000"], r"error: -t is 5000"),
    "sampling out of range": (["run", "{tiny}", "-p", "a", "--top-p", "2"], r"top_p is 2\.0"),
    "unknown sampler": (
        ["run", "{tiny}", "-p", "a", "--samplers", "magic"],
        r"'magic'.* known samplers",
    ),
    "unknown sampler letter": (["run", "{tiny}", "--sampler-seq", "ez"], r"'z' is no sampler"),
    "bias of no token": (["run", "{tiny}", "-l", "hello"], r"'hello' is not of the form"),
    "bias beyond the vocabulary": (
        ["run", "{tiny}", "-p", "a", "-l", "99999+1"],
        r"99999 .* not in the vocabulary",
    ),
    "system message without template": (
        ["run", "{tiny}", "--raw", "-sys", "a", "-p", "a"],
        r"needs a chat template",
    ),
    "layers on a GPU without one": (
        ["run", "{tiny}", "-p", "a", "--device", "cpu", "-ngl", "99"],
        r"-ngl is of use only with --device cuda, but --device is cpu",
    ),
    "address of a model": (
        ["run", "http://127.0.0.1:9/m.gguf", "-p", "a"],
        r"http://127\.0\.0\.1:9/m\.gguf is a URL, which only `pykvq plan` reads",
    ),
    "empty profile": (["run", "{tiny}", "-p", "a", "--profile", ""], r"of an empty name"),
    "empty stop string": (["run", "{tiny}", "-p", "a", "-r", ""], r"stop string is empty"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_sentence_and_exit_status_2(
    name: str,
    tiny_path: Path,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    args, message = ERRORS[name]
    paths = {"tiny": tiny_path, "junk": tmp_path / "junk.gguf", "cut": tmp_path / "cut.gguf"}
    paths["junk"].write_bytes(b"GGUF\xff\xff\xff\xff" * 100)
    paths["cut"].write_bytes(tiny_path.read_bytes()[:5000])
    paths["strange"] = write_tiny(tmp_path / "strange.gguf", "qwen9")
    assert main([arg.format(**paths) for arg in args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    errors = [line for line in err.splitlines() if not line.startswith("pykvq: warning: ")]
    assert len(errors) == 1
    assert errors[0].startswith("pykvq: error: ")
    assert re.search(message, errors[0]), errors[0]
    assert errors[0] == err.splitlines()[-1]
    assert errors[0].endswith(".")


def test_errors_of_a_process_have_no_traceback(tmp_path: Path) -> None:
    done = spawn("run", str(tmp_path / "absent.gguf"), "-p", "a")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("pykvq: error: ")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_missing_streams_do_no_harm(tiny_path: Path, closed: str) -> None:
    args = [*COMMAND, "run", str(tiny_path), "--raw", "-p", "the end", "-n", "9", "-s", "1"]
    script = ["sh", "-c", f'exec "$@" {closed}', "sh", *args]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert bool(done.stdout) == (">&-" not in closed.replace("2>&-", ""))
    assert bool(done.stderr) == ("2>" not in closed)


def test_no_command_shows_the_commands() -> None:
    done = spawn()
    assert done.returncode == 2
    for command in ("run", "chat", "info", "tokenize", "perplexity", "pull"):
        assert command in done.stdout
        shown = spawn(command, "--help")
        assert shown.returncode == 0
        said = "passes of -b tokens see their own tokens in f16" in " ".join(shown.stdout.split())
        assert said == (command == "perplexity")
    assert spawn("--version").stdout == f"pykvq {pykvq.__version__}\n"


def test_ctrl_c_ends_run_with_its_statistics_and_130(tiny_path: Path) -> None:
    args = ["run", str(tiny_path), "-p", "a", "--ignore-eos", "-c", "2000000", "-t", "1"]
    with subprocess.Popen(
        [*COMMAND, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(50)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"written" in err


def test_a_reader_that_goes_away_ends_tables_quietly(tiny_path: Path) -> None:
    for args in (["info"], ["info", str(tiny_path)]):
        with subprocess.Popen(
            [*COMMAND, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.close()
            assert process.wait(30) == 141
            assert process.stderr is not None
            assert process.stderr.read() == b""


def test_numbers_that_json_lacks_are_null(capsys: Capture) -> None:
    console.print_json({"a": [math.nan, 1.5], "b": (math.inf, "NaN", None)})
    assert capsys.readouterr().out == '{"a": [null, 1.5], "b": [null, "NaN", null]}\n'


def test_a_reader_that_goes_away_ends_run_quietly(tiny_path: Path) -> None:
    args = ["run", str(tiny_path), "-p", "a", "--ignore-eos", "-c", "2000000", "-t", "1"]
    with subprocess.Popen(
        [*COMMAND, *args], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(50)
        process.stdout.close()
        assert process.wait(30) == 141
        err = process.stderr.read()
    assert b"Traceback" not in err
    assert b"rror" not in err
