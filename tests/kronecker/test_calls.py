"""How a loss calls its model, and what keeps examples from being independent."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.kronecker.cases import STRUCTURED, eight_rows


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.Dropout])
def test_train_mode_is_refused(layer: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), layer(3) if layer is nn.BatchNorm1d else layer())
    model_fn, params = hf.functional(model.train())
    loss = hf.supervised(model_fn, F.mse_loss)
    with pytest.raises(ValueError, match="call `model.eval\\(\\)` before"):
        hf.kronecker.hbp(loss, model)(params, (torch.zeros(2, 3), torch.zeros(2, 3)))


def test_loss_of_another_model_or_with_other_outputs() -> None:
    case, other = eight_rows(), eight_rows()
    for structured in STRUCTURED.values():
        with pytest.raises(ValueError, match="evaluates another Sequential and does not call this"):
            structured(case.loss, other.model)(case.params, case.batch)
        with pytest.raises(ValueError, match="evaluates a Sequential and does not call this Tanh"):
            structured(case.loss, nn.Tanh())(case.params, case.batch)
    twice = hf.Loss(lambda p, b: 2 * case.loss.outputs(p, b), case.loss.criterion)
    with pytest.raises(ValueError, match="move casts and other operations"):
        hf.kronecker.hbp(twice, case.model)(case.params, case.batch)


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize("within", [False, True])
def test_a_compiled_model_is_refused_for_the_plain_one(name: str, within: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = torch.randn(6, 4).double(), torch.arange(6) % 3
    compiled = torch.compile(model, backend="eager")
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    given = nn.Sequential(compiled) if within else compiled
    place = r"model\.0" if within else "model"
    with pytest.raises(
        NotImplementedError, match=rf"{place} is compiled.*take `{place}\._orig_mod`"
    ):
        STRUCTURED[name](loss, given)
    plain = (given[0] if within else given)._orig_mod
    found = STRUCTURED[name](loss, plain)(params, batch)
    assert found["2.bias"].trace() == STRUCTURED[name](loss, model)(params, batch)["2.bias"].trace()


@pytest.mark.parametrize("name", STRUCTURED)
def test_a_model_that_is_compiled_in_place_is_taken(name: str) -> None:
    def blocks(compiled: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        if compiled:
            model.compile(backend="eager")
            model[0].compile(backend="eager")
        batch = torch.randn(6, 4).double(), torch.arange(6) % 3
        model_fn, params = hf.functional(model)
        curvature = STRUCTURED[name](hf.supervised(model_fn, F.cross_entropy), model)
        return torch.stack([block.dense().trace() for block in curvature(params, batch).values()])

    torch.testing.assert_close(blocks(True), blocks(False))


def test_a_part_of_the_model_of_the_loss_is_refused() -> None:
    """Layers outside of the part could be random or mix examples."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3)).double()
    batch = torch.randn(6, 4).double(), torch.arange(6) % 3
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    with pytest.raises(ValueError, match="whose module '1' does not belong to this Sequential"):
        hf.kronecker.kflr(loss, model[0])(params, batch)
    wrapped = nn.Sequential(model, nn.Linear(1, 1))
    assert set(hf.kronecker.kflr(loss, wrapped)(params, batch)) == set(params)


def test_the_loss_may_evaluate_a_teacher_beside_its_model() -> None:
    student, teacher = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    (student_fn, params), (teacher_fn, fixed) = hf.functional(student), hf.functional(teacher)
    loss = hf.supervised(
        lambda p, x: student_fn(p, x) + teacher_fn(fixed, x).detach(), F.cross_entropy
    )
    batch = torch.randn(6, 4).double(), torch.arange(6) % 3
    assert set(hf.kronecker.kflr(loss, student)(params, batch)) == set(params)
