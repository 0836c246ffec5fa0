"""Means over batches: the curvature of a whole data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor

from hessfunc.fingerprints import Fingerprint, checksum, of_batches, with_fingerprint
from hessfunc.modules import several_batches
from hessfunc.options import validated
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.reductions import Average, NoTargetsError, inner, watching
from hessfunc.transforms.batches.sums import Data, Read, Share, Sum
from hessfunc.transforms.chunks import Curvature
from hessfunc.trees import Matvec, Tree, tree_map, unchanged

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@validated
def over_batches(
    curvature: Curvature,
    /,
    *,
    weight: Callable[[Any], float] | None = None,
    keep: bool = False,
    mesh: DeviceMesh | None = None,
    data: Data = "replicated",
) -> Curvature:
    """The curvature of a data set from those of its batches: ``(params, batches) -> matvec``.

        A v = sum_b weight(b) A_b v / sum_b weight(b)

    For a loss that is a mean over examples or targets, with their number as the weight, this is
    the curvature of the mean over all of them, however they are cut into batches. Where the loss
    is a sum over examples (``reduction="sum"``) and no weight is given, batches are summed. The
    reduction is read from torch's loss functions and modules. Of any other loss the first batch
    tells: its loss is compared with those of its halves, once, at the cost of two evaluations.
    Within another `over_batches`, the sum of the weights is the weight of the whole.

    One pass over the batches serves a whole block. Passes are
    compared by a checksum of their examples, in any order. Two things it cannot see: a mask of
    dropout in train mode belongs to a place in the batch, so the order must stay; and frozen
    parameters and buffers are read anew in each pass, so they must stay. (A DataLoader draws a
    number from torch's random stream in each pass, shuffling or not.)

    On a mesh the batches are divided among the ranks of its axis "data", and the vectors of a
    block among those of its axis "probe". Sums and weights are then added up over ranks, so that
    shares may be uneven. Every rank makes the matvec and calls it with the same block, and every
    rank gets the whole mean. A rank that fails, or asks for another product, is an error on all.

    Args:
        curvature: of one batch.
        weight: Weight of a batch in the mean. None: what the loss of the batch divides by, for the
            losses of torch that are means over targets (with class targets, the number that are
            not ignored or the sum of their class weights; otherwise, the number of entries); for
            another mean, the number of examples; for a sum, batches are summed. Pass your own
            where another loss is a mean over something else, such as tokens that are not padding,
            or where the first axes of the batch's tensors differ (time before batch, graphs):
            ``lambda batch: len(batch[1])``. Batches of weight 0 are left out.
        keep: keep the graph of every batch, and a copy of the batch: products are faster, memory
            grows with the data. A loader may reuse its buffers; a list made from such a loader
            holds the last batch alone, again and again, so let that loader copy.
        mesh: of ranks, with the axes "data", "probe" or both.
        data: How batches lie on the ranks. ``"replicated"``: every rank has the same batches in the
            same order, and rank r of R takes batches r, r + R, r + 2R and so on. ``"sharded"``:
            every rank has its own part. A sampler that pads the parts to one length counts
            examples twice, and is refused.

    Raises:
        TypeError: (from the curvature function) the batches can be read only once; (also from the
            matvec) ``curvature`` gives no matvec.
        ValueError: there is no batch; weights sum to zero; the number of examples is a guess, as
            the first axes of a batch's tensors differ; two passes saw different examples; a
            model uses batch statistics (BatchNorm in train mode) on more than one batch; the mesh
            has another axis. From the matvec or the curvature function: ranks differ in their
            parameters, their blocks or their data, or count examples twice.
        RuntimeError: another rank has failed.
        ConnectionError: another rank has ended, or does not come within the timeout.

    Cost: one pass over the batches a block. On a mesh, one sum of k n + 2 numbers over "data",
    and k n numbers gathered over "probe".
    """
    if data not in get_args(Data):
        raise ValueError(f"data={data!r}: choose 'replicated' or 'sharded'")

    def of_data(params: Tree, batches: Iterable[Any]) -> Matvec:
        mean = mean_over(curvature, passes=Passes(), weight=weight, keep=keep, mesh=mesh, data=data)
        return mean(params, batches)

    return of_data


@dataclass
class Passes:
    """Passes over batches that must see the same examples, of one matrix or of several.

    Attributes:
        first: the checksum of the first pass, once it is made.
    """

    first: Tensor | None = None

    def add(self, total: Tensor) -> None:
        """One more pass, of this checksum.

        Raises:
            ValueError: it saw other examples than the first.
        """
        if self.first is None:
            self.first = total
        elif not torch.allclose(self.first, total, rtol=1e-9, atol=0.0):
            raise ValueError(
                "two passes over the batches saw different examples, so the products belong "
                "to different matrices: turn off random augmentation, and `shuffle` where "
                "`drop_last` is set; or read the batches once, list(loader)"
            )


def mean_over(
    curvature: Curvature,
    /,
    *,
    passes: Passes,
    weight: Callable[[Any], float] | None,
    keep: bool,
    mesh: DeviceMesh | None,
    data: Data,
) -> Curvature:
    """As `over_batches`, with passes that may be compared with those of another matrix."""

    def of_data(params: Tree, batches: Iterable[Any]) -> Matvec:
        share = Share() if mesh is None else _share_of(mesh, data)

        def checked() -> Space:
            _refuse_one_batch(batches)
            return space_of(params)

        space = share.all_well(checked)
        share.refuse_unlike(space, params, batches)
        several = mesh is not None or not isinstance(batches, Sized) or len(batches) != 1
        average = Average(weight, several)
        outer = inner(average)
        # A mean within another one is weighted by the sum of its own weights.
        average.several |= outer is not None
        reading = _Reading(curvature, params, batches, average, space, share, passes)
        local = reading.kept() if keep else reading.anew()

        def told(block: Tree) -> Sum:
            total = local(block)
            if outer is not None and mesh is None:
                outer.weight = total.weight
            return total

        mean = share.over(space, batches, told)
        return with_fingerprint(mean, partial(_fingerprint, space, params, batches, data))

    return of_data


def _fingerprint(space: Space, params: Tree, batches: Iterable[Any], data: Data) -> Fingerprint:
    """Of the parameters, and of batches that are at hand: a loader would be read once more."""
    of_params = {"parameters": checksum(space.tree_leaves(params))}
    if data == "sharded" or not isinstance(batches, Sequence):
        return of_params
    return of_params | {"batches": of_batches(batches)}


def _share_of(mesh: DeviceMesh, data: Data) -> Share:
    # torch.distributed takes a while to import.
    from hessfunc.transforms.batches.mesh import MeshShare

    return MeshShare.of(mesh, data)


def _refuse_one_batch(batches: Iterable[Any]) -> None:
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches is a {type(batches).__name__}, which can be read only once, but each "
            "product is a pass over the data: pass a list or a DataLoader"
        )
    is_pair = isinstance(batches, tuple) and (
        hasattr(batches, "_fields") or (len(batches) == 2 and isinstance(batches[1], Tensor))
    )
    if isinstance(batches, (Tensor, Mapping)) or is_pair:
        raise TypeError("batches is a single batch: pass a list of batches, [batch]")


@dataclass(frozen=True)
class _Reading:
    """A pass over the batches of which this rank has a share."""

    curvature: Curvature
    params: Tree
    batches: Iterable[Any]
    average: Average
    space: Space
    share: Share
    passes: Passes

    def kept(self) -> Callable[[Tree], Sum]:
        """The graphs of all batches are made now."""
        read = Read.nothing(self.space.device)

        def make() -> list[tuple[Callable[[], float], Callable[[], Matvec]]]:
            made: list[tuple[Callable[[], float], Callable[[], Matvec]]] = []
            for i, batch in self._mine(read):
                matvec = self._at(batch, i)
                made.append((self.average.later(batch), partial(_itself, matvec)))
            self.passes.add(read.all.total)
            return made

        found = self.share.all_well(make)
        return lambda block: Sum.of(self.space, block, found, read, self.average)

    def anew(self) -> Callable[[Tree], Sum]:
        """The graph of a batch is made in every pass."""
        refuse_if_changed = unchanged(self.space.names, self.space.tree_leaves(self.params))

        def products(block: Tree) -> Sum:
            refuse_if_changed()
            read = Read.nothing(self.space.device)
            found = (
                (partial(self.average.of, batch), partial(self._at, batch, i))
                for i, batch in self._mine(read)
            )
            total = Sum.of(self.space, block, found, read, self.average)
            self.passes.add(read.all.total)
            return total

        return products

    def _mine(self, read: Read) -> Iterator[tuple[int, Any]]:
        """The batches of this rank that count, with their place among all."""
        for i, batch in enumerate(self.batches):
            place = self.share.place(i)
            read.add(batch, own=place is not None)
            if place is not None and self.average.counts(batch):
                yield place, batch

    def _at(self, batch: Any, place: int) -> Matvec:
        # A batch that stands alone is not left out, whatever becomes of its loss.
        optional = batch if self.average.weight is None and self.average.several else None
        with several_batches() if place else nullcontext(), watching(optional=optional) as seen:
            try:
                matvec = _matvec(self.curvature(self.params, batch))
            except NoTargetsError:
                matvec = _zeros
            self.average.decide(seen)
        return matvec


def _matvec(made: Any) -> Matvec:
    if not callable(made):
        raise TypeError(
            f"curvature(params, batch) gave a {type(made).__name__}, not a matvec: pass a "
            "curvature function, such as `over_batches(hvp(loss))`"
        )
    return cast("Matvec", made)


def _zeros(block: Tree) -> Tree:
    return tree_map(torch.zeros_like, block)


def _itself(matvec: Matvec) -> Matvec:
    return matvec
