"""Spectra of eight nets at once by `torch.func.vmap`: one net for each learning rate.

    python examples/ensemble.py         # a table, and ensemble.png

Copies of a net are trained by gradient descent at eight learning rates. One call of `vmap` gives
the gradients of all, and another one their Hessian products. The Lanczos recurrence is written here
for a batch of matrices. The copies that reach 2 / lr, where descent turns unstable, stay there: the
edge of stability (Cohen et al. 2021, arXiv 2103.00065). A large learning rate ends at flat points.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.functional import one_hot

import hessfunc as hf
from hessfunc.app.problems.data import digits
from hessfunc.app.problems.nets import mlp

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class Found:
    """Learning rates ``[8]``, final nets ``[8, n]``, and their largest eigenvalues at each step."""

    rates: Tensor
    nets: Tensor
    eigenvalues: dict[int, Tensor]
    losses: Tensor


def problem(count: int) -> tuple[Loss, Tensor, Batch]:
    """Return a loss of the flat vector of parameters, its start, and the batch."""
    images = digits()[:count]
    inputs = (images.inputs - images.inputs.mean()) / images.inputs.std()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_fn, params = hf.functional(mlp([64, 32, 32, 10], nn.Tanh).double())

    def loss(w: Tensor, batch: Batch) -> Tensor:
        errors = model_fn(hf.unravel(w, params), batch[0]) - batch[1]
        return errors.square().sum(1).mean() / 2

    batch = inputs.double(), one_hot(images.targets, 10).double()
    # Small weights give a flat start, which is stable at all learning rates.
    return loss, hf.ravel(params) / 2, batch


def ritz_values(matvec: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """Return the eigenvalues of T in A Q = Q T + r e', for each matrix A: ``[matrices, steps]``."""
    basis = (start / start.norm(dim=1, keepdim=True))[:, None]
    T = start.new_zeros(len(start), steps, steps)
    for j in range(steps):
        r = matvec(basis[:, j])
        for _ in range(2):  # Gram-Schmidt is orthogonal to rounding after a second pass.
            inner = (basis @ r[..., None])[..., 0]
            T[:, j, : j + 1] += inner
            r = r - (inner[:, None] @ basis)[:, 0]
        basis = torch.cat([basis, (r / r.norm(dim=1, keepdim=True))[:, None]], 1)
    return torch.linalg.eigvalsh(T)  # It reads the lower triangle.


def main(*, small: bool = False, out: Path = Path("ensemble.png")) -> Found:
    steps, every = (400, 200) if small else (2000, 50)
    loss, start, batch = problem(200 if small else 500)
    rates = torch.logspace(-1.3, -0.5, 8, dtype=torch.float64)
    nets, eigenvalues = start.expand(len(rates), -1), {}
    slopes = vmap(grad(loss), in_dims=(0, None))
    products = vmap(lambda w, v: hf.apply(hf.hvp(loss)(w, batch), v))
    probes = hf.random_like(start, len(rates), seed=0)
    for step in range(steps + 1):
        if step % every == 0:
            of_nets = lambda v: products(nets, v)  # noqa: B023, E731
            eigenvalues[step] = ritz_values(of_nets, probes, 40)[:, -10:]
        if step < steps:
            nets = nets - rates[:, None] * slopes(nets, batch)
    found = Found(rates, nets, eigenvalues, vmap(loss, in_dims=(0, None))(nets, batch))
    print(f"{'lr':>6}{'2 / lr':>9}{'loss':>9}   largest eigenvalues")
    for rate, value, row in zip(rates, found.losses, eigenvalues[steps], strict=True):
        tops = "".join(f"{x:7.2f}" for x in row.flip(0)[:5])
        print(f"{rate:6.3f}{2 / rate:9.2f}{value:9.4f} {tops}")
    draw(found, out)
    return found


def draw(found: Found, out: Path) -> None:
    from hessfunc.plot.style import DASHED, FIRST, SECOND, clean, grid, legend, shades

    ratios, spectra = map(clean, grid(2, 1, (4.4, 5.8)))
    tops = torch.stack([values[:, -1] for values in found.eigenvalues.values()], 1)
    for i, (rate, values) in enumerate(zip(found.rates, tops, strict=True)):
        color = shades()(0.75 * i / (len(tops) - 1))
        ratios.plot(list(found.eigenvalues), values * rate / 2, color=color, label=f"{rate:.2f}")
    ratios.axhline(1, color=SECOND, linestyle=DASHED, linewidth=1.2)
    ratios.set(xlabel="step", ylabel="largest eigenvalue / (2 / lr)", ylim=(0, 2))
    legend(ratios, title="learning rate", ncols=4, loc="upper right")
    final = list(found.eigenvalues.values())[-1]
    spectra.plot(found.rates, final, "o", color=FIRST, markersize=3)
    spectra.plot(found.rates, 2 / found.rates, color=SECOND, linestyle=DASHED, label="2 / lr")
    spectra.set(xlabel="learning rate", ylabel="largest eigenvalues", ylim=(0, None))
    legend(spectra)
    ratios.figure.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="Use a problem that takes seconds.")
    parser.add_argument("--out", type=Path, default=Path("ensemble.png"), help="Figure file.")
    main(**vars(parser.parse_args()))
