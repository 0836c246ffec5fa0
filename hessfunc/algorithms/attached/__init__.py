"""Answers about a matrix that carry the graph of its parameters, to be part of a loss.

The matvec comes from a curvature function made with ``differentiable=True``. Solvers are not
differentiated: each answer has a closed form of its derivative, computed with a few products.
"""

from hessfunc.algorithms.attached.eigenpairs import eigenvalues, eigenvectors
from hessfunc.algorithms.attached.functions import function, logdet, trace_of_function
from hessfunc.algorithms.attached.probes import diagonal, trace

__all__ = [
    "diagonal",
    "eigenvalues",
    "eigenvectors",
    "function",
    "logdet",
    "trace",
    "trace_of_function",
]
