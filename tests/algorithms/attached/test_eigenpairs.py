import pytest
import torch
from torch import Tensor

import hessfunc as hf
from hessfunc import attached
from hessfunc.trees import leaves, tree_map
from tests.algorithms.attached.problem import (
    BATCH,
    LOSS,
    PARAMS,
    dense_slope,
    matrix,
    slope,
)
from tests.reference import rows

K = 3
MATVEC = hf.hvp(LOSS)(PARAMS, BATCH)
PAIRS = hf.lanczos(MATVEC, PARAMS, k=K, which="LA", rtol=1e-12, seed=0)
WEIGHTS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def test_eigenvalues() -> None:
    found = slope(lambda matvec: attached.eigenvalues(matvec, PAIRS), WEIGHTS)
    wanted = dense_slope(lambda A: torch.linalg.eigvalsh(A).flip(0)[:K], WEIGHTS)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_their_values_are_those_of_the_solver() -> None:
    params = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    matvec = hf.hvp(LOSS, differentiable=True)(params, BATCH)
    values = attached.eigenvalues(matvec, PAIRS)
    assert values.requires_grad
    torch.testing.assert_close(values.detach(), PAIRS.values, rtol=1e-10, atol=1e-12)
    vectors = attached.eigenvectors(matvec, PAIRS)
    torch.testing.assert_close(
        tree_map(torch.Tensor.detach, vectors), PAIRS.vectors, rtol=1e-10, atol=1e-12
    )


def test_eigenvectors() -> None:
    signs = rows(PAIRS.vectors)
    weights = torch.linspace(-1, 1, signs.numel(), dtype=torch.float64)

    def vectors(A: Tensor) -> Tensor:
        found = torch.linalg.eigh(A)[1].flip(1)[:, :K].T
        aligned = found * (found * signs).sum(1, keepdim=True).sign()
        return torch.cat([part.reshape(-1) for part in aligned.split([12, 12], dim=1)])

    found = slope(lambda matvec: attached.eigenvectors(matvec, PAIRS, rtol=1e-11), weights)
    torch.testing.assert_close(found, dense_slope(vectors, weights), rtol=1e-7, atol=1e-7)


def test_a_sharpness_penalty_lowers_the_top_eigenvalue() -> None:
    params = {name: leaf.clone().requires_grad_() for name, leaf in PARAMS.items()}
    tops = []
    for _ in range(15):
        plain = tree_map(torch.Tensor.detach, params)
        pairs = hf.lanczos(hf.hvp(LOSS)(plain, BATCH), plain, k=1, which="LA", seed=0)
        top = attached.eigenvalues(hf.hvp(LOSS, differentiable=True)(params, BATCH), pairs)
        tops.append(float(top.detach()))
        slopes = torch.autograd.grad(top.sum(), leaves(params))
        with torch.no_grad():
            for leaf, s in zip(leaves(params), slopes, strict=True):
                leaf -= 0.02 * s
    assert tops[-1] < 0.8 * tops[0]


def test_pairs_of_another_matrix_are_refused() -> None:
    params = {name: (3 * leaf).requires_grad_() for name, leaf in PARAMS.items()}
    with pytest.raises(ValueError, match="residual"):
        attached.eigenvalues(hf.hvp(LOSS, differentiable=True)(params, BATCH), PAIRS)


def test_a_vector_of_an_equal_eigenvalue_has_no_derivative() -> None:
    def loss(params: Tensor, batch: Tensor) -> Tensor:
        # The Hessian at 0 is diag(2, 2, 6); a step along the third axis splits the first two.
        return (batch * params.square()).sum() + params.prod()

    params = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    batch = torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64)
    pairs = hf.lanczos(hf.hvp(loss)(params.detach(), batch), params.detach(), k=3, seed=0)
    assert pairs.values[1:].tolist() == pytest.approx([2.0, 2.0])
    vectors = attached.eigenvectors(hf.hvp(loss, differentiable=True)(params, batch), pairs)
    with pytest.raises(RuntimeError, match="multiple eigenvalue"):
        torch.autograd.grad(vectors[1] @ pairs.vectors[2], params)


def test_a_matrix_at_an_intermediate_point_of_training_works_in_float32() -> None:
    params = {name: leaf.float().requires_grad_() for name, leaf in PARAMS.items()}
    batch = BATCH[0].float(), BATCH[1]
    plain = tree_map(torch.Tensor.detach, params)
    pairs = hf.lanczos(hf.hvp(LOSS)(plain, batch), plain, k=1, which="LA", seed=0)
    top = attached.eigenvalues(hf.hvp(LOSS, differentiable=True)(params, batch), pairs)
    torch.testing.assert_close(
        top.detach(), torch.linalg.eigvalsh(matrix(PARAMS))[-1:], rtol=1e-4, atol=1e-5
    )
    assert all(s.dtype == torch.float32 for s in torch.autograd.grad(top.sum(), leaves(params)))
