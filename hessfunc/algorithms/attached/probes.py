"""Traces and diagonals from fixed probes, with the graph of the parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.algorithms.attached.answer import products_with_graph
from hessfunc.spaces.of import space_of
from hessfunc.trees import Matvec, Tree, leaves, tree_map


@options.validated(probes=options.tree)
def trace(matvec: Matvec, probes: Tree, /) -> Tensor:
    """Return Hutchinson's estimate of the trace with the graph of the parameters.

        tr A ~ mean_i z_i' A z_i

    The probes are held fixed, so that the estimate is a smooth function of the parameters, which
    can be differentiated to any order.

    Args:
        matvec: Matvec with a graph, from a curvature function with ``differentiable=True``.
        probes: Block of k vectors with E[z z'] = I, as returned by `random_like`.

    Returns:
        Estimate, a float64 scalar.

    Raises:
        ValueError: If products have no graph.
        NotImplementedError: If a transform is active: use `inner` and `apply` there.

    Cost: k products with their graph, and the backward pass through them: 4 gradients for each.

    Source: Hutchinson 1990.
    """
    _refuse_unless_block(probes)
    products = products_with_graph(matvec, probes)
    pairs = list(zip(leaves(probes), products, strict=True))
    total = torch.stack([(z * p).sum(dtype=torch.float64) for z, p in pairs]).sum()
    return total / len(pairs[0][0])


@options.validated(probes=options.tree)
def diagonal(matvec: Matvec, probes: Tree, /) -> Tree:
    """Return an estimate of the diagonal with the graph of the parameters.

        diag A ~ sum_i z_i * A z_i / sum_i z_i * z_i   (entrywise)

    Args:
        matvec: Matvec with a graph, from a curvature function with ``differentiable=True``.
        probes: Block of k vectors with E[z z'] = I, as returned by `random_like`.

    Returns:
        Tree like a vector.

    Raises:
        ValueError: If products have no graph, or if ``probes`` is no block.
        NotImplementedError: If a transform is active: use `inner` and `apply` there.

    Cost: as `trace`.

    Source: Bekas, Kokiopoulou and Saad 2007.
    """
    _refuse_unless_block(probes)
    products = products_with_graph(matvec, probes)
    space = space_of(tree_map(lambda leaf: leaf[0], probes))
    given = space.block_leaves(probes)
    return space.tree(
        (z * p).sum(0) / z.square().sum(0) for z, p in zip(given, products, strict=True)
    )


def _refuse_unless_block(probes: Tree) -> None:
    lengths = {len(leaf) if leaf.dim() else 0 for leaf in leaves(probes)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "probes is not a block of vectors, whose leaves have one leading axis of the same "
            "length: pass `random_like(params, k, seed=0)`"
        )
