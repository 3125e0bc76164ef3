"""bench/scaling.py and docs/scaling.md: exponents, the model of more cores, what it is fed with, the page."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fusedrnn._core", reason="the compiled module is not built")
from fusedrnn import _core, system
from fusedrnn.backends.cpu import core_of
from fusedrnn.cells.zoo.gated import mgu
from fusedrnn.threads import get_num_threads

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import scaling
import scaling_model as model
from scaling_model import Split

LSTM = _core.Cell(_core.CELLS.index("lstm"))

# Round figures; reading costs nothing unless a test says so.
MACHINE = model.Machine(
    rate=1e9, l1=1e3, l2=1e4, l3=1e6, l2_read=math.inf, l3_read=math.inf, memory_read=math.inf,
    memory_read_all=math.inf, cores=2, barrier=0.0, transfer=0.0, region=0.0, wake=0.0, call=0.0, step=0.0,
    unit=0.0, weight=0.0,
)  # fmt: skip


def parts(shape, split, cores=None, grows=False, asleep=False, **figures):
    machine = dataclasses.replace(MACHINE, **figures)
    return model.parts(machine, shape, split, cores or split.threads, grows, asleep)


# --- exponents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.7])
def test_an_exponent_is_found_again(exponent):
    values = [2**k for k in range(8)]
    line = model.fit(values, [3e-3 * v**exponent for v in values])
    assert line.exponent == pytest.approx(exponent, abs=1e-12)
    assert line.factor == pytest.approx(3e-3)
    assert line.worst == pytest.approx(0, abs=1e-12)


def test_the_upper_half_sees_less_of_a_fixed_cost_and_the_worst_point_is_told():
    values = [2**k for k in range(9)]
    times = [20.0 + v for v in values]
    upper = model.upper_half(values)
    assert values[upper] == values[4:]
    assert model.fit(values, times).exponent < model.fit(values[upper], times[upper]).exponent < 1
    bent = model.fit([1, 2, 4], [1.0, 4.0, 4.0])
    assert bent.exponent == pytest.approx(1)
    # In logarithms to base 2 the line is 1/3 + x, and the middle point lies 2/3 above it.
    assert bent.worst == pytest.approx(2 ** (2 / 3) - 1)


# --- the pieces of the model ------------------------------------------------------------------------------


def test_products_count_the_last_row_and_the_last_block_whole():
    # 20 units are padded to 32. Columns: forward 36, the chain 20, the weight gradients 36.
    shape = (2, 3, 16, 20)
    chunks = 2 * 2 * 3 * 4 * (32 * 36 + 20 * 16)
    whole = 2 * 2 * 3 * 4 * 32 * (36 + 20)
    assert parts(shape, Split(1, True, 1))["products"] == pytest.approx((whole + chunks) / 1e9)
    two_rows = 2 * 2 * 2 * 4 * 32 * (36 + 20)
    assert parts(shape, Split(2, True, 1))["products"] == pytest.approx((two_rows + chunks / 2) / 1e9)
    assert parts(shape, Split(2, False, 1))["products"] == pytest.approx((whole / 2 + chunks / 2) / 1e9)
    assert parts(shape, Split(2, False, 1), unit=1.0)["cells"] == 2 * 3 * 16
    assert parts(shape, Split(2, True, 1), unit=1.0)["cells"] == 2 * 2 * 32


def test_barriers():
    figures = {"barrier": 10.0, "transfer": 3.0}
    machine = dataclasses.replace(MACHINE, **figures)
    assert [machine.barrier_of(n) for n in (1, 2, 3, 64)] == [0.0, 10.0, 16.0, 10.0 + 2 * 3.0 * 62]
    shape = (7, 4, 16, 64)
    assert parts(shape, Split(2, True, 3), **figures)["barriers"] == 10.0 * (1 + 2 * 3)
    assert parts(shape, Split(2, False, 3), **figures)["barriers"] == 10.0 * (2 * 7 + 1 + 2 * 3)
    assert parts(shape, Split(1, True, 3), **figures)["barriers"] == 0.0


def test_weights_cost_by_where_they_fit():
    T, B, I, H = 5, 1, 16, 16
    forward, backward = 4 * 4 * 16 * 32, 4 * 4 * 16 * 16  # bytes
    one = Split(1, True, 1)

    def weights(split=one, **figures):
        return parts((T, B, I, H), split, rate=math.inf, **figures)["weights"]

    assert weights(l1=forward, l2_read=1.0) == 0.0
    assert weights(l1=backward, l2_read=1.0) == T * forward
    # Beyond a core's caches, so are the gradients, which the chunk reads and writes.
    beyond = T * (forward + backward) + 2 * forward
    assert weights(l1=0, l2=0, l3_read=1.0) == beyond
    assert weights(l1=0, l2=0, l3=0, memory_read=1.0, memory_read_all=2.0) == beyond
    # Two threads by rows want twice as much from the memory, of the gradients each its half.
    two = weights(Split(2, True, 1), l1=0, l2=0, l3=0, memory_read=1.0, memory_read_all=2.0)
    assert two == T * (forward + backward) + forward
    # What comes from the second cache hides behind the products.
    ops = 2 * T * B * 4 * H * (I + H + H)
    hidden = parts((T, B, I, H), one, l1=0, rate=ops / 100.0, l2_read=T * (forward + backward) / 130.0)
    assert hidden["weights"] == pytest.approx(30.0)


def test_the_memory_is_shared_or_grows():
    machine = dataclasses.replace(MACHINE, memory_read=10.0, memory_read_all=16.0)
    assert [machine.memory(n, False) for n in (1, 2, 8)] == [10.0, 16.0, 16.0]
    assert [machine.memory(n, True) for n in (1, 2, 8)] == [10.0, 16.0, 64.0]
    tape = 4 * (2 * 5 * 16 + 3 * 10 + 3 * 2)
    figures = {"l3": 0.0, "memory_read": 10.0, "memory_read_all": 16.0, "l2": 1e9}
    assert parts((1, 1, 2, 10), Split(1, True, 1), **figures)["memory"] == pytest.approx(tape / 10)
    assert parts((1, 1, 2, 10), Split(1, True, 1), l3=1e9, memory_read=10.0)["memory"] == 0.0


def test_what_others_wrote_and_what_is_fixed():
    T, B, I, H = 3, 4, 16, 64
    chunk = T * B * (I + H + 4 * H / 2)
    by_rows = parts((T, B, I, H), Split(2, True, 1), l3_read=1.0)["exchange"]
    assert by_rows == 4 * chunk / 2
    by_units = parts((T, B, I, H), Split(2, False, 1), l3_read=1.0)["exchange"]
    assert by_units - by_rows == 4 * T * B * 5 * H / 2
    figures = {"call": 1.0, "step": 10.0, "region": 100.0, "wake": 1e4}
    assert parts((T, B, I, H), Split(1, True, 1), **figures)["fixed"] == 31.0
    assert parts((T, B, I, H), Split(3, True, 1), **figures)["fixed"] == 31.0 + 2 * 2 * 100.0
    assert parts((T, B, I, H), Split(2, True, 1), asleep=True, **figures)["fixed"] == 31.0 + 200.0 + 2e4
    packing = 3 * 4 * 200 * 400  # many weights: on all threads, and its regions as well
    assert parts((T, B, 200, 200), Split(1, True, 1), cores=8, weight=1.0)["fixed"] == packing / 8
    assert parts((T, B, 200, 200), Split(2, True, 1), region=1.0)["fixed"] == 4.0


def test_the_best_split_by_the_model():
    assert model.best(MACHINE, (10, 8, 1, 16), 4, 1) == Split(4, True, 1)
    assert model.best(MACHINE, (10, 1, 1, 64), 8, 1) == Split(4, False, 1)
    assert model.best(dataclasses.replace(MACHINE, barrier=1.0), (10, 8, 1, 64), 8, 1).threads == 1


# --- the compiled side ------------------------------------------------------------------------------------


def by_the_words(T, B, I, H, threads):
    """The rule as docs/scaling.md has it."""
    rule = _core.testing.SPLIT_RULE
    step = B * 4 * H * (I + H)
    rows = max(1, min(threads, int(step * T / rule["call"]), B))
    units = max(1, min(threads, int(step / rule["step"]), math.ceil(H / 16)))
    weights = 4 * H * (I + H) * 4  # bytes
    if rows == threads:
        by_rows = rule["core_cache"] >= weights or rule["rows"] <= B / threads
    else:
        by_rows = rows >= units
    return (rows, True) if by_rows else (units, False)


def test_the_rule_in_words_is_that_of_the_kernels():
    seen = set()
    sizes = itertools.product((1, 64), (0, 1, 5, 16, 64, 128, 1024), (1, 64, 512), (1, 16, 100, 256, 1024))
    for (T, B, I, H), threads in itertools.product(sizes, (1, 2, 8, 32, 64)):
        found = _core.testing.split(LSTM, T, B, I, H, threads)[:2]
        assert found == by_the_words(T, B, I, H, threads), (T, B, I, H, threads)
        seen.add((found[0] > 1, found[1]))
    assert seen == {(False, True), (True, True), (True, False), (False, False)}


def test_chunks_of_steps():
    assert _core.testing.split(LSTM, 1, 1, 1, 16, 2)[2] == 1
    chunks = [_core.testing.split(LSTM, T, 64, 64, 256, 2)[2] for T in (50, 100, 200)]
    assert 1 < chunks[0] < chunks[1] < chunks[2]


def test_sizes_that_are_none_are_refused():
    for sizes in ((-1, 1, 1, 1, 1), (1, -1, 1, 1, 1), (1, 1, 0, 1, 1), (1, 1, 1, 0, 1), (1, 1, 1, 1, 0)):
        with pytest.raises(ValueError, match="at least"):
            _core.testing.split(LSTM, *sizes)
    with pytest.raises(OverflowError):
        _core.testing.split(LSTM, 2**62, 2**62, 2**62, 2**62, 1)
    with pytest.raises(ValueError, match="cell: expected a compiled one, got a program"):
        _core.testing.split(core_of(mgu), 1, 1, 1, 1, 1)


@pytest.mark.kernel
def test_what_threads_and_memory_cost_is_measured():
    testing = _core.testing
    for threads in (1, 2):
        assert 0 < testing.time_region(threads) < 1
        assert 0 < testing.time_barriers(threads, 10) < 1
        for size in (1, 4096, 1 << 20):
            assert testing.time_reads(threads, size, 3) >= 0
    assert 0 < testing.time_region(2, 2e-3) < 1
    for wrong in (
        lambda: testing.time_region(1, -1.0),
        lambda: testing.time_region(1, math.nan),
        lambda: testing.time_region(0),
        lambda: testing.time_barriers(2, 0),
        lambda: testing.time_transfers(0),
        lambda: testing.time_reads(1, 0, 1),
        lambda: testing.time_reads(1, 1, 0),
        lambda: testing.time_reads(1, 2**40, 1),
    ):
        with pytest.raises(ValueError, match="expected"):
            wrong()


@pytest.mark.skipif(system.machine()["cores"] < 2, reason="needs two cores")
def test_a_cache_line_goes_to_and_fro():
    assert 0 < _core.testing.time_transfers(10) < 1


# --- the page ---------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    """What is published, in a file of the test's own."""
    found = json.loads(scaling.FILE.read_text())
    monkeypatch.setattr(scaling, "FILE", tmp_path / "scaling.json")

    def write(changed):
        scaling.FILE.write_text(json.dumps(changed))
        return changed

    write(found)
    return found, write


def test_the_published_splits_are_those_of_the_kernels(results):
    found, _ = results
    assert {key: found[key] for key in ("rule", "splits", "grid")} == scaling.choose(found)


@pytest.mark.parametrize(
    "place",
    [
        ("machine", "rate"),
        ("machine", "barrier"),
        ("growth", "H", 0, "threads", "1", "ms"),
        ("suite", 0, "threads", "1", "ms"),
        ("grid", -1, "splits", "64", 0),
    ],
    ids=str,
)
def test_the_check_sees_a_changed_figure(place, results, capsys):
    found, write = results
    assert scaling.main(["--check"]) == 0
    *path, last = place
    inner = found
    for key in path:
        inner = inner[key]
    inner[last] *= 2
    write(found)
    assert scaling.main(["--check"]) == 1
    assert "python bench/scaling.py" in capsys.readouterr().out


@pytest.mark.slow
def test_a_quick_run_gives_figures_sections_and_a_plot(tmp_path, capsys):
    pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
    if system.machine()["cores"] < 2:
        pytest.skip("needs two cores")
    file = tmp_path / "scaling.json"
    assert scaling.main(["--quick", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{part}\n" in printed for part in scaling.SECTIONS)
    found = json.loads(file.read_text())
    assert found["quick"]
    assert set(found["growth"]) == set("TBIH")
    for figure, value in found["machine"].items():
        assert np.isfinite(value), figure
        assert value > 0 or figure in ("step", "unit"), figure
    for row in found["suite"]:
        assert all(each["ms"] > 0 for each in row["threads"].values())
    assert get_num_threads() == max(found["threads"])

    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    scaling.draw(found, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
