"""How a call runs on a GPU: step by step, or all steps in one launch, and then how the work is tiled.

The choice follows a rough count of the work of a step (``_cost``). It has never been measured on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from fusedrnn.backends import cuda_compile
from fusedrnn.backends.cuda_jobs import CellKernels
from fusedrnn.backends.protocol import Unsupported

KERNELS = cuda_compile.KERNELS
ROWS = 8  # of a warp's tile; kRows in csrc/cuda/tile.h
WARP = 32
CHUNK = 8 * WARP  # of k, that a block must be able to bring to shared memory at a time, or all


class Device(NamedTuple):
    """What the plan depends on; see ``cuda_device.Device``."""

    multiprocessors: int
    shared_bytes: int
    warps: int
    cluster: int


class Plan(NamedTuple):
    """``kernel`` is one of ``KERNELS``; the rest is of those with all steps in one launch."""

    kernel: str
    units: int = 0  # hidden units of a block
    rows: int = 0  # of the batch, of a block
    blocks: tuple[int, int] = (0, 0)
    shared: int = 0  # bytes of a block
    # Brought to shared memory at a time, rows and k; not of clusters, which have it all there.
    at_once: int = 0
    chunk: int = 0

    def __str__(self) -> str:
        if self.kernel == "steps":
            return "steps"
        x, y = self.blocks
        return f"{self.kernel}, {x}x{y} blocks of {self.units} units and {self.rows} rows, {self.shared} B"


class Tile(NamedTuple):
    """Of a warp's product, csrc/cuda/tile.h; counts are of a lane, for 32 k."""

    columns: int
    row_words: int  # that are loaded
    column_words: int
    multiply: int  # in time: multiplications in float that a lane can do meanwhile
    end: int  # the same, of the sums once all k are added
    kept: int  # times 32 k that fit into registers

    @classmethod
    def of(cls, compute: int, precision: str) -> Tile:
        """``compute``: bytes of a number that is computed in."""
        return TILES["float64" if compute == 8 else precision]


# A matrix instruction counts as eight multiplications in float: as often as a multiprocessor begins one.
TILES = {
    "ieee": Tile(8, 8, 8, 64, 400, 16),
    "float64": Tile(8, 16, 16, 128, 800, 4),
    "tf32": Tile(16, 8, 16, 4 * 8, 20, 8),
    "tf32x3": Tile(16, 8, 16, 3 * 4 * 8, 20, 3),
    "bf16": Tile(16, 4, 8, 2 * 8, 20, 16),
    "fp16": Tile(16, 4, 8, 2 * 8, 20, 16),
}
LOAD = 4  # a word from shared memory, in multiplications: a multiprocessor does so many more of these
# In the same unit, which is two clocks: a way through the L2 cache, of over 300 clocks. The end of a step is
# three of them, to release, to see the count and to read what the others wrote; a cluster has one between its
# blocks, of over 200.
L2_TRIP = 160
GRID_BARRIER, CLUSTER_BARRIER = 3 * L2_TRIP, 120


class Layout(NamedTuple):
    """How the warps of a block share a product; the same as ``Layout`` in csrc/cuda/grid.h."""

    tile_columns: int
    column_tiles: int
    row_tiles: int
    splits: int  # of k

    @classmethod
    def of(cls, rows: int, columns: int, tile_columns: int, warps: int, registers: bool = False) -> Layout:
        column_tiles = row_tiles = 1
        while column_tiles * tile_columns < columns:
            column_tiles *= 2
        if registers:
            return cls(tile_columns, column_tiles, -(-rows // ROWS), warps // column_tiles)
        while row_tiles * ROWS < rows and row_tiles * column_tiles < warps:
            row_tiles *= 2
        return cls(tile_columns, column_tiles, row_tiles, warps // (column_tiles * row_tiles))

    @classmethod
    def of_cluster(cls, rows: int, columns: int, tile_columns: int, warps: int) -> Layout:
        """That of ``ClusterShared`` in csrc/cuda/cluster.h, where a warp may have several tiles."""
        column_tiles, row_tiles, splits = -(-columns // tile_columns), -(-rows // ROWS), 1
        while splits * 2 * column_tiles * row_tiles <= warps:
            splits *= 2
        return cls(tile_columns, column_tiles, row_tiles, splits)

    @property
    def rows(self) -> int:
        """That the tiles have together."""
        return self.row_tiles * ROWS

    @property
    def columns(self) -> int:
        """That the tiles have together."""
        return self.column_tiles * self.tile_columns


def layout_of(kernel: str, rows: int, columns: int, tile_columns: int, warps: int) -> Layout:
    """That of the kernel's blocks."""
    if kernel == "cluster":
        return Layout.of_cluster(rows, columns, tile_columns, warps)
    return Layout.of(rows, columns, tile_columns, warps, kernel.endswith("_registers"))


class Bytes(NamedTuple):
    """Of a number in shared memory."""

    compute: int  # sums and states
    factor: int  # of a product; ``Factor`` in csrc/cuda/tile.h

    @classmethod
    def of(cls, compute: int, precision: str) -> Bytes:
        return cls(compute, {"ieee": compute, "fp16": 2, "bf16": 2}.get(precision, 4))

    def row(self, K: int) -> int:
        """Of K factors; ``pitch_of`` in csrc/cuda/grid.h."""
        whole = WARP if self.factor >= 4 else 2 * WARP
        return -(-K // whole) * whole * self.factor + 16


def shared_bytes(
    kernel: str,
    layout: Layout,
    columns: int,
    K: int,
    staged: tuple[int, int],
    rows: int,
    units: int,
    each: Bytes,
) -> int:
    """Of a block's shared memory, ``staged`` rows and k at a time; ``Shared`` in csrc/cuda/grid.h,
    ``ClusterShared`` in cluster.h."""
    name, _, elsewhere = kernel.partition("_")
    weights = 0 if elsewhere else columns * each.row(K)
    at_once, chunk = staged
    operands = 2 * layout.rows * each.row(K) if name == "cluster" else at_once * each.row(chunk)
    sums = layout.splits * layout.rows * layout.columns
    state = 0 if elsewhere == "registers" else 2 * rows * units
    return weights + operands + each.compute * (sums + state)


def _staged(
    kernel: str, layout: Layout, columns: int, K: int, rows: int, units: int, each: Bytes, most: int
) -> tuple[int, int] | None:
    """As many rows, with all k, or as much of k, of all rows of a layout, at a time as so much shared memory
    holds, in equal parts; None where that is too little."""
    left = most - shared_bytes(kernel, layout, columns, K, (0, 0), rows, units, each)
    if kernel == "grid_registers":
        fit = left // (ROWS * each.row(K))
        if fit < 1:
            return None
        parts = -(-layout.row_tiles // fit)
        return ROWS * -(-layout.row_tiles // parts), -(-K // WARP) * WARP
    fit = (left // layout.rows - each.row(0)) // each.factor // (2 * WARP) * (2 * WARP)
    if fit < min(CHUNK, K):
        return None
    parts = -(-K // fit)
    return layout.rows, -(-K // (parts * WARP)) * WARP


def _fits_registers(layout: Layout, K: int, rows: int, units: int, tile: Tile, warps: int) -> bool:
    """Whether threads can keep the weights, and the state of two units each; see csrc/cuda/grid.h."""
    return layout.splits * tile.kept * WARP >= K and rows * units <= 2 * WARP * warps


def choose(
    cell: CellKernels,
    T: int,
    B: int,
    H: int,
    compute: int,
    device: Device,
    *,
    precision: str = "ieee",
    backward: bool = False,
    forced: str | None = None,
) -> Plan:
    """The plan of one pass; ``compute``: bytes of a number that is computed in.

    Unless ``forced``: step by step where there is a single step or the cell has no other variant; else all
    steps in one launch, by clusters or by the whole grid where the weights fit the blocks' shared memory, or
    where every block passes once through its weights in a step, as the product of step by step does too.

    Raises:
        ValueError: The kernel that is forced cannot run this.
    """
    steps = Plan("steps")
    if T == 0 or B == 0 or forced == "steps" or (forced is None and (T == 1 or not cell.whole)):
        return steps
    if not cell.whole:
        options = {"recurrent dropout or zoneout": cell.regularized, "layer norm": cell.layer_norm}
        why = next((name for name, there in options.items() if there), "two phases")
        raise Unsupported(f"kernel: {forced!r} cannot run {cell.type}, which has {why}; use 'steps'")
    plan = _best(cell, B, H, compute, device, precision, backward, forced)
    if plan is not None or forced is None:
        return plan or steps
    raise ValueError(
        f"kernel: {forced!r} cannot run {cell.type} with B = {B}, H = {H} on this GPU: its "
        f"{device.multiprocessors} multiprocessors of {device.shared_bytes} bytes of shared memory"
        f"{'' if device.cluster else ', without clusters,'} do not hold it"
    )


@functools.lru_cache(1024)  # to go through all candidates takes milliseconds
def _best(
    cell: CellKernels,
    B: int,
    H: int,
    compute: int,
    device: Device,
    precision: str,
    backward: bool,
    forced: str | None,
) -> Plan | None:
    """The plan of all steps in one launch, if there is one."""
    resident = ("cluster_registers", "cluster", "grid_registers", "grid")
    for kernels in (resident, ("grid_streamed",)) if forced is None else ((forced,),):
        found = [
            candidate
            for kernel in kernels
            for candidate in candidates(
                kernel, cell, B, H, compute, device, precision=precision, backward=backward
            )
        ]
        if forced is None and kernels == ("grid_streamed",):
            found = [candidate for candidate in found if candidate.groups == 1]
        if found:
            return min(found).plan
    return None


class Candidate(NamedTuple):
    """A plan of all steps in one launch; the least is the best."""

    cost: float  # a rough count, see ``_cost``
    groups: int  # of rows, that a block takes one after the other
    plan: Plan


def candidates(
    kernel: str,
    cell: CellKernels,
    B: int,
    H: int,
    compute: int,
    device: Device,
    *,
    precision: str = "ieee",
    backward: bool = False,
) -> Iterator[Candidate]:
    """Every plan with which this kernel, of all steps, can run; arguments as for ``choose``."""
    tile, each = Tile.of(compute, precision), Bytes.of(compute, precision)
    R, warps = cell.recurrent.count, device.warps
    K, per_unit = (R * H, 1) if backward else (H, R)
    cluster, registers = kernel.startswith("cluster"), kernel.endswith("_registers")
    # A warp has one tile of columns, or as many as there are.
    widest = H if kernel == "cluster" else min(H, tile.columns * warps // per_unit)
    for units in range(1, widest + 1):
        across = -(-H // units)
        if cluster and (across > device.cluster or -(-H // across) != units):
            continue
        # Clusters that find no place wait for others to end; the blocks of a grid all run at once.
        for tiles in range(1, (B if cluster else min(B, device.multiprocessors // across)) + 1):
            rows = -(-B // tiles)
            if -(-B // rows) != tiles:
                continue  # fewer tiles of as many rows do
            columns = units * per_unit
            layout = layout_of(kernel, rows, columns, tile.columns, warps)
            if registers and not _fits_registers(layout, K, rows, units, tile, warps):
                continue
            staged: tuple[int, int] | None = (0, 0)
            if not cluster:
                staged = _staged(kernel, layout, columns, K, rows, units, each, device.shared_bytes)
            if staged is None:
                continue
            shared = shared_bytes(kernel, layout, columns, K, staged, rows, units, each)
            if shared > device.shared_bytes:
                continue
            plan = Plan(kernel, units, rows, (across, tiles), shared, *staged)
            groups, work = 1, _cost(layout, K, warps, tile, registers)
            if cluster:
                # Of the exchange: a store for each unit, row and block of the cluster.
                give = 4 * across * units * rows * (R if backward else 1) / (WARP * warps)
                cost = -(-across * tiles // device.multiprocessors) * (work + give + CLUSTER_BARRIER)
            else:
                groups = -(-rows // layout.rows)
                stage = 4 * layout.rows * K / (WARP * warps)
                at_once, chunk = staged
                trips = groups * -(-layout.rows // at_once) * -(-K // chunk)  # the first is in the barrier
                cost = groups * (work + stage) + (trips - 1) * L2_TRIP + across * tiles + GRID_BARRIER
            yield Candidate(cost, groups, plan)


def _cost(layout: Layout, K: int, warps: int, tile: Tile, registers: bool) -> float:
    """Rough count of the product of a step, in multiplications of a lane: loads, multiplications, sums."""
    tiles = -(-layout.column_tiles * layout.row_tiles * layout.splits // warps)  # of a warp
    words = tile.row_words + (0 if registers else tile.column_words)
    return tiles * (-(-K // (WARP * layout.splits)) * (tile.multiply + LOAD * words) + tile.end)
