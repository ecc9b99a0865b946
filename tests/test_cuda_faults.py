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
from pykvq.session import FloatArray

API = Path(__file__).parents[1] / "core" / "cuda" / "cuda_api.def"
#: Functions of the driver, by the names of its library. cuGetError... are asked about others.
FUNCTIONS = {
    name
    for name in re.findall(r"KVQ_CUDA_API\(\w+,\s*(\w+)", API.read_text(encoding="utf-8"))
    if not name.startswith("cuGetError")
}
#: Of those: what is asked once in the life of a process; tests/cuda/test_driver.c has it fail.
ONCE = {"cuInit", "cuDriverGetVersion", "cuDeviceGetCount"}
#: Functions that end something: they do it and fail, of which nobody is told.
RELEASES = ("Free", "Destroy", "Unload", "Release", "PopCurrent")
#: What makes the context current. Where that fails in closing, nothing can be released before the
#: context itself ends, and nobody is told.
ENTER = "cuCtxPushCurrent_v2"
TOKENS = [int(i) for i in np.random.default_rng(9).integers(0, 256, 100)]
OPTIONS = {"kv": "skvq", "n_ctx": 512, "kv_window": 0, "kv_sinks": 0, "device": "cuda"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    shape = Shape(d_model=32, d_ff=32, d_head=128, n_layers=1)
    path = write_random(tmp_path_factory.mktemp("models") / "random.gguf", shape)
    with Model(path, n_threads=1) as opened:
        yield opened


def use(session: Session) -> FloatArray:
    """A prompt that seals a block, three tokens (launches, their graph, its replay), and all about
    the cache; returns the logits of the third token.
    """
    session.eval(TOKENS[:70])
    logits = [session.eval([token]) for token in (1, 2, 3)]
    session.sealed_block(0, 0, "k", 0)[0] ^= 1
    session.fill(73 + 64)
    session.truncate(100)
    session.eval([3], "none")
    return logits[-1]


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


def test_every_call_that_fails_is_told_and_leaves_nothing_behind(
    gpu: StandIn, model: Model
) -> None:
    """The first of all calls fails; then, in another session, the second; and so on to the last."""
    gpu.set()
    with model.session(**OPTIONS) as session:
        expected = use(session)
        n_open = len(gpu.called)
    calls = gpu.called
    chosen = [n for n, name in enumerate(calls, 1) if n <= n_open or name != ENTER]
    assert {calls[n - 1] for n in chosen} == FUNCTIONS - ONCE
    for n in chosen:
        name = calls[n - 1]
        gpu.set(FAIL=f"any:{n}")
        before, told, session = (gpu.leaks, gpu.violations), None, None
        try:
            session = model.session(**OPTIONS)
            use(session)
        except KvqError as error:
            assert isinstance(error, DeviceError)
            told = str(error)
            if session is not None:
                refuses(session, told)
        finally:
            if session is not None:
                session.close()
        what = f"call {n} of {len(calls)}, {name}: {told}"
        if told is None:
            assert n > n_open or any(word in name for word in RELEASES), what
        else:
            function = name.removesuffix("_v2").removesuffix("WithFlags")
            sentence = rf"\b{function}\b.*: unknown error \(CUDA_ERROR_UNKNOWN\)\.$"
            assert re.search(sentence, told), what
        assert (gpu.leaks, gpu.violations) == before, what
    gpu.set()
    with model.session(**OPTIONS) as session:
        assert np.array_equal(use(session), expected)


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
