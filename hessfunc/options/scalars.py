"""Checks of numbers, flags, strings, dtypes and devices, and the description of a wrong value."""

from __future__ import annotations

import contextlib
import math
import os
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

# Function (name, value) -> normalised value, which raises for a wrong value.
Check: TypeAlias = Callable[[str, Any], Any]


def described(value: object, /) -> str:
    """Describe a value in a few words for a message."""
    match value:
        case Tensor():
            return f"a tensor of shape {tuple(value.shape)}"
        case np.ndarray():
            return f"a NumPy array of shape {value.shape}"
        case nn.Module():
            return f"a module ({type(value).__name__})"
        case types.FunctionType() | types.BuiltinFunctionType() | types.MethodType():
            return f"the function {value.__name__}"
        case type():
            return f"the class {value.__name__}"
        case None | bool() | int() | float() | complex() | str() | bytes():
            text = repr(value)
            return text if len(text) <= 40 else f"{text[:37]}..."
        case Iterator():
            return f"a {type(value).__name__}, which can be read only once"
    kind = type(value).__name__
    return f"an {kind}" if kind[0] in "AEIOaeio" else f"a {kind}"


def refused(name: str, value: object, due: str, remedy: str) -> TypeError:
    return TypeError(f"{name} must be {due}, not {described(value)}: {remedy}")


def scalar(value: Any) -> Any:
    """Convert a scalar of NumPy or torch to a Python scalar; return other values unchanged."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    if isinstance(value, Tensor) and value.dim() == 0 and not is_meta(value):
        return value.item()
    return value


def is_bool(value: object) -> bool:
    return isinstance(value, bool)


def whole_number(name: str, value: Any, /) -> int:
    """Return an integer of Python, NumPy or torch as an int; a bool is refused."""
    plain = scalar(value)
    if isinstance(plain, Integral) and not is_bool(plain):
        if abs(int(plain)) >= 2**63:
            raise ValueError(
                f"{name} has {int(plain).bit_length()} bits: pass an integer below 2^63, for "
                f"instance {name}=0"
            )
        return int(plain)
    if isinstance(plain, float):
        example = f"{plain:.0f}" if math.isfinite(plain) else "10"
        raise ValueError(f"{name}={plain}: it must be a whole number, such as {name}={example}")
    example = plain.strip() if isinstance(plain, str) and plain.strip().isdecimal() else "10"
    raise refused(name, value, "a whole number", f"pass {name}={example}, for instance")


def finite(name: str, value: Any, /) -> float:
    """Return a finite real number of Python, NumPy or torch as a float."""
    plain = scalar(value)
    if not isinstance(plain, Real) or is_bool(plain):
        example = "0.1"
        if isinstance(plain, str):
            with contextlib.suppress(ValueError):
                example = f"{float(plain):g}"
        raise refused(name, value, "a number", f"pass {name}={example}, for instance")
    try:
        number = float(plain)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}={number}: it must be finite, such as {name}=0.1")
    return number


def real(name: str, value: Any, /) -> float:
    """Return a real number, which may be infinite or NaN, as an int or a float."""
    plain = scalar(value)
    if isinstance(plain, float) and not math.isfinite(plain):
        return plain
    number = finite(name, plain if isinstance(plain, Real) else value)
    return plain if isinstance(plain, int) and plain == number and abs(plain) < 2**63 else number


def reals(name: str, value: Any, /) -> Tensor:
    """Return real numbers of any shape as a float64 tensor on the CPU."""
    plain = scalar(value)
    if isinstance(plain, Real):
        return torch.tensor(real(name, plain), dtype=torch.float64, device="cpu")
    if is_meta(value) or not isinstance(value, Sequence | np.ndarray | Tensor):
        due = "a number, or an array or tensor of numbers"
        raise refused(name, value, due, f"pass {name}=torch.linspace(-1, 1, 21)")
    if isinstance(value, str | bytes):
        raise refused(name, value, "a tensor of numbers", f"pass {name}=torch.linspace(-1, 1, 21)")
    if isinstance(value, Tensor) and value.layout != torch.strided:
        raise TypeError(f"{name} has the layout {value.layout}: pass {name}.to_dense()")
    if isinstance(value, Sequence):
        # Conversion fails for nested lists of unequal lengths or with other objects than numbers.
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
            value = np.asarray(value)
    if isinstance(value, Sequence):
        raise refused(name, value, "an array of numbers", f"pass {name}=torch.linspace(-1, 1, 21)")
    array = torch.as_tensor(finite_array(name, value), dtype=torch.float64, device="cpu")
    return array.detach()


def axes(name: str, value: Any, /) -> Any:
    """Return matplotlib Axes."""
    if hasattr(value, "plot") and hasattr(value, "figure"):
        return value
    raise refused(name, value, "matplotlib Axes", f"pass {name}=plt.gca(), or omit it")


def panels(name: str, value: Any, /) -> list[Any]:
    """Return a list of matplotlib Axes, given one Axes or several, as from ``plt.subplots``."""
    if hasattr(value, "plot"):
        return [axes(name, value)]
    if isinstance(value, np.ndarray):
        value = value.ravel().tolist()
    items = value if isinstance(value, Tensor) else items_of(value)
    if not isinstance(items, list):
        raise refused(name, value, "matplotlib Axes", f"pass {name}=plt.subplots(2, 2)[1]")
    return [axes(f"each of {name}", item) for item in items]


def rates(name: str, value: Any, /) -> Any:
    """Return a number, or a mapping of steps to numbers."""
    if isinstance(value, Mapping):
        return {
            finite(f"each step of {name}", step): finite(f"{name}[{step!r}]", rate)
            for step, rate in value.items()
        }
    return finite(name, value)


def factor(name: str, value: Any, /) -> Any:
    """Return a finite float, or a floating-point tensor without axes, which may need a gradient."""
    if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
        return value
    return finite(name, value)


def factors(name: str, value: Any, /) -> Any:
    """Return one factor, or a dict of factors by name."""
    if isinstance(value, Mapping):
        return {key: factor(f"{name}[{key!r}]", each) for key, each in value.items()}
    return factor(name, value)


def flag(name: str, value: Any, /) -> bool:
    """Return a bool of Python, NumPy or torch as a bool."""
    plain = scalar(value)
    if isinstance(plain, bool):
        return plain
    example = isinstance(plain, int | str) and plain in (1, "True", "true")
    raise refused(name, value, "True or False", f"pass {name}={example}")


def flag_or_auto(name: str, value: Any, /) -> bool | str:
    """Return a bool, or the string ``"auto"``."""
    if isinstance(value, str) and value == "auto":
        return value
    plain = scalar(value)
    if isinstance(plain, bool):
        return plain
    raise refused(name, value, "True, False or 'auto'", f"pass {name}='auto', for instance")


def text(name: str, value: Any, /) -> str:
    """Return a string."""
    plain = scalar(value)
    if isinstance(plain, str):
        return str(plain)
    raise refused(name, value, "a string", f"the documentation lists the choices for {name}")


def path(name: str, value: Any, /) -> Any:
    """Return a path, which is a string or a ``pathlib.Path``."""
    if isinstance(value, str | os.PathLike) and value != "":
        if "\0" in str(os.fspath(value)):
            raise ValueError(
                f"{name}={os.fspath(value)!r} contains a NUL character: pass {name}='results', "
                "for instance"
            )
        return value
    raise refused(name, value, "a path", f"pass {name}='results', or a pathlib.Path")


def dtype(name: str, value: Any, /) -> torch.dtype:
    """Return a torch dtype."""
    if isinstance(value, torch.dtype):
        return value
    raise refused(name, value, "a torch.dtype", f"pass {name}=torch.float32, for instance")


def device(name: str, value: Any, /) -> torch.device:
    """Return a torch device, given the device or its name; the meta device is refused."""
    if not isinstance(value, str | torch.device):
        raise refused(name, value, "a device", f"pass {name}='cpu', for instance")
    with contextlib.suppress(RuntimeError):
        if (known := torch.device(value)).type != "meta":
            return known
    raise ValueError(
        f"{name}={str(value)!r} is not a torch device with memory: pass {name}='cpu', for instance"
    )


def items_of(value: Any) -> list[Any] | None:
    """Return the items of a one-dimensional collection; None for any other value."""
    if isinstance(value, np.ndarray | Tensor):
        return value.tolist() if value.ndim == 1 and not is_meta(value) else None
    if isinstance(value, Collection | Iterator) and not isinstance(value, str | bytes | Mapping):
        return list(value)
    return None


def whole_numbers(name: str, value: Any, /) -> tuple[int, ...]:
    """Return a collection of integers as a tuple of ints."""
    if (items := items_of(value)) is not None:
        return tuple(whole_number(f"each of {name}", item) for item in items)
    raise refused(name, value, "a collection of whole numbers", f"pass {name}=(30, 60)")


def numbers(name: str, value: Any, /) -> list[float]:
    """Return a sequence of finite numbers as a list of floats."""
    if (items := items_of(value)) is not None and not isinstance(value, set | frozenset):
        return [finite(f"each of {name}", item) for item in items]
    raise refused(name, value, "a sequence of numbers", f"pass {name}=[1.0, 2.0]")


def at_least(least: float, **options: float | None) -> None:
    """Raise ValueError if an option is less than ``least`` or not finite."""
    for name, value in options.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name}={value}: it must be at least {least}")
        if value is not None and math.isinf(value):
            raise ValueError(f"{name}={value}: it must be finite, such as {name}=1000")


def finite_array(name: str, value: Any, /) -> Any:
    """Return an array, tensor or sequence of real numbers."""
    if isinstance(value, Sequence):
        return numbers(name, value)
    kind = value.dtype
    real = kind.kind in "fiu" if isinstance(value, np.ndarray) else not kind.is_complex
    if real and kind not in (torch.bool,):
        return value
    raise refused(name, value, "an array of real numbers", f"its dtype is {kind}")


def is_sparse(value: object) -> bool:
    """Return whether a value is a SciPy matrix or operator."""
    return hasattr(value, "tocsr") or hasattr(value, "matmat")


def is_meta(value: object) -> bool:
    """Return whether a value is a tensor on the meta device."""
    return isinstance(value, Tensor) and value.device.type == "meta"
