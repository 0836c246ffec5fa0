from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Muon, Optimizer

import hessfunc as hf
from hessfunc.optim import LargestNorm
from tests.optim.stability.others import Lion, SignSGD, SingleDeviceMuonWithAuxAdam
from tests.optim.stability.quadratics import Quadratic, positive

D = torch.float64
# Coefficients with which the Newton-Schulz iteration converges to the orthogonal factor.
EXACT = {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 40}
OF_AUTHOR = {"use_muon": True, "weight_decay": 0.0}


def brute(H: Tensor) -> Tensor:
    """Return the maximiser of d'Hd over the corners of the cube."""
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(H))), dtype=D)
    return corners[(corners @ H * corners).sum(1).argmax()]


def kronecker(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return A x B, and the maximiser of <X, AXB> over |X| <= 1 in the spectral norm.

    For diagonal A and B with sorted entries, it is the identity matrix (von Neumann 1937).
    """
    a = torch.linspace(2.0, 0.5, rows, dtype=D)
    b = torch.linspace(3.0, 0.2, columns, dtype=D)
    return torch.diag(torch.kron(a, b)), torch.eye(rows, columns, dtype=D).flatten()


def step_at(model: Quadratic, optimizer: Optimizer, H: Tensor, d: Tensor, ratio: float) -> None:
    """Make a step with the learning rate whose threshold is 1 / ratio of the sharpness d'Hd."""
    model.put(H @ model.flat(), "grad")
    stable = hf.stability(optimizer, model)
    assert isinstance(stable.norm, LargestNorm)
    radius = stable.norm.norms["weight"].radius
    decay = (stable.weight_decay or {"weight": 0.0})["weight"]
    sharpness = radius**2 * float(d @ H @ d + decay * d @ d)
    for group in optimizer.param_groups:
        group["lr"] *= ratio * stable.threshold / sharpness
    assert hf.stability(optimizer, model).threshold == pytest.approx(sharpness / ratio)
    optimizer.step()


def growth(make: Any, H: Tensor, d: Tensor, shape: Any, start: Tensor, ratio: float) -> float:
    model = Quadratic({"weight": shape})
    model.put(start)
    optimizer = make(model.parameters())
    for _ in range(200):
        step_at(model, optimizer, H, d, ratio)
    return float(model.flat().norm() / start.norm())


SIGNS: list[Callable[..., Optimizer]] = [
    partial(SignSGD, lr=0.1),
    partial(SignSGD, lr=0.1, momentum=0.9),
    partial(SignSGD, lr=0.1, weight_decay=2.0, weight_decouple=False),
    partial(Lion, lr=0.1),
    partial(Lion, lr=0.1, betas=(0.5, 0.6)),
]


@pytest.mark.parametrize("make", SIGNS, ids=lambda m: f"{m.func.__name__} {m.keywords}")
def test_steepest_descent_along_signs_diverges_at_the_threshold(make: Any) -> None:
    H = positive(6)
    d = brute(H + (2.0 if "weight_decay" in make.keywords else 0.0) * torch.eye(6, dtype=D))
    assert growth(make, H, d, (6,), d, 0.99) < 1
    assert growth(make, H, d, (6,), d, 1.01) > 10


@pytest.mark.parametrize(
    "make",
    [
        partial(Muon, lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0, **EXACT),
        partial(Muon, lr=0.1, momentum=0.9, nesterov=False, weight_decay=0.0, **EXACT),
        partial(Muon, lr=0.1, momentum=0.95, weight_decay=0.0, **EXACT),
        partial(Muon, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", **EXACT),
        lambda p: SingleDeviceMuonWithAuxAdam(
            [{"params": list(p), "lr": 0.1, "momentum": 0.95, **OF_AUTHOR}]
        ),
    ],
    ids=["plain", "average", "Nesterov", "match_rms_adamw", "author"],
)
@pytest.mark.parametrize("shape", [(4, 2), (2, 3)])
def test_steepest_descent_in_the_spectral_norm_diverges_at_the_threshold(
    make: Any, shape: tuple[int, int]
) -> None:
    H, d = kronecker(*shape)
    assert growth(make, H, d, shape, d, 0.99) < 1
    assert growth(make, H, d, shape, d, 1.01) > 10


def test_below_the_threshold_steepest_descent_converges_from_anywhere() -> None:
    """Theorem 5.1 of arXiv 2603.05002, for the loss."""
    H = positive(6, seed=3)
    d = brute(H)
    for seed in range(5):
        start = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=D)
        assert growth(partial(SignSGD, lr=0.1), H, d, (6,), start, 0.99) < 0.01


@pytest.mark.parametrize("decay", [0.0, 1.5])
@pytest.mark.parametrize("make", [SignSGD, partial(Lion, betas=(0.0, 0.5))])
def test_a_step_of_fixed_length_raises_the_loss_beyond_the_threshold(
    make: Any, decay: float
) -> None:
    H = positive(6, seed=4)
    d = brute(H)
    model = Quadratic({"weight": (6,)})
    for ratio in (0.99, 1.01):
        model.put(0.3 * d)
        model.put(H @ model.flat(), "grad")
        # A step of length 2 |w| / (1 + lr decay / 2) leads to -w.
        lr = ratio * 0.6 / (1 + 0.3 * decay)
        optimizer = make(model.parameters(), lr=lr, weight_decay=decay)
        stable = hf.stability(optimizer, model)
        assert isinstance(stable.norm, LargestNorm)
        sharpness = stable.norm.norms["weight"].radius ** 2 * float(d @ H @ d)
        before = float(model.flat() @ H @ model.flat())
        optimizer.step()
        rises = float(model.flat() @ H @ model.flat()) > before
        assert rises == (ratio > 1) == (sharpness > stable.threshold)


def test_sign_descent_has_the_threshold_of_the_sum_of_the_gradient() -> None:
    model = Quadratic({"weight": (2, 2), "bias": (2,)})
    gradient = {name: torch.full_like(p, -3.0) for name, p in model.named_parameters()}
    stable = hf.stability(SignSGD(model.parameters(), lr=0.5), model, gradient=gradient)
    assert stable.threshold == pytest.approx(2 * 18 / 0.5)
    assert stable.preconditioner is None
    lion = Lion(model.parameters(), lr=0.5, betas=(0.9, 0.99))
    # At the start, the direction of Lion is 0.1 g.
    expected = (2 + 2 * 0.99) / (1 + 0.99 - 1.8) * 1.8 / 0.5
    assert hf.stability(lion, model, gradient=gradient).threshold == pytest.approx(expected)


def test_the_decay_of_lion_pytorch_may_be_by_the_initial_learning_rate() -> None:
    model = Quadratic({"weight": (4,)})
    model.put(torch.ones(4, dtype=D), "grad")
    for decoupled, rho in ((False, 0.95), (True, 0.5)):
        optimizer = Lion(
            model.parameters(), lr=0.1, weight_decay=0.5, decoupled_weight_decay=decoupled
        )
        stable = hf.stability(optimizer, model)
        assert isinstance(stable.norm, LargestNorm)
        assert stable.norm.norms["weight"].radius == pytest.approx(2 / (1 + rho))


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (None, "no gradient of 'weight'"),
        ({"weight": torch.zeros(6, dtype=D)}, "the gradient of 'weight' is zero"),
        ({"weight": torch.zeros(3, dtype=D)}, r"has shape \(3,\), the parameter \(6,\)"),
    ],
)
def test_a_step_of_fixed_length_needs_a_gradient(gradient: Any, message: str) -> None:
    model = Quadratic({"weight": (6,)})
    with pytest.raises(ValueError, match=message):
        hf.stability(SignSGD(model.parameters(), lr=0.1), model, gradient=gradient)
