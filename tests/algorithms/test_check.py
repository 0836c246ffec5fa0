from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hessfunc as hf

X = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 10


def problem(activation: nn.Module, dtype: torch.dtype) -> tuple[hf.Loss, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 8, 3), activation, nn.Flatten(), nn.Linear(288, 10))
    model_fn, params = hf.functional(model.to(dtype))
    return hf.supervised(lambda p, x: model_fn(p, x.to(dtype)), cross_entropy), params


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU(), nn.Dropout()])
def test_a_hessian_passes(activation: nn.Module, dtype: torch.dtype) -> None:
    loss, params = problem(activation, dtype)
    matvec = hf.hvp(loss)(params, (X, Y))
    assert hf.check(matvec, params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.ReLU()])
def test_a_hessian_is_the_derivative_of_the_gradient(
    activation: nn.Module, dtype: torch.dtype
) -> None:
    loss, params = problem(activation, dtype)
    matvec = hf.hvp(loss)(params, (X, Y))
    gradient = torch.func.grad(lambda p: loss(p, (X, Y)))
    found = hf.check(matvec, params, gradient=gradient)
    assert found
    # In float32 no step is small enough to miss all kinks.
    undecided = dtype == torch.float32 and isinstance(activation, nn.ReLU)
    assert found.consistent is (None if undecided else True)


def test_another_batch_is_found() -> None:
    loss, params = problem(nn.Tanh(), torch.float64)
    matvec = hf.hvp(loss)(params, (X, Y))
    gradient = torch.func.grad(lambda p: loss(p, (X[:16], Y[:16])))
    found = hf.check(matvec, params, gradient=gradient)
    assert not found
    assert "different batches" in str(found)


def test_kinks_are_explained_and_not_reported() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    model_fn, params = hf.functional(model)
    loss = hf.supervised(lambda p, x: model_fn(p, x.flatten(1)), cross_entropy)
    batch = (X.repeat(8, 1, 1, 1) + 0.1 * torch.arange(256).view(-1, 1, 1, 1).sin(), Y.repeat(8))
    gradient = torch.func.grad(lambda p: loss(p, batch))
    found = hf.check(hf.hvp(loss)(params, batch), params, gradient=gradient)
    assert found
    assert found.consistent is None
    assert "undecided" in found.notes[0]
    assert "kinks" in str(found)


def test_nondeterminism_is_found() -> None:
    def matvec(block: Tensor) -> Tensor:
        return block * torch.rand(5)

    found = hf.check(matvec, torch.zeros(5))
    assert "not deterministic" in found.problems[0]


def test_an_affine_function_is_not_linear() -> None:
    found = hf.check(lambda block: block + 1, torch.zeros(5))
    assert found.problems[0].startswith("not linear")


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh()])
def test_a_wrong_factor_is_found_in_float64(activation: nn.Module) -> None:
    loss, params = problem(activation, torch.float64)
    wrong = hf.matvecs.scale(hf.hvp(loss)(params, (X, Y)), 1.5)
    gradient = torch.func.grad(lambda p: loss(p, (X, Y)))
    found = hf.check(wrong, params, gradient=gradient)
    assert not found
    assert found.consistent is False


def test_a_product_that_is_not_finite_is_refused() -> None:
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        hf.check(lambda block: block / 0, torch.zeros(5))


def test_asymmetry_is_found() -> None:
    matrix = torch.arange(25.0).view(5, 5)
    found = hf.check(lambda block: block @ matrix, torch.zeros(5))
    assert [p.split(":")[0] for p in found.problems] == ["not symmetric"]


def test_a_random_gradient_is_named_and_kinks_are_not_blamed() -> None:
    loss, params = problem(nn.Tanh(), torch.float64)

    def noisy(p: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(p, (batch[0] + torch.randn_like(batch[0]), batch[1]))

    gradient = torch.func.grad(lambda p: noisy(p, (X, Y)))
    found = hf.check(hf.hvp(noisy)(params, (X, Y)), params, gradient=gradient)
    assert not found
    assert found.problems[0].startswith("the gradient is random")
    assert "kinks" not in str(found)
    assert found.consistent is None
    assert found.inconsistency is None


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.GELU()])
def test_a_scale_that_is_off_by_a_percent_is_found_in_float32(
    activation: nn.Module, seed: int
) -> None:
    loss, params = problem(activation, torch.float32)
    matvec = hf.hvp(loss)(params, (X, Y))
    gradient = torch.func.grad(lambda p: loss(p, (X, Y)))
    assert hf.check(matvec, params, gradient=gradient, seed=seed)
    found = hf.check(hf.matvecs.scale(matvec, 1.01), params, gradient=gradient, seed=seed)
    assert not found
    assert found.consistent is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_entry_is_found_or_below_what_the_check_says_it_sees(dtype: torch.dtype) -> None:
    matrix = torch.diag(torch.linspace(1, 2, 20, dtype=dtype))
    wrong = matrix.clone()
    wrong[3, 3] *= 1.01
    found = hf.check(hf.dense(wrong), torch.ones(20, dtype=dtype), gradient=lambda p: matrix @ p)
    if found:
        assert found.resolution is not None
        assert "up to" in str(found)
        off = torch.linalg.matrix_norm(wrong - matrix, 2) / torch.linalg.matrix_norm(matrix, 2)
        # What is said to be seen is no less than what was missed on these vectors.
        assert found.tolerance >= 0.1 * off
    else:
        assert found.consistent is False


def test_what_differences_show_is_told() -> None:
    loss, params = problem(nn.Tanh(), torch.float32)
    gradient = torch.func.grad(lambda p: loss(p, (X, Y)))
    found = hf.check(hf.hvp(loss)(params, (X, Y)), params, gradient=gradient)
    assert found.resolution is not None
    assert 0 < found.resolution < found.tolerance
    assert "% of the length of a product" in str(found)
    assert str(hf.check(hf.hvp(loss)(params, (X, Y)), params)).endswith("deterministic")


def test_a_matvec_that_changes_its_block_is_called_so() -> None:
    with pytest.raises(ValueError, match="changes its block in place"):
        hf.check(lambda block: block.mul_(2), torch.zeros(4).double())
