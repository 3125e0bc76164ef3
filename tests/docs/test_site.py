"""The pages of the site: their code runs, every public name has a docstring, the tables of contents.

The site itself is built, with warnings as errors, by ``nox -s site`` and by .ci/run.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import fusedrnn

ROOT = Path(__file__).parents[2]
DOCS, PACKAGE = ROOT / "docs", ROOT / "python" / "fusedrnn"
PAGES = sorted(page for part in ("tutorials", "howto", "explanation") for page in (DOCS / part).glob("*.md"))


def code_of(page: Path) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))


def cases() -> list:
    """The pages with code; those that need NumPy alone are quick tests."""
    pages = [page for page in PAGES if code_of(page)]
    alone = [not re.search("import (torch|jax|matplotlib)", code_of(page)) for page in pages]
    return [
        pytest.param(page, id=f"{page.parent.name}-{page.stem}", marks=[pytest.mark.quick] * quick)
        for page, quick in zip(pages, alone, strict=True)
    ]


@pytest.mark.parametrize("page", cases())
def test_code_of_a_page_runs(page, tmp_path, monkeypatch, threads):
    """All of a page in order; its ``assert`` lines hold."""
    code = code_of(page)
    for module in ("torch", "jax", "matplotlib"):
        if f"import {module}" in code:
            pytest.importorskip(module, reason=f"{module} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    if "import jax" in code:  # whose threads would make a fork in a later test a warning
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    else:
        exec(compile(code, page, "exec"), {"__name__": "page"})
    if "import matplotlib" in code:
        sys.modules["matplotlib.pyplot"].close("all")


def test_each_page_is_in_one_table_of_contents():
    """What GitHub shows by links, the site shows by these."""
    listed = []
    for page in DOCS.rglob("*.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
            names = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed += [os.path.normpath(page.parent / f"{name}.md") for name in names]
    pages = {str(page) for page in DOCS.rglob("*.md")} - {str(DOCS / "index.md")}
    assert sorted(listed) == sorted(pages)


# --- docstrings ---------------------------------------------------------------------------------------------

COMMANDS = ("bench", "programs", "cli.py", "terminal.py")  # what the command line runs: no API


@cache
def modules() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def explained(owner: str) -> set[str]:
    """The methods with a docstring of the classes of this name, and of their bases in the package."""
    found = set()
    for tree in modules().values():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == owner:
                found |= {each.name for each in functions(node) if ast.get_docstring(each)}
                found |= inherited(node)
    return found


def inherited(owner: ast.ClassDef) -> set[str]:
    names = {ast.unparse(base).split(".")[-1] for base in owner.bases}
    return set().union(*(explained(name) for name in names - {owner.name}))


def functions(owner: ast.ClassDef) -> list[ast.FunctionDef]:
    return [each for each in owner.body if isinstance(each, ast.FunctionDef)]


def undocumented(tree: ast.Module | ast.ClassDef) -> list[str]:
    """Classes, functions, methods and properties without an underscore and without a docstring."""
    found = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        if any(ast.unparse(each).endswith((".setter", "overload")) for each in node.decorator_list):
            continue
        if not ast.get_docstring(node) and not (
            isinstance(tree, ast.ClassDef) and node.name in inherited(tree)
        ):
            found.append(node.name)
        if isinstance(node, ast.ClassDef):
            found += [f"{node.name}.{name}" for name in undocumented(node)]
    return found


def test_every_public_name_has_a_docstring():
    found = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path, tree in modules().items()
        if not path.relative_to(PACKAGE).parts[0].startswith(COMMANDS)
        for name in undocumented(tree)
    ]
    assert not found, "\n".join(found)


def test_a_missing_docstring_is_found():
    code = "class A:\n  '''a'''\n  def f(self): pass\n  def _g(self): pass\ndef h(): pass\n"
    assert undocumented(ast.parse(code)) == ["A.f", "h"]


def test_a_page_of_the_reference_has_every_public_module():
    """All but what the command line runs, and what only others of the package use."""
    pages = "\n".join(page.read_text() for page in DOCS.glob("reference/*.md"))
    shown = set(re.findall(r"automodule:: (\S+)", pages))
    public = {path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("_")}
    public |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    public -= {"bench", "cli", "interrupts", "layer", "masks", "npz", "problems"}
    public -= {"programs", "recurrent", "terminal", "unfused"}
    assert {f"fusedrnn.{name}" for name in public} <= shown


def test_the_reference_says_where_each_name_of_the_package_is():
    index = (DOCS / "reference" / "index.md").read_text().partition("## Names in fusedrnn itself")[2]
    assert set(fusedrnn.__all__) <= set(re.findall(r"`(\w+)`", index.partition("\n## ")[0]))
