"""Code for GPUs that nvcc makes with the package: what it has, and when it is taken in place of NVRTC's."""

from __future__ import annotations

import importlib.util
import itertools
import json
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

ROOT = Path(__file__).parents[1]
SCRIPT = [sys.executable, "-I", "-S", ROOT / "cmake" / "fatbin.py"]  # -S: nothing but the standard library
LSTM = ("Lstm", "float", "sm_90", "ieee")

NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.1, V13.1.80"; exit; fi
printf '%s\\n' "$@" > "$0.arguments"
for last; do :; done
printf fatbin > "${last#--output-file=}"
"""


@pytest.fixture
def built(tmp_path):
    """A package's csrc with the fatbin of one cell, by something in the place of nvcc 13.1."""
    nvcc, csrc = tmp_path / "nvcc", tmp_path / "csrc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    shutil.copytree(cuda_compile.sources(), csrc)
    subprocess.run([*SCRIPT, "Lstm-float-ieee", nvcc, csrc / "cuda" / "fatbin"], check=True)
    return csrc


@pytest.fixture
def package(built, monkeypatch):
    """The same, as the package in use, and nothing compiled."""
    monkeypatch.setattr(cuda_compile, "sources", lambda: built)
    monkeypatch.setattr(cuda_compile, "cubin", lambda *key: b"cubin")
    return built


def test_what_came_with_the_package_is_taken(package):
    assert cuda_compile.code(*LSTM, (13, 1)) == b"fatbin"


@pytest.mark.parametrize(
    "other",
    [
        ("RnnTanh", "float", "sm_90", "ieee"),
        ("Lstm", "double", "sm_90", "ieee"),
        ("Lstm", "float", "sm_90", "tf32"),
    ],
)
def test_what_did_not_come_is_compiled(package, other):
    assert cuda_compile.code(*other, (13, 1)) == b"cubin"


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
    assert cuda_compile.code("Lstm", "float", architecture, "ieee", driver) == (
        b"fatbin" if taken else b"cubin"
    )


@pytest.mark.parametrize("file", ["cuda/unit.h", "cells/lstm.h", "simd/math.h", "steps.h", "cuda/kernels.cu"])
def test_other_sources_are_compiled(package, file):
    with open(package / file, "a") as text:
        text.write("// changed\n")
    assert cuda_compile.code(*LSTM, (13, 1)) == b"cubin"


@pytest.mark.parametrize(("name", "value"), [("WARPS", 4), ("ARCHITECTURES", ("sm_80", "sm_90"))])
def test_other_flags_and_architectures_are_compiled(package, monkeypatch, name, value):
    monkeypatch.setattr(cuda_compile, name, value)
    assert cuda_compile.code(*LSTM, (13, 1)) == b"cubin"


def test_nvcc_is_told_what_nvrtc_is(built, tmp_path, monkeypatch):
    """All but the architectures, the folders of headers, and what goes in and out."""
    monkeypatch.setenv("FUSEDRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_compile, "version", lambda: (13, 1))
    told = []
    monkeypatch.setattr(cuda_compile, "_compile", lambda options: told.extend(options) or b"code")
    cuda_compile.cubin("Lstm", "float", "sm_90")
    nvrtc = [o for o in told if not o.startswith(("--gpu-architecture=", "--include-path="))]
    by_nvcc = (tmp_path / "nvcc.arguments").read_text().splitlines()
    alone = ("--fatbin", "--generate-code=", "--include-path=", "--output-file=", str(ROOT / "csrc"))
    assert [o for o in by_nvcc if not o.startswith(alone)] == nvrtc
    assert "--fmad=false" in nvrtc


ASKED = itertools.product(
    map(np.dtype, (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)), cuda_compile.PRECISIONS
)


def test_everything_can_be_made():
    """Every cell that has kernels, in each dtype and precision that the backend asks for."""
    said = subprocess.run(SCRIPT, check=True, capture_output=True, text=True).stdout
    ways = {(cuda_compile.DTYPES[dtype.name], _precision(dtype, p)) for dtype, p in ASKED}
    expected = {"-".join((kernels_of(cell).type, *way)) for cell in CELLS for way in ways}
    assert set(said.split(";")) == expected
    assert len(said.split(";")) == len(expected)


# --- nvcc itself, by CMake

CMAKE = shutil.which("cmake")


def configure(build: Path, wanted: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import pybind11

    return subprocess.run(
        [CMAKE, "-S", ROOT, "-B", build, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
         f"-DPython_EXECUTABLE={sys.executable}", f"-DFUSEDRNN_CUDA_FATBIN={wanted}"],
        capture_output=True, text=True, env=os.environ | environment,
    )  # fmt: skip


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


needs_cmake = pytest.mark.skipif(
    CMAKE is None or importlib.util.find_spec("pybind11") is None, reason="needs cmake and pybind11"
)


@needs_cmake
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cmake_makes_and_installs_it(tmp_path, monkeypatch):
    build, site = tmp_path / "build", tmp_path / "site-packages"
    done = configure(build, "GruResetBefore-float-ieee")
    assert done.returncode == 0, done.stderr
    subprocess.run([CMAKE, "--build", build, "--target", "fatbin"], check=True)
    subprocess.run([CMAKE, "--install", build, "--component", "fatbin", "--prefix", site], check=True)
    folder = site / "fusedrnn" / "csrc" / "cuda" / "fatbin"
    assert sorted(os.listdir(folder)) == [
        "GruResetBefore-float-ieee.fatbin",
        "GruResetBefore-float-ieee.json",
    ]

    shutil.copytree(cuda_compile.sources(), site / "fusedrnn" / "csrc", dirs_exist_ok=True)
    monkeypatch.setattr(cuda_compile, "sources", lambda: site / "fusedrnn" / "csrc")
    toolkit = tuple(json.loads((folder / "GruResetBefore-float-ieee.json").read_text())["cuda"])
    fatbin = cuda_compile.shipped("GruResetBefore", "float", "sm_90", "ieee", toolkit)
    assert fatbin is not None
    expected = [("elf", architecture) for architecture in cuda_compile.ARCHITECTURES]
    assert sorted(images(fatbin)) == sorted([*expected, ("ptx", cuda_compile.ARCHITECTURES[-1])])


@needs_cmake
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_an_unknown_name_is_an_error(tmp_path):
    done = configure(tmp_path, "Abacus-float-ieee")
    assert done.returncode != 0
    assert "expected ON, OFF or names out of RnnTanh-float-ieee;" in " ".join(done.stderr.split())
