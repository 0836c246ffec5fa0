from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hessfunc as hf
from hessfunc.app.problems.nets import c1, mlp
from hessfunc.optim.adversarial import fgsm
from hessfunc.optim.schedules import Schedule, ScheduleState, absa, constant
from hessfunc.randomness import seeded
from hessfunc.training.checkpoint import TrainingCheckpoint
from hessfunc.training.dominant import watch
from hessfunc.training.examples import Examples
from hessfunc.training.loop import Record, train
from hessfunc.training.methods import SGD, BlockNewton
from hessfunc.training.steps import Batch, Spent, Steps, first_order
from tests.training.blobs import blobs
from tests.training.problem import images, small_net


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


def plainly(model: nn.Module, examples: Examples, batch_size: int, epochs: int, seed: int) -> None:
    """A loop as people write it."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        for index in torch.randperm(len(examples), generator=generator).split(batch_size):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(examples.inputs[index]), examples.targets[index])
            loss.backward()
            optimizer.step()
        if epoch == 0:
            optimizer.param_groups[0]["lr"] *= 0.2


@pytest.mark.parametrize(
    "make", [lambda: c1(1, 8), lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 10))]
)
@pytest.mark.parametrize("watched", [False, True])
def test_clean_sgd_is_a_plain_loop_bit_for_bit(make: Any, watched: bool) -> None:
    model = make()
    same = copy.deepcopy(model)
    with seeded(3):
        plainly(same, images(), 16, epochs=2, seed=3)
    records = list(
        train(
            model,
            SGD(lr=0.05).steps(model),
            images(),
            epochs=2,
            batch_size=16,
            seed=3,
            test=images(20),
            schedule=constant(lr_decay=0.2, lr_decay_epochs=(1,)),
            watch=watch(model, images().batches(50)),
            track=watched,
        )
    )
    assert [r.step for r in records] == [0, 4, 8]
    for name, leaf in same.state_dict().items():
        assert torch.equal(leaf, model.state_dict()[name]), name


def test_a_fixed_large_batch_is_that_batch() -> None:
    model = mlp([2, 4, 2])
    same = copy.deepcopy(model)
    method = SGD(lr=0.5)
    options: dict[str, Any] = {"epochs": 3, "seed": 1}
    small = list(
        train(
            model,
            method.steps(model),
            blobs(),
            batch_size=10,
            schedule=constant(ratio=3),
            **options,
        )
    )
    large = list(train(same, method.steps(same), blobs(), batch_size=30, **options))
    assert [r.step for r in small] == [r.step for r in large] == [0, 2, 4, 6]
    assert {r.ratio for r in small} == {3}
    for a, b in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert small[-1].gradients == 3 * large[-1].gradients


def doubling(cap: int = 99) -> Schedule:
    """Grows after each epoch, and asks for nothing."""

    def after_epoch(state: ScheduleState, eigenvalue: float | None) -> ScheduleState:
        return replace(
            state,
            epoch=state.epoch + 1,
            ratio=min(2 * state.ratio, cap),
            lr_factor=2 * state.lr_factor,
        )

    return Schedule(ScheduleState, after_epoch)


def test_steps_follow_the_schedule_and_cross_no_epoch() -> None:
    model = mlp([2, 2])
    seen: list[tuple[list[int], float]] = []
    steps = SGD(lr=0.1).steps(model)

    def move(batches: Any) -> Spent:
        seen.append(([len(y) for _, y in batches], steps.optimizer.param_groups[0]["lr"]))
        return Spent()

    moved = replace(steps, move=move)
    records = list(train(model, moved, blobs(50), epochs=3, batch_size=15, schedule=doubling()))
    assert [sizes for sizes, _ in seen] == [
        *([15], [15], [15], [5]),
        *([15, 15], [15, 5]),
        [15, 15, 15, 5],
    ]
    assert [lr for _, lr in seen] == pytest.approx([0.1] * 4 + [0.2] * 2 + [0.4])
    assert [r.ratio for r in records] == [1, 1, 2, 4]
    assert [r.lr for r in records] == pytest.approx([0.1, 0.1, 0.2, 0.4])
    assert [r.epoch for r in records] == [0, 1, 2, 3]
    assert records[-1].gradients == 12


def test_adversarial_examples_are_those_of_the_schedule_made_in_eval_mode() -> None:
    model = small_net()
    shares: list[int] = []
    model_fn, params = hf.functional(model.eval())
    model.train()
    loss = hf.supervised(model_fn, F.cross_entropy)

    def attack(batch: Batch) -> Tensor:
        shares.append(len(batch[1]))
        return fgsm(loss, params, batch, eps=0.5)

    steps = SGD().steps(model)
    met: list[Tensor] = []

    def move(batches: Any) -> Spent:
        met.extend(x for x, _ in batches)
        return steps.move(batches)

    schedule = absa(epochs=4, max_ratio=2, patience=1, adversarial_share=0.4, lr_decay_epochs=())
    records = list(
        train(
            model,
            replace(steps, move=move),
            blobs(),
            epochs=4,
            batch_size=20,
            schedule=schedule,
            attack=attack,
            watch=watch(model, [(blobs().inputs, blobs().targets)]),
        )
    )
    # One epoch at a share of 0.4, then the cap.
    assert shares == [8, 8, 8]
    assert [r.adversarial_share for r in records] == [0.4, 0.4, 0, 0, 0]
    assert [r.ratio for r in records] == [1, 1, 2, 2, 2]
    assert [r.eigenvalue is None for r in records] == [True, False, True, True, True]
    changed = [~torch.isin(x[:, 0], blobs().inputs[:, 0]) for x in met[:3]]
    assert [c.tolist() for c in changed] == [[True] * 8 + [False] * 12] * 3
    # Their gradients with respect to inputs are work: more than nothing, less than one gradient.
    assert records[1].gradients > 3


class Noisy(Dataset[Batch]):
    """Examples with a draw on each of them."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> Any:
        return blobs().inputs[index] + 0.1 * torch.randn(2), blobs().targets[index]


@pytest.mark.parametrize("own", [False, True])
def test_a_loader_that_shuffles_and_draws_is_a_function_of_the_seed(own: bool) -> None:
    def trained(of_torch: int, seed: int = 0, every: int | None = None) -> list[float]:
        generator = torch.Generator().manual_seed(8) if own else None
        loader = DataLoader(Noisy(), batch_size=25, shuffle=True, generator=generator)
        with seeded(2):
            model = mlp([2, 4, 2])
        with seeded(of_torch):
            before = torch.get_rng_state()
            records = train(model, SGD().steps(model), loader, epochs=2, seed=seed, every=every)
            last = list(records)[-1]
            assert torch.equal(torch.get_rng_state(), before)
        return [last.loss, *torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()]

    assert trained(0) == trained(1)
    assert trained(0) != trained(0, seed=1)
    # Records between do not move it.
    assert trained(0) == trained(0, every=1)


def test_batches_that_can_be_read_once_are_refused() -> None:
    model = mlp([2, 2])
    start = partial(train, model, SGD().steps(model), epochs=1)
    for sources in ({"source": iter(blobs().batches(20))}, {"test": iter(blobs().batches(20))}):
        with pytest.raises(ValueError, match=r"read only once \(list_iterator\)"):
            next(start(sources.pop("source", blobs()), **sources))


def test_a_loader_that_keeps_its_workers_has_no_records_amid_an_epoch() -> None:
    model = mlp([2, 2])
    loader = DataLoader(Noisy(), batch_size=20, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="persistent_workers=True"):
        next(train(model, SGD().steps(model), loader, epochs=1, every=1))


def test_any_loader_and_optimiser() -> None:
    loader = DataLoader(TensorDataset(blobs().inputs, blobs().targets), batch_size=25)
    model = mlp([2, 8, 2])
    steps = first_order(model, torch.optim.Adam(model.parameters(), 0.05))
    records = list(train(model, steps, loader, epochs=8, schedule=constant(ratio=2), test=loader))
    assert [r.step for r in records[:3]] == [0, 2, 4]
    assert records[-1].epoch == 8
    assert records[-1].loss < 0.5 * records[0].loss
    assert records[-1].test_loss == pytest.approx(records[-1].loss)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    model = mlp([2, 2])
    start = partial(train, model, SGD().steps(model), blobs(), epochs=1)
    with pytest.raises(ValueError, match="pass `watch="):
        next(start(schedule=absa()))
    with pytest.raises(ValueError, match="pass `watch="):
        next(start(track=True))
    with pytest.raises(ValueError, match="pass `attack="):
        next(start(schedule=absa(), watch=watch(model, blobs().batches(60))))
    kept = TrainingCheckpoint(tmp_path / "state.pt", {})
    with pytest.raises(ValueError, match="train on Examples"):
        next(train(model, SGD().steps(model), blobs().batches(20), epochs=1, checkpoint=kept))
