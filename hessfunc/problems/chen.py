"""The deep narrowing perceptron on which block-diagonal Hessians were first compared."""

from __future__ import annotations

from torch import nn

from hessfunc.problems.mlp import mlp
from hessfunc.problems.xavier import xavier

__all__ = ["chen_mlp"]


def chen_mlp() -> nn.Sequential:
    """Eight linear layers with sigmoids between, 3,846,810 parameters.

    ``[N, 3, 32, 32]`` -> ``[N, 10]``; Xavier weights and no biases to start with.

    Source: Chen, Chou and Chang 2018, arXiv 1802.06502, on CIFAR-10.
    """
    return xavier(mlp([3072, 1024, 512, 256, 128, 64, 32, 16, 10], nn.Sigmoid))
