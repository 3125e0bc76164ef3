"""The emulation of CUDA itself: it runs right kernels right, and says what is wrong with wrong ones."""

from __future__ import annotations

import ctypes
import functools
import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import emulated

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="needs a C++ compiler")

SEEDS = range(20)


@functools.cache
def library(*flags: str) -> ctypes.CDLL:
    sources = [emulated.HERE / "small_kernels.cpp", emulated.runtime(*flags)]
    made = emulated.build(sources, ["-fPIC", "-shared", "-fvisibility=hidden"])
    return ctypes.CDLL(str(made))


@pytest.fixture(params=["switch", "ucontext"])
def launch(request: Any) -> Any:
    """Runs a kernel of small_kernels.cpp -> the number that each thread left (y, x, threads), and what was
    wrong. By our own switch of stacks, and by the portable one."""
    small = library(*(["-DFUSEDRNN_UCONTEXT"] if request.param == "ucontext" else []))

    def run(
        kernel: str,
        grid: tuple[int, int] = (1, 1),
        threads: int = 64,
        shared: int | None = None,
        cooperative: bool = False,
        clusters: bool = False,
        seed: int = 0,
    ) -> tuple[np.ndarray, str]:
        out = np.full((grid[1], grid[0], threads), np.nan)
        counter = np.zeros(1, np.uint32)
        error = ctypes.create_string_buffer(2000)
        failed = small.launch_small(
            kernel.encode(),
            *grid,
            threads,
            ctypes.c_size_t(8 * threads if shared is None else shared),
            cooperative,
            clusters,
            ctypes.c_uint64(seed),
            ctypes.c_void_p(out.ctypes.data),
            ctypes.c_void_p(counter.ctypes.data),
            error,
            ctypes.c_size_t(len(error)),
        )
        assert bool(failed) == bool(error.value)
        return out, error.value.decode()

    return run


# --- barriers ----------------------------------------------------------------------------------------------


def test_a_right_kernel_gives_the_same_in_any_order(launch):
    for seed in SEEDS:
        out, error = launch("turn", (3, 2), 96, seed=seed)
        assert error == ""
        np.testing.assert_array_equal(out, np.broadcast_to(np.arange(96) + 1.0, (2, 3, 96)))


def test_a_missing_barrier_shows_as_nan(launch):
    found = [np.isnan(launch("turn_without_first_barrier", seed=seed)[0]).any() for seed in SEEDS]
    assert sum(found) > len(SEEDS) // 2


def test_a_missing_barrier_shows_as_wrong_values(launch):
    outs = [launch("turn_without_second_barrier", seed=seed) for seed in SEEDS]
    assert all(error == "" for _, error in outs)
    assert sum((out != np.arange(64) + 1).any() for out, _ in outs) > len(SEEDS) // 2


def test_barriers_in_two_branches_are_reported(launch):
    for seed in SEEDS:
        _, error = launch("barriers_of_two_branches", seed=seed)
        assert re.fullmatch(
            r"a barrier of a block diverges: .* at small_kernels.cpp:\d+ and at small_kernels.cpp:\d+", error
        )


@pytest.mark.parametrize("kernel", ["one_leaves", "one_warp_waits_again"])
def test_a_barrier_that_not_all_reach_is_reported(launch, kernel):
    for seed in SEEDS:
        _, error = launch(kernel, (2, 1), seed=seed)
        assert error.startswith("no thread can go on:")
        assert re.search(
            r"\d+ threads of block \(0, 0\) wait for their block at small_kernels.cpp:\d+", error
        )
        assert re.search(r"\d+ threads of block \(0, 0\) have ended", error)


# --- lanes -------------------------------------------------------------------------------------------------


def test_lanes_exchange(launch):
    thread = np.arange(96)
    want = 1000.0 * np.repeat(thread.reshape(3, 32).sum(1), 32) + (thread // 32 * 32 + (thread % 32 ^ 21))
    for seed in SEEDS:
        out, error = launch("lanes", (2, 1), 96, seed=seed)
        assert error == ""
        np.testing.assert_array_equal(out, np.broadcast_to(want, (1, 2, 96)))


def test_lanes_that_do_not_agree_are_reported(launch):
    for seed in SEEDS:
        assert "an exchange between lanes diverges" in launch("lanes_with_two_masks", seed=seed)[1]
        error = launch("lanes_and_barrier", seed=seed)[1]
        assert "32 threads of block (0, 0) wait for their warp" in error
        assert "32 threads of block (0, 0) wait for their block" in error
        assert "32 threads of block (0, 0) have ended" in launch("half_a_warp", seed=seed)[1]


# --- counts ------------------------------------------------------------------------------------------------


def test_blocks_wait_for_counts(launch):
    for seed in SEEDS:
        out, error = launch("relay", (5, 1), cooperative=True, seed=seed)
        assert error == ""
        np.testing.assert_array_equal(out[0], np.outer(np.arange(1, 6), np.arange(64)))
        out, error = launch("wait_again_with_the_same_count", seed=seed)
        assert error == ""
        assert (out == 1).all()


def test_a_wait_that_nothing_can_end_is_reported(launch):
    for seed in SEEDS:
        _, error = launch("wait_for_nobody", (2, 1), seed=seed)
        assert error.startswith("no thread can go on:")
        assert "64 threads of block (1, 0) wait for a count" in error


def test_only_a_cooperative_launch_runs_all_blocks_at_once(launch):
    for seed in SEEDS:
        out, error = launch("meet", (5, 1), cooperative=True, seed=seed)
        assert error == ""
        assert (out == 1).all()
        assert "no thread can go on" in launch("meet", (5, 1), seed=seed)[1]


# --- memory ------------------------------------------------------------------------------------------------


def test_shared_memory_is_nan_before_each_block(launch):
    for seed in SEEDS:
        for _ in range(2):
            out, error = launch("what_was_in_shared_memory", (4, 3), seed=seed)
            assert error == ""
            assert np.isnan(out).all()


@pytest.mark.parametrize("kernel", ["beyond_shared_memory", "before_shared_memory"])
def test_a_write_outside_shared_memory_is_reported(launch, kernel):
    assert "wrote outside the block's shared memory of 512 bytes" in launch(kernel)[1]


def test_clusters(launch):
    want = np.broadcast_to(np.array([2.0, 0, 1])[:, None], (2, 3, 64))
    early = wrong = 0
    for seed in SEEDS:
        out, error = launch("ring", (3, 2), clusters=True, seed=seed)
        assert error == ""
        np.testing.assert_array_equal(out, want)
        _, error = launch("ring_without_first_barrier", (3, 2), clusters=True, seed=seed)
        early += error == "a block is written to that has not begun"
        out, error = launch("ring_without_second_barrier", (3, 2), clusters=True, seed=seed)
        wrong += error != "" or not np.array_equal(out, want)
        _, error = launch("one_leaves_the_cluster", (3, 2), clusters=True, seed=seed)
        assert re.search(r"64 threads of block \(1, 0\) wait for their cluster", error)
    assert early > len(SEEDS) // 2
    assert wrong > len(SEEDS) // 2
    assert "launch without clusters" in launch("ring", (3, 2))[1]
    assert "there is no block" in launch("ring_without_first_barrier", (3, 2))[1]


# --- matrix units ------------------------------------------------------------------------------------------


def rounded(precision: str, x: np.ndarray) -> np.ndarray:
    """x as the factors of a product are, in float32."""
    bits = np.empty(x.shape, np.uint32)
    library().round_small(
        precision.encode(),
        ctypes.c_void_p(x.ctypes.data),
        ctypes.c_void_p(bits.ctypes.data),
        ctypes.c_size_t(x.size),
    )
    if precision == "fp16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float32)
    return (bits << 16 if precision == "bf16" else bits).view(np.float32)


def numbers() -> np.ndarray:
    """Of every size and sign, halfway cases of both formats, infinities and NaN."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, np.uint64).astype(np.uint32)
    for low in (0x1000, 0x0FFF, 0x1001, 0x8000, 0x7FFF, 0x8001, 0, 0x3000, 0x18000):
        bits = np.append(bits, (bits[:2000] & ~np.uint32(0x1FFFF)) | np.uint32(low))
    small = (rng.integers(0, 4096, 5000) * 2.0**-26).astype(np.float32)  # subnormal in half precision
    special = np.array(
        [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 2.0**-24, 2.0**-25], np.float32
    )
    return np.concatenate([bits.view(np.float32), small, -small, special])


@pytest.mark.parametrize(("precision", "mantissa"), [("tf32", 10), ("bf16", 7)])
def test_rounding_to_a_shorter_mantissa(precision, mantissa):
    x = numbers()
    got = rounded(precision, x)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))
    finite = np.isfinite(x) & (np.abs(x) < 2.0**127)
    x, got = x[finite].astype(np.longdouble), got[finite].astype(np.longdouble)
    exponent = np.maximum(np.frexp(x)[1] - 1, -126)
    unit = np.ldexp(np.longdouble(1), exponent - mantissa)
    whole = x / unit
    want = np.rint(whole) if precision == "bf16" else np.copysign(np.floor(np.abs(whole) + 0.5), whole)
    np.testing.assert_array_equal(got / unit, want)


def test_rounding_to_half_precision():
    x = numbers()
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(rounded("fp16", x), x.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)])
def test_all_numbers_of_16_bits(precision, dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    x = np.empty(bits.shape, np.float32)
    library().widen_small(
        precision.encode(),
        ctypes.c_void_p(bits.ctypes.data),
        ctypes.c_void_p(x.ctypes.data),
        ctypes.c_size_t(bits.size),
    )
    np.testing.assert_array_equal(x, bits.view(dtype).astype(np.float32))
    numbers = ~np.isnan(x)
    np.testing.assert_array_equal(rounded(precision, x)[numbers].view(np.uint32), x[numbers].view(np.uint32))


@pytest.mark.parametrize(("precision", "k"), [("tf32", 8), ("bf16", 16), ("fp16", 16)])
def test_matrix_products(precision, k):
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, k), (k, 8)))
    sums = np.empty((16, 8), np.float32)
    library().multiply_small(precision.encode(), *(ctypes.c_void_p(v.ctypes.data) for v in (a, b, sums)))
    want = rounded(precision, a).astype(np.float64) @ rounded(precision, b).astype(np.float64)
    np.testing.assert_allclose(sums, want, rtol=1e-6, atol=1e-6)
