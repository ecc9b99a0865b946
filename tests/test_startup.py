"""A new process does not load what it does not need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: What takes long to import, and is for chat templates, downloads and tables only.
SELDOM_NEEDED = {"jinja2", "urllib.request", "filelock", "huggingface_hub", "rich"}

CODE = """
import os, sys
from pykvq.cli import main
status = main([*{arguments!r}, "--no-conversation", "-p", "abc", "-n", "1", "--temp", "0"])
print()
print(status, os.environ["OPENBLAS_NUM_THREADS"], *sorted(sys.modules))
"""


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("3", "3")])
def test_writing_a_text_imports_no_more_and_starts_no_threads_of_openblas(
    tiny_path: Path, given: str | None, expected: str
) -> None:
    env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    if given is not None:
        env["OPENBLAS_NUM_THREADS"] = given
    code = CODE.format(arguments=["run", str(tiny_path)])
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    status, n_threads, *modules = done.stdout.splitlines()[-1].split()
    assert (status, n_threads) == ("0", expected)
    assert "numpy" in modules and not SELDOM_NEEDED.intersection(modules)
