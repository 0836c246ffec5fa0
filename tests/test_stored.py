"""Products of weights that are stored in 16 bits are those of the converted weights, to the bit."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.app.problems.gpt import GPT
from hessfunc.memory import Footprint
from hessfunc.stored import Stored, read_as
from hessfunc.trees import tree_map

VOCABULARY = 11
TOKENS = torch.arange(21).view(3, 7) * 5 % VOCABULARY
BATCH = TOKENS[:, :-1], TOKENS[:, 1:]
CPU, META = torch.device("cpu"), torch.device("meta")


def narrow(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return GPT(VOCABULARY, context=6, width=width, layers=2, heads=2).bfloat16().eval()


def loss_of(model_fn: Any) -> hf.Loss:
    return hf.composed(
        lambda p, batch: model_fn(p, batch[0]).flatten(0, 1),
        F.cross_entropy,
        targets=lambda batch: batch[1].flatten(),
    )


def problems(
    model: nn.Module | None = None, **options: Any
) -> list[tuple[hf.Loss, dict[str, Tensor]]]:
    """The loss of a narrow model that computes in float32, and that of the widened model."""
    model = narrow() if model is None else model
    wide = copy.deepcopy(model).float()
    stored = hf.functional(model, dtype=torch.float32, **options)
    return [(loss_of(fn), params) for fn, params in (stored, hf.functional(wide, **options))]


def assert_same(found: Any, wanted: Any) -> None:
    for name, leaf in wanted.items():
        assert type(found[name]) is Tensor
        assert torch.equal(found[name], leaf), name


CURVATURES = {
    "hvp": hf.hvp,
    "hvp, loop": partial(hf.hvp, chunk_size=1),
    "hvp, forward": partial(hf.hvp, mode="forward"),
    "hvp, difference": partial(hf.hvp, mode="difference"),
    "hvp, differentiable": partial(hf.hvp, differentiable=True),
    "ggnvp": hf.ggnvp,
    "fvp": partial(hf.fvp, samples=1, seed=2),
    "efvp": hf.efvp,
}


@pytest.mark.parametrize("recompute", [None, "layers.*"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_products_are_those_of_the_widened_model(curvature: str, recompute: str | None) -> None:
    of = CURVATURES[curvature]
    (loss, params), (plain, wide) = problems(recompute=recompute)
    assert {type(leaf) for leaf in params.values()} == {Stored}
    assert {leaf.dtype for leaf in params.values()} == {torch.float32}
    block = hf.random_like(params, 2, seed=0, kind="normal")
    assert_same(of(loss)(params, BATCH)(block), of(plain)(wide, BATCH)(block))


def test_third_derivatives_and_algorithms_are_those_of_the_widened_model() -> None:
    (loss, params), (plain, wide) = problems()
    v = tree_map(lambda leaf: leaf[0], hf.random_like(params, 1, seed=1))

    def quadratic(loss: hf.Loss) -> Any:
        return torch.func.grad(lambda p: hf.inner(v, hf.apply(hf.hvp(loss)(p, BATCH), v)))

    assert_same(quadratic(loss)(params), quadratic(plain)(wide))
    found, wanted = (
        hf.lanczos(hf.over_batches(hf.ggnvp(of))(p, [BATCH]), p, k=1, rtol=0.1, seed=0)
        for of, p in ((loss, params), (plain, wide))
    )
    assert torch.equal(found.values, wanted.values)
    assert_same(tree_map(lambda x: x[0], found.vectors), tree_map(lambda x: x[0], wanted.vectors))


def test_frozen_weights_are_converted_where_they_are_read() -> None:
    model = narrow()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("norm"))
    (loss, params), (plain, wide) = problems(model)
    block = hf.random_like(params, 2, seed=0)
    assert_same(hf.hvp(loss)(params, BATCH)(block), hf.hvp(plain)(wide, BATCH)(block))


def test_a_kept_graph_holds_narrow_weights() -> None:
    n = sum(p.numel() for p in narrow(64).parameters())

    def held(model: nn.Module) -> int:
        model_fn, params = hf.functional(model, dtype=torch.float32)
        with Footprint() as memory:
            matvec = hf.ggnvp(loss_of(model_fn))(params, BATCH)
            hf.apply(matvec, {name: torch.zeros(p.shape) for name, p in params.items()})
            return memory.now

    # The matvec copies its parameters, in 2 bytes instead of 4.
    assert held(narrow(64).float()) - held(narrow(64)) == pytest.approx(2 * n, rel=0.05)


def test_a_step_of_an_optimiser_is_seen() -> None:
    model = narrow()
    model_fn, params = hf.functional(model, dtype=torch.float32)
    matvec = hf.hvp(loss_of(model_fn))(params, BATCH)
    block = hf.random_like(params, 1, seed=0)
    before = params["norm.weight"].clone()
    with torch.no_grad():
        model.get_parameter("norm.weight").mul_(2)
    assert torch.equal(params["norm.weight"], 2 * before)
    with pytest.raises(RuntimeError, match=r"'norm\.weight' has changed in place"):
        matvec(block)


def test_views_and_copies_are_stored_alike_and_the_rest_is_plain() -> None:
    held = torch.randn(6, 4).bfloat16()
    stored = read_as(held, torch.float32)
    for alike in (stored.T, stored[1:], stored.clone(), copy.deepcopy(stored), *stored.unbind()):
        assert isinstance(alike, Stored)
    assert stored.T.held.data_ptr() == held.data_ptr()  # type: ignore[attr-defined]
    for plain in (stored + 0, stored.double(), stored.view(torch.int32), torch.stack([stored])):
        assert type(plain) is Tensor
    assert torch.equal(stored.T @ torch.ones(6), held.float().T @ torch.ones(6))
    rows = F.embedding(torch.tensor([2, 0]), stored)
    assert torch.equal(rows, held.float()[[2, 0]])
    assert repr(stored).startswith("Stored(tensor(")
    with pytest.raises(RuntimeError, match="stored as torch.bfloat16 on cpu and read as torch.fl"):
        stored.add_(1)


def test_only_what_must_be_converted_is_stored() -> None:
    x = torch.randn(3)
    assert read_as(x) is read_as(x, torch.float32) is read_as(x, device=CPU) is x
    # A narrower dtype is a cast of the model's, with a derivative.
    assert read_as(x, torch.bfloat16) is x
    assert read_as(x, torch.float64).dtype == torch.float64
    assert read_as(torch.arange(3), torch.float64).dtype == torch.int64


def test_operations_run_on_the_device_of_the_computation() -> None:
    """The meta device stands for a GPU: a weight that is left on the CPU would raise."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    params = {name: read_as(p.detach(), device=META) for name, p in model.named_parameters()}
    assert {leaf.device for leaf in params.values()} == {META}

    def loss(params: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = torch.func.functional_call(model, params, torch.ones(5, 3, device=META))
        return outputs.square().sum()

    gradient = torch.func.grad(loss)(params)
    assert {(type(leaf), leaf.device) for leaf in gradient.values()} == {(Tensor, META)}


def test_weights_may_lie_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(narrow().state_dict(), path)
    with torch.device("meta"):
        model = GPT(VOCABULARY, context=6, width=8, layers=2, heads=2)
    model.load_state_dict(torch.load(path, mmap=True), assign=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    (loss, params), (plain, wide) = problems(model.eval())
    block = hf.random_like(params, 2, seed=0)
    assert_same(hf.ggnvp(loss)(params, BATCH)(block), hf.ggnvp(plain)(wide, BATCH)(block))


def test_language_models_in_16_bits() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=VOCABULARY, n_positions=8, use_cache=False
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).bfloat16().eval()
    batch = {"input_ids": TOKENS, "labels": TOKENS}
    loss, params = hf.language_model_loss(model, dtype=torch.float32)
    plain, wide = hf.language_model_loss(copy.deepcopy(model).float())
    block = hf.random_like(params, 2, seed=0)
    for of in (hf.hvp, hf.ggnvp):
        assert_same(of(loss)(params, batch)(block), of(plain)(wide, batch)(block))
