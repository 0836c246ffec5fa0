"""Trainings with a constant or an adaptive batch size, with the interface of HessianFlow."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import TypeAlias

import torch
from torch import nn, optim
from torch.nn import functional as F

from hessfunc.compat.place import device_of, evaluated_loss, moved
from hessfunc.modules import bare
from hessfunc.optim import schedules as schedules
from hessfunc.optim.adversarial import Attack, fgsm
from hessfunc.options import text, validated, whole_number
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
    """Train with batches of one size, and print a line after each epoch.

    Args:
        model: Module to train, on its own device. It is in eval mode afterwards.
        train_loader: Loader that is read in each epoch. Its order is a function of torch's seed.
        test_loader: Loader of the examples for the evaluation.
        criterion: Function ``(outputs, targets) -> mean over the examples``.
        optimizer: Any optimiser of torch that needs only gradients.
        epochs: Number of passes over the examples.
        lr_decay_epoch: Epochs after which the learning rate decays, counted from 1.
        lr_decay_ratio: Factor of the learning rate after each epoch in ``lr_decay_epoch``.
        batch_size: Ignored: the loader has its own batch size.
        max_large_ratio: Number of batches in one step, R. The last step of an epoch may have
            fewer batches and is scaled in proportion.
        cuda: Ignored: batches are moved to the device of the parameters.

    Returns:
        ``(model, updates)``: the same model, and the number of steps.

    Raises:
        ValueError: If an option is out of range, or if a loader can be read only once.
        FloatingPointError: If a loss is not finite.

    Cost: the training, and one more pass over both loaders for each line.
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

    Arguments that are not listed here are those of `baseline`.

    Args:
        model: Module to train, as for `baseline`.
        hessian_loader: Loader whose first batch is used for the eigenvalue after each epoch.
        max_large_ratio: Largest number of batches in one step; 1 keeps the batch size constant.
        adv_ratio: Initial fraction of each batch that is adversarial.
        eps: Step size of the adversarial inputs.
        duration: Whether the batch also grows after ten epochs without growth.
        batch_size: Number of examples in a batch, used only for the printed lines.
        print_flag: Whether the printed lines contain the eigenvalue and the number of examples in
            one step.

    Returns:
        ``(model, updates)``, as in `baseline`.

    Raises:
        ValueError: If an option is out of range, or if a loader can be read only once.
        FloatingPointError: If a loss or a product is not finite.

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
    """Run a training, print a line after each epoch, and return the number of steps."""
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
    """Multiply the learning rates by ``decay_ratio``, and return the optimiser."""
    for group in optimizer.param_groups:
        group["lr"] *= decay_ratio
    return optimizer


@validated
def test(model: nn.Module, test_loader: Iterable[Batch]) -> float:
    """Print and return the accuracy in eval mode, in percent."""
    accuracy = 100 * evaluated(bare(model), test_loader, F.cross_entropy).accuracy
    print(f"test accuracy {accuracy:.3f} %")
    return accuracy


@validated(current=whole_number, total=whole_number, msg=text)
def progress_bar(current: int, total: int, msg: str | None = None) -> None:
    """Print the progress of an epoch on one line; ``current`` is counted from 0."""
    end = "\n" if current + 1 == total else "\r"
    print(f"{current + 1}/{total} {msg or ''}", end=end, flush=True)
