"""Optimisers and schedules that options select."""

from typing import Any

import pytest

from hessfunc.app.cli.methods import OF_ABSA, OF_NEWTON, OF_SGD, epochs_of, optimiser, schedule
from hessfunc.optim.schedules import absa, constant
from hessfunc.training.methods import SGD, BlockNewton

NO_SGD, NO_NEWTON, NO_ABSA = map(dict.fromkeys, (OF_SGD, OF_NEWTON, OF_ABSA))


def test_options_that_are_given_choose_the_optimiser() -> None:
    assert optimiser(None, 0.1, NO_SGD, NO_NEWTON) == SGD(lr=0.1)
    assert optimiser("sgd", 0.1, NO_SGD | {"momentum": 0.5}, NO_NEWTON) == SGD(lr=0.1, momentum=0.5)
    newton = optimiser(None, 0.1, NO_SGD, NO_NEWTON | {"alpha": 0.2})
    assert newton == BlockNewton(curvature="hbp-abs", lr=0.1, alpha=0.2)
    assert optimiser("newton", 1.0, NO_SGD, NO_NEWTON | {"curvature": "ggn"}) == BlockNewton(
        curvature="ggn", lr=1.0
    )


@pytest.mark.parametrize(
    ("name", "of_sgd", "of_newton", "message"),
    [
        ("newton", {"weight_decay": 1e-4}, {}, "--weight-decay requires --optimizer sgd"),
        (None, {"momentum": 0.9}, {"alpha": 0.1}, "--momentum requires --optimizer sgd"),
        ("sgd", {}, {"max_matvecs": 3}, "--cg-max requires --optimizer newton"),
    ],
)
def test_options_of_another_optimiser_are_refused_by_their_flag(
    name: str | None, of_sgd: dict[str, Any], of_newton: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        optimiser(name, 0.1, NO_SGD | of_sgd, NO_NEWTON | of_newton)


def test_a_schedule_has_the_settings_that_are_recorded() -> None:
    decay: dict[str, Any] = {"lr_decay": 0.1, "lr_decay_epochs": (3,)}
    made, settings = schedule("sgd", epochs=5, large_ratio=4, of_absa=NO_ABSA, **decay)
    assert settings == decay | {"ratio": 4}
    assert made.init() == constant(**settings).init()
    chosen = NO_ABSA | {"patience": 2, "eps": 0.01}
    made, settings = schedule("absa", epochs=5, large_ratio=None, of_absa=chosen, **decay)
    assert settings == decay | {"epochs": 5, "max_ratio": 128, "patience": 2, "eps": 0.01}
    assert made.init() == absa(epochs=5, max_ratio=128, patience=2, **decay).init()


def test_epochs_are_numbers_between_commas_or_blanks() -> None:
    assert epochs_of("30,60") == epochs_of("30 60") == (30, 60)
    assert epochs_of("") == ()
    with pytest.raises(ValueError, match="--lr-decay-epoch 30,60$"):
        epochs_of("30", ["60"])
