"""``fusedrnn bench --device cuda``: our PyTorch modules beside PyTorch's own, which run cuDNN."""

from fusedrnn.bench.cuda.runs import MODES, run, use
from fusedrnn.bench.cuda.tables import goal_table, judge, summary

__all__ = ["MODES", "goal_table", "judge", "run", "summary", "use"]
