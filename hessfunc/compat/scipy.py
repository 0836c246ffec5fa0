"""Convert matvecs to SciPy linear operators, and SciPy operators and NumPy functions to matvecs."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from hessfunc import options
from hessfunc.algorithms.products import Products
from hessfunc.autograd.constant_matrix import of_vectors
from hessfunc.autograd.functorch import transforming
from hessfunc.fingerprints import digest_of, with_fingerprint
from hessfunc.options import validated
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space, rows_dtype
from hessfunc.trees import Matvec, Tree, leaves, tree_map

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

    Cost: one product of the operator for each vector, and one copy of it. Vectors that are not flat
    or not on the CPU are copied before the product, too.
    """
    if isinstance(operator, Tensor):
        raise TypeError("a tensor is not a SciPy operator: use `dense(A)`")
    shape = getattr(operator, "shape", None)
    if not (isinstance(shape, tuple) and len(shape) == 2):
        raise TypeError(
            f"a {type(operator).__name__} is not a SciPy operator: pass a matrix or a "
            "LinearOperator, or use `from_numpy(f, n=n)` for a function f of arrays"
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
        space = _space_of_vectors(block, n, "operator")
        if space.dtype != dtype:
            raise TypeError(
                f"the operator has dtype {own}, but the vectors have {space.dtype}: pass `like` in "
                f"{dtype}, such as `torch.zeros({n}, dtype={dtype})`"
            )
        return space.unravel(_product(multiplied, _flat(space, block)))

    def multiplied(vectors: Tensor) -> Tensor:
        columns = vectors.cpu().numpy().T
        rows = linear.matmat(columns).T.astype(own, order="C", casting="same_kind")
        return torch.from_numpy(rows).to(vectors.device)

    if isinstance(operator, np.ndarray):
        return with_fingerprint(matvec, lambda: {"matrix": digest_of(operator.tobytes())})
    return matvec


@validated(
    function=options.function_of(1, "one array"), n=options.whole_number, xp=options.anything
)
def from_numpy(function: Callable[[Any], Any], /, *, n: int, xp: ModuleType = np) -> Matvec:
    """Return the matvec of a linear function of one NumPy array, or of a CuPy or JAX array.

    The function maps an array ``(n,)`` to an array ``(n,)`` of the same dtype. The vectors of a
    block are multiplied one after another; a ``LinearOperator`` with a ``matmat``, passed to
    `from_scipy`, multiplies a whole block. The function must not write into its argument, which
    shares the memory of the vector:

        matvec = hf.compat.from_numpy(lambda v: np.fft.irfft(symbol * np.fft.rfft(v), n), n=n)
        top = hf.lanczos(matvec, torch.zeros(n, dtype=torch.float64), k=3)

    Args:
        function: Function of one array. It must be linear and symmetric, which `check` tests.
        n: Number of entries of a vector. Vectors are flat or trees.
        xp: Module of the arrays, with a function ``from_dlpack``: ``numpy``, ``cupy`` or
            ``jax.numpy``. Arrays of NumPy are on the CPU, others on the device of the vectors.

    Returns:
        A matvec.

    Raises:
        TypeError: If the product is not a real array of the vectors' dtype. Raised by a product.
        ValueError: If vectors or products do not have n entries. Raised by a product.

    Cost: one call for each vector, and one copy of its result. Vectors that are not flat, or on a
    GPU for NumPy, are copied before the call, too.
    """
    options.at_least(1, n=n)
    if not hasattr(xp, "from_dlpack"):
        raise TypeError(
            f"xp is {options.described(xp)}, which has no `from_dlpack`: pass a module, such as "
            "xp=cupy"
        )

    def matvec(block: Tree) -> Tree:
        space = _space_of_vectors(block, n, "function")
        vectors = _flat(space, block)
        if vectors.dtype not in _NUMPY_DTYPES:
            raise TypeError(
                f"the vectors have dtype {vectors.dtype}: pass `like` in torch.float32 or "
                "torch.float64"
            )
        return space.unravel(_product(multiplied, vectors))

    def multiplied(vectors: Tensor) -> Tensor:
        rows = torch.empty_like(vectors)
        for row, vector in zip(rows, vectors, strict=True):
            row.copy_(_product_of_array(function, vector, xp))
        return rows

    return matvec


def _product(multiplied: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    """Return the products of a symmetric matrix with rows, which keep the graph of the rows."""
    if transforming() or (torch.is_grad_enabled() and vectors.requires_grad):
        return of_vectors(lambda rows: [multiplied(rows[0].detach())], [vectors])[0]
    return multiplied(vectors.detach())


def _product_of_array(function: Callable[[Any], Any], vector: Tensor, xp: ModuleType) -> Tensor:
    """Return the product of a function of arrays with a vector, which may share its memory."""
    own = vector.cpu().numpy() if xp is np else xp.from_dlpack(vector)
    result = function(own)
    if xp is np:
        # Torch accepts neither negative strides nor read-only memory.
        result = np.asarray(result)
        result = np.require(result, requirements=["C", "W"]) if result.dtype in _DTYPES else result
    due = f"return an array of shape ({len(vector)},)"
    if not hasattr(result, "dtype") or result.dtype != own.dtype:
        kind = getattr(result, "dtype", type(result).__name__)
        raise TypeError(
            f"the function returns {kind} for a vector of {own.dtype}: {due} and the same dtype, "
            "and pass `like` in the dtype in which the function computes"
        )
    if tuple(result.shape) != (len(vector),):
        raise ValueError(f"the function returns an array of shape {tuple(result.shape)}: {due}")
    return torch.from_numpy(result) if xp is np else from_dlpack(result)


def _space_of_vectors(block: Tree, n: int, of: str) -> Space:
    """Return the space of a block of vectors with n entries."""
    space = space_of(tree_map(lambda leaf: leaf[0], block))
    if space.n != n:
        raise ValueError(f"the {of} takes vectors with {n} entries, but got {space.n}")
    return space


def _flat(space: Space, block: Tree) -> Tensor:
    """Return the rows of a vector block, which is not copied if its vectors are flat."""
    first, *others = leaves(block)
    is_flat = not others and first.shape[1:] == (space.n,)
    rows: Tensor = first if is_flat else space.ravel(block)
    return rows


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
