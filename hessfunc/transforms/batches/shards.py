"""Checks that the parts of the data that ranks read contain each example once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler
from torch.utils.data.dataloader import _InfiniteConstantSampler

from hessfunc.ranks import ALIKE

_REMEDY = (
    "Pass the same DataLoader on every rank and data='replicated', or give each rank its own part, "
    "torch.utils.data.Subset(dataset, range(rank, n, ranks))"
)


@dataclass(frozen=True)
class ReadPart:
    """Part of the data that a rank has read.

    Attributes:
        place: Index of the part.
        all: Checksum of all batches that the rank has read. Its first number counts examples.
        own: Checksum of the batches that the rank has multiplied.
    """

    place: int
    all: tuple[float, ...]
    own: tuple[float, ...]


def refuse_other_order(parts: Sequence[ReadPart], /) -> None:
    """Raise unless all ranks have read the same batches and multiplied each of them once.

    Raises:
        ValueError: If ranks have read different batches, or batches in another order.
    """
    together = [sum(x) for x in zip(*_by_place(parts, "own").values(), strict=True)]
    if any(not _alike(part.all, parts[0].all) for part in parts) or not _alike(
        together, parts[0].all
    ):
        raise ValueError(
            "the ranks read different batches, or the same in another order, so some batches count "
            "twice and others not at all: pass every rank the same list, or the same loader "
            "without `shuffle`; or pass data='sharded' if each loader yields its own part"
        )


def refuse_repeated(parts: Sequence[ReadPart], examples: int | None, /) -> None:
    """Raise if examples count twice, as far as checksums show it.

    Args:
        parts: Part of each rank.
        examples: Number of examples in the data set, if known.

    Raises:
        ValueError: If two ranks have read the same part, if all parts together have more examples
            than the data set, or if ranks that share a part have read different examples.
    """
    by_place = _by_place(parts, "all")
    if any(not _alike(part.all, by_place[part.place]) for part in parts):
        raise ValueError(
            "ranks that differ only on the axis 'probe' read different batches: shard the loader "
            "over the axis 'data' only, for instance by mesh.get_local_rank('data')"
        )
    filled = [sums for sums in by_place.values() if sums[0]]
    for i, sums in enumerate(filled):
        if any(_alike(sums, other) for other in filled[:i]):
            raise ValueError(
                "two ranks read the same examples, which would count twice: pass "
                "data='replicated' if every rank has the whole loader, or give each its own part"
            )
    counted = round(sum(sums[0] for sums in filled))
    if examples is not None and counted > examples:
        raise ValueError(
            f"the ranks read {counted} examples of {examples}, so some count twice, probably "
            f"because a sampler pads the parts. {_REMEDY}"
        )


def refuse_sampler(batches: Iterable[Any], parts: int, /) -> dict[str, float]:
    """Raise if a sampler does not divide the examples among the parts, each example once.

    Returns:
        Numbers by name that must be the same on all ranks, so that the parts are disjoint.

    Raises:
        ValueError: If the sampler pads, or divides the data into another number of parts, or if
            the data set has no length, so that padding would go unnoticed.
    """
    examples_of(batches)
    sampler = next((x for x in _samplers(batches) if isinstance(x, DistributedSampler)), None)
    if sampler is None:
        return {"the sampler's seed and epoch": -1}
    examples = len(sampler.dataset)  # type: ignore[arg-type]
    if sampler.num_replicas != parts:
        raise ValueError(
            f"the DistributedSampler divides the data into {sampler.num_replicas} parts, but the "
            f"mesh has {parts} ranks on the axis 'data': pass num_replicas={parts}"
        )
    if not sampler.drop_last and examples % parts:
        raise ValueError(
            f"the DistributedSampler pads {examples} examples to {sampler.total_size}, so some "
            f"count twice. {_REMEDY}"
        )
    return {"the sampler's seed and epoch": sampler.seed + sampler.epoch}


def examples_of(batches: Iterable[Any], /) -> int | None:
    """Return the length of the data set if a custom sampler divides it among ranks, else None.

    Raises:
        ValueError: If the loader has such a sampler and its data set has no length.
    """
    plain = (SequentialSampler, RandomSampler, BatchSampler, _InfiniteConstantSampler)
    custom = next((x for x in _samplers(batches) if type(x) not in plain), None)
    if custom is None:
        return None
    dataset = getattr(_innermost(batches), "dataset", None)
    if not isinstance(dataset, Sized):
        raise ValueError(
            f"the sampler {type(custom).__name__} may pad the parts of the ranks, and without a "
            "length of the data set this would go unnoticed: give the data set a `__len__`. "
            + _REMEDY
        )
    return len(dataset)


def _samplers(batches: Any) -> Iterator[Any]:
    """Yield the samplers of a loader, including those inside a batch sampler."""
    loader = _innermost(batches)
    for name in ("sampler", "batch_sampler"):
        sampler = getattr(loader, name, None)
        while sampler is not None:
            yield sampler
            sampler = getattr(sampler, "sampler", None)


def _innermost(batches: Any) -> Any:
    """Return the loader inside wrappers that, for instance, move batches to a device."""
    while (inner := getattr(batches, "loader", None)) is not None:
        batches = inner
    return batches


def _by_place(parts: Sequence[ReadPart], which: str) -> dict[int, tuple[float, ...]]:
    return {part.place: getattr(part, which) for part in parts}


def _alike(sums: Sequence[float], others: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=ALIKE) for a, b in zip(sums, others, strict=True))
