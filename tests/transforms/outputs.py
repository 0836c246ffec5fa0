"""Outputs and targets of criteria, and losses whose parameters are the outputs."""

from __future__ import annotations

from typing import Any

import torch

import hessfunc as hf

LOGITS = torch.linspace(-2, 3, 24).double().sin().mul(2).view(6, 4)
CLASSES = torch.tensor([0, 1, 3, 2, 1, 0])
TARGETS = torch.linspace(-1, 2, 24).double().cos().view(6, 4)


def of_outputs(criterion: Any) -> hf.Loss:
    """A model whose outputs are its parameters: its GGN is the output Hessian."""
    return hf.supervised(lambda p, _: p["z"], criterion)
