"""The batches of each epoch, and the groups of them that make one step."""

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
    """The batches of one epoch after another, without end.

    Those of `Examples` are cut from an order that is a function of the seed and the epoch, the
    last one smaller where there is a rest; a loader is read as it is.
    """
    if isinstance(source, Examples):
        return _shuffled(source, batch_size, seed)
    return repeat(source)


def _shuffled(examples: Examples, batch_size: int, seed: int) -> Iterator[Iterable[Batch]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator)
        yield _Taken(examples, order.split(batch_size))


class _Taken:
    """Batches that are taken out of the examples one by one."""

    def __init__(self, examples: Examples, indices: Sequence[torch.Tensor]) -> None:
        self.examples, self.indices = examples, indices

    def __iter__(self) -> Iterator[Batch]:
        for index in self.indices:
            yield self.examples.inputs[index], self.examples.targets[index]


def refuse_iterators(*sources: Source | None) -> None:
    """Each epoch and each record is one more pass.

    Raises:
        ValueError: a source can be read only once.
    """
    for source in sources:
        if isinstance(source, Iterator):
            raise ValueError(
                f"the batches can be read only once ({type(source).__name__}), and each "
                "epoch reads them anew: pass a list or a DataLoader"
            )


def grouped(batches: Iterator[Batch], size: int, /) -> Iterator[tuple[list[Batch], bool]]:
    """So many batches at a time, the last time maybe fewer, and whether it is the last time."""
    ahead = next(batches, None)
    while ahead is not None:
        group = [ahead, *islice(batches, size - 1)]
        ahead = next(batches, None)
        yield group, ahead is None
