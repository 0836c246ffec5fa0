"""Turn modules into pure functions of their parameters."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

from hessfunc.autograd.contexts import without_checkpointing, without_cudnn
from hessfunc.autograd.embedding import pure_lookup
from hessfunc.autograd.overrides import Replaced, current
from hessfunc.autograd.recomputed_blocks import Borrow, recompute_inside, segments_of
from hessfunc.autograd.stateless import call_with
from hessfunc.autograd.transformable import TRANSFORMABLE
from hessfunc.changes import note_read
from hessfunc.containers import mapped
from hessfunc.copies import Copies
from hessfunc.options import validated
from hessfunc.selection import first_of
from hessfunc.stored import read_as
from hessfunc.training_mode import refuse_batch_statistics, several_batches, with_batch_statistics
from hessfunc.trees import Tree, whole

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from hessfunc.sharding.parts import Choice


@validated
def functional(
    model: nn.Module,
    /,
    *,
    trainable_only: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    recompute: str | None = None,
    mesh: DeviceMesh | None = None,
    shard: Choice | None = None,
) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """Return a module as a pure function of its parameters, and these parameters.

    ``model_fn(params, inputs)`` returns what the module returns. A tuple of inputs is passed as
    positional arguments and a mapping as keyword arguments. Any other value, such as a tensor or a
    named tuple, is one argument. Several inputs and keyword arguments, as in
    ``model_fn(params, x, mask=mask)``, are passed on as they are.

    The module is never changed, so several threads may call ``model_fn`` while others train the
    module. Each call evaluates a structural copy of the module: other module objects that hold the
    same tensors. The copy is made once, when `functional` is called; later changes of the module's
    attributes, training flags and hooks do not reach it. Attributes that the forward sets stay on
    the copy and are reset after each call, so a loss must use what ``model_fn`` returns. Each call
    clones the buffers, so BatchNorm also works in train mode.

    A module that cannot be copied (`copy.deepcopy` raises), or whose functions or hooks refer to
    one of its own modules through a closure or a global name, is evaluated itself and restored
    after the call. All such modules of the process share one lock; other threads must not use
    them meanwhile.

    Parameters that are not among ``params``, such as frozen ones, are read from the module in each
    call. They are not copied, because copies would double the memory of a large model. A matvec
    raises an error once they have changed in place. Writes through ``.data`` or NumPy are detected
    by comparing about 16 entries of each parameter. A write to a few rows may be missed; after one,
    make the matvec again.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> model_fn, params = hf.functional(model)
        >>> {name: tuple(leaf.shape) for name, leaf in params.items()}
        {'weight': (2, 3), 'bias': (2,)}
        >>> inputs = torch.randn(5, 3)
        >>> torch.equal(model_fn(params, inputs), model(inputs))
        True

    Args:
        model: Module to convert.
        trainable_only: Whether to leave parameters that do not require a gradient out of
            ``params``.
        dtype: Dtype in which the model is evaluated; None for that of the parameters. If it is
            narrower, such as ``torch.bfloat16`` for a model in float32, ``model_fn`` casts params,
            buffers and inputs to it and casts outputs back, so that params, loss and vectors keep
            their own dtype. If it is wider, such as ``torch.float32`` for a model in bfloat16, then
            params, loss and vectors have it too. The weights keep their dtype, in the model and in
            graphs, and each operation converts those that it reads.
        device: Device on which the model is evaluated, and of params and vectors; None for that of
            the parameters. Weights elsewhere, such as in the memory of the host for a GPU, or on
            several GPUs, stay there, and each operation copies those that it reads.
        recompute: Glob over the names of modules (``"model.layers.*"``) whose activations are
            recomputed for the derivatives instead of kept. The graph of a deep model then fits in
            memory. `recomputed` does the same for any function.
        mesh: Mesh of ranks with one axis, each of which holds a part of every parameter. ``params``
            are then DTensors. ``model_fn`` takes the whole batch on each rank, evaluates the
            rank's rows of it, and returns the outputs of all rows. The model must have the same
            parameters on each rank; the model can then be freed. With None, the mesh is that of a
            model of `fully_shard`, whose shards are used without a copy.
        shard: Blocks of a model on a mesh: a glob over the names of modules
            (``"transformer.h.*"``), several globs, or a predicate ``(name, module)``. The
            parameters of a block are whole only while it runs, in the forward and the backward
            pass, and its activations are recomputed. Parameters outside of blocks are whole while
            a graph is kept. None stands for the modules of `fully_shard`, or for the elements of
            each ``nn.ModuleList`` and ``nn.Sequential``.

    Returns:
        ``(model_fn, params)``. ``params`` is a dict of detached views of the parameters, or of
        DTensors, in the order of ``named_parameters``; tied parameters appear once.

    Raises:
        ValueError: If ``dtype`` is not floating-point, if no parameter is left, if a lazy parameter
            has no shape yet, or if no module matches ``recompute`` or ``shard``. On a mesh, also if
            ranks differ in their parameters or buffers, if the model uses batch statistics, or if
            ``device`` is given.
            Raised by ``model_fn`` if ranks differ in their batch, if inputs or outputs do not have
            the examples on their first axes, or if the model draws random numbers.
        NotImplementedError: If the module is wrapped in `DataParallel`, `DistributedDataParallel`
            or `torch.jit`. With ``recompute`` or on a mesh, also if it cannot be copied. On a mesh,
            also if its parameters are DTensors on several axes or meshes.
        RuntimeError: If a parameter of a block is used outside of the block; raised by
            ``model_fn``.
    """
    _refuse_wrapped(model)
    _refuse_lazy(model)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: choose a floating-point dtype, such as torch.bfloat16")
    params = {
        name: read_as(parameter.detach(), dtype, device)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not trainable_only
    }
    if not params:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: call "
            "`model.requires_grad_(True)`, load an adapter with `is_trainable=True`, or pass "
            "`trainable_only=False`"
        )
    if mesh is not None or shard is not None or _is_fully_sharded(model):
        if device is not None:
            raise ValueError(
                "a sharded model is evaluated on the device of its mesh: leave out `device`"
            )
        return _sharded(model, list(params), mesh, shard, dtype, recompute)
    prepared = None
    if recompute is not None:
        prepared = partial(recompute_inside, names=segments_of(model, recompute))
    named = [name for name, _ in model.named_parameters()]
    first = next(iter(params.values()))
    return _pure(model, named, first, dtype, prepared, device=device), params


def _sharded(
    model: nn.Module,
    trainable: Sequence[str],
    mesh: DeviceMesh | None,
    shard: Choice | None,
    dtype: torch.dtype | None,
    recompute: str | None,
) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """Implement `functional` for parameters that are divided among ranks."""
    # The import of torch.distributed is slow.
    from hessfunc.sharding.model import ShardedModel
    from hessfunc.sharding.parts import divided

    if recompute is not None:
        raise ValueError(
            "the blocks of a sharded model are recomputed already: leave out `recompute`, and "
            f"choose the blocks with `shard={recompute!r}`"
        )
    with several_batches():
        refuse_batch_statistics(with_batch_statistics(model))
    parts = divided(model, trainable, mesh, shard, dtype)
    first = next(iter(parts.params.values()))
    model_fn = _pure(parts.skeleton, parts.outside, first, dtype, parts.prepare)
    return ShardedModel(model_fn, parts), parts.params


def _pure(
    model: nn.Module,
    parameters: Collection[str],
    first: Tensor,
    dtype: torch.dtype | None,
    prepared: Callable[[nn.Module, Borrow], None] | None,
    *,
    device: torch.device | None = None,
) -> Callable[..., Any]:
    """Return a module as a pure function of parameters.

    Args:
        model: Module to convert.
        parameters: Names of the parameters that the function may be given. Those that it is not
            given are read from the module.
        first: Parameter whose dtype is that of the outputs, and whose device is that of the module.
        dtype: Dtype in which the module is evaluated, as in `functional`.
        prepared: Function that prepares a copy of the module, whose blocks are recomputed in
            another copy; None without such blocks.
        device: Device on which the module is evaluated, as in `functional`.

    Raises:
        NotImplementedError: If blocks are recomputed of a module that cannot be copied.
    """
    flags = [module.training for module in model.modules()]

    def prepare(module: nn.Module) -> None:
        for part, flag in zip(module.modules(), flags, strict=True):
            part.training = flag
        if prepared is not None:
            prepared(module, copies.borrowed)

    copies = Copies(model, prepare)
    if prepared is not None and copies.are_the_model:
        raise NotImplementedError(
            f"{type(model).__name__} cannot be copied (`copy.deepcopy` raises, or its functions or "
            "hooks refer to one of its own modules), and activations are recomputed in a copy: "
            "leave out `recompute`"
        )
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    renormalises = _renormalises(model)
    named = set(parameters)
    buffered = {name for name, _ in model.named_buffers()}
    batch_statistics = with_batch_statistics(model)

    def model_fn(params: Tree, /, *inputs: Any, **named_inputs: Any) -> Any:
        if not (isinstance(params, Mapping) and params.keys() <= named):
            raise _unlike(params, named)
        # The copy does not have parameters and buffers that were added to the module later.
        own = model.named_parameters()
        fixed: dict[str, Tensor] = {n: p for n, p in own if n in named and n not in params}
        present = {name: buffer for name, buffer in model.named_buffers() if name in buffered}
        note_read(fixed.items(), present.items())
        if not torch.compiler.is_compiling():
            # Dynamo cannot trace context variables. None of them is set inside compiled functions.
            refuse_batch_statistics(batch_statistics)
        fixed = {name: read_as(leaf, dtype, device) for name, leaf in fixed.items()}
        buffers = {name: buffer.clone().to(device) for name, buffer in present.items()}
        args, kwargs = inputs, named_inputs
        if len(inputs) == 1 and not named_inputs:
            args, kwargs = _arguments(inputs[0])
        state = fixed | dict(params) | buffers
        if dtype is not None:
            state, args, kwargs = _cast((state, args, kwargs), dtype)
        if torch.compiler.is_compiling():
            with Replaced(TRANSFORMABLE):
                outputs = call_with(copies.traced, state, args, kwargs)
        else:
            with (
                copies.borrowed() as module,
                without_checkpointing(),
                without_cudnn(first.device) if recurrent else nullcontext(),
                Replaced(pure_lookup()) if renormalises else nullcontext(),
                Replaced(TRANSFORMABLE) if _is_transformed() else nullcontext(),
            ):
                outputs = call_with(module, state, args, kwargs)
        return outputs if dtype is None else _cast(outputs, first.dtype)

    return model_fn


def _is_transformed() -> bool:
    """Return whether transforms of torch.func are active, in a loss outside of the library."""
    active = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return active and current() is None


def _unlike(params: object, named: Collection[str]) -> Exception:
    """Return the error for params that are not the parameters of the model."""
    if not isinstance(params, Mapping):
        return TypeError(
            f"params is a {type(params).__name__}, not a dict of named parameters: pass the "
            "params of `model_fn, params = functional(model)`"
        )
    others = [str(name) for name in params if name not in named]
    return ValueError(
        f"the model has no parameter named {first_of(others)}: its parameters are "
        f"{first_of(sorted(named))}"
    )


def _is_fully_sharded(model: nn.Module) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules())


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        place = f"model.{name}" if name else "model"
        if isinstance(module, nn.DataParallel) or type(module).__name__ == (
            "DistributedDataParallel"
        ):
            raise NotImplementedError(
                f"{place} is a {type(module).__name__}, which copies its parameters to devices or "
                f"averages gradients by itself: use `functional({place}.module)`, and "
                "`over_batches(..., mesh=mesh)` for several processes"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise NotImplementedError(
                f"{place} is a {type(module).__name__}, and the parameters of a module compiled "
                "by torch.jit cannot be replaced: pass the original nn.Module"
            )


def _renormalises(model: nn.Module) -> bool:
    """Return whether a module has embeddings with ``max_norm``, which rescale looked-up rows.

    Raises:
        NotImplementedError: If another module shares such a weight, and would see it rescaled.
    """
    chosen = [
        m
        for m in model.modules()
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None
    ]
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    if any(uses[id(module.weight)] > 1 for module in chosen):
        raise NotImplementedError(
            "an embedding with `max_norm` shares its weight with another module, which would see "
            "rows that the lookup has rescaled: set `embedding.max_norm = None`"
        )
    return bool(chosen)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    # A named tuple, such as a PackedSequence, is a single argument.
    if isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields"):
        return tuple(inputs), {}
    return (inputs,), {}


def _cast(tree: Tree, dtype: torch.dtype) -> Tree:
    def cast(leaf: Tensor) -> Tensor:
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    return mapped(cast, tree, "inputs")


def _refuse_lazy(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"parameter {name!r} has no shape yet: call `model(inputs)` once before "
                "`functional(model)`"
            )


@validated
def unsharded(model: nn.Module, /, *, trainable_only: bool = True) -> dict[str, Tensor]:
    """Return the parameters of a module of DTensors, gathered on every rank.

    Modules sharded by `fully_shard` have such parameters. The returned dict has the names and the
    order of the module before sharding, so it fits the function of an unsharded ``twin``, a module
    of the same class:

        params = hf.unsharded(model)
        model_fn, _ = hf.functional(twin)
        loss = hf.supervised(model_fn, torch.nn.functional.cross_entropy)
        matvec = hf.over_batches(hf.hvp(loss), mesh=mesh)(params, loader)
        hf.lanczos(matvec, params, k=10, space=hf.sharded(params, mesh))

    ``model_fn`` uses the buffers and frozen parameters of ``twin``, so load them into it first.

    Args:
        model: Sharded module. Every rank must call this function.
        trainable_only: Whether to leave out parameters that do not require a gradient.

    Returns:
        Copies of the parameters, which later steps of an optimiser do not change.

    Cost: n numbers on every rank, gathered once.
    """
    return {
        name: whole(parameter.detach()).clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not trainable_only
    }


def bare(model: nn.Module, /) -> nn.Module:
    """Return the module without its wrapper for data parallelism."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return model.module if isinstance(model, wrappers) else model
