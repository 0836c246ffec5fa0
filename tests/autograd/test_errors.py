"""Errors of torch, explained: what cannot be differentiated, and what to do."""

from __future__ import annotations

import pytest
import torch

from hessfunc.autograd.errors import explained, explanation, lacks_forward_mode
from hessfunc.spaces.of import space_of

SPACE = space_of({"w": torch.zeros(3)})
BATCH = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("text", "kind", "advice"),
    [
        ("Target 3 is out of bounds.", ValueError, "the class 3, .* `ignore_index=3`"),
        (
            "expected target dtype to be Long or Byte, but got Double",
            TypeError,
            "have the dtype Double.*`targets.long",
        ),
        (
            "0D or 1D target tensor expected, multi-target not supported",
            ValueError,
            "`targets.squeeze.1.`",
        ),
        ("index out of range in self", ValueError, "beyond the last row of its embedding"),
        (
            "the derivative of 'grid_sampler_2d_backward' is not implemented.",
            NotImplementedError,
            "grid_sampler_2d has no second derivative.*mode='difference'",
        ),
        (
            "derivative for aten::_ctc_loss_backward is not implemented",
            NotImplementedError,
            "_ctc_loss has no second derivative",
        ),
        (
            "trying to differentiate twice a function that was marked with @once_differentiable",
            NotImplementedError,
            "once_differentiable has no second derivative",
        ),
        (
            "Trying to use forward AD with _embedding_bag that does not support it",
            NotImplementedError,
            "_embedding_bag is not supported in forward mode: use `hvp.loss, mode='reverse'",
        ),
        (
            "aten.mm.default: got mixed torch.Tensor and DTensor",
            ValueError,
            "mm combines a plain tensor with a DTensor",
        ),
        (
            "Cannot access data pointer of Tensor that doesn't have storage",
            NotImplementedError,
            "the loss leaves torch",
        ),
        (
            "You are attempting to call Tensor.requires_grad_() inside of a function",
            NotImplementedError,
            r"calls `requires_grad_\(\)`.*mode='reverse'",
        ),
        (
            "Inference tensors cannot be saved for backward",
            RuntimeError,
            "made in `torch.inference_mode",
        ),
        (
            "one of the variables has been modified by an inplace operation",
            RuntimeError,
            "has changed in place.*`batch.clone",
        ),
        (
            "torch.compile does not currently support double backward",
            NotImplementedError,
            "model._orig_mod",
        ),
        (
            "When use_reentrant=True, checkpoint is not compatible with .grad()",
            NotImplementedError,
            r"functional\(model, recompute=",
        ),
    ],
)
def test_a_known_error_says_what_to_do(text: str, kind: type[Exception], advice: str) -> None:
    error = RuntimeError(text)
    with pytest.raises(kind, match=advice) as caught, explained(SPACE, BATCH):
        raise error
    assert caught.value.__cause__ is error


def test_an_unknown_error_comes_through() -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert explanation(error, SPACE, BATCH) is None
    with pytest.raises(RuntimeError) as caught, explained(SPACE, BATCH):
        raise error
    assert caught.value is error


def test_a_batch_on_another_device_is_the_cause_of_an_unknown_error() -> None:
    error = RuntimeError("Expected all tensors to be on the same device")
    found = explanation(error, SPACE, {"x": BATCH.to("meta")})
    assert "the batch has tensors on meta" in str(found)


def test_operations_without_forward_mode_are_named() -> None:
    error = RuntimeError("Trying to use forward AD with _cdist_backward that does not support it")
    assert lacks_forward_mode(error) == "_cdist"
    assert lacks_forward_mode(RuntimeError("another error")) is None


def test_nested_batches_are_the_cause_of_an_unknown_error() -> None:
    rows = [torch.zeros(2, 3), torch.zeros(1, 3)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    found = explanation(RuntimeError("A view was created in no_grad mode"), SPACE, nested)
    assert "to_padded_tensor" in str(found)
