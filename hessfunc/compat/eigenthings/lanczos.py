"""Lanczos, with restarts."""

from __future__ import annotations

from typing import Any, Literal

from numpy.typing import NDArray

from hessfunc.algorithms.eigen.lanczos import lanczos as thick_restart_lanczos
from hessfunc.algorithms.results.result import array
from hessfunc.compat.eigenthings.operator import Operator, Start, operator_like, warn_of_residuals
from hessfunc.options import or_none, validated, whole_number


@validated(operator=operator_like, max_steps=or_none(whole_number))
def lanczos(
    operator: Operator,
    num_eigenthings: int = 10,
    which: Literal["LM", "LA", "SA", "BE"] = "LM",
    max_steps: int | None = 20,
    tol: float = 1e-6,
    num_lanczos_vectors: int | None = None,
    init_vec: Any = None,
    use_gpu: bool = False,
    fp16: bool = False,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Extreme eigenpairs.

    Args:
        operator: of the matrix; of one that takes another batch in each product, the next.
        num_eigenthings: how many pairs.
        which: ``"LM"`` largest in absolute value, ``"LA"`` largest, ``"SA"`` smallest, ``"BE"``
            half from each end. ``"SM"``, inside of the spectrum, is refused: `to_scipy`, and
            ``eigsh`` on it.
        max_steps: the most restarts; None for ten times the number of entries, as ARPACK has it.
        tol: of the residual, relative to the value; in float32 the rounding of the products where
            that is larger.
        num_lanczos_vectors: the most vectors that are kept; by default 2 num_eigenthings + 10.
        init_vec: to start from; random by default.
        use_gpu: vectors lie on CUDA, where there is one; those of a model where it is.
        fp16: vectors are in float16.

    Returns:
        ``(values, vectors)``, ``(k,)`` in ascending order and ``(k, n)``.

    Raises:
        ValueError: an option is out of range.

    Warns:
        UserWarning: pairs have not converged.

    Cost: at most max_steps (m - k) + m products, m vectors being kept.
    """
    start = Start.of(operator, init_vec, use_gpu=use_gpu, fp16=fp16)
    kept = max(num_lanczos_vectors or 2 * num_eigenthings + 10, num_eigenthings + 2)
    restarts = 10 * start.like.numel() if max_steps is None else max_steps
    draw = operator.draws()
    pairs = thick_restart_lanczos(
        operator.matvec() if draw is None else draw(0),
        start.like,
        k=num_eigenthings,
        which=which,
        basis_size=kept,
        rtol=tol,
        max_matvecs=kept + restarts * (kept - num_eigenthings),
        start=start.vector,
        seed=start.seed,
    )
    warn_of_residuals([pairs], tol, budget="max_steps")
    order = pairs.values.argsort()
    return array(pairs.values[order]), array(pairs.vectors.cpu()[order])
