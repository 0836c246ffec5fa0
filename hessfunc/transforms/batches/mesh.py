"""Part of one rank of a mesh in the mean over batches, and the reduction of the parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hessfunc.numerics import wide_dtype
from hessfunc.options.outline import outline
from hessfunc.randomness import mixed
from hessfunc.ranks import Ranks, attempted, by_rank
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches import shards
from hessfunc.transforms.batches.reductions import Average
from hessfunc.transforms.batches.sums import Data, Partition, Passed, Read, Sum
from hessfunc.transforms.criteria import Reduction
from hessfunc.trees import Matvec, Tree, leaves

Made = TypeVar("Made")

_AXES = ("data", "probe")
# Relative tolerance of blocks: rounding differs between ranks that run the same algorithm.
_DRIFT = 1e-3
# Number of entries of each leaf of a vector that are compared.
_COMPARED = 256
# Number of entries whose bits are hashed at once.
_PIECE = 2**20
# float32 adds integers exactly only up to 2^24, so a weight is sent as two numbers.
_PART = 2.0**20


@dataclass(frozen=True)
class MeshPartition(Partition):
    """Part of the work that one rank of a mesh does.

    Attributes:
        everyone: All ranks of the mesh.
        data: Ranks that divide the batches; None without the axis "data".
        probe: Ranks that divide the block and have the same data; None without the axis "probe".
        placement: Distribution of the batches, as in `over_batches`.
        device: Device of the products.
    """

    everyone: Ranks
    data: Ranks | None
    probe: Ranks | None
    placement: Data
    device: torch.device

    @classmethod
    def of(cls, mesh: DeviceMesh, placement: Data, /) -> MeshPartition:
        """Return the part of this rank.

        Raises:
            ValueError: If the mesh has axes other than "data" and "probe".
        """
        everyone = Ranks.of(mesh)
        names = mesh.mesh_dim_names or ()
        if not names or not set(names) <= set(_AXES):
            raise ValueError(
                f"the mesh has the axes {names or None}: name them 'data', 'probe' or both, as in "
                'init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "probe")). If the mesh '
                'has further axes, pass a submesh, mesh["data"]'
            )
        data, probe = (Ranks.of(mesh, name) if name in names else None for name in _AXES)
        return cls(everyone, data, probe, placement, torch.device(mesh.device_type))

    @property
    def _place(self) -> tuple[int, int]:
        """Index of this rank's part of the data, and the number of parts."""
        return (0, 1) if self.data is None else (self.data.rank, self.data.size)

    @property
    def writes(self) -> bool:
        return self.probe is None or self.probe.rank == 0

    def place(self, i: int, /) -> int | None:
        part, parts = self._place
        if self.placement == "sharded":
            return i * parts + part
        return i if i % parts == part else None

    def all_well(self, act: Callable[[], Made], /) -> Made:
        return self.everyone.all_do(act, self.device)

    def refuse_unlike(
        self, space: Space, params: Tree, batches: Iterable[Any], options: Mapping[str, object], /
    ) -> None:
        self.everyone.alike({name: outline(value) for name, value in options.items()})
        self.everyone.agree(space.fingerprint(), self.device)
        bits = [_bits(leaf) for leaf in leaves(params)]
        for name, values in zip(
            space.names, zip(*self.everyone.told(bits, self.device), strict=True), strict=True
        ):
            if len(set(values)) > 1:
                raise ValueError(
                    f"parameter {name!r} is not the same on all ranks: load the same weights on "
                    "each rank, or call torch.distributed.broadcast(parameter, src=0)"
                )
        if self.placement == "sharded":
            drawn = self.all_well(lambda: shards.refuse_sampler(batches, self._place[1]))
            self.everyone.agree(drawn, self.device)

    def over(self, space: Space, batches: Iterable[Any], local: Callable[[Tree], Sum], /) -> Matvec:
        examples = shards.examples_of(batches) if self.placement == "sharded" else None
        compared = False

        def matvec(block: Tree) -> Tree:
            nonlocal compared
            (*made,), failure = attempted(lambda: self._made(space, block, local))
            numbers = made[0].numbers if made else [0.0] * _NUMBERS
            table = self.everyone.told([self._place[0], *numbers], self.device, failure)
            self._refuse_differences(table, examples)
            if not compared:
                self._refuse_other_tensors(made[0].total.read.fixed)
                compared = True
            _agree_on_reduction(made[0].total.average, [row[-1] for row in table])
            total = self._over_data(made[0].total)
            if self.probe is not None:
                rows = self.probe.joined(total.rows, [len(part) for part in made[0].parts])
                total = replace(total, rows=rows)
            return total.mean(space)

        # Algorithms compare their options among these ranks before the first product.
        vars(matvec)["ranks"] = self.everyone, self.device
        return matvec

    def summed(self, batches: Iterable[Any], local: Callable[[], Passed], /) -> Tensor:
        examples = shards.examples_of(batches) if self.placement == "sharded" else None
        (*made,), failure = attempted(local)
        numbers = [0.0] * _NUMBERS
        if made:
            numbers = _numbers(len(made[0].flat), (0.0, 0.0), made[0].read, made[0].average)
        table = self.everyone.told([self._place[0], *numbers], self.device, failure)
        if len({row[1] for row in table}) > 1:
            raise ValueError(
                "the ranks have different numbers of statistics, "
                f"{by_rank([row[1] for row in table])}: give each rank at least one batch, and the "
                "same model"
            )
        self._refuse_differences(table, examples)
        self._refuse_other_tensors(made[0].read.fixed)
        _agree_on_reduction(made[0].average, [row[-1] for row in table])
        return made[0].flat if self.data is None else self.data.sum(made[0].flat)

    def each(
        self, function: Callable[[Tensor], Tensor], matrices: Sequence[Tensor], /
    ) -> list[Tensor]:
        if not matrices:
            return []
        # The largest matrix left goes to the rank with the least operations, n^3 for each.
        loads, owner = [0] * self.everyone.size, [0] * len(matrices)
        for i in sorted(range(len(matrices)), key=lambda i: -matrices[i].numel()):
            owner[i] = min(range(len(loads)), key=loads.__getitem__)
            loads[owner[i]] += matrices[i].numel() * matrices[i].shape[-1]

        def mine() -> Tensor:
            parts = (
                function(matrix) if rank == self.everyone.rank else torch.zeros_like(matrix)
                for matrix, rank in zip(matrices, owner, strict=True)
            )
            return torch.cat([part.flatten() for part in parts])

        whole = self.everyone.sum(self.all_well(mine))
        pieces = whole.split([matrix.numel() for matrix in matrices])
        return [piece.view_as(m) for piece, m in zip(pieces, matrices, strict=True)]

    def gathered(self, own: Made, /) -> list[Made]:
        return [own] if self.data is None else self.data.objects(own)

    def _made(self, space: Space, block: Tree, local: Callable[[Tree], Sum]) -> _Made:
        given = space.block_leaves(block)
        parts, mine = [range(len(given[0]))], 0
        if self.probe is not None:
            parts, mine = self.probe.parts(len(given[0])), self.probe.rank
        rows = slice(parts[mine].start, parts[mine].stop)
        return _Made(given, parts, local(space.tree(leaf[rows] for leaf in given)))

    def _refuse_differences(self, table: list[list[float]], examples: int | None) -> None:
        """Raise on every rank if ranks differ in their block or their data."""
        if len({row[1] for row in table}) > 1:
            raise ValueError(
                "the ranks request products with different numbers of vectors: "
                f"{by_rank([row[1] for row in table])}. {_SAME}"
            )
        _, _, first, size, *_ = table[0]
        if any(abs(row[2] - first) > _DRIFT * size for row in table):
            raise ValueError(f"the ranks do not have the same block. {_SAME}")
        read = [shards.ReadPart(int(row[0]), tuple(row[4:7]), tuple(row[7:10])) for row in table]
        if self.placement == "replicated":
            shards.refuse_other_order(read)
        else:
            shards.refuse_repeated(read, examples)

    def _refuse_other_tensors(self, fixed: Mapping[str, Tensor]) -> None:
        """Raise on every rank if frozen parameters or buffers differ; a name may be unknown."""
        table = self.everyone.objects({name: _bits(leaf) for name, leaf in fixed.items()})
        for name in dict.fromkeys(name for row in table for name in row):
            if len({row[name] for row in table if name in row}) > 1:
                raise ValueError(
                    f"{name!r}, a buffer or a frozen parameter, is not the same on all ranks: load "
                    "the same state on each rank, or call torch.distributed.broadcast(x, src=0)"
                )

    def _over_data(self, total: Sum) -> Sum:
        if self.data is None:
            return total
        high, low = divmod(total.weight, _PART)
        total.flat[-2:] = total.flat.new_tensor([high, low])
        high, low = self.data.sum(total.flat)[-2:].tolist()
        return replace(total, weight=high * _PART + low)


@dataclass(frozen=True)
class _Made:
    """Part of a product that one rank computes.

    Attributes:
        given: Leaves of the whole block.
        parts: Rows of the block that each rank multiplies.
        total: Sum over this rank's batches of the products with its rows.
    """

    given: Sequence[Tensor]
    parts: Sequence[range]
    total: Sum

    @property
    def numbers(self) -> list[float]:
        """Numbers that ranks compare: size, sample and norm of the block, checksums, reduction."""
        return _numbers(
            len(self.given[0]), _sampled(self.given), self.total.read, self.total.average
        )


def _numbers(size: int, sampled: Sequence[float], read: Read, average: Average) -> list[float]:
    sums = torch.cat([read.all.total, read.own]).tolist()
    return [size, *sampled, *sums, _REDUCTIONS.index(average.reduction)]


_REDUCTIONS: tuple[Reduction | None, ...] = (None, "mean", "sum")
# Length of `_Made.numbers`.
_NUMBERS = 10
_SAME = (
    "Call the same algorithm with the same options, start and `seed=` on each rank. With "
    "`space=sharded(params, mesh)`, the ranks check sizes and seeds themselves"
)


def _agree_on_reduction(average: Average, told: Sequence[float]) -> None:
    """Adopt the reduction that other ranks know; a batch of one example does not reveal it."""
    known = {int(number) for number in told} - {0}
    if len(known) > 1:
        raise ValueError(
            "the loss is a mean over examples on some ranks and a sum on others: pass the same "
            "reduction to the criterion on all ranks, for instance reduction='mean'"
        )
    for number in known:
        average.reduction = _REDUCTIONS[number]


def _sampled(block: Sequence[Tensor]) -> list[float]:
    """Return a projection of some entries of a block, which identifies it, and their norm."""
    wide = wide_dtype(block[0].device)
    flat = [_local(leaf)[..., None].flatten(1) for leaf in block]
    parts = [leaf[:, :_COMPARED].flatten() for leaf in flat]
    entries = torch.cat([part.to(wide) for part in parts])
    place = torch.arange(1, len(entries) + 1, dtype=wide, device=entries.device)
    number = (entries * torch.cos(1.618 * place)).sum()
    # Stacked, both numbers take a single copy to the host.
    return torch.stack([number, torch.linalg.vector_norm(entries)]).tolist()


def _bits(leaf: Tensor) -> int:
    """Return a 24-bit hash of a leaf. A changed leaf keeps its hash with probability 2^-24."""
    leaf = _local(leaf)
    leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[leaf.itemsize]
    total = torch.zeros((), dtype=torch.int64, device=leaf.device)
    for i, part in enumerate(leaf.contiguous().flatten().view(whole).split(_PIECE)):
        place = torch.arange(i * _PIECE, i * _PIECE + len(part), device=leaf.device)
        total += (part.long() * (2 * place + 1)).sum()
    return mixed(int(total)) >> 40


def _local(leaf: Tensor) -> Tensor:
    """Return the part of a leaf that this rank holds."""
    return (leaf.to_local() if isinstance(leaf, DTensor) else leaf).detach()
