"""``nn.Module`` -> pure functions of the parameters."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
)
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._C._autograd import (
    _saved_tensors_hooks_disable,
    _saved_tensors_hooks_enable,
    _saved_tensors_hooks_get_disabled_error_message,
)
from torch.utils.data import DataLoader

from hessfunc import options
from hessfunc.options import validated
from hessfunc.recompute import recomputing, segments_of
from hessfunc.transforms.kernels.embedding import pure_lookup
from hessfunc.transforms.kernels.replaced import Replaced
from hessfunc.trees import Space, Tree, first_of, leaves, mapped, merge, tree_map, unchanged

__all__ = [
    "Loss",
    "LossFunction",
    "composed",
    "functional",
    "hold",
    "refuse_module",
    "sliced",
    "supervised",
    "training_flags",
    "uses_batch_statistics",
]

LossFunction: TypeAlias = Callable[[Tree, Any], Tensor]


@dataclass(frozen=True)
class Loss:
    """A pure loss ``(params, batch) -> scalar`` that also shows its two halves.

    Attributes:
        outputs: ``(params, batch) -> outputs``, the model.
        criterion: ``(outputs, batch) -> scalar``.
    """

    outputs: Callable[[Tree, Any], Any]
    criterion: Callable[[Any, Any], Tensor]

    def __call__(self, params: Tree, batch: Any, /) -> Tensor:
        return self.criterion(self.outputs(params, batch), batch)


@validated
def composed(
    outputs: Callable[[Tree, Any], Any],
    criterion: Callable[[Any, Any], Tensor],
    /,
    *,
    targets: Callable[[Any], Any] | None = None,
) -> Loss:
    """The loss of any batch: ``criterion(outputs(params, batch), batch)``.

    Args:
        outputs: ``(params, batch) -> outputs``.
        criterion: ``(outputs, batch) -> scalar``; with ``targets``, ``(outputs, targets)``.
        targets: batch -> targets. A usual criterion, such as ``cross_entropy``, then stays known,
            so that Gauss-Newton and Fisher matrices take its closed forms.

    Raises:
        TypeError: ``outputs`` is a module, which has no params to be given.
    """
    refuse_module(outputs)
    return Loss(outputs, criterion if targets is None else OfTargets(criterion, targets))


@validated
def supervised(
    model_fn: Callable[[Tree, Any], Any], criterion: Callable[[Any, Any], Tensor], /
) -> Loss:
    """The loss of batches ``(inputs, targets)``: ``criterion(model_fn(params, inputs), targets)``.

    Args:
        model_fn: as `functional` returns it.
        criterion: ``(outputs, targets) -> scalar``, such as ``torch.nn.functional.cross_entropy``
            or a loss module.

    Raises:
        TypeError: ``model_fn`` is a module; from the loss: a batch is no pair.
    """
    refuse_module(model_fn)
    return Loss(_OfInputs(model_fn), OfTargets(criterion))


def refuse_module(function: object, /) -> None:
    """Raise where a module stands in place of a pure function.

    Raises:
        TypeError: it is so.
    """
    if isinstance(function, nn.Module):
        raise TypeError(
            f"{type(function).__name__} is a module, and no function of (params, ...): make it "
            "pure, `model_fn, params = functional(model)`, and take "
            "`supervised(model_fn, criterion)`"
        )


@dataclass(frozen=True)
class _OfInputs:
    model_fn: Callable[[Tree, Any], Any]

    def __call__(self, params: Tree, batch: Any, /) -> Any:
        return self.model_fn(params, _pair(batch)[0])


def _targets(batch: Any) -> Any:
    return _pair(batch)[1]


@dataclass(frozen=True)
class OfTargets:
    """A criterion of (outputs, targets) as one of (outputs, batch)."""

    criterion: Callable[[Any, Any], Tensor]
    targets: Callable[[Any], Any] = _targets

    def __call__(self, outputs: Any, batch: Any, /) -> Tensor:
        return self.criterion(outputs, self.targets(batch))


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    size = f" of length {len(batch)}" if isinstance(batch, (tuple, list, Mapping)) else ""
    remedy = (
        "for many batches take `over_batches(hvp(loss))(params, loader)`"
        if _is_many(batch)
        else "use `composed(outputs, criterion)` for any other batch"
    )
    raise TypeError(
        f"a supervised loss takes batches (inputs, targets), and got a {type(batch).__name__}"
        f"{size}: {remedy}"
    )


def _is_many(batch: Any) -> bool:
    """Whether it is batches (inputs, targets), not one."""
    return isinstance(batch, DataLoader) or (
        isinstance(batch, (tuple, list))
        and bool(batch)
        and all(isinstance(one, (tuple, list)) and len(one) == 2 for one in batch)
    )


@validated
def hold(loss: LossFunction, rest: Mapping[str, Any], /) -> LossFunction:
    """A loss of some of the parameters alone; the others stay as they are.

    Args:
        loss: of all parameters. A `Loss` gives a `Loss`.
        rest: the parameters that are held, as `split` returns them. They are not copied: writes
            through ``.data`` or NumPy are not seen, so make loss and matvec again after those.

    Raises:
        RuntimeError: (from the loss) a held parameter has changed in place since.
    """
    if not rest:
        return loss
    fixed = tree_map(Tensor.detach, rest)
    refuse_if_changed = unchanged(Space.of(fixed).names, leaves(fixed))

    def whole(chosen: Tree) -> dict[str, Any]:
        refuse_if_changed()
        return merge(chosen, fixed)

    return _of_whole(loss, whole)


def _of_whole(loss: LossFunction, whole: Callable[[Tree], Tree]) -> LossFunction:
    """The loss of a part of the parameters, from which ``whole`` makes all of them."""
    if isinstance(loss, Loss):
        outputs = loss.outputs
        return Loss(lambda part, batch: outputs(whole(part), batch), loss.criterion)
    return lambda part, batch: loss(whole(part), batch)


@options.validated(params=options.mapping)
def sliced(
    loss: LossFunction, params: Mapping[str, Tensor], slices: Mapping[str, Any], /
) -> tuple[LossFunction, dict[str, Tensor]]:
    """A loss of slices of some parameters alone, such as one attention head, and these slices.

    Args:
        loss: of all parameters. A `Loss` gives a `Loss`.
        params: all parameters, a flat dict.
        slices: for each parameter that is cut, any index that tensors take: ``slice(0, 8)``,
            ``numpy.s_[:, 0:8]``, a list of rows. All else is held fixed.

    Returns:
        ``(loss, chosen)``, with ``chosen`` a dict of the cut tensors.

    Raises:
        ValueError: There is no parameter of that name; a slice is no index of it, is empty, or
            names an entry twice.
    """
    if not slices:
        raise ValueError("slices is empty: name a parameter, and which part of it")
    if unknown := sorted(set(slices) - set(params)):
        raise ValueError(f"there is no parameter named {', '.join(unknown)}")
    fixed = {name: leaf.detach() for name, leaf in params.items()}
    places = {name: _places(name, fixed[name], index) for name, index in slices.items()}
    for name, place in places.items():
        if not len(place) or len(place.unique()) < len(place):
            raise ValueError(f"the slice of {name!r} is empty or names an entry twice")
    refuse_if_changed = unchanged(tuple(fixed), list(fixed.values()))

    def whole(chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        refuse_if_changed()
        # Out of place, for forward mode.
        changed = {
            name: fixed[name]
            .flatten()
            .index_put((places[name],), part.flatten())
            .view(fixed[name].shape)
            for name, part in chosen.items()
        }
        return fixed | changed

    chosen = {name: fixed[name][index] for name, index in slices.items()}
    return _of_whole(loss, whole), chosen


def _places(name: str, leaf: Tensor, index: Any) -> Tensor:
    """The numbers of the entries of a flat leaf that an index chooses."""
    try:
        found = torch.arange(leaf.numel(), device=leaf.device).view(leaf.shape)[index]
    except (IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"slices[{name!r}] is no index of a tensor of shape {tuple(leaf.shape)}: {error}"
        ) from None
    return found.flatten()


@validated
def functional(
    model: nn.Module,
    /,
    *,
    trainable_only: bool = True,
    dtype: torch.dtype | None = None,
    recompute: str | None = None,
) -> tuple[Callable[[Tree, Any], Any], dict[str, Tensor]]:
    """A pure function of a module's parameters, and these parameters.

    ``model_fn(params, inputs)`` takes inputs that are a tensor, a tuple (positional arguments), a
    mapping (keyword arguments) or anything else, such as a named tuple (one argument), and returns
    what the module returns. The module is never changed: buffers are cloned inside each call, so
    that BatchNorm works in train mode too. The training flag of each submodule is read once, here.

    Parameters that are not among ``params``, such as frozen ones, are read from the module in each
    call, and are not copied, as copies would double the memory of a large model. A matvec refuses
    its products once they have changed in place, but torch does not see writes through ``.data``
    or NumPy: make the matvec again after those.

    Args:
        model: the module.
        trainable_only: leave parameters that do not require a gradient out of ``params``.
        dtype: in which the model is evaluated, such as ``torch.bfloat16``; params, buffers and
            inputs are cast inside the function and outputs back, so that params, loss and vectors
            stay in their own. None: as it is.
        recompute: a glob over module names (``"model.layers.*"``). Their activations are not kept
            for the derivatives but computed again, so that a deep model's graph fits in memory;
            `recomputed` does it for any function.

    Returns:
        ``(model_fn, params)``, with ``params`` a dict in the order of ``named_parameters``: a tied
        tensor stands there once, and each is a detached view of the module's own.

    Raises:
        ValueError: there is no parameter left, or no module to recompute.
        NotImplementedError: the module is sharded by `fully_shard`, or wrapped in `DataParallel`,
            `DistributedDataParallel` or `torch.jit`.
    """
    _refuse_if_fully_sharded(model)
    _refuse_wrapped(model)
    params = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not trainable_only
    }
    if not params:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: set `requires_grad`, or pass "
            "`trainable_only=False`"
        )
    training = [(module, module.training) for module in model.modules()]
    segments = [] if recompute is None else segments_of(model, recompute)
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    own_dtype = next(iter(params.values())).dtype
    renormalises = _renormalises(model)
    named = {name for name, _ in model.named_parameters()}
    batch_statistics = [
        name for name, module in model.named_modules() if uses_batch_statistics(module)
    ]

    def model_fn(params: Tree, inputs: Any, /) -> Any:
        if not (isinstance(params, Mapping) and params.keys() <= named):
            raise _unlike(params, named)
        if batch_statistics and _SEVERAL_BATCHES.get():
            raise ValueError(
                f"BatchNorm {batch_statistics[0]!r} uses the statistics of each batch, so the "
                "result would depend on how the data is cut into batches: call `model.eval()` "
                "before `functional(model)`, or use one batch"
            )
        note_read((n, p) for n, p in model.named_parameters() if n not in params)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        args, kwargs = _arguments(inputs)
        state = dict(params), buffers
        if dtype is not None:
            fixed = {n: p for n, p in model.named_parameters() if n not in params}
            state = _cast((fixed | state[0], buffers), dtype)
            args, kwargs = _cast((args, kwargs), dtype)
        with (
            training_flags(training),
            recomputing(segments),
            _without_checkpointing(),
            _without_cudnn() if recurrent else nullcontext(),
            Replaced(pure_lookup()) if renormalises else nullcontext(),
        ):
            outputs = torch.func.functional_call(model, state, args, kwargs)
        return outputs if dtype is None else _cast(outputs, own_dtype)

    return model_fn, params


def _unlike(params: object, named: Collection[str]) -> Exception:
    """The error of params that are not those of the model."""
    if not isinstance(params, Mapping):
        return TypeError(
            f"params is a {type(params).__name__}, and not the dict of named parameters that "
            "`functional(model)` returns"
        )
    others = [str(name) for name in params if name not in named]
    return ValueError(
        f"the model has no parameter named {first_of(others)}: its parameters are "
        f"{first_of(sorted(named))}"
    )


def _refuse_if_fully_sharded(model: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(isinstance(module, fsdp.FSDPModule) for module in model.modules()):
        raise NotImplementedError(
            f"{type(model).__name__} is sharded by `fully_shard`, which knows the module's own "
            "parameters alone and first derivatives alone: take `hvp_by_backward(model, loss)`; or "
            "`unsharded(model)`, with `functional` of the same module before it was sharded"
        )


def _refuse_wrapped(model: nn.Module) -> None:
    for name, module in model.named_modules():
        place = f"model.{name}" if name else "model"
        if isinstance(module, nn.DataParallel) or type(module).__name__ == (
            "DistributedDataParallel"
        ):
            raise NotImplementedError(
                f"{place} is a {type(module).__name__}, which copies its parameters to devices or "
                f"averages gradients by itself: take `functional({place}.module)`, the plain "
                "module, and `over_batches(..., mesh=...)` for several processes"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise NotImplementedError(
                f"{place} is a {type(module).__name__}, compiled by torch.jit, whose parameters "
                "cannot be replaced: take the plain module that it was made from"
            )


def _renormalises(model: nn.Module) -> bool:
    """Whether a module has embeddings that are rescaled when they are looked up.

    Raises:
        NotImplementedError: If another module uses such a weight, too, and would see it rescaled.
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
            "rows that are rescaled as they are looked up: set its `max_norm = None`"
        )
    return bool(chosen)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    # A named tuple, such as a PackedSequence, is one argument.
    if isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields"):
        return tuple(inputs), {}
    return (inputs,), {}


def _cast(tree: Tree, dtype: torch.dtype) -> Tree:
    def cast(leaf: Tensor) -> Tensor:
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    return mapped(cast, tree, "inputs")


def _without_cudnn() -> AbstractContextManager[None]:
    # cuDNN's recurrent layers have no second derivative; those of torch do.
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=False,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=cudnn.allow_tf32,
    )


@contextmanager
def _without_checkpointing() -> Iterator[None]:
    # It would compute again in the backward pass, with the module's own parameters.
    refusal = (
        "torch.utils.checkpoint (gradient checkpointing) does not work under second derivatives: "
        "turn it off, and take functional(model, recompute='model.layers.*') in its place"
    )
    before = _saved_tensors_hooks_get_disabled_error_message()
    # `disable_saved_tensors_hooks` fails where there are hooks already. Those are the user's own,
    # such as save_on_cpu, and stay.
    _saved_tensors_hooks_disable(refusal, fail_if_non_empty=False)
    try:
        yield
    finally:
        if before is None:
            _saved_tensors_hooks_enable()
        else:
            _saved_tensors_hooks_disable(before, fail_if_non_empty=False)


@contextmanager
def training_flags(training: Sequence[tuple[nn.Module, bool]], /) -> Iterator[None]:
    """Inside, each of these modules has this training flag."""
    changed = [module for module, flag in training if module.training != flag]
    for module in changed:
        module.training = not module.training
    try:
        yield
    finally:
        for module in changed:
            module.training = not module.training


def uses_batch_statistics(module: nn.Module, /) -> bool:
    """Whether a module normalises by the statistics of the batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or module.running_mean is None
    )


_SEVERAL_BATCHES: ContextVar[bool] = ContextVar("several batches", default=False)


@contextmanager
def several_batches() -> Iterator[None]:
    """Inside, a model is seen as one of a sum over batches: batch statistics are refused."""
    token = _SEVERAL_BATCHES.set(True)
    try:
        yield
    finally:
        _SEVERAL_BATCHES.reset(token)


_READ: ContextVar[dict[int, tuple[str, Tensor]] | None] = ContextVar("read", default=None)


@contextmanager
def parameters_read() -> Iterator[dict[int, tuple[str, Tensor]]]:
    """Inside, the parameters that losses read beside those they are given are added to a dict."""
    read: dict[int, tuple[str, Tensor]] = {}
    token = _READ.set(read)
    try:
        yield read
    finally:
        _READ.reset(token)


def note_read(named: Iterable[tuple[str, Tensor]], /) -> None:
    """Show parameters, with their names, to `parameters_read`."""
    if (read := _READ.get()) is not None:
        read |= {id(parameter): (name, parameter) for name, parameter in named}
