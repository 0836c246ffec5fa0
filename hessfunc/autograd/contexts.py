"""The surroundings of a product: exact second derivatives, fixed randomness, clear errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from hessfunc.autograd.embedding import EXACT
from hessfunc.autograd.overrides import Replaced, Replacements
from hessfunc.containers import batch_leaves, is_array, mapped, opened


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
            from hessfunc.autograd.redistribution import twice_differentiable

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
