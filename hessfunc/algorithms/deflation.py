"""Deflation that grows, by Krylov steps, for as long as it saves more random probes than it costs.

With an orthonormal basis Q, P = I - QQ', B = PAP, T = Q'AQ and G = PAQ,

    A = (A - B) + G M G' + S,  S = B - G M G',

for any M, and only S has to be sampled. For a positive semi-definite A, M = T^-1 makes S the Schur
complement of T in A, which is A less its Nystrom approximation; otherwise M = 0. The next basis
vector q changes A - B exactly, with a = q'Bq and out = Bq - a q:

    A - B += a qq' + q out' + out q'.

The variance of a probe is proportional to ``|S|_F^2``, which the same probes measure before and
after each step. They say how many further probes a basis vector saves (Chen and Hallman 2022, arXiv
2205.01736; the split of a budget is that of Persson, Cortinovis and Kressner 2022, arXiv
2109.10659, decided online).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hessfunc.algorithms.basis import Basis, project_out
from hessfunc.algorithms.chains import Chains
from hessfunc.algorithms.products import Products
from hessfunc.algorithms.span import Span
from hessfunc.numerics import rounding, wide_dtype
from hessfunc.randomness import mixed
from hessfunc.spaces.space import DIVIDED, ProbeKind, Rows, Space, products_eps, rows_dtype

# Number of probes before the first decision.
PILOT = 4
# Start vectors of chains have another seed than probes and than those of eigensolvers: a deflation
# that depended on the probes would bias their mean.
_CHAINS = -3


@dataclass(frozen=True)
class Deflation:
    """Matrix that is split into a deflated part and a sampled part S.

    P projects on the complement of the basis Q and of the given eigenpairs.

    Attributes:
        basis: Orthonormal rows Q', ``(j, n)``, orthogonal to the given eigenpairs.
        ends: Products P A q with the last vector q of each chain, ``(c, n)``. Products with the
            other vectors have no part outside of Q.
        last: Index in Q of the last vector of each chain.
        alive: Number of each of these chains. A chain whose space is invariant is left out.
        core: Matrix T = Q'AQ, float64 ``(j, j)``.
        probes: Probes w, ``(p, n)``; those of a trace are projected by P.
        images: Products B w, ``(p, n)``.
        unprojected: Products A P w, ``(p, n)``; no row if only the trace is needed.
        parts: Trace of A - B by leaf, float64 ``(leaves,)``, without the eigenpairs.
        diagonal: Diagonal of A - B, a wide row; no row if only the trace is needed.
        row_squares: Diagonal of AQQ'A, a wide row; no row if only the trace is needed.
        largest: Largest length ``|A q|`` so far.
        weights: Matrix M of the ends, float64 ``(c, c)``: a part of T^-1 without eigenvalues of the
            order of rounding, or zero if T has a negative eigenvalue.
        ends_gram: Inner products of the ends, float64 ``(c, c)``, if only the trace is needed.
        inner: Trace of G M G' by leaf, float64 ``(leaves,)``, if only the trace is needed.
        forms: Numbers of each probe of a trace, float64 ``(p, 4 leaves + 2)``: u'Bu, |Bu|^2, u'Su
            and |Su|^2 by leaf, |u|^2 and |(B - S) u|^2. No row if the diagonal is needed.
        removed: Numbers v and t with which ``|S - c I|_F^2`` has fallen by (v - c)^2 + t at least,
            for every c, by the last basis vector; None if there is no such bound, or if the
            diagonal is needed.
        chains: Reductions of the variance by the steps so far.
        seed: Seed of the run.
    """

    basis: Rows = field(metadata=DIVIDED)
    ends: Rows = field(metadata=DIVIDED)
    last: tuple[int, ...]
    alive: tuple[int, ...]
    core: Tensor
    probes: Rows = field(metadata=DIVIDED)
    images: Rows = field(metadata=DIVIDED)
    unprojected: Rows = field(metadata=DIVIDED)
    parts: Tensor
    diagonal: Rows = field(metadata=DIVIDED)
    row_squares: Rows = field(metadata=DIVIDED)
    largest: float
    weights: Tensor
    ends_gram: Tensor
    inner: Tensor
    forms: Tensor
    removed: tuple[float, float] | None
    chains: Chains
    seed: int

    @classmethod
    def none(cls, space: Space, seed: int, /, *, diagonal: bool) -> Deflation:
        """Return the state before the first product.

        Args:
            space: Space of the vectors.
            seed: Seed of the run.
            diagonal: Whether the diagonal is needed besides the trace.
        """
        rows = space.zeros(0, rows_dtype(space))
        wide = space.zeros(int(diagonal), wide_dtype(space.device))
        none = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        parts = none.new_zeros(len(space.names))
        return cls(
            basis=rows,
            ends=rows,
            last=(),
            alive=(),
            core=none,
            probes=rows,
            images=rows,
            unprojected=rows,
            parts=parts,
            diagonal=wide,
            row_squares=wide,
            largest=0.0,
            weights=none,
            ends_gram=none,
            inner=parts,
            forms=none.new_zeros(0, 4 * len(parts) + 2),
            removed=None,
            chains=Chains(),
            seed=seed,
        )

    @property
    def of_diagonal(self) -> bool:
        """Whether the diagonal is needed besides the trace."""
        return len(self.diagonal) > 0

    def probed(self, products: Products, span: Span, count: int, kind: ProbeKind, /) -> Deflation:
        """Return the state with more probes.

        Args:
            products: Products of the run.
            span: Span of the given eigenpairs.
            count: Number of probes.
            kind: Distribution of the probes before they are projected.

        Cost: one matvec a probe.
        """
        space, p = products.space, len(self.probes)
        known = Basis(span.basis), Basis(self.basis)
        indices = range(p, p + count)
        probes = space.probes(indices, kind=kind, seed=self.seed, dtype=rows_dtype(space))
        projected = probes
        if any(map(len, known)):
            projected = probes.clone()
            # A second projection removes what rounding leaves of the first.
            for _ in range(2):
                project_out(space, projected, *known)
        unprojected = products(projected)
        images = unprojected
        if any(map(len, known)):
            images = unprojected.clone()
            project_out(space, images, *known)
        if not self.of_diagonal:
            probes, unprojected = projected, unprojected[:0]
        probed = replace(
            self,
            probes=_grown(self.probes, probes),
            images=_grown(self.images, images),
            unprojected=_grown(self.unprojected, unprojected),
        )
        return probed.formed(space)

    def extended(self, products: Products, span: Span, chain: int, /) -> Deflation:
        """Return the state with one more basis vector, which overwrites the rows of this state.

        The products B w and A P w follow from those so far without a product.

        Args:
            products: Products of the run.
            span: Span of the given eigenpairs.
            chain: Number of the chain that is continued or started.

        Cost: one matvec.
        """
        space = products.space
        known = Basis(span.basis), Basis(self.basis)
        others = [place for place, other in enumerate(self.alive) if other != chain]
        if chain in self.alive:
            row = self.ends[self.alive.index(chain)][None].clone()
        else:
            starts = mixed(self.seed, _CHAINS)
            row = space.probes([chain], kind="sphere", seed=starts, dtype=rows_dtype(space))
        # The end of a chain is short next to A q, so its rounding along Q is relatively large.
        for _ in range(2):
            row /= space.norms(row).to(row.dtype)[:, None]
            project_out(space, row, *known)
        row /= space.norms(row).to(row.dtype)[:, None]
        image = products(row)
        basis, out = _grown(self.basis, row), image.clone()
        along = project_out(space, out, Basis(span.basis), Basis(basis))
        along = (along + project_out(space, out, Basis(span.basis), Basis(basis)))[:, len(span) :]
        column = along.cpu().double()[0]
        curvature = float(column[-1])
        length, size = float(space.norms(out)), float(space.norms(image))
        largest = max(self.largest, size)
        # T grows by the row and the column [Q q]'A q, which ends with a = q'Bq.
        core = torch.zeros(len(column), len(column), dtype=torch.float64, device="cpu")
        core[:-1, :-1], core[-1], core[:, -1] = self.core, column, column
        touched = space.gram(self.ends, row)
        removed = None
        if not self.of_diagonal:
            removed = self._removed(space, row, out, curvature, touched)
        # The next projection is P - qq', and G loses q (q'G). The end of the chain of q vanishes,
        # since q is its direction, and the product of q has the end `out`.
        ends = self.ends[others]
        if others:
            ends = ends - space.combine(touched[others], row)
        last, alive = [self.last[i] for i in others], [self.alive[i] for i in others]
        if length > rounding(products_eps(space), largest):
            ends = torch.cat([ends, out])
            last, alive = [*last, len(self.basis)], [*alive, chain]
        # B w decreases by (a q'w + out'w) q + (q'w) out, A P w by (q'w) A q, and P w by (q'w) q.
        pair = torch.cat([row, out])
        inside, outside = space.gram(self.probes, pair).unbind(1)
        decrease = torch.stack([curvature * inside + outside, inside], dim=1)
        self.images.addmm_(decrease.to(self.images), pair, alpha=-1)
        changed, by = (self.unprojected, image) if self.of_diagonal else (self.probes, row)
        changed.addmm_(inside[:, None].to(changed), by, alpha=-1)
        # diag(A - B) increases by q * (a q + 2 out), and diag(AQQ'A) by (A q) * (A q).
        twice = curvature * row + 2 * out
        grown = replace(
            self,
            basis=basis,
            ends=ends,
            last=tuple(last),
            alive=tuple(alive),
            core=core,
            parts=self.parts + space.by_leaf(row, twice)[0].cpu().double(),
            diagonal=self.diagonal + (row * twice).to(self.diagonal.dtype),
            row_squares=self.row_squares + image.to(self.row_squares.dtype).square(),
            largest=largest,
            removed=removed,
        )
        return grown.weighted(space)

    def _removed(
        self, space: Space, row: Tensor, out: Tensor, curvature: float, touched: Tensor
    ) -> tuple[float, float] | None:
        """Return the numbers v and t of the next basis vector q, as in ``removed``.

        Without M, B loses a qq' + q out' + out q', and ``|B - c I|_F^2`` on the complement falls by
        (a - c)^2 + 2 |out|^2. For a positive semi-definite S, S - s s' / q's with s = S q has lost
        at least v = |s|^2 / q's: ``|S|_F^2`` falls by

            2 s'Ss / q's - v^2 >= v^2,

        since ``|s|^4 <= q's s'Ss`` (Cauchy and Schwarz), the trace by v, and the dimension by 1.

        Args:
            space: Space of the vectors.
            row: Vector q.
            out: Part of B q outside of q.
            curvature: Form a = q'Bq.
            touched: Inner products of the ends with q.
        """
        if curvature <= 0 or (len(self.last) and not bool(self.weights.any())):
            return curvature, 2 * float(space.norms(out)) ** 2
        rest = out + curvature * row
        rest -= space.combine((self.weights @ touched.cpu().double()).mT, self.ends)
        form = float(space.gram(row, rest))
        if form <= rounding(products_eps(space), self.largest):
            return None
        return float(space.norms(rest)) ** 2 / form, 0.0

    def weighted(self, space: Space, /) -> Deflation:
        """Return the state with the matrix M of its basis, and the forms of all probes."""
        # G M G' needs only the rows and columns of M = T^-1 = X L^-1 X' at the last vectors of the
        # chains, since all other columns of G are zero.
        values, vectors = torch.linalg.eigh(self.core)
        tolerance = rounding(products_eps(space), self.largest)
        weights = self.core.new_zeros(len(self.last), len(self.last))
        if len(self.last) and float(values[0]) >= -tolerance:
            kept = values > tolerance
            vectors = vectors[list(self.last)][:, kept]
            weights = vectors / values[kept] @ vectors.mT
        state = replace(self, weights=weights, forms=self.forms[:0])
        if self.of_diagonal:
            return state
        # diag(G M G') is the sum of the rows g * (M g).
        inner = space.by_leaf(self.ends, space.combine(weights, self.ends)).sum(0).cpu().double()
        ends_gram = space.gram(self.ends, self.ends).cpu().double()
        return replace(state, inner=inner, ends_gram=ends_gram).formed(space)

    def formed(self, space: Space, /) -> Deflation:
        """Return the state with the forms of the last probes, which have none yet."""
        known = len(self.forms)
        if self.of_diagonal or known == len(self.probes):
            return self
        rows = slice(known, None)
        probes, images = self.probes[rows], self.images[rows]
        forms = [space.by_leaf(probes, images), space.by_leaf(images, images)]
        lengths = [space.norms(probes).square()]
        if bool(self.weights.any()):
            rest, along = self.rest(space, rows)
            forms += [space.by_leaf(probes, rest), space.by_leaf(rest, rest)]
            lengths += [((along @ self.ends_gram) * along).sum(1).to(lengths[0])]
        else:
            forms += forms
            lengths += [torch.zeros_like(lengths[0])]
        numbers = torch.cat([*forms, *(length[:, None] for length in lengths)], dim=1)
        return replace(self, forms=torch.cat([self.forms, numbers.cpu().double()]))

    def rest(self, space: Space, rows: slice, /) -> tuple[Tensor, Tensor]:
        """Return the products S w for some of the probes, and the coefficients M G'w, ``(p, c)``.

        S w = B w - G (M G'w)
        """
        along = space.gram(self.probes[rows], self.ends).cpu().double() @ self.weights
        images = self.images[rows]
        return torch.addmm(images, along.to(images), self.ends, alpha=-1), along

    def sampled(self, space: Space, /) -> tuple[Tensor, Tensor]:
        """Return the products S w, ``(p, n)``, and the matrix M, ``(c, c)``.

        M is zero if the probes show that it would enlarge the sampled part.
        """
        if bool(self.weights.any()):
            images, _ = self.rest(space, slice(None))
            squares = [float(space.norms(rows).square().sum()) for rows in (images, self.images)]
            if squares[0] < squares[1]:
                return images, self.weights
        return self.images, torch.zeros_like(self.weights)


def _grown(rows: Tensor, more: Tensor) -> Tensor:
    """Return rows with more of them, in the memory of the rows, which doubles when it is full."""
    if not len(more):
        return rows
    total = len(rows) + len(more)
    fits = rows.untyped_storage().nbytes() >= total * more[0].numel() * more.itemsize
    return Basis(rows).append(more, total if fits else 2 * total).rows
