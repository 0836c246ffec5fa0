"""Passes of one process over its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from hessfunc.autograd.functorch import transforming
from hessfunc.changes import Rereads
from hessfunc.memory import Footprint, available_memory
from hessfunc.spaces.space import Space
from hessfunc.training_mode import several_batches
from hessfunc.transforms.batches.reductions import Average, Inner, NoTargetsError, watching
from hessfunc.transforms.batches.statistics import Stage, Total
from hessfunc.transforms.batches.sums import Made, Partition, Passed, Read, Sum
from hessfunc.transforms.chunks import Curvature, used_once
from hessfunc.trees import Matvec, Tree, tree_map

# Functions that return the weight and the matvec of a batch.
_Made: TypeAlias = tuple[Callable[[], float], Callable[[], Matvec]]


@dataclass
class Passes:
    """Passes over batches that must see the same examples, of one matrix or of several.

    Attributes:
        first: Checksum of the first pass; None before it.
    """

    first: Tensor | None = None

    def add(self, total: Tensor) -> None:
        """Add the checksum of a pass.

        Raises:
            ValueError: If the pass saw other examples than the first one.
        """
        if self.first is None:
            self.first = total
        elif not torch.allclose(self.first, total, rtol=1e-9, atol=0.0):
            raise ValueError(
                "two passes over the batches saw different examples, so the products belong "
                "to different matrices: turn off random augmentation, and `shuffle` together with "
                "`drop_last`; or read the batches once, list(loader)"
            )


@dataclass(frozen=True)
class Reading:
    """Passes of one rank over its batches.

    Attributes:
        curvature: Curvature function of one batch.
        params: Parameters.
        batches: Batches of all ranks, or the part of this rank.
        average: Combination of the batches.
        space: Space of the parameters.
        partition: Part of the work that this rank does.
        passes: Checksums of the passes.
    """

    curvature: Curvature
    params: Tree
    batches: Iterable[Any]
    average: Average
    space: Space
    partition: Partition
    passes: Passes

    def kept(self) -> Callable[[Tree], Sum]:
        """Make the graphs of all batches now, and return the function that multiplies a block."""
        read, rereads = Read.nothing(self.space.device), self._rereads()
        matvecs = self.partition.all_well(lambda: self._made(read, rereads))
        assert matvecs is not None
        return lambda block: Sum.of(self.space, block, matvecs, read, self.average)

    def anew(self, rereads: Rereads | None = None) -> Callable[[Tree], Sum]:
        """Return a function that multiplies a block and makes the graphs in each pass."""
        rereads = rereads or self._rereads()

        def products(block: Tree) -> Sum:
            read = Read.nothing(self.space.device)
            matvecs = (
                (partial(self.average.of, batch), partial(self._once_at, batch, i))
                for i, batch in self._mine(read)
            )
            with rereads.reading() as reads:
                total = Sum.of(self.space, block, matvecs, read, self.average)
            read.fixed.update(reads.all.values())
            if not transforming():
                self.passes.add(read.all.total)
            return total

        return products

    def fitting(self) -> Callable[[Tree], Sum]:
        """Return a function that multiplies a block, and keeps the graphs if they fit in memory.

        The first call decides, inside the limit of its run.
        """
        rereads = self._rereads()
        anew = self.anew(rereads)
        chosen: list[Callable[[Tree], Sum]] = []

        def within(memory: int) -> Callable[[Tree], Sum]:
            read = Read.nothing(self.space.device)
            with Footprint() as footprint:
                # All ranks of a model with collectives must keep the same graphs.
                matvecs = self._made(
                    read, rereads, lambda: bool(self.space.least(footprint.now <= memory))
                )
            if matvecs is None:
                return anew
            return lambda block: Sum.of(self.space, block, matvecs, read, self.average)

        def products(block: Tree) -> Sum:
            if transforming():
                return anew(block)
            if not chosen:
                chosen.append(within(available_memory(self.space.device) // 4))
            return chosen[0](block)

        return products

    def _rereads(self) -> Rereads:
        return Rereads.of(self.space.names, self.space.tree_leaves(self.params))

    def _made(
        self, read: Read, rereads: Rereads, fits: Callable[[], bool] = lambda: True
    ) -> list[_Made] | None:
        """Return the weight and the matvec of each batch, or None if they do not fit."""
        made: list[_Made] = []
        with rereads.reading() as reads:
            for i, batch in self._mine(read):
                matvec = self._at(batch, i)
                made.append((self.average.later(batch), partial(_itself, matvec)))
                if not fits():
                    return None
        read.fixed.update(reads.all.values())
        if not transforming():
            self.passes.add(read.all.total)
        return made

    def statistics(self, stage: Stage, *, outer: Inner | None) -> Mapping[str, Tensor]:
        """Return the means of the statistics of all batches, in one pass.

        The weight of the pass is the weight of an inner mean over batches, ``outer``.
        """
        rereads = self._rereads()
        totals: list[Total] = []

        def local() -> Passed:
            read = Read.nothing(self.space.device)
            made = ((batch, self._evaluated(stage, batch, i)) for i, batch in self._mine(read))
            with rereads.reading() as reads:
                weighed = (
                    (each, self.average.of(batch)) for batch, each in made if each is not None
                )
                total = Total.of(weighed, given=self.average.weight is not None)
            read.fixed.update(reads.all.values())
            self.passes.add(read.all.total)
            totals.append(total)
            return Passed(total.flat(self.space.device), read, self.average)

        flat = self.partition.summed(self.batches, local)
        total = totals[-1].unflattened(flat)
        if outer is not None:
            outer.weight = total.weight
        return total.mean(self.average)

    def _mine(self, read: Read) -> Iterator[tuple[int, Any]]:
        """Yield the batches of this rank that have a weight, with their index among all batches."""
        for i, batch in enumerate(self.batches):
            place = self.partition.place(i)
            # A transform hides the values of a batch from the checksum.
            if not transforming():
                read.add(batch, own=place is not None)
            if place is not None and self.average.counts(batch):
                yield place, batch

    def _at(self, batch: Any, place: int) -> Matvec:
        made = self._evaluated(lambda *args: _matvec(self.curvature(*args)), batch, place)
        return _zeros if made is None else made

    def _once_at(self, batch: Any, place: int) -> Matvec:
        return used_once(self._at(batch, place))

    def _evaluated(
        self, function: Callable[[Tree, Any], Made], batch: Any, place: int
    ) -> Made | None:
        """Return a function of the parameters and a batch; None if all targets are ignored."""
        # A single batch is never left out, even if all of its targets are ignored.
        optional = batch if self.average.weight is None and self.average.several else None
        with several_batches() if place else nullcontext(), watching(optional=optional) as seen:
            try:
                made = function(self.params, batch)
            except NoTargetsError:
                made = None
            self.average.decide(seen)
        return made


def _matvec(made: Any) -> Matvec:
    if not callable(made):
        raise TypeError(
            f"curvature(params, batch) returned a {type(made).__name__}, not a matvec: pass a "
            "curvature function, such as `over_batches(hvp(loss))`"
        )
    return cast("Matvec", made)


def _zeros(block: Tree) -> Tree:
    return tree_map(torch.zeros_like, block)


def _itself(matvec: Matvec) -> Matvec:
    return matvec
