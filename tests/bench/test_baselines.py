from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional as F

from bench import baselines
from bench.speed.models import made


def test_gauss_newton_is_the_hessian_of_a_linear_model() -> None:
    case = made("mlp-small")
    linear = replace(case, model=torch.nn.Linear(64, 10), criterion=F.cross_entropy)
    vector = [torch.randn_like(p) for p in linear.parameters]
    found = baselines.gauss_newton(linear)(vector)
    for ours, expected in zip(found, baselines.kept(linear)(vector), strict=True):
        torch.testing.assert_close(ours, expected)
