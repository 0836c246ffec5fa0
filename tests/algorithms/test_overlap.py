"""Overlaps and principal angles, compared with SciPy and with angles that are known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import hessfunc as hf

scipy = pytest.importorskip("scipy.linalg")
D = torch.float64


def random(k: int, n: int, seed: int) -> torch.Tensor:
    return torch.randn(k, n, dtype=D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("k", "l"), [(3, 3), (2, 5), (5, 2), (1, 4)])
def test_angles_are_those_of_scipy(k: int, l: int) -> None:  # noqa: E741
    a, b = random(k, 20, 0), random(l, 20, 1)
    found = hf.overlap(a, b, like=torch.zeros(20, dtype=D))
    expected = np.sort(scipy.subspace_angles(a.numpy().T, b.numpy().T))
    np.testing.assert_allclose(found.angles, expected, atol=1e-12)
    cosines = a @ b.T / a.norm(dim=1)[:, None] / b.norm(dim=1)
    torch.testing.assert_close(found.cosines, cosines.abs(), rtol=0, atol=1e-13)


def test_small_and_large_angles_are_accurate() -> None:
    e = torch.eye(4, dtype=D)
    for angle in (0.0, 1e-9, 1e-3, 0.5, math.pi / 2):
        turned = math.cos(angle) * e[0] + math.sin(angle) * e[2]
        found = hf.overlap([e[0], e[1]], turned)
        assert found.angles.tolist() == pytest.approx([angle], rel=1e-6, abs=1e-15)
        assert found.captured.tolist() == pytest.approx([math.cos(angle) ** 2], abs=1e-14)


def test_eigenvectors_and_gradients_of_a_model() -> None:
    params = {"w": torch.zeros(2, 2, dtype=D), "b": torch.zeros(2, dtype=D)}
    matrix = hf.dense(torch.diag(torch.tensor([6.0, 5, 4, 3, 2, 1], dtype=D)))
    top = hf.lanczos(matrix, params, k=2, seed=0)
    gradient = hf.unravel(torch.tensor([3.0, 0, 4, 0, 0, 0], dtype=D), params)
    found = hf.overlap(top, gradient)
    assert found.cosines.flatten().tolist() == pytest.approx([0.6, 0.0], abs=1e-6)
    assert found.captured.tolist() == pytest.approx([0.36], abs=1e-6)
    several = hf.overlap(top, [gradient, hf.unravel(torch.eye(6, dtype=D)[1], params)])
    assert several.captured.tolist() == pytest.approx([0.36, 1.0], abs=1e-6)
    again = hf.overlap(top, hf.lanczos(matrix, params, k=2, seed=1))
    assert float(again.angles.max()) < 1e-5
    torch.testing.assert_close(again.cosines, torch.eye(2, dtype=D), rtol=0, atol=1e-5)


def test_dependent_vectors_span_what_they_span() -> None:
    e = torch.eye(3)
    found = hf.overlap([e[0], 2 * e[0]], e[1])
    assert found.captured.tolist() == [0.0]
    assert found.angles.tolist() == pytest.approx([math.pi / 2])


def test_parameters_that_require_a_gradient() -> None:
    w = torch.ones(3, requires_grad=True)
    assert not hf.overlap({"w": w}, {"w": 2 * w}).cosines.requires_grad


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(3), torch.ones(3), "a has a vector that is zero"),
        (torch.ones(3), torch.full((3,), math.nan), "b has a vector that is zero or not finite"),
        ([], torch.ones(3), "a is an empty list"),
        ({"w": torch.ones(3)}, {"v": torch.ones(3)}, "structure of the parameters"),
        (torch.ones(3), torch.ones(4), "shape"),
    ],
)
def test_wrong_vectors_are_named(a: Any, b: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hf.overlap(a, b)


def test_what_is_no_tree_is_refused() -> None:
    with pytest.raises(TypeError, match="tensor"):
        hf.overlap(3, torch.ones(3))
