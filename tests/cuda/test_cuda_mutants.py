"""Every seeded mistake in the CUDA kernels (cuda_mutants.py) is noticed by the checks that it names.

Two checks: check.py runs the kernels under the emulation beside the reference, or under ThreadSanitizer. A
right kernel passes both.
"""

from __future__ import annotations

import concurrent.futures
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import emulated
from cuda_mutants import MUTANTS, Mutant
from fusedrnn.backends.cuda.jobs import kernels_of
from mutants import mutated
from problems import NORMED, PLAIN

pytestmark = [
    pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler"),
    pytest.mark.timeout(1200),
    pytest.mark.alone,  # it takes two cores, and each of two workers would do all of it
]

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
ENVIRONMENT = dict(os.environ)  # as it is now: pytest changes it while the threads of a test read it
RACE = 66  # the exit code with which ThreadSanitizer reports one
TYPES = [kernels_of(cell).type for cell in (*PLAIN, *NORMED[:4])]
TYPES += ["Regularized<Lstm>", "Regularized<LstmLayerNorm>", "Regularized<GruResetBefore>"]


def run(csrc: Path, arguments: list[str], limit: int, **settings: str) -> subprocess.CompletedProcess[str]:
    """check.py on these sources."""
    command = [sys.executable, HERE / "check.py", *arguments]
    settings = {**ENVIRONMENT, "FUSEDRNN_TEST_CSRC": str(csrc), **settings}
    options = {"env": settings, "capture_output": True, "text": True, "timeout": limit}
    done = subprocess.run(command, **options)
    if "unexpected memory mapping" in done.stderr:  # ThreadSanitizer, of addresses drawn from too many
        done = subprocess.run(["setarch", platform.machine(), "-R", *command], **options)
    return done


def check(csrc: Path, cell: str) -> tuple[int, str]:
    """Exit code and what was said. A crash or no end counts as noticed."""
    try:
        done = run(csrc, [cell], 120)
    except subprocess.TimeoutExpired:
        return 1, "emulation: no end"
    if done.returncode < 0:
        return 1, f"emulation: signal {-done.returncode}"
    return done.returncode, done.stdout + done.stderr[-2000:]


def race(csrc: Path, cell: str, dtype: str = "float", precision: str = "ieee") -> tuple[int, str]:
    """Exit code and what was said under ThreadSanitizer."""
    watcher = subprocess.run(
        [emulated.COMPILER, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    settings = {"FUSEDRNN_TEST_RACES": "1", "LD_PRELOAD": watcher, "TSAN_OPTIONS": "halt_on_error=1"}
    done = run(csrc, [cell, dtype, precision], 300, **settings, OPENBLAS_NUM_THREADS="1")
    return done.returncode, done.stdout + done.stderr[:3000]


def try_out(mutant: Mutant, original: Path, folder: Path) -> dict[str, tuple[int, str]]:
    """What the checks say that have to notice it."""
    csrc = folder / "csrc"
    shutil.copytree(original, csrc)
    file = csrc / "cuda" / mutant.file
    file.write_text(mutated(file.read_text(), mutant))
    said = {}
    if mutant.by != "races":
        said["check"] = check(csrc, mutant.cell)
    if "races" in mutant.by:
        said["races"] = race(csrc, mutant.cell)
    shutil.rmtree(folder)
    return said


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The sources as they are: the tree may change while this runs."""
    if emulated.COMPILER is None:
        pytest.skip("needs a C++ compiler")
    return shutil.copytree(CSRC, tmp_path_factory.mktemp("cuda_mutants") / "csrc")


@pytest.fixture(scope="module")
def outcomes(original):
    """Of every mutant, two at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {
            m.name: pool.submit(try_out, m, original, original.parent / f"{k}") for k, m in enumerate(MUTANTS)
        }


@pytest.mark.slow
@pytest.mark.parametrize("cell", TYPES)
def test_the_kernels_as_they_are_have_no_race(original, cell):
    more = [("double", "ieee"), ("Half", "fp16"), ("Bfloat16", "bf16"), ("float", "tf32")]
    for dtype, precision in [("float", "ieee"), *(more if cell == "Lstm" else ())]:
        assert race(original, cell, dtype, precision) == (0, "\n")


@pytest.mark.slow
@pytest.mark.parametrize("cell", sorted({m.cell for m in MUTANTS}))
def test_the_kernels_as_they_are_are_right(original, cell):
    assert check(original, cell) == (0, "\n")


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_is_noticed(mutant, outcomes):
    said = outcomes[mutant.name].result()
    if "check" in said:
        code, text = said["check"]
        assert code == 1, f"survived, or did not run: {mutant}: {text}"
        assert text.startswith(tuple(mutant.by.split())), text
    if "races" in said:
        code, text = said["races"]
        assert code == RACE, f"survived, or did not run: {mutant}: {text}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_mutant_applies(mutant):
    text = (CSRC / "cuda" / mutant.file).read_text()
    assert mutated(text, mutant) != text
