"""Recurrences of optimisers with momentum, and the curvature at which they diverge."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """Recurrence of a parameter w and its momentum m, for a gradient g and a preconditioner P.

        m <- a m + b g
        w <- rho w - lr P^-1 (p m + q g),  with the m before its update

    Attributes:
        a: Factor of the momentum in its update.
        b: Factor of the gradient in the update of the momentum.
        p: Factor of the momentum in the step.
        q: Factor of the gradient in the step.
        rho: Factor of the parameter, 1 - lr times a decoupled weight decay.
    """

    a: float = 0.0
    b: float = 0.0
    p: float = 0.0
    q: float = 1.0
    rho: float = 1.0

    def limit(self, lr: float) -> float:
        """Return the largest eigenvalue of P^-1 H at which the recurrence does not diverge.

        On a quadratic, g = H w, an eigenvector of P^-1 H with eigenvalue s separates, and (w, m) is
        multiplied by

            M = [[rho - lr q s, -lr p], [b s, a]],
            T = trace M = rho + a - lr q s,  D = det M = a rho - lr (a q - p b) s.

        Both eigenvalues of M lie in the unit disc if and only if 1 + T + D >= 0, 1 - T + D >= 0 and
        1 - D >= 0 (Jury 1962). Each condition is linear in s. The first one binds for all
        optimisers in use: an eigenvalue of M passes -1, at

            s = (1 + rho) (1 + a) / (lr (q (1 + a) - p b)).

        For parameters whose limits differ, passing -1 means w <- -w and m <- -m, that is
        ``m = -b g / (1 + a)`` at the start of the step, and ``w = limit^-1 P^-1 H w`` with a limit
        for each parameter. The first crossing therefore is where the largest eigenvalue of
        ``(limit P)^-1 H`` passes 1: the limits scale the preconditioner.
        """
        a, b, p, q, rho = self.a, self.b, self.p, self.q, self.rho
        conditions = (
            ((1 + rho) * (1 + a), q * (1 + a) - p * b),
            ((1 - rho) * (1 - a), -q * (1 - a) - p * b),
            (1 - a * rho, p * b - a * q),
        )
        # Each condition is: intercept - lr slope s >= 0.
        return min(
            (intercept / (lr * slope) for intercept, slope in conditions if slope > 0),
            default=math.inf,
        )


def heavy_ball(momentum: float, dampening: float = 0.0) -> Recurrence:
    """Return the recurrence m <- momentum m + (1 - dampening) g, w <- w - lr m.

    Its limit is (2 + 2 momentum) / ((1 - dampening) lr).
    """
    b = 1 - dampening
    return Recurrence(a=momentum, b=b, p=momentum, q=b)


def nesterov(momentum: float) -> Recurrence:
    """Return the recurrence m <- momentum m + g, w <- w - lr (g + momentum m).

    Its limit is (2 + 2 momentum) / ((1 + 2 momentum) lr).
    """
    return Recurrence(a=momentum, b=1.0, p=momentum**2, q=1 + momentum)


def averaged(beta: float) -> Recurrence:
    """Return the recurrence m <- beta m + (1 - beta) g, w <- w - lr m.

    Its limit is (2 + 2 beta) / ((1 - beta) lr).
    """
    return heavy_ball(beta, dampening=beta)


def looking_ahead(beta: float, *, of_gradient: float, of_average: float) -> Recurrence:
    """Return the recurrence m <- beta m + (1 - beta) g, with a step along g and the new m.

        w <- w - lr (of_gradient g + of_average m)

    With ``of_gradient = 1 - beta`` and ``of_average = beta``, the Nesterov momentum of averages,
    its limit is (2 + 2 beta) / ((1 - beta) (1 + 2 beta) lr).
    """
    return Recurrence(
        a=beta, b=1 - beta, p=of_average * beta, q=of_gradient + of_average * (1 - beta)
    )


def lion(beta_1: float, beta_2: float) -> Recurrence:
    """Return the recurrence m <- beta_2 m + (1 - beta_2) g, with a step along the other average.

        w <- w - lr (beta_1 m + (1 - beta_1) g)

    For beta_1 <= beta_2, its limit is (2 + 2 beta_2) / ((1 + beta_2 - 2 beta_1) lr).
    """
    return Recurrence(a=beta_2, b=1 - beta_2, p=beta_1, q=1 - beta_1)
