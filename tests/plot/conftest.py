from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hessfunc.algorithms.results import Density, Eigenpairs
from hessfunc.algorithms.results.landscape import Landscape
from hessfunc.recipes.landscape import landscape

plt = pytest.importorskip("matplotlib.pyplot")
plt.switch_backend("agg")

COST: dict[str, Any] = {"matvecs": 44, "passes": 22, "reason": "complete", "seed": 0}


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    # Tests elsewhere may have left figures open.
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture
def density() -> Density:
    """A bulk around 0 and one outlier at 5, from two probes; the second ended early."""
    bulk = torch.linspace(-0.5, 0.5, 20, dtype=torch.float64)
    nodes = torch.cat([bulk, torch.tensor([5.0, 5.0])])
    weights = torch.cat([torch.full((20,), 0.0495), torch.tensor([0.01, 0.0])]).double()
    return Density(
        nodes=torch.stack([nodes, nodes]), weights=torch.stack([weights, weights]), n=100, **COST
    )


@pytest.fixture
def pairs() -> Eigenpairs:
    return Eigenpairs(
        values=torch.tensor([5.0, -0.5], dtype=torch.float64),
        vectors={"x": torch.eye(2, 100)},
        residuals=torch.tensor([1e-3, 0.2], dtype=torch.float64),
        converged=torch.tensor([True, False]),
        largest=5.0,
        **COST,
    )


def bowl(steepness: float = 1.0, *, along: int, **options: Any) -> Landscape:
    """The landscape of 1 + steepness |x|^2, 5 points on the first axis and 3 on the second."""
    point = torch.zeros(2, dtype=torch.float64)
    at = [torch.linspace(-2, 2, 5), torch.linspace(-1, 1, 3)][:along]
    return landscape(
        lambda x, _: 1 + steepness * x.square().sum(),
        point,
        [torch.ones(1)],
        torch.eye(2).double()[:along],
        at=at,
        **options,
    )


@pytest.fixture
def line() -> Landscape:
    return bowl(along=1)


@pytest.fixture
def plane() -> Landscape:
    return bowl(along=2)


@pytest.fixture
def steep() -> Landscape:
    """A plane whose largest loss is 501 times its smallest."""
    return bowl(100.0, along=2)
