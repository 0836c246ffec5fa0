from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hessfunc import plot
from hessfunc.training.history import Run
from hessfunc.training.loop import Record
from tests.training.records import record


def measured(epoch: float, test_loss: float | None, test_accuracy: float | None) -> Record:
    return record(
        epoch=epoch,
        loss=2.0 - epoch,
        accuracy=0.5 + 0.1 * epoch,
        test_loss=test_loss,
        test_accuracy=test_accuracy,
        gradients=10 * epoch,
    )


def heights(ax: Any, linestyle: str) -> list[list[float]]:
    """Return the heights of lines of this style; that of the legend alone has none."""
    drawn = [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() == linestyle]
    return [each for each in drawn if each]


def test_of_the_test_examples_the_lines_are_dashed() -> None:
    records = (measured(0.0, 3.0, 0.2), measured(1.0, 2.5, 0.4))
    figure = plot.trainings([Run(method="SGD", seed=0, ended="complete", records=records)])
    for row, training, test in (
        (figure.axes[:2], [2.0, 1.0], [3.0, 2.5]),
        (figure.axes[2:], [0.5, 0.6], [0.2, 0.4]),
    ):
        for ax in row:
            assert heights(ax, "-") == [training]
            assert heights(ax, "--") == [test]
            assert len({line.get_color() for line in ax.lines if len(line.get_xdata())}) == 1
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["SGD", "test examples"]
    figure.draw_without_rendering()


def tracked() -> Run:
    """Of three epochs, before the last of which the batch grew; it is no longer watched then."""
    start = measured(0.0, None, None)
    records = (
        replace(start, lr=0.1),
        replace(start, epoch=1.0, gradients=10.0, eigenvalue=-8.0, lr=0.1),
        replace(start, epoch=2.0, gradients=20.0, eigenvalue=4.0, lr=0.1),
        replace(start, epoch=3.0, gradients=40.0, ratio=2, lr=0.2),
    )
    return Run(method="ABSA", seed=0, ended="complete", records=records)


def test_tracked_trainings_have_eigenvalue_batch_size_and_learning_rate() -> None:
    figure = plot.trainings([tracked()], batch_size=32)
    labels = [ax.get_ylabel() for ax in figure.axes[::2]]
    assert labels[2:] == ["|dominant eigenvalue|", "batch size", "learning rate"]
    drawn = [
        [list(line.get_data()[i]) for i in (0, 1)] for ax in figure.axes[4::2] for line in ax.lines
    ]
    assert drawn == [
        [[1, 2], [8, 4]],
        [[0, 1, 2, 3], [32, 32, 32, 64]],
        [[0, 1, 2, 3], [0.1, 0.1, 0.1, 0.2]],
    ]
    # The larger batch is that of the third epoch.
    assert figure.axes[6].lines[0].get_drawstyle() == "steps-pre"
    assert [label.get_text() for label in figure.axes[6].get_yticklabels()] == ["32", "64"]
    assert list(figure.axes[5].lines[0].get_xdata()) == [10, 20]
    figure.draw_without_rendering()


def test_without_the_size_of_a_base_batch_they_are_counted() -> None:
    figure = plot.trainings([tracked()])
    assert figure.axes[6].get_ylabel() == "base batches a step"
    assert list(figure.axes[6].lines[0].get_ydata()) == [1, 1, 1, 2]


@pytest.mark.parametrize("eigenvalue", [0.0, None])
def test_what_has_no_logarithm_is_left_out(eigenvalue: float | None) -> None:
    run = tracked()
    records = (*run.records[:2], replace(run.records[2], eigenvalue=eigenvalue))
    figure = plot.trainings([replace(run, records=records)])
    assert list(figure.axes[4].lines[0].get_xdata()) == [1]
    figure.draw_without_rendering()
    none = plot.trainings([replace(run, records=records[2:])])
    none.draw_without_rendering()


def test_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from hessfunc.plot.trainings import draw, trainings

    runs = [
        Run(method=method, seed=seed, ended="complete", records=(record(), record(gradients=9.0)))
        for method in ("SGD", "PCH")
        for seed in (0, 1)
    ]
    figure = trainings(runs)
    loss = figure.axes[0]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["SGD", "PCH"]
    # No test examples, no dashed lines.
    assert len(loss.lines) == 4
    assert loss.lines[0].get_color() == loss.lines[1].get_color() != loss.lines[2].get_color()
    assert list(figure.axes[3].lines[0].get_xdata()) == [4.5, 9.0]
    draw(tmp_path / "curves.png", runs)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_no_training_is_no_figure() -> None:
    with pytest.raises(ValueError, match="no training to draw"):
        plot.trainings([])
