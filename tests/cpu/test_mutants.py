"""Every seeded mistake (mutants.py, norm_mutants.py, machine_mutants.py) is noticed by the fast selection of
tests (marker ``mutation``); one of the vector machine by that of its own tests.

Compiling would take longest, so a module holds as many mutants as it can, each behind a switch. With all of
them off the selection has to pass, with one of them on it has to fail. Modules are built for one instruction
set, without optimisation. Each run of the tests is a process of its own (each.py).
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import machine_mutants
import mutants
import norm_mutants
from mutants import mutated

_core = pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")

# Alone: it takes two cores, and each worker of pytest-xdist would do all of it for its share of the tests.
pytestmark = [pytest.mark.timeout(1800), pytest.mark.alone]

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
FLAGS = {"avx2": ["-mavx2", "-mfma"], "neon": [], "portable": []}  # the first that runs here
COMMON = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
COMMON += ["-Werror=unused-value"]  # part of a list as one of two expressions: a comma operator
SHARED = ["module", "dispatch", "threads", "openmp", "arena", "isa", "timing", "switch"]
MUTATED = ["kernels_float", "kernels_double", "run", "machine/plan"]  # longest first
SWITCH = 'extern "C" __attribute__((visibility("default"))) int fusedrnn_mutant;\n'
ALL_OFF = SWITCH + "int fusedrnn_mutant = 0;\n"
# Bits last: what takes longest is not needed for most.
SELECTION = [
    TESTS / name
    for name in (
        "cpu/test_kernels.py",
        "core/test_regularization.py",
        "core/test_layer_norm.py",
        "cpu/test_choices.py",
        "cpu/test_bitwise.py",
    )
]
OF_THE_MACHINE = [TESTS / f"cpu/test_machine{of}.py" for of in ("_plans", "", "_projection")]
KERNELS = [*mutants.MUTANTS, *norm_mutants.MUTANTS]
MUTANTS = [*KERNELS, *machine_mutants.MUTANTS]


# --- sources ------------------------------------------------------------------------------------------------


def switched(text, mutant, number):
    """The source with the mistake in it while ``fusedrnn_mutant`` is the number."""
    on = f"fusedrnn_mutant == {number}"
    name = re.match(r"(const \w+\*? \w+ = )?", mutant.old)[0]  # a declaration, which cannot be in a block
    if mutant.old.endswith(";") and not name:
        both = f"{{ if ({on}) {{ {mutant.new} }} else {{ {mutant.old} }} }}"
    else:
        new, old = (each.removeprefix(name).removesuffix(";") for each in (mutant.new, mutant.old))
        both = f"{name}(({on}) ? ({new}) : ({old}))" + (";" if name else "")
    return mutated(text, mutant._replace(new=both))


@dataclass
class Tree:
    """Sources with mutants in them: the files that are changed, and the mutants' numbers, from 1 on."""

    switches: bool
    files: dict[str, str] = field(default_factory=dict)
    numbers: list[int] = field(default_factory=list)

    def text(self, file):
        return self.files.get(file) or SWITCH + (ROOT / "csrc" / file).read_text()


def trees():
    """All mutants: each in the first tree where none before it changed its place, or in one of its own."""
    made = []
    for number, mutant in enumerate(MUTANTS, start=1):
        if mutant.constant:
            text = mutated((ROOT / "csrc" / mutant.file).read_text(), mutant)
            made.append(Tree(False, {mutant.file: text}, [number]))
            continue
        free = (t for t in made if t.switches and t.text(mutant.file).count(mutant.old) == 1)
        tree = next(free, None)
        if tree is None:
            made.append(tree := Tree(True))
        tree.files[mutant.file] = switched(tree.text(mutant.file), mutant, number)
        tree.numbers.append(number)
    return made


# --- modules ------------------------------------------------------------------------------------------------


def level():
    info = _core.info()
    return next(isa for isa in FLAGS if isa in info["built"] and isa in info["detected"])


def compiler():
    return shutil.which("g++") or shutil.which("c++") or pytest.skip("needs a C++ compiler")


def call(*command, **how):
    """-> what it printed"""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:2000]
    return done.stdout


def object_of(name):
    return f"{Path(name).name}.o"


def compile_object(csrc, name, target):
    """One object of the module, from this copy of csrc."""
    isa = level()
    flags = [*COMMON, f"-I{csrc}", f"-DFUSEDRNN_HAS_{isa.upper()}"]
    source = csrc / "cpu" / f"{name}.cpp"
    if name.startswith("kernels_"):
        source = csrc / "cpu" / "kernels.cpp"
        flags += [*FLAGS[isa], "-fno-exceptions", "-fno-rtti", f"-DFUSEDRNN_LEVEL={isa}"]
        flags += [f"-DFUSEDRNN_LEVEL_{isa.upper()}", f"-DFUSEDRNN_DTYPE={name[8:]}"]
    if name == "module":
        import pybind11

        source = ROOT / "src" / "module.cpp"
        flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        flags += ['-DFUSEDRNN_VERSION="0"']
    call(compiler(), *flags, "-c", source, "-o", target)


@pytest.fixture(scope="module")
def pool():
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def modules(tmp_path_factory, pool):
    """Of each tree: the tree, and its compiled module."""
    compiler()
    pytest.importorskip("pybind11", reason="needs the headers of pybind11")
    folder = tmp_path_factory.mktemp("mutants")
    made = trees()
    jobs = []
    for k, tree in enumerate(made):
        csrc = folder / f"{k}" / "csrc"
        shutil.copytree(ROOT / "csrc", csrc)
        for file, text in tree.files.items():
            (csrc / file).write_text(text)
        (csrc / "cpu" / "switch.cpp").write_text(ALL_OFF)
        for name in [*MUTATED, *(SHARED if k == 0 else [])]:
            jobs.append(pool.submit(compile_object, csrc, name, folder / f"{k}" / object_of(name)))
    for job in jobs:
        job.result()
    for k in range(len(made)):
        objects = [folder / f"{k}" / object_of(name) for name in MUTATED]
        objects += [folder / "0" / object_of(name) for name in SHARED]
        call(compiler(), "-shared", "-pthread", *objects, "-o", folder / f"{k}" / "_core.so")
    return [(tree, folder / f"{k}" / "_core.so") for k, tree in enumerate(made)]


# --- runs ---------------------------------------------------------------------------------------------------


def run(module, selection, numbers):
    """pytest's exit code with each of these mutants, by number; what it printed, under "output"."""
    codes = module.with_name(f"codes{numbers[0]}.json")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "mutation", "-p", "no:cacheprovider"]
    command += ["-p", "no:faulthandler", "-p", "each", "--exit-codes", codes]
    command += ["--mutants", ",".join(map(str, numbers)), *selection]
    environment = os.environ | {
        "FUSEDRNN_TEST_CORE": str(module),
        "FUSEDRNN_NUM_THREADS": "2",
        "FUSEDRNN_ISA": "",
        "OPENBLAS_NUM_THREADS": "1",  # a fork has no other
    }
    output = call(*command, cwd=ROOT, env=environment)
    return {int(number): code for number, code in json.loads(codes.read_text()).items()} | {"output": output}


@pytest.fixture(scope="module")
def exit_codes(modules, pool):
    """Of each run of pytest; after the mutants behind a switch comes 0, none of them."""
    parts = []
    for tree, module in modules:
        of_kernels = [n for n in tree.numbers if n <= len(KERNELS)]
        of_the_machine = [n for n in tree.numbers if n > len(KERNELS)]
        for selection, numbers in ((SELECTION, of_kernels), (OF_THE_MACHINE, of_the_machine)):
            shares = 2 if len(numbers) > 20 else min(1, len(numbers))
            parts += [(module, selection, numbers[k::shares] + [0] * tree.switches) for k in range(shares)]
    return list(pool.map(lambda part: run(*part), parts))


@pytest.mark.slow
def test_without_a_mutant_the_selection_passes(exit_codes):
    """In the same processes, or all mutants might be noticed for another reason."""
    assert any(0 in codes for codes in exit_codes)
    for codes in exit_codes:
        assert codes.get(0, 0) == 0, codes["output"][-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, len(MUTANTS) + 1), ids=lambda number: MUTANTS[number - 1].name)
def test_mutant_is_noticed(number, exit_codes):
    code = next(codes[number] for codes in exit_codes if number in codes)
    assert code != 0, f"survived: {MUTANTS[number - 1]}"
    assert code == 1 or code < 0, "the tests did not run"  # a crash or a hang is noticed


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_applies(mutant):
    text = (ROOT / "csrc" / mutant.file).read_text()
    assert mutated(text, mutant) != text
