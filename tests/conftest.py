import gc
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Tests run side by side, one a core, and so do the processes that they start: threads beside them
# would wait for each other. Libraries read this when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.distributed.ranks import Forks, Ranks

MEMORY = Path("/dev/shm")
GIB = 2**30


def pytest_configure(config: pytest.Config) -> None:
    threads = os.environ["OMP_NUM_THREADS"]
    torch.set_num_threads(int(threads) if threads.isdigit() else 1)
    # A shell starts what runs in its background with interrupts ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Checkpoints are flushed to the disk at every write, where most of their tests' time would go.
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > GIB:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    # Torch's own forward mode compiles its formulas with what it has deprecated itself.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the garbage collector away from the modules and tests, which all live to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def fixed_random_stream() -> None:
    """Every test starts at the same place of torch's random stream."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """The process that forks ranks, one for all tests."""
    found = Forks()
    yield found
    found.close()


def _ranks(size: int, forks: Forks) -> Iterator[Ranks]:
    found = Ranks(size, forks)
    yield found
    found.close()


# Each process group of a rank polls in a thread of its own, so ranks last for a module.


@pytest.fixture(scope="module")
def two(forks: Forks) -> Iterator[Ranks]:
    yield from _ranks(2, forks)


@pytest.fixture(scope="module")
def three(forks: Forks) -> Iterator[Ranks]:
    yield from _ranks(3, forks)


@pytest.fixture(scope="module")
def four(forks: Forks) -> Iterator[Ranks]:
    yield from _ranks(4, forks)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright; both have to be installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on the path")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path)
        yield found
        found.close()
