"""The CUDA sources compile for every GPU they are for, and Python's picture of them is the right one.

Compiling needs no GPU. NVRTC compiles what a user's first call would; where there is an nvcc, it says how the
kernels use registers.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from fusedrnn.backends import cuda_compile, cuda_cupy
from fusedrnn.backends.cuda import MOST_SUMS
from fusedrnn.backends.cuda_jobs import BackwardJob, ForwardJob, MaskRule, Rules, Steps, kernels_of
from fusedrnn.backends.cuda_plan import Bytes, Tile, layout_of, shared_bytes
from problems import CELLS, NORMED, name

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
TYPES = tuple(kernels_of(cell).type for cell in CELLS)
NORMED_TYPES = tuple(kernels_of(cell).type for cell in NORMED[:4])
STEPPED_TYPES = (*NORMED_TYPES, *(f"Regularized<{type_}>" for type_ in (*TYPES, *NORMED_TYPES)))
KERNELS = [
    "begin_forward", "step_forward", "step_forward2", "begin_backward", "step_backward", "step_backward2",
    "finish_backward", "operands", "grid_forward", "grid_backward", "grid_forward_streamed",
    "grid_backward_streamed", "grid_forward_registers", "grid_backward_registers", "cluster_forward",
    "cluster_backward", "cluster_forward_registers", "cluster_backward_registers",
]  # fmt: skip
KINDS = [
    pair for pair in cuda_compile.DTYPE_PRECISIONS if pair[0] != "float" or pair[1] == "ieee"
]  # every dtype once
COMPILER = shutil.which("g++") or shutil.which("c++")


def nvrtc_missing() -> str | None:
    if not cuda_cupy._installed("cuda.bindings"):
        return "cuda-bindings is not installed"
    try:
        cuda_compile.version()
    except Exception as error:  # the library is another package
        return f"NVRTC is not installed ({cuda_cupy._line(error)})"
    return None


needs_nvrtc = pytest.mark.skipif(nvrtc_missing() is not None, reason=str(nvrtc_missing()))
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing is found compiled, and nothing is left."""
    monkeypatch.setenv("FUSEDRNN_CACHE", str(tmp_path / "cache"))


# --- NVRTC -------------------------------------------------------------------------------------------------


def kernels_in(code: bytes) -> set[str]:
    """Those of ``KERNELS`` whose symbols this ELF file has."""
    assert code.startswith(b"\x7fELF")
    return {kernel for kernel in KERNELS if f"\0{kernel}\0".encode() in code}


def compile_all(cases) -> None:
    """On two threads: NVRTC leaves the interpreter to others."""
    cases, errors = list(cases), []

    def work(mine) -> None:
        try:
            for case in mine:
                cell, dtype, precision, architecture = case
                assert kernels_in(cuda_compile.cubin(cell, dtype, architecture, precision)) == set(KERNELS)
        except BaseException as error:  # handed to the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(cases[k::2],)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@needs_nvrtc
def test_each_cell_compiles():
    """As for a user, each cell in a dtype, on an old or a new architecture."""
    compile_all(
        (cell, *KINDS[k % len(KINDS)], ("sm_80", "sm_90", "sm_120")[k % 3]) for k, cell in enumerate(TYPES)
    )


@needs_nvrtc
@pytest.mark.slow
def test_all_compile(monkeypatch):
    """For every architecture each cell and dtype, of what runs step by step alone float; with little
    optimisation, which takes most of the time."""
    compile_ = cuda_compile._compile
    monkeypatch.setattr(cuda_compile, "_compile", lambda options: compile_([*options, "--Ofast-compile=max"]))
    cases = [*itertools.product(TYPES, KINDS), *itertools.product(STEPPED_TYPES, KINDS[:1])]
    compile_all((cell, *kind, a) for (cell, kind), a in itertools.product(cases, ARCHITECTURES))


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("precision", cuda_compile.PRECISIONS[1:])
def test_each_precision_compiles(precision):
    compile_all(("Lstm", "float", precision, architecture) for architecture in ("sm_80", "sm_90"))


@pytest.mark.slow
@needs_nvrtc
def test_each_kernel_variant_compiles_by_itself():
    """As for a user; together they have every kernel."""
    seen = []
    for variant in cuda_compile.KERNELS:
        found = kernels_in(cuda_compile.cubin("Lstm", "float", "sm_90", "ieee", variant))
        assert {cuda_compile.variant_of(kernel) for kernel in found} == {variant}
        seen += found
    assert sorted(seen) == sorted(KERNELS)


@needs_nvrtc
def test_what_does_not_compile_says_why(tmp_path):
    with pytest.raises(
        RuntimeError, match=r'nvrtcCompileProgram: NVRTC_ERROR_COMPILATION, .* "Abacus" is undef'
    ):
        cuda_compile.cubin("Abacus", "float", "sm_90")
    with pytest.raises(RuntimeError, match=r"nvrtcCompileProgram: NVRTC_ERROR_INVALID_OPTION"):
        cuda_compile.cubin("RnnTanh", "float", "sm_1")
    assert not list(tmp_path.rglob("*.cubin"))


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """The options of what was compiled, in place of compiling."""
    calls = []
    monkeypatch.setattr(cuda_compile, "_compile", lambda options: calls.append(options) or b"code")
    monkeypatch.setattr(cuda_compile, "version", lambda: (13, 0))
    return calls


def test_the_cache(compiled, tmp_path, monkeypatch):
    for _ in range(2):
        assert cuda_compile.cubin("Lstm", "float", "sm_90") == b"code"
    assert len(compiled) == 1
    (file,) = tmp_path.rglob("*.cubin")
    assert file.name.startswith("Lstm-float-ieee-sm_90-")
    cuda_compile.cubin("Lstm", "double", "sm_90")
    cuda_compile.cubin("Lstm", "float", "sm_80")
    assert len(compiled) == 3
    for _ in range(2):
        cuda_compile.cubin("Lstm", "float", "sm_80", "ieee", "cluster")
    assert "--define-macro=FUSEDRNN_ONLY=4" in compiled.pop()
    assert len(compiled) == 3
    assert len([*tmp_path.rglob("Lstm-cluster-float-ieee-sm_80-*.cubin")]) == 1
    monkeypatch.setattr(cuda_compile, "version", lambda: (13, 1))  # another NVRTC
    cuda_compile.cubin("Lstm", "float", "sm_90")
    assert len(compiled) == 4


@pytest.mark.parametrize("file", ["cuda/unit.h", "cells/lstm.h", "simd/math.h", "steps.h", "cuda/kernels.cu"])
def test_other_sources_are_compiled_again(compiled, tmp_path, monkeypatch, file):
    folder = tmp_path / "csrc"
    shutil.copytree(cuda_compile.sources(), folder)
    monkeypatch.setattr(cuda_compile, "sources", lambda: folder)
    cuda_compile.cubin("Lstm", "float", "sm_90")
    with open(folder / file, "a") as text:
        text.write("// changed\n")
    cuda_compile.cubin("Lstm", "float", "sm_90")
    cuda_compile.cubin("Lstm", "float", "sm_90")
    assert len(compiled) == 2


def test_where_the_cache_is(monkeypatch):
    assert cuda_compile._cache() == Path(os.environ["FUSEDRNN_CACHE"])
    monkeypatch.delenv("FUSEDRNN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert cuda_compile._cache() == Path("/there/fusedrnn")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cuda_compile._cache() == Path("/home/somebody/.cache/fusedrnn")


def test_a_cache_that_cannot_be_written_is_no_error(compiled, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEDRNN_CACHE", str(tmp_path / "file" / "below"))
    for _ in range(2):
        assert cuda_compile.cubin("Lstm", "float", "sm_90") == b"code"
    assert len(compiled) == 2


def test_what_broke_off_leaves_nothing_behind(compiled, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    assert cuda_compile.cubin("Lstm", "float", "sm_90") == b"code"
    assert not list((tmp_path / "cache").iterdir())


def test_the_sources_are_found_in_the_tree_and_in_an_installed_package(tmp_path, monkeypatch):
    find = cuda_compile.sources.__wrapped__
    assert (find() / "cuda" / "kernels.cu").is_file()
    package = tmp_path / "site-packages" / "fusedrnn"
    monkeypatch.setattr(cuda_compile, "_HERE", package / "backends" / "cuda_compile.py")
    with pytest.raises(RuntimeError, match=r"^the sources of the CUDA kernels, csrc/cuda, are not beside"):
        find()
    (package / "csrc" / "cuda").mkdir(parents=True)
    (package / "csrc" / "cuda" / "kernels.cu").write_text("")
    assert find() == package / "csrc"


# --- nvcc --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernels_keep_to_their_registers(tmp_path):
    """No kernel spills; all steps in one launch run with a whole block on a multiprocessor."""
    codes = [(cell, "float", "ieee") for cell in TYPES]
    codes += [("Lstm", "float", name) for name in cuda_compile.PRECISIONS[1:]]
    codes += [("Lstm", *kind) for kind in KINDS[2:]]
    codes += [("LstmLayerNorm", "float", "ieee"), ("Regularized<LstmLayerNorm>", "float", "ieee")]
    for cell, dtype, precision in codes:
        done = subprocess.run(
            ["nvcc", "-arch=sm_90", "-cubin", "-Xptxas", "-v", "-std=c++17", "-fmad=false",
             "-I", ROOT / "csrc", f"-DFUSEDRNN_CELL={cell}", f"-DFUSEDRNN_DTYPE={dtype}",
             f"-DFUSEDRNN_PRECISION={precision}",
             ROOT / "csrc/cuda/kernels.cu", "-o", tmp_path / "kernels.cubin"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        used = re.findall(
            r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
            r"Used (\d+) registers",
            done.stderr,
            re.DOTALL,
        )
        kernels = {kernel: (int(stores), int(loads), int(count)) for kernel, stores, loads, count in used}
        assert set(KERNELS) <= set(kernels)
        for kernel in KERNELS:
            stores, loads, count = kernels[kernel]
            assert (stores, loads) == (0, 0), (cell, dtype, precision, kernel)
            assert count * 256 <= 65536


# --- Python's picture of the sources ------------------------------------------------------------------------

PROGRAM = """
#include <stddef.h>
#include <stdio.h>
#define FUSEDRNN_LEVEL cuda
#define FUSEDRNN_LEVEL_CUDA
#include "simd/inline.h"
#include "cuda/device.h"
#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cuda/cluster.h"
#include "cuda/norm.h"
using namespace fusedrnn;
using namespace fusedrnn::cuda;
static char memory[1 << 24];
char* emulation::shared_memory() { return memory; }

static void part(const Part& p) {
  printf(" %d", p.first);
  for (int k = 0; k < p.count; ++k) printf(",%d", p.gate[k]);
}
template <class Cell>
static void one(const char* open, const char* name, const char* close, int sums) {
  printf("cell %s%s%s %d %d %d %d %d", open, name, close, Cell::accumulators, Cell::saved, Cell::has_c,
         kWhole<Cell>, sums);
  part(Cell::input), part(Cell::recurrent), part(Cell::recurrent2);
  printf("\\n");
}
template <class Cell>
static void cell(const char* name) {
  constexpr int sums = kNormSums<Cell>;
  one<Cell>("", name, "", sums), one<Regularized<Cell>>("Regularized<", name, ">", sums);
}
template <class Cell>
static void normed(const char* name) {
  static_assert(2 * RowNorm<Cell, float>::kNorms <= @MOST_SUMS@, "of a block's shared memory");
  cell<Cell>(name);
}
static void print(const char* kernel, const char* precision, int tile, int kept, Index rows, Index columns,
                  Index K, int column_tiles, int row_tiles, int splits, const void* end) {
  printf("shared %s %s %d %d %d %d %d %d %d %d %zu\\n", kernel, precision, tile, kept, int(rows),
         int(columns), int(K), column_tiles, row_tiles, splits,
         size_t(reinterpret_cast<const char*>(end) - memory));
}
template <class S, Precision precision>
static void shared(const char* name, Index rows, Index columns, Index K) {
  using Tile = typename TileOf<S, precision>::type;
  using F = typename Tile::Factor;
  const Index units = 5;
  const int tile = Tile::columns;
  for (Weights in : {Weights::shared, Weights::registers, Weights::streamed}) {
    const bool registers = in == Weights::registers;
    const char* kernels[] = {"grid_registers", "grid", "grid_streamed", "cluster_registers", "cluster"};
    const Layout layout(rows, columns, tile, registers);
    const Shared<Compute<S>, F> s(layout, columns, K, 24, 96, rows, units, in);
    print(kernels[int(in)], name, tile, Tile::kept, rows, columns, K, layout.column_tiles, layout.row_tiles,
          layout.splits, s.end);
    if (in == Weights::streamed) continue;
    const ClusterShared<Compute<S>, F> c(K, rows, columns, units, tile, registers);
    print(kernels[3 + int(in)], name, tile, Tile::kept, rows, columns, K, int(c.columns / tile),
          int(c.rows / kRows), c.splits, c.end);
  }
}
int main() {
  @FIELDS@
  cell<RnnTanh>("RnnTanh"), cell<RnnRelu>("RnnRelu"), cell<Lstm>("Lstm");
  cell<GruResetAfter>("GruResetAfter"), cell<GruResetBefore>("GruResetBefore");
  normed<RnnTanhLayerNorm>("RnnTanhLayerNorm"), normed<RnnReluLayerNorm>("RnnReluLayerNorm");
  normed<LstmLayerNorm>("LstmLayerNorm"), normed<GruResetAfterLayerNorm>("GruResetAfterLayerNorm");
  for (Index rows : {1, 7, 8, 9, 31, 64, 200})
    for (Index columns : {1, 8, 12, 33, 64})
      for (Index K : {1, 31, 32, 100, 1000})
        shared<float, Precision::ieee>("ieee", rows, columns, K),
            shared<double, Precision::ieee>("float64", rows, columns, K),
            shared<float, Precision::tf32>("tf32", rows, columns, K),
            shared<float, Precision::tf32x3>("tf32x3", rows, columns, K),
            shared<float, Precision::fp16>("fp16", rows, columns, K),
            shared<Bfloat16, Precision::bf16>("bf16", rows, columns, K);
}
"""


STRUCTURES = (Steps, MaskRule, Rules, ForwardJob, BackwardJob)


def fields(type_: str, structure: type[ctypes.Structure]) -> str:
    """C++ that prints where every field lies."""
    lines = [f'printf("size {structure.__name__} %zu\\n", sizeof({type_}));']
    lines += [
        f'printf("field {structure.__name__} {field} %zu %zu\\n", offsetof({type_}, {field}), '
        f"sizeof((({type_}*)nullptr)->{field}));"
        for field, *_ in structure._fields_
    ]
    return "\n  ".join(lines)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The lines of the program, by their first word."""
    folder = tmp_path_factory.mktemp("picture")
    structures = (
        ("Steps", Steps),
        ("cuda::MaskRule", MaskRule),
        ("cuda::Regularization", Rules),
        ("ForwardJob<float>", ForwardJob),
        ("BackwardJob<double>", BackwardJob),
    )
    text = PROGRAM.replace("@FIELDS@", "\n  ".join(fields(*pair) for pair in structures))
    text = text.replace("@MOST_SUMS@", str(MOST_SUMS))
    (folder / "picture.cpp").write_text(text)
    subprocess.run(
        [COMPILER, "-std=c++17", "-DFUSEDRNN_EMULATED", "-Wno-invalid-offsetof", f"-I{ROOT / 'tests/cuda'}",
         f"-I{ROOT / 'csrc'}", folder / "picture.cpp", "-o", folder / "picture"],
        check=True,
    )  # fmt: skip
    out = subprocess.run([folder / "picture"], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in out.splitlines()]
    return {first: [line[1:] for line in lines if line[0] == first] for first in {line[0] for line in lines}}


@needs_compiler
def test_structures(printed):
    here = {s.__name__: s for s in STRUCTURES}
    assert {n: int(size) for n, size in printed["size"]} == {n: ctypes.sizeof(s) for n, s in here.items()}
    assert len(printed["field"]) == sum(len(s._fields_) for s in here.values())
    for structure, field, offset, size in printed["field"]:
        mine = getattr(here[structure], field)
        assert (mine.offset, mine.size) == (int(offset), int(size)), f"{structure}.{field}"


def test_no_field_is_left_out():
    """Sizes and offsets would not show two fields of a kind that have changed places."""
    text = (ROOT / "csrc/cuda/jobs.h").read_text() + (ROOT / "csrc/steps.h").read_text()
    for structure in STRUCTURES:
        name = {Rules: "Regularization"}.get(structure, structure.__name__)
        body = re.search(rf"struct {name} {{\n(.*?)\n}};", text, re.DOTALL)[1]
        body = re.sub(r"//.*", "", body)
        names = re.findall(r"\*?(\w+)\s*(?=[,;])", body)
        assert names == [field for field, *_ in structure._fields_]


@needs_compiler
@pytest.mark.parametrize("regularized", [False, True], ids=["", "regularized"])
@pytest.mark.parametrize("cell", [*CELLS, *NORMED[:4]], ids=name)
def test_cells(printed, cell, regularized):
    kernels = kernels_of(cell, regularized)
    (line,) = (line for line in printed["cell"] if line[0] == kernels.type)
    parts = [
        ",".join(map(str, (p.first, *p.gates)))
        for p in (kernels.input, kernels.recurrent, kernels.recurrent2)
    ]
    counts = kernels.accumulators, kernels.saved, kernels.has_c, kernels.whole, kernels.norm_sums
    assert line[1:] == [*(str(int(n)) for n in counts), *parts]
    assert f", {kernels_of(cell).type})" in (ROOT / "csrc/cells/cells.def").read_text()


@needs_compiler
def test_shared_memory(printed):
    assert len(printed["shared"]) == 7 * 5 * 5 * 6 * 5
    for kernel, precision, *line in printed["shared"]:
        tile, kept, rows, columns, K, *shares, size = map(int, line)
        of = (8, "ieee") if precision == "float64" else (4, precision)
        assert (tile, kept) == (Tile.of(*of).columns, Tile.of(*of).kept)
        layout = layout_of(kernel, rows, columns, tile, 8)
        assert list(layout) == [tile, *shares]
        assert shared_bytes(kernel, layout, columns, K, (24, 96), rows, 5, Bytes.of(*of)) == size
