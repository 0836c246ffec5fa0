"""Cross-entropy of rows of logits, and its derivatives, against autograd."""

import pytest
import torch
from torch import Tensor

from hessfunc.autograd.logits import Head, Rows
from tests.cases import waves
from tests.reference import relative_error

HEADS = {
    "plain": Head(),
    "smoothed": Head(scale=0.3, label_smoothing=0.1),
    "bounded": Head(scale=1.3, softcap=1.5, reduction="sum"),
}
TARGETS = torch.tensor([2, -100, 0])


def rows(head: Head, u: Tensor) -> Rows:
    return Rows(head, u, TARGETS, head.weights(TARGETS)[:, None])


@pytest.mark.parametrize("name", HEADS)
def test_derivatives_are_those_of_autograd(name: str) -> None:
    head, u, t = HEADS[name], waves(3, 5), waves(3, 5).square()
    gradient = torch.func.grad(lambda u: rows(head, u).losses())
    due, along = torch.func.jvp(gradient, (u,), (t,))
    assert relative_error(rows(head, u).gradient(), due) < 1e-12
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert relative_error(rows(head, u).hessian()(t), along) < 1e-12


@pytest.mark.parametrize("name", HEADS)
def test_the_gauss_newton_matrix_is_the_mean_of_all_draws(name: str) -> None:
    head, u, t = HEADS[name], waves(3, 5), waves(3, 5).square()
    here = rows(Head(head.scale, head.softcap, reduction=head.reduction), u)
    mean = torch.zeros_like(u)
    for y in range(5):
        drawn = torch.full((3, 1), y)
        mean += here.probabilities[:, [y]] * here.sampled(drawn)(t)
    assert relative_error(here.gauss_newton()(t), mean) < 1e-12


def test_chunks_are_chosen_by_size() -> None:
    weight = torch.empty(2**20, 1)
    chunks = Head().chunks(torch.empty(10, 1), weight)
    assert [range(10)[c] for c in chunks] == [range(4), range(4, 8), range(8, 10)]
    assert len(Head(rows_per_chunk=3).chunks(torch.empty(10, 1), weight)) == 4
