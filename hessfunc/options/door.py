"""Validation of the arguments of public functions.

Arguments with the same name have the same meaning in every public function. `ARGUMENTS` maps each
name to a check that normalises accepted values and raises for others. The decorator `validated`
applies the checks, so that functions see plain ints, floats, bools and strings. Each function
checks the ranges of its arguments itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, overload

import torch

from hessfunc.options.arguments import ARGUMENTS
from hessfunc.options.scalars import (
    Check,
)
from hessfunc.trees import leaves

if TYPE_CHECKING:
    from hessfunc.ranks import Ranks


P = ParamSpec("P")
R = TypeVar("R")
# Options of every run of an algorithm.
RUN = ("seed", "space", "callback", "progress", "checkpoint", "memory")
# Arguments that may differ between the ranks of a run.
_OF_ONE_RANK = frozenset({"callback", "progress", "space", "mesh"})


_memory: ContextVar[float | None] = ContextVar("memory", default=None)


@contextmanager
def limited(memory: float, /) -> Iterator[None]:
    """Context manager of computations that may take ``memory`` bytes, and no more than outside."""
    if not memory > 0:
        raise ValueError(f"memory={memory}: it must be positive, in bytes, such as memory=8e9")
    outside = _memory.get()
    token = _memory.set(memory if outside is None else min(memory, outside))
    try:
        yield
    finally:
        _memory.reset(token)


def memory_limit_now() -> float | None:
    """Return the bytes that computations may take here, or None without a limit."""
    return _memory.get()


@overload
def validated(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def validated(**own: Check) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def validated(function: Any = None, /, **own: Check) -> Any:
    """Decorate a function so that its arguments are checked and normalised by name.

    None is accepted for an argument whose default is None. If the vectors or products are divided
    among ranks, an argument that is wrong on one rank or differs between ranks raises on every
    rank.

    Args:
        function: Function to wrap. None returns a decorator.
        own: Checks that replace those of `ARGUMENTS` for this function.
    """
    if function is None:
        return functools.partial(validated, **own)
    parameters = list(inspect.signature(function).parameters.values())
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    ordered: list[tuple[str, Check]] = []
    rest: tuple[str, Check] | None = None
    by_name: dict[str, Check] = {}
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            if parameter.name == "run":
                by_name |= {name: functools.partial(_optional, ARGUMENTS[name]) for name in RUN}
            continue
        check = own.get(parameter.name) or ARGUMENTS[parameter.name]
        if parameter.default is None:
            check = functools.partial(_optional, check)
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = parameter.name, check
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            ordered.append((parameter.name, check))
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            by_name[parameter.name] = check

    has_run = "seed" in by_name and any(p.kind is p.VAR_KEYWORD for p in parameters)

    def checked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        values = [check(name, value) for (name, check), value in zip(ordered, args, strict=False)]
        beyond = args[len(values) :]
        if has_run and (unknown := kwargs.keys() - by_name):
            raise TypeError(
                f"{function.__name__} has no option {min(unknown)!r}: choose one of "
                f"{', '.join(sorted(by_name))}"
            )
        if beyond and rest is None and function.__annotations__.get("return") == "Curvature":
            raise TypeError(
                f"{function.__name__} takes {len(ordered)} positional argument and returns a "
                f"function: call {function.__name__}({ordered[0][0]})(params, batch)"
            )
        # For unknown arguments, the call below raises Python's own error.
        values += beyond if rest is None else [rest[1](rest[0], value) for value in beyond]
        return values, {
            name: by_name[name](name, value) if name in by_name else value
            for name, value in kwargs.items()
        }

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            # Dynamo traces only what becomes a part of the compiled graph.
            return function(*args, **kwargs)
        together = _together(args, kwargs) if "space" in by_name else None
        if together is None:
            args, kwargs = checked(args, kwargs)  # type: ignore[assignment]
        else:
            ranks, device = together
            args, kwargs = ranks.all_do(lambda: checked(args, kwargs), device)  # type: ignore[assignment]
            named = zip((name for name, _ in ordered), args, strict=False)
            given = defaults | dict(named) | kwargs
            ranks.alike(
                {"the function": function.__name__}
                | {n: _outline(n, value) for n, value in given.items() if n not in _OF_ONE_RANK}
            )
        # The option ``memory`` of a run holds for everything inside. Warnings count the frames up
        # to their caller, so that there is none between the wrapper and the function.
        memory = kwargs.pop("memory", None) if has_run else None
        with nullcontext() if memory is None else limited(memory):
            return function(*args, **kwargs)

    return wrapper


def _together(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Ranks, torch.device] | None:
    """Return the ranks that call a function together, and their device; None for a single one.

    Ranks are recognised by a ``space``, a matvec with ``ranks`` or a DTensor among the arguments.
    """
    space = kwargs.get("space")
    if space is not None and getattr(space, "ranks", None) is not None:
        return space.ranks, space.device
    for value in args:
        if callable(value):
            if (ranks := getattr(value, "ranks", None)) is not None:
                return ranks
            continue
        for leaf in leaves(value):
            if hasattr(leaf, "device_mesh"):
                # The import of torch.distributed is slow.
                from hessfunc.ranks import Ranks

                return Ranks.apart(leaf.device_mesh), leaf.device
    return None


def _outline(name: str, value: Any) -> Any:
    """Return a plain value that represents an argument when ranks compare it.

    A checkpoint is represented by "given", because ranks later compare its contents.
    """
    if value is None or (isinstance(value, bool | int | float | str) and name != "checkpoint"):
        return value
    return str(value) if isinstance(value, torch.dtype) else "given"


def or_none(check: Check, /) -> Check:
    """Return a check that also accepts None, for arguments with another default."""
    return functools.partial(_optional, check)


def _optional(check: Check, name: str, value: Any) -> Any:
    return None if value is None else check(name, value)
