"""Writes the generated tables of README.md and docs/ from the core and from bench/results.

    python docs/make_tables.py [--check]

A table stands between `<!-- NAME:begin ... -->` and `<!-- NAME:end -->`. With --check nothing is
written, and a table that is not what it should be is an error: the tests call it so.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pykvq

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/kv-schemes.md")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def schemes() -> str:
    """What each scheme is, from the core's table, at the two usual widths of a head."""
    narrow, wide = pykvq.schemes(64), pykvq.schemes(128)
    rows = [
        [
            f"`{n.name}`",
            f"{n.codec_k} {n.bits_k:.2f} / {w.bits_k:.2f}",
            f"{n.codec_v} {n.bits_v:.2f} / {w.bits_v:.2f}",
            f"{(n.bits_k + n.bits_v) / 2:.2f} / {(w.bits_k + w.bits_v) / 2:.2f}",
            f"{n.sinks} + {n.window}",
            n.summary,
        ]
        for n, w in zip(narrow, wide, strict=True)
    ]
    head = "scheme|keys, bits at width 64 / 128|values|mean|sinks + window|what it is"
    return table(head.split("|"), rows)


def quality() -> str:
    """Perplexity and divergence per model, text and scheme, from bench/results/quality-*.json."""
    parts = []
    for card_path in sorted((ROOT / "models").glob("*.json")):
        card = json.loads(card_path.read_text())
        found = sorted((ROOT / "bench" / "results").glob(f"quality-{card_path.stem}-*.json"))
        # The text that the formats were chosen on comes last.
        for path in sorted(found, key=lambda path: path.stem.endswith("-wiki")):
            record = json.loads(path.read_text())
            rows = [
                [
                    f"`{r['kv']}`",
                    f"{r['bits']:.2f}",
                    f"{r['ppl']:.3f}",
                    f"{r['mean_kld']:.4f}",
                    f"{100 * r['top1']:.1f} %",
                ]
                for r in record["results"]
            ]
            parts.append(
                f"{card['title']} {card['quantization']} on {record['text']}: "
                f"{record['results'][0]['tokens']} tokens scored, "
                f"{record['date']}, `{record['command']}`, {record['machine']}.\n\n"
                + table(["cache", "bits", "perplexity", "mean KL", "same top-1"], rows)
            )
    return "\n\n".join(parts)


def fill(text: str) -> str:
    """The page with its tables made anew."""
    for name, make in (("schemes", schemes), ("quality", quality)):
        pattern = re.compile(rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if pattern.search(text):
            made = make()
            text = pattern.sub(lambda found, made=made: f"{found[1]}\n{made}\n\n{found[2]}", text)
    return text


def main() -> int:
    """Writes the pages, or checks them."""
    stale = []
    for name in PAGES:
        path = ROOT / name
        before = path.read_text()
        after = fill(before)
        if after != before and "--check" not in sys.argv:
            path.write_text(after)
        elif after != before:
            stale.append(name)
    if stale:
        print(f"Tables are out of date in {', '.join(stale)}: run `make tables`.", file=sys.stderr)
    return len(stale)


if __name__ == "__main__":
    sys.exit(main())
