"""Scores of training examples for queries, against dense formulas and training again."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hessfunc as hf
from tests.recipes.influence.problem import (
    DAMPING,
    LOSS,
    MODEL,
    MODEL_FN,
    PARAMS,
    QUERIES,
    TRAIN,
    XQ,
    YQ,
    X,
    Y,
    gauss_newton,
    gradients,
    hessian,
    scores,
)

OPTIONS: dict[str, Any] = {"damping": DAMPING, "rtol": 1e-11}


def of(**more: Any) -> Any:
    return hf.influence(LOSS, PARAMS, TRAIN, QUERIES, **{**OPTIONS, **more})


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("matrix", ["ggn", "hessian"])
def test_scores_are_the_dense_formula(matrix: str) -> None:
    curvature, dense = {"ggn": (None, gauss_newton()), "hessian": (hf.hvp(LOSS), hessian())}[matrix]
    found = of(curvature=curvature, by_leaf=True)
    close(found.scores, scores(dense, gradients(XQ, YQ), gradients(X, Y)))
    close(sum(found.by_leaf.values()), found.scores)
    close(found.train_norms, gradients(X, Y).norm(dim=1))
    close(found.query_norms, gradients(XQ, YQ).norm(dim=1))
    assert found.converged
    assert float(found.relative_residuals.max()) <= 1e-11
    assert found.reason.startswith("converged")


def test_parts_of_leaves_are_those_of_the_solution() -> None:
    found = of(by_leaf=True)
    damped = gauss_newton() + DAMPING * torch.eye(43, dtype=torch.float64)
    solved = torch.linalg.solve(damped, gradients(XQ, YQ).mT).mT
    sizes = [leaf.numel() for leaf in PARAMS.values()]
    pairs = zip(solved.split(sizes, 1), gradients(X, Y).split(sizes, 1), strict=True)
    for name, (one, two) in zip(PARAMS, pairs, strict=True):
        close(found.by_leaf[name], one @ two.mT)


def test_structured_blocks_are_inverted_without_iterations() -> None:
    factors = hf.over_batches(hf.kronecker.ekfac(LOSS, MODEL))(PARAMS, TRAIN)
    expected = scores(hf.matrix(factors, PARAMS), gradients(XQ, YQ), gradients(X, Y))
    for curvature in (hf.kronecker.ekfac(LOSS, MODEL), factors):
        found = of(curvature=curvature)
        close(found.scores, expected)
        assert found.reason.startswith("exact")
        assert found.converged


def test_a_preconditioner_saves_products_and_changes_no_score() -> None:
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(2)).double()
    x, y = x * torch.logspace(-1, 1, 6).double(), torch.arange(100) % 2
    model = nn.Linear(6, 2).double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, nn.functional.cross_entropy)
    factors = hf.over_batches(hf.kronecker.ekfac(loss, model))(params, [(x, y)])
    plain, preconditioned = (
        hf.influence(
            loss, params, [(x, y)], [(x[:3], y[:3])], preconditioner=given, damping=1e-3, rtol=1e-9
        )
        for given in (None, factors.inverse(1e-3))
    )
    torch.testing.assert_close(preconditioned.scores, plain.scores, rtol=1e-6, atol=1e-6)
    assert preconditioned.matvecs < plain.matvecs


def test_scores_do_not_depend_on_batches_and_chunks() -> None:
    expected = of().scores
    whole = hf.influence(LOSS, PARAMS, [(X, Y)], [(XQ, YQ)], **OPTIONS)
    close(whole.scores, expected)
    for size in (1, 2):
        close(of(examples_per_chunk=size).scores, expected)


def test_an_aggregated_query_is_the_mean_of_all() -> None:
    found = of(aggregate=True)
    assert found.scores.shape == (1, len(X))
    close(found.scores[0], of().scores.mean(0))


def test_queries_may_have_another_loss() -> None:
    def margin(params: Any, batch: Any) -> Tensor:
        outputs = MODEL_FN(params, batch[0])
        return (outputs[:, 0] - outputs[:, 1]).mean()

    found = of(query_loss=margin)
    left = torch.stack(
        [hf.ravel(torch.func.grad(margin)(PARAMS, (x, YQ[:1]))) for x in XQ.split(1)]
    )
    close(found.scores, scores(gauss_newton(), left, gradients(X, Y)))


def test_projections_are_within_their_bounds_and_exact_at_full_rank() -> None:
    exact = of().scores
    close(of(rank=5).scores, exact)
    errors = []
    for rank in (1, 2, 3):
        found = of(rank=rank)
        _, _, right = torch.linalg.svd(gradients(XQ, YQ), full_matrices=False)
        projected = gradients(XQ, YQ) @ right[:rank].mT @ right[:rank]
        close(found.scores, scores(gauss_newton(), projected, gradients(X, Y)))
        outside = (gradients(XQ, YQ) - projected).norm(dim=1)
        torch.testing.assert_close(found.residuals, outside, rtol=1e-6, atol=1e-9)
        assert bool(((found.scores - exact).abs() <= found.error_bounds).all())
        errors.append(float((found.scores - exact).norm()))
    assert errors[0] > errors[1] > errors[2] > 0


def test_a_small_budget_gives_residuals_that_bound_the_error() -> None:
    found = of(damping=1e-3, max_matvecs=3)
    exact = scores(gauss_newton(), gradients(XQ, YQ), gradients(X, Y), 1e-3)
    assert not found.converged
    assert "not solved: budget exhausted" in found.reason
    errors = (found.scores - exact).abs()
    assert float(errors.max()) > 1e-8
    assert bool((errors <= found.error_bounds).all())


def test_influence_in_ridge_regression_is_its_closed_form_and_predicts_training_again() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 4, generator=generator).double()
    y = x.sum(1) + 0.3 * torch.randn(200, generator=generator).double()
    xq, yq = x[:3] + 1.0, y[:3]
    penalty = 0.1

    def ridge(x: Tensor, y: Tensor) -> Tensor:
        """The minimum of sum_j (w'x_j - y_j)^2 / 200 + penalty |w|^2 / 2."""
        gram = 2 * x.mT @ x / 200 + penalty * torch.eye(4, dtype=torch.float64)
        return torch.linalg.solve(gram, 2 * x.mT @ y / 200)

    w = ridge(x, y)
    loss = hf.composed(
        lambda p, batch: batch[0] @ p, nn.functional.mse_loss, targets=lambda batch: batch[1]
    )
    found = hf.influence(
        loss, w, [(x, y)], [(xq, yq)], damping=penalty, curvature=hf.hvp(loss), rtol=1e-12
    )
    # g = 2 (w'x - y) x, and A + damping I = 2 X'X / n + penalty I.
    left, right = (2 * (a @ w - b)[:, None] * a for a, b in ((xq, yq), (x, y)))
    close(found.scores, scores(2 * x.mT @ x / 200, left, right, penalty))

    changes = torch.zeros(3, 200, dtype=torch.float64)
    before = (xq @ w - yq).square()
    for j in range(200):
        rest = torch.arange(200) != j
        changes[:, j] = (xq @ ridge(x[rest], y[rest]) - yq).square() - before
    # Leaving out an example is the weight -1/n, which raises the loss by S / n to first order.
    predicted = found.scores / 200
    error = (predicted - changes).norm() / changes.norm()
    assert float(error) < 0.1
    assert float(torch.corrcoef(torch.stack([predicted.flatten(), changes.flatten()]))[0, 1]) > 0.99


def test_a_sum_over_examples_has_the_matrix_of_the_sum() -> None:
    summed = hf.supervised(MODEL_FN, nn.CrossEntropyLoss(reduction="sum"))
    found = hf.influence(summed, PARAMS, TRAIN, QUERIES, **OPTIONS)
    close(found.scores, scores(12 * gauss_newton(), gradients(XQ, YQ), gradients(X, Y)))


def test_parameters_in_16_bits_have_scores_within_their_rounding() -> None:
    model = nn.Linear(4, 3).bfloat16()
    batches = [[(x.bfloat16(), y)] for x, y in ((X, Y), (XQ, YQ))]
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, nn.functional.cross_entropy)
    found = hf.influence(loss, params, *batches, damping=DAMPING, rtol=1e-2)
    wide_fn, wide = hf.functional(model.double())
    wide_loss = hf.supervised(wide_fn, nn.functional.cross_entropy)
    exact = [[(x.double(), y) for x, y in each] for each in batches]
    expected = hf.influence(wide_loss, wide, *exact, damping=DAMPING).scores
    assert found.scores.dtype == torch.float64
    assert float((found.scores - expected).norm() / expected.norm()) < 0.05


def test_progress_reports_the_solves_and_the_batches() -> None:
    seen: list[Any] = []
    of(progress=seen.append)
    assert {record.task for record in seen} >= {"influence"}
    last = seen[-1]
    assert (last.done, last.total, last.unit) == (2, 2, "batches")


def test_results_are_saved_and_loaded(tmp_path: Path) -> None:
    found = of(by_leaf=True)
    found.save(tmp_path / "influence.npz")
    loaded = hf.load(tmp_path / "influence.npz")
    assert torch.equal(loaded.scores, found.scores)
    assert list(loaded.by_leaf) == list(PARAMS)
    assert torch.equal(loaded.by_leaf["0.weight"], found.by_leaf["0.weight"])
    assert of().by_leaf is None


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="damping=-1"):
        of(damping=-1.0)
    with pytest.raises(ValueError, match="rank=0"):
        of(rank=0)
    with pytest.raises(TypeError, match="curvature"):
        of(curvature="ggn")
    with pytest.raises(ValueError, match="no query"):
        hf.influence(LOSS, PARAMS, TRAIN, [], **OPTIONS)
    with pytest.raises(ValueError, match="no training example"):
        hf.influence(LOSS, PARAMS, [], QUERIES, **OPTIONS)

    def squares(outputs: Any, targets: Any) -> Any:
        return (outputs - targets).square().mean()

    for criterion in (F.cross_entropy, partial(F.cross_entropy, reduction="sum"), squares):
        with pytest.raises(TypeError, match=r"TypeError.* pass `supervised"):
            of(query_loss=criterion)
    shuffled = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    with pytest.raises(ValueError, match="shuffles"):
        hf.influence(LOSS, PARAMS, shuffled, QUERIES, **OPTIONS)
    with pytest.raises(TypeError, match="read only once"):
        hf.influence(LOSS, PARAMS, iter(TRAIN), QUERIES, **OPTIONS)
    with pytest.raises(TypeError, match="single batch"):
        hf.influence(LOSS, PARAMS, TRAIN, QUERIES[0], **OPTIONS)
