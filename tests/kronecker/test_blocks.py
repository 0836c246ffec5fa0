"""Block-diagonal matrices against the dense matrix of all parameters."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import hessfunc as hf
from tests.kronecker.cases import Net, dense, net

DAMPING = 0.05


class Mixed(nn.Module):
    """Parameters with blocks of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 5))
        self.norm, self.scales = nn.LayerNorm(5), nn.Parameter(torch.randn(3, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.tanh(self.layer(x)) @ self.weight)
        return x @ self.scales.exp().T


def case() -> Net:
    return net(Mixed, 4, examples=5)


FAMILIES = {"kflr": hf.kronecker.kflr, "ekfac": hf.kronecker.ekfac}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def blocks(request: pytest.FixtureRequest) -> hf.kronecker.Blocks:
    made = case()
    curvature = request.param(made.loss, made.model, unsupported="diagonal")
    return curvature(made.params, made.batch)


def whole(blocks: hf.kronecker.Blocks) -> torch.Tensor:
    return torch.block_diag(*dense(blocks).values())


def test_names_of_diagonals(blocks: hf.kronecker.Blocks) -> None:
    assert blocks.diagonals == ("scales",)
    assert len(blocks) == 6


def test_numbers_of_the_whole_matrix(blocks: hf.kronecker.Blocks) -> None:
    matrix = whole(blocks)
    damped = matrix + DAMPING * torch.eye(len(matrix), dtype=torch.float64)
    assert blocks.trace() == pytest.approx(float(matrix.trace()), rel=1e-9)
    assert blocks.norm() == pytest.approx(float(matrix.norm()), rel=1e-9)
    assert blocks.logdet(DAMPING) == pytest.approx(float(torch.logdet(damped)), rel=1e-9)
    torch.testing.assert_close(hf.ravel(blocks.diagonal()), matrix.diagonal())
    expected = torch.linalg.eigvalsh(matrix).flip(0)
    torch.testing.assert_close(blocks.eigenvalues(), expected, rtol=1e-9, atol=1e-12)


def test_products_of_the_whole_matrix(blocks: hf.kronecker.Blocks) -> None:
    matrix, block = whole(blocks), hf.random_like(case().params, 3, seed=0)
    rows = torch.cat([leaf.flatten(1) for leaf in block.values()], 1)
    values, basis = torch.linalg.eigh(matrix + DAMPING * torch.eye(len(matrix)).double())
    products = [
        (-1, blocks.inverse_matvec(block, DAMPING)),
        (-1, blocks.inverse(DAMPING)(block)),
        (0.5, blocks.power_matvec(block, 0.5, DAMPING)),
    ]
    for exponent, product in products:
        expected = rows @ (basis * values**exponent) @ basis.mT
        made = torch.cat([leaf.flatten(1) for leaf in product.values()], 1)
        torch.testing.assert_close(made, expected, rtol=1e-8, atol=1e-10)


def test_samples_of_blocks_are_independent(blocks: hf.kronecker.Blocks) -> None:
    """The damped square root gives back the independent normal numbers of the seed."""
    samples = blocks.sample(2, DAMPING, seed=1)
    normal = hf.random_like(case().params, 2, kind="normal", seed=1)
    for name, leaf in blocks.power_matvec(samples, 0.5, DAMPING).items():
        torch.testing.assert_close(leaf, normal[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("solver", [hf.cg, hf.minres])
@pytest.mark.parametrize("method", ["exact", "factored", "heuristic"])
def test_preconditioners(blocks: hf.kronecker.Blocks, solver: Callable, method: str) -> None:
    """The blocks themselves are solved in one product, and the exact matrix in fewer."""
    made = case()
    b = torch.func.grad(made.loss)(made.params, made.batch)
    preconditioner = blocks.inverse(DAMPING, method=method)
    options = {"damping": DAMPING, "rtol": 1e-10, "max_matvecs": 500}
    solution = solver(blocks, b, preconditioner=preconditioner, **options)
    assert solution.converged
    if method == "exact":
        assert solution.matvecs <= 4
    matvec = hf.ggnvp(made.loss)(made.params, made.batch)
    assert solver(matvec, b, preconditioner=preconditioner, **options).converged


def test_saved_and_loaded_in_another_process(blocks: hf.kronecker.Blocks, tmp_path: Path) -> None:
    path = tmp_path / "blocks.npz"
    blocks.save(path)
    loaded = hf.load(path)
    assert list(loaded) == list(blocks)
    block = hf.random_like(case().params, 2, seed=0)
    for name, leaf in loaded.inverse_matvec(block, DAMPING).items():
        expected = blocks.inverse_matvec(block, DAMPING)[name]
        torch.testing.assert_close(leaf, expected, rtol=0, atol=0)
    code = f"import hessfunc as hf; print(hf.load({str(path)!r}).trace())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == blocks.trace()


@pytest.mark.parametrize("k", [0, -1])
def test_a_number_of_samples_below_one_is_refused(blocks: hf.kronecker.Blocks, k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k}: it must be at least 1"):
        blocks.sample(k, damping=1.0, seed=0)
