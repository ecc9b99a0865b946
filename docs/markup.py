"""What the generated parts of pages are made of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def link_to(path: Path, page: Path) -> str:
    """The path of a file as a link on a page names it."""
    return os.path.relpath(path, page.parent).replace(os.sep, "/")
