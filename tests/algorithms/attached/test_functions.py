import math

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc import attached
from hessfunc.trees import leaves
from tests.algorithms.attached.problem import (
    ALONG,
    BATCH,
    LOSS,
    PARAMS,
    N,
    dense_slope,
    matrix,
    slope,
)
from tests.reference import block_like, directional_derivative, flat, rows

B = {"first": torch.ones(4, 3).double(), "second": torch.linspace(-1, 1, 12).double().view(3, 4)}
WEIGHTS = torch.linspace(1, 2, N, dtype=torch.float64)
FUNCTIONS = {
    "exp(-x)": lambda x: torch.exp(-x),
    "resolvent": lambda x: 1 / (x + 30),
    "square root": lambda x: torch.sqrt(x + 30),
    "square": torch.square,
}


def dense(f, A: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(A)
    return (vectors * f(values)) @ vectors.T


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_derivative_of_a_matrix_function(name: str) -> None:
    f = FUNCTIONS[name]
    found = slope(lambda matvec: attached.function(matvec, f, B, steps=N), WEIGHTS)
    wanted = dense_slope(lambda A: dense(f, A) @ flat(B), WEIGHTS)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_its_value_and_its_derivative_along_the_vector() -> None:
    params = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    b = {name: leaf.clone().requires_grad_() for name, leaf in B.items()}
    matvec = hf.hvp(LOSS, differentiable=True)(params, BATCH)
    found = attached.function(matvec, torch.exp, b, steps=N)
    wanted = dense(torch.exp, matrix(PARAMS))
    torch.testing.assert_close(flat(found).detach(), wanted @ flat(B), rtol=1e-9, atol=1e-9)
    slopes = torch.autograd.grad(flat(found) @ WEIGHTS, leaves(b))
    torch.testing.assert_close(flat(slopes), wanted @ WEIGHTS, rtol=1e-9, atol=1e-9)


def test_few_steps_suffice_for_a_smooth_function() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.exp(-x / 4)

    found = slope(lambda matvec: attached.function(matvec, f, B, steps=14), WEIGHTS)
    wanted = dense_slope(lambda A: dense(f, A) @ flat(B), WEIGHTS)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_polynomial_is_exact_up_to_the_number_of_steps() -> None:
    def cubic(x: Tensor) -> Tensor:
        return x**3 - 2 * x

    found = slope(lambda matvec: attached.function(matvec, cubic, B, steps=4), WEIGHTS)
    wanted = dense_slope(lambda A: dense(cubic, A) @ flat(B), WEIGHTS)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def probes(count: int, seed: int) -> Tensor:
    return rows(hf.random_like(PARAMS, count, kind="sphere", seed=seed))


def test_log_determinants() -> None:
    shift = 30.0
    z = probes(4, seed=5)
    one = torch.ones(1, dtype=torch.float64)

    def estimate(A: Tensor) -> Tensor:
        return ((z @ dense(lambda x: torch.log(x + shift), A)) * z).sum(1).mean()

    found = slope(
        lambda matvec: attached.logdet(
            matvec, PARAMS, damping=shift, probes=4, steps=N, seed=5
        ).reshape(1),
        one,
    )
    torch.testing.assert_close(found, dense_slope(estimate, one), rtol=1e-8, atol=1e-8)


def test_the_mean_over_all_unit_vectors_is_the_log_determinant() -> None:
    """The derivative of log det(A + s I) is tr((A + s I)^-1 dA)."""
    shift, one = 30.0, torch.ones(1, dtype=torch.float64)
    eye = shift * torch.eye(N, dtype=torch.float64)
    found = slope(
        lambda matvec: attached.logdet(
            matvec, PARAMS, damping=shift, probes=200, steps=4, seed=0
        ).reshape(1),
        one,
    )
    wanted = dense_slope(lambda A: torch.logdet(A + eye), one)
    # The standard deviation of other seeds is 8 %.
    assert abs(float(found - wanted)) < 0.2 * abs(float(wanted))


def test_the_value_is_that_of_quadrature() -> None:
    params = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    matvec = hf.hvp(LOSS, differentiable=True)(params, BATCH)
    value = attached.trace_of_function(matvec, torch.square, PARAMS, probes=3, steps=2, seed=1)
    z = probes(3, seed=1)
    torch.testing.assert_close(
        value.detach(), (z @ matrix(PARAMS)).square().sum(1).mean(), rtol=1e-9, atol=1e-9
    )


def test_an_indefinite_matrix_has_no_log_determinant() -> None:
    params = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    matvec = hf.hvp(LOSS, differentiable=True)(params, BATCH)
    assert float(torch.linalg.eigvalsh(matrix(PARAMS))[0]) < 0
    with pytest.raises(ValueError, match="damping"):
        attached.logdet(matvec, PARAMS, probes=1, steps=N, seed=0)
    with pytest.raises(ValueError, match="not finite"):
        attached.function(matvec, torch.log, B, steps=N)


def test_second_derivatives_and_constants_are_refused() -> None:
    params = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    value = attached.logdet(
        hf.hvp(LOSS, differentiable=True)(params, BATCH),
        PARAMS, damping=30.0, probes=1, steps=3, seed=0,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(value, leaves(params), create_graph=True)
    with pytest.raises(ValueError, match="differentiable=True"):
        attached.logdet(
            hf.hvp(LOSS)(PARAMS, BATCH), PARAMS, damping=30.0, probes=1, steps=3, seed=0
        )


def test_equal_eigenvalues() -> None:
    """Divided differences become derivatives where eigenvalues coincide."""

    def loss(params: Tensor, batch: Tensor) -> Tensor:
        return (batch * params**4).sum() / 12 + params.prod()

    at = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    batch = torch.ones(3, dtype=torch.float64)
    b = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)

    def exponential(params: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(torch.func.hessian(loss)(params, batch)) @ b

    params = at.clone().requires_grad_()
    matvec = hf.hvp(loss, differentiable=True)(params, batch)
    found = attached.function(matvec, torch.exp, b, steps=3)
    (slopes,) = torch.autograd.grad(found.sum(), params)
    along = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    wanted = directional_derivative(exponential, at, along).sum()
    torch.testing.assert_close((slopes * along).sum(), wanted, rtol=1e-8, atol=1e-8)
    assert math.isfinite(float(found.detach().sum()))


def test_the_problem_is_the_one_of_the_other_tests() -> None:
    assert block_like(PARAMS, torch.eye(N)).keys() == ALONG.keys()
