"""Stability limit of an optimiser, read from its options and its state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hessfunc import options
from hessfunc.optim.stability import diagonal, normed, rotated
from hessfunc.optim.stability.norms import (
    CombinedNorm,
    LargestNorm,
    PreconditionedNorm,
    Preconditioner,
)
from hessfunc.optim.stability.result import Stability, UnknownStability
from hessfunc.optim.stability.steps import Rule, Source, Step
from hessfunc.options import validated

_OF_TORCH: dict[type[Optimizer], Rule] = {
    torch.optim.SGD: diagonal.sgd,
    torch.optim.Adam: diagonal.adam,
    torch.optim.NAdam: diagonal.nadam,
    torch.optim.RMSprop: diagonal.rmsprop,
    torch.optim.Adagrad: diagonal.adagrad,
    torch.optim.Adafactor: diagonal.adafactor,
    torch.optim.Muon: normed.torch_muon,
}
# Optimisers of other packages, by the name of their class.
_BY_NAME: dict[str, Rule] = {
    "Adafactor": diagonal.adafactor_of_transformers,
    "Lion": normed.lion_step,
    "SignSGD": normed.sign_descent,
    "Muon": normed.muon,
    "SingleDeviceMuon": normed.muon,
    "MuonWithAuxAdam": normed.muon,
    "SingleDeviceMuonWithAuxAdam": normed.muon,
    "SOAP": rotated.soap,
    "Shampoo": rotated.shampoo,
}
# Optimisers whose steps have a fixed length in a norm.
_NORMED = frozenset({normed.torch_muon, normed.muon, normed.lion_step, normed.sign_descent})
_OWN = (
    "for another optimiser, make `hessfunc.optim.Stability(threshold=..., preconditioner=...)` "
    "yourself"
)


@validated(
    optimizer=options.optimizers, gradient=options.or_none(options.mapping), lr=options.finite
)
def stability(
    optimizer: Optimizer | Sequence[Optimizer],
    model: nn.Module,
    /,
    *,
    gradient: Mapping[str, Tensor] | None = None,
    lr: float | None = None,
) -> Stability:
    """Read the sharpness up to which an optimiser's next step is stable on a quadratic.

        stable = hf.stability(optimizer, model)
        top = hf.lanczos(stable.preconditioned(matvec), params, k=1, which="LA")
        top.values[0] < stable.threshold

        optimiser                             sharpness                threshold
        SGD, momentum b, dampening d          top eigenvalue of H      (2 + 2b) / ((1 - d) lr)
        SGD, Nesterov momentum b              top eigenvalue of H      (2 + 2b) / ((1 + 2b) lr)
        Adam, AdamW, SOAP, b = beta_1         that of P^-1 H           (2 + 2b) / ((1 - b) lr)
        RMSprop, momentum b                   that of P^-1 H           (2 + 2b) / lr
        Adagrad, Shampoo                      that of P^-1 H           2 / lr
        Adafactor                             that of P^-1 H           2 / min(lr, t^-1/2)
        NAdam                                 that of P^-1 H           by its momentum schedule
        sign descent, Lion, Muon              max d'Hd over |d| <= 1   c |u|* / lr

    P is the preconditioner at the last step, frozen. For steps of fixed length, |u|* is the dual
    norm of the direction u of the next step, and c is 2 without momentum, more with it. Weight
    decay in the gradient adds W to H; decoupled decay multiplies a threshold by 1 - lr decay / 2.

    Parameter groups may differ. The limits of the groups then scale their parts of P, relative to
    the first one, and the threshold is that of the first group. Several optimisers, each of which
    trains a part of the model, are combined likewise; with Muon or Lion among them, in one norm.

    Examples:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> round(hf.stability(optimizer, model).threshold, 1)  # (2 + 2 momentum) / lr
        38.0

    Args:
        optimizer: Optimiser, or a list of optimisers that train the model together. SGD, Adam,
            AdamW, NAdam, RMSprop, Adagrad, Adafactor and Muon of torch; Lion, SignSGD, Muon, SOAP,
            Shampoo and Adafactor of lion_pytorch, pytorch_optimizer, torch_optimizer, transformers
            and their authors, which are recognised by name.
        model: Module whose trainable parameters make up H.
        gradient: Gradient at the parameters by name, which only steps of fixed length need. By
            default the gradients that the parameters hold.
        lr: Learning rate of the next step. By default the learning rate of each group.

    Returns:
        `Stability`, with the preconditioner or the norm, and the threshold.

    Raises:
        TypeError: If an optimiser is not known.
        ValueError: If the step has no limit: before the first step of an optimiser with a
            preconditioner, with learning rate 0, for a parameter that no optimiser trains, or for
            an option that is not linear, such as maximize.

    Cost: a copy of the preconditioner; a singular value decomposition of each gradient for Muon, an
    eigendecomposition of each factor for Shampoo.

    Source: Cohen et al. 2021, arXiv 2103.00065; adaptive: Cohen et al. 2022, arXiv 2207.14484;
    fixed length: Islamov et al. 2026, arXiv 2603.05002. The derivation is in
    ``hessfunc/optim/stability/recurrence.py``.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return stability_of(optimizers, trained, gradient=gradient, lr=lr)


def refuse_unknown(optimizers: Iterable[Optimizer], /) -> None:
    """Raise TypeError for an optimiser that `stability` does not know."""
    for optimizer in optimizers:
        if _rule(optimizer) is None:
            names = sorted({cls.__name__ for cls in _OF_TORCH} | _BY_NAME.keys() | {"AdamW"})
            raise TypeError(
                f"{type(optimizer).__name__} has no known stability limit: pass one of "
                f"{', '.join(names)}; {_OWN}"
            )


def is_known(optimizers: Sequence[Optimizer], /) -> bool:
    """Return whether `stability` knows all of at least one optimiser."""
    return bool(optimizers) and all(_rule(optimizer) is not None for optimizer in optimizers)


def is_normed(optimizers: Iterable[Optimizer], /) -> bool:
    """Return whether a step of the optimisers has a fixed length, which needs the gradient."""
    return any(_rule(optimizer) in _NORMED for optimizer in optimizers)


def is_gradient_descent(optimizers: Iterable[Optimizer], /) -> bool:
    """Return whether the steps are linear in the gradient, without a preconditioner."""
    return all(_rule(optimizer) is diagonal.sgd for optimizer in optimizers)


def _rule(optimizer: Optimizer) -> Rule | None:
    for cls, rule in _OF_TORCH.items():
        if isinstance(optimizer, cls):
            return rule
    return _BY_NAME.get(type(optimizer).__name__)


def name_of(optimizers: Iterable[Optimizer], /) -> str:
    """Return the names of the optimisers."""
    return " + ".join(type(optimizer).__name__ for optimizer in optimizers)


def stability_of(
    optimizers: Sequence[Optimizer],
    parameters: Mapping[str, Tensor],
    /,
    *,
    gradient: Mapping[str, Tensor] | None = None,
    lr: float | None = None,
) -> Stability:
    """Return the stability limit of the next step with these parameters, as `stability` does."""
    refuse_unknown(optimizers)
    steps = _steps(optimizers, parameters, lr)
    linear = {name: step for name, step in steps.items() if step.norm is None}
    decays = {name: step.weight_decay for name, step in steps.items()}
    common: dict[str, Any] = {
        "weight_decay": decays if any(decays.values()) else None,
        "optimizer": name_of(optimizers),
    }
    parts: list[tuple[float, LargestNorm | PreconditionedNorm]] = []
    if linear:
        threshold, preconditioner = _linear(linear, parameters)
        if len(linear) == len(steps):
            plain = _is_identity(linear, preconditioner)
            factors = None if plain else _plain(preconditioner)
            return Stability(threshold=threshold, preconditioner=factors, **common)
        parts.append((threshold, PreconditionedNorm(preconditioner)))
    directions = _directions(steps, parameters, gradient)
    recurrences = {name: _without_decay(steps[name]).recurrence for name in directions}
    for recurrence in dict.fromkeys(recurrences.values()):
        members = [name for name in directions if recurrences[name] == recurrence]
        parts.append(_of_fixed_length(members, steps, directions))
    threshold = parts[0][0]
    # A part with limit l in a norm |.| has the limit t of the first part in sqrt(l / t) |.|.
    combined = CombinedNorm([(limit / threshold, norm) for limit, norm in parts])
    norm = parts[0][1] if len(parts) == 1 else combined
    return Stability(threshold=threshold, norm=norm, **common)


def _linear(
    steps: Mapping[str, Step], parameters: Mapping[str, Tensor]
) -> tuple[float, dict[str, Preconditioner]]:
    """Return the limit of the first linear step, and preconditioners with this limit for all."""
    limits = {name: _limit(name, step, step.lr) for name, step in steps.items()}
    threshold = next(iter(limits.values()))
    return threshold, {
        name: _filled(step, parameters[name]).scaled(limits[name] / threshold)
        for name, step in steps.items()
    }


def _filled(step: Step, parameter: Tensor) -> Preconditioner:
    if step.preconditioner is not None:
        return step.preconditioner
    return Preconditioner(torch.ones_like(parameter).detach())


def _is_identity(steps: Mapping[str, Step], preconditioner: Mapping[str, Preconditioner]) -> bool:
    """Return whether no step has a preconditioner, and all have the same limit."""
    return all(step.preconditioner is None for step in steps.values()) and all(
        bool((factor.entries == 1).all()) for factor in preconditioner.values()
    )


def _plain(preconditioner: Mapping[str, Preconditioner]) -> dict[str, Tensor | Preconditioner]:
    """Return a diagonal preconditioner as a tensor."""
    return {
        name: factor if factor.bases else factor.entries for name, factor in preconditioner.items()
    }


def _steps(
    optimizers: Sequence[Optimizer], parameters: Mapping[str, Tensor], lr: float | None
) -> dict[str, Step]:
    """Return the next step of each parameter."""
    groups = {
        parameter: (optimizer, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    rates = {float(group["lr"] or 0) for _, group in groups.values()}
    if lr is not None and len(rates) > 1:
        raise UnknownStability(
            f"lr={lr} is not the learning rate of groups that differ: set `group['lr']` of each"
        )
    steps: dict[str, Step] = {}
    for name, parameter in parameters.items():
        if parameter not in groups:
            raise UnknownStability(
                f"{name_of(optimizers)} does not train {name!r}: pass all optimisers of the model "
                "as a list, or freeze the parameter with `requires_grad_(False)`"
            )
        optimizer, group = groups[parameter]
        options_ = dict(group) if lr is None else {**group, "lr": lr}
        source = Source(name, parameter, options_, optimizer.state.get(parameter, {}), optimizer)
        source.refuse("maximize")
        rule = _rule(optimizer)
        assert rule is not None
        try:
            steps[name] = rule(source)
        except KeyError as key:
            raise TypeError(
                f"{type(optimizer).__module__}.{type(optimizer).__name__} has no {key} and is not "
                f"a known optimiser of this name; {_OWN}"
            ) from None
        if not steps[name].lr > 0:
            raise UnknownStability(
                f"the learning rate of {name!r} is {steps[name].lr}, which is stable for any "
                "sharpness: pass a positive one"
            )
    return steps


def _limit(name: str, step: Step, lr: float) -> float:
    limit = step.recurrence.limit(lr)
    if not 0 < limit < float("inf"):
        raise UnknownStability(
            f"the momentum of {name!r} has no stability limit: pass a dampening and a momentum "
            "below 1"
        )
    return limit


def _without_decay(step: Step) -> Step:
    """Return a step without its decoupled decay, which only scales it."""
    return replace(step, recurrence=replace(step.recurrence, rho=1.0))


def _directions(
    steps: Mapping[str, Step],
    parameters: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Return the direction u = p m + q g of each step of fixed length."""
    directions: dict[str, Tensor] = {}
    for name, step in steps.items():
        if step.norm is None:
            continue
        known = parameters[name].grad if gradient is None else gradient.get(name)
        if known is None:
            raise UnknownStability(
                f"there is no gradient of {name!r}, on which the limit of a step of fixed length "
                "depends: pass gradient=torch.func.grad(loss)(params, batch), or call backward"
            )
        if known.shape != parameters[name].shape:
            raise UnknownStability(
                f"the gradient of {name!r} has shape {tuple(known.shape)}, the parameter "
                f"{tuple(parameters[name].shape)}: pass gradient=torch.func.grad(loss)(params, "
                "batch)"
            )
        g = known.detach() + step.weight_decay * parameters[name].detach()
        u = step.recurrence.q * g
        directions[name] = u if step.momentum is None else u + step.recurrence.p * step.momentum
    return directions


def _of_fixed_length(
    members: Sequence[str], steps: Mapping[str, Step], directions: Mapping[str, Tensor]
) -> tuple[float, LargestNorm]:
    """Return the limit and the norm of the parameters whose steps have one recurrence.

    A step ``-lr argmax <u, d>`` is steepest descent with the step size lr / |u|*, in the norm whose
    radii are the lengths of the steps relative to lr. The factor (1 + rho) / 2 of a decoupled decay
    scales the radius, as it would scale a preconditioner.
    """
    lr = steps[members[0]].lr
    norms = {}
    for name in members:
        step = steps[name]
        assert step.norm is not None
        relative = step.lr / lr * 2 / (1 + step.recurrence.rho)
        norms[name] = replace(step.norm, radius=step.norm.radius * relative)
    norm = LargestNorm(norms)
    dual = float(norm({name: directions[name][None] for name in members})[0])
    if not dual > 0:
        raise UnknownStability(
            f"the gradient of {members[0]!r} is zero, where a step of fixed length has no limit: "
            "pass the gradient at other parameters"
        )
    return _limit(members[0], _without_decay(steps[members[0]]), lr / dual), norm
