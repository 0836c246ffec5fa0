"""Evaluation of a loss for a matvec: its context, copies of parameters, and checks of its value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessfunc.autograd import explained, kept_batch, refuse_autocast
from hessfunc.autograd.constant_matrix import Product
from hessfunc.changes import Reads, reading, unchanged
from hessfunc.containers import batch_leaves
from hessfunc.losses import LossFunction
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.reductions import noted
from hessfunc.transforms.chunks import Chunks, block_matvec
from hessfunc.trees import Matvec, Tree


@dataclass(frozen=True)
class Point:
    """Parameters and a batch at which the graph of a product is made.

    Attributes:
        space: Space of the vectors.
        leaves: Leaves of the parameters, which must not change while products are computed.
        copies: Copies of the leaves, which belong to the graph.
        batch: Copy of the batch.
        reads: Other tensors that the loss reads, which must not change either.
        constants: Tensors that require a gradient, of which products carry no graph.
    """

    space: Space
    leaves: Sequence[Tensor]
    copies: Sequence[Tensor]
    batch: Any
    reads: Reads
    constants: Sequence[Tensor]

    def inputs(self) -> list[Tensor]:
        """Return new leaves at the copies that require a gradient."""
        return [leaf.detach().requires_grad_() for leaf in self.copies]

    def matvec(
        self,
        product: Product,
        /,
        *,
        chunks: Chunks,
        again: bool = False,
        others: Sequence[Tensor] = (),
    ) -> Matvec:
        """Return the matvec of a function that multiplies one vector.

        Args:
            product: Function from the leaves of one vector to the leaves of its product.
            chunks: Division of a block into chunks.
            again: Whether each product evaluates the loss again.
            others: Further tensors of which products carry no graph.
        """
        return block_matvec(
            product,
            self.space,
            self.leaves,
            self.batch,
            chunks=chunks,
            copies=self.copies,
            refuse_if_changed=self.reads.unchanged(again=again),
            constants=[*self.constants, *others],
        )


@contextmanager
def linearising(loss: LossFunction, space: Space, params: Tree, batch: Any, /) -> Iterator[Point]:
    """Context manager in which the graph of a product is made, at copies of params and batch."""
    refuse_autocast(space.device)
    leaves = space.tree_leaves(params)
    constants = requiring_gradients(leaves, batch)
    with (
        torch.inference_mode(False),
        explained(space, batch),
        noted(loss, params, batch),
        reading() as reads,
    ):
        given = kept_batch(batch)
        yield Point(space, leaves, kept(space, leaves), given, reads, constants)


def kept(space: Space, leaves: Sequence[Tensor], /) -> list[Tensor]:
    """Copy the parameters of a matvec, so that it keeps their present values.

    A write through ``.data`` or NumPy does not change the version of a tensor, so a kept graph
    would combine new weights with old activations.

    Raises:
        RuntimeError: If another thread changes a leaf meanwhile, so that the copies would mix the
            parameters of two steps of an optimiser.
    """
    refuse_if_changed = unchanged(space.names, leaves)
    copies = [leaf.detach().clone() for leaf in leaves]
    refuse_if_changed()
    return copies


def requiring_gradients(leaves: Sequence[Tensor], batch: Any, /) -> list[Tensor]:
    """Return the parameters, and the tensors of a batch, that require a gradient."""
    tensors = (x for x in batch_leaves(batch) if isinstance(x, Tensor))
    return [x for x in (*leaves, *tensors) if x.requires_grad]


def gradient_of(
    value: Tensor, inputs: Sequence[Tensor], *, create_graph: bool, name: str = "params"
) -> list[Tensor]:
    """Return the gradient of the value of a loss, with zeros for inputs that it does not use.

    Args:
        value: Value of the loss.
        inputs: Leaves of the graph.
        create_graph: Whether the gradient carries its graph.
        name: Name of the inputs for the message.

    Raises:
        ValueError: If the value depends on none of the inputs.
    """
    gradient: Sequence[Tensor | None] = ()
    if value.requires_grad:
        gradient = torch.autograd.grad(value, inputs, create_graph=create_graph, allow_unused=True)
    return filled(gradient, inputs, name)


def filled(
    gradient: Sequence[Tensor | None], inputs: Sequence[Tensor], name: str = "params"
) -> list[Tensor]:
    """Return a gradient with None replaced by zeros, or raise if all of its leaves are None."""
    if all(g is None for g in gradient):
        raise independent(name)
    return [
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(inputs, gradient, strict=True)
    ]


def independent(name: str = "params", /) -> ValueError:
    """Return the error for a loss that does not depend on what it is differentiated by."""
    return ValueError(
        f"the loss does not depend on {name}: compute it from the {name} that it is given, not "
        "from the module itself, and not under `torch.no_grad()` or after `.detach()`"
    )


def checked(value: Any, space: Space, point: Sequence[Tensor]) -> Tensor:
    """Return the value of a loss, or raise, on every rank, if it is not a finite scalar."""
    if space.distributed:
        # The loss is the same on every rank.
        return _checked(value, space, point)
    return space.on_all(lambda: _checked(value, space, point))


def _checked(value: Any, space: Space, point: Sequence[Tensor]) -> Tensor:
    value = scalar(value)
    if not torch.isfinite(value):
        for name, leaf in zip(space.names, point, strict=True):
            if not torch.isfinite(leaf).all():
                raise ValueError(
                    f"parameter {name!r} has entries that are NaN or infinite: load or initialise "
                    "it again"
                )
        raise ValueError(
            f"the loss is {value.item()} at finite parameters: check the batch for NaN and "
            "infinite entries"
        )
    return value


def scalar(value: Any) -> Tensor:
    """Return the value of a loss, or raise if it is not a scalar tensor."""
    if not isinstance(value, Tensor) or value.dim() > 0:
        if not isinstance(value, Tensor):
            raise ValueError(f"the loss must be a scalar tensor, not a {type(value).__name__}")
        raise ValueError(
            f"the loss must be a scalar tensor, not of shape {tuple(value.shape)}: return its mean"
        )
    if value.is_complex():
        raise ValueError("the loss is complex: return its real part, `loss.real`, or `loss.abs()`")
    return value
