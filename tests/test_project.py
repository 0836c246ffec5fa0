"""What the project says of itself in several places is the same in all of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hessfunc as hf

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]

SCHEMATA = [
    *((path, "github-workflows") for path in WORKFLOWS),
    *((FORMS / f"{form}.yml", "github-issue-forms") for form in ("bug", "feature")),
    (FORMS / "config.yml", "github-issue-config"),
    (ROOT / "CITATION.cff", "citation-file-format"),
]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def made(text: str) -> set[str]:
    """The targets of the lines that run make."""
    return set(re.findall(r"^\W*(?:run: )?make ([a-z-]+)", text, re.MULTILINE))


def brought(extra: str) -> Iterator[Requirement]:
    """What an extra brings, by itself and by the extras that it names."""
    for found in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if found.name == PROJECT["name"]:
            for other in found.extras:
                yield from brought(other)
        else:
            yield found


def files() -> Iterator[tuple[Path, str]]:
    """Every text of the project, by its path from the root."""
    folders = ("hessfunc", "tests", "bench", "docs", "examples", ".ci", ".github")
    nested = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    for path in [*nested, *ROOT.glob("[!.]*")]:
        relative = path.relative_to(ROOT)
        made_here = relative.is_relative_to("bench/results") or path.parent.name == "__pycache__"
        if path.is_file() and not made_here:
            yield relative, path.read_text(errors="ignore")


# The version


def test_the_version_is_semantic_and_stands_in_the_package() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", hf.__version__)
    assert "version" in PROJECT["dynamic"]


def test_the_newest_release_of_the_changelog_is_that_of_the_citation() -> None:
    version, date = re.findall(
        r"^## \[(\d.*)\] - (\d{4}-\d\d-\d\d)$", read("CHANGELOG.md"), re.MULTILINE
    )[0]
    citation = yaml.safe_load(read("CITATION.cff"))
    assert (citation["version"], str(citation["date-released"])) == (version, date)
    assert version == hf.__version__


def test_the_citation_says_what_the_package_says() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    assert citation["keywords"] == PROJECT["keywords"]


# The packages


def test_the_conda_recipe_says_what_the_package_says() -> None:
    recipe = yaml.safe_load(read("conda/recipe.yaml"))
    assert recipe["context"]["version"] == hf.__version__
    about = recipe["about"]
    assert (about["summary"], about["license"]) == (PROJECT["description"], PROJECT["license"])
    assert (ROOT / "conda" / recipe["source"]["path"] / about["license_file"]).is_file()
    (entry,) = recipe["build"]["python"]["entry_points"]
    assert entry == f"hessfunc = {PROJECT['scripts']['hessfunc']}"
    # Two packages have another name there.
    names = {"torch": "pytorch", "matplotlib": "matplotlib-base"}

    def required(lines: list[str]) -> set[str]:
        found = [Requirement(line.replace(" ", "")) for line in lines]
        return {f"{names.get(one.name, one.name)} {one.specifier}" for one in found}

    needs = recipe["requirements"]
    python = f"python {PROJECT['requires-python']}"
    assert set(needs["run"]) == {python, *required(PROJECT["dependencies"])}
    assert python in needs["host"]
    extras = {str(one) for one in brought("all")}
    assert set(needs["run_constraints"]) == required(sorted(extras))


def metadata(folder: Path, repository: str) -> dict[str, Any]:
    """The metadata of the package, with another address of the repository."""
    builder = pytest.importorskip("hatchling.metadata.core", reason="hatchling is not installed")
    plugins = pytest.importorskip("hatchling.plugin.manager")
    for name in ("README.md", "LICENSE", "hatch_build.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "hessfunc").mkdir()
    shutil.copy(ROOT / "hessfunc" / "__init__.py", folder / "hessfunc")
    text = read("pyproject.toml").replace('repository = ""', f'repository = "{repository}"')
    (folder / "pyproject.toml").write_text(text)
    core = builder.ProjectMetadata(str(folder), plugins.PluginManager()).core
    return {"urls": core.urls, "readme": core.readme}


def test_all_urls_follow_from_the_address_of_the_repository(tmp_path: Path) -> None:
    address = "https://example.org/hessfunc"
    made = metadata(tmp_path, address)
    assert made["urls"]["Homepage"] == address
    assert all(url.startswith(address) for url in made["urls"].values())
    links = re.findall(r"\]\(([^)\s]+)\)", made["readme"])
    assert f"{address}/blob/v{hf.__version__}/docs/start.md" in links
    assert f"{address}/raw/v{hf.__version__}/docs/images/digits-density.png" in links
    assert all(link.startswith(("https://", "#")) for link in links)


def test_without_an_address_there_are_no_urls(tmp_path: Path) -> None:
    made = metadata(tmp_path, "")
    assert made == {"urls": {}, "readme": read("README.md")}


# What runs


def test_the_workflow_makes_what_ci_makes() -> None:
    assert made(read(".github/workflows/ci.yml")) == made(read(".ci/run"))


@pytest.mark.parametrize("place", [".ci/run", ".github/workflows/ci.yml", "CONTRIBUTING.md"])
def test_what_is_made_is_in_the_makefile(place: str) -> None:
    rules = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    assert made(read(place))
    assert made(read(place)) <= rules


def test_every_python_of_the_classifiers_is_tested() -> None:
    workflow = yaml.safe_load(read(".github/workflows/ci.yml"))
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    of_classifiers = re.findall(r"Python :: (\d\.\d+)", " ".join(PROJECT["classifiers"]))
    assert tested == of_classifiers
    assert PROJECT["requires-python"] == f">={tested[0]}"


def test_the_tools_of_make_lint_are_hooks() -> None:
    recipe = re.findall(r"^lint:.*\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE)[0]
    repositories = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    entries = " ".join(hook["entry"] for found in repositories for hook in found["hooks"])
    tools = set(re.findall(r"\$\(BIN\)/(\w+)", recipe))
    assert {"ruff", "mypy"} <= tools <= set(re.findall(r"\.venv/bin/([\w-]+)", entries))


@pytest.mark.parametrize(("path", "schema"), SCHEMATA, ids=lambda value: Path(value).name)
def test_what_others_read_is_valid(path: Path, schema: str) -> None:
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    done = subprocess.run([*command, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# What is installed


def test_every_extra_that_is_named_is_there() -> None:
    texts = [*(page.read_text() for page in PAGES), read("Makefile")]
    named = set(re.findall(r"\bhessfunc\[([a-z,]+)\]", " ".join(texts)))
    assert "all" in named
    assert {extra for extras in named for extra in extras.split(",")} <= set(
        PROJECT["optional-dependencies"]
    )


def test_nothing_else_lies_at_the_top() -> None:
    # Runs that are given a relative path write where they are started.
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    folders = {"hessfunc", "tests", "bench", "docs", "examples", "conda", ".ci", ".github"}
    papers = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE"}
    tools = {"Makefile", "pyproject.toml", "hatch_build.py", "constraints.txt", "mkdocs.yml"}
    assert top <= folders | papers | tools | {".gitignore", ".pre-commit-config.yaml"}


def test_every_requirement_of_the_tests_is_pinned_within_its_bounds() -> None:
    lines = re.findall(r"^([\w.-]+)==(\S+)$", read("constraints.txt"), re.MULTILINE)
    pins = {canonicalize_name(name): version for name, version in lines}
    for found in [*map(Requirement, PROJECT["dependencies"]), *brought("dev")]:
        pinned = pins[canonicalize_name(found.name)]
        assert found.specifier.contains(pinned, prereleases=True), found


# Where it looks


def test_no_path_leads_out_of_the_project() -> None:
    absolute = re.compile(r"(?<![\w.:/-])/(?:home|root|work|mnt|srv|Users)/")
    assert [path for path, text in files() if absolute.search(text)] == []


def test_only_data_is_looked_for_beside_the_checkout() -> None:
    above = re.compile(r"Path\(__file__\)(?:\.resolve\(\))?\.parents\[(\d+)\](.*)")
    outside = {
        path: rest
        for path, text in files()
        for depth, rest in above.findall(text)
        if int(depth) >= len(path.parts)
    }
    assert Path("tests/datapath.py") in outside
    assert all('"shared" / "data"' in rest for rest in outside.values())
