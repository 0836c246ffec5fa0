"""Formats of vectors, and arithmetic of operators, against dense matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from hessfunc.compat.curvlinops import PyTorchLinearOperator, SubmatrixLinearOperator
from hessfunc.compat.curvlinops.examples import IdentityLinearOperator
from tests.compat.curvlinops.problem import matrix

SHAPES = [(2, 3), (4,)]


class Own(PyTorchLinearOperator):
    """A rectangular matrix on lists of tensors."""

    def __init__(self, dense: Tensor, names: Any = None, *, into: Any = SHAPES) -> None:
        super().__init__(SHAPES, into, names)
        self.dense = dense

    @property
    def device(self) -> torch.device:
        return self.dense.device

    @property
    def dtype(self) -> torch.dtype:
        return self.dense.dtype

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        flat = self.dense @ torch.cat([x.flatten(end_dim=-2) for x in X])
        parts = flat.split(self._out_shape_flat)
        return [part.reshape(*s, -1) for part, s in zip(parts, self._out_shape, strict=True)]

    def _adjoint(self) -> Own:
        return Own(self.dense.mT, self._names)


def square(seed: int = 0) -> Tensor:
    return torch.randn(10, 10, generator=torch.Generator().manual_seed(seed)).double()


def test_every_format_of_vectors_has_the_same_product() -> None:
    dense = square()
    A = Own(dense, ["weight", "bias"])
    X = torch.randn(10, 3).double()
    expected = dense @ X
    torch.testing.assert_close(A @ X, expected)
    torch.testing.assert_close(A @ X[:, 0], expected[:, 0])
    assert (A @ X[:, :1]).shape == (10, 1)
    columns = [X[:6].reshape(2, 3, 3), X[6:]]
    for product in (A @ columns, A @ tuple(columns)):
        assert [tuple(p.shape) for p in product] == [(2, 3, 3), (4, 3)]
        torch.testing.assert_close(torch.cat([p.flatten(end_dim=-2) for p in product]), expected)
    vector = A @ [part[..., 1] for part in columns]
    torch.testing.assert_close(torch.cat([part.flatten() for part in vector]), expected[:, 1])
    named = A @ {"bias": columns[1], "weight": columns[0]}
    assert list(named) == ["weight", "bias"]
    torch.testing.assert_close(named["weight"].reshape(6, 3), expected[:6])
    assert A.shape == (10, 10)
    assert not (A @ torch.zeros(10, 0).double()).numel()


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        (torch.ones(9).double(), ValueError, r"got a tensor of shape \(9,\)"),
        (torch.ones(10, 1, 1).double(), ValueError, r"shape \(10, 1, 1\)"),
        ([torch.ones(2, 3)], ValueError, "tensors of shapes"),
        ([torch.ones(2, 3, 2), torch.ones(4, 1)], ValueError, "one more axis"),
        ({"weight": torch.ones(2, 3)}, ValueError, "pass a dict of parameters"),
        (np.ones(10), TypeError, "torch.as_tensor"),
        (3.0, TypeError, "multiplies a tensor"),
    ],
)
def test_what_does_not_fit_is_named(X: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Own(square()) @ X


def test_sums_multiples_products_and_adjoints_are_those_of_the_matrices() -> None:
    first, second = square(), square(1)
    A, B = Own(first), Own(second)
    identity = IdentityLinearOperator(SHAPES, A.device, A.dtype)
    for made, dense in (
        (A + B, first + second),
        (A - 0.5 * B, first - 0.5 * second),
        (-A * 2, -2 * first),
        (A * np.float64(3), 3 * first),
        (A * torch.tensor(3.0), 3 * first),
        (A @ B, first @ second),
        (A.T, first.mT),
        ((A @ (B + 0.1 * identity)).adjoint(), (first @ (second + 0.1 * torch.eye(10))).mT),
    ):
        torch.testing.assert_close(matrix(made), dense)
    symmetric = identity + 2 * identity
    assert symmetric.SELF_ADJOINT
    assert symmetric.T is symmetric
    assert not (A + identity).SELF_ADJOINT


def test_operators_that_do_not_fit_are_refused() -> None:
    A, tall = Own(square()), Own(square()[:4], into=[(4,)])
    with pytest.raises(ValueError, match="cannot be added"):
        A + tall
    with pytest.raises(ValueError, match="takes tensors of shapes"):
        A @ tall
    with pytest.raises(ValueError, match=r"torch.float64 on cpu, and the other torch.float32"):
        A + Own(square().float())
    with pytest.raises(TypeError):
        A + 1.0  # type: ignore[operator]
    torch.testing.assert_close(matrix(tall @ A), square()[:4] @ square())


def test_scipy_takes_the_operator() -> None:
    dense = square()
    A = Own(dense)
    for dtype, expected in ((None, np.float64), (np.float32, np.float32)):
        S = A.to_scipy(dtype)
        assert (S.shape, S.dtype) == ((10, 10), expected)
    X = np.random.RandomState(0).randn(10, 3)
    np.testing.assert_allclose(S @ X[::-1], dense.numpy() @ X[::-1])
    np.testing.assert_allclose(S.rmatvec(X[:, 0]), dense.mT.numpy() @ X[:, 0])
    symmetric = Own(dense + dense.mT)
    symmetric.SELF_ADJOINT = True
    top = scipy.sparse.linalg.eigsh(symmetric.to_scipy(), k=1, which="LA")[0]
    assert top[0] == pytest.approx(float(torch.linalg.eigvalsh(dense + dense.mT)[-1]))
    half = Own(dense.bfloat16())
    np.testing.assert_allclose(half.to_scipy() @ X, dense.numpy() @ X, atol=0.2)


def test_a_product_of_another_shape_and_missing_methods_are_named() -> None:
    class Wrong(Own):
        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            return [X[0]]

    with pytest.raises(ValueError, match="Wrong._matmat returned"):
        Wrong(square()) @ torch.ones(10).double()
    bare = PyTorchLinearOperator(SHAPES, SHAPES)
    for use, name in (
        (lambda: bare @ torch.ones(10), "_matmat"),
        (bare.adjoint, "_adjoint"),
        (lambda: bare.device, "device"),
        (lambda: bare.dtype, "dtype"),
    ):
        with pytest.raises(NotImplementedError, match=name):
            use()


def test_submatrices_of_sums_keep_their_products() -> None:
    A = SubmatrixLinearOperator(Own(square()) + Own(square(1)), [3, 1], [0, 2, 9])
    torch.testing.assert_close(matrix(A), (square() + square(1))[[3, 1]][:, [0, 2, 9]])
