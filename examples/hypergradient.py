"""Hypergradients: a weight for each training example, learned from a validation set.

    python examples/hypergradient.py    # a table, and hypergradient.png

    minimise  V(w(h))  over h,     w(h) = argmin of  mean sigmoid(h_i) l_i(w) + penalty |w|^2 / 2

Here l_i is the loss of training example i. 30 % of these labels are wrong. V is the loss of other
examples, with right labels. `implicit_gradient` returns dV/dh at the minimum from one linear system
with the Hessian, without unrolling the training (Pedregosa 2016, arXiv 1602.02355). Descent on h
moves the weights of most mislabelled examples to zero. The model is a softmax regression.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.app.problems.data import digits

Batch = tuple[Tensor, Tensor]
PENALTY = 5e-4


@dataclass(frozen=True)
class Found:
    """Wrong labels, final weights, test accuracies at all steps, and of two other trainings."""

    wrong: Tensor
    weights: Tensor
    accuracies: list[float]
    others: dict[str, float]


def problem(count: int) -> tuple[Batch, Batch, Batch, Tensor]:
    """Return training, validation and test examples, and a mask of the wrong training labels."""
    images, generator = digits(), torch.Generator().manual_seed(0)
    images = images[torch.randperm(len(images), generator=generator)]
    inputs, labels = images.inputs.double().flatten(1), images.targets
    wrong = torch.rand(count, generator=generator) < 0.3
    shift = torch.randint(1, 10, (count,), generator=generator)
    seen = inputs[:count], torch.where(wrong, (labels[:count] + shift) % 10, labels[:count])
    return seen, (inputs[1000:1400], labels[1000:1400]), (inputs[1400:], labels[1400:]), wrong


def outer(w: Tensor, h: Tensor, batch: Batch) -> Tensor:
    return cross_entropy(batch[0] @ w, batch[1])


def inner(w: Tensor, h: Tensor, batch: Batch) -> Tensor:
    losses = cross_entropy(batch[0] @ w, batch[1], reduction="none")
    return (h.sigmoid() * losses).mean() + PENALTY / 2 * w.square().sum()


def trained(h: Tensor, batch: Batch, w: Tensor) -> Tensor:
    """Return the minimum of the inner loss, by Newton's method from w with halved steps."""
    loss = lambda w, batch: inner(w, h, batch)  # noqa: E731
    while (slope := torch.func.grad(loss)(w, batch)).norm() > 1e-8:
        step = hf.cg(hf.hvp(loss)(w, batch), slope, rtol=1e-2).x
        while loss(w - step, batch) > loss(w, batch):
            step = step / 2
        w = w - step
    return w


def main(*, small: bool = False, out: Path = Path("hypergradient.png")) -> Found:
    count, steps = (300, 15) if small else (1000, 30)
    seen, validation, test, wrong = problem(count)
    accuracy = lambda w: float(((test[0] @ w).argmax(1) == test[1]).double().mean())  # noqa: E731
    h, w = torch.zeros(count).double(), torch.zeros(64, 10).double()
    optimizer, adjoint, accuracies = torch.optim.Adam([h], lr=0.3), None, []
    batches = {"outer_batches": [validation], "inner_batches": [seen]}
    print("step   V(w(h))    test    mean weight: right   wrong    products")
    for step in range(steps + 1):
        w, weights = trained(h, seen, w), h.sigmoid()
        slope = hf.implicit_gradient(outer, inner, w, h, start=adjoint, **batches)
        accuracies.append(accuracy(w))
        if step % 5 == 0:
            row = f"{step:4}{slope.value:10.4f}{accuracies[-1]:8.1%}{weights[~wrong].mean():22.2f}"
            print(f"{row}{weights[wrong].mean():8.2f}{slope.matvecs:12}")
        h.grad, adjoint = slope.gradient, slope.adjoint
        optimizer.step()
    # The sigmoid of 50 is one, and that of -50 is zero.
    known, whole = torch.where(wrong, -50.0, 50.0), torch.tensor(50.0)
    others = {"right labels": (known, seen), "validation set": (whole, validation)}
    others = {name: accuracy(trained(*of, w)) for name, of in others.items()}
    for name, value in others.items():
        print(f"trained on the {name} alone: {value:.1%}")
    found = Found(wrong, weights, accuracies, others)
    draw(found, out)
    return found


def draw(found: Found, out: Path) -> None:
    from hessfunc.plot.style import DASHED, PALETTE, clean, grid, legend

    weights, tests = map(clean, grid(2, 1, (4.4, 5.4)))
    kinds = {"right label": found.weights[~found.wrong], "wrong label": found.weights[found.wrong]}
    weights.hist(kinds.values(), 20, color=PALETTE[:2], label=list(kinds), log=True)
    weights.set(xlabel="weight", ylabel="training examples")
    legend(weights, loc="upper center")
    tests.plot(found.accuracies, color=PALETTE[0], label="with learned weights")
    for (name, value), color in zip(found.others.items(), PALETTE[2:], strict=False):
        tests.axhline(value, color=color, linestyle=DASHED, label=f"trained on the {name}")
    tests.set(xlabel="step", ylabel="test accuracy")
    legend(tests, loc="lower right")
    tests.figure.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="Use a problem that takes seconds.")
    parser.add_argument("--out", type=Path, default=Path("hypergradient.png"), help="Figure file.")
    main(**vars(parser.parse_args()))
