"""The algorithms: what each holds where it holds most, and how much it does.

Every figure is read off the code of the algorithm: a vector counts as long as a name refers to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from hessfunc.app.plan.footprint import Held, Moment, Setting, at_product
from hessfunc.app.plan.machine import Work
from hessfunc.app.plan.network import BYTES

# Entries of a basis in a coarser dtype that are converted at once.
_CONVERTED = 2**20


class Algorithm(Protocol):
    """Options of an algorithm that say how much it holds and does."""

    def moments(self, setting: Setting, /) -> Iterator[Moment]:
        """Where a rank may hold the most."""
        ...

    def work(self, setting: Setting, /) -> Work: ...

    def fitted(self, setting: Setting, free: int, /) -> Algorithm:
        """As it runs where so many bytes are free when it begins: algorithms look for themselves.

        Raises:
            MemoryError: it would not begin.
        """
        ...

    def smaller(self) -> tuple[str, Algorithm]:
        """The one that holds the least, and how it is asked for."""
        ...


@dataclass(frozen=True)
class Lanczos:
    """`hessfunc.lanczos`.

    Attributes:
        k: eigenpairs.
        steps: products until all have converged.
        block_size: how many vectors are multiplied at once.
        basis_size: the most vectors that are kept; by default as in `lanczos`.
        basis_dtype: that of the vectors by default.
        search: the most steps from outside of the basis at the end.
    """

    k: int = 10
    steps: int = 100
    block_size: int = 1
    basis_size: int | None = None
    basis_dtype: str | None = None
    search: int = 8

    def __post_init__(self) -> None:
        if self.basis_dtype not in (None, "bfloat16", "float32", "float64"):
            raise ValueError(
                f"basis_dtype={self.basis_dtype!r}: choose bfloat16, float32 or float64"
            )
        if self.basis_size is not None and self.basis_size < self.fewest:
            raise ValueError(
                f"basis_size={self.basis_size}: k + 2 block_size = {self.fewest} at least"
            )

    @property
    def fewest(self) -> int:
        """The vectors of the smallest basis."""
        return self.k + 2 * self.block_size

    @property
    def vectors(self) -> int:
        """The most vectors that are kept."""
        return self.basis_size or max(2 * self.k + 10, self.k + 4 * self.block_size)

    @property
    def kept(self) -> int:
        """Those that a restart keeps."""
        room = self.vectors - self.block_size
        return max(1, min(room, self.k + (self.vectors - self.k) // 2))

    @property
    def searches(self) -> int:
        return self.search if self.block_size < self.k else 0

    def _entries(self, setting: Setting) -> tuple[int, int]:
        """Bytes of one number of the basis, and of one that products are made of."""
        stored = setting.network.rows_itemsize
        if self.basis_dtype is not None:
            stored = BYTES[self.basis_dtype]
        return stored, max(stored, BYTES["float32"])

    def _piece(self, setting: Setting) -> int:
        """Bytes of what is converted at once of a coarser basis."""
        stored, entry = self._entries(setting)
        coarse = stored < entry
        return entry * min(_CONVERTED, self.vectors * setting.width) if coarse else 0

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
        yield Moment("the block made orthonormal", alone | {"vectors": 3 * b * row + piece})
        lengths = 2 * row if entry < BYTES["float64"] else 0
        yield Moment("a restart", alone | {"vectors": b * vector + lengths + piece})

        found: Held = basis | {"results": k * row}
        yield from of_product(1, found | {"vectors": 2 * row}, name="the check of all pairs")
        images = {"vectors": (1 + max(0, k - b)) * row}
        yield from of_product(b, found | images, name="the check of each pair")
        if self.searches:
            outside = {"vectors": 2 * self.searches * row}
            yield from of_product(1, found | outside, name="the search outside")
            # Rows and their images, as they were and one longer.
            joined = {"vectors": 4 * self.searches * row}
            yield Moment("what the search has found", setting.parameters | found | joined)

    def work(self, setting: Setting, /) -> Work:
        b, (stored, _) = self.block_size, self._entries(setting)
        blocks = -(-self.steps // b)
        size, read = 0, 0
        for _ in range(blocks):
            if size + b > self.vectors:
                # The basis is read, and the part that is kept is written and scaled.
                read += size + 3 * self.kept
                size = self.kept
            size += b
            # Two projections, each of which reads the basis twice.
            read += 4 * size
        mean = read / (4 * blocks)
        return Work(
            steps=blocks,
            block=b,
            checks=1 + self.k + self.searches,
            traffic=read * stored * setting.width,
            sums=2 * b * mean + b * b + 1,
            exchanges=4,
        )

    def fitted(self, setting: Setting, free: int, /) -> Lanczos:
        stored, entry = self._entries(setting)
        pairs = self.k * setting.width * entry
        most = (free // 2 - pairs) // (stored * setting.width) - self.block_size
        if most < self.fewest:
            raise MemoryError(
                f"lanczos would not begin: a basis of {self.fewest} vectors does not fit in half "
                "of what is free"
            )
        return replace(self, basis_size=min(self.vectors, most))

    def smaller(self) -> tuple[str, Lanczos]:
        return f"basis_size={self.fewest}", replace(self, basis_size=self.fewest)


@dataclass(frozen=True)
class Slq:
    """`hessfunc.slq`.

    Attributes:
        probes: random vectors.
        steps: of each.
        group: how many probes run at once; all by default.
    """

    probes: int = 1
    steps: int = 100
    group: int | None = None

    @property
    def at_once(self) -> int:
        return min(self.probes, self.group or self.probes)

    @property
    def groups(self) -> int:
        return -(-self.probes // self.at_once)

    def moments(self, setting: Setting, /) -> Iterator[Moment]:
        g, row = self.at_once, setting.rows
        # While a group begins, the bases of the one before are still there.
        several = 2 if self.groups > 1 else 1
        basis: Held = {
            "basis": (several * self.steps - 1) * g * row,
            "next block": g * row,
        }
        yield from at_product(setting, g, basis)

    def work(self, setting: Setting, /) -> Work:
        g, row = self.at_once, setting.rows
        read = 4 * g * self.groups * self.steps * (self.steps + 1) // 2
        return Work(
            steps=self.groups * self.steps,
            block=g,
            checks=0,
            traffic=read * row,
            sums=g * (self.steps + 2) + 1,
            exchanges=2 * g + 2,
        )

    def fitted(self, setting: Setting, free: int, /) -> Slq:
        basis = self.steps * setting.rows
        if basis > free:
            raise MemoryError("slq would not begin: the basis of one probe does not fit")
        return replace(self, group=max(1, min(self.at_once, free // 2 // basis)))

    def smaller(self) -> tuple[str, Slq]:
        return "probes=1, steps=20", replace(self, probes=1, steps=min(self.steps, 20))


@dataclass(frozen=True)
class Hutchinson:
    """`hessfunc.hutchinson`.

    Attributes:
        probes: random vectors.
        block_size: how many are multiplied at once.
    """

    probes: int = 100
    block_size: int = 10

    @property
    def at_once(self) -> int:
        return min(self.probes, self.block_size)

    def moments(self, setting: Setting, /) -> Iterator[Moment]:
        b, row = self.at_once, setting.rows
        # The mean of the entries of w * Aw in float64, kept between the blocks.
        spread = BYTES["float64"] * setting.width
        yield from at_product(setting, b, {"next block": b * row, "mean of entries": spread})
        # Products of entries, which are added up in float64, leaf by leaf.
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

    def work(self, setting: Setting, /) -> Work:
        b = self.at_once
        blocks = -(-self.probes // b)
        return Work(blocks, b, 0, 6.0 * blocks * b * setting.rows, 2.0 * b + 1, 3)

    def fitted(self, setting: Setting, free: int, /) -> Hutchinson:
        return self

    def smaller(self) -> tuple[str, Hutchinson]:
        return "block_size=1", replace(self, block_size=1)


@dataclass(frozen=True)
class Xtrace:
    """`hessfunc.xtrace`.

    Attributes:
        probes: random vectors, of two products each.
        block_size: how many are multiplied at once.
    """

    probes: int = 50
    block_size: int = 10

    @property
    def at_once(self) -> int:
        return min(self.probes, self.block_size)

    def moments(self, setting: Setting, /) -> Iterator[Moment]:
        p, b, row = self.probes, self.at_once, setting.rows
        last = p - (p - 1) // b * b
        before: Held = {"basis": 4 * (p - last) * row}
        yield from at_product(
            setting, last, before | {"next block": last * row}, "the products of probes"
        )
        grown = {"next block": last * row, "vectors": (3 * p + 3 * last) * row}
        yield from at_product(setting, last, before | grown, "the products of the basis")
        # Four kinds of rows without each probe, their products of entries, and these in float64.
        vectors = {
            "basis": 4 * p * row,
            "vectors": p * (5 * row + setting.in_float64(setting.largest)),
        }
        yield Moment("the estimates without each probe", setting.parameters | vectors)

    def work(self, setting: Setting, /) -> Work:
        p, b, row = self.probes, self.at_once, setting.rows
        rounds = -(-p // b)
        read = 6 * sum(min(p, b * (i + 1)) for i in range(rounds)) + 30 * p
        return Work(2 * rounds, b, 0, float(read * row), 3.0 * b * p, 5)

    def fitted(self, setting: Setting, free: int, /) -> Xtrace:
        most = free // 2 // (16 * setting.rows)
        if most < 2:
            raise MemoryError("xtrace would not begin: two probes with their products do not fit")
        return replace(self, probes=min(self.probes, most))

    def smaller(self) -> tuple[str, Hutchinson]:
        return "hutchinson with block_size=1", Hutchinson(self.probes, 1)
