"""How a call runs on a GPU: step by step, or all steps in one launch, and then how the work is cut.

No kernel has been measured on a GPU. So the choice is a list with a reason for each row, not a cost model:
the first kernel of ``MATRIX_UNITS`` or ``IEEE`` that can run it, by the first cut that fits. A multiprocessor
of an H100 has 128 KiB of weights in registers, or 227 KiB in shared memory, of which it reads 128 bytes in a
cycle.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from fusedrnn.backends.cuda.jobs import CellKernels
from fusedrnn.backends.protocol import Unsupported

ROWS = 8  # of a warp's tile; kRows in csrc/cuda/tile.h
WARP = 32
CHUNK = 8 * WARP  # of k, that a block must be able to bring to shared memory at a time, or all

# After these, and for a single step, "steps": weights that fit nowhere are read anew in every step, as cuBLAS
# does.
MATRIX_UNITS = (
    # 8 blocks, with the shortest way between them. TF32 at H = 256 would read 128 KiB of weights from shared
    # memory in every step, half a microsecond.
    "cluster_registers",
    # LSTM up to H = 448 in 16 bits, 312 in TF32; a grid's barrier takes longer than these reads.
    "cluster",
    # All multiprocessors: LSTM up to H = 1024, but for TF32 going back above 512,
    "grid_registers",
    # which takes this.
    "grid",
)
# Without them 8 blocks take longer to multiply than all of them to meet, but for small H, whose weights fit
# registers. Loads of weights from shared memory would take as long as the multiplications.
IEEE = ("cluster_registers", "grid_registers", "cluster", "grid")


class Limits(NamedTuple):
    """What a plan depends on; see ``device.Device``."""

    multiprocessors: int
    shared_bytes: int
    warps: int
    cluster: int


class Plan(NamedTuple):
    """``kernel`` is one of ``nvrtc.KERNELS``; the rest is of those with all steps in one launch."""

    kernel: str
    units: int = 0  # hidden units of a block
    rows: int = 0  # of the batch, of a block
    blocks: tuple[int, int] = (0, 0)
    shared: int = 0  # bytes of a block
    at_once: int = 0  # rows of operands in shared memory
    chunk: int = 0  # and k of each

    def __str__(self) -> str:
        if self.kernel == "steps":
            return "steps"
        x, y = self.blocks
        return f"{self.kernel}, {x}x{y} blocks of {self.units} units and {self.rows} rows, {self.shared} B"


class Tile(NamedTuple):
    """Of a warp's product; ``TileOf`` in csrc/cuda/tile.h."""

    columns: int
    kept: int  # times 32 k of its columns fit into registers
    factor: int  # bytes of a factor in shared memory

    @classmethod
    def of(cls, compute: int, precision: str) -> Tile:
        """``compute``: bytes of a number that is computed in."""
        return TILES["float64" if compute == 8 else precision]

    def row(self, K: int) -> int:
        """Bytes of K factors in shared memory; ``pitch_of`` in csrc/cuda/product.h."""
        whole = WARP if self.factor >= 4 else 2 * WARP
        return -(-K // whole) * whole * self.factor + 16


TILES = {
    "ieee": Tile(8, 16, 4),
    "float64": Tile(8, 4, 8),
    "tf32": Tile(16, 8, 4),
    "tf32x3": Tile(16, 3, 4),
    "bf16": Tile(16, 16, 2),
    "fp16": Tile(16, 16, 2),
}


class Layout(NamedTuple):
    """How the warps of a block share a product; ``Layout`` in csrc/cuda/product.h."""

    tile_columns: int
    column_tiles: int
    row_tiles: int
    splits: int

    @classmethod
    def of(cls, rows: int, columns: int, tile_columns: int, warps: int, registers: bool) -> Layout:
        """The layout of a matrix of so many rows and columns among the warps of a block."""
        column_tiles, row_tiles, splits = -(-columns // tile_columns), -(-rows // ROWS), 1
        if registers:
            column_tiles = 1 << (column_tiles - 1).bit_length()
            return cls(tile_columns, column_tiles, row_tiles, warps // column_tiles)
        while 2 * splits * column_tiles * row_tiles <= warps:
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


def cut(
    kernel: str,
    cell: CellKernels,
    B: int,
    H: int,
    compute: int,
    device: Limits,
    precision: str,
    backward: bool,
    units: int,
    rows: int,
) -> Plan | None:
    """The plan with so many units and rows of a block, or None where it does not fit."""
    tile, R = Tile.of(compute, precision), cell.recurrent.count
    K, columns = (R * H, units) if backward else (H, R * units)
    cluster, registers = kernel.startswith("cluster"), kernel.endswith("_registers")
    across, tiles = -(-H // units), -(-B // rows)
    layout = Layout.of(rows, columns, tile.columns, device.warps, registers)
    if across > device.cluster if cluster else across * tiles > device.multiprocessors:
        return None
    if registers and (layout.splits * tile.kept * WARP < K or rows * units > 2 * WARP * device.warps):
        return None
    own = 0 if registers else columns * tile.row(K) + 2 * rows * units * compute
    own += layout.splits * layout.rows * layout.columns * compute
    left = device.shared_bytes - own
    at_once, chunk = layout.rows, -(-K // WARP) * WARP
    if cluster:
        chunk = K
        operands = 2 * at_once * tile.row(K)
    elif registers:  # all k of some rows, in equal parts
        most = left // (ROWS * tile.row(K))
        if most < 1:
            return None
        at_once = ROWS * -(-layout.row_tiles // -(-layout.row_tiles // most))
        operands = at_once * tile.row(K)
    else:  # some k of all rows, in equal parts
        most = (left // at_once - 16) // tile.factor // (2 * WARP) * (2 * WARP)
        if most < min(CHUNK, K):
            return None
        chunk = -(-K // (-(-K // most) * WARP)) * WARP
        operands = at_once * tile.row(chunk)
    if operands > left:
        return None
    return Plan(kernel, units, rows, (across, tiles), own + operands, at_once, chunk)


def cuts(kernel: str, B: int, H: int, device: Limits) -> Iterator[tuple[int, int]]:
    """Units and rows of a block, the best first.

    A cluster has as many blocks as it can, and as many run side by side as have a place; where their rows
    are too many for a block, there are more clusters, which wait. A grid has as many tiles of the batch as
    leave 8 rows to each, since h of fewer rows comes to a block in every step; then fewer, of more blocks,
    which have fewer weights each.
    """
    if kernel.startswith("cluster"):
        if device.cluster:
            places = max(1, device.multiprocessors // device.cluster)
            for rows in range(-(-B // places), 0, -1):
                yield -(-H // min(H, device.cluster)), rows
        return
    for tiles in range(min(-(-B // ROWS), device.multiprocessors), 0, -1):
        yield -(-H // min(H, device.multiprocessors // tiles)), -(-B // tiles)


@functools.lru_cache(1024)
def choose(
    cell: CellKernels,
    T: int,
    B: int,
    H: int,
    compute: int,
    device: Limits,
    *,
    precision: str = "ieee",
    backward: bool = False,
    forced: str | None = None,
) -> Plan:
    """The plan of one pass; ``compute``: bytes of a number that is computed in. Unless ``forced``, a single
    step runs as one of "steps", and so does a cell that has no other kernel.

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
    order = IEEE if compute == 8 or precision == "ieee" else MATRIX_UNITS
    for kernel in order if forced is None else (forced,):
        for units, rows in cuts(kernel, B, H, device):
            plan = cut(kernel, cell, B, H, compute, device, precision, backward, units, rows)
            if plan is not None:
                return plan
    if forced is None:
        return steps
    raise ValueError(
        f"kernel: {forced!r} cannot run {cell.type} with B = {B}, H = {H} on this GPU: its "
        f"{device.multiprocessors} multiprocessors of {device.shared_bytes} bytes of shared memory"
        f"{'' if device.cluster else ', without clusters,'} do not hold it"
    )
