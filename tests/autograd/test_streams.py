from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hessfunc.autograd.overrides import Replaced
from hessfunc.autograd.streams import Streams, replay

X = torch.arange(1, 49, dtype=torch.float64).view(2, 4, 6) / 48

LSTM = nn.LSTM(6, 3, num_layers=3, dropout=0.5, bidirectional=True).double()
GRU = nn.GRU(6, 3, num_layers=2, dropout=0.5, batch_first=True).double()

# Functions that draw from a stream of torch.
DRAWS: dict[str, Callable[[], Any]] = {
    "dropout": lambda: F.dropout(X),
    "dropout in place": lambda: F.dropout(X.clone(), inplace=True),
    "dropout2d": lambda: F.dropout2d(X[None]),
    "alpha dropout": lambda: F.alpha_dropout(X, training=True),
    "feature alpha dropout": lambda: F.feature_alpha_dropout(X, training=True),
    "gumbel softmax": lambda: F.gumbel_softmax(X, hard=True),
    "attention": lambda: F.scaled_dot_product_attention(X, X, X, dropout_p=0.5),
    "lstm": lambda: LSTM(X)[0],
    "gru": lambda: GRU(X)[0],
    "rand": lambda: torch.rand(5),
    "randn_like": lambda: torch.randn_like(X),
    "randint": lambda: torch.randint(9, (5,)),
    "randperm": lambda: torch.randperm(7),
    "bernoulli": lambda: torch.bernoulli(X),
    "multinomial": lambda: torch.multinomial(X[0], 3),
    "normal": lambda: torch.normal(X, 0.5),
    "poisson": lambda: torch.poisson(9 * X),
    "uniform": lambda: torch.empty(5).uniform_(),
    "exponential": lambda: torch.empty(5).exponential_(),
    "gamma": lambda: torch.distributions.Gamma(X, 1.0).sample(),
    "fractional pooling": lambda: F.fractional_max_pool2d(
        X.view(1, 1, 6, 8), 2, output_size=(3, 5)
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_those_of_torch_at_the_seed(name: str) -> None:
    draw = DRAWS[name]
    with torch.random.fork_rng(devices=[]), torch.nn.attention.sdpa_kernel(MATH):
        torch.manual_seed(3)
        expected = draw()
    before = torch.get_rng_state()
    with Replaced({}, Streams(3)):
        torch.testing.assert_close(draw(), expected)
        # Coarse draws may repeat once.
        assert any(not torch.equal(draw(), expected) for _ in range(20))
    assert torch.equal(torch.get_rng_state(), before)


MATH = torch.nn.attention.SDPBackend.MATH


def test_leaky_relus_with_random_slopes_use_slopes_of_their_range() -> None:
    with Replaced({}, Streams()):
        first, second = F.rrelu(-X, 0.2, 0.3, training=True), F.rrelu(-X, 0.2, 0.3, training=True)
    for found in (first, second):
        assert ((found <= -0.2 * X) & (found >= -0.3 * X)).all()
    assert not torch.equal(first, second)


def test_a_replay_repeats_the_draws_from_there_on() -> None:
    with Replaced({}, Streams(5)):
        torch.rand(3)
        again = replay(torch.device("cpu"))
        expected = F.dropout(X)
    for _ in range(2):
        with Replaced({}, again()):
            assert torch.equal(F.dropout(X), expected)
    of_torch = replay(torch.device("cpu"))
    drawn = torch.rand(3)
    with Replaced({}, of_torch()):
        assert torch.equal(torch.rand(3), drawn)


def test_generators_of_the_user_are_used() -> None:
    with Replaced({}, Streams()):
        found = torch.rand(3, generator=torch.Generator().manual_seed(8))
    assert torch.equal(found, torch.rand(3, generator=torch.Generator().manual_seed(8)))


def test_a_random_layer_inside_a_checkpoint_is_refused() -> None:
    def inside(x: Tensor) -> Tensor:
        return F.dropout(x)

    x = X.clone().requires_grad_()
    with Replaced({}, Streams()), pytest.raises(NotImplementedError, match=r"model\.eval\(\)"):
        checkpoint(inside, x, use_reentrant=False)
