"""Optimisation methods with their settings, as steps of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfunc.kronecker import ekfac, hbp, kfac, kflr, kfra
from hessfunc.losses import supervised
from hessfunc.modules import functional
from hessfunc.optim.optimizer import NewtonOptimizer
from hessfunc.optim.solvers import Solver, conjugate_gradients, direct
from hessfunc.training.flops import Metered
from hessfunc.training.steps import Batch, Spent, Steps, first_order
from hessfunc.training_mode import eval_mode
from hessfunc.transforms.exact_blocks import exact_blocks
from hessfunc.transforms.gauss_newton import ggnvp
from hessfunc.transforms.hessian import hvp
from hessfunc.transforms.positive_curvature import pchvp
from hessfunc.transforms.taps import Residual

Blocks: TypeAlias = Callable[[Mapping[str, Tensor], Any], Mapping[str, Any]]

RESIDUALS = ("none", "zero", "clip", "abs")
FACTORED = (*(f"hbp-{residual}" for residual in RESIDUALS), "kfra", "kflr", "kfac", "ekfac")
EXACT = (*(f"pch-{residual}" for residual in RESIDUALS), "ggn", "hessian")
CURVATURES = (*FACTORED, *EXACT)


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with momentum.

    Attributes:
        lr: Learning rate.
        momentum: Factor of the last step that is kept.
        weight_decay: Factor of the parameters that is added to the gradient.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0

    def steps(self, model: nn.Module, /, *, seed: int = 0) -> Steps:
        """Return the steps of a model on the cross-entropy; they do not use the seed."""
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr}: the learning rate must be positive")
        optimizer = torch.optim.SGD(
            model.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )
        return first_order(model, optimizer)


@dataclass(frozen=True, kw_only=True)
class BlockNewton:
    """Newton's method with one equation for each parameter tensor, as in `newton`.

    Attributes:
        curvature: Name of the curvature, one of `CURVATURES`.
        lr: Learning rate.
        alpha: Weight of the identity in the damped curvature, in [0, 1].
        solve: Solver of an equation, ``"cg"`` or ``"direct"``.
        rtol: Relative tolerance of conjugate gradients.
        atol: Absolute tolerance of conjugate gradients.
        max_matvecs: Largest number of products of conjugate gradients for one parameter tensor.
        max_blocks: Largest number of blocks into which ``hbp`` splits the rows of a weight. None
            does not split them.

    Raises:
        ValueError: If the options cannot be combined.
    """

    curvature: str
    lr: float = 0.1
    alpha: float = 0.02
    solve: Literal["cg", "direct"] = "cg"
    rtol: float = 0.1
    atol: float = 0.0
    max_matvecs: int = 50
    max_blocks: int | None = None

    def __post_init__(self) -> None:
        if self.curvature not in CURVATURES:
            raise ValueError(f"curvature {self.curvature!r}: choose one of {', '.join(CURVATURES)}")
        if self.max_blocks is not None and not self.curvature.startswith("hbp-"):
            raise ValueError(
                f"max_blocks={self.max_blocks} requires an hbp curvature, got {self.curvature}: "
                "pass max_blocks=None"
            )
        if self.solve not in ("cg", "direct"):
            raise ValueError(f"solve={self.solve!r}: choose 'cg' or 'direct'")
        if self.solve == "direct" and self.curvature in EXACT:
            raise ValueError(
                f"the blocks of {self.curvature} have only products and no inverse: solve by cg, "
                f"or choose one of {', '.join(FACTORED)}"
            )

    @property
    def solver(self) -> Solver:
        """Solver of one equation."""
        if self.solve == "direct":
            return direct()
        return conjugate_gradients(rtol=self.rtol, atol=self.atol, max_matvecs=self.max_matvecs)

    def steps(self, model: nn.Module, /, *, seed: int = 0) -> Steps:
        """Return the steps of a model on the cross-entropy; draws are functions of the seed.

        The curvature is computed in eval mode, on all examples of a step.
        """
        with eval_mode(model):
            blocks = blocks_of(self.curvature, model, max_blocks=self.max_blocks, seed=seed)
        metered = Metered(blocks)
        optimizer = NewtonOptimizer(model, metered, lr=self.lr, alpha=self.alpha, solve=self.solver)

        def move(batches: Sequence[Batch]) -> Spent:
            matvecs, flops = optimizer.matvecs, metered.total
            with eval_mode(model):
                optimizer.step(_joined(batches))
            return Spent(optimizer.matvecs - matvecs, metered.total - flops)

        return Steps(model, optimizer, move, meter=metered)


Method: TypeAlias = SGD | BlockNewton


def blocks_of(
    curvature: str, model: nn.Module, /, *, max_blocks: int | None = None, seed: int = 0
) -> Blocks:
    """Return the blocks of a curvature of the cross-entropy, by its name in `CURVATURES`."""
    loss = supervised(functional(model)[0], F.cross_entropy)
    match curvature.split("-"):
        case ["hbp", residual]:
            return hbp(loss, model, residual=cast(Residual, residual), max_blocks=max_blocks)
        case ["pch", residual]:
            return exact_blocks(partial(pchvp, residual=cast(Residual, residual)), loss)
        case ["ggn"]:
            return exact_blocks(ggnvp, loss)
        case ["hessian"]:
            return exact_blocks(hvp, loss)
        case ["kfac"]:
            return kfac(loss, model, seed=seed)
        case ["ekfac"]:
            return ekfac(loss, model, seed=seed)
        case ["kfra"]:
            return kfra(loss, model)
        case ["kflr"]:
            return kflr(loss, model)
        case _:
            raise ValueError(f"curvature {curvature!r}: choose one of {', '.join(CURVATURES)}")


def _joined(batches: Sequence[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)
