"""Fisher matrices by their definition, an expectation over the targets of the likelihood."""

import torch
from torch import Tensor

from tests.cases import Case
from tests.reference import gradient


def categorical_fisher(found: Case) -> Tensor:
    """The mean over examples of ``E_y[g g']``, by all classes."""
    x, y = found.batch
    total = 0.0
    for b in range(len(y)):
        share = torch.softmax(found.loss.outputs(found.params, (x[b, None], None)), 1)[0]
        for c, p in enumerate(share):
            g = gradient(found.loss, found.params, (x[b, None], torch.tensor([c])))
            total = total + p * g.outer(g)
    return total / len(y)


def normal_fisher(found: Case) -> Tensor:
    """The mean over examples of ``E_y[g g']``, y normal of variance C/2, by points of its moments.

    One deviation along each output has the covariance, summed, of all of them.
    """
    x, y = found.batch
    count, outputs = y.shape
    total = 0.0
    for b in range(count):
        mean = found.loss.outputs(found.params, (x[b, None], None))
        for unit in torch.eye(outputs).double():
            g = gradient(found.loss, found.params, (x[b, None], mean + (outputs / 2) ** 0.5 * unit))
            total = total + g.outer(g)
    return total / count


def bernoulli_fisher(found: Case) -> Tensor:
    """The mean over examples of ``E_y[g g']``, by both classes."""
    x, y = found.batch
    total = 0.0
    for b in range(len(y)):
        p = torch.sigmoid(found.loss.outputs(found.params, (x[b, None], None)))
        for target, weight in ((torch.zeros_like(p), 1 - p), (torch.ones_like(p), p)):
            g = gradient(found.loss, found.params, (x[b, None], target))
            total = total + weight.item() * g.outer(g)
    return total / len(y)
