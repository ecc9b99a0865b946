"""The frozen vectors of the weight formats are what the gguf package says today."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^KVQ_WEIGHT\((\w+), (\d+), (\d+), (\d+)\)$", re.MULTILINE)


def load_script() -> ModuleType:
    path = ROOT / "tests" / "vectors" / "make_weights.py"
    spec = importlib.util.spec_from_file_location("make_weights", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_frozen_vectors_are_what_gguf_gives() -> None:
    script = load_script()
    assert script.PATH.read_bytes() == script.build()


def test_every_weight_format_has_the_block_that_gguf_names_and_a_frozen_vector() -> None:
    rows = ROW.findall((ROOT / "core" / "weights.def").read_text())
    assert {row[0] for row in rows} == set(load_script().HALVES)
    for name, number, block, size in rows:
        kind = GGMLQuantizationType[name]
        assert (kind.value, *GGML_QUANT_SIZES[kind]) == (int(number), int(block), int(size)), name
