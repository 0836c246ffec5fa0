"""Kronecker-factored curvature: each diagonal block is ``B (x) A``.

The factor B belongs to the outputs of a layer, the factor A to its inputs. A weight acts on P
positions of an example, with inputs x_p and gradients g_p at its outputs:

    "expand":  A = mean_bp x_p x_p'         B = sum_b sum_p g_p g_p'
    "reduce":  A = mean_b xbar xbar'        B = sum_b (sum_p g_p) (sum_p g_p)'

Here xbar is the mean of x_p over positions. "expand" fits positions that act as examples, such as
tokens with a target each. "reduce" fits positions that are averaged before the loss (Eschenhagen,
Immer, Turner, Schneider and Hennig 2023, arXiv 2311.00636).
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
# Function (outputs, batch) -> columns (c, B, ...) with sum_c u_bc u_bc' = H_b, the Hessian of the
# criterion at the outputs of example b, exactly or in expectation.
_Columns: TypeAlias = Callable[[Tensor, Any], Tensor]

_Key = TypeVar("_Key")
_ONLY_WEIGHTS = "Kronecker factors need weights and biases of linear maps"
_HOLD = "hold such parameters fixed with `split` and `hold`"


@validated
def kfra(loss: Loss, model: nn.Module, /, *, sharing: Sharing = "expand") -> BlockCurvature:
    """Kronecker-factored recursive approximation: ``(params, batch) -> blocks``.

        G = H_z (x) mean(x x'),    H_x = mean_b J_b' H_z J_b

    Here H_z is the Gauss-Newton matrix at the outputs of a module. It is propagated backwards as
    in `hbp`, by the mean of J'HJ over the batch at each module.

    Args:
        loss: Loss that exposes its outputs and its criterion, as made by `supervised`.
        model: Module from which the loss was made, as for `hbp`.
        sharing: Treatment of positions that share a weight, ``"expand"`` or ``"reduce"``.

    Returns:
        A curvature function that returns `Blocks`.

    Raises:
        ValueError: If `hbp` raises it.
        NotImplementedError: If `hbp` raises it, or if a parameter is not the weight or bias of a
            linear map.
        MemoryError: If `hbp` raises it.

    Cost: the cost of `hbp`.

    Source: Botev, Ritter and Barber 2017, arXiv 1706.03662.
    """
    _refuse_sharing(sharing)
    refuse_without_halves(loss)

    def block(reached: Reached) -> Block:
        weight = reached.dependence
        if not isinstance(weight, SharedWeight):
            raise NotImplementedError(f"{_ONLY_WEIGHTS}: {_HOLD}, or use `hbp`")
        hessian = weight.by_channel(reached.hessian)
        outputs, positions = weight.shape[0] // weight.groups, len(hessian) // weight.shape[0]
        view = hessian.view(2 * (weight.groups, outputs, positions))
        # With H_z = sum g g' over outputs (o, p), B[o, a] is sum_p H_z[o, p, a, p] for "expand"
        # and sum_pq H_z[o, p, a, q] for "reduce".
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

    Here J_b is the Jacobian of the model's outputs with respect to a module's outputs, and H_b is
    the Hessian of the loss with respect to the model's outputs. Negative eigenvalues of H_b are
    set to zero.

    Args:
        loss: Loss that exposes its outputs and its criterion, as made by `supervised` or
            `composed`.
        model: Module from which the loss was made, of any architecture. Each parameter must belong
            to a module whose outputs depend on it linearly. Several calls of a module, and calls
            of modules that share a weight, are treated like positions.
        sharing: Treatment of positions that share a weight, ``"expand"`` or ``"reduce"``.

    Returns:
        A curvature function that returns `Blocks`.

    Raises:
        TypeError: If the loss does not expose its outputs and its criterion.
        ValueError: If a parameter is also used outside its modules, if examples do not follow one
            another along the first axes, or if the model mixes examples. Raised by the curvature
            function.
        NotImplementedError: If a parameter does not belong to a linear module. Hold it fixed with
            `split` and `hold`. Raised by the curvature function.

    Cost: one backward pass for each output of an example, and two that check that the examples are
    independent and that no use of a parameter is missed. If an example has several rows of
    outputs (outputs flattened over positions), the outputs of all its rows count.

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

        G = sum_b (g_b g_b') (x) mean_b(x x'),    E[sum_b g_b g_b'] = sum_b J_b' H_b J_b

    Here g_b are gradients at a module's outputs for targets drawn from the model's own prediction.
    The expectation of the output factor is therefore that of `kflr`.

    Args:
        loss: Loss that exposes its outputs and its criterion. The criterion is a negative
            log-likelihood, as for `fvp`.
        model: Module from which the loss was made, as for `kflr`.
        samples: Number of draws of each target.
        seed: Seed of the draws, which depend on (seed, batch) only. None draws a seed once, when
            `kfac` is called.
        sharing: Treatment of positions that share a weight, ``"expand"`` or ``"reduce"``.

    Returns:
        A curvature function that returns `Blocks`.

    Raises:
        ValueError: If the criterion is not the negative logarithm of a known likelihood, if
            ``samples`` is not positive, or if `kflr` raises it.

    Cost: one backward pass for each sample, and one that checks that no use of a parameter is
    missed.

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

    Here U_B and U_A are the eigenvectors of the factors of `kfac`, and g_b are the gradients of the
    weight. Among all matrices with these eigenvectors, G is the nearest to the second moment
    ``sum_b g_b g_b'`` in the Frobenius norm. If a factor is singular, its eigenvectors for the
    eigenvalue zero are not unique, and neither is G. This happens to A under "reduce" with fewer
    examples than inputs.

    Args:
        loss: Loss that exposes its outputs and its criterion.
        model: Module from which the loss was made, as for `kflr`.
        samples: Number of draws of each target, as for `kfac`. None computes the exact output
            factor of `kflr`.
        seed: Seed of the draws, as for `kfac`.
        sharing: Treatment of positions in the eigenvectors, ``"expand"`` or ``"reduce"``.

    Returns:
        A curvature function that returns `Blocks`.

    Raises:
        ValueError: If `kfac` raises it.

    Cost: two backward passes for each sample, or for each output of an example.

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
        # H_b = sum_c s_bc v_bc v_bc' = sum_c u_bc u_bc' with columns u_bc = sqrt(s_bc) v_bc.
        values, vectors = torch.linalg.eigh(each_hessian(loss.criterion, outputs, batch))
        roots = (vectors * values.clamp_min(0).sqrt()[:, None, :]).permute(2, 0, 1)
        # Drop columns that are zero up to rounding: a softmax has H_b 1 = 0 for each example.
        largest = values.amax(0)
        rounding = len(largest) * torch.finfo(values.dtype).eps * float(largest[-1])
        kept = roots[largest > rounding] if rounding else roots[-1:]
        return kept.reshape(len(kept), *outputs.shape)

    return columns


def _sampled(loss: Loss, samples: int, seed: int | None) -> _Columns:
    refuse_without_halves(loss)
    refuse_without_likelihood(loss.criterion)
    if samples < 1:
        raise ValueError(f"samples={samples}: the number of samples must be at least 1")
    drawn = of_matrix(seed)

    def columns(outputs: Tensor, batch: Any) -> Tensor:
        key = batch_key(drawn, batch, outputs.device)
        return sampled_gradients(loss.criterion, outputs, batch, samples=samples, key=key)

    return columns


@dataclass(frozen=True)
class _Use:
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
                inputs.repeat(1, 1, 1, rows) if is_shared else _grouped(inputs, self.examples)
            )
        count = max(map(len, parts))
        return torch.cat([part.expand(count, -1, -1, -1) for part in parts], -1)

    def slopes(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the gradients at the outputs, as ``(B, G, O, P)``."""
        pairs = zip(self.weights, gradients, strict=True)
        parts = [weight.slopes(slope.reshape(len(slope), -1)) for weight, slope in pairs]
        return torch.cat([_grouped(part, self.examples) for part in parts], -1)


def _grouped(rows: Tensor, examples: int) -> Tensor:
    """Move the R rows of each example to positions: ``(B R, G, N, P)`` -> ``(B, G, N, R P)``."""
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
        # Without grouping, rows need no check: draws of different rows are independent, and the
        # "expand" factor has no cross terms between positions.
        grouped = exact or corrected or sharing == "reduce"
        _refuse_unless_seen(outputs, leaves, uses, grouped=grouped)
        vectors = columns(outputs.detach(), batch)
        examples = next(iter(uses.values())).examples
        apart = _apart(vectors, examples) if exact else list(vectors)
        # The weight and the bias of a module share the factor B: it is computed once for a site.
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
        # With eigenvectors U_B and U_A, (U_B (x) U_A)' vec(g x') = vec((U_B' g) (U_A' x)'), so that
        # s[o, k] = sum_b (sum_p (U_B' g_bp)_o (U_A' x_bp)_k)^2 (George et al. 2018).
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
    """Split each column into one per row of an example, zero at the other rows.

    Without this, the square of a sum over rows would have cross terms between them.
    """
    rows = columns.shape[1] // examples
    if rows == 1:
        return list(columns)
    parts = []
    for column in columns:
        for row in range(rows):
            one = torch.zeros_like(column).unflatten(0, (examples, rows))
            one[:, row] = column.unflatten(0, (examples, rows))[:, row]
            parts.append(one.flatten(0, 1))
    return parts


def _refuse_unless_seen(
    outputs: Tensor, leaves: Mapping[str, Tensor], uses: Mapping[str, _Use], *, grouped: bool
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
                f"`F.linear(x, self.weight)`: {_HOLD}"
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


def _summed(
    outputs: Tensor,
    columns: Sequence[Tensor],
    uses: Mapping[_Key, _Use],
    fn: Callable[[_Key, Tensor], Tensor],
) -> dict[_Key, Tensor]:
    """Sum a function of the gradients at the outputs of each use over the columns."""
    ends = {id(end): end for use in uses.values() for end in use.outputs}
    total: dict[_Key, Tensor] = {}
    for column in columns:
        gradients = torch.autograd.grad(
            outputs, list(ends.values()), column, retain_graph=True, materialize_grads=True
        )
        slopes = dict(zip(ends, gradients, strict=True))
        for key, use in uses.items():
            part = fn(key, use.slopes([slopes[id(end)] for end in use.outputs]))
            total[key] = total[key] + part if key in total else part
    return total


def _outer(slopes: Tensor, sharing: Sharing) -> Tensor:
    """Return the factor B of one column, ``(G, O, O)``, from gradients ``(B, G, O, P)``."""
    # "expand": sum_bp g_bp g_bp'. "reduce": sum_b (sum_p g_bp) (sum_p g_bp)'.
    return _gram(slopes if sharing == "expand" else slopes.sum(-1, keepdim=True))


def _second_moments(inputs: Tensor, sharing: Sharing) -> Tensor:
    """Return the factor A, ``(G, K, K)``, from inputs ``(B, G, K, P)``."""
    # "expand": mean_bp x_bp x_bp'. "reduce": mean_b xbar_b xbar_b'.
    if sharing == "reduce":
        inputs = inputs.mean(-1, keepdim=True)
    return _gram(inputs).div_(len(inputs) * inputs.shape[-1])


def _gram(vectors: Tensor) -> Tensor:
    """Sum outer products over examples and positions: ``(B, G, N, P)`` -> ``(G, N, N)``."""
    groups, width = vectors.shape[1:3]
    refuse_unless_fits(
        groups * width**2,
        vectors,
        f"a Kronecker factor of {width} x {width} entries",
        "hold that layer fixed with `split` and `hold`, or use exact products",
    )
    columns = vectors.permute(1, 2, 0, 3).flatten(2)
    return columns @ columns.mT


def _squares(slopes: Tensor, inputs: Tensor) -> Tensor:
    """Sum the squared entries of the gradients of all examples: ``(G, O, K)``.

    Args:
        slopes: Gradients at the outputs, ``(B, G, O, P)``.
        inputs: Inputs, ``(B, G, K, P)``, or ``(1, G, K, P)`` if all examples share them.
    """
    # The gradient of an example is sum_p g_p x_p'. With one position, (g_o x_k)^2 = g_o^2 x_k^2.
    if slopes.shape[-1] == 1:
        left, right = slopes[..., 0].square(), inputs[..., 0].square()
        return torch.einsum("bgo,bgk->gok", left, right.expand(len(slopes), -1, -1))
    inputs = inputs.expand(len(slopes), -1, -1, -1)
    most = max(1, AT_ONCE // (slopes[0, ..., 0].numel() * inputs.shape[2]))
    parts = zip(slopes.split(most), inputs.split(most), strict=True)
    return torch.stack([(s @ x.mT).square().sum(0) for s, x in parts]).sum(0)


@dataclass(frozen=True)
class _Seen:
    """Record of one call of a module while the loss is evaluated."""

    module: nn.Module
    training: bool
    state: Mapping[str, Tensor]
    inputs: Tensor
    output: Tensor


def _observed(
    model: nn.Module, loss: Loss, params: Mapping[str, Tensor], batch: Any
) -> tuple[Tensor, dict[str, _Use]]:
    """Evaluate the model, and return its outputs with all uses of each parameter."""
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
        # A later module may change its input in place: keep a copy of the output.
        out = output.clone()
        seen.setdefault(paths[module], []).append(replace(one, output=out))
        return out.clone()

    with refusing_train_mode(model), hooked(dict.fromkeys(paths, observe)):
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
                f"loss calls: {_HOLD}"
            )
        if len({(weight.groups, weight.shape) for weight, _ in calls[name]}) > 1:
            raise NotImplementedError(
                f"parameter {name!r} is shared by layers of different kinds: {_HOLD}"
            )
    examples = _count(outputs, [output for uses in calls.values() for _, output in uses])
    uses = {}
    for name in params:
        weights, ends = zip(*calls[name], strict=True)
        uses[name] = _Use(weights, ends, examples)
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
        f"{_ONLY_WEIGHTS}, but {path!r} is a {type(module).__name__}: {_HOLD}, or use `hbp`"
    )


def _weights_of(path: str, seen: _Seen) -> dict[str, SharedWeight]:
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
