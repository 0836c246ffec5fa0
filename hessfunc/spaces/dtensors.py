"""Vector space of a tree of DTensors, whose rows are divided like the leaves."""

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

from hessfunc.randomness import Draw
from hessfunc.ranks import Ranks
from hessfunc.spaces.divided import DividedSpace
from hessfunc.spaces.space import Space
from hessfunc.trees import Tree, whole


@dataclass(frozen=True)
class Layout:
    """Placement of a leaf on a mesh.

    Attributes:
        shape: Global shape of the leaf.
        mesh: Mesh of the leaf; None for a plain tensor, which is replicated.
        placements: Placement on each axis of the mesh.
        begin: Global index of the first entry of this rank's shard, for each axis of the leaf.
        extent: Shape of this rank's shard.
        runs: Ranges of the flat shard, one for each of the ranks that have the same shard.
        run: Range of this rank.
        widest: Largest number of entries on any rank.
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
        """Return the shard of a leaf with a leading probe axis."""
        if self.mesh is None:
            return whole(leaf)
        if not isinstance(leaf, DTensor):
            raise ValueError(
                "a leaf of the vector is a plain tensor, but its parameter is a DTensor: pass "
                "torch.distributed.tensor.distribute_tensor(leaf, mesh, placements)"
            )
        return leaf.redistribute(self.mesh, self._placements(1)).to_local()

    def tensor(self, local: Tensor, axes: int, /) -> Tensor:
        """Return the DTensor with this shard; ``axes`` is its number of leading axes, 0 or 1."""
        if self.mesh is None:
            return local
        shape = torch.Size((*local.shape[:axes], *self.shape))
        return DTensor.from_local(
            local.contiguous(),
            self.mesh,
            self._placements(axes),
            shape=shape,
            stride=strides_of(shape),
        )

    def _placements(self, axes: int) -> list[Placement]:
        return [Shard(p.dim + axes) if isinstance(p, Shard) else p for p in self.placements]

    def entries(self, of: Callable[[range], Tensor], /) -> Tensor:
        """Evaluate a function of places in the flat leaf at the entries of this rank's run."""
        # The function is evaluated on the contiguous range that covers the shard; the strides of
        # the whole leaf then pick the shard out of it.
        strides = strides_of(self.shape)
        first = sum(b * s for b, s in zip(self.begin, strides, strict=True))
        last = first + sum((e - 1) * s for e, s in zip(self.extent, strides, strict=True))
        covered = range(first, last + 1) if 0 not in self.extent else range(0)
        shard = of(covered).as_strided(self.extent, strides)
        return shard.flatten()[self.run.start : self.run.stop]


@dataclass(frozen=True, eq=False)
class DTensorSpace(DividedSpace):
    """Vector space of DTensors: each rank holds the columns of its own shards.

    Ranks that have the same shard divide its columns, so that each column is on one rank.

    Attributes:
        layouts: Layout of each leaf.
        copies: Pairs of ranks that share shards, and the indices of the leaves they share.
    """

    layouts: tuple[Layout, ...]
    copies: tuple[tuple[Ranks, list[int]], ...]

    @classmethod
    def over(cls, space: Space, tensors: Sequence[Tensor], /) -> DTensorSpace:
        """Return the space of DTensors, given the space of plain tensors and the leaves.

        Raises:
            NotImplementedError: If torch is older than 2.13.
            ValueError: If the leaves lie on several meshes or have placements other than Shard
                and Replicate, or if the mesh does not contain this process.
        """
        if not hasattr(_redistribute, "NestedRedistribute"):
            raise NotImplementedError(
                f"torch {torch.__version__} has no second derivative of DTensor.redistribute: "
                "install torch>=2.13"
            )
        meshes = {leaf.device_mesh for leaf in tensors if isinstance(leaf, DTensor)}
        if len(meshes) > 1:
            raise ValueError(
                f"leaves lie on several meshes, {', '.join(map(str, meshes))}: pass "
                "`unsharded(model)`, or fix the leaves of all but one mesh with `split` and `hold`"
            )
        mesh = meshes.pop()
        ranks = Ranks.apart(mesh)
        layouts: list[Layout] = []
        copies: dict[tuple[int, ...], tuple[Ranks, list[int]]] = {}
        for i, (name, leaf) in enumerate(zip(space.names, tensors, strict=True)):
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
            layout.tensor(torch.cat([layout.local(leaf[None]) for leaf in leaves]), 1)
            for layout, leaves in zip(self.layouts, zip(*vectors, strict=True), strict=True)
        ]

    def ravel_leaves(
        self, tensors: Sequence[Tensor], /, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        rows = torch.empty(
            len(tensors[0]), self.width, dtype=dtype or self.dtype, device=self.device
        )
        parts = rows.split([len(run) for run in self.spans], dim=1)
        for part, leaf, layout in zip(parts, tensors, self.layouts, strict=True):
            shards = layout.local(leaf).reshape(len(leaf), math.prod(layout.extent))
            part.copy_(shards[:, layout.run.start : layout.run.stop])
        return rows

    def unravel(self, rows: Tensor, /) -> Tree:
        if rows.dim() not in (1, 2) or rows.shape[-1] != self.width:
            raise ValueError(
                f"a flat vector has shape {tuple(rows.shape)}: on this rank, pass its part of "
                f"shape ({self.width},) or (k, {self.width})"
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
        """Return the shard of each leaf, gathered from the ranks that share the shard."""
        parts = list(rows.split([len(run) for run in self.spans], dim=1))
        for ranks, same in self.copies:
            lengths = [[len(self.layouts[i].runs[r]) for i in same] for r in range(ranks.size)]
            widths = [sum(of_rank) for of_rank in lengths]
            if not any(widths):
                continue
            mine = torch.cat([parts[i] for i in same], dim=1).mT
            columns = ranks.gathered(mine, widths)
            runs = [x.split(of_rank) for x, of_rank in zip(columns, lengths, strict=True)]
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
            of_leaf = keys(range(i, i + 1))
            for row, key in zip(part, of_leaf, strict=True):
                row.copy_(layout.entries(partial(_drawn, of, key[None], self.device)))

    def places(self) -> Tensor:
        def numbers(places: range) -> Tensor:
            return torch.arange(places.start, places.stop, device=self.device)

        begins = list(accumulate(self.sizes, initial=0))[:-1]
        return torch.cat(
            [
                begin + layout.entries(numbers)
                for begin, layout in zip(begins, self.layouts, strict=True)
            ]
        )


def _drawn(of: Draw, key: Tensor, device: torch.device, places: range) -> Tensor:
    return of(key, [places], device)[0]


def _placements_of(name: str, leaf: Tensor, mesh: DeviceMesh) -> tuple[Placement, ...]:
    if not isinstance(leaf, DTensor):
        return (Replicate(),) * mesh.ndim
    for placement in leaf.placements:
        if type(placement) not in (Shard, Replicate):
            raise ValueError(
                f"leaf {name!r} has placement {placement}, not Shard or Replicate: call "
                "leaf.redistribute(mesh, placements), or pass `unsharded(model)`"
            )
    return leaf.placements


def _along(mesh: DeviceMesh, axes: tuple[int, ...]) -> Ranks:
    """Return the ranks that differ from this one only on these axes."""
    if len(axes) == mesh.ndim:
        return Ranks.of(mesh)
    if mesh.mesh_dim_names is None:
        raise ValueError(
            f"the axes of the mesh {mesh} have no names: call "
            'init_device_mesh("cpu", shape, mesh_dim_names=("data", "model"))'
        )
    return Ranks.of(mesh[tuple(mesh.mesh_dim_names[axis] for axis in axes)])


def _layout(
    leaf: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...], copies: Ranks | None
) -> Layout:
    begin, extent, most = [0] * leaf.dim(), list(leaf.shape), list(leaf.shape)
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            # DTensor shards an axis like torch.chunk: ceil(length / ranks) entries each.
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


def strides_of(shape: torch.Size, /) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of this shape."""
    return torch.empty(shape, dtype=torch.uint8, device="meta").stride()
