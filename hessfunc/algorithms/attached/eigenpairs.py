"""Eigenvalues and eigenvectors with the graph of the parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hessfunc.algorithms.attached.answer import answer, products_with_graph
from hessfunc.algorithms.results import Eigenpairs
from hessfunc.algorithms.solve.minres import minres
from hessfunc.options import validated
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.trees import Matvec, Tree, tree_map

# Largest residual of an eigenpair, in units of the largest absolute eigenvalue given.
_RESIDUAL = 0.05


@validated
def eigenvalues(matvec: Matvec, pairs: Eigenpairs, /) -> Tensor:
    """Return eigenvalues with the graph of the parameters.

        d value = v' dA v

    for a unit eigenvector v, which is held fixed: the solver is not differentiated. Among equal
    eigenvalues, only sums over all of them have a derivative.

    Args:
        matvec: Matvec with a graph, from a curvature function with ``differentiable=True``.
        pairs: Eigenpairs of the same matrix, computed by `lanczos` or `power_iteration`.

    Returns:
        Rayleigh quotients v'Av, ``(k,)``, in float64.

    Raises:
        ValueError: If products have no graph, or if the pairs are not those of the matrix.
        NotImplementedError: If a transform is active or, raised by the backward pass, if the second
            derivative is requested.

    Cost: k products with their graph, and the backward pass through them: 4 gradients for each.

    Source: Magnus 1985, On differentiating eigenvalues and eigenvectors.
    """
    products, rows, images = _images(matvec, pairs)
    space = _space(pairs)
    values = (rows * images).sum(1, dtype=torch.float64)

    def pull(cotangents: Sequence[Tensor]) -> list[Tensor]:
        scaled = cotangents[0].to(rows)[:, None] * rows
        return _like(products, space, scaled)

    return answer([values], products, pull)[0]


@validated
def eigenvectors(
    matvec: Matvec, pairs: Eigenpairs, /, *, rtol: float = 1e-6, max_matvecs: int = 1000
) -> Tree:
    """Return unit eigenvectors with the graph of the parameters.

        d v = -(A - value I)^+ dA v

    The backward pass solves one system for each eigenvector, by MINRES on the complement of v.

    Args:
        matvec: Matvec with a graph, from a curvature function with ``differentiable=True``.
        pairs: Eigenpairs of the same matrix.
        rtol: Tolerance of the relative residuals of the solves.
        max_matvecs: Budget of the solves.

    Returns:
        Block of k vectors.

    Raises:
        ValueError: If products have no graph, or if the pairs are not those of the matrix.
        RuntimeError: If a solve does not reach its tolerance; raised by the backward pass. An
            eigenvector of a multiple eigenvalue has no derivative.
        NotImplementedError: If a transform is active or, raised by the backward pass, if the second
            derivative is requested.

    Cost: k products with their graph; in the backward pass, one solve by MINRES for each vector,
    and 2 gradients more for each product.

    Source: Magnus 1985, On differentiating eigenvalues and eigenvectors.
    """
    products, rows, _ = _images(matvec, pairs)
    space = _space(pairs)
    values = pairs.values.to(rows.device)

    def complement(vectors: Tensor) -> Tensor:
        return vectors - (rows * vectors).sum(1, keepdim=True) * rows

    def pull(cotangents: Sequence[Tensor]) -> list[Tensor]:
        targets = complement(space.ravel_leaves(cotangents, dtype=rows.dtype))
        solutions = torch.zeros_like(rows)
        for i, (v, value) in enumerate(zip(rows, values, strict=True)):
            if not bool(targets[i].any()):
                continue

            def shifted(block: Tree, v: Tensor = v, value: Tensor = value) -> Tree:
                # The matrix (I - vv') (A - value I) (I - vv'), which is symmetric.
                inside = space.ravel(block, dtype=rows.dtype)
                inside = inside - (inside @ v)[:, None] * v
                images = space.ravel(matvec(space.unravel(inside)), dtype=rows.dtype)
                images = images - value.to(images) * inside
                return space.unravel(images - (images @ v)[:, None] * v)

            solution = minres(
                shifted, space.unravel(targets[i]), rtol=rtol, max_matvecs=max_matvecs
            )
            if not solution.converged:
                raise RuntimeError(
                    f"the derivative of eigenvector {i} needs a solve, which has a residual "
                    f"of {solution.residual:.1e} ({solution.reason}): pass a larger "
                    "`rtol` or `max_matvecs`. An eigenvector of a multiple eigenvalue has no "
                    "derivative"
                )
            vector = tree_map(lambda leaf: leaf[None], solution.x)
            solutions[i] = -complement(space.ravel(vector, dtype=rows.dtype).expand_as(rows))[i]
        return _like(products, space, solutions)

    found = answer(space.block_leaves(space.unravel(rows)), products, pull)
    return space.tree(found)


def _space(pairs: Eigenpairs) -> Space:
    return space_of(tree_map(lambda leaf: leaf[0], pairs.vectors))


def _images(matvec: Matvec, pairs: Eigenpairs) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return the products with unit eigenvectors, and rows of eigenvectors and products.

    Raises:
        ValueError: If a residual shows that the pairs belong to another matrix.
    """
    space = _space(pairs)
    rows = space.ravel(pairs.vectors).detach()
    rows = rows / space.norms(rows).to(rows)[:, None]
    products = products_with_graph(matvec, space.unravel(rows))
    images = space.ravel_leaves([p.detach() for p in products], dtype=rows.dtype)
    values = pairs.values.to(rows)
    residuals = space.norms(images - values[:, None] * rows)
    largest = float(values.abs().max())
    if float(residuals.max()) > _RESIDUAL * largest:
        raise ValueError(
            f"an eigenpair has the residual {float(residuals.max()):.2g} in this matrix, whose "
            f"largest given eigenvalue is {largest:.2g}: compute the pairs at the same parameters "
            "and batch as the matvec"
        )
    return products, rows, images


def _like(products: Sequence[Tensor], space: Space, rows: Tensor) -> list[Tensor]:
    """Return rows as leaves with the dtypes of the products."""
    block = space.block_leaves(space.unravel(rows))
    return [leaf.to(product.dtype) for leaf, product in zip(block, products, strict=True)]
