"""Gradient of an outer loss at the minimum of an inner loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from hessfunc.algorithms.results.result import Result
from hessfunc.display import VECTORS
from hessfunc.trees import Tree


@dataclass(frozen=True, kw_only=True, repr=False)
class ImplicitGradient(Result):
    """Gradient of an outer loss with respect to the hyperparameters of an inner minimum.

    Attributes:
        gradient: Total derivative with respect to the hyperparameters, a tree like them.
        direct: Part of the gradient at fixed parameters, the partial derivative of the outer loss.
        value: Outer loss at the parameters.
        adjoint: Solution q of ``(H + damping I) q = grad outer``, a tree like the parameters. Pass
            it as ``start`` to the next call after a small change of the hyperparameters.
        residual: Residual norm ``|grad outer - (H + damping I) q|``, measured at the end.
        converged: Whether the residual is within the tolerance of the run.
        error: Estimated 2-norm of the error of the gradient that the residual of the solve implies,
            which is the change of the gradient by a correction of q. Infinite if the solve or the
            correction did not converge.
        inner_gradient: Norm of the gradient of the inner loss at the parameters, zero at a
            stationary point.
        outer_change: First-order change of the outer loss if the parameters moved to the
            stationary point, ``-<q, grad inner>``.
    """

    gradient: Tree = field(metadata=VECTORS)
    direct: Tree = field(metadata=VECTORS)
    value: float
    adjoint: Tree = field(metadata=VECTORS)
    residual: float
    converged: bool
    error: float
    inner_gradient: float
    outer_change: float

    def _headline(self) -> dict[str, object]:
        return {
            "value": f"{self.value:.6g}",
            "error": f"{self.error:.2g}",
            "residual": f"{self.residual:.2g}",
            "converged": self.converged,
            "inner_gradient": f"{self.inner_gradient:.2g}",
        }
