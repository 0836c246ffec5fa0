from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.optim.adversarial import fgsm, partly, pgd


def linear(params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A loss whose gradient with respect to each input is the same."""
    return (batch[0] @ params).sum()


DIRECTION = torch.tensor([3.0, -0.5, 0.0])
INPUTS = torch.tensor([[0.0, 1.0, 0.2], [0.5, 0.3, 0.4]])
BATCH = INPUTS, torch.zeros(2, dtype=torch.long)


def test_fgsm_by_hand_within_the_range_of_the_inputs() -> None:
    found = fgsm(linear, DIRECTION, BATCH, eps=0.4)
    expected = torch.tensor([[0.4, 0.6, 0.2], [0.9, 0.0, 0.4]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert fgsm(linear, DIRECTION, BATCH)[0, 0] == 0.005


def test_bounds_may_be_given() -> None:
    found = fgsm(linear, DIRECTION, BATCH, eps=0.4, bounds=(0.1, 0.7))
    expected = torch.tensor([[0.4, 0.6, 0.2], [0.7, 0.1, 0.4]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
    assert fgsm(linear, DIRECTION, BATCH, eps=4.0, bounds=(-9.0, 9.0))[1, 0] == 4.5


def test_bounds_hold_where_inputs_lie_beyond_them() -> None:
    far = torch.tensor([[5.0, -5.0, 0.3]]), BATCH[1][:1]
    found = pgd(linear, DIRECTION, far, eps=0.1, step_size=0.05, steps=4, bounds=(0.0, 1.0))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, 0.3]]), rtol=0, atol=0)


def test_pgd_stays_within_eps() -> None:
    def bowl(params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (batch[0] - params).square().sum()

    for seed in (None, 0):
        found = pgd(
            bowl, torch.tensor(0.7), BATCH, eps=0.1, step_size=0.03, bounds=(-1, 2), seed=seed
        )
        # Away from 0.7, to the edge.
        torch.testing.assert_close(found, INPUTS + 0.1 * (INPUTS - 0.7).sign())


def test_pgd_climbs_where_one_step_goes_astray() -> None:
    def wave(params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return torch.sin(params * batch[0]).sum()

    batch = torch.zeros(4, 1), torch.zeros(4)
    options = {"eps": 0.8, "bounds": (-1.0, 1.0)}
    once = fgsm(wave, torch.tensor(5.0), batch, **options)
    often = pgd(wave, torch.tensor(5.0), batch, step_size=0.05, steps=40, **options)
    assert wave(torch.tensor(5.0), (often, batch[1])) > 3.8
    assert wave(torch.tensor(5.0), (once, batch[1])) < 0


def test_a_random_start_is_a_function_of_its_seed() -> None:
    def start(seed: int) -> Tensor:
        return pgd(linear, torch.zeros(3), BATCH, eps=0.1, bounds=(-1, 2), steps=1, seed=seed)

    state = torch.get_rng_state()
    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
    assert 0.05 < float((start(1) - INPUTS).abs().max()) <= 0.1 + 1e-6
    assert torch.equal(torch.get_rng_state(), state)


def test_a_random_start_is_within_the_bounds() -> None:
    def rooted(params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert bool((batch[0] >= 0).all())
        return batch[0].sum()

    pgd(rooted, DIRECTION, BATCH, eps=0.5, bounds=(0.0, 1.0), steps=1, seed=0)


def test_nothing_but_the_inputs_moves() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    model_fn, params = hf.functional(model)
    model.train()
    before, inputs = copy.deepcopy(model.state_dict()), INPUTS.clone()
    loss = hf.supervised(model_fn, F.cross_entropy)
    for attack in (fgsm, partial(pgd, seed=0)):
        moved = attack(loss, params, (inputs, BATCH[1]), eps=0.1)
        assert not moved.requires_grad
        assert float(loss(params, (moved, BATCH[1]))) > float(loss(params, BATCH))
        # In eval mode examples do not see each other.
        alone = attack(loss, params, (inputs[:1], BATCH[1][:1]), eps=0.1, bounds=(0.0, 1.0))
        both = attack(loss, params, (inputs, BATCH[1]), eps=0.1, bounds=(0.0, 1.0))
        if attack is fgsm:
            torch.testing.assert_close(alone[0], both[0])
    assert torch.equal(inputs, INPUTS)
    assert all(torch.equal(before[name], leaf) for name, leaf in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("share", "moved"), [(0.0, 0), (0.1, 0), (0.11, 1), (0.29, 2), (1.0, 10)])
def test_a_share_is_of_the_first_examples(share: float, moved: int) -> None:
    inputs, targets = torch.zeros(10, 3), torch.arange(10)
    seen: list[Tensor] = []

    def attack(batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(batch[1])
        return batch[0] + 1

    found, same = partly(attack, (inputs, targets), share)
    assert same is targets
    assert found[:, 0].tolist() == [1.0] * moved + [0.0] * (10 - moved)
    assert [batch.tolist() for batch in seen] == ([list(range(moved))] if moved else [])
    assert not inputs.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "eps=-0.1: it must be at least 0"),
        ({"step_size": -1.0}, "step_size"),
        ({"steps": 0}, "steps=0"),
        ({"bounds": (1.0, 0.0)}, "must not exceed"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pgd(linear, DIRECTION, BATCH, **options)


def test_inputs_without_gradient_are_refused() -> None:
    with pytest.raises(TypeError, match=r"inputs of torch.int64 have no gradient"):
        fgsm(linear, DIRECTION, (INPUTS.long(), BATCH[1]))
