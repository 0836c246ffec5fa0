"""Gauss-Newton and Fisher matrices of a linear head, against those of whole logits."""

from typing import Any

import pytest
import torch

import hessfunc as hf
from tests.cases import randn
from tests.graphs import allocated
from tests.reference import matrix, relative_error
from tests.test_linear_head import BATCH, PARAMS, states


def curvatures() -> dict[str, Any]:
    return {
        "ggnvp": hf.ggnvp,
        "fvp": hf.fvp,
        "fvp of draws": lambda loss, **options: hf.fvp(loss, samples=2, seed=1, **options),
        "efvp": hf.efvp,
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "bounded": {"softcap": 1.5},
    "scaled sum": {"scale": 0.3, "reduction": "sum"},
}


def with_ignored() -> Any:
    x, y = BATCH
    return torch.cat([x, x[:1]]), torch.cat(
        [torch.where(torch.arange(5) == 1, -100, y), torch.full((1, 5), -100)]
    )


@pytest.mark.parametrize("moving", [list(PARAMS), ["0.weight", "bias"], ["weight", "bias"]])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", curvatures())
def test_matrices_are_those_of_whole_logits(name: str, options: str, moving: list[str]) -> None:
    loss = hf.linear_head_loss(states, lambda b: b[1], rows_per_chunk=4, **OPTIONS[options])
    whole = hf.Loss(loss.outputs, loss.criterion)
    fixed = {k: v for k, v in PARAMS.items() if k not in moving}
    params = {k: v for k, v in PARAMS.items() if k in moving}
    batch, curvature = with_ignored(), curvatures()[name]
    due = matrix(curvature(hf.hold(whole, fixed))(params, batch), params)
    for chunk in (1, None):
        made = curvature(hf.hold(loss, fixed), chunk_size=chunk)(params, batch)
        assert relative_error(matrix(made, params), due) < 1e-12
    attached = curvature(hf.hold(loss, fixed), differentiable=True)(params, batch)
    assert relative_error(matrix(attached, params).detach(), due) < 1e-12


def test_a_loss_without_parameters_is_refused() -> None:
    loss = hf.linear_head_loss(
        lambda p, b: tuple(x.detach() for x in states(PARAMS, b)), lambda b: b[1]
    )
    with pytest.raises(ValueError, match="does not depend on params"):
        hf.ggnvp(loss)(PARAMS, BATCH)


def test_logits_are_never_whole() -> None:
    rows, classes = 600, 4096
    params = {"h": randn(rows, 4).float(), "w": randn(classes, 4).float()}
    targets = torch.zeros(rows, dtype=torch.long)
    loss = hf.linear_head_loss(lambda p, _: (p["h"], p["w"], None), lambda y: y, rows_per_chunk=50)
    whole = hf.Loss(loss.outputs, loss.criterion)
    block = {k: v[None] for k, v in params.items()}

    def peak(loss: Any, curvature: Any) -> float:
        return allocated(lambda: curvature(loss)(params, targets)(block)).peak

    for curvature in (hf.ggnvp, hf.efvp):
        assert peak(loss, curvature) < peak(whole, curvature) / 3
