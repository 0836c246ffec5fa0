"""Data noise against probe noise: what random batches save over full passes; the top eigenpair.

``python -m bench.draws`` takes some ten minutes on one thread, and writes
``bench/results/draws.md`` after each case. The first cases need CIFAR-10 with the weights of a
ResNet-20, and stories260K, under HESSFUNC_DATA; they are left out where these are not there.

Work is counted in gradients of one batch: its graph takes 2.5, a product with one vector 2. To a
standard error s, full passes over B batches with k probes each take ``V B (2.5 / k + 2) / s^2``,
with V the variance of a probe; draws with r probes ``(D + P / r) (2.5 + 2 r) / s^2``, with D and P
the variances of the data and of a probe within a batch. The ratio of the two does not depend on s.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.algorithms.eigen.stochastic_power import stochastic_power_iteration
from hessfunc.algorithms.results.sampled import SampledEstimate
from hessfunc.algorithms.trace.sampled import sampled_trace
from hessfunc.app.problems.data import cifar10, digits
from hessfunc.app.problems.fit import train
from hessfunc.app.problems.llama import stories260k, stories_batches, tokens
from hessfunc.app.problems.nets import mlp
from hessfunc.app.problems.resnet import load_weights, resnet
from hessfunc.randomness import seeded
from hessfunc.training.examples import Examples
from hessfunc.transforms.batches.draws import draws
from tests.datapath import DATA

RESULTS = Path(__file__).parent / "results" / "draws.md"
GRAPH, PRODUCT = 2.5, 2.0
STORIES, WINDOW = "stories260K", 24
WEIGHTS = "resnet20_cifar10/resnet20-12fca82f.th"


@dataclass(frozen=True)
class Case:
    """A loss on batches, and how much of each kind of product is made.

    Attributes:
        batches: All batches of the data set.
        about: Number and kind of the examples.
        full_probes: of the full pass.
        draws: random batches.
        probes: on each of them.
        weight: Number of examples in a batch; None to count them.
    """

    title: str
    loss: hf.Loss
    params: Any
    batches: list[Any]
    about: str
    full_probes: int
    draws: int
    probes: int
    weight: Callable[[Any], float] | None = None


@dataclass(frozen=True)
class Measured:
    """One case: a trace by full passes and by random batches."""

    case: Case
    full: hf.results.Estimate
    sampled: SampledEstimate
    by_proxy: dict[str, SampledEstimate]
    seconds: float

    @property
    def full_variance(self) -> float:
        """Of one probe of all batches."""
        return float(self.full.samples.var())

    @property
    def full_work(self) -> float:
        """Gradients of one batch to a standard error of 1, all probes in one pass."""
        return self.full_variance * len(self.case.batches) * PRODUCT

    def draws_work(self, r: int) -> float:
        """The same by draws of r probes each."""
        found = self.sampled
        return (found.variance_data + found.variance_probes / r) * (GRAPH + r * PRODUCT)

    @property
    def best(self) -> int:
        """The number of probes a draw, 20 at most, that takes the least work."""
        return min(range(1, 21), key=self.draws_work)

    @property
    def gain(self) -> float:
        """How many times less work draws take, with that number of probes."""
        return self.full_work / self.draws_work(self.best)


def mean_square(logits: Tensor, labels: Tensor) -> Tensor:
    """The squared error of one-hot labels."""
    return (logits - F.one_hot(labels, 10)).square().mean()


def cases(*, quick: bool) -> list[Case]:
    """Those whose data are there."""
    found = []
    images = _images()
    if images is not None and (DATA / WEIGHTS).exists():
        model = resnet(20).eval()
        model.load_state_dict(load_weights(DATA / WEIGHTS))
        title = "trained ResNet-20, cross-entropy, CIFAR-10 training images"
        full, some = (2, 20) if quick else (6, 40)
        found.append(_supervised(title, model, F.cross_entropy, images, 50, full, some, 2))
    else:
        print(f"no CIFAR-10 or no {WEIGHTS} under {DATA}: cases with CIFAR-10 are left out")
    if (DATA / STORIES).is_dir():
        found.append(_stories(*(10, 40) if quick else (40, 160)))
    else:
        print(f"no {STORIES} under {DATA}: the Llama is left out")
    with seeded(0):
        small, wide = mlp([64, 32, 10]), mlp([3072, 32, 10])
    for name, criterion in [("MSE", mean_square), ("cross-entropy", F.cross_entropy)]:
        title = f"untrained MLP 64-32-10, {name}, digits"
        found.append(_supervised(title, small, criterion, digits(), 18, 100, 1500, 3))
        if images is not None:
            title = f"untrained MLP 3072-32-10, {name}, CIFAR-10 training images"
            found.append(_supervised(title, wide, criterion, images, 20, 100, 1500, 3))
    return found


def _supervised(
    title: str,
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    examples: Examples,
    size: int,
    *counts: int,
) -> Case:
    model_fn, params = hf.functional(model)
    batches = examples.batches(size)
    about = f"{len(examples):,} images in {len(batches)} batches of {size}"
    return Case(title, hf.supervised(model_fn, criterion), params, batches, about, *counts)


def _stories(full_probes: int, some: int) -> Case:
    """The Llama on windows of five stories, each a batch."""
    model_fn, params = hf.functional(stories260k(DATA / STORIES / "stories260K_torch.npz"))

    def logits(params: Any, batch: dict[str, Tensor]) -> Tensor:
        return model_fn(params, {"input_ids": batch["input_ids"]}).logits[:, :-1].transpose(1, 2)

    loss = hf.composed(logits, F.cross_entropy, targets=lambda batch: batch["labels"][:, 1:])
    stories = stories_batches(DATA / STORIES / "tinystories_sample_ids.npz")
    windows = [
        {"input_ids": ids, "labels": ids}
        for story in stories
        for ids in story["input_ids"].split(WINDOW, dim=1)
        if ids.shape[1] > 1
    ]
    about = f"five stories in {len(windows)} windows of up to {WINDOW} tokens"
    title = "trained Llama of 260,032 parameters, next-token loss, TinyStories"
    return Case(title, loss, params, windows, about, full_probes, some, 2, tokens)


def _images() -> Examples | None:
    try:
        return cifar10(DATA / "cifar10", "train")[:4000]
    except FileNotFoundError:
        return None


def measured(case: Case) -> Measured:
    """Both estimates, and those of batches that a proxy has drawn."""
    start = time.perf_counter()
    curvature, params, batches = hf.hvp(case.loss), case.params, case.batches

    def gradient(params: Any, batch: Any) -> float:
        return float(hf.inner(*(2 * [torch.func.grad(case.loss)(params, batch)]))) ** 0.5

    proxies = {
        "loss": lambda params, batch: float(case.loss(params, batch)),
        "gradient norm": gradient,
    }
    budget = case.draws * case.probes

    def sampled(proxy: Callable[[Any, Any], float] | None) -> SampledEstimate:
        some = draws(curvature, weight=case.weight, proxy=proxy, seed=0)(params, batches)
        return sampled_trace(some, params, probes=case.probes, max_matvecs=budget, seed=2)

    some = draws(curvature, weight=case.weight, seed=0)(params, batches)
    options: dict[str, Any] = {"block_size": case.full_probes, "seed": 1}
    full = hf.hutchinson(some.full, params, max_matvecs=case.full_probes, **options)
    by_proxy = {name: sampled(proxy) for name, proxy in proxies.items()}
    return Measured(case, full, sampled(None), by_proxy, time.perf_counter() - start)


def described(found: Measured) -> str:
    """A paragraph and its numbers."""
    case, sampled, full = found.case, found.sampled, found.full
    relative = math.sqrt(2 / (len(full.samples) - 1))
    return "\n".join(
        [
            f"## {case.title}",
            "",
            f"{case.about}; full pass with {len(full.samples)} probes, {sampled.draws} draws of "
            f"{case.probes} probes; {found.seconds:.0f} s.",
            "",
            "| | |",
            "|---|---|",
            f"| trace, full pass | {full.value:.4g} +- {full.stderr:.2g} |",
            f"| trace, draws | {sampled.value:.4g} +- {sampled.stderr:.2g} |",
            *(
                f"| trace, draws by {name} | {one.value:.4g} +- {one.stderr:.2g} |"
                for name, one in found.by_proxy.items()
            ),
            f"| variance of a probe of all batches | {found.full_variance:.3g} "
            f"(known to {relative:.0%}) |",
            f"| variance of a probe within a batch | {sampled.variance_probes:.3g} |",
            f"| variance of the data, between batches | {sampled.variance_data:.3g} |",
            f"| share of the data, {case.probes} probes a draw | {sampled.data_share:.0%} |",
            f"| best number of probes a draw | {found.best} |",
            "| gradients of one batch to a standard error of 1 % of the trace, full passes | "
            f"{found.full_work / (0.01 * full.value) ** 2:.3g} |",
            f"| the same, draws | {found.draws_work(found.best) / (0.01 * full.value) ** 2:.3g} |",
            f"| **times fewer** | **{found.gain:.1f}** |",
            "",
            sampled.advice,
            "",
        ]
    )


SEEDS = 3


def pairs_described() -> str:
    """The work to the top eigenpair, in gradients of one batch."""
    with seeded(0):
        order = torch.randperm(len(digits()))
        nets = {
            "untrained": mlp([64, 32, 10]),
            "trained": train(lambda: mlp([64, 32, 10]), digits(), epochs=5),
        }
    shuffled = Examples(digits().inputs[order], digits().targets[order])
    lines = [
        "## The top eigenpair to a residual of 1e-3, MLP 64-32-10 on the digits",
        "",
        f"Gradients of one batch, {GRAPH + PRODUCT} a product with one; medians of {SEEDS} seeds.",
        "",
        "| net | batches | power_iteration | lanczos | stochastic_power_iteration |",
        "|---|---|---|---|---|",
    ]
    for name, model in nets.items():
        for size in (360, 36, 12):
            batches = shuffled.batches(size)
            row = " | ".join(f"{gradients:,.0f}" for gradients in pair_work(model, batches))
            lines.append(f"| {name} | {len(batches)} of {size} | {row} |")
    return "\n".join(lines) + "\n"


def pair_work(model: nn.Module, batches: list[Any]) -> list[float]:
    """Of power iteration, of Lanczos and of random batches."""
    model_fn, params = hf.functional(model)
    curvature = hf.hvp(hf.supervised(model_fn, F.cross_entropy), chunk_size=1)
    kept = [curvature(params, batch) for batch in batches]
    full = hf.over_batches(curvature, keep=True)(params, batches)
    spent: list[list[float]] = [[], [], []]
    for seed in range(SEEDS):
        some = draws(curvature, seed=seed)(params, batches)
        power = hf.power_iteration(full, params, seed=seed, max_matvecs=500)
        top = hf.lanczos(full, params, k=1, rtol=1e-3, seed=seed)
        found = stochastic_power_iteration(
            full, lambda i, some=some: kept[some.batch(i)], params, seed=seed, max_matvecs=3000
        )
        assert all(bool(one.converged.all()) for one in (power, top, found))
        single = int(re.findall(r"(\d+) of the", found.reason)[0])
        exact = [power.matvecs, top.matvecs, found.matvecs - single]
        for to, count, more in zip(spent, exact, (0, 0, single), strict=True):
            to.append((count * len(batches) + more) * (GRAPH + PRODUCT))
    return [median(one) for one in spent]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer products with trained nets")
    parser.add_argument("--only", default="*", help="cases whose title matches, as 'trained*'")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    command = " ".join(["python -m bench.draws", *map(shlex.quote, sys.argv[1:])])
    paragraphs = [f"# Random batches against full passes\n\n`{command}`\n"]

    def publish(paragraph: str) -> None:
        paragraphs.append(paragraph)
        print(paragraph, flush=True)
        RESULTS.write_text("\n".join(paragraphs))

    for case in cases(quick=arguments.quick):
        if fnmatch(case.title, arguments.only):
            publish(described(measured(case)))
    if arguments.only == "*":
        publish(pairs_described())


if __name__ == "__main__":
    main()
