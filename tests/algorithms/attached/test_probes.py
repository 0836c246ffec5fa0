import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc import attached
from hessfunc.trees import leaves
from tests.algorithms.attached.problem import BATCH, LOSS, PARAMS, dense_slope, slope
from tests.reference import rows

PROBES = hf.random_like(PARAMS, 5, seed=0)
ONE = torch.ones(1, dtype=torch.float64)


def test_traces() -> None:
    z = rows(PROBES)
    found = slope(lambda matvec: attached.trace(matvec, PROBES).reshape(1), ONE)
    wanted = dense_slope(lambda A: ((z @ A) * z).sum(1).mean(), ONE)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["signs", "normal"])
def test_diagonals(kind: str) -> None:
    probes = hf.random_like(PARAMS, 5, kind=kind, seed=0)
    z, weights = rows(probes), torch.linspace(-1, 2, 24, dtype=torch.float64)
    found = slope(lambda matvec: attached.diagonal(matvec, probes), weights)
    wanted = dense_slope(lambda A: ((z @ A) * z).sum(0) / z.square().sum(0), weights)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_second_derivatives() -> None:
    """With fixed probes the estimate is a smooth function, to any order."""

    def slopes(params: dict[str, Tensor]) -> tuple[Tensor, ...]:
        matvec = hf.hvp(LOSS, differentiable=True)(params, BATCH)
        return torch.autograd.grad(
            attached.trace(matvec, PROBES), leaves(params), create_graph=True
        )

    params = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    total = sum(s.square().sum() for s in slopes(params))
    (found, _) = torch.autograd.grad(total, leaves(params))
    h = 1e-5
    values = []
    for step in (h, -h):
        moved = {name: leaf.clone() for name, leaf in PARAMS.items()}
        moved["first"][0, 0] += step
        moved = {name: leaf.requires_grad_() for name, leaf in moved.items()}
        values.append(sum(s.detach().square().sum() for s in slopes(moved)))
    torch.testing.assert_close(found[0, 0], (values[0] - values[1]) / (2 * h), rtol=1e-5, atol=0)


def test_constants_are_refused() -> None:
    with pytest.raises(ValueError, match="differentiable=True"):
        attached.trace(hf.hvp(LOSS)(PARAMS, BATCH), PROBES)
