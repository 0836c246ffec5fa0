"""Maximum of the marginal likelihood over the prior precision and the noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hessfunc.numerics import NonFiniteError

# Logarithm of a precision or a noise beyond which the search counts as diverging.
_FURTHEST = 50.0


def maximise(
    evidence: Callable[[Tensor], Tensor],
    start: Tensor,
    /,
    *,
    max_steps: int,
    tolerance: float,
) -> tuple[Tensor, str]:
    """Return the maximum of a function of logarithms, and the reason for which the search stopped.

    The search is L-BFGS with a strong Wolfe line search.

    Raises:
        FloatingPointError: If a logarithm diverges.
    """
    point = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [point],
        max_iter=max_steps,
        max_eval=25 * max_steps,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        if not float(point.detach().abs().max()) < _FURTHEST:
            raise NonFiniteError(
                "the marginal likelihood has no maximum: the noise or a prior precision diverges, "
                "as for a network that fits its targets exactly; pass `tune_noise=False`"
            )
        value = -evidence(point)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
        loss()
    assert point.grad is not None
    slope = float(point.grad.abs().max())
    if slope <= tolerance:
        reason = f"converged: derivatives of at most {slope:.1e}"
    else:
        reason = f"did not converge: derivatives of up to {slope:.1e} after {max_steps} steps"
    return point.detach(), reason
