"""Every Python block of the tutorials runs, in order, one script a tutorial."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.datapath import DATA, data_file

TUTORIALS = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))


@pytest.mark.slow
@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(tutorial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    text = tutorial.read_text()
    if "HESSFUNC_DATA" in text:
        data_file("resnet20_cifar10/resnet20-12fca82f.th")
        monkeypatch.setenv("HESSFUNC_DATA", str(DATA))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, str(tutorial), "exec"), names)
