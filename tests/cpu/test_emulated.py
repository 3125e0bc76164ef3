"""The C++ programs of tests/cpu/cpp on aarch64 in an emulator, and on Windows in Wine.

Each test needs a cross compiler and what runs its programs. Debian has them: g++-aarch64-linux-gnu and
qemu-user-static; g++-mingw-w64-x86-64-posix, wine and wine64. The kernels have to give this machine's bits,
for which it has to be an x86-64, with FMA for NEON.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from test_threads_cpp import PARTS

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
    "-Wno-maybe-uninitialized",  # at -O1 GCC does not see that the loop before has set the rows of a tile
    "-ffp-contract=off",
    "-fno-math-errno",
    f"-I{ROOT / 'csrc'}",
]


def needs(*programs):
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def output(*command, **environment):
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


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
    needs("g++", CROSS, EMULATOR)
    if platform.machine() != "x86_64" or "fma" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("needs an x86-64 processor with FMA")
    want = output(build(tmp_path, "g++", "avx2", "-mavx2", "-mfma"))
    got = output(EMULATOR, build(tmp_path, CROSS, "neon"))
    assert len(want) == 9 * 8 * 5
    assert len({line.split()[3] for line in want}) > 100  # nearly every problem has bits of its own
    assert got == want


@pytest.mark.slow
@pytest.mark.parametrize("level", ["portable", "neon"])
def test_vectors(level, tmp_path):
    needs(CROSS, EMULATOR)
    program = tmp_path / level
    macros = [f"-DFUSEDRNN_LEVEL={level}", f"-DFUSEDRNN_LEVEL_{level.upper()}"]
    source = ROOT / "tests/cpu/cpp/simd_test.cpp"
    subprocess.run([CROSS, *OPTIONS, *macros, "-static", source, "-o", program], check=True)
    output(EMULATOR, program)


@pytest.mark.slow
def test_runtime(tmp_path):
    """Threads, memory, signals, the control word; not limits of memory, which the emulator does not have."""
    needs(CROSS, EMULATOR)
    program, test = tmp_path / "runtime", ROOT / "tests/cpu/cpp/runtime_test.cpp"
    has = ["-DFUSEDRNN_HAS_PORTABLE", "-DFUSEDRNN_HAS_NEON"]
    sources = [source for source in SOURCES if source.stem not in ("run", "dispatch")]
    subprocess.run([CROSS, *OPTIONS, *has, test, *sources, "-static", "-pthread", "-o", program], check=True)
    for part in [*PARTS, "fork"]:
        output(EMULATOR, program, part)
    assert output(EMULATOR, program, "isa") == ["neon"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_windows_gives_the_same_bits(tmp_path):
    compiler, wine = "x86_64-w64-mingw32-g++-posix", "wine"
    needs("g++", compiler, wine)
    if platform.machine() != "x86_64":
        pytest.skip("needs an x86-64 processor")
    (tmp_path / "windows").mkdir()
    want = output(build(tmp_path, "g++", "portable"))
    program = build(tmp_path / "windows", compiler, "portable")
    got = output(wine, program.with_suffix(".exe"), WINEPREFIX=str(tmp_path / "wine"), WINEDEBUG="-all")
    assert len(want) == 9 * 8 * 5
    assert got == want
