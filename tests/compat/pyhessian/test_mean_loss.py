"""Mean loss of a model that a script changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hessfunc.compat import pyhessian as face
from tests.compat.pyhessian.problem import Batch, batches, dense, net, net_like

# PyHessian keeps gradients with their graphs, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_in_eval_mode_and_left_as_it_was(training: bool) -> None:
    model, found = net(), batches()
    model.train(training)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    made = face.hessian(model, cross_entropy, dataloader=found)
    value = made.eigenvalues()[0][0]
    made.trace(maxIter=3)
    made.density(iter=4)
    assert made.gradsH
    assert [module.training for module in model.modules()] == [training] * 5
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])
    assert bool((model[0].weight.grad == 1).all())
    assert all(p.grad is None for p in list(model.parameters())[1:])
    largest = torch.linalg.eigvalsh(dense(model, "dataloader", found)).abs().max()
    assert value == pytest.approx(float(largest), rel=1e-3)


def test_parameters_are_those_of_the_moment() -> None:
    model, found = net(), batches()
    made = face.hessian(model, cross_entropy, data=found[0])
    made.eigenvalues()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    largest = torch.linalg.eigvalsh(dense(net_like(model), "data", found)).abs().max()
    assert made.eigenvalues()[0][0] == pytest.approx(float(largest), rel=1e-3)


def test_parameters_that_are_thawed_later_count() -> None:
    model, found = net(), batches()
    model[0].requires_grad_(False)
    made = face.hessian(model, cross_entropy, data=found[0])
    model.requires_grad_(True)
    _, (vector,) = made.eigenvalues()
    assert [v.shape for v in vector] == [p.shape for p in made.params]
    product = face.hessian_vector_product(made.gradsH, made.params, vector)
    torch.testing.assert_close(
        list(product), made.dataloader_hv_product(vector)[1], rtol=1e-3, atol=1e-4
    )


def test_cuda_is_where_the_parameters_are() -> None:
    model, found = net(), batches()
    made = [face.hessian(model, cross_entropy, data=found[0], cuda=cuda) for cuda in (True, False)]
    assert [h.device for h in made] == ["cpu", "cpu"]
    assert made[0].eigenvalues()[0] == pytest.approx(made[1].eigenvalues()[0], rel=1e-4)


@pytest.mark.gpu
def test_batches_go_to_the_gpu_of_the_parameters() -> None:
    model, found = net(), batches()
    expected = face.hessian(model, cross_entropy, dataloader=found).eigenvalues()[0]
    made = face.hessian(nn.DataParallel(model.cuda()), cross_entropy, dataloader=found, cuda=False)
    assert made.device == "cuda:0"
    assert made.eigenvalues()[0] == pytest.approx(expected, rel=1e-3)


def test_a_model_that_is_wrapped_for_data_parallelism_is_unwrapped() -> None:
    model, found = net(), batches()
    made = face.hessian(nn.DataParallel(model), cross_entropy, data=found[0])
    made.trace(maxIter=2)
    assert list(made.results["trace"].by_leaf) == [name for name, _ in model.named_parameters()]


def test_random_augmentation_is_refused() -> None:
    class Augmented:
        def __iter__(self) -> Iterator[Batch]:
            yield torch.randn(20, 4), torch.zeros(20, dtype=torch.long)

    made = face.hessian(net(), cross_entropy, dataloader=Augmented())
    with pytest.raises(ValueError, match="saw different examples"):
        made.eigenvalues()
