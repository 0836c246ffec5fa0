"""Data sets and networks by name."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from hessfunc.app import tasks
from hessfunc.app.problems.nets import mlp
from hessfunc.training.methods import blocks_of
from tests.datapath import data_file


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="--arch must be one of mlp, convnet, c1"):
        tasks.net("digits", "c4d3")
    with pytest.raises(ValueError, match="choose one of"):
        blocks_of("nothing", mlp([2, 2]))


def test_examples_of_both_data_sets() -> None:
    pytest.importorskip("sklearn")
    seen, held_out = tasks.examples("digits")
    assert (len(seen), len(held_out)) == (1500, 297)
    seen, held_out = tasks.examples("cifar10", path=data_file("cifar10"), count=20)
    assert (len(seen), len(held_out)) == (20, 20)
    assert seen.inputs.shape == (20, 3, 32, 32)
    assert asdict(seen).keys() == {"inputs", "targets"}
