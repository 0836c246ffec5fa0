"""Newton's method as a ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.optim.newton import NewtonState, newton
from hessfunc.optim.solvers import Solver
from hessfunc.options import function_of, plain_callable, validated

_REMEMBERED = [field.name for field in fields(NewtonState)]


class NewtonOptimizer(torch.optim.Optimizer):
    """Optimiser with the steps of `newton`: ``loss.backward(); optimizer.step(batch)``.

    Each step reads the gradients in ``p.grad``, computes the blocks at the current parameters, and
    updates the parameters in place. Parameters without a gradient do not change. ``lr`` and
    ``alpha`` are read from ``param_groups``, so that schedulers can change them. The fields of
    `NewtonState` are stored in ``param_groups`` too, and therefore in ``state_dict``.

    Args:
        model: Module whose trainable parameters are optimised.
        blocks: Function ``(params, batch) -> {name: matvec or block}`` of the same loss, as
            `exact_blocks`, `hbp` and `kfac` return it.
        lr: Learning rate.
        alpha: Weight of the identity in the damped curvature, in [0, 1].
        solve: Solver of one equation. The default is `conjugate_gradients`.

    Raises:
        ValueError: If an option is out of range, or if no parameter is trainable.
    """

    @validated(blocks=function_of(2, "(params, batch)"))
    def __init__(
        self,
        model: nn.Module,
        blocks: Callable[[Mapping[str, Tensor], Any], Mapping[str, Any]],
        *,
        lr: float = 0.1,
        alpha: float = 0.02,
        solve: Solver | None = None,
    ) -> None:
        newton(lr=lr, alpha=alpha, solve=solve)
        trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not trainable:
            raise ValueError(
                f"{type(model).__name__} has no trainable parameter: call "
                "`model.requires_grad_(True)`"
            )
        super().__init__(trainable, {"lr": lr, "alpha": alpha, **asdict(NewtonState())})
        self._blocks = blocks
        self._solve = solve

    @property
    def matvecs(self) -> int:
        """Number of products so far."""
        return sum(group["matvecs"] for group in self.param_groups)

    @validated(closure=plain_callable)
    def step(  # type: ignore[override]
        self, batch: Any, closure: Callable[[], Any] | None = None
    ) -> Any:
        """Perform one optimisation step.

        Args:
            batch: Batch on which the gradients were computed, in the form that ``blocks`` takes.
            closure: Function that computes the loss and its gradients before the step, as for
                other optimisers.

        Returns:
            The value of the closure, or None without a closure.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        params = {
            name: parameter.detach()
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }
        blocks = self._blocks(params, batch)
        # Compute all steps before the first update: blocks are evaluated at the old parameters.
        moved = [self._moved(group, params, blocks) for group in self.param_groups]
        for group in moved:
            for name, leaf in group.items():
                params[name].copy_(leaf)
        return value

    def _moved(
        self, group: dict[str, Any], params: Mapping[str, Tensor], blocks: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        named = zip(group["param_names"], group["params"], strict=True)
        gradients = {name: p.grad.detach() for name, p in named if p.grad is not None}
        method = newton(lr=group["lr"], alpha=group["alpha"], solve=self._solve)
        state = NewtonState(**{name: group[name] for name in _REMEMBERED})
        chosen = {name: params[name] for name in gradients}
        moved, state = method.update(gradients, state, chosen, blocks)
        group.update(asdict(state))
        return moved
