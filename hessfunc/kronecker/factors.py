"""Kronecker-factored curvature: each diagonal block is ``B (x) A``.

The factor B belongs to the outputs of a layer, the factor A to its inputs. A weight acts on P
positions of an example, with inputs x_p and gradients g_p at its outputs:

    "expand":  A = mean_bp x_p x_p'         B = sum_b sum_p g_p g_p'
    "reduce":  A = mean_b xbar xbar'        B = sum_b (sum_p g_p) (sum_p g_p)'

Here xbar is the mean of x_p over positions. "expand" fits positions that act as examples, such as
tokens with a target each. "reduce" fits positions that are averaged before the loss (Eschenhagen,
Immer, Turner, Schneider and Hennig 2023, arXiv 2311.00636).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor, nn

from hessfunc.kronecker.blocks import Block, Blocks
from hessfunc.kronecker.calls import (
    linearising,
    refuse_compiled,
    refuse_dtensors,
)
from hessfunc.kronecker.factored_blocks import Eigenbasis, Kronecker
from hessfunc.kronecker.layer import SharedWeight
from hessfunc.kronecker.moments import (
    Sharing,
    by_row,
    input_moments,
    outer_moments,
    squared_moments,
    summed_moments,
)
from hessfunc.kronecker.propagate import BlockCurvature, Reached, backpropagated
from hessfunc.kronecker.uses import HOLD, ONLY_WEIGHTS, observed, refuse_unless_seen
from hessfunc.losses import Loss
from hessfunc.options import validated
from hessfunc.randomness import of_matrix
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.checksum import batch_key
from hessfunc.transforms.batches.reductions import noted
from hessfunc.transforms.hessian import requiring_gradients
from hessfunc.transforms.likelihoods import refuse_without_likelihood, sampled_gradients
from hessfunc.transforms.output_hessians import each_hessian
from hessfunc.transforms.output_matrices import refuse_without_halves

# Function (outputs, batch) -> columns (c, B, ...) with sum_c u_bc u_bc' = H_b, the Hessian of the
# criterion at the outputs of example b, exactly or in expectation.
_Columns: TypeAlias = Callable[[Tensor, Any], Tensor]


@validated
def kfra(loss: Loss, model: nn.Module, /, *, sharing: Sharing = "expand") -> BlockCurvature:
    """Kronecker-factored recursive approximation: ``(params, batch) -> blocks``.

        G = H_z (x) mean(x x'),    H_x = mean_b J_b' H_z J_b

    Here H_z is the Gauss-Newton matrix at the outputs of a module. It is propagated backwards as
    in `hbp`, by the mean of J'HJ over the batch at each module.

    Args:
        loss: Loss that exposes its outputs and its criterion, as made by `supervised`.
        model: Module from which the loss was made, as for `hbp`.
        sharing: Treatment of positions that share a weight, ``"expand"`` or ``"reduce"``.

    Returns:
        A curvature function that returns `Blocks`.

    Raises:
        ValueError: If `hbp` raises it.
        NotImplementedError: If `hbp` raises it, or if a parameter is not the weight or bias of a
            linear map.
        MemoryError: If `hbp` raises it.

    Cost: the cost of `hbp`.

    Source: Botev, Ritter and Barber 2017, arXiv 1706.03662.
    """
    _refuse_sharing(sharing)
    refuse_without_halves(loss)

    def block(reached: Reached) -> Block:
        weight = reached.dependence
        if not isinstance(weight, SharedWeight):
            raise NotImplementedError(f"{ONLY_WEIGHTS}: {HOLD}, or use `hbp`")
        hessian = weight.by_channel(reached.hessian)
        outputs, positions = weight.shape[0] // weight.groups, len(hessian) // weight.shape[0]
        view = hessian.view(2 * (weight.groups, outputs, positions))
        # With H_z = sum g g' over outputs (o, p), B[o, a] is sum_p H_z[o, p, a, p] for "expand"
        # and sum_pq H_z[o, p, a, q] for "reduce".
        summed = "gopgap->goa" if sharing == "expand" else "gopgaq->goa"
        left = torch.einsum(summed, view)
        return Kronecker(left, input_moments(weight.each(), sharing), weight.shape)

    return backpropagated(
        loss,
        model,
        block,
        residual="zero",
        average_input_jacobian=False,
        average_parameter_jacobian=False,
    )


@validated
def kflr(loss: Loss, model: nn.Module, /, *, sharing: Sharing = "expand") -> BlockCurvature:
    """Kronecker-factored low rank: ``(params, batch) -> blocks``, with exact output factors.

        G = sum_b (J_b' H_b J_b) (x) mean_b(x x')

    Here J_b is the Jacobian of the model's outputs with respect to a module's outputs, and H_b is
    the Hessian of the loss with respect to the model's outputs. Negative eigenvalues of H_b are
    set to zero.

    Args:
        loss: Loss that exposes its outputs and its criterion, as made by `supervised` or
            `composed`.
        model: Module from which the loss was made, of any architecture. Each parameter must belong
            to a module whose outputs depend on it linearly. Several calls of a module, and calls
            of modules that share a weight, are treated like positions.
        sharing: Treatment of positions that share a weight, ``"expand"`` or ``"reduce"``.

    Returns:
        A curvature function that returns `Blocks`.

    Raises:
        TypeError: If the loss does not expose its outputs and its criterion.
        ValueError: If a parameter is also used outside its modules, if examples do not follow one
            another along the first axes, or if the model mixes examples. Raised by the curvature
            function.
        NotImplementedError: If a parameter does not belong to a linear module. Hold it fixed with
            `split` and `hold`. Raised by the curvature function.

    Cost: one backward pass for each output of an example, and two that check that the examples are
    independent and that no use of a parameter is missed. If an example has several rows of
    outputs (outputs flattened over positions), the outputs of all its rows count.

    Source: Botev, Ritter and Barber 2017, arXiv 1706.03662; sharing: Eschenhagen, Immer, Turner,
    Schneider and Hennig 2023, arXiv 2311.00636.
    """
    return _factored(loss, model, _exact(loss), sharing)


@validated
def kfac(
    loss: Loss,
    model: nn.Module,
    /,
    *,
    samples: int = 1,
    seed: int | None = None,
    sharing: Sharing = "expand",
) -> BlockCurvature:
    """Kronecker-factored approximate curvature: ``(params, batch) -> blocks``.

        G = sum_b (g_b g_b') (x) mean_b(x x'),    E[sum_b g_b g_b'] = sum_b J_b' H_b J_b

    Here g_b are gradients at a module's outputs for targets drawn from the model's own prediction.
    The expectation of the output factor is therefore that of `kflr`.

    Args:
        loss: Loss that exposes its outputs and its criterion. The criterion is a negative
            log-likelihood, as for `fvp`.
        model: Module from which the loss was made, as for `kflr`.
        samples: Number of draws of each target.
        seed: Seed of the draws, which depend on (seed, batch) only. None draws a seed once, when
            `kfac` is called.
        sharing: Treatment of positions that share a weight, ``"expand"`` or ``"reduce"``.

    Returns:
        A curvature function that returns `Blocks`.

    Raises:
        ValueError: If the criterion is not the negative logarithm of a known likelihood, if
            ``samples`` is not positive, or if `kflr` raises it.

    Cost: one backward pass for each sample, and one that checks that no use of a parameter is
    missed.

    Source: Martens and Grosse 2015, arXiv 1503.05671; convolutions: Grosse and Martens 2016,
    arXiv 1602.01407.
    """
    return _factored(loss, model, _sampled(loss, samples, seed), sharing, exact=False)


@validated
def ekfac(
    loss: Loss,
    model: nn.Module,
    /,
    *,
    samples: int | None = None,
    seed: int | None = None,
    sharing: Sharing = "expand",
) -> BlockCurvature:
    """Eigenvalue-corrected Kronecker factors: ``(params, batch) -> blocks``.

        G = (U_B (x) U_A) diag(s) (U_B (x) U_A)',  s = sum_b ((U_B (x) U_A)' g_b)^2

    Here U_B and U_A are the eigenvectors of the factors of `kfac`, and g_b are the gradients of the
    weight. Among all matrices with these eigenvectors, G is the nearest to the second moment
    ``sum_b g_b g_b'`` in the Frobenius norm. If a factor is singular, its eigenvectors for the
    eigenvalue zero are not unique, and neither is G. This happens to A under "reduce" with fewer
    examples than inputs.

    Args:
        loss: Loss that exposes its outputs and its criterion.
        model: Module from which the loss was made, as for `kflr`.
        samples: Number of draws of each target, as for `kfac`. None computes the exact output
            factor of `kflr`.
        seed: Seed of the draws, as for `kfac`.
        sharing: Treatment of positions in the eigenvectors, ``"expand"`` or ``"reduce"``.

    Returns:
        A curvature function that returns `Blocks`.

    Raises:
        ValueError: If `kfac` raises it.

    Cost: two backward passes for each sample, or for each output of an example.

    Source: George, Laurent, Bouthillier, Ballas and Vincent 2018, arXiv 1806.03884.
    """
    columns = _exact(loss) if samples is None else _sampled(loss, samples, seed)
    return _factored(loss, model, columns, sharing, corrected=True, exact=samples is None)


def _refuse_sharing(sharing: str) -> None:
    if sharing not in get_args(Sharing):
        raise ValueError(f"sharing={sharing!r}: choose 'expand' or 'reduce'")


def _exact(loss: Loss) -> _Columns:
    refuse_without_halves(loss)

    def columns(outputs: Tensor, batch: Any) -> Tensor:
        # H_b = sum_c s_bc v_bc v_bc' = sum_c u_bc u_bc' with columns u_bc = sqrt(s_bc) v_bc.
        values, vectors = torch.linalg.eigh(each_hessian(loss.criterion, outputs, batch))
        roots = (vectors * values.clamp_min(0).sqrt()[:, None, :]).permute(2, 0, 1)
        # Drop columns that are zero up to rounding: a softmax has H_b 1 = 0 for each example.
        largest = values.amax(0)
        rounding = len(largest) * torch.finfo(values.dtype).eps * float(largest[-1])
        kept = roots[largest > rounding] if rounding else roots[-1:]
        return kept.reshape(len(kept), *outputs.shape)

    return columns


def _sampled(loss: Loss, samples: int, seed: int | None) -> _Columns:
    refuse_without_halves(loss)
    refuse_without_likelihood(loss.criterion)
    if samples < 1:
        raise ValueError(f"samples={samples}: the number of samples must be at least 1")
    drawn = of_matrix(seed)

    def columns(outputs: Tensor, batch: Any) -> Tensor:
        key = batch_key(drawn, batch, outputs.device)
        return sampled_gradients(loss.criterion, outputs, batch, samples=samples, key=key)

    return columns


def _factored(
    loss: Loss,
    model: nn.Module,
    columns: _Columns,
    sharing: Sharing,
    *,
    corrected: bool = False,
    exact: bool = True,
) -> BlockCurvature:
    _refuse_sharing(sharing)
    refuse_compiled(model)

    def curvature(params: Mapping[str, Tensor], batch: Any) -> Blocks:
        space = space_of(params)
        refuse_dtensors(space)
        constants = requiring_gradients(space.tree_leaves(params), batch)
        with linearising(space, params, batch) as (leaves, given), noted(loss, params, batch):
            return replace(factored(space, leaves, given), constants=tuple(constants))

    def factored(space: Space, leaves: Mapping[str, Tensor], batch: Any) -> Blocks:
        outputs, uses = observed(model, loss, leaves, batch)
        # Without grouping, rows need no check: draws of different rows are independent, and the
        # "expand" factor has no cross terms between positions.
        grouped = exact or corrected or sharing == "reduce"
        refuse_unless_seen(outputs, leaves, uses, grouped=grouped)
        vectors = columns(outputs.detach(), batch)
        examples = next(iter(uses.values())).examples
        apart = by_row(vectors, examples) if exact else list(vectors)
        # The weight and the bias of a module share the factor B: it is computed once for a site.
        sites = {name: (*map(id, use.outputs), use.weights[0].groups) for name, use in uses.items()}
        lefts = summed_moments(
            outputs,
            apart,
            {sites[name]: use for name, use in uses.items()},
            lambda _, slopes: outer_moments(slopes, sharing),
        )
        inputs = {name: use.inputs() for name, use in uses.items()}
        rights = {name: input_moments(each, sharing) for name, each in inputs.items()}
        if not corrected:
            return Blocks(
                {
                    name: Kronecker(lefts[sites[name]], rights[name], leaves[name].shape)
                    for name in space.names
                },
                space,
            )
        # With eigenvectors U_B and U_A, (U_B (x) U_A)' vec(g x') = vec((U_B' g) (U_A' x)'), so that
        # s[o, k] = sum_b (sum_p (U_B' g_bp)_o (U_A' x_bp)_k)^2 (George et al. 2018).
        lefts = {site: torch.linalg.eigh(factor).eigenvectors for site, factor in lefts.items()}
        rights = {name: torch.linalg.eigh(factor).eigenvectors for name, factor in rights.items()}
        turned = {name: rights[name].mT @ inputs[name] for name in uses}
        values = summed_moments(
            outputs,
            apart,
            uses,
            lambda name, slopes: squared_moments(lefts[sites[name]].mT @ slopes, turned[name]),
        )
        return Blocks(
            {
                name: Eigenbasis(lefts[sites[name]], rights[name], values[name], leaves[name].shape)
                for name in space.names
            },
            space,
        )

    return curvature
