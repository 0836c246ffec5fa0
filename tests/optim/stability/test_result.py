from __future__ import annotations

from typing import Any

import pytest
import torch

import hessfunc as hf
from hessfunc.fingerprints import fingerprint
from hessfunc.optim import InfinityNorm, LargestNorm, Preconditioner, Stability

D = torch.float64


def test_the_matrix_contains_the_decay_between_the_roots_of_the_preconditioner() -> None:
    A = torch.randn(5, 5, dtype=D)
    A = A + A.mT
    p, decay = torch.rand(5, dtype=D) + 0.1, {"a": 2.0, "b": 0.5}
    W = torch.tensor([2.0, 2.0, 0.5, 0.5, 0.5], dtype=D)
    expected = (A + torch.diag(W)) / p.sqrt().outer(p.sqrt())
    like = {"a": torch.zeros(2, dtype=D), "b": torch.zeros(3, dtype=D)}
    plain = {"a": p[:2], "b": p[2:]}
    turned = {"a": Preconditioner(p[:2], (torch.eye(2, dtype=D),)), "b": p[2:]}
    for preconditioner in (plain, turned):
        stable = Stability(threshold=1.0, preconditioner=preconditioner, weight_decay=decay)
        block = hf.unravel(torch.eye(5, dtype=D), like)
        rows = stable.preconditioned(hf.dense(A))(block)
        torch.testing.assert_close(torch.cat([rows["a"], rows["b"]], dim=1), expected)


def test_the_matrix_is_recognised_by_its_checkpoint() -> None:
    matvec = hf.dense(torch.eye(3, dtype=D))
    turned = {"a": Preconditioner(torch.ones(3), (torch.eye(3),))}
    for options in ({}, {"weight_decay": {"a": 1.0}}, {"preconditioner": turned}):
        stable = Stability(threshold=1.0, **options)
        assert fingerprint(stable.preconditioned(matvec)) == fingerprint(matvec) != {}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 0.0}, ValueError, "threshold=0.0: it must be positive"),
        ({"threshold": float("inf")}, ValueError, "threshold=inf: it must be positive and finite"),
        ({"preconditioner": {"a": torch.zeros(2)}}, ValueError, "'a' has an entry that is not"),
        ({"preconditioner": {"a": 1.0}}, TypeError, r"preconditioner\['a'\] must be a tensor"),
        ({"preconditioner": torch.ones(2)}, TypeError, "must be a dict, not a tensor of shape"),
        (
            {"preconditioner": {"a": torch.ones(2)}, "norm": LargestNorm({"a": InfinityNorm()})},
            ValueError,
            "pass one of them",
        ),
    ],
)
def test_what_is_no_limit_is_refused(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Stability(**({"threshold": 1.0} | options))
