"""Copies without parameters have shapes, but no entries."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessfunc.sharding.skeleton import Absent, name_of, of_fsdp, without_parameters
from tests.distributed import modules, problems
from tests.distributed.ranks import Ranks
from tests.sharding.models import calls, mlp


def test_an_absent_parameter_has_a_shape_and_no_memory() -> None:
    absent = Absent.of("layer.weight", torch.zeros(3, 4, dtype=torch.float64))
    assert (absent.shape, absent.dim(), len(absent), absent.numel()) == ((3, 4), 2, 3, 12)
    assert (absent.dtype, absent.device) == (torch.float64, torch.device("cpu"))
    assert repr(absent) == "Absent('layer.weight', (3, 4), torch.float64)"
    with torch._C.DisableTorchFunctionSubclass():
        assert absent.untyped_storage().nbytes() <= 8
    assert name_of(absent) == "layer.weight"


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: F.linear(torch.ones(2, 4), x),
        lambda x: torch.stack([torch.ones(3, 4), x]),
        lambda x: x.sum(),
        lambda x: x[0],
        lambda x: torch.ones(3, 4).copy_(x),
    ],
)
def test_a_use_of_its_entries_is_refused(use: object) -> None:
    absent = Absent.of("layer.weight", torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match="parameter 'layer.weight' is used outside of the block"):
        use(absent)  # type: ignore[operator]


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    skeleton = without_parameters(model, dict(model.named_parameters()))
    assert skeleton[1].weight is skeleton[0].weight  # type: ignore[index]
    assert isinstance(model[0].weight, nn.Parameter)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = mlp()
    model[0].handle = (x for x in ())  # type: ignore[assignment]
    with pytest.raises(NotImplementedError, match="Sequential cannot be copied"):
        without_parameters(model, dict(model.named_parameters()))


def fully_shard_is_left() -> bool:
    module = modules.fully_sharded("transformer", problems.mesh(2))
    before = [dict(vars(m)) for m in module.modules()]
    skeleton = without_parameters(module, dict(module.named_parameters()))
    assert of_fsdp(module)
    assert not of_fsdp(skeleton)
    assert type(skeleton) is modules.Transformer
    assert [type(m) for m in skeleton.modules()] == [
        type(m) for m in modules.model("transformer").modules()
    ]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in skeleton.modules())
    assert before == [dict(vars(m)) for m in module.modules()]
    return True


def test_a_copy_of_a_model_of_fully_shard_has_its_own_classes(two: Ranks) -> None:
    assert all(two.run(fully_shard_is_left))


class Reads(nn.Module):
    """Computes with a weight of its block outside of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5)])

    def forward(self, x: Tensor) -> Tensor:
        assert self.layers[0].weight.shape == (5, 5)
        return F.linear(self.layers[0](x), self.layers[0].weight)


def reads() -> None:
    calls(Reads())


def test_a_parameter_that_is_used_outside_of_its_block_is_named(two: Ranks) -> None:
    for outcome in two.outcomes(reads):
        assert outcome.error is not None
        assert outcome.error.startswith("RuntimeError: parameter 'layers.0.weight' is used outside")
