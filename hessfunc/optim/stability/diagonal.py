"""Steps of gradient descent and of optimisers with a diagonal preconditioner.

A preconditioner is frozen at its value of the last step: it changes slowly compared with an
oscillation, which has a period of two steps (Cohen et al. 2022, arXiv 2207.14484). The learning
rate and the coefficients of the momentum are those of the next step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hessfunc.optim.stability.norms import Preconditioner
from hessfunc.optim.stability.recurrence import (
    Recurrence,
    averaged,
    heavy_ball,
    looking_ahead,
    nesterov,
)
from hessfunc.optim.stability.steps import Source, Step, decayed, decoupled


def sgd(source: Source) -> Step:
    """Read a step of SGD: P = I, with heavy-ball or Nesterov momentum.

    Source: Cohen et al. 2021, arXiv 2103.00065.
    """
    momentum = source.number("momentum")
    # Without momentum, torch ignores dampening and Nesterov.
    if not momentum:
        recurrence = Recurrence()
    elif source.group["nesterov"]:
        recurrence = nesterov(momentum)
    else:
        recurrence = heavy_ball(momentum, source.number("dampening"))
    return decayed(source, Step(lr=source.lr, recurrence=recurrence), is_decoupled=False)


def adam(source: Source) -> Step:
    """Read a step of Adam or AdamW: P = (1 - beta_1^t) (sqrt(v / (1 - beta_2^t)) + eps).

    Source: Cohen et al. 2022, arXiv 2207.14484.
    """
    first, _ = source.betas
    step = Step(lr=source.lr, recurrence=averaged(first), preconditioner=_of_adam(source))
    is_decoupled = bool(source.group.get("decoupled_weight_decay", False))
    return decayed(source, step, is_decoupled=is_decoupled)


def auxiliary_adam(source: Source) -> Step:
    """Read a step of the AdamW inside an implementation of Muon."""
    first, _ = source.betas
    step = Step(lr=source.lr, recurrence=averaged(first), preconditioner=_of_adam(source))
    return decayed(source, step, is_decoupled=bool(source.group.get("weight_decouple", True)))


def _of_adam(source: Source) -> Preconditioner:
    first, second = source.betas
    moment = source.moment("max_exp_avg_sq" if source.group.get("amsgrad") else "exp_avg_sq")
    t = float(source.state["step"] if "step" in source.state else source.group["step"])
    root = (moment / (1 - second**t)).sqrt()
    return Preconditioner((1 - first**t) * (root + source.number("eps")))


def nadam(source: Source) -> Step:
    """Read a step of NAdam: P = sqrt(v / (1 - beta_2^t)) + eps, with Nesterov momentum.

        step = lr P^-1 ((1 - mu_t) / (1 - prod_t) g + mu_{t+1} / (1 - prod_{t+1}) m)

    Here mu_t = beta_1 (1 - 0.96^(t psi) / 2), and prod_t is the product of mu_1 to mu_t. Source of
    the step: Dozat 2016.
    """
    first, second = source.betas
    moment, eps = source.moment("exp_avg_sq"), source.number("eps")
    t, psi = float(source.state["step"]), source.number("momentum_decay")
    now, ahead = (first * (1 - 0.5 * 0.96 ** ((t + i) * psi)) for i in (1, 2))
    product = float(source.state["mu_product"]) * now
    step = Step(
        lr=source.lr,
        recurrence=looking_ahead(
            first,
            of_gradient=(1 - now) / (1 - product),
            of_average=ahead / (1 - product * ahead),
        ),
        preconditioner=Preconditioner((moment / (1 - second**t)).sqrt() + eps),
    )
    return decayed(source, step, is_decoupled=bool(source.group["decoupled_weight_decay"]))


def rmsprop(source: Source) -> Step:
    """Read a step of RMSprop: P = sqrt(v) + eps, or sqrt(v - mean^2) + eps if it is centered.

    The momentum accumulates P^-1 g, which for a frozen P is the heavy ball.
    """
    variance = source.moment("square_avg")
    if source.group["centered"]:
        variance = (variance - source.moment("grad_avg").square()).clamp_min(0)
    step = Step(
        lr=source.lr,
        recurrence=heavy_ball(source.number("momentum")),
        preconditioner=Preconditioner(variance.sqrt() + source.number("eps")),
    )
    # Without momentum, the heavy ball is the plain step: m is g.
    return decayed(source, step, is_decoupled=False)


def adagrad(source: Source) -> Step:
    """Read a step of Adagrad: P = sqrt(sum of g^2) + eps, with lr / (1 + t lr_decay)."""
    total = source.moment("sum")
    step = Step(
        lr=source.lr / (1 + float(source.state["step"]) * source.number("lr_decay")),
        recurrence=Recurrence(),
        preconditioner=Preconditioner(total.sqrt() + source.number("eps")),
    )
    return decayed(source, step, is_decoupled=False)


def adafactor(source: Source) -> Step:
    """Read a step of torch's Adafactor: P = sqrt(v) / max(eps_2, RMS(w)), v of rank 1.

        step = min(lr, 1 / sqrt(t)) P^-1 g,  v = rows columns / mean(rows)

    The step is shortened where RMS(g / sqrt(v)) exceeds d. The limit is that of the full step, so
    that a shortened step is stable beyond it. Source of the step: Shazeer and Stern 2018, arXiv
    1804.04235.
    """
    source.require_state()
    least, floor = source.group["eps"]
    least = torch.finfo(source.parameter.dtype).eps if least is None else float(least)
    if "variance" in source.state:
        variance = source.moment("variance")
    else:
        rows, columns = source.moment("row_var"), source.moment("col_var")
        variance = rows @ columns / rows.mean(dim=-2, keepdim=True).clamp_min(least)
    size = max(float(floor), _root_mean_square(source.parameter))
    step = Step(
        lr=min(source.lr, (float(source.state["step"]) + 1) ** -0.5),
        recurrence=Recurrence(),
        preconditioner=Preconditioner(variance.clamp_min(least**2).sqrt() / size),
    )
    # The decay is by lr itself, not by the learning rate of the step.
    return decoupled(step, source.number("weight_decay") * source.lr / step.lr)


def adafactor_of_transformers(source: Source) -> Step:
    """Read a step of the Adafactor of transformers, which may have a first moment.

        step = scale lr P^-1 u,  scale = max(eps_2, RMS(w)) if scale_parameter

    The limit is that of a step that is not clipped, as for torch's Adafactor.
    """
    source.require_state()
    group, t = source.group, float(source.state["step"]) + 1
    if group["relative_step"]:
        lr = min(1e-6 * t if group["warmup_init"] else 1e-2, t**-0.5)
    else:
        lr = source.lr
    if "exp_avg_sq" in source.state:
        variance = source.moment("exp_avg_sq")
    else:
        rows, columns = source.moment("exp_avg_sq_row"), source.moment("exp_avg_sq_col")
        scaled = rows / rows.mean(dim=-1, keepdim=True)
        variance = scaled.unsqueeze(-1) * columns.unsqueeze(-2)
    size = 1.0
    if group["scale_parameter"]:
        size = max(float(group["eps"][1]), _root_mean_square(source.parameter))
    step = Step(
        lr=lr,
        recurrence=Recurrence() if group["beta1"] is None else averaged(float(group["beta1"])),
        preconditioner=Preconditioner(variance.sqrt() / size),
    )
    return decoupled(step, source.number("weight_decay") * size)


def _root_mean_square(parameter: Tensor) -> float:
    return float(parameter.detach().norm()) / math.sqrt(parameter.numel())
