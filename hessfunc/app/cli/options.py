"""Declaration of options: the values that each accepts, and the message about any other value."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from inspect import Parameter
from typing import Annotated, Any, get_type_hints

import typer

from hessfunc.app.terminal import Output

_SCALES = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
# Floating-point dtypes with their short names.
DTYPES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}


def option(
    metavar: str,
    text: str,
    /,
    *flags: str,
    default: str = "",
    panel: str | None = None,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    choices: Sequence[str] | Mapping[str, str] = (),
) -> Any:
    """Declare an option, whose name is that of the parameter of the command unless flags are given.

    Args:
        metavar: Placeholder of the value: N for whole numbers, X or a unit for numbers, and DIR,
            FILE, PATH, NAME or NAMES for text; empty for a switch.
        text: Help text.
        flags: Flags such as ``"--json"``.
        default: Default in words, where the default is None.
        panel: Title of the group of options in the help.
        min: Smallest value of a number; by default 1 for whole numbers, and 0 for others.
        max: Largest value of a number.
        above: Number that a value must exceed, instead of ``min``.
        choices: Values of the option, or a mapping from them to their short names.
    """
    shown = unless_given(text, default) if default else text
    common: dict[str, Any] = {"metavar": metavar, "help": shown, "rich_help_panel": panel}
    if choices:
        common["parser"] = partial(one_of, choices)
        common["autocompletion"] = lambda incomplete: [
            name for name in choices if name.startswith(incomplete)
        ]
    elif metavar and metavar not in _TEXTS:
        if min is None and above is None:
            min = 1 if metavar == "N" else 0
        common["parser"] = partial(number, whole=metavar == "N", min=min, max=max, above=above)
        common["metavar"] = f"{metavar}{_range(min, max, above)}"
    return typer.Option(*flags, **common)


_TEXTS = ("DIR", "FILE", "NAME", "NAMES", "PATH", "N,N")

# Switches of every command, which `Command` and the progress bars obey.
_SWITCHES = ("as_json", "quiet", "traceback")


def declared(command: Callable[..., Output], table: Mapping[str, Any], /) -> Callable[..., Output]:
    """Return a command with the declarations of its parameters, by name, and the common switches.

    The command itself takes only those switches that its signature names.
    """
    own, hints = inspect.signature(command), get_type_hints(command)
    switches = [name for name in _SWITCHES if name not in own.parameters]
    common = [Parameter(name, Parameter.KEYWORD_ONLY, default=False) for name in switches]
    kinds = {**hints, **dict.fromkeys(switches, bool)}

    @wraps(command)
    def run(**values: Any) -> Output:
        return command(**{name: values[name] for name in own.parameters})

    run.__annotations__ = {
        name: Annotated[kind, table[name]] if name in table else kind
        for name, kind in kinds.items()
    }
    run.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[
            each.replace(annotation=run.__annotations__[each.name])
            for each in (*own.parameters.values(), *common)
        ]
    )
    return run


def unless_given(text: str, /, default: str) -> str:
    """Return the help text of an option whose default is None, followed by its actual default."""
    # typer would put such a default in doubled brackets. Two trailing spaces break the line.
    return f"{text}  \n[default: {default}]"


def one_of(choices: Sequence[str] | Mapping[str, str], text: str, /) -> str:
    """Return a choice, or the choice with this short name.

    Raises:
        typer.BadParameter: If the choice is unknown; the message lists all choices.
    """
    short = choices if isinstance(choices, Mapping) else {}
    names = {alias: name for name, alias in short.items()} | {name: name for name in choices}
    if text not in names:
        known = ", ".join(f"{name} ({short[name]})" if name in short else name for name in choices)
        raise typer.BadParameter(f"must be one of {known}, not {text!r}")
    return names[text]


def number(
    text: Any,
    /,
    *,
    whole: bool,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
) -> Any:
    """Return a number with a suffix or an exponent, such as 7B, 350M, 2.5k, 1e9 or 1,000.

    Raises:
        typer.BadParameter: If the text is not such a number, or if it is out of range.
    """
    # The default of an option is a number already.
    value = _parsed(text) if isinstance(text, str) else text
    is_known = math.isfinite(value) and (not whole or value == round(value))
    is_below = (min is not None and value < min) or (above is not None and value <= above)
    if not is_known or is_below or (max is not None and value > max):
        kind = "a whole number" if whole else "a number"
        example = (
            "" if max is not None else f", such as {'1000, 1k or 7B' if whole else '0.5 or 1e-3'}"
        )
        raise typer.BadParameter(f"must be {kind}{_bounds(min, max, above)}{example}, not {text!r}")
    return round(value) if whole else float(value)


def _parsed(text: str) -> float:
    """Return the number of a text, exact if it is a whole number, or NaN."""
    plain = re.sub("[,_ ]", "", text).lower()
    scale = _SCALES.get(plain[-1:], 1)
    digits = plain if scale == 1 else plain[:-1]
    try:
        return int(digits) * scale
    except ValueError:
        pass
    try:
        return float(digits) * scale
    except ValueError:
        return math.nan


def _range(min: float | None, max: float | None, above: float | None) -> str:
    """Return the range of a number for the help."""
    parts = ((">=", min), (">", above), ("<=", max))
    known = [f"{sign}{_written(bound)}" for sign, bound in parts if bound is not None]
    return f" [{', '.join(known)}]" if known else ""


def _bounds(min: float | None, max: float | None, above: float | None) -> str:
    """Return the range of a number in words."""
    if above is not None:
        return f" above {_written(above)}" + ("" if max is None else f", at most {_written(max)}")
    if min is None:
        return ""
    if max is None:
        return f" of at least {_written(min)}"
    return f" from {_written(min)} to {_written(max)}"


def _written(bound: float) -> str:
    return "2^63 - 1" if bound == 2**63 - 1 else f"{bound:g}"
