"""Errors of autograd, explained in terms of the loss and of what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hessfunc.containers import batch_leaves
from hessfunc.spaces.space import Space

_NO_REVERSE = re.compile(
    r"derivative for '?(?:aten::)?(\w+)'? is not implemented"
    r"|the derivative of '?(?:aten::)?(\w+)'? is not implemented"
    r"|twice a function that was marked with @(once_differentiable)"
)


_NO_FORWARD = re.compile(
    r"forward AD with (?:aten::)?(\w+)|(ZeroTensors are immutable)|support (saved tensor hooks)"
)


_UNREGISTERED = re.compile(r"backward through (\S+?)(?:\.default)? but no autograd formula")
_MIXED = re.compile(r"(?:aten\.)?(\w+)\S* got mixed torch.Tensor and DTensor")
_NO_MOVE = re.compile(r"redistribute from (\S+) to (\S+) not supported")


@contextmanager
def explained(space: Space, batch: Any) -> Iterator[None]:
    """Say which operation has no derivative, or which device is wrong, and what to do."""
    try:
        yield
    except RuntimeError as error:
        if (clearer := explanation(error, space, batch)) is not None:
            raise clearer from error
        raise


def explanation(error: RuntimeError, space: Space, batch: Any) -> Exception | None:
    """An error that says what to do."""
    text = str(error)
    if found := _NO_REVERSE.search(text):
        return NotImplementedError(
            f"{_operation(found)} has no second derivative in torch: replace it, or take "
            "`hvp(loss, mode='difference')`, the Hessian by finite differences of the "
            "gradient, which need a smooth loss and are best in float64"
        )
    if found := _NO_FORWARD.search(text):
        return NotImplementedError(
            f"{_operation(found)}: not supported in forward mode: take `hvp(loss, mode='reverse')`"
        )
    if found := _MIXED.search(text):
        return ValueError(
            f"{_operation(found)} meets a plain tensor beside a DTensor: let the model make "
            "DTensors of its inputs and constants (`input_fn` of distribute_module, or "
            "torch.distributed.tensor.experimental.implicit_replication), or take `unsharded`"
        )
    if found := _NO_MOVE.search(text):
        return NotImplementedError(
            f"torch cannot move a DTensor from {found[1]} to {found[2]}, as a second derivative "
            "needs here: place some parameters otherwise (Shard(0), or Replicate), or take "
            "`unsharded` parameters, or `hvp(loss, mode='difference')`"
        )
    if "Cannot access data pointer of Tensor that doesn't have storage" in text:
        return NotImplementedError(
            "the loss leaves torch, such as by NumPy or a packed sequence, where forward mode and "
            "vmap cannot follow: take `hvp(loss, mode='reverse')`"
        )
    if "nference tensors cannot be saved" in text:
        return RuntimeError(
            "the batch has tensors made in `torch.inference_mode()`, which autograd cannot save: "
            "clone them outside of it, or make them under `torch.no_grad()`"
        )
    if "modified by an inplace operation" in text:
        return RuntimeError(
            "a tensor in the graph of the loss has changed in place since it was computed: if it "
            "is the batch, a frozen parameter or a buffer, make the matvec again, or pass "
            "`batch.clone()`; if the model itself changes it, take the operation out of place"
        )
    if "One of the differentiated Tensors does not require grad" in text:
        return NotImplementedError(
            "a layer is called where no gradient is recorded, such as under `torch.no_grad()`, "
            "behind `detach()` or in torch.utils.checkpoint: take the layer out of it, or take "
            "exact products, `per_block(hvp(loss)(params, batch), params)`"
        )
    if found := _UNREGISTERED.search(text):
        return NotImplementedError(
            f"the custom operator {found[1]} has no derivative: register one by "
            "`torch.library.register_autograd`"
        )
    if "does not currently support double backward" in text:
        return NotImplementedError(
            "the loss has a part that `torch.compile` has compiled, which has no second "
            "derivative: make it from the uncompiled model (`model._orig_mod`)"
        )
    if "override the setup_context" in text or ("forward mode AD" in text and "jvp" in text):
        return NotImplementedError(
            "an autograd.Function of the loss has no `setup_context` and `jvp`, which forward mode "
            "and `recompute` need: take `hvp(loss, mode='reverse')` without recomputation, or add "
            "them (see 'Extending torch.func with autograd.Function' in torch's documentation)"
        )
    if "When use_reentrant=True" in text:
        return NotImplementedError(
            "torch.utils.checkpoint (gradient checkpointing) does not work under second "
            "derivatives: turn it off, and take functional(model, recompute='model.layers.*')"
        )
    devices = {leaf.device for leaf in batch_leaves(batch) if isinstance(leaf, Tensor)}
    if devices - {space.device}:
        return ValueError(
            f"the parameters lie on {space.device}, but the batch has tensors on "
            f"{', '.join(sorted(map(str, devices - {space.device})))}: move one to the other"
        )
    return None


def lacks_forward_mode(error: RuntimeError, /) -> str | None:
    """Return the operation that has no forward-mode derivative, if that is the error."""
    found = _NO_FORWARD.search(str(error))
    return None if found is None else _operation(found)


def _operation(found: re.Match[str]) -> str:
    return next(group for group in found.groups() if group).removesuffix("_backward")
