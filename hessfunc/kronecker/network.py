"""Decompose a module on a batch into operations, each of which has a rule."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from hessfunc.autograd.errors import first_line
from hessfunc.autograd.stateless import call_with
from hessfunc.kronecker.backpropagation_rules import reshaped, rule_of
from hessfunc.kronecker.calls import ModelCall, full_name
from hessfunc.kronecker.layer import Call, Layer
from hessfunc.trees import leaves

EXACT_PRODUCTS = (
    "use exact products, `per_block(hvp(loss)(params, batch), params)` or `pchvp(loss)`, which "
    "support any model"
)
_REGISTER = "register a rule for the module around it (`from hessfunc.kronecker import rule`)"

_OUT_OF_PLACE: dict[Any, Any] = {operator.iadd: operator.add, operator.isub: operator.sub}


@dataclass(frozen=True)
class Operation:
    """Call of a module or function whose output depends on the parameters.

    Attributes:
        name: Name for messages.
        target: Module type, function, or name of the tensor method that is called.
        call: Call on detached values.
        predecessors: Indices of the operations that compute the moving inputs.
        parameters: Full name of each differentiated parameter, by its name in the module.
        output: Output with its autograd graph.
    """

    name: str
    target: Any
    call: Call
    predecessors: tuple[int, ...]
    parameters: Mapping[str, str]
    output: Tensor

    @property
    def width(self) -> int:
        """Number of entries of the output of one example."""
        return self.output[0].numel()

    def layer(self) -> Layer:
        """Return the derivatives of the call.

        Raises:
            NotImplementedError: If there is no rule, or if it does not apply to the call.
        """
        rule = rule_of(self.target)
        if rule is None:
            kind = getattr(self.target, "__name__", str(self.target))
            raise NotImplementedError(
                f"Hessian backpropagation has no rule for {kind}, at {self.name!r}: register one "
                "(`from hessfunc.kronecker import by_autodiff, rule`; "
                f"`rule({kind})(by_autodiff)` if it treats each example independently), or "
                f"{EXACT_PRODUCTS}"
            )
        try:
            layer = rule(self.call)
            if rule is not reshaped:
                self._refuse_unless_apart()
        except (NotImplementedError, ValueError) as error:
            raise type(error)(f"at {self.name!r}: {error}") from None
        if unknown := [own for own in self.parameters if own not in layer.parameters]:
            raise NotImplementedError(
                f"the rule for {self.target.__name__}, at {self.name!r}, does not differentiate "
                f"the output with respect to the parameter {unknown[0]!r}: use `by_autodiff`"
            )
        return layer

    def _refuse_unless_apart(self) -> None:
        for example in (slice(0, 1), slice(-1, None)):
            try:
                alone = self.call(*(t[example] for t in self.call.inputs))
                is_apart = torch.allclose(alone, self.output[example], rtol=1e-3, atol=1e-5)
            except (RuntimeError, IndexError):
                is_apart = False
            if not is_apart:
                raise NotImplementedError(
                    "the output for one example alone differs from its output in the batch, but "
                    f"Hessian backpropagation needs independent examples: {EXACT_PRODUCTS}"
                )


def operations_of(
    model: nn.Module, model_call: ModelCall, chosen: frozenset[str], /
) -> list[Operation]:
    """Return the calls that depend on the chosen parameters; the last call gives the outputs.

    Args:
        model: Module that the loss calls.
        model_call: Record of this call.
        chosen: Full names of the parameters that are differentiated.

    Raises:
        ValueError: If a parameter is used more than once, or if the outputs depend on none.
        NotImplementedError: If the module cannot be traced, or if a parameter is used outside
            modules that have a rule.
    """
    graph, constants = _traced(model, model_call.arguments)
    values: dict[fx.Node, Any] = {}
    numbers: dict[fx.Node, int] = {}
    of_inputs: set[fx.Node] = set()
    operations: list[Operation] = []
    arguments = iter(model_call.arguments.values())
    last = graph.output_node().all_input_nodes[0]
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "placeholder":
            values[node] = next(arguments)
            of_inputs.add(node)
        elif node.op == "get_attr":
            if target in chosen:
                raise NotImplementedError(
                    f"parameter {target!r} is used outside a module that has a rule: "
                    f"{_REGISTER}, hold the parameter fixed with `split` and `hold`, or "
                    f"{EXACT_PRODUCTS}"
                )
            values[node] = constants[target] if target in constants else model_call.state[target]
        elif node.op == "output":
            _refuse_unless_equal(values[last], model_call.outputs)
        else:
            if of_inputs.intersection(node.all_input_nodes):
                of_inputs.add(node)
            inputs = [
                source
                for source in node.all_input_nodes
                if source in of_inputs and _is_floating(values[source])
            ]
            moving = tuple(i for i, source in enumerate(inputs) if source in numbers)
            call, output = _evaluated(model, node, values, model_call.state, inputs, moving)
            values[node] = output
            own = {
                name: full_name(target, name)
                for name in call.params
                if full_name(target, name) in chosen
            }
            if (own or moving) and any(map(_is_floating, leaves(output))):
                _refuse_unless_batched(node, output, model_call.outputs)
                numbers[node] = len(operations)
                operation = Operation(
                    target if node.op == "call_module" else node.name,
                    type(call.module) if call.module is not None else node.target,
                    call,
                    tuple(numbers[inputs[i]] for i in moving),
                    own,
                    output,
                )
                operations.append(operation)
    _refuse_shared(operations, model_call.state)
    if last not in numbers:
        raise ValueError(
            "the model's outputs do not depend on any of the parameters: pass the params from "
            "`functional(model)`"
        )
    return operations[: numbers[last] + 1]


def _traced(
    model: nn.Module, arguments: Mapping[str, Any]
) -> tuple[fx.Graph, Mapping[str, Tensor]]:
    """Trace a module: return the graph of its calls and the constants in it."""
    if rule_of(type(model)) is not None:
        graph = fx.Graph()
        inputs = tuple(graph.placeholder(name) for name in arguments)
        graph.output(graph.call_module("", inputs))
        return graph, {}
    plain = {
        name: value
        for name, value in arguments.items()
        if not any(isinstance(leaf, Tensor) for leaf in leaves(value))
    }
    before = set(vars(model))
    try:
        graph = _Tracer().trace(model, plain or None)
    except Exception as error:
        raise NotImplementedError(
            f"{type(model).__name__} cannot be traced by torch.fx ({first_line(error)}): "
            f"{_REGISTER}, or {EXACT_PRODUCTS}"
        ) from error
    finally:
        # The tracer stores constant tensors as attributes of the module: remove them again.
        constants = {name: vars(model).pop(name) for name in set(vars(model)) - before}
    return graph, constants


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return rule_of(type(m)) is not None or super().is_leaf_module(m, module_qualified_name)


def _evaluated(
    model: nn.Module,
    node: fx.Node,
    values: Mapping[fx.Node, Any],
    state: Mapping[str, Tensor],
    predecessors: Sequence[fx.Node],
    moving: tuple[int, ...],
) -> tuple[Call, Any]:
    """Return a node as a call on the values of its predecessors, and its output."""
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    in_place = (
        getattr(module, "inplace", False)
        or node.kwargs.get("inplace", False)
        or (node.op != "call_module" and _called_name(node).endswith("_"))
    )
    own = {} if module is None else dict(module.named_parameters())
    fixed = {} if module is None else dict(module.named_buffers())
    params, buffers = (
        {name: state[full_name(str(node.target), name)] for name in names} for names in (own, fixed)
    )

    def function(params: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
        given = [t.clone() for t in inputs] if in_place else inputs
        here = {**values, **dict(zip(predecessors, given, strict=True))}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), here.__getitem__)
        if module is not None:
            return call_with(module, {**buffers, **params}, args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return _OUT_OF_PLACE.get(node.target, node.target)(*args, **kwargs)

    inputs = [values[source] for source in predecessors]
    output = function(params, *inputs)
    call = Call(
        function,
        {name: value.detach() for name, value in params.items()},
        tuple(value.detach() for value in inputs),
        moving,
        module,
        output.shape[1:] if isinstance(output, Tensor) else torch.Size(),
    )
    return call, output


def _called_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _refuse_unless_batched(node: fx.Node, output: Any, outputs: Tensor) -> None:
    if not _is_floating(output) or output.dim() == 0 or len(output) != len(outputs):
        kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise NotImplementedError(
            f"{node.name!r} returns {kind}, but Hessian backpropagation needs tensors with the "
            f"{len(outputs)} examples along their first axes: {_REGISTER}, or {EXACT_PRODUCTS}"
        )


def _refuse_unless_equal(ours: Any, outputs: Tensor) -> None:
    if ours.shape != outputs.shape or not torch.allclose(ours, outputs, rtol=1e-3, atol=1e-5):
        raise ValueError(
            "the traced graph of the model does not reproduce its outputs, as happens if forward "
            f"draws random numbers: {EXACT_PRODUCTS}"
        )


def _refuse_shared(operations: Sequence[Operation], state: Mapping[str, Tensor]) -> None:
    names = [full for operation in operations for full in operation.parameters.values()]
    tensors = [id(leaf) for leaf in state.values()]
    for name in names:
        if names.count(name) > 1 or tensors.count(id(state[name])) > 1:
            raise ValueError(
                f"parameter {name!r} is used more than once, so that the blocks of its uses have "
                f"cross terms, which Hessian backpropagation misses: {EXACT_PRODUCTS}"
            )
