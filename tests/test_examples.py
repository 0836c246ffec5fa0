"""Each example runs in small, and shows what it says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean

import pytest
import torch

import hessfunc as hf
from tests.datapath import DATA

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib").use("Agg")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    from matplotlib import pyplot as plt

    plt.close("all")
    yield
    plt.close("all")


def test_quantisation_by_traces_loses_less_than_uniform_bits() -> None:
    from examples.quantisation import main

    rows = main(small=True)
    for uniform, chosen in zip(rows[::2], rows[1::2], strict=True):
        assert chosen.mean_bits <= uniform.mean_bits
        assert chosen.sensitivity < uniform.sensitivity
        assert chosen.loss < uniform.loss
    three, by_traces = rows[:2]
    assert by_traces.loss < 0.5 * three.loss
    assert by_traces.accuracy >= three.accuracy


def test_bits_within_a_budget_have_the_least_total_cost() -> None:
    from examples.quantisation import BITS, best

    sizes = [6, 4, 10, 2]
    random = torch.rand(4, len(BITS), generator=torch.Generator().manual_seed(0)).tolist()
    costs = [dict(zip(BITS, row, strict=True)) for row in random]
    bits = best(sizes, costs, 4.5)

    def cost(choice: tuple[int, ...]) -> float:
        return sum(c[b] for c, b in zip(costs, choice, strict=True))

    def size(choice: tuple[int, ...]) -> int:
        return sum(b * n for b, n in zip(choice, sizes, strict=True))

    within = [choice for choice in product(BITS, repeat=4) if size(choice) <= 4.5 * sum(sizes)]
    assert bits in within
    assert cost(bits) == pytest.approx(min(map(cost, within)), rel=1e-12)


def test_a_kronecker_product_of_identities_rounds_to_the_nearest() -> None:
    from examples.rounding import METHODS, quantised
    from hessfunc.kronecker import Kronecker

    weight = torch.randn(5, 7, dtype=torch.float64)
    units = (torch.eye(n, dtype=torch.float64)[None] for n in (5, 7))
    block = Kronecker(*units, weight.shape)
    nearest, *others = (quantised(weight, block, 3, method) for method in METHODS)
    for other in others:
        torch.testing.assert_close(other, nearest)


def test_later_weights_move_to_the_minimum_given_the_errors_so_far() -> None:
    from examples.rounding import DAMPING, compensated, conditional

    x = torch.randn(20, 6, dtype=torch.float64)
    A = x.T @ x
    weight = torch.randn(2, 6, dtype=torch.float64)
    # Columns 0 and 1 become integers, and the others stay where they have moved.
    moved = compensated(weight, conditional(A), lambda c, j: c.round() if j < 2 else c)
    damped = A + DAMPING * A.diagonal().mean() * torch.eye(6)
    error = moved - weight
    torch.testing.assert_close(moved[:, 0], weight[:, 0].round())
    # At the minimum, the slope D A of tr(D A D') / 2 vanishes in the columns that are free.
    torch.testing.assert_close((error @ damped)[:, 2:], torch.zeros(2, 4).double())


def test_rounding_with_factors_diverges_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples.rounding import METHODS, main

    monkeypatch.setenv("HESSFUNC_DATA", str(tmp_path))
    found = main(small=True, out=tmp_path / "rounding.png")
    nearest, one, both = (mean(found[3, method]) for method in METHODS)
    assert both < 0.9 * nearest
    assert one < 0.9 * nearest
    assert (tmp_path / "rounding.png").stat().st_size


def test_pruning_by_the_surgeon(tmp_path: Path) -> None:
    from examples.pruning import main

    found = main(small=True, out=tmp_path / "pruning.png")
    surgeon, damage, magnitude = (losses.mean(0) for losses in found.values())
    # With 80 % and 90 % of the weights at zero.
    for stage in (1, 2):
        assert surgeon[stage] < 0.7 * min(damage[stage], magnitude[stage])
        assert surgeon[stage] < 2.5 * surgeon[0]
    assert (tmp_path / "pruning.png").stat().st_size


def test_the_surgeons_weights_are_at_the_minimum_of_the_quadratic_model() -> None:
    from examples.pruning import DECAY, inverse_diagonal, moved
    from hessfunc.kronecker import Kronecker

    B, A = (x @ x.mT for x in (torch.randn(1, n, n, dtype=torch.float64) for n in (3, 4)))
    block = Kronecker(B, A, torch.Size((3, 4)))
    F = block.dense() + DECAY * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(inverse_diagonal(block).flatten(), F.inverse().diagonal())
    weight = torch.randn(3, 4, dtype=torch.float64)
    keep = torch.ones_like(weight)
    keep[1, 2] = 0
    product = lambda tree: {"w": block.matvec(tree["w"])}  # noqa: E731
    after = moved({"w": weight}, {"w": keep}, product, rtol=1e-12)["w"]
    # Hassibi and Stork: all weights move by -w_q F^-1 e_q / [F^-1]_qq.
    column = F.inverse()[:, 6]
    expected = weight - weight[1, 2] * (column / column[6]).reshape(3, 4)
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)


def test_merged_copies_know_the_classes_of_both(tmp_path: Path) -> None:
    from examples.merging import main

    found = main(small=True, out=tmp_path / "merging.png")
    for method in ("Kronecker", "Gauss-Newton"):
        assert (found[method] - found["mean"]).mean() > 0
    assert (tmp_path / "merging.png").stat().st_size


def test_copies_of_quadratic_losses_merge_at_the_minimum_of_their_sum() -> None:
    from examples.merging import DAMPING, merged

    matrices = [x @ x.mT + torch.eye(5) for x in torch.randn(2, 5, 5, dtype=torch.float64)]
    copies = list(torch.randn(2, 5, dtype=torch.float64))
    found = merged(
        [{"w": w} for w in copies],
        [lambda block, F=F: {"w": block["w"] @ F} for F in matrices],
        rtol=1e-12,
    )["w"]
    mean_copy = (copies[0] + copies[1]) / 2
    damping = 2 * DAMPING * torch.eye(5, dtype=torch.float64)
    right = matrices[0] @ copies[0] + matrices[1] @ copies[1] + damping @ mean_copy
    expected = torch.linalg.solve(matrices[0] + matrices[1] + damping, right)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_a_penalty_preserves_earlier_tasks(tmp_path: Path) -> None:
    from examples.continual import main

    found = main(small=True, out=tmp_path / "continual.png")
    free, diagonal, kronecker = (each.mean(0) for each in found.values())
    torch.testing.assert_close(diagonal[0], free[0])
    assert kronecker.mean() > free.mean() + 0.02
    assert (tmp_path / "continual.png").stat().st_size


def test_a_penalty_lowers_the_top_eigenvalue_at_little_loss(tmp_path: Path) -> None:
    from examples.penalty import main

    runs = main(small=True, out=tmp_path / "penalty.png")
    free, penalised = runs[0.0], runs[0.03]
    assert max(penalised.tops) < 0.8 * max(free.tops)
    assert penalised.losses[-1] < 2 * free.losses[-1]
    assert penalised.losses[-1] < 0.2 * penalised.losses[0]
    assert (tmp_path / "penalty.png").stat().st_size


def test_the_central_flow_stays_at_the_edge_and_closer_to_descent_than_gradient_flow(
    tmp_path: Path,
) -> None:
    from examples.central_flow import CENTRAL, FLOW, main

    found = main(small=True, out=tmp_path / "central_flow.png")
    sharpness, losses, distances = found.quantities.values()
    assert max(sharpness[CENTRAL]) < 1.01 * found.edge < min(sharpness[FLOW][-10:])
    assert sharpness[CENTRAL][-1] > 0.99 * found.edge
    assert all(values[-1] < 0.2 * values[0] for values in losses.values())
    # The first oscillation of descent has ended by then.
    late = [i for i, step in enumerate(found.steps) if step >= 420]
    assert len(late) > 3
    assert all(distances[CENTRAL][i] < 0.5 * distances[FLOW][i] for i in late)
    assert (tmp_path / "central_flow.png").stat().st_size


def test_the_eigenvalues_of_an_ensemble_are_those_of_each_net(tmp_path: Path) -> None:
    from examples.ensemble import main, problem

    found = main(small=True, out=tmp_path / "ensemble.png")
    loss, start, batch = problem(200)
    assert found.nets.shape == (8, len(start))
    last = list(found.eigenvalues.values())[-1]
    # Descent at the edge amplifies rounding, and below it does not.
    alone = start
    for _ in range(400):
        alone = alone - found.rates[0] * torch.func.grad(loss)(alone, batch)
    torch.testing.assert_close(found.nets[0], alone, rtol=1e-6, atol=1e-8)
    for i in (0, 7):
        matvec = hf.hvp(loss)(found.nets[i], batch)
        top = hf.lanczos(matvec, alone, k=3, which="LA", rtol=1e-8, seed=1)
        expected = top.values.double().sort().values
        torch.testing.assert_close(last[i, -3:], expected, rtol=1e-5, atol=0.0)
    tops = last[:, -1] * found.rates / 2
    assert 0.9 < tops[-1] < 1.1
    assert tops[0] < 0.5


def test_hypergradients_are_finite_differences_and_find_wrong_labels(tmp_path: Path) -> None:
    from examples.hypergradient import inner, main, outer, problem, trained

    seen, validation, _, _ = problem(100)
    h = torch.linspace(-1, 1, 100).double()
    w = trained(h, seen, torch.zeros(64, 10).double())
    slope = hf.implicit_gradient(
        outer, inner, w, h, outer_batches=[validation], inner_batches=[seen], rtol=1e-8
    )
    for i in (0, 50, 99):
        step = torch.zeros(100).double()
        step[i] = 1e-2
        ahead, behind = (outer(trained(h + s, seen, w), h, validation) for s in (step, -step))
        torch.testing.assert_close(slope.gradient[i], (ahead - behind) / 2e-2, rtol=1e-2, atol=1e-6)

    found = main(small=True, out=tmp_path / "hypergradient.png")
    assert found.weights[found.wrong].mean() < 0.3 < 0.7 < found.weights[~found.wrong].mean()
    assert found.accuracies[-1] > found.accuracies[0] + 0.05
    assert (tmp_path / "hypergradient.png").stat().st_size


def test_influence_finds_mislabelled_digits_and_predicts_what_leaving_out_does(
    tmp_path: Path,
) -> None:
    from examples.influence import main

    found = main(small=True, out=tmp_path / "influence.png")
    # A tenth would be found by chance.
    assert found.detected > 0.5
    torch.testing.assert_close(found.predicted, found.real, rtol=0.2, atol=0.0)
    assert float(torch.corrcoef(torch.stack([found.predicted, found.real]))[0, 1]) > 0.99
    assert (tmp_path / "influence.png").stat().st_size


def test_sharpness_rises_to_the_edge_in_full_batches_and_stays_below_in_small_ones(
    tmp_path: Path,
) -> None:
    from examples.sharpness import LR, main

    found = main(small=True, out=tmp_path / "sharpness.png")
    edge = 2 / LR
    full, small = ([point.top[0] / edge for point in points] for points in found.values())
    assert full[0] < 0.9
    assert 0.9 < mean(full[-10:]) < 1.2
    assert mean(small[-10:]) < 0.95 < mean(full[-10:])
    assert all(points[-1].loss < 0.2 * points[0].loss for points in found.values())
    assert (tmp_path / "sharpness.png").stat().st_size


@pytest.mark.parametrize("trained", [True, False])
def test_spectra_of_all_layers_of_a_language_model(
    trained: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers")
    from examples.llm_layers import main

    if trained and not (DATA / "stories260K").is_dir():
        pytest.skip(f"no {DATA / 'stories260K'}")
    monkeypatch.setenv("HESSFUNC_DATA", str(DATA if trained else tmp_path))
    found = main(small=True, out=tmp_path / "layers.png")
    assert "\n1 sequence of 24 tokens, 6 products per block\n" in capsys.readouterr().out
    kinds = [f"{kind} {layer}" for layer in range(5) for kind in ("attention", "MLP")]
    assert list(found) == ["embedding", *kinds]
    assert sum(density.n for density in found.values()) == 32768 + 5 * (12288 + 33024)
    largest = [float(density.nodes.max()) for density in found.values()]
    # They differ widely.
    assert max(largest) > 3 * min(largest) > 0
    assert (tmp_path / "layers.png").stat().st_size


def test_every_plot_function_has_a_figure(tmp_path: Path) -> None:
    from examples.plots import main
    from hessfunc import plot

    assert main(small=True, out=tmp_path).keys() == set(plot.__all__)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"plot-{name}.png" for name in plot.__all__}
