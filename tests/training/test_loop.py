from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hessfunc.app.problems.nets import mlp
from hessfunc.training.examples import Examples
from hessfunc.training.loop import Record, train
from hessfunc.training.methods import SGD, BlockNewton
from hessfunc.training.steps import Batch, Spent, Steps
from tests.training.blobs import blobs


def moved_by(model: nn.Module, move: Callable[[Sequence[Batch]], Spent]) -> Steps:
    return replace(SGD().steps(model), move=move)


def still(model: nn.Module) -> Steps:
    return moved_by(model, lambda batches: Spent(matvecs=3))


def run(model: nn.Module, **options: object) -> list[Record]:
    method = SGD(lr=0.5, momentum=0.5)
    return list(train(model, method.steps(model), blobs(), **{"batch_size": 25, **options}))


def test_records_at_the_start_after_each_epoch_and_of_both_sets() -> None:
    model, test = mlp([2, 4, 2]), blobs(90)[60:]
    start = copy.deepcopy(model)
    records = run(model, epochs=2, test=test)
    assert [(r.step, r.epoch) for r in records] == [(0, 0.0), (3, 1.0), (6, 2.0)]
    for net, record in ((start, records[0]), (model, records[-1])):
        with torch.no_grad():
            outputs = net(blobs().inputs)
            assert record.loss == pytest.approx(float(F.cross_entropy(outputs, blobs().targets)))
            hits = (net(test.inputs).argmax(-1) == test.targets).float().mean()
            assert record.test_accuracy == pytest.approx(float(hits))
    assert records[-1].loss < records[0].loss
    assert records[0].minibatch_loss is None
    assert records[0].test_loss is not None


def test_sgd_works_one_gradient_a_step() -> None:
    records = run(mlp([2, 4, 2]), epochs=2)
    assert [r.gradients for r in records] == [0, 3, 6]
    assert all(r.matvecs == 0 for r in records)
    assert all(r.test_accuracy is None for r in records)
    assert 0 < records[1].seconds < records[2].seconds
    assert records[0].peak_bytes == 0 < records[1].peak_bytes


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_is_that_of_torch(weight_decay: float) -> None:
    model = mlp([2, 4, 2])
    same = copy.deepcopy(model)
    method = SGD(lr=0.5, momentum=0.5, weight_decay=weight_decay)
    list(train(model, method.steps(model), blobs(), batch_size=25, epochs=2, seed=7))
    options = {"momentum": 0.5, "weight_decay": weight_decay}
    optimizer = torch.optim.SGD(same.parameters(), 0.5, **options)
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        for index in torch.randperm(60, generator=generator).split(25):
            optimizer.zero_grad()
            F.cross_entropy(same(blobs().inputs[index]), blobs().targets[index]).backward()
            optimizer.step()
    pairs = zip(model.parameters(), same.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_order_is_a_function_of_the_seed_and_the_global_stream_stays() -> None:
    seen: list[torch.Tensor] = []

    def move(batches: Sequence[Batch]) -> Spent:
        seen.append(batches[0][0])
        return Spent()

    model = mlp([2, 2])
    state = torch.get_rng_state()
    for seed in (1, 1, 2):
        list(train(model, moved_by(model, move), blobs(), epochs=1, batch_size=60, seed=seed))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_every_few_steps() -> None:
    model = mlp([2, 2])
    records = list(train(model, still(model), blobs(), epochs=2, batch_size=10, every=4))
    assert [r.step for r in records] == [0, 4, 6, 8, 12]
    assert records[-1].matvecs == 36
    assert records[1].minibatch_loss == pytest.approx(records[0].loss, rel=0.3)


def test_time_ends_it() -> None:
    model = mlp([2, 2])
    records = list(train(model, still(model), blobs(), epochs=5, batch_size=10, minutes=0))
    assert [r.step for r in records] == [0, 1]


def test_work_is_in_units_of_the_gradient_of_the_same_batch() -> None:
    # Two layers: 2 N mn a product, for the outputs, the weights, and the inner layer's gradient.
    gradient = 2 * 30 * (2 * 2 * 4 + 3 * 4 * 2)
    model = mlp([2, 4, 2])
    steps = moved_by(model, lambda batches: Spent(flops=5 * gradient))
    records = list(train(model, steps, blobs(), epochs=1, batch_size=30))
    assert records[-1].gradients == 2 * (1 + 5)


def test_newton_works_some_gradients_a_step() -> None:
    model = mlp([2, 4, 2], nn.Sigmoid)
    method = BlockNewton(curvature="ggn", lr=0.5, alpha=0.05)
    records = list(train(model, method.steps(model), blobs(), epochs=2, batch_size=30))
    assert records[-1].loss < records[0].loss
    assert records[-1].matvecs > 0
    # The shortest is a lookup of each tensor and a product or two, each less than two gradients.
    assert 4 < records[-1].gradients / 4 < 2 * records[-1].matvecs


def test_a_loss_that_is_not_finite_is_said() -> None:
    model = mlp([2, 4, 2])
    method = SGD(lr=1e30)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        list(train(model, method.steps(model), blobs(), epochs=20, batch_size=30))
    broken = mlp([2, 2])
    nn.init.constant_(broken[1].bias, float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan after 0 steps"):
        next(train(broken, still(broken), blobs(), epochs=1, batch_size=30))
    with pytest.raises(FloatingPointError, match="the loss of a batch is nan"):
        SGD().steps(broken)([(blobs().inputs, blobs().targets)])


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("batch_size", [59, 1])
def test_a_single_example_that_is_normalised_is_said(batch_size: int) -> None:
    with pytest.raises(ValueError, match="a batch has a single example.*choose a batch size"):
        run(normalised(), epochs=1, batch_size=batch_size)


def test_a_single_example_trains_where_it_is_not_normalised_by_its_batch() -> None:
    frozen = normalised()
    frozen[1].eval()
    assert run(frozen, epochs=1, batch_size=59)[-1].step == 2
    loader = DataLoader(TensorDataset(blobs().inputs, blobs().targets), 59, drop_last=True)
    model = normalised()
    assert list(train(model, SGD().steps(model), loader, epochs=1))[-1].step == 1


def test_other_mistakes_with_a_single_example_are_left_as_they_are() -> None:
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("the model's own")

    model = nn.Sequential(nn.BatchNorm1d(2), Wrong())
    model[0].eval()
    steps = SGD().steps(model)
    with pytest.raises(ValueError, match="the model's own"):
        steps([(blobs().inputs[:1], blobs().targets[:1])])


@pytest.mark.parametrize("options", [{"epochs": -1}, {"batch_size": 0}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    model = mlp([2, 2])
    with pytest.raises(ValueError, match="must not be negative"):
        next(train(model, still(model), blobs(), **{"epochs": 1, "batch_size": 1, **options}))
    nothing = Examples(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one example"):
        next(train(model, still(model), nothing, epochs=1, batch_size=1))
