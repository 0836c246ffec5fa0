"""A basis that lies on the device of the vectors, and is brought there all the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from hessfunc.algorithms import basis, density
from hessfunc.algorithms import offload as streamed
from hessfunc.algorithms.eigen import lanczos_state


@contextmanager
def every_basis_is_far(piece: int = 2**12) -> Iterator[None]:
    """Inside, no basis is where it is used, and a piece of it has so many bytes."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (basis, density, lanczos_state, streamed):
            patch.setattr(module, "is_far", lambda kept, used: True)
        patch.setattr(streamed, "_PIECE", piece)
        yield


@contextmanager
def copies_are_late() -> Iterator[None]:
    """Inside, copies are made when something waits for them, and not before: as late as a GPU may.

    Whoever reads what was not waited for, or writes over what is still to be copied, finds
    something else: NaN in memory that is new.
    """
    queued: list[tuple[Tensor, Tensor]] = []

    def made(_: object) -> None:
        for target, source in queued:
            target.copy_(source)
        queued.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "_copy", lambda target, source: queued.append((target, source)))
        patch.setattr(streamed, "_wait_for_copies", made)
        patch.setattr(streamed, "_finish_copies", made)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
    assert not queued


@contextmanager
def counted_copies() -> Iterator[list[int]]:
    """Bytes of the copies that are made inside."""
    sizes: list[int] = []
    copy = streamed._copy

    def counted(target: Tensor, source: Tensor) -> None:
        sizes.append(target.numel() * target.itemsize)
        copy(target, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "_copy", counted)
        yield sizes
