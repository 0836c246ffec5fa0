"""Adaptive batch sizes with adversarial training beside SGD: accuracy, updates, eigenvalues.

``python -m bench.absa digits mnist`` trains C1 on scikit-learn's digits and on 10,000 images of
MNIST, ``python -m bench.absa cifar10 --seeds 1`` a ResNet-20 on the subset of CIFAR-10; each with
SGD, with SGD on large batches, and with ABSA. Tables, curves and all numbers are written to
``bench/results/absa-*``. Trainings keep their state under ``build/absa``: a command that was
killed goes on when it is started again. Data are looked for under HESSFUNC_DATA.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise, product
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hessfunc.app import tasks
from hessfunc.files import write_whole
from hessfunc.optim.schedules import Schedule, absa, constant
from hessfunc.training import history
from hessfunc.training.checkpoint import TrainingCheckpoint
from hessfunc.training.examples import Examples
from hessfunc.training.history import Run
from hessfunc.training.loop import Record
from hessfunc.training.methods import SGD
from hessfunc.training.runs import run
from tests.datapath import DATA

RESULTS = Path(__file__).parent / "results"
STATES = Path("build") / "absa"
COLOURS = {"SGD": "#8a8f98", "ABSA": "#c8553d", "SGD, large batches": "#1f4e79"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A net on a data set.

    Attributes:
        net: as `hessfunc.app.tasks` names it.
        images: to train on.
        tested: to test on.
        batch_size: of a base batch.
        max_ratio: the most base batches in a step.
        epochs: passes over the images.
        lr: of SGD, and of ABSA at first.
        lr_decay_epochs: after which the learning rate falls to a fifth.
        patience: of ABSA, in epochs.
    """

    net: str
    images: int
    tested: int
    batch_size: int
    max_ratio: int
    epochs: int
    lr: float
    lr_decay_epochs: tuple[int, ...]
    patience: int = 10


CASES = {
    "digits": Case(
        net="c1",
        images=1500,
        tested=297,
        batch_size=32,
        max_ratio=16,
        epochs=30,
        lr=0.01,
        lr_decay_epochs=(20,),
    ),
    "mnist": Case(
        net="c1",
        images=10_000,
        tested=2000,
        batch_size=64,
        max_ratio=16,
        epochs=6,
        lr=0.01,
        lr_decay_epochs=(4,),
        patience=3,
    ),
    "cifar10": Case(
        net="resnet20",
        images=4000,
        tested=1000,
        batch_size=64,
        max_ratio=16,
        epochs=45,
        lr=0.1,
        lr_decay_epochs=(15, 30),
    ),
}


def schedules(case: Case) -> dict[str, tuple[Schedule, float]]:
    """Each with its learning rate; that of large batches is in proportion to them."""
    decay = {"lr_decay": 0.2, "lr_decay_epochs": case.lr_decay_epochs}
    adaptive = absa(epochs=case.epochs, max_ratio=case.max_ratio, patience=case.patience, **decay)
    large = constant(ratio=case.max_ratio, **decay)
    return {
        "SGD": (constant(**decay), case.lr),
        "ABSA": (adaptive, case.lr),
        "SGD, large batches": (large, case.max_ratio * case.lr),
    }


def trained(name: str, case: Case, method: str, seed: int, data: tuple[Examples, Examples]) -> Run:
    """One training, which goes on from its state."""
    schedule, lr = schedules(case)[method]
    settings = {"data": name, "method": method, "seed": seed, **asdict(case)}
    STATES.mkdir(parents=True, exist_ok=True)
    file = STATES / f"{name}-{method.replace(', ', '-').replace(' ', '-')}-{seed}.pt"
    return run(
        method,
        tasks.net(name, case.net),
        SGD(lr=lr),
        *data,
        epochs=case.epochs,
        batch_size=case.batch_size,
        seed=seed,
        schedule=schedule,
        track="top",
        checkpoint=TrainingCheckpoint(file, settings),
    )


def table(case: Case, runs: Sequence[Run]) -> str:
    """One row a method, means over the seeds."""
    head = ("method", "test accuracy", "updates", "saved", "largest batch", "grown after epochs")
    lines = [f"| {' | '.join(head)} |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    methods = dict.fromkeys(found.method for found in runs)
    updates = {m: mean([r.records[-1].step for r in runs if r.method == m]) for m in methods}
    for method in methods:
        own = [found for found in runs if found.method == method]
        accuracies = [100 * (found.records[-1].test_accuracy or 0) for found in own]
        spread = statistics.stdev(accuracies) if len(own) > 1 else 0.0
        largest = max(record.ratio for found in own for record in found.records)
        cells = (
            method,
            f"{mean(accuracies):.2f}{f' ± {spread:.2f}' if len(own) > 1 else ''} %",
            f"{updates[method]:,.0f}",
            f"{1 - updates[method] / updates['SGD']:.0%}",
            f"{largest * case.batch_size:,}",
            "; ".join(growth(case, found.records) for found in own) if method == "ABSA" else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    note = "Seed by seed; in italics where patience ran out, else the eigenvalue had fallen."
    return "\n".join([*lines, "", note, ""])


def growth(case: Case, records: Sequence[Record]) -> str:
    """The epochs after which the batch grew, in italics where its eigenvalue had not fallen."""
    schedule, _ = schedules(case)["ABSA"]
    states = list(
        accumulate(
            (r.eigenvalue for r in records[1:-1]), schedule.after_epoch, initial=schedule.init()
        )
    )
    grown = (
        f"{new.epoch}" if old.reference not in (None, new.reference) else f"*{new.epoch}*"
        for old, new in pairwise(states)
        if new.ratio > old.ratio
    )
    return ", ".join(grown) or "never"


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def figure(case: Case, runs: Sequence[Run]) -> Figure:
    """Eigenvalues and batch sizes against epochs, test accuracy against updates."""
    found = Figure(figsize=(11, 3.6), layout="constrained")
    curved, batches, accuracy = found.subplots(1, 3)
    lines(curved, runs, lambda r: r.epoch, lambda r: abs(r.eigenvalue or math.nan))
    curved.set(xlabel="epochs", ylabel="|dominant eigenvalue|", yscale="log")
    # Of the epoch that ends there.
    lines(batches, runs, lambda r: r.epoch, lambda r: r.ratio * case.batch_size, "steps-pre")
    batches.set(xlabel="epochs", ylabel="batch size", yscale="log")
    sizes = sorted({r.ratio * case.batch_size for found in runs for r in found.records})
    batches.set_yticks(sizes, labels=map(str, sizes))
    batches.minorticks_off()
    lines(accuracy, runs, lambda r: r.step, lambda r: 100 * (r.test_accuracy or 0))
    accuracy.set(xlabel="updates", ylabel="test accuracy (%)", xscale="log")
    ends = [100 * (found.records[-1].test_accuracy or 0) for found in runs]
    accuracy.set_ylim(min(ends) - 8, 100)
    accuracy.legend(frameon=False, fontsize="small")
    return found


def lines(
    ax: Axes,
    runs: Sequence[Run],
    across: Callable[[Record], float],
    up: Callable[[Record], float],
    style: str = "default",
) -> None:
    """One a training, from the first epoch on."""
    ax.spines[["top", "right"]].set_visible(False)
    labelled: set[str] = set()
    for found in runs:
        xs, ys = ([of(r) for r in found.records[1:]] for of in (across, up))
        label = None if found.method in labelled else found.method
        labelled.add(found.method)
        colour = COLOURS[found.method]
        ax.plot(xs, ys, color=colour, linewidth=1.3, label=label, drawstyle=style)


def compared(name: str, case: Case, seeds: int) -> None:
    """All methods and seeds of a case; results are written after each training."""
    data = tasks.examples(name, path=None if name == "digits" else DATA)
    data = data[0][: case.images], data[1][: case.tested]
    runs: list[Run] = []
    for seed, method in product(range(seeds), schedules(case)):
        start = time.perf_counter()
        runs.append(trained(name, case, method, seed, data))
        last = runs[-1].records[-1]
        print(
            f"{name}, {method}, seed {seed}: test accuracy {last.test_accuracy:.1%}, "
            f"{last.step:,} updates, {time.perf_counter() - start:.0f} s; {runs[-1].ended}",
            flush=True,
        )
        title = f"{case.net} on {len(data[0]):,} images of {name}, {case.epochs} epochs"
        history.write(RESULTS / f"absa-{name}.json", asdict(case), runs)
        (RESULTS / f"absa-{name}.md").write_text(f"{title}\n\n{table(case, runs)}")
        drawn = figure(case, runs)
        write_whole(
            RESULTS / f"absa-{name}.png",
            lambda file, drawn=drawn: drawn.savefig(file, format="png", dpi=160),
        )
    print(f"\n{(RESULTS / f'absa-{name}.md').read_text()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=["digits", "mnist"], help=", ".join(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {', '.join(unknown)}: choose {', '.join(CASES)}")
    torch.set_num_threads(1)
    for name in options.cases:
        compared(name, CASES[name], options.seeds)


if __name__ == "__main__":
    main()
