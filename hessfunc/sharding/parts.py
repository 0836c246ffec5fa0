"""Division of the parameters of a model among ranks, and blocks that gather them (ZeRO-3).

Rajbhandari, Rasley, Ruwase and He 2020, arXiv 1910.02054. Each rank holds one shard of every
parameter. The forward of a block gathers the parameters of the block, and its derivatives gather
them again: the block is a `recomputed` function of shards.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from hessfunc.autograd.collectives import Cut, gathered
from hessfunc.autograd.recomputed_blocks import Borrow, RecomputedBlock, Segment, recompute_inside
from hessfunc.fingerprints import checksum
from hessfunc.ranks import Ranks, refuse_unless_mesh
from hessfunc.selection import first_of
from hessfunc.sharding.skeleton import name_of, of_fsdp, without_parameters
from hessfunc.spaces.dtensors import strides_of
from hessfunc.stored import read_as
from hessfunc.trees import Tree

# Globs over the names of modules, or a predicate ``(name, module) -> bool``.
Choice: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]

# Shards of the evaluation that runs in this thread, by name.
_SHARDS: ContextVar[Mapping[str, Tensor]] = ContextVar("shards")


@contextmanager
def evaluating(shards: Mapping[str, Tensor], /) -> Iterator[None]:
    """Context manager of an evaluation, whose blocks gather these shards."""
    token = _SHARDS.set(shards)
    try:
        yield
    finally:
        _SHARDS.reset(token)


@dataclass(frozen=True, eq=False)
class Divided:
    """Model without its parameters, and the shards of them that this rank holds.

    Attributes:
        skeleton: Copy of the model. Its parameters are `Absent`.
        blocks: Names of the modules that gather their parameters while they run.
        outside: Names of the parameters outside of blocks, which are whole during an evaluation.
        ranks: Ranks that hold the shards, and that divide the rows of a batch.
        everyone: The same ranks in a group for checks, which no model uses.
        own: Shard of each parameter.
        whole: Shape of each parameter, and the axis along which it is divided.
        params: Trainable parameters as DTensors.
        dtype: Dtype in which the model is evaluated; None for that of the parameters.
    """

    skeleton: nn.Module
    blocks: Sequence[str]
    outside: Sequence[str]
    ranks: Ranks
    everyone: Ranks
    own: Mapping[str, Tensor]
    whole: Mapping[str, tuple[torch.Size, int | None]]
    params: dict[str, Tensor]
    dtype: torch.dtype | None

    def prepare(self, module: nn.Module, borrowed: Borrow) -> None:
        """Replace the forward of each block of a copy by one that gathers its parameters."""

        def block(name: str, segment: Segment, borrowed: Borrow) -> _ShardedBlock:
            names = {local: name_of(leaf) for local, leaf in segment.named_parameters()}
            return _ShardedBlock(name, segment, borrowed, self, names)

        recompute_inside(module, borrowed, self.blocks, block)

    def gathered(self, shards: Mapping[str, Tensor], /) -> dict[str, Tensor]:
        """Return whole parameters from the shards of all ranks."""
        shapes, axes = (
            zip(*(self.whole[name] for name in shards), strict=True) if shards else ((), ())
        )
        wholes = gathered(Cut(self.ranks, shapes, axes), list(shards.values()))
        return dict(zip(shards, wholes, strict=True))


@dataclass(frozen=True, eq=False)
class _ShardedBlock(RecomputedBlock):
    """Recomputed block that keeps its shards, and gathers its parameters whenever it runs.

    Attributes:
        parts: Division of the model.
        names: Names in the model of the parameters of the segment.
    """

    parts: Divided
    names: Mapping[str, str]

    def kept(self) -> tuple[Tree, Tree]:
        every, trained = _SHARDS.get(), self.parts.params
        # The shards of frozen parameters have no cotangent that would be summed over ranks.
        shards = {n: every[n] for n in self.names.values() if n in trained}
        fixed = {n: every[n] for n in self.names.values() if n not in trained}
        return shards, fixed

    def parameters(self, kept: tuple[Tree, Tree], /) -> Mapping[str, Tensor]:
        shards, fixed = kept
        wholes = self.parts.gathered(shards) | self.parts.gathered(fixed)
        return {local: wholes[name] for local, name in self.names.items()}


def divided(
    model: nn.Module,
    trainable: Sequence[str],
    mesh: DeviceMesh | None,
    shard: Choice | None,
    dtype: torch.dtype | None,
) -> Divided:
    """Divide the parameters of a model among the ranks of a mesh.

    Args:
        model: Model with the same parameters on each rank, or a model of `fully_shard`.
        trainable: Names of the parameters of the function.
        mesh: Mesh with one axis; None for that of `fully_shard`.
        shard: Globs over the names of blocks, as in `functional`.
        dtype: Dtype in which the model is evaluated.

    Raises:
        ValueError: If the mesh has several axes, if ranks differ in parameters or buffers, or if
            no module is chosen.
        NotImplementedError: If the model cannot be copied, or if its parameters are DTensors that
            are not divided along one axis of one mesh.
    """
    named = dict(model.named_parameters())
    mesh = _mesh_of(model, named, mesh)
    ranks, everyone = Ranks.of(mesh), Ranks.apart(mesh)
    blocks = _blocks_of(model, shard)
    values = {} if of_fsdp(model) else named
    everyone.alike(
        {f"parameter {name!r}": checksum([leaf]) for name, leaf in values.items()}
        | {f"buffer {name!r}": checksum([leaf]) for name, leaf in model.named_buffers()}
    )
    whole: dict[str, tuple[torch.Size, int | None]] = {}
    own: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, parameter in named.items():
        shape = parameter.shape
        if isinstance(parameter, DTensor):
            axis = _axis_of(name, parameter)
            own[name] = parameter.to_local().detach()
        else:
            axis = _axis_for(shape, ranks.size)
            part = Cut(ranks, (shape,), (axis,)).part(0, parameter.detach())
            # A copy, so that the memory of the whole parameter can be freed.
            own[name] = part.clone(memory_format=torch.contiguous_format)
        own[name] = read_as(own[name], dtype)
        whole[name] = shape, axis
        if name in trainable:
            tensors[name] = DTensor.from_local(
                own[name],
                mesh,
                [placement_of(axis)],
                run_check=False,
                shape=shape,
                stride=strides_of(shape),
            )
    skeleton = without_parameters(model, named)
    # A parameter that is tied to one outside of blocks is gathered inside of them as well.
    beside = {
        name_of(leaf)
        for name, module in skeleton.named_modules(remove_duplicate=False)
        if not any(name == block or name.startswith(f"{block}.") for block in blocks)
        for leaf in module.parameters(recurse=False)
    }
    return Divided(
        skeleton=skeleton,
        blocks=blocks,
        outside=[name for name in named if name in beside],
        ranks=ranks,
        everyone=everyone,
        own=own,
        whole=whole,
        params=tensors,
        dtype=dtype,
    )


def _mesh_of(model: nn.Module, named: Mapping[str, Tensor], mesh: DeviceMesh | None) -> DeviceMesh:
    if mesh is not None:
        refuse_unless_mesh(mesh)
    is_fsdp = of_fsdp(model)
    meshes = {leaf.device_mesh for leaf in named.values() if isinstance(leaf, DTensor)}
    if meshes and not is_fsdp:
        raise NotImplementedError(
            f"{type(model).__name__} has DTensor parameters already, whose products are exact: "
            "leave out `mesh` and `shard`"
        )
    if len(meshes) > 1 or (mesh is not None and meshes - {mesh}):
        raise NotImplementedError(
            f"parameters lie on several meshes, {', '.join(map(str, meshes))}: `fully_shard` all "
            "of them on one mesh"
        )
    if is_fsdp and any(not isinstance(leaf, DTensor) for leaf in named.values()):
        name = next(n for n, leaf in named.items() if not isinstance(leaf, DTensor))
        raise NotImplementedError(
            f"parameter {name!r} is whole, although the model is sharded by `fully_shard`: call "
            "`model.reshard()` on each of its modules, and do not ignore parameters"
        )
    mesh = meshes.pop() if meshes else mesh
    if mesh is None:
        raise ValueError("`shard` divides parameters among the ranks of a mesh: pass `mesh=`")
    if mesh.ndim != 1 and is_fsdp:
        raise NotImplementedError(
            f"the parameters of `fully_shard` lie on a mesh of {mesh.ndim} axes, such as that of a "
            "tensor-parallel module: shard them along one axis, or use `hvp_by_backward(model, "
            "loss)`, finite differences of the gradient"
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"parameters are divided along one axis, but the mesh has {mesh.ndim}: pass a submesh, "
            'such as mesh["data"]'
        )
    return mesh


def _axis_of(name: str, parameter: DTensor) -> int | None:
    (placement,) = parameter.placements
    if isinstance(placement, Replicate):
        return None
    if type(placement) is not Shard:
        raise NotImplementedError(
            f"parameter {name!r} has placement {placement}: use Shard, the default of `fully_shard`"
        )
    return placement.dim


def _axis_for(shape: torch.Size, size: int) -> int | None:
    """Return the first axis that ranks divide evenly, else the longest; None for a scalar."""
    even = [axis for axis, length in enumerate(shape) if length % size == 0]
    return even[0] if even else max(range(len(shape)), key=lambda i: shape[i], default=None)


def _blocks_of(model: nn.Module, shard: Choice | None) -> list[str]:
    """Return the names of the outermost modules that are chosen."""
    named = {name: module for name, module in model.named_modules() if name and _has_own(module)}
    names = list(named)
    if shard is None:
        chosen = _by_fully_shard(model) or _in_lists(model)
        fit = [name for name in names if name in chosen]
        if not fit:
            raise ValueError(
                f"{type(model).__name__} has no `nn.ModuleList` or `nn.Sequential` whose elements "
                "would be its blocks: name modules, `shard='encoder.*'`. It has "
                f"{first_of(names) if names else 'none'}"
            )
    elif callable(shard):
        fit = [name for name, module in named.items() if shard(name, module)]
        if not fit:
            raise ValueError(f"shard={shard} chooses none of the modules {first_of(names)}")
    else:
        globs = [shard] if isinstance(shard, str) else list(shard)
        fit = [n for n in names if any(fnmatch.fnmatchcase(n, glob) for glob in globs)]
        unknown = [glob for glob in globs if not fnmatch.filter(names, glob)]
        if unknown:
            raise ValueError(
                f"shard={unknown[0]!r} chooses none of the modules with parameters, "
                f"{first_of(names)}"
            )
    return [n for n in fit if not any(n.startswith(f"{outer}.") for outer in fit)]


def _has_own(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _by_fully_shard(model: nn.Module) -> set[str]:
    return {n for n, module in model.named_modules() if n and isinstance(module, FSDPModule)}


def _in_lists(model: nn.Module) -> set[str]:
    lists = (nn.ModuleList, nn.Sequential)
    return {
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, lists)
        for key, _ in module.named_children()
    }


def placement_of(axis: int | None, /) -> Placement:
    """Return the placement of a parameter that is divided along an axis, or replicated."""
    return Replicate() if axis is None else Shard(axis)
