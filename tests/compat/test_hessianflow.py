"""The face of HessianFlow beside dense Hessians, and beside HessianFlow's loops, written out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hessfunc as hf
from hessfunc.app.problems.nets import mlp
from hessfunc.compat import hessianflow
from hessfunc.modules import eval_mode
from tests import reference

Batch = tuple[Tensor, Tensor]
criterion = nn.CrossEntropyLoss()


def batches(*sizes: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        inputs = torch.randn(size, 4, generator=generator, dtype=torch.float64)
        found.append((inputs, (inputs[:, 0] > inputs[:, 1]).long()))
    return found


def net() -> nn.Module:
    return mlp([4, 5, 2], nn.Tanh).double()


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double()


def dense(model: nn.Module, data: Iterable[Batch]) -> Tensor:
    """The Hessian of the mean loss over all examples, in eval mode."""
    with eval_mode(model):
        model_fn, params = hf.functional(model)
    inputs, targets = (torch.cat(parts) for parts in zip(*data, strict=True))
    return reference.hessian(hf.supervised(model_fn, criterion), params, (inputs, targets))


def dominant(model: nn.Module, data: Iterable[Batch]) -> float:
    values = torch.linalg.eigvalsh(dense(model, data))
    return float(values[values.abs().argmax()])


def hessianflow_eigen(
    model: nn.Module, data: Sequence[Batch], steps: int, tol: float
) -> tuple[float, list[Tensor]]:
    """HessianFlow's power iteration, over batches of one size."""
    params = list(model.parameters())
    vector = torch.randn(sum(p.numel() for p in params), dtype=torch.float64)
    vector /= vector.norm()
    value = None
    for _ in range(steps):
        image = torch.zeros_like(vector)
        for inputs, targets in data:
            loss = criterion(model(inputs), targets)
            gradient = torch.autograd.grad(loss, params, create_graph=True)
            inner = reference.flat(gradient) @ vector
            image += reference.flat(torch.autograd.grad(inner, params)) / len(data)
        new = float(image @ vector)
        vector = image / image.norm()
        if value is not None and abs(new - value) / abs(value) < tol:
            value = new
            break
        value = new
    assert value is not None
    return value, list(vector.split([p.numel() for p in params]))


def test_the_eigenvalue_is_that_of_the_dense_hessian() -> None:
    model, data = net(), batches(30)
    value, vector = hessianflow.get_eigen(model, *data[0], criterion, cuda=False, tol=1e-6)
    assert isinstance(value, float)
    assert value == pytest.approx(dominant(model, data), rel=1e-10)
    assert [v.shape for v in vector] == [p.shape for p in model.parameters()]
    flat = reference.flat(vector)
    assert float(flat.norm()) == pytest.approx(1)
    assert float((dense(model, data) @ flat - value * flat).norm()) <= 1e-6 * value


def test_a_dominant_eigenvalue_may_be_negative() -> None:
    def concave(outputs: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(outputs, targets)

    model, data = net(), batches(30)
    value, _ = hessianflow.get_eigen(model, *data[0], concave, tol=1e-6)
    assert value == pytest.approx(-dominant(model, data), rel=1e-10)


def test_where_hessianflow_converges_it_finds_the_same() -> None:
    model, data = net(), batches(20, 20, 20)
    theirs, their_vector = hessianflow_eigen(model, data, 2000, 1e-12)
    ours, vector = hessianflow.get_eigen_full_dataset(model, data, criterion, tol=1e-6)
    assert ours == pytest.approx(theirs, rel=1e-6)
    cosine = reference.flat(vector) @ reference.flat(their_vector)
    assert abs(float(cosine)) == pytest.approx(1, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*has not converged")
def test_with_the_settings_of_the_scripts_it_is_no_farther_from_the_truth() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        model, data = net(), batches(20, seed=seed)
        truth = dominant(model, data)
        theirs, _ = hessianflow_eigen(model, data, 10, 1e-2)
        ours, _ = hessianflow.get_eigen(model, *data[0], criterion, maxIter=10, tol=1e-2)
        assert abs(ours - truth) <= 1e-2 * abs(truth)
        assert abs(ours - truth) <= abs(theirs - truth) + 1e-9


def test_every_example_of_a_data_set_counts() -> None:
    model, data = net(), batches(16, 16, 7)
    value, _ = hessianflow.get_eigen_full_dataset(model, data, criterion, tol=1e-6)
    assert value == pytest.approx(dominant(model, data), rel=1e-10)
    skipped, _ = hessianflow_eigen(model, data[:2], 2000, 1e-12)
    assert value != pytest.approx(skipped, rel=1e-3)


def test_a_loader_that_shuffles() -> None:
    model, data = net(), batches(39)
    loader = DataLoader(TensorDataset(*data[0]), 16, shuffle=True)
    state = torch.get_rng_state()
    value, _ = hessianflow.get_eigen_full_dataset(model, loader, criterion, tol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    assert value == pytest.approx(dominant(model, data), rel=1e-8)
    with pytest.raises(ValueError, match="can be read only once"):
        hessianflow.get_eigen_full_dataset(model, iter(data), criterion)


def test_the_model_stays_as_it_was() -> None:
    model, data = normalised().train(), batches(30)
    before = copy.deepcopy(model.state_dict())
    value, _ = hessianflow.get_eigen(model, *data[0], criterion, tol=1e-6)
    # In eval mode, whatever the mode of the model.
    assert value == pytest.approx(dominant(model, data), rel=1e-10)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_data_parallel_frozen_and_unused_parameters() -> None:
    model, data = net(), batches(30)
    value, _ = hessianflow.get_eigen(model, *data[0], criterion)
    assert hessianflow.get_eigen(nn.DataParallel(model), *data[0], criterion)[0] == value
    model.register_parameter("unused", nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    found, vector = hessianflow.get_eigen(model, *data[0], criterion, tol=1e-6)
    assert found == pytest.approx(dominant(model, data))
    unused = [n for n, _ in model.named_parameters()].index("unused")
    assert float(vector[unused].abs().max()) <= 1e-6
    model[1].requires_grad_(False)
    assert len(hessianflow.get_eigen(model, *data[0], criterion)[1]) == 3


def test_an_eigenvalue_that_has_not_converged_is_warned_of() -> None:
    model, data = net(), batches(30)
    for steps, expected in (
        (3, r"converged to tol=0.001: .* residual is (.*) \(.*budget.*increase maxIter"),
        # Lanczos makes two products at least.
        (1, "has not converged"),
    ):
        with pytest.warns(UserWarning, match=expected) as warned:
            value, vector = hessianflow.get_eigen(model, *data[0], criterion, maxIter=steps)
        with pytest.warns(UserWarning, match="has not converged"):
            hessianflow.get_eigen_full_dataset(model, data, criterion, maxIter=steps)
        assert warned[0].filename == __file__
        flat = reference.flat(vector)
        residual = float((dense(model, data) @ flat - value * flat).norm())
        assert f"residual is {residual:.1e}" in str(warned[0].message)


@pytest.mark.filterwarnings("ignore:.*has not converged")
def test_the_start_is_a_function_of_torchs_seed() -> None:
    model, data = net(), batches(30)

    def few_products(seed: int) -> float:
        torch.manual_seed(seed)
        return hessianflow.get_eigen(model, *data[0], criterion, maxIter=3)[0]

    assert few_products(1) == few_products(1) != few_products(2)


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


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4)


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


@pytest.mark.gpu
def test_on_a_gpu_batches_come_from_the_cpu() -> None:
    model, data = net(), batches(8, 8)
    expected, _ = hessianflow.get_eigen_full_dataset(model, data, criterion, tol=1e-6)
    model.cuda()
    value, vector = hessianflow.get_eigen_full_dataset(model, data, criterion, tol=1e-6)
    assert value == pytest.approx(expected, rel=1e-8)
    assert vector[0].is_cuda
    hessianflow.baseline(model, data, data, criterion, sgd(model), 1, [], 1.0)
    hessianflow.absa(
        *(model, data, data, data, criterion, sgd(model), 2, [], 1.0),
        adv_ratio=0.2,
        eps=0.01,
        max_large_ratio=2,
    )
