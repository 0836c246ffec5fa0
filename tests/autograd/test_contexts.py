"""Surroundings in which a loss is evaluated: each works, or is refused early."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hessfunc as hf
from tests.reference import gauss_newton, hessian, matrix, relative_error

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 1])
CURVATURES: dict[str, Any] = {
    "hvp": hf.hvp,
    "forward": lambda loss: hf.hvp(loss, mode="forward"),
    "difference": lambda loss: hf.hvp(loss, mode="difference"),
    "ggnvp": hf.ggnvp,
    "fvp": hf.fvp,
    "efvp": hf.efvp,
    "pchvp": hf.pchvp,
    "functional_hvp": hf.functional_hvp,
}


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def problem(model: nn.Module) -> tuple[hf.Loss, dict[str, Tensor]]:
    model_fn, params = hf.functional(model)
    return hf.supervised(model_fn, F.cross_entropy), params


LOSS, PARAMS = problem(net())
HESSIAN, GGN = hessian(LOSS, PARAMS, (X, Y)), gauss_newton(LOSS, PARAMS, (X, Y))


# Inference mode


@pytest.mark.parametrize("name", CURVATURES)
def test_matvecs_are_made_and_used_in_inference_mode(name: str) -> None:
    curvature = CURVATURES[name](LOSS)
    expected = matrix(curvature(PARAMS, (X, Y)), PARAMS)
    with torch.inference_mode():
        found = matrix(curvature(PARAMS, (X, Y)), PARAMS)
    assert relative_error(found, expected) < 1e-9


def test_algorithms_run_in_inference_mode() -> None:
    matvec = hf.over_batches(hf.hvp(LOSS), keep=True)(PARAMS, [(X, Y)])
    with torch.inference_mode():
        found = hf.lanczos(matvec, PARAMS, k=1, seed=0, rtol=1e-10).values
        diagonal = hf.ravel(hf.ggn_diagonal(LOSS, PARAMS, [(X, Y)]))
    largest = torch.linalg.eigvalsh(HESSIAN)
    assert abs(float(found.abs().max() - largest.abs().max())) < 1e-8
    torch.testing.assert_close(diagonal, GGN.diagonal())


@pytest.mark.parametrize("name", ["hvp", "ggnvp", "efvp"])
def test_models_and_batches_of_inference_mode_are_taken(name: str) -> None:
    expected = matrix(CURVATURES[name](LOSS)(PARAMS, (X, Y)), PARAMS)
    with torch.inference_mode():
        model, x = net(), X + 0
    loss, params = problem(model)
    found = matrix(CURVATURES[name](loss)(params, (x, Y)), params)
    assert relative_error(found, expected) < 1e-12


# Autocast


@pytest.mark.parametrize("name", CURVATURES)
def test_autocast_is_refused(name: str) -> None:
    matvec = CURVATURES[name](LOSS)(PARAMS, (X, Y))
    block = hf.random_like(PARAMS, 1, seed=0)
    advice = r"autocast is enabled.*`functional\(model, dtype=torch.bfloat16\)`"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match=advice):
            CURVATURES[name](LOSS)(PARAMS, (X, Y))
        with pytest.raises(RuntimeError, match=advice):
            matvec(block)
    matvec(block)


def test_autocast_within_the_loss_is_the_users_own() -> None:
    def loss(params: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = LOSS.outputs(params, batch)
        return F.cross_entropy(out.double(), batch[1])

    params = {name: leaf.float() for name, leaf in PARAMS.items()}
    found = matrix(hf.hvp(loss)(params, (X.float(), Y)), params)
    assert relative_error(found, HESSIAN) < 0.05


# Wrapped and compiled modules


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("around", [lambda m: m, Around])
def test_data_parallel_and_jit_are_refused(around: Callable[[nn.Module], nn.Module]) -> None:
    place = r"model(\.inner)?"
    with pytest.raises(NotImplementedError, match=rf"is a DataParallel.*`functional\({place}.mod"):
        hf.functional(around(nn.DataParallel(net())))
    traced = torch.jit.trace(net(), X)
    with pytest.raises(NotImplementedError, match=rf"{place} is a .*compiled by torch.jit"):
        hf.functional(around(traced))


def compiled_in_place() -> nn.Module:
    model = net()
    model.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.compile(net(), backend="aot_eager"),
        lambda: Around(torch.compile(net(), backend="aot_eager")),
        compiled_in_place,
    ],
    ids=["compiled", "within", "in place"],
)
def test_compiled_modules_run_uncompiled(made: Callable[[], nn.Module]) -> None:
    model = made()
    loss, params = problem(model)
    assert relative_error(matrix(hf.hvp(loss)(params, (X, Y)), params), HESSIAN) < 1e-10
    assert relative_error(matrix(hf.ggnvp(loss)(params, (X, Y)), params), GGN) < 1e-10
    assert relative_error(matrix(hf.efvp(loss)(params, (X, Y)), params), GGN) > 0


def test_compiled_criteria_run_uncompiled() -> None:
    criterion = torch.compile(F.cross_entropy, backend="aot_eager")
    loss = hf.composed(LOSS.outputs, lambda out, batch: criterion(out, batch[1]))
    assert relative_error(matrix(hf.ggnvp(loss)(PARAMS, (X, Y)), PARAMS), GGN) < 1e-10


# Writes that torch does not see


@pytest.mark.parametrize("name", CURVATURES)
@pytest.mark.parametrize("by_numpy", [False, True])
def test_a_matvec_stays_that_of_the_parameters_it_was_made_of(name: str, by_numpy: bool) -> None:
    model = net()
    loss, params = problem(model)
    matvec = CURVATURES[name](loss)(params, (X, Y))
    before = matrix(matvec, params)
    weight = model[2].weight
    if by_numpy:
        weight.detach().numpy()[0] *= 5
    else:
        weight.data.mul_(5)
    assert relative_error(matrix(matvec, params), before) < 1e-12
    after = matrix(CURVATURES[name](loss)(params, (X, Y)), params)
    assert relative_error(after, before) > 0.01


@pytest.mark.parametrize("name", [name for name in CURVATURES if name != "forward"])
def test_a_matvec_is_freed_with_its_last_reference(name: str) -> None:
    curvature = CURVATURES[name](LOSS)
    gc.collect()
    gc.disable()
    try:
        matvec = curvature(PARAMS, (X, Y))
        matvec(hf.random_like(PARAMS, 2, seed=0))
        alive = weakref.ref(matvec)
        del matvec
        assert alive() is None
    finally:
        gc.enable()


# Inputs that require gradients


@pytest.mark.parametrize("name", CURVATURES)
def test_inputs_that_require_gradients_change_nothing(name: str) -> None:
    expected = matrix(CURVATURES[name](LOSS)(PARAMS, (X, Y)), PARAMS)
    x = X.clone().requires_grad_()
    found = matrix(CURVATURES[name](LOSS)(PARAMS, (x, Y)), PARAMS).detach()
    assert relative_error(found, expected) < 1e-9
    assert x.grad is None


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_the_diagonal_takes_inputs_that_require_gradients(chunk_size: int | None) -> None:
    batch = X.clone().requires_grad_(), Y
    found = hf.ggn_diagonal(LOSS, PARAMS, [batch], examples_per_chunk=chunk_size)
    torch.testing.assert_close(hf.ravel(found), GGN.diagonal())


# Blocks with structure

BLOCKS: dict[str, Any] = {
    "ekfac": hf.kronecker.ekfac,
    "kflr": hf.kronecker.kflr,
    "kfra": hf.kronecker.kfra,
    "hbp": hf.kronecker.hbp,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_made_in_inference_mode_of_what_was_made_there(name: str) -> None:
    model = net()
    loss, params = problem(model)
    expected = matrix(BLOCKS[name](loss, model)(params, (X, Y)), params)
    with torch.inference_mode():
        batch = (X + 0, Y + 0)
        inside = matrix(BLOCKS[name](loss, model)(params, batch), params)
    outside = matrix(BLOCKS[name](loss, model)(params, batch), params)
    assert relative_error(inside, expected) < 1e-9
    assert relative_error(outside, expected) < 1e-9


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_refused_under_autocast(name: str) -> None:
    model = net()
    loss, params = problem(model)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(RuntimeError, match="leave the `torch.autocast` block"),
    ):
        BLOCKS[name](loss, model)(params, (X, Y))


class Checkpointed(nn.Module):
    def __init__(self, inputs_need_gradient: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.inputs_need_gradient = inputs_need_gradient

    def forward(self, x: Tensor) -> Tensor:
        pieces = [lambda y: self.first(y).tanh(), lambda y: self.second(y).tanh()]
        place = int(self.inputs_need_gradient)
        for i, piece in enumerate(pieces):
            x = checkpoint(piece, x, use_reentrant=True) if i == place else piece(x)
        out: Tensor = self.third(x)
        return out


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("inputs_need_gradient", [True, False])
def test_factors_of_what_is_checkpointed_are_refused(inputs_need_gradient: bool) -> None:
    model = Checkpointed(inputs_need_gradient).double()
    loss, params = problem(model)
    with pytest.raises((NotImplementedError, ValueError), match=r"torch\.utils\.checkpoint"):
        hf.kronecker.ekfac(loss, model)(params, (X, Y))


def test_factors_of_a_criterion_without_second_derivative_are_refused() -> None:
    model = net()
    model_fn, params = hf.functional(model)
    with pytest.raises(NotImplementedError, match="multi_margin_loss has no second derivative"):
        hf.kronecker.ekfac(hf.supervised(model_fn, F.multi_margin_loss), model)(params, (X, Y))


@pytest.mark.parametrize("mode", ["reverse", "forward", "difference"])
def test_a_frozen_weight_that_changes_in_place_is_told(mode: Any) -> None:
    model = net()
    model[2].weight.requires_grad_(False)
    loss, params = problem(model)
    ones = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    matvec = hf.hvp(loss, mode=mode)(params, (X, Y))
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"'2\.weight' has changed.*make the matvec again"):
        hf.apply(matvec, ones)


OF_A_BATCH: dict[str, Any] = {
    "reverse": hf.hvp,
    "forward": partial(hf.hvp, mode="forward"),
    "difference": partial(hf.hvp, mode="difference"),
    "ggnvp": hf.ggnvp,
    "fvp": partial(hf.fvp, samples=2, seed=0),
    "efvp": hf.efvp,
    "pchvp": hf.pchvp,
    "functional_hvp": hf.functional_hvp,
    "compiled": lambda loss: (
        lambda p, b: hf.matvecs.compiled(hf.ggnvp(loss)(p, b), backend="eager")
    ),
}


@pytest.mark.parametrize("name", OF_A_BATCH)
def test_a_matvec_is_that_of_the_batch_when_it_was_made(name: str) -> None:
    model = net()
    loss, params = problem(model)
    inputs, targets = X.numpy().copy(), Y.numpy().copy()
    batch = {"x": torch.from_numpy(inputs), "y": torch.from_numpy(targets)}
    of_dict = hf.composed(
        lambda p, b: loss.outputs(p, (b["x"], None)),
        F.cross_entropy,
        targets=lambda b: b["y"],
    )
    matvec = OF_A_BATCH[name](of_dict)(params, batch)
    expected = matrix(OF_A_BATCH[name](loss)(params, (X, Y)), params)
    first = hf.random_like(params, 1, seed=0)
    before = matvec(first)
    inputs *= 3
    targets[:] = (targets + 1) % 2
    batch["x"].data.add_(1)
    assert hf.ravel(matvec(first)).equal(hf.ravel(before))
    torch.testing.assert_close(matrix(matvec, params), expected)


@pytest.mark.parametrize("curvature", [hf.hvp, hf.ggnvp, hf.efvp])
def test_a_loader_may_use_one_buffer_for_all_batches(curvature: Any) -> None:
    loss, params = problem(net())

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            inputs, targets = np.empty((2, X.shape[1])), np.empty(2, dtype=np.int64)
            for start in range(0, len(X) - 1, 2):
                inputs[:], targets[:] = X[start : start + 2], Y[start : start + 2]
                yield torch.from_numpy(inputs), torch.from_numpy(targets)

    pieces = [(X[i : i + 2], Y[i : i + 2]) for i in range(0, len(X) - 1, 2)]
    expected = matrix(hf.over_batches(curvature(loss))(params, pieces), params)
    for keep in (False, True):
        matvec = hf.over_batches(curvature(loss), keep=keep)(params, Loader())
        torch.testing.assert_close(matrix(matvec, params), expected)


def test_a_batch_of_numpy_and_of_inputs_that_need_gradients_is_copied() -> None:
    model_fn, params = hf.functional(net())
    x = X.clone().requires_grad_()
    array = X.numpy().copy()

    def loss(params: Any, batch: Any) -> Tensor:
        # The loss of the same tensor in two places sees one tensor.
        assert batch["x"] is batch["again"]
        energy = model_fn(params, batch["x"]).square().sum()
        (slope,) = torch.autograd.grad(energy, batch["x"], create_graph=True)
        return (slope - torch.from_numpy(batch["array"])).square().mean()

    matvec = hf.hvp(loss)(params, {"x": x, "again": x, "array": array})
    before = matrix(matvec, params)
    array[:] = 0
    x.data.zero_()
    assert matrix(matvec, params).equal(before)


@pytest.mark.parametrize("mode", ["reverse", "forward", "difference"])
def test_weights_behind_activations_that_change_in_place_are_told(mode: Any) -> None:
    model = net()
    loss, zeros = hf.activations(model, F.cross_entropy, "2")
    matvec = hf.hvp(loss, mode=mode)(zeros(X), (X, Y))
    vector = hf.random_like(zeros(X), 1, seed=0)
    matvec(vector)
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"'2\.weight' has changed in place"):
        matvec(vector)


def test_a_draw_is_that_of_the_batch_when_it_was_drawn() -> None:
    inputs = X.clone()
    some = hf.draws(hf.hvp(LOSS), seed=0)(PARAMS, [(inputs[:3], Y[:3]), (inputs[3:], Y[3:])])
    first = some(0)
    vector = hf.random_like(PARAMS, 1, seed=0)
    before = hf.ravel(first(vector))
    inputs.data.mul_(3)
    assert hf.ravel(first(vector)).equal(before)


def test_activations_are_those_of_the_batch_when_the_matvec_was_made() -> None:
    model = net()
    loss, zeros = hf.activations(model, F.cross_entropy, nn.Linear)
    inputs = X.clone()
    at = zeros(inputs)
    matvec = hf.hvp(loss, mode="difference")(at, (inputs, Y))
    vector = hf.random_like(at, 1, seed=0)
    before = hf.ravel(matvec(vector))
    inputs.data.mul_(3)
    assert hf.ravel(matvec(vector)).equal(before)


# Losses that change their batch


def shifted_in_place(params: Any, batch: Any) -> Tensor:
    return LOSS(params, (batch[0].add_(1.0), batch[1]))


@pytest.mark.parametrize(
    "evaluated",
    [
        lambda loss, b: hf.hvp(loss, mode="forward")(PARAMS, b),
        lambda loss, b: hf.hvp(loss, mode="difference")(PARAMS, b),
        lambda loss, b: hf.ggn_diagonal(loss, PARAMS, [b]),
        lambda loss, b: hf.critical_sharpness(loss, PARAMS, b, PARAMS),
        lambda loss, b: hf.landscape(loss, PARAMS, [b], PARAMS, points=3),
    ],
    ids=["forward", "difference", "ggn_diagonal", "critical_sharpness", "landscape"],
)
def test_a_loss_that_changes_its_batch_is_not_evaluated_again(evaluated: Any) -> None:
    loss = hf.composed(
        lambda p, b: LOSS.outputs(p, (b[0].add_(1.0), b[1])), lambda o, b: F.cross_entropy(o, b[1])
    )
    with pytest.raises(ValueError, match="the loss changes its batch in place"):
        evaluated(loss, (X.clone(), Y))


def test_a_loss_that_changes_its_batch_is_evaluated_once_in_reverse_mode() -> None:
    batch = X.clone(), Y
    found = matrix(hf.hvp(shifted_in_place)(PARAMS, batch), PARAMS)
    assert relative_error(found, hessian(LOSS, PARAMS, (X + 1, Y))) < 1e-9
    assert torch.equal(batch[0], X)


def test_parameters_without_values_are_refused() -> None:
    with torch.device("meta"):
        model_fn, params = hf.functional(nn.Linear(3, 2))
    loss = hf.supervised(model_fn, F.mse_loss)
    with pytest.raises(ValueError, match="the device 'meta'"):
        hf.hvp(loss)(params, (torch.ones(2, 3), torch.ones(2, 2)))


class BehindCheckpoint(nn.Module):
    """A layer behind torch's own checkpointing."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(3, 3), nn.Linear(3, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(
            lambda h: torch.tanh(self.second(h)), self.first(x), use_reentrant=self.reentrant
        )


@pytest.mark.parametrize("hooks", [nullcontext, torch.autograd.graph.save_on_cpu])
@pytest.mark.parametrize("reentrant", [True, False])
def test_torchs_checkpointing_is_refused_with_what_to_do(reentrant: bool, hooks: Any) -> None:
    model_fn, params = hf.functional(BehindCheckpoint(reentrant=reentrant))
    loss = hf.composed(model_fn, lambda outputs, _: outputs.square().sum())
    with hooks(), pytest.raises(RuntimeError, match=r"functional\(model, recompute="):
        hf.hvp(loss)(params, torch.randn(4, 3))
    # What the models are called in is as it was.
    checkpointed = torch.utils.checkpoint.checkpoint(
        torch.tanh, params["first.weight"], use_reentrant=False
    )
    assert checkpointed.equal(params["first.weight"].tanh())


def test_hooks_of_the_users_own_stay() -> None:
    model_fn, params = hf.functional(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    loss = hf.composed(model_fn, lambda outputs, _: outputs.square().sum())
    with torch.autograd.graph.save_on_cpu():
        matvec = hf.hvp(loss)(params, torch.randn(4, 3))
    assert hf.check(matvec, params)
