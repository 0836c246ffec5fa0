"""Public names of the package and of its families."""

from __future__ import annotations

import inspect
from typing import Any

import hessfunc as hf

# Families whose functions are checked at the door; the others only draw or replace other libraries.
CHECKED = ("attached", "matvecs", "kronecker", "optim", "tracking", "compat")


def names() -> dict[str, Any]:
    """Return every public object by its name below ``hessfunc``."""
    found = {name: getattr(hf, name) for name in hf._HOMES}
    for family in hf._FAMILIES:
        module = getattr(hf, family)
        found |= {f"{family}.{name}": getattr(module, name) for name in module.__all__}
    return found


def functions() -> dict[str, Any]:
    """Return the public functions of the package and the checked families by their last name.

    Functions of `attached` are named like functions of the package, and keep their family.
    """
    return {
        name if name.startswith("attached.") else name.rpartition(".")[2]: value
        for name, value in names().items()
        if inspect.isfunction(value) and name.partition(".")[0] in (*CHECKED, name)
    }
