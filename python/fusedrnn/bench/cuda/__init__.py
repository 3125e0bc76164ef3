"""``fusedrnn bench --device cuda``: our PyTorch modules beside PyTorch's own, which run cuDNN.

Every case runs in every precision, forward and with backward, and each result is compared with PyTorch in
float64 before it is timed. Times are those of CUDA events, the libraries interleaved. The bound of a case is
made of rates that are measured in the same run. What a run has to reach is in ``goals``.
"""

from fusedrnn.bench.cuda.goals import judge
from fusedrnn.bench.cuda.modes import MODES
from fusedrnn.bench.cuda.report import goal_table, line, summary, table
from fusedrnn.bench.cuda.runner import expected, missing, run

__all__ = ["MODES", "expected", "goal_table", "judge", "line", "missing", "run", "summary", "table"]
