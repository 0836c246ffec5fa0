"""Step of one parameter, as an optimiser of torch or of another package makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

from hessfunc.optim.stability.norms import InfinityNorm, Preconditioner, SpectralNorm
from hessfunc.optim.stability.recurrence import Recurrence
from hessfunc.optim.stability.result import UnknownStability


@dataclass(frozen=True, kw_only=True)
class Step:
    """Next step of one parameter.

    A linear step is ``-lr P^-1 u`` for the direction u = p m + q g of the recurrence. A step with a
    norm is ``-lr argmax <u, d>`` over its unit ball.

    Attributes:
        lr: Learning rate of the step.
        recurrence: Recurrence of the parameter and its momentum.
        preconditioner: Preconditioner P; None for the identity.
        norm: Norm of the step; None for a linear step.
        momentum: Momentum m; None before the first step, where it is 0.
        weight_decay: Weight decay that is added to the gradient.
    """

    lr: float
    recurrence: Recurrence
    preconditioner: Preconditioner | None = None
    norm: InfinityNorm | SpectralNorm | None = None
    momentum: Tensor | None = None
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Source:
    """Data from which the step of a parameter is read.

    Attributes:
        name: Name of the parameter.
        parameter: Parameter.
        group: Options of its group, with the learning rate of the next step.
        state: State of the parameter in the optimiser, empty before the first step.
        optimizer: Optimiser.
    """

    name: str
    parameter: Tensor
    group: Mapping[str, Any]
    state: Mapping[str, Any]
    optimizer: Any

    def number(self, option: str, /) -> float:
        """Return an option of the group as a float."""
        return float(self.group[option])

    @property
    def lr(self) -> float:
        """Learning rate of the group."""
        return self.number("lr")

    @property
    def betas(self) -> tuple[float, float]:
        """Decay rates of the first and second moments."""
        first, second = self.group["betas"]
        return float(first), float(second)

    def moment(self, key: str, /) -> Tensor:
        """Return a tensor of the state, which exists from the first step on.

        Raises:
            UnknownStability: If the optimiser has not made a step with this parameter.
        """
        self.require_state()
        moment: Tensor = self.state[key]
        return moment.detach()

    def require_state(self) -> None:
        """Raise before the first step of the parameter."""
        if not self.state:
            raise UnknownStability(
                f"{type(self.optimizer).__name__} has no state of {self.name!r}, which it has "
                "before its first step: call `optimizer.step()` first"
            )

    def refuse(self, *options: str) -> None:
        """Raise for an option that changes the step in a way without a stability limit."""
        for option in options:
            if self.group.get(option) or getattr(self.optimizer, option, None) is True:
                raise UnknownStability(
                    f"{type(self.optimizer).__name__} with {option}={self.group.get(option, True)} "
                    "has no stability limit: pass an optimiser without it"
                )


# Function that reads the next step of a parameter.
Rule: TypeAlias = Callable[[Source], Step]


def decoupled(step: Step, decay: float, /) -> Step:
    """Return a step that multiplies the parameter by 1 - lr decay."""
    return replace(step, recurrence=replace(step.recurrence, rho=1 - step.lr * decay))


def decayed(source: Source, step: Step, *, is_decoupled: bool) -> Step:
    """Return a step with the weight decay of its group, decoupled or in the gradient."""
    decay = source.number("weight_decay")
    return decoupled(step, decay) if is_decoupled else replace(step, weight_decay=decay)
