"""Published experiments on block-diagonal curvature, as data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from hessfunc.app.tasks import net
from hessfunc.training.examples import Examples
from hessfunc.training.history import Run
from hessfunc.training.methods import SGD, BlockNewton, Method
from hessfunc.training.runs import run


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Comparison of methods that start from the same weights and see the same batches.

    Attributes:
        title: Title of the comparison.
        net: Name of the network in `hessfunc.app.tasks`.
        batch_size: Number of examples per step.
        epochs: Number of passes over the examples.
        methods: Methods by their names in tables.
        dataset: Name of the data set in `hessfunc.app.tasks`.
    """

    title: str
    net: str
    batch_size: int
    epochs: int
    methods: Mapping[str, Method]
    dataset: str = "cifar10"

    def settings(self) -> dict[str, Any]:
        """Return the experiment as plain data."""
        kinds = {name: type(method).__name__ for name, method in self.methods.items()}
        return {**asdict(self), "kinds": kinds}


def compared(
    experiment: Experiment,
    examples: Examples,
    test: Examples,
    /,
    *,
    seeds: int,
    minutes: float | None = None,
    device: torch.device | None = None,
    finished: Collection[tuple[str, int]] = (),
    on_run: Callable[[str, int], Callable[[Run], object]],
) -> Iterator[Run]:
    """Yield each training run of an experiment when it has ended.

    Args:
        experiment: Methods to compare, and their common setting.
        examples: Training examples.
        test: Test examples, on which all runs are evaluated as well.
        seeds: Number of runs per method; their seeds count from 0.
        minutes: Time limit of the steps of each run, in minutes; None for no limit.
        device: Device to train on; None for the device on which models are built.
        finished: Pairs of method and seed that are skipped.
        on_run: Function that is called with the method and the seed of each run that starts. It
            returns the callback of `run`.
    """
    make_model = net(experiment.dataset, experiment.net)
    for seed, (name, method) in product(range(seeds), experiment.methods.items()):
        if (name, seed) not in finished:
            yield run(
                name,
                make_model,
                method,
                examples,
                test,
                epochs=experiment.epochs,
                batch_size=experiment.batch_size,
                seed=seed,
                minutes=minutes,
                device=device,
                callback=on_run(name, seed),
            )


_SGD = SGD(lr=0.1, momentum=0.9)


def _chen(residual: str, max_blocks: int | None = None) -> BlockNewton:
    return BlockNewton(
        curvature=f"hbp-{residual}", lr=0.1, alpha=0.02, max_matvecs=50, max_blocks=max_blocks
    )


def _exact(residual: str, lr: float, alpha: float) -> BlockNewton:
    return BlockNewton(curvature=f"pch-{residual}", lr=lr, alpha=alpha, max_matvecs=200)


# Dangel, Harmeling and Hennig 2019, arXiv 1902.01813.
EXPERIMENTS: dict[str, Experiment] = {
    "exp01": Experiment(
        title="Newton with averaged Hessian backpropagation beside SGD, on a deep perceptron",
        net="chen",
        batch_size=500,
        epochs=100,
        methods={
            "SGD": _SGD,
            "HBP zero": _chen("zero"),
            "HBP abs": _chen("abs"),
            "HBP clip": _chen("clip"),
        },
    ),
    "exp02": Experiment(
        title="Weights whose curvature is cut into blocks, on a deep perceptron",
        net="chen",
        batch_size=500,
        epochs=100,
        methods={
            "SGD": _SGD,
            **{f"HBP abs, {n} block{'s' * (n > 1)}": _chen("abs", n) for n in (1, 2, 4, 16)},
        },
    ),
    "exp08": Experiment(
        title="Newton with the exact positive-curvature Hessian beside SGD, on a conv net",
        net="c4d3",
        batch_size=1000,
        epochs=20,
        methods={
            "SGD": _SGD,
            "PCH zero": _exact("zero", 0.1, 1e-4),
            "PCH abs": _exact("abs", 0.2, 1e-3),
            "PCH clip": _exact("clip", 0.1, 1e-4),
        },
    ),
    "exp09": Experiment(
        title="Newton with the exact positive-curvature Hessian beside SGD, on DeepOBS's 3c3d",
        net="c3d3",
        batch_size=500,
        epochs=20,
        methods={
            "SGD": _SGD,
            "PCH zero": _exact("zero", 0.05, 1e-3),
            "PCH abs": _exact("abs", 0.1, 1e-3),
            "PCH clip": _exact("clip", 0.1, 1e-2),
        },
    ),
}
