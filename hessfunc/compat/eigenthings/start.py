"""Where a run starts: from a given vector, or where torch's random stream says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessfunc.compat.eigenthings.operator import Operator
from hessfunc.compat.place import seed_of_stream


@dataclass(frozen=True)
class Start:
    """Where a run on an operator starts.

    Attributes:
        like: what its vectors look like.
        vector: the first; None for a random one.
        seed: of that.
    """

    like: Tensor
    vector: Tensor | None
    seed: int

    @classmethod
    def of(cls, operator: Operator, vector: Any = None, /, *, use_gpu: bool, fp16: bool) -> Start:
        """From this vector, or from a random one, by the random stream of torch."""
        like = operator.like(use_gpu=use_gpu)
        if fp16:
            like = like.half()
        if vector is not None:
            vector = torch.as_tensor(vector).to(like)
        return cls(like, vector, seed_of_stream())
