from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.algorithms.results.landscape import Landscape
from hessfunc.app.problems.data import digits
from hessfunc.app.problems.fit import train
from hessfunc.app.problems.nets import digits_convnet, mlp
from hessfunc.randomness import seeded
from hessfunc.recipes.landscape import landscape

H = torch.tensor([[3.0, 0.5, 0.0], [0.5, 1.0, -0.2], [0.0, -0.2, 0.1]]).double()
POINT = {"w": torch.tensor([1.0, -2.0, 3.0]).double()}
U = {"w": torch.tensor([1.0, 1.0, 0.0]).double()}
V = {"w": torch.tensor([0.0, 2.0, -1.0]).double()}


def quadratic(params: Any, A: Tensor) -> Tensor:
    return params["w"] @ A @ params["w"] / 2 + 7


def count(batch: Tensor) -> float:
    return float(batch.trace())


def second_difference(found: Landscape) -> float:
    """The second derivative at the middle of three points."""
    below, at, above = found.values.tolist()
    return (above - 2 * at + below) / float(found.x[2] - found.x[1]) ** 2


def small_net() -> nn.Module:
    with seeded(0):
        return mlp([6, 5, 3], nn.Tanh)


def batches_of(sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator))
        for n in sizes
    ]


def along_a_line(loss: Any, params: Any, batch: Any, direction: Any, x: Tensor) -> Tensor:
    return torch.stack(
        [loss({k: p + t * direction[k] for k, p in params.items()}, batch) for t in x]
    )


def test_along_one_direction() -> None:
    found = landscape(quadratic, POINT, [H], U, radius=2.0, points=5, weight=count)
    assert found.x.tolist() == [-2, -1, 0, 1, 2]
    assert found.y is None
    expected = along_a_line(quadratic, POINT, H, U, found.x)
    torch.testing.assert_close(found.values, expected)
    assert found.lengths.tolist() == pytest.approx([2**0.5])
    assert found.evaluations == 5
    assert found.reason == "complete"


def test_along_two_directions_rows_are_the_first() -> None:
    x, y = torch.tensor([-1.0, 0.0, 0.5]).double(), torch.tensor([0.0, 3.0]).double()
    found = landscape(quadratic, POINT, [H], U, V, at=[x, y], weight=count)
    expected = [[quadratic({"w": POINT["w"] + a * U["w"] + b * V["w"]}, H) for b in y] for a in x]
    torch.testing.assert_close(found.values, torch.tensor(expected).double())
    assert found.y is not None
    assert torch.equal(found.x, x)
    assert torch.equal(found.y, y)


@pytest.mark.parametrize("at", [[0.1, 0.3], [[0.1, 0.3]], np.array([0.1, 0.3]), [(0.1, 0.3)]])
def test_coordinates_have_the_bits_that_are_given(at: Any) -> None:
    found = landscape(quadratic, POINT, [H], U, at=at, weight=count)
    assert found.x.tolist() == [0.1, 0.3]


def test_a_block_is_as_its_vectors() -> None:
    block = {"w": torch.stack([U["w"], V["w"]])}
    options: dict[str, Any] = {"points": 4, "weight": count}
    one = landscape(quadratic, POINT, [H], block, **options)
    two = landscape(quadratic, POINT, [H], U, V, **options)
    assert torch.equal(one.values, two.values)


def test_directions_may_require_grad() -> None:
    model = small_net()
    loss = hf.supervised(hf.functional(model)[0], F.cross_entropy)
    batch = batches_of([7])[0]
    params = dict(model.named_parameters())
    away = {name: 2 * p for name, p in params.items()}
    grads = torch.autograd.grad(loss(params, batch), list(params.values()), create_graph=True)
    gradient = dict(zip(params, grads, strict=True))
    block = {name: torch.stack([away[name], gradient[name]]) for name in params}
    for directions in [(params,), (away, gradient), (block,)]:
        plain = [{name: leaf.detach() for name, leaf in tree.items()} for tree in directions]
        found = landscape(loss, params, [batch], *directions, points=3)
        expected = landscape(loss, params, [batch], *plain, points=3)
        assert not found.values.requires_grad
        assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize("like", ["tensor", "list", "scalar"])
def test_params_are_any_tree(like: str) -> None:
    w, u = POINT["w"], U["w"]
    trees = {"tensor": (w, u), "list": ([w[:2], w[2:]], [u[:2], u[2:]]), "scalar": (w[0], u[0])}
    params, direction = trees[like]

    def loss(params: Any, batch: Tensor) -> Tensor:
        return sum((p.square().sum() for p in hf.trees.leaves(params)), batch.sum())

    found = landscape(loss, params, [torch.ones(1)], direction, at=torch.tensor([0.0, 2.0]))
    expected = [w.square().sum() + 1, (w + 2 * u).square().sum() + 1]
    if like == "scalar":
        expected = [w[0].square() + 1, (w[0] + 2 * u[0]).square() + 1]
    torch.testing.assert_close(found.values, torch.stack(expected))


def test_batches_count_by_their_examples() -> None:
    model_fn, params = hf.functional(small_net())
    loss = hf.supervised(model_fn, F.cross_entropy)
    batches = batches_of([7, 2])
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    direction = hf.random_like(params, 1, seed=0)
    found = landscape(loss, params, iter(batches), direction, points=3)
    expected = landscape(loss, params, [whole], direction, points=3)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-6, atol=0)
    assert found.evaluations == 6
    last = landscape(
        loss, params, batches, direction, points=3, weight=lambda batch: len(batch[1]) == 2
    )
    only = landscape(loss, params, batches[1:], direction, points=3)
    torch.testing.assert_close(last.values, only.values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("points_per_chunk", [1, 3, 16, None])
def test_chunks_change_nothing_but_rounding(points_per_chunk: Any) -> None:
    model_fn, params = hf.functional(small_net().double())
    loss = hf.supervised(model_fn, F.cross_entropy)
    batch = batches_of([9])[0]
    batch = (batch[0].double(), batch[1])
    u, v = hf.random_like(params, 2, seed=0), hf.random_like(params, 1, seed=1)
    found = landscape(loss, params, [batch], u, points=13, points_per_chunk=points_per_chunk)
    line = landscape(loss, params, [batch], v, points=13, points_per_chunk=1)
    expected = along_a_line(loss, params, batch, {k: t[0] for k, t in v.items()}, line.x)
    torch.testing.assert_close(line.values, expected, rtol=1e-12, atol=0)
    surface = landscape(loss, params, [batch], u, points=13, points_per_chunk=1)
    torch.testing.assert_close(found.values, surface.values, rtol=1e-12, atol=0)


def test_what_vmap_cannot_do_is_done_by_a_loop() -> None:
    def loss(params: Any, batch: Tensor) -> Tensor:
        return params["w"].sum() * (2.0 if params["w"].sum().item() > 0 else 1.0)

    at = torch.linspace(-2, 2, 40).double()
    found = landscape(loss, POINT, [H], U, at=at)
    torch.testing.assert_close(found.values, along_a_line(loss, POINT, H, U, at))
    with pytest.raises(RuntimeError, match="item"):
        landscape(loss, POINT, [H], U, at=at, points_per_chunk=4)


@pytest.mark.parametrize(("entries", "expected"), [(10, 64), (2**15, 16), (2**17, 4), (2**20, 1)])
def test_the_points_of_a_pass_follow_from_the_sizes_of_operations(
    entries: int, expected: int
) -> None:
    passes: list[int] = []

    def loss(params: Any, batch: Tensor) -> Tensor:
        w = params["w"]
        batched = torch._C._functorch.is_batchedtensor(w)
        passes.append(torch._C._functorch.get_unwrapped(w).shape[0] if batched else 1)
        return (w.sum() * batch).square().cos().exp().sqrt().sum()

    found = landscape(loss, POINT, [torch.ones(entries).double()], U, points=80)
    assert max(passes) == expected
    assert found.evaluations == 80


def test_each_point_and_batch_is_evaluated_once() -> None:
    seen: list[float] = []

    def loss(params: Any, batch: Tensor) -> Tensor:
        # Where there is a value to read, that is in the loop.
        seen.append(params["w"][0].item())
        return params["w"].sum()

    landscape(loss, POINT, [H, H], U, at=torch.arange(40.0).double(), weight=count)
    at_params, *points = [value - 1.0 for value in seen]
    assert at_params == 0.0
    assert points == [*range(40), *range(40)]


def test_unit_directions_make_coordinates_distances() -> None:
    found = landscape(
        quadratic, POINT, [H], V, at=torch.tensor([5**0.5]).double(), normalise="unit", weight=count
    )
    assert found.lengths.tolist() == pytest.approx([1.0])
    assert float(found.values) == pytest.approx(
        float(quadratic({"w": POINT["w"] + V["w"]}, H)), rel=1e-12
    )


def test_filters_of_directions_are_as_long_as_those_of_weights() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 4))
    params = {name: leaf.clone() for name, leaf in hf.functional(model.double())[1].items()}
    params["3.weight"][2] = 0.0
    directions = {k: v[0] for k, v in hf.random_like(params, 1, kind="normal", seed=3).items()}
    directions["0.weight"][1] = 0.0
    seen: list[Any] = []

    def loss(params: Any, batch: Any) -> Tensor:
        seen.append(params)
        return params["0.weight"].sum()

    landscape(
        loss,
        params,
        [torch.ones(1)],
        directions,
        at=torch.ones(1),
        normalise="filter",
        points_per_chunk=1,
    )
    moved = {name: seen[-1][name] - leaf for name, leaf in params.items()}
    for name in ("0.weight", "3.weight"):
        for step, direction, weight in zip(
            moved[name], directions[name], params[name], strict=True
        ):
            scale = weight.norm() / direction.norm() if direction.norm() > 0 else 0.0
            torch.testing.assert_close(step, direction * scale, atol=1e-14, rtol=1e-10)
    for name in ("0.bias", "1.weight", "1.bias", "3.bias"):
        assert not moved[name].any()


def test_filter_normalisation_undoes_the_scale_of_the_weights() -> None:
    """A ReLU net whose layers are scaled by 10 and 1 / 10 is the same function."""
    with seeded(0):
        model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    model_fn, params = hf.functional(model.double())
    loss = hf.supervised(model_fn, F.cross_entropy)
    x, y = batches_of([20])[0]
    scaled = {"0.weight": 10 * params["0.weight"], "2.weight": params["2.weight"] / 10}
    direction = hf.random_like(params, 1, kind="normal", seed=0)

    def curve(at: Any, normalise: Any) -> Tensor:
        return landscape(
            loss, at, [(x.double(), y)], direction, points=7, normalise=normalise
        ).values

    torch.testing.assert_close(curve(params, "filter"), curve(scaled, "filter"))
    assert float((curve(params, "unit") - curve(scaled, "unit")).abs().max()) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_curvature_along_the_top_eigenvector_is_its_eigenvalue(dtype: torch.dtype) -> None:
    data = digits()
    model = train(digits_convnet, data, epochs=2).to(dtype)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    batches = [(x.to(dtype), y) for x, y in data[:500].batches(300)]
    top = hf.lanczos(hf.over_batches(hf.hvp(loss))(params, batches), params, k=2, seed=0)
    for i in range(2):
        vector = {name: leaf[i] for name, leaf in top.vectors.items()}
        found = landscape(loss, params, batches, vector, radius=0.02, points=3)
        assert second_difference(found) == pytest.approx(float(top.values[i]), rel=0.01)


def test_the_curvature_of_a_quadratic_along_an_eigenvector_is_its_eigenvalue() -> None:
    values, vectors = torch.linalg.eigh(H)
    for value, vector in zip(values, vectors.T, strict=True):
        found = landscape(quadratic, POINT, [H], {"w": vector}, points=3, weight=count)
        assert second_difference(found) == pytest.approx(float(value), rel=1e-9)


def test_dropout_has_one_mask_and_the_random_stream_stays() -> None:
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 3))
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    before = torch.get_rng_state()
    found = [
        landscape(
            loss,
            params,
            batches_of([8]),
            hf.random_like(params, 1, seed=0),
            at=torch.tensor([0.0, 1e-4]),
            points_per_chunk=size,
        ).values
        for size in (1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)
    assert float(found[0].diff().abs()) < 0.01


def test_its_curvature_is_that_of_the_hessian_with_dropout() -> None:
    with seeded(0):
        model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 3))
    model_fn, params = hf.functional(model.double())
    loss = hf.supervised(model_fn, F.cross_entropy)
    batch = (batches_of([8])[0][0].double(), batches_of([8])[0][1])
    top = hf.lanczos(hf.hvp(loss)(params, batch), params, k=1, seed=0)
    found = landscape(loss, params, [batch], top.vectors, radius=1e-3, points=3)
    assert second_difference(found) == pytest.approx(float(top.values[0]), rel=1e-4)


def test_the_module_is_not_changed() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    landscape(loss, params, batches_of([8]), hf.random_like(params, 1, seed=0), points=9)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    with pytest.raises(ValueError, match="model.eval()"):
        landscape(loss, params, batches_of([8, 8]), hf.random_like(params, 1, seed=0), points=3)


def test_the_callback_sees_the_landscape_so_far() -> None:
    seen: list[Landscape] = []
    found = landscape(
        quadratic,
        POINT,
        [H, 2 * H],
        U,
        points=5,
        weight=count,
        points_per_chunk=2,
        callback=seen.append,
    )
    assert [one.evaluations for one in seen] == [2, 4, 5, 7, 9, 10]
    assert [int(one.values.isnan().sum()) for one in seen] == [3, 1, 0, 0, 0, 0]
    first = landscape(quadratic, POINT, [H], U, points=5, weight=count)
    torch.testing.assert_close(seen[2].values, first.values)
    assert torch.equal(seen[-1].values, found.values)


def test_far_away_the_loss_may_be_infinite() -> None:
    found = landscape(
        quadratic, POINT, [H], U, at=torch.tensor([0.0, 1e200], dtype=torch.float64), weight=count
    )
    assert found.values.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("directions", [(U,), (U, V)])
def test_it_is_saved_and_loaded(directions: Any, tmp_path: Path) -> None:
    found = landscape(quadratic, POINT, [H], *directions, points=3, normalise="unit", weight=count)
    found.save(tmp_path / "landscape.npz")
    again = hf.load(tmp_path / "landscape.npz")
    assert isinstance(again, Landscape)
    assert torch.equal(again.values, found.values)
    assert torch.equal(again.lengths, found.lengths)
    assert (again.y is None) == (found.y is None)
    assert (again.normalise, again.evaluations) == ("unit", found.evaluations)


def once() -> Iterator[Tensor]:
    yield from ()


ZERO = {"w": torch.zeros(3).double()}


@pytest.mark.parametrize(
    ("directions", "options", "message"),
    [
        ([], {}, "0 directions: a landscape has one or two"),
        ([U, V, U], {}, "3 directions"),
        ([{"w": torch.eye(3).double()}], {}, r"3 directions.*leaf\[:1\]"),
        ([{"b": U["w"]}], {}, "structure of the parameters"),
        ([{"w": torch.ones(2)}], {}, r"shape \(2,\), expected \(3\)"),
        ([U, ZERO], {}, "direction 2 is zero"),
        ([ZERO], {"normalise": "unit"}, "direction 1 is zero"),
        ([{"w": torch.full((3,), torch.nan)}], {}, "NaN or infinite"),
        ([U], {"normalise": "filter"}, "zero after filter normalisation"),
        ([U], {"normalise": "layer"}, "normalise='layer': choose"),
        ([U], {"radius": -1.0}, "radius=-1.0"),
        ([U], {"points": 0}, "points=0"),
        ([U], {"at": torch.zeros(2, 2)}, r"axis of shape \(2, 2\)"),
        ([U], {"at": torch.tensor([0.0, torch.inf])}, "finite"),
        ([U], {"points": 5.5}, "points=5.5: it must be a whole number"),
        ([U], {"at": torch.tensor([0.0, 2.0, 1.0])}, "not strictly increasing"),
        ([U], {"at": torch.tensor([0.0, 0.0])}, "not strictly increasing"),
        ([U, V], {"at": [torch.arange(2.0), -torch.arange(3.0)]}, "not strictly increasing"),
        ([U], {"at": [torch.zeros(2), torch.zeros(3)]}, "2 axes for 1 directions"),
        ([U], {"points_per_chunk": 0}, "points_per_chunk=0"),
        ([U], {"weight": lambda _: -1.0}, "weight of a batch is -1.0"),
        ([U], {"weight": lambda _: 0.0}, "no batch has a positive weight"),
    ],
)
def test_errors_say_what_is_wrong(directions: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landscape(quadratic, POINT, [H], *directions, **options)


@pytest.mark.parametrize("batches", [H, {"x": H}, (H, torch.zeros(3))])
def test_a_single_batch_is_refused(batches: Any) -> None:
    with pytest.raises(TypeError, match="pass a list of batches"):
        landscape(quadratic, POINT, batches, U)


def test_no_batch_and_no_scalar_are_refused() -> None:
    with pytest.raises(ValueError, match="no batch has a positive weight"):
        landscape(quadratic, POINT, once(), U)
    with pytest.raises(ValueError, match="must be a scalar"):
        landscape(lambda params, batch: params["w"], POINT, [H], U)
    with pytest.raises(ValueError, match="loss is nan at finite parameters"):
        landscape(lambda params, batch: params["w"].sum() * torch.nan, POINT, [H], U)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model_fn, params = hf.functional(small_net().cuda())
    loss = hf.supervised(model_fn, F.cross_entropy)
    batches = [(x.cuda(), y.cuda()) for x, y in batches_of([7, 2])]
    found = landscape(loss, params, batches, hf.random_like(params, 2, seed=0), points=21)
    on_cpu = landscape(
        loss,
        {name: leaf.cpu() for name, leaf in params.items()},
        batches_of([7, 2]),
        hf.random_like({name: leaf.cpu() for name, leaf in params.items()}, 2, seed=0),
        points=21,
    )
    torch.testing.assert_close(found.values, on_cpu.values, rtol=1e-4, atol=0)
