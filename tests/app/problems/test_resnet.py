"""ResNets for CIFAR-10 and their weights."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from hessfunc.app.problems.data import cifar10
from hessfunc.app.problems.fit import accuracy
from hessfunc.app.problems.nets import mlp
from hessfunc.app.problems.resnet import load_weights, resnet
from tests.datapath import data_file


@pytest.mark.parametrize("depth", [1, 2, 18, 21])
def test_resnet_refuses_other_depths(depth: int) -> None:
    with pytest.raises(ValueError, match=r"6n \+ 2"):
        resnet(depth)


def test_resnet20_classifies_cifar10() -> None:
    model = resnet(20)
    model.load_state_dict(load_weights(data_file("resnet20_cifar10/resnet20-12fca82f.th")))
    model.eval()
    test = cifar10(data_file("cifar10"))
    assert accuracy(model, test) == pytest.approx(0.915)
    with torch.no_grad():
        assert F.cross_entropy(model(test.inputs), test.targets) == pytest.approx(0.384, abs=5e-4)


def test_weights_lose_the_prefix_of_data_parallel(tmp_path: Path) -> None:
    model = mlp([3, 2])
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    for content in (state, {"state_dict": state}, model.state_dict()):
        torch.save(content, tmp_path / "weights.pt")
        model.load_state_dict(load_weights(tmp_path / "weights.pt"))


def test_bad_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="resnet20-12fca82f.th of https://github.com"):
        load_weights(tmp_path / "none.th")
    (tmp_path / "text.th").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="text.th is not a checkpoint"):
        load_weights(tmp_path / "text.th")
