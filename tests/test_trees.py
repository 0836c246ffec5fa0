from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

import hessfunc as hf
from tests.cases import TiedHead


def test_flat_order_is_that_of_parameters_to_vector() -> None:
    model = nn.ModuleDict({"z": nn.Linear(3, 2), "a": nn.Conv2d(1, 2, 2), "tied": TiedHead()})
    _, params = hf.functional(model)
    assert torch.equal(hf.ravel(params), nn.utils.parameters_to_vector(model.parameters()).detach())


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Registered:
    """A container that torch's own registry knows."""

    def __init__(self, *found: Tensor) -> None:
        self.found = found


_pytree.register_pytree_node(
    Registered, lambda node: (list(node.found), None), lambda found, _: Registered(*found)
)


@pytest.mark.parametrize(
    "like",
    [
        Pair(torch.zeros(2), torch.zeros(3)),
        OrderedDict(z=torch.zeros(2), a=torch.zeros(3)),
        Registered(torch.zeros(2), torch.zeros(3)),
        [torch.zeros(2), (torch.zeros(3),)],
    ],
    ids=lambda like: type(like).__name__,
)
def test_containers_that_torch_knows_are_trees(like: Any) -> None:
    flat = torch.arange(5.0)
    again = hf.unravel(flat, like)
    assert type(again) is type(like)
    assert torch.equal(hf.ravel(again), flat)
