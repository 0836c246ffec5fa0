"""Measurements that a training does not notice."""

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
    """Afterwards all random streams are where they were; inside, autocast is off.

    Streams of Python, NumPy, torch on the CPU and on the model's devices, and a loader's own.
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
    """A loader that keeps its workers has one pass at a time: a second one ends the training's.

    Raises:
        ValueError: it is one.
    """
    if getattr(batches, "persistent_workers", False):
        raise ValueError(
            "the loader keeps its workers (persistent_workers=True), so that a pass over it for "
            "a measurement would end the training's own: pass another loader, or a list of batches"
        )


def _generators(batches: Any) -> list[torch.Generator]:
    sampler, of_batches = (getattr(batches, name, None) for name in ("sampler", "batch_sampler"))
    owners = (batches, sampler, of_batches, getattr(of_batches, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
