from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms.functions import product as module
from tests.reference.spectra import counted, orthogonal, symmetric

N = 120
SPECTRA = {
    "outliers": torch.cat(
        [torch.linspace(0.01, 0.06, N - 4), torch.tensor([3.0, 9.0, 20.0, 50.0])]
    ),
    "decay": 1 / torch.arange(1.0, N + 1),
    "wide": torch.logspace(-2, 1, N),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "log": torch.log,
    "exp": lambda x: torch.exp(-3 * x),
    "relu": lambda x: (x - 0.5).clamp_min(0),
}
B = torch.randn(3, N, generator=torch.Generator().manual_seed(1)).double()


def matrix_of(values: Tensor) -> Tensor:
    return symmetric(values.double())


def reference(matrix: Tensor, f: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return ((rows @ vectors) * f(values)) @ vectors.mT


@pytest.mark.parametrize("basis_size", [None, 12])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("f", FUNCTIONS)
def test_agrees_with_the_eigendecomposition(spectrum: str, f: str, basis_size: int | None) -> None:
    matrix = matrix_of(SPECTRA[spectrum])
    found = hf.function(hf.dense(matrix), FUNCTIONS[f], B[0], rtol=1e-10, basis_size=basis_size)
    wanted = reference(matrix, FUNCTIONS[f], B[0])
    assert float((found.value - wanted).norm()) <= 1e-9 * float(wanted.norm())


@pytest.mark.parametrize("basis_size", [None, 12])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("f", ["sqrt", "rsqrt", "log", "exp"])
def test_the_error_lies_between_its_bounds(spectrum: str, f: str, basis_size: int | None) -> None:
    values = SPECTRA[spectrum].double()
    matrix = matrix_of(values)
    wanted = reference(matrix, FUNCTIONS[f], B)
    for rtol in (1e-1, 1e-3, 1e-6):
        found = hf.function(
            hf.dense(matrix),
            FUNCTIONS[f],
            B,
            like=B[0],
            rtol=rtol,
            smallest=0.99 * float(values.min()),
            largest=1.01 * float(values.max()),
            basis_size=basis_size,
        )
        errors = (found.value - wanted).norm(dim=1)
        assert found.converged
        assert bool((found.bounds[:, 0] <= errors).all())
        assert bool((errors <= found.errors).all())
        # The bound is no more than 2 decimal digits above the error, beyond rounding.
        assert bool((found.errors <= 100 * errors + 1e-9).all())
        assert bool((found.errors <= rtol * found.value.norm(dim=1)).all())


def test_a_basis_that_does_not_fit_costs_a_second_pass() -> None:
    matvec, calls = counted(matrix_of(SPECTRA["wide"]))
    whole = hf.function(matvec, torch.sqrt, B, like=B[0], rtol=1e-5, smallest=0.0)
    assert whole.matvecs == sum(whole.steps) == sum(calls)
    calls.clear()
    found = hf.function(matvec, torch.sqrt, B, like=B[0], rtol=1e-5, smallest=0.0, basis_size=10)
    assert found.matvecs == sum(calls)
    assert found.passes == len(calls) == 2 * max(found.steps) - 10
    torch.testing.assert_close(found.value, whole.value, rtol=0, atol=1e-3)


def test_one_call_serves_all_vectors_that_have_not_stopped() -> None:
    matrix = matrix_of(SPECTRA["wide"])
    values, vectors = torch.linalg.eigh(matrix)
    block = torch.stack([vectors[:, 0], torch.zeros(N).double(), B[0]])
    matvec, calls = counted(matrix)
    found = hf.function(matvec, torch.log, block, like=B[0], rtol=1e-4)
    assert calls[:3] == [2, 1, 1]
    assert found.steps[:2] == (1, 0)
    torch.testing.assert_close(found.value[0], values[0].log() * vectors[:, 0], rtol=0, atol=1e-10)
    assert not found.value[1].any()
    assert found.reasons[1] == "converged: b is zero"
    assert found.reason == "converged: all 3 errors are within their tolerances"


def test_an_exhausted_krylov_space_is_exact() -> None:
    matrix = matrix_of(torch.tensor([0.5, 2.0, 7.0]).repeat(N // 3))
    found = hf.function(hf.dense(matrix), torch.sign, B[0], rtol=1e-12)
    assert found.matvecs <= 3
    step = hf.function(hf.dense(matrix), lambda x: (x > 1).double(), B[0], rtol=1e-12)
    assert step.steps == (3,)
    wanted = reference(matrix, lambda x: (x > 1).double(), B[0])
    torch.testing.assert_close(step.value, wanted, rtol=0, atol=1e-10)


def test_samples_have_the_covariance_of_the_matrix() -> None:
    matrix = matrix_of(torch.linspace(1, 3, 20))
    # The sample covariance of these vectors is the identity.
    z = math.sqrt(20) * orthogonal(20, seed=1)
    samples = hf.function(hf.dense(matrix), torch.sqrt, z, like=z[0], rtol=1e-8).value
    torch.testing.assert_close(samples.mT @ samples / 20, matrix, rtol=0, atol=1e-6)
    whitened = hf.function(hf.dense(matrix), torch.rsqrt, samples, like=z[0], rtol=1e-8).value
    torch.testing.assert_close(whitened, z, rtol=0, atol=1e-6)


def test_gradient_flow_on_a_quadratic() -> None:
    matrix, time = matrix_of(SPECTRA["decay"]), 3.0
    found = hf.function(hf.dense(matrix), lambda x: torch.exp(-time * x), B[0], rtol=1e-10)
    steps = 3000
    euler = B[0].clone()
    for _ in range(steps):
        # Midpoint rule for dx/dt = -A x.
        euler = euler - time / steps * (euler - time / steps / 2 * euler @ matrix) @ matrix
    torch.testing.assert_close(found.value, euler, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("f", "options", "message"),
    [
        (torch.log, {}, "f is not finite at the Ritz value -"),
        (torch.sqrt, {"smallest": 0.0}, "smallest=0.0: a Ritz value lies at -"),
        (torch.abs, {"largest": 1.0}, "largest=1.0: a Ritz value lies at"),
        (torch.abs, {"basis_size": 1}, "basis_size"),
        (lambda x: x.sum()[None].expand(3), {}, "acts element by element"),
    ],
)
def test_bad_functions_and_options(f: Any, options: dict[str, Any], message: str) -> None:
    matrix = matrix_of(torch.linspace(-1, 2, N))
    with pytest.raises(ValueError, match=message):
        hf.function(hf.dense(matrix), f, B[0], **options)


def test_a_semi_definite_matrix_has_a_square_root_down_to_rounding() -> None:
    factor = torch.randn(8, N, generator=torch.Generator().manual_seed(2)).double()
    matrix = factor.mT @ factor
    found = hf.function(hf.dense(matrix), torch.sqrt, B[0], smallest=0.0, rtol=1e-6)
    values, vectors = torch.linalg.eigh(matrix)
    wanted = ((B[0] @ vectors) * values.clamp_min(0).sqrt()) @ vectors.mT
    torch.testing.assert_close(found.value, wanted, rtol=0, atol=1e-5)
    assert float((found.value - wanted).norm()) <= found.error


def test_an_end_at_which_f_is_infinite_is_named() -> None:
    matrix = matrix_of(SPECTRA["decay"])
    found = hf.function(hf.dense(matrix), torch.rsqrt, B[0], smallest=0.0, max_matvecs=10)
    assert not found.converged
    assert found.error == math.inf
    assert "f is not finite in [0," in found.reason
    assert "budget exhausted after 10 matvecs" in found.reason


def test_the_budget_includes_the_second_pass() -> None:
    matrix = matrix_of(SPECTRA["wide"])
    for budget in (20, 31, 50):
        matvec, calls = counted(matrix)
        found = hf.function(
            matvec, torch.log, B, like=B[0], rtol=1e-12, basis_size=5, max_matvecs=budget
        )
        assert found.matvecs == sum(calls) <= budget
        assert budget - found.matvecs < 6
        assert not found.converged
        wanted = reference(matrix, torch.log, B)
        assert bool(((found.value - wanted).norm(dim=1) <= found.errors).all())


def test_rounding_that_hides_the_tolerance_is_named() -> None:
    matrix = matrix_of(SPECTRA["wide"]).float()
    found = hf.function(hf.dense(matrix), torch.log, B[0].float(), rtol=1e-7)
    assert not found.converged
    assert "rounding of the products hides the tolerance" in found.reason
    wanted = reference(matrix.double(), torch.log, B[0].float().double())
    assert float((found.value - wanted).norm()) <= found.error


def test_products_that_change_between_the_passes_are_refused() -> None:
    matrix = matrix_of(SPECTRA["wide"])
    matvec, calls = counted(matrix)
    steps = hf.function(matvec, torch.sqrt, B[0], smallest=0.0, basis_size=5).steps[0]

    def drifting(block: Tensor) -> Tensor:
        calls.append(1)
        return block @ matrix * (1.0 if len(calls) <= steps else 1.01)

    calls.clear()
    with pytest.raises(ValueError, match="not deterministic"):
        hf.function(drifting, torch.sqrt, B[0], smallest=0.0, basis_size=5)


def test_a_callback_sees_values_with_their_errors() -> None:
    matrix = matrix_of(SPECTRA["wide"])
    wanted = reference(matrix, torch.sqrt, B[0])
    seen: list[hf.results.MatrixFunction] = []
    found = hf.function(
        hf.dense(matrix), torch.sqrt, B[0], smallest=0.0, basis_size=20, callback=seen.append
    )
    assert len(seen) > 5
    assert max(one.steps[0] for one in seen) == 20
    assert all(float((one.value - wanted).norm()) <= one.error for one in seen)
    assert found.steps[0] > 20


@pytest.mark.parametrize("basis_size", [None, 6])
def test_a_resumed_run_gives_the_same_bits(tmp_path: Path, basis_size: int | None) -> None:
    matrix = matrix_of(SPECTRA["wide"])
    options: dict[str, Any] = {"like": B[0], "smallest": 0.0, "basis_size": basis_size}
    whole = hf.function(hf.dense(matrix), torch.sqrt, B, **options)
    first = hf.function(
        hf.dense(matrix),
        torch.sqrt,
        B,
        **options,
        callback=lambda found: found.matvecs > 60,
        checkpoint=tmp_path,
    )
    assert not first.converged
    again = hf.function(hf.dense(matrix), torch.sqrt, B, **options, checkpoint=tmp_path)
    assert torch.equal(again.value, whole.value)
    assert again.steps == whole.steps


def test_memory_limits_the_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = matrix_of(SPECTRA["wide"])
    monkeypatch.setattr(module, "available_to", lambda space: 3 * 8 * N * 7)
    found = hf.function(hf.dense(matrix), torch.sqrt, B[0], smallest=0.0, rtol=1e-4)
    assert found.matvecs == 2 * found.steps[0] - 7


def test_trees_keep_their_structure(tmp_path: Path) -> None:
    tree = {"a": torch.ones(2, 3).double(), "b": torch.zeros(4).double()}
    found = hf.function(lambda block: {k: 4 * v for k, v in block.items()}, torch.sqrt, tree)
    torch.testing.assert_close(found.value, {k: 2 * v for k, v in tree.items()})
    found.save(tmp_path / "found.npz")
    loaded = hf.load(tmp_path / "found.npz")
    assert isinstance(loaded, hf.results.MatrixFunction)
    torch.testing.assert_close(loaded.value, found.value)
    assert "converged=True" in repr(loaded)
