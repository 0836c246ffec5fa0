"""Both numbers of one method on one matrix: products to reach the accuracy, and as shipped."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.accuracy.cases import Asked, Matrix
from bench.accuracy.questions import QUESTIONS, ExhaustedError, Method, Products

_SHARE = 0.9


@dataclass(frozen=True)
class Run:
    """One seed: the products taken, and the error; infinite where there is no answer."""

    products: int
    error: float
    failure: str | None = None


@dataclass(frozen=True)
class Cell:
    """One method on one matrix.

    Attributes:
        version: of the package.
        seeds: how many.
        limit: the products at which a run was given up.
        reach: products, the median over seeds; None where the accuracy is not reached by then.
        knob: the setting with which it is reached.
        shipped: the runs by the method's own rule, one a seed; None where it has none.
        never: the accuracy is not reached, and the method stops of itself far below the limit.
        unasked: why it was not asked what it takes to reach the accuracy.
    """

    version: str
    seeds: int
    limit: int
    reach: float | None
    knob: float | None
    shipped: list[Run] | None
    never: bool = False
    unasked: str | None = None

    @property
    def failure(self) -> str | None:
        """What the first run that broke down said."""
        return next((run.failure for run in self.shipped or [] if run.failure), None)


def measure(matrix: Matrix, method: Method, seeds: int, version: str) -> Cell:
    """Both numbers of one method on one matrix."""
    limit = _limit(matrix, method.asked)
    shipped = None
    if method.shipped is not None:
        shipped = [_run(matrix, method, seed) for seed in range(seeds)]
    if matrix.costly and not method.resumes:
        unasked = "each setting of its tolerance makes other products, and each takes long"
        return Cell(version, seeds, limit, None, None, shipped, unasked=unasked)
    reach, knob, most = _reached(matrix, method, seeds)
    never = reach is None and most < limit / 2
    return Cell(version, seeds, limit, reach, knob, shipped, never)


def _limit(matrix: Matrix, asked: Asked) -> int:
    return matrix.most_for_pairs if asked == "eigenpairs" else matrix.most


def _run(matrix: Matrix, method: Method, seed: int, knob: float | None = None) -> Run:
    """With a knob as told, without one as shipped."""
    products = Products(matrix, _limit(matrix, method.asked))
    try:
        if knob is not None:
            answer = method.told(products, knob, seed)
        else:
            assert method.shipped is not None
            answer = method.shipped(products, seed)
        error = QUESTIONS[method.asked].error(matrix, answer)
    except ExhaustedError:
        return Run(products.limit, math.inf)
    except Exception as broken:
        # A method that breaks down is a finding; it must not end the run of all others.
        message = f"{type(broken).__name__}: {' '.join(str(broken).split())}"
        return Run(products.count, math.inf, message)
    return Run(products.count, error if math.isfinite(error) else math.inf)


def _reached(matrix: Matrix, method: Method, seeds: int) -> tuple[float | None, float | None, int]:
    """The fewest products that reach the accuracy, with which knob, and the most of any try."""
    accuracy = QUESTIONS[method.asked].accuracy
    order = list(range(seeds))
    most = 0

    def passed(knob: float) -> float | None:
        """The median of products, where nine of ten seeds are within the accuracy."""
        nonlocal most
        counts, failed = [], 0
        for seed in list(order):
            found = _run(matrix, method, seed, knob)
            counts.append(found.products)
            most = max(most, found.products)
            if not found.error <= accuracy:
                failed += 1
                # The next setting is tried on the hardest seeds first: it may soon be done with.
                order.remove(seed)
                order.insert(0, seed)
            if failed > seeds - rank(seeds):
                return None
        return statistics.median(counts)

    if method.knobs is None:
        knobs: Sequence[float] = _budgets(_limit(matrix, method.asked))
        # Octaves first, and from the end of the first that will do backwards in finer steps.
        ends = [*range(3, len(knobs) - 1, 4), len(knobs) - 1]
    else:
        knobs = method.knobs
        ends = list(range(len(knobs)))
    start = 0
    for end in ends:
        best = passed(knobs[end]), knobs[end]
        if best[0] is not None:
            # Forwards, a budget that does by luck would be taken, and the next one would not do.
            for knob in reversed(knobs[start:end]):
                found = passed(knob)
                if found is None:
                    break
                best = found, knob
            return *best, most
        start = end + 1
    return None, None, most


def _budgets(limit: int) -> list[int]:
    """From 6 on, in steps of a fifth: multiples of 6, which halves and thirds divide."""
    found = [6]
    while (following := max(found[-1] + 6, 6 * round(0.2 * found[-1]))) <= limit:
        found.append(following)
    return found


def rank(seeds: int) -> int:
    """How many of the seeds have to be within the accuracy."""
    return math.ceil(_SHARE * seeds)
