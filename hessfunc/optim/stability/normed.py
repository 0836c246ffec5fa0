"""Steps of fixed length in a norm: sign descent, Lion and Muon.

The step ``-lr argmax <u, d>`` over the unit ball of a norm is steepest descent in this norm,
``-eta |u|* argmax <u, d>``, with the step size eta = lr / |u|*. Steepest descent with the step size
eta is stable up to the generalized sharpness 2 / eta, so that the threshold is 2 |u|* / lr (Islamov
et al. 2026, arXiv 2603.05002, who treat steps without momentum).

Let d be a maximiser of d'Hd over the ball, with the value S. Then d is also the maximiser of
<Hd, d>, and |Hd|* = S. If w and m are multiples of d and Hd, they remain so: with u = c Hd, the
step is -eta |c| S sign(c) d = -eta c S d. The multiples follow the recurrence of a linear step with
the curvature S, whose limit replaces 2 / eta.
"""

from __future__ import annotations

import math

from hessfunc.optim.stability.diagonal import auxiliary_adam
from hessfunc.optim.stability.norms import InfinityNorm, SpectralNorm
from hessfunc.optim.stability.recurrence import Recurrence, averaged, lion, looking_ahead
from hessfunc.optim.stability.steps import Source, Step, decayed, decoupled


def sign_descent(source: Source) -> Step:
    """Read a step of sign descent, ``-lr sign(m)``, with averaged momentum or none.

    Source of the step: Bernstein et al. 2018, arXiv 1802.04434.
    """
    momentum = source.number("momentum")
    step = Step(
        lr=source.lr,
        recurrence=averaged(momentum) if momentum else Recurrence(),
        norm=InfinityNorm(),
        momentum=source.state.get("momentum_buffer"),
    )
    return decayed(source, step, is_decoupled=bool(source.group["weight_decouple"]))


def lion_step(source: Source) -> Step:
    """Read a step of Lion, ``-lr sign(beta_1 m + (1 - beta_1) g)``.

    Source of the step: Chen et al. 2023, arXiv 2302.06675.
    """
    source.refuse("use_gc", "adanorm", "cautious", "fixed_decay")
    step = Step(
        lr=source.lr,
        recurrence=lion(*source.betas),
        norm=InfinityNorm(),
        momentum=source.state.get("exp_avg"),
    )
    if getattr(source.optimizer, "decoupled_wd", False):
        # lion_pytorch divides the decay by the initial learning rate.
        return decoupled(step, source.number("weight_decay") / source.optimizer._init_lr)
    return decayed(source, step, is_decoupled=bool(source.group.get("weight_decouple", True)))


def torch_muon(source: Source) -> Step:
    """Read a step of torch's Muon, ``-lr scale UV'`` for the direction u = U diag(s) V'.

    The Newton-Schulz iteration gives singular values between 0.7 and 1.2 instead of 1 with its
    default coefficients; the limit is that of UV'. Source of the step: Jordan et al. 2024,
    kellerjordan.github.io/posts/muon.
    """
    rows, columns = source.parameter.shape
    if source.group["adjust_lr_fn"] == "match_rms_adamw":
        scale = 0.2 * math.sqrt(max(rows, columns))
    else:
        scale = math.sqrt(max(1, rows / columns))
    step = _muon(source, scale, is_nesterov=bool(source.group["nesterov"]))
    return decoupled(step, source.number("weight_decay"))


def muon(source: Source) -> Step:
    """Read a step of the Muon of its author or of pytorch_optimizer, or of its auxiliary AdamW."""
    group, shape = source.group, source.parameter.shape
    if not group.get("use_muon", True):
        return auxiliary_adam(source)
    source.refuse("cautious")
    if "use_adjusted_lr" in group:
        rows, columns = shape[0], math.prod(shape[1:])
        adjusted = 0.2 * math.sqrt(max(rows, columns))
        scale = adjusted if group["use_adjusted_lr"] else math.sqrt(max(1, rows / columns))
    else:
        # The author's code scales a convolution by the last two axes, those of its kernel.
        scale = math.sqrt(max(1, shape[-2] / shape[-1]))
    step = _muon(source, scale, is_nesterov=bool(group.get("nesterov", True)))
    return decayed(source, step, is_decoupled=bool(group.get("weight_decouple", True)))


def _muon(source: Source, scale: float, *, is_nesterov: bool) -> Step:
    beta = source.number("momentum")
    ahead = looking_ahead(beta, of_gradient=1 - beta, of_average=beta)
    return Step(
        lr=source.lr,
        recurrence=ahead if is_nesterov else averaged(beta),
        norm=SpectralNorm(scale),
        momentum=source.state.get("momentum_buffer"),
    )
