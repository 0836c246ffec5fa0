from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hessfunc as hf
from hessfunc.options import functions


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (nn.Linear(2, 2), "functional"),
        (torch.eye(2), "dense"),
        (np.eye(2), "from_scipy"),
        (lambda params, batch: params, r"hvp\(loss\)\(params, batch\)"),
        (3, r"hvp\(loss\)\(params, batch\)"),
    ],
)
def test_what_is_no_matvec_leads_to_one(given: Any, remedy: str) -> None:
    with pytest.raises(TypeError, match=f"matvec.*{remedy}"):
        functions.matvec("matvec", given)


def test_functions_are_told_apart_by_their_arguments() -> None:
    matvec, loss = hf.dense(torch.eye(2)), hf.supervised(lambda p, x: x, nn.MSELoss())
    assert functions.matvec("matvec", matvec) is matvec
    assert functions.loss("loss", loss) is loss
    curvature = hf.hvp(loss)
    assert functions.curvature("curvature", curvature) is curvature
    for either in (curvature, matvec):
        assert functions.curvature_or_matvec("curvature", either) is either
    with pytest.raises(TypeError, match="a curvature function"):
        functions.curvature_or_matvec("curvature", loss)
    with pytest.raises(TypeError, match="one argument, like a matvec"):
        functions.curvature("curvature", lambda v: v)
    with pytest.raises(TypeError, match="a curvature function"):
        functions.curvature("curvature", loss)


def test_a_criterion_is_an_instance() -> None:
    with pytest.raises(TypeError, match=r"criterion=MSELoss\(\)"):
        functions.criterion("criterion", nn.MSELoss)
