"""The mean loss of a model over a batch or a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from hessfunc.algorithms.results import Density, Eigenpairs, Estimate
from hessfunc.functional import LossFunction, functional, supervised
from hessfunc.training.modes import eval_mode
from hessfunc.transforms.batches import over_batches
from hessfunc.transforms.blocks import Curvature
from hessfunc.trees import Tree, tree_map

__all__ = ["MeanLoss", "Results", "seed_of_stream"]


class Results(TypedDict, total=False):
    """The last result of each method, under its name."""

    eigenvalues: Eigenpairs
    trace: Estimate
    density: Density
    trace_activ: Estimate


class MeanLoss:
    """The mean loss of a model, in eval mode, on a batch or on a data set.

    Each method takes the parameters as they are when it is called, and changes nothing of the
    model. Random vectors come from a seed that is drawn from torch's random stream, so that
    ``torch.manual_seed`` makes them the same.

    Args:
        model: called with the inputs of a batch; one that is wrapped for data parallelism is
            unwrapped.
        criterion: ``(outputs, targets) -> scalar``, a mean over examples.
        data: one batch ``(inputs, targets)``.
        dataloader: batches that can be read again and again. Each counts its examples.
        cuda: without effect: batches are moved to where the parameters are.

    Attributes:
        params: the model's own parameters that require a gradient.
        results: the last result of each method, with residuals, intervals and costs.
        full_dataset: whether there is a dataloader.
        data: the batch or the dataloader.
        inputs, targets: of the one batch, where the parameters are.

    Raises:
        ValueError: there are both a batch and a dataloader, or neither; no parameter requires a
            gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        data: Any = None,
        dataloader: Iterable[Any] | None = None,
        cuda: bool = True,
    ) -> None:
        if (data is None) == (dataloader is None):
            raise ValueError("pass either one batch, `data=`, or batches, `dataloader=`")
        self.model = model
        self.criterion = criterion
        self.full_dataset = data is None
        self.data: Any = dataloader if data is None else data
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.results: Results = {}
        if not self.params:
            raise ValueError(f"no parameter of {type(model).__name__} requires a gradient")
        if not self.full_dataset:
            self.inputs, self.targets = self.moved(data)

    @property
    def device(self) -> str:
        """Where the parameters are."""
        return str(self.params[0].device)

    @property
    def module(self) -> nn.Module:
        """The model itself, where it is wrapped for data parallelism."""
        wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        return self.model.module if isinstance(self.model, wrappers) else self.model

    @property
    def batches(self) -> Iterable[Any]:
        """The batches, or the one batch."""
        return self.data if self.full_dataset else [self.data]

    def loss(self) -> tuple[LossFunction, dict[str, Tensor]]:
        """The loss ``(params, batch) -> scalar``, and the parameters as they are now."""
        with eval_mode(self.module):
            model_fn, params = functional(self.module)
        of_batch = supervised(lambda found, x: model_fn(found, (x,)), self.criterion)
        return lambda found, batch: of_batch(found, self.moved(batch)), params

    def over_data(self, curvature: Curvature) -> Curvature:
        """The curvature of the batch, or the mean over the batches."""
        return over_batches(curvature) if self.full_dataset else curvature

    def moved(self, batch: Any) -> Tree:
        """A batch, where the parameters are."""
        return tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, batch)


def seed_of_stream() -> int:
    """A seed drawn from torch's random stream."""
    return int(torch.randint(2**62, (), device="cpu"))
