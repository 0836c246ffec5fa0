"""The mean loss of a model over a batch or a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypedDict

from torch import Tensor, nn

from hessfunc.algorithms.results import Density, Eigenpairs, Estimate
from hessfunc.compat.place import bare, device_of, evaluated_loss, moved
from hessfunc.losses import LossFunction
from hessfunc.options import anything, validated
from hessfunc.transforms.batches.examples import examples
from hessfunc.transforms.batches.mean import over_batches
from hessfunc.transforms.chunks import Curvature


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
        params: the model's own parameters that require a gradient, as it says now.
        results: the last result of each method, with residuals, intervals and costs.
        full_dataset: whether there is a dataloader.
        data: the batch or the dataloader.
        inputs, targets: of the one batch, where the parameters are.

    Raises:
        ValueError: there are both a batch and a dataloader, or neither; no parameter requires a
            gradient.
        TypeError: a batch is no pair.
    """

    @validated(data=anything)
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
        self.results: Results = {}
        if not self.params:
            raise ValueError(f"no parameter of {type(model).__name__} requires a gradient")
        if not self.full_dataset:
            self.inputs, self.targets = self.moved(data)

    @property
    def params(self) -> list[Tensor]:
        """The model's own parameters that require a gradient."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def device(self) -> str:
        """Where the parameters are."""
        return str(device_of(self.model))

    @property
    def module(self) -> nn.Module:
        """The model itself, where it is wrapped for data parallelism."""
        return bare(self.model)

    @property
    def batches(self) -> Iterable[Any]:
        """The batches, or the one batch."""
        return self.data if self.full_dataset else [self.data]

    def loss(self) -> tuple[LossFunction, dict[str, Tensor]]:
        """The loss ``(params, batch) -> scalar``, and the parameters as they are now."""
        return evaluated_loss(self.model, self.criterion)

    def over_data(self, curvature: Curvature) -> Curvature:
        """The curvature of the batch, or the mean over the batches."""
        return over_batches(curvature, weight=examples) if self.full_dataset else curvature

    def moved(self, batch: Any) -> tuple[Any, Any]:
        """The inputs and targets of a batch, where the parameters are."""
        return moved(batch, device_of(self.model))
