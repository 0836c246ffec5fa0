from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hessfunc.optim import (
    CombinedNorm,
    InfinityNorm,
    LargestNorm,
    PreconditionedNorm,
    Preconditioner,
    SpectralNorm,
)

D = torch.float64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def rotated() -> Preconditioner:
    Q = torch.linalg.qr(random(3, 3))[0]
    return Preconditioner(torch.rand(3, 2, dtype=D) + 0.1, (Q, None))


def test_powers_are_those_of_the_dense_matrix() -> None:
    P = rotated()
    Q = torch.kron(P.bases[0].contiguous(), torch.eye(2, dtype=D))
    dense = Q @ torch.diag(P.entries.flatten()) @ Q.mT
    rows = random(4, 3, 2)
    torch.testing.assert_close(P.power(rows, 1.0).flatten(1), rows.flatten(1) @ dense)
    torch.testing.assert_close(
        P.scaled(2.0).power(rows, -1.0).flatten(1), rows.flatten(1) @ torch.linalg.inv(2 * dense)
    )


PARTS = {
    "infinity": LargestNorm({"w": InfinityNorm(0.5), "b": InfinityNorm(2.0)}),
    "spectral": LargestNorm({"w": SpectralNorm(1.5), "b": InfinityNorm()}),
    "preconditioned": PreconditionedNorm({"w": rotated(), "b": Preconditioner(torch.ones(4))}),
    "combined": CombinedNorm(
        [
            (0.3, LargestNorm({"w": SpectralNorm()})),
            (2.0, PreconditionedNorm({"b": Preconditioner(torch.full((4,), 3.0))})),
        ]
    ),
}


def length(name: str, d: dict[str, Tensor]) -> float:
    """Return the norm of a direction by its definition."""
    w, b = d["w"], d["b"]
    largest, singular = b.abs().max(), torch.linalg.svdvals(w)[0]
    match name:
        case "infinity":
            return max(float(w.abs().max() / 0.5), float(largest / 2))
        case "spectral":
            return max(float(singular / 1.5), float(largest))
        case "preconditioned":
            P = PARTS[name].preconditioner["w"]  # type: ignore[union-attr]
            return float((w * P.power(w[None], 1.0)[0]).sum() + b @ b) ** 0.5
    return float(0.3 * singular**2 + 6 * b @ b) ** 0.5


@pytest.mark.parametrize("name", PARTS)
def test_the_maximiser_reaches_the_dual_norm_on_the_unit_ball(name: str) -> None:
    norm: Any = PARTS[name]
    block = {"w": random(5, 3, 2), "b": random(5, 4)}
    dual, best = norm(block)
    for i in range(5):
        y = {key: leaf[i] for key, leaf in block.items()}
        d = {key: leaf[i] for key, leaf in best.items()}
        assert length(name, d) == pytest.approx(1)
        assert float(sum((y[key] * d[key]).sum() for key in y)) == pytest.approx(float(dual[i]))
        for seed in range(20):
            other = {"w": random(3, 2, seed=seed), "b": random(4, seed=seed)}
            inner = float(sum((y[key] * other[key]).sum() for key in y))
            assert inner <= float(dual[i]) * length(name, other) * (1 + 1e-12)


def test_a_parameter_may_be_a_scalar() -> None:
    y = torch.tensor([2.0, -3.0], dtype=D)
    for norm in (LargestNorm({"w": InfinityNorm()}), PreconditionedNorm({"w": scalar()})):
        dual, best = norm({"w": y})
        torch.testing.assert_close(dual, y.abs())
        torch.testing.assert_close(best["w"], y.sign())


def scalar() -> Preconditioner:
    return Preconditioner(torch.ones((), dtype=D))


@pytest.mark.parametrize("name", ["preconditioned", "combined"])
def test_zero_has_the_maximiser_zero(name: str) -> None:
    norm: Any = PARTS[name]
    dual, best = norm({"w": torch.zeros(1, 3, 2, dtype=D), "b": torch.zeros(1, 4, dtype=D)})
    assert float(dual) == 0
    assert all(bool(leaf.isfinite().all()) for leaf in best.values())
