"""The Hessian at inner tensors, and where paths branch."""

import torch
from torch import Tensor

from hessfunc.kronecker.frontier import Frontier
from hessfunc.kronecker.propagate import Reached, backpropagated
from tests.kronecker.cases import eight_rows


def test_the_hessian_at_an_inner_tensor_reaches_the_callback() -> None:
    case = eight_rows()
    seen: list[Reached] = []
    curvature = backpropagated(
        case.loss,
        case.model,
        lambda reached: (
            seen.append(reached)
            or reached.dependence.block(
                reached.hessian, reached.slope, "none", average=True, max_blocks=None
            )
        ),
        residual="none",
        average_input_jacobian=True,
        average_parameter_jacobian=True,
    )
    curvature(case.params, case.batch)
    hidden = case.model[0](case.batch[0]).detach()
    at_hidden = torch.func.hessian(lambda z: case.loss.criterion(case.model[1:](z), case.batch))(
        hidden
    )
    torch.testing.assert_close(seen[-1].hessian, at_hidden.reshape(8, 8))
    share = torch.softmax(case.model(case.batch[0]).detach(), 1)[0]
    torch.testing.assert_close(seen[0].hessian, torch.diag(share) - torch.outer(share, share))


def test_paths_that_branch_and_meet_have_the_hessian_of_the_composed_function() -> None:
    """For z = [A x, B tanh(x)] by the chain rule along two paths from x."""
    generator = torch.Generator().manual_seed(0)
    A, B, C = (torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    C = C @ C.mT
    x = torch.randn(3, generator=generator, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        z = A @ x + B @ x.tanh()
        return z @ C @ z / 2

    frontier = Frontier(0, C)
    output = frontier.take(0)
    assert output is not None
    # Tensor 1 is A x, tensor 2 is B tanh(x), and the output 0 their sum.
    frontier.add([1, 2], [[output.own] * 2] * 2)
    slope = C @ (A @ x + B @ x.tanh())
    curved = torch.diag((B.mT @ slope) * torch.func.hessian(lambda t: t.tanh().sum())(x).diagonal())
    for number, jacobian in ((2, B * (1 - x.tanh().square())), (1, A)):
        row = frontier.take(number)
        assert row is not None
        own = jacobian.mT @ row.own @ jacobian
        frontier.add([3], [[own + curved if number == 2 else own]])
        for other, mixed in row.mixed.items():
            frontier.add_mixed(other, [3], [mixed @ jacobian])
    found = frontier.take(3)
    assert found is not None
    torch.testing.assert_close(found.own, torch.func.hessian(loss)(x))
    assert not found.mixed
    assert frontier.take(3) is None
