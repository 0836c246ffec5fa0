"""Small dense problems are on the CPU, whatever device a user has made torch's default."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.optim import InfinityNorm, LargestNorm

SOURCES = Path(hf.__file__).parent


@pytest.fixture
def problem() -> Iterator[tuple[Any, Any, Any]]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    batch = (
        torch.randn(20, 5, dtype=torch.float64, generator=generator),
        torch.randint(3, (20,), generator=generator),
    )
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    # A tensor that is made without a device has no data, and what reads it fails.
    before = torch.get_default_device()
    torch.set_default_device("meta")
    yield loss, params, batch
    torch.set_default_device(before)


RUNS: dict[str, Callable[[Any, Any], object]] = {
    "lanczos": lambda matvec, like: hf.lanczos(matvec, like, k=3, seed=0),
    "lanczos of blocks": lambda matvec, like: hf.lanczos(
        matvec, like, k=3, block_size=2, basis_size=8, seed=0
    ),
    "power_iteration": lambda matvec, like: hf.power_iteration(matvec, like, seed=0),
    "hutchinson": lambda matvec, like: hf.hutchinson(matvec, like, max_matvecs=20, seed=0),
    "hutchpp": lambda matvec, like: hf.hutchpp(matvec, like, max_matvecs=40, seed=0),
    "xtrace": lambda matvec, like: hf.xtrace(matvec, like, max_matvecs=40, seed=0),
    "xnystrace": lambda matvec, like: hf.xnystrace(matvec, like, max_matvecs=20, seed=0),
    "hutchinson_diagonal": lambda matvec, like: hf.hutchinson_diagonal(
        matvec, like, max_matvecs=20, seed=0
    ),
    "xdiag": lambda matvec, like: hf.xdiag(matvec, like, max_matvecs=20, seed=0),
    "generalized_sharpness": lambda matvec, like: hf.generalized_sharpness(
        matvec, like, LargestNorm({name: InfinityNorm() for name in like}), seed=0
    ),
    "slq": lambda matvec, like: hf.slq(matvec, like, steps=10, probes=2, seed=0).count_above(0.1),
    "cg": lambda matvec, like: hf.cg(matvec, like, damping=1.0),
    "function": lambda matvec, like: hf.function(matvec, torch.exp, like),
    "minres": lambda matvec, like: hf.minres(matvec, like),
    "cg of a block": lambda matvec, like: hf.cg(
        matvec, hf.random_like(like, 3, seed=0), like=like, damping=1.0
    ),
    "matrix": lambda matvec, like: hf.matrix(matvec, like, rows=[0, 1], columns=range(3)),
}


@pytest.mark.parametrize("name", RUNS)
def test_algorithms_run(problem: tuple[Any, Any, Any], name: str) -> None:
    loss, params, batch = problem
    matvec = hf.over_batches(hf.ggnvp(loss))(params, [batch])
    RUNS[name](matvec, params)


def test_landscapes_are_taken(problem: tuple[Any, Any, Any]) -> None:
    loss, params, batch = problem
    found = hf.landscape(loss, params, [batch], hf.random_like(params, 2, seed=0), points=5)
    assert bool(found.values.isfinite().all())


# What keeps the type of its argument, and integers, have no type by default.
TYPED = re.compile("as_tensor|arange|randint|randperm|tril_indices|triu_indices")
FACTORIES = re.compile(
    f"empty|eye|full|linspace|logspace|normal|ones|rand|randn|tensor|zeros|{TYPED.pattern}"
)


def by_default(source: str) -> list[str]:
    """Return the calls of torch that make tensors of the default device or the default type."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
            continue
        name, options = call.func.attr, {option.arg for option in call.keywords}
        if ast.unparse(call.func.value) != "torch" or not FACTORIES.fullmatch(name):
            continue
        numbers = [given.value for given in call.args if isinstance(given, ast.Constant)]
        typed = TYPED.fullmatch(name) and not any(isinstance(x, float) for x in numbers)
        due = {"device"} if typed else {"device", "dtype"}
        if None not in options and not due <= options:
            found.append(ast.unparse(call))
    return found


def test_every_new_tensor_has_a_device_and_a_type() -> None:
    complete = (
        "torch.eye(3, dtype=t, device=d), torch.zeros(2, **options), torch.arange(3, device=d)"
    )
    assert not by_default(complete)
    assert by_default("torch.ones(1, dtype=t), torch.ones(1, device=d), torch.arange(3)") == [
        "torch.ones(1, dtype=t)", "torch.ones(1, device=d)", "torch.arange(3)"
    ]  # fmt: skip
    assert by_default("torch.arange(1.0, 3, device=d)")
    found = {
        str(path.relative_to(SOURCES)): calls
        for path in SOURCES.rglob("*.py")
        if (calls := by_default(path.read_text()))
    }
    assert not found
