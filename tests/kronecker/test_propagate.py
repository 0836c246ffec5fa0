"""Literal cases, splitting, the user's own rules, and what is refused."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessfunc as hf
from tests.cases import Residual
from tests.kronecker.cases import LAYERS, dense, eight_rows, largest_error, net
from tests.reference.backpropagation import exact_blocks


def test_linear_layer_under_the_squared_norm() -> None:
    """H_x = W' 2I W and H_b = 2I, of Dangel, Harmeling and Hennig's own example."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 2, 3], [4, 5, 6]]))
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, lambda z, _: z.square().sum())
    blocks = hf.kronecker.hbp(loss, model)(
        params, (torch.ones(1, 3, dtype=torch.float64), torch.zeros(1))
    )
    expected = torch.tensor([[34.0, 44, 54], [44, 58, 72], [54, 72, 90]], dtype=torch.float64)
    torch.testing.assert_close(blocks["0.bias"].dense(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(blocks["1.bias"].dense(), 2 * torch.eye(2, dtype=torch.float64))
    # H_W = H_z (x) xx' with x the input of the second layer.
    x = model[0](torch.ones(1, 3, dtype=torch.float64)).detach()
    torch.testing.assert_close(
        blocks["1.weight"].dense(), torch.kron(2 * torch.eye(2).double(), x.mT @ x)
    )


def test_blocks_are_a_matvec_of_the_whole() -> None:
    case = eight_rows(examples=5)
    blocks = hf.kronecker.hbp(case.loss, case.model, residual="abs")(case.params, case.batch)
    assert list(blocks) == list(case.params)
    whole = torch.block_diag(*dense(blocks).values())
    top = hf.lanczos(blocks, case.params, k=3, seed=0)
    torch.testing.assert_close(
        top.values, torch.linalg.eigvalsh(whole)[-3:].flip(0), rtol=1e-6, atol=0
    )
    assert hf.xtrace(blocks, case.params, seed=0).value == pytest.approx(float(whole.trace()))
    assert blocks.trace() == pytest.approx(float(whole.trace()))
    b = torch.func.grad(case.loss)(case.params, case.batch)
    solved = hf.cg(blocks, b, damping=0.1, rtol=1e-10).x
    direct = blocks.inverse_matvec({name: leaf[None] for name, leaf in b.items()}, 0.1)
    for name, leaf in solved.items():
        torch.testing.assert_close(leaf, direct[name][0], rtol=1e-6, atol=1e-10)


def test_a_matrix_that_does_not_fit_is_refused_before_it_is_made() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Tanh(), nn.Conv2d(64, 1, 3), nn.Flatten())
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.mse_loss)
    inputs = torch.zeros(1, 3, 100, 100)
    with pytest.raises(MemoryError, match=r"614656 x 614656 entries at .0., takes .* GiB.*pchvp"):
        hf.kronecker.hbp(loss, model)(params, (inputs, model(inputs).detach()))


def test_wrong_options() -> None:
    case = eight_rows()
    with pytest.raises(ValueError, match="residual='positive'"):
        hf.kronecker.hbp(case.loss, case.model, residual="positive")
    with pytest.raises(ValueError, match="max_blocks=0"):
        hf.kronecker.hbp(case.loss, case.model, max_blocks=0)
    with pytest.raises(TypeError, match="two halves"):
        hf.kronecker.hbp(lambda params, batch: 0.0, case.model)


def test_the_model_and_its_inputs_stay_as_they_are() -> None:
    case = net(
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), Residual(nn.Linear(5, 5))),
        4,
        examples=3,
    )
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    inputs = case.batch[0].clone()
    stream = torch.random.get_rng_state()
    hf.kronecker.hbp(case.loss, case.model)(case.params, case.batch)
    assert torch.equal(stream, torch.random.get_rng_state())
    assert torch.equal(inputs, case.batch[0])
    assert all(torch.equal(v, before[n]) for n, v in case.model.state_dict().items())
    assert all(p.grad is None for p in case.model.parameters())
    assert not case.model._forward_hooks


def _huber(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.huber_loss(outputs, targets, delta=0.3)


def _coupled(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum().sqrt()


CLASS = torch.tensor([1, 2, -100, 0])
SHARES = torch.tensor([[0.2, 0.3, 0.5]] * 4, dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)

LOSSES = {
    "ce": (F.cross_entropy, CLASS),
    "ce, sum, smoothed": (
        partial(F.cross_entropy, label_smoothing=0.2, reduction="sum", ignore_index=2),
        torch.tensor([1, 2, 0, 0]),
    ),
    "ce, weight": (nn.CrossEntropyLoss(weight=WEIGHT), CLASS),
    "ce, shares": (F.cross_entropy, SHARES),
    "mse": (F.mse_loss, SHARES),
    "mse, sum": (nn.MSELoss(reduction="sum"), SHARES),
    "bce": (F.binary_cross_entropy_with_logits, SHARES),
    "bce, weights": (
        partial(F.binary_cross_entropy_with_logits, pos_weight=2 * WEIGHT, weight=WEIGHT),
        SHARES,
    ),
    "huber": (_huber, SHARES),
    "coupled": (_coupled, SHARES),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    """A model that is linear in its parameters: the last bias sees the criterion's Hessian."""
    criterion, targets = LOSSES[name]
    case = net(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), 4, examples=4)
    loss = hf.supervised(hf.functional(case.model)[0], criterion)
    batch = (case.batch[0], targets)
    outputs = case.model(batch[0]).detach()
    whole = torch.func.hessian(lambda z: criterion(z, targets))(outputs)
    expected = sum(whole[b, :, b] for b in range(4))
    blocks = hf.kronecker.hbp(loss, case.model)(case.params, batch)
    torch.testing.assert_close(blocks["2.bias"].dense(), expected)
    for b in (0, 1, 3):
        one = (batch[0][b : b + 1], targets[b : b + 1])
        exact = exact_blocks(loss, case.params, one)
        assert (
            largest_error(dense(hf.kronecker.hbp(loss, case.model)(case.params, one)), exact) < 1e-9
        )


def test_losses_at_each_position() -> None:
    case = net(lambda: nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Conv1d(4, 3, 1)), 2, 4)
    exact = exact_blocks(case.loss, case.params, case.batch)
    assert (
        largest_error(
            dense(hf.kronecker.hbp(case.loss, case.model)(case.params, case.batch)), exact
        )
        < 1e-9
    )


def test_all_targets_ignored() -> None:
    case = LAYERS["linear"]
    with pytest.raises(ValueError, match="not all targets are ignored"):
        hf.kronecker.hbp(case.loss, case.model)(case.params, (case.batch[0], torch.tensor([-100])))


def test_batches_that_are_dicts() -> None:
    case = LAYERS["linear"]
    model_fn, params = hf.functional(case.model)
    loss = hf.composed(
        lambda params, batch: model_fn(params, {"input": batch["x"]}),
        F.cross_entropy,
        targets=lambda batch: batch["y"],
    )
    found = hf.kronecker.hbp(loss, case.model)(params, {"x": case.batch[0], "y": case.batch[1]})
    exact = hf.kronecker.hbp(case.loss, case.model)(params, case.batch)
    assert largest_error(dense(found), dense(exact)) < 1e-12


def test_single_precision() -> None:
    case = LAYERS["residual convolutions"]
    exact = exact_blocks(case.loss, case.params, case.batch)
    model = copy.deepcopy(case.model).float()
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    blocks = hf.kronecker.hbp(loss, model)(params, (case.batch[0].float(), case.batch[1]))
    found = {name: block.dense().double() for name, block in blocks.items()}
    assert largest_error(found, exact) < 1e-4


def test_the_module_may_be_in_train_mode_by_now() -> None:
    case = LAYERS["batchnorm2d"]
    model = copy.deepcopy(case.model)
    model_fn, params = hf.functional(model)
    loss = hf.supervised(model_fn, F.cross_entropy)
    before = dense(hf.kronecker.hbp(loss, model)(params, case.batch))
    model.train()
    assert largest_error(dense(hf.kronecker.hbp(loss, model)(params, case.batch)), before) < 1e-12
    assert not [name for name in vars(model) if "constant" in name]


def test_part_of_the_parameters() -> None:
    case = LAYERS["conv2d"]
    chosen, rest = hf.split(case.params, "3.*")
    part = hf.kronecker.hbp(hf.hold(case.loss, rest), case.model)(chosen, case.batch)
    whole = hf.kronecker.hbp(case.loss, case.model)(case.params, case.batch)
    assert list(part) == ["3.weight", "3.bias"]
    for name, block in part.items():
        torch.testing.assert_close(block.dense(), whole[name].dense())


def test_a_resnet_of_one_small_image() -> None:
    from hessfunc.app.problems.resnet import resnet

    case = net(lambda: resnet(20), 3, 4, 4)
    blocks = hf.kronecker.hbp(case.loss, case.model)(case.params, case.batch)
    for name in ("conv1.weight", "layer2.0.bn1.weight", "layer3.2.conv1.weight", "linear.bias"):
        chosen, rest = hf.split(case.params, [name])
        vector = hf.random_like(chosen, 2, seed=0, kind="normal")
        exact = hf.hvp(hf.hold(case.loss, rest))(chosen, case.batch)(vector)
        torch.testing.assert_close(
            blocks[name].matvec(vector[name]), exact[name], rtol=1e-7, atol=1e-12
        )


@pytest.mark.parametrize("target", [-1, 3])
def test_a_target_that_is_no_class_is_refused(target: int) -> None:
    """Without the second terms, nothing but the criterion looks at the targets."""
    case = net(lambda: nn.Linear(4, 3), 4, examples=2)
    batch = case.batch[0], torch.tensor([0, target])
    for curvature in (
        hf.kronecker.kfra(case.loss, case.model),
        hf.kronecker.hbp(case.loss, case.model, residual="zero"),
    ):
        with pytest.raises(ValueError, match=f"a target is the class {target}"):
            curvature(case.params, batch)


def test_the_mean_of_the_blocks_of_batches_is_solved_by_cg() -> None:
    case = net(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), 4, examples=7)
    batches = list(zip(*(part.split((3, 4)) for part in case.batch), strict=True))
    curvature = hf.kronecker.hbp(case.loss, case.model, residual="abs")
    mean = hf.over_batches(curvature, keep=True)(case.params, batches)
    b = hf.random_like(case.params, 2, seed=0)
    solution = hf.cg(mean, b, like=case.params, damping=0.1, rtol=1e-12)
    for name, leaf in case.params.items():
        matrix = sum(
            len(batch[0]) / 7 * curvature(case.params, batch)[name].dense() for batch in batches
        )
        damped = matrix + 0.1 * torch.eye(leaf.numel()).double()
        expected = torch.linalg.solve(damped, b[name].flatten(1).mT).mT
        torch.testing.assert_close(solution.x[name].flatten(1), expected, rtol=0, atol=1e-9)
