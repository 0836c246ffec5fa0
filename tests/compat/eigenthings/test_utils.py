"""Names of ``hessian_eigenthings.utils``, as scripts import them."""

from __future__ import annotations

import pytest
import torch

from hessfunc.compat.eigenthings.utils import log, maybe_fp16, progress_bar


def test_a_progress_bar_ends_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    for step in range(3):
        progress_bar(step, 3, "error 0.1")
    out = capsys.readouterr().out
    assert out.count("\r") == 3
    assert out.endswith("3/3 error 0.1\n")
    assert "1/3 error" in out


def test_a_log_names_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    log("done")
    assert capsys.readouterr().out == "[hessian_eigenthings] done\n"


@pytest.mark.parametrize(("fp16", "dtype"), [(True, torch.float16), (False, torch.float32)])
def test_vectors_are_rounded_as_asked(fp16: bool, dtype: torch.dtype) -> None:
    assert maybe_fp16(torch.ones(2, dtype=torch.float64), fp16).dtype == dtype
