"""Every call of the CUDA driver fails in turn: what a session says, leaves and still does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from random_models import Shape, write_random
from stand_in import StandIn

from pykvq import DeviceError, KvqError, MemoryLimitError, Model, Session

API = Path(__file__).parents[1] / "core" / "cuda" / "cuda_api.def"
#: Functions of the driver, by the names of its library. cuGetError... are asked about others.
FUNCTIONS = [
    name
    for name in re.findall(r"KVQ_CUDA_API\(\w+,\s*(\w+)", API.read_text(encoding="utf-8"))
    if not name.startswith("cuGetError")
]
#: Of those that end something: they do it and fail, of which nobody is told.
RELEASES = ("Free", "Destroy", "Unload", "Release", "PopCurrent")
#: Whose last call is that of closing, of which nobody is told: without the context that it wants,
#: releases cannot succeed either, and only the end of the context frees what there is.
CLOSING = ("cuCtxPushCurrent_v2", "cuStreamSynchronize")
#: Most calls of a function that fail, one in each run: the first, the last, and some between.
MOST = 5
TOKENS = [int(i) for i in np.random.default_rng(9).integers(0, 256, 100)]
OPTIONS = {"kv": "skvq", "n_ctx": 512, "kv_window": 0, "kv_sinks": 0, "device": "cuda"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    shape = Shape(d_model=32, d_ff=32, n_layers=1)
    path = write_random(tmp_path_factory.mktemp("models") / "random.gguf", shape)
    with Model(path, n_threads=1) as opened:
        yield opened


def use(session: Session) -> None:
    """A prompt that seals a block, three tokens (launches, their graph, its replay), and all about
    the cache.
    """
    session.eval(TOKENS[:70])
    for token in (1, 2, 3):
        session.eval([token])
    session.sealed_block(0, 0, "k", 0)[0] ^= 1
    session.fill(73 + 64)
    session.truncate(100)
    session.eval([3], "none")


def refuses(session: Session, sentence: str) -> None:
    """A session whose device has failed says so whatever it is asked for."""
    for call in (
        lambda: session.eval([1]),
        lambda: session.eval([1, 2, 3], "none"),
        lambda: session.truncate(0),
    ):
        with pytest.raises(KvqError, match=re.escape(sentence)):
            call()


def test_nothing_fails_where_no_call_does(gpu: StandIn, model: Model) -> None:
    with model.session(**OPTIONS) as session:
        use(session)
        assert session.n_tokens == 101


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_call_that_fails_is_told_and_leaves_nothing_behind(
    gpu: StandIn, model: Model, function: str
) -> None:
    gpu.set()
    with model.session(**OPTIONS) as session:
        use(session)
    n = gpu.calls(function) - (function in CLOSING)
    chosen = sorted({1 + round(i * (n - 1) / (MOST - 1)) for i in range(MOST)}) if n else []
    name = function.removesuffix("_v2").removesuffix("WithFlags")
    for call in chosen:
        gpu.set(FAIL=f"{function}:{call}")
        before, told = (gpu.leaks, gpu.violations), None
        session = None
        try:
            session = model.session(**OPTIONS)
            use(session)
        except KvqError as error:
            told = str(error)
            assert isinstance(error, DeviceError)
            assert name in told
            assert told.endswith(").")
            if session is not None:
                refuses(session, told)
        finally:
            if session is not None:
                session.close()
        assert told is not None or any(word in function for word in RELEASES), call
        assert (gpu.leaks, gpu.violations) == before, f"call {call} of {n}: {told}"


def test_memory_that_is_refused_once_ends_nothing(gpu: StandIn, model: Model) -> None:
    gpu.set()
    with model.session(**OPTIONS) as session:
        expected = session.eval(TOKENS[:70])
        n = gpu.calls("cuMemAlloc_v2")
    gpu.set(FAIL=f"cuMemAlloc_v2:{n}:2")
    with model.session(**OPTIONS) as session:
        with pytest.raises(MemoryLimitError, match="The context cannot grow beyond about 0 tokens"):
            session.eval(TOKENS[:70])
        assert session.n_tokens == 0
        assert np.array_equal(session.eval(TOKENS[:70]), expected)


@pytest.mark.parametrize("call", [1, 2])
def test_memory_that_is_refused_when_a_session_opens_is_told(
    gpu: StandIn, model: Model, call: int
) -> None:
    gpu.set(FAIL=f"cuMemAlloc_v2:{call}:2")
    expected = r"cuMemAlloc of 0\.00 GB for .*: out of memory \(CUDA_ERROR_OUT_OF_MEMORY\)\."
    with pytest.raises(MemoryLimitError, match=expected):
        model.session(**OPTIONS)


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_observer_is_not_shown_what_could_not_be_read(
    gpu: StandIn, model: Model, call: int
) -> None:
    seen: list[int] = []
    with model.session(**OPTIONS) as session:
        session.observe(lambda layer, first, *_: seen.append(first))
        session.eval(TOKENS[:3], "none")
        gpu.set(FAIL=f"cuMemcpyDtoHAsync_v2:{call}")  # of queries, keys, values
        with pytest.raises(DeviceError, match="cuMemcpyDtoHAsync"):
            session.eval(TOKENS[3:5], "none")
    assert seen == [0]


def test_other_sessions_survive_one_that_failed(gpu: StandIn, model: Model) -> None:
    with model.session(**OPTIONS) as good, model.session(**OPTIONS) as bad:
        expected = good.eval(TOKENS[:70])
        gpu.set(FAIL="cuLaunchKernel:3")
        with pytest.raises(DeviceError, match="cuLaunchKernel of kvq_cuda_"):
            bad.eval(TOKENS[:70])
        gpu.set()
        bad.close()
        good.truncate(0)
        assert np.array_equal(good.eval(TOKENS[:70]), expected)
