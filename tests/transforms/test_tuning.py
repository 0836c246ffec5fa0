import ast
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hessfunc as hf
from hessfunc.trees import Matvec, Tree
from tests.cases import case

SOURCES = Path(hf.__file__).parent
# Modules that read a clock, and what for.
CLOCKS = {
    "app/launched.py": "a pause at the end of a process",
    "algorithms/checkpoint/run.py": "the wait for files of other ranks",
    "app/analysis.py": "the seconds of each part, for the report",
    "display/bars.py": "the time between two lines of progress",
    "display/progress.py": "the seconds of a run, for its progress",
    "training/cost.py": "the seconds of a training, for its table",
    "tracking/tracker.py": "the seconds of a measurement, for its record",
    "transforms/tuning.py": "times that the user asks for",
}


def test_no_clock_decides_anything() -> None:
    read = set()
    for path in SOURCES.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if {"time", "timeit"} & {name.partition(".")[0] for name in names}:
                read.add(str(path.relative_to(SOURCES)))
    assert read <= CLOCKS.keys()


def test_the_fastest_chunk_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = 0.0, set()
    price = {1: 16.0, 4: 9.0, 16: 12.0}

    def family(*, chunk_size: int) -> Any:
        def curvature(params: Tree, batch: Any) -> Matvec:
            def matvec(block: Tree) -> Tree:
                nonlocal now
                now += price[chunk_size]
                asked.add(chunk_size)
                return block

            return matvec

        return curvature

    clock = SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr("hessfunc.transforms.tuning.time", clock)
    assert hf.tune(family, torch.zeros(3), None, vectors=16) == 4
    assert asked == {1, 4, 16}


def test_a_real_family_gives_a_chunk_that_can_be_passed_on() -> None:
    found = case("mlp")
    family = partial(hf.hvp, found.loss)
    chunk_size = hf.tune(family, found.params, found.batch, vectors=8)
    assert chunk_size in (1, 4, 8)
    v = hf.random_like(found.params, 8, seed=0)
    tuned = family(chunk_size=chunk_size)(found.params, found.batch)(v)
    by_rule = hf.hvp(found.loss)(found.params, found.batch)(v)
    for name in v:
        torch.testing.assert_close(tuned[name], by_rule[name])


def test_a_chunk_that_vmap_cannot_do_is_left_out() -> None:
    def loss(params: torch.Tensor, batch: Any) -> torch.Tensor:
        return params.square().sum() * (1.0 if params.sum().item() >= 0 else 2.0)

    class NoVmap(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            (x,) = ctx.saved_tensors
            assert g.sum().item() is not None
            return 2 * x * g

    family = partial(hf.hvp, lambda params, batch: NoVmap.apply(params).sum() + loss(params, batch))
    assert hf.tune(family, torch.ones(3), None, vectors=4) in (1, 4)


def test_there_must_be_a_vector() -> None:
    with pytest.raises(ValueError, match="vectors=0: it must be at least 1"):
        hf.tune(partial(hf.hvp, lambda p, _: p.sum()), torch.ones(2), None, vectors=0)
