"""Curvature matrices of an empirical risk as linear operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.compat.curvlinops.arguments import CHECKS
from hessfunc.compat.curvlinops.matvecs import block_of, columns
from hessfunc.compat.curvlinops.operator import PyTorchLinearOperator
from hessfunc.compat.place import moved
from hessfunc.losses import Loss, composed
from hessfunc.modules import bare, functional
from hessfunc.options import described, validated
from hessfunc.transforms.batches.examples import examples
from hessfunc.transforms.batches.gradient import mean_gradient
from hessfunc.transforms.batches.mean import over_batches, refuse_one_batch
from hessfunc.transforms.batches.reductions import Average
from hessfunc.transforms.chunks import Curvature
from hessfunc.transforms.criteria import declared_reduction
from hessfunc.transforms.evaluation import scalar
from hessfunc.transforms.matvecs.arithmetic import per_block, scale
from hessfunc.trees import Matvec

# Relative difference of two passes over the data that rounding may cause.
_RTOL = 5e-5


class CurvatureLinearOperator(PyTorchLinearOperator):
    """Curvature matrix of the mean or summed loss of a model over a data set.

    Each product is one pass over the data at the current values of the parameters. The model is
    evaluated with the training flags that its modules had when the operator was made.

    Args:
        model_func: Module, or function ``(params, X) -> outputs`` if ``params`` is a dict.
        loss_func: Loss module or function ``(outputs, y) -> scalar``.
        params: List of some parameters of the module, or dict of values by name. Others are held
            fixed.
        data: Batches ``(X, y)`` that can be read several times. Tensors are moved to the device of
            the parameters.
        progressbar: Ignored.
        check_deterministic: Whether to evaluate the loss of the data twice, and to raise an error
            if the values differ.
        num_data: Number of examples by which a mean loss is divided, instead of that of the data.
        block_sizes: Numbers of consecutive parameters in each diagonal block, for the
            block-diagonal part of the matrix.
        batch_size_fn: Function of X that returns the number of examples of a batch. By default
            it is the common length of all tensors, and a loss of torch that is a mean over targets
            has the number of its targets as weight.

    Raises:
        TypeError: If the model, the parameters or the data have another type.
        ValueError: If a tensor is no parameter of the model, or if block sizes do not fit.
        RuntimeError: If the model or the data are not deterministic.
    """

    SELF_ADJOINT = True

    @validated(**CHECKS)
    def __init__(
        self,
        model_func: nn.Module | Callable[[Any, Any], Any],
        loss_func: Callable[[Any, Any], Tensor] | None,
        params: Sequence[Tensor] | Mapping[str, Tensor],
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        block_sizes: Sequence[int] | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        refuse_one_batch(data)
        named = named_parameters(model_func, params)
        self._model_func = bare(model_func) if isinstance(model_func, nn.Module) else model_func
        self._loss_func = loss_func
        self._params, self._data = named, data
        self._num_data, self._batch_size_fn = num_data, batch_size_fn
        self._blocks = None if block_sizes is None else _grouped(list(named), block_sizes)
        in_shape, out_shape = self._shapes([p.shape for p in named.values()])
        super().__init__(in_shape, out_shape, list(params) if isinstance(params, Mapping) else None)
        if check_deterministic:
            self._check_deterministic()

    def _shapes(self, params: list[torch.Size]) -> tuple[list[torch.Size], list[torch.Size]]:
        """Return the shapes of the tensors of a vector and of a product."""
        return params, params

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._only("device")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self._only("dtype")

    def _only(self, attribute: str) -> Any:
        values = {getattr(p, attribute) for p in self._params.values()}
        if len(values) != 1:
            raise RuntimeError(
                f"the parameters have several {attribute}s, {sorted(map(str, values))}: make one "
                "operator for the parameters of each"
            )
        return values.pop()

    @property
    def params(self) -> dict[str, Tensor]:
        """Current values of the parameters by name, without their graph."""
        return {name: p.detach() for name, p in self._params.items()}

    @cached_property
    def loss(self) -> Loss:
        """Loss ``(params, batch) -> scalar`` with its outputs and its criterion."""
        return composed(self.outputs, self.criterion, targets=self._targets)

    @property
    def criterion(self) -> Callable[[Any, Any], Tensor]:
        """Criterion ``(outputs, y) -> scalar``."""
        if self._loss_func is None:
            raise ValueError(f"{type(self).__name__} has no loss function: pass `loss_func`")
        return self._loss_func

    @cached_property
    def outputs(self) -> Callable[[Any, Any], Any]:
        """Model ``(params, batch) -> outputs``."""
        device = next(iter(self._params.values())).device
        if not isinstance(self._model_func, nn.Module):
            function = self._model_func
            return lambda params, batch: function(params, moved(batch, device)[0])
        model_fn, _ = functional(self._model_func, trainable_only=False)
        return lambda params, batch: model_fn(params, (moved(batch, device)[0],))

    def _targets(self, batch: Any) -> Any:
        return moved(batch, self.device)[1]

    def _curvature(self, loss: Loss) -> Curvature:
        """Return the curvature function of the matrix."""
        raise NotImplementedError(
            f"{type(self).__name__} has no `_curvature`: define the method, such as `return "
            "hf.hvp(loss)`"
        )

    def _matvec(self) -> Matvec:
        """Return the matvec of the whole data set at the current parameters."""
        average = self.average()
        mean = over_batches(self._curvature(self.loss), weight=average.weight)
        matvec = scale(mean(self.params, self._data), self.share)
        if self._blocks is None:
            return matvec
        return per_block(matvec, self.params, self._blocks)

    # As in curvlinops, products are constants, also of inputs that require a gradient.
    @torch.no_grad()
    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        product = self._matvec()(block_of(X, list(self._params)))
        return columns([product[name] for name in self._params])

    @property
    def reduction(self) -> str | None:
        """Reduction of the loss, ``"mean"`` or ``"sum"``; None if it is unknown."""
        declared = declared_reduction(self._loss_func)
        return declared or getattr(self._loss_func, "reduction", None)

    def average(self) -> Average:
        """Return how batches are combined: summed, or averaged with the weights of the loss."""
        is_weighted = self._batch_size_fn or not declared_reduction(self._loss_func)
        weight = self.size if is_weighted and self.reduction == "mean" else None
        return Average(weight)

    def size(self, batch: Any) -> int:
        """Return the number of examples of a batch."""
        return examples(batch) if self._batch_size_fn is None else self._batch_size_fn(batch[0])

    @cached_property
    def share(self) -> float:
        """Number of examples of the data, divided by ``num_data`` for a mean loss."""
        if self._num_data is None or self.reduction == "sum":
            return 1.0
        return sum(map(self.size, self._data)) / self._num_data

    def gradient_and_loss(self) -> tuple[list[Tensor], Tensor]:
        """Return the gradient, a list of tensors, and the loss of the data set."""
        value, gradient = mean_gradient(self.loss, self.average(), self.params, self._data)
        like = next(iter(self._params.values())).detach()
        return [self.share * part for part in gradient.values()], like.new_tensor(
            self.share * value
        )

    def _check_deterministic(self) -> None:
        device = next(iter(self._params.values())).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            first, second = list(self._evaluated()), list(self._evaluated())
        shapes = [[value.shape for value in values] for values in (first, second)]
        if shapes[0] != shapes[1] or not all(
            torch.allclose(a, b, rtol=_RTOL, atol=_RTOL) for a, b in zip(first, second, strict=True)
        ):
            raise RuntimeError(
                "two passes over the data gave different values, so that each product would belong "
                "to another matrix: call `model.eval()`, turn off random augmentation, or pass the "
                "batches as a list, `list(loader)`; check_deterministic=False leaves this check out"
            )

    @torch.no_grad()
    def _evaluated(self) -> Iterator[Tensor]:
        """Yield tensors that two deterministic passes over the data have in common."""
        params, average = self.params, self.average()
        total: float | Tensor = 0.0
        for batch in self._data:
            value = scalar(self.loss(params, batch))
            average.look(self.loss, params, batch)
            total = total + average.of(batch) * value
        yield torch.as_tensor(total, device="cpu")


def named_parameters(
    model_func: Any, params: Sequence[Tensor] | Mapping[str, Tensor], /
) -> dict[str, Tensor]:
    """Return the parameters by their names in the module, in their given order.

    Raises:
        TypeError: If the model is neither a module nor a function, or if a function has a list of
            parameters.
        ValueError: If a tensor or name is not one of the module.
    """
    is_module = isinstance(model_func, nn.Module)
    if not (is_module or (callable(model_func) and isinstance(params, Mapping))):
        raise TypeError(
            f"model_func is {described(model_func)} and params {described(params)}: pass a module, "
            "or a function (params, X) -> outputs with a dict of params"
        )
    own = dict(bare(model_func).named_parameters()) if is_module else None
    if is_module and isinstance(params, Mapping) and bare(model_func) is not model_func:
        # Wrappers for data parallelism put a prefix before each name.
        params = {name.removeprefix("module."): p for name, p in params.items()}
    if isinstance(params, Mapping):
        unknown = [] if own is None else [name for name in params if name not in own]
        if unknown:
            raise ValueError(
                f"the model has no parameter {unknown[0]!r}: pass a part of "
                "dict(model.named_parameters())"
            )
        return dict(params)
    names = {(p.data_ptr(), p.shape): name for name, p in (own or {}).items()}
    keys = [(p.data_ptr(), p.shape) for p in params]
    if missing := [tuple(key[1]) for key in keys if key not in names]:
        raise ValueError(
            f"params has tensors of shapes {missing} that are no parameters of the model: pass a "
            "part of list(model.parameters())"
        )
    if len(set(keys)) < len(keys):
        raise ValueError("params has a parameter twice: pass each parameter once")
    return {names[key]: p for key, p in zip(keys, params, strict=True)}


def _grouped(names: list[str], sizes: Sequence[int]) -> dict[str, list[str]]:
    if sum(sizes) != len(names) or min(sizes) < 1:
        raise ValueError(
            f"block_sizes={list(sizes)} must be positive and sum to the {len(names)} parameters: "
            f"pass for instance block_sizes={[1] * len(names)}"
        )
    left = iter(names)
    return {str(i): [next(left) for _ in range(size)] for i, size in enumerate(sizes)}
