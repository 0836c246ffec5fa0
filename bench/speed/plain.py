"""Plain autograd, as one writes it without a library."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench import baselines
from bench.baselines import Vector
from bench.speed.asked import Alternative, Asked, Work, flat


def _kept(asked: Asked) -> Work:
    product, vector = baselines.kept(asked.case), asked.vectors()[0]
    return Work(lambda: product(vector), flat)


def _rebuilt(asked: Asked) -> Work:
    product, vector = baselines.rebuilt(asked.case), asked.vectors()[0]
    return Work(lambda: product(vector), flat)


def _gauss_newton(asked: Asked) -> Work:
    product, vector = baselines.gauss_newton(asked.case), asked.vectors()[0]
    return Work(lambda: product(vector), flat)


def _over_batches(asked: Asked) -> Work:
    vectors = asked.vectors()
    examples = sum(len(inputs) for inputs, _ in asked.batches)

    def call() -> list[Vector]:
        total = [[torch.zeros_like(leaf) for leaf in vector] for vector in vectors]
        for inputs, targets in asked.batches:
            product = baselines.kept(replace(asked.case, inputs=inputs, targets=targets))
            for sums, vector in zip(total, vectors, strict=True):
                for target, image in zip(sums, product(vector), strict=True):
                    target.add_(image, alpha=len(inputs) / examples)
        return total

    return Work(call, lambda total: torch.cat([flat(sums) for sums in total]))


KEPT = Alternative("autograd, graph kept", "", "plain", _kept, "graph kept, 1 vector")
PRODUCTS = [
    KEPT,
    Alternative("autograd, graph rebuilt", "", "plain", _rebuilt, "graph rebuilt, 1 vector"),
]
GAUSS_NEWTON = [Alternative("autograd, graphs kept", "", "plain", _gauss_newton)]
DATA = [Alternative("autograd, a graph a batch", "", "plain", _over_batches)]


def expected(asked: Asked) -> torch.Tensor:
    """The products that all alternatives have to agree with, ``[k, n]``."""
    if asked.batches:
        work = _over_batches(asked)
        return work.answer(work.call())
    of = {"hessian": baselines.kept, "ggn": baselines.gauss_newton}[asked.matrix]
    product = of(asked.case)
    return torch.cat([flat(product(vector)) for vector in asked.vectors()])
