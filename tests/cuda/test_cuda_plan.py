"""How a call is tiled on a GPU: ``cuda_plan`` by itself, and what the emulated device can run of it."""

from __future__ import annotations

import itertools
import math

import pytest

import emulated
from fusedrnn.backends import cuda_plan
from fusedrnn.backends.cuda_jobs import kernels_of
from fusedrnn.cells import GRU, LSTM, RNN
from problems import CELLS, name

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")

cells = pytest.mark.parametrize("cell", CELLS, ids=name)
H100 = cuda_plan.Device(132, 227 * 1024, 8, 8)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@cells
def test_every_plan_can_run(cell, backward):
    kernels = kernels_of(cell)
    seen = set()
    for B, H, itemsize, tile, (sms, shared, warps, cluster) in itertools.product(
        (1, 2, 7, 64, 300),
        (1, 5, 33, 100, 256, 1000, 4096),
        (4, 8),
        (8, 16),
        (H100, (2, 40_000, 2, 0), (48, 99 * 1024, 8, 0)),
    ):
        device = cuda_plan.Device(sms, shared, warps, cluster)
        precision = "ieee" if tile == 8 else "tf32"
        plan = cuda_plan.choose(kernels, 10, B, H, itemsize, device, precision=precision, backward=backward)
        seen.add(plan.kernel)
        if plan.kernel == "steps":
            continue
        across, tiles = plan.blocks
        assert plan.shared <= shared
        assert across == -(-H // plan.units)
        assert tiles == -(-B // plan.rows)
        per_unit = 1 if backward else kernels.recurrent.count
        K = kernels.recurrent.count * H if backward else H
        if plan.kernel.startswith("cluster"):
            assert across <= cluster
        else:
            assert across * tiles <= sms
            assert plan.chunk > 0 == plan.chunk % 32
            assert plan.at_once > 0 == plan.at_once % 8
        if plan.kernel != "cluster":
            assert plan.units * per_unit <= tile * warps
        if plan.kernel.endswith("_registers"):
            assert plan.rows * plan.units <= 2 * 32 * warps
            column_tiles = 2 ** max(0, math.ceil(math.log2(plan.units * per_unit / tile)))
            kept = 4 if itemsize == 8 else 128 // tile
            assert kept * (warps // column_tiles) >= -(-K // 32)
            assert plan.chunk >= K or plan.kernel == "cluster_registers"
    # "cluster" is where there is no room in registers, which test_the_choice has a case of.
    assert seen | {"cluster"} == ({"steps", "cluster"} if kernels.two_phases else set(cuda_plan.KERNELS))


def test_the_choice():
    def kernel(cell, T, B, H, itemsize=4, **options):
        return cuda_plan.choose(kernels_of(cell), T, B, H, itemsize, H100, **options).kernel

    assert kernel(LSTM(), 1, 16, 256) == "steps"  # one step
    assert kernel(GRU(reset_after=False), 50, 16, 256) == "steps"
    assert kernel(LSTM(), 50, 16, 64) == "cluster_registers"
    assert kernel(RNN(), 50, 300, 192, 8) == "cluster"
    assert kernel(LSTM(), 50, 16, 512) == "grid_registers"
    assert kernel(LSTM(), 50, 16, 1024) == "grid_registers"
    assert kernel(LSTM(), 50, 16, 1024, backward=True) == "grid_registers"  # one tile of rows at a time
    assert kernel(LSTM(), 50, 16, 1024, precision="tf32", backward=True) == "grid"
    assert kernel(LSTM(), 50, 16, 4096) == "steps"  # no place for all blocks at once
    assert kernel(RNN(), 50, 8, 8000) == "grid_streamed"
    assert kernel(RNN(), 50, 200, 8000) == "steps"  # would read its weights many times a step
    assert kernel(LSTM(), 50, 16, 256, forced="grid_streamed") == "grid_streamed"
    with pytest.raises(
        ValueError, match=r"^kernel: 'grid' cannot run Lstm with B = 16, H = 4096 on this GPU"
    ):
        kernel(LSTM(), 50, 16, 4096, forced="grid")


def test_more_batch_or_units_cost_no_less():
    """The count behind the choice grows with the work."""
    for cell, backward in itertools.product((RNN(), LSTM(), GRU()), (False, True)):

        def cost(B, H, cell=cell, backward=backward):
            found = cuda_plan.candidates("grid_streamed", kernels_of(cell), B, H, 4, H100, backward=backward)
            return min(found).cost

        for B, H in itertools.product((1, 16, 128), (64, 256, 512)):
            assert cost(2 * B, H) >= cost(B, H)
            assert cost(B, 2 * H) >= cost(B, H)
