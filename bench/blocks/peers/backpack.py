"""BackPACK: extensions of a backward pass, which leave their results at the parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from backpack import backpack, extend, extensions
from backpack.extensions.curvmatprod.pchmp.pchmpbase import PCHMPBase
from torch import Tensor, nn

from bench.blocks.problems import Problem

# The inputs need no gradients, which torch remarks on at each backward pass.
warnings.filterwarnings("ignore", message="Full backward hook is firing")

_OPTIONS = {"PCHMP": {"modify": "abs"}}


def extended(problem: Problem, extension: str) -> Callable[[], dict[str, Any]]:
    """A backward pass with an extension: what it leaves, by parameter."""
    model = extend(copy.deepcopy(problem.model))
    criterion = extend(nn.CrossEntropyLoss())

    def work() -> dict[str, Any]:
        model.zero_grad()
        with backpack(getattr(extensions, extension)(**_OPTIONS.get(extension, {}))):
            criterion(model(problem.inputs), problem.targets).backward()
        return {n: getattr(p, extension.lower()) for n, p in model.named_parameters()}

    return work


def factored_products(
    factors: dict[str, list[Tensor]], vectors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The products of Kronecker factors: both of a weight, that of the outputs of a bias."""
    found = {}
    for name, (left, *right) in factors.items():
        rows = vectors[name]
        image = left @ rows.flatten(2) @ right[0] if right else rows @ left
        found[name] = image.reshape(rows.shape)
    return found


def product_functions(
    problem: Problem, extension: str, repeats: int
) -> Callable[[], dict[str, Tensor]]:
    """A backward pass, and a product of each block with one vector, so many times."""
    passed, vectors = extended(problem, extension), problem.vectors(1)

    def work() -> dict[str, Tensor]:
        functions = passed()
        for _ in range(repeats):
            images = {name: fn(vectors[name]) for name, fn in functions.items()}
        return images

    return work


@contextmanager
def gradient_once() -> Iterator[None]:
    """Inside, PCHMP multiplies phi'' by the gradient once: ``hessian_diagonal`` has it already."""
    before = PCHMPBase.modified_residual_mat_prod

    def once(
        self: Any, ext: Any, module: Any, g_inp: Any, g_out: Any, mat: Tensor, modify: str
    ) -> Tensor:
        residual = self.derivatives.hessian_diagonal(module, g_inp, g_out)
        return torch.einsum("...,v...->v...", self.modifications[modify](residual), mat)

    PCHMPBase.modified_residual_mat_prod = once
    try:
        yield
    finally:
        PCHMPBase.modified_residual_mat_prod = before
