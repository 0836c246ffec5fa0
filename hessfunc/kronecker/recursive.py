"""Kronecker factors from Hessian backpropagation, averaged over batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.kronecker.blocks import Blocks
from hessfunc.kronecker.factored import Each
from hessfunc.kronecker.factored_blocks import Kronecker
from hessfunc.kronecker.layer import SharedWeight
from hessfunc.kronecker.moments import Sharing, refuse_sharing, summed_input_moments
from hessfunc.kronecker.propagate import BlockCurvature, Reached, backpropagated
from hessfunc.losses import Loss
from hessfunc.options import validated
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.statistics import Stage, Statistics
from hessfunc.transforms.evaluation import requiring_gradients
from hessfunc.transforms.output_matrices import refuse_without_halves


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
        A curvature function that returns `Blocks`. `over_batches` averages the factors over a data
        set.

    Raises:
        ValueError: If `hbp` raises it.
        NotImplementedError: If `hbp` raises it, or if a parameter is not the weight or bias of a
            linear map.
        MemoryError: If `hbp` raises it.

    Cost: the cost of `hbp`.

    Source: Botev, Ritter and Barber 2017, arXiv 1706.03662.
    """
    refuse_sharing(sharing)
    refuse_without_halves(loss)

    def factors(reached: Reached) -> _Factors:
        weight = reached.dependence
        if not isinstance(weight, SharedWeight):
            raise NotImplementedError(
                "the factors of `kfra` need weights and biases of linear maps: hold other "
                "parameters fixed with `split` and `hold`, or use `kflr` or `hbp`"
            )
        hessian = weight.by_channel(reached.hessian)
        outputs, positions = weight.shape[0] // weight.groups, len(hessian) // weight.shape[0]
        view = hessian.view(2 * (weight.groups, outputs, positions))
        # With H_z = sum g g' over outputs (o, p), B[o, a] is sum_p H_z[o, p, a, p] for "expand"
        # and sum_pq H_z[o, p, a, q] for "reduce".
        summed = "gopgap->goa" if sharing == "expand" else "gopgaq->goa"
        total, terms = summed_input_moments(weight.each(), sharing)
        return _Factors(torch.einsum(summed, view), (total, terms))

    made = backpropagated(
        loss,
        model,
        factors,
        residual="zero",
        average_input_jacobian=False,
        average_parameter_jacobian=False,
    )
    return RecursiveCurvature(made)


@dataclass(frozen=True)
class _Factors:
    """Factors of one parameter in one batch.

    Attributes:
        left: Factor B, ``(G, O, O)``.
        right: Factor A times the number of its terms, ``(G, K, K)``, and this number.
    """

    left: Tensor
    right: tuple[Tensor, float]


@dataclass(frozen=True)
class RecursiveCurvature:
    """Curvature function of `kfra`, whose factors are averaged over batches.

    Attributes:
        factors: Function of the parameters and a batch.
    """

    factors: Callable[[Mapping[str, Tensor], Any], dict[str, _Factors]]

    def __call__(self, params: Mapping[str, Tensor], batch: Any, /) -> Blocks:
        return self._blocks(params, batch, lambda stage: stage(params, batch).mean())

    def over_batches(
        self,
        params: Mapping[str, Tensor],
        mean: Callable[[Stage], Mapping[str, Tensor]],
        each: Each,
        /,
    ) -> Blocks:
        """Return the blocks of a data set, given the function that averages its statistics."""
        return self._blocks(params, None, mean)

    def _blocks(
        self,
        params: Mapping[str, Tensor],
        batch: Any,
        mean: Callable[[Stage], Mapping[str, Tensor]],
    ) -> Blocks:
        def stage(params: Mapping[str, Tensor], batch: Any) -> Statistics:
            made = self.factors(params, batch)
            lefts = {f"left {name}": factors.left for name, factors in made.items()}
            return Statistics(lefts, {name: factors.right for name, factors in made.items()})

        means = mean(stage)
        blocks = {
            name: Kronecker(means[f"left {name}"], means[name], leaf.shape)
            for name, leaf in params.items()
        }
        constants = requiring_gradients(list(params.values()), batch)
        return Blocks(blocks, space_of(params), tuple(constants))
