"""Jobs whose peak memory is measured, each in its own process: ``python -m tests.peaks NAME``."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import hessfunc as hf

TOKENS, VOCABULARY, WIDTH = 512, 50_000, 64
LOGITS_BYTES = 4 * TOKENS * VOCABULARY


def _language_model() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(1000, WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, VOCABULARY, bias=False),
    )


def linearised_model() -> None:
    """J'(J v) by hand: what the linearised model itself takes."""
    model_fn, params = hf.functional(_language_model())
    inputs = [leaf.requires_grad_() for leaf in params.values()]
    outputs = model_fn(dict(zip(params, inputs, strict=True)), torch.randint(1000, (TOKENS,)))
    cotangent = torch.zeros(()).expand(outputs.shape).requires_grad_()
    pulled = torch.autograd.grad(outputs, inputs, cotangent, create_graph=True)
    ones = [torch.ones_like(leaf) for leaf in inputs]
    pushed = torch.autograd.grad(pulled, cotangent, ones, retain_graph=True)
    torch.autograd.grad(outputs, inputs, pushed, retain_graph=True)


def gauss_newton() -> None:
    """The same with the output Hessian of cross-entropy between."""
    model_fn, params = hf.functional(_language_model())
    batch = torch.randint(1000, (TOKENS,)), torch.randint(VOCABULARY, (TOKENS,))
    matvec = hf.ggnvp(hf.supervised(model_fn, cross_entropy))(params, batch)
    hf.apply(matvec, {name: torch.ones_like(leaf) for name, leaf in params.items()})


def deep_model(recompute: str | None = None, examples: int = 1536) -> None:
    """One Hessian product of 16 wide layers, each of many activations."""
    layers = [
        nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.LayerNorm(256), nn.Linear(256, 64))
        for _ in range(16)
    ]
    model_fn, params = hf.functional(nn.Sequential(*layers), recompute=recompute)
    loss = hf.composed(model_fn, lambda outputs, _: outputs.square().mean())
    matvec = hf.hvp(loss)(params, torch.randn(examples, 64))
    hf.apply(matvec, {name: torch.ones_like(leaf) for name, leaf in params.items()})


def deep_model_recomputed() -> None:
    """The same with the activations of each layer computed again."""
    deep_model(recompute="?*")


def no_examples_to_speak_of() -> None:
    """What the same takes for all but activations: torch itself, parameters."""
    deep_model(recompute="?*", examples=16)


def peak_of_this_process() -> int:
    """Peak resident bytes since the program began."""
    with contextlib.suppress(OSError), Path("/proc/self/status").open() as lines:
        # `ru_maxrss` survives exec on Linux: it would be that of the process that began this one.
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


JOBS: dict[str, Callable[[], None]] = {
    job.__name__: job
    for job in (
        linearised_model,
        gauss_newton,
        deep_model,
        deep_model_recomputed,
        no_examples_to_speak_of,
    )
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    JOBS[sys.argv[1]]()
    print(peak_of_this_process())
