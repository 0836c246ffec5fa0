"""Normal posterior of the parameters, its evidence and its predictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hessfunc import options
from hessfunc.algorithms.results.result import Result
from hessfunc.display import VECTORS
from hessfunc.options import at_least
from hessfunc.recipes.laplace.likelihood import Likelihood
from hessfunc.recipes.laplace.precision import (
    BlockDiagonal,
    LowRank,
    Prior,
    PriorPrecision,
    as_numbers,
    positive,
    prior_of,
)
from hessfunc.recipes.laplace.predictive import Predictive, predict
from hessfunc.recipes.laplace.tuning import maximise
from hessfunc.spaces.of import random_like, space_of
from hessfunc.trees import Tree, tree_map


def _model_fn(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} is a tensor: pass the model first, `posterior.predictive(model_fn, inputs)`"
        )
    return options.plain_callable(name, value)


@dataclass(frozen=True, kw_only=True, repr=False)
class Posterior(Result):
    """Laplace approximation of the posterior, a normal distribution of the parameters.

        N(params, P^-1),    P = s G + D

    G is the Gauss-Newton matrix of the criterion, or its approximation by the structure, and D is
    the diagonal prior precision. The factor s turns the criterion into the negative log-likelihood
    of all data, divided by the temperature. For a mean over N terms, s is N / temperature for
    classes, and N / (2 noise^2 temperature) for normal targets.

    Attributes:
        params: Mean, the parameters of the trained network.
        structure: Structure of the curvature.
        prior_precision: Prior precision of all parameters, or of each parameter by name.
        noise: Standard deviation of normal targets, or None for other targets.
        temperature: Temperature T of the likelihood p(D | params)^(1/T).
        likelihood: Likelihood of the data at the parameters.
        curvature: Curvature of the criterion in its structure.
        tuning: Reason for which `tuned` stopped, or None if nothing was tuned. The ``reason`` is
            that of the curvature.
    """

    params: Tree = field(metadata=VECTORS)
    structure: str
    prior_precision: float | dict[str, float]
    noise: float | None
    temperature: float
    likelihood: Likelihood
    curvature: BlockDiagonal | LowRank
    tuning: str | None = None

    def _headline(self) -> dict[str, object]:
        prior = self.prior_precision
        shown = (
            f"{prior:.4g}"
            if isinstance(prior, float)
            else f"{min(prior.values()):.4g} to {max(prior.values()):.4g}"
        )
        noise = {} if self.noise is None else {"noise": f"{self.noise:.4g}"}
        tuning = {} if self.tuning is None else {"tuning": self.tuning}
        evidence = f"{float(self.log_marginal_likelihood()):.6g}"
        return {
            "structure": self.structure,
            "n": space_of(self.params).n,
            "prior_precision": shown,
            **noise,
            "log_marginal_likelihood": evidence,
            **tuning,
        }

    def to_dict(self, *, vectors: bool = True) -> dict[str, Any]:
        """Return the fields as plain Python, without the curvature.

        Args:
            vectors: Whether the parameters are included.
        """
        kept = dataclasses.replace(self, curvature=None)  # type: ignore[arg-type]
        return Result.to_dict(kept, vectors=vectors)

    @options.validated(prior_precision=options.factors, noise=options.factor)
    def log_marginal_likelihood(
        self, prior_precision: PriorPrecision | None = None, noise: float | Tensor | None = None
    ) -> Tensor:
        """Return the Laplace approximation of the log marginal likelihood, the evidence.

            log p(D) = log p(D | params) / T - (params' D params + log det P - log det D) / 2

        The value is differentiable in the prior precision and in the noise; the parameters are
        held fixed. Values of different structures are not comparable: only ``"full"`` has the
        determinant of the Gauss-Newton matrix itself.

        Args:
            prior_precision: Prior precision, a number or tensor, or a dict of these by parameter;
                by default that of the posterior.
            noise: Standard deviation of normal targets; by default that of the posterior.

        Raises:
            ValueError: If a precision or the noise is not positive, or if the targets have no
                noise.

        Source: MacKay 1992; Immer et al. 2021, arXiv 2104.04975.
        """
        prior, sigma = self._prior(prior_precision), self._noise(noise)
        likelihood = self.likelihood.log_likelihood(sigma) / self.temperature
        ratio = self.curvature.logdet(self._scale(sigma), prior) - prior.logdet()
        return likelihood - (prior.square_norm(self.params) + ratio) / 2

    @options.validated(prior_precision=options.factors, noise=options.factor)
    def logdet(
        self, prior_precision: PriorPrecision | None = None, noise: float | Tensor | None = None
    ) -> Tensor:
        """Return ``log det P`` of the posterior precision, with the same arguments and graph.

        Args:
            prior_precision: Prior precision; by default that of the posterior.
            noise: Standard deviation of normal targets; by default that of the posterior.
        """
        scale = self._scale(self._noise(noise))
        return self.curvature.logdet(scale, self._prior(prior_precision))

    @options.validated(vectors=options.tree)
    def covariance(self, vectors: Tree, /) -> Tree:
        """Return the products of the posterior covariance ``P^-1`` with a vector block.

        Args:
            vectors: Block of k vectors, a tree of leaves ``(k, *shape)``.
        """
        return self.curvature.covariance(vectors, self._scale(self._noise(None)), self._prior(None))

    @options.validated
    def samples(self, k: int, /, *, seed: int) -> Tree:
        """Draw k parameters from the posterior, a tree of leaves ``(k, *shape)``.

        ``torch.func.vmap(model_fn, in_dims=(0, None))(samples, inputs)`` evaluates all of them.

        Args:
            k: Number of draws.
            seed: Seed. Draw i depends on (seed, i) only.
        """
        at_least(1, k=k)
        draws = random_like(self.params, k, kind="normal", seed=seed)
        moved = self.curvature.root(draws, self._scale(self._noise(None)), self._prior(None))
        return tree_map(torch.add, moved, self.params)

    @options.validated(outputs=_model_fn, inputs=options.anything)
    def predictive(
        self,
        outputs: Callable[[Tree, Any], Tensor],
        inputs: Any,
        /,
        *,
        examples_per_chunk: int | None = None,
    ) -> Predictive:
        """Predict by the linearised network, whose outputs are normal for each example.

            f(x) ~ N(f(x; params), J P^-1 J'),    J = d f(x; params) / d params

        Args:
            outputs: Model ``(params, inputs) -> outputs`` with a row of outputs for each example,
                such as ``model_fn``. For a subset of parameters, pass ``held.outputs`` and
                ``(inputs, None)``.
            inputs: Inputs whose arrays have one row for each example.
            examples_per_chunk: Number of examples whose Jacobians are made at once; by default
                they take 64 MiB.

        Raises:
            ValueError: If there is no example, if the outputs are not one vector for each example,
                or if the outputs of an example depend on other examples.

        Cost: one backward pass for each output of an example, and as many products with P^-1.

        Source: Khan et al. 2019, arXiv 1906.01930; Immer, Korzepa and Bauer 2021, arXiv 2008.08216.
        """
        at_least(1, examples_per_chunk=examples_per_chunk)
        mean, covariance = predict(
            outputs, self.params, inputs, self.covariance, examples_per_chunk
        )
        return Predictive(
            mean=mean, covariance=covariance, family=self.likelihood.family, noise=self.noise
        )

    @options.validated
    def tuned(
        self,
        *,
        per_parameter: bool = False,
        tune_noise: bool = True,
        max_steps: int = 100,
        tolerance: float = 1e-6,
    ) -> Posterior:
        """Return the posterior whose prior precision and noise maximise the marginal likelihood.

        L-BFGS maximises over the logarithms. The parameters stay the same, although the trained
        parameters depend on the prior: train again with the tuned values, and repeat.

        Args:
            per_parameter: Whether each parameter tensor has a prior precision of its own.
            tune_noise: Whether the noise of normal targets is tuned too.
            max_steps: Largest number of steps.
            tolerance: Largest derivative with respect to a logarithm, at which the search has
                converged.

        Raises:
            FloatingPointError: If the marginal likelihood has no maximum, so that a precision or
                the noise diverges.

        Source: MacKay 1992; Immer et al. 2021, arXiv 2104.04975.
        """
        at_least(1, max_steps=max_steps)
        if not tolerance > 0:
            raise ValueError(f"tolerance={tolerance}: it must be positive, such as tolerance=1e-6")
        prior, names = self._prior(None), space_of(self.params).names
        precisions = torch.stack(prior.each).log()
        start = precisions if per_parameter else precisions.mean()[None]
        if with_noise := tune_noise and self.noise is not None:
            start = torch.cat([start, self._noise(None).log()[None]])

        def named(logs: Tensor) -> tuple[PriorPrecision, Tensor | None]:
            *each, last = numbers = list(logs.exp())
            if not with_noise:
                each, last = numbers, None
            return dict(zip(names, each, strict=True)) if per_parameter else each[0], last

        point, reason = maximise(
            lambda logs: self.log_marginal_likelihood(*named(logs)),
            start,
            max_steps=max_steps,
            tolerance=tolerance,
        )
        precision, noise = named(point)
        return dataclasses.replace(
            self,
            prior_precision=as_numbers(precision),
            noise=self.noise if noise is None else float(noise),
            tuning=reason,
        )

    def _prior(self, precision: PriorPrecision | None) -> Prior:
        return prior_of(self.params, self.prior_precision if precision is None else precision)

    def _noise(self, noise: float | Tensor | None) -> Tensor:
        """Return the noise as a scalar; 1 if the targets have none."""
        if self.noise is None and noise is not None:
            raise ValueError(
                f"noise={float(noise):g}: {self.likelihood.family} targets have no noise; omit it"
            )
        given = self.noise if noise is None else noise
        return positive("noise", 1.0 if given is None else given, space_of(self.params))

    def _scale(self, noise: Tensor) -> Tensor:
        return self.likelihood.curvature_scale(noise) / self.temperature
