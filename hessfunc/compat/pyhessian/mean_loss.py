"""Mean loss of a model over a batch or a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from hessfunc.algorithms.results import Density, Eigenpairs, Estimate
from hessfunc.compat.place import device_of, evaluated_loss, moved
from hessfunc.losses import LossFunction, hold
from hessfunc.modules import bare
from hessfunc.options import anything, tensors, validated
from hessfunc.transforms.batches.examples import examples
from hessfunc.transforms.batches.mean import over_batches
from hessfunc.transforms.chunks import Curvature


class Results(TypedDict, total=False):
    """Last result of each method, by its name."""

    eigenvalues: Eigenpairs
    trace: Estimate
    density: Density
    trace_activ: Estimate


class MeanLoss:
    """Mean loss of a model, in eval mode, on a batch or on a data set.

    Each method uses the current parameters, and does not change the model. The seed of random
    vectors is drawn from torch's random stream, so that they are reproducible with
    ``torch.manual_seed``.

    Args:
        model: Module that is called with the inputs of a batch, without its wrapper for data
            parallelism.
        criterion: Function ``(outputs, targets) -> scalar``, a mean over examples.
        data: Single batch ``(inputs, targets)``.
        dataloader: Batches that can be read several times, weighted by their numbers of examples.
        cuda: Ignored: batches are moved to the device of the parameters.
        device: Ignored, like ``cuda``.

    Attributes:
        params: Parameters of the model that currently require a gradient. They can be set to some
            of them, to which the matrix is then restricted.
        results: Last result of each method, with residuals, intervals and costs.
        full_dataset: Whether a dataloader was given.
        data: Batch or dataloader.
        inputs, targets: Inputs and targets of the single batch, on the device of the parameters.

    Raises:
        ValueError: If both a batch and a dataloader are given, or neither, or if no parameter
            requires a gradient.
        TypeError: If a batch is not a pair.
    """

    _chosen: list[Tensor] | None = None

    @validated(data=anything, cuda=anything, device=anything)
    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Any, Any], Tensor],
        data: Any = None,
        dataloader: Iterable[Any] | None = None,
        cuda: bool | torch.device = True,
        device: str | torch.device | None = None,
    ) -> None:
        if (data is None) == (dataloader is None):
            raise ValueError("pass either one batch, `data=`, or batches, `dataloader=`")
        self.model = model
        self.criterion = criterion
        self.full_dataset = data is None
        self.data: Any = dataloader if data is None else data
        if not self.params:
            raise ValueError(
                f"no parameter of {type(model).__name__} requires a gradient: call "
                "`model.requires_grad_()`"
            )
        if not self.full_dataset:
            self.inputs, self.targets = self.moved(data)

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "criterion", "data", "full_dataset"):
            raise AttributeError(
                f"this {type(self).__name__} has no attribute {name!r}: call `super().__init__` "
                "with the model, the criterion and the data, or set the attribute"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @cached_property
    def results(self) -> Results:
        """Last result of each method."""
        return {}

    @property
    def params(self) -> list[Tensor]:
        """Parameters of the matrix: those that require a gradient, or those that were set."""
        if self._chosen is not None:
            return self._chosen
        return [p for p in self.model.parameters() if p.requires_grad]

    @params.setter
    def params(self, params: Sequence[Tensor]) -> None:
        self._chosen = list(tensors("params", params))

    @property
    def device(self) -> str:
        """Device of the parameters, to which batches are moved."""
        return str(device_of(self.model))

    @device.setter
    def device(self, device: str | torch.device) -> None:
        """Do nothing: batches are moved to the device of the parameters."""

    @property
    def module(self) -> nn.Module:
        """Module without its wrapper for data parallelism."""
        return bare(self.model)

    @property
    def batches(self) -> Iterable[Any]:
        """Batches, or a list of the single batch."""
        return self.data if self.full_dataset else [self.data]

    def loss(self) -> tuple[LossFunction, dict[str, Tensor]]:
        """Return the loss ``(params, batch) -> scalar``, and the current parameters.

        Raises:
            ValueError: If a tensor of ``params`` is no parameter of the model that requires a
                gradient, or is among them twice.
        """
        loss, params = evaluated_loss(self.model, self.criterion)
        if self._chosen is None:
            return loss, params
        names = {id(p): name for name, p in self.module.named_parameters() if name in params}
        unknown = [tuple(p.shape) for p in self._chosen if id(p) not in names]
        if unknown or len(set(map(id, self._chosen))) < len(self._chosen):
            raise ValueError(
                f"params has tensors of shapes {unknown} that are no parameters of the model which "
                "require a gradient: set params to a part of model.parameters()"
                if unknown
                else "params has a parameter twice: pass each parameter once"
            )
        chosen = {names[id(p)]: params[names[id(p)]] for p in self._chosen}
        return hold(loss, {n: p for n, p in params.items() if n not in chosen}), chosen

    def over_data(self, curvature: Curvature) -> Curvature:
        """Return the curvature function of the single batch, or of the mean over the batches."""
        return over_batches(curvature, weight=examples) if self.full_dataset else curvature

    def moved(self, batch: Any) -> tuple[Any, Any]:
        """Return the inputs and targets of a batch, on the device of the parameters."""
        return moved(batch, device_of(self.model))
