"""The same products in plain PyTorch, as one writes them without a library.

No checks, no blocks, no copies: the products of several vectors are a list of lists of leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.speed.models import Case

Vector: TypeAlias = Sequence[Tensor]


def gradient(case: Case) -> Vector:
    """One forward and backward pass: the unit in which products are priced.

    Kernels are torch's choice, as in training; products need attention in its unfused form.
    """
    return torch.autograd.grad(case.loss(), case.parameters)


def kept(case: Case) -> Callable[[Vector], Vector]:
    """Double backward, the gradient of g'v, through a graph of g that is made once, here."""
    found = _differentiable(case)

    def product(vector: Vector) -> Vector:
        return torch.autograd.grad(found, case.parameters, vector, retain_graph=True)

    return product


def rebuilt(case: Case) -> Callable[[Vector], Vector]:
    """Double backward through a graph of g that is made for each product."""

    def product(vector: Vector) -> Vector:
        found = _differentiable(case)
        return torch.autograd.grad(found, case.parameters, vector)

    return product


def gauss_newton(case: Case) -> Callable[[Vector], Vector]:
    """J'(H(J v)) through graphs that are made once, here: J v as the derivative of J'w by w."""
    with _twice(case):
        outputs = case.model(case.inputs)
        cotangent = torch.zeros_like(outputs).requires_grad_()
        pulled = torch.autograd.grad(outputs, case.parameters, cotangent, create_graph=True)
    ends = outputs.detach().requires_grad_()
    slope = torch.autograd.grad(case.criterion(ends, case.targets), ends, create_graph=True)

    def product(vector: Vector) -> Vector:
        pushed = torch.autograd.grad(pulled, cotangent, vector, retain_graph=True)
        curved = torch.autograd.grad(slope, ends, pushed, retain_graph=True)
        return torch.autograd.grad(outputs, case.parameters, curved, retain_graph=True)

    return product


def _differentiable(case: Case) -> Vector:
    with _twice(case):
        return torch.autograd.grad(case.loss(), case.parameters, create_graph=True)


def _twice(case: Case) -> AbstractContextManager[None]:
    return sdpa_kernel(SDPBackend.MATH) if case.attention else nullcontext()
