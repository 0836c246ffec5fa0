"""The surroundings of a product: exact second derivatives, fixed randomness, clear errors."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from hessfunc.transforms.kernels.exact import EXACT
from hessfunc.transforms.kernels.replaced import Replaced, Replacements
from hessfunc.trees import Space, batch_leaves, is_array, mapped, opened

__all__ = [
    "differentiable_twice",
    "explained",
    "explanation",
    "kept_batch",
    "lacks_forward_mode",
    "plain_batch",
    "precise",
    "refuse_autocast",
    "same_draws",
]


@contextmanager
def differentiable_twice(
    device: torch.device, replaced: Replacements | Replaced = EXACT
) -> Iterator[Replaced]:
    """Evaluate losses so that they can be differentiated twice.

    Attention runs in its unfused form: the fused kernels have no second derivative. Functions that
    stand in `replaced` are computed as it says. Random layers draw from a seed of their own, the
    same each time, so that a product is symmetric and torch's random stream stays where it was.
    Modules and functions that `torch.compile` has wrapped run as they are, uncompiled.

    Args:
        device: Device of the parameters.
        replaced: Functions of torch, each with the one that is called in its place; or a mode
            that knows them.

    Returns:
        The mode, which records what it sees.
    """
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    mode = replaced if isinstance(replaced, Replaced) else Replaced(replaced)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_uncompiled())
        stack.enter_context(precise(device))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(same_draws(device))
        if "torch.distributed.tensor" in sys.modules:
            # It takes a while to import, and is there already where a model has DTensors.
            from hessfunc.distributed.redistribution import twice_differentiable

            stack.enter_context(twice_differentiable())
        torch.backends.mha.set_fastpath_enabled(False)
        # Last: a mode that watches `no_grad` must not see the contexts above.
        stack.enter_context(mode)
        try:
            yield mode
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_attention)


def _uncompiled() -> AbstractContextManager[Any]:
    """Run what `torch.compile` has wrapped as it is: compiled graphs have no second derivative."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def refuse_autocast(device: torch.device, /) -> None:
    """Refuse to run where the caller has switched autocast on.

    It would round the algorithms' own arithmetic, too.

    Raises:
        RuntimeError: If autocast is enabled for the device.
    """
    if torch.is_autocast_enabled(device.type):
        raise RuntimeError(
            "autocast is enabled, and would round products and inner products to "
            f"{torch.get_autocast_dtype(device.type)}: leave the `torch.autocast` block, and take "
            f"`functional(model, dtype={torch.get_autocast_dtype(device.type)})` for a model in "
            "low precision"
        )


def plain_batch(batch: Any, /) -> Any:
    """Return a batch whose tensors are no inference tensors, which autograd cannot save."""
    if not any(isinstance(x, Tensor) and x.is_inference() for x in batch_leaves(batch)):
        return batch
    return mapped(lambda leaf: leaf.clone() if leaf.is_inference() else leaf, batch, "batch")


def kept_batch(batch: Any, /) -> Any:
    """Copy the tensors and NumPy arrays of a batch, so that a matvec stays that of these values.

    Loaders reuse their buffers, and a write through ``.data`` or NumPy leaves no trace on the
    version of a tensor: it would reach the inputs in a kept graph, but not the activations. A
    tensor that stands at several places is copied once.

    Raises:
        TypeError: An object of the batch holds tensors and cannot be opened or copied.
    """
    if isinstance(batch, DataLoader):
        # The loss says better what is wrong with a loader in place of a batch.
        return batch
    found, rebuilt = opened(batch, "batch")
    copies = {id(leaf): _copied(leaf) for leaf in found if is_array(leaf)}
    return rebuilt(copies.get(id(leaf), leaf) for leaf in found) if copies else batch


def _copied(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf.copy()
    # A loss may differentiate with respect to its inputs.
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


@contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """Inside, random layers draw from a seed of their own; afterwards streams are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # torch.manual_seed would seed every device, and those that are not forked would stay so.
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


@contextmanager
def precise(device: torch.device) -> Iterator[None]:
    """Inside, convolutions and matmuls on CUDA keep the full precision of float32."""
    if device.type != "cuda":
        yield
        return
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cuda.allow_tf32
    cudnn.allow_tf32 = cuda.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, cuda.allow_tf32 = before


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
