"""Each example runs in small, and shows what it says."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest
import torch

from tests.datapath import DATA

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib").use("Agg")

pytestmark = pytest.mark.slow


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


def test_pruning_by_the_diagonal(tmp_path: Path) -> None:
    from examples.pruning import main

    rows = {row.sparsity: row for row in main(small=True, out=tmp_path / "pruning.png")}
    whole = rows[0.0]
    assert whole.accuracy["diagonal"] > 0.85
    for sparsity in (0.3, 0.5, 0.6):
        loss = rows[sparsity].loss
        assert loss["diagonal"] < loss["magnitude"]
        assert loss["diagonal"] < 1.5 * whole.loss["diagonal"]
        assert loss["random"] > 10 * loss["diagonal"]
        assert rows[sparsity].accuracy["diagonal"] > rows[sparsity].accuracy["random"] + 0.4
    assert (tmp_path / "pruning.png").stat().st_size


def test_a_penalty_lowers_the_top_eigenvalue_at_little_loss(tmp_path: Path) -> None:
    from examples.penalty import main

    runs = main(small=True, out=tmp_path / "penalty.png")
    free, penalised = runs[0.0], runs[0.03]
    assert max(penalised.tops) < 0.8 * max(free.tops)
    assert penalised.losses[-1] < 2 * free.losses[-1]
    assert penalised.losses[-1] < 0.2 * penalised.losses[0]
    assert (tmp_path / "penalty.png").stat().st_size


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
