"""Torch's random numbers as a stream of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


@dataclass
class Stream:
    """A stream that goes on from where it was left, whatever others draw.

    Attributes:
        device: where is drawn, besides the CPU.
        states: of the generators of the CPU and of the device.
    """

    device: torch.device
    states: list[Tensor]

    @classmethod
    def of(cls, seed: int, device: torch.device) -> Stream:
        """One that begins at a seed."""
        with seeded(seed):
            states = [torch.default_generator.get_state()]
        if device.type == "cuda":
            states.append(torch.Generator(device).manual_seed(seed).get_state())
        return cls(device, states)

    @contextmanager
    def here(self) -> Iterator[None]:
        """Inside, torch draws from this stream; afterwards it is where it was."""
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
        """The items, which are made from this stream's draws."""
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


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's CPU stream starts at ``seed``; afterwards it is where it was."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would reseed the accelerators too, which fork_rng does not restore here.
        torch.default_generator.manual_seed(seed)
        yield
