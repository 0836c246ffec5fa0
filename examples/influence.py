"""Influence functions: which training examples raise the loss on others, and which are mislabelled.

Without one of n training examples, z, the validation loss L moves by about

    grad l(z)' s / n,    (H + damping I) s = grad L,

with H of the training loss, and the damping its L2 penalty (Koh and Liang 2017, arXiv 1703.04730).
One system, solved by `cg`, tells the influence of all examples. Here the model is a logistic
regression on digits, some of which have a wrong label. Training again without an example, from the
old optimum to the new one, shows how good the prediction is.

    python examples/influence.py        # two tables, and influence.png
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
    """What leaving an example out does to the validation loss, predicted and real; and detection.

    Attributes:
        predicted: for each example that was left out,
        real: the same after training without it.
        detected: share of the mislabelled digits among the most harmful tenth of all.
    """

    predicted: Tensor
    real: Tensor
    detected: float


def mislabelled(examples: Examples) -> tuple[Examples, Tensor]:
    """A tenth of the labels moved to another class, and a mask that says which."""
    generator = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(examples), generator=generator) < MISLABELLED
    shift = torch.randint(1, 10, (len(examples),), generator=generator)
    targets = torch.where(wrong, (examples.targets + shift) % 10, examples.targets)
    return Examples(examples.inputs.double().flatten(1), targets), wrong


def fitted(loss: hf.Loss, params: Params, batch: tuple[Tensor, Tensor], *, of: int) -> Params:
    """The minimum of the penalised loss, where each example has the weight 1 / ``of``."""
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
    """The predicted change of the validation loss without each training example: ``[n]``."""
    batch = seen.inputs, seen.targets
    gradient = torch.func.grad(loss)(params, (validation.inputs, validation.targets))
    solved = hf.cg(hf.hvp(loss)(params, batch), gradient, damping=PENALTY, rtol=1e-8)
    print(f"{solved.reason}, {solved.matvecs} products\n")

    def along(x: Tensor, y: Tensor) -> Tensor:
        """grad l(z)' s, the derivative of one example's loss in the direction of s."""
        of_one = lambda p: loss(p, (x[None], y[None]))  # noqa: E731
        return torch.func.jvp(of_one, (params,), (solved.x,))[1]

    return torch.func.vmap(along)(*batch) / len(seen)


def main(*, small: bool = False, out: Path = Path("influence.png")) -> Found:
    images = digits()
    seen, wrong = mislabelled(images[: 500 if small else 1400])
    validation = Examples(images.inputs[1400:].double().flatten(1), images.targets[1400:])
    held_out = validation.inputs, validation.targets
    model_fn, start = hf.functional(nn.Linear(64, 10).double())
    loss = hf.supervised(model_fn, cross_entropy)
    zero = {name: torch.zeros_like(p) for name, p in start.items()}
    params = fitted(loss, zero, (seen.inputs, seen.targets), of=len(seen))
    found = influences(loss, params, seen, validation)

    order = found.argsort()
    print("the most harmful examples: share of the mislabelled digits that are among them")
    for share in (0.05, 0.1, 0.2, 0.3):
        caught = float(wrong[order[: round(share * len(seen))]].sum() / wrong.sum())
        print(f"{share:6.0%}{caught:8.0%}")
    detected = float(wrong[order[: round(0.1 * len(seen))]].sum() / wrong.sum())

    few = 3 if small else 10
    chosen = torch.cat([order[:few], order[len(order) // 2 :][:few], order[-few:]])
    before, real = float(loss(params, held_out)), []
    print(f"\nvalidation loss {before:.4f}; without one example\n{'predicted':>12}{'real':>12}")
    for i in chosen:
        rest = torch.arange(len(seen)) != i
        moved = fitted(loss, params, (seen.inputs[rest], seen.targets[rest]), of=len(seen))
        real.append(float(loss(moved, held_out)) - before)
        print(f"{found[i]:12.3e}{real[-1]:12.3e}")
    result = Found(found[chosen], torch.tensor(real).double(), detected)
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
    ax.set(xlabel="predicted change of the validation loss", ylabel="after training again")
    ax.figure.savefig(out, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a few seconds")
    parser.add_argument("--out", type=Path, default=Path("influence.png"))
    main(**vars(parser.parse_args()))
