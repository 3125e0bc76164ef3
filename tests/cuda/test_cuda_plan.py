"""How a call is cut on a GPU: ``plans`` by itself."""

from __future__ import annotations

import itertools

import pytest

from fusedrnn.backends.cuda.jobs import kernels_of
from fusedrnn.backends.cuda.plans import Layout, Limits, Tile, choose
from fusedrnn.cells import gru, lstm, rnn
from problems import PLAIN, name

H100 = Limits(132, 227 * 1024, 8, 8)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("cell", PLAIN, ids=name)
def test_every_plan_can_run(cell, backward):
    kernels = kernels_of(cell)
    seen = set()
    for B, H, itemsize, precision, (sms, shared, warps, cluster) in itertools.product(
        (1, 2, 7, 64, 300),
        (1, 5, 33, 100, 192, 256, 1000, 4096),
        (4, 8),
        ("ieee", "tf32", "bf16"),
        (H100, (2, 40_000, 2, 0), (48, 99 * 1024, 8, 0)),
    ):
        device = Limits(sms, shared, warps, cluster)
        plan = choose(kernels, 10, B, H, itemsize, device, precision=precision, backward=backward)
        seen.add(plan.kernel)
        if plan.kernel == "steps":
            continue
        across, tiles = plan.blocks
        R, tile = kernels.recurrent.count, Tile.of(itemsize, precision)
        K, columns = (R * H, plan.units) if backward else (H, R * plan.units)
        registers = plan.kernel.endswith("_registers")
        layout = Layout.of(plan.rows, columns, tile.columns, warps, registers)
        assert plan.shared <= shared
        assert (across, tiles) == (-(-H // plan.units), -(-B // plan.rows))
        assert layout.rows >= plan.rows
        assert layout.columns >= columns
        assert plan.at_once > 0 == plan.at_once % 8
        if plan.kernel.startswith("cluster"):
            assert across <= cluster
            assert (plan.at_once, plan.chunk) == (layout.rows, K)
        else:
            assert across * tiles <= sms
            assert plan.chunk > 0 == plan.chunk % 32
        if registers:
            assert plan.rows * plan.units <= 2 * 32 * warps
            assert layout.column_tiles * layout.splits == warps
            assert 32 * tile.kept * layout.splits >= K
            assert plan.chunk >= K
    assert (
        seen == {"steps"} if kernels.two_phases else seen >= {"steps", "cluster_registers", "grid_registers"}
    )


def test_the_choice():
    def kernel(cell, T, B, H, itemsize=4, **options):
        return choose(kernels_of(cell), T, B, H, itemsize, H100, **options).kernel

    assert kernel(lstm, 1, 16, 256) == "steps"  # one step
    assert kernel(gru.with_options(reset_after=False), 50, 16, 256) == "steps"
    assert kernel(lstm, 50, 16, 128) == kernel(lstm, 50, 16, 256, precision="tf32") == "cluster_registers"
    assert kernel(lstm, 50, 16, 256) == "grid_registers"
    assert kernel(lstm, 50, 16, 312, precision="tf32") == "cluster"
    assert kernel(lstm, 50, 16, 448, precision="fp16") == "cluster"
    for B, precision in itertools.product((1, 16, 64), ("ieee", "bf16")):
        for H, backward in itertools.product((512, 768, 1024), (False, True)):
            wanted = "grid_registers"
            assert kernel(lstm, 50, B, H, precision=precision, backward=backward) == wanted
    assert kernel(lstm, 50, 64, 1024, precision="tf32") == "grid_registers"
    assert kernel(lstm, 50, 64, 512, precision="tf32", backward=True) == "grid_registers"
    assert kernel(lstm, 50, 64, 1024, precision="tf32", backward=True) == "grid"
    assert kernel(lstm, 50, 16, 4096) == "steps"  # no place for all blocks at once
    assert kernel(lstm, 50, 16, 256, forced="grid") == "grid"
    with pytest.raises(
        ValueError, match=r"^kernel: 'grid' cannot run Lstm with B = 16, H = 4096 on this GPU"
    ):
        kernel(lstm, 50, 16, 4096, forced="grid")


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize("B", [1, 16, 64])
@pytest.mark.parametrize("cell", [lstm, gru], ids=name)
def test_goals_run_in_one_launch(cell, B, precision):
    """Where a goal is set, 192 < H <= 1024, no call of an H100 goes step by step."""
    for H, backward in itertools.product(range(193, 1025), (False, True)):
        plan = choose(kernels_of(cell), 50, B, H, 4, H100, precision=precision, backward=backward)
        assert plan.kernel != "steps", H


def test_more_rows_than_places_wait():
    """Clusters that find no place wait for others to end; a grid has no more blocks than run at once."""
    plan = choose(kernels_of(rnn), 50, 4096, 64, 4, H100)
    assert plan.kernel.startswith("cluster")
    assert plan.blocks[0] * plan.blocks[1] > 132
    assert choose(kernels_of(rnn), 50, 4096, 2048, 4, H100).kernel in ("grid", "grid_registers", "steps")
