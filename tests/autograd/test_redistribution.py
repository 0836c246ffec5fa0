"""Products with a tensor-parallel module are those of the module itself."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.distributed.tensor import _api

import hessfunc as hf
from tests.distributed import modules, problems
from tests.distributed.ranks import Ranks

CURVATURES = {
    "hvp": hf.hvp,
    "hvp, difference": partial(hf.hvp, mode="difference"),
    "ggnvp": hf.ggnvp,
    "fvp": hf.fvp,
    "sampled fvp": partial(hf.fvp, samples=2, seed=1),
    "efvp": hf.efvp,
}


def curvature_differs_by(name: str, curvature: str, ranks: int) -> float:
    module = modules.tensor_parallel(name, problems.mesh(ranks, names=("tensor",)))
    return modules.differs_by(CURVATURES[curvature], module, name)


@pytest.mark.parametrize("name", modules.MODELS)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_curvatures_are_those_of_the_module_itself(name: str, curvature: str, two: Ranks) -> None:
    bound = 1e-9 if curvature == "hvp, difference" else 1e-12
    assert max(two.run(curvature_differs_by, name, curvature, 2)) < bound


@pytest.mark.parametrize("name", modules.MODELS)
def test_on_four_ranks(name: str, four: Ranks) -> None:
    assert max(four.run(curvature_differs_by, name, "hvp", 4)) < 1e-12


def runs_differ_by(name: str) -> tuple[float, float]:
    module = modules.tensor_parallel(name, problems.mesh(2, names=("tensor",)))
    loss, params = modules.loss_of(module)
    matvec = hf.hvp(loss)(params, modules.batch(name))
    return modules.runs_differ_by(matvec, params, name)


@pytest.mark.parametrize("name", modules.MODELS)
def test_eigenvalues_and_traces_are_those_of_the_module_itself(name: str, two: Ranks) -> None:
    for eigenvalues, trace in two.run(runs_differ_by, name):
        assert eigenvalues < 1e-8
        assert trace < 1e-10


def residual_differs_by() -> float:
    module = modules.tensor_parallel("mlp", problems.mesh(2, names=("tensor",)))
    return modules.differs_by(hf.pchvp, module, "mlp")


def test_the_positive_curvature_of_an_mlp(two: Ranks) -> None:
    assert max(two.run(residual_differs_by)) < 1e-12


def sequence_parallel_differs_by() -> float:
    mesh = problems.mesh(2, names=("tensor",))
    module = modules.tensor_parallel("transformer", mesh, sequence=True)
    return modules.differs_by(hf.hvp, module, "transformer")


def test_a_module_with_sequence_parallel_norms(two: Ranks) -> None:
    assert max(two.run(sequence_parallel_differs_by)) < 1e-12


def over_data_and_tensor() -> float:
    mesh = problems.mesh(2, 2, names=("data", "tensor"))
    batches = [modules.batch("transformer", seed=seed) for seed in range(3)]
    loss, params = modules.loss_of(modules.model("transformer"))
    block = modules.random_block(params, 2)
    wanted = hf.over_batches(hf.hvp(loss))(params, batches)(block)
    loss, params = modules.loss_of(modules.tensor_parallel("transformer", mesh["tensor"]))
    block = modules.random_block(params, 2)
    matvec = hf.over_batches(hf.hvp(loss), mesh=mesh["data"])(params, batches)
    return modules.error(matvec(block), wanted)


def test_batches_over_one_axis_of_a_mesh_and_tensors_over_the_other(four: Ranks) -> None:
    assert max(four.run(over_data_and_tensor)) < 1e-12


def nothing_is_left() -> bool:
    before = _api._FromTorchTensor.backward
    runs_differ_by("mlp")
    return _api._FromTorchTensor.backward is before


def test_torch_is_left_as_it_was(two: Ranks) -> None:
    assert all(two.run(nothing_is_left))


def changed_in_place() -> None:
    module = modules.tensor_parallel("mlp", problems.mesh(2, names=("tensor",)))
    loss, params = modules.loss_of(module)
    matvec = hf.hvp(loss)(params, modules.batch("mlp"))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    matvec(modules.random_block(params, 1))


def with_mode_forward() -> None:
    module = modules.tensor_parallel("mlp", problems.mesh(2, names=("tensor",)))
    modules.differs_by(partial(hf.hvp, mode="forward"), module, "mlp")


def with_blocks() -> None:
    module = modules.tensor_parallel("mlp", problems.mesh(2, names=("tensor",)))
    loss, params = modules.loss_of(module)
    hf.kronecker.kfac(loss, module, seed=0)(params, modules.batch("mlp"))


def with_backpropagated_blocks() -> None:
    module = modules.tensor_parallel("mlp", problems.mesh(2, names=("tensor",)))
    loss, params = modules.loss_of(module)
    hf.kronecker.hbp(loss, module)(params, modules.batch("mlp"))


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (changed_in_place, "RuntimeError: '0.weight' has changed in place"),
        (with_mode_forward, "NotImplementedError: DTensors have no forward mode: use"),
        (with_blocks, "NotImplementedError: structured blocks do not support DTensor parameters"),
        (
            with_backpropagated_blocks,
            "NotImplementedError: structured blocks do not support DTensor parameters",
        ),
    ],
)
def test_what_would_be_wrong_is_refused(refused: object, message: str, two: Ranks) -> None:
    two.refuse(message, refused)  # type: ignore[arg-type]
