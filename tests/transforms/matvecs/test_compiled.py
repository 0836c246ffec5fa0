import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from hessfunc.transforms.matvecs.compiled import NotCompiledWarning, compiled
from tests.reference import random_symmetric


def problem(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3)).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    inputs = torch.randn(7, 5, dtype=dtype, generator=generator)
    targets = torch.randint(3, (7,), generator=generator)
    model_fn, params = hf.functional(model)
    return hf.supervised(model_fn, F.cross_entropy), params, (inputs, targets)


def linear_problem():
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(3, 5, dtype=torch.float64, generator=generator)}
    inputs = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    targets = torch.randint(3, (7,), generator=generator)
    return hf.supervised(lambda p, x: x @ p["w"].mT, F.cross_entropy), params, (inputs, targets)


def rows(block):
    return torch.cat([leaf.flatten(1) for leaf in block.values()], dim=1)


# A program multiplies one vector, whatever the chunk of the matvec.
@pytest.mark.parametrize(
    ("transform", "chunk_size"),
    [(hf.hvp, 1), (hf.hvp, None), (hf.ggnvp, None), (hf.fvp, 1), (hf.efvp, None)],
)
def test_products_are_the_same(transform, chunk_size):
    loss, params, batch = problem()
    matvec = transform(loss, chunk_size=chunk_size)(params, batch)
    fast = compiled(matvec, backend="eager")
    for seed, k in ((0, 4), (1, 4), (2, 1)):
        block = hf.random_like(params, k, kind="normal", seed=seed)
        torch.testing.assert_close(rows(fast(block)), rows(matvec(block)))


@pytest.mark.parametrize("chunk_size", [3, 20])
def test_a_block_goes_through_in_pieces(chunk_size):
    loss, params, batch = linear_problem()
    matvec = hf.hvp(loss)(params, batch)
    block = hf.random_like(params, 7, kind="normal", seed=0)
    found = compiled(matvec, chunk_size=chunk_size, backend="eager")(block)
    torch.testing.assert_close(rows(found), rows(matvec(block)))


def test_a_chunk_of_no_vectors_is_refused():
    with pytest.raises(ValueError, match="chunk_size=0: it must be at least 1"):
        compiled(lambda block: block, chunk_size=0)


def test_a_shape_is_compiled_once():
    seen = []

    def backend(program, example_inputs):
        seen.append(len(program.graph.nodes))
        return program.forward

    loss, params, batch = linear_problem()
    fast = compiled(hf.hvp(loss)(params, batch), chunk_size=2, backend=backend)
    for k in (2, 4, 2, 3, 3):
        fast(hf.random_like(params, k, seed=0))
    # Of two vectors, and of one.
    assert len(seen) == 2


def test_sums_of_kept_batches_and_shifts_are_compiled():
    loss, params, (inputs, targets) = linear_problem()
    batches = [(inputs[:3], targets[:3]), (inputs[3:], targets[3:])]
    matvec = hf.matvecs.shift(hf.over_batches(hf.hvp(loss), keep=True)(params, batches), 0.5)
    block = hf.random_like(params, 2, kind="normal", seed=0)
    expected = rows(matvec(block))
    torch.testing.assert_close(rows(compiled(matvec, backend="eager")(block)), expected)


def test_parameters_that_have_changed_are_refused():
    loss, params, batch = linear_problem()
    fast = compiled(hf.hvp(loss)(params, batch), backend="eager")
    block = hf.random_like(params, 2, seed=0)
    fast(block)
    next(iter(params.values())).add_(1.0)
    with pytest.raises(RuntimeError, match="has changed in place since this matvec was made"):
        fast(block)


def test_what_cannot_be_written_down_runs_as_it_is():
    A = random_symmetric(6)

    def matvec(v: Tensor) -> Tensor:
        return v @ A * (1.0 if v.sum().item() < 1e9 else 2.0)

    fast = compiled(matvec, backend="eager")
    v = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.warns(NotCompiledWarning, match="runs uncompiled: .*tracing"):
        found = fast(v)
    torch.testing.assert_close(found, v @ A)
    torch.testing.assert_close(fast(2 * v), 2 * v @ A)


def test_what_leaves_torch_runs_as_it_is():
    A = random_symmetric(6)
    fast = compiled(lambda v: torch.from_numpy(v.numpy() @ A.numpy()), backend="eager")
    v = torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.warns(NotCompiledWarning):
        fast(v)
    torch.testing.assert_close(fast(2 * v), 2 * v @ A)


def test_data_that_are_read_anew_are_not_compiled():
    loss, params, batch = linear_problem()
    matvec = hf.over_batches(hf.hvp(loss))(params, [batch])
    block = hf.random_like(params, 2, kind="normal", seed=0)
    fast = compiled(matvec, backend="eager")
    with pytest.warns(NotCompiledWarning):
        found = fast(block)
    torch.testing.assert_close(rows(found), rows(matvec(block)))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inductor_compiles_a_product():
    loss, params, batch = problem(torch.float32)
    matvec = hf.hvp(loss)(params, batch)
    block = hf.random_like(params, 4, kind="normal", seed=0)
    found = rows(compiled(matvec)(block))
    torch.testing.assert_close(found, rows(matvec(block)), rtol=1e-4, atol=1e-6)
