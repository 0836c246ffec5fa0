"""The trace of a Hessian: its Gauss-Newton part exactly, the rest by probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from hessfunc.algorithms.checkpoint import Directory
from hessfunc.algorithms.driver import Callback
from hessfunc.algorithms.results import Estimate
from hessfunc.algorithms.trace.hutchinson import hutchinson
from hessfunc.losses import Loss
from hessfunc.options import validated
from hessfunc.recipes.gauss_newton_diagonal import diagonal_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.mean import Passes, mean_over
from hessfunc.transforms.batches.sums import Data
from hessfunc.transforms.functional_hessian import functional_hvp
from hessfunc.trees import Tree

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@validated
def hessian_trace(
    loss: Loss,
    params: Tree,
    batches: Iterable[Any],
    /,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    max_matvecs: int = 100,
    weight: Callable[[Any], float] | None = None,
    keep: bool = False,
    mesh: DeviceMesh | None = None,
    data: Data = "replicated",
    examples_per_chunk: int | None = None,
    block_size: int = 10,
    seed: int | None = None,
    space: Space | None = None,
    callback: Callback[Estimate] | None = None,
    checkpoint: Directory = None,
) -> Estimate:
    """The trace of the Hessian of a loss over batches, by exact and by random parts.

        tr H = tr G + E[w' (H - G) w],  tr G = sum_b sum_c s_bc |J_b' u_bc|^2

    with G the generalised Gauss-Newton matrix, whose trace `ggn_diagonal` finds without sampling,
    and probes for what it leaves out, `functional_hvp`. Of a net that fits its data that is
    little: the variance of a probe, at most 2 |H - G|_F^2, is then a small part of 2 |H|_F^2.

    Args:
        loss: with its two halves, as made by `supervised` or `composed`.
        params: at which the trace is taken.
        batches: of which the weighted mean is taken.
        rtol: stop when the half-width of the 95 % interval is below rtol |value|.
        atol: stop when it is below atol. Without rtol and atol the whole budget is used.
        max_matvecs: the budget: so many probes at the most.
        weight: what a batch counts, as in `over_batches`.
        keep: keep the graph of every batch, as in `over_batches`.
        mesh: of ranks that share the batches, as in `over_batches`.
        data: How batches lie on the ranks, as in `over_batches`.
        examples_per_chunk: how many examples go through one pass of `ggn_diagonal`.
        block_size: how many probes are multiplied at once.
        seed: of the probes.
        space: in which every rank holds a part of each vector, made by `sharded`; by default
            every rank holds the whole.
        callback: called with the running `Estimate` after each round; returning True stops.
        checkpoint: a directory that keeps the state of the probes, for a run that was killed to
            go on from.

    Returns:
        `Estimate`, with the part of each leaf in ``by_leaf``; ``matvecs`` counts products with
        H - G.

    Raises:
        TypeError, ValueError: as `ggn_diagonal`, `over_batches` and `hutchinson`.

    Cost: the backward passes of `ggn_diagonal`, C or less an example for C outputs, and a product
    a probe. For a model of many outputs take `xtrace`.

    Source: the parts: Schraudolph 2002; the probes: Hutchinson 1990.
    """
    # Of both parts, so that they are of the same examples.
    passes = Passes()
    known = diagonal_of(
        loss,
        params,
        batches,
        passes=passes,
        weight=weight,
        mesh=mesh,
        data=data,
        examples_per_chunk=examples_per_chunk,
    )
    rest = mean_over(
        functional_hvp(loss), passes=passes, weight=weight, keep=keep, mesh=mesh, data=data
    )(params, batches)
    return hutchinson(
        rest,
        params,
        known=known,
        rtol=rtol,
        atol=atol,
        max_matvecs=max_matvecs,
        block_size=block_size,
        seed=seed,
        space=space,
        callback=callback,
        checkpoint=checkpoint,
    )
