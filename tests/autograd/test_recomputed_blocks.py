"""Blocks of a model that recompute their activations."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hessfunc as hf
from tests.cases import case, dense_hessian
from tests.graphs import allocated
from tests.reference import matrix, relative_error

RECOMPUTED = [
    ("conv", "*"),
    ("batch norm, train", "1"),
    ("layer norm", "[12]"),
    ("transformer encoder layer", "linear?"),
    ("multi-head attention", "attention"),
    ("lstm", "lstm"),
    ("tied head", "inner"),
    ("residual", "[12]"),
    ("frozen", "*"),
    ("bert, dropout", "bert.encoder.layer.*"),
]


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize(("name", "pattern"), RECOMPUTED)
def test_recomputed_modules_change_no_product(name: str, pattern: str, mode: Any) -> None:
    found = case(name)
    model_fn, params = hf.functional(found.model, recompute=pattern)
    criterion = found.loss.criterion.criterion
    loss = hf.supervised(model_fn, criterion)
    product = matrix(hf.hvp(loss, mode=mode)(params, found.batch), params)
    assert relative_error(product, dense_hessian(name)) < 1e-8


def test_recomputed_modules_keep_their_inputs_alone() -> None:
    model = nn.Sequential(
        *(nn.Sequential(*(nn.Linear(4, 4), nn.Tanh()) * 4) for _ in range(3)), nn.Linear(4, 1)
    )
    x = torch.randn(1000, 4)

    def kept(recompute: str | None) -> int:
        model_fn, params = hf.functional(model, recompute=recompute)
        loss = hf.composed(model_fn, lambda out, _: out.square().mean())
        return allocated(lambda: hf.hvp(loss)(params, x)).kept

    assert kept("[012]") < kept(None) / 3


def test_recomputation_leaves_the_modules_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
    model_fn, params = hf.functional(model, recompute="*")
    before = [sorted(vars(module)) for module in model.modules()]
    model_fn(params, torch.randn(5, 3))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model_fn(params, torch.randn(5, 4))
    assert [sorted(vars(module)) for module in model.modules()] == before


def test_a_pattern_without_a_module_is_refused() -> None:
    with pytest.raises(
        ValueError, match="recompute='layer9' chooses none of the modules 0, 1, 2, 3$"
    ):
        hf.functional(
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
            recompute="layer9",
        )
    with pytest.raises(ValueError, match="a bare Linear has no submodules"):
        hf.functional(nn.Linear(2, 2), recompute="layer9")


class Gated(nn.Module):
    """A block that uses a tensor which its model sets, or sets one or fills a list for it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.linear, self.way, self.other = nn.Linear(3, 3).double(), way, torch.ones(()).double()

    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        y: Tensor = self.linear(x) * self.other if self.way == "read" else self.linear(x)
        if self.way == "written":
            self.other = y.square().mean()
        if self.way == "list":
            seen.append(y.square().mean())
        return y


class Around(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.blocks, self.gate = nn.ModuleList([Gated(way)]), nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        block, seen = self.blocks[0], list[Tensor]()
        assert isinstance(block, Gated)
        if block.way == "read":
            block.other = self.gate(x)
        y: Tensor = block(x, seen)
        return y + sum(seen)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("read", "attribute 'other' of the recomputed block 'blocks.0' was set outside"),
        ("list", "changes a list or a dict among its arguments"),
    ],
)
def test_what_enters_or_leaves_a_recomputed_block_beside_it_is_refused(
    way: str, message: str
) -> None:
    model, x = Around(way), torch.ones(2, 3).double()
    plain, params = hf.functional(model)
    v = hf.random_like(params, 1, seed=0)
    assert hf.hvp(lambda p, x: plain(p, x).square().sum())(params, x)(v)
    recomputing, _ = hf.functional(model, recompute="blocks.*")
    with pytest.raises(NotImplementedError, match=message):
        hf.hvp(lambda p, x: recomputing(p, x).square().sum())(params, x)(v)


def test_an_attribute_that_a_recomputed_block_sets_is_warned_of() -> None:
    model_fn, params = hf.functional(Around("written"), recompute="blocks.*")
    with pytest.warns(UserWarning, match="block 'blocks.0' sets its attribute 'other'"):
        hf.hvp(lambda p, x: model_fn(p, x).square().sum())(params, torch.ones(2, 3).double())


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("there is one of me")


def test_a_module_that_cannot_be_copied_is_refused() -> None:
    model = nn.Sequential(Uncopied(3, 3), nn.Tanh())
    with pytest.raises(NotImplementedError, match="cannot be copied .*: leave out `recompute`"):
        hf.functional(model, recompute="0")


def test_buffers_are_no_constants_of_finite_differences() -> None:
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)
    model = nn.Sequential(nn.Sequential(*layers)).double().eval()
    batch = torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])
    model_fn, params = hf.functional(model, recompute="0")
    loss = hf.supervised(model_fn, nn.functional.cross_entropy)
    vector = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    expected = hf.apply(hf.hvp(loss)(params, batch), vector)
    found = hf.apply(hf.hvp(loss, mode="difference")(params, batch), vector)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
