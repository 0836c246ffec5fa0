"""Kronecker-factored curvature: each block is ``B (x) A``, of outputs and of inputs.

For a weight that acts on P positions of an example, inputs x_p and gradients g_p at its outputs,

    "expand":  A = mean_bp x_p x_p'         B = sum_b sum_p g_p g_p'
    "reduce":  A = mean_b xbar xbar'        B = sum_b (sum_p g_p) (sum_p g_p)'

with xbar the mean of x_p. The first fits positions that are examples of their own, such as tokens
of which each has a target; the second, positions that are averaged before the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn

from hessfunc.kronecker.blocks import Block, Blocks, Eigenbasis, Kronecker
from hessfunc.kronecker.calls import (
    full_name,
    hooked,
    linearising,
    refuse_compiled,
    refuse_dtensors,
    refusing_train_mode,
)
from hessfunc.kronecker.layer import Call, SharedWeight
from hessfunc.kronecker.propagate import BlockCurvature, Reached, backpropagated
from hessfunc.kronecker.rules import rule_of
from hessfunc.losses import Loss
from hessfunc.memory import AT_ONCE, refuse_unless_fits
from hessfunc.modules import training_flags
from hessfunc.options import validated
from hessfunc.randomness import of_matrix
from hessfunc.spaces.of import space_of
from hessfunc.spaces.space import Space
from hessfunc.transforms.batches.checksum import batch_key
from hessfunc.transforms.batches.reductions import noted
from hessfunc.transforms.gauss_newton import refuse_without_halves
from hessfunc.transforms.likelihoods import refuse_without_likelihood, sampled_gradients
from hessfunc.transforms.output_hessians import each_hessian

Sharing: TypeAlias = Literal["expand", "reduce"]
# (outputs, batch) -> columns (c, B, ...) whose outer products sum to the criterion's Hessian.
_Columns: TypeAlias = Callable[[Tensor, Any], Tensor]

_Key = TypeVar("_Key")
_ONLY_WEIGHTS = "Kronecker factors are for the weights and biases of linear maps"
_HOLD = "hold the others fixed by `split` and `hold`"


@validated
def kfra(loss: Loss, model: nn.Module, /, *, sharing: Sharing = "expand") -> BlockCurvature:
    """Kronecker-factored recursive approximation: ``(params, batch) -> blocks``.

        G = H_z (x) mean(x x')

    with H_z the Gauss-Newton matrix at a module's outputs as `hbp` propagates it: at each module
    the mean of J'HJ over the batch.

    Args:
        loss: with its two halves, as made by `supervised`.
        model: as for `hbp`.
        sharing: how positions that share a weight are taken together.

    Raises:
        ValueError, NotImplementedError, MemoryError: as `hbp`.

    Cost: as `hbp`.

    Source: Botev, Ritter and Barber 2017, arXiv 1706.03662.
    """
    _refuse_sharing(sharing)
    refuse_without_halves(loss)

    def block(reached: Reached) -> Block:
        weight = reached.dependence
        if not isinstance(weight, SharedWeight):
            raise NotImplementedError(f"{_ONLY_WEIGHTS}: {_HOLD}, or take `hbp`")
        hessian = weight.by_channel(reached.hessian)
        outputs, positions = weight.shape[0] // weight.groups, len(hessian) // weight.shape[0]
        view = hessian.view(2 * (weight.groups, outputs, positions))
        summed = "gopgap->goa" if sharing == "expand" else "gopgaq->goa"
        left = torch.einsum(summed, view)
        return Kronecker(left, _second_moments(weight.each(), sharing), weight.shape)

    return backpropagated(
        loss,
        model,
        block,
        residual="zero",
        average_input_jacobian=False,
        average_parameter_jacobian=False,
    )


@validated
def kflr(loss: Loss, model: nn.Module, /, *, sharing: Sharing = "expand") -> BlockCurvature:
    """Kronecker-factored low rank: ``(params, batch) -> blocks``, with exact output factors.

        G = sum_b (J_b' H_b J_b) (x) mean_b(x x')

    with J_b the Jacobian of the model's outputs with respect to a module's outputs, and H_b the
    Hessian of the loss with respect to the model's. Negative eigenvalues of H_b are left out.

    Args:
        loss: with its two halves, as made by `supervised` or `composed`.
        model: the module of which the loss is made; any architecture, as long as the parameters
            are those of modules whose outputs depend on them linearly. The calls of a module, and
            those of modules that share a weight, are taken together like positions.
        sharing: how positions that share a weight are taken together.

    Raises:
        TypeError: the loss does not show its halves.
        ValueError, NotImplementedError: (from the curvature function) a parameter is not one of
            such a module, or is used by another function too: hold it fixed by `split` and
            `hold`; the examples do not lie one after another along first axes, or see each other.

    Cost: one backward pass an output of an example, and two that check that examples are apart and
    that no use of a parameter is missed. Where an example has several rows of outputs, as with
    outputs flattened over positions, its outputs are those of all of its rows.

    Source: Botev, Ritter and Barber 2017, arXiv 1706.03662; sharing: Eschenhagen, Immer, Turner,
    Schneider and Hennig 2023, arXiv 2311.00636.
    """
    return _factored(loss, model, _exact(loss), sharing)


@validated
def kfac(
    loss: Loss,
    model: nn.Module,
    /,
    *,
    samples: int = 1,
    seed: int | None = None,
    sharing: Sharing = "expand",
) -> BlockCurvature:
    """Kronecker-factored approximate curvature: ``(params, batch) -> blocks``.

    As `kflr`, with the factor of the outputs estimated from targets that are drawn from the
    model's own prediction, so that its expectation is that of `kflr`.

    Args:
        loss: with its two halves, the criterion a negative log-likelihood as for `fvp`.
        model: as for `kflr`.
        samples: draws of each target.
        seed: of the draws, which depend on (seed, batch) alone. None draws a seed once, here.
        sharing: how positions that share a weight are taken together.

    Raises:
        ValueError: the criterion is not the negative logarithm of a known likelihood, or samples
            is not positive; and as `kflr`.

    Cost: one backward pass a sample, and one that checks that no use of a parameter is missed.

    Source: Martens and Grosse 2015, arXiv 1503.05671; convolutions: Grosse and Martens 2016,
    arXiv 1602.01407.
    """
    return _factored(loss, model, _sampled(loss, samples, seed), sharing, exact=False)


@validated
def ekfac(
    loss: Loss,
    model: nn.Module,
    /,
    *,
    samples: int | None = None,
    seed: int | None = None,
    sharing: Sharing = "expand",
) -> BlockCurvature:
    """Eigenvalue-corrected Kronecker factors: ``(params, batch) -> blocks``.

        G = (U_B (x) U_A) diag(s) (U_B (x) U_A)',  s = sum_b ((U_B (x) U_A)' g_b)^2

    with the eigenvectors of the factors of `kfac`, and g_b the gradients of the weight of which G
    is the second moment: of all matrices with these eigenvectors, the nearest to it. Where a factor
    is singular, as A is under "reduce" with fewer examples than inputs, the eigenvectors of zero,
    and so this matrix, are not unique.

    Args:
        loss: with its two halves.
        model: as for `kflr`.
        samples: draws of each target, as for `kfac`; None for the exact output factor of `kflr`.
        seed: as for `kfac`.
        sharing: how positions are taken together in the eigenvectors.

    Raises:
        ValueError: as `kfac`.

    Cost: two backward passes a sample, or an output of an example.

    Source: George, Laurent, Bouthillier, Ballas and Vincent 2018, arXiv 1806.03884.
    """
    columns = _exact(loss) if samples is None else _sampled(loss, samples, seed)
    return _factored(loss, model, columns, sharing, corrected=True, exact=samples is None)


def _refuse_sharing(sharing: str) -> None:
    if sharing not in get_args(Sharing):
        raise ValueError(f"sharing={sharing!r}: choose 'expand' or 'reduce'")


def _exact(loss: Loss) -> _Columns:
    refuse_without_halves(loss)

    def columns(outputs: Tensor, batch: Any) -> Tensor:
        values, vectors = torch.linalg.eigh(each_hessian(loss.criterion, outputs, batch))
        roots = (vectors * values.clamp_min(0).sqrt()[:, None, :]).permute(2, 0, 1)
        # A softmax leaves one direction of each example without curvature, up to rounding.
        largest = values.amax(0)
        rounding = len(largest) * torch.finfo(values.dtype).eps * float(largest[-1])
        kept = roots[largest > rounding] if rounding else roots[-1:]
        return kept.reshape(len(kept), *outputs.shape)

    return columns


def _sampled(loss: Loss, samples: int, seed: int | None) -> _Columns:
    refuse_without_halves(loss)
    refuse_without_likelihood(loss.criterion)
    if samples < 1:
        raise ValueError(f"samples={samples}: at least 1")
    drawn = of_matrix(seed)

    def columns(outputs: Tensor, batch: Any) -> Tensor:
        key = batch_key(drawn, batch, outputs.device)
        return sampled_gradients(loss.criterion, outputs, batch, samples=samples, key=key)

    return columns


@dataclass(frozen=True)
class _Use:
    """How the model uses a parameter: once for each call of a module that has it.

    The positions of all calls are taken together.

    Attributes:
        weights: How each output depends on the parameter.
        outputs: Output of each call.
        examples: Number of examples, B. An output may have more rows along its first axis, as many
            for each example, one example after another.
    """

    weights: tuple[SharedWeight, ...]
    outputs: tuple[Tensor, ...]
    examples: int

    def inputs(self) -> Tensor:
        """What the parameter meets at each position, ``(B, G, K, P)``, or one for all examples."""
        parts = []
        for weight, output in zip(self.weights, self.outputs, strict=True):
            inputs, rows = weight.each(), len(output) // self.examples
            # Inputs that all rows share have a first axis of 1.
            is_shared = len(inputs) < len(output)
            parts.append(
                inputs.repeat(1, 1, 1, rows) if is_shared else _grouped(inputs, self.examples)
            )
        count = max(map(len, parts))
        return torch.cat([part.expand(count, -1, -1, -1) for part in parts], -1)

    def slopes(self, gradients: Sequence[Tensor]) -> Tensor:
        """The gradients at the outputs, as ``(B, G, O, P)``."""
        pairs = zip(self.weights, gradients, strict=True)
        parts = [weight.slopes(slope.reshape(len(slope), -1)) for weight, slope in pairs]
        return torch.cat([_grouped(part, self.examples) for part in parts], -1)


def _grouped(rows: Tensor, examples: int) -> Tensor:
    """``(B R, G, N, P)`` -> ``(B, G, N, R P)``: the rows of one example are further positions."""
    if len(rows) == examples:
        return rows
    return rows.unflatten(0, (examples, -1)).movedim(1, 3).flatten(3)


def _factored(
    loss: Loss,
    model: nn.Module,
    columns: _Columns,
    sharing: Sharing,
    *,
    corrected: bool = False,
    exact: bool = True,
) -> BlockCurvature:
    _refuse_sharing(sharing)
    refuse_compiled(model)

    def curvature(params: Mapping[str, Tensor], batch: Any) -> Blocks:
        space = space_of(params)
        refuse_dtensors(space)
        with linearising(space, params, batch) as (leaves, given), noted(loss, params, batch):
            return factored(space, leaves, given)

    def factored(space: Space, leaves: Mapping[str, Tensor], batch: Any) -> Blocks:
        outputs, uses = _observed(model, loss, leaves, batch)
        # Draws of different rows are independent, and the expand factor keeps positions apart: no
        # row needs to be told from another.
        grouped = exact or corrected or sharing == "reduce"
        _refuse_unless_seen(outputs, leaves, uses, grouped=grouped)
        found = columns(outputs.detach(), batch)
        examples = next(iter(uses.values())).examples
        apart = _apart(found, examples) if exact else list(found)
        # A module's weight and bias have the same B.
        sites = {name: (*map(id, use.outputs), use.weights[0].groups) for name, use in uses.items()}
        lefts = _summed(
            outputs,
            apart,
            {sites[name]: use for name, use in uses.items()},
            lambda _, slopes: _outer(slopes, sharing),
        )
        inputs = {name: use.inputs() for name, use in uses.items()}
        rights = {name: _second_moments(each, sharing) for name, each in inputs.items()}
        if not corrected:
            return Blocks(
                {
                    name: Kronecker(lefts[sites[name]], rights[name], leaves[name].shape)
                    for name in space.names
                },
                space,
            )
        lefts = {site: torch.linalg.eigh(factor).eigenvectors for site, factor in lefts.items()}
        rights = {name: torch.linalg.eigh(factor).eigenvectors for name, factor in rights.items()}
        turned = {name: rights[name].mT @ inputs[name] for name in uses}
        values = _summed(
            outputs,
            apart,
            uses,
            lambda name, slopes: _squares(lefts[sites[name]].mT @ slopes, turned[name]),
        )
        return Blocks(
            {
                name: Eigenbasis(lefts[sites[name]], rights[name], values[name], leaves[name].shape)
                for name in space.names
            },
            space,
        )

    return curvature


def _apart(columns: Tensor, examples: int) -> list[Tensor]:
    """Columns that are zero but at one row of each example: squares of a sum have cross terms."""
    rows = columns.shape[1] // examples
    if rows == 1:
        return list(columns)
    found = []
    for column in columns:
        for row in range(rows):
            one = torch.zeros_like(column).unflatten(0, (examples, rows))
            one[:, row] = column.unflatten(0, (examples, rows))[:, row]
            found.append(one.flatten(0, 1))
    return found


def _refuse_unless_seen(
    outputs: Tensor, leaves: Mapping[str, Tensor], uses: Mapping[str, _Use], *, grouped: bool
) -> None:
    """Raise unless the uses of each parameter give its gradient, and examples are apart.

    Two gradients tell. Along one vector w at the outputs, the gradient of a parameter must be
    ``sum_bp g_bp x_bp'``. Along ``s_b w_b``, with another s_b for each example, the gradient at the
    outputs of a module must be ``s_b g_b``.
    """
    examples = next(iter(uses.values())).examples
    ends = {id(end): (name, end) for name, use in uses.items() for end in use.outputs}
    along = torch.arange(1.0, outputs.numel() + 1, device=outputs.device).cos()
    along = along.to(outputs).view_as(outputs)
    found = torch.autograd.grad(
        outputs,
        [*(end for _, end in ends.values()), *leaves.values()],
        along,
        retain_graph=True,
        materialize_grads=True,
    )
    slopes = dict(zip(ends, found, strict=False))
    for name, gradient in zip(leaves, found[len(ends) :], strict=True):
        use = uses[name]
        own = use.slopes([slopes[id(end)] for end in use.outputs]).to(gradient)
        inputs = use.inputs().to(gradient).expand(len(own), -1, -1, -1)
        if not _is_close(torch.einsum("bgop,bgkp->gok", own, inputs), gradient):
            raise ValueError(
                f"parameter {name!r} is used in other ways than by the modules that have it, such "
                f"as a shared weight in `F.linear(x, self.weight)`: {_HOLD}"
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
    for (name, _), slope, other in zip(ends.values(), found, again, strict=False):
        expected = _by_example(slope, examples) * scales.to(slope)[:, None]
        if not _is_close(_by_example(other, examples), expected):
            raise ValueError(
                f"the {len(slope)} rows of the module of {name!r} and the {len(outputs)} rows of "
                f"the outputs do not follow {examples} examples along their first axis, one after "
                "another, or examples see each other: keep the examples first, as in outputs "
                "`(examples, classes, positions)`, `model_fn(params, x).movedim(-1, 1)`"
            )


def _by_example(rows: Tensor, examples: int) -> Tensor:
    return rows.reshape(examples, -1)


def _is_close(ours: Tensor, right: Tensor) -> bool:
    size = right.abs().amax()
    difference = (ours.reshape_as(right) - right).abs().amax()
    return bool(difference <= torch.finfo(right.dtype).eps ** 0.5 * size)


def _summed(
    outputs: Tensor,
    columns: Sequence[Tensor],
    uses: Mapping[_Key, _Use],
    fn: Callable[[_Key, Tensor], Tensor],
) -> dict[_Key, Tensor]:
    """For each use, the sum over columns of a function of the gradients at its module's output."""
    ends = {id(end): end for use in uses.values() for end in use.outputs}
    total: dict[_Key, Tensor] = {}
    for column in columns:
        found = torch.autograd.grad(
            outputs, list(ends.values()), column, retain_graph=True, materialize_grads=True
        )
        slopes = dict(zip(ends, found, strict=True))
        for key, use in uses.items():
            part = fn(key, use.slopes([slopes[id(end)] for end in use.outputs]))
            total[key] = total[key] + part if key in total else part
    return total


def _outer(slopes: Tensor, sharing: Sharing) -> Tensor:
    """B of one column, from gradients ``(B, G, O, P)``."""
    return _gram(slopes if sharing == "expand" else slopes.sum(-1, keepdim=True))


def _second_moments(inputs: Tensor, sharing: Sharing) -> Tensor:
    """A, ``(G, K, K)``, from inputs ``(B, G, K, P)``."""
    if sharing == "reduce":
        inputs = inputs.mean(-1, keepdim=True)
    return _gram(inputs).div_(len(inputs) * inputs.shape[-1])


def _gram(vectors: Tensor) -> Tensor:
    """The sum over examples and positions of outer products: ``(B, G, N, P)`` -> ``(G, N, N)``."""
    groups, width = vectors.shape[1:3]
    refuse_unless_fits(
        groups * width**2,
        vectors,
        f"a Kronecker factor of {width} x {width} entries",
        "hold that layer fixed by `split` and `hold`, or take exact products",
    )
    columns = vectors.permute(1, 2, 0, 3).flatten(2)
    return columns @ columns.mT


def _squares(slopes: Tensor, inputs: Tensor) -> Tensor:
    """The squares of the entries of each example's gradient, summed: ``(G, O, K)``.

    Args:
        slopes: ``(B, G, O, P)``.
        inputs: ``(B, G, K, P)``, or one for all examples.
    """
    if slopes.shape[-1] == 1:
        left, right = slopes[..., 0].square(), inputs[..., 0].square()
        return torch.einsum("bgo,bgk->gok", left, right.expand(len(slopes), -1, -1))
    inputs = inputs.expand(len(slopes), -1, -1, -1)
    most = max(1, AT_ONCE // (slopes[0, ..., 0].numel() * inputs.shape[2]))
    parts = zip(slopes.split(most), inputs.split(most), strict=True)
    return torch.stack([(s @ x.mT).square().sum(0) for s, x in parts]).sum(0)


@dataclass(frozen=True)
class _Seen:
    """One call of a module in the course of the loss."""

    module: nn.Module
    training: bool
    state: Mapping[str, Tensor]
    inputs: Tensor
    output: Tensor


def _observed(
    model: nn.Module, loss: Loss, params: Mapping[str, Tensor], batch: Any
) -> tuple[Tensor, dict[str, _Use]]:
    """The model's outputs, and where each parameter is used."""
    named = _canonical_names(model, params)
    paths = {
        module: path
        for path, module in model.named_modules()
        if any(full_name(path, own) in named for own in _own_parameters(module))
    }
    seen: dict[str, list[_Seen]] = {}

    def observe(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if not isinstance(output, Tensor) or not given:
            raise _not_linear(paths[module], module)
        state = {name: value.detach() for name, value in module.named_parameters()}
        one = _Seen(module, module.training, state, given[0].detach(), output)
        # What comes after may change its input in place: the output is kept as it is.
        out = output.clone()
        seen.setdefault(paths[module], []).append(replace(one, output=out))
        return out.clone()

    with refusing_train_mode(model), hooked(dict.fromkeys(paths, observe)):
        outputs = loss.outputs(params, batch)
    if not isinstance(outputs, Tensor) or not outputs.dim():
        raise TypeError(
            "Kronecker factors take a model whose outputs are one tensor, with the examples along "
            f"its first axis, and these are {type(outputs).__name__}: make them one in `composed`"
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
                f"{name!r} of shape {tuple(leaf.shape)} is no parameter of a module that the loss "
                f"calls: {_HOLD}"
            )
        if len({(weight.groups, weight.shape) for weight, _ in calls[name]}) > 1:
            raise NotImplementedError(
                f"parameter {name!r} is shared by layers of different kinds: {_HOLD}"
            )
    examples = _count(outputs, [output for found in calls.values() for _, output in found])
    uses = {}
    for name in params:
        weights, ends = zip(*calls[name], strict=True)
        uses[name] = _Use(weights, ends, examples)
    return outputs, uses


def _canonical_names(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, str]:
    """The name in params of each name that a parameter has in the model."""
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
    """The number of examples: the least first axis, of which all others are multiples."""
    lengths = [len(outputs), *(len(end) if end.dim() else 1 for end in ends)]
    examples = min(lengths)
    if any(length % examples for length in lengths):
        raise ValueError(
            f"the first axes of outputs and modules have lengths {sorted(set(lengths))}, which are "
            "no multiples of a number of examples: keep the examples along the first axis"
        )
    return examples


def _own_parameters(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


def _not_linear(path: str, module: nn.Module) -> NotImplementedError:
    return NotImplementedError(
        f"{_ONLY_WEIGHTS}, and {path!r} is a {type(module).__name__}: {_HOLD}, or take `hbp`"
    )


def _weights_of(path: str, seen: _Seen) -> dict[str, SharedWeight]:
    """How a call of a module depends on each of its parameters.

    Raises:
        NotImplementedError: One of them is not the weight or bias of a linear map.
    """
    found = rule_of(type(seen.module))
    call = Call(
        partial(torch.func.functional_call, seen.module),
        seen.state,
        (seen.inputs,),
        (),
        seen.module,
        seen.output.shape[1:],
    )
    with training_flags([(seen.module, seen.training)]):
        dependences = {} if found is None else found(call).parameters
    weights = {name: d for name, d in dependences.items() if isinstance(d, SharedWeight)}
    if len(weights) < len(_own_parameters(seen.module)):
        raise _not_linear(path, seen.module)
    return weights
