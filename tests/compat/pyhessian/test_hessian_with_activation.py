"""Traces by layer, of activations and of weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.app.problems.data import cifar10
from hessfunc.app.problems.resnet import load_weights, resnet
from hessfunc.compat import pyhessian as face
from tests.cases import Residual
from tests.compat.pyhessian.problem import batches, dense, on
from tests.datapath import data_file
from tests.reference import hessian as dense_hessian

# PyHessian keeps gradients with their graphs, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


def layers() -> nn.Sequential:
    """Two layers that read the same on a skip path, and one after them."""
    branches = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    return nn.Sequential(Residual(branches), nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.parametrize("source", ["data", "dataloader"])
def test_traces_of_activations_are_those_of_the_dense_hessians(source: str) -> None:
    model, found = layers(), batches()
    used = found[:1] if source == "data" else found
    names = ["0.branch.0", "0.branch.2", "2"]
    expected = dict.fromkeys(names, 0.0)
    for x, y in used:
        for name in names:
            loss, zeros = hf.activations(
                model.double(), cross_entropy, lambda n, _, name=name: n == name
            )
            matrix = dense_hessian(loss, zeros(x.double()), (x.double(), y))
            expected[name] += len(y) * float(matrix.trace()) / sum(len(t) for _, t in used)
    model.float()

    made = face.hessian_with_activation(model, cross_entropy, **on(source, found))
    made.insert_hook("branch.0")
    made.insert_hook("2")
    samples = np.array(made.trace_activ(maxIter=400, tol=1e-6))
    assert samples.shape == (400, 3)
    assert list(made.results["trace_activ"].by_leaf) == [f"{name}[0]" for name in names]
    np.testing.assert_allclose(
        samples.mean(0), list(made.results["trace_activ"].by_leaf.values()), rtol=1e-6
    )
    stderr = samples.std(0, ddof=1) / math.sqrt(len(samples))
    assert (np.abs(samples.mean(0) - list(expected.values())) <= 4 * stderr).all()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_traces_of_weights_are_those_of_the_diagonal_blocks() -> None:
    model, found = layers(), batches()
    matrix = dense(net_of(model), "dataloader", found).diagonal()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    parts = dict(zip(sizes, matrix.split(list(sizes.values())), strict=True))
    made = face.hessian_with_activation(model, cross_entropy, dataloader=found)
    samples = np.array(made.trace(maxIter=400, tol=1e-6, param_name="weight"))
    expected = [float(part.sum()) for name, part in parts.items() if "weight" in name]
    stderr = samples.std(0, ddof=1) / math.sqrt(len(samples))
    assert (np.abs(samples.mean(0) - expected) <= 4 * stderr).all()


def net_of(model: nn.Module) -> nn.Module:
    other = layers()
    other.load_state_dict(model.state_dict())
    return other


def test_layers_that_cannot_be_chosen_are_refused() -> None:
    model, found = layers(), batches()
    made = face.hessian_with_activation(model, cross_entropy, dataloader=found[::-1])
    with pytest.raises(ValueError, match="no layer is chosen"):
        made.trace_activ()
    with pytest.raises(
        ValueError, match="no layer name ends with 'conv': the layers are 0.branch.0"
    ):
        made.insert_hook("conv")
    with pytest.raises(
        ValueError,
        match="contains param_name='conv.weight': the parameters are 0.branch.0.weight, ",
    ):
        made.trace()
    made.insert_hook("2")
    with pytest.raises(ValueError, match="a batch of 20 examples follows a first batch of 7"):
        made.trace_activ()


def test_the_inputs_of_layers_and_their_gradients_are_kept(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, found = layers(), batches()
    made = face.hessian_with_activation(model, cross_entropy, dataloader=found)
    made.insert_hook("0")
    made.insert_hook("2")
    signs = made.get_activ_rand_v(show_layer=True, dont_reset=True)
    assert capsys.readouterr().out.count("append 0.branch.0, active size : ") == 1
    assert [v.shape for v in signs] == [x[0].shape for x in made.activations.values()]
    assert all(bool((v.abs() == 1).all()) for v in signs)

    x, y = found[0]
    assert torch.equal(made.activations["0.branch.0"][0], x)
    inner = model[1](model[0](x)).detach().requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(model[2](inner), y), inner)
    torch.testing.assert_close(made.activation_grads["2"][0], expected)
    assert all(g.grad_fn is not None for (g,) in made.activation_grads.values())
    assert not any(module._forward_pre_hooks for module in model.modules())
    made.reset_reg_active()
    assert made.activations == made.activation_grads == {n: [] for n in made.activations}
    made.get_activ_rand_v()
    assert not any(made.activations.values())


def test_products_of_activations_are_those_of_the_dense_hessian() -> None:
    model, found = layers().double(), [(x.double(), y) for x, y in batches()[:1]]
    made = face.hessian_with_activation(model, cross_entropy, dataloader=found)
    made.insert_hook("2")
    signs = made.get_activ_rand_v()
    value, product = made.dataloader_activation_hv_product(signs)
    loss, zeros = hf.activations(model, cross_entropy, "2")
    v, products = (torch.cat([x.reshape(-1) for x in each]) for each in (signs, product))
    expected = dense_hessian(loss, zeros(found[0][0]), found[0]) @ v
    torch.testing.assert_close(products, expected)
    assert value == pytest.approx(float(expected @ v))
    with pytest.raises(ValueError, match="active_v has tensors of shapes"):
        made.dataloader_activation_hv_product(signs * 2)


def test_the_hessian_of_all_weights_is_there_too() -> None:
    model, found = layers(), batches()
    made = face.hessian_with_activation(model, cross_entropy, dataloader=found)
    plain = face.hessian(model, cross_entropy, dataloader=found)
    assert made.eigenvalues()[0] == pytest.approx(plain.eigenvalues()[0], rel=1e-3)


@pytest.mark.slow
def test_cells_of_the_tutorial_run_on_resnet20(capsys: pytest.CaptureFixture[str]) -> None:
    model = resnet(20)
    model.load_state_dict(load_weights(data_file("resnet20_cifar10/resnet20-12fca82f.th")))
    model.eval()
    images = cifar10(data_file("cifar10"))
    x, y = images.inputs[:20], images.targets[:20]
    train_loader = [(x[:10], y[:10]), (x[10:], y[10:])]
    criterion = nn.CrossEntropyLoss()

    hessian_comp = face.hessian_with_activation(model, criterion, dataloader=train_loader)
    hessian_comp.insert_hook("conv2")
    act_trace = hessian_comp.trace_activ(maxIter=2, tol=1e-6)
    assert np.mean(act_trace, axis=0).shape == (9,)
    weight_trace = hessian_comp.trace(maxIter=2, param_name="conv2.weight")
    assert np.isfinite(np.mean(weight_trace, axis=0)).all()

    hessian_comp.get_activ_rand_v(show_layer=True, dont_reset=True)
    assert capsys.readouterr().out.count("append ") == 9
    for layer in hessian_comp.activation_grads:
        has_grad = hessian_comp.activation_grads[layer][0]
        assert has_grad is not None
        assert has_grad.grad_fn is not None
        input_size = torch.randint_like(hessian_comp.activations[layer][0], high=2).size()
        assert has_grad.size() == input_size

    device = hessian_comp.device
    for inputs, targets in hessian_comp.data:
        hessian_comp.model.zero_grad()
        hessian_comp.reset_reg_active()
        outputs = hessian_comp.model(inputs.to(device))
        loss = hessian_comp.criterion(outputs, targets.to(device))
        loss.backward(create_graph=True)
        break
    params, grads = face.get_params_grad(hessian_comp.model)
    assert all(g.grad_fn is not None for g in grads)
    assert [p.size() for p in params] == [g.size() for g in grads]
    hessian_comp.model.zero_grad()
