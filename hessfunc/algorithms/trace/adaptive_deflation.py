"""Trace of a symmetric matrix by the cheapest mixture of deflation and random probes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, Unpack, get_args

import torch
from torch import Tensor

from hessfunc.algorithms.adaptive_deflation import BLOCK, AdaptiveDeflation
from hessfunc.algorithms.deflation import PILOT, Deflation
from hessfunc.algorithms.driver import RunOptions
from hessfunc.algorithms.krylov import Krylov
from hessfunc.algorithms.norms import squared_frobenius
from hessfunc.algorithms.probing import TraceProbing, run_trace
from hessfunc.algorithms.products import Cost, Products
from hessfunc.algorithms.results import Density, Eigenpairs, Estimate
from hessfunc.algorithms.results.estimate import Confidence, leaf_fields
from hessfunc.algorithms.sketch import vectors_that_fit
from hessfunc.algorithms.span import Span
from hessfunc.algorithms.statistics import rounding_of_sum, sphere_error
from hessfunc.algorithms.trace.hutchinson import hutchinson
from hessfunc.algorithms.trace.hutchpp import hutchpp
from hessfunc.algorithms.trace.xnystrace import xnystrace
from hessfunc.algorithms.trace.xtrace import xtrace
from hessfunc.options import at_least, eigenpairs_or_density, validated
from hessfunc.spaces.space import ProbeKind, Space, products_eps
from hessfunc.trees import Matvec, Tree

TraceMethod: TypeAlias = Literal["auto", "hutchinson", "hutchpp", "xtrace", "xnystrace"]
_OTHERS: dict[str, Any] = {
    "hutchinson": hutchinson,
    "hutchpp": hutchpp,
    "xtrace": xtrace,
    "xnystrace": xnystrace,
}


@validated(start=eigenpairs_or_density)
def trace(
    matvec: Matvec,
    like: Tree,
    *,
    method: TraceMethod = "auto",
    rtol: float | None = None,
    atol: float | None = None,
    max_matvecs: int = 100,
    start: Eigenpairs | Density | None = None,
    block_size: int | None = None,
    confidence: Confidence = "fixed",
    **run: Unpack[RunOptions],
) -> Estimate:
    """Estimate the trace of a symmetric matrix, definite or not, in few products.

    With an orthonormal basis Q of j vectors, P = I - QQ', T = Q'AQ, G = PAQ, S = PAP - G M G', and
    probes u on the sphere of radius sqrt(n - j) of the complement of Q,

        tr A = tr T + tr(M G'G) + E[u'Su].

    M is T^-1 where T is positive definite, which makes S the Schur complement of a positive
    semi-definite A, and else 0. Four probes measure ``|S|_F^2``, which is proportional to the
    variance. Q then grows by Krylov vectors, from random starts, for as long as a vector saves more
    than one probe. All other products are probes. On a flat spectrum the cost is therefore that of
    `hutchinson`, and on a decaying one it is below that of `xtrace` and `xnystrace`. For many equal
    eigenvalues above a bulk, `xnystrace` takes up to 30 % fewer products, since each of them
    serves the approximation and a probe. It needs a positive semi-definite matrix.

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
        >>> matvec, like = hf.dense(A), torch.zeros(10, dtype=torch.float64)
        >>> trace = hf.trace(matvec, like, rtol=0.1, seed=0)
        >>> low, high = trace.interval(0.95)
        >>> low <= 55 <= high
        True

    Args:
        matvec: Function from a block of vectors to the block of their products, symmetric.
        like: Tree that shows the structure of a vector.
        method: ``"auto"`` for the estimator above, or the name of another estimator:
            ``"hutchinson"``, ``"hutchpp"``, ``"xtrace"``, or, for positive semi-definite matrices,
            ``"xnystrace"``.
        rtol: Relative tolerance: the run stops when the half-width of the reported 95 % interval
            is at most rtol |value|.
        atol: Absolute tolerance of the half-width. Without rtol and atol the whole budget is used.
        max_matvecs: Budget, the largest number of products.
        start: Eigenpairs of A, from `lanczos`, or a density of A, from `slq` with
            ``keep_basis=True``, that belong to Q from the beginning. One product checks that they
            are those of A. Eigenpairs need not have converged. A density adds the whole Krylov
            space of one of its probes. For ``"auto"`` only; eigenpairs also for ``"hutchinson"``.
        block_size: Number of probes that are multiplied at once: 4 by default, or the default of
            the other estimator. Krylov vectors are multiplied one by one.
        confidence: ``"anytime"`` for intervals that hold together at all stops, as for
            `hutchinson`. For ``"auto"`` and ``"hutchinson"`` only.
        **run: Seed, space, callback, progress and checkpoint, as in `RunOptions`.

    Returns:
        `Estimate`, with the part of each leaf in ``by_leaf`` and ``squared_frobenius`` from the
        same products. The standard error is that of quadratic forms on a sphere,

            stderr^2 = 2 / p mean(|Su|^2 - (u'Su)^2 / (n - j)),

        with Student's quantile of p degrees of freedom for p probes. Standard errors of a run with
        a tolerance are multiplied by 1.1, since such a run stops where its error happens to look
        small. Its reason is "converged" if and only if its 95 % interval is within the tolerance.
        The standard error of a leaf is an upper bound, and contains the residuals of ``start``.

    Raises:
        ValueError: If an option is out of range, if ``start`` belongs to another matrix, or if the
            matvec is not symmetric or not deterministic.
        MemoryError: If not even two probes fit in memory.
        FloatingPointError: If a product is not finite.

    Cost: one matvec a probe or Krylov vector, and one that checks ``start``, whose own matvecs are
    not counted again. Memory: at
    most 4 vectors per product.

    Source: Chen and Hallman 2022, arXiv 2205.01736; Persson, Cortinovis and Kressner 2022, arXiv
    2109.10659.
    """
    if method not in get_args(TraceMethod):
        raise ValueError(f"method={method!r}: choose one of {', '.join(get_args(TraceMethod))}")
    if start is not None and method not in ("auto", "hutchinson"):
        raise ValueError(f"start has no use for method={method!r}: pass method='auto'")
    if confidence != "fixed" and method not in ("auto", "hutchinson"):
        raise ValueError(
            f"confidence={confidence!r} has no use for method={method!r}: pass method='auto'"
        )
    pairs, density = (None, start) if isinstance(start, Density) else (start, None)
    if density is not None and method != "auto":
        raise ValueError(
            f"start is a density, and method={method!r} deflates eigenpairs only: pass "
            "method='auto', or the result of `lanczos`"
        )
    if method != "auto":
        own: dict[str, Any] = {"block_size": block_size, "deflate": pairs}
        if method == "hutchinson":
            own["confidence"] = confidence
        given = {name: value for name, value in own.items() if value is not None}
        estimate: Estimate = _OTHERS[method](
            matvec, like, rtol=rtol, atol=atol, max_matvecs=max_matvecs, **given, **run
        )
        return estimate
    at_least(2, max_matvecs=max_matvecs)
    products = Products.of(matvec, like, run.get("space"))
    adaptive = AdaptiveTrace(
        block_size=BLOCK if block_size is None else block_size,
        rtol=rtol,
        atol=atol,
        confidence=confidence,
        most=vectors_that_fit(products.space, 8),
        span=Span.of(products.space, pairs, "start"),
        krylov=Krylov.of(products.space, density, "start"),
    )
    return run_trace(adaptive, products, run, max_matvecs=max_matvecs)


@dataclass(frozen=True, kw_only=True)
class AdaptiveTrace(AdaptiveDeflation[Estimate], TraceProbing[Deflation]):
    """Trace of the deflated part, and quadratic forms of probes outside of it."""

    fewest: ClassVar[int] = PILOT + 1
    kind: ClassVar[ProbeKind] = "sphere"
    of_diagonal: ClassVar[bool] = False
    margin: ClassVar[float] = 2.7

    def samples(self, state: Deflation, space: Space, /) -> _Forms:
        return _Forms.of(space, state, self.span)

    def images(self, state: Deflation, samples: _Forms, space: Space, most: int, /) -> Tensor:
        rows = slice(most)
        return state.rest(space, rows)[0] if samples.has_weights else state.images[rows]

    def certain(self, grown: Deflation, samples: _Forms, /) -> float:
        if grown.removed is None:
            return 0.0
        curvature, coupled = grown.removed
        mean = float(samples.parts.sum(1).mean()) / samples.dimension
        return (curvature - mean) ** 2 + coupled

    def tolerance(self, samples: _Forms, space: Space, /) -> float:
        return max((self.rtol or 0.0) * abs(samples.value), self.atol or 0.0)

    def probes_within(self, tolerance: float, samples: _Forms, /) -> float:
        # With p probes, the half-width is about 1.96, or 3.2, times (2 |S|_F^2 / p)^(1/2).
        quantile = 3.2 if self.confidence == "anytime" else 1.96
        return 2 * samples.norm * (quantile * self.widening / tolerance) ** 2

    def estimate(self, state: Deflation, space: Space, cost: Cost, /) -> Estimate:
        forms, p = self.samples(state, space), len(state.probes)
        rounding = forms.rounding(space)
        stderr = sphere_error(forms.parts.sum(1), forms.lengths.sum(1), forms.dimension)
        stderr = (stderr + rounding) * self.widening
        # Var(u'E_l S u) <= 2 (E|(Su)_l|^2 - tr(E_l S)^2 / d) for the entries E_l of a leaf.
        variances = (forms.lengths - forms.parts.square() / forms.dimension).clamp_min(0).mean(0)
        leaf_errors = torch.hypot(
            ((2 * variances / p).sqrt() + rounding) * self.widening,
            self.span.leaf_bounds(space),
        )
        # |A|_F^2 = |AV|_F^2 + |VV'AP|_F^2 + |PAP|_F^2, where |VV'AP|_F is that of the residuals.
        # Likewise, Q has |Q'AQ|_F^2 + 2 |PAQ|_F^2 = |T|_F^2 + 2 |G|_F^2. B = PAP has the norm
        # |B|_F^2 = |D|_F^2 + E(|Bu|^2 - |Du|^2) for D = B - S = G M G'.
        inside = self.span.squares + float(self.span.residuals.square().sum())
        inside += float(state.core.square().sum() + 2 * state.ends_gram.trace())
        inside += forms.deflated
        return Estimate(
            value=forms.value,
            stderr=stderr,
            degrees=p,
            samples=forms.exact.sum() + forms.parts.sum(1),
            **leaf_fields(space, forms.exact + forms.parts.mean(0), leaf_errors.tolist()),
            squared_frobenius=squared_frobenius(inside + forms.outside, space, cost),
            confidence=self.confidence,
            **cost,
        )


@dataclass(frozen=True)
class _Forms:
    """Quadratic forms of the probes u, on the sphere of the complement of dimension d.

    Attributes:
        exact: Trace of the deflated part by leaf, float64 ``(leaves,)``.
        parts: ``u'Su`` by leaf, float64 ``(p, leaves)``.
        lengths: ``|Su|^2`` by leaf, float64 ``(p, leaves)``.
        outside: ``|Bu|^2 - |(B - S) u|^2``, float64 ``(p,)``.
        dimension: Dimension d.
        deflated: ``|G M G'|_F^2``.
        size: Scale of the rounding of the deflated part.
        has_weights: Whether M is that of the state, and not zero.
    """

    exact: Tensor
    parts: Tensor
    lengths: Tensor
    outside: Tensor
    dimension: int
    deflated: float
    size: float
    has_weights: bool

    @classmethod
    def of(cls, space: Space, state: Deflation, span: Span) -> _Forms:
        dimension, leaves = space.n - len(span) - len(state.basis), len(space.names)
        # All numbers are quadratic in u, so that d / |u|^2 moves u to the sphere of radius d^1/2.
        numbers = state.forms * (dimension / state.forms[:, -2:-1])
        # u'Bu, |Bu|^2, u'Su and |Su|^2 by leaf
        by_leaf = numbers[:, :-2].unflatten(1, (4, leaves)).unbind(1)
        # The probes may show that M would enlarge the sampled part.
        has_weights = bool(by_leaf[3].sum() < by_leaf[1].sum())
        exact, deflated, outside = span.parts + state.parts, 0.0, by_leaf[1].sum(1)
        if has_weights:
            # |G M G'|_F^2 = tr (M G'G)^2
            weighted = state.weights @ state.ends_gram
            exact, deflated = exact + state.inner, float((weighted * weighted.mT).sum())
            outside = outside - numbers[:, -1]
        return cls(
            exact=exact,
            parts=by_leaf[2 if has_weights else 0],
            lengths=by_leaf[3 if has_weights else 1],
            outside=outside,
            dimension=dimension,
            deflated=deflated,
            size=float(exact.abs().sum() + span.values.norm() + state.core.norm()),
            has_weights=has_weights,
        )

    @property
    def value(self) -> float:
        return float(self.exact.sum() + self.parts.sum(1).mean())

    @property
    def norm(self) -> float:
        """Estimate of |S|_F^2 - tr(S)^2 / d, half the variance of a form."""
        forms = self.parts.sum(1)
        return float((self.lengths.sum(1) - forms.square() / self.dimension).clamp_min(0).mean())

    def rounding(self, space: Space) -> float:
        """Return the standard error of the value from the rounding of the products."""
        size = self.size + float(self.parts.abs().sum(1).mean())
        return rounding_of_sum(products_eps(space)) * size
