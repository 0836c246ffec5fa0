"""Parts of an analysis in order: eigenvalues, trace, density, landscapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import hessfunc as hf
from hessfunc.algorithms.results import Result
from hessfunc.algorithms.results.landscape import Landscape
from hessfunc.app.problems.targets import Problem
from hessfunc.app.report import NAMES, Part, brief
from hessfunc.recipes.landscape import landscape
from hessfunc.spaces.of import space_of
from hessfunc.trees import tree_map, whole

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Curvature functions by the name of the option.
CURVATURES: dict[str, Callable[[Any], Any]] = {
    "hessian": hf.hvp,
    "ggn": hf.ggnvp,
    "fisher": hf.fvp,
    "efisher": hf.efvp,
}
OnProgress: TypeAlias = Callable[[float, str], None]
OnPart: TypeAlias = Callable[[str], OnProgress]


def analyse(
    problem: Problem,
    *,
    curvature: str = "hessian",
    only: Collection[str] = NAMES,
    k: int | None,
    probes: int,
    steps: int,
    trace_rtol: float,
    max_matvecs: int,
    points: int,
    radius: float,
    seed: int,
    checkpoint: Path | None,
    mesh: DeviceMesh | None = None,
    on_part: OnPart,
) -> Iterator[Part]:
    """Yield each part of the analysis of a curvature matrix when it is finished.

    Args:
        problem: Loss, parameters and batches.
        curvature: Name of the matrix: ``"hessian"``, ``"ggn"``, ``"fisher"`` or ``"efisher"``.
        only: Names of the parts that are computed. The line and the plane need the eigenvalues.
        k: Number of eigenvalues of largest absolute value; None for ten, or for all if there are
            fewer.
        probes: Number of random vectors of the density.
        steps: Lanczos steps per random vector.
        trace_rtol: Tolerance of the trace: relative half-width of its 95 % interval.
        max_matvecs: Budget of matrix-vector products of each eigenvalue run and of the trace.
        points: Points per axis of the loss along a line and over a plane; 0 for neither.
        radius: Distance that line and plane cover along the unit eigenvectors.
        seed: Seed of all random vectors.
        checkpoint: Folder with checkpoints of all parts, from which they resume; None for no
            checkpoints.
        mesh: Mesh of ranks that divide the work, all of which call this function; None for a
            single process, and for a sharded model, which divides the work by itself.
        on_part: Function that is called with the name of each part that starts. It returns a
            function that is called with the finished fraction of the part, in [0, 1], and a short
            status text.
    """
    params = problem.params
    k = min(10, space_of(params).n) if k is None else k
    max_matvecs = max(max_matvecs, 2 * k, 4)
    matvec = hf.over_batches(CURVATURES[curvature](problem.loss), mesh=mesh)(
        params, problem.batches
    )
    space = None if mesh is None else hf.sharded(params, mesh)
    common: dict[str, Any] = {"seed": seed, "space": space}
    pairs = partial(hf.lanczos, matvec, params, rtol=1e-3, max_matvecs=max_matvecs, **common)

    def part(name: str, run: Callable[..., Result], fraction: Callable[[Any], float]) -> Part:
        on_progress = on_part(name)
        started = time.perf_counter()
        result = run(callback=lambda running: on_progress(fraction(running), brief(running)))
        if isinstance(result, hf.results.Eigenpairs):
            gathered = space.gathered if space is not None else partial(tree_map, whole)
            result = replace(result, vectors=gathered(result.vectors))
        on_progress(1.0, brief(result))
        return Part(name, result, time.perf_counter() - started)

    def kept(name: str, run: Callable[..., Result]) -> Callable[..., Result]:
        return partial(run, checkpoint=None if checkpoint is None else checkpoint / name)

    def converged(running: hf.results.Eigenpairs) -> float:
        return float(running.converged.double().mean())

    top = None
    if "eigenvalues" in only:
        top = part("eigenvalues", kept("eigenvalues", partial(pairs, k=k)), converged)
        yield top
    if "smallest" in only:
        smallest = partial(pairs, k=1, which="SA")
        yield part("smallest", kept("smallest", smallest), converged)
    if "trace" in only:
        trace = partial(
            hf.trace, matvec, params, rtol=trace_rtol, max_matvecs=max_matvecs, **common
        )
        yield part("trace", kept("trace", trace), lambda running: running.matvecs / max_matvecs)
    if "density" in only:
        density = partial(hf.slq, matvec, params, probes=probes, steps=steps, **common)
        wanted = probes * steps
        yield part("density", kept("density", density), lambda running: running.matvecs / wanted)
    if space is not None and space.ranks.rank:
        # Only rank 0 evaluates the landscape, whose evaluations are not divided among ranks.
        return
    for name, count in (("line", 1), ("plane", 2)):
        if top is not None and name in only and points and count <= k:
            along = partial(_landscape, problem, top.result, count, points, radius)
            yield part(name, along, _known)


def _landscape(
    problem: Problem, pairs: Any, count: int, points: int, radius: float, /, **options: Any
) -> Landscape:
    """Return the loss along the first ``count`` eigenvectors."""
    along = tree_map(lambda leaf: leaf[:count], pairs.vectors)
    return landscape(
        problem.loss,
        problem.params,
        problem.batches,
        along,
        radius=radius,
        points=points,
        **options,
    )


def _known(running: Landscape) -> float:
    return float(running.values.isfinite().double().mean())
