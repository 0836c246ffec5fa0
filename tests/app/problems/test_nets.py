from collections.abc import Callable

import pytest
import torch
from torch import nn

from hessfunc.app.problems.gpt import GPT
from hessfunc.app.problems.nets import c1, c2, c3d3, c4d3, chen_mlp, digits_convnet, mlp
from hessfunc.app.problems.resnet import resnet


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
