"""Lanczos with restarts, with the interface of pytorch-hessian-eigenthings."""

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
    """Compute extreme eigenpairs.

    Args:
        operator: Operator of the matrix. If it uses another batch for each product, the next batch
            is used for the whole run.
        num_eigenthings: Number of pairs.
        which: Selection of the pairs: ``"LM"`` for the largest in absolute value, ``"LA"`` for the
            largest, ``"SA"`` for the smallest, ``"BE"`` for half from each end. ``"SM"``, from the
            interior of the spectrum, is refused; use ``eigsh`` on `to_scipy`.
        max_steps: Largest number of restarts. None for ten times the number of entries, as in
            ARPACK.
        tol: Tolerance of the residual, relative to the value. In float32, the rounding of the
            products is used if it is larger.
        num_lanczos_vectors: Largest number of vectors that are kept. The default is
            ``2 num_eigenthings + 10``.
        init_vec: Start vector; random by default.
        use_gpu: Whether vectors are on CUDA, if available. Vectors of a model are on its device.
        fp16: Whether vectors are in float16.

    Returns:
        ``(values, vectors)`` of shapes ``(k,)``, in ascending order, and ``(k, n)``.

    Raises:
        ValueError: If an option is out of range.

    Warns:
        UserWarning: If pairs have not converged.

    Cost: at most max_steps (m - k) + m products, where m vectors are kept.
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
