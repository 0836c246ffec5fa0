"""Symmetric linear operators on flat vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hessfunc.compat.eigenthings import (
    HVPOperator,
    LambdaOperator,
    Operator,
    deflated_power_iteration,
    lanczos,
    power_iteration,
)
from tests.compat.eigenthings.problem import loader, matrix, net


def test_an_operator_may_be_a_class_of_its_own_with_a_shape() -> None:
    class Doubling(Operator):
        def apply(self, vec: Tensor) -> Tensor:
            return 2 * vec

    value, vector = power_iteration(Doubling((8, 8)))
    assert value == pytest.approx(2.0)
    assert vector.shape == (8,)
    with pytest.raises(NotImplementedError):
        Operator(3).apply(torch.zeros(3))


@pytest.mark.filterwarnings("ignore:.*have not converged")
def test_no_start_lies_where_deflation_has_put_a_zero() -> None:
    starts: list[Tensor] = []
    products = 0

    def noted(vector: Tensor) -> Tensor:
        nonlocal products
        if products % 30 == 0:
            starts.append(vector.clone())
        products += 1
        return matrix().float() @ vector

    _, vectors = deflated_power_iteration(
        LambdaOperator(noted, 8), 3, power_iter_steps=30, power_iter_err_threshold=0
    )
    assert products == 90
    overlaps = torch.stack(starts)[1:] @ torch.from_numpy(vectors).mT
    assert float(overlaps.abs().max()) < 0.95


def test_pairs_that_have_not_converged_are_warned_of() -> None:
    wide = torch.diag(torch.linspace(1.0, 2.0, 300))
    slow = LambdaOperator(lambda vector: wide @ vector, 300)
    with pytest.warns(UserWarning, match="of 3 pairs have not converged.*increase `max_steps`"):
        values, _ = lanczos(slow, 3, max_steps=1, num_lanczos_vectors=8)
    assert len(values) == 3
    with pytest.raises(ValueError, match="choose 'LM'"):
        lanczos(slow, 3, which="SM")
    with pytest.warns(UserWarning, match="3 of 3 .*increase `power_iter_steps`") as told:
        values, vectors = deflated_power_iteration(slow, 3)
    assert len(told) == 1
    residuals = np.linalg.norm(vectors @ wide.numpy() - values[:, None] * vectors, axis=1)
    said = float(str(told[0].message).split("up to ")[1].split(":")[0])
    assert said == pytest.approx(residuals.max(), rel=0.1)
    with pytest.warns(UserWarning, match="1 of 1 pairs have not converged.*increase `steps`"):
        power_iteration(slow)
    # Two of three are found.
    well_apart = LambdaOperator(lambda vector: apart * vector, 4)
    apart = torch.tensor([9.0, 3.0, 1.0, 0.99])
    with pytest.warns(UserWarning, match="1 of 3 pairs"):
        deflated_power_iteration(well_apart, 3, power_iter_steps=30)


def test_float16_is_that_of_the_vectors() -> None:
    seen: set[torch.dtype] = set()

    def noted(vector: Tensor) -> Tensor:
        seen.add(vector.dtype)
        return (matrix().float() @ vector.float()).half()

    values, vectors = deflated_power_iteration(
        LambdaOperator(noted, 8), 2, power_iter_steps=60, fp16=True
    )
    assert seen == {torch.float16}
    assert vectors.dtype == np.float16
    np.testing.assert_allclose(np.abs(values), [5, 4], rtol=1e-2)
    model = net(torch.float32)
    product = HVPOperator(model, loader(20, torch.float32), cross_entropy, fp16=True)
    assert product.apply(torch.ones(product.size).half()).dtype == torch.float16


def test_an_operator_has_a_function_and_a_size() -> None:
    with pytest.raises(TypeError, match="apply_fn must be a function"):
        LambdaOperator(torch.ones(2, 2), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive number of entries"):
        LambdaOperator(torch.clone, (0, 0))
    with pytest.raises(NotImplementedError, match="no method `apply`"):
        Operator(2).apply(torch.ones(2))
