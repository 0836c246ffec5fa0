"""The device on which all is measured: the environment variable HESSFUNC_BENCH_DEVICE, or the CPU.

A variable, as processes that measure memory inherit it.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

__all__ = ["VARIABLE", "device", "name", "on_device", "wait"]

VARIABLE = "HESSFUNC_BENCH_DEVICE"


def device() -> torch.device:
    """Where nets, batches and vectors are."""
    return torch.device(os.environ.get(VARIABLE, "cpu"))


def name() -> str:
    """The device as its maker calls it."""
    return torch.cuda.get_device_name(device()) if device().type == "cuda" else "cpu"


def on_device(found: Tensor) -> Tensor:
    """The tensor, moved there."""
    return found.to(device())


def wait() -> None:
    """Until the device has done what was asked of it."""
    if device().type == "cuda":
        torch.cuda.synchronize(device())
