"""Linear systems whose right-hand sides are gradients of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from hessfunc import options
from hessfunc.algorithms.solve.cg import cg
from hessfunc.display import Reported
from hessfunc.losses import LossFunction
from hessfunc.options import at_least
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.mean import over_batches, refuse_one_batch
from hessfunc.transforms.batches.sums import Keep
from hessfunc.transforms.chunks import Curvature
from hessfunc.transforms.example_gradients import example_gradients
from hessfunc.transforms.gauss_newton import ggnvp
from hessfunc.trees import Matvec, Tree

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@runtime_checkable
class _Invertible(Protocol):
    """Matrix with structure, such as Kronecker factors, whose inverse needs no iterations."""

    def __call__(self, block: Tree, /) -> Tree: ...

    def inverse(self, damping: float, /) -> Matvec:
        """Return the matvec of ``(A + damping I)^-1``."""


@dataclass
class System:
    """Systems with the matrix A + damping I, with the sums over all solves so far.

    Attributes:
        space: Space of the parameters.
        params: Parameters.
        matrix: Matvec of A.
        damping: Number that is added to the diagonal of A.
        preconditioner: Preconditioner of `cg`.
        rtol: Relative tolerance of the residual of each column.
        budget: Number of products for each column.
        progress: Function of the progress.
        residuals: Residuals of each solve, float64.
        solved: Whether each residual is within the tolerance.
        reasons: Reason for which each column stopped.
        matvecs: Number of products.
        passes: Number of calls of the matvec.
    """

    space: Space
    params: Tree
    matrix: Matvec
    damping: float
    preconditioner: Matvec | None
    rtol: float
    budget: int
    progress: Reported
    residuals: list[Tensor] = field(default_factory=list)
    solved: list[Tensor] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    matvecs: int = 0
    passes: int = 0

    @classmethod
    def of(
        cls,
        loss: LossFunction,
        params: Tree,
        batches: Iterable[Any],
        curvature: Curvature | Matvec | None,
        damping: float,
        preconditioner: Matvec | None,
        rtol: float,
        budget: int,
        *,
        weight: Callable[[Any], float] | None,
        keep: Keep,
        progress: Reported,
        mesh: DeviceMesh | None = None,
    ) -> System:
        at_least(0, damping=damping)
        at_least(1, max_matvecs=budget)
        if not rtol > 0:
            raise ValueError(f"rtol={rtol:g}: it must be positive, such as rtol=1e-4")
        given: Any = ggnvp(loss) if curvature is None else curvature  # type: ignore[arg-type]
        if options.is_function(given, 2):
            given = over_batches(given, weight=weight, keep=keep, mesh=mesh)(params, batches)
        if isinstance(given, _Invertible) and preconditioner is not None:
            raise ValueError(
                "structured blocks are inverted without iterations: omit `preconditioner`"
            )
        return cls(space_of(params), params, given, damping, preconditioner, rtol, budget, progress)

    def solve(self, rows: Tensor) -> Tensor:
        """Return the solutions of the systems with these right-hand sides, as rows."""
        block = self.space.views(rows)
        if isinstance(self.matrix, _Invertible):
            x = self.space.ravel(self.matrix.inverse(self.damping)(block), dtype=rows.dtype)
            # The residual b - (A + damping I) x measures the rounding of the inverse.
            image = self.space.ravel(self.matrix(self.space.views(x)), dtype=rows.dtype)
            residuals = self.space.norms(rows - image - self.damping * x)
            self.residuals.append(residuals.cpu())
            self.solved.append((residuals <= self.rtol * self.space.norms(rows)).cpu())
            self.reasons += ["exact: inverse of structured blocks"] * len(rows)
            self.matvecs += len(rows)
            self.passes += 1
            return x
        solution = cg(
            self.matrix,
            block,
            like=self.params,
            damping=self.damping,
            preconditioner=self.preconditioner,
            rtol=self.rtol,
            max_matvecs=self.budget * len(rows),
            progress=self.progress,
        )
        if solution.negative_curvature is not None:
            met = next(reason for reason in solution.reasons if "curvature" in reason)
            raise ValueError(
                f"A + damping I is not positive definite, so that no influence is defined: {met}"
            )
        self.residuals.append(solution.residuals.cpu())
        self.solved.append(solution.solved.cpu())
        self.reasons += solution.reasons
        self.matvecs += solution.matvecs
        self.passes += solution.passes
        return self.space.ravel(solution.x, dtype=rows.dtype)

    @property
    def reason(self) -> str:
        """Reason for which the first column without convergence stopped, else the first column."""
        solved = torch.cat(self.solved)
        if bool(solved.all()):
            return self.reasons[0]
        first = self.reasons[int((~solved).nonzero()[0])]
        return f"{int((~solved).sum())} of {len(solved)} systems are not solved: {first}"


def gradients_of(
    loss: LossFunction, params: Tree, batches: Iterable[Any], examples_per_chunk: int | None, /
) -> Iterator[Tree]:
    """Yield the gradients of the examples of all batches, as vector blocks."""
    for batch in batches:
        yield from example_gradients(loss, params, batch, examples_per_chunk=examples_per_chunk)


def refuse_unordered(batches: Iterable[Any], /) -> None:
    """Raise for batches that can be read only once, and for a loader that shuffles."""
    refuse_one_batch(batches)
    sampler = getattr(getattr(batches, "batch_sampler", None), "sampler", None)
    if isinstance(batches, DataLoader) and not isinstance(sampler, SequentialSampler | None):
        raise ValueError(
            "the scores are in the order of the examples, but this loader shuffles: pass "
            "`list(loader)`, or a loader with `shuffle=False`"
        )
