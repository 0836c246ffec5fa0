"""Steps of optimisers with a preconditioner in a Kronecker product of bases: SOAP and Shampoo.

Neither is in torch. The steps are those of the implementations that users have: SOAP of its authors
(nikhilvyas/SOAP) and of pytorch_optimizer, Shampoo of torch_optimizer and of pytorch_optimizer.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from hessfunc.optim.stability.norms import Preconditioner
from hessfunc.optim.stability.recurrence import Recurrence, averaged
from hessfunc.optim.stability.result import UnknownStability
from hessfunc.optim.stability.steps import Source, Step, decayed, decoupled


def soap(source: Source) -> Step:
    """Read a step of SOAP: P = Q diag(c (sqrt(v) + eps)) Q', Adam in the eigenbasis of Shampoo.

        c = (1 - beta_1^t) / sqrt(1 - beta_2^t) with bias correction, otherwise 1

    Source of the step: Vyas et al. 2024, arXiv 2409.11321.
    """
    source.require_state()
    source.refuse("normalize_grads", "normalize_gradient", "cautious")
    # The first call only sets the bases, so that pytorch_optimizer's count is ahead by one.
    t = float(source.state["step"] if "step" in source.state else source.group["step"] - 1)
    if not t or source.state["Q"] is None:
        raise UnknownStability(
            f"SOAP has no second moment of {source.name!r}, because its first step only sets the "
            "bases: call `optimizer.step()` twice"
        )
    first, second = source.betas
    entries = source.moment("exp_avg_sq").sqrt() + source.number("eps")
    if source.group["correct_bias"]:
        entries = (1 - first**t) / (1 - second**t) ** 0.5 * entries
    # An axis that is too long for a basis has an empty list.
    bases = tuple(basis.detach() if len(basis) else None for basis in source.state["Q"])
    sizes = tuple(len(basis) for basis in bases if basis is not None)
    if len(sizes) == len(bases):
        # With merge_dims, neighbouring axes share a basis.
        entries = entries.reshape(sizes)
    elif len(bases) != entries.dim():
        raise UnknownStability(
            f"SOAP has merged axes of {source.name!r} without a basis: pass merge_dims=False"
        )
    step = Step(
        lr=source.lr,
        recurrence=averaged(first),
        preconditioner=Preconditioner(entries, bases if any(b is not None for b in bases) else ()),
    )
    step = decoupled(step, source.number("weight_decay"))
    # The decay follows the step: w <- rho (w - lr P^-1 m).
    return replace(step, lr=source.lr * step.recurrence.rho)


def shampoo(source: Source) -> Step:
    """Read a step of Shampoo: P^-1 = L_1 x L_2 x ..., the stored inverse roots of the statistics.

    Source of the step: Gupta et al. 2018, arXiv 1802.09568.
    """
    source.require_state()
    if source.number("momentum"):
        raise UnknownStability(
            "Shampoo with momentum multiplies its momentum by the preconditioner in each step, so "
            "that it has no stability limit: pass momentum=0"
        )
    source.refuse("fixed_decay")
    prefix = "inv_precond" if "inv_precond_0" in source.state else "inv_pre_cond"
    roots = [source.moment(f"{prefix}_{axis}") for axis in range(source.parameter.dim())]
    spectra = [torch.linalg.eigh((root + root.mT) / 2) for root in roots]
    # The eigenvalues of P are the products of the inverse eigenvalues of the factors.
    entries = reduce(_outer, (1 / values for values, _ in spectra))
    if not bool((entries > 0).all()):
        raise UnknownStability(
            f"the inverse roots of Shampoo for {source.name!r} are not positive definite: raise "
            "its epsilon"
        )
    step = Step(
        lr=source.lr,
        recurrence=Recurrence(),
        preconditioner=Preconditioner(entries, tuple(basis for _, basis in spectra)),
    )
    return decayed(source, step, is_decoupled=bool(source.group.get("weight_decouple", False)))


def _outer(entries: Tensor, values: Tensor) -> Tensor:
    return entries[..., None] * values
