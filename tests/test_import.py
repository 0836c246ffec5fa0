"""What `import hessfunc` makes of the package: all names, and no module before one is asked for."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hessfunc as hf

STUB = Path(hf.__file__).with_suffix(".pyi")


def fresh(code: str) -> Any:
    """What this code prints in an interpreter of its own, read as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_import_loads_no_module_of_the_package_and_not_torch() -> None:
    loaded = fresh("import hessfunc, json, sys; print(json.dumps(list(sys.modules)))")
    assert [name for name in loaded if name.startswith("hessfunc.")] == ["hessfunc.lazy"]
    assert not {"torch", "optree", "numpy"} & set(loaded)


def test_what_is_seldom_used_is_not_loaded_with_a_hessian_and_its_eigenvalues() -> None:
    code = "import hessfunc as hf, json, sys; hf.hvp, hf.lanczos; print(json.dumps([*sys.modules]))"
    packages = ("app", "compat", "kronecker", "optim", "plot", "recipes", "tracking", "training")
    seldom = tuple(f"hessfunc.{package}" for package in packages)
    assert not [name for name in fresh(code) if name.startswith((*seldom, "matplotlib"))]


def test_the_first_products_load_few_modules_besides_those_of_torch() -> None:
    code = (
        "import json, sys, torch; before = set(sys.modules)\n"
        "import hessfunc as hf; hf.hvp, hf.lanczos\n"
        "print(json.dumps([name for name in sys.modules if name not in before]))"
    )
    loaded = fresh(code)
    assert len(loaded) < 180
    assert not {name.partition(".")[0] for name in loaded} & {
        *("scipy", "pandas", "matplotlib", "rich", "typer", "sklearn", "tensorboard")
    }


def test_type_checkers_see_the_same_names_at_the_same_places() -> None:
    imports = [
        node for node in ast.parse(STUB.read_text()).body if isinstance(node, ast.ImportFrom)
    ]
    typed = {alias.asname: node.module for node in imports for alias in node.names}
    expected = {name: f"hessfunc.{home}" for name, home in hf._HOMES.items()}
    for name, home in hf._FAMILIES.items():
        expected[name] = ".".join(["hessfunc", *home.split(".")[:-1]])
    assert typed == expected


def test_every_public_name_is_there() -> None:
    star: dict[str, Any] = {}
    exec("from hessfunc import *", star)
    for name in hf.__all__:
        assert star[name] is getattr(hf, name)
        assert name in dir(hf)
    assert {"__version__", "__doc__"} <= set(dir(hf))
    assert len(set(hf.__all__)) == len(hf.__all__)


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'hessfunc' has no attribute 'hessian'"):
        _ = hf.hessian
    with pytest.raises(ImportError, match="cannot import name 'hessian'"):
        exec("from hessfunc import hessian")


def test_a_function_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "hvp", "another")
    assert hf.hvp == "another"
    monkeypatch.undo()
    assert callable(hf.hvp)


@pytest.mark.slow
def test_the_import_takes_a_small_part_of_that_of_torch() -> None:
    code = (
        "import json, time\n"
        "def taken(line):\n"
        "    start = time.process_time(); exec(line); return time.process_time() - start\n"
        "torch, package = taken('import torch'), taken('import hessfunc')\n"
        "products = taken('import hessfunc as hf; hf.hvp, hf.lanczos')\n"
        "print(json.dumps([package / torch, products / torch]))"
    )
    # Load on the machine adds to the time of single imports.
    shares = [fresh(code) for _ in range(3)]
    assert min(share for share, _ in shares) < 0.01
    assert min(share for _, share in shares) < 0.3
