"""A package that imports its names on first use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import ClassVar

import pytest

from hessfunc.lazy import LazyPackage


class Package(LazyPackage):
    _HOMES: ClassVar[dict[str, str]] = {"sqrt": "numbers", "missing": "numbers"}
    _FAMILIES: ClassVar[dict[str, str]] = {"roots": "numbers"}


@pytest.fixture
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Package]:
    folder = tmp_path_factory.mktemp("lazy")
    (folder / "numbers.py").write_text("from math import sqrt\n")
    made = Package("lazy_package_of_a_test")
    made.__path__ = [str(folder)]
    sys.modules[made.__name__] = made
    yield made
    for name in [name for name in sys.modules if name.startswith(made.__name__)]:
        del sys.modules[name]


def test_a_submodule_is_imported_when_a_name_of_it_is_read(package: Package) -> None:
    submodule = "lazy_package_of_a_test.numbers"
    assert submodule not in sys.modules
    assert {"sqrt", "roots"} <= set(dir(package))
    assert submodule not in sys.modules
    assert package.sqrt(9.0) == 3.0
    assert package.roots is sys.modules[submodule]
    # The name is kept, so that later reads are those of a plain attribute.
    assert vars(package)["sqrt"] is package.sqrt


def test_other_names_are_missing(package: Package) -> None:
    with pytest.raises(AttributeError, match="'lazy_package_of_a_test' has no attribute 'cbrt'"):
        _ = package.cbrt
    with pytest.raises(AttributeError, match="missing"):
        _ = package.missing
