"""Matvecs as linear operators of SciPy, and the other way round."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hessfunc.algorithms.products import Products
from hessfunc.fingerprints import digest_of, with_fingerprint
from hessfunc.options import validated
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import rows_dtype
from hessfunc.trees import Matvec, Tree, tree_map

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

_DTYPES: dict[np.dtype[Any], torch.dtype] = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}
_NUMPY_DTYPES = {dtype: own for own, dtype in _DTYPES.items()}


@validated
def to_scipy(matvec: Matvec, like: Tree, /) -> LinearOperator:
    """The ``LinearOperator`` of a matvec, for ``eigsh``, ``svds``, ``minres`` and all else.

    Vectors are NumPy arrays ``(n,)`` in the order of `ravel`; the columns of ``(n, k)`` go
    through the matvec as one block. The operator is its own adjoint. Its dtype is that of the
    parameters, and products are made in it, whatever the dtype of a vector; float16 and bfloat16,
    which NumPy or LAPACK do not know, become float32, as they do in the algorithms here.

    Args:
        matvec: block -> block, symmetric.
        like: a tree that says what vectors look like, on any device.

    Raises:
        TypeError: (from a product) the vector is complex.
        ValueError: (from a product) the vector does not have n entries.
        FloatingPointError: (from a product) an entry of the product is not finite.

    Cost: one matvec a vector; two copies of the vector, to the device of ``like`` and back.
    """
    products = Products.of(matvec, like)
    space = products.space
    dtype = rows_dtype(space)
    own = _NUMPY_DTYPES[dtype]

    def product(vectors: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(vectors):
            raise TypeError("the operator is real, and the vector is complex: multiply its parts")
        if not vectors.size:
            return np.zeros(vectors.shape, own)
        # A copy, for torch takes neither negative strides nor every dtype.
        rows = np.array(vectors.reshape(space.n, -1).T, dtype=own, order="C")
        images = products(torch.from_numpy(rows).to(space.device)).detach().cpu().numpy()
        return images.T.reshape(vectors.shape)

    return _linalg().LinearOperator(
        (space.n, space.n),
        matvec=product,
        rmatvec=product,
        matmat=product,
        rmatmat=product,
        dtype=own,
    )


@validated
def from_scipy(operator: Any, /) -> Matvec:
    """The matvec of a linear operator, sparse matrix or array of SciPy, or of a NumPy array.

    It takes flat vectors ``(n,)`` or trees of n entries, of the operator's own dtype, on any
    device; a block is one product of the operator with n x k numbers. Integers count as float64.
    Results of the algorithms are tensors, which NumPy reads as they are:

        top = hf.lanczos(hf.compat.from_scipy(A), torch.zeros(n, dtype=torch.float64), k=3)
        values = np.asarray(top.values)

    Args:
        operator: symmetric; of a ``LinearOperator``, `check` can tell.

    Raises:
        TypeError: it is no operator, or not of float32, float64 or integers; (from a product) the
            vectors have another dtype.
        ValueError: it is not square, or a matrix that is not symmetric or not finite; (from a
            product) the vectors do not have n entries.

    Cost: one product of the operator a vector; two copies of the vector.
    """
    if isinstance(operator, Tensor):
        raise TypeError("a tensor is no operator of SciPy: use `dense`")
    shape = getattr(operator, "shape", None)
    if not (isinstance(shape, tuple) and len(shape) == 2):
        raise TypeError(
            f"a {type(operator).__name__} is no operator of SciPy: pass a matrix, or "
            "scipy.sparse.linalg.LinearOperator((n, n), f) for a function f of arrays"
        )
    linear = _linalg().aslinearoperator(operator)
    n = linear.shape[0]
    if linear.shape != (n, n):
        raise ValueError(f"an operator of shape {linear.shape} is not square")
    own = np.dtype(np.float64) if linear.dtype.kind in "biu" else linear.dtype
    if own not in _DTYPES:
        raise TypeError(f"the operator has dtype {own}: curvature is real, in float32 or float64")
    dtype = _DTYPES[own]
    if not hasattr(operator, "matvec"):
        _refuse_asymmetric(operator.astype(own))

    def matvec(block: Tree) -> Tree:
        space = space_of(tree_map(lambda leaf: leaf[0], block))
        if space.n != n:
            raise ValueError(f"the operator takes vectors of {n} entries, and got {space.n}")
        if space.dtype != dtype:
            raise TypeError(
                f"the operator has dtype {own}, and vectors {space.dtype}: pass `like` in {dtype}, "
                f"such as torch.zeros({n}, dtype={dtype})"
            )
        columns = space.ravel(block).detach().cpu().numpy().T
        images = linear.matmat(columns).T.astype(own, order="C", casting="same_kind")
        return space.unravel(torch.from_numpy(images).to(space.device))

    if isinstance(operator, np.ndarray):
        return with_fingerprint(matvec, lambda: {"matrix": digest_of(operator.tobytes())})
    return matvec


def _refuse_asymmetric(matrix: Any) -> None:
    # Not every sparse format knows its largest entry.
    matrix = matrix.tocsr() if hasattr(matrix, "tocsr") else matrix
    tolerance = 10 * np.finfo(matrix.dtype).eps * abs(matrix).max()
    if not np.isfinite(tolerance):
        raise ValueError("the matrix has an entry that is NaN or infinite")
    if abs(matrix - matrix.T).max() > tolerance:
        raise ValueError("the matrix is not symmetric: take (A + A.T) / 2 if it should be")


def _linalg() -> ModuleType:
    # The import takes as long as a few hundred products.
    import scipy.sparse.linalg

    return scipy.sparse.linalg
