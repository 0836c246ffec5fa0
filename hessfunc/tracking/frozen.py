"""Fixed batches, on which the points of a training can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.containers import batch_leaves, mapped
from hessfunc.options import at_least, validated, whole_number
from hessfunc.options.data import batches as readable
from hessfunc.tracking.undisturbed import undisturbed
from hessfunc.transforms.batches.checksum import Checksum
from hessfunc.transforms.batches.mean import refuse_one_batch


@validated(loader=readable, batches=whole_number)
def frozen(loader: Iterable[Any], /, batches: int = 4) -> list[Any]:
    """Return copies of the first batches of a loader.

    A loader that shuffles or augments randomly has other examples in each pass. A curve of the
    curvature during training would also show the differences between them. The copies are the same
    at each point:

        measured_on = hf.tracking.frozen(loader, batches=4)
        with hf.tracking.tracked(model, criterion, measured_on, every=100) as tracker:

    Args:
        loader: Loader or another iterable of batches of any structure. The random streams of
            Python, NumPy, torch and the loader keep their state.
        batches: Number of batches.

    Returns:
        List of copied batches; fewer if the loader ends earlier.

    Raises:
        ValueError: If ``batches`` is not positive, or if the loader has no batch.
    """
    at_least(1, batches=batches)
    with undisturbed(nn.Module(), loader):
        copies = [mapped(torch.clone, batch, "batch") for batch in islice(loader, batches)]
    if not copies:
        raise ValueError("the loader has no batch: pass a loader with at least one")
    return copies


def refuse_changing(batches: Iterable[Any], /) -> None:
    """Raise unless two passes over the batches have the same examples, in any order.

    A list of batches is not read.

    Raises:
        TypeError: If the batches are a single batch, or can be read only once.
        ValueError: If the passes have different examples.
    """
    refuse_one_batch(batches)
    if isinstance(batches, Sequence):
        return
    with undisturbed(nn.Module(), batches):
        first, second = (_checksum(batches) for _ in range(2))
    if not torch.allclose(first, second, rtol=1e-9, atol=0.0):
        raise ValueError(
            "two passes over the batches have different examples, from random augmentation or from "
            "`shuffle` together with `drop_last`, so that points of a training could not be "
            "compared: measure on fixed batches, `hf.tracking.frozen(loader, batches=4)`"
        )


def _checksum(batches: Iterable[Any]) -> Tensor:
    checksum = Checksum(torch.device("cpu"))
    for batch in batches:
        checksum.add(batch)
    return checksum.total


def outside_inference(batches: Iterable[Any], /) -> Iterable[Any]:
    """Return batches without tensors that were made in inference mode, which have no gradient."""
    if not isinstance(batches, Sequence) or not any(
        isinstance(leaf, Tensor) and leaf.is_inference()
        for batch in batches
        for leaf in batch_leaves(batch)
    ):
        return batches
    return [mapped(torch.clone, batch, "batch") for batch in batches]
