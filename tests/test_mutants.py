"""Every seeded mistake (mutants/mutants.py) is noticed by the fast selection of tests (marker ``mutation``).

The compiled module is built once for one instruction set, without optimisation; a mutant recompiles what it
touches. The tests run in a process of their own, on the mutant's module.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

from mutants.mutants import MUTANTS, Mutant

_core = pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")

pytestmark = pytest.mark.timeout(1800)

TESTS = Path(__file__).parent
ROOT = TESTS.parent
FLAGS = {"avx2": ["-mavx2", "-mfma"], "neon": [], "portable": []}  # the first that runs here
SOURCES = ["run", "dispatch", "threads", "openmp", "arena", "isa", "timing"]


def level():
    info = _core.info()
    return next(isa for isa in FLAGS if isa in info["built"] and isa in info["detected"])


class Build(NamedTuple):
    """The objects of the kernels as they are, and how to make them."""

    compiler: str
    folder: Path

    def compile(self, source, target, *flags):
        fixed = [
            "-std=c++17",
            "-O0",
            "-w",
            "-fPIC",
            "-fvisibility=hidden",
            "-ffp-contract=off",
            "-fno-math-errno",
        ]
        command = [self.compiler, *fixed, *flags, "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"does not compile: {done.stderr[:2000]}"
        return target

    def objects(self, csrc, target, names):
        """Compiles some of the objects from this copy of csrc."""
        isa = level()
        made = {}
        for name in names:
            flags = [f"-I{csrc}", f"-DFUSEDRNN_HAS_{isa.upper()}"]
            source = csrc / "cpu" / f"{name}.cpp"
            if name.startswith("kernels_"):
                flags += [*FLAGS[isa], "-fno-exceptions", "-fno-rtti", f"-DFUSEDRNN_LEVEL={isa}",
                          f"-DFUSEDRNN_LEVEL_{isa.upper()}", f"-DFUSEDRNN_DTYPE={name[8:]}"]  # fmt: skip
                source = csrc / "cpu" / "kernels.cpp"
            if name == "module":
                pybind11 = pytest.importorskip("pybind11", reason="needs the headers of pybind11")
                flags += [
                    f"-I{pybind11.get_include()}",
                    f"-I{sysconfig.get_paths()['include']}",
                    '-DFUSEDRNN_VERSION="0"',
                ]
                source = ROOT / "src" / "module.cpp"
            made[name] = self.compile(source, target / f"{name}.o", *flags)
        return made

    def link(self, objects, target):
        command = [self.compiler, "-shared", "-pthread", *map(str, objects.values()), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:2000]
        return target


def affected(file):
    """The objects that a file of csrc is part of."""
    return ["run"] if file == "cpu/run.cpp" else ["kernels_float", "kernels_double"]


def mutated(text, mutant):
    """The source with the mistake in it; the place has to be there exactly once."""
    assert text.count(mutant.old) == 1, (
        f"{mutant.name}: found {text.count(mutant.old)} times in {mutant.file}: {mutant.old}"
    )
    return text.replace(mutant.old, mutant.new)


def outcome(module):
    """pytest's exit code on a compiled module, and what it said; a crash or a hang counts as noticed (1)."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "mutation", "--tb=line"]
    command += [
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        TESTS / "test_kernels.py",
        TESTS / "test_bits.py",
        TESTS / "test_regularization.py",
        TESTS / "test_layer_norm.py",
    ]
    environment = {
        **os.environ,
        "FUSEDRNN_TEST_CORE": str(module),
        "FUSEDRNN_NUM_THREADS": "2",
        "FUSEDRNN_ISA": "",
    }
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return 1, "no end"
    return (1 if done.returncode < 0 else done.returncode), done.stdout[-2000:] + done.stderr[-500:]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("mutants")
    made = Build(compiler, folder)
    names = ["module", *SOURCES, "kernels_float", "kernels_double"]
    (folder / "base").mkdir()
    shutil.copytree(ROOT / "csrc", folder / "csrc")  # the tree may change while this runs
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: made.objects(folder / "csrc", folder / "base", [name]), names))
    return made


def base(build):
    return {path.stem: path for path in sorted((build.folder / "base").glob("*.o"))}


def try_out(build, mutant, number):
    """pytest's exit code on the mutant."""
    folder = build.folder / f"{number}"
    folder.mkdir()
    csrc = folder / "csrc"
    shutil.copytree(build.folder / "csrc", csrc)
    file = csrc / mutant.file
    file.write_text(mutated(file.read_text(), mutant))
    objects = base(build) | build.objects(csrc, folder, affected(mutant.file))
    result = outcome(build.link(objects, folder / "_core.so"))
    shutil.rmtree(folder)
    return result


@pytest.fixture(scope="module")
def outcomes(build):
    """Of every mutant, two at a time: an exit code and text, or the exception."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return {m.name: pool.submit(try_out, build, m, k) for k, m in enumerate(MUTANTS)}


@pytest.mark.slow
def test_the_kernels_as_they_are_pass(build):
    code, text = outcome(build.link(base(build), build.folder / "_core.so"))
    assert code == 0, text
    assert int(re.search(r"(\d+) passed", text)[1]) > 20
    assert "skipped" not in text


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_noticed(mutant, outcomes):
    code, text = outcomes[mutant.name].result()
    assert code != 0, f"survived: {mutant}"
    assert code == 1, f"the tests did not run: {text}"


def test_there_are_at_least_30_with_names_of_their_own():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 30


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_applies(mutant):
    text = (ROOT / "csrc" / mutant.file).read_text()
    assert mutated(text, mutant) != text


def test_a_mutant_that_does_not_apply_fails():
    for text in ("", "a b a"):
        with pytest.raises(AssertionError, match="found"):
            mutated(text, Mutant("none", "cells/lstm.h", "a", "b"))
