"""Curvature of a data set, as a weighted mean over its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from hessfunc.autograd.constant_matrix import refusing_gradients
from hessfunc.autograd.functorch import transforming
from hessfunc.fingerprints import Fingerprint, checksum, of_batches, with_fingerprint
from hessfunc.options import validated
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.reading import Passes, Reading
from hessfunc.transforms.batches.reductions import Average, inner
from hessfunc.transforms.batches.statistics import of_statistics
from hessfunc.transforms.batches.sums import Data, Keep, Partition, Sum
from hessfunc.transforms.chunks import Curvature
from hessfunc.trees import Matvec, Tree, flatten, leaves, tree_map

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@validated
def over_batches(
    curvature: Curvature,
    /,
    *,
    weight: Callable[[Any], float] | None = None,
    keep: Keep = False,
    mesh: DeviceMesh | None = None,
    data: Data = "replicated",
) -> Curvature:
    """Return the curvature of a data set as a function ``(params, batches) -> matvec``.

        A v = sum_b weight(b) A_b v / sum_b weight(b)

    A_b is the curvature of batch b. For a loss that is a mean over examples or targets, weighted by
    their number, A is the curvature of the mean over the data set. It does not depend on the
    division into batches. For a loss that is a sum over examples (``reduction="sum"``), batches
    are summed if no weight is given.

    The reduction is read from the loss functions and modules of torch. For any other loss it is
    tested once: the loss of the first batch is compared with the losses of its halves, at the cost
    of two evaluations. If `over_batches` is nested, the weight of an inner data set is the sum of
    the weights of its batches.

    One pass over the batches multiplies a whole vector block. Each pass computes a checksum of its
    examples, which does not depend on their order, and must have the same checksum as the first.
    The checksum misses two changes. A dropout mask in train mode belongs to a position in the
    batch, so the order of examples must not change. Frozen parameters and buffers are read in each
    pass, so they must not change either. A DataLoader draws a number from torch's random stream in
    each pass, with or without shuffling.

    `kflr`, `kfac`, `kfra` and `ekfac` accumulate their factors when the matvec is made, in one
    pass, or in two for `ekfac`, whose eigendecompositions the ranks of a mesh divide. The result
    has the structured blocks of the data set, with their inverses and determinants, and its
    products need no data.

    On a mesh, the batches are divided among the ranks of the axis "data", and the vectors of a
    block among the ranks of the axis "probe". Sums and weights are all-reduced, so the parts may be
    uneven. Every rank must make the matvec and call it with the same block, and every rank gets the
    whole mean. If a rank fails or requests another product, all ranks raise an error.

    Examples:
        >>> loss = lambda w, x: (x * w.square()).mean()
        >>> batches = [torch.tensor([1.0]), torch.tensor([3.0, 5.0])]
        >>> matvec = hf.over_batches(hf.hvp(loss))(torch.ones(()), batches)
        >>> matvec(torch.ones(1))  # 2 * (1 + 3 + 5) / 3
        tensor([6.])

    Args:
        curvature: Curvature function of one batch.
        weight: Weight of a batch in the mean. Batches of weight 0 are left out. The default for
            losses of torch that are means over targets is the divisor of the mean. For class
            targets, this is the number of targets that are not ignored, or the sum of their class
            weights; otherwise it is the number of entries. The default for another mean is the
            number of examples. Pass a function such as ``lambda batch: len(batch[1])`` if another
            loss is a mean over something else, such as tokens without padding, or if the tensors of
            a batch differ in the length of their first axis, as in time-major sequences and graphs.
        keep: Whether to keep the graph and a copy of every batch. Products are then faster, and
            memory grows with the data. ``"auto"`` keeps them if the first pass finds that they
            take at most a quarter of the free memory, or of `memory_limit`; products are the same
            bits either way. A loader that reuses its buffers must copy its batches
            before you make a list, because the list would hold the last batch repeatedly.
        mesh: Mesh of ranks with the axes "data", "probe" or both.
        data: Distribution of the batches. ``"replicated"``: Every rank has the same batches in the
            same order, and rank r of R multiplies batches r, r + R, r + 2R and so on.
            ``"sharded"``: Every rank has its own part. Samplers that pad the parts to the same
            length count examples twice, and are refused.

    Raises:
        TypeError: If the batches can be read only once, or if ``curvature`` does not return a
            matvec; raised by the curvature function or the matvec, like the following errors.
        ValueError: If the data set has no batch, if the weights sum to zero, if the number of
            examples is ambiguous because first axes differ, if two passes saw different examples,
            if a model uses batch statistics (BatchNorm in train mode) on several batches, or if
            the mesh has another axis. On a mesh, also if ranks differ in their parameters, blocks
            or data, or count examples twice.
        RuntimeError: If another rank has failed.
        ConnectionError: If another rank has ended, or does not take part within the timeout.

    Cost: one pass over the batches per block. A mesh adds an all-reduce of k n + 2 numbers over
    "data", and a gather of k n numbers over "probe".
    """
    if data not in get_args(Data):
        raise ValueError(f"data={data!r}: choose 'replicated' or 'sharded'")

    def of_data(params: Tree, batches: Iterable[Any]) -> Matvec:
        mean = mean_over(curvature, passes=Passes(), weight=weight, keep=keep, mesh=mesh, data=data)
        return mean(params, batches)

    return of_data


def mean_over(
    curvature: Curvature,
    /,
    *,
    passes: Passes,
    weight: Callable[[Any], float] | None,
    keep: Keep,
    mesh: DeviceMesh | None,
    data: Data,
) -> Curvature:
    """Implement `over_batches`, with ``passes`` that several matrices may partition.

    Args:
        curvature: Curvature function of one batch.
        passes: Checksums of passes. Matrices that partition them must see the same examples.
        weight: Weight of a batch, as in `over_batches`.
        keep: Whether to keep the graphs, as in `over_batches`.
        mesh: Mesh of ranks, as in `over_batches`.
        data: Distribution of the batches, as in `over_batches`.
    """

    def of_data(params: Tree, batches: Iterable[Any]) -> Matvec:
        if transforming() and mesh is not None:
            raise NotImplementedError(_ON_MESH)
        if torch.compiler.is_compiling():
            return _compiled_mean(curvature, params, batches, weight)
        partition = partition_of(mesh, data)

        def checked() -> Space:
            refuse_one_batch(batches)
            if mesh is not None and any(
                getattr(x, "device_mesh", None) == mesh for x in leaves(params)
            ):
                raise ValueError(
                    "the parameters are divided among the ranks of this mesh, which therefore must "
                    "have the same batches: leave out `mesh`; a model of `functional(model, "
                    "mesh=mesh)` divides the rows of each batch"
                )
            return space_of(params)

        space = partition.all_well(checked)
        options = {"the curvature": curvature, "weight": weight, "keep": keep, "data": data}
        partition.refuse_unlike(space, params, batches, options)
        average = Average.over(weight, batches)
        outer = inner(average)
        # The weight of an inner mean is the sum of its own weights, even for a single batch.
        average.several |= mesh is not None or outer is not None
        reading = Reading(curvature, params, batches, average, space, partition, passes)
        if (structured := of_statistics(curvature)) is not None:
            mean_of = partial(reading.statistics, outer=outer)
            return structured.over_batches(params, mean_of, partition.each)
        local = {True: reading.kept, False: reading.anew, "auto": reading.fitting}[keep]()

        def summed(block: Tree) -> Sum:
            total = local(block)
            if outer is not None and mesh is None:
                outer.weight = total.weight
            return total

        mean = partition.over(space, batches, summed)
        if mesh is not None:
            mean = _without_graph(mean, space.tree_leaves(params))
        return with_fingerprint(mean, partial(_fingerprint, space, params, batches, data))

    return of_data


_ON_MESH = (
    "the collectives of a mesh have no derivatives: differentiate `over_batches` without `mesh`, "
    "or take the product under `torch.no_grad()`"
)


def _compiled_mean(
    curvature: Curvature,
    params: Tree,
    batches: Iterable[Any],
    weight: Callable[[Any], float] | None,
) -> Matvec:
    """Return the mean without checks on the host, which Dynamo does not trace."""
    if weight is None:
        raise NotImplementedError(
            "the weight of a batch cannot be found out inside torch.compile: pass a weight to "
            "`over_batches`, such as `weight=lambda batch: len(batch[1])`"
        )
    weighted = [(weight(batch), curvature(params, batch)) for batch in batches]
    total = sum(w for w, _ in weighted)

    def matvec(block: Tree) -> Tree:
        products = [matvec(block) for _, matvec in weighted]
        shares = [w / total for w, _ in weighted]
        return tree_map(
            lambda *parts: sum(s * part for s, part in zip(shares, parts, strict=True)), *products
        )

    return matvec


def _without_graph(matvec: Matvec, constants: Sequence[Tensor]) -> Matvec:
    """Return a matvec on a mesh, whose collectives lose the graph of parameters and vectors."""

    def refusing(block: Tree) -> Tree:
        if transforming():
            raise NotImplementedError(_ON_MESH)
        given, structure = flatten(block)
        lost = [x for x in (*constants, *given) if isinstance(x, Tensor) and x.requires_grad]
        if not (lost and torch.is_grad_enabled()):
            return matvec(block)
        with torch.no_grad():
            outs = leaves(matvec(block))
        return structure.unflatten(refusing_gradients(lost, outs, _ON_MESH))

    vars(refusing).update(vars(matvec))
    return refusing


def _fingerprint(space: Space, params: Tree, batches: Iterable[Any], data: Data) -> Fingerprint:
    """Return checksums of the parameters and of a list of batches.

    A loader has no checksum, because it would have to be read once more.
    """
    of_params = {"parameters": checksum(space.tree_leaves(params))}
    if data == "sharded" or not isinstance(batches, Sequence):
        return of_params
    return of_params | {"batches": of_batches(batches)}


def partition_of(mesh: DeviceMesh | None, data: Data = "replicated", /) -> Partition:
    """Return the part of the work that this process does."""
    if mesh is None:
        return Partition()
    # The import of torch.distributed is slow.
    from hessfunc.transforms.batches.mesh import MeshPartition

    return MeshPartition.of(mesh, data)


def refuse_one_batch(batches: Iterable[Any], /) -> None:
    """Raise TypeError for a single batch, or for batches that can be read only once."""
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches is a {type(batches).__name__}, which can be read only once, but each "
            "product is a pass over the data: pass list(batches) or a DataLoader"
        )
    is_pair = isinstance(batches, tuple) and (
        hasattr(batches, "_fields") or (len(batches) == 2 and isinstance(batches[1], Tensor))
    )
    if isinstance(batches, (Tensor, Mapping)) or is_pair:
        raise TypeError("batches is a single batch: pass a list of batches, [batch]")
