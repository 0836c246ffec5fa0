"""Trainings with batches of one size, or with batches that grow where the loss is flat."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import TypeAlias

import torch
from torch import nn, optim
from torch.nn import functional as F

from hessfunc.compat.place import bare, device_of, evaluated_loss, moved
from hessfunc.optim import schedules as schedules
from hessfunc.optim.adversarial import Attack, fgsm
from hessfunc.options import validated
from hessfunc.tracking.undisturbed import undisturbed
from hessfunc.training.dominant import Watch, watch
from hessfunc.training.evaluation import evaluated
from hessfunc.training.loop import Record, train
from hessfunc.training.steps import Batch, Criterion, first_order

Loader: TypeAlias = Iterable[Batch]


_PATIENCE = 10


@validated
def baseline(
    model: nn.Module,
    train_loader: Loader,
    test_loader: Loader,
    criterion: Criterion,
    optimizer: optim.Optimizer,
    epochs: int,
    lr_decay_epoch: Collection[int],
    lr_decay_ratio: float,
    batch_size: int = 128,
    max_large_ratio: int = 1,
    cuda: bool = True,
) -> tuple[nn.Module, int]:
    """Train with batches of one size; a line is printed after each epoch.

    Args:
        model: where it lies; it comes back in eval mode.
        train_loader: read anew in each epoch; its order is a function of torch's seed.
        test_loader: of examples to evaluate on.
        criterion: ``(outputs, targets) -> mean over the examples``.
        optimizer: any of torch that needs nothing but gradients.
        epochs: passes over the examples.
        lr_decay_epoch: after each of these epochs, counted from 1,
        lr_decay_ratio: the learning rate is multiplied by it.
        batch_size: not read: the loader has its own.
        max_large_ratio: R, how many batches make one step. The last step of an epoch may have
            fewer, and counts in proportion.
        cuda: not read: batches go to where the parameters lie.

    Returns:
        ``(model, updates)``: the same model, and how many steps it has made.

    Raises:
        ValueError: an option is out of range, or a loader can be read only once.
        FloatingPointError: a loss is not finite.

    Cost: that of the training; one more pass over both loaders a line.
    """
    schedule = schedules.constant(
        ratio=max_large_ratio, lr_decay=lr_decay_ratio, lr_decay_epochs=lr_decay_epoch
    )
    alone = bare(model)
    updates = _updates(alone, train_loader, test_loader, criterion, optimizer, epochs, schedule)
    return model, updates


@validated
def absa(
    model: nn.Module,
    train_loader: Loader,
    hessian_loader: Loader,
    test_loader: Loader,
    criterion: Criterion,
    optimizer: optim.Optimizer,
    epochs: int,
    lr_decay_epoch: Collection[int],
    lr_decay_ratio: float,
    batch_size: int = 128,
    max_large_ratio: int = 1,
    adv_ratio: float = 0.0,
    eps: float = 0.0,
    duration: bool = True,
    cuda: bool = True,
    print_flag: bool = False,
) -> tuple[nn.Module, int]:
    """Train with adaptive batch size and adversarial training (ABSA).

    Args:
        model: as for `baseline`, like all that is not below.
        hessian_loader: its first batch is that whose eigenvalue is compared from epoch to epoch.
        max_large_ratio: the most batches that make one step; 1 keeps them as they are.
        adv_ratio: how much of each batch is adversarial to start with.
        eps: how far adversarial inputs are moved.
        duration: whether the batch grows after ten epochs without growth, too.
        batch_size: of a batch, for the printed lines alone.
        print_flag: whether they tell the eigenvalue, and how many examples make one step.

    Returns:
        ``(model, updates)``, as `baseline`.

    Raises:
        ValueError: an option is out of range, or a loader can be read only once.
        FloatingPointError: a loss or a product is not finite.

    Source: Yao, Gholami, Keutzer and Mahoney 2018, arXiv 1810.01021.
    """
    schedule = schedules.absa(
        epochs=epochs,
        max_ratio=max_large_ratio,
        adversarial_share=adv_ratio,
        patience=_PATIENCE if duration else epochs + 1,
        lr_decay=lr_decay_ratio,
        lr_decay_epochs=lr_decay_epoch,
    )
    alone = bare(model)
    updates = _updates(
        alone,
        train_loader,
        test_loader,
        criterion,
        optimizer,
        epochs,
        schedule,
        attack=_fgsm(alone, criterion, eps),
        watch=_first_batch_watched(alone, hessian_loader, criterion),
        batch_size=batch_size if print_flag else None,
    )
    return model, updates


def _updates(
    model: nn.Module,
    train_loader: Loader,
    test_loader: Loader,
    criterion: Criterion,
    optimizer: optim.Optimizer,
    epochs: int,
    schedule: schedules.Schedule,
    *,
    attack: Attack | None = None,
    watch: Watch | None = None,
    batch_size: int | None = None,
) -> int:
    """How many steps a training has made; a line is printed after each epoch."""
    records = train(
        model.train(),
        first_order(model, optimizer, criterion),
        train_loader,
        epochs=epochs,
        seed=torch.initial_seed(),
        test=test_loader,
        schedule=schedule,
        attack=attack,
        watch=watch,
    )
    for record in records:
        print(_line(record, batch_size))
    model.eval()
    return record.step


def _line(record: Record, batch_size: int | None) -> str:
    parts = [
        f"epoch {record.epoch:.0f}: loss {record.loss:.3f}",
        f"accuracy {record.accuracy:.1%}",
        f"test accuracy {record.test_accuracy:.1%}",
    ]
    if batch_size is not None:
        parts.append(f"batch size {batch_size * record.ratio}")
        if record.eigenvalue is not None:
            parts.append(f"eigenvalue {record.eigenvalue:.2f}")
    return ", ".join(parts)


def _fgsm(model: nn.Module, criterion: Criterion, eps: float) -> Attack:
    loss, params = evaluated_loss(model, criterion)
    return partial(fgsm, loss, params, eps=eps)


def _first_batch_watched(model: nn.Module, loader: Loader, criterion: Criterion) -> Watch:
    with undisturbed(model, loader):
        batch = moved(next(iter(loader)), device_of(model))
    return watch(model, [batch], criterion=criterion, seed=torch.initial_seed())


@validated
def exp_lr_scheduler(optimizer: optim.Optimizer, decay_ratio: float = 0.1) -> optim.Optimizer:
    """Multiply the learning rates by ``decay_ratio``; returns the optimiser."""
    for group in optimizer.param_groups:
        group["lr"] *= decay_ratio
    return optimizer


@validated
def test(model: nn.Module, test_loader: Iterable[Batch]) -> float:
    """The accuracy in eval mode, in percent, which is printed, too."""
    accuracy = 100 * evaluated(bare(model), test_loader, F.cross_entropy).accuracy
    print(f"test accuracy {accuracy:.3f} %")
    return accuracy


def progress_bar(current: int, total: int, msg: str | None = None) -> None:
    """Print how far an epoch is; ``current`` is counted from 0, and the line is written over."""
    end = "\n" if current + 1 == total else "\r"
    print(f"{current + 1}/{total} {msg or ''}", end=end, flush=True)
