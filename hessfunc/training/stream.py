"""Separate random stream for torch's global generators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hessfunc.randomness import seeded

Item = TypeVar("Item")


@dataclass
class Stream:
    """Random stream that other draws do not affect.

    Attributes:
        device: Device on which random numbers are drawn, in addition to the CPU.
        states: States of the generators of the CPU and of the device.
    """

    device: torch.device
    states: list[Tensor]

    @classmethod
    def of(cls, seed: int, device: torch.device) -> Stream:
        """Return the stream that starts at a seed."""
        with seeded(seed):
            states = [torch.default_generator.get_state()]
        if device.type == "cuda":
            states.append(torch.Generator(device).manual_seed(seed).get_state())
        return cls(device, states)

    @contextmanager
    def here(self) -> Iterator[None]:
        """Context in which torch draws from this stream; its own stream is restored at the end."""
        generators = self._generators()
        before = [generator.get_state() for generator in generators]
        for generator, state in zip(generators, self.states, strict=True):
            generator.set_state(state)
        try:
            yield
        finally:
            self.states = [generator.get_state() for generator in generators]
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)

    def each(self, items: Iterable[Item], /) -> Iterator[Item]:
        """Yield the items of an iterable that draws its random numbers from this stream."""
        with self.here():
            rest = iter(items)
        while True:
            with self.here():
                try:
                    item = next(rest)
                except StopIteration:
                    return
            yield item

    def _generators(self) -> list[torch.Generator]:
        if self.device.type != "cuda":
            return [torch.default_generator]
        torch.cuda.init()
        index = self.device.index if self.device.index is not None else torch.cuda.current_device()
        return [torch.default_generator, torch.cuda.default_generators[index]]
