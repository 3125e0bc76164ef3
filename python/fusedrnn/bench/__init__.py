"""``fusedrnn bench``: ours beside its peers, in one run.

Every library gets the same numbers, the same count of threads, and does the same work; what it allocates
is part of its time. First each result is checked against the reference in float64, then the libraries are
timed interleaved, block by block, so that a drift of the machine meets all of them alike. A ratio is the
median over the blocks of peer / ours.

Cases are in ``fusedrnn.problems``; a peer is a class here and a line in ``registry``.
"""

from fusedrnn.bench.loops_jax import JaxScan
from fusedrnn.bench.loops_torch import TorchLoop
from fusedrnn.bench.registry import OWN, PEERS
from fusedrnn.bench.report import load, memory_table, save, summary, table
from fusedrnn.bench.runner import run

__all__ = ["OWN", "PEERS", "JaxScan", "TorchLoop", "load", "memory_table", "run", "save", "summary", "table"]
