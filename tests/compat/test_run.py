"""Scripts for other libraries, unmodified."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hessfunc.compat import curvlinops, eigenthings, hessianflow, pyhessian
from hessfunc.compat.run import REPLACED, main, replace

SCRIPT = """
import sys
import density_plot
import hessian_eigenthings
import pyhessian
import pyhessian.utils
import torch
from hessian_eigenthings.utils import progress_bar
from helper import criterion
from pyhessian import hessian
from pyhessian.hessian import hessian as same
from pyhessian.utils import *

assert same is hessian and __name__ == "__main__" and sys.argv[1:] == ["--rate", "3"]
x, y = torch.randn(20, 4), torch.randint(3, (20,))
model = torch.nn.Linear(4, 3)
top = hessian(model, criterion, data=(x, y), cuda=False).eigenvalues()[0][0]
other = hessian_eigenthings.compute_hessian_eigenthings(
    model.eval(), [(x, y)], criterion, 1, mode="lanczos", use_gpu=False
)[0][0]
assert abs(top - other) < 1e-3 * top, (top, other)
progress_bar(0, 1)
group_product([x], [x])
with open("out.txt", "w") as file:
    file.write(str(top))
"""


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    before = dict(sys.modules)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    yield
    for name in list(sys.modules):
        if name.partition(".")[0] in {*REPLACED, "helper"}:
            del sys.modules[name]
    sys.modules.update(before)


def test_a_script_runs_without_a_change(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    script = tmp_path / "code" / "script.py"
    script.write_text(SCRIPT)
    helper = "import torch\ncriterion = torch.nn.CrossEntropyLoss()\n"
    (tmp_path / "code" / "helper.py").write_text(helper)
    assert main([str(script), "--rate", "3"]) == 0
    assert float((tmp_path / "out.txt").read_text()) > 0


@pytest.mark.parametrize(
    ("statement", "module"),
    [
        ("from pyhessian import hessian_with_activation as found", pyhessian),
        ("from hessian_eigenthings.lanczos import lanczos as found", eigenthings),
        ("from hessian_eigenthings.hvp_operator import HVPOperator as found", eigenthings),
        ("from hessian_eigenthings.stochastic_lanczos import stochastic_lanczos as found", None),
        ("from density_plot import get_esd_plot as found", pyhessian),
        ("import hessianflow as hf; found = hf.get_eigen", hessianflow),
        ("import hessianflow.optimizer as hf_optm; found = hf_optm.absa", hessianflow),
        ("import hessianflow.optimizer.optm_utils as utils; found = utils.test", hessianflow),
        ("import hessianflow.optimizer.progressbar as bar; found = bar.progress_bar", hessianflow),
        ("from curvlinops import GGNLinearOperator as found", curvlinops),
        ("import curvlinops; found = curvlinops.kfac_utils.FisherType", curvlinops),
        ("import curvlinops.trace.hutchinson as t; found = t.hutchinson_trace", curvlinops),
        ("from curvlinops.inverse import KFACInverseLinearOperator as found", curvlinops),
        ("from curvlinops.examples import IdentityLinearOperator as found", None),
        ("import curvlinops; found = curvlinops.utils.allclose_report", None),
    ],
)
def test_names_of_the_originals_are_those_of_the_replacements(
    statement: str, module: ModuleType | None
) -> None:
    replace()
    space: dict[str, Any] = {}
    exec(statement, space)
    found = space["found"]
    assert found.__module__.startswith("hessfunc.compat.")
    if module is not None:
        assert getattr(module, found.__name__) is found


NATURAL_GRADIENT = """
from curvlinops import CGInverseLinearOperator, EKFACLinearOperator, FisherType, GGNLinearOperator
from curvlinops.examples import IdentityLinearOperator, gradient_and_loss
from curvlinops.utils import allclose_report
from scipy.sparse.linalg import eigsh
from torch import eye, float64, linalg, manual_seed, rand
from torch.nn import Linear, MSELoss, Sequential, Sigmoid
from torch.nn.utils import parameters_to_vector

manual_seed(0)
data = [(rand(16, 7, dtype=float64), rand(16, 3, dtype=float64)) for _ in range(2)]
model = Sequential(Linear(7, 5), Sigmoid(), Linear(5, 3)).to(float64)
params = [p for p in model.parameters() if p.requires_grad]
loss_function = MSELoss(reduction="mean")
GGN = GGNLinearOperator(model, loss_function, params, data)
delta = 1e-2
damped_GGN = GGN + delta * IdentityLinearOperator([p.shape for p in params], GGN.device, float64)
inverse = CGInverseLinearOperator(damped_GGN, eps=0, tolerance=1e-10, max_tridiag_iter=10)
gradient, _ = gradient_and_loss(model, loss_function, params, data)
gradient = parameters_to_vector(gradient).detach()
assert allclose_report(damped_GGN @ (inverse @ gradient), gradient, rtol=1e-6, atol=1e-8)
dense = damped_GGN @ eye(damped_GGN.shape[1], dtype=float64)
top = eigsh(damped_GGN.to_scipy(), k=1, which="LM", return_eigenvectors=False)
assert abs(top[0] - float(linalg.eigvalsh(dense)[-1])) < 1e-8
named = {n: p for n, p in model.named_parameters() if p.requires_grad}
ekfac = EKFACLinearOperator(model, loss_function, named, data, fisher_type=FisherType.TYPE2)
solution = ekfac.inverse(damping=1e-3) @ gradient
assert (ekfac @ solution + 1e-3 * solution).allclose(gradient, rtol=1e-6, atol=1e-10)
with open("out.txt", "w") as file:
    file.write(str(float(top[0])))
"""


def test_a_script_in_the_style_of_the_examples_of_curvlinops(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(NATURAL_GRADIENT)
    assert main(["script.py"]) == 0
    assert float((tmp_path / "out.txt").read_text()) > 0


SETUP = """
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(24, 4), torch.randint(3, (24,))
net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).eval()
loader = DataLoader(TensorDataset(x, y), batch_size=10, shuffle=True)
criterion = nn.CrossEntropyLoss()
params = [p for p in net.parameters() if p.requires_grad]


class Wraps(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net

    def forward(self, given):
        return self.net(given["x"]), given


def loss_of(flat):
    parts = flat.split([p.numel() for p in params])
    names = [name for name, _ in net.named_parameters()]
    state = {n: v.view_as(p) for n, v, p in zip(names, parts, params)}
    return criterion(torch.func.functional_call(net, state, (x,)), y)


flat = torch.cat([p.detach().flatten() for p in params])
top = float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss_of, flat))[-1])
"""
# Uses that the repositories of other people have, each with the largest eigenvalue as `found`.
USES = {
    "the loss along an eigenvector": """
from pyhessian import hessian
_, vectors = hessian(net, criterion, data=(x, y), cuda=False).eigenvalues(maxIter=200, tol=1e-5)
other = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double().eval()
values = []
for step in (-1e-3, 0.0, 1e-3):
    for p, q, d in zip(net.parameters(), other.parameters(), vectors[0]):
        q.data = p.data.double() + step * d
    values.append(criterion(other(x.double()), y).item())
found = (values[0] - 2 * values[1] + values[2]) / 1e-6
""",
    "mappings, and outputs in a tuple": """
from pyhessian import hessian
loss = lambda outputs, targets: F.cross_entropy(outputs[0], targets)
comp = hessian(Wraps(), loss, data=({"x": x.requires_grad_()}, y), cuda=torch.device("cpu"))
found = comp.eigenvalues(maxIter=200, tol=1e-5, top_n=1)[0][-1]
""",
    "power iteration of one's own": """
from pyhessian.utils import *
criterion(net(x), y).backward(create_graph=True)
params, gradsH = get_params_grad(net)
v = normalization([torch.randn_like(p) for p in params])
for _ in range(300):
    v = orthnormal(v, [])
    Hv = hessian_vector_product(gradsH, params, v)
    found = group_product(Hv, v).cpu().item()
    v = normalization(Hv)
""",
    "a density with its figure": """
from pyhessian import density_plot, hessian
nodes, weights = hessian(nn.DataParallel(net), criterion, None, loader, False).density(27, 1)
found = float(np.max(nodes))
density_plot.density_generate(np.array(nodes), np.array(weights), num_bins=100, overhead=0.01)
""",
    "an operator from its old home": """
from hessian_eigenthings.hvp_operator import HVPOperator
from hessian_eigenthings.power_iter import Operator, deflated_power_iteration
inner = HVPOperator(net, loader, criterion, use_gpu=False, max_samples=7)
class Own(Operator):
    def __init__(self):
        self.size = inner.size
    def apply(self, vec):
        return inner.apply(vec)
values, _ = deflated_power_iteration(Own(), 1, power_iter_steps=500, use_gpu=False)
found = values[0]
""",
    "arrays in a file": """
from hessian_eigenthings import compute_hessian_eigenthings
values, vectors = compute_hessian_eigenthings(
    net, loader, F.cross_entropy, 3, mode="lanczos", max_steps=50, full_dataset=True,
    max_samples=8, use_gpu=False,
)
np.savez("pairs.npz", values=values[-np.arange(1, 3)], vectors=torch.from_numpy(vectors))
found = np.load("pairs.npz")["values"][0]
""",
    "eigsh of SciPy": """
from curvlinops import HessianLinearOperator
from scipy.sparse.linalg import eigsh
H = HessianLinearOperator(net, criterion, params, loader, progressbar=True)
found = eigsh(H.to_scipy(), k=1, which="LA", return_eigenvectors=False)[0]
""",
}


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.filterwarnings("ignore:the model is in train mode")
@pytest.mark.parametrize("use", USES)
def test_uses_in_scripts_of_other_people(use: str, tmp_path: Path) -> None:
    check = "assert abs(found - top) < 1e-3 * top, (found, top)"
    (tmp_path / "script.py").write_text(SETUP + USES[use] + check)
    assert main(["script.py"]) == 0


def test_errors_of_the_script_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("raise KeyError('own')")
    with pytest.raises(KeyError, match="own"):
        main(["script.py"])


def test_a_missing_script_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.py"]) == 2
    assert "no script 'nowhere.py'" in capsys.readouterr().err
    assert main([]) == 2
    assert "SCRIPT [ARGUMENTS]" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "SCRIPT [ARGUMENTS]" in capsys.readouterr().out
