"""Checks of trees, tensors, batches, results and selections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hessfunc.options.functions import is_function, matvec
from hessfunc.options.scalars import (
    described,
    finite,
    finite_array,
    is_meta,
    is_sparse,
    items_of,
    numbers,
    path,
    refused,
    text,
    whole_number,
    whole_numbers,
)
from hessfunc.trees import leaves


def tree(name: str, value: Any, /) -> Any:
    """Return a pytree of dense tensors with memory, unchanged."""
    if isinstance(value, nn.Module):
        remedy = "pass params of `model_fn, params = hessfunc.functional(model)`"
        raise refused(name, value, "a tree of tensors", remedy)
    if isinstance(value, Iterator):
        remedy = "pass a dict, such as dict(model.named_parameters())"
        raise refused(name, value, "a tree of tensors", remedy)
    if isinstance(value, np.ndarray):
        raise refused(name, value, "a tree of tensors", f"pass {name}=torch.from_numpy(array)")
    if type(value) is int and value > 0:
        remedy = f"pass {name}=torch.zeros({value}, dtype=torch.float64)"
        raise refused(name, value, "a tree of tensors", remedy)
    tensors = leaves(value)
    for leaf in tensors:
        if not isinstance(leaf, Tensor):
            where = value if leaf is value else leaf
            inside = "" if leaf is value else "a tree with "
            raise TypeError(
                f"{name} must be a tree of tensors, not {inside}{described(where)}: pass a "
                "tensor, or a (nested) dict, list or tuple of tensors"
            )
        if leaf.device.type == "meta":
            raise ValueError(
                f"{name} is on the meta device, which stores no numbers: load it on another "
                "device, for instance device='cpu'"
            )
        if leaf.layout != torch.strided:
            raise TypeError(f"{name} has a leaf of layout {leaf.layout}: pass leaf.to_dense()")
    if not tensors:
        raise ValueError(
            f"{name} is {described(value)} without tensors: pass the parameters, such as "
            "dict(model.named_parameters()), and check that not all of them are frozen"
        )
    return value


def tree_or_matvec(name: str, value: Any, /) -> Any:
    """Return a tree of tensors, such as a diagonal, or a matvec."""
    if isinstance(value, nn.Module) or not callable(value):
        return tree(name, value)
    return matvec(name, value)


def mapping(name: str, value: Any, /) -> Any:
    """Return a mapping of names to tensors or to further mappings, unchanged."""
    if isinstance(value, Mapping):
        return tree(name, value) if value else value
    raise refused(
        name,
        value,
        "a dict of names and tensors",
        "pass params of `model_fn, params = hessfunc.functional(model)`, or "
        "dict(model.named_parameters())",
    )


def indices(name: str, value: Any, /) -> Any:
    """Return a mapping of names to tensor indices, unchanged."""
    if isinstance(value, Mapping):
        return value
    raise refused(name, value, "a dict", f"pass {name}={{'0.weight': slice(0, 8)}}")


def coordinates(name: str, value: Any, /) -> Any:
    """Return one tensor of coordinates for all axes, or a list with one tensor per axis."""
    if isinstance(value, np.ndarray | Tensor) and not is_meta(value):
        return torch.as_tensor(finite_array(name, value), dtype=torch.float64, device="cpu")
    if isinstance(value, list | tuple) and value:
        if all(isinstance(axis, Sequence | np.ndarray | Tensor) for axis in value):
            return [
                torch.as_tensor(finite_array(name, axis), dtype=torch.float64, device="cpu")
                for axis in value
            ]
        return torch.tensor(numbers(name, value), dtype=torch.float64, device="cpu")
    due = "a tensor of coordinates, or one for each axis"
    raise refused(name, value, due, f"pass {name}=torch.linspace(-1, 1, 21)")


def tensors(name: str, value: Any, /) -> Any:
    """Return a nonempty list of tensors unchanged, or an iterator of tensors as a list."""
    remedy = f"pass {name}=list(model.parameters()), for instance"
    if isinstance(value, Iterator):
        value = list(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise refused(name, value, "a list of tensors", remedy)
    if not value:
        raise ValueError(f"{name} has no tensors: {remedy}")
    for item in value:
        if tensor(f"each of {name}", item).is_complex():
            raise refused(f"each of {name}", item, "real", f"its dtype is {item.dtype}")
    return value


def tensor(name: str, value: Any, /) -> Tensor:
    """Return a tensor with memory."""
    if is_meta(value):
        raise ValueError(
            f"{name} is on the meta device, which stores no numbers: load it on another device, "
            "for instance device='cpu'"
        )
    if isinstance(value, Tensor):
        return value
    remedy = "pass torch.as_tensor(array)" if isinstance(value, np.ndarray) else "pass a tensor"
    if is_sparse(value):
        remedy = "pass it to hessfunc.compat.from_scipy"
    raise refused(name, value, "a tensor", remedy)


def batches(name: str, value: Any, /) -> Any:
    """Return an iterable of batches, such as a list or a loader."""
    # A sequence may define only `__getitem__`; `iter` accepts it nevertheless.
    readable = isinstance(value, Iterable) or hasattr(value, "__getitem__")
    other = isinstance(value, str | bytes | nn.Module | type) or is_sparse(value)
    if not readable or other or getattr(value, "ndim", 1) == 0:
        raise refused(name, value, "a list of batches or a DataLoader", "pass [batch]")
    return value


def eigenpairs(name: str, value: Any, /) -> Any:
    """Return eigenpairs: any object with ``values`` and ``vectors``."""
    if isinstance(getattr(value, "values", None), Tensor) and hasattr(value, "vectors"):
        return value
    remedy = "pass the result of hessfunc.lanczos(matvec, params, k=10)"
    raise refused(name, value, "Eigenpairs", remedy)


def eigenpairs_or_density(name: str, value: Any, /) -> Any:
    """Return eigenpairs, or a spectral density: any object with ``nodes`` and ``basis``."""
    if isinstance(getattr(value, "nodes", None), Tensor) and hasattr(value, "basis"):
        return value
    return eigenpairs(name, value)


def several_eigenpairs(name: str, value: Any, /) -> Any:
    """Return eigenpairs, or a list of several."""
    if isinstance(value, list | tuple):
        return [eigenpairs(f"each of {name}", pairs) for pairs in value]
    return eigenpairs(name, value)


def estimates(name: str, value: Any, /) -> Any:
    """Return a nonempty sequence of estimates."""
    remedy = "pass the results of hessfunc.hutchinson, one for each seed"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if not value:
            raise ValueError(f"{name} is empty: {remedy}")
        for estimate in value:
            if not hasattr(estimate, "samples"):
                raise refused(f"each of {name}", estimate, "an Estimate", remedy)
        return value
    raise refused(name, value, "a list of Estimates", remedy)


def space(name: str, value: Any, /) -> Any:
    """Return a vector space, as returned by `sharded`."""
    # The public functions of `spaces` are validated, so this module cannot import `spaces`.
    if hasattr(value, "tree_leaves") and hasattr(value, "ranks"):
        return value
    raise refused(name, value, "a Space", "pass hessfunc.sharded(params, mesh)")


def module(name: str, value: Any, /) -> nn.Module:
    """Return a module."""
    if isinstance(value, nn.Module):
        return value
    remedy = "pass the torch.nn.Module itself"
    raise refused(name, value, "a module", remedy)


def optimizer(name: str, value: Any, /) -> torch.optim.Optimizer:
    """Return a torch optimiser."""
    if isinstance(value, torch.optim.Optimizer):
        return value
    raise refused(name, value, "a torch.optim.Optimizer", f"pass {name}=optimizer")


def optimizers(name: str, value: Any, /) -> list[torch.optim.Optimizer]:
    """Return a list of torch optimisers, given one or several."""
    items = [value] if isinstance(value, torch.optim.Optimizer) else items_of(value)
    if items is None:
        return [optimizer(name, value)]
    if not items:
        raise ValueError(f"{name} is empty: pass {name}=optimizer")
    return [optimizer(f"each of {name}", item) for item in items]


def stability(name: str, value: Any, /) -> Any:
    """Return a stability limit, or a function from the gradient to one."""
    # The module of `Stability` is validated, so this module cannot import it.
    if hasattr(value, "threshold") and hasattr(value, "preconditioned"):
        return value
    if is_function(value, 1):
        return value
    remedy = f"pass {name}=hessfunc.optim.Stability(threshold=2 / lr)"
    raise refused(name, value, "a Stability or a function of the gradient", remedy)


def pattern(name: str, value: Any, /) -> Any:
    """Return a glob over names, a list of names or globs, or a predicate (name, tensor)."""
    if isinstance(value, str):
        return str(value)
    if is_function(value, 2):
        return value
    if (items := items_of(value)) is not None and all(isinstance(item, str) for item in items):
        return items
    due = "a glob, a list of names or a predicate"
    raise refused(name, value, due, f"pass {name}='layer1.*', for instance")


def entries(name: str, value: Any, /) -> Any:
    """Return a pattern over leaves, or indices of a flat vector as a tuple of ints."""
    items = None if callable(value) else items_of(value)
    if items is None or any(isinstance(item, str) for item in items):
        return pattern(name, value)
    if not items:
        raise ValueError(f"{name} is empty: pass at least one index, such as {name}=range(10)")
    return whole_numbers(name, items)


def selection(name: str, value: Any, /) -> Any:
    """Return a glob over module names, a module type or a tuple of types, or a predicate."""
    if isinstance(value, str):
        return str(value)
    types_ = value if isinstance(value, tuple) and value else (value,)
    if all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in types_):
        return value
    if is_function(value, 2):
        return value
    due = "a glob over module names, a module type or a predicate"
    raise refused(name, value, due, f"pass {name}='layer1.*' or {name}=torch.nn.Linear")


def groups(name: str, value: Any, /) -> dict[str, list[str]]:
    """Return a mapping of group names to lists of names."""
    fits = isinstance(value, Mapping) and all(
        items_of(names) is not None for names in value.values()
    )
    if not fits:
        due = "a dict of groups of names"
        raise refused(name, value, due, f"pass {name}={{'first': ['0.weight', '0.bias']}}")
    return {
        group: [text(f"each of {name}", item) for item in items_of(names) or ()]
        for group, names in value.items()
    }


def parts(name: str, value: Any, /) -> Any:
    """Return a pattern, a list of patterns, or a mapping of names to patterns."""
    if isinstance(value, Mapping):
        return {key: pattern(f"{name}[{key!r}]", chosen) for key, chosen in value.items()}
    if callable(value):
        due = "a list of patterns, or a dict of names and patterns"
        raise refused(name, value, due, f"pass {name}={{'name': predicate}}")
    return pattern(name, value)


def pair(name: str, value: Any, /) -> Any:
    """Return a tuple or list of two values, such as inputs and targets."""
    if isinstance(value, tuple | list) and len(value) == 2:
        return value
    raise refused(name, value, "a pair", f"pass {name}=(first, second)")


def limits(name: str, value: Any, /) -> tuple[float, float]:
    """Return a lower and an upper limit as floats."""
    if isinstance(value, np.ndarray | Tensor) and value.ndim == 1:
        value = value.tolist()
    low, high = pair(name, value)
    return finite(f"the first of {name}", low), finite(f"the second of {name}", high)


def writer(name: str, value: Any, /) -> Any:
    """Return the path of a folder, or a TensorBoard writer."""
    if hasattr(value, "add_scalar") and hasattr(value, "flush"):
        return value
    return path(name, value)


def logger(name: str, value: Any, /) -> Any:
    """Return a run of Weights & Biases, or another object with ``log``."""
    if callable(getattr(value, "log", None)):
        return value
    raise refused(name, value, "a run with `log`", f"pass {name}=wandb.init()")


def shape(name: str, value: Any, /) -> int | tuple[int, ...]:
    """Return a number of entries as an int, or a nonempty shape as a tuple of ints."""
    if (items := items_of(value)) is None:
        return whole_number(name, value)
    if not items:
        raise ValueError(f"{name} is empty: pass {name}=10 for vectors of 10 entries, for instance")
    return whole_numbers(name, items)


def plain_callable(name: str, value: Any, /) -> Any:
    """Return a callable that is not a class."""
    if callable(value) and not isinstance(value, type):
        return value
    raise refused(name, value, "a function", f"pass {name}=f, without calling it")


def anything(name: str, value: Any, /) -> Any:
    """Return the value unchanged; the function itself checks it."""
    return value
