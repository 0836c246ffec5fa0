"""The device that is measured: the environment variable HESSFUNC_BENCH_DEVICE, or the CPU.

Processes that measure memory inherit the variable.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

VARIABLE = "HESSFUNC_BENCH_DEVICE"


def device() -> torch.device:
    """Where nets, batches and vectors are."""
    return torch.device(os.environ.get(VARIABLE, "cpu"))


def full_precision() -> None:
    """Turn TF32 off for everybody: products of ours never use it, and times are compared."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def on_device(found: Tensor) -> Tensor:
    """The tensor, moved there."""
    return found.to(device())


def wait() -> None:
    """Until the device has done what was asked of it."""
    if device().type == "cuda":
        torch.cuda.synchronize(device())
