from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.app.problems.nets import mlp
from hessfunc.optim.newton import newton
from hessfunc.optim.optimizer import NewtonOptimizer
from hessfunc.optim.solvers import conjugate_gradients
from hessfunc.transforms.exact_blocks import exact_blocks

SOLVE = conjugate_gradients(rtol=1e-3, atol=0)


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(9, 4), torch.randint(3, (9,))) for _ in range(3)]


def made(**options: Any) -> tuple[nn.Module, NewtonOptimizer, Any]:
    model = mlp([4, 5, 3], nn.Sigmoid)
    blocks = exact_blocks(hf.ggnvp, hf.supervised(hf.functional(model)[0], F.cross_entropy))
    return model, NewtonOptimizer(model, blocks, solve=SOLVE, **options), blocks


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    model.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_steps_are_those_of_the_pure_function() -> None:
    model, optimizer, blocks = made(lr=0.5, alpha=0.1)
    method = newton(lr=0.5, alpha=0.1, solve=SOLVE)
    params = values(model)
    state = method.init(params)
    for batch in batches():
        backward(model, batch)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        assert optimizer.step(batch) is None
        params, state = method.update(gradients, state, params, blocks(params, batch))
        assert all(torch.equal(p, params[name]) for name, p in values(model).items())
    assert optimizer.matvecs == state.matvecs
    assert optimizer.param_groups[0]["step"] == 3


def test_a_closure_comes_first_and_gives_the_loss() -> None:
    first, second = made(), made()
    second[0].load_state_dict(first[0].state_dict())
    batch = batches()[0]
    with torch.no_grad():
        loss = first[1].step(batch, lambda: backward(first[0], batch))
    expected = backward(second[0], batch)
    second[1].step(batch)
    assert torch.equal(loss, expected)
    pairs = zip(values(first[0]).values(), values(second[0]).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_parameters_without_gradient_or_frozen_stay() -> None:
    model = mlp([4, 5, 3], nn.Sigmoid)
    model[1].bias.requires_grad_(False)
    looked_up: list[str] = []

    class Seen(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            looked_up.append(name)
            return super().__getitem__(name)

    def blocks(params: Mapping[str, Tensor], batch: Any) -> Mapping[str, Any]:
        assert list(params) == ["1.weight", "3.weight", "3.bias"]
        return Seen(dict.fromkeys(params, lambda v: v))

    optimizer = NewtonOptimizer(model, blocks)
    before = values(model)
    batch = batches()[0]
    backward(model, batch)
    model[3].weight.grad = None
    optimizer.step(batch)
    changed = [name for name, p in values(model).items() if not torch.equal(p, before[name])]
    assert changed == looked_up == ["1.weight", "3.bias"]


def test_schedulers_change_the_step() -> None:
    model, optimizer, _ = made(lr=0.4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    before, batch = values(model), batches()[0]
    backward(model, batch)
    optimizer.step(batch)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.2
    first = {name: p - before[name] for name, p in values(model).items()}
    model.load_state_dict(before)
    backward(model, batch)
    optimizer.step(batch)
    for name, p in values(model).items():
        torch.testing.assert_close(p - before[name], first[name] / 2)


def test_state_goes_through_a_file(tmp_path: Path) -> None:
    model, optimizer, _ = made(lr=0.3, alpha=0.2)
    batch = batches()[0]
    backward(model, batch)
    optimizer.step(batch)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    _, other, _ = made()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    group = other.param_groups[0]
    assert (group["lr"], group["alpha"], group["step"]) == (0.3, 0.2, 1)
    assert other.matvecs == optimizer.matvecs > 0


def test_blocks_are_made_before_any_parameter_moves() -> None:
    model, optimizer, _ = made(lr=0.5, alpha=0.1)
    same, whole, _ = made(lr=0.5, alpha=0.1)
    same.load_state_dict(model.state_dict())
    group = optimizer.param_groups[0]
    optimizer.param_groups[:] = [
        {**group, "params": group["params"][part], "param_names": group["param_names"][part]}
        for part in (slice(0, 2), slice(2, 4))
    ]
    batch = batches()[0]
    for net, method in ((model, optimizer), (same, whole)):
        backward(net, batch)
        method.step(batch)
    pairs = zip(values(model).values(), values(same).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert optimizer.matvecs == whole.matvecs


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="lr=-1.0"):
        made(lr=-1.0)
    with pytest.raises(ValueError, match="alpha=2.0"):
        made(alpha=2.0)
    with pytest.raises(ValueError, match="requires_grad_"):
        NewtonOptimizer(nn.Identity(), lambda params, batch: {})
    with pytest.raises(TypeError, match="blocks must be a function"):
        NewtonOptimizer(nn.Linear(1, 1), {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 2),
    ],
    ids=["to zero", "from zero"],
)
def test_a_learning_rate_of_zero_moves_nothing(scheduler: Any) -> None:
    model, optimizer, _ = made(lr=0.5, alpha=0.1)
    schedule = scheduler(optimizer)
    for batch in batches():
        before = values(model)
        backward(model, batch)
        optimizer.step(batch)
        still = all(torch.equal(before[name], leaf) for name, leaf in values(model).items())
        assert still == (optimizer.param_groups[0]["lr"] == 0)
        schedule.step()
