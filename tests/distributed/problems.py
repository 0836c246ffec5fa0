"""A small net with uneven batches, and matrices of known spectra, on every rank the same."""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import hessfunc as hf
from hessfunc.algorithms.results import Result
from hessfunc.trees import leaves, tree_map
from tests.reference import spectra

SIZES = (5, 3, 4, 1, 6, 2, 5)
CURVATURES = ["hvp", "hvp forward", "ggnvp", "fvp", "sampled fvp", "efvp", "pchvp", "functional"]
CURVATURES += ["kflr", "ekfac"]


@cache
def mesh(*shape: int, names: tuple[str, ...] = ("data", "probe")) -> DeviceMesh:
    """Of the first so many ranks on each axis, made once: groups poll in threads of their own."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names[: len(shape)])


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Of uneven sizes, more of them than ranks and not divisible by their number."""
    generator = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(size, 4, dtype=torch.float64, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for size in SIZES
    ]


def model_and_loss() -> tuple[hf.Loss, dict[str, Tensor]]:
    model_fn, params = hf.functional(net())
    return hf.supervised(model_fn, F.cross_entropy), params


def curvature(name: str) -> Any:
    model = net()
    loss = hf.supervised(hf.functional(model)[0], F.cross_entropy)
    made = {
        "hvp": lambda: hf.hvp(loss),
        "hvp forward": lambda: hf.hvp(loss, mode="forward"),
        "ggnvp": lambda: hf.ggnvp(loss),
        "fvp": lambda: hf.fvp(loss),
        "sampled fvp": lambda: hf.fvp(loss, samples=2, seed=3),
        "efvp": lambda: hf.efvp(loss),
        "pchvp": lambda: hf.pchvp(loss),
        "functional": lambda: hf.functional_hvp(loss),
        "kflr": lambda: hf.kronecker.kflr(loss, model),
        "ekfac": lambda: hf.kronecker.ekfac(loss, model),
    }
    return made[name]()


def symmetric(n: int = 37, *, positive: bool = False) -> Tensor:
    """With eigenvalues that decay from 10 on, of both signs unless positive."""
    values = 10 * 0.8 ** torch.arange(n, dtype=torch.float64)
    if not positive:
        values[1::3] *= -1
    return spectra.symmetric(values, seed=4)


def like(n: int = 37) -> dict[str, Tensor]:
    """A tree of n entries, in leaves that no cut into equal parts respects."""
    sizes = {"a": (2, 3), "b": (1,), "c": (n - 17, 1), "d": (2, 5)}
    return {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}


def vector(n: int = 37) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return hf.unravel(torch.randn(n, dtype=torch.float64, generator=generator), like(n))


def as_matvec(matrix: Tensor) -> Any:
    """The matrix as a product with blocks of trees."""

    def matvec(block: Any) -> Any:
        rows = torch.cat([leaf.flatten(1) for leaf in block.values()], dim=1)
        return hf.unravel(rows @ matrix, like(len(matrix)))

    return matvec


def pairs() -> hf.results.Eigenpairs:
    matrix = symmetric()
    return hf.lanczos(as_matvec(matrix), like(), k=3, rtol=1e-10, seed=1)


def deflated_slq(matvec: Any, like: Any, **run: Any) -> hf.results.Density:
    """A density of the complement of three eigenpairs."""
    first = hf.lanczos(matvec, like, k=3, rtol=1e-11, seed=1, space=run.get("space"))
    return hf.slq(matvec, like, deflate=first, probes=2, steps=12, **run)


def trace_of_density(matvec: Any, like: Any, **run: Any) -> hf.results.Estimate:
    """A trace that begins with the Krylov space of a density."""
    first = hf.slq(matvec, like, steps=10, keep_basis=True, seed=1, space=run.get("space"))
    return hf.trace(matvec, like, start=first, **({"max_matvecs": 14} | run))


def function_of_ones(matvec: Any, like: Any, **run: Any) -> hf.results.MatrixFunction:
    """The hyperbolic tangent of the matrix, times a vector of ones."""
    return hf.function(matvec, torch.tanh, tree_map(torch.ones_like, like), rtol=1e-9, **run)


ALGORITHMS = {
    "power_iteration": partial(hf.power_iteration, k=2, rtol=0.03, max_matvecs=80),
    "lanczos": partial(hf.lanczos, k=4, rtol=1e-9),
    "lanczos, restarted": partial(hf.lanczos, k=3, basis_size=9, rtol=1e-9),
    "lanczos, blocks": partial(hf.lanczos, k=4, block_size=3, which="BE", rtol=1e-9),
    "lanczos, to its end": partial(hf.lanczos, k=37, rtol=1e-9),
    "hutchinson": partial(hf.hutchinson, max_matvecs=24),
    "hutchinson, sphere": partial(hf.hutchinson, kind="sphere", max_matvecs=24),
    "hutchpp": partial(hf.hutchpp, max_matvecs=30),
    "xtrace": partial(hf.xtrace, max_matvecs=30),
    "xtrace, all": partial(hf.xtrace, max_matvecs=100),
    "xnystrace": partial(hf.xnystrace, max_matvecs=24),
    "hutchinson_diagonal": partial(hf.hutchinson_diagonal, max_matvecs=24),
    "xdiag": partial(hf.xdiag, max_matvecs=30),
    "trace": partial(hf.trace, max_matvecs=24),
    "trace, from a density": trace_of_density,
    "diagonal": partial(hf.diagonal, max_matvecs=24),
    "slq": partial(hf.slq, probes=3, steps=12),
    "slq, deflated": deflated_slq,
    "logdet": partial(hf.logdet, damping=20.0, max_matvecs=24),
    "trace_of_function": lambda matvec, like, **run: hf.trace_of_function(
        matvec, torch.tanh, like, **({"max_matvecs": 24} | run)
    ),
    "function": function_of_ones,
}


def of_block(solve: Any, matvec: Any, b: Any, **options: Any) -> Any:
    """Solve with two right-hand sides, which stop after different numbers of steps."""
    block = tree_map(lambda leaf: torch.stack([leaf, leaf.sin()]), b)
    return solve(matvec, block, like=b, **options)


SOLVERS = {
    "cg of a block": partial(of_block, hf.cg, damping=1.0, rtol=1e-12),
    "minres of a block": partial(of_block, hf.minres, damping=1.0, rtol=1e-12),
    "cg": partial(hf.cg, damping=1.0, rtol=1e-12),
    "minres": partial(hf.minres, damping=1.0, rtol=1e-12),
}


def difference(found: Any, wanted: Any) -> float:
    """The largest relative difference of two results, over all that they hold."""
    if isinstance(wanted, Result):
        return max(
            difference(getattr(found, item.name), getattr(wanted, item.name))
            for item in dataclasses.fields(wanted)
        )
    if isinstance(wanted, (str, type(None))):
        return 0.0 if found == wanted else float("inf")
    if not leaves(wanted):
        return 0.0 if found == wanted else float("inf")
    errors = [0.0]
    for mine, his in zip(leaves(found), leaves(wanted), strict=True):
        if isinstance(his, str):
            errors.append(0.0 if mine == his else float("inf"))
            continue
        a, b = torch.as_tensor(mine).double(), torch.as_tensor(his).double()
        size = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        same = (a == b) | (a.isnan() & b.isnan())
        errors.append(float(torch.where(same, 0.0, (a - b).abs() / size).max()) if size else 0.0)
    return max(errors)


def error(found: Any, wanted: Any) -> float:
    pairs = zip(leaves(found), leaves(wanted), strict=True)
    sizes = [(a - b, b) for a, b in pairs if b.numel()]
    return max((float(d.abs().max() / (b.abs().max() + 1e-300)) for d, b in sizes), default=0.0)


def data(count: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, dtype=torch.float64, generator=generator)
    return TensorDataset(x, torch.randint(3, (count,), generator=generator))
