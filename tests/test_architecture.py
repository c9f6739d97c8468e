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
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "allocator/README.md",
    "quantizer/README.md",
    "service/README.md",
    "tests/README.md",
    "tests/benchmarks/README.md",
)


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


def rooms() -> set[str]:
    """Return the folders of the packages that hold modules, such as `quantizer/packed/`."""
    return {
        f"{path.parent.relative_to(ROOT)}/"
        for path in MODULES
        if path.name == "__init__.py" and len(path.relative_to(ROOT).parts) == 3
    }


def test_the_readme_names_every_room() -> None:
    tree = (ROOT / "README.md").read_text().split("<!-- tree: begin -->")[1]
    folder, listed = "", set()
    for line in tree.split("<!-- tree: end -->")[0].splitlines():
        names = re.match(r"^ *((?:[\w.]+/ ?)+)", line)
        if names is None:
            continue
        if line.startswith(" "):
            listed |= {folder + name for name in names[1].split()}
        else:
            folder = names[1].strip()
    assert listed == rooms()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_of_documents_lead_to_files(name: str) -> None:
    path = ROOT / name
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text())
    assert not [link for link in links if not (path.parent / link).exists()]


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


MOST_LINES, MOST_FUNCTION_LINES, MOST_ARGUMENTS, MOST_LOCAL_IMPORTS = 400, 60, 6, 30
MEDIAN_LINES = 130
RIMS = ("service/api/", "service/cli/")
"""Rooms whose functions have one argument for each parameter that a user gives."""

COMPILED = {"numba_matmul.py", "numba_rounding.py", "triton_kernels.py", "triton_parts.py"}
"""Kernels: compilers want one function with many plain arguments."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    if path.name in COMPILED:
        return
    at_rim = str(path.relative_to(ROOT)).startswith(RIMS)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MOST_FUNCTION_LINES, node.name
            assert at_rim or len(arguments_of(node)) <= MOST_ARGUMENTS, node.name


def arguments_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Return the names of a function's arguments, without `self` and `cls`."""
    given = node.args
    every = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in every if name not in ("self", "cls")]


def test_most_files_are_short() -> None:
    sizes = sorted(len(path.read_text().splitlines()) for path in MODULES)
    assert sizes[len(sizes) // 2] <= MEDIAN_LINES


def test_few_imports_are_local() -> None:
    local = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in MODULES
        for tree in [ast.parse(path.read_text())]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and node.col_offset
    ]
    assert len(local) < MOST_LOCAL_IMPORTS, local


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
        r"torch\.load\(|import pickle|shell=True|trust_remote_code=True|allow_pickle=True|"
        r"(?<![.\w])(eval|exec)\("
    )
    assert not [path for path in MODULES if forbidden.search(path.read_text())]
