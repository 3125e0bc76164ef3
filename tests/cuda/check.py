"""Whether the kernels of one cell are right: what a mutant of them has to fail. Run by test_cuda_mutants.py.

Usage: check.py CELL, of cells.def, or Regularized<> of one. The sources are those of FUSEDRNN_TEST_CSRC.
Prints what is wrong in one line that begins with "values" or "emulation"; exit code 1.
"""

from __future__ import annotations

import itertools
import sys

import numpy as np

from fusedrnn.backends.cuda.jobs import kernels_of
from fusedrnn.backends.reference import ReferenceBackend
from problems import CELLS, NORMED, errors, problem, run
from test_cuda_kernels import EVERYTHING, KERNELS, ONE_PHASE, Tiled
from test_regularization import of

# Sizes, units and rows of a block: several groups of rows in a tile, tiles, splits and chunks
# of k, two units of a thread. With 3 units, not 4, the second group's rows belong to other threads
# than when the state is set: else no missing barrier between the two could be noticed.
TILINGS = (((5, 11, 3, 11), 4, 9), ((2, 24, 2, 7), 3, 23), ((3, 5, 2, 33), 2, 3), ((2, 9, 2, 65), 4, 9))


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
                if kernel.endswith("_registers") and sizes[3] > 64:
                    continue  # going back, an LSTM's do not fit
                for seed in range(3 if small and kernel != "steps" else 1):
                    try:
                        got = run(Tiled(kernel, units, rows, seed=seed), p)
                    except RuntimeError as error:
                        return f"emulation, {kernel}: " + str(error).replace("\n", " ")
                    wrong = {key: e for key, e in errors(got, want).items() if not e <= 1e-13}
                    if wrong:
                        return f"values, {kernel}: {wrong}"
    return ""


if __name__ == "__main__":
    np.seterr(all="ignore")
    pairs = itertools.product((*CELLS, *NORMED[:4]), (False, True))
    (pair,) = (pair for pair in pairs if kernels_of(*pair).type == sys.argv[1])
    found = check(*pair)
    print(found)
    sys.exit(1 if found else 0)
