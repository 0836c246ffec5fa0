"""The cells, in order of importance, and what each takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from bench.speed import density, eigenpairs, memory, products, trace
from bench.speed.cells import Cell
from bench.speed.rule import rule
from bench.speed.scaling import SCALINGS
from bench.speed.turns import Effort

_QUESTIONS: dict[str, Callable[[str, Effort], Cell]] = {
    "product": products.product,
    "block": products.block,
    "ggn": products.ggn,
    "compiled": products.compiled,
    "data": products.data,
    "memory": memory.memory,
    "eigenpairs": eigenpairs.eigenpairs,
    "trace": trace.trace,
    "density": density.density,
    "rule": rule,
    "scaling": lambda name, effort: SCALINGS[name](effort),
}

# Of these each call takes minutes.
_LONG = {"eigenpairs", "trace", "density"}

# Roughly the seconds of each on two cores, where it was never measured.
PLAN: dict[str, float] = {
    "product/mlp-small": 5,
    "product/mlp-wide": 15,
    "product/gpt": 20,
    "product/resnet20-trained": 30,
    "product/vit": 60,
    "product/llama": 60,
    "product/stories260k": 25,
    "block/mlp-small": 10,
    "block/mlp-wide": 20,
    "block/gpt": 60,
    "block/resnet20-trained": 120,
    "ggn/mlp-small": 10,
    "ggn/mlp-wide": 20,
    "ggn/gpt": 45,
    "ggn/resnet20-trained": 60,
    "data/mlp-wide": 30,
    "memory/mlp-wide": 90,
    "density/gpt": 420,
    "block/vit": 300,
    "ggn/vit": 240,
    "block/llama": 300,
    "ggn/llama": 240,
    "block/stories260k": 60,
    "ggn/stories260k": 60,
    "data/gpt": 240,
    "eigenpairs/resnet20-trained": 2400,
    "trace/resnet20-trained": 4000,
    "memory/gpt": 200,
    "memory/resnet20-trained": 400,
    "data/resnet20-trained": 600,
    "product/resnet20": 30,
    "block/resnet20": 120,
    "ggn/resnet20": 60,
    "compiled/gpt": 200,
    "compiled/llama": 600,
    "compiled/vit": 600,
    "eigenpairs/mlp-small": 30,
    "eigenpairs/mlp-wide": 120,
    "eigenpairs/resnet20": 2400,
    "rule/mlp-small": 15,
    "rule/mlp-wide": 40,
    "rule/lstm": 40,
    "rule/conv-small": 30,
    "rule/gpt-tiny": 30,
    "rule/gpt": 150,
    "rule/resnet20": 200,
    "rule/resnet20-trained": 200,
    "rule/stories260k": 150,
    "rule/vit": 600,
    "rule/llama": 600,
    "rule/mlp-small/64": 30,
    "rule/mlp-wide/64": 120,
    "rule/lstm/64": 120,
    "rule/conv-small/64": 60,
    "rule/gpt-tiny/64": 60,
    "scaling/parameters": 20,
    "scaling/batch": 20,
    "scaling/vectors": 20,
    "scaling/vectors-gpt": 120,
    "scaling/steps": 120,
    "scaling/basis": 60,
}

FAST = [
    "product/mlp-small",
    "product/mlp-wide",
    "product/gpt",
    "block/mlp-small",
    "block/mlp-wide",
    "block/gpt",
    "ggn/mlp-small",
    "ggn/mlp-wide",
    "ggn/gpt",
    "product/resnet20",
    "block/resnet20",
    "scaling/parameters",
    "scaling/batch",
]


def measure(name: str, effort: Effort) -> Cell:
    """The cell of that name.

    Raises:
        FileNotFoundError: its data are not there.
        ModuleNotFoundError: a library that the net takes is not installed.
    """
    question, _, of = name.partition("/")
    if question in _LONG:
        effort = replace(effort, least=min(effort.least, 3))
    return _QUESTIONS[question](of, effort)


def within(
    minutes: float,
    names: list[str],
    took: Callable[[str], float | None],
    clock: Callable[[], float],
) -> Iterator[str]:
    """The names, one after another, each as long as it fits into what is left of the time.

    Args:
        minutes: in all, from now.
        names: in order of importance.
        took: the seconds of an earlier measurement.
        clock: seconds.
    """
    end = clock() + 60 * minutes
    for name in names:
        if clock() + (took(name) or PLAN[name]) <= end:
            yield name
