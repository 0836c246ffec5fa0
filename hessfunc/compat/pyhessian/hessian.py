"""The Hessian of a model on a batch or a data set: eigenvalues, trace, density."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from hessfunc.algorithms.density import slq
from hessfunc.algorithms.eigen.lanczos import lanczos
from hessfunc.algorithms.trace.hutchinson import hutchinson
from hessfunc.autograd import differentiable_twice
from hessfunc.compat.place import seed_of_stream
from hessfunc.compat.pyhessian.mean_loss import MeanLoss
from hessfunc.compat.pyhessian.vectors import group_product
from hessfunc.options import real, validated
from hessfunc.transforms.batches.examples import examples
from hessfunc.transforms.hessian import filled, hvp
from hessfunc.transforms.matvecs.arithmetic import apply
from hessfunc.trees import Matvec


class hessian(MeanLoss):  # noqa: N801
    """The Hessian of a mean loss: its eigenvalues, trace and spectral density.

    Arguments and attributes are those of `MeanLoss`.
    """

    @cached_property
    def gradsH(self) -> list[Tensor]:
        """The gradient of the mean loss with its graph, for `hessian_vector_product`.

        Of the parameters at the first time that it is asked for. Memory grows with the data.
        """
        loss, params = self.loss()
        own = dict(zip(params, self.params, strict=True))
        with differentiable_twice(self.params[0].device):
            counted = [(examples(batch), loss(own, batch)) for batch in self.batches]
            total = torch.stack([count * value for count, value in counted]).sum()
            mean = total / sum(count for count, _ in counted)
            found = torch.autograd.grad(mean, self.params, create_graph=True, allow_unused=True)
        return filled(found, self.params)

    @validated
    def eigenvalues(
        self, maxIter: int = 100, tol: float = 1e-3, top_n: int = 1
    ) -> tuple[list[float], list[list[Tensor]]]:
        """The eigenvalues that are largest in absolute value, in that order, by `lanczos`.

        Args:
            maxIter: products for each, at the most.
            tol: a pair has converged when ``|Hv - value v| <= tol |value|``.
            top_n: how many.

        Returns:
            The values, and for each its unit vector, a list of tensors shaped like ``params``.
        """
        matvec, params = self.matvec()
        pairs = lanczos(
            matvec,
            params,
            k=top_n,
            rtol=tol,
            max_matvecs=max(maxIter * top_n, top_n + 1),
            seed=seed_of_stream(),
        )
        self.results["eigenvalues"] = pairs
        missing = int((~pairs.converged).sum())
        if missing:
            warnings.warn(
                f"{missing} of {top_n} eigenpairs have not converged to tol={tol:g}: "
                f"{pairs.reason}. Their residuals are in results['eigenvalues']",
                stacklevel=3,
            )
        vectors = [[leaf[i] for leaf in pairs.vectors.values()] for i in range(top_n)]
        return pairs.values.tolist(), vectors

    @validated(tol=real)
    def trace(self, maxIter: int = 100, tol: float = 1e-3) -> list[float]:
        """Samples ``z'Hz`` of random signs z, whose mean estimates the trace, by `hutchinson`.

        Args:
            maxIter: samples at the most; at least two are drawn.
            tol: enough when the half-width of the 95 % interval is below ``tol |mean|``; 0 or less
                for ``maxIter`` samples.
        """
        matvec, params = self.matvec()
        estimate = hutchinson(
            matvec,
            params,
            rtol=max(tol, 0.0),
            max_matvecs=max(maxIter, 2),
            kind="signs",
            seed=seed_of_stream(),
        )
        self.results["trace"] = estimate
        return estimate.samples.tolist()

    @validated
    def density(self, iter: int = 100, n_v: int = 1) -> tuple[list[list[float]], list[list[float]]]:
        """Nodes and weights of the spectral density, a list for each run, by `slq`.

        Args:
            iter: Lanczos steps of a run; no more than there are parameters are made.
            n_v: runs.

        Returns:
            ``(nodes, weights)``; nodes ascend, and the weights of a run sum to 1.
        """
        matvec, params = self.matvec()
        found = slq(matvec, params, probes=n_v, steps=iter, seed=seed_of_stream())
        self.results["density"] = found
        return found.nodes.tolist(), found.weights.tolist()

    def dataloader_hv_product(self, v: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """``v'Hv`` and ``Hv``."""
        matvec, params = self.matvec()
        images = list(apply(matvec, dict(zip(params, v, strict=True))).values())
        return float(group_product(images, v)), images

    def matvec(self) -> tuple[Matvec, dict[str, Tensor]]:
        """The Hessian at the parameters as they are now, and these, for any algorithm."""
        loss, params = self.loss()
        return self.over_data(hvp(loss))(params, self.data), params
