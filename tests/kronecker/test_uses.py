"""Several uses of a parameter, of one kind or of two, as one dependence."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.kronecker.cases import Net, gauss_newton_blocks, net, traces_of


def test_calls_of_a_module_are_positions_of_one_call() -> None:
    """A layer on two tensors, one after another, is the layer on both of them stacked."""

    class Halves(nn.Module):
        def __init__(self, together: bool) -> None:
            super().__init__()
            self.layer, self.head, self.together = nn.Linear(2, 3), nn.Linear(3, 3), together

        def forward(self, x: Tensor) -> Tensor:
            if self.together:
                z = self.layer(x.unflatten(1, (2, 2)))
            else:
                z = torch.stack([self.layer(x[:, :2]), self.layer(x[:, 2:])], 1)
            return self.head(torch.tanh(z).prod(1))

    for of in (
        hf.kronecker.kflr,
        hf.kronecker.ekfac,
        partial(hf.kronecker.kfac, seed=0, samples=3),
    ):
        for sharing in ("expand", "reduce"):
            one, other = (
                of(case.loss, case.model, sharing=sharing)(case.params, case.batch)
                for case in (net(partial(Halves, t), 4, examples=3) for t in (True, False))
            )
            for name in one:
                torch.testing.assert_close(one[name].dense(), other[name].dense())


class Head(nn.Module):
    """One weight of an embedding and a head, with a row for the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3, padding_idx=0), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)).cumsum(1)).movedim(-1, 1)


def tied() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Head().double()
    model_fn, params = hf.functional(model)
    tokens = torch.tensor([[0, 1, 1], [4, 0, 2]])
    return Net(model, hf.supervised(model_fn, F.cross_entropy), params, (tokens, tokens.flip(1)))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_tied_embedding_and_head(sharing: str) -> None:
    """The traces of `ekfac` are exact, with the cross terms of both uses."""
    case = tied()
    traces_of(case, sharing=sharing)
    for joint in ("apart", "joint"):
        traces_of(case, sharing=sharing, bias=joint)


def test_the_factors_of_a_tied_weight_are_nearest_to_the_sum_of_both_products() -> None:
    case, weight = tied(), "embedding.weight"
    apart = Head().double()
    apart.head.weight = nn.Parameter(apart.embedding.weight.detach().clone())
    model_fn, _ = hf.functional(apart)
    own = {weight: case.params[weight], "head.weight": case.params[weight]}
    loss = hf.supervised(model_fn, F.cross_entropy)
    parts = hf.kronecker.kflr(loss, apart)(own, case.batch)
    total = sum(parts[name].dense() for name in own)
    made = hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)[weight]
    # Rows of the rearranged matrix are the blocks of the sum.
    rearranged = total.view(5, 3, 5, 3).permute(0, 2, 1, 3).reshape(25, 9)
    u, s, v = torch.linalg.svd(rearranged)
    nearest = (s[0] * torch.outer(u[:, 0], v[0])).view(5, 5, 3, 3).permute(0, 2, 1, 3)
    torch.testing.assert_close(made.dense(), nearest.reshape(15, 15))
    assert float(torch.linalg.eigvalsh(made.dense())[0]) > -1e-12
    forward = hf.kronecker.kfac(case.loss, case.model, fisher="forward-only")
    assert forward(case.params, case.batch)[weight].trace() > 0
    batches = [tuple(part[i : i + 1] for part in case.batch) for i in range(2)]
    whole = hf.over_batches(hf.kronecker.kflr(case.loss, case.model))(case.params, batches)
    torch.testing.assert_close(whole[weight].dense(), made.dense())


def test_rows_of_a_weight_by_indices_and_by_unit_vectors() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.head = nn.Parameter(torch.randn(4, 3)), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(F.embedding(x.argmax(1), self.weight) + x @ self.weight))

    traces_of(net(Both, 4, examples=5))


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weight)) @ self.weight + self.bias


def test_a_weight_and_its_transpose() -> None:
    case = net(Autoencoder, 4, examples=5, criterion=F.mse_loss)
    traces_of(case)
    error = [
        float(torch.linalg.matrix_norm(of.dense() - gauss_newton_blocks(case)["weight"]))
        for of in (
            hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)["weight"],
            hf.kronecker.kfoc(case.loss, case.model)(case.params, case.batch)["weight"],
        )
    ]
    assert error[1] < error[0]


class OfTwoKinds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(1) @ self.weight


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_weight_with_uses_of_different_kinds(sharing: str) -> None:
    case = net(OfTwoKinds, 3, 3, examples=4)
    with pytest.raises(NotImplementedError, match="'weight' .* its uses are of diff"):
        hf.kronecker.ekfac(case.loss, case.model)(case.params, case.batch)
    for family in (hf.kronecker.kflr, hf.kronecker.ekfac):
        curvature = family(case.loss, case.model, sharing=sharing, unsupported="diagonal")
        made = curvature(case.params, case.batch)
        assert made.diagonals == ("weight",)
        exact = gauss_newton_blocks(case)["weight"].diagonal()
        torch.testing.assert_close(made["weight"].dense(), torch.diag(exact))


class Attention(nn.Module):
    """Attention with its own projections, on positions first or examples first."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.norm, self.batch_first = nn.LayerNorm(4), batch_first

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.batch_first else x.transpose(0, 1)
        y = self.norm(y + self.attention(y, y, y, need_weights=False)[0])
        return (y if self.batch_first else y.transpose(0, 1)).movedim(-1, 1)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_rows_of_positions_before_examples(sharing: str) -> None:
    """torch's attention moves the positions before the examples; either order has the blocks."""
    one, other = (
        traces_of(net(partial(Attention, first), 5, 4, examples=3), sharing=sharing)
        for first in (True, False)
    )
    assert "attention.in_proj_weight" in one
    for name in one:
        torch.testing.assert_close(one[name].dense(), other[name].dense())


def test_layers_with_the_same_inputs_share_their_factor() -> None:
    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            return self.query(x) * self.key(x) + self.value(x.cos())

    case = net(Queries, 3, examples=4)
    made = hf.kronecker.kflr(case.loss, case.model)(case.params, case.batch)
    query, key, value = (made[f"{name}.weight"] for name in ("query", "key", "value"))
    x = torch.tanh(case.batch[0])
    torch.testing.assert_close(query.right[0], x.mT @ x / 4)
    torch.testing.assert_close(key.right, query.right, rtol=0, atol=0)
    torch.testing.assert_close(value.right[0], x.cos().mT @ x.cos() / 4)
