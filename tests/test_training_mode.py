"""Training flags, and batch statistics among several batches."""

import pytest
import torch
from torch import nn

import hessfunc as hf
from hessfunc.training_mode import several_batches


def test_the_training_flags_are_read_once() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    model[1].eval()
    model_fn, params = hf.functional(model)
    x = torch.randn(6, 3)
    before = model_fn(params, x)
    for training in (True, False):
        model.train(training)
        assert torch.equal(model_fn(params, x), before)
        assert all(module.training == training for module in model.modules())


def test_the_training_flags_come_back_when_the_module_raises() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    model_fn, params = hf.functional(model)
    model.train()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model_fn(params, torch.randn(2, 7))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("norm", "training", "refused"),
    [
        (nn.BatchNorm1d(4), True, True),
        (nn.BatchNorm1d(4), False, False),
        (nn.BatchNorm1d(4, track_running_stats=False), False, True),
        (nn.LayerNorm(4), True, False),
    ],
)
def test_batch_statistics_are_refused_among_several_batches(
    norm: nn.Module, training: bool, refused: bool
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), norm).train(training)
    model_fn, params = hf.functional(model)
    model_fn(params, torch.randn(5, 3))
    with several_batches():
        if refused:
            with pytest.raises(ValueError, match=r"BatchNorm '1' uses.*call `model.eval\(\)`"):
                model_fn(params, torch.randn(5, 3))
        else:
            model_fn(params, torch.randn(5, 3))
