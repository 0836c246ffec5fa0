"""The top eigenpairs of a model's Hessian, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn

from hessfunc.compat.eigenthings.hvp_operator import HVPOperator
from hessfunc.compat.eigenthings.lanczos import lanczos
from hessfunc.compat.eigenthings.power_iter import deflated_power_iteration
from hessfunc.options import criterion, validated

_ALGORITHMS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "power_iter": deflated_power_iteration,
    "lanczos": lanczos,
}


@validated(loss=criterion)
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
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Eigenvalues ``(k,)`` and eigenvectors ``(k, n)`` of the Hessian of the mean loss.

    Args:
        model: of which all parameters that require a gradient count; evaluated in eval mode.
        dataloader: of batches ``(inputs, targets)``.
        loss: ``(outputs, targets) -> scalar``, a mean over examples.
        num_eigenthings: how many pairs, of largest absolute value.
        full_dataset: of all batches; else power iteration on random ones, and a few products with
            all of them, and Lanczos on a single one.
        mode: ``"power_iter"``, values descending, or ``"lanczos"``, ascending and much the faster.
        use_gpu: move the model to CUDA, where there is one.
        fp16: vectors are in float16.
        max_possible_gpu_samples: a batch is cut into pieces of at most so many examples.
        **kwargs: of `deflated_power_iteration` or `lanczos`.

    Raises:
        ValueError: there is no such mode, or an option is out of range.
    """
    if mode not in _ALGORITHMS:
        raise ValueError(f"mode={mode!r}: choose 'power_iter' or 'lanczos'")
    operator = HVPOperator(
        model,
        dataloader,
        loss,
        use_gpu=use_gpu,
        full_dataset=full_dataset,
        max_possible_gpu_samples=max_possible_gpu_samples,
    )
    return _ALGORITHMS[mode](operator, num_eigenthings, use_gpu=use_gpu, fp16=fp16, **kwargs)
