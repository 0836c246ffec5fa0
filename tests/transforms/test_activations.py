from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.cases import Residual, TwoInputs, case, randn
from tests.reference import gauss_newton, hessian, jacobian, matrix, relative_error


def residual_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        Residual(nn.Sequential(nn.Tanh(), nn.Conv2d(2, 2, 3, padding=1))),
        Residual(nn.Sequential(nn.SiLU(), nn.Conv2d(2, 2, 1))),
        nn.Flatten(),
        nn.Linear(18, 3),
    ).double()


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


def images() -> tuple[Tensor, Tensor]:
    return randn(4, 1, 3, 3), torch.arange(4) % 3


def vectors() -> tuple[Tensor, Tensor]:
    return randn(5, 3), torch.arange(5) % 3


# The perturbed nets, written out


def perturbed_residual_inputs(model: Any, e: Any, x: Tensor) -> Tensor:
    """What the convolutions read is moved; the other branch of a skip connection is not."""
    h = model[0](x + e["0", 0])
    h = h + model[1].branch[1](torch.tanh(h) + e["1.branch.1", 0])
    h = h + model[2].branch[1](F.silu(h) + e["2.branch.1", 0])
    return model[4](h.flatten(1))


def perturbed_residual_outputs(model: Any, e: Any, x: Tensor) -> Tensor:
    h = model[0](x) + e["0", 0]
    h = h + model[1].branch[1](torch.tanh(h)) + e["1.branch.1", 0]
    h = h + model[2].branch[1](F.silu(h)) + e["2.branch.1", 0]
    return model[4](h.flatten(1))


def perturbed_branches(model: Any, e: Any, x: Tensor) -> Tensor:
    """The branches read x + e, the skip connections x."""
    h = model[0](x)
    h = h + model[1].branch(h + e["1.branch", 0])
    h = h + model[2].branch(h + e["2.branch", 0])
    return model[4](h.flatten(1))


def perturbed_twice_inputs(model: Any, e: Any, x: Tensor) -> Tensor:
    h = torch.tanh(model.layer(x + e["layer", 0]))
    return model.head(torch.tanh(model.layer(h + e["layer", 1])))


def perturbed_twice_outputs(model: Any, e: Any, x: Tensor) -> Tensor:
    h = torch.tanh(model.layer(x) + e["layer", 0])
    return model.head(torch.tanh(model.layer(h) + e["layer", 1]))


def perturbed_mlp(model: Any, e: Any, x: Tensor) -> Tensor:
    return model[2](torch.tanh(model[0](x + e["0", 0])) + e["2", 0])


NETS: dict[str, tuple[Callable[[], nn.Module], Any, Any, Any, Any]] = {
    "residual, inputs": (residual_net, images, nn.Conv2d, "input", perturbed_residual_inputs),
    "residual, outputs": (residual_net, images, nn.Conv2d, "output", perturbed_residual_outputs),
    "residual, branches": (residual_net, images, "branch", "input", perturbed_branches),
    "called twice, inputs": (Twice, vectors, "layer", "input", perturbed_twice_inputs),
    "called twice, outputs": (Twice, vectors, "layer", "output", perturbed_twice_outputs),
    "linear": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
        vectors,
        nn.Linear,
        "input",
        perturbed_mlp,
    ),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("of", ["hvp", "ggnvp"])
def test_equals_the_dense_matrix_of_the_perturbed_net(name: str, of: str) -> None:
    make, data, select, at, perturbed = NETS[name]
    model, (x, y) = make().double(), data()
    loss, zeros = hf.activations(model, F.cross_entropy, select, at=at)
    at_zero = zeros(x)
    curvature = hf.hvp(loss) if of == "hvp" else hf.ggnvp(loss)
    found = matrix(curvature(at_zero, (x, y)), at_zero)
    direct = hf.composed(
        lambda e, batch: perturbed(model, e, batch[0]), lambda out, b: F.cross_entropy(out, b[1])
    )
    expected = (hessian if of == "hvp" else gauss_newton)(direct, at_zero, (x, y))
    assert relative_error(found, expected) < 1e-8
    assert relative_error(found.mT, found) < 1e-10


@pytest.mark.parametrize("k", [1, 5])
def test_single_vectors_and_blocks_see_the_same_matrix(k: int) -> None:
    x, y = images()
    loss, zeros = hf.activations(residual_net(), F.cross_entropy, nn.Conv2d)
    at_zero = zeros(x)
    v = hf.random_like(at_zero, k, seed=0)
    dense = matrix(hf.hvp(loss)(at_zero, (x, y)), at_zero)
    for mode in ("reverse", "forward"):
        out = hf.hvp(loss, mode=mode)(at_zero, (x, y))(v)
        rows = torch.cat([leaf.flatten(1) for leaf in out.values()], dim=1)
        flat = torch.cat([leaf.flatten(1) for leaf in v.values()], dim=1)
        assert relative_error(rows, flat @ dense) < 1e-10


def test_the_gauss_newton_matrix_of_the_last_layers_outputs_is_the_output_hessian() -> None:
    model, (x, y) = residual_net(), images()
    loss, zeros = hf.activations(model, F.cross_entropy, "4", at="output")
    at_zero = zeros(x)
    p = torch.softmax(model(x), 1)
    blocks = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / 4
    found = matrix(hf.ggnvp(loss)(at_zero, (x, y)), at_zero)
    assert relative_error(found, torch.block_diag(*blocks).detach()) < 1e-10
    assert relative_error(matrix(hf.hvp(loss)(at_zero, (x, y)), at_zero), found) < 1e-10


def test_examples_do_not_see_each_other() -> None:
    x, y = vectors()
    loss, zeros = hf.activations(Twice().double(), F.cross_entropy, "layer")
    at_zero = zeros(x)
    found = matrix(hf.hvp(loss)(at_zero, (x, y)), at_zero)
    example = torch.arange(5).repeat_interleave(3).repeat(2)
    assert not found[example[:, None] != example].any()


# Zeros, and which modules


def test_zeros_are_shaped_like_the_activations_in_the_order_of_the_modules() -> None:
    model, (x, _) = residual_net(), images()
    _, zeros = hf.activations(model, F.cross_entropy, (nn.Linear, nn.Conv2d))
    found = zeros(x)
    assert list(found) == [("0", 0), ("1.branch.1", 0), ("2.branch.1", 0), ("4", 0)]
    assert [tuple(z.shape) for z in found.values()] == [
        (4, 1, 3, 3),
        (4, 2, 3, 3),
        (4, 2, 3, 3),
        (4, 18),
    ]
    assert all(z.dtype == torch.float64 and not z.any() for z in found.values())


@pytest.mark.parametrize("at", ["input", "output"])
def test_the_loss_at_zero_is_that_of_the_model(at: Any) -> None:
    found = case("conv")
    loss, zeros = hf.activations(found.model, F.cross_entropy, "*", at=at)
    x, y = found.batch
    torch.testing.assert_close(loss(zeros(x), found.batch), F.cross_entropy(found.model(x), y))


CONVOLUTIONS = ["0", "1.branch.1", "2.branch.1"]


@pytest.mark.parametrize(
    ("select", "chosen"),
    [
        ("?.branch.1", CONVOLUTIONS[1:]),
        ("*.branch.*", ["1.branch.0", "1.branch.1", "2.branch.0", "2.branch.1"]),
        ("branch", ["1.branch", "2.branch"]),
        ("2.branch.1", ["2.branch.1"]),
        (nn.Conv2d, CONVOLUTIONS),
        ((nn.Conv2d, nn.Linear), [*CONVOLUTIONS, "4"]),
        (lambda name, module: "1" in name and isinstance(module, nn.Conv2d), CONVOLUTIONS[1:]),
        (lambda name, module: getattr(module, "kernel_size", None) == (1, 1), ["2.branch.1"]),
    ],
    ids=["glob", "glob of several", "suffix", "name", "type", "types", "predicate", "attribute"],
)
def test_modules_are_chosen_by_glob_suffix_type_or_predicate(
    select: Any, chosen: list[str]
) -> None:
    _, zeros = hf.activations(residual_net(), F.cross_entropy, select)
    assert [name for name, _ in zeros(images()[0])] == chosen


def test_inputs_that_are_no_floats_are_passed_by() -> None:
    class Shifted(nn.Module):
        def forward(self, places: Tensor, x: Tensor, *, by: float) -> tuple[Tensor, Tensor]:
            return places, by * x[places].square()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(3, 3), Shifted()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.tensor([1, 0]), x=self.first(x), by=2.0)[1]

    x = randn(2, 3)
    model = Net().double()
    for at, curvature in (("input", 4.0), ("output", 0.0)):
        loss, zeros = hf.activations(model, lambda out, _: out.sum(), "inner", at=at)  # type: ignore[arg-type]
        at_zero = zeros(x)
        assert list(at_zero) == [("inner", 0)]
        found = matrix(hf.hvp(loss)(at_zero, (x, None)), at_zero)
        assert relative_error(found + torch.eye(6), (curvature + 1) * torch.eye(6).double()) < 1e-12


def test_a_module_of_several_inputs_has_its_first_perturbed() -> None:
    inputs, y = (randn(5, 3), randn(5, 2)), randn(5, 4)
    model = nn.Sequential(TwoInputs())
    model.forward = lambda left, right: model[0](left, right)  # type: ignore[method-assign]
    loss, zeros = hf.activations(model.double(), F.mse_loss, "0")
    at_zero = zeros(inputs)
    assert at_zero["0", 0].shape == (5, 3)
    direct = jacobian(lambda e: model[0](inputs[0] + e, inputs[1]), torch.zeros(5, 3).double())
    found = matrix(hf.ggnvp(loss)(at_zero, (inputs, y)), at_zero)
    assert relative_error(found, 2 / 20 * direct.mT @ direct) < 1e-10


def test_frozen_parameters_do_not_matter() -> None:
    model, (x, y) = residual_net(), images()
    loss, zeros = hf.activations(model, F.cross_entropy, nn.Conv2d)
    v = hf.random_like(zeros(x), 1, seed=0)
    before = hf.hvp(loss)(zeros(x), (x, y))(v)
    loss, zeros = hf.activations(model.requires_grad_(False), F.cross_entropy, nn.Conv2d)
    after = hf.hvp(loss)(zeros(x), (x, y))(v)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_in_place_activations_are_perturbed_like_others() -> None:
    x, y = vectors()
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ELU(inplace=inplace), nn.Linear(4, 3)).double()
        loss, zeros = hf.activations(model, F.cross_entropy, "[01]")
        found.append(matrix(hf.hvp(loss)(zeros(x), (x, y)), zeros(x)))
    assert relative_error(found[1], found[0]) < 1e-12


# Traces by layer


def test_traces_by_layer_come_from_one_set_of_probes() -> None:
    x, y = images()
    loss, zeros = hf.activations(residual_net(), F.cross_entropy, nn.Conv2d)
    at_zero = zeros(x)
    matvec = hf.ggnvp(loss)(at_zero, (x, y))
    diagonal = matrix(matvec, at_zero).diagonal().split([z.numel() for z in at_zero.values()])
    estimate = hf.hutchinson(matvec, at_zero, max_matvecs=2000, rtol=1e-9, seed=0)
    assert len(estimate.by_leaf) == 3
    assert sum(estimate.by_leaf.values()) == pytest.approx(estimate.value)
    for part, exact in zip(estimate.by_leaf.values(), diagonal, strict=True):
        assert part == pytest.approx(float(exact.sum()), rel=0.1)


def test_traces_by_layer_name_the_modules_and_pool_over_batches() -> None:
    x, y = images()
    loss, zeros = hf.activations(residual_net(), F.cross_entropy, nn.Conv2d)
    parts = [(x[:3], y[:3]), (x[3:], y[3:])]
    estimates = [
        hf.xtrace(hf.ggnvp(loss)(zeros(b[0]), b), zeros(b[0]), max_matvecs=20, seed=i)
        for i, b in enumerate(parts)
    ]
    exact = [matrix(hf.ggnvp(loss)(zeros(b[0]), b), zeros(b[0])).trace() for b in parts]
    pooled = hf.pool(estimates, [3, 1])
    assert abs(pooled.value - float(3 * exact[0] + exact[1]) / 4) <= 4 * pooled.stderr + 1e-9
    for name, part in zip(CONVOLUTIONS, pooled.by_leaf, strict=True):
        assert name in part


# What is refused, and what is left behind


def test_a_choice_without_modules_is_refused() -> None:
    with pytest.raises(ValueError, match="'conv9' chooses none of the modules 0, 1, 1.branch"):
        hf.activations(residual_net(), F.cross_entropy, "conv9")
    few = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    with pytest.raises(ValueError, match="none of the modules 0, 1$"):
        hf.activations(few, F.cross_entropy, "conv9")
    with pytest.raises(ValueError, match="a bare Linear has no submodules"):
        hf.activations(nn.Linear(2, 2), F.cross_entropy, "weight")


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ValueError, match="at='inside': choose 'input' or 'output'"):
        hf.activations(residual_net(), F.cross_entropy, "0", at="inside")  # type: ignore[arg-type]


def test_a_module_without_a_float_there_is_refused() -> None:
    found = case("tied head")
    _, zeros = hf.activations(found.model, F.cross_entropy, "embedding")
    with pytest.raises(ValueError, match="'embedding' has no floating-point tensor at its input"):
        zeros(found.batch[0])


def test_a_call_that_zeros_did_not_see_is_refused() -> None:
    x, y = vectors()
    loss, zeros = hf.activations(Twice().double(), F.cross_entropy, "layer")
    once = {key: z for key, z in zeros(x).items() if key[1] == 0}
    with pytest.raises(ValueError, match=r"call 2 of module 'layer' .*pass zeros\(inputs\)"):
        loss(once, (x, y))


def test_the_module_stays_as_it_was() -> None:
    model, (x, y) = residual_net(), images()
    model[0].register_forward_hook(lambda *_: None)
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    hooks = {
        name: [list(h) for key, h in vars(m).items() if key.endswith("_hooks")]
        for name, m in model.named_modules()
    }
    for at in ("input", "output"):
        loss, zeros = hf.activations(model, F.cross_entropy, "*", at=at)  # type: ignore[arg-type]
        hf.hvp(loss)(zeros(x), (x, y))(hf.random_like(zeros(x), 1, seed=0))
        with pytest.raises(RuntimeError):
            zeros(x[0, 0, 0])
    for name, module in model.named_modules():
        assert set(vars(module)) == before[name]
        found = [list(h) for key, h in vars(module).items() if key.endswith("_hooks")]
        assert found == hooks[name]
    assert all(p.grad is None for p in model.parameters())
