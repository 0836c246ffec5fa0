"""The directory in which commands run."""

import sys
from pathlib import Path

import pytest

# The Hessian of x'Dx / 2 is D, on every batch.
QUADRATIC = """
import signal
from pathlib import Path
import torch

D = torch.tensor([5.0, 3.0, 1.0, 0.5, -2.0, 0.0])

def loss(params, batch):
    return (params["x"].square() * D).sum() / 2 + 0 * batch.sum()

def quadratic():
    return loss, {"x": torch.ones(6)}, [torch.zeros(3, 1), torch.zeros(1, 1)]

def interrupted():
    def until_ctrl_c(params, batch):
        if Path("hessfunc-out/smallest.npz").exists():
            signal.raise_signal(signal.SIGINT)
        return loss(params, batch)
    return until_ctrl_c, {"x": torch.ones(6)}, [torch.zeros(3, 1)]

def breaking():
    def until_broken(params, batch):
        return params["y"]
    return until_broken, {"x": torch.ones(6)}, [torch.zeros(3, 1)]

def number():
    return 3

def net():
    torch.manual_seed(0)
    batch = torch.randn(6, 3), torch.randint(2, (6,))
    return torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy, [batch]
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: an empty one, with the module above in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.delenv("HESSFUNC_DATA", raising=False)
    (tmp_path / "mine.py").write_text(QUADRATIC)
    return tmp_path
