"""Every seeded mistake (mistakes.py) is noticed by the tests of its kind.

Each runs in a process of its own, on a copy of the package in which one file of cells/ is changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mistakes import MISTAKES

TESTS = Path(__file__).parent
PACKAGE = TESTS.parents[1] / "python" / "fusedrnn"

# The tests that have to notice a mistake of a kind, all of them quick.
SELECTIONS = {
    "derivative": ["test_derived.py", "test_random_cells.py", "-k", "complex_step"],
    "plan": ["test_derived.py", "-k", "nothing_derived or cheaper or saves"],
    "fusion": ["test_lowered.py", "test_values.py"],
    "rounds": ["test_lowered.py", "-k", "round"],
    "norms": ["test_values.py"],
    "selections": ["test_selections.py"],
}


def changed(mistake):
    """The text of the file with the mistake in it; the place has to be there exactly once."""
    text = (PACKAGE / "cells" / mistake.file).read_text()
    count = text.count(mistake.old)
    assert count == 1, f"{mistake.name}: found {count} times in {mistake.file}: {mistake.old}"
    return text.replace(mistake.old, mistake.new)


def copy(folder, mistake=None):
    """A copy of the package: links, but for the changed file."""
    package = folder / "fusedrnn"
    (package / "cells").mkdir(parents=True)
    for path in [*PACKAGE.iterdir(), *(PACKAGE / "cells").iterdir()]:
        if path.suffix == ".py" or (path.is_dir() and path.name not in ("cells", "__pycache__")):
            (package / path.relative_to(PACKAGE)).symlink_to(path)
    if mistake is not None:
        text = changed(mistake)
        (package / "cells" / mistake.file).unlink()
        (package / "cells" / mistake.file).write_text(text)


def run(folder, *command):
    """-> what Python returned and printed, with the copy in place of the package"""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-B", *map(str, command)],
        capture_output=True,
        text=True,
        cwd=TESTS.parents[1],
        env=os.environ | {"PYTHONPATH": path},
    )


def run_tests(folder, *selection):
    files = [TESTS / word if word.endswith(".py") else word for word in selection]
    return run(
        folder, "-m", "pytest", "-q", "-x", "-m", "quick", "-p", "no:cacheprovider", "--tb=line", *files
    )


@pytest.mark.quick
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_mistake_applies(mistake):
    assert changed(mistake) != (PACKAGE / "cells" / mistake.file).read_text()
    assert mistake.kind in SELECTIONS


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("kind", SELECTIONS)
def test_without_a_mistake_the_tests_pass(kind, tmp_path):
    """On a copy too, or all mistakes might be noticed for another reason."""
    copy(tmp_path)
    where = run(tmp_path, "-c", "import fusedrnn.cells.graph as g; print(g.__file__)").stdout.strip()
    assert Path(where).is_relative_to(tmp_path), f"the tests would run on {where}"
    done = run_tests(tmp_path, *SELECTIONS[kind])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_mistake_is_noticed(mistake, tmp_path):
    copy(tmp_path, mistake)
    done = run_tests(tmp_path, *SELECTIONS[mistake.kind])
    assert done.returncode != 0, f"survived: {mistake}"
    assert done.returncode == 1, "the tests did not run:\n" + done.stdout[-4000:] + done.stderr[-2000:]
