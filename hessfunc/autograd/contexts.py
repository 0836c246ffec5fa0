"""Context managers for products: exact second derivatives, fixed random draws, full precision."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import (
    _saved_tensors_hooks_disable,
    _saved_tensors_hooks_enable,
    _saved_tensors_hooks_get_disabled_error_message,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from hessfunc.autograd.corrections import EXACT
from hessfunc.autograd.functorch import evaluating
from hessfunc.autograd.overrides import Replaced, Replacements
from hessfunc.autograd.shared import Shared
from hessfunc.autograd.streams import Streams
from hessfunc.containers import batch_leaves, is_array, mapped, opened
from hessfunc.trees import leaves


@contextmanager
def differentiable_twice(
    device: torch.device,
    replaced: Replacements | Replaced = EXACT,
    *,
    streams: Streams | None = None,
) -> Iterator[Replaced]:
    """Context manager in which losses are evaluated so that they can be differentiated twice.

    Functions in ``replaced`` are computed by their replacements. Random layers always draw from
    the same fixed seed, so that products are symmetric and torch's random stream is not changed.
    All of it belongs to the thread. Three settings exist only for the whole process, and are
    changed while any thread needs them (see `Shared`): functions wrapped by `torch.compile` run
    uncompiled; on CUDA devices, TF32 is off; and with DTensors, the backward of
    `DTensor.from_local` is differentiable. `without_cudnn` is a fourth one.

    Args:
        device: Device of the parameters.
        replaced: Replacements of torch functions, by function, or a mode that applies them.
        streams: Random streams of the evaluation. None starts new ones at seed 0.

    Yields:
        Mode that applies the replacements and records hooks.
    """
    mode = replaced if isinstance(replaced, Replaced) else Replaced(replaced)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_uncompiled())
        stack.enter_context(precise(device))
        stack.enter_context(torch.enable_grad())
        if "torch.distributed.tensor" in sys.modules:
            # The import is slow, and a model with DTensors has already done it.
            from hessfunc.autograd.redistribution import TWICE_DIFFERENTIABLE

            stack.enter_context(TWICE_DIFFERENTIABLE.held())
        mode.draw_from(Streams() if streams is None else streams)
        stack.enter_context(evaluating())
        # Enter the mode last: it observes `no_grad`, and must not see the contexts above.
        stack.enter_context(mode)
        yield mode


def _uncompiled() -> AbstractContextManager[Any]:
    """Run wrappers of `torch.compile` uncompiled, as compiled graphs have no second derivative."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return nullcontext()
    return _EAGER.held()


_EAGER = Shared(lambda: torch.compiler.set_stance("force_eager"))


def refuse_autocast(device: torch.device, /) -> None:
    """Raise if the caller has enabled autocast, which would also round the algorithms' arithmetic.

    Raises:
        RuntimeError: If autocast is enabled for the device.
        ValueError: If the device is "meta".
    """
    if device.type == "meta":
        raise ValueError(
            "the parameters are on the device 'meta', so they have no values: load the weights, or "
            "call `model.to_empty(device='cpu')` and initialise them"
        )
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
def rereading(batch: Any, /) -> Iterator[None]:
    """Context manager of an evaluation that is not the only one of a batch.

    Raises:
        ValueError: If the loss changes a tensor of the batch in place, which the next evaluation
            would read.
    """
    tensors = [x for x in batch_leaves(batch) if isinstance(x, Tensor) and not x.is_inference()]
    versions = [x._version for x in tensors]
    yield
    if versions != [x._version for x in tensors]:
        raise ValueError(
            "the loss changes its batch in place, so that its next evaluation would differ: use an "
            "operation out of place, such as `x = x + 1` or a first layer with `inplace=False`"
        )


class Precision(TorchDispatchMode):
    """Dispatch mode that records the coarsest dtype of a computation.

    Attributes:
        dtype: Floating-point dtype with the largest rounding of all results; None without results.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype: torch.dtype | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                coarser = self.dtype is None or _eps(leaf.dtype) > _eps(self.dtype)
                self.dtype = leaf.dtype if coarser else self.dtype
        return out


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def precise(device: torch.device) -> AbstractContextManager[Any]:
    """Context manager that turns TF32 off, so that CUDA kernels keep the precision of float32."""
    return _WITHOUT_TF32.held() if device.type == "cuda" else nullcontext()


@contextmanager
def _without_tf32() -> Iterator[None]:
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cuda.allow_tf32
    cudnn.allow_tf32 = cuda.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, cuda.allow_tf32 = before


_WITHOUT_TF32 = Shared(_without_tf32)


def without_cudnn(device: torch.device) -> AbstractContextManager[Any]:
    """Context manager that turns cuDNN off, whose recurrent layers have no second derivative.

    Torch's own kernels have one. CPUs do not use cuDNN, and nothing changes for them.
    """
    return _WITHOUT_CUDNN.held() if device.type == "cuda" else nullcontext()


@contextmanager
def _cudnn_off() -> Iterator[None]:
    # `torch.backends.cudnn.flags` would also restore TF32, which other threads may hold off.
    before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


_WITHOUT_CUDNN = Shared(_cudnn_off)


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Context manager of a model's forward, in which `torch.utils.checkpoint` is refused."""
    # torch.utils.checkpoint would recompute in the backward pass with the module's own parameters
    # instead of ``params``.
    refusal = (
        "torch.utils.checkpoint (gradient checkpointing) does not support second derivatives: "
        "turn it off, and use functional(model, recompute='model.layers.*') instead"
    )
    before = _saved_tensors_hooks_get_disabled_error_message()
    # `disable_saved_tensors_hooks` would raise if hooks are active. Those are the user's own, such
    # as save_on_cpu, and stay.
    _saved_tensors_hooks_disable(refusal, fail_if_non_empty=False)
    try:
        yield
    finally:
        if before is None:
            _saved_tensors_hooks_enable()
        else:
            _saved_tensors_hooks_disable(before, fail_if_non_empty=False)
