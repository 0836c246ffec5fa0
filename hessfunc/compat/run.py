"""Run an unmodified script for another library on the drop-in replacement.

    python -m hessfunc.compat.run SCRIPT [ARGUMENTS]

``pyhessian``, ``density_plot``, ``hessian_eigenthings``, ``hessianflow`` and ``curvlinops`` are
then names of the replacements, whether or not the originals are installed. Nothing else differs
from ``python SCRIPT [ARGUMENTS]``.
"""

from __future__ import annotations

import pkgutil
import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

REPLACED = {
    "pyhessian": "hessfunc.compat.pyhessian",
    "density_plot": "hessfunc.compat.pyhessian.density_plot",
    "hessian_eigenthings": "hessfunc.compat.eigenthings",
    "hessianflow": "hessfunc.compat.hessianflow",
    "curvlinops": "hessfunc.compat.curvlinops",
}
# Modules of the originals, of which the replacement has all names in its package.
_MODULES = {
    "hessianflow": ("optimizer", "optimizer.optm_utils", "optimizer.progressbar"),
    "curvlinops": (
        *("_torch_base", "hessian", "ggn", "fisher", "gradient_moments", "jacobian"),
        *("kfac", "kfac_utils", "ekfac", "inverse", "submatrix"),
        *("trace", "trace.hutchinson", "trace.meyer2020hutch", "trace.epperly2024xtrace"),
        *("diagonal", "diagonal.hutchinson", "diagonal.epperly2024xtrace"),
        *("norm", "norm.hutchinson", "papyan2020traces", "papyan2020traces.spectrum"),
    ),
}


def replace() -> None:
    """Make the drop-in replacements importable under the names of the originals.

    The names hold for the whole process. Modules of the originals that have already been imported
    stay in use where they were imported.
    """
    for name, replacement in REPLACED.items():
        module = import_module(replacement)
        sys.modules[name] = _copy(name, name) if name in _MODULES else module
        for part in pkgutil.iter_modules(getattr(module, "__path__", ())):
            own = import_module(f"{replacement}.{part.name}")
            sys.modules[f"{name}.{part.name}"] = own
            if name in _MODULES:
                setattr(sys.modules[name], part.name, own)
    for package, paths in _MODULES.items():
        for path in paths:
            above, _, name = f"{package}.{path}".rpartition(".")
            sys.modules[f"{above}.{name}"] = _copy(f"{above}.{name}", package)
            setattr(sys.modules[above], name, sys.modules[f"{above}.{name}"])


def _copy(name: str, package: str) -> ModuleType:
    """Return a module of another name with the names of the replacement of a package."""
    module = ModuleType(name)
    replacement = import_module(REPLACED[package])
    vars(module).update({each: getattr(replacement, each) for each in replacement.__all__})
    return module


def main(arguments: list[str]) -> int:
    """Run a script, and return the status to exit with.

    Args:
        arguments: Path of the script, and its own arguments.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    script = Path(arguments[0])
    if not script.is_file():
        print(f"hessfunc.compat.run: no script {str(script)!r}: pass its path", file=sys.stderr)
        return 2
    replace()
    sys.argv = arguments
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
