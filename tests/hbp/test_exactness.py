"""With one example nothing is averaged: the blocks are those of the Hessian."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.hbp.cases import LAYERS, Net, dense, exact_blocks, largest_error, net


@pytest.mark.parametrize("averages", [(True, True), (False, False)], ids=["averaged", "each"])
@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())
def test_blocks_of_one_example_are_the_hessians(case: Net, averages: tuple[bool, bool]) -> None:
    blocks = hf.hbp(
        case.loss,
        case.model,
        average_input_jacobian=averages[0],
        average_parameter_jacobian=averages[1],
    )(case.params, case.batch)
    exact = exact_blocks(case.loss, case.params, case.batch)
    assert largest_error(dense(blocks), exact) < 1e-10


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys())
def test_zero_residual_gives_the_blocks_of_the_gauss_newton_matrix(case: Net) -> None:
    blocks = hf.hbp(case.loss, case.model, residual="zero")(case.params, case.batch)
    for name, block in blocks.items():
        chosen, rest = hf.split(case.params, [name])
        matvec = hf.ggnvp(hf.hold(case.loss, rest))(chosen, case.batch)
        units = torch.eye(block.n, dtype=torch.float64).view(-1, *block.shape)
        exact = matvec({name: units})[name]
        torch.testing.assert_close(block.matvec(units), exact, rtol=1e-8, atol=1e-12)


def _huber(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.huber_loss(outputs, targets, delta=0.3)


def _coupled(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum().sqrt()


@pytest.mark.parametrize(
    "criterion",
    [
        F.cross_entropy,
        partial(F.cross_entropy, label_smoothing=0.2, reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)),
        F.mse_loss,
        nn.MSELoss(reduction="sum"),
        F.binary_cross_entropy_with_logits,
        partial(F.binary_cross_entropy_with_logits, pos_weight=torch.tensor(3.0)),
        _huber,
        _coupled,
    ],
    ids=["ce", "ce-options", "ce-weight", "mse", "mse-sum", "bce", "bce-weight", "huber", "norm"],
)
def test_losses(criterion) -> None:
    case = net(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        4,
        criterion=criterion if criterion is F.cross_entropy else F.mse_loss,
    )
    inputs, targets = case.batch
    if "cross_entropy" in str(criterion) or "CrossEntropy" in str(criterion):
        targets = torch.tensor([1]) if "binary" not in str(criterion) else targets
    loss = hf.Loss(case.loss.outputs, hf.supervised(case.model, criterion).criterion)
    batch = (inputs, targets)
    exact = exact_blocks(loss, case.params, batch)
    assert largest_error(dense(hf.hbp(loss, case.model)(case.params, batch)), exact) < 1e-9


def test_part_of_the_parameters() -> None:
    case = LAYERS["conv2d"]
    chosen, rest = hf.split(case.params, "3.*")
    part = hf.hbp(hf.hold(case.loss, rest), case.model)(chosen, case.batch)
    whole = hf.hbp(case.loss, case.model)(case.params, case.batch)
    assert list(part) == ["3.weight", "3.bias"]
    for name, block in part.items():
        torch.testing.assert_close(block.dense(), whole[name].dense())


def test_a_resnet_of_one_small_image() -> None:
    from hessfunc.problems.resnet import resnet

    case = net(lambda: resnet(20), 3, 4, 4)
    blocks = hf.hbp(case.loss, case.model)(case.params, case.batch)
    for name in ("conv1.weight", "layer2.0.bn1.weight", "layer3.2.conv1.weight", "linear.bias"):
        chosen, rest = hf.split(case.params, [name])
        vector = hf.random_like(chosen, 2, seed=0, kind="normal")
        exact = hf.hvp(hf.hold(case.loss, rest))(chosen, case.batch)(vector)
        torch.testing.assert_close(
            blocks[name].matvec(vector[name]), exact[name], rtol=1e-7, atol=1e-12
        )
