"""Uses of the parameters of a model, observed during one evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hessfunc.copies import hooked
from hessfunc.kronecker.calls import (
    full_name,
    refusing_train_mode,
)
from hessfunc.kronecker.layer import Call, SharedWeight
from hessfunc.kronecker.rules import rule_of
from hessfunc.losses import Loss
from hessfunc.modules import training_flags

ONLY_WEIGHTS = "Kronecker factors need weights and biases of linear maps"
HOLD = "hold such parameters fixed with `split` and `hold`"


@dataclass(frozen=True)
class Use:
    """All uses of a parameter in the model, one for each call of a module that owns it.

    The positions of all calls are concatenated.

    Attributes:
        weights: Dependence of each output on the parameter.
        outputs: Output of each call.
        examples: Number of examples, B. An output may have several rows for each example along its
            first axis, the same number for each, one example after another.
    """

    weights: tuple[SharedWeight, ...]
    outputs: tuple[Tensor, ...]
    examples: int

    def inputs(self) -> Tensor:
        """Return the inputs X at all positions, ``(B, G, K, P)``; B is 1 if examples share them."""
        parts = []
        for weight, output in zip(self.weights, self.outputs, strict=True):
            inputs, rows = weight.each(), len(output) // self.examples
            # Inputs that all rows share have a first axis of 1.
            is_shared = len(inputs) < len(output)
            parts.append(
                inputs.repeat(1, 1, 1, rows) if is_shared else by_positions(inputs, self.examples)
            )
        count = max(map(len, parts))
        return torch.cat([part.expand(count, -1, -1, -1) for part in parts], -1)

    def slopes(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the gradients at the outputs, as ``(B, G, O, P)``."""
        pairs = zip(self.weights, gradients, strict=True)
        parts = [weight.slopes(slope.reshape(len(slope), -1)) for weight, slope in pairs]
        return torch.cat([by_positions(part, self.examples) for part in parts], -1)


def by_positions(rows: Tensor, examples: int) -> Tensor:
    """Move the R rows of each example to positions: ``(B R, G, N, P)`` -> ``(B, G, N, R P)``."""
    if len(rows) == examples:
        return rows
    return rows.unflatten(0, (examples, -1)).movedim(1, 3).flatten(3)


def refuse_unless_seen(
    outputs: Tensor, leaves: Mapping[str, Tensor], uses: Mapping[str, Use], *, grouped: bool
) -> None:
    """Raise unless the recorded uses give each parameter's gradient and examples are independent.

    Two backward passes check this. For a cotangent w at the outputs, the gradient of a parameter
    must be ``sum_bp g_bp x_bp'``. For the cotangent ``s_b w_b``, with a different s_b for each
    example, the gradient at the outputs of a module must be ``s_b g_b``.
    """
    examples = next(iter(uses.values())).examples
    ends = {id(end): (name, end) for name, use in uses.items() for end in use.outputs}
    along = torch.arange(1.0, outputs.numel() + 1, device=outputs.device).cos()
    along = along.to(outputs).view_as(outputs)
    gradients = torch.autograd.grad(
        outputs,
        [*(end for _, end in ends.values()), *leaves.values()],
        along,
        retain_graph=True,
        materialize_grads=True,
    )
    slopes = dict(zip(ends, gradients, strict=False))
    for name, gradient in zip(leaves, gradients[len(ends) :], strict=True):
        use = uses[name]
        own = use.slopes([slopes[id(end)] for end in use.outputs]).to(gradient)
        inputs = use.inputs().to(gradient).expand(len(own), -1, -1, -1)
        if not _is_close(torch.einsum("bgop,bgkp->gok", own, inputs), gradient):
            raise ValueError(
                f"parameter {name!r} is also used outside the modules that own it, for example in "
                f"`F.linear(x, self.weight)`: {HOLD}"
            )
    if not grouped or examples == 1:
        return
    scales = torch.linspace(1, 2, examples, dtype=outputs.dtype, device=outputs.device)
    scaled = _by_example(along, examples) * scales[:, None]
    again = torch.autograd.grad(
        outputs,
        [end for _, end in ends.values()],
        scaled.view_as(outputs),
        retain_graph=True,
        materialize_grads=True,
    )
    for (name, _), slope, other in zip(ends.values(), gradients, again, strict=False):
        expected = _by_example(slope, examples) * scales.to(slope)[:, None]
        if not _is_close(_by_example(other, examples), expected):
            raise ValueError(
                f"the {len(slope)} rows of the module of {name!r} and the {len(outputs)} rows of "
                f"the outputs are not ordered by the {examples} examples along the first axis, or "
                "the model mixes examples: keep the examples first, for example with outputs "
                "`(examples, classes, positions)` from `model_fn(params, x).movedim(-1, 1)`"
            )


def _by_example(rows: Tensor, examples: int) -> Tensor:
    return rows.reshape(examples, -1)


def _is_close(ours: Tensor, right: Tensor) -> bool:
    size = right.abs().amax()
    difference = (ours.reshape_as(right) - right).abs().amax()
    return bool(difference <= torch.finfo(right.dtype).eps ** 0.5 * size)


@dataclass(frozen=True)
class Seen:
    """Record of one call of a module while the loss is evaluated."""

    module: nn.Module
    training: bool
    state: Mapping[str, Tensor]
    inputs: Tensor
    output: Tensor


def observed(
    model: nn.Module, loss: Loss, params: Mapping[str, Tensor], batch: Any
) -> tuple[Tensor, dict[str, Use]]:
    """Evaluate the model, and return its outputs with all uses of each parameter."""
    named = _canonical_names(model, params)
    paths = {
        module: path
        for path, module in model.named_modules()
        if any(full_name(path, own) in named for own in _own_parameters(module))
    }
    seen: dict[str, list[Seen]] = {}

    def observe(
        module: nn.Module,
        called: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Tensor:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not isinstance(output, Tensor) or not given:
            raise _not_linear(paths[module], module)
        state = {name: value.detach() for name, value in called.named_parameters()}
        one = Seen(module, called.training, state, given[0].detach(), output)
        # A later module may change its input in place: keep a copy of the output.
        out = output.clone()
        seen.setdefault(paths[module], []).append(replace(one, output=out))
        return out.clone()

    observers = {module: partial(observe, module) for module in paths}
    with refusing_train_mode(model), hooked(after=observers):
        outputs = loss.outputs(params, batch)
    if not isinstance(outputs, Tensor) or not outputs.dim():
        raise TypeError(
            "Kronecker factors need outputs that are one tensor with the examples along its first "
            f"axis, but got {type(outputs).__name__}: combine them into one tensor with `composed`"
        )
    calls: dict[str, list[tuple[SharedWeight, Tensor]]] = {}
    for path, of_module in seen.items():
        for one in of_module:
            for own, weight in _weights_of(path, one).items():
                if (name := named.get(full_name(path, own))) is not None:
                    calls.setdefault(name, []).append((weight, one.output))
    for name, leaf in params.items():
        if name not in calls or calls[name][0][0].shape != leaf.shape:
            raise ValueError(
                f"{name!r} of shape {tuple(leaf.shape)} is not a parameter of a module that the "
                f"loss calls: {HOLD}"
            )
        if len({(weight.groups, weight.shape) for weight, _ in calls[name]}) > 1:
            raise NotImplementedError(
                f"parameter {name!r} is shared by layers of different kinds: {HOLD}"
            )
    examples = _count(outputs, [output for uses in calls.values() for _, output in uses])
    uses = {}
    for name in params:
        weights, ends = zip(*calls[name], strict=True)
        uses[name] = Use(weights, ends, examples)
    return outputs, uses


def _canonical_names(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each name of a parameter in the model to its name in ``params``."""
    names: dict[int, str] = {}
    every = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in every.items():
        if name in params:
            names.setdefault(id(parameter), name)
    return {
        name: name if name in params else names[id(parameter)]
        for name, parameter in every.items()
        if id(parameter) in names
    }


def _count(outputs: Tensor, ends: Sequence[Tensor]) -> int:
    """Return the number of examples: the shortest first axis, which divides all the others."""
    lengths = [len(outputs), *(len(end) if end.dim() else 1 for end in ends)]
    examples = min(lengths)
    if any(length % examples for length in lengths):
        raise ValueError(
            f"the first axes of outputs and modules have lengths {sorted(set(lengths))}, which are "
            "not multiples of one number of examples: keep the examples along the first axis"
        )
    return examples


def _own_parameters(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


def _not_linear(path: str, module: nn.Module) -> NotImplementedError:
    return NotImplementedError(
        f"{ONLY_WEIGHTS}, but {path!r} is a {type(module).__name__}: {HOLD}, or use `hbp`"
    )


def _weights_of(path: str, seen: Seen) -> dict[str, SharedWeight]:
    """Return the dependence of a module's output on each of its parameters.

    Raises:
        NotImplementedError: If a parameter is not the weight or bias of a linear map.
    """
    rule = rule_of(type(seen.module))
    call = Call(
        partial(torch.func.functional_call, seen.module),
        seen.state,
        (seen.inputs,),
        (),
        seen.module,
        seen.output.shape[1:],
    )
    with training_flags([(seen.module, seen.training)]):
        dependences = {} if rule is None else rule(call).parameters
    weights = {name: d for name, d in dependences.items() if isinstance(d, SharedWeight)}
    if len(weights) < len(_own_parameters(seen.module)):
        raise _not_linear(path, seen.module)
    return weights
