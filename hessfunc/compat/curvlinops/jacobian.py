"""Jacobian of the outputs of a model over a data set, and its transpose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.compat.curvlinops.arguments import CHECKS
from hessfunc.compat.curvlinops.curvature import CurvatureLinearOperator
from hessfunc.compat.curvlinops.matvecs import block_of, columns
from hessfunc.compat.curvlinops.operator import Composed
from hessfunc.options import validated


class JacobianLinearOperator(CurvatureLinearOperator):
    """Jacobian of the outputs of all examples, ``(N * outputs, n)``.

    Batches must come in the same order in each pass.

    Args:
        model_func: Module, or function ``(params, X) -> outputs`` if ``params`` is a dict.
        params: List of some parameters of the module, or dict of values by name.
        data: Batches ``(X, y)`` that can be read several times.
        progressbar: Ignored.
        check_deterministic: Whether to evaluate the outputs twice, and to raise an error if they
            differ.
        num_data: Ignored: examples are counted.
        batch_size_fn: Ignored, like ``num_data``.
    """

    SELF_ADJOINT = False

    @validated(**CHECKS)
    def __init__(
        self,
        model_func: nn.Module | Callable[[Any, Any], Any],
        params: Sequence[Tensor] | Mapping[str, Tensor],
        data: Iterable[Any],
        progressbar: bool = False,
        check_deterministic: bool = True,
        num_data: int | None = None,
        batch_size_fn: Callable[[Any], int] | None = None,
    ) -> None:
        super().__init__(model_func, None, params, data, check_deterministic=check_deterministic)

    def _shapes(self, params: list[torch.Size]) -> tuple[list[torch.Size], list[torch.Size]]:
        shapes = [outputs.shape for outputs in self._evaluated()]
        if not shapes:
            raise ValueError("the data has no batch: pass at least one")
        return params, [torch.Size((sum(s[0] for s in shapes), *shapes[0][1:]))]

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        params, block = self.params, block_of(X, list(self._params))

        def of_batch(batch: Any) -> Tensor:
            function = self._of(batch)
            # (d/dp f) v for each vector v of the block.
            products = torch.vmap(
                lambda vector: torch.func.jvp(function, (params,), (vector,))[1], randomness="same"
            )(block)
            return columns([products])[0]

        return [torch.cat([of_batch(batch) for batch in self._data])]

    def _adjoint(self) -> TransposedJacobianLinearOperator:
        return TransposedJacobianLinearOperator(self)

    def _of(self, batch: Any) -> Callable[[Any], Tensor]:
        return lambda params: self.outputs(params, batch)

    @torch.no_grad()
    def _evaluated(self) -> Iterator[Tensor]:
        params = self.params
        for batch in self._data:
            yield self.outputs(params, batch)


class TransposedJacobianLinearOperator(Composed):
    """Transpose of a `JacobianLinearOperator`, with the same arguments.

    Args:
        model_func: Model of a `JacobianLinearOperator`, or such an operator to transpose.
        *args: Further arguments of `JacobianLinearOperator`.
        **kwargs: Further arguments of `JacobianLinearOperator`.
    """

    def __init__(self, model_func: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model_func, JacobianLinearOperator):
            model_func = JacobianLinearOperator(model_func, *args, **kwargs)
        super().__init__(model_func, model_func._out_shape, model_func._in_shape, named=False)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        jacobian = self._A
        params = jacobian.params
        rows, start = X[0].movedim(-1, 0), 0
        totals = {name: p.new_zeros(len(rows), *p.shape) for name, p in params.items()}
        for batch in jacobian._data:
            outputs, pullback, *_ = torch.func.vjp(jacobian._of(batch), params)
            part = rows[:, start : start + len(outputs)]
            start += len(outputs)
            for name, product in torch.vmap(pullback)(part)[0].items():
                totals[name] = totals[name] + product
        return columns(list(totals.values()))

    def _adjoint(self) -> JacobianLinearOperator:
        jacobian: JacobianLinearOperator = self._A
        return jacobian
