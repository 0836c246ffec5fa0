"""Smoothed densities and their figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hessfunc.compat import pyhessian as face

# PyHessian keeps gradients with their graphs, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


@pytest.mark.parametrize("options", [{}, {"num_bins": 300, "sigma_squared": 1e-2, "overhead": 0.5}])
def test_the_density_is_a_mean_of_gaussians(options: dict[str, float]) -> None:
    generator = np.random.default_rng(0)
    nodes = np.sort(generator.normal(0, 3, (2, 6)))
    weights = generator.dirichlet(np.ones(6), 2)
    found, grid = face.density_generate(nodes.tolist(), weights.tolist(), **options)
    overhead, width = options.get("overhead", 0.01), options.get("sigma_squared", 1e-5)
    low, high = nodes[:, 0].mean() - overhead, nodes[:, -1].mean() + overhead
    np.testing.assert_allclose(grid, np.linspace(low, high, options.get("num_bins", 10000)))
    variance = width * max(1, high - low)
    expected = np.zeros_like(grid)
    for run in range(2):
        for node, weight in zip(nodes[run], weights[run], strict=True):
            expected += weight * np.exp(-((grid - node) ** 2) / (2 * variance))
    np.testing.assert_allclose(found, expected / (expected.sum() * (grid[1] - grid[0])), rtol=1e-9)


def test_each_density_has_a_figure_of_its_own(
    figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    axes = [face.get_esd_plot([[0.0, shift + 1.0]], [[0.5, 0.5]]) for shift in (0, 1)]
    assert [len(ax.lines) for ax in axes] == [1, 1]
    assert [ax.get_xlim() for ax in axes] == [(-1, 2), (-1, 3)]
    assert axes[0].get_yscale() == "log"
    assert (tmp_path / "example.pdf").read_bytes().startswith(b"%PDF")


def test_a_figure_has_a_file_and_a_title(figures: Any, tmp_path: Path) -> None:
    file = tmp_path / "spectrum.png"
    ax = face.get_esd_plot([[0.0, 1.0]], [[0.5, 0.5]], filename=file, title="Layer 1")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert ax.get_title() == "Layer 1"
