"""Convert matvecs to SciPy linear operators, and SciPy operators to matvecs."""

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
    """Return the ``LinearOperator`` of a matvec, for ``eigsh``, ``svds``, ``minres`` and others.

    Vectors are NumPy arrays ``(n,)`` in the order of `ravel`. The columns of an array ``(n, k)`` go
    through the matvec as one vector block. The operator is its own adjoint. Products are computed
    in the dtype of the parameters, which is the dtype of the operator, for vectors of any dtype.
    float16 and bfloat16 become float32, as in the algorithms of this library, because NumPy or
    LAPACK do not support them.

    Args:
        matvec: Symmetric matvec on vector blocks.
        like: Tree with the shapes and dtypes of the vectors, on any device.

    Returns:
        A ``scipy.sparse.linalg.LinearOperator`` of shape ``(n, n)``.

    Raises:
        TypeError: If a vector is complex. Raised by a product.
        ValueError: If a vector does not have n entries. Raised by a product.
        FloatingPointError: If an entry of a product is not finite. Raised by the product.

    Cost: one matvec for each vector, and two copies of it, to the device of ``like`` and back.
    """
    products = Products.of(matvec, like)
    space = products.space
    dtype = rows_dtype(space)
    own = _NUMPY_DTYPES[dtype]

    def product(vectors: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(vectors):
            raise TypeError(
                "the operator is real, but the vector is complex: multiply `v.real` and `v.imag`"
            )
        if not vectors.size:
            return np.zeros(vectors.shape, own)
        # Copy the vectors: torch supports neither negative strides nor every dtype of NumPy.
        rows = np.array(vectors.reshape(space.n, -1).T, dtype=own, order="C")
        result = products(torch.from_numpy(rows).to(space.device)).detach().cpu().numpy()
        return result.T.reshape(vectors.shape)

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
    """Return the matvec of a SciPy operator, sparse matrix or array, or of a NumPy array.

    The matvec takes flat vectors ``(n,)`` or trees with n entries, in the dtype of the operator and
    on any device. A vector block is one product of the operator with an ``(n, k)`` array. Integer
    matrices are converted to float64. Results of the algorithms are tensors, which NumPy reads
    directly:

        top = hf.lanczos(hf.compat.from_scipy(A), torch.zeros(n, dtype=torch.float64), k=3)
        values = np.asarray(top.values)

    Args:
        operator: Symmetric operator. The symmetry of a ``LinearOperator`` is not checked here; use
            `check`.

    Returns:
        A matvec.

    Raises:
        TypeError: If the argument is not an operator, or if its dtype is not float32, float64 or
            an integer type. A product raises it if the vectors have another dtype.
        ValueError: If the operator is not square, or if a matrix is not symmetric or not finite. A
            product raises it if the vectors do not have n entries.

    Cost: one product of the operator for each vector, and two copies of the vector.
    """
    if isinstance(operator, Tensor):
        raise TypeError("a tensor is not a SciPy operator: use `dense(A)`")
    shape = getattr(operator, "shape", None)
    if not (isinstance(shape, tuple) and len(shape) == 2):
        raise TypeError(
            f"a {type(operator).__name__} is not a SciPy operator: pass a matrix, or "
            "`scipy.sparse.linalg.LinearOperator((n, n), f)` for a function f of arrays"
        )
    linear = _linalg().aslinearoperator(operator)
    n = linear.shape[0]
    if linear.shape != (n, n):
        raise ValueError(
            f"the operator has shape {linear.shape}, which is not square: pass an (n, n) operator"
        )
    own = np.dtype(np.float64) if linear.dtype.kind in "biu" else linear.dtype
    if own not in _DTYPES:
        raise TypeError(f"the operator has dtype {own}: pass a real operator in float32 or float64")
    dtype = _DTYPES[own]
    if not hasattr(operator, "matvec"):
        _refuse_asymmetric(operator.astype(own))

    def matvec(block: Tree) -> Tree:
        space = space_of(tree_map(lambda leaf: leaf[0], block))
        if space.n != n:
            raise ValueError(f"the operator takes vectors with {n} entries, but got {space.n}")
        if space.dtype != dtype:
            raise TypeError(
                f"the operator has dtype {own}, but the vectors have {space.dtype}: pass `like` in "
                f"{dtype}, such as `torch.zeros({n}, dtype={dtype})`"
            )
        columns = space.ravel(block).detach().cpu().numpy().T
        rows = linear.matmat(columns).T.astype(own, order="C", casting="same_kind")
        return space.unravel(torch.from_numpy(rows).to(space.device))

    if isinstance(operator, np.ndarray):
        return with_fingerprint(matvec, lambda: {"matrix": digest_of(operator.tobytes())})
    return matvec


def _refuse_asymmetric(matrix: Any) -> None:
    # Not every sparse format implements `max`: convert to CSR.
    matrix = matrix.tocsr() if hasattr(matrix, "tocsr") else matrix
    tolerance = 10 * np.finfo(matrix.dtype).eps * abs(matrix).max()
    if not np.isfinite(tolerance):
        raise ValueError("the matrix has an entry that is NaN or infinite: check how it is built")
    if abs(matrix - matrix.T).max() > tolerance:
        raise ValueError(
            "the matrix is not symmetric: pass `(A + A.T) / 2` if it differs only by rounding"
        )


def _linalg() -> ModuleType:
    # Imported here, because the import takes as long as a few hundred products.
    import scipy.sparse.linalg

    return scipy.sparse.linalg
