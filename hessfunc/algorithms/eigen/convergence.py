"""Residuals of the wanted Ritz pairs of a Lanczos run, and their tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

from hessfunc.algorithms.eigen import ritz
from hessfunc.algorithms.eigen.lanczos_state import Pairs, Problem, State
from hessfunc.numerics import rounding

# With the rounding r of a product below _REACHABLE times the tolerance, the residuals of the
# recurrence must fall to the tolerance minus _SAFETY r.
_SAFETY = 1.25
_REACHABLE = 0.7
# Share of a tolerance below which the error that the recurrence shows by itself needs no product.
_NEGLIGIBLE = 0.1
# Smaller than any residual that matters.
_TINY = 1e-300


def residuals(problem: Problem, state: State) -> Tensor:
    """Return the residuals of the wanted Ritz pairs, in units of their tolerances."""
    values, _, lengths = wanted_ritz(problem, state)
    return lengths / tolerances(problem, values, state).clamp_min(_TINY)


def wanted_pairs(problem: Problem, state: State) -> Pairs:
    """Return the wanted pairs, with the residuals of the recurrence."""
    values, rotation, lengths = wanted_ritz(problem, state)
    rows = state.basis[: state.size].combine(problem.space, rotation.mT, problem.dtype)
    return Pairs(values, rows, lengths)


def wanted_ritz(problem: Problem, state: State) -> tuple[Tensor, Tensor, Tensor]:
    """Return the wanted Ritz values, their coefficients in the basis as columns, and residuals."""
    values, vectors = state.ritz
    indices = ritz.wanted(problem.method.which, values, problem.method.k)
    return values[indices], vectors[:, indices], state.residuals[indices]


def tolerances(problem: Problem, values: Tensor, state: State) -> Tensor:
    """Return the residuals of the recurrence at which the run stops, at least eps |A|.

    The rounding of products adds to the residuals, and is subtracted from the tolerance unless it
    is too large.
    """
    tolerance, error = _requested(problem, values, state), _error(problem, state)
    usual = tolerance.new_tensor(state.noise)
    noise = torch.where(error <= _NEGLIGIBLE * tolerance, usual.clamp_min(error), usual)
    below = (tolerance - _SAFETY * noise).clamp_min(problem.eps * state.largest)
    return torch.where(noise < _REACHABLE * tolerance, below, tolerance)


def known_error(problem: Problem, state: State) -> float | None:
    """Return the error of the recurrence for a unit vector if it is known and negligible, or None.

    All inner products of V with its products are computed, so that A V' = V' T + X' C up to the
    rounding of the products and up to the difference of T and V A V'.
    """
    values, _, lengths = wanted_ritz(problem, state)
    error, allowed = _error(problem, state), _requested(problem, values, state)
    negligible = error <= _NEGLIGIBLE * torch.maximum(allowed, lengths)
    return error if bool(negligible.all()) else None


def _error(problem: Problem, state: State) -> float:
    return max(rounding(problem.eps, state.largest), state.asymmetry)


def _requested(problem: Problem, values: Tensor, state: State) -> Tensor:
    least = max(problem.method.atol, problem.eps * state.largest)
    return (problem.method.rtol * values.abs()).clamp_min(least)


def have_converged(problem: Problem, state: State, pairs: Pairs) -> Tensor:
    """Return whether each residual is within the tolerance, or value and residual are rounding."""
    return ritz.have_converged(
        pairs.values,
        pairs.residuals,
        rtol=problem.method.rtol,
        atol=problem.method.atol,
        floor=rounding(problem.eps, state.largest),
    )
