from __future__ import annotations

import pytest
import torch

import hessfunc as hf
from hessfunc.algorithms.eigen.power_step import PowerState, iterated
from hessfunc.algorithms.products import Products
from tests.reference.spectra import symmetric


def test_momentum_takes_fewer_products() -> None:
    spectrum = torch.cat([torch.linspace(0, 1, 99), torch.tensor([1.05])])
    matvec = hf.dense(symmetric(spectrum))
    like = torch.zeros(100).double()
    plain = hf.power_iteration(matvec, like, seed=0)
    fast = hf.power_iteration(matvec, like, momentum=0.25, seed=0)
    assert fast.converged.all()
    assert fast.matvecs < plain.matvecs / 2
    # The Rayleigh quotient is taken on A itself: momentum does not shift the value.
    assert float(fast.values) == pytest.approx(1.05, rel=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_step_is_the_shifted_recurrence_outside_of_the_accepted_vectors(momentum: float) -> None:
    A = symmetric(torch.linspace(1, 3, 8, dtype=torch.float64))
    products = Products.of(hf.dense(A), torch.zeros(8, dtype=torch.float64))
    accepted, row, before = torch.linalg.qr(A[:, :3]).Q.mT.contiguous().split(1)
    state = PowerState(
        current=row.clone(),
        previous=before.clone() if momentum else row[:0],
        image=None,
        vectors=accepted,
        images=accepted @ A,
        shift=2.0,
        trusted=True,
        seed=0,
    )
    for _ in range(2):
        state = iterated(products.space, products, state, momentum, 1e-8)
    following = row @ A + 2 * row - momentum * before
    following -= (following @ accepted.mT) * accepted
    torch.testing.assert_close(state.current, following / following.norm())
    torch.testing.assert_close(state.image, state.current @ A)
    assert products.matvecs == 2
    assert state.growth == pytest.approx(float(following.norm().log()))
