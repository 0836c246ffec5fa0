"""The heat map of overlaps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hessfunc as hf
from hessfunc import plot

plt = pytest.importorskip("matplotlib.pyplot")
E = torch.eye(4, dtype=torch.float64)
MADE = hf.overlap([E[0], E[1]], [0.6 * E[0] + 0.8 * E[2], E[1], E[3]])


def test_each_cell_is_the_overlap_of_two_vectors() -> None:
    ax = plot.overlap(MADE, rows=["first", "second"], columns=["gradient", "update", "other"])
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.6, 0, 0], [0, 1, 0]], atol=1e-12)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["first", "second"]
    assert ax.images[0].get_clim() == (0, 1)
    assert "0°" in ax.get_title(loc="left")
    assert "53.1°" in ax.get_title(loc="left")
    assert {text.get_text() for text in ax.texts} == {".60", ".00", "1.00"}


def test_many_vectors_have_no_numbers() -> None:
    made = hf.overlap(*2 * [torch.eye(40)], like=torch.zeros(40))
    assert not plot.overlap(made).texts


@pytest.mark.parametrize("names", [["one"], "ab"])
def test_the_number_of_names_is_that_of_the_vectors(names: Any) -> None:
    with pytest.raises(ValueError, match="rows must be a list with one name for each of 2"):
        plot.overlap(MADE, rows=names)


def test_other_results_are_refused() -> None:
    with pytest.raises(TypeError, match="takes the result of hessfunc.overlap"):
        plot.overlap(torch.eye(2))  # type: ignore[arg-type]
