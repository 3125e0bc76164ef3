"""``fusedrnn bench``: forward + backward of one layer, ours beside its peers, in one run.

Every participant gets the same numbers, the same count of threads, and computes every gradient, that of
``x`` included; what it allocates is part of its time. First each result is checked, then the participants are
timed in turn, block by block, so that a drift of the machine meets all of them alike. A ratio is the median
over the blocks of peer / ours.
"""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fusedrnn import backends, functional, problems, system
from fusedrnn.backends.protocol import Array
from fusedrnn.cells import RNN, Cell
from fusedrnn.problems import Data, Shape
from fusedrnn.threads import get_num_threads, set_num_threads

# The check before the timing: everybody computed the same thing. How exact each is, is gradcheck's business,
# so this is ten times what the kernels promise on standard problems.
TOLERANCE = {"float32": 5e-5, "float64": 2e-13}
PEERS = ("reference", "torch", "numba")
SETTLE = 0.04  # seconds

Results = dict[str, Array]


class Native:
    """A backend of this library."""

    path = None

    def __init__(self, data: Data, backend: str) -> None:
        self.data = data
        self.backend = backend

    def __call__(self) -> Any:
        data = self.data
        out = functional.forward(data.cell, data.x, data.weights, backend=self.backend)
        return out, functional.backward(out.tape, data.dy, data.dstateT)

    def results(self) -> Results:
        out, gradients = self()
        named = {"y": out.y, "dx": gradients.dx}
        named |= dict(zip(self.data.cell.states, out.stateT, strict=True))
        named |= {f"d{k}": v for k, v in gradients.dweights._asdict().items() if v is not None}
        return named


class Torch:
    """``torch.nn.LSTM``, ``GRU`` or ``RNN`` as users call it; its second bias is zero for LSTM and RNN."""

    def __init__(self, data: Data) -> None:
        import torch

        self.torch = torch
        self.data = data
        _, _, I, H = data.shape
        name = data.cell.name
        options: dict[str, Any] = {}
        if isinstance(data.cell, RNN):
            options["nonlinearity"] = "relu" if data.cell.relu else "tanh"
        self.layer = getattr(torch.nn, name.upper())(I, H, dtype=getattr(torch, str(data.x.dtype)), **options)
        with torch.no_grad():
            for parameter, value in zip(self.layer.parameters(), data.weights, strict=True):
                if value is None:
                    parameter.zero_()
                else:
                    parameter.copy_(torch.from_numpy(value))
        self.x = torch.from_numpy(data.x).requires_grad_()
        self.inputs = [self.x, *self.layer.parameters()]
        self.upstream = [
            torch.from_numpy(data.dy),
            *(torch.from_numpy(d).unsqueeze(0) for d in data.dstateT),
        ]

    def __call__(self) -> Any:
        y, state = self.layer(self.x)
        outputs = [y, *state] if isinstance(state, tuple) else [y, state]
        return outputs, self.torch.autograd.grad(outputs, self.inputs, self.upstream)

    def results(self) -> Results:
        outputs, gradients = self()
        arrays = [o.detach().numpy() for o in outputs]
        named: Results = {"y": arrays[0]}
        named |= {k: a[0] for k, a in zip(self.data.cell.states, arrays[1:], strict=True)}
        named |= {
            f"d{k}": g.numpy() for k, g in zip(("x", *self.data.weights._fields), gradients, strict=True)
        }
        if self.data.weights.bias_hh is None:
            del named["dbias_hh"]
        return named

    @property
    def path(self) -> str:
        """Which implementation PyTorch took: oneDNN's fused layer, or one operation after another."""
        found, nodes, seen = "one operation after another", [self()[0][0].grad_fn], 0
        while nodes and seen < 100:
            node, seen = nodes.pop(), seen + 1
            if node is not None:
                if "Mkldnn" in node.name():
                    found = "oneDNN's fused layer"
                nodes += [parent for parent, _ in node.next_functions]
        return found


def unavailable(peer: str) -> str | None:
    """None where the peer can run here, else why not and what to install."""
    if peer == "torch":
        try:
            import torch  # noqa: F401
        except ImportError:
            return "PyTorch is not installed: pip install 'fusedrnn[torch]'"
        return None
    return backends.get(peer).unavailable()


def check(name: str, got: Results, truth: Results, tolerance: float) -> float:
    """The largest error, relative to each tensor's largest entry; ``RuntimeError`` where it is too large."""
    if got.keys() != truth.keys():
        raise RuntimeError(f"{name} returned {sorted(got)}, expected {sorted(truth)}")
    worst = 0.0
    for key, exact in truth.items():
        if got[key].shape != exact.shape:
            raise RuntimeError(f"{name}: {key} has shape {got[key].shape}, expected {exact.shape}")
        error = float(np.max(np.abs(got[key] - exact)) / np.max(np.abs(exact)))
        if not error <= tolerance:  # this way round a NaN fails
            raise RuntimeError(
                f"{name}: {key} is off by {error:.1e} of its largest entry, not {tolerance:.0e}"
            )
        worst = max(worst, error)
    return worst


def time_blocks(
    runs: dict[str, Callable[[], Any]], blocks: int, seconds: float, limit: float
) -> dict[str, list[float]]:
    """Seconds per call of each participant in each block, the participants taking turns.

    A block is about ``seconds`` long for each. One whose blocks would take more than ``limit`` together takes
    part in fewer of them, but at least in three.
    """
    count, share = {}, {}
    for name, run in runs.items():
        run()
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
        count[name] = max(1, round(seconds / once))
        share[name] = min(blocks, max(3, int(limit / (once * (count[name] + 1)))))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for block in range(blocks):
            turn = block % len(names)
            for name in names[turn:] + names[:turn]:
                if block >= share[name]:
                    continue
                run = runs[name]
                # Not counted: the caches fill, and the threads of whoever ran before, which go on spinning
                # for up to 20 ms after their last call, fall asleep. Each is timed as in its own program.
                settled = time.perf_counter() + SETTLE
                while time.perf_counter() < settled:
                    run()
                start = time.perf_counter()
                for _ in range(count[name]):
                    run()
                samples[name].append((time.perf_counter() - start) / count[name])
    finally:
        if collecting:
            gc.enable()
    return samples


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, relative to the median."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


@contextmanager
def same_threads(threads: int | None, peers: Sequence[str]) -> Iterator[int]:
    """Everybody on ``threads`` threads (None: as many as we take by ourselves), and afterwards as before."""
    ours = get_num_threads()
    used = ours if threads is None else threads
    with ExitStack() as after:
        after.callback(set_num_threads, ours)
        set_num_threads(used)
        if "torch" in peers:
            import torch

            after.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(used)
        yield used


def run_problem(
    cell: Cell, shape: Shape, dtype: str, backend: str, peers: Sequence[str], quick: bool
) -> dict[str, Any]:
    """Check and time one problem; a row for the table and the JSON file."""
    data = problems.make(cell, shape, dtype)
    exact = Native(problems.astype(data, np.float64), "reference").results()
    participants: dict[str, Any] = {"fusedrnn": Native(data, backend)}
    for peer in peers:
        participants[peer] = Torch(data) if peer == "torch" else Native(data, peer)
    errors = {
        name: check(name, each.results(), exact, TOLERANCE[dtype]) for name, each in participants.items()
    }
    blocks, seconds, limit = (3, 0.02, 1.0) if quick else (9, 0.1, 5.0)
    samples = time_blocks(participants, blocks, seconds, limit)
    work = problems.flops(cell, shape)
    row: dict[str, Any] = {"shape": list(shape), "participants": {}}
    for name, values in samples.items():
        median = statistics.median(values)
        row["participants"][name] = {
            "ms": median * 1e3,
            "spread": spread(values),
            "gflops": work / median / 1e9,
            "blocks": len(values),
            "error": errors[name],
            "path": participants[name].path,
        }
        if name != "fusedrnn":
            pairs = zip(values, samples["fusedrnn"], strict=False)  # a slow peer has fewer blocks
            row["participants"][name]["ratio"] = statistics.median(theirs / ours for theirs, ours in pairs)
    return row


def run(
    cell: Cell,
    *,
    dtype: str = "float32",
    shapes: Sequence[Shape] = problems.SPEED,
    peers: Sequence[str] = ("reference", "torch"),
    backend: str | None = None,
    threads: int | None = None,
    quick: bool = False,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Run the benchmark; what it returns is what ``--json`` writes.

    Raises:
        RuntimeError: a participant's results are wrong, or a peer cannot run here.
    """
    chosen = backends.usable(backend).name
    peers = [peer for peer in peers if peer != chosen]
    for peer in peers:
        if (why := unavailable(peer)) is not None:
            raise RuntimeError(f"peer {peer}: {why}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    rows = []
    with same_threads(threads, peers) as used:
        for shape in shapes:
            rows.append(run_problem(cell, shape, dtype, chosen, peers, quick))
            progress(rows[-1])
    means = {
        peer: math.exp(statistics.fmean(math.log(row["participants"][peer]["ratio"]) for row in rows))
        for peer in peers
    }
    return {
        "cell": cell.name,
        "dtype": dtype,
        "backend": chosen,
        "threads": used,
        "quick": quick,
        "environment": system.environment() | {"load before": load},
        "rows": rows,
        "geometric_mean": means,
    }


def table(report: dict[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and rows of the table that people read."""
    peers = list(report["geometric_mean"])
    header = ["T,B,I,H", "ms", "±", "GFLOP/s"]
    for peer in peers:
        header += [f"{peer} ms", "±", "ratio"]
    rows = []
    for row in report["rows"]:
        ours = row["participants"]["fusedrnn"]
        cells = [
            ",".join(map(str, row["shape"])),
            f"{ours['ms']:.3g}",
            f"{ours['spread']:.0%}",
            f"{ours['gflops']:.1f}",
        ]
        for peer in peers:
            theirs = row["participants"][peer]
            cells += [f"{theirs['ms']:.3g}", f"{theirs['spread']:.0%}", f"{theirs['ratio']:.2f}"]
        rows.append(cells)
    title = (
        f"{report['cell']}, {report['dtype']}, forward + backward, backend {report['backend']}, "
        f"{report['threads']} thread(s); ratio = peer / fusedrnn"
    )
    return title, header, rows


def summary(report: dict[str, Any]) -> list[str]:
    """The lines under the table: geometric means, what PyTorch ran, what the reference's threads are."""
    found = report["environment"]
    means = report["geometric_mean"]
    lines = [f"{peer}: geometric mean of the ratios {mean:.2f}" for peer, mean in means.items()]
    if "torch" in means:
        paths = {row["participants"]["torch"]["path"] for row in report["rows"]}
        lines.append(f"PyTorch {found['torch']} took: {', '.join(sorted(paths))}")
    if "reference" in means:
        lines.append("reference: NumPy, its matrix products with as many threads as NumPy's BLAS takes")
    machine = found["machine"]
    processor = machine.get("model name", machine["architecture"])
    lines.append(f"{processor}, {machine['cores']} cores, {found['date']}")
    load = found["load before"]
    if load is not None and load > machine["cores"] / 4:
        lines.append(
            f"the machine was busy when this began (load average {load:.1f}): measure again for figures"
        )
    return lines


def save(report: dict[str, Any], path: str) -> None:
    """Write the report as JSON."""
    Path(path).write_text(json.dumps(report, indent=1) + "\n")
