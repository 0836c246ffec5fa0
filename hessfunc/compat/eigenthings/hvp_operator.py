"""The Hessian of a model's loss over a data set, or of its batches in turn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.compat.eigenthings.operator import Operator
from hessfunc.compat.place import evaluated_loss
from hessfunc.losses import LossFunction
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.examples import examples, microbatches
from hessfunc.transforms.batches.mean import over_batches
from hessfunc.transforms.chunks import Curvature
from hessfunc.transforms.hessian import hvp
from hessfunc.trees import Matvec, Tree


class HVPOperator(Operator):
    """The Hessian of the mean loss over all examples of a loader, or of one batch after another.

    The parameters are read at each product, so that an operator follows a training.

    Args:
        model: of which all parameters that require a gradient count; evaluated in eval mode, and
            unwrapped where it is wrapped for data parallelism.
        dataloader: of batches ``(inputs, targets)``; one that is read again gives the same
            examples.
        criterion: ``(outputs, targets) -> scalar``, a mean over examples.
        use_gpu: move the model to CUDA, where there is one.
        fp16: products are rounded to float16.
        full_dataset: each product is with all batches; or with the next one.
        max_possible_gpu_samples: a batch is cut into pieces of at most so many examples.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Any],
        criterion: Callable[[Any, Any], Tensor],
        use_gpu: bool = True,
        fp16: bool = False,
        full_dataset: bool = True,
        max_possible_gpu_samples: int = 256,
    ) -> None:
        self.model = model.cuda() if use_gpu and torch.cuda.is_available() else model
        super().__init__(sum(p.numel() for p in model.parameters() if p.requires_grad))
        self.dataloader = dataloader
        self.criterion = criterion
        self.use_gpu = use_gpu
        self.fp16 = fp16
        self.full_dataset = full_dataset
        self.max_possible_gpu_samples = max_possible_gpu_samples
        self._batches: Iterator[Any] = iter(())
        if model.training:
            warnings.warn(
                "the model is in train mode, and the Hessian is that of eval mode, without Dropout "
                "and with the running statistics of BatchNorm: call `model.eval()` to say so",
                stacklevel=2,
            )

    def apply(self, vec: Tensor) -> Tensor:
        """The product with one vector, of all batches or of the next one."""
        draw = self.draws()
        matvec = self.matvec() if draw is None else draw(0)
        image = matvec(vec[None])[0]
        return image.half() if self.fp16 else image

    def matvec(self) -> Matvec:
        """The Hessian of all batches on flat blocks, at the parameters as they are now."""
        loss, params = self._loss()
        return _flat(
            params, over_batches(self._curvature(loss), weight=examples)(params, self.dataloader)
        )

    def draws(self) -> Callable[[int], Matvec] | None:
        """The Hessian of the next batch, or None if each product is with all of them."""
        return None if self.full_dataset else self._of_next_batch

    def like(self, *, use_gpu: bool) -> Tensor:
        """What a vector looks like: it lies where the parameters do."""
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
        raise ValueError("the dataloader has no batch")

    def _curvature(self, loss: LossFunction) -> Curvature:
        def of_batch(params: Tree, batch: Any) -> Matvec:
            pieces = microbatches(batch, self.max_possible_gpu_samples)
            mean = over_batches(hvp(loss), weight=examples, keep=len(pieces) == 1)
            return mean(params, pieces)

        return of_batch


def _flat(params: Tree, matvec: Matvec) -> Matvec:
    space = space_of(params)
    return lambda rows: space.ravel(matvec(space.unravel(rows)))
