"""The file that an evaluation writes: settings, provenance, and results as they come.

Owns the layout of the file, and what it takes to go on where an earlier run was stopped. Knows no
task: their parts and summaries are plain JSON values.

A record is about one model and one text. A task's work on a scheme is done in parts (a chunk, a
prompt), each of which is kept under "unfinished" until the last one is there; then the summary
takes their place under "results". Each names the runs that measured it. Tasks and schemes can be
added to a record by later runs; what was measured under other settings cannot, and is refused.

Results hold as long as the digest of their scheme does. Those of a scheme that has another one now
(its codec or the model's profile was changed) are dropped and measured anew: nobody can ask for the
old ones any more, and the others of the record, which may be hours of work, still hold.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pykvq import native
from pykvq.errors import KvqError
from pykvq.files import replacing, require_regular

#: The layout of the file; raised when older code would misread a newer file.
FORMAT = 2

Json = dict[str, Any]


class RecordError(KvqError):
    """The file of an evaluation is damaged, or holds results under other settings."""


class Record:
    """Results by task and scheme, on disk after every change if there is a path.

    Attributes:
        path: The file; None if nothing is to be written.
    """

    path: Path | None

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        """Opens a record, empty where the file does not exist.

        Raises:
            RecordError: The file is not such a record.
            KvqError: There is something else than a regular file at the path.
        """
        self.path = None if path is None else Path(path)
        self._run: Json = {}
        self._data: Json = {
            "format": FORMAT,
            "settings": {},
            "runs": [],
            "schemes": {},
            "results": {},
            "unfinished": {},
        }
        if self.path is not None:
            require_regular(self.path)
        if self.path is not None and self.path.exists():
            self._data = self._read(self.path)

    @staticmethod
    def _read(path: Path) -> Json:
        what = f"{path} is not a record of `pykvq eval`"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordError(f"{what}: it is not JSON ({error}).") from error
        parts = ("settings", "schemes", "results", "unfinished")
        if (
            not isinstance(data, dict)
            or not isinstance(data.get("runs"), list)
            or not all(isinstance(data.get(part), dict) for part in parts)
        ):
            raise RecordError(f"{what}: it lacks one of {', '.join(parts)} and runs.")
        if data.get("format") != FORMAT:
            raise RecordError(
                f"{path} has the format {data.get('format')!r}, but this version of pykvq reads"
                f" and writes format {FORMAT}; name another file."
            )
        return data

    # ---- settings -----------------------------------------------------------------------

    def bind(self, group: str, settings: Mapping[str, Any], words: Mapping[str, str]) -> None:
        """States what results depend on.

        Args:
            group: What it concerns: "model", "text", a task.
            settings: Plain JSON values by name.
            words: What users call them, by name: "--chunks", "a text named".

        Raises:
            RecordError: The record holds results under another value.
        """
        given: Json = json.loads(json.dumps(settings))  # tuples become lists, as they do on disk
        held = self._data["settings"].setdefault(group, given)
        for name in dict.fromkeys([*held, *given]):
            if held.get(name) != given.get(name):
                word = words.get(name, name)
                before, now = (f"{word} {_shown(x.get(name))}" for x in (held, given))
                raise RecordError(
                    f"{self.path or 'The record'} holds results of {before}, but {now} was asked"
                    f" for; ask for {before} to go on with this file, or name another one to begin"
                    " anew."
                )

    def begin_run(self, command: str) -> None:
        """States who adds results from here on; it is kept once there is one."""
        self._run = {
            "command": command,
            "date": datetime.date.today().isoformat(),
            "machine": machine(),
            "isa": native.isa_selected(),
            "version": native.version(),
        }

    def describe_scheme(self, name: str, facts: Mapping[str, Any]) -> bool:
        """States what a scheme is and stores.

        Args:
            name: Its name.
            facts: Plain JSON values; "digest" changes whenever results do not hold any more.

        Returns:
            Whether the record had results or parts of it that do not hold, and dropped them. The
            file has them until there is something new to save.
        """
        held = self._data["schemes"].get(name)
        dropped = False
        if held is not None and held.get("digest") != facts["digest"]:
            for kind in ("results", "unfinished"):
                by_task = self._data[kind]
                for task in list(by_task):
                    dropped |= by_task[task].pop(name, None) is not None
                    if not by_task[task]:
                        del by_task[task]
        self._data["schemes"][name] = dict(facts)
        return dropped

    # ---- results ------------------------------------------------------------------------

    def result(self, task: str, scheme: str) -> Json | None:
        """The summary of a task's finished work on a scheme, if it is finished."""
        found: Json | None = self._data["results"].get(task, {}).get(scheme)
        return found

    def parts(self, task: str, scheme: str) -> dict[str, Json]:
        """The parts of unfinished work that are there, by unit, each with the "run" it is of."""
        found: dict[str, Json] = self._data["unfinished"].get(task, {}).get(scheme, {})
        return found

    def add_part(self, task: str, scheme: str, unit: str, part: Mapping[str, Any]) -> None:
        """Keeps a part; `save` writes it."""
        runs = self._data["runs"]
        if self._run not in runs:
            runs.append(self._run)
        schemes = self._data["unfinished"].setdefault(task, {})
        schemes.setdefault(scheme, {})[unit] = {**part, "run": runs.index(self._run)}

    def finish(self, task: str, scheme: str, summary: Mapping[str, Any]) -> None:
        """Puts the summary, with the runs that measured it, in the place of the parts."""
        measured = sorted({part["run"] for part in self.parts(task, scheme).values()})
        results = self._data["results"].setdefault(task, {})
        results[scheme] = {**summary, "runs": measured}
        unfinished = self._data["unfinished"]
        unfinished.get(task, {}).pop(scheme, None)
        if not unfinished.get(task, True):
            del unfinished[task]

    @property
    def data(self) -> Json:
        """All of it, as it is written, without what is unfinished."""
        return {key: value for key, value in self._data.items() if key != "unfinished"}

    def kept(self) -> str:
        """A sentence or two for someone who stopped the evaluation: what is on disk, what now."""
        if self.path is None:
            return "Nothing was written: no file was named to keep results as they come (-o)."
        data = self._read(self.path) if self.path.exists() else {"results": {}, "unfinished": {}}
        done = [f"{task} of {', '.join(found)}" for task, found in data["results"].items()]
        done += [
            f"{len(parts)} part{'s' if len(parts) > 1 else ''} of {task} of {', '.join(schemes)}"
            for task, by_scheme in data["unfinished"].items()
            for parts, schemes in _by_parts(by_scheme)
        ]
        if not done:
            return f"No part was finished that {self.path} could keep."
        return f"{self.path} keeps {'; '.join(done)}. The same command goes on from there."

    def save(self) -> None:
        """Writes the file, so that at any time there is either the old or the new one."""
        if self.path is None:
            return
        text = json.dumps(self._data, indent=1, allow_nan=False) + "\n"
        with replacing(self.path) as fresh:
            fresh.write_text(text, encoding="utf-8")


def _by_parts(by_scheme: Mapping[str, Json]) -> list[tuple[tuple[str, ...], list[str]]]:
    """The parts that schemes have, each set of them once, with the schemes that have it."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for scheme, parts in by_scheme.items():
        groups.setdefault(tuple(parts), []).append(scheme)
    return list(groups.items())


def _shown(value: object) -> str:
    """A value as one would write it behind its option."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


# ---- arrays in parts ------------------------------------------------------------------------


def pack(values: npt.NDArray[np.floating]) -> str:
    """An array [n] as text, in float32: a part is read again exactly as it was written."""
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode("ascii")


def unpack(text: str) -> npt.NDArray[np.float64]:
    """What `pack` wrote."""
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)


# ---- provenance -----------------------------------------------------------------------------


def processor_of(cpuinfo: str) -> str:
    """The first processor's name in the text of /proc/cpuinfo; empty if it tells none.

    On x86 with family and model: hypervisors give processors of several generations one name.
    """
    facts: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name, family, model = (facts.get(key, "") for key in ("model name", "cpu family", "model"))
    return f"{name} (family {family}, model {model})" if name and family and model else name


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    return processor_of(text) or platform.processor()


def machine() -> str:
    """The processor and how many cores of it there are."""
    return f"{processor()}, {os.cpu_count()} cores"


def file_facts(path: str | os.PathLike[str]) -> Json:
    """What tells a file from others: its name, size and SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        size = file.tell()
    return {"file": os.path.basename(path), "bytes": size, "sha256": digest.hexdigest()}


def text_facts(name: str, text: str) -> Json:
    """What tells a text from others: its name, and the SHA-256 of its UTF-8 form."""
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return {"name": name, "sha256": digest}
