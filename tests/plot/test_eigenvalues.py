from hessfunc import plot
from hessfunc.algorithms.results import Eigenpairs


def test_eigenvalues_tell_converged_from_not(pairs: Eigenpairs) -> None:
    ax = plot.eigenvalues(pairs)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"converged", "not converged"} <= set(labels)
    ax.figure.draw_without_rendering()
