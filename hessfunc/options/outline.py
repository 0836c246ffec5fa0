"""Outlines of functions, by which ranks compare their options."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from types import FunctionType
from typing import Any

import torch

# Depth to which closures are opened.
_DEPTH = 6


def outline(value: Any, /, depth: int = _DEPTH) -> str:
    """Return the names and plain values that a value consists of, as text.

    Functions of this library are opened: their closures have the options with which they were made,
    such as ``mode`` of `hvp`. Other functions, tensors and modules have only a name, because two
    ranks may keep different numbers in them that do not matter.
    """
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return str(value)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    parts = dict(_parts(value)) if depth else {}
    shown = ", ".join(f"{key}={outline(part, depth - 1)}" for key, part in parts.items())
    return f"{name}({shown})" if shown else name


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a function or a dataclass of this library was made with, by name."""
    if isinstance(value, functools.partial):
        yield "function", value.func
        yield from ((f"argument {i}", each) for i, each in enumerate(value.args))
        yield from value.keywords.items()
        return
    if not type(value).__module__.startswith("hessfunc") and not (
        isinstance(value, FunctionType) and value.__module__.startswith("hessfunc")
    ):
        return
    if isinstance(value, FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield name, cell.cell_contents
    elif is_dataclass(value):
        yield from ((each.name, getattr(value, each.name)) for each in fields(value))
