"""How a call runs on a GPU: step by step, or all steps in one launch, and then how the work is cut.

The choice follows a rough count of the work of a step (``_cost``). It has never been measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fusedrnn.backends.cuda_jobs import CellKernels

KERNELS = ("steps", "grid", "grid_streamed")
TILE = 8  # rows and columns of a warp's tile; IeeeTile in csrc/cuda/tile.h
WARP = 32
CHUNK = 8 * WARP  # of k, brought to shared memory at a time; kChunk in csrc/cuda/grid.h
PAD = 4  # elements between rows of factors; kPad there


class Device(NamedTuple):
    """What the plan depends on; see ``cuda_device.Device``."""

    multiprocessors: int
    shared_bytes: int
    warps: int


class Plan(NamedTuple):
    """``kernel`` is one of ``KERNELS``; the rest is of those with all steps in one launch."""

    kernel: str
    units: int = 0  # hidden units of a block
    rows: int = 0  # of the batch, of a block
    blocks: tuple[int, int] = (0, 0)
    shared: int = 0  # bytes of a block

    def __str__(self) -> str:
        if self.kernel == "steps":
            return "steps"
        x, y = self.blocks
        return f"{self.kernel}, {x}x{y} blocks of {self.units} units and {self.rows} rows, {self.shared} B"


class Layout(NamedTuple):
    """How the warps of a block share a product; the same as ``Layout`` in csrc/cuda/grid.h."""

    column_tiles: int
    row_tiles: int
    splits: int  # of k

    @classmethod
    def of(cls, rows: int, columns: int, warps: int) -> Layout:
        column_tiles = row_tiles = 1
        while column_tiles * TILE < columns:
            column_tiles *= 2
        while row_tiles * TILE < rows and row_tiles * column_tiles < warps:
            row_tiles *= 2
        return cls(column_tiles, row_tiles, warps // (column_tiles * row_tiles))


def shared_elements(layout: Layout, K: int, rows: int, units: int, resident: bool) -> int:
    """Elements of a block's shared memory; ``Shared`` in csrc/cuda/grid.h."""
    weights = layout.column_tiles * TILE * (-(-K // WARP) * WARP + PAD) if resident else 0
    staged = layout.row_tiles * TILE * (CHUNK + PAD)
    sums = layout.splits * layout.row_tiles * layout.column_tiles * TILE * TILE
    return weights + staged + sums + 2 * rows * units


def choose(
    cell: CellKernels,
    T: int,
    B: int,
    H: int,
    itemsize: int,
    device: Device,
    *,
    backward: bool = False,
    forced: str | None = None,
) -> Plan:
    """The plan of one pass.

    Unless ``forced``: step by step where there is a single step or the cell has two phases; else all steps in
    one launch where the weights fit the blocks' shared memory, or where every block passes once through its
    weights in a step, as the product of step by step does too.

    Raises:
        ValueError: The kernel that is forced cannot run this.
    """
    steps = Plan("steps")
    if T == 0 or B == 0 or forced == "steps" or (forced is None and (T == 1 or cell.two_phases)):
        return steps
    if cell.two_phases:
        raise ValueError(f"kernel: {forced!r} cannot run {cell.type}, which has two phases; use 'steps'")
    for kernel in KERNELS[1:] if forced is None else (forced,):
        plans = list(_plans(kernel, cell, B, H, itemsize, device, backward))
        if forced is None and kernel == "grid_streamed":
            plans = [(cost, groups, plan) for cost, groups, plan in plans if groups == 1]
        if plans:
            return min(plans)[2]
    if forced is None:
        return steps
    raise ValueError(
        f"kernel: {forced!r} cannot run {cell.type} with B = {B}, H = {H} on this GPU, of "
        f"{device.multiprocessors} multiprocessors with {device.shared_bytes} bytes of shared memory a block"
    )


def _plans(
    kernel: str, cell: CellKernels, B: int, H: int, itemsize: int, device: Device, backward: bool
) -> Iterator[tuple[float, int, Plan]]:
    """Every cut of the work that runs at once, one block on each multiprocessor: its cost, groups, plan."""
    R, warps = cell.recurrent.count, device.warps
    K, per_unit = (R * H, 1) if backward else (H, R)
    resident = kernel == "grid"
    for units in range(1, min(H, TILE * warps // per_unit) + 1):
        across = -(-H // units)
        for tiles in range(1, min(B, device.multiprocessors // across) + 1):
            rows = -(-B // tiles)
            if -(-B // rows) != tiles:
                continue  # fewer tiles of as many rows do
            layout = Layout.of(rows, units * per_unit, warps)
            shared = itemsize * shared_elements(layout, K, rows, units, resident)
            if shared <= device.shared_bytes:
                groups = -(-rows // (layout.row_tiles * TILE))
                plan = Plan(kernel, units, rows, (across, tiles), shared)
                yield _cost(layout, K, groups, across * tiles, warps), groups, plan


def _cost(layout: Layout, K: int, groups: int, blocks: int, warps: int) -> float:
    """Rough count of a block's instructions in a step: products, staging, sums; and of waiting for others."""
    multiply = TILE * TILE * -(-K // (WARP * layout.splits))
    stage = 4 * layout.row_tiles * TILE * K / (WARP * warps)
    return groups * (multiply + stage + 8 * TILE * TILE) + blocks
