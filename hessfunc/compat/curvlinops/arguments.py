"""Checks of the arguments of operators, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hessfunc.compat.curvlinops.operator import PyTorchLinearOperator
from hessfunc.options import (
    criterion,
    described,
    finite,
    flag,
    mapping,
    or_none,
    plain_callable,
    tensors,
    text,
    whole_number,
)
from hessfunc.options.arguments import ARGUMENTS
from hessfunc.options.functions import function_of
from hessfunc.options.scalars import Check, whole_numbers


def _operator(name: str, value: Any, /) -> PyTorchLinearOperator:
    if isinstance(value, PyTorchLinearOperator):
        return value
    remedy = "TensorLinearOperator(A)" if isinstance(value, Tensor) else "GGNLinearOperator(...)"
    raise TypeError(f"{name} must be an operator, not {described(value)}: pass {remedy}")


def _matrix(name: str, value: Any, /) -> PyTorchLinearOperator | Tensor:
    """An operator, or a dense matrix without its graph."""
    if isinstance(value, Tensor):
        if value.dim() != 2 or not value.is_floating_point() or value.layout != value.mT.layout:
            raise ValueError(
                f"{name} is a tensor of shape {tuple(value.shape)} and dtype {value.dtype}: pass a "
                "matrix (m, n) in float32 or float64"
            )
        return value.detach()
    return _operator(name, value)


def _model(name: str, value: Any, /) -> Any:
    return value if isinstance(value, nn.Module) else plain_callable(name, value)


def _parameters(name: str, value: Any, /) -> Any:
    """A list of tensors, or a flat dict of tensors by name."""
    if isinstance(value, Mapping):
        tensors(name, list(mapping(name, value).values()))
        return value
    return tensors(name, value)


def _damping(name: str, value: Any, /) -> float | tuple[float, float]:
    if isinstance(value, tuple) and len(value) == 2:
        return finite(name, value[0]), finite(name, value[1])
    return finite(name, value)


def _ends(name: str, value: Any, /) -> tuple[float | None, float | None]:
    """The smallest and the largest eigenvalue, None where one is not known."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(
            f"{name} must be a pair (smallest, largest), not {described(value)}: pass "
            f"{name}=(0.0, None) for instance"
        )
    low, high = (None if end is None else finite(name, end) for end in value)
    return low, high


# Check of each argument; others are those of the library.
CHECKS: dict[str, Check] = {
    "A": _operator,
    "model_func": _model,
    "loss_func": or_none(criterion),
    "params": _parameters,
    "data": ARGUMENTS["batches"],
    "progressbar": flag,
    "check_deterministic": flag,
    "num_data": whole_number,
    "block_sizes": whole_numbers,
    "batch_size_fn": function_of(1, "X"),
    "mc_samples": whole_number,
    "fisher_type": text,
    "kfac_approx": text,
    "num_per_example_loss_terms": whole_number,
    "separate_weight_and_bias": flag,
    "damping": _damping,
    "use_heuristic_damping": flag,
    "use_exact_damping": flag,
    "min_damping": finite,
    "cache": flag,
    "retry_double_precision": flag,
    "tolerance": finite,
    "max_iter": whole_number,
    "initial_guess": ARGUMENTS["flat"],
    "preconditioner": plain_callable,
    "num_terms": whole_number,
    "scale": finite,
    "check_nan": flag,
    "row_idxs": whole_numbers,
    "col_idxs": whole_numbers,
}
# Check of each argument of functions, which take operators and tensors.
OF_MATRIX: dict[str, Check] = {
    "A": _matrix,
    "num_matvecs": whole_number,
    "distribution": text,
    "ncv": whole_number,
    "num_points": whole_number,
    "num_repeats": whole_number,
    "kappa": finite,
    "boundaries": or_none(_ends),
    "margin": finite,
    "boundaries_tol": finite,
    "epsilon": finite,
}
