"""The cell of the spectral density: so many Lanczos steps from so many probes."""

from __future__ import annotations

from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

import hessfunc as hf
from bench.speed import models, ours
from bench.speed.asked import Alternative, Asked, Work, differentiable_twice
from bench.speed.cells import Cell
from bench.speed.peers import curvlinops, eigenthings, pyhessian
from bench.speed.turns import Effort, Judged, prepared, rows_of, timed
from hessfunc.randomness import seeded

PROBES = 4
STEPS = 100
TOLERANCE = 1e-2


class Nodes(NamedTuple):
    """The nodes of each probe ``[probes, steps]``, and the products that they took."""

    nodes: Tensor
    products: int


def density(name: str, effort: Effort, steps: int = STEPS) -> Cell:
    """The density of the Hessian of a batch.

    What all have to agree on is the largest eigenvalue, as each probe's last nodes are there.
    """
    asked = Asked(models.made(name), k=PROBES)
    matvec, params = ours.matvec_of(asked)
    top = float(hf.lanczos(matvec, params, k=1, which="LA", rtol=TOLERANCE / 10, seed=0).values[0])

    def judge(found: Nodes) -> Judged:
        largest = found.nodes.nan_to_num(-torch.inf).amax(1)
        return Judged(float((largest / top - 1).abs().max()), found.products)

    ready, gaps = prepared(asked, ours.with_both_libraries(_alternatives(steps)), judge)
    found = timed(asked, ready, effort, TOLERANCE, each=False)
    return Cell(
        title=f"{asked.case.title}: {steps} steps, {PROBES} probes",
        rounds=len(found.gradients),
        gradient=median(found.gradients),
        tolerance=TOLERANCE,
        rows=rows_of(ready, found),
        gaps=gaps,
    )


def _alternatives(steps: int) -> list[Alternative]:
    def of_ours(asked: Asked) -> Work:
        def call() -> hf.results.Density:
            matvec, params = ours.matvec_of(asked)
            return hf.slq(matvec, params, probes=PROBES, steps=steps, seed=0)

        return Work(call, lambda found: Nodes(found.nodes, found.matvecs))

    def of_pyhessian(asked: Asked) -> Work:
        def call(m: int = steps) -> list[list[float]]:
            made = pyhessian.hessian_of(asked)
            with differentiable_twice(asked.case), seeded(0):
                values, _ = made.density(iter=m, n_v=PROBES)
            asked.case.model.zero_grad()
            return values

        # Where it breaks down, it does so after the last step.
        call(2)
        return Work(call, lambda values: Nodes(torch.tensor(values), PROBES * steps))

    def of_eigenthings(asked: Asked) -> Work:
        from hessian_eigenthings.algorithms import spectral_density

        def call() -> Tensor:
            operator = eigenthings.operator_of(asked)
            with differentiable_twice(asked.case):
                return spectral_density(
                    operator, num_runs=PROBES, lanczos_steps=steps, seed=0
                ).raw_eigenvalues

        return Work(call, lambda nodes: Nodes(nodes, PROBES * steps))

    def of_curvlinops(asked: Asked) -> Work:
        # As `lanczos_approximate_spectrum`, whose bounds take more products.
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        def call() -> list[Tensor]:
            operator = curvlinops.operator_of(asked)
            with differentiable_twice(asked.case), seeded(0):
                return [fast_lanczos(operator, steps)[0] for _ in range(PROBES)]

        return Work(
            call,
            lambda nodes: Nodes(torch.stack(nodes), PROBES * steps),
            "without its bounds of the spectrum",
        )

    return [
        Alternative("hessfunc, slq", "hessfunc", "ours", of_ours),
        Alternative("PyHessian, density", "PyHessian", "peer", of_pyhessian),
        Alternative(
            "hessian-eigenthings, spectral_density",
            "hessian-eigenthings",
            "peer",
            of_eigenthings,
        ),
        Alternative("curvlinops, fast_lanczos", "curvlinops-for-pytorch", "peer", of_curvlinops),
    ]
