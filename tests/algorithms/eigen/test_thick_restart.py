"""Method of thick-restart Lanczos, stepped by hand."""

from __future__ import annotations

import torch

import hessfunc as hf
from hessfunc.algorithms.eigen.thick_restart import Lanczos
from hessfunc.algorithms.products import Products
from tests.algorithms.eigen.test_davidson import interior, matrix


def test_steps_by_hand_give_the_pairs_of_the_function() -> None:
    A = matrix(interior())
    like = torch.zeros(len(A), dtype=torch.float64)
    products = Products.of(hf.dense(A), like)
    method = Lanczos(
        k=3,
        which="LA",
        block_size=1,
        basis_size=20,
        basis_dtype=torch.float64,
        basis_device=torch.device("cpu"),
        basis_bytes=None,
        rtol=1e-8,
        atol=0.0,
        search=2,
        start=None,
    )
    state, budget = method.init(products, 0), 300
    while (room := budget - products.matvecs) > 0 and not method.verdict(state, products, room):
        state = method.step(state, products, room)
    by_hand = method.result(state, products.space, products.cost("stopped", 0))
    pairs = hf.lanczos(hf.dense(A), like, k=3, which="LA", basis_size=20, rtol=1e-8, seed=0)
    torch.testing.assert_close(by_hand.values, pairs.values)
    torch.testing.assert_close(by_hand.values, torch.tensor([10.0, 8.0, 6.0]).double())
