"""Influence functions: harmful and mislabelled training examples.

    python examples/influence.py        # two tables, and influence.png

If one of n training examples, z, is left out, the validation loss L changes by about

    S(z) / n,    S(z) = grad L' (H + damping I)^-1 grad l(z),

where H is the Hessian of the training loss, and the damping is its L2 penalty (Koh and Liang 2017,
arXiv 1703.04730). `influence` solves one system, and its solution gives the scores of all examples.
Here the model is a logistic regression on digits, some of which have a wrong label. To test the
predictions, the model is trained again without an example, starting from the old optimum.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessfunc as hf
from hessfunc.app.problems.data import digits
from hessfunc.training.examples import Examples

Params = dict[str, Tensor]

PENALTY = 1e-2
MISLABELLED = 0.1


@dataclass(frozen=True)
class Found:
    """Predicted and real changes of the validation loss, and the detection of wrong labels.

    Attributes:
        predicted: Predicted change for each example that was left out, shape ``[m]``.
        real: Change after training without the example, shape ``[m]``.
        detected: Share of the mislabelled digits that are among the most harmful tenth of all.
    """

    predicted: Tensor
    real: Tensor
    detected: float


def mislabelled(examples: Examples) -> tuple[Examples, Tensor]:
    """Move a tenth of the labels to another class; return the examples and a mask of the moved."""
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(examples), generator=generator) < MISLABELLED
    shift = torch.randint(1, 10, (len(examples),), generator=generator)
    targets = torch.where(wrong, (examples.targets + shift) % 10, examples.targets)
    return Examples(examples.inputs.double().flatten(1), targets), wrong


def fitted(loss: hf.Loss, params: Params, batch: tuple[Tensor, Tensor], *, of: int) -> Params:
    """Return the minimum of the penalised loss, in which each example has the weight 1 / ``of``."""
    params = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.LBFGS(
        params.values(), max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        squares = torch.stack([p.square().sum() for p in params.values()])
        value = len(batch[1]) / of * loss(params, batch) + PENALTY / 2 * squares.sum()
        value.backward()
        return value

    optimizer.step(closure)
    return {name: p.detach() for name, p in params.items()}


def influences(loss: hf.Loss, params: Params, seen: Examples, validation: Examples) -> Tensor:
    """Return the predicted change of the validation loss without each example, shape ``[n]``."""
    found = hf.influence(
        loss,
        params,
        [(seen.inputs, seen.targets)],
        [(validation.inputs, validation.targets)],
        curvature=hf.hvp(loss),
        damping=PENALTY,
        aggregate=True,
        rtol=1e-8,
    )
    print(f"{found.reason}, {found.matvecs} products\n")
    return found.scores[0] / len(seen)


def main(*, small: bool = False, out: Path = Path("influence.png")) -> Found:
    images = digits()
    seen, wrong = mislabelled(images[: 500 if small else 1400])
    validation = Examples(images.inputs[1400:].double().flatten(1), images.targets[1400:])
    held_out = validation.inputs, validation.targets
    model_fn, start = hf.functional(nn.Linear(64, 10).double())
    loss = hf.supervised(model_fn, cross_entropy)
    zero = {name: torch.zeros_like(p) for name, p in start.items()}
    params = fitted(loss, zero, (seen.inputs, seen.targets), of=len(seen))
    changes = influences(loss, params, seen, validation)

    order = changes.argsort()
    print("share of the mislabelled digits among the most harmful examples")
    for share in (0.05, 0.1, 0.2, 0.3):
        caught = float(wrong[order[: round(share * len(seen))]].sum() / wrong.sum())
        print(f"{share:6.0%}{caught:8.0%}")
    detected = float(wrong[order[: round(0.1 * len(seen))]].sum() / wrong.sum())

    few = 3 if small else 10
    chosen = torch.cat([order[:few], order[len(order) // 2 :][:few], order[-few:]])
    before, real = float(loss(params, held_out)), []
    print(f"\nvalidation loss {before:.4f}; changes without one example")
    print(f"{'predicted':>12}{'real':>12}")
    for i in chosen:
        rest = torch.arange(len(seen)) != i
        moved = fitted(loss, params, (seen.inputs[rest], seen.targets[rest]), of=len(seen))
        real.append(float(loss(moved, held_out)) - before)
        print(f"{changes[i]:12.3e}{real[-1]:12.3e}")
    result = Found(changes[chosen], torch.tensor(real).double(), detected)
    correlation = torch.corrcoef(torch.stack([result.predicted, result.real]))[0, 1]
    print(f"correlation {correlation:.4f}")
    draw(result, out)
    return result


def draw(found: Found, out: Path) -> None:
    from hessfunc.plot.style import FIRST, QUIET, clean, new_axes

    ax = clean(new_axes((4.6, 4.2)))
    ends = [float(found.real.min()), float(found.real.max())]
    ax.plot(ends, ends, color=QUIET, linewidth=0.8)
    ax.plot(found.predicted, found.real, "o", color=FIRST)
    ax.set(xlabel="predicted change of the validation loss", ylabel="change after training again")
    ax.figure.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--small", action="store_true", help="Use a small problem that takes a few seconds."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("influence.png"), help="File of the figure."
    )
    main(**vars(parser.parse_args()))
