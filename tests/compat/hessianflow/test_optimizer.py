"""Trainings with a constant or an adaptive batch size, beside the loops of HessianFlow."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hessfunc.compat import hessianflow
from tests.compat.hessianflow.problem import (
    Batch,
    batches,
    criterion,
    dominant,
    net,
    normalised,
    sgd,
)


def hessianflow_training(
    model: nn.Module,
    data: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    decay_epochs: Sequence[int],
    decay: float,
    max_ratio: int,
    held: Batch | None = None,
    share: float = 0.0,
    eps: float = 0.0,
    patience: int | None = None,
) -> tuple[int, list[int]]:
    """HessianFlow's loops, on batches of one size whose number the ratios divide.

    With a held batch its ABSA, with exact eigenvalues; else the ratio is the largest from the
    first epoch on. Returns updates, and the ratio after each epoch.
    """
    ratio = max_ratio if held is None else 1
    first, waited, updates, ratios = None, 0, 0, []
    for epoch in range(1, epochs + 1):
        for i, (inputs, targets) in enumerate(data):
            if share > 1 / len(targets):
                count = max(int(len(targets) * share), 1)
                model.eval()
                moved = inputs[:count].clone().requires_grad_()
                loss = F.cross_entropy(model(moved), targets[:count])
                (slope,) = torch.autograd.grad(loss, moved)
                low, high = float(inputs[:count].min()), float(inputs[:count].max())
                moved = (moved + eps * slope.sign()).detach().clamp(low, high)
                inputs = torch.cat([moved, inputs[count:]])
            model.train()
            (criterion(model(inputs), targets) / ratio).backward()
            if (i + 1) % ratio == 0:
                optimizer.step()
                optimizer.zero_grad()
                updates += 1
        grow = False
        if held is not None and ratio < max_ratio:
            value = dominant(model, [held])
            waited += 1
            if first is None:
                first = value
            elif value <= first / 2:
                first, grow = value, True
            grow = grow or waited == patience
        if grow:
            new = min(2 * ratio, max_ratio)
            for group in optimizer.param_groups:
                group["lr"] *= new / ratio
            share = share / 2 if new < max_ratio else 0.0
            ratio, waited = new, 0
        if epoch in decay_epochs:
            for group in optimizer.param_groups:
                group["lr"] *= decay
        if epoch >= epochs // 2:
            share = 0.0
        ratios.append(ratio)
    return updates, ratios


def assert_same(model: nn.Module, other: nn.Module) -> None:
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ratio", [1, 2])
def test_baseline_is_hessianflows_loop(ratio: int) -> None:
    model, data = normalised(), batches(8, 8, 8, 8)
    theirs = copy.deepcopy(model)
    updates, _ = hessianflow_training(
        theirs, data, sgd(theirs), epochs=4, decay_epochs=[2, 3], decay=0.5, max_ratio=ratio
    )
    optimizer = sgd(model)
    found = hessianflow.baseline(
        model, data, data, criterion, optimizer, 4, [2, 3], 0.5, max_large_ratio=ratio
    )
    assert found == (model, updates) == (model, 16 // ratio)
    assert_same(model, theirs)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert not model.training


@pytest.mark.parametrize("duration", [True, False])
def test_absa_is_hessianflows_loop(duration: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessfunc.compat.hessianflow.optimizer._PATIENCE", 4)
    # With batch norms it is not to the bit: all attacks of a step are made before its first batch.
    model, data = net(), batches(*(10,) * 8)
    theirs = copy.deepcopy(model)
    settings = {"adv_ratio": 0.4, "eps": 0.05, "duration": duration, "max_large_ratio": 8}
    updates, ratios = hessianflow_training(
        theirs,
        data,
        sgd(theirs),
        epochs=14,
        decay_epochs=[7],
        decay=0.5,
        max_ratio=8,
        held=data[0],
        share=0.4,
        eps=0.05,
        patience=4 if duration else None,
    )
    optimizer = sgd(model)
    found = hessianflow.absa(
        model, data, data, data, criterion, optimizer, 14, [7], 0.5, batch_size=10, **settings
    )
    assert set(ratios) >= {1, 2}
    assert found == (model, updates)
    assert_same(model, theirs)


def test_no_step_crosses_an_epoch_and_small_batches_count() -> None:
    model, data = net(), batches(8, 8, 8, 8, 3)
    same = copy.deepcopy(model)
    _, updates = hessianflow.baseline(
        model, data, data, criterion, sgd(model), 2, [], 1.0, max_large_ratio=2
    )
    assert updates == 2 * 3
    hessianflow.baseline(same, data[:4], data, criterion, sgd(same), 2, [], 1.0, max_large_ratio=2)
    assert not torch.equal(model[1].weight, same[1].weight)


def test_the_held_batch_stays_the_same() -> None:
    class Counted(DataLoader[Tensor]):
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return super().__iter__()

    model, data = net(), batches(8, 8)
    loader = Counted(TensorDataset(*batches(40)[0]), 8, shuffle=True)
    state = torch.get_rng_state()
    optimizer = torch.optim.Adam(model.parameters())
    hessianflow.absa(model, data, loader, data, criterion, optimizer, 3, [], 1.0, max_large_ratio=4)
    assert loader.passes == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model, data = net(), batches(8, 8)
    hessianflow.baseline(model, data, data, criterion, sgd(model), 2, [], 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 0", "epoch 1", "epoch 2"]
    assert "test accuracy" in lines[0]
    assert "eigenvalue" not in "".join(lines)
    hessianflow.absa(
        *(model, data, data, data, criterion, sgd(model), 2, [], 1.0),
        batch_size=8,
        max_large_ratio=2,
        print_flag=True,
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert "batch size 8" in last
    assert "eigenvalue" in last


def test_absa_with_a_cap_of_one_needs_no_eigenvalue(capsys: pytest.CaptureFixture[str]) -> None:
    model, data = net(), batches(8, 8)
    _, updates = hessianflow.absa(
        model, data, data, data, criterion, sgd(model), 2, [], 1.0, print_flag=True
    )
    assert updates == 4
    assert "eigenvalue" not in capsys.readouterr().out


def test_what_scripts_with_their_own_loop_import(capsys: pytest.CaptureFixture[str]) -> None:
    model, data = net().train(), batches(30, 10)
    inputs, targets = (torch.cat(parts) for parts in zip(*data, strict=True))
    hits = (model(inputs).argmax(1) == targets).double().mean()
    assert hessianflow.test(model, data) == pytest.approx(100 * float(hits))
    assert model.training
    optimizer = sgd(model)
    assert hessianflow.exp_lr_scheduler(optimizer, decay_ratio=0.5) is optimizer
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    capsys.readouterr()
    hessianflow.progress_bar(0, 2, "Loss: 1")
    hessianflow.progress_bar(1, 2, "Loss: 2")
    assert capsys.readouterr().out == "1/2 Loss: 1\r2/2 Loss: 2\n"
