"""Newton's method as an optimiser of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.optim.newton import NewtonState, newton
from hessfunc.optim.solvers import Solver

_REMEMBERED = [field.name for field in fields(NewtonState)]


class NewtonOptimizer(torch.optim.Optimizer):
    """`newton` for ordinary loops: ``loss.backward(); optimizer.step(batch)``.

    Each step takes the gradients in ``p.grad``, makes the blocks at the current parameters, and
    moves the parameters in place. Those without a gradient stay. ``lr`` and ``alpha`` are those of
    ``param_groups``, so that schedulers may change them; what `NewtonState` remembers stands there
    too, and in ``state_dict``.

    Args:
        model: whose trainable parameters are optimised.
        blocks: ``(params, batch) -> {name: matvec or block}``, as `exact_blocks`, `hbp` or `kfac`
            give it, of the same loss.
        lr: the learning rate.
        alpha: how much of the identity is mixed into the curvature, in [0, 1].
        solve: of one equation; by default `conjugate_gradients`.

    Raises:
        ValueError: an option is out of range, or no parameter is trainable.
    """

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
        super().__init__(trainable, {"lr": lr, "alpha": alpha, **asdict(NewtonState())})
        self._blocks = blocks
        self._solve = solve

    @property
    def matvecs(self) -> int:
        """Products so far."""
        return sum(group["matvecs"] for group in self.param_groups)

    def step(  # type: ignore[override]
        self, batch: Any, closure: Callable[[], Any] | None = None
    ) -> Any:
        """Move the parameters once.

        Args:
            batch: of which the gradients are, in the form that the blocks take.
            closure: computes the loss and its gradients first, as for other optimisers.

        Returns:
            What the closure returns, or None.
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
        # All are found before the first moves: blocks are made at the parameters as they are.
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
