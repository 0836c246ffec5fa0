"""Products are counted, and refused where they are wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.algorithms.products import Products
from hessfunc.numerics import NonFiniteError


def test_product_that_is_not_finite_names_the_leaf() -> None:
    def matvec(block: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": block["a"], "b": block["b"] * float("nan")}

    with pytest.raises(NonFiniteError, match="NaN or infinite, at b"):
        hf.lanczos(matvec, {"a": torch.zeros(3), "b": torch.zeros(4)}, k=1)


def test_finite_products_whose_sum_overflows_are_let_through() -> None:
    products = Products.of(lambda block: torch.full_like(block, 3e38), torch.zeros(9))
    assert bool(products(torch.ones(1, 9)).isfinite().all())


def test_a_matvec_that_works_in_place_is_refused() -> None:
    with pytest.raises(ValueError, match="changes its block in place: return a new one"):
        hf.lanczos(lambda block: block.mul_(2), torch.zeros(9), k=1)


def test_a_tree_without_entries_is_refused() -> None:
    with pytest.raises(ValueError, match="no entries"):
        hf.xtrace(lambda block: block, torch.zeros(0, 3))


SPECTRUM = torch.cat([torch.tensor([9.0, 6.0, 4.0]), torch.linspace(0.1, 1, 37)]).double()
ROTATION = torch.linalg.qr(hf.random_like(torch.zeros(40).double(), 40, kind="normal", seed=1))[0]
MATRIX = (ROTATION * SPECTRUM) @ ROTATION.mT
CONSTANT = hf.random_like(torch.zeros(40).double(), 1, kind="sphere", seed=2)[0]
NOT_LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "a constant": lambda v: v @ MATRIX + CONSTANT,
    "a damping that is added to each entry": lambda v: v @ MATRIX + 0.5,
    "a gradient at v": lambda v: v @ MATRIX + v**3 + CONSTANT,
    "a large step": lambda v: ((CONSTANT + v) ** 3 - CONSTANT**3) + v @ MATRIX,
    "unit products": lambda v: torch.nn.functional.normalize(v @ MATRIX),
    "a division by the length": lambda v: torch.nn.functional.normalize(v) @ MATRIX,
    "a product with the length": lambda v: (v @ MATRIX) * v.norm(dim=1, keepdim=True),
    "clipping": lambda v: (v @ MATRIX).clamp(-0.3, 0.3),
    "absolute values": lambda v: (v @ MATRIX).abs(),
    "the largest entries": lambda v: torch.where((v @ MATRIX).abs() > 0.3, v @ MATRIX, 0.0),
}
LIKE = torch.zeros(40).double()
ALGORITHMS: dict[str, Callable[[Any], Any]] = {
    "lanczos": lambda f: hf.lanczos(f, LIKE, k=2, seed=0),
    "lanczos, blocks": lambda f: hf.lanczos(f, LIKE, k=2, block_size=2, seed=0),
    "nearest": lambda f: hf.lanczos(f, LIKE, k=1, which="nearest", sigma=5.0, seed=0),
    "power_iteration": lambda f: hf.power_iteration(f, LIKE, max_matvecs=60, seed=0),
    "trace": lambda f: hf.trace(f, LIKE, rtol=0.05, max_matvecs=36, seed=0),
    "hutchpp": lambda f: hf.hutchpp(f, LIKE, max_matvecs=36, seed=0),
    "xtrace": lambda f: hf.xtrace(f, LIKE, max_matvecs=30, seed=0),
    "xnystrace": lambda f: hf.xnystrace(f, LIKE, max_matvecs=30, seed=0),
    "diagonal": lambda f: hf.diagonal(f, LIKE, max_matvecs=30, seed=0),
    "xdiag": lambda f: hf.xdiag(f, LIKE, max_matvecs=30, seed=0),
    "slq": lambda f: hf.slq(f, LIKE, probes=2, steps=10, seed=0),
    "function": lambda f: hf.function(f, torch.exp, CONSTANT, max_matvecs=30),
    "cg": lambda f: hf.cg(f, CONSTANT, damping=5.0, max_matvecs=60),
    "minres": lambda f: hf.minres(f, CONSTANT, max_matvecs=60),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_algorithm_that_compares_inner_products_takes_a_matvec_that_is_not_linear(
    algorithm: str,
) -> None:
    run = ALGORITHMS[algorithm]
    run(lambda v: v @ MATRIX)
    for fault, matvec in NOT_LINEAR.items():
        # Solvers and power iteration may also stop, since they measure their residuals.
        outcome = outcome_of(run, matvec)
        assert "not linear" in outcome or (
            algorithm in ("power_iteration", "cg", "minres") and "converged" not in outcome
        ), f"{fault}: {outcome}"


def outcome_of(run: Callable[[Any], Any], matvec: Callable[[Tensor], Tensor]) -> str:
    """Return the reason of a run, or the message of its error."""
    try:
        return str(run(matvec).reason)
    except ValueError as error:
        return str(error)


def test_factors_of_rows_change_no_bit_of_a_linear_matvec() -> None:
    rows = hf.random_like(LIKE, 5, kind="normal", seed=3)
    seen = list[Tensor]()

    def matvec(block: Tensor) -> Tensor:
        seen.append(block.clone())
        return block @ MATRIX

    products = Products.of(matvec, LIKE)
    expected = rows @ MATRIX
    assert all(torch.equal(products(rows), expected) for _ in range(2))
    first, second = (block / rows for block in seen)
    torch.testing.assert_close(first[:, 0], torch.tensor([1.0, -2, 1, -2, 1]).double())
    torch.testing.assert_close(second[:, 0], torch.tensor([-4.0, 1, -4, 1, -4]).double())


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "hutchinson"])
@pytest.mark.parametrize("size", [1e-300, 1e120])
def test_scales_whose_squares_underflow_or_overflow_are_refused(
    algorithm: str, size: float
) -> None:
    run = (ALGORITHMS | {"hutchinson": lambda f: hf.hutchinson(f, LIKE, seed=0)})[algorithm]
    with pytest.raises(ValueError, match=r"squares (under|over)flow: pass `hessfunc.matvecs.scale"):
        run(lambda v: (v @ MATRIX) * size)
    run(lambda v: (v @ MATRIX) * size / size)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_scales_whose_squares_underflow_or_overflow_in_float32_are_refused(size: float) -> None:
    with pytest.raises(ValueError, match=r"squares (under|over)flow"):
        hf.trace(lambda v: (v @ MATRIX.float()) * size, LIKE.float(), max_matvecs=30, seed=0)
    pair = hf.lanczos(lambda v: (v @ MATRIX.float()) * size, LIKE.float(), k=1, seed=0)
    assert float(pair.values[0]) == pytest.approx(9 * size, rel=1e-3)


def test_a_matrix_of_any_scale_is_materialised() -> None:
    tiny = hf.matrix(lambda v: (v @ MATRIX) * 1e-200, LIKE)
    torch.testing.assert_close(tiny * 1e200, MATRIX)


@pytest.mark.parametrize(
    "algorithm",
    [hf.lanczos, hf.power_iteration, hf.hutchinson, hf.xtrace, hf.xdiag, hf.slq, hf.cg, hf.minres],
)
def test_algorithms_are_refused_inside_of_transforms(algorithm: Callable[..., Any]) -> None:
    matrix = torch.diag(torch.arange(1.0, 5.0, dtype=torch.float64))

    def value(scale: Tensor) -> Tensor:
        algorithm(lambda block: scale * block @ matrix, torch.ones(4, dtype=torch.float64))
        return scale

    with pytest.raises(NotImplementedError, match=r"hf\.attached"):
        torch.func.grad(value)(torch.ones((), dtype=torch.float64))
