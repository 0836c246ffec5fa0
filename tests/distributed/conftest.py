from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Forks, Ranks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    found = Forks()
    yield found
    found.close()


def _ranks(size: int, forks: Forks) -> Iterator[Ranks]:
    found = Ranks(size, forks)
    yield found
    found.close()


@pytest.fixture(scope="session")
def two(forks: Forks) -> Iterator[Ranks]:
    yield from _ranks(2, forks)


@pytest.fixture(scope="session")
def three(forks: Forks) -> Iterator[Ranks]:
    yield from _ranks(3, forks)


@pytest.fixture(scope="session")
def four(forks: Forks) -> Iterator[Ranks]:
    yield from _ranks(4, forks)
