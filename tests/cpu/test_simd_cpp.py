"""The vector type and the activations' special values, each level in a process without Python.

Builds tests/cpu/cpp/simd_test.cpp with nothing but a compiler, once per level that the processor has.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"portable": []}
NEEDS = {"portable": set()}
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS |= {
        "portable_fma": ["-mfma"],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    }
    NEEDS |= {
        "portable_fma": {"fma"},
        "avx2": {"avx2", "fma"},
        "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    }
elif platform.machine() in ("aarch64", "arm64"):
    FLAGS["neon"], NEEDS["neon"] = [], set()


def processor():
    """The instruction sets that the processor names."""
    file = Path("/proc/cpuinfo")
    return set(file.read_text().split()) if file.exists() else set()


@pytest.mark.parametrize("level", FLAGS)
def test_level(level, tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if not NEEDS[level] <= processor():
        pytest.skip(f"the processor has no {level}")
    program = tmp_path / level
    options = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", *FLAGS[level]]
    options += [f"-DFUSEDRNN_LEVEL={level}", f"-DFUSEDRNN_LEVEL_{level.upper()}", f"-I{ROOT / 'csrc'}"]
    source = ROOT / "tests/cpu/cpp/simd_test.cpp"
    subprocess.run([*compiler.split(), *options, source, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
