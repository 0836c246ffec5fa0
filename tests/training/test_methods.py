"""Optimisers with their settings."""

from __future__ import annotations

import pytest
from torch import nn

from hessfunc.app.problems.nets import mlp
from hessfunc.training.methods import CURVATURES, BlockNewton, blocks_of
from tests.training.blobs import blobs


@pytest.mark.parametrize("curvature", CURVATURES)
def test_each_curvature_has_blocks_of_each_parameter(curvature: str) -> None:
    model = mlp([2, 3, 2], nn.Sigmoid)
    params = {name: p.detach() for name, p in model.named_parameters()}
    blocks = blocks_of(curvature, model)(params, (blobs().inputs, blobs().targets))
    assert list(blocks) == list(params)
    for name, p in params.items():
        block = blocks[name]
        assert getattr(block, "matvec", block)(p[None]).shape == (1, *p.shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "nothing"}, "choose one of hbp-none"),
        ({"curvature": "ggn", "max_blocks": 2}, "requires an hbp curvature"),
        ({"curvature": "hessian", "solve": "direct"}, "solve by cg"),
        ({"curvature": "ggn", "solve": "guess"}, "solve='guess'"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockNewton(**options)
