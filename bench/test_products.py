"""What a Hessian product costs: each mode and block size of `hvp` against plain double backward.

    pytest bench                        # twelve minutes on two busy cores
    pytest bench -k mlp                 # the perceptrons: one minute
    pytest bench -k gpt-16              # one net and block size
    pytest bench --benchmark-disable    # only that the products are right

All alternatives of one net and block size take turns (`bench.interleaved`). pytest-benchmark's own
table shows the seconds of ``hvp``'s default; the ratios are in its ``extra_info`` and in the
tables at the end, which are also written to bench/results/.

Threads are torch's default, and the table says how many there are. On a busy machine set
OMP_WAIT_POLICY=PASSIVE (or OMP_NUM_THREADS=1): by default a thread spins until the others are done,
and where one of them has lost its core to another process, a gradient of 0.1 ms takes 100 ms.
Which alternative is hit is chance. Python's garbage collector runs as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import pytest
import torch

import hessfunc as hf
from bench import baselines
from bench.baselines import Vector
from bench.cases import CASES
from bench.interleaved import Turns
from bench.report import DEFAULT, DIFFERENCE, GRADIENT, KEPT, REBUILT, Measured, measured
from hessfunc.losses import Loss
from hessfunc.transforms.chunks import ChunkSize
from hessfunc.trees import Matvec, Tree

# Each net and block size, with its number of rounds.
ROUNDS = {
    "mlp-small": {1: 300, 4: 300, 16: 100},
    "mlp-wide": {1: 100, 4: 40, 16: 15},
    "gpt": {1: 25, 4: 8, 16: 6},
    "resnet20": {1: 10, 4: 6, 8: 5},
}

MODES: tuple[Literal["reverse", "forward"], ...] = ("reverse", "forward")

TOLERANCE = 1e-4
# The gradients' rounding errors, divided by the step.
DIFFERENCE_TOLERANCE = 1e-2


@pytest.mark.timeout(1200)
# torch warns about itself when it loads its forward-mode rules.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "k"), [pytest.param(m, k, id=f"{m}-{k}") for m, ks in ROUNDS.items() for k in ks]
)
def test_products(name: str, k: int, benchmark: Any, record: Callable[[Measured], None]) -> None:
    case = CASES[name]()
    model_fn, params = hf.functional(case.model)
    loss, batch = hf.supervised(model_fn, case.criterion), (case.inputs, case.targets)
    block = hf.random_like(params, k, kind="normal", seed=0)
    vectors = _vectors(block)
    plain, plain_rebuilt = baselines.kept(case), baselines.rebuilt(case)
    ours = _matvecs(loss, params, batch, k)

    expected = [plain(vector) for vector in vectors]
    found = {which: _vectors(matvec(block)) for which, matvec in ours.items()}
    errors = {which: _error(products, expected) for which, products in found.items()}
    errors[REBUILT] = _error([plain_rebuilt(vectors[0])], expected[:1])
    for which, error in errors.items():
        assert which == DIFFERENCE or error < TOLERANCE, (which, error)
    # Where a finite step crosses kinks, a difference is far from the Hessian (the table shows how
    # far), and has to agree with the plain difference over the same step.
    same = expected if case.smooth else [baselines.difference(case)(v) for v in vectors]
    assert _error(found[DIFFERENCE], same) < DIFFERENCE_TOLERANCE

    turns = Turns(
        {
            GRADIENT: partial(baselines.gradient, case),
            KEPT: lambda: [plain(vector) for vector in vectors],
            # Of several products each costs the same, so one is enough.
            REBUILT: partial(plain_rebuilt, vectors[0]),
            **{which: partial(matvec, block) for which, matvec in ours.items() if which != DEFAULT},
        }
    )
    benchmark.pedantic(partial(ours[DEFAULT], block), setup=turns.take, rounds=ROUNDS[name][k])
    if benchmark.disabled:
        return
    seconds = {**turns.seconds, DEFAULT: benchmark.stats.stats.data}
    result = measured(case.title, sum(p.numel() for p in case.parameters), k, seconds, errors)
    benchmark.extra_info.update(asdict(result))
    record(result)


def _matvecs(loss: Loss, params: Tree, batch: Any, k: int) -> dict[str, Matvec]:
    chunks: dict[str, ChunkSize] = {"auto": "auto"}
    if k > 1:
        chunks |= {"loop": 1, "vmap": k}
    found = {
        f"{mode}, {how}": hf.hvp(loss, mode=mode, chunk_size=size)(params, batch)
        for mode in MODES
        for how, size in chunks.items()
    }
    curvature = hf.hvp(loss)
    return {
        **found,
        DIFFERENCE: hf.hvp(loss, mode="difference")(params, batch),
        "reverse, made anew": lambda block: curvature(params, batch)(block),
    }


def _vectors(block: Tree) -> list[Vector]:
    return list(zip(*block.values(), strict=True))


def _error(found: Sequence[Vector], expected: Sequence[Vector]) -> float:
    """The largest relative error of a product."""
    errors = []
    for products in zip(found, expected, strict=True):
        ours, theirs = (torch.cat([leaf.flatten() for leaf in leaves]) for leaves in products)
        errors.append((ours - theirs).norm() / theirs.norm())
    # Of torch, because Python's own max would lose a NaN.
    return float(torch.stack(errors).max())
