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
def library() -> ctypes.CDLL:
    sources = [emulated.HERE / "small_kernels.cpp", emulated.runtime()]
    return ctypes.CDLL(str(emulated.build(sources, ["-fPIC", "-shared", "-fvisibility=hidden"])))


def address(a: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(a.ctypes.data)


def launch(
    kernel: str,
    grid: tuple[int, int] = (1, 1),
    threads: int = 64,
    cooperative: bool = False,
    clusters: bool = False,
) -> list[tuple[np.ndarray, str]]:
    """In every order of the threads, what each left (y, x, threads), and what was wrong."""
    found = []
    for seed in SEEDS:
        out, counter = np.full((grid[1], grid[0], threads), np.nan), np.zeros(1, np.uint32)
        error = ctypes.create_string_buffer(2000)
        library().launch_small(
            getattr(library(), kernel),
            *(*grid, threads, ctypes.c_size_t(8 * threads), cooperative, clusters, ctypes.c_uint64(seed)),
            *(address(out), address(counter), error, ctypes.c_size_t(len(error))),
        )
        found.append((out, error.value.decode()))
    return found


THREAD = np.arange(96.0)
SUMS = np.repeat(THREAD.reshape(3, 32).sum(1), 32)  # of each warp
LANES = 1000 * SUMS + THREAD // 32 * 32 + (np.arange(96) % 32 ^ 21)


@pytest.mark.parametrize(
    ("kernel", "options", "want"),
    [
        ("turn", {"grid": (3, 2), "threads": 96}, THREAD + 1),
        ("lanes", {"grid": (2, 1), "threads": 96}, LANES),
        ("relay", {"grid": (5, 1), "cooperative": True}, np.outer(np.arange(1, 6), np.arange(64))),
        ("wait_again_with_the_same_count", {}, 1),
        ("meet", {"grid": (5, 1), "cooperative": True}, 1),
        ("what_was_in_shared_memory", {"grid": (4, 3)}, np.nan),
        ("ring", {"grid": (3, 2), "clusters": True}, np.array([2, 0, 1])[:, None]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_right_kernel_gives_the_same_in_any_order(kernel: str, options: Any, want: Any) -> None:
    for out, error in launch(kernel, **options) + launch(kernel, **options):
        assert error == ""
        np.testing.assert_array_equal(out, np.broadcast_to(want, out.shape))


@pytest.mark.parametrize(
    ("kernel", "options", "wrong"),
    [
        ("turn_without_first_barrier", {}, lambda out, error: np.isnan(out).any()),
        ("turn_without_second_barrier", {}, lambda out, error: (out != np.arange(64) + 1).any()),
        (
            "ring_without_first_barrier",
            {"grid": (3, 2), "clusters": True},
            lambda out, error: error == "a block is written to that has not begun",
        ),
        (
            "ring_without_second_barrier",
            {"grid": (3, 2), "clusters": True},
            lambda out, error: error != "" or (out != np.array([2, 0, 1])[:, None]).any(),
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_missing_barrier_shows_in_most_orders(kernel: str, options: Any, wrong: Any) -> None:
    found = launch(kernel, **options)
    assert sum(bool(wrong(*each)) for each in found) > len(SEEDS) // 2
    assert options or all(error == "" for _, error in found)


NOBODY, HERE = r"^no thread can go on:", r"small_kernels.cpp:\d+"
FIRST = r"threads of block \(0, 0\)"


@pytest.mark.parametrize(
    ("kernel", "options", "said"),
    [
        ("barriers_of_two_branches", {}, [rf"^a barrier of a block diverges: .* at {HERE} and at {HERE}$"]),
        *(
            (
                kernel,
                {"grid": (2, 1)},
                [NOBODY, rf"\d+ {FIRST} wait for their block at {HERE}", rf"\d+ {FIRST} have ended"],
            )
            for kernel in ("one_leaves", "one_warp_waits_again")
        ),
        ("lanes_with_two_masks", {}, ["an exchange between lanes diverges"]),
        ("lanes_and_barrier", {}, [rf"32 {FIRST} wait for their warp", rf"32 {FIRST} wait for their block"]),
        ("half_a_warp", {}, [rf"32 {FIRST} have ended"]),
        ("wait_for_nobody", {"grid": (2, 1)}, [NOBODY, r"64 threads of block \(1, 0\) wait for a count"]),
        ("meet", {"grid": (5, 1)}, [NOBODY]),  # not cooperative: its blocks do not run at once
        ("beyond_shared_memory", {}, ["wrote outside the block's shared memory of 512 bytes"]),
        ("before_shared_memory", {}, ["wrote outside the block's shared memory of 512 bytes"]),
        (
            "one_leaves_the_cluster",
            {"grid": (3, 2), "clusters": True},
            [r"64 threads of block \(1, 0\) wait for their cluster"],
        ),
        ("ring", {"grid": (3, 2)}, ["launch without clusters"]),
        ("ring_without_first_barrier", {"grid": (3, 2)}, ["there is no block"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_wrong_is_said_in_every_order(kernel: str, options: Any, said: list[str]) -> None:
    for _, error in launch(kernel, **options):
        assert all(re.search(pattern, error) for pattern in said), error


# --- matrix units ------------------------------------------------------------------------------------------


def rounded(precision: str, x: np.ndarray) -> np.ndarray:
    """x as the factors of a product are, in float32."""
    bits = np.empty(x.shape, np.uint32)
    library().round_small(precision.encode(), address(x), address(bits), ctypes.c_size_t(x.size))
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


def test_rounding_to_tf32():
    x = numbers()
    got = rounded("tf32", x)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(x))
    finite = np.isfinite(x) & (np.abs(x) < 2.0**127)
    x, got = x[finite].astype(np.longdouble), got[finite].astype(np.longdouble)
    unit = np.ldexp(np.longdouble(1), np.maximum(np.frexp(x)[1] - 1, -126) - 10)
    np.testing.assert_array_equal(got / unit, np.copysign(np.floor(np.abs(x / unit) + 0.5), x))


HALVES = pytest.mark.parametrize(("precision", "dtype"), [("bf16", ml_dtypes.bfloat16), ("fp16", np.float16)])


@HALVES
def test_rounding_to_16_bits(precision, dtype):
    x = numbers()
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(rounded(precision, x), x.astype(dtype).astype(np.float32))


@HALVES
def test_all_numbers_of_16_bits(precision, dtype):
    bits = np.arange(2**16, dtype=np.uint16)
    x = np.empty(bits.shape, np.float32)
    library().widen_small(precision.encode(), address(bits), address(x), ctypes.c_size_t(bits.size))
    np.testing.assert_array_equal(x, bits.view(dtype).astype(np.float32))
    numbers = ~np.isnan(x)
    np.testing.assert_array_equal(rounded(precision, x)[numbers].view(np.uint32), x[numbers].view(np.uint32))


@pytest.mark.parametrize(("precision", "k"), [("tf32", 8), ("bf16", 16), ("fp16", 16)])
def test_matrix_products(precision, k):
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, k), (k, 8)))
    sums = np.empty((16, 8), np.float32)
    library().multiply_small(precision.encode(), *map(address, (a, b, sums)))
    want = rounded(precision, a).astype(np.float64) @ rounded(precision, b).astype(np.float64)
    np.testing.assert_allclose(sums, want, rtol=1e-6, atol=1e-6)
