"""Batches of each epoch, and the groups of batches that make one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, repeat
from typing import TypeAlias

import torch

from hessfunc.training.examples import Examples
from hessfunc.training.steps import Batch

# Examples in tensors, or a re-iterable of batches, such as a DataLoader.
Source: TypeAlias = Examples | Iterable[Batch]


def epochs_of(source: Source, /, *, batch_size: int, seed: int) -> Iterator[Iterable[Batch]]:
    """Yield the batches of each epoch, without end.

    `Examples` are split in an order that is a function of the seed and the epoch; the last batch
    may be smaller. A loader is iterated in its own order.
    """
    if isinstance(source, Examples):
        return _shuffled(source, batch_size, seed)
    return repeat(source)


def _shuffled(examples: Examples, batch_size: int, seed: int) -> Iterator[Iterable[Batch]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator, device="cpu")
        yield _Taken(examples, order.split(batch_size))


class _Taken:
    """Batches of given indices, which are gathered from the examples one by one."""

    def __init__(self, examples: Examples, indices: Sequence[torch.Tensor]) -> None:
        self.examples, self.indices = examples, indices

    def __iter__(self) -> Iterator[Batch]:
        for index in self.indices:
            yield self.examples.inputs[index], self.examples.targets[index]


def refuse_iterators(*sources: Source | None) -> None:
    """Raise for a source that can be read only once, because each epoch and record is one pass.

    Raises:
        ValueError: If a source is an iterator.
    """
    for source in sources:
        if isinstance(source, Iterator):
            raise ValueError(
                f"the batches can be read only once ({type(source).__name__}), but each epoch "
                "reads them again: pass a list or a DataLoader"
            )


def grouped(batches: Iterator[Batch], size: int, /) -> Iterator[tuple[list[Batch], bool]]:
    """Yield groups of ``size`` batches, and whether a group is the last, which may be smaller."""
    ahead = next(batches, None)
    while ahead is not None:
        group = [ahead, *islice(batches, size - 1)]
        ahead = next(batches, None)
        yield group, ahead is None
