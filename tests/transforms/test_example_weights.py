"""Weights of examples in the empirical Fisher matrix."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.cases import Case, case
from tests.reference import gradient, matrix, relative_error
from tests.transforms.problem import net, of_dicts, of_examples


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_examples_do_not_count_in_the_empirical_fisher(reduction: str) -> None:
    criterion = nn.CrossEntropyLoss(ignore_index=1, reduction=reduction)
    found = net(criterion, torch.tensor([0, 1, 2, 1, 0, 2]))
    x, y = found.batch
    kept = y != 1
    expected = matrix(hf.efvp(found.loss)(found.params, (x[kept], y[kept])), found.params)
    gradients = of_examples(Case(found.model, found.loss, found.params, (x[kept], y[kept])))
    right = sum(g.outer(g) for g in gradients)
    assert relative_error(expected, right / 4 if reduction == "mean" else right) < 1e-8
    product = matrix(hf.efvp(found.loss)(found.params, found.batch), found.params)
    assert relative_error(product, expected) < 1e-8


def test_examples_of_more_tokens_count_more_in_the_empirical_fisher() -> None:
    found = case("tied head")
    tokens, targets = found.batch
    targets = targets.clone()
    targets[0, 1:], targets[2, 0] = -100, -100
    loss = hf.supervised(
        lambda p, x: found.loss.outputs(p, (x, None)).movedim(-1, 1), F.cross_entropy
    )
    counts = (targets != -100).sum(1).double()
    gradients = [
        gradient(loss, found.params, (tokens[b, None], targets[b, None])) for b in range(3)
    ]
    shares = counts / counts.sum()
    expected = sum(s * g.outer(g) for s, g in zip(shares, gradients, strict=True))
    product = matrix(hf.efvp(loss)(found.params, (tokens, targets)), found.params)
    assert relative_error(product, expected) < 1e-8


def test_class_weights_are_weights_of_the_examples_in_the_empirical_fisher() -> None:
    weight = torch.tensor([1.0, 0.2, 3.0]).double()
    found = net(nn.CrossEntropyLoss(weight=weight), torch.tensor([0, 1, 2, 1, 0, 2]))
    shares = weight[found.batch[1]] / weight[found.batch[1]].sum()
    expected = sum(s * g.outer(g) for s, g in zip(shares, of_examples(found), strict=True))
    product = matrix(hf.efvp(found.loss)(found.params, found.batch), found.params)
    assert relative_error(product, expected) < 1e-8


def test_an_empirical_fisher_of_padded_tokens_is_that_of_its_parts() -> None:
    loss, params, batch = of_dicts(F.cross_entropy, targets=lambda b: b["y"])
    whole = matrix(hf.efvp(loss)(params, batch), params)
    parts = hf.over_batches(hf.efvp(loss), weight=lambda b: float((b["y"] >= 0).sum()))
    assert relative_error(matrix(parts(params, hf.microbatches(batch, 1)), params), whole) < 1e-12


def test_an_empirical_fisher_of_no_mean_over_examples_is_refused() -> None:
    loss, params, batch = of_dicts(lambda outputs, b: F.cross_entropy(outputs, b["y"]))
    with pytest.raises(ValueError, match=r"its examples have the mean .*targets=lambda"):
        hf.efvp(loss)(params, batch)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_empirical_fisher_of_a_sum_is_the_sum_of_outer_products(parts: int) -> None:
    loss, params, batch = of_dicts(
        lambda outputs, b: F.cross_entropy(outputs, b["y"], reduction="sum")
    )
    pieces = hf.microbatches(batch, 1)
    expected = sum(g.outer(g) for g in (gradient(loss, params, piece) for piece in pieces))
    cut = hf.microbatches(batch, 3 if parts == 1 else 2)
    found = matrix(hf.over_batches(hf.efvp(loss))(params, cut), params)
    assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize(
    ("criterion", "reason"),
    [
        (lambda out, y: (out - y)[1].square().sum(), "index 1 is out of bounds"),
        (lambda out, y: (out - y).square().sum() / one_line(y), "one line"),
        (lambda out, y: {"loss": (out - y).square().mean()}["loss" if len(y) > 1 else "no"], "no"),
    ],
    ids=["index", "value", "key"],
)
def test_a_criterion_that_fails_on_one_example_has_no_empirical_fisher(
    criterion: Any, reason: str
) -> None:
    found = net(criterion, torch.linspace(-1, 1, 18).double().view(6, 3))
    message = rf"could not be evaluated on a single example \(.*{reason}.*`composed"
    with pytest.raises(ValueError, match=message):
        hf.efvp(found.loss)(found.params, found.batch)


def one_line(y: Tensor) -> int:
    if len(y) < 2:
        raise ValueError("one line")
    return 1
