"""Hessian backpropagation: propagate one averaged Hessian backwards, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn

from hessfunc.kronecker.block import Block
from hessfunc.kronecker.blocks import Blocks
from hessfunc.kronecker.calls import (
    ModelCall,
    differentiating,
    recorded_call,
    refuse_compiled,
    refuse_dtensors,
)
from hessfunc.kronecker.frontier import Frontier
from hessfunc.kronecker.layer import Dependence, Layer, with_sign
from hessfunc.kronecker.network import EXACT_PRODUCTS, Operation, operations_of
from hessfunc.losses import Loss
from hessfunc.memory import refuse_unless_fits
from hessfunc.options import validated
from hessfunc.spaces.of import space_of
from hessfunc.training_mode import training_flags
from hessfunc.transforms.batches.reductions import noted
from hessfunc.transforms.evaluation import requiring_gradients, scalar
from hessfunc.transforms.output_hessians import mean_hessian, warn_if_zero
from hessfunc.transforms.output_matrices import refuse_without_halves
from hessfunc.transforms.taps import Residual

BlockCurvature: TypeAlias = Callable[[Mapping[str, Tensor], Any], Blocks]
Made = TypeVar("Made")


@validated
def hbp(
    loss: Loss,
    model: nn.Module,
    /,
    *,
    residual: Residual = "none",
    average_input_jacobian: bool = True,
    average_parameter_jacobian: bool = True,
    max_blocks: int | None = None,
) -> BlockCurvature:
    """Compute the diagonal blocks of the Hessian by backpropagation: ``(params, batch) -> blocks``.

        H_x = J' H_z J + sum_k g_k Hess_x z_k

    This holds for each module z = f(x, theta) with Jacobian J and gradient g of the loss at z, and
    in the same way for theta. One matrix is propagated backwards, an average over the batch: first
    of the Hessians of the loss at the outputs, then of the Jacobians of a module or of
    ``J_b' H_z J_b``, then of the second terms. Each block has the structure of its layer, for
    example ``H_z (x) xbar xbar'`` for the weight of a linear layer, and a product needs no pass
    over the batch. For one example, the blocks are the blocks of the Hessian. Where paths meet
    again, as around a skip connection, the joint Hessian of all branches is propagated, so that no
    cross term is lost. Each module is still averaged separately.

    `hessfunc.kronecker.backpropagation_rules` contains the rules for modules and functions; users
    can register more. Modules without a rule are traced into the modules and functions that they
    call.

    Args:
        loss: Loss that exposes its outputs and its criterion, as made by `supervised`.
        model: Module from which the loss was made, in eval mode if it has BatchNorm or Dropout.
        residual: Treatment of the second term, after its sum over the batch. ``"none"`` keeps it,
            ``"abs"`` replaces it by its absolute value, ``"clip"`` by its positive part, and
            ``"zero"`` drops it. All but ``"none"`` give positive semi-definite blocks if the
            criterion is convex in the outputs.
        average_input_jacobian: Whether to propagate with the mean Jacobian of each module instead
            of the mean of J'HJ.
        average_parameter_jacobian: Whether to use the mean Jacobian with respect to the parameters
            instead of the mean of J'HJ.
        max_blocks: Largest number of parts into which the rows of each linear layer are split
            (`torch.chunk`). Each part is a block of its own.

    Returns:
        A curvature function that returns `Blocks`. They map the name of each parameter to a block
        with ``matvec``, ``dense()``, ``trace()``, ``logdet(damping)`` and
        ``inverse_matvec(block, damping)``. Called, they are the matvec of the whole block-diagonal
        matrix. `over_batches` returns the mean of the blocks of all batches as a matvec without
        these methods, with which `cg` solves.

    Raises:
        TypeError: If the loss does not expose its outputs and its criterion.
        NotImplementedError: If the model has a module without a rule. Raised by the curvature
            function.
        ValueError: If a module mixes examples, such as BatchNorm in train mode, or if a parameter
            is used more than once. Raised by the curvature function.
        MemoryError: If the matrices do not fit into memory. Raised by the curvature function
            before it allocates them, and by ``dense()`` of a block.

    Cost: two gradients, and (m + n) m n operations in matrix products for a layer with m outputs
    and n inputs. A product with the block of a linear layer is one product with H_z.

    Source: Dangel, Harmeling and Hennig 2019, arXiv 1902.01813; Chen, Chou and Chang 2018,
    arXiv 1802.06502; Botev, Ritter and Barber 2017, arXiv 1706.03662.
    """
    refuse_without_halves(loss)
    refuse_residual(residual)
    if max_blocks is not None and max_blocks < 1:
        raise ValueError(f"max_blocks={max_blocks}: pass at least 1, or None for whole layers")

    def block(reached: Reached) -> Block:
        return reached.dependence.block(
            reached.hessian,
            reached.slope,
            residual,
            average=average_parameter_jacobian,
            max_blocks=max_blocks,
        )

    blocks = backpropagated(
        loss,
        model,
        block,
        residual=residual,
        average_input_jacobian=average_input_jacobian,
        average_parameter_jacobian=average_parameter_jacobian,
    )

    def curvature(params: Mapping[str, Tensor], batch: Any) -> Blocks:
        constants = requiring_gradients(list(params.values()), batch)
        return Blocks(blocks(params, batch), space_of(params), tuple(constants))

    return curvature


@dataclass(frozen=True)
class Reached:
    """Parameter reached by the backward pass, with the derivatives at its module's output.

    Attributes:
        dependence: Dependence of the module's output on the parameter.
        hessian: Hessian with respect to the module's output, ``(m, m)``.
        slope: Gradient of the loss at the module's output, ``(B, m)``; None if the residual is
            dropped.
    """

    dependence: Dependence
    hessian: Tensor
    slope: Tensor | None


def backpropagated(
    loss: Loss,
    model: nn.Module,
    part: Callable[[Reached], Made],
    /,
    *,
    residual: Residual,
    average_input_jacobian: bool,
    average_parameter_jacobian: bool,
) -> Callable[[Mapping[str, Tensor], Any], dict[str, Made]]:
    """Return the function of the parameters and a batch with ``part(reached)`` by parameter."""
    refuse_compiled(model)

    def parts(params: Mapping[str, Tensor], batch: Any) -> dict[str, Made]:
        space = space_of(params)
        refuse_dtensors(space)
        with differentiating(space, params, batch) as (leaves, given):
            with noted(loss, params, batch):
                call = recorded_call(model, loss, leaves, given)
            with training_flags(call.training):
                made = propagated(call, frozenset(params), given)
        if unused := [name for name in space.names if name not in made]:
            raise ValueError(
                f"the loss does not depend on parameter {unused[0]!r} of the model: hold it fixed "
                "with `split` and `hold`"
            )
        return {name: made[name] for name in space.names}

    def propagated(call: ModelCall, chosen: frozenset[str], batch: Any) -> dict[str, Made]:
        operations = operations_of(model, call, chosen)
        slopes = (
            _slopes(loss, operations, batch) if residual != "zero" else [None] * len(operations)
        )
        with torch.no_grad():
            layers = [operation.layer() for operation in operations]
            _refuse_unless_fits(operations, layers, average=average_parameter_jacobian)
            outputs = operations[-1].output.detach()
            if residual == "zero":
                # Output Hessians do not look at all targets, which the criterion checks.
                scalar(loss.criterion(outputs, batch))
            hessian = mean_hessian(loss.criterion, outputs, batch)
            if residual == "zero":
                # With the second terms, the Hessian does not depend on how the loss is split into
                # outputs and criterion. Without them, a linear criterion gives zero.
                warn_if_zero(loss.criterion, hessian)
            return _backward(
                operations, layers, slopes, hessian, part, residual, average_input_jacobian
            )

    return parts


def refuse_residual(residual: str, /) -> None:
    """Raise if the residual is not one of the options."""
    if residual not in get_args(Residual):
        raise ValueError(f"residual={residual!r}: choose 'abs', 'clip', 'zero' or 'none'")


def _slopes(loss: Loss, operations: Sequence[Operation], batch: Any) -> list[Tensor | None]:
    """Return the gradient of the loss at the output of each operation, ``(B, m)``."""
    value = loss.criterion(operations[-1].output, batch)
    gradients = torch.autograd.grad(
        value, [operation.output for operation in operations], materialize_grads=True
    )
    return [gradient.reshape(len(gradient), -1) for gradient in gradients]


def _backward(
    operations: Sequence[Operation],
    layers: Sequence[Layer],
    slopes: Sequence[Tensor | None],
    hessian: Tensor,
    part: Callable[[Reached], Made],
    residual: Residual,
    average: bool,
) -> dict[str, Made]:
    """Propagate the Hessian at the outputs backwards, and return the part of each parameter.

    The recursion is that of Dangel, Harmeling and Hennig 2019, arXiv 1902.01813:

        H_x = J' H_z J + sum_k g_k Hess_x z_k

    Mixed derivatives with another tensor y of the frontier follow H_yx = H_yz J.
    """
    frontier = Frontier(len(operations) - 1, hessian)
    made: dict[str, Made] = {}
    for number in reversed(range(len(operations))):
        operation, layer, slope = operations[number], layers[number], slopes[number]
        row = frontier.take(number)
        if row is None:
            continue
        for own, name in operation.parameters.items():
            made[name] = part(Reached(layer.parameters[own], row.own, slope))
        if not operation.predecessors:
            continue
        jacobian = layer.jacobian
        inner = jacobian.congruence if average else jacobian.mean_congruence
        # J' H_z J for each pair of inputs, then H_yz J for each other tensor y.
        frontier.add(operation.predecessors, inner(row.own))
        for other, rows in row.mixed.items():
            frontier.add_mixed(other, operation.predecessors, jacobian.pull(rows))
        # sum_k g_k Hess_x z_k, summed over the batch before its sign is treated.
        if layer.curvature is not None and slope is not None:
            curvature = with_sign(layer.curvature(slope), residual)
            whole = torch.diag(curvature) if curvature.dim() == 1 else curvature
            frontier.add(operation.predecessors, [[whole]])
    return made


def _refuse_unless_fits(
    operations: Sequence[Operation], layers: Sequence[Layer], *, average: bool
) -> None:
    """Raise if the matrices alive at one operation and those kept by the blocks do not fit."""
    widths = [operation.width for operation in operations]
    live, kept, most = {len(operations) - 1}, 0, 0
    for number in reversed(range(len(operations))):
        operation, layer = operations[number], layers[number]
        predecessors = set(operation.predecessors)
        kept += sum(
            layer.parameters[own].entries(widths[number], average=average)
            for own in operation.parameters
        )
        inner = sum(widths[s] for s in live | predecessors) ** 2
        if predecessors:
            inner += widths[number] * sum(widths[s] for s in predecessors) + layer.jacobian.entries
        # Sums, products and copies of these matrices double the memory.
        most = max(most, kept + 2 * inner)
        live = (live | predecessors) - {number}
    widest = max(range(len(operations)), key=widths.__getitem__)
    refuse_unless_fits(
        most,
        operations[-1].output,
        "Hessian backpropagation, whose largest matrix has "
        f"{widths[widest]} x {widths[widest]} entries at {operations[widest].name!r},",
        EXACT_PRODUCTS,
    )
