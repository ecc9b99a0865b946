"""An evaluation: schemes, tasks and a record, put together.

    record = Record("out.json")
    with Model("smollm2") as model:
        evaluate(model, Text("wiki", text), ["skvq", "kivi-2"], record, Options(tasks=("kl",)))
    record.data["results"]["kl"]["skvq"]["mean_kld"]

The comparison follows one set of rules: the same reference logits for all schemes, the same sinks
and window unless each scheme's own are asked for, streaming order, and everything that is stored
counted in the bits.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pykvq import native
from pykvq.eval.lanes import cost, digest, find_lanes
from pykvq.eval.options import FLAGS, Options
from pykvq.eval.record import file_facts, text_facts
from pykvq.eval.streaming import few_chunks
from pykvq.eval.tasks import run_task
from pykvq.eval.tasks_generation import GenerationTask
from pykvq.eval.tasks_recall import NeedleTask, RetrievalTask
from pykvq.eval.tasks_text import ChunkedTask, KlTask
from pykvq.perplexity import REFERENCE

if TYPE_CHECKING:
    from pykvq.eval.lanes import Cost, Lane
    from pykvq.eval.record import Json, Record
    from pykvq.eval.tasks import Announce, Task
    from pykvq.model import Model, Progress
    from pykvq.moments import Moments
    from pykvq.session import IntArray


@dataclass(frozen=True)
class Text:
    """A text and what to call it.

    Attributes:
        name: Its name, in the record.
        text: The text.
    """

    name: str
    text: str


def _kl(model: Model, ids: IntArray, o: Options) -> Task:
    return KlTask(model, ids, n_ctx=o.n_ctx, chunks=o.chunks)


def _chunked(model: Model, ids: IntArray, o: Options) -> Task:
    return ChunkedTask(model, ids, n_ctx=o.n_ctx, chunks=o.chunks, n_batch=o.n_batch)


def _generation(model: Model, ids: IntArray, o: Options) -> Task:
    return GenerationTask(model, ids, prompts=o.prompts, n_prompt=o.n_prompt, n_tokens=o.n_tokens)


def _recall(kind: type[NeedleTask] | type[RetrievalTask]) -> _Make:
    def make(model: Model, ids: IntArray, o: Options) -> Task:
        return kind(
            model,
            ids,
            lengths=o.lengths,
            depths=o.depths,
            trials=o.trials,
            seed=o.seed,
            sealed_from=o.kv_sinks + o.kv_window,
        )

    return make


_Make = Callable[["Model", "IntArray", Options], "Task"]
#: Makes each task, by its name.
TASKS: Mapping[str, _Make] = {
    "kl": _kl,
    "chunked": _chunked,
    "generation": _generation,
    "needle": _recall(NeedleTask),
    "retrieval": _recall(RetrievalTask),
}


def evaluate(
    model: Model,
    text: Text,
    kv: Sequence[str],
    record: Record,
    options: Options | None = None,
    *,
    calibration: Text | None = None,
    command: str = "",
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> None:
    """Measures schemes on a text, as far as the record does not hold it yet.

    Args:
        model: The model.
        text: What the tasks are made from.
        kv: Names of schemes, of the core or simulated; f16 always takes part.
        record: Takes the results, and writes them as they come.
        options: How to evaluate.
        calibration: What schemes that need it are calibrated on; another text than `text`.
        command: What to state as the command that gives the results again.
        progress: Told how far each task is: (task, n_done, n) in tokens.
        announce: Told of each scheme that a task is finished with.

    Raises:
        RecordError: The record holds results under other settings.
        SchemeError: A scheme is not known.
        UnsupportedError: A scheme has no form for this model.
        ValueError: A scheme needs a calibration text and there is none, a text is too short, or
            an option is out of range.
    """
    o = options or Options()
    lanes = find_lanes(kv, o.kv_sinks, o.kv_window, own_setting=o.own_setting)
    costs = {lane.name: (cost(lane, model, o.n_ctx), cost(lane, model, o.at)) for lane in lanes}
    lacking = [lane.name for lane in lanes if lane.needs_moments and calibration is None]
    if lacking:
        raise ValueError(
            f"{_listed(lacking)} must be calibrated, but no text to calibrate on was given"
            " (--calibration-text)."
        )
    ids = np.array(model.tokenizer.encode(text.text), np.int32)
    tasks = [TASKS[name](model, ids, o) for name in dict.fromkeys(o.tasks)]
    for task in tasks:
        _require_sealing(task, lanes)
    few = [task for task in tasks if isinstance(task, KlTask) and len(task.units()) < o.chunks]
    if few:
        warnings.warn(few_chunks(len(few[0].units()), o.n_ctx, o.chunks), stacklevel=2)

    _bind(record, model, text, o, tasks)
    if calibration is not None and any(lane.needs_moments for lane in lanes):
        tokens = {"tokens": o.calibration_tokens}
        facts = {**text_facts(calibration.name, calibration.text), **tokens}
        record.bind("calibration", facts, _words("calibration text", tokens="--calibration-tokens"))
    record.begin_run(command)
    changed = [
        lane.name
        for lane in lanes
        if record.describe_scheme(lane.name, _scheme_facts(lane, model, *costs[lane.name]))
    ]
    if changed:
        warnings.warn(
            f"{_listed(changed)} would be sealed in another way now than when"
            f" {record.path or 'the record'} was made (another version or profile): what it holds"
            " of that does not count any more, and is measured anew.",
            stacklevel=2,
        )

    @functools.lru_cache(maxsize=1)
    def moments() -> Moments:
        from pykvq.moments import collect

        assert calibration is not None  # see above
        tokens = model.tokenizer.encode(calibration.text)[: o.calibration_tokens]
        return collect(model, tokens, progress=progress)

    for task in tasks:
        run_task(
            task,
            model,
            lanes,
            record,
            moments,
            n_threads=o.n_threads,
            progress=progress,
            announce=announce,
        )
    record.save()  # what schemes are, where no work was left


def _require_sealing(task: Task, lanes: Sequence[Lane]) -> None:
    """Requires that a task reads what schemes have sealed; warns where it does so under some only.

    Raises:
        ValueError: It reads nothing of it under any.
    """
    lossy = [lane for lane in lanes if lane.name != REFERENCE]
    unread = [lane for lane in lossy if task.sealed_share(lane.sinks, lane.window) == 0]
    if not unread:
        return
    kept = " or ".join(dict.fromkeys(f"{lane.sinks} + {lane.window}" for lane in unread))
    under = "any scheme" if unread == lossy else _listed([lane.name for lane in unread])
    sentence = (
        f"The task {task.name} reads no token from sealed blocks under {under}, with sinks + window"
        f" of {kept} tokens and blocks of {native.block_tokens()}"
    )
    if unread == lossy:
        raise ValueError(
            f"{sentence}: there is nothing to measure. It needs {task.remedy}, or fewer tokens in"
            " f16 (--kv-sinks, --kv-window)."
        )
    warnings.warn(f"{sentence}: its results there say nothing.", stacklevel=3)


def _words(what: str, **more: str) -> dict[str, str]:
    """What to call the facts about a file or a text."""
    facts = {"name": "named", "file": "in the file", "bytes": "of bytes", "sha256": "with SHA-256"}
    return {**{key: f"a {what} {word}" for key, word in facts.items()}, **more}


def _bind(record: Record, model: Model, text: Text, o: Options, tasks: Sequence[Task]) -> None:
    """Ties the record to everything that results depend on."""
    info = model.info
    record.bind("model", {"name": info.name, **file_facts(info.path)}, _words("model"))
    record.bind("text", text_facts(text.name, text.text), _words("text"))
    record.bind(
        "cache",
        {
            "kv_sinks": o.kv_sinks,
            "kv_window": o.kv_window,
            "own_setting": o.own_setting,
            "n_ctx": o.n_ctx,
            "at": o.at,
        },
        FLAGS,
    )
    for task in tasks:
        record.bind(task.name, task.settings(), FLAGS)


def _scheme_facts(lane: Lane, model: Model, c: Cost, at: Cost) -> Json:
    """What the record says about a scheme on this model, at its two contexts."""
    profile = model.profile_path if lane.profile else None
    return {
        "digest": digest(lane, model),
        "profile": None if profile is None else file_facts(profile),
        "summary": lane.summary,
        "source": lane.source,
        "simulated": lane.simulation is not None,
        "calibrated": lane.needs_moments,
        "sinks": lane.sinks,
        "window": lane.window,
        "bits_k": c.bits_k,
        "bits_v": c.bits_v,
        "bits_sealed": c.bits_sealed,
        "bytes_tables": c.bytes_tables,
        "bits_effective": c.bits_full,
        "bits_effective_at": at.bits_full,
        "bytes_at": at.bytes_total,
    }


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
