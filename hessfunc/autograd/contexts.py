"""Context managers for products: exact second derivatives, fixed random draws, full precision."""

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
from hessfunc.randomness import seeded


@contextmanager
def differentiable_twice(
    device: torch.device, replaced: Replacements | Replaced = EXACT
) -> Iterator[Replaced]:
    """Context manager in which losses are evaluated so that they can be differentiated twice.

    Attention uses its unfused implementation, because the fused kernels have no second derivative.
    Functions in ``replaced`` are computed by their replacements. Random layers always draw from
    the same fixed seed, so that products are symmetric and torch's random stream is not changed.
    Modules and functions wrapped by `torch.compile` run uncompiled.

    Args:
        device: Device of the parameters.
        replaced: Replacements of torch functions, by function, or a mode that applies them.

    Yields:
        Mode that applies the replacements and records hooks.
    """
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    mode = replaced if isinstance(replaced, Replaced) else Replaced(replaced)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_uncompiled())
        stack.enter_context(precise(device))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(seeded(0, device))
        if "torch.distributed.tensor" in sys.modules:
            # The import is slow, and a model with DTensors has already done it.
            from hessfunc.autograd.redistribution import twice_differentiable

            stack.enter_context(twice_differentiable())
        torch.backends.mha.set_fastpath_enabled(False)
        # Enter the mode last: it observes `no_grad`, and must not see the contexts above.
        stack.enter_context(mode)
        try:
            yield mode
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_attention)


def _uncompiled() -> AbstractContextManager[Any]:
    """Run wrappers of `torch.compile` uncompiled, as compiled graphs have no second derivative."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def refuse_autocast(device: torch.device, /) -> None:
    """Raise if the caller has enabled autocast, which would also round the algorithms' arithmetic.

    Raises:
        RuntimeError: If autocast is enabled for the device.
    """
    if torch.is_autocast_enabled(device.type):
        raise RuntimeError(
            "autocast is enabled, and would round products and inner products to "
            f"{torch.get_autocast_dtype(device.type)}: leave the `torch.autocast` block, and use "
            f"`functional(model, dtype={torch.get_autocast_dtype(device.type)})` to evaluate the "
            "model in low precision"
        )


def plain_batch(batch: Any, /) -> Any:
    """Return the batch with inference tensors cloned, because autograd cannot save them."""
    if not any(isinstance(x, Tensor) and x.is_inference() for x in batch_leaves(batch)):
        return batch
    return mapped(lambda leaf: leaf.clone() if leaf.is_inference() else leaf, batch, "batch")


def kept_batch(batch: Any, /) -> Any:
    """Copy the tensors and NumPy arrays of a batch, so that a matvec keeps their values.

    Loaders reuse their buffers. A write through ``.data`` or NumPy does not change the version of
    a tensor, so a kept graph would combine new inputs with old activations. A tensor that appears
    several times is copied once.

    Raises:
        TypeError: If an object of the batch holds tensors and cannot be opened or copied.
    """
    if isinstance(batch, DataLoader):
        # The loss raises a clearer error for a loader passed as a batch.
        return batch
    values, rebuilt = opened(batch, "batch")
    copies = {id(leaf): _copied(leaf) for leaf in values if is_array(leaf)}
    return rebuilt(copies.get(id(leaf), leaf) for leaf in values) if copies else batch


def _copied(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf.copy()
    # Keep `requires_grad`: a loss may differentiate with respect to its inputs.
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


@contextmanager
def precise(device: torch.device) -> Iterator[None]:
    """Context manager that turns TF32 off, so that CUDA kernels keep the precision of float32."""
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
