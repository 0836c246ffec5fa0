"""Power iteration with deflation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hessfunc.compat.eigenthings import (
    LambdaOperator,
    deflated_power_iteration,
    lanczos,
    power_iteration,
)
from tests.compat.eigenthings.problem import matrix, operator


def test_power_iteration_descends_and_lanczos_ascends() -> None:
    for mode, expected, options in [
        ("power_iter", [5, 3, 2, -4], {"power_iter_steps": 300, "power_iter_err_threshold": 1e-5}),
        ("lanczos", [-4, 2, 3, 5], {}),
    ]:
        algorithm: Callable[..., Any] = {
            "power_iter": deflated_power_iteration,
            "lanczos": lanczos,
        }[mode]
        values, vectors = algorithm(operator(), 4, **options)
        assert isinstance(values, np.ndarray)
        assert vectors.shape == (4, 8)
        np.testing.assert_allclose(values, expected, rtol=1e-4)
        images = vectors @ matrix().numpy()
        np.testing.assert_allclose(images, values[:, None] * vectors, atol=1e-3)
        # Neither is a view that torch refuses.
        assert torch.from_numpy(vectors).dtype == torch.float32


def test_vectors_may_stay_tensors() -> None:
    values, vectors = deflated_power_iteration(operator(), 2, power_iter_steps=300, to_numpy=False)
    assert isinstance(values, Tensor)
    assert isinstance(vectors, Tensor)


@pytest.mark.parametrize("momentum", [0.5, 3.0])
def test_momentum_does_not_move_the_value(momentum: float) -> None:
    value, vector = power_iteration(operator(), 300, 1e-6, momentum)
    assert value == pytest.approx(5.0, rel=1e-5)
    residual = matrix().float() @ vector - value * vector
    assert float(residual.norm()) <= 1e-5 * 5


@pytest.mark.filterwarnings("ignore:.*have not converged")
def test_momentum_saves_products() -> None:
    close = torch.diag(torch.tensor([1.0, 0.99, 0.5, 0.3, 0.2, 0.1, 0.05, 0.01]))
    start = torch.ones(8)
    plain, fast = (
        power_iteration(operator(close), 100, 1e-6, momentum, init_vec=start)[0]
        for momentum in (0.0, 0.99**2 / 4)
    )
    assert abs(fast - 1) < abs(plain - 1) / 10


def test_runs_start_from_init_vec() -> None:
    start = torch.arange(1.0, 9.0)
    for run in (
        lambda op: power_iteration(op, 100, init_vec=start),
        lambda op: lanczos(op, 2, init_vec=start.numpy()),
    ):
        seen: list[Tensor] = []

        def noted(vector: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(vector.clone())
            return matrix().float() @ vector

        run(LambdaOperator(noted, 8))
        torch.testing.assert_close(seen[0], start / start.norm())


def test_the_threshold_is_one_of_the_residual() -> None:
    for threshold in (1e-1, 1e-3, 1e-5):
        value, vector = power_iteration(operator(), 1000, threshold)
        residual = matrix().float() @ vector - value * vector
        assert float(residual.norm()) <= 1.01 * threshold * abs(value) + 1e-6


@pytest.mark.filterwarnings("ignore:.*have not converged")
def test_the_seed_is_that_of_torch() -> None:
    def run() -> Any:
        return deflated_power_iteration(operator(), 2, power_iter_steps=3)[0]

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    np.testing.assert_array_equal(run(), first)
    assert not np.array_equal(first, second)
