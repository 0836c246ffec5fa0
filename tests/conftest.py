import signal

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what runs in its background with interrupts ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Tests run side by side, one a core: threads beside them would wait for each other.
    torch.set_num_threads(1)
    # Torch's own forward mode compiles its formulas with what it has deprecated itself.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script:DeprecationWarning")


@pytest.fixture(autouse=True)
def fixed_random_stream() -> None:
    """Every test starts at the same place of torch's random stream."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)
