import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # Torch's own forward mode compiles its formulas with what it has deprecated itself.
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script:DeprecationWarning")


@pytest.fixture(autouse=True)
def fixed_random_stream() -> None:
    """Every test starts at the same place of torch's random stream."""
    torch.manual_seed(0)
