"""Linear operators on lists of tensors: products with every format of vectors, and arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hessfunc.options import anything, described, factor, validated
from hessfunc.options.scalars import whole_numbers

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


def _shapes(name: str, value: Any, /) -> list[torch.Size]:
    """A list of shapes, one for each tensor of a vector."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{name} must be a list of shapes, not {described(value)}: pass [(3, 2)]")
    return [torch.Size(whole_numbers(f"each of {name}", shape)) for shape in value]


class PyTorchLinearOperator:
    """Linear operator between spaces of lists of tensors.

    Subclasses implement `_matmat`, `device` and `dtype`, and also `_adjoint` unless they set
    ``SELF_ADJOINT``.

    Args:
        in_shape: Shape of each tensor of a vector that the operator takes.
        out_shape: Shape of each tensor of a product.
        names: Names of the tensors of a vector, if they are the parameters of a dict.

    Attributes:
        SELF_ADJOINT: Whether the operator is its own adjoint.
        shape: Numbers of rows and columns of the matrix.
    """

    SELF_ADJOINT: bool = False

    @validated(in_shape=_shapes, out_shape=_shapes, names=anything)
    def __init__(
        self,
        in_shape: Sequence[Sequence[int]],
        out_shape: Sequence[Sequence[int]],
        names: Sequence[str] | None = None,
    ) -> None:
        self._in_shape = [torch.Size(s) for s in in_shape]
        self._out_shape = [torch.Size(s) for s in out_shape]
        self._in_shape_flat = [s.numel() for s in self._in_shape]
        self._out_shape_flat = [s.numel() for s in self._out_shape]
        self._names = None if names is None else tuple(names)
        self.shape = (sum(self._out_shape_flat), sum(self._in_shape_flat))

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        raise NotImplementedError(f"{type(self).__name__} has no `device`: define the property")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""
        raise NotImplementedError(f"{type(self).__name__} has no `dtype`: define the property")

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        """Return the products with the K columns of tensors ``(*shape, K)``, in the same format."""
        raise NotImplementedError(f"{type(self).__name__} has no `_matmat`: define the method")

    def _adjoint(self) -> PyTorchLinearOperator:
        """Return the adjoint of an operator that is not its own adjoint."""
        raise NotImplementedError(
            f"{type(self).__name__} has no `_adjoint`: define the method, or set SELF_ADJOINT = "
            "True if the matrix is symmetric"
        )

    def adjoint(self) -> PyTorchLinearOperator:
        """Return the adjoint operator."""
        return self if self.SELF_ADJOINT else self._adjoint()

    @property
    def T(self) -> PyTorchLinearOperator:
        """Adjoint operator."""
        return self.adjoint()

    def __matmul__(self, X: Any) -> Any:
        """Return the product with one vector, with the columns of a matrix, or with an operator.

        Args:
            X: Flat vector ``(n,)``, matrix ``(n, K)``, list of tensors ``(*shape)`` or
                ``(*shape, K)``, dict of such tensors if the parameters are a dict, or another
                operator.

        Returns:
            Product in the format of ``X``.

        Raises:
            TypeError: If ``X`` is none of them.
            ValueError: If a shape or a name does not fit.
        """
        if isinstance(X, PyTorchLinearOperator):
            return Chain(self, X)
        if isinstance(X, Tensor):
            return self._of_flat(X)
        if isinstance(X, Mapping):
            names = self._named(X)
            return dict(zip(names, self._of_list([X[name] for name in names]), strict=True))
        if isinstance(X, (list, tuple)) and all(isinstance(x, Tensor) for x in X):
            return self._of_list(X)
        raise TypeError(
            f"an operator multiplies a tensor, a list or dict of tensors, or an operator, but got "
            f"{described(X)}: convert arrays with `torch.as_tensor`, or use `.to_scipy()`"
        )

    def _of_flat(self, X: Tensor) -> Tensor:
        rows, columns = self.shape
        if X.dim() not in (1, 2) or len(X) != columns:
            raise ValueError(
                f"the operator of shape ({rows}, {columns}) multiplies a vector ({columns},) or a "
                f"matrix ({columns}, K), but got a tensor of shape {tuple(X.shape)}"
            )
        parts = X.reshape(columns, -1).split(self._in_shape_flat)
        pairs = zip(parts, self._in_shape, strict=True)
        product = self._checked([part.reshape(*shape, part.shape[-1]) for part, shape in pairs])
        flat = torch.cat([part.flatten(end_dim=-2) for part in product])
        return flat.reshape(rows, *X.shape[1:])

    def _of_list(self, X: Sequence[Tensor]) -> list[Tensor]:
        shapes = [x.shape for x in X]
        if shapes == self._in_shape:
            return [part.squeeze(-1) for part in self._checked([x.unsqueeze(-1) for x in X])]
        ends = {shape[-1:] for shape in shapes}
        if [shape[:-1] for shape in shapes] == self._in_shape and len(ends) == 1:
            return self._checked(list(X))
        raise ValueError(
            f"a vector has tensors of shapes {[tuple(s) for s in self._in_shape]}, and a matrix "
            f"has one more axis for its columns, but got {[tuple(s) for s in shapes]}"
        )

    def _checked(self, X: list[Tensor]) -> list[Tensor]:
        product = self._matmat(X)
        expected = [(*shape, X[0].shape[-1]) for shape in self._out_shape]
        if (shapes := [tuple(part.shape) for part in product]) != expected:
            raise ValueError(
                f"{type(self).__name__}._matmat returned tensors of shapes {shapes}, where "
                f"{expected} is expected: keep the axis of columns last"
            )
        return product

    def _named(self, X: Mapping[str, Any]) -> tuple[str, ...]:
        if self._names is None or X.keys() != set(self._names):
            known = "has no names" if self._names is None else f"has names {list(self._names)}"
            raise ValueError(
                f"the vector is a dict with names {list(X)}, but the operator {known}: pass a dict "
                "of parameters to the operator, or a list of tensors"
            )
        return self._names

    def __add__(self, other: PyTorchLinearOperator) -> PyTorchLinearOperator:
        return Sum(self, other) if isinstance(other, PyTorchLinearOperator) else NotImplemented

    def __sub__(self, other: PyTorchLinearOperator) -> PyTorchLinearOperator:
        return self + -other if isinstance(other, PyTorchLinearOperator) else NotImplemented

    def __mul__(self, scalar: float) -> PyTorchLinearOperator:
        return Scaled(self, float(factor("scalar", scalar)))

    def __rmul__(self, scalar: float) -> PyTorchLinearOperator:
        return self * scalar

    def __neg__(self) -> PyTorchLinearOperator:
        return self * -1.0

    def to_scipy(self, dtype: Any = None) -> LinearOperator:
        """Return the operator of SciPy, whose products are computed in torch.

        Args:
            dtype: Dtype of the operator of SciPy, by default float64. Products are computed in the
                dtype of this operator, and returned in that of their vectors.
        """
        # Imported here, because the import takes as long as a few hundred products.
        from scipy.sparse.linalg import LinearOperator

        forward, backward = _of_arrays(self), _of_arrays(self.adjoint())
        return LinearOperator(
            self.shape,
            matvec=forward,
            rmatvec=backward,
            matmat=forward,
            rmatmat=backward,
            dtype=np.dtype(dtype),
        )


class Composed(PyTorchLinearOperator):
    """Operator that is made of another one or of a tensor, with its device and dtype."""

    _A: Any

    def __init__(
        self,
        A: PyTorchLinearOperator | Tensor,
        in_shape: Sequence[Sequence[int]],
        out_shape: Sequence[Sequence[int]],
        *,
        named: bool = True,
    ) -> None:
        super().__init__(in_shape, out_shape, getattr(A, "_names", None) if named else None)
        self._A = A

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self._A.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors."""
        return self._A.dtype


class Sum(Composed):
    """Sum A + B of two operators on the same spaces."""

    def __init__(self, A: PyTorchLinearOperator, B: PyTorchLinearOperator) -> None:
        _refuse_unlike(A, B)
        if (A._in_shape, A._out_shape) != (B._in_shape, B._out_shape):
            raise ValueError(
                f"operators on tensors of shapes {_listed(A._in_shape)} and "
                f"{_listed(B._in_shape)} cannot be added: make both for the same parameters"
            )
        super().__init__(A, A._in_shape, A._out_shape)
        self._B = B
        self.SELF_ADJOINT = A.SELF_ADJOINT and B.SELF_ADJOINT

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        pairs = zip(self._A._matmat(X), self._B._matmat(X), strict=True)
        return [first + second for first, second in pairs]

    def _adjoint(self) -> Sum:
        return Sum(self._A.adjoint(), self._B.adjoint())


class Scaled(Composed):
    """Multiple s A of an operator."""

    def __init__(self, A: PyTorchLinearOperator, scalar: float) -> None:
        super().__init__(A, A._in_shape, A._out_shape)
        self._scalar = scalar
        self.SELF_ADJOINT = A.SELF_ADJOINT

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [self._scalar * part for part in self._A._matmat(X)]

    def _adjoint(self) -> Scaled:
        return Scaled(self._A.adjoint(), self._scalar)


class Chain(Composed):
    """Product A B of two operators."""

    def __init__(self, A: PyTorchLinearOperator, B: PyTorchLinearOperator) -> None:
        _refuse_unlike(A, B)
        if A._in_shape != B._out_shape:
            raise ValueError(
                f"the first operator takes tensors of shapes {_listed(A._in_shape)}, but the "
                f"second returns {_listed(B._out_shape)}: make both for the same parameters"
            )
        super().__init__(A, B._in_shape, A._out_shape, named=B._names is not None)
        self._B = B

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self._A._matmat(self._B._matmat(X))

    def _adjoint(self) -> Chain:
        return Chain(self._B.adjoint(), self._A.adjoint())


def _of_arrays(A: PyTorchLinearOperator) -> Callable[[np.ndarray], np.ndarray]:
    def product(X: np.ndarray) -> np.ndarray:
        # A copy: torch supports no negative strides.
        given = torch.from_numpy(np.array(X)).to(device=A.device, dtype=A.dtype)
        # NumPy has no bfloat16.
        return (A @ given).detach().cpu().double().numpy().astype(X.dtype)

    return product


def _refuse_unlike(A: PyTorchLinearOperator, B: PyTorchLinearOperator) -> None:
    if (A.device, A.dtype) != (B.device, B.dtype):
        raise ValueError(
            f"one operator is {A.dtype} on {A.device}, and the other {B.dtype} on {B.device}: "
            "make both with the same dtype and device"
        )


def _listed(shapes: Sequence[torch.Size]) -> list[tuple[int, ...]]:
    return [tuple(shape) for shape in shapes]
