"""Agreement, time in turn, and the memory of each alternative in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from statistics import median

import torch

from bench.blocks.problems import problem
from bench.blocks.questions import QUESTIONS, Question
from bench.interleaved import Ratio, Turns, ratio
from bench.resident import peak_above

_SECONDS = 2.0
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Cell:
    """One question about one net.

    Attributes:
        day: of the measurement.
        unasked: why there are no numbers, or nothing.
        errors: relative to the other library in float64, by what is compared; or why there is
            none.
        rounds: how often each alternative was timed.
        ratios: time / that of the other library, by the way of ours.
        seconds: the median over rounds, by alternative; noise on a shared machine.
        bytes: the peak of memory above what was there before, by alternative.
    """

    day: str
    unasked: str
    errors: Mapping[str, float | str]
    rounds: int
    ratios: Mapping[str, Ratio]
    seconds: Mapping[str, float]
    bytes: Mapping[str, int]


def measure(name: str, question: Question, pool: ProcessPoolExecutor) -> Cell:
    """All numbers of one question about one net."""
    day = datetime.now(UTC).date().isoformat()
    if reason := question.unasked(name):
        return Cell(day, reason, {}, 0, {}, {}, {})
    turns = _timed(name, question)
    theirs = turns.seconds[question.peer]
    return Cell(
        day,
        "",
        question.errors(name),
        len(theirs),
        {way: ratio(turns.seconds[way], theirs) for way in question.ours},
        {which: median(seconds) for which, seconds in turns.seconds.items()},
        {
            which: pool.submit(_peak, name, QUESTIONS.index(question), which).result()
            for which in question.alternatives
        },
    )


def _timed(name: str, question: Question) -> Turns:
    case = problem(name, torch.float32)
    turns = Turns({which: work(case) for which, work in question.alternatives.items()})
    for call in turns.alternatives.values():
        call()
    end = time.perf_counter() + _SECONDS
    while len(turns.seconds[question.peer]) < _LEAST_ROUNDS or time.perf_counter() < end:
        turns.take()
    return turns


def processes() -> ProcessPoolExecutor:
    """Each task in a process of its own, which has done nothing but imports."""
    # Tensors that are freed go back to the system at once, and are not found again in the heap.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)


def _peak(name: str, number: int, which: str) -> int:
    """The peak of resident memory in one call, its result included, above what was there before.

    What a first call alone takes, such as modules that are imported then, is not counted.
    """
    torch.set_num_threads(1)
    work, case = QUESTIONS[number].alternatives[which], problem(name, torch.float32)
    work(case)()
    # Anew: some leave results at the model.
    call = work(case)
    return peak_above(call)
