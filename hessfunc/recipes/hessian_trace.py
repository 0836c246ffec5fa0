"""Trace of a Hessian: its Gauss-Newton part exactly, the remainder by random probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from hessfunc.algorithms.checkpoint import Directory
from hessfunc.algorithms.driver import Callback
from hessfunc.algorithms.results import Estimate
from hessfunc.algorithms.trace.hutchinson import hutchinson
from hessfunc.display import Reported
from hessfunc.losses import Loss
from hessfunc.options import validated
from hessfunc.recipes.gauss_newton_diagonal import diagonal_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.mean import mean_over
from hessfunc.transforms.batches.reading import Passes
from hessfunc.transforms.batches.sums import Data, Keep
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
    keep: Keep = False,
    mesh: DeviceMesh | None = None,
    data: Data = "replicated",
    examples_per_chunk: int | None = None,
    block_size: int = 10,
    seed: int | None = None,
    space: Space | None = None,
    callback: Callback[Estimate] | None = None,
    progress: Reported = None,
    checkpoint: Directory = None,
) -> Estimate:
    """Estimate the trace of the Hessian of a loss over batches.

        tr H = tr G + E[w' (H - G) w],  tr G = sum_b sum_c s_bc |J_b' u_bc|^2

    The trace of the generalised Gauss-Newton matrix G is exact, from `ggn_diagonal`. Random probes
    w estimate the trace of the remainder H - G, whose products are `functional_hvp`. If a net fits
    its data, the remainder is small: the variance of a probe is at most 2 |H - G|_F^2, a small part
    of the 2 |H|_F^2 of a probe of H.

    Examples:
        >>> loss = hf.supervised(lambda w, x: x @ w, torch.nn.functional.mse_loss)
        >>> batch = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.zeros(2)
        >>> hf.hessian_trace(loss, torch.zeros(2), [batch], max_matvecs=4, seed=0).value
        6.0

    Args:
        loss: Loss that exposes its outputs and its criterion, as made by `supervised` or
            `composed`.
        params: Parameters at which the trace is taken.
        batches: Batches whose weighted mean is taken.
        rtol: Relative tolerance: stop when the half-width of the 95 % interval is below
            ``rtol |value|``.
        atol: Absolute tolerance: stop when the half-width is below ``atol``. Without ``rtol`` and
            ``atol``, the whole budget is used.
        max_matvecs: Largest number of probes, each of which takes one product.
        weight: Weight of a batch in the mean, as in `over_batches`.
        keep: Whether the graph of every batch is kept, as in `over_batches`.
        mesh: Device mesh of the ranks that share the batches, as in `over_batches`.
        data: Layout of the batches on the ranks, as in `over_batches`.
        examples_per_chunk: Number of examples in one pass of `ggn_diagonal`.
        block_size: Number of probes that are multiplied at once.
        seed: Seed of the probes.
        space: Space made by `sharded`, in which every rank holds a part of each vector. By
            default vectors are replicated.
        callback: Function called with the running `Estimate` after each round. A return value of
            True stops the run.
        progress: Function of a `Progress`, called after each batch of the exact part and after each
            round of the probes; True for a bar or lines, as in `RunOptions`.
        checkpoint: Directory that keeps the state of the probes, so that an interrupted run can
            be resumed.

    Returns:
        An `Estimate`, with the part of each leaf in ``by_leaf``. ``matvecs`` counts products with
        H - G.

    Raises:
        TypeError: If an argument has the wrong type, as in `ggn_diagonal`, `over_batches` and
            `hutchinson`.
        ValueError: If an argument has an invalid value, as in `ggn_diagonal`, `over_batches` and
            `hutchinson`.

    Cost: the backward passes of `ggn_diagonal`, at most C an example for C outputs, and one product
    a probe. For a model with many outputs, use `xtrace`.

    Source: Schraudolph 2002 for the parts; Hutchinson 1990 for the probes.
    """
    # Shared by both parts, which must see the same examples for tr G + tr(H - G) = tr H.
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
        progress=progress,
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
        progress=progress,
        checkpoint=checkpoint,
    )
