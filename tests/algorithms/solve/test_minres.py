from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms.results import Solution
from hessfunc.algorithms.solve import minres as module
from hessfunc.algorithms.solve.minres import minres
from hessfunc.algorithms.solve.solver import together
from hessfunc.algorithms.solve.system import Steps, System
from tests.reference.spectra import orthogonal, symmetric

POSITIVE = torch.logspace(-1, 1, 80).double()
INDEFINITE = POSITIVE * torch.tensor([1.0, -1.0]).double().repeat(40)
MATRIX = symmetric(INDEFINITE)
B = torch.randn(80, generator=torch.Generator().manual_seed(1)).double()
# Null vectors: the first five columns of the eigenbasis.
SINGULAR = torch.cat([torch.zeros(5).double(), INDEFINITE[5:]])
NULL = orthogonal(80)[:, :5]


def made(system: System, steps: Steps[Any]) -> Any:
    return together([steps], system.products)[0]


def begun(system: System) -> module._State:
    found = made(system, system.begin(None))
    x = found.x
    return module._State(**vars(found), lanczos=(x, x, x), search=(x, x))


def residual(matrix: Tensor, b: Tensor, x: Tensor) -> float:
    return float((b.double() - matrix.double() @ x.double()).norm())


@pytest.mark.parametrize("damping", [0.0, 0.3, -0.3])
@pytest.mark.parametrize("spectrum", [POSITIVE, INDEFINITE, -POSITIVE])
def test_solves_to_closed_form(spectrum: Tensor, damping: float) -> None:
    matrix = symmetric(spectrum)
    found = minres(hf.dense(matrix), B, damping=damping, rtol=1e-12)
    damped = matrix + damping * torch.eye(80).double()
    torch.testing.assert_close(found.x, torch.linalg.solve(damped, B), rtol=0, atol=1e-8)
    assert found.converged
    assert found.reason == "converged: the residual is within the tolerance"
    assert found.negative_curvature is None
    assert found.residual == pytest.approx(residual(damped, B, found.x), rel=1e-2)


@pytest.mark.parametrize("rtol", [0.5, 1e-2, 1e-6])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_residual_is_the_measured_two_norm(rtol: float, preconditioned: bool) -> None:
    scales = torch.logspace(-2, 2, 80).double()
    preconditioner = (lambda block: block * scales) if preconditioned else None
    found = minres(
        hf.dense(MATRIX), B, rtol=rtol, preconditioner=preconditioner, max_matvecs=10_000
    )
    assert found.converged
    assert found.residual == pytest.approx(residual(MATRIX, B, found.x), rel=1e-6)
    assert found.residual <= rtol * B.norm()


@pytest.mark.parametrize("preconditioned", [False, True])
def test_recurrence_of_the_residual_is_that_of_x(preconditioned: bool) -> None:
    scales = torch.logspace(-1, 1, 80).double()
    preconditioner = (lambda block: block * scales) if preconditioned else None
    system = System.each(hf.dense(MATRIX), B, 0.2, preconditioner, 1e-8, 0.0)[0]
    state = begun(system)
    damped = MATRIX + 0.2 * torch.eye(80).double()
    for _ in range(20):
        before = state.phi_bar or math.inf
        state = made(system, module._iterate(system, state))
        torch.testing.assert_close(state.residual, B - state.x @ damped, rtol=0, atol=1e-11)
        norm = (state.residual.square() * (scales if preconditioned else 1.0)).sum().sqrt()
        assert state.phi_bar == pytest.approx(float(norm), rel=1e-9)
        assert state.phi_bar <= before


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-10])
@pytest.mark.parametrize("spectrum", [POSITIVE, INDEFINITE])
def test_takes_no_more_products_than_scipy(rtol: float, spectrum: Tensor) -> None:
    matrix = symmetric(spectrum)
    lengths: list[float] = []

    def callback(x: np.ndarray[Any, Any]) -> None:
        lengths.append(residual(matrix, B, torch.from_numpy(x.copy())))

    # Its own criterion is |r| / (|A| |x|): it runs on, and its products up to ours are counted.
    scipy.sparse.linalg.minres(matrix.numpy(), B.numpy(), rtol=1e-15, callback=callback)
    needed = 1 + next(i for i, r in enumerate(lengths) if r <= rtol * B.norm())
    found = minres(hf.dense(matrix), B, rtol=rtol)
    assert found.converged
    # Rounding delays either, by a share that grows with the condition number.
    assert found.matvecs <= 1.1 * needed + 2


def test_preconditioner_takes_fewer_products() -> None:
    scales = torch.logspace(-2, 2, 80).double()
    signs = torch.tensor([1.0, -1.0]).double().repeat(40)
    matrix = scales[:, None] * symmetric(signs * torch.linspace(1, 2, 80)) * scales
    b = scales * B
    plain = minres(hf.dense(matrix), b, rtol=1e-8, max_matvecs=5000)
    fast = minres(hf.dense(matrix), b, rtol=1e-8, preconditioner=lambda block: block / scales**2)
    assert fast.converged
    assert residual(matrix, b, fast.x) <= 1e-8 * b.norm()
    assert fast.matvecs < plain.matvecs / 5


def test_eigenvector_takes_one_step() -> None:
    vector = orthogonal(80)[:, 3].contiguous()
    found = minres(hf.dense(MATRIX), vector, rtol=1e-10)
    assert found.matvecs == 2
    torch.testing.assert_close(found.x, vector / INDEFINITE[3], rtol=0, atol=1e-10)


def test_identity_ends_the_krylov_space_at_once() -> None:
    b = torch.ones(4).double()
    found = minres(lambda block: -2 * block, b, rtol=0.0)
    assert found.converged
    assert found.x.tolist() == [-0.5] * 4


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_singular_but_compatible_system_is_solved(dtype: torch.dtype, rtol: float) -> None:
    matrix = symmetric(SINGULAR).to(dtype)
    b = (matrix.double() @ B).to(dtype)
    found = minres(hf.dense(matrix), b, rtol=rtol)
    assert found.converged
    assert residual(matrix, b, found.x) <= 1.1 * rtol * b.norm()
    # From zero it is the shortest solution.
    shortest = B - NULL @ (NULL.mT @ B)
    assert (found.x.double() - shortest).norm() <= 1e3 * rtol * shortest.norm()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_singular_incompatible_system_is_said(dtype: torch.dtype, seed: int) -> None:
    matrix = symmetric(SINGULAR, seed).to(dtype)
    null = orthogonal(80, seed)[:, :5]
    found = minres(hf.dense(matrix), B.to(dtype))
    least = float((null.mT @ B).norm())
    assert not found.converged
    assert found.reason.startswith("a least-squares solution")
    assert found.residual == pytest.approx(least, rel=5e-4)
    assert found.residual == pytest.approx(residual(matrix, B, found.x), rel=1e-5)
    assert found.matvecs < 500


def test_incompatible_system_with_a_preconditioner() -> None:
    scales = torch.linspace(0.5, 2, 80).double()
    found = minres(hf.dense(symmetric(SINGULAR)), B, preconditioner=lambda block: block * scales)
    assert found.reason.startswith("a least-squares solution")
    # The least r'Mr: M r is a null vector.
    r = B - symmetric(SINGULAR) @ found.x
    assert (symmetric(SINGULAR) @ (scales * r)).norm() < 1e-6 * r.norm()


def test_start_at_a_least_squares_solution() -> None:
    x = torch.linalg.pinv(symmetric(SINGULAR)) @ B
    cold = minres(hf.dense(symmetric(SINGULAR)), B)
    found = minres(hf.dense(symmetric(SINGULAR)), B, start=x)
    assert found.reason.startswith("a least-squares solution")
    # A few steps show that only rounding is left, and how many is up to the rounding.
    assert found.matvecs < cold.matvecs / 4
    assert (found.x - x).norm() < 1e-6 * x.norm()


def test_small_incompatible_systems() -> None:
    nothing = minres(lambda block: 0 * block, B)
    assert nothing.reason.startswith("a least-squares solution")
    assert not nothing.x.any()
    diagonal = torch.tensor([1.0, 0.0]).double()
    found = minres(lambda block: diagonal * block, torch.ones(2).double())
    assert found.reason.startswith("a least-squares solution")
    assert float(found.x[0]) == pytest.approx(1)
    assert found.residual == pytest.approx(1)


@pytest.mark.parametrize("smallest", [1e-4, 1e-5])
@pytest.mark.parametrize("seed", range(5))
def test_ill_conditioned_float32_system_is_solved_not_called_incompatible(
    seed: int, smallest: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (50,), generator=generator) * 2 - 1
    sizes = torch.where(torch.rand(50, generator=generator) < 0.5, smallest, 1.0)
    diagonal = signs * sizes * (1 + 0.1 * torch.rand(50, generator=generator))
    b = torch.randn(50, generator=generator)
    found = minres(lambda block: diagonal * block, b, rtol=1e-6)
    assert found.converged


@pytest.mark.parametrize("seed", range(5))
def test_residual_along_opposite_eigenvalues_is_not_called_null(seed: int) -> None:
    # r'Ar = 0 at each step, and |A r| is small next to |A| |r|.
    half = torch.logspace(-4, 0, 25)
    diagonal = torch.cat([half, -half])
    b = torch.randn(25, generator=torch.Generator().manual_seed(seed)).repeat(2)
    found = minres(lambda block: diagonal * block, b, rtol=1e-6, max_matvecs=600)
    assert "least-squares" not in found.reason


@pytest.mark.parametrize("spectrum", [POSITIVE, INDEFINITE, SINGULAR])
def test_tolerance_that_rounding_hides_is_said(spectrum: Tensor) -> None:
    matrix = symmetric(spectrum).float()
    b = (matrix.double() @ B).float()
    found = minres(hf.dense(matrix), b, rtol=1e-12, max_matvecs=5000)
    assert not found.converged
    assert "the rounding of the products hides the tolerance" in found.reason
    assert residual(matrix, b, found.x) < 1e-5 * b.norm()


@pytest.mark.parametrize("seed", range(3))
def test_residual_is_never_worse_than_at_a_restart(seed: int) -> None:
    b = torch.randn(80, generator=torch.Generator().manual_seed(seed))
    matrix = symmetric(torch.logspace(-7, 0, 80), seed).float()
    found = minres(hf.dense(matrix), b, max_matvecs=600)
    assert found.residual < b.norm()


def test_callback_sees_progress_and_stops() -> None:
    seen: list[Solution] = []

    def callback(running: Solution) -> bool:
        seen.append(running)
        return len(seen) == 3

    found = minres(hf.dense(MATRIX), B, callback=callback)
    assert found.reason == "stopped by the callback"
    lengths = [running.residual for running in seen]
    assert lengths == sorted(lengths, reverse=True)
    assert found.matvecs == seen[-1].matvecs + 1
    assert found.residual == pytest.approx(residual(MATRIX, B, found.x), rel=1e-9)


def test_a_state_is_all_that_a_run_goes_on_from() -> None:
    def system() -> System:
        return System.each(hf.dense(MATRIX), B, 0.0, None, 1e-8, 0.0)[0]

    state = begun(system())
    states = [state]
    for _ in range(9):
        states.append(made(one := system(), module._iterate(one, states[-1])))
    for value in vars(states[4]).values():
        assert isinstance(value, (Tensor, float, int, bool, str, tuple, type(None)))
    resumed = module._State(**vars(states[4]))
    for _ in range(5):
        resumed = made(one := system(), module._iterate(one, resumed))
    assert torch.equal(resumed.x, states[9].x)
    assert resumed.phi_bar == states[9].phi_bar
