"""Isolate measurements from a training: random streams, autocast and loader workers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module, batches: Any, /) -> Iterator[None]:
    """Context without autocast that restores all random streams at its end.

    These are the streams of Python, NumPy, torch on the CPU and on the model's devices, and the
    loader's own generators.
    """
    kinds = {p.device.type for p in model.parameters()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    generators = _generators(batches)
    of_loader = [generator.get_state() for generator in generators]
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=list(devices)))
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
            for generator, state in zip(generators, of_loader, strict=True):
                generator.set_state(state)


def refuse_busy_workers(batches: Any, /) -> None:
    """Raise for a loader with persistent workers, because it supports only one pass at a time.

    A second pass would end the pass of the training.

    Raises:
        ValueError: If the loader has persistent workers.
    """
    if getattr(batches, "persistent_workers", False):
        raise ValueError(
            "the loader has persistent_workers=True, so that a pass for a measurement would end "
            "the pass of the training: pass another loader, or a list of batches"
        )


def _generators(batches: Any) -> list[torch.Generator]:
    sampler, of_batches = (getattr(batches, name, None) for name in ("sampler", "batch_sampler"))
    owners = (batches, sampler, of_batches, getattr(of_batches, "sampler", None))
    generators = (getattr(owner, "generator", None) for owner in owners)
    return list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())
