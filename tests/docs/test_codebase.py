"""The rules of the project, as tests."""

from __future__ import annotations

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from release_files import check_instructions

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "fusedrnn"
MODULES = sorted(PACKAGE.rglob("*.py"))
TEXTS = (".py", ".pyi", ".h", ".cpp", ".def", ".md", ".toml", ".txt")


def sources() -> list[Path]:
    """Every text file of the project."""
    folders = ("python", "csrc", "src", "cmake", "tests", "bench", "docs", "examples", "tools")
    found = [path for path in ROOT.iterdir() if path.suffix in TEXTS]
    found += [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in TEXTS]
    return found


# --- the version is written in one place ------------------------------------------------------------------


def test_version_stands_in_pyproject_alone():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    spelled = re.compile(rf"(?<![\d.]){re.escape(version)}(?![\d.])")
    holders = {str(path.relative_to(ROOT)) for path in sources() if spelled.search(path.read_text())}
    assert holders == {"pyproject.toml", "CHANGELOG.md"}


def test_changelog_begins_with_the_version():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert re.search(r"^## (\S+?),", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


# --- imports go one way: layers -> functions -> backends -> compiled module --------------------------------

# Each module may import from its own level and from those below it; the highest number is the top.
LEVELS = {
    "_core": 0, "cells": 0, "masks": 0, "terminal": 0, "config": 1, "threads": 1, "backends": 1, "npz": 1,
    "cuda": 2, "kernels": 2, "autograd": 2, "problems": 2, "multilayer": 3, "datasets": 3,
    "functions": 4, "layer": 5, "unfused": 5, "recurrent": 5, "layers": 5, "models": 6,
    "optimizers": 6, "dataloaders": 6, "checkpoint": 7, "gradcheck": 7, "gradcheck_suite": 8,
    "system": 7, "plot": 7, "": 8, "torch": 8, "bench": 8, "programs": 9, "cli": 10,
    "__main__": 11, "interrupts": 0,
}  # fmt: skip


def part(module: str) -> str:
    """``fusedrnn.backends.cpu`` -> ``backends``; the package itself -> an empty name."""
    return module.split(".")[1] if "." in module else ""


def own_imports(path: Path) -> set[str]:
    """The parts of the package that a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            if node.module == "fusedrnn":
                names = [f"fusedrnn.{a.name}" if f"{a.name}" in LEVELS else "fusedrnn" for a in node.names]
            else:
                names = [node.module]
        else:
            continue
        found |= {part(name) for name in names if name.split(".")[0] == "fusedrnn"}
    return found


@pytest.mark.quick
@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py").replace("__init__", "")
    assert here in LEVELS, f"give {here} a level"
    upward = {name for name in own_imports(path) if LEVELS[name] > LEVELS[here]}
    assert not upward, f"{here} (level {LEVELS[here]}) imports {sorted(upward)}"


def test_the_check_of_imports_finds_an_upward_one(tmp_path):
    file = tmp_path / "cells.py"
    file.write_text("def f():\n    from fusedrnn.layers import LSTM\n    import fusedrnn\n")
    assert own_imports(file) == {"layers", ""}
    assert LEVELS["layers"] > LEVELS["cells"]


@pytest.mark.parametrize("folder", ["csrc", "src"])
def test_cpp_includes_go_down(folder):
    """csrc knows no Python; its cells know no loops; nothing in csrc includes from src."""
    for path in [*(ROOT / folder).rglob("*.h"), *(ROOT / folder).rglob("*.cpp")]:
        includes = re.findall(r'^#include [<"](.+)[>"]', path.read_text(), re.MULTILINE)
        inside = path.relative_to(ROOT / folder).parts[0]
        for name in includes:
            if folder == "csrc":
                assert not name.startswith(("Python.h", "pybind11", "src/")), f"{path}: {name}"
            if folder == "csrc" and inside in ("cells", "simd"):
                assert not name.startswith("cpu/"), f"{path}: {name}"


def test_intrinsics_stand_in_simd_alone():
    allowed = {"simd", "control_word.h", "isa.cpp", "threads.cpp", "module.cpp"}  # MXCSR, cpuid, pause
    for path in [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp")]:
        if path.parent.name in allowed or path.name in allowed:
            continue
        assert not re.search(r"\b_mm\d*_\w+\(", path.read_text()), path


def test_the_registries_of_both_languages_agree():
    core = pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
    from fusedrnn.cells import CELLS

    assert {name.split("_")[0] for name in core.CELLS} == set(CELLS)


# --- nothing compiled for one instruction set is linked for all --------------------------------------------


def kernel_objects(folder: Path) -> list[Path]:
    return sorted(folder.rglob("kernels.cpp.o")) if folder.is_dir() else []


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """The kernels' objects: those of a build, or one of csrc/cpu/kernels.cpp made here with CMake's flags."""
    found = kernel_objects(Path(os.environ.get("FUSEDRNN_BUILD", ROOT / "build")))
    if found:
        return found
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    flags = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    built = tmp_path_factory.mktemp("objects") / "kernels.cpp.o"
    subprocess.run(
        [compiler, "-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-exceptions",
         "-fno-rtti", "-fvisibility=hidden", *flags, "-DFUSEDRNN_LEVEL=avx512", "-DFUSEDRNN_LEVEL_AVX512",
         "-DFUSEDRNN_DTYPE=float", f"-I{ROOT / 'csrc'}", "-c", ROOT / "csrc/cpu/kernels.cpp", "-o", built],
        check=True,
    )  # fmt: skip
    return [built]


def shared_symbols(path: Path) -> list[str]:
    """Weak and unique definitions that do not carry the level in their name: the linker keeps one for all."""
    listing = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^[0-9a-f]+ [WVuw] (.*)$", listing, re.MULTILINE)
    return [
        name
        for name in found
        if not re.search(r"fusedrnn::(portable_fma|portable|avx2|avx512_bf16|amx_bf16|avx512|neon)::", name)
    ]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_code_of_one_instruction_set_leaks(objects):
    for path in objects:
        assert shared_symbols(path) == [], path


@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("g++") is None, reason="needs nm and g++")
def test_the_check_for_leaks_finds_one(tmp_path):
    code = tmp_path / "leak.cpp"
    code.write_text("#include <vector>\nvoid f(std::vector<int>& v) { v.push_back(1); }\n")
    subprocess.run(["g++", "-O0", "-c", code, "-o", tmp_path / "leak.o"], check=True)
    assert any("std::vector" in name for name in shared_symbols(tmp_path / "leak.o"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64's instruction sets")
@pytest.mark.skipif(None in (shutil.which("objdump"), shutil.which("g++")), reason="needs objdump and g++")
def test_the_check_of_a_release_finds_code_that_is_not_for_every_processor(tmp_path):
    """In a function that the linker takes from a level's file, and in that file's initialiser."""
    code = tmp_path / "leak.cpp"
    code.write_text(
        "namespace fusedrnn::avx2 { double twice(double a) { return 2 * a; } }\n"
        "double start = fusedrnn::avx2::twice(*new double);\n"
        "double thrice(double a) { return 3 * a; }\n"
    )
    subprocess.run(["g++", "-std=c++17", "-O1", "-mavx2", "-c", code, "-o", tmp_path / "leak.o"], check=True)
    found = [line.split()[1] for line in check_instructions(tmp_path / "leak.o")]
    assert sorted(found) == ["_GLOBAL__sub_I__ZN8fusedrnn4avx25twiceEd", "_Z6thriced"]


# --- the documents -----------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.quick
@pytest.mark.parametrize("code", EXAMPLES, ids=[f"example{k}" for k in range(len(EXAMPLES))])
def test_readme_example_runs(code, tmp_path):
    """Each example runs by itself; its ``assert`` lines hold."""
    if "import torch" in code:
        pytest.importorskip("torch", reason="PyTorch is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md"]
)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


SCRIPTS = (
    "plot_readme.py",
    "benchmarks_page.py",
    "first_call.py",
    "frozen.py",
    "irregular_page.py",
    "pollution_page.py",
    "programs_page.py",
    "recurrent_ppo.py",
    "scaling.py",
    "speechbrain_ligru.py",
    "zoo.py",
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_figures_come_from_the_measured_files(script):
    """The table between the markers is what the script writes from bench/results."""
    command = [sys.executable, ROOT / "bench" / script, "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_says_what_it_is():
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"


def test_no_leftovers():
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    for path in sources():
        if path != Path(__file__):
            assert not marks.search(path.read_text()), path
