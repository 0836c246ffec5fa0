from typing import Any

from hessfunc import plot
from hessfunc.training.history import Run
from hessfunc.training.loop import Record


def record(epoch: float, test_loss: float | None, test_accuracy: float | None) -> Record:
    return Record(
        step=1,
        epoch=epoch,
        loss=2.0 - epoch,
        minibatch_loss=None,
        accuracy=0.5 + 0.1 * epoch,
        test_loss=test_loss,
        test_accuracy=test_accuracy,
        matvecs=0,
        gradients=10 * epoch,
        seconds=0.0,
        peak_bytes=0,
    )


def heights(ax: Any, linestyle: str) -> list[list[float]]:
    return [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() == linestyle]


def test_of_the_test_examples_the_lines_are_dashed() -> None:
    records = (record(0.0, 3.0, 0.2), record(1.0, 2.5, 0.4))
    figure = plot.trainings([Run(method="SGD", seed=0, ended="complete", records=records)])
    for row, training, test in (
        (figure.axes[:2], [2.0, 1.0], [3.0, 2.5]),
        (figure.axes[2:], [0.5, 0.6], [0.2, 0.4]),
    ):
        for ax in row:
            assert heights(ax, "-") == [training]
            assert heights(ax, "--") == [test]
            assert len({line.get_color() for line in ax.lines}) == 1
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["SGD"]
    figure.draw_without_rendering()
