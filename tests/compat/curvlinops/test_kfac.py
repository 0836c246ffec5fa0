"""KFAC and EKFAC against dense references, their inverses, and the factors that others read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessfunc.compat.curvlinops import (
    EKFACLinearOperator,
    FisherType,
    GGNLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
    KFACType,
)
from tests.compat.curvlinops.problem import (
    LOSSES,
    batches,
    dense_ggn,
    matrix,
    net,
    parameters,
    whole,
)
from tests.reference import jacobian, relative_error

CE = LOSSES["CrossEntropyLoss mean"]


def factors(loss: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors B and A of both layers, by the Jacobians of the outputs of the layers."""
    model, (x, y) = net(), whole(batches(loss))
    hidden = model[0](x).detach()
    inner = torch.tanh(hidden)
    outputs = model[2](inner).detach()
    H = dense_of_outputs(loss, outputs, y)
    J = jacobian(lambda z: model[2](torch.tanh(z)), hidden)
    made = {}
    for name, inputs, to_outputs in (
        ("0", x, J),
        ("2", inner, torch.eye(outputs.numel()).double()),
    ):
        B = to_outputs.mT @ H @ to_outputs
        width = B.shape[0] // len(x)
        blocks = [B[i : i + width, i : i + width] for i in range(0, len(B), width)]
        made[name] = (torch.stack(blocks).sum(0), inputs.mT.detach() @ inputs.detach() / len(x))
    return made


def dense_of_outputs(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    count = outputs.numel()
    hessian = torch.autograd.functional.hessian(lambda f: loss(f, targets), outputs)
    return hessian.reshape(count, count)


def dense_kfac(loss: Any) -> Tensor:
    parts = []
    for B, A in factors(loss).values():
        parts += [torch.kron(B, A), B]
    return torch.block_diag(*parts)


@pytest.mark.parametrize("name", LOSSES)
def test_exact_factors_of_uneven_batches_are_those_of_all_examples(name: str) -> None:
    loss = LOSSES[name]
    model, data = net(), batches(loss)
    K = KFACLinearOperator(model, loss, list(model.parameters()), data, fisher_type="type-2")
    torch.testing.assert_close(matrix(K), dense_kfac(loss))


@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
def test_factors_of_drawn_targets_are_near_the_exact_ones(kind: Any) -> None:
    model, data = net(), batches(CE)
    params = list(model.parameters())
    exact = matrix(kind(model, CE, params, data, fisher_type="type-2"))
    drawn = [matrix(kind(model, CE, params, data, mc_samples=n, seed=1)) for n in (1, 150)]
    assert relative_error(drawn[1], exact) < 0.2 < relative_error(drawn[0], exact)


@pytest.mark.parametrize("kind", ["list", "reversed", "subset", "dict"])
def test_each_kind_of_parameters(kind: str) -> None:
    model = net()
    given, values = parameters(model, kind)
    K = KFACLinearOperator(model, CE, given, batches(CE), fisher_type=FisherType.TYPE2)
    names = list(dict(model.named_parameters()))
    sizes = [p.numel() for p in model.parameters()]
    chosen = [
        i
        for name in values
        for i in torch.arange(sum(sizes)).split(sizes)[names.index(name)].tolist()
    ]
    torch.testing.assert_close(matrix(K), dense_kfac(CE)[chosen][:, chosen])


def test_factors_by_module_are_those_that_laplace_torch_reads() -> None:
    model = net()
    K = KFACLinearOperator(model, CE, list(model.parameters()), batches(CE), fisher_type="type-2")
    K.compute_kronecker_factors()
    assert K._mapping == {"0": {"weight": 0, "bias": 1}, "2": {"weight": 2, "bias": 3}}
    for name, (B, A) in factors(CE).items():
        torch.testing.assert_close(K._gradient_covariances[name], B)
        torch.testing.assert_close(K._input_covariances[name], A)
    biases = [model[0].bias]
    only = KFACLinearOperator(model, CE, biases, batches(CE), fisher_type="type-2")
    assert not only._input_covariances
    torch.testing.assert_close(matrix(only), factors(CE)["0"][0])


def test_factors_are_those_of_the_first_use_until_they_are_computed_again() -> None:
    model = net()
    K = KFACLinearOperator(model, CE, list(model.parameters()), batches(CE), fisher_type="type-2")
    first = matrix(K)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert torch.equal(matrix(K), first)
    K.compute_kronecker_factors()
    assert relative_error(matrix(K), first) > 0.1


@pytest.mark.parametrize("name", ["CrossEntropyLoss mean", "MSELoss sum"])
def test_identities_and_num_data(name: str) -> None:
    loss = LOSSES[name]
    model, data = net(), batches(loss)
    params = list(model.parameters())
    K = KFACLinearOperator(model, loss, params, data, fisher_type="forward-only")
    parts = []
    for B, A in factors(loss).values():
        parts += [torch.kron(torch.eye(len(B)).double(), A), torch.eye(len(B)).double()]
    torch.testing.assert_close(matrix(K), torch.block_diag(*parts))
    half = KFACLinearOperator(model, loss, params, data, fisher_type="type-2", num_data=14)
    mean = loss.reduction == "mean"
    for module, (B, A) in factors(loss).items():
        torch.testing.assert_close(half._input_covariances[module], A / 2)
        torch.testing.assert_close(half._gradient_covariances[module], B / 2 if mean else B)


def test_numbers_are_properties_and_methods() -> None:
    model = net()
    params = [model[0].bias, model[2].weight]
    for kind in (KFACLinearOperator, EKFACLinearOperator):
        K = kind(model, LOSSES["MSELoss mean"], params, batches(LOSSES["MSELoss mean"]))
        dense = matrix(kind(model, LOSSES["MSELoss mean"], params, batches(LOSSES["MSELoss mean"])))
        for number, expected in (
            (K.trace, dense.trace()),
            (K.frobenius_norm, dense.norm()),
            (K.det, dense.det()),
            (K.logdet, dense.logdet()),
        ):
            torch.testing.assert_close(number(), expected)
            assert float(number) == float(number())
    singular = KFACLinearOperator(model, CE, params, batches(CE), fisher_type="type-2")
    assert float(singular.logdet) == -torch.inf or float(singular.logdet) < -30
    assert float(singular.det) < 1e-13


def test_ekfac_has_the_diagonal_of_the_gauss_newton_matrix_in_its_basis() -> None:
    model, data = net(), batches(CE)
    params = list(model.parameters())
    E = matrix(EKFACLinearOperator(model, CE, params, data, fisher_type="type-2"))
    values = {name: p.detach() for name, p in model.named_parameters()}
    exact = dense_ggn(model, CE, values, whole(data))
    start = 0
    for p, (B, A) in zip(params, [f for f in factors(CE).values() for _ in range(2)], strict=True):
        left = torch.linalg.eigh(B).eigenvectors
        right = torch.linalg.eigh(A).eigenvectors if p.dim() > 1 else torch.eye(1).double()
        basis = torch.kron(left, right)
        block = slice(start, start + p.numel())
        start += p.numel()
        expected = (basis.mT @ exact[block, block] @ basis).diagonal()
        torch.testing.assert_close(E[block, block], (basis * expected) @ basis.mT)
    assert relative_error(E.trace(), exact.trace()) < 1e-10


@pytest.mark.parametrize("kind", [KFACLinearOperator, EKFACLinearOperator])
def test_exact_damping_inverts_the_damped_matrix(kind: Any) -> None:
    model = net()
    K = kind(model, CE, list(model.parameters()), batches(CE), fisher_type="type-2")
    expected = torch.linalg.inv(matrix(K) + 0.1 * torch.eye(31).double())
    for inverse in (
        K.inverse(damping=0.1, use_exact_damping=True),
        KFACInverseLinearOperator(K, damping=0.1, use_exact_damping=True),
    ):
        torch.testing.assert_close(matrix(inverse), expected)
        assert inverse.T is inverse
    vector = [torch.ones_like(p) for p in model.parameters()]
    assert [p.shape for p in inverse @ vector] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("damping", ["both", "pair", "heuristic"])
def test_factors_are_damped_by_themselves(damping: str) -> None:
    model = net()
    K = KFACLinearOperator(model, CE, list(model.parameters()), batches(CE), fisher_type="type-2")
    options: dict[str, Any] = {
        "both": {"damping": 0.1},
        "pair": {"damping": (0.1, 0.3)},
        "heuristic": {"damping": 0.1, "use_heuristic_damping": True},
    }[damping]
    parts = []
    for B, A in factors(CE).values():
        pi = float((A.trace() / len(A) / (B.trace() / len(B))).sqrt())
        a, b = {
            "both": (0.1, 0.1),
            "pair": (0.1, 0.3),
            "heuristic": (pi * 0.1**0.5, 0.1**0.5 / pi),
        }[damping]
        eye = torch.eye(len(B)).double()
        inverse = torch.linalg.inv(B + b * eye)
        parts.append(torch.kron(inverse, torch.linalg.inv(A + a * torch.eye(len(A)).double())))
        parts.append(inverse)
    torch.testing.assert_close(matrix(K.inverse(**options)), torch.block_diag(*parts))
    # Without its weight, a bias has the damping of the option.
    B = factors(CE)["0"][0]
    alone = KFACLinearOperator(model, CE, [model[0].bias], batches(CE), fisher_type="type-2")
    b = 0.3 if damping == "pair" else 0.1
    expected = torch.linalg.inv(B + b * torch.eye(len(B)).double())
    torch.testing.assert_close(matrix(alone.inverse(**options)), expected)


def test_positions_are_examples_or_averaged() -> None:
    loss = LOSSES["MSELoss mean"]
    model, data = nn.Linear(3, 3).double(), batches(loss, positions=2)
    ggn = GGNLinearOperator(model, loss, list(model.parameters()), data)
    weight = slice(0, 9)
    K = KFACLinearOperator(model, loss, list(model.parameters()), data, fisher_type="type-2")
    # A linear model with a constant output Hessian has an exact factorisation.
    torch.testing.assert_close(matrix(K)[weight, weight], matrix(ggn)[weight, weight])
    for approx in ("reduce", KFACType.REDUCE):
        R = KFACLinearOperator(
            model, loss, list(model.parameters()), data, fisher_type="type-2", kfac_approx=approx
        )
        x = whole(data)[0].mean(1)
        torch.testing.assert_close(R._input_covariances[""], x.mT @ x / 7)


@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
def test_weights_and_biases_have_joint_blocks(fisher: str) -> None:
    """The joint block is the Kronecker product of the output factor and that of inputs (x, 1)."""
    model = net()
    K = KFACLinearOperator(
        model,
        CE,
        list(model.parameters()),
        batches(CE),
        fisher_type=fisher,
        separate_weight_and_bias=False,
    )
    apart = KFACLinearOperator(model, CE, list(model.parameters()), batches(CE), fisher_type=fisher)
    x = whole(batches(CE))[0]
    hidden = torch.tanh(model[0](x)).detach()
    parts, inverses = [], []
    for name, inputs in (("0", x), ("2", hidden)):
        joint = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
        A, B = joint.mT @ joint / len(x), apart._gradient_covariances[name]
        torch.testing.assert_close(K._input_covariances[name], A)
        # From the order (output, input and 1) to the weight, then the bias.
        rows = torch.arange(B.shape[0] * A.shape[0]).view(B.shape[0], A.shape[0])
        order = torch.cat([rows[:, :-1].flatten(), rows[:, -1]])
        eyes = [torch.eye(len(factor)).double() for factor in (A, B)]
        inverse = [torch.linalg.inv(f + 0.1 * eye) for f, eye in zip((A, B), eyes, strict=True)]
        parts.append(torch.kron(B, A)[order][:, order])
        inverses.append(torch.kron(inverse[1], inverse[0])[order][:, order])
    torch.testing.assert_close(matrix(K), torch.block_diag(*parts))
    torch.testing.assert_close(matrix(K.inverse(damping=0.1)), torch.block_diag(*inverses))


def test_wrong_options_are_named() -> None:
    model, data = net(), batches(CE)
    params = list(model.parameters())
    for options, error, message in (
        ({"fisher_type": "exact"}, ValueError, "fisher_type='exact': choose one of 'type-2'"),
        ({"kfac_approx": "sum"}, ValueError, "choose one of 'expand', 'reduce'"),
        ({"fisher_type": "type-2", "mc_samples": 2}, ValueError, "mc_samples=2"),
    ):
        with pytest.raises(error, match=message):
            KFACLinearOperator(model, CE, params, data, **options)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="pass a module"):
        KFACLinearOperator(lambda p, x: x, CE, dict(model.named_parameters()), data)  # type: ignore[arg-type]
    K = KFACLinearOperator(model, CE, params, data)
    for options, message in (
        ({"use_heuristic_damping": True, "use_exact_damping": True}, "exclude each other"),
        ({"damping": (0.1, 0.1), "use_exact_damping": True}, "need one number"),
    ):
        with pytest.raises(ValueError, match=message):
            K.inverse(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exact damping only"):
        KFACInverseLinearOperator(EKFACLinearOperator(model, CE, params, data), 0.1)
    with pytest.raises(ValueError, match="not a KFACLinearOperator"):
        KFACInverseLinearOperator(GGNLinearOperator(model, CE, params, data))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="larger damping"):
        matrix(KFACLinearOperator(model, CE, params, data, fisher_type="type-2").inverse())
