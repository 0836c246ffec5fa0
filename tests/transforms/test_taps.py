import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.transforms import taps
from tests.cases import case
from tests.reference import (
    block_diagonal,
    hessian,
    matrix,
    relative_error,
)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "activation",
    [
        *(nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish()),
        *(nn.Softplus(), nn.ELU(), nn.SELU(), nn.CELU(), nn.LogSigmoid(), nn.Hardswish()),
        *(nn.Tanhshrink(), nn.Softmin(-1), nn.LogSoftmax(-1), nn.LayerNorm(4)),
        *(nn.ReLU6(), nn.PReLU(), nn.Softshrink()),
    ],
    ids=lambda module: type(module).__name__,
)
def test_usual_activations_give_the_hessians_blocks(activation: nn.Module) -> None:
    another = copy.deepcopy(activation)
    model = nn.Sequential(
        nn.Linear(3, 4), activation, nn.Linear(4, 4), another, nn.Linear(4, 4)
    ).double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.mse_loss)
    batch = randn(5, 3), randn(5, 4)
    product = matrix(hf.pchvp(loss, residual="none")(params, batch), params)
    expected = block_diagonal(hessian(loss, params, batch), params)
    assert relative_error(product, expected) < 1e-8


@pytest.mark.parametrize(
    "normalisation",
    [
        *(nn.LayerNorm([4, 3]), nn.GroupNorm(2, 4), nn.GroupNorm(4, 4, affine=False)),
        *(nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval(), nn.InstanceNorm1d(4)),
    ],
    ids=["layer norm", "group norm", "plain", "batch norm", "batch norm, eval", "instance norm"],
)
def test_normalisations_take_the_eigenvalues_of_their_rows(normalisation: nn.Module) -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 1), normalisation, nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    ).double()
    normalisation.train(normalisation.training)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    batch = randn(5, 2, 3), torch.arange(5) % 3
    kinds = ("none", "clip", "abs")
    exact, positive, absolute = (
        matrix(hf.pchvp(loss, residual=kind)(params, batch), params) for kind in kinds
    )
    expected = block_diagonal(hessian(loss, params, batch), params)
    assert relative_error(exact, expected) < 1e-8
    # |R| = 2 max(R, 0) - R holds for matrices that are functions of one another.
    assert relative_error(absolute, 2 * positive - exact) < 1e-8
    assert torch.linalg.eigvalsh(absolute).min() > -1e-12
    assert torch.linalg.eigvalsh(positive).min() > -1e-12


def test_a_product_of_entries_has_the_absolute_value_of_its_cross() -> None:
    # The loss is the product's sum, so g = 1 and the residual is all there is.
    params = {"w": torch.tensor([2.0, -3.0]).double()}
    loss = hf.composed(lambda p, x: (p["w"] * x[0]) * (p["w"] * x[1]), lambda z, _: z.sum())
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]]).double()
    found = matrix(hf.pchvp(loss, residual="abs")(params, x), params)
    torch.testing.assert_close(found, (x[0].square() + x[1].square()).diag())


def test_rows_too_long_to_decompose_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "_LONGEST_ROW", 3)
    found = case("layer norm")
    with pytest.raises(NotImplementedError, match="NativeLayerNorm acts on rows of"):
        hf.pchvp(found.loss)(found.params, found.batch)


def test_curvature_that_replaces_negative_values() -> None:
    values = torch.tensor([-2.0, 0.0, 3.0])
    assert taps.positive(values, "abs").tolist() == [2, 0, 3]
    assert taps.positive(values, "clip").tolist() == [0, 0, 3]
    assert taps.positive(values, "zero").tolist() == [0, 0, 0]
    assert taps.positive(values, "none").tolist() == [-2, 0, 3]
