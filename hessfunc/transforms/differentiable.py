"""Products that can be differentiated, mapped and compiled like any function of torch.

The fast path of a curvature function keeps a graph in which parameters and batch are constants.
Here, products keep the graph of parameters, batch and vectors. They are made of torch's own
operations, so that every transform of `torch.func` and autograd itself can follow them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction

from hessfunc.autograd import differentiable_twice, explained, refuse_autocast
from hessfunc.autograd.constant_matrix import Product
from hessfunc.autograd.functorch import nodes_of, transforming
from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.transformable import TRANSFORMABLE
from hessfunc.containers import is_array, opened
from hessfunc.spaces.of import space_of
from hessfunc.transforms.evaluation import independent
from hessfunc.trees import Matvec, Tree, flatten, leaves

Rebuild: TypeAlias = Callable[[Sequence[Tensor]], Tree]


class Linearisation(ABC):
    """Curvature of a loss as a differentiable function of parameters, batch and vector."""

    @abstractmethod
    def by_transforms(self, rebuild: Rebuild, point: Sequence[Tensor], batch: Any, /) -> Product:
        """Return the product with one vector, by `torch.func.vjp`.

        Args:
            rebuild: Function from leaves to the tree of parameters.
            point: Leaves of the parameters.
            batch: Batch.
        """

    @abstractmethod
    def by_autograd(self, rebuild: Rebuild, point: Sequence[Tensor], batch: Any, /) -> Product:
        """Return the product with one vector, by `torch.autograd.grad` through a kept graph.

        On small models it is several times faster than `by_transforms`, but transforms cannot
        differentiate it.
        """


def differentiable_matvec(
    linearisation: Linearisation, params: Tree, batch: Any, /, *, chunk_size: int | None
) -> Matvec:
    """Return the matvec of a linearisation, with the graph of parameters, batch and vectors.

    Args:
        linearisation: Curvature of a loss.
        params: Parameters, which may require a gradient or belong to a transform.
        batch: Batch, likewise.
        chunk_size: Number of vectors in one pass by vmap. With None, a transform maps the whole
            block, and autograd multiplies it by a loop.
    """
    # Dynamo traces this function: it follows torch, but neither optree nor checks on the host.
    compiling = torch.compiler.is_compiling()
    entries, structure = flatten(params)
    point: list[Tensor] = entries
    if not compiling:
        space = space_of(params)
        refuse_autocast(space.device)
    if not transforming():
        # Inside of a transform, copies would wrap even tensors that do not belong to it.
        with torch.inference_mode(False):
            batch = _attached_batch(batch)
            point = [_attached(leaf) for leaf in entries]

    def made() -> Product:
        if transforming():
            return linearisation.by_transforms(structure.unflatten, point, batch)
        inputs = [leaf if leaf.requires_grad else leaf.requires_grad_() for leaf in point]
        return linearisation.by_autograd(structure.unflatten, inputs, batch)

    is_for_transforms = transforming()
    if compiling:
        product = made()
    else:
        with torch.inference_mode(False), explained(space, batch):
            product = made()

    def matvec(block: Tree) -> Tree:
        tangents = leaves(block) if compiling else space.block_leaves(block)
        if compiling:
            _refuse_shapes(tangents, point)
        tangents = [t.to(leaf.dtype) for t, leaf in zip(tangents, point, strict=True)]
        # The transforms of torch.func take a graph of autograd as a constant.
        now = product if is_for_transforms or not transforming() else made()
        return structure.unflatten(_of_block(now, tangents, chunk_size))

    return matvec


def _attached(leaf: Tensor) -> Tensor:
    """Copy a leaf together with its graph."""
    if leaf.requires_grad and torch.is_grad_enabled():
        return leaf.clone()
    return leaf.detach().clone()


def _attached_batch(batch: Any) -> Any:
    """Copy the tensors and arrays of a batch together with their graph."""
    values, rebuilt = opened(batch, "batch")
    copies: dict[int, Any] = {
        id(x): _attached(x) if isinstance(x, Tensor) else x.copy() for x in values if is_array(x)
    }
    return rebuilt(copies.get(id(x), x) for x in values) if copies else batch


def _refuse_shapes(tangents: Sequence[Tensor], point: Sequence[Tensor]) -> None:
    if [t.shape[1:] for t in tangents] != [leaf.shape for leaf in point]:
        raise ValueError(
            "the block of vectors does not have the shapes of the parameters after its first "
            "axis: pass a tree like params whose leaves have one leading axis"
        )


def _of_block(
    product: Product, tangents: Sequence[Tensor], chunk_size: int | None
) -> Sequence[Tensor]:
    k = len(tangents[0])
    if k == 1:
        return [out.unsqueeze(0) for out in product([t.squeeze(0) for t in tangents])]
    if chunk_size == 1 or (chunk_size is None and not transforming()):
        columns = [product([t[i] for t in tangents]) for i in range(k)]
        return [torch.stack(parts) for parts in zip(*columns, strict=True)]
    mapped = torch.vmap(product, randomness="same", chunk_size=chunk_size)
    return list(mapped(list(tangents)))


@contextmanager
def every_order(device: torch.device) -> Iterator[Replaced]:
    """Context in which losses are evaluated so that derivatives of any order are exact."""
    if torch.compiler.is_compiling():
        with Replaced(TRANSFORMABLE) as mode:
            yield mode
    else:
        # A pullback that recomputes must run in the transforms in which it was made; a product runs
        # in others.
        mode = Replaced(TRANSFORMABLE, recomputes=not transforming())
        with differentiable_twice(device, mode):
            yield mode


def pullback_with_graph(outputs: Sequence[Tensor], inputs: Sequence[Tensor], /) -> Product:
    """Return the function that maps cotangents of outputs to cotangents of inputs, with its graph.

    The graph is kept for further calls.
    """

    def pulled(cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        if not outputs:
            return [torch.zeros_like(leaf) for leaf in inputs]
        return torch.autograd.grad(
            outputs,
            inputs,
            cotangents,
            create_graph=torch.is_grad_enabled(),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )

    return pulled


def refuse_untransformable(value: Tensor, /) -> None:
    """Check a value inside `torch.func.grad` or `torch.func.vjp`, as `hvp` does outside of them.

    Whether the backward of a custom function can be differentiated again is verified by calls with
    plain tensors, which a transform does not give.

    Raises:
        ValueError: If the value does not depend on the differentiated arguments.
        NotImplementedError: If its graph has a custom function of the user.
    """
    if torch.compiler.is_compiling():
        return
    if not value.requires_grad:
        raise independent()
    for node in nodes_of([value]):
        if not isinstance(node, BackwardCFunction):
            continue
        function = _source(node._forward_cls)  # type: ignore[attr-defined]
        if function.__module__.partition(".")[0] not in ("hessfunc", "torch"):
            raise NotImplementedError(
                f"the loss calls {function.__qualname__}, a custom autograd function, whose second "
                "derivative cannot be verified inside the transforms of torch.func: use "
                "`differentiable=True` with plain autograd, or write it with torch operations"
            )


def _source(generated: type[Function]) -> type[Function]:
    """Return the function from which torch.func has generated one for a single level."""
    for cell in generated.forward.__closure__ or ():
        held = cell.cell_contents
        if isinstance(held, type) and issubclass(held, Function):
            return held
    return generated
