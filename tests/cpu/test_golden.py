"""The bits of today: a change of the kernels that was not meant to change them is noticed.

Every level with FMA has the same bits, for any number of threads; without FMA they are others. Where a change
of bits is right, ``python tests/cpu/test_golden.py`` writes the files anew, on the level that
``FUSEDRNN_ISA`` says.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from problems import NORMED, PLAIN, Problem, name, problem, run

pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
from fusedrnn import _core
from fusedrnn.backends.cpu import CpuBackend
from test_regularization import KINDS, of

pytestmark = [pytest.mark.kernel, pytest.mark.mutation]

CELLS = (*PLAIN, *NORMED[:4])  # the kernels have no layer norm for GRU with reset before
EVERYTHING = {"lengths": True, "reset": True, "return_states": True}
# Split by rows; by units, W x of several steps at once; in several chunks; a single step; less than a block;
# a last block of 7 units, which lie side by side for two accumulators (4 for at most 4).
SIZES = ((7, 13, 5, 33), (4, 3, 90, 210), (60, 40, 3, 17), (1, 3, 20, 35), (9, 2, 1, 1), (4, 5, 70, 71))
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    EVERYTHING,
    EVERYTHING | {"reverse": True, "detach_every": 2},
    {"biases": "both", "state0": False, "upstream": ("dstateT",)},
)


def cases(cell: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is run of a cell: a name, and what ``problem`` is told."""
    for size in SIZES:
        for options in OPTIONS:
            yield f"{size} {name(cell, options)}", {"size": size, **options}
    for kind in KINDS:
        if (regularization := of(kind, cell)) is not None:
            yield (
                f"{kind} {name(cell)}",
                {"size": (7, 13, 5, 33), "regularization": regularization, **EVERYTHING},
            )


def digest(arrays: dict[str, Any]) -> str:
    """Of names, shapes and bits."""
    found = hashlib.sha256()
    for key in sorted(arrays):
        found.update(f"{key} {arrays[key].shape}".encode() + arrays[key].tobytes())
    return found.hexdigest()[:16]


def given(p: Problem) -> str:
    """The digest of what goes in: another NumPy may draw other numbers."""
    arrays = {"x": p.x, "dy": p.dy} | p.weights
    return digest({key: a for key, a in arrays.items() if a is not None})


def found(cell: Any) -> dict[str, str]:
    """The digests of what goes in and of what comes out, by the names of the cases."""
    bits = {}
    for case, options in cases(cell):
        for dtype in (np.float32, np.float64):
            size = options["size"]
            p = problem(cell, *size, dtype=dtype, **{k: v for k, v in options.items() if k != "size"})
            key = f"{case} {np.dtype(dtype)}"
            bits[key] = f"{given(p)} {digest(run(CpuBackend(), p))}"
    return bits


def path() -> Path:
    level = "portable" if _core.info()["isa"] == "portable" else "fma"
    return Path(__file__).with_name(f"golden_{level}.json")


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_the_bits_are_those_that_were_written_down(cell):
    known = json.loads(path().read_text())
    bits = found(cell)
    other = [key for key in bits if bits[key].split()[0] != known[key].split()[0]]
    assert other == [], "NumPy draws other numbers than when the files were written"
    assert [key for key in bits if bits[key] != known[key]] == []


if __name__ == "__main__":
    lines = {key: value for cell in CELLS for key, value in found(cell).items()}
    path().write_text(json.dumps(lines, indent=0) + "\n")
