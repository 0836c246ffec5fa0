"""The share of one rank of a mesh in the mean over batches, and how the shares become the mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hessfunc.distributed.ranks import Ranks, by_rank
from hessfunc.precision import wide_dtype
from hessfunc.transforms.share import Loader, Share, Sum
from hessfunc.trees import Matvec, Space, Tree, leaves

__all__ = ["MeshShare"]

_AXES = ("data", "probe")
# Sums of the same examples on unlike processors differ by their rounding.
_ALIKE = 1e-9
# Ranks that each run the same algorithm may drift apart by rounding, and by no more.
_DRIFT = 1e-3
# Entries of each leaf of a vector that are compared.
_COMPARED = 256
# The largest weight that float32 adds exactly is 2^24: it goes in two parts.
_PART = 2.0**20


@dataclass(frozen=True)
class MeshShare(Share):
    """What one rank of a mesh does.

    Attributes:
        everyone: all ranks of the mesh.
        data: those that divide the batches.
        probe: those that divide the block; the ranks of one block have the same data.
        loader: who divides the batches.
        examples: of the whole data set, where each rank takes a part of it by its sampler.
        device: of the products.
    """

    everyone: Ranks
    data: Ranks | None
    probe: Ranks | None
    loader: Loader
    examples: int | None
    device: torch.device

    @classmethod
    def of(
        cls, mesh: DeviceMesh, loader: Loader, params: Tree, batches: Iterable[Any], /
    ) -> MeshShare:
        """Of this rank.

        Raises:
            ValueError: the mesh has other axes; ranks differ in their parameters; the sampler of
                the loader counts examples twice.
        """
        names = mesh.mesh_dim_names or ()
        if not names or not set(names) <= set(_AXES):
            raise ValueError(
                f"the mesh has the axes {names or None}: name them 'data', 'probe' or both, as in "
                'init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "probe"))'
            )
        space = Space.of(params)
        everyone = Ranks.of(mesh)
        data, probe = (Ranks.of(mesh, name) if name in names else None for name in _AXES)
        everyone.agree(space.fingerprint(), space.device)
        if loader == "sharded":
            _refuse_padding(batches)
        share = cls(everyone, data, probe, loader, _examples_of(batches), space.device)
        table = everyone.told(_sampled([leaf[None] for leaf in leaves(params)]), space.device)
        _refuse_unlike(table, "the parameters: give every rank the same ones")
        return share

    @property
    def _place(self) -> tuple[int, int]:
        """Which of the parts of the data, and of how many."""
        return (0, 1) if self.data is None else (self.data.rank, self.data.size)

    def place(self, i: int, /) -> int | None:
        part, parts = self._place
        if self.loader == "sharded":
            return i * parts + part
        return i if i % parts == part else None

    def all_well(self, act: Callable[[], None], /) -> None:
        self.everyone.all_do(act, self.device)

    def over(self, space: Space, local: Callable[[Tree], Sum], /) -> Matvec:
        def matvec(block: Tree) -> Tree:
            given = space.block_leaves(block)
            parts = [range(len(given[0]))]
            if self.probe is not None:
                parts = self.probe.parts(len(given[0]))
            mine = parts[self.probe.rank if self.probe is not None else 0]
            found: list[Sum] = []

            def multiply() -> None:
                if len(mine):
                    own = space.tree(leaf[mine.start : mine.stop] for leaf in given)
                    found.append(local(own))

            failure = _failure_of(multiply)
            total = found[0] if found else _nothing(space)
            self._refuse_differences(given, total, failure)
            total = self._over_data(total)
            if self.probe is not None:
                total = self._over_probes(total, [len(part) for part in parts])
            return total.mean(space)

        return matvec

    def _refuse_differences(
        self, given: Sequence[Tensor], total: Sum, failure: Exception | None
    ) -> None:
        """Raise on every rank what went wrong on one, or what is not alike."""
        part, _ = self._place
        numbers = [len(given[0]), part, *_sampled(given), *total.checksum.tolist()]
        table = self.everyone.told(numbers, self.device, failure)
        counts = [row[0] for row in table]
        if len(set(counts)) > 1:
            raise ValueError(
                f"the ranks ask for different products: of the vectors, {by_rank(counts)}. Call "
                "the same algorithm with the same options on each"
            )
        _refuse_unlike(
            [row[2:4] for row in table],
            "the block: call the same algorithm on each, with the same start and `seed=`",
        )
        # Ranks without a vector have read nothing.
        read = [(int(row[1]), row[4:]) for row in table if not math.isnan(row[4])]
        if self.loader == "whole":
            if any(not _alike(sums, read[0][1]) for _, sums in read):
                raise ValueError(
                    "the ranks read different batches, and each takes a part of what it reads: "
                    "give every rank the same loader, with the same order; or say "
                    "loader='sharded' if each loader yields a part already"
                )
            return
        self._refuse_repeated(dict(read), read)

    def _refuse_repeated(
        self, parts: dict[int, list[float]], read: list[tuple[int, list[float]]]
    ) -> None:
        if any(not _alike(sums, parts[part]) for part, sums in read):
            raise ValueError(
                "ranks that differ on the axis 'probe' alone read different batches: shard the "
                "loader over the axis 'data'"
            )
        found = list(parts.values())
        if len(found) > 1 and all(_alike(sums, found[0]) for sums in found):
            raise ValueError(
                "every rank reads the same examples, so nothing is sharded: say loader='whole'"
            )
        counted = round(sum(sums[0] for sums in found))
        if self.examples is not None and counted > self.examples:
            raise ValueError(
                f"the ranks read {counted} examples of {self.examples}, so some count twice: a "
                f"sampler pads the parts. {_REMEDY}"
            )

    def _over_data(self, total: Sum) -> Sum:
        if self.data is None:
            return total
        high, low = divmod(total.weight, _PART)
        total.flat[-2:] = total.flat.new_tensor([high, low])
        high, low = self.data.sum(total.flat)[-2:].tolist()
        return replace(total, weight=high * _PART + low)

    def _over_probes(self, total: Sum, lengths: Sequence[int]) -> Sum:
        assert self.probe is not None
        rows = torch.cat(self.probe.gathered(total.rows, lengths))
        # A rank without a vector has added up no weights.
        weights = self.probe.told([total.weight], self.device)
        return replace(total, rows=rows, weight=max(row[0] for row in weights))


_REMEDY = (
    "Pass the same DataLoader on every rank and say loader='whole'; or give each rank a "
    "torch.utils.data.Subset of its own indices, range(rank, n, ranks)"
)


def _refuse_padding(batches: Iterable[Any]) -> None:
    from torch.utils.data import DistributedSampler

    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, DistributedSampler) and not sampler.drop_last:
        examples = len(sampler.dataset)  # type: ignore[arg-type]
        if examples % sampler.num_replicas:
            raise ValueError(
                f"the DistributedSampler pads {examples} examples to {sampler.total_size}, so some "
                f"count twice. {_REMEDY}"
            )


def _examples_of(batches: Iterable[Any]) -> int | None:
    """The length of the data set, where a sampler of its own gives each rank a part of it."""
    from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

    plain = (SequentialSampler, RandomSampler)
    by_one = type(getattr(batches, "sampler", None)) in plain
    in_batches = type(getattr(batches, "batch_sampler", None)) in (BatchSampler, type(None))
    if by_one and in_batches:
        return None
    try:
        return len(batches.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        return None


def _failure_of(act: Callable[[], None]) -> Exception | None:
    try:
        act()
    except Exception as failure:
        return failure
    return None


def _nothing(space: Space) -> Sum:
    unread = torch.full((3,), math.nan, dtype=wide_dtype(space.device), device=space.device)
    return Sum.zero(space, 0, unread)


def _sampled(block: Sequence[Tensor]) -> list[float]:
    """A number of some entries of a block that another block would not have, and their size."""
    wide = wide_dtype(block[0].device)
    shards = [leaf.to_local() if isinstance(leaf, DTensor) else leaf for leaf in block]
    parts = [leaf.detach().flatten(1)[:, :_COMPARED].flatten().to(wide) for leaf in shards]
    entries = torch.cat(parts)
    place = torch.arange(1, len(entries) + 1, dtype=wide, device=entries.device)
    number = (entries * torch.cos(1.618 * place)).sum()
    # One copy to the host.
    return torch.stack([number, torch.linalg.vector_norm(entries)]).tolist()


def _refuse_unlike(table: Sequence[Sequence[float]], what: str) -> None:
    (first, size), *others = table
    if any(not abs(number - first) <= _DRIFT * size for number, _ in others):
        raise ValueError(f"the ranks do not have the same in {what}")


def _alike(sums: Sequence[float], others: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=_ALIKE) for a, b in zip(sums, others, strict=True))
