"""Hessian of a model's loss over a data set, or over one batch after another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.compat.eigenthings.operator import Operator
from hessfunc.compat.place import evaluated_loss, gradient_with_graph, hessian_of
from hessfunc.losses import LossFunction
from hessfunc.options import at_least, tensor, validated, whole_number
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.examples import examples, microbatches
from hessfunc.transforms.batches.mean import over_batches
from hessfunc.transforms.chunks import Curvature
from hessfunc.trees import Matvec, Tree


class HVPOperator(Operator):
    """Hessian of the mean loss over all examples of a loader, or over one batch after another.

    The parameters are read at each product, so that the operator follows a training.

    Args:
        model: Module whose trainable parameters are used. It is evaluated in eval mode, without
            its wrapper for data parallelism.
        dataloader: Loader of batches ``(inputs, targets)``, the same examples in each pass.
        criterion: Function ``(outputs, targets) -> scalar``, a mean over examples.
        use_gpu: Whether the model is moved to CUDA, if available.
        fp16: Whether products are rounded to float16.
        full_dataset: Whether each product uses all batches. Otherwise it uses the next batch.
        max_possible_gpu_samples: Largest number of examples in a piece of a batch.
        max_samples: Name of ``max_possible_gpu_samples`` in version 0.1, which has priority.

    Attributes:
        grad_vec: Flat gradient of the last `prepare_grad`, zeros before.

    Raises:
        ValueError: If an option is out of range, or if no parameter requires a gradient.
    """

    @validated(max_samples=whole_number)
    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Any],
        criterion: Callable[[Any, Any], Tensor],
        use_gpu: bool = True,
        fp16: bool = False,
        full_dataset: bool = True,
        max_possible_gpu_samples: int = 256,
        *,
        max_samples: int | None = None,
    ) -> None:
        if max_samples is not None:
            max_possible_gpu_samples = max_samples
        at_least(1, max_possible_gpu_samples=max_possible_gpu_samples)
        entries = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if not entries:
            raise ValueError(
                f"no parameter of {type(model).__name__} requires a gradient: call "
                "`model.requires_grad_()`"
            )
        super().__init__(entries)
        self.model = model.cuda() if use_gpu and torch.cuda.is_available() else model
        self.dataloader = dataloader
        self.criterion = criterion
        self.use_gpu = use_gpu
        self.fp16 = fp16
        self.full_dataset = full_dataset
        self.max_possible_gpu_samples = max_possible_gpu_samples
        self.grad_vec = next(self.model.parameters()).new_zeros(entries)
        self._batches: Iterator[Any] = iter(())
        if model.training:
            warnings.warn(
                "the model is in train mode, but the Hessian is computed in eval mode, without "
                "Dropout and with the running statistics of BatchNorm: call `model.eval()` first "
                "to silence this warning",
                stacklevel=3,
            )

    @validated(vec=tensor)
    def apply(self, vec: Tensor) -> Tensor:
        """Return the product with one vector, for all batches or for the next one.

        Raises:
            ValueError: If the vector has another shape than ``(size,)``.
        """
        if vec.shape != (self.size,):
            raise ValueError(
                f"vec has shape {tuple(vec.shape)}, where ({self.size},) is expected: pass a flat "
                "vector, in the order of torch.nn.utils.parameters_to_vector"
            )
        draw = self.draws()
        matvec = self.matvec() if draw is None else draw(0)
        product = matvec(vec[None])[0]
        return product.half() if self.fp16 else product

    def matvec(self) -> Matvec:
        """Return the matvec of all batches on flat vector blocks, at the current parameters."""
        loss, params = self._loss()
        return _flat(
            params, over_batches(self._curvature(loss), weight=examples)(params, self.dataloader)
        )

    def draws(self) -> Callable[[int], Matvec] | None:
        """Return a function that draws the matvec of the next batch; None for all batches."""
        return None if self.full_dataset else self._of_next_batch

    def zero_grad(self) -> None:
        """Set the gradient of each parameter of the model to zero, where there is one."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def prepare_grad(self) -> Tensor:
        """Return the flat gradient with its graph, for all batches or for the next one.

        It is stored as ``grad_vec``. The memory of its graph grows with the size of the data.
        """
        loss, params = self._loss()
        own = [p for p in self.model.parameters() if p.requires_grad]
        at = dict(zip(params, own, strict=True))
        batches = self.dataloader if self.full_dataset else [self._next_batch()]
        gradient = gradient_with_graph(loss, at, batches)
        self.grad_vec = torch.cat([g.reshape(-1) for g in gradient])
        return self.grad_vec

    def like(self, *, use_gpu: bool) -> Tensor:
        """Return a vector of zeros with the size, dtype and device of the parameters."""
        space = space_of(self._loss()[1])
        return space.zeros(1, space.dtype)[0]

    def _loss(self) -> tuple[LossFunction, Tree]:
        return evaluated_loss(self.model, self.criterion)

    def _of_next_batch(self, _: int) -> Matvec:
        loss, params = self._loss()
        return _flat(params, self._curvature(loss)(params, self._next_batch()))

    def _next_batch(self) -> Any:
        for _ in range(2):
            for batch in self._batches:
                return batch
            self._batches = iter(self.dataloader)
        raise ValueError("the dataloader has no batch: pass at least one")

    def _curvature(self, loss: LossFunction) -> Curvature:
        hessian = hessian_of(loss, [p for p in self.model.parameters() if p.requires_grad])

        def of_batch(params: Tree, batch: Any) -> Matvec:
            pieces = microbatches(batch, self.max_possible_gpu_samples)
            mean = over_batches(hessian, weight=examples, keep=len(pieces) == 1)
            return mean(params, pieces)

        return of_batch


def _flat(params: Tree, matvec: Matvec) -> Matvec:
    space = space_of(params)
    return lambda rows: space.ravel(matvec(space.unravel(rows)))
