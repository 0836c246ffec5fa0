"""The vector space of a tree of DTensors, with rows that are cut as the leaves are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, _redistribute

from hessfunc.ranks import Ranks
from hessfunc.spaces.divided import DividedSpace
from hessfunc.spaces.space import Draw, Space
from hessfunc.trees import Tree, whole


@dataclass(frozen=True)
class Layout:
    """How a leaf lies on a mesh.

    Attributes:
        shape: of the whole leaf.
        mesh: None for a plain tensor, of which every rank has the same.
        placements: on the axes of the mesh.
        begin: where the shard of this rank begins, on each axis of the leaf.
        extent: the shape of this shard.
        runs: the entries of the flat shard, divided among the ranks that have the same shard.
        run: those of this rank.
        widest: the most entries that any rank may hold.
    """

    shape: torch.Size
    mesh: DeviceMesh | None
    placements: tuple[Placement, ...]
    begin: tuple[int, ...]
    extent: tuple[int, ...]
    runs: list[range]
    run: range
    widest: int

    def local(self, leaf: Tensor, /) -> Tensor:
        """The shard of a block of leaves."""
        if self.mesh is None:
            return whole(leaf)
        if not isinstance(leaf, DTensor):
            raise ValueError(
                "a leaf of the vector is a plain tensor where one on the mesh is due: take "
                "torch.distributed.tensor.distribute_tensor"
            )
        return leaf.redistribute(self.mesh, self._placements(1)).to_local()

    def tensor(self, local: Tensor, axes: int, /) -> Tensor:
        """The leaf, or block with one leading axis, of which this is the shard."""
        if self.mesh is None:
            return local
        shape = torch.Size((*local.shape[:axes], *self.shape))
        return DTensor.from_local(
            local.contiguous(),
            self.mesh,
            self._placements(axes),
            shape=shape,
            stride=_strides(shape),
        )

    def _placements(self, axes: int) -> list[Placement]:
        return [Shard(p.dim + axes) if isinstance(p, Shard) else p for p in self.placements]

    def entries(self, of: Callable[[range], Tensor], /) -> Tensor:
        """What a function of places in the flat leaf is at those of this rank's run."""
        strides = _strides(self.shape)
        first = sum(b * s for b, s in zip(self.begin, strides, strict=True))
        last = first + sum((e - 1) * s for e, s in zip(self.extent, strides, strict=True))
        covered = range(first, last + 1) if 0 not in self.extent else range(0)
        shard = of(covered).as_strided(self.extent, strides)
        return shard.flatten()[self.run.start : self.run.stop]


@dataclass(frozen=True, eq=False)
class DTensorSpace(DividedSpace):
    """Rows of which each rank holds the columns of its own shards.

    Where ranks hold the same shard they divide its columns: each column is in one place.

    Attributes:
        layouts: of the leaves.
        copies: the leaves of which the same ranks hold one shard, with these ranks.
    """

    layouts: tuple[Layout, ...]
    copies: tuple[tuple[Ranks, list[int]], ...]

    @classmethod
    def over(cls, space: Space, found: Sequence[Tensor], /) -> DTensorSpace:
        """The space, given its leaves.

        Raises:
            NotImplementedError: torch is too old.
            ValueError: leaves lie on several meshes, or are placed in another way than Shard and
                Replicate; this process is not of the mesh.
        """
        if not hasattr(_redistribute, "NestedRedistribute"):
            raise NotImplementedError(
                "this version of torch has no second derivative of a change of placement: for "
                "DTensors take torch 2.13 or newer"
            )
        meshes = {leaf.device_mesh for leaf in found if isinstance(leaf, DTensor)}
        if len(meshes) > 1:
            raise ValueError(
                f"leaves lie on several meshes, {', '.join(map(str, meshes))}: take `unsharded`, "
                "or hold those of all but one by `split` and `hold`"
            )
        mesh = meshes.pop()
        ranks = Ranks.apart(mesh)
        layouts: list[Layout] = []
        copies: dict[tuple[int, ...], tuple[Ranks, list[int]]] = {}
        for i, (name, leaf) in enumerate(zip(space.names, found, strict=True)):
            placements = _placements_of(name, leaf, mesh)
            axes = tuple(i for i, p in enumerate(placements) if isinstance(p, Replicate))
            if axes and axes not in copies:
                copies[axes] = (_along(mesh, axes), [])
            same = copies.get(axes)
            if same:
                same[1].append(i)
            layouts.append(_layout(leaf, mesh, placements, same[0] if same else None))
        own = {item.name: getattr(space, item.name) for item in fields(Space)}
        return cls(**own, along=ranks, layouts=tuple(layouts), copies=tuple(copies.values()))

    @property
    def distributed(self) -> bool:
        return True

    @property
    def columns(self) -> range:
        first = self.ranks.rank * self.widest
        return range(first, first + self.width)

    @property
    def cut(self) -> str:
        mesh = next(layout.mesh for layout in self.layouts if layout.mesh is not None)
        placed = [
            f"{name} {' '.join(map(str, layout.placements))}"
            for name, layout in zip(self.names, self.layouts, strict=True)
        ]
        return f"{mesh.mesh.tolist()}: {', '.join(placed)}"

    @cached_property
    def spans(self) -> list[range]:
        return [layout.run for layout in self.layouts]

    @cached_property
    def widest(self) -> int:
        return sum(layout.widest for layout in self.layouts)

    def stacked(self, vectors: Sequence[Sequence[Tensor]], /) -> list[Tensor]:
        return [
            layout.tensor(torch.cat([layout.local(leaf[None]) for leaf in found]), 1)
            for layout, found in zip(self.layouts, zip(*vectors, strict=True), strict=True)
        ]

    def ravel_leaves(
        self, found: Sequence[Tensor], /, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        rows = torch.empty(len(found[0]), self.width, dtype=dtype or self.dtype, device=self.device)
        parts = rows.split([len(run) for run in self.spans], dim=1)
        for part, leaf, layout in zip(parts, found, self.layouts, strict=True):
            shards = layout.local(leaf).reshape(len(leaf), math.prod(layout.extent))
            part.copy_(shards[:, layout.run.start : layout.run.stop])
        return rows

    def unravel(self, rows: Tensor, /) -> Tree:
        if rows.dim() not in (1, 2) or rows.shape[-1] != self.width:
            raise ValueError(
                f"a flat vector of shape {tuple(rows.shape)} where the part of this rank, "
                f"({self.width},) or (k, {self.width}), is due"
            )
        shards = self._shards(torch.atleast_2d(rows))
        return self.tree(
            layout.tensor((shard if rows.dim() == 2 else shard[0]).to(dtype), rows.dim() - 1)
            for layout, shard, dtype in zip(self.layouts, shards, self.dtypes, strict=True)
        )

    def views(self, rows: Tensor, /) -> Tree:
        shards = self._shards(rows)
        return self.tree(
            layout.tensor(shard, 1) for layout, shard in zip(self.layouts, shards, strict=True)
        )

    def accumulate(self, rows: Tensor, block: Tree, /, *, weight: float) -> None:
        rows.add_(self.ravel(block, dtype=rows.dtype), alpha=weight)

    def _shards(self, rows: Tensor) -> list[Tensor]:
        """The shard of each leaf, from the runs of the ranks that hold the same."""
        parts = list(rows.split([len(run) for run in self.spans], dim=1))
        for ranks, same in self.copies:
            lengths = [[len(self.layouts[i].runs[r]) for i in same] for r in range(ranks.size)]
            widths = [sum(of_rank) for of_rank in lengths]
            if not any(widths):
                continue
            mine = torch.cat([parts[i] for i in same], dim=1).mT
            found = ranks.gathered(mine, widths)
            runs = [x.split(of_rank) for x, of_rank in zip(found, lengths, strict=True)]
            for i, pieces in zip(same, zip(*runs, strict=True), strict=True):
                parts[i] = torch.cat(pieces).mT
        return [
            part.reshape(len(rows), *layout.extent)
            for part, layout in zip(parts, self.layouts, strict=True)
        ]

    def draw(
        self, rows: Tensor, of: Draw, keys: Callable[[range], Tensor], scratch: int, /
    ) -> None:
        parts = rows.split([len(run) for run in self.spans], dim=1)
        for i, (part, layout) in enumerate(zip(parts, self.layouts, strict=True)):
            found = keys(range(i, i + 1))
            for row, key in zip(part, found, strict=True):
                row.copy_(layout.entries(partial(_drawn, of, key[None], self.device)))

    def units(self, dtype: torch.dtype, /) -> Tensor:
        def numbers(places: range) -> Tensor:
            return torch.arange(places.start, places.stop, device=self.device)

        begins = list(accumulate(self.sizes, initial=0))[:-1]
        places = [
            begin + layout.entries(numbers)
            for begin, layout in zip(begins, self.layouts, strict=True)
        ]
        rows = self.zeros(self.n, dtype)
        rows[torch.cat(places), range(self.width)] = 1
        return rows


def _drawn(of: Draw, key: Tensor, device: torch.device, places: range) -> Tensor:
    return of(key, [places], device)[0]


def _placements_of(name: str, leaf: Tensor, mesh: DeviceMesh) -> tuple[Placement, ...]:
    if not isinstance(leaf, DTensor):
        return (Replicate(),) * mesh.ndim
    for placement in leaf.placements:
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"leaf {name!r} is placed by {placement}, where Shard or Replicate is due: "
                "redistribute it, or take `unsharded`"
            )
    return leaf.placements


def _along(mesh: DeviceMesh, axes: tuple[int, ...]) -> Ranks:
    """The ranks that differ on these axes alone."""
    if len(axes) == mesh.ndim:
        return Ranks.of(mesh)
    if mesh.mesh_dim_names is None:
        raise ValueError(
            f"the axes of the mesh {mesh} have no names: pass `mesh_dim_names` to init_device_mesh"
        )
    return Ranks.of(mesh[tuple(mesh.mesh_dim_names[axis] for axis in axes)])


def _layout(
    leaf: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...], copies: Ranks | None
) -> Layout:
    begin, extent, most = [0] * leaf.dim(), list(leaf.shape), list(leaf.shape)
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            # As torch.chunk cuts.
            each = -(-extent[placement.dim] // mesh.size(axis))
            most[placement.dim] = -(-most[placement.dim] // mesh.size(axis))
            first = min(each * mesh.get_local_rank(axis), extent[placement.dim])
            begin[placement.dim] += first
            extent[placement.dim] = min(each, extent[placement.dim] - first)
    entries = torch.Size(extent).numel()
    runs = [range(entries)] if copies is None else copies.parts(entries)
    return Layout(
        shape=leaf.shape,
        mesh=mesh if isinstance(leaf, DTensor) else None,
        placements=placements,
        begin=tuple(begin),
        extent=tuple(extent),
        runs=runs,
        run=runs[0 if copies is None else copies.rank],
        widest=-(-torch.Size(most).numel() // len(runs)),
    )


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()
