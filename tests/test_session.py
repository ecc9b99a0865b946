"""Session: evaluation, the timeline, threads, cancelling, Ctrl-C, and the sealed cache."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import is_exact, require_same, row_distances
from stand_in import is_stand_in

import pykvq
from pykvq import Cancelled, ContextError, KvqError, Model, interruptible, native
from pykvq.session import FloatArray, Session

ROOT = Path(pykvq.__file__).parents[1]
SCHEMES = ("f16", "q8_0", "skvq")


def n_processors() -> int:
    """Processors that this process may use, on Linux; elsewhere all."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def one_by_one(session: Session, tokens: list[int]) -> FloatArray:
    return np.concatenate([session.eval([token]) for token in tokens])


# ---- evaluation -----------------------------------------------------------------------------


def test_eval_returns_the_logits_asked_for(tiny: Model, random_tokens: list[int]) -> None:
    tokens = random_tokens[:20]
    with tiny.session() as session:
        every = session.eval(tokens, logits="all")
        session.reset()
        last = session.eval(np.array(tokens, np.int64))
        session.reset()
        none = session.eval(tuple(tokens), logits="none")
        require_same(session, every[-1:], last)
    assert (every.shape, last.shape, none.shape) == ((20, 269), (1, 269), (0, 269))
    assert every.dtype == last.dtype == np.float32
    assert np.isfinite(every).all()
    assert len(np.unique(every.argmax(axis=1))) > 5


def test_eval_writes_into_the_array_that_is_given(tiny: Model) -> None:
    out = np.full((3, 269), np.nan, np.float32)
    with tiny.session() as session:
        assert session.eval([1, 2, 3], "all", out=out) is out
        assert np.isfinite(out).all()
        for wrong in (np.empty((2, 269), np.float32), np.empty((3, 269)), out.T):
            with pytest.raises(ValueError, match="expected C-contiguous"):
                session.eval([1, 2, 3], "all", out=wrong)
        assert session.n_tokens == 3


# q8_0 has no form for the qwen2's heads, which are 16 wide (test_model.py checks that it says so).
@pytest.mark.parametrize(
    ("architecture", "kv"),
    [*(("llama", kv) for kv in SCHEMES), ("qwen2", "f16"), ("qwen2", "skvq")],
)
def test_passes_up_to_the_next_seal_equal_token_by_token(
    kv: str,
    architecture: str,
    tiny: Model,
    tiny_qwen2: Model,
    random_tokens: list[int],
) -> None:
    model = tiny if architecture == "llama" else tiny_qwen2
    tokens = random_tokens[:240]

    def in_runs(session: Session) -> FloatArray:
        runs = []
        while session.n_tokens < len(tokens):
            at = session.n_tokens
            runs.append(session.eval(tokens[at : at + session.until_seal], "all"))
        assert len(runs) < 10
        return np.concatenate(runs)

    with model.session(kv=kv, n_ctx=240, kv_window=40) as session:
        expected = one_by_one(session, tokens)
        first_sealed = session.stats.sinks + 40 + 64
        sealed = session.stats.n_tokens_sealed
        session.reset()
        found = in_runs(session)
        assert session.stats.n_tokens_sealed == sealed > 64
        exact = is_exact(session)
        unsealed = first_sealed if kv != "f16" and not exact else len(tokens)
        require_same(session, found[:unsealed], expected[:unsealed])
    if not exact and kv != "f16":
        # What differs by rounding can lie between two codes, and then differs by more, though by
        # far less than by what sealing itself loses.
        with model.session(kv="f16", n_ctx=240) as lossless:
            loss = row_distances(in_runs(lossless), expected)[unsealed:].mean()
        assert row_distances(found, expected)[unsealed:].mean() < 0.006 + loss / 8


@pytest.mark.parametrize("kv", SCHEMES)
def test_result_does_not_depend_on_the_number_of_threads(
    kv: str, tiny: Model, random_tokens: list[int]
) -> None:
    results = []
    for n_threads in (1, 2, 3):
        with tiny.session(kv=kv, n_threads=n_threads) as session:
            assert session.stats.n_threads == min(n_threads, n_processors())
            prompt = session.eval(random_tokens[:220], "all")
            results.append(np.concatenate([prompt, one_by_one(session, random_tokens[220:230])]))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_a_long_call_is_cut_into_passes_that_report_progress(
    tiny: Model, random_tokens: list[int]
) -> None:
    told: list[tuple[str, int, int]] = []
    with tiny.session(n_batch=64) as session:
        session.eval(random_tokens[:200], progress=lambda *at: told.append(at))
        assert told == [("prompt", done, 200) for done in (64, 128, 192, 200)]
        told.clear()
        session.eval([1, 2, 3], progress=lambda *at: told.append(at))
        assert told == []


def test_stories260k_writes_its_reference_tokens(stories_model: Model, data_dir: Path) -> None:
    lines = (data_dir / "models" / "stories260K.greedy.txt").read_text().splitlines()
    expected = [int(i) for i in lines[0].removeprefix("ids:").split()]
    if is_stand_in():
        expected = expected[:60]  # it takes a second for 50 tokens
    with stories_model.session(kv="f16") as session:
        tokens = expected[:1]
        while len(tokens) < len(expected):
            tokens.append(int(session.eval(tokens[-1:]).argmax()))
        assert tokens == expected
        result = session.generate(
            expected[:1], len(expected) - 1, temperature=0.0, reuse=False, stop=()
        )
    assert result.tokens == expected[1:]


# ---- the timeline ---------------------------------------------------------------------------


def test_stats_are_consistent(tiny: Model, random_tokens: list[int]) -> None:
    with tiny.session(kv="skvq", n_ctx=512, n_batch=100) as session:
        empty = session.stats
        session.eval(random_tokens[:300])
        stats = session.stats
    assert stats.bytes_kv == stats.bytes_sinks + stats.bytes_sealed + stats.bytes_recent
    assert stats.bytes_kv == empty.bytes_kv
    assert (empty.n_tokens, stats.n_tokens, stats.n_evaluated) == (0, 300, 300)
    assert (stats.n_ctx, stats.n_batch, stats.n_threads) == (512, 100, 2)
    # 300 tokens but for 5 sinks; a block of 64 is sealed once 128 have followed it.
    assert stats.n_tokens_sealed == (300 - 5 - 128) // 64 * 64
    n_elements = 2 * 2 * 2 * 64 * 512  # sides, layers, KV heads, width, tokens
    assert stats.bits_full == pytest.approx(8 * stats.bytes_kv / n_elements)
    assert stats.bits_sealed == (stats.bits_sealed_k + stats.bits_sealed_v) / 2
    assert stats.seconds_evaluated > 0
    assert stats.isa == native.isa_selected()


def test_evaluating_allocates_nothing(tiny: Model, random_tokens: list[int]) -> None:
    with tiny.session(kv="skvq") as session:
        before = native.alloc_calls()
        session.eval(random_tokens[:400], "all")
        one_by_one(session, random_tokens[400:430])
        session.truncate(100)
        session.eval(random_tokens[:50])
        assert native.alloc_calls() == before
    with tiny.session():
        assert native.alloc_calls() > before


def test_truncating_and_going_on_repeats_the_logits(tiny: Model, random_tokens: list[int]) -> None:
    tokens = random_tokens[:90]
    with tiny.session(kv="skvq") as session:
        first = one_by_one(session, tokens)
        session.truncate(60)  # nothing is sealed yet, so nothing was lost
        assert session.n_tokens == 60
        assert session.tokens == tokens[:60]
        np.testing.assert_array_equal(one_by_one(session, tokens[60:]), first[60:])
        session.reset()
        assert session.tokens == []
        np.testing.assert_array_equal(one_by_one(session, tokens), first)
        with pytest.raises(ValueError, match="holds 90 tokens and cannot be truncated to 91"):
            session.truncate(91)


def test_sealing_costs_what_f16_keeps(tiny: Model, random_tokens: list[int]) -> None:
    n, tokens = 200, random_tokens[:500]
    with tiny.session(kv="f16", n_batch=n) as exact, tiny.session(kv="skvq", n_batch=n) as lossy:
        want, got = exact.eval(tokens, "all"), lossy.eval(tokens, "all")
    error = np.abs(want - got).mean(axis=1)
    assert error[n:].mean() > 3 * error[:n].mean()  # the first pass sees itself in f16


def test_flipping_a_code_in_a_sealed_block_changes_the_logits(
    tiny: Model, random_tokens: list[int]
) -> None:
    with tiny.session(kv="skvq") as session:
        session.eval(random_tokens[:400])
        before = session.eval([7])
        for side in ("k", "v"):
            block = session.sealed_block(1, 0, side, 2)  # type: ignore[arg-type]
            middle = block.size // 2
            saved = block[middle]
            block[middle] ^= 0xFF
            session.truncate(400)
            assert not np.array_equal(session.eval([7]), before), side
            session.sealed_block(1, 0, side, 2)[middle] = saved  # type: ignore[arg-type]
            session.truncate(400)
            np.testing.assert_array_equal(session.eval([7]), before)


def test_sealed_block_has_the_size_that_the_bits_say(tiny: Model, random_tokens: list[int]) -> None:
    with tiny.session(kv="skvq") as session:
        session.eval(random_tokens[:300])
        stats = session.stats
        keys, values = (session.sealed_block(0, 1, side, 0) for side in ("k", "v"))  # type: ignore[arg-type]
        assert keys.size * 8 == pytest.approx(stats.bits_sealed_k * 64 * 64)
        assert values.size * 8 == pytest.approx(stats.bits_sealed_v * 64 * 64)
        n_sealed = stats.n_tokens_sealed // 64
        for wrong in ((2, 0, "k", 0), (0, 2, "k", 0), (0, 0, "v", n_sealed), (-1, 0, "k", 0)):
            with pytest.raises(ValueError, match="no sealed block"):
                session.sealed_block(*wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="expected 'k' or 'v'"):
            session.sealed_block(0, 0, "q", 0)  # type: ignore[arg-type]


# ---- refusals -------------------------------------------------------------------------------


def test_tokens_that_are_none_are_refused_and_nothing_is_evaluated(tiny: Model) -> None:
    with tiny.session() as session:
        for wrong, message in (
            ([], "expected .n. with n at least 1"),
            ([[1, 2]], "expected .n. with n at least 1"),
            ([1.5], "expected whole numbers"),
            ([True], "expected whole numbers"),
            ([1, 269], "Token 1 of 2 has the id 269, expected 0 to 268"),
            ([-1], "has the id -1"),
            ([2**40], "has the id"),
        ):
            with pytest.raises(ValueError, match=message):
                session.eval(wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="logits is 'some'"):
            session.eval([1], "some")  # type: ignore[arg-type]
        assert session.n_tokens == 0


def test_truncating_to_no_whole_number_is_refused(tiny: Model) -> None:
    with tiny.session(n_ctx=50) as session:
        session.eval([1, 2, 3])
        for wrong in ("a", 1.5, None, -1, 2**40):
            message = f"n is {wrong!r}, expected a whole number from 0 to 50"
            with pytest.raises(ValueError, match=message):
                session.truncate(wrong)  # type: ignore[arg-type]
        assert session.n_tokens == 3


def test_full_context_is_refused_and_nothing_is_evaluated(tiny: Model) -> None:
    with tiny.session(n_ctx=50, n_batch=8) as session:
        session.eval([1] * 40)
        with pytest.raises(ContextError, match="holds 40 of 50 tokens, and 11 more"):
            session.eval([1] * 11)
        assert session.n_tokens == 40
        session.eval([1] * 10)
        assert session.n_tokens == 50


# ---- threads --------------------------------------------------------------------------------


def test_two_sessions_in_two_threads_give_what_each_gives_alone(
    tiny: Model, random_tokens: list[int]
) -> None:
    halves = (random_tokens[:300], random_tokens[500:800])

    def work(tokens: list[int]) -> FloatArray:
        with tiny.session(kv="skvq") as session:
            return np.concatenate(
                [session.eval(tokens[:280], "all"), one_by_one(session, tokens[280:])]
            )

    alone = [work(tokens) for tokens in halves]
    together: list[FloatArray | None] = [None, None]

    def run(i: int) -> None:
        together[i] = work(halves[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, expected in zip(together, alone, strict=True):
        assert got is not None
        np.testing.assert_array_equal(got, expected)


@pytest.fixture
def busy(tiny: Model) -> Session:
    """A session with a context that takes many seconds to fill."""
    return tiny.session(kv="f16", n_ctx=40_000, n_batch=256)


LONG = [1] * 39_000


def in_background(session: Session) -> tuple[threading.Thread, list[BaseException]]:
    """Starts a long evaluation in another thread; returns once its first pass is done."""
    errors: list[BaseException] = []
    started = threading.Event()

    def work() -> None:
        try:
            session.eval(LONG, progress=lambda *_: started.set())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert started.wait(30)
    return thread, errors


def test_using_a_session_from_two_threads_at_once_is_refused(busy: Session) -> None:
    thread, errors = in_background(busy)
    for attempt in (
        lambda: busy.eval([1]),
        lambda: busy.truncate(0),
        lambda: busy.generate([1, 2], 1),
    ):
        with pytest.raises(KvqError, match="in use by another thread"):
            attempt()
    assert busy.n_tokens > 0  # properties may be asked at any time
    assert busy.stats.n_tokens % 256 == 0
    busy.cancel()
    thread.join(30)
    assert [type(error) for error in errors] == [Cancelled]


def test_cancel_stops_an_evaluation_and_leaves_the_session_usable(busy: Session) -> None:
    thread, errors = in_background(busy)
    start = time.perf_counter()
    busy.cancel()
    thread.join(30)
    assert time.perf_counter() - start < 2
    assert [type(error) for error in errors] == [Cancelled]
    held = busy.n_tokens
    assert 0 < held < len(LONG)
    assert held % 256 == 0
    assert f"after {held} of {len(LONG)} tokens" in str(errors[0])
    assert busy.tokens == [1] * held
    busy.eval([1, 2])
    assert busy.tokens == [1] * held + [1, 2]
    busy.close()


def test_cancel_without_anything_running_does_nothing(
    tiny: Model, random_tokens: list[int]
) -> None:
    with tiny.session() as session:
        expected = session.eval(random_tokens[:100])
        session.reset()
        session.cancel()
        np.testing.assert_array_equal(session.eval(random_tokens[:100]), expected)
        session.cancel()
        assert session.generate(random_tokens[:100], 3).finish_reason == "length"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_session_refuses_to_work_in_a_forked_process(tiny_path: Path) -> None:
    code = f"""
        import os, sys
        from pykvq import KvqError, Model
        model = Model({str(tiny_path)!r}, n_threads=2)
        session = model.session()
        session.eval([1])
        pid = os.fork()
        if pid == 0:
            try:
                session.eval([2])
            except KvqError as error:
                ok = "forked" in str(error)
            session.close()
            with model.session() as own:
                own.eval([1, 2])
            os._exit(0 if ok else 1)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], cwd=ROOT, timeout=60
    )
    assert done.returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_forked_process_can_close_what_a_thread_of_the_other_uses(tiny_path: Path) -> None:
    code = f"""
        import os, signal, sys, threading, time
        from pykvq import Model
        model = Model({str(tiny_path)!r}, n_threads=1, device="cpu")
        session = model.session(n_ctx=100000)
        threading.Thread(target=session.eval, args=([1] * 99999, "none"), daemon=True).start()
        while not session._handle._lock.locked():
            time.sleep(0.001)
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            session.close()
            os._exit(0 if session.closed else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        session.cancel()
        os._exit(code)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], cwd=ROOT, timeout=60
    )
    assert done.returncode == 0


# ---- Ctrl-C ---------------------------------------------------------------------------------


def interrupt_after(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_ctrl_c_stops_a_prompt_and_leaves_the_session_usable(busy: Session) -> None:
    busy.eval([1, 2, 3])
    timer = interrupt_after(0.5)
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        busy.eval(LONG)
    assert 0.4 < time.perf_counter() - start < 2.5
    timer.join()
    held = busy.n_tokens
    assert 3 < held < len(LONG)
    assert busy.stats.n_tokens == held
    assert busy.tokens == [1, 2, 3, *LONG][:held]
    assert busy.eval([5, 6]).shape == (1, 269)
    assert busy.n_tokens == held + 2
    busy.close()


def test_ctrl_c_stops_a_stream_and_leaves_the_session_usable(tiny: Model) -> None:
    with tiny.session(n_ctx=1_000_000) as session:
        stream = session.generate([1, 2, 3], ignore_eos=True, stream=True)
        timer = interrupt_after(0.3)
        with pytest.raises(KeyboardInterrupt):
            for _ in stream:
                pass
        timer.join()
        stream.close()
        result = stream.result
        assert result.finish_reason == "cancelled"
        held = session.tokens
        # The last token may have been chosen and not evaluated.
        assert held in ([1, 2, 3, *result.tokens], [1, 2, 3, *result.tokens[:-1]])
        assert session.generate([*held, 4], 2).stats.n_reused == len(held)


def test_ctrl_c_ends_a_process_that_does_not_catch_it(tiny_path: Path) -> None:
    code = f"""
        from pykvq import Model
        session = Model({str(tiny_path)!r}).session(kv="f16", n_ctx=40_000)
        print("ready", flush=True)
        session.eval([1] * 39_000)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        start = time.perf_counter()
        _, errors = process.communicate(timeout=30)
    assert time.perf_counter() - start < 2.5
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_exception_of_a_signal_handler_waits_for_the_call(busy: Session) -> None:
    class AlarmError(Exception):
        pass

    def ring(*_: object) -> None:
        raise AlarmError

    before = signal.signal(signal.SIGUSR1, ring)
    try:
        timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        timer.start()
        with pytest.raises(AlarmError):
            busy.eval(LONG)
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    busy.reset()
    assert busy.eval([1]).shape == (1, 269)


def test_many_signals_during_one_call_end_it_once() -> None:
    ended: list[bool] = []
    cancelled = threading.Event()

    def work() -> None:
        cancelled.wait(10)
        for _ in range(20):  # from within: none is left to hit another test, however slow this is
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        ended.append(cancelled.is_set())

    timer = interrupt_after(0.1)
    with pytest.raises(KeyboardInterrupt):
        interruptible.call(work, cancelled.set)
    assert ended == [True]
    timer.join()


def test_call_passes_exceptions_on_and_works_in_any_thread() -> None:
    seen: list[str] = []

    def fail() -> None:
        seen.append(threading.current_thread().name)
        raise LookupError("as expected")

    def attempt() -> None:
        with pytest.raises(LookupError, match="as expected"):
            interruptible.call(fail, lambda: None)

    attempt()
    thread = threading.Thread(target=attempt, name="other")
    thread.start()
    thread.join()
    assert seen == ["pykvq-helper", "other"]


def processors_of_threads() -> dict[str, set[int]]:
    """The processors that each thread of this process may use."""
    ids = os.listdir("/proc/self/task")
    return {name: os.sched_getaffinity(int(name)) for name in ids}


@pytest.mark.skipif(sys.platform != "linux", reason="threads are pinned on Linux alone")
@pytest.mark.skipif(n_processors() == 1, reason="one processor leaves no choice")
def test_pinned_threads_stay_on_one_processor_each(tiny: Model, random_tokens: list[int]) -> None:
    with tiny.session(n_threads=2) as free:
        expected = free.eval(random_tokens[:40])
    before = processors_of_threads()
    with tiny.session(n_threads=2, pin_threads=True) as pinned:
        np.testing.assert_array_equal(pinned.eval(random_tokens[:40]), expected)
        after = processors_of_threads()
        [worker] = after.keys() - before.keys()
        assert len(after.pop(worker)) == 1
        assert after == {name: before[name] for name in after}
