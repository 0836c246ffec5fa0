"""Lists of tensors as vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hessfunc.compat import pyhessian as face

# PyHessian keeps gradients with their graphs, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


def test_lists_of_tensors_are_vectors(peer: Any) -> None:
    def vector() -> list[Tensor]:
        return [torch.randn(3, 2), torch.randn(4)]

    x, y, z = vector(), vector(), vector()
    assert float(face.group_product(x, y)) == pytest.approx(float(peer.group_product(x, y)))
    ours, theirs = ([v.clone() for v in x] for _ in range(2))
    assert face.group_add(ours, y, alpha=-2.0) is ours
    peer.group_add(theirs, y, alpha=-2.0)
    torch.testing.assert_close(ours, theirs)
    assert float(face.group_product(face.normalization(x), face.normalization(x))) == pytest.approx(
        1
    )
    torch.testing.assert_close(face.normalization(x), peer.normalization(x), rtol=1e-5, atol=1e-6)
    basis = [face.normalization(x), face.orthnormal(y, [face.normalization(x)])]
    before = [v.clone() for v in z]
    found = face.orthnormal(z, basis)
    assert all(torch.equal(a, b) for a, b in zip(z, before, strict=True))
    assert [float(face.group_product(found, b)) for b in basis] == pytest.approx([0, 0], abs=1e-6)
    torch.testing.assert_close(found, peer.orthnormal(z, basis), rtol=1e-4, atol=1e-5)


def test_a_vector_of_zeros_stays_as_it_is() -> None:
    assert not any(v.any() for v in face.normalization([torch.zeros(3), torch.zeros(2)]))
