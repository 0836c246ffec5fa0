"""Lists of tensors as vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


def test_vectors_that_do_not_fit_are_refused() -> None:
    x, y = torch.ones(2), torch.ones(3)
    # Broadcasting, or a list that ends early, would give another number.
    for other in ([torch.ones(1)], [x, x], [torch.ones(2, 2)]):
        with pytest.raises(ValueError, match=r"one tensor for each parameter"):
            face.group_product([x], other)
    with pytest.raises(ValueError, match="update has tensors of shapes"):
        face.group_add([x], [y])
    with pytest.raises(ValueError, match="cannot store the sum"):
        face.group_add([torch.ones(2, dtype=torch.int64)], [x])
    with pytest.raises(ValueError, match="v_list has tensors of shapes"):
        face.orthnormal([x], [[x], [y]])
    with pytest.raises(TypeError, match="v_list must be a list of vectors"):
        face.orthnormal([x], x)
    with pytest.raises(ValueError, match="v has no tensors"):
        face.normalization([])
    with pytest.raises(TypeError, match="each of xs must be a tensor"):
        face.group_product([1.0], [x])
    with pytest.raises(ValueError, match="requires no gradient"):
        face.hessian_vector_product([x.clone().requires_grad_() * 2], [x], [x])
    made = face.hessian(
        nn.Linear(2, 2), nn.functional.mse_loss, (torch.ones(3, 2), torch.ones(3, 2))
    )
    with pytest.raises(ValueError, match="v has tensors of shapes"):
        made.dataloader_hv_product([x])


def test_parameters_may_be_an_iterator() -> None:
    model = nn.Linear(2, 3)
    product = face.group_product(model.parameters(), list(model.parameters()))  # type: ignore[arg-type]
    assert product.item() == pytest.approx(sum(p.square().sum().item() for p in model.parameters()))


def test_a_vector_of_zeros_stays_as_it_is() -> None:
    assert not any(v.any() for v in face.normalization([torch.zeros(3), torch.zeros(2)]))
