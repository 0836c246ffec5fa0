"""Linear systems whose right-hand sides are gradients of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from hessfunc import options
from hessfunc.algorithms.results.result import Saved
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


@dataclass(frozen=True)
class Solves(Saved):
    """Solutions of several systems, and how each solve ended.

    Attributes:
        x: Solutions ``(k, n)``.
        residuals: Norm of the residual of each system, float64 ``(k,)``.
        solved: Whether each residual is within the tolerance, bool ``(k,)``.
        reasons: Reason for which each solve stopped.
        matvecs: Number of products.
        passes: Number of calls of the matvec.
    """

    x: Tensor
    residuals: Tensor
    solved: Tensor
    reasons: tuple[str, ...]
    matvecs: int
    passes: int

    @classmethod
    def joined(cls, solves: Sequence[Solves], /) -> Solves:
        """Return the solves of all systems in one object."""
        return cls(
            torch.cat([one.x for one in solves]),
            torch.cat([one.residuals for one in solves]),
            torch.cat([one.solved for one in solves]),
            tuple(reason for one in solves for reason in one.reasons),
            sum(one.matvecs for one in solves),
            sum(one.passes for one in solves),
        )

    @property
    def cost(self) -> dict[str, Any]:
        """Cost fields of a result: the reason is that of the first system that is not solved."""
        failed = (~self.solved).nonzero().flatten().tolist()
        reason = self.reasons[failed[0] if failed else 0]
        if failed:
            reason = f"{len(failed)} of {len(self.solved)} systems are not solved: {reason}"
        return {"matvecs": self.matvecs, "passes": self.passes, "reason": reason, "seed": None}


@dataclass(frozen=True)
class System:
    """Systems with the matrix A + damping I.

    Attributes:
        space: Space of the parameters.
        params: Parameters.
        matrix: Matvec of A.
        damping: Number that is added to the diagonal of A.
        preconditioner: Preconditioner of `cg`.
        rtol: Relative tolerance of the residual of each column.
        budget: Number of products for each column.
        progress: Function of the progress.
    """

    space: Space
    params: Tree
    matrix: Matvec
    damping: float
    preconditioner: Matvec | None
    rtol: float
    budget: int
    progress: Reported

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

    @property
    def is_inverted(self) -> bool:
        """Whether the matrix is inverted on this process, without iterations."""
        return isinstance(self.matrix, _Invertible)

    def solve(self, rows: Tensor) -> Solves:
        """Solve the systems with these right-hand sides ``(k, n)``."""
        block = self.space.views(rows)
        if isinstance(self.matrix, _Invertible):
            x = self.space.ravel(self.matrix.inverse(self.damping)(block), dtype=rows.dtype)
            # The residual b - (A + damping I) x measures the rounding of the inverse.
            product = self.space.ravel(self.matrix(self.space.views(x)), dtype=rows.dtype)
            residuals = self.space.norms(rows - product - self.damping * x)
            solved = (residuals <= self.rtol * self.space.norms(rows)).cpu()
            reasons = ("exact: inverse of structured blocks",) * len(rows)
            return Solves(x, residuals.cpu(), solved, reasons, len(rows), 1)
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
        return Solves(
            self.space.ravel(solution.x, dtype=rows.dtype),
            solution.residuals.cpu(),
            solution.solved.cpu(),
            tuple(solution.reasons),
            solution.matvecs,
            solution.passes,
        )


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
