"""All methods, in the order of the tables."""

from __future__ import annotations

from bench.accuracy import ours
from bench.accuracy.peers import curvlinops, eigenthings, pyhessian
from bench.accuracy.questions import Method

METHODS: list[Method] = [
    *ours.METHODS,
    *pyhessian.METHODS,
    *eigenthings.METHODS,
    *curvlinops.METHODS,
]
