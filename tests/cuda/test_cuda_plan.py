"""How a call is cut on a GPU: ``plans`` by itself."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest

from fusedrnn.backends.cuda.jobs import kernels_of
from fusedrnn.backends.cuda.plans import Tile, choose
from fusedrnn.cells import gru, lstm, rnn
from problems import PLAIN, name


class Limits(NamedTuple):
    """What a plan depends on of a device."""

    multiprocessors: int
    shared_bytes: int
    warps: int
    cluster: int


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
        if itemsize == 8 and precision != "ieee":
            continue
        device = Limits(sms, shared, warps, cluster)
        plan = choose(kernels, 10, B, H, itemsize, device, precision, backward)
        seen.add(plan.kernel)
        if plan.kernel == "steps":
            continue
        across, tiles = plan.blocks
        R, tile = kernels.recurrent.count, Tile.of(itemsize, precision, backward and plan.kernel == "grid")
        K, columns = (R * H, plan.units) if backward else (H, R * plan.units)
        row_tiles = -(-plan.rows // 8)
        assert plan.rows * plan.units <= 2 * 32 * warps
        assert warps % plan.splits == 0
        assert warps // plan.splits * tile.columns >= columns
        assert plan.splits * tile.kept * 32 >= K
        assert plan.shared <= shared
        assert tiles == -(-B // plan.rows)
        if plan.kernel == "cluster":
            assert across == cluster
            assert across * plan.units >= H
            assert plan.shared > 2 * 8 * row_tiles * K * tile.factor
        else:
            assert across == -(-H // plan.units)
            assert across * tiles <= sms
            assert 8 * row_tiles >= plan.at_once > 0 == plan.at_once % 8
            assert plan.shared > plan.at_once * K * tile.factor
            assert plan.exchanged == 2 * tiles * row_tiles * 8 * tile.row(K)
    assert seen == {"steps"} if kernels.two_phases else seen == {"steps", "cluster", "grid"}


def test_the_choice():
    def kernel(cell, T, B, H, itemsize=4, **options):
        return choose(kernels_of(cell), T, B, H, itemsize, H100, **options).kernel

    assert kernel(lstm, 1, 16, 256) == "steps"  # one step
    assert kernel(gru.with_options(reset_after=False), 50, 16, 256) == "steps"
    assert kernel(lstm, 50, 16, 128) == kernel(lstm, 50, 16, 256, precision="tf32") == "cluster"
    assert kernel(lstm, 50, 16, 256, precision="fp16") == "cluster"
    assert kernel(lstm, 50, 16, 256) == "grid"
    assert kernel(lstm, 50, 16, 312, precision="tf32") == "grid"
    assert kernel(lstm, 50, 16, 264, precision="fp16") == "grid"
    for B, precision in itertools.product((1, 16, 64), ("ieee", "tf32", "bf16")):
        for H, backward in itertools.product((512, 768, 1024), (False, True)):
            assert kernel(lstm, 50, B, H, precision=precision, backward=backward) == "grid"
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
    assert plan.kernel == "cluster"
    assert plan.blocks[0] * plan.blocks[1] > 132
    assert choose(kernels_of(rnn), 50, 4096, 2048, 4, H100).kernel in ("grid", "steps")
