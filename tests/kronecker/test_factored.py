"""Factors with other columns, and their exactness for whole nets."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.kronecker.cases import Net, between, dense, gauss_newton_blocks, largest_error, net


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_of_deep_linear_nets_with_square_errors_are_exact(sharing: str) -> None:
    """The Jacobians are the same for all examples (Bernacchia, Lengyel and Hennequin 2018)."""
    case = net(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(2, 3)),
        4,
        examples=6,
        criterion=F.mse_loss,
    )
    made = hf.kronecker.kflr(case.loss, case.model, sharing=sharing)(case.params, case.batch)
    assert largest_error(dense(made), gauss_newton_blocks(case)) < 1e-8


def test_the_empirical_factors_of_one_example_are_its_squared_gradient() -> None:
    case = net(between(lambda: nn.LayerNorm(4)), 4, examples=1)
    gradient = torch.func.grad(case.loss)(case.params, case.batch)
    for family in (hf.kronecker.kfac, hf.kronecker.ekfac):
        made = family(case.loss, case.model, fisher="empirical")(case.params, case.batch)
        for name, block in made.items():
            expected = torch.outer(gradient[name].flatten(), gradient[name].flatten())
            torch.testing.assert_close(block.dense(), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_traces_of_the_empirical_factors(reduction: str) -> None:
    case = net(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        4,
        examples=5,
        criterion=nn.CrossEntropyLoss(reduction=reduction),
    )
    inputs, targets = case.batch
    targets = targets.argmax(1)
    targets[2] = -100
    batch = inputs, targets
    made = hf.kronecker.ekfac(case.loss, case.model, fisher="empirical")(case.params, batch)
    exact = hf.matrix(hf.efvp(case.loss)(case.params, batch), case.params)
    sizes = [leaf.numel() for leaf in case.params.values()]
    for name, part in zip(made, exact.diagonal().split(sizes), strict=True):
        assert made[name].trace() == pytest.approx(float(part.sum()), rel=1e-8)


def test_factors_of_the_inputs_alone() -> None:
    case = net(between(lambda: nn.Linear(3, 4)), 2, 3, examples=4)
    made = hf.kronecker.kfac(case.loss, case.model, fisher="forward-only")(case.params, case.batch)
    x = case.batch[0].flatten(0, 1)
    expected = torch.kron(torch.eye(4, dtype=x.dtype), x.mT @ x / len(x))
    torch.testing.assert_close(made["0.weight"].dense(), expected)
    torch.testing.assert_close(made["0.bias"].dense(), torch.eye(4, dtype=x.dtype))


class Joined(nn.Module):
    """Weights with a bias, in the order of the inputs or of the outputs, and without one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.conv = nn.Linear(3, 4), nn.Conv1d(1, 2, 2, bias=False)
        self.bias, self.weight = (nn.Parameter(torch.randn(*shape)) for shape in ((5,), (3, 5)))
        self.groups = nn.Conv1d(2, 2, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(self.layer(x)[:, None])).mean(1)
        x = torch.sigmoid(torch.addmm(self.bias, x, self.weight))
        return self.groups(torch.stack([x, x.cos()], 1)).flatten(1)


PAIRS = {"layer.weight": "layer.bias", "weight": "bias"}


def joint_blocks(case: Net) -> dict[str, Tensor]:
    """The Gauss-Newton blocks of each weight together with its bias."""
    blocks = {}
    for name, bias in PAIRS.items():
        chosen, rest = hf.split(case.params, [name, bias])
        matvec = hf.ggnvp(hf.hold(case.loss, rest))(chosen, case.batch)
        matrix = hf.matrix(matvec, chosen)
        # The parameters of the model may be in the other order.
        sizes = {key: leaf.numel() for key, leaf in chosen.items()}
        places = dict(zip(sizes, torch.arange(len(matrix)).split([*sizes.values()]), strict=True))
        order = torch.cat([places[name], places[bias]])
        blocks[name] = matrix[order[:, None], order]
    return blocks


def test_joint_blocks_are_exact_with_one_example() -> None:
    case = net(Joined, 3, examples=1)
    made = hf.kronecker.kflr(case.loss, case.model, bias="joint")(case.params, case.batch)
    assert made.biases == PAIRS
    assert set(made) == set(case.params) - set(PAIRS.values())
    for name, exact in joint_blocks(case).items():
        torch.testing.assert_close(made[name].dense(), exact, rtol=1e-8, atol=1e-12)


def test_joint_blocks_of_a_data_set() -> None:
    case = net(Joined, 3, examples=4)
    parts = [tuple(leaf[i : i + 2] for leaf in case.batch) for i in (0, 2)]
    exact = joint_blocks(case)
    for family in (hf.kronecker.kflr, hf.kronecker.ekfac, hf.kronecker.kfoc):
        curvature = family(case.loss, case.model, bias="joint")
        made = hf.over_batches(curvature)(case.params, parts)
        whole = curvature(case.params, case.batch)
        for name, block in whole.items():
            torch.testing.assert_close(made[name].dense(), block.dense(), rtol=1e-7, atol=1e-9)
        if family is hf.kronecker.ekfac:
            for name, block in exact.items():
                assert made[name].trace() == pytest.approx(float(block.trace()), rel=1e-8)


def test_algebra_of_joint_blocks(tmp_path: Path) -> None:
    case = net(Joined, 3, examples=4)
    made = hf.kronecker.ekfac(case.loss, case.model, bias="joint")(case.params, case.batch)
    made.save(tmp_path / "blocks.npz")
    vectors = hf.random_like(case.params, 2, seed=0)
    for blocks in (made, hf.load(tmp_path / "blocks.npz")):
        matrix = hf.matrix(blocks, case.params)
        damped = matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64)
        rows = torch.cat([leaf.flatten(1) for leaf in vectors.values()], 1)
        inverse = blocks.inverse_matvec(vectors, 0.1)
        found = torch.cat([leaf.flatten(1) for leaf in inverse.values()], 1)
        torch.testing.assert_close(found, torch.linalg.solve(damped, rows.mT).mT)
        torch.testing.assert_close(hf.ravel(blocks.diagonal()), matrix.diagonal())
        assert blocks.trace() == pytest.approx(float(matrix.trace()))
        assert blocks.logdet(0.1) == pytest.approx(float(torch.logdet(damped)))
        assert blocks.norm() == pytest.approx(float(matrix.norm()))
        normal = hf.random_like(case.params, 2, kind="normal", seed=3)
        for name, leaf in blocks.power_matvec(blocks.sample(2, 0.1, seed=3), 0.5, 0.1).items():
            torch.testing.assert_close(leaf, normal[name])
    with pytest.raises(ValueError, match="bias='both': choose 'apart' or 'joint'"):
        hf.kronecker.kfac(case.loss, case.model, bias="both")


def test_narrow_parameters_and_empty_batches_are_refused() -> None:
    model = nn.Linear(4, 3)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, nn.functional.cross_entropy)
    kfac = hf.kronecker.kfac(loss, model, seed=0)
    narrow = {name: leaf.bfloat16() for name, leaf in params.items()}
    with pytest.raises(TypeError, match=r"too narrow.*`model.float\(\)`"):
        kfac(narrow, (torch.zeros(2, 4).bfloat16(), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="no examples"):
        kfac(params, (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)))


def test_singular_corrected_factors_have_no_determinant() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, nn.functional.cross_entropy)
    batch = torch.randn(11, 4, dtype=torch.float64), torch.arange(11) % 3
    blocks = hf.kronecker.ekfac(loss, model)(params, batch)
    # A softmax has a zero eigenvalue, H 1 = 0.
    with pytest.raises(ValueError, match="singular"):
        blocks.logdet(0.0)
    with pytest.raises(ValueError, match="singular"):
        blocks.sample(2, 0.0, seed=0)


def test_given_weights_count_in_both_factors() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, nn.functional.cross_entropy)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3
    batches, weights = [(x[:3], y[:3]), (x[3:], y[3:])], {3: 2.0, 5: 1.0}
    kflr = hf.kronecker.kflr(loss, model)
    found = hf.over_batches(kflr, weight=lambda b: weights[len(b[1])])(params, batches)
    first, second = (kflr(params, batch)["weight"] for batch in batches)
    for side in ("left", "right"):
        due = (2 * getattr(first, side) + getattr(second, side)) / 3
        assert torch.allclose(getattr(found["weight"], side), due, rtol=1e-10)


@pytest.mark.parametrize("targets", [[0, 3, 1, 1], [0, -1, 1, 1]])
def test_targets_that_are_no_classes_are_refused(targets: list[int]) -> None:
    case = net(partial(nn.Linear, 3, 3), 3, examples=4)
    for family in (hf.kronecker.kflr, hf.kronecker.kfac):
        with pytest.raises(ValueError, match="a target is the class"):
            family(case.loss, case.model)(case.params, (case.batch[0], torch.tensor(targets)))
