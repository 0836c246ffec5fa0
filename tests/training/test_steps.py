from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfunc.app.problems.nets import mlp
from hessfunc.training.methods import SGD, BlockNewton
from hessfunc.training.steps import first_order
from tests.training.blobs import blobs


def gradient(model: nn.Module, sizes: list[int], ratio: int) -> list[Tensor]:
    """What a step leaves in the parameters."""
    steps = first_order(model, torch.optim.SGD(model.parameters(), 0.0))
    batches = list(zip(blobs().inputs.split(sizes), blobs().targets.split(sizes), strict=True))
    steps(batches, ratio)
    return [p.grad.clone() for p in model.parameters()]


def whole(model: nn.Module, count: int) -> list[Tensor]:
    loss = F.cross_entropy(model(blobs().inputs[:count]), blobs().targets[:count])
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize(
    ("sizes", "ratio", "share"),
    [
        ([60], 1, 1),
        ([30, 30], 2, 1),
        ([25, 25, 10], 3, 1),
        ([25, 25, 10], 4, 3 / 4),
        ([60], 4, 1 / 4),
    ],
)
def test_gradients_weight_by_examples_and_count_by_the_ratio(
    sizes: list[int], ratio: int, share: float
) -> None:
    model = mlp([2, 4, 2])
    for found, expected in zip(gradient(model, sizes, ratio), whole(model, 60), strict=True):
        torch.testing.assert_close(found, share * expected)


def test_one_batch_is_untouched_and_equal_ones_are_divided_exactly() -> None:
    model = mlp([2, 4, 2])
    assert all(map(torch.equal, gradient(model, [60], 1), whole(model, 60)))
    model.zero_grad()
    for part in range(3):
        index = slice(20 * part, 20 * part + 20)
        (F.cross_entropy(model(blobs().inputs[index]), blobs().targets[index]) / 3).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    assert all(map(torch.equal, gradient(model, [20, 20, 20], 3), expected))


def test_the_loss_is_that_of_all_examples() -> None:
    model = mlp([2, 4, 2])
    same = copy.deepcopy(model)
    sizes = [25, 25, 10]
    batches = list(zip(blobs().inputs.split(sizes), blobs().targets.split(sizes), strict=True))
    step = SGD().steps(model)(batches, 3)
    expected = F.cross_entropy(same(blobs().inputs), blobs().targets)
    assert step.loss == pytest.approx(expected.item())
    assert (step.matvecs, step.flops) == (0, 0)


def test_newton_takes_the_curvature_of_all_examples_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Sigmoid(), nn.Linear(4, 2))
    same = copy.deepcopy(model)
    seen = {}
    for net, sizes in ((model, [60]), (same, [30, 30])):
        steps = BlockNewton(curvature="ggn", alpha=0.1).steps(net)
        batches = list(zip(blobs().inputs.split(sizes), blobs().targets.split(sizes), strict=True))
        # Statistics of halves would differ.
        net.eval()
        step = steps(batches, len(sizes))
        seen[len(sizes)] = [p.detach().clone() for p in net.parameters()]
        assert step.matvecs > 0
        assert step.flops > 0
    for a, b in zip(seen[1], seen[2], strict=True):
        torch.testing.assert_close(a, b)
    model.train()
    steps([(blobs().inputs, blobs().targets)], 1)
    assert model.training


def test_any_criterion_and_optimiser() -> None:
    model = nn.Linear(2, 1)
    steps = first_order(model, torch.optim.AdamW(model.parameters(), 0.1), F.mse_loss)
    x = blobs().inputs
    losses = [steps([(x, x.sum(1, keepdim=True))]).loss for _ in range(50)]
    assert losses[-1] < 0.1 * losses[0]


def test_what_later_steps_depend_on_goes_through_a_state() -> None:
    batch = blobs().inputs, blobs().targets
    for method in (SGD(momentum=0.9), BlockNewton(curvature="ggn", alpha=0.1)):
        model = mlp([2, 4, 2], nn.Sigmoid)
        steps = method.steps(model)
        for _ in range(3):
            steps([batch])
        same = copy.deepcopy(model)
        restored = method.steps(same)
        restored.restore(copy.deepcopy(steps.state()))
        assert steps([batch]) == restored([batch])
        assert all(map(torch.equal, model.parameters(), same.parameters()))
