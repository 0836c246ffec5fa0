"""A module on a batch, as steps that each have a rule."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from hessfunc.functional import Loss
from hessfunc.hbp.layer import Call, Layer
from hessfunc.hbp.rules import reshaped, rule_of

__all__ = ["EXACT_PRODUCTS", "Step", "called", "steps_of", "traced"]

EXACT_PRODUCTS = (
    "take exact products, `per_block(hvp(loss)(params, batch), params)` or `pchvp(loss)`, which go "
    "through any model"
)

_OUT_OF_PLACE: dict[Any, Any] = {operator.iadd: operator.add, operator.isub: operator.sub}


@dataclass(frozen=True)
class Step:
    """A call that depends on the parameters.

    Attributes:
        name: for messages.
        target: what is called: a module type, a function, or the name of a tensor method.
        call: on values that are detached.
        sources: the numbers of the steps that give its inputs; None for an input that is fixed.
        parameters: the full name of each parameter that is differentiated, by its own name.
        output: with its graph.
    """

    name: str
    target: Any
    call: Call
    sources: tuple[int | None, ...]
    parameters: Mapping[str, str]
    output: Tensor

    @property
    def width(self) -> int:
        """The entries of one example's output."""
        return self.output[0].numel()

    def layer(self) -> Layer:
        """The derivatives of the call.

        Raises:
            NotImplementedError: there is no rule, or it does not fit the call.
        """
        found = rule_of(self.target)
        if found is None:
            kind = getattr(self.target, "__name__", str(self.target))
            raise NotImplementedError(
                f"Hessian backpropagation has no rule for {kind}, at {self.name!r}: register "
                f"one by `rule` of `hessfunc.hbp`, where `rule({kind})(by_autodiff)` fits what "
                f"treats each example by itself; or {EXACT_PRODUCTS}"
            )
        try:
            layer = found(self.call)
            if found is not reshaped:
                self._refuse_unless_apart()
        except (NotImplementedError, ValueError) as error:
            raise type(error)(f"at {self.name!r}: {error}") from None
        return layer

    def _refuse_unless_apart(self) -> None:
        first = self.call(*(t[:1] for t in self.call.inputs))
        if not torch.allclose(first, self.output[:1], rtol=1e-3, atol=1e-5):
            raise NotImplementedError(
                "the first example alone gives something else than in the batch, and Hessian "
                f"backpropagation needs the examples apart: {EXACT_PRODUCTS}"
            )


def traced(model: nn.Module, /) -> fx.Graph:
    """The graph of a module's calls; modules that have a rule are one node each.

    Raises:
        NotImplementedError: the calls depend on the values of the inputs.
    """
    if rule_of(type(model)) is not None:
        return _of_one_call(model)
    try:
        return _Tracer().trace(model)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise NotImplementedError(
            f"the calls of {type(model).__name__} cannot be read ({reason}): register a rule for "
            f"the module in which that is, by `rule` of `hessfunc.hbp`, or {EXACT_PRODUCTS}"
        ) from error


def _of_one_call(model: nn.Module) -> fx.Graph:
    graph = fx.Graph()
    (name,) = inspect.signature(model.forward).parameters
    graph.output(graph.call_module("", (graph.placeholder(name),)))
    return graph


def _name(path: str, own: str) -> str:
    return f"{path}.{own}" if path else own


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return rule_of(type(m)) is not None or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Called:
    """A module as the loss calls it.

    Attributes:
        arguments: by their names in its forward.
        state: its parameters and buffers.
        training: the training flag of each of its modules.
        outputs: what it returns.
    """

    arguments: Mapping[str, Any]
    state: Mapping[str, Tensor]
    training: Sequence[tuple[nn.Module, bool]]
    outputs: Any


def called(model: nn.Module, loss: Loss, params: Mapping[str, Tensor], batch: Any, /) -> _Called:
    """What the loss gives to the model, and takes from it.

    Raises:
        ValueError: the loss does not call the model once, or does not take its outputs as they are.
    """
    found: list[_Called] = []

    def record(
        model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any
    ) -> None:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        flags = [(module, module.training) for module in model.modules()]
        found.append(_Called(bound.arguments, state, flags, outputs))

    handle = model.register_forward_hook(record, with_kwargs=True)
    try:
        outputs = loss.outputs(params, batch)
    finally:
        handle.remove()
    if len(found) != 1:
        raise ValueError(
            f"the loss calls the model {len(found)} times a batch, and must call it once: give the "
            "module of which the loss is made"
        )
    if outputs is not found[0].outputs or not isinstance(outputs, Tensor):
        raise ValueError(
            "the model must return one tensor, and the loss take it as it is: put what is done to "
            "it in between into the criterion, or into the model"
        )
    return found[0]


def steps_of(
    model: nn.Module, graph: fx.Graph, found: _Called, chosen: frozenset[str], /
) -> list[Step]:
    """The calls that depend on the chosen parameters; the last one gives the outputs.

    Raises:
        ValueError: a parameter is used more than once, or the graph does not give the outputs.
        NotImplementedError: a parameter is used outside of modules that have a rule.
    """
    values: dict[fx.Node, Any] = {}
    numbers: dict[fx.Node, int] = {}
    steps: list[Step] = []
    last = graph.output_node().all_input_nodes[0]
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "placeholder":
            values[node] = found.arguments.get(target, node.args[0] if node.args else None)
        elif node.op == "get_attr":
            if target in chosen:
                raise NotImplementedError(
                    f"parameter {target!r} is used outside of a module that has a rule: register "
                    "one for the module around it by `rule` of `hessfunc.hbp`, hold the parameter "
                    f"fixed by `split` and `hold`, or {EXACT_PRODUCTS}"
                )
            values[node] = found.state[target]
        elif node.op == "output":
            _refuse_unless_equal(values[last], found.outputs)
        else:
            call, sources, output = _evaluated(model, node, values, found.state)
            values[node] = output
            own = {n: _name(target, n) for n in call.params if _name(target, n) in chosen}
            if own or any(source in numbers for source in sources):
                _refuse_unless_batched(node, output, found.outputs)
                numbers[node] = len(steps)
                step = Step(
                    target if node.op == "call_module" else node.name,
                    type(call.module) if call.module is not None else node.target,
                    call,
                    tuple(numbers.get(source) for source in sources),
                    own,
                    output,
                )
                steps.append(step)
    _refuse_shared(steps, found.state)
    if last not in numbers:
        raise ValueError("the model's outputs do not depend on any of the parameters")
    return steps[: numbers[last] + 1]


def _evaluated(
    model: nn.Module,
    node: fx.Node,
    values: Mapping[fx.Node, Any],
    state: Mapping[str, Tensor],
) -> tuple[Call, list[fx.Node], Any]:
    """A node as a call on floating-point tensors, the nodes that give these, and its value."""
    sources = [
        source
        for source in node.all_input_nodes
        if source.op != "get_attr" and _is_floating(values[source])
    ]
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p:
        raise ValueError(
            f"{node.target!r} is a {type(module).__name__} in train mode, another function for "
            "each call: call `model.eval()` before `functional(model)`"
        )
    in_place = (
        getattr(module, "inplace", False)
        or node.kwargs.get("inplace", False)
        or (node.op == "call_method" and str(node.target).endswith("_"))
    )
    own = {} if module is None else dict(module.named_parameters())
    fixed = {} if module is None else dict(module.named_buffers())
    params, buffers = (
        {name: state[_name(str(node.target), name)] for name in names} for names in (own, fixed)
    )

    def function(params: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
        given = [t.clone() for t in inputs] if in_place else inputs
        here = {**values, **dict(zip(sources, given, strict=True))}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), here.__getitem__)
        if module is not None:
            return torch.func.functional_call(module, {**buffers, **params}, args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return _OUT_OF_PLACE.get(node.target, node.target)(*args, **kwargs)

    inputs = [values[source] for source in sources]
    output = function(params, *inputs)
    call = Call(
        function,
        {name: value.detach() for name, value in params.items()},
        tuple(value.detach() for value in inputs),
        module,
        output.shape[1:] if isinstance(output, Tensor) else torch.Size(),
    )
    return call, sources, output


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _refuse_unless_batched(node: fx.Node, output: Any, outputs: Tensor) -> None:
    if not _is_floating(output) or output.dim() == 0 or len(output) != len(outputs):
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise NotImplementedError(
            f"{node.name!r} gives {what}, and Hessian backpropagation needs tensors with the "
            f"{len(outputs)} examples along their first axes: register a rule for the module "
            f"around it by `rule` of `hessfunc.hbp`, or {EXACT_PRODUCTS}"
        )


def _refuse_unless_equal(ours: Tensor, outputs: Tensor) -> None:
    if ours.shape != outputs.shape or not torch.allclose(ours, outputs, rtol=1e-3, atol=1e-5):
        raise ValueError(
            "the graph of the model's calls, which was read once, does not give its outputs: does "
            f"forward depend on values, or has the model been changed? Else {EXACT_PRODUCTS}"
        )


def _refuse_shared(steps: Sequence[Step], state: Mapping[str, Tensor]) -> None:
    names = [full for step in steps for full in step.parameters.values()]
    tensors = [id(leaf) for leaf in state.values()]
    for name in names:
        if names.count(name) > 1 or tensors.count(id(state[name])) > 1:
            raise ValueError(
                f"parameter {name!r} is used more than once, and a block of one use would miss the "
                f"cross terms: {EXACT_PRODUCTS}"
            )
