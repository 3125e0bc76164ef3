"""The kernels for AMX: with its instructions in plain C++, and in an emulator.

Bochs since 3.0 has AMX, as Debian builds it (bochs, bochs-term). It starts the test of products without an
operating system. The other tests need a processor with AVX512-BF16.
"""

import os
import re
import subprocess

import pytest

from test_emulated import OPTIONS, ROOT, SOURCES, needs
from test_simd_cpp import processor

CPP = ROOT / "tests/cpu/cpp"
FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx512bf16"]
TILES = ["-mamx-tile", "-mamx-bf16"]
LEVEL = ["-DFUSEDRNN_LEVEL=amx_bf16", "-DFUSEDRNN_LEVEL_AMX_BF16"]
MODEL = ["-include", CPP / "amx_model.h"]
WITHOUT_LIBRARY = ["-ffreestanding", "-nostdlib", "-static", "-fno-pic", "-no-pie", "-fno-stack-protector"]
WITHOUT_LIBRARY += ["-fno-exceptions", "-fno-rtti", "-fno-asynchronous-unwind-tables", "-fcf-protection=none"]
PRODUCTS = "1680 problems, 0 wrong"
SECTOR, LOADED = 512, 127  # bytes; how many amx_boot.S loads


def run(*command, **options):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, **options).stdout


def test_products_in_plain_cpp(tmp_path):
    needs("g++")
    if "avx512_bf16" not in processor():
        pytest.skip("the processor has no avx512_bf16")
    program = tmp_path / "products"
    run("g++", *OPTIONS, *FLAGS, *TILES, *MODEL, *LEVEL, CPP / "amx_test.cpp", "-o", program)
    assert run(program).strip() == PRODUCTS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_layers_in_plain_cpp(tmp_path):
    """As those for AVX512-BF16, but for the order of sums; with any number of threads."""
    needs("g++")
    if "avx512_bf16" not in processor():
        pytest.skip("the processor has no avx512_bf16")
    options = [option for option in OPTIONS if option != "-Werror"]  # GCC 12 is wrong at -O1
    objects = []
    for level, more in (("avx512_bf16", []), ("amx_bf16", [*TILES, *MODEL])):
        objects.append(tmp_path / f"{level}.o")
        macros = [f"-DFUSEDRNN_LEVEL={level}", f"-DFUSEDRNN_LEVEL_{level.upper()}", "-DFUSEDRNN_DTYPE=float"]
        kernels = ["-fno-exceptions", "-fno-rtti", "-c", ROOT / "csrc/cpu/kernels.cpp", "-o", objects[-1]]
        run("g++", *options, *FLAGS, *more, *macros, *kernels)
    sources = [source for source in SOURCES if source.stem != "dispatch"]
    program = tmp_path / "layers"
    run("g++", *OPTIONS, *sources, CPP / "amx_layers_test.cpp", *objects, "-pthread", "-o", program)
    results = {
        run(program, env=os.environ | {"FUSEDRNN_ORDERED_COPIES": copies}) for copies in ("never", "always")
    }
    found = re.fullmatch(r"360 problems, ([\d.]+) units, 0 differ\n", results.pop())
    assert found
    assert not results
    # Each level is at most 3.5 from the exact results (test_bfloat16.py), and not the other's bits.
    assert 0 < float(found[1]) < 7


@pytest.mark.slow
def test_products_in_an_emulator(tmp_path):
    needs("g++", "objcopy", "bochs")
    program, image = tmp_path / "products", tmp_path / "disk"
    sources = [CPP / "amx_boot.S", CPP / "amx_test.cpp"]
    link = ["-Wl,--section-start=.boot=0x7C00", "-Wl,-Ttext=0x7E00", "-Wl,-N", "-Wl,--build-id=none"]
    options = [option for option in OPTIONS if option != "-O1"]
    run("g++", *options, "-O2", *FLAGS, *TILES, *LEVEL, *WITHOUT_LIBRARY, *sources, *link, "-o", program)
    run("objcopy", "-O", "binary", program, image)
    assert image.stat().st_size <= (1 + LOADED) * SECTOR
    cylinder = 16 * 63 * SECTOR
    with image.open("r+b") as file:
        file.truncate(cylinder)
    (tmp_path / "bochsrc").write_text(
        "display_library: term\n"
        "vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest\n"  # without .bin, where Bochs looks for it
        "cpu: model=sapphire_rapids, reset_on_triple_fault=0\n"
        "memory: guest=32, host=32\n"
        "boot: disk\n"
        f"ata0-master: type=disk, path={image}, mode=flat, cylinders=1, heads=16, spt=63\n"
        "port_e9_hack: enabled=1\n"
        f"log: {tmp_path / 'log'}\n"
        "panic: action=fatal\n"
    )
    # The port that ends Bochs makes it return 1.
    command = ["bochs", "-q", "-f", tmp_path / "bochsrc"]
    environment = os.environ | {"TERM": "xterm"}
    shown = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment).stdout
    assert PRODUCTS in shown, shown
