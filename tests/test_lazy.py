"""A package that imports its names on first use."""

from __future__ import annotations

import importlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

import hessfunc as hf
from hessfunc.lazy import FamilyImporter, LazyPackage


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
    importer = FamilyImporter(made.__name__, made._FAMILIES)
    importer.install()
    yield made
    sys.meta_path.remove(importer)
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


def test_a_family_is_imported_by_its_public_name_without_a_second_module(package: Package) -> None:
    roots = importlib.import_module("lazy_package_of_a_test.roots")
    assert roots is sys.modules["lazy_package_of_a_test.numbers"]
    assert roots.__spec__ is not None
    assert roots.__spec__.name == "lazy_package_of_a_test.numbers"
    assert roots is package.roots
    assert importlib.reload(roots) is roots
    with pytest.raises(ModuleNotFoundError, match="No module named .*other'"):
        importlib.import_module("lazy_package_of_a_test.other")


@pytest.mark.parametrize("family", hf._FAMILIES)
def test_each_family_of_the_package_is_a_module(family: str) -> None:
    module = importlib.import_module(f"hessfunc.{family}")
    assert module is getattr(hf, family)
    assert module is importlib.import_module(f"hessfunc.{hf._FAMILIES[family]}")
    name = module.__all__[0]
    own: dict[str, object] = {}
    exec(f"from hessfunc.{family} import {name}", own)
    assert own[name] is getattr(module, name)
    assert pickle.loads(pickle.dumps(own[name])) is own[name]


@pytest.mark.parametrize("family", [f for f, home in hf._FAMILIES.items() if f != home])
def test_type_checkers_find_each_family_in_a_stub(family: str) -> None:
    stub = Path(hf.__file__).parent / f"{family}.pyi"
    assert stub.read_text().endswith(f"\n\nfrom hessfunc.{hf._FAMILIES[family]} import *\n")


def test_a_submodule_of_a_family_is_loaded_once() -> None:
    module = importlib.import_module("hessfunc.results.eigenpairs")
    assert module is importlib.import_module("hessfunc.algorithms.results.eigenpairs")
    assert module.Eigenpairs is hf.results.Eigenpairs


@pytest.mark.parametrize("family", ["", *(f".{family}" for family in hf._FAMILIES)])
def test_a_right_name_is_suggested_for_a_wrong_one(
    family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"hessfunc{family}")
    name = max(module.__all__, key=len)
    with pytest.raises(AttributeError, match=f"has no attribute '{name}x'") as caught:
        getattr(module, f"{name}x")
    sys.__excepthook__(caught.type, caught.value, None)
    assert f"Did you mean: '{name}'?" in capsys.readouterr().err
