"""The record of an evaluation: what is kept, what is resumed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pykvq import Model
from pykvq.eval import harness
from pykvq.eval.harness import Text, evaluate
from pykvq.eval.lanes import SessionPool
from pykvq.eval.options import TASKS, Options
from pykvq.eval.record import Record, RecordError, file_facts, pack, processor_of, unpack
from pykvq.eval.tasks_text import KlTask

SMALL = Options(
    tasks=TASKS,
    n_ctx=256,
    chunks=2,
    n_batch=50,
    at=1024,
    prompts=1,
    n_prompt=200,
    n_tokens=20,
    lengths=(300,),
    depths=(0, 100),
    trials=1,
)


@pytest.fixture(scope="module")
def text(tiny: Model) -> Text:
    words = np.random.default_rng(5).choice(["the", "and", "sea", "in", "our", "other"], 1200)
    return Text("words", " ".join(words))


def of(task: str, **more: Any) -> Options:
    return Options(**{**SMALL.__dict__, "tasks": (task,), **more})


class Stopped(Exception):
    pass


def test_a_stopped_evaluation_goes_on_where_it_was(tiny: Model, text: Text, tmp_path: Path) -> None:
    whole = Record(tmp_path / "whole.json")
    evaluate(tiny, text, ["skvq", "rtn-2"], whole, SMALL, command="a command")
    path, n_starts = tmp_path / "pieces.json", 0
    while True:
        calls = 0

        def stop(what: str, done: int, total: int) -> None:
            nonlocal calls
            assert 0 <= done <= total
            calls += 1
            if calls > 20:  # within the second part
                raise Stopped

        n_starts += 1
        record = Record(path)
        try:
            evaluate(
                tiny, text, ["skvq", "rtn-2"], record, SMALL, command="a command", progress=stop
            )
            break
        except Stopped:
            assert path.exists()
    assert n_starts >= 3
    assert json.loads(path.read_text()) == json.loads((tmp_path / "whole.json").read_text())
    data = json.loads(path.read_text())
    assert set(data["results"]) == set(TASKS)
    assert all(set(found) == {"f16", "skvq", "rtn-2"} for found in data["results"].values())
    assert data["unfinished"] == {}
    assert not list(tmp_path.glob(".*"))


def test_finished_work_is_not_done_again_and_schemes_can_be_added(
    tiny: Model, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.json"
    evaluate(tiny, text, ["skvq"], Record(path), of("kl"), command="first")
    before = Record(path).data["results"]["kl"]
    measured: list[list[str]] = []
    measure = KlTask.measure

    def spy(self: KlTask, unit: str, lanes: Any, pool: Any, count: Any) -> Any:
        measured.append([lane.name for lane in lanes])
        return measure(self, unit, lanes, pool, count)

    monkeypatch.setattr(KlTask, "measure", spy)
    finished: list[str] = []
    record = Record(path)
    evaluate(
        tiny,
        text,
        ["skvq", "q8_0"],
        record,
        of("kl"),
        command="second",
        announce=lambda task, scheme, summary: finished.append(scheme),
    )
    assert measured == [["f16", "q8_0"]] * 2  # chunks; the reference is needed for comparison
    assert finished == ["q8_0"]
    after = record.data["results"]["kl"]
    assert {name: after[name] for name in before} == before
    assert [run["command"] for run in record.data["runs"]] == ["first", "second"]
    assert (after["skvq"]["runs"], after["q8_0"]["runs"]) == ([0], [1])
    measured.clear()
    evaluate(tiny, text, ["q8_0"], Record(path), of("kl"), command="third")
    assert measured == []
    assert len(Record(path).data["runs"]) == 2  # the third has added nothing


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"chunks": 1},
            r"out.json holds results of --chunks 2, but --chunks 1 was asked for; ask for --chunks"
            r" 2 to go on with this file, or name another one",
        ),
        ({"n_ctx": 200}, "results of -c 256, but -c 200 was"),
        ({"kv_window": 64}, "results of --kv-window 128, but --kv-window 64 was"),
        ({"own_setting": True}, "results of --own-setting off, but --own-setting on was"),
    ],
)
def test_other_settings_are_refused(
    change: dict[str, Any], sentence: str, tiny: Model, text: Text, tmp_path: Path
) -> None:
    path = tmp_path / "out.json"
    evaluate(tiny, text, ["skvq"], Record(path), of("kl"))
    before = path.read_bytes()
    with pytest.raises(RecordError, match=sentence):
        evaluate(tiny, text, ["skvq"], Record(path), of("kl", **change))
    with pytest.raises(RecordError, match=r"of a text named words, but a text named others was"):
        evaluate(tiny, Text("others", text.text), ["skvq"], Record(path), of("kl"))
    assert path.read_bytes() == before
    # What another task depends on does not concern this one.
    evaluate(tiny, text, ["skvq"], Record(path), of("kl", trials=9, n_tokens=3))


def test_what_would_be_sealed_in_another_way_now_is_measured_anew(
    tiny: Model, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.json"
    names = ["skvq", "auto:2", "q8_0", "rtn-2"]
    evaluate(tiny, text, names, Record(path), of("kl"), command="first")
    data = json.loads(path.read_text())
    n_digests = len({data["schemes"][name]["digest"] for name in names})
    assert n_digests == len(names)
    expected = data["results"]["kl"]["skvq"]["ppl"]
    data["schemes"]["skvq"]["digest"] = "0123456789abcdef"  # as of another codec
    data["results"]["kl"]["skvq"]["ppl"] = 1.0
    data["results"]["needle"] = {"skvq": {"found": 1.0}}
    path.write_text(json.dumps(data))
    finished: list[str] = []
    with pytest.warns(UserWarning, match=r"^skvq would be sealed in another way .*out.json was"):
        evaluate(
            tiny,
            text,
            names,
            Record(path),
            of("kl"),
            command="second",
            announce=lambda task, scheme, summary: finished.append(scheme),
        )
    assert finished == ["skvq"]
    data = json.loads(path.read_text())
    assert data["results"]["kl"]["skvq"]["ppl"] == expected
    assert data["results"]["kl"]["skvq"]["runs"] == [1]
    assert data["results"]["kl"]["q8_0"]["runs"] == [0]
    assert "needle" not in data["results"]

    # Parts are dropped too; and until one is measured anew, the file stays as it is.
    data["unfinished"] = {"chunked": {"skvq": {"0": {"run": 0}}, "q8_0": {"0": {"run": 0}}}}
    data["schemes"]["skvq"]["digest"] = "0123456789abcdef"
    path.write_text(json.dumps(data))
    record = Record(path)
    assert record.describe_scheme("skvq", {"digest": "x"})
    assert record.parts("chunked", "skvq") == {}
    assert record.parts("chunked", "q8_0") == {"0": {"run": 0}}
    assert not record.describe_scheme("skvq", {"digest": "x"})
    assert json.loads(path.read_text()) == data


def test_results_say_which_runs_have_measured_them(tiny: Model, text: Text, tmp_path: Path) -> None:
    path = tmp_path / "out.json"

    def stop(what: str, done: int, total: int) -> None:
        if done > 0.75 * total:  # in the second of two chunks
            raise Stopped

    with pytest.raises(Stopped):
        evaluate(tiny, text, ["skvq"], Record(path), of("kl"), command="first", progress=stop)
    assert json.loads(path.read_text())["unfinished"]["kl"]["skvq"]["0"]["run"] == 0
    evaluate(tiny, text, ["skvq", "q8_0"], Record(path), of("kl"), command="second")
    data = json.loads(path.read_text())
    assert [run["command"] for run in data["runs"]] == ["first", "second"]
    assert all({"date", "version", "machine", "isa"} < set(run) for run in data["runs"])
    assert data["results"]["kl"]["skvq"]["runs"] == [0, 1]
    assert data["results"]["kl"]["q8_0"]["runs"] == [1]


def test_who_stops_an_evaluation_is_told_what_is_kept(tmp_path: Path) -> None:
    record = Record(tmp_path / "out.json")
    assert record.kept() == f"No part was finished that {record.path} could keep."
    record.begin_run("a command")
    for scheme in ("f16", "skvq"):
        for task, unit in (("kl", "0"), ("needle", "0"), ("needle", "1")):
            record.add_part(task, scheme, unit, {})
        record.finish("kl", scheme, {})
    record.add_part("needle", "q8_0", "0", {})
    assert record.kept().startswith("No part")  # nothing is on disk yet
    record.save()
    assert record.kept() == (
        f"{record.path} keeps kl of f16, skvq; 2 parts of needle of f16, skvq; 1 part of needle of"
        " q8_0. The same command goes on from there."
    )
    assert "no file was named to keep results" in Record().kept()


def test_tasks_that_read_nothing_sealed_are_refused_or_warned_of(
    tiny: Model, text: Text, tmp_path: Path
) -> None:
    path = tmp_path / "out.json"
    with pytest.raises(
        ValueError,
        match=r"The task kl reads no token from sealed blocks under any scheme, with sinks \+"
        r" window of 5 \+ 128 tokens and blocks of 64: .* needs more context \(-c\)",
    ):
        evaluate(tiny, text, ["skvq", "q8_0"], Record(path), of("kl", n_ctx=190))
    assert not path.exists()
    for task, more, remedy in (
        ("chunked", {"n_batch": 512}, r"shorter passes \(-b\)"),
        ("generation", {"n_prompt": 100}, r"longer prompts \(--prompt-tokens\)"),
        ("needle", {"lengths": (150,)}, r"longer prompts \(--lengths\)"),
    ):
        with pytest.raises(ValueError, match=remedy):
            evaluate(tiny, text, ["skvq"], Record(), of(task, **more))
    record = Record()
    with pytest.warns(
        UserWarning, match=r"no token from sealed blocks under skvq, .* there say nothing"
    ):
        evaluate(
            tiny, text, ["skvq", "q8_0"], record, of("kl", n_ctx=190, own_setting=True, chunks=1)
        )
    found = record.data["results"]["kl"]
    assert found["skvq"]["sealed"] == 0
    assert found["skvq"]["mean_kld"] < 1e-5 < found["q8_0"]["mean_kld"]  # rows in another basis
    assert found["q8_0"]["sealed"] == 1
    evaluate(tiny, text, ["f16"], Record(), of("kl", n_ctx=64))  # there is nothing to seal


def test_fewer_chunks_than_asked_for_are_said(tiny: Model, text: Text) -> None:
    record = Record()
    with pytest.warns(UserWarning, match=r"fills 11 chunks of 256 tokens, fewer than the 99 of --"):
        evaluate(tiny, text, ["f16"], record, of("kl", chunks=99))
    assert record.data["settings"]["kl"]["chunks"] == 11


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not a record of `pykvq eval`: it is not JSON"),
        ("[]", "is not a record of `pykvq eval`: it lacks one of settings"),
        ('{"runs": [], "settings": 3}', "it lacks one of settings"),
        (
            '{"format": 99, "runs": [], "settings": {}, "schemes": {}, "results": {},'
            ' "unfinished": {}}',
            r"has the format 99, but this version of pykvq reads and writes format 2",
        ),
    ],
)
def test_a_file_that_is_no_record_is_refused(content: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text(content)
    with pytest.raises(RecordError, match=sentence):
        Record(path)


def test_arrays_come_back_as_they_were() -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    np.testing.assert_array_equal(unpack(pack(values)), values.astype(np.float64))


def test_what_a_record_says_about_where_it_is_from(tiny: Model, text: Text) -> None:
    record = Record()
    evaluate(tiny, text, ["kivi-2"], record, of("kl"), command="pykvq eval")
    data = record.data
    assert data["settings"]["model"] == {"name": "tiny llama", **file_facts(tiny.info.path)}
    assert len(data["settings"]["model"]["sha256"]) == 64
    assert data["settings"]["kl"] == {"n_ctx": 256, "chunks": 2}
    [run] = data["runs"]
    assert run["command"] == "pykvq eval"
    assert run["machine"].endswith("cores")
    scheme = data["schemes"]["kivi-2"]
    assert scheme["simulated"]
    assert scheme["bits_effective"] > scheme["bits_effective_at"] > scheme["bits_sealed"]
    json.dumps(data, allow_nan=False)


def test_what_schemes_store_is_stated_anew_and_nothing_measured_again(
    tiny: Model, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    evaluate(tiny, text, ["skvq", "kivi-2"], Record(path), of("kl"))
    before = json.loads(path.read_text())
    stale = json.loads(path.read_text())
    for facts in stale["schemes"].values():
        facts |= {"bytes_at": 1, "bits_effective": 0.5}
    path.write_text(json.dumps(stale))
    monkeypatch.setattr(SessionPool, "session", None)  # to measure takes one
    evaluate(tiny, text, ["skvq", "kivi-2"], Record(path), of("kl"))
    assert json.loads(path.read_text()) == before


def test_schemes_that_need_it_are_calibrated_once_on_the_calibration_text(
    tiny: Model, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pykvq import moments

    calls: list[int] = []
    collect = moments.collect

    def spy(model: Model, tokens: Any, **more: Any) -> moments.Moments:
        calls.append(len(tokens))
        return collect(model, tokens, **{**more, "n_ctx": 128})

    monkeypatch.setattr(moments, "collect", spy)
    other = Text("other", text.text[::-1])
    names = ["oscar-2", "turboquant-2.5"]
    for tasks in (("kl",), ("kl", "needle")):
        calls.clear()
        record = Record()
        options = Options(**{**SMALL.__dict__, "tasks": tasks, "calibration_tokens": 300})
        evaluate(tiny, text, names, record, options, calibration=other)
        assert calls == [300]
        assert record.data["settings"]["calibration"]["name"] == "other"
        assert record.data["results"]["kl"]["oscar-2"]["mean_kld"] > 0
    with pytest.raises(
        ValueError, match=r"^oscar-2 must be calibrated, but no text .*--calibration"
    ):
        evaluate(tiny, text, ["oscar-2"], Record(), of("kl"))
    with pytest.raises(ValueError, match=r"^oscar-2 and turboquant-2.5 must be calibrated"):
        evaluate(tiny, text, names, Record(), of("kl"))


def test_options_are_checked() -> None:
    for wrong, sentence in (
        ({"tasks": ("kl", "ruler")}, "The task 'ruler' is unknown; known are: kl, chunked"),
        ({"chunks": 0}, "chunks is 0, expected a whole number from 1"),
        ({"kv_sinks": -1}, "kv_sinks is -1"),
        ({"depths": (50, 101)}, "A depth is 101, expected 0 to 100"),
        ({"lengths": ()}, "no lengths or no depths"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Options(**wrong)  # type: ignore[arg-type]


def test_every_task_that_has_a_name_can_be_made() -> None:
    assert tuple(harness.TASKS) == TASKS


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\n"
            "processor\t: 1\ncpu family\t: 9\nmodel\t\t: 9\nmodel name\t: Other\n",
            "AMD EPYC (family 25, model 17)",
        ),
        ("processor\t: 0\nmodel name\t: ARMv8 Processor rev 1\n", "ARMv8 Processor rev 1"),
        ("processor\t: 0\nCPU part\t: 0xd0c\n", ""),
        ("", ""),
    ],
)
def test_processors_are_named_with_family_and_model(cpuinfo: str, name: str) -> None:
    assert processor_of(cpuinfo) == name
