"""Measures what each KV scheme costs on a text, and keeps the result with its provenance.

    python bench/quality.py smollm2 --chunks 16 --text wiki.test.raw

Needs the text in $PYKVQ_DATA/text. Every scheme sees the same tokens in one process,
in streaming order, so that every score goes through the sealed cache (see pykvq.perplexity).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import sys
from pathlib import Path

import pykvq
from pykvq.perplexity import perplexity

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Runs the measurement and writes bench/results/quality-MODEL-TEXT.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a name of the catalogue or a GGUF file")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--ctx-size", type=int, default=1024)
    parser.add_argument("--text", default="wiki.test.raw", help="a file of $PYKVQ_DATA/text")
    args = parser.parse_args()

    data = Path(os.environ.get("PYKVQ_DATA") or ROOT / "../shared/data")
    text = (data / "text" / args.text).read_text(encoding="utf-8")
    schemes = [scheme.name for scheme in pykvq.schemes()]
    with pykvq.Model(args.model, n_ctx=args.ctx_size) as model:
        results = perplexity(
            model, text, schemes, n_ctx=args.ctx_size, chunks=args.chunks, kld=True, stream=True
        )
        record = {
            "what": "token by token, second half of each chunk scored",
            "text": args.text,
            "command": f"python bench/quality.py {' '.join(sys.argv[1:])}",
            "date": datetime.date.today().isoformat(),
            "machine": f"{processor()}, {os.cpu_count()} cores",
            "model": model.info.name,
            "version": pykvq.__version__,
            "n_ctx": args.ctx_size,
            "chunks": args.chunks,
            "results": [dataclasses.asdict(result) for result in results],
        }
    RESULTS.mkdir(exist_ok=True)
    name = Path(args.model).name.removesuffix(".gguf")
    path = RESULTS / f"quality-{name}-{args.text.partition('.')[0]}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path, flush=True)


if __name__ == "__main__":
    main()
