"""Every algorithm on trees of DTensors does what it does on whole tensors, however they are cut."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import hessfunc as hf
from hessfunc.spaces.of import space_of
from hessfunc.trees import leaves, tree_map
from tests.distributed import modules, problems
from tests.distributed.dtensors import CUTS, CUTS_IN_TWO, as_matvec, cut, gathered, on_mesh
from tests.distributed.problems import difference
from tests.distributed.ranks import Ranks


def algorithm_differs_by(name: str, shape: tuple[int, ...], kind: str) -> float:
    mesh, cuts = on_mesh(shape, kind)
    matrix = problems.symmetric(positive=name == "xnystrace")
    run = problems.ALGORITHMS[name]
    wanted = run(problems.as_matvec(matrix), problems.like(), seed=7)
    found = run(as_matvec(matrix, mesh, cuts), cut(problems.like(), mesh, cuts), seed=7)
    found = gathered(found)
    if isinstance(found, hf.results.Eigenpairs):
        # An eigenvector is known up to its sign.
        mine, plain = (
            torch.cat([x.flatten(1) for x in leaves(result.vectors)], 1)
            for result in (found, wanted)
        )
        signs = (mine * plain).sum(1).sign()[:, None]
        found = dataclasses.replace(found, vectors=signs * mine)
        wanted = dataclasses.replace(wanted, vectors=plain)
    return difference(found, wanted)


def bound(name: str) -> float:
    return 1e-8 if "lanczos" in name or "power" in name else 1e-10


@pytest.mark.parametrize("name", problems.ALGORITHMS)
def test_algorithms_find_what_one_process_finds(name: str, two: Ranks) -> None:
    assert max(two.run(algorithm_differs_by, name, (2,), "some of each")) < bound(name)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "kind"), [((2, 2), "one"), ((4,), "last axes")])
@pytest.mark.parametrize("name", ["lanczos", "hutchinson", "xtrace", "hutchinson_diagonal"])
def test_on_other_meshes(name: str, shape: tuple[int, ...], kind: str, four: Ranks) -> None:
    assert max(four.run(algorithm_differs_by, name, shape, kind)) < bound(name)


def solver_differs_by(name: str, kind: str) -> float:
    mesh, cuts = on_mesh((2,), kind)
    matrix, b = problems.symmetric(positive=True), problems.vector()
    run = problems.SOLVERS[name]
    wanted = run(problems.as_matvec(matrix), b).x
    return modules.error(run(as_matvec(matrix, mesh, cuts), cut(b, mesh, cuts)).x, wanted)


@pytest.mark.parametrize("name", problems.SOLVERS)
def test_solvers_find_what_one_process_finds(name: str, two: Ranks) -> None:
    assert max(two.run(solver_differs_by, name, "some of each")) < 1e-10


def space_is_right(shape: tuple[int, ...], kind: str) -> bool:
    mesh, cuts = on_mesh(shape, kind)
    like = problems.like(41)
    space = space_of(cut(like, mesh, cuts))
    # Each column is on one rank.
    assert int(space.summed(torch.tensor([space.width]))) == space.n == 41
    for probes in ("signs", "normal", "sphere"):
        found = hf.random_like(cut(like, mesh, cuts), 3, kind=probes, seed=3)
        wanted = hf.random_like(like, 3, kind=probes, seed=3)
        assert modules.error(found, wanted) < 1e-12
        for leaf, placements in zip(found.values(), cuts, strict=True):
            assert (placements is not None) == isinstance(leaf, DTensor)
        # There and back.
        rows = space.probes(range(3), kind=probes, seed=3)
        assert torch.equal(space.ravel(found), rows)
    every = torch.arange(41)
    rows = space.units(every, torch.float64)
    assert torch.equal(space.entries(rows, every[5:9]), torch.eye(41).double()[:, 5:9])
    units = tree_map(modules.whole, space.unravel(rows))
    assert torch.equal(torch.cat([x.flatten(1) for x in leaves(units)], 1), torch.eye(41).double())
    twice = partial(tree_map, lambda leaf: 2 * leaf)
    rows = hf.matrix(twice, cut(like, mesh, cuts), rows=[3, 40, 7], chunk_size=8)
    assert torch.equal(rows, 2 * torch.eye(41).double()[[3, 40, 7]])
    vector = hf.unravel(torch.arange(41.0).double(), like)
    product = hf.inner(cut(vector, mesh, cuts), cut(vector, mesh, cuts))
    assert not isinstance(product, DTensor)
    assert float(product) == sum(i * i for i in range(41))
    columns = torch.arange(space.width) if dist.get_rank() == 0 else torch.empty(0).long()
    assert set(space.leaf_of_columns(columns)) <= set(space.names)
    return True


@pytest.mark.parametrize("kind", CUTS)
def test_rows_are_the_shards(kind: str, two: Ranks, three: Ranks, four: Ranks) -> None:
    assert all(two.run(space_is_right, (2,), kind))
    assert all(three.run(space_is_right, (3,), kind))
    assert all(four.run(space_is_right, (4,), kind))


@pytest.mark.parametrize("kind", CUTS_IN_TWO)
def test_rows_are_the_shards_of_two_axes(kind: str, four: Ranks) -> None:
    assert all(four.run(space_is_right, (2, 2), kind))


def widths(ranks: int, kind: str) -> int:
    mesh, cuts = on_mesh((ranks,), kind)
    return space_of(cut(problems.like(), mesh, cuts)).width


def test_copies_are_divided(two: Ranks) -> None:
    assert two.run(widths, 2, "copies") == [18, 19]
    assert two.run(widths, 2, "first axes") == [3 + 1 + 10 + 5, 3 + 0 + 10 + 5]


def test_a_rank_may_hold_nothing(four: Ranks) -> None:
    assert four.run(widths, 4, "last axes") == [2 + 1 + 20 + 4, 2 + 0 + 0 + 4, 2 + 0 + 0 + 2, 0]
    assert max(four.run(algorithm_differs_by, "xdiag", (4,), "last axes")) < 1e-10


def with_a_number() -> float:
    mesh = problems.mesh(2)
    whole = {"scale": torch.zeros(()), "weight": torch.zeros(3, 2)}
    like = cut(whole, mesh, [[Replicate()], [Shard(0)]])
    space, block = space_of(like), hf.random_like(like, 2, kind="normal", seed=0)
    assert torch.equal(space.ravel(block), space.probes([0, 1], kind="normal", seed=0))
    return modules.error(block, hf.random_like(whole, 2, kind="normal", seed=0))


def test_a_leaf_may_be_one_number(two: Ranks) -> None:
    assert two.run(with_a_number) == [0.0, 0.0]


def with_other_placements() -> float:
    mesh, cuts = on_mesh((2,), "first axes")
    like = cut(problems.like(), mesh, cuts)
    space, block = space_of(like), hf.random_like(like, 2, seed=0)
    moved = {name: leaf.redistribute(placements=[Replicate()]) for name, leaf in block.items()}
    halves = {
        name: DTensor.from_local(modules.whole(leaf) / 2, mesh, [Partial()])
        for name, leaf in block.items()
    }
    errors = [(space.ravel(other) - space.ravel(block)).abs().max() for other in (moved, halves)]
    return float(max(errors))


def test_products_with_other_placements_are_moved(two: Ranks) -> None:
    assert max(two.run(with_other_placements)) < 1e-15


def on_two_meshes() -> None:
    leaf = torch.zeros(4)
    first, second = problems.mesh(2, names=("x",)), problems.mesh(2, names=("y",))
    leaf_on = partial(DTensor.from_local, leaf, placements=[Replicate()])
    hf.ravel({"a": leaf_on(device_mesh=first), "b": leaf_on(device_mesh=second)})


def with_a_partial_leaf() -> None:
    hf.ravel({"a": DTensor.from_local(torch.zeros(4), problems.mesh(2), [Partial()])})


def with_a_plain_vector() -> None:
    mesh, cuts = on_mesh((2,), "first axes")
    space_of(cut(problems.like(), mesh, cuts)).ravel(hf.random_like(problems.like(), 1, seed=0))


def with_rows_of_another_length() -> None:
    mesh, cuts = on_mesh((2,), "first axes")
    hf.unravel(torch.zeros(37), cut(problems.like(), mesh, cuts))


def with_a_plain_batch() -> None:
    module = modules.distributed("mlp", problems.mesh(2))
    module._forward_pre_hooks.clear()
    modules.differs_by(hf.hvp, module, "mlp")


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (on_two_meshes, "ValueError: leaves lie on several meshes"),
        (with_a_partial_leaf, "ValueError: leaf 'a' has placement P(sum), not Shard or"),
        (with_a_plain_vector, "ValueError: a leaf of the vector is a plain tensor, but its"),
        (with_rows_of_another_length, "ValueError: a flat vector has shape (37,): on this rank"),
        (with_a_plain_batch, "ValueError: addmm combines a plain tensor with a DTensor"),
    ],
)
def test_what_would_be_wrong_is_refused(refused: object, message: str, two: Ranks) -> None:
    for outcome in two.outcomes(refused):  # type: ignore[arg-type]
        assert outcome.error is not None
        assert outcome.error.startswith(message)


def fails_on_one(rank: int) -> None:
    group = dist.new_group(timeout=timedelta(seconds=8))
    mesh, cuts = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("z",)), CUTS["first axes"]
    plain = as_matvec(problems.symmetric(), mesh, cuts)

    def matvec(block: Any) -> Any:
        if dist.get_rank() == rank:
            raise KeyError("no such column")
        return plain(block)

    hf.hutchinson(matvec, cut(problems.like(), mesh, cuts), seed=0)


@pytest.mark.slow
def test_a_rank_that_fails_before_a_collective_is_an_error_on_all(two: Ranks) -> None:
    first, second = two.outcomes(fails_on_one, 1)
    # Which of the two that wait for each other gives up first is open.
    assert first.error is not None
    assert first.error.startswith(("ConnectionError: rank 0 has lost", "RuntimeError: [/"))
    assert second.error is not None
    assert second.error.startswith(("ConnectionError: rank 1 has lost", "KeyError"))
    assert "KeyError: 'no such column'" in second.trace
    assert two.run(widths, 2, "copies") == [18, 19]


CURVATURES = {
    "hvp": hf.hvp,
    "hvp, difference": partial(hf.hvp, mode="difference"),
    "ggnvp": hf.ggnvp,
    "fvp": hf.fvp,
    "efvp": hf.efvp,
}


def curvature_differs_by(name: str, curvature: str, ranks: int) -> float:
    module = modules.distributed(name, problems.mesh(ranks))
    return modules.differs_by(CURVATURES[curvature], module, name)


@pytest.mark.parametrize("name", ["mlp", "transformer"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_curvatures_are_those_of_the_module_itself(name: str, curvature: str, two: Ranks) -> None:
    bound = 1e-9 if curvature == "hvp, difference" else 1e-12
    assert max(two.run(curvature_differs_by, name, curvature, 2)) < bound


def test_on_four_ranks(four: Ranks) -> None:
    assert max(four.run(curvature_differs_by, "mlp", "hvp", 4)) < 1e-12
    assert max(four.run(curvature_differs_by, "transformer", "hvp, difference", 4)) < 1e-9


def test_a_move_that_torch_cannot_make_is_named(four: Ranks) -> None:
    for outcome in four.outcomes(curvature_differs_by, "transformer", "hvp", 4):
        # Torch makes it from 2.14 on.
        if outcome.error is None:
            assert outcome.value < 1e-10
        else:
            assert outcome.error.startswith(
                "NotImplementedError: torch cannot redistribute a DTensor from S(1)"
            )


def runs_differ_by(name: str) -> tuple[float, float]:
    loss, params = modules.loss_of(modules.distributed(name, problems.mesh(2)))
    matvec = hf.over_batches(hf.hvp(loss))(params, [modules.batch(name)])
    return modules.runs_differ_by(matvec, params, name)


@pytest.mark.parametrize("name", ["mlp", pytest.param("transformer", marks=pytest.mark.slow)])
def test_eigenvalues_and_traces_are_those_of_the_module_itself(name: str, two: Ranks) -> None:
    for eigenvalues, trace in two.run(runs_differ_by, name):
        assert eigenvalues < 1e-8
        assert trace < 1e-10


def of_several_batches() -> float:
    batches = [modules.batch("mlp", seed=seed) for seed in range(3)]
    loss, params = modules.loss_of(modules.distributed("mlp", problems.mesh(2)))
    found = hf.over_batches(hf.hvp(loss), keep=True)(params, batches)
    loss, like = modules.loss_of(modules.model("mlp"))
    wanted = hf.over_batches(hf.hvp(loss))(like, batches)
    return modules.error(
        found(modules.random_block(params, 2)), wanted(modules.random_block(like, 2))
    )


def test_the_mean_over_batches(two: Ranks) -> None:
    assert max(two.run(of_several_batches)) < 1e-12
