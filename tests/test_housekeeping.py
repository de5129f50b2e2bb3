"""What helps the next person: tests lie where their modules do, errors are read, packaging is true."""

from __future__ import annotations

import ast
import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from s2ap_deploy import errors
from s2ap_deploy.errors import DeployError
from s2ap_deploy.plugins import KINDS, group

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_tests_mirror_the_package() -> None:
    """Every room has its folder of tests, and every folder of tests its room."""
    rooms = {path.parent.name for path in (ROOT / "s2ap_deploy").glob("*/__init__.py")}
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    assert rooms - folders == set()
    assert folders - rooms == set()


def test_every_module_at_the_top_has_its_test() -> None:
    for path in (ROOT / "s2ap_deploy").glob("*.py"):
        if path.stem not in ("__init__", "__main__"):
            assert (ROOT / "tests" / f"test_{path.stem}.py").is_file(), path.name


def error_classes() -> list[str]:
    return sorted(
        name
        for name, found in vars(errors).items()
        if isinstance(found, type) and issubclass(found, DeployError) and found is not DeployError
    )


def read_messages(tree: ast.AST) -> Iterator[str]:
    """Errors whose words a test looks at: ``raises(X, match=...)`` or ``raises(X) as caught``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.With):
            continue
        for item in node.items:
            call = item.context_expr
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr == "raises"
                and (item.optional_vars is not None or any(each.arg == "match" for each in call.keywords))
            ):
                yield from (found.id for found in ast.walk(call.args[0]) if isinstance(found, ast.Name))


def test_every_error_has_a_test_that_reads_its_words() -> None:
    read = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in read_messages(ast.parse(path.read_text(encoding="utf-8")))
    }
    # Their subclasses are what is raised, and read.
    assert set(error_classes()) - read - {"InputError", "InconclusiveError"} == set()


def test_extras_are_what_the_pages_promise() -> None:
    assert {"tracking", "openvino", "report", "test", "dev"} <= PROJECT["optional-dependencies"].keys()


def test_every_dependency_has_a_lower_bound() -> None:
    listed = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
    for requirement in listed:
        assert ">=" in requirement or requirement.startswith("s2ap-deploy["), requirement


def test_the_versions_of_python_that_are_claimed_are_those_that_ci_runs() -> None:
    claimed = [
        word.rpartition(" ")[2] for word in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", word)
    ]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == claimed


def test_the_lowest_torch_is_the_one_that_ci_runs() -> None:
    (torch,) = (each for each in PROJECT["dependencies"] if re.match(r"torch[<>=]", each))
    lowest = re.search(r">=([\d.]+)", torch)
    assert lowest is not None
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert f"torch=={lowest[1]}.*" in text


def test_the_citation_names_the_four_papers() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "references"} <= cited.keys()
    assert cited["version"] == PROJECT["version"]
    identifiers = {reference["identifiers"][0]["value"] for reference in cited["references"]}
    assert identifiers == {
        "arXiv:2510.18381",
        "arXiv:2409.01249",
        "arXiv:2002.10509",
        "arXiv:2412.14714",
    }
    for reference in cited["references"]:
        assert all(author["family-names"] for author in reference["authors"])


def test_the_example_offers_one_of_each_kind() -> None:
    example = tomllib.loads((ROOT / "examples" / "plugin" / "pyproject.toml").read_text(encoding="utf-8"))
    offered = example["project"]["entry-points"].keys()
    assert offered == {group(kind) for kind in KINDS if kind != "architectures"}


def test_hooks_name_no_host() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"]
    assert {hook["id"] for hook in hooks["repos"][0]["hooks"]} >= {"ruff", "ruff-format", "mypy"}


@pytest.mark.parametrize("page", ["python.md", "plugins.md", "reference.md", "recipe-keys.md"])
def test_the_page_is_reached_from_another(page: str) -> None:
    others = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    linked = [path for path in others if path.name != page and page in path.read_text(encoding="utf-8")]
    assert linked, f"nothing links to {page}"
