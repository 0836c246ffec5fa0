"""The mean over batches, with the batches and the vectors of a block divided among ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import hessfunc as hf
from hessfunc.transforms.batches.mesh import MeshPartition
from tests.distributed import problems
from tests.distributed.problems import data, error
from tests.distributed.ranks import Ranks

SHAPES = [
    ((2,), ("data",)),
    ((2,), ("probe",)),
    ((3,), ("data",)),
    ((4,), ("data",)),
    ((2, 2), ("data", "probe")),
]


def curvature_differs_by(
    name: str, shape: tuple[int, ...], names: tuple[str, ...], options: dict[str, Any]
) -> float:
    _, params = problems.model_and_loss()
    block = hf.random_like(params, 5, seed=1)
    curvature, batches = problems.curvature(name), problems.batches()
    mesh = problems.mesh(*shape, names=names)
    wanted = hf.over_batches(curvature, **options)(params, batches)(block)
    matvec = hf.over_batches(curvature, mesh=mesh, **options)(params, batches)
    return max(error(matvec(block), wanted) for _ in range(2))


def size_of(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


@pytest.fixture
def of_size(two: Ranks, three: Ranks, four: Ranks) -> dict[int, Ranks]:
    return {2: two, 3: three, 4: four}


@pytest.mark.parametrize(("shape", "names"), SHAPES)
@pytest.mark.parametrize("name", problems.CURVATURES)
def test_curvatures_of_uneven_shares_are_those_of_one_process(
    name: str, shape: tuple[int, ...], names: tuple[str, ...], of_size: dict[int, Ranks]
) -> None:
    found = of_size[size_of(shape)].run(curvature_differs_by, name, shape, names, {})
    assert max(found) < 1e-12


def squared_on_own_rank() -> tuple[float, int]:
    """The error of squares of matrices that ranks divide, and the number of them on this rank."""
    mesh, seen = problems.mesh(3, names=("data",)), []

    def squared(matrix: Tensor) -> Tensor:
        seen.append(matrix)
        return matrix @ matrix

    matrices = [torch.full((1, n, n), float(n)) for n in (2, 5, 3, 2)]
    made = MeshPartition.of(mesh, "replicated").each(squared, matrices)
    return max(float((a - b @ b).abs().max()) for a, b in zip(made, matrices, strict=True)), len(
        seen
    )


def test_ranks_divide_independent_matrices(three: Ranks) -> None:
    errors, counts = zip(*three.run(squared_on_own_rank), strict=True)
    assert max(errors) == 0
    # The matrix of five rows takes more operations than the two of two rows together.
    assert sorted(counts) == [1, 1, 2]


def sum_differs_by(own: bool, order: tuple[int, ...], shape: tuple[int, ...]) -> float:
    model_fn, params = hf.functional(problems.net())

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="sum")

    known = torch.nn.CrossEntropyLoss(reduction="sum")
    loss = hf.supervised(model_fn, criterion if own else known)
    made = problems.batches()
    batches = [made[i] for i in order]
    block = hf.random_like(params, 2, seed=1)
    whole = tuple(torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    wanted = hf.hvp(loss)(params, whole)(block)
    mesh = problems.mesh(*shape)
    return error(hf.over_batches(hf.hvp(loss), mesh=mesh)(params, batches)(block), wanted)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 3), (0,)])
def test_batches_of_a_sum_are_summed_over_ranks(
    own: bool, order: tuple[int, ...], two: Ranks, four: Ranks
) -> None:
    """The second of the orders leaves a single example, which tells no sum, to a rank."""
    assert max(two.run(sum_differs_by, own, order, (2,))) < 1e-12
    assert max(four.run(sum_differs_by, own, order, (1, 4))) < 1e-12


def mean_over_targets_differs_by(shape: tuple[int, ...]) -> float:
    model_fn, params = hf.functional(problems.net())
    weight = torch.tensor([1.0, 0.3, 7.0], dtype=torch.float64)
    loss = hf.supervised(model_fn, torch.nn.CrossEntropyLoss(weight=weight, ignore_index=1))
    batches = problems.batches()
    # The targets of a batch are all ignored.
    batches[1][1][:] = 1
    block = hf.random_like(params, 2, seed=1)
    whole = tuple(torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    wanted = hf.hvp(loss)(params, whole)(block)
    matvec = hf.over_batches(hf.hvp(loss), mesh=problems.mesh(*shape))(params, batches)
    return error(matvec(block), wanted)


def test_a_mean_over_targets_is_weighted_over_ranks_by_what_it_divides_by(
    two: Ranks, four: Ranks
) -> None:
    assert max(two.run(mean_over_targets_differs_by, (2,))) < 1e-12
    assert max(four.run(mean_over_targets_differs_by, (2, 2))) < 1e-12


def tokens(batch: Any) -> float:
    return float((batch[1] > 0).sum()) + 2.0**24


@pytest.mark.parametrize("options", [{"keep": True}, {"weight": tokens}])
def test_options_on_a_mesh(options: dict[str, Any], four: Ranks) -> None:
    found = four.run(curvature_differs_by, "hvp", (2, 2), ("data", "probe"), options)
    assert max(found) < 1e-12


def in_float32(weight: float) -> float:
    model_fn, params = hf.functional(problems.net().float())
    loss = hf.supervised(model_fn, torch.nn.functional.cross_entropy)
    batches = [(x.float(), y) for x, y in problems.batches()]
    block = hf.random_like(params, 2, seed=1)

    def counted(batch: Any) -> float:
        return weight * len(batch[1])

    wanted = hf.over_batches(hf.hvp(loss), weight=counted)(params, batches)(block)
    mesh = problems.mesh(2, names=("data",))
    found = hf.over_batches(hf.hvp(loss), weight=counted, mesh=mesh)(params, batches)(block)
    return error(found, wanted)


@pytest.mark.parametrize("weight", [1.0, 2.0**24 + 1, 1 / 3])
def test_weights_are_added_exactly_in_float32(weight: float, two: Ranks) -> None:
    assert max(two.run(in_float32, weight)) < 2e-6


def curvature_of_block(k: int) -> float:
    loss, params = problems.model_and_loss()
    block = hf.random_like(params, k, seed=1)
    mesh, batches = problems.mesh(1, 4), problems.batches()
    wanted = hf.over_batches(hf.hvp(loss))(params, batches)(block)
    return error(hf.over_batches(hf.hvp(loss), mesh=mesh)(params, batches)(block), wanted)


@pytest.mark.parametrize("k", [0, 1, 3, 4, 9])
def test_blocks_of_any_size_are_divided(k: int, four: Ranks) -> None:
    assert max(four.run(curvature_of_block, k)) < 1e-12


def with_a_batch_for_the_first_alone() -> float:
    loss, params = problems.model_and_loss()
    block = hf.random_like(params, 2, seed=1)
    batches = problems.batches()[:1]
    wanted = hf.over_batches(hf.hvp(loss))(params, batches)(block)
    mesh = problems.mesh(2)
    return error(hf.over_batches(hf.hvp(loss), mesh=mesh)(params, batches)(block), wanted)


def test_a_rank_may_have_no_batch(two: Ranks) -> None:
    assert max(two.run(with_a_batch_for_the_first_alone)) < 1e-12


def algorithm_on_a_mesh(shape: tuple[int, ...]) -> float:
    loss, params = problems.model_and_loss()
    mesh, batches = problems.mesh(*shape), problems.batches()
    whole = hf.over_batches(hf.hvp(loss))(params, batches)
    matvec = hf.over_batches(hf.hvp(loss), mesh=mesh)(params, batches)
    space = hf.sharded(params, mesh)
    wanted = hf.lanczos(whole, params, k=2, rtol=1e-7, seed=0)
    found = hf.lanczos(matvec, params, k=2, rtol=1e-7, seed=0, space=space)
    # Ranks add up in another order, which may move the last round by one.
    assert found.matvecs == pytest.approx(wanted.matvecs, rel=0.1)
    return error(found.values, wanted.values)


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_algorithms_on_a_mesh_with_a_sharded_basis(shape: tuple[int, ...], four: Ranks) -> None:
    assert max(four.run(algorithm_on_a_mesh, shape)) < 1e-10


def fails_on_one(rank: int, where: str) -> None:
    loss, params = problems.model_and_loss()
    batches = problems.batches()

    def broken(params: Any, batch: Any) -> Any:
        if dist.get_rank() == rank:
            raise KeyError("no such column")
        return loss(params, batch)

    curvature = hf.over_batches(hf.hvp(broken), mesh=problems.mesh(2), keep=where == "kept")
    matvec = curvature(params, batches)
    matvec(hf.random_like(params, 2, seed=0))


@pytest.mark.parametrize("where", ["kept", "anew"])
def test_a_rank_that_fails_is_an_error_on_all(where: str, two: Ranks) -> None:
    first, second = two.outcomes(fails_on_one, 1, where)
    assert second.error == "KeyError: 'no such column'"
    assert first.error == (
        "RuntimeError: failed on another rank, so this rank stops: rank 1: KeyError: "
        "'no such column'"
    )


def asks_for(what: str) -> None:
    loss, params = problems.model_and_loss()
    last = dist.get_rank() == 1
    if what == "parameters" and last:
        params = {name: leaf + 0.1 for name, leaf in params.items()}
    matvec = hf.over_batches(hf.hvp(loss), mesh=problems.mesh(2))(params, problems.batches())
    k = 3 if what == "count" and last else 2
    matvec(hf.random_like(params, k, seed=1 if what == "seed" and last else 0))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("count", "with different numbers of vectors: rank 0 has 2, rank 1"),
        ("seed", "the ranks do not have the same block. Call the same algorithm"),
        ("parameters", "parameter '0.weight' is not the same on all ranks"),
    ],
)
def test_ranks_that_ask_for_different_products_are_told(
    what: str, message: str, two: Ranks
) -> None:
    for outcome in two.outcomes(asks_for, what):
        assert outcome.error is not None
        assert message in outcome.error


def unlike(what: str) -> None:
    last = dist.get_rank() == 1
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(7, dtype=torch.float64)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 7).double(), norm, torch.nn.Linear(7, 3).double()
    )
    model.eval()[0].weight.requires_grad_(False)
    if last and what == "buffer":
        norm.running_mean += 1e-9
    if last and what == "frozen":
        model[0].weight[0, 0] += 1e-9
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, torch.nn.functional.cross_entropy)
    curvature = hf.ggnvp(loss) if last and what == "curvature" else hf.hvp(loss)
    if last and what == "mode":
        curvature = hf.hvp(loss, mode="forward")
    weight = len if last and what == "weight" else None
    keep = what == "frozen"
    mean = hf.over_batches(curvature, weight=weight, mesh=problems.mesh(2), keep=keep)
    mean(params, problems.batches())(hf.random_like(params, 1, seed=0))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("buffer", "'1.running_mean', a buffer or a frozen parameter, is not the same on all"),
        ("frozen", "'0.weight', a buffer or a frozen parameter, is not the same on all ranks"),
        ("curvature", "the ranks disagree on the curvature: rank 0 has"),
        ("mode", "the ranks disagree on the curvature: rank 0 has"),
        ("weight", "the ranks disagree on weight: rank 0 has None, rank 1 has len"),
        ("nothing", None),
    ],
)
def test_what_differs_between_ranks_is_named(what: str, message: str | None, two: Ranks) -> None:
    for outcome in two.outcomes(unlike, what):
        print(outcome.error)
        assert (outcome.error is None) == (message is None)
        assert message is None or message in str(outcome.error)


def on_axes(*names: str) -> None:
    loss, params = problems.model_and_loss()
    mesh = problems.mesh(2, names=names)
    hf.over_batches(hf.hvp(loss), mesh=mesh)(params, problems.batches())


def test_axes_must_be_known(two: Ranks) -> None:
    for outcome in two.outcomes(on_axes, "dp"):
        assert outcome.error is not None
        assert "the mesh has the axes ('dp',): name them 'data', 'probe' or both" in outcome.error


def with_batch_statistics() -> None:
    norm = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)).double()
    model_fn, params = hf.functional(norm)
    loss = hf.supervised(model_fn, torch.nn.functional.cross_entropy)
    batches = problems.batches()[:2]
    matvec = hf.over_batches(hf.hvp(loss), mesh=problems.mesh(2))(params, batches)
    matvec(hf.random_like(params, 1, seed=0))


def test_batch_statistics_over_several_ranks_are_refused(two: Ranks) -> None:
    first, second = two.outcomes(with_batch_statistics)
    assert second.error is not None
    assert "BatchNorm" in second.error
    assert first.error is not None
    assert first.error.startswith("RuntimeError: failed on another rank")


def sums_over_ranks(k: int) -> tuple[list[int], int]:
    """The lengths of all sums over ranks for one product, and n."""
    from hessfunc.ranks import Ranks as Along

    loss, params = problems.model_and_loss()
    matvec = hf.over_batches(hf.hvp(loss), mesh=problems.mesh(2))(params, problems.batches())
    sizes: list[int] = []
    plain = Along.sum

    def counted(self: Along, numbers: Tensor) -> Tensor:
        sizes.append(numbers.numel())
        return plain(self, numbers)

    Along.sum = counted  # type: ignore[method-assign]
    try:
        matvec(hf.random_like(params, k, seed=0))
    finally:
        Along.sum = plain  # type: ignore[method-assign]
    return sizes, sum(leaf.numel() for leaf in params.values())


def test_one_flat_sum_serves_a_whole_block(two: Ranks) -> None:
    sizes, n = two.run(sums_over_ranks, 5)[0]
    assert sizes == [5 * n + 2]


def opaque() -> float:
    """Batches without a tensor, which no checksum sees."""
    x, y = data()[:]
    model_fn, params = hf.functional(problems.net())
    loss = hf.composed(
        lambda params, batch: model_fn(params, x[list(batch)]),
        torch.nn.functional.cross_entropy,
        targets=lambda batch: y[list(batch)],
    )
    curvature = hf.over_batches(hf.hvp(loss), mesh=problems.mesh(2), data="sharded", weight=len)
    mine = [frozenset(range(dist.get_rank(), 24, 2))]
    block = hf.random_like(params, 2, seed=0)
    whole = hf.supervised(model_fn, torch.nn.functional.cross_entropy)
    return error(curvature(params, mine)(block), hf.hvp(whole)(params, (x, y))(block))


def test_batches_without_tensors(two: Ranks) -> None:
    assert max(two.run(opaque)) < 1e-12


def without_a_seed(what: str) -> None:
    loss, _ = problems.model_and_loss()
    hf.fvp(loss, samples=2) if what == "fvp" else hf.draws(hf.hvp(loss))


@pytest.mark.parametrize("what", ["fvp", "draws"])
def test_matrices_that_each_rank_would_draw_for_itself_are_refused(what: str, two: Ranks) -> None:
    for outcome in two.outcomes(without_a_seed, what):
        assert outcome.error is not None
        assert "pass the same seed on all" in outcome.error


def with_a_number() -> float:
    model_fn, params = hf.functional(problems.net())
    params = {"temperature": torch.tensor(1.5, dtype=torch.float64), **params}

    def outputs(params: Any, batch: Any) -> Tensor:
        rest = {name: leaf for name, leaf in params.items() if name != "temperature"}
        return model_fn(rest, batch[0]) * params["temperature"]

    loss = hf.composed(outputs, torch.nn.functional.cross_entropy, targets=lambda batch: batch[1])
    mesh, batches = problems.mesh(2), problems.batches()
    found = hf.lanczos(
        hf.over_batches(hf.hvp(loss), mesh=mesh)(params, batches),
        params,
        k=2,
        rtol=1e-10,
        seed=0,
        space=hf.sharded(params, mesh),
    )
    wanted = hf.lanczos(
        hf.over_batches(hf.hvp(loss))(params, batches), params, k=2, rtol=1e-10, seed=0
    )
    return error(found.values, wanted.values)


def test_parameters_may_be_numbers(two: Ranks) -> None:
    assert max(two.run(with_a_number)) < 1e-10


def on_one_rank(what: str) -> None:
    loss, params = problems.model_and_loss()
    second = dist.get_rank() == 1
    batches: Any = problems.batches()
    if what == "iterator" and second:
        batches = iter(batches)
    if what == "dtype" and second:
        params = params | {"0.bias": params["0.bias"].long()}
    matvec = hf.over_batches(hf.hvp(loss), mesh=problems.mesh(2))(params, batches)
    block = hf.random_like(params, 1, seed=0)
    if what == "structure" and second:
        block = {"0.weight": block["0.weight"]}
    matvec(block)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("iterator", "which can be read only once"),
        ("dtype", "needs real floating-point leaves"),
        ("structure", "does not have the structure of the parameters"),
    ],
)
def test_a_mistake_on_one_rank_is_an_error_on_all(what: str, message: str, two: Ranks) -> None:
    for outcome in two.outcomes(on_one_rank, what):
        assert outcome.error is not None
        assert message in outcome.error


def far_apart(change: float) -> None:
    wide = torch.nn.Linear(100, 80).double()
    model_fn, params = hf.functional(wide)
    if dist.get_rank() == 1:
        params = params | {"weight": params["weight"].clone()}
        params["weight"][-1, -1] *= 1 + change
    loss = hf.supervised(model_fn, torch.nn.functional.mse_loss)
    x, y = torch.ones(2, 100).double(), torch.ones(2, 80).double()
    hf.over_batches(hf.hvp(loss), mesh=problems.mesh(2))(params, [(x, y)])


@pytest.mark.parametrize("change", [1.0, 1e-12])
def test_one_entry_that_differs_is_seen(change: float, two: Ranks) -> None:
    for outcome in two.outcomes(far_apart, change):
        assert outcome.error is not None
        assert "parameter 'weight' is not the same on all ranks" in outcome.error
