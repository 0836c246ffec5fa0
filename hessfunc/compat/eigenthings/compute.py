"""Largest eigenpairs of a model's Hessian, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn

from hessfunc.compat.eigenthings.hvp_operator import HVPOperator
from hessfunc.compat.eigenthings.lanczos import lanczos
from hessfunc.compat.eigenthings.power_iter import deflated_power_iteration
from hessfunc.options import criterion, flag, validated, whole_number

_ALGORITHMS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "power_iter": deflated_power_iteration,
    "lanczos": lanczos,
}


def _half(name: str, value: Any, /) -> bool:
    """A bool. Other versions had the number of examples at its position."""
    if isinstance(value, int) and not isinstance(value, bool):
        raise TypeError(
            f"{name}={value}: fp16 must be True or False. If {value} is a number of examples, pass "
            f"max_possible_gpu_samples={value}"
        )
    return flag(name, value)


@validated(loss=criterion, fp16=_half, max_samples=whole_number)
def compute_hessian_eigenthings(
    model: nn.Module,
    dataloader: Iterable[Any],
    loss: Callable[[Any, Any], Tensor],
    num_eigenthings: int = 10,
    full_dataset: bool = True,
    mode: Literal["power_iter", "lanczos"] = "power_iter",
    use_gpu: bool = True,
    fp16: bool = False,
    max_possible_gpu_samples: int = 2**16,
    *,
    max_samples: int | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Compute eigenvalues ``(k,)`` and eigenvectors ``(k, n)`` of the Hessian of the mean loss.

    Args:
        model: Module whose trainable parameters are used, evaluated in eval mode.
        dataloader: Loader of batches ``(inputs, targets)``.
        loss: Function ``(outputs, targets) -> scalar``, a mean over examples.
        num_eigenthings: Number of pairs, those of largest absolute value.
        full_dataset: Whether each product uses all batches. Otherwise power iteration uses random
            batches and a few products with all of them, and Lanczos uses a single batch.
        mode: Algorithm: ``"power_iter"`` with values in descending order, or ``"lanczos"``, which
            is much faster, in ascending order.
        use_gpu: Whether the model is moved to CUDA, if available.
        fp16: Whether vectors are in float16.
        max_possible_gpu_samples: Largest number of examples in a piece of a batch.
        max_samples: Name of ``max_possible_gpu_samples`` in version 0.1, which has priority.
        **kwargs: Options of `deflated_power_iteration` or `lanczos`.

    Returns:
        ``(values, vectors)``, as NumPy arrays by default.

    Raises:
        ValueError: If the mode is unknown, or if an option is out of range.
    """
    if mode not in _ALGORITHMS:
        raise ValueError(f"mode={mode!r}: choose 'power_iter' or 'lanczos'")
    operator = HVPOperator(
        model,
        dataloader,
        loss,
        use_gpu=use_gpu,
        full_dataset=full_dataset,
        max_possible_gpu_samples=max_possible_gpu_samples if max_samples is None else max_samples,
    )
    return _ALGORITHMS[mode](operator, num_eigenthings, use_gpu=use_gpu, fp16=fp16, **kwargs)
