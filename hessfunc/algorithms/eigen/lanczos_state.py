"""State of a Lanczos run: its options, its recurrence, and the first block of its basis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hessfunc.algorithms.basis import Basis, orthonormal
from hessfunc.algorithms.eigen.ritz import Which, rayleigh_ritz
from hessfunc.algorithms.offload import is_far, room_beside
from hessfunc.algorithms.starts import lengths_of, of_starts
from hessfunc.options import at_least
from hessfunc.spaces.space import Space, available_to, products_eps
from hessfunc.trees import Tree


@dataclass(frozen=True, kw_only=True)
class LanczosOptions:
    """Options of `lanczos`, with the dtype and the device of the basis determined."""

    k: int
    which: Which
    block_size: int
    basis_size: int | None
    basis_dtype: torch.dtype
    basis_device: torch.device
    basis_bytes: int | None
    rtol: float
    atol: float
    search: int
    start: Tree | None

    def __post_init__(self) -> None:
        at_least(0, rtol=self.rtol, atol=self.atol, search=self.search)
        if self.basis_dtype not in (torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(
                f"basis_dtype={self.basis_dtype}: choose torch.bfloat16, torch.float32 or "
                "torch.float64"
            )


@dataclass(frozen=True)
class Problem:
    """Options of a run in the space of its vectors.

    Attributes:
        method: Options of the run.
        space: Space of the vectors.
    """

    method: LanczosOptions
    space: Space

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of products and combinations."""
        return torch.promote_types(self.method.basis_dtype, torch.float32)

    @cached_property
    def eps(self) -> float:
        """Machine epsilon of the products and of the basis."""
        return products_eps(self.space, self.method.basis_dtype)


@dataclass(frozen=True)
class State:
    """Block Lanczos recurrence ``A V' = V' T + X' C``.

    V are the first rows of the basis; X, the next block, are the rest. The basis lies in a
    workspace that a state shares with its successor. A step writes only behind the basis. A restart
    overwrites the basis, so that only the new state is valid.

    Attributes:
        basis: Orthonormal rows, V above X.
        projected: T, float64 ``(m, m)`` on the CPU.
        coupling: C, float64 ``(b, m)`` on the CPU.
        probes: Number of random vectors drawn so far.
        basis_size: Largest number of basis vectors.
        seed: Seed of the run.
        before: Largest absolute Ritz value before the last restart, which may drop its vector.
        steps: Number of block steps since the last random start.
        closed: Wanted values when V last spanned an invariant subspace.
        finished: Whether nothing remains to be found outside of V.
        trusted: Whether the Krylov space began at a random vector, or one has shown that no wanted
            eigenvalue lies outside of it.
        owed: Number of block steps required from the last random vector, since that many steps
            have shown a wanted eigenvalue outside of the basis.
        certificate: Probability with which a random vector would not have shown a wanted eigenvalue
            outside of the basis, after all pairs had converged; None before there is one.
        failure: Error of the recurrence for a combination of all pairs, measured by a product;
            None before that product.
        noise: Largest measured rounding of a product with a unit vector.
        asymmetry: Error of the recurrence for a unit combination of V, as u'Av - v'Au shows it for
            rows u and v; infinite if the basis is coarser than the products.
        looked: Number of block steps, and largest logarithm of a residual in units of its
            tolerance, when the Ritz pairs were last computed.
        pairs: Wanted pairs with residuals checked by products; None before the end of the run.
    """

    basis: Basis
    projected: Tensor
    coupling: Tensor
    probes: int
    basis_size: int
    seed: int
    before: float = 0.0
    steps: int = 0
    closed: Tensor | None = None
    finished: bool = False
    trusted: bool = True
    owed: int = 0
    certificate: float | None = None
    failure: float | None = None
    noise: float = 0.0
    asymmetry: float = 0.0
    looked: tuple[int, float] = (0, math.inf)
    pairs: Pairs | None = None

    @cached_property
    def size(self) -> int:
        return self.projected.shape[0]

    @property
    def seed_of_starts(self) -> int:
        """Seed of the random vectors."""
        return of_starts(self.seed)

    @cached_property
    def ritz(self) -> tuple[Tensor, Tensor]:
        """All Ritz values, ascending, and their coefficients in the basis, as columns."""
        return rayleigh_ritz(self.projected)

    @cached_property
    def residuals(self) -> Tensor:
        """Residuals of all Ritz pairs: for v = V'y, A v - value v = X' C y has the length |C y|."""
        return torch.linalg.vector_norm(self.coupling @ self.ritz[1], dim=0)

    @cached_property
    def largest(self) -> float:
        """Largest absolute Ritz value so far, a lower bound of |A|."""
        return max(self.before, float(self.ritz[0].abs().max())) if self.size else 0.0

    @cached_property
    def longest(self) -> float:
        """Length of the longest row of T: at most `largest`, and cheaper."""
        if not self.size:
            return self.before
        return max(self.before, float(torch.linalg.vector_norm(self.projected, dim=1).max()))


@dataclass(frozen=True)
class Pairs:
    """Wanted Ritz values, their vectors as rows, and residuals."""

    values: Tensor
    rows: Tensor
    residuals: Tensor


def initial(problem: Problem, seed: int) -> State:
    """Return the state before the first block, which contains the given start vectors."""
    method, space, dtype = problem.method, problem.space, problem.dtype
    b, basis_size = method.block_size, size_that_fits(problem)
    trusted = method.start is None or not method.search
    rows = space.probes(range(b), kind="normal", seed=of_starts(seed), dtype=dtype)
    if method.start is not None:
        given = space.rows(method.start, dtype=dtype)
        if len(given) > b:
            # Random combinations of all given vectors, so that none is left out.
            given = space.combine(space.gram(rows, given), given)
        rows = torch.cat([given / lengths_of(space, given).to(dtype)[:, None], rows[len(given) :]])
    empty = Basis.empty(space, method.basis_dtype, method.basis_device)
    block, _, _ = orthonormal(space, rows, empty, threshold=lambda _: 0.0)
    basis = empty.append(block, basis_size + b + (not trusted))
    none = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
    coupling = torch.zeros(len(block), 0, dtype=torch.float64, device="cpu")
    coarse = torch.finfo(method.basis_dtype).eps > torch.finfo(dtype).eps
    return State(
        basis,
        none,
        coupling,
        probes=b,
        basis_size=basis_size,
        seed=seed,
        trusted=trusted,
        asymmetry=math.inf if coarse else 0.0,
    )


def size_that_fits(problem: Problem) -> int:
    """Return the number of basis vectors: the requested one, or the largest that fits in memory.

    Raises:
        MemoryError: If the smallest basis does not fit.
    """
    method, space = problem.method, problem.space
    k, b, limit = method.k, method.block_size, method.basis_bytes
    requested = min(space.n, method.basis_size or max(2 * k + 60, k + 4 * b))
    fewest = min(space.n, k + 2 * b)
    if limit is None:
        limit = available_to(space, method.basis_device) // 2
    vector = space.widest * method.basis_dtype.itemsize
    pairs = k * space.widest * problem.dtype.itemsize
    far = is_far(method.basis_device, space.device)
    if far:
        block = b * space.widest * problem.dtype.itemsize
        room_beside(space, method.basis_dtype, block + pairs)
        pairs = 0
    most = (limit - pairs) // max(vector, 1) - b
    if most < fewest:
        raise MemoryError(
            f"a basis of {fewest} vectors of {space.widest} entries takes "
            f"{((fewest + b) * vector + pairs) / 2**30:.2f} GiB"
            f"{'' if far else ' with the pairs'}, and "
            f"{limit / 2**30:.2f} GiB may be used: take fewer pairs, a smaller `block_size`, "
            "`basis_dtype=torch.bfloat16`, `basis_device='cpu'` on a GPU, `power_iteration`, or "
            "more `basis_bytes`"
        )
    return min(requested, most)
