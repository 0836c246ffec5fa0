"""What ranks hold beside what was planned, in processes that do nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from bench import planned
from bench.planned import ALLOCATOR, WIDTHS, Compared, Taken, compared
from tests.distributed.ranks import Forks, Ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def of_whole_pages() -> Iterator[Forks]:
    """Forks whose tensors are given back to the system."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in ALLOCATOR.items():
            patched.setenv(name, value)
        forks = Forks()
    yield forks
    forks.close()


def taken(width: int, algorithm: str) -> Taken:
    # Repeated eigenvalues do not matter here.
    warnings.simplefilter("ignore")
    return planned.taken(width, algorithm)


@pytest.mark.parametrize("algorithm", ["lanczos", "slq"])
def test_the_plan_of_two_ranks_is_within_20_percent(algorithm: str, of_whole_pages: Forks) -> None:
    processes = Ranks(2, of_whole_pages)
    of_ranks = processes.run(taken, WIDTHS[0], algorithm)
    processes.close()
    plan = planned.planned(WIDTHS[0], 2, algorithm, of_ranks[0].activations)
    found = Compared(algorithm, plan, of_ranks)
    assert found.counted == pytest.approx(1, abs=0.2)
    assert found.resident == pytest.approx(1, abs=0.2)


def test_what_kernels_take_for_themselves_is_planned() -> None:
    assert compared(WIDTHS[0], 1, "hutchinson").resident == pytest.approx(1, abs=0.2)
