"""Whether the parts of the data that ranks read make up the whole, each example once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler
from torch.utils.data.dataloader import _InfiniteConstantSampler

from hessfunc.ranks import ALIKE

_REMEDY = (
    "Pass the same DataLoader on every rank and say data='replicated'; or give each rank a "
    "torch.utils.data.Subset of its own indices, range(rank, n, ranks)"
)


@dataclass(frozen=True)
class Part:
    """What a rank has read.

    Attributes:
        place: of its part among those of the data.
        all: the checksum of what it has read; the first number counts the examples.
        own: that of the batches that it has multiplied.
    """

    place: int
    all: tuple[float, ...]
    own: tuple[float, ...]


def refuse_other_order(parts: Sequence[Part], /) -> None:
    """Raise unless all ranks have read the same, and their own batches make up the whole.

    Raises:
        ValueError: it is so.
    """
    together = [sum(x) for x in zip(*_by_place(parts, "own").values(), strict=True)]
    if any(not _alike(part.all, parts[0].all) for part in parts) or not _alike(
        together, parts[0].all
    ):
        raise ValueError(
            "the ranks read different batches, or the same in another order, and each takes a "
            "part of what it reads: give every rank the same loader without `shuffle`, or the "
            "same list; or say data='sharded' if each loader yields a part already"
        )


def refuse_repeated(parts: Sequence[Part], examples: int | None, /) -> None:
    """Raise where examples count twice, as far as that can be seen.

    Raises:
        ValueError: two ranks have read the same part; all parts together have more examples than
            the data set, or ranks of one part have read different ones.
    """
    by_place = _by_place(parts, "all")
    if any(not _alike(part.all, by_place[part.place]) for part in parts):
        raise ValueError(
            "ranks that differ on the axis 'probe' alone read different batches: shard the loader "
            "over the axis 'data'"
        )
    found = [sums for sums in by_place.values() if sums[0]]
    for i, sums in enumerate(found):
        if any(_alike(sums, other) for other in found[:i]):
            raise ValueError(
                "two ranks read the same examples, which would count twice: pass "
                "data='replicated' if every rank has the whole loader, or give each its own part"
            )
    counted = round(sum(sums[0] for sums in found))
    if examples is not None and counted > examples:
        raise ValueError(
            f"the ranks read {counted} examples of {examples}, so some count twice: a sampler "
            f"pads the parts. {_REMEDY}"
        )


def refuse_sampler(batches: Iterable[Any], parts: int, /) -> dict[str, float]:
    """Raise for a sampler that does not give each of the parts its own examples once.

    Returns:
        What must be the same on all ranks for its parts to be apart.

    Raises:
        ValueError: it pads, or divides the data in another number of parts; or its data set has
            no length, so that padding would not be seen.
    """
    examples_of(batches)
    sampler = next((x for x in _samplers(batches) if isinstance(x, DistributedSampler)), None)
    if sampler is None:
        return {"the sampler's seed and epoch": -1}
    examples = len(sampler.dataset)  # type: ignore[arg-type]
    if sampler.num_replicas != parts:
        raise ValueError(
            f"the DistributedSampler divides the data in {sampler.num_replicas} parts, and the "
            f"mesh has {parts} on the axis 'data'"
        )
    if not sampler.drop_last and examples % parts:
        raise ValueError(
            f"the DistributedSampler pads {examples} examples to {sampler.total_size}, so some "
            f"count twice. {_REMEDY}"
        )
    return {"the sampler's seed and epoch": sampler.seed + sampler.epoch}


def examples_of(batches: Iterable[Any], /) -> int | None:
    """Return the length of the data set, where a sampler gives each rank a part of it.

    Raises:
        ValueError: There is such a sampler, and its data set has no length.
    """
    plain = (SequentialSampler, RandomSampler, BatchSampler, _InfiniteConstantSampler)
    custom = next((x for x in _samplers(batches) if type(x) not in plain), None)
    if custom is None:
        return None
    dataset = getattr(_innermost(batches), "dataset", None)
    if not isinstance(dataset, Sized):
        raise ValueError(
            f"the sampler {type(custom).__name__} may pad the parts of the ranks, and the data set "
            "has no length that would show it: give the data set a `__len__`. " + _REMEDY
        )
    return len(dataset)


def _samplers(batches: Any) -> Iterator[Any]:
    """Those of a loader, the one inside of a batch sampler included."""
    loader = _innermost(batches)
    for name in ("sampler", "batch_sampler"):
        sampler = getattr(loader, name, None)
        while sampler is not None:
            yield sampler
            sampler = getattr(sampler, "sampler", None)


def _innermost(batches: Any) -> Any:
    """The loader inside of what moves its batches elsewhere."""
    while (inner := getattr(batches, "loader", None)) is not None:
        batches = inner
    return batches


def _by_place(parts: Sequence[Part], which: str) -> dict[int, tuple[float, ...]]:
    return {part.place: getattr(part, which) for part in parts}


def _alike(sums: Sequence[float], others: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=ALIKE) for a, b in zip(sums, others, strict=True))
