"""Predictive distribution of a linearised network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from hessfunc.algorithms.results.result import Saved
from hessfunc.autograd import differentiable_twice
from hessfunc.display import Displayed
from hessfunc.options import at_least, validated
from hessfunc.recipes.gauss_newton_diagonal import over_examples, refuse_unless_apart
from hessfunc.recipes.laplace.likelihood import Family
from hessfunc.spaces.of import random_like, space_of
from hessfunc.spaces.space import Space
from hessfunc.training_mode import several_batches
from hessfunc.transforms.batches.examples import microbatches, rows_of
from hessfunc.trees import Matvec, Tree

# Limit on the Jacobians that are in memory at once.
_BYTES_AT_ONCE = 64 * 2**20


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Predictive(Displayed, Saved):
    """Normal distribution of the outputs of each example.

    Attributes:
        mean: Outputs at the mean of the posterior, ``(B, C)``.
        covariance: Covariance of the outputs of each example, ``(B, C, C)``.
        family: Distribution of a target given the outputs.
        noise: Standard deviation of normal targets, or None for other targets.
    """

    mean: Tensor
    covariance: Tensor
    family: Family
    noise: float | None

    def _headline(self) -> dict[str, object]:
        examples, outputs = self.mean.shape
        variance = float(self.output_variance.mean())
        return {"examples": examples, "outputs": outputs, "mean_output_variance": f"{variance:.4g}"}

    @property
    def output_variance(self) -> Tensor:
        """Variance of the outputs, ``(B, C)``."""
        return self.covariance.diagonal(dim1=1, dim2=2)

    @property
    def variance(self) -> Tensor:
        """Variance of a new normal target, that of the outputs plus noise^2, ``(B, C)``.

        Raises:
            ValueError: If the targets are not normal.
        """
        if self.noise is None:
            raise ValueError(
                f"{self.family} targets have probabilities: call `probabilities()`, or take the "
                "`output_variance`"
            )
        return self.output_variance + self.noise**2

    @validated
    def samples(self, k: int, /, *, seed: int) -> Tensor:
        """Draw k outputs of each example, ``(k, B, C)``.

        Args:
            k: Number of draws.
            seed: Seed. Draw i depends on (seed, i) only.
        """
        at_least(1, k=k)
        # Decompositions do not support bfloat16 and float16.
        wide = self.covariance.to(torch.promote_types(self.covariance.dtype, torch.float32))
        values, vectors = torch.linalg.eigh(wide)
        root = (vectors * values.clamp_min(0).sqrt()[:, None]).to(self.covariance)
        draws = random_like(self.mean, k, kind="normal", seed=seed)
        return self.mean + torch.einsum("bij,kbj->kbi", root, draws)

    @validated
    def probabilities(self, *, samples: int | None = None, seed: int = 0) -> Tensor:
        """Return the predictive probabilities of the classes, ``(B, C)``.

            softmax(mean / sqrt(1 + pi variance / 8))

        This is the probit approximation, with the sigmoid for Bernoulli targets.

        Args:
            samples: Number of draws of the outputs whose probabilities are averaged. None uses the
                probit approximation.
            seed: Seed of the draws.

        Raises:
            ValueError: If the targets are normal.

        Source: MacKay 1992; Daxberger et al. 2021, arXiv 2106.14806.
        """
        if self.family == "normal":
            raise ValueError("normal targets have no probabilities: take `mean` and `variance`")
        link = torch.sigmoid if self.family == "bernoulli" else partial(torch.softmax, dim=-1)
        if samples is not None:
            return link(self.samples(samples, seed=seed)).mean(0)
        return link(self.mean / (1 + math.pi / 8 * self.output_variance).sqrt())


def predict(
    outputs: Callable[[Tree, Any], Tensor],
    params: Tree,
    inputs: Any,
    covariance: Matvec,
    examples_per_chunk: int | None,
    /,
) -> tuple[Tensor, Tensor]:
    """Return the outputs ``(B, C)`` and their covariances ``J S J'``, ``(B, C, C)``.

    Args:
        outputs: Model ``(params, inputs) -> outputs``.
        params: Parameters at which the model is linearised.
        inputs: Inputs of the examples.
        covariance: Products with the covariance S of the parameters.
        examples_per_chunk: Number of examples whose Jacobians are made at once, or None.
    """
    space = space_of(params)
    point = tuple(leaf.detach() for leaf in space.tree_leaves(params))
    with torch.no_grad(), several_batches():
        together = _rows(outputs(params, inputs))
    width = space.n * together.shape[1] * together.element_size()
    size = examples_per_chunk or max(1, _BYTES_AT_ONCE // width)
    covariances = []
    with differentiable_twice(space.device), several_batches():
        for piece, due in zip(microbatches(inputs, size), together.split(size), strict=True):
            rows, build = rows_of(piece)
            each = partial(_jacobian, outputs, space, point, build)
            alone, jacobians = over_examples(each, *rows)
            refuse_unless_apart(alone, due)
            covariances.append(_congruences(space, jacobians, covariance))
    return together, torch.cat(covariances)


def _rows(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.dim() not in (1, 2):
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"the outputs are {shape}: predictions need a tensor of shape (examples, outputs); "
            "pass a function that returns one vector for each example"
        )
    if not len(outputs):
        raise ValueError("the inputs have no example: pass inputs with at least one row")
    return outputs.detach().reshape(len(outputs), -1)


def _jacobian(
    outputs: Callable[[Tree, Any], Tensor],
    space: Space,
    point: Sequence[Tensor],
    build: Callable[[Sequence[Any]], Any],
    *rows: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs of one example ``(C,)``, and their Jacobian, leaf by leaf."""

    def model(*leaves: Tensor) -> Tensor:
        return outputs(space.tree(leaves), build([row[None] for row in rows])).reshape(-1)

    values, pull, *_ = vjp(model, *point)
    identity = torch.eye(len(values), dtype=values.dtype, device=values.device)
    return values, list(vmap(pull)(identity))


def _congruences(space: Space, jacobians: Sequence[Tensor], covariance: Matvec) -> Tensor:
    """Return ``J S J'`` of each example, for Jacobians with leaves ``(B, C, *shape)``."""
    examples, width = jacobians[0].shape[:2]
    with torch.no_grad():
        block = space.tree(leaf.detach().flatten(0, 1) for leaf in jacobians)
        images = space.block_leaves(covariance(block))
        total = jacobians[0].new_zeros(examples, width, width)
        for leaf, image in zip(jacobians, images, strict=True):
            product = image.reshape(examples, width, -1)
            total += torch.einsum("bin,bjn->bij", leaf.detach().flatten(2), product)
    return (total + total.mT) / 2
