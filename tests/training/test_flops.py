from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import hessfunc as hf
from hessfunc.app.problems.nets import digits_convnet
from hessfunc.autograd.matrices import multiplied
from hessfunc.optim.newton import newton
from hessfunc.optim.solvers import conjugate_gradients, direct
from hessfunc.training.flops import CountedFlops, Metered
from hessfunc.transforms.exact_blocks import exact_blocks


def test_a_linear_layer_by_hand() -> None:
    layer = nn.Linear(3, 5)
    x = torch.randn(7, 3)
    with CountedFlops() as flops:
        y = layer(x)
        assert flops.total == 2 * 7 * 3 * 5
        # The input needs no gradient.
        y.sum().backward()
    assert flops.total == 2 * 2 * 7 * 3 * 5


@pytest.mark.parametrize(
    ("decompose", "flops"),
    [
        (torch.linalg.eigh, 9),
        (torch.linalg.eigvalsh, 9),
        (torch.linalg.svd, 21),
        (torch.linalg.cholesky, 1 / 3),
        (torch.linalg.inv, 2),
        (lambda matrix: torch.linalg.solve(matrix, matrix[..., 0]), 2 / 3),
    ],
)
def test_decompositions_by_the_book(decompose: Any, flops: float) -> None:
    matrices = torch.eye(6).expand(5, 6, 6).clone()
    with CountedFlops() as counted:
        decompose(matrices)
    assert counted.total == pytest.approx(flops * 5 * 6**3)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN")
def test_a_product_by_one_dnn_counts_as_any_other() -> None:
    a, b = torch.randn(7, 3), torch.randn(3, 5)
    with CountedFlops() as counted:
        product = multiplied(a, b)
    torch.testing.assert_close(product, a @ b)
    assert counted.total == 2 * 7 * 3 * 5


def problem() -> tuple[hf.Loss, dict[str, Tensor], Any, dict[str, Tensor]]:
    model_fn, params = hf.functional(digits_convnet())
    loss = hf.supervised(model_fn, F.cross_entropy)
    batch = torch.randn(6, 1, 8, 8), torch.randint(10, (6,))
    return loss, params, batch, torch.func.grad(loss)(params, batch)


CURVATURES = {
    "hvp": hf.hvp,
    "ggnvp": hf.ggnvp,
    "pchvp": partial(hf.pchvp, residual="abs"),
}


@pytest.mark.parametrize("curvature", CURVATURES.values(), ids=CURVATURES)
@pytest.mark.parametrize("vectors", [1, 6])
def test_products_are_counted_as_torch_counts_them(curvature: Any, vectors: int) -> None:
    loss, params, batch, _ = problem()
    block = hf.random_like(params, vectors, seed=0)

    # Made outside: torch's counter hangs hooks on modules, which are looked at once more.
    matvec = curvature(loss, chunk_size=3)(params, batch)

    def work() -> Any:
        return matvec(block)

    work()
    with CountedFlops() as ours:
        found = work()
    with FlopCounterMode(display=False) as theirs:
        work()
    assert ours.total == theirs.get_total_flops() > 0
    assert all(map(torch.equal, found.values(), work().values()))


def test_a_product_with_the_hessian_is_two_gradients() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(30, 30), nn.Tanh()) for _ in range(12)))
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.mse_loss)
    batch = torch.randn(20, 30), torch.randn(20, 30)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    with CountedFlops() as gradient:
        torch.autograd.grad(loss(leaves, batch), list(leaves.values()))
    matvec = hf.hvp(loss)(params, batch)
    with CountedFlops() as product:
        matvec(hf.random_like(params, 1, seed=0))
    assert product.total / gradient.total == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("curvature", CURVATURES.values(), ids=CURVATURES)
def test_metered_steps_count_what_all_steps_would(curvature: Any) -> None:
    loss, params, batch, gradients = problem()
    blocks = exact_blocks(curvature, loss)
    metered = Metered(exact_blocks(curvature, loss))
    method = newton(lr=0.1, alpha=0.02, solve=conjugate_gradients(rtol=0.1))
    state = method.init(params)
    with CountedFlops() as flops:
        for _ in range(4):
            expected, state = method.update(gradients, state, params, blocks(params, batch))
    for _ in range(4):
        found, state = method.update(gradients, state, params, metered(params, batch))
    # Conjugate gradients themselves take a little.
    assert metered.total == pytest.approx(flops.total, rel=0.01)
    assert all(torch.equal(found[name], expected[name]) for name in params)


def test_inverse_products_are_metered() -> None:
    matrix = torch.eye(4) * 3

    class Block:
        def inverse_matvec(self, vectors: Tensor, damping: float) -> Tensor:
            return vectors @ torch.linalg.inv(matrix + damping * torch.eye(4))

    metered = Metered(lambda params, batch: dict.fromkeys(params, Block()))
    params, gradients = {"x": torch.zeros(4)}, {"x": torch.ones(4)}
    method = newton(lr=1.0, alpha=0.0, solve=direct())
    state = method.init(params)
    for step in range(1, 5):
        moved, state = method.update(gradients, state, params, metered(params, None))
        assert metered.total == step * (2 * 4**3 + 2 * 4**2)
    torch.testing.assert_close(moved["x"], torch.full((4,), -1 / 3))


def test_direct_through_a_meter_still_names_what_is_missing() -> None:
    params = {"x": torch.zeros(4)}
    metered = Metered(lambda params, batch: dict.fromkeys(params, lambda v: v))
    method = newton(solve=direct())
    with pytest.raises(TypeError, match="no inverse_matvec"):
        method.update(params, method.init(params), params, metered(params, None))
