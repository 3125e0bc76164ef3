"""How a call runs on a GPU: step by step, or all steps in one launch, and then how the work is cut.

No kernel has been measured on a GPU. So the choice is a list with a reason for each row, not a cost model:
the first kernel of ``WHOLE`` that can run it, by the first cut that fits. After these, and for a single step,
"steps": weights that fit nowhere are read anew in every step, as cuBLAS does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from fusedrnn.backends.cuda.cupy_device import CupyDevice
from fusedrnn.backends.cuda.jobs import CellKernels
from fusedrnn.backends.protocol import Unsupported

ROWS = 8  # of a warp's tile; kRows in csrc/cuda/tile.h
WARP = 32
# Weights stay in registers, of which each multiprocessor has 128 KiB for them: in float32 loads from shared
# memory would take as long as the multiplications.
WHOLE = (
    "cluster",  # 8 blocks, with the shortest way between them: LSTM up to H = 256, in ieee 128
    "grid",  # all multiprocessors: LSTM up to H = 1024
)


class Plan(NamedTuple):
    """``kernel`` is one of ``nvrtc.KERNELS``; the rest is of those with all steps in one launch."""

    kernel: str
    units: int = 0  # hidden units of a block
    rows: int = 0  # of the batch, of a block
    blocks: tuple[int, int] = (0, 0)
    shared: int = 0  # bytes of a block
    splits: int = 0  # of k, in a block
    at_once: int = 0  # rows of what a grid multiplies in shared memory
    exchanged: int = 0  # bytes by which the blocks of a grid exchange it

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
    def of(cls, compute: int, precision: str, narrow: bool) -> Tile:
        """``compute``: bytes of a number that is computed in; ``narrow``: 8 columns."""
        if precision == "ieee":
            return cls(8, 16, 4) if compute == 4 else cls(8, 4, 8)
        tile = cls(16, 8, 4) if precision == "tf32" else cls(16, 16, 2)
        return tile._replace(columns=8, kept=2 * tile.kept) if narrow else tile

    def row(self, K: int) -> int:
        """Bytes of K factors in shared memory; ``pitch_of`` in csrc/cuda/product.h."""
        whole = WARP if self.factor >= 4 else 2 * WARP
        return -(-K // whole) * whole * self.factor + 16


def cut(
    kernel: str,
    cell: CellKernels,
    B: int,
    H: int,
    compute: int,
    device: CupyDevice,
    precision: str,
    backward: bool,
    units: int,
    rows: int,
) -> Plan | None:
    """The plan with so many units and rows of a block, or None where it does not fit."""
    cluster, R = kernel == "cluster", cell.recurrent.count
    tile = Tile.of(compute, precision, backward and not cluster)
    K, columns = (R * H, units) if backward else (H, R * units)
    across, tiles = device.cluster if cluster else -(-H // units), -(-B // rows)
    if across * units < H or not (cluster or across * tiles <= device.multiprocessors):
        return None
    column_tiles = 1 << (-(-columns // tile.columns) - 1).bit_length()  # a power of two
    row_tiles, splits = -(-rows // ROWS), device.warps // column_tiles
    if splits * tile.kept * WARP < K or rows * units > 2 * WARP * device.warps:
        return None
    group = ROWS * tile.row(K)  # bytes of a tile's rows
    sums = splits * row_tiles * ROWS * column_tiles * tile.columns * compute
    most = (device.shared_bytes - sums) // group
    if most < (2 * row_tiles if cluster else 1):
        return None
    if cluster:
        return Plan(kernel, units, rows, (across, tiles), sums + 2 * row_tiles * group, splits)
    at_once = -(-row_tiles // -(-row_tiles // most))  # in equal parts
    exchanged = 2 * tiles * row_tiles * group
    return Plan(
        kernel, units, rows, (across, tiles), sums + at_once * group, splits, ROWS * at_once, exchanged
    )


def cuts(kernel: str, B: int, H: int, device: CupyDevice) -> Iterator[tuple[int, int]]:
    """Units and rows of a block, the best first.

    A cluster has as many blocks as it can, and as many run side by side as have a place; where their rows
    are too many for a block, there are more clusters, which wait. A grid has as many tiles of the batch as
    leave 8 rows to each, since h of fewer rows comes to a block in every step; then fewer, of more blocks,
    which have fewer weights each.
    """
    if kernel == "cluster":
        if device.cluster:
            places = max(1, device.multiprocessors // device.cluster)
            for rows in range(-(-B // places), 0, -1):
                yield -(-H // device.cluster), rows
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
    device: CupyDevice,
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
    for kernel in WHOLE if forced is None else (forced,):
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
