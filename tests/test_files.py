"""Files that users name: what is replaced, what is refused, and how far texts are read."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path

import pytest

from pykvq import KvqError, files
from pykvq.cli import main
from pykvq.eval.record import Record
from pykvq.files import read_text_bytes, replacing

Capture = pytest.CaptureFixture[str]


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="stopped"), replacing(path) as work:
        work.write_text("half")
        raise RuntimeError("stopped")
    assert path.read_text() == "old"
    with replacing(path) as work:
        work.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(Path("folder") / "target")
    for text in ("first", "second"):
        with replacing(link) as work:
            work.write_text(text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert os.listdir(target.parent) == ["target"]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with (
        pytest.raises(OSError) as caught,
        replacing(path),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert caught.value.filename == str(path)


@pytest.fixture(params=["device", "pipe", "link to a device"])
def irregular(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "irregular"
    if request.param == "device":
        return Path("/dev/full")
    if request.param == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/full")
    return path


def test_what_is_no_regular_file_is_neither_read_nor_replaced(irregular: Path) -> None:
    for use in (lambda: Record(irregular), lambda: replacing(irregular).__enter__()):
        with pytest.raises(KvqError, match=rf"{irregular} is a (device|pipe), expected a regular"):
            use()
    assert not irregular.is_file()


@pytest.mark.parametrize("command", ["calibrate", "eval"])
def test_commands_refuse_to_write_what_is_no_regular_file(
    command: str, irregular: Path, tiny_path: Path, tmp_path: Path, capsys: Capture
) -> None:
    text = tmp_path / "text"
    text.write_text("the end " * 500)
    assert main([command, str(tiny_path), "-f", str(text), "-o", str(irregular)]) == 2
    error = capsys.readouterr().err
    assert f"cannot be written to {irregular}: it is a " in error
    assert error.count("\n") == 1
    assert not irregular.is_file()


def test_a_text_that_does_not_end_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_path: Path, capsys: Capture
) -> None:
    monkeypatch.setattr(files, "LONGEST_TEXT", 3 << 20)
    assert read_text_bytes("it", io.BytesIO(bytes(3 << 20))) == bytes(3 << 20)
    assert main(["tokenize", str(tiny_path), "-f", "/dev/zero"]) == 2
    error = "pykvq: error: The text of /dev/zero has more than 3 MiB, the most that is read.\n"
    assert capsys.readouterr().err == error


def test_a_text_can_come_from_a_pipe(tmp_path: Path, tiny_path: Path, capsys: Capture) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("the end",))
    writer.start()
    assert main(["tokenize", str(tiny_path), "-f", str(pipe), "--ids"]) == 0
    writer.join()
    from_pipe = capsys.readouterr().out
    assert main(["tokenize", str(tiny_path), "-p", "the end", "--ids"]) == 0
    assert capsys.readouterr().out == from_pipe
