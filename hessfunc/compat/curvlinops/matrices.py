"""Hessian, Gauss-Newton, Fisher and empirical Fisher matrix of an empirical risk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hessfunc.compat.curvlinops.arguments import CHECKS
from hessfunc.compat.curvlinops.curvature import CurvatureLinearOperator
from hessfunc.compat.curvlinops.empirical import empirical
from hessfunc.losses import Loss, composed
from hessfunc.options import validated
from hessfunc.transforms.chunks import Curvature
from hessfunc.transforms.gauss_newton import fvp, ggnvp
from hessfunc.transforms.hessian import hvp

# Seed of the draws of targets where none is given.
SEED = 2147483647


class HessianLinearOperator(CurvatureLinearOperator):
    """Hessian of the loss, by `hvp`. Arguments are those of `CurvatureLinearOperator`."""

    def _curvature(self, loss: Loss) -> Curvature:
        return hvp(loss)


class FisherMCLinearOperator(CurvatureLinearOperator):
    """Fisher matrix with targets drawn from the model's own prediction, by `fvp`.

    Draws depend on the seed and the values of a batch, and not on the order of batches.

    Args:
        model_func: Model. All arguments without an entry are those of `CurvatureLinearOperator`.
        seed: Seed of the draws.
        mc_samples: Number of draws of each target.
    """

    @validated(**CHECKS)
    def __init__(
        self,
        model_func: nn.Module | Callable[[Any, Any], Any],
        loss_func: Callable[[Any, Any], Tensor],
        params: Sequence[Tensor] | Mapping[str, Tensor],
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        seed: int = SEED,
        mc_samples: int = 1,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        self._seed, self._mc_samples = seed, mc_samples
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            batch_size_fn=batch_size_fn,
        )

    def _curvature(self, loss: Loss) -> Curvature:
        return fvp(loss, samples=self._mc_samples, seed=self._seed)


class GGNLinearOperator(CurvatureLinearOperator):
    """Generalised Gauss-Newton matrix of the loss, by `ggnvp`.

    Args:
        model_func: Model. All arguments without an entry are those of `CurvatureLinearOperator`.
        seed: Seed of the draws, if ``mc_samples`` is positive.
        mc_samples: Number of draws of each target, which make it the matrix of
            `FisherMCLinearOperator`; 0 for the exact matrix.
    """

    @validated(**CHECKS)
    def __init__(
        self,
        model_func: nn.Module | Callable[[Any, Any], Any],
        loss_func: Callable[[Any, Any], Tensor],
        params: Sequence[Tensor] | Mapping[str, Tensor],
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        block_sizes: Sequence[int] | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
        *,
        seed: int = SEED,
        mc_samples: int = 0,
    ) -> None:
        self._seed, self._mc_samples = seed, mc_samples
        super().__init__(
            model_func,
            loss_func,
            params,
            data,
            progressbar=progressbar,
            check_deterministic=check_deterministic,
            num_data=num_data,
            block_sizes=block_sizes,
            batch_size_fn=batch_size_fn,
        )

    def _curvature(self, loss: Loss) -> Curvature:
        if self._mc_samples:
            return fvp(loss, samples=self._mc_samples, seed=self._seed)
        return ggnvp(loss)


class EFLinearOperator(CurvatureLinearOperator):
    """Empirical Fisher matrix, with one gradient for each loss term.

        E = c sum_t g_t g_t'

    The loss terms t are the targets of cross-entropy, and the vectors along the last axis of the
    targets of other losses. g_t is the gradient of the sum over the entries of a term, and 1/c is 1
    if the loss is a sum, and the divisor of the mean otherwise. For targets drawn from the model's
    own prediction, the expectation of E is the Fisher matrix. Arguments are those of
    `CurvatureLinearOperator`.
    """

    def _curvature(self, loss: Loss) -> Curvature:
        return ggnvp(composed(self.outputs, empirical(self.criterion), targets=self._targets))
