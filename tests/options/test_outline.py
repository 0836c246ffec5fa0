"""Outlines of functions, by which ranks compare their options."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import cross_entropy, mse_loss

import hessfunc as hf
from hessfunc.options.outline import outline


def loss(criterion: object = cross_entropy) -> hf.Loss:
    return hf.supervised(hf.functional(torch.nn.Linear(3, 2))[0], criterion)


def test_equal_options_have_equal_outlines() -> None:
    assert outline(hf.hvp(loss())) == outline(hf.hvp(loss()))


def test_each_option_is_part_of_the_outline() -> None:
    made = [
        hf.hvp(loss()),
        hf.hvp(loss(mse_loss)),
        hf.hvp(loss(), mode="forward"),
        hf.hvp(loss(), chunk_size=3),
        hf.ggnvp(loss()),
        hf.fvp(loss(), samples=2, seed=1),
        hf.fvp(loss(), samples=2, seed=2),
        partial(len, 3),
        partial(len, 4),
        None,
        2,
    ]
    assert len({outline(each) for each in made}) == len(made)


def test_functions_of_others_have_only_a_name() -> None:
    def weight(count: int) -> object:
        return lambda _: count

    assert outline(weight(1)) == outline(weight(2))
