"""Sums over batches: the curvature of a whole data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hessfunc.functional import several_batches
from hessfunc.transforms.blocks import Curvature
from hessfunc.transforms.checksum import Checksum
from hessfunc.trees import Matvec, Space, Tree, batch_leaves, flatten, leaves, unchanged

__all__ = ["examples", "microbatches", "over_batches"]


def examples(batch: Any, /) -> int:
    """The number of examples of a batch: the length of its first tensor with an axis."""
    for leaf in batch_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return len(leaf)
    raise ValueError(
        f"cannot count the examples of a batch of type {type(batch).__name__} without a tensor: "
        "pass `weight=`, a function of the batch"
    )


def microbatches(batch: Any, size: int, /) -> list[Any]:
    """A batch cut into pieces of at most ``size`` examples, each of the same structure.

    Tensors are cut along their first axis, as views; all else is repeated. Pass the pieces to
    `over_batches` when the graph of the whole batch does not fit in memory.

    Raises:
        ValueError: size is not positive, or tensors differ in their number of examples.
    """
    if size < 1:
        raise ValueError(f"size={size}: a microbatch has at least one example")
    # Such as the BatchEncoding of Hugging Face, which is no pytree.
    found, structure = flatten(dict(batch) if isinstance(batch, Mapping) else batch)
    cut = [isinstance(leaf, Tensor) and leaf.dim() > 0 for leaf in found]
    lengths = {len(leaf) for leaf, is_cut in zip(found, cut, strict=True) if is_cut}
    if len(lengths) != 1:
        raise ValueError(
            f"the tensors of the batch have {sorted(lengths)} examples: cut it yourself, and pass "
            "the pieces to `over_batches`"
        )
    return [
        structure.unflatten(
            leaf[start : start + size] if is_cut else leaf
            for leaf, is_cut in zip(found, cut, strict=True)
        )
        for start in range(0, lengths.pop(), size)
    ]


def over_batches(
    curvature: Curvature,
    /,
    *,
    weight: Callable[[Any], float] = examples,
    keep: bool = False,
) -> Curvature:
    """The weighted mean of a curvature over batches, as a function ``(params, batches) -> matvec``.

        A v = sum_b weight(b) A_b v / sum_b weight(b)

    For a loss that is a mean over examples this is the curvature of the mean over all of them,
    however they are cut into batches. One pass over the batches serves a whole block. Passes are
    compared by a checksum of their examples, in any order. Two things it cannot see: a mask of
    dropout in train mode belongs to a place in the batch, so the order must stay; and frozen
    parameters and buffers are read anew in each pass, so they must stay. (A DataLoader draws a
    number from torch's random stream in each pass, shuffling or not.)

    Args:
        curvature: of one batch.
        weight: what a batch counts; by default its examples. Pass your own where the loss is a
            mean over something else, such as tokens that are not padding. Batches of weight 0 are
            left out.
        keep: keep the graph of every batch: products are faster, memory grows with the data.

    Raises:
        TypeError: (from the curvature function) the batches can be read only once.
        ValueError: there is no batch; weights sum to zero; two passes saw different examples; a
            model uses batch statistics (BatchNorm in train mode) on more than one batch.
    """

    def of_data(params: Tree, batches: Iterable[Any]) -> Matvec:
        if isinstance(batches, Iterator):
            raise TypeError(
                f"batches is a {type(batches).__name__}, which can be read only once, but each "
                "product is a pass over the data: pass a list or a DataLoader"
            )
        if isinstance(batches, (Tensor, Mapping)) or _is_pair(batches):
            raise TypeError("batches is a single batch: pass a list of batches, [batch]")
        space = Space.of(params)
        refuse_if_changed = unchanged(space.names, space.tree_leaves(params))

        def count(batch: Any) -> float:
            counted = float(weight(batch))
            if not counted >= 0:
                raise ValueError(f"the weight of a batch is {counted}: at least 0")
            return counted

        def at(batch: Any, place: int) -> Matvec:
            with several_batches() if place else nullcontext():
                return curvature(params, batch)

        if keep:
            kept = [(w, at(batch, i)) for i, batch in enumerate(batches) if (w := count(batch))]
            return lambda block: _mean(space, block, ((w, matvec(block)) for w, matvec in kept))

        first_pass: list[Tensor] = []

        def matvec(block: Tree) -> Tree:
            refuse_if_changed()
            checksum = Checksum(space.device)

            def products() -> Iterator[tuple[float, Tree]]:
                for i, batch in enumerate(batches):
                    checksum.add(batch)
                    # The matvec is not named: its graph is gone before the next one is built.
                    if w := count(batch):
                        yield w, at(batch, i)(block)

            mean = _mean(space, block, products())
            if not first_pass:
                first_pass.append(checksum.total)
            elif not torch.allclose(first_pass[0], checksum.total, rtol=1e-9, atol=0.0):
                raise ValueError(
                    "two passes over the batches saw different examples, so the products belong "
                    "to different matrices: turn off random augmentation, and `shuffle` where "
                    "`drop_last` is set; or read the batches once, list(loader)"
                )
            return mean

        return matvec

    return of_data


def _is_pair(batches: Any) -> bool:
    is_pair = isinstance(batches, tuple) and len(batches) == 2
    return is_pair and isinstance(batches[1], Tensor)


def _mean(space: Space, block: Tree, products: Iterable[tuple[float, Tree]]) -> Tree:
    total = [
        torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))
        for leaf in space.block_leaves(block)
    ]
    weights = 0.0
    for weight, product in products:
        weights += weight
        for target, out in zip(total, leaves(product), strict=True):
            target.add_(out, alpha=weight)
    if not weights > 0:
        raise ValueError(
            "the weights of the batches sum to zero: is the loader empty, or does `weight` count "
            "nothing?"
        )
    return space.tree(target.div_(weights) for target in total)
