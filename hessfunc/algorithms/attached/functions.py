"""Matrix functions, their traces and log-determinants with the graph of the parameters.

The derivative of a matrix function is its Frechet derivative: for a polynomial f,

    L(A, dA) = sum_k c_k sum_{i+j=k-1} A^i dA A^j.

A^j b lies in the Krylov space of b, where A acts as T. With the eigenpairs (t_i, s_i) of T and
the divided differences f[x, y] = (f(x) - f(y)) / (x - y),

    c' L(A, dA) b = sum_ij f[r_i, t_j] (c-coefficient i) (b-coefficient j) (Q_c r_i)' dA (Q_b s_j),

which is exact for polynomials of a degree up to the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from hessfunc.algorithms.attached.answer import answer, products_with_graph
from hessfunc.algorithms.basis import Basis
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.recurrences import Recurrences, eigenpairs_of, extended
from hessfunc.options import at_least, validated
from hessfunc.spaces.space import Space, rows_dtype
from hessfunc.trees import Matvec, Tree

# Function of eigenvalues, applied to each entry of a float64 tensor.
Spectral: TypeAlias = Callable[[Tensor], Tensor]


@validated
def function(matvec: Matvec, f: Spectral, b: Tree, /, *, steps: int = 30) -> Tree:
    """Return f(A) b with the graph of the parameters and of b.

    Lanczos from b gives f(A) b ~ |b| Q' f(T) e_1. The backward pass of a cotangent c is the
    Frechet derivative c' L(A, dA) b in the Krylov spaces of b and c.

    Args:
        matvec: Matvec with a graph, from a curvature function with ``differentiable=True``.
        f: Function of the eigenvalues, ``torch.exp`` or another function of a float64 tensor.
        b: Vector, a tree.
        steps: Number of Lanczos steps.

    Returns:
        Tree like b.

    Raises:
        ValueError: If products have no graph, or if f is not finite at a Ritz value.
        NotImplementedError: If a transform is active or, raised by the backward pass, if the second
            derivative is requested.

    Cost: ``steps`` products, and ``steps`` more with their graph, one block of which is kept; in
    the backward pass, ``steps`` products and a pass through the graph, 2 gradients for each.

    Source: Kandolf, Koskela, Relton and Schweitzer 2021, arXiv 2008.12926.
    """
    at_least(1, steps=steps)
    products = Products.of(matvec, b)
    space = products.space
    given = space.tree_leaves(b)
    start = space.ravel_leaves([leaf.detach()[None] for leaf in given], dtype=rows_dtype(space))
    krylov = _krylov(products, start[0], steps)
    value = krylov.apply(space, krylov.of(f))
    images = products_with_graph(matvec, space.unravel(krylov.basis.rows))

    def pull(cotangents: Sequence[Tensor]) -> list[Tensor]:
        target = space.ravel_leaves([g[None] for g in cotangents], dtype=start.dtype)[0]
        if not bool(target.any()):
            return [torch.zeros_like(x) for x in (*images, *given)]
        other = _krylov(products, target, steps)
        # Rows i of the weights: the cotangent of A q_i for the basis vectors q_i of b.
        slopes = _divided_differences(f, krylov.nodes, other.nodes)
        middle = slopes * krylov.coefficients[:, None] * other.coefficients[None]
        weights = krylov.vectors @ middle @ other.vectors.mT
        rows = other.basis.combine(space, weights, start.dtype)
        along = space.block_leaves(space.unravel(other.apply(space, other.of(f))[None]))
        block = space.block_leaves(space.unravel(rows))
        return [
            *(x.to(p.dtype) for x, p in zip(block, images, strict=True)),
            *(x[0].to(leaf.dtype) for x, leaf in zip(along, given, strict=True)),
        ]

    values = [leaf[0] for leaf in space.block_leaves(space.unravel(value[None]))]
    return space.tree(answer(values, [*images, *given], pull))


@validated
def trace_of_function(
    matvec: Matvec,
    f: Spectral,
    like: Tree,
    /,
    *,
    probes: int = 10,
    steps: int = 30,
    seed: int,
) -> Tensor:
    """Return the stochastic Lanczos quadrature of tr f(A) with the graph of the parameters.

        tr f(A) ~ mean_i z_i' f(A) z_i

    Args:
        matvec: Matvec with a graph, from a curvature function with ``differentiable=True``.
        f: Function of the eigenvalues, as in `function`.
        like: Tree that shows the structure of a vector.
        probes: Number of random vectors. They depend on the seed alone, so that the estimate is a
            smooth function of the parameters.
        steps: Number of Lanczos steps of each probe.
        seed: Seed of the probes.

    Returns:
        Estimate, a float64 scalar.

    Raises:
        ValueError: If products have no graph, or if f is not finite at a Ritz value.
        NotImplementedError: If a transform is active or, raised by the backward pass, if the second
            derivative is requested.

    Cost: probes * steps products, and as many with their graph, all of which are kept; in the
    backward pass, 2 gradients for each.

    Source: Ubaru, Chen and Saad 2017; Kandolf, Koskela, Relton and Schweitzer 2021, arXiv
    2008.12926.
    """
    at_least(1, probes=probes, steps=steps)
    products = Products.of(matvec, like)
    space = products.space
    starts = space.probes(range(probes), kind="sphere", seed=seed, dtype=rows_dtype(space))
    spaces = [_krylov(products, start, steps) for start in starts]
    quadratures = [float(k.coefficients.square() @ k.of(f)) for k in spaces]
    images = [products_with_graph(matvec, space.unravel(k.basis.rows)) for k in spaces]
    value = torch.tensor(math.fsum(quadratures) / probes, dtype=torch.float64, device=space.device)

    def pull(cotangents: Sequence[Tensor]) -> list[Tensor]:
        scale = float(cotangents[0]) / probes
        pulled: list[Tensor] = []
        for k, of_one in zip(spaces, images, strict=True):
            slopes = _divided_differences(f, k.nodes, k.nodes)
            middle = scale * slopes * k.coefficients[:, None] * k.coefficients[None]
            weights = k.vectors @ middle @ k.vectors.mT
            rows = k.basis.combine(space, weights, starts.dtype)
            block = space.block_leaves(space.unravel(rows))
            pulled.extend(x.to(p.dtype) for x, p in zip(block, of_one, strict=True))
        return pulled

    return answer([value], [leaf for of_one in images for leaf in of_one], pull)[0]


@validated
def logdet(
    matvec: Matvec,
    like: Tree,
    /,
    *,
    damping: float = 0.0,
    probes: int = 10,
    steps: int = 30,
    seed: int,
) -> Tensor:
    """Return an estimate of log det(A + damping I) with the graph of the parameters.

    It is `trace_of_function` of the logarithm.

    Args:
        matvec: Matvec with a graph, from a curvature function with ``differentiable=True``.
        like: Tree that shows the structure of a vector.
        damping: Number added to all eigenvalues.
        probes: Number of random vectors, as in `trace_of_function`.
        steps: Number of Lanczos steps of each probe.
        seed: Seed of the probes.

    Returns:
        Estimate, a float64 scalar.

    Raises:
        ValueError: If products have no graph, or if A + damping I has a Ritz value that is not
            positive.
        NotImplementedError: If a transform is active or, raised by the backward pass, if the second
            derivative is requested.

    Cost: as `trace_of_function`.

    Source: Ubaru, Chen and Saad 2017.
    """

    def log(values: Tensor) -> Tensor:
        smallest = float(values.detach().min()) + damping
        if smallest <= 0:
            raise ValueError(
                f"A + damping I has the Ritz value {smallest:.3g}, and no log-determinant: pass a "
                "larger `damping`, or a positive semi-definite matrix such as that of `ggnvp`"
            )
        return torch.log(values + damping)

    return trace_of_function(matvec, log, like, probes=probes, steps=steps, seed=seed)


@dataclass(frozen=True)
class _Krylov:
    """Krylov space of a vector b, and the eigenvalues of the matrix in it.

    Attributes:
        basis: Orthonormal rows Q, ``(m, n)``.
        nodes: Eigenvalues of T = Q A Q', float64 ``(m,)`` on the CPU.
        vectors: Eigenvectors of T, as columns.
        coefficients: Coefficients of b in the Ritz vectors, |b| s_i'e_1.
    """

    basis: Basis
    nodes: Tensor
    vectors: Tensor
    coefficients: Tensor

    def of(self, f: Spectral) -> Tensor:
        """Return f at the nodes.

        Raises:
            ValueError: If a value is not finite.
        """
        with torch.no_grad():
            values = f(self.nodes)
        if not bool(values.isfinite().all()):
            at = float(self.nodes[~values.isfinite()][0])
            raise ValueError(f"f is not finite at the Ritz value {at:.6g}: shift the matrix, or f")
        return values

    def apply(self, space: Space, values: Tensor) -> Tensor:
        """Return Q' S diag(values) S' e_1 |b|, a row."""
        weights = self.vectors @ (values * self.coefficients)
        return self.basis.combine(space, weights[None], self.basis.rows.dtype)[0]


def _krylov(products: Products, start: Tensor, steps: int) -> _Krylov:
    """Return the Krylov space of a row after Lanczos steps with full reorthogonalisation."""
    space = products.space
    length = float(space.norms(start[None])[0])
    if length == 0:
        raise ValueError("the vector b is zero: pass a vector with a nonzero entry")
    steps = min(steps, space.n)
    runs = Recurrences.begin(start[None] / length, steps)
    # Solvers inside of a backward pass and outside of it make products without their graph.
    with torch.no_grad():
        while runs.active:
            runs = extended(products, runs, steps)
    nodes, vectors = eigenpairs_of(runs.jacobi(0))
    return _Krylov(runs.basis.of(0), nodes, vectors, length * vectors[0])


def _divided_differences(f: Spectral, xs: Tensor, ys: Tensor) -> Tensor:
    """Return f[x, y] = (f(x) - f(y)) / (x - y) for all pairs, which is f'(x) where x = y."""
    steps = xs[:, None] - ys[None]
    # Cancellation in the quotient and the error f''' h^2 / 24 of the midpoint rule balance here.
    size = torch.maximum(xs.abs()[:, None], ys.abs()[None]).clamp_min(torch.finfo(xs.dtype).tiny)
    close = steps.abs() <= torch.finfo(xs.dtype).eps ** (1 / 3) * size
    with torch.enable_grad():
        middles = ((xs[:, None] + ys[None]) / 2).detach().requires_grad_()
        (slopes,) = torch.autograd.grad(f(middles).sum(), middles)
    with torch.no_grad():
        quotients = (f(xs)[:, None] - f(ys)[None]) / torch.where(close, 1.0, steps)
    return torch.where(close, slopes, quotients)
