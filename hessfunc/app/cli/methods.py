"""Optimisers and schedules from the options of a command."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hessfunc.optim.schedules import Schedule
    from hessfunc.training.methods import Method

# What the settings of SGD, of Newton's method and of ABSA are called here.
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
    """The optimiser of these options, of which those that are not given are None.

    Raises:
        ValueError: they do not go together.
    """
    from hessfunc.training.methods import SGD, BlockNewton

    if not 0 < lr < math.inf:
        raise ValueError(f"lr={lr}: it must be positive and finite")
    sgd, newton = _given(of_sgd), _given(of_newton)
    if name is None:
        name = "newton" if newton else "sgd"
    if name == "newton":
        if sgd:
            raise ValueError(f"{OF_SGD[next(iter(sgd))]} goes with --optimizer sgd alone")
        return BlockNewton(lr=lr, **{"curvature": "hbp-abs", **newton})
    if name != "sgd":
        raise ValueError(f"--optimizer is sgd or newton, not {name!r}")
    if newton:
        raise ValueError(f"{OF_NEWTON[next(iter(newton))]} goes with --optimizer newton alone")
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
    """The schedule of these options, and its settings as plain data.

    Raises:
        ValueError: they do not go together.
    """
    from hessfunc.optim.schedules import absa, constant

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


def epochs_of(text: str, more: Sequence[str] = (), /) -> tuple[int, ...]:
    """The epochs of ``"30,60"`` or ``"30 60"``.

    Args:
        text: of the option.
        more: words of the command that belong to no option.

    Raises:
        ValueError: these are no whole numbers, or there are more words.
    """
    if more and all(word.isdecimal() for word in (text, *more)):
        wanted = ",".join((text, *more))
        raise ValueError(f"--lr-decay-epoch takes one word, with commas: {wanted}")
    if more:
        raise ValueError(f"{' '.join(more)!r} belongs to no option")
    words = text.replace(",", " ").split()
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--lr-decay-epoch is a list such as 30,60, not {text!r}")
    return tuple(int(word) for word in words)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
