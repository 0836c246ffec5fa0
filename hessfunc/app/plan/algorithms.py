"""Peak memory and workload of the algorithms.

Every figure is read off the code of the algorithm: a vector counts for as long as a name refers to
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from hessfunc.app.plan.footprint import Held, Moment, Setting, at_product
from hessfunc.app.plan.machine import Workload
from hessfunc.app.plan.network import BYTES

# Entries of a basis that are converted at once, if its dtype is coarser than that of products.
_CONVERTED = 2**20


class Algorithm(Protocol):
    """Options of an algorithm, from which its memory and its workload follow."""

    def moments(self, setting: Setting, /) -> Iterator[Moment]:
        """Yield the phases in which the memory of a rank may be largest."""
        ...

    def workload(self, setting: Setting, /) -> Workload:
        """Return the workload of one rank."""
        ...

    def fitted(self, setting: Setting, free: int, /) -> Algorithm:
        """Return the algorithm as it runs with ``free`` bytes available at its start.

        Algorithms query the free memory themselves, and reduce their bases to it.

        Raises:
            MemoryError: If the algorithm cannot start.
        """
        ...

    def smaller(self) -> tuple[str, Algorithm]:
        """Return the options with the least memory, as code, and the algorithm with them."""
        ...


@dataclass(frozen=True)
class Lanczos:
    """Memory and workload of `hessfunc.lanczos`.

    Attributes:
        k: Number of eigenpairs.
        steps: Number of products until all pairs have converged.
        block_size: Number of vectors that are multiplied at once.
        basis_size: Maximum number of basis vectors; None for the default of `lanczos`.
        basis_dtype: Dtype of the basis; None for the dtype of the vectors.
        search: Maximum number of products of the certificate.
    """

    k: int = 10
    steps: int = 100
    block_size: int = 1
    basis_size: int | None = None
    basis_dtype: str | None = None
    search: int = 2

    def __post_init__(self) -> None:
        if self.basis_dtype not in (None, "bfloat16", "float32", "float64"):
            raise ValueError(
                f"basis_dtype={self.basis_dtype!r}: choose bfloat16, float32 or float64"
            )
        if self.basis_size is not None and self.basis_size < self.fewest:
            raise ValueError(
                f"basis_size={self.basis_size} is too small: pass at least k + 2 block_size = "
                f"{self.fewest}"
            )

    @property
    def fewest(self) -> int:
        """Number of vectors of the smallest possible basis."""
        return self.k + 2 * self.block_size

    @property
    def vectors(self) -> int:
        """Maximum number of basis vectors."""
        return self.basis_size or max(2 * self.k + 60, self.k + 4 * self.block_size)

    @property
    def kept(self) -> int:
        """Number of vectors that a restart keeps."""
        room = self.vectors - self.block_size
        return max(1, min(room, self.k + (self.vectors - self.k) // 2))

    @property
    def searches(self) -> int:
        """Number of products of the certificate; 0 if blocks are at least k wide."""
        return self.search if self.block_size < self.k else 0

    def _entries(self, setting: Setting) -> tuple[int, int]:
        """Return the bytes of an entry of the stored basis, and of an entry of the products."""
        stored = setting.network.rows_itemsize
        if self.basis_dtype is not None:
            stored = BYTES[self.basis_dtype]
        return stored, max(stored, BYTES["float32"])

    def _piece(self, setting: Setting) -> int:
        """Return the bytes of the piece of a coarser basis that is converted at once."""
        stored, entry = self._entries(setting)
        coarse = stored < entry
        rows = min(self.vectors, self.steps)
        return entry * min(_CONVERTED, rows * setting.width) if coarse else 0

    def moments(self, setting: Setting, /) -> Iterator[Moment]:
        k, b = self.k, self.block_size
        stored, entry = self._entries(setting)
        vector, row = stored * setting.width, entry * setting.width
        of_product = partial(at_product, setting, entry=entry)
        basis: Held = {"basis": self.vectors * vector, "next block": b * vector}
        coarse = {"next block, converted": b * row} if stored < entry else {}
        yield from of_product(b, basis | coarse)

        alone = setting.parameters | basis
        piece = self._piece(setting)
        yield Moment("orthonormalisation of a block", alone | {"vectors": 3 * b * row + piece})
        lengths = 2 * row if entry < BYTES["float64"] else 0
        yield Moment("a restart", alone | {"vectors": b * vector + lengths + piece})

        results: Held = basis | {"results": k * row}
        yield from of_product(1, results | {"vectors": 2 * row}, name="the check of all pairs")
        products = {"vectors": (1 + max(0, k - b)) * row}
        yield from of_product(b, results | products, name="the check of each pair")
        if self.searches:
            # The first vector of the recurrence, and its last two.
            outside = {"vectors": 3 * row}
            yield from of_product(1, results | outside, name="the certificate")
            joined = {"vectors": 5 * row + piece}
            yield Moment("a step of the certificate", setting.parameters | results | joined)

    def workload(self, setting: Setting, /) -> Workload:
        b, (stored, _) = self.block_size, self._entries(setting)
        blocks = -(-self.steps // b)
        size, read, sizes = 0, 0, 0
        for _ in range(blocks):
            if size + b > self.vectors:
                # A restart reads the basis, and reads, writes and scales the part that it keeps.
                # The next product is coupled with that part.
                read += size + 4 * self.kept
                size = self.kept
            size += b
            # The recurrence reads the last block twice and the one before it once. Full
            # reorthogonalisation reads the basis twice.
            read += 3 * b + 2 * size
            sizes += size
        mean = sizes / blocks
        return Workload(
            steps=blocks,
            block_size=b,
            checks=1 + self.k + self.searches,
            traffic=read * stored * setting.width,
            sums=b * mean + 2 * b * b + 1,
            exchanges=4,
        )

    def fitted(self, setting: Setting, free: int, /) -> Lanczos:
        stored, entry = self._entries(setting)
        pairs = self.k * setting.width * entry
        most = (free // 2 - pairs) // (stored * setting.width) - self.block_size
        if most < self.fewest:
            raise MemoryError(
                f"lanczos cannot start: a basis of {self.fewest} vectors does not fit in half of "
                "the free memory"
            )
        return replace(self, basis_size=min(self.vectors, most))

    def smaller(self) -> tuple[str, Lanczos]:
        return f"basis_size={self.fewest}", replace(self, basis_size=self.fewest)


@dataclass(frozen=True)
class PowerIteration:
    """Memory and workload of `hessfunc.power_iteration`.

    Attributes:
        k: Number of eigenpairs.
        steps: Number of products until all pairs have converged.
    """

    k: int = 1
    steps: int = 1000

    def moments(self, setting: Setting, /) -> Iterator[Moment]:
        row = setting.rows
        yield from at_product(setting, 1, {"vectors": (2 * self.k + 3) * row})
        rotated = {"vectors": (3 * self.k + 1) * row}
        yield Moment("the rotation of the pairs", setting.parameters | rotated)

    def workload(self, setting: Setting, /) -> Workload:
        # A step projects on the accepted pairs, and reads and writes the vector and its product.
        traffic = self.steps * (2 * self.k + 6) * setting.rows
        return Workload(self.steps, 1, 0, float(traffic), self.k + 3.0, 2)

    def fitted(self, setting: Setting, free: int, /) -> PowerIteration:
        return self

    def smaller(self) -> tuple[str, PowerIteration]:
        return "k=1", replace(self, k=1)


@dataclass(frozen=True)
class Slq:
    """Memory and workload of `hessfunc.slq`.

    Attributes:
        probes: Number of random vectors.
        steps: Lanczos steps per random vector.
        group: Maximum number of probes that run at once; None for all of them.
    """

    probes: int = 1
    steps: int = 100
    group: int | None = None

    @property
    def at_once(self) -> int:
        """Number of probes that run at once."""
        return min(self.probes, self.group or self.probes)

    @property
    def groups(self) -> int:
        """Number of groups of probes, which run one after another."""
        return -(-self.probes // self.at_once)

    def moments(self, setting: Setting, /) -> Iterator[Moment]:
        g, row = self.at_once, setting.rows
        # The bases of the previous group are still alive when the next group starts.
        several = 2 if self.groups > 1 else 1
        basis: Held = {
            "basis": (several * self.steps - 1) * g * row,
            "next block": g * row,
        }
        yield from at_product(setting, g, basis)

    def workload(self, setting: Setting, /) -> Workload:
        g, row = self.at_once, setting.rows
        # A step reads its last two vectors twice, and the whole basis twice.
        read = g * self.groups * self.steps * (self.steps + 1 + 4)
        return Workload(
            steps=self.groups * self.steps,
            block_size=g,
            checks=0,
            traffic=read * row,
            sums=g * ((self.steps + 1) / 2 + 3) + 1,
            exchanges=2 * g + 2,
        )

    def fitted(self, setting: Setting, free: int, /) -> Slq:
        basis = self.steps * setting.rows
        if basis > free:
            raise MemoryError(
                "slq cannot start: the basis of one probe does not fit in the free memory"
            )
        return replace(self, group=max(1, min(self.at_once, free // 2 // basis)))

    def smaller(self) -> tuple[str, Slq]:
        return "probes=1, steps=20", replace(self, probes=1, steps=min(self.steps, 20))


@dataclass(frozen=True)
class _Probes:
    """Random vectors in blocks.

    Attributes:
        probes: Number of random vectors.
        block_size: Number of vectors that are multiplied at once.
    """

    probes: int
    block_size: int = 10

    @property
    def at_once(self) -> int:
        """Number of probes per block product."""
        return min(self.probes, self.block_size)


@dataclass(frozen=True)
class Hutchinson(_Probes):
    """Memory and workload of `hessfunc.hutchinson`."""

    probes: int = 100

    def moments(self, setting: Setting, /) -> Iterator[Moment]:
        b, row = self.at_once, setting.rows
        # Running mean of the entries of w * Aw in float64, which is kept between blocks.
        spread = BYTES["float64"] * setting.width
        yield from at_product(setting, b, {"next block": b * row, "mean of entries": spread})
        # Elementwise products w * Aw, which are summed in float64, leaf by leaf.
        entries = b * (row + setting.in_float64(setting.largest))
        vectors = {
            "next block": b * row,
            "vectors": b * row + entries,
            "mean of entries": spread,
        }
        yield Moment("the trace of each leaf", setting.parameters | vectors)
        # Welford's update holds two means, the entries, and two deviations from the means.
        vectors = {"next block": b * row, "vectors": b * row, "spread of entries": 5 * spread}
        yield Moment("the spread of entries", setting.parameters | vectors)

    def workload(self, setting: Setting, /) -> Workload:
        b = self.at_once
        blocks = -(-self.probes // b)
        return Workload(blocks, b, 0, 6.0 * blocks * b * setting.rows, 2.0 * b + 1, 3)

    def fitted(self, setting: Setting, free: int, /) -> Hutchinson:
        return self

    def smaller(self) -> tuple[str, Hutchinson]:
        return "block_size=1", replace(self, block_size=1)


@dataclass(frozen=True)
class Xtrace(_Probes):
    """Memory and workload of `hessfunc.xtrace`, whose probes take two products each."""

    probes: int = 50

    def moments(self, setting: Setting, /) -> Iterator[Moment]:
        p, b, row = self.probes, self.at_once, setting.rows
        last = p - (p - 1) // b * b
        before: Held = {"basis": 4 * (p - last) * row}
        yield from at_product(
            setting, last, before | {"next block": last * row}, "the products of the probes"
        )
        grown = {"next block": last * row, "vectors": (3 * p + 3 * last) * row}
        yield from at_product(setting, last, before | grown, "the products of the basis")
        # Four kinds of leave-one-out rows, their elementwise products, and these in float64.
        vectors = {
            "basis": 4 * p * row,
            "vectors": p * (5 * row + setting.in_float64(setting.largest)),
        }
        yield Moment("the leave-one-out estimates", setting.parameters | vectors)

    def workload(self, setting: Setting, /) -> Workload:
        p, b, row = self.probes, self.at_once, setting.rows
        rounds = -(-p // b)
        read = 6 * sum(min(p, b * (i + 1)) for i in range(rounds)) + 30 * p
        return Workload(2 * rounds, b, 0, float(read * row), 3.0 * b * p, 5)

    def fitted(self, setting: Setting, free: int, /) -> Xtrace:
        most = free // 2 // (16 * setting.rows)
        if most < 2:
            raise MemoryError(
                "xtrace cannot start: two probes and their products do not fit in half of the free "
                "memory"
            )
        return replace(self, probes=min(self.probes, most))

    def smaller(self) -> tuple[str, Hutchinson]:
        return "hutchinson with block_size=1", Hutchinson(self.probes, 1)
