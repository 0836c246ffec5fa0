"""Names of factors, and the factors of weights with uses of both ways."""

import torch

from hessfunc.kronecker.forms import Form, both_ways, factor_keys


def test_parameters_with_the_same_outputs_share_their_output_factor() -> None:
    shape = torch.Size((2, 3))
    forms = {
        "weight": Form("kronecker", shape, site="weight"),
        "bias": Form("kronecker", shape[:1], site="weight"),
        "norm": Form("diagonal", shape),
    }
    assert factor_keys(forms) == {
        "weight": ("output factor of weight", "input factor of weight"),
        "bias": ("output factor of weight", "input factor of bias"),
    }


def test_factors_of_both_ways_that_are_proportional_add_up() -> None:
    """A weight W with B_1 (x) A_1, used again as W' with B_2 = A_1 and A_2 = 3 B_1."""
    B, A = (
        torch.diag(torch.tensor([1.0, 2.0]))[None],
        torch.diag(torch.tensor([1.0, 3.0, 4.0]))[None],
    )
    factors = {
        "output factor of w": B,
        "input factor of w": A,
        "output factor of w, transposed": A,
        "input factor of w, transposed": 3 * B,
    }
    made = both_ways(factors)
    assert made.keys() == {"output factor of w", "input factor of w"}
    product = torch.kron(made["output factor of w"][0], made["input factor of w"][0])
    torch.testing.assert_close(product, 4 * torch.kron(B[0], A[0]))
