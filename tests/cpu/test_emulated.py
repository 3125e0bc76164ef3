"""NEON without an ARM processor: built for it and run by an emulator, the kernels give this machine's bits.

Needs a cross compiler and QEMU's user mode (Debian: g++-aarch64-linux-gnu and qemu-user-static), and an
x86-64 processor with FMA to compare with.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
SOURCES = [
    *(ROOT / "csrc/cpu" / f"{name}.cpp" for name in ("run", "dispatch", "threads", "openmp", "arena", "isa"))
]
OPTIONS = [
    "-std=c++17",
    "-O1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffp-contract=off",
    "-fno-math-errno",
    f"-I{ROOT / 'csrc'}",
]


def build(folder, compiler, level, *flags):
    """The program with the kernels of one level."""
    has = [f"-DFUSEDRNN_HAS_{level.upper()}"]
    objects = []
    for dtype in ("float", "double"):
        objects.append(folder / f"{level}_{dtype}.o")
        macros = [
            f"-DFUSEDRNN_LEVEL={level}",
            f"-DFUSEDRNN_LEVEL_{level.upper()}",
            f"-DFUSEDRNN_DTYPE={dtype}",
        ]
        source = ROOT / "csrc/cpu/kernels.cpp"
        command = [
            compiler,
            *OPTIONS,
            "-fno-exceptions",
            "-fno-rtti",
            *flags,
            *macros,
            "-c",
            source,
            "-o",
            objects[-1],
        ]
        subprocess.run(command, check=True)
    program = folder / level
    test = ROOT / "tests/cpu/cpp/kernels_test.cpp"
    command = [compiler, *OPTIONS, *has, *SOURCES, test, *objects, "-static", "-pthread", "-o", program]
    subprocess.run(command, check=True)
    return program


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_neon_gives_the_same_bits(tmp_path):
    for program in ("g++", CROSS, EMULATOR):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if platform.machine() != "x86_64" or "fma" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("needs an x86-64 processor with FMA")
    here = build(tmp_path, "g++", "avx2", "-mavx2", "-mfma")
    there = build(tmp_path, CROSS, "neon")
    command = {"capture_output": True, "text": True, "check": True, "timeout": 600}
    want = subprocess.run([here], **command).stdout.splitlines()
    got = subprocess.run([EMULATOR, there], **command).stdout.splitlines()
    assert len(want) == 9 * 6 * 5
    assert len({line.split()[3] for line in want}) > 100  # nearly every problem has bits of its own
    assert got == want
