"""Whether the kernels of one cell are right: what a mutant of them has to fail. Run by test_cuda_mutants.py.

Usage: check.py CELL, of cells.def, or Regularized<> of one. The sources are those of FUSEDRNN_TEST_CSRC.
Prints what is wrong in one line that begins with "values" or "emulation"; exit code 1.

With FUSEDRNN_TEST_RACES and check.py CELL DTYPE PRECISION ThreadSanitizer watches each CUDA thread and ends
this at the first race. Values are not looked at: no order of the threads depends on them.
"""

from __future__ import annotations

import itertools
import os
import sys

import ml_dtypes  # noqa: F401  # NumPy knows bfloat16 by it
import numpy as np

import emulated
from fusedrnn.backends.cuda.jobs import kernels_of
from fusedrnn.backends.reference import ReferenceBackend
from problems import NORMED, PLAIN, errors, problem, run
from test_cuda_kernels import EVERYTHING, KERNELS, ONE_PHASE, Tiled
from test_regularization import of

# Sizes, units and rows of a block: several groups of rows in a tile, tiles, splits of k, two units of a
# thread. With 3 units, not 4, the second group's rows belong to other threads than when the state is set:
# else no missing barrier between the two could be noticed.
TILINGS = (((5, 11, 3, 11), 4, 9), ((2, 24, 2, 7), 3, 23), ((3, 5, 2, 33), 2, 3))


def check(cell, regularized) -> str:
    """What is wrong, or nothing."""
    for n, (sizes, units, rows) in enumerate(TILINGS):
        small = n < 2
        for options in ({**EVERYTHING, "reverse": True}, EVERYTHING, {"return_states": True})[
            : 3 if small else 1
        ]:
            r = of("all", cell) if regularized else None
            p = problem(cell, *sizes, regularization=r, **options)
            want = run(ReferenceBackend(), p)
            for kernel in KERNELS if cell in ONE_PHASE and not regularized else ("steps",):
                for seed in range(3 if small and kernel != "steps" else 1):
                    try:
                        got = run(Tiled(kernel, units, rows, seed=seed), p)
                    except RuntimeError as error:
                        return f"emulation, {kernel}: " + str(error).replace("\n", " ")
                    wrong = {key: e for key, e in errors(got, want).items() if not e <= 1e-13}
                    if wrong:
                        return f"values, {kernel}: {wrong}"
    return ""


def race(cell, regularized, dtype: str, precision: str) -> str:
    """What is wrong beside races, or nothing."""
    R = kernels_of(cell).recurrent.count
    tilings = (
        ((3, 11, 2, 5), 3, 9, {}),
        ((3, 11, 2, 5), 3, 9, {"lengths": True, "reset": True, "reverse": True}),
        ((2, 3, 2, 7), 4, 2, {"lengths": True, "reset": True, "state0": False, "detach_every": 2}),
        ((4, 2, 2, 9), 3, 2, {"reset": True, "reverse": True}),
        ((3, 20, 2, 5), 3, 19, {"detach_every": 2}),
        ((2, 9, 2, 64 // R + 1), 16 // R, 9, {"state0": False}),  # k beyond a multiple of 64
        # More rows than blocks of the smallest GPU, so that a block has several.
        *([((2, 35, 2, 5), 3, 9, {})] if cell.vectors else []),
    )
    numpy_dtype = {"float": "float32", "double": "float64", "Half": "float16"}.get(dtype, dtype.lower())
    r = of("all", cell) if regularized else None
    for seed, (sizes, units, rows, options) in enumerate(tilings):
        p = problem(cell, *sizes, return_states=True, regularization=r, **options).astype(numpy_dtype)
        for kernel in KERNELS if cell in ONE_PHASE and not regularized else ("steps",):
            places = 1 if kernel == "steps" else 256
            run(Tiled(kernel, units, rows, precision, seed=seed, multiprocessors=places), p)
    return ""


if __name__ == "__main__":
    np.seterr(all="ignore")
    os.environ.pop("LD_PRELOAD", None)  # ThreadSanitizer is not for the compiler
    pairs = itertools.product((*PLAIN, *NORMED[:4]), (False, True))
    (pair,) = (pair for pair in pairs if kernels_of(*pair).type == sys.argv[1])
    found = (race if emulated.RACES else check)(*pair, *sys.argv[2:])
    print(found)
    sys.exit(1 if found else 0)
