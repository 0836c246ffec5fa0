"""Hessian backpropagation: one averaged Hessian goes back through the model, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor, nn

from hessfunc.kronecker.blocks import Block, Blocks
from hessfunc.kronecker.calls import Called, called, linearising, refuse_compiled, refuse_dtensors
from hessfunc.kronecker.frontier import Frontier
from hessfunc.kronecker.layer import Dependence, Layer, with_sign
from hessfunc.kronecker.network import EXACT_PRODUCTS, Step, steps_of
from hessfunc.losses import Loss
from hessfunc.memory import refuse_unless_fits
from hessfunc.modules import training_flags
from hessfunc.options import validated
from hessfunc.spaces.of import space_of
from hessfunc.transforms.batches.reductions import noted
from hessfunc.transforms.gauss_newton import refuse_without_halves
from hessfunc.transforms.output_hessians import mean_hessian, warn_if_zero
from hessfunc.transforms.positive_curvature import Residual

BlockCurvature: TypeAlias = Callable[[Mapping[str, Tensor], Any], Blocks]


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
    """The Hessian's diagonal blocks by backpropagation: ``(params, batch) -> blocks``.

        H_x = J' H_z J + sum_k g_k Hess_x z_k

    for each module z = f(x, theta), with J its Jacobian, g the gradient of the loss at z, and the
    same for theta. One matrix goes back, an average over the batch: of the loss' Hessians at the
    outputs, then of the modules' Jacobians or of ``J_b' H_z J_b``, then of the second terms. So
    each block has the structure of its layer, such as ``H_z (x) xbar xbar'`` for the weight of a
    linear one, and a product costs no pass over the batch. For one example the blocks are those of
    the Hessian. Where paths meet again, as around a skip connection, the Hessian of all their ends
    goes back, so that no cross term is lost; averages are still those of each module by itself.

    Rules for modules and functions are in `hessfunc.kronecker.rules`, where users register
    more; modules made of these are looked into, in whatever way they are connected.

    Args:
        loss: with its two halves, as made by `supervised`.
        model: the module of which the loss is made, in eval mode where it has BatchNorm or
            Dropout.
        residual: what is done with the second term, after it is summed over the batch: ``"none"``:
            kept; ``"abs"``: replaced by its absolute value; ``"clip"``: by its positive part;
            ``"zero"``: left out. All but the first give positive semi-definite blocks, for a
            criterion that is convex in the outputs.
        average_input_jacobian: take the mean Jacobian of each module, not the mean of J'HJ.
        average_parameter_jacobian: the same for parameters.
        max_blocks: cut the rows of each linear layer in at most so many parts (`torch.chunk`), of
            which each is a block of its own.

    Returns:
        A curvature function; its `Blocks` map each parameter's name to a block with ``matvec``,
        ``dense()``, ``trace()``, ``logdet(damping)`` and ``inverse_matvec(block, damping)``, and
        are, called, the matvec of the whole block-diagonal matrix.

    Raises:
        TypeError: the loss does not show its halves.
        NotImplementedError: (from the curvature function) the model has a module for which there
            is no rule.
        ValueError: (from the curvature function) a module mixes examples, such as BatchNorm in
            train mode, or a parameter is used more than once.
        MemoryError: (from the curvature function, before it is needed) memory does not suffice;
            (from a block) its dense matrix does not fit.

    Cost: two gradients, and for a layer of m outputs and n inputs matmuls of (m + n) m n; a product
    with a linear layer's block is one with H_z.

    Source: Dangel, Harmeling and Hennig 2019, arXiv 1902.01813; Chen, Chou and Chang 2018,
    arXiv 1802.06502; Botev, Ritter and Barber 2017, arXiv 1706.03662.
    """
    refuse_without_halves(loss)
    refuse_residual(residual)
    if max_blocks is not None and max_blocks < 1:
        raise ValueError(f"max_blocks={max_blocks}: at least 1, or None for whole layers")

    def block(reached: Reached) -> Block:
        return reached.dependence.block(
            reached.hessian,
            reached.slope,
            residual,
            average=average_parameter_jacobian,
            max_blocks=max_blocks,
        )

    return backpropagated(
        loss,
        model,
        block,
        residual=residual,
        average_input_jacobian=average_input_jacobian,
        average_parameter_jacobian=average_parameter_jacobian,
    )


@dataclass(frozen=True)
class Reached:
    """A parameter that backpropagation has reached.

    Attributes:
        dependence: of the module's output on it.
        hessian: with respect to the module's output, ``(m, m)``.
        slope: the gradient of the loss there, ``(B, m)``; None where no residual is wanted.
    """

    dependence: Dependence
    hessian: Tensor
    slope: Tensor | None


def backpropagated(
    loss: Loss,
    model: nn.Module,
    block: Callable[[Reached], Block],
    /,
    *,
    residual: Residual,
    average_input_jacobian: bool,
    average_parameter_jacobian: bool,
) -> BlockCurvature:
    """The curvature function of what ``block`` makes of each parameter."""
    refuse_compiled(model)

    def curvature(params: Mapping[str, Tensor], batch: Any) -> Blocks:
        space = space_of(params)
        refuse_dtensors(space)
        with linearising(space, params, batch) as (leaves, given):
            with noted(loss, params, batch):
                found = called(model, loss, leaves, given)
            with training_flags(found.training):
                blocks = propagated(found, frozenset(params), given)
        if unused := [name for name in space.names if name not in blocks]:
            raise ValueError(
                f"the loss does not depend on parameter {unused[0]!r} of the model: hold it fixed "
                "by `split` and `hold`"
            )
        return Blocks({name: blocks[name] for name in space.names}, space)

    def propagated(found: Called, chosen: frozenset[str], batch: Any) -> dict[str, Block]:
        steps = steps_of(model, found, chosen)
        slopes = _slopes(loss, steps, batch) if residual != "zero" else [None] * len(steps)
        with torch.no_grad():
            layers = [step.layer() for step in steps]
            _refuse_unless_fits(steps, layers, average=average_parameter_jacobian)
            hessian = mean_hessian(loss.criterion, steps[-1].output.detach(), batch)
            if residual == "zero":
                # With the second terms, the Hessian is right however the loss is split.
                warn_if_zero(loss.criterion, hessian)
            return _backward(
                steps, layers, slopes, hessian, block, residual, average_input_jacobian
            )

    return curvature


def refuse_residual(residual: str, /) -> None:
    """Raise for a residual that there is not."""
    if residual not in get_args(Residual):
        raise ValueError(f"residual={residual!r}: choose 'abs', 'clip', 'zero' or 'none'")


def _slopes(loss: Loss, steps: Sequence[Step], batch: Any) -> list[Tensor | None]:
    """The gradient of the loss at the output of each step, ``(B, m)``."""
    value = loss.criterion(steps[-1].output, batch)
    found = torch.autograd.grad(value, [step.output for step in steps], materialize_grads=True)
    return [slope.reshape(len(slope), -1) for slope in found]


def _backward(
    steps: Sequence[Step],
    layers: Sequence[Layer],
    slopes: Sequence[Tensor | None],
    hessian: Tensor,
    block: Callable[[Reached], Block],
    residual: Residual,
    average: bool,
) -> dict[str, Block]:
    frontier = Frontier(len(steps) - 1, hessian)
    blocks: dict[str, Block] = {}
    for number in reversed(range(len(steps))):
        step, layer, slope = steps[number], layers[number], slopes[number]
        found = frontier.take(number)
        if found is None:
            continue
        for own, name in step.parameters.items():
            blocks[name] = block(Reached(layer.parameters[own], found.own, slope))
        if not step.sources:
            continue
        jacobian = layer.jacobian
        inner = jacobian.congruence if average else jacobian.mean_congruence
        frontier.add(step.sources, inner(found.own))
        for other, rows in found.mixed.items():
            frontier.add_mixed(other, step.sources, jacobian.pull(rows))
        if layer.curvature is not None and slope is not None:
            curvature = with_sign(layer.curvature(slope), residual)
            whole = torch.diag(curvature) if curvature.dim() == 1 else curvature
            frontier.add(step.sources, [[whole]])
    return blocks


def _refuse_unless_fits(steps: Sequence[Step], layers: Sequence[Layer], *, average: bool) -> None:
    """Raise if the matrices that live at once, and those that the blocks keep, do not fit."""
    widths = [step.width for step in steps]
    live, kept, most = {len(steps) - 1}, 0, 0
    for number in reversed(range(len(steps))):
        step, layer, sources = steps[number], layers[number], set(steps[number].sources)
        kept += sum(
            layer.parameters[own].entries(widths[number], average=average)
            for own in step.parameters
        )
        inner = sum(widths[s] for s in live | sources) ** 2
        if sources:
            inner += widths[number] * sum(widths[s] for s in sources) + layer.jacobian.entries
        # Sums, products and copies of these matrices take as much again.
        most = max(most, kept + 2 * inner)
        live = (live | sources) - {number}
    widest = max(range(len(steps)), key=widths.__getitem__)
    refuse_unless_fits(
        most,
        steps[-1].output,
        "Hessian backpropagation, whose largest matrix is the one of "
        f"{widths[widest]} x {widths[widest]} at {steps[widest].name!r},",
        EXACT_PRODUCTS,
    )
