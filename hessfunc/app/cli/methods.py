"""Construction of optimisers and schedules from command-line options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hessfunc.optim.schedules import Schedule
    from hessfunc.training.methods import Method

# Command-line options of the settings of SGD, of Newton's method and of ABSA.
OF_SGD = {"momentum": "--momentum", "weight_decay": "--weight-decay"}
OF_NEWTON = {
    "curvature": "--curvature",
    "alpha": "--alpha",
    "solve": "--solve",
    "max_matvecs": "--cg-max",
    "rtol": "--cg-rtol",
    "atol": "--cg-atol",
    "max_blocks": "--max-blocks",
}
OF_ABSA = {
    "adversarial_share": "--adversarial-share",
    "patience": "--patience",
    "eps": "--eps",
}

_MAX_RATIO = 128


def optimiser(
    name: str | None, lr: float, of_sgd: Mapping[str, Any], of_newton: Mapping[str, Any], /
) -> Method:
    """Return the optimiser that the options select; options that were not given are None.

    Raises:
        ValueError: If the options contradict each other or have invalid values.
    """
    from hessfunc.training.methods import SGD, BlockNewton

    sgd, newton = _given(of_sgd), _given(of_newton)
    if name is None:
        name = "newton" if newton else "sgd"
    if name == "newton":
        if sgd:
            raise ValueError(f"{OF_SGD[next(iter(sgd))]} requires --optimizer sgd")
        return BlockNewton(lr=lr, **{"curvature": "hbp-abs", **newton})
    if newton:
        raise ValueError(f"{OF_NEWTON[next(iter(newton))]} requires --optimizer newton")
    return SGD(lr=lr, **sgd)


def schedule(
    method: str,
    /,
    *,
    epochs: int,
    large_ratio: int | None,
    lr_decay: float,
    lr_decay_epochs: tuple[int, ...],
    of_absa: Mapping[str, Any],
) -> tuple[Schedule, dict[str, Any]]:
    """Return the schedule that the options select, and its settings as plain data.

    Raises:
        ValueError: If the options contradict each other.
    """
    from hessfunc.optim.schedules import absa, constant

    given = _given(of_absa)
    if method == "sgd" and given:
        raise ValueError(f"{OF_ABSA[next(iter(given))]} requires --method absa")
    settings: dict[str, Any] = {"lr_decay": lr_decay, "lr_decay_epochs": lr_decay_epochs}
    if method == "sgd":
        settings |= {"ratio": large_ratio or 1}
        return constant(**settings), settings
    settings |= {"epochs": epochs, "max_ratio": large_ratio or _MAX_RATIO}
    settings |= {name: value for name, value in given.items() if name != "eps"}
    return absa(**settings), {**settings, **given}


def epochs_of(text: str, more: Sequence[str] = (), /) -> tuple[int, ...]:
    """Parse a list of epochs such as ``"30,60"`` or ``"30 60"``.

    Args:
        text: Value of the option.
        more: Arguments of the command that belong to no option.

    Raises:
        ValueError: If the text is not a list of integers, or if ``more`` is not empty.
    """
    if more and all(word.isdecimal() for word in (text, *more)):
        wanted = ",".join((text, *more))
        raise ValueError(f"separate the epochs by commas: --lr-decay-epoch {wanted}")
    if more:
        raise ValueError(f"unexpected argument {' '.join(more)!r}: it belongs to no option")
    words = text.replace(",", " ").split()
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--lr-decay-epoch must be a list such as 30,60, not {text!r}")
    return tuple(int(word) for word in words)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
