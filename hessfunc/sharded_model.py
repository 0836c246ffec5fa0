"""Models whose parameters are divided among ranks; a block is whole only while it runs (ZeRO-3).

Rajbhandari, Rasley, Ruwase and He 2020, arXiv 1910.02054. Each rank holds one shard of every
parameter and evaluates its own rows of a batch. The forward of a block gathers the parameters of
the block, and its derivatives gather them again: the block is a `recomputed` function of shards.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from hessfunc.autograd.collectives import Cut, gathered, joined
from hessfunc.autograd.functorch import transforming
from hessfunc.autograd.overrides import current
from hessfunc.autograd.recompute import Borrowed, Segment, recomputed, refuse_cache
from hessfunc.autograd.stateless import call_with
from hessfunc.autograd.streams import Streams
from hessfunc.changes import note_read
from hessfunc.containers import batch_leaves, is_array, mapped, opened
from hessfunc.copies import structural_copy
from hessfunc.fingerprints import checksum
from hessfunc.ranks import Ranks
from hessfunc.selection import first_of
from hessfunc.trees import Tree

# Globs over the names of modules, or a predicate ``(name, module) -> bool``.
Choice: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]

# Shards of the evaluation that runs in this thread, by name.
_SHARDS: ContextVar[Mapping[str, Tensor]] = ContextVar("shards")


class Absent(Tensor):
    """Parameter of a block outside of the block: it has a shape and a dtype, but no entries.

    Attributes:
        parameter: Name of the parameter in the model.
        placed_on: Device of the shards of the parameter.
    """

    parameter: str
    placed_on: torch.device

    @staticmethod
    def of(name: str, parameter: Tensor, /) -> Absent:
        """Return the stand-in of a parameter."""
        entry = torch.empty((), dtype=parameter.dtype, device="meta")
        absent = entry.expand(parameter.shape).as_subclass(Absent)
        absent.parameter, absent.placed_on = name, parameter.device
        return absent

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.placed_on

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in _OF_NO_ENTRY:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        names = [x.parameter for x in batch_leaves((args, kwargs)) if isinstance(x, Absent)]
        raise RuntimeError(
            f"parameter {names[0]!r} is used outside of the block that gathers it: choose a block "
            "that contains all uses of the parameter, or none, with `shard=` of `functional`"
        )


# Functions of a tensor that read none of its entries; attributes are read by ``__get__``.
_OF_NO_ENTRY = {"__get__", "__set__", "dim", "size", "stride", "numel", "is_floating_point"}
_OF_NO_ENTRY |= {"is_complex", "element_size", "ndimension", "__len__", "__hash__"}


def _name_of(leaf: Tensor) -> str:
    assert isinstance(leaf, Absent)
    return leaf.parameter


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

    def prepare(self, module: nn.Module, borrowed: Callable[[], Borrowed]) -> None:
        """Replace the forward of each block of a copy by one that gathers its parameters."""
        for name in self.blocks:
            segment = Segment(module.get_submodule(name))
            names = {local: _name_of(leaf) for local, leaf in segment.named_parameters()}
            block = _Block(self, name, segment, names, borrowed)
            segment.module.forward = block

    def gathered(self, shards: Mapping[str, Tensor], /) -> dict[str, Tensor]:
        """Return whole parameters from the shards of all ranks."""
        shapes, axes = (
            zip(*(self.whole[name] for name in shards), strict=True) if shards else ((), ())
        )
        wholes = gathered(Cut(self.ranks, shapes, axes), list(shards.values()))
        return dict(zip(shards, wholes, strict=True))


@dataclass(frozen=True, eq=False)
class _Block:
    """Forward of a block that gathers its parameters.

    Attributes:
        parts: Division of the model.
        name: Name of the block.
        segment: Forward of the block without its hooks.
        names: Names in the model of the parameters of the segment.
        borrowed: Function that borrows another copy of the model, prepared alike.
    """

    parts: Divided
    name: str
    segment: Segment
    names: Mapping[str, str]
    borrowed: Callable[[], Borrowed]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        refuse_cache((args, kwargs))
        every, trained = _SHARDS.get(), self.parts.params
        # The shards of frozen parameters have no cotangent that would be summed over ranks.
        shards = {n: every[n] for n in self.names.values() if n in trained}
        fixed = {n: every[n] for n in self.names.values() if n not in trained}
        buffers = dict(self.segment.named_buffers())
        return recomputed(self._pure)(shards, fixed, buffers, args, kwargs)

    def _pure(self, shards: Tree, fixed: Tree, buffers: Tree, args: Any, kwargs: Any) -> Any:
        wholes = self.parts.gathered(shards) | self.parts.gathered(fixed)
        state = {local: wholes[name] for local, name in self.names.items()}
        # BatchNorm raises for running statistics that require a gradient, so detach them.
        state |= {local: buffer.detach().clone() for local, buffer in buffers.items()}
        with self.borrowed() as model:
            block = model.get_submodule(self.name).forward
            assert isinstance(block, _Block)
            return call_with(block.segment, state, args, kwargs)


class Shards(Mapping[str, Tensor]):
    """Parameters of which only a `ShardedModel` can read this rank's shards.

    Attributes:
        tensors: Shard of each parameter.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError(
            "the outputs of the loss read parameters besides `model_fn`, but each rank has only a "
            "part of them: compute with `model_fn(params, inputs)` alone, or pass a plain loss "
            "`(params, batch) -> scalar`, whose params are DTensors"
        )

    __getitem__ = __iter__ = __len__ = __contains__ = keys = items = values = get = _refuse


class _Question(Shards):
    """Parameters that a `ShardedModel` answers with itself, before it computes anything."""


class _Answer(BaseException):
    """Not an error: the model that was asked for, which ends the evaluation of its loss."""

    def __init__(self, model: ShardedModel) -> None:
        self.model = model


def model_in(outputs: Callable[[Tree, Any], Any], batch: Any, /) -> ShardedModel | None:
    """Return the sharded model to which a function passes its parameters, if there is one."""
    try:
        outputs(_Question({}), batch)
    except _Answer as answer:
        return answer.model
    except Exception:
        # Another function reads its parameters. The evaluation at these raises its own errors.
        return None
    return None


@dataclass(frozen=True, eq=False)
class ShardedModel:
    """Pure function ``(params, inputs) -> outputs`` of a model with divided parameters.

    Each rank evaluates its own rows of the inputs, and the rows of the outputs are joined.

    Attributes:
        evaluate: Function of the whole parameters outside of blocks, and of inputs.
        parts: Division of the model.
    """

    evaluate: Callable[..., Any]
    parts: Divided

    def __call__(self, params: Tree, /, *inputs: Any, **named_inputs: Any) -> Any:
        if isinstance(params, _Question):
            raise _Answer(self)
        if isinstance(params, Shards):
            return self.of_rank(params.tensors, *inputs, **named_inputs)
        ranks, given = self.parts.ranks, (inputs, named_inputs)
        shards = self._shards_of(params)
        self.refuse_different(given)
        rows = self.rows(given)
        own = rows[ranks.rank]
        of_rank, named_of_rank = rows_of(given, own)
        outputs = self.of_rank(shards, *of_rank, **named_of_rank)
        lengths = [len(of_rank) for of_rank in rows]

        def join(leaf: Tensor) -> Tensor:
            if leaf.dim() == 0 or len(leaf) != max(1, len(own)):
                raise ValueError(
                    f"an output of the model has shape {tuple(leaf.shape)} for {max(1, len(own))} "
                    "examples, but outputs of a sharded model are joined along their first axes, "
                    "which are the examples: compute means and losses in the criterion"
                )
            return joined(ranks, lengths, leaf[: len(own)])

        return mapped(join, outputs, "outputs")

    def rows(self, batch: Any, /) -> list[range]:
        """Return the rows of a batch that each rank evaluates."""
        return self.parts.ranks.parts(count_of(batch))

    def has(self, params: Tree, /) -> bool:
        """Return whether these are parameters of the model, divided like its own."""
        whole = self.parts.whole
        return isinstance(params, Mapping) and all(
            name in whole
            and isinstance(leaf, DTensor)
            and leaf.device_mesh.ndim == 1
            and leaf.placements == (_placement(whole[name][1]),)
            for name, leaf in params.items()
        )

    def _shards_of(self, params: Tree) -> dict[str, Tensor]:
        if not isinstance(params, Mapping):
            raise TypeError(
                f"params is a {type(params).__name__}, not a dict of named parameters: pass the "
                "params of `model_fn, params = functional(model, mesh=mesh)`"
            )
        return {name: _local(name, self.parts, leaf) for name, leaf in params.items()}

    def refuse_different(self, batch: Any, /) -> None:
        """Raise on every rank if ranks have different batches; not checked inside transforms."""
        if not transforming():
            tensors = [x for x in batch_leaves(batch) if isinstance(x, Tensor)]
            self.parts.everyone.alike({"the whole batch": checksum(tensors)})

    def of_rank(self, shards: Mapping[str, Tensor], /, *inputs: Any, **named_inputs: Any) -> Any:
        """Return the outputs of this rank's rows, given its shards of the parameters."""
        parts = self.parts
        fixed = {n: x for n, x in parts.own.items() if n not in shards}
        note_read(fixed.items())
        every = {**fixed, **shards}
        if parts.dtype is not None:
            every = {name: shard.to(parts.dtype) for name, shard in every.items()}
        outside = {n: every[n] for n in parts.outside}
        trained = {n: x for n, x in outside.items() if n in parts.params}
        others = {n: x for n, x in outside.items() if n not in parts.params}
        token = _SHARDS.set(every)
        try:
            with _without_draws(parts.ranks):
                wholes = parts.gathered(trained) | parts.gathered(others)
                return self.evaluate(wholes, *inputs, **named_inputs)
        finally:
            _SHARDS.reset(token)


def _local(name: str, parts: Divided, leaf: Tensor) -> Tensor:
    if name not in parts.own:
        raise ValueError(
            f"the model has no parameter named {name!r}: its parameters are "
            f"{first_of(sorted(parts.own))}"
        )
    if not isinstance(leaf, DTensor):
        raise TypeError(
            f"parameter {name!r} is a plain tensor, but this model is sharded: pass the DTensors "
            "of `model_fn, params = functional(model, mesh=mesh)`"
        )
    return leaf.redistribute(placements=[_placement(parts.whole[name][1])]).to_local()


def _placement(axis: int | None) -> Placement:
    return Replicate() if axis is None else Shard(axis)


@contextmanager
def _without_draws(ranks: Ranks) -> Iterator[None]:
    """Context manager of an evaluation that must not draw random numbers on several ranks."""
    mode = current()
    streams = mode.source if mode is not None and isinstance(mode.source, Streams) else None

    def state() -> list[Tensor]:
        if streams is None:
            return [torch.random.get_rng_state()]
        return list(streams.state().values())

    before = state()
    yield
    after = state()
    changed = len(before) != len(after) or not all(map(torch.equal, before, after))
    if changed and ranks.size > 1:
        raise ValueError(
            "the model draws random numbers, such as masks of dropout, for the rows of each rank, "
            "so that the result would depend on the number of ranks: call `model.eval()` before "
            "`functional(model, mesh=mesh)`"
        )


def count_of(batch: Any, /) -> int:
    """Return the number of examples of a batch, which ranks divide.

    Raises:
        ValueError: If the batch has no array, or if the first axes of its arrays differ.
    """
    lengths = {len(x) for x in opened(batch, "batch")[0] if is_array(x) and x.ndim > 0}
    if len(lengths) != 1:
        shown = f"first axes of length {sorted(lengths)}" if lengths else "no array with an axis"
        raise ValueError(
            f"a batch is divided among ranks along the first axes of its arrays, but it has {shown}"
            ": give all arrays one first axis, the examples, and make others inside the model"
        )
    return lengths.pop()


def rows_of(batch: Any, rows: range, /) -> Any:
    """Return these rows of a batch, or its first row if there are none.

    A rank without rows evaluates the model too, because the others gather parameters from it.
    """
    start, stop = (rows.start, rows.stop) if rows else (0, 1)
    leaves, rebuilt = opened(batch, "batch")
    return rebuilt(x[start:stop] if is_array(x) and x.ndim > 0 else x for x in leaves)


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
    of_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    mesh = _mesh_of(model, named, mesh, of_fsdp=of_fsdp)
    ranks, everyone = Ranks.of(mesh), Ranks.apart(mesh)
    blocks = _blocks_of(model, shard)
    values = {} if of_fsdp else named
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
        whole[name] = shape, axis
        if name in trainable:
            tensors[name] = DTensor.from_local(
                own[name],
                mesh,
                [_placement(axis)],
                run_check=False,
                shape=shape,
                stride=torch.empty(shape, device="meta").stride(),
            )
    skeleton = _without_parameters(model, named)
    # A parameter that is tied to one outside of blocks is gathered inside of them as well.
    beside = {
        _name_of(leaf)
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


def _mesh_of(
    model: nn.Module, named: Mapping[str, Tensor], mesh: DeviceMesh | None, *, of_fsdp: bool
) -> DeviceMesh:
    meshes = {leaf.device_mesh for leaf in named.values() if isinstance(leaf, DTensor)}
    if meshes and not of_fsdp:
        raise NotImplementedError(
            f"{type(model).__name__} has DTensor parameters already, whose products are exact: "
            "leave out `mesh` and `shard`"
        )
    if len(meshes) > 1 or (mesh is not None and meshes - {mesh}):
        raise NotImplementedError(
            f"parameters lie on several meshes, {', '.join(map(str, meshes))}: `fully_shard` all "
            "of them on one mesh"
        )
    if of_fsdp and any(not isinstance(leaf, DTensor) for leaf in named.values()):
        name = next(n for n, leaf in named.items() if not isinstance(leaf, DTensor))
        raise NotImplementedError(
            f"parameter {name!r} is whole, although the model is sharded by `fully_shard`: call "
            "`model.reshard()` on each of its modules, and do not ignore parameters"
        )
    mesh = meshes.pop() if meshes else mesh
    if mesh is None:
        raise ValueError("`shard` divides parameters among the ranks of a mesh: pass `mesh=`")
    if mesh.ndim != 1 and of_fsdp:
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


def _without_parameters(model: nn.Module, named: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model whose parameters are `Absent`."""
    is_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    skeleton = _without_fsdp(model) if is_fsdp else structural_copy(model)
    if skeleton is None:
        raise NotImplementedError(
            f"{type(model).__name__} cannot be copied without its parameters (`copy.deepcopy` "
            "raises, or its functions or hooks refer to one of its own modules): use "
            "`functional(model)` and `space=sharded(params, mesh)`, which divide the vectors"
        )
    absent = {id(leaf): Absent.of(name, leaf) for name, leaf in named.items()}
    for module in skeleton.modules():
        for key, leaf in module._parameters.items():
            if leaf is not None:
                module._parameters[key] = absent[id(leaf)]  # type: ignore[assignment]
    return skeleton


def _without_fsdp(model: nn.Module) -> nn.Module:
    """Return a copy of a model of `fully_shard` with the classes and hooks from before."""
    memo: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
    copies = {}
    for module in model.modules():
        kind = type(module)
        if isinstance(module, FSDPModule):
            kind = kind.__mro__[module._orig_cls_mro_index]
        copies[module] = memo[id(module)] = object.__new__(kind)
    for module, copied in copies.items():
        for key, value in vars(module).items():
            if key in _OF_FSDP or key.startswith("__composable_api_state_key"):
                continue
            if key.endswith("_hooks") and isinstance(value, dict):
                value = type(value)((k, v) for k, v in value.items() if not _is_of_fsdp(v))
            vars(copied)[key] = copy.deepcopy(value, memo)
    return memo[id(model)]


_OF_FSDP = {"_is_fsdp_managed_module", "_fsdp_use_orig_params"}


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")
