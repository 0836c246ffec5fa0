"""Explanations of autograd errors, with advice on how to change the loss."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hessfunc.containers import batch_leaves
from hessfunc.spaces.space import Space

_NO_FORWARD = (
    r"forward AD with (?:aten::)?(\w+)|(ZeroTensors are immutable)|support (saved tensor hooks)"
)

# Pattern of a message of torch, with the clearer error. The groups that match fill the braces.
_CLEARER: tuple[tuple[str, type[Exception], str], ...] = (
    (
        r"Target (-?\d+) is out of bounds",
        ValueError,
        "a target is the class {0}, which the outputs do not have: number the classes from 0, or "
        "pass `ignore_index={0}` to the criterion if the target must not count",
    ),
    (
        r"\Aindex out of range in self\Z",
        ValueError,
        "an index of the batch is negative or beyond the last row of its embedding: enlarge "
        "`num_embeddings`, or check the tokens of the batch",
    ),
    (
        r"expected (?:target|scalar type).* (?:Long|Byte),? but \w+ (\w+)",
        TypeError,
        "the targets have the dtype {0}, but classes are integers: pass `targets.long()`, or "
        "probabilities in the shape of the outputs",
    ),
    (
        r"multi-target not supported",
        ValueError,
        "the targets have an axis that the outputs do not have: pass one class for each "
        "prediction, such as `targets.squeeze(1)` or `targets.argmax(1)`",
    ),
    (
        r"derivative for '?(?:aten::)?(\w+)'? is not implemented"
        r"|the derivative of '?(?:aten::)?(\w+)'? is not implemented"
        r"|twice a function that was marked with @(once_differentiable)",
        NotImplementedError,
        "{0} has no second derivative in torch: replace the operation, or use `hvp(loss, "
        "mode='difference')`, finite differences of the gradient, which need a smooth loss and "
        "are most accurate in float64",
    ),
    (
        _NO_FORWARD,
        NotImplementedError,
        "{0} is not supported in forward mode: use `hvp(loss, mode='reverse')`",
    ),
    (
        r"(?:aten\.)?(\w+)\S* got mixed torch.Tensor and DTensor",
        ValueError,
        "{0} combines a plain tensor with a DTensor: make DTensors of the inputs and constants of "
        "the model (`input_fn` of distribute_module, or "
        "torch.distributed.tensor.experimental.implicit_replication), or use `unsharded(model)`",
    ),
    (
        r"redistribute from (\S+) to (\S+) not supported",
        NotImplementedError,
        "torch cannot redistribute a DTensor from {0} to {1}, which the second derivative needs: "
        "use Shard(0) or Replicate for some parameters, or `unsharded(model)`, or `hvp(loss, "
        "mode='difference')`",
    ),
    (
        r"Batching rule not implemented for aten::(\w+)",
        NotImplementedError,
        "{0} has no rule for torch.func.vmap: replace the operation, or loop over the mapped axis",
    ),
    (
        r"Cannot access data pointer of Tensor that doesn't have storage",
        NotImplementedError,
        "the loss leaves torch, for instance for NumPy or a packed sequence, where forward mode "
        "and vmap cannot follow: use `hvp(loss, mode='reverse')`",
    ),
    (
        r"attempting to call Tensor.requires_grad_\(\)|mutating directly with `\.data`",
        NotImplementedError,
        "the loss calls `requires_grad_()` or writes into `.data`, which forward mode and "
        "transforms of torch.func do not support: use `hvp(loss, mode='reverse')`",
    ),
    (
        r"nference tensors cannot be saved",
        RuntimeError,
        "the batch has tensors made in `torch.inference_mode()`, which autograd cannot save: call "
        "`tensor.clone()` outside of it, or make them under `torch.no_grad()`",
    ),
    (
        r"modified by an inplace operation",
        RuntimeError,
        "a tensor in the graph of the loss has changed in place since it was computed. If it is "
        "the batch, a frozen parameter or a buffer, make the matvec again, or pass "
        "`batch.clone()`; if the model itself changes it, use an operation out of place",
    ),
    (
        r"One of the differentiated Tensors does not require grad",
        NotImplementedError,
        "a layer is called where no gradient is recorded, such as under `torch.no_grad()`, before "
        "`detach()` or in torch.utils.checkpoint: call the layer outside of it, or use exact "
        "products, `per_block(hvp(loss)(params, batch), params)`",
    ),
    (
        r"backward through (\S+?)(?:\.default)? but no autograd formula",
        NotImplementedError,
        "the custom operator {0} has no derivative: register one with "
        "`torch.library.register_autograd`",
    ),
    (
        r"does not currently support double backward",
        NotImplementedError,
        "the loss has a part compiled by `torch.compile`, which has no second derivative: use the "
        "uncompiled model, `model._orig_mod`",
    ),
    (
        r"override the setup_context|(?s:forward mode AD.*jvp|jvp.*forward mode AD)",
        NotImplementedError,
        "an autograd.Function of the loss has no `setup_context` and `jvp`, which forward mode and "
        "`recompute` need: use `hvp(loss, mode='reverse')` without recomputation, or add both (see "
        "'Extending torch.func with autograd.Function' in torch's documentation)",
    ),
    (
        r"When use_reentrant=True",
        NotImplementedError,
        "torch.utils.checkpoint (gradient checkpointing) does not support second derivatives: turn "
        "it off, and use functional(model, recompute='model.layers.*')",
    ),
)


@contextmanager
def explained(space: Space, batch: Any) -> Iterator[None]:
    """Context manager that replaces known errors of torch by clearer ones."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        if (clearer := explanation(error, space, batch)) is not None:
            raise clearer from error
        raise


def explanation(error: Exception, space: Space, batch: Any) -> Exception | None:
    """Return a clearer error that says what to do, or None for an unknown error."""
    for pattern, kind, message in _CLEARER:
        if match := re.search(pattern, str(error)):
            return kind(message.format(*_groups(match)))
    if any(isinstance(leaf, Tensor) and leaf.is_nested for leaf in batch_leaves(batch)):
        return NotImplementedError(
            "the batch has a nested tensor, which torch does not differentiate twice: pass "
            "`torch.nested.to_padded_tensor(x, 0.0)` and the lengths"
        )
    devices = {leaf.device for leaf in batch_leaves(batch) if isinstance(leaf, Tensor)}
    if devices - {space.device}:
        return ValueError(
            f"the parameters are on {space.device}, but the batch has tensors on "
            f"{', '.join(sorted(map(str, devices - {space.device})))}: move them, "
            f"`tensor.to({str(space.device)!r})`"
        )
    return None


def _groups(match: re.Match[str]) -> list[str]:
    return [group.removesuffix("_backward") for group in match.groups() if group]


def first_line(error: Exception, /) -> str:
    """Return the first line of the message of an error, or its type if it has no message."""
    return (str(error) or type(error).__name__).splitlines()[0]


def unmapped(error: Exception, what: str, /) -> RuntimeError:
    """Return the error of a function that `torch.func.vmap` cannot map over examples.

    Args:
        error: Error inside of vmap.
        what: Noun phrase for the function, for the message.
    """
    line = first_line(error)
    if ".item()" in line:
        line = "it looks at values of tensors, by `.item()`, `float(x)` or `if x > 0`"
    elif "numpy.ndarray" in line:
        line = "the batch has NumPy arrays; pass `torch.from_numpy(x)`"
    elif "inplace arithmetic" in line or "in-place" in line:
        line = "it writes in place into a tensor that all examples share"
    return RuntimeError(
        f"{what} cannot be mapped over examples by vmap ({line}): call `model.eval()` if a layer "
        "is random or mixes examples; otherwise pass `examples_per_chunk=1` for a loop"
    )


def lacks_forward_mode(error: RuntimeError, /) -> str | None:
    """Return the operation without a forward-mode derivative, or None for another error."""
    match = re.search(_NO_FORWARD, str(error))
    return None if match is None else _groups(match)[0]
