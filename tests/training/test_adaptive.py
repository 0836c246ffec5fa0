"""The training loop with schedules, adversarial examples, eigenvalues, and a state."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
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
from hessfunc.training.methods import SGD, BlockNewton, Method
from hessfunc.training.runs import run
from hessfunc.training.steps import Batch, Spent, first_order
from tests.training.blobs import blobs


def images(count: int = 50) -> Examples:
    generator = torch.Generator().manual_seed(0)
    return Examples(
        torch.randn(count, 1, 8, 8, generator=generator),
        torch.randint(10, (count,), generator=generator),
    )


def small_net() -> nn.Sequential:
    """With statistics and draws."""
    return nn.Sequential(
        nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2)
    )


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


def test_evaluations_are_made_in_eval_mode_and_leave_the_mode() -> None:
    model = small_net()
    records = list(train(model, SGD().steps(model), blobs(), epochs=1, batch_size=30))
    assert model.training
    model.eval()
    expected = F.cross_entropy(model(blobs().inputs), blobs().targets)
    assert records[-1].loss == pytest.approx(expected.item())


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


def test_the_eigenvalue_is_that_of_the_hessian_in_eval_mode() -> None:
    model = mlp([2, 6, 2], nn.Tanh)
    measured = watch(model, blobs().batches(25), max_matvecs=60, rtol=1e-6)
    records = list(
        train(
            model,
            SGD(lr=0.3).steps(model),
            blobs(),
            epochs=3,
            batch_size=20,
            watch=measured,
            track=True,
        )
    )
    assert records[0].eigenvalue is None
    model_fn, params = hf.functional(model)
    matvec = hf.hvp(hf.supervised(model_fn, F.cross_entropy))(
        params, (blobs().inputs, blobs().targets)
    )
    expected = hf.lanczos(matvec, params, k=1, seed=0).values[0]
    assert records[-1].eigenvalue == pytest.approx(float(expected), rel=1e-4)
    # What is only watched costs the training nothing.
    assert (records[-1].matvecs, records[-1].gradients) == (0, 9)


def test_a_warm_start_saves_products() -> None:
    model = mlp([2, 16, 2], nn.Tanh)
    measured = watch(model, blobs().batches(60), max_matvecs=100, rtol=1e-3)
    cold = measured(None)
    SGD(lr=0.01).steps(model)([(blobs().inputs, blobs().targets)])
    warm = measured(cold.vectors)
    assert bool(warm.converged.all())
    assert warm.matvecs < cold.matvecs


def test_products_of_the_schedule_are_part_of_the_cost() -> None:
    model = mlp([2, 6, 2])
    schedule = absa(epochs=2, max_ratio=4, adversarial_share=0.0, lr_decay_epochs=())
    records = list(
        train(
            model,
            SGD().steps(model),
            blobs(),
            epochs=2,
            batch_size=20,
            schedule=schedule,
            watch=watch(model, blobs().batches(60), max_matvecs=10),
        )
    )
    assert 0 < records[1].matvecs <= 10
    assert records[1].gradients > 3


def test_the_unit_of_work_is_the_first_batch_however_small_the_last_one_is() -> None:
    def spent(count: int) -> float:
        with seeded(0):
            model = mlp([2, 6, 2])
        records = train(
            model,
            SGD().steps(model),
            blobs(count),
            epochs=1,
            batch_size=20,
            schedule=absa(epochs=1, max_ratio=4),
            attack=lambda batch: batch[0],
            watch=watch(model, blobs(60).batches(60), max_matvecs=5, rtol=0.0),
        )
        return list(records)[-1].gradients

    assert spent(61) == pytest.approx(spent(60) + 1)


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


def options(method: Method, path: Path | None) -> dict[str, Any]:
    kept = None if path is None else TrainingCheckpoint(path, {"seed": 5}, every=2)
    return {
        "epochs": 5,
        "batch_size": 7,
        "seed": 5,
        "schedule": absa(epochs=5, max_ratio=4, patience=2, lr_decay_epochs=(3,)),
        "track": "top",
        "checkpoint": kept,
    }


class Killed(BaseException):
    """Stands for a signal."""


METHODS = {
    "sgd": SGD(lr=0.05),
    "newton": BlockNewton(curvature="hbp-abs", lr=0.1, alpha=0.5, max_matvecs=4),
}


# Nine steps make the first epoch; what is killed at the ninth goes on at a smaller batch.
@pytest.mark.parametrize("killed_at", [1, 9, 10, 15, 22])
@pytest.mark.parametrize("name", METHODS)
def test_a_killed_training_ends_with_the_same_bits(
    name: str, killed_at: int, tmp_path: Path
) -> None:
    method = METHODS[name]
    make = small_net if name == "sgd" else lambda: mlp([2, 5, 2], nn.Sigmoid)
    path = tmp_path / "state.pt"
    expected = run("it", make, method, blobs(), blobs(20), **options(method, tmp_path / "whole.pt"))
    steps = [0]

    def kill(examples: int) -> None:
        steps[0] += 1
        if steps[0] == killed_at:
            raise Killed

    with pytest.raises(Killed):
        run("it", make, method, blobs(), blobs(20), on_step=kill, **options(method, path))
    torch.rand(17)
    found = run("it", make, method, blobs(), blobs(20), **options(method, path))
    timeless = [[replace(r, seconds=0.0) for r in one.records] for one in (found, expected)]
    assert timeless[0] == timeless[1]
    assert found.ended == "complete"
    whole, resumed = (torch.load(p, weights_only=True) for p in (tmp_path / "whole.pt", path))
    for key, leaf in whole["state_dict"].items():
        assert torch.equal(leaf, resumed["state_dict"][key]), key
    assert {file.name for file in tmp_path.iterdir()} == {"whole.pt", "state.pt"}


def test_a_finished_training_is_told_again_without_a_step(tmp_path: Path) -> None:
    method = METHODS["sgd"]
    first = run("it", small_net, method, blobs(), **options(method, tmp_path / "state.pt"))
    steps: list[int] = []
    again = run(
        "it",
        small_net,
        method,
        blobs(),
        on_step=steps.append,
        **options(method, tmp_path / "state.pt"),
    )
    assert again == first
    assert steps == []


def test_time_that_is_up_is_so_after_going_on_too(tmp_path: Path) -> None:
    kept = TrainingCheckpoint(tmp_path / "state.pt", {})
    for minutes, ended, steps in ((0, "time is up", 1), (0, "time is up", 1), (9, "complete", 4)):
        found = run(
            "it",
            small_net,
            SGD(),
            blobs(),
            epochs=2,
            batch_size=30,
            minutes=minutes,
            checkpoint=kept,
        )
        assert (found.ended, found.records[-1].step) == (ended, steps)


def test_a_state_of_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"

    def start(lr: float, epochs: int, count: int | None = None) -> list[Record]:
        model = mlp([2, 2])
        kept = TrainingCheckpoint(path, {"lr": lr})
        found = train(model, SGD(lr=lr).steps(model), blobs(), epochs=epochs, checkpoint=kept)
        return list(islice(found, count))

    start(0.1, 3, 2)
    with pytest.raises(
        ValueError, match=r"state.pt contains an unfinished .*lr was 0.1 and is now 0.2"
    ):
        start(0.2, 3)
    assert [r.step for r in start(0.1, 3)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"a finished .*lr was 0.1 and is now 0.2.: pass another"):
        start(0.2, 1)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"state.pt is damaged .*: remove it"):
        start(0.2, 1)


def test_records_are_plain(tmp_path: Path) -> None:
    found = run("it", small_net, SGD(), blobs(), epochs=1, batch_size=30)
    assert asdict(found.records[-1])["ratio"] == 1
