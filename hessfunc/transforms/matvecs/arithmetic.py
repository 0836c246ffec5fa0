"""Arithmetic of matvecs, and matvecs of plain functions and matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc import options
from hessfunc.fingerprints import checksum, combined, with_fingerprint
from hessfunc.options import validated
from hessfunc.selection import first_of
from hessfunc.spaces.of import space_of
from hessfunc.trees import Matvec, Tree, flatten, leaves, tree_map


def apply(matvec: Matvec, vector: Tree, /) -> Tree:
    """Return the product of a matvec with one vector, a tree.

    Examples:
        >>> hf.apply(hf.dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]])), torch.tensor([1.0, 0.0]))
        tensor([2., 1.])

    Raises:
        ValueError: If the product does not have the structure and shapes of the vector.
    """
    entries, structure = flatten(vector)
    # For speed, arguments are validated only if something is wrong.
    if not all(isinstance(leaf, Tensor) for leaf in entries):
        options.tree("vector", vector)
    if isinstance(matvec, nn.Module):
        options.matvec("matvec", matvec)
    try:
        product, given = flatten(matvec(structure.unflatten(leaf[None] for leaf in entries)))
    except TypeError as error:
        options.matvec("matvec", matvec)
        if (clearer := options.of_numpy(error)) is not None:
            raise clearer from error
        raise
    shapes = [tuple(getattr(leaf, "shape", ())) for leaf in product]
    wanted = [(1, *leaf.shape) for leaf in entries]
    if given != structure or shapes != wanted:
        raise ValueError(
            "the matvec's product is not like its block: the leaves of the product have shapes "
            f"{first_of([*map(str, shapes)])}, the leaves of the block have "
            f"{first_of([*map(str, wanted)])}. Return a tree with the shapes of the block"
        )
    return structure.unflatten(leaf[0] for leaf in product)


@validated
def shift(matvec: Matvec, s: float, /) -> Matvec:
    """Return the matvec of A + s I."""
    return _made_of(
        lambda block: tree_map(lambda out, v: out + s * v, matvec(block), block), matvec
    )


@validated
def scale(matvec: Matvec, a: float, /) -> Matvec:
    """Return the matvec of a A."""
    return _made_of(lambda block: tree_map(lambda out: a * out, matvec(block)), matvec)


@validated
def add(*matvecs: Matvec) -> Matvec:
    """Return the matvec of A + B + ..., for matrices on the same space."""
    if not matvecs:
        raise ValueError("add needs at least one matvec: call add(first, second)")

    def total(block: Tree) -> Tree:
        products = matvecs[0](block)
        for other in matvecs[1:]:
            products = tree_map(torch.add, products, other(block))
        return products

    return _made_of(total, *matvecs)


def _made_of(matvec: Matvec, *others: Matvec) -> Matvec:
    """Attach the combined fingerprints and the ranks of other matvecs to a matvec.

    Scalars are not part of the fingerprint; they show in the products.
    """
    for other in others:
        if (ranks := getattr(other, "ranks", None)) is not None:
            vars(matvec)["ranks"] = ranks
    return with_fingerprint(matvec, lambda: combined(others))


@validated
def deflate(matvec: Matvec, pairs: Any, /) -> Matvec:
    """Return the matvec of A - sum_i values_i v_i v_i', which has these eigenvalues set to zero.

    Args:
        matvec: Matvec of A.
        pairs: Result with eigenpairs, or any object with ``values`` ``(k,)`` and an orthonormal
            vector block ``vectors``.
    """
    space = space_of(tree_map(lambda leaf: leaf[0], pairs.vectors))
    basis = space.ravel(pairs.vectors)

    def deflated(block: Tree) -> Tree:
        inner = space.gram(space.ravel(block), basis)
        moved = space.combine(inner * pairs.values.to(inner), basis)
        return tree_map(torch.sub, matvec(block), space.unravel(moved))

    return _made_of(deflated, matvec)


@validated
def precondition(matvec: Matvec, diagonal: Tree, /) -> Matvec:
    """Return the matvec of P^-1/2 A P^-1/2, where P is the diagonal matrix with these entries.

    Its eigenvalues are those of P^-1 A, the curvature that a preconditioned optimiser sees.

    Args:
        matvec: Matvec of A.
        diagonal: Tree with the positive diagonal entries of P.

    Raises:
        ValueError: If an entry of the diagonal is not positive.
    """
    space = space_of(diagonal)
    if not all(bool((leaf > 0).all()) for leaf in leaves(diagonal)):
        raise ValueError(
            "the diagonal of a preconditioner must be positive: add a damping to each leaf, "
            "`leaf + 1e-3`"
        )
    root = [torch.rsqrt(leaf) for leaf in space.tree_leaves(diagonal)]

    def preconditioned(block: Tree) -> Tree:
        inner = [v * r for v, r in zip(space.block_leaves(block), root, strict=True)]
        products = space.block_leaves(matvec(space.tree(inner)))
        return space.tree(v * r for v, r in zip(products, root, strict=True))

    return _made_of(preconditioned, matvec)


@options.validated(blocks=options.groups)
def per_block(
    matvec: Matvec, like: Tree, /, blocks: Mapping[str, Iterable[str]] | None = None
) -> Matvec:
    """Return the matvec of the block-diagonal part of A, with one block per group of leaves.

    Args:
        matvec: Matvec of A.
        like: Tree with the structure of a vector, such as the parameters.
        blocks: Names of the leaves in each group, by name of the group. By default each leaf is a
            group. Leaves in no group have zero products.

    Raises:
        ValueError: If ``blocks`` is empty, or if a name is unknown or in two groups.

    Cost: one matvec per group and vector, in one pass.
    """
    space = space_of(like)
    groups = [[name] for name in space.names] if blocks is None else [*map(list, blocks.values())]
    if not groups:
        raise ValueError(
            "blocks is empty: pass for instance blocks={'first': ['0.weight', '0.bias']}, or "
            "blocks=None for one block per leaf"
        )
    listed = [name for group in groups for name in group]
    if len(set(listed)) < len(listed) or set(listed) - set(space.names):
        wrong = sorted({n for n in listed if n not in space.names or listed.count(n) > 1})
        raise ValueError(
            f"unknown or repeated in blocks: {', '.join(wrong)}; name each leaf once, such as "
            f"{first_of(space.names)}"
        )

    def diagonal_blocks(block: Tree) -> Tree:
        # A vector is split into one vector per group, which is zero outside of the group. The
        # product of group i contributes only its leaves in group i.
        entries = space.block_leaves(block)
        k = len(entries[0])
        stacked = []
        for name, leaf in zip(space.names, entries, strict=True):
            rows = leaf.new_zeros(len(groups), *leaf.shape)
            for i, group in enumerate(groups):
                if name in group:
                    rows[i] = leaf
            stacked.append(rows.flatten(0, 1))
        products = space.block_leaves(matvec(space.tree(stacked)))
        return space.tree(
            sum(
                (product[i * k : (i + 1) * k] for i, group in enumerate(groups) if name in group),
                torch.zeros_like(leaf),
            )
            for name, leaf, product in zip(space.names, entries, products, strict=True)
        )

    return _made_of(diagonal_blocks, matvec)


@options.validated(chunk_size=options.whole_number)
def batched(fn: Callable[[Tree], Tree], /, *, chunk_size: int | None = None) -> Matvec:
    """Return the matvec of a linear function of one vector.

    Examples:
        >>> matvec = hf.batched(lambda v: 2 * v.flip(0))
        >>> matvec(torch.eye(3))
        tensor([[0., 0., 2.],
                [0., 2., 0.],
                [2., 0., 0.]])

    Args:
        fn: Linear function of a tree that returns a tree.
        chunk_size: Number of vectors that go through ``fn`` at once by vmap; None for the whole
            block, 1 for a plain loop, which works for any ``fn``.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: it must be at least 1")

    def loop(block: Tree) -> Tree:
        rows = range(len(leaves(block)[0]))
        products = [_of_tensors(fn, tree_map(lambda leaf, i=i: leaf[i], block)) for i in rows]
        return tree_map(lambda *out: torch.stack(out), *products)

    def mapped(block: Tree) -> Tree:
        try:
            return torch.vmap(fn, chunk_size=chunk_size)(block)
        except (RuntimeError, TypeError, ValueError):
            # A function that leaves torch fails inside vmap with an obscure error of NumPy. A
            # plain call raises a clearer one.
            _of_tensors(fn, tree_map(lambda leaf: leaf[0], block))
            raise

    return loop if chunk_size == 1 else mapped


def _of_tensors(fn: Callable[[Tree], Tree], vector: Tree) -> Tree:
    """Return the product with one vector, or raise if it is not a tree of tensors."""
    try:
        product = fn(vector)
    except (RuntimeError, TypeError, ValueError) as error:
        if (clearer := options.of_numpy(error)) is not None:
            raise clearer from error
        raise
    for leaf in leaves(product):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"the function returns a {type(leaf).__name__}, not a tree of tensors: compute in "
                "torch, or pass a NumPy function f as compat.from_numpy(f, n=n)"
            )
    return product


@validated
def dense(matrix: Tensor, /) -> Matvec:
    """Return the matvec of a dense symmetric matrix, the inverse function of `matrix`.

    Examples:
        >>> matvec = hf.dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
        >>> matvec(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))  # three vectors
        tensor([[2., 1.],
                [1., 3.],
                [3., 4.]])

    Args:
        matrix: Symmetric matrix ``(n, n)``. Vectors are flat, ``(n,)``, or trees with n entries.

    Raises:
        TypeError: If the matrix does not have a real floating-point dtype.
        ValueError: If the matrix is not square, not finite, or not symmetric.
    """
    if matrix.layout != torch.strided:
        raise TypeError(
            f"the matrix has layout {matrix.layout}: pass matrix.to_dense(), or use "
            "matvecs.from_linear_operator(matrix)"
        )
    if not matrix.is_floating_point():
        raise TypeError(
            f"the matrix has dtype {matrix.dtype}: pass matrix.double(), or matrix.real if it is "
            "complex"
        )
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(
            f"a matrix of shape {tuple(matrix.shape)} is not square: pass a tensor (n, n)"
        )
    if not matrix.numel():
        raise ValueError("the matrix has no entries: pass a matrix with at least one row")
    if not bool(matrix.isfinite().all()):
        raise ValueError("the matrix has entries that are NaN or infinite: pass a finite matrix")
    tolerance = 10 * torch.finfo(matrix.dtype).eps * matrix.abs().max()
    if not torch.allclose(matrix, matrix.mT, rtol=0, atol=float(tolerance)):
        raise ValueError("the matrix is not symmetric: pass (A + A.T) / 2 if it should be")

    def matvec(block: Tree) -> Tree:
        space = space_of(tree_map(lambda leaf: leaf[0], block))
        if space.n != len(matrix):
            raise ValueError(
                f"the matrix takes vectors of {len(matrix)} entries, but got one of {space.n}"
            )
        return space.unravel(space.ravel(block).to(matrix.dtype) @ matrix)

    return with_fingerprint(matvec, lambda: {"matrix": checksum([matrix])})


@validated
def from_linear_operator(operator: Any, /) -> Matvec:
    """Return the matvec of an object with ``shape``, ``dtype`` and ``@``, such as a sparse tensor.

    Kernel matrices of GPyTorch (``linear_operator.LinearOperator``), sparse tensors of torch and
    classes of one's own are such objects. A vector block is one product with a tensor ``(n, k)``:

        matvec = hf.matvecs.from_linear_operator(kernel(x))
        value = hf.logdet(matvec, torch.zeros(len(x)), damping=0.1)

    Args:
        operator: Symmetric operator of shape ``(n, n)``. The symmetry is not checked here; use
            `check`. Vectors are flat, ``(n,)``, or trees with n entries, on its device.

    Raises:
        TypeError: If the argument is not such an object. A product raises it if the vectors have
            another dtype.
        ValueError: If the operator is not square. A product raises it if the vectors do not have n
            entries, or if its result is not a tensor of their shape.

    Cost: one product of the operator for a block, and one copy of the block.
    """
    if isinstance(operator, Tensor) and operator.layout == torch.strided:
        raise TypeError("the operator is a dense tensor: use `dense(A)`")
    shape, dtype = getattr(operator, "shape", None), getattr(operator, "dtype", None)
    if not (shape is not None and hasattr(operator, "__matmul__")):
        raise TypeError(
            f"a {type(operator).__name__} is no linear operator, which has `shape`, `dtype` and "
            "`@`: pass a function of blocks itself, or use `batched(f)` for one of vectors"
        )
    if not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"the operator has dtype {dtype}, which is not of torch: use "
            "`compat.from_scipy(operator)` for matrices and operators of NumPy and SciPy"
        )
    if not dtype.is_floating_point:
        raise TypeError(
            f"the operator has dtype {dtype}: pass a real floating-point one, such as "
            "`operator.double()`"
        )
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(
            f"the operator has shape {tuple(shape)}, which is not square: pass an (n, n) operator, "
            "one of a batch"
        )

    def matvec(block: Tree) -> Tree:
        space = space_of(tree_map(lambda leaf: leaf[0], block))
        if space.n != shape[0]:
            raise ValueError(
                f"the operator takes vectors of {shape[0]} entries, but got one of {space.n}"
            )
        if space.dtype != dtype:
            raise TypeError(
                f"the operator has dtype {dtype}, but the vectors have {space.dtype}: pass `like` "
                f"in {dtype}, such as `torch.zeros({space.n}, dtype={dtype})`"
            )
        columns = space.ravel(block).mT
        product = operator @ columns
        if not isinstance(product, Tensor) or product.shape != columns.shape:
            given = getattr(product, "shape", type(product).__name__)
            raise ValueError(
                f"the operator's product with a tensor of shape {tuple(columns.shape)} is "
                f"{given}: it must be a tensor of the same shape"
            )
        return space.unravel(product.mT.contiguous())

    return matvec
