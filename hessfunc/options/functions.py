"""Checks of functions: losses, curvature functions, matvecs and criteria."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hessfunc.options.scalars import (
    Check,
    is_bool,
    is_sparse,
    refused,
    scalar,
)


def function_of(count: int, takes: str, /) -> Check:
    """Return a check for functions with ``count`` arguments that are not modules or classes.

    Args:
        count: Number of positional arguments.
        takes: Names of the arguments, for the message.
    """

    def check(name: str, value: Any, /) -> Any:
        if is_function(value, count):
            return value
        raise refused(name, value, f"a function of {takes}", f"pass {name}=f, without calling it")

    return check


def flag_or_function_of(takes: str, /) -> Check:
    """Return a check for flags, and for functions of one argument.

    Args:
        takes: Name of the argument, for the message.
    """

    def check(name: str, value: Any, /) -> Any:
        given = scalar(value)
        if is_bool(given) or is_function(given, 1):
            return given
        raise refused(name, value, f"True, False or a function of {takes}", f"pass {name}=True")

    return check


def criterion(name: str, value: Any, /) -> Any:
    """Return a criterion: a function or a loss module of (outputs, targets)."""
    due = "a criterion of (outputs, targets)"
    if isinstance(value, type):
        raise refused(name, value, due, f"pass an instance, {name}={value.__name__}()")
    if callable(value) and _takes(value, 2):
        return value
    raise refused(name, value, due, f"pass {name}=torch.nn.functional.cross_entropy, for instance")


def _takes(value: Any, count: int) -> bool:
    """Return whether a callable accepts ``count`` arguments; True if it has no signature."""
    try:
        signature = inspect.signature(value.forward if isinstance(value, nn.Module) else value)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def is_function(value: Any, count: int) -> bool:
    """Return whether a value is a function with ``count`` arguments, not a module or class."""
    return callable(value) and not isinstance(value, nn.Module | type) and _takes(value, count)


def _is_loss(value: object) -> bool:
    return hasattr(value, "outputs") and hasattr(value, "criterion") and callable(value)


def pure(name: str, value: Any, /) -> Any:
    """Return a function of (params, inputs) that is not a module."""
    if isinstance(value, nn.Module):
        raise TypeError(
            f"{name}={type(value).__name__} is a module, not a function of (params, ...): use "
            "`model_fn, params = functional(model)` and `supervised(model_fn, criterion)`"
        )
    if getattr(value, "__module__", None) == "torch.nn.functional":
        raise TypeError(
            f"{name} is the function {value.__name__} of torch, not a function of (params, ...): "
            "pass `supervised(model_fn, criterion)`, the criterion last"
        )
    if is_function(value, 2):
        return value
    remedy = "pass the first result of hessfunc.functional(model)"
    raise refused(name, value, "a function of (params, inputs)", remedy)


def loss(name: str, value: Any, /) -> Any:
    """Return a function of (params, batch) that is not a module."""
    if isinstance(value, nn.Module):
        return pure(name, value)
    if is_function(value, 2):
        return value
    remedy = "pass hessfunc.supervised(model_fn, criterion), or a function of your own"
    raise refused(name, value, "a function of (params, batch)", remedy)


def curvature(name: str, value: Any, /) -> Any:
    """Return a curvature function (params, batch) -> matvec."""
    due = "a curvature function of (params, batch)"
    remedy = "pass hessfunc.hvp(loss), for instance"
    if _is_loss(value):
        raise refused(name, value, due, remedy)
    if not is_function(value, 2):
        if is_function(value, 1):
            remedy += "; this function has one argument, like a matvec"
        raise refused(name, value, due, remedy)
    return value


def matvec(name: str, value: Any, /) -> Any:
    """Return a matvec, a function of a vector block."""
    due = "a matvec, a function of a vector block"
    if isinstance(value, nn.Module):
        raise refused(
            name,
            value,
            due,
            "use `model_fn, params = hessfunc.functional(model)` and "
            "`hessfunc.hvp(hessfunc.supervised(model_fn, criterion))(params, batch)`",
        )
    if isinstance(value, Tensor):
        raise refused(name, value, due, "pass hessfunc.dense(matrix)")
    if isinstance(value, np.ndarray) or is_sparse(value):
        raise refused(name, value, due, "pass hessfunc.compat.from_scipy(matrix)")
    if hasattr(value, "__matmul__") and isinstance(getattr(value, "dtype", None), torch.dtype):
        raise refused(name, value, due, "pass hessfunc.matvecs.from_linear_operator(operator)")
    if not is_function(value, 1):
        if is_function(value, 2):
            raise TypeError(
                f"{name} is a curvature function or a loss, not a matvec: pass "
                "`hvp(loss)(params, batch)`, for instance"
            )
        raise refused(name, value, due, "pass hessfunc.hvp(loss)(params, batch), for instance")
    return value


def curvature_or_matvec(name: str, value: Any, /) -> Any:
    """Return a curvature function (params, batch) -> matvec, or a matvec."""
    if is_function(value, 2) or _is_loss(value):
        return curvature(name, value)
    return matvec(name, value)


def factory(name: str, value: Any, /) -> Any:
    """Return a function of a loss that returns a curvature function."""
    if is_function(value, 1):
        return value
    remedy = f"pass {name}=hessfunc.hvp, without calling it"
    raise refused(name, value, "a function of a loss", remedy)


def of_numpy(error: Exception, /) -> TypeError | None:
    """Return a clearer error for a function of arrays that was called with tensors, or None."""
    text = str(error)
    # NumPy names its own arrays; CuPy and JAX name the class that they do not accept.
    is_told = "from_scipy" in text or "from_numpy" in text
    if is_told or ("numpy" not in text and "'torch.Tensor'>" not in text):
        return None
    return TypeError(
        f"the function does not accept tensors ({text}): pass hessfunc.compat.from_scipy(A) for a "
        "NumPy matrix A, or hessfunc.compat.from_numpy(f, n=n) for a function f of arrays (of CuPy "
        "or JAX with xp=cupy or xp=jax.numpy)"
    )


def by_draw(name: str, value: Any, /) -> Any:
    """Return a function of i that gives the matvec of the i-th random batch."""
    if is_function(value, 1):
        return value
    remedy = "pass hessfunc.draws(curvature)(params, batches)"
    raise refused(name, value, "a function of the index of a draw", remedy)


def family(name: str, value: Any, /) -> Any:
    """Return a function of ``chunk_size=`` that returns a curvature function."""
    if callable(value) and not isinstance(value, nn.Module | type):
        with contextlib.suppress(TypeError, ValueError):
            inspect.signature(value).bind(chunk_size=1)
            return value
    remedy = f"pass {name}=functools.partial(hessfunc.hvp, loss)"
    raise refused(name, value, "a function of chunk_size=", remedy)
