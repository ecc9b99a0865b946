"""What the scripts beside this one share: where records go, and what says where they come from."""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from pykvq import native
from pykvq.eval.record import machine, processor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

Json = dict[str, Any]


def numbers(text: str) -> list[int]:
    """Whole numbers divided by commas."""
    return [int(word) for word in text.split(",")]


def data_folder() -> Path:
    """Where the texts and golden files are that measurements read: $PYKVQ_DATA."""
    return Path(os.environ.get("PYKVQ_DATA") or ROOT / "../shared/data")


def model_slug(model: str) -> str:
    """A model, as it was named, as a part of a file's name: "smollm2"."""
    return Path(model).name.removesuffix(".gguf")


def machine_slug() -> str:
    """The processor and its cores as a part of a file's name."""
    return slug(f"{processor()} {os.cpu_count()}")


def command() -> str:
    """The command line of this process; what is private to this machine left out of paths."""
    script, *words = sys.argv
    shown = [Path(word).name if Path(word).is_absolute() else word for word in words]
    return shlex.join(["python", f"bench/{Path(script).name}", *shown])


def provenance() -> Json:
    """Command, date, machine and version."""
    return {
        "command": command(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "version": native.version(),
    }


def model_facts(name: str, path: str | os.PathLike[str]) -> Json:
    """What tells a model: its own name, its file, the bytes of that."""
    return {"model": name, "file": os.path.basename(path), "bytes_model": os.path.getsize(path)}


def slug(text: str) -> str:
    """A text as a part of a file's name: "nvidia-h100"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def save(name: str, record: Json, folder: Path | None = None) -> Path:
    """Writes NAME.json into a folder, bench/results if none is given; returns its path."""
    path = (folder or RESULTS) / f"{name}.json"
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    return path
