from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hessfunc.app.problems.data import cifar10
from hessfunc.app.problems.fit import accuracy
from hessfunc.app.problems.gpt import GPT, next_token_loss
from hessfunc.app.problems.nets import c1, c2, c3d3, c4d3, chen_mlp, digits_convnet, mlp
from hessfunc.app.problems.resnet import load_weights, resnet
from tests.datapath import data_file


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (mlp([64, 32, 10]), 2_410),
        (mlp([784, 256, 256, 10]), 269_322),
        (digits_convnet(), 9_930),
        (GPT(), 867_072),
        (resnet(20), 269_722),
        (chen_mlp(), 3_846_810),
        (c4d3(), 1_099_226),
        (c3d3(), 895_210),
        (c1(), 1_756_682),
        (c1(1, 28), 1_384_842),
        (c2(), 1_148_746),
        (resnet(8, channels=1), 75_002),
    ],
)
def test_sizes(model: nn.Module, parameters: int) -> None:
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_mlp_takes_any_shape_and_activation() -> None:
    model = mlp([4, 3, 2], nn.Tanh)
    assert model(torch.zeros(5, 2, 2)).shape == (5, 2)
    assert [type(m) for m in model] == [nn.Flatten, nn.Linear, nn.Tanh, nn.Linear]


@pytest.mark.parametrize("make", [chen_mlp, c4d3, c3d3])
def test_nets_for_cifar10_are_sequential(make: Callable[[], nn.Sequential]) -> None:
    model = make()
    assert type(model) is nn.Sequential
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert not any(list(module.children()) for module in model)


@pytest.mark.parametrize("make", [c1, c2, lambda channels, size: resnet(20, channels=channels)])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32), (1, 17)])
def test_nets_for_images_of_several_sizes(
    make: Callable[[int, int], nn.Module], channels: int, size: int
) -> None:
    if make is c2 and size < 16:
        pytest.skip("c2 has no padding")
    assert make(channels, size)(torch.randn(2, channels, size, size)).shape == (2, 10)


@pytest.mark.parametrize("make", [chen_mlp, c3d3])
def test_xavier_weights_and_no_biases(make: Callable[[], nn.Sequential]) -> None:
    for module in make():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert not module.bias.any()
            fan_out = module.weight.shape[0] * module.weight[0, 0].numel()
            spread = (2 / (module.weight[0].numel() + fan_out)) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(spread, rel=0.2)


def test_pooling_of_c3d3_is_that_of_tensorflow() -> None:
    # 28, 12 and 6 pixels become half as many, and the last windows see one pixel less.
    shapes = []
    x = torch.zeros(1, 3, 32, 32)
    for module in c3d3(nn.Sigmoid):
        x = module(x)
        if isinstance(module, nn.MaxPool2d):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 14, 14), (96, 6, 6), (128, 3, 3)]
    pad, pool = c3d3()[2:4]
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert pool(pad(image)).flatten().tolist() == [10, 11, 14, 15]


@pytest.mark.parametrize("make", [c4d3, c3d3])
def test_activations_are_given(make: Callable[..., nn.Sequential]) -> None:
    kinds = [type(m) for m in make(nn.Tanh)]
    assert kinds.count(nn.Tanh) in (5, 6)
    assert nn.ReLU not in kinds


@pytest.mark.parametrize("tied", [True, False])
def test_gpt_sees_no_later_token(tied: bool) -> None:
    model = GPT(vocabulary=11, context=8, width=8, layers=2, heads=2, tied=tied)
    tokens = torch.randint(11, (3, 6))
    changed = tokens.clone()
    changed[:, 4:] = (tokens[:, 4:] + 1) % 11
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
    assert next_token_loss(before, tokens).shape == ()
    assert (model.head.weight is model.tokens.weight) == tied


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
