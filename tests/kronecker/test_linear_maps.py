"""Order in which a parameter holds the weights of a linear map."""

import torch

from hessfunc.kronecker.linear_maps import Layout


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_order_of_a_layout_is_undone() -> None:
    weight = random(4, 3, 2, 5)
    layout = Layout((2, 2, 3, 10), (0, 2, 1, 3))
    assert layout.sizes == (2, 3, 20)
    there = layout.permuted(weight.flatten()[None])
    torch.testing.assert_close(layout.restored(there, weight.shape)[0], weight)


def test_the_layout_of_a_transposed_matrix() -> None:
    matrix = random(3, 5)
    plain = Layout((1, 5, 3))
    there = plain.permuted(matrix.mT.flatten()[None])
    transposed = plain.of_transposed()
    assert transposed is not None
    torch.testing.assert_close(transposed.permuted(matrix.flatten()[None]), there)
