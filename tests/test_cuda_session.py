"""Sessions on a CUDA device: where they go, what they take, and how they stop; on the stand-in."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from random_models import Shape, write_random
from stand_in import StandIn

from pykvq import Cancelled, DeviceError, MemoryLimitError, Model, UnsupportedError

TOKENS = [int(i) for i in np.random.default_rng(5).integers(0, 256, 400)]
SHAPE = Shape(n_layers=4, d_model=128, d_ff=256)
ALL = 5  # its layers, and the output
KERNELS = Path(__file__).parents[1] / "core" / "cuda" / "kernels"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("models") / "random.gguf", SHAPE)


@pytest.fixture
def model(path: Path) -> Iterator[Model]:
    with Model(path, kv="skvq", n_ctx=512, n_threads=1) as opened:
        yield opened


@pytest.fixture
def wide(tmp_path: Path) -> Iterator[Model]:
    """A model 256 of whose blocks, under f16, are a chunk."""
    shape = Shape(d_head=256, n_layers=2)
    with Model(write_random(tmp_path / "wide.gguf", shape), kv="f16", n_threads=1) as opened:
        yield opened


def elsewhere(program: str, path: Path, **variables: str) -> list[str]:
    """What a program prints of the model in `model`, in a process with further variables."""
    opened = "import sys, pykvq\nmodel = pykvq.Model(sys.argv[1], kv='skvq', n_ctx=512)\n"
    ran = subprocess.run(
        [sys.executable, "-c", opened + program, str(path)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout.splitlines()


# ---- where layers go; these need no device -----------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:64", ""])
def test_a_device_of_no_known_name_is_refused(model: Model, device: str) -> None:
    expected = re.escape(
        f'device is "{device}", expected auto, cpu, cuda or cuda:N (cuda:0 to cuda:63).'
    )
    with pytest.raises(ValueError, match=expected):
        model.session(device=device)


def test_a_number_of_layers_must_be_one(model: Model) -> None:
    with pytest.raises(ValueError, match="n_gpu_layers is -2"):
        model.session(device="cpu", n_gpu_layers=-2)


def test_a_device_is_planned_for_where_there_is_none(path: Path) -> None:
    program = (
        "for n in (None, 2):\n"
        "    stats = model.plan(device='cuda:3', n_gpu_layers=n, memory=10**9).stats\n"
        "    print(stats.gpu, stats.n_gpu_layers, stats.gpu_head, stats.bytes_gpu > 0)\n"
        "print(model.session().stats.gpu)\n"
        "try:\n"
        "    model.session(device='cuda')\n"
        "except pykvq.DeviceError as error:\n"
        "    print(error)\n"
    )
    assert elsewhere(program, path, KVQ_LIBCUDA="/no/such/libcuda.so") == [
        "3 4 True True",
        "3 2 False True",
        "None",
        "There is no CUDA driver: /no/such/libcuda.so: cannot open shared object file: No such file"
        " or directory.",
    ]


# ---- what the device has, and what it takes ------------------------------------------------------


def test_a_device_that_is_not_there_is_an_error(gpu: StandIn, model: Model) -> None:
    with pytest.raises(ValueError, match=r"CUDA device 1 does not exist; there is 1\."):
        model.session(device="cuda:1")


def test_what_only_the_cpu_does_is_refused_or_goes_there(gpu: StandIn, model: Model) -> None:
    with pytest.raises(UnsupportedError, match="kv_topk works on the CPU only; the device is cuda"):
        model.session(device="cuda", kv_topk=64)
    with model.session(kv_topk=64) as session:
        assert session.stats.gpu is None
    with model.session(kv="f16", device="cuda", n_gpu_layers=1) as session:
        expected = "simulated on the CPU; this session has 1 layers on CUDA device 0"
        with pytest.raises(UnsupportedError, match=expected):
            session.simulate(lambda *_: None)


def test_auto_takes_the_device_unless_no_layer_is_wanted_there(gpu: StandIn, model: Model) -> None:
    for n, expected in ((None, (0, 4)), (2, (0, 2)), (0, (None, 0))):
        with model.session(n_gpu_layers=n) as session:
            assert (session.stats.gpu, session.stats.n_gpu_layers) == expected


def test_a_full_context_has_the_bytes_that_were_planned(gpu: StandIn, model: Model) -> None:
    for n in (None, 2):
        free = gpu.device.bytes_free
        planned = model.plan(device="cuda", n_gpu_layers=n).stats
        with model.session(device="cuda", n_gpu_layers=n) as session:
            at_first = session.stats.bytes_gpu_now
            assert session.stats.bytes_gpu == planned.bytes_gpu > at_first
            session.eval(TOKENS[:250])
            session.fill(506)
            assert session.stats.bytes_gpu_now == free - gpu.device.bytes_free
            assert session.stats.bytes_gpu_now <= planned.bytes_gpu
            # but for the space between tensors, this is all of it
            assert session.stats.bytes_gpu_now == pytest.approx(planned.bytes_gpu, rel=0.01)
        assert gpu.device.bytes_free == free


@pytest.mark.parametrize("first_closed", [0, 1])
def test_sessions_share_the_weights_of_a_model(
    gpu: StandIn, model: Model, first_closed: int
) -> None:
    free = gpu.device.bytes_free
    sessions = [model.session(device="cuda")]
    alone = free - gpu.device.bytes_free
    gpu.set(MEMORY=(4 << 30) - 1)  # as always, but counts calls from 0
    sessions.append(model.session(device="cuda"))
    both = free - gpu.device.bytes_free - 1
    weights = sum(t.n_bytes for t in model.tensors if "token_embd" not in t.name)
    assert 2 * alone - both == pytest.approx(weights, rel=0.02)
    expected = sessions[0].eval(TOKENS[:20])
    sessions.pop(first_closed).close()
    assert np.array_equal(sessions[0].eval(TOKENS[:20])[0], expected[0]) == (first_closed == 0)
    sessions[0].close()


def test_weights_that_are_there_already_need_no_memory(gpu: StandIn, model: Model) -> None:
    with model.session(device="cuda") as first:
        taken = first.stats.bytes_gpu
        weights = sum(t.n_bytes for t in model.tensors)
        gpu.set(MEMORY=2 * taken - weights // 2)
        with model.session(device="cuda") as second:
            assert second.stats.n_gpu_layers == 4
            assert second.eval(TOKENS[:200]).shape == (1, 257)


def test_sessions_share_the_context_and_the_kernels(gpu: StandIn, path: Path) -> None:
    n, n_modules = 4, len(list(KERNELS.glob("*.cu")))
    together = threading.Barrier(n)
    errors: list[BaseException] = []

    def use() -> None:
        try:
            with Model(path, kv="skvq", n_ctx=512, n_threads=1) as model:
                together.wait(60)
                with model.session(device="cuda") as session:
                    session.eval(TOKENS[:20])
                    together.wait(60)
        except BaseException as error:
            errors.append(error)

    gpu.set()
    threads = [threading.Thread(target=use) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert gpu.calls("cuDevicePrimaryCtxRetain") == gpu.calls("cuDevicePrimaryCtxRelease_v2") == 1
    assert gpu.calls("cuModuleLoadData") == gpu.calls("cuModuleUnload") == n_modules


def test_memory_that_is_the_hosts_has_room_for_both_parts(gpu: StandIn, model: Model) -> None:
    planned = model.plan(device="cuda").stats
    both = planned.bytes_gpu + planned.bytes_host
    gpu.set(MEMORY=both, INTEGRATED=1)
    assert gpu.device.integrated
    with model.session(device="cuda") as session:
        assert session.stats.bytes_gpu + session.stats.bytes_host == both
    gpu.set(MEMORY=both - 1, INTEGRATED=1)
    expected = r"for the CPU, whose memory it is, 0\.\d\d\), but only 0\.\d\d GB are free there"
    with pytest.raises(MemoryLimitError, match=expected):
        model.session(device="cuda")
    gpu.set(MEMORY=both - 1)
    model.session(device="cuda").close()


def test_shared_weights_are_not_among_what_is_too_much(gpu: StandIn, model: Model) -> None:
    with model.session(device="cuda") as first:
        gpu.set(MEMORY=first.stats.bytes_gpu)
        expected = r"needs 0\.\d\d GB on CUDA device 0 \(weights shared with another session, KV"
        with pytest.raises(MemoryLimitError, match=expected):
            model.session(device="cuda", n_ctx=200_000)


def test_chunks_are_whole_pages_of_the_driver(gpu: StandIn, wide: Model) -> None:
    planned = wide.plan(kv="skvq", n_ctx=1_000_000, device="cuda").stats
    chunk = planned.bytes_gpu_chunk
    assert chunk % (2 << 20) == 0
    assert 16 << 20 <= chunk <= 34 << 20
    assert planned.bytes_gpu_sealed % chunk == 0
    with wide.session(kv="skvq", n_ctx=1_000_000, device="cuda") as session:
        before = gpu.device.bytes_free
        session.eval(TOKENS[:250], "none")
        assert session.stats.n_tokens_sealed > 0
        assert before - gpu.device.bytes_free == chunk


def test_sessions_with_other_layers_have_weights_of_their_own(gpu: StandIn, model: Model) -> None:
    expected = {}
    for n in (None, 4, 2):
        with model.session(device="cuda", n_gpu_layers=n) as session:
            expected[n] = session.eval(TOKENS[:20])
    sessions = {n: model.session(device="cuda", n_gpu_layers=n) for n in (None, 4, 2)}
    for n, session in sessions.items():
        assert np.array_equal(session.eval(TOKENS[:20]), expected[n])
    for session in sessions.values():
        session.close()


def test_what_does_not_fit_is_refused_with_advice_that_is_right(gpu: StandIn, model: Model) -> None:
    needed = {n: model.plan(device="cuda", n_gpu_layers=n).stats.bytes_gpu for n in range(1, 6)}
    for fits in range(1, ALL):
        memory = (needed[fits] + needed[fits + 1]) // 2
        by_itself = max((n for n in needed if needed[n] <= memory * 15 / 16), default=0)
        gpu.set(MEMORY=memory)
        with pytest.raises(MemoryLimitError, match="are free there") as error:
            model.session(device="cuda")
        advice = re.search(r"; (\d+) of its layers would fit \(n_gpu_layers\)", str(error.value))
        assert advice is not None
        assert int(advice[1]) == fits
        with model.session(device="cuda", n_gpu_layers=fits) as session:
            session.eval(TOKENS[:200], "none")
        with model.session(device="auto") as session:
            stats = session.stats
            assert stats.n_gpu_layers + stats.gpu_head == by_itself
        with pytest.raises(MemoryLimitError):
            model.session(device="auto", n_gpu_layers=fits + 1)
    gpu.set(MEMORY=needed[1] // 2)
    with pytest.raises(MemoryLimitError, match="no smaller number of layers would fit"):
        model.session(device="cuda")
    with model.session(device="auto") as session:
        assert session.stats.gpu is None


def test_a_context_grows_as_far_as_memory_goes_and_the_session_goes_on(
    gpu: StandIn, wide: Model
) -> None:
    options: dict[str, Any] = {"n_ctx": 22_500, "device": "cuda"}
    with wide.session(**options) as session:
        session.eval(TOKENS[:130])
        one_chunk = session.stats.bytes_gpu_now
    gpu.set(MEMORY=one_chunk + 1000)
    with wide.session(memory_check=False, **options) as session:
        session.eval(TOKENS[:130])
        expected = "The context cannot grow beyond about 16384 tokens: cuMemAlloc of 0.03 GB"
        with pytest.raises(MemoryLimitError, match=expected):
            session.fill(130 + 64 * 300)
        assert session.n_tokens == 130
        after = session.eval([7])[0]
        session.fill(131 + 64 * 200)
        gpu.set()
        session.fill(131 + 64 * 300)
        session.truncate(128)
        again = session.eval([*TOKENS[128:130], 7])[0]
        assert np.allclose(again, after, atol=0.02)


@pytest.mark.parametrize("n_sealed", [3, 4])
def test_blocks_repeat_in_few_copies_across_chunks(
    gpu: StandIn, wide: Model, n_sealed: int
) -> None:
    n, chunk, filled = 64 * n_sealed, 256, 650  # with 3 chunks would repeat from 768 blocks on
    with wide.session(n_ctx=42_000, kv_sinks=0, kv_window=0, device="cuda") as session:
        session.eval(TOKENS[:n], "none")
        assert session.stats.n_tokens_sealed == n
        gpu.set()
        session.fill(64 * filled)
        copies = gpu.calls("cuMemcpyDtoDAsync_v2")
        assert copies <= 12 * 2 * 2  # of 2 layers, 2 sides

        def block(layer: int, side: Literal["k", "v"], i: int) -> bytes:
            return session.sealed_block(layer, 0, side, i).tobytes()

        around = [i + at for i in range(-2, 3) for at in (8, chunk, 2 * chunk, filled - 3)]
        sides: tuple[Literal["k", "v"], ...] = ("k", "v")
        for layer, side in itertools.product((0, 1), sides):
            first = [block(layer, side, i) for i in range(n_sealed)]
            assert len(set(first)) == n_sealed
            for i in around:
                assert block(layer, side, i) == first[i % n_sealed], (layer, side, i)


def test_an_exception_while_weights_go_up_stops_that_and_comes_out(
    gpu: StandIn, model: Model
) -> None:
    told: list[tuple[str, int, int]] = []

    class Stop(BaseException):
        pass

    def progress(what: str, done: int, total: int) -> None:
        told.append((what, done, total))
        raise Stop

    with pytest.raises(Stop):
        model.session(device="cuda", progress=progress)
    assert len(told) == 1  # of many tensors
    assert told[0][0] == "weights to the GPU (MiB)"
    with model.session(device="cuda", progress=lambda *now: told.append(now)) as session:
        assert len(told) > 20
        assert session.eval(TOKENS[:5]).shape == (1, 257)


# ---- stopping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_gpu_layers", [2, None])
def test_a_cancelled_prompt_keeps_whole_passes_and_goes_on(
    gpu: StandIn, model: Model, n_gpu_layers: int | None
) -> None:
    options: dict[str, Any] = {"device": "cuda", "n_gpu_layers": n_gpu_layers, "n_batch": 50}
    with model.session(**options) as session:
        expected = session.eval(TOKENS[:300])
    with model.session(**options) as session:

        def stop(_what: str, done: int, _total: int) -> None:
            if done == 200:
                session.cancel()

        with pytest.raises(Cancelled):
            session.eval(TOKENS[:300], progress=stop)
        assert session.n_tokens == 200
        assert np.array_equal(session.eval(TOKENS[200:300]), expected)


def test_a_session_that_is_used_by_many_threads_in_turn_says_the_same(
    gpu: StandIn, model: Model
) -> None:
    with model.session(device="cuda") as session:
        expected = [session.eval(TOKENS[:20])[0], *(session.eval([t])[0] for t in TOKENS[20:23])]
    found: list[Any] = []
    with model.session(device="cuda") as session:
        for tokens in (TOKENS[:20], *([t] for t in TOKENS[20:23])):
            thread = threading.Thread(target=lambda t=tokens: found.append(session.eval(t)[0]))
            thread.start()
            thread.join()
    assert np.array_equal(found, expected)


def test_text_is_generated_on_the_device(gpu: StandIn, model: Model) -> None:
    with model.session(device="cuda") as session:
        first = session.generate("and the", 8, temp=0)
        again = session.generate("and the", 8, temp=0, reuse=False)
    assert first.text == again.text
    assert len(first.tokens) == 8


def test_a_driver_that_is_too_old_for_the_kernels_is_told(path: Path) -> None:
    library = os.environ.get("KVQ_LIBCUDA", "")
    if not os.path.isfile(library):
        pytest.skip("KVQ_LIBCUDA names no stand-in for the CUDA driver: `make cuda-python` does")
    program = (
        "print(model.session().stats.gpu)\n"
        "try:\n"
        "    model.session(device='cuda')\n"
        "except pykvq.DeviceError as error:\n"
        "    print(error)\n"
    )
    nothing, why = elsewhere(program, path, FAKECUDA_VERSION="11040")
    assert nothing == "None"
    assert why.startswith("The CUDA driver 11.4 is older than")


def test_a_forked_process_cannot_have_the_driver_of_the_other(gpu: StandIn, model: Model) -> None:
    model.session(device="cuda").close()
    end, start = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            model.session(device="cuda")
        except DeviceError as error:
            os.write(start, str(error).encode())
        finally:
            os._exit(0)
    os.close(start)
    os.waitpid(child, 0)
    with os.fdopen(end) as pipe:
        assert "before this process was forked" in pipe.read()
