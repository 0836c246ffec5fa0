"""Steps of optimisers on quadratics w'Hw / 2, with their preconditioners frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import hessfunc as hf
from hessfunc.optim import Stability

# State that is a momentum, which moves with the parameters. All other state is frozen.
MOMENTA = ("momentum_buffer", "exp_avg")
SHAPES = {"weight": (3, 2), "bias": (2,)}


class Quadratic(nn.Module):
    """Parameters of a quadratic with its minimum at ``offset``."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset
        for name, shape in shapes.items():
            start = torch.full(shape, offset, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(start))

    def flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters()]) - self.offset

    def put(self, flat: Tensor, into: str = "data") -> None:
        """Set the parameters, or their gradients, to a flat vector."""
        at = 0
        for p in self.parameters():
            part = flat[at : at + p.numel()].view_as(p)
            at += p.numel()
            if into == "grad":
                p.grad = part.clone()
            else:
                p.data.copy_(part + self.offset)


def positive(n: int, seed: int = 0) -> Tensor:
    """Return a positive definite matrix."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return A @ A.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)


def warmed(
    model: Quadratic, make: Callable[..., Optimizer], steps: int, seed: int = 1
) -> Optimizer:
    """Return an optimiser after steps with random gradients, at the minimum, without momentum."""
    optimizer = make(model)
    generator = torch.Generator().manual_seed(seed)
    n = len(model.flat())
    sizes = torch.rand(n, generator=generator, dtype=torch.float64) + 0.2
    for _ in range(steps):
        draw = torch.randn(n, generator=generator, dtype=torch.float64)
        model.put(sizes * draw, "grad")
        optimizer.step()
    model.put(torch.zeros(n, dtype=torch.float64))
    still(optimizer)
    return optimizer


def still(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for key in MOMENTA:
            if isinstance(state.get(key), Tensor):
                state[key].zero_()


def preconditioned(stable: Stability, model: nn.Module, H: Tensor) -> Tensor:
    """Return the dense matrix P^-1/2 (H + W) P^-1/2."""
    like = {name: p.detach() for name, p in model.named_parameters()}
    unit = hf.unravel(torch.eye(len(H), dtype=H.dtype), like)
    rows = torch.cat(
        [x.flatten(1) for x in stable.preconditioned(hf.dense(H))(unit).values()], dim=1
    )
    torch.testing.assert_close(rows, rows.mT)
    return rows


def scaled_to(stable: Stability, model: nn.Module, H: Tensor, ratio: float) -> Tensor:
    """Return the multiple of H whose sharpness is ratio times the threshold."""
    # The weight decay W is there without H.
    W = preconditioned(stable, model, 0 * H)
    slope = preconditioned(stable, model, H) - W

    def is_below(multiple: float) -> bool:
        return float(torch.linalg.eigvalsh(W + multiple * slope)[-1]) < ratio * stable.threshold

    low, high = 0.0, 1.0
    while is_below(high):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return high * H


def growth(model: Quadratic, optimizers: Sequence[Optimizer], H: Tensor, steps: int = 400) -> float:
    """Return the factor by which a small displacement grows, with frozen preconditioners."""
    generator = torch.Generator().manual_seed(2)
    start = 1e-12 * torch.randn(len(H), generator=generator, dtype=H.dtype)
    model.put(start)
    for optimizer in optimizers:
        still(optimizer)
    frozen = [(_frozen(o), [group.get("step") for group in o.param_groups]) for o in optimizers]
    for _ in range(steps):
        model.put(H @ model.flat(), "grad")
        for optimizer, (states, counts) in zip(optimizers, frozen, strict=True):
            optimizer.step()
            for p, kept in states.items():
                optimizer.state[p].update(_copied(kept))
            for group, count in zip(optimizer.param_groups, counts, strict=True):
                if count is not None:
                    group["step"] = count
    return float(model.flat().norm() / start.norm())


def _frozen(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    return {p: _copied(state) for p, state in optimizer.state.items()}


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in state.items()
        if key not in MOMENTA
    }


def assert_diverges_at_the_threshold(
    model: Quadratic, optimizers: Sequence[Optimizer], seed: int = 0
) -> None:
    """Assert that a displacement shrinks 1 % below the threshold, and grows 1 % above it."""
    stable = hf.stability(optimizers, model)
    H = positive(len(model.flat()), seed)
    assert growth(model, optimizers, scaled_to(stable, model, H, 0.99)) < 1
    assert growth(model, optimizers, scaled_to(stable, model, H, 1.01)) > 10
