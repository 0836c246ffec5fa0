"""Loss and accuracy of a classifier."""

from __future__ import annotations

import pytest
from torch.nn import functional as F

from hessfunc.app.problems.nets import mlp
from hessfunc.app.problems.targets import TargetError, make_problem
from hessfunc.training.loop import train
from hessfunc.training.methods import SGD
from tests.training.blobs import blobs
from tests.training.problem import small_net


def test_evaluations_are_made_in_eval_mode_and_leave_the_mode() -> None:
    model = small_net()
    records = list(train(model, SGD().steps(model), blobs(), epochs=1, batch_size=30))
    assert model.training
    model.eval()
    expected = F.cross_entropy(model(blobs().inputs), blobs().targets)
    assert records[-1].loss == pytest.approx(expected.item())


def test_an_empty_loader_is_named() -> None:
    with pytest.raises(TargetError, match="the loader is empty"):
        make_problem("it", (mlp([4, 3]), F.cross_entropy, [])).evaluate()
