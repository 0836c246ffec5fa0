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

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from hessfunc.kronecker.calls import refuse_compiled
from hessfunc.kronecker.evaluation import Bias, Unsupported
from hessfunc.kronecker.factored import Columns, FactoredCurvature
from hessfunc.kronecker.moments import Sharing, refuse_sharing
from hessfunc.losses import Loss
from hessfunc.options import at_least, validated
from hessfunc.randomness import of_matrix
from hessfunc.transforms.batches.checksum import batch_key
from hessfunc.transforms.example_weights import example_weights, reduction_over_examples
from hessfunc.transforms.likelihoods import refuse_without_likelihood, sampled_gradients
from hessfunc.transforms.output_gradients import output_gradient
from hessfunc.transforms.output_hessians import each_hessian
from hessfunc.transforms.output_matrices import refuse_without_halves


@validated
def kflr(
    loss: Loss,
    model: nn.Module,
    /,
    *,
    sharing: Sharing = "expand",
    unsupported: Unsupported = "error",
    bias: Bias = "apart",
) -> FactoredCurvature:
    """Kronecker-factored low rank: ``(params, batch) -> blocks``, with exact output factors.

        G = sum_b (J_b' H_b J_b) (x) mean_b(x x')

    Here J_b is the Jacobian of the model's outputs with respect to a module's outputs, and H_b is
    the Hessian of the loss with respect to the model's outputs. Negative eigenvalues of H_b are
    set to zero.

    Args:
        loss: Loss that exposes its outputs and its criterion, as made by `supervised` or
            `composed`.
        model: Module from which the loss was made, of any architecture.
        sharing: Treatment of positions that share a weight, ``"expand"`` or ``"reduce"``. Lookups
            are always expanded.
        unsupported: Treatment of parameters that enter the model in another way than the kinds
            below. ``"diagonal"`` computes their exact Gauss-Newton diagonal, and
            ``blocks.diagonals`` names them. ``"error"`` refuses them.
        bias: ``"apart"`` gives each bias a block of its own. ``"joint"`` gives a weight without
            groups and its bias one block, with a last input of 1. ``blocks.biases`` names them.

    Returns:
        A curvature function that returns `Blocks`.

    Raises:
        TypeError: If the loss does not expose its outputs and its criterion.
        ValueError: If examples do not follow one another along the first axes, or if the model
            mixes examples. Raised by the curvature function.
        NotImplementedError: If a parameter is unsupported: hold it fixed with `split` and `hold`,
            or pass ``unsupported="diagonal"``. Raised by the curvature function.

    Cost: one backward pass for each output of an example, and in the first batch two that check
    that the examples are independent and that no use of a parameter is missed. If an example has
    several rows of outputs (outputs flattened over positions), the outputs of all its rows count.
    An unsupported parameter adds one backward pass for each output of each example.

    The calls of torch that use a parameter determine its block, in modules of any class:

    - Dense maps, convolutions and their transposes have the factors above. Their inputs are
      unfolded, and each group has factors of its own. Calls that share a weight are treated like
      positions.
    - Embeddings have a diagonal factor A, the frequencies of the indices.
    - Normalisations, and other products and sums of entries, have their exact Gauss-Newton block,
      or its diagonal if they have more than 1,024 entries.
    - A matrix that also enters transposed, such as a tied embedding and head, has the factors that
      are nearest to the sum of both products. The eigenvalues of `ekfac` contain the cross terms.
    - Recurrent layers are unrolled, and their steps are treated like positions. Packed sequences
      are unsupported.
    - A weight with other uses of different kinds is unsupported.

    Source: Botev, Ritter and Barber 2017, arXiv 1706.03662; sharing: Eschenhagen, Immer, Turner,
    Schneider and Hennig 2023, arXiv 2311.00636.
    """
    return _curvature(loss, model, _exact(loss), sharing, unsupported, bias)


@validated
def kfac(
    loss: Loss,
    model: nn.Module,
    /,
    *,
    samples: int = 1,
    seed: int | None = None,
    sharing: Sharing = "expand",
    fisher: Literal["model", "empirical", "forward-only"] = "model",
    unsupported: Unsupported = "error",
    bias: Bias = "apart",
) -> FactoredCurvature:
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
        fisher: ``"model"`` draws targets from the model's prediction. ``"empirical"`` uses the
            targets of the batch, as `efvp` does. ``"forward-only"`` replaces the factor B by the
            identity matrix, and needs no backward pass for it.
        unsupported: Treatment of parameters without factors, as for `kflr`. A diagonal is that of
            the same sampled or empirical Fisher matrix.
        bias: ``"apart"`` or ``"joint"``, as for `kflr`.

    Returns:
        A curvature function that returns `Blocks`.

    Raises:
        ValueError: If the criterion is not the negative logarithm of a known likelihood, if
            ``samples`` is not positive, or if `kflr` raises it.

    Cost: one backward pass for each sample, and in the first batch two that check the uses of
    parameters.

    Source: Martens and Grosse 2015, arXiv 1503.05671; convolutions: Grosse and Martens 2016,
    arXiv 1602.01407; forward-only factors: Benzing 2022, arXiv 2201.12250.
    """
    _refuse_fisher(fisher, "model", "empirical", "forward-only")
    if fisher == "forward-only":
        refuse_without_halves(loss)
        return _curvature(loss, model, None, sharing, unsupported, bias)
    if fisher == "empirical":
        return _curvature(loss, model, _empirical(loss), sharing, unsupported, bias)
    columns = _sampled(loss, samples, seed)
    return _curvature(loss, model, columns, sharing, unsupported, bias, exact=False)


@validated
def ekfac(
    loss: Loss,
    model: nn.Module,
    /,
    *,
    samples: int | None = None,
    seed: int | None = None,
    sharing: Sharing = "expand",
    fisher: Literal["model", "empirical"] = "model",
    unsupported: Unsupported = "error",
    bias: Bias = "apart",
) -> FactoredCurvature:
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
        fisher: ``"model"`` or ``"empirical"``, as for `kfac`.
        unsupported: Treatment of parameters without factors, as for `kflr`. A diagonal is that of
            the same sampled or empirical Fisher matrix.
        bias: ``"apart"`` or ``"joint"``, as for `kflr`.

    Returns:
        A curvature function that returns `Blocks`.

    Raises:
        ValueError: If `kfac` raises it.

    Cost: two backward passes for each sample, or for each output of an example.

    Source: George, Laurent, Bouthillier, Ballas and Vincent 2018, arXiv 1806.03884.
    """
    _refuse_fisher(fisher, "model", "empirical")
    if fisher == "empirical":
        columns = _empirical(loss)
    else:
        columns = _exact(loss) if samples is None else _sampled(loss, samples, seed)
    exact = samples is None or fisher == "empirical"
    return _curvature(loss, model, columns, sharing, unsupported, bias, corrected=True, exact=exact)


@validated
def kfoc(
    loss: Loss,
    model: nn.Module,
    /,
    *,
    steps: int = 5,
    samples: int | None = None,
    seed: int | None = None,
    unsupported: Unsupported = "error",
    bias: Bias = "apart",
) -> FactoredCurvature:
    """Kronecker-factored optimal curvature: ``(params, batch) -> blocks`` with the nearest factors.

        B, A = argmin |F - B (x) A|_F,    F = sum_b vec(V_b) vec(V_b)'

    Here V_b are the gradients of a weight for the columns of the output Hessian of each example.
    The solution is the leading pair of singular vectors of the rearranged matrix, whose rows are
    the blocks of F (Van Loan and Pitsianis 1993). Power iteration alternates

        B = sum_b V_b A V_b' / |A|_F^2,    A = sum_b V_b' B V_b / |B|_F^2

    and starts from the factors of `kfac`. No step increases the distance, so that the result is
    never farther from F than that of `kfac` or `kflr`. Lookups have the nearest diagonal A.

    Args:
        loss: Loss that exposes its outputs and its criterion.
        model: Module from which the loss was made, as for `kflr`.
        steps: Number of power iterations.
        samples: Number of draws of each target, as for `kfac`. None computes the exact columns of
            `kflr`.
        seed: Seed of the draws, as for `kfac`.
        unsupported: Treatment of parameters without factors, as for `kflr`. A diagonal is that of
            the same sampled or empirical Fisher matrix.
        bias: ``"apart"`` or ``"joint"``, as for `kflr`.

    Returns:
        A curvature function that returns `Blocks`.

    Raises:
        ValueError: If ``steps`` is not positive, or if `kfac` raises it.

    Cost: 2 steps + 1 backward passes for each sample, or for each output of an example. Over a data
    set, 2 steps + 1 passes over the data.

    Source: Schnaus, Lee and Triebel 2021, Kronecker-factored optimal curvature; Koroko,
    Anciaux-Sedrakian, Gharbia, Gares, Haddou and Tran 2022, arXiv 2201.10285.
    """
    at_least(1, steps=steps)
    columns = _exact(loss) if samples is None else _sampled(loss, samples, seed)
    exact = samples is None
    return _curvature(loss, model, columns, "expand", unsupported, bias, steps=steps, exact=exact)


def _curvature(
    loss: Loss,
    model: nn.Module,
    columns: Columns | None,
    sharing: Sharing,
    unsupported: Unsupported,
    bias: Bias,
    *,
    corrected: bool = False,
    steps: int = 0,
    exact: bool = True,
) -> FactoredCurvature:
    refuse_sharing(sharing)
    if unsupported not in get_args(Unsupported):
        raise ValueError(f"unsupported={unsupported!r}: choose 'error' or 'diagonal'")
    if bias not in get_args(Bias):
        raise ValueError(f"bias={bias!r}: choose 'apart' or 'joint'")
    refuse_compiled(model)
    return FactoredCurvature(
        loss, model, columns, sharing, corrected, steps, exact, unsupported, bias
    )


def _refuse_fisher(fisher: str, *known: str) -> None:
    if fisher not in known:
        raise ValueError(f"fisher={fisher!r}: choose {', '.join(map(repr, known))}")


def _exact(loss: Loss) -> Columns:
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


def _sampled(loss: Loss, samples: int, seed: int | None) -> Columns:
    refuse_without_halves(loss)
    refuse_without_likelihood(loss.criterion)
    if samples < 1:
        raise ValueError(f"samples={samples}: the number of samples must be at least 1")
    drawn = of_matrix(seed)

    def columns(outputs: Tensor, batch: Any) -> Tensor:
        key = batch_key(drawn, batch, outputs.device)
        return sampled_gradients(loss.criterion, outputs, batch, samples=samples, key=key)

    return columns


def _empirical(loss: Loss) -> Columns:
    refuse_without_halves(loss)

    def columns(outputs: Tensor, batch: Any) -> Tensor:
        # E = sum_b c_b r_b r_b' with the gradients r_b at the outputs, and weights c_b.
        criterion, inner = loss.criterion, outputs.detach().requires_grad_()
        reduction = reduction_over_examples(criterion, inner, batch) or "sum"
        _, _, (slopes,) = output_gradient(criterion, inner, batch, create_graph=False)
        weights = example_weights(criterion, inner, batch, len(inner), reduction)
        roots = torch.as_tensor(weights, device=slopes.device).to(slopes).sqrt()
        return (slopes * roots.view(-1, *[1] * (slopes.dim() - 1)))[None]

    return columns
