"""Ours: the same blocks, and products with one vector of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

import hessfunc as hf
from bench.blocks.problems import Problem
from hessfunc.kronecker import Blocks, Kronecker
from hessfunc.transforms.chunks import Curvature

CURVATURES: dict[str, Curvature] = {"HMP": hf.hvp, "GGNMP": hf.ggnvp, "PCHMP": hf.pchvp}


def made(problem: Problem, kind: str, **options: Any) -> Callable[[], Blocks]:
    """The blocks of one of ``kflr``, ``kfra``, ``kfac`` and ``ekfac``."""
    curvature = getattr(hf, kind)(problem.loss, problem.model, **options)
    return partial(curvature, problem.params, problem.batch)


def fresh(blocks: Blocks) -> Blocks:
    """The same blocks, without the eigenvalues that they have found."""
    return Blocks({name: replace(block) for name, block in blocks.items()}, blocks.space)


def recombined(problem: Problem, kind: str) -> Blocks:
    """As BackPACK: B of "reduce", and A of "expand" times the positions."""
    expand, reduce = (made(problem, kind, sharing=how)() for how in ("expand", "reduce"))
    return Blocks(
        {
            name: Kronecker(
                reduce[name].left,
                expand[name].right * problem.positions.get(name, 1),
                expand[name].shape,
            )
            for name in expand
        },
        expand.space,
    )


def held(problem: Problem, kind: str) -> dict[str, Curvature]:
    """A curvature function of each parameter alone, with the others fixed."""
    params = problem.params
    return {
        name: CURVATURES[kind](
            hf.hold(problem.loss, {n: p for n, p in params.items() if n != name})
        )
        for name in params
    }


def apart(problem: Problem, kind: str, repeats: int) -> Callable[[], dict[str, Tensor]]:
    """Each block prepared by itself, and its product with one vector, so many times."""
    curvatures, params, vectors = held(problem, kind), problem.params, problem.vectors(1)

    def work() -> dict[str, Tensor]:
        images = {}
        for name, curvature in curvatures.items():
            matvec = curvature({name: params[name]}, problem.batch)
            for _ in range(repeats):
                images |= matvec({name: vectors[name]})
        return images

    return work


def at_once(problem: Problem, kind: str, repeats: int) -> Callable[[], dict[str, Tensor]]:
    """One matrix prepared, and the product of all its blocks with one vector, so many times."""
    curvature, vectors = CURVATURES[kind](problem.loss), problem.vectors(1)

    def work() -> dict[str, Tensor]:
        matvec = curvature(problem.params, problem.batch)
        # The positive-curvature Hessian has no other blocks.
        blocks = matvec if kind == "PCHMP" else hf.matvecs.per_block(matvec, problem.params)
        for _ in range(repeats):
            images = blocks(vectors)
        return images

    return work
