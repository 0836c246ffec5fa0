from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.results import Solution
from hessfunc.algorithms.solve import cg as module
from hessfunc.algorithms.solve import solver
from hessfunc.algorithms.solve.cg import cg
from hessfunc.algorithms.solve.system import Steps, System
from tests.reference.spectra import counted, symmetric

SPECTRUM = torch.logspace(-2, 1, 80).double()
MATRIX = symmetric(SPECTRUM)
B = torch.randn(80, generator=torch.Generator().manual_seed(1)).double()


def made(system: System, steps: Steps[Any]) -> Any:
    return solver.together([steps], system.products)[0]


def residual(matrix: Tensor, b: Tensor, x: Tensor) -> float:
    return float((b.double() - matrix.double() @ x.double()).norm())


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_solves_to_closed_form(damping: float) -> None:
    found = cg(hf.dense(MATRIX), B, damping=damping, rtol=1e-12)
    damped = MATRIX + damping * torch.eye(80).double()
    torch.testing.assert_close(found.x, torch.linalg.solve(damped, B), rtol=0, atol=1e-8)
    assert found.converged
    assert found.reason == "converged: the residual is within the tolerance"
    assert found.negative_curvature is None
    assert found.residual == pytest.approx(residual(damped, B, found.x), rel=1e-2)


@pytest.mark.parametrize("rtol", [0.5, 1e-2, 1e-6])
def test_residual_is_the_measured_one_and_every_product_is_counted(rtol: float) -> None:
    matvec, calls = counted(MATRIX)
    found = cg(matvec, B, rtol=rtol)
    assert found.residual == pytest.approx(residual(MATRIX, B, found.x), rel=1e-6)
    assert found.residual <= rtol * B.norm()
    assert found.matvecs == sum(calls) == found.passes


@pytest.mark.parametrize("rtol", [0.5, 0.1, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_last_product_is_saved_where_rounding_is_small(rtol: float, dtype: torch.dtype) -> None:
    # Four distinct eigenvalues: residuals of 0.7, 0.4, 0.13 and rounding, none near a tolerance.
    matrix, b = symmetric(torch.tensor([1.0, 2.0, 5.0, 10.0]).repeat(20)).to(dtype), B.to(dtype)
    measured = cg(hf.dense(matrix), b, rtol=rtol)
    found = cg(hf.dense(matrix), b, rtol=rtol, measure=False)
    assert found.matvecs == measured.matvecs - 1
    assert torch.equal(found.x, measured.x)
    assert found.converged
    assert found.reason == "converged: the residual of the recurrence is within the tolerance"
    assert residual(matrix, b, found.x) <= found.residual <= rtol * float(b.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_residual_that_is_not_measured_is_a_bound(dtype: torch.dtype) -> None:
    saved = 0
    for seed in range(30):
        spectrum = torch.logspace(-(seed % 5), 0, 60).double()
        matrix = symmetric(spectrum, seed).to(dtype)
        b = torch.randn(60, generator=torch.Generator().manual_seed(seed)).to(dtype)
        # The matrix is that of the rounded entries; each product is rounded once.
        matvec = hf.batched(lambda v, matrix=matrix: (matrix.double() @ v.double()).to(v.dtype))
        rtol = 10.0 ** -(1 + seed % 6)
        found = cg(matvec, b, rtol=rtol, measure=False, max_matvecs=300)
        if "of the recurrence" in found.reason:
            assert residual(matrix, b, found.x) <= found.residual <= rtol * float(b.double().norm())
            saved += 1
    assert saved >= {torch.float64: 24, torch.float32: 12, torch.bfloat16: 0}[dtype]


def test_where_rounding_hides_the_tolerance_a_product_is_made_all_the_same() -> None:
    matrix, b = symmetric(torch.logspace(-4, 1, 80)).float(), B.float()
    found = cg(hf.dense(matrix), b, rtol=1e-5, measure=False, max_matvecs=5000)
    assert not found.reason.startswith("converged: the residual of the recurrence")
    assert found.residual == pytest.approx(residual(matrix, b, found.x), rel=0.2)


def test_atol() -> None:
    found = cg(hf.dense(MATRIX), B, rtol=0.0, atol=0.1)
    assert found.converged
    assert 1e-3 < found.residual <= 0.1
    assert cg(hf.dense(MATRIX), B, atol=100.0).matvecs == 0


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-10])
def test_takes_no_more_products_than_scipy(rtol: float) -> None:
    # Rounding delays either, by the more the larger the condition number is.
    matrix = symmetric(torch.linspace(0.5, 10, 80))
    calls: list[int] = []

    def product(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        calls.append(1)
        return matrix.numpy() @ v

    operator = scipy.sparse.linalg.LinearOperator((80, 80), matvec=product, dtype=float)
    scipy.sparse.linalg.cg(operator, B.numpy(), rtol=rtol)
    found = cg(hf.dense(matrix), B, rtol=rtol)
    assert found.converged
    assert found.matvecs <= 1.1 * len(calls) + 2


def test_jacobi_preconditioner_takes_fewer_products() -> None:
    scales = torch.logspace(-2, 2, 80).double()
    matrix = scales[:, None] * (symmetric(torch.linspace(1, 2, 80))) * scales
    diagonal = matrix.diagonal() + 1e-3
    plain = cg(hf.dense(matrix), B, damping=1e-3, rtol=1e-8, max_matvecs=5000)
    fast = cg(
        hf.dense(matrix),
        B,
        damping=1e-3,
        rtol=1e-8,
        preconditioner=lambda block: block / diagonal,
    )
    assert plain.converged
    assert fast.converged
    assert fast.matvecs < plain.matvecs / 5
    damped = matrix + 1e-3 * torch.eye(80).double()
    assert residual(damped, B, fast.x) <= 1e-8 * B.norm()


def test_preconditioner_that_is_the_inverse_takes_one_step() -> None:
    inverse = torch.linalg.inv(MATRIX)
    found = cg(hf.dense(MATRIX), B, preconditioner=hf.dense((inverse + inverse.mT) / 2), rtol=1e-10)
    assert found.matvecs == 2
    assert found.converged


def test_negative_curvature_is_named_with_a_direction_that_has_it() -> None:
    spectrum = torch.cat([torch.tensor([-2.0, -0.5]), torch.linspace(0.5, 10, 78)]).double()
    matrix = symmetric(spectrum)
    found = cg(hf.dense(matrix), {"w": B}, damping=0.1)
    assert not found.converged
    p = found.negative_curvature["w"]
    assert float(p.norm()) == pytest.approx(1)
    curvature = float(p @ matrix @ p + 0.1 * p @ p)
    assert curvature < -1e-3
    assert f"negative curvature: a unit p has p'(A + damping I)p = {curvature:.3g}" in found.reason
    assert f"raise the damping above {0.1 - curvature:.3g} at least" in found.reason
    # x is the last iterate before p: the quadratic model has only gone down.
    x = found.x["w"]
    assert float(x @ matrix @ x / 2 + 0.05 * x @ x - x @ B) < 0
    damped = matrix + 0.1 * torch.eye(80).double()
    assert found.residual == pytest.approx(residual(damped, B, x), rel=1e-6)


def test_negative_curvature_at_once_leaves_x_at_the_start() -> None:
    found = cg(lambda block: -block, B)
    assert found.negative_curvature is not None
    assert not found.x.any()
    # The residual at zero is b, at no product.
    assert found.matvecs == 1
    assert found.residual == pytest.approx(float(B.norm()))


def test_enough_damping_cures_negative_curvature() -> None:
    spectrum = torch.cat([torch.tensor([-2.0]), torch.linspace(0.5, 10, 79)]).double()
    found = cg(hf.dense(symmetric(spectrum)), B, damping=2.5)
    assert found.converged
    assert found.negative_curvature is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_curvature_is_named(dtype: torch.dtype) -> None:
    spectrum = torch.cat([torch.zeros(5), torch.linspace(1, 2, 75)])
    found = cg(hf.dense(symmetric(spectrum).to(dtype)), B.to(dtype))
    assert not found.converged
    assert found.reason.startswith("zero curvature, up to rounding")
    p = found.negative_curvature.double()
    assert abs(float(p @ symmetric(spectrum) @ p)) < 60 * torch.finfo(dtype).eps
    assert found.residual < B.norm()


def test_zero_matrix() -> None:
    found = cg(lambda block: 0 * block, B)
    assert found.reason.startswith("zero curvature")
    assert not found.x.any()


def test_singular_but_compatible_system_is_solved() -> None:
    matrix = symmetric(torch.cat([torch.zeros(5), torch.linspace(1, 20, 75)]))
    found = cg(hf.dense(matrix), matrix @ B, rtol=1e-10)
    assert found.converged
    torch.testing.assert_close(found.x, torch.linalg.pinv(matrix) @ matrix @ B, atol=1e-8, rtol=0)


@pytest.mark.parametrize("rtol", [0.0, 1e-12])
def test_tolerance_that_rounding_hides_is_said(rtol: float) -> None:
    matrix = MATRIX.float()
    found = cg(hf.dense(matrix), B.float(), rtol=rtol)
    assert not found.converged
    assert "the rounding of the products hides the tolerance" in found.reason
    assert "take a looser rtol, or float64" in found.reason
    assert found.matvecs < 400
    # It is as good as float32 gets: eps times the condition number.
    assert residual(matrix, B.float(), found.x) < 1e-4 * B.norm()
    assert found.residual == pytest.approx(residual(matrix, B.float(), found.x), rel=0.5)


def test_residual_of_rounding_alone_is_not_sought_for_ever() -> None:
    # x = b / 3 is rounded, by less than eps |b|.
    found = cg(lambda block: 3 * block, B, rtol=0.0)
    assert found.reason.startswith("the rounding of the products hides the tolerance")
    assert 0 < found.residual < 1e-15 * B.norm()
    assert found.matvecs == 2


def test_recurrence_that_ends_worse_than_it_began_is_undone() -> None:
    system = System.each(hf.dense(MATRIX), B, 0.0, None, 1e-8, 0.0)[0]
    begun = module._State(
        **vars(made(system, system.begin(0.1 * system.b))), direction=system.b, nearest=system.b
    )
    worse = replace(begun, x=10 * system.b, measured=False, inexact=True, again=True)
    ended = made(system, solver._measure(system, worse))
    assert torch.equal(ended.x, begun.x)
    assert torch.equal(ended.residual, begun.residual)
    assert ended.length == begun.length
    # It would go the same way again.
    assert ended.stopped


def test_residual_is_never_worse_than_at_a_restart() -> None:
    # After a restart only rounding is left, along null vectors too, and steps would be endless.
    spectrum = torch.cat([torch.zeros(20), torch.linspace(0.1, 1, 60)])
    matrix = symmetric(spectrum).float()
    b = (matrix.double() @ B).float()
    met = cg(hf.dense(matrix), b, rtol=1e-6)
    assert met.converged
    found = cg(hf.dense(matrix), b, rtol=3e-8)
    assert not found.converged
    assert found.residual < 3e-6 * b.norm()


@pytest.mark.parametrize("largest", [1.0, 2.0, 10.0])
@pytest.mark.parametrize("null", [3e-7, 2e-6])
def test_b_that_is_off_the_range_by_rounding_alone(largest: float, null: float) -> None:
    diagonal = torch.cat([torch.zeros(5), torch.linspace(1, largest, 75)])
    b = diagonal * B.float()
    b[0] = null * b.norm()
    found = cg(lambda block: block * diagonal, b, rtol=1e-9)
    assert found.reason.startswith("the rounding of the products hides the tolerance")
    # Later iterates run away along the null vectors.
    assert found.residual < 3 * null * b.norm()
    assert found.x.norm() < 2 * B.norm()


def test_bfloat16_residual_is_that_of_the_x_returned() -> None:
    matrix = symmetric(torch.linspace(1, 3, 80)).float()

    def matvec(block: Tensor) -> Tensor:
        return (block.float() @ matrix).bfloat16()

    b = B.bfloat16()
    found = cg(matvec, b, damping=20.0, rtol=0.05)
    assert found.converged
    assert found.x.dtype == torch.bfloat16
    actual = (b.float() - matvec(found.x[None])[0].float() - 20 * found.x.float()).norm()
    assert found.residual == pytest.approx(float(actual), rel=1e-5)


def test_budget_that_just_suffices() -> None:
    needed = cg(hf.dense(MATRIX), B).matvecs
    assert cg(hf.dense(MATRIX), B, max_matvecs=needed).converged
    assert not cg(hf.dense(MATRIX), B, max_matvecs=needed - 1).converged


def test_callback_sees_progress_and_stops() -> None:
    seen: list[Solution] = []

    def callback(running: Solution) -> bool:
        seen.append(running)
        return len(seen) == 3

    found = cg(hf.dense(MATRIX), B, callback=callback)
    assert found.reason == "stopped by the callback"
    assert [running.matvecs for running in seen] == sorted({r.matvecs for r in seen})
    assert not any(running.converged for running in seen)
    assert len(seen) == 3
    # One more product measures the residual.
    assert found.matvecs == seen[-1].matvecs + 1
    assert found.residual == pytest.approx(residual(MATRIX, B, found.x), rel=1e-9)


def test_a_state_is_all_that_a_run_goes_on_from() -> None:
    system = System.each(hf.dense(MATRIX), B, 0.0, None, 1e-8, 0.0)[0]
    begun = made(system, system.begin(None))
    state = module._State(**vars(begun), direction=begun.x, nearest=begun.x)
    states = [state]
    for _ in range(9):
        states.append(made(system, module._iterate(system, states[-1])))
    saved = {name: _copied(value) for name, value in vars(states[4]).items()}
    resumed = module._State(**saved)
    fresh = System.each(hf.dense(MATRIX), B, 0.0, None, 1e-8, 0.0)[0]
    for _ in range(5):
        resumed = made(fresh, module._iterate(fresh, resumed))
    assert torch.equal(resumed.x, states[9].x)
    assert resumed.length == states[9].length
    assert torch.equal(states[0].x, torch.zeros_like(states[0].x))


def _copied(value: Any) -> Any:
    assert value is None or isinstance(value, (Tensor, float, int, bool, str, tuple))
    return value.clone() if isinstance(value, Tensor) else value


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_scale_does_not_matter(factor: float) -> None:
    plain = cg(hf.dense(MATRIX), B)
    scaled = cg(hf.dense(MATRIX * factor), B * factor**0.5)
    assert scaled.matvecs == plain.matvecs
    torch.testing.assert_close(scaled.x * factor**0.5, plain.x, rtol=1e-6, atol=0)


def test_b_that_requires_a_gradient() -> None:
    assert not cg(hf.dense(MATRIX), B.clone().requires_grad_()).x.requires_grad


def test_product_that_is_not_finite() -> None:
    with pytest.raises(FloatingPointError, match="NaN or infinite, at w"):
        cg(lambda block: {"w": block["w"] * math.nan}, {"w": B})


def test_preconditioner_is_not_counted() -> None:
    system = System.each(hf.dense(MATRIX), B, 0.0, lambda block: block, 1e-3, 0.0)[0]
    assert isinstance(system.preconditioner, Products)
    matvec, calls = counted(MATRIX)
    preconditioner, applied = counted(torch.eye(80).double())
    found = cg(matvec, B, preconditioner=preconditioner)
    assert found.matvecs == sum(calls)
    assert applied
