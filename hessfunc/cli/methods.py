"""Optimisers and schedules from the options of a command."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hessfunc.training.absa import Schedule
    from hessfunc.training.methods import Method

__all__ = ["OF_ABSA", "OF_NEWTON", "epochs_of", "optimiser", "schedule"]

# What the settings of Newton's method, and those of ABSA, are called here.
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
    name: str | None, lr: float, momentum: float | None, of_newton: Mapping[str, Any], /
) -> Method:
    """The optimiser of these options, of which those that are not given are None.

    Raises:
        ValueError: they do not go together.
    """
    from hessfunc.training.methods import SGD, BlockNewton

    if not 0 < lr < math.inf:
        raise ValueError(f"lr={lr}: it must be positive and finite")
    given = _given(of_newton)
    if name is None:
        name = "newton" if given else "sgd"
    if name == "newton":
        if momentum is not None:
            raise ValueError("--momentum goes with --optimizer sgd alone")
        return BlockNewton(lr=lr, **{"curvature": "hbp-abs", **given})
    if name != "sgd":
        raise ValueError(f"--optimizer is sgd or newton, not {name!r}")
    if given:
        raise ValueError(f"{OF_NEWTON[next(iter(given))]} goes with --optimizer newton alone")
    return SGD(lr=lr, momentum=0.9 if momentum is None else momentum)


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
    """The schedule of these options, and its settings as plain data.

    Raises:
        ValueError: they do not go together.
    """
    from hessfunc.training.absa import absa, constant

    if method not in ("sgd", "absa"):
        raise ValueError(f"--method is sgd or absa, not {method!r}")
    given = _given(of_absa)
    if method == "sgd" and given:
        raise ValueError(f"{OF_ABSA[next(iter(given))]} goes with --method absa alone")
    settings: dict[str, Any] = {"lr_decay": lr_decay, "lr_decay_epochs": lr_decay_epochs}
    if method == "sgd":
        settings |= {"ratio": large_ratio or 1}
        return constant(**settings), settings
    settings |= {"epochs": epochs, "max_ratio": large_ratio or _MAX_RATIO}
    settings |= {name: value for name, value in given.items() if name != "eps"}
    return absa(**settings), {**settings, **given}


def epochs_of(text: str, /) -> tuple[int, ...]:
    """The epochs of ``"30,60"`` or ``"30 60"``.

    Raises:
        ValueError: these are no whole numbers.
    """
    words = text.replace(",", " ").split()
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--lr-decay-epoch is a list such as 30,60, not {text!r}")
    return tuple(int(word) for word in words)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
