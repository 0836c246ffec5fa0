"""Floating-point tensors of a model's outputs, and the rest."""

from types import SimpleNamespace

import torch

from hessfunc.transforms.outputs import floating_part


def test_outputs_are_rebuilt_around_other_tensors() -> None:
    logits, classes = torch.randn(4, 3), torch.arange(4)
    outputs = {"logits": logits, "classes": classes, "extra": SimpleNamespace(scale=logits[0])}
    floating, rest = floating_part(outputs)
    assert [x is y for x, y in zip(floating, (logits, outputs["extra"].scale), strict=True)] == [
        True,
        True,
    ]
    made = rest.outputs([logits + 1, logits[0] + 2])
    assert torch.equal(made["logits"], logits + 1)
    assert torch.equal(made["extra"].scale, logits[0] + 2)
    assert made["classes"] is classes
    assert outputs["logits"] is logits


def test_a_tensor_is_its_own_floating_part() -> None:
    logits = torch.randn(4, 3)
    floating, rest = floating_part(logits)
    assert floating[0] is logits
    other = torch.zeros(4, 3)
    assert rest.outputs([other]) is other
