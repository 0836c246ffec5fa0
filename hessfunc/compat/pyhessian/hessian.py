"""Hessian of a model on a batch or a data set: eigenvalues, trace and density."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from torch import Tensor

from hessfunc.algorithms.density import slq
from hessfunc.algorithms.eigen.lanczos import lanczos
from hessfunc.algorithms.trace.hutchinson import hutchinson
from hessfunc.compat.place import gradient_with_graph, hessian_of, seed_of_stream
from hessfunc.compat.pyhessian.mean_loss import MeanLoss
from hessfunc.compat.pyhessian.vectors import (
    group_product,
    hessian_vector_product,
    refuse_unlike,
)
from hessfunc.options import real, tensors, validated
from hessfunc.transforms.matvecs.arithmetic import apply, batched
from hessfunc.trees import Matvec, Tree


class hessian(MeanLoss):  # noqa: N801
    """Hessian of a mean loss, with its eigenvalues, trace and spectral density.

    Arguments and attributes are those of `MeanLoss`.
    """

    _gradient: list[Tensor] | None = None
    _is_given = False

    @property
    def gradsH(self) -> list[Tensor]:
        """Gradient of the mean loss with its graph, for `hessian_vector_product`.

        It is computed on first access, at the parameters of that time. Its memory grows with the
        size of the data set. If it is set to another gradient of ``params``, the matrix of a single
        batch is the derivative of that gradient.
        """
        if self._gradient is None:
            self._gradient = self._differentiated()
        return self._gradient

    @gradsH.setter
    def gradsH(self, gradient: Sequence[Tensor]) -> None:
        self._gradient, self._is_given = list(tensors("gradsH", gradient)), True

    def _differentiated(self) -> list[Tensor]:
        loss, params = self.loss()
        own = dict(zip(params, self.params, strict=True))
        return gradient_with_graph(loss, own, self.batches)

    @validated
    def eigenvalues(
        self, maxIter: int = 100, tol: float = 1e-3, top_n: int = 1
    ) -> tuple[list[float], list[list[Tensor]]]:
        """Compute the eigenvalues of largest absolute value, in this order, by `lanczos`.

        Args:
            maxIter: Largest number of products for each pair.
            tol: Relative tolerance: a pair has converged when ``|Hv - value v| <= tol |value|``.
            top_n: Number of eigenvalues.

        Returns:
            The values, and the unit vector of each, a list of tensors shaped like ``params``.
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
                f"{missing} of {top_n} eigenpairs have not converged to tol={tol:g} "
                f"({pairs.reason}): increase maxIter or tol; `results['eigenvalues'].residuals` "
                "contains the residuals",
                stacklevel=3,
            )
        vectors = [[leaf[i] for leaf in pairs.vectors.values()] for i in range(top_n)]
        return pairs.values.tolist(), vectors

    @validated(tol=real)
    def trace(self, maxIter: int = 100, tol: float = 1e-3) -> list[float]:
        """Sample ``z'Hz`` for random signs z by `hutchinson`; the mean estimates the trace.

        Args:
            maxIter: Largest number of samples; at least two are drawn.
            tol: Relative tolerance: stop when the half-width of the 95 % interval is below
                ``tol |mean|``. 0 or less draws ``maxIter`` samples.

        Returns:
            The samples.
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
        """Compute nodes and weights of the spectral density by `slq`, one list for each run.

        Args:
            iter: Number of Lanczos steps in a run, at most the number of parameters.
            n_v: Number of runs.

        Returns:
            ``(nodes, weights)``. Nodes are in ascending order, and the weights of a run sum to 1.
        """
        matvec, params = self.matvec()
        density = slq(matvec, params, probes=n_v, steps=iter, seed=seed_of_stream())
        self.results["density"] = density
        return density.nodes.tolist(), density.weights.tolist()

    @validated(v=tensors)
    def dataloader_hv_product(self, v: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """Return ``v'Hv`` and ``Hv``.

        Raises:
            ValueError: If v has other shapes than ``params``.
        """
        refuse_unlike(self.params, v=v)
        matvec, params = self._of_loss()
        product = list(apply(matvec, dict(zip(params, v, strict=True))).values())
        return float(group_product(product, v)), product

    def matvec(self) -> tuple[Matvec, dict[str, Tensor]]:
        """Return the matvec of the Hessian at the current parameters, and these parameters.

        As in PyHessian, products are those of `dataloader_hv_product` for a data set, also if it is
        overridden, and the derivative of ``gradsH`` for a single batch, if it was set.

        Warns:
            UserWarning: If `dataloader_hv_product` is overridden, but not used for a single batch.
        """
        own = vars(self).get("dataloader_hv_product", type(self).dataloader_hv_product)
        is_overridden = own is not hessian.dataloader_hv_product
        if self.full_dataset and is_overridden:
            return self._by_lists(lambda v: self.dataloader_hv_product(v)[1])
        if is_overridden:
            warnings.warn(
                "dataloader_hv_product is overridden, but a single batch does not use it: pass "
                "dataloader=[data] to use it",
                stacklevel=4,
            )
        if not self.full_dataset and self._is_given:
            return self._by_lists(self._of_gradient())
        return self._of_loss()

    def _of_loss(self) -> tuple[Matvec, dict[str, Tensor]]:
        loss, params = self.loss()
        return self.over_data(hessian_of(loss, self.params))(params, self.data), params

    def _of_gradient(self) -> Callable[[list[Tensor]], Sequence[Tensor]]:
        """Return the derivative of the gradient that was set."""
        gradient, params = self.gradsH, self.params
        refuse_unlike(params, gradsH=gradient)
        if not any(g.requires_grad for g in gradient):
            raise ValueError(
                "gradsH was set to tensors without a graph: compute them with "
                "`torch.autograd.grad(loss, params, create_graph=True)`"
            )
        return lambda v: hessian_vector_product(gradient, params, v)

    def _by_lists(
        self, product: Callable[[list[Tensor]], Sequence[Tensor]]
    ) -> tuple[Matvec, dict[str, Tensor]]:
        """Return the matvec of a function of one vector that is a list, and the parameters."""
        _, params = self.loss()

        def of_tree(vector: Tree) -> Tree:
            return dict(zip(params, product(list(vector.values())), strict=True))

        return batched(of_tree, chunk_size=1), params
