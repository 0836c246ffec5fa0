"""Overlaps of eigenvectors with gradients, updates and other eigenvectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hessfunc.algorithms.results import Eigenpairs
from hessfunc.algorithms.results.overlap import Overlap
from hessfunc.numerics import wide_dtype
from hessfunc.options import anything, validated
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.trees import Tree, flatten, tree_map

# Singular values of unit vectors below this multiple of their rounding belong to dependent vectors.
_DEPENDENT = 100


@validated(a=anything, b=anything)
def overlap(a: Any, b: Any, /, *, like: Tree | None = None, space: Space | None = None) -> Overlap:
    """Compute the overlaps of two sets of vectors, and the principal angles between their spans.

        cosines_ij = |<u_i, w_j>| / (|u_i| |w_j|)
        cos angles_i = the i-th singular value of U'W,  captured_j = |U U' w_j|^2 / |w_j|^2

    Here the rows of U and W are orthonormal bases of the spans of u and w. Angles below pi / 4 are
    computed from their sines, the singular values of W - U U'W, so that small angles are accurate.

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> top = hf.lanczos(matvec, like, k=2, seed=0)
        >>> hf.overlap(top, [torch.ones(10, dtype=torch.float64)]).cosines.round(decimals=3)
        tensor([[0.3160],
                [0.3160]], dtype=torch.float64)

    Args:
        a: Vectors u: `Eigenpairs`, a vector block, one vector, or a list of vectors, such as
            ``[gradient, update]``.
        b: Vectors w, in one of the same forms.
        like: Tree with the structure of a vector, such as the parameters. It is needed only if
            neither argument is `Eigenpairs`, and one is a vector block or the parameters are a
            list. Without it, a tree is one vector.
        space: Space made by `sharded` of vectors that are divided among ranks; by default vectors
            are replicated.

    Returns:
        `Overlap`. The bases of random k- and l-dimensional subspaces in n dimensions have cosines
        of about ``sqrt(1 / n)`` and capture ``k / n``.

    Raises:
        ValueError: If a vector is zero, not finite, or not like the other vectors.
        TypeError: If an argument is neither `Eigenpairs` nor a tree of tensors.

    Cost: no matvec; 2 (k + l)^2 n flops. Memory: 2 (k + l) vectors in float64.

    Source: Bjoerck and Golub 1973, Numerical methods for computing angles between linear
    subspaces; overlaps of gradients: Gur-Ari, Roberts and Dyer 2018, arXiv 1812.04754.
    """
    space = space_of(_like(a, b) if like is None else like) if space is None else space
    with torch.no_grad():
        rows = [_unit_rows(space, given, name) for name, given in (("a", a), ("b", b))]
        first, second = (_basis(space, row) for row in rows)
        inside = space.gram(second, first)
        # W = (W U') U + R, whose Gram matrix R R' has the squared sines as eigenvalues.
        outside = second - space.combine(inside, first)
        return Overlap(
            cosines=space.gram(*rows).abs().clamp_max(1).cpu(),
            angles=_angles(inside.cpu(), space.gram(outside, outside).cpu()),
            captured=space.gram(rows[1], first).square().sum(1).clamp_max(1).cpu(),
            matvecs=0,
            passes=0,
            reason="complete",
            seed=None,
        )


def _basis(space: Space, rows: Tensor) -> Tensor:
    """Return an orthonormal basis of the span of unit rows, which may be dependent."""
    basis, triangle = space.factored(rows)
    # rows = R'Q with R = X diag(s) Y': the span has the basis X'Q of the directions with s > 0.
    left, sizes, _ = torch.linalg.svd(triangle.double())
    rank = int((sizes > _DEPENDENT * torch.finfo(space.dtype).eps * sizes[0]).sum())
    return space.combine(left[:, :rank].mT, basis)


def _angles(inside: Tensor, outside: Tensor) -> Tensor:
    """Return the principal angles, given U'W and the Gram matrix of W - U U'W."""
    count = min(inside.shape)
    cosines = torch.linalg.svdvals(inside).clamp(0, 1)[:count]
    sines = torch.linalg.eigvalsh(outside).clamp(0, 1).sqrt()[:count]
    return torch.where(cosines > 0.5**0.5, sines.asin(), cosines.acos())


def _like(a: Any, b: Any) -> Tree:
    """Return one vector of the arguments, whose structure is that of all."""
    for given in (a, b):
        if isinstance(given, Eigenpairs):
            return tree_map(lambda leaf: leaf[0], given.vectors)
    for given in (a, b):
        if not isinstance(given, list):
            return given
    return a[0] if a else a


def _unit_rows(space: Space, given: Any, name: str) -> Tensor:
    """Return vectors as rows of unit length in float64."""
    wide = wide_dtype(space.device)
    if isinstance(given, Eigenpairs):
        rows = space.rows(given.vectors, dtype=wide)
    elif isinstance(given, list) and flatten(given)[1] != space.structure:
        if not given:
            raise ValueError(f"{name} is an empty list: pass at least one vector")
        rows = torch.cat([space.rows(one, dtype=wide) for one in given])
    else:
        rows = space.rows(given, dtype=wide)
    lengths = space.norms(rows)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        raise ValueError(f"{name} has a vector that is zero or not finite: pass another one")
    return rows / lengths.to(rows)[:, None]
