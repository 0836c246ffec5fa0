"""Lanczos with restarts."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from hessfunc.compat.eigenthings import LambdaOperator, compute_hessian_eigenthings, lanczos
from tests.compat.eigenthings.problem import data, dense, loader, net, operator


@pytest.mark.parametrize("which", ["LA", "SA", "BE"])
def test_lanczos_takes_either_end(which: str) -> None:
    values, _ = lanczos(operator(), 2, which=which)
    np.testing.assert_allclose(
        values, {"LA": [3, 5], "SA": [-4, -1], "BE": [-4, 5]}[which], rtol=1e-5
    )


def test_without_a_number_of_restarts_there_are_as_many_as_it_takes() -> None:
    close = 1 + torch.arange(400) / 1e5
    slow = LambdaOperator(lambda vector: close * vector, 400)
    with pytest.warns(UserWarning, match="not converged"):
        lanczos(slow, 2, num_lanczos_vectors=6, max_steps=3)
    values, _ = lanczos(slow, 2, num_lanczos_vectors=6, max_steps=None)
    np.testing.assert_allclose(values, close[-2:].numpy(), rtol=1e-5)


def test_lanczos_of_one_batch_is_that_of_a_single_matrix() -> None:
    model, (inputs, targets) = net(), data()
    values, _ = compute_hessian_eigenthings(
        model, loader(20), cross_entropy, 3, full_dataset=False, mode="lanczos"
    )
    exact = torch.linalg.eigvalsh(dense(model, (inputs[:20], targets[:20])))
    expected = exact[exact.abs().argsort()[-3:]].sort().values
    np.testing.assert_allclose(values, expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("small", [True, False])
def test_half_precision_warns_unless_pairs_are_right_within_a_percent(small: bool) -> None:
    values = torch.tensor([25.0, 24.0, 23.0, 22.0, *([0.05, 0.04] if small else [21.0, 20.0])])
    half = LambdaOperator(lambda v: (values * v.float()).half(), 6)
    context = (
        pytest.warns(UserWarning, match="pass fp16=False, because float16 cannot resolve them")
        if small
        else nullcontext()
    )
    with context:
        found, _ = lanczos(half, 5 if small else 2, fp16=True)
    if not small:
        np.testing.assert_allclose(found, [24, 25], rtol=1e-2)
