from dataclasses import replace

import pytest

from hessfunc import plot
from hessfunc.algorithms.results import Eigenpairs


def test_eigenvalues_tell_converged_from_not(pairs: Eigenpairs) -> None:
    ax = plot.eigenvalues(pairs)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"converged", "not converged"} <= set(labels)
    ax.figure.draw_without_rendering()


def test_eigenvalues_that_are_not_finite_are_refused(pairs: Eigenpairs) -> None:
    with pytest.raises(ValueError, match="eigenvalues are NaN or infinite"):
        plot.eigenvalues(replace(pairs, values=pairs.values * float("nan")))
