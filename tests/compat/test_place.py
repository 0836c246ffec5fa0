"""What all faces do with a script's model and its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.compat import eigenthings, hessianflow, pyhessian
from hessfunc.compat.place import moved
from hessfunc.modules import bare
from tests.reference import hessian

Face = Callable[[nn.Module, Any], float]


def of_pyhessian(model: nn.Module, batch: Any) -> float:
    return pyhessian.hessian(model, cross_entropy, data=batch).eigenvalues(tol=1e-6)[0][0]


def of_eigenthings(model: nn.Module, batch: Any) -> float:
    found = eigenthings.compute_hessian_eigenthings(
        model, [batch], cross_entropy, 1, mode="lanczos"
    )
    return float(found[0][0])


def of_hessianflow(model: nn.Module, batch: Any) -> float:
    return hessianflow.get_eigen(model, *batch, cross_entropy, tol=1e-6)[0]


def of_hessianflows_data_set(model: nn.Module, batch: Any) -> float:
    return hessianflow.get_eigen_full_dataset(model, [batch], cross_entropy, tol=1e-6)[0]


FACES = [of_pyhessian, of_eigenthings, of_hessianflow, of_hessianflows_data_set]
faces = pytest.mark.parametrize("face", FACES)


class OfBoth(nn.Module):
    """The inputs are one thing, a pair or a mapping, with something beside that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, inputs: Any) -> Tensor:
        x, y, sign = inputs.values() if isinstance(inputs, dict) else inputs
        return self.linear(x + y if sign == "+" else x - y)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(20, 4, dtype=torch.float64), torch.randint(3, (20,))


def largest(model: nn.Module, batch: Any) -> float:
    """Of the dense Hessian, in eval mode."""
    model_fn, params = hf.functional(model.eval())
    values = torch.linalg.eigvalsh(hessian(hf.supervised(model_fn, cross_entropy), params, batch))
    return float(values[values.abs().argmax()])


@faces
@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_a_model_is_called_with_the_inputs_as_they_are(face: Face, kind: type) -> None:
    x, targets = data()
    parts = {"x": x, "y": 2 * x, "sign": "-"}
    model = OfBoth().eval()
    found = face(model, (parts if kind is dict else kind(parts.values()), targets))
    assert found == pytest.approx(largest(model.linear, (-x, targets)), rel=1e-6)


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@faces
@pytest.mark.parametrize("wrapper", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_a_model_that_is_wrapped_for_data_parallelism_is_unwrapped(
    face: Face, wrapper: type[nn.Module], group: None
) -> None:
    model, batch = nn.Sequential(nn.Linear(4, 3)).double().eval(), data()
    wrapped = wrapper(model).eval()
    assert bare(wrapped) is bare(model) is model
    assert face(wrapped, batch) == pytest.approx(largest(model, batch), rel=1e-6)


@faces
def test_a_penalty_on_the_parameters_of_the_model_itself_counts(
    face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = nn.Sequential(nn.Linear(4, 3)).double().eval(), data()

    def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
        penalty = torch.stack([0.25 * p.square().sum() for p in model.parameters()]).sum()
        return nn.functional.cross_entropy(outputs, targets) + penalty

    # The faces of this file take the criterion by its name.
    monkeypatch.setitem(globals(), "cross_entropy", penalised)
    found = face(model, batch)
    monkeypatch.undo()
    assert found == pytest.approx(largest(model, batch) + 0.5, rel=1e-6)


@faces
@pytest.mark.filterwarnings("ignore:the model is in train mode")
def test_the_curvature_is_that_of_eval_mode(face: Face) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model.double().train()
    batch = data()
    found = face(model, batch)
    assert all(module.training for module in model.modules())
    assert found == pytest.approx(largest(model, batch), rel=1e-6)


@pytest.mark.parametrize(
    ("batch", "size"),
    [({"x": 1, "y": 2}, "dict of length 2"), ((1, 2, 3), "tuple of length 3"), (1, "int:")],
)
def test_a_batch_that_is_no_pair_is_refused(batch: Any, size: str) -> None:
    with pytest.raises(TypeError, match=rf"a batch must be a pair .* got a {size}"):
        moved(batch, torch.device("cpu"))


@pytest.mark.parametrize(
    "batch", [lambda x, y: {"x": x, "y": y}, lambda x, y: (x, y, y)], ids=["mapping", "triple"]
)
def test_faces_refuse_a_batch_that_is_no_pair(batch: Callable[..., Any]) -> None:
    model, found = nn.Sequential(nn.Linear(4, 3)).double().eval(), batch(*data())
    made = pyhessian.hessian_with_activation(model, cross_entropy, dataloader=[found])
    made.insert_hook("0")
    for run in (
        lambda: pyhessian.hessian(model, cross_entropy, data=found),
        lambda: pyhessian.hessian(model, cross_entropy, dataloader=[found]).trace(),
        made.trace_activ,
        lambda: of_eigenthings(model, found),
        lambda: of_hessianflows_data_set(model, found),
    ):
        with pytest.raises(TypeError, match="a batch must be a pair"):
            run()
