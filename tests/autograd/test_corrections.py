"""Functions whose derivatives in torch are wrong, in every mode of a Hessian product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from tests.reference import hessian, matrix, relative_error

MODES = ("reverse", "forward", "difference")
N = 4
ROOT = torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SYMMETRIC = ROOT @ ROOT.T + N * torch.eye(N, dtype=torch.float64)
# Its triangles differ.
RAW = SYMMETRIC + 0.1 * ROOT
LOWER = torch.linalg.cholesky(SYMMETRIC) + ROOT.triu(1)
RIGHT = torch.linspace(0.3, 1.7, 2 * N, dtype=torch.float64).view(N, 2)


def weighted(y: Tensor) -> Tensor:
    w = torch.linspace(0.3, 1.7, y.numel(), dtype=y.dtype).view(y.shape)
    return (w * (y + 0.3 * y * y)).sum()


def by_logsumexp(x: Tensor) -> Tensor:
    return torch.stack([x[..., : j + 1].logsumexp(-1) for j in range(x.shape[-1])], -1)


@pytest.mark.parametrize("n", [1, 5, 64, 150])
def test_logcumsumexp_of_any_length_has_the_derivatives_of_its_definition(n: int) -> None:
    params = {"x": 3 * torch.randn(2, n, dtype=torch.float64)}
    v = hf.random_like(params, 1, seed=0)
    expected = torch.func.jvp(
        torch.func.grad(lambda x: weighted(by_logsumexp(x))), (params["x"],), (v["x"][0],)
    )[1]
    for mode in ("reverse", "forward"):
        curvature = hf.hvp(lambda p, b: weighted(p["x"].logcumsumexp(1)), mode=mode)
        assert relative_error(curvature(params, None)(v)["x"][0], expected) < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_logcumsumexp_is_curved_where_the_residual_vanishes(mode: Any) -> None:
    params = {"w": ROOT[0]}
    X = torch.randn(9, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = torch.logcumsumexp(X @ params["w"], 0)

    def loss(accumulate: Callable[[Tensor], Tensor]) -> hf.Loss:
        return hf.composed(
            lambda p, b: accumulate(b[0] @ p["w"]),
            torch.nn.functional.mse_loss,
            targets=lambda b: b[1],
        )

    of_torch = loss(lambda x: torch.logcumsumexp(x, 0))
    expected = hessian(loss(by_logsumexp), params, (X, targets))
    found = matrix(hf.hvp(of_torch, mode=mode)(params, (X, targets)), params)
    assert relative_error(found, expected) < (1e-5 if mode == "difference" else 1e-10)
    ggn = matrix(hf.ggnvp(of_torch)(params, (X, targets)), params)
    assert relative_error(ggn, expected) < 1e-10


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "inverse": (torch.cholesky_inverse, lambda L: torch.linalg.inv(L.tril() @ L.tril().mT)),
    "inverse, upper": (
        lambda L: L.mT.cholesky_inverse(upper=True),
        lambda L: torch.linalg.inv(L.tril() @ L.tril().mT),
    ),
    "solve": (
        lambda L: torch.cholesky_solve(RIGHT, L),
        lambda L: torch.linalg.solve(L.tril() @ L.tril().mT, RIGHT),
    ),
    "solve, upper": (
        lambda L: RIGHT.cholesky_solve(L.mT, upper=True),
        lambda L: torch.linalg.solve(L.tril() @ L.tril().mT, RIGHT),
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_a_cholesky_factor_read_one_triangle(name: str, mode: Any) -> None:
    of, definition = FUNCTIONS[name]
    params = {"L": LOWER}
    assert relative_error(of(LOWER), definition(LOWER)) < 1e-12
    found = matrix(hf.hvp(lambda p, b: weighted(of(p["L"])), mode=mode)(params, None), params)
    expected = hessian(lambda p, b: weighted(definition(p["L"])), params, None)
    assert relative_error(found, expected) < (1e-5 if mode == "difference" else 1e-10)


OF_SYMMETRIC: dict[str, Callable[[Tensor], Tensor]] = {
    "cholesky": torch.linalg.cholesky,
    "cholesky, upper": lambda A: torch.linalg.cholesky(A, upper=True),
    "cholesky_ex": lambda A: torch.linalg.cholesky_ex(A).L,
    "eigvalsh": torch.linalg.eigvalsh,
    "eigvalsh, upper": lambda A: torch.linalg.eigvalsh(A, UPLO="U"),
    "eigvalsh, lower case": lambda A: torch.linalg.eigvalsh(A, "u"),
    "eigh": lambda A: torch.linalg.eigh(input=A).eigenvalues,
    "normal": lambda A: torch.distributions.MultivariateNormal(
        RIGHT[:, 0], covariance_matrix=A, validate_args=False
    ).log_prob(RIGHT[:, 1]),
}


@pytest.mark.parametrize("point", [SYMMETRIC, RAW], ids=["symmetric", "raw"])
@pytest.mark.parametrize("mode", ["forward", "difference"])
@pytest.mark.parametrize("name", OF_SYMMETRIC)
def test_functions_of_symmetric_matrices_have_one_hessian(
    name: str, mode: Any, point: Tensor
) -> None:
    params = {"A": point}

    def loss(p: Any, _: None) -> Tensor:
        return weighted(OF_SYMMETRIC[name](p["A"]))

    expected = matrix(hf.hvp(loss, mode="reverse")(params, None), params)
    found = matrix(hf.hvp(loss, mode=mode)(params, None), params)
    assert relative_error(found, expected) < (1e-5 if mode == "difference" else 1e-10)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_logcumsumexp_may_begin_with_entries_that_are_minus_infinity(mode: Any) -> None:
    params = {"x": 3 * ROOT[0]}
    padding = torch.full((130,), -torch.inf, dtype=torch.float64)

    def loss(p: Any, _: None) -> Tensor:
        return weighted(torch.cat([padding, p["x"]]).logcumsumexp(0)[130:])

    expected = hessian(lambda p, b: weighted(by_logsumexp(p["x"])), params, None)
    assert relative_error(matrix(hf.hvp(loss, mode=mode)(params, None), params), expected) < 1e-10


INDEX = torch.tensor([0, 1, 1, 3])


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize(
    ("function", "advice"),
    [
        (lambda x: torch.scatter_reduce(x[0], 0, INDEX, x[1], reduce="prod"), "mode='reverse'"),
        (lambda x: x[0].clone().scatter_reduce_(0, INDEX, x[1], "prod"), "mode='reverse'"),
        (lambda x: torch.triangular_solve(RIGHT, x)[0], "torch.linalg.solve_triangular"),
    ],
)
def test_derivatives_that_only_forward_mode_gets_wrong_are_refused_there(
    function: Callable[[Tensor], Tensor], advice: str
) -> None:
    params = {"x": RAW}

    def loss(p: Any, _: None) -> Tensor:
        return weighted(function(p["x"]))

    with pytest.raises(NotImplementedError, match=advice):
        hf.hvp(loss, mode="forward")(params, None)
    found = matrix(hf.hvp(loss)(params, None), params)
    nearly = matrix(hf.hvp(loss, mode="difference")(params, None), params)
    assert relative_error(found, nearly) < 1e-5


class _Doubled(torch.autograd.Function):
    """2 x, with a gradient that takes the logarithm of its cotangent."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g.abs().log().exp() * g.sign()


def test_jacobians_are_those_of_gradients_that_are_not_differentiable_at_zero() -> None:
    params = {"w": ROOT[0]}
    loss = hf.composed(
        lambda p, b: _Doubled.apply(p["w"]),  # type: ignore[no-untyped-call]
        torch.nn.functional.mse_loss,
        targets=lambda b: b,
    )
    found = matrix(hf.ggnvp(loss)(params, torch.zeros(N).double()), params)
    assert relative_error(found, 8 / N * torch.eye(N, dtype=torch.float64)) < 1e-12
