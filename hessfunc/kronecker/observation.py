"""Observation of all uses of a model's parameters, during one evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hessfunc.autograd.overrides import BODIES, getter
from hessfunc.containers import tensors_in
from hessfunc.kronecker.calls import calling
from hessfunc.kronecker.factor_rules import SUMS, is_lookup, maps_of
from hessfunc.kronecker.recurrences import unrolled
from hessfunc.kronecker.uses import Use, Uses
from hessfunc.losses import Loss
from hessfunc.transforms.batches.examples import examples as examples_of


@dataclass(frozen=True)
class Observed:
    """Evaluation of a model, with all uses of its parameters.

    Attributes:
        outputs: Outputs of the model.
        uses: Uses of each parameter that enters the model linearly, by name.
        others: Reason for which a parameter has no such uses, by name.
        examples: Number of examples, B.
    """

    outputs: Tensor
    uses: Mapping[str, Uses]
    others: Mapping[str, str]
    examples: int

    def gradients(
        self, uses: Iterable[Uses], cotangent: Tensor, leaves: Sequence[Tensor] = ()
    ) -> dict[int, Tensor]:
        """Return the gradients at the outputs of calls, and those of leaves, by their ids."""
        calls = list({id(call.output): call for use in uses for call in use.calls}.values())
        inputs: list[Any] = [*(call.edge for call in calls), *leaves]
        parts = torch.autograd.grad(
            self.outputs,
            inputs,
            cotangent,
            retain_graph=True,
            allow_unused=True,
        )
        ends = zip((*(call.output for call in calls), *leaves), parts, strict=True)
        return {id(end): torch.zeros_like(end) if part is None else part for end, part in ends}


def observed(
    model: nn.Module,
    loss: Loss,
    params: Mapping[str, Tensor],
    batch: Any,
    /,
    expansions: dict[Any, bool] | None = None,
) -> list[Observed]:
    """Evaluate the model, and return its outputs with the uses of each parameter, not verified.

    The list has an evaluation for each possible number of examples. There is more than one if first
    axes of the batch differ, as with time before batch.

    Args:
        model: Module of the loss.
        loss: Loss with outputs.
        params: Parameters, which require a gradient.
        batch: Batch.
        expansions: Whether the outputs stay the same if rows that all examples share are expanded,
            by the kinds and shapes of all calls. New entries are added.
    """
    known = {} if expansions is None else expansions
    observer, outputs = _evaluated(model, loss, params, batch, known)
    if not isinstance(outputs, Tensor) or not outputs.dim():
        raise TypeError(
            "Kronecker factors need outputs that are one tensor with the examples along its first "
            f"axis, but got {type(outputs).__name__}: combine them into one tensor with `composed`"
        )
    seen = observer.calls.keys() | observer.others.keys()
    for name, depends in _dependence(outputs, {n: params[n] for n in params if n not in seen}):
        if not depends:
            raise ValueError(
                f"{name!r} of shape {tuple(params[name].shape)} is not a parameter on which the "
                "outputs of the loss depend: hold such parameters fixed with `split` and `hold`. "
                "If the model uses it inside of torch.utils.checkpoint, turn checkpointing off"
            )
        observer.others[name] = (
            "no function of torch is seen to use it, as inside of an autograd.Function, a scripted "
            "function or torch.func.vmap"
        )
    if not len(outputs):
        raise ValueError("the batch has no examples, from which factors could be made")
    calls = {name: uses for name, uses in observer.calls.items() if name not in observer.others}
    if observer.examples is not None and len(outputs) % observer.examples == 0:
        counts = [observer.examples]
    else:
        # Outputs may be flattened over positions: the shortest first axis comes first.
        lengths = [len(use.output) for uses in calls.values() for use in uses]
        counts = sorted({len(outputs), *(n for n in lengths if n > 1 and len(outputs) % n == 0)})
    return [_among(outputs, calls, observer.others, count) for count in counts]


def _among(
    outputs: Tensor, calls: Mapping[str, Sequence[Use]], others: Mapping[str, str], examples: int
) -> Observed:
    """Return an evaluation with this number of examples."""
    unlike = {
        name: f"the rows of a call are not those of {examples} examples"
        for name, uses in calls.items()
        if any(use.rows % examples for use in uses)
    }
    uses = {name: Uses(tuple(calls[name]), examples) for name in calls if name not in unlike}
    return Observed(outputs, uses, {**others, **unlike}, examples)


def _dependence(outputs: Tensor, params: Mapping[str, Tensor]) -> Iterator[tuple[str, bool]]:
    """Yield whether the outputs depend on a parameter, by its name."""
    if not params or not outputs.requires_grad:
        yield from dict.fromkeys(params, False).items()
        return
    cotangent = torch.zeros_like(outputs)
    gradients = torch.autograd.grad(
        outputs, list(params.values()), cotangent, retain_graph=True, allow_unused=True
    )
    for name, gradient in zip(params, gradients, strict=True):
        yield name, gradient is not None


def _evaluated(
    model: nn.Module,
    loss: Loss,
    params: Mapping[str, Tensor],
    batch: Any,
    expansions: dict[Any, bool],
) -> tuple[Observer, Any]:
    """Evaluate the model, and record its uses of parameters.

    Looked-up rows that all examples share are expanded to the examples, unless the outputs change.
    """
    observer = Observer(params, _count(batch))
    try:
        with calling(model), observer:
            outputs = loss.outputs(params, batch)
        if not observer.has_expanded:
            return observer, outputs
        if (structure := observer.structure) not in expansions:
            with torch.no_grad():
                expansions[structure] = _is_equal(outputs, loss.outputs(params, batch))
        if expansions[structure]:
            return observer, outputs
    except Exception:
        # A model that does not take the expanded rows may raise anything.
        if not observer.has_expanded:
            raise
    observer = Observer(params, _count(batch), expands=False)
    with calling(model), observer:
        return observer, loss.outputs(params, batch)


def _is_equal(outputs: Any, right: Any) -> bool:
    """Return whether two outputs are tensors that are equal up to rounding."""
    tensors = isinstance(outputs, Tensor) and isinstance(right, Tensor)
    if not tensors or outputs.shape != right.shape:
        return False
    return is_close(outputs, right, right, torch.finfo(right.dtype).eps)


def is_close(ours: Tensor, right: Tensor, size: Tensor, eps: float, /) -> bool:
    """Return whether two tensors are equal up to the rounding of numbers of this size."""
    difference = (ours.reshape_as(right) - right).abs().amax()
    return bool(difference <= eps**0.5 * size.abs().amax())


def _count(batch: Any) -> int | None:
    """Return the number of examples of a batch, or None if it is ambiguous."""
    try:
        return examples_of(batch)
    except (TypeError, ValueError):
        return None


class Observer(TorchFunctionMode):
    """Mode that records the calls that use parameters.

    Attributes:
        examples: Number of examples, or None if it is unknown.
        calls: Linear uses of each parameter, by name.
        others: Function that uses a parameter in another way, by the name of the parameter.
        has_expanded: Whether rows that all examples share were expanded to the examples.
    """

    def __init__(
        self, params: Mapping[str, Tensor], examples: int | None, *, expands: bool = True
    ) -> None:
        super().__init__()
        self.examples = examples
        self.has_expanded = False
        self._expands = expands
        self.calls: dict[str, list[Use]] = {}
        self.others: dict[str, str] = {}
        # Tensors that are a parameter or its transpose. They are kept, so that ids are not reused.
        self._aliases = {id(leaf): (leaf, name, False) for name, leaf in params.items()}

    @property
    def structure(self) -> Any:
        """Value that is equal for evaluations with calls of the same kinds and shapes."""
        calls = (
            (name, *((use.map.layout, use.output.shape) for use in uses))
            for name, uses in self.calls.items()
        )
        return tuple(calls), frozenset(self.others)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is F.multi_head_attention_forward:
            # A mode is inactive while it handles a call: activate it for the calls inside.
            with self:
                return BODIES[func](*args, **options)
        if (call := unrolled(func, args, options)) is not None:
            with self:
                return call()
        output = func(*args, **options)
        keys = [id(x) for x in tensors_in((args, options))]
        given = {key: self._aliases[key] for key in keys if key in self._aliases}
        if not given or not any(x.requires_grad for x in tensors_in(output)):
            return output
        if len(given) == 1 and isinstance(output, Tensor):
            ((leaf, name, is_transposed),) = given.values()
            if output is leaf or (func in _COPIES and args[0] is not leaf):
                return output
            is_copy = func in _COPIES or (func in SUMS and _has_number(args, options))
            if is_copy and output.shape == leaf.shape:
                self._aliases[id(output)] = output, name, is_transposed
                return output
            if func in _TRANSPOSES and leaf.dim() == 2 and output.shape == leaf.shape[::-1]:
                self._aliases[id(output)] = output, name, not is_transposed
                return output
        return self._recorded(func, args, options, output, given)

    def _recorded(
        self,
        func: Any,
        args: Any,
        options: dict[str, Any],
        output: Any,
        given: Mapping[int, tuple[Tensor, str, bool]],
    ) -> Any:
        """Record the uses of parameters in a call, and return its output."""
        maps = maps_of(func, output, args, options) if isinstance(output, Tensor) else []
        if is_lookup(func) and self._expands and (rows := self._shared_rows(output)) is not None:
            # Rows that all examples share, such as positions: give each example its own.
            self.has_expanded = True
            output = rows
            maps = maps_of(func, output, args, options)
        seen = set()
        for argument, made in maps:
            if (alias := given.get(id(argument))) is None:
                continue
            _, name, is_transposed = alias
            layout = made.layout.of_transposed() if is_transposed else made.layout
            if layout is not None:
                seen.add(id(argument))
                self.calls.setdefault(name, []).append(
                    Use(replace(made, layout=layout), output, get_gradient_edge(output))
                )
        for key, (_, name, _) in given.items():
            if key not in seen:
                self.others.setdefault(
                    name, f"it is an argument of {getattr(func, '__name__', func)}"
                )
        return output

    def _shared_rows(self, output: Tensor) -> Tensor | None:
        """Return looked-up rows with an axis of the examples, or None if they have one."""
        count = self.examples or 0
        if count < 2 or output.dim() < 2:
            return None
        if len(output) == 1:
            return output.expand(count, *output.shape[1:])
        is_flat = output.dim() == 2 and len(output) != count
        return output.expand(count, *output.shape) if is_flat else None


def _has_number(args: Any, options: Mapping[str, Any]) -> bool:
    """Return whether a sum is that of a tensor and a number, as in ``1 + w``."""
    return not options and any(isinstance(term, (int, float)) for term in args)


_COPIES = {
    *(Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type_as),
    *(Tensor.contiguous, Tensor.clone, torch.clone),
}


_TRANSPOSES = {
    *(Tensor.t, torch.t, Tensor.transpose, torch.transpose),
    *(getter("T"), getter("mT")),
}
