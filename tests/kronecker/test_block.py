"""Blocks against their dense matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.kronecker import (
    Block,
    Congruence,
    Dense,
    DiagonalBlock,
    DirectSum,
    Eigenbasis,
    Joint,
    Kronecker,
    Permuted,
)
from hessfunc.kronecker.linear_maps import Layout


def matrix(*batch: int, n: int, seed: int, positive: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(*batch, n, n, generator=generator, dtype=torch.float64)
    return root @ root.mT / n if positive else (root + root.mT) / 2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shared(groups: int, outputs: int, fan_in: int, positions: int, examples: int = 1) -> Congruence:
    hessian = matrix(n=groups * outputs * positions, seed=3, positive=False)
    inputs = random(examples, groups, fan_in, positions)
    return Congruence(hessian, inputs, torch.Size((groups * outputs, fan_in)))


def rotation(*batch: int, n: int) -> Tensor:
    return torch.linalg.eigh(matrix(*batch, n=n, seed=7)).eigenvectors


BLOCKS: dict[str, Block] = {
    "dense": Dense(matrix(n=6, seed=0, positive=False), torch.Size((2, 3))),
    "kronecker": Kronecker(matrix(1, n=3, seed=1), matrix(1, n=4, seed=2), torch.Size((3, 4))),
    "kronecker, indefinite": Kronecker(
        matrix(1, n=3, seed=1, positive=False), matrix(1, n=4, seed=2), torch.Size((3, 4))
    ),
    "kronecker, groups": Kronecker(
        matrix(2, n=3, seed=1), matrix(2, n=4, seed=2), torch.Size((6, 2, 2))
    ),
    "eigenbasis": Eigenbasis(
        rotation(2, n=3), rotation(2, n=4), random(2, 3, 4).square(), torch.Size((6, 4))
    ),
    "diagonal factors": Kronecker(
        random(2, 3, seed=4).exp(), matrix(2, n=2, seed=2), torch.Size((6, 2))
    ),
    "diagonal": DiagonalBlock(random(2, 3), torch.Size((2, 3))),
    "permuted": Permuted(
        Kronecker(matrix(2, n=3, seed=1), matrix(2, n=4, seed=2), torch.Size((2, 3, 4))),
        Layout((2, 2, 3, 2), (0, 2, 1, 3)),
        torch.Size((4, 3, 2)),
    ),
    "joint": Joint(
        Kronecker(matrix(1, n=3, seed=1), matrix(1, n=5, seed=2), torch.Size((1, 3, 5))),
        Layout((1, 3, 4)),
        torch.Size((15,)),
    ),
    "rank one": shared(1, 3, 4, 1),
    "few positions": shared(2, 3, 4, 2),
    "many positions": shared(2, 2, 2, 5),
    "each example": shared(2, 2, 3, 2, examples=3),
    "direct sum": DirectSum(
        (
            Kronecker(matrix(1, n=2, seed=1), matrix(1, n=4, seed=2), torch.Size((2, 4))),
            shared(1, 3, 4, 1),
        ),
        torch.Size((5, 4)),
    ),
}


@pytest.fixture(params=BLOCKS.values(), ids=BLOCKS.keys())
def block(request: pytest.FixtureRequest) -> Block:
    return request.param


def test_products_are_those_of_the_dense_matrix(block: Block) -> None:
    vectors = random(4, *block.shape)
    expected = vectors.flatten(1) @ block.dense()
    torch.testing.assert_close(block.matvec(vectors).flatten(1), expected)


def test_dense_matrix_is_symmetric(block: Block) -> None:
    torch.testing.assert_close(block.dense(), block.dense().mT)


def test_trace(block: Block) -> None:
    assert block.trace() == pytest.approx(float(block.dense().trace()), rel=1e-12)


@pytest.mark.parametrize("damping", [100.0, 1e-3, -0.01])
def test_inverse_times_the_matrix_is_the_identity(block: Block, damping: float) -> None:
    vectors = random(3, *block.shape)
    there = block.matvec(vectors) + damping * vectors
    torch.testing.assert_close(block.inverse_matvec(there, damping), vectors, rtol=1e-8, atol=1e-8)


def damped(block: Block, damping: float) -> Tensor:
    return block.dense() + damping * torch.eye(block.n, dtype=torch.float64)


def definite(block: Block) -> float:
    """A damping with which the block is positive definite."""
    return 1 - float(torch.linalg.eigvalsh(block.dense())[0])


def test_diagonal_norm_and_eigenvalues(block: Block) -> None:
    exact = block.dense()
    torch.testing.assert_close(block.diagonal().flatten(), exact.diagonal())
    assert block.diagonal().shape == block.shape
    assert block.norm() == pytest.approx(float(torch.linalg.matrix_norm(exact)), rel=1e-12)
    expected = torch.linalg.eigvalsh(exact).flip(0)
    torch.testing.assert_close(block.eigenvalues(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("exponent", [0.5, -0.5, -1, 2, 0, 1.7])
def test_powers(block: Block, exponent: float) -> None:
    damping, vectors = definite(block), random(3, *block.shape)
    values, basis = torch.linalg.eigh(damped(block, damping))
    expected = vectors.flatten(1) @ (basis * values**exponent) @ basis.mT
    found = block.power_matvec(vectors, exponent, damping)
    torch.testing.assert_close(found.flatten(1), expected)


def test_powers_without_damping() -> None:
    singular, indefinite = BLOCKS["rank one"], BLOCKS["dense"]
    vectors = random(2, *singular.shape)
    squared = singular.power_matvec(vectors, 2)
    torch.testing.assert_close(squared, singular.matvec(singular.matvec(vectors)))
    with pytest.raises(ValueError, match="singular up to rounding"):
        singular.power_matvec(vectors, -1)
    with pytest.raises(ValueError, match="not positive definite"):
        indefinite.power_matvec(random(1, *indefinite.shape), 0.5)


@pytest.mark.parametrize("method", ["exact", "factored", "heuristic"])
@pytest.mark.parametrize("damping", [100.0, 0.3])
def test_methods_of_damping(block: Block, method: str, damping: float) -> None:
    if isinstance(block, DirectSum):
        expected = torch.block_diag(*(inverse(part, method, damping) for part in block.parts))
    elif isinstance(block, Joint | Permuted):
        inner = inverse(block.inner, method, damping)
        order = (
            torch.arange(block.n).view(2, 2, 3, 2).permute(0, 2, 1, 3)
            if isinstance(block, Permuted)
            else torch.cat([torch.arange(12).view(3, 4), torch.arange(12, 15)[:, None]], 1)
        )
        order = order.flatten()
        expected = torch.empty_like(inner)
        expected[order[:, None], order] = inner
    else:
        expected = inverse(block, method, damping)
    vectors = random(3, *block.shape)
    found = block.inverse_matvec(vectors, damping, method=method)
    torch.testing.assert_close(found.flatten(1), vectors.flatten(1) @ expected)
    torch.testing.assert_close(block.inverse(damping, method=method)(vectors), found)


def inverse(block: Block, method: str, damping: float) -> Tensor:
    """The inverse of a damped block by the definition of each method."""
    if method == "exact" or not isinstance(block, Kronecker):
        return torch.linalg.inv(damped(block, damping))
    parts = []
    for factors in zip(block.left, block.right, strict=True):
        left, right = (torch.diag(f) if f.dim() == 1 else f for f in factors)
        sizes = len(left), len(right)
        means = right.trace() / sizes[1] / (left.trace() / sizes[0])
        ratio = float(means.sqrt()) if method == "heuristic" and means > 0 else 1.0
        left = left + damping**0.5 / ratio * torch.eye(sizes[0], dtype=left.dtype)
        right = right + damping**0.5 * ratio * torch.eye(sizes[1], dtype=left.dtype)
        parts.append(torch.kron(torch.linalg.inv(left), torch.linalg.inv(right)))
    return torch.block_diag(*parts)


def test_methods_that_are_refused() -> None:
    block = BLOCKS["kronecker"]
    with pytest.raises(ValueError, match="method='cholesky': choose 'exact', 'factored'"):
        block.inverse_matvec(random(1, 3, 4), 0.1, method="cholesky")
    with pytest.raises(ValueError, match="damping=-0.1 is negative: only method='exact'"):
        block.inverse(-0.1, method="heuristic")


def test_samples_have_the_inverse_as_their_covariance(block: Block) -> None:
    """Whitened by the square root of the matrix, samples are the normal numbers of their seed."""
    damping = definite(block)
    samples = block.sample(4, damping, seed=3)
    like = torch.zeros(block.shape, dtype=torch.float64)
    normal = hf.random_like(like, 4, kind="normal", seed=3)
    values, basis = torch.linalg.eigh(damped(block, damping))
    whitened = samples.flatten(1) @ (basis * values.sqrt()) @ basis.mT
    torch.testing.assert_close(whitened, normal.flatten(1))


def test_saved_and_loaded_is_the_same(block: Block, tmp_path: Path) -> None:
    block.save(tmp_path / "block.npz")
    loaded = hf.load(tmp_path / "block.npz")
    assert type(loaded) is type(block)
    assert loaded.shape == block.shape
    torch.testing.assert_close(loaded.dense(), block.dense(), rtol=0, atol=0)
    assert loaded.logdet(100.0) == block.logdet(100.0)


def test_logdet(block: Block) -> None:
    damping = 1 - float(torch.linalg.eigvalsh(block.dense())[0])
    expected = torch.linalg.slogdet(block.dense() + damping * torch.eye(block.n).double()).logabsdet
    assert block.logdet(damping) == pytest.approx(float(expected), rel=1e-9)


def test_algorithms_take_the_matvec(block: Block) -> None:
    like = torch.zeros(block.shape, dtype=torch.float64)
    top = hf.lanczos(block.matvec, like, k=1, which="LA", seed=0, rtol=1e-8).values[0]
    assert float(top) == pytest.approx(float(torch.linalg.eigvalsh(block.dense())[-1]), rel=1e-6)
    b = random(*block.shape)
    found = hf.cg(block.matvec, b, damping=100.0, rtol=1e-12).x
    torch.testing.assert_close(found, block.inverse_matvec(b[None], 100.0)[0])


def test_singular_matrices_are_refused() -> None:
    block = BLOCKS["rank one"]
    with pytest.raises(ValueError, match="singular up to rounding: pass a larger damping"):
        block.inverse_matvec(random(1, *block.shape), 0.0)
    with pytest.raises(ValueError, match="damping=nan"):
        block.inverse_matvec(random(1, *block.shape), float("nan"))


def test_logdet_of_an_indefinite_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="not positive definite: its smallest eigenvalue is -"):
        BLOCKS["kronecker, indefinite"].logdet(1e-3)


def test_a_single_vector_is_refused(block: Block) -> None:
    with pytest.raises(ValueError, match=r"expected a vector block of shape \(k, "):
        block.matvec(random(*block.shape))


def test_a_dense_matrix_that_does_not_fit_is_refused() -> None:
    huge = Kronecker(torch.eye(2000)[None], torch.eye(2000)[None], torch.Size((2000, 2000)))
    with pytest.raises(MemoryError, match="4000000 x 4000000 entries.*cg"):
        huge.dense()
    assert huge.trace() == 4e6
    assert huge.logdet(1.0) == pytest.approx(4e6 * 0.6931471805599453)
