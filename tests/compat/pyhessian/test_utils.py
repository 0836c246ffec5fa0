"""Names of ``pyhessian.utils`` and of other modules, as scripts import them."""

from __future__ import annotations

from importlib import import_module

import pytest

from hessfunc.compat import pyhessian as face


def test_everything_is_imported_by_a_star() -> None:
    space: dict[str, object] = {}
    exec("from hessfunc.compat.pyhessian.utils import *", space)
    names = "group_product group_add normalization orthnormal get_params_grad"
    for name in [*names.split(), "hessian_vector_product"]:
        assert space[name] is getattr(face, name)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("hessian", "hessian"),
        ("hessian_with_activation", "hessian_with_activation"),
        ("density_plot", "get_esd_plot"),
        ("density_plot", "density_generate"),
    ],
)
def test_modules_have_the_names_of_the_original(module: str, name: str) -> None:
    found = import_module(f"hessfunc.compat.pyhessian.{module}")
    assert getattr(found, name) is getattr(face, name)
