"""Code for GPUs that nvcc makes with the package: what it has, and when it is taken in place of NVRTC's."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fusedrnn.backends import cuda_compile
from fusedrnn.backends.cuda import _precision
from fusedrnn.backends.cuda_jobs import kernels_of
from problems import CELLS

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, "-I", "-S", ROOT / "cmake" / "fatbin.py"]  # -S: nothing but the standard library
LSTM = ("Lstm", "float", "sm_90", "ieee")

NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.1, V13.1.80"; exit; fi
printf '%s\\n' "$@" > "$0.arguments"
for last; do :; done
printf fatbin > "${last#--output-file=}"
"""


def copy_sources(csrc: Path) -> None:
    """The package's, without the fatbins that it has where a real nvcc was at hand when it was built."""
    without = shutil.ignore_patterns("fatbin")
    shutil.copytree(cuda_compile.sources(), csrc, ignore=without, dirs_exist_ok=True)


@pytest.fixture
def built(tmp_path):
    """A package's csrc with the fatbin of one cell, by something in place of nvcc 13.1."""
    nvcc, csrc = script(tmp_path / "nvcc", NVCC), tmp_path / "csrc"
    copy_sources(csrc)
    subprocess.run([*SCRIPT, "Lstm-float-ieee", nvcc, csrc / "cuda" / "fatbin"], check=True)
    return csrc


@pytest.fixture
def package(built, monkeypatch):
    """The same, as the package in use, and nothing compiled."""
    monkeypatch.setattr(cuda_compile, "sources", lambda: built)
    monkeypatch.setattr(cuda_compile, "cubin", lambda *key: b"cubin")
    return built


def test_what_came_with_the_package_is_taken(package):
    assert cuda_compile.code(*LSTM, (13, 1), "grid") == b"fatbin"


@pytest.mark.parametrize(
    "other",
    [
        ("RnnTanh", "float", "sm_90", "ieee"),
        ("Lstm", "double", "sm_90", "ieee"),
        ("Lstm", "float", "sm_90", "tf32"),
    ],
)
def test_what_did_not_come_is_compiled(package, other):
    assert cuda_compile.code(*other, (13, 1), "grid") == b"cubin"


@pytest.mark.parametrize(
    ("architecture", "driver", "taken"),
    [
        *((architecture, (13, 0), True) for architecture in cuda_compile.ARCHITECTURES),
        ("sm_90", (14, 0), True),
        ("sm_90", (12, 9), False),  # of an older major version
        ("sm_130", (13, 1), True),  # the driver compiles the PTX ...
        ("sm_130", (14, 0), True),
        ("sm_130", (13, 0), False),  # ... which is not newer than itself
        ("sm_75", (13, 1), False),  # older than all, and between them: not even PTX fits
        ("sm_87", (13, 1), False),
        ("sm_110", (13, 1), False),
    ],
)
def test_the_driver_has_to_take_it(package, architecture, driver, taken):
    assert cuda_compile.code("Lstm", "float", architecture, "ieee", driver, "grid") == (
        b"fatbin" if taken else b"cubin"
    )


@pytest.mark.parametrize("file", ["cuda/unit.h", "cells/lstm.h", "simd/math.h", "steps.h", "cuda/kernels.cu"])
def test_other_sources_are_compiled(package, file):
    with open(package / file, "a") as text:
        text.write("// changed\n")
    assert cuda_compile.code(*LSTM, (13, 1), "grid") == b"cubin"


@pytest.mark.parametrize(("name", "value"), [("WARPS", 4), ("ARCHITECTURES", ("sm_80", "sm_90"))])
def test_other_flags_and_architectures_are_compiled(package, monkeypatch, name, value):
    monkeypatch.setattr(cuda_compile, name, value)
    assert cuda_compile.code(*LSTM, (13, 1), "grid") == b"cubin"


def test_nvcc_is_told_what_nvrtc_is(built, tmp_path, monkeypatch):
    """All but the architectures, its own threads, the folders of headers, and what goes in and out."""
    monkeypatch.setenv("FUSEDRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_compile, "version", lambda: (13, 1))
    told = []
    monkeypatch.setattr(cuda_compile, "_compile", lambda options: told.extend(options) or b"code")
    cuda_compile.cubin("Lstm", "float", "sm_90")
    nvrtc = [o for o in told if not o.startswith(("--gpu-architecture=", "--include-path="))]
    by_nvcc = (tmp_path / "nvcc.arguments").read_text().splitlines()
    alone = (
        "--fatbin",
        "--generate-code=",
        "--threads=",
        "--include-path=",
        "--output-file=",
        str(ROOT / "csrc"),
    )
    assert [o for o in by_nvcc if not o.startswith(alone)] == nvrtc
    assert "--fmad=false" in nvrtc


ASKED = itertools.product(
    map(np.dtype, (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)), cuda_compile.PRECISIONS
)


def test_everything_can_be_made():
    """Every cell that has kernels, in each dtype and precision that the backend asks for."""
    said = subprocess.run(SCRIPT, check=True, capture_output=True, text=True).stdout
    pairs = {(cuda_compile.DTYPES[dtype.name], _precision(dtype, p)) for dtype, p in ASKED}
    expected = {"-".join((kernels_of(cell).type, *pair)) for cell in CELLS for pair in pairs}
    assert set(said.split(";")) == expected
    assert len(said.split(";")) == len(expected)


# --- by CMake

CMAKE = shutil.which("cmake")
REAL = shutil.which("nvcc")

needs_cmake = pytest.mark.skipif(
    CMAKE is None or importlib.util.find_spec("pybind11") is None, reason="needs cmake and pybind11"
)
needs_nvcc = pytest.mark.skipif(REAL is None, reason="needs nvcc")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """One for all, in which CMake gets to know the C++ compiler once."""
    return tmp_path_factory.mktemp("build")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where to put an nvcc that CMake takes before any other."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin" / "nvcc"


def script(path: Path, text: str) -> Path:
    path.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def configure(build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    import pybind11

    return subprocess.run(
        [CMAKE, "-S", ROOT, "-B", build, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
         f"-DPython_EXECUTABLE={sys.executable}", "-UFUSEDRNN_*", *options],
        capture_output=True, text=True,
    )  # fmt: skip


def has_target(build: Path) -> bool:
    done = subprocess.run([CMAKE, "--build", build, "--target", "help"], capture_output=True, text=True)
    assert "_core" in done.stdout
    return "fatbin" in done.stdout


def install(build: Path, site: Path) -> Path:
    """Make and install the GPU code; the folder of it."""
    subprocess.run([CMAKE, "--build", build, "--target", "fatbin"], check=True)
    subprocess.run([CMAKE, "--install", build, "--component", "fatbin", "--prefix", site], check=True)
    copy_sources(site / "fusedrnn" / "csrc")
    return site / "fusedrnn" / "csrc" / "cuda" / "fatbin"


def found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """By name what the loader finds of a driver that takes all."""
    monkeypatch.setattr(cuda_compile, "sources", lambda: folder.parents[1])
    every = subprocess.run(SCRIPT, check=True, capture_output=True, text=True).stdout.split(";")
    files = {}
    for name in every:
        cell, dtype, precision = name.split("-")
        files[name] = cuda_compile.shipped(cell, dtype, "sm_90", precision, (99, 0))
    return {name: file for name, file in files.items() if file is not None}


def images(fatbin: bytes) -> list[tuple[str, str]]:
    """The kind and architecture of each image: after a header, each is a header of its own and the data."""
    magic, _, position, size = struct.unpack_from("<IHHQ", fatbin)
    assert (magic, size) == (0xBA55ED50, len(fatbin) - position)
    found = []
    while position < len(fatbin):
        kind, _, header, size = struct.unpack_from("<HHIQ", fatbin, position)
        (architecture,) = struct.unpack_from("<I", fatbin, position + 28)
        found.append(({1: "ptx", 2: "elf"}[kind], f"sm_{architecture}"))
        position += header + size
    return found


@needs_cmake
@needs_nvcc
@pytest.mark.slow
def test_a_list_is_made_by_nvcc(build, tmp_path, monkeypatch):
    done = configure(build, "-DFUSEDRNN_CUDA_FATBIN=GruResetBefore-float-ieee")
    assert done.returncode == 0, done.stderr
    folder = install(build, tmp_path)
    assert sorted(os.listdir(folder)) == [
        "GruResetBefore-float-ieee.fatbin",
        "GruResetBefore-float-ieee.json",
    ]
    files = found(folder, monkeypatch)
    expected = [("elf", architecture) for architecture in cuda_compile.ARCHITECTURES]
    assert sorted(images(files["GruResetBefore-float-ieee"])) == sorted(
        [*expected, ("ptx", cuda_compile.ARCHITECTURES[-1])]
    )


@needs_cmake
@needs_nvcc
def test_an_unknown_name_is_an_error(build):
    done = configure(build, "-DFUSEDRNN_CUDA_FATBIN=Abacus-float-ieee")
    assert done.returncode != 0
    assert "expected OFF, ON or names out of RnnTanh-float-ieee;" in " ".join(done.stderr.split())


@needs_cmake
def test_nvcc_is_not_used_unless_asked(build, place):
    script(place, 'touch "$0.was-here"')
    done = configure(build)
    assert (done.returncode, done.stderr) == (0, "")
    assert not has_target(build)
    assert not place.with_name("nvcc.was-here").exists()
