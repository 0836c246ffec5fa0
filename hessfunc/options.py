"""Validation of the arguments of public functions.

Arguments with the same name have the same meaning in every public function. `ARGUMENTS` maps each
name to a check that normalises accepted values and raises for others. The decorator `validated`
applies the checks, so that functions see plain ints, floats, bools and strings. Each function
checks the ranges of its arguments itself.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import os
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn

from hessfunc.trees import leaves

if TYPE_CHECKING:
    from hessfunc.ranks import Ranks


P = ParamSpec("P")
R = TypeVar("R")
# Function (name, value) -> normalised value, which raises for a wrong value.
Check: TypeAlias = Callable[[str, Any], Any]
# Options of every run of an algorithm.
RUN = ("seed", "space", "callback", "checkpoint")
# Arguments that may differ between the ranks of a run.
_OF_ONE_RANK = frozenset({"callback", "space", "mesh"})


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
            return function(*args, **kwargs)
        ranks, device = together
        args, kwargs = ranks.all_do(lambda: checked(args, kwargs), device)  # type: ignore[assignment]
        named = zip((name for name, _ in ordered), args, strict=False)
        given = defaults | dict(named) | kwargs
        ranks.alike(
            {"the function": function.__name__}
            | {n: _outline(n, value) for n, value in given.items() if n not in _OF_ONE_RANK}
        )
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


def _refused(name: str, value: object, due: str, remedy: str) -> TypeError:
    return TypeError(f"{name} must be {due}, not {described(value)}: {remedy}")


# Numbers, flags and strings


def _scalar(value: Any) -> Any:
    """Convert a scalar of NumPy or torch to a Python scalar; return other values unchanged."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    if isinstance(value, Tensor) and value.dim() == 0 and not _is_meta(value):
        return value.item()
    return value


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def whole_number(name: str, value: Any, /) -> int:
    """Return an integer of Python, NumPy or torch as an int; a bool is refused."""
    plain = _scalar(value)
    if isinstance(plain, Integral) and not _is_bool(plain):
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
    raise _refused(name, value, "a whole number", f"pass {name}={example}, for instance")


def finite(name: str, value: Any, /) -> float:
    """Return a finite real number of Python, NumPy or torch as a float."""
    plain = _scalar(value)
    if not isinstance(plain, Real) or _is_bool(plain):
        example = "0.1"
        if isinstance(plain, str):
            with contextlib.suppress(ValueError):
                example = f"{float(plain):g}"
        raise _refused(name, value, "a number", f"pass {name}={example}, for instance")
    try:
        number = float(plain)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}={number}: it must be finite, such as {name}=0.1")
    return number


def real(name: str, value: Any, /) -> float:
    """Return a real number, which may be infinite or NaN, as an int or a float."""
    plain = _scalar(value)
    if isinstance(plain, float) and not math.isfinite(plain):
        return plain
    number = finite(name, plain if isinstance(plain, Real) else value)
    return plain if isinstance(plain, int) and plain == number and abs(plain) < 2**63 else number


def reals(name: str, value: Any, /) -> Tensor:
    """Return real numbers of any shape as a float64 tensor on the CPU."""
    plain = _scalar(value)
    if isinstance(plain, Real):
        return torch.tensor(real(name, plain), dtype=torch.float64, device="cpu")
    if _is_meta(value) or not isinstance(value, Sequence | np.ndarray | Tensor):
        due = "a number, or an array or tensor of numbers"
        raise _refused(name, value, due, f"pass {name}=torch.linspace(-1, 1, 21)")
    if isinstance(value, str | bytes):
        raise _refused(name, value, "a tensor of numbers", f"pass {name}=torch.linspace(-1, 1, 21)")
    if isinstance(value, Tensor) and value.layout != torch.strided:
        raise TypeError(f"{name} has the layout {value.layout}: pass {name}.to_dense()")
    if isinstance(value, Sequence):
        # Conversion fails for nested lists of unequal lengths or with other objects than numbers.
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
            value = np.asarray(value)
    if isinstance(value, Sequence):
        raise _refused(name, value, "an array of numbers", f"pass {name}=torch.linspace(-1, 1, 21)")
    array = torch.as_tensor(finite_array(name, value)).detach()
    return array.to(dtype=torch.float64, device="cpu")


def axes(name: str, value: Any, /) -> Any:
    """Return matplotlib Axes."""
    if hasattr(value, "plot") and hasattr(value, "figure"):
        return value
    raise _refused(name, value, "matplotlib Axes", f"pass {name}=plt.gca(), or omit it")


def panels(name: str, value: Any, /) -> list[Any]:
    """Return a list of matplotlib Axes, given one Axes or several, as from ``plt.subplots``."""
    if hasattr(value, "plot"):
        return [axes(name, value)]
    if isinstance(value, np.ndarray):
        value = value.ravel().tolist()
    items = value if isinstance(value, Tensor) else _items(value)
    if not isinstance(items, list):
        raise _refused(name, value, "matplotlib Axes", f"pass {name}=plt.subplots(2, 2)[1]")
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


def flag(name: str, value: Any, /) -> bool:
    """Return a bool of Python, NumPy or torch as a bool."""
    plain = _scalar(value)
    if isinstance(plain, bool):
        return plain
    example = isinstance(plain, int | str) and plain in (1, "True", "true")
    raise _refused(name, value, "True or False", f"pass {name}={example}")


def text(name: str, value: Any, /) -> str:
    """Return a string."""
    plain = _scalar(value)
    if isinstance(plain, str):
        return str(plain)
    raise _refused(name, value, "a string", f"the documentation lists the choices for {name}")


def path(name: str, value: Any, /) -> Any:
    """Return a path, which is a string or a ``pathlib.Path``."""
    if isinstance(value, str | os.PathLike) and value != "":
        if "\0" in str(os.fspath(value)):
            raise ValueError(
                f"{name}={os.fspath(value)!r} contains a NUL character: pass {name}='results', "
                "for instance"
            )
        return value
    raise _refused(name, value, "a path", f"pass {name}='results', or a pathlib.Path")


def dtype(name: str, value: Any, /) -> torch.dtype:
    """Return a torch dtype."""
    if isinstance(value, torch.dtype):
        return value
    raise _refused(name, value, "a torch.dtype", f"pass {name}=torch.float32, for instance")


def device(name: str, value: Any, /) -> torch.device:
    """Return a torch device, given the device or its name; the meta device is refused."""
    if not isinstance(value, str | torch.device):
        raise _refused(name, value, "a device", f"pass {name}='cpu', for instance")
    with contextlib.suppress(RuntimeError):
        if (known := torch.device(value)).type != "meta":
            return known
    raise ValueError(
        f"{name}={str(value)!r} is not a torch device with memory: pass {name}='cpu', for instance"
    )


def _items(value: Any) -> list[Any] | None:
    """Return the items of a one-dimensional collection; None for any other value."""
    if isinstance(value, np.ndarray | Tensor):
        return value.tolist() if value.ndim == 1 and not _is_meta(value) else None
    if isinstance(value, Collection | Iterator) and not isinstance(value, str | bytes | Mapping):
        return list(value)
    return None


def whole_numbers(name: str, value: Any, /) -> tuple[int, ...]:
    """Return a collection of integers as a tuple of ints."""
    if (items := _items(value)) is not None:
        return tuple(whole_number(f"each of {name}", item) for item in items)
    raise _refused(name, value, "a collection of whole numbers", f"pass {name}=(30, 60)")


def numbers(name: str, value: Any, /) -> list[float]:
    """Return a sequence of finite numbers as a list of floats."""
    if (items := _items(value)) is not None and not isinstance(value, set | frozenset):
        return [finite(f"each of {name}", item) for item in items]
    raise _refused(name, value, "a sequence of numbers", f"pass {name}=[1.0, 2.0]")


# Trees and data


def tree(name: str, value: Any, /) -> Any:
    """Return a pytree of dense tensors with memory, unchanged."""
    if isinstance(value, nn.Module):
        remedy = "pass params of `model_fn, params = hessfunc.functional(model)`"
        raise _refused(name, value, "a tree of tensors", remedy)
    if isinstance(value, Iterator):
        remedy = "pass a dict, such as dict(model.named_parameters())"
        raise _refused(name, value, "a tree of tensors", remedy)
    if isinstance(value, np.ndarray):
        raise _refused(name, value, "a tree of tensors", f"pass {name}=torch.from_numpy(array)")
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


def mapping(name: str, value: Any, /) -> Any:
    """Return a mapping of names to tensors or to further mappings, unchanged."""
    if isinstance(value, Mapping):
        return tree(name, value) if value else value
    raise _refused(
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
    raise _refused(name, value, "a dict", f"pass {name}={{'0.weight': slice(0, 8)}}")


def coordinates(name: str, value: Any, /) -> Any:
    """Return one tensor of coordinates for all axes, or a list with one tensor per axis."""
    if isinstance(value, np.ndarray | Tensor) and not _is_meta(value):
        return torch.as_tensor(finite_array(name, value))
    if isinstance(value, list | tuple) and value:
        if all(isinstance(axis, Sequence | np.ndarray | Tensor) for axis in value):
            return [torch.as_tensor(finite_array(name, axis)) for axis in value]
        return torch.tensor(numbers(name, value), dtype=torch.float64)
    due = "a tensor of coordinates, or one for each axis"
    raise _refused(name, value, due, f"pass {name}=torch.linspace(-1, 1, 21)")


def finite_array(name: str, value: Any, /) -> Any:
    """Return an array, tensor or sequence of real numbers."""
    if isinstance(value, Sequence):
        return numbers(name, value)
    kind = value.dtype
    real = kind.kind in "fiu" if isinstance(value, np.ndarray) else not kind.is_complex
    if real and kind not in (torch.bool,):
        return value
    raise _refused(name, value, "an array of real numbers", f"its dtype is {kind}")


def tensors(name: str, value: Any, /) -> Any:
    """Return a nonempty list of tensors unchanged, or an iterator of tensors as a list."""
    remedy = f"pass {name}=list(model.parameters()), for instance"
    if isinstance(value, Iterator):
        value = list(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _refused(name, value, "a list of tensors", remedy)
    if not value:
        raise ValueError(f"{name} has no tensors: {remedy}")
    for item in value:
        if tensor(f"each of {name}", item).is_complex():
            raise _refused(f"each of {name}", item, "real", f"its dtype is {item.dtype}")
    return value


def _is_sparse(value: object) -> bool:
    """Return whether a value is a SciPy matrix or operator."""
    return hasattr(value, "tocsr") or hasattr(value, "matmat")


def _is_meta(value: object) -> bool:
    """Return whether a value is a tensor on the meta device."""
    return isinstance(value, Tensor) and value.device.type == "meta"


def tensor(name: str, value: Any, /) -> Tensor:
    """Return a tensor with memory."""
    if _is_meta(value):
        raise ValueError(
            f"{name} is on the meta device, which stores no numbers: load it on another device, "
            "for instance device='cpu'"
        )
    if isinstance(value, Tensor):
        return value
    remedy = "pass torch.as_tensor(array)" if isinstance(value, np.ndarray) else "pass a tensor"
    if _is_sparse(value):
        remedy = "pass it to hessfunc.compat.from_scipy"
    raise _refused(name, value, "a tensor", remedy)


def batches(name: str, value: Any, /) -> Any:
    """Return an iterable of batches, such as a list or a loader."""
    # A sequence may define only `__getitem__`; `iter` accepts it nevertheless.
    readable = isinstance(value, Iterable) or hasattr(value, "__getitem__")
    other = isinstance(value, str | bytes | nn.Module | type) or _is_sparse(value)
    if not readable or other or getattr(value, "ndim", 1) == 0:
        raise _refused(name, value, "a list of batches or a DataLoader", "pass [batch]")
    return value


def eigenpairs(name: str, value: Any, /) -> Any:
    """Return eigenpairs: any object with ``values`` and ``vectors``."""
    if isinstance(getattr(value, "values", None), Tensor) and hasattr(value, "vectors"):
        return value
    remedy = "pass the result of hessfunc.lanczos(matvec, params, k=10)"
    raise _refused(name, value, "Eigenpairs", remedy)


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
                raise _refused(f"each of {name}", estimate, "an Estimate", remedy)
        return value
    raise _refused(name, value, "a list of Estimates", remedy)


def space(name: str, value: Any, /) -> Any:
    """Return a vector space, as returned by `sharded`."""
    # The public functions of `spaces` are validated, so this module cannot import `spaces`.
    if hasattr(value, "tree_leaves") and hasattr(value, "ranks"):
        return value
    raise _refused(name, value, "a Space", "pass hessfunc.sharded(params, mesh)")


def module(name: str, value: Any, /) -> nn.Module:
    """Return a module."""
    if isinstance(value, nn.Module):
        return value
    remedy = "pass the torch.nn.Module itself"
    raise _refused(name, value, "a module", remedy)


def optimizer(name: str, value: Any, /) -> torch.optim.Optimizer:
    """Return a torch optimiser."""
    if isinstance(value, torch.optim.Optimizer):
        return value
    raise _refused(name, value, "a torch.optim.Optimizer", f"pass {name}=optimizer")


def optimizers(name: str, value: Any, /) -> list[torch.optim.Optimizer]:
    """Return a list of torch optimisers, given one or several."""
    items = [value] if isinstance(value, torch.optim.Optimizer) else _items(value)
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
    if _is_function(value, 1):
        return value
    remedy = f"pass {name}=hessfunc.optim.Stability(threshold=2 / lr)"
    raise _refused(name, value, "a Stability or a function of the gradient", remedy)


def pattern(name: str, value: Any, /) -> Any:
    """Return a glob over names, a list of names or globs, or a predicate (name, tensor)."""
    if isinstance(value, str):
        return str(value)
    if _is_function(value, 2):
        return value
    if (items := _items(value)) is not None and all(isinstance(item, str) for item in items):
        return items
    due = "a glob, a list of names or a predicate"
    raise _refused(name, value, due, f"pass {name}='layer1.*', for instance")


def entries(name: str, value: Any, /) -> Any:
    """Return a pattern over leaves, or indices of a flat vector as a tuple of ints."""
    items = None if callable(value) else _items(value)
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
    if _is_function(value, 2):
        return value
    due = "a glob over module names, a module type or a predicate"
    raise _refused(name, value, due, f"pass {name}='layer1.*' or {name}=torch.nn.Linear")


def groups(name: str, value: Any, /) -> dict[str, list[str]]:
    """Return a mapping of group names to lists of names."""
    fits = isinstance(value, Mapping) and all(_items(names) is not None for names in value.values())
    if not fits:
        due = "a dict of groups of names"
        raise _refused(name, value, due, f"pass {name}={{'first': ['0.weight', '0.bias']}}")
    return {
        group: [text(f"each of {name}", item) for item in _items(names) or ()]
        for group, names in value.items()
    }


def parts(name: str, value: Any, /) -> Any:
    """Return a pattern, a list of patterns, or a mapping of names to patterns."""
    if isinstance(value, Mapping):
        return {key: pattern(f"{name}[{key!r}]", chosen) for key, chosen in value.items()}
    if callable(value):
        due = "a list of patterns, or a dict of names and patterns"
        raise _refused(name, value, due, f"pass {name}={{'name': predicate}}")
    return pattern(name, value)


def pair(name: str, value: Any, /) -> Any:
    """Return a tuple or list of two values, such as inputs and targets."""
    if isinstance(value, tuple | list) and len(value) == 2:
        return value
    raise _refused(name, value, "a pair", f"pass {name}=(first, second)")


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


def shape(name: str, value: Any, /) -> int | tuple[int, ...]:
    """Return a number of entries as an int, or a nonempty shape as a tuple of ints."""
    if (items := _items(value)) is None:
        return whole_number(name, value)
    if not items:
        raise ValueError(f"{name} is empty: pass {name}=10 for vectors of 10 entries, for instance")
    return whole_numbers(name, items)


def called(name: str, value: Any, /) -> Any:
    """Return a callable that is not a class."""
    if callable(value) and not isinstance(value, type):
        return value
    raise _refused(name, value, "a function", f"pass {name}=f, without calling it")


def anything(name: str, value: Any, /) -> Any:
    """Return the value unchanged; the function itself checks it."""
    return value


# Functions


def function_of(count: int, takes: str, /) -> Check:
    """Return a check for functions with ``count`` arguments that are not modules or classes.

    Args:
        count: Number of positional arguments.
        takes: Names of the arguments, for the message.
    """

    def check(name: str, value: Any, /) -> Any:
        if _is_function(value, count):
            return value
        raise _refused(name, value, f"a function of {takes}", f"pass {name}=f, without calling it")

    return check


def criterion(name: str, value: Any, /) -> Any:
    """Return a criterion: a function or a loss module of (outputs, targets)."""
    due = "a criterion of (outputs, targets)"
    if isinstance(value, type):
        raise _refused(name, value, due, f"pass an instance, {name}={value.__name__}()")
    if callable(value) and _takes(value, 2):
        return value
    raise _refused(name, value, due, f"pass {name}=torch.nn.functional.cross_entropy, for instance")


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


def _is_function(value: Any, count: int) -> bool:
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
    if _is_function(value, 2):
        return value
    remedy = "pass the first result of hessfunc.functional(model)"
    raise _refused(name, value, "a function of (params, inputs)", remedy)


def loss(name: str, value: Any, /) -> Any:
    """Return a function of (params, batch) that is not a module."""
    if isinstance(value, nn.Module):
        return pure(name, value)
    if _is_function(value, 2):
        return value
    remedy = "pass hessfunc.supervised(model_fn, criterion), or a function of your own"
    raise _refused(name, value, "a function of (params, batch)", remedy)


def curvature(name: str, value: Any, /) -> Any:
    """Return a curvature function (params, batch) -> matvec."""
    due = "a curvature function of (params, batch)"
    remedy = "pass hessfunc.hvp(loss), for instance"
    if _is_loss(value):
        raise _refused(name, value, due, remedy)
    if not _is_function(value, 2):
        if _is_function(value, 1):
            remedy += "; this function has one argument, like a matvec"
        raise _refused(name, value, due, remedy)
    return value


def matvec(name: str, value: Any, /) -> Any:
    """Return a matvec, a function of a vector block."""
    due = "a matvec, a function of a vector block"
    if isinstance(value, nn.Module):
        raise _refused(
            name,
            value,
            due,
            "use `model_fn, params = hessfunc.functional(model)` and "
            "`hessfunc.hvp(hessfunc.supervised(model_fn, criterion))(params, batch)`",
        )
    if isinstance(value, Tensor):
        raise _refused(name, value, due, "pass hessfunc.dense(matrix)")
    if isinstance(value, np.ndarray) or _is_sparse(value):
        raise _refused(name, value, due, "pass hessfunc.compat.from_scipy(matrix)")
    if not _is_function(value, 1):
        if _is_function(value, 2):
            raise TypeError(
                f"{name} is a curvature function or a loss, not a matvec: pass "
                "`hvp(loss)(params, batch)`, for instance"
            )
        raise _refused(name, value, due, "pass hessfunc.hvp(loss)(params, batch), for instance")
    return value


def factory(name: str, value: Any, /) -> Any:
    """Return a function of a loss that returns a curvature function."""
    if _is_function(value, 1):
        return value
    remedy = f"pass {name}=hessfunc.hvp, without calling it"
    raise _refused(name, value, "a function of a loss", remedy)


def of_numpy(error: Exception, /) -> TypeError | None:
    """Return a clearer error for a NumPy function that was called with tensors; None otherwise."""
    if "numpy" not in str(error) or "from_scipy" in str(error):
        return None
    return TypeError(
        f"the function does not accept tensors ({error}): pass hessfunc.compat.from_scipy(A) for a "
        "NumPy matrix A, or from_scipy(LinearOperator((n, n), f)) for a function f of arrays"
    )


def by_draw(name: str, value: Any, /) -> Any:
    """Return a function of i that gives the matvec of the i-th random batch."""
    if _is_function(value, 1):
        return value
    remedy = "pass hessfunc.draws(curvature)(params, batches)"
    raise _refused(name, value, "a function of the index of a draw", remedy)


def family(name: str, value: Any, /) -> Any:
    """Return a function of ``chunk_size=`` that returns a curvature function."""
    if callable(value) and not isinstance(value, nn.Module | type):
        with contextlib.suppress(TypeError, ValueError):
            inspect.signature(value).bind(chunk_size=1)
            return value
    remedy = f"pass {name}=functools.partial(hessfunc.hvp, loss)"
    raise _refused(name, value, "a function of chunk_size=", remedy)


# Check of each argument of the public functions, by name.
ARGUMENTS: dict[str, Check] = {
    "self": anything,
    # Functions
    "f": function_of(1, "eigenvalues"),
    "matvec": matvec,
    "matvecs": matvec,
    "preconditioner": matvec,
    "draws": by_draw,
    "family": family,
    "vectors": whole_number,
    "curvature": curvature,
    "loss": loss,
    "model_fn": pure,
    "outputs": pure,
    "criterion": criterion,
    "targets": function_of(1, "a batch"),
    "output_hessian": function_of(2, "(outputs, targets)"),
    "weight": function_of(1, "a batch"),
    "gradient": function_of(1, "params"),
    "algorithm": function_of(2, "(matvec, params)"),
    "callback": function_of(1, "the result so far"),
    "compose": function_of(2, "(model_fn, criterion)"),
    "solve": called,
    "outer": function_of(3, "(params, hyperparams, batch)"),
    "inner": function_of(3, "(params, hyperparams, batch)"),
    "norm": function_of(1, "a vector block"),
    "fn": function_of(1, "one argument"),
    # Models and selections of their parts
    "model": module,
    "optimizer": optimizer,
    "stability": stability,
    "recompute": text,
    "pattern": pattern,
    "select": selection,
    # Trees and data
    "vector": tree,
    "like": tree,
    "params": tree,
    "hyperparams": tree,
    "direction": tree,
    "directions": tree,
    "diagonal": tree,
    "known": tree,
    "start": tree,
    "b": tree,
    "tree": mapping,
    "rest": mapping,
    "slices": indices,
    "blocks": parts,
    "flat": tensor,
    "matrix": tensor,
    "operator": anything,
    "batch": anything,
    "rows": entries,
    "columns": entries,
    "call": anything,
    "target": anything,
    "batches": batches,
    "outer_batches": batches,
    "inner_batches": batches,
    "dataloader": batches,
    "train_loader": batches,
    "test_loader": batches,
    "hessian_loader": batches,
    "pairs": eigenpairs,
    "deflate": eigenpairs,
    "estimates": estimates,
    "weights": numbers,
    # Numbers
    "k": whole_number,
    "size": whole_number,
    "samples": whole_number,
    "probes": whole_number,
    "steps": whole_number,
    "steps_per_epoch": whole_number,
    "points": whole_number,
    "search": whole_number,
    "restarts": whole_number,
    "seed": whole_number,
    "block_size": whole_number,
    "basis_size": whole_number,
    "basis_bytes": whole_number,
    "max_matvecs": whole_number,
    "max_evaluations": whole_number,
    "max_blocks": whole_number,
    "max_ratio": whole_number,
    "epochs": whole_number,
    "factor": whole_number,
    "patience": whole_number,
    "every": whole_number,
    "top": whole_number,
    "bottom": whole_number,
    "guards": whole_number,
    "trace_probes": whole_number,
    "lr_decay_epochs": whole_numbers,
    "chunk_size": whole_number,
    "examples_per_chunk": whole_number,
    "points_per_chunk": whole_number,
    "num_eigenthings": whole_number,
    "power_iter_steps": whole_number,
    "max_steps": whole_number,
    "num_lanczos_vectors": whole_number,
    "max_possible_gpu_samples": whole_number,
    "maxIter": whole_number,
    "top_n": whole_number,
    "iter": whole_number,
    "n_v": whole_number,
    "num_bins": whole_number,
    "batch_size": whole_number,
    "max_large_ratio": whole_number,
    "lr_decay_epoch": whole_numbers,
    "lr_decay_ratio": finite,
    "decay_ratio": finite,
    "adv_ratio": finite,
    "power_iter_err_threshold": finite,
    "error_threshold": finite,
    "tol": finite,
    "sigma_squared": finite,
    "overhead": finite,
    "level": finite,
    "cost": finite,
    "width": real,
    "smallest": real,
    "largest": real,
    "s": factor,
    "a": factor,
    "rtol": finite,
    "atol": finite,
    "tolerance": finite,
    "stationarity": finite,
    "damping": finite,
    "momentum": finite,
    "radius": finite,
    "lr": finite,
    "lr_decay": finite,
    "alpha": finite,
    "adversarial_share": finite,
    "beta_1": finite,
    "eps": finite,
    "step_size": finite,
    "bounds": limits,
    "x": reals,
    "grid": reals,
    # Flags
    "simultaneous": flag,
    "trainable_only": flag,
    "keep": flag,
    "differentiable": flag,
    "measure": flag,
    "average_input_jacobian": flag,
    "average_parameter_jacobian": flag,
    "critical": flag,
    "preconditioned": flag,
    "eval_mode": flag,
    "replace": flag,
    # Flags of drop-in replacements, which may have any truth value
    "cuda": anything,
    "use_gpu": anything,
    "fp16": anything,
    "full_dataset": anything,
    "to_numpy": anything,
    "duration": anything,
    "print_flag": anything,
    "init_vec": anything,
    # Strings
    "mode": text,
    "residual": text,
    "at": text,
    "kind": text,
    "which": text,
    "sharing": text,
    "normalise": text,
    "data": text,
    "backend": anything,
    "against": text,
    "quantity": text,
    "scale": text,
    # Figures
    "ax": axes,
    # Dtypes, devices and paths
    "dtype": dtype,
    "basis_dtype": dtype,
    "basis_device": device,
    "space": space,
    "mesh": anything,
    "checkpoint": path,
    "path": path,
    "out": path,
    "tensorboard": writer,
}


def at_least(least: float, **options: float | None) -> None:
    """Raise ValueError if an option is less than ``least`` or not finite."""
    for name, value in options.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name}={value}: it must be at least {least}")
        if value is not None and math.isinf(value):
            raise ValueError(f"{name}={value}: it must be finite, such as {name}=1000")
