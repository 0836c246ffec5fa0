"""Blocks against their dense matrices."""

import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc.kronecker import Block, Congruence, Dense, DirectSum, Eigenbasis, Kronecker


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
