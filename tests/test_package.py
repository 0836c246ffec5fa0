"""What the wheel and the sdist hold."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import hessfunc as hf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hessfunc"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a wheel and an sdist, built from this checkout without a package index."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> dict[str, bytes]:
    """The files of the wheel."""
    with zipfile.ZipFile(dist / f"hessfunc-{hf.__version__}-py3-none-any.whl") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sdist(dist: Path) -> set[str]:
    """The names of the files of the sdist."""
    stem = f"hessfunc-{hf.__version__}"
    with tarfile.open(dist / f"{stem}.tar.gz") as archive:
        return {name.removeprefix(f"{stem}/") for name in archive.getnames()}


def test_the_wheel_holds_the_package_and_nothing_else(wheel: dict[str, bytes]) -> None:
    package = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert {name for name in wheel if ".dist-info/" not in name} == package
    assert {"hessfunc/py.typed", "hessfunc/__init__.pyi"} <= package


def test_the_wheel_says_what_it_is(wheel: dict[str, bytes]) -> None:
    info = f"hessfunc-{hf.__version__}.dist-info"
    metadata = message_from_bytes(wheel[f"{info}/METADATA"])
    required = metadata.get_all("Requires-Dist") or []
    plain = {line.split(">=")[0] for line in required if "extra ==" not in line}
    assert plain == {"torch", "numpy", "optree", "scipy"}
    assert metadata["Version"] == hf.__version__
    assert metadata["License-Expression"] == "MIT"
    assert wheel[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"hessfunc = hessfunc.app.cli:main" in wheel[f"{info}/entry_points.txt"]


def test_the_sdist_is_the_checkout(sdist: set[str]) -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a checkout of git")
    listed = subprocess.run(
        [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    assert sdist == {name for name in listed if (ROOT / name).is_file()} | {"PKG-INFO"}
