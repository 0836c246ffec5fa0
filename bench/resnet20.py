"""Ten eigenpairs and the trace of a ResNet-20 on 500 images, beside other libraries' methods.

    python -m bench.resnet20 [--images 500] [--only eigsh]

All methods multiply by one matvec, the Hessian of the trained ResNet-20 on the first CIFAR-10 test
images in batches of 50 with kept graphs, and their products are counted. A product costs as many
gradients as its processor time says, measured in turn with gradients; so does a product whose graph
is made anew, as in libraries that keep none. curvlinops leaves eigenpairs to SciPy's `eigsh`, and
its `xtrace` is measured as `hessfunc.xtrace`, which also stops by itself.

Needs CIFAR-10 and the weights under HESSFUNC_DATA. Results go to bench/results/resnet20.md after
each method.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hessfunc as hf
from bench.environment import environment
from bench.markdown import table
from bench.speed.counted import Counted
from hessfunc.app.problems import targets
from hessfunc.spaces.of import space_of
from hessfunc.trees import Matvec
from tests.datapath import DATA

RESULTS = Path(__file__).parent / "results" / "resnet20.md"
WEIGHTS = "resnet20_cifar10/resnet20-12fca82f.th"
TOP, RESIDUAL, RTOL = 10, 1e-3, 0.02
MICROBATCH = 50
ROUNDS = 3


@dataclass(frozen=True)
class Problem:
    """A matrix on flat rows, counted product by product.

    Attributes:
        matvec: of the Hessian with kept graphs.
        params: at which it is taken.
        kept: gradients that a product with kept graphs costs.
        anew: gradients that a product costs whose graphs are made for it.
    """

    matvec: Matvec
    params: Any
    kept: float
    anew: float

    def rows(self, rows: Tensor) -> Tensor:
        """Return the products with rows, one by one, which bounds their memory."""
        space = space_of(self.params)
        parts = [self.matvec(space.unravel(row)) for row in rows.split(1)]
        return torch.cat([space.ravel(part) for part in parts])


@dataclass(frozen=True)
class Pairs:
    """Eigenvalues and their vectors as rows, with the number of products."""

    values: Tensor
    rows: Tensor
    products: int


def problem(images: int) -> Problem:
    """Return the Hessian of the trained net, with the costs of its products."""
    model, criterion, batches = targets.cifar10(DATA, DATA / WEIGHTS)
    inputs = torch.cat([x for x, _ in batches])[:images]
    labels = torch.cat([y for _, y in batches])[:images]
    batches = list(zip(inputs.split(MICROBATCH), labels.split(MICROBATCH), strict=True))
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, criterion)
    curvature = hf.hvp(loss, chunk_size=1)
    kept = hf.over_batches(curvature, keep=True)(params, batches)
    anew = hf.over_batches(curvature, keep=False)(params, batches)
    vector = {name: torch.randn_like(leaf)[None] for name, leaf in params.items()}
    leaves = [leaf.clone().requires_grad_() for leaf in params.values()]

    def gradient() -> None:
        for batch in batches:
            torch.autograd.grad(loss(dict(zip(params, leaves, strict=True)), batch), leaves)

    seconds = [
        [_seconds(act) for act in (gradient, lambda: kept(vector), lambda: anew(vector))]
        for _ in range(ROUNDS)
    ]
    ratios = [(one / unit, other / unit) for unit, one, other in seconds]
    return Problem(kept, params, *(median(column) for column in zip(*ratios, strict=True)))


def _seconds(act: Callable[[], object]) -> float:
    start = time.process_time()
    act()
    return time.process_time() - start


def lanczos(of: Problem) -> Pairs:
    found = hf.lanczos(of.matvec, of.params, k=TOP, rtol=RESIDUAL, seed=0)
    return Pairs(found.values, space_of(of.params).ravel(found.vectors), found.matvecs)


def eigsh(of: Problem) -> Pairs:
    """ARPACK with the same tolerance, relative to each value."""
    from scipy.sparse.linalg import LinearOperator
    from scipy.sparse.linalg import eigsh as arpack

    def product(vector: np.ndarray) -> np.ndarray:
        return of.rows(torch.from_numpy(vector).float().reshape(1, -1))[0].numpy()

    counted, n = Counted(product), space_of(of.params).n
    operator = LinearOperator((n, n), matvec=counted, dtype=np.float32)
    start = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    values, vectors = arpack(operator, k=TOP, which="LM", tol=RESIDUAL, v0=start)
    return Pairs(torch.from_numpy(values.copy()), torch.from_numpy(vectors.T.copy()), counted.count)


def eigenthings(of: Problem, name: str, **options: Any) -> Pairs:
    import hessian_eigenthings.algorithms as algorithms

    counted = Counted(lambda vector: of.rows(vector[None])[0])
    found = getattr(algorithms, name)(_operator(of, counted), k=TOP, seed=0, **options)
    return Pairs(found.eigenvalues, found.eigenvectors, counted.count)


def _operator(of: Problem, product: Counted) -> Any:
    from hessian_eigenthings.operators.base import LambdaOperator

    return LambdaOperator(product, space_of(of.params).n, dtype=torch.float32)


PAIRS: dict[str, Callable[[Problem], Pairs]] = {
    "hessfunc: lanczos": lanczos,
    "SciPy: eigsh (curvlinops)": eigsh,
    "hessian-eigenthings: lanczos, told max_iter=30": lambda of: eigenthings(
        of, "lanczos", max_iter=30, reorthogonalize=True
    ),
    "hessian-eigenthings: lanczos, as shipped": lambda of: eigenthings(of, "lanczos"),
}


def _traced(estimator: Callable[..., hf.results.Estimate], of: Problem) -> tuple[float, float, int]:
    found = estimator(of.matvec, of.params, rtol=RTOL, max_matvecs=200, seed=0)
    low, high = found.interval()
    return found.value, (high - low) / 2, found.matvecs


def hutchpp_of_eigenthings(of: Problem) -> tuple[float, float, int]:
    from hessian_eigenthings.algorithms import trace

    counted = Counted(lambda vector: of.rows(vector[None])[0])
    found = trace(_operator(of, counted), method="hutch++", num_matvecs=60, seed=0)
    return float(found.estimate), 1.96 * float(found.stderr), counted.count


TRACES: dict[str, Callable[[Problem], tuple[float, float, int]]] = {
    "hessfunc: trace": lambda of: _traced(hf.trace, of),
    "hessfunc: xtrace (curvlinops)": lambda of: _traced(hf.xtrace, of),
    "hessian-eigenthings: hutch++, told num_matvecs=60": hutchpp_of_eigenthings,
}


def residual(of: Problem, pairs: Pairs) -> float:
    """Return the largest residual, relative to the pair's own value."""
    rows = pairs.rows / pairs.rows.norm(dim=1, keepdim=True)
    values = pairs.values.to(rows)
    return float(((of.rows(rows) - values[:, None] * rows).norm(dim=1) / values.abs()).max())


def costs(of: Problem, products: int) -> list[str]:
    return [str(products), f"{products * of.kept:.0f}", f"{products * of.anew:.0f}"]


def page(of: Problem, images: int, pairs: list[list[str]], traces: list[list[str]]) -> str:
    about = ", ".join(f"{key}: {value}" for key, value in environment().items())
    heads = ["products", "gradients, kept graphs", "gradients, graphs made anew"]
    return "\n\n".join(
        [
            f"# Trained ResNet-20, {images} CIFAR-10 images",
            f"`python -m bench.resnet20 --images {images}`; {about}.",
            f"A product costs {of.kept:.2f} gradients with kept graphs, and {of.anew:.2f} with "
            "graphs made anew, by processor time. Every method is run once, from seed 0.",
            f"## {TOP} dominant eigenpairs, to residuals of {RESIDUAL:g} of each value",
            table([["method", *heads, "largest residual"], *pairs]),
            f"## The trace, to {RTOL:.0%}",
            table([["method", *heads, "trace", "half-width at 95 %"], *traces]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500, help="Number of images.")
    parser.add_argument("--only", default="", help="Run methods whose name contains this.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    of = problem(arguments.images)
    pairs, traces = list[list[str]](), list[list[str]]()

    def publish(rows: list[list[str]], row: list[str]) -> None:
        rows.append(row)
        print(*row, sep="  ", flush=True)
        RESULTS.write_text(page(of, arguments.images, pairs, traces) + "\n")

    for name, solve in PAIRS.items():
        if arguments.only in name:
            found = solve(of)
            publish(pairs, [name, *costs(of, found.products), f"{residual(of, found):.1e}"])
    for name, estimate in TRACES.items():
        if arguments.only in name:
            value, half, products = estimate(of)
            publish(traces, [name, *costs(of, products), f"{value:.4g}", f"{half / value:.1%}"])


if __name__ == "__main__":
    main()
