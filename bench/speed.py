"""Measures speed by depth beside llama.cpp, and keeps the result with its provenance.

    python bench/speed.py smollm2
    python bench/speed.py /tmp/7b-shape.gguf --depths 0,8192,32768 --prompt 256 --fill
    python bench/speed.py smollm2 --depths 0 --prompt 8192 --generate 0
    python bench/speed.py /tmp/7b-shape.gguf --alone --depths 0,1000000 --prompt 0 --fill

Runs what `pykvq bench --peer llama.cpp` runs and writes bench/results/speed-MODEL-MACHINE.json;
with --alone without llama.cpp, to bench/results/speed-alone-MODEL-MACHINE.json; with
--generate 0 of a prompt alone, to bench/results/prompt-MODEL-MACHINE.json. llama.cpp is
`llama-cpp-python` (extra `oracle`), which should be compiled on this machine, so that it uses all
that the processor has: `pip install --no-binary llama-cpp-python llama-cpp-python`.
"""

from __future__ import annotations

import argparse

from records import command, machine_slug, model_slug, numbers, save

import pykvq
from pykvq.bench import harness, report
from pykvq.bench.options import FILL_FROM, Options
from pykvq.console import ProgressBar


def main() -> None:
    """Runs the benchmark and writes its record."""
    default = Options()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="a name of the catalogue or a GGUF file")
    parser.add_argument("--depths", type=numbers, default=[0, 2048, 8192])
    parser.add_argument("--kv", default="skvq,f16,q8_0", help="schemes, divided by commas")
    parser.add_argument("--peer-kv", default="f16,q8_0", help="llama.cpp's, divided by commas")
    parser.add_argument("--prompt", type=int, default=default.n_prompt)
    parser.add_argument("--prompt-depth", type=int, help="the deepest that prompts are timed at")
    parser.add_argument("--generate", type=int, default=default.n_gen)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--fill", action="store_true", help="repeat keys and values")
    parser.add_argument("--alone", action="store_true", help="without llama.cpp")
    args = parser.parse_args()
    options = Options(
        kv=args.kv.split(","),
        n_prompt=args.prompt,
        n_gen=args.generate,
        depths=args.depths,
        prompt_depth=args.prompt_depth,
        repetitions=args.repetitions,
        n_threads=args.threads,
        fill_from=FILL_FROM if args.fill else None,
        peer=None if args.alone else "llama.cpp",
        peer_kv=args.peer_kv.split(","),
    )
    with pykvq.Model(args.model) as model, ProgressBar() as progress:
        record = harness.run(
            model,
            options,
            command=command(),
            progress=progress,
            announce=lambda result: print(report.line(result), flush=True),
        )
    kind = ("speed" if args.generate else "prompt") + ("-alone" if args.alone else "")
    path = save(f"{kind}-{model_slug(args.model)}-{machine_slug()}", record)
    print(report.render(record, "md"))
    print(path)


if __name__ == "__main__":
    main()
