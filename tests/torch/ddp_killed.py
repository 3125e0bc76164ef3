"""For test_torch_distributed: run a script, in which rank 1 is killed at its 13th step, the first time."""

import os
import runpy
import signal
import sys

import torch

step, calls = torch.optim.Adam.step, 0


def dying_step(self, *args, **options):
    global calls
    calls += 1
    if calls == 13 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.write(1, b"rank 1 is killed\n")
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **options)


torch.optim.Adam.step = dying_step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
