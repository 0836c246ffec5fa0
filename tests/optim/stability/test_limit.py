from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import hessfunc as hf
from hessfunc.optim import CombinedNorm, Stability
from tests.optim.stability.others import Lion, SingleDeviceMuonWithAuxAdam, _Each
from tests.optim.stability.quadratics import (
    Quadratic,
    assert_diverges_at_the_threshold,
    positive,
    warmed,
)

D = torch.float64


def groups(model: Quadratic, first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    weight, bias = model.parameters()
    return [{"params": [weight], **first}, {"params": [bias], **second}]


@pytest.mark.parametrize(
    ("cls", "first", "second"),
    [
        (torch.optim.SGD, {"lr": 0.1}, {"lr": 0.4}),
        (torch.optim.SGD, {"lr": 0.1, "weight_decay": 1.0}, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.3, "momentum": 0.5}),
        (
            torch.optim.SGD,
            {"lr": 0.1, "momentum": 0.9, "nesterov": True},
            {"lr": 0.3, "momentum": 0.0},
        ),
        (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 3.0}, {"lr": 0.1, "weight_decay": 0.0}),
        (torch.optim.Adam, {"lr": 0.1, "betas": (0.5, 0.999)}, {"lr": 0.05, "weight_decay": 1.0}),
    ],
)
def test_groups_that_differ_diverge_at_the_threshold(cls: Any, first: Any, second: Any) -> None:
    model = Quadratic()
    optimizer = warmed(model, lambda model: cls(groups(model, first, second), lr=1.0), steps=300)
    assert_diverges_at_the_threshold(model, [optimizer])


def test_optimisers_that_share_a_model_diverge_at_the_threshold() -> None:
    model = Quadratic()
    adam = warmed(model, lambda model: torch.optim.AdamW([model.weight], lr=0.1), steps=300)
    sgd = torch.optim.SGD([model.bias], lr=0.2, momentum=0.8, weight_decay=1.0)
    assert_diverges_at_the_threshold(model, [adam, sgd])
    assert hf.stability([adam, sgd], model).optimizer == "AdamW + SGD"


@pytest.mark.parametrize("together", [False, True])
def test_muon_beside_adam_diverges_at_the_threshold(together: bool) -> None:
    """Steepest descent in the norm that combines both, with the step size of Muon frozen."""
    model = Quadratic()

    def make(model: Quadratic) -> Any:
        muon = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "use_muon": True}
        adam = {
            "lr": 0.1, "betas": (0.9, 0.999), "eps": 0.1, "weight_decay": 0.0, "use_muon": False,
        }  # fmt: skip
        return SingleDeviceMuonWithAuxAdam(groups(model, muon, adam))

    optimizer = warmed(model, make, steps=300)
    optimizers = [optimizer]
    if not together:
        adam = torch.optim.AdamW([model.bias], lr=0.1, eps=0.1, weight_decay=0.0)
        adam.load_state_dict(
            {
                "state": {0: optimizer.state[model.bias]},
                "param_groups": [{**adam.state_dict()["param_groups"][0], "params": [0]}],
            }
        )
        # Python's count of steps becomes the tensor that torch expects.
        adam.state[model.bias]["step"] = torch.tensor(300.0)
        muon = groups(model, {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}, {})[:1]
        optimizers = [
            SingleDeviceMuonWithAuxAdam([muon[0] | {"use_muon": True}]),
            adam,
        ]
    H = positive(8)
    like = {name: p.detach() for name, p in model.named_parameters()}
    start = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=D)
    model.put(H @ start, "grad")
    stable = hf.stability(optimizers, model)
    assert isinstance(stable.norm, CombinedNorm)
    matvec = stable.preconditioned(hf.dense(H))
    found = hf.generalized_sharpness(
        matvec, like, stable.norm, restarts=16, rtol=1e-12, max_matvecs=10**5, seed=0
    )
    d = hf.ravel(found.direction)
    kept = {p: {**state} for p, state in optimizers[-1].state.items() if "exp_avg_sq" in state}
    second = {p: state["exp_avg_sq"].clone() for p, state in kept.items()}
    nuclear = float(torch.linalg.svdvals((H @ start)[:6].view(3, 2)).sum())
    for ratio, grows in ((0.99, False), (1.01, True)):
        scaled = ratio * stable.threshold / found.value * H
        model.put(d)
        for p, state in optimizers[-1].state.items():
            if p in second:
                state["exp_avg"].zero_()
        for _ in range(200):
            g = scaled @ model.flat()
            model.put(g, "grad")
            # The threshold is that of this step size lr / |g|*.
            of_weight = float(torch.linalg.svdvals(g[:6].view(3, 2)).sum())
            optimizers[0].param_groups[0]["lr"] = 0.1 * of_weight / nuclear
            for optimizer in optimizers:
                optimizer.step()
            for p, v in second.items():
                optimizers[-1].state[p]["exp_avg_sq"].copy_(v)
        assert (float(model.flat().norm() / d.norm()) > 10) == grows
        assert grows or float(model.flat().norm() / d.norm()) < 1


def test_the_learning_rate_may_be_that_of_the_next_step() -> None:
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    assert hf.stability(optimizer, model, lr=0.2).threshold == pytest.approx(15)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.3)
    assert hf.stability(optimizer, model).threshold == pytest.approx(10)


def test_nothing_of_the_optimiser_changes() -> None:
    model = Quadratic()
    optimizer = warmed(model, lambda model: torch.optim.Adam(model.parameters()), steps=3)
    before = {key: value.clone() for key, value in optimizer.state[model.bias].items()}
    stable = hf.stability(optimizer, model)
    for value in stable.preconditioner.values():
        value.zero_()
    after = optimizer.state[model.bias]
    assert all(torch.equal(before[key], after[key]) for key in before)


class Prodigy(_Each):
    pass


NAMESAKE = type("Lion", (_Each,), {})
SOME = Quadratic()


@pytest.mark.parametrize(
    ("optimizer", "error", "message"),
    [
        (Prodigy(SOME.parameters(), lr=1.0), TypeError, "pass one of Adafactor, Adagrad, Adam,"),
        (torch.optim.LBFGS(SOME.parameters()), TypeError, "LBFGS has no known stability limit"),
        (NAMESAKE(SOME.parameters(), lr=1.0), TypeError, "Lion has no 'betas' and is not a known"),
        (torch.optim.Adam(SOME.parameters()), ValueError, "Adam has no state of 'weight'"),
        (torch.optim.SGD([SOME.weight], lr=0.1), ValueError, "does not train 'bias': pass all"),
        (torch.optim.SGD(SOME.parameters(), lr=0.0), ValueError, "learning rate of 'weight' is 0"),
        (
            torch.optim.SGD(SOME.parameters(), lr=0.1, maximize=True),
            ValueError,
            "SGD with maximize=True has no stability limit",
        ),
        (
            torch.optim.SGD(SOME.parameters(), lr=0.1, momentum=0.9, dampening=1.0),
            ValueError,
            "pass a dampening",
        ),
        (
            torch.optim.SGD(SOME.parameters(), lr=0.1, momentum=0.9, dampening=2.0),
            ValueError,
            "pass a dampening",
        ),
        ([], ValueError, "optimizer is empty"),
        (SOME, TypeError, "must be a torch.optim.Optimizer"),
    ],
)
def test_steps_without_a_limit_are_refused(optimizer: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        hf.stability(optimizer, SOME)


def test_a_learning_rate_for_groups_that_differ_is_refused() -> None:
    optimizer = torch.optim.SGD(groups(SOME, {"lr": 0.1}, {"lr": 0.2}))
    with pytest.raises(ValueError, match="lr=0.3 is not the learning rate of groups that differ"):
        hf.stability(optimizer, SOME, lr=0.3)


def test_an_option_that_is_not_modelled_is_refused() -> None:
    optimizer = Lion(SOME.parameters(), lr=0.1, cautious=True)
    with pytest.raises(ValueError, match="Lion with cautious=True has no stability limit"):
        hf.stability(optimizer, SOME)


def test_frozen_parameters_need_no_optimiser() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    assert hf.stability(optimizer, model).edge == pytest.approx(20)


@pytest.mark.parametrize(
    ("make", "edge"),
    [
        (partial(Stability, threshold=20.0), 20.0),
        (partial(Stability, threshold=20.0, weight_decay={"a": 1.0, "b": 1.0}), 19.0),
        (partial(Stability, threshold=20.0, weight_decay={"a": 1.0, "b": 0.0}), None),
        (partial(Stability, threshold=20.0, preconditioner={"a": torch.ones(2)}), None),
    ],
)
def test_the_edge_is_that_of_the_hessian_itself(make: Any, edge: float | None) -> None:
    assert make().edge == edge
