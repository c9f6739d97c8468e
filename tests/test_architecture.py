"""Promises about the code as a whole."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import tables
from tests.support.paths import ROOT

PACKAGES = ("allocator", "quantizer", "service")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("quantizer", ["torch", "transformers", "numpy"]),
        ("quantizer.plans.plan", ["torch", "transformers", "numpy"]),
        ("allocator.allocate", ["torch", "transformers"]),
        ("allocator.signals", ["torch", "transformers", "numpy"]),
        ("service.cli.main", ["torch", "transformers", "cvxpy"]),
        ("service.api.app", ["torch", "transformers", "cvxpy", "matplotlib"]),
    ],
)
def test_light_modules_load_no_heavy_library(module: str, absent: list[str]) -> None:
    loaded = run_python(f"import sys, {module}; print(*sys.modules)").split()
    assert not set(absent) & set(loaded)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_other_distribution_provides_our_package_names(package: str) -> None:
    assert set(importlib.metadata.packages_distributions()[package]) == {"bitwright"}


def test_readme_tree_equals_the_disk() -> None:
    tree = (
        (ROOT / "README.md")
        .read_text()
        .split("<!-- tree: begin -->")[1]
        .split("<!-- tree: end -->")[0]
    )
    folder, listed = "", set()
    for line in tree.splitlines():
        match = re.match(r"^(?P<indent> *)(?P<name>[\w./]+) {2,}\S", line)
        if match is None:
            continue
        if match["name"].endswith("/"):
            folder = match["name"]
        elif match["indent"]:
            listed.add(folder + match["name"])
    on_disk = {str(path.relative_to(ROOT)) for path in MODULES if path.name != "__init__.py"}
    assert {name for name in listed if name.endswith(".py")} == on_disk


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_of_results_are_made_from_stored_rows(path: Path) -> None:
    text = path.read_text()
    assert tables.with_tables(text) == text


LOG = ROOT / "tests" / "benchmarks" / "LOG.md"


def anchors(text: str) -> list[str]:
    """Return the link targets of a Markdown document's second-level headings."""
    heads = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]


def test_the_index_of_the_log_names_every_heading() -> None:
    text = LOG.read_text()
    targets = anchors(text)
    assert len(set(targets)) == len(targets)
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) == set(targets) - {"index-by-topic"}


def is_triton_kernel(function: ast.FunctionDef) -> bool:
    """Return whether Triton compiles a function: its arguments, one a line, make it long."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and not is_triton_kernel(node):
            assert (node.end_lineno or 0) - node.lineno < 70, node.name


@pytest.mark.parametrize("package", PACKAGES)
def test_every_error_belongs_to_the_tree_of_its_package(package: str) -> None:
    base = {
        "allocator": "AllocatorError",
        "quantizer": "QuantizerError",
        "service": "ServiceError",
    }[package]
    module = importlib.import_module(f"{package}.errors")
    errors = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    ]
    assert len(errors) > 1
    assert all(issubclass(error, getattr(module, base)) for error in errors)


def test_nothing_unpickles_or_runs_code_of_others() -> None:
    forbidden = re.compile(
        r"torch\.load\(|import pickle|shell=True|trust_remote_code=True|allow_pickle=True|(?<![.\w])(eval|exec)\("
    )
    assert not [path for path in MODULES if forbidden.search(path.read_text())]
