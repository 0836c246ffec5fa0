from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks


def _ranks(size: int) -> Iterator[Ranks]:
    found = Ranks(size)
    yield found
    found.close()


@pytest.fixture(scope="session")
def two() -> Iterator[Ranks]:
    yield from _ranks(2)


@pytest.fixture(scope="session")
def three() -> Iterator[Ranks]:
    yield from _ranks(3)


@pytest.fixture(scope="session")
def four() -> Iterator[Ranks]:
    yield from _ranks(4)
