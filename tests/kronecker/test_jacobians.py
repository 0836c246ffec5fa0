"""Several examples: what is averaged, and what is done with negative curvature."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.kronecker.jacobians import Diagonal, EachExample, Identity, Jacobian, OfAll, Selection
from tests.kronecker.cases import Net, dense, largest_error, net
from tests.reference.backpropagation import backpropagated

AVERAGES = list(product([True, False], repeat=2))
MODES = ("none", "zero", "clip", "abs")

CHAINS = {
    "sigmoid": net(
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)
        ),
        4,
        examples=6,
    ),
    "convolution": net(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 2, stride=2, padding=1),
            nn.Tanh(),
            nn.MaxPool2d(2, stride=1),
            nn.BatchNorm2d(3),
            nn.Sigmoid(),
            nn.AvgPool2d(2, stride=1),
            nn.Flatten(),
            nn.Linear(3, 3),
        ),
        *(2, 4, 4),
        examples=5,
    ),
    "sequence": net(
        lambda: nn.Sequential(
            nn.Linear(3, 3), nn.GELU(), nn.LayerNorm(3), nn.PReLU(), nn.Flatten(), nn.Linear(12, 3)
        ),
        *(4, 3),
        examples=4,
    ),
}


@pytest.mark.parametrize("averages", AVERAGES)
@pytest.mark.parametrize("residual", MODES)
@pytest.mark.parametrize("chain", CHAINS)
def test_against_the_definition(chain: str, residual: str, averages: tuple[bool, bool]) -> None:
    case = CHAINS[chain]
    options = {
        "residual": residual,
        "average_input_jacobian": averages[0],
        "average_parameter_jacobian": averages[1],
    }
    exact = backpropagated(case.model, case.loss, case.batch, **options)
    blocks = hf.kronecker.hbp(case.loss, case.model, **options)(case.params, case.batch)
    found = dense(blocks)
    assert largest_error(found, {name: exact[name] for name in found}) < 1e-9


def test_batch_order_does_not_matter() -> None:
    case = CHAINS["convolution"]
    inputs, targets = case.batch
    order = torch.tensor([3, 0, 4, 2, 1])
    curvature = hf.kronecker.hbp(case.loss, case.model, residual="abs")
    one = dense(curvature(case.params, case.batch))
    assert largest_error(dense(curvature(case.params, (inputs[order], targets[order]))), one) < 1e-9


def test_several_batches_are_averaged() -> None:
    case = CHAINS["sigmoid"]
    inputs, targets = case.batch
    curvature = hf.kronecker.hbp(case.loss, case.model)
    batches = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    matvec = hf.over_batches(curvature)(case.params, batches)
    probes = hf.random_like(case.params, 3, seed=0)
    parts = [curvature(case.params, batch)(probes) for batch in batches]
    for name, found in matvec(probes).items():
        torch.testing.assert_close(found, (2 * parts[0][name] + 4 * parts[1][name]) / 6)


def mean_square_net() -> Net:
    return net(lambda: nn.Sequential(nn.Linear(4, 3)), 4, examples=6, criterion=F.mse_loss)


def test_cross_entropy_at_the_outputs() -> None:
    """(diag(sum_b p_b) - sum_b p_b p_b') / B."""
    case = net(lambda: nn.Sequential(nn.Linear(4, 3)), 4, examples=6)
    share = torch.softmax(case.model(case.batch[0]).detach(), 1)
    exact = (torch.diag(share.sum(0)) - share.mT @ share) / 6
    block = hf.kronecker.hbp(case.loss, case.model)(case.params, case.batch)["0.bias"]
    torch.testing.assert_close(block.dense(), exact)


def test_a_linear_model_with_mean_square_error_is_exact() -> None:
    case = mean_square_net()
    block = hf.kronecker.hbp(case.loss, case.model, average_parameter_jacobian=False)(
        case.params, case.batch
    )["0.weight"]
    chosen, rest = hf.split(case.params, ["0.weight"])
    units = torch.eye(12, dtype=torch.float64).view(-1, 3, 4)
    exact = hf.hvp(hf.hold(case.loss, rest))(chosen, case.batch)({"0.weight": units})["0.weight"]
    torch.testing.assert_close(block.matvec(units), exact)


def test_the_mean_of_what_is_not_affine() -> None:
    """The weight of a PReLU meets min(0, x): its mean is not that of the mean x."""
    case = CHAINS["sequence"]
    found = [
        hf.kronecker.hbp(case.loss, case.model, average_parameter_jacobian=average)(
            case.params, case.batch
        )
        for average in (True, False)
    ]
    one, other = (float(blocks["3.weight"].dense()) for blocks in found)
    assert abs(one - other) > 1e-3 * abs(other)


GENERATOR = torch.Generator().manual_seed(0)
B, M = 4, 5


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


CHOSEN = torch.randint(6, (B, M), generator=GENERATOR)
WEIGHT, SLOPES, DENSE = drawn(M, 6), drawn(B, M), drawn(B, M, 6)
JACOBIANS: dict[str, tuple[Jacobian, Tensor]] = {
    "identity": (Identity(), torch.eye(M).double().expand(B, M, M)),
    "of all": (
        OfAll(lambda g: (g.flatten(1) @ WEIGHT,), torch.Size((M,)), 6),
        WEIGHT.expand(B, M, 6),
    ),
    "diagonal": (Diagonal(SLOPES), torch.diag_embed(SLOPES)),
    "selection": (Selection(CHOSEN, 6), F.one_hot(CHOSEN, 6).double()),
    "each example": (EachExample(lambda: DENSE, (B, M, 6)), DENSE),
}


@pytest.mark.parametrize("name", JACOBIANS)
def test_products_with_a_jacobian_are_those_of_its_matrices(name: str) -> None:
    jacobian, matrices = JACOBIANS[name]
    mean, rows, half = matrices.mean(0), drawn(3, M), drawn(M, M)
    hessian = half + half.mT
    torch.testing.assert_close(jacobian.pull(rows)[0], rows @ mean)
    torch.testing.assert_close(jacobian.congruence(hessian)[0][0], mean.mT @ hessian @ mean)
    of_each = (matrices.mT @ hessian @ matrices).mean(0)
    torch.testing.assert_close(jacobian.mean_congruence(hessian)[0][0], of_each)
