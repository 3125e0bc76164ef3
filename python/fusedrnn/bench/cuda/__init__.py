"""``fusedrnn bench --device cuda``: our PyTorch modules beside PyTorch's own, which run cuDNN."""

from fusedrnn.bench.cuda.runs import MODES, expected, missing, run, use
from fusedrnn.bench.cuda.tables import goal_table, judge, summary, table

__all__ = ["MODES", "expected", "goal_table", "judge", "missing", "run", "summary", "table", "use"]
