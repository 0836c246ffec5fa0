"""Blocks of a layer: split into rows, and with a replaced residual."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

import hessfunc as hf
from tests.cases import Residual
from tests.kronecker.cases import dense, eight_rows, largest_error, net
from tests.reference.backpropagation import exact_blocks


@pytest.mark.parametrize(("at_most", "expected"), [(3, 3), (5, 4), (10, 8), (1, 1)])
def test_split_rows_are_the_diagonal_parts(at_most: int, expected: int) -> None:
    case = eight_rows()
    blocks = hf.kronecker.hbp(case.loss, case.model, max_blocks=at_most)(case.params, case.batch)
    exact = exact_blocks(case.loss, case.params, case.batch)
    for name in ("0.weight", "0.bias"):
        parts = blocks[name].parts
        assert len(parts) == expected
        start = 0
        for part in parts:
            rows = slice(start, start + part.n)
            torch.testing.assert_close(part.dense(), exact[name][rows, rows])
            start += part.n
        assert start == blocks[name].n
        torch.testing.assert_close(
            dense(blocks)[name], torch.block_diag(*(part.dense() for part in parts))
        )


def test_one_block_is_the_whole_layer() -> None:
    case = eight_rows(examples=5)
    whole = hf.kronecker.hbp(case.loss, case.model)(case.params, case.batch)
    one = hf.kronecker.hbp(case.loss, case.model, max_blocks=1)(case.params, case.batch)
    assert largest_error(dense(one), dense(whole)) < 1e-12


AVERAGES = list(product([True, False], repeat=2))
MODES = ("none", "zero", "clip", "abs")


def residual_net() -> nn.Module:
    inner = nn.Sequential(nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 5), nn.Tanh())
    return nn.Sequential(nn.Linear(4, 5), Residual(inner), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("averages", AVERAGES)
@pytest.mark.parametrize("seed", range(5))
def test_replaced_residuals_are_positive_semi_definite(
    seed: int, averages: tuple[bool, bool]
) -> None:
    case = net(residual_net, 4, examples=7, seed=seed)
    for residual in ("zero", "clip", "abs"):
        blocks = hf.kronecker.hbp(
            case.loss,
            case.model,
            residual=residual,
            average_input_jacobian=averages[0],
            average_parameter_jacobian=averages[1],
        )(case.params, case.batch)
        for block in blocks.values():
            values = torch.linalg.eigvalsh(block.dense())
            assert float(values.min()) >= -1e-12 * float(values.max())


def test_the_kept_residual_may_be_negative() -> None:
    found = [
        float(torch.linalg.eigvalsh(block.dense()).min())
        for seed in range(5)
        for case in [net(residual_net, 4, examples=7, seed=seed)]
        for block in hf.kronecker.hbp(case.loss, case.model)(case.params, case.batch).values()
    ]
    assert min(found) < -1e-6


def by_mode(activation: type[nn.Module]) -> list[dict[str, Tensor]]:
    case = net(
        lambda: nn.Sequential(
            nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3)
        ),
        4,
        examples=6,
    )
    return [
        dense(hf.kronecker.hbp(case.loss, case.model, residual=mode)(case.params, case.batch))
        for mode in MODES
    ]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.Hardtanh])
def test_piecewise_linear_nets_have_no_residual(activation: type[nn.Module]) -> None:
    first, *others = by_mode(activation)
    for other in others:
        assert largest_error(other, first) < 1e-12


def test_sigmoid_nets_have_one() -> None:
    found = by_mode(nn.Sigmoid)
    for i, one in enumerate(found):
        for other in found[:i]:
            assert float((one["0.weight"] - other["0.weight"]).abs().max()) > 1e-6
